"""Put a comparison's results into a page, between two marks, from the committed lines of its trials.

    python benchmarks/lab/table.py RESULTS/trials.jsonl PAGE.md

PAGE.md holds `<!-- lab:begin -->` and `<!-- lab:end -->`; what stands between them is replaced. `--trim` first makes
a file of trials small enough to commit: final and tuning runs, without their bases. `--brief` writes test accuracies
only, a column for each budget.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from afds.compare.table import Cell, cells, footnote, markdown, texts
from afds.errors import ConfigError
from afds.files import write_atomic
from afds.record import read_lines
from afds.schedule import parse_budget

BEGIN, END = "<!-- lab:begin -->", "<!-- lab:end -->"


@dataclass(frozen=True)
class Options:
    """Write the table of a comparison into a page."""

    trials: Annotated[Path, tyro.conf.Positional]
    """trials.jsonl of `afds compare`."""
    page: Annotated[Path, tyro.conf.Positional]
    """Markdown page with the two marks, or with --trim the file to write."""
    reference: str = "afds"
    """Row that the others are compared with."""
    trim: bool = False
    """Write the lines of final and tuning runs to PAGE, and no table."""
    brief: bool = False
    """Test accuracies only, a column for each budget."""


def main(options: Options) -> None:
    lines = read_lines(options.trials)
    if options.trim:
        finals = [line for line in lines if line["kind"] in ("final", "tuning")]
        write_atomic(options.page, "".join(json.dumps(line) + "\n" for line in finals))
        return
    text = options.page.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        raise ConfigError(f"{options.page} has no marks {BEGIN} and {END}.")
    tuning = [line for line in lines if line["kind"] == "tuning"]
    trials = max((line["key"].rpartition("/")[2] for line in tuning), default="0", key=int)
    found = cells(lines, options.reference)
    machines = {(h["cpu"], h["precision"], h["versions"]["torch"]) for h in (line["hardware"] for line in lines)}
    stamp = "; ".join(f"{cpu}, {precision}, torch {torch}" for cpu, precision, torch in sorted(machines)) + "."
    note = f"{footnote(found, options.reference, int(trials) + 1)} {stamp}"
    table = brief(found) if options.brief else markdown(found, note)
    before, _, rest = text.partition(BEGIN)
    write_atomic(options.page, f"{before}{BEGIN}\n\n{table}\n{END}{rest.partition(END)[2]}")


def brief(found: Sequence[Cell]) -> str:
    """A line for each row: its test accuracy at each budget, the whole network's first."""
    asked = dict.fromkeys(cell.budget for cell in found)
    budgets = sorted(asked, key=lambda budget: parse_budget(budget).ratio or math.inf)
    lines = ["| test accuracy | " + " | ".join(budgets) + " |", "|---" * (len(budgets) + 1) + "|"]
    for data, row in dict.fromkeys((cell.data, cell.row) for cell in found):
        own = {cell.budget: texts(cell)[3] for cell in found if (cell.data, cell.row) == (data, row)}
        lines.append(f"| {row} | " + " | ".join(own.get(budget, "") for budget in budgets) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main(tyro.cli(Options))
