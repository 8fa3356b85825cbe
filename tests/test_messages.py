"""Bad input at the command line: one line that names the thing, and exit code 2."""

from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from anyrank.cli import run


@pytest.fixture
def refusal(base_folder, tmp_path, capsys):
    """Runs `anyrank train` on rows (a file's text) with more words; returns its one error line."""

    def refused(rows: str | None = None, *more: str, verb: str = "train") -> str:
        words = list(more)
        if verb == "train":
            path = tmp_path / "rows.jsonl"
            path.write_text('{"prompt": "a", "completion": " b"}\n' if rows is None else rows)
            given = {
                "--model_name_or_path": str(base_folder),
                "--dataset": str(path),
                "--output_dir": str(tmp_path / "run"),
                "--method": "dylora",
                "--lora_r": "8",
                "--max_steps": "1",
                "--disable_tqdm": "true",
            }
            words = [w for key, value in given.items() if key not in more for w in (key, value)]
            words += more
        assert run([verb, *words]) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert not (tmp_path / "run" / "config.yaml").exists() or "output_dir" in line
        return line.removeprefix("anyrank: ").replace(str(tmp_path), "TMP")

    return refused


def test_a_missing_column(refusal):
    assert refusal('{"question": "a", "answer": "b"}\n') == (
        "TMP/rows.jsonl: found columns question, answer; needs instruction + output, prompt + "
        "completion, messages, conversations or text; name yours with --prompt_column question "
        "--completion_column answer (or --dataset_text_field NAME)"
    )


def test_an_empty_file(refusal):
    assert refusal("").startswith("TMP/rows.jsonl: no rows; needs at least one")


def test_a_broken_line(refusal):
    good = '{"prompt": "a", "completion": " b"}\n'
    assert refusal(good + '{"prompt": "a", "comple\n' + good) == (
        "TMP/rows.jsonl:2: broken JSON (Unterminated string starting at at column 17); needs one "
        "whole object per line (or, in a .json file, one array of objects); correct or remove "
        "the row"
    )


def test_a_row_without_a_completion(refusal):
    assert refusal('{"prompt": "a", "completion": ""}\n') == (
        "TMP/rows.jsonl:1: row has no completion to learn from ('completion' is empty); correct "
        "or remove the row"
    )


def test_rows_that_are_too_long_are_counted_and_said(base_folder, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("anyrank.training.train._fit", lambda *_: {"steps": 0, "seconds": 0})
    path = tmp_path / "rows.jsonl"
    short, cut = ('{"prompt": "a", "completion": " b"}\n', '{"prompt": "a", "completion": "%s"}\n')
    gone = '{"prompt": "%s", "completion": " b"}\n'
    path.write_text(short + cut % ("x" * 30) + gone % ("x" * 40))
    words = f"--model_name_or_path {base_folder} --dataset {path} --output_dir {tmp_path / 'run'}"
    assert (
        run(["train", *words.split(), "--method", "lora", "--lora_r", "4", "--max_length", "20"])
        == 0
    )
    assert caplog.messages[0].splitlines()[1] == (
        "1 row cut at 20 tokens and 1 row dropped, with nothing left to learn from; "
        "--max_length 43 keeps all of them."
    )  # fmt: skip


def test_no_completion_tokens_left(refusal):
    row = '{"prompt": "' + "x" * 30 + '", "completion": " b"}\n'
    assert refusal(row, "--max_length", "8") == (
        "no completion tokens left: all rows (1) were cut at 8 tokens inside of the prompt; "
        "longest prompt 30 tokens; raise --max_length above 30"
    )


def test_an_unknown_method(refusal):
    assert refusal(None, "--method", "qdlora") == (
        "method='qdlora' is unknown; did you mean qdylora, qlora or qalora?"
    )


@pytest.mark.parametrize(
    ("key", "text"),
    [
        (
            "--learning_rat",
            "option --learning_rat is unknown; did you mean learning_rate, packing_strategy or "
            "logging_strategy?",
        ),
        (
            "--lora_rank",
            "option --lora_rank is unknown; did you mean local_rank, lora_r or lora_alpha?",
        ),
        ("--xyzzy", "option --xyzzy is unknown; anyrank train --help_all lists every key"),
    ],
)  # fmt: skip
def test_an_unknown_key(refusal, key, text):
    assert refusal(None, key, "3") == text


def test_an_unknown_key_in_the_config(refusal, tmp_path):
    (tmp_path / "c.yaml").write_text("lora_rr: 8\n")
    assert refusal(None, "--config", str(tmp_path / "c.yaml")) == (
        "--config TMP/c.yaml: key 'lora_rr': did you mean lora_r, lora_dropout or lora_alpha?"
    )


def test_a_value_of_the_wrong_type(refusal):
    assert refusal(None, "--max_steps", "many") == (
        "argument --max_steps/--max-steps: invalid int value: 'many'; see anyrank train --help"
    )
    assert refusal(None, "--ranks", "1,x") == (
        "ranks='1,x' must be whole numbers from 1, such as 1,2,4,8"
    )


def test_a_rank_larger_than_a_layer_allows(refusal):
    assert refusal(None, "--lora_r", "64") == (
        "model.layers.0.self_attn.k_proj: rank 64 must lie in 1..32, the smaller side of its core "
        "of 32 x 64; lower r or exclude the layer"
    )


def test_a_pool_that_does_not_divide(refusal):
    assert refusal(None, "--method", "qbara", "--pool", "48", "--load_in_4bit", "false") == (
        "model.layers.0.self_attn.q_proj: pool=48 must divide d_in=64; nearest divisors: 32, 64"
    )


def test_a_disk_without_room(refusal, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 5, 5))
    assert refusal() == (
        "TMP/run: a run of this adapter needs 50.2 MB, but 0.0 MB are free; free some room, or "
        "name a folder on another disk"
    )


