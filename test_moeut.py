"""What is promised: `python -m pytest -n 2` checks it in two processes, on two cores of a CPU in under two minutes.

The tests are invariants, such as that no token sees the ones after it, and parity with a plain reference for the output
and every gradient. From top to bottom: the equations of the paper; sharing, caches, compiling, generation; experts and
routing; the kernels; text, training and resuming; what is said about bad input. No time is measured.
"""

import contextlib
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F

if not torch.cuda.is_available():  # lets the kernels run on a CPU; Triton must not be imported yet
    os.environ.setdefault("TRITON_INTERPRET", "1")

import bench
import cvmm
import moeut
import sample
import text
import train
from moeut import PRESETS, TRANSFORMER, MoEUT, MoEUTConfig, Router, rotary_table

torch.set_num_threads(1)  # the tensors are so small that more threads wait for each other
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(cvmm.triton is None, reason="triton is not installed")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def close(a, b, tol=1e-5):
    """All tensors of a and b are alike, up to tol relative to the largest entry. TF32 keeps 10 bits."""
    for s, t in zip(a, b, strict=True):
        atol = max(tol, 5e-3 if t.is_cuda else 0) * max(1, t.abs().max().item() if t.numel() else 0)
        torch.testing.assert_close(s, t, rtol=0, atol=atol)


def tokens(*shape):
    return torch.randint(33, shape)


def tiny(**changes) -> MoEUTConfig:
    """With more than 4 experts per head, which are sorted; with fewer a CPU multiplies by all of them."""
    sizes = dict(vocab_size=33, block_size=16, n_layer=4, group_size=2, n_embd=20, n_head=3, head_size=10, n_expert=6,
                 expert_size=7, top_k=2, n_att_expert=5, att_top_k=2, ffn_size=24)
    return MoEUTConfig(**{**sizes, **changes})


def make(**changes) -> MoEUT:
    """A model in float64. At its initialisation it does little: larger weights make errors visible."""
    model = MoEUT(tiny(**changes)).double()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "layers" in name:
                p.mul_(2).add_(0.1 * torch.randn_like(p))
    return model


FAMILY = {
    "MoEUT": dict(), "MoEUT pre": dict(layernorm="pre"), "MoEUT post": dict(layernorm="post"),
    "MoEUT all experts": dict(n_att_expert=4), "MoEUT one expert per head": dict(n_att_expert=1, att_top_k=1),
    "sigma-MoE": dict(attention="dense", group_size=4), "SwitchHead": dict(ffn="dense", layernorm="pre", group_size=4),
    "Transformer": dict(TRANSFORMER, group_size=4), "Universal Transformer": dict(TRANSFORMER, group_size=1),
    "Transformer post": dict(TRANSFORMER, layernorm="post", group_size=4)}
family = pytest.mark.parametrize("changes", FAMILY.values(), ids=FAMILY)


# The equations of the paper ------------------------------------------------------------------------------------------


def equations(model, idx, targets):
    """Logits, cross entropy and regulariser as in the paper: all experts for every token, most of them with gate 0. A
    head of dense attention is one expert, with gates of 1."""
    c, p, chosen_from = model.config, dict(model.named_parameters()), {}
    T, r, H = idx.shape[1], c.head_size // 4 * 2, c.n_head
    spin = torch.exp(1j * torch.arange(T)[:, None].double() * 10000 ** -(torch.arange(0, r, 2) / r))     # [T, r/2]

    def norm(name, x):
        return F.layer_norm(x, x.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"])

    def gates(name, n, k, *shape):
        logits = (n @ p[name].T).unflatten(-1, (*shape, -1))
        chosen_from.setdefault(name, []).append(logits)
        return torch.where(logits >= logits.topk(k).values[..., -1:], logits.sigmoid(), 0)

    def attention(a, x, n):
        qk = torch.einsum("btc,shdc->sbhtd", n, p[f"{a}.w_qk"].view(2, H, -1, c.n_embd))
        z = torch.complex(*qk[..., :r].chunk(2, -1)) * spin  # pairs (i, i + r/2) turn with their position
        q, k = torch.cat((z.real, z.imag, qk[..., r:]), -1)
        weight = (q @ k.mT / math.sqrt(c.head_size)).masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf).softmax(-1)
        if f"{a}.router.w" in p:
            s_v, s_o = gates(f"{a}.router.w", n, c.att_top_k, 2, H).unbind(2)            # [B, T, H, A] both
            w_v, w_o = (p[f"{a}.{w}"].unflatten(0, (H, -1)) for w in ("w_v", "w_o"))
        else:
            s_v = torch.ones(*idx.shape, H, 1).double()
            s_o = gates(f"{a}.w_gate", n, 1, H) if c.attention == "moe" else s_v
            w_v, w_o = p[f"{a}.w_v"].unflatten(0, (H, 1, -1)).mT, p[f"{a}.w_o"].T.unflatten(0, (H, 1, -1))
        v = torch.einsum("btc,hacd,btha->bhtd", x, w_v, s_v)
        return torch.einsum("bhtd,hadc,btha->btc", weight @ v, w_o, s_o)

    def ffn(a, x, n):
        if c.ffn == "dense":
            return (x @ p[f"{a}.w_up"].T + p[f"{a}.b_up"]).relu() @ p[f"{a}.w_down"].T + p[f"{a}.b_down"]
        h = torch.einsum("btc,ecf->btef", x, p[f"{a}.w_up"]).relu()
        return torch.einsum("btef,efc,bte->btc", h, p[f"{a}.w_down"], gates(f"{a}.router.w", n, c.top_k))

    x = p["embedding.weight"][idx]
    for i in range(c.n_layer):
        a = f"layers.{i % c.group_size}"
        for f, ln in ((attention, f"{a}.ln1"), (ffn, f"{a}.ln2")):
            n = x if c.layernorm == "post" else norm(ln, x)
            y = f(f"{a}.{f.__name__}", n if c.layernorm == "pre" else x, n)
            x = norm(ln, x + y) if c.layernorm == "post" else x + y
    logits = (x if c.layernorm == "post" else norm("ln", x)) @ p["lm_head.weight"].T + p["lm_head.bias"]
    cross_entropy = -logits.log_softmax(-1).gather(-1, targets[..., None].clamp(min=0))[targets >= 0].mean()

    reg = torch.zeros(())
    for name, repeats in chosen_from.items():  # how a sequence uses the experts, over all its tokens and all repeats
        usage = torch.cat(repeats, dim=1).softmax(-1).mean(1)                            # [B, E] or [B, 2, H, A]
        entropy = (usage * usage.log()).sum(-1).mean(0)                                  # negative: [] or [2, H]
        reg = reg + (c.ffn_reg if "ffn" in name else c.att_reg) * entropy.mean(-1).sum()
    return logits, cross_entropy, reg


@family
def test_equations(changes):
    """Logits, losses and every parameter's gradient, over all applications of its layer; in training and evaluation.
    MACs are those that torch counts."""
    from torch.utils.flop_counter import FlopCounterMode  # which imports Triton

    model, idx, targets = make(ffn_reg=0.7, att_reg=0.3, **changes), tokens(3, 16), tokens(3, 16)
    targets[1, 9:] = -1  # ignored
    with FlopCounterMode(display=False) as forward, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        out = model(idx, targets)
    (logits, cross_entropy, reg), c = equations(model, idx, targets), model.config
    quiet, p = model.eval()(idx, targets), list(model.parameters())
    close([out.logits, out.cross_entropy, out.reg.double()], [logits, cross_entropy, reg.double()])
    close([quiet.logits, quiet.loss, quiet.reg], [out.logits, out.cross_entropy, torch.zeros(())])
    grads = torch.autograd.grad(out.loss, p)
    close(grads, torch.autograd.grad(cross_entropy + reg, p), 1e-4)
    assert out.loss == out.cross_entropy + out.reg and all(grad.any() for grad in grads)
    macs = train.macs_per_token(replace(c, att_top_k=4) if c.n_att_expert == 4 else c, 16)  # a CPU takes all of so few
    assert forward.get_total_flops() / 2 / 48 == macs + c.n_embd * c.vocab_size


# The authors' MoEUTLM (github.com/RobertCsordas/moeut) computed these numbers in Triton's interpreter: cross entropy,
# regulariser, norm of the gradient, four logits.
AUTHORS = {3: (2.504547, -0.0353757, 0.641452, 0.587056, 0.0637502, -0.1599575, 0.0204679),
           1: (2.458691, -0.0310364, 0.602215, 0.207781, 0.4890743, -0.2768993, 0.6313521)}
THEIRS = {A: MoEUTConfig(vocab_size=11, block_size=32, n_layer=4, group_size=2, n_embd=12, n_head=2, head_size=8,
                         n_expert=5, expert_size=6, top_k=2, n_att_expert=A, att_top_k=min(A, 2)) for A in AUTHORS}


def authors_weights(A):
    """A state dict with the names and shapes of the authors, and numbers that anybody can make."""
    layer = {"attention.q.weight": (16, 12), "attention.k.weight": (16, 12), "attention.sel_o": (2 * A, 12),
             "attention.v": (2 * A, 12, 8) if A > 1 else (16, 12), "attention.o": (2 * A, 8, 12) if A > 1 else (12, 16),
             "ffn.keys": (5, 12, 6), "ffn.values": (5, 6, 12), "ffn.expert_sel": (5, 12),
             "ln1.weight": (12,), "ln1.bias": (12,), "ln2.weight": (12,), "ln2.bias": (12,)}
    layer |= {"attention.sel_v": (2 * A, 12)} if A > 1 else {}
    shapes = {f"transformer.layers.{g}.{name}": shape for g in range(2) for name, shape in layer.items()}
    shapes |= {"embedding.weight": (11, 12), "out_norm.weight": (12,), "out_norm.bias": (12,),
               "lm_head.weight": (11, 12), "lm_head.bias": (11,)}
    wave = {name: 1.7 * torch.arange(math.prod(s)).double() ** 1.3 + sum(map(ord, name)) for name, s in shapes.items()}
    return {name: (0.4 * wave[name].sin()).float().view(shape) for name, shape in shapes.items()}


