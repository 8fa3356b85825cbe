"""The Trainer draws a rank per step without a line of user code; TRL's README with our config."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from tiny import SHAPE, layers
from tiny_tokenizers import tiny_tokenizer
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

import anyrank
from anyrank.errors import ConfigError
from anyrank.training.callback import RankCallback

pytestmark = pytest.mark.filterwarnings(
    "ignore:You passed `bf16=True`:UserWarning", "ignore:.*pin_memory.*:UserWarning"
)
ROWS = [{"prompt": f"Say {i}:", "completion": f" {i} it is."} for i in range(24)]


def falcon() -> FalconForCausalLM:
    torch.manual_seed(0)
    return FalconForCausalLM(
        FalconConfig(
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_kv_heads=2,
            new_decoder_architecture=True,
            vocab_size=400,
        )
    )


def qwen3() -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    return Qwen3ForCausalLM(Qwen3Config(head_dim=16, vocab_size=400, **SHAPE))


def trainer(tmp_path: Path, model, config: anyrank.AnyRankConfig | None, **options) -> SFTTrainer:
    options = {"max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 0.01} | options
    options.setdefault("save_strategy", "no")
    return SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(tmp_path / "out"), use_cpu=True, bf16=False, logging_steps=1,
            disable_tqdm=True, seed=7, dataloader_pin_memory=False, **options,
        ),
        train_dataset=Dataset.from_list(ROWS),
        eval_dataset=Dataset.from_list(ROWS[:4]),
        processing_class=tiny_tokenizer(),
        peft_config=config,
    )  # fmt: skip


def watch(sft: SFTTrainer) -> list[tuple[int, int, int]]:
    """(step, rank, first row) of every micro-batch, filled while training."""
    seen, step = [], sft.training_step

    def watched(*args, **kwargs):
        adapter = layers(sft.model)[-1].adapters["default"]
        seen.append((sft.state.global_step, adapter.rank, adapter.first))
        return step(*args, **kwargs)

    sft.training_step = watched  # type: ignore[method-assign]
    return seen


@pytest.mark.parametrize("build", [falcon, qwen3])
def test_sft_trainer_with_our_config_trains_saves_and_loads(build, tmp_path):
    sft = trainer(tmp_path, build(), anyrank.AnyRankConfig(method="qdylora", r=8), max_steps=8)
    seen = watch(sft)
    sft.train()
    draw = anyrank.Schedule(8)
    assert seen == [(step, draw(step, 8, 7).ranks[0], 0) for step in range(8)]
    losses = [log["loss"] for log in sft.state.log_history if "loss" in log]
    assert losses[-1] < losses[0]
    sft.save_model(str(tmp_path / "saved"))
    again = PeftModel.from_pretrained(build(), tmp_path / "saved").eval()
    ids = torch.arange(10)[None]
    sft.model.eval()
    for rank in (1, 8):
        with again.set_rank(rank), sft.model.set_rank(rank):
            assert torch.equal(again(ids).logits, sft.model(ids).logits)


def test_the_ranks_of_a_step_share_its_micro_batches(tmp_path):
    config = anyrank.AnyRankConfig(method="qdylora", r=8, schedule="sandwich")
    sft = trainer(tmp_path, qwen3(), config, max_steps=3, gradient_accumulation_steps=6)
    seen = watch(sft)
    sft.train()
    schedule = config.rank_schedule()
    wanted = [(step, schedule(step, 3, 7).ranks[i % 3], 0) for step in range(3) for i in range(6)]
    assert seen == wanted


def test_frozen_rows_follow_the_draw(tmp_path):
    config = anyrank.AnyRankConfig(method="dylora", r=8, frozen_rows=True, rank_unit=2)
    sft = trainer(tmp_path, qwen3(), config)
    seen = watch(sft)
    sft.train()
    assert all(rank - first == 2 for _, rank, first in seen)


def test_low_ranks_settle_in_optimizer_steps_of_their_own(tmp_path):
    config = anyrank.AnyRankConfig(r=8)
    options = {"max_steps": 10, "gradient_accumulation_steps": 4, "max_grad_norm": 0.1}
    sft = trainer(tmp_path, qwen3(), config, **options)
    seen, steps, norms = watch(sft), [], []

    def before_step(optimizer, *_):
        held = [p.grad for group in optimizer.param_groups for p in group["params"]]
        norms.append(torch.nn.utils.get_total_norm([g for g in held if g is not None]))
        steps.append(layers(sft.model)[-1].adapters["default"].rank)

    sft.create_optimizer()
    sft.optimizer.register_step_pre_hook(before_step)
    sft.train()
    turns = [(1, 2, 8, 1), (2, 8, 1, 4), (8, 1, 4, 8)]
    assert seen[:28] == [(step, 8, 0) for step in range(7) for _ in range(4)]
    assert [(s, r) for s, r, _ in seen[28:]] == [(7 + i, r) for i in range(3) for r in turns[i]]
    assert steps == [8] * 28 + [rank for ranks in turns for rank in ranks]
    assert max(norms) < 0.1001


def test_the_adapter_is_finished_before_it_is_evaluated_and_saved_at_the_last_step(tmp_path):
    config = anyrank.AnyRankConfig(r=8)
    options = {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 4, "save_strategy": "steps"}
    sft, seen = trainer(tmp_path, qwen3(), config, save_steps=4, **options), []

    def layer_rows() -> torch.Tensor:
        return layers(sft.model)[0].anyrank_A["default"].detach().clone()

    class AfterStep(TrainerCallback):
        def on_optimizer_step(self, *_, **__):
            seen.append(layer_rows())

        def on_evaluate(self, *_, **__):
            seen.append(layer_rows())

    sft.add_callback(AfterStep())
    sft.train()
    *_, last_step, evaluated = seen
    assert torch.equal(last_step[:4], evaluated[:4])
    assert not torch.allclose(last_step[4:], evaluated[4:], atol=1e-3)
    saved = PeftModel.from_pretrained(qwen3(), tmp_path / "out/checkpoint-4")
    assert torch.equal(layers(saved)[0].anyrank_A["default"], evaluated)
    assert torch.equal(layer_rows(), evaluated)


@pytest.mark.parametrize("option", ["fp16", "fsdp"])
def test_steps_of_their_own_are_left_out_where_only_the_trainer_can_step(option):
    model = get_peft_model(qwen3(), anyrank.AnyRankConfig(r=8))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    args = {"seed": 0, "gradient_accumulation_steps": 4, "fp16": False, "fsdp": ""}
    arguments = SimpleNamespace(**(args | {option: "full_shard" if option == "fsdp" else True}))
    callback = RankCallback()
    state = SimpleNamespace(max_steps=10, global_step=7)
    callback.on_train_begin(arguments, state, None, model=model, optimizer=optimizer)
    callback.on_step_begin(arguments, state, None)
    assert callback.plans[0].schedule(7, 10, 0).apart
    assert not callback.plans[0].apart


@pytest.mark.parametrize("at", [6, 7, 8])
def test_a_run_that_settles_resumes_bit_for_bit(at, tmp_path):
    finals = []
    options = {"max_steps": 10, "gradient_accumulation_steps": 2, "save_strategy": "steps"}
    for resume in (False, True):
        sft = trainer(tmp_path, qwen3(), anyrank.AnyRankConfig(r=8), save_steps=at, **options)
        sft.train(resume_from_checkpoint=str(tmp_path / f"out/checkpoint-{at}") if resume else None)
        finals.append({k: p.detach() for k, p in sft.model.named_parameters() if p.requires_grad})
    assert all(torch.equal(finals[0][name], finals[1][name]) for name in finals[0])


def test_micro_batches_that_cannot_be_shared_are_refused(tmp_path):
    config = anyrank.AnyRankConfig(method="qdylora", r=8, schedule="sandwich")
    sft = trainer(tmp_path, qwen3(), config, gradient_accumulation_steps=2)
    with pytest.raises(ConfigError) as error:
        sft.train()
    assert str(error.value) == (
        "gradient_accumulation_steps=2 must be a multiple of 3, the ranks that "
        "schedule='sandwich' trains per step; set it to 3 and divide the batch size by 3"
    )


def test_evaluation_between_steps_sees_the_whole_adapter(tmp_path):
    config = anyrank.AnyRankConfig(method="qdylora", r=8)
    sft = trainer(tmp_path, qwen3(), config, eval_strategy="steps", eval_steps=1)
    ranks, evaluate = [], sft.evaluate

    def watched(*args, **kwargs):
        ranks.append(layers(sft.model)[0].adapters["default"].rank)
        return evaluate(*args, **kwargs)

    sft.evaluate = watched  # type: ignore[method-assign]
    sft.train()
    assert ranks == [8] * 4


def test_rows_that_were_not_drawn_do_not_move_in_a_trainer(tmp_path):
    config = anyrank.AnyRankConfig(method="qdylora", r=8, ranks=[2, 8])
    sft = trainer(tmp_path, qwen3(), config, weight_decay=0.1)
    moved, step = [], sft.training_step
    a = layers(sft.model)[0].anyrank_A["default"]
    seen = [a.detach().clone()]

    def watched(*args, **kwargs):
        changed = (a.detach() - seen[-1]).abs().sum(1).nonzero().flatten().tolist()
        moved.append(changed)
        seen.append(a.detach().clone())
        return step(*args, **kwargs)

    sft.training_step = watched  # type: ignore[method-assign]
    sft.train()
    draws = [config.rank_schedule()(i, 4, 7).ranks[0] for i in range(3)]
    assert set(draws) == {2, 8}
    assert moved == [[], *(list(range(rank)) for rank in draws)]


def test_a_method_that_is_not_nested_trains_its_full_rank(tmp_path):
    sft = trainer(tmp_path, qwen3(), anyrank.AnyRankConfig(method="qlora", r=8))
    seen = watch(sft)
    sft.train()
    assert {rank for _, rank, _ in seen} == {8}


def test_sft_trainer_takes_a_model_that_already_holds_the_adapter(tmp_path):
    model = get_peft_model(qwen3(), anyrank.AnyRankConfig(method="qdylora", r=8))
    sft = trainer(tmp_path, model, None)
    seen = watch(sft)
    sft.train()
    draw = anyrank.Schedule(8)
    assert [rank for _, rank, _ in seen] == [draw(step, 4, 7).ranks[0] for step in range(4)]


def test_a_plain_trainer_draws_ranks_too_and_leaves_other_models_alone(tmp_path):
    rows = Dataset.from_list([{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}] * 8)
    args = TrainingArguments(
        str(tmp_path), max_steps=2, use_cpu=True, report_to=[], save_strategy="no",
        disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    Trainer(qwen3(), args, train_dataset=rows).train()
    model = get_peft_model(qwen3(), anyrank.AnyRankConfig(method="dylora", r=8))
    before = layers(model)[0].anyrank_B["default"].detach().clone()
    Trainer(model, args, train_dataset=rows).train()
    moved = (layers(model)[0].anyrank_B["default"] - before).abs().sum(0)
    largest = max(anyrank.Schedule(8)(step, 2, 42).ranks[0] for step in range(2))
    assert moved.nonzero().flatten().tolist() == list(range(largest))


TWO_PROCESSES = """
import sys
from types import SimpleNamespace

