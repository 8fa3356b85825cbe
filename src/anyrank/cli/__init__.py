"""The command line: one verb each, one line per error, exit code 2."""

from __future__ import annotations

import importlib
import logging
import signal
import sys
import warnings
from collections.abc import Sequence
from typing import NoReturn

from .. import allocator
from ..errors import AnyRankError, ConfigError, nearest

HELP = """\
anyrank: fine-tune a quantized language model once; ship it at any rank, or folded into its weights.

  anyrank quantize MODEL BASE --bits 4                                 a base to fold into
  anyrank plan   --model_name_or_path M --gpu_memory 24GB              will it fit?
  anyrank train  --model_name_or_path M --dataset D --output_dir RUN   every rank, in one run
  anyrank sweep  RUN                                                   the loss at every rank
  anyrank fold   RUN FOLDED --rank 8                                   no adapter left
  anyrank export RUN OUT --rank 8 --to lora                            an ordinary PEFT LoRA
  anyrank export FOLDED OUT --to gguf | mlx | hqq | torchao            for the tools that run it
  anyrank demo                                                         train, sweep, export: tiny

anyrank VERB --help says more. --debug shows the traceback of an error; --keep_malloc leaves the
memory allocator of a CPU as it is (see docs/log.md).
"""
VERBS = ("quantize", "plan", "train", "sweep", "fold", "export", "demo")


def main() -> NoReturn:
    """The `anyrank` command."""
    argv = sys.argv[1:]
    if "--keep_malloc" in argv:
        argv.remove("--keep_malloc")
    elif argv and argv[0] in ("train", "sweep", "demo"):
        allocator.keep_buffers(argv)
    for name in ("SIGTERM", "SIGHUP"):  # what schedulers send: end as Ctrl-C does, and clean up
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), _interrupt)
    sys.exit(run(argv))


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def run(argv: Sequence[str]) -> int:
    """Run one verb; return the exit code: that of the verb, or 2 with one line on stderr."""
    arguments = list(argv)
    debug = "--debug" in arguments
    if debug:
        arguments.remove("--debug")
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return 0
    _quiet(debug)
    try:
        verb = arguments.pop(0)
        if verb not in VERBS:
            raise ConfigError(f"verb {verb!r} is unknown; {nearest(verb, VERBS)}")
        return importlib.import_module(f"{__name__}.{verb}").main(arguments) or 0
    except KeyboardInterrupt:
        print(f"anyrank {verb}: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if debug:
            raise
        _end_bars()
        print(f"anyrank: {_one_line(error)}", file=sys.stderr)
        return 2


def _quiet(debug: bool) -> None:
    """Our own lines go to stderr; what other libraries deprecate is nothing a user can act on."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("anyrank").setLevel(logging.INFO)
    if not debug:
        warnings.simplefilter("ignore")
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def _end_bars() -> None:
    """Leave the line of a progress bar before an error is printed."""
    if "tqdm" in sys.modules and getattr(sys.modules["tqdm"].tqdm, "_instances", None):
        print(file=sys.stderr)


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, AnyRankError):
        return text
    return f"{type(error).__name__}: {text} (--debug shows where)"
