"""`afds compare --ray`: without Ray a clear error; on a real local cluster the same results, resume, Ctrl-C."""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from afds.artifact import is_run
from afds.commands import _bare_ray
from afds.compare.plan import CompareConfig
from afds.compare.run import compare
from afds.config import DataConfig, DescentConfig, FitConfig, HardwareConfig, OptimConfig
from afds.data import write_digits
from afds.errors import AfdsError, ConfigError
from afds.fitting import fit
from afds.record import read_lines

ARCH = '{"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]}'
DATA = DataConfig(input_size=32, flip=False, workers=0, val_fraction=0.2)
HAS_RAY = importlib.util.find_spec("ray") is not None
with_ray = pytest.mark.skipif(not HAS_RAY, reason="needs pip install ray")


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("ray")
    write_digits(root / "photos", range(3), per_class=12, test_per_class=10)
    config = FitConfig(data=root / "photos", source="resnet18", arch_args=ARCH, method="scratch", out=root / "source",
                       data_options=DATA, optim=OptimConfig(epochs=1, batch_size=8))  # fmt: skip
    fit(config, quiet=True)
    return root


@pytest.fixture(scope="module")
def cluster(room: Path) -> Iterator[str]:
    """A cluster that is there before `compare` and after it, as one of several nodes would be."""
    import ray

    context = ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level=logging.WARNING,
                       object_store_memory=2**27)  # fmt: skip
    yield context.address_info["address"]
    ray.shutdown()


def options(room: Path, out: Path, **changes: Any) -> CompareConfig:
    config = CompareConfig(
        data=(room / "photos",), out=out, methods="l2,l2+l1", budgets="2x", seeds=2, epochs=1, base_epochs=1,
        source=str(room / "source"), data_options=DATA, optim=OptimConfig(batch_size=8, lr=0.02),
        descent=DescentConfig(stages=2, images=8), hardware=HardwareConfig(precision="32-true"),
    )  # fmt: skip
    return dataclasses.replace(config, **changes)


def test_without_ray_it_says_how_to_get_it(room: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)  # what `import ray` finds where there is none
    with pytest.raises(ConfigError, match="pip install 'ray>="):
        compare(options(room, tmp_path / "never", ray="local"))
    assert not (tmp_path / "never").exists()


def test_an_address_may_be_left_out() -> None:
    assert _bare_ray(["--ray", "--jobs", "2"]) == ["--ray", "local", "--jobs", "2"]
    assert _bare_ray(["photos", "--ray"]) == ["photos", "--ray", "local"]
    assert _bare_ray(["--ray", "head:6379", "photos"]) == ["--ray", "head:6379", "photos"]


def test_a_trial_on_ray_has_one_device(room: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="one device"):
        options(room, tmp_path, ray="local", hardware=HardwareConfig(devices=2))


@with_ray
@pytest.mark.slow
def test_ray_gives_the_same_results_and_shares_bases(
    room: Path, tmp_path: Path, cluster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = {line["key"]: line for line in compare(options(room, tmp_path / "alone", trials=2))}
    monkeypatch.chdir(tmp_path)  # relative paths mean the same on a node
    config = options(room, Path("out"), trials=2, ray=cluster, jobs=2)
    lines = {line["key"]: line for line in compare(config)}
    assert [line["kind"] for line in lines.values()].count("base") == 2
    assert {key: line["hits"] for key, line in lines.items()} == {key: line["hits"] for key, line in alone.items()}
    assert {key: line["val"] for key, line in lines.items()} == {key: line["val"] for key, line in alone.items()}
    assert {line["hardware"]["threads"] for line in lines.values()} == {1}
    # Begun on Ray, it goes on without: --ray is no option of the results.
    monkeypatch.setattr("afds.compare.run.fit", lambda *_, **__: pytest.fail("trained again"))
    assert {line["key"] for line in compare(dataclasses.replace(config, ray=None, jobs=1))} == set(lines)


@with_ray
@pytest.mark.slow
def test_a_trial_that_diverges_is_a_result_and_one_that_cannot_be_is_an_error(
    room: Path, tmp_path: Path, cluster: str
) -> None:
    wild = options(room, tmp_path / "wild", methods="l2-sp[transfer.l2_sp=1e300],l2", seeds=1, ray=cluster, jobs=2)
    found = {line["row"]: line for line in compare(wild)}
    assert found["l2-sp[transfer.l2_sp=1e300]"]["val"] is None
    assert found["l2-sp[transfer.l2_sp=1e300]"]["error"]
    assert found["l2"]["val"] is not None
    # A base that is damaged after it was made: the error is the trial's own, by its class and its words.
    broken = options(room, tmp_path / "broken", methods="l2+l1", seeds=1, ray=cluster)
    compare(broken)
    base = next((tmp_path / "broken/bases/photos").iterdir())
    base.joinpath("model.safetensors").write_bytes(b"")
    with pytest.raises(AfdsError) as caught:
        compare(dataclasses.replace(broken, seeds=1, budgets="4x"))
    assert "model.safetensors" in str(caught.value)


@with_ray
@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_stopped_it_goes_on_where_it_was(room: Path, tmp_path: Path, how: signal.Signals) -> None:
    arguments = ["compare", str(room / "photos"), "--out", str(tmp_path / "out"), "--methods", "l2", "--seeds", "1",
                 "--source", str(room / "source"), "--epochs", "30", "--base-epochs", "30", "--optim.batch-size", "8",
                 "--data-options.input-size", "32", "--data-options.workers", "0", "--hardware.precision", "32-true",
                 "--ray"]  # fmt: skip
    run = tmp_path / "out/runs/photos/l2/1x/seed0"
    process = subprocess.Popen([sys.executable, "-m", "afds", *arguments], start_new_session=True,
                               stderr=subprocess.PIPE, text=True)  # fmt: skip
    limit = time.monotonic() + 120
    while not (run / "last.ckpt").exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < limit
        time.sleep(0.05)
    os.kill(process.pid, how)  # the driver alone: the trial is in a process of Ray's
    message = process.communicate(timeout=60)[1]
    if how == signal.SIGINT:
        assert process.returncode == 130
        assert "interrupted" in message
    epochs = _epochs_when_quiet(run)
    assert not is_run(run)
    assert 1 <= len(epochs) < 60
    again = subprocess.run([sys.executable, "-m", "afds", *arguments], capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert is_run(run)
    assert _epochs(run)[: len(epochs) - 1] == epochs[:-1]  # seconds and all: none before the last was trained again
    assert len(_epochs(run)) == 60


def _epochs(run: Path) -> list[dict[str, Any]]:
    return [line for line in read_lines(run / "metrics.jsonl") if line["kind"] == "epoch"]


def _epochs_when_quiet(run: Path) -> list[dict[str, Any]]:
    """The epochs of a stopped trial; fails where a process of the cluster goes on writing."""
    time.sleep(3)
    before = _epochs(run)
    time.sleep(2)
    assert _epochs(run) == before
    return before
