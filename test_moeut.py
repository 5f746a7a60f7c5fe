"""What is promised: `python -m pytest` checks it in two minutes, on a CPU.

The tests are invariants, such as that no token sees the ones after it, and parity with a plain reference for the output
and every gradient. From top to bottom: the equations of the paper; sharing, caches, regulariser, generation; experts and
routing; the kernels; text, training and resuming; what is said about bad input. No time is measured.
"""

import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

if __name__ == "__main__":  # the report on the kernels, below: Triton compiles them
    os.environ["TRITON_INTERPRET"] = "0"
elif not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # lets the kernels run on a CPU; Triton must not be imported yet

import cvmm
import moeut
import sample
import train
from moeut import MoEUT, MoEUTConfig, Router, negative_entropy, preset, rotary_table, rotate

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CPU = torch.device("cpu")
needs_triton = pytest.mark.skipif(cvmm.triton is None, reason="triton is not installed")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def close(a, b, tol=1e-5):
    """All tensors of a and b are alike, up to tol relative to the largest entry. TF32 keeps 10 bits."""
    for s, t in zip(a, b, strict=True):
        atol = max(tol, 5e-3 if t.is_cuda else 0) * max(1, t.abs().max().item() if t.numel() else 0)
        torch.testing.assert_close(s, t, rtol=0, atol=atol)


def grads_of(loss, model):
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def tokens(*shape):
    return torch.randint(33, shape)


def tiny(**changes) -> MoEUTConfig:
    """With more than 4 experts per head, which are sorted; with fewer a CPU multiplies by all of them."""
    sizes = dict(vocab_size=33, block_size=16, n_layer=4, group_size=2, n_embd=20, n_head=3, head_size=10, n_expert=6,
                 expert_size=7, top_k=2, n_att_expert=5, att_top_k=2, ffn_size=24)
    return MoEUTConfig(**{**sizes, **changes})


def make(config) -> MoEUT:
    """A model in float64. At its initialisation it does little: larger weights make errors visible."""
    model = MoEUT(config).double()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "layers" in name:
                p.mul_(2).add_(0.1 * torch.randn_like(p))
    return model


FAMILY = {
    "MoEUT": dict(),
    "MoEUT all experts": dict(n_att_expert=4),
    "MoEUT one expert per head": dict(n_att_expert=1, att_top_k=1),
    "MoEUT pre": dict(layernorm="pre"),
    "MoEUT post": dict(layernorm="post"),
    "Transformer": dict(ffn="dense", attention="dense", layernorm="pre", group_size=4),
    "Transformer post": dict(ffn="dense", attention="dense", layernorm="post", group_size=4),
    "Universal Transformer": dict(ffn="dense", attention="dense", layernorm="pre", group_size=1),
    "sigma-MoE": dict(attention="dense", group_size=4),
    "SwitchHead": dict(ffn="dense", layernorm="pre", group_size=4),
}
family = pytest.mark.parametrize("changes", FAMILY.values(), ids=FAMILY)

# ---------------------------------------------------------------------------------------------------------------------
# The equations of the paper


