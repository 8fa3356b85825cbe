"""Parts of a decoder that keep less for the backward pass.

    norm     y = w * round(h / sqrt(mean(h^2) + eps))       keeps h, not a float32 copy of it
    gated    y = down_proj(act(gate_proj(x)) * up_proj(x))   keeps gate and up, not act(gate)
    pure     a LayerNorm, or an activation by itself         keeps its input, not its output
    heads    queries, keys and values of a Falcon            no gradients added to zeros
    loss     cross-entropy of the next tokens                keeps the logits in their own dtype
    attention over short rows on a CPU                       keeps q, k and v, and is faster

Whether a module computes one of them is not read from its name but tried: its own forward runs on
random numbers beside ours, and ours takes its place where all bits are equal. So logits stay as
they were to the last bit; the loss is summed in another order. Attention is rounded in another
order too, so it is replaced only on request.
"""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers import PreTrainedModel
from transformers.activations import GELUActivation, GELUTanh, SiLUActivation
from transformers.loss.loss_utils import ForCausalLMLoss

from ..kernels.gated import ACTIVATIONS, gated_product
from ..kernels.loss import causal_lm_loss
from ..kernels.norm import rms_norm
from ..kernels.shared import Recipe, can_be_remade
from .attention import attention_forward, is_attention
from .heads import SPLIT, has_same_split, split_heads

PROJECTIONS: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")
DTYPES = (torch.float32, torch.bfloat16)
WIDTH = 32  # numbers per row that an MLP is tried on
PURE = (nn.LayerNorm, nn.GELU, nn.SiLU, GELUActivation, GELUTanh, SiLUActivation)


class LeanDecoder:
    """What `lean_decoder` replaced; as a context manager it undoes that at the end.

    Attributes:
        norms: how many norms.
        gated: how many gated MLPs.
        pure: how many layer norms and activations, which the next layer can make again.
        heads: how many attention layers that split a fused product.
        losses: how many models whose loss it is.
        attention: how many attention layers.
    """

    def __init__(self) -> None:
        self.norms = 0
        self.gated = 0
        self.pure = 0
        self.heads = 0
        self.losses = 0
        self.attention = 0
        self._models: list[PreTrainedModel] = []
        self._replaced: list[tuple[nn.Module, str, MethodType]] = []

    def _replace(
        self, module: nn.Module, function: Callable[..., Any], name: str = "forward"
    ) -> None:
        method = MethodType(function, module)  # bound, so that a deep copy binds it to the copy
        setattr(module, name, method)
        self._replaced.append((module, name, method))

    def _replace_loss(self, model: PreTrainedModel) -> None:
        model.loss_function = causal_lm_loss
        self._models.append(model)
        self.losses += 1

    def undo(self) -> None:
        """Give every module its own methods back, unless somebody has replaced ours since."""
        for module, name, method in self._replaced:
            if vars(module).get(name) is method:
                delattr(module, name)
        self._replaced.clear()
        for model in self._models:
            if model.loss_function is causal_lm_loss:
                model.loss_function = ForCausalLMLoss
        self._models.clear()

    def __enter__(self) -> LeanDecoder:
        return self

    def __exit__(self, *exc: object) -> None:
        self.undo()


def lean_decoder(model: nn.Module, *, exact: bool = True) -> LeanDecoder:
    """Let the norms and the gated MLPs of a model keep less for the backward pass.

    Outputs stay the same, bit for bit, unless `exact` is false; so do names, parameters and what is
    saved. Modules are tried on the CPU on copies with weights of their own, so the model may lie on
    any device, hold quantized layers, or lie on the meta device; adapters may be attached before or
    afterwards. Left alone are modules that compute something else, and those whose forward has been
    replaced already (by hooks of accelerate, kernels of a hub, or an earlier call).

    A forward of the instance is not carried to the replicas of `nn.DataParallel`: train on several
    devices with a launcher (DistributedDataParallel).

    Args:
        model: any model; only its instances change, never a class.
        exact: false lets attention in bf16 on a CPU over rows of less than 2,048 tokens be computed
            by kernels.attention, in 0.4 to 0.95 of the time and to the same precision, with other
            roundings; elsewhere by torch. A Falcon's keys and values then stay in groups. While
            such a layer runs, torch's function is replaced, in every thread.

    Returns:
        The counts, and the way back.
    """
    lean = LeanDecoder()
    # Tensors with values, on the CPU, whatever mode is on; and the random state stays.
    fork = torch.random.fork_rng(devices=[])
    unused: set[nn.Module] = set()
    with unset_fake_temporarily(), torch.device("cpu"), torch.no_grad(), fork:
        for module in model.modules():
            if isinstance(module, PreTrainedModel) and _has_usual_loss(module):
                lean._replace_loss(module)
            if has_same_split(module):
                lean._replace(module, split_heads, SPLIT)
                lean.heads += 1
            if "forward" in vars(module):
                continue
            if is_attention(module) and not exact:
                lean._replace(module, attention_forward)
                lean.attention += 1
            if not _takes_one_tensor(module):
                continue
            if _is_norm(module):
                lean._replace(module, _norm_forward)
                lean.norms += 1
            elif (act := _activation(module)) is not None:
                lean._replace(module, GATED_FORWARDS[act])
                lean.gated += 1
                unused.add(module.act_fn)  # type: ignore[arg-type] (a module, as it was found)
            elif type(module) in PURE and module not in unused:
                lean._replace(module, _pure_forward)
                lean.pure += 1
    return lean


