"""The rank that tasks choose, and a sweep over tasks up to the door of lm-eval."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from tiny import IDS, adapted, llama

from anyrank.cli import run
from anyrank.errors import DataError
from anyrank.sweep.report import cheaper, table, why_chosen, write_report
from anyrank.sweep.task_report import without_gain
from anyrank.sweep.tasks import (
    TaskScore,
    choose_by_tasks,
    good_enough,
    main_score,
    measure,
)


def accuracies(better: bool = True, **values: tuple[float, float | None]) -> dict[int, TaskScore]:
    return {int(k[1:]): TaskScore("acc,none", *pair, better) for k, pair in values.items()}


@pytest.mark.parametrize(
    ("scores", "good"),
    [
        (accuracies(r1=(0.40, 0.05), r2=(0.46, 0.01), r4=(0.50, 0.05)), [2, 4]),  # the best one's
        (accuracies(r1=(0.45, 0.01), r4=(0.50, 0.05)), [1, 4]),  # on the line
        (accuracies(r4=(0.50, 0.05), r1=(0.50, 0.01)), [1, 4]),
        (accuracies(r1=(0.49, 0.10), r4=(0.50, None)), [4]),  # no error is known: the best alone
        (accuracies(r1=(math.nan, 0.10), r4=(0.50, 0.10)), [4]),
        (accuracies(r1=(math.nan, 0.10), r4=(math.inf, 0.10)), []),
        (accuracies(False, r1=(9.0, 0.1), r2=(7.4, 0.1), r4=(7.0, 0.5)), [2, 4]),  # perplexity
    ],
)
def test_a_rank_within_one_standard_error_of_the_best_is_good_enough(scores, good):
    assert good_enough(scores) == good


@pytest.mark.parametrize(
    ("accepted", "chosen"),
    [
        ([[2, 4, 8]], 2),
        ([[2, 4, 8], [4, 8]], 4),
        ([[1, 2], [8], [2, 8]], 2),  # none is on all three: 2 and 8 are on two
        ([[8], [1]], 1),
        ([[], [4]], 4),
        ([[], []], None),
        ([[0]], 0),
    ],
)
def test_the_smallest_rank_that_is_good_enough_on_every_task_is_chosen(accepted, chosen):
    assert choose_by_tasks(accepted) == chosen


def test_the_main_metric_is_acc_norm_or_the_first():
    figures = {"sample_len": 9, "acc,none": 0.4, "acc_stderr,none": 0.1}
    facts = {"higher_is_better": {"acc": True, "acc_norm": None, "perplexity": False}}
    assert main_score("a", figures, facts) == TaskScore("acc,none", 0.4, 0.1)
    figures |= {"acc_norm,none": 0.5, "acc_norm_stderr,none": 0.2}
    assert main_score("a", figures, facts) == TaskScore("acc_norm,none", 0.5, 0.2)
    strict = {"perplexity,strict": 8.0, "perplexity_stderr,strict": "N/A", "acc,none": 0.1}
    assert main_score("a", strict, facts) == TaskScore("perplexity,strict", 8.0, None, False)
    with pytest.raises(DataError, match=r"^task a: has no metric .*; name its tasks instead$"):
        main_score("a", {"sample_len": 9}, facts)


@dataclass
class Logits:
    """Two tasks whose scores are logits of the model at its current rank."""

    model: Any
    names: tuple[str, ...] = ("first", "second")

    def evaluate(self):
        with torch.no_grad():
            values = self.model(IDS).logits[0, 0, :2].tolist()
        figures = {
            n: {"acc,none": v, "acc_stderr,none": 0.0}
            for n, v in zip(self.names, values, strict=True)
        }
        return figures, {n: {"higher_is_better": {"acc": True}, "rows": 9} for n in self.names}


def test_every_rank_is_measured_on_one_model():
    model = adapted(llama()).train()
    base, rows, about = measure(model, Logits(model), [1, 2, 4])
    assert model.training
    model.eval()
    with torch.no_grad():
        assert base["tasks"]["first"]["value"] == llama()(IDS).logits[0, 0, 0].item()
        for rank, row in rows.items():
            with model.set_rank(rank):
                wanted = model(IDS).logits[0, 0, :2].tolist()
            assert [score["value"] for score in row["tasks"].values()] == wanted
            assert row["lm_eval"]["second"]["acc,none"] == wanted[1]
    best = {n: max(rows, key=lambda k: rows[k]["tasks"][n]["value"]) for n in ("first", "second")}
    assert {n: facts["good_enough"] for n, facts in about["tasks"].items()} == {
        name: [rank] for name, rank in best.items()
    }
    assert about["chosen_rank"] == min(best.values())
    assert about["tasks"]["first"]["rows"] == 9


@pytest.fixture(scope="module")
def finished(base_folder, rows_file, tmp_path_factory):
    """A finished run of one step, without validation rows."""
    folder = tmp_path_factory.mktemp("sweep")
    words = f"--model_name_or_path {base_folder} --dataset {rows_file} --output_dir {folder}/run"
    more = "--method dylora --lora_r 8 --max_steps 1 --disable_tqdm true"
    assert run(["train", *words.split(), *more.split()]) == 0
    return folder / "run"


def test_a_sweep_over_tasks_needs_no_validation_rows(finished, rows_file, monkeypatch, capsys):
    """With tasks that need no lm-eval; test_harness.py has the real ones."""
    asked = []

    @dataclass
    class Loaded:
        options: Any
        tokenizer: Any
        names = ("first", "second")

        def on(self, model):
            asked.append((self.options.tasks, self.options.num_fewshot, self.tokenizer.pad_token))
            return Logits(model)

    monkeypatch.setattr("anyrank.sweep.harness.load_tasks", Loaded)
    assert run(["sweep", str(finished), "--tasks", "a, ./b.yaml", "--num_fewshot", "0"]) == 0
    assert asked == [(["a", "./b.yaml"], 0, "<pad>")]
    found = json.loads((finished / "sweep.json").read_text())
    assert [row["rank"] for row in found["ranks"]] == [1, 2, 4, 8]
    assert set(found["ranks"][0]) == {"rank", "tasks", "lm_eval", "parameters", "bytes"}
    shown = capsys.readouterr().out
    assert f"Chosen: rank {found['chosen_rank']}, the smallest within one standard error" in shown
    assert "nats" not in shown

    words = ["--tasks", "a", "--dataset", str(rows_file), "--limit", "3"]
    assert run(["sweep", str(finished), *words]) == 0
    found = json.loads((finished / "sweep.json").read_text())
    assert found["rows"] == 3
    assert {"loss", "tasks"} <= set(found["base"]) & set(found["ranks"][0])
    assert found["ranks"][0]["above_best_se"] >= 0
    assert found["tolerance"] is None
    shown = capsys.readouterr().out
    assert "completion tokens" in shown
    assert "the smallest within one standard error of the best on " in shown
    assert "--tolerance" not in shown


def test_without_lm_eval_one_line_says_how_to_install_it(finished, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setattr("anyrank.sweep.sweep_run.load_base", lambda *_, **__: pytest.fail("loaded"))
    assert run(["sweep", str(finished), "--tasks", "mmlu"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "anyrank: --tasks needs lm-eval; pip install 'anyrank[eval]'"
    )


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("--num_fewshot 5", "--num_fewshot does nothing without --tasks; add it, or leave "),
        ("--apply_chat_template", "--apply_chat_template does nothing without --tasks; add it, "),
        ("--tasks a --tolerance 1", "--tolerance does nothing with --tasks, whose standard errors"),
        ("--tasks a --exact_match", "--exact_match does nothing with --tasks alone; add --dataset"),
        ("--tasks ,", "argument --tasks: ',' must name at least one, such as a,b; see anyrank "),
        ("--num_fewshot -1", "argument --num_fewshot: '-1' must be a whole number from 0; see "),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(finished, capsys, words, text):
    assert run(["sweep", str(finished), *words.split()]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"anyrank: {text}")


def test_the_report_shows_each_task_with_its_standard_error(tmp_path):
    scores = {"gsm8k": {"value": 0.25, "stderr": 0.05}, "wiki": {"value": 9.0, "stderr": None}}
    row = {"tasks": scores, "parameters": 8, "bytes": 80}
    found = {
        "base": {"tasks": {n: s | {"value": s["value"] - 0.1} for n, s in scores.items()}},
        "ranks": [{"rank": k, **row} for k in (1, 2)],
        "chosen_rank": 2,
        "method": "qdylora",
        "tasks": {
            "gsm8k": {"metric": "exact_match,strict-match", "good_enough": [1, 2]},
            "wiki": {"metric": "perplexity,none", "good_enough": [1]},
        },
    }
    write_report(tmp_path, found)
    assert (tmp_path / "sweep.png").read_bytes()[:4] == b"\x89PNG"
    shown = table(found)
    assert [column.header for column in shown.columns] == [
        "rank", "gsm8k\nexact_match,strict-match", "wiki\nperplexity", "parameters", "LoRA\nfile"
    ]  # fmt: skip
    assert list(shown.columns[1].cells) == ["0.150 ± 0.050"] + ["0.250 ± 0.050"] * 2
    assert list(shown.columns[2].cells) == ["8.900", "9.000", "9.000"]
    assert why_chosen(found) == (
        "the smallest within one standard error of the best on gsm8k (1 of 2 tasks)"
    )
    assert cheaper(found) is None
    assert why_chosen(found | {"ranks": found["ranks"][:1]}) == "the only one"
    for better, flat in ((True, []), (False, ["wiki"])):
        found["tasks"]["gsm8k"]["higher_is_better"] = True
        found["tasks"]["wiki"]["higher_is_better"] = better
        assert without_gain(found) == flat
    scores["gsm8k"]["stderr"] = 0.2
    assert without_gain(found) == ["gsm8k", "wiki"]
