"""anyrank: fine-tune a quantized language model once; ship it at any rank.

Importing this package is cheap: torch, transformers and PEFT are loaded when a name needs them.
Whichever is imported first, PEFT then knows the type ANYRANK, and the Transformers Trainer draws a
rank per step for a model that holds nested adapters.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from ._plugins import when_imported
from .errors import AnyRankError as AnyRankError

if TYPE_CHECKING:
    from .algebra import Geometry as Geometry
    from .export.lora import export_lora as export_lora
    from .methods import METHODS as METHODS
    from .methods import Method as Method
    from .quantize.model import quantize_model as quantize_model
    from .schedule import Draw as Draw
    from .schedule import Schedule as Schedule
    from .sweep.evaluate import evaluate_ranks as evaluate_ranks
    from .sweep.fold_run import fold_run as fold_run
    from .training.callback import RankCallback as RankCallback
    from .training.plan import RankPlan as RankPlan
    from .tuner import AnyRankConfig as AnyRankConfig
    from .tuner.decoder import lean_decoder as lean_decoder

__version__ = "0.1.0"

_HOMES = {
    "Geometry": "algebra",
    "METHODS": "methods",
    "Method": "methods",
    "Draw": "schedule",
    "Schedule": "schedule",
    "AnyRankConfig": "tuner",
    "RankPlan": "training.plan",
    "RankCallback": "training.callback",
    "export_lora": "export.lora",
    "lean_decoder": "tuner.decoder",
    "evaluate_ranks": "sweep.evaluate",
    "fold_run": "sweep.fold_run",
    "quantize_model": "quantize.model",
}
__all__ = ["AnyRankError", "__version__", *_HOMES]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'anyrank' has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


when_imported("peft", "anyrank.tuner")
when_imported("transformers.quantizers.auto", "anyrank.quant.hf")
when_imported("transformers.trainer", "anyrank.training.callback")
