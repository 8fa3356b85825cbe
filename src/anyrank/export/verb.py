"""`anyrank export`: a rank of an adapter, or a whole quantized model, in a form of another tool."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import ConfigError, RunError, nearest
from ..files import refuse_filled, require_disk
from ..quant.checkpoint import variants
from .adapter import CONFIG, SavedAdapter
from .lora import VLLM_RANKS, export_lora, lora_size, vllm_rank
from .pattern import read_pattern

ADAPTER_FORMATS = ("lora", "gguf")
MODEL_FORMATS = ("gguf", "mlx", "hqq", "torchao")
_ONLY_FOR = {  # option -> the formats that know it
    "base": ("a LoRA GGUF", "gguf", True),
    "embeddings": ("a model as GGUF", "gguf", False),
    "tokenizer_pre": ("a model as GGUF", "gguf", False),
    "target": ("torchao", "torchao", False),
    "dtype": ("mlx", "mlx", False),
    "variant": ("a model", None, False),
    "rank_pattern": ("a run --to lora", "lora", True),
}


@dataclass(frozen=True)
class ExportOptions:
    """What to write; None: as is usual for the format.

    Attributes:
        form: the format.
        ranks: of an adapter.
        several: whether `out` holds one export per rank.
        variant: of a model: which table of offsets.
        base: of an adapter as GGUF: the base model, if it was moved.
        embeddings: of a model as GGUF: F16 or Q8_0.
        tokenizer_pre: of a model as GGUF: llama.cpp's name of the pre-tokenizer.
        target: of torchao: any or cuda.
        dtype: of mlx: the precision to compute in; float32 is the fast one on a CPU.
        rank_pattern: of an adapter as LoRA: a file with a rank per layer, in place of `ranks`.
    """

    form: str | None = None
    ranks: Sequence[int] = ()
    several: bool = False
    variant: str | None = None
    base: Path | None = None
    embeddings: str | None = None
    tokenizer_pre: str | None = None
    target: str | None = None
    dtype: str | None = None
    rank_pattern: Path | None = None

    def check(self, form: str, *, adapter: bool) -> None:
        """Raise on an option that would do nothing."""
        for name, (what, known, for_adapter) in _ONLY_FOR.items():
            fits = known in (None, form) and for_adapter == adapter
            if getattr(self, name) is not None and not fits:
                raise ConfigError(f"--{name} is for {what} alone; leave it out")


def export(folder: Path, out: Path, options: ExportOptions) -> Iterator[str]:
    """Write what `folder` holds and yield what to tell the user, a line each.

    Args:
        folder: a run or another folder with an anyrank adapter, or a quantized model.
        out: the new folder (of GGUF: or file).
        options: the format, and what it needs to know.

    Raises:
        AnyRankError: a rank, the format or a folder is not as needed; nothing is written then.
    """
    if (folder / CONFIG).is_file():
        form = _known(options.form or "lora", ADAPTER_FORMATS, "an adapter")
        options.check(form, adapter=True)
        if options.rank_pattern is not None:
            if options.ranks:
                raise ConfigError(
                    "--rank_pattern gives every layer a rank of its own; leave --rank (and "
                    "--ranks) out"
                )
            return _export_pattern(SavedAdapter.read(folder), out, options.rank_pattern)
        if not options.ranks:
            raise ConfigError("name one rank with --rank 8, or several with --ranks 4,8,16")
        return _export_adapter(SavedAdapter.read(folder), out, form, options)
    if not (folder / "config.json").is_file():
        raise RunError(f"{folder}: holds no adapter and no model; name a run, or a folded model")
    if options.ranks:
        raise ConfigError(
            f"--rank is for adapters, but {folder} holds a model; fold the ranks you need, and "
            "choose one of them with --variant"
        )
    if options.form is None:
        raise ConfigError(f"name a format with --to: {', '.join(MODEL_FORMATS)}")
    form = _known(options.form, MODEL_FORMATS, "a model")
    options.check(form, adapter=False)
    tables = variants(folder)
    if options.variant is None and len(tables) > 1:
        raise ConfigError(
            f"{folder}: holds several tables; name one with --variant: {', '.join(tables)}"
        )
    return _export_model(folder, out, form, options)


def _known(form: str, formats: Sequence[str], what: str) -> str:
    if form not in formats and form in {*ADAPTER_FORMATS, *MODEL_FORMATS}:
        raise ConfigError(f"--to {form} is not for {what}; name one of {', '.join(formats)}")
    if form not in formats:
        raise ConfigError(f"--to {form} is unknown for {what}; {nearest(form, formats)}")
    return form


def _export_adapter(
    adapter: SavedAdapter, out: Path, form: str, options: ExportOptions
) -> Iterator[str]:
    targets = {rank: _target(out, rank, form, options.several) for rank in options.ranks}
    for rank, target in targets.items():
        adapter.check_rank(rank)
        refuse_filled(target)
    yield from _prefix_warning(adapter, targets)
    require_disk(out, sum(lora_size(adapter, rank) for rank in targets), "the export")
    for rank, target in targets.items():
        if form == "lora":
            export_lora(adapter, target, rank)
        else:
            from .gguf import export_gguf_lora

            target = export_gguf_lora(adapter, target, rank, base=options.base)
        yield f"rank {rank}: {target}"
    if form == "lora":
        yield _serve(adapter, targets)
    else:
        yield f"Run: llama-cli -m BASE.gguf --lora {shlex.quote(str(target))}"


def _export_pattern(adapter: SavedAdapter, out: Path, file: Path) -> Iterator[str]:
    ranks = adapter.layer_ranks(read_pattern(file))
    refuse_filled(out)
    yield from _prefix_warning(adapter, ranks.values())
    export_lora(adapter, out, ranks)
    yield f"{len(ranks)} layers, ranks {min(ranks.values())} to {max(ranks.values())}: {out}"
    yield (
        f"Load: PeftModel.from_pretrained(base, {str(out)!r}); vLLM wants one rank for all layers: "
        "export one with --rank"
    )


def _prefix_warning(adapter: SavedAdapter, ranks: Iterable[int]) -> Iterator[str]:
    config = adapter.config
    if not config.nested and any(rank != config.rows for rank in ranks):
        yield (
            f"warning: {config.method} was trained at rank {config.rows} alone; "
            "a smaller prefix of it never learned to stand by itself (see --nested true)"
        )


def _target(out: Path, rank: int, form: str, several: bool) -> Path:
    if not several:
        return out
    return out / (f"rank{rank}.gguf" if form == "gguf" else f"rank{rank}")


def _export_model(folder: Path, out: Path, form: str, options: ExportOptions) -> Iterator[str]:
    variant = options.variant
    if form == "gguf":
        from .gguf import export_gguf

        file = export_gguf(
            folder,
            out,
            variant=variant,
            embeddings=options.embeddings or "F16",
            tokenizer_pre=options.tokenizer_pre,
        )
        yield f"{form}: {file}"
        yield f"Run: llama-cli -m {shlex.quote(str(file))}"
        return
    if form == "mlx":
        import torch

        from .mlx import export_mlx

        dtype = None if options.dtype is None else getattr(torch, options.dtype)
        export_mlx(folder, out, variant=variant, dtype=dtype)
        run = f"mlx_lm.chat --model {shlex.quote(str(out))}"
    elif form == "hqq":
        from .hqq import export_hqq

        export_hqq(folder, out, variant=variant)
        run = f'python -c "from anyrank.export.hqq import load_hqq; model = load_hqq({str(out)!r})"'
    else:
        from .torchao import export_torchao

        export_torchao(folder, out, variant=variant, target=options.target or "any")
        run = f"AutoModelForCausalLM.from_pretrained({str(out)!r}), with torchao installed"
    yield f"{form}: {out}"
    yield f"Run: {run}"


def _serve(adapter: SavedAdapter, targets: Mapping[int, Path]) -> str:
    """The line that serves the exports with vLLM, or why it cannot."""
    needed = vllm_rank(max(targets))
    if needed is None:
        return f"vLLM serves ranks up to {VLLM_RANKS[-1]}; use PEFT for this one"
    if adapter.config.modules_to_save:
        modules = ", ".join(adapter.config.modules_to_save)
        return f"vLLM serves no adapter with fully trained modules ({modules}); use PEFT"
    if adapter.config.base_fingerprint is not None:
        return (
            "Load: PeftModel.from_pretrained, beside its quantized base (import anyrank); vLLM "
            "cannot read that base, llama.cpp can: export the base and the adapter with --to gguf"
        )
    words = ["vllm", "serve", adapter.config.base_model_name_or_path or "BASE", "--enable-lora"]
    words += ["--max-lora-rank", str(needed), "--lora-modules"]
    return f"Serve: {shlex.join([*words, *(f'r{rank}={path}' for rank, path in targets.items())])}"
