"""One adapted layer: y = W x + s_k R C_k P x, for any base weight and any method."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from ..algebra import LOW_RANK, Geometry, Update, adapter_output, rows
from ..errors import MergeError, RankError
from ..kernels import Branch, adapted_linear
from ..quant import FrozenWeight, frozen_weight
from .config import AnyRankConfig


@dataclass
class Adapter:
    """What a layer knows about one of its adapters.

    Attributes:
        geometry: the adapter's shape on this layer.
        config: its configuration, the same object in every layer.
        rank: the rows in use (0 for a dense core, or where the layer is left out).
        first: the first row that is trained; rows below pass no gradient.
    """

    geometry: Geometry
    config: AnyRankConfig
    rank: int
    first: int = 0

    @property
    def left_out(self) -> bool:
        """Whether no row is in use: the layer then gives what its base gives."""
        return self.geometry.core == LOW_RANK and not self.rank

    @property
    def scale(self) -> float:
        """s_k at the rank in use; 0 without rows."""
        return 0.0 if self.left_out else self.config.scale_of(self.rank)


class AnyRankLinear(nn.Module, BaseTunerLayer):
    """A frozen linear layer with any number of named adapters."""

    adapter_layer_names = ("anyrank_A", "anyrank_B", "anyrank_S")
    other_param_names = ("adapters", "anyrank_dropout")

    def __init__(self, base_layer: nn.Module, layer_name: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.layer_name = layer_name
        self._weight: FrozenWeight | None = None
        weight = self.base_weight
        weight.prepare()
        self.in_features, self.out_features = weight.d_in, weight.d_out
        self.adapters: dict[str, Adapter] = {}
        self.anyrank_A = nn.ParameterDict()
        self.anyrank_B = nn.ParameterDict()
        self.anyrank_S = nn.ParameterDict()
        self.anyrank_dropout = nn.ModuleDict()  # only their p is used; TRL finds and changes it
        self.frozen_peft_weight_names = {}
        self.merged_adapters: list[str] = []
        self._before_merge: list[Tensor | None] = []

    @property
    def base_weight(self) -> FrozenWeight:
        """The frozen weight W behind its storage."""
        layer = self.get_base_layer()
        if self._weight is None or self._weight.layer is not layer:
            self._weight = frozen_weight(layer, self.layer_name)
        return self._weight

    def add_adapter(self, name: str, config: AnyRankConfig) -> None:
        """Attach a fresh adapter, which changes no output: B = 0, or S = 0."""
        geometry = config.geometry(self.in_features, self.out_features)
        geometry.check(self.layer_name)
        self.adapters[name] = Adapter(geometry, config, geometry.rows)
        if geometry.core == LOW_RANK:
            a_shape, b_shape = geometry.shapes
            self.anyrank_A[name] = nn.Parameter(torch.empty(a_shape))
            self.anyrank_B[name] = nn.Parameter(torch.zeros(b_shape))
            nn.init.kaiming_uniform_(self.anyrank_A[name], a=math.sqrt(5))
        else:
            self.anyrank_S[name] = nn.Parameter(torch.zeros(geometry.core_shape))
        if config.lora_dropout:
            self.anyrank_dropout[name] = nn.Dropout(config.lora_dropout)
        if config.preset.frozen_a:
            self.frozen_peft_weight_names[name] = ("anyrank_A",)
        self._move_adapter_to_device_of_base_layer(name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def set_rank(self, name: str, rank: int, first: int = 0) -> None:
        """Use the first `rank` rows; rows below `first` pass no gradient.

        Raises:
            RankError: the adapter has no ranks, or not this one, or it is merged.
        """
        adapter = self.adapters[name]
        limit = adapter.geometry.rows
        if adapter.geometry.core != LOW_RANK:
            raise RankError(
                f"adapter {name!r}: rank {rank} asked for, but its core is one dense matrix "
                "without ranks; train a low-rank method to choose a rank"
            )
        if not isinstance(rank, int) or not 1 <= rank <= limit:
            raise RankError(f"adapter {name!r}: rank {rank} must be a whole number in 1..{limit}")
        if not 0 <= first < rank:
            raise RankError(f"adapter {name!r}: first={first} must lie in 0..{rank - 1}")
        self._use(name, rank, first)

    def leave_out(self, name: str) -> None:
        """Use no row, until `set_rank` is called: the layer then gives what its base gives.

        Raises:
            RankError: the adapter has no ranks, or it is merged.
        """
        if self.adapters[name].geometry.core != LOW_RANK:
            self.set_rank(name, 0)  # says what a dense core lacks
        self._use(name, 0, 0)

    def _use(self, name: str, rank: int, first: int) -> None:
        adapter = self.adapters[name]
        if name in self.merged_adapters and rank != adapter.rank:
            raise RankError(f"adapter {name!r} is merged at rank {adapter.rank}; unmerge it first")
        adapter.rank, adapter.first = rank, first

    def core(self, name: str) -> tuple[Tensor, ...]:
        """The tensors in use: (A[:k], B[:, :k]) or (S,)."""
        adapter = self.adapters[name]
        if adapter.geometry.core == LOW_RANK:
            return rows(self.anyrank_A[name], self.anyrank_B[name], adapter.rank, adapter.first)
        return (self.anyrank_S[name],)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[..., d_in] to [..., d_out]: the base layer plus every active adapter."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or self.merged:
            return self.base_layer(x, *args, **kwargs)
        branches = [
            Branch(self.update(name), self._absorbed(name), self._dropout(name))
            for name in self.active_adapters
            if name in self.adapters and not self.adapters[name].left_out
        ]
        weight = self.base_weight
        if args or kwargs or not weight.computes(x):
            return self._beside(x, branches, *args, **kwargs)
        dtype = weight.product_dtype(x)
        return adapted_linear(x, weight, weight.bias, branches, dtype=dtype, reader=id(self))

    def _beside(self, x: Tensor, branches: list[Branch], *args: Any, **kwargs: Any) -> Tensor:
        """The base layer as it computes itself, and the adapters by the equation."""
        if inside := [branch.update for branch in branches if branch.inside]:
            kwargs["updates"] = inside
        y = self.base_layer(x, *args, **kwargs)
        for update, is_inside, dropout in branches:
            if is_inside and not dropout:
                continue
            dropped = nn.functional.dropout(x, dropout) if dropout else x
            core = [factor.to(x.dtype) for factor in update.core]
            change = dropped - x if is_inside else dropped
            y = y + adapter_output(change, core, *update[1:]).to(y.dtype)
        return y

    def _absorbed(self, name: str) -> bool:
        geometry = self.adapters[name].geometry
        return self.base_weight.absorbs(geometry.p, geometry.q)

    def _dropout(self, name: str) -> float:
        """The probability of dropout in this pass: none in evaluation."""
        if name not in self.anyrank_dropout or not self.training:
            return 0.0
        return float(self.anyrank_dropout[name].p)  # type: ignore[arg-type]

    def update(self, name: str) -> Update:
        """s_k R C_k P at the rank in use."""
        adapter = self.adapters[name]
        return Update(self.core(name), adapter.geometry.p, adapter.geometry.q, adapter.scale)

    def get_delta_weight(self, name: str) -> Tensor:
        """s_k R C_k P as a matrix [d_out, d_in], in the dtype of the adapter."""
        return self.update(name).weight().detach()

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """W += s_k R C_k P at the rank in use.

        Raises:
            MergeError: the base cannot take the update without loss, or (with `safe_merge`) the
                update is not finite.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.adapters:
                continue
            update = self.update(name)
            if obstacle := self.base_weight.fold_obstacle(update.p, update.q):
                raise MergeError(
                    f"{self.layer_name}: {obstacle}; keep the adapter beside the base "
                    "(anyrank export), or load the base unquantized and merge there"
                )
            if safe_merge and not torch.isfinite(update.blocks()).all():
                raise MergeError(f"{self.layer_name}: adapter {name!r} holds NaN or infinity")
            self._before_merge.append(self.base_weight.fold(update))
            self.merged_adapters.append(name)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Undo every merge: bit for bit on quantized weights, up to one rounding on float ones."""
        while self.merged_adapters:
            update = self.update(self.merged_adapters.pop())
            self.base_weight.unfold(update, self._before_merge.pop())

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether PEFT's `convert_to_lora` may read this layer's delta."""
        return True

    def extra_repr(self) -> str:
        """The adapters with their ranks."""
        return ", ".join(
            f"{name}: rank {a.rank}/{a.geometry.rows}" if a.geometry.rows else f"{name}: dense"
            for name, a in self.adapters.items()
        )
