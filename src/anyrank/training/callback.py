"""The link to the Transformers Trainer: a rank per optimizer step, without a line of user code.

Every Trainer gets a `RankCallback` (see `anyrank.__init__`); without a nested adapter it is idle.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import nn
from transformers import trainer as hf_trainer
from transformers.trainer_callback import TrainerCallback

from ..errors import ConfigError
from ..schedule import Schedule
from .plan import RankPlan, active_adapters


def check_micro_batches(schedule: Schedule, per_step: int) -> None:
    """Raise unless the micro-batches of a step can be shared evenly by its ranks.

    Raises:
        ConfigError: `per_step` is no multiple of the ranks that the schedule trains per step.
    """
    draws = schedule.draws
    if per_step % draws:
        raise ConfigError(
            f"gradient_accumulation_steps={per_step} must be a multiple of {draws}, the ranks "
            f"that schedule={schedule.kind!r} trains per step; set it to {draws} and divide the "
            f"batch size by {draws}"
        )


class RankCallback(TrainerCallback):
    """Draws the ranks of each step from (seed, step) for every active nested adapter.

    With several ranks per step, micro-batch i of a step trains rank i: the ranks share the batch.
    Where the schedule takes them apart, each micro-batch is an optimizer step of its own.
    """

    def __init__(self) -> None:
        self.plans: list[RankPlan] = []
        self.micro_batch = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Find the nested adapters and guard their rows in the optimizer.

        Raises:
            ConfigError: the micro-batches of a step cannot be shared evenly by its ranks.
        """
        self._close()
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        for name in active_adapters(model):
            if not getattr(model.peft_config[name], "nested", False):
                continue
            plan = RankPlan(
                model, optimizer, total=state.max_steps, seed=args.seed, adapter_name=name
            )
            plan.together = args.fp16 or bool(args.fsdp)  # scaled or sharded: the Trainer must step
            plan.parts = args.gradient_accumulation_steps
            self.plans.append(plan)
            check_micro_batches(plan.schedule, args.gradient_accumulation_steps)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Draw for this optimizer step and set the rank of its first micro-batch."""
        self.micro_batch = 0
        for plan in self.plans:
            plan.begin(state.global_step)
            plan.use(0)

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set the rank of the next micro-batch, after a step at the rank of this one if apart."""
        self.micro_batch += 1
        if any(plan.apart for plan in self.plans):
            self._step(args, kwargs["model"], kwargs["optimizer"])
        for plan in self.plans:
            plan.use(self.micro_batch)

    def _step(self, args: Any, model: Any, optimizer: Any) -> None:
        """An optimizer step inside of the Trainer's own, which would go on to accumulate."""
        trained = [p for p in model.parameters() if p.grad is not None]
        if dist.is_available() and dist.is_initialized():  # the Trainer averages at its own step
            for parameter in trained:
                dist.all_reduce(parameter.grad)
                parameter.grad /= dist.get_world_size()
        if args.max_grad_norm:
            nn.utils.clip_grad_norm_(trained, args.max_grad_norm)
        getattr(optimizer, "optimizer", optimizer).step()  # that of accelerate would wait
        model.zero_grad()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Evaluation and saving between steps see the whole adapter, its rows in order."""
        for plan in self.plans:
            plan.release()
            plan.finish()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let go of the model and the optimizer."""
        self._close()

    def _close(self) -> None:
        for plan in self.plans:
            plan.close()
        self.plans = []


hf_trainer.DEFAULT_CALLBACKS.append(RankCallback)  # type: ignore[arg-type]
