"""The vocabulary of a model as GGUF metadata: tokens, merges or scores, special ids, template.

Two kinds of BPE, told apart by tokenizer.json:

    byte-level        tokenizer.ggml.model gpt2: merges, and the name of a pre-tokenizer
    SentencePiece     tokenizer.ggml.model llama: a score per token; the pair whose joint token has
                      the highest score is merged first, so the score is minus the rank of the
                      first merge that makes the token

The second is equal to the merges when each way to split a token into two tokens is a merge, and
merges that make the same token stand together. That is so in the files that Transformers made from
a SentencePiece model, and it is checked. What is left: after "first" or "always" of Metaspace,
Transformers adds no space before a text that starts with one; llama.cpp always does. llama.cpp
does not normalize to NFC, which Qwen's tokenizer does.

Source: src/llama-vocab.cpp of llama.cpp.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import ConfigError, RunError
from .pretokenizer import pre_steps, pre_tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
_SPACE = "\u2581"
_WAY_OUT = "try --to mlx or --to hqq"


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer as llama.cpp reads it.

    Attributes:
        model: tokenizer.ggml.model.
        pre: tokenizer.ggml.pre.
        tokens: one per row of the embeddings.
        types: the type of each token.
        special: bos, eos, unk, pad -> token.
        add_bos: whether a text gets the first token.
        add_eos: whether a text gets the last one.
        merges: "left right", of a byte-level BPE.
        scores: of a SentencePiece-like BPE.
        space_prefix: whether a text starts with a space.
        template: the chat template, or several by name.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    special: dict[str, int]
    add_bos: bool
    add_eos: bool
    merges: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    space_prefix: bool = False
    template: str | dict[str, str] | None = None

    def add_to(self, writer: Any) -> None:
        """Add everything to a GGUFWriter."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        if self.scores:
            writer.add_token_scores(self.scores)
        writer.add_token_types(self.types)
        if self.merges:
            writer.add_token_merges(self.merges)
        for name, token in self.special.items():
            getattr(writer, f"add_{name}_token_id")(token)
        writer.add_add_bos_token(self.add_bos)
        writer.add_add_eos_token(self.add_eos)
        writer.add_add_space_prefix(self.space_prefix)
        if isinstance(self.template, dict):
            named = [{"name": name, "template": text} for name, text in self.template.items()]
            writer.add_chat_template(named)
        elif self.template:
            writer.add_chat_template(self.template)


def read_vocabulary(
    folder: Path, rows: int, config: Any, tokenizer_pre: str | None = None
) -> Vocabulary:
    """The vocabulary of a model, as Transformers loads its tokenizer.

    Args:
        folder: where tokenizer.json and its companions lie.
        rows: rows of the embeddings; ids without a token are filled with unused ones.
        config: the configuration of the model, asked for special ids that the tokenizer lacks.
        tokenizer_pre: the pre-tokenizer; None: recognise it.

    Raises:
        RunError: there is no tokenizer, or it has more tokens than the model.
        ConfigError: llama.cpp would not split text as it does.
    """
    tokenizer = _load(folder)
    parsed = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens, types = _tokens(tokenizer, parsed, rows, folder)
    special = _special(tokenizer, config, rows, folder)
    add_bos, add_eos = _additions(tokenizer, special, folder)
    common = {
        "tokens": tokens,
        "types": types,
        "special": special,
        "add_bos": add_bos,
        "add_eos": add_eos,
        "template": tokenizer.chat_template,
    }
    if any(step["type"] == "ByteLevel" for step in pre_steps(parsed)):
        _check_byte_level(parsed, folder)
        merges = [" ".join(pair) for pair in _merges(parsed)]
        pre = tokenizer_pre or pre_tokenizer(parsed, folder)
        return Vocabulary("gpt2", pre, merges=merges, **common)
    prefix = _space_prefix(parsed, folder)
    if tokenizer_pre is not None:
        raise ConfigError(
            f"tokenizer_pre={tokenizer_pre}: the tokenizer of {folder} is SentencePiece-like and "
            "has no pre-tokenizer in llama.cpp; leave the option out"
        )
    scores = _scores(parsed, tokens, folder)
    return Vocabulary("llama", "default", scores=scores, space_prefix=prefix, **common)


def _load(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder))
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        raise RunError(
            f"{folder}: holds no tokenizer that can be read ({reason}); copy the tokenizer files "
            "of the model into it"
        ) from error
    kind = type(tokenizer).__name__
    if getattr(tokenizer, "backend_tokenizer", None) is not None:
        kind = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["type"]
    if kind != "BPE":
        raise ConfigError(
            f"{folder}: its tokenizer is {kind}; a GGUF file is written for BPE; {_WAY_OUT}"
        )
    return tokenizer