def equations(model, idx):
    """Logits as the equations of the paper read: all experts for every token, most of them with gate 0."""
    c, p = model.config, dict(model.named_parameters())
    T, r, H = idx.shape[1], c.head_size // 4 * 2, c.n_head
    phase = torch.arange(T)[:, None] * 10000.0 ** -(torch.arange(0, r, 2) / r)
    spin = torch.polar(torch.ones_like(phase), phase).to(torch.complex128)               # [T, r/2]
    norm = lambda name, x: F.layer_norm(x, x.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"])

    def rope(x):  # pairs (i, i + r/2) are complex numbers, which turn with their position
        z = torch.complex(x[..., : r // 2], x[..., r // 2 : r]) * spin
        return torch.cat((z.real, z.imag, x[..., r:]), -1)

    def gates(logits, k):
        return torch.where(logits >= logits.topk(k).values[..., -1:], logits.sigmoid(), 0)

    def attention(a, x, n):
        w_qk = p[f"{a}.w_qk"].view(2, H, -1, c.n_embd)
        q, k = (rope(t) for t in torch.einsum("btc,shdc->sbhtd", n, w_qk))
        weight = (q @ k.mT / math.sqrt(c.head_size)).masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf).softmax(-1)
        if c.attention == "dense" or c.n_att_expert == 1:
            v = torch.einsum("btc,hdc->bhtd", x, p[f"{a}.w_v"].view(H, -1, c.n_embd))
            s = (n @ p[f"{a}.w_gate"].T).sigmoid() if c.attention == "moe" else torch.ones(*x.shape[:2], H).double()
            return torch.einsum("bhtd,chd,bth->btc", weight @ v, p[f"{a}.w_o"].view(c.n_embd, H, -1), s)
        logits = (n @ p[f"{a}.router.w"].T).view(*n.shape[:2], 2, H, c.n_att_expert)
        s_v, s_o = gates(logits, c.att_top_k).unbind(2)                                  # [B, T, H, A] both
        w_v, w_o = (p[f"{a}.{w}"].unflatten(0, (H, -1)) for w in ("w_v", "w_o"))
        v = torch.einsum("btc,hacd,btha->bhtd", x, w_v, s_v)
        return torch.einsum("bhtd,hadc,btha->btc", weight @ v, w_o, s_o)

    def ffn(a, x, n):
        if c.ffn == "dense":
            return (x @ p[f"{a}.w_up"].T + p[f"{a}.b_up"]).relu() @ p[f"{a}.w_down"].T + p[f"{a}.b_down"]
        h = torch.einsum("btc,ecf->btef", x, p[f"{a}.w_up"]).relu()
        return torch.einsum("btef,efc,bte->btc", h, p[f"{a}.w_down"], gates(n @ p[f"{a}.router.w"].T, c.top_k))

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


@family
def test_equations(changes):
    model, idx, targets = make(tiny(**changes)).eval(), tokens(2, 16), tokens(2, 16)
    out, expected = model(idx, targets), equations(model, idx)
    expected_loss = -expected.log_softmax(-1).gather(-1, targets[..., None]).mean()
    close([out.logits, out.loss.double()], [expected, expected_loss])
    close(grads_of(out.loss, model).values(), grads_of(expected_loss, model).values(), 1e-4)


# The authors' MoEUTLM (github.com/RobertCsordas/moeut) computed these numbers in Triton's interpreter: cross entropy,
# regulariser, four logits, and the norm of the gradient of each of our parameters, those of theirs concatenated.
AUTHORS = {
    3: (2.4706552, -0.03227231, [0.64901990, 1.0673082, 0.20331927, -0.31022143], [
        0.2425077, 0.02224463, 0.02644074, 0.002852489, 0.006021805, 0.01282022, 0.1496328, 0.1695006, 0.02206358, 0.1376349,
        0.1590916, 0.007893876, 0.02272188, 0.02241703, 0.005264617, 0.007971506, 0.01907675, 0.143485, 0.159515, 0.0236351,
        0.1159747, 0.1313104, 0.01706116, 0.1623198, 0.1804152, 0.2639709, 0.1517604]),
    1: (2.4142780, -0.02836609, [0.83954203, 0.60150629, 0.10548152, -0.48748204], [
        0.2843713, 0.02472114, 0.02546491, 0.007848259, 0.004541201, 0.01918815, 0.1515506, 0.1909844, 0.02114806, 0.1423184,
        0.1080363, 0.00976552, 0.02445412, 0.02408792, 0.008611618, 0.008556731, 0.01880463, 0.1412268, 0.1591246, 0.02021918,
        0.1201248, 0.08589436, 0.01374136, 0.2091947, 0.1307961, 0.2453715, 0.1165443]),
}


def authors_weights(A, training_code=False):
    """A state dict with the names and shapes of the authors, and numbers that anybody can make."""
    C, HD, E, V = 12, 16, 5, 11
    layer = {"attention.sel_o": (2 * A, C), "attention.q.weight": (HD, C), "attention.k.weight": (HD, C),
             "ffn.keys": (E, C, 6), "ffn.values": (E, 6, C), "ffn.expert_sel": (E, C),
             "ln1.weight": (C,), "ln1.bias": (C,), "ln2.weight": (C,), "ln2.bias": (C,)}
    layer |= {"attention.v": (2 * A, C, 8), "attention.o": (2 * A, 8, C), "attention.sel_v": (2 * A, C)} if A > 1 else {
        "attention.v": (HD, C), "attention.o": (C, HD)}
    shapes = {f"transformer.layers.{g}.{name}": shape for g in range(2) for name, shape in layer.items()}
    shapes |= {"embedding.weight": (V, C), "out_norm.weight": (C,), "out_norm.bias": (C,), "lm_head.weight": (V, C),
               "lm_head.bias": (V,)}
    wave = lambda name, shape: 0.4 * torch.sin(1.7 * torch.arange(math.prod(shape)).double() ** 1.3 + len(name))
    weights = {name: wave(name, shape).float().view(shape) for name, shape in shapes.items()}
    if not training_code:
        return weights
    renamed = {"transformer.layers.": "unique_layers.", "attention.sel_": "self_attn.selections.", "lm_head": "output",
               "ln1": "self_attn.norm", "ln2": "pkm.norm", ".attention.": ".self_attn.projections.", "ffn.": "pkm.",
               "projections.q.weight": "projections.q", "projections.k.weight": "projections.k"}
    result = {"unique_layers.0.pkm.iter": torch.tensor(7), "unique_layers.1.pkm.kv_sel_counts_100": torch.zeros(6, 7)}
    for name, weight in weights.items():
        for ours, theirs in renamed.items():
            name = name.replace(ours, theirs)
        result[name] = weight
    return result


def authors_config(A):
    return MoEUTConfig(vocab_size=11, block_size=32, n_layer=4, group_size=2, n_embd=12, n_head=2, head_size=8, n_expert=5,
                       expert_size=6, top_k=2, n_att_expert=A, att_top_k=min(A, 2))


@pytest.mark.parametrize("A, training_code", [(3, False), (1, False), (3, True)])
def test_numbers_of_the_authors(A, training_code):
    model = moeut.from_authors(authors_weights(A, training_code), authors_config(A))
    idx, targets = (torch.arange(14) * 7 % 11).view(2, 7), (torch.arange(14) * 5 % 11).view(2, 7)
    out = model(idx, targets)
    cross_entropy, reg, logits, norms = AUTHORS[A]
    assert out.cross_entropy.item() == pytest.approx(cross_entropy, abs=1e-5) and out.reg.item() == pytest.approx(reg, abs=1e-6)
    close([out.logits[1, 6, :4]], [torch.tensor(logits)])
    assert [g.norm().item() for g in grads_of(out.loss, model).values()] == pytest.approx(norms, rel=1e-4)


@pytest.mark.parametrize("change, named", [
    (lambda s: s.pop("transformer.layers.1.ffn.keys"), "ffn.w_up"),
    (lambda s: s.pop("transformer.layers.1.attention.q.weight"), "attention.q"),
    (lambda s: s.update(extra=torch.zeros(1)), "extra"),
    (lambda s: s.update({"transformer.layers.0.ffn.keys": torch.zeros(5, 12, 8)}), "w_up"),
], ids=["missing", "missing half", "extra", "wrong size"])
def test_authors_weights_that_do_not_fit(change, named):
    weights = authors_weights(3)
    change(weights)
    with pytest.raises(ValueError, match=named):
        moeut.from_authors(weights, authors_config(3))


@pytest.mark.parametrize("name, count", {
    "moeut-44M": 44_345_792, "moeut-126M": 125_669_696, "moeut-244M": 243_326_784, "moeut-318M": 318_107_456,
    "moeut-727M": 727_424_320, "moeut-1B": 1_040_319_296, "dense-44M": 44_544_264, "dense-126M": 125_654_336,
    "dense-244M": 243_568_700, "dense-318M": 319_293_584, "dense-727M": 728_694_080, "dense-1B": 1_044_300_608,
}.items())
def test_parameter_counts_of_the_paper(name, count):
    assert count_parameters(preset(name)) == count


def count_parameters(config):
    with torch.device("meta"):  # sizes without memory
        return sum(p.numel() for p in MoEUT(config).parameters())


@pytest.mark.parametrize("name", ["dense-tiny", "universal-tiny", "sigma-moe-tiny", "switchhead-tiny", "dense-small"])
def test_presets_have_equally_many_parameters(name):
    layers = lambda name: count_parameters(preset(name, vocab_size=257))
    assert layers(name) == pytest.approx(layers(name.split("-")[-1]), rel=0.005)


def test_macs_of_the_paper():
    """The appendix: MoEUT needs 0.88 of the dense model's multiplications at 44M and 0.60 at 244M."""
    ratio = lambda size: preset(f"moeut-{size}").macs_per_token() / preset(f"dense-{size}").macs_per_token()
    assert ratio("44M") == pytest.approx(0.88, abs=0.01) and ratio("244M") == pytest.approx(0.60, abs=0.01)


@family
def test_macs_are_those_that_torch_counts(changes):
    """2 operations per multiply-accumulate, and twice as many backward."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    formulas = {torch.ops.moeut.cvmm: lambda x, w, gate, slot, *_, **__: 2 * slot[0] * w[1] * w[2],
                torch.ops.moeut.cvmm_backward: lambda d, x, w, gate, slot, *_, **__: 4 * slot[0] * w[1] * w[2]}
    c = tiny(**changes)
    if c.attention == "moe" and c.n_att_expert == 4:
        c = replace(c, att_top_k=4)  # all are multiplied
    model, idx = MoEUT(c), tokens(2, 16)
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter, sdpa_kernel(SDPBackend.MATH):
        loss = model(idx, idx).cross_entropy
    forward = counter.get_total_flops()
    assert forward == 2 * 32 * (c.macs_per_token() + c.n_embd * c.vocab_size)
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        loss.backward()
    assert counter.get_total_flops() == 2 * forward


@pytest.mark.parametrize("moe", [True, False], ids=["moe", "dense"])
def test_initialisation(moe):
    kind = dict() if moe else dict(ffn="dense", attention="dense", layernorm="pre")
    c = MoEUTConfig(n_layer=6, group_size=2, n_embd=256, n_head=4, head_size=32, n_expert=16, expert_size=64, top_k=2,
                    n_att_expert=8, att_top_k=2, ffn_size=384, **kind)
    a = math.sqrt(2 / 6)  # 6 applications, although there are 2 layers
    expected = {
        "embedding.weight": 1 / 16, "head.weight": 1 / 16 / math.sqrt(3), "head.bias": 1 / 16 / math.sqrt(3),
        "attention.w_qk": a / 16, "attention.router.w": a / 16, "attention.w_v": a / 16, "attention.w_o": a / math.sqrt(128),
        "ffn.router.w": a / 16, "ffn.w_up": a / 16, "ffn.b_up": 0, "ffn.b_down": 0,
        "ffn.w_down": a / math.sqrt(16 * 64 if moe else 384),
    }
    for name, p in MoEUT(c).named_parameters():
        short = name.split(".", 2)[2] if name.startswith("layers.") else name
        if short.startswith("ln"):
            assert (p == (1 if name.endswith("weight") else 0)).all(), name
        else:
            assert p.std().item() == pytest.approx(expected[short], rel=0.05 if p.numel() > 1000 else 0.2), name
            assert abs(p.mean().item()) <= 5 * expected[short] / math.sqrt(p.numel()), name


@pytest.mark.parametrize("head_size, rotated", [(82, 40), (41, 20), (128, 64), (10, 4)])
def test_rotary(head_size, rotated):
    """Scores depend on the distance only, and the first `rotated` dimensions do the work."""
    q, k = torch.randn(2, 1, 1, 1, 1, head_size).double().expand(2, 1, 12, 1, 1, head_size)  # one q and k everywhere
    turned = [rotate(t, rotary_table(head_size, at, at + 12, CPU))[0, :, 0, 0] for at in (0, 90) for t in (q, k)]
    score, later = turned[0] @ turned[1].mT, turned[2] @ turned[3].mT
    close([score, score[1:, 1:]], [later, score[:-1, :-1]])
    assert (turned[0][1:] != turned[0][:1]).all(0).tolist() == [True] * rotated + [False] * (head_size - rotated)


def test_all_experts_with_gate_one_are_a_dense_ffn():
    c = tiny(n_expert=6, top_k=6, ffn_size=42)
    moe, dense = moeut.SigmaMoE(c).double(), moeut.DenseFFN(c).double()
    moe.router.w.data.fill_(1)
    moe.w_up.data, moe.w_down.data = dense.w_up.data.unflatten(0, (6, 7)).mT, dense.w_down.data.T.unflatten(0, (6, 7))
    x, surely = torch.randn(2, 16, 20).double(), torch.full((2, 16, 20), 50.0).double()
    close([moe(x, surely)[0]], [dense(x, x)[0]])


@pytest.mark.parametrize("A", [1, 4, 5])
def test_equal_experts_with_gates_of_one_are_dense_attention(A):
    moe = moeut.Layer(tiny(n_att_expert=A, att_top_k=1)).attention.double()
    dense = moeut.DenseAttention(tiny(attention="dense", layernorm="pre", ffn="dense")).double()
    dense.w_qk.data = moe.w_qk.data
    n = torch.cat((torch.full((2, 16, 1), 1000.0), torch.randn(2, 16, 19)), -1).double()
    (moe.w_gate if A == 1 else moe.router.w).data.zero_()[:, 0] = 1
    if A == 1:
        dense.w_v.data, dense.w_o.data = moe.w_v.data, moe.w_o.data
    else:
        moe.w_v.data = dense.w_v.data.unflatten(0, (3, 1, 10)).mT.expand(3, A, 20, 10).flatten(0, 1)
        moe.w_o.data = dense.w_o.data.T.unflatten(0, (3, 1, 10)).expand(3, A, 10, 20).flatten(0, 1)
    x, rotary = torch.randn(2, 16, 20).double(), rotary_table(10, 0, 16, CPU)
    close([moe(x, n, rotary)[0]], [dense(x, n, rotary)[0]])


# ---------------------------------------------------------------------------------------------------------------------
# Sharing, causality, caches, regulariser, compiling, generation


@family
def test_trains(changes):
    """Forward and backward; the loss is cross entropy plus regulariser; every parameter has a gradient."""
    model = MoEUT(tiny(**changes))
    out = model(tokens(4, 16), tokens(4, 16))
    out.loss.backward()
    assert out.loss == out.cross_entropy + out.reg and out.cross_entropy.item() == pytest.approx(math.log(33), rel=0.2)
    assert (out.reg == 0).item() == ("moe" not in (model.config.ffn, model.config.attention))
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_overfits_one_batch():
    model, idx, targets = MoEUT(tiny()), tokens(4, 16), tokens(4, 16)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(120):
        out = model(idx, targets)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
    assert out.cross_entropy.item() < 0.05


@pytest.mark.parametrize("changes", [dict(), dict(group_size=1), dict(n_layer=6), FAMILY["Universal Transformer"]])
def test_weights_are_shared(changes):
    """The gradient of a shared layer is the sum over its applications, each taken as a layer of its own."""
    shared = make(tiny(**changes)).eval()
    G, L = shared.config.group_size, shared.config.n_layer
    unrolled = make(tiny(**{**changes, "group_size": L})).eval()
    unrolled.load_state_dict({k: v for k, v in shared.state_dict().items() if "layers" not in k}, strict=False)
    for i in range(L):
        unrolled.layers[i].load_state_dict(shared.layers[i % G].state_dict())
    idx, targets, total = tokens(2, 16), tokens(2, 16), {}
    close([shared(idx).logits], [unrolled(idx).logits])
    for name, grad in grads_of(unrolled(idx, targets).loss, unrolled).items():
        if name.startswith("layers."):
            _, i, rest = name.split(".", 2)
            name = f"layers.{int(i) % G}.{rest}"
        total[name] = total.get(name, 0) + grad
    ours = grads_of(shared(idx, targets).loss, shared)
    close(ours.values(), [total[name] for name in ours])


def test_depth_costs_no_parameters():
    assert len({count_parameters(tiny(n_layer=L)) for L in (2, 4, 8)}) == 1
    assert count_parameters(tiny(group_size=1)) < count_parameters(tiny()) < count_parameters(tiny(group_size=4))


@family
def test_causal_and_independent(changes):
    """No token sees the ones after it, no sequence another."""
    model, idx = make(tiny(**changes)).eval(), tokens(3, 16)
    changed = idx.clone()
    changed[:, 9] = (idx[:, 9] + 1) % 33
    a, b = model(idx).logits, model(changed).logits
    close([a[:, :9]], [b[:, :9]])
    assert ((a - b)[:, 9:].abs().amax((0, 2)) > 1e-4).all()
    close([a], [torch.cat([model(i[None]).logits for i in idx])])


@pytest.mark.parametrize("chunks", [[40], [1] * 40, [7] + [1] * 33, [1, 20, 1, 13, 5]], ids=str)
@family
def test_cache(changes, chunks):
    """Token by token or chunk by chunk, also far beyond block_size: the logits are those of one forward pass."""
    model, idx = make(tiny(**changes)).eval(), tokens(2, 40)
    cache = model.new_cache(2, 40)
    assert len(cache) == model.config.n_layer
    with torch.no_grad():
        logits = torch.cat([model(part, cache=cache).logits for part in idx.split(chunks, dim=1)], dim=1)
    close([logits], [model(idx).logits])
    with pytest.raises(ValueError, match="40 tokens in a batch of 2, not 41"):
        model(idx[:, :1], cache=cache)
    with pytest.raises(ValueError, match="in one of 2"):
        model(idx, cache=model.new_cache(1, 40))


def router_logits(model, *args):
    """Output of the model, and the logits of every router, [B, T, *choices, E] for each repeat."""
    seen = {}

    def note(router, args, _):
        logits = F.linear(args[0].to(router.w.dtype), router.w).unflatten(-1, router.shape)
        seen.setdefault(router, []).append(logits)

    hooks = [m.register_forward_hook(note) for m in model.modules() if isinstance(m, Router)]
    out = model(*args)
    for hook in hooks:
        hook.remove()
    return out, seen


@pytest.mark.parametrize("changes", [dict(), dict(group_size=1), dict(attention="dense"), FAMILY["SwitchHead"]])
def test_regulariser(changes):
    """Per sequence, over all repeats and time steps together; gradients too."""
    model = make(tiny(ffn_reg=0.7, att_reg=0.3, **changes)).train()
    out, seen = router_logits(model, tokens(3, 16))
    expected = 0
    for router, logits in seen.items():
        assert len(logits) == model.config.n_layer // model.config.group_size
        p = torch.cat(logits, dim=1).softmax(-1).mean(1)                                 # [B, *choices, E]
        entropy = (p * p.log()).sum(-1).mean(0)                                          # [*choices]
        expected += 0.7 * entropy if entropy.dim() == 0 else 0.3 * entropy.mean(1).sum()
    weights = [router.w for router in seen]
    ours = torch.autograd.grad(out.reg, weights, retain_graph=True)
    assert all(grad.any() for grad in ours)
    close([out.reg, *ours], [expected, *torch.autograd.grad(expected, weights)])
    assert model.eval()(tokens(3, 16)).reg.item() == 0


def test_entropy_extremes():
    p = torch.stack((torch.full((8,), 1 / 8), torch.eye(8)[3]))
    close([negative_entropy(p)], [torch.tensor([-math.log(8), 0])])


def test_routing_is_in_float32_under_autocast_and_in_float64_in_such_a_model():
    """The cut is between numbers that bfloat16 cannot tell apart."""
    router, n = Router(tiny(), 6, 1), torch.ones(1, 1, 20)
    router.w.data = torch.full((6, 20), 1.0)
    router.w.data[4, 7] += 1e-3
    with torch.autocast("cpu", torch.bfloat16):
        gate, expert, usage = router(n.bfloat16())
    assert expert.item() == 4 and gate.dtype == usage.dtype == torch.float32
    router.double().w.data[2] = router.w.data[4]
    router.w.data[2, 3] += 1e-9
    assert router(n.double())[1].item() == 2


def test_expert_dropout():
    """A dropped expert is not chosen in training, gates and usage stay what they are; in evaluation all can be chosen."""
    router, n = Router(tiny(expert_dropout=0.5), 6, 2), torch.randn(1, 4000, 20)
    gate, expert, usage = router(n)
    favourite = router.eval()(n)[1]
    assert 0.4 < (expert[..., None] == favourite[..., None, :]).any(-1).float().mean() < 0.7  # each is left with 1/2
    logits = F.linear(n, router.w)
    close([gate, usage], [logits.sigmoid().gather(-1, expert), logits.softmax(-1).mean(1)])


def loss_and_grads(model, idx, targets):
    torch.manual_seed(0)  # of dropout
    out = model(idx, targets)
    return out.cross_entropy.detach(), out.reg.detach(), *grads_of(out.loss, model).values()


def test_recompute():
    """Activation checkpointing runs every layer twice, with the same dropout, and changes no number."""
    model, idx, targets = make(tiny(dropout=0.3, expert_dropout=0.3)).train(), tokens(2, 16), tokens(2, 16)
    calls = []
    model.layers[0].register_forward_pre_hook(lambda *_: calls.append(1))
    kept = loss_and_grads(model, idx, targets)
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
@pytest.mark.parametrize("name", ["MoEUT", "MoEUT all experts", "Transformer"])
@pytest.mark.parametrize("compiler", ["aot_eager", inductor])
def test_compile(compiler, name, training):
    """One graph, whatever the experts chosen; for two batches, without a second compilation."""
    torch.compiler.reset()
    model = MoEUT(tiny(**FAMILY[name])).train(training)
    compiled = torch.compile(model, fullgraph=True, backend=compiler)
    for i in range(2):
        idx, targets = tokens(4, 16), tokens(4, 16)
        with torch.compiler.set_stance("fail_on_recompile" if i else "default"):
            out = compiled(idx, targets)
        ours = out.cross_entropy.detach(), out.reg.detach(), *grads_of(out.loss, model).values()
        close(ours, loss_and_grads(model, idx, targets))


def compiled_graphs(model, loss):
    """The forward and the backward graph of a training step in bfloat16, and what the first saves for the second."""
    from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
    from torch._dynamo.backends.common import aot_autograd

    graphs = []
    keep = lambda graph, _: graphs.append(graph.graph) or make_boxed_func(graph.forward)
    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep, partition_fn=min_cut_rematerialization_partition)
    torch.compiler.reset()
    run = torch.compile(model, fullgraph=True, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(run)
    value.backward()
    saved = [node.meta["val"] for node in list(graphs[0].nodes)[-1].args[0] if node is not None]
    return graphs, [t for t in saved if isinstance(t, torch.Tensor)][len(torch.utils._pytree.tree_leaves(value)) :]


def test_compiling_casts_each_weight_once():
    """Not once per repeat: four of each layer here."""
    model, idx = MoEUT(tiny(n_layer=8)), tokens(2, 16)
    graphs, _ = compiled_graphs(model, lambda run: run(idx, idx).loss)
    shapes = [tuple(p.shape) for p in model.parameters() if p.dim() == 3]
    nodes = [node for graph in graphs for node in graph.nodes if node.op == "call_function"]
    casts = [tuple(node.meta["val"].shape) for node in nodes if "_to_copy" in str(node.target)]
    assert sorted(s for s in casts if s in shapes) == sorted(shapes) and len(shapes) == 8


class FeedForward(torch.nn.Module):
    """The experts of the 244M model without their router."""

    def __init__(self, C=1024, E=20, hidden=128):
        super().__init__()
        self.w_up, self.w_down = (torch.nn.Parameter(torch.randn(s)) for s in ((E, C, hidden), (E, hidden, C)))

    def forward(self, x, gate, expert):
        return cvmm.feedforward(x, self.w_up, self.w_down, gate, expert)


def test_bytes_saved_for_backward():
    """Of the feedforward of the 244M model, for a token and an application, weights not counted: at most 6.5 KB, compiled
    and not."""
    N, model = 64, FeedForward()
    gate, expert = torch.rand(N, 20).topk(16)
    x, gate = torch.randn(N, 1024).bfloat16().requires_grad_(), gate.requires_grad_()
    _, saved = compiled_graphs(model, lambda run: run(x, gate, expert).sum())
    eager = {}
    with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(
            lambda t: eager.setdefault((t.data_ptr(), t.shape), t), lambda t: t):
        model(x, gate, expert)
    for tensors in (saved, eager.values()):
        assert 6000 < sum(t.nbytes for t in tensors if t.dim() < 3 and len(t) != 21) / N <= 6500


def test_ignored_targets():
    model, idx, targets = make(tiny()).eval(), tokens(2, 16), tokens(2, 16)
    targets[:, 9:] = -1
    close([model(idx, targets).loss], [model(idx[:, :9], targets[:, :9]).loss])


@pytest.mark.parametrize("idx, targets", [
    (tokens(16), None), (tokens(2, 0), None), (tokens(0, 4), None), (tokens(2, 8), tokens(8, 2)), (tokens(2, 8), tokens(16))])
def test_shapes_that_do_not_fit(idx, targets):
    model = MoEUT(tiny())
    with pytest.raises(ValueError, match="shape"):
        model(idx, targets)
    if targets is None:
        with pytest.raises(ValueError, match="shape"):
            model.generate(idx, 1)


@pytest.mark.parametrize("changes", [
    *({f.name: bad} for f in fields(MoEUTConfig) if f.type is int for bad in (0, 2.0)), dict(n_layer=5), dict(group_size=5),
    dict(top_k=17), dict(att_top_k=6), dict(ffn="sparse"), dict(attention="linear"), dict(layernorm="none"),
    dict(dropout=1.0), dict(dropout=-0.1), dict(expert_dropout=1.0), dict(ffn_reg=math.nan), dict(att_reg=math.inf),
    dict(head_size=3), dict(ffn="dense"), dict(ffn_reg="much"), dict(n_head=True)], ids=str)
def test_invalid_config(changes):
    with pytest.raises(ValueError, match="layernorm" if changes == dict(ffn="dense") else "n_layer" if changes in (
            dict(n_layer=5), dict(group_size=5)) else next(iter(changes))):
        tiny(**changes)


def test_unknown_preset():
    with pytest.raises(ValueError, match="'huge'"):
        preset("huge")


def greedy(model, idx, n):
    """Without a cache. A full context is cut to its newest half."""
    window, context, new = model.config.block_size, idx[:, -model.config.block_size :], []
    for _ in range(n):
        if context.shape[1] > window:
            context = context[:, -(window // 2) :]
        new.append(model(context).logits[:, -1].argmax(-1))
        context = torch.cat((context, new[-1][:, None]), dim=1)
    return torch.stack(new, dim=1)


def generate(model, idx, n, **options):
    return torch.stack(list(model.generate(idx, n, **options)), dim=1)


@pytest.mark.parametrize("length, n", [(1, 15), (16, 1), (3, 45), (30, 20)])
def test_generate_greedy(length, n):
    """Temperature 0 and top_k 1 take the most likely token, also beyond block_size = 16."""
    model, idx = make(tiny()).eval(), tokens(3, length)
    new = generate(model, idx, n, temperature=0)
    assert new.shape == (3, n) and torch.equal(new, greedy(model, idx, n))
    assert len(new.unique()) > 2 or n == 1  # a model that repeats itself would prove little
    assert torch.equal(new, generate(model, idx, n, top_k=1)) and torch.equal(new, generate(model, idx, n, top_p=1e-6))
    assert torch.equal(new, torch.cat([generate(model, row[None], n, temperature=0) for row in idx]))


def test_generate_is_seeded():
    model, idx = make(tiny()).eval(), tokens(2, 5)
    a, b, c = (generate(model, idx, 20, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)


@pytest.mark.parametrize("bad", [
    dict(temperature=-1), dict(temperature=math.nan), dict(top_k=0), dict(top_p=0.0), dict(top_p=1.5)], ids=str)
def test_generate_refuses_at_once(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        MoEUT(tiny()).generate(tokens(1, 4), 1, **bad)


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


# ---------------------------------------------------------------------------------------------------------------------
# Experts and routing: cvmm against its definition


def output_and_grads(f, inputs, like=torch.float32):
    """f(*inputs) and the gradients of all inputs, for a random gradient that is the same in every call."""
    inputs = [t.detach().requires_grad_() for t in inputs]
    out = f(*inputs)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return [t.to(like) for t in (out.detach(), *torch.autograd.grad(out, inputs, dout))]


CHOICES = {
    "random": lambda m, n_expert: torch.randint(n_expert, (m,)),
    "skewed": lambda m, n_expert: (n_expert * torch.rand(m) ** 4).long(),
    "gaps": lambda m, n_expert: torch.randint(n_expert // 3, (m,)) * 3 + 1,  # the first and the last are empty
    "one": lambda m, n_expert: torch.full((m,), n_expert - 2),
}
FANS = {"up": (3, None), "down": (None, 3), "values": (6, 2), "outputs": (2, 6), "rows": (None, None), "slots": (1, 1)}
PATHS = ["PyTorch", pytest.param("Triton", marks=needs_triton)]


def case(fans=(3, None), choice="random", n_token=11, n_in=19, n_out=23, n_expert=7, gated=True):
    """cvmm and its definition as functions of x, w and gate; and these."""
    fan_in, fan_out = fans
    m = n_token * max(fan_in or 1, fan_out or 1)
    expert = CHOICES[choice](m, n_expert).to(DEVICE)
    x, w = torch.randn(m // (fan_in or 1), n_in), torch.randn(n_expert, n_in, n_out) / n_in**0.5
    inputs = [t.to(DEVICE) for t in (x, w, torch.rand(m))[: 2 + gated]]

    def ours(x, w, gate=None):
        return cvmm.cvmm(x, w, cvmm.route(expert, n_expert), fan_in, fan_out, gate)

    def definition(x, w, gate=None):
        order = expert.argsort(stable=True)  # rows in the order of experts
        x = x if fan_in else x[order.argsort()]
        out = cvmm.definition(x, w, expert, fan_in or 1, fan_out or 1, gate)
        return out if fan_out else out[order]

    return ours, definition, inputs


def test_definition():
    x, w, expert, gate = torch.randn(6, 5), torch.randn(4, 5, 7), torch.randint(4, (12,)), torch.rand(12)
    slots = torch.einsum("si,sio,s->so", x.repeat_interleave(2, 0), w[expert], gate)
    close([cvmm.definition(x, w, expert, 2, 3, gate)], [slots.view(4, 3, 7).sum(1)])


@pytest.mark.parametrize("gated", [True, False], ids=["gate", "no gate"])
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("fans", FANS.values(), ids=FANS)
@pytest.mark.parametrize("path", PATHS)
def test_cvmm(path, fans, choice, gated, monkeypatch):
    monkeypatch.setattr(cvmm, "force", path)
    ours, definition, inputs = case(fans, choice, gated=gated)
    close(output_and_grads(ours, inputs), output_and_grads(definition, inputs))


SIZES = [dict(n_token=1), dict(n_in=1, n_out=1, n_expert=1), dict(n_token=150, n_in=48, n_out=16, n_expert=40),
         dict(n_token=60, n_in=150, n_out=64, n_expert=3), dict(n_token=70, n_in=16, n_out=150, n_expert=2)]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("fans", [(3, None), (None, 3), (2, 6)], ids=str)
@pytest.mark.parametrize("path", PATHS)
def test_cvmm_sizes(path, fans, sizes, monkeypatch):
    """A single token, a single expert, several tiles of rows, several blocks of inputs and of outputs."""
    monkeypatch.setattr(cvmm, "force", path)
    ours, definition, inputs = case(fans, **sizes)
    close(output_and_grads(ours, inputs), output_and_grads(definition, inputs))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("n_in, n_out", [(16, 32), (19, 23)], ids=["aligned", "odd"])
def test_cvmm_of_views(path, n_in, n_out, monkeypatch):
    """The numbers of a row need not be side by side, in x, in w, or in the gradient of the output."""
    monkeypatch.setattr(cvmm, "force", path)
    ours, definition, (x, w, gate) = case((3, None), n_in=n_in, n_out=n_out)
    want = output_and_grads(lambda *a: definition(*a).T, (x, w, gate))
    for view in (lambda t: t.mT.contiguous().mT, lambda t: F.pad(t, (3, 2))[..., 3:-2]):
        close(output_and_grads(lambda *a: ours(*a).T, (view(x), view(w), gate)), want)


@pytest.mark.parametrize("fans", FANS.values(), ids=FANS)
def test_gradcheck(fans):
    """Finite differences in float64: the one reference that shares nothing with autograd."""
    ours, _, inputs = case(fans, n_token=2, n_in=3, n_out=4, n_expert=3)
    assert torch.autograd.gradcheck(ours, [t.cpu().double().requires_grad_() for t in inputs])


@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 2e-3), (torch.bfloat16, 1.6e-2)], ids=str)
@pytest.mark.parametrize("fans", FANS.values(), ids=FANS)
@pytest.mark.parametrize("path", PATHS)
def test_half_precision(path, fans, dtype, tolerance, monkeypatch):
    """Under autocast: the output in that precision, the gradients of weights and gates in float32, which are not those of
    float32; and the same with a model of that precision."""
    monkeypatch.setattr(cvmm, "force", path)
    ours, definition, (x, w, gate) = case(fans)
    want = output_and_grads(definition, (x.to(dtype).float(), w.to(dtype).float(), gate))
    with torch.autocast(DEVICE, dtype):
        assert ours(x, w, gate).dtype == dtype
        got = output_and_grads(ours, (x, w, gate), like=None or torch.float32)
    close(got, want, tolerance)
    close(output_and_grads(ours, (x.to(dtype), w.to(dtype), gate)), want, tolerance)
    assert any((a - b).abs().max() > 1e-6 for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("path", PATHS)
def test_repeats_add_up_in_float32(path, monkeypatch):
    """63 equal gradients sum to 63 times one. In bfloat16 they would not: 8 bits cannot count that far."""
    monkeypatch.setattr(cvmm, "force", path)
    ours, _, (x, w, gate) = case((2, None), n_token=8, n_in=5, n_out=4, n_expert=1, choice="random")
    with torch.autocast(DEVICE, torch.bfloat16):
        one = output_and_grads(lambda *a: ours(*a).float(), (x, w, gate))
        many = output_and_grads(lambda *a: torch.stack([ours(*a) for _ in range(63)]).sum(0, dtype=torch.float32), (x, w, gate))
    torch.testing.assert_close(many[2], 63 * one[2], rtol=1e-4, atol=0)


@pytest.mark.parametrize("path", PATHS)
def test_two_runs_are_equal_bit_for_bit(path, monkeypatch):
    monkeypatch.setattr(cvmm, "force", path)
    ours, _, inputs = case((2, 6), "skewed", n_token=40)
    assert all(map(torch.equal, output_and_grads(ours, inputs), output_and_grads(ours, inputs)))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.filterwarnings("ignore:invalid value")  # Triton's interpreter computes with numpy
def test_bad_numbers_stay_with_their_token_and_expert(path, bad, monkeypatch):
    monkeypatch.setattr(cvmm, "force", path)
    x, w_up, w_down, gate = torch.randn(200, 19), torch.rand(7, 19, 13), torch.randn(7, 13, 19), torch.rand(200, 1)
    expert = torch.randint(7, (200, 1))
    x[0], expert[0] = bad, 5
    inputs = [t.to(DEVICE) for t in (x, w_up, w_down, gate)]
    out, dx, *dws, _ = output_and_grads(lambda *a: cvmm.feedforward(*a, expert.to(DEVICE)), inputs)
    assert not out[0].isfinite().any() and out[1:].isfinite().all() and dx[1:].isfinite().all()
    for dw in dws:
        assert not dw[5].isfinite().any() and dw[[0, 1, 2, 3, 4, 6]].isfinite().all()


@pytest.mark.parametrize("fans", FANS.values(), ids=FANS)
def test_few_slots_of_decoding(fans, monkeypatch):
    """Without gradients, a handful of slots are not sorted: the same numbers, all in the order of slots."""
    expert = torch.randint(5, (12,))
    x, w, gate = torch.randn(12 // (fans[0] or 1), 6), torch.randn(5, 6, 4), torch.rand(12)
    with torch.no_grad():
        r = cvmm.route(expert, 5)
        few = cvmm.cvmm(x, w, r, *fans, gate)
    assert r.slot is None and cvmm.route(expert, 5).slot is not None
    close([few], [cvmm.definition(x, w, expert, fans[0] or 1, fans[1] or 1, gate)])


@pytest.mark.parametrize("path", PATHS)
def test_no_slots(path, monkeypatch):
    monkeypatch.setattr(cvmm, "force", path)
    x, w, r = torch.empty(0, 4, device=DEVICE), torch.randn(5, 4, 3, device=DEVICE), cvmm.route(torch.empty(0, dtype=torch.long, device=DEVICE), 5)
    out, dx, dw = output_and_grads(lambda x, w: cvmm.cvmm(x, w, r, 2), (x, w))
    assert out.shape == (0, 3) and dx.shape == (0, 4) and dw.shape == w.shape and not dw.any()


def test_sizes_that_do_not_fit():
    x, w, gate, expert = torch.randn(6, 4), torch.randn(5, 4, 3), torch.rand(18), torch.randint(5, (18,))
    r = cvmm.route(expert, 5)
    for args in ((x, w, r), (x[:-1], w, r, 3), (x[:, :-1], w, r, 3), (x, w, r, 4), (x, w, r, 3, 4), (x, w[1:], r, 3),
                 (x, w, r, 3, None, gate[1:]), (x, w, r, 3, None, gate.to("meta")), (x, w.to("meta"), r, 3)):
        with pytest.raises(ValueError, match="do not fit"):
            cvmm.cvmm(*args)


@pytest.mark.parametrize("n_slot", [5, 50])
def test_experts_that_do_not_exist(n_slot):
    """65536 would be 0 in 16 bits, and -1 the last one in Python."""
    with pytest.raises(TypeError, match="integers"):
        cvmm.route(torch.zeros(n_slot), 7)
    with pytest.raises(ValueError, match="n_expert"):
        cvmm.route(torch.zeros(n_slot).long(), 2**15)
    for bad in (-1, 7, 2**16, 2**40):
        expert = torch.zeros(n_slot, dtype=torch.long)
        expert[3] = bad
        with torch.no_grad(), pytest.raises(ValueError, match="not one of the 7"):
            cvmm.cvmm(torch.randn(n_slot, 4), torch.randn(7, 4, 3), cvmm.route(expert, 7), 1)


@pytest.mark.parametrize("gated", [True, False], ids=["gate", "no gate"])
@pytest.mark.parametrize("path", PATHS)
def test_custom_ops(path, gated, monkeypatch):
    """Schema, shape function and values, without which torch.compile breaks."""
    monkeypatch.setattr(cvmm, "force", path)
    _, _, (x, w, *gate) = case((2, 6), gated=gated)
    slots = len(x) * 2
    _, *r = cvmm.route(torch.randint(7, (slots,), device=DEVICE), 7)
    gate = gate[0] if gated else None
    for weight in (w, w.mT.contiguous().mT):
        torch.library.opcheck(torch.ops.moeut.cvmm.default, (x, weight, gate, *r, 2, 6))
        dout = torch.randn(slots // 6, 23, device=DEVICE)
        torch.library.opcheck(torch.ops.moeut.cvmm_backward.default, (dout, x, weight, gate, *r, 2, 6))


# ---------------------------------------------------------------------------------------------------------------------
# The Triton kernels: on a GPU, or in Triton's interpreter, which runs the same code on CPU tensors


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_model_trains_through_the_kernels(dtype, monkeypatch):
    """A few steps of a whole model, kernels against PyTorch: the same losses."""

    def losses(path):
        monkeypatch.setattr(cvmm, "force", path)
        torch.manual_seed(0)
        model = MoEUT(tiny(n_layer=2, group_size=1, n_head=2)).to(DEVICE)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        idx = tokens(2, 17).to(DEVICE)
        for _ in range(3):
            with torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32):
                loss = model(idx[:, :-1], idx[:, 1:]).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            yield loss.item()

    ours, theirs = list(losses("Triton")), list(losses("PyTorch"))
    assert ours == pytest.approx(theirs, rel=1e-5 if dtype == torch.float32 else 1e-2) and ours[2] < ours[0] - 0.1


@needs_triton
@pytest.mark.parametrize("choice", CHOICES)
def test_tiles_cover_every_row_once(choice, monkeypatch):
    monkeypatch.setattr(cvmm, "force", "Triton")
    r = cvmm.route(CHOICES[choice](500, 9), 9)
    bm, seen = cvmm.block_rows(500, 9), []
    for e, first in r.tiles[r.tiles[:, 0] >= 0].tolist():
        assert r.offsets[e] <= first < r.offsets[e + 1]  # no tile spans two experts
        seen += range(first, min(first + bm, int(r.offsets[e + 1])))
    assert seen == list(range(500)) and len(r.tiles) == math.ceil(500 / bm) + 9


@needs_triton
def test_offsets_beyond_32_bits(monkeypatch):
    """Rows and experts 2^30 numbers apart: the third begins where 32-bit integers end."""
    monkeypatch.setattr(cvmm, "force", "Triton")
    rows, far = (torch.empty(2**31 + 2**12, dtype=torch.float16, device=DEVICE) for _ in range(2))  # a few pages are touched
    x, w = rows.as_strided((3, 16), (2**30, 1)), far.as_strided((3, 16, 32), (2**30, 32, 1))
    x.copy_(torch.randn(3, 16))
    w.copy_(torch.randn(3, 16, 32) / 4)
    expert = torch.tensor([0, 1, 2, 2, 2, 0], device=DEVICE)
    inputs, near = [x.detach().requires_grad_(), w.detach().requires_grad_()], [x.float(), w.float()]
    y = cvmm.cvmm(*inputs, cvmm.route(expert, 3), 2, 1)
    dout = torch.randn(6, 32, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    ours = [t.float() for t in (y, *torch.autograd.grad(y, inputs, dout.half()))]
    close(ours, output_and_grads(lambda x, w: cvmm.definition(x, w, expert, 2), near), 2e-3)


@needs_triton
def test_number_formats(monkeypatch):
    """float64 is refused; float32 follows torch's switch for TF32."""
    monkeypatch.setattr(cvmm, "force", "Triton")
    ours, _, inputs = case()
    with pytest.raises(TypeError, match="float64"):
        ours(*(t.double() for t in inputs))
    monkeypatch.setattr(cvmm, "INTERPRETED", False)
    before = torch.get_float32_matmul_precision()
    for precision, expected in (("highest", "ieee"), ("high", "tf32")):
        torch.set_float32_matmul_precision(precision)
        assert cvmm.schedule(torch.empty(1))["PRECISION"] == expected
    torch.set_float32_matmul_precision(before)


def launches(C, F_, E, K, H, D, A, n, dtype):
    """(what for, kernel, arguments) of all launches of a training step through one layer; nothing runs: the tensors are on
    the meta device, which has sizes only."""
    found, launch, force = [], cvmm.launch, cvmm.force
    cvmm.launch, cvmm.force = lambda kernel, programs, **arguments: found.append((kernel, arguments)), "Triton"
    new = lambda *shape: torch.empty(shape, dtype=dtype, device="meta")
    try:
        uses = {"up": ((n, C), (E, C, F_), n * K, K, None, False), "down": ((n * K, F_), (E, F_, C), n * K, None, K, True),
                "values": ((n, C), (H * A, C, D), n * H * 2, H * 2, 2, True),
                "outputs": ((n * H, D), (H * A, D, C), n * H * 2, 2, H * 2, True)}
        for use, (x, w, m, fan_in, fan_out, gated) in uses.items():
            r = cvmm.route(torch.empty(m, dtype=torch.long, device="meta"), w[0])
            gate = torch.empty(m, device="meta") if gated else None
            y = cvmm.triton_forward(new(*x), new(*w), gate, r, fan_in, fan_out)
            cvmm.triton_backward(y, new(*x), new(*w), gate, r, fan_in, fan_out)
            found = [entry if len(entry) == 3 else (f"{use} {part}", *entry) for entry, part in zip(
                found, ["forward", "dx", "dw"] * 4, strict=False)]
    finally:
        cvmm.launch, cvmm.force = launch, force
    return found


PAPER = {"44M": (412, 128, 155, 12, 4, 82, 8), "244M": (1024, 128, 387, 16, 4, 128, 10), "1B": (1536, 128, 565, 24, 6, 128, 12)}


@needs_triton
def test_bytes_that_the_kernels_move():
    """The feedforward of the 244M model on 65,536 tokens in bfloat16. Every tensor counted once: 12 GB, of which 8.6 are the
    outputs of all slots, written and summed. But four launches gather M x C numbers from tensors of N x C that are larger
    than any cache: what they read again makes it 19 GB at worst."""
    once = again = 0
    for use, _, arguments in launches(*PAPER["244M"], 65536, torch.bfloat16):
        if use.startswith(("up", "down")):
            tensors = {k: t for k, t in arguments.items() if isinstance(t, torch.Tensor)}
            once += sum(t.nbytes for t in tensors.values())
            m = len(tensors["slot"])
            if arguments.get("SCATTER") and len(tensors["out"]) == m:
                once += tensors["out"].nbytes * (1 + 1 / 16)  # read for the sum, which is written
            for name, gathered in (("x", "GATHER"), ("x", "GATHER_X"), ("dout", "GATHER_DOUT")):
                if arguments.get(gathered):
                    again += m * tensors[name].shape[1] * 2 - tensors[name].nbytes
    assert 11e9 < once < 13e9 and 17e9 < once + again < 20.5e9, (once, again)


def machine_code(cubin: bytes) -> str:
    """Registers, bytes of stack (a spill), tensor-core instructions, asynchronous copies, atomics."""
    import tempfile

    from triton.backends import nvidia

    tool = Path(nvidia.__path__[0]) / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, sass = (subprocess.run([tool, flag, file.name], check=True, capture_output=True, text=True).stdout
                       for flag in ("--dump-resource-usage", "-sass"))
    number = lambda field: int(re.search(rf"{field}:(\d+)", usage)[1])
    count = lambda *names: len(re.findall(rf"\b(?:{'|'.join(names)})\b", sass))
    return (f"registers {number('REG')}, stack {number('STACK') + count('STL')}, HGMMA {count('HGMMA')}, HMMA {count('HMMA')}, "
            f"async {count('LDGSTS', 'UTMALDG')}, atomics {count('RED', 'REDG', 'ATOM', 'ATOMG', 'ATOMS')}")


def report(targets):
    """Compile every distinct launch of the paper's models ahead of time, and print what the machine code is made of."""
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int32: "*i32"}
    known, seen = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "gfx942": ("hip", "gfx942", 64)}, set()
    for form, size, n in itertools.product(("bfloat16", "float16", "float32", "tf32"), PAPER, (65536, 2048, 128)):
        if "quick" in targets and (form, n) != ("bfloat16", 65536):
            continue
        torch.set_float32_matmul_precision("high" if form == "tf32" else "highest")
        dtype = torch.float32 if form == "tf32" else getattr(torch, form)
        for use, kernel, arguments in launches(*PAPER[size], n, dtype):
            options = {k: arguments.pop(k) for k in ("num_warps", "num_stages")}
            signature, constants, attributes = {}, {}, {}
            for i, parameter in enumerate(kernel.params):
                v, varies = arguments[parameter.name], parameter.do_not_specialize
                if parameter.is_constexpr or v is None or isinstance(v, int) and v == 1 and not varies:
                    signature[parameter.name], constants[(i,)] = "constexpr", v
                    continue
                is_tensor = isinstance(v, torch.Tensor)
                signature[parameter.name] = types[v.dtype] if is_tensor else "i32" if v < 2**31 else "i64"
                if is_tensor or v % 16 == 0 and not varies:
                    attributes[(i,)] = [["tt.divisibility", 16]]
            for target in known.keys() & targets:
                if (key := str((target, kernel.__name__, signature, constants, attributes))) not in seen:
                    seen.add(key)
                    source = ASTSource(kernel, signature, constants, attributes)
                    asm = compile(source, target=GPUTarget(*known[target]), options=options).asm
                    facts = machine_code(asm["cubin"]) if "cubin" in asm else "compiles"
                    print(target, kernel.__name__, use, size, f"{n} tokens", form, f"BM {arguments['BM']}", facts, sep=", ", flush=True)


