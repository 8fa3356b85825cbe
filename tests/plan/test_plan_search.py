"""What fits, found in few looks; and what to change."""

from __future__ import annotations

import pytest
from runs import CONFIGS, planner, words_of

from anyrank.errors import ConfigError
from anyrank.plan.search import changes, largest, largest_batch, largest_length
from anyrank.plan.size import GIB, gib, parse_size


@pytest.mark.parametrize(
    ("total", "budget", "top", "wanted"),
    [
        (lambda n: 100 + 7 * n, 1000, 1024, 128),
        (lambda n: 100 + 7 * n, 1000, 50, 50),
        (lambda n: 100 + 7 * n, 106, 50, 0),
        (lambda n: 100 + 7 * n, 107, 50, 1),
        (lambda n: max(500, 20 * n), 1000, 1024, 50),  # flat at first
        (lambda n: 100 + n * n, 1000, 1024, 30),
        (lambda n: 100 + 3 * n + n * n // 50, 40_000, 1024, 1024),
        (lambda n: 10, 10, 1024, 1024),
        (lambda n: n, 1, 1, 1),
    ],
)
@pytest.mark.parametrize("start", [1, 8, 500])
def test_the_largest_that_fits_in_few_looks(total, budget, top, wanted, start):
    looks = []

    def look(n: int) -> int:
        assert 1 <= n <= top
        looks.append(n)
        return total(n)

    assert largest(look, budget, top, start) == wanted
    assert len(looks) == len(set(looks)) <= 10


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GB", 24 * GIB),
        ("24GiB", 24 * GIB),
        ("24", 24 * GIB),
        (" 22.5 gib", int(22.5 * GIB)),
        ("24000MiB", 24000 * 2**20),
        ("80g", 80 * GIB),
    ],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "24 apples", "-1GB", "0", "24TB2", "1e9"])
def test_a_size_that_is_none(text):
    with pytest.raises(ConfigError) as caught:
        parse_size(text)
    assert str(caught.value) == (
        f"gpu_memory={text!r} must be a size above 0 such as 24GB, 24 or 22.5GiB (all in units of "
        "2^30 bytes, as cards are sold), or 24000MiB"
    )


def test_sizes_are_shown_in_gib():
    assert gib(3 * GIB // 2) == "1.50 GiB"


@pytest.fixture
def plan(tmp_path):
    config = CONFIGS["llama"]()
    config.num_hidden_layers = 2
    config.save_pretrained(tmp_path)
    more = "--method lora --lora_r 16 --gradient_checkpointing false"
    return planner(words_of(tmp_path, 4, 128, more), on_gpu=True)


def test_one_more_would_not_fit(plan):
    budget = plan.estimate(4, 128).total + 2**20
    rows = largest_batch(plan, budget, 128)
    assert plan.estimate(rows, 128).total <= budget < plan.estimate(rows + 1, 128).total
    tokens = largest_length(plan, budget, 2)
    assert tokens % 64 == 0
    assert plan.estimate(2, tokens).total <= budget < plan.estimate(2, tokens + 64).total


def test_what_to_change(plan):
    asked = plan.estimate(4, 128).total
    found = changes(plan, asked - 2**20, 64)
    names = [change.options.split()[0] for change in found]
    assert names == [
        "--gradient_checkpointing", "--per_device_train_batch_size", "--optim", "--load_in_4bit",
        "--lora_r", "--max_length",
    ]  # fmt: skip
    assert all(change.total < asked for change in found)
    assert found[1].options.endswith(" --gradient_accumulation_steps 2")
    other = plan.with_options(gradient_checkpointing=True)
    assert other.estimate(4, 128).total == found[0].total
    assert plan.estimate(4, 64).total == found[-1].total


def test_where_no_change_is_enough_all_of_them_are_tried(plan):
    *others, smallest = changes(plan, 1, 0)
    assert smallest.options == (
        "--gradient_checkpointing true --optim paged_adamw_8bit --load_in_4bit true --lora_r 8 "
        "--per_device_train_batch_size 1 --gradient_accumulation_steps 4"
    )
    assert smallest.total < min(change.total for change in others)


def test_the_state_of_a_paged_optimizer_lies_on_the_host(tmp_path):
    config = CONFIGS["llama"]()
    config.hidden_size, config.head_dim = 2048, 512
    config.save_pretrained(tmp_path)
    more = "--method lora --lora_r 64 --gradient_checkpointing true --optim "
    plain, paged = (
        planner(words_of(tmp_path, 1, 64, more + name), on_gpu=True).estimate(1, 64)
        for name in ("adamw_8bit", "paged_adamw_8bit")
    )
    assert (plain.host, paged.parts["adapter"]) == (0, plain.parts["adapter"])
    moved = plain.parts["optimizer"] - paged.parts["optimizer"]
    assert paged.host == moved
    assert "host" not in paged.parts
    big = 5 * 64 * (4 * 2048 + 2 * 2048 + 3 * 2048)  # the factors of 100,000 numbers and more
    assert moved == 2 * big
