"""Attention over short rows, against float64 and beside torch's own in bf16."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from anyrank.kernels import attention as short
from anyrank.kernels.attention import attention


@pytest.fixture(autouse=True)
def any_cpu(monkeypatch):
    monkeypatch.setattr(short, "multiplies_bf16", lambda: True)


@pytest.fixture
def taken(monkeypatch) -> list[int]:
    """A number for every call that our kernel computes."""
    calls: list[int] = []
    own = short._ShortAttention.forward

    def counted(*args: Any) -> Tensor:
        calls.append(1)
        return own(*args)

    monkeypatch.setattr(short._ShortAttention, "forward", staticmethod(counted))
    return calls


def inputs(
    batch: int = 2, heads: int = 4, keys: int = 4, tokens: int = 70, d: int = 32, d_v: int = 32
) -> list[Tensor]:
    """q, k and v as a decoder hands them over: [batch, heads, tokens, d], tokens before heads."""
    torch.manual_seed(0)
    sizes = ((heads, d), (keys, d), (keys, d_v))
    made = (torch.randn(batch, tokens, *size) * 2 for size in sizes)
    return [t.bfloat16().transpose(1, 2).requires_grad_() for t in made]


def causal(batch: int, tokens: int) -> Tensor:
    return torch.ones(batch, 1, tokens, tokens, dtype=torch.bool).tril()


def padded(batch: int, tokens: int) -> Tensor:
    """Rows that end in padding, the second in more than the first."""
    ends = torch.arange(1, batch + 1) * tokens // (batch + 2)
    return causal(batch, tokens) & (torch.arange(tokens) < tokens - ends[:, None])[:, None, None]


def packed(batch: int, tokens: int) -> Tensor:
    """One mask for all rows: two texts that do not see each other."""
    text = torch.arange(tokens) > tokens // 3
    return causal(1, tokens) & (text[:, None] == text)


def results(function: Any, tensors: list[Tensor], **options: Any) -> list[Tensor]:
    """The output and the gradients of q, k and v."""
    o = function(*tensors, **options)
    torch.manual_seed(1)
    g = torch.randn(o.shape, dtype=torch.float32).to(o.dtype)
    return [o, *torch.autograd.grad(o, tensors, g)]


def errors(got: list[Tensor], wanted: list[Tensor]) -> list[float]:
    return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(got, wanted, strict=True)]


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"tokens": 3},
        {"tokens": 64},
        {"tokens": 200, "batch": 3},
        {"keys": 2, "batch": 1},
        {"keys": 1, "d": 8, "d_v": 16, "tokens": 129},
    ],
)
@pytest.mark.parametrize("mask", [None, padded, packed])
@pytest.mark.parametrize("chunk", [1, 2**13, 2**20])
def test_as_close_to_float64_as_torch_is(shape, mask, chunk, taken, monkeypatch):
    monkeypatch.setattr(short, "CHUNK", chunk)
    tensors = inputs(**shape)
    batch, tokens = len(tensors[0]), tensors[0].shape[2]
    options = {"attn_mask": mask and mask(batch, tokens), "is_causal": mask is None}
    options |= {"enable_gqa": True, "scale": 0.3}
    exact = [t.detach().double().requires_grad_() for t in tensors]
    wanted = results(scaled_dot_product_attention, exact, **options)
    got = results(attention, tensors, **options)
    assert taken == [1]
    assert [t.dtype for t in got] == [torch.bfloat16] * 4
    theirs = results(scaled_dot_product_attention, tensors, **options)
    for mine, torchs in zip(errors(got, wanted), errors(theirs, wanted), strict=True):
        assert mine < 1.4 * torchs + 1e-3
        assert mine < 8e-3


def test_a_mask_that_hides_only_later_tokens_is_not_read():
    tensors = inputs()
    wanted = results(attention, tensors, is_causal=True)
    got = results(attention, tensors, attn_mask=causal(2, 70))
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_the_layout_is_that_which_the_next_layer_reads():
    o = attention(*inputs(), is_causal=True)
    assert o.transpose(1, 2).is_contiguous()


def test_kept_are_only_the_inputs():
    tensors = inputs()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        attention(*tensors, is_causal=True)
    assert [t.data_ptr() for t in kept] == [t.data_ptr() for t in tensors]


def left_padded(batch: int, tokens: int) -> Tensor:
    """Rows whose first tokens see nothing at all."""
    return causal(batch, tokens) & (torch.arange(tokens) > 5)


OTHERS = {
    "every token sees every other": dict,
    "the same, by a mask": lambda: {"attn_mask": torch.ones(1, 1, 70, 70, dtype=torch.bool)},
    "first tokens see nothing": lambda: {"attn_mask": left_padded(2, 70)},
    "numbers to add": lambda: {"attn_mask": torch.zeros(70, 70, dtype=torch.bfloat16)},
    "a mask of two dimensions": lambda: {"attn_mask": causal(1, 70)[0, 0]},
    "dropout": lambda: {"is_causal": True, "dropout_p": 0.5},
}


@pytest.mark.parametrize("options", OTHERS.values(), ids=OTHERS)
def test_what_is_not_causal_goes_to_torch(options, taken):
    both = []
    for function in (attention, scaled_dot_product_attention):
        torch.manual_seed(3)
        both.append(results(function, inputs(), **options()))
    assert not taken
    assert all(torch.equal(a, b) for a, b in zip(*both, strict=True))


def test_what_is_long_or_in_float32_or_cached_goes_to_torch(taken, monkeypatch):
    tensors = inputs()
    with monkeypatch.context() as patch:
        patch.setattr(short, "LONG", 70)
        attention(*tensors, is_causal=True)
    with monkeypatch.context() as patch:
        patch.setattr(short, "multiplies_bf16", lambda: False)
        attention(*tensors, is_causal=True)
    attention(*(t.float() for t in tensors), is_causal=True)
    attention(tensors[0][:, :, -1:], *tensors[1:])  # one new token and the keys of all
    assert not taken
    attention(*tensors, is_causal=True)
    assert taken


def test_under_autocast_it_runs_in_its_dtype(taken):
    tensors = [t.detach().float().requires_grad_() for t in inputs()]
    with torch.autocast("cpu", torch.bfloat16):
        got = results(attention, tensors, is_causal=True)
    low = [t.detach().bfloat16().requires_grad_() for t in tensors]
    assert taken == [1]
    assert got[0].dtype == torch.bfloat16
    for mine, wanted in zip(got, results(attention, low, is_causal=True), strict=True):
        assert torch.equal(mine.float(), wanted.float())
