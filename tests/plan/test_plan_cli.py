"""`anyrank plan` as users call it: tables, JSON, exit codes and one line per error."""

from __future__ import annotations

import json
import shlex

import pytest
import torch
from runs import CONFIGS

from anyrank.cli import run
from anyrank.cli.plan import PLAN_HELP
from anyrank.plan.options import read_options

QUICK = "--method lora --lora_r 16 --per_device_train_batch_size 4 --max_length 128"


@pytest.fixture
def folder(tmp_path):
    """Nothing but a config.json."""
    config = CONFIGS["llama"]()
    config.num_hidden_layers = 2
    config.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def plan(folder, capsys):
    """Runs `anyrank plan`; returns the exit code and what it said."""

    def planned(words: str, base: object = folder) -> tuple[int, str, str]:
        code = run(["plan", "--model_name_or_path", str(base), *shlex.split(words)])
        said = capsys.readouterr()
        return code, said.out, said.err

    return planned


def test_it_fits(plan):
    code, out, err = plan(f"{QUICK} --gpu_memory 24GB")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert "Memory of a training step on a GPU, 4 x 128 tokens" in lines[0]
    rows = [line.strip("│ ").split("│") for line in lines if line.startswith("│")]
    names = [row[0].strip() for row in rows]
    assert names == [
        "base: float weights", "adapter", "optimizer state", "gradients",
        "kept by the forward pass", "temporary, on top", "CUDA context (assumed)", "total",
        "budget",
    ]  # fmt: skip
    sizes = [float(row[1]) for row in rows]
    assert sum(sizes[:-2]) == pytest.approx(sizes[-2], abs=0.04)
    assert sizes[-1] == 24
    assert f"It fits: {sizes[-2]:.2f} GiB of 24.00 GiB." in lines
    assert "Largest batch at 128 tokens: 1024 or more" in lines
    assert "Largest length at batch 4: 512, all that the model has positions for" in lines
    assert "Largest length at batch 1: 512, all that the model has positions for" in lines
    assert (
        lines[-1] == "Note: what CUDA holds is assumed; the allocator's own slack is not counted."
    )


def test_it_does_not_fit(plan):
    code, out, _ = plan(f"{QUICK} --gpu_memory 601MiB")  # one above what CUDA holds
    assert code == 1
    assert "It does not fit: 0." in out
    assert "Largest batch at 128 tokens: none" in out
    table = out[out.index("What needs less, each by itself:") :].splitlines()[1:]
    changes = [line.split("  --", 1)[1] for line in table if "  --" in line]
    assert changes[0] == "per_device_train_batch_size 1 --gradient_accumulation_steps 4"
    assert changes[1:4] == ["optim paged_adamw_8bit", "load_in_4bit true", "lora_r 8"]
    assert all("does not fit" in line for line in table if "  --" in line)


def test_json_says_the_same_in_bytes(plan):
    code, out, _ = plan(f"{QUICK} --gpu_memory 24 --json")
    found = json.loads(out)
    assert code == 0
    assert found["total"] == sum(found["parts"].values())
    assert (found["budget"], found["fits"], found["device"]) == (24 * 2**30, True, "gpu")
    assert set(found["largest"]) == {"batch", "length", "length_of_one_row"}
    assert found["parts"]["base_float"] == 2 * (
        2 * 512 * 128 + 2 * (2 * 128 * 128 + 2 * 64 * 128 + 3 * 352 * 128) + 5 * 128
    ) + 2 * 16 * 4  # fmt: skip
    assert (found["batch"], found["length"]) == (4, 128)


