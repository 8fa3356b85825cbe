"""A rank for every layer under a budget of parameters: a knapsack with one choice per layer.

    minimise  sum_l V_l(k_l)    subject to    sum_l c_l k_l <= budget

V_l(k) is what rank k in layer l does to the loss and c_l the parameters of one of its rows. With a
price on parameters each layer chooses by itself, the k of least V_l(k) + price c_l k; the price is
the lowest that keeps the budget (Everett, Operations Research 11, 1963), and what is then left of
the budget goes to the layers that gain most per parameter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

Ranks = dict[str, int]
Values = Mapping[str, Mapping[int, float]]


def size(ranks: Mapping[str, int], costs: Mapping[str, int]) -> int:
    """How many parameters the layers hold at these ranks."""
    return sum(costs[layer] * rank for layer, rank in ranks.items())


def ladder(rows: int, unit: int = 1) -> list[int]:
    """Ranks to choose from: 0, the doublings and the middle of each two, up to `rows`.

    All are multiples of `unit`, the rows that were trained together.
    """
    steps, k = {0, rows}, unit
    while k <= rows:
        steps |= {k, min(rows, (k + k // 2) // unit * unit)}
        k *= 2
    return sorted(steps)


def allocate(values: Values, costs: Mapping[str, int], budget: int) -> Ranks:
    """The ranks of least total value that a budget holds.

    Args:
        values: by layer and rank, nats per token; lower is better. The smallest ranks together
            must fit.
        costs: parameters of one row of each layer.
        budget: parameters of all layers together.

    Returns:
        A rank for every layer.
    """

    def at(price: float) -> Ranks:
        def total(layer: str, k: int) -> float:
            return values[layer][k] + price * costs[layer] * k

        return {n: min(values[n], key=lambda k, n=n: (total(n, k), k)) for n in values}

    low, high = 0.0, 1e-9
    if size(at(low), costs) <= budget:
        return at(low)
    while size(at(high), costs) > budget:
        low, high = high, 2 * high
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if size(at(middle), costs) > budget else (low, middle)
    return _filled(at(high), values, costs, budget)


def _filled(ranks: Ranks, values: Values, costs: Mapping[str, int], budget: int) -> Ranks:
    """The best gain per parameter that still fits, again and again."""
    left = budget - size(ranks, costs)
    while True:
        steps = [
            ((values[n][now] - values[n][k]) / (costs[n] * (k - now)), n, k)
            for n, now in ranks.items()
            for k in values[n]
            if now < k and costs[n] * (k - now) <= left and values[n][k] < values[n][now]
        ]
        if not steps:
            return ranks
        _, layer, k = max(steps)
        left -= costs[layer] * (k - ranks[layer])
        ranks[layer] = k


def nearby(steps: Sequence[int], rank: int, reach: int) -> list[int]:
    """The ranks of a ladder at most `reach` steps from `rank`, and `rank` itself."""
    below = [k for k in steps if k < rank][-reach:]
    return [*below, rank, *[k for k in steps if k > rank][:reach]]