@pytest.mark.skipif(cvmm.triton is None or sys.platform != "linux", reason="needs triton, with its cuobjdump")
@pytest.mark.parametrize("only", [["quick"], pytest.param([], marks=pytest.mark.slow)], ids=["some", "all"])
def test_what_the_kernels_compile_to(only):
    """Ahead of time, for three of the paper's models: no spills, tensor cores, asynchronous copies, no atomics. All: in every
    number format, also for batches so small that the tiles shrink. `pytest -m slow -s` prints the table."""
    halves = [subprocess.Popen([sys.executable, __file__, *only, *targets], stdout=subprocess.PIPE, text=True)
              for targets in (["sm_90"], ["sm_80", "gfx942"])]  # one for each core
    lines = [line for half in halves for line in half.communicate()[0].splitlines()]
    print(*lines, sep="\n")
    assert [half.returncode for half in halves] == [0, 0]
    found = {target: [line for line in lines if line.startswith(target)] for target in ("sm_80", "sm_90", "gfx942")}
    assert len(found["sm_80"]) == len(found["sm_90"]) == len(found["gfx942"]) >= (10 if only else 50)
    for line in found["sm_80"] + found["sm_90"]:
        count = lambda name: int(re.search(rf"\b{name} (\d+)", line)[1])
        assert count("stack") == 0 and count("atomics") == 0 and count("async") > 0, line
        if "float32" not in line:  # which has no tensor cores; TF32 has
            large = line.startswith("sm_90") and " 65536 tokens" in line  # a warp group multiplies 64 rows at least
            assert count("HGMMA") + (0 if large else count("HMMA")) > 0, line


