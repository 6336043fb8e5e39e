"""Tests whether two ways to compute the same numbers differ by rounding alone.

The order in which a sum is taken depends on the width of the CPU's vectors and on its threads. The
error that this makes is relative to the largest values in the sum, however small the sum itself is.
So a bound relative to each element would fail on some CPUs for elements that are nearly zero, and
the largest difference is compared with the largest value instead.
"""

from typing import Any

import torch

ROUNDINGS = 64


def assert_agree(got: Any, want: Any, *, roundings: float = ROUNDINGS, where: str = "") -> None:
    """Asserts that the largest difference is at most `roundings` times the rounding of the largest
    wanted value.

    One rounding is the epsilon of the type, 2^-23 in float32. A sum of n products is off by about
    sqrt(n) / 2 roundings, and the results compared here are computed through a few sums of up to
    1,000 products. The default allows for that: 8e-6 of the largest value in float32. A mistake of
    0.1% in any element above a hundredth of the largest value still fails.

    Args:    got and want, tensors of one shape and type, or want in float64; NaN agrees with NaN,
             and integers agree if they are equal; roundings, fewer if sums are taken in a wider
             type than that of the result.
    """
    got, want = torch.as_tensor(got).detach().cpu(), torch.as_tensor(want).detach().cpu()
    assert got.dtype == want.dtype or want.dtype == torch.float64, f"{got.dtype}, {want.dtype}"
    exact = want.double()
    known = exact[exact.isfinite()].abs()
    rounding = torch.finfo(got.dtype).eps if got.is_floating_point() else 0.0
    limit = roundings * rounding * (float(known.max()) if len(known) else 0.0)
    torch.testing.assert_close(
        got.double(),
        exact,
        rtol=0.0,
        atol=limit,
        equal_nan=True,
        msg=lambda text: f"{where}: {text}" if where else text,
    )
