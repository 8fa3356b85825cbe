"""GPTQ through a model, decoder layer by decoder layer.

Layer n sees what layers 0..n-1 compute with their quantized weights, so it can make up for their
errors too. The whole float model is in memory, and so are the activations between two layers,
[tokens, hidden] for every calibration row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DataError
from ..kernels import Affine, AffineFormat
from .gptq import gptq
from .minmax import minmax


def gptq_layers(
    model: nn.Module, linears: dict[str, nn.Linear], form: AffineFormat, rows: Sequence[Tensor]
) -> Iterator[tuple[str, Affine, Tensor]]:
    """Quantize the linear layers of a model; their weights are replaced on the way.

    Args:
        model: the float model.
        linears: the layers to quantize, by name.
        form: the format.
        rows: token ids [tokens] of every calibration row.

    Yields:
        (name, quantized weight, float weight before). Linear layers outside of the decoder layers
        come first, by min-max: no layer before them needs making up for.

    Raises:
        DataError: no rows.
    """
    rows = [row.view(1, -1) for row in rows]
    if not rows:
        raise DataError("gptq needs calibration rows, and got none; name a data set to read")
    stack, layers = decoder_layers(model, linears)
    for name in [name for name in linears if not name.startswith(f"{stack}.")]:
        yield _replace(name, linears[name], minmax(linears[name].weight.data, form))
    states, calls = _inputs(model, layers, rows)
    for number, layer in enumerate(layers):
        inside = {n: m for n, m in linears.items() if n.startswith(f"{stack}.{number}.")}
        hessians = _Hessians(inside)
        with hessians:
            _forward(layer, states, calls[number])
        for name, linear in inside.items():
            try:
                affine = gptq(linear.weight.data, form, hessians.of(name))
            except DataError as error:
                raise DataError(f"{name}: {error}") from error
            yield _replace(name, linear, affine)
        states = _forward(layer, states, calls[number])


def decoder_layers(model: nn.Module, linears: dict[str, nn.Linear]) -> tuple[str, nn.ModuleList]:
    """The list of decoder layers: the one with the most of the linear layers in it.

    Raises:
        DataError: no list of layers holds any of them.
    """
    lists = {n: m for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and n}

    def count(name: str) -> int:
        return sum(linear.startswith(f"{name}.") for linear in linears)

    best = max(lists, key=lambda name: (count(name), -len(name)), default="")
    if not best or not count(best):
        raise DataError(
            f"gptq: {type(model).__name__} has no list of decoder layers to go through; "
            "use the quantizer half_quadratic"
        )
    return best, lists[best]


def _replace(name: str, linear: nn.Linear, affine: Affine) -> tuple[str, Affine, Tensor]:
    """Put the quantized weight in the place of the float one."""
    before = linear.weight.data
    linear.weight.data = affine.weight(before.dtype)
    return name, affine, before


class _Stop(Exception):
    """The last decoder layer was reached."""


Call = tuple[tuple[Any, ...], dict[str, Any]]


def _inputs(
    model: nn.Module, layers: nn.ModuleList, rows: Sequence[Tensor]
) -> tuple[list[Tensor], list[list[Call]]]:
    """What the decoder layers are called with: (hidden states of the first, the rest of each).

    Masks and positions differ between layers (sliding windows), but depend on tokens alone, so
    those of one pass through the float model serve throughout.
    """
    states: list[Tensor] = []
    calls: list[list[Call]] = [[] for _ in layers]

    def keep(number: int) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            first, others = _split(args, kwargs)
            if number == 0:
                states.append(first)
            calls[number].append(others)
            if number == len(layers) - 1:
                raise _Stop

        return hook

    hooks = [
        layer.register_forward_pre_hook(keep(number), with_kwargs=True)
        for number, layer in enumerate(layers)
    ]
    try:
        for row in rows:
            _run_to_the_last(model, row)
    finally:
        for hook in hooks:
            hook.remove()
    return states, calls


@torch.no_grad()
def _run_to_the_last(model: nn.Module, row: Tensor) -> None:
    with suppress(_Stop):
        model(input_ids=row.to(next(model.parameters()).device), use_cache=False)


def _split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Call]:
    """The hidden states of a call of a decoder layer, and everything else."""
    if args:
        return args[0], (args[1:], kwargs)
    others = dict(kwargs)
    return others.pop("hidden_states"), ((), others)


@torch.no_grad()
def _forward(layer: nn.Module, states: list[Tensor], calls: list[Call]) -> list[Tensor]:
    out = []
    for state, (args, kwargs) in zip(states, calls, strict=True):
        result = layer(state, *args, **kwargs)
        out.append(result[0] if isinstance(result, tuple) else result)
    return out


class _Hessians:
    """X X^T of the inputs of linear layers, while the context is entered.

    Layers that read the same tensor one after the other (q, k and v; gate and up) share one.
    """

    def __init__(self, linears: dict[str, nn.Linear]) -> None:
        self._linears = linears
        self._sums: dict[str, Tensor] = {}
        self._leader: dict[str, str] = {}
        self._last: tuple[str, Tensor] | None = None

    def of(self, name: str) -> Tensor:
        """The Hessian of a layer; zero where no token reached it."""
        leader = self._leader.get(name)
        d_in = self._linears[name].in_features
        return torch.zeros(d_in, d_in) if leader is None else self._sums[leader]

    def __enter__(self) -> _Hessians:
        self._hooks = [
            linear.register_forward_pre_hook(self._hook(name), with_kwargs=True)
            for name, linear in self._linears.items()
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._last = None

    def _hook(self, name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs["input"]
            if name not in self._leader:
                shared = self._last is not None and self._last[1] is x
                self._leader[name] = self._last[0] if shared and self._last else name
            self._last = (self._leader[name], x)
            if self._leader[name] == name:
                flat = x.flatten(0, -2).float()
                self._sums[name] = self._sums.get(name, 0) + flat.T @ flat

        return hook
