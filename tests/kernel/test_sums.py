"""Sums and means of neighbours, to the last bit where a trick makes them."""

from __future__ import annotations

import pytest
import torch

from anyrank.kernels import sums
from anyrank.kernels.sums import group_mean, group_sum


def extremes() -> torch.Tensor:
    """bf16 numbers of every size and sign, zeros and infinities among them."""
    torch.manual_seed(0)
    x = torch.randn(16, 64) * torch.logspace(-38, 38, 64)
    x[0, :4] = torch.tensor([0.0, -0.0, torch.inf, 1.0])
    x[1, :2] = torch.tensor([-torch.inf, torch.inf])
    return x.bfloat16()


def test_two_in_a_word_have_the_bits_of_their_sum(monkeypatch):
    x = extremes()
    assert sums._has_words(x)
    in_words = group_sum(x, 2)
    monkeypatch.setattr(sums, "_has_words", lambda x: False)
    torch.testing.assert_close(in_words, group_sum(x, 2), rtol=0, atol=0, equal_nan=True)
    assert in_words.isnan().sum() == 1  # infinity - infinity


@pytest.mark.parametrize(
    "x",
    [
        extremes().flatten()[1:-63].view(-1, 64),  # halves of words
        extremes()[:, :32],
        extremes().float(),
        extremes().half(),
        torch.zeros(4, 64, dtype=torch.bfloat16).T,
    ],
)
def test_other_layouts_and_dtypes_are_summed_over_strides(x):
    assert not sums._has_words(x)
    wanted = x[:, 0::2] + x[:, 1::2]
    torch.testing.assert_close(group_sum(x, 2), wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("n", [1, 2, 4, 32])
def test_means_are_those_of_float64(n):
    x = torch.randn(5, 64, dtype=torch.float64)
    wanted = x.unflatten(-1, (-1, n)).mean(-1)
    for dtype, most in ((torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        assert (group_mean(x.to(dtype), n).double() - wanted).abs().max() < most
