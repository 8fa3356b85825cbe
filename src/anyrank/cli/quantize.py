"""`anyrank quantize`."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .words import count, verb_parser

_CALIBRATION = ("dataset", "prompt_column", "completion_column", "limit", "max_length")


def main(argv: list[str]) -> None:
    """Quantize, and say what was lost."""
    chosen = vars(_arguments().parse_args(argv))
    if chosen["group_size"] is not None and chosen["tile"] is not None:
        raise ConfigError("--group_size and --tile both say what shares a scale; name one of them")
    rows = {name: chosen.pop(name) for name in _CALIBRATION}
    if rows["dataset"] is None and chosen["quantizer"] == "gptq":
        raise ConfigError("--quantizer gptq needs rows to calibrate on; name some with --dataset")
    if rows["dataset"] is not None and chosen["quantizer"] != "gptq":
        raise ConfigError("--dataset is for --quantizer gptq alone; leave one of them out")
    from ..quantize.model import quantize_model

    group, model, out = chosen.pop("group_size"), chosen.pop("model"), chosen.pop("out")
    if group is not None:
        chosen["tile"] = (1, group)
    if rows["dataset"] is not None:
        chosen["calibration"] = _calibration(model, rows, chosen)
    chosen["dtype"] = _dtype(chosen.pop("storage_dtype"))
    quantize_model(model, out, progress=_Bar(), **chosen)
    _tell(out)


def _arguments() -> argparse.ArgumentParser:
    parser = verb_parser(
        "quantize", "Quantize a model in blocks that adapters fold into; it trains like any base."
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="a folder or a Hub name: float, GPTQ or AWQ weights")
    add("out", metavar="OUT", type=Path, help="new folder; from_pretrained(OUT) loads it")
    add("--bits", type=count, help="bits per code, 2 to 8 (4)")
    add("--group_size", type=count, metavar="N", help="inputs that share a scale and offset (32)")
    add("--tile", type=_tile, metavar="8x4", help="or outputs x inputs that share them (QA-HiRA)")
    add(
        "--quantizer",
        choices=("half_quadratic", "minmax", "gptq"),
        help="half_quadratic, as HQQ does it (default), minmax, or gptq with --dataset",
    )
    add("--storage_dtype", choices=("float16", "bfloat16", "float32"),
        help="precision of scales and offsets (float16; exact for GPTQ and AWQ)")  # fmt: skip
    add("--keep", type=lambda text: text.split(","), default=(), metavar="A,B",
        help="linear layers that stay as they are, such as down_proj,layers.0")  # fmt: skip
    add("--dataset", help="rows to calibrate gptq on")
    add("--prompt_column", help="column of the prompt, if it has another name")
    add("--completion_column", help="column of the completion, likewise")
    add("--limit", type=count, default=128, metavar="N", help="use the first N rows (128)")
    add("--max_length", type=count, default=512, metavar="N", help="tokens per row (512)")
    add("--revision", help="branch, tag or commit on the Hub")
    add("--trust_remote_code", action="store_true", help="run code that the model brings along")
    return parser


def _tile(text: str) -> tuple[int, int]:
    rows, _, columns = text.lower().partition("x")
    if not (rows.isdigit() and columns.isdigit() and int(rows) and int(columns)):
        raise argparse.ArgumentTypeError(f"{text!r} must be outputs x inputs, such as 8x4")
    return int(rows), int(columns)


def _dtype(name: str | None) -> Any:
    import torch

    return None if name is None else getattr(torch, name)


def _calibration(model: str, rows: dict[str, Any], chosen: dict[str, Any]) -> list[Any]:
    """Token ids of every calibration row."""
    import torch

    from ..training.arguments import ModelArguments
    from ..training.base import load_tokenizer
    from ..training.data import load_rows
    from ..training.formats import DataSource
    from ..training.tokens import tokenize_rows

    arguments = ModelArguments(model, model_revision=chosen["revision"] or "main")
    tokenizer = load_tokenizer(arguments, trust_remote_code=chosen["trust_remote_code"])
    longest = rows.pop("max_length")
    tokens, _ = tokenize_rows(
        load_rows(DataSource(rows.pop("dataset"), **rows)),
        tokenizer,
        max_length=longest,
        completion_only=False,
    )
    return [torch.tensor(row["input_ids"]) for row in tokens.to_list()]


class _Bar:
    """A progress bar that starts with the first tensor."""

    def __init__(self) -> None:
        self.bar: Any = None

    def __call__(self, done: int, total: int, name: str) -> None:
        from tqdm import tqdm

        if self.bar is None:
            self.bar = tqdm(total=total, desc="quantize", unit="tensor", leave=False)
        self.bar.update(done - self.bar.n)
        if done == total:
            self.bar.close()


def _tell(out: Path) -> None:
    from ..files import read_json
    from ..kernels import tile_name

    report = read_json(out / "quantize.json")
    rows, columns = report["tile"]
    how = "codes taken over" if report["taken_over"] else report["quantizer"]
    weights = report["weights_quantized"]
    share = weights / (weights + report["weights_kept"])
    print(
        f"{report['bits']} bits in {tile_name((rows, columns))} ({how}): "
        f"{report['bits_per_weight']:.2f} bits per weight for {weights:,} weights, {share:.0%} of "
        f"the model; relative error {report['relative_error']:.3g}; {report['seconds']:.0f} s"
    )
    method = "qalora" if rows == 1 else f"qahira --repeat {rows}"
    print(
        f"Next: anyrank train --model_name_or_path {shlex.quote(str(out))} --method {method} "
        f"--pool {columns} --foldable true --dataset ..."
    )
