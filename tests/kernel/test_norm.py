"""The norm against Transformers' own (bits) and against the equation in float64 (gradients)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from anyrank.kernels.norm import rms_norm

EPS = 1e-5
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(2, 7, 96), (13, 33), (5,), (2, 3, 4, 16), (1, 1, 1), (0, 8)]
CHUNKS = [1, 100, 2**18]

traced = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


def inputs(
    shape: tuple[int, ...], dtype: torch.dtype, weight: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """h, w and the gradient that arrives at y; the rows of h have lengths of their own."""
    torch.manual_seed(0)
    h = (torch.randn(shape) * torch.rand(*shape[:-1], 1) * 5).to(dtype).requires_grad_()
    w = torch.randn(shape[-1]).to(weight or dtype).requires_grad_()
    return h, w, torch.randn(shape).to(torch.promote_types(h.dtype, w.dtype))


def eager(h: Tensor, w: Tensor) -> Tensor:
    norm = LlamaRMSNorm(len(w), EPS)
    del norm.weight
    norm.weight = w
    return norm(h)


def gradients(f: Callable[[Tensor, Tensor], Tensor], h: Tensor, w: Tensor, g: Tensor):
    return torch.autograd.grad(f(h, w), (h, w), g)


def ours(h: Tensor, w: Tensor) -> Tensor:
    return rms_norm(h, w, EPS)


def exact(h: Tensor, w: Tensor, g: Tensor) -> tuple[Tensor, ...]:
    """Gradients by autograd in float64, of the equation without roundings."""
    h, w = (t.detach().double().requires_grad_() for t in (h, w))
    y = w * h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)
    return torch.autograd.grad(y, (h, w), g.double())


def relative_rms(got: Tensor, wanted: Tensor) -> float:
    return ((got.double() - wanted).pow(2).mean() / wanted.pow(2).mean()).sqrt().item()


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("shape", SHAPES)
@every_dtype
def test_forward_equals_the_one_of_transformers_bit_for_bit(dtype, shape, chunk, monkeypatch):
    monkeypatch.setattr("anyrank.kernels.norm.CPU_CHUNK", chunk)
    for weight in (dtype, torch.float32, torch.bfloat16):
        h, w, _ = inputs(shape, dtype, weight)
        y, wanted = ours(h, w), eager(h, w)
        assert y.dtype == wanted.dtype
        assert torch.equal(y, wanted)


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("shape", SHAPES[:-1])
@every_dtype
def test_gradients_equal_those_of_float64(dtype, shape, chunk, monkeypatch):
    monkeypatch.setattr("anyrank.kernels.norm.CPU_CHUNK", chunk)
    limit = {torch.float64: 1e-12, torch.float32: 1e-6}.get(dtype, 1e-2)
    h, w, g = inputs(shape, dtype)
    for got, wanted in zip(gradients(ours, h, w, g), exact(h, w, g), strict=True):
        assert got.dtype == dtype
        if shape[-1] > 1:  # the norm of a single number is its sign: no gradient but by eps
            assert relative_rms(got, wanted) < limit


def test_bf16_gradients_are_rounded_once():
    h, w, g = inputs((64, 96), torch.bfloat16)
    for got, wanted in zip(gradients(ours, h, w, g), exact(h, w, g), strict=True):
        assert (got == wanted.to(torch.bfloat16)).double().mean() > 0.99


def test_rows_are_never_alone_in_a_piece(monkeypatch):
    """torch sums a lone long row by all threads, in another order than rows among others."""
    monkeypatch.setattr("anyrank.kernels.norm.CPU_CHUNK", 1)
    h, w, _ = inputs((31, 40_000), torch.float32)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert not torch.equal(torch.cat([eager(row, w) for row in h.split(1)]), eager(h, w))
        assert torch.equal(ours(h, w), eager(h, w))
    finally:
        torch.set_num_threads(threads)


@every_dtype
def test_inputs_that_are_not_contiguous(dtype, monkeypatch):
    monkeypatch.setattr("anyrank.kernels.norm.CPU_CHUNK", 40)
    for turn in (
        lambda t: t.transpose(0, 2),
        lambda t: t.transpose(1, 2),
        lambda t: t[:, ::2, ::3],
        lambda t: t[:1].expand(4, -1, -1),
    ):
        h, _, _ = inputs((4, 6, 8), dtype)
        turned = turn(h)
        _, w, g = inputs(tuple(turned.shape), dtype)
        assert torch.equal(ours(turned, w), eager(turned, w))
        got = torch.autograd.grad(ours(turned, w), turned, g)
        assert relative_rms(got[0], exact(turned, w, g)[0]) < 1e-2
        upstream = g.transpose(0, 1).contiguous().transpose(0, 1)
        assert torch.equal(torch.autograd.grad(ours(turned, w), turned, upstream)[0], got[0])


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_kept_are_the_input_and_one_float32_per_token(dtype):
    h, w, _ = inputs((3, 5, 64), dtype)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ours(h, w)
    own = [t for t in kept if t.data_ptr() != w.data_ptr()]
    assert sum(t.nbytes for t in own) == h.nbytes + 4 * 15
    assert own[0].data_ptr() == h.data_ptr()


class Largest(TorchDispatchMode):
    """The most numbers that a float32 tensor made meanwhile has."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor) and made.dtype == torch.float32:
            self.numbers = max(self.numbers, made.numel())
        return made


def test_on_a_cpu_no_float32_copy_is_larger_than_a_piece(monkeypatch):
    monkeypatch.setattr("anyrank.kernels.norm.CPU_CHUNK", 1024)
    h, w, g = inputs((3, 50, 64), torch.bfloat16)
    with Largest() as largest:
        gradients(ours, h, w, g)
    assert 0 < largest.numbers <= 1024
    with Largest() as largest:
        gradients(eager, h, w, g)
    assert largest.numbers == h.numel()


def test_a_frozen_weight_or_input_gets_no_gradient():
    h, w, g = inputs((3, 8), torch.float32)
    both = gradients(ours, h, w, g)
    ours(h, w.detach()).backward(g)
    ours(h.detach(), w).backward(g)
    assert torch.equal(h.grad, both[0])
    assert torch.equal(w.grad, both[1])
    assert not ours(h.detach(), w.detach()).requires_grad


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant):
    h, w, g = inputs((3, 8), torch.bfloat16)
    checkpoint(ours, h, w, use_reentrant=reentrant).backward(g)
    for got, wanted in zip((h.grad, w.grad), gradients(ours, h, w, g), strict=True):
        assert torch.equal(got, wanted)


def test_autocast_changes_nothing():
    h, w, g = inputs((3, 8), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ours(h, w), eager(h, w))
        got = gradients(ours, h, w, g)
    for mine, plain in zip(got, gradients(ours, h, w, g), strict=True):
        assert torch.equal(mine, plain)


@traced
def test_compiles_without_a_break():
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    h, w, g = inputs((3, 8), torch.bfloat16)
    assert torch.equal(compiled(h, w), ours(h, w))
    for got, wanted in zip(gradients(compiled, h, w, g), gradients(ours, h, w, g), strict=True):
        assert torch.equal(got, wanted)


def test_a_second_derivative_is_refused():
    h, w, g = inputs((3, 8), torch.float64)
    (first,) = torch.autograd.grad(ours(h, w), h, g.requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()
