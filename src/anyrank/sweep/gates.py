"""What other ranks would do to the loss, layer by layer, from one backward pass per row of data.

Multiply row i of layer l by a gate z_i: s R (B diag(z)) A P. At rank k the gates are
z_i(k) = s_k / s_r for i < k and 0 above, so a change of rank is a change of gates, also where the
scale depends on the rank. With g_n = d loss_n / dz of data row n, which is <dL/dB_i, B_i> and needs
no code in the forward pass,

    V(k) = sum_n [ g_n . (z(k) - z) + 1/2 (g_n . (z(k) - z))^2 ] / tokens        where k is smaller
    V(k) = sum_n   g_n . (z(k) - z)                              / tokens        where k is larger

The square is the empirical Fisher estimate of the curvature. It is what is left of the gain of a
row near an optimum, where the mean of g is 0; rows that are not in use are far from one, their
gradient is systematic, and its square says nothing of a curvature (docs/log.md, 2026-11-27).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..tuner import AnyRankLinear, adapter_layers
from .evaluate import IGNORED, Rows, batches, completion_tokens


def gated_layers(model: Any) -> dict[str, AnyRankLinear]:
    """The layers of the active adapter of a PEFT model, by their name in the base model."""
    name = model.active_adapter
    found = adapter_layers(model.get_base_model())
    return {key: layer for key, layer in found if name in layer.adapters}


def gates(config: Any, rank: int) -> Tensor:
    """z(k) of [rows], relative to the scale of the whole adapter."""
    z = torch.zeros(config.rows, dtype=torch.float64)
    if rank:
        z[:rank] = config.scale_of(rank) / config.scale_of(config.rows)
    return z


def estimate(
    model: Any, rows: Rows, ranks: Mapping[str, int], choices: Mapping[str, Sequence[int]]
) -> dict[str, dict[int, float]]:
    """What a change of one layer's rank would do to the loss, estimated.

    Args:
        model: a PEFT model with an any-rank adapter, in evaluation mode.
        rows: token ids and labels.
        ranks: the rank of every layer now.
        choices: the ranks to estimate for every layer.

    Returns:
        V by layer and rank, in nats per token: 0 at the rank of now, negative where it falls.
    """
    config, tokens = model.peft_config[model.active_adapter], sum(completion_tokens(rows))
    gradients = gate_gradients(model, rows, ranks)
    found: dict[str, dict[int, float]] = {}
    for layer, now in ranks.items():
        found[layer] = {}
        for k in choices[layer]:
            change = gradients[layer] @ (gates(config, k) - gates(config, now))
            value = change.sum() + (change.square().sum() / 2 if k < now else 0)
            nats = value.item() / tokens
            found[layer][k] = nats if math.isfinite(nats) else math.inf
    return found


def gate_gradients(model: Any, rows: Rows, ranks: Mapping[str, int]) -> dict[str, Tensor]:
    """d loss_n / dz of every row of data n, in nats: [data rows, adapter rows] per layer."""
    name = model.active_adapter
    found: dict[str, list[Tensor]] = {layer: [] for layer in ranks}
    with _gated(model, ranks) as whole, torch.enable_grad():
        factors = {key: layer.anyrank_B[name] for key, layer in gated_layers(model).items()}
        for row in rows:
            batch = next(batches([row], 1, model.device))
            labels = batch.pop("labels")[:, 1:]
            kept = labels != IGNORED
            logits = model(**batch, use_cache=False).logits[:, :-1][kept].float()
            loss = torch.nn.functional.cross_entropy(logits, labels[kept], reduction="sum")
            got = torch.autograd.grad(loss, list(factors.values()))
            for (key, b), gradient in zip(whole.items(), got, strict=True):
                found[key].append((gradient.double() * b.double()).sum(0).cpu())
    return {key: torch.stack(values) for key, values in found.items()}


@contextmanager
def _gated(model: Any, ranks: Mapping[str, int]) -> Iterator[dict[str, Tensor]]:
    """All rows in use with gates in B that stand for `ranks`; yields the whole B of each layer."""
    name, layers = model.active_adapter, gated_layers(model)
    config = model.peft_config[name]
    before = {key: layer.anyrank_B[name] for key, layer in layers.items()}
    whole = {key: b.data for key, b in before.items()}
    required = {key: b.requires_grad for key, b in before.items()}
    with model.set_rank(config.rows, name):
        try:
            for key, b in before.items():
                b.data = whole[key] * gates(config, ranks[key]).to(whole[key])
                b.requires_grad_(True)
            yield whole
        finally:
            for key, b in before.items():
                b.data = whole[key]
                b.requires_grad_(required[key])
