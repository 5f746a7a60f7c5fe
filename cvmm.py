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
    slot            0  1  2  3  4  5                        slot     0  3 | 1  2  5 | 4
    expert          0  1  1  0  2  1     sort by expert     expert   0  0 | 1  1  1 | 2
                                                            offsets  0      2         5   6

From here on a *row* is a place in that sorted list, which holds the slots of expert 0, then those of
expert 1, ...; expert e owns the rows offsets[e] .. offsets[e+1]. This `Routing` is made once for every
decision of a router, and serves all matmuls that follow from it, forward and backward.

What a slot contributes is weighted by its *gate*, the router's score of its expert. `cvmm` knows no
gates; the functions for whole layers multiply by them where the tensors are narrowest: `expert_ffn`
(sigma-MoE, arXiv 2310.10837), `expert_values` and `expert_outputs` (SwitchHead, arXiv 2312.07987).

In this file, top to bottom: the definition; the routing (`route`); a shortcut for few slots; the PyTorch
path (any device); the Triton path; the choice between them; the custom ops; autograd; the public
functions `topk`, `cast`, `cvmm`, `expert_ffn`, `expert_values` and `expert_outputs`; the bench.

Letters: N tokens, K chosen experts (top_k), E experts, C width, F expert size, M slots, R rows (M, and
the padding on the PyTorch path); H heads, D head size, A experts per head, J chosen of them; a matrix
has I inputs and O outputs.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
import re
import statistics
import sys
import threading
import time
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# Triton takes 0.2 s to import and has no wheels for macOS and Windows: it is imported only where it is needed.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # kernels run in Python, also on CPU tensors: for tests
triton = None
if torch.cuda.is_available() or INTERPRETED or __name__ == "__main__":
    try:
        import triton
        import triton.language as tl
    except ImportError:
        pass

# ---------------------------------------------------------------------------------------------------
# The definition


def cvmm_definition(x: Tensor, w: Tensor, expert: Tensor, fan_in: int, fan_out: int) -> Tensor:
    """The operation, word for word; it gathers a whole matrix for every slot. All else is tested against this.

    Args: x [M / fan_in, I]; w [E, I, O]; expert [M], the expert of each slot.
    Returns [M / fan_out, O].
    """
    rows = x.repeat_interleave(fan_in, dim=0)                                # [M, I]
    out = torch.bmm(rows.unsqueeze(1), w[expert]).squeeze(1)                 # [M, O]
    return out.unflatten(0, (-1, fan_out)).sum(1)                            # [M / fan_out, O]


# ---------------------------------------------------------------------------------------------------
# Routing: the slots sorted by expert


class Routing(NamedTuple):
    """Which slots belong to which expert. Made by `route`, shared by all matmuls of one decision.

    On the PyTorch path there are R >= M rows, some of which are padding, and the experts stand in another
    order, see below. Few slots are not sorted; all but `expert` are empty then.
    """

    expert: Tensor  # [M] the expert of each slot
    slot: Tensor  # [R] the slot of each row, in the order of experts
    row: Tensor  # [M] the row of each slot: the inverse of `slot`
    offsets: Tensor  # [E + 1] where the rows of each expert begin, and where all end
    table: Tensor  # the work list: experts by size for PyTorch, tiles of rows for Triton


FEW_SLOTS = 64  # decoding, without gradients: up to here sorting costs more than it saves


def is_decoding(n_slots: int) -> bool:
    """The slots are so few that few_slots_matmul is the fastest way, but only forward."""
    return n_slots <= FEW_SLOTS and not torch.is_grad_enabled()


def route(expert: Tensor, n_expert: int) -> Routing:
    """Sort the slots by expert, with Triton without a host synchronisation.

    Args: expert, integer tensor of any shape, slots in token-major order. Its entries must be in [0, n_expert): that
    is not checked, because a GPU would have to be waited for.
    Returns the Routing that cvmm and expert_ffn take.
    Raises ValueError for 32768 experts or more, TypeError for experts that are not integers.
    """
    if n_expert >= 2**15:
        raise ValueError(f"route: {n_expert} experts are more than the 32767 that fit into 16 bits.")
    if expert.is_floating_point():
        raise TypeError(f"route: experts are numbers of dtype {expert.dtype}, but must be integers.")
    expert = expert.flatten().int()
    if is_decoding(expert.numel()):
        return Routing(expert, *[expert.new_empty(0)] * 4)
    return Routing(expert, *_sort_slots(expert, n_expert))  # torch_sort_slots or triton_sort_slots


# ---------------------------------------------------------------------------------------------------
# Few slots, when decoding: no sort. One or two tokens on a CPU: one vector times one matrix at a time. More: the
# matrices of the slots that add up are copied on top of each other, so that one matmul also does the sum.