@pytest.mark.parametrize("A", AUTHORS)
def test_numbers_of_the_authors(A):
    """And weights that do not fit are an error."""
    model = moeut.from_authors(authors_weights(A), THEIRS[A])
    out = model((torch.arange(14) * 7 % 11).view(2, 7), (torch.arange(14) * 5 % 11).view(2, 7))
    norm = torch.nn.utils.get_total_norm(torch.autograd.grad(out.loss, list(model.parameters())))
    numbers, theirs = torch.stack((out.cross_entropy, out.reg, norm, *out.logits[1, 6, :4])), torch.tensor(AUTHORS[A])
    close([numbers, numbers[1]], [theirs, theirs[1]], 1e-6)  # the regulariser is smaller than the others
    for named, name, G in (("layers.2", "0.ln1.bias", 4), ("extra", "extra", 2), ("ffn.w_up", "0.ffn.keys", 2),
                           ("attention.w_qk", "1.attention.q.weight", 2)):
        with pytest.raises(RuntimeError, match=named):
            more = {f"transformer.layers.{name}": torch.zeros(8, 12)}
            moeut.from_authors(authors_weights(A) | more, replace(THEIRS[A], group_size=G))


def test_parameters_and_macs_of_the_presets():
    """Depth costs no parameters. MoEUT needs 0.88 of the dense 44M's multiplications, 0.60 of the 244M's (appendix)."""
    def count(config):
        with torch.device("meta"):  # sizes without memory
            return sum(p.numel() for p in MoEUT(config).parameters())

    assert count(tiny(n_layer=2)) == count(tiny(n_layer=8)) < count(tiny(group_size=4))
    for size, *counts, ratio in (
        ("44M", 44_345_792, 44_544_264, 0.885), ("126M", 125_669_696, 125_654_336, 0.673),
        ("244M", 243_326_784, 243_568_700, 0.603), ("318M", 318_107_456, 319_293_584, 0.599),
        ("727M", 727_424_320, 728_694_080, 0.608), ("1B", 1_040_319_296, 1_044_300_608, 0.610)):
        ours, theirs = configs = [PRESETS[f"{kind}-{size}"] for kind in ("moeut", "dense")]
        assert [*map(count, configs)] == counts
        assert train.macs_per_token(ours, 1024) / train.macs_per_token(theirs, 1024) == pytest.approx(ratio, abs=1e-3)
    for name in ("dense-tiny", "universal-tiny", "sigma-moe-tiny", "switchhead-tiny", "dense-small"):
        assert count(PRESETS[name]) == pytest.approx(count(PRESETS[name.split("-")[-1]]), rel=0.005), name


@pytest.mark.parametrize("kind", [dict(n_att_expert=8), dict(n_att_expert=1), TRANSFORMER], ids=["moe", "one", "dense"])
def test_initialisation(kind):
    c = MoEUTConfig(n_layer=6, n_embd=256, head_size=32, n_expert=16, expert_size=64, ffn_size=384, **kind)
    a = math.sqrt(2 / 6)  # 6 applications, although there are 2 layers
    special = {"embedding": 1 / 16, "lm_head": 1 / 16 / math.sqrt(3), "w_o": a / math.sqrt(4 * 32), "b_": 0, "ln": 0,
               "w_down": a / math.sqrt(384 if "ffn" in kind else 16 * 64)}
    for name, p in MoEUT(c).named_parameters():
        mean, std = float("ln" in name and "weight" in name), next((s for k, s in special.items() if k in name), a / 16)
        assert p.std().item() == pytest.approx(std, rel=0.05 if p.numel() > 1000 else 0.2), name
        assert abs(p.mean().item() - mean) <= 5 * std / math.sqrt(p.numel()), name


@pytest.mark.parametrize("A", [1, 4, 5])
def test_a_dense_layer_is_all_experts_or_equal_ones_with_gates_of_one(A):
    c = tiny(n_att_expert=A, att_top_k=1, top_k=6, ffn_size=42)
    moe, dense = moeut.Layer(c).double(), moeut.Layer(replace(c, **TRANSFORMER)).double()
    for name, p in moe.named_parameters():
        if "router" in name or "w_gate" in name:
            p.data.zero_()[:, 0] = 1  # the first number of n decides
    w_up, w_down = dense.ffn.w_up.data, dense.ffn.w_down.data
    moe.ffn.w_up.data, moe.ffn.w_down.data = w_up.unflatten(0, (6, 7)).mT, w_down.T.unflatten(0, (6, 7))
    w_v, w_o = dense.attention.w_v.data, dense.attention.w_o.data
    if A > 1:
        w_v = w_v.view(3, 1, 10, 20).mT.expand(3, A, 20, 10).flatten(0, 1)
        w_o = w_o.T.reshape(3, 1, 10, 20).expand(3, A, 10, 20).flatten(0, 1)
    moe.attention.w_qk.data, moe.attention.w_v.data, moe.attention.w_o.data = dense.attention.w_qk.data, w_v, w_o
    x, rotary = torch.randn(2, 16, 20).double(), rotary_table(10, 0, 16)
    n = torch.cat((torch.full((2, 16, 1), 1000.0), torch.randn(2, 16, 19)), -1).double()
    close([moe.ffn(x, n)[0], moe.attention(x, n, rotary)[0]], [dense.ffn(x, n)[0], dense.attention(x, n, rotary)[0]])


# Sharing, causality, caches, regulariser, dropout, compiling, precision, generation ----------------------------------


@pytest.mark.parametrize("chunks", [[1] * 20, [7, 1, 1, 9, 1, 5]], ids=["tokens", "chunks"])
@family
def test_causality_and_cache(changes, chunks):
    """No token sees the ones after it, no sequence another: parts of the input have their part of the output. With a
    cache for each application, by chunks, also beyond block_size, or tokens, when slots are not sorted. In float64."""
    model, idx = make(**changes).eval(), tokens(2, sum(chunks))
    cache, whole = model.new_cache(), model(idx).logits
    with torch.no_grad():
        cached = torch.cat([model(part, cache=cache).logits for part in idx.split(chunks, dim=1)], dim=1)
    close([cached, model(idx[:, :9]).logits, model(idx[1:]).logits], [whole, whole[:, :9], whole[1:]], 1e-9)


def test_extremes_of_the_regulariser():
    """-log E when all experts are used alike, 0 when one takes all; the gradient is finite where usage underflows."""
    for logits, expected in ((torch.zeros(6), -math.log(6)), (500 * torch.eye(6)[2], 0.0)):
        reg = MoEUT(tiny(ffn_reg=1)).regulariser([[(None, logits.requires_grad_().softmax(-1)[None])] * 2])
        assert reg.item() == pytest.approx(expected, abs=1e-5)
        assert torch.autograd.grad(reg, logits)[0].isfinite().all()


@pytest.mark.parametrize("E, K, p, kept", [(6, 2, 0.2, 0.8), (2, 1, 0.5, 0.75)])
def test_expert_dropout(E, K, p, kept):
    """A dropped expert is chosen last in training; gates and usage stay what they are; evaluation can choose all."""
    router, n = Router(tiny(expert_dropout=p), E, K), torch.randn(1, 4000, 20)
    gate, expert, usage = router(n)
    favourite = router.eval()(n)[1]
    assert (expert[..., None] == favourite[..., None, :]).any(-1).float().mean().item() == pytest.approx(kept, abs=0.03)
    logits = F.linear(n, router.w)
    close([favourite.sort().values, gate, usage],
          [logits.topk(K).indices.sort().values, logits.sigmoid().gather(-1, expert), logits.softmax(-1).mean(1)])


def test_dropout_acts_in_training_only():
    model, idx = make(dropout=1 - 1e-9), tokens(2, 16)  # all that the layers add
    alone = model.lm_head(model.ln(model.embedding(idx)))
    assert torch.equal(model(idx).logits, alone) and not torch.equal(model.eval()(idx).logits, alone)


@pytest.mark.parametrize("name, training, recompute", [
    ("MoEUT", True, False), ("MoEUT", True, True), ("MoEUT", False, False), ("MoEUT all experts", True, False),
    ("Transformer", True, False)])
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=[
    pytest.mark.slow, pytest.mark.skipif(not shutil.which("c++"), reason="needs a C++ compiler")])])
def test_compile_and_recompute(compiler, name, training, recompute):
    """All layers and repeats share a graph, whatever the experts chosen; rotary table and head have one each. For other
    shapes there is a second one of each. Layers that are recomputed, with the dropout they had, have none: in 2.13
    gradients would be wrong."""
    from torch._dynamo.testing import CompileCounterWithBackend

    def loss_and_grads(run, idx, recompute):
        torch.manual_seed(0)  # of dropout
        model.recompute = recompute
        out = run(idx, idx.flip(1))
        return out.cross_entropy.detach(), out.reg.detach(), *torch.autograd.grad(out.loss, list(model.parameters()))

    torch.compiler.reset()
    dropout = dict(dropout=0.3, expert_dropout=0.3) if recompute else {}
    model, counter = MoEUT(tiny(**FAMILY[name], **dropout)).train(training), CompileCounterWithBackend(compiler)
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for graphs, *shape in ((3, 4, 16), (3, 4, 16), *([] if training else [(6, 2, 9), (6, 3, 13)])):
        idx = tokens(*shape)
        with mock.patch("moeut.checkpoint", wraps=moeut.checkpoint) as checkpoint:
            close(loss_and_grads(compiled, idx, recompute), loss_and_grads(model, idx, False))
        assert counter.frame_count == graphs - recompute and checkpoint.call_count == 4 * recompute


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "eager"])
def test_bytes_saved_for_backward(compiled):
    """Of the feedforward of the 244M model, for a token and an application: at most 6.5 KB, and no copies of weights,
    whose gradients would add up in bfloat16."""
    *inputs, expert = cvmm.random_feedforward(64, 1024, 128, 20, 16, torch.float32, "cpu")
    inputs[0], saved = inputs[0].detach().bfloat16().requires_grad_(), {}
    run = torch.compile(cvmm.feedforward, backend="aot_eager_decomp_partition") if compiled else cvmm.feedforward
    with torch.autocast("cpu", torch.bfloat16):
        with torch.autograd.graph.saved_tensors_hooks(
                lambda t: saved.setdefault((t.data_ptr(), t.shape), t), lambda t: t):
            run(*inputs, expert)
    assert {t.data_ptr() for t in saved.values() if t.dim() == 3} == {w.data_ptr() for w in inputs[1:3]}
    assert 6000 < sum(t.nbytes for t in saved.values() if t.dim() < 3 and len(t) != 21) / 64 <= 6500


