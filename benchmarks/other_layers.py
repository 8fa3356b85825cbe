"""Trained layers of other papers on quantized weights, for benchmarks/quality.py and claims.py.

    scales    PEQA (arXiv 2305.14152): y = (W (1 + d)) x, one d per scale of W, from zero
    skips     the skips of IR-QLoRA (arXiv 2402.05445) around A and B, without parameters but two:
              u = A x + b1 M x,  y = W x + s (B u + b2 N u);  M averages neighbours of x to the
              length of u, N repeats what u averages to; b1 and b2 from zero
    matryoshka    MatryoshkaLoRA (arXiv 2605.07850): y = W x + B diag(P) A x, where P_i is the sum
              of s_k = 1 / sqrt(k) over the ranks k >= i; at rank k, y = W x + s_k B[:, :k] A[:k] x

    python other_layers.py skips --rank 8 --pool 32 --test test.jsonl -- (options of anyrank train)

The model is trained as `anyrank train` does, and the loss on the test rows goes into sweep.json, of
every rank where there are several.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn
from transformers import set_seed
from trl.trainer.sft_trainer import SFTTrainer

from anyrank.algebra import pool, repeat
from anyrank.files import write_json
from anyrank.quant.affine import AffineLinear
from anyrank.sweep.evaluate import evaluation, score
from anyrank.training.base import load_base, load_tokenizer, wants_4bit
from anyrank.training.parse import parse_train
from anyrank.training.train import read_data
from anyrank.tuner.decoder import lean_decoder


class Scales(nn.Module):
    """W whose scales are trained, and its offsets with them: the zero points stay."""

    def __init__(self, base: AffineLinear, chosen: argparse.Namespace) -> None:
        super().__init__()
        self.base = base
        self.change = nn.Parameter(torch.zeros(base.scales.shape))

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = self.base.form.tile
        change = self.change.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
        weight = self.base.affine.dense(torch.float32) * (1 + change)
        return nn.functional.linear(x, weight.to(x.dtype), self.base.bias)


class Skips(nn.Module):
    """A LoRA on pooled inputs with the two skips."""

    def __init__(self, base: AffineLinear, chosen: argparse.Namespace) -> None:
        super().__init__()
        self.base, self.pool = base, chosen.pool
        self.scale = chosen.alpha / chosen.rank
        self.a = nn.Parameter(torch.empty(chosen.rank, base.in_features // chosen.pool))
        nn.init.kaiming_uniform_(self.a, math.sqrt(5))
        self.b = nn.Parameter(torch.zeros(base.out_features, chosen.rank))
        self.skips = nn.Parameter(torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        z = pool(x, self.pool).float()
        u = z @ self.a.T + self.skips[0] * resized(z, len(self.a))
        y = u @ self.b.T + self.skips[1] * resized(u, len(self.b))
        return self.base(x) + (self.scale * y).to(x.dtype)


class Matryoshka(nn.Module):
    """A LoRA of which every row is scaled by the ranks that it is part of; `rank` cuts it."""

    def __init__(self, base: nn.Linear, chosen: argparse.Namespace) -> None:
        super().__init__()
        self.base, self.rank = base, 0
        self.a = nn.Parameter(torch.empty(chosen.rank, base.in_features))
        nn.init.kaiming_uniform_(self.a, math.sqrt(5))
        self.b = nn.Parameter(torch.zeros(base.out_features, chosen.rank))
        rows = range(1, chosen.rank + 1)
        weights = [sum(k**-0.5 for k in chosen.ranks if k >= i) for i in rows]
        self.p = nn.Buffer(torch.tensor(weights))

    def forward(self, x: Tensor) -> Tensor:
        if self.rank:
            y = x.float() @ self.a[: self.rank].T @ self.b[:, : self.rank].T * self.rank**-0.5
        else:
            y = x.float() @ (self.p[:, None] * self.a).T @ self.b.T
        return self.base(x) + y.to(x.dtype)


def resized(x: Tensor, d: int) -> Tensor:
    """[..., d]: means of neighbours down to the greatest common divisor, then repeated."""
    common = math.gcd(x.shape[-1], d)
    return repeat(pool(x, x.shape[-1] // common), d // common)


LAYERS = {"scales": Scales, "skips": Skips, "matryoshka": Matryoshka}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("layer", choices=LAYERS)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--alpha", type=float, default=16)
    parser.add_argument("--pool", type=int, default=1)
    parser.add_argument("--ranks", type=lambda text: [int(k) for k in text.split(",")], default=[])
    parser.add_argument("--test", required=True)
    parser.add_argument("--limit", type=int)
    parser.add_argument("words", nargs="+")
    chosen = parser.parse_args()

    model, adapter, data, args = parse_train(chosen.words)
    folder = Path(str(args.output_dir))
    tokenizer = load_tokenizer(model, trust_remote_code=False)
    rows, _ = read_data(data, args, tokenizer)
    test, _ = read_data(
        replace(data, dataset=chosen.test, dataset_limit=chosen.limit), args, tokenizer
    )
    set_seed(args.seed)
    in_4bit = wants_4bit(model, adapter.method)
    base = load_base(model, in_4bit=in_4bit, trust_remote_code=False)
    base.config.use_cache = False
    lean_decoder(base, exact=False)
    base.requires_grad_(False)
    for name, layer in list(base.named_modules()):
        if isinstance(layer, (AffineLinear, Linear4bit)):
            base.set_submodule(name, LAYERS[chosen.layer](layer, chosen))
    trained: Any = base
    trained._hf_peft_config_loaded = True  # what is trained is no quantized weight
    trainer = SFTTrainer(base, args, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    found = []
    parameters = sum(p.numel() for p in base.parameters() if p.requires_grad)
    for rank in chosen.ranks or [0]:
        for module in base.modules():
            if isinstance(module, Matryoshka):
                module.rank = rank
        with evaluation(base):
            loss = score(base, test.to_list(), 8).loss
        found.append({"rank": rank, "loss": loss, "parameters": parameters})
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "sweep.json", {"ranks": found})
    write_json(folder / "result.json", {"finished": True})


if __name__ == "__main__":
    main()
