"""Models, tokenizers and texts that the tests of GGUF share."""

from __future__ import annotations

import functools
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers

from anyrank.export.gguf import pretokenizer as pre
from anyrank.kernels import AffineFormat
from anyrank.quant.hf import AffineConfig, quantized_linears, replace_linears
from anyrank.quantize.minmax import minmax

FORM = AffineFormat(4, (1, 32))
SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
LONGEST = 8  # characters of a token; llama_cpp.Llama.detokenize drops tokens of over 32 bytes
SPECIAL = ["<unk>", "<s>", "</s>", "<|turn|>", "<|end|>"]
TEXTS = [
    "Natalia sold 48 clips in April, and 1234567 in May: how many altogether?",
    "I'll say it's HE'S, WE'VE, don't; you're -- 'tis... 'RE you sure?!",
    "def f(x):\n    return x ** 2  # 3.14e-10\n\n\n\tprint(f'{x!r}')\r\n\r\nend",
    "Ünïcode façade naïve — “quotes” … ½ ⅓ ²³ Ⅻ ① 日本語のテキスト 123",
    "русский 456 עברית العربية ١٢٣ ελληνικά",
    "emoji 🚀🦙👩‍👩‍👧 and \u200d joiners, CamelCaseWORDS snake_case iPhone15Pro",
    "   leading, double  spaces,   tabs\t\tand trailing   \n \n  \n",
    "हिन्दी देवनागरी 한국어 조선말 ไทย 🇪🇺 \u00a0nbsp\u3000wide",
    "x",
    '$12.50 + 3/4 = 13,25 € (100%) <html attr="v">&amp;</html> C:\\path\\to\\file',
]
BYTE_LEVEL: dict[str, tuple[list[Any], bool]] = {  # pre-tokenizers, ignore_merges
    "gpt-2": ([pre_tokenizers.ByteLevel(add_prefix_space=False)], False),
    "smollm": (
        [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)],
        False,
    ),
}
for _name, _regex, _whole in (
    ("qwen2", pre.QWEN_2, False),
    ("qwen35", pre.QWEN_3_5, False),
    ("llama-bpe", pre.LLAMA_3, True),
    ("smaug-bpe", pre.LLAMA_3, False),
    ("gpt-4o", pre.GPT_4O, False),
    ("tekken", pre.TEKKEN, True),
):
    _split = pre_tokenizers.Split(tokenizers.Regex(_regex), "isolated")
    _bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    BYTE_LEVEL[_name] = ([_split, _bytes], _whole)


def corpus() -> list[str]:
    """The texts, cut and mixed, so that merges cross all kinds of characters."""
    rng = random.Random(0)
    words = " ".join(TEXTS).split(" ")
    mixed = [" ".join(rng.choices(words, k=12)) for _ in range(200)]
    return TEXTS * 4 + mixed + [str(rng.randrange(10**6)) for _ in range(200)]


@functools.cache
def _byte_level(name: str, size: int) -> str:
    steps, whole = BYTE_LEVEL[name]
    tokenizer = tokenizers.Tokenizer(models.BPE(ignore_merges=whole))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=SPECIAL,
        initial_alphabet=alphabet,
        max_token_length=LONGEST,
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    return tokenizer.to_str()


def byte_level(name: str = "gpt-2", *, size: int = 700, bos: bool = False) -> Any:
    """A byte-level BPE with the pre-tokenizer that llama.cpp calls `name`."""
    tokenizer = tokenizers.Tokenizer.from_str(_byte_level(name, size))
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    return _wrapped(tokenizer, bos)


def _wrapped(tokenizer: tokenizers.Tokenizer, bos: bool, **options: Any) -> Any:
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", **options
    )