def test_without_a_budget_it_is_the_table_of_this_machine(plan, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    code, out, _ = plan(f"{QUICK} --json")
    found = json.loads(out)
    assert code == 0
    assert (found["device"], found["budget"], found["largest"]) == ("cpu", None, {})
    code, out, _ = plan(QUICK)
    assert "on a CPU" in out
    assert "budget" not in out


def test_a_gpu_checkpoints_unless_told_otherwise(folder, tmp_path):
    def checkpoints(for_gpu: bool, *words: str) -> bool:
        given = ["--model_name_or_path", str(folder), "--method", "lora", *words]
        return bool(read_options(given, for_gpu=for_gpu).args.gradient_checkpointing)

    (tmp_path / "run.yaml").write_text("gradient_checkpointing: false\n")
    assert checkpoints(True)
    assert not checkpoints(True, "--gradient_checkpointing", "false")
    assert not checkpoints(True, "--config", str(tmp_path / "run.yaml"))
    assert checkpoints(False) == torch.cuda.is_available()
    assert not checkpoints(False, "--use_cpu", "true")
    assert checkpoints(False, "--gradient_checkpointing=true")


def test_nf4_and_codes_are_told_from_float(plan, folder):
    found = json.loads(plan(f"{QUICK} --load_in_4bit true --json")[1])["parts"]
    weights = 2 * (2 * 128 * 128 + 2 * 64 * 128 + 3 * 352 * 128)
    assert found["base_codes"] == weights // 2
    blocks = weights // 64  # a byte each; a float32 per 256 of them, and the tables of 14 layers
    assert blocks < found["base_scales"] < 1.1 * blocks + 14 * 4 * (16 + 256 + 2)
    assert found["base_float"] < 2 * weights


def test_weights_that_stay_float_are_named(plan, tmp_path):
    assert "stay float" not in plan("--method qlora --max_length 64")[1]
    CONFIGS["moe"]().save_pretrained(tmp_path / "moe")
    code, out, _ = plan("--method qlora --max_length 64", tmp_path / "moe")
    assert code == 0
    attention, mlp, experts = 2 * 128 * 128 + 2 * 64 * 128, 3 * 352 * 128, 8 * 3 * 64 * 128
    share = (experts + 8 * 128) / (2 * attention + mlp + experts + 8 * 128)  # and the router
    assert f"Note: {share:.0%} of the weights of the layers stay float: " in out


def test_help():
    lines = PLAN_HELP.splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 100
    assert (
        "Exit code: 0 when it fits (or no --gpu_memory was named), 1 when it does not" in PLAN_HELP
    )
    assert run(["plan", "--help"]) == 0


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (
            "--gpu_memory 24 apples",
            "'apples' belongs to no option; write --key value",
        ),
        (
            "--gpu_memory lots",
            "gpu_memory='lots' must be a size above 0 such as 24GB, 24 or 22.5GiB (all in units of "
            "2^30 bytes, as cards are sold), or 24000MiB",
        ),
        (
            "--gpu_memory",
            "gpu_memory='' must be a size above 0 such as 24GB, 24 or 22.5GiB (all in units of "
            "2^30 bytes, as cards are sold), or 24000MiB",
        ),
        ("--lora_rank 8", "option --lora_rank is unknown; did you mean local_rank, lora_r"),
        (
            "--activation_offloading true",
            "activation_offloading=True cannot be planned: activations move to the host in ways "
            "that are not followed",
        ),
        (
            "--gradient_checkpointing_kwargs '{\"every_n_layers\": 2}'",
            "gradient_checkpointing_kwargs: 'every_n_layers' cannot be planned",
        ),
        ("--max_length none", "max_length"),
        ("--method lora --lora_r 999", "model.layers.0.self_attn.q_proj: rank 999 must lie in 1.."),
    ],
)
def test_errors(plan, words, text):
    code, _, err = plan(words)
    assert code == 2
    assert err.splitlines()[-1].removeprefix("anyrank: ").startswith(text)


def test_a_model_that_is_not_there(plan, tmp_path):
    (tmp_path / "empty").mkdir()
    code, _, err = plan("--gpu_memory 24", tmp_path / "empty")
    assert code == 2
    assert err == (
        f"anyrank: model_name_or_path={tmp_path / 'empty'}: the folder has no config.json\n"
    )


@pytest.mark.parametrize(
    ("kind", "name"), [({"quant_method": "gptq", "bits": 4}, "gptq"),
                       ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "int8")]
)  # fmt: skip
def test_weights_that_nothing_trains_on(plan, folder, kind, name):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": kind}))
    code, _, err = plan("--gpu_memory 24 --method lora")
    assert code == 2
    assert err == (
        f"anyrank: model_name_or_path={folder}: adapters do not train on its weights of kind "
        f"{name}; take them over with anyrank quantize, or name the float model\n"
    )


def test_a_base_that_was_stored_in_4_bits(plan, folder):
    once = json.loads(plan(f"{QUICK} --load_in_4bit true --json")[1])
    path, config = folder / "config.json", json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": "bfloat16",
    }  # fmt: skip
    path.write_text(json.dumps(config))
    assert json.loads(plan(f"{QUICK} --json")[1]) == once
