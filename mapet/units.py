"""Bytes, rates, counts and durations: from what people type to numbers, and back."""

from __future__ import annotations

import re
from collections.abc import Mapping

from mapet.errors import ConfigError

BYTES = {"MB": 10**6, "GB": 10**9, "TB": 10**12, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
MOST = 1e18
"""More bytes, images or seconds than anybody has."""
SECONDS = {"s": 1, "min": 60, "m": 60, "h": 3600, "d": 86400}


def parse_bytes(text: str) -> int:
    """Bytes from text such as 16GB (10^9) or 16GiB (2^30). ConfigError says what is allowed."""
    value = _number(r"([MGT]i?B)", text, BYTES, upper=True)
    if value < 1:
        raise ConfigError(f"memory is a number with MB, GB (10^9), MiB or GiB (2^30), such as 16GB; got {text!r}")
    return int(value)


def parse_link(text: str) -> float:
    """Bytes per second from text such as 400Gb (bits per second) or 50GB (bytes). ConfigError says what is allowed."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([MGT])([bB])(?:it)?(?:/s|ps)?", text.strip())
    value = float(match[1]) * {"M": 1e6, "G": 1e9, "T": 1e12}[match[2]] if match else 0
    if match is None or not 0 < value < MOST:
        raise ConfigError(f"a link is bits (Gb) or bytes (GB) per second, such as 400Gb or 50GB; got {text!r}")
    return value / 8 if match[3] == "b" else value


def parse_count(text: str) -> int:
    """A number of images from text such as 1281167, 1.28M or 1B. ConfigError says what is allowed."""
    value = round(_number(r"([KMB]?)", text, {"": 1, "K": 1e3, "M": 1e6, "B": 1e9}, upper=True))
    if value < 1:
        raise ConfigError(f"a number of images may end in K, M or B, such as 1.28M; got {text!r}")
    return value


def parse_rate(text: str) -> float:
    """FLOP per second from text such as 312T, 989.4T or 2.25P. ConfigError says what is allowed."""
    value = _number(r"([GTP])", text, {"G": 1e9, "T": 1e12, "P": 1e15})
    if value <= 0:
        raise ConfigError(f"FLOP per second end in G, T or P, such as 312T; got {text!r}")
    return value


def parse_duration(text: str) -> float:
    """Seconds from text such as 24h, 90min or 2d. ConfigError says what is allowed."""
    value = _number(f"({'|'.join(SECONDS)})", text, SECONDS)
    if value <= 0:
        raise ConfigError(f"a time is a number with s, min, h or d, such as 24h; got {text!r}")
    return value


def gib(number: float) -> str:
    """Bytes as text, in GiB, or MiB below one."""
    return f"{number / 2**30:.2f} GiB" if number >= 2**30 else f"{number / 2**20:.0f} MiB"


def metric(value: float, unit: str) -> str:
    """A number with a decimal prefix."""
    for prefix in ("", "k", "M", "G", "T", "P"):
        if value < 1000 or prefix == "P":
            break
        value /= 1000
    return f"{value:.3g} {prefix}{unit}"


def duration(seconds: float) -> str:
    """Seconds as text, in the unit that suits them."""
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min"), (1, "s")):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1000:.3g} ms"


def _number(unit: str, text: str, sizes: Mapping[str, float], *, upper: bool = False) -> float:
    """Number times unit, or 0 where the text is something else, or absurdly much."""
    match = re.fullmatch(rf"([0-9]+(?:\.[0-9]+)?)\s*{unit}", text.strip(), flags=re.IGNORECASE if upper else 0)
    value = float(match[1]) * sizes[match[2].upper() if upper else match[2]] if match else 0.0
    return value if value < MOST else 0.0