@functools.cache
def _sentencepiece(size: int) -> str:
    """Merges as Transformers derives them from the pieces: all splits, best piece first."""
    learner = tokenizers.Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=size, max_token_length=LONGEST, show_progress=False)
    learner.train_from_iterator(corpus(), trainer)
    learned = sorted(learner.get_vocab().items(), key=lambda item: item[1])
    pieces = [piece for piece, _ in sorted(learned, key=lambda item: len(item[0]) == 1)]
    texts = [*SPECIAL[:3], *(f"<0x{i:02X}>" for i in range(256)), *pieces, *SPECIAL[3:]]
    vocab = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    merges = [
        (piece[:i], piece[i:])
        for piece in pieces
        for i in range(1, len(piece))
        if piece[:i] in vocab and piece[i:] in vocab
    ]
    model = models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return tokenizer.to_str()


def sentencepiece(kind: str = "prepend", *, size: int = 480, bos: bool = True) -> Any:
    """A BPE as made from SentencePiece; kind: prepend (as Llama 2), metaspace or plain."""
    tokenizer = tokenizers.Tokenizer.from_str(_sentencepiece(size))
    replace = tokenizers.normalizers.Replace(" ", "▁")
    if kind == "metaspace":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        prepend = [tokenizers.normalizers.Prepend("▁")] * (kind == "prepend")
        tokenizer.normalizer = tokenizers.normalizers.Sequence([*prepend, replace])
    return _wrapped(tokenizer, bos, unk_token="<unk>")


def model(kind: str, seed: int = 0, **options: Any) -> Any:
    """A random model with grouped queries; norms and biases are random as well."""
    shape = {"vocab_size": 768, "bos_token_id": 1, "eos_token_id": 2, **SHAPE} | options
    config = {
        "llama": tf.LlamaConfig,
        "mistral": tf.MistralConfig,
        "qwen2": tf.Qwen2Config,
        "qwen3": tf.Qwen3Config,
    }[kind](**shape)
    torch.manual_seed(seed)
    made = tf.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for name, parameter in made.named_parameters():
        if parameter.dim() == 1:
            around = 0.0 if name.endswith("bias") else 1.0
            torch.nn.init.normal_(parameter, around, 0.1)
        else:
            torch.nn.init.normal_(parameter, 0.0, 0.06)
    return made


def save(
    folder: Path,
    made: Any,
    tokenizer: Any = None,
    form: AffineFormat = FORM,
    keep: tuple[str, ...] = ("lm_head",),
) -> Any:
    """Quantize a model in place by min-max and save it with a tokenizer; returns it."""
    weights = {name: layer.weight.data for name, layer in quantized_linears(made, keep)}
    replace_linears(made, form, keep)
    for name, weight in weights.items():
        layer = made.get_submodule(name)
        layer.codes, layer.scales, layer.offsets, _ = minmax(weight, form)
    made.config.quantization_config = AffineConfig(
        form.bits, form.tile, str(form.dtype).removeprefix("torch."), keep
    )
    made.save_pretrained(folder)
    (tokenizer or byte_level()).save_pretrained(folder)
    return made


def change(path: Path, **values: Any) -> None:
    """Set keys of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def small(root: Path, kind: str = "llama") -> Path:
    """A saved model of one decoder layer, in `root`/model."""
    save(root / "model", model(kind, num_hidden_layers=1))
    return root / "model"


def read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The metadata and the tensors of a GGUF file."""
    import gguf

    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return fields, {tensor.name: tensor for tensor in reader.tensors}


def dequantized(tensor: Any) -> torch.Tensor:
    """The numbers of a tensor, as the gguf package reads them."""
    import gguf

    values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    return torch.from_numpy(values.astype(np.float32, copy=True))


def rewrite(saved: Path, **values: torch.Tensor | None) -> None:
    """Replace tensors, or leave them out; a name is written with __ for its dots."""
    path = saved / "model.safetensors"
    tensors = load_file(path) | {name.replace("__", "."): v for name, v in values.items()}
    save_file({k: v for k, v in tensors.items() if v is not None}, path, metadata={"format": "pt"})
