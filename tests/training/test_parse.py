"""The command line of a run, where it decides something: how a batch is split."""

from __future__ import annotations

import pytest

from anyrank.training.parse import parse_train


@pytest.mark.parametrize(
    ("options", "batch", "micro_batches"),
    [
        ("", 2, 4),  # the default method, 8 rows
        ("--per_device_train_batch_size 32", 8, 4),
        ("--per_device_train_batch_size 6", 2, 3),  # evenly
        ("--per_device_train_batch_size 11", 11, 1),  # cannot be split evenly
        ("--per_device_train_batch_size 1", 1, 1),
        ("--per_device_train_batch_size 8 --gradient_accumulation_steps 2", 8, 2),  # as asked
        ("--method qdylora", 8, 1),
        ("--method qalora --nested true --schedule settle", 2, 4),
        ("--method qlora", 8, 1),
    ],
)
def test_a_schedule_that_steps_apart_gets_its_batch_in_parts(options, batch, micro_batches):
    *_, args = parse_train([*options.split(), "--report_to", "none"])
    assert args.per_device_train_batch_size == batch
    assert args.gradient_accumulation_steps == micro_batches
