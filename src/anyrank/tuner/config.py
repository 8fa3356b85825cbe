"""The configuration of an adapter, in PEFT's own form."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft.config import PeftConfig

from ..algebra import DENSE, LOW_RANK, SCALES, Geometry, scale_at
from ..errors import ConfigError, RankError, nearest
from ..files import write_json
from ..methods import Method, method
from ..schedule import Schedule


class _TypeName(str):
    """A name in the place of a member of PEFT's enum, whose `value` Transformers asks for."""

    @property
    def value(self) -> str:
        return str(self)


PEFT_TYPE = _TypeName("ANYRANK")
_SCHEDULE = {
    "schedule": None,
    "ranks": None,
    "rank_unit": 1,
    "ranks_per_step": 1,
    "frozen_rows": False,
}


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class AnyRankConfig(PeftConfig):
    """An adapter `method` of rank `r`; the fields that are None follow the method.

    Raises:
        ConfigError: an unknown method, scale or schedule, or a value that makes no sense.
        RankError: a rank outside of 1..rows.
    """

    method: str = _option("anyrank", "Row of anyrank.METHODS, such as anyrank, lora or qdylora.")
    r: int = _option(64, "The largest rank. Q-BaRA holds 2r rows, as many numbers as LoRA of r.")
    lora_alpha: float = _option(16.0, "Strength of the adapter, dimensionless; see scale.")
    lora_dropout: float = _option(0.0, "Probability with which an input of the adapter is zeroed.")
    scale: str | None = _option(None, "alpha/k, alpha/sqrt(k) or alpha/r, k the rank in use.")
    nested: bool | None = _option(None, "Train every rank, not only the largest.")
    pool: int | None = _option(None, "p: neighbouring inputs that share a mean.")
    repeat: int | None = _option(None, "q: neighbouring outputs that share a value.")
    schedule: str | None = _option(None, "Ranks per step when nested: settle, uniform or sandwich.")
    ranks: list[int] | None = _option(None, "Ranks to draw from; None: all that the adapter holds.")
    rank_unit: int = _option(1, "Rows that are drawn together; ranks are multiples of it.")
    ranks_per_step: int = _option(1, "Ranks per optimizer step, shared by its micro-batches.")
    frozen_rows: bool = _option(False, "DyLoRA's frozen mode: only the last unit is trained.")
    foldable: bool = _option(False, "Refuse a layer whose codes could not take the adapter.")
    target_modules: list[str] | str | None = _option(
        "all-linear", "Layers to adapt: names, a regular expression, or all-linear."
    )
    exclude_modules: list[str] | str | None = _option(None, "Layers to leave out.")
    layers_to_transform: list[int] | int | None = _option(None, "Indices of decoder layers.")
    layers_pattern: list[str] | str | None = _option(None, "Name of the list of decoder layers.")
    modules_to_save: list[str] | None = _option(None, "Modules to train in full and to save.")
    base_fingerprint: str | None = _option(None, "Which quantized base it was trained on; set.")
    fan_in_fan_out: bool = _option(False, "A Conv1D holds W transposed; set when one is adapted.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_TYPE  # type: ignore[assignment]
        preset = self.preset
        if not isinstance(self.r, int) or self.r < 1:
            raise RankError(f"r={self.r} must be a whole number, at least 1")
        if self.nested not in (None, True, False):
            raise ConfigError(f"nested={self.nested!r} must be True, False or None")
        if self.lora_alpha <= 0:
            raise ConfigError(f"lora_alpha={self.lora_alpha} must be positive")
        if not 0 <= self.lora_dropout < 1:
            raise ConfigError(f"lora_dropout={self.lora_dropout} must lie in [0, 1)")
        nests = preset.nested if self.nested is None else self.nested
        self.schedule = self.schedule or (preset.schedule if nests else None)
        usual = "alpha/k" if self.nested else preset.scale
        self.scale = self.scale or ("alpha/r" if self.schedule == "settle" else usual)
        if self.scale not in SCALES:
            raise ConfigError(f"scale={self.scale!r} is unknown; {nearest(self.scale, SCALES)}")
        self.nested = nests
        self.pool = preset.p if self.pool is None else self.pool
        self.repeat = preset.q if self.repeat is None else self.repeat
        if self.nested and preset.core == DENSE:
            raise ConfigError(
                f"method={self.method!r} holds one dense matrix, which has no ranks to nest; "
                "use a low-rank method such as qablora for foldable ranks"
            )
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]
        if isinstance(self.modules_to_save, str):
            self.modules_to_save = [self.modules_to_save]
        self._check_schedule()

    def _check_schedule(self) -> None:
        """Raise on a schedule that does not fit, or that nothing would follow."""
        if not self.nested:
            for name, usual in _SCHEDULE.items():
                if getattr(self, name) != usual:
                    raise ConfigError(
                        f"{name}={getattr(self, name)!r} chooses among nested ranks, but "
                        f"method={self.method!r} trains its largest rank alone; add nested=True, "
                        f"or leave {name} out"
                    )
            return
        if self.ranks is not None and max(self.ranks, default=0) < self.rows:
            raise RankError(
                f"ranks={list(self.ranks)} must hold the largest rank, {self.rows}, or its last "
                f"rows would never be trained; add it, or lower r"
            )
        if self.schedule == "settle" and self.scale != "alpha/r":
            raise ConfigError(
                f"schedule='settle' cuts low ranks from the largest one, which needs one scale for "
                f"all of them: scale='alpha/r', got {self.scale!r}; leave scale out, or use "
                "schedule='uniform'"
            )
        self.rank_schedule()

    @property
    def preset(self) -> Method:
        """The method's row of the table."""
        return method(self.method)

    @property
    def low_rank(self) -> bool:
        """Whether the adapter has ranks at all."""
        return self.preset.core == LOW_RANK

    @property
    def rows(self) -> int:
        """Rows that the adapter holds: the largest rank that `set_rank` takes."""
        return self.r * self.preset.rows_per_rank if self.low_rank else 0

    def scale_of(self, rank: int) -> float:
        """s_k with `rank` rows in use, at the nominal rank k; a dense core counts as rank r."""
        assert self.scale is not None
        k = self.r * rank / self.rows if self.rows else self.r
        return scale_at(self.scale, self.lora_alpha, k, self.r)

    def geometry(self, d_in: int, d_out: int) -> Geometry:
        """The adapter's shape on a layer of d_out x d_in."""
        assert self.pool is not None
        assert self.repeat is not None
        return Geometry(d_in, d_out, self.pool, self.repeat, self.preset.core, self.rows)

    def rank_schedule(self) -> Schedule:
        """The rule that says which ranks a step trains."""
        if not self.nested:
            return Schedule(max(self.rows, 1), kind="full")
        return Schedule(
            self.rows,
            kind=self.schedule or "uniform",
            ranks=None if self.ranks is None else tuple(self.ranks),
            unit=self.rank_unit,
            per_step=self.ranks_per_step,
            frozen=self.frozen_rows,
        )

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write adapter_config.json, and beside it anyrank.json: what the adapter is."""
        super().save_pretrained(save_directory, **kwargs)
        from .. import __version__

        facts = {
            "anyrank": __version__,
            "method": self.method,
            "largest_rank": self.rows or None,
            "nested": self.nested,
            "scale": self.scale,
            "alpha": self.lora_alpha,
            "pool": self.pool,
            "repeat": self.repeat,
        }
        write_json(Path(save_directory) / "anyrank.json", facts)
