"""Whether two ways to compute the same numbers differ by rounding alone.

In which order a sum is taken depends on the width of the CPU's vectors and on its threads. What
that changes is of the size of the largest values that went into the sum, however small the sum
itself is, so a bound relative to each element decides by the CPU on elements that are nearly zero.
"""

from typing import Any

import torch

ROUNDINGS = 64


def assert_agree(got: Any, want: Any, *, roundings: float = ROUNDINGS, where: str = "") -> None:
    """The largest difference is at most so many roundings of the largest wanted value.

    One rounding is the format's epsilon, 2^-23 in float32. A sum of n products strays by about
    sqrt(n) / 2 of them, and the results compared here come through a few sums of up to 1,000
    products. The default leaves room for that, 8e-6 of the largest value in float32, and a mistake
    of one part in a thousand in any element above a hundredth of the largest is seen.

    Args:    got and want, tensors of one shape and type, or want in float64; NaN agrees with NaN,
             and integers agree if they are equal.
             `roundings` fewer where sums are taken in a wider format than that of the result.
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
