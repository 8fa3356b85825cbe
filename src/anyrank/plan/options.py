"""The options of a plan: those of `anyrank train`, read as the machine to be planned would."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import yaml

from ..training.parse import parse_train
from .estimate import Planner

_CHECKPOINTING = {"gradient_checkpointing", "activation_checkpointing"}


def read_options(argv: Sequence[str], *, for_gpu: bool) -> Planner:
    """A planner from `--key value` and `--config FILE.yaml`, as `anyrank train` takes them.

    Args:
        argv: the words.
        for_gpu: plan for a GPU; False: for one if this machine has it and `use_cpu` is not given.

    Raises:
        AnyRankError: an option that training would refuse, or that a plan does not follow.
    """
    words, given = list(argv), _given(argv)
    on_gpu = for_gpu or (torch.cuda.is_available() and "use_cpu" not in given)
    # Tensors without memory lie on the CPU, so the trainer must too; what it would choose by the
    # device is chosen here.
    words += ["--use_cpu", "true"]
    if not given & _CHECKPOINTING:
        words += ["--gradient_checkpointing", str(on_gpu).lower()]
    model, adapter, _, args = parse_train(words)
    return Planner(model, adapter, args, on_gpu=on_gpu)


def _given(argv: Sequence[str]) -> set[str]:
    """The keys that the user has set, on the command line or in the file of `--config`."""
    keys = {word[2:].split("=")[0] for word in argv if word.startswith("--")}
    if "config" in keys:
        try:
            values = yaml.safe_load(Path(argv[argv.index("--config") + 1]).read_text("utf-8"))
        except (OSError, ValueError, IndexError, yaml.YAMLError):
            return keys  # parsing says what is wrong
        keys |= set(values) if isinstance(values, dict) else set()
    return keys
