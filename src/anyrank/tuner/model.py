"""The tuner that PEFT builds around a model: plan every layer, then attach."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _maybe_include_all_linear_layers
from torch import nn

from ..errors import ConfigError, LayerError, MergeError, RankError, nearest
from ..quant import frozen_weight
from ..quant.affine import AffineLinear, fingerprint
from .config import AnyRankConfig
from .layer import AnyRankLinear

logger = logging.getLogger("anyrank")


def adapter_layers(model: nn.Module) -> Iterator[tuple[str, AnyRankLinear]]:
    """Every adapted layer with its name, in the order of the model."""
    for name, module in model.named_modules():
        if isinstance(module, AnyRankLinear):
            yield name, module


class RankScope:
    """The handle that `set_rank` returns: as a context manager it restores the ranks before."""

    def __init__(self, layers: list[tuple[AnyRankLinear, str]]) -> None:
        self._before = [
            (layer, name, layer.adapters[name].rank, layer.adapters[name].first)
            for layer, name in layers
        ]

    def __enter__(self) -> RankScope:
        return self

    def __exit__(self, *exc: object) -> None:
        for layer, name, rank, first in self._before:
            if name in layer.adapters and name not in layer.merged_adapters:
                _use(layer, name, rank, first)


def _use(layer: AnyRankLinear, adapter: str, rank: int, first: int) -> None:
    """Use the first `rank` rows; none where the layer was, or is to be, left out."""
    if rank == 0 and layer.adapters[adapter].geometry.rows:
        layer.leave_out(adapter)
    else:
        layer.set_rank(adapter, rank, first)


def _rank_of_layer(rank: Mapping[str, int], layers: Sequence[str]) -> Mapping[str, int]:
    """The rank pattern, if it is one for these layers.

    Raises:
        ConfigError: it names another layer.
        RankError: it does not name a layer, or no whole number for it.
    """
    for name, value in rank.items():
        if name not in layers:
            raise ConfigError(f"rank pattern: layer {name!r} is unknown; {nearest(name, layers)}")
        if not isinstance(value, int) or value < 0:
            raise RankError(f"rank pattern: {name}: rank {value} must be a whole number from 0")
    for name in layers:
        if name not in rank:
            raise RankError(f"rank pattern: {name} has no rank; name every layer (0 leaves it out)")
    return rank


def _refuse_tied(peft_config: AnyRankConfig, model: Any) -> None:
    """Raise if a module that is trained in full shares its weight with another one.

    A copy of one end is trained, and the folded model would hold it at both ends.
    """
    tied = getattr(getattr(model, "config", None), "tie_word_embeddings", False)
    ends = [model.get_input_embeddings(), model.get_output_embeddings()] if tied else []
    names = [name for name, module in model.named_modules() if any(module is end for end in ends)]
    for name in names:
        if any(f".{name}".endswith(f".{asked}") for asked in peft_config.modules_to_save or ()):
            raise MergeError(
                f"{name}: not foldable: it is tied to {', '.join(n for n in names if n != name)}; "
                "leave it out of modules_to_save, or leave foldable out"
            )


def _know_base(peft_config: AnyRankConfig, chosen: dict[str, nn.Module]) -> None:
    """Note the quantized base in the configuration; warn if it is another one than noted."""
    bases = {n: m.base_layer if isinstance(m, AnyRankLinear) else m for n, m in chosen.items()}
    found = fingerprint((n, m.affine) for n, m in bases.items() if isinstance(m, AffineLinear))
    if peft_config.base_fingerprint is None:
        peft_config.base_fingerprint = found
    elif found not in (None, peft_config.base_fingerprint):
        logger.warning(
            "the adapter was trained on another quantized base than this one (their codes, scales "
            "or offsets differ); results will differ, and anyrank fold refuses"
        )


class AnyRankModel(BaseTuner):
    """A model whose linear layers hold any-rank adapters; made by `peft.get_peft_model`."""

    prefix = "anyrank_"
    tuner_layer_cls = AnyRankLinear
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 (PEFT's own attribute)

    def set_rank(
        self, rank: int | Mapping[str, int], adapter_name: str | None = None, *, first: int = 0
    ) -> RankScope:
        """Use the first `rank` rows of an adapter, from now on or within a `with` block.

        Args:
            rank: rows to use, 1..rows of the adapter; or a number for every adapted layer, by its
                name in the base model, where 0 leaves the layer out.
            adapter_name: which adapter; None: every active one.
            first: rows below it pass no gradient (DyLoRA's frozen mode).

        Raises:
            ConfigError: there is no adapter, or no layer, of this name.
            RankError: a layer does not hold that rank, or got none; no layer is changed then.
        """
        names = self.active_adapters if adapter_name is None else [adapter_name]
        for name in names:
            if name not in self.peft_config:
                raise ConfigError(f"adapter {name!r} is unknown; {nearest(name, self.peft_config)}")
        layers = {
            key: layer
            for key, layer in adapter_layers(self.model)
            if any(name in layer.adapters for name in names)
        }
        if isinstance(rank, Mapping):
            ranks = _rank_of_layer(rank, list(layers))
            use = _use
        else:
            ranks = dict.fromkeys(layers, rank)
            use = AnyRankLinear.set_rank
        chosen = [
            (key, layer, name)
            for key, layer in layers.items()
            for name in names
            if name in layer.adapters
        ]
        scope = RankScope([(layer, name) for _, layer, name in chosen])
        try:
            for key, layer, name in chosen:
                use(layer, name, ranks[key], first)
        except Exception:
            scope.__exit__()
            raise
        return scope

    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> AbstractContextManager:
        """Called around every forward pass of a PeftModel: refuse batches of mixed adapters.

        Raises:
            LayerError: the call names an adapter per row.
        """
        if kwargs.get("adapter_names") is not None:
            raise LayerError(
                "adapter_names: one adapter per row of a batch is not supported; "
                "export the adapters as LoRA and serve them with PEFT or vLLM"
            )
        return nullcontext()

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Cast as PEFT does, which makes new parameters; what was frozen stays frozen."""
        trained = {name: p.requires_grad for name, p in self.model.named_parameters()}
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(trained[name])

    def _prepare_model(self, peft_config: AnyRankConfig, model: nn.Module) -> None:
        """Check every targeted layer before the first one is replaced."""
        _maybe_include_all_linear_layers(peft_config, model)
        inside = [name + "." for name, m in model.named_modules() if isinstance(m, BaseTunerLayer)]
        chosen = {
            name: module
            for name, module in model.named_modules()
            if name
            and not any(name.startswith(prefix) for prefix in inside)
            and self._check_target_module_exists(peft_config, name)
        }
        for name, module in chosen.items():
            self._plan(peft_config, name, module)
        if peft_config.foldable:
            _refuse_tied(peft_config, model)
        _know_base(peft_config, chosen)

    @staticmethod
    def _plan(peft_config: AnyRankConfig, name: str, module: nn.Module) -> None:
        if isinstance(module, BaseTunerLayer) and not isinstance(module, AnyRankLinear):
            raise LayerError(
                f"{name}: already holds a {type(module).__name__} of PEFT; "
                "merge or unload that adapter first"
            )
        base = module.get_base_layer() if isinstance(module, AnyRankLinear) else module
        weight = frozen_weight(base, name)
        geometry = peft_config.geometry(weight.d_in, weight.d_out)
        geometry.check(name)
        if peft_config.foldable and not weight.absorbs(geometry.p, geometry.q):
            obstacle = weight.fold_obstacle(geometry.p, geometry.q) or "a float weight has no codes"
            raise MergeError(
                f"{name}: not foldable: {obstacle}; train on the output of anyrank quantize with a "
                "geometry that fits its groups, or leave foldable out"
            )
        peft_config.fan_in_fan_out |= weight.transposed

    def _create_and_replace(
        self,
        peft_config: AnyRankConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **_: Any,
    ) -> None:
        if isinstance(target, AnyRankLinear):
            target.add_adapter(adapter_name, peft_config)
            return
        layer = AnyRankLinear(target, current_key)
        layer._active_adapter = adapter_name
        layer.add_adapter(adapter_name, peft_config)
        self._replace_module(parent, target_name, layer, target)
