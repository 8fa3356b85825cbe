"""The layer on affine codes against the naive equation, in float64."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from anyrank.algebra import Update, adapter_output
from anyrank.kernels import Affine, AffineFormat, Branch, adapted_linear, fold_offsets, pack

D_IN, D_OUT = 96, 48
GEOMETRIES = [  # tile, p, q
    ((1, 16), 16, 1),
    ((1, 16), 48, 3),
    ((1, 32), 32, 2),
    ((8, 4), 4, 8),
    ((8, 4), 12, 16),
]


def affine(tile: tuple[int, int], bits: int = 4, dtype: torch.dtype = torch.float16) -> Affine:
    torch.manual_seed(0)
    form = AffineFormat(bits, tile, dtype)
    codes = torch.randint(2**bits, (D_OUT, D_IN), dtype=torch.uint8)
    shape = form.tiles(D_OUT, D_IN)
    scales, offsets = torch.rand(shape) * 0.01, torch.randn(shape) * 0.1
    return Affine(pack(codes, bits), scales.to(dtype), offsets.to(dtype), form)


def update(p: int, q: int, core: str, dtype: torch.dtype = torch.float64) -> Update:
    torch.manual_seed(1)
    shapes = [(D_OUT // q, D_IN // p)] if core == "dense" else [(3, D_IN // p), (D_OUT // q, 3)]
    parts = [torch.randn(shape, dtype=dtype).mul_(0.1).requires_grad_() for shape in shapes]
    return Update(tuple(parts), p, q, 0.7)


def affine_linear(x: torch.Tensor, weight: Affine, updates: Sequence[Update] = ()) -> torch.Tensor:
    return adapted_linear(x, weight, None, [Branch(update, inside=True) for update in updates])


def relative_rms(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((got - wanted).pow(2).mean() / wanted.pow(2).mean()).sqrt().item()


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("tile", [(1, 16), (8, 4)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_weight_is_scale_times_code_plus_offset(bits, tile, dtype):
    weight = affine(tile, bits, dtype)
    torch.manual_seed(0)
    codes = torch.randint(2**bits, (D_OUT, D_IN), dtype=torch.uint8).float()
    rows, columns = tile
    for part in (weight.scales, weight.offsets):
        assert part.dtype == dtype
    scales, offsets = (
        part.float().repeat_interleave(rows, 0).repeat_interleave(columns, 1)
        for part in (weight.scales, weight.offsets)
    )
    assert torch.equal(weight.weight(), scales * codes + offsets)
    assert torch.equal(weight.weight(torch.bfloat16), (scales * codes + offsets).bfloat16())


@pytest.mark.parametrize("tile", [(1, 16), (8, 4)])
def test_a_weight_that_is_read_in_pieces_is_the_same(tile, monkeypatch):
    weight = affine(tile, 3)
    whole = weight.weight(torch.bfloat16)
    for size in (1, 5 * D_IN, 20 * D_IN):
        monkeypatch.setattr("anyrank.kernels.affine.CPU_CHUNK", size)
        assert torch.equal(weight.weight(torch.bfloat16), whole)


@pytest.mark.parametrize("core", ["low_rank", "dense"])
@pytest.mark.parametrize(("tile", "p", "q"), GEOMETRIES)
def test_forward_and_gradients_equal_the_naive_reference(tile, p, q, core):
    """Offsets in float64 here, so that nothing but the order of sums differs."""
    weight, change = affine(tile), update(p, q, core)
    weight = weight._replace(offsets=weight.offsets.double())
    x = torch.randn(2, 5, D_IN, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(2, 5, D_OUT, dtype=torch.float64)
    y = affine_linear(x, weight, [change])
    dense = weight.weight(torch.float64)
    reference = x @ dense.T + adapter_output(x, *change)
    assert relative_rms(y, reference) < 1e-6  # the weight is summed in float32
    got = torch.autograd.grad(y, (x, *change.core), upstream)
    wanted = torch.autograd.grad(reference, (x, *change.core), upstream)
    assert relative_rms(got[0], wanted[0]) < 1e-6
    for mine, theirs in zip(got[1:], wanted[1:], strict=True):
        assert relative_rms(mine, theirs) < 1e-14


@pytest.mark.parametrize("storage", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("tile", "p", "q"), GEOMETRIES)
def test_the_forward_is_the_one_of_the_folded_weight_bit_for_bit(tile, p, q, storage):
    weight, change = affine(tile, dtype=storage), update(p, q, "low_rank", torch.float32)
    folded = weight._replace(offsets=fold_offsets(weight.offsets, change, tile))
    assert folded.offsets.dtype == storage
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        x = torch.randn(7, D_IN, dtype=dtype)
        y = affine_linear(x, weight, [change])
        assert torch.equal(y, affine_linear(x, folded))
        assert torch.equal(y, torch.nn.functional.linear(x, folded.weight(dtype)))


@pytest.mark.parametrize(("tile", "p", "q"), GEOMETRIES)
def test_a_folded_offset_is_the_exact_sum_rounded_once(tile, p, q):
    weight, change = affine(tile), update(p, q, "low_rank", torch.float32)
    a, b = (part.detach().double() for part in change.core)
    delta = 0.7 * (b @ a) / p
    delta = delta.repeat_interleave(q, 0).repeat_interleave(p, 1)[:: tile[0], :: tile[1]]
    wanted = (weight.offsets.double() + delta).half()
    assert torch.equal(fold_offsets(weight.offsets, change, tile), wanted)
    assert not torch.equal(wanted, weight.offsets)


def test_bf16_gradients_stay_near_the_float64_reference():
    weight, change = affine((1, 32)), update(32, 2, "low_rank", torch.float32)
    x = torch.randn(64, D_IN, dtype=torch.bfloat16, requires_grad=True)
    upstream = torch.randn(64, D_OUT, dtype=torch.bfloat16)
    y = affine_linear(x, weight, [change])
    got = torch.autograd.grad(y, (x, *change.core), upstream)
    exact = x.detach().double().requires_grad_()
    wide = Update(tuple(c.detach().double().requires_grad_() for c in change.core), 32, 2, 0.7)
    reference = exact @ weight.weight(torch.float64).T + adapter_output(exact, *wide)
    wanted = torch.autograd.grad(reference, (exact, *wide.core), upstream.double())
    assert [grad.dtype for grad in got] == [torch.bfloat16, torch.float32, torch.float32]
    for mine, theirs in zip(got, wanted, strict=True):
        assert relative_rms(mine.double(), theirs) < 1e-2


def test_autocast_computes_in_its_dtype_and_folds_as_without_it():
    weight, change = affine((1, 32)), update(32, 1, "low_rank", torch.float32)
    x = torch.randn(5, D_IN)
    with torch.autocast("cpu", torch.bfloat16):
        y = affine_linear(x, weight, [change])
    assert torch.equal(y, affine_linear(x.bfloat16(), weight, [change]))


def test_two_updates_fold_one_after_the_other():
    weight = affine((1, 16))
    first, second = update(16, 1, "low_rank"), update(48, 3, "dense")
    offsets = fold_offsets(fold_offsets(weight.offsets, first, (1, 16)), second, (1, 16))
    x = torch.randn(4, D_IN)
    y = affine_linear(x, weight, [first, second])
    assert torch.equal(y, affine_linear(x, weight._replace(offsets=offsets)))
    gradients = torch.autograd.grad(y.sum(), (*first.core, *second.core))
    alone = torch.autograd.grad(affine_linear(x, weight, [second]).sum(), second.core)
    assert torch.equal(gradients[-1], alone[0])


def test_nothing_of_the_size_of_the_input_or_of_the_weight_is_kept_for_the_backward_pass():
    weight, change = affine((1, 32)), update(32, 1, "low_rank", torch.float32)
    kept = []
    x = torch.randn(64, D_IN, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        affine_linear(x, weight, [change])
    assert sorted(kept) == [(3, D_IN // 32), (D_OUT, 3), (64, D_IN // 32)]


def test_a_frozen_factor_gets_no_gradient():
    weight, change = affine((1, 32)), update(32, 1, "low_rank")
    change.core[0].requires_grad_(False)
    x = torch.randn(4, D_IN, dtype=torch.float64)
    affine_linear(x, weight, [change]).sum().backward()
    assert change.core[0].grad is None
    assert change.core[1].grad is not None