def test_routing_is_in_float32_under_autocast_and_in_float64_in_such_a_model():
    """The cut is between numbers that fewer bits cannot tell apart. So are positions, whatever the default dtype."""
    torch.set_default_dtype(torch.bfloat16)
    low = rotary_table(10, 0, 999)
    torch.set_default_dtype(torch.float32)
    assert torch.equal(low, rotary_table(10, 0, 999))
    router, n = Router(tiny(), 6, 1), torch.ones(1, 1, 20)
    for given, dtype, more in ((torch.bfloat16, torch.float32, 1e-3), (torch.float64, torch.float64, 1e-9)):
        router.to(dtype).w.data.fill_(1)
        for i, winner in enumerate((2, 4), 1):  # either: a tie could fall to the right one
            router.w.data[winner, 3] += i * more
            with torch.autocast("cpu", torch.bfloat16):
                gate, expert, usage = router(n.to(given))
            assert expert.item() == winner and gate.dtype == usage.dtype == dtype
    model, idx = make(n_layer=2), tokens(2, 16)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(idx).logits
    assert torch.equal(logits, model(idx).logits)


@pytest.mark.parametrize("length, n", [(1, 15), (16, 1), (3, 25), (30, 12)])
def test_generate(length, n):
    """Temperature 0: the likeliest token, or always the same one of several, as without a cache. A full context loses
    its older half."""
    model, context = make().eval(), tokens(3, length)
    new = torch.stack(list(model.generate(context, n, temperature=0)))
    context = context[:, -16:]
    for i, token in enumerate(new):
        context = context[:, -8:] if i and context.shape[1] > 16 else context
        assert torch.equal(token, model(context).logits[:, -1].argmax(-1))
        context = torch.cat((context, token[:, None]), dim=1)
    assert len(new) == n and (len(new.unique()) > 2 or n == 1)  # a model that repeats itself would prove little
    model.lm_head.weight.data.zero_()
    model.lm_head.bias.data = 1e-9 * (torch.arange(33) > 30).double()  # two win, by less than probabilities can tell
    (token,) = model.generate(tokens(99, 1), 1, temperature=0)
    assert len(token.unique()) == 1 and token[0] > 30


@pytest.mark.parametrize("options, expected", [
    (dict(), [0.1, 0.4, 0.2, 0.3]),
    (dict(temperature=0.5), [0.01 / 0.3, 0.16 / 0.3, 0.04 / 0.3, 0.09 / 0.3]),
    (dict(top_k=2), [0, 4 / 7, 0, 3 / 7]), (dict(top_p=0.65), [0, 4 / 7, 0, 3 / 7]),
    (dict(top_p=0.75), [0, 4 / 9, 2 / 9, 3 / 9]), (dict(temperature=1e-320), [0.0, 1, 0, 0]),
    (dict(top_p=1e-320), [0.0, 1, 0, 0]),
    (dict(top_k=3, top_p=0.72), [0, 4 / 7, 0, 3 / 7])], ids=str)  # top_p of what top_k left: 4/9 + 3/9
def test_sampling_distribution(options, expected):
    model = MoEUT(tiny(**TRANSFORMER, vocab_size=4, n_layer=1, group_size=1)).eval()
    model.lm_head.weight.data.zero_()
    model.lm_head.bias.data = torch.tensor([0.1, 0.4, 0.2, 0.3]).log() + 50
    (drawn,) = model.generate(tokens(40_000, 1) % 4, 1, generator=torch.Generator().manual_seed(0), **options)
    frequency = drawn.bincount(minlength=4) / len(drawn)
    torch.testing.assert_close(frequency, torch.tensor(expected), rtol=0, atol=0.012)
    assert (frequency[torch.tensor(expected) == 0] == 0).all()


@pytest.mark.parametrize("named, call", [
    *((name, lambda m, c={name: bad}: tiny(**c)) for name, bad in (
        *itertools.product([f.name for f in fields(MoEUTConfig) if f.type is int], (0, 2.0)), ("n_layer", 5),
        ("top_k", 7), ("att_top_k", 6), ("n_head", True), ("head_size", 3), ("ffn", "sparse"),
        ("attention", "linear"), ("layernorm", "none"), ("dropout", 1.0), ("dropout", -0.1), ("expert_dropout", 1.0),
        ("ffn_reg", math.nan), ("ffn_reg", "much"), ("att_reg", math.inf))),
    ("n_layer", lambda m: tiny(group_size=5)), ("layernorm", lambda m: tiny(ffn="dense")),
    *(("shape", lambda m, s=shape: m(tokens(*s))) for shape in ((16,), (2, 0), (0, 4))),
    *(("shape", lambda m, s=shape: m(tokens(2, 8), tokens(*s))) for shape in ((8, 2), (16,), (2, 7))),
    *(("shape", lambda m, s=shape: m.generate(tokens(*s), 1)) for shape in ((16,), (2, 0), (0, 4))),
    *((name, lambda m, c={name: bad}: m.generate(tokens(1, 4), 1, **c)) for name, bad in (
        ("temperature", -1), ("temperature", math.nan), ("top_k", 0), ("top_p", 0.0), ("top_p", 1.5)))])
def test_what_does_not_fit_the_model(named, call):
    with pytest.raises(ValueError, match=named):
        call(MoEUT(tiny()))


# Experts and routing: cvmm against its definition, the kernels in Triton's interpreter where there is no GPU ----------


@pytest.fixture(params=["PyTorch", pytest.param("Triton", marks=needs_triton)])
def path(request, monkeypatch):
    monkeypatch.setattr(cvmm, "force", request.param)
    return request.param


def output_and_grads(f, inputs):
    """f(*inputs) and the gradients of all inputs, for a random gradient, which is a transposed view."""
    inputs = [t.detach().requires_grad_() for t in inputs]
    out = f(*inputs)
    dout = torch.randn(out.shape[::-1], generator=torch.Generator().manual_seed(1)).T.to(out)
    return [t.float() for t in (out.detach(), *torch.autograd.grad(out, inputs, dout))]


