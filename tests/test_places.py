"""Where things lie: folders that cannot be made, runs and photos that were moved, names that are not UTF-8."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from afds import checkpoint, fitting
from afds.artifact import is_run
from afds.checkpoint import save_checkpoint
from afds.cli import main
from afds.compare import run as comparing
from afds.config import DataConfig, FitConfig, OptimConfig
from afds.data import image_files, scan, write_digits
from afds.errors import ConfigError, DataError, RunFolderError
from afds.files import check_place, read_json, write_json
from afds.fitting import fit
from afds.record import Record, read_lines
from runs import write_photos, write_run

Captured = pytest.CaptureFixture[str]
ARCH = '{"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16], "stem_width": 8}'
no_root = pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may write everywhere")


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_digits(tmp_path_factory.mktemp("data") / "digits", range(3), per_class=10, test_per_class=5)


def options(data: Path, out: Path, **changes: Any) -> FitConfig:
    config = FitConfig(
        data=data, out=out, source="resnet18", arch_args=ARCH, method="scratch+dense",
        data_options=DataConfig(input_size=32, flip=False, workers=0, val_fraction=0.2),
        optim=OptimConfig(epochs=2, batch_size=8, lr=0.05),
    )  # fmt: skip
    return dataclasses.replace(config, **changes)


def interrupted(config: FitConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that was stopped in its second epoch."""
    done = []

    def stop(self: object, event: dict[str, Any]) -> None:
        if "done" in event:
            done.append(event)
        elif done:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(fitting.Progress, "update", stop)
        with pytest.raises(KeyboardInterrupt):
            fit(config, quiet=True)


# ------------------------------------------------------------ places that cannot be written to


def test_places_in_whose_way_something_lies(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    check_place(tmp_path / "new" / "deeper")
    for place, reason in (("file/x", "is a file"), ("file", "is a file"), ("nowhere", "a link to nothing"),
                          ("nowhere/x", "a link to nothing"), ("a" * 300, "too long")):  # fmt: skip
        with pytest.raises(RunFolderError, match=reason):
            check_place(tmp_path / place)


@no_root
def test_places_that_are_closed(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(RunFolderError, match="cannot be written to"):
            check_place(tmp_path / "new")
    finally:
        tmp_path.chmod(0o700)


@pytest.mark.parametrize("verb", ["fit", "compare", "demo"])
def test_a_file_in_the_way_is_told_before_photos_are_read(
    verb: str, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    (tmp_path / "file").write_text("")
    for reads_photos in (fitting, comparing):
        monkeypatch.setattr(reads_photos, "read_photos", None)
    photos = [] if verb == "demo" else [str(digits), "--source", "resnet18"]
    assert main([verb, *photos, "--out", str(tmp_path / "file/run")]) == 2
    assert f"{tmp_path / 'file'} is a file" in capsys.readouterr().err


def test_no_room_for_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "last.ckpt"
    save_checkpoint(path, {"epoch": 1})
    before = path.read_bytes()

    def full(state: object, file: Any) -> None:
        file.write(b"half")
        raise RuntimeError("[enforce fail at inline_container.cc] . unexpected pos")

    monkeypatch.setattr(checkpoint.torch, "save", full)
    with pytest.raises(RunFolderError, match=f"Make room, then go on with: afds fit --resume {tmp_path}"):
        save_checkpoint(path, {"epoch": 2})
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]
    assert path.read_bytes() == before


def test_a_run_folder_that_is_taken_away(tmp_path: Path) -> None:
    record = Record(tmp_path / "run", tensorboard=False)
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    with pytest.raises(RunFolderError, match="run was moved or removed while the run went on"):
        record.write("epoch", epoch=1)
    with pytest.raises(RunFolderError, match="run was moved or removed while the run went on"):
        save_checkpoint(tmp_path / "run/last.ckpt", {"epoch": 2})


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_output_that_cannot_be_written(tmp_path: Path) -> None:
    write_run(tmp_path / "run", selection=None)
    write_photos(tmp_path / "photos", each=1)
    command = [sys.executable, "-m", "afds", "predict", str(tmp_path / "run"), str(tmp_path / "photos")]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=240, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "afds: error: the output cannot be written: No space left on device."
    closed = subprocess.run(["sh", "-c", 'exec "$@" >&-', "sh", *command], stderr=subprocess.PIPE, text=True,
                            timeout=240, check=False)  # fmt: skip
    assert "Traceback" not in closed.stderr


def test_paths_that_are_too_long(tmp_path: Path, capsys: Captured) -> None:
    write_run(tmp_path / "run", selection=None)
    for arguments in (["predict", str(tmp_path / "run"), "a" * 300], ["predict", "a" * 300, "x.png"],
                      ["fit", "a" * 300, "--out", str(tmp_path / "new")]):  # fmt: skip
        assert main(arguments) == 2
        assert "File name too long" in capsys.readouterr().err


# ------------------------------------------------------------ resuming


def test_resume_from_elsewhere_and_after_a_move(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    shutil.copytree(digits, tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "resnet18").mkdir()  # no run: the source is timm's all the same
    interrupted(options(Path("photos"), Path("run")), monkeypatch)
    recorded = read_json("run/config.json")["config"]
    assert recorded["data"] == str(tmp_path / "photos")
    assert (recorded["source"], recorded["anchor"], recorded["small_source"]) == ("resnet18", "", "")
    shutil.copytree("run", "moved")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert main(["fit", "--resume", "../run"]) == 0
    (tmp_path / "photos").rename(tmp_path / "archive")
    assert main(["fit", "--resume", "../moved"]) == 2
    assert "Say where they are: afds fit PHOTOS --resume ../moved" in capsys.readouterr().err
    assert main(["fit", "../archive", "--resume", "../moved"]) == 0
    assert is_run(tmp_path / "moved")
    assert (tmp_path / "run/model.safetensors").read_bytes() == (tmp_path / "moved/model.safetensors").read_bytes()


def test_resume_with_other_options_is_refused(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(options(digits, tmp_path / "run"), monkeypatch)
    changes: list[dict[str, Any]] = [{"seed": 7}, {"optim": OptimConfig(epochs=9)}, {"out": tmp_path / "other"}]
    for change in changes:
        with pytest.raises(ConfigError, match=f"--{next(iter(change))} would be of no effect"):
            fit(FitConfig(resume=tmp_path / "run", **change), quiet=True)


@pytest.mark.parametrize(
    "damage", [{"task": {}}, {"task": 5}, {"optimizer": None}, {"epoch": "two"}, {"task": {"network.fc.weight": 1}}]
)
def test_a_checkpoint_of_something_else(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: dict[str, Any]
) -> None:
    interrupted(options(digits, tmp_path / "run"), monkeypatch)
    state = checkpoint.load_checkpoint(tmp_path / "run/last.ckpt")
    save_checkpoint(tmp_path / "run/last.ckpt", {**state, **damage})
    with pytest.raises(RunFolderError, match=r"is not of this run|is not a checkpoint"):
        fit(FitConfig(resume=tmp_path / "run"), quiet=True)


def test_a_record_with_bytes_that_are_no_text(tmp_path: Path) -> None:
    Record(tmp_path).write("epoch", epoch=0)
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(b"\xff\xfe\n")
    Record(tmp_path).write("epoch", epoch=1)
    assert [line["epoch"] for line in read_lines(tmp_path / "metrics.jsonl")] == [0, 1]


# ------------------------------------------------------------ names


def test_names_that_are_not_utf8(digits: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    photos = Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), b"caf\xe9")))
    try:
        shutil.copytree(digits, photos)
    except OSError:
        pytest.skip("a file system of UTF-8 names only")
    first = next((photos / "train/one").iterdir())
    first.rename(first.with_name(os.fsdecode(b"\xe9.png")))
    out = Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), b"run\xe9")))
    fit(options(photos, out), quiet=True)
    assert Path(read_json(out / "config.json")["config"]["data"]) == photos
    assert main(["predict", str(out), str(first.parent), "--json"]) == 0
    lines = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert len(lines) == 10
    assert any(line["path"].endswith("\udce9.png") for line in lines)


