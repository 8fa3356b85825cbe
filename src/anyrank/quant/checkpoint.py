"""A quantized model on disk: shards of codes, and a table of offsets per variant.

config.json                              with quantization_config, see `format_fields`
model-0000i-of-0000n.safetensors         <layer>.codes, <layer>.scales, and every float tensor
offsets.safetensors                      <layer>.offsets
offsets.rank8.safetensors                another table: another rank, or another task
model.safetensors.index.json             which tensor lies where; model.safetensors.index.rank8.json
                                         points at the same shards and at its own table

Transformers reads it as it reads any sharded checkpoint, with variant="rank8" for another table. A
folder that `save_pretrained` wrote, with everything in model.safetensors, is read as well.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import ConfigError, RunError, nearest
from ..files import read_json, write_text
from ..kernels import Affine, AffineFormat

METHOD = "anyrank"
CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
OFFSETS = "offsets.safetensors"
STORAGE = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
COMPANIONS = (  # what makes a folder of weights a model; config.json is written anew
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.tiktoken",
    "chat_template*",
    "*processor_config.json",
    "LICENSE*",
    "NOTICE*",
)


def format_fields(form: AffineFormat) -> dict[str, Any]:
    """An `AffineFormat` as JSON."""
    return {
        "bits": form.bits,
        "tile": list(form.tile),
        "storage_dtype": str(form.dtype).removeprefix("torch."),
    }


def read_format(fields: dict[str, Any]) -> AffineFormat:
    """The inverse of `format_fields`; other keys are ignored.

    Raises:
        ConfigError: a field is missing, or says nothing that a weight can be stored in.
    """
    bits, tile, name = (fields.get(key) for key in ("bits", "tile", "storage_dtype"))
    sizes = tile if isinstance(tile, list | tuple) and len(tile) == 2 else ()
    whole = all(isinstance(n, int) and n > 0 for n in (bits, *sizes))
    if not (sizes and whole and bits in range(2, 9) and name in STORAGE):
        raise ConfigError(
            f"quantization_config: bits={bits!r}, tile={tile!r}, storage_dtype={name!r} must be 2 "
            "to 8, [rows, columns] and float16, bfloat16 or float32; quantize the model again"
        )
    return AffineFormat(bits, (sizes[0], sizes[1]), STORAGE[name])  # type: ignore[arg-type]


def with_variant(name: str, variant: str | None) -> str:
    """A file name as Transformers writes a variant: before the last suffix."""
    if variant is None:
        return name
    stem, _, suffix = name.rpartition(".")
    return f"{stem}.{variant}.{suffix}"


@dataclass(frozen=True)
class QuantizedModel:
    """A folder with a model that anyrank quantized.

    Attributes:
        folder: where it lies.
        config: the parsed config.json.
        form: how its weights are stored.
        files: the file of every tensor, for one variant.
        variant: which table of offsets; None: the one that loads by default.
    """

    folder: Path
    config: dict[str, Any]
    form: AffineFormat
    files: dict[str, str]
    variant: str | None = None
    _open: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def open(cls, folder: str | Path, variant: str | None = None) -> QuantizedModel:
        """Open a folder; tensors are read when they are asked for.

        Raises:
            RunError: the folder holds no such model, or not this variant of it.
        """
        folder = Path(folder)
        if not (folder / CONFIG).is_file():
            raise RunError(f"{folder}: holds no model ({CONFIG} is missing)")
        config = read_json(folder / CONFIG)
        fields = config.get("quantization_config") or {}
        if fields.get("quant_method") != METHOD:
            raise RunError(
                f"{folder}: its weights are {fields.get('quant_method') or 'not quantized'}; "
                "make a block-quantized model with anyrank quantize"
            )
        try:
            form = read_format(fields)
        except ConfigError as error:
            raise RunError(f"{folder / CONFIG}: {error}") from error
        return cls(folder, config, form, _files(folder, variant), variant)

    @property
    def layers(self) -> list[str]:
        """The names of the quantized layers, in the order of the files."""
        return [name.removesuffix(".codes") for name in self.files if name.endswith(".codes")]

    @property
    def others(self) -> list[str]:
        """The names of the tensors that are not quantized: embeddings, norms, biases, ..."""
        parts = ("codes", "scales", "offsets")
        inside = {f"{layer}.{part}" for layer in self.layers for part in parts}
        return [name for name in self.files if name not in inside]

    def tensor(self, name: str) -> Tensor:
        """One tensor.

        Raises:
            RunError: it is missing, or its file cannot be read.
        """
        if name not in self.files:
            raise RunError(f"{self.folder}: {name} is missing; quantize or fold the model again")
        path = self.folder / self.files[name]
        try:
            if path.name not in self._open:
                self._open[path.name] = safe_open(str(path), "pt")
            return self._open[path.name].get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise RunError(f"{path}: cannot be read ({error})") from error

    def affine(self, layer: str) -> Affine:
        """The weight of a quantized layer."""
        codes, scales, offsets = (
            self.tensor(f"{layer}.{part}") for part in ("codes", "scales", "offsets")
        )
        return Affine(codes, scales, offsets, self.form)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor, from the headers of the files.

        Raises:
            RunError: a tensor is missing, or a file cannot be read.
        """
        found = {}
        for file in sorted(set(self.files.values())):
            try:
                with safe_open(str(self.folder / file), "pt") as tensors:
                    there = set(tensors.keys())
                    for name in (name for name, at in self.files.items() if at == file):
                        if name not in there:
                            raise RunError(
                                f"{self.folder / file}: {name} is missing; "
                                "quantize or fold the model again"
                            )
                        found[name] = tuple(tensors.get_slice(name).get_shape())
            except (FileNotFoundError, SafetensorError) as error:
                raise RunError(f"{self.folder / file}: cannot be read ({error})") from error
        return found

    def check_layers(self) -> dict[str, tuple[int, int]]:
        """(d_out, d_in) of every quantized layer, each of them whole.

        Raises:
            RunError: there is none, or codes, scales and offsets of one do not belong together.
        """
        if not self.layers:
            raise RunError(f"{self.folder}: holds no quantized layer; run anyrank quantize again")
        shapes, layers = self.shapes(), {}
        for layer in self.layers:
            d_out, packed = shapes[f"{layer}.codes"]
            d_in = packed * 8 // self.form.bits
            layers[layer] = d_out, d_in
            for part in ("scales", "offsets"):
                found, needed = shapes.get(f"{layer}.{part}"), self.form.tiles(d_out, d_in)
                if found != needed:
                    raise RunError(
                        f"{self.folder}: {layer}.{part} is {found or 'missing'}, but its codes "
                        f"need {needed}; quantize or fold the model again"
                    )
        return layers

    def weights(self) -> Iterator[tuple[str, Affine]]:
        """Every quantized layer with its weight, one in memory at a time."""
        for layer in self.layers:
            yield layer, self.affine(layer)


