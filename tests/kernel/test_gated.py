"""The gated product against the plain one (bits) and against float64 (gradients)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers.activations import ACT2FN

from anyrank.errors import ConfigError
from anyrank.kernels.gated import ACTIVATIONS, gated_product

NAMES = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}  # of Transformers
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(2, 7, 96), (13, 33), (5,), (1, 1, 1), (0, 8), (3, 50_001)]

traced = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
every_act = pytest.mark.parametrize("act", ACTIVATIONS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """gate, up and the gradient that arrives at the product."""
    torch.manual_seed(0)
    gate, up, g = (torch.randn(shape).mul_(3).to(dtype) for _ in range(3))
    return gate.requires_grad_(), up.requires_grad_(), g


def eager(gate: Tensor, up: Tensor, act: str) -> Tensor:
    return ACT2FN[NAMES[act]](gate) * up


def gradients(f: Callable[..., Tensor], gate: Tensor, up: Tensor, g: Tensor, act: str):
    return torch.autograd.grad(f(gate, up, act), (gate, up), g)


def relative_rms(got: Tensor, wanted: Tensor) -> float:
    return ((got.double() - wanted).pow(2).mean() / wanted.pow(2).mean()).sqrt().item()


@pytest.mark.parametrize("shape", SHAPES)
@every_dtype
@every_act
def test_forward_and_gradients_equal_those_of_the_plain_product_bit_for_bit(act, dtype, shape):
    gate, up, g = inputs(shape, dtype)
    assert torch.equal(gated_product(gate, up, act), eager(gate, up, act))
    got = gradients(gated_product, gate, up, g, act)
    for mine, plain in zip(got, gradients(eager, gate, up, g, act), strict=True):
        assert mine.dtype == dtype
        assert torch.equal(mine, plain)


@every_dtype
@every_act
def test_gradients_equal_those_of_float64(act, dtype):
    limit = {torch.float64: 1e-12, torch.float32: 1e-6}.get(dtype, 1e-2)
    gate, up, g = inputs((7, 96), dtype)
    wide = (t.detach().double().requires_grad_() for t in (gate, up))
    wanted = gradients(eager, *wide, g.double(), act)
    for mine, exact in zip(gradients(gated_product, gate, up, g, act), wanted, strict=True):
        assert relative_rms(mine, exact) < limit


@every_act
def test_factors_of_two_dtypes_and_not_contiguous(act):
    gate, up, g = inputs((6, 4, 8), torch.bfloat16)
    for other in (torch.float32, torch.bfloat16):
        narrow, wide = gate.transpose(0, 2), up.to(other)[:, ::2].transpose(0, 2).repeat(1, 2, 1)
        for factors in ((narrow, wide), (wide, narrow)):
            y = gated_product(*factors, act)
            assert y.dtype == other
            assert torch.equal(y, eager(*factors, act))
            upstream = g.transpose(0, 2).to(other)
            got = gradients(gated_product, *factors, upstream, act)
            for mine, plain in zip(got, gradients(eager, *factors, upstream, act), strict=True):
                assert torch.equal(mine, plain)


@every_act
def test_kept_are_the_two_factors(act):
    gate, up, _ = inputs((3, 5, 64), torch.bfloat16)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        gated_product(gate, up, act)
    assert [t.data_ptr() for t in kept] == [gate.data_ptr(), up.data_ptr()]
    assert sum(t.nbytes for t in kept) == gate.nbytes + up.nbytes


def test_a_factor_without_gradient_gets_none():
    gate, up, g = inputs((3, 8), torch.float32)
    both = gradients(gated_product, gate, up, g, "silu")
    gated_product(gate, up.detach(), "silu").backward(g)
    gated_product(gate.detach(), up, "silu").backward(g)
    assert torch.equal(gate.grad, both[0])
    assert torch.equal(up.grad, both[1])


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant):
    gate, up, g = inputs((3, 8), torch.bfloat16)
    checkpoint(gated_product, gate, up, "silu", use_reentrant=reentrant).backward(g)
    wanted = gradients(gated_product, gate, up, g, "silu")
    for got, plain in zip((gate.grad, up.grad), wanted, strict=True):
        assert torch.equal(got, plain)


@every_act
def test_autocast_changes_nothing(act):
    gate, up, g = inputs((3, 8), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(gated_product(gate, up, act), eager(gate, up, act))
        got = gradients(gated_product, gate, up, g, act)
    for mine, plain in zip(got, gradients(gated_product, gate, up, g, act), strict=True):
        assert torch.equal(mine, plain)


@traced
@every_act
def test_compiles_without_a_break(act):
    compiled = torch.compile(gated_product, fullgraph=True, backend="aot_eager")
    gate, up, g = inputs((3, 8), torch.bfloat16)
    assert torch.equal(compiled(gate, up, act), gated_product(gate, up, act))
    got = gradients(compiled, gate, up, g, act)
    for mine, plain in zip(got, gradients(gated_product, gate, up, g, act), strict=True):
        assert torch.equal(mine, plain)


def test_a_second_derivative_is_refused():
    gate, up, g = inputs((3, 8), torch.float64)
    y = gated_product(gate, up, "silu")
    (first,) = torch.autograd.grad(y, up, g.requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_an_unknown_activation_is_refused():
    gate, up, _ = inputs((3, 8), torch.float32)
    with pytest.raises(ConfigError) as error:
        gated_product(gate, up, "gelu_tan")
    assert str(error.value) == "activation 'gelu_tan' is unknown; did you mean gelu_tanh or gelu?"
