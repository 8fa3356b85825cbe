"""The embedded default: a tiny pretrained Llama, new facts to learn, and the commands of a user.

`anyrank demo` runs these commands one after another, as a user would on a model of their own. The
model and the rows are made by the scripts in the repository's demo/ folder.
"""

from __future__ import annotations

from pathlib import Path

HERE = Path(__file__).parent
MODEL, TRAIN_ROWS, TEST_ROWS = HERE / "model", HERE / "train.jsonl", HERE / "test.jsonl"


def train_command(out: Path) -> list[str]:
    """One any-rank adapter on the NF4 base."""
    return _words(
        "train",
        model_name_or_path=MODEL,
        dataset=TRAIN_ROWS,
        eval_dataset=TEST_ROWS,
        lora_r=64,
        max_steps=160,
        learning_rate="3e-3",
        warmup_steps=20,
        per_device_train_batch_size=64,
        save_strategy="no",
        logging_steps=20,
        output_dir=out / "run",
    )


def sweep_command(out: Path) -> list[str]:
    """The loss and the exact answers at every rank."""
    return [
        "sweep",
        str(out / "run"),
        "--exact_match",
        *_words(max_new_tokens=16, batch_size=32),
    ]


def export_command(out: Path, rank: int) -> list[str]:
    """An ordinary LoRA of the chosen rank."""
    return ["export", str(out / "run"), str(out / "lora"), "--rank", str(rank), "--to", "lora"]


NEXT = """\
Now with your own model and rows (.jsonl, .csv, .parquet, or a Hub name):

  anyrank train --model_name_or_path MODEL --dataset ROWS --output_dir RUN
  anyrank sweep RUN --dataset MORE_ROWS
  anyrank export RUN --rank 8 --to lora OUT
"""


def _words(*first: str, **options: object) -> list[str]:
    return [*first, *(str(word) for key, value in options.items() for word in (f"--{key}", value))]
