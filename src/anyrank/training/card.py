"""The model card: what was trained, on what, with which settings, and how to use it."""

from __future__ import annotations

from typing import Any

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


def model_card(options: dict[str, Any], result: dict[str, Any]) -> str:
    """The text of README.md beside an adapter.

    Args:
        options: the resolved options of the run.
        result: its figures.
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

At the largest rank, or cut to a smaller one:

```python
import anyrank
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), ".")
model.set_rank(8)
```

`anyrank sweep .` shows the loss at every rank; `anyrank export . --rank 8 --to lora OUT` writes an
ordinary LoRA for PEFT, vLLM or llama.cpp, which need no anyrank.
"""
