"""Falcon-40b on one card of 32 GB, and of 24 GB: QDyLoRA, real steps, random weights.

    python benchmarks/falcon40b.py                  both caps, batch 1, 2, 4, ... until refused
    python benchmarks/falcon40b.py --scale 16       the same path at a 16th of the width, on a CPU

QDyLoRA (Rajabzadeh et al., 2024) fine-tuned Falcon-40b on one card of 32 GB. In GiB (`budget`):

    codes of 40.8e9 weights in NF4, with nested scales     19.59
    embeddings, tied to the head, and norms, in bf16        1.00
    adapter, rank 64 on every linear layer, fp32            1.66
    gradients, fp32                                         1.66
    copies of the rows that a step of rank 1 leaves alone   1.63   while the optimizer steps
    moments, fp32                                           3.31   paged: on the host

25.5 on the card, without activations; checkpoints between layers go to the host, 60 x 8 MiB for a
row of 512 tokens. That fits in 32 GB, not in 24 GB: there each decoder layer steps in the backward
pass, once its gradients are complete, and frees them; 22.3 remain. Gradients are not clipped then,
since their norm is known only at the end. `main` chooses by this sum.

A cap of 32 GB is 32 * 2^30 bytes for torch's allocator; what CUDA itself holds comes on top. All
but ROOM of the rest of a larger card is filled: paged moments, which the allocator does not count,
would lie there. The rows of a batch stay the same, so the loss shows whether steps learn.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from step_worker import tensor_peak
from torch import Tensor, nn

import anyrank
from anyrank.training.head import small_tiles

GIB = ROOM = 2**30  # ROOM: of a filled card, for the kernels that CUDA loads as it runs
RANK, CLIP, RATE, STD = 64, 1.0, 1e-3, 0.02  # STD: of random weights
CPU_WAYS = [(None, False), (None, True)]  # no cap; gradients kept, and freed
WARM, STEPS = 2, 7  # steps before the first that counts, and all
SEED = 16  # of draws whose counted steps hold rank 1: it leaves most rows alone, so most are copied


def falcon(scale: int) -> Any:
    """The configuration of tiiuae/falcon-40b, a `scale`-th of it in width and depth."""
    from transformers import FalconConfig

    heads = 128 // scale
    sizes = {"hidden_size": 64 * heads, "num_attention_heads": heads, "vocab_size": 65024 // scale}
    sizes |= {"num_hidden_layers": max(60 // scale, 3), "num_kv_heads": max(heads // 16, 1)}
    kind = {"new_decoder_architecture": True, "bias": False, "tie_word_embeddings": True}
    return FalconConfig(**sizes, **kind, use_cache=False, dtype="bfloat16")


def empty_falcon(config: Any) -> tuple[Any, list[tuple[str, Any]]]:
    """The model on the meta device, and its linear layers but for the head."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    return model, [(name, layer) for name, layer in linears.items() if name != "lm_head"]


