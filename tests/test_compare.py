"""`afds compare`: what is refused, what is shared, what is resumed, and the statistics by hand."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from afds import fitting
from afds.artifact import is_run
from afds.cli import main
from afds.compare import run as comparing
from afds.compare.page import write_page
from afds.compare.plan import CANDIDATES, CompareConfig, Trial, identity, make_plan
from afds.compare.rows import parse_row, read_rows
from afds.compare.run import compare, to_do
from afds.compare.table import cells, footnote, markdown, terminal, write_tables
from afds.config import DataConfig, DistillationConfig, FitConfig, OptimConfig
from afds.data import write_digits
from afds.errors import BudgetError, ConfigError, DataError, RunFolderError, TrainingError
from afds.files import alone_in, read_json
from afds.fitting import fit
from afds.stats import paired, paired_images
from afds.terminal import Terminal, make_console

ARCH = '{"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]}'
DATA = DataConfig(input_size=32, flip=False, workers=0, val_fraction=0.2)


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("compare")
    write_digits(root / "photos", range(3), per_class=12, test_per_class=10)
    other = write_digits(root / "other", range(3, 6), per_class=12, test_per_class=5)
    config = FitConfig(data=other, source="resnet18", arch_args=ARCH, method="scratch", out=root / "source",
                       data_options=DATA, optim=OptimConfig(epochs=2, batch_size=8))  # fmt: skip
    fit(config, quiet=True)
    return root


def options(room: Path, out: Path, **changes: Any) -> CompareConfig:
    config = CompareConfig(
        data=(room / "photos",), out=out, methods="l2,l2+l1", budgets="2x", seeds=2, epochs=1, base_epochs=1,
        source=str(room / "source"), data_options=DATA, optim=OptimConfig(batch_size=8, lr=0.02),
    )  # fmt: skip
    return dataclasses.replace(config, **changes)


@pytest.fixture(scope="module")
def finished(room: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[CompareConfig, list[dict[str, Any]]]:
    config = options(room, tmp_path_factory.mktemp("results") / "out", trials=2)
    return config, compare(config)


def test_rows_are_methods_with_options() -> None:
    row = parse_row("afds[distillation.afd=0, descent.allocation=uniform, pruning.end=1]")
    config = row.apply(FitConfig())
    assert (config.method, config.distillation.afd, config.descent.allocation) == ("afds", 0.0, "uniform")
    assert parse_row("afds").apply(FitConfig()) == FitConfig()


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("magic", "Unknown method"),
        ("afds[distillation.afd]", "option=value"),
        ("afds[distillation.magic=1]", "no option"),
        ("afds[distillation=1]", "no option"),
        ("afds[distillation.afd=-1]", "0 or more"),
        ("afds[distillation.afd=much]", "not a valid value"),
        ("afds[budget=2x]", "same for all rows"),
        ("afds[base_epochs=40]", "same for all rows"),
        ("afds[latency.threads=2]", "same for all rows"),
        ("l2[data_options.test_fraction=0]", "same for all rows"),
        ("l2[data_options.val_fraction=0.5]", "same for all rows"),
        ("l2+l1[data_options.input_size=64]", "same for all rows"),
        ("l2[hardware.precision=32-true]", "same for all rows"),
        ("l2[optim.lr=-1]", r"^l2\[optim.lr=-1\]: --optim.lr must be"),
        ("l2+l1[small_source=resnet18]", "no effect without"),
        ("afds[", "Cannot read"),
    ],
)
def test_wrong_rows_are_refused(text: str, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        parse_row(text)


def test_rows_of_the_lab_are_readable() -> None:
    lab = Path(__file__).parents[1] / "benchmarks/lab"
    for name in ("methods.toml", "ablations.toml", "table.toml"):
        rows = read_rows(lab / name)
        assert "afds" in [row.name for row in rows]
        assert len({row.slug for row in rows}) == len(rows)


def test_bases_are_shared_and_every_network_learns_as_long(tmp_path: Path) -> None:
    c = CompareConfig(data=(tmp_path,), out=tmp_path / "out", budgets="1x,2x,5x", seeds=2, epochs=3, base_epochs=4,
                      methods="l2,l2+l1,l2+l1[pruning.stages=4],kd,kd+l1,afds,afds[descent.allocation=uniform],"
                              "afds[distillation.afd=0.1],l2+slimming,l2+lowres,"
                              "l2+l1[optim.lr=0.04,data_options.colour=0.4]")  # fmt: skip
    plan = make_plan(c)
    bases = [t for t in plan if t.kind == "base"]
    assert sorted(t.row for t in bases if t.seed == 0) == ["afd+dense", "afd+dense", "l2+dense", "l2+slimming"]
    finals = {(t.row, t.budget): t for t in plan if t.kind == "final" and t.seed == 0}
    assert ("l2", "1x") in finals
    assert not {("l2", "2x"), ("l2+l1", "1x"), ("l2+lowres", "1x")} & set(finals)
    learned = {row: t.config.optim.epochs for (row, _), t in finals.items()}
    assert learned["l2"] == learned["kd"] == learned["l2+lowres"] == 7
    assert learned["l2+l1"] == learned["kd+l1"] == learned["afds"] == 3
    assert finals["l2+l1", "2x"].needs == finals["kd", "1x"].needs == finals["kd+l1", "5x"].needs
    assert finals["kd", "1x"].config.source == "resnet50"
    assert finals["kd", "1x"].config.teacher == tmp_path / "out" / finals["kd", "1x"].needs[0]
    tuned = finals["l2+l1[optim.lr=0.04,data_options.colour=0.4]", "2x"]  # of its own step, and not of its base's
    assert (tuned.config.optim.lr, tuned.config.data_options.colour) == (0.04, 0.4)
    assert tuned.needs == finals["l2+l1", "2x"].needs
    order = [t.key for t in plan]
    assert all(order.index(need) < order.index(t.key) for t in plan for need in t.needs)


def test_bases_that_no_trial_needs_any_more_are_not_trained(tmp_path: Path) -> None:
    c = CompareConfig(data=(tmp_path,), out=tmp_path / "out", budgets="2x", seeds=2, methods="l2,l2+l1,kd+l1,afds")
    plan = make_plan(c)
    finals = [t for t in plan if t.kind == "final"]
    assert to_do(plan, {t.key: {} for t in finals}) == {}
    left = next(t for t in finals if t.row == "kd+l1" and t.seed == 1)
    lines = {t.key: {} for t in plan if t.kind != "base" and t is not left}
    assert set(to_do(plan, lines)) == {left.key, *left.needs}
    assert set(to_do(plan, lines | {left.needs[0]: {"error": "it diverged"}})) == {left.key}
    without_folder = lines | {left.needs[0]: {"error": None}}
    assert set(to_do(plan, without_folder)) == {left.key, left.needs[0]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("afds.compare.run.is_run", lambda _: True)
        assert set(to_do(plan, without_folder)) == {left.key}


def test_every_row_has_the_same_number_of_trials_and_only_finals_read_the_test_split(
    finished: tuple[CompareConfig, list[dict[str, Any]]],
) -> None:
    config, lines = finished
    kinds = [(line["kind"], line["row"]) for line in lines]
    assert kinds.count(("tuning", "l2")) == kinds.count(("tuning", "l2+l1")) == 2
    assert kinds.count(("final", "l2+l1")) == 2
    for line in lines:
        assert (line["test"] is not None) == (line["kind"] == "final")
        assert {"seconds", "hardware", "config", "afds"} <= set(line)
        assert len(line["hits"] or "") == (30 if line["kind"] == "final" else 0)
    stored = [json.loads(text) for text in (config.out / "trials.jsonl").read_text().splitlines()]
    assert sorted(line["key"] for line in stored) == sorted(line["key"] for line in lines)
    tuned = [line for line in lines if line["kind"] == "tuning" and line["row"] == "l2+l1"]
    best = max(tuned, key=lambda line: line["val"])
    final = next(line for line in lines if line["kind"] == "final" and line["row"] == "l2+l1")
    assert final["multiples"] == best["multiples"]
    assert final["config"]["optim"]["lr"] == 0.02 * best["multiples"]["lr"]
    assert [CANDIDATES[i][0] for i in (0, 1)] == [line["multiples"]["lr"] for line in tuned]


def test_a_second_start_trains_nothing(
    finished: tuple[CompareConfig, list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, lines = finished
    monkeypatch.setattr("afds.compare.run.fit", lambda *_, **__: pytest.fail("trained again"))
    assert compare(config) == lines


def test_killed_inside_a_trial_it_goes_on_there(
    room: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: tuple[CompareConfig, list[dict[str, Any]]]
) -> None:
    config = options(room, tmp_path / "out", seeds=1, epochs=2)
    whole = options(room, tmp_path / "whole", seeds=1, epochs=2)
    seen: list[dict[str, Any]] = []

    def interrupt(self: object, event: dict[str, Any]) -> None:
        if "done" in event:
            seen.append(event)
        elif len(seen) == 5:  # base 1, l2 3; then in the second epoch of l2+l1
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(fitting.Progress, "update", interrupt)
        with pytest.raises(KeyboardInterrupt):
            compare(config)
    out = config.out / "runs/photos/l2+l1/2x/seed0"
    assert (out / "last.ckpt").exists()
    assert not is_run(out)
    with open(config.out / "trials.jsonl", "a") as file:
        file.write('{"key": "cut sho')
    (config.out / "runs/photos/l2+l1/2x/seed7").mkdir()
    lines = compare(config)
    again = {line["key"]: line for line in compare(whole)}
    assert {line["key"]: line["hits"] for line in lines} == {key: line["hits"] for key, line in again.items()}
    assert (out / "model.safetensors").read_bytes() == (
        whole.out / "runs/photos/l2+l1/2x/seed0/model.safetensors"
    ).read_bytes()


def test_parallel_gives_the_same_results(
    room: Path, tmp_path: Path, finished: tuple[CompareConfig, list[dict[str, Any]]]
) -> None:
    config, lines = finished
    parallel = compare(dataclasses.replace(config, out=tmp_path / "out", jobs=2, seeds=1))
    alike = {line["key"]: line["hits"] for line in lines}
    assert all(line["hits"] == alike[line["key"]] for line in parallel)


WORKERS = """
import os, sys, time
from pathlib import Path
from afds.compare.plan import CompareConfig
from afds.compare.pools import make_pool

