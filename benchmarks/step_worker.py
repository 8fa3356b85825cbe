"""One side of benchmarks/step.py, in a process of its own: it loads, waits, and steps when told to.

    python benchmarks/step_worker.py '{"side": "qlora", "shape": "llama", ...}'

Each line on stdin is a command, each answer is one line of JSON on stdout.
"""

from __future__ import annotations

import ctypes
import gc
import json
import math
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from step_models import FIRST, Job, adapted_model, base_model, model_flops
from torch import Tensor, nn

from anyrank import RankPlan
from anyrank.schedule import PARTS


class Training:
    """Steps of one side: forward, backward, clipping and AdamW."""

    def __init__(self, job: Job) -> None:
        self.job, self.model = job, adapted_model(job).train()
        self.start_from(job.seed)
        if job.drawn:
            self.model.set_rank(job.drawn)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-3, fused=True)
        if job.at is not None:
            self.plan = RankPlan(self.model, self.optimizer, total=1000, seed=0)
            self.plan.parts = PARTS
        generator = torch.Generator().manual_seed(1)
        self.vocabulary = self.model.config.vocab_size
        self.next_token = torch.randperm(self.vocabulary, generator=generator)
        self.generator = generator

    def start_from(self, seed: int) -> None:
        """The same first factors on both sides, whoever made them."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in sorted(self.model.named_parameters()):
            if parameter.requires_grad and ("lora_A" in name or "anyrank_A" in name):
                bound = 1 / math.sqrt(parameter.shape[1])
                values = torch.rand(parameter.shape, generator=generator) * 2 * bound - bound
                parameter.data.copy_(values)

    def batch(self) -> Tensor:
        """Rows in which nine of ten tokens follow from the one before: something to learn."""
        job = self.job
        ids = torch.randint(self.vocabulary, (job.rows, job.tokens), generator=self.generator)
        known = torch.rand(job.rows, job.tokens, generator=self.generator) < 0.9
        for i in range(1, job.tokens):
            ids[:, i] = torch.where(known[:, i], self.next_token[ids[:, i - 1]], ids[:, i])
        return ids.to(job.device)

    def step(self, ids: Tensor) -> Tensor:
        if self.job.at is None:
            return self.update(ids)
        self.plan.begin(self.job.at)
        losses = []
        for i, part in enumerate(ids.chunk(PARTS)):
            self.plan.use(i)
            losses.append(self.update(part))
        return torch.stack(losses).mean()

    def update(self, ids: Tensor) -> Tensor:
        loss = self.model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()


class Floor:
    """The dense products of such a step and its attention, on tensors that are ready."""

    def __init__(self, job: Job) -> None:
        self.job, model = job, base_model(job)
        config, n = model.config, job.rows * job.tokens
        self.products: list[tuple[bool, tuple[Tensor, ...]]] = []
        for name, layer in model.named_modules():
            if not hasattr(layer, "in_features") or "lm_head" in name:
                continue
            d_in, d_out = layer.in_features, layer.out_features
            shapes = [(d_out, d_in), (n, d_in), (n, d_out), (job.rank, d_in), (d_out, job.rank)]
            reads_embeddings = ".0." in name and name.rpartition(".")[2] in FIRST
            self.products.append((reads_embeddings, tuple(self.random(*size) for size in shapes)))
        self.head = tuple(
            self.random(*shape)
            for shape in (
                (config.vocab_size, config.hidden_size),
                (n, config.hidden_size),
                (n, config.vocab_size),
            )
        )
        heads = config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // heads
        shape = (job.rows, job.tokens, heads, size)
        self.qkv = [self.random(*shape).transpose(1, 2).requires_grad_() for _ in range(3)]
        self.upstream = self.random(*shape).transpose(1, 2)
        self.depth = config.num_hidden_layers

    def random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.bfloat16, device=self.job.device)

    def batch(self) -> None:
        return None

    def step(self, _: Any) -> Tensor:
        for reads_embeddings, (w, x, g, a, b) in self.products:
            for _ in range(1 + self.job.checkpointing):
                u = x @ a.T
                (x @ w.T).addmm_(u, b.T)
            t = g @ b
            if not reads_embeddings:
                (g @ w).addmm_(t, a)
            _ = t.T @ x, g.T @ u
        w, x, g = self.head
        _ = x @ w.T, g @ w
        for _ in range(self.depth):
            for _ in range(1 + self.job.checkpointing):
                out = nn.functional.scaled_dot_product_attention(*self.qkv, is_causal=True)
            torch.autograd.grad(out, self.qkv, self.upstream)
        return torch.zeros(())


def status(name: str) -> float:
    """MB of a line of /proc/self/status."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) / 1000 for line in lines if line.startswith(name + ":"))


def in_use(device: str) -> float:
    """MB of memory in use; on a CPU without the pages of libraries, which are read as they run."""
    gc.collect()
    if device != "cpu":
        return torch.cuda.memory_allocated() / 1e6
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return status("RssAnon")


def forget_peak(device: str) -> None:
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    else:
        with open("/proc/self/clear_refs", "w") as refs:
            refs.write("5")


def peak(device: str) -> float:
    """MB in use at the peak since `forget_peak`."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated() / 1e6
    return status("VmHWM") - status("RssFile")


def tensor_peak(step: Callable[[], Any], kept: float) -> float:
    """MB of tensors at the peak of a step, `kept` of which were there before it."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        step()
    results: Any = seen.profiler
    changes = [e for e in results.kineto_results.events() if e.name() == "[memory]"]
    now = top = 0
    for change in sorted(changes, key=lambda e: e.start_ns()):
        now += change.nbytes()
        top = max(top, now)
    return top / 1e6 + kept


def main() -> None:
    job = Job(**json.loads(sys.argv[1]))
    sys.stdout, answers = sys.stderr, sys.stdout  # what libraries print is no answer

    def answer(**values: Any) -> None:
        print(json.dumps(values), file=answers, flush=True)

    side: Any = (Floor if job.side == "floor" else Training)(job)
    before = in_use(job.device)
    answer(ready=True, loaded=before, flops=model_flops(job))
    for line in sys.stdin:
        if line.strip() == "forget":
            forget_peak(job.device)
            answer(done=True)
        elif line.strip() == "step":
            ids = side.batch()
            start = time.perf_counter()
            loss = side.step(ids)
            if job.device != "cpu":
                torch.cuda.synchronize()
            answer(seconds=time.perf_counter() - start, loss=float(loss))
        elif line.strip() == "memory":
            growth = peak(job.device) - before
            moments = sum(p.numel() * 8 / 1e6 for p in getattr(side, "trained", []))
            ids = side.batch()
            tensors = tensor_peak(lambda ids=ids: side.step(ids), moments)
            answer(growth=growth, tensors=tensors if job.device == "cpu" else growth)
        else:
            break
    os._exit(0)  # without the seconds that unloading takes


if __name__ == "__main__":
    main()
