"""Tests of moeut.py, cvmm.py, train.py and sample.py: `pytest` runs all of them in two minutes, on a CPU.

They are of two kinds: parity of a fast path with a plain reference, for the output and for every
gradient, and invariants, such as that no token sees the ones after it. No time is measured.

From top to bottom: the experts; the model; the scripts.
"""

import base64
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import types
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # lets the kernels run on a CPU; Triton must not be imported yet

from torch.utils.flop_counter import FlopCounterMode  # imports Triton

import cvmm
import moeut
import sample
import train
from moeut import KVCache, MoEUT, MoEUTConfig, Router, negative_entropy, preset, rotary_table, rotate, usage

DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()
KERNEL_DEVICE = DEVICES[-1]
needs_triton = pytest.mark.skipif(cvmm.triton is None, reason="triton is not installed")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def close(a, b, tol=1e-5):
    """All tensors of a and b are alike, up to tol relative to the largest entry. TF32 keeps 10 bits."""
    for s, t in zip(a, b, strict=True):
        atol = max(tol, 5e-3 if t.is_cuda else 0) * max(1, t.abs().max().item() if t.numel() else 0)
        torch.testing.assert_close(s, t, rtol=0, atol=atol)


def output_and_grads(f, *inputs, transposed=False):
    """f(*inputs) and the gradients of all inputs, for a random gradient that is the same in every call."""
    inputs = [t.detach().requires_grad_() for t in inputs]
    out = f(*inputs)
    dout = torch.randn(out.shape[::-1] if transposed else out.shape, generator=torch.Generator().manual_seed(1))
    dout = dout.to(out)
    return out.detach(), *torch.autograd.grad(out, inputs, dout.T if transposed else dout)


def grads_of(loss, model):
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


# ---------------------------------------------------------------------------------------------------
# Experts


@pytest.fixture
def always_sort(monkeypatch):
    monkeypatch.setattr(cvmm, "FEW_SLOTS", 0)


@pytest.fixture(params=["sorted", "all experts"])
def path(request, monkeypatch):
    """Both ways to multiply that have gradients, whatever the number of slots."""
    monkeypatch.setattr(cvmm, "FEW_SLOTS", 0)
    monkeypatch.setattr(cvmm, "ALL_EXPERTS", 0 if request.param == "sorted" else 10**9)


