"""MoEUT, the Mixture-of-Experts Universal Transformer (Csordas et al., 2024, arXiv 2405.16039).

A Universal Transformer applies the same layer over and over, so depth costs no parameters: so few are
left that a dense model would have to be far wider, and slower, to make up for them. MoEUT gets them back
at little cost, and makes repeated layers work, with three ideas:

1. Mixtures of experts in both halves of a layer: sigma-MoE in the feedforward (arXiv 2310.10837) and
   SwitchHead in the attention (arXiv 2312.07987). An expert is a small feedforward, or one matrix of an
   attention head. There are many, and every token uses a few of them, by its own choice.
2. Layer grouping: not one layer but a small group of G different ones is repeated, ABABAB... Neighbours
   can then do different parts of one job, and each needs fewer experts.
3. Peri-layernorm: a layernorm stands only where a softmax or sigmoid follows: before queries and keys,
   routers and the head. With pre-layernorm a layer sees inputs of one size at every depth, while the
   residual stream that it adds to grows: what it adds counts less and less, and a shared layer cannot
   make up for that. Experts that read the stream itself give outputs that grow with it.

The same file holds what the paper compares with: `ffn`, `attention`, `group_size` and `layernorm` in
the config turn MoEUT into the standard Transformer, the plain Universal Transformer, the sigma-MoE
Transformer and the SwitchHead Transformer.

Letters in the shape comments, code name and meaning:

    B                batch                              T               tokens of a sequence
    N                B * T, all tokens                  S               keys attended to
    C  n_embd        width of the residual stream
    L  n_layer       layer applications                 G  group_size   distinct layers
    H  n_head        attention heads                    D  head_size    width of a head
    E  n_expert      feedforward experts                K  top_k        ... chosen per token
    F  expert_size   hidden units of an expert (F_ in code)
    A  n_att_expert  experts per head                   J  att_top_k    ... chosen per token and head
    P                rotated dimensions of a head

A router is a linear map to `logits`, one for each expert; the `scores` are their sigmoids; top-K takes
the experts with the K largest; the `gate` of a chosen expert is its score, by which its output is
multiplied. Scores are not normalised, so that experts do not compete for a share. (Other mixtures of
experts limit the tokens of an expert and drop the rest; here all are served.)

Not in here: dropout of experts, load balancing beyond the paper's entropy term, sequence packing,
a tokenizer (see train.py).
"""

import math
from dataclasses import dataclass, fields
from functools import partial
from typing import Iterator, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# cvmm.py multiplies every token by the matrices of its chosen experts only; the top of that file says how.
from cvmm import Weight, cast, expert_ffn, expert_outputs, expert_values, route, topk

# ---------------------------------------------------------------------------------------------------
# Configuration


