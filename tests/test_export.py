"""Exported files compute what the network computes, carry what belongs to it, and are there whole or not at all."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import afds.export
from afds.compaction import compact, static
from afds.errors import AfdsError, ExportError
from afds.export import export_run
from afds.export.formats import READERS, SUFFIX, open_onnx, read_facts, write_onnx
from afds.export.onnx_graph import dynamic_graph
from afds.export.skipping import skipping_network
from afds.selection import SelectionConfig, gates, select, set_density
from networks import FAMILIES, randomise_bn, train_like
from runs import LABELS, PREPROCESS, write_photos, write_run

KINDS = list(SUFFIX)


def gap(ours: torch.Tensor, theirs: torch.Tensor | np.ndarray) -> float:
    return float((ours - torch.as_tensor(theirs)).abs().max() / ours.abs().max())


@pytest.mark.parametrize("name", list(FAMILIES))
@pytest.mark.parametrize(
    "config", [SelectionConfig(), SelectionConfig(predictor="low-rank"), SelectionConfig(group=4)],
    ids=["full", "low", "groups"],
)  # fmt: skip
@pytest.mark.parametrize("density", [0.4, 1.0])
@torch.no_grad()
def test_skipping_is_the_masked_forward(name: str, config: SelectionConfig, density: float) -> None:
    torch.manual_seed(0)
    model = train_like(select(randomise_bn(FAMILIES[name]()), config, density=density), spread=0.5).eval()
    small, x_BCHW = compact(model), torch.randn(2, 3, 49, 49)
    in_torch, in_onnx = skipping_network(model, 49), open_onnx(dynamic_graph(small, 49, 5).SerializeToString(), 1)
    for i in range(2):
        expected = model(x_BCHW[i : i + 1])
        assert gap(expected, in_torch(x_BCHW[i : i + 1])) < 1e-3
        assert gap(expected, in_onnx(x_BCHW[i : i + 1].numpy())) < 1e-3


@pytest.mark.parametrize("density", [1e-4, 0.07, 0.5, 0.93])
@torch.no_grad()
def test_one_winner_dead_layers_and_odd_widths(tiny_bottleneck: nn.Module, density: float) -> None:
    model = train_like(select(tiny_bottleneck, density=density)).eval()
    chosen = gates(model)
    for name in ("layer1.0.conv2", "layer2.1.conv3"):  # nothing of these is ever active
        chosen[name].predictor.weight.zero_()
        chosen[name].predictor.bias.fill_(-1.0)
        chosen[name].gamma.fill_(-1.0)
    set_density(model, {"layer3.0.conv1": 1.0})
    x_BCHW = torch.randn(1, 3, 37, 37)
    expected = model(x_BCHW)
    assert gap(expected, skipping_network(model, 37)(x_BCHW)) < 1e-4
    for network in (model, compact(model)):
        run = open_onnx(dynamic_graph(network, 37, 5).SerializeToString(), 1)
        assert gap(expected, run(x_BCHW.numpy())) < 1e-4


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run")
    write_run(path, selection=SelectionConfig())
    return path


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("photos") / "photos"
    for split in ("train", "val"):
        write_photos(path / split)
    return path


@pytest.mark.parametrize("static_form", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_files(run: Path, photos: Path, tmp_path: Path, kind: str, static_form: bool) -> None:
    out = tmp_path / f"a{SUFFIX[kind]}"
    made = export_run(run, kind, static_form=static_form, out=out, data=photos)
    assert made.path == out
    assert made.form == ("static" if static_form else "dynamic")
    assert (made.split, made.images) == ("val", 12)
    assert made.difference < 1e-4
    names = {p.name for p in tmp_path.iterdir()}
    assert names == {out.name, *({"a.bin"} if kind == "openvino" else {})}
    facts = read_facts(out)
    assert facts["labels"] == list(LABELS)
    assert facts["preprocess"] == PREPROCESS.to_dict()
    predict, x_BCHW = READERS[kind](out), torch.randn(3, 3, 32, 32)
    model = afds.load(run).network
    if static_form:
        assert predict(x_BCHW.numpy()).shape == (3, 3)
        assert predict(x_BCHW[:1].numpy()).shape == (1, 3)
        assert list(gates(model))
    else:
        assert gap(model(x_BCHW[:1]), predict(x_BCHW[:1].numpy())) < 1e-4


def test_a_plain_run_is_written_as_it_is(tmp_path: Path, photos: Path) -> None:
    model = write_run(tmp_path / "run", selection=None)
    made = export_run(tmp_path / "run", "onnx", data=photos)
    assert (made.form, made.path) == ("dense", tmp_path / "run/model.onnx")
    x_BCHW = torch.randn(5, 3, 32, 32)
    assert gap(model(x_BCHW).detach(), open_onnx(made.path, 1)(x_BCHW.numpy())) < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_where_nothing_depends_on_the_image_the_file_is_plain_and_the_run_itself(tmp_path: Path, kind: str) -> None:
    model = write_run(tmp_path / "run", selection=SelectionConfig(), scales="learned")
    made = export_run(tmp_path / "run", kind)  # no photos: nothing has to be counted on them
    assert (made.form, made.frozen) == ("static", False)
    x_BCHW = torch.randn(5, 3, 32, 32)
    assert gap(model(x_BCHW).detach(), READERS[kind](made.path)(x_BCHW.numpy())) < 1e-4
    if kind == "onnx":
        nodes = [node.op_type for node in onnx.load(made.path).graph.node]
        assert nodes.count("Conv") == len(gates(model))
        assert not {"Mul", "Sign", "TopK"} & set(nodes)


@pytest.mark.parametrize("kind", KINDS)
def test_layers_with_constant_scales_are_plain_beside_others_that_predict(tmp_path: Path, kind: str) -> None:
    model = write_run(tmp_path / "run", selection=SelectionConfig(), scales="cheap").eval()
    predict = [gate.predictor.out_channels > 0 for gate in gates(model).values()]
    assert {True, False} == set(predict)
    made = export_run(tmp_path / "run", kind)
    assert made.form == "dynamic"
    x_BCHW = torch.randn(1, 3, 32, 32)
    assert gap(model(x_BCHW).detach(), READERS[kind](made.path)(x_BCHW.numpy())) < 1e-4
    if kind == "onnx":
        nodes = [node.op_type for node in onnx.load(made.path).graph.node]
        assert nodes.count("Sign") == sum(predict)


def test_without_photos(run: Path, tmp_path: Path) -> None:
    said: list[str] = []
    made = export_run(run, "onnx", out=tmp_path / "a.onnx", say=said.append)
    assert made.images == 0
    assert made.model is None
    assert any("random images" in line for line in said)
    with pytest.raises(ExportError, match="--static needs the photos"):
        export_run(run, "onnx", static_form=True, out=tmp_path / "b.onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["a.onnx"]


def test_a_file_that_computes_something_else_is_not_left(
    run: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The writer is given another network: the export fails, and what was there before stays."""
    out = tmp_path / "a.onnx"
    out.write_text("the old one")
    true = afds.export.WRITERS["onnx"]

    def wrong(network: nn.Module, *rest: object) -> None:
        torch.nn.init.normal_(network.fc.weight)
        true(network, *rest)
        torch.nn.init.zeros_(network.fc.weight)

    monkeypatch.setitem(afds.export.WRITERS, "onnx", wrong)
    with pytest.raises(ExportError, match="something else"):
        export_run(run, "onnx", out=out, data=photos)
    assert out.read_text() == "the old one"
    assert [p.name for p in tmp_path.iterdir()] == ["a.onnx"]


