"""`afds prepare` as a user meets it: what it tells, what it refuses, Ctrl-C in the middle."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from afds.cli import main
from afds.data.published import catalogue
from miniatures import DOGS, dogs120, image, mat, write_tar

Captured = pytest.CaptureFixture[str]


def test_list_tells_of_every_file(capsys: Captured) -> None:
    assert main(["prepare", "--list"]) == 0
    out = capsys.readouterr().out
    for s in catalogue().values():
        assert f"{s.name}: " in out
        for f in s.files:
            assert f.url in out
            assert (f.md5 or f.sha256) in out
    assert main(["prepare", "cub200", "--list"]) == 0
    only = capsys.readouterr().out
    assert "CUB_200_2011.tgz  1,150,585,339 bytes" in only
    assert "food101" not in only


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ([], "needs the name of a data set"),
        (["dogs"], "Did you mean dogs120?"),
        (["dogs120", "."], "needs --out DIR"),
        (["dogs120", "nowhere", "--out", "out"], "nowhere: no such file or folder"),
        (["dogs120", ".", "--out", "out"], "images.tar (793,579,520 bytes)"),
        (["dogs120", ".", "--out", "out", "--seed", "3"], "official split"),
        (["caltech256-30", ".", "--out", "out", "--seed", "-3"], "--seed must be"),
    ],
)
def test_refused_with_exit_code_2(
    arguments: list[str], wanted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["prepare", *arguments]) == 2
    assert wanted in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_twice(tmp_path: Path, capsys: Captured) -> None:
    dogs120(tmp_path / "down")
    command = ["prepare", "dogs120", str(tmp_path / "down"), "--out", str(tmp_path / "my dogs"), "--skip-checksum"]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "6 training and 4 test images in 3 classes" in out
    assert f"next: afds fit '{tmp_path / 'my dogs'}'" in out
    assert main(command) == 0
    assert "prepared before, left as it is" in capsys.readouterr().out


@pytest.mark.slow
def test_interrupted_in_the_middle(tmp_path: Path) -> None:
    """A real Ctrl-C, sent while images are being taken out: exit code 130, and neither folder nor leftovers."""
    label = next(iter(DOGS))
    names = [f"{label}/n{i}.jpg" for i in range(6_000)]
    photo = image()
    write_tar(tmp_path / "images.tar", {f"Images/{name}": photo for name in names})
    write_tar(tmp_path / "lists.tar", {"train_list.mat": mat(names[:5_000]), "test_list.mat": mat(names[5_000:])})
    command = [sys.executable, "-m", "afds", "prepare", "dogs120", ".", "--out", "out", "--skip-checksum"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    for _ in range(3000):
        if list(tmp_path.glob(".out.preparing-*/train")):
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "interrupted" in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["images.tar", "lists.tar"]
