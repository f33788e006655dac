"""`afds inspect` beside its figures, which test_winners.py looks at: where they are saved, and where they cannot be."""

from __future__ import annotations

from pathlib import Path

import pytest

import afds.commands
import afds.report
from afds.cli import main
from afds.errors import AfdsWarning, RunFolderError
from afds.files import read_json
from afds.inspection import inspect_run
from afds.selection import SelectionConfig
from runs import write_photos, write_run


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    write_run(tmp_path / "run", selection=SelectionConfig())
    write_photos(tmp_path / "photos")
    return ["inspect", str(tmp_path / "run"), "--data", str(tmp_path / "photos")]


def test_a_run_that_cannot_be_written_to_is_inspected_all_the_same(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    files = sorted(run.iterdir())
    monkeypatch.setattr(afds.report, "may_write", lambda folder: folder != run)
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "Two images share" in out
    assert out.splitlines()[-1] == f"not saved in the run: {run} cannot be written to."
    with pytest.warns(AfdsWarning, match="run cannot be written to: not saved in it"):
        assert inspect_run(run, data=tmp_path / "photos").layers
    assert sorted(run.iterdir()) == files


def test_figures_are_shown_before_they_are_saved_and_saved_though_nobody_reads_them(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*of: object) -> None:
        raise RunFolderError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(afds.report, "write_json", fail)
        assert main(arguments) == 2
    said = capsys.readouterr()
    assert "Two images share" in said.out
    assert "no room" in said.err
    monkeypatch.setattr(afds.commands, "_show_inspection", fail)
    assert main(arguments) == 2
    assert read_json(tmp_path / "run/winners.json")["images"] == 12
    assert (tmp_path / "run/report.html").exists()
