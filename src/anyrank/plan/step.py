"""One training step on fake tensors, phase by phase: what a run holds, and when.

Trainer, adapter, loss, autocast, checkpointing and optimizer are those of `anyrank train`. The
optimizer's state is made before the step that is measured. That one has two micro-batches where
gradients are accumulated, since the second one finds gradients in memory.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import masking_utils

from ..quant.affine import AffineLinear
from ..training.arguments import TrainArguments
from ..training.head import small_tiles
from ..training.plan import RankPlan, active_adapters
from ..tuner import AnyRankConfig
from .fake import Answers, give_storage
from .gpu import gpu_paths
from .skeleton import quiet
from .tracker import HOST, OTHER, Tracker
from .trainer import make_trainer

CODES, SCALES, FLOAT = "base codes", "base scales", "base float"
ADAPTER, GRADIENTS, OPTIMIZER = "adapter", "gradients", "optimizer"
FORWARD, LOSS, BACKWARD, UPDATE = "forward", "loss", "backward", "optimizer step"
PAGED_FROM = 100_000  # numbers from which bitsandbytes keeps a paged state on the host
DRAWS = 256  # steps among which the smallest draw is looked for


@dataclass
class Measured:
    """What one step takes.

    Attributes:
        peaks: per phase, bytes by kind at its peak.
        kept: bytes that the forward pass leaves for the backward pass.
        host: bytes of the optimizer's state that lie in the memory of the host.
    """

    peaks: dict[str, Counter[str]] = field(default_factory=dict)
    kept: int = 0
    host: int = 0


class FakeRun:
    """A run whose tensors have no memory.

    Args:
        model: the base on the meta device, see `skeleton.build`; it is changed.
        layers: its decoder layers with the number of their kind; none: phases are coarser.
        dtype: the dtype of the base.
        args: the options of the trainer.
        config: the adapter.
        on_gpu: whether to follow a GPU's paths where they differ from those of a CPU.
        flash: whether attention needs no mask of its own.
    """

    def __init__(
        self,
        model: Any,
        layers: Sequence[tuple[nn.Module, int]],
        dtype: torch.dtype,
        args: TrainArguments,
        config: AnyRankConfig,
        *,
        on_gpu: bool,
        flash: bool,
    ) -> None:
        self.args, self.on_gpu, self.flash = args, on_gpu, flash
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.tracker, self.answers = Tracker(), Answers()
        with self._on(torch.device("meta")):
            self.trainer = make_trainer(model, args, config)
        with self._on(self.fake):
            give_storage(self.trainer.model, dtype)  # type: ignore[arg-type]
            self._prepare()
            self._mark_static()
            self._make_state()
        _watch(self.tracker, layers)

    def measure(self, batch: int, length: int) -> Measured:
        """One optimizer step on micro-batches of `batch` rows of up to `length` tokens.

        Rows of one batch are taken to differ in length, so that attention gets a mask.
        """
        real = self._batch(batch, length)
        self.answers.flag = self.flash or (batch == 1 and not self.trainer.padding_free)
        tracker, found = self.tracker, Measured()
        with self._on(self.fake, tracker):
            tracker.forget_peaks()
            for _ in range(min(self.args.gradient_accumulation_steps, 2)):
                before = tracker.live[OTHER]
                tracker.begin(FORWARD)
                loss = self._loss(real)
                found.kept = tracker.live[OTHER] - before
                if tracker.phase == FORWARD:  # a model whose layers were not found
                    tracker.begin(BACKWARD)
                loss.backward()
                del loss
            tracker.begin(UPDATE)
            self._update()
        found.peaks, found.host = tracker.peaks, tracker.live[HOST]
        return found

    @contextmanager
    def _on(self, *modes: Any) -> Iterator[None]:
        """Everything that a fake step needs around it; `Answers` sees operators first."""
        with ExitStack() as stack:
            stack.enter_context(quiet())
            stack.enter_context(_own_tables())
            stack.enter_context(mock.patch.object(masking_utils, "is_tracing", _no))
            stack.enter_context(gpu_paths() if self.on_gpu else small_tiles("cpu"))
            for mode in (*modes, self.answers):
                stack.enter_context(mode)
            yield

    def _prepare(self) -> None:
        """What `Trainer.train` does before its first step."""
        trainer, args = self.trainer, self.args
        model: Any = trainer.model
        if args.gradient_checkpointing:
            model.gradient_checkpointing_enable(args.gradient_checkpointing_kwargs)
        self.optimizer: Any = trainer.create_optimizer()
        for group in self.optimizer.param_groups:
            if self.on_gpu and not group.get("fused") and group.get("foreach", 1) is None:
                group["foreach"] = True  # torch's default on a GPU
        self.model: Any = trainer.accelerator.prepare_model(model, device_placement=False)
        self.model.train()
        trainer.current_gradient_accumulation_steps = args.gradient_accumulation_steps
        self.trained = [p for p in model.parameters() if p.requires_grad]
        for parameter in self.trained:
            parameter.register_post_accumulate_grad_hook(
                lambda p: self.tracker.mark((p.grad,), GRADIENTS)  # type: ignore[arg-type]
            )
        self.plans = [
            RankPlan(model, self.optimizer, total=DRAWS, seed=args.seed, adapter_name=name)
            for name in active_adapters(model)
            if model.peft_config[name].nested
        ]

    def _mark_static(self) -> None:
        mark, modules = self.tracker.mark, list(self.model.modules())
        for module in modules:
            mark((*module._parameters.values(), *module._buffers.values()), FLOAT)
        for module in modules:
            codes, scales = _quantized_parts(module)
            mark(codes, CODES)
            mark(scales, SCALES)
        mark(self.trained, ADAPTER)

    def _make_state(self) -> None:
        """What the optimizer holds after its first step."""
        for parameter in self.trained:
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()
        for parameter, state in self.optimizer.state.items():
            tensors = [value for value in state.values() if isinstance(value, Tensor)]
            self.tracker.mark(tensors, OPTIMIZER)
            if self.on_gpu and getattr(self.optimizer, "is_paged", False):
                big = parameter.numel() >= PAGED_FROM
                paged = [t for t in tensors if big and t.shape == parameter.shape]
                self.tracker.mark(paged, HOST)
        self.model.zero_grad()

    def _batch(self, batch: int, length: int) -> dict[str, Any]:
        """Real rows as the trainer's collator puts them together."""
        row: dict[str, Any] = {"input_ids": [0] * length, "labels": [0] * length}
        if self.trainer.padding_free:
            row["seq_lengths"] = [length]
        return self.trainer.data_collator([row] * batch)  # type: ignore[return-value]

    def _loss(self, real: dict[str, Any]) -> Tensor:
        inputs = {k: self._faked(v) if isinstance(v, Tensor) else v for k, v in real.items()}
        items = torch.tensor(real["labels"].numel())
        return self.trainer.compute_loss(self.model, inputs, num_items_in_batch=items)  # type: ignore[return-value]

    def _faked(self, tensor: Tensor) -> Tensor:
        made = self.fake.from_tensor(tensor)
        self.tracker.mark((made,), OTHER)
        return made

    def _update(self) -> None:
        """Clip, step at the draw that leaves most rows to be put back, and free the gradients."""
        if self.args.max_grad_norm:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.args.max_grad_norm)
        for plan in self.plans:
            draw = plan.begin(_smallest_draw(plan))
            each = range(len(draw.ranks))
            for i in [draw.ranks.index(min(draw.ranks))] if plan.apart else each:
                plan.use(i)
        self.optimizer.step()
        self.model.zero_grad()


