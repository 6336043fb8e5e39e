"""Rows of the heads in memory: how the kernels of attention load and store blocks of them.

Tensors of [B, time, H, D] keep the entries of a row together; all other strides are free. Kernels
take them as one tuple (batch, time, head) for each tensor.
"""

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from cerl.kernels.runtime.blocks import block_size

COPY_ENGINE = True  # load tiles with the tensor memory accelerator where their layout allows


@triton.jit
def load_rows(
    p,
    i_b,
    i_h,
    begin,
    limit,
    s,
    D: tl.constexpr,
    BD: tl.constexpr,
    BT: tl.constexpr,
    TMA: tl.constexpr,
):
    """Rows [BT, BD] of a head from `begin` on; s holds the strides (batch, time, head).

    Entries past D are 0. A row past `limit` holds the last row or, by the copy engine, zeros:
    callers mask its scores or give it weight 0.
    """
    if TMA:
        return p.load([i_b.to(tl.int32), begin, i_h * D]).reshape([BT, BD])
    else:
        t = tl.minimum(begin + tl.arange(0, BT), limit - 1)
        d = tl.arange(0, BD)
        p_tile = p + i_b * s[0] + i_h * s[2] + t[:, None] * s[1] + d[None, :]
        if D == BD:
            return tl.load(p_tile)
        else:
            return tl.load(p_tile, mask=(d < D)[None, :], other=0.0)


@triton.jit
def vector(p, i_row, begin, length, BT: tl.constexpr, TMA: tl.constexpr):
    """BT numbers of row i_row of a [rows, length] matrix, from `begin` on."""
    if TMA:
        return p.load([i_row.to(tl.int32), begin]).reshape([BT])
    else:
        return tl.load(p + i_row.to(tl.int64) * length + begin + tl.arange(0, BT))


@triton.jit
def store_rows(p, row, inside, s_t, b, D: tl.constexpr, BD: tl.constexpr):
    """Stores rows [BT, BD] of a head where `inside`, but not past D."""
    d = tl.arange(0, BD)
    m = inside[:, None]
    if D < BD:
        m = m & (d < D)[None, :]
    tl.store(p + row[:, None] * s_t + d[None, :], b.to(p.dtype.element_ty), mask=m)


def strides(*tensors: Tensor) -> list[tuple[int, ...]]:
    """The tuple of strides (batch, time, head) of each tensor [B, time, H, D].

    Triton specialises each entry of a tuple as it does a plain integer: a 1 becomes a constant, and
    the compiler knows which entries are multiples of 16. It ignores `do_not_specialize` for tuples.
    The strides of gates are therefore passed one by one: specialised, they would make Triton
    compile the kernel again for other lengths and numbers of heads.
    """
    return [x.stride()[:3] for x in tensors]


def tiled(rows: int, *tensors: Tensor) -> tuple[bool, list]:
    """Whether the copy engine can load blocks of `rows` rows, and what to hand to the kernel.

    The engine takes 16-bit tensors whose heads lie side by side and fill their padded width.

    Returns: whether it can, for all tensors or none; descriptors for `load_rows`, or the tensors.
    """
    for x in tensors:
        width = x.shape[3]
        if not (
            COPY_ENGINE
            and x.is_cuda
            and x.element_size() == 2
            and width == block_size(width)
            and x.stride(2) == width
            and x.stride(3) == 1
            and x.data_ptr() % 16 == 0
            and all(size % 8 == 0 and size > 0 for size in x.stride()[:2])
        ):
            return False, list(tensors)
    return True, [
        TensorDescriptor(
            x,
            [x.shape[0], x.shape[1], x.shape[2] * x.shape[3]],
            [x.stride(0), x.stride(1), 1],
            [1, rows, x.shape[3]],
        )
        for x in tensors
    ]


def vectors(x: Tensor, size: int, tma: bool) -> Tensor | TensorDescriptor:
    """Contiguous 32-bit numbers for `vector`, the last axis in blocks of `size`."""
    if not tma:
        return x
    return TensorDescriptor(x, [x.numel() // x.shape[-1], x.shape[-1]], [x.shape[-1], 1], [1, size])
