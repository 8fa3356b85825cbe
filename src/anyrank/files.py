"""Files that appear under their name only when they are complete: write beside, fsync, rename."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import RunError


def write_text(path: Path, text: str) -> None:
    """Write a text file in one step."""
    beside = path.with_name(f".{path.name}.partial")
    with open(beside, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file in one step; NaN and infinity, which JSON lacks, become null."""
    write_text(path, json.dumps(finite(value), indent=2, allow_nan=False) + "\n")


def finite(value: Any) -> Any:
    """A value for JSON: NaN and infinity, at any depth, are None."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        RunError: the file is missing or broken.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RunError(f"{path}: no such file") from error
    except ValueError as error:
        raise RunError(f"{path}: not valid JSON ({error})") from error


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill beside `path`, renamed to `path` when the block ends well.

    Raises:
        RunError: `path` exists and is not an empty folder.
    """
    refuse_filled(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{path.name}.partial-", dir=path.parent))
    beside.chmod(0o777 & ~_umask())
    try:
        with disk_full_named(path):
            yield beside
            _sync(beside)
            os.replace(beside, path)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A file to write beside `path`, renamed to `path` when the block ends well.

    Raises:
        RunError: `path` exists.
    """
    refuse_file(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.partial-", dir=path.parent)
    os.close(handle)
    beside = Path(name)
    try:
        with disk_full_named(path):
            yield beside
            _sync_file(beside)
            os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def disk_full_named(path: Path) -> Iterator[None]:
    """Turn what libraries raise on a full disk into one error that names the output.

    Raises:
        RunError: the disk filled up inside of the block.
    """
    try:
        yield
    except Exception as error:
        # safetensors raises an error of its own, which holds the text of the system's
        if getattr(error, "errno", None) != errno.ENOSPC and "No space left" not in str(error):
            raise
        raise RunError(
            f"{path}: the disk is full, nothing was written; free some room, or name a folder on "
            "another disk"
        ) from error


@contextmanager
def new_files(folder: Path) -> Iterator[Path]:
    """A folder to fill inside `folder`, whose files move into `folder` when the block ends well."""
    folder.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=".partial-", dir=folder))
    try:
        yield beside
        _sync(beside)
        for item in sorted(beside.iterdir()):
            os.replace(item, folder / item.name)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def refuse_filled(path: Path) -> None:
    """Raise unless `path` is free: absent, or an empty folder, in a place to write to."""
    _refuse_place(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise RunError(f"{path} exists already; name another folder, or remove it first")


def refuse_file(path: Path) -> None:
    """Raise unless `path` is free for a file, in a place to write to."""
    _refuse_place(path)
    if path.exists():
        raise RunError(f"{path} exists already; name another file, or remove it first")


def _refuse_place(path: Path) -> None:
    """Raise unless files can be made beside `path`."""
    if path.is_symlink():
        raise RunError(f"{path}: is a symbolic link; name what it points to, or another place")
    above = next(p for p in path.absolute().parents if p.exists())
    if not above.is_dir():
        raise RunError(f"{path}: {above} is a file; name a place inside of a folder")
    if not os.access(above, os.W_OK | os.X_OK):
        raise RunError(f"{path}: {above} cannot be written to; name a place that can")


def require_disk(folder: Path, needed: int, what: str) -> None:
    """Raise unless the disk of `folder` has room for `needed` bytes.

    Raises:
        RunError: too little room.
    """
    existing = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise RunError(
            f"{folder}: {what} needs {needed / 1e6:,.1f} MB, but {free / 1e6:,.1f} MB are free; "
            "free some room, or name a folder on another disk"
        )


def _sync(folder: Path) -> None:
    for item in folder.rglob("*"):
        if item.is_file():
            _sync_file(item)


def _umask() -> int:
    """What the user takes from the rights of new files; asking means setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _sync_file(path: Path) -> None:
    path.chmod(0o666 & ~_umask())  # safetensors and mkstemp let only their owner read
    with open(path, "rb") as file:
        os.fsync(file.fileno())
