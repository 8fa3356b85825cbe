"""The one forward and backward against the equation, in float64, for every geometry and core."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from anyrank.algebra import Update
from anyrank.kernels import Branch, adapted_linear
from anyrank.kernels.dropout import dropped
from anyrank.kernels.linear import linear_reference

D_IN, D_OUT, TOKENS = 30, 42, (3, 7)
GEOMETRIES = [(1, 1), (2, 2), (3, 1), (1, 6), (5, 7), (30, 2)]
CORES = ["low_rank", "dense"]


class Dense:
    """A frozen weight as a plain tensor; what is inside is added to it."""

    def __init__(self, values: torch.Tensor) -> None:
        self.values = values

    def dense(self, dtype: torch.dtype, inside: Sequence[Update] = ()) -> torch.Tensor:
        w = self.values.to(dtype)
        for update in inside:
            w = w + update.weight().detach().to(dtype)
        return w


class Counted(Dense):
    reads = 0

    def dense(self, dtype: torch.dtype, inside: Sequence[Update] = ()) -> torch.Tensor:
        self.reads += 1
        return super().dense(dtype, inside)


def weight(dtype: torch.dtype = torch.float64) -> Counted:
    torch.manual_seed(1)
    return Counted(torch.randn(D_OUT, D_IN, dtype=torch.float64).to(dtype))


def update(
    p: int, q: int, core: str = "low_rank", dtype: torch.dtype = torch.float64, rows: int = 3
) -> Update:
    torch.manual_seed(2)
    d_in, d_out = D_IN // p, D_OUT // q
    shapes = [(d_out, d_in)] if core == "dense" else [(rows, d_in), (d_out, rows)]
    parts = (torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes)
    return Update(tuple(parts), p, q, 0.7)


def inputs(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(3)
    x = torch.randn(*TOKENS, D_IN, dtype=torch.float64).to(dtype).requires_grad_()
    return x, torch.randn(*TOKENS, D_OUT, dtype=torch.float64).to(dtype)


def relative_rms(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((got - wanted).pow(2).mean() / wanted.pow(2).mean()).sqrt().item()


def factor(p: float) -> torch.Tensor:
    """D as a factor per element, as the next call draws it; the random state is put back."""
    state = torch.get_rng_state()
    ones = dropped(torch.ones(21, D_IN), p).x.view(*TOKENS, D_IN)
    torch.set_rng_state(state)
    assert 0 < (ones == 0).sum() < ones.numel()
    return ones.double() / (1 - p)


def kept_by(x: torch.Tensor, branches: list[Branch]) -> dict[tuple[int, ...], int]:
    """Shapes that a call keeps for its backward pass, beside x itself, with their bytes."""
    kept: dict[tuple[int, ...], int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        if t.untyped_storage().data_ptr() != x.untyped_storage().data_ptr():
            kept[tuple(t.shape)] = t.nbytes
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        adapted_linear(x, weight(x.dtype), None, branches)
    return kept


@pytest.mark.parametrize("dropout", [0.0, 0.15, 0.5])
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize(("p", "q"), GEOMETRIES)
def test_forward_and_every_gradient_equal_the_equation(p, q, core, inside, dropout):
    x, upstream = inputs()
    w, change = weight(), update(p, q, core)
    bias = torch.randn(D_OUT, dtype=torch.float64, requires_grad=True)
    factors = [factor(dropout)] if dropout else []
    y = adapted_linear(x, w, bias, [Branch(change, inside, dropout)])
    reference = linear_reference(x, w.values, bias, [change], factors)
    assert relative_rms(y, reference) < 1e-14
    got = torch.autograd.grad(y, (x, bias, *change.core), upstream)
    wanted = torch.autograd.grad(reference, (x, bias, *change.core), upstream)
    for mine, theirs in zip(got, wanted, strict=True):
        assert relative_rms(mine, theirs) < 1e-13
    assert w.reads == 2  # once per pass


@pytest.mark.parametrize("dropout", [0.0, 0.15])
@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize(("p", "q"), GEOMETRIES)
def test_bf16_stays_near_the_float64_reference_and_factors_keep_their_precision(
    p, q, core, dropout
):
    x, upstream = inputs(torch.bfloat16)
    w, change = weight(torch.bfloat16), update(p, q, core, torch.float32)
    torch.manual_seed(5)
    factors = [factor(dropout)] if dropout else []
    y = adapted_linear(x, w, None, [Branch(change, False, dropout)])
    got = torch.autograd.grad(y, (x, *change.core), upstream)
    exact = x.detach().double().requires_grad_()
    wide = change._replace(core=tuple(c.detach().double().requires_grad_() for c in change.core))
    reference = linear_reference(exact, w.values.double(), None, [wide], factors)
    wanted = torch.autograd.grad(reference, (exact, *wide.core), upstream.double())
    assert y.dtype == torch.bfloat16
    assert [g.dtype for g in got] == [torch.bfloat16] + [torch.float32] * len(change.core)
    assert relative_rms(y.double(), reference) < 1e-2
    for mine, theirs in zip(got, wanted, strict=True):
        assert relative_rms(mine.double(), theirs) < 1e-2


def test_copying_the_product_is_the_same_as_copying_the_factor(monkeypatch):
    """R and P^T act on activations where the factor has many columns."""
    x, upstream = inputs()
    for p, q in GEOMETRIES:
        change = update(p, q)
        y = adapted_linear(x, weight(), None, [Branch(change, False, 0.0)])
        got = torch.autograd.grad(y, (x, *change.core), upstream)
        with monkeypatch.context() as patch:
            patch.setattr("anyrank.kernels.linear.PASS_COLUMNS", {"cpu": 0})
            y = adapted_linear(x, weight(), None, [Branch(change, False, 0.0)])
            again = torch.autograd.grad(y, (x, *change.core), upstream)
        for mine, theirs in zip(got, again, strict=True):
            assert relative_rms(mine, theirs) < 1e-14


def test_several_adapters_add_up():
    x, upstream = inputs()
    changes = [update(1, 1), update(5, 7, "dense"), update(2, 1)]
    branches = [Branch(changes[0]), Branch(changes[1], inside=True), Branch(changes[2])]
    y = adapted_linear(x, weight(), None, branches)
    reference = linear_reference(x, weight().values, None, changes)
    trained = [x, *(part for change in changes for part in change.core)]
    got = torch.autograd.grad(y, trained, upstream)
    for mine, theirs in zip(got, torch.autograd.grad(reference, trained, upstream), strict=True):
        assert relative_rms(mine, theirs) < 1e-13


def test_what_is_kept_for_the_backward_pass():
    x, _ = inputs()
    factors = {(3, D_IN): 720, (D_OUT, 3): 1008}
    assert kept_by(x, [Branch(update(1, 1))]) == {**factors, (21, 3): 504}  # beside x: A x
    pooled = {(3, 6): 144, (6, 3): 144}
    assert kept_by(x, [Branch(update(5, 7))]) == {**pooled, (21, 6): 1008, (21, 3): 504}
    assert kept_by(x, [Branch(update(5, 7), inside=True)]) == {**pooled, (21, 6): 1008}
    frozen = update(1, 1)
    frozen.core[0].requires_grad_(False)
    x = x.detach().clone().requires_grad_()
    seen = kept_by(x, [Branch(frozen)])
    assert seen == {**factors, (21, 3): 504}


def test_with_a_frozen_the_input_is_not_kept():
    x, _ = inputs()
    frozen = update(1, 1)
    frozen.core[0].requires_grad_(False)
    held = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t) or t, lambda t: t):
        adapted_linear(x, weight(), None, [Branch(frozen)])
    assert sorted(tuple(t.shape) for t in held) == [(3, D_IN), (21, 3), (D_OUT, 3)]


def test_an_input_without_gradient_reads_the_weight_once():
    x, upstream = inputs()
    w, change = weight(), update(1, 1)
    adapted_linear(x.detach(), w, None, [Branch(change)]).backward(upstream)
    assert w.reads == 1
    assert change.core[0].grad is not None


def test_an_output_may_be_added_to_in_place():
    """As Falcon does with the outputs of its attention and its MLP."""
    x, upstream = inputs()
    first, second = update(1, 1), update(2, 1)
    y = adapted_linear(x, weight(), None, [Branch(first)])
    y += adapted_linear(x, weight(), None, [Branch(second)])
    reference = linear_reference(x, 2 * weight().values, None, [first, second])
    trained = [x, *first.core, *second.core]
    got = torch.autograd.grad(y, trained, upstream)
    for mine, theirs in zip(got, torch.autograd.grad(reference, trained, upstream), strict=True):
        assert relative_rms(mine, theirs) < 1e-13


@pytest.mark.parametrize("dropout", [0.0, 0.15])
def test_autocast_computes_in_its_dtype(dropout):
    x, upstream = inputs(torch.float32)
    w, change = weight(torch.float32), update(2, 1, dtype=torch.float32)
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        y = adapted_linear(x, w, None, [Branch(change, False, dropout)])
        got = torch.autograd.grad(y, (x, *change.core), upstream.bfloat16())
    torch.manual_seed(0)
    low = x.detach().bfloat16().requires_grad_()
    wanted = adapted_linear(low, w, None, [Branch(change, False, dropout)])
    again = torch.autograd.grad(wanted, (low, *change.core), upstream.bfloat16())
    assert torch.equal(y, wanted)
    assert [g.dtype for g in got] == [torch.float32] * 3
    for mine, theirs in zip(got, again, strict=True):
        assert torch.equal(mine, theirs.float())


def test_a_compute_dtype_is_that_of_the_products_and_not_of_the_result():
    x, upstream = inputs(torch.float32)
    change = update(1, 1, dtype=torch.float32)
    y = adapted_linear(x, weight(), None, [Branch(change)], dtype=torch.bfloat16)
    low = adapted_linear(x.bfloat16(), weight(), None, [Branch(change)])
    assert y.dtype == torch.float32
    assert torch.equal(y, low.float())
    assert torch.autograd.grad(y, x, upstream)[0].dtype == torch.float32


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.15])
def test_gradient_checkpointing_gives_the_same_bits(dropout, reentrant):
    x, upstream = inputs()
    w, first, second = weight(), update(1, 1), update(5, 1)
    trained = [x, *first.core, *second.core]

    def block(x: torch.Tensor) -> torch.Tensor:
        h = x * 1.5  # read by both, as q and k read one norm
        one = adapted_linear(h, w, None, [Branch(first, False, dropout)], reader=1)
        return one + adapted_linear(h, w, None, [Branch(second, False, dropout)], reader=2)

    torch.manual_seed(0)
    y = block(x)
    plain = torch.autograd.grad(y, trained, upstream)
    torch.manual_seed(0)
    again = checkpoint(block, x, use_reentrant=reentrant)
    assert torch.equal(again, y)
    again.backward(upstream)
    for mine, theirs in zip(trained, plain, strict=True):
        assert torch.equal(mine.grad, theirs)


# torch.compile makes an instance of autograd.Function, of which autograd.Function warns
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("dropout", [0.0, 0.15])
@pytest.mark.parametrize(("p", "q"), GEOMETRIES)
def test_torch_compile_sees_one_graph(p, q, dropout):
    x, upstream = inputs()
    w, change = Dense(weight().values), update(p, q)

    def run(x: torch.Tensor) -> torch.Tensor:
        return adapted_linear(x, w, None, [Branch(change, False, dropout)], reader=1)

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    y = compiled(x)
    got = torch.autograd.grad(y, (x, *change.core), upstream)
    assert all(g.isfinite().all() for g in got)
    if not dropout:
        wanted = torch.autograd.grad(run(x), (x, *change.core), upstream)
        for mine, theirs in zip(got, wanted, strict=True):
            assert relative_rms(mine, theirs) < 1e-14


def test_a_second_derivative_is_refused():
    x, _ = inputs()
    y = adapted_linear(x, weight(), None, [Branch(update(1, 1))])
    (first,) = torch.autograd.grad(y.pow(2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()
