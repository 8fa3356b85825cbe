"""`anyrank train`."""

from __future__ import annotations

import shlex
import textwrap

from .. import allocator

TRAIN_HELP = """\
anyrank train --model_name_or_path M --dataset D --output_dir RUN [--config FILE.yaml] [--key value]

Model    --model_name_or_path     folder or Hub name          --dtype          auto
         --load_in_4bit           as the method says          --attn_implementation
Data     --dataset                .jsonl .json .csv .parquet or a Hub name; alpaca, prompt and
                                  completion, messages, sharegpt or text columns
         --prompt_column, --completion_column                 for other names
         --eval_dataset           validation rows             --eval_size      or a share, a count
         --max_length             1024 tokens                 --packing        false
Adapter  --method                 {methods}
         --lora_r                 64                          --lora_alpha     16
         --lora_target_modules    all-linear                  --lora_dropout   0
         --nested                 every rank                  --scale          alpha/k, alpha/r ...
         --pool, --repeat         as the method says          --foldable       checked, to be folded
         --ranks                  1,2,4,8,16,32,64 to draw from; default: all of them
         --schedule               settle, uniform, sandwich   --rank_unit, --ranks_per_step
Steps    --max_steps              or --num_train_epochs 3     --learning_rate  2e-4
         --per_device_train_batch_size 8                      --gradient_accumulation_steps 1
         --lr_scheduler_type      linear                      --warmup_steps   0.03
         --optim                  adamw_torch_fused           --seed           42
         --gradient_checkpointing on a GPU                    --bf16           true
Run      --output_dir             new folder                  --report_to      none
         --save_steps             500                         --logging_steps  10
         --resume_from_checkpoint true, or a checkpoint

The default method, anyrank, trains rank r for 70 % of the steps, then ranks 1, 2, r, 1, 4, r by
turns; in a run of more than 750 steps r for 40 %, then 1, r, 2, r, 4, r, 8, r. Each turn is a step
of its own on a micro-batch; a batch that was not split goes in four parts.
--config takes the same keys from YAML. --help_all lists every key (all of TRL's SFTConfig).
"""


def main(argv: list[str]) -> None:
    """Train, or show the help."""
    if set(argv) & {"-h", "--help"}:
        from ..methods import METHODS

        lines = textwrap.wrap(" ".join(METHODS), 64)
        print(TRAIN_HELP.format(methods=("\n" + 34 * " ").join(lines)), end="")
        return
    from ..training.parse import parse_train

    chosen = parse_train(argv)
    from ..training.train import train

    result = train(*chosen)
    folder = chosen[-1].output_dir
    if chosen[-1].process_index:
        return
    if allocator.keeps_buffers():
        print("glibc was told to keep freed buffers for reuse; --keep_malloc leaves it as it is.")
    print(f"Trained {result['steps']} steps in {result['seconds']:.0f} s; the run is in {folder}.")
    print(f"Next: anyrank sweep {shlex.quote(str(folder))}")
