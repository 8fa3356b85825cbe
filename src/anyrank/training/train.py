"""`anyrank train`: one adapter, every rank, one run folder."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import math
import time
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from datasets import Dataset, disable_progress_bars
from transformers import set_seed
from transformers.trainer_callback import ProgressCallback, TrainerCallback
from trl.trainer.sft_trainer import SFTTrainer

from ..errors import ConfigError, RunError
from ..files import finite, new_files, read_json, require_disk, write_json, write_text
from ..tuner import AnyRankConfig
from ..tuner.decoder import lean_decoder
from .arguments import AdapterArguments, DataArguments, ModelArguments, TrainArguments
from .base import load_base, load_tokenizer, wants_4bit
from .callback import check_micro_batches
from .card import model_card
from .data import load_rows, split_rows
from .formats import NEWLINE
from .head import small_tiles
from .run import METRICS, RESULT, check_output, checkpoint_to_resume, claim, unclaim
from .tokens import tokenize_rows

_PACKAGES = ("anyrank", "torch", "transformers", "peft", "trl", "bitsandbytes")
logger = logging.getLogger("anyrank")


def train(
    model: ModelArguments, adapter: AdapterArguments, data: DataArguments, args: TrainArguments
) -> dict[str, Any]:
    """Train, save, and return what result.json holds.

    Raises:
        AnyRankError: anything about the input that is not as needed, before training starts.
    """
    folder = Path(args.output_dir or "")
    resume = args.resume_from_checkpoint not in (None, "", "false", "False", False)
    if data.dataset is None:
        raise ConfigError("dataset is missing; name a .jsonl, .json, .csv or .parquet file")
    if args.output_dir is None:
        raise ConfigError("output_dir is missing; name the folder of this run")
    config = adapter.config()
    check_micro_batches(config.rank_schedule(), args.gradient_accumulation_steps)
    in_4bit = wants_4bit(model, adapter.method)
    options = resolved(model, adapter, data, args, config, in_4bit)
    main_process = args.process_index == 0
    if main_process:
        check_output(folder, options, resume)
    checkpoint = checkpoint_to_resume(folder, str(args.resume_from_checkpoint)) if resume else None
    tokenizer = load_tokenizer(model, trust_remote_code=args.trust_remote_code)
    _prepare_tokenizer(tokenizer, args)
    rows, held_out = read_data(data, args, tokenizer)
    set_seed(args.seed)
    base = load_base(model, in_4bit=in_4bit, trust_remote_code=args.trust_remote_code)
    base.config.use_cache = False
    if model.lean and args.n_gpu <= 1:  # DataParallel copies would run the first one's modules
        lean_decoder(base, exact=args.device.type != "cpu")
    trainer = sft_trainer(base, args, rows, held_out, tokenizer, config, folder)
    if checkpoint is not None:
        _check_base(trainer, checkpoint)
    if main_process:
        _require_room(trainer, folder)
        claim(folder, options)
    try:
        with small_tiles(args.device.type):
            return _fit(trainer, folder, options, tokenizer, checkpoint)
    except BaseException:
        if main_process:
            unclaim(folder)
        raise


def read_data(
    data: DataArguments, args: TrainArguments, tokenizer: Any
) -> tuple[Dataset, Dataset | None]:
    """Training rows and validation rows as token ids and labels."""
    source = data.source(args.dataset_text_field)
    rows = load_rows(source)
    if source.adds_newline:
        logger.info(NEWLINE)
    held_out = None
    if (validation := data.eval_source(args.dataset_text_field)) is not None:
        held_out = load_rows(validation)
    elif data.eval_size:
        rows, held_out = split_rows(rows, data.eval_size, args.seed)
    completion_only = args.completion_only_loss is not False
    if len(rows) < 20_000:  # done in seconds; the bars of `datasets` would only scroll by
        disable_progress_bars()
    tokens = []
    for name, part in (("training", rows), ("validation", held_out)):
        if part is None:
            tokens.append(None)
            continue
        ids, report = tokenize_rows(
            part, tokenizer, max_length=args.max_length, completion_only=completion_only
        )
        logger.info("%s: %s", name, report.sentence(args.max_length))
        tokens.append(ids)
    return tokens[0], tokens[1]


def resolved(
    model: ModelArguments,
    adapter: AdapterArguments,
    data: DataArguments,
    args: TrainArguments,
    config: AnyRankConfig,
    in_4bit: bool,
) -> dict[str, Any]:
    """Every choice of the run: ours in full, the Trainer's where they differ from its defaults."""
    options = {**asdict(model), **asdict(adapter), **asdict(data)}
    options |= {"load_in_4bit": in_4bit, "scale": config.scale, "nested": config.nested}
    options |= {"pool": config.pool, "repeat": config.repeat}
    usual = TrainArguments(output_dir=args.output_dir)
    stated = {"learning_rate", "per_device_train_batch_size", "seed", "max_length", "output_dir"}
    for field in fields(args):
        value = getattr(args, field.name)
        changed = value != getattr(usual, field.name)
        plain = field.init and isinstance(value, str | int | float | bool | list | dict | None)
        if plain and (field.name in stated or changed):
            options[field.name] = getattr(value, "value", value)  # an enum by its value
    for name in ("resume_from_checkpoint", "hub_token", "trust_remote_code"):
        options.pop(name, None)
    return options


