"""Rows are what was timed, ratios are taken within one run, and the bad news is said."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

import afds.commands
import afds.measure
import afds.report
from afds.cli import main
from afds.errors import AfdsWarning, ConfigError, RunFolderError
from afds.files import read_json
from afds.hardware import usable_cores
from afds.measure import TURN, Row, measure_run, verdict
from afds.report import write_report
from afds.runtime import is_built
from afds.selection import SelectionConfig
from runs import write_photos, write_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("measured")
    write_run(path / "run", selection=SelectionConfig())
    write_photos(path / "photos")
    return path / "run"


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="affinity is Linux's")
def test_cores_that_a_process_may_not_use_do_not_count(run: Path) -> None:
    cores = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(cores)})
        assert usable_cores() == 1
        with pytest.raises(ConfigError, match="threads must be from 1 to 1, got 2"):
            measure_run(run, threads=(2,))
    finally:
        os.sched_setaffinity(0, cores)


def test_every_network_in_every_runtime(run: Path) -> None:
    result = measure_run(run, threads=(1,), batches=(1, 2), rounds=3, data=run.parent / "photos",
                         only=("torch", "onnx", "openvino"))  # fmt: skip
    wanted = {(f, r, b) for f in ("dense", "static", "dynamic") for r in ("torch", "onnx", "openvino") for b in (1, 2)}
    assert {(row.form, row.runtime, row.batch) for row in result.rows} == wanted, result.skipped
    assert not result.skipped
    for batch in (1, 2):
        here = [row for row in result.rows if row.batch == batch]
        fastest = min(row.median_ms for row in here if row.form == "dense")
        for row in here:
            assert row.calls == 3 * TURN
            assert 0 < row.low_ms <= row.median_ms <= row.high_ms
            assert row.speedup == pytest.approx(fastest / row.median_ms)
            assert (row.share is None) == (row.form == "dense")
            if row.share is not None:
                assert row.share == pytest.approx(row.speedup / row.macs_ratio)
                assert row.macs_ratio > 1.5
    assert read_json(run / "measure.json")["rows"][0]["runtime"] == "torch"
    assert result.hardware["versions"]["onnxruntime"]
    page = (run / "report.html").read_text()
    assert "What a stopwatch says" in page
    assert "openvino" in page
    assert "faster by the clock" in page
    assert result.verdict[0].replace("<", "&lt;") in page
    assert "counted, not timed" not in page
    saved = read_json(run / "measure.json")
    (run / "measure.json").write_text(json.dumps({**saved, "weights_sha256": "of others"}))
    assert "What a stopwatch says" not in write_report(run).read_text()


def test_where_nothing_depends_on_the_image_the_static_network_is_the_runs_own(tmp_path: Path) -> None:
    write_run(tmp_path / "run", selection=SelectionConfig(), scales="learned")
    result = measure_run(tmp_path / "run", threads=(1,), rounds=2, only=("torch", "onnx"))
    assert {row.form for row in result.rows} == {"dense", "static"}
    assert "the static network is its own" in result.skipped["dynamic"]
    assert "static in " in result.verdict[0]
    assert "faster by the clock" in (tmp_path / "run/report.html").read_text()


def test_what_is_left_out_says_why(run: Path) -> None:
    result = measure_run(run, threads=(1,), rounds=1, only=("torch",))
    assert "--data" in result.skipped["static"]
    assert {row.form for row in result.rows} == {"dense", "dynamic"}


def test_command(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["measure", str(run), "--only", "torch", "dynamic", "--threads", "1", "--rounds", "2"]
    assert main([*arguments, "--json", str(tmp_path / "m.json")]) == 0
    assert "threads 1, batch 1" in capsys.readouterr().out
    assert len(read_json(tmp_path / "m.json")["rows"]) == 2  # the dense peer is always among them


@pytest.mark.skipif(not is_built(), reason="the native runtime is not built")
def test_profile_shows_microseconds_that_add_up(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["measure", str(run), "--only", "native", "dynamic", "--threads", "1", "--rounds", "2", "--profile"]
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    total = next(line for line in lines if "all layers" in line).split("\u2502")
    share = next(line for line in lines if " share" in line and "%" in line).split("\u2502")
    *parts, whole = (float(cell) for cell in total[2:-1])
    assert whole > 1  # microseconds
    assert whole == pytest.approx(sum(parts), abs=0.5)
    assert sum(float(cell.strip().rstrip("%")) for cell in share[2:-2]) == pytest.approx(100, abs=1)


@pytest.mark.skipif(not is_built(), reason="the native runtime is not built")
def test_a_row_is_held_to_its_peer_in_the_same_precision(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["measure", str(run), "--only", "native", "torch", "dynamic", "--threads", "1", "--rounds", "2"]
    assert main([*arguments, "--precision", "float32", "bf16"]) == 0
    assert "bf16" in capsys.readouterr().out  # the cell may be broken in a narrow terminal
    rows = {(r["form"], r["runtime"], r["precision"]): r for r in read_json(run / "measure.json")["rows"]}
    assert {(runtime, precision) for _, runtime, precision in rows} == {
        ("torch", "float32"), ("native", "float32"), ("native", "bf16"),
    }  # fmt: skip
    ours = rows["dynamic", "native", "bf16"]
    assert ours["speedup"] == pytest.approx(rows["dense", "native", "bf16"]["median_ms"] / ours["median_ms"])
    assert "native bf16" in write_report(run).read_text()


def test_a_runtime_without_bf16_is_named_and_costs_no_measurement(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["measure", str(run), "--threads", "1", "--rounds", "1", "--only", "dense"]
    assert main([*arguments, "torch"]) == 0
    before = (run / "measure.json").read_bytes()
    assert main([*arguments, "onnx", "torch", "--precision", "bf16"]) == 2
    assert "--only torch onnx: rows in bf16 are of native and openvino; name one" in capsys.readouterr().err
    assert main([*arguments, "native", "--rounds", "0"]) == 2

    def broken(*of: object, **more: object) -> None:
        raise ConfigError("this runtime is broken")

    monkeypatch.setitem(afds.measure.OPENERS, "native", broken)
    assert main([*arguments, "native", "--precision", "bf16"]) == 2  # nothing known beforehand, and yet no row
    assert "nothing could be timed, so nothing was saved. dense in native bf16: this runtime is broken" in (
        capsys.readouterr().err
    )
    assert (run / "measure.json").read_bytes() == before

    monkeypatch.setitem(afds.measure.OPENERS, "native", lambda *of, **more: lambda x_BCHW: x_BCHW)
    assert main([*arguments, "native", "torch", "--precision", "bf16"]) == 0
    assert "left out: torch bf16: rows in bf16 are of native and openvino" in capsys.readouterr().out
    saved = read_json(run / "measure.json")
    assert [(r["runtime"], r["precision"]) for r in saved["rows"]] == [("native", "bf16")]
    assert list(saved["skipped"]) == ["torch bf16"]
    result = measure_run(run, threads=(1,), batches=(), rounds=1, only=("dense", "torch"), precisions=())
    assert [(r.batch, r.precision) for r in result.rows] == [(1, "float32")]


def close(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read-only, for root as well, which may else write everywhere but to a file system that is mounted so."""
    folder.chmod(0o500)
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != folder and access(path, mode))