CHOICES = {  # of one of n experts, for m slots
    "random": lambda m, n: torch.randint(n, (m,)), "one": lambda m, n: torch.full((m,), n - 2),
    "skewed": lambda m, n: (n * torch.rand(m) ** 4).long(),
    "gaps": lambda m, n: torch.randint(n // 3, (m,)) * 3 + 1}  # the first and the last are empty
FANS = {"up": (3, None), "down": (None, 3), "values": (6, 2), "outputs": (2, 6), "rows": (None, None), "slots": (1, 1)}


def case(fans, choice="random", n_token=11, n_in=19, n_out=23, n_expert=6, gated=True, dtype=None, view=lambda t: t):
    """cvmm and its definition as functions of x, w, gate; and these. cvmm gets them as `view` arranges the numbers."""
    fan_in, fan_out = fans
    m = n_token * max(fan_in or 1, fan_out or 1)
    expert = CHOICES[choice](m, min(n_expert, 100)).to(DEVICE, dtype)
    x, w = torch.randn(m // (fan_in or 1), n_in), torch.randn(n_expert, n_in, n_out) / n_in**0.5
    inputs = [t.to(DEVICE) for t in (x, w, torch.rand(m))[: 2 + gated]]

    def ours(x, w, *gate):
        return cvmm.cvmm(view(x), view(w), cvmm.route(expert, n_expert), *fans, *(view(g[:, None]) for g in gate))

    def definition(x, w, *gate):
        order = expert.argsort(stable=True)  # rows in the order of experts
        x = x if fan_in else x[order.argsort()]
        out = cvmm.definition(x, w, expert, fan_in or 1, fan_out or 1, *gate)
        out = out + 0 * sum(t.sum() for t in (x, w, *gate))  # without slots they have gradients of 0
        return out if fan_out else out[order]

    return ours, definition, inputs


def among_nans(t):
    """t, with numbers around its rows and columns that are not to be read."""
    return F.pad(t, (3, 2, 1, 4), value=math.nan)[..., 1:-4, 3:-2]


@pytest.mark.parametrize("fans, what", [
    *itertools.product(FANS.values(), [
        dict(choice="one"), dict(choice="skewed"), dict(choice="gaps"), dict(gated=False), dict(n_token=0)]),
    *(((2, 6), what) for what in (
        dict(n_token=1), dict(n_in=1, n_out=1, n_expert=1), dict(n_token=4, n_expert=129, dtype=torch.int8),
        dict(n_token=20, n_in=150, n_out=64, n_expert=3), dict(n_token=20, n_in=150, n_out=80, n_expert=3),
        dict(n_token=30, n_in=48, n_out=16, n_expert=12, view=among_nans),
        dict(n_token=60, n_in=80, n_out=80, n_expert=3, view=among_nans),
        dict(n_in=16, n_out=32, view=lambda t: t.mT.contiguous().mT)))])
def test_cvmm(path, fans, what):
    """Output and every gradient; and two runs are equal bit for bit. No token or one; one expert; several tiles and
    blocks; more experts than their integers can count; rows with gaps between their numbers, or with others beside."""
    ours, definition, inputs = case(fans, **what)
    got = output_and_grads(ours, inputs)
    close(got, output_and_grads(definition, inputs))
    assert what != dict(choice="skewed") or all(map(torch.equal, got, output_and_grads(ours, inputs)))


@pytest.mark.parametrize("fans", [(6, 2), (2, 6), (3, 1), (1, 3)], ids=str)
@pytest.mark.parametrize("gated, dtype", [(True, torch.int64), (False, torch.uint8)])
@torch.no_grad()
def test_few_slots_are_not_sorted(path, fans, gated, dtype):
    """Those of a decoded token: a CPU multiplies them one after the other, a GPU in one batch; PyTorch chooses them."""
    ours, definition, inputs = case(fans, n_token=2, gated=gated, dtype=dtype)
    expected = definition(*inputs)
    for function in (cvmm.definition, cvmm.batched):
        with (mock.patch("torch.Tensor.sort"), mock.patch("cvmm.launch"), mock.patch("cvmm.definition", function)):
            close([ours(*inputs)], [expected])
            assert cvmm.top_k(torch.eye(9), 1).flatten().tolist() == list(range(9))


@pytest.mark.parametrize("fans", FANS.values(), ids=FANS)
@mock.patch(f"{__name__}.DEVICE", "cpu")
def test_gradcheck(fans):
    """Finite differences in float64: the one reference that shares nothing with autograd."""
    ours, _, inputs = case(fans, n_token=2, n_in=3, n_out=4, n_expert=3)
    inputs = [t.double().requires_grad_() for t in inputs]
    assert torch.autograd.gradcheck(ours, inputs)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(ours(*inputs).sum(), inputs, create_graph=True)


@pytest.mark.parametrize("dtype, tolerance, fans", [
    (torch.float16, 2e-3, (3, None)), (torch.bfloat16, 1.6e-2, (None, 3)), (torch.bfloat16, 1.6e-2, (2, 6))], ids=str)
def test_half_precision(path, dtype, tolerance, fans):
    """Autocast, forward and backward, changes nothing inside: the numbers are those of a model of that precision. But
    slots add up in float32, times gates in float32: few bits could not count them."""
    ours, definition, (x, w, gate) = case(fans, "one", n_token=4, n_in=5, n_out=4, n_expert=2)
    half = output_and_grads(ours, (x.to(dtype), w.to(dtype), gate))
    with torch.autocast(DEVICE, dtype):
        got = output_and_grads(ours, (x, w, gate))
        with torch.no_grad():
            close([ours(x, w, gate)], [got[0].to(dtype)], tolerance)  # few slots, which are not sorted
    close(got, output_and_grads(definition, (x.to(dtype).float(), w.to(dtype).float(), gate)), tolerance)
    assert all(map(torch.equal, (*(t.to(dtype).float() for t in got[:3]), got[3]), half))
    x, gate = torch.ones(15, 1, dtype=dtype, device=DEVICE), torch.ones(15, device=DEVICE)
    eps = torch.finfo(dtype).eps
    x[0], x[14], gate[14] = 2 / eps, -2 / eps, 1 - eps / 4  # and 13 times 1, less than half of a last digit of 2 / eps
    for with_gradient, total in ((True, 13.5), (False, 13)):  # few slots have rounded gates
        with torch.set_grad_enabled(with_gradient):
            r = cvmm.route(torch.zeros(15, device=DEVICE).long(), 1)
            assert cvmm.cvmm(x, torch.ones_like(x[:1, None]), r, 1, 15, gate).item() == total


@pytest.mark.filterwarnings("ignore:invalid value")  # Triton's interpreter computes with numpy
def test_bad_numbers_stay_with_their_token_and_expert(path):
    *inputs, expert = cvmm.random_feedforward(40, 150, 13, 7, 1, torch.bfloat16, DEVICE)
    bad = torch.arange(40, device=DEVICE) % 20 == 0  # in memory, the end of row 19 is beside a bad one
    expert[bad], inputs[0].data[0], inputs[0].data[20] = 5, math.nan, math.inf
    out, dx, *dws, _ = output_and_grads(lambda *a: cvmm.feedforward(*a, expert), inputs)
    assert not out[bad].isfinite().any() and out[~bad].isfinite().all() and dx[~bad].isfinite().all()
    for dw in dws:
        assert not dw[5].isfinite().any() and dw[[0, 1, 2, 3, 4, 6]].isfinite().all()


@pytest.mark.parametrize("n_slot", [12, 24], ids=["few", "sorted"])
@torch.no_grad()
def test_what_does_not_fit_cvmm(n_slot):
    """Sizes, fans, devices, float64 in a kernel; experts, of which -1 would be the last one in Python."""
    expert, gate = torch.randint(5, (n_slot,)), torch.rand(n_slot)
    x, w = torch.randn(n_slot // 3, 4), torch.randn(5, 4, 3)
    good = dict(x=x, w=w, routing=cvmm.route(expert, 5), fan_in=3, gate=gate)
    cvmm.cvmm(**good)
    for bad in (dict(fan_in=None), dict(fan_in=4), dict(fan_in=0), dict(fan_out=0), dict(fan_out=5), dict(x=x[1:]),
                dict(x=x[:, 1:]), dict(w=w[1:]), dict(gate=gate[1:]), dict(gate=gate.to("meta")), dict(w=w.to("meta"))):
        with pytest.raises(ValueError, match="do not fit"):
            cvmm.cvmm(**good | bad)
    for bad in (-1, 5, 2**16, 2**40):
        with pytest.raises(ValueError, match="not one of the 5"):
            cvmm.cvmm(x, w, cvmm.route(expert.index_fill(0, torch.tensor(3), bad), 5), 3)
    for error, sentence, call, *bad in (
            (ValueError, "n_expert", cvmm.route, expert, 0), (TypeError, "integers", cvmm.route, expert.float(), 5),
            (TypeError, "float64", cvmm.schedule, x.double())):
        with pytest.raises(error, match=sentence):
            call(*bad)


@pytest.mark.parametrize("gated, dtype, fans", [
    (True, torch.bfloat16, (2, 6)), (False, torch.float32, (None, 3))], ids=str)
def test_custom_ops(path, gated, dtype, fans):
    """Schema, values and the shapes, strides and types that torch.compile is told, for transposed x and w."""
    _, _, (x, w, *gate) = case(fans, n_token=2, n_expert=4, gated=gated)
    if path == "Triton":
        torch.library.opcheck(torch.ops.moeut.top_k.default, (x, 2))
    x, w = x.to(dtype), w.to(dtype)
    m = len(x) * (fans[0] or 1)
    *r, dout = *cvmm.route(torch.randint(4, (m,), device=DEVICE), 4)[2:], x.new_ones(m // fans[1], 23)
    x, dout = cvmm.aligned(x.T.contiguous().T), cvmm.aligned(dout)
    rest = *((gate[0], dout) if gated else (None, None)), *r, *fans
    torch.library.opcheck(torch.ops.moeut.cvmm.default, (x, w.mT.contiguous(), True, *rest))
    torch.library.opcheck(torch.ops.moeut.cvmm_dw.default, (x, dout, *r[1:], *fans))


@pytest.mark.parametrize("n_expert, k", [(1, 1), (10, 2), (155, 12), (5, 5), (1024, 3), (2000, 2)])
def test_top_k(path, n_expert, k):
    """Of equal numbers any may be chosen, but none twice, also where all are -inf or nan."""
    logits = torch.randn(5, 2, n_expert, device=DEVICE).transpose(0, 1)
    logits[0, :4] = torch.tensor([[0.0], [-math.inf], [math.nan], [-math.nan]])
    logits[0, 4] = torch.tensor(-1, dtype=torch.int32).view(torch.float32)  # the nan that is the smallest integer
    logits[1, 0, n_expert // 2 :] = -math.inf  # dropped experts
    for x in (logits, logits.double()):
        with mock.patch.object(cvmm, "launch", wraps=cvmm.launch) as launch:
            expert = cvmm.top_k(x, k=k)
        assert launch.called == (path == "Triton" and x.dtype == torch.float32 and n_expert <= 1024)
        assert all(len(set(chosen)) == k for chosen in expert.flatten(0, 1).tolist())
        assert torch.equal(x.gather(-1, expert).sort(-1).values.nan_to_num(), x.topk(k).values.flip(-1).nan_to_num())
        with pytest.raises(RuntimeError, match="out of range"):
            cvmm.top_k(x, n_expert + 1)


# The Triton kernels --------------------------------------------------------------------------------------------------


@needs_triton
@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 1e-2)])
def test_training_through_the_kernels(dtype, tolerance, monkeypatch):
    """Of a whole model: two steps have the losses that they have without kernels. What is logged is cross entropy."""
    losses = {}
    for path in ("PyTorch", "Triton"):
        monkeypatch.setattr(cvmm, "force", path)
        torch.manual_seed(0)
        model = MoEUT(tiny(n_layer=1, group_size=1, n_head=1, n_expert=3, ffn_reg=1))
        x, y = tokens(2, 1, 5).to(DEVICE)
        trainer = train.Trainer(model, train.Options(dtype=dtype, compile="no"), torch.device(DEVICE))
        with trainer.autocast:
            out = model(x, y)
        norm = torch.nn.utils.get_total_norm(torch.autograd.grad(out.loss, list(model.parameters())))
        first, (losses[path], *_) = (trainer.step([(x, y)], 1e-3) for _ in range(2))
        assert first == pytest.approx([t.item() for t in (out.cross_entropy, out.reg, norm)], rel=tolerance)
    assert losses["Triton"] == pytest.approx(losses["PyTorch"], rel=tolerance)


@needs_triton
@pytest.mark.parametrize("size, strides", [((3, 16, 32), (2**30, 32, 1)), ((1, 144, 144), (1, 2**24, 1))], ids=str)
def test_offsets_beyond_32_bits(size, strides, monkeypatch):
    """Rows and experts 2^30 numbers apart: the third begins where 32-bit integers end. Or inputs 2^24 apart."""
    monkeypatch.setattr(cvmm, "force", "Triton")
    shapes = (((3, size[1]), (2**30, 1)), (size, strides))  # few pages are touched
    x, w = (torch.empty(2**31 + 2**28, dtype=torch.float16, device=DEVICE).as_strided(*shape) for shape in shapes)
    x.normal_(), w.normal_().div_(4)
    expert = torch.tensor([0, 1, 2, 2, 2, 0], device=DEVICE) % len(w)
    ours = output_and_grads(lambda x, w: cvmm.cvmm(x, w, cvmm.route(expert, len(w)), 2, 1), (x, w))
    close(ours, output_and_grads(lambda x, w: cvmm.definition(x, w, expert, 2), (x.float(), w.float())), 2e-3)


def test_gpus(monkeypatch):
    """torchrun gives each process one. Those too old for the kernels, such as a T4 beside an A100, do without, also
    under torch.compile, which cannot look into the question. TF32 follows the switch of torch."""
    gpus = {torch.device("cuda:0"): (7, 5), torch.device("cuda:1"): (8, 0)}
    monkeypatch.setattr(cvmm, "triton", True)
    monkeypatch.setattr(cvmm, "capability", lambda gpu: os.getpid() and gpus[gpu])
    assert [*map(cvmm.backend, gpus)] == ["PyTorch", "Triton"]
    ask = torch.compile(lambda x, gpu: x + (cvmm.backend(gpu) == "Triton"), backend="eager", fullgraph=True)
    assert [ask(torch.zeros(1), gpu) for gpu in gpus] == [0, 1]
    for precision in ("tf32", "ieee"):  # which is also the default
        torch.backends.cuda.matmul.fp32_precision = precision
        assert cvmm.schedule(torch.empty(1))["PRECISION"] == precision
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "zeros", lambda _, device: mock.Mock(device=device))
    assert [*map(train.pick_device, ("cpu", "auto", "cuda"))] == ["cpu", "cuda:1", "cuda:1"]


def compile_kernels(everything):
    """Compile every distinct launch of the paper's models ahead of time, or eight; print and check the code."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    gpus = {"sm_90": ("cuda", 90, 32), "sm_80": ("cuda", 80, 32), "gfx942": ("hip", "gfx942", 64)}
    forms, sizes, seen = ("bfloat16", "float16", "float32", "tf32"), ("moeut-44M", "moeut-244M", "moeut-1B"), set()
    every = itertools.product(gpus, forms, sizes, (65536, 2048, 128))
    few = ("sm_90", "bfloat16", "moeut-244M", 65536), ("sm_80", "float32", "tiny", 8192)
    for gpu, form, size, n in every if everything else few:
        driver.set_active(mock.Mock(**{
            "get_current_target.return_value": GPUTarget(*gpus[gpu]), "get_current_device.return_value": gpu}))
        torch.backends.cuda.matmul.fp32_precision = "tf32" if form == "tf32" else "ieee"
        c, dtype = PRESETS[size], torch.float32 if form == "tf32" else getattr(torch, form)
        # A training step through one layer, on the meta device: no number to wait for, and no autocast
        with (torch.device("meta"), mock.patch("torch.autocast"), mock.patch("torch.is_autocast_enabled", lambda _: 0),
              mock.patch("cvmm.force", "Triton"), mock.patch("cvmm.launch") as launch):
            layer, x = moeut.Layer(c).to(dtype), torch.empty(n // 128, 128, c.n_embd, dtype=dtype)
            layer(x, rotary_table(c.head_size, 0, 128))[0].sum().backward()
        calls = launch.call_args_list if everything else launch.call_args_list[7:11]  # of down: forward, sum, dx, dw
        for (kernel, _), arguments in calls:
            code = kernel.warmup(grid=(1,), **arguments)
            if code.hash in seen:
                continue
            seen.add(code.hash)
            sass = code.asm["sass"] if "cubin" in code.asm else ""
            used = set(re.findall(r"\b[A-Z]+\b", sass))  # instructions
            registers = 1 + max(map(int, re.findall(r"\bR(\d+)\b", sass)), default=0)
            print(gpu, size, n, form, kernel.__name__, *(arguments.get(name) for name in ("BM", "n_in", "n_out")),
                  f"{code.metadata.shared} bytes shared, {registers} registers")
            assert code.metadata.shared <= (99 if sass else 64) * 1024  # of sm_86 and sm_89, the smallest; of gfx942
            assert not used & {"STL", "LDL", "RED", "REDG", "ATOM", "ATOMG", "ATOMS"}  # spills, atomics
            if sass and kernel not in (cvmm.sum_kernel, cvmm.top_k_kernel):
                assert used & {"LDGSTS", "UTMALDG"}  # asynchronous copies
                large = gpu == "sm_90" and n == 65536  # a warp group has 64 rows
                assert form == "float32" or "HGMMA" in used or "HMMA" in used and not large  # tensor cores
                assert not large or "32" in form or registers <= 128  # two programs fit a multiprocessor
    assert len(seen) >= 150 if everything else len(seen) == 8


@pytest.mark.skipif(cvmm.triton is None or sys.platform != "linux", reason="needs triton, with its cuobjdump")
@pytest.mark.parametrize("everything", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["down", "all"])
def test_what_the_kernels_compile_to(everything):
    """Ahead of time: no spills, tensor cores, asynchronous copies, no atomics. All: three of the paper's models, three
    GPUs, in every number format, also for batches so small that the tiles shrink. `-m slow -s` prints the table."""
    call = f"import {Path(__file__).stem} as test; test.compile_kernels({everything})"  # where kernels are no Python
    subprocess.run([sys.executable, "-c", call], cwd=Path(__file__).parent, env=os.environ | {"TRITON_INTERPRET": "0"},
                   check=True)


# The scripts: main() runs in this process, in an empty folder with a cache of its own --------------------------------


TEXT = "".join(f"{i} · {i + 7} = {i * (i + 7)} — naïve 🙂{'漢字' * (i > 137)}\n" for i in range(150))
RUN = ("--data=text.txt --batch_size=2 --tokens_per_step=64 --steps=6 --warmup=2 --eval_interval=3 --eval_tokens=64 "
       "--sample_tokens=8 --log_interval=1").split()
SMALL = [*RUN, *("--n_embd=16 --head_size=8 --n_head=2 --n_layer=2 --group_size=1 --n_expert=4 --top_k=2 "
                 "--expert_size=8 --block_size=16 --vocab_size=300").split()]


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """run(script, *arguments) -> what it printed, .out and .err; in a folder that holds text.txt."""
    def call(script, *arguments):
        monkeypatch.setattr(sys, "argv", [script.__name__, "--device=cpu", *map(str, arguments)])
        capsys.readouterr()
        return script.cli(script.main) or capsys.readouterr()

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # drawing takes longer than these runs
    monkeypatch.setitem(sys.modules, "wandb", mock.Mock())
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # more would wait for each other, in models as small as these
    Path("text.txt").write_bytes(TEXT.encode())
    yield call
    for number, handler in handlers.items():  # which a process that is forked later would inherit
        signal.signal(number, handler)


@pytest.fixture
def done(run, tmp_path_factory):
    """A finished run in the folder out, trained once for all tests; and its weights alone, as people share them."""
    if not (kept := tmp_path_factory.getbasetemp() / "finished").exists():
        run(train, *SMALL, f"--out={kept}")
    shutil.copytree(kept, "out")
    Path("weights").mkdir()
    torch.save({part: load()[part] for part in ("model", "config", "options", "tokenizer")}, "weights/last.pt")


def load(out="out", name="last.pt"):
    return torch.load(Path(out, name), weights_only=True)


def logged(out, key):
    """{step: number} of all log lines that have it."""
    return {m["step"]: m[key] for m in load(out)["metrics"] if key in m}


def read(*patterns, tokenizer="bytes", vocab_size=300):
    """The tokenizer, the tokens for training and validation, bits per byte for a nat per token, the hash."""
    return text.load_text(list(map(str, patterns)), tokenizer, vocab_size, None)


def decoded(ids):
    """Tokens that are bytes, with \\0 for the end token."""
    return bytes(i % 256 for i in ids.tolist()).decode()


# Text ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, n_vocab", [("bytes", 257), ("bpe", 300)])
def test_tokenizer_round_trip(name, n_vocab, run):
    """Any text comes back, in whole characters, up to the end token, whose name is text. Bytes: BPE without merges."""
    tokenizer = text.Tokenizer(read("text.txt", tokenizer=name)[0].spec)
    line = TEXT[:200] + "<|endoftext|> \u200d\u2028\U0010ffff äß€漢字🙂\r\n\t"
    ids = tokenizer.encode(line).tolist()
    pieces = list(tokenizer.stream([*ids, tokenizer.end, *ids]))
    assert "".join(pieces) == line and not any("\ufffd" in piece for piece in pieces)
    assert "".join(tokenizer.stream(tokenizer.encode("ß").tolist()[:-1])) == "\ufffd"  # half of a character
    assert tokenizer.n_vocab == n_vocab == tokenizer.end + 1 and tokenizer.end not in ids
    assert (len(ids) == len(line.encode())) == (name == "bytes")
    large = text.Tokenizer(tokenizer.spec | dict(special_tokens={"<|endoftext|>": 70_000}))  # as some of tiktoken's
    assert text.load_text(["text.txt"], "", 0, large)[2][-1] == 70_000


def test_vocabulary(run):
    """Smaller than asked for if the text has no more to merge; padded only on request, with tokens that are no text. It
    is made of many files if they are short, and of pieces of a file of one line."""
    Path("few.txt").write_text("abab " * 900 + "xyxy " * 100)  # which is for validation
    printed = run(train, *SMALL, "--steps=1", "--data=few.txt", "--vocab_size=5000", "--out=few").out
    size, ranks = len(load("few")["model"]["lm_head.weight"]), load("few")["tokenizer"]["mergeable_ranks"]
    assert f"vocabulary: {size} tokens instead of 5000" in printed and 257 < size == len(ranks) + 1 < 300
    assert b"ab" in ranks and b"xy" not in ranks
    run(train, *SMALL, "--steps=1", "--tokenizer=bytes", "--vocab_size=1000")
    assert len(load()["model"]["lm_head.weight"]) == 1000 and run(sample, "--temperature=9").out
    Path("many").mkdir()
    for i in range(400):
        Path(f"many/{i}.txt").write_text(chr(0x4E00 + i))  # of three bytes, the last of which is its own
    Path("line.txt").write_text("x" * 5_000_000)
    assert max(map(len, text.texts(Path("line.txt")))) <= 2**21
    assert 256 + 350 < read("many", tokenizer="bpe", vocab_size=5000)[0].n_vocab


def test_tokens_are_cached(run):
    """All runs on a text share its tokens; they are made anew if they are damaged, or if the text is another. What a
    run has begun to write goes when it is told to end."""
    with (mock.patch("text.split", lambda _: signal.raise_signal(signal.SIGTERM)),
          pytest.raises(SystemExit, match="143")):
        run(train, *SMALL, "--tokenizer=bytes")
    assert not list(Path("cache/moeut").iterdir())
    first = decoded(read("text.txt")[1])
    with mock.patch("text.read_documents", None):
        assert decoded(read("./text.*", "text.txt")[1]) == first
    for damage in (lambda f: f.write_bytes(f.read_bytes()[:100]), lambda f: f.write_bytes(b""), Path.unlink):
        damage(*Path("cache/moeut").iterdir())
        assert decoded(read("text.txt")[1]) == first
    Path("text.txt").write_text(TEXT.replace("1", "2"))  # as long as before
    os.utime("text.txt", ns=(0, 1))
    assert decoded(read("text.txt")[1]) == first.replace("1", "2")
    assert len(read("text.txt", tokenizer="bpe")[1]) < len(first)


@pytest.mark.parametrize("n", [1, 2, 3, 20, 300])
def test_documents(n, run, capsys):
    """The last tenth of all characters is for validation, in whatever files and wherever they are. A file of two names
    counts once. Hidden files, those of a run and what is not UTF-8 are left out, whole."""
    documents = [f"<{i} 🙂>\r\n" * (1 + 37 * i % 11) for i in range(n - 1)]
    documents.append("naïve 🙂\n" * (9 if n > 1 else 10**5))
    files = {".hidden/a.txt": b"?", "run/metrics.jsonl": b"?", "run/last.pt": b"?",
             "latin.txt": b"?\n" * 600_000 + b"\xef\n",  # files are read in pieces of a megabyte
             **{f"sub/{i}.txt": document.encode() for i, document in enumerate(documents)}}
    for name, content in files.items():
        Path("do[c]s", name).parent.mkdir(parents=True, exist_ok=True)
        Path("do[c]s", name).write_bytes(content)
    os.symlink("sub/0.txt", "do[c]s/link.txt")
    _, *ids, bits, text_hash = read("do[c]s", "do?c?s/**")
    said = re.sub("tokenizing: .*\n", "", capsys.readouterr().out)  # if it takes long
    assert re.fullmatch(r"left out, because it is not UTF-8 text: .*latin\.txt\n", said)
    parts = [decoded(part) for part in ids]
    assert sorted("".join(parts).split("\0")) == ["", *sorted(documents)] and parts[1][-1] == "\0"
    assert len(parts[0].replace("\0", "")) == int(0.9 * sum(map(len, documents)))
    assert bits == pytest.approx([len(tokens) / len(part.replace("\0", "").encode()) / math.log(2)
                                  for tokens, part in zip(ids, parts, strict=True)])
    _, *ids, _, renamed_hash = read(Path("do[c]s/sub/0.txt").rename("do[c]s/z.txt").parent)
    assert [decoded(part) for part in ids] == parts and renamed_hash == text_hash and text.find_files(["*/run/last.pt"])


@pytest.mark.parametrize("length", [17, 18, 33, 49, 100, 1234])
def test_windows_visit_everything_once_per_epoch(length):
    """In another order, and cut at other places, for every epoch and seed; however many are asked for at a time."""
    T, n, epochs = 16, max((length - 17) // 16, 1), []
    for seed, epoch in itertools.product((0, 1), range(5)):
        starts = text.window_starts(length, T, range(epoch * n, (epoch + 1) * n), seed)
        assert starts == [s for i in range(n) for s in text.window_starts(length, T, [epoch * n + i], seed)]
        assert (np.diff(sorted(starts)) == T).all() and 0 <= min(starts) and max(starts) + T + 1 <= length
        epochs.append(starts)
    if length > 100:
        assert len(set(map(min, epochs))) > 3 and len({tuple(np.argsort(starts)) for starts in epochs}) == 10
    x, y = text.batch(np.arange(length, dtype=np.uint16), starts[:3], T, torch.device("cpu"))
    assert x[:, 0].tolist() == starts[:3] and torch.equal(y, x + 1) and x.shape[1] == T and x.dtype == torch.int64


# Training ------------------------------------------------------------------------------------------------------------


def test_learning_rate_and_recipes():
    """Linear to the peak, which may be held, then half a cosine. The paper's runs need no further flags."""
    for hold, steps, expected in ((0, (0, 4, 9, 10, 60, 110, 500), (0.1, 0.5, 1, 1, 0.55, 0.1, 0.1)),
                                  (0.5, (0, 10, 55, 82.5, 110), (0.1, 1, 1, 0.55, 0.1))):
        o = train.Options(lr=1.0, warmup=10, steps=110, hold=hold, final_lr=0.1)
        assert [train.learning_rate(step, o) for step in steps] == pytest.approx(expected)
    for name, warmup, grad_clip in (("moeut-44M", 0, 0.1), ("moeut-244M", 4000, 0.25)):
        o = train.Options(**train.RECIPES[name])
        assert (o.lr, o.beta1, o.beta2, o.weight_decay, o.final_lr, o.hold) == (2.5e-4, 0.9, 0.999, 0.01, 0.1, 0)
        assert (o.steps, o.tokens_per_step, o.warmup, o.grad_clip) == (100_000, 65_536, warmup, grad_clip)


def test_train_then_sample(run):
    """The log has the same numbers everywhere. Validation is without dropout, on text that is not trained on."""
    printed = run(train, *SMALL, *"--log_interval=2 --dropout=0.3 --batch_size=4 --eval_tokens=26 --wandb".split()).out
    assert [json.loads(line) for line in Path("out/metrics.jsonl").read_text().splitlines()] == load()["metrics"]
    val_losses, (_, data, val, bits, _) = logged("out", "val_loss"), read("text.txt", tokenizer="bpe")
    assert [*logged("out", "loss")] == [1, 2, 4, 6] and [*val_losses] == [3, 6]
    model = train.load_model(Path("out"))[0]
    best = min(val_losses[3], train.evaluate(model, val, 26, 4, contextlib.nullcontext()))  # of the same windows
    assert load("out", "best.pt")["best"] == best
    for kind, factor in zip(("", "val_"), bits, strict=True):
        for step, loss in logged("out", f"{kind}loss").items():
            assert f"step {step}/6: {kind}loss {loss:.4g}, {kind}bits_per_byte {loss * factor:.4g}" in printed
    x, y = text.batch(val, np.linspace(0, len(val) - 17, 26 * 8 // 16).astype(int), 16, torch.device("cpu"))
    assert val_losses[6] == pytest.approx(model.eval()(x, y).loss.item())
    trained_on = load()["optimizer"]["state"][0]["exp_avg"].any(1).nonzero()  # rows of the embedding
    assert set(trained_on.flatten().tolist()) <= set(data.tolist()) and not set(val.tolist()) <= set(data.tolist())
    assert "now `python sample.py --out=out`" in printed and len(run(sample).out) > 10
    assert len(load()["metrics"]) == sys.modules["wandb"].log.call_count and logged("out", "seconds_left")[6] == 0


def test_learns_from_context(run):
    """40 steps on code of the standard library: knowing how frequent each token is would give 2.8 bits."""
    files = [Path(os.__file__).with_name(name) for name in ("typing.py", "ast.py", "shutil.py", "argparse.py")]
    Path("code.txt").write_bytes(b"".join(map(Path.read_bytes, files)))  # one document, so that its end is validation
    run(train, *"--steps=40 --tokens_per_step=512 --batch_size=8 --block_size=64 --vocab_size=512".split(),
        "--eval_tokens=1024", "--sample_tokens=0", "--data=code.txt")
    assert logged("out", "val_bits_per_byte")[40] < 2.5 and {*files} < {*text.find_files([])}


@pytest.mark.parametrize("number, at, dtype, other", [
    (signal.SIGINT, 2, "float32", "bfloat16"), (signal.SIGTERM, 1, "float16", "float32")])
def test_resume_changes_no_bit(number, at, dtype, other, run):
    """Stopped in a step that is due for evaluation, or not, and moved: as if nothing had been. Also another dtype."""
    options, rate = [*SMALL, "--dropout=0.1", "--sample_tokens=0", f"--dtype={dtype}"], train.learning_rate
    run(train, *options, "--out=straight")
    with (mock.patch("train.learning_rate", lambda i, o: (i == at and signal.raise_signal(number), rate(i, o))[1]),
          pytest.raises(SystemExit, match=f"^Stopped after step {at + 1}, saved in parts: .*--resume --out=parts`")):
        run(train, *options, "--out=parts")
    Path("parts").rename("out")
    Path("text.txt").rename("moved.txt")
    run(train, "--resume", "--data=~/moved.txt")
    for part in ("step", "best", "model", "optimizer", "scaler"):
        torch.testing.assert_close(load()[part], load("straight")[part], rtol=0, atol=0)
    assert all(logged("out", key) == logged("straight", key) for key in ("loss", "val_loss"))
    assert bool(load()["scaler"]) == (dtype == "float16") and load()["options"]["out"] == "out"
    run(train, "--resume", "--steps=8", f"--dtype={other}", "--weight_decay=0.7", "--beta2=0.9")
    assert load()["optimizer"]["param_groups"][0].items() >= dict(weight_decay=0.7, betas=(0.7, 0.9)).items()
    run(train, "--resume", "--steps=10", f"--dtype={dtype}")
    losses = logged("out", "loss")
    assert len(losses) == 10 and losses[10] < losses[1] - 0.2 and not Path("parts").exists()
    assert max(logged("out", "grad").values()) < 10  # not those of the scaled loss


def test_init_from(run, done):
    """Weights and tokenizer of another run, repeated more often, on another text. A step that is tiny keeps them."""
    run(train, *"--init_from=~/weights --out=new --n_layer=3 --steps=1 --lr=1e-9 --weight_decay=0".split(),
        f"--data={text.__file__}", "--tokens_per_step=32")
    torch.testing.assert_close(load("new")["model"], load()["model"], rtol=0, atol=1e-6)
    assert load("new")["tokenizer"] == load()["tokenizer"] and load("new")["options"]["warmup"] == 20
    assert load("new")["step"] == 1 and load("new")["config"]["n_layer"] == 3


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), RuntimeError("of torch")])
def test_a_full_disk_keeps_the_last_checkpoint(failure, run, done, monkeypatch):
    """And no half of another. What a run that was killed has left goes when the run goes on, and nothing else. A file
    that may not be read is not called damaged."""
    def full(_, file):
        file.write(b"half of it")
        raise failure

    before = Path("out/last.pt").read_bytes()
    with mock.patch("torch.save", full), pytest.raises(SystemExit, match="^out/best.pt.*(No space|disk full).*$"):
        run(train, "--resume", "--steps=9")
    assert Path("out/last.pt").read_bytes() == before and not list(Path("out").glob("*.part"))
    denied = PermissionError(13, "Permission denied", "out/last.pt")
    with mock.patch("torch.load", side_effect=denied), pytest.raises(SystemExit, match="^out/last.pt: Permission"):
        run(train, "--resume", "--steps=9")
    Path("out/last.pt.1.part").touch(), Path("out/a.film.1080p.part").touch()
    monkeypatch.chdir("out")  # the text is found from anywhere
    run(train, "--resume", "--steps=9", "--out=.", "--lr=1")  # worse than before
    assert load(".")["step"] == 9 and [*map(str, Path().glob("*.part"))] == ["a.film.1080p.part"]
    assert load(".", "best.pt")["step"] == 6 and load(".", "best.pt")["best"] == load(".")["best"]


def test_steps_that_are_not_finite(run, done, monkeypatch):
    """They change nothing and are never saved. Ten in a row end the run; more do not, if they are apart."""
    before = Path("out/last.pt").read_bytes()
    for interval, sentence in ((3, "The loss is not a number at step 9:"),
                               (100, "The gradient was not finite in ten steps in a row, up to 17:")):
        with pytest.raises(SystemExit, match=f"^{sentence}.*smaller --lr.*$"):
            run(train, "--resume", "--steps=600", "--lr=5000", f"--eval_interval={interval}")
        assert Path("out/last.pt").read_bytes() == before
    lines = [json.loads(line) for line in Path("out/metrics.jsonl").read_text().splitlines()]
    assert sum(line.get("skipped", 0) for line in lines) == 9 and lines[-1]["loss"] is None
    norms, seen = itertools.cycle(torch.tensor([math.nan, 1.0])), []
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda parameters, _: (
        seen.append((p := [*parameters][-1]).tolist()), p.grad.mul_(norm := next(norms)), norm)[2])
    run(train, "--resume", "--steps=30", "--log_interval=4")
    assert [a != b for a, b in itertools.pairwise(seen)] == [False, True] * 11 + [False]
    assert logged("out", "skipped") == {7: 1, 12: 2, 16: 2, 20: 2, 24: 2, 28: 2, 30: 1}
    assert list(logged("out", "grad").values())[6:] == [None] + [1] * 7 and math.isfinite(logged("out", "val_loss")[30])
    monkeypatch.setattr(os, "_exit", sys.exit)
    for times, sentence in ((2, "130"), (1, "Stopped after step 31, saved in out")):  # Ctrl-C in a step that is skipped
        monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_, n=times: (
            [signal.raise_signal(signal.SIGINT) for _ in range(n)], torch.tensor(math.nan))[1])
        with pytest.raises(SystemExit, match=f"^{sentence}"):
            run(train, "--resume", "--steps=40")


