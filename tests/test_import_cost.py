"""Importing anyrank is cheap, and links to PEFT and Transformers whichever is imported first.

Every case needs an interpreter of its own; those that load PEFT are few, at seconds each.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import anyrank

HEAVY = ["torch", "transformers", "peft", "trl", "triton", "bitsandbytes", "matplotlib", "datasets"]
LOADED = f"[name for name in {HEAVY} if name in __import__('sys').modules]"
PEFT_KNOWS = """
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as configs
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING as prefixes
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING as tuners
print(configs["ANYRANK"].__name__, tuners["ANYRANK"].__name__, prefixes["ANYRANK"])
"""
TRAINER_KNOWS = """
from transformers.trainer import DEFAULT_CALLBACKS as callbacks
print([callback.__name__ for callback in callbacks].count("RankCallback"))
"""


def python(*arguments: str, columns: int = 100) -> subprocess.CompletedProcess[str]:
    """Run the interpreter with anyrank's sources on its path, for a screen of this width."""
    source = str(Path(anyrank.__file__).parents[1])
    variables = {
        **os.environ,
        "PYTHONPATH": source,
        "COLUMNS": str(columns),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, *arguments], env=variables, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done


def test_importing_anyrank_loads_nothing_heavy():
    assert python("-c", f"import anyrank; dir(anyrank); print({LOADED})").stdout == "[]\n"


def test_methods_and_schedules_load_no_model_library():
    done = python("-c", f"from anyrank import METHODS, Schedule; print({LOADED})")
    assert done.stdout == "['torch']\n"


@pytest.mark.parametrize(
    "program",
    [
        "import anyrank\nimport peft" + PEFT_KNOWS + "import transformers.trainer" + TRAINER_KNOWS,
        "import transformers.trainer\nimport peft\nimport anyrank" + PEFT_KNOWS + TRAINER_KNOWS,
    ],
    ids=["anyrank first", "anyrank last"],
)
def test_peft_and_the_trainer_know_anyrank_whichever_is_imported_first(program):
    lines = python("-c", program).stdout.splitlines()
    assert lines == ["AnyRankConfig AnyRankModel anyrank_", "1"]


@pytest.mark.parametrize(
    ("imports", "wanted"),
    [
        ("link(); import lib", "lib ours"),
        ("import lib; link()", "lib ours"),
        ("link(); find_spec('lib'); import lib", "lib ours"),  # Transformers looks for PEFT so
        ("link(); find_spec('lib')", ""),
        ("link(); import lib; import importlib; importlib.reload(lib)", "lib ours lib"),
    ],
)
def test_our_side_is_loaded_once_right_after_the_library(tmp_path, imports, wanted):
    """On two files of one line each, which print their names when they are run."""
    (tmp_path / "lib.py").write_text("print(__name__)\n")
    (tmp_path / "ours.py").write_text("print(__name__)\n")
    program = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from importlib.util import find_spec\nfrom anyrank._plugins import when_imported\n"
        f"link = lambda: when_imported('lib', 'ours')\n{imports}"
    )
    assert " ".join(python("-c", program).stdout.split()) == wanted


def test_help_fits_a_screen_of_24_lines_and_loads_nothing_heavy():
    assert_fits(python("-m", "anyrank", "--help").stdout, lines=24)
    program = (
        "import sys; from anyrank.cli import run; assert run(['--help']) == 0;"
        f"print({LOADED}, file=sys.stderr)"
    )
    done = python("-c", program)
    assert done.stderr == "[]\n"
    assert done.stdout.startswith("anyrank: ")


@pytest.mark.parametrize(
    ("verb", "columns"),
    [("plan", 100), ("train", 100)]
    + [(verb, 80) for verb in ("quantize", "sweep", "fold", "export", "demo")],
)
def test_the_help_of_a_verb_fits_a_screen_of_40_lines(verb, columns):
    text = python("-m", "anyrank", verb, "--help", columns=columns).stdout
    assert f"anyrank {verb}" in text
    assert_fits(text, lines=40, columns=columns)


def assert_fits(text: str, lines: int, columns: int = 100) -> None:
    assert 1 < len(text.splitlines()) <= lines
    assert [line for line in text.splitlines() if len(line) > columns] == []
