"""Will it fit: the memory of a run, predicted from the model's configuration alone.

Decoder layers of one kind take the same bytes, so a step on a few of them stands for all. With b_0
the bytes of a model that has two layers of each kind, and b_k of one with a layer of kind k more,

    bytes = b_0 + sum over kinds of (n_k - m_k) (b_k - b_0)     n_k layers of kind k, m_k in b_0

in every phase of the step (see `step`); the peak is the phase that takes most.
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
)

from ..errors import ConfigError
from ..training.arguments import AdapterArguments, ModelArguments, TrainArguments
from ..training.base import wants_4bit
from ..tuner.decoder import lean_decoder
from . import skeleton
from .step import FakeRun, Measured
from .tracker import OTHER

CUDA_CONTEXT = 600 * 2**20  # assumed: what CUDA, cuBLAS and torch hold before the first tensor
PROCESS = 500 * 2**20  # assumed: Python with torch and transformers, in the memory of a CPU
MOST_KINDS = 4  # of layers; a model with more is run whole
KEPT, BRIEF = "kept", "brief"
_UNMODELLED = {
    "activation_offloading": "activations move to the host in ways that are not followed",
    "deepspeed": "a plan is for one process that holds the whole model",
    "fsdp": "a plan is for one process that holds the whole model",
    "torch_compile": "a compiler decides anew what is kept",
    "use_liger_kernel": "its kernels are not followed",
}


@dataclass
class Estimate:
    """Bytes at the peak of a step.

    Attributes:
        phase: where in the step the peak lies, as `step` names it.
        parts: bytes by kind; `KEPT` for the backward pass, `BRIEF` for what comes on top.
        overhead: assumed bytes of the process beside its tensors.
        host: bytes of a paged optimizer in the memory of the host.
    """

    phase: str
    parts: Counter[str]
    overhead: int
    host: int

    @property
    def total(self) -> int:
        """All of it, but what lies on the host."""
        return self.parts.total() + self.overhead


class Planner:
    """Predicts the memory of a run at any batch and length.

    Args:
        model: the options of `anyrank train` about the base.
        adapter: those about the adapter.
        args: those of the trainer.
        on_gpu: plan for a GPU, not for the CPU.

    Raises:
        ConfigError: an option or a model that a plan does not follow.
        AnyRankError: whatever `anyrank train` would refuse about model and adapter.
    """

    def __init__(
        self,
        model: ModelArguments,
        adapter: AdapterArguments,
        args: TrainArguments,
        *,
        on_gpu: bool,
    ) -> None:
        _check(args)
        self.model, self.adapter, self.args, self.on_gpu = model, adapter, args, on_gpu
        trust: dict[str, bool] = {"trust_remote_code": args.trust_remote_code}
        self.config = skeleton.load_config(model, **trust)
        self.in_4bit = wants_4bit(model, adapter.method)
        self.quantized = self.in_4bit or bool(getattr(self.config, "quantization_config", None))
        self.flash = model.attn_implementation not in (None, "sdpa", "eager")
        found = skeleton.decoder_layers(self._build())
        layers = found[1] if found else []
        self.kinds = skeleton.layer_kinds(layers)  # of each decoder layer
        self.stays_float = skeleton.float_share(layers) if self.in_4bit else 0.0
        self._known: dict[tuple[int, int], Estimate] = {}

    def with_options(self, **changes: Any) -> Planner:
        """The same run with other options."""
        parts = [copy.copy(part) for part in (self.model, self.adapter, self.args)]
        for name, value in changes.items():
            setattr(next(part for part in parts if hasattr(part, name)), name, value)
        return Planner(*parts, on_gpu=self.on_gpu)  # type: ignore[arg-type]

    def estimate(self, batch: int, length: int) -> Estimate:
        """The peak of a step on micro-batches of `batch` rows of `length` tokens."""
        if (batch, length) not in self._known:
            try:
                self._known[batch, length] = self._estimate(batch, length)
            except (DataDependentOutputException, DynamicOutputShapeException) as error:
                raise ConfigError(
                    f"model_name_or_path={self.model.model_name_or_path}: what a step computes "
                    f"depends on the values of tensors ({error.func}), so it cannot be planned"
                ) from error
        return self._known[batch, length]

    def measure(self, batch: int, length: int) -> Measured:
        """Every phase of such a step, of the whole model."""
        first, *others = [run.measure(batch, length) for run in self._runs]
        found = copy.deepcopy(first)
        for measured, factor in zip(others, self._factors, strict=True):
            _extrapolate(found, first, measured, factor)
        return found

    def _estimate(self, batch: int, length: int) -> Estimate:
        found = self.measure(batch, length)
        phase = max(found.peaks, key=lambda name: found.peaks[name].total())
        parts = found.peaks[phase]
        other = parts.pop(OTHER, 0)
        parts[KEPT] = min(found.kept, other)
        parts[BRIEF] = other - parts[KEPT]
        overhead = CUDA_CONTEXT if self.on_gpu else PROCESS
        return Estimate(phase, parts, overhead, found.host)

    @property
    def longest(self) -> int:
        """Tokens that the model has positions for."""
        limit = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        return limit or 2**20

    def _build(self) -> Any:
        attention = self.model.attn_implementation
        with skeleton.quiet():
            return skeleton.build(
                copy.deepcopy(self.config),
                self.model,
                in_4bit=self.in_4bit,
                attention="sdpa" if self.flash else attention,
                trust_remote_code=self.args.trust_remote_code,
            )

    @cached_property
    def samples(self) -> list[list[int]]:
        """Layers to run: first two of each kind, then with one layer more of each kind."""
        places = {k: [i for i, kind in enumerate(self.kinds) if kind == k] for k in self.kinds}
        every = list(range(len(self.kinds)))
        if len(places) > MOST_KINDS or self._needs_every_layer():
            return [every]
        ends = sorted({i for found in places.values() for i in (found[0], found[-1])})
        more = [found[1] for found in places.values() if len(found) > 2]
        return [ends, *(sorted([*ends, i]) for i in more)]

    def _needs_every_layer(self) -> bool:
        """Whether options treat layers by their number, or hide where one ends."""
        named = [self.adapter.lora_target_modules, self.adapter.lora_exclude_modules]
        patterns = [pattern for names in named for pattern in names or ()]
        reentrant = bool((self.args.gradient_checkpointing_kwargs or {}).get("use_reentrant"))  # type: ignore[union-attr]
        return reentrant or any(re.search(r"(?<![A-Za-z_])\d", pattern) for pattern in patterns)

    @cached_property
    def _factors(self) -> list[int]:
        """How often the bytes of each further layer count."""
        ends, *more = self.samples
        factors = []
        for sample in more:
            (added,) = set(sample) - set(ends)
            kind = self.kinds[added]
            factors.append(self.kinds.count(kind) - sum(self.kinds[i] == kind for i in ends))
        return factors

    @cached_property
    def _runs(self) -> list[FakeRun]:
        return [self._run(sample) for sample in self.samples]

    def _run(self, sample: Sequence[int]) -> FakeRun:
        model, layers = self._build(), []
        if sample:
            skeleton.keep_layers(model, sample)
            found = skeleton.decoder_layers(model)
            assert found is not None
            layers = list(zip(found[1], (self.kinds[i] for i in sample), strict=True))
        if self.model.lean:
            lean_decoder(model, exact=self.on_gpu)
        dtype = skeleton.base_dtype(self.config, self.model.dtype)
        return FakeRun(
            model,
            layers,
            dtype,
            self.args,
            self.adapter.config(),
            on_gpu=self.on_gpu,
            flash=self.flash,
        )


def _extrapolate(found: Measured, first: Measured, more: Measured, factor: int) -> None:
    """found += factor (more - first), in every phase that both have."""
    for phase, parts in found.peaks.items():
        for kind in {*first.peaks[phase], *more.peaks[phase]}:
            parts[kind] += factor * (more.peaks[phase][kind] - first.peaks[phase][kind])
    found.kept += factor * (more.kept - first.kept)
    found.host += factor * (more.host - first.host)


def _check(args: TrainArguments) -> None:
    for name, reason in _UNMODELLED.items():
        if getattr(args, name, None):
            raise ConfigError(f"{name}={getattr(args, name)!r} cannot be planned: {reason}")
    for name in args.gradient_checkpointing_kwargs or {}:
        if name != "use_reentrant":
            raise ConfigError(f"gradient_checkpointing_kwargs: {name!r} cannot be planned")
    if args.max_length is None:
        raise ConfigError("max_length is missing; give the tokens of the longest row")
