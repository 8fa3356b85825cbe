"""The options of `anyrank train`: Hugging Face names, one text each, which is also the help."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from trl.trainer.sft_config import SFTConfig

from ..errors import ConfigError
from ..schedule import rank_list
from ..tuner import AnyRankConfig
from .formats import DataSource

_ADAPTER_TEXTS = {f.name: f.metadata.get("help", "") for f in fields(AnyRankConfig)}
_ADAPTER_FIELDS = {  # option -> field of AnyRankConfig
    "method": "method",
    "lora_r": "r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "lora_target_modules": "target_modules",
    "lora_exclude_modules": "exclude_modules",
    "lora_modules_to_save": "modules_to_save",
    "scale": "scale",
    "nested": "nested",
    "pool": "pool",
    "repeat": "repeat",
    "schedule": "schedule",
    "ranks": "ranks",
    "rank_unit": "rank_unit",
    "ranks_per_step": "ranks_per_step",
    "frozen_rows": "frozen_rows",
    "foldable": "foldable",
}


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


def _adapter_option(name: str, default: Any) -> Any:
    return _option(default, _ADAPTER_TEXTS[_ADAPTER_FIELDS[name]])


@dataclass
class ModelArguments:
    """The base model."""

    model_name_or_path: str | None = _option(None, "Base model: a folder or a Hub name.")
    model_revision: str = _option("main", "Branch, tag or commit on the Hub.")
    dtype: str = _option("auto", "Base dtype: auto (as stored), bfloat16, float16 or float32.")
    attn_implementation: str | None = _option(None, "sdpa, eager, flash_attention_2, ...")
    load_in_4bit: bool | None = _option(
        None, "Hold a float base in NF4; default: as the method says (qlora, qdylora, qbara, ...)."
    )
    lean: bool = _option(
        True, "Norms, gated MLPs and, on a CPU, attention that keep less and take less time."
    )

    def __post_init__(self) -> None:
        if self.dtype not in ("auto", "bfloat16", "float16", "float32"):
            raise ConfigError(f"dtype={self.dtype!r} must be auto, bfloat16, float16 or float32")
        self.model_name_or_path = _absolute(self.model_name_or_path)


@dataclass
class AdapterArguments:
    """The adapter and the ranks that a step trains."""

    method: str = _adapter_option("method", "anyrank")
    lora_r: int = _adapter_option("lora_r", 64)
    lora_alpha: float = _adapter_option("lora_alpha", 16.0)
    lora_dropout: float = _adapter_option("lora_dropout", 0.0)
    lora_target_modules: list[str] | None = _adapter_option("lora_target_modules", None)
    lora_exclude_modules: list[str] | None = _adapter_option("lora_exclude_modules", None)
    lora_modules_to_save: list[str] | None = _adapter_option("lora_modules_to_save", None)
    scale: str | None = _adapter_option("scale", None)
    nested: bool | None = _adapter_option("nested", None)
    pool: int | None = _adapter_option("pool", None)
    repeat: int | None = _adapter_option("repeat", None)
    schedule: str | None = _adapter_option("schedule", None)
    ranks: str | None = _adapter_option("ranks", None)
    rank_unit: int = _adapter_option("rank_unit", 1)
    ranks_per_step: int = _adapter_option("ranks_per_step", 1)
    frozen_rows: bool = _adapter_option("frozen_rows", False)
    foldable: bool = _adapter_option("foldable", False)

    def __post_init__(self) -> None:
        for name in ("lora_target_modules", "lora_exclude_modules", "lora_modules_to_save"):
            if isinstance(getattr(self, name), str):  # a YAML file with one name
                setattr(self, name, [getattr(self, name)])
        ranks = rank_list(self.ranks, "ranks")
        self.ranks = None if ranks is None else ",".join(map(str, ranks))

    def config(self) -> AnyRankConfig:
        """The same choices as an adapter configuration."""
        values = {
            theirs: getattr(self, ours)
            for ours, theirs in _ADAPTER_FIELDS.items()
            if getattr(self, ours) is not None
        }
        values["ranks"] = rank_list(self.ranks, "ranks")
        modules = values.get("target_modules")
        if modules and len(modules) == 1 and not modules[0].replace("_", "").isalnum():
            values["target_modules"] = modules[0]  # all-linear, or a regular expression
        return AnyRankConfig(task_type="CAUSAL_LM", **values)  # type: ignore[arg-type]


@dataclass
class DataArguments:
    """The rows to learn from."""

    dataset: str | None = _option(None, "Rows: .jsonl, .json, .csv, .parquet, or a Hub name.")
    dataset_config: str | None = _option(None, "Configuration of a Hub data set.")
    dataset_split: str = _option("train", "Split of a Hub data set or of a folder.")
    eval_dataset: str | None = _option(None, "Validation rows, in the same formats.")
    eval_split: str = _option("test", "Split of eval_dataset on the Hub or in a folder.")
    eval_size: float | None = _option(
        None, "Or hold out rows of the training set: a share below 1, or a count."
    )
    prompt_column: str | None = _option(None, "Column of the prompt, if it has another name.")
    completion_column: str | None = _option(None, "Column of the completion, likewise.")
    dataset_limit: int | None = _option(None, "Use only the first N rows.")

    def __post_init__(self) -> None:
        self.dataset, self.eval_dataset = _absolute(self.dataset), _absolute(self.eval_dataset)
        if self.eval_size is not None and (self.eval_dataset or self.eval_size <= 0):
            raise ConfigError(
                f"eval_size={self.eval_size:g} must be a share or a count above 0, and is not for "
                "use beside eval_dataset; leave one of them out"
            )

    def source(self, text_column: str) -> DataSource:
        """The training rows."""
        assert self.dataset is not None
        return self._source(self.dataset, self.dataset_split, text_column, self.dataset_limit)

    def eval_source(self, text_column: str) -> DataSource | None:
        """The validation rows, if they lie in a data set of their own."""
        if self.eval_dataset is None:
            return None
        source = self._source(self.eval_dataset, self.eval_split, text_column, None)
        return replace(source, name=None) if Path(self.eval_dataset).exists() else source

    def _source(self, dataset: str, split: str, text: str, limit: int | None) -> DataSource:
        return DataSource(
            dataset,
            name=self.dataset_config,
            split=split,
            prompt_column=self.prompt_column,
            completion_column=self.completion_column,
            text_column=text,
            limit=limit,
        )


def _absolute(name: str | None) -> str | None:
    """A path that exists in full, so that a run can be swept from anywhere; else as it is."""
    return str(Path(name).resolve()) if name and Path(name).exists() else name


_UNUSED = {
    "truncation_mode": ("keep_start", "rows are cut at their end"),
    "dataset_kwargs": (None, "rows are prepared before the trainer sees them"),
    "model_init_kwargs": (None, "use --dtype, --attn_implementation and the like"),
}


@dataclass
class TrainArguments(SFTConfig):
    """TRL's SFTConfig with the defaults of quantized fine-tuning."""

    learning_rate: float = _option(2e-4, "Peak learning rate.")
    warmup_steps: float = _option(0.03, "Warm-up: steps, or a share of all steps below 1.")
    max_length: int | None = _option(1024, "Tokens of the longest row; longer ones are cut.")
    gradient_checkpointing: bool | None = _option(
        None, "Recompute activations to save memory; default: on a GPU only."
    )

    def __post_init__(self) -> None:
        on_gpu = torch.cuda.is_available()
        self.use_cpu = self.use_cpu or not on_gpu
        self.dataloader_pin_memory = self.dataloader_pin_memory and on_gpu
        if self.gradient_checkpointing is None:
            self.gradient_checkpointing = on_gpu
        if getattr(self, "activation_checkpointing", False) is None:  # its newer name
            self.activation_checkpointing = self.gradient_checkpointing
        super().__post_init__()
        for name, (usual, reason) in _UNUSED.items():
            if getattr(self, name) not in (usual, None):
                raise ConfigError(
                    f"{name}={getattr(self, name)!r} is not supported: {reason}; leave it out"
                )
        if self.assistant_only_loss and self.completion_only_loss is False:
            raise ConfigError(
                "assistant_only_loss=True contradicts completion_only_loss=False; leave one out"
            )
        if self.max_steps == 0:
            raise ConfigError("max_steps=0 trains nothing; give 1 or more, or num_train_epochs")
