"""cvmm: conditional vector-matrix multiplication, the one operation behind every mixture of experts.

A router has chosen an expert for each of M *slots*; slot s is one choice of one token, numbered token by token. Every
slot multiplies a row of x by the matrix of its expert and weights the result by its *gate*, the router's score:

    out[s // fan_out] += gate[s] * x[s // fan_in] @ w[expert[s]]          for s = 0 .. M-1

fan_in slots read the same row of x, and fan_out slots add up into the same row of the output. A matmul wants many rows
that share one matrix, so the slots are sorted by expert first. Three tokens that choose two of three experts each:

    token             0     1     2
    slot            0  1  2  3  4  5                        slot     0  3 | 1  2  5 | 4
    expert          0  1  1  0  2  1     sort by expert     expert   0  0 | 1  1  1 | 2
                                                            offsets  0      2         5   6

A place of the sorted list is called a *row*, without "of x": expert e owns rows offsets[e] .. offsets[e+1] - 1. Where a
fan is left out, x or the output consists of these rows, one for each slot: so hidden units go from up to down.
With N tokens, K chosen experts, H heads and J chosen experts per head, the two fans cover it all:

    feedforward up       M = N*K      fan_in K      -                token -> rows     sigma-MoE, arXiv 2310.10837
    feedforward down     M = N*K      -             fan_out K        rows -> token
    attention values     M = N*H*J    fan_in H*J    fan_out J        token -> heads    SwitchHead, arXiv 2312.07987
    attention outputs    M = N*H*J    fan_in J      fan_out H*J      heads -> token

dx is the same operation again, with w transposed and the fans exchanged; dgate falls out of it; dw is new:

    dx[s // fan_in]  += gate[s] * dout[s // fan_out] @ w[expert[s]]^T
    dgate[s]          = <dout[s // fan_out] @ w[expert[s]]^T, x[s // fan_in]>       the product above, before its gate
    dw[expert[s]]    += gate[s] * x[s // fan_in]^T @ dout[s // fan_out]

Letters: M slots; E experts, of all heads; a matrix has I inputs and O outputs; C width, F expert size.
"""

from __future__ import annotations  # not evaluated: those of the kernels name `tl`, which may be missing

import contextlib
import functools
import os
import time
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Triton takes 0.2 s to import and has no wheels for macOS and Windows: it is imported only where it is needed.
triton = None
if torch.cuda.is_available() or "TRITON_INTERPRET" in os.environ:
    with contextlib.suppress(ImportError):
        import triton
        import triton.language as tl

INTERPRETED = triton and tl.constexpr(triton.knobs.runtime.interpret)  # in Python, also on a CPU: for tests
jit = triton.jit if triton else lambda function: function
force = None  # "PyTorch" | "Triton", in tests
capability = functools.cache(torch.cuda.get_device_capability)


@torch.compiler.assume_constant_result
def backend(device: torch.device) -> str:
    """The path that tensors on this device take. Before Ampere, GPUs have too little shared memory."""
    return force or ("Triton" if triton and device.type == "cuda" and capability(device) >= (8, 0) else "PyTorch")


# The definition ------------------------------------------------------------------------------------------------------