def _prepare_tokenizer(tokenizer: Any, args: TrainArguments) -> None:
    """Set what the trainer would set later: rows are tokenized before it sees them."""
    path, args.chat_template_path = args.chat_template_path, None
    args.assistant_only_loss = False  # labels already lie on the assistant's turns alone
    if args.eos_token is not None:
        if args.eos_token not in tokenizer.get_vocab():
            raise ConfigError(f"eos_token={args.eos_token!r} is no token of the tokenizer")
        tokenizer.eos_token = args.eos_token
    if path is None:
        return
    if Path(path).is_file():
        tokenizer.chat_template = Path(path).read_text(encoding="utf-8")
    elif Path(path).is_dir():
        from transformers import AutoTokenizer

        tokenizer.chat_template = AutoTokenizer.from_pretrained(path).chat_template
    else:
        raise ConfigError(
            f"chat_template_path={path}: no such file or folder; give a Jinja file, or a folder "
            "with a tokenizer"
        )


def sft_trainer(
    base: Any,
    args: TrainArguments,
    rows: Dataset,
    held_out: Dataset | None,
    tokenizer: Any,
    config: AnyRankConfig,
    folder: Path,
) -> SFTTrainer:
    """TRL's trainer around a base, its adapter in float32, its metrics in the run folder."""
    trainer = SFTTrainer(
        model=base,
        args=args,
        train_dataset=rows,
        eval_dataset=held_out,
        processing_class=tokenizer,
        peft_config=config,
        callbacks=[MetricsCallback(folder / METRICS)],
    )
    if trainer.pop_callback(ProgressCallback):
        trainer.add_callback(LossBar)
    model: Any = trainer.model
    for parameter in model.parameters():  # TRL rounds adapters of a 4-bit base to bf16
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return trainer


def _check_base(trainer: SFTTrainer, checkpoint: Path) -> None:
    """Raise if a checkpoint was trained on another quantized base."""
    model: Any = trainer.model
    before = read_json(checkpoint / "adapter_config.json").get("base_fingerprint")
    if before not in (None, model.peft_config["default"].base_fingerprint):
        raise RunError(
            f"{checkpoint}: was trained on another quantized base (its codes, scales or offsets "
            "differ); put that base back, or start again in another output_dir"
        )


def _trained(trainer: SFTTrainer) -> int:
    model: Any = trainer.model
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _require_room(trainer: SFTTrainer, folder: Path) -> None:
    trained = _trained(trainer)
    checkpoint = 4 * trained * 3  # weights and two moments, fp32
    needed = 4 * trained + _checkpoints(trainer) * checkpoint + 50_000_000  # tokenizer and logs
    require_disk(folder, needed, "a run of this adapter")


def _checkpoints(trainer: SFTTrainer) -> int:
    """How many checkpoints will lie on the disk at once."""
    args, rows = trainer.args, len(trainer.train_dataset)  # type: ignore[arg-type]
    if args.save_strategy == "no":
        return 0
    batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    per_epoch = math.ceil(rows / batch)
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * per_epoch)
    every = per_epoch if args.save_strategy == "epoch" else args.save_steps
    every = every if every >= 1 else max(1, math.ceil(every * steps))
    count = math.ceil(steps / every)
    return min(count, args.save_total_limit or count)


def _fit(
    trainer: SFTTrainer,
    folder: Path,
    options: dict[str, Any],
    tokenizer: Any,
    checkpoint: Path | None,
) -> dict[str, Any]:
    start = time.perf_counter()
    outcome = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    seconds = time.perf_counter() - start
    result: dict[str, Any] = {
        "steps": outcome.global_step,
        "train_loss": round(outcome.training_loss, 6),
        "seconds": round(seconds, 1),
        "trainable_parameters": _trained(trainer),
    }
    if trainer.eval_dataset is not None:
        result["eval_loss"] = round(trainer.evaluate()["eval_loss"], 6)
    result["versions"] = _versions()
    if trainer.is_world_process_zero():
        model: Any = trainer.model
        rows = model.peft_config["default"].rows
        with new_files(folder) as beside:
            model.save_pretrained(beside)
            tokenizer.save_pretrained(beside)
            write_text(beside / "README.md", model_card(options, result, rows))
        write_json(folder / RESULT, result)
    return result


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _step(line: str) -> float:
    """The step of a line of metrics.jsonl; a line that was cut off while written is dropped."""
    try:
        return json.loads(line)["step"]
    except ValueError:
        return math.inf


class LossBar(ProgressCallback):
    """The Trainer's progress bar with the loss at its end, instead of a line per log."""

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Show the newest loss; metrics.jsonl holds everything."""
        shown = {key: value for key, value in (logs or {}).items() if key in ("loss", "eval_loss")}
        if self.training_bar is not None and shown:
            self.training_bar.set_postfix(shown)


class MetricsCallback(TrainerCallback):
    """metrics.jsonl: one line per log of the Trainer; a resume continues after its checkpoint."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Drop the lines of steps that will be done again."""
        if not (state.is_world_process_zero and self.path.exists()):
            return
        lines = self.path.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if _step(line) <= state.global_step]
        write_text(self.path, "".join(line + "\n" for line in kept))

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Append the figures of this step."""
        if state.is_world_process_zero and logs:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(finite({"step": state.global_step, **logs})) + "\n")
