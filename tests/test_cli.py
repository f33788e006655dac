"""The command line: help, exit codes, errors in one line, and the verbs on a tiny run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

import afds
from afds import cli, commands
from afds.cli import VERBS, main
from afds.config import DataConfig
from afds.errors import AfdsError, ConfigError
from afds.selection import SelectionConfig
from runs import LABELS, write_photos, write_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run")
    write_run(path, selection=SelectionConfig())
    return path


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    write_photos(tmp_path / "photos", each=2)
    return tmp_path / "photos"


Captured = pytest.CaptureFixture[str]


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["help"]])
def test_help(arguments: list[str], capsys: Captured) -> None:
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert all(f"afds {verb}" in out for verb in VERBS)


def test_version(capsys: Captured) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"afds {afds.__version__}\n"


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_each_verb(verb: str, capsys: Captured) -> None:
    assert main([verb, "--help"]) == 0
    out = capsys.readouterr().out
    assert f"usage: afds {verb}" in out
    assert len(out.splitlines()) > 8


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["evalaute"], "Did you mean evaluate?"),
        (["predict", "nowhere", "x.png"], "nowhere: no such folder"),
        (["predict", "nowhere"], "needs a photo"),
        (["predict", "nowhere", "x.png", "--top-k", "0"], "--top-k must be 1 or more"),
        (["evaluate", "nowhere", "x", "--batch-size", "0"], "--batch-size must be 1 or more"),
        (["report", "nowhere"], "nowhere: no such folder"),
        (["fit", "photos", "--optim.lr", "-1"], "--optim.lr must be above 0"),
        (["fit", "photos", "--method", "magic"], "Unknown method 'magic'"),
    ],
)
def test_mistakes_are_one_line_and_2(arguments: list[str], wanted: str, capsys: Captured) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("afds: error: ")
    assert wanted in captured.err
    assert len(captured.err.splitlines()) == 1


@pytest.mark.parametrize("arguments", [["report"], ["predict", "--nonsense"], ["evaluate", "a", "b", "--split", "x"]])
def test_wrong_options_are_2(arguments: list[str], capsys: Captured) -> None:
    assert main(arguments) == 2
    assert "afds" in capsys.readouterr().err


def test_predict(run: Path, photos: Path, capsys: Captured) -> None:
    assert main(["predict", str(run), str(photos), "--top-k", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6
    assert all(line.count("%") == 2 for line in lines)


def test_predict_names_a_path_that_is_not_there_before_any_work(run: Path, photos: Path, capsys: Captured) -> None:
    assert main(["predict", str(run), str(photos), "nowhere.jpg", "--batch-size", "1"]) == 2
    assert capsys.readouterr() == ("", "afds: error: nowhere.jpg: no such file or folder.\n")


def test_predict_json_and_unreadable(run: Path, photos: Path, tmp_path: Path, capsys: Captured) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_text("no image")
    assert main(["predict", str(run), str(broken), str(photos / "ant"), "--json", "--batch-size", "1"]) == 1
    first, *rest = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert first["top"] == []
    assert "broken.jpg" in first["error"]
    assert [len(line["top"]) for line in rest] == [3, 3]
    assert {entry["label"] for entry in rest[0]["top"]} == set(LABELS)
    assert main(["predict", str(run), str(broken)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "broken.jpg" in captured.err


def test_evaluate(run: Path, photos: Path, capsys: Captured) -> None:
    assert main(["evaluate", str(run), str(photos), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["images"] == 6
    assert result["split"] == "all"
    assert set(result["per_class"]) == set(LABELS)
    assert result["counted_macs"] < result["dense_macs"]
    assert "mistakes" not in result
    assert main(["evaluate", str(run), str(photos)]) == 0
    out = capsys.readouterr().out
    assert "accuracy" in out
    assert all(label in out for label in LABELS)
    assert "surest" not in out
    wrong = round((1 - result["top1"]) * 6)
    assert wrong
    assert main(["evaluate", str(run), str(photos), "--mistakes", "1"]) == 0
    (line,) = capsys.readouterr().out.split("the mistakes that it is surest of:\n")[1].splitlines()
    assert main(["evaluate", str(run), str(photos), "--mistakes", "99", "--json"]) == 0
    mistakes = json.loads(capsys.readouterr().out)["mistakes"]
    assert len(mistakes) == wrong
    assert mistakes[0]["path"] in line
    assert f"taken for {mistakes[0]['taken_for']}" in line


def test_report(run: Path, capsys: Captured) -> None:
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out.strip() == str(run / "report.html")


def test_fit_and_demo_get_their_options(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import afds.demo
    import afds.fitting

    given: list[Any] = []
    monkeypatch.setattr(afds.fitting, "fit", given.append)
    monkeypatch.setattr(afds.demo, "demo", given.append)
    wanted = ["photos", "--source", "resnet18", "--budget", "10x", "--out", "run", "--optim.epochs", "3"]
    assert main(["fit", *wanted]) == 0
    assert main(["demo", "--out", str(tmp_path)]) == 0
    config, demo = given
    assert (config.data, config.source, config.budget, config.out) == (Path("photos"), "resnet18", "10x", Path("run"))
    assert config.optim.epochs == 3
    assert demo.out == tmp_path


def raiser(error: BaseException) -> Any:
    def run(verb: str, arguments: list[str]) -> int:
        raise error

    return run


def test_interrupt_pipe_and_faults(monkeypatch: pytest.MonkeyPatch, capsys: Captured, tmp_path: Path) -> None:
    monkeypatch.setattr(commands, "run", raiser(KeyboardInterrupt()))
    assert main(["fit", "--out", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "\nafds: interrupted.\n"  # nothing is there yet
    (tmp_path / "config.json").write_text("{}")
    assert main(["fit", "--out", str(tmp_path)]) == 130
    assert f"afds fit --resume {tmp_path}" in capsys.readouterr().err
    monkeypatch.setattr(commands, "run", raiser(AfdsError("x is wrong")))
    assert main(["fit"]) == 2
    assert capsys.readouterr().err == "afds: error: x is wrong\n"
    monkeypatch.setattr(commands, "run", raiser(ZeroDivisionError("a fault")))
    with pytest.raises(ZeroDivisionError):
        main(["fit"])


@pytest.mark.slow
def test_a_closed_pipe(run: Path, photos: Path) -> None:
    """`afds predict ... | head -0`: no traceback. And `python -m afds` works."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "afds", "predict", str(run), str(photos)]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, timeout=120, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


