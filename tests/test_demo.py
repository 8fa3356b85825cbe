"""The embedded default: what its generator makes, small, and new to the model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from anyrank import demo

ROOT = Path(__file__).parent.parent


def rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_generator_makes_the_rows_of_the_package(tmp_path):
    script = ROOT / "demo" / "world.py"
    subprocess.run([sys.executable, script, "--out", tmp_path], check=True, capture_output=True)
    for path in (demo.TRAIN_ROWS, demo.TEST_ROWS):
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def test_the_test_asks_for_facts_of_the_training_rows_in_other_words():
    trained, asked = rows(demo.TRAIN_ROWS), rows(demo.TEST_ROWS)
    assert {row["prompt"] for row in asked}.isdisjoint(row["prompt"] for row in trained)
    assert len({row["prompt"] for row in trained}) == len(trained) == 1200
    assert len(asked) == 200


def test_the_model_is_small_bf16_and_wide_enough_for_rank_64():
    from safetensors import safe_open

    path = demo.MODEL / "model.safetensors"
    assert path.stat().st_size <= 8_000_000
    with safe_open(str(path), "pt") as tensors:
        shapes = {key: tensors.get_slice(key) for key in tensors.keys()}  # noqa: SIM118
        assert {part.get_dtype() for part in shapes.values()} == {"BF16"}
        linear = [s.get_shape() for key, s in shapes.items() if "proj" in key]
    assert min(min(shape) for shape in linear) >= 64


@pytest.mark.slow
def test_the_demo_teaches_what_it_promises(tmp_path):
    command = [sys.executable, "-m", "anyrank", "demo", "--output_dir", str(tmp_path / "out")]
    subprocess.run(command, check=True)
    found = json.loads((tmp_path / "out" / "run" / "sweep.json").read_text())
    share = {row["rank"]: row["exact_match"] for row in found["ranks"]}
    assert found["base"]["exact_match"] < 0.2
    assert min(share[rank] for rank in share if rank >= 4) >= 0.95
    assert 0.5 < share[1] < share[64]
    assert (tmp_path / "out" / "lora" / "adapter_model.safetensors").exists()
