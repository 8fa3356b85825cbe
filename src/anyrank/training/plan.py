"""Which rank each micro-batch trains, and rows that were not trained stay where they are.

Zero gradients do not keep a row still: AdamW's momentum and weight decay move it all the same
(measured: 0.0067, then 0.0052 of a step of 0.01). So the rows outside of a step's draw are copied
before `optimizer.step()` and written back after it, through the hooks that every torch optimizer
has, whatever it computes inside (fused, foreach, paged).

Their moments are kept as well. Were only the weights put back, a gradient would act in the one
step that saw it, with 1 - beta1 = 0.1 of its weight, and not in the steps after it: rows that are
drawn rarely would hardly learn. Moments in 8 bits are the exception: their blocks span rows, so
they see a zero gradient.

Before the lower ranks settle (schedule.py), the rows are put in the order of what they do to the
inputs of a step, and at the end of the run those that no low rank has trained once more. The
product of the factors stays, their moments are dropped: they belong to rows that are no more.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..algebra import svd_order
from ..errors import ConfigError
from ..schedule import Draw, Schedule
from ..tuner import AnyRankConfig, AnyRankLinear, adapter_layers
from .watch import Watch

logger = logging.getLogger("anyrank")
OWN_RATE = "anyrank_own_rate"  # of a group, during a step: its learning rate, and the share of it


class RankPlan:
    """The ranks of one adapter over a training run, for a loop written by hand.

        with RankPlan(model, optimizer, total=steps, seed=0) as plan:
            for step, batch in enumerate(batches):
                for rank in plan.ranks(step):
                    (model(**batch).loss / plan.schedule.draws).backward()
                optimizer.step()  # from here to the next draw the whole rank is in use
                optimizer.zero_grad()

    Rows are put in order when the next step begins or the plan ends, or by `finish`. With a
    Transformers Trainer, `RankCallback` does this.

    Args:
        model: a PEFT model with an anyrank adapter.
        optimizer: the optimizer that holds the adapter's parameters.
        total: optimizer steps of the whole run.
        seed: seed of the draws.
        schedule: the rule; None: the one of the adapter's configuration.
        adapter_name: which adapter; None: the active one.

    Attributes:
        together: micro-batches share their step even where the schedule takes them apart.
        parts: micro-batches of a step. The learning rate is that of the whole batch: where each
            is a step and the schedule names no speed, it is divided by the root of their number.

    Raises:
        ConfigError: the model holds no such adapter, the optimizer is none of torch, or it holds
            none of the adapter's parameters.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        *,
        total: int,
        seed: int,
        schedule: Schedule | None = None,
        adapter_name: str | None = None,
    ) -> None:
        self.name, config = _adapter(model, adapter_name)
        self.layers = [layer for _, layer in adapter_layers(model) if self.name in layer.adapters]
        self.schedule = schedule or config.rank_schedule()
        self.total, self.seed = total, seed
        self._draw = Draw((config.rows,))
        self._trained = self._draw.trained
        self._speed = 1.0
        self.together = False
        self.parts = 1
        self._kept: list[tuple[Tensor, Tensor, float]] = []  # rows, what they held, their speed
        self._watching: list[Watch] = []
        self.optimizer = optimizer = getattr(optimizer, "optimizer", optimizer)  # of accelerate
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise ConfigError(
                f"adapter {self.name!r}: ranks are drawn around the steps of a torch optimizer, "
                f"got {type(optimizer).__name__}; train without DeepSpeed, or a method that is "
                "not nested"
            )
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if not any(id(layer.anyrank_B[self.name]) in held for layer in self.layers):
            raise ConfigError(
                f"adapter {self.name!r}: the optimizer holds none of its parameters; "
                "build the optimizer after get_peft_model"
            )
        self._hooks = [
            optimizer.register_step_pre_hook(lambda *_: self._keep()),
            optimizer.register_step_post_hook(lambda *_: self._put_back()),
        ]

    def __enter__(self) -> RankPlan:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def ranks(self, step: int) -> Iterator[int]:
        """Set the ranks of a step one after another; run a forward and backward at each."""
        self.begin(step)
        for i in range(self.schedule.draws):
            yield self.use(i)

    def begin(self, step: int) -> Draw:
        """Draw for optimizer step `step`, counted from 0; no rank is set yet."""
        self.finish()
        self._draw = self.schedule(step, self.total, self.seed)
        self._trained = range(0)
        if self._draw.order is not None:
            self._watching = [Watch(layer, self.name) for layer in self.layers]
        return self._draw

    def use(self, micro_batch: int) -> int:
        """Set the rank of a micro-batch of this step and return it."""
        rank = self._draw.ranks[micro_batch % len(self._draw.ranks)]
        self._set(rank, self._draw.first)
        stop = max(rank, self._trained.stop)
        shared = bool(self._trained) and not self.apart  # a step has one speed
        self._speed = 1.0 if shared else self._draw.speeds.get(rank, self._usual)
        self._trained = range(self._draw.first, rank if self.apart else stop)
        return rank

    @property
    def _usual(self) -> float:
        """The speed where the schedule names none: an optimizer's own, or that of a part."""
        return self.parts**-0.5 if self.apart else 1.0

    @property
    def apart(self) -> bool:
        """Whether each micro-batch of this step is an optimizer step of its own."""
        return self._draw.apart and not self.together

    def release(self) -> None:
        """Back to the largest rank, all rows trainable: for evaluation and saving."""
        self._set(self.schedule.rows, 0)

    def finish(self) -> None:
        """What is left to do after a step: put rows in order, if it says so."""
        if self._draw.order is not None and self._watching:
            self._order(self._draw.order)

    def close(self) -> None:
        """Finish, release, and take the hooks off the optimizer."""
        self.finish()
        self.release()
        for hook in self._hooks:
            hook.remove()

    def _set(self, rank: int, first: int) -> None:
        for layer in self.layers:
            layer.set_rank(self.name, rank, first)

    @torch.no_grad()
    def _order(self, first: int) -> None:
        """Put the rows of every layer from `first` on in order, and forget their moments."""
        diverged = 0
        for layer, watch in zip(self.layers, self._watching, strict=True):
            a, b = layer.anyrank_A[self.name], layer.anyrank_B[self.name]
            rows, seen = (a[first:], b[:, first:]), watch.stop()[first:, first:]
            if not all(part.isfinite().all() for part in rows):
                diverged += 1
                continue
            for part, ordered in zip(rows, svd_order(*rows, seen), strict=True):
                part.copy_(ordered)
            for parameter in (a, b):
                self.optimizer.state.pop(parameter, None)
        self._watching = []
        if diverged:
            logger.warning(
                "adapter %r: NaN or infinity in %d of its %d layers, whose rows stay as they are; "
                "training diverged: start again at a lower learning rate",
                *(self.name, diverged, len(self.layers)),
            )

    def _keep(self) -> None:
        start, stop = self._trained.start, self._trained.stop
        rate = self._set_rate()
        self._kept = []
        for layer in self.layers:
            for tensor, by_column, is_weight in self._moved(layer):
                matrix = tensor.T if by_column else tensor
                outside = [(matrix[:start], 0.0), (matrix[stop:], 0.0)]
                faster = [(matrix[start:stop], self._speed / rate)] if self._speed != rate else []
                for part, speed in outside + faster * is_weight:
                    if part.numel():
                        self._kept.append((part, part.clone(), speed))

    def _set_rate(self) -> float:
        """The share of its learning rate at which the optimizer takes this step, set in its groups.

        It is that of the rows where all are trained: only some need to be copied and moved on by
        another speed. A plan of another adapter may have set it before.
        """
        groups = self.optimizer.param_groups
        every = len(self._trained) == self.schedule.rows
        rate = self._speed if every else self._usual
        if any(group["lr"] is None for group in groups):  # Adafactor may find its own
            return 1.0
        for group in groups:
            if OWN_RATE not in group:
                group[OWN_RATE], group["lr"] = (group["lr"], rate), group["lr"] * rate
        return groups[0][OWN_RATE][1]

    def _moved(self, layer: AnyRankLinear) -> Iterator[tuple[Tensor, bool, bool]]:
        """What a step changes in A and B; whether its rows are columns; whether it is no moment."""
        for parameter, by_column in (
            (layer.anyrank_A[self.name], False),
            (layer.anyrank_B[self.name], True),
        ):
            if parameter.grad is None:
                continue
            yield parameter.detach(), by_column, True
            for value in self.optimizer.state[parameter].values():
                floating = isinstance(value, Tensor) and value.is_floating_point()
                if floating and value.shape == parameter.shape:
                    yield value, by_column, False

    @torch.no_grad()
    def _put_back(self) -> None:
        """Rows outside of the draw to where they were, the others on by their speed."""
        for part, before, speed in self._kept:
            part.copy_(before.lerp(part, speed) if speed else before)
        self._kept = []
        for group in self.optimizer.param_groups:
            if OWN_RATE in group:
                group["lr"], _ = group.pop(OWN_RATE)
        self.release()


def active_adapters(model: Any) -> list[str]:
    """Names of the adapters in use; none for a model that PEFT has not touched."""
    if not getattr(model, "peft_config", None):
        return []
    active: Any = model.active_adapters
    names: Any = active() if callable(active) else active
    return list(names)  # Transformers' own mixin: a method


def _adapter(model: Any, name: str | None) -> tuple[str, AnyRankConfig]:
    """The named or the active anyrank adapter with its configuration."""
    configs: dict[str, Any] = getattr(model, "peft_config", {})
    if name is None:
        name = next(iter(active_adapters(model)), "default")
    config = configs.get(name)
    if not isinstance(config, AnyRankConfig) or not config.low_rank:
        raise ConfigError(
            f"adapter {name!r} is no low-rank anyrank adapter of this model; "
            f"it has {', '.join(sorted(configs)) or 'none'}; use "
            "get_peft_model(model, AnyRankConfig(...)) first"
        )
    return name, config
