"""MoEUT, the Mixture-of-Experts Universal Transformer (Csordas et al., 2024, arXiv 2405.16039).

A Universal Transformer applies the same layer over and over, so depth costs no parameters. But parameters are what a
language model needs: if all tokens use all of a layer ("dense"), it has to be far wider, and slower, to have as many.
MoEUT adds parameters at little cost, and makes repeated layers work, with three ideas:

1. Mixtures of experts in both halves of a layer: sigma-MoE in the feedforward (arXiv 2310.10837) and SwitchHead in the
   attention (arXiv 2312.07987). An expert is a small feedforward, or one matrix of an attention head. There are many,
   and every token uses a few of them, by its own choice.
2. Layer grouping: not one layer but a small group of G different ones is repeated, ABABAB... Neighbours can then do
   different parts of one job, and each needs fewer experts.
3. Peri-layernorm: a layernorm stands only where a softmax or sigmoid follows: before queries and keys, routers and the
   output layer. Values and feedforward read the residual stream itself, so what they add to it grows with it. With
   pre-layernorm they would add equally much at every depth, to a stream that grows, and count less and less. Separate
   layers can learn larger weights with depth; a shared one cannot.

The same file holds what the paper compares with: `ffn`, `attention`, `group_size` and `layernorm` in the config turn
MoEUT into the standard Transformer, the plain Universal Transformer, the sigma-MoE and the SwitchHead Transformer.

Letters in shape comments: those of sizes are named in MoEUTConfig; a batch is B sequences of T tokens, N = B * T tokens
in all; S keys are attended to; P pairs of dimensions of a head are rotated.

Attention and feedforward get two views of the residual stream s: x, which values and experts transform, and n, which
queries, keys and routers read. They return y, and in training the usage of their experts, if they have any.

    layernorm        x          n          the next s
    peri             s          LN(s)      s + y
    pre              LN(s)      LN(s)      s + y
    post             s          s          LN(s + y)
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cvmm import cvmm, route, sum_dtype, top_k


@dataclass(frozen=True)
class MoEUTConfig:
    """All sizes and switches of a model. Raises ValueError, in one sentence, if they do not fit."""

    vocab_size: int = 2048  # V tokens
    block_size: int = 128  # training context T; the model itself has no limit (rotary positions)
    n_layer: int = 4  # L, counts applications: a layer applied three times counts three
    group_size: int = 2  # G distinct layers, applied L / G times each; G = L shares nothing
    n_embd: int = 64  # C, width of the residual stream
    n_head: int = 4  # H attention heads; the paper's MoEUTs have fewer than its dense models, as each has A experts
    head_size: int = 16  # D, width of a head; H * D need not be C
    ffn: Literal["moe", "dense"] = "moe"  # moe is sigma-MoE
    n_expert: int = 8  # E feedforward experts; parameters grow with E, compute hardly
    expert_size: int = 128  # F hidden units of an expert; 128 in the paper
    top_k: int = 2  # K experts chosen by a token; compute grows with K * F
    ffn_size: int = 512  # hidden units of a dense feedforward
    attention: Literal["moe", "dense"] = "moe"  # moe is SwitchHead
    n_att_expert: int = 2  # A experts per head for values, A for outputs; with 1, nothing is chosen: see DenseAttention
    att_top_k: int = 1  # J of these A, chosen by a token
    layernorm: Literal["peri", "pre", "post"] = "peri"
    dropout: float = 0.0  # on the output of attention and feedforward; 0 in all runs of the paper
    expert_dropout: float = 0.0  # chance that a token passes over an expert in training, if enough are left
    ffn_reg: float = 0.01  # weight of the entropy regulariser on feedforward routers
    att_reg: float = 0.001  # ... on attention routers

    def __post_init__(self):
        def check(name, ok, rule):
            if not ok:
                raise ValueError(f"{name} is {getattr(self, name)!r}: it must be {rule}.")

        for f in fields(self):
            value, low, below = getattr(self, f.name), int(f.type is int), 1 if "dropout" in f.name else math.inf
            if allowed := get_args(f.type):
                check(f.name, value in allowed, f"one of {', '.join(allowed)}")
            else:
                ok = type(value) in (int, f.type) and low <= value < below
                check(f.name, ok, f"{f.type.__name__}, at least {low} and below {below}")
        check("top_k", self.top_k <= self.n_expert, f"at most n_expert = {self.n_expert}")
        check("att_top_k", self.att_top_k <= self.n_att_expert, f"at most n_att_expert = {self.n_att_expert}")
        check("n_layer", self.n_layer % self.group_size == 0, f"a multiple of group_size = {self.group_size}")
        check("head_size", self.head_size >= 4, "at least 4, of which 2 are rotated")
        check("layernorm", self.layernorm != "peri" or self.ffn == "moe", "pre or post: a dense ffn has no router")


def normal(c: MoEUTConfig, *shape: int, inputs: int) -> nn.Parameter:
    """Initial weights, as in the authors' training code: those of a layer have standard deviation sqrt(2 / L / inputs),
    where L counts applications, and biases are 0. w_down has E * F inputs (of all experts, not of the chosen ones), w_o
    has H * D (not times A). The embedding has 1 / sqrt(C); layernorms and lm_head stay as PyTorch makes them."""
    return nn.Parameter(math.sqrt(2 / c.n_layer / inputs) * torch.randn(shape))


class Router(nn.Module):
    """Lets every token choose experts. A linear map gives `logits`, one for each expert; the `scores` are their
    sigmoids; the experts with the `top_k` largest scores are chosen; the `gate` of a chosen expert is its score, by
    which its output is multiplied. Scores are not normalised: experts do not compete for a share. Any number of tokens
    can choose the same. There may be several `pools`, with top_k chosen from each: for values and outputs, (2, H)."""

    def __init__(self, c: MoEUTConfig, n_expert: int, top_k: int, pools: tuple[int, ...] = ()):
        super().__init__()
        self.shape, self.top_k, self.expert_dropout = (*pools, n_expert), top_k, c.expert_dropout
        self.w = normal(c, math.prod(self.shape), c.n_embd, inputs=c.n_embd)

    def forward(self, n: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """n [B, T, C] -> gate and expert, [B, T, *pools, top_k] both; and in training, for the regulariser, the usage
        of all experts by each sequence [B, *pools, n_expert]: a mean softmax, as a count would have no gradient."""
        with torch.autocast(n.device.type, enabled=False):  # in bfloat16, top-k is a tie for a fifth of 244M's tokens
            dtype = sum_dtype(n)  # float32 at least
            logits = F.linear(n.to(dtype), self.w.to(dtype)).unflatten(-1, self.shape)   # [B, T, *pools, n_expert]
        scores = logits.sigmoid()                                                        # [B, T, *pools, n_expert]
        candidates = logits.detach()  # in the same order as the scores, but sigmoids saturate and tie
        if self.training and self.expert_dropout:
            candidates = candidates - 1e3 * (torch.rand_like(logits) < self.expert_dropout)  # the last to be chosen
        expert = top_k(candidates, self.top_k)                                           # [B, T, *pools, top_k]
        gate = scores.gather(-1, expert)                                                 # [B, T, *pools, top_k]
        usage = logits.softmax(-1).mean(1) if self.training else None                    # [B, *pools, n_expert]
        return gate, expert, usage


class SigmaMoE(nn.Module):
    """sum over the top-K experts e of gate[e] * relu(x W_up[e]) W_down[e]

    Slot s is one choice by one token, N * K in all. `route` sorts the slots by expert; `cvmm` then multiplies rows by
    the matrices of their experts only:
        out[s // fan_out] += gate[s] * x[s // fan_in] @ w[expert[s]]      gate (1 if left out) and expert are flattened
    So fan_in slots read the same row of x, and fan_out slots add up in the same row of out. Without fan_in (None, not
    1) row i of x is for the i-th sorted slot; without fan_out, row i of out is: the hidden units stay sorted."""

    def __init__(self, c: MoEUTConfig):
        super().__init__()
        self.router = Router(c, c.n_expert, c.top_k)
        self.w_up = normal(c, c.n_expert, c.n_embd, c.expert_size, inputs=c.n_embd)
        self.w_down = normal(c, c.n_expert, c.expert_size, c.n_embd, inputs=c.n_expert * c.expert_size)

    def forward(self, x: Tensor, n: Tensor) -> tuple[Tensor, Tensor | None]:
        gate, expert, usage = self.router(n)                                             # [B, T, K] both, [B, E]
        K, r = self.router.top_k, route(expert, len(self.w_up))  # sorts slots by expert, once for both matmuls
        h = cvmm(x.flatten(0, 1), self.w_up, r, fan_in=K).relu()                         # [N * K, F], sorted by expert
        y = cvmm(h, self.w_down, r, fan_out=K, gate=gate)                                # [N, C]
        return y.view_as(x), usage


class DenseFFN(nn.Module):
    """relu(x W_up + b_up) W_down + b_down"""

    def __init__(self, c: MoEUTConfig):
        super().__init__()
        self.w_up = normal(c, c.ffn_size, c.n_embd, inputs=c.n_embd)
        self.b_up = nn.Parameter(torch.zeros(c.ffn_size))
        self.w_down = normal(c, c.n_embd, c.ffn_size, inputs=c.ffn_size)
        self.b_down = nn.Parameter(torch.zeros(c.n_embd))

    def forward(self, x: Tensor, n: Tensor) -> tuple[Tensor, None]:
        h = F.linear(x, self.w_up, self.b_up).relu()                                     # [B, T, ffn_size]
        return F.linear(h, self.w_down, self.b_down), None                               # [B, T, C]


def rotary_table(head_size: int, start: int, stop: int, device=None) -> Tensor:
    """cos and sin [2, T, 1, 1, P] for the T positions from start to stop - 1. Pairs of dimensions of q and k are turned
    by an angle that grows with the position, so that their product depends on the distance only."""
    P = head_size // 4  # half of the dimensions of a head are rotated, in pairs
    frequency = 10000 ** -(torch.arange(P, device=device).float() / P)                   # [P]
    angle = torch.arange(start, stop, device=device).view(-1, 1, 1, 1) * frequency       # [T, 1, 1, P]
    return torch.stack((angle.cos(), angle.sin()))


def rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """Rotary positions for x [B, T, *, *, D]; dimension i, one of the first P, is paired with dimension i + P."""
    cos, sin = rotary.to(x.dtype)                                                        # [T, 1, 1, P] both
    P = cos.shape[-1]
    a, b, rest = x.tensor_split((P, 2 * P), dim=-1)                                      # a, b: [B, T, *, *, P]
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), dim=-1)


class LayerCache:
    """Rotated keys, and values after their experts, of the past tokens in one layer *application*: a layer that is
    applied three times sees three different inputs. So sharing makes caches no smaller; having fewer heads does."""

    k, v, length = None, None, 0  # [B, H, length, D] both


def attend(qk: Tensor, v: Tensor, rotary, cache: LayerCache | None) -> Tensor:
    """Causal attention of new tokens to past ones and themselves: qk [B, T, 2, H, D], v [B, T, H, D] -> [B, T, H, D]"""
    q, k = rotate(qk, rotary).transpose(1, 3).unbind(2)                                  # [B, H, T, D] both
    v = v.transpose(1, 2)                                                                # [B, H, T, D]
    if cache is not None:
        if cache.length:
            k, v = torch.cat((cache.k, k), dim=2), torch.cat((cache.v, v), dim=2)        # [B, H, S, D] both
        cache.k, cache.v, cache.length = k, v, k.shape[2]
    T, S = q.shape[2], k.shape[2]  # maybe symbolic. One query sees all keys; for T = S there is is_causal: faster
    mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T) if 1 < T < S else None
    a = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=True if 1 < T == S else False)  # a real bool
    return a.transpose(1, 2)                                                             # [B, T, H, D]


class SwitchHead(nn.Module):
    """Attention with dense queries and keys, and with A experts per head for values and outputs:

        v_h = sum over top-J e of gate_v[h, e] * x W_v[h, e]          gates of the token attended to
        a_h = softmax(q_h k_h^T / sqrt(D)) v_h                        causal
        out = sum_h sum over top-J e of gate_o[h, e] * a_h W_o[h, e]  gates of the token that attends

    One attention matrix serves all experts of a head, so that a few heads can have the parameters of many. Expert e of
    head h is matrix h * A + e of w_v and w_o."""

    def __init__(self, c: MoEUTConfig):
        super().__init__()
        C, H, D, A = c.n_embd, c.n_head, c.head_size, c.n_att_expert
        self.w_qk = normal(c, 2 * H * D, C, inputs=C)
        self.router = Router(c, A, c.att_top_k, pools=(2, H))
        self.w_v, self.w_o = normal(c, H * A, C, D, inputs=C), normal(c, H * A, D, C, inputs=H * D)

    def forward(self, x: Tensor, n: Tensor, rotary, cache: LayerCache | None = None) -> tuple[Tensor, Tensor | None]:
        B, T, _ = x.shape
        (_, H, A), J = self.router.shape, self.router.top_k
        gate, expert, usage = self.router(n)                                # [B, T, 2, H, J] both, [B, 2, H, A]
        qk = F.linear(n, self.w_qk).unflatten(-1, (2, H, -1))                            # [B, T, 2, H, D]
        if A > 4 or x.device.type != "cpu":  # else see below
            gate_v, gate_o = gate.unbind(2)                                              # [B, T, H, J] both
            matrix = expert + A * torch.arange(H, device=x.device).unsqueeze(1)          # [B, T, 2, H, J]
            r_v, r_o = (route(m, H * A) for m in matrix.unbind(2))
            v = cvmm(x.flatten(0, 1), self.w_v, r_v, fan_in=H * J, fan_out=J, gate=gate_v)  # [N * H, D]
            a = attend(qk, v.view(B, T, H, -1), rotary, cache)                           # [B, T, H, D]
            y = cvmm(a.flatten(0, 2), self.w_o, r_o, fan_in=J, fan_out=H * J, gate=gate_o)  # [N, C]
            return y.view_as(x), usage
        # tiny, small: a CPU multiplies by all of so few, with gate 0 if not chosen. A step is a tenth faster
        gates = gate.new_zeros(B, T, 2, H, A).scatter(-1, expert, gate).to(x.dtype)
        gate_v, gate_o = gates.unsqueeze(-1).unbind(2)                                   # [B, T, H, A, 1] both
        v = (x @ self.w_v.transpose(0, 1).flatten(1)).view(B, T, H, A, -1)               # [B, T, H, A, D]
        a = attend(qk, (v * gate_v).sum(3), rotary, cache).unsqueeze(3) * gate_o         # [B, T, H, A, D]
        return a.flatten(2) @ self.w_o.flatten(0, 1), usage                              # [B, T, C]


class DenseAttention(nn.Module):
    """Multi-head attention without biases. Also SwitchHead with one expert per head, as the authors have it: nothing is
    chosen, and only the gates of the outputs stay, one for each head."""

    def __init__(self, c: MoEUTConfig):
        super().__init__()
        C, H, D = c.n_embd, c.n_head, c.head_size
        self.w_qk, self.n_head = normal(c, 2 * H * D, C, inputs=C), H
        self.w_v, self.w_o = normal(c, H * D, C, inputs=C), normal(c, C, H * D, inputs=H * D)
        self.w_gate = normal(c, H, C, inputs=C) if c.attention == "moe" else None

    def forward(self, x: Tensor, n: Tensor, rotary, cache: LayerCache | None = None) -> tuple[Tensor, None]:
        qk = F.linear(n, self.w_qk).unflatten(-1, (2, self.n_head, -1))                  # [B, T, 2, H, D]
        v = F.linear(x, self.w_v).unflatten(-1, (self.n_head, -1))                       # [B, T, H, D]
        a = attend(qk, v, rotary, cache)                                                 # [B, T, H, D]
        if self.w_gate is not None:
            a = a * F.linear(n, self.w_gate).sigmoid().unsqueeze(-1)                     # [B, T, H, D]
        return F.linear(a.flatten(2), self.w_o), None                                    # [B, T, C]


class Layer(nn.Module):
    """Attention and feedforward with their layernorms; one of the G that are repeated."""

    def __init__(self, c: MoEUTConfig):
        super().__init__()
        self.layernorm, self.dropout = c.layernorm, nn.Dropout(c.dropout)
        self.ln1, self.ln2 = nn.LayerNorm(c.n_embd), nn.LayerNorm(c.n_embd)
        self.attention = SwitchHead(c) if c.attention == "moe" and c.n_att_expert > 1 else DenseAttention(c)
        self.ffn = SigmaMoE(c) if c.ffn == "moe" else DenseFFN(c)

    def forward(self, s: Tensor, rotary, cache: LayerCache | None = None) -> tuple[Tensor, tuple]:
        """s [B, T, C] -> [B, T, C], and the usage of attention and of feedforward experts (or None)."""
        s, att_usage = self.sublayer(s, self.ln1, self.attention, rotary, cache)
        s, ffn_usage = self.sublayer(s, self.ln2, self.ffn)
        return s, (att_usage, ffn_usage)

    def sublayer(self, s: Tensor, ln: nn.LayerNorm, module: nn.Module, *args) -> tuple[Tensor, Tensor | None]:
        n = s if self.layernorm == "post" else ln(s)
        x = n if self.layernorm == "pre" else s
        y, usage = module(x, n, *args)
        s = s + self.dropout(y)
        return ln(s) if self.layernorm == "post" else s, usage


class Output(NamedTuple):
    logits: Tensor  # [B, T, V]
    loss: Tensor | None  # cross_entropy + reg: what to backpropagate; None without targets
    cross_entropy: Tensor | None  # nats per token: what to report; None without targets
    reg: Tensor  # weighted sum of p log p, below 0; 0 in evaluation


class MoEUT(nn.Module):
    """The language model: embedding, L / G times the group of layers, layernorm (unless "post"), lm_head."""

    def __init__(self, c: MoEUTConfig):
        super().__init__()
        self.config = c
        self.recompute = False  # activation checkpointing: keep one [B, T, C] per layer application
        self.embedding = nn.Embedding(c.vocab_size, c.n_embd)
        nn.init.normal_(self.embedding.weight, std=1 / math.sqrt(c.n_embd))
        self.layers = nn.ModuleList(Layer(c) for _ in range(c.group_size))
        self.ln = nn.Identity() if c.layernorm == "post" else nn.LayerNorm(c.n_embd)
        self.lm_head = nn.Linear(c.n_embd, c.vocab_size)  # with a bias, not tied to the embedding

    def new_cache(self) -> list[LayerCache]:
        return [LayerCache() for _ in range(self.config.n_layer)]

    # Under torch.compile this loop stays Python, and what it calls become graphs: a layer is compiled once for all its
    # repeats, and its weight gradients are added up as they come. A single graph, as torch.export wants, would unroll
    # the loop and keep them all. checkpoint keeps its layer out of any graph: there torch 2.13 gets gradients wrong.
    @torch.compiler.disable(recursive=False)
    def forward(self, idx: Tensor, targets: Tensor | None = None, cache: list[LayerCache] | None = None) -> Output:
        """idx, targets [B, T] of token ids; a target of -1 is ignored. With a cache, idx continues the tokens in it.
        Any length works; positions beyond block_size were never trained. Raises ValueError for other shapes."""
        if idx.dim() != 2 or not idx.numel() or targets is not None and targets.shape != idx.shape:
            shapes = [tuple(t.shape) for t in (idx, targets) if t is not None]
            raise ValueError(f"idx, targets have shapes {shapes}: they must be [B, T] both, with at least one token.")
        c, start = self.config, cache[0].length if cache else 0
        rotary = rotary_table(c.head_size, start, start + idx.shape[1], idx.device)      # [2, T, 1, 1, P]
        s, usage = self.embedding(idx), [[] for _ in self.layers]                        # [B, T, C]
        for i in range(c.n_layer):
            g = i % c.group_size                                                         # A B A B ...
            layer, args = self.layers[g], (s, rotary, cache and cache[i])
            s, used = checkpoint(layer, *args, use_reentrant=False) if self.recompute else layer(*args)
            usage[g].append(used)
        return self.head(s, usage, targets)

    def head(self, s: Tensor, usage: list[list[tuple]], targets: Tensor | None) -> Output:
        """From the residual stream after the last layer to logits and losses."""
        logits, reg = self.lm_head(self.ln(s)), self.regulariser(usage)                  # [B, T, V], []
        if targets is None:
            return Output(logits, None, None, reg)
        cross_entropy = F.cross_entropy(logits.flatten(0, 1).to(sum_dtype(logits)), targets.flatten(), ignore_index=-1)
        return Output(logits, cross_entropy + reg, cross_entropy, reg)

    def regulariser(self, usage: list[list[tuple]]) -> Tensor:
        """Without it a few experts could win every token, and the others never learn. p, the usage by a sequence in all
        repeats of a layer, sums to 1 over the n experts of a pool: one pool in a feedforward, 2 H in an attention.
        The loss gets weight * (sum of p log p), between -log n (all are used alike) and 0 (one takes all): its mean
        over batch and heads, summed over values, outputs and the G layers. usage[g][i] is of repeat i of layer g."""
        total = torch.zeros((), device=self.lm_head.weight.device)
        for repeats in usage:
            att, ffn = zip(*repeats, strict=True)                                # [B, 2, H, A] and [B, E] each, or None
            for weight, used in ((self.config.att_reg, att), (self.config.ffn_reg, ffn)):
                if used[0] is not None:
                    p = torch.stack(used).mean(0).clamp_min(1e-37)  # [B, 2, H, A] or [B, E], sums to 1; 0 log 0 is nan
                    total = total + weight * (p * p.log()).sum(-1).mean(0).mean(-1).sum()      # [B, 2, H] or [B] -> []
        return total

    def generate(self, idx: Tensor, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None,
                 top_p: float | None = None, generator: torch.Generator | None = None) -> Iterator[Tensor]:
        """Continue idx [B, T]; yields the next token of every sequence, [B], max_new_tokens times. Call eval() first.
        temperature 0 takes the most likely token. top_k keeps the k most likely tokens (not experts), top_p the fewest
        that make up that probability. Only the newest block_size tokens of a prompt are read; when the cache is full,
        a new one is made from the newest half. Raises ValueError, at once, for arguments without meaning."""
        if idx.dim() != 2 or not idx.numel():
            raise ValueError(f"idx has shape {tuple(idx.shape)}: it must be [B, T], with at least one token.")
        if not (0 <= temperature < math.inf and (top_k is None or top_k >= 1) and (top_p is None or 0 < top_p <= 1)):
            raise ValueError(f"temperature is {temperature}, top_k {top_k}, top_p {top_p}: temperature must be at least"
                             " 0, top_k at least 1, top_p above 0 and at most 1.")
        top_k = 1 if temperature == 0 else top_k

        @torch.inference_mode()
        def tokens(idx, window):
            cache, new = self.new_cache(), idx[:, -window:]                              # new: not in the cache yet
            for _ in range(max_new_tokens):
                if cache[0].length + new.shape[1] > window:
                    cache, new = self.new_cache(), idx[:, -max(window // 2, 1):]
                logits = self(new, cache=cache).logits[:, -1].float()                    # [B, V]
                logits = (logits - logits.amax(-1, keepdim=True)) / max(temperature, 1e-37)  # at most 0: no overflow
                p, token = logits.softmax(-1).sort(-1, descending=True)                  # [B, V] both
                if top_k is not None:
                    p[:, top_k:] = 0
                if top_p is not None:
                    p[p.cumsum(-1) - p >= max(top_p, 1e-37) * p.sum(-1, keepdim=True)] = 0
                new = token.gather(-1, p.multinomial(1, generator=generator))            # [B, 1]
                idx = torch.cat((idx, new), dim=1)[:, -window:]
                yield new.squeeze(1)

        return tokens(idx, self.config.block_size)  # arguments are checked now, not when the first token is asked for


TRANSFORMER = dict(ffn="dense", attention="dense", layernorm="pre")  # the standard one, which the paper compares with
PAPER = dict(vocab_size=8000, block_size=1024)
PAPER_SIZES = (  # name, C; MoEUT, F 128: L, G, H, D, E, K, A; the Transformer of as many parameters: L, H, D, ffn_size
    ("44M", 412, (16, 2, 4, 82, 155, 12, 8), (16, 10, 41, 2053)),
    ("126M", 768, (18, 2, 4, 96, 254, 12, 10), (16, 16, 48, 3072)),
    ("244M", 1024, (18, 2, 4, 128, 387, 16, 10), (18, 16, 64, 4110)),
    ("318M", 1024, (24, 3, 4, 128, 338, 16, 10), (24, 16, 64, 4110)),
    ("727M", 1280, (36, 4, 5, 128, 467, 20, 13), (36, 20, 64, 5120)),
    ("1B", 1536, (36, 4, 6, 128, 565, 24, 12), (36, 24, 64, 6144)),
)
PRESETS = {name: MoEUTConfig(**sizes) for name, sizes in {
    # Made for two CPU cores: five architectures of one size, within 0.5% of the parameters; the Universal one is wider
    "tiny": dict(),  # MoEUT: the defaults above
    "dense-tiny": dict(TRANSFORMER, group_size=4, ffn_size=481),
    "universal-tiny": dict(TRANSFORMER, group_size=1, n_embd=100, head_size=25, ffn_size=631),
    "sigma-moe-tiny": dict(attention="dense", group_size=4, n_expert=15, expert_size=32, top_k=8),
    "switchhead-tiny": dict(
        TRANSFORMER, attention="moe", group_size=4, n_head=2, n_att_expert=4, att_top_k=2, ffn_size=441),
    # 0.6 of the dense model's MACs, as at the paper's larger sizes; few large experts: a CPU is slow at small matmuls
    "small": dict(n_embd=256, n_layer=8, head_size=32, n_expert=18, expert_size=320, block_size=256),
    "dense-small": dict(
        TRANSFORMER, n_embd=256, n_layer=8, group_size=8, n_head=8, head_size=32, ffn_size=1024, block_size=256),
    **{f"moeut-{size}": dict(PAPER, n_embd=C, n_layer=L, group_size=G, n_head=H, head_size=D, n_expert=E, top_k=K,
                             n_att_expert=A, att_top_k=2) for size, C, (L, G, H, D, E, K, A), _ in PAPER_SIZES},
    **{f"dense-{size}": dict(TRANSFORMER, **PAPER, n_embd=C, n_layer=L, group_size=L, n_head=H, head_size=D, ffn_size=n)
       for size, C, _, (L, H, D, n) in PAPER_SIZES},
}.items()}


def from_authors(state_dict: dict[str, Tensor], config: MoEUTConfig) -> MoEUT:
    """A model with weights of github.com/RobertCsordas/moeut or .../moeut_training_code. Raises RuntimeError if names
    or shapes do not fit. They do not show n_layer, top_k, att_top_k, nor whether layernorm is "peri" or "pre"."""
    model, parts, sel_o = MoEUT(config), {}, "router.w" if config.n_att_expert > 1 else "w_gate"
    for name, weight in sorted(state_dict.items(), reverse=True):  # so q comes before k, and sel_v before sel_o
        for theirs, ours in (
            (r"unique_|transformer\.|projections\.", ""), ("self_attn.norm", "ln1"), ("pkm.norm", "ln2"),
            ("self_attn", "attention"), ("pkm", "ffn"), ("selections.", "sel_"), ("^output", "lm_head"),
            (r"\.[qk](\.weight)?$", ".w_qk"), (r"\.([vo])$", r".w_\1"), ("sel_v$", "router.w"), ("sel_o$", sel_o),
            ("keys$", "w_up"), ("values$", "w_down"), ("expert_sel$", "router.w"), ("^out_norm", "ln"),
        ):
            name = re.sub(theirs, ours, name)
        if not name.endswith((".iter", ".kv_sel_counts_100")):  # statistics
            parts.setdefault(name, []).append(weight)
    model.load_state_dict({name: torch.cat(weights) for name, weights in parts.items()})
    return model
