"""The model card: what was trained, on what, with which settings, and how to use it."""

from __future__ import annotations

from typing import Any

from .formats import NEWLINE, DataSource

_SETTINGS = (
    "method",
    "lora_r",
    "lora_alpha",
    "scale",
    "nested",
    "ranks",
    "load_in_4bit",
    "learning_rate",
    "lr_scheduler_type",
    "max_steps",
    "num_train_epochs",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "max_length",
    "seed",
)


def model_card(options: dict[str, Any], result: dict[str, Any], rows: int) -> str:
    """The text of README.md beside an adapter.

    Args:
        options: the resolved options of the run.
        result: its figures.
        rows: the largest rank; 0 for a dense core.
    """
    settings = "\n".join(
        f"| {key} | {options[key]} |" for key in _SETTINGS if options.get(key) is not None
    )
    figures = "\n".join(
        f"| {key} | {value} |" for key, value in result.items() if not isinstance(value, dict)
    )
    base = options["model_name_or_path"]
    return f"""---
library_name: peft
base_model: {base}
tags: [anyrank, lora, {options["method"]}]
---

# Adapter trained with anyrank

Base model: `{base}`. Data: `{options["dataset"]}`.

| setting | value |
|---|---|
{settings}

| figure | value |
|---|---|
{figures}

## Use

```python
import anyrank
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), ".")
```
{_prompts(options)}{_ranks(rows, options)}"""


def _prompts(options: dict[str, Any]) -> str:
    """How the training rows ended their prompts, where their columns do not say it."""
    columns = (options.get("prompt_column"), options.get("completion_column"))
    source = DataSource(options["dataset"], prompt_column=columns[0], completion_column=columns[1])
    return f"\n{NEWLINE}\n" if source.adds_newline else ""


def _ranks(rows: int, options: dict[str, Any]) -> str:
    """What can be done with the ranks of this adapter; nothing for a dense core."""
    if not rows:
        return ""
    text = f"""
`anyrank export . OUT --rank {rows} --to lora` writes an ordinary LoRA for PEFT or vLLM, which
need no anyrank.
"""
    if options["nested"]:
        text += f"""
Ranks trained: {options["ranks"] or f"1 to {rows}"}. `model.set_rank(k)` cuts the adapter to rank k,
`anyrank sweep .` shows the loss at each, and export takes any of them.
"""
    return text
