"""An install where there is no compiler: it succeeds, and PyTorch predicts what the kernels would have."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from afds.selection import SelectionConfig
from runs import write_photos, write_run

ROOT = Path(__file__).parent.parent


def run(*command: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *map(str, command)], env={**os.environ, **env}, capture_output=True,
                          text=True)  # fmt: skip


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """afds as pip installs it, build isolation and all, where CC and CXX lead nowhere."""
    folder = tmp_path_factory.mktemp("install")
    done = run("-m", "pip", "install", "--no-deps", "--target", folder / "site", ROOT,
               "-C", f"build-dir={folder / 'build'}", "-v", CC="/nowhere/cc", CXX="/nowhere/c++")  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "No C++ compiler that works was found" in done.stdout + done.stderr
    return folder / "site"


@pytest.mark.slow
def test_it_installs_and_predicts_without_a_compiler(site: Path, tmp_path: Path) -> None:
    assert (site / "afds" / "runtime" / "executor.py").is_file()
    assert not list(site.rglob("*_kernels*.so"))
    write_run(tmp_path / "run", selection=SelectionConfig())
    write_photos(tmp_path / "photos", each=1)
    # -S: without the hook of an editable install, which would come before the install under test
    path = os.pathsep.join([str(site), sysconfig.get_path("purelib")])
    results = {}
    for options in ((), ("--runtime", "native"), ("--runtime", "torch")):
        results[options] = run("-S", "-m", "afds", "predict", tmp_path / "run", tmp_path / "photos", "--json", *options,
                               PYTHONPATH=path)  # fmt: skip
    torch = results["--runtime", "torch"]
    assert (torch.returncode, torch.stderr) == (0, "")
    assert len([json.loads(line)["top"] for line in torch.stdout.splitlines()]) == 3
    for options in ((), ("--runtime", "native")):
        assert results[options].returncode == 0
        assert results[options].stdout == torch.stdout
        assert results[options].stderr.startswith("afds: note: PyTorch runs this network. afds was installed without "
                                                  "its native runtime. Install a C++ compiler")  # fmt: skip
        assert len(results[options].stderr.splitlines()) == 1
