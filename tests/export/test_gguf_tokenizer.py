"""The vocabulary of a GGUF file; test_llama_cpp compares the tokens that llama.cpp makes of it."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import tokenizers
import transformers as tf
from gguf_models import BYTE_LEVEL, byte_level, read, rewrite, sentencepiece, small
from safetensors.torch import load_file
from tokenizers import models, normalizers, pre_tokenizers, processors

from anyrank.errors import ConfigError, RunError
from anyrank.export.gguf import export_gguf
from anyrank.export.gguf.tokenizer import Vocabulary, read_vocabulary

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
NO_IDS = SimpleNamespace()
ROWS = 800


def vocabulary(tokenizer: Any, folder: Any, config: Any = NO_IDS, **options: Any) -> Vocabulary:
    tokenizer.save_pretrained(folder)
    return read_vocabulary(folder, ROWS, config, **options)


def refusal(tokenizer: Any, folder: Any, **options: Any) -> str:
    with pytest.raises(ConfigError) as error:
        vocabulary(tokenizer, folder, **options)
    text = str(error.value)
    assert text.startswith(f"{folder}: ")
    return text.removeprefix(f"{folder}: ")


def altered(tokenizer: Any, **parts: Any) -> Any:
    """A tokenizer with parts of its tokenizers.Tokenizer replaced."""
    for name, part in parts.items():
        setattr(tokenizer.backend_tokenizer, name, part)
    return tokenizer


@pytest.mark.parametrize("name", BYTE_LEVEL)
def test_a_pre_tokenizer_is_recognised(name, tmp_path):
    assert vocabulary(byte_level(name), tmp_path).pre == name


def test_the_expressions_are_those_of_published_tokenizers():
    """Letter by letter: what tokenizer.json of Qwen2, Llama 3, Qwen3.5, GPT-4o and Nemo hold."""
    found = {
        name: steps[0].__getstate__().decode() if len(steps) > 1 else ""
        for name, (steps, _) in BYTE_LEVEL.items()
    }
    words = r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    english = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
    tekken = (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?"
        r"[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    expected = {
        "qwen2": english + words,
        "llama-bpe": english + words.replace(r"|\p{N}|", r"|\p{N}{1,3}|"),
        "qwen35": english
        + words.replace(r"?\p{L}+", r"?[\p{L}\p{M}]+").replace(r"[^\s\p{L}", r"[^\s\p{L}\p{M}"),
        "tekken": tekken,
        "gpt-4o": tekken.replace("+|[^", f"+{english}?|[^", 1).replace(
            r"*|\p{N}|", rf"*{english}?|\p{{N}}{{1,3}}|"
        ),
    }
    for name, wanted in expected.items():
        assert json.loads(found[name])["pattern"] == {"Regex": wanted}, name


def test_a_byte_level_vocabulary(tmp_path):
    tokenizer = byte_level("qwen2", bos=True)
    tokenizer.pad_token = "<|end|>"
    found = vocabulary(tokenizer, tmp_path)
    assert (found.model, found.add_bos, found.add_eos, found.space_prefix) == (
        "gpt2",
        True,
        False,
        False,
    )
    assert found.special == {"bos": 1, "eos": 2, "pad": 4}
    size = len(tokenizer)
    assert 500 < size < ROWS
    assert found.tokens[:size] == tokenizer.convert_ids_to_tokens(range(size))
    assert found.tokens[size:] == [f"[PAD{i}]" for i in range(size, ROWS)]
    inside = [NORMAL] * (size - 6)
    assert found.types == [CONTROL] * 5 + inside + [USER_DEFINED] + [UNUSED] * (ROWS - size)
    parsed = json.loads(tokenizer.backend_tokenizer.to_str())
    assert found.merges == [" ".join(pair) for pair in parsed["model"]["merges"]]
    assert found.scores == []


@pytest.mark.parametrize(
    ("kind", "prefix"), [("prepend", True), ("metaspace", True), ("plain", False)]
)
def test_a_vocabulary_from_sentencepiece(kind, prefix, tmp_path):
    tokenizer = sentencepiece(kind)
    found = vocabulary(tokenizer, tmp_path)
    assert (found.model, found.pre, found.add_bos, found.space_prefix) == (
        "llama",
        "default",
        True,
        prefix,
    )
    assert found.special == {"bos": 1, "eos": 2, "unk": 0}
    assert found.types[:3] == [UNKNOWN, CONTROL, CONTROL]
    assert found.types[3:259] == [BYTE] * 256
    assert found.merges == []
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    first = {}
    for rank, (left, right) in enumerate(merges):
        first.setdefault(left + right, rank)
    assert len(first) < len(merges)  # some tokens can be split in several ways
    for token, score in zip(found.tokens, found.scores, strict=True):
        assert score == -first.get(token, len(merges))


@pytest.mark.parametrize("eos", [False, True])
@pytest.mark.parametrize("bos", [False, True])
def test_what_is_added_to_a_text_is_what_the_tokenizer_adds(bos, eos, tmp_path):
    single = "<s> " * bos + "$A" + " </s>" * eos
    post = processors.TemplateProcessing(single=single, special_tokens=[("<s>", 1), ("</s>", 2)])
    found = vocabulary(altered(byte_level(), post_processor=post), tmp_path)
    assert (found.add_bos, found.add_eos) == (bos, eos)


def test_special_ids_that_the_tokenizer_lacks_come_from_the_configuration(tmp_path):
    tokenizer = byte_level()
    tokenizer.bos_token = tokenizer.eos_token = None
    found = vocabulary(tokenizer, tmp_path, SimpleNamespace(bos_token_id=3, eos_token_id=[4, 2]))
    assert found.special == {"bos": 3, "eos": 4}
    assert refusal(tokenizer, tmp_path) == (
        "neither its tokenizer nor its config.json names an eos token, and llama.cpp would stop "
        "at token 11 instead; set eos_token in tokenizer_config.json"
    )


def test_the_file_has_the_vocabulary_and_the_template(tmp_path):
    saved = small(tmp_path)
    tokenizer = byte_level("smollm")
    tokenizer.chat_template = "{{ bos_token }}{{ messages[0].content }}"
    tokenizer.save_pretrained(saved)
    assert (saved / "chat_template.jinja").is_file()
    fields, _ = read(export_gguf(saved, tmp_path / "out.gguf"))
    found = read_vocabulary(saved, 768, NO_IDS)
    assert {k: v for k, v in fields.items() if k.startswith("tokenizer.")} == {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": found.tokens,
        "tokenizer.ggml.token_type": found.types,
        "tokenizer.ggml.merges": found.merges,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.chat_template": "{{ bos_token }}{{ messages[0].content }}",
    }


def test_scores_and_several_templates_in_the_file(tmp_path):
    saved = small(tmp_path)
    tokenizer = sentencepiece()
    tokenizer.chat_template = {"default": "{{ 1 }}", "tool_use": "{{ 2 }}"}
    tokenizer.save_pretrained(saved)
    fields, _ = read(export_gguf(saved, tmp_path / "out.gguf"))
    found = read_vocabulary(saved, 768, NO_IDS)
    assert fields["tokenizer.ggml.scores"] == found.scores
    assert "tokenizer.ggml.merges" not in fields
    assert fields["tokenizer.ggml.unknown_token_id"] == 0
    assert fields["tokenizer.chat_template"] == "{{ 1 }}"
    assert fields["tokenizer.chat_template.tool_use"] == "{{ 2 }}"


UNKNOWN_PRE = (
    "its pre-tokenizer is none of those known to be in llama.cpp (gpt-2, gpt-4o, llama-bpe, qwen2, "
    "qwen35, smaug-bpe, smollm, tekken); name the one that splits text in the same way with "
    'tokenizer_pre="..." (--tokenizer_pre)'
)


@pytest.mark.parametrize(
    "steps",
    [
        [pre_tokenizers.ByteLevel(add_prefix_space=True)],
        [pre_tokenizers.Digits(False), pre_tokenizers.ByteLevel(add_prefix_space=False)],
        [pre_tokenizers.Punctuation(), pre_tokenizers.ByteLevel(add_prefix_space=False)],
        [
            pre_tokenizers.Split(tokenizers.Regex(r"\p{N}"), "removed"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ],
        [
            pre_tokenizers.Split(tokenizers.Regex(r"\p{N}+x"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ],
    ],
)
def test_an_unknown_pre_tokenizer_is_refused_unless_it_is_named(steps, tmp_path):
    tokenizer = altered(byte_level(), pre_tokenizer=pre_tokenizers.Sequence(steps))
    assert refusal(tokenizer, tmp_path) == UNKNOWN_PRE
    assert vocabulary(tokenizer, tmp_path, tokenizer_pre="starcoder").pre == "starcoder"


def test_whole_words_count_for_the_name(tmp_path):
    tokenizer = byte_level("qwen2")
    tokenizer.backend_tokenizer.model.ignore_merges = True
    assert refusal(tokenizer, tmp_path) == UNKNOWN_PRE


def test_tokenizers_that_llama_cpp_does_not_read_are_refused(tmp_path):
    out = "try --to mlx or --to hqq"
    lower = altered(byte_level(), normalizer=normalizers.Lowercase())
    assert refusal(lower, tmp_path) == (
        f"its tokenizer has the normalizer Lowercase, which llama.cpp lacks; {out}"
    )
    assert vocabulary(altered(byte_level(), normalizer=normalizers.NFC()), tmp_path).pre == "gpt-2"
    words = tokenizers.Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    wrapped = tf.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="a")
    assert refusal(wrapped, tmp_path) == (
        f"its tokenizer is WordPiece; a GGUF file is written for BPE; {out}"
    )
    plain = altered(sentencepiece(), normalizer=normalizers.NFKC())
    assert refusal(plain, tmp_path) == (
        "its tokenizer is neither a byte-level BPE nor one made from SentencePiece with byte "
        f"fallback; {out}"
    )
    post = processors.TemplateProcessing(
        single="<s> <|turn|> $A", special_tokens=[("<s>", 1), ("<|turn|>", 3)]
    )
    assert refusal(altered(byte_level(), post_processor=post), tmp_path) == (
        "its tokenizer makes [1, 3, 69] of the text [69], but llama.cpp can add no more than bos "
        f"and eos; {out}"
    )
    with pytest.raises(ConfigError) as error:
        vocabulary(sentencepiece(), tmp_path, tokenizer_pre="gpt-2")
    assert str(error.value) == (
        f"tokenizer_pre=gpt-2: the tokenizer of {tmp_path} is SentencePiece-like and has no "
        "pre-tokenizer in llama.cpp; leave the option out"
    )


@pytest.mark.parametrize("change", ["one split is no merge", "merges of a token stand apart"])
def test_merges_that_no_scores_can_express_are_refused(change, tmp_path):
    tokenizer = sentencepiece()
    tokenizer.save_pretrained(tmp_path)
    parsed = json.loads((tmp_path / "tokenizer.json").read_text())
    merges = parsed["model"]["merges"]
    made = [left + right for left, right in merges]
    twice = next(i for i in range(1, len(made)) if made[i] == made[i - 1])
    pair = merges.pop(twice)
    if change == "merges of a token stand apart":
        merges.append(pair)
    (tmp_path / "tokenizer.json").write_text(json.dumps(parsed))
    with pytest.raises(ConfigError) as error:
        read_vocabulary(tmp_path, ROWS, NO_IDS)
    assert str(error.value) == (
        f"{tmp_path}: the merges of its tokenizer were not made from SentencePiece scores, and "
        "llama.cpp would merge in another order; try --to mlx or --to hqq"
    )


def test_a_tokenizer_that_does_not_belong_to_the_model(tmp_path):
    saved = small(tmp_path)
    values = load_file(saved / "model.safetensors")["model.embed_tokens.weight"]
    rewrite(saved, model__embed_tokens__weight=values[:500].contiguous())
    with pytest.raises(RunError) as error:
        export_gguf(saved, tmp_path / "out.gguf")
    assert str(error.value) == (
        f"{saved}: its tokenizer has ids up to 700, but its embeddings hold 500 rows; copy the "
        "tokenizer of the model into it"
    )


def test_a_folder_without_a_tokenizer(tmp_path):
    saved = small(tmp_path)
    for path in saved.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(RunError) as error:
        export_gguf(saved, tmp_path / "out.gguf")
    text = str(error.value)
    assert text.startswith(f"{saved}: holds no tokenizer that can be read (")
    assert text.endswith("); copy the tokenizer files of the model into it")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
