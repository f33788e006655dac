"""The table of `afds measure`: measured speed-up beside the MACs ratio."""

from __future__ import annotations

from typing import Any

from afds.report.facts import Facts, number, sub
from afds.report.text import DASH, TIMES, text

_COLUMNS = ("threads", "batch", "network", "runtime", "median ms", "p90 ms", "speed-up", "fewer MACs", "share")
NOTE = (
    "Speed-up: over the fastest dense row of the same threads and batch. Share: the part of the MACs ratio that "
    "became time."
)
MAX_ROWS = 500


def table(facts: Facts) -> str:
    """Empty where nothing was measured."""
    found = _rows(facts)
    if not found:
        return ""
    head = "".join(f'<th class="{_css(name)}">{name}</th>' for name in _COLUMNS)
    body = "".join(f"<tr>{_cells(row)}</tr>" for row in found)
    hardware = facts.measured.get("hardware")
    cpu = hardware.get("cpu") if isinstance(hardware, dict) else None
    where = f" {text(cpu)}, {text(facts.measured.get('when', ''))}." if cpu else ""
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        f'<p class="note">{NOTE}{where}</p>'
    )


def sentences(facts: Facts) -> list[str]:
    """What `afds measure` said of each number of threads and batch; nothing where other weights were timed."""
    found = facts.measured.get("verdict")
    return [line for line in found if isinstance(line, str)] if _rows(facts) and isinstance(found, list) else []


def headline(facts: Facts) -> tuple[float, list[str]] | None:
    """How many times faster than the fastest dense row, with the fewest threads and images a call, and of what."""
    own = str(facts.measured.get("own", "dynamic"))  # older files do not say
    timed = [(form, threads, batch, ms) for row in _rows(facts) if (form := row.get("form")) in ("dense", own)
             and (threads := number(row.get("threads"))) and (batch := number(row.get("batch")))
             and (ms := number(row.get("median_ms")))]  # fmt: skip
    fewest = min(((threads, batch) for _, threads, batch, _ in timed), default=None)
    best = {form: min((ms for f, *setting, ms in timed if f == form and tuple(setting) == fewest), default=0.0)
            for form in ("dense", own)}  # fmt: skip
    if fewest is None or not all(best.values()):
        return None
    threads, batch = fewest
    counted = f"{threads:.0f} thread{'s' * (threads > 1)}, batch {batch:.0f}"
    return best["dense"] / best[own], [f"{best[own]:.2f} ms, dense {best['dense']:.2f} ms", counted]


def _rows(facts: Facts) -> list[dict[str, Any]]:
    timed, own = facts.measured.get("weights_sha256"), sub(facts.structure, "weights").get("sha256")
    rows = facts.measured.get("rows")
    if (timed and timed != own) or not isinstance(rows, list):  # older files name no weights
        return []
    return [row for row in rows if isinstance(row, dict)][:MAX_ROWS]


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
