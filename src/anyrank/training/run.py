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
_FREE_TO_CHANGE = {"output_dir", "logging_steps", "report_to", "disable_tqdm"} | {
    "save_strategy",
    "save_steps",
    "save_total_limit",
}


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
        try:
            config = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            reason = " ".join(str(error).split())
            raise RunError(f"{folder / CONFIG}: not valid YAML ({reason})") from error
        if not isinstance(config, dict):
            raise RunError(f"{folder / CONFIG}: must hold one 'key: value' per line")
        return cls(folder, config)


def check_output(folder: Path, options: dict[str, Any], resume: bool) -> None:
    """Raise unless a new run may use `folder`, or (with `resume`) its unfinished run is this one.

    Raises:
        RunError: the folder holds another run or other files, or the run that is to be resumed was
            started with other options.
    """
    held = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
    if folder.exists() and not folder.is_dir():
        raise RunError(f"output_dir={folder} is a file; name a folder")
    if RESULT in held:
        raise RunError(f"output_dir={folder} holds a finished run; name another folder")
    if held and CONFIG not in held:
        raise RunError(
            f"output_dir={folder} holds {len(held)} other files ({held[0]}, ...); "
            "name an empty or new folder"
        )
    if CONFIG not in held:
        return
    if not resume:
        raise RunError(
            f"output_dir={folder} holds an unfinished run; go on with "
            "--resume_from_checkpoint true, or name another folder"
        )
    before = Run.read(folder).config
    for key in sorted((before.keys() | options.keys()) - _FREE_TO_CHANGE):
        if before.get(key) != options.get(key):
            raise RunError(
                f"output_dir={folder}: its run has {key}={before.get(key)!r}, this one "
                f"{options.get(key)!r}; resume with --config {folder / CONFIG}"
            )


def claim(folder: Path, options: dict[str, Any]) -> None:
    """Write config.yaml, the first file of a run; a run that is resumed has it already."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / CONFIG).exists():
        write_text(folder / CONFIG, yaml.safe_dump(options, sort_keys=False))


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
    states = {checkpoint / "optimizer.pt", checkpoint / "scheduler.pt"}
    states |= {*checkpoint.glob("rng_state*.pth"), *checkpoint.glob("scaler.pt")}
    return all(zipfile.is_zipfile(path) for path in states)


def checkpoint_to_resume(folder: Path, asked: str) -> Path:
    """The checkpoint that was asked for: a path, or with "true" the newest whole one of a run.

    Raises:
        RunError: there is none, or the one named is not whole.
    """
    if asked.lower() == "true":
        return newest_checkpoint(folder)
    if not is_whole(Path(asked)):
        raise RunError(
            f"resume_from_checkpoint={asked}: no whole checkpoint; give the path of one, or true "
            "for the newest of output_dir"
        )
    return Path(asked)


def unclaim(folder: Path) -> None:
    """Free the folder of a run that failed before its first checkpoint."""
    if not any(folder.glob("checkpoint-*")):
        for name in (CONFIG, METRICS):
            (folder / name).unlink(missing_ok=True)
