"""Rounding of the operands of matrix products, in Triton."""

import triton
import triton.language as tl


@triton.jit
def round_operand(b, PRECISION: tl.constexpr):
    """Rounds float32 to the nearest tf32, if products are in tf32.

    Without it the matrix units would cut the low bits off, with twice the error.
    """
    if PRECISION == "tf32" and b.dtype == tl.float32:
        bits = tl.inline_asm_elementwise(
            "cvt.rna.tf32.f32 $0, $1;", "=r,f", [b], dtype=tl.int32, is_pure=True, pack=1
        )
        return bits.to(tl.float32, bitcast=True)
    else:
        return b
