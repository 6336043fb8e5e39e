"""The bound on rounding: sums in another order pass, small mistakes do not."""

import pytest
import torch
from rounding import ROUNDINGS, assert_agree


def test_sums_of_products_in_any_order_agree():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 1000, 20, generator=generator)
    exact = (a.double() * b.double()).sum(0)
    for order in (torch.arange(1000), torch.randperm(1000, generator=generator)):
        one_by_one = torch.zeros(20)
        for k in order:
            one_by_one = one_by_one + a[k] * b[k]
        assert_agree(one_by_one, exact)
        assert not torch.equal(one_by_one.double(), exact)


def test_an_element_that_cancels_to_nearly_nothing_is_measured_by_the_largest():
    want = torch.tensor([1.0, 1e-9])
    assert_agree(want + torch.tensor([0.0, 1e-7]), want)


def test_a_mistake_of_a_thousandth_in_one_element_is_seen():
    want = torch.linspace(0.01, 1.0, 100)
    for k in range(100):
        got = want.clone()
        got[k] *= 1.001
        with pytest.raises(AssertionError, match="the tensor: "):
            assert_agree(got, want, where="the tensor")


def test_the_bound_is_a_number_of_roundings_of_the_coarser_format():
    want = torch.tensor([2.0, -4.0], dtype=torch.float64)
    for dtype in (torch.float32, torch.float64):
        most = 4.0 * torch.finfo(dtype).eps * ROUNDINGS
        assert_agree((want + torch.tensor([most, 0.0])).to(dtype), want)
        with pytest.raises(AssertionError):
            assert_agree((want + torch.tensor([1.1 * most, 0.0])).to(dtype), want)


@pytest.mark.parametrize(
    "got", [torch.zeros(3), torch.zeros(1, 2), torch.zeros(2, dtype=torch.float16)], ids=str
)
def test_other_shapes_and_types_do_not_agree(got):
    with pytest.raises(AssertionError):
        assert_agree(got, torch.zeros(2))


def test_integers_agree_if_they_are_equal():
    ones = torch.ones(2, dtype=torch.int64)
    assert_agree(ones, ones)
    with pytest.raises(AssertionError):
        assert_agree(ones + 1, ones)


def test_nothing_but_nothing_agrees_with_zeros_and_nan_only_with_nan():
    zeros, nans = torch.zeros(2), torch.tensor([1.0, float("nan")])
    assert_agree(zeros, zeros)
    assert_agree(nans, nans)
    for got, want in ((zeros + 1e-30, zeros), (nans, zeros + 1.0), (zeros + 1.0, nans)):
        with pytest.raises(AssertionError):
            assert_agree(got, want)
