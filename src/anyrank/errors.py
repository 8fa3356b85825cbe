"""Errors: one family, each member also the stdlib error that a caller would expect.

Every text names the thing, what it got, what it needs and the way out, on one line:
"q_proj: pool=48 must divide d_in=4096; nearest divisors: 32, 64".
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class AnyRankError(Exception):
    """The parent of every error that anyrank raises on purpose."""


class ConfigError(AnyRankError, ValueError):
    """An option is unknown, or its value makes no sense."""


class GeometryError(AnyRankError, ValueError):
    """An adapter does not fit the shape of a layer."""


class RankError(AnyRankError, ValueError):
    """A rank lies outside of what an adapter holds or may use."""


class LayerError(AnyRankError, TypeError):
    """A layer is of a kind that no adapter can be attached to."""


class MergeError(AnyRankError, RuntimeError):
    """An adapter cannot be written into its base weight without loss."""


class DataError(AnyRankError, ValueError):
    """A data set, or a row of it, cannot be trained on."""


class RunError(AnyRankError, OSError):
    """A run folder, an output folder or the disk is not as needed."""


class MissingPackageError(AnyRankError, ImportError):
    """An optional package is needed for what was asked."""


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of an 'unknown name' message: the closest known names, or all of them."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if close:
        return f"did you mean {', '.join(close[:-1]) + ' or ' if close[1:] else ''}{close[-1]}?"
    return f"known: {', '.join(known)}"