def _norm_forward(self: Any, hidden_states: Tensor) -> Tensor:
    return rms_norm(hidden_states, self.weight, _epsilon(self))


def _pure_forward(self: Any, x: Tensor) -> Tensor:
    own = partial(type(self).forward, self)
    y = own(x)
    can_be_remade(y, Recipe((x,), own))
    return y


def _gated_forward(act: str) -> Callable[[Any, Tensor], Tensor]:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.down_proj(gated_product(self.gate_proj(x), self.up_proj(x), act))

    return forward


GATED_FORWARDS = {act: _gated_forward(act) for act in ACTIVATIONS}


def _has_usual_loss(model: PreTrainedModel) -> bool:
    usual = getattr(model, "loss_type", None) == "ForCausalLM"
    return usual and model.loss_function is ForCausalLMLoss


def _takes_one_tensor(module: nn.Module) -> bool:
    return len(inspect.signature(type(module).forward).parameters) == 2  # self and x


def _epsilon(module: Any) -> Any:
    return getattr(module, "variance_epsilon", None) or getattr(module, "eps", None)


def _is_norm(module: nn.Module) -> bool:
    """Whether a leaf with one vector of weights computes `rms_norm`."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    if [name for name, _ in tensors] != ["weight"] or tensors[0][1].ndim != 1:
        return False
    if list(module.children()) or not isinstance(_epsilon(module), float):
        return False
    weight = tensors[0][1]
    # Every pair, since a model may be cast later on, or hold its norms in float32 only.
    pairs = {(weight.dtype, weight.dtype), *itertools.product(DTYPES, DTYPES)}
    return all(_same_norm(module, len(weight), *pair) for pair in pairs)


def _same_norm(module: nn.Module, d: int, weight: torch.dtype, dtype: torch.dtype) -> bool:
    w = _random(1, d)[0].to(weight)
    twin = _twin(module, {"weight": nn.Parameter(w, requires_grad=False)}, {})
    return _equal(twin, _norm_forward, dtype, d)


class _Scaled(nn.Module):
    """A stand-in for a linear layer: x times numbers of its own."""

    def __init__(self, factors: Tensor) -> None:
        super().__init__()
        self.factors = nn.Buffer(factors)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factors


def _activation(module: nn.Module) -> str | None:
    """The activation with which a module computes the gated MLP; None: it computes another thing.

    The linear layers have stand-ins while it is tried: theirs may be quantized or hold adapters.
    """
    children = dict(module.named_children())
    act = getattr(module, "act_fn", None)
    if set(children) - {"act_fn"} != set(PROJECTIONS) or not callable(act):
        return None
    if list(module.parameters(recurse=False)) or list(module.buffers(recurse=False)):
        return None
    factors = dict(zip(PROJECTIONS, _random(len(PROJECTIONS), WIDTH), strict=True))
    for name, forward in GATED_FORWARDS.items():
        if all(_same_gated(module, factors, forward, dtype) for dtype in DTYPES):
            return name
    return None


def _same_gated(
    module: nn.Module,
    factors: dict[str, Tensor],
    forward: Callable[[Any, Tensor], Tensor],
    dtype: torch.dtype,
) -> bool:
    stand_ins = {name: _Scaled(values.to(dtype)) for name, values in factors.items()}
    twin = _twin(module, {}, dict(module._modules) | stand_ins)
    return _equal(twin, forward, dtype, WIDTH)


def _twin(
    module: nn.Module, parameters: dict[str, nn.Parameter], children: dict[str, nn.Module | None]
) -> nn.Module:
    """A shallow copy with parameters and children of its own, and every other attribute shared."""
    twin = copy.copy(module)
    vars(twin).update(_parameters=parameters, _modules=children)
    return twin


def _equal(
    twin: nn.Module, forward: Callable[[Any, Tensor], Tensor], dtype: torch.dtype, d: int
) -> bool:
    """Whether a module's own forward and ours give the same bits, in training and in evaluation.

    On rows from 1e-3, where an epsilon counts, to 1e3, where a limit would cut.
    """
    x = (_random(7, d) * 10.0 ** torch.arange(-3, 4)[:, None]).to(dtype)
    for training in (True, False):
        twin.training = training
        try:
            theirs, ours = type(twin).forward(twin, x), forward(twin, x)
        except Exception:  # whatever a foreign forward raises, it is not one of these two
            return False
        if theirs.dtype != ours.dtype or not torch.equal(theirs, ours):
            return False
    return True


def _random(rows: int, d: int) -> Tensor:
    """[rows, d] of normal numbers, the same every time."""
    return torch.randn(rows, d, generator=torch.Generator("cpu").manual_seed(rows))