def work(path):
    Path(path).write_text(str(os.getpid()))
    time.sleep(120)

if __name__ == "__main__":
    pool, _ = make_pool(CompareConfig(data=(Path("photos"),), out=Path("out"), jobs=2))
    for name in sys.argv[1:]:
        pool.submit(work, name)
    time.sleep(120)
"""


def test_killed_it_leaves_no_worker_behind(tmp_path: Path) -> None:
    script, notes = tmp_path / "workers.py", [tmp_path / "a", tmp_path / "b"]
    script.write_text(WORKERS)
    parent = subprocess.Popen([sys.executable, str(script), *map(str, notes)])
    try:
        wait_until(lambda: all(note.exists() and note.read_text() for note in notes))
    finally:
        parent.kill()
        parent.wait()
    workers = [int(note.read_text()) for note in notes]
    wait_until(lambda: not any(is_running(pid) for pid in workers))


def end_me(trial: Trial) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_is_killed_is_told_in_words(room: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("afds.compare.run.run_trial", end_me)
    with pytest.raises(TrainingError, match="ended from outside"):
        compare(options(room, tmp_path / "out", jobs=2, seeds=1))


def test_two_comparisons_in_one_folder_are_one_too_many(room: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with alone_in(out), pytest.raises(RunFolderError, match="another process"):
        compare(options(room, out, seeds=1))


def wait_until(met: Callable[[], bool], seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < end
        time.sleep(0.1)


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat")  # dead, and nobody has asked for its exit code yet: not running
    return not state.exists() or state.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def test_what_cannot_be_is_refused_before_any_training(
    room: Path, tmp_path: Path, finished: tuple[CompareConfig, list[dict[str, Any]]]
) -> None:
    def refused(error: type[Exception], match: str, **changes: Any) -> None:
        with pytest.raises(error, match=match):
            compare(options(room, tmp_path / "never", **changes))
        assert not (tmp_path / "never").exists()

    refused(ConfigError, "Unknown method", methods="l2,magic")
    refused(BudgetError, r"l2\+l1 at 100000x", budgets="2x,100000x")
    refused(BudgetError, "Cannot read the budget", budgets="soon")
    refused(ConfigError, "there twice", methods="l2,l2")
    refused(ConfigError, "none of the rows", reference="afds")
    refused(ConfigError, "--trials", trials=99)
    refused(ConfigError, "--tune-at 3x is none of --budgets 2x", trials=2, tune_at="3x")
    refused(ConfigError, "no effect without tuning", tune_at="2x")
    refused(ConfigError, "'a, b' and 'a b' would share", methods="", rows=named(tmp_path, "a, b", "a b"))
    refused(DataError, "at 2x on .*nowhere: no such file", methods=f"l2,afds[unlabelled={tmp_path / 'nowhere'}]")
    refused(DataError, "at 2x on .*nowhere.* no", methods=f"l2,afds[source_data={tmp_path / 'nowhere'}]")
    refused(ConfigError, "names none", budgets="")
    twice = tmp_path / "twice.json"
    twice.write_text('{"one": "l2", "one": "l2-sp"}')
    refused(ConfigError, "twice.json: cannot be read .*'one' is there twice", methods="", rows=twice)
    known = next((finished[0].out / "bases/photos").glob("l2+dense-*-seed1"))
    refused(ConfigError, r"l2\+small.*, seed 0 on .* has learned from", methods=f"l2+small[small_source={known}]")
    hints = DistillationConfig(hints=3)
    refused(ConfigError, "^--distillation.hints 3 would be of no effect", methods="afds", distillation=hints)
    refused(ConfigError, "afds.*: --distillation.hints 3 would be", methods="l2,afds[distillation.hints=3]")
    shutil.copytree(room / "photos/train", tmp_path / "split/train")
    refused(ConfigError, "Beside train/ none is drawn: add test/", data=(tmp_path / "split",))
    no_test = DataConfig(**{**dataclasses.asdict(DATA), "test_fraction": 0.0})
    refused(
        ConfigError,
        "leave --data-options.test-fraction above 0",
        data=(tmp_path / "split/train",),
        data_options=no_test,
    )
    few = write_digits(tmp_path / "few", range(2), per_class=2, test_per_class=2)
    refused(DataError, "too few", data=(few,))


def test_an_option_of_all_is_for_the_rows_that_look_at_it(room: Path, tmp_path: Path) -> None:
    hints = DistillationConfig(hints=3)
    lines = compare(options(room, tmp_path / "out", methods="afd+l1,afds", distillation=hints, seeds=1))
    assert [line["row"] for line in lines if line["kind"] == "final" and line["error"] is None] == ["afd+l1", "afds"]


def test_a_budget_is_there_once_however_it_is_written(tmp_path: Path) -> None:
    c = CompareConfig(data=(tmp_path,), out=tmp_path / "out", methods="afds", budgets="2x,2.0x, 2X,0.5G,500M,10x")
    assert c.all_budgets() == ["2x", "0.5G", "10x"]


def test_one_that_begins_meanwhile_with_other_options_is_not_mixed_in(
    room: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both have found the folder empty; the second gets its turn when the first is done."""
    out, preflight = tmp_path / "out", comparing.preflight

    def slow(c: CompareConfig, console: Console) -> Any:
        if c.epochs == 2:
            compare(options(room, out, methods="l2", seeds=1))
        return preflight(c, console)

    monkeypatch.setattr(comparing, "preflight", slow)
    with pytest.raises(RunFolderError, match="was made with epochs = 1, now it is 2"):
        compare(options(room, out, methods="l2", seeds=1, epochs=2))
    assert read_json(out / "compare.json")["options"]["epochs"] == 1


