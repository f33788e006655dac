"""compare.html: the table and a figure of accuracy against counted MACs (and against latency, where measured)."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure

from afds.compare.table import HEAD, Cell, texts
from afds.files import write_atomic
from afds.report.text import text

_STYLE = """
:root { color-scheme: light; }
body { margin: 0 auto; max-width: 64rem; padding: 2rem 1.25rem 4rem; background: #fff; color: #1b1f24;
       font: 16px/1.5 system-ui, "Segoe UI", "Noto Sans", "DejaVu Sans", sans-serif; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin-top: 2.5rem; border-bottom: 1px solid #d9dee4; }
svg { width: 100%; height: auto; max-width: 46rem; } .scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; width: 100%; }
th { text-align: right; color: #59636e; border-bottom: 1px solid #d9dee4; padding: .35rem .55rem; }
td { text-align: right; padding: .25rem .55rem; border-bottom: 1px solid #eceff2; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } .note { color: #59636e; font-size: .85rem; }
"""


def write_page(out: Path, found: Sequence[Cell], note: str) -> Path:
    """Write `out`/compare.html; it opens offline. Returns its path."""
    parts = []
    for data in dict.fromkeys(cell.data for cell in found):
        mine = [cell for cell in found if cell.data == data]
        figures = figure(mine, "macs") + (figure(mine, "latency_ms") if any(c.latency_ms for c in mine) else "")
        head = "".join(f"<th>{text(name)}</th>" for name in HEAD)
        body = "".join("<tr>" + "".join(f"<td>{text(t)}</td>" for t in texts(cell)) + "</tr>" for cell in mine)
        parts.append(f"<h2>{text(data)}</h2>{figures}<div class='scroll'><table><tr>{head}</tr>{body}</table></div>")
    page = (f"<!doctype html><html lang='en'><head><meta charset='utf-8'>"
            f"<meta name='viewport' content='width=device-width, initial-scale=1'><title>afds compare</title>"
            f"<style>{_STYLE}</style></head><body><h1>Methods compared</h1>{''.join(parts)}"
            f"<p class='note'>{text(note)}</p></body></html>")  # fmt: skip
    write_atomic(out / "compare.html", page)
    return out / "compare.html"


def figure(found: Sequence[Cell], key: str) -> str:
    """SVG: accuracy against counted MACs or latency, logarithmic, a line for each row, bars of one deviation."""
    cost = {"macs": ("M MACs per image, counted", 1e-6), "latency_ms": ("latency, ms", 1.0)}[key]
    with rc_context({"svg.fonttype": "none", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
                     "text.parse_math": False}):  # fmt: skip
        drawing = Figure(figsize=(8.2, 4.4), layout="constrained")
        axes = drawing.subplots()
        for i, row in enumerate(dict.fromkeys(cell.row for cell in found)):
            shown = [(getattr(c, key) * cost[1], 100 * c.mean, 100 * (c.spread or 0)) for c in found
                     if c.row == row and c.mean is not None and getattr(c, key) is not None]  # fmt: skip
            if not shown:
                continue
            x, y, bar = zip(*sorted(shown), strict=True)
            marker, colour = "osD^vP*X<>"[(i + i // 10) % 10], f"C{i % 10}"
            axes.errorbar(x, y, bar if any(bar) else None, label=row, marker=marker, color=colour, markersize=5,
                          capsize=2, linewidth=1.3, linestyle="-" if i < 10 else "--")  # fmt: skip
        axes.set_xscale("log")
        axes.set_xlabel(cost[0])
        axes.set_ylabel("test accuracy, %")
        axes.grid(color="#e3e7eb", linewidth=0.6, which="both")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("{x:g}")
        axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
        stream = io.StringIO()
        drawing.savefig(stream, format="svg", metadata={"Date": None})
    svg = re.sub(r"<metadata>.*?</metadata>", "", stream.getvalue(), flags=re.DOTALL)
    return svg[svg.index("<svg") :]
