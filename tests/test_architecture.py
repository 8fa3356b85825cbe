"""Imports point down only, and no module reads a pickle or runs a shell; each rule has a twin."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import anyrank

SRC = Path(anyrank.__file__).parent

# The one table: lower layers first. A module imports from lower layers and from its own part, so
# parts of one layer never import each other. `__init__` is anyrank/__init__.py: at run time it
# holds no more than names; its lazy table consists of strings and of TYPE_CHECKING imports.
LAYERS = (
    ("errors", "_plugins"),
    ("__init__", "files", "allocator"),
    ("algebra", "schedule"),
    ("methods",),
    ("kernels",),
    ("quant",),
    ("quantize",),
    ("tuner",),
    ("training", "export"),
    ("sweep", "plan"),
    ("demo",),
    ("cli",),
    ("__main__",),
)
LEVEL = {part: level for level, parts in enumerate(LAYERS) for part in parts}
FREE_NAMES = {"__version__"}
TYPE_CHECKING = ("TYPE_CHECKING", "typing.TYPE_CHECKING")

FORBIDDEN = {
    "pickle": "reads or writes a pickle",
    "cloudpickle": "reads or writes a pickle",
    "dill": "reads or writes a pickle",
    "joblib": "reads or writes a pickle",
    "shelve": "reads or writes a pickle",
    "torch.load": "reads a pickle; use safetensors",
    "torch.save": "writes a pickle; use safetensors",
    "yaml.load": "builds objects that a file names; use yaml.safe_load",
    "yaml.load_all": "builds objects that a file names; use yaml.safe_load",
    "yaml.full_load": "builds objects that a file names; use yaml.safe_load",
    "yaml.unsafe_load": "builds objects that a file names; use yaml.safe_load",
    "os.system": "runs a shell",
    "os.popen": "runs a shell",
}


def part_of(file: Path) -> str:
    """The entry of the table that a file belongs to; `file` is relative to the package."""
    return file.parts[0].removesuffix(".py")


def run_time_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node below `tree` at any depth, but for the body of `if TYPE_CHECKING`."""
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.If) and ast.unparse(child.test) in TYPE_CHECKING:
            for other in child.orelse:
                yield other
                yield from run_time_nodes(other)
            continue
        yield child
        yield from run_time_nodes(child)


