"""What a plan predicts is what training takes: against torch's profiler, which knows no plan."""

from __future__ import annotations

import itertools

import pytest
import torch
from runs import measured_peak, planner, trainer_of, words_of, write_base
from trl.trainer import utils as trl_utils

BATCH, LENGTH = 4, 128
METHODS = {  # how the base is stored -> a method that trains on it, and two of its ranks
    "nf4": ("qlora", (4, 32)),
    "codes": ("qalora --nested true", (2, 4)),
    "float": ("lora", (4, 32)),
}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Tiles of logits that fit small models; of 32768 columns they would outweigh the rest."""
    monkeypatch.setattr(trl_utils, "_CHUNKED_LOGPROB_CHUNK_SIZE", 128)


def error(folder, name: str, options: str, *, codes: bool = False, batch: int = BATCH) -> float:
    """(predicted - measured) / measured."""
    base = write_base(name, folder / "base", codes=codes)
    words = words_of(base, batch, LENGTH, options)
    measured = measured_peak(words)
    estimate = planner(words).estimate(batch, LENGTH)
    return (estimate.total - estimate.overhead) / measured - 1


def options(stored: str, rank: int, checkpointing: bool) -> str:
    method = METHODS[stored][0]
    on = str(checkpointing).lower()
    return f"--method {method} --lora_r {rank} --gradient_checkpointing {on}"


GRID = [
    (name, stored, rank, checkpointing)
    for name, stored in itertools.product(("llama", "qwen3", "falcon"), METHODS)
    for rank, checkpointing in itertools.product(METHODS[stored][1], (True, False))
]


@pytest.mark.parametrize(
    ("name", "stored", "rank", "checkpointing"),
    [
        ("llama", "nf4", 32, False),
        ("qwen3", "nf4", 4, True),
        ("llama", "codes", 4, False),
        ("falcon", "float", 4, False),
    ],
)
def test_the_peak_of_training(tmp_path, name, stored, rank, checkpointing):
    words = options(stored, rank, checkpointing)
    assert abs(error(tmp_path, name, words, codes=stored == "codes")) < 0.02


@pytest.mark.slow  # a minute and more
@pytest.mark.parametrize(("name", "stored", "rank", "checkpointing"), GRID)
def test_the_peak_of_training_everywhere(tmp_path, name, stored, rank, checkpointing):
    test_the_peak_of_training(tmp_path, name, stored, rank, checkpointing)


LORA = "--method lora --lora_r 8"
MORE = [
    ("gemma3", f"{LORA} --gradient_checkpointing false"),  # layers of two kinds of attention
    ("moe", f"{LORA} --gradient_checkpointing true"),  # every other layer has experts
    ("llama", f"{LORA} --gradient_checkpointing false --attn_implementation eager"),
    ("llama", f"{LORA} --gradient_checkpointing false --lora_dropout 0.05"),
    ("llama", f"{LORA} --gradient_checkpointing true --optim adamw_8bit"),
    ("llama", f"{LORA} --gradient_checkpointing false --packing true"),
    ("gpt2", "--method qahira --gradient_checkpointing false --load_in_4bit false"),
]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("llama", f"{LORA} --gradient_checkpointing true --gradient_accumulation_steps 2"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE),
    ],
)
def test_options_that_change_memory(tmp_path, name, words):
    assert abs(error(tmp_path, name, words)) < 0.02


@pytest.mark.slow
def test_one_row_needs_no_mask(tmp_path):
    words = f"{LORA} --gradient_checkpointing false --attn_implementation eager"
    assert abs(error(tmp_path, "llama", words, batch=1)) < 0.02


@pytest.mark.parametrize(
    "method",
    [
        "--method dylora --ranks 1,64 --max_steps 3",
        "--method anyrank --load_in_4bit false --max_steps 10",
    ],
)
def test_a_step_of_a_small_rank_copies_the_other_rows(tmp_path, method):
    """The adapter is most of this run, and the smallest rank is drawn within a few steps."""
    base = write_base("llama", tmp_path / "base")
    words = words_of(base, 1, 32, f"{method} --lora_r 64 --gradient_checkpointing true")
    estimate = planner(words).estimate(1, 32)
    assert estimate.phase == "optimizer step"
    assert abs((estimate.total - estimate.overhead) / measured_peak(words) - 1) < 0.02


@pytest.mark.gpu  # the one place where a plan for a GPU meets a GPU
@pytest.mark.parametrize("stored", ["nf4", "float"])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_the_peak_of_training_on_a_gpu(tmp_path, stored, checkpointing):
    base = write_base("llama", tmp_path / "base")
    words = words_of(base, 16, 512, options(stored, 32, checkpointing))
    trainer = trainer_of(words)
    trainer.train()  # CUDA's own workspaces are made here
    torch.cuda.reset_peak_memory_stats()
    trainer.train()
    estimate = planner(words, on_gpu=True).estimate(16, 512)
    measured = torch.cuda.max_memory_allocated()
    assert abs((estimate.total - estimate.overhead) / measured - 1) < 0.1