def test_photos_with_other_contents_are_other_photos(room: Path, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    shutil.copytree(room / "photos", photos)
    config = options(room, tmp_path / "out", data=(photos,), methods="l2", seeds=1)
    compare(config)
    for path in photos.rglob("*.png"):
        Image.new("RGB", (40, 40)).save(path)
    with pytest.raises(RunFolderError, match="the photos of photos are not those that it was begun with"):
        compare(dataclasses.replace(config, methods="l2,l2-sp"))


@pytest.mark.parametrize("text", ["[]", '{"options": 3}'])
def test_a_record_of_another_make_is_refused_by_name(room: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "compare.json").write_text(text)
    with pytest.raises(RunFolderError, match=r"compare.json is not the record of a comparison"):
        compare(options(room, tmp_path))


def named(folder: Path, *names: str) -> Path:
    file = folder / f"{len(names)}.json"
    file.write_text(json.dumps(dict.fromkeys(names, "l2")))
    return file


def test_names_that_differ_have_folders_that_differ(tmp_path: Path) -> None:
    long = "afds[descent.allocation=refit,descent.trials=24,recovery.lr=0.001,recovery.mixup=0.5,recovery.colour=0.2]"
    names = [long, long.replace("0.2", "0.4"), "мало", "много", "少", "..", ".", "l2+slimming by layer, 0.04"]
    slugs = [row.slug for row in read_rows(named(tmp_path, *names))]
    assert len(set(slugs)) == len(names)
    assert max(map(len, slugs)) <= 80
    assert all(slug.strip(".") for slug in slugs)
    assert slugs[-1] == "l2+slimming_by_layer_0.04"  # as ever: results lie there


def test_a_row_stays_what_it_was_over_several_starts(
    finished: tuple[CompareConfig, list[dict[str, Any]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, _ = finished
    out = shutil.copytree(config.out, tmp_path / "out")
    monkeypatch.setattr("afds.compare.run.fit", lambda *_, **__: pytest.fail("trained again"))
    fewer = dataclasses.replace(config, out=out, methods="l2")
    compare(fewer)
    rows = tmp_path / "rows.json"
    rows.write_text('{"l2+l1": "l2-sp+l1"}')
    with pytest.raises(RunFolderError, match=r"the row 'l2\+l1' was"):
        compare(dataclasses.replace(fewer, rows=rows))
    rows.write_text('{"l2 + l1": "l2+l1", "l2_+_l1": "l2+l1"}')
    with pytest.raises(ConfigError, match="would share a folder"):
        dataclasses.replace(fewer, rows=rows)
    rows.write_text('{"l2+l1 ": "l2+l1"}')
    with pytest.raises(RunFolderError, match=r"results of the row 'l2\+l1' lie where"):
        compare(dataclasses.replace(fewer, rows=rows))
    lines = (out / "trials.jsonl").read_text()
    (out / "trials.jsonl").write_text(lines.replace("/l2/", "/l2_of_before/"))
    with pytest.raises(RunFolderError, match="has results under 'runs/photos/l2_of_before/"):
        compare(fewer)


def test_a_base_that_diverged_takes_its_rows_along_and_no_others(room: Path, tmp_path: Path) -> None:
    wild = "l2-sp+l1[transfer.l2_sp=1e300]"
    config = options(room, tmp_path / "out", seeds=1, methods=f"{wild},l2+l1")
    lines = {line["row"]: line for line in compare(config) if line["kind"] == "final"}
    assert "its base, bases/photos/l2-sp+dense" in lines[wild]["error"]
    assert "The loss is" in lines[wild]["error"]
    assert lines["l2+l1"]["error"] is None
    assert [cell.failed for cell in cells(list(lines.values()), "l2+l1")] == [1, 0]
    assert {line["row"]: line["error"] for line in compare(config) if line["kind"] == "final"} == {
        row: line["error"] for row, line in lines.items()
    }


def test_a_base_that_is_gone_is_trained_again_where_it_is_needed(
    finished: tuple[CompareConfig, list[dict[str, Any]]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, lines = finished
    out = shutil.copytree(config.out, tmp_path / "out")
    shutil.rmtree(out / "bases")
    more = dataclasses.replace(config, out=out, seeds=1, budgets="2x,3x")
    compare(dataclasses.replace(more, dry_run=True))
    (base,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("base"))
    assert not base.endswith("done")
    after = {line["key"]: line for line in compare(more)}
    before = {line["key"]: line for line in lines}
    assert after["runs/photos/l2+l1/3x/seed0"]["error"] is None
    assert all(after[key]["hits"] == before[key]["hits"] for key in after.keys() & before.keys())


def test_a_begun_trial_goes_on_where_the_photos_are_now(room: Path, tmp_path: Path) -> None:
    first, moved = tmp_path / "first/photos", tmp_path / "second/photos"
    shutil.copytree(room / "photos", first)
    shutil.copytree(room / "photos", moved)
    config = dataclasses.replace(options(room, tmp_path / "out", methods="l2", seeds=1, epochs=2), data=(first,))

    def interrupt(self: object, event: dict[str, Any]) -> None:
        if event.get("epoch") == 1:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fitting.Progress, "update", interrupt)
        with pytest.raises(KeyboardInterrupt):
            compare(config)
    shutil.rmtree(first)
    (line,) = compare(dataclasses.replace(config, data=(moved,)))
    assert line["error"] is None


def test_names_with_brackets_and_bars_are_shown(finished: tuple[CompareConfig, list[dict[str, Any]]]) -> None:
    _, lines = finished
    named = [line | {"row": "no [/afd] | [bold]"} for line in lines if line["row"] == "l2+l1"]
    found = cells(named, "none")
    console = Console(width=200, file=io.StringIO())
    for table in terminal(found):
        console.print(table)
    assert isinstance(console.file, io.StringIO)
    assert "no [/afd] | [bold]" in console.file.getvalue()
    assert "no [/afd] \\| [bold]" in markdown(found, "")


def test_a_changed_comparison_is_refused_and_a_grown_one_is_not(
    finished: tuple[CompareConfig, list[dict[str, Any]]], capsys: pytest.CaptureFixture[str]
) -> None:
    config, lines = finished
    with pytest.raises(RunFolderError, match="epochs = 1, now it is 9"):
        compare(dataclasses.replace(config, epochs=9))
    with pytest.raises(RunFolderError, match=r"optim\.lr"):
        compare(dataclasses.replace(config, optim=OptimConfig(batch_size=8, lr=0.5)))
    more = dataclasses.replace(config, methods="l2,l2+l1,l2+lowres", dry_run=True)
    before = (config.out / "trials.jsonl").read_bytes()
    assert compare(more) == []
    listed = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("base", "tuning", "final"))]
    done = {line["key"] for line in lines}
    for line in listed:
        _, key, *note = line.split(maxsplit=2)
        assert (note == ["done"]) == (key in done)
    assert any("lowres" in line and not line.endswith("done") for line in listed)
    assert (config.out / "trials.jsonl").read_bytes() == before


def test_table_and_page(finished: tuple[CompareConfig, list[dict[str, Any]]], tmp_path: Path) -> None:
    config, lines = finished
    found = cells(lines, "l2+l1")
    assert [(cell.row, cell.budget, cell.seeds) for cell in found] == [("l2", "1x", 2), ("l2+l1", "2x", 2)]
    finals = {(line["row"], line["seed"]): line["test"] for line in lines if line["kind"] == "final"}
    pruned = found[1]
    assert pruned.mean == pytest.approx((finals["l2+l1", 0] + finals["l2+l1", 1]) / 2)
    assert pruned.ratio is not None
    assert pruned.ratio >= 2
    assert pruned.dense is not None
    assert pruned.dense.mean == pytest.approx(pruned.mean - (finals["l2", 0] + finals["l2", 1]) / 2)
    note = footnote(found, "l2+l1", config.trials)
    assert [cell.epochs for cell in found] == [config.epochs + config.base_epochs] * 2
    assert f"learned for {config.epochs + config.base_epochs} epochs in all;" in note
    longer = [found[0], dataclasses.replace(found[1], epochs=99)]
    assert "(but l2+l1: 99)" in footnote(longer, "l2+l1", 1)
    write_tables(tmp_path, found, note)
    assert markdown(found, note) == (tmp_path / "table.md").read_text()
    assert json.loads((tmp_path / "table.json").read_text())["cells"][1]["row"] == "l2+l1"
    page = write_page(tmp_path, found, note).read_text()
    assert "<svg" in page
    assert "http" not in page.replace("http://www.w3.org", "")


def test_long_names_and_all_figures_are_shown_in_a_narrow_terminal(
    finished: tuple[CompareConfig, list[dict[str, Any]]],
) -> None:
    long = "l2+l1[pruning.stages=8,optim.lr=0.04,data_options.colour=0.4]"
    found = [dataclasses.replace(cell, row=long if cell.row == "l2+l1" else cell.row)
             for cell in cells(finished[1], "l2")]  # fmt: skip
    file = io.StringIO()
    for table in terminal(found):
        Console(file=file, width=make_console(120).width).print(table)
    assert "…" not in file.getvalue()
    assert "=0.4]" in file.getvalue()


def test_the_reader_of_a_pipe_may_leave() -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        Terminal(file=Gone()).print("more than was asked for")


def test_latency_is_drawn_where_a_run_was_measured(
    finished: tuple[CompareConfig, list[dict[str, Any]]], tmp_path: Path
) -> None:
    from afds.measure import Measurement, Row

    config, _ = finished
    for line in compare(config):
        if line["kind"] == "final":
            times = (("torch", 1, 9.0), ("onnx", 1, 4.0), ("onnx", 2, 2.0))
            rows = [Row("dense", name, threads, 1, ms, ms, ms, ms, 3, 1.0) for name, threads, ms in times]
            measured = Measurement("resnet18", 32, 32, "now", {}, None, rows)
            (config.out / line["key"] / "measure.json").write_text(json.dumps(measured.to_dict()))
    found = cells(compare(config), "l2+l1")
    assert [cell.latency_ms for cell in found] == [4.0, 4.0]
    assert write_page(tmp_path, found, "").read_text().count("<svg") == 2


def test_one_seed_is_compared_image_by_image(finished: tuple[CompareConfig, list[dict[str, Any]]]) -> None:
    _, lines = finished
    found = cells([line for line in lines if line["seed"] == 0], "l2+l1")
    assert found[1].dense is not None
    assert found[1].dense.how == "bootstrap over 30 images"


def test_seeds_that_were_tested_on_the_same_images_have_their_error_too(
    finished: tuple[CompareConfig, list[dict[str, Any]]],
) -> None:
    _, lines = finished
    assert len({line["test_photos"] for line in lines}) == 1
    same, drawn = (
        cells(found, "l2+l1")[1].dense for found in (lines, [line | {"test_photos": None} for line in lines])
    )
    assert same is not None
    assert drawn is not None
    assert (same.mean, drawn.how) == (drawn.mean, "paired t, 2 seeds")
    assert same.how == "paired t, 2 seeds, and the error of 30 test images"
    assert same.high is not None
    assert drawn.high is not None
    assert same.high >= drawn.high


def test_training_from_scratch_is_not_the_dense_row(finished: tuple[CompareConfig, list[dict[str, Any]]]) -> None:
    _, lines = finished
    dense = [line | {"row": "scratch", "config": line["config"] | {"method": "scratch"}} for line in lines
             if line["row"] == "l2"]  # fmt: skip
    found = cells([*dense, *lines], "l2+l1")
    assert {cell.dense_row for cell in found} == {"l2"}
    assert "dense: l2." in footnote(found, "l2+l1", 1)


def test_epochs_of_a_base_behind_a_source_step_count(finished: tuple[CompareConfig, list[dict[str, Any]]]) -> None:
    config, lines = finished
    own = {"source": "resnet18", "source_data": "photos"}  # no shared base: the run has trained one of its own
    stepped = [line | {"row": "step", "config": line["config"] | own} for line in lines if line["row"] == "l2+l1"]
    assert cells(stepped, "step")[0].epochs == config.epochs + config.base_epochs


def test_photos_that_have_changed_are_refused(room: Path, tmp_path: Path) -> None:
    shutil.copytree(room / "photos", tmp_path / "photos")
    config = dataclasses.replace(options(room, tmp_path / "out", seeds=1), data=(tmp_path / "photos",))
    (tmp_path / "out").mkdir()
    fake = {"options": identity(config), "rows": {}, "data": {"photos": "of others"}}
    (tmp_path / "out/compare.json").write_text(json.dumps(fake))
    with pytest.raises(RunFolderError, match="the photos of photos are not those"):
        compare(config)


def test_an_option_without_effect_is_refused(room: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--epochs"):
        options(room, tmp_path / "out", optim=OptimConfig(epochs=3))


def test_paired_t_by_hand() -> None:
    d = paired([0.9, 0.8, 0.7], [0.8, 0.6, 0.6])
    assert d.mean == pytest.approx(0.4 / 3)
    error = (((0.1 - d.mean) ** 2 * 2 + (0.2 - d.mean) ** 2) / 2) ** 0.5 / 3**0.5
    assert d.low == pytest.approx(d.mean - 4.302653 * error, rel=1e-5)
    assert not d.clear
    assert paired([0.5], [0.4]).low is None
    hits = [("110111", "100101"), ("111011", "100111"), ("111110", "101010")]  # of the same six images
    both = paired([0.9, 0.8, 0.7], [0.8, 0.6, 0.6], hits)
    by_image = [np.mean([int(a[i]) - int(b[i]) for a, b in hits]) for i in range(6)]
    of_images = 1.959964 * np.std(by_image, ddof=1) / 6**0.5
    assert both.mean == d.mean
    assert both.high == pytest.approx(d.mean + ((d.high - d.mean) ** 2 + of_images**2) ** 0.5)
    assert both.how.endswith("the error of 6 test images")
    same = paired([0.5, 0.6], [0.4, 0.5])  # the same difference twice, as few images bring about, is no certainty
    assert same.mean == pytest.approx(0.1)
    assert same.low is None
    assert not same.clear
    alike = paired([0.5, 0.5], [0.5, 0.5], [("10", "10"), ("10", "10")])
    assert (alike.mean, alike.low) == (0, None)
    assert paired([1.0, 1.0], [1.0, 0.0], [("1", "1"), ("1", "0")]).low is not None  # one image has no spread


def test_mcnemar_by_hand() -> None:
    d = paired_images("1" * 10 + "0" * 10, "1" * 4 + "0" * 16)  # 6 better, 0 worse
    assert d.mean == pytest.approx(0.3)
    assert d.p == pytest.approx(2 * 0.5**6)
    assert d.low is not None
    assert 0 < d.low < 0.3
    assert d.clear
    few = paired_images("1" * 5 + "0" * 35, "0" * 40)
    assert few.low is not None
    assert few.low > 0
    assert not few.clear  # p = 2 / 32
    with pytest.raises(ValueError, match="same images"):
        paired_images("10", "1")


def test_from_the_command_line(room: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["compare", str(room / "photos"), "--out", str(tmp_path / "out"), "--methods", "l2,l2+lowres",
                 "--budgets", "2x", "--seeds", "1", "--epochs", "1", "--base-epochs", "1", "--source",
                 str(room / "source"), "--data-options.input-size", "32", "--data-options.workers", "0",
                 "--optim.batch-size", "8"]  # fmt: skip
    assert main(arguments) == 0
    assert "l2+lowres" in capsys.readouterr().out
    assert (tmp_path / "out/compare.html").is_file()
    assert main([*arguments, "--optim.lr", "0.5"]) == 2
    assert "optim.lr" in capsys.readouterr().err