def _tokens(
    tokenizer: Any, parsed: dict[str, Any], rows: int, folder: Path
) -> tuple[list[str], list[int]]:
    """The text and the type of every token."""
    by_id = {index: token for token, index in parsed["model"]["vocab"].items()}
    added = {token["id"]: token for token in parsed["added_tokens"]}
    by_id |= {index: token["content"] for index, token in added.items()}
    if max(by_id) >= rows:
        raise RunError(
            f"{folder}: its tokenizer has ids up to {max(by_id)}, but its embeddings hold {rows} "
            "rows; copy the tokenizer of the model into it"
        )
    unknown = parsed["model"].get("unk_token")
    bytes_ = parsed["model"].get("byte_fallback")
    special = set(tokenizer.all_special_ids)
    tokens, types = [], []
    for index in range(rows):
        token = by_id.get(index)
        tokens.append(f"[PAD{index}]" if token is None else token)
        if token is None:
            types.append(UNUSED)
        elif unknown is not None and token == unknown:
            types.append(UNKNOWN)
        elif index in added:
            types.append(CONTROL if added[index]["special"] or index in special else USER_DEFINED)
        else:
            types.append(BYTE if bytes_ and _is_byte(token) else NORMAL)
    return tokens, types


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _special(tokenizer: Any, config: Any, rows: int, folder: Path) -> dict[str, int]:
    """bos, eos, unk and pad, as far as there are any."""
    found = {}
    for name in ("bos", "eos", "unk", "pad"):
        token = getattr(tokenizer, f"{name}_token_id", None)
        if token is None:
            token = getattr(config, f"{name}_token_id", None)
        token = token[0] if isinstance(token, list) else token
        if token is not None and 0 <= token < rows:
            found[name] = token
    if "eos" not in found:
        raise ConfigError(
            f"{folder}: neither its tokenizer nor its config.json names an eos token, and "
            "llama.cpp would stop at token 11 instead; set eos_token in tokenizer_config.json"
        )
    return found


def _additions(tokenizer: Any, special: dict[str, int], folder: Path) -> tuple[bool, bool]:
    """Whether a text gets bos in front and eos at its end."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    bos, eos = [special.get("bos")], [special["eos"]]
    for head, tail in itertools.product(([], bos), ([], eos)):
        if full == head + plain + tail:
            return bool(head), bool(tail)
    raise ConfigError(
        f"{folder}: its tokenizer makes {full} of the text {plain}, but llama.cpp can add no more "
        f"than bos and eos; {_WAY_OUT}"
    )


def _merges(parsed: dict[str, Any]) -> list[tuple[str, str]]:
    """The pairs to merge, first come first."""
    return [(left, right) for left, right in parsed["model"]["merges"]]


def _check_byte_level(parsed: dict[str, Any], folder: Path) -> None:
    """Raise when the model has an option that llama.cpp does not know."""
    options = ("byte_fallback", "continuing_subword_prefix", "end_of_word_suffix", "dropout")
    wrong = [f"{name}={parsed['model'][name]!r}" for name in options if parsed["model"].get(name)]
    normalizer = parsed.get("normalizer")
    if normalizer and normalizer["type"] != "NFC":
        wrong.append(f"the normalizer {normalizer['type']}")
    if wrong:
        raise ConfigError(
            f"{folder}: its tokenizer has {', '.join(wrong)}, which llama.cpp lacks; {_WAY_OUT}"
        )


def _space_prefix(parsed: dict[str, Any], folder: Path) -> bool:
    """Whether a SentencePiece-like tokenizer puts a space in front of a text."""
    normalizer, steps = parsed.get("normalizer") or {"type": "none"}, pre_steps(parsed)
    normal = normalizer["normalizers"] if normalizer["type"] == "Sequence" else [normalizer]
    known = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    prepend = {"type": "Prepend", "prepend": _SPACE}
    fitting = bool(parsed["model"].get("byte_fallback"))
    if fitting and not steps and normal in ([known], [prepend, known]):
        return prepend in normal
    metaspace = fitting and normal == [{"type": "none"}] and [s["type"] for s in steps]
    if metaspace == ["Metaspace"] and steps[0]["replacement"] == _SPACE and not steps[0]["split"]:
        return steps[0]["prepend_scheme"] != "never"
    raise ConfigError(
        f"{folder}: its tokenizer is neither a byte-level BPE nor one made from SentencePiece with "
        f"byte fallback; {_WAY_OUT}"
    )


def _scores(parsed: dict[str, Any], tokens: list[str], folder: Path) -> list[float]:
    """Minus the rank of the first merge that makes a token."""
    merges, vocab = _merges(parsed), parsed["model"]["vocab"]
    made = [left + right for left, right in merges]
    first = {}
    for rank, token in enumerate(made):
        first.setdefault(token, rank)
    together = sum(1 for _ in itertools.groupby(made)) == len(first)
    pairs = set(merges)
    outside = {token["content"] for token in parsed["added_tokens"]}
    complete = all(
        (token[:i], token[i:]) in pairs
        for token in vocab
        if token not in outside and not _is_byte(token)
        for i in range(1, len(token))
        if token[:i] in vocab and token[i:] in vocab
    )
    if not (together and complete):
        raise ConfigError(
            f"{folder}: the merges of its tokenizer were not made from SentencePiece scores, and "
            f"llama.cpp would merge in another order; {_WAY_OUT}"
        )
    return [-float(first.get(token, len(merges))) for token in tokens]