def test_accuracy_beyond_the_tolerance_fails(
    run: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits that agree but for a hair, which turns every prediction."""
    true = afds.export._predict

    def turned(*args: object, **options: object) -> torch.Tensor:
        logits_BK = true(*args, **options)
        scale = 1e-3 * float(logits_BK.abs().max())
        return logits_BK + scale * torch.nn.functional.one_hot((logits_BK.argmax(1) + 1) % 3, 3)

    model = afds.load(run).network
    monkeypatch.setattr(afds.export, "load_run", lambda path: _flat(run))
    monkeypatch.setattr(afds.export, "_predict", turned)
    assert model is not None
    with pytest.raises(ExportError, match=r"--tolerance 0.5 points"):
        export_run(run, "onnx", out=tmp_path / "a.onnx", data=photos)
    assert not list(tmp_path.iterdir())


def _flat(path: Path) -> object:
    """The run with a classifier whose classes differ by almost nothing, but for their common size."""
    from afds.artifact import load_run

    loaded = load_run(path)
    with torch.no_grad():
        loaded.model.fc.weight.mul_(1e-5)
        loaded.model.fc.bias.fill_(1.0)
    return loaded


@pytest.mark.parametrize(
    ("out", "message"), [("a.pt", "ends in .onnx"), ("nowhere/a.onnx", "no folder"), ("folder.onnx", "is a folder")]
)
def test_bad_places(run: Path, tmp_path: Path, out: str, message: str) -> None:
    (tmp_path / "folder.onnx").mkdir()
    with pytest.raises(ExportError, match=message):
        export_run(run, "onnx", out=tmp_path / out)


FULL = """
import resource, sys
from pathlib import Path
from afds.cli import main
run, out = sys.argv[1:]
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))  # the network has 180,000 bytes
for name in ("a.onnx", "a.xml", "a.pt2"):
    kind = {".onnx": "onnx", ".xml": "openvino", ".pt2": "torch"}[Path(name).suffix]
    print(name, main(["export", run, "--format", kind, "--out", str(Path(out, name))]), file=sys.stderr)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit of a file's size")
