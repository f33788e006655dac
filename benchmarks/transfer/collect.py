"""One JSON line for each finished run, small enough to commit: figures by epoch, configuration, hardware.

    python benchmarks/transfer/collect.py RESULTS.jsonl RUN...

A run that is in RESULTS.jsonl already is replaced. Where RUN/test.json is there (`afds evaluate RUN DATA --split test
--json > RUN/test.json`), its figures go along.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import tyro

from afds.errors import RunFolderError
from afds.files import write_atomic
from afds.record import read_lines

LONG = ("per_class", "class_images", "confusions")  # per class: in the run's report, too long here


@dataclass(frozen=True)
class Options:
    """Collect finished runs into a file of lines."""

    results: Annotated[Path, tyro.conf.Positional]
    """The file; new lines go to its end."""
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Run folders."""


def main(options: Options) -> None:
    lines = {line["run"]: line for line in read_lines(options.results)} if options.results.exists() else {}
    for run in options.runs:
        lines[run.name] = collect(run)
    write_atomic(options.results, "".join(json.dumps(line) + "\n" for line in lines.values()))


def collect(run: Path) -> dict[str, Any]:
    """Raises RunFolderError: the run is not finished."""
    record = json.loads((run / "config.json").read_text())
    lines = read_lines(run / "metrics.jsonl")
    finals = [line for line in lines if line["kind"] == "final"]
    if not finals:
        raise RunFolderError(f"{run} is not finished: afds fit --resume {run}")
    final, epochs = finals[-1], [line for line in lines if line["kind"] == "epoch"]
    test = json.loads((run / "test.json").read_text()) if (run / "test.json").exists() else final["test"]
    day = datetime.fromtimestamp((run / "metrics.jsonl").stat().st_mtime, UTC).date().isoformat()
    return {
        "run": run.name, "date": day, "val": _short(final["val"]), "test": _short(test), "ratio": final["ratio"],
        "macs": final["counted_macs"], "dense_macs": final["dense_macs"], "seconds": round(final["seconds"]),
        "val_by_epoch": [round(line["val_top1"], 4) for line in epochs],
        "val_ce_by_epoch": [round(line["val_ce"], 4) for line in epochs],
        "train_ce_by_epoch": [round(line["train_ce"], 4) for line in epochs],
        "ratio_by_epoch": [round(line["ratio"], 3) for line in epochs],
        "config": record["config"], "hardware": record["hardware"],
    }  # fmt: skip


def _short(metrics: dict[str, Any] | None) -> dict[str, Any] | None:
    return {k: v for k, v in metrics.items() if k not in LONG} if metrics else None


if __name__ == "__main__":
    main(tyro.cli(Options))
