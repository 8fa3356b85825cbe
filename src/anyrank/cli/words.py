"""What the verbs share: a parser whose errors are one line, and the kinds of its values."""

from __future__ import annotations

import argparse
import math
import re
from typing import NoReturn

from ..errors import ConfigError


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see {self.prog} --help")


class _Wide(argparse.HelpFormatter):
    """An option and its text on one line, where they fit."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30)


def verb_parser(verb: str, text: str) -> argparse.ArgumentParser:
    """A parser for one verb."""
    return _Parser(
        prog=f"anyrank {verb}", description=text, allow_abbrev=False, formatter_class=_Wide
    )


def count(text: str) -> int:
    """A whole number from 1."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number from 1")
    return int(text)


def count_from_0(text: str) -> int:
    """A whole number from 0."""
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number from 0")
    return int(text)


def names(text: str) -> list[str]:
    """Words with commas between them."""
    found = [word.strip() for word in text.split(",") if word.strip()]
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} must name at least one, such as a,b")
    return found


def numbers(text: str) -> int:
    """A count of numbers with k, M or G for 10^3, 10^6 or 10^9: '2M', '1.5M', '500k', '59136'."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([kKmMgG]?)", text.strip())
    size = round(float(found[1]) * 1000 ** " kmg".index(found[2].lower() or " ")) if found else 0
    if not size:
        raise argparse.ArgumentTypeError(f"{text!r} must be a count above 0 such as 2M or 500k")
    return size


def nats(text: str) -> float:
    """A loss."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number from 0, in nats per token")
    return value


def regex(text: str) -> str:
    """A regular expression."""
    try:
        re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no regular expression ({error})") from None
    return text