def test_no_room_for_the_file(run: Path, tmp_path: Path) -> None:
    """In a process of its own: torch's writer of files ends it where it cannot write."""
    for name in ("a.onnx", "a.xml", "a.bin", "a.pt2"):
        (tmp_path / name).write_text("the old one")
    done = subprocess.run([sys.executable, "-c", FULL, str(run), str(tmp_path)], capture_output=True, text=True,
                          timeout=240, check=False)  # fmt: skip
    wanted = [line for name in ("a.onnx", "a.xml", "a.pt2") for line in
              (f"afds: error: {tmp_path / name}: cannot be written (File too large). Check its folder and the space.",
               f"{name} 2")]  # fmt: skip
    assert (done.returncode, done.stderr.splitlines()) == (0, wanted)
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == dict.fromkeys(
        ("a.onnx", "a.xml", "a.bin", "a.pt2"), "the old one"
    )


@pytest.mark.parametrize("kind", ["onnx", "openvino"])
def test_a_missing_extra_names_the_command(run: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(AfdsError, match=f"pip install onnx onnxscript {'onnxruntime' if kind == 'onnx' else kind}"):
        export_run(run, kind)


def test_static_network_in_any_batch(tiny_mobilenet: nn.Module, tmp_path: Path) -> None:
    model = train_like(select(tiny_mobilenet, density=0.5)).eval()
    small = static(model, [torch.randn(4, 3, 33, 33)])
    write_onnx(small, tmp_path / "a.onnx", 33, 5, {}, dynamic=False)
    for batch in (1, 5):
        x_BCHW = torch.randn(batch, 3, 33, 33)
        assert gap(small(x_BCHW).detach(), open_onnx(tmp_path / "a.onnx", 1)(x_BCHW.numpy())) < 1e-3


SIGNALS = """
import faulthandler, gc, signal, subprocess, sys
from afds.export.formats import open_openvino
faulthandler.enable()  # a signal's stack of its own, on which Python takes all signals, as under pytest
first, second = (open_openvino(b) for b in [open(sys.argv[1], "rb").read()] * 2)
del first; gc.collect()
del second; gc.collect()
signal.signal(signal.SIGCHLD, lambda *_: print("a child ended"))  # torch has one, once data came from processes
subprocess.run(["true"], check=True)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGCHLD"), reason="Windows has no signal when a process ends")
def test_openvino_leaves_the_signals_of_the_program_alone(tiny_resnet: nn.Module, tmp_path: Path) -> None:
    write_onnx(tiny_resnet.eval(), tmp_path / "a.onnx", 33, 5, {}, dynamic=False)
    done = subprocess.run([sys.executable, "-c", SIGNALS, str(tmp_path / "a.onnx")], capture_output=True, text=True,
                          timeout=240, check=False)  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "a child ended\n"), done.stderr
