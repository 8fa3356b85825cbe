"""EleutherAI's lm-eval: find tasks, load their data, evaluate a model that is in memory.

The one place that touches lm-eval, which is optional. Seeds are lm-eval's own, set anew before
every evaluation: its command line finds the same figures, and every rank sees the same few-shot
examples.

No code comes from the Hub unless the user allows it: `datasets` runs no scripts, and metrics that
the `evaluate` package would fetch are refused. A task file may name Python files beside it; as part
of a file that the user named, they run.
"""

from __future__ import annotations

import importlib
import logging
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from ..errors import AnyRankError, ConfigError, DataError, MissingPackageError, nearest
from .tasks import Figures

logger = logging.getLogger("anyrank")


class _Options(Protocol):
    """Of `SweepOptions`: what is evaluated, and how.

    Attributes:
        tasks: see `load_tasks`.
        num_fewshot: examples in front of each row; None: as the task says.
        limit: rows per task; None: all.
        batch_size: requests per forward pass.
        apply_chat_template: put every row into the tokenizer's chat template.
        trust_remote_code: metrics may be fetched from the Hub and run.
    """

    tasks: Any
    num_fewshot: Any
    limit: Any
    batch_size: Any
    apply_chat_template: Any
    trust_remote_code: Any


@dataclass(frozen=True)
class LoadedTasks:
    """Tasks with their data; without a model.

    Attributes:
        names: the tasks, and the groups with a score of their own, that are reported.
        loaded: {"tasks": ..., "groups": ...}, as lm-eval's evaluate takes them.
        options: how to evaluate.
        tokenizer: of the model.
    """

    names: list[str]
    loaded: dict[str, Any]
    options: _Options
    tokenizer: Any

    def on(self, model: Any) -> BoundTasks:
        """The tasks, to be evaluated on this model."""
        with _errors_only("lm_eval"):  # it warns that the model is no name
            lm = _module("lm_eval.models.huggingface").HFLM(
                pretrained=model,
                tokenizer=self.tokenizer,
                backend="causal",
                batch_size=self.options.batch_size,
                trust_remote_code=self.options.trust_remote_code,
            )
        return BoundTasks(self, lm)


@dataclass(frozen=True)
class BoundTasks:
    """Tasks and the model that they evaluate, at whatever rank it is set to (`tasks.Suite`)."""

    of: LoadedTasks
    lm: Any

    @property
    def names(self) -> list[str]:
        """The tasks and groups that are reported."""
        return self.of.names

    def evaluate(self) -> tuple[dict[str, Figures], dict[str, Any]]:
        """Figures of every task and group; and of those reported, how they were evaluated.

        Raises:
            ConfigError: a task wants a metric whose code lies on the Hub.
        """
        options = self.of.options
        _seed(self.of.loaded["tasks"])
        with no_code_from_the_hub(options.trust_remote_code):
            found = _module("lm_eval.evaluator").evaluate(
                lm=self.lm,
                task_dict=self.of.loaded,
                limit=options.limit,
                log_samples=False,
                apply_chat_template=options.apply_chat_template,
                fewshot_as_multiturn=options.apply_chat_template,
            )
        figures = {
            task: {key: _plain(value) for key, value in row.items() if key not in ("name", "alias")}
            for task, row in found["results"].items()
        }
        return figures, {
            name: {
                "higher_is_better": found["higher_is_better"].get(name, {}),
                "rows": figures[name].get("sample_len"),
                "num_fewshot": found["n-shot"].get(name),
                "version": found["versions"].get(name),
            }
            for name in self.names
        }


def load_tasks(options: _Options, tokenizer: Any) -> LoadedTasks:
    """Find the tasks and load their data.

    Args:
        options: `tasks` holds names of tasks, groups or tags that lm-eval knows (* stands for
            anything), and paths of task YAML files or of folders of them; a path has a separator
            or ends with .yaml.
        tokenizer: of the model.

    Raises:
        MissingPackageError: lm-eval is not installed.
        ConfigError: a task is unknown, runs code that the model writes, or wants code from the Hub;
            or the tokenizer has no chat template and one was asked for.
        DataError: a task or its data cannot be loaded.
    """
    _module("lm_eval")
    if options.apply_chat_template and not tokenizer.chat_template:
        raise ConfigError(
            "--apply_chat_template: the tokenizer of the run has no chat template; leave it out"
        )
    words = options.tasks
    paths = {word: Path(word) for word in words if os.sep in word or word.endswith(".yaml")}
    for word, path in paths.items():
        if not path.exists():
            raise ConfigError(f"--tasks {word}: no such file or folder; name a YAML file or a task")
    kind = _module("lm_eval.tasks").TaskManager
    manager = kind(include_path=[str(path) for path in paths.values() if path.is_dir()])
    names, loaded = [], {"tasks": {}, "groups": {}}
    for word in words:
        for name in _found(word, paths.get(word), manager):
            part = _load(name, manager, options)
            names += [n for n in _reported(part) if n not in names]
            loaded["tasks"] |= part["tasks"]
            loaded["groups"] |= part["groups"]
    _prepare(loaded["tasks"], options.num_fewshot)
    return LoadedTasks(names, loaded, options, tokenizer)


