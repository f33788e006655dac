"""The table: per data set, row and budget the mean over seeds, its spread, and paired differences.

Two columns of differences, both paired: against the reference row at the same budget, and against the first row of the
comparison that fine-tunes the dense network.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from afds.compare.plan import two_steps
from afds.config import FitConfig, parse_method
from afds.files import write_atomic, write_json
from afds.stats import Difference, paired, paired_images, spread

HEAD = ("method", "budget", "seeds", "test", "MACs", "M MACs", "vs ref.", "vs dense", "s")


@dataclass(frozen=True)
class Cell:
    """One row of the table."""

    data: str
    row: str
    budget: str
    seeds: int
    failed: int
    mean: float | None
    spread: float | None
    macs: float | None
    ratio: float | None
    latency_ms: float | None
    reference: Difference | None
    dense: Difference | None
    multiples: dict[str, float]
    """Of learning rate and weight, as tuning chose them."""
    seconds: float | None = None
    """Wall time of one run, without that of its base."""
    epochs: int | None = None
    """That one network has learned for in all, its base included."""
    dense_row: str = ""
    """What `dense` is the difference to."""


def cells(lines: Sequence[dict[str, Any]], reference: str) -> list[Cell]:
    """From the lines of trials; rows keep the order in which they were asked for."""
    finals = [line for line in lines if line["kind"] == "final"]
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for line in finals:
        groups.setdefault((line["data"], line["row"], line["budget"]), []).append(line)
    found = []
    for (data, row, budget), group in groups.items():
        good = [line for line in group if line["test"] is not None]
        whole_row, whole = next(
            ((r, g) for (d, r, b), g in groups.items() if d == data and b == "1x" and _is_dense(g)), ("", None)
        )
        other = groups.get((data, reference, budget)) if row != reference else None
        found.append(Cell(
            data, row, budget, len(good), sum(line["error"] is not None for line in group),
            statistics.mean(line["test"] for line in good) if good else None,
            spread([line["test"] for line in good]),
            _mean([line["macs"] for line in good]), _mean([line["ratio"] for line in good]),
            _mean([line["latency_ms"] for line in good]), _difference(group, other),
            _difference(group, whole) if whole is not group else None, group[0]["multiples"],
            _mean([line["seconds"] or None for line in good]), _epochs(group[0]["config"]), whole_row,
        ))  # fmt: skip
    return found


def _epochs(config: dict[str, Any]) -> int:
    cuts_a_base = two_steps(FitConfig(method=config["method"], budget=config["budget"]))
    return int(config["optim"]["epochs"] + (config["base_epochs"] if cuts_a_base else 0))


def _is_dense(group: list[dict[str, Any]]) -> bool:
    transfer, compression = parse_method(group[0]["config"]["method"])
    return compression == "dense" and transfer != "scratch"


def _difference(ours: list[dict[str, Any]], theirs: list[dict[str, Any]] | None) -> Difference | None:
    """Between runs of the same seed; of a single seed, between the same images."""
    if theirs is None:
        return None
    by_seed = {line["seed"]: line for line in theirs if line["test"] is not None}
    pairs = [(line, by_seed[line["seed"]]) for line in ours if line["test"] is not None and line["seed"] in by_seed]
    if not pairs:
        return None
    if len(pairs) == 1 and pairs[0][0]["hits"] and len(pairs[0][0]["hits"]) == len(pairs[0][1]["hits"] or ""):
        return paired_images(pairs[0][0]["hits"], pairs[0][1]["hits"])
    return paired([a["test"] for a, _ in pairs], [b["test"] for _, b in pairs], _same_images(pairs))


def _same_images(pairs: list[tuple[dict[str, Any], dict[str, Any]]]) -> list[tuple[str, str]]:
    """Which images were right, seed by seed, where all seeds were tested on the same ones."""
    tested = {line.get("test_photos") for pair in pairs for line in pair}
    if len(tested) > 1 or tested == {None} or not all(line["hits"] for pair in pairs for line in pair):
        return []
    return [(a["hits"], b["hits"]) for a, b in pairs]


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.mean(known) if known else None


def texts(cell: Cell) -> tuple[str, ...]:
    """What the table shows of a cell, in the order of `HEAD`."""
    failed = f" ({cell.failed} diverged)" if cell.failed else ""
    mean = "-" if cell.mean is None else f"{cell.mean:.1%}"
    mean += f" ± {100 * cell.spread:.1f}" if cell.spread is not None else ""
    return (" ".join(cell.row.split()), cell.budget, f"{cell.seeds}{failed}", mean,
            "-" if cell.ratio is None else f"{cell.ratio:.2f}x",
            "-" if cell.macs is None else f"{cell.macs / 1e6:.1f}",
            points(cell.reference), points(cell.dense),
            "-" if cell.seconds is None else f"{cell.seconds:.0f}")  # fmt: skip


def points(difference: Difference | None) -> str:
    """`-3.1 [-5.0, -1.2]`, in points; a difference that is clear (`Difference.clear`) has a star."""
    if difference is None:
        return ""
    text = f"{100 * difference.mean:+.1f}"
    if difference.low is None or difference.high is None:
        return text
    return f"{text} [{100 * difference.low:+.1f}, {100 * difference.high:+.1f}]" + "*" * difference.clear


def footnote(found: Sequence[Cell], reference: str, trials: int) -> str:
    """What the columns mean, and how much tuning and learning there was."""
    rows = {cell.row: cell.epochs for cell in found if cell.epochs is not None}
    usual = statistics.mode(rows.values()) if rows else None
    others = [f"{row}: {epochs}" for row, epochs in rows.items() if epochs != usual]
    learned = "the same number of epochs" if usual is None else f"{usual} epochs in all"
    learned += f" (but {', '.join(others)})" if others else ""
    how = sorted({d.how for cell in found for d in (cell.reference, cell.dense) if d is not None})
    tuned, untuned = f"{trials} tuning trials per row on validation images", "No tuning here: each row as it is defined"
    tuning = tuned if trials > 1 else untuned
    test = " and McNemar's p is below 0.05" if any(one.startswith("bootstrap") for one in how) else ""
    wholes = sorted({cell.dense_row for cell in found if cell.dense is not None})
    against = f"Reference: {reference}" + (f"; dense: {', '.join(wholes)}" if wholes else "")
    return (f"{against}. Differences are paired ({'; '.join(how) or 'none'}), in points, with their 95 % "
            f"interval; * where it leaves 0 out{test}. ± is the standard deviation over seeds. {tuning}. Every network "
            f"has learned for {learned}; the test split was read once per run; s: seconds of a run after its base."
            )  # fmt: skip


NAME = 30  # columns for a row's name


def terminal(found: Sequence[Cell]) -> list[Table]:
    tables = []
    for data in dict.fromkeys(cell.data for cell in found):
        table = Table(title=escape(data), box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, pad_edge=False)
        for i, name in enumerate(HEAD):
            if i == 0:
                longest = max(len(cell.row) for cell in found)
                table.add_column(name, min_width=min(longest, NAME), overflow="fold")
            else:
                table.add_column(name, justify="right", no_wrap=True)
        for cell in found:
            if cell.data == data:
                table.add_row(*map(escape, texts(cell)))
        tables.append(table)
    return tables


def markdown(found: Sequence[Cell], note: str) -> str:
    """The same as Markdown, a table for each data set."""
    parts = []
    for data in dict.fromkeys(cell.data for cell in found):
        shown = [[text.replace("*", "\\*").replace("|", "\\|") for text in texts(c)] for c in found if c.data == data]
        body = [f"| {' | '.join(row)} |" for row in shown]
        lines = [f"**{data}**", "", "| " + " | ".join(HEAD) + " |", "|---" + "|---:" * (len(HEAD) - 1) + "|", *body]
        parts.append("\n".join(lines))
    return "\n\n".join([*parts, note.replace("*", "\\*")]) + "\n"


def write_tables(out: Path, found: Sequence[Cell], note: str) -> None:
    """table.md and table.json."""
    write_atomic(out / "table.md", markdown(found, note))
    write_json(out / "table.json", {"note": note, "cells": [dataclasses.asdict(cell) for cell in found]})