import torch
import torch.distributed as dist
from peft import get_peft_model
from torch import nn

import anyrank
from anyrank.training.callback import RankCallback
from anyrank.training.watch import Watch

rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
model = nn.Linear(3, 1, bias=False)
nn.init.zeros_(model.weight)
optimizer = torch.optim.SGD(model.parameters(), 1.0)
model(torch.full((1, 3), rank + 1.0)).sum().backward()  # gradients of 1 and of 2
RankCallback()._step(SimpleNamespace(max_grad_norm=0.0), model, optimizer)
assert torch.equal(model.weight, torch.full((1, 3), -1.5)), model.weight
assert model.weight.grad is None

holder = nn.Sequential(nn.Linear(3, 2))
config = anyrank.AnyRankConfig(r=2, target_modules=["0"])
layer = get_peft_model(holder, config).base_model.model[0]
layer.anyrank_A["default"].data = torch.eye(2, 3)
watch = Watch(layer, "default")
layer(torch.full((1, 3), rank + 1.0))  # second moments of 1 and of 4
assert torch.equal(watch.stop(), torch.full((2, 2), 5.0))
"""


@pytest.mark.slow  # two processes that import transformers
def test_processes_average_the_gradients_of_a_step_of_their_own(tmp_path):
    words = [sys.executable, "-c", TWO_PROCESSES]
    both = [
        subprocess.Popen([*words, str(rank), str(tmp_path / "store")], stderr=subprocess.PIPE)
        for rank in range(2)
    ]
    for process in both:
        errors = process.communicate(timeout=300)[1].decode()
        assert process.returncode == 0, errors
