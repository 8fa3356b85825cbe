"""Which of llama.cpp's pre-tokenizers splits text as a byte-level tokenizer.json does.

llama.cpp has no way to read a regular expression: `tokenizer.ggml.pre` names one of those that are
compiled in. A pre-tokenizer here is the list of the expressions that split text one after the
other; a name is given only where all of them are equal, character by character. llama.cpp stands
in for two of them with something simpler: under gpt-4o and tekken, which split where the case
changes, it splits words at combining marks too (Hindi, Thai, ...).

Source: llm_tokenizer_bpe and llama_vocab::impl::load in src/llama-vocab.cpp of llama.cpp.
"""

from __future__ import annotations

from typing import Any

from ...errors import ConfigError

_ENGLISH = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_CASED = (r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]")
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"

# what ByteLevel does with use_regex
GPT_2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def _words(digits: str) -> str:
    """The expression of Llama 3 and its relatives, which differ in how many digits they keep."""
    start, marks = r"[^\r\n\p{L}\p{N}]?", r" ?[^\s\p{L}\p{N}]+[\r\n]*"
    return rf"{_ENGLISH}|{start}\p{{L}}+|{digits}|{marks}|{_SPACES}"


def _cased(digits: str, ending: str) -> str:
    """The expression of GPT-4o and its relatives, which split where the case changes."""
    upper, lower = _CASED
    start = r"[^\r\n\p{L}\p{N}]?"
    return (
        rf"{start}{upper}*{lower}+{ending}|{start}{upper}+{lower}*{ending}|{digits}"
        rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
    )


QWEN_2, LLAMA_3 = _words(r"\p{N}"), _words(r"\p{N}{1,3}")
QWEN_3_5 = (
    rf"{_ENGLISH}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}"
)
GPT_4O, TEKKEN = _cased(r"\p{N}{1,3}", f"{_ENGLISH}?"), _cased(r"\p{N}", "")

# expressions, and whether a word of the vocabulary is taken whole (ignore_merges) -> the name
KNOWN: dict[tuple[tuple[str, ...], bool], str] = {
    ((GPT_2,), False): "gpt-2",
    ((r"\p{N}", GPT_2), False): "smollm",
    ((QWEN_2,), False): "qwen2",
    ((QWEN_3_5,), False): "qwen35",
    ((LLAMA_3,), True): "llama-bpe",
    ((LLAMA_3,), False): "smaug-bpe",
    ((GPT_4O,), False): "gpt-4o",
    ((TEKKEN,), True): "tekken",
}


def pre_tokenizer(tokenizer: dict[str, Any], folder: object) -> str:
    """The value of `tokenizer.ggml.pre`.

    Args:
        tokenizer: the parsed tokenizer.json of a byte-level BPE.
        folder: the model, for the message.

    Raises:
        ConfigError: llama.cpp has no pre-tokenizer that is known to split text as this one.
    """
    steps = [expression(step) for step in pre_steps(tokenizer)]
    splits = tuple(step for step in steps if step)
    whole = bool(tokenizer["model"].get("ignore_merges"))
    name = KNOWN.get((splits, whole)) if None not in steps else None
    if name is None:
        raise ConfigError(
            f"{folder}: its pre-tokenizer is none of those known to be in llama.cpp "
            f"({', '.join(sorted(KNOWN.values()))}); name the one that splits text in the same way "
            'with tokenizer_pre="..." (--tokenizer_pre)'
        )
    return name


def pre_steps(tokenizer: dict[str, Any]) -> list[dict[str, Any]]:
    """The pre-tokenizers of a tokenizer.json, one after the other."""
    found = tokenizer.get("pre_tokenizer") or {"type": "Sequence", "pretokenizers": []}
    return found["pretokenizers"] if found["type"] == "Sequence" else [found]


def expression(step: dict[str, Any]) -> str | None:
    """The regular expression of a pre-tokenizer; "" splits nothing, None is not understood."""
    if step["type"] == "ByteLevel" and not step.get("add_prefix_space"):
        return GPT_2 if step.get("use_regex", True) else ""
    if step["type"] == "Digits":
        return r"\p{N}" if step.get("individual_digits") else r"\p{N}+"
    plain = step.get("behavior") == "Isolated" and not step.get("invert")
    if step["type"] == "Split" and plain:
        return step["pattern"].get("Regex")
    return None
