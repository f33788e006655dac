"""Values from files as text for the page: escaped, rounded, with their unit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any

from afds.report.facts import number

DASH, TIMES, PLUS_MINUS, DOT = "\u2013", "\u00d7", "\u00b1", "\u00b7"
MAX_TEXT = 4000  # characters of any one text


def text(value: Any, limit: int = MAX_TEXT) -> str:
    """Any value from a file as harmless text."""
    whole = str(value)
    return escape(whole if len(whole) <= limit else whole[:limit] + " ...")


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def plain(value: float | None) -> str:
    """A count, or a mean of counts."""
    if value is None:
        return DASH
    return f"{value:.0f}" if value >= 100 or value == int(value) else f"{value:.1f}"


def macs(value: float | None) -> str:
    """MACs with three digits: 1.23 G."""
    if value is None:
        return DASH
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * size:
            digits = max(0, 2 - math.floor(math.log10(value / size)))
            return f"{value / size:.{digits}f} {unit}"
    return f"{value:.0f}"


def compact(value: Any) -> str:
    """A setting: long numbers with separators or rounded."""
    found = number(value)
    if found is None:
        return str(value)
    if abs(found) >= 100_000:
        return f"{found:,.0f}"
    return str(value) if isinstance(value, int) else f"{found:.4g}"


def margin(share: float, images: float | None) -> str:
    """Half the width of a 95 % interval, by Wilson's formula: what the number of images allows to say."""
    if images is None or images < 1 or not 0 <= share <= 1:
        return ""
    z = 1.96
    half = z / (1 + z * z / images) * math.sqrt(share * (1 - share) / images + z * z / (4 * images**2))
    return f"{PLUS_MINUS} {100 * half:.1f} on {images:,.0f} images"


def pairs(entries: Sequence[tuple[str, str]]) -> str:
    """A list of names and values; the values are HTML already."""
    if not entries:
        return ""
    return "<dl>" + "".join(f"<div><dt>{text(k)}</dt><dd>{v}</dd></div>" for k, v in entries) + "</dl>"
