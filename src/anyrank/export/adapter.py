"""An any-rank adapter as it lies on disk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..algebra import Update, rows
from ..errors import ConfigError, RankError, RunError, nearest
from ..files import read_json

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
Rank = int | Mapping[str, int]
"""One rank for all layers, or one for each, by the layer's name in the base model."""


def layer_name(prefix: str) -> str:
    """The layer in the base model that keys with this prefix belong to."""
    return prefix.removeprefix("base_model.model.").removesuffix(".")


@dataclass(frozen=True)
class SavedAdapter:
    """An any-rank adapter on disk.

    Attributes:
        folder: where adapter_config.json and adapter_model.safetensors lie.
        config: the parsed adapter_config.json.
        tensors: every tensor by its key.
    """

    folder: Path
    config: Any
    tensors: dict[str, Tensor]

    @classmethod
    def read(cls, folder: str | Path) -> SavedAdapter:
        """Read an adapter that `save_pretrained` or `anyrank train` wrote.

        Raises:
            RunError: the folder holds no any-rank adapter, or a broken one.
        """
        folder = Path(folder)
        if not (folder / CONFIG).is_file():
            raise RunError(f"{folder}: holds no adapter ({CONFIG} is missing)")
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        from ..tuner import PEFT_TYPE, AnyRankConfig

        saved = read_json(folder / CONFIG)
        kind = saved.get("peft_type") if isinstance(saved, dict) else type(saved).__name__
        if kind != PEFT_TYPE:
            raise RunError(f"{folder}: holds a {kind} adapter; export needs one made by anyrank")
        try:
            tensors = load_file(folder / WEIGHTS)
        except (OSError, SafetensorError) as error:
            raise RunError(f"{folder / WEIGHTS}: cannot be read ({error})") from error
        adapter = cls(folder, AnyRankConfig.from_pretrained(str(folder)), tensors)
        adapter._check_tensors()
        return adapter

    def _check_tensors(self) -> None:
        """Raise unless the weights are those that the configuration speaks of."""
        path, config = self.folder / WEIGHTS, self.config
        if not any(".anyrank_" in key for key in self.tensors):
            raise RunError(f"{path}: holds no adapter weights; save or train the adapter again")
        for key in self.tensors:
            other = key.replace("anyrank_A", "anyrank_B")
            if other not in self.tensors:
                raise RunError(f"{path}: {other} is missing; save or train the adapter again")
        for prefix, a, b in self.layers():
            if a.shape[0] != config.rows or b.shape[1] != config.rows:
                raise RunError(
                    f"{path}: {prefix}anyrank_A holds {a.shape[0]} rows and its B {b.shape[1]}, "
                    f"but {CONFIG} speaks of {config.rows}; the two files do not belong together"
                )

    def layers(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """(prefix of the key, A, B) of every layer with a low-rank core."""
        for key in sorted(self.tensors):
            if key.endswith(".anyrank_A"):
                prefix = key.removesuffix("anyrank_A")
                yield prefix, self.tensors[key], self.tensors[prefix + "anyrank_B"]

    def updates(self, rank: int | None) -> Iterator[tuple[str, Update]]:
        """What every adapted layer adds to its weight at `rank` (None for a dense core).

        Yields:
            The name of the layer in the base model, and s_k R C_k P.
        """
        config = self.config
        for key in sorted(self.tensors):
            prefix, _, part = key.rpartition(".")
            layer = layer_name(prefix)
            if part == "anyrank_A" and rank is not None:
                core = rows(self.tensors[key], self.tensors[f"{prefix}.anyrank_B"], rank)
                yield layer, Update(core, config.pool, config.repeat, config.scale_of(rank))
            elif part == "anyrank_S":
                core = (self.tensors[key],)
                yield layer, Update(core, config.pool, config.repeat, config.scale_of(0))

    @property
    def full_tensors(self) -> dict[str, Tensor]:
        """The modules that were trained in full (modules_to_save), by their name in the base."""
        return {
            key.removeprefix("base_model.model."): tensor
            for key, tensor in self.tensors.items()
            if ".anyrank_" not in key
        }

    def layer_ranks(self, rank: Rank) -> dict[str, int]:
        """The rank of every layer, in the order of `layers`.

        Raises:
            ConfigError: the core is one dense matrix, or there is no layer of a given name.
            RankError: a rank is out of range, a layer has none, or all are left out.
        """
        names = [layer_name(prefix) for prefix, _, _ in self.layers()]
        if isinstance(rank, int):
            self.check_rank(rank)
            return dict.fromkeys(names, rank)
        if not self.config.low_rank:
            self.check_rank(0)  # says what a dense core lacks
        for name, k in rank.items():
            if name not in names:
                raise ConfigError(
                    f"{self.folder}: rank pattern: layer {name!r} is unknown; "
                    f"{nearest(name, names)}"
                )
            if not isinstance(k, int) or k:
                self.check_rank(k, name)
        for name in names:
            if name not in rank:
                raise RankError(
                    f"{self.folder}: rank pattern: {name} has no rank; name every layer (0 leaves "
                    "it out)"
                )
        if not any(rank.values()):
            raise RankError(
                f"{self.folder}: rank pattern: every layer is left out; give one a rank above 0"
            )
        return {name: rank[name] for name in names}

    def check_rank(self, rank: Any, layer: str | None = None) -> None:
        """Raise unless the adapter has this rank; `layer` is whose rank it is, for the message.

        Raises:
            ConfigError: the core is one dense matrix.
            RankError: the rank is out of range.
        """
        if not self.config.low_rank:
            raise ConfigError(
                f"{self.folder}: {self.config.method} holds dense blocks, which are no LoRA of any "
                "rank; keep the adapter beside its base, or train a low-rank method"
            )
        if not isinstance(rank, int) or not 1 <= rank <= self.config.rows:
            of = f"rank pattern: {layer}: " if layer else ""
            least = 0 if layer else 1
            raise RankError(
                f"{self.folder}: {of}rank {rank} must lie in {least}..{self.config.rows}"
            )