# ---------------------------------------------------------------------------------------------------------------------
# Text, training and resuming: main() of the scripts runs in this process, in an empty folder

TEXT = "".join(f"{i} · {i + 7} = {i * (i + 7)} — naïve 🙂\n" for i in range(150))
MODEL = ("--n_embd=16 --head_size=8 --n_head=2 --n_layer=2 --group_size=1 --n_expert=4 --top_k=2 --expert_size=8 "
         "--block_size=16 --vocab_size=300").split()
SMALL = [*MODEL, *("--data=text.txt --batch_size=2 --tokens_per_step=64 --steps=6 --warmup=2 --eval_interval=3 "
                   "--eval_tokens=64 --sample_tokens=8 --log_interval=2 --device=cpu").split()]


@pytest.fixture
def run(monkeypatch, tmp_path):
    """run(script, *arguments), in a folder that holds text.txt."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_bytes(TEXT.encode())

    def call(script, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, arguments)])
        script.cli(script.main)

    handlers, precision = [(n, signal.getsignal(n)) for n in (signal.SIGINT, signal.SIGTERM)], torch.get_float32_matmul_precision()
    yield call
    for number, handler in handlers:
        signal.signal(number, handler)
    torch.set_float32_matmul_precision(precision)
    torch.set_flush_denormal(False)


def load(out, name="last.pt"):
    return torch.load(Path(out) / name, weights_only=True)


def same(a, b):
    """Two checkpoints hold the same weights and the same state of the optimizer, bit for bit."""
    states = zip(a["optimizer"]["state"].values(), b["optimizer"]["state"].values(), strict=True)
    return a["step"] == b["step"] and all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"]) and all(
        torch.equal(s[k], t[k]) for s, t in states for k in s)


def test_train_then_sample(run, capsys):
    run(train, *SMALL)
    log = capsys.readouterr().out
    assert "step 6/6: loss" in log and "step 3/6: validation loss" in log
    metrics = [json.loads(line) for line in Path("out/metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in metrics if "val_loss" in m] == [3, 6] and metrics == load("out")["metrics"]
    assert load("out", "best.pt")["best"] == min(m["val_loss"] for m in metrics if "val_loss" in m)

    def text(*arguments):
        run(sample, "--max_new_tokens=30", "--device=cpu", *arguments)
        return capsys.readouterr().out

    assert text("--prompt=naïve 🙂").startswith("naïve 🙂") and len(text("--prompt=a")) > 2
    assert text() == text("--seed=0") != text("--seed=1")
    assert text("--n_samples=3", "--prompt=12 · ").count("12 · ") >= 3
    assert text("--temperature=0") == text("--top_k=1", "--seed=5")
    run(sample, "--prompt=" + TEXT[:100], "--max_new_tokens=1", "--device=cpu")
    assert re.search(r"the prompt has \d+ tokens, of which the newest 16 are read", capsys.readouterr().err)


def test_loss_falls_on_real_text(run, capsys):
    """100 steps on the standard library: a model that learned which bytes are frequent would be at 4 bits or more."""
    run(train, "--steps=100", "--tokens_per_step=1024", "--batch_size=8", "--sample_tokens=0", "--eval_tokens=4096", "--device=cpu",
        "--data", *(str(Path(os.__file__).parent / name) for name in ("argparse.py", "typing.py", "ast.py", "shutil.py")))
    assert load("out")["metrics"][-1]["val_bits"] < 3


def test_resume_changes_no_bit(run, monkeypatch, capsys):
    """Ctrl-C after half of the steps, then --resume in a folder that was moved: as if nothing had happened. With dropout."""
    run(train, *SMALL, "--dropout=0.1", "--out=straight")
    evaluate = train.evaluate

    def interrupted(*args):
        signal.raise_signal(signal.SIGINT)
        return evaluate(*args)

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="after step 4.*--resume --out=parts"):
        patch.setattr(train, "evaluate", interrupted)
        run(train, *SMALL, "--dropout=0.1", "--out=parts")
    shutil.move("parts", "moved")
    run(train, "--resume", "--out=moved", "--data=text.txt", "--log_interval=1")
    assert same(load("straight"), load("moved")) and not Path("parts").exists()
    steps = [m["step"] for m in load("moved")["metrics"]]
    assert steps == sorted(steps) and "step 5/6" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="has done its 6 steps"):
        run(train, "--resume", "--out=moved")
    Path("text.txt").write_text(TEXT[1:])
    with pytest.raises(SystemExit, match="not what it was"):
        run(train, "--resume", "--out=moved", "--steps=9")
    run(train, *(o for o in SMALL if o not in MODEL), "--init_from=moved", "--out=next", "--steps=1", "--lr=1e-9", "--weight_decay=0")
    close(load("next")["model"].values(), load("moved")["model"].values(), 1e-6)
    assert load("next")["step"] == 1 and load("next")["tokenizer"] == load("moved")["tokenizer"]


@pytest.mark.parametrize("failure, sentence", [(OSError(28, "No space left on device", "last.pt"), "last.pt: No space left"),
                                               (RuntimeError("unexpected pos"), "disk full")])
def test_a_full_disk_keeps_the_last_checkpoint(failure, sentence, run, monkeypatch):
    run(train, *SMALL)
    before, write = load("out"), torch.save

    def full(state, path):
        Path(path).write_bytes(b"half of it")
        raise failure

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match=sentence):
        patch.setattr(torch, "save", full)
        run(train, "--resume", "--steps=9")
    assert same(before, load("out")) and not list(Path("out").glob("*.part")) and torch.save is write
    run(train, "--resume", "--steps=9")
    run(train, *SMALL, "--steps=9", "--out=straight")
    assert load("out")["step"] == load("straight")["step"]


def test_accumulation_and_recomputation_change_nothing(run, capsys):
    """How many sequences are taken at a time is a matter of memory only. The gradient norms are compared as well: clipping
    and Adam would hide a wrong scale from the weights."""
    for n in (1, 4):
        run(train, *SMALL, f"--batch_size={n}", f"--out=by{n}", *["--recompute"] * (n == 1))
    close(load("by1")["model"].values(), load("by4")["model"].values(), 1e-4)
    norms = [[m["grad"] for m in load(f"by{n}")["metrics"] if "grad" in m] for n in (1, 4)]
    assert len(norms[0]) == 4 and norms[0] == pytest.approx(norms[1], rel=0.01)


def test_divergence_keeps_the_last_checkpoint(run):
    run(train, *SMALL)
    before = load("out")
    with pytest.raises(SystemExit, match="not finite in ten steps.*smaller --lr"):
        run(train, "--resume", "--steps=600", "--lr=1e30", "--warmup=0", "--grad_clip=1e30")
    assert same(before, load("out"))


def test_a_step_that_is_not_finite_is_skipped(run, monkeypatch):
    step = train.Trainer.step

    def spoiled(self, batches, lr):
        if len(calls) == 2:
            self.model.head.bias.register_hook(lambda grad: grad * math.nan if len(calls) == 3 else grad)
        calls.append({k: v.clone() for k, v in self.model.state_dict().items()})
        return step(self, batches, lr)

    calls = []
    monkeypatch.setattr(train.Trainer, "step", spoiled)
    run(train, *SMALL)
    changed = [any(not torch.equal(a[k], b[k]) for k in a) for a, b in itertools.pairwise(calls)]
    assert changed == [True, True, False, True, True] and load("out")["step"] == 6


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_trains_and_resumes(dtype, run):
    """float16 with the scaler that keeps its gradients from underflowing; also going on with a run in float32."""
    run(train, *SMALL, f"--dtype={dtype}", "--steps=20", "--lr=1e-2")
    losses = [m["loss"] for m in load("out")["metrics"] if "loss" in m]
    assert losses[-1] < losses[0] - 0.1 and bool(load("out")["scaler"]) == (dtype == "float16")
    run(train, "--resume", "--steps=22", "--dtype=float32")
    run(train, "--resume", "--steps=24", f"--dtype={dtype}")
    assert load("out")["step"] == 24


DRIVER = """
import sys; sys.path.insert(0, {folder!r})
import torch, train
step = train.Trainer.step
def spy(self, *args):
    with open(f"seeds{{train.os.environ.get('RANK', 0)}}.txt", "a") as file:
        file.write(f"{{torch.initial_seed()}} ")
    return step(self, *args)
