"""The trainer of `anyrank train` around a model without memory."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import datasets
from datasets import Dataset
from trl.trainer.sft_trainer import SFTTrainer

from ..training.arguments import TrainArguments
from ..training.train import sft_trainer
from ..tuner import AnyRankConfig


def make_trainer(model: Any, args: TrainArguments, config: AnyRankConfig) -> SFTTrainer:
    """The trainer of `anyrank train`, on a row that nobody reads; the model stays where it is."""
    args = copy.copy(args)
    args.report_to, args.push_to_hub = [], False
    args.eos_token = args.pad_token = args.chat_template_path = None
    row = Dataset.from_dict({"input_ids": [[0, 0]], "labels": [[0, 0]]})
    stay = mock.patch.object(SFTTrainer, "_move_model_to_device", _stay)
    with tempfile.TemporaryDirectory() as folder, stay, _no_bars():
        args.output_dir = folder
        own = copy.deepcopy(config)
        return sft_trainer(model, args, row, None, _tokenizer(), own, Path(folder))


def _stay(*_: Any) -> None:
    """In the place of moving a model to a device."""


@cache
def _tokenizer() -> Any:
    """A tokenizer with one token, which the trainer asks for its padding."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    one = Tokenizer(WordLevel({"<pad>": 0}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=one, pad_token="<pad>", eos_token="<pad>")


@contextmanager
def _no_bars() -> Iterator[None]:
    """Preparing one row needs no progress bars."""
    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()
