"""How long a run folder takes from disk to its first prediction, and how much memory it then holds.

::

    python benchmarks/speed/loading.py --arch resnet50

Run folders with random weights, settled and choosing at the ratio (networks.py), one of the same network dense,
and the dense network as ONNX, are opened by a process of their own each, in turn. Seconds: `import` of everything that
is needed, apart; then `load` (read and check the file), `compile` and `first`, the first prediction; `next` is the one
after it. Memory in MiB (Linux): `held` is how much the resident set has grown since the imports when the network has
predicted twice and all that is not needed for a third time has been dropped; `peak` is the most on the way there.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

SUBJECTS = (
    "afds settled",
    "afds choosing",
    "afds dense",
    "afds settled bf16",
    "afds choosing bf16",
    "afds dense bf16",
    "ONNX Runtime dense",
    "OpenVINO dense",
)
MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="resnet50")
    parser.add_argument("--ratio", type=float, default=10.0, help="how many times fewer MACs")
    parser.add_argument("--size", type=int, default=224, help="pixels, a side of the square image")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--keep", type=Path, help="make the files in this folder, or use those that are there")
    parser.add_argument("--open", help=argparse.SUPPRESS)  # what the processes are told
    args = parser.parse_args()
    if args.open:
        print(json.dumps(opened(args.open, args.keep, args.size, args.threads)))
        return
    with TemporaryDirectory() as folder:
        files = args.keep or Path(folder)
        if not (files / "dense.onnx").exists():
            make_files(files, args.arch, args.ratio, args.size)
        command = [sys.executable, __file__, "--keep", str(files), "--size", str(args.size),
                   "--threads", str(args.threads)]  # fmt: skip
        found: dict[str, list[dict[str, float]]] = {subject: [] for subject in SUBJECTS}
        for _ in range(args.rounds):
            for subject in SUBJECTS:
                done = subprocess.run([*command, "--open", subject], stdout=subprocess.PIPE, check=True, text=True)
                found[subject].append(json.loads(done.stdout.splitlines()[-1]))
    columns = list(found[SUBJECTS[0]][0])
    print(f"{args.arch}, {args.size} px, {args.threads} thread(s), medians of {args.rounds} processes\n")
    print(f"| | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    for subject, rows in found.items():
        values = {c: statistics.median(row[c] for row in rows) for c in columns}
        print(f"| {subject} | " + " | ".join(f"{v:.0f}" if c.endswith("MiB") else f"{v:.3f}"
                                             for c, v in values.items()) + " |")  # fmt: skip


def make_files(out: Path, arch: str, ratio: float, size: int) -> None:
    import networks  # first: it makes torchvision importable beside a CPU-only torch
    from speed import make_run

    # isort: split
    from afds.export.formats import onnx_bytes

    for kind in ("settled", "choosing", "dense"):
        make_run(arch, kind, ratio, out / kind, size)
    (out / "dense.onnx").write_bytes(onnx_bytes(networks.dense(arch, size), size, networks.CLASSES, False))


def opened(subject: str, files: Path, size: int, threads: int) -> dict[str, float]:
    """Seconds and MiB of one network in this process, which has done nothing else."""
    marks = [time.perf_counter()]
    opener = imported(subject)
    import numpy as np

    x_BCHW = np.random.default_rng(0).standard_normal((1, 3, size, size), dtype=np.float32)
    before = resident()
    marks.append(time.perf_counter())
    predict = opener(subject, files, threads, marks)
    for _ in range(2):
        predict(x_BCHW)
        marks.append(time.perf_counter())
    peak = high_water()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what Python has freed and the allocator still holds
    held = resident()
    predict(x_BCHW)  # it still runs
    names = ("import s", "load s", "compile s", "first s", "next s")
    row = dict(zip(names, (b - a for a, b in pairwise(marks)), strict=True))
    total = row["load s"] + row["compile s"] + row["first s"]
    executor: Any = predict
    own = (executor.weight_bytes, executor.workspace_bytes) if subject.startswith("afds") else (float("nan"),) * 2
    return {**row, "load to first s": total, "weights MiB": own[0] / MIB, "features MiB": own[1] / MIB,
            "held MiB": (held - before) / MIB, "peak MiB": (peak - before) / MIB}  # fmt: skip


def imported(subject: str) -> Callable[..., Callable[..., object]]:
    """The function that opens a network, with all that it needs imported."""
    if subject.startswith("afds"):
        import afds  # first: it makes torchvision importable beside a CPU-only torch

        # isort: split
        import timm  # noqa: F401
        import torch

        import afds.runtime
        from afds.artifact import load_run

        def ours(subject: str, files: Path, threads: int, marks: list[float]) -> Callable[..., object]:
            torch.set_num_threads(threads)
            run = load_run(files / subject.split()[1])
            marks.append(time.perf_counter())
            precision = "bf16" if subject.endswith("bf16") else "float32"
            executor = afds.runtime.compile(run, threads=threads, precision=precision)
            marks.append(time.perf_counter())
            return executor

        return ours
    if subject.startswith("ONNX"):
        import onnxruntime

        def onnx(subject: str, files: Path, threads: int, marks: list[float]) -> Callable[..., object]:
            marks.append(time.perf_counter())
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = threads
            session = onnxruntime.InferenceSession(files / "dense.onnx", options, providers=["CPUExecutionProvider"])
            feed = session.get_inputs()[0].name
            marks.append(time.perf_counter())
            return lambda x_BCHW: session.run(None, {feed: x_BCHW})

        return onnx
    import openvino

    def vino(subject: str, files: Path, threads: int, marks: list[float]) -> Callable[..., object]:
        core = openvino.Core()
        model = core.read_model(files / "dense.onnx")
        marks.append(time.perf_counter())
        compiled = core.compile_model(model, "CPU", {
            "INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads,
        })  # fmt: skip
        request = compiled.create_infer_request()
        marks.append(time.perf_counter())
        return lambda x_BCHW: request.infer({0: x_BCHW})

    return vino


def status(key: str) -> int:
    """Bytes, of Linux's account of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise SystemExit("loading.py measures memory on Linux only.")


def resident() -> int:
    return status("VmRSS")


def high_water() -> int:
    return status("VmHWM")


if __name__ == "__main__":
    main()
