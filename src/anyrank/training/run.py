"""A run is a folder: config.yaml goes in first, result.json last; done is the last file.

config.yaml                 every choice, resolved; `anyrank train --config` reads it back
metrics.jsonl               one line per logged step
checkpoint-N/               to resume from
adapter_model.safetensors   with adapter_config.json, anyrank.json, the tokenizer and a card
result.json                 the figures of the finished run
"""

from __future__ import annotations

import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..errors import RunError
from ..files import write_text

CONFIG, METRICS, RESULT = "config.yaml", "metrics.jsonl", "result.json"
_FREE_TO_CHANGE = {"resume_from_checkpoint", "output_dir", "save_total_limit", "logging_steps"}


@dataclass(frozen=True)
class Run:
    """An existing run: its folder and its resolved configuration."""

    folder: Path
    config: dict[str, Any]

    @classmethod
    def open(cls, folder: str | Path) -> Run:
        """Open a finished run.

        Raises:
            RunError: the folder is no run, or the run did not finish.
        """
        run = cls.read(Path(folder))
        if not (run.folder / RESULT).exists():
            raise RunError(
                f"{folder}: this run did not finish ({RESULT} is missing); "
                "finish it with anyrank train --config "
                f"{run.folder / CONFIG} --resume_from_checkpoint true"
            )
        return run

    @classmethod
    def read(cls, folder: Path) -> Run:
        """Open a run, finished or not."""
        if not (folder / CONFIG).is_file():
            raise RunError(f"{folder}: not a run folder ({CONFIG} is missing); see anyrank train")
        return cls(folder, yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8")))


def check_output(folder: Path, resume: bool) -> None:
    """Raise unless a new run may use `folder`, or (with `resume`) an unfinished one lies there.

    Raises:
        RunError: the folder holds another run or other files.
    """
    held = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
    if folder.exists() and not folder.is_dir():
        raise RunError(f"output_dir={folder} is a file; name a folder")
    if RESULT in held:
        raise RunError(f"output_dir={folder} holds a finished run; name another folder")
    if CONFIG in held and not resume:
        raise RunError(
            f"output_dir={folder} holds an unfinished run; go on with "
            "--resume_from_checkpoint true, or name another folder"
        )
    if held and CONFIG not in held:
        raise RunError(
            f"output_dir={folder} holds {len(held)} other files ({held[0]}, ...); "
            "name an empty or new folder"
        )


def claim(folder: Path, config: dict[str, Any]) -> None:
    """Write config.yaml, or (on resume) compare it with the one that is there.

    Raises:
        RunError: the run that is to be resumed was started with other options.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / CONFIG).exists():
        write_text(folder / CONFIG, yaml.safe_dump(config, sort_keys=False))
        return
    before = Run.read(folder).config
    for key in sorted((before.keys() | config.keys()) - _FREE_TO_CHANGE):
        if before.get(key) != config.get(key):
            raise RunError(
                f"output_dir={folder}: its run has {key}={before.get(key)!r}, this one "
                f"{config.get(key)!r}; resume with --config {folder / CONFIG}"
            )


def newest_checkpoint(folder: Path) -> Path:
    """The newest checkpoint that is whole; one that was cut off while being written is passed over.

    Raises:
        RunError: there is none.
    """
    numbered = [
        (int(p.name.removeprefix("checkpoint-")), p)
        for p in folder.glob("checkpoint-*")
        if p.name.removeprefix("checkpoint-").isdigit()
    ]
    for _, checkpoint in sorted(numbered, reverse=True):
        if is_whole(checkpoint):
            return checkpoint
    raise RunError(
        f"{folder}: no whole checkpoint among {len(numbered)} to resume from; "
        "start again in another output_dir"
    )


def is_whole(checkpoint: Path) -> bool:
    """Whether every file that a resume reads can be opened."""
    from safetensors import SafetensorError, safe_open

    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        with safe_open(str(checkpoint / "adapter_model.safetensors"), "pt") as tensors:
            tensors.keys()
    except (OSError, ValueError, SafetensorError):
        return False
    states = [checkpoint / "optimizer.pt", checkpoint / "scheduler.pt"]
    return all(zipfile.is_zipfile(path) for path in states)