def folder_with(folder: Path, *names: str) -> None:
    folder.mkdir()
    for name in names:
        (folder / name).write_text("a: 1\n")


@pytest.mark.parametrize(
    ("held", "text"),
    [
        (("config.yaml", "result.json"), "holds a finished run; name another folder"),
        (
            ("config.yaml",),
            "holds an unfinished run; go on with --resume_from_checkpoint true, or name another "
            "folder",
        ),
        (("thesis.tex",), "holds 1 other files (thesis.tex, ...); name an empty or new folder"),
    ],
)
def test_an_output_dir_that_is_in_use(refusal, tmp_path, held, text):
    folder_with(tmp_path / "run", *held)
    assert refusal() == f"output_dir=TMP/run {text}"
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == sorted(held)


def test_a_resume_with_other_options(refusal, tmp_path):
    folder_with(tmp_path / "run", "config.yaml")
    assert refusal(None, "--resume_from_checkpoint", "true") == (
        "output_dir=TMP/run: its run has a=1, this one None; resume with --config "
        "TMP/run/config.yaml"
    )


def test_a_model_that_is_not_there(refusal):
    assert refusal(None, "--model_name_or_path", "./nowhere").startswith(
        "model_name_or_path=./nowhere: "
    )


def test_nf4_without_bitsandbytes(refusal, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert refusal(None, "--method", "qdylora") == (
        "an NF4 base needs bitsandbytes; pip install 'anyrank[nf4]', or train on the float base "
        "with --load_in_4bit false"
    )


@pytest.mark.parametrize(
    ("verb", "words", "text"),
    [
        ("trian", [], "verb 'trian' is unknown; did you mean train?"),
        ("sweep", ["TMP"], "TMP: not a run folder (config.yaml is missing); see anyrank train"),
        ("sweep", [], "the following arguments are required: RUN; see anyrank sweep --help"),
        (
            "export",
            ["TMP/adapter", "TMP/out"],
            "name one rank with --rank 8, or several with --ranks 4,8,16",
        ),
        (
            "export",
            ["TMP", "TMP/out", "--rank", "1"],
            "TMP: holds no adapter and no model; name a run, or a folded model",
        ),
        (
            "export",
            ["TMP", "TMP/out", "--rank", "1,2"],
            "name one rank with --rank 8, or several with --ranks 4,8,16",
        ),
        (
            "sweep",
            ["TMP", "--limit", "0"],
            "argument --limit: '0' must be a whole number from 1; see anyrank sweep --help",
        ),
        (
            "sweep",
            ["TMP", "--tolerance", "nan"],
            "argument --tolerance: 'nan' must be a number from 0, in nats per token; see anyrank "
            "sweep --help",
        ),
        (
            "sweep",
            ["TMP", "--answer_pattern", "("],
            "argument --answer_pattern: '(' is no regular expression (missing ), unterminated "
            "subpattern at position 0); see anyrank sweep --help",
        ),
        (
            "export",
            ["TMP/adapter", "TMP/out", "--rank", "1", "--to", "lore"],
            "--to lore is unknown for an adapter; did you mean lora?",
        ),
        (
            "export",
            ["TMP/adapter", "TMP/out", "--rank", "1", "--variant", "rank8"],
            "--variant is for a model alone; leave it out",
        ),
        (
            "export",
            ["TMP/model", "TMP/out"],
            "name a format with --to: gguf, mlx, hqq, torchao",
        ),
        (
            "export",
            ["TMP/model", "TMP/out", "--to", "gptq"],
            "--to gptq is unknown for a model; known: gguf, hqq, mlx, torchao",
        ),
        (
            "export",
            ["TMP/model", "TMP/out", "--to", "mlx", "--embeddings", "Q8_0"],
            "--embeddings is for a model as GGUF alone; leave it out",
        ),
        (
            "export",
            ["TMP/model", "TMP/out", "--to", "gguf", "--rank", "8"],
            "--rank is for adapters, but TMP/model holds a model; fold the ranks you need, and "
            "choose one of them with --variant",
        ),
        (
            "export",
            ["TMP/model", "TMP/out", "--to", "mlx"],
            "TMP/model: its weights are not quantized; make a block-quantized model with anyrank "
            "quantize",
        ),
        ("fold", ["TMP"], "the following arguments are required: OUT; see anyrank fold --help"),
        (
            "fold",
            ["TMP", "TMP/out", "--rank", "1", "--ranks", "2,4"],
            "name one rank with --rank 8, or several with --ranks 4,8,16",
        ),
        (
            "fold",
            ["TMP", "TMP/out", "--rank", "1,2"],
            "--rank 1,2: several ranks go into --ranks",
        ),
        ("fold", ["TMP", "TMP/out"], "TMP: holds no adapter (adapter_config.json is missing)"),
        (
            "fold",
            ["TMP", "TMP/model"],
            "TMP/model exists already; name another folder, or remove it first",
        ),
        (
            "quantize",
            ["TMP/model", "TMP/out", "--tile", "8"],
            "argument --tile: '8' must be outputs x inputs, such as 8x4; see anyrank quantize "
            "--help",
        ),
        (
            "quantize",
            ["TMP/model", "TMP/out", "--tile", "8x4", "--group_size", "32"],
            "--group_size and --tile both say what shares a scale; name one of them",
        ),
        (
            "quantize",
            ["TMP/model", "TMP/out", "--quantizer", "gptq"],
            "--quantizer gptq needs rows to calibrate on; name some with --dataset",
        ),
        (
            "quantize",
            ["TMP/model", "TMP/out", "--dataset", "rows.jsonl"],
            "--dataset is for --quantizer gptq alone; leave one of them out",
        ),
        ("quantize", ["TMP/model", "TMP/out", "--bits", "9"], "bits=9 must lie in 2..8"),
        (
            "quantize",
            ["TMP/model", "TMP/out", "--group_size", "48"],
            "model.layers.0.self_attn.q_proj: groups of 48 columns must divide d_in=64; choose "
            "another --group_size or --tile, or keep the layer in its precision with --keep q_proj",
        ),
    ],
)  # fmt: skip
def test_the_other_verbs(refusal, base_folder, tmp_path, verb, words, text):
    shutil.copytree(base_folder, tmp_path / "model")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    words = [word.replace("TMP", str(tmp_path)) for word in words]
    assert refusal(None, *words, verb=verb) == text


def test_an_option_that_would_do_nothing(refusal):
    assert refusal(None, "--method", "qlora", "--ranks", "1,8", "--load_in_4bit", "false") == (
        "ranks=[1, 8] chooses among nested ranks, but method='qlora' trains its largest rank "
        "alone; add nested=True, or leave ranks out"
    )
    assert refusal(None, "--truncation_mode", "keep_end") == (
        "truncation_mode='keep_end' is not supported: rows are cut at their end; leave it out"
    )
    assert refusal(None, "--eval_size", "0") == (
        "eval_size=0 must be a share or a count above 0, and is not for use beside eval_dataset; "
        "leave one of them out"
    )
    assert refusal(None, "--max_steps", "0") == (
        "max_steps=0 trains nothing; give 1 or more, or num_train_epochs"
    )


@pytest.mark.parametrize("key", ["trust_remote_code", "env"])
def test_trust_is_not_taken_from_a_file(refusal, tmp_path, key):
    (tmp_path / "c.yaml").write_text(f"{key}: true\n")
    assert refusal(None, "--config", str(tmp_path / "c.yaml")).startswith(
        f"--config TMP/c.yaml: {key} is not taken from a file; "
    )


def test_a_step_that_its_ranks_cannot_share_leaves_the_folder_free(refusal, tmp_path):
    assert refusal(None, "--schedule", "sandwich") == (
        "gradient_accumulation_steps=1 must be a multiple of 3, the ranks that "
        "schedule='sandwich' trains per step; set it to 3 and divide the batch size by 3"
    )
    assert not (tmp_path / "run").exists()


def test_a_run_that_fails_before_its_first_checkpoint_frees_its_folder(refusal, tmp_path):
    text = refusal(None, "--lr_scheduler_type", "polynomial", "--lr_scheduler_kwargs", '{"a": 1}')
    assert text.endswith("(--debug shows where)")
    assert list((tmp_path / "run").iterdir()) == []


def test_a_checkpoint_that_is_not_there(refusal, tmp_path):
    assert refusal(None, "--resume_from_checkpoint", "true") == (
        "TMP/run: no whole checkpoint among 0 to resume from; start again in another output_dir"
    )
    assert refusal(None, "--resume_from_checkpoint", str(tmp_path / "x")) == (
        "resume_from_checkpoint=TMP/x: no whole checkpoint; give the path of one, or true for the "
        "newest of output_dir"
    )


def test_a_chat_template_that_is_not_there(refusal):
    assert refusal(None, "--chat_template_path", "nope.jinja") == (
        "chat_template_path=nope.jinja: no such file or folder; give a Jinja file, or a folder "
        "with a tokenizer"
    )
