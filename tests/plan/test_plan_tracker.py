"""Live bytes, counted by hand; and fake tensors where a program asks for numbers."""

from __future__ import annotations

import gc

import pytest
import torch
from runs import profiled_peak
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from anyrank.plan.fake import LARGE, Answers
from anyrank.plan.gpu import gpu_paths
from anyrank.plan.tracker import HOST, OTHER, Tracker


def test_views_and_changes_in_place_take_nothing():
    tracker = Tracker()
    with tracker:
        a = torch.zeros(100)
        b = a.view(10, 10).T
        b += 1
        assert tracker.total == 400
        c = a * 2
        assert tracker.total == 800
        del a
        assert tracker.total == 800  # b is a view of it
        del b
        assert tracker.total == 400
    assert tracker.peaks[""].total() == 800
    del c
    assert tracker.total == 0


def test_kinds_and_phases():
    tracker = Tracker()
    weight = torch.zeros(25)
    tracker.mark([weight, weight[:5], None], "weight")
    with tracker:
        tracker.begin("first")
        a = weight + 1
        del a
        tracker.begin("second")
        assert tracker.live == {"weight": 100, OTHER: 0}
        tracker.mark([weight], HOST)
        assert tracker.total == 0
    assert tracker.peaks["first"] == {"weight": 100, OTHER: 100}
    assert tracker.peaks["second"].total() == 100
    tracker.forget_peaks()
    assert tracker.peaks == {}


def test_real_and_fake_tensors_and_the_allocator_agree():
    def step() -> None:
        net = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64), nn.LayerNorm(64))
        net(torch.randn(300, 64)).square().mean().backward()

    totals = []
    for fake in (False, True):
        tracker = Tracker()
        with FakeTensorMode() if fake else torch.no_grad(), torch.enable_grad(), tracker:
            step()
        gc.collect()
        assert tracker.total == 0
        totals.append(tracker.peaks[""].total())
    assert totals[0] == totals[1]
    assert totals[0] == pytest.approx(profiled_peak(step), rel=1e-3)


def test_answers():
    answers = Answers()
    with FakeTensorMode(), answers:
        x = torch.zeros(4, 6, requires_grad=True)
        mask = x > 0
        assert not mask.all()
        answers.flag = True
        assert mask.all()
        assert (x.sum().item(), torch.tensor(3).item()) == (1.0, LARGE)
        assert x[mask].shape == (24,)
        assert x[mask[:, 0]].shape == (4, 6)
        assert torch.masked_select(x, mask).shape == (24,)
        x[mask].sum().backward()
        assert x.grad is not None


def test_a_product_with_codes_makes_the_dense_weight():
    from bitsandbytes.functional import quantize_4bit

    tracker = Tracker()
    with FakeTensorMode(), tracker, Answers():
        w = torch.zeros(256, 512, dtype=torch.bfloat16)
        codes, state = quantize_4bit(w, blocksize=64, quant_type="nf4")
        before = tracker.total
        tracker.forget_peaks()
        x = torch.zeros(3, 512, dtype=torch.bfloat16)
        op = torch.ops.bitsandbytes.gemm_4bit
        y = op(x, codes, state.shape, state.absmax, state.blocksize, state.quant_type)
        assert y.shape == (3, 256)
    most = tracker.peaks[""].total() - before
    assert most == 2 * (3 * 512 + 256 * 512 + 3 * 256)


def test_a_gpu_keeps_layer_norms_in_float32():
    x, norm = torch.ones(2, 8, dtype=torch.bfloat16), nn.LayerNorm(8, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert norm(x).dtype == torch.bfloat16
        with gpu_paths():
            assert norm(x).dtype == torch.float32
        assert norm(x).dtype == torch.bfloat16
    with gpu_paths():
        assert norm(x).dtype == torch.bfloat16


def test_a_gpu_needs_one_tile_of_logits():
    """TRL's loss over 8192 tokens and 40000 words: 4096 x 32768 numbers of 2 bytes at once."""
    from trl.kernels import ChunkedLogProbFunction

    def peak() -> int:
        tracker = Tracker()
        with FakeTensorMode(), tracker:
            hidden = torch.zeros(8192, 64, dtype=torch.bfloat16, requires_grad=True)
            head = torch.zeros(40000, 64, dtype=torch.bfloat16)
            targets = torch.zeros(8192, dtype=torch.long)
            found = ChunkedLogProbFunction.apply(hidden, head, None, targets, 1.0, 32768)
            found[0].sum().backward()  # type: ignore[index, union-attr]
        return tracker.peaks[""].total()

    tile, on_cpu = 4096 * 32768 * 2, peak()
    with gpu_paths():
        on_gpu = peak()
    assert tile < on_gpu < 1.1 * tile
    assert on_cpu > 8 * tile
