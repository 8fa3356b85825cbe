"""The lean cross-entropy against Transformers' own, and against float64."""

from __future__ import annotations

import pytest
import torch
from transformers.loss.loss_utils import ForCausalLMLoss

from anyrank.kernels import loss as lean
from anyrank.kernels.loss import causal_lm_loss

ROWS, TOKENS, WORDS = 3, 7, 101


def case(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    logits = (torch.randn(ROWS, TOKENS, WORDS) * 5).to(dtype).requires_grad_()
    labels = torch.randint(WORDS, (ROWS, TOKENS))
    labels[0, :4] = -100
    return logits, labels


def relative_rms(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((got - wanted).pow(2).mean() / wanted.pow(2).mean()).sqrt().item()


@pytest.mark.parametrize("chunk", [1, 4 * WORDS, 2**20])
@pytest.mark.parametrize("options", [{}, {"num_items_in_batch": torch.tensor(40)}, {"shift": True}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_and_gradient_are_those_of_transformers(dtype, options, chunk, monkeypatch):
    monkeypatch.setattr(lean, "CHUNK", chunk)
    logits, labels = case(dtype)
    options = dict(options)
    if options.pop("shift", False):
        options["shift_labels"] = labels.roll(2)
    got = causal_lm_loss(logits, labels, WORDS, **options)
    (gradient,) = torch.autograd.grad(got * 3, logits)
    wanted = ForCausalLMLoss(logits, labels, WORDS, **options)
    (reference,) = torch.autograd.grad(wanted * 3, logits)
    assert got.dtype == torch.float32
    assert abs(got - wanted) < 1e-6 * wanted
    assert gradient.dtype == dtype
    # the same rounding of the same number, but for the last bit of an exponential
    assert relative_rms(gradient.double(), reference.double()) < (
        1e-6 if dtype == torch.float32 else 1e-3
    )


def test_the_gradient_is_that_of_float64():
    logits, labels = case(torch.float32)
    (got,) = torch.autograd.grad(causal_lm_loss(logits, labels, WORDS), logits)
    exact = logits.detach().double().requires_grad_()
    flat = exact[:, :-1].reshape(-1, WORDS)
    wanted = torch.nn.functional.cross_entropy(flat, labels[:, 1:].reshape(-1))
    (reference,) = torch.autograd.grad(wanted, exact)
    assert relative_rms(got.double(), reference) < 1e-6
    assert got[:, -1].count_nonzero() == 0  # the last token of a row predicts nothing
    assert got[0, :3].count_nonzero() == 0


def test_the_logits_are_kept_in_their_own_dtype_and_nothing_else_of_their_size():
    logits, labels = case(torch.bfloat16)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        causal_lm_loss(logits, labels, WORDS)
    large = [t for t in kept if t.numel() >= logits.numel()]
    assert [(t.dtype, t.data_ptr()) for t in large] == [(torch.bfloat16, logits.data_ptr())]


def test_a_batch_without_labels_is_not_a_number_as_in_transformers():
    logits, labels = case(torch.float32)
    nothing = torch.full_like(labels, -100)
    assert causal_lm_loss(logits, nothing, WORDS).isnan()
    assert ForCausalLMLoss(logits, nothing, WORDS).isnan()
