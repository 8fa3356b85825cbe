"""Killed at any moment, or out of disk: nothing under OUT, or a complete and valid result."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tiny import adapted, llama, quantized
from tiny_tokenizers import tiny_tokenizer

from anyrank.cli import run

FORMATS = ("mlx", "hqq", "torchao", "gguf")
VERBS = ("quantize", "fold", *FORMATS)


@pytest.fixture(scope="module")
def folders(base_folder, tmp_path_factory) -> Path:
    """A float model, its quantized form, and an adapter with ranks 1..4."""
    folder = tmp_path_factory.mktemp("interrupted")
    shutil.copytree(base_folder, folder / "model")
    base = quantized(llama(vocab_size=300))
    base.save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    model = adapted(base, "qalora", r=2, pool=32, nested=True)
    model.peft_config["default"].base_model_name_or_path = str(folder / "base")
    model.save_pretrained(folder / "adapter")
    return folder


def command(verb: str, folder: Path, out: Path) -> list[str]:
    """One verb that writes `out`."""
    words = {
        "quantize": ["quantize", folder / "model", out, "--group_size", 32],
        "fold": ["fold", folder / "adapter", out, "--ranks", "1,2"],
    }
    return [str(word) for word in words.get(verb, ["export", folder / "base", out, "--to", verb])]


def contents(out: Path) -> dict[str, str]:
    """The digest of every file; reports hold times and are left out."""
    files = [path for path in sorted(out.rglob("*")) if path.is_file()]
    return {
        path.name: hashlib.sha256(_bytes(path)).hexdigest()
        for path in files
        if path.name not in ("quantize.json", "fold.json")
    }


def _bytes(path: Path) -> bytes:
    """What a file holds; safetensors writes the metadata of its header in any order."""
    if path.suffix != ".safetensors":
        return path.read_bytes()
    with safe_open(path, "pt") as tensors:
        parts = [json.dumps(tensors.metadata() or {}, sort_keys=True).encode()]
        for name in sorted(tensors.keys()):
            tensor = tensors.get_tensor(name).reshape(-1)
            parts += [name.encode(), tensor.view(torch.uint8).numpy().tobytes()]
    return b"".join(parts)


@pytest.mark.parametrize("verb", VERBS)
def test_a_full_disk_is_one_line_and_leaves_nothing(verb, folders, tmp_path, monkeypatch, capsys):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert run(command(verb, folders, tmp_path / "out")) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"anyrank: {tmp_path / 'out'}: the ")
    assert line.endswith(
        " MB, but 0.0 MB are free; free some room, or name a folder on another disk"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("verb", VERBS)
def test_a_disk_that_fills_up_while_writing_leaves_nothing(
    verb, folders, tmp_path, monkeypatch, capsys
):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert run(command(verb, folders, tmp_path / "out")) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"anyrank: {tmp_path / 'out'}: the disk is full, nothing was written; free some room, or "
        "name a folder on another disk"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow  # starts the command line many times
@pytest.mark.parametrize("verb", VERBS)
def test_killed_at_random_moments(verb, folders, tmp_path):
    def start(out: Path) -> subprocess.Popen[bytes]:
        words = [sys.executable, "-m", "anyrank", *command(verb, folders, out)]
        quiet = subprocess.DEVNULL
        return subprocess.Popen(words, stdout=quiet, stderr=quiet)

    def writing(out: Path, process: subprocess.Popen[bytes]) -> bool:
        """Wait for the first byte, or for the end."""
        while process.poll() is None:
            if list(tmp_path.glob(f".{out.name}.partial-*")):
                return True
            time.sleep(0.001)
        return False

    whole = tmp_path / "whole"
    process = start(whole)
    assert writing(whole, process)
    began = time.monotonic()
    while not whole.exists():
        time.sleep(0.0005)
    seconds = time.monotonic() - began  # of writing alone: a small part of the process
    assert process.wait() == 0
    wanted = contents(whole)
    chance, hit = random.Random(0), 0
    for i in range(8):
        out = tmp_path / f"out{i}"
        process = start(out)
        assert writing(out, process)
        time.sleep(seconds * chance.uniform(0, 1))
        process.send_signal(signal.SIGKILL)
        process.wait()
        hit += not out.exists()
        assert not out.exists() or contents(out) == wanted
    assert hit > 0  # some were killed in the middle of writing
