"""Where P and R act: on activations or on the factors of the adapter, and how sums are best made.

    python benchmarks/pool_repeat.py [--device cuda]

Milliseconds, medians of 30. The first table adds R B t to a layer's output of [tokens, d]: by
copying the rows of B first (the factor), or the product afterwards (the activations);
kernels/linear.py chooses by PASS_COLUMNS. The second makes P x of [tokens, d]: by the mean over a
short last dimension, or as kernels/sums.py does.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from anyrank.algebra import pool, repeat, repeat_rows
from anyrank.kernels.sums import group_mean


def milliseconds(run: Callable[[], object], device: str) -> float:
    times = []
    for i in range(35):
        start = time.perf_counter()
        run()
        if device != "cpu":
            torch.cuda.synchronize()
        if i >= 5:
            times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--width", type=int, default=1024)
    args = parser.parse_args()

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.bfloat16, device=args.device)

    y = random(args.tokens, args.width)
    print("| copies | columns | factor | activations |\n|---|---|---|---|")
    for q in (2, 4, 8):
        for columns in (16, 32, 64, 128, 256, 512):
            t, b = random(args.tokens, columns), random(args.width // q, columns)
            factor = milliseconds(
                lambda t=t, b=b, q=q: y.addmm_(t, repeat_rows(b, q).T), args.device
            )
            late = milliseconds(lambda t=t, b=b, q=q: y.add_(repeat(t @ b.T, q)), args.device)
            print(f"| {q} | {columns} | {factor:.2f} | {late:.2f} |", flush=True)
            y.zero_()
    print("\n| means of | last dimension | as sums.py |\n|---|---|---|")
    for p in (2, 4, 8, 32):
        naive = milliseconds(lambda p=p: pool(y, p), args.device)
        ours = milliseconds(lambda p=p: group_mean(y, p), args.device)
        print(f"| {p} | {naive:.2f} | {ours:.2f} |", flush=True)


if __name__ == "__main__":
    main()