train.Trainer.step = spy
train.cli(train.main)
"""


def torchrun(*arguments, **options):
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, **options)


@pytest.mark.skipif(os.name != "posix", reason="needs process groups")
def test_two_processes(run):
    """The training of one process, up to rounding, saved once; also --resume. Their dropout has different seeds. Ctrl-C, which
    reaches all processes of the terminal: they leave after the same step with one sentence, and none stays behind."""
    run(train, *SMALL, "--out=one", "--log_interval=1")
    Path("driver.py").write_text(DRIVER.format(folder=str(Path(train.__file__).parent)))
    for more in ([*SMALL, "--steps=3", "--log_interval=1"], ["--resume", "--steps=6"]):
        process = torchrun("driver.py", *more, "--out=two")
        output, error = process.communicate(timeout=120)
        assert process.returncode == 0, error
    one, two = load("one"), load("two")
    close(two["model"].values(), one["model"].values(), 1e-4)
    losses = [[m["loss"] for m in r["metrics"] if "loss" in m] for r in (one, two)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and output.count("validation loss") == 1
    seeds = [Path(f"seeds{rank}.txt").read_text().split() for rank in (0, 1)]
    assert len(set(seeds[0] + seeds[1])) == 12

    process = torchrun("driver.py", *SMALL, "--steps=1000000", "--eval_interval=1000000", "--out=three")
    while not process.stdout.readline().startswith("step 4/"):
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=90)
    step = int(re.search(r"Stopped after step (\d+), saved in three", error)[1])
    assert process.returncode == 1 and load("three")["step"] == step and error.count("Traceback") == 1  # torchrun's own
    with pytest.raises(ProcessLookupError):
        for _ in range(100):
            os.killpg(process.pid, 0)
            time.sleep(0.1)


def test_learning_rate():
    """Linear to the peak, which may be held, then half a cosine to a tenth of it."""
    o = train.Options(lr=1.0, warmup=10, steps=110, hold=0.0, final_lr=0.1)
    assert [train.learning_rate(s, o) for s in (0, 4, 9, 10)] == pytest.approx([0.1, 0.5, 1, 1])
    assert [train.learning_rate(s, o) for s in (60, 110, 500)] == pytest.approx([0.55, 0.1, 0.1])
    o = replace(o, hold=0.5)
    assert [train.learning_rate(s, o) for s in (0, 10, 55, 82.5, 110)] == pytest.approx([0.1, 1, 1, 0.55, 0.1])


def test_recipes():
    """The paper's run needs no further flags."""
    o = train.Options(**train.RECIPES["moeut-44M"])
    assert (o.lr, o.beta1, o.beta2, o.weight_decay, o.final_lr, o.hold) == (2.5e-4, 0.9, 0.999, 0.01, 0.1, 0)
    assert (o.steps, o.tokens_per_step, o.warmup, o.grad_clip) == (100_000, 65_536, 0, 0.1)
    o = train.Options(**train.RECIPES["moeut-244M"])
    assert (o.warmup, o.grad_clip) == (4000, 0.25)