@pytest.mark.skipif(os.name != "posix", reason="needs process groups")
@mock.patch("moeut.checkpoint", wraps=moeut.checkpoint)
def test_how_a_step_is_divided_changes_nothing(checkpoint, run):
    """Accumulated, recomputed, or by two processes, each with its own dropout. Clipping and Adam hide a wrong scale,
    norms do not. After Ctrl-C, which reaches all processes, they leave together, with one sentence, and can go on,
    on the device they were on."""
    Path("driver.py").write_text("""if True:
        import atexit, os, torch
        if os.environ["RANK"] == "1":
            atexit.register(os.abort)  # as a thread of gloo may, in the shutdown of the interpreter
        log = open("log" + os.environ["RANK"], "a", 1)
        torch.save = lambda *args, save=torch.save: print("saved", file=log) or save(*args)
        torch.nn.Dropout.forward = lambda self, x: print(torch.initial_seed(), file=log) or x
        init = torch.distributed.init_process_group  # which on a machine with GPUs, told nothing, sends no CPU tensors
        torch.distributed.init_process_group = lambda backend, timeout: init(backend, timeout=timeout)
        import train
        train.pick_device = lambda name, pick=train.pick_device: print("on", name, file=log) or pick(name)
        train.cli(train.main)""")
    torchrun = [sys.executable, *"-m torch.distributed.run --standalone --nproc_per_node=2 driver.py".split()]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
                 env=os.environ | {"PYTHONPATH": str(Path(train.__file__).parent)})
    options = [*SMALL, "--final_lr=1", "--eval_interval=100000", "--device=cpu"]
    process = subprocess.Popen([*torchrun, *options, "--steps=100000", "--batch_size=1", "--out=two"], **pipes)
    while not process.stdout.readline().startswith("step 5/"):
        assert process.poll() is None, process.stderr.read()
    process.stdout.close()  # `| tee log` ends with Ctrl-C too
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=120)  # returns when no process is left that could write
    step = load("two")["step"]
    assert process.returncode == 1 and error.count(f"Stopped after step {step}, saved in two") == 1
    assert error.count("Traceback") == 1  # torchrun's own
    process = subprocess.Popen([*torchrun, "--resume", "--out=two", f"--steps={step + 2}"], **pipes)
    printed = run(train, *options, f"--steps={step + 2}", "--batch_size=1", "--recompute", "--out=one").out
    assert " recompute=True " in printed and checkpoint.called
    run(train, *options, f"--steps={step + 2}", "--batch_size=4", "--out=four")
    printed, error = process.communicate()
    assert process.returncode == 0 and printed.count("MACs per token") == 1, error
    logs = [set(Path(f"log{rank}").read_text().splitlines()) for rank in (0, 1)]  # seeds of dropout, what is saved, ...
    assert len(logs[0]) - 1 == len(logs[1]) == step + 3 and "saved" in logs[0] and logs[0] & logs[1] == {"on cpu"}
    for out in ("one", "two"):
        torch.testing.assert_close(load(out)["model"], load("four")["model"], rtol=0, atol=1e-4)
        for key in ("loss", "reg", "grad", "val_loss"):
            assert logged(out, key) == pytest.approx(logged("four", key), rel=1e-3)


