"""The Trainer draws a rank per step without a line of user code; TRL's README with our config."""

from __future__ import annotations

from pathlib import Path

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
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

import anyrank
from anyrank.errors import ConfigError

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
    return SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(tmp_path / "out"), use_cpu=True, bf16=False, logging_steps=1,
            save_strategy="no", disable_tqdm=True, seed=7, dataloader_pin_memory=False, **options,
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