def definition(x: Tensor, w: Tensor, expert: Tensor, fan_in: int = 1, fan_out: int = 1, gate: Tensor | None = None):
    """The operation, word for word, with both fans: x [M / fan_in, I], w [E, I, O], expert [M], gate [M] ->
    [M / fan_out, O]. All else is tested against it; for the few slots of a decoded token nothing is faster on a CPU."""
    out = x.new_zeros(len(expert) // fan_out, w.shape[2], dtype=sum_dtype(x))
    gate = x.new_ones(len(expert)) if gate is None else gate.to(x.dtype)
    for s, e in enumerate(expert.tolist()):
        out[s // fan_out] += gate[s] * x[s // fan_in] @ w[e].to(x.dtype)
    return out.to(x.dtype)


def batched(x: Tensor, w: Tensor, expert: Tensor, fan_in: int, fan_out: int, gate: Tensor | None):
    """The same for the few slots of a decoded token on a GPU, where each launch costs more than a copy of matrices."""
    x = x.repeat_interleave(fan_in, 0).unsqueeze(1)                                              # [M, 1, I]
    y = (x @ w[expert].to(x.dtype)).view(-1, fan_out, w.shape[2])                                # [M / fan_out, .., O]
    return y.sum(1, dtype=y.dtype) if gate is None else (gate.view(-1, 1, fan_out).to(y.dtype) @ y).squeeze(1)


def few(m: int, device: torch.device) -> bool:
    """Whether m slots are so few that sorting costs more than it saves: those of a decoded token, without gradients."""
    return not (torch.is_grad_enabled() or torch.compiler.is_compiling()) and m <= (16 if device.type == "cpu" else 64)


def sum_dtype(x: Tensor) -> torch.dtype:
    """Sums are in float32 at least: those over slots, and those of a shared w's gradients over its repeats."""
    return torch.promote_types(x.dtype, torch.float32)


# Routing -------------------------------------------------------------------------------------------------------------


class Routing(NamedTuple):
    """The slots sorted by expert. Made by `route`, shared by all matmuls of one decision, forward and backward."""

    expert: Tensor  # [M] the expert of each slot
    n_expert: int
    row: Tensor | None = None  # [M] the row of each slot; None if they are so few that nobody sorts: row s is slot s
    slot: Tensor | None = None  # [M] the slot of each row
    offsets: Tensor | None = None  # [E + 1] where the rows of each expert begin, and where all end
    tiles: Tensor | None = None  # [n, 2] for the first kernel: expert and first row of each tile; None for PyTorch


def route(expert: Tensor, n_expert: int) -> Routing:
    """Sort the slots by expert; for Triton without a host synchronisation.

    Args: expert, integers in [0, n_expert), of any shape, slots in token-major order.
    Raises TypeError for experts that are not integers; ValueError for n_expert < 1 and, in cvmm, for an expert out of
    range. The Triton path does not check: such a token gets arbitrary numbers, or the GPU stops the program.
    """
    if expert.is_floating_point() or expert.is_complex() or expert.dtype == torch.bool:
        raise TypeError(f"route: experts are numbers of dtype {expert.dtype}, but must be integers.")
    if n_expert < 1:
        raise ValueError(f"route: n_expert is {n_expert}: it must be at least 1.")
    expert, path = expert.flatten().long(), backend(expert.device)
    if few(len(expert), expert.device) and (path == "Triton" or all(0 <= e < n_expert for e in expert.tolist())):
        return Routing(expert, n_expert)  # an expert that does not exist is left to `experts`, which raises
    ids, slot = expert.sort(stable=True)  # so that sums have a fixed order      [M] both
    row = torch.empty_like(slot).scatter_(0, slot, torch.arange(len(slot), device=slot.device))  # [M]
    offsets = torch.searchsorted(ids, torch.arange(n_expert + 1, device=ids.device))
    tiles = tile_table(offsets, len(slot), n_expert).int() if path == "Triton" else None
    return Routing(expert, n_expert, row.int(), slot.int(), offsets.int(), tiles)


# The custom ops, and the PyTorch path: gather all rows, a matmul per expert, sum the slots ----------------------------


def opaque(name: str, fake):
    """Hides a function from torch.compile: there it is a custom op, whose shapes `fake` gives. Elsewhere it stays a
    function, because the first call of a custom op takes 2 seconds, to import the compiler."""
    def decorate(function):
        op = torch.library.custom_op(f"moeut::{name}", function, mutates_args=())
        op.register_fake(fake)
        return functools.wraps(function)(lambda *a, **k: (op if torch.compiler.is_compiling() else function)(*a, **k))
    return decorate


def gather(x: Tensor, slot: Tensor, fan: int | None) -> Tensor:
    """A row for each slot, in the order of experts: [M, width]"""
    return x if fan is None else x.index_select(0, slot // fan)


def experts(slot: Tensor, offsets: Tensor):
    """(expert, its rows as a slice) for each expert, also for those without rows."""
    ends = offsets.tolist()
    if ends[0] > 0 or ends[-1] < len(slot):
        raise ValueError(f"An expert was chosen that is not one of the {len(ends) - 1}: they are numbered from 0.")
    return enumerate(map(slice, ends, ends[1:]))


@opaque("cvmm", lambda x, w, transposed, gate, other, row, slot, offsets, tiles, fan_in, fan_out: (
    x.new_empty(slot.shape[0] // (fan_out or 1), aligned(w).shape[1 if transposed else 2]),
    x.new_empty(0 if other is None else slot.shape[0], dtype=sum_dtype(x))))
def multiply(x: Tensor, w: Tensor, transposed: bool, gate: Tensor | None, other: Tensor | None, row: Tensor,
             slot: Tensor, offsets: Tensor, tiles: Tensor | None, fan_in: int | None, fan_out: int | None,
             ) -> tuple[Tensor, Tensor]:
    """The operation, with w or its transpose: [M / fan_out, O]. And for dgate, where other is given, the dot product
    of each slot's result, before its gate, with its row of other [M / fan_out, O], which is the x of the forward pass:
    [M], else [0]. Without fan_out the gate is not used, and other must be None."""
    w = aligned(w.to(x.dtype))  # in the op, or torch.compile would keep such a copy for backward for each repeat
    w = w.mT if transposed else w
    if tiles is not None:
        return triton_multiply(x, w, gate, other, row, slot, offsets, tiles, fan_in, fan_out)
    x = gather(x, slot, fan_in)                                                      # [M, I]
    y = x.new_empty(len(x), w.shape[2])                                              # [M, O]
    for e, rows in experts(slot, offsets):
        torch.mm(x[rows], w[e], out=y[rows])
    dots = x.new_empty(0, dtype=sum_dtype(x))
    if fan_out is None:
        return y, dots
    if other is not None:
        dots = (y * gather(other, slot, fan_out).to(dots.dtype)).sum(1)[row]         # [M]
    weights = None if gate is None else gate.view(-1, fan_out).to(dots.dtype)
    y = F.embedding_bag(row.view(-1, fan_out), y.to(dots.dtype), mode="sum", per_sample_weights=weights)
    return y.to(x.dtype), dots                                                       # [M / fan_out, O]


@opaque("cvmm_dw", lambda x, dout, slot, offsets, *_: x.new_empty(
    offsets.shape[0] - 1, x.shape[1], dout.shape[1], dtype=sum_dtype(x)))
def multiply_dw(x: Tensor, dout: Tensor, slot: Tensor, offsets: Tensor, tiles: Tensor | None,
                fan_in: int | None, fan_out: int | None) -> Tensor:
    """The gradient of w without gates: [E, I, O], as float32 at least"""
    if tiles is not None:
        return triton_dw(x, dout, slot, offsets, fan_in, fan_out)
    x, dout = gather(x, slot, fan_in), gather(dout, slot, fan_out)                   # [M, I], [M, O]
    dw = x.new_empty(len(offsets) - 1, x.shape[1], dout.shape[1])
    for e, rows in experts(slot, offsets):
        torch.mm(x[rows].T, dout[rows], out=dw[e])                                   # zeros for an expert without rows
    return dw.to(sum_dtype(dw))


# The Triton path: four kernels, one of them for routers, and what launches them --------------------------------------
#
# The first multiplies rows by the matrix of their expert, forward and for dx, in tiles of up to BM rows of one expert:
#
#     for each tile (expert, first row), for each block of BN columns:        one program
#         for each block of BK inputs:
#             acc += x[slot[rows] // fan_in, inputs] @ w[expert, inputs, columns]
#         y[rows, columns] = acc
#
# Where a row of x has at most two blocks, one is done before the loads of the next arrive. There a program does a whole
# tile: it holds its rows of x (HOLD), and goes through all blocks of columns, with w loaded ahead.
#
# The second sums the slots, when all are in memory:
#
#     for each token t of out, for each of its slots s:                       one program for a few tokens
#         dots[s] = <y[row[s]], other[t]>                                     for dgate only
#         out[t] += gate[s] * y[row[s]]
#
# For dx, x is dout and other is x. Without atomics every number is written once, summed in a fixed order: two runs give
# equal bits, for the price of M rows in memory. Fans are constants, as to divide by an unknown number is slow.


def tile_table(offsets: Tensor, m: int, n_expert: int) -> Tensor:
    """[n, 2] expert and first row of each tile; surplus ones begin past its end: n, the grid, follows from m and E."""
    bm = block_rows(m, n_expert)
    count, tile = (offsets.diff() + bm - 1) // bm, torch.arange(m // bm + n_expert, device=offsets.device)  # [E], [n]
    begin = count.cumsum(0) - count                                              # [E] the first tile of each expert
    e = torch.searchsorted(begin, tile, right=True) - 1                          # [n] the last expert for the surplus
    return torch.stack((e, offsets[e] + (tile - begin[e]) * bm), dim=1)


def block_rows(m: int, n_expert: int) -> int:
    """Rows of a tile: 16, 32, 64 or 128, about as many as an expert has on average. Known without the counts."""
    return next(size for size in (16, 32, 64, 128) if size >= min(m // n_expert, 128))


@jit
def rows_kernel(x, w, y, slot, offsets, tiles, n_in, n_out, stride_x, stride_we, stride_wi, stride_wo,
                fan_in: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, HOLD: tl.constexpr,
                PRECISION: tl.constexpr):
    n_blocks = 1 if HOLD else tl.cdiv(n_out, BN)
    tile, block = tl.program_id(0) // n_blocks, tl.program_id(0) % n_blocks  # so the rows of a tile stay in L2
    expert, first = tl.load(tiles + 2 * tile).to(tl.int64), tl.load(tiles + 2 * tile + 1)
    end = tl.load(offsets + expert + 1)
    if first >= end:
        return
    rows = first + tl.arange(0, BM)
    real = (rows < end)[:, None]
    source = tl.minimum(rows, end - 1)  # surplus rows repeat the last one and are not stored
    if fan_in is not None:
        source = tl.load(slot + source) // fan_in
    inputs, cols = tl.arange(0, BK), block * BN + tl.arange(0, BN)
    x_block = x + source.to(tl.int64)[:, None] * stride_x + inputs[None, :]                                  # [BM, BK]
    w_block = w + expert * stride_we + inputs[:, None] * stride_wi + cols.to(tl.int64)[None, :] * stride_wo  # [BK, BN]
    y_rows = y + rows.to(tl.int64)[:, None] * n_out                                                          # [BM, 1]
    if HOLD:
        a = tl.load(x_block, mask=inputs[None, :] < n_in, other=0.0)
        for col in range(0, n_out, BN):
            inside = cols[None, :] < n_out - col
            b = tl.load(w_block, mask=(inputs[:, None] < n_in) & inside, other=0.0)
            acc = dot(a, b, tl.zeros((BM, BN), tl.float32), PRECISION)
            tl.store(y_rows + (col + cols)[None, :], acc.to(y.dtype.element_ty), mask=real & inside)
            w_block += BN * stride_wo
    else:
        acc = tl.zeros((BM, BN), tl.float32)
        for i in range(0, n_in, BK):
            a = tl.load(x_block, mask=inputs[None, :] < n_in - i, other=0.0)
            b = tl.load(w_block, mask=(inputs[:, None] < n_in - i) & (cols[None, :] < n_out), other=0.0)
            acc = dot(a, b, acc, PRECISION)
            x_block += BK
            w_block += BK * stride_wi
        tl.store(y_rows + cols[None, :], acc.to(y.dtype.element_ty), mask=real & (cols[None, :] < n_out))


@jit
def sum_kernel(y, out, gate, other, dots, row, n, n_out,  # gate and other may be None
               fan_out: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr):
    t, cols = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS).to(tl.int64), tl.arange(0, WIDTH)[None, :]
    real = t < n
    target, inside = t[:, None] * n_out + cols, real[:, None] & (cols < n_out)
    if other is not None:
        factor = tl.load(other + target, mask=inside, other=0.0).to(tl.float32)
    acc = tl.zeros((TOKENS, WIDTH), tl.float32)
    for k in tl.range(fan_out, num_stages=3 if WIDTH <= 4096 else 1):  # or the rows loaded ahead need too much memory
        s = t * fan_out + k
        source = tl.load(row + s, mask=real, other=0).to(tl.int64)[:, None] * n_out + cols
        part = tl.load(y + source, mask=inside, other=0.0).to(tl.float32)
        if other is not None:
            tl.store(dots + s, tl.sum(part * factor, 1), mask=real)
        if gate is not None:
            part *= tl.load(gate + s, mask=real, other=0.0).to(tl.float32)[:, None]
        acc += part
    tl.store(out + target, acc.to(out.dtype.element_ty), mask=inside)


@jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    if INTERPRETED:  # which would multiply bfloat16 wrongly
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


# The third makes the gradient of the weights, in float32:
#
#     for each expert (the heaviest first), each block of BM inputs x BN outputs:      one program
#         for each block of BK rows:
#             acc += x[slot[rows] // fan_in, inputs]^T @ dout[slot[rows] // fan_out, outputs]
#         dw[expert, inputs, outputs] = acc                                            zeros for an empty expert
#
# The slots of a block are loaded one round ahead, because the loads of x and dout have to wait for them.
@jit
def dw_kernel(x, dout, dw, slot, offsets, heaviest, n_in, n_out, stride_x, stride_dout, fan_in: tl.constexpr,
              fan_out: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr):
    block, blocks_i, blocks_o = tl.program_id(0), tl.cdiv(n_in, BM), tl.cdiv(n_out, BN)
    expert = tl.load(heaviest + block // blocks_o // blocks_i)
    begin, end = tl.load(offsets + expert), tl.load(offsets + expert + 1)
    inputs = block // blocks_o % blocks_i * BM + tl.arange(0, BM)
    outputs = block % blocks_o * BN + tl.arange(0, BN)
    rows = begin + tl.arange(0, BK)
    s = tl.load(slot + rows, mask=rows < end, other=0)
    acc = tl.zeros((BM, BN), tl.float32)
    for _ in range(begin, end, BK):
        real = (rows < end)[:, None]
        x_row = (rows if fan_in is None else s // fan_in).to(tl.int64)[:, None]
        dout_row = (rows if fan_out is None else s // fan_out).to(tl.int64)[:, None]
        rows += BK  # of the next round
        s = tl.load(slot + rows, mask=rows < end, other=0)
        a = tl.load(x + x_row * stride_x + inputs[None, :], mask=real & (inputs[None, :] < n_in), other=0.0)
        b = tl.load(dout + dout_row * stride_dout + outputs[None, :], mask=real & (outputs[None, :] < n_out), other=0.0)
        acc = dot(tl.trans(a), b, acc, PRECISION)
    target = (expert * n_in + inputs[:, None]) * n_out + outputs[None, :]
    tl.store(dw + target, acc, mask=(inputs[:, None] < n_in) & (outputs[None, :] < n_out))


# The last chooses experts. torch.topk, made for long rows, takes 2 to 20 times as long: a block of threads for every
# token reads the row again and again. Here a warp keeps rows in registers, and takes the largest number top_k times.
@jit
def top_k_kernel(x, expert, n, n_expert, top_k, TOKENS: tl.constexpr, WIDTH: tl.constexpr):
    token, e = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS).to(tl.int64), tl.arange(0, WIDTH)
    inside = (token < n)[:, None] & (e < n_expert)[None, :]
    bits = tl.load(x + token[:, None] * n_expert + e[None, :], mask=inside, other=-1)  # floats, or the smallest key
    key = tl.maximum(bits ^ ((bits >> 31) & 0x7FFFFFFF), -(2**31) + 1)  # an integer, in the order of the floats
    for k in range(top_k):
        best = tl.min(tl.where(key == tl.max(key, 1)[:, None], e[None, :], WIDTH), 1)  # of equal ones the first
        tl.store(expert + token * top_k + k, best, mask=token < n)
        key = tl.where(e[None, :] == best[:, None], -(2**31), key)


def launch(kernel, programs: int, **arguments):
    """The one place where kernels start; tests look on."""
    with torch.cuda.device_of(next(iter(arguments.values()))):  # else on the current device, wherever the tensors are
        kernel[(programs,)](**arguments)


def schedule(x: Tensor) -> dict:
    """Block sizes, chosen on an H200, without spills there and on sm_80 (`python -m pytest -m slow`); precision."""
    if x.dtype == torch.float64:
        raise TypeError("The Triton kernels sum in float32 and take no float64: use float32, or a CPU.")
    tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32" and torch.version.hip is None  # AMD has none in Triton
    BN, BK = (128, 64) if x.element_size() <= 2 else (64, 32 if tf32 else 16)
    return dict(BN=BN, BK=BK, num_warps=8, num_stages=3, PRECISION="tf32" if tf32 else "ieee")


def aligned(t: Tensor) -> Tensor:
    """x [M, I] or w [E, I, O] as the kernels read it: the numbers of a row side by side, and padded to a multiple of 16
    of them, for asynchronous copies; w in both dimensions, because dx reads its transpose."""
    if backend(t.device) != "Triton":
        return t
    pads = [end for size in reversed(t.shape[1:]) for end in (0, -size % 16)]
    return F.pad(t, pads) if any(pads) else t if t.stride(-1) == 1 else t.contiguous()


def triton_multiply(x, w, gate, other, row, slot, offsets, tiles, fan_in, fan_out):
    m, (e, i, o), options = len(slot), w.shape, schedule(x)
    if hold := i <= 2 * options["BK"]:  # with 64 columns there is room to load w ahead
        options |= dict(BN=64, BK=triton.next_power_of_2(i))
    y, dots = x.new_empty(m, o), x.new_empty(0 if other is None else m, dtype=torch.float32)
    launch(rows_kernel, len(tiles) * (1 if hold else triton.cdiv(o, options["BN"])), x=x, w=w, y=y, slot=slot,
           offsets=offsets, tiles=tiles, n_in=i, n_out=o, fan_in=fan_in, stride_x=x.stride(0), stride_we=w.stride(0),
           stride_wi=w.stride(1), stride_wo=w.stride(2), BM=block_rows(m, e), HOLD=hold, **options)
    if fan_out is None:
        return y, dots
    out, width = x.new_empty(m // fan_out, o), triton.next_power_of_2(o)
    tokens = max(1024 // width, 1)  # of a program
    launch(sum_kernel, triton.cdiv(len(out), tokens), y=y, out=out, gate=gate, other=other, dots=dots, row=row,
           n=len(out), n_out=o, fan_out=fan_out, TOKENS=tokens, WIDTH=width, num_warps=min(max(width // 512, 1), 16))
    return out, dots


def triton_dw(x, dout, slot, offsets, fan_in, fan_out):
    e, i, o, options = len(offsets) - 1, x.shape[1], dout.shape[1], schedule(x)
    dw = x.new_empty(e, i, o, dtype=torch.float32)
    launch(dw_kernel, e * triton.cdiv(i, 128) * triton.cdiv(o, options["BN"]), x=x, dout=dout, dw=dw, slot=slot,
           offsets=offsets, heaviest=offsets.diff().argsort(descending=True), n_in=i, n_out=o, fan_in=fan_in,
           fan_out=fan_out, stride_x=x.stride(0), stride_dout=dout.stride(0), BM=128, **options)
    return dw


# Autograd, and the public functions ----------------------------------------------------------------------------------


@opaque("top_k", lambda x, k: x.new_empty(*x.shape[:-1], k, dtype=torch.long))
def top_k(x: Tensor, k: int) -> Tensor:
    """The places of the k largest numbers of the last dimension, in any order: [..., n] -> [..., k]"""
    path, n_expert, n = backend(x.device), x.shape[-1], x.shape[:-1].numel()
    if path == "PyTorch" or x.dtype != torch.float32 or not k <= n_expert <= 1024 or few(n * k, x.device):
        return x.topk(k, sorted=False).indices
    expert, width = x.new_empty(*x.shape[:-1], k, dtype=torch.long), triton.next_power_of_2(n_expert)
    tokens = max(512 // width, 1)  # of a program
    launch(top_k_kernel, triton.cdiv(n, tokens), x=x.contiguous().view(torch.int32), expert=expert, n=n,
           n_expert=n_expert, top_k=k, TOKENS=tokens, WIDTH=width, num_warps=1)
    return expert


class _CVMM(torch.autograd.Function):
    """Saves w itself, which is cast to the precision of x forward and backward: the repeats of a layer keep no copies,
    and their gradients add up in float32. Gates need a fan_out."""

    @staticmethod
    def forward(ctx, x, w, gate, fan_in, fan_out, *routing):
        ctx.save_for_backward(x, w, gate, *routing)
        ctx.fans = fan_in, fan_out
        return multiply(x, w, False, gate, None, *routing, fan_in, fan_out)[0]

    @staticmethod
    def backward(ctx, dout):
        if torch.is_grad_enabled():  # once_differentiable lets a constant dout pass, and then drops second derivatives
            raise RuntimeError("cvmm is differentiable once: there is no create_graph=True.")
        (x, w, gate, row, slot, *rest), dout, (fan_in, fan_out) = ctx.saved_tensors, dout.contiguous(), ctx.fans
        other = None if gate is None or fan_in is None else x.contiguous()
        dx, dgate = multiply(dout, w, True, gate, other, row, slot, *rest, fan_out, fan_in)
        if gate is not None:
            # Left to torch.compile to fuse: the gates of dx, where no slots are summed, and those of dw, on its
            # narrower operand: dw_kernel copies operands past the registers, so it cannot multiply them.
            gates = gate[slot, None]  # [M, 1], in the order of rows
            if fan_in is None:
                dgate = (dx * x.to(sum_dtype(x))).sum(1)[row]
                dx.mul_(gates)  # after dgate, which is made of it
            if x.shape[1] <= dout.shape[1]:
                x, fan_in = (gather(x, slot, fan_in) * gates).to(x.dtype), None
            else:
                dout, fan_out = (gather(dout, slot, fan_out) * gates).to(x.dtype), None
        dw = multiply_dw(x, dout, slot, *rest, fan_in, fan_out)[:, : w.shape[1], : w.shape[2]]  # without the padding
        return dx, dw, None if gate is None else dgate, *[None] * 6


def cvmm(x: Tensor, w: Tensor, routing: Routing, fan_in: int | None = None, fan_out: int | None = None,
         gate: Tensor | None = None) -> Tensor:
    """out[s // fan_out] += gate[s] * x[s // fan_in] @ w[expert[s]], once differentiable in x, w and gate.

    Args: x [M / fan_in, I], or [M, I] in the order of rows if fan_in is left out; w [E, I, O]; the routing of M slots
    to E experts; gate, M numbers in the order of slots, 1 if left out.
    Returns [M / fan_out, O], or [M, O] in the order of rows if fan_out is left out, in the precision of the matmul:
    that of w or, under autocast, autocast's, unless w is in float64.
    Raises ValueError when sizes or devices do not fit; TypeError for float64 in a kernel.
    """
    m, tensors = len(routing.expert), dict(x=x, w=w, routing=routing.expert) | ({} if gate is None else dict(gate=gate))
    fits = all(fan is None or fan >= 1 and m % fan == 0 for fan in (fan_in, fan_out)) and w.dim() == 3
    fits = fits and x.shape == (m // (fan_in or 1), w.shape[1]) and len(w) == routing.n_expert
    if not fits or gate is not None and gate.numel() != m or len({t.device for t in tensors.values()}) > 1:
        given = ", ".join(f"{k} {tuple(t.shape)} on {t.device}" for k, t in tensors.items())
        raise ValueError(f"cvmm: {fan_in=}, {fan_out=} and routing to {routing.n_expert} experts do not fit {given}.")
    lower = torch.is_autocast_enabled(x.device.type) and w.dtype != torch.float64  # which autocast leaves alone
    x = x.to(torch.get_autocast_dtype(x.device.type) if lower else w.dtype)
    gate = None if gate is None else gate.reshape(-1).contiguous()
    if routing.slot is None:
        unsorted = definition if x.device.type == "cpu" else batched
        return unsorted(x, w, routing.expert, fan_in or 1, fan_out or 1, gate)
    y = _CVMM.apply(aligned(x), w, gate if fan_out else None, fan_in, fan_out, *routing[2:])[:, : w.shape[2]]
    return y if gate is None or fan_out else (y * gate[routing.slot, None]).to(y.dtype)


# The bench: the feedforwards of models that people train, beside dense ones of equal FLOPs ---------------------------

SHAPES = {"cpu": {"tiny": (64, 128, 8, 2), "small": (256, 320, 18, 2)},  # C, F, E, K
          "cuda": {"44M": (412, 128, 155, 12), "244M": (1024, 128, 387, 16), "1B": (1536, 128, 565, 24)}}


def feedforward(x, w_up, w_down, gate, expert):
    """sigma-MoE: x [N, C], w_up [E, C, F], w_down [E, F, C], gate and expert [N, K] -> [N, C]"""
    r, K = route(expert, len(w_up)), expert.shape[1]
    return cvmm(cvmm(x, w_up, r, fan_in=K).relu(), w_down, r, fan_out=K, gate=gate)


def random_feedforward(n, C, F_, E, K, dtype, device):
    """x, w_up, w_down, gate, all with gradients, and expert"""
    with torch.device(device):
        weights = [torch.randn(s, dtype=dtype) / s[-2] ** 0.5 for s in ((E, C, F_), (E, F_, C))]
        gate, expert = torch.rand(n, E).topk(K)
        return *(t.requires_grad_() for t in (torch.randn(n, C, dtype=dtype), *weights, gate)), expert


def check(device: str):
    """Output and gradients of a feedforward against PyTorch's in float64, and two runs against each other."""
    for dtype, tolerance in ((torch.float32, 2e-3), (torch.float16, 4e-3), (torch.bfloat16, 3e-2)):
        *inputs, expert = random_feedforward(200, 200, 100, 3, 2, dtype, device)  # in 16 bits with HOLD and without
        exact = [t.detach().cpu().double().requires_grad_() for t in inputs]
        runs = [(given, feedforward(*given, expert.to(given[0].device))) for given in (exact, inputs, inputs)]
        want, one, two = ([y, *torch.autograd.grad(y.sum(), given)] for given, y in runs)
        error = max(((a.cpu() - b).abs().max() / b.abs().max()).item() for a, b in zip(one, want, strict=True))
        same = all(map(torch.equal, one, two))
        print(f"{str(dtype)[6:]}: error {error:.1e} of the largest value, two runs {'equal' if same else 'DIFFER'}")
        if not (error < tolerance and same):
            raise SystemExit("cvmm is wrong on this device: do not use it.")


def bench(rounds: int = 15):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    where = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{where}, torch {torch.__version__}, path: {backend(torch.device(device))}")
    check(device)
    n, dtype = (32768, torch.bfloat16) if device == "cuda" else (2048, torch.float32)
    print(f"{n} tokens, {str(dtype)[6:]}, forward and backward in turn; medians of {rounds}, in milliseconds")
    for name, (C, F_, E, K) in SHAPES[device].items():
        *inputs, expert = random_feedforward(n, C, F_, E, K, dtype, device)
        *dense, _ = random_feedforward(n, C, K * F_, 1, 1, dtype, device)
        dout, times = torch.randn_like(inputs[0]), ([], [])
        for _ in range(rounds + 2):
            for i, (x, w_up, w_down, *gate) in enumerate((inputs, dense[:3])):
                start = time.perf_counter()
                y = feedforward(x, w_up, w_down, *gate, expert) if gate else (x @ w_up[0]).relu() @ w_down[0]
                torch.autograd.grad(y, (x, w_up, w_down, *gate), dout)[0][0, 0].item()  # waits for a GPU
                times[i].append(time.perf_counter() - start)
        ours, one = torch.tensor(times)[:, 2:].median(1).values.tolist()
        print(f"{name:5} C {C}, F {F_}, E {E}, K {K}: experts {ours * 1e3:.2f}, dense as large {one * 1e3:.2f}, "
              f"ratio {ours / one:.2f}; {12 * n * K * C * F_ / ours / 1e12:.3f} TFLOP/s")


if __name__ == "__main__":
    bench()
