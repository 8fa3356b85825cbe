"""A sweep against losses computed row by row, and the rule that chooses the rank."""

from __future__ import annotations

import io
import math

import pytest
import torch
from rich.console import Console
from tiny import adapted, llama

import anyrank
from anyrank.sweep.choose import choose_rank
from anyrank.sweep.evaluate import batches, exact_match
from anyrank.sweep.report import cheaper, table, why_chosen, write_report

ROWS = [
    {"input_ids": [1, 2, 3, 4], "labels": [-100, -100, 3, 4]},
    {"input_ids": [5, 6, 7, 8, 9, 10, 11], "labels": [-100, 6, 7, 8, 9, 10, 11]},
    {"input_ids": [12, 13], "labels": [-100, 13]},
]


def by_hand(model) -> float:
    """Mean nats per label, a row at a time, in float64."""
    nats, count = 0.0, 0
    for row in ROWS:
        logits = model(torch.tensor([row["input_ids"]])).logits[0, :-1]
        for position, label in enumerate(row["labels"][1:]):
            if label != -100:
                nats -= torch.log_softmax(logits[position].double(), -1)[label].item()
                count += 1
    return nats / count


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_every_rank_and_the_base_get_the_loss_of_their_own_logits(batch_size):
    model = adapted(llama()).train()
    base, scores = anyrank.evaluate_ranks(model, ROWS, [1, 3, 4], batch_size=batch_size)
    assert model.training
    model.eval()
    with torch.no_grad():
        for rank, score in scores.items():
            with model.set_rank(rank):
                assert abs(score.loss - by_hand(model)) < 1e-5
            assert score.perplexity == math.exp(score.loss)
        assert abs(base.loss - by_hand(llama())) < 1e-5
    assert len({score.loss for score in scores.values()}) == 3


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_the_nats_of_every_row_keep_the_order_of_the_rows(batch_size):
    model = adapted(llama())
    _, scores = anyrank.evaluate_ranks(model, ROWS, [2, 4], batch_size=batch_size)
    for rank, score in scores.items():
        with model.set_rank(rank):
            alone = [anyrank.evaluate_ranks(model, [row], [rank])[1][rank].loss for row in ROWS]
        assert score.nats == pytest.approx([n * t for n, t in zip(alone, (2, 6, 1), strict=True)])


def test_rows_of_similar_length_are_padded_on_the_right():
    first, second = batches(ROWS, 2, "cpu")
    assert first["input_ids"].tolist() == [[12, 13, 0, 0], [1, 2, 3, 4]]
    assert first["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert first["labels"].tolist() == [[-100, 13, -100, -100], [-100, -100, 3, 4]]
    assert second["input_ids"].shape == (1, 7)


class Words:
    """A tokenizer of one letter per token, for exact match."""

    pad_token_id = 0

    def decode(self, ids, skip_special_tokens):
        return "".join(chr(96 + i) for i in ids if i)

    def batch_decode(self, rows, skip_special_tokens):
        return [self.decode(row, skip_special_tokens) for row in rows.tolist()]


class Echo:
    """A model that answers each prompt with its last token twice."""

    device = "cpu"

    def generate(self, input_ids, attention_mask, max_new_tokens, do_sample, pad_token_id):
        assert attention_mask.tolist() == (input_ids != 0).long().tolist()
        last = input_ids[:, -1:]
        return torch.cat((input_ids, last.repeat(1, 2)), dim=1)


@pytest.mark.parametrize(
    ("pattern", "wanted"), [(None, 1 / 3), ("([ab])$", 2 / 3), ("(b)(b)", 1 / 3)]
)
def test_exact_match_compares_the_whole_answer_or_the_last_match(pattern, wanted):
    rows = [
        {"input_ids": [3, 1, 1, 1], "labels": [-100, -100, 1, 1]},  # answers aa, wanted aa
        {"input_ids": [2, 1, 2], "labels": [-100, 1, 2]},  # answers bb, wanted ab
        {"input_ids": [1, 2, 2], "labels": [-100, 2, 2]},  # answers aa, wanted bb
    ]
    answers = exact_match(Words(), rows, max_new_tokens=2, pattern=pattern, batch_size=2)
    assert answers(Echo()) == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("losses", "tolerance", "chosen"),
    [
        ({1: 3.0, 8: 2.51, 64: 2.50}, 0.02, 8),
        ({1: 3.0, 8: 2.51, 64: 2.50}, 0.0, 64),
        ({1: 2.0, 8: 2.5}, 0.02, 1),
        ({1: float("nan"), 8: 2.5, 64: 2.5}, 0.02, 8),
        ({8: float("nan"), 64: float("inf")}, 0.02, None),
    ],
)
def test_the_smallest_rank_within_the_tolerance_is_chosen(losses, tolerance, chosen):
    assert choose_rank(losses, tolerance) == chosen


