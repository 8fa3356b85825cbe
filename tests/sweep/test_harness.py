"""Real tasks through lm-eval, against log-likelihoods and answers that torch computes by itself.

lm-eval and its 40 packages are no part of the default environment: `make test-eval`.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from tiny import adapted, llama
from tiny_tokenizers import CHAT, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from anyrank.cli import run
from anyrank.errors import ConfigError, DataError
from anyrank.sweep.harness import load_tasks, no_code_from_the_hub

pytest.importorskip("lm_eval", reason="needs lm-eval; make test-eval installs it")

ROWS = [
    {"question": f"How many? {i}", "choices": [f"{n} apples." for n in range(3)], "answer": i % 3}
    for i in range(12)
]
CHOICE = """
task: apples_choice
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
metadata: {version: 2.0}
"""
ANSWER = """
task: apples_answer
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: " apples"
generation_kwargs: {until: ["."], max_gen_toks: 9}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
metadata: {version: 1.0}
"""
GROUP = """
group: apples
task: [apples_choice, apples_answer]
aggregate_metric_list: [{metric: acc, weight_by_size: true}]
metadata: {version: 1.0}
"""


@pytest.fixture
def tasks(tmp_path):
    """A folder with two tasks and their rows."""
    folder = tmp_path / "own"
    folder.mkdir()
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    for name, text in (("choice", CHOICE), ("answer", ANSWER)):
        (folder / f"{name}.yaml").write_text(text.replace("DATA", str(data)))
    return folder


def load(*words: object, tokenizer=None, **options):
    defaults = {"num_fewshot": None, "limit": None, "batch_size": 4}
    defaults |= {"apply_chat_template": False, "trust_remote_code": False} | options
    asked = SimpleNamespace(tasks=[str(word) for word in words], **defaults)
    return load_tasks(asked, tokenizer or tiny_tokenizer())


def picked(model, tokenizer) -> list[bool]:
    """Whether the right choice has the largest log-likelihood, by hand."""
    right = []
    for row in ROWS:
        likelihoods = []
        for choice in row["choices"]:
            start = len(tokenizer.encode(row["question"]))
            ids = torch.tensor([tokenizer.encode(f"{row['question']} {choice}")])
            logs = torch.log_softmax(model(ids).logits[0, start - 1 : -1].double(), -1)
            likelihoods.append(logs.gather(1, ids[0, start:, None]).sum().item())
        right.append(max(range(3), key=likelihoods.__getitem__) == row["answer"])
    return right


def answered(model, tokenizer) -> list[bool]:
    """Whether greedy decoding up to a full stop or the end gives the answer, by hand."""
    right = []
    for row in ROWS:
        ids = tokenizer.encode(row["question"])
        start = len(ids)
        while len(ids) < start + 9 and not {".", "</s>"} & set(map(tokenizer.decode, ids[start:])):
            ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
        text = tokenizer.decode(ids[start:], skip_special_tokens=True).split(".")[0]
        right.append(text == " apples")
    return right


def assert_same(scores, model, tokenizer) -> None:
    for name, measured in (("apples_choice", picked), ("apples_answer", answered)):
        right = [float(each) for each in measured(model, tokenizer)]
        assert scores[name]["value"] == pytest.approx(statistics.mean(right))
        stderr = statistics.stdev(right) / len(right) ** 0.5
        assert scores[name]["stderr"] == pytest.approx(stderr)


def test_a_sweep_over_tasks_gives_every_rank_the_scores_of_its_own_logits(
    base_folder, tasks, tmp_path
):
    rows = tmp_path / "rows.jsonl"
    learned = [
        {"prompt": r["question"], "completion": f" {r['choices'][r['answer']]}"} for r in ROWS
    ]
    rows.write_text("".join(json.dumps(row) + "\n" for row in learned))
    words = f"--model_name_or_path {base_folder} --dataset {rows} --output_dir {tmp_path / 'run'}"
    more = "--method dylora --lora_r 8 --max_steps 60 --learning_rate 0.02 --disable_tqdm true"
    assert run(["train", *words.split(), *more.split()]) == 0
    words = ["sweep", "run", "--tasks", "own/choice.yaml,own/answer.yaml"]
    done = subprocess.run(
        [sys.executable, "-m", "anyrank", *words],
        cwd=tmp_path, text=True, capture_output=True, check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "run" / "sweep.json").read_text())
    assert [row["rank"] for row in found["ranks"]] == [1, 2, 4, 8]

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    base = AutoModelForCausalLM.from_pretrained(base_folder).eval()
    with torch.no_grad():
        assert_same(found["base"]["tasks"], base, tokenizer)
        model = PeftModel.from_pretrained(base, tmp_path / "run").eval()
        for row in found["ranks"]:
            with model.set_rank(row["rank"]):
                assert_same(row["tasks"], model, tokenizer)
    for name in ("apples_choice", "apples_answer"):  # the comparison is of more than one number
        assert len({row["tasks"][name]["value"] for row in found["ranks"]}) > 1
    assert found["tasks"]["apples_choice"]["version"] == 2.0
    assert found["tasks"]["apples_choice"]["rows"] == 12
    assert f"Chosen: rank {found['chosen_rank']}, the smallest within one" in done.stdout
    assert done.stderr.count("Loading weights: 100%") == 1  # one load of the base
    assert (tmp_path / "run" / "sweep.png").exists()


def test_a_folder_reports_its_groups_in_place_of_their_tasks(tasks):
    assert load(tasks).names == ["apples_answer", "apples_choice"]
    (tasks / "group.yaml").write_text(GROUP)
    loaded = load(tasks)
    assert loaded.names == ["apples"]
    model = adapted(llama(vocab_size=300))
    figures, facts = loaded.on(model).evaluate()
    assert figures["apples"]["acc,none"] == figures["apples_choice"]["acc,none"]
    assert facts["apples"]["higher_is_better"]["acc"] is True
    (tasks / "group.yaml").write_text(GROUP.replace("aggregate_metric_list", "# "))
    assert load(tasks).names == ["apples_choice", "apples_answer"]


def test_few_shot_examples_and_rows_are_the_same_at_every_evaluation(tasks):
    text = (tasks / "choice.yaml").read_text()
    (tasks / "choice.yaml").write_text(text + "fewshot_split: test\n")
    tokenizer = tiny_tokenizer(chat=CHAT)
    options = {"num_fewshot": 2, "limit": 3, "apply_chat_template": True}
    bound = load(tasks / "choice.yaml", tokenizer=tokenizer, **options).on(llama(vocab_size=300))
    seen = []
    for _ in range(2):
        _, facts = bound.evaluate()
        task = bound.of.loaded["tasks"]["apples_choice"]
        seen.append([instance.args for instance in task.instances])
    assert seen[0] == seen[1]
    assert seen[0][0][0].count("<turn>user") == 3
    assert (facts["apples_choice"]["rows"], facts["apples_choice"]["num_fewshot"]) == (3, 2)


def test_a_task_that_says_0_examples_keeps_them(tasks, caplog):
    (tasks / "choice.yaml").write_text((tasks / "choice.yaml").read_text() + "num_fewshot: 0\n")
    load(tasks / "choice.yaml", num_fewshot=2)
    assert "num_fewshot stays 0, as the task says: apples_choice" in caplog.messages


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["gsm8"], "--tasks gsm8: no such task in lm-eval; did you mean gsm8k, "),
        (
            ["xyzzyxyzzy"],
            "--tasks xyzzyxyzzy: no such task in lm-eval; lm-eval ls tasks lists them",
        ),
        (["own"], "--tasks own: no such task in lm-eval; for the folder write ./own"),
        (["own/nope.yaml"], "--tasks own/nope.yaml: no such file or folder; name a YAML file or"),
        (["./empty"], "--tasks ./empty: the folder holds no task; it needs YAML files of tasks"),
    ],
)
def test_an_unknown_task_is_one_line_with_near_names(tasks, monkeypatch, words, text):
    monkeypatch.chdir(tasks.parent)
    Path("empty").mkdir()
    with pytest.raises(ConfigError) as caught:
        load(*words)
    assert str(caught.value).startswith(text)
    assert len(str(caught.value).splitlines()) == 1


def test_a_task_whose_data_is_missing(tasks):
    (tasks / "rows.jsonl").unlink()
    with pytest.raises(DataError, match=r"choice.yaml: cannot be loaded \(FileNotFoundError: "):
        load(tasks / "choice.yaml")


def test_a_chat_template_that_the_run_does_not_have(tasks):
    with pytest.raises(ConfigError, match="--apply_chat_template: the tokenizer of the run has no"):
        load(tasks, apply_chat_template=True)


def test_no_code_from_the_hub_is_run_unless_the_user_allows_it(tasks, monkeypatch):
    import evaluate

    fetched = []
    monkeypatch.setattr(evaluate, "load", lambda path: fetched.append(path))
    path = tasks / "choice.yaml"
    path.write_text(path.read_text().replace("metric: acc,", "metric: acccc,"))
    with pytest.raises(
        ConfigError, match=r"metric 'acccc': is none of lm-eval's own, and its code"
    ):
        load(path)
    assert fetched == []
    with no_code_from_the_hub(allowed=True):
        evaluate.load("acccc")
    with no_code_from_the_hub(allowed=False):
        evaluate.load(str(tasks))  # a file on this disk
    assert fetched == ["acccc", str(tasks)]


def test_a_task_that_runs_what_the_model_writes_is_refused(tasks):
    (tasks / "choice.yaml").write_text((tasks / "choice.yaml").read_text() + "unsafe_code: true\n")
    with pytest.raises(ConfigError, match="task apples_choice: runs code that the model writes"):
        load(tasks / "choice.yaml", trust_remote_code=True)
