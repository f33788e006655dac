"""The README's commands run as they stand, but for the network: a tiny one, trained here, stands in for the ResNets."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest

from afds import runtime
from afds.cli import main
from afds.data import write_digits

README = Path(__file__).parents[1] / "README.md"
TINY = ["--arch-args", '{"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16], "stem_width": 8}']
SMALL = ["--optim.batch-size", "8", "--data-options.workers", "0", "--data-options.input-size", "32"]
FROM_BASE = ["--optim.epochs", "2", "--descent.images", "8", *SMALL]
QUICK = ["--base-epochs", "2", *FROM_BASE]
COMPARE = ["--epochs", "1", "--base-epochs", "1", "--descent.images", "8", *SMALL]


def commands() -> list[list[str]]:
    """Every `afds VERB ...` in the README's code blocks, without what is said behind two spaces."""
    found = []
    for block in re.findall(r"```\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL):
        for line in block.splitlines():
            command = re.split(r"\s{2,}|#", line.strip())[0].removeprefix(".venv/bin/")
            if command.startswith("afds "):
                found.append(shlex.split(command)[1:])
    return found


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `photos/`, `cat.jpg`, `more/`, `unsorted/` and the weights of a tiny network."""
    folder = tmp_path_factory.mktemp("readme")
    write_digits(folder / "photos", range(3), per_class=12, test_per_class=6)
    photo = next((folder / "photos/test/one").iterdir())
    shutil.copy(photo, folder / "cat.jpg")
    (folder / "more").mkdir()
    shutil.copy(photo, folder / "more")
    (folder / "unsorted").mkdir()
    for path in write_digits(folder / "others", range(3), per_class=20, test_per_class=6).rglob("*.png"):
        shutil.copy(path, folder / "unsorted" / f"{path.parent.name}-{path.name}")
    fit = ["fit", str(folder / "photos"), "--source", "resnet18", "--method", "scratch+dense"]
    assert main([*fit, "--out", str(folder / "tiny"), "--optim.epochs", "2", *TINY, *SMALL]) == 0
    return folder


def test_commands_of_the_readme(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    verbs = set()
    for command in commands():
        verb, *rest = command
        verbs.add(verb)
        if verb == "demo" or "--resume" in rest or ("8ms" in rest and not runtime.is_built()):
            continue  # a test of its own: test_training.py
        rest = ["0.04ms" if word == "8ms" else word for word in rest]  # the tiny network takes 0.01 to 0.07
        rest = ["resnet18:tiny/model.safetensors" if word in ("resnet18", "resnet50") else word for word in rest]
        if verb == "compare":
            rest += ["--source", "resnet18:tiny/model.safetensors", *TINY, *COMPARE]
        extra = [] if verb != "fit" else FROM_BASE if "run/base" in rest else [*TINY, *QUICK]
        assert main([verb, *rest, *extra]) == 0, command
    assert {"fit", "evaluate", "predict", "report"} <= verbs
    assert (place / "run/report.html").exists()
    assert (place / "run10/model.safetensors").exists()
    assert "cat.jpg" in capsys.readouterr().out


def test_python_of_the_readme(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(place)
    code = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)[0]
    options = "DataConfig(workers=0), optim=OptimConfig(epochs=2, batch_size=8)"
    code = code.replace('source="resnet50"', f'source="tiny", data_options={options}')
    code = code.replace('out=Path("run")', 'out=Path("again")').replace('afds.load("run")', 'afds.load("again")')
    imports = "import timm\nfrom afds.config import DataConfig, OptimConfig\n"
    exec(imports + "timm_model = timm.create_model('resnet18', num_classes=2)\n" + code, {"__name__": "__main__"})
    assert capsys.readouterr().out.strip() in ("one", "two", "zero")


def test_readme_names_the_two_commands() -> None:
    text = README.read_text(encoding="utf-8")
    assert "make demo" in text
    assert "make test" in text
    for target in re.findall(r"\]\(((?:docs|benchmarks)/[^)#]+)", text):
        assert (README.parent / target).exists(), target
