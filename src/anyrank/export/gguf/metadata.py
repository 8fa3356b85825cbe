"""The hyperparameters of a model as GGUF metadata.

llama.cpp reads no sliding window for these architectures: it attends to everything before a token.
Up to the window that is the same, so the context length written is the window where there is one.

    YaRN multiplies cos and sin by (0.1 ln factor + 1) * rope.scaling.attn_factor
    Llama 3 divides frequency i by rope_freqs[i]
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from ...errors import ConfigError
from .architecture import Architecture, head_size

ROPE_FREQS = "rope_freqs.weight"


def check_config(arch: Architecture, config: Any, model: object) -> None:
    """Raise unless llama.cpp computes what this configuration says.

    Raises:
        ConfigError: naming the option.
    """
    if config.hidden_act not in ("silu", "swish"):
        raise ConfigError(
            f"{model}: hidden_act={config.hidden_act!r}, but llama.cpp computes silu in "
            f"{arch.name} models; try --to mlx or --to hqq"
        )
    rope = config.rope_parameters
    kind = rope.get("rope_type", "default")
    known = ["default", "linear", "yarn"] + ["llama3"] * arch.rope_factors
    wrong = kind not in known and f"rope_type={kind!r}"
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        wrong = f"partial_rotary_factor={rope['partial_rotary_factor']}"
    elif kind == "yarn":
        wrong = _yarn_obstacle(rope) or wrong
    if wrong:
        raise ConfigError(
            f"{model}: rope_parameters has {wrong}, which llama.cpp does not compute in "
            f"{arch.name} models (it knows {', '.join(known)}); try --to mlx or --to hqq"
        )


def _yarn_obstacle(rope: dict[str, Any]) -> str | None:
    """The option of YaRN that llama.cpp does not read; it computes with these values of it."""
    for name, fixed in (("truncate", True), ("beta_fast", 32), ("beta_slow", 1)):
        value = rope.get(name)
        if value is not None and value != fixed:
            return f"{name}={value}"
    return None


def add_metadata(writer: Any, config: Any, vocabulary: int) -> None:
    """Add the hyperparameters to a GGUFWriter.

    Args:
        writer: the GGUFWriter.
        config: the configuration of the model.
        vocabulary: rows of the embeddings.
    """
    size = head_size(config)
    writer.add_vocab_size(vocabulary)
    writer.add_context_length(context_length(config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_rope_dimension_count(size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    _add_rope(writer, config)


def context_length(config: Any) -> int:
    """Tokens up to which llama.cpp attends as the model does."""
    layers = getattr(config, "layer_types", None) or ["sliding_attention"]
    window = getattr(config, "sliding_window", None) if "sliding_attention" in layers else None
    return min(config.max_position_embeddings, window or config.max_position_embeddings)


def _add_rope(writer: Any, config: Any) -> None:
    from gguf import RopeScalingType

    rope = config.rope_parameters
    writer.add_rope_freq_base(rope["rope_theta"])
    kind = rope.get("rope_type", "default")
    if kind == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if kind != "yarn":
        return
    original = rope["original_max_position_embeddings"]
    factor = rope.get("factor") or config.max_position_embeddings / original
    writer.add_rope_scaling_type(RopeScalingType.YARN)
    writer.add_rope_scaling_factor(factor)
    writer.add_rope_scaling_orig_ctx_len(original)
    _, wanted = _frequencies(config)
    writer.add_rope_scaling_attn_factors(wanted / (0.1 * math.log(max(factor, 1.0)) + 1.0))


def rope_factors(config: Any) -> np.ndarray | None:
    """What Llama 3 divides each frequency by: [head size / 2] of float32; None: nothing."""
    rope = config.rope_parameters
    if rope.get("rope_type") != "llama3":
        return None
    size = head_size(config)
    plain = rope["rope_theta"] ** -(torch.arange(0, size, 2).float() / size)
    return (plain / _frequencies(config)[0]).numpy()


def _frequencies(config: Any) -> tuple[torch.Tensor, float]:
    """The frequencies that Transformers computes with, and its factor of cos and sin."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    kind = config.rope_parameters["rope_type"]
    return ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
