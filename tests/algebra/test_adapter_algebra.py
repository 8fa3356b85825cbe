"""The algebra against matrices written out by hand, in float64."""

from __future__ import annotations

import pytest
import torch

from anyrank.algebra import (
    DENSE,
    Geometry,
    Update,
    adapter_output,
    lora_factors,
    pool,
    repeat,
    rows,
    scale_at,
)
from anyrank.errors import ConfigError, GeometryError, RankError

SHAPES = [(12, 18, 1, 1), (12, 18, 3, 2), (20, 15, 5, 3), (7, 11, 1, 11), (64, 24, 32, 8)]


def pool_matrix(d_in: int, p: int) -> torch.Tensor:
    matrix = torch.zeros(d_in // p, d_in, dtype=torch.float64)
    for j in range(d_in):
        matrix[j // p, j] = 1 / p
    return matrix


def repeat_matrix(d_out: int, q: int) -> torch.Tensor:
    matrix = torch.zeros(d_out, d_out // q, dtype=torch.float64)
    for i in range(d_out):
        matrix[i, i // q] = 1
    return matrix


def relative_rms(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((got - wanted).pow(2).mean() / wanted.pow(2).mean()).sqrt().item()


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize(("d_in", "d_out", "p", "q"), SHAPES)
@pytest.mark.parametrize("core", ["low_rank", "dense"])
def test_forward_and_every_gradient_equal_the_matrices_of_the_equation(d_in, d_out, p, q, core):
    torch.manual_seed(0)
    x = random(2, 5, d_in)
    low = (random(3, d_in // p), random(d_out // q, 3))
    factors = low if core == "low_rank" else (random(d_out // q, d_in // p),)
    matrix = factors[1] @ factors[0] if core == "low_rank" else factors[0]
    weight = 0.7 * repeat_matrix(d_out, q) @ matrix @ pool_matrix(d_in, p)
    upstream = torch.randn(2, 5, d_out, dtype=torch.float64)

    y = adapter_output(x, factors, p, q, 0.7)
    got = torch.autograd.grad(y, (x, *factors), upstream)
    reference = torch.nn.functional.linear(x, weight)
    wanted = torch.autograd.grad(reference, (x, *factors), upstream)

    assert relative_rms(y, reference) < 1e-14
    for mine, theirs in zip(got, wanted, strict=True):
        assert relative_rms(mine, theirs) < 1e-14
    assert relative_rms(Update(factors, p, q, 0.7).weight(), weight) < 1e-14


@pytest.mark.parametrize(("d_in", "d_out", "p", "q"), SHAPES)
def test_a_low_rank_adapter_is_an_ordinary_lora(d_in, d_out, p, q):
    torch.manual_seed(1)
    a, b = random(4, d_in // p), random(d_out // q, 4)
    lora_a, lora_b = lora_factors(a, b, p, q)
    assert lora_a.shape == (4, d_in)
    assert lora_b.shape == (d_out, 4)
    assert relative_rms(lora_b @ lora_a, Update((a, b), p, q, 1.0).weight()) < 1e-14


def test_pool_is_the_mean_and_repeat_writes_each_value_q_times():
    assert pool(torch.tensor([1.0, 3.0, 10.0, 20.0]), 2).tolist() == [2.0, 15.0]
    assert repeat(torch.tensor([2.0, 15.0]), 3).tolist() == [2, 2, 2, 15, 15, 15]


def test_the_first_rows_of_b_are_contiguous_and_frozen_rows_pass_no_gradient():
    a, b = random(6, 5), random(7, 6)
    a_k, b_k = rows(a, b, 4, first=3)
    assert b_k.is_contiguous()
    assert torch.equal(a_k, a[:4])
    assert torch.equal(b_k, b[:, :4])
    (b_k @ a_k).sum().backward()
    assert a.grad is not None
    assert b.grad is not None
    assert a.grad.abs().sum(1).nonzero().flatten().tolist() == [3]
    assert b.grad.abs().sum(0).nonzero().flatten().tolist() == [3]


@pytest.mark.parametrize(
    ("name", "k", "wanted"),
    [("alpha/k", 4, 4.0), ("alpha/sqrt(k)", 4, 8.0), ("alpha/r", 4, 0.25), ("alpha/k", 64, 0.25)],
)
def test_the_three_scales(name, k, wanted):
    assert scale_at(name, 16, k, 64) == wanted


def test_an_unknown_scale_offers_the_nearest():
    with pytest.raises(ConfigError) as error:
        scale_at("alpha/rank", 16, 1, 1)
    assert str(error.value) == (
        "scale='alpha/rank' is unknown; did you mean alpha/r, alpha/k or alpha/sqrt(k)?"
    )


@pytest.mark.parametrize(
    ("geometry", "kind", "text"),
    [
        (
            Geometry(4096, 64, p=48, rows=2),
            GeometryError,
            "q_proj: pool=48 must divide d_in=4096; nearest divisors: 32, 64",
        ),
        (
            Geometry(64, 100, q=8, rows=2),
            GeometryError,
            "q_proj: repeat=8 must divide d_out=100; nearest divisors: 5, 10",
        ),
        (
            Geometry(64, 32, rows=33),
            RankError,
            "q_proj: rank 33 must lie in 1..32, the smaller side of its core of 32 x 64; "
            "lower r or exclude the layer",
        ),
    ],
)
def test_a_geometry_that_does_not_fit_names_the_way_out(geometry, kind, text):
    with pytest.raises(kind) as error:
        geometry.check("q_proj")
    assert str(error.value) == text


def test_a_dense_core_has_no_rank_to_check():
    geometry = Geometry(64, 32, p=4, q=8, core=DENSE)
    geometry.check("q_proj")
    assert geometry.shapes == ((4, 16),)
    assert geometry.parameters() == 64