def test_compare_and_bench(run, capsys):
    """Mean and range over the seeds; a changed field makes another model, other data forbid to compare."""
    for name, *options in (("a1", "--seed=1"), ("a2", "--seed=2"), ("b", "--seed=1", "--top_k=1"), ("c", "--steps=9")):
        run(train, *SMALL, *options, f"--out={name}")
    capsys.readouterr()
    run(train, "--compare", "a1", "a2", "b")
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("tiny")]
    bits = [load(name)["metrics"][-1]["val_bits"] for name in ("a1", "a2")]
    (two,) = [re.findall(r" ([\d.,]+)", row)[-7:] for row in rows if "top_k" not in row]
    assert len(rows) == 2 and two[0] == "2" and [float(b) for b in two[2:5]] == pytest.approx([sum(bits) / 2, *sorted(bits)], abs=1e-4)
    with pytest.raises(SystemExit, match="step is 6 in a1 and 9 in c"):
        run(train, "--compare", "a1", "c")
    run(train, "--bench", "--preset=tiny", "--batch_size=1", "--device=cpu")
    assert len(re.findall(r"\d+\.\d\d$", capsys.readouterr().out, re.MULTILINE)) == 4


# Tokens


def read(*patterns, tokenizer="bytes", vocab_size=300):
    return train.load_text(list(map(str, patterns)), tokenizer, vocab_size, None)