@dataclass
class MoEUTConfig:
    """All sizes and switches of a model. Raises ValueError, in one sentence, if they do not fit."""

    vocab_size: int = 257  # tokens; 257 = all bytes and end of text
    block_size: int = 128  # training context T; the model itself has no limit (rotary positions)
    n_layer: int = 4  # L, counts applications: a layer repeated three times counts three
    group_size: int = 2  # G distinct layers, repeated L / G times; G = L shares nothing
    n_embd: int = 64  # C
    n_head: int = 4  # H; the paper's MoEUTs have fewer than its dense models, because each head has A experts
    head_size: int = 16  # D; H * D need not be C
    ffn: str = "moe"  # moe (sigma-MoE) | dense
    n_expert: int = 8  # E; parameters grow with E, compute hardly
    expert_size: int = 128  # F; 128 in the paper
    top_k: int = 2  # K; compute grows with K * F
    ffn_size: int = 512  # hidden units of a dense feedforward
    attention: str = "moe"  # moe (SwitchHead) | dense
    n_att_expert: int = 2  # A
    att_top_k: int = 1  # J
    layernorm: str = "peri"  # peri | pre | post
    dropout: float = 0.0  # on the output of attention and feedforward; 0 in all runs of the paper
    ffn_reg: float = 0.01  # weight of the entropy regulariser on feedforward routers
    att_reg: float = 0.001  # ... on attention routers

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type is int and value < 1:
                raise ValueError(f"{field.name} is {value}: it must be at least 1.")
        for name, choices in {
            "ffn": ("moe", "dense"), "attention": ("moe", "dense"), "layernorm": ("peri", "pre", "post"),
        }.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}: choose one of {', '.join(choices)}.")
        for small, large in (("top_k", "n_expert"), ("att_top_k", "n_att_expert")):
            if getattr(self, small) > getattr(self, large):
                raise ValueError(
                    f"{small} is {getattr(self, small)}, but there are only {large} = "
                    f"{getattr(self, large)} experts to choose from.")
        if self.n_layer % self.group_size:
            raise ValueError(
                f"n_layer is {self.n_layer}: it must be a multiple of group_size = {self.group_size}, "
                "because whole groups are repeated.")
        if self.ffn == "dense" and self.layernorm == "peri":
            raise ValueError(
                "layernorm is 'peri', which would leave the input of a dense feedforward unnormalised: choose "
                "layernorm 'pre' or 'post'.")
        if self.head_size < 4:
            raise ValueError(f"head_size is {self.head_size}: it must be at least 4, of which 2 are rotated.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}: it must be at least 0 and below 1.")

    @property
    def n_repeat(self) -> int:
        return self.n_layer // self.group_size

    def macs_per_token(self, context: int | None = None) -> int:
        """Multiply-accumulates of one token's forward pass, embedding and head left out.

        `context` is the number of positions attended to, block_size if not given. This is the formula
        of the paper, which does not halve the attention for causality.
        """
        T, C, HD = self.block_size if context is None else context, self.n_embd, self.n_head * self.head_size
        attention = 2 * HD * T                                                   # q k^T; weights times v
        attention += 2 * C * HD                                                  # to q, k
        if self.attention == "moe":
            attention += 2 * self.att_top_k * HD * (C + 1)                       # to v, o; their gates
            attention += 2 * self.n_head * self.n_att_expert * C                 # routers
        else:
            attention += 2 * C * HD                                              # to v, o
        if self.ffn == "moe":
            ffn = self.top_k * self.expert_size * (2 * C + 1) + self.n_expert * C
        else:
            ffn = 2 * C * self.ffn_size
        return self.n_layer * (attention + ffn)

    def idle_params(self) -> int:
        """Parameters of the experts that a token does not choose in one application of each distinct layer.
        (In the next one it may choose others.)"""
        idle = 0
        if self.attention == "moe":
            idle += 2 * (self.n_att_expert - self.att_top_k) * self.n_head * self.head_size * self.n_embd
        if self.ffn == "moe":
            idle += 2 * (self.n_expert - self.top_k) * self.expert_size * self.n_embd
        return self.group_size * idle

    def estimate_flops(self) -> int:
        """Floating point operations per token of one training step: 2 per MAC, forward once and
        backward twice; the head included, and only the causal half of attention."""
        return 6 * (self.macs_per_token(self.block_size // 2) + self.n_embd * self.vocab_size)


def _moeut(C, L, G, H, D, E, K, A):
    return dict(n_embd=C, n_layer=L, group_size=G, n_head=H, head_size=D, n_expert=E, top_k=K,
                n_att_expert=A, att_top_k=2, vocab_size=8000, block_size=1024)


# The standard Transformer, which the paper compares with
TRANSFORMER = dict(ffn="dense", attention="dense", layernorm="pre")


def _dense(C, L, H, D, hidden):
    return dict(TRANSFORMER, n_embd=C, n_layer=L, group_size=L, n_head=H, head_size=D, ffn_size=hidden,
                vocab_size=8000, block_size=1024)


PRESETS = {
    # Made for two CPU cores: the five architectures with the same number of parameters, within 0.5%. The Universal
    # Transformer gets them by its width, 150: at width 64 its one feedforward would need 36 * 64 hidden units.
    "tiny": dict(),  # MoEUT: the defaults above
    "dense-tiny": dict(TRANSFORMER, group_size=4, ffn_size=481),
    "universal-tiny": dict(TRANSFORMER, group_size=1, n_embd=150, head_size=37, ffn_size=600),
    "sigma-moe-tiny": dict(attention="dense", group_size=4, n_expert=15, expert_size=32, top_k=8),
    "switchhead-tiny": dict(ffn="dense", layernorm="pre", group_size=4, n_head=2, n_att_expert=4, att_top_k=2,
                            ffn_size=441),
    # MoEUT needs 0.6 of the dense model's multiplications, as at the paper's larger sizes. Its experts are few and
    # large, because small matmuls keep a CPU waiting.
    "small": dict(n_embd=256, n_layer=8, head_size=32, n_expert=18, expert_size=320, block_size=256),
    "dense-small": dict(TRANSFORMER, n_embd=256, n_layer=8, group_size=8, n_head=8, head_size=32, ffn_size=1024,
                        block_size=256),
    # The paper's sizes (its table of hyperparameters; SentencePiece vocabulary of 8000).
    #                    C   L  G  H    D    E   K   A
    "moeut-44M": _moeut(412, 16, 2, 4, 82, 155, 12, 8),
    "moeut-126M": _moeut(768, 18, 2, 4, 96, 254, 12, 10),
    "moeut-244M": _moeut(1024, 18, 2, 4, 128, 387, 16, 10),
    "moeut-318M": _moeut(1024, 24, 3, 4, 128, 338, 16, 10),
    "moeut-727M": _moeut(1280, 36, 4, 5, 128, 467, 20, 13),
    "moeut-1B": _moeut(1536, 36, 4, 6, 128, 565, 24, 12),
    # Its dense baselines.
    #                    C   L   H   D  hidden
    "dense-44M": _dense(412, 16, 10, 41, 2053),
    "dense-126M": _dense(768, 16, 16, 48, 3072),
    "dense-244M": _dense(1024, 18, 16, 64, 4110),
    "dense-318M": _dense(1024, 24, 16, 64, 4110),
    "dense-727M": _dense(1280, 36, 20, 64, 5120),
    "dense-1B": _dense(1536, 36, 24, 64, 6144),
}


def dense_counterpart(name: str) -> str:
    """The preset of the standard Transformer with as many parameters."""
    return "dense-" + name.split("-")[-1]


def preset(name: str, **changes) -> MoEUTConfig:
    """The config of that name, with some fields changed. Raises ValueError for an unknown name."""
    if name not in PRESETS:
        raise ValueError(f"preset is {name!r}: choose one of {', '.join(PRESETS)}.")
    return MoEUTConfig(**{**PRESETS[name], **changes})


# ---------------------------------------------------------------------------------------------------
# Parts shared by all layers


class KVCache:
    """Keys and values of all past tokens, preallocated for `capacity` of them. Not to be used where gradients are.

    One entry per layer *application*: a layer that is repeated three times sees three different inputs. So repeating
    layers makes the cache no smaller; having fewer heads does. dtype must be that of the keys and values.
    """

    def __init__(self, config: MoEUTConfig, batch: int, capacity: int, device=None, dtype=None):
        shape = (2, config.n_layer, batch, config.n_head, capacity, config.head_size)
        self.kv = torch.empty(shape, device=device, dtype=dtype)                 # [2, L, B, H, capacity, D]
        self.capacity = capacity
        self.length = 0  # tokens stored; MoEUT.forward adds the new ones when all layers have appended theirs

    def append(self, application: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v [B, H, T, D] of the new tokens; return those of all tokens so far."""
        end = self.length + k.shape[2]
        if end > self.capacity:
            raise ValueError(f"KVCache: {end} tokens do not fit, capacity is {self.capacity}.")
        keys, values = self.kv[0, application], self.kv[1, application]          # [B, H, capacity, D] both
        if len(k) != len(keys):
            raise ValueError(f"KVCache: it was made for a batch of {len(keys)}, not {len(k)}.")
        keys[:, :, self.length:end], values[:, :, self.length:end] = k, v
        return keys[:, :, :end], values[:, :, :end]


def rotary_table(head_size: int, start: int, stop: int, device) -> tuple[Tensor, Tensor]:
    """cos and sin [T, P/2] for positions start..stop-1.

    Pairs of dimensions of q and k are turned by an angle that grows with the position, so that their
    product depends on the distance only. The first P dimensions of a head are rotated: half of them,
    rounded down to an even number; the base is 10000.
    """
    rotated = head_size // 4 * 2                                                          # P
    frequency = 10000 ** -(torch.arange(0, rotated, 2, device=device) / rotated)          # [P/2]
    angle = torch.arange(start, stop, device=device).unsqueeze(1) * frequency             # [T, P/2]
    return angle.cos(), angle.sin()


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary positions for x [..., T, D]; dimension i of the rotated part is paired with i + P/2."""
    cos, sin = (t.to(x.dtype) for t in rotary)                                   # [T, P/2]
    half = cos.shape[-1]
    a, b, rest = x.split((half, half, x.shape[-1] - 2 * half), dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), dim=-1)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention. q [B, H, T, D]; k, v [B, H, S, D] with S >= T: queries are the last T positions."""
    T, S = q.shape[2], k.shape[2]
    if T == 1 or T == S:  # one query sees all keys; else is_causal, which allows a faster kernel than a mask
        return F.scaled_dot_product_attention(q, k, v, is_causal=T > 1)
    mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class Router(nn.Linear):
    """Logits of all experts, [..., C] -> [..., n_choice * n_expert]: n_choice routers in one matrix. In float32 at
    least, also under autocast: in bfloat16 half of the tokens have a tie at the top-K cut."""

    def __init__(self, n_embd: int, n_expert: int, top_k: int, n_choice: int = 1):
        super().__init__(n_embd, n_choice * n_expert, bias=False)
        self.top_k, self.n_choice = top_k, n_choice  # read by train.py, which reports on the routing

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            dtype = torch.promote_types(x.dtype, torch.float32)
            return F.linear(x.to(dtype), self.weight.to(dtype))


def choose(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The experts with the top_k largest scores: gate and expert, both [..., top_k].

    The score is a sigmoid, which keeps the order, so only the chosen logits need one.
    """
    chosen, expert = topk(logits, top_k)
    return chosen.sigmoid(), expert


def usage(logits: Tensor) -> Tensor:
    """How much each expert is used over time: [B, T, ..., experts] -> [B, ..., experts]. Counts of choices have no
    gradient; the mean probability under a softmax stands for them, although the gate is a sigmoid."""
    return logits.softmax(-1).mean(1)


def negative_entropy(p: Tensor) -> Tensor:
    """sum_e p_e log p_e: 0 when one expert takes all, -log E when all are used alike.

    A p that has underflowed adds nothing, and neither does its gradient, which is of the order of p.
    """
    return (p * p.clamp_min(torch.finfo(p.dtype).tiny).log()).sum(-1)


# ---------------------------------------------------------------------------------------------------
# Feedforward
#
# x is what is transformed, by the feedforward or into values; n is what routers, queries and keys read. Only with
# peri-layernorm they differ: n = LN(x). `cast_weights` gives the expert weights in the precision of the matmuls;
# the model calls it once per step and hands them on as `weights`, or autograd would keep a copy for every repeat.


class DenseFFN(nn.Module):
    """relu(x W_up + b_up) W_down + b_down"""

    def __init__(self, c: MoEUTConfig):
        super().__init__()
        self.up = nn.Linear(c.n_embd, c.ffn_size)
        self.down = nn.Linear(c.ffn_size, c.n_embd)

    def init_weights(self, scale: float):
        for linear in (self.up, self.down):
            nn.init.normal_(linear.weight, std=scale / math.sqrt(linear.in_features))
            nn.init.zeros_(linear.bias)

    def cast_weights(self):
        return ()

    def forward(self, x: Tensor, n: Tensor, weights) -> tuple[Tensor, None]:
        """x [B, T, C] -> [B, T, C], and no logits."""
        return self.down(self.up(x).relu()), None


class SigmaMoE(nn.Module):
    """sum over the top-K experts e of gate[e] * relu(x W_up[e]) W_down[e], with gate = sigmoid(n W_router)."""

    def __init__(self, c: MoEUTConfig):
        super().__init__()
        self.top_k = c.top_k
        self.router = Router(c.n_embd, c.n_expert, c.top_k)
        self.w_up = nn.Parameter(torch.empty(c.n_expert, c.n_embd, c.expert_size))
        self.w_down = nn.Parameter(torch.empty(c.n_expert, c.expert_size, c.n_embd))

    def init_weights(self, scale: float):
        E, C, F_ = self.w_up.shape
        nn.init.normal_(self.router.weight, std=scale / math.sqrt(C))
        nn.init.normal_(self.w_up, std=scale / math.sqrt(C))
        nn.init.normal_(self.w_down, std=scale / math.sqrt(E * F_))  # E, not K: as in the paper's code

    def cast_weights(self) -> tuple[Weight, Weight]:
        return cast(self.w_up), cast(self.w_down)

    def forward(self, x: Tensor, n: Tensor, weights) -> tuple[Tensor, Tensor]:
        """x, n [B, T, C]: what the experts and what the router see. Returns [B, T, C] and logits."""
        logits = self.router(n)                                                  # [B, T, E]
        gate, expert = choose(logits.flatten(0, 1), self.top_k)                  # [N, K] both
        routing = route(expert, logits.shape[-1])  # sorts the tokens by expert, once for both matmuls
        out = expert_ffn(x.flatten(0, 1), *weights, gate, routing)               # [N, C]
        return out.view_as(x), logits


# ---------------------------------------------------------------------------------------------------
# Attention
#
# `remember(k, v)` adds the new keys and values to the cache, if there is one, and returns those of all tokens.


class DenseAttention(nn.Module):
    """Multi-head attention without biases."""

    def __init__(self, c: MoEUTConfig):
        super().__init__()
        self.n_head, self.head_size = c.n_head, c.head_size
        self.qk = nn.Linear(c.n_embd, 2 * c.n_head * c.head_size, bias=False)
        self.v = nn.Linear(c.n_embd, c.n_head * c.head_size, bias=False)
        self.o = nn.Linear(c.n_head * c.head_size, c.n_embd, bias=False)

    def init_weights(self, scale: float):
        for linear in (self.qk, self.v, self.o):
            nn.init.normal_(linear.weight, std=scale / math.sqrt(linear.in_features))

    def cast_weights(self):
        return ()

    def queries_and_keys(self, n: Tensor, rotary) -> Tensor:
        """n [B, T, C] -> [2, B, H, T, D], rotated."""
        qk = self.qk(n).unflatten(-1, (2, self.n_head, self.head_size))          # [B, T, 2, H, D]
        return rotate(qk.permute(2, 0, 3, 1, 4), rotary)                         # [2, B, H, T, D]

    def forward(self, x: Tensor, n: Tensor, weights, rotary, remember) -> tuple[Tensor, None]:
        """x, n [B, T, C]: what the values and what queries and keys are made of. Returns [B, T, C] and no logits."""
        q, k = self.queries_and_keys(n, rotary)                                  # [B, H, T, D] both
        v = self.v(x).unflatten(-1, (self.n_head, self.head_size))               # [B, T, H, D]
        k, v = remember(k, v.transpose(1, 2))                                    # [B, H, S, D] both
        a = attend(q, k, v)                                                      # [B, H, T, D]
        return self.o(a.transpose(1, 2).flatten(2)), None


class SwitchHead(DenseAttention):
    """Attention with dense queries and keys, and with A experts per head for values and outputs:

        v_h = sum over top-J e of gate_v[h, e] * x W_v[h, e]          (gates of the token attended to)
        a_h = softmax(q_h k_h^T / sqrt(D)) v_h                        (causal)
        out = sum_h sum over top-J e of gate_o[h, e] * a_h W_o[h, e]  (gates of the token that attends)

    One attention matrix serves all experts of a head, so that a few heads can have the parameters of many.
    Expert e of head h is matrix h * A + e of w_v and w_o.
    """

    def __init__(self, c: MoEUTConfig):
        nn.Module.__init__(self)  # not DenseAttention's: values and outputs are experts here
        self.n_head, self.head_size = c.n_head, c.head_size
        self.n_expert, self.top_k = c.n_att_expert, c.att_top_k
        self.qk = nn.Linear(c.n_embd, 2 * c.n_head * c.head_size, bias=False)
        self.router = Router(c.n_embd, c.n_att_expert, c.att_top_k, n_choice=2 * c.n_head)  # per head: values, outputs
        self.w_v = nn.Parameter(torch.empty(c.n_head * c.n_att_expert, c.n_embd, c.head_size))
        self.w_o = nn.Parameter(torch.empty(c.n_head * c.n_att_expert, c.head_size, c.n_embd))

    def init_weights(self, scale: float):
        for w in (self.qk.weight, self.router.weight, self.w_v):
            nn.init.normal_(w, std=scale / math.sqrt(self.qk.in_features))
        nn.init.normal_(self.w_o, std=scale / math.sqrt(self.n_head * self.head_size))

    def cast_weights(self) -> tuple[Weight, Weight]:
        return cast(self.w_v), cast(self.w_o)

    def forward(self, x: Tensor, n: Tensor, weights, rotary, remember) -> tuple[Tensor, Tensor]:
        """x, n [B, T, C]: what the value experts see, and what q, k and the routers see.

        Returns [B, T, C] and the logits [B, T, 2, H, A] of the routers for values and for outputs.
        """
        (B, T, _), H, J = x.shape, self.n_head, self.top_k
        w_v, w_o = weights
        logits = self.router(n).view(B, T, 2, H, self.n_expert)                  # [B, T, 2, H, A]
        gate, expert = choose(logits, J)                                         # [B, T, 2, H, J] both
        gate_v, gate_o = gate.flatten(0, 1).unbind(1)                            # [N, H, J] both
        expert_v, expert_o = expert.flatten(0, 1).unbind(1)                      # [N, H, J] both

        q, k = self.queries_and_keys(n, rotary)                                  # [B, H, T, D] both
        v = expert_values(x.flatten(0, 1), w_v, gate_v, expert_v)                # [N, H, D]
        k, v = remember(k, v.view(B, T, H, -1).transpose(1, 2))                  # [B, H, S, D] both
        a = attend(q, k, v).transpose(1, 2)                                      # [B, T, H, D]
        out = expert_outputs(a.flatten(0, 1), w_o, gate_o, expert_o)             # [N, C]
        return out.view_as(x), logits


# ---------------------------------------------------------------------------------------------------
# Layer and model


class Layer(nn.Module):
    """Attention and feedforward with their layernorms; one of the G that are repeated."""

    def __init__(self, c: MoEUTConfig):
        super().__init__()
        self.layernorm = c.layernorm
        self.ln1 = nn.LayerNorm(c.n_embd)
        self.attention = (SwitchHead if c.attention == "moe" else DenseAttention)(c)
        self.ln2 = nn.LayerNorm(c.n_embd)
        self.ffn = (SigmaMoE if c.ffn == "moe" else DenseFFN)(c)
        self.dropout = nn.Dropout(c.dropout)

    def cast_weights(self):
        """The expert weights in the precision of the matmuls."""
        return self.attention.cast_weights(), self.ffn.cast_weights()

    def forward(self, x: Tensor, weights, rotary, remember=lambda k, v: (k, v)):
        """x [B, T, C] -> [B, T, C], and the usage of attention and of feedforward experts: [B, 2, H, A] and [B, E],
        None where there are none and in evaluation."""
        att_weights, ffn_weights = weights
        if self.layernorm == "post":
            y, att_logits = self.attention(x, x, att_weights, rotary, remember)
            x = self.ln1(x + self.dropout(y))
            y, ffn_logits = self.ffn(x, x, ffn_weights)
            x = self.ln2(x + self.dropout(y))
        else:
            # Peri: only what goes into a softmax or sigmoid is normalised (n); what is transformed is not (x).
            n = self.ln1(x)
            y, att_logits = self.attention(x if self.layernorm == "peri" else n, n, att_weights, rotary, remember)
            x = x + self.dropout(y)
            n = self.ln2(x)
            y, ffn_logits = self.ffn(x if self.layernorm == "peri" else n, n, ffn_weights)
            x = x + self.dropout(y)
        att_usage = usage(att_logits) if self.training and att_logits is not None else None
        ffn_usage = usage(ffn_logits) if self.training and ffn_logits is not None else None
        return x, att_usage, ffn_usage


class Output(NamedTuple):
    logits: Tensor  # [B, T, vocab_size]
    loss: Tensor | None  # cross entropy in nats per token; None without targets
    reg: Tensor  # weighted entropy regulariser, to be added to the loss; 0 in evaluation and with a cache


class MoEUT(nn.Module):
    """The language model: embedding, n_repeat times the group of layers, layernorm, linear head."""

    def __init__(self, config: MoEUTConfig):
        super().__init__()
        self.config = config
        self.recompute = False  # activation checkpointing: keep one [B, T, C] per layer application
        self.embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.group_size))
        self.ln = nn.Identity() if config.layernorm == "post" else nn.LayerNorm(config.n_embd)
        self.head = nn.Linear(config.n_embd, config.vocab_size)  # with a bias, not tied to the embedding
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """Normal with standard deviation sqrt(2 / L) / sqrt(fan in), L counting applications; the fan in
        of w_down is E * F and that of w_o is H * D, as in the paper's code. The embedding has 1 / sqrt(C);
        layernorms and head stay as PyTorch made them."""
        nn.init.normal_(self.embedding.weight, std=1 / math.sqrt(self.config.n_embd))
        for layer in self.layers:
            layer.attention.init_weights(math.sqrt(2 / self.config.n_layer))
            layer.ffn.init_weights(math.sqrt(2 / self.config.n_layer))

    @classmethod
    def from_official(cls, state_dict: dict[str, Tensor], config: MoEUTConfig) -> "MoEUT":
        """A model with the weights of the authors: of `MoEUTLM` in their clean repository (github.com/
        RobertCsordas/moeut), or of the model in their training code (.../moeut_training_code).

        Args: its state_dict(); the config, whose sizes must be those of the weights.
        Raises ValueError when names or shapes do not fit. Shapes do not tell n_layer, top_k, att_top_k and layernorm:
        those must be right in the config.
        """
        training = "output.weight" in state_dict
        layer, head = ("unique_layers.{}.", "output") if training else ("transformer.layers.{}.", "lm_head")
        names = OFFICIAL_TRAINING_NAMES if training else OFFICIAL_NAMES
        theirs = {k: v for k, v in state_dict.items() if not k.endswith((".iter", ".kv_sel_counts_100"))}  # statistics
        ours = {}
        try:
            for g in range(config.group_size):
                for new, old in names.items():
                    ours[f"layers.{g}.{new}"] = torch.cat([theirs.pop(layer.format(g) + name) for name in old.split()])
            for new, old in {"embedding.weight": "embedding.weight", "ln.weight": "out_norm.weight",
                             "ln.bias": "out_norm.bias", "head.weight": head + ".weight",
                             "head.bias": head + ".bias"}.items():
                ours[new] = theirs.pop(old)
            model = cls(config)
            model.load_state_dict(ours)
        except KeyError as e:
            raise ValueError(
                f"These are not weights of the authors' MoEUT with this group_size: {e} is missing.") from None
        except RuntimeError as e:
            raise ValueError(
                f"The config does not fit the authors' weights: {str(e).splitlines()[-1].strip()}") from None
        if theirs:
            raise ValueError(f"The authors' weights hold more than this config has room for: {next(iter(theirs))}.")
        return model

    def n_params(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def forward(self, idx: Tensor, targets: Tensor | None = None, cache: KVCache | None = None) -> Output:
        """idx, targets [B, T] of token ids; a target of -1 is ignored. With a cache, idx continues the
        tokens in it. Any length works; positions beyond block_size were never trained."""
        start = 0 if cache is None else cache.length
        rotary = rotary_table(self.config.head_size, start, start + idx.shape[1], idx.device)
        weights = [layer.cast_weights() for layer in self.layers]  # once per step, not once per repeat
        att_usage = [[] for _ in self.layers]
        ffn_usage = [[] for _ in self.layers]

        x = self.embedding(idx)                                                  # [B, T, C]
        for repeat in range(self.config.n_repeat):
            for g, layer in enumerate(self.layers):
                if cache is not None:
                    application = repeat * self.config.group_size + g
                    x, *_ = layer(x, weights[g], rotary, partial(cache.append, application))
                    continue
                if self.recompute and torch.is_grad_enabled():
                    x, att, ffn = checkpoint(layer, x, weights[g], rotary, use_reentrant=False)
                else:
                    x, att, ffn = layer(x, weights[g], rotary)
                att_usage[g].append(att)
                ffn_usage[g].append(ffn)
        if cache is not None:
            cache.length += idx.shape[1]

        logits = self.head(self.ln(x))                                           # [B, T, vocab_size]
        loss = None
        if targets is not None:
            loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-1)
        return Output(logits, loss, self.regulariser(att_usage, ffn_usage, idx.device))

    def regulariser(self, att_usage, ffn_usage, device) -> Tensor:
        """Sum over the layers of the weighted negative entropy of expert usage, over all repeats and time
        steps of a sequence together; the more evenly the experts are used, the lower. Without it a few
        experts could win every token, and the others would never learn."""
        total = torch.zeros((), dtype=torch.float32, device=device)
        for att, ffn in zip(att_usage, ffn_usage):  # of all repeats of one layer
            if att and att[0] is not None:                                       # [B, 2, H, A] each
                evenness = negative_entropy(torch.stack(att).mean(0))            # [B, 2, H]
                total = total + self.config.att_reg * evenness.mean((0, 2)).sum()  # mean over heads, sum of v and o
            if ffn and ffn[0] is not None:                                       # [B, E] each
                total = total + self.config.ffn_reg * negative_entropy(torch.stack(ffn).mean(0)).mean()
        return total

    @torch.inference_mode()
    def generate(
        self, idx: Tensor, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None,
        top_p: float | None = None, generator: torch.Generator | None = None,
    ) -> Iterator[Tensor]:
        """Continue idx [B, T], T >= 1; yields the next token of every sequence, [B], max_new_tokens times.

        temperature 0 takes the most likely token. top_k keeps the k most likely tokens (not experts), top_p the
        fewest that make up that probability. Only the newest block_size tokens of a prompt are read; whenever
        the context is full, its newest half is read again and the rest forgotten. Call eval() first.
        Raises ValueError for a temperature, top_k or top_p that makes no sense.
        """
        if not temperature >= 0 or top_k is not None and top_k < 1 or top_p is not None and not 0 < top_p <= 1:
            raise ValueError(
                f"temperature is {temperature}, top_k {top_k}, top_p {top_p}: temperature must be at least 0, top_k at "
                "least 1, top_p above 0 and at most 1.")
        window = self.config.block_size
        cache = KVCache(self.config, len(idx), window, idx.device, self.head.weight.dtype)
        fresh = idx[:, -window:]  # tokens that are not in the cache yet
        for _ in range(max_new_tokens):
            if cache.length + fresh.shape[1] > window:
                cache.length, fresh = 0, idx[:, -max(window // 2, 1):]
            logits = self(fresh, cache=cache).logits[:, -1].float()              # [B, vocab_size]
            fresh = sample_token(logits, temperature, top_k, top_p, generator)   # [B, 1]
            idx = torch.cat((idx, fresh), dim=1)[:, -window:]
            yield fresh.squeeze(1)


def sample_token(logits: Tensor, temperature: float, top_k, top_p, generator) -> Tensor:
    """One token for each row of logits [B, vocab_size] -> [B, 1]"""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    p, token = (logits / temperature).softmax(-1).sort(-1, descending=True)      # [B, vocab_size] both
    if top_k is not None:
        p[:, top_k:] = 0
    if top_p is not None:
        p[p.cumsum(-1) - p >= top_p * p.sum(-1, keepdim=True)] = 0
    return token.gather(-1, p.multinomial(1, generator=generator))


# ---------------------------------------------------------------------------------------------------
# Names in the authors' code, and the printed table of presets

# Our names of a layer's parameters -> those of their clean repository; two of theirs are concatenated
OFFICIAL_NAMES = {
    "attention.qk.weight": "attention.q.weight attention.k.weight",
    "attention.router.weight": "attention.sel_v attention.sel_o",
    "attention.w_v": "attention.v", "attention.w_o": "attention.o",
    "ffn.w_up": "ffn.keys", "ffn.w_down": "ffn.values", "ffn.router.weight": "ffn.expert_sel",
    **{f"{ln}.{kind}": f"{ln}.{kind}" for ln in ("ln1", "ln2") for kind in ("weight", "bias")},
}
OFFICIAL_TRAINING_NAMES = {  # ... of their training code
    "attention.qk.weight": "self_attn.projections.q self_attn.projections.k",
    "attention.router.weight": "self_attn.selections.v self_attn.selections.o",
    "attention.w_v": "self_attn.projections.v", "attention.w_o": "self_attn.projections.o",
    "ffn.w_up": "pkm.keys", "ffn.w_down": "pkm.values", "ffn.router.weight": "pkm.expert_sel",
    "ln1.weight": "self_attn.norm.weight", "ln1.bias": "self_attn.norm.bias",
    "ln2.weight": "pkm.norm.weight", "ln2.bias": "pkm.norm.bias",
}


def count_params(config: MoEUTConfig) -> int:
    with torch.device("meta"):  # sizes without memory
        return MoEUT(config).n_params()


def print_presets():
    """A line for each preset: its sizes, and what a token costs."""
    print(f"{'preset':16} {'parameters':>13} {'active':>13} {'MACs/token':>13} {'/ dense':>7} {'KV cache':>11}")
    for name in PRESETS:
        config, dense = preset(name), preset(dense_counterpart(name))
        n_params, macs = count_params(config), config.macs_per_token()
        kv = 2 * config.n_layer * config.n_head * config.head_size * 2  # keys and values, of two bytes
        print(f"{name:16} {n_params:13,} {n_params - config.idle_params():13,} {macs:13,} "
              f"{macs / dense.macs_per_token():7.2f} {kv:11,}")
    print("""
active: without the experts that a token does not choose in one pass of the group. MACs: multiply-accumulates of
the forward pass at the training context, embedding and head left out. KV cache: bytes per token in 16 bits.""")


if __name__ == "__main__":
    print_presets()
