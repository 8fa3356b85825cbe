"""A finished run of one rank, to be cut to lower ranks: as its rows lie, or in SVD order."""

from __future__ import annotations

import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

WEIGHTS, RESULT = "adapter_model.safetensors", "result.json"


def write_cut(run: Path, out: Path, how: str) -> None:
    """Copy a run so that `anyrank sweep --ranks` evaluates its prefixes; B A stays what it is.

    Args:
        run: a finished run of a LoRA.
        out: the copy; what an earlier call left there is replaced.
        how: "svd" puts the rows in the order of their SVD, "prefix" leaves them as they are.
    """
    from anyrank.algebra import svd_order

    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(run, out, ignore=shutil.ignore_patterns(RESULT, "sweep.*"))
    if how == "svd":
        tensors = load_file(out / WEIGHTS)
        for a in [name for name in tensors if "anyrank_A" in name]:
            b = a.replace("anyrank_A", "anyrank_B")
            tensors[a], tensors[b] = svd_order(tensors[a], tensors[b])
        save_file(tensors, out / WEIGHTS, metadata={"format": "pt"})
    shutil.copy(run / RESULT, out / RESULT)  # last: the copy is complete
