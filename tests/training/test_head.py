"""TRL's fused head in small tiles: the same bits."""

from __future__ import annotations

import torch
from trl.kernels import chunked_logprob
from trl.kernels.chunked_logprob import ChunkedLogProbFunction

from anyrank.training.head import CPU_TOKENS, small_tiles

TOKENS, WIDTH, WORDS = 2 * CPU_TOKENS + 3, 16, 70
OUTPUTS = ("entropy", "is_top1")


def head(device: str) -> tuple[int, list[torch.Tensor]]:
    """The tokens of a tile; log p, entropy, is_top1 and the gradient of the hidden states."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH, generator=generator).bfloat16().requires_grad_()
    weight = torch.randn(WORDS, WIDTH, generator=generator).bfloat16()
    targets = torch.randint(0, WORDS, (TOKENS,), generator=generator)
    with small_tiles(device):
        found = ChunkedLogProbFunction.apply(
            hidden, weight, None, targets, 1.0, 32, None, 1.0, OUTPUTS
        )
        found[0].sum().backward()
        tile = chunked_logprob.TOKEN_CHUNK_SIZE
    assert hidden.grad is not None
    kept = [tensor.detach() for tensor in found if tensor is not None]
    return tile, [*kept, hidden.grad]


def test_small_tiles_change_no_bit_and_are_for_a_cpu_only():
    before = chunked_logprob.TOKEN_CHUNK_SIZE
    (small, ours), (usual, theirs) = head("cpu"), head("cuda")
    assert (small, usual) == (CPU_TOKENS, before)
    assert before == chunked_logprob.TOKEN_CHUNK_SIZE
    assert len(ours) == 4
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)