@pytest.mark.parametrize(
    ("place", "message"), [("nowhere/x.json", "there is no folder"), ("closed/x.json", "closed cannot be written to"),
                           ("", "is a folder"), ("/dev/null", "is no plain file")],
)  # fmt: skip
def test_a_place_for_json_is_looked_at_before_anything_is_timed(
    run: Path, tmp_path: Path, place: str, message: str, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    (tmp_path / "closed").mkdir()
    monkeypatch.setattr(afds.measure, "load_run", None)
    if place.startswith("closed"):
        close(tmp_path / "closed", monkeypatch)
    assert main(["measure", str(run), "--json", str(tmp_path / place)]) == 2
    assert message in capsys.readouterr().err


def test_a_run_that_cannot_be_written_to_is_measured_all_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    write_run(run, selection=SelectionConfig())
    files = sorted(run.iterdir())
    close(run, monkeypatch)
    arguments = ["measure", str(run), "--only", "torch", "dense", "--threads", "1", "--rounds", "1"]
    assert main([*arguments, "--json", str(tmp_path / "m.json")]) == 0
    out = capsys.readouterr().out
    assert "threads 1, batch 1" in out
    assert out.splitlines()[-1] == f"not saved in the run: {run} cannot be written to."
    assert len(read_json(tmp_path / "m.json")["rows"]) == 1
    with pytest.warns(AfdsWarning, match="run cannot be written to: not saved in it"):
        assert measure_run(run, threads=(1,), rounds=1, only=("torch", "dense")).rows
    assert sorted(run.iterdir()) == files


def test_figures_are_shown_before_they_are_saved_and_saved_though_nobody_reads_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    write_run(run, selection=SelectionConfig())
    arguments = ["measure", str(run), "--only", "torch", "dense", "--threads", "1", "--rounds", "1"]

    def full(*of: object) -> None:
        raise RunFolderError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(afds.report, "write_json", full)
        assert main(arguments) == 2
    said = capsys.readouterr()
    assert "threads 1, batch 1" in said.out
    assert "no room" in said.err

    def left(*of: object) -> None:
        raise RunFolderError("nobody reads on")

    monkeypatch.setattr(afds.commands, "_show_measurement", left)
    assert main([*arguments, "--json", str(tmp_path / "m.json")]) == 2
    assert read_json(run / "measure.json") == read_json(tmp_path / "m.json")


def row(form: str, ms: float, speedup: float = 1.0) -> Row:
    return Row(form, "onnx", 1, 1, ms, ms, ms, ms, 9, 5.0, speedup)


def test_not_worth_it_is_said() -> None:
    (said,) = verdict([row("dense", 10), row("dynamic", 9.8, 1.02)])
    assert "not worth it" in said
    (said,) = verdict([row("dense", 10), row("dynamic", 9.8, 1.02), row("static", 2, 5)])
    assert "not worth it" in said  # the accuracy that stands beside it is not the static network's
    (said,) = verdict([row("dense", 10), row("dynamic", 4, 2.5)])
    assert "2.50x faster" in said
    assert "5.00x fewer" in said


@pytest.mark.parametrize(("option", "value"), [("threads", (0,)), ("threads", (10_000,)), ("batches", (0,)),
                                                ("only", ("magic",)), ("rounds", 0)])  # fmt: skip
def test_nonsense_is_refused(run: Path, option: str, value: object) -> None:
    with pytest.raises(ConfigError, match="--"):
        measure_run(run, **{option: value})