def _found(word: str, path: Path | None, manager: Any) -> list[str]:
    """What lm-eval's manager loads for one word of --tasks."""
    if path is None:
        if found := manager.match_tasks([word]):
            return found
        hint = nearest(word, manager.all_tasks)
        if Path(word).is_dir():
            hint = f"for the folder write .{os.sep}{word}"
        elif not hint.startswith("did you mean"):
            hint = "lm-eval ls tasks lists them"  # rather than 14,000 names
        raise ConfigError(f"--tasks {word}: no such task in lm-eval; {hint}")
    if path.is_file():
        return [str(path)]
    own = type(manager)(include_path=str(path), include_defaults=False)
    if not own.all_tasks:
        raise ConfigError(f"--tasks {word}: the folder holds no task; it needs YAML files of tasks")
    members = {
        item if isinstance(item, str) else item.get("task", item.get("group"))
        for group in own.all_groups
        for item in own.task_index[group].cfg.get("task", [])
    }
    return [name for name in own.all_groups + own.all_subtasks if name not in members]


def _load(name: str, manager: Any, options: _Options) -> dict[str, Any]:
    """One task, group or tag with its data: {"tasks": {name: task}, "groups": {name: group}}."""
    with no_code_from_the_hub(options.trust_remote_code) as refused:
        try:
            part = manager.load([name])
        except AnyRankError:
            raise
        except Exception as error:  # tasks run Python of their own, and load data from anywhere
            reason = " ".join(str(error).split())
            raise DataError(
                f"task {name}: cannot be loaded ({type(error).__name__}: {reason}); correct its "
                "YAML, or see that its data can be reached"
            ) from error
    if refused:  # lm-eval goes on without a metric that it could not load
        raise _code_from_the_hub(refused[0])
    for task, held in part["tasks"].items():
        if getattr(held, "UNSAFE_CODE", False):
            raise ConfigError(
                f"task {task}: runs code that the model writes, which anyrank does not; export the "
                "rank and use lm-eval --confirm_run_unsafe_code"
            )
    return part


def _reported(part: dict[str, Any]) -> list[str]:
    """Groups with a score of their own; where a group has none, what it consists of; tasks."""
    groups = part["groups"]
    inside = {child for group in groups.values() for child in group.child_names}

    def expand(name: str) -> list[str]:
        if name not in groups or groups[name].has_aggregation:
            return [name]
        return [each for child in groups[name].child_names for each in expand(child)]

    roots = [name for name in (*groups, *part["tasks"]) if name not in inside]
    return [each for name in roots for each in expand(name)]


def _prepare(tasks: dict[str, Any], num_fewshot: int | None) -> None:
    """Set the number of few-shot examples as lm-eval does: a task that says 0 keeps it."""
    fixed = []
    for name, task in tasks.items():
        own = task.get_config("num_fewshot")
        if num_fewshot is not None and own == 0:
            fixed += [name] * (num_fewshot != 0)
        elif num_fewshot is not None or own is None:
            task.set_config(key="num_fewshot", value=num_fewshot or 0)
    if fixed:
        logger.warning("num_fewshot stays 0, as the task says: %s", ", ".join(fixed))


def _seed(tasks: dict[str, Any]) -> None:
    defaults = _module("lm_eval.defaults")
    random.seed(defaults.DEFAULT_RANDOM_SEED)
    np.random.seed(defaults.DEFAULT_OTHER_SEED)
    torch.manual_seed(defaults.DEFAULT_OTHER_SEED)
    for task in tasks.values():
        task.set_fewshot_seed(seed=defaults.DEFAULT_OTHER_SEED)


@contextmanager
def no_code_from_the_hub(allowed: bool) -> Iterator[list[str]]:
    """`evaluate.load` runs Python that it fetches from the Hub, and asks nobody: refuse unless
    `allowed`, but for files on this disk. Yields the names that were refused.
    """
    evaluate = _module("evaluate")
    own, refused = evaluate.load, []

    def load(path: str, *arguments: Any, **options: Any) -> Any:
        if not (allowed or os.path.exists(path)):
            refused.append(path)
            raise _code_from_the_hub(path)
        return own(path, *arguments, **options)

    evaluate.load = load
    try:
        yield refused
    finally:
        evaluate.load = own


def _code_from_the_hub(metric: str) -> ConfigError:
    return ConfigError(
        f"metric {metric!r}: is none of lm-eval's own, and its code lies on the Hub; correct its "
        "name in the task, or allow it with --trust_remote_code"
    )


@contextmanager
def _errors_only(name: str) -> Iterator[None]:
    chosen = logging.getLogger(name)
    level = chosen.level
    chosen.setLevel(logging.ERROR)
    try:
        yield
    finally:
        chosen.setLevel(level)


def _module(name: str) -> Any:
    """A module of lm-eval, or of what it brings along."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name not in ("lm_eval", "evaluate"):
            raise
        raise MissingPackageError("--tasks needs lm-eval; pip install 'anyrank[eval]'") from error


def _plain(value: Any) -> Any:
    """A figure for JSON: numbers of numpy become Python's."""
    return value.item() if hasattr(value, "item") else value
