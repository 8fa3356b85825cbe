"""A finished run of one rank, cut to lower ranks: as it lies, or in the order of its SVD."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file, save_file


def write_cut(run: Path, out: Path, how: str) -> None:
    """Copy a run, its rows in the order of their SVD ("svd") or as they are ("prefix").

    The product B A stays; `anyrank sweep --ranks` then evaluates its prefixes.
    """
    from anyrank.algebra import svd_order

    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(run, out, ignore=shutil.ignore_patterns("result.json", "sweep.*"))
    if how == "svd":
        path = out / "adapter_model.safetensors"
        tensors = load_file(path)
        for name in [name for name in tensors if "anyrank_A" in name]:
            other = name.replace("anyrank_A", "anyrank_B")
            tensors[name], tensors[other] = svd_order(tensors[name], tensors[other])
        save_file(tensors, path, metadata={"format": "pt"})
    shutil.copy(run / "result.json", out / "result.json")
    assert yaml.safe_load((out / "config.yaml").read_text())
    assert json.loads((out / "result.json").read_text())
    assert torch.isfinite(next(iter(load_file(out / "adapter_model.safetensors").values()))).all()