def test_json_of_a_name_that_is_not_utf8_reads_back(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"path": "caf\udce9", "word": "é"})
    assert read_json(tmp_path / "x.json") == {"path": "caf\udce9", "word": "é"}
    assert "é" in (tmp_path / "x.json").read_bytes().decode()


def test_two_folders_of_one_name(tmp_path: Path) -> None:
    write_photos(tmp_path / "photos", each=1)
    for name in ("\u00e9", "e\u0301", "b"):
        shutil.copytree(tmp_path / "photos/ant", tmp_path / "classes" / name, dirs_exist_ok=True)
    if len(list((tmp_path / "classes").iterdir())) < 3:
        pytest.skip("a file system that composes names")
    with pytest.raises(DataError, match="two folders are called"):
        scan(tmp_path / "classes")


def test_folders_are_listed_as_fit_reads_them(tmp_path: Path) -> None:
    write_photos(tmp_path / "photos", each=1)
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked/ant").symlink_to(tmp_path / "photos/ant")
    (tmp_path / "linked/round").symlink_to(tmp_path / "linked")
    (tmp_path / "other").mkdir()
    (tmp_path / "linked/there").symlink_to(tmp_path / "other")
    (tmp_path / "other/back").symlink_to(tmp_path / "linked")
    photo = next((tmp_path / "photos/ant").iterdir())
    for name in (".hidden/x.png", "__MACOSX/x.png", "bee/._x.png"):
        (tmp_path / "linked" / name).parent.mkdir()
        shutil.copy(photo, tmp_path / "linked" / name)
    assert list(image_files([tmp_path / "linked"])) == [tmp_path / "linked/ant" / photo.name]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names")
def test_a_pipe_among_the_photos_is_not_waited_for(tmp_path: Path) -> None:
    write_photos(tmp_path / "photos", each=2)
    os.mkfifo(tmp_path / "photos/ant/pipe.png")
    assert all(item.path.name != "pipe.png" for item in scan(tmp_path / "photos").splits["all"])
    assert all(path.name != "pipe.png" for path in image_files([tmp_path / "photos"]))


def test_budgets_that_mean_all(digits: Path, tmp_path: Path) -> None:
    for i, budget in enumerate(("1.0x", " 1X")):
        assert fit(options(digits, tmp_path / str(i), budget=budget), quiet=True).cost.ratio == 1