def test_cli_itself_imports_nothing_heavy() -> None:
    """The module's own imports; what `import afds` brings is the package's matter."""
    heavy = {"torch", "timm", "tyro", "matplotlib", "numpy", "PIL"}
    names = {name for name, value in vars(cli).items() if isinstance(value, types.ModuleType)}
    assert not heavy & names


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("input_size", 3),
        ("val_fraction", 1.0),
        ("test_fraction", -1.0),
        ("scale", 0.0),
        ("colour", 3.0),
        ("workers", -1),
    ],
)
def test_a_wrong_value_is_refused_by_the_option_that_was_given(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"--data-options.{name.replace('_', '-')} "):
        DataConfig(**{name: value})  # type: ignore[arg-type]


def test_demos_of_other_options_have_folders_of_their_own(tmp_path: Path) -> None:
    from afds.demo import DemoConfig, _runs

    kinds = [DemoConfig(out=tmp_path), DemoConfig(out=tmp_path, per_class=20), DemoConfig(out=tmp_path, epochs=2)]
    assert len({_runs(config) for config in kinds}) == len(kinds)
    assert _runs(kinds[0]) == tmp_path / "runs"


@pytest.mark.parametrize(
    ("argv", "command"),
    [
        (["/env/bin/afds", "fit", "my photos"], "afds fit 'my photos'"),
        (["/src/afds/__main__.py", "fit"], "afds fit"),
        (["/env/lib/ipykernel_launcher.py", "-f", "kernel.json"], None),
        (["/home/me/train.py", "--password", "x"], None),
    ],
)
def test_only_a_command_that_was_typed_is_recorded(
    argv: list[str], command: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from afds.setup import _command

    monkeypatch.setattr("sys.argv", argv)
    assert _command() == command
