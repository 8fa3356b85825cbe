"""Pretrain the tiny Llama that `make demo` starts from, and write the demo task's rows.

    OMP_NUM_THREADS=1 python demo/pretrain.py

The same seed, machine and thread count give the same bytes. README.md tells the cost.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import world as world_module
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers.models import BPE
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
DEFAULT_OUT = Path(__file__).resolve().parent.parent / "src" / "anyrank" / "demo"


def train_tokenizer(world: world_module.World, seed: int, size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE that puts BOS in front and keeps digits apart."""
    source = world_module.documents(world, random.Random(seed))
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((next(source) for _ in range(20_000)), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A $B",
        special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """Return a fresh Llama whose linear layers are all at least 64 wide on both sides."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    model.set_attn_implementation("eager")  # on a CPU twice as fast as sdpa for short rows
    return model


def batches(
    world: world_module.World, tokenizer: PreTrainedTokenizerFast, seed: int, documents: int
) -> Iterator[list[torch.Tensor]]:
    """Yield, for each step, token blocks padded with -100 and sorted by length.

    Blocks hold whole documents, so no token sees another document.
    """
    source = world_module.documents(world, random.Random(seed))
    while True:
        texts = [next(source) for _ in range(documents)]
        rows = [[*ids, tokenizer.eos_token_id] for ids in tokenizer(texts)["input_ids"]]
        rows.sort(key=len)
        quarter = math.ceil(documents / 4)
        blocks = []
        for start in range(0, documents, quarter):
            block = [torch.tensor(row) for row in rows[start : start + quarter]]
            blocks.append(
                torch.nn.utils.rnn.pad_sequence(block, batch_first=True, padding_value=-100)
            )
        yield blocks


def block_loss(model: LlamaForCausalLM, block: torch.Tensor, pad_id: int) -> torch.Tensor:
    """Return the summed next-token loss; padding is on the right, so no mask is needed."""
    inputs = block.masked_fill(block == -100, pad_id)
    logits = model(input_ids=inputs[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(
        logits.float().flatten(0, 1), block[:, 1:].flatten(), ignore_index=-100, reduction="sum"
    )


def rate(step: int, steps: int, peak: float) -> float:
    """Return the learning rate: linear warm-up, then a cosine down to a twentieth."""
    warm = min(100, steps // 10 + 1)
    if step < warm:
        return peak * (step + 1) / warm
    progress = (step - warm) / max(1, steps - warm)
    return peak * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))


def pretrain(
    model: LlamaForCausalLM, source: Iterator[list[torch.Tensor]], steps: int, peak: float
) -> tuple[float, int]:
    """Train on `steps` batches; return the mean loss of the last 50 steps and the token count."""
    pad_id = model.config.pad_token_id
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.98), fused=True)
    losses: list[float] = []
    tokens, began = 0, time.perf_counter()
    model.train()
    for step in range(steps):
        blocks = next(source)
        count = sum(int((block[:, 1:] != -100).sum()) for block in blocks)
        total = 0.0
        with torch.autocast("cpu", torch.bfloat16):
            for block in blocks:
                loss = block_loss(model, block, pad_id) / count
                loss.backward()
                total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate(step, steps, peak)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
        tokens += count
        if (step + 1) % 50 == 0 or step + 1 == steps:
            recent = sum(losses[-50:]) / len(losses[-50:])
            spent = time.perf_counter() - began
            print(
                f"step {step + 1}/{steps} loss {recent:.4f} tokens {tokens} {spent:.0f} s",
                flush=True,
            )
    return sum(losses[-50:]) / len(losses[-50:]), tokens


@torch.no_grad()
def exact_match(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, rows: list[dict[str, str]]
) -> float:
    """Return the share of rows whose greedy completion is exactly the expected one."""
    model.eval()
    right = 0
    for start in range(0, len(rows), 64):
        part = rows[start : start + 64]
        prompts = tokenizer(
            [item["prompt"] for item in part],
            return_tensors="pt",
            padding=True,
            padding_side="left",
            return_token_type_ids=False,
        )
        length = prompts["input_ids"].shape[1]
        made = model.generate(**prompts, max_new_tokens=48, do_sample=False)
        texts = tokenizer.batch_decode(made[:, length:], skip_special_tokens=True)
        right += sum(text == item["completion"] for text, item in zip(texts, part, strict=True))
    return right / len(rows)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the model in bf16 and the tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
    )
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8", newline="\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--documents", type=int, default=160, help="documents in a step")
    parser.add_argument("--rate", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--vocab", type=int, default=768)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.use_deterministic_algorithms(True)

    world = world_module.build_world(args.seed)
    tokenizer = train_tokenizer(world, args.seed + 1, args.vocab)
    model = build_model(tokenizer, args.seed)
    print(f"{sum(p.numel() for p in model.parameters()):,} weights, {len(tokenizer)} tokens")
    source = batches(world, tokenizer, args.seed + 2, args.documents)
    began = time.perf_counter()
    loss, tokens = pretrain(model, source, args.steps, args.rate)
    minutes = (time.perf_counter() - began) / 60
    print(f"final loss {loss:.4f} after {tokens:,} tokens in {minutes:.1f} minutes")
    save(model, tokenizer, args.out / "model")

    rng = random.Random(args.seed + 3)
    for name, (maker, _) in world_module.TASKS.items():
        score = exact_match(model, tokenizer, [maker(world, rng) for _ in range(200)])
        print(f"exact match on {name}: {score:.3f}")
    _, test = world_module.demo_rows(world, args.seed)
    print(f"exact match on the demo's test rows: {exact_match(model, tokenizer, test):.3f}")
    world_module.write_demo(args.out, world, args.seed)


if __name__ == "__main__":
    main()
