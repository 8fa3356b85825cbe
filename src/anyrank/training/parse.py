"""The command line and the YAML of `anyrank train`, through TRL's parser, with clear errors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from trl.scripts.utils import TrlParser

from ..errors import ConfigError, nearest
from ..schedule import Schedule
from .arguments import AdapterArguments, DataArguments, ModelArguments, TrainArguments

Chosen = tuple[ModelArguments, AdapterArguments, DataArguments, TrainArguments]


_NEVER_FROM_A_FILE = {
    "trust_remote_code": "pass --trust_remote_code true on the command line if you trust the model",
    "env": "set environment variables in the shell",
}


class _Parser(TrlParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see anyrank train --help")


def parse_train(argv: Sequence[str]) -> Chosen:
    """The options of a run, from `--config FILE.yaml` and `--key value`, which wins.

    Raises:
        ConfigError: an unknown key (the nearest names are offered), a value of the wrong type, a
            config file that is missing or no mapping.
    """
    kinds: Any = (ModelArguments, AdapterArguments, DataArguments, TrainArguments)
    parser = _Parser(kinds, prog="anyrank train", allow_abbrev=False)
    arguments = list(argv)
    if "--help_all" in arguments:
        parser.print_help()
        raise SystemExit(0)
    known = {action.dest for action in parser._actions}
    _check_config_file(arguments, known)
    try:
        *chosen, unknown = parser.parse_args_and_config(arguments, return_remaining_strings=True)
    except (ValueError, TypeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(str(error)) from error
    for word in unknown:
        if word.startswith("-"):
            key = word.lstrip("-").split("=")[0]
            raise ConfigError(f"option --{key} is unknown; {nearest_option(key, known)}")
        raise ConfigError(f"{word!r} belongs to no option; write --key value")
    model, adapter, data, args = chosen
    split_batch(adapter.config().rank_schedule(), args)
    return model, adapter, data, args


def split_batch(schedule: Schedule, args: TrainArguments) -> None:
    """Split the batch of a schedule that steps apart, unless micro-batches were asked for.

    The rows of a step stay the same ones; each rank then has a part of them for a step of its own.
    """
    if args.gradient_accumulation_steps == 1:
        rows = args.per_device_train_batch_size
        parts = max(n for n in range(1, schedule.parts + 1) if rows % n == 0)
        args.per_device_train_batch_size = rows // parts
        args.gradient_accumulation_steps = parts


def nearest_option(key: str, known: set[str]) -> str:
    """The nearest options, or where to see all of them."""
    text = nearest(key, known)
    return text if text.startswith("did you") else "anyrank train --help_all lists every key"


def _check_config_file(arguments: list[str], known: set[str]) -> None:
    if "--config" not in arguments:
        return
    position = arguments.index("--config") + 1
    if position >= len(arguments):
        raise ConfigError("--config needs the path of a YAML file")
    path = Path(arguments[position])
    if not path.is_file():
        raise ConfigError(f"--config {path}: no such file")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(f"--config {path}: not valid YAML ({error})") from error
    if not isinstance(values, dict):
        raise ConfigError(f"--config {path}: must hold one 'key: value' per line")
    for key in values:
        if key in _NEVER_FROM_A_FILE:
            raise ConfigError(
                f"--config {path}: {key} is not taken from a file; {_NEVER_FROM_A_FILE[key]}"
            )
        if key not in known:
            raise ConfigError(f"--config {path}: key {key!r}: {nearest_option(str(key), known)}")
