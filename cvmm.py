"""cvmm: conditional vector-matrix multiplication, the one operation behind every mixture of experts.

A router has chosen an expert for each of M *slots*; slot s is one (token, choice) pair, numbered
token by token. Every slot multiplies a row of x by the matrix of its expert:

    out[s // fan_out] += x[s // fan_in] @ w[expert[s]]          for s = 0 .. M-1

fan_in slots read the same row of x, and fan_out slots add up into the same row of the output. With
N tokens, K chosen experts, H heads and J chosen experts per head, those two integers cover it all:

    feedforward up       M = N*K      fan_in K      fan_out 1       token -> slots
    feedforward down     M = N*K      fan_in 1      fan_out K       slots -> token
    attention values     M = N*H*J    fan_in H*J    fan_out 1       token -> slots
    attention output     M = N*H*J    fan_in 1      fan_out H*J     slots -> token

The gradient for x is the same operation again, with w transposed and the two fans exchanged. The
gradient for w is the one other operation there is:

    dw[expert[s]] += x[s // fan_in]^T @ dout[s // fan_out]

A matmul wants many rows that share one matrix, so the slots are sorted by expert first. Three tokens
that choose two of three experts each:

    token             0     1     2
    slot            0  1  2  3  4  5                        order    0  3 | 1  2  5 | 4
    expert          0  1  1  0  2  1     sort by expert     expert   0  0 | 1  1  1 | 2
                                                            offsets  0      2         5   6

`order` lists the slots of expert 0, then those of expert 1, ...; expert e owns the entries
offsets[e] .. offsets[e+1]. This `Routing` is made once per choice and serves every matmul of the
layer, forward and backward.

In this file, top to bottom: the definition; the routing; the PyTorch path (any device); the custom
ops, autograd and the public functions `cvmm` and `expert_ffn`.

Letters: N tokens, K chosen experts (top_k), E experts, C width, F expert size, M slots; a matrix has
I inputs and O outputs.
"""

import functools
import os
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# ---------------------------------------------------------------------------------------------------
# The definition


def cvmm_definition(x: Tensor, w: Tensor, expert: Tensor, fan_in: int, fan_out: int) -> Tensor:
    """The operation, word for word; it gathers a whole matrix for every slot.

    Args: x [M / fan_in, I]; w [E, I, O]; expert [M], the expert of each slot.
    Returns [M / fan_out, O].

    All else in this file is tested against this. For a handful of slots it is also the fastest way.
    """
    rows = x.repeat_interleave(fan_in, dim=0) if fan_in > 1 else x           # [M, I]
    out = torch.bmm(rows.unsqueeze(1), w[expert]).squeeze(1)                 # [M, O]
    return out.unflatten(0, (-1, fan_out)).sum(1) if fan_out > 1 else out    # [M / fan_out, O]


# ---------------------------------------------------------------------------------------------------
# Routing: the slots sorted by expert


class Routing(NamedTuple):
    """Which slots belong to which expert. Made by `route`, shared by all matmuls of one choice.

    On the PyTorch path there are R >= M rows: some are padding, see below. Few slots are not sorted;
    all but `expert` are empty then.
    """

    expert: Tensor  # [M] the expert of each slot
    slot: Tensor  # [R] the slot of each row, in the order of experts (`order` in the picture)
    row: Tensor  # [M] the row of each slot: the inverse of `slot`
    offsets: Tensor  # [E + 1] where the rows of each expert begin
    table: Tensor  # the work list: groups of experts for PyTorch, tiles of rows for Triton


FEW_SLOTS = 64  # up to here (decoding) sorting costs more than it saves: the definition is used


def route(expert: Tensor, n_expert: int) -> Routing:
    """Sort the slots by expert, without a host synchronisation on a GPU.

    Args: expert, integer tensor of any shape with entries in [0, n_expert), slots in token-major order.
    """
    expert = expert.flatten()
    if expert.numel() <= FEW_SLOTS:
        return Routing(expert, *[expert.new_empty(0)] * 4)
    return Routing(expert, *_sort_slots(expert, n_expert))