def test_the_report_is_json_a_picture_and_a_table(tmp_path):
    row = {"loss": 1.0, "perplexity": math.e, "exact_match": 0.5}
    sizes = [{"rank": k, "parameters": 10**6 * k, "bytes": 4 * 10**6 * k} for k in (1, 2, 4)]
    above = [{"above_best": d, "above_best_se": d / 4} for d in (0.01, 0.04, 0.0)]
    found = {
        "base": row,
        "ranks": [{**row, **size, **error} for size, error in zip(sizes, above, strict=True)],
        "chosen_rank": 1,
        "method": "qdylora",
        "rows": 3,
        "tokens": 9,
    }
    write_report(tmp_path / "new", found)
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["sweep.json", "sweep.png"]
    shown = table(found)
    assert [c.header for c in shown.columns] == [
        "rank", "nats per\ntoken", "above the best", "perplexity", "exact\nmatch", "parameters",
        "LoRA\nfile",
    ]  # fmt: skip
    assert list(shown.columns[2].cells) == ["-", "0.0100 ± 0.0025", "0.0400 ± 0.0100", "-"]
    assert list(shown.columns[0].cells) == ["base", "1 <", "2", "4"]
    text = io.StringIO()
    Console(file=text, width=80).print(shown)
    assert "…" not in text.getvalue()  # nothing is cut


def swept(chosen, tolerance=None, **ranks):
    rows = [
        {"rank": int(key[1:]), "loss": 3 + d, "above_best": d, "above_best_se": se}
        for key, (d, se) in ranks.items()
    ]
    return {"chosen_rank": chosen, "tolerance": tolerance, "ranks": rows}


NAN = float("nan")


@pytest.mark.parametrize(
    ("found", "why", "other"),
    [
        (swept(8, r8=(0, 0)), "the only one", None),
        (
            swept(64, r8=(0.01, 0.002), r64=(0, 0)),
            "the best; every smaller one is more than one standard error above it",
            "With --tolerance 0.02 it would be rank 8 (0.0100 ± 0.0020 above the best).",
        ),
        (
            swept(8, r8=(0.01, 0.02), r64=(0, 0)),
            "the smallest within one standard error of the best (0.0100 ± 0.0200)",
            None,
        ),
        (
            swept(8, r8=(0.0015, 0.0002), r64=(0, 0)),
            "the smallest within 0.002 nats per token of the best (0.0015 ± 0.0002)",
            None,
        ),
        (
            swept(8, r8=(0.0015, NAN), r64=(0, NAN)),
            "the smallest within 0.002 nats per token of the best (0.0015 ± nan)",
            None,
        ),
        (
            swept(8, 0.1, r8=(0.09, 0.001), r64=(0, 0)),
            "the smallest within 0.1 nats per token of the best",
            None,
        ),
    ],
)
def test_the_rule_that_chose_is_named_and_a_usual_price_beside_it(found, why, other):
    assert why_chosen(found) == why
    assert cheaper(found) == other


def test_a_curve_with_a_diverged_rank_and_no_error_bars_is_drawn(tmp_path):
    found = swept(8, r8=(0.0, NAN), r64=(NAN, NAN))
    base = {"loss": 5.0, "perplexity": 150.0}
    write_report(tmp_path, found | {"base": base, "method": "qdylora"})
    assert (tmp_path / "sweep.png").read_bytes()[:4] == b"\x89PNG"