@pytest.mark.parametrize("name", ["bytes", "bpe"])
def test_tokenizer_round_trip(name, run):
    """Any text comes back; the name of a special token is text; no character is cut when it is streamed."""
    tokenizer, *_ = read("text.txt", tokenizer=name)
    text = TEXT[:200] + "<|endoftext|> \u200d\u2028\U0010ffff äß€漢字🙂\r\n\t"
    ids = tokenizer.encode(text).tolist()
    assert "".join(tokenizer.stream([*ids, tokenizer.end, *ids])) == text and max(ids) < tokenizer.n_vocab - 1
    assert all("\ufffd" not in piece for piece in tokenizer.stream(ids))
    assert len(ids) < len(text.encode()) or name == "bytes"
    assert train.Tokenizer(json.loads(json.dumps(tokenizer.spec, default=list), object_hook=lambda d: d | dict(
        tokens=[bytes(t) for t in d["tokens"]]) if "tokens" in d else d)).encode(text).tolist() == ids


def test_vocabulary(run, capsys):
    """It is the preset's; smaller if the text has no more to merge; padded only on request."""
    run(train, *SMALL)
    assert load("out")["config"]["vocab_size"] == 300 == len(load("out")["tokenizer"]["tokens"]) + 1
    Path("few.txt").write_text("abab " * 1000)
    run(train, *SMALL, "--data=few.txt", "--vocab_size=5000", "--out=few")
    assert 257 < load("few")["config"]["vocab_size"] < 300 and "instead of 5000" in capsys.readouterr().out
    run(train, *SMALL, "--tokenizer=bytes", "--vocab_size=1000", "--out=padded")
    run(sample, "--out=padded", "--device=cpu", "--temperature=9")
    assert load("padded")["model"]["head.weight"].shape[0] == 1000