CHOICES = {
    "even": lambda m, n_expert: torch.arange(m) % n_expert,
    "random": lambda m, n_expert: torch.randint(n_expert, (m,)),
    "skewed": lambda m, n_expert: (n_expert * torch.rand(m) ** 4).long(),
    "gaps": lambda m, n_expert: torch.randint(n_expert // 3, (m,)) * 3 + 1,  # the first and the last are empty
    "one": lambda m, n_expert: torch.full((m,), n_expert - 2),
}
FANS = {"ffn up": (3, 1), "ffn down": (1, 3), "attention values": (8, 1), "attention outputs": (1, 8)}


def slots(fans, choice, device, n_token=37, n_in=19, n_out=23, n_expert=11, transposed=False):
    """x, w and the expert of each slot; transposed in memory, if so."""
    m = n_token * max(fans)
    shapes = (m // fans[0], n_in), (n_expert, n_in, n_out)
    if transposed:
        x, w = (torch.randn(*s[:-2], s[-1], s[-2]).mT for s in shapes)
    else:
        x, w = (torch.randn(s) for s in shapes)
    return x.to(device), w.to(device), CHOICES[choice](m, n_expert).to(device)


def check_cvmm(x, w, expert, fans, transposed=False):
    routing = cvmm.route(expert, len(w))
    ours = output_and_grads(lambda x, w: cvmm.cvmm(x, w, routing, *fans), x, w, transposed=transposed)
    close(ours, output_and_grads(lambda x, w: cvmm.cvmm_definition(x, w, expert, *fans), x, w, transposed=transposed))


def test_definition():
    fan_in, fan_out = 2, 3
    x, w, expert = torch.randn(6, 5), torch.randn(4, 5, 7), torch.randint(4, (12,))
    out = torch.zeros(4, 7)
    for s in range(12):
        out[s // fan_out] += x[s // fan_in] @ w[expert[s]]
    close([cvmm.cvmm_definition(x, w, expert, fan_in, fan_out)], [out])


@pytest.mark.parametrize("transposed", [False, True], ids=["contiguous", "transposed"])
@pytest.mark.parametrize("fans", FANS.values(), ids=FANS)
@pytest.mark.parametrize("n_token", [1, 37])  # in turn, all at once
def test_few_slots(n_token, fans, transposed):
    x, w, expert = slots(fans, "random", CPU, n_token=n_token, transposed=transposed)
    close([cvmm.few_slots_matmul(x, w, expert, *fans)], [cvmm.cvmm_definition(x, w, expert, *fans)])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("transposed", [False, True], ids=["contiguous", "transposed"])
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("fans", FANS.values(), ids=FANS)
def test_cvmm(fans, choice, transposed, device, always_sort):
    check_cvmm(*slots(fans, choice, device, transposed=transposed), fans, transposed)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("fans", FANS.values(), ids=FANS)
def test_cvmm_sizes(fans, device, always_sort):
    check_cvmm(*slots(fans, "random", device, n_token=1), fans)
    check_cvmm(*slots(fans, "random", device, n_token=1, n_in=1, n_out=1, n_expert=1), fans)
    check_cvmm(*slots(fans, "random", device, n_token=900), fans)  # several groups of experts, many tiles
    check_cvmm(*slots(fans, "skewed", device, n_token=300, n_expert=200, n_in=64, n_out=80), fans)


def slices_of_larger_tensors(*tensors):
    """Views whose rows are not adjacent in memory."""
    return [F.pad(t, (3, 2))[..., 3:-2] for t in tensors]


@pytest.mark.parametrize("device", DEVICES)
def test_cvmm_of_slices(device, path):
    x, w, expert = slots((3, 1), "random", device)
    check_cvmm(*slices_of_larger_tensors(x, w), expert, (3, 1))


def ffn_inputs(device="cpu", choice="random", N=29, C=19, n_hidden=13, E=7, K=3):
    x, w_up, w_down = torch.randn(N, C), torch.randn(E, C, n_hidden), torch.randn(E, n_hidden, C)
    return *(t.to(device) for t in (x, w_up, w_down, torch.randn(N, K))), CHOICES[choice](N * K, E).to(device)


def ffn(expert, n_expert):
    routing = cvmm.route(expert, n_expert)
    return lambda x, w_up, w_down, logits: cvmm.expert_ffn(x, w_up, w_down, logits.sigmoid(), routing)


def ffn_reference(expert):
    def f(x, w_up, w_down, logits):
        K = logits.shape[1]
        h = cvmm.cvmm_definition(x, w_up, expert, K, 1).relu() * logits.sigmoid().reshape(-1, 1)
        return cvmm.cvmm_definition(h, w_down, expert, 1, K)

    return f


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("choice", CHOICES)
def test_expert_ffn(choice, device, path):
    *inputs, expert = ffn_inputs(device, choice)
    close(output_and_grads(ffn(expert, 7), *inputs), output_and_grads(ffn_reference(expert), *inputs))
    x, w_up, w_down, logits = inputs
    views = *slices_of_larger_tensors(x), w_up.mT.contiguous().mT, w_down.mT.contiguous().mT, logits.T.contiguous().T
    close(output_and_grads(ffn(expert, 7), *views, transposed=True),
          output_and_grads(ffn_reference(expert), *inputs, transposed=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("N, C, n_hidden, E, K", [(1, 5, 3, 4, 4), (400, 24, 16, 40, 6), (65, 33, 128, 3, 1)])
def test_expert_ffn_sizes(N, C, n_hidden, E, K, device, always_sort):
    *inputs, expert = ffn_inputs(device, "random", N, C, n_hidden, E, K)
    close(output_and_grads(ffn(expert, E), *inputs), output_and_grads(ffn_reference(expert), *inputs))


@pytest.mark.parametrize("force", ["PyTorch", pytest.param("Triton", marks=needs_triton)])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.filterwarnings("ignore:invalid value")  # Triton's interpreter computes with numpy
def test_bad_numbers_stay_with_their_token_and_expert(bad, force, monkeypatch, always_sort):
    monkeypatch.setattr(cvmm, "force", force)
    x, w_up, w_down, logits, expert = ffn_inputs(KERNEL_DEVICE if force == "Triton" else CPU, N=200, K=1)
    x[0], w_up = bad, w_up.abs()
    expert[0] = 5
    out, dx, *dws, _ = output_and_grads(ffn(expert, 7), x, w_up, w_down, logits)
    assert not out[0].isfinite().any() and out[1:].isfinite().all() and dx[1:].isfinite().all()
    for dw in dws:
        others = torch.arange(7, device=dw.device) != 5
        assert not dw[5].isfinite().any() and dw[others].isfinite().all()


@pytest.mark.parametrize("device", DEVICES)
def test_gates_at_the_ends_of_the_sigmoid(device, path):
    """The backward pass divides by the gate, which may be exactly 0 or nearly so."""
    *inputs, expert = ffn_inputs(device)
    inputs[3][::3], inputs[3][1::3] = -200, -60  # sigmoids of 0 and 1e-26
    inputs[3][2, 0] = 200
    assert (inputs[3].sigmoid() == 0).any() and (inputs[3].sigmoid() == 1).any()
    ours = output_and_grads(ffn(expert, 7), *inputs)
    assert all(t.isfinite().all() for t in ours)
    close(ours, output_and_grads(ffn_reference(expert), *inputs))


N_HEAD, N_ATT_EXPERT, ATT_TOP_K = 3, 5, 2


def attention_inputs(device, N=27, C=11, D=6):
    """x, a, w_v, w_o, gate, expert. The experts of one head differ from each other, as top-K ensures."""
    w_v, w_o = (torch.randn(N_HEAD * N_ATT_EXPERT, *s) for s in ((C, D), (D, C)))
    expert = torch.rand(N, N_HEAD, N_ATT_EXPERT).topk(ATT_TOP_K).indices
    tensors = torch.randn(N, C), torch.randn(N, N_HEAD, D), w_v, w_o, torch.rand(N, N_HEAD, ATT_TOP_K), expert
    return [t.to(device) for t in tensors]


def chosen_matrices(w, expert):
    return w.unflatten(0, (N_HEAD, -1))[torch.arange(N_HEAD, device=w.device)[:, None], expert]  # [N, H, J, I, O]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("all_experts", [0, 10**9], ids=["sorted", "all"])
def test_expert_values_and_outputs(all_experts, device, monkeypatch, always_sort):
    monkeypatch.setattr(cvmm, "ALL_EXPERTS", all_experts)
    x, a, w_v, w_o, gate, expert = attention_inputs(device)
    close(output_and_grads(lambda x, w, gate: cvmm.expert_values(x, w, gate, expert), x, w_v, gate),
          output_and_grads(lambda x, w, gate: torch.einsum("nc,nhjcd,nhj->nhd", x, chosen_matrices(w, expert), gate),
                           x, w_v, gate))
    close(output_and_grads(lambda a, w, gate: cvmm.expert_outputs(a, w, gate, expert), a, w_o, gate),
          output_and_grads(lambda a, w, gate: torch.einsum("nhd,nhjdc,nhj->nc", a, chosen_matrices(w, expert), gate),
                           a, w_o, gate))


FUNCTIONS = ["cvmm", "expert_ffn", "expert_values", "expert_outputs"]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_few_slots_of_decoding(name, device, monkeypatch):
    """Without gradients, a handful of slots are not sorted: the same numbers."""
    f, *inputs = everything(device)[name]
    sorted_slots = f(*inputs).detach()
    monkeypatch.setattr(cvmm, "FEW_SLOTS", 10**9)
    monkeypatch.setattr(cvmm, "_sort_slots", None)
    with torch.no_grad():
        close([f(*inputs)], [sorted_slots])


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("all_experts", [0, 10**9], ids=["sorted", "all"])
def test_gradcheck(name, all_experts, always_sort, monkeypatch):
    """Finite differences in float64: the one reference that shares nothing with autograd."""
    monkeypatch.setattr(cvmm, "ALL_EXPERTS", all_experts)
    f, *inputs = everything("cpu", small=True)[name]
    assert torch.autograd.gradcheck(f, [t.double().requires_grad_() for t in inputs])


# The public functions as f(x, w, ...), with inputs: for the tests that treat them all alike


def everything(device, small=False):
    x, w, slot_expert = slots((3, 1), "random", device, **dict(n_token=5, n_in=3, n_out=4) if small else {})
    *ffn_in, ffn_expert = ffn_inputs(device, **dict(N=5, C=4, n_hidden=3, K=2) if small else {})
    xa, a, w_v, w_o, gate, expert = attention_inputs(device, **dict(N=4, C=3, D=2) if small else {})
    return {
        "cvmm": (lambda x, w: cvmm.cvmm(x, w, cvmm.route(slot_expert, 11), 3, 1), x, w),
        "expert_ffn": (ffn(ffn_expert, 7), *ffn_in),
        "expert_values": (lambda x, w, gate: cvmm.expert_values(x, w, gate, expert), xa, w_v, gate),
        "expert_outputs": (lambda a, w, gate: cvmm.expert_outputs(a, w, gate, expert), a, w_o, gate),
    }


@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_tokens(name, path):
    f, *inputs = everything(CPU)[name]
    if name == "cvmm":
        f = lambda x, w: cvmm.cvmm(x, w, cvmm.route(torch.empty(0, dtype=torch.long), len(w)), 3, 1)
    elif name == "expert_ffn":
        f = ffn(torch.empty(0, dtype=torch.long), 7)
    else:
        g, empty = getattr(cvmm, name), attention_inputs(CPU)[-1][:0]
        f = lambda x, w, gate: g(x, w, gate, empty)
    inputs = [t if t.dim() == 3 and len(t) in (7, 11, 15) else t[:0] for t in inputs]
    out, *grads = output_and_grads(f, *inputs)
    assert len(out) == 0 and all(g.shape == t.shape and not g.any() for g, t in zip(grads, inputs, strict=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_bfloat16(name, device, path):
    """Under autocast: bfloat16 out, and no error but that of rounding (1 / 256 of each number)."""
    f, *inputs = everything(device)[name]
    inputs = [t.bfloat16().float() for t in inputs]  # else the sign of a hidden unit near 0 could change
    with torch.autocast(device, torch.bfloat16):
        ours = output_and_grads(f, *inputs)
    assert ours[0].dtype == torch.bfloat16 and all(t.dtype == torch.float32 for t in ours[1:])
    for a, b in zip(ours, output_and_grads(f, *inputs), strict=True):
        error = ((a.float() - b).norm() / b.norm()).item()
        assert 1e-5 < error < 6e-3, error
    with torch.autocast(device, torch.bfloat16):  # activations in bfloat16 already, as inside a model
        low = output_and_grads(f, inputs[0].bfloat16(), *inputs[1:])
    assert low[1].dtype == torch.bfloat16 and all(t.dtype == torch.float32 for t in low[2:])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_repeats_add_up_in_float32(name, device, path):
    """63 equal gradients sum to 63 times one. In bfloat16 they would not: 8 bits cannot count that far."""
    f, *inputs = everything(device)[name]
    n = 63

    def repeated(x, *rest):
        weights = [cvmm.cast(w) if w.dim() == 3 and len(w) in (7, 11, 15) else w for w in rest]
        return torch.stack([f(x, *weights) for _ in range(n)]).sum(0, dtype=torch.float32)

    with torch.autocast(device, torch.bfloat16):
        one = output_and_grads(lambda *a: f(*a).float(), *inputs)
        many = output_and_grads(repeated, *inputs)
    weights = [i for i, t in enumerate(inputs, start=1) if t.dim() == 3 and len(t) in (7, 11, 15)]
    assert weights
    for i in weights:
        torch.testing.assert_close(many[i], n * one[i], rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_weight_gradients_are_float32_at_least(dtype, always_sort):
    x, w, expert = slots((3, 1), "random", "cpu")
    r = cvmm.route(expert, 11)
    dw = torch.ops.moeut.matmul_dw(x.to(dtype), torch.randn(len(expert), 23).to(dtype), *r, 3, 1)
    assert dw.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_two_runs_are_equal_bit_for_bit(name, device, path):
    f, *inputs = everything(device)[name]
    for a, b in zip(output_and_grads(f, *inputs), output_and_grads(f, *inputs), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("skew", [0.0, 0.5, 5.0])
def test_groups_of_experts(skew):
    """The PyTorch path: all slots in the rows of their expert, in order; few sizes; little padding."""
    E, K = 40, 3
    expert = (torch.randn(500, E) + skew * torch.randn(E)).topk(K).indices.flatten()
    slot, row, offsets, table = cvmm.torch_sort_slots(expert.int(), E)
    count = expert.bincount(minlength=E)
    assert torch.equal(slot[row], torch.arange(500 * K)) and len(slot) >= offsets[-1]
    seen, first = [], 0
    for experts, rows in cvmm._groups(table):
        assert rows.start == first and len(experts) <= 16
        first, size = rows.stop, (rows.stop - rows.start) // len(experts)
        for i, e in enumerate(experts):
            own = slot[rows.start + i * size:][:size]
            assert offsets[e] == rows.start + i * size and size % 8 == 0
            assert torch.equal(own[:count[e]], (expert == e).nonzero()[:, 0])
            assert (expert[own] == e).all() and 7 / 8 * size < count[e] + 8  # padding repeats a slot of the expert
        seen += experts
    assert sorted(seen) == count.nonzero()[:, 0].tolist() and first == offsets[-1]


def test_bad_shapes(path):
    x, w, expert = slots((3, 1), "random", "cpu")
    r = cvmm.route(expert, 11)
    for args in ((x, w, r, 1, 1), (x[:-1], w, r, 3, 1), (x[:, :-1], w, r, 3, 1), (x, w, r, 3, 2)):
        with pytest.raises(ValueError, match="cvmm"):
            cvmm.cvmm(*args)
    x, w_up, w_down, gate, expert = ffn_inputs()
    r = cvmm.route(expert, 7)
    for args in ((x[:-1], w_up, w_down, gate), (x[:, :-1], w_up, w_down, gate), (x, w_up, w_down, gate[:, :-1]),
                 (x, w_up, w_down, gate[:-1]), (x, w_up, w_down[:, :-1], gate), (x, w_up, w_down[:-1], gate)):
        with pytest.raises(ValueError, match="expert_ffn"):
            cvmm.expert_ffn(*args, r)
    xa, a, w_v, w_o, gate, expert = attention_inputs(CPU)
    for args in ((xa[:-1], w_v, gate, expert), (xa, w_v[:-1], gate, expert), (xa, w_v, gate, expert[:, :, :1])):
        with pytest.raises(ValueError, match="expert_values"):
            cvmm.expert_values(*args)
    for args in ((a[:-1], w_o, gate, expert), (a, w_o[:, :-1], gate, expert), (a, w_o, gate[:-1], expert)):
        with pytest.raises(ValueError, match="expert_outputs"):
            cvmm.expert_outputs(*args)


def test_bad_routing(always_sort):
    x, w, expert = slots((3, 1), "random", CPU)
    with pytest.raises(ValueError, match="another number of experts"):
        cvmm.cvmm(x, w, cvmm.route(expert, 12), 3, 1)
    *_, logits, expert = inputs = ffn_inputs()
    with pytest.raises(ValueError, match="another number of experts"):
        cvmm.expert_ffn(*inputs[:4], cvmm.route(expert, 8))
    with pytest.raises(TypeError, match="integers"):
        cvmm.route(expert.float(), 7)
    with pytest.raises(ValueError, match="16 bits"):
        cvmm.route(expert, 2**15)


@needs_triton
def test_no_float64_kernels(kernels):
    x, w, expert = slots((3, 1), "random", KERNEL_DEVICE)
    with pytest.raises(TypeError, match="float64"):
        cvmm.cvmm(x.double(), w.double(), cvmm.route(expert, 11), 3, 1)


def test_kernels_follow_the_switch_for_tf32(monkeypatch):
    monkeypatch.setattr(cvmm, "INTERPRETED", False)
    x, before = torch.empty(1), torch.backends.cuda.matmul.fp32_precision
    try:
        for precision in ("ieee", "tf32"):
            torch.backends.cuda.matmul.fp32_precision = precision
            assert cvmm.number_format(x)["PRECISION"] == precision
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["sort_slots", "matmul", "matmul_dw", "ffn", "ffn_backward", "spread"])
def test_custom_op(name, device, always_sort):
    check_custom_op(name, device)


def check_custom_op(name, device):
    """Schema, shape function and values, without which torch.compile breaks."""
    x, w, expert = slots((3, 1), "random", device)
    dout = torch.randn(len(expert), 23, device=device)
    r = cvmm.route(expert, 11)
    ffn_x, w_up, w_down, gate, ffn_expert = ffn_inputs(device)
    ffn_r = cvmm.route(ffn_expert, 7)
    _, h = torch.ops.moeut.ffn(ffn_x, w_up, w_down, gate, *ffn_r)
    args = {
        "sort_slots": (expert, 11),
        "spread": (gate, ffn_expert.view(gate.shape), 7),
        "matmul": (x, w, *r, 3, 1),
        "matmul_dw": (x, dout, *r, 3, 1),
        "ffn": (ffn_x, w_up, w_down, gate, *ffn_r),
        "ffn_backward": (torch.randn_like(ffn_x), ffn_x, h, w_up, w_down, gate, *ffn_r),
    }
    op = getattr(torch.ops.moeut, name).default
    torch.library.opcheck(op, args[name])
    if name in ("matmul", "ffn", "ffn_backward"):  # also with weights that are transposed in memory
        weights = {id(w): w.mT.contiguous().mT for w in (w, w_up, w_down)}
        torch.library.opcheck(op, tuple(weights.get(id(t), t) for t in args[name]))


# ---------------------------------------------------------------------------------------------------
# The Triton kernels: on a GPU, or in Triton's interpreter, which runs the same code on CPU tensors

@pytest.fixture
def kernels(monkeypatch, always_sort):
    monkeypatch.setattr(cvmm, "ALL_EXPERTS", 0)
    monkeypatch.setattr(cvmm, "force", "Triton")


def check_kernels(f, reference, inputs, dtype):
    """f in `dtype` against the reference in float32 on the same numbers, output and all gradients."""
    low = [t.to(dtype) if i < 3 or t.dim() == 3 else t for i, t in enumerate(inputs)]
    ours = [t.float() for t in output_and_grads(f, *low)]
    close(ours, output_and_grads(reference, *(t.float() for t in low)),
          {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype])


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fans, choice, sizes", [
    ((3, 1), "random", {}), ((1, 3), "skewed", {}), ((8, 1), "gaps", {}), ((1, 8), "one", {}),
    ((3, 1), "random", dict(n_token=1)), ((1, 3), "random", dict(n_in=1, n_out=1, n_expert=1)),
    ((2, 1), "random", dict(n_in=48, n_out=150, n_expert=3)), ((1, 2), "even", dict(n_in=150, n_out=64, n_expert=3)),
], ids=str)
def test_kernels(fans, choice, sizes, dtype, kernels):
    """Odd sizes, several tiles and blocks, empty experts, one that takes all, a single token."""
    if choice == "one":
        sizes = dict(n_expert=5)
    x, w, expert = slots(fans, choice, KERNEL_DEVICE, **sizes)
    w = w / w.shape[1] ** 0.5
    r = cvmm.route(expert, len(w))
    check_kernels(lambda x, w: cvmm.cvmm(x, w, r, *fans), lambda x, w: cvmm.cvmm_definition(x, w, expert, *fans),
                  [x, w], dtype)


@needs_triton
@pytest.mark.parametrize("n_in, n_out", [(16, 32), (19, 23)], ids=["aligned", "odd"])
@pytest.mark.parametrize("fans", [(2, 1), (1, 2)], ids=str)
def test_kernels_on_transposed_tensors(fans, n_in, n_out, kernels):
    """The numbers of a row need not be side by side, in x, in w or in the gradient of the output."""
    x, w, expert = slots(fans, "random", KERNEL_DEVICE, n_in=n_in, n_out=n_out, n_expert=5, transposed=True)
    check_cvmm(x, w, expert, fans, transposed=True)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("choice, sizes", [
    ("random", {}), ("one", {}), ("gaps", dict(N=1)), ("skewed", dict(N=70, C=50, n_hidden=150, E=9, K=4)),
], ids=str)
def test_ffn_kernels(choice, sizes, dtype, kernels):
    x, w_up, w_down, logits, expert = ffn_inputs(KERNEL_DEVICE, choice, **sizes)
    inputs = [x.to(dtype).float(), w_up / w_up.shape[1] ** 0.5, w_down / w_down.shape[1] ** 0.5, logits]
    # A hidden unit whose sign depends on rounding has no gradient to compare: keep away from zero.
    z = cvmm.cvmm_definition(x.to(dtype).float(), inputs[1].to(dtype).float(), expert, logits.shape[1], 1)
    assert z.abs().min() > 1e-6
    check_kernels(ffn(expert, len(w_up)), ffn_reference(expert), inputs, dtype)


@needs_triton
@pytest.mark.parametrize("name", ["sort_slots", "matmul", "matmul_dw", "ffn", "ffn_backward"])
def test_custom_op_with_kernels(name, kernels):
    check_custom_op(name, KERNEL_DEVICE)


@needs_triton
def test_few_columns_at_a_time(kernels, monkeypatch):
    """A smaller bound on the memory of the slots changes no bit."""
    x, w, expert = slots((1, 3), "random", KERNEL_DEVICE, n_in=32, n_out=400)
    seen = []
    monkeypatch.setattr(cvmm, "listeners", [lambda kernel, _, tensors, __: seen.append(tensors["out"].nbytes) if kernel else 0])
    results = []
    for bound in (2**31, 1):
        monkeypatch.setattr(cvmm, "SLOT_BYTES", bound)
        results.append(cvmm.cvmm(x, w, cvmm.route(expert, 11), 1, 3))
    assert torch.equal(*results)
    assert len(seen) == 1 + 4 and max(seen[1:]) == len(expert) * 128 * 4


@needs_triton
def test_offsets_beyond_32_bits(kernels):
    """Rows and experts 2^30 numbers apart: the third begins where 32-bit integers end."""
    rows = torch.empty(2**31 + 2**12, dtype=torch.float16, device=KERNEL_DEVICE)  # of which a few pages are touched
    far = torch.empty(2**31 + 2**12, dtype=torch.float16, device=KERNEL_DEVICE)
    x, w = rows.as_strided((3, 16), (2**30, 1)), far.as_strided((3, 16, 32), (2**30, 32, 1))
    x.copy_(torch.randn(3, 16))
    w.copy_(torch.randn(3, 16, 32) / 4)
    expert = torch.tensor([0, 1, 2, 2, 2, 0], device=KERNEL_DEVICE)
    r = cvmm.route(expert, 3)
    inputs = [x.detach().requires_grad_(), w.detach().requires_grad_()]
    near = [t.detach().float().contiguous().requires_grad_() for t in (x, w)]
    dout = torch.randn(6, 32, device=KERNEL_DEVICE)
    y, y_near = cvmm.cvmm(*inputs, r, 2, 1), cvmm.cvmm_definition(*near, expert, 2, 1)
    ours = [y, *torch.autograd.grad(y, inputs, dout.half())]
    close([t.float() for t in ours], [y_near, *torch.autograd.grad(y_near, near, dout)], 2e-3)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_model_trains_through_the_kernels(dtype, kernels, monkeypatch):
    """A few steps of a whole model, kernels against PyTorch: the same losses."""

    def losses(path):
        monkeypatch.setattr(cvmm, "force", path)
        torch.manual_seed(0)
        model = MoEUT(tiny(n_layer=2, group_size=1, n_head=2, n_att_expert=3, n_expert=4)).to(KERNEL_DEVICE)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        idx = tokens(2, 17).to(KERNEL_DEVICE)
        for _ in range(3):
            with torch.autocast(KERNEL_DEVICE, dtype, enabled=dtype != torch.float32):
                _, loss, reg = model(idx[:, :-1], idx[:, 1:])
            optimizer.zero_grad()
            (loss + reg).backward()
            optimizer.step()
            yield loss.item()

    ours, theirs = list(losses("Triton")), list(losses("PyTorch"))
    assert ours == pytest.approx(theirs, rel=1e-5 if dtype == torch.float32 else 5e-3)
    assert ours[2] < ours[0] - 0.1


@needs_triton
def test_bytes_that_the_kernels_move():
    """The feedforward of the 244M model on 65,536 tokens: every tensor of a launch counted once. The [M, C]
    rows of down and of dx, written and read again for their sum, are 8.6 GB of it."""
    launches = cvmm.real_launches("244M", 65536, torch.bfloat16)
    assert sum(cvmm.n_bytes(tensors) for _, _, tensors, _, use in launches if use.startswith("ffn")) <= 12.5e9


@needs_triton
def test_bytes_saved_for_backward(kernels):
    """Width, experts per token and expert size of the 244M model, under autocast; the weights' copies, which
    all repeats share, are not counted."""
    N, C, K, E = 64, 1024, 16, 20
    x, w_up, w_down = torch.randn(N, C), torch.randn(E, C, 128), torch.randn(E, 128, C)
    gate, expert = torch.rand(N, E).topk(K)
    saved = {}
    with torch.autocast("cpu", torch.bfloat16):
        weights = cvmm.cast(w_up.requires_grad_()), cvmm.cast(w_down.requires_grad_())
        copies = {w.low.data_ptr() for w in weights}
        r = cvmm.route(expert, E)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.setdefault(t.data_ptr(), t), lambda t: t):
            cvmm.expert_ffn(x.bfloat16().requires_grad_(), *weights, gate.requires_grad_(), r)
    table = r.table.nbytes + r.offsets.nbytes  # of the order of the number of experts, not of tokens
    assert (sum(t.nbytes for p, t in saved.items() if p not in copies) - table) / N <= 6500


@pytest.mark.skipif(cvmm.triton is None or sys.platform != "linux", reason="needs triton, with its cuobjdump")
@pytest.mark.parametrize("only", [("bfloat16", "65536"), pytest.param((), marks=pytest.mark.slow)], ids=["some", "all"])
def test_what_the_kernels_compile_to(only):
    """Ahead of time, for the 44M, 244M and 1B models: no spills, tensor cores, asynchronous copies, no atomics.
    All: in every number format, also for batches so small that the tiles shrink."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    halves = [subprocess.Popen([sys.executable, cvmm.__file__, "--report", *only, *targets], env=env,
                               stdout=subprocess.PIPE, text=True)  # one for each core
              for targets in (["sm_90"], ["sm_80", "gfx942"])]
    lines = [line for half in halves for line in half.communicate()[0].splitlines() if "_kernel," in line]
    assert [half.returncode for half in halves] == [0, 0]
    found = {target: [line for line in lines if f", {target}" in line] for target in cvmm.TARGETS}
    assert len(found["sm_80"]) == len(found["sm_90"]) == len(found["gfx942"]) >= (8 if only else 60)
    for line in found["sm_80"] + found["sm_90"]:
        count = lambda name: int(re.search(rf"\b{name} (\d+)", line)[1])
        assert count("stack") == 0 and count("atomics") == 0 and count("async_copies") > 0, line
        if "float32" not in line:  # which has none; TF32 has
            large = ", sm_90" in line and ", 65536," in line  # a warp group multiplies 64 rows at least
            assert count("HGMMA") + (0 if large else count("HMMA")) > 0, line


# ---------------------------------------------------------------------------------------------------
# Model


def tiny(**changes) -> MoEUTConfig:
    sizes = dict(vocab_size=33, block_size=16, n_layer=4, group_size=2, n_embd=20, n_head=3, head_size=10, n_expert=6,
                 expert_size=7, top_k=2, n_att_expert=4, att_top_k=2, ffn_size=24)
    return MoEUTConfig(**{**sizes, **changes})


FAMILY = {
    "MoEUT": dict(),
    "MoEUT pre": dict(layernorm="pre"),
    "MoEUT post": dict(layernorm="post"),
    "Transformer": dict(ffn="dense", attention="dense", layernorm="pre", group_size=4),
    "Transformer post": dict(ffn="dense", attention="dense", layernorm="post", group_size=4),
    "Universal Transformer": dict(ffn="dense", attention="dense", layernorm="pre", group_size=1),
    "sigma-MoE": dict(attention="dense", group_size=4),
    "SwitchHead": dict(ffn="dense", layernorm="pre", group_size=4),
}
family = pytest.mark.parametrize("changes", FAMILY.values(), ids=FAMILY)


def make(config) -> MoEUT:
    """A model in float64, routers apart. At its initialisation it does little: larger weights make errors visible."""
    model = MoEUT(config).double()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "layers" in name:
                p.mul_(2).add_(0.1 * torch.randn_like(p))
    return model


def tokens(*shape):
    return torch.randint(33, shape)


@pytest.mark.parametrize("name, count", {
    "moeut-44M": 44_345_792, "moeut-126M": 125_669_696, "moeut-244M": 243_326_784, "moeut-318M": 318_107_456,
    "moeut-727M": 727_424_320, "moeut-1B": 1_040_319_296, "dense-44M": 44_544_264, "dense-126M": 125_654_336,
    "dense-244M": 243_568_700, "dense-318M": 319_293_584, "dense-727M": 728_694_080, "dense-1B": 1_044_300_608,
}.items())
def test_parameter_counts_of_the_paper(name, count):
    assert moeut.count_params(preset(name)) == count


@pytest.mark.parametrize("name", ["dense-tiny", "universal-tiny", "sigma-moe-tiny", "switchhead-tiny", "dense-small"])
def test_presets_have_equally_many_parameters(name):
    assert moeut.count_params(preset(name)) == pytest.approx(moeut.count_params(preset(name.split("-")[-1])), rel=0.005)


@pytest.mark.parametrize("name", ["tiny", "dense-tiny", "sigma-moe-tiny", "switchhead-tiny", "moeut-44M"])
def test_idle_params(name):
    """As many as a model with the chosen experts only lacks, rows of the routers apart."""
    c = preset(name)
    few = replace(c, n_expert=c.top_k, n_att_expert=c.att_top_k)
    rows = (c.n_expert - c.top_k) * (c.ffn == "moe") + 2 * c.n_head * (c.n_att_expert - c.att_top_k) * (c.attention == "moe")
    assert c.idle_params() == moeut.count_params(c) - moeut.count_params(few) - c.group_size * rows * c.n_embd


def test_table_of_presets(capsys):
    moeut.print_presets()
    table = capsys.readouterr().out
    assert [name for name in moeut.PRESETS if f"{name} " not in table] == [] and "44,345,792" in table


@pytest.mark.parametrize("name", ["tiny", "dense-tiny", "sigma-moe-tiny", "switchhead-tiny"])
def test_flop_counter(name, path):
    """torch counts 2 operations per MAC of the formula, which has the gates on top, and twice as many backward.
    With all experts computed, that many more."""
    cvmm.register_flops()
    c, B = preset(name), 2
    model, idx = MoEUT(c), tokens(B, c.block_size)
    with FlopCounterMode(display=False) as forward, sdpa_kernel(SDPBackend.MATH):
        loss = model(idx, idx).loss
    gates = c.top_k * c.expert_size * (c.ffn == "moe") + 2 * c.att_top_k * c.n_head * c.head_size * (c.attention == "moe")
    idle = 2 * (c.n_att_expert - c.att_top_k) * c.n_head * c.head_size * c.n_embd
    extra = idle * (c.attention == "moe" and cvmm.ALL_EXPERTS > 0)
    macs = c.macs_per_token() + c.n_embd * c.vocab_size + c.n_layer * (extra - gates)
    assert forward.get_total_flops() == 2 * B * c.block_size * macs
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    assert backward.get_total_flops() == 2 * forward.get_total_flops()


@pytest.mark.parametrize("field", [f.name for f in fields(MoEUTConfig) if f.type is int])
def test_sizes_are_positive(field):
    with pytest.raises(ValueError, match=field):
        MoEUTConfig(**{field: 0})


@pytest.mark.parametrize("field, changes", [
    ("n_layer", dict(n_layer=5)), ("group_size", dict(group_size=5)), ("top_k", dict(top_k=17)),
    ("att_top_k", dict(att_top_k=5)), ("ffn", dict(ffn="sparse")), ("attention", dict(attention="linear")),
    ("layernorm", dict(layernorm="none")), ("layernorm", dict(ffn="dense")), ("dropout", dict(dropout=1.0)),
    ("dropout", dict(dropout=-0.1)), ("head_size", dict(head_size=3)),
])
def test_invalid_config(field, changes):
    with pytest.raises(ValueError, match=field):
        MoEUTConfig(**changes)


def test_unknown_preset():
    with pytest.raises(ValueError, match="'huge'"):
        preset("huge")


def test_macs_of_the_paper():
    """The appendix: MoEUT needs 0.88 of the dense model's multiplications at 44M and 0.60 at 244M."""
    ratio = lambda size: preset(f"moeut-{size}").macs_per_token() / preset(f"dense-{size}").macs_per_token()
    assert ratio("44M") == pytest.approx(0.88, abs=0.01)
    assert ratio("244M") == pytest.approx(0.60, abs=0.01)


def equations(model, idx):
    """Logits as the equations of the paper read: all experts for every token, most of them with gate 0."""
    c, p = model.config, dict(model.named_parameters())
    T, r = idx.shape[1], c.head_size // 4 * 2
    phase = torch.arange(T)[:, None] * 10000.0 ** -(torch.arange(0, r, 2) / r)
    spin = torch.polar(torch.ones_like(phase), phase).to(torch.complex128)               # [T, r/2]
    norm = lambda name, x: F.layer_norm(x, x.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"])

    def rope(x):  # pairs (i, i + r/2) are complex numbers, which turn with their position
        z = torch.complex(x[..., : r // 2], x[..., r // 2:r]) * spin
        return torch.cat((z.real, z.imag, x[..., r:]), -1)

    def gates(logits, k):
        return torch.where(logits >= logits.topk(k).values[..., -1:], logits.sigmoid(), 0)

    def attention(a, x, n):
        w_qk = p[f"{a}.qk.weight"].view(2, c.n_head, -1, c.n_embd)
        q, k = (rope(t) for t in torch.einsum("btc,shdc->sbhtd", n, w_qk))
        logits = (n @ p[f"{a}.router.weight"].T).view(*n.shape[:2], 2, c.n_head, c.n_att_expert)
        s_v, s_o = gates(logits, c.att_top_k).unbind(2)                                  # [B, T, H, A] both
        w_v, w_o = (p[f"{a}.{w}"].unflatten(0, (c.n_head, -1)) for w in ("w_v", "w_o"))
        v = torch.einsum("btc,hacd,btha->bhtd", x, w_v, s_v)
        score = (q @ k.mT / math.sqrt(c.head_size)).masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf)
        return torch.einsum("bhtd,hadc,btha->btc", score.softmax(-1) @ v, w_o, s_o)

    def ffn(a, x, n):
        h = torch.einsum("btc,ecf->btef", x, p[f"{a}.w_up"]).relu()
        return torch.einsum("btef,efc,bte->btc", h, p[f"{a}.w_down"], gates(n @ p[f"{a}.router.weight"].T, c.top_k))

    x = p["embedding.weight"][idx]
    for i in range(c.n_layer):
        a = f"layers.{i % c.group_size}"
        for f, ln in ((attention, f"{a}.ln1"), (ffn, f"{a}.ln2")):
            name = f"{a}.{f.__name__}"
            if c.layernorm == "post":
                x = norm(ln, x + f(name, x, x))
            else:
                n = norm(ln, x)
                x = x + f(name, x if c.layernorm == "peri" else n, n)
    return (x if c.layernorm == "post" else norm("ln", x)) @ p["head.weight"].T + p["head.bias"]


@pytest.mark.parametrize("layernorm", ["peri", "pre", "post"])
def test_equations_of_the_paper(layernorm):
    model, idx, targets = make(tiny(layernorm=layernorm)).eval(), tokens(2, 16), tokens(2, 16)
    logits, loss, _ = model(idx, targets)
    expected = equations(model, idx)
    close([logits], [expected])
    expected_loss = -expected.log_softmax(-1).gather(-1, targets[..., None]).mean()
    close([loss.double()], [expected_loss])
    close(grads_of(loss, model).values(), grads_of(expected_loss, model).values(), 1e-4)


@family
def test_trains(changes):
    """Forward and backward; every parameter has a gradient."""
    model = MoEUT(tiny(**changes))
    _, loss, reg = model(tokens(4, 16), tokens(4, 16))
    (loss + reg).backward()
    assert loss.item() == pytest.approx(math.log(33), rel=0.2)
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_ignored_targets():
    model, idx, targets = make(tiny()).eval(), tokens(2, 16), tokens(2, 16)
    targets[:, 9:] = -1
    close([model(idx, targets).loss], [model(idx[:, :9], targets[:, :9]).loss])


@family
def test_causal(changes):
    model, idx = make(tiny(**changes)).eval(), tokens(2, 16)
    changed = idx.clone()
    changed[:, 9] = (idx[:, 9] + 1) % 33
    a, b = model(idx).logits, model(changed).logits
    close([a[:, :9]], [b[:, :9]])
    assert ((a - b)[:, 9:].abs().amax((0, 2)) > 1e-4).all()


@family
def test_one_sequence_does_not_see_another(changes):
    model, idx = make(tiny(**changes)).eval(), tokens(3, 16)
    close([model(idx).logits], [torch.cat([model(i[None]).logits for i in idx])])


@pytest.mark.parametrize("changes", [dict(), dict(group_size=1), dict(n_layer=6), FAMILY["Universal Transformer"]])
def test_weights_are_shared(changes):
    """The gradient of a shared layer is the sum over its applications, each taken as a layer of its own."""
    shared = make(tiny(**changes)).eval()
    G, L = shared.config.group_size, shared.config.n_layer
    unrolled = make(tiny(**{**changes, "group_size": L})).eval()
    unrolled.load_state_dict({k: v for k, v in shared.state_dict().items() if "layers" not in k}, strict=False)
    for i in range(L):
        unrolled.layers[i].load_state_dict(shared.layers[i % G].state_dict())
    idx, targets = tokens(2, 16), tokens(2, 16)
    close([shared(idx).logits], [unrolled(idx).logits])
    total = {}
    for name, grad in grads_of(unrolled(idx, targets).loss, unrolled).items():
        if name.startswith("layers."):
            _, i, rest = name.split(".", 2)
            name = f"layers.{int(i) % G}.{rest}"
        total[name] = total.get(name, 0) + grad
    ours = grads_of(shared(idx, targets).loss, shared)
    close(ours.values(), [total[name] for name in ours])


def test_depth_costs_no_parameters():
    counts = {L: MoEUT(tiny(n_layer=L)).n_params() for L in (2, 4, 8)}
    assert len(set(counts.values())) == 1
    assert MoEUT(tiny(group_size=1)).n_params() < counts[4] < MoEUT(tiny(group_size=4)).n_params()


@pytest.mark.parametrize("chunks", [[40], [1] * 40, [7] + [1] * 33, [1, 20, 1, 13, 5], [16, 16, 8]], ids=str)
@family
def test_cache(changes, chunks):
    """Token by token or chunk by chunk, also far beyond block_size: the logits are those of one forward pass."""
    model, idx = make(tiny(**changes)).eval(), tokens(2, 40)
    cache = KVCache(model.config, 2, 40, dtype=torch.float64)
    with torch.no_grad():
        logits = torch.cat([model(part, cache=cache).logits for part in idx.split(chunks, dim=1)], dim=1)
    close([logits], [model(idx).logits])
    with pytest.raises(ValueError, match="capacity"):
        model(idx[:, :1], cache=cache)
    with pytest.raises(ValueError, match="batch of 1"):
        model(idx, cache=KVCache(model.config, 1, 40, dtype=torch.float64))


def test_training_after_sampling(always_sort, monkeypatch):
    """Buffers that are first made while sampling can be used for training."""
    monkeypatch.setattr(cvmm, "scratch", cvmm.Scratch())
    model = MoEUT(tiny())
    list(model.eval().generate(tokens(2, 16), 2))
    out = model.train()(tokens(2, 16), tokens(2, 16))
    (out.loss + out.reg).backward()


@pytest.mark.parametrize("bad", [dict(temperature=-1), dict(top_k=0), dict(top_p=0.0), dict(top_p=1.5)], ids=str)
def test_generate_refuses(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        next(make(tiny()).eval().generate(tokens(1, 4), 1, **bad))


def test_all_experts_with_gate_one_are_a_dense_ffn():
    c = tiny(n_expert=6, top_k=6, ffn_size=6 * 7)
    moe, dense = moeut.SigmaMoE(c).double(), moeut.DenseFFN(c).double()
    dense.init_weights(1)
    moe.router.weight.data.fill_(1)
    moe.w_up.data = dense.up.weight.data.unflatten(0, (6, 7)).mT
    moe.w_down.data = dense.down.weight.data.T.unflatten(0, (6, 7))
    x, surely = torch.randn(2, 16, 20).double(), torch.full((2, 16, 20), 50.0).double()
    close(output_and_grads(lambda x: moe(x, surely, moe.cast_weights())[0], x),
          output_and_grads(lambda x: dense(x, x, ())[0], x))


def test_one_expert_per_head_with_gate_one_is_dense_attention():
    c = tiny(n_att_expert=1, att_top_k=1)
    moe, dense = moeut.SwitchHead(c).double(), moeut.DenseAttention(c).double()
    dense.init_weights(1)
    moe.qk.weight.data = dense.qk.weight.data
    moe.w_v.data = dense.v.weight.data.unflatten(0, (3, 10)).mT
    moe.w_o.data = dense.o.weight.data.T.unflatten(0, (3, 10))
    x = torch.randn(2, 16, 20).double()
    n = torch.cat((torch.full((2, 16, 1), 1000.0), torch.randn(2, 16, 19)), -1).double()
    moe.router.weight.data.zero_()[:, 0] = 1
    rotary, remember = rotary_table(10, 0, 16, CPU), lambda k, v: (k, v)
    close(output_and_grads(lambda x: moe(x, n, moe.cast_weights(), rotary, remember)[0], x),
          output_and_grads(lambda x: dense(x, n, (), rotary, remember)[0], x))


def test_entropy_extremes():
    alike, one = torch.zeros(2, 5, 8), torch.zeros(2, 5, 8)
    one[..., 3] = 500
    turns = 500 * torch.eye(8).view(1, 8, 8)  # every step has another favourite: over time, all are used alike
    close([negative_entropy(usage(t)) for t in (alike, one, turns)],
          [torch.full((2,), -math.log(8)), torch.zeros(2), torch.full((1,), -math.log(8))])


def router_logits(model, *args):
    """Output of the model, and the logits of every router, one [B, T, groups, E] per repeat."""
    seen = {}
    note = lambda m, _, out: seen.setdefault(m, []).append(out.unflatten(-1, (m.n_choice, -1)))
    hooks = [m.register_forward_hook(note) for m in model.modules() if isinstance(m, Router)]
    out = model(*args)
    for hook in hooks:
        hook.remove()
    return out, seen


@pytest.mark.parametrize("changes", [dict(), dict(group_size=1), dict(attention="dense"), FAMILY["SwitchHead"]])
def test_regulariser(changes):
    """Per sequence, over all repeats and time steps together; gradients too."""
    model = make(tiny(ffn_reg=0.7, att_reg=0.3, **changes)).train()
    (_, _, reg), seen = router_logits(model, tokens(3, 16))
    expected = 0
    for router, logits in seen.items():
        assert len(logits) == model.config.n_repeat
        p = torch.cat(logits, dim=1).softmax(-1).mean(1)                                 # [B, groups, E]
        entropy = (p * p.log()).sum(-1).mean(0)                                          # [groups]
        expected += 0.7 * entropy.sum() if router.n_choice == 1 else 0.3 * entropy.unflatten(0, (2, -1)).mean(1).sum()
    close([reg], [expected])
    weights = [router.weight for router in seen]
    ours = torch.autograd.grad(reg, weights, retain_graph=True)
    assert all(grad.any() for grad in ours)
    close(ours, torch.autograd.grad(expected, weights))
    assert model.eval()(tokens(3, 16)).reg.item() == 0


def test_routing_is_float32_under_autocast():
    model = MoEUT(tiny())
    with torch.autocast("cpu", torch.bfloat16):
        out, seen = router_logits(model, tokens(2, 16))
    assert out.logits.dtype == torch.bfloat16 and out.reg.dtype == torch.float32
    for logits in (t for ts in seen.values() for t in ts):
        assert logits.dtype == torch.float32 and (logits.bfloat16() != logits).any()


def test_routing_of_a_float64_model_is_float64():
    _, seen = router_logits(MoEUT(tiny()).double(), tokens(2, 16))
    assert all(logits.dtype == torch.float64 for ts in seen.values() for logits in ts)


@pytest.mark.parametrize("moe", [True, False], ids=["moe", "dense"])
def test_initialisation(moe):
    kind = dict() if moe else dict(ffn="dense", attention="dense", layernorm="pre")
    c = MoEUTConfig(n_layer=6, group_size=2, n_embd=256, n_head=4, head_size=32, n_expert=16, expert_size=64, top_k=2,
                    n_att_expert=8, att_top_k=2, ffn_size=384, **kind)
    a = math.sqrt(2 / 6)  # 6 applications, although there are 2 layers
    expected = {
        "embedding.weight": 1 / 16, "head.weight": 1 / 16 / math.sqrt(3), "head.bias": 1 / 16 / math.sqrt(3),
        "attention.qk.weight": a / 16, "attention.router.weight": a / 16, "attention.w_v": a / 16,
        "attention.w_o": a / math.sqrt(4 * 32), "attention.v.weight": a / 16,
        "attention.o.weight": a / math.sqrt(4 * 32),
        "ffn.router.weight": a / 16, "ffn.w_up": a / 16, "ffn.w_down": a / math.sqrt(16 * 64),
        "ffn.up.weight": a / 16, "ffn.up.bias": 0, "ffn.down.weight": a / math.sqrt(384), "ffn.down.bias": 0,
    }
    for name, p in MoEUT(c).named_parameters():
        short = name.split(".", 2)[2] if name.startswith("layers.") else name
        if short.startswith("ln"):
            assert (p == (1 if name.endswith("weight") else 0)).all(), name
        else:
            tolerance = 0.05 if p.numel() > 1000 else 0.2
            assert p.std().item() == pytest.approx(expected[short], rel=tolerance), name
            assert abs(p.mean().item()) <= 5 * expected[short] / math.sqrt(p.numel()), name


def loss_and_grads(model, idx, targets):
    torch.manual_seed(0)  # of dropout
    out = model(idx, targets)
    return out.loss.detach(), out.reg.detach(), *grads_of(out.loss + out.reg, model).values()


def test_recompute():
    """Activation checkpointing runs every layer twice, with the same dropout, and changes no number."""
    model, idx, targets = make(tiny(dropout=0.3)).train(), tokens(2, 16), tokens(2, 16)
    calls = []
    model.layers[0].register_forward_pre_hook(lambda *_: calls.append(1))
    kept = loss_and_grads(model, idx, targets)
    assert len(calls) == 2
    model.recompute = True
    close(kept, loss_and_grads(model, idx, targets))
    assert len(calls) == 2 + 4


def test_dropout():
    model, idx = make(tiny(dropout=0.5)), tokens(2, 16)
    assert not torch.equal(model(idx).logits, model(idx).logits)
    model.eval()
    assert torch.equal(model(idx).logits, model(idx).logits)


inductor = pytest.param("inductor", marks=[
    pytest.mark.slow, pytest.mark.skipif(not shutil.which("c++"), reason="needs a C++ compiler")])


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("changes", [dict(), FAMILY["Transformer"]], ids=["MoEUT", "Transformer"])
@pytest.mark.parametrize("compiler", ["aot_eager", inductor])
def test_compile(compiler, changes, training):
    """One graph, whatever the experts chosen; for two batches, without a second compilation."""
    torch.compiler.reset()
    model = MoEUT(tiny(**changes)).train(training)
    compiled = torch.compile(model, fullgraph=True, backend=compiler)
    for i in range(2):
        idx, targets = tokens(4, 16), tokens(4, 16)
        with torch.compiler.set_stance("fail_on_recompile" if i else "default"):
            out = compiled(idx, targets)
        ours = out.loss.detach(), out.reg.detach(), *grads_of(out.loss + out.reg, model).values()
        close(ours, loss_and_grads(model, idx, targets))


def test_overfits_one_batch():
    model, idx, targets = MoEUT(tiny()), tokens(4, 16), tokens(4, 16)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(120):
        _, loss, reg = model(idx, targets)
        optimizer.zero_grad()
        (loss + reg).backward()
        optimizer.step()
    assert loss.item() < 0.05


@pytest.mark.parametrize("head_size, rotated", [(82, 40), (41, 20), (128, 64), (10, 4), (3, 0)])
def test_rotary(head_size, rotated):
    """Scores depend on the distance only, and the first `rotated` dimensions do the work."""
    q, k = torch.randn(2, 1, head_size).double().expand(2, 12, head_size)                # one q and k everywhere
    q0, k0, q90, k90 = (rotate(t, rotary_table(head_size, at, at + 12, CPU)) for at in (0, 90) for t in (q, k))
    score = q0 @ k0.mT
    close([score], [q90 @ k90.mT])
    close([score[1:, 1:]], [score[:-1, :-1]])
    moved = (q0[1:] != q0[:1]).all(0)
    assert moved.tolist() == [True] * rotated + [False] * (head_size - rotated)


# The authors' weights

OFFICIAL = {"attention.q.weight": (30, 20), "attention.k.weight": (30, 20), "attention.v": (12, 20, 10),
            "attention.o": (12, 10, 20), "attention.sel_v": (12, 20), "attention.sel_o": (12, 20),
            "ffn.keys": (6, 20, 7), "ffn.values": (6, 7, 20), "ffn.expert_sel": (6, 20),
            "ln1.weight": (20,), "ln1.bias": (20,), "ln2.weight": (20,), "ln2.bias": (20,)}

OFFICIAL_TRAINING = [  # the same, in the same order, in the authors' training code
    "self_attn.projections.q", "self_attn.projections.k", "self_attn.projections.v", "self_attn.projections.o",
    "self_attn.selections.v", "self_attn.selections.o", "pkm.keys", "pkm.values", "pkm.expert_sel",
    "self_attn.norm.weight", "self_attn.norm.bias", "pkm.norm.weight", "pkm.norm.bias"]


def official_state():
    shapes = {f"transformer.layers.{g}.{name}": shape for g in range(2) for name, shape in OFFICIAL.items()}
    shapes |= {"embedding.weight": (33, 20), "out_norm.weight": (20,), "out_norm.bias": (20,),
               "lm_head.weight": (33, 20), "lm_head.bias": (33,)}
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def test_from_official():
    theirs = official_state()
    before = dict(theirs)
    model = MoEUT.from_official(theirs, tiny())
    assert theirs == before  # the caller's dict is left alone
    assert sum(t.numel() for t in theirs.values()) == model.n_params()
    for g, layer in enumerate(model.layers):
        att, moe, ln1, ln2 = layer.attention, layer.ffn, layer.ln1, layer.ln2
        ours = [*att.qk.weight.split(30), att.w_v, att.w_o, *att.router.weight.split(12),
                moe.w_up, moe.w_down, moe.router.weight, ln1.weight, ln1.bias, ln2.weight, ln2.bias]
        for t, name in zip(ours, OFFICIAL, strict=True):
            assert torch.equal(t, theirs[f"transformer.layers.{g}.{name}"]), name
    for ours, name in ((model.embedding, "embedding"), (model.ln, "out_norm"), (model.head, "lm_head")):
        assert all(torch.equal(t, theirs[f"{name}.{part}"]) for part, t in ours.named_parameters()), name


@pytest.mark.parametrize("change, named", [
    (lambda s: s.pop("transformer.layers.1.ffn.keys"), "ffn.keys"),
    (lambda s: s.update(extra=torch.zeros(1)), "extra"),
    (lambda s: s.update({"transformer.layers.2.ffn.keys": torch.zeros(6, 20, 7)}), "layers.2.ffn.keys"),
    (lambda s: s.update({"transformer.layers.0.ffn.keys": torch.zeros(6, 20, 8)}), "w_up"),
    (lambda s: s.update({"transformer.layers.0.attention.q.weight": torch.zeros(30, 21)}), "weights"),
], ids=["missing", "extra", "a third layer", "wrong size", "wrong width"])
def test_from_official_refuses(change, named):
    theirs = official_state()
    change(theirs)
    with pytest.raises(ValueError, match=named):
        MoEUT.from_official(theirs, tiny())


def official_training_checkpoint(folder, monkeypatch):
    """What the authors' training code saves of the model in official_state(), and that state."""
    clean, weights = official_state(), {}
    for g in range(2):
        for name, theirs in zip(OFFICIAL, OFFICIAL_TRAINING, strict=True):
            weights[f"unique_layers.{g}.{theirs}"] = clean[f"transformer.layers.{g}.{name}"]
        weights[f"unique_layers.{g}.pkm.iter"] = torch.tensor(7)
        weights[f"unique_layers.{g}.pkm.kv_sel_counts_100"] = torch.zeros(6, 7)
    weights |= {k.replace("lm_head", "output"): v for k, v in clean.items() if "layers" not in k}
    args = {"transformer.n_heads": 3, "transformer.encoder_n_layers": 4, "lm.unroll": 16, "pkm.n_heads": 2, "moe.att.k": 2}
    module = types.ModuleType("framework.data_structures.dotdict")
    module.DotDict = type("DotDict", (dict,), {"__module__": module.__name__})  # a class of theirs, not importable here
    with monkeypatch.context() as patch:
        for name in ("framework", "framework.data_structures", module.__name__):
            patch.setitem(sys.modules, name, module)
        torch.save({"state": module.DotDict(iter=100), "run_invariants": {"args": args}, "model": weights}, folder / "theirs.pt")
    return clean


RANKS = b"".join(base64.b64encode(bytes([i])) + b" %d\n" % i for i in range(32))  # and end of text: 33 tokens


def test_init_from_official(run, tmp_path, monkeypatch):
    """Training and sampling begin with the authors' weights, whichever of their programs saved them."""
    clean = official_training_checkpoint(tmp_path, monkeypatch)
    torch.save(clean, "clean.pt")
    (tmp_path / "few.tiktoken").write_bytes(RANKS)
    model, _ = train.load_model(tmp_path / "theirs.pt", "few.tiktoken", "tiny", {})
    assert model.config == tiny(ffn_size=512)
    changes = {f.name: getattr(model.config, f.name) for f in fields(MoEUTConfig) if f.name != "vocab_size"}
    same, _ = train.load_model(tmp_path / "clean.pt", "few.tiktoken", "tiny", changes)
    idx = tokens(2, 16)
    assert torch.equal(model.eval()(idx).logits, same.eval()(idx).logits)
    run(sample, "--out=theirs.pt", "--tokenizer=few.tiktoken", "--max_new_tokens=5", "--device=cpu")
    (tmp_path / "low.txt").write_bytes(bytes(range(32)) * 40)
    run(train, "--init_from=theirs.pt", "--tokenizer=few.tiktoken", "--data=low.txt", "--steps=1", "--lr=1e-9", "--weight_decay=0",
        "--batch_size=2", "--tokens_per_step=32", "--eval_tokens=32", "--sample_tokens=4", "--device=cpu")
    close(load("out")["model"].values(), model.state_dict().values(), 1e-6)
    for arguments, culprit in ((["--out=theirs.pt"], "33 tokens"), (["--out=clean.pt", "--tokenizer=few.tiktoken"], "clean.pt")):
        with pytest.raises(SystemExit, match=culprit):
            run(sample, *arguments, "--device=cpu")


@pytest.mark.parametrize("name, value", [
    ("transformer.universal.group_type", "aabb"), ("rope.rotate_fraction", 1.0), ("rope.base", 500000.0)])
def test_official_settings_that_weights_do_not_show(name, value, tmp_path, monkeypatch):
    official_training_checkpoint(tmp_path, monkeypatch)
    stored = train.read_checkpoint(tmp_path / "theirs.pt")
    stored["run_invariants"]["args"][name] = value
    torch.save(stored, tmp_path / "other.pt")
    with pytest.raises(SystemExit, match=name):
        train.load_model(tmp_path / "other.pt", "bytes", "tiny", {})


def test_init_from_own_checkpoint(run):
    """With the model and the tokenizer of that run, but from step 0."""
    run(train, *SMALL, "--out=first")
    more = [option for option in SMALL if option not in MODEL]
    run(train, *more, "--init_from=first", "--out=second", "--steps=1", "--lr=1e-9", "--weight_decay=0")
    close(load("second")["model"].values(), load("first")["model"].values(), 1e-6)
    assert load("second")["step"] == 1
    with pytest.raises(SystemExit, match="n_embd cannot be changed"):
        run(train, *SMALL, "--init_from=first")


def test_sentencepiece(run, tmp_path):
    """A tokenizer of the authors' kind; spaces are kept, and the checkpoint holds it."""
    sentencepiece = pytest.importorskip("sentencepiece")
    text = "the cat sat on the mat and the dog sat on the log\n" * 60
    (tmp_path / "words.txt").write_text(text)
    sentencepiece.SentencePieceTrainer.train(
        input="words.txt", model_prefix="words", vocab_size=40, model_type="bpe", minloglevel=2)
    tokenizer = train.Tokenizer(train.load_tokenizer("words.model"))
    ids = tokenizer.encode("the dog sat").tolist()
    assert "".join(tokenizer.stream([*ids, tokenizer.end, 5])) == " the dog sat" and tokenizer.n_vocab == 40
    run(train, *SMALL, "--data=words.txt", "--tokenizer=words.model")
    run(sample, "--prompt=the cat", "--max_new_tokens=5", "--device=cpu")
    (tmp_path / "bad.model").write_bytes(b"no model")
    with pytest.raises(SystemExit, match="bad.model"):
        run(train, *SMALL, "--tokenizer=bad.model")


def test_padded_vocabulary(run):
    """A vocabulary larger than the tokenizer's: tokens without text may be sampled, and have none."""
    run(train, *SMALL, "--vocab_size=2000", "--sample_tokens=64", "--steps=1")


# Generation


def greedy(model, idx, n):
    """Without a cache. A full context is cut to its newest half."""
    window, context, new = model.config.block_size, idx[:, -model.config.block_size:], []
    for _ in range(n):
        if context.shape[1] > window:
            context = context[:, -(window // 2):]
        new.append(model(context).logits[:, -1].argmax(-1))
        context = torch.cat((context, new[-1][:, None]), dim=1)
    return torch.stack(new, dim=1)


def generate(model, idx, n, **options):
    return torch.stack(list(model.generate(idx, n, **options)), dim=1)


@pytest.mark.parametrize("length, n", [(1, 15), (5, 11), (16, 1), (3, 45), (30, 20)])
def test_generate_greedy(length, n):
    """Temperature 0 and top_k 1 take the most likely token, also beyond block_size = 16."""
    model, idx = make(tiny()).eval(), tokens(3, length)
    new = generate(model, idx, n, temperature=0)
    assert new.shape == (3, n) and torch.equal(new, greedy(model, idx, n))
    assert len(new.unique()) > 2 or n == 1  # a model that repeats itself would prove little
    assert torch.equal(new, generate(model, idx, n, top_k=1))
    assert torch.equal(new, generate(model, idx, n, top_p=1e-6))
    assert torch.equal(new, torch.cat([generate(model, row[None], n, temperature=0) for row in idx]))


def test_generate_is_seeded():
    model, idx = make(tiny()).eval(), tokens(2, 5)
    a, b, c = (generate(model, idx, 20, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)


@pytest.mark.parametrize("options, expected", [
    (dict(), [0.1, 0.4, 0.2, 0.3]),
    (dict(temperature=0.5), [0.01 / 0.3, 0.16 / 0.3, 0.04 / 0.3, 0.09 / 0.3]),
    (dict(top_k=2), [0, 4 / 7, 0, 3 / 7]),
    (dict(top_p=0.65), [0, 4 / 7, 0, 3 / 7]),
    (dict(top_p=0.75), [0, 4 / 9, 2 / 9, 3 / 9]),
    (dict(top_k=3, top_p=0.7), [0, 4 / 7, 0, 3 / 7]),  # top_p of what top_k left: 4/9 + 3/9
], ids=str)
def test_sampling_distribution(options, expected):
    logits = torch.tensor([0.1, 0.4, 0.2, 0.3]).log().expand(40_000, 4)
    options = dict(temperature=1.0, top_k=None, top_p=None) | options
    drawn = moeut.sample_token(logits, generator=torch.Generator().manual_seed(0), **options)
    frequency = drawn.flatten().bincount(minlength=4) / len(drawn)
    torch.testing.assert_close(frequency, torch.tensor(expected), rtol=0, atol=0.012)
    assert (frequency[torch.tensor(expected) == 0] == 0).all()


# ---------------------------------------------------------------------------------------------------
# Scripts: their main() runs in this process, in an empty folder

TEXT = "".join(f"{i} · {i + 7} = {i * (i + 7)} — naïve 🙂\n" for i in range(150))
MODEL = ("--n_embd=16 --head_size=8 --n_head=2 --n_layer=2 --group_size=1 --n_expert=4 --top_k=2 --expert_size=8 "
         "--block_size=16").split()
SMALL = [*MODEL, *("--data=text.txt --batch_size=2 --tokens_per_step=64 --steps=6 --warmup=2 --eval_interval=3 "
                   "--eval_tokens=64 --sample_tokens=8 --log_interval=2 --device=cpu --processes=1").split()]


@pytest.fixture
def run(monkeypatch, tmp_path):
    """run(script, *arguments), in a folder that holds text.txt."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_bytes(TEXT.encode())

    def call(script, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *arguments])
        script.main()

    handler, precision = signal.getsignal(signal.SIGINT), torch.get_float32_matmul_precision()
    threads = torch.get_num_threads()
    yield call
    signal.signal(signal.SIGINT, handler)
    torch.set_float32_matmul_precision(precision)
    torch.set_num_threads(threads)


def test_train_then_sample(run, capsys):
    run(train, *SMALL)
    log = capsys.readouterr().out
    assert "step 6/6: loss" in log and "step 3/6: validation loss" in log and "of the experts in use" in log

    def text(*arguments):
        run(sample, "--max_new_tokens=30", "--device=cpu", *arguments)
        return capsys.readouterr().out

    assert text("--prompt=naïve 🙂").startswith("naïve 🙂") and len(text("--prompt=a")) > 2
    assert text() == text("--seed=0") != text("--seed=1")
    assert text("--n_samples=3", "--prompt=12 · ").count("12 · ") >= 3
    (greedy_text,) = {text("--temperature=0"), text("--top_k=1", "--seed=5")}
    assert len(greedy_text) > 1


def test_loss_falls(run, capsys):
    run(train, *SMALL, "--steps=40", "--eval_interval=40", "--lr=1e-2", "--log_interval=1")
    losses = [float(line.split("loss ")[1].split(",")[0]) for line in capsys.readouterr().out.splitlines()
              if line.startswith("step") and ": loss" in line]
    assert losses[0] == pytest.approx(math.log(257), rel=0.1) and losses[-1] < losses[0] - 1.5


def load(out):
    return torch.load(os.path.join(out, "checkpoint.pt"), weights_only=True)


def test_resume_changes_no_bit(run, monkeypatch, capsys):
    """Ctrl-C after half of the steps, then --resume: as if nothing had happened. Dropout included."""
    run(train, *SMALL, "--dropout=0.1", "--out=straight")
    evaluate = train.evaluate

    def interrupted(*args):
        signal.raise_signal(signal.SIGINT)
        return evaluate(*args)

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="after step 3.*--resume --out=parts"):
        patch.setattr(train, "evaluate", interrupted)
        run(train, *SMALL, "--dropout=0.1", "--out=parts")
    assert load("parts")["step"] == 3
    run(train, "--resume", "--out=parts")
    assert "step 4/6" in capsys.readouterr().out
    straight, parts = load("straight"), load("parts")
    assert straight["step"] == parts["step"] == 6
    assert [k for k in straight["model"] if not torch.equal(straight["model"][k], parts["model"][k])] == []
    for a, b in zip(straight["optimizer"]["state"].values(), parts["optimizer"]["state"].values(), strict=True):
        assert all(torch.equal(a[k], b[k]) for k in a)


def test_accumulation_changes_nothing(run, capsys):
    """How many sequences are taken at a time is a matter of memory only. The gradient norms are compared as
    well: clipping and Adam would hide a wrong scale from the weights."""
    norms = []
    for n in (1, 4):
        run(train, *SMALL, f"--batch_size={n}", f"--out=by{n}", "--steps=2")
        norms.append([float(line.split("grad ")[1].split(",")[0]) for line in capsys.readouterr().out.splitlines()
                      if ", grad " in line])
    close(load("by1")["model"].values(), load("by4")["model"].values(), 1e-4)
    assert len(norms[0]) == 2 and norms[0] == pytest.approx(norms[1], abs=0.02)


def test_processes_change_nothing(run):
    """Two processes with half of the sequences each: the same training, up to rounding."""
    for n in (1, 2):
        run(train, *SMALL, f"--processes={n}", f"--out=by{n}")
    close(load("by2")["model"].values(), load("by1")["model"].values(), 1e-4)


@pytest.mark.skipif(os.name != "posix", reason="needs process groups")
def test_interrupted_processes(run):
    """Ctrl-C reaches all processes of the terminal: they leave after the same step, and none stays behind."""
    command = [sys.executable, train.__file__, *SMALL, "--processes=2", "--steps=1000000", "--eval_interval=1000000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while not process.stdout.readline().startswith("step 2/"):
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=60)
    (step,) = re.findall(r"Stopped after step (\d+), saved in out", error)
    assert process.returncode == 1 and len(error.splitlines()) == 1 and load("out")["step"] == int(step)
    for _ in range(100):
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            break
        time.sleep(0.1)
    else:
        pytest.fail("a process stayed behind")


def test_recompute_option(run):
    for name in ("--recompute", "--no-recompute"):
        run(train, *SMALL, name, f"--out={name}", "--steps=2")
    close(load("--recompute")["model"].values(), load("--no-recompute")["model"].values(), 1e-6)


def test_compare(run, capsys):
    """Mean and range over the seeds; a changed field makes another model, changed data forbids to compare."""
    for name, *options in (("a1", "--seed=1"), ("a2", "--seed=2"), ("b", "--seed=1", "--top_k=1"), ("c", "--steps=9")):
        run(train, *SMALL, *options, f"--out={name}")
    capsys.readouterr()
    run(train, "--compare", "a1", "a2", "b")
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split("  ")[0]: line.split()[-8:] for line in lines if line.startswith("tiny")}
    assert len(rows) == 2
    (two,) = [cells for name, cells in rows.items() if "top_k" not in name]
    bits = [load(name)["history"][-1]["bits"] for name in ("a1", "a2")]
    assert two[0] == "2" and [float(b) for b in two[3:6]] == pytest.approx([sum(bits) / 2, min(bits), max(bits)], abs=1e-4)
    with pytest.raises(SystemExit, match="step is 6 in a1 and 9 in c"):
        run(train, "--compare", "a1", "c")


def test_history(run):
    """An entry for each evaluation; the time of evaluations does not count, and a resumed run goes on with it."""
    run(train, *SMALL)
    run(train, "--resume", "--steps=9")
    history = load("out")["history"]
    assert [entry["step"] for entry in history] == [3, 6, 9]
    assert 0 < history[0]["seconds"] < history[1]["seconds"] < history[2]["seconds"]
    assert all(entry["bits"] > 0 for entry in history)


def test_bench():
    out = subprocess.run([sys.executable, train.__file__, "--bench", "--preset=tiny", "--batch_size=1", "--block_size=16"],
                         capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    rows = [line for line in out.stdout.splitlines() if re.search(r"\d +\d+\.\d\d$", line)]
    assert len(rows) == 8, out.stdout


def test_learning_rate():
    """Linear to the peak, which may be held, then half a cosine to a tenth of it."""
    o = train.Options(lr=1.0, warmup=10, steps=110, hold=0, final_lr=0.1)
    assert [train.learning_rate(s, o) for s in (0, 4, 9, 10)] == pytest.approx([0.1, 0.5, 1, 1])
    assert [train.learning_rate(s, o) for s in (60, 110, 500)] == pytest.approx([0.55, 0.1, 0.1])
    o = replace(o, hold=0.5)
    assert [train.learning_rate(s, o) for s in (0, 10, 55)] == pytest.approx([0.1, 1, 1])
    assert [train.learning_rate(s, o) for s in (82.5, 110)] == pytest.approx([0.55, 0.1])


# Tokens


def byte_tokenizer():
    return train.Tokenizer(train.load_tokenizer("bytes"))


def rank_file(path, extra=(b"th", b"the", b" t"), singles=range(256)):
    vocabulary = [bytes([i]) for i in singles] + list(extra)
    path.write_text("".join(f"{base64.b64encode(t).decode()} {i}\n" for i, t in enumerate(vocabulary)))
    return str(path)


def test_bytes_round_trip():
    rng = random.Random(0)
    characters = [*map(chr, range(128)), *"äß€漢字🙂", "\u200d", "\u2028", "\U0010ffff", "<|endoftext|>"]
    t = byte_tokenizer()
    for _ in range(50):
        text = "".join(rng.choices(characters, k=rng.randrange(200)))
        ids = t.encode(text)
        assert ids.tolist() == list(text.encode())  # the name of a special token is text like any other
        assert "".join(t.stream(ids.tolist())) == text


def test_stream_never_cuts_a_character():
    t, text = byte_tokenizer(), "añ漢🙂."
    pieces = [*t.stream([*t.encode(text).tolist(), t.end, *t.encode("not this").tolist()])]
    assert "".join(pieces) == text and [p for p in pieces if p] == list(text)


def test_rank_file(tmp_path):
    t = train.Tokenizer(train.load_tokenizer(rank_file(tmp_path / "own.tiktoken")))
    assert t.n_vocab == 256 + 3 + 1 and t.end == 259
    text = "the thing — 漢字"
    ids = t.encode(text).tolist()
    assert ids[0] == 257 and len(ids) < len(text.encode()) and "".join(t.stream(ids)) == text


def test_character_without_a_token(run, tmp_path):
    name = rank_file(tmp_path / "ascii.tiktoken", singles=range(128))
    t = train.Tokenizer(train.load_tokenizer(name))
    assert "".join(t.stream(t.encode("plain the text").tolist())) == "plain the text"
    with pytest.raises(ValueError, match="ascii.tiktoken cannot encode the character 'ï'"):
        t.encode("naïve")
    with pytest.raises(SystemExit, match="cannot encode the character '·'"):
        run(train, *SMALL, f"--tokenizer={name}")
    with pytest.raises(ValueError, match="udc80"):  # what Python makes of a broken byte on the command line
        byte_tokenizer().encode("\udc80")


def corpus(tmp_path, *names, tokenizer=None):
    names = names or ["text.txt"]
    return train.tokenize([str(tmp_path / n) for n in names], tokenizer or byte_tokenizer(), tmp_path / "tokens", 8)


def test_token_cache(tmp_path, monkeypatch):
    path = tmp_path / "text.txt"
    cached = lambda: len(list((tmp_path / "tokens").glob("*.json")))
    path.write_text("abcdefgh\n" * 40)
    first = corpus(tmp_path)
    with monkeypatch.context() as patch:  # found again, not encoded again
        patch.setattr(train.Tokenizer, "encode", None)
        assert np.array_equal(corpus(tmp_path).train, first.train) and cached() == 1
    stat = path.stat()
    path.write_text("hgfedcba\n" * 40)  # as long as before
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert corpus(tmp_path).train[0] == ord("h") and cached() == 2
    for n, (merge, first) in enumerate([(b"hg", 256), (b"gf", ord("h"))]):  # tokenizers that differ in one rank
        other = train.Tokenizer(train.load_tokenizer(rank_file(tmp_path / "own.tiktoken", extra=(merge,))))
        assert corpus(tmp_path, tokenizer=other).train[0] == first and cached() == 3 + n


@pytest.mark.parametrize("pad", range(4))
def test_last_tenth_of_a_file_is_for_validation(pad, tmp_path):
    """No character is cut, wherever the tenth begins."""
    text = "x" * pad + "🙂" * 100
    (tmp_path / "text.txt").write_text(text)
    c = corpus(tmp_path)
    decode = lambda ids: bytes(ids.tolist()).decode()
    assert decode(c.train) + decode(c.val[:-1]) == text
    assert c.val[-1] == 256 and 256 not in c.train and len(c.val) == pytest.approx(len(text.encode()) / 10, abs=5)
    assert c.bytes_per_token["train"] == 1 and c.bytes_per_token["val"] == pytest.approx(1, abs=0.05)


def test_documents_are_for_training_or_validation(tmp_path):
    documents = {f"{i} " * 20 for i in range(120)}

    def split(*more):
        folder = tmp_path / f"texts{len(more)}"
        folder.mkdir()
        for i, text in enumerate([*more, *sorted(documents)]):  # under other names
            (folder / f"{i}.txt").write_text(text)
        c = corpus(tmp_path, folder.name)
        assert c.n_files == 120 + len(more)
        return [set(bytes(255 if t == 256 else t for t in part).decode("latin1").strip("\xff").split("\xff"))
                for part in (c.train.tolist(), c.val.tolist())]

    training, validation = split()
    assert training | validation == documents and not training & validation
    assert 3 <= len(validation) <= 30
    more_training, more_validation = split("one more " * 9)
    assert training <= more_training and validation <= more_validation


@pytest.mark.parametrize("length", [17, 18, 33, 49, 100, 1000, 1234])
def test_windows_visit_everything_once_per_epoch(length):
    data, block = np.arange(length, dtype=np.uint16), 16
    n = max((length - block - 1) // block, 1)
    starts = []
    for epoch in range(3):
        numbers = range(epoch * n, (epoch + 1) * n)
        x, y = train.windows(data, block, numbers, 0, CPU)
        assert torch.equal(x, x[:, :1] + torch.arange(block)) and torch.equal(y, x + 1)
        first = x[:, 0].sort().values
        assert (first.diff() == block).all() and len(first) == n
        starts.append(x[:, 0].tolist())
        for number, row in zip(numbers, x, strict=True):  # whatever the batch
            assert torch.equal(train.windows(data, block, [number], 0, CPU)[0][0], row)
    if n > 5:
        assert starts[0] != starts[1] and starts[0] != sorted(starts[0])
        assert starts[0] != train.windows(data, block, range(n), 1, CPU)[0][:, 0].tolist()


def test_evaluate():
    """The mean over windows does not depend on the batch size, and the model is in training mode after it."""
    model, data = MoEUT(tiny()), np.random.default_rng(0).integers(33, size=200).astype(np.uint16)
    results = [train.evaluate(model, data, 112, b, lambda: torch.autocast("cpu", enabled=False)) for b in (1, 3, 7)]
    assert all(r == pytest.approx(results[0]) for r in results) and model.training
    rows = torch.tensor(np.stack([data[s:s + 17] for s in np.linspace(0, 183, 7).astype(int)]).astype(np.int64))
    out, seen = router_logits(model.eval(), rows[:, :-1], rows[:, 1:])
    assert results[0][0] == pytest.approx(out.loss.item(), rel=1e-5)
    total = used = 0
    for router, logits in seen.items():
        chosen = torch.cat([t.flatten(0, 1) for t in logits]).topk(router.top_k).indices         # [n, groups, k]
        used += sum(len(chosen[:, g].unique()) for g in range(chosen.shape[1]))
        total += logits[0].shape[2] * logits[0].shape[3]
    assert results[0][1] == pytest.approx(used / total)


# Bad input: one sentence that names the culprit

BAD = {
    train: {
        "--nonsense=1": "--nonsense", "--steps=many": "--steps", "--steps=0": "--steps", "--lr=-1": "--lr",
        "--weight_decay=-1": "--weight_decay", "--beta1=-1": "--beta1", "--beta2=2": "--beta2",
        "--hold=1": "--hold", "--processes=-1": "--processes", "--processes=3": "--tokens_per_step",
        "--seed=-1": "--seed", "--warmup=-1": "--warmup",
        "--sample_tokens=-1": "--sample_tokens", "--tokens_per_step=65": "--tokens_per_step",
        "--data=missing.txt": "missing.txt", "--data=empty.txt": "text", "--data=short.txt": "--block_size",
        "--data=latin1.txt": "latin1.txt", "--data=empty": "empty",
        "--n_layer=3 --group_size=2": "n_layer", "--n_head=0": "n_head", "--top_k=5": "top_k", "--preset=huge": "huge",
        "--bench": "--bench takes presets as they are", "--bench --preset=dense-44M": "dense-44M",
        "--compare nowhere": "nowhere", "--compare text.txt": "text.txt",
        "--vocab_size=100": "vocab_size", "--dtype=int8": "int8", "--compile=maybe": "maybe",
        "--device=abacus": "abacus", "--device=cuda:99": "cuda:99", "--out=text.txt": "text.txt",
        "--tokenizer=klingon": "klingon", "--tokenizer=no.tiktoken": "no.tiktoken",
        "--tokenizer=bad.tiktoken": "bad.tiktoken",
        "--init_from=nowhere": "nowhere", "--tokenizer=no.model": "no.model",
        "--resume --out=nowhere": "nowhere", "--resume --out=text.txt": "text.txt",
        "--resume --out=other.pt": "other.pt",
        "--resume --n_layer=4": "--n_layer", "--resume --tokenizer=gpt2": "--tokenizer",
    },
    sample: {
        "--nonsense=1": "--nonsense", "--top_k=few": "--top_k", "--n_samples=0": "--n_samples",
        "--max_new_tokens=0": "--max_new_tokens", "--temperature=-1": "--temperature", "--top_k=-1": "--top_k",
        "--top_p=0": "--top_p", "--device=abacus": "abacus",
        "--out=nowhere": "nowhere", "--out=text.txt": "text.txt", "--out=other.pt": "other.pt",
        "--prompt=": "--prompt", "--prompt_file=missing.txt": "missing.txt", "--prompt_file=empty.txt": "empty.txt",
        "--prompt_file=latin1.txt": "latin1.txt", "--prompt=a --prompt_file=text.txt": "--prompt_file",
    },
}


@pytest.mark.parametrize("script, arguments, culprit", [
    pytest.param(script, arguments, culprit, id=f"{script.__name__} {arguments}")
    for script, table in BAD.items() for arguments, culprit in table.items()])
def test_bad_input(script, arguments, culprit, run, tmp_path, capsys):
    for name, data in {"empty.txt": b"", "short.txt": b"short", "latin1.txt": b"na\xefve " * 99,
                       "bad.tiktoken": b"? ?\n"}.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "empty").mkdir()
    torch.save({"format": "something else"}, "other.pt")
    arguments = arguments.split()
    if script is train and "--resume" not in arguments:
        arguments = [*SMALL, *arguments]  # the last one wins
    with pytest.raises(SystemExit) as stopped:
        run(script, *arguments)
    code, error = stopped.value.code, capsys.readouterr().err
    if isinstance(code, str):  # Python prints it to stderr and exits with 1
        code, error = 1, error + code
    assert code not in (0, None)
    assert len(error.strip().splitlines()) == 1 and culprit in error, error


def test_resume_of_a_finished_run(run):
    run(train, *SMALL)
    with pytest.raises(SystemExit, match="6 steps.*--steps"):
        run(train, "--resume")
    run(train, "--resume", "--steps=7")
    assert load("out")["step"] == 7


@pytest.mark.parametrize("script, options", [(train, [train.Options, MoEUTConfig]), (sample, [sample.SampleOptions])])
def test_help_lists_every_option(script, options, run, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(script, "--help")
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert [f.name for cls in options for f in fields(cls) if f"--{f.name}" not in text] == []
