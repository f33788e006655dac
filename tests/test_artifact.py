"""A saved network comes back bit for bit; a folder with anything wrong in it is refused by name."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from afds.architecture import build_network, check_architecture
from afds.artifact import describe_units, is_run, load_run, save_run
from afds.errors import RunFolderError, SourceError
from afds.files import alone_in, read_json, write_atomic, write_json
from afds.selection import SelectionConfig, densities
from runs import ARCH_ARGS, LABELS, PREPROCESS, tiny_network, write_run

SELECTIONS = [None, SelectionConfig(), SelectionConfig(predictor="low-rank", standardise=False, bounded=False)]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("written")
    write_run(path, selection=SelectionConfig())
    return path


@pytest.fixture
def run(written: Path, tmp_path: Path) -> Path:
    """A copy, to be spoiled."""
    return shutil.copytree(written, tmp_path / "run")


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("selection", SELECTIONS)
def test_reloaded_predicts_bit_for_bit(tmp_path: Path, selection: SelectionConfig | None, channels_last: bool) -> None:
    model = write_run(tmp_path / "run", selection=selection, channels_last=channels_last)
    run = load_run(tmp_path / "run")
    assert not run.model.training
    assert (run.arch, run.labels, run.preprocess, run.selection) == ("resnet18", LABELS, PREPROCESS, selection)
    assert densities(run.model) == densities(model)
    weight, saved = run.model.layer2[0].conv1, model.layer2[0].conv1
    weight, saved = (getattr(m, "conv", m).weight for m in (weight, saved))
    assert weight.stride() == saved.stride()
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x_BCHW = torch.randn(3, 3, 32, 32).contiguous(memory_format=memory_format)
        assert torch.equal(run.model(x_BCHW), model(x_BCHW))


def test_depthwise_network_and_what_it_follows(tmp_path: Path) -> None:
    config = SelectionConfig()
    model = tiny_network(selection=config, arch="mobilenetv2_035")
    save_run(tmp_path, model=model, arch="mobilenetv2_035", arch_args={}, num_classes=3, selection=config,
             labels=LABELS, preprocess=PREPROCESS, summary={})  # fmt: skip
    run = load_run(tmp_path)
    x_BCHW = torch.randn(2, 3, 32, 32)
    assert torch.equal(run.model(x_BCHW), model(x_BCHW))
    following = [unit for unit in run.structure["units"].values() if "follows" in unit]
    assert following
    assert all(set(unit["follows"]) <= set(run.structure["units"]) for unit in following)


def test_structure_tells_what_is_kept(run: Path) -> None:
    loaded = load_run(run)
    units = describe_units(loaded.model)
    assert units == loaded.structure["units"]
    for unit in units.values():
        assert unit["dynamic"] + unit["static"] + unit["pruned"] == unit["channels"]
    assert any(unit["pruned"] for unit in units.values())
    assert any(unit["static"] for unit in units.values())
    assert loaded.structure["cost"]["ratio"] > 1


def test_no_pickle_and_no_leftovers(run: Path) -> None:
    names = {"model.safetensors", "structure.json", "labels.json", "preprocess.json"}
    assert {path.name for path in run.iterdir()} == names
    assert is_run(run)
    assert not is_run(run.parent)


def edit(path: Path, change: Any) -> None:
    """Rewrite a JSON file through `change`, which edits in place or returns a new value."""
    value = json.loads(path.read_text())
    result = change(value)
    path.write_text(json.dumps(value if result is None else result))


def replace_weights(run: Path, change: Any) -> None:
    """Rewrite the weights and sign them anew, as an attacker would."""
    tensors = safetensors.torch.load_file(run / "model.safetensors")
    change(tensors)
    data = safetensors.torch.save(tensors)
    (run / "model.safetensors").write_bytes(data)
    edit(run / "structure.json", lambda s: s["weights"].update(sha256=hashlib.sha256(data).hexdigest()))


@pytest.mark.parametrize("name", ["model.safetensors", "structure.json", "labels.json", "preprocess.json"])
@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "garbled", "folder", "pipe"])
def test_damaged_file(run: Path, name: str, damage: str) -> None:
    path, data = run / name, (run / name).read_bytes()
    path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage == "pipe":
        os.mkfifo(path)  # opening it would wait for ever
    elif damage != "missing":
        path.write_bytes({"empty": b"", "cut": data[: len(data) // 2], "garbled": b"\xff\x00" + data[2:]}[damage])
    with pytest.raises(RunFolderError, match=name):
        load_run(run)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("format", 3, "format '3' is not known"),
        ("format", True, "format"),
        ("arch", "hf_hub:someone/resnet18", "not the plain name"),
        ("arch", "hf-hub:someone/resnet18", "not the plain name"),
        ("arch", "local-dir:/tmp", "not the plain name"),
        ("arch", "../resnet18", "not the plain name"),
        ("arch", "resnet18\n", "not the plain name"),
        ("arch", "no_such_network", "not the plain name"),
        ("arch", ["resnet18"], "arch is missing or of the wrong kind"),
        ("arch_args", {"pretrained": True}, "'pretrained' is not allowed"),
        ("arch_args", {"checkpoint_path": "x.pth"}, "'checkpoint_path' is not allowed"),
        ("arch_args", {"pretrained_cfg": {"file": "x.pth"}}, "'pretrained_cfg' is not allowed"),
        ("arch_args", {"pretrained_cfg_overlay": {"file": "x.pth"}}, "is not allowed"),
        ("arch_args", {"cache_dir": "/tmp"}, "'cache_dir' is not allowed"),
        ("arch_args", {"scriptable": True}, "'scriptable' is not allowed"),
        ("arch_args", {"layers": {"a": 1}}, "layers is"),
        ("arch_args", {"layers": [1, 1, 1, 10**9]}, "layers is"),
        ("arch_args", {"layers": [1] * 1000}, "layers is"),
        ("arch_args", {"channels": [8, 16, 16, 2**62]}, "channels is"),
        ("arch_args", {"channels": [8, 16, 16, 1.5]}, "channels is"),
        ("arch_args", {"drop_rate": 7}, "drop_rate is"),
        ("arch_args", {"stem_type": "a/b"}, "stem_type is"),
        ("arch_args", [], "arch_args is missing or of the wrong kind"),
        ("num_classes", 10**12, "number of classes"),
        ("num_classes", -1, "number of classes"),
        ("num_classes", True, "number of classes"),
        ("num_classes", 4, "3 class names for a network with 4"),
        ("memory_format", "x", "memory_format"),
        ("selection", {"predictor": "evil"}, "predictor"),
        ("selection", {"rank_divisor": "1"}, "rank_divisor"),
        ("selection", {"unknown": 1}, "unknown"),
        ("selection", None, "tensor"),
        ("weights", {}, "sha256"),
        ("units", {}, "units do not describe"),
        ("units", {"conv1": 1}, "should be an object"),
    ],
)
def test_hostile_structure(run: Path, key: str, value: Any, message: str) -> None:
    edit(run / "structure.json", lambda s: s.update({key: value}))
    with pytest.raises(RunFolderError, match=message):
        load_run(run)


@pytest.mark.parametrize("density", [0, -0.5, 1.01, 1e300, "0.5", None, True])
def test_density_out_of_range(run: Path, density: Any) -> None:
    edit(run / "structure.json", lambda s: s["units"]["conv1"].update(density=density))
    with pytest.raises(RunFolderError, match=r"conv1.*\(0, 1\]"):
        load_run(run)


@pytest.mark.parametrize("text", ["NaN", "1e999"])
def test_density_no_number(run: Path, text: str) -> None:
    path = run / "structure.json"
    path.write_text(path.read_text().replace('"density": ', f'"density": {text}, "was": ', 1))
    with pytest.raises(RunFolderError):
        load_run(run)


@pytest.mark.parametrize("key", ["k", "channels", "pruned"])
def test_units_that_contradict_the_weights(run: Path, key: str) -> None:
    edit(run / "structure.json", lambda s: s["units"]["conv1"].update({key: 1}))
    with pytest.raises(RunFolderError, match="units do not describe"):
        load_run(run)


def test_unknown_unit(run: Path) -> None:
    edit(run / "structure.json", lambda s: s["units"].update({"evil": {"density": 0.5}}))
    with pytest.raises(RunFolderError, match="evil"):
        load_run(run)


def test_wide_network_is_refused_before_it_fills_memory(run: Path) -> None:
    wide = {"layers": [200] * 4, "channels": [8192] * 4}
    edit(run / "structure.json", lambda s: s.update(arch="resnet50", arch_args=wide | {"layers": [9] * 4}))
    with pytest.raises(RunFolderError, match=r"too small for resnet50|timm cannot build"):
        load_run(run)


def test_tampered_weights(run: Path) -> None:
    data = bytearray((run / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (run / "model.safetensors").write_bytes(bytes(data))
    with pytest.raises(RunFolderError, match="SHA-256"):
        load_run(run)


def test_pickle_in_place_of_weights(run: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os.mkdir, (str(run / "executed"),))

    torch.save({"x": Evil()}, run / "model.safetensors")
    data = (run / "model.safetensors").read_bytes()
    edit(run / "structure.json", lambda s: s["weights"].update(sha256=hashlib.sha256(data).hexdigest()))
    with pytest.raises(RunFolderError, match=r"model\.safetensors"):
        load_run(run)
    assert not (run / "executed").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("fc.weight"), "lacks tensor 'fc.weight'"),
        (lambda t: t.update(evil=torch.zeros(2)), "unknown tensor 'evil'"),
        (lambda t: t.update({"fc.weight": torch.zeros(3, 25)}), r"fc.weight is \(3, 25\)"),
        (lambda t: t.update({"fc.weight": t["fc.weight"].half()}), "float16"),
        (lambda t: t["fc.bias"].fill_(torch.nan), "fc.bias holds NaN"),
        (lambda t: t["fc.bias"].fill_(torch.inf), "fc.bias holds NaN or infinity"),
    ],
)
def test_wrong_weights(run: Path, change: Any, message: str) -> None:
    replace_weights(run, change)
    with pytest.raises(RunFolderError, match=message):
        load_run(run)


@pytest.mark.parametrize("labels", [["ant", "bee"], ["ant", "ant", "bee"], ["ant", "bee", 3], {"ant": 0},
                                    ["ant", "bee", ""], ["ant", "bee", "x" * 5000]])  # fmt: skip
def test_wrong_labels(run: Path, labels: Any) -> None:
    edit(run / "labels.json", lambda _: labels)
    with pytest.raises(RunFolderError, match=r"labels\.json"):
        load_run(run)


@pytest.mark.parametrize("change", [{"input_size": 10**9}, {"mean": [0, 0]}, {"evil": 1}, {"interpolation": "x"}])
def test_wrong_preprocessing(run: Path, change: dict[str, Any]) -> None:
    edit(run / "preprocess.json", lambda p: p.update(change))
    with pytest.raises(RunFolderError, match=r"preprocess\.json"):
        load_run(run)


def test_not_a_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing", tmp_path / "file"):
        (tmp_path / "file").write_text("x")
        with pytest.raises(RunFolderError, match=r"Give the folder"):
            load_run(path)


def test_a_half_written_run_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the file at which writing stops: nothing loads."""
    import afds.artifact

    for name in ("labels.json", "preprocess.json", "structure.json"):

        def stop(path: Path, value: Any, name: str = name) -> None:
            if Path(path).name == name:
                raise OSError("killed")
            write_json(path, value)

        monkeypatch.setattr(afds.artifact, "write_json", stop)
        with pytest.raises(OSError, match="killed"):
            write_run(tmp_path / name, selection=None)
        assert not is_run(tmp_path / name)
        with pytest.raises(RunFolderError, match=r"structure\.json: missing"):
            load_run(tmp_path / name)