# ---------------------------------------------------------------------------------------------------
# The PyTorch path: batched matmuls over consecutive experts
#
# One matmul per expert is too small to be fast on a CPU. Consecutive experts are therefore taken
# together in one bmm, each padded to as many rows as the longest of them. A group grows as long as
# its padding stays small. Padding rows read slot 0 and have gate 0.

MAX_PADDING = 1.125  # rows of a group, padding included / rows without
SPARE_ROWS = 16  # ... and this many more
GROUP_ROWS = 4096  # the rows of a group should fit in the cache


def torch_sort_slots(expert: Tensor, n_expert: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """slot, row, offsets, and the groups: [n, 4] of first expert, experts, first row, rows of each."""
    # The sort is stable, so that sums run in a fixed order and the rows of an expert ascend.
    ids = expert.cpu().numpy().astype(np.uint16)  # numpy sorts 16 bits by radix, 15 times faster than torch
    order, counts = ids.argsort(kind="stable"), np.bincount(ids, minlength=n_expert)
    count = counts.tolist()
    groups, starts, first, top = [], [], 0, 0
    while first < n_expert:
        last, longest, total = first + 1, count[first], count[first]
        while last < n_expert:
            rows, sum_rows = max(longest, count[last]), total + count[last]
            if rows * (last + 1 - first) > min(MAX_PADDING * sum_rows + SPARE_ROWS, GROUP_ROWS):
                break
            last, longest, total = last + 1, rows, sum_rows
        groups.append((first, last - first, top, longest))
        starts += [top + i * longest for i in range(last - first)]
        first, top = last, top + longest * (last - first)
    offsets = np.array([*starts, top])
    # The r-th of the sorted slots moves down by the padding before its expert.
    moved = np.arange(len(ids)) + np.repeat(offsets[:-1] - (counts.cumsum() - counts), counts)
    slot, row = np.zeros(padded_rows(len(ids), n_expert), np.int64), np.empty(len(ids), np.int64)
    slot[moved], row[order] = order, moved
    table = np.full((n_expert, 4), -1)
    table[: len(groups)] = groups
    return tuple(torch.from_numpy(t).to(expert.device) for t in (slot, row, offsets, table))


def padded_rows(m: int, n_expert: int) -> int:
    """What m slots can take at most with their padding: a size that does not depend on the choice."""
    return int(m * MAX_PADDING) + SPARE_ROWS * n_expert


def _groups(table: Tensor):
    """Work list -> (experts, rows, number of experts) of each group, as slices."""
    for first, n, top, rows in table.tolist():
        if n > 0:
            yield slice(first, first + n), slice(top, top + n * rows), n


def _take(x: Tensor, index: Tensor, n: int) -> Tensor:
    """Rows of x, one block for each of n experts: [n, rows, width]."""
    return x.index_select(0, index).unflatten(0, (n, -1))


def _sum_slots(y: Tensor, row: Tensor, fan_out: int) -> Tensor:
    """out[i] = sum over the fan_out slots of i of their rows of y, in a fixed order."""
    if fan_out == 1:
        return y.index_select(0, row)
    return F.embedding_bag(row.view(-1, fan_out), y, mode="sum")


def grad_dtype(x: Tensor) -> torch.dtype:
    """Weight gradients are float32 at least: the repeats of a shared layer add up in them."""
    return torch.promote_types(x.dtype, torch.float32)


def _bmm_into(out: Tensor, a: Tensor, b: Tensor) -> None:
    if out.dtype == a.dtype:
        torch.bmm(a, b, out=out)
    else:
        out.copy_(torch.bmm(a, b))


def _row_gate(gate: Tensor, row: Tensor, n_rows: int, dtype) -> Tensor:
    """The gate of each row [R, 1]; 0 for padding."""
    return gate.new_zeros(n_rows, 1, dtype=dtype).index_copy_(0, row, gate.reshape(-1, 1).to(dtype))


def torch_matmul(x, w, r: Routing, fan_in, fan_out):
    source = r.slot // fan_in                                                    # [R]
    y = x.new_empty(len(source), w.shape[2])                                     # [R, O]
    for e, rows, n in _groups(r.table):
        torch.bmm(_take(x, source[rows], n), w[e], out=y[rows].unflatten(0, (n, -1)))
    return _sum_slots(y, r.row, fan_out)


def torch_matmul_dw(x, dout, r: Routing, fan_in, fan_out):
    source, target = r.slot // fan_in, r.slot // fan_out                         # [R] both
    real = _row_gate(x.new_ones(len(r.row)), r.row, len(source), x.dtype)        # [R, 1]
    dw = x.new_empty(len(r.offsets) - 1, x.shape[1], dout.shape[1], dtype=grad_dtype(x))
    for e, rows, n in _groups(r.table):
        xe = _take(x, source[rows], n).mul_(real[rows].unflatten(0, (n, -1)))
        _bmm_into(dw[e], xe.mT, _take(dout, target[rows], n))
    return dw


def torch_ffn(x, w_up, w_down, gate, r: Routing):
    token = r.slot // gate.shape[1]                                              # [R]
    g = _row_gate(gate, r.row, len(token), x.dtype)                              # [R, 1]
    h = x.new_empty(len(token), w_up.shape[2])                                   # [R, F]
    y = x.new_empty(len(token), w_down.shape[2])                                 # [R, C]
    for e, rows, n in _groups(r.table):
        he, ge, ye = (t[rows].unflatten(0, (n, -1)) for t in (h, g, y))
        torch.bmm(_take(x, token[rows], n), w_up[e], out=he)
        torch.bmm(he.relu_().mul_(ge), w_down[e], out=ye)
    return _sum_slots(y, r.row, gate.shape[1]), h


def torch_ffn_backward(dout, x, h, w_up, w_down, gate, r: Routing):
    token = r.slot // gate.shape[1]                                              # [R]
    g = _row_gate(gate, r.row, len(token), x.dtype)                              # [R, 1]
    dot = gate.new_empty(len(token))                                             # [R]
    dx = x.new_empty(len(token), x.shape[1])                                     # [R, C]
    dw_up, dw_down = (torch.empty_like(w, dtype=grad_dtype(x)) for w in (w_up, w_down))
    for e, rows, n in _groups(r.table):
        he, ge, dxe = (t[rows].unflatten(0, (n, -1)) for t in (h, g, dx))
        xe, de = _take(x, token[rows], n), _take(dout, token[rows], n)
        dh = torch.bmm(de, w_down[e].mT)                                         # [n, rows, F]
        _bmm_into(dw_down[e], he.mT, de)
        dot[rows] = (dh * he).sum(-1).flatten()
        dz = dh.mul_(ge).mul_(he != 0)
        _bmm_into(dw_up[e], xe.mT, dz)
        torch.bmm(dz, w_up[e].mT, out=dxe)
    return _sum_slots(dx, r.row, gate.shape[1]), dw_up, dw_down, dot.index_select(0, r.row).view_as(gate)


# ---------------------------------------------------------------------------------------------------
# The custom ops: opaque to torch.compile, which sees their shapes only


def backend(device: torch.device) -> str:
    """Which path tensors on that device take."""
    return "PyTorch"


@torch.library.custom_op("moeut::sort_slots", mutates_args=())
def _sort_slots(expert: Tensor, n_expert: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch_sort_slots(expert, n_expert)


@_sort_slots.register_fake
def _(expert, n_expert):
    new = lambda *shape: expert.new_empty(shape, dtype=torch.long)
    return new(padded_rows(len(expert), n_expert)), new(len(expert)), new(n_expert + 1), new(n_expert, 4)


@torch.library.custom_op("moeut::matmul", mutates_args=())
def _matmul(
    x: Tensor, w: Tensor, expert: Tensor, slot: Tensor, row: Tensor, offsets: Tensor, table: Tensor,
    fan_in: int, fan_out: int,
) -> Tensor:
    """x [M / fan_in, I], w [E, I, O] -> [M / fan_out, O]"""
    return torch_matmul(x, w, Routing(expert, slot, row, offsets, table), fan_in, fan_out)


@_matmul.register_fake
def _(x, w, expert, slot, row, offsets, table, fan_in, fan_out):
    return x.new_empty(expert.shape[0] // fan_out, w.shape[2])


@torch.library.custom_op("moeut::matmul_dw", mutates_args=())
def _matmul_dw(
    x: Tensor, dout: Tensor, expert: Tensor, slot: Tensor, row: Tensor, offsets: Tensor, table: Tensor,
    fan_in: int, fan_out: int,
) -> Tensor:
    """x [M / fan_in, I], dout [M / fan_out, O] -> [E, I, O]"""
    return torch_matmul_dw(x, dout, Routing(expert, slot, row, offsets, table), fan_in, fan_out)


@_matmul_dw.register_fake
def _(x, dout, expert, slot, row, offsets, table, fan_in, fan_out):
    return x.new_empty(offsets.shape[0] - 1, x.shape[1], dout.shape[1], dtype=grad_dtype(x))


@torch.library.custom_op("moeut::ffn", mutates_args=())
def _ffn(
    x: Tensor, w_up: Tensor, w_down: Tensor, gate: Tensor, expert: Tensor, slot: Tensor, row: Tensor,
    offsets: Tensor, table: Tensor,
) -> tuple[Tensor, Tensor]:
    """-> out [N, C], h = gate * relu(x @ w_up) [R, F], row by row"""
    return torch_ffn(x, w_up, w_down, gate, Routing(expert, slot, row, offsets, table))


@_ffn.register_fake
def _(x, w_up, w_down, gate, expert, slot, row, offsets, table):
    return x.new_empty(x.shape[0], w_down.shape[2]), x.new_empty(slot.shape[0], w_up.shape[2])


@torch.library.custom_op("moeut::ffn_backward", mutates_args=())
def _ffn_backward(
    dout: Tensor, x: Tensor, h: Tensor, w_up: Tensor, w_down: Tensor, gate: Tensor, expert: Tensor,
    slot: Tensor, row: Tensor, offsets: Tensor, table: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> dx [N, C], dw_up [E, C, F], dw_down [E, F, C], gate * dgate [N, K]"""
    return torch_ffn_backward(dout, x, h, w_up, w_down, gate, Routing(expert, slot, row, offsets, table))


@_ffn_backward.register_fake
def _(dout, x, h, w_up, w_down, gate, expert, slot, row, offsets, table):
    dw_up, dw_down = (w.new_empty(w.shape, dtype=grad_dtype(x)) for w in (w_up, w_down))
    return torch.empty_like(x), dw_up, dw_down, torch.empty_like(gate)


# ---------------------------------------------------------------------------------------------------
# Autograd. Both functions take every weight twice: as the parameter, which receives the gradient in
# its own precision, and as a detached copy in the precision of the matmul (see `cast`).


class _CVMM(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, w_low, fan_in, fan_out, *routing):
        ctx.save_for_backward(x, w_low, *routing)
        ctx.fans = fan_in, fan_out
        return _matmul(x, w_low, *routing, fan_in, fan_out)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout):
        x, w, *routing = ctx.saved_tensors
        fan_in, fan_out = ctx.fans
        dout, dx, dw = dout.contiguous(), None, None
        if ctx.needs_input_grad[0]:
            dx = _matmul(dout, w.mT, *routing, fan_out, fan_in)
        if ctx.needs_input_grad[1]:
            dw = _matmul_dw(x, dout, *routing, fan_in, fan_out)
        return dx, dw, *[None] * 8


class _ExpertFFN(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w_up, w_up_low, w_down, w_down_low, gate, *routing):
        out, h = _ffn(x, w_up_low, w_down_low, gate, *routing)
        ctx.save_for_backward(x, h, w_up_low, w_down_low, gate, *routing)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout):
        x, h, w_up, w_down, gate, *routing = ctx.saved_tensors
        dx, dw_up, dw_down, dot = _ffn_backward(dout.contiguous(), x, h, w_up, w_down, gate, *routing)
        # h = gate * relu(z), so the gradient of the gate, <dh, relu(z)>, is <dh, h> / gate: the
        # experts' outputs are not needed. A sigmoid that is exactly 0 has gradient 0 anyway.
        dgate = torch.where(gate == 0, 0, dot / gate)
        return dx, dw_up, None, dw_down, None, dgate, *[None] * 5


# ---------------------------------------------------------------------------------------------------
# The public functions


class Weight(NamedTuple):
    """Expert matrices [E, I, O] with a copy in the precision of the matmul. Made by `cast`."""

    param: Tensor
    low: Tensor


def cast(w: Tensor) -> Weight:
    """Under autocast, the copy of w that the matmuls read.

    Layers that are applied several times per step cast their experts once and hand the copy on;
    autograd would otherwise keep one copy per application. The gradient goes to w, in w's precision.
    """
    device = w.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else w.dtype
    return Weight(w, w.detach().to(dtype))


def cvmm(x: Tensor, w: Tensor | Weight, routing: Routing, fan_in: int, fan_out: int) -> Tensor:
    """out[s // fan_out] += x[s // fan_in] @ w[expert[s]], differentiable in x and w.

    Args: x [M / fan_in, I]; w [E, I, O]; routing of M slots.
    Returns [M / fan_out, O] in the precision of the matmul (under autocast, autocast's).
    Raises ValueError when the shapes do not fit.
    """
    w = w if isinstance(w, Weight) else cast(w)
    m = routing.expert.shape[0]
    if x.shape[0] * fan_in != m or m % fan_out or x.shape[1] != w.low.shape[1]:
        raise ValueError(
            f"cvmm: x {tuple(x.shape)} with fan_in {fan_in}, w {tuple(w.low.shape)} and fan_out {fan_out} "
            f"do not fit {m} slots")
    x = x.to(w.low.dtype)
    if not routing.slot.numel():
        return cvmm_definition(x, w.param.to(x.dtype), routing.expert, fan_in, fan_out)
    return _CVMM.apply(x, *w, fan_in, fan_out, *routing)


def expert_ffn(
    x: Tensor, w_up: Tensor | Weight, w_down: Tensor | Weight, gate: Tensor, routing: Routing
) -> Tensor:
    """out[n] = sum over k of gate[n, k] * relu(x[n] @ w_up[e]) @ w_down[e], with e = expert[n*K + k].

    Args: x [N, C]; w_up [E, C, F]; w_down [E, F, C]; gate [N, K], float32; routing of N*K slots.
    Returns [N, C] in the precision of the matmul. Differentiable in x, both weights and gate.
    Raises ValueError when the shapes do not fit.
    """
    w_up, w_down = (w if isinstance(w, Weight) else cast(w) for w in (w_up, w_down))
    if gate.numel() != routing.expert.shape[0] or x.shape != (gate.shape[0], w_up.low.shape[1]):
        raise ValueError(
            f"expert_ffn: x {tuple(x.shape)}, gate {tuple(gate.shape)} and w_up {tuple(w_up.low.shape)} "
            f"do not fit {routing.expert.shape[0]} slots")
    x = x.to(w_up.low.dtype)
    if not routing.slot.numel():
        h = cvmm_definition(x, w_up.param.to(x.dtype), routing.expert, gate.shape[1], 1).relu()
        h = (h * gate.reshape(-1, 1)).to(x.dtype)
        return cvmm_definition(h, w_down.param.to(x.dtype), routing.expert, 1, gate.shape[1])
    return _ExpertFFN.apply(x, *w_up, *w_down, gate, *routing)


# With few experts per head (J of A chosen), sorting the slots of an attention layer costs more on a CPU
# than multiplying by all experts: there, gates of 0 stand for the experts that were not chosen.
ALL_EXPERTS = 4  # up to this A / J


def _all_gates(gate: Tensor, expert: Tensor, n_expert: int) -> Tensor:
    """[N, H, J] -> [N, H, A, 1]: the gate of every expert, 0 where it was not chosen."""
    return gate.new_zeros(*gate.shape[:2], n_expert).scatter(2, expert, gate).unsqueeze(-1)


def _multiply_all(x: Tensor, gate: Tensor, n_expert: int) -> bool:
    few = gate.numel() <= FEW_SLOTS
    return backend(x.device) == "PyTorch" and not few and n_expert <= ALL_EXPERTS * gate.shape[2]


def _number(expert: Tensor, n_expert: int) -> Tensor:
    """Experts of all heads in one list: expert a of head h is number h * A + a."""
    heads = torch.arange(0, expert.shape[1] * n_expert, n_expert, device=expert.device)
    return expert + heads.unsqueeze(1)


def expert_values(x: Tensor, w: Tensor | Weight, gate: Tensor, expert: Tensor) -> Tensor:
    """v[n, h] = sum over j of gate[n, h, j] * x[n] @ w[h, expert[n, h, j]] (SwitchHead, values).

    Args: x [N, C]; w [H * A, C, D]; gate [N, H, J], float32; expert [N, H, J] in [0, A).
    Returns [N, H, D] in the precision of the matmul. Differentiable in x, w and gate.
    """
    w = w if isinstance(w, Weight) else cast(w)
    N, H, J = gate.shape
    n_expert = w.low.shape[0] // H
    if _multiply_all(x, gate, n_expert):
        v = x.to(w.low.dtype) @ w.param.to(w.low.dtype).transpose(0, 1).flatten(1)   # [N, H * A * D]
        v = v.view(N, H, n_expert, -1) * _all_gates(gate, expert, n_expert)          # [N, H, A, D]
        return v.sum(2).to(w.low.dtype)
    v = cvmm(x, w, route(_number(expert, n_expert), H * n_expert), H * J, 1)         # [N * H * J, D]
    return (v.view(N, H, J, -1) * gate.unsqueeze(-1)).sum(2).to(v.dtype)             # [N, H, D]


def expert_outputs(a: Tensor, w: Tensor | Weight, gate: Tensor, expert: Tensor) -> Tensor:
    """out[n] = sum over h, j of gate[n, h, j] * a[n, h] @ w[h, expert[n, h, j]] (SwitchHead, outputs).

    Args: a [N, H, D]; w [H * A, D, C]; gate [N, H, J], float32; expert [N, H, J] in [0, A).
    Returns [N, C] in the precision of the matmul. Differentiable in a, w and gate.
    """
    w = w if isinstance(w, Weight) else cast(w)
    H, J = gate.shape[1:]
    n_expert = w.low.shape[0] // H
    if _multiply_all(a, gate, n_expert):
        a = a.unsqueeze(2) * _all_gates(gate, expert, n_expert)                      # [N, H, A, D]
        return a.flatten(1).to(w.low.dtype) @ w.param.to(w.low.dtype).flatten(0, 1)  # [N, C]
    a = (a.unsqueeze(2) * gate.unsqueeze(-1)).to(a.dtype)                            # [N, H, J, D]
    return cvmm(a.flatten(0, 2), w, route(_number(expert, n_expert), H * n_expert), 1, H * J)