def test_help_compare_and_bench(run):
    """Mean and range over the seeds; a changed model or recipe stands apart. A run outlives the name of its preset."""
    options = "seed=1 seed=2 lr=2e-3 dtype=bfloat16 top_k=1 tokenizer=bytes preset=dense-small".split()
    for name, option in zip("abcdefg", options, strict=True):
        run(train, *SMALL, f"--{option}", f"--out={name}")
    lines = run(bench, "--compare", *"gfedcba").out.splitlines()
    assert [re.search("lr=|ffn=|vocab", line) for line in lines if "dense" in line] == [None]  # its recipe
    (two,) = [line.split()[-7:] for line in lines if line.startswith("tiny") and not re.search("k=|lr=|type|tok", line)]
    bits = [logged(name, "val_bits_per_byte")[6] for name in ("a", "b")]
    assert not torch.eq(*(load(name)["model"]["embedding.weight"] for name in "ab")).any()
    assert not torch.equal(*(load(name)["optimizer"]["state"][0]["exp_avg"] != 0 for name in "ab"))
    assert [float(x) for x in (two[0], *two[2:5])] == pytest.approx([2, sum(bits) / 2, *sorted(bits)], abs=1e-4)
    stored = load("e")
    stored["options"]["preset"], stored["metrics"][0]["peak_mib"] = "gone", None  # as on Windows
    stored["seconds"] = 1e6
    torch.save(stored, "e/last.pt")
    assert {line.split()[0] for line in run(bench, "--compare", "~/a", "e").out.splitlines()[2:]} == {"tiny", "gone"}
    run(train, "--resume", "--out=e", "--steps=7")
    assert load("e")["seconds"] > 1e6
    table = run(bench, "--preset=tiny", "--batch_size=1").out
    assert len(re.findall(r"^.+[\d,.]+ +[\d,.]+ +\d+\.\d\d$", table, re.MULTILINE)) == 4
    for said, *command in (("0", train, "--help"), ("0", sample, "--help"), ("0", bench, "--help"),
                           ("--data is empty.", train, "--data", "a.txt", "")):
        with pytest.raises(SystemExit, match=f"^{said}$"):
            run(*command)


