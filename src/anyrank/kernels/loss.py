"""Cross-entropy of next tokens that keeps the logits in their own dtype and nothing else.

    loss = - sum over labelled tokens of log softmax(z)[label] / count
    dz   = (softmax(z) - onehot(label)) / count                         z: [tokens, vocabulary]

Transformers casts all logits to float32, keeps their logarithms of probability as well, and makes
the gradient in float32: at 8,192 words 12 bytes more per logit. Here pieces of CHUNK logits are
cast at a time. Same arguments as Transformers' loss for causal language models.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK = 2**20  # logits in float32 at a time


def causal_lm_loss(
    logits: Tensor,
    labels: Tensor | None,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """The mean negative log-likelihood of the next tokens.

    Args:
        logits: [batch, tokens, vocabulary].
        labels: [batch, tokens]; the label of a token is the one that follows it.
        vocab_size: words of the vocabulary.
        num_items_in_batch: what the sum is divided by; None: the labelled tokens here.
        ignore_index: a label that does not count.
        shift_labels: [batch, tokens], labels that are shifted already.

    Returns:
        A float32 number.
    """
    if shift_labels is None:
        assert labels is not None
        shift_labels = torch.nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    wanted = shift_labels.reshape(-1).to(logits.device)
    count = (wanted != ignore_index).sum() if num_items_in_batch is None else num_items_in_batch
    losses: Any = _TokenLosses.apply(logits.reshape(-1, vocab_size), wanted, ignore_index)
    return losses.sum() / count


class _TokenLosses(torch.autograd.Function):
    """[tokens, vocabulary] and labels [tokens] to losses [tokens] in float32."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
        kept = labels != ignore_index
        labels = labels.where(kept, 0)
        losses = logits.new_empty(len(logits), dtype=torch.float32)
        for z, label, out in _pieces(logits, labels, losses):
            out.copy_(z.float().log_softmax(-1).gather(-1, label[:, None])[:, 0])
        ctx.save_for_backward(logits, labels, kept)
        return losses.neg_().where(kept, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        logits, labels, kept = ctx.saved_tensors
        scale = gradients[0].where(kept, 0)
        dz = torch.empty_like(logits)
        for z, label, factor, out in _pieces(logits, labels, scale, dz):
            p = z.float().softmax(-1)
            p.scatter_add_(-1, label[:, None], torch.full_like(p[:, :1], -1))
            out.copy_(p.mul_(factor[:, None]))
        return dz, None, None


def _pieces(logits: Tensor, *others: Tensor) -> Any:
    """The same rows of every tensor, so many that CHUNK logits are read at a time."""
    rows = max(CHUNK // logits.shape[-1], 1)
    return zip(*(tensor.split(rows) for tensor in (logits, *others)), strict=True)