def few_slots_matmul(x: Tensor, w: Tensor, expert: Tensor, fan_in: int, fan_out: int) -> Tensor:
    """What cvmm_definition computes: x [M / fan_in, I], w [E, I, O], expert [M] -> [M / fan_out, O]"""
    n_in, n_out = w.shape[1:]
    if len(expert) <= 4 and x.device.type == "cpu" and not torch.compiler.is_compiling():
        out = x.new_zeros(len(expert) // fan_out, n_out)
        for s, e in enumerate(expert.tolist()):
            out[s // fan_out].addmv_(w[e].T, x[s // fan_in])
        return out
    rows = x.unsqueeze(1).expand(-1, fan_in, -1).reshape(-1, 1, fan_out * n_in)  # [M / fan_out, 1, fan_out * I]
    matrices = w.index_select(0, expert).reshape(-1, fan_out * n_in, n_out)      # [M / fan_out, fan_out * I, O]
    return torch.bmm(rows, matrices).squeeze(1)                                  # [M / fan_out, O]


# ---------------------------------------------------------------------------------------------------
# The PyTorch path: batched matmuls over experts with equally many rows
#
# One small matmul uses two cores badly, several at once use them well. The experts are therefore ordered by their
# numbers of slots; up to 16 neighbours, padded to as many rows as the first of them, are multiplied in one bmm. All
# that one such group needs stays in the cache: its rows of x, a copy of its matrices, and its outputs, which are
# added to the result at once. Padding rows repeat a slot of their expert, with gate 0.
#
# The rows of an expert are a multiple of 8, because oneDNN, which multiplies bfloat16, compiles new code for
# every size that it meets: a millisecond, five times as long as the matmul itself.

ROW_STEP = 8
SMALLEST = 7 / 8  # an expert of a group has at least this many times the rows of the first, which limits the padding
GROUP_EXPERTS = 16  # at most; more fall out of the cache


def torch_sort_slots(expert: Tensor, n_expert: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """slot, row, offsets, and the work list: [E, 2] of expert and its rows, in falling order."""
    # The sort is stable, so that sums run in a fixed order and the rows of an expert ascend.
    ids = expert.cpu().numpy().astype(np.uint16)  # numpy sorts 16 bits by radix, 15 times faster than torch
    order, counts = ids.argsort(kind="stable"), np.bincount(ids, minlength=n_expert)
    by_count = np.argsort(-counts, kind="stable")
    sizes, size, members = [], 0, GROUP_EXPERTS
    for count in counts[by_count].tolist():
        if members == GROUP_EXPERTS or count < SMALLEST * size:  # begin a group
            size, members = -(-count // ROW_STEP) * ROW_STEP, 0
        members += 1
        sizes.append(size)
    ends = np.cumsum(sizes)
    offsets = np.append(np.empty(n_expert, np.int64), ends[-1])
    offsets[by_count] = ends - sizes
    # The r-th of the sorted slots moves from where its expert would begin without padding and without that order.
    begins, chosen = counts.cumsum() - counts, by_count[: np.count_nonzero(counts)]
    moved = np.arange(len(ids)) + np.repeat(offsets[:-1] - begins, counts)
    slot, row = np.zeros(padded_rows(len(ids), n_expert), np.int64), np.empty(len(ids), np.int64)
    slot[: ends[-1]] = np.repeat(order[begins[chosen]], sizes[: len(chosen)])  # what padding repeats
    slot[moved], row[order] = order, moved
    table = np.stack((by_count, sizes), axis=1)
    return tuple(torch.from_numpy(t).to(expert.device) for t in (slot, row, offsets, table))


def padded_rows(m: int, n_expert: int) -> int:
    """R: the most rows that m slots can take with their padding, whatever their experts are."""
    return int(m / SMALLEST) + ROW_STEP * n_expert


class Scratch(threading.local):
    """Buffers for the rows and the matrices of one group of experts, used again by the next: fresh memory would
    first have to come from the system page by page, and then into the cache."""

    def __init__(self):
        self.buffers = {}

    def __call__(self, name: str, like: Tensor, *shape: int) -> Tensor:
        """An array with the dtype and on the device of `like`. The last one of that name is overwritten."""
        key, size = (name, like.dtype, like.device), math.prod(shape)
        if key not in self.buffers or len(self.buffers[key]) < size:
            with torch.inference_mode(False):  # or training could not use what sampling has made
                self.buffers[key] = torch.empty(size, dtype=like.dtype, device=like.device)
        return self.buffers[key][:size].view(shape)


scratch = Scratch()


def _groups(table: Tensor):
    """Work list -> (experts [n], their rows as a slice) of each group."""
    experts, sizes = table.unbind(1)
    first = first_row = 0
    for size, same in itertools.groupby(sizes.tolist()):
        last = first + len(list(same))
        for i in range(first, last if size else first, GROUP_EXPERTS):
            n = min(GROUP_EXPERTS, last - i)
            yield experts[i:i + n], slice(first_row, first_row + n * size)
            first_row += n * size
        first = last


def _take(name: str, x: Tensor, index: Tensor, n: int) -> Tensor:
    """Rows of x, one block for each of n experts: [n, rows, width]."""
    out = scratch(name, x, len(index), x.shape[1])
    return torch.index_select(x, 0, index, out=out).unflatten(0, (n, -1))


def _matrices(w: Tensor, experts: Tensor) -> Tensor:
    """The matrices of n experts, next to each other: [n, I, O]."""
    n, (E, n_in, n_out) = len(experts), w.shape
    if n == 1:
        return w[int(experts)].unsqueeze(0)
    if w.mT.is_contiguous() and not w.is_contiguous():
        return _matrices(w.mT, experts).mT
    out = scratch("matrices", w, n, n_in, n_out)
    if n_in * n_out < 2**15:
        return torch.index_select(w, 0, experts, out=out)
    # Large matrices in eighths: whole ones index_select would divide among the cores, and bmm does not.
    parts = math.gcd(n_in * n_out, 8)
    index = experts.unsqueeze(1) * parts + torch.arange(parts, device=w.device)
    torch.index_select(w.reshape(E * parts, -1), 0, index.flatten(), out=out.view(n * parts, -1))
    return out


def sum_dtype(x: Tensor) -> torch.dtype:
    """Sums are made in float32 at least: of slots, and of the gradients of all repeats of a layer."""
    return torch.promote_types(x.dtype, torch.float32)


def _bmm(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """out [n, rows, O] = a [n, rows, I] @ b [n, I, O]"""
    if len(a) == 1:  # mm divides a single matmul among the cores better
        torch.mm(a[0], b[0], out=out[0])
        return out
    return torch.bmm(a, b, out=out)


def _bmm_dw(a: Tensor, b: Tensor, dw: Tensor, experts: Tensor) -> None:
    """dw[experts] = a [n, rows, I]^T @ b [n, rows, O]"""
    if len(experts) == 1 and dw.dtype == a.dtype:
        torch.mm(a[0].T, b[0], out=dw[int(experts)])
    else:
        out = _bmm(a.mT, b, scratch("matrices", a, len(a), *dw.shape[1:]))
        dw.index_copy_(0, experts, out.to(dw.dtype))


def _new_dw(w_shape, like: Tensor, table: Tensor) -> Tensor:
    """Memory for a weight gradient, with zeros for the experts that nobody chose."""
    dw = like.new_empty(w_shape, dtype=sum_dtype(like))
    return dw.index_fill_(0, table[table[:, 1] == 0, 0], 0)


def _add_slots(out: Tensor, target: Tensor, y: Tensor) -> None:
    """out[target[r]] += y[r] for all rows r, in a fixed order. y [n, rows, O]"""
    out.index_add_(0, target, y.flatten(0, 1).to(out.dtype))


def _row_gate(gate: Tensor, row: Tensor, n_rows: int, dtype) -> Tensor:
    """The gate of each row [R, 1]; 0 for padding."""
    return gate.new_zeros(n_rows, 1, dtype=dtype).index_copy_(0, row, gate.reshape(-1, 1).to(dtype))


def _is_slot(x: Tensor, r: Routing) -> Tensor:
    """1 for the rows that hold a slot, 0 for padding: [R, 1]"""
    return _row_gate(x.new_ones(len(r.row)), r.row, len(r.slot), x.dtype)


def torch_matmul(x, w, r: Routing, fan_in, fan_out):
    source, target, real = r.slot // fan_in, r.slot // fan_out, _is_slot(x, r)   # [R], [R], [R, 1]
    out = x.new_zeros(len(r.row) // fan_out, w.shape[2], dtype=sum_dtype(x))     # [M / fan_out, O]
    for experts, rows in _groups(r.table):
        n = len(experts)
        xe = _take("rows", x, source[rows], n).mul_(real[rows].unflatten(0, (n, -1)))
        y = scratch("hidden", x, *xe.shape[:2], w.shape[2])                      # [n, rows, O]
        _add_slots(out, target[rows], _bmm(xe, _matrices(w, experts), y))
    return out.to(x.dtype)


def torch_matmul_dw(x, dout, r: Routing, fan_in, fan_out):
    source, target, real = r.slot // fan_in, r.slot // fan_out, _is_slot(x, r)   # [R], [R], [R, 1]
    dw = _new_dw((len(r.table), x.shape[1], dout.shape[1]), x, r.table)          # [E, I, O]
    for experts, rows in _groups(r.table):
        n = len(experts)
        xe = _take("rows", x, source[rows], n).mul_(real[rows].unflatten(0, (n, -1)))
        _bmm_dw(xe, _take("hidden", dout, target[rows], n), dw, experts)
    return dw


# The feedforward:
#
#     z = x w_up                     backward:   dh  = dout w_down^T
#     h = gate * relu(z)                         dz  = gate * dh where h is not 0, else 0
#     y = h w_down                               dot = sum over F of dh * h = gate * dgate    (see _ExpertFFN)
#
# and the K rows y of a token add up.


def torch_ffn(x, w_up, w_down, gate, r: Routing):
    token = r.slot // gate.shape[1]                                              # [R]
    g = _row_gate(gate, r.row, len(token), x.dtype)                              # [R, 1]
    h = x.new_empty(len(token), w_up.shape[2])                                   # [R, F]
    out = torch.zeros_like(x, dtype=sum_dtype(x))                                # [N, C]
    for experts, rows in _groups(r.table):
        n = len(experts)
        he, ge = (t[rows].unflatten(0, (n, -1)) for t in (h, g))
        xe = _take("rows", x, token[rows], n)                                    # [n, rows, C]
        _bmm(xe, _matrices(w_up, experts), he).relu_().mul_(ge)                  # h, finished in place
        _add_slots(out, token[rows], _bmm(he, _matrices(w_down, experts), xe))   # in the place of xe
    h[r.offsets[-1]:] = 0  # not used, but a result of the op
    return out.to(x.dtype), h


def torch_ffn_backward(dout, x, h, w_up, w_down, gate, r: Routing):
    token = r.slot // gate.shape[1]                                              # [R]
    g = _row_gate(gate, r.row, len(token), x.dtype)                              # [R, 1]
    dot = gate.new_empty(len(token))                                             # [R]
    dx = torch.zeros_like(x, dtype=sum_dtype(x))                                 # [N, C]
    dw_up, dw_down = (_new_dw(w.shape, x, r.table) for w in (w_up, w_down))
    for experts, rows in _groups(r.table):
        n = len(experts)
        he, ge = (t[rows].unflatten(0, (n, -1)) for t in (h, g))
        de = _take("rows", dout, token[rows], n)                                 # [n, rows, C]
        dh = _bmm(de, _matrices(w_down, experts).mT, scratch("hidden", he, *he.shape))
        _bmm_dw(he, de, dw_down, experts)
        dot[rows] = (dh * he).sum(-1).flatten()
        dz = torch.ops.aten.threshold_backward.grad_input(dh.mul_(ge), he, 0, grad_input=dh)  # in place
        xe = _take("rows", x, token[rows], n)                                    # in the place of de
        _bmm_dw(xe, dz, dw_up, experts)
        _add_slots(dx, token[rows], _bmm(dz, _matrices(w_up, experts).mT, xe))   # in the place of xe
    return dx.to(x.dtype), dw_up, dw_down, dot.index_select(0, r.row).view_as(gate)


# ---------------------------------------------------------------------------------------------------
# The Triton path
#
# Two kernels. The first multiplies rows by the matrix of their expert; its rows are cut into tiles of
# at most BM rows that never span two experts, listed in `table` (-1 for the surplus, so that the grid
# has a fixed size and the host need not wait for the counts):
#
#     for each tile (expert, first row), for each block of BN columns:        one program
#         for each block of BK inputs:
#             acc += x[slot[rows] // fan_in, inputs] @ w[expert, inputs, columns]
#         out[slot[rows], columns] = acc                                      the caller sums the slots
#
# GATHER and SCATTER say whether x and out are numbered by slot, as here, or by row, as h is. The epilogue
# knows the two elementwise steps of the feedforward, while acc is still in registers:
#
#     "up"              h = gate * relu(acc)                           acc = x w_up
#     "down backward"   dz = gate * acc if h != 0 else 0, dot = <acc, h>   acc = dout w_down^T
#
# Nothing is added with atomics: every number is written once, in a fixed order of summation, and two
# runs give the same bits.


def jit(function):
    return triton.jit(function, do_not_specialize=["fan_in", "fan_out", "n_slots", "n_expert"]) if triton else function


@jit
def rows_kernel(
    # tensors
    x, w, out, gate, h, dot, slot, offsets, table,
    # sizes: slots, inputs, outputs
    n_slots, n_in, n_out,
    # slots that share a row of x
    fan_in,
    # strides
    stride_x, stride_we, stride_wi, stride_wo, stride_out,
    # x, out are numbered by slot (else by row)
    GATHER: tl.constexpr, SCATTER: tl.constexpr, EPILOGUE: tl.constexpr,
    # block sizes, number format
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    n_blocks = tl.cdiv(n_out, BN)
    tile = tl.program_id(0) // n_blocks  # the programs of one tile follow each other: its rows of x stay in L2
    expert = tl.load(table + 2 * tile).to(tl.int64)
    if expert < 0:
        return
    first = tl.load(table + 2 * tile + 1)
    end = tl.load(offsets + expert + 1)
    rows = first + tl.arange(0, BM)
    real = rows < end
    rows = tl.minimum(rows, end - 1)  # surplus rows repeat the last one and are not stored
    s = tl.load(slot + rows)
    source = s // fan_in if GATHER else rows
    block = tl.program_id(0) % n_blocks
    cols = block * BN + tl.arange(0, BN)
    inputs = tl.arange(0, BK)

    x_block = x + source.to(tl.int64)[:, None] * stride_x + inputs[None, :]                      # [BM, BK]
    w_block = w + expert * stride_we + inputs[:, None] * stride_wi + cols[None, :] * stride_wo   # [BK, BN]
    acc = tl.zeros((BM, BN), tl.float32)
    for i in range(0, n_in, BK):
        a = tl.load(x_block, mask=inputs[None, :] < n_in - i, other=0.0)
        b = tl.load(w_block, mask=(inputs[:, None] < n_in - i) & (cols[None, :] < n_out), other=0.0)
        if UPCAST:  # the interpreter multiplies bfloat16 wrongly
            a, b = a.to(tl.float32), b.to(tl.float32)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
        x_block += BK
        w_block += BK * stride_wi

    store = real[:, None] & (cols[None, :] < n_out)
    target = (s if SCATTER else rows).to(tl.int64)[:, None] * stride_out + cols[None, :]
    if EPILOGUE == "up":
        acc = tl.where(acc <= 0.0, 0.0, acc) * tl.load(gate + s)[:, None]  # tl.maximum would hide a NaN
    if EPILOGUE == "down backward":
        hidden = tl.load(h + rows.to(tl.int64)[:, None] * n_out + cols[None, :], mask=store, other=0.0).to(tl.float32)
        tl.store(dot + block.to(tl.int64) * n_slots + s, tl.sum(acc * hidden, 1), mask=real)
        acc = tl.where(hidden != 0.0, acc * tl.load(gate + s)[:, None], 0.0)
    tl.store(out + target, acc.to(out.dtype.element_ty), mask=store)


# The second kernel makes the gradient of the weights. One program owns one block of one expert's
# matrix, goes over that expert's rows and stores once, in float32:
#
#     for each expert (the heaviest first), each block of BM inputs x BN outputs:      one program
#         for each block of BK rows:
#             acc += x[slot[rows] // fan_in, inputs]^T @ dout[slot[rows] // fan_out, outputs]
#         dw[expert, inputs, outputs] = acc                                 zeros for an empty expert
#
# Where that makes too few programs to fill a GPU, the rows of an expert are split into equal parts.
# The slots of a block are loaded one round ahead, because the loads of x and dout have to wait for them.


@jit
def dw_kernel(
    # tensors
    x, dout, dw, slot, offsets, heaviest,
    # sizes: experts, inputs, outputs
    n_expert, n_in, n_out,
    # slots that share a row of x, of dout
    fan_in, fan_out,
    # strides
    stride_x, stride_dout,
    # x, dout are numbered by slot (else by row); parts of an expert
    GATHER_X: tl.constexpr, GATHER_DOUT: tl.constexpr, PARTS: tl.constexpr,
    # block sizes, number format
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    blocks_o = tl.cdiv(n_out, BN)
    blocks = tl.cdiv(n_in, BM) * blocks_o
    block = tl.program_id(0) % blocks
    expert = tl.load(heaviest + tl.program_id(0) // blocks // PARTS)
    part = tl.program_id(0) // blocks % PARTS
    begin, end = tl.load(offsets + expert), tl.load(offsets + expert + 1)
    length = tl.cdiv(tl.cdiv(end - begin, PARTS), BK) * BK
    begin += part * length
    end = tl.minimum(end, begin + length)

    inputs = block // blocks_o * BM + tl.arange(0, BM)
    outputs = block % blocks_o * BN + tl.arange(0, BN)
    rows = begin + tl.arange(0, BK)
    s = tl.load(slot + rows, mask=rows < end, other=0)
    acc = tl.zeros((BM, BN), tl.float32)
    for _ in range(begin, end, BK):
        real = (rows < end)[:, None]
        source = (s // fan_in if GATHER_X else rows).to(tl.int64)[:, None]
        target = (s // fan_out if GATHER_DOUT else rows).to(tl.int64)[:, None]
        a = tl.load(x + source * stride_x + inputs[None, :], mask=real & (inputs[None, :] < n_in), other=0.0)
        b = tl.load(dout + target * stride_dout + outputs[None, :], mask=real & (outputs[None, :] < n_out), other=0.0)
        rows += BK
        s = tl.load(slot + rows, mask=rows < end, other=0)
        if UPCAST:
            a, b = a.to(tl.float32), b.to(tl.float32)
        acc = tl.dot(tl.trans(a), b, acc, input_precision=PRECISION)

    matrix = (part * n_expert + expert).to(tl.int64) * n_in * n_out
    inside = (inputs[:, None] < n_in) & (outputs[None, :] < n_out)
    tl.store(dw + matrix + inputs[:, None] * n_out + outputs[None, :], acc, mask=inside)


# The launchers. All go through `launch`, where the bench and the tests listen.

SLOT_BYTES = 2**31  # limit for the outputs of all slots, [M, C], before their sum: above it the columns are computed
#                     in several passes, at least 128 at a time, which read the slots' inputs again
listeners = []  # each is called with kernel (None for a sum of slots), programs, tensors, other arguments


def launch(kernel, programs: int, tensors: dict, **rest):
    for listen in listeners:
        listen(kernel, programs, tensors, rest)
    if not tensors["x"].is_meta:  # sizes without data, for the report
        with torch.cuda.device_of(tensors["x"]):  # Triton launches on the current device, whatever the tensors are on
            kernel[(programs,)](**tensors, **rest)


def slot_sum(y: Tensor, fan_out: int, out: Tensor) -> None:
    """out [M / fan_out, O] = sums of fan_out rows of y [M, O], in float32"""
    for listen in listeners:
        listen(None, 0, dict(y=y, out=out), {})
    torch.sum(y.view(-1, fan_out, y.shape[1]), 1, out=out)


def block_rows(m: int, n_expert: int) -> int:
    """Rows of a tile: about the rows of an expert, from 16 to 128. Known without a look at the counts."""
    return min(max(triton.next_power_of_2(m // n_expert), 16), 128)


def number_format(x: Tensor) -> dict:
    """float32 follows torch's own switch for TF32."""
    if x.dtype == torch.float64:
        raise TypeError("The Triton kernels sum in float32 and take no float64: use float32, or a CPU.")
    tf32 = x.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" and not INTERPRETED
    return dict(PRECISION="tf32" if tf32 else "ieee", UPCAST=INTERPRETED and x.dtype == torch.bfloat16)


def schedule(x: Tensor) -> dict:
    """Found by `python cvmm.py --report`: no spills on sm_80 and sm_90."""
    return dict(BN=128, BK=64 if x.element_size() <= 2 else 32, num_warps=8, num_stages=3)


def aligned(x: Tensor) -> Tensor:
    """x [., I] as the kernels read it: the numbers of a row side by side, and padded to a multiple of 16 of them, or
    they could not be copied asynchronously."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    return F.pad(x, (0, -x.shape[-1] % 16)) if x.shape[-1] % 16 else x


def aligned_weight(w: Tensor) -> Tensor:
    """w [E, I, O], padded in the same way in both dimensions."""
    pad_i, pad_o = -w.shape[1] % 16, -w.shape[2] % 16
    if w.stride(1) == 1:  # a transposed view stays one
        return F.pad(w.mT, (0, pad_i, 0, pad_o)).mT if pad_i or pad_o else w
    return F.pad(w, (0, pad_o, 0, pad_i)) if pad_i or pad_o else w


def triton_sort_slots(expert: Tensor, n_expert: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """slot, row, offsets, and the tiles: [n, 2] of expert and first row."""
    ids, slot = expert.to(torch.int16).sort(stable=True)
    edges = torch.arange(n_expert + 1, device=ids.device, dtype=ids.dtype)
    offsets = torch.searchsorted(ids, edges)                                     # [E + 1]
    row = torch.empty_like(slot).scatter_(0, slot, torch.arange(len(slot), device=slot.device))
    bm = block_rows(len(slot), n_expert)
    tiles = (offsets.diff() + bm - 1) // bm                                      # [E] tiles of each expert
    ends = tiles.cumsum(0)
    tile = torch.arange(triton.cdiv(len(slot), bm) + n_expert, device=slot.device)
    owner = torch.searchsorted(ends, tile, right=True)                           # E for the surplus
    e = owner.clamp(max=n_expert - 1)
    first = offsets[e] + (tile - ends[e] + tiles[e]) * bm
    table = torch.stack((torch.where(owner < n_expert, e, -1), first), dim=1)
    return tuple(t.int() for t in (slot, row, offsets, table))


def launch_rows(x, w, out, r: Routing, fan_in, gather, scatter, epilogue="none", gate=None, h=None, dot=None):
    """out = rows of x times the matrices of their experts; see rows_kernel."""
    m, e = len(r.expert), len(r.offsets) - 1
    options = schedule(x)
    launch(
        rows_kernel, len(r.table) * triton.cdiv(out.shape[1], options["BN"]),
        dict(x=x, w=w, out=out, gate=gate, h=h, dot=dot, slot=r.slot, offsets=r.offsets, table=r.table),
        n_slots=m, n_in=x.shape[1], n_out=out.shape[1], fan_in=fan_in, stride_x=x.stride(0), stride_we=w.stride(0),
        stride_wi=w.stride(1), stride_wo=w.stride(2), stride_out=out.stride(0), GATHER=gather, SCATTER=scatter,
        EPILOGUE=epilogue, BM=block_rows(m, e), **number_format(x), **options)


def triton_matmul(x, w, r: Routing, fan_in, fan_out, gather=True):
    """gather: x is numbered by slot, [M / fan_in, I]; else by row, [R, I]."""
    n_out = w.shape[2]
    x, w = aligned(x), aligned_weight(w)
    m, o = len(r.expert), w.shape[2]
    out = x.new_empty(m // fan_out, o)
    columns_that_fit = SLOT_BYTES // (m * x.element_size()) // 128 * 128
    chunk = o if fan_out == 1 else min(o, max(columns_that_fit, 128))
    for c in range(0, o, chunk):
        columns = slice(c, min(c + chunk, o))
        y = out if fan_out == 1 else x.new_empty(m, columns.stop - c)            # [M, columns]
        launch_rows(x, w[:, :, columns], y, r, fan_in, gather, True)
        if fan_out > 1:
            slot_sum(y, fan_out, out[:, columns])
    return out[:, :n_out].contiguous()


def triton_matmul_dw(x, dout, r: Routing, fan_in, fan_out, gather_x=True, gather_dout=True):
    n_in, n_out, e = x.shape[1], dout.shape[1], len(r.offsets) - 1
    x, dout = aligned(x), aligned(dout)
    i, o = x.shape[1], dout.shape[1]
    options = schedule(x)
    bm = 128 if x.element_size() <= 2 else 64
    programs = e * triton.cdiv(i, bm) * triton.cdiv(o, options["BN"])
    parts = 1 if programs >= 256 else 4
    dw = x.new_empty(parts, e, i, o, dtype=torch.float32)
    launch(
        dw_kernel, programs * parts,
        dict(x=x, dout=dout, dw=dw, slot=r.slot, offsets=r.offsets,
             heaviest=r.offsets.diff().argsort(descending=True).int()),
        n_expert=e, n_in=i, n_out=o, fan_in=fan_in, fan_out=fan_out, stride_x=x.stride(0), stride_dout=dout.stride(0),
        GATHER_X=gather_x, GATHER_DOUT=gather_dout, PARTS=parts, BM=bm, **number_format(x), **options)
    dw = dw[0] if parts == 1 else dw.sum(0)
    return dw[:, :n_in, :n_out].contiguous()


def triton_ffn(x, w_up, w_down, gate, r: Routing):
    top_k, f = gate.shape[1], w_up.shape[2]
    x, w_up, gate = aligned(x), aligned_weight(w_up), gate.contiguous()
    h = x.new_empty(len(r.slot), w_up.shape[2])                                  # [R, F]
    launch_rows(x, w_up, h, r, top_k, True, False, "up", gate=gate)
    return triton_matmul(h[:, :f], w_down, r, 1, top_k, gather=False), h[:, :f].contiguous()


def triton_ffn_backward(dout, x, h, w_up, w_down, gate, r: Routing):
    top_k, f, m = gate.shape[1], h.shape[1], len(r.expert)
    hp, gate = aligned(h), gate.contiguous()
    w = aligned_weight(w_down.mT)                                                # [E, C, F]
    dz = torch.empty_like(hp)                                                    # [R, F]
    dot = gate.new_empty(triton.cdiv(hp.shape[1], schedule(x)["BN"]), m)         # one for each block of columns
    launch_rows(aligned(dout), w, dz, r, top_k, True, False, "down backward", gate=gate, h=hp, dot=dot)
    dz = dz[:, :f].contiguous()
    dw_down = triton_matmul_dw(h, dout, r, 1, top_k, gather_x=False)
    dx = triton_matmul(dz, w_up.mT, r, 1, top_k, gather=False)
    dw_up = triton_matmul_dw(x, dz, r, top_k, 1, gather_dout=False)
    return dx, dw_up, dw_down, (dot[0] if len(dot) == 1 else dot.sum(0)).view_as(gate)


# ---------------------------------------------------------------------------------------------------
# The backend: by the device of the tensors. Tests set `force` to compare the two.

force = None  # "PyTorch" | "Triton"


def backend(device: torch.device) -> str:
    """Which path tensors on that device take."""
    if force:
        return force
    return "Triton" if triton and device.type == "cuda" else "PyTorch"


def path(x: Tensor, torch_function, triton_function):
    return triton_function if backend(x.device) == "Triton" else torch_function


# ---------------------------------------------------------------------------------------------------
# The custom ops: opaque to torch.compile, which sees their shapes only


@torch.library.custom_op("moeut::sort_slots", mutates_args=())
def _sort_slots(expert: Tensor, n_expert: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return path(expert, torch_sort_slots, triton_sort_slots)(expert, n_expert)


@_sort_slots.register_fake
def _(expert, n_expert):
    m, on_triton = len(expert), backend(expert.device) == "Triton"
    new = lambda *shape: expert.new_empty(shape, dtype=torch.int32 if on_triton else torch.long)
    if on_triton:
        return new(m), new(m), new(n_expert + 1), new(triton.cdiv(m, block_rows(m, n_expert)) + n_expert, 2)
    return new(padded_rows(m, n_expert)), new(m), new(n_expert + 1), new(n_expert, 2)


@torch.library.custom_op("moeut::matmul", mutates_args=())
def _matmul(
    x: Tensor, w: Tensor, expert: Tensor, slot: Tensor, row: Tensor, offsets: Tensor, table: Tensor,
    fan_in: int, fan_out: int,
) -> Tensor:
    """x [M / fan_in, I], w [E, I, O] -> [M / fan_out, O]"""
    r = Routing(expert, slot, row, offsets, table)
    return path(x, torch_matmul, triton_matmul)(x, w, r, fan_in, fan_out)


@_matmul.register_fake
def _(x, w, expert, slot, row, offsets, table, fan_in, fan_out):
    return x.new_empty(expert.shape[0] // fan_out, w.shape[2])


@torch.library.custom_op("moeut::matmul_dw", mutates_args=())
def _matmul_dw(
    x: Tensor, dout: Tensor, expert: Tensor, slot: Tensor, row: Tensor, offsets: Tensor, table: Tensor,
    fan_in: int, fan_out: int,
) -> Tensor:
    """x [M / fan_in, I], dout [M / fan_out, O] -> [E, I, O]"""
    r = Routing(expert, slot, row, offsets, table)
    return path(x, torch_matmul_dw, triton_matmul_dw)(x, dout, r, fan_in, fan_out)


@_matmul_dw.register_fake
def _(x, dout, expert, slot, row, offsets, table, fan_in, fan_out):
    return x.new_empty(offsets.shape[0] - 1, x.shape[1], dout.shape[1], dtype=sum_dtype(x))


@torch.library.custom_op("moeut::ffn", mutates_args=())
def _ffn(
    x: Tensor, w_up: Tensor, w_down: Tensor, gate: Tensor, expert: Tensor, slot: Tensor, row: Tensor,
    offsets: Tensor, table: Tensor,
) -> tuple[Tensor, Tensor]:
    """-> out [N, C], h = gate * relu(x @ w_up) [R, F], row by row"""
    r = Routing(expert, slot, row, offsets, table)
    return path(x, torch_ffn, triton_ffn)(x, w_up, w_down, gate, r)


@_ffn.register_fake
def _(x, w_up, w_down, gate, expert, slot, row, offsets, table):
    return x.new_empty(x.shape[0], w_down.shape[2]), x.new_empty(slot.shape[0], w_up.shape[2])


@torch.library.custom_op("moeut::ffn_backward", mutates_args=())
def _ffn_backward(
    dout: Tensor, x: Tensor, h: Tensor, w_up: Tensor, w_down: Tensor, gate: Tensor, expert: Tensor,
    slot: Tensor, row: Tensor, offsets: Tensor, table: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> dx [N, C], dw_up [E, C, F], dw_down [E, F, C], gate * dgate [N, K]"""
    r = Routing(expert, slot, row, offsets, table)
    return path(x, torch_ffn_backward, triton_ffn_backward)(dout, x, h, w_up, w_down, gate, r)


@_ffn_backward.register_fake
def _(dout, x, h, w_up, w_down, gate, expert, slot, row, offsets, table):
    dw_up, dw_down = (w.new_empty(w.shape, dtype=sum_dtype(x)) for w in (w_up, w_down))
    return x.new_empty(x.shape), dw_up, dw_down, gate.new_empty(gate.shape)


@torch.library.custom_op("moeut::spread", mutates_args=())
def _spread(values: Tensor, expert: Tensor, n_expert: int) -> Tensor:
    """values, expert [..., K] -> [..., E]: zeros, and the values at the chosen experts"""
    return values.new_zeros(*values.shape[:-1], n_expert).scatter_(-1, expert, values)


@_spread.register_fake
def _(values, expert, n_expert):
    return values.new_empty(*values.shape[:-1], n_expert)


@functools.cache
def register_flops():
    """Let torch.utils.flop_counter see these ops: 2 operations for each multiply-accumulate of each slot. Not
    done at import, because the counter imports triton."""
    from torch.utils.flop_counter import register_flop_formula

    ops = torch.ops.moeut
    slots_times = lambda factor: lambda x, w_up, w_down, gate, expert, *_, **__: factor * expert[0] * w_up[1] * w_up[2]
    register_flop_formula(ops.matmul)(lambda x, w, expert, *_, **__: 2 * expert[0] * w[1] * w[2])
    register_flop_formula(ops.matmul_dw)(lambda x, dout, expert, *_, **__: 2 * expert[0] * x[1] * dout[1])
    register_flop_formula(ops.ffn)(slots_times(4))
    register_flop_formula(ops.ffn_backward)(lambda dout, x, h, *rest, **__: slots_times(8)(x, *rest))


# ---------------------------------------------------------------------------------------------------
# Autograd. _CVMM and _ExpertFFN take every weight twice: as the parameter, which receives the gradient in
# its own precision, and detached, in the precision of the matmul (see `cast`).


class _TopK(torch.autograd.Function):
    """topk, whose gradient is opaque to the compiler: torch 2.13's inductor, when it sees the scatter, may read
    the result before it is written, and the gates' gradient is lost."""

    @staticmethod
    def forward(ctx, logits, top_k):
        chosen, expert = logits.topk(top_k, dim=-1, sorted=False)
        ctx.save_for_backward(expert)
        ctx.mark_non_differentiable(expert)
        ctx.n_expert = logits.shape[-1]
        return chosen, expert

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dchosen, _):
        (expert,) = ctx.saved_tensors
        return _spread(dchosen.contiguous(), expert, ctx.n_expert), None


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


def topk(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The top_k largest logits and their experts (int64), both [..., top_k] and in no particular order, of logits
    [..., E]. Differentiable in logits."""
    return _TopK.apply(logits, top_k)


class Weight(NamedTuple):
    """Expert matrices [E, I, O], and the same in the precision of the matmul. Made by `cast`.

    `low` is detached: only _CVMM and _ExpertFFN read it, which return the gradient to `param`
    themselves; whatever is left to autograd must read `param`.
    """

    param: Tensor
    low: Tensor


def cast(w: Tensor) -> Weight:
    """Under autocast, the copy of w that the matmuls read; else w itself.

    Layers that are applied several times per step cast their experts once and hand the copy on;
    autograd would otherwise keep one copy per application. The gradient goes to w, in w's precision.
    """
    device = w.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else w.dtype
    return Weight(w, w.detach().to(dtype))


def _is_for(routing: Routing, n_expert: int) -> bool:
    """Whether a routing is for that many experts; that of few slots does not say."""
    return routing.offsets.shape[0] in (0, n_expert + 1)


def cvmm(x: Tensor, w: Tensor | Weight, routing: Routing, fan_in: int, fan_out: int) -> Tensor:
    """out[s // fan_out] += x[s // fan_in] @ w[expert[s]], differentiable in x and w.

    Args: x [M / fan_in, I]; w [E, I, O]; routing of M slots to E experts.
    Returns [M / fan_out, O] in the precision of the matmul: that of w or, under autocast, autocast's.
    Raises ValueError when the shapes do not fit. Has no second derivative.
    """
    w = w if isinstance(w, Weight) else cast(w)
    (E, n_in, _), m = w.low.shape, routing.expert.shape[0]
    if x.shape != (m // fan_in, n_in) or m % fan_in or m % fan_out or not _is_for(routing, E):
        raise ValueError(
            f"cvmm: x {tuple(x.shape)} with fan_in {fan_in}, w {tuple(w.low.shape)} and fan_out {fan_out} "
            f"do not fit {m} slots, or their routing is for another number of experts")
    x = x.to(w.low.dtype)
    if not routing.slot.numel():
        return few_slots_matmul(x, w.param.to(x.dtype), routing.expert, fan_in, fan_out)
    return _CVMM.apply(x, *w, fan_in, fan_out, *routing)


def expert_ffn(
    x: Tensor, w_up: Tensor | Weight, w_down: Tensor | Weight, gate: Tensor, routing: Routing
) -> Tensor:
    """out[n] = sum over k of gate[n, k] * relu(x[n] @ w_up[e]) @ w_down[e], with e = expert[n*K + k].

    Args: x [N, C]; w_up [E, C, F]; w_down [E, F, C]; gate [N, K], float32; routing of N*K slots to E experts. Gates
    must not be negative; the gradient of a gate of exactly 0 is taken to be 0, as it is for that of a sigmoid's input.
    Returns [N, C] in the precision of the matmul. Differentiable, once, in x, both weights and gate.
    Raises ValueError when the shapes do not fit.
    """
    w_up, w_down = (w if isinstance(w, Weight) else cast(w) for w in (w_up, w_down))
    (E, C, F_), m = w_up.low.shape, routing.expert.shape[0]
    if (gate.dim() != 2 or gate.numel() != m or x.shape != (gate.shape[0], C) or w_down.low.shape != (E, F_, C)
            or not _is_for(routing, E)):
        raise ValueError(
            f"expert_ffn: x {tuple(x.shape)}, gate {tuple(gate.shape)}, w_up {(E, C, F_)} and "
            f"w_down {tuple(w_down.low.shape)} do not fit each other and {m} slots, or their routing is for another "
            "number of experts")
    x = x.to(w_up.low.dtype)
    if not routing.slot.numel():
        h = few_slots_matmul(x, w_up.param.to(x.dtype), routing.expert, gate.shape[1], 1).relu()
        h = (h * gate.reshape(-1, 1)).to(x.dtype)
        return few_slots_matmul(h, w_down.param.to(x.dtype), routing.expert, 1, gate.shape[1])
    return _ExpertFFN.apply(x, *w_up, *w_down, gate, *routing)


# With few experts per head (J of A chosen), sorting the slots of an attention layer costs more on a CPU
# than multiplying by all experts, with a gate of 0 for those that were not chosen.
ALL_EXPERTS = 4  # up to this A / J


def _all_gates(gate: Tensor, expert: Tensor, n_expert: int) -> Tensor:
    """[N, H, J] -> [N, H, A, 1]: the gate of every expert, 0 where it was not chosen."""
    return gate.new_zeros(*gate.shape[:2], n_expert).scatter(2, expert, gate).unsqueeze(-1)


def _multiply_all(x: Tensor, gate: Tensor, n_expert: int) -> bool:
    few_experts = n_expert <= ALL_EXPERTS * gate.shape[2]
    return few_experts and backend(x.device) == "PyTorch" and not is_decoding(gate.numel())


def _number(expert: Tensor, n_expert: int) -> Tensor:
    """Experts of all heads in one list: expert a of head h is number h * A + a."""
    heads = torch.arange(0, expert.shape[1] * n_expert, n_expert, device=expert.device)
    return expert + heads.unsqueeze(1)


def _check_heads(name: str, x: Tensor, w: Weight, gate: Tensor, expert: Tensor, fits: bool):
    if gate.dim() != 3 or expert.shape != gate.shape or w.low.shape[0] % gate.shape[1] or not fits:
        shapes = ", ".join(str(tuple(t.shape)) for t in (x, w.low, gate, expert))
        raise ValueError(f"{name}: inputs, weights, gates and experts of shapes {shapes} do not fit each other")


def expert_values(x: Tensor, w: Tensor | Weight, gate: Tensor, expert: Tensor) -> Tensor:
    """v[n, h] = sum over j of gate[n, h, j] * x[n] @ w[h * A + expert[n, h, j]] (SwitchHead, values).

    Args: x [N, C]; w [H * A, C, D]; gate [N, H, J], float32; expert [N, H, J] in [0, A), distinct for a head.
    Returns [N, H, D] in the precision of the matmul. Differentiable in x, w and gate.
    Raises ValueError when the shapes do not fit.
    """
    w = w if isinstance(w, Weight) else cast(w)
    _check_heads("expert_values", x, w, gate, expert, fits=x.shape == (gate.shape[0], w.low.shape[1]))
    (N, H, J), D = gate.shape, w.low.shape[2]
    n_expert = w.low.shape[0] // H
    if _multiply_all(x, gate, n_expert):
        v = x.to(w.low.dtype) @ w.param.to(w.low.dtype).transpose(0, 1).flatten(1)   # [N, H * A * D]
        v = v.view(N, H, n_expert, D) * _all_gates(gate, expert, n_expert)           # [N, H, A, D]
        return v.sum(2).to(w.low.dtype)
    v = cvmm(x, w, route(_number(expert, n_expert), H * n_expert), H * J, 1)         # [N * H * J, D]
    return (v.view(N, H, J, D) * gate.unsqueeze(-1)).sum(2).to(v.dtype)              # [N, H, D]


def expert_outputs(a: Tensor, w: Tensor | Weight, gate: Tensor, expert: Tensor) -> Tensor:
    """out[n] = sum over h, j of gate[n, h, j] * a[n, h] @ w[h * A + expert[n, h, j]] (SwitchHead, outputs).

    Args: a [N, H, D]; w [H * A, D, C]; gate [N, H, J], float32; expert [N, H, J] in [0, A), distinct for a head.
    Returns [N, C] in the precision of the matmul. Differentiable in a, w and gate.
    Raises ValueError when the shapes do not fit.
    """
    w = w if isinstance(w, Weight) else cast(w)
    _check_heads("expert_outputs", a, w, gate, expert, fits=a.shape == (*gate.shape[:2], w.low.shape[1]))
    H, J = gate.shape[1:]
    n_expert = w.low.shape[0] // H
    if _multiply_all(a, gate, n_expert):
        a = a.unsqueeze(2) * _all_gates(gate, expert, n_expert)                      # [N, H, A, D]
        return a.flatten(1).to(w.low.dtype) @ w.param.to(w.low.dtype).flatten(0, 1)  # [N, C]
    a = (a.unsqueeze(2) * gate.unsqueeze(-1)).to(a.dtype)                            # [N, H, J, D]
    return cvmm(a.flatten(0, 2), w, route(_number(expert, n_expert), H * n_expert), 1, H * J)


# ---------------------------------------------------------------------------------------------------
# What a GPU could do at best

# Dense bfloat16 / float16 TFLOP/s and memory GB/s from the vendors' data sheets, by part of the name
PEAKS = {
    "H200": (989, 4800), "H100": (989, 3350), "A100": (312, 2039), "L40S": (362, 864), "RTX 4090": (165, 1008),
    "RTX 3090": (71, 936), "L4": (121, 300), "T4": (65, 320),
}  # fmt: skip


def device_peak(device: torch.device) -> tuple[float, float] | None:
    """FLOP/s in 16 bits and bytes/s of a known GPU."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for part, (tflops, gigabytes) in PEAKS.items():
            if re.search(rf"\b{part}\b", name):
                return tflops * 1e12, gigabytes * 1e9


# ---------------------------------------------------------------------------------------------------
# The bench, `python cvmm.py`, and what the compiler makes of the kernels, `python cvmm.py --report`

#           C     F    E   K  H    D   A  of the paper's models; J = 2
SHAPES = {
    "44M": (412, 128, 155, 12, 4, 82, 8),
    "244M": (1024, 128, 387, 16, 4, 128, 10),
    "1B": (1536, 128, 565, 24, 6, 128, 12),
}
TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "gfx942": ("hip", "gfx942", 64)}


def random_layer(C, F_, E, K, n_tokens, dtype, device, seed=0):
    """x, w_up, w_down, gate, expert, dout of a feedforward with random routing"""
    new = lambda *shape, std=1.0: torch.randn(shape, device=device).mul_(std).to(dtype)
    if device != "meta":
        torch.manual_seed(seed)
    gate, expert = torch.rand(n_tokens, E, device=device).topk(K)
    return new(n_tokens, C), new(E, C, F_, std=C**-0.5), new(E, F_, C, std=F_**-0.5), gate, expert, new(n_tokens, C)


def real_launches(name: str, n_tokens: int, dtype: torch.dtype) -> list[tuple]:
    """All Triton launches of one training step through one layer of that shape: kernel, programs, tensors,
    the other arguments, and what it is for. Nothing runs: the tensors have sizes only."""
    C, F_, E, K, H, D, A = SHAPES[name]
    x, w_up, w_down, gate, expert, dout = random_layer(C, F_, E, K, n_tokens, dtype, "meta")
    found, use = [], ""
    listeners.append(lambda *launched: found.append((*launched, use)))
    try:
        r = Routing(expert.flatten(), *triton_sort_slots(expert.flatten(), E))
        use = "ffn forward"
        _, h = triton_ffn(x, w_up, w_down, gate, r)
        use = "ffn backward"
        triton_ffn_backward(dout, x, h, w_up, w_down, gate, r)
        m, w = n_tokens * H * 2, x.new_empty(H * A, C, D)
        choice = expert.new_empty(m)
        r = Routing(choice, *triton_sort_slots(choice, H * A))
        slots = x.new_empty(m, D)
        use = "attention values forward"
        triton_matmul(x, w, r, H * 2, 1)
        use = "attention values backward"
        triton_matmul(slots, w.mT, r, 1, H * 2)
        triton_matmul_dw(x, slots, r, H * 2, 1)
        use = "attention output forward"
        triton_matmul(slots, w.mT.contiguous(), r, 1, H * 2)
        use = "attention output backward"
        triton_matmul(x, w, r, H * 2, 1)
        triton_matmul_dw(slots, x, r, 1, H * 2)
    finally:
        listeners.pop()
    return found


def n_bytes(tensors: dict) -> int:
    """Every tensor of a launch, read or written once."""
    return sum(t.nbytes for t in tensors.values() if t is not None)


def compile_for(target: str, kernel, tensors: dict, rest: dict):
    """Compile one launch ahead of time, with the types and the specialisation that the launch would have."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int32: "*i32"}
    options = {k: v for k, v in rest.items() if k.startswith("num_")}
    values = {**tensors, **{k: v for k, v in rest.items() if k not in options}}
    signature, constants, attributes = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        v, parameter = values[name], kernel.params[i]
        if parameter.is_constexpr or v is None or isinstance(v, int) and v == 1 and not parameter.do_not_specialize:
            signature[name], constants[(i,)] = "constexpr", v
            continue
        signature[name] = types[v.dtype] if isinstance(v, Tensor) else "i32" if v < 2**31 else "i64"
        if isinstance(v, Tensor) or v % 16 == 0 and not parameter.do_not_specialize:
            attributes[(i,)] = [["tt.divisibility", 16]]
    key = (kernel.__name__, *signature.items(), *sorted(constants.items()), *attributes, *options.items())
    return str(key), lambda: triton.compile(
        ASTSource(kernel, signature, constants, attributes), target=GPUTarget(*TARGETS[target]), options=options)


def inspect(compiled) -> dict:
    """What is in the machine code of an NVIDIA kernel: registers, bytes of stack (a spill) and of shared
    memory, tensor-core instructions, asynchronous copies, atomics and reductions."""
    import pathlib
    import subprocess
    import tempfile

    tool = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        cubin = pathlib.Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        dump = lambda flag: subprocess.run([tool, flag, cubin], check=True, capture_output=True, text=True).stdout
        usage, sass = dump("--dump-resource-usage"), dump("-sass")
    number = lambda field: int(re.search(rf"{field}:(\d+)", usage)[1])
    count = lambda *names: len(re.findall(rf"\b(?:{'|'.join(names)})\b", sass))
    return dict(
        registers=number("REG"), stack=number("STACK") + count("STL"), shared=compiled.metadata.shared,
        HGMMA=count("HGMMA"), HMMA=count("HMMA"), async_copies=count("LDGSTS", "UTMALDG"),
        atomics=count("RED", "REDG", "ATOM", "ATOMG", "ATOMS"))


def report(only: list[str]):
    """Compile every distinct launch of the shapes above for all targets and print a line for each.

    only: names of shapes, number formats, numbers of tokens and targets, to print less.
    """
    pick = lambda choices: [c for c in choices if c in only] or choices
    print("first seen as: kernel, use, shape, tokens, number format, rows of a tile, target")
    seen = set()
    for format in pick(["bfloat16", "float16", "float32", "tf32"]):
        torch.set_float32_matmul_precision("high" if format == "tf32" else "highest")
        dtype = torch.float32 if format == "tf32" else getattr(torch, format)
        for shape in pick(list(SHAPES)):
            for n_tokens in pick(["65536", "2048", "128"]):
                for kernel, _, tensors, rest, use in real_launches(shape, int(n_tokens), dtype):
                    for target in pick(list(TARGETS)) if kernel else ():
                        key, build = compile_for(target, kernel, tensors, rest)
                        if (target, key) not in seen:
                            seen.add((target, key))
                            compiled = build()
                            facts = inspect(compiled) if target.startswith("sm") else {}
                            print(kernel.__name__, use, shape, n_tokens, format, rest["BM"], target,
                                  *(f"{k} {v}" for k, v in facts.items()), sep=", ", flush=True)


def in_turn(functions: dict, rounds: int, device: torch.device) -> dict[str, float]:
    """Median seconds of each function, run in turn, A B C A B C ..., after two rounds of warmup."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    times = {name: [] for name in functions}
    for round_ in range(rounds + 2):
        for name, function in functions.items():
            wait()
            start = time.perf_counter()
            function()
            wait()
            if round_ >= 2:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t) for name, t in times.items()}


def verify(device: torch.device):
    """The feedforward and the attention matmuls against the definition, and two runs against each other."""
    for dtype, tolerance in ((torch.float32, 2e-3), (torch.float16, 4e-3), (torch.bfloat16, 3e-2)):
        for C, F_, E, K, n in ((64, 32, 7, 3, 111), (412, 128, 155, 12, 300), (256, 128, 64, 8, 500)):
            *inputs, expert, dout = random_layer(C, F_, E, K, n, dtype, device)
            x, w_up, *_ = inputs
            # Hidden units stay away from 0, where rounding could switch them and change gradients.
            x[:, 0], w_up[:, 0] = 8, torch.randn(E, F_).sign()
            inputs = [t.requires_grad_() for t in inputs]
            exact = [t.detach().double().requires_grad_() for t in inputs]
            flat = expert.flatten()

            def run():
                y = expert_ffn(*inputs, route(expert, E))
                z = cvmm(inputs[0], inputs[1], route(expert, E), K, 1)
                return [y, z, *torch.autograd.grad((y, z), inputs, (dout, torch.ones_like(z)))]

            h = cvmm_definition(exact[0], exact[1], flat, K, 1)
            y = cvmm_definition(h.relu() * exact[3].view(-1, 1), exact[2], flat, 1, K)
            want = [y, h, *torch.autograd.grad((y, h), exact, (dout.double(), torch.ones_like(h)))]
            one, two = run(), run()
            error = max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(one, want))
            same = all(torch.equal(a, b) for a, b in zip(one, two))
            print(f"{str(dtype)[6:]:9} C {C}, F {F_}, E {E}, K {K}, {n} tokens: largest error {error:.1e} of the "
                  f"largest value (at most {tolerance:.0e}), two runs {'equal' if same else 'DIFFER'}")
            if not (error < tolerance and same):
                sys.exit("The kernels are wrong on this device: do not use them.")


def bench():
    """Time the feedforward of the paper's models, or of smaller ones on a CPU, against what it replaces."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    peak = device_peak(device)
    name = "no GPU: the PyTorch path on the CPU, at small sizes"
    if device.type == "cuda":
        name = torch.cuda.get_device_name()
    print(f"{name}, torch {torch.__version__}, path: {backend(device)}")
    if peak:
        print(f"roofline: {peak[0] / 1e12:.0f} TFLOP/s and {peak[1] / 1e9:.0f} GB/s")
    verify(device)
    if device.type == "cuda":
        shapes = {name: (C, F_, E, K, 32768) for name, (C, F_, E, K, *_) in SHAPES.items()}
        dtypes, rounds = (torch.bfloat16,), 20
    else:
        shapes = {"small": (256, 128, 64, 8, 2048), "44M-like": (256, 128, 155, 12, 2048)}
        dtypes, rounds = (torch.float32, torch.bfloat16), 9
    for name, (C, F_, E, K, n) in shapes.items():
        for dtype in dtypes:
            bench_layer(name, C, F_, E, K, n, dtype, device, rounds, peak)


def bench_layer(name, C, F_, E, K, n, dtype, device, rounds, peak):
    print(f"\n{name}: C {C}, F {F_}, E {E}, K {K}, {n} tokens, {str(dtype)[6:]}")
    x, w_up, w_down, gate, expert, dout = random_layer(C, F_, E, K, n, dtype, device)
    inputs = [t.requires_grad_() for t in (x, w_up, w_down, gate)]
    dense = [t.requires_grad_() for t in (w_up[:K].detach().mT.flatten(0, 1).mT, w_down[:K].detach().flatten(0, 1))]

    def experts():
        return expert_ffn(*inputs, route(expert, E))

    def dense_pair():
        return (x @ dense[0]).relu() @ dense[1]

    def loop():
        out = torch.zeros_like(x)
        for e in range(E):
            token, k = (expert == e).nonzero(as_tuple=True)
            h = (x[token] @ w_up[e]).relu() * gate[token, k, None].to(dtype)
            out = out.index_add(0, token, h @ w_down[e])
        return out

    def grouped_mm():
        order = expert.flatten().argsort(stable=True)
        ends = torch.bincount(expert.flatten(), minlength=E).cumsum(0).int()
        h = F.grouped_mm(x[order // K], w_up, offs=ends).relu() * gate.flatten()[order, None].to(dtype)
        y = torch.empty(n * K, C, dtype=dtype, device=device)
        return y.index_copy(0, order, F.grouped_mm(h, w_down, offs=ends)).view(n, K, C).sum(1)

    rivals = {"dense pair": dense_pair, "loop": loop}
    try:
        grouped_mm()
        rivals["grouped_mm"] = grouped_mm
    except (RuntimeError, AttributeError) as e:
        print(f"grouped_mm does not take these shapes: {str(e).splitlines()[0]}")

    def forward(function):
        with torch.no_grad():
            function()

    def both(function):
        parameters = [x, *dense] if function is dense_pair else inputs
        torch.autograd.grad(function(), parameters, dout)

    flops = 4 * n * K * C * F_
    for use, run, factor in (("forward", forward, 1), ("forward + backward", both, 3)):
        seconds, ratios = [], []
        for title, rival in rivals.items():  # one at a time: several would push each other out of the cache
            t = in_turn({"experts": lambda: run(experts), title: lambda: run(rival)}, rounds, device)
            seconds.append(t["experts"])
            ratios.append(f"{t['experts'] / t[title]:.2f} x {title}")
        t = statistics.median(seconds)
        roof = f", {factor * flops / t / peak[0]:.0%} of the FLOP roofline" if peak else ""
        print(f"{use:20} {t * 1e3:8.2f} ms {factor * flops / t / 1e12:7.2f} TFLOP/s{roof}; time is {', '.join(ratios)}")
    if backend(device) != "Triton":
        return
    launches = []
    listeners.append(lambda *launched: launches.append(launched))
    both(experts)
    listeners.pop()
    for kernel, programs, tensors, rest in launches:
        if kernel:
            seconds = in_turn({"": lambda: kernel[(programs,)](**tensors, **rest)}, rounds, device)[""]
            work = 2 * n * K * C * F_
            roof = max(work / peak[0], n_bytes(tensors) / peak[1]) / seconds if peak else None
            print(f"  {kernel.__name__:12} {rest.get('EPILOGUE', ''):14} {seconds * 1e3:8.3f} ms "
                  f"{work / seconds / 1e12:6.0f} TFLOP/s {n_bytes(tensors) / seconds / 1e9:6.0f} GB/s"
                  + (f" {roof:5.0%} of the roofline" if peak else ""))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--report"]:
        if not triton:
            sys.exit("--report needs triton, which is not installed here.")
        report(sys.argv[2:])
    elif sys.argv[1:]:
        sys.exit("python cvmm.py runs the bench; python cvmm.py --report shows what the kernels compile to.")
    else:
        bench()
