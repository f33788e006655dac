"""The table of `afds measure`: measured speed-up beside the MACs ratio."""

from __future__ import annotations

from typing import Any

from afds.report.facts import Facts, number
from afds.report.text import DASH, TIMES, text

_COLUMNS = ("threads", "batch", "network", "runtime", "median ms", "p90 ms", "speed-up", "fewer MACs", "share")
NOTE = (
    "Speed-up: over the fastest dense row of the same threads and batch. Share: the part of the MACs ratio that "
    "became time."
)
MAX_ROWS = 500


def table(facts: Facts) -> str:
    """Empty where nothing was measured."""
    rows = facts.measured.get("rows")
    found = [row for row in rows if isinstance(row, dict)][:MAX_ROWS] if isinstance(rows, list) else []
    if not found:
        return ""
    head = "".join(f'<th class="{_css(name)}">{name}</th>' for name in _COLUMNS)
    body = "".join(f"<tr>{_cells(row)}</tr>" for row in found)
    verdict = facts.measured.get("verdict")
    lines = [line for line in verdict if isinstance(line, str)] if isinstance(verdict, list) else []
    said = "".join(f"<p>{text(line)}</p>" for line in lines)
    hardware = facts.measured.get("hardware")
    cpu = hardware.get("cpu") if isinstance(hardware, dict) else None
    where = f" {text(cpu)}, {text(facts.measured.get('when', ''))}." if cpu else ""
    return (
        f'{said}<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        f'<p class="note">{NOTE}{where}</p>'
    )


def _runtime(row: dict[str, Any]) -> str:
    precision = row.get("precision", "float32")  # older files have none
    return str(row.get("runtime", "")) + ("" if precision == "float32" else f" {precision}")


def _cells(row: dict[str, Any]) -> str:
    def shown(key: str, digits: int, unit: str = "") -> str:
        value = number(row.get(key))
        return DASH if value is None else f"{value:.{digits}f}{unit}"

    values = (
        shown("threads", 0), shown("batch", 0), text(row.get("form", ""), 40), text(_runtime(row), 40),
        shown("median_ms", 2), shown("p90_ms", 2), shown("speedup", 2, TIMES), shown("macs_ratio", 2, TIMES),
        shown("share", 2),
    )  # fmt: skip
    cells = zip(_COLUMNS, values, strict=True)
    return "".join(f'<td class="{_css(name)}">{value}</td>' for name, value in cells)


def _css(name: str) -> str:
    return "name" if name in ("network", "runtime") else "num"
