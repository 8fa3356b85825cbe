"""Sizes of memory, as users write and read them."""

from __future__ import annotations

import re

from ..errors import ConfigError

GIB = 2**30
_UNITS = {"": GIB, "g": GIB, "gb": GIB, "gib": GIB, "m": 2**20, "mb": 2**20, "mib": 2**20}


def parse_size(text: str) -> int:
    """'24GB', '24GiB', '24' or '24000MiB' in bytes.

    A card sold as 24 GB holds 24 GiB, or a little less; so GB is read as GiB.

    Raises:
        ConfigError: no such size.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    unit = _UNITS.get(found[2].lower()) if found else None
    size = int(float(found[1]) * unit) if found and unit else 0
    if not size:
        raise ConfigError(
            f"gpu_memory={text!r} must be a size above 0 such as 24GB, 24 or 22.5GiB (all in units "
            "of 2^30 bytes, as cards are sold), or 24000MiB"
        )
    return size


def gib(size: int) -> str:
    """Bytes in GiB."""
    return f"{size / GIB:.2f} GiB"