# Sampling, experts, scores -------------------------------------------------------------------------------------------


def set_end(bias):
    """The model of the run writes the end token always, or never."""
    stored = load()
    stored["model"]["lm_head.bias"][-1] = bias
    torch.save(stored, "out/last.pt")


def test_sample(run, done):
    """Temperature 0, top_k 1, tiny top_p: the likeliest tokens. Seeds count. What is printed is the text and nothing
    else. How fast it was, and what is not read, goes to stderr."""
    def sampled(*arguments):
        return run(sample, "--max_new_tokens=30", *arguments).out
    model, tokenizer, _ = train.load_model(Path("out"))
    newest = tokenizer.encode(TEXT[:100])[-16:].tolist()
    tokens = model.eval().generate(torch.tensor([newest]), 30, temperature=0)
    best = TEXT[:100] + "".join(tokenizer.stream(map(int, tokens))) + "\n"
    assert all(sampled(f"--prompt={TEXT[:100]}", o) == best for o in ("--temperature=0", "--top_k=1", "--top_p=1e-6"))
    assert "of which the newest 16 are read" in run(sample, f"--prompt={TEXT[:100]}").err
    assert sampled() == sampled("--seed=0") != sampled("--seed=1") != sampled("--seed=1", "--temperature=2")
    Path("prompt.txt").write_bytes("naïve\r\n 🙂".encode())
    assert sampled("--prompt=~")[0] == "~"  # a path would begin with the home folder
    assert sampled("--prompt_file=~/prompt.txt", "--out=~/weights") == sampled("--prompt=naïve\r\n 🙂")
    three = sampled("--prompt=12 ·", "--n_samples=3").split("\n" + "-" * 60 + "\n")
    assert len(set(three)) == 4 and three[3] == "" and all(text.startswith("12 ·") for text in three[:3])
    with mock.patch("sys.stdout", io.StringIO()) as notebook, mock.patch("torch.load", wraps=torch.load) as reads:
        sampled("--seed=1")
    assert notebook.getvalue() == sampled("--seed=1") and reads.call_count == 1
    set_end(1e9)
    ended = run(sample, "--n_samples=2", "--prompt=1")
    assert ended.out == ("1\n" + "-" * 60 + "\n") * 2 and re.fullmatch("2 tokens in .* tokens/s on cpu\n", ended.err)