def imported(node: ast.AST, file: Path) -> list[str]:
    """The full dotted names that an import statement asks for; [] for any other node."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    package = ["anyrank", *file.parent.parts]
    above = package[: len(package) - node.level + 1] if node.level else []
    base = ".".join([*above, *([node.module] if node.module else [])])
    return [f"{base}.{alias.name}" for alias in node.names]


def wrong_imports(file: Path, source: str) -> list[str]:
    """Every import of `file` that does not point down, as 'file:line: rule'."""
    own, found = part_of(file), []
    if own not in LEVEL:
        found.append(f"{file}:1: {own} is not in the table of layers")
    for node in run_time_nodes(ast.parse(source)):
        for name in imported(node, file):
            top, _, rest = name.partition(".")
            target = rest.split(".")[0]
            if top != "anyrank" or target in FREE_NAMES or target == own:
                continue
            where = f"{file}:{node.lineno}"
            if target not in LEVEL:
                found.append(f"{where}: {name} must be imported from the module that holds it")
            elif own in LEVEL and LEVEL[target] >= LEVEL[own]:
                found.append(f"{where}: {own} must not import {target}")
    return found


def unsafe_uses(file: Path, source: str) -> list[str]:
    """Every use of a pickle, of an unsafe YAML reader or of a shell, as 'file:line: what, why'."""
    nodes = list(ast.walk(ast.parse(source)))
    homes: dict[str, str] = {}
    for node in nodes:
        if isinstance(node, ast.Import | ast.ImportFrom):
            for alias, name in zip(node.names, imported(node, file), strict=True):
                plain = isinstance(node, ast.Import) and alias.asname is None
                head = alias.name.split(".")[0]
                homes[alias.asname or (head if plain else alias.name)] = head if plain else name
    found = []
    for node in nodes:
        names = imported(node, file)
        if isinstance(node, ast.Attribute | ast.Name):
            head, _, rest = ast.unparse(node).partition(".")
            names = [f"{homes.get(head, head)}.{rest}".rstrip(".")] if head in homes else []
        for name in names:
            for bad, why in FORBIDDEN.items():
                if name == bad or (isinstance(node, ast.stmt) and name.startswith(bad + ".")):
                    found.append(f"{file}:{node.lineno}: {bad} {why}")
        if isinstance(node, ast.Call):
            for option in node.keywords:
                if option.arg == "shell" and ast.unparse(option.value) != "False":
                    found.append(f"{file}:{node.lineno}: shell={ast.unparse(option.value)}")
    return found


def modules(root: Path) -> Iterator[tuple[Path, str]]:
    for path in sorted(root.rglob("*.py")):
        yield path.relative_to(root), path.read_text(encoding="utf-8")


def test_imports_point_down_only():
    read = list(modules(SRC))
    assert {part_of(file) for file, _ in read} >= {"errors", "algebra", "tuner", "cli"}
    assert [line for file, source in read for line in wrong_imports(file, source)] == []


def test_no_module_reads_a_pickle_or_runs_a_shell():
    assert [line for file, source in modules(SRC) for line in unsafe_uses(file, source)] == []


@pytest.mark.parametrize(
    ("file", "source", "wanted"),
    [
        ("training/train.py", "from ..export.lora import x", "1: training must not import export"),
        ("export/lora.py", "from ..training import run", "1: export must not import training"),
        ("algebra/pool.py", "import os\nfrom ..tuner import x", "2: algebra must not import tuner"),
        ("errors.py", "from . import files", "1: errors must not import files"),
        ("tuner/layer.py", "import anyrank.cli", "1: tuner must not import cli"),
        ("quant/nf4.py", "from anyrank.sweep import x", "1: quant must not import sweep"),
        ("demo/__init__.py", "from ..cli import run", "1: demo must not import cli"),
        ("__init__.py", "from .tuner import AnyRankConfig", "1: __init__ must not import tuner"),
        ("tuner/a/b.py", "from ...export import x", "1: tuner must not import export"),
        ("methods.py", "def f():\n    from .cli import run", "2: methods must not import cli"),
        (
            "schedule.py",
            "class A:\n  def f(self):\n    try:\n      from .quant import x\n    finally: pass",
            "4: schedule must not import quant",
        ),
        (
            "files.py",
            "if TYPE_CHECKING:\n    import torch\nelse:\n    from .cli import run",
            "4: files must not import cli",
        ),
        ("extra.py", "", "1: extra is not in the table of layers"),
        (
            "export/lora.py",
            "from .. import AnyRankConfig",
            "1: anyrank.AnyRankConfig must be imported from the module that holds it",
        ),
    ],
)
def test_a_planted_import_that_points_up_is_found(file, source, wanted):
    assert wrong_imports(Path(file), source) == [f"{file}:{wanted}"]


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("sweep/sweep_run.py", "from ..training.run import Run\nfrom ..export import lora"),
        ("quant/affine.py", "from ..algebra import pool\nfrom .base import FrozenWeight"),
        ("tuner/config.py", "def f():\n    from .. import __version__"),
        ("errors.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from . import cli"),
        ("__main__.py", "from .cli import main"),
    ],
)
def test_an_import_that_points_down_passes(file, source):
    assert wrong_imports(Path(file), source) == []


def test_a_planted_file_is_found_in_a_tree(tmp_path):
    (tmp_path / "training").mkdir()
    (tmp_path / "training" / "plan.py").write_text("def f():\n    from ..export import lora\n")
    found = [line for file, source in modules(tmp_path) for line in wrong_imports(file, source)]
    assert found == ["training/plan.py:2: training must not import export"]


@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        ("import pickle", "1: pickle reads or writes a pickle"),
        ("def f():\n    from pickle import loads", "2: pickle reads or writes a pickle"),
        ("import torch\ntorch.load('x')", "2: torch.load reads a pickle; use safetensors"),
        ("import torch as t\nread = t.load", "2: torch.load reads a pickle; use safetensors"),
        ("from torch import load", "1: torch.load reads a pickle; use safetensors"),
        ("import torch\ntorch.save(x, 'x')", "2: torch.save writes a pickle; use safetensors"),
        (
            "import yaml\nyaml.load(text)",
            "2: yaml.load builds objects that a file names; use yaml.safe_load",
        ),
        ("import subprocess\nsubprocess.run('ls', shell=True)", "2: shell=True"),
        ("from subprocess import run\nrun('ls', shell=flag)", "2: shell=flag"),
        ("import os\nos.system('ls')", "2: os.system runs a shell"),
    ],
)
def test_a_planted_unsafe_use_is_found(source, wanted):
    assert unsafe_uses(Path("files.py"), source) == [f"files.py:{wanted}"]


def test_safe_readers_pass():
    source = (
        "import subprocess, torch, yaml\nfrom safetensors.torch import load, load_file\n"
        "yaml.safe_load(text)\nload(data)\nsubprocess.run(['ls'], shell=False)\ntorch.loadtxt\n"
    )
    assert unsafe_uses(Path("files.py"), source) == []
