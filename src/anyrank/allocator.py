"""Keep large buffers on a CPU: glibc hands them back to the kernel after every use.

Each training step then pays for the page faults: measured 35 s against 23 s for 20 steps of a 6 M
model (docs/log.md). glibc reads these variables when a process starts and never again.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

SETTINGS = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "MALLOC_TOP_PAD_": "268435456",
}


def keeps_buffers() -> bool:
    """Whether this process was started with these settings."""
    return SETTINGS.items() <= os.environ.items()


def keep_buffers(argv: Sequence[str]) -> None:
    """Start `anyrank` again with the settings, unless there is a GPU or the user chose others.

    Args:
        argv: the arguments behind `anyrank`.
    """
    on_gpu = Path("/dev/nvidiactl").exists()
    chosen = any(key in os.environ for key in SETTINGS)
    if on_gpu or chosen or not sys.platform.startswith("linux"):
        return
    command = [sys.executable, "-P", "-m", "anyrank", *argv]  # -P: no modules of the folder here
    os.execve(sys.executable, command, {**os.environ, **SETTINGS})