def budget(config: Any) -> dict[str, int]:
    """Bytes that a run holds whatever the batch is."""
    model, linears = empty_falcon(config)
    weights = sum(layer.weight.numel() for _, layer in linears)
    adapter = 4 * RANK * sum(sum(layer.weight.shape) for _, layer in linears)
    floats = sum(p.numel() for p in model.parameters()) - weights
    # Half a byte each, one for the scale of 64, and four for the scale of 256 such scales.
    codes = weights // 2 + weights // 64 + weights // 64 // 64
    base = {"codes": codes, "floats": 2 * floats, "adapter": adapter, "gradients": adapter}
    return base | {"moments": 2 * adapter, "copies": adapter * (RANK - 1) // RANK}


def base_model(config: Any, device: str) -> Any:
    """A random Falcon in NF4; one of its linear layers at a time exists in float."""
    from bitsandbytes.nn import Linear4bit, Params4bit
    from transformers.models.falcon.modeling_falcon import FalconRotaryEmbedding

    torch.manual_seed(0)
    model, linears = empty_falcon(config)
    for name, layer in linears:
        rows, columns = shape = layer.weight.shape
        values = torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(std=STD)
        made = Linear4bit(columns, rows, False, torch.bfloat16, quant_type="nf4", device="meta")
        weight = Params4bit(values, quant_type="nf4", compress_statistics=True, module=made)
        made.weight = weight.to(device)  # quantizes
        model.set_submodule(name, made)
    for module in model.modules():
        if isinstance(module, nn.Embedding | nn.LayerNorm):
            module.to_empty(device=device).reset_parameters()
    embeddings = model.get_input_embeddings().weight
    nn.init.normal_(embeddings, std=STD)
    model.lm_head.weight = embeddings
    model.transformer.rotary_emb = FalconRotaryEmbedding(model.config).to(device)
    return model


def by_device(device: str, model: Any, trained: list[Tensor]) -> tuple[Any, Any]:
    """The optimizer, and the context that moves what the forward pass keeps."""
    if device == "cpu":
        return torch.optim.AdamW(trained, lr=RATE, fused=True), nullcontext()
    from accelerate import PartialState
    from bitsandbytes.optim import PagedAdamW32bit
    from trl.models.activation_offloading import get_act_offloading_ctx_manager

    PartialState()  # the offloading warns through accelerate, which asks for it
    return PagedAdamW32bit(trained, lr=RATE), get_act_offloading_ctx_manager(model)


class Training:
    """Steps of QDyLoRA on a Falcon; on a CPU nothing is paged or offloaded."""

    def __init__(self, config: Any, device: str, *, frees: bool) -> None:
        from peft import get_peft_model
        from trl.trainer.utils import add_fused_lm_head

        self.device, self.frees = device, frees
        base = base_model(config, device)
        anyrank.lean_decoder(base)
        add_fused_lm_head(base)  # as TRL's trainer does: no logits of the whole vocabulary
        base.gradient_checkpointing_enable({"use_reentrant": False})
        adapter = anyrank.AnyRankConfig(method="qdylora", r=RANK, target_modules="all-linear")
        self.model: Any = get_peft_model(base, adapter).train()
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer, self.offload = by_device(device, self.model, self.trained)
        self.plan = anyrank.RankPlan(self.model, self.optimizer, total=STEPS, seed=SEED)
        for layer in base.transformer.h if frees else ():
            parts = [p for p in layer.parameters() if p.requires_grad]
            for part in parts:
                part.register_post_accumulate_grad_hook(partial(self._step_layer, parts))

    def _step_layer(self, parts: list[Tensor], _: Tensor) -> None:
        """Step a decoder layer and free its gradients, once all its parameters have one."""
        if any(part.grad is None for part in parts):
            return
        self.optimizer.step()
        for part in parts:
            part.grad = None
        self.plan.use(0)  # a step puts all rows in use; the layers below are yet to be recomputed

    def step(self, number: int, ids: Tensor) -> Tensor:
        """Optimizer step `number` on rows `ids` [batch, tokens]; the loss before it."""
        with self.offload, small_tiles(self.device):  # as anyrank train has them on a CPU
            self.plan.begin(number)
            self.plan.use(0)
            with torch.autocast(self.device, torch.bfloat16):
                loss = self.model(input_ids=ids, labels=ids, fused_lm_head=True).loss
            loss.backward()
        if not self.frees:
            nn.utils.clip_grad_norm_(self.trained, CLIP)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()


def fill_card(cap: int) -> tuple[Tensor, int]:
    """Leave `cap` bytes to the allocator: a tensor to keep alive, and the bytes it holds for it."""
    free, total = torch.cuda.mem_get_info()
    if free < cap:
        raise SystemExit(f"{cap / GIB:.0f} GiB: {free / GIB:.1f} GiB are free; name less in --caps")
    rest = torch.empty(max(free - cap - ROOM, 0), dtype=torch.uint8, device="cuda")
    held = torch.cuda.memory_reserved()
    torch.cuda.set_per_process_memory_fraction((held + cap) / total)
    return rest, held


def run_cap(cap: int | None, frees: bool, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Batches 1, 2, 4, ... until one does not fit in `cap` GiB; in a process of its own."""
    config = falcon(args.scale)
    lasting = sum(budget(config)[name] for name in ("codes", "floats", "adapter", "moments"))
    _filled, held = fill_card(cap * GIB) if cap else (None, lasting)
    training = Training(config, "cuda" if cap else "cpu", frees=frees)
    rows: list[dict[str, Any]] = []
    for batch in (2**i for i in range(args.largest.bit_length())):
        rows.append({"cap": cap, "frees": frees, "batch": batch, "tokens": batch * args.tokens})
        ids = torch.randint(config.vocab_size, (batch, args.tokens)).to(training.device)
        try:
            rows[-1] |= run_batch(training, ids, held)
        except torch.OutOfMemoryError as error:
            rows[-1]["refused"] = ". ".join(str(error).split(". ")[:2])
            break
    return rows


def run_batch(training: Training, ids: Tensor, held: int) -> dict[str, Any]:
    """Times and losses of STEPS steps; the median and the peaks of those that count.

    `held`: bytes, on a GPU of what fills the card, on a CPU of all that lives between steps.
    """
    seconds, losses, on_gpu = [], [], training.device == "cuda"
    for number in range(STEPS):
        if on_gpu and number == WARM:
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        losses.append(training.step(number, ids))
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds[WARM:])
    found = {"seconds": seconds, "median_s": median, "losses": [float(loss) for loss in losses]}
    if on_gpu:
        found["peak"] = torch.cuda.max_memory_allocated() - held
        return found | {"reserved": torch.cuda.max_memory_reserved() - held}
    steps = [partial(training.step, number, ids) for number in range(WARM, STEPS)]
    return found | {"peak": int(max(tensor_peak(step, held / 1e6) for step in steps) * 1e6)}


def planner(cap: int | None, args: argparse.Namespace) -> Any:
    """The plan of such a run."""
    from anyrank.plan.options import read_options

    words = f"--method qdylora --lora_r {RANK} --max_length {args.tokens} --max_grad_norm {CLIP}"
    words += f" --optim {'paged_adamw_32bit' if cap else 'adamw_torch_fused'}"
    with tempfile.TemporaryDirectory() as folder:
        falcon(args.scale).save_pretrained(folder)
        words += f" --model_name_or_path {folder} --gradient_checkpointing true"
        plan = read_options([*words.split(), "--output_dir", folder], for_gpu=cap is not None)
        plan.measure(1, args.tokens)  # builds the model, which other batches share
    return plan


def predicted(plan: Any, row: dict[str, Any]) -> int:
    """Bytes of tensors at the peak of a plan, less the checkpoints and gradients not held here."""
    from anyrank.plan.step import FORWARD, LOSS, UPDATE

    checkpoint = 2 * row["tokens"] * plan.config.hidden_size if row["cap"] else 0
    found = []
    for phase, kinds in plan.measure(row["batch"], row["tokens"] // row["batch"]).peaks.items():
        size = kinds.total()
        if phase in (FORWARD, LOSS) or phase.endswith("last"):  # no gradients, all checkpoints
            found.append(size - plan.config.num_hidden_layers * checkpoint)
        elif not row["frees"]:  # the first layer, with all gradients and one checkpoint; the update
            found.append(size - (0 if phase == UPDATE else checkpoint))
    return max(found)


def gib(size: int | None) -> str:
    return f"{size / GIB:.3f} GiB" if size else "-"


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    cap = f"{row['cap']} GiB" if row["cap"] else "none"
    cells = [cap, "freed by layer, not clipped" if row["frees"] else "kept, clipped", row["batch"]]
    if "refused" in row:
        cells += [row["refused"], "", "", "", "", gib(row["predicted"])]
    else:
        learned = f"{row['losses'][0]:.3f} to {row['losses'][-1]:.3f}"
        cells += [f"{row['tokens'] / row['median_s']:.0f}", f"{row['median_s']:.2f}"]
        cells += [gib(row["peak"]), gib(row.get("reserved")), learned]
        cells += [f"{gib(row['predicted'])} ({row['predicted'] / row['peak'] - 1:+.1%})"]
    return f"| {' | '.join(map(str, cells))} |"


def main() -> None:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--caps", nargs="+", type=int, default=[32, 24], help="GiB, on a GPU")
    parser.add_argument("--scale", type=int, default=1 if on_gpu else 16, help="divides the width")
    parser.add_argument("--tokens", type=int, default=512, help="per row")
    parser.add_argument("--largest", type=int, default=256 if on_gpu else 2, help="batch")
    parser.add_argument("--out", type=Path, default=Path("runs/falcon40b"))
    args = parser.parse_args()
    parts = budget(falcon(args.scale))
    print("holds:", ", ".join(f"{name} {gib(size)}" for name, size in parts.items()))
    on_card = sum(parts.values()) - parts["moments"]
    ways = [(cap, on_card > cap * GIB) for cap in args.caps] if on_gpu else CPU_WAYS
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # fewer gaps
    rows: list[dict[str, Any]] = []
    args.out.mkdir(parents=True, exist_ok=True)
    for cap, frees in ways:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            found = pool.submit(run_cap, cap, frees, args).result()
        plan = planner(cap, args)
        rows += [row | {"predicted": predicted(plan, row)} for row in found]
        result = {"scale": args.scale, "budget": parts, "rows": rows}
        (args.out / "results.json").write_text(json.dumps(result, indent=1))
    print("\n| cap | gradients | batch | tokens/s | s per step | peak | reserved | loss | plan |")
    print("|---" * 9 + "|", *map(line, rows), sep="\n")


if __name__ == "__main__":
    main()
