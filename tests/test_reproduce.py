"""The table of the paper's experiment: whole, runnable as it stands, and written out as committed."""

from __future__ import annotations

import dataclasses
import importlib.util
import shlex
import sys
from pathlib import Path
from types import ModuleType

import pytest
import tyro

from afds.config import FitConfig, parse_method, resolve_method
from afds.errors import ConfigError
from afds.idle import idle_options

FOLDER = Path(__file__).parents[1] / "benchmarks/reproduce"


@pytest.fixture(scope="module")
def table() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reproduce_table", FOLDER / "table.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["reproduce_table"] = module  # its dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


def test_every_cell_once(table: ModuleType) -> None:
    cells = list(table.cells("delta"))
    assert len(cells) == len({c.name for c in cells}) == 6 * (4 * (1 + 3 * 3) + 3)
    per_set = {c.dataset for c in cells}
    assert len(per_set) == 6
    for cell in cells:
        parse_method(cell.method)


@pytest.mark.parametrize("recipe", ["delta", "student"])
def test_lines_mean_what_the_cells_do(table: ModuleType, recipe: str) -> None:
    """A line, read by the command line's own parser, is the cell's configuration."""
    for cell in [c for c in table.cells(recipe) if c.dataset in ("dogs120", "food101")][::3]:
        words = shlex.split(table.line(cell))
        assert words[:2] == ["afds", "fit"]
        assert tyro.cli(FitConfig, args=words[2:]) == cell.config(Path("$DATA"), "$SOURCE", Path("$OUT"))


def test_no_cell_gives_an_option_of_no_effect(table: ModuleType) -> None:
    for recipe in ("delta", "student"):
        for cell in table.cells(recipe):
            assert idle_options(cell.config(Path("d"), "resnet101", Path("o"))) == {}, cell.name


def test_recipes_keep_their_steps(table: ModuleType) -> None:
    for recipe, steps, batch in (("delta", 9000, 64), ("student", 9000, 48)):
        for cell in table.cells(recipe):
            config = resolve_method(cell.config(Path("d"), "resnet101", Path("o")))
            published = table.catalogue()[cell.dataset]
            per_epoch = int(published.train * 0.9) // batch
            done = (config.optim.epochs + config.base_epochs) * per_epoch
            assert abs(done - steps) <= max(per_epoch, 0.02 * steps), cell.name  # whole epochs
            assert (config.optim.lr, config.optim.schedule, config.optim.batch_size) == (0.01, "step", batch)


def test_afs_cells_differ_from_afds_paper_in_the_transfer_alone(table: ModuleType) -> None:
    at = {
        c.method: resolve_method(c.config(Path("d"), "s", Path("o"))) for c in table.cells("delta") if c.budget == "5x"
    }
    for method in ("l2+afs", "l2-sp+afs", "delta+afs"):
        for part in ("selection", "optim", "data_options"):
            assert getattr(at[method], part) == getattr(at["afds-paper"], part)
        # Of method afds alone, and at their defaults elsewhere, where nothing looks at them.
        ours = {name: getattr(at["afds-paper"].descent, name) for name in ("settle", "reconstruct")}
        assert dataclasses.replace(at[method].descent, **ours) == at["afds-paper"].descent


def test_the_committed_lines_are_the_tables(table: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert table.main(table.Options()) == 0
    assert (FOLDER / "cells.sh").read_text("utf-8") == capsys.readouterr().out


def test_data_not_at_hand_is_named(table: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = table.Options(run=True, only=("dogs120", "10x", "afds-paper"), data=tmp_path, out=tmp_path / "runs")
    assert table.main(options) == 0
    out = capsys.readouterr().out
    assert out.count("afds prepare dogs120 FILES --out") == 1
    assert not (tmp_path / "runs").exists()


def test_words_that_no_cell_has_are_told(table: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert table.main(table.Options(only=("dogs",))) == 2
    assert "no cell has all of these words" in capsys.readouterr().err


def test_a_cell_whose_base_has_begun_is_resumed(
    table: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "dogs120").mkdir()
    options = table.Options(run=True, only=("dogs120", "10x", "l2+l1"), data=tmp_path, out=tmp_path / "runs")
    (cell,) = (c for c in table.cells("delta") if {c.dataset, c.budget, c.method} == set(options.only))
    begun = options.out / cell.name
    (begun / "base").mkdir(parents=True)
    (begun / "config.json").write_text("{}")
    asked = []

    def stop(config: FitConfig) -> None:
        asked.append(config.resume)
        raise ConfigError("stopped")

    monkeypatch.setattr(table, "fit", stop)
    assert table.main(options) == 1
    assert asked == [begun]