def test_terminals(done):
    """One that is not UTF-8; the prompt in standard input; no traceback after Ctrl-C (130), or `| head` (141)."""
    set_end(-1e9)
    Path("prompt.txt").write_bytes("naïve 🙂".encode())
    command = [sys.executable, sample.__file__, "--prompt_file=-", "--device=cpu", f"--max_new_tokens={10**6}"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    processes = {code: subprocess.Popen(command, stdin=open("prompt.txt"), **pipes) for code in (130, 141)}
    for code, process in processes.items():
        assert process.stdout.read(7) == b"na?ve ?"
        process.send_signal(signal.SIGINT) if code == 130 else process.stdout.close()
        assert process.stderr.read() == b"" and process.wait() == code


def test_show_experts(run, done):
    """Every token once for each application, with the feedforward expert of the largest gate; no codes in a pipe. How
    many experts of a pool are used, how evenly, and how many of its experts a token keeps in the next repeat."""
    printed = run(sample, f"--prompt={TEXT[:60]}", "--show_experts").out
    (model, tokenizer, _), calls = train.load_model(Path("out")), []
    for router in model.layers[0].attention.router, model.layers[0].ffn.router:
        router.register_forward_hook(lambda router, args, _: calls.append(  # [T, pools, K]
            (args[0][0] @ router.w.T).view(16, -1, router.shape[-1]).topk(router.top_k).indices))
    model.eval()(torch.tensor([tokenizer.encode(TEXT[:60])[-16:].tolist()]))
    shown = [[int(e) for e in re.findall(r"\[(\d)\]", part)] for part in printed.split("application")[1:]]
    assert shown == [chosen[:, 0, 0].tolist() for chosen in calls[1::2]] and "\x1b" not in printed
    for name, n, *chosen in (("attention", 2, *calls[::2]), ("ffn", 4, *calls[1::2])):
        p = F.one_hot(torch.stack(chosen), n).double().mean((0, 1, 3))                   # [pools, n]
        evenness = -(p * p.log()).nansum(1).mean() / math.log(n)
        pairs = zip(*(c.flatten(0, 1).tolist() for c in chosen), strict=True)
        kept = np.mean([len({*a} & {*b}) / len(a) for a, b in pairs])
        row = f"layers.0.{name + '.router':23} {(p > 0).double().mean():6.0%} {evenness:16.2f} {kept:27.0%}"
        assert row in printed
    run(train, *SMALL, "--steps=1", "--group_size=2", "--n_expert=1", "--top_k=1", "--out=apart")  # nothing is repeated
    table = run(sample, "--out=apart", "--show_experts").out
    assert table.count(" -\n") == 4 and "nan" not in table


PAIRS = [("12 ·", " 19 = 228", " 20 = 22"), ("", "naïve", "🙂🙂🙂"), ("3 · 10 = 30 — naïve 🙂 4 · 11", " = 44", " 🙂")]


def test_log_likelihoods(done):
    """Of the tokens in end, and whether they are the most likely, from the newest tokens; however many at a time."""
    (model, tokenizer, _), expected = train.load_model(Path("out")), []
    pairs = [(tokenizer.encode(f"4 {a}").tolist(), tokenizer.encode(b).tolist()) for a, *ends in PAIRS for b in ends]
    best = model.eval()(torch.arange(14, 30)[None]).logits[0, -1].argmax().item()
    pairs += ([*range(30)], [best]), ([*range(30)], [best, 0]), ([0], [*range(17)])
    for context, end in pairs:
        ids = torch.tensor([*context, *end][-model.config.block_size - 1 :])
        log_p, end = model(ids[None, :-1]).logits[0, -len(end) :].log_softmax(-1), ids[1:][-len(end) :]
        expected.append((pytest.approx(log_p.gather(1, end[:, None]).sum().item()), torch.equal(log_p.argmax(1), end)))
    assert all(sample.log_likelihoods(model, pairs, batch_tokens) == expected for batch_tokens in (1, 40, 8192))
    assert [likely for _, likely in expected].count(True) == 1


def test_tasks(run, done):
    """The harness, with a task of our own and without a network."""
    pytest.importorskip("lm_eval")
    Path("pairs.json").write_text("".join(json.dumps(dict(a=a, b=b)) + "\n" for a, b, _ in PAIRS))
    Path("tasks").mkdir()
    Path("tasks/mine.yaml").write_text(json.dumps(dict(
        task="mine", dataset_path="json", dataset_kwargs=dict(data_files=dict(train="pairs.json")), target_delimiter="",
        validation_split="train", output_type="loglikelihood", doc_to_text="{{a}}", doc_to_target="{{b}}",
        metric_list=[dict(metric="perplexity", aggregation="mean", higher_is_better=True)])))  # of the logarithms
    found = re.search(r"perplexity *\|[^|]*\| *(-[\d.]+)", run(sample, "--tasks", "tasks").out)[1]
    (model, tokenizer, _), pairs = train.load_model(Path("out")), []
    for a, b, _ in PAIRS:
        ids, n = tokenizer.encode(a + b).tolist(), len(tokenizer.encode(a))
        pairs.append(([tokenizer.end, *ids[:n]], ids[n:]))
    expected = np.mean([log_p for log_p, _ in sample.log_likelihoods(model.eval(), pairs)])
    assert float(found) == pytest.approx(expected, rel=1e-4)


def test_weights_of_the_authors(run, monkeypatch):
    """From their clean repository and from their training code, with what stands for a SentencePieceProcessor."""
    names = ["</s>", *"\u2581abcdefg", "<0xC3>", "<0xA9>"]
    pieces = type("Pieces", (tuple,), dict(
        id_to_piece=tuple.__getitem__, is_control=lambda _, i: i in (0, 8), is_byte=lambda self, i: i > 8,
        encode=lambda self, text: [self.index(c) for c in text.replace(" ", "\u2581")], eos_id=lambda self: 0))(names)
    monkeypatch.setitem(sys.modules, "sentencepiece", mock.Mock(SentencePieceProcessor=lambda model_proto: pieces))
    monkeypatch.setitem(PRESETS, "theirs", THEIRS[3])
    Path("words.model").touch()
    model, tokenizer = moeut.from_authors(authors_weights(3), THEIRS[3]).eval(), text.SentencePiece("words.model")
    assert "".join(tokenizer.stream([2, *range(1, 11), 0, 3])) == "a abcdefé"  # a control piece, such as 8, is no text
    tokens = model.generate(torch.tensor([[3, 7, 1, 4]]), 20, temperature=0)
    best = "bf c" + "".join(tokenizer.stream(map(int, tokens))) + "\n"
    assert len(best) > 8
    training = {f"unique_layers.0.pkm.{name}": torch.zeros(6) for name in ("iter", "kv_sel_counts_100")}
    for name, weight in authors_weights(3).items():
        for clean, theirs in (
            ("transformer.layers.", "unique_layers."), ("attention.sel_", "self_attn.selections."), ("ffn.", "pkm."),
            (".attention.", ".self_attn.projections."), ("q.weight", "q"), ("k.weight", "k"), ("lm_head", "output"),
            ("ln1", "self_attn.norm"), ("ln2", "pkm.norm")):
            name = name.replace(clean, theirs)
        training[name] = weight
    for stored in (authors_weights(3), dict(run_invariants=dict(args={"rope.base": 10000}), model=training)):
        torch.save(stored, "theirs.pt")
        options = "--out=theirs.pt --tokenizer=words.model --preset=theirs --temperature=0 --max_new_tokens=20".split()
        assert run(sample, *options, "--prompt=bf c").out == best


# Bad input: one sentence that names the culprit, and nothing lost ----------------------------------------------------


BAD = [  # what is run, and what is added: the sentence contains the name of the last option, or what follows the arrow
    ([train, *SMALL, "--out=new"], """
        --step=1 | --steps=many | --steps=0 → steps is 0 | --lr=nan → lr is nan | --beta2=1 | --seed=-1 |
        --data= | --data=missing.txt → missing.txt | --data=empty.txt → more text | --data=latin.txt → more text |
        --tokens_per_step=65 | --n_layer=3 --group_size=2 → n_layer | --top_k=9 | --ffn_reg=nan | --preset=huge → huge |
        --dtype=int8 → int8 | --device=cuda:99 → cuda:99 | --device=hpu → hpu | --vocab_size=100 | --wandb |
        --tokenizer=klingon → klingon | --out=text.txt → text.txt | --out=out → --resume | --tokens_per_step=48 |
        --init_from=theirs.pt → theirs.pt does not hold | --expert_size=9999999999999 → into memory |
        --init_from=out --tokenizer=x → --init_from | --init_from=out --n_embd=32 → model that fits .size mismatch"""),
    ([train], """
        --resume → 6 steps | --resume --out=nowhere → nowhere | --resume --out=out/last.pt → no checkpoint at |
        --resume --seed=3 | --resume --eval_tokens=9 | --resume --n_layer=4 | --resume --tokens_per_step=32 |
        --resume --init_from=out | --resume --preset=tiny | --resume --out=half → half/last.pt is not |
        --resume --steps=9 --data=few.txt → not what it was | --resume --out=other → other.* 'new' |
        --init_from=nowhere → nowhere | --resume --steps=9 --out=foreign → foreign |
        --resume --out=weights → --init_from=weights takes the weights"""),
    ([bench], """
        --preset=dense-tiny → dense-tiny | --compare out text.txt → text.txt |
        --compare out foreign → These cannot be compared: steps is 6 in out and 9 in foreign."""),
    ([sample], """
        --top_k=few | --n_samples=0 | --temperature=-1 → temperature is -1 | --top_p=1.1 | --prompt= | --preset=tiny |
        --tokenizer=x | --prompt=\udcef → not UTF-8 |
        --out=half → half/last.pt is not | --tasks x | --prompt_file=missing.txt → missing.txt |
        --prompt_file=empty.txt → empty.txt | --prompt_file=latin.txt → latin.txt | --prompt=a --prompt_file=text.txt |
        --out=theirs.pt --preset=tiny → --tokenizer | --out=theirs.pt --tokenizer=x --preset=tiny → rope.base""")]


@pytest.mark.parametrize("start, case", [(start, case) for start, cases in BAD for case in cases.split("|")])
def test_bad_input(start, case, run, done, monkeypatch):
    whole = Path("out/last.pt").read_bytes()
    for name, content in dict(empty=b"", latin=b"na\xefve " * 99, few=b"few words " * 99).items():
        Path(f"{name}.txt").write_bytes(content)
    foreign = load() | dict(optimizer={}, options=load()["options"] | dict(steps=9))
    other = dict(options=dict(new=1))
    for name, stored in dict(foreign=foreign, other=other, half=None).items():
        Path(name).mkdir()
        torch.save(stored, f"{name}/last.pt")
    Path("half/last.pt").write_bytes(whole[: len(whole) // 2])
    torch.save({"run_invariants": {"args": {"rope.base": 5e5}}}, "theirs.pt")
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr(train.Trainer, "step", None)  # nothing is found as late as that
    arguments, _, culprit = case.strip().partition(" → ")
    with pytest.raises(SystemExit) as stopped:
        run(*start, *arguments.split())
    assert re.fullmatch(f".*{culprit or re.findall('--([a-z_]+)', arguments)[-1]}.*", stopped.value.code)  # one line
    assert Path("out/last.pt").read_bytes() == whole and not list(Path().glob("**/*.part"))