def variants(folder: Path) -> list[str]:
    """The names of the tables of offsets beside the default one."""
    stem, suffix = INDEX.removesuffix("json"), ".json"
    found = (path.name.removeprefix(stem) for path in folder.glob(f"{stem}*{suffix}"))
    return sorted(name.removesuffix(suffix) for name in found if name.endswith(suffix))


def _files(folder: Path, variant: str | None) -> dict[str, str]:
    """The file of every tensor."""
    index = folder / with_variant(INDEX, variant)
    if index.is_file():
        found = read_json(index)
        if not isinstance(found, dict) or not isinstance(found.get("weight_map"), dict):
            raise RunError(f"{index}: has no weight_map; quantize or fold the model again")
        return dict(found["weight_map"])
    single = folder / with_variant(WEIGHTS, variant)
    if not single.is_file():
        if variant is not None:
            known = nearest(variant, variants(folder)) if variants(folder) else "it has none"
            raise RunError(f"{folder}: no variant {variant!r}; {known}")
        raise RunError(f"{folder}: neither {INDEX} nor {WEIGHTS} is there")
    try:
        with safe_open(str(single), "pt") as tensors:
            return dict.fromkeys(tensors.keys(), single.name)
    except (OSError, SafetensorError) as error:
        raise RunError(f"{single}: cannot be read ({error})") from error


def copy_companions(source: Path, target: Path, patterns: Sequence[str] = COMPANIONS) -> None:
    """Copy tokenizer, chat template and what else belongs to a model; what is there stays."""
    for pattern in patterns:
        for path in source.glob(pattern):
            if path.is_file() and not (target / path.name).exists():
                shutil.copyfile(path, target / path.name)


def write_readme(folder: Path, form: AffineFormat, names: Sequence[str] = ()) -> None:
    """Write what a stranger to the folder has to know.

    Args:
        folder: where the model lies.
        form: how its weights are stored.
        names: its tables of offsets, if there are several.
    """
    text = f"""# {form}, written by anyrank

```python
import anyrank  # first: without it Transformers leaves the linear layers of this model random
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("FOLDER")
```
"""
    if names:
        listed = ", ".join(f"`{name}`" for name in names)
        text += f"""
One set of codes with several tables of offsets: `from_pretrained("FOLDER", variant="{names[0]}")`
loads one of {listed}; without `variant`, the last.
"""
    write_text(folder / "README.md", text)


def write_index(folder: Path, files: dict[str, str], size: int, variant: str | None = None) -> None:
    """Write the index of a variant.

    Args:
        folder: where the files lie.
        files: the file of every tensor.
        size: bytes of all tensors.
        variant: the name of the table; None: the default.
    """
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(files.items()))}
    text = json.dumps(index, indent=2) + "\n"
    (folder / with_variant(INDEX, variant)).write_text(text, encoding="utf-8")