def _no(*_: Any) -> bool:
    return False


def _smallest_draw(plan: RankPlan) -> int:
    """The step of a run that trains the fewest rows while the others have moments."""

    def size(step: int) -> tuple[bool, int]:
        draw = plan.schedule(step, DRAWS, plan.seed)
        return draw.order is not None, min(draw.ranks) if draw.apart else len(draw.trained)

    return min(range(DRAWS), key=size)


@contextmanager
def _own_tables() -> Iterator[None]:
    """bitsandbytes keeps its code tables for good; fake ones must not stay."""
    functional = sys.modules.get("bitsandbytes.functional")
    if functional is None:
        yield
        return
    with mock.patch.dict(functional.name2qmap, clear=True):
        yield


def _quantized_parts(module: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """The codes of a quantized layer, and what turns them into weights."""
    if isinstance(module, AffineLinear):
        return [module.codes], [module.scales, module.offsets]
    weight = module._parameters.get("weight")
    state: Any = getattr(weight, "quant_state", None)
    if weight is None or state is None:
        return [], []
    parts = [state.absmax, state.code, state.offset]
    if state.state2 is not None:
        parts += [state.state2.absmax, state.state2.code]
    return [weight], [part for part in parts if part is not None]


def _watch(tracker: Tracker, layers: Sequence[tuple[nn.Module, int]]) -> None:
    """Begin a phase where the forward pass leaves the layers, and where backward reaches one.

    In a phase the peak grows linearly with the number of layers of any kind, if the first and the
    last layer of each kind have phases of their own: between them the bytes change linearly.
    """
    kinds = [kind for _, kind in layers]
    for i, (layer, kind) in enumerate(layers):
        others = [j for j, other in enumerate(kinds) if other == kind]
        place = "last" if i == others[-1] else "first" if i == others[0] else "inner"
        phase = f"{BACKWARD}: kind {kind}, {place}"
        layer.register_forward_hook(partial(_after, tracker, phase, i == len(kinds) - 1))


def _after(
    tracker: Tracker, phase: str, last: bool, module: nn.Module, inputs: Any, output: Any
) -> None:
    if tracker.phase != FORWARD:  # computed again by checkpointing
        return
    hidden = output[0] if isinstance(output, tuple) else output
    if hidden.requires_grad:
        hidden.register_hook(lambda _: tracker.begin(phase))
    if last:
        tracker.begin(LOSS)
