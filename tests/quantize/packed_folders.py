"""GPTQ and AWQ checkpoints, packed as their layouts are published, without anyrank's own code."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tiny import llama

from anyrank.quant.hf import quantized_linears

GROUP = 32


def words(numbers: torch.Tensor, bits: int) -> torch.Tensor:
    """Every row of [n, count] as one stream of bits, little end first, in int32 words."""
    stream = ((numbers[..., None] >> torch.arange(bits)) & 1).flatten(1)
    return (stream.unflatten(1, (-1, 32)) << torch.arange(32)).sum(2).to(torch.int32)


def gptq_layer(codes, zeros, scales, bits: int, stored_minus: int) -> dict[str, torch.Tensor]:
    """codes [d_out, d_in], zeros and scales [d_out, groups], as AutoGPTQ lays them out."""
    stored = ((zeros - stored_minus) % 2**bits).T
    return {
        "qweight": words(codes, bits).T.contiguous(),
        "qzeros": words(stored, bits),
        "scales": scales.T.contiguous(),
        "g_idx": (torch.arange(codes.shape[1]) // (codes.shape[1] // zeros.shape[1])).int(),
    }


def awq_layer(codes, zeros, scales) -> dict[str, torch.Tensor]:
    """The GEMM version of AutoAWQ: eight outputs per word, the even ones first."""

    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
    return {
        "qweight": words(codes.T.unflatten(1, (-1, 8))[..., order].flatten(1), 4),
        "qzeros": words(zeros.T.unflatten(1, (-1, 8))[..., order].flatten(1), 4),
        "scales": scales.T.contiguous(),
    }


def checkpoint(
    folder: Path, kind: str, bits: int = 4, symmetric: bool = False, group: int = GROUP, **fields
):
    """A quantized Llama and the exact weights of its layers."""
    generator = torch.Generator().manual_seed(11)
    model = llama(torch.float16)
    tensors = dict(model.state_dict())
    weights = {}
    v2 = fields.get("checkpoint_format") == "gptq_v2"
    for name, linear in quantized_linears(model, ["lm_head"]):
        d_out, d_in = linear.weight.shape
        groups = 1 if group == -1 else d_in // group
        codes = torch.randint(0, 2**bits, (d_out, d_in), generator=generator)
        zeros = torch.randint(0, 2**bits, (d_out, groups), generator=generator)
        if symmetric:
            zeros = torch.full_like(zeros, 2 ** (bits - 1))
        scales = (torch.rand(d_out, groups, generator=generator) * 0.01 + 1e-3).half()
        del tensors[f"{name}.weight"]
        layer = (
            awq_layer(codes, zeros, scales)
            if kind == "awq"
            else gptq_layer(codes, zeros, scales, bits, 0 if v2 else 1)
        )
        tensors |= {f"{name}.{part}": tensor for part, tensor in layer.items()}
        shift = (codes - zeros.repeat_interleave(d_in // groups, 1)).double()
        exact = scales.double().repeat_interleave(d_in // groups, 1) * shift
        weights[name] = (codes, exact)
    model.config.save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": kind, "bits": bits, "group_size": group, "desc_act": False, **fields,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder, weights


def change(folder: Path, **tensors) -> None:
    """Replace tensors of a checkpoint; None: take away."""
    found = load_file(folder / "model.safetensors") | {
        name.replace("__", "."): tensor for name, tensor in tensors.items()
    }
    kept = {name: tensor for name, tensor in found.items() if tensor is not None}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
