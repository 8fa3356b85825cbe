"""`anyrank plan`."""

from __future__ import annotations

import argparse
import json

PLAN_HELP = """\
anyrank plan --model_name_or_path M [--gpu_memory 24GB] [--config FILE.yaml] [--key value]

Will it fit? Predicts the memory of a training step from the model's config.json alone: nothing is
downloaded but that, and no weight is made. The step of anyrank train runs on tensors without memory
while their bytes are counted.

  --gpu_memory             of one card: 24GB, 24GiB or 24 (all 24 * 2^30 bytes, as cards are sold),
                           or 24000MiB; also plans for a GPU on a machine without one.
                           Without it: just the table, for the GPU or the CPU of this machine
  --json                   everything in bytes, for other programs

All other options are those of anyrank train; these change memory:

Model    --model_name_or_path     folder or Hub name          --dtype          auto
         --load_in_4bit           as the method says          --attn_implementation
Adapter  --method, --lora_r       anyrank, 64                 --lora_target_modules all-linear
         --nested, --pool, --repeat                           --lora_dropout   0
Steps    --per_device_train_batch_size 8                      --gradient_accumulation_steps 1
         --max_length             1024 tokens                 --packing        false
         --gradient_checkpointing on a GPU                    --bf16           true
         --optim                  adamw_torch_fused           --label_smoothing_factor 0

One process with the whole model is planned; with several GPUs each needs this much, and room for
its gradients once more.

Exit code: 0 when it fits (or no --gpu_memory was named), 1 when it does not, 2 for an error.
"""


def main(argv: list[str]) -> int:
    """Plan, print, and return the exit code."""
    if set(argv) & {"-h", "--help"}:
        print(PLAN_HELP, end="")
        return 0
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--gpu_memory", nargs="?", const="")
    parser.add_argument("--json", action="store_true")
    ours, words = parser.parse_known_args(argv)
    from ..plan.size import parse_size

    budget = None if ours.gpu_memory is None else parse_size(ours.gpu_memory)
    from ..plan.options import read_options
    from ..plan.report import as_json, lines, make_report, table

    report = make_report(read_options(words, for_gpu=budget is not None), budget)
    if ours.json:
        print(json.dumps(as_json(report), indent=2))
    else:
        from rich.console import Console

        Console().print(table(report))
        print("\n".join(lines(report)))
    return 0 if report.fits else 1