def test_tokens_are_cached(run, tmp_path, monkeypatch):
    """Found again, not encoded again; made again if they are damaged, or if the text is another."""
    first, cache = read("text.txt")[1].tolist(), lambda: list((tmp_path / "cache" / "moeut").iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(train, "write_aside", None)
        assert read("text.txt")[1].tolist() == first and len(cache()) == 1
    for damage in (lambda f: f.write_bytes(f.read_bytes()[:-1]), lambda f: f.write_bytes(b""), Path.unlink):
        damage(*cache())
        assert read("text.txt")[1].tolist() == first
    Path("text.txt").write_text(TEXT.replace("1", "2"))
    assert read("text.txt")[1].tolist() != first and len(cache()) == 2


@pytest.mark.parametrize("pad", range(4))
def test_the_last_tenth_is_for_validation(pad, run):
    """No character is cut, wherever the tenth begins; the end of the text closes the document."""
    text = "x" * pad + "🙂" * 100
    Path("text.txt").write_text(text)
    _, data, val, bits, _ = read("text.txt")
    decode = lambda ids: bytes(ids.tolist()).decode()
    assert decode(data) + decode(val[:-1]) == text and val[-1] == 256 and 256 not in data
    assert len(val) == (41 if pad == 0 else 45) and bits == pytest.approx([1 / math.log(2), len(val) / (len(val) - 1) / math.log(2)])


@pytest.mark.parametrize("n", [2, 3, 20, 300])
def test_documents_are_for_training_or_validation(n, run):
    """Any number of them is enough; in an order that names and time do not change; each once."""
    for i in range(n):
        Path(f"docs{n}/sub").mkdir(parents=True, exist_ok=True)
        Path(f"docs{n}/sub/{i}.txt").write_text(f"<{i}>" * 20)
    os.symlink(f"sub/{n - 1}.txt", f"docs{n}/link.txt")
    Path(f"docs{n}/.hidden").write_text("?")
    Path(f"docs{n}/latin.txt").write_bytes(b"?" * (1 << 20) + b"\xef")  # left out whole
    Path(f"docs{n}/run").mkdir()
    for name in ("metrics.jsonl", "last.pt"):
        Path(f"docs{n}/run/{name}").write_text("?")
    _, data, val, _, text_hash = read(f"docs{n}", f"docs{n}/sub/*.txt")
    both = bytes(t if t < 256 else 10 for t in [*data.tolist(), *val.tolist()]).decode()
    assert sorted(both.split()) == sorted(f"<{i}>" * 20 for i in range(n)) and 0.05 < len(val) / len(both) < 0.15
    Path(f"docs{n}").rename("renamed")
    assert text_hash == read("renamed")[4]


@pytest.mark.parametrize("length", [17, 18, 33, 49, 100, 1234])
def test_windows_visit_everything_once_per_epoch(length):
    data, T = np.arange(length, dtype=np.uint16), 16
    n, starts = max((length - T - 1) // T, 1), []
    for epoch in range(3):
        rows = np.stack(train.windows(data, T, range(epoch * n, (epoch + 1) * n), 0))
        assert (rows == rows[:, :1] + np.arange(T + 1)).all() and (np.diff(np.sort(rows[:, 0])) == T).all() and len(rows) == n
        starts.append(rows[:, 0].tolist())
    if n > 5:
        assert starts[0] != starts[1] and starts[0] != sorted(starts[0])
        assert starts[0] != [row[0] for row in train.windows(data, T, range(n), 1)]


def test_evaluate():
    """The mean over windows does not depend on the batch size, and the model is in training mode after it."""
    model, data = MoEUT(tiny()), np.random.default_rng(0).integers(33, size=200).astype(np.uint16)
    results = [train.evaluate(model, data, 112, b, torch.autocast("cpu", enabled=False)) for b in (1, 3, 7)]
    rows = torch.tensor(np.stack([data[s : s + 17] for s in np.linspace(0, 183, 7).astype(int)]).astype(np.int64))
    assert results == pytest.approx([model.eval()(rows[:, :-1], rows[:, 1:]).loss.item()] * 3, rel=1e-5)


# Experts and scores


def test_show_experts(run, capsys):
    """Every token once for each application, with the feedforward expert that has the largest gate; no codes in a pipe."""
    run(train, *SMALL, "--steps=1")
    capsys.readouterr()
    run(sample, "--prompt=naïve 12", "--show_experts", "--device=cpu")
    text = capsys.readouterr().out
    model, tokenizer, _ = train.load_model(Path("out"))
    idx = torch.tensor([tokenizer.encode("naïve 12").tolist()])
    _, seen = router_logits(model.eval(), idx)
    best = [logits[0].argmax(-1).tolist() for logits in seen[model.layers[0].ffn.router]]
    assert [list(map(int, re.findall(r"\[(\d+)\]", part))) for part in text.split("application")[1:]] == best
    assert "\x1b" not in text and "layers.0.attention.router" in text and len(best) == 2


LOCAL_TASK = """
task: local
dataset_path: json
dataset_kwargs: {data_files: {train: pairs.jsonl}}
output_type: multiple_choice
validation_split: train
doc_to_text: "{{start}}"
doc_to_target: 0
doc_to_choice: "{{[good, bad]}}"
metric_list: [{metric: acc}]
"""


def test_scores(run, capsys, monkeypatch):
    """Those of the harness, without a network, agree with a direct computation from the logits."""
    run(train, *SMALL)
    model, tokenizer, _ = train.load_model(Path("out"))
    pairs = [("12 ·", "19 = 228", "20 = 22"), ("", "naïve", "🙂🙂🙂"), ("3 · 10 = 30 — naïve 🙂 4 · 11 = 44 — naïve", "🙂", "= 1")]

    def direct(start, end):
        whole = [tokenizer.end, *tokenizer.encode(f"{start} {end}").tolist()]
        logp = model(torch.tensor([whole[:-1]]).long()).logits[0].log_softmax(-1)
        n = len(tokenizer.encode(start))
        return sum(logp[i, whole[i + 1]].item() for i in range(n, len(whole) - 1))

    model.config.block_size = 64
    ids = [([tokenizer.end, *tokenizer.encode(s).tolist()], tokenizer.encode(f" {e}").tolist()) for s, *es in pairs for e in es]
    want = [direct(s, e) for s, *es in pairs for e in es]
    assert [lp for lp, _ in sample.log_likelihoods(model.eval(), ids, 20)] == pytest.approx(want, rel=1e-4)
    Path("tasks").mkdir()
    Path("tasks/local.yaml").write_text(LOCAL_TASK)
    Path("pairs.jsonl").write_text("".join(json.dumps(dict(zip(("start", "good", "bad"), p, strict=True))) + "\n" for p in pairs))
    if shutil.which("lm_eval") or sys.modules.get("lm_eval") or __import__("importlib").util.find_spec("lm_eval"):
        run(sample, "--tasks", "tasks", "--device=cpu")
        accuracy = float(re.search(r"acc *\|[^|]*\| *([\d.]+)", capsys.readouterr().out)[1])
        assert accuracy == pytest.approx(np.mean([a > b for a, b in zip(want[::2], want[1::2], strict=True)]), abs=1e-3)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(SystemExit, match=re.escape("pip install -e '.[eval]'")):
        run(sample, "--tasks", "tasks", "--device=cpu")


def test_weights_of_the_authors(run, capsys):
    """With their SentencePiece tokenizer, from their training code, which says the sizes, and from their clean repository."""
    sentencepiece = pytest.importorskip("sentencepiece")
    Path("words.txt").write_text("abc cab bca abcabc\n" * 60)
    sentencepiece.SentencePieceTrainer.train(input="words.txt", model_prefix="words", vocab_size=11, model_type="bpe", minloglevel=2)
    args = {"transformer.n_heads": 2, "transformer.encoder_n_layers": 4, "lm.unroll": 32, "pkm.n_heads": 2, "moe.att.k": 2}
    torch.save({"run_invariants": {"args": args}, "model": authors_weights(3, training_code=True)}, "theirs.pt")
    torch.save(authors_weights(3), "clean.pt")
    options = sample.SampleOptions(out="theirs.pt", tokenizer="words.model")
    model, tokenizer = sample.load(options)
    assert model.config == authors_config(3) and "".join(tokenizer.stream(tokenizer.encode("cab abc").tolist())).strip() == "cab abc"
    run(sample, "--out=theirs.pt", "--tokenizer=words.model", "--max_new_tokens=5", "--device=cpu")
    for arguments, sentence in ((["--out=theirs.pt"], "--tokenizer"), (["--out=clean.pt", "--tokenizer=words.model"], "--preset"),
                                (["--out=clean.pt", "--tokenizer=words.model", "--preset=tiny"], "clean.pt")):
        with pytest.raises(SystemExit, match=sentence):
            run(sample, *arguments, "--device=cpu")
    for name, value in (("transformer.universal.group_type", "aabb"), ("rope.rotate_fraction", 1.0), ("rope.base", 5e5)):
        torch.save({"run_invariants": {"args": args | {name: value}}, "model": authors_weights(3, training_code=True)}, "other.pt")
        with pytest.raises(SystemExit, match=name):
            sample.cli(lambda: sample.load(replace(options, out="other.pt")))


# ---------------------------------------------------------------------------------------------------------------------
# Bad input: one sentence that names the culprit, and nothing lost

BAD = {
    train: {
        "--nonsense=1": "--nonsense", "--steps=many": "--steps", "--steps=0": "--steps is 0", "--lr=-1": "--lr", "--lr=inf": "--lr",
        "--lr=nan": "--lr", "--beta2=1": "--beta2", "--hold=1": "--hold", "--seed=-1": "--seed", "--seed=99999999999999999999": "below",
        "--tokens_per_step=65": "--tokens_per_step", "--data=missing.txt": "missing.txt", "--data=empty.txt": "tokens",
        "--data=latin1.txt": "tokens", "--data=empty": "empty", "--data=": "--data is", "--out=": "--out is",
        "--n_layer=3 --group_size=2": "n_layer", "--n_head=0": "n_head", "--top_k=5": "top_k", "--preset=huge": "huge",
        "--ffn_reg=nan": "ffn_reg", "--dtype=int8": "int8", "--compile=maybe": "maybe", "--device=abacus": "abacus",
        "--device=cuda:99": "cuda:99", "--out=text.txt": "text.txt", "--out=text.txt/below": "text.txt",
        "--tokenizer=klingon": "klingon", "--tokenizer=bytes --vocab_size=100": "vocab_size", "--n_expert=999999999": "memory",
        "--init_from=nowhere": "nowhere", "--init_from=done --top_k=1": "--top_k", "--init_from=done --tokenizer=bytes": "--tokenizer",
        "--out=done": "--resume", "--bench": "--bench", "--compare nowhere": "nowhere", "--compare text.txt": "text.txt",
        "--resume --out=nowhere": "nowhere", "--resume --out=damaged.pt": "damaged.pt", "--resume --out=other.pt": "other.pt",
        "--resume --out=done --n_layer=4": "--n_layer", "--resume --out=done --seed=3": "--seed",
    },
    sample: {
        "--top_k=few": "--top_k", "--n_samples=0": "--n_samples", "--n_samples=1000000": "--n_samples", "--temperature=-1": "--temperature",
        "--top_p=0": "--top_p", "--top_p=1e-300": "--top_p", "--top_p=1.1": "--top_p", "--seed=18446744073709551616": "--seed",
        "--device=abacus": "abacus", "--out=nowhere": "nowhere", "--out=text.txt": "text.txt", "--out=damaged.pt": "damaged.pt",
        "--out=other.pt": "other.pt", "--prompt=": "--prompt", "--prompt_file=missing.txt": "missing.txt", "--prompt_file=": "--prompt_file",
        "--prompt_file=empty.txt": "empty.txt", "--prompt_file=latin1.txt": "latin1.txt", "--prompt=a --prompt_file=text.txt": "--prompt_file",
        "--out=done --tokenizer=x.model": "--tokenizer", "--out=done --tasks nothing": "--tasks",
    },
}


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished run, and files that are none."""
    folder = tmp_path_factory.mktemp("done")
    for name, data in {"empty.txt": b"", "latin1.txt": b"na\xefve " * 99, "text.txt": TEXT.encode()}.items():
        (folder / name).write_bytes(data)
    (folder / "empty").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        patch.setattr(sys, "argv", ["train.py", *SMALL, "--out=done"])
        train.main()
    whole = (folder / "done" / "last.pt").read_bytes()
    (folder / "damaged.pt").write_bytes(whole[: len(whole) // 2])
    torch.save({"config": 1, "model": {}}, folder / "other.pt")
    return folder


@pytest.mark.parametrize("script, arguments, culprit", [
    pytest.param(script, arguments, culprit, id=f"{script.__name__} {arguments}")
    for script, table in BAD.items() for arguments, culprit in table.items()])
def test_bad_input(script, arguments, culprit, run, done, capsys, monkeypatch):
    monkeypatch.chdir(done)
    before = {p: p.read_bytes() for p in done.rglob("*") if p.is_file()}
    arguments = arguments.split()
    if script is train and not {"--resume", "--bench", "--compare"} & set(arguments):
        options = [o for o in SMALL if not (o in MODEL and any(a.startswith("--init_from") for a in arguments))]
        arguments = [*options, *arguments]  # the last one wins
    if script is train and "--bench" in arguments:
        arguments.append("--top_k=1")
    with pytest.raises(SystemExit) as stopped:
        run(script, *arguments)
    sentence = stopped.value.code
    assert isinstance(sentence, str) and len(sentence.splitlines()) == 1 and culprit in sentence, sentence
    assert all(p.read_bytes() == data for p, data in before.items())


def test_output_that_knows_few_characters(done):
    """A terminal that is not UTF-8, and a reader that goes away."""
    folder = str(Path(sample.__file__).parent)
    command = [sys.executable, f"{folder}/sample.py", "--prompt=naïve 🙂", "--max_new_tokens=30", "--device=cpu", f"--out={done}/done"]
    result = subprocess.run(command, capture_output=True, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert result.returncode == 0 and result.stdout.startswith(b"na?ve ?") and b"tokens/s" in result.stderr
    result = subprocess.run(" ".join(map(repr, command)) + " --n_samples=500 | head -c 1", shell=True, capture_output=True)
    assert result.stdout == b"n" and b"Traceback" not in result.stderr


@pytest.mark.parametrize("script, options", [(train, [train.Options, MoEUTConfig]), (sample, [sample.SampleOptions])])
def test_help_lists_every_option(script, options, run, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(script, "--help")
    text = capsys.readouterr().out
    assert stopped.value.code == 0 and [f.name for o in options for f in fields(o) if f"--{f.name}" not in text] == []


if __name__ == "__main__":
    report(sys.argv[1:])