def test_what_would_not_load_is_not_saved(tmp_path: Path) -> None:
    model = tiny_network(selection=None, **ARCH_ARGS)

    def save(**change: Any) -> None:
        given: dict[str, Any] = {"model": model, "arch_args": ARCH_ARGS, "selection": None, "labels": LABELS}
        save_run(
            tmp_path / "run", arch="resnet18", num_classes=3, preprocess=PREPROCESS, summary={}, **(given | change)
        )

    for change, message in (
        ({"arch_args": {"evil": 1}}, "could not be loaded again"),
        ({"labels": ("ant",)}, "1 class names"),
        ({"selection": SelectionConfig()}, "without selection"),
        ({"model": tiny_network(selection=None, **ARCH_ARGS).half()}, "float32"),
    ):
        with pytest.raises(RunFolderError, match=message):
            save(**change)
    with torch.no_grad():
        model.fc.weight[0, 0] = torch.nan
    with pytest.raises(RunFolderError, match=r"fc\.weight holds NaN"):
        save()
    assert not (tmp_path / "run").exists()


def test_building_leaves_the_random_state_alone() -> None:
    before = torch.get_rng_state()
    model = build_network("resnet18", {"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 8]}, 3)
    assert torch.equal(before, torch.get_rng_state())
    assert not model.training
    with pytest.raises(SourceError, match="timm cannot build"):
        build_network("resnet18", {"layers": [1]}, 3)
    with pytest.raises(SourceError, match="evil"):
        check_architecture("resnet18", {"evil": 1}, 3)


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"ä": [1, 2.5, None]})
    assert read_json(path) == {"ä": [1, 2.5, None]}
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, float("nan"))
    assert read_json(path) == {"ä": [1, 2.5, None]}  # the old one is whole
    with pytest.raises(RunFolderError, match=r"nowhere.*cannot be written"):
        write_atomic(tmp_path / "nowhere" / "a", b"x")
    for text in ("[" * 100_000, "[NaN]", "[1" + "0" * 9999 + "]", "{"):
        path.write_text(text)
        with pytest.raises(RunFolderError, match=r"a\.json: not readable as JSON"):
            read_json(path)
    with pytest.raises(RunFolderError, match="larger than 1 bytes"):
        read_json(path.with_name(path.name), max_bytes=1) if path.write_text("[1]") else None
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_who_dies_lets_go_of_a_folder(tmp_path: Path) -> None:
    holding = f"""
import time
from pathlib import Path
from afds.files import alone_in
with alone_in(Path({str(tmp_path)!r})):
    print("held", flush=True)
    time.sleep(120)
"""
    with subprocess.Popen([sys.executable, "-c", holding], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        try:
            assert other.stdout.readline() == b"held\n"
            with pytest.raises(RunFolderError, match="another process"), alone_in(tmp_path):
                pass
        finally:
            other.kill()
    with alone_in(tmp_path):
        pass
