"""report.html: what a run is worth, on one page that opens anywhere.

`facts` reads the run folder, `figures` draws the curves, `page` puts both into `page.html`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from afds.errors import RunFolderError
from afds.files import may_write, write_atomic, write_json

NAME = "report.html"


def write_report(run: Path | str) -> Path:
    """Draw the page from the files of a run folder, finished or not; returns its path.

    What is missing or damaged is left out of the page. Raises RunFolderError where there is nothing to
    report: no folder, or one without any of config.json, structure.json and metrics.jsonl.
    """
    from afds.report.facts import read_facts  # matplotlib takes a while to import
    from afds.report.page import render

    run = Path(run).expanduser()
    if not run.is_dir():
        raise RunFolderError(f"{run}: no such folder. Give the folder that `afds fit --out` wrote.")
    facts = read_facts(run)
    if facts.empty:
        raise RunFolderError(f"{run}: not a run folder, it has no config.json, structure.json or metrics.jsonl.")
    write_atomic(run / NAME, render(facts))
    return run / NAME


def keep_figures(run: Path | str, name: str, figures: dict[str, Any]) -> bool:
    """Write RUN/name and draw the page again, which shows it; False where the folder cannot be written to.

    So a run that was deployed can be looked at all the same.

    Raises:
        RunFolderError: it can be written to, but there is no room.
    """
    path = Path(run).expanduser()
    if not may_write(path):
        return False
    write_json(path / name, figures)
    write_report(path)
    return True
