"""The native runtime beside the dense networks of ONNX Runtime and OpenVINO, on this machine's CPU.

::

    python benchmarks/speed/runtime.py --archs resnet18 resnet50 --ratios 5 10 --threads 1 2 --precisions float32 bf16

Networks with random weights, of several kinds (networks.py): `cheap`, today's default; `settled`, with all scales
predicted; `learned`, without predictors; and `choosing`, whose predictors choose differently for each image, at uniform
densities; all at the ratio of counted MACs, predictors included.
All runtimes take turns in one process: in each round each one runs once untimed and five times timed (with more than
one thread after those of the runtime before have stopped spinning). Batch 1. A row's speed-up is that over the fastest
dense peer of the same precision (ONNX Runtime is timed in float32 only). `--static`:
also the choosing network with its selection frozen to the winners of one image and compacted. Needs
`pip install -c constraints.txt onnx onnxscript onnxruntime openvino`; what is not installed is left out, and said.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory

import afds  # first: it makes torchvision importable beside a CPU-only torch

# isort: split
import numpy as np
import torch
from torch import nn

import afds.runtime
import networks
from afds.compaction import static
from afds.cost import CostMeter
from afds.hardware import _cpu_name
from afds.measure import rest

Runner = Callable[[np.ndarray], object]
SHORT = {"float32": "f32", "bf16": "bf16"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archs", nargs="+", default=["resnet18", "resnet50"])
    parser.add_argument("--ratios", nargs="+", type=float, default=[5.0, 10.0])
    kinds = ["settled", "low_rank", "cheap", "learned", "choosing", "choosing8", "choosing16"]
    parser.add_argument("--kinds", nargs="+", choices=kinds, default=["cheap", "learned", "choosing"])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--size", type=int, default=224, help="pixels, a side of the square image")
    parser.add_argument("--predictor", choices=["full", "low-rank"], default="full")
    parser.add_argument("--precisions", nargs="+", choices=list(SHORT), default=["float32"])
    parser.add_argument("--isas", nargs="+", default=["auto"], help="instruction sets of bf16, in rows of their own")
    parser.add_argument("--static", action="store_true", help="also time the frozen, compacted networks")
    parser.add_argument("--seconds", type=float, default=10.0, help="of timing for each network and number of threads")
    parser.add_argument("--profile", action="store_true", help="print the profile of each network too")
    parser.add_argument("--json", type=Path, help="append one line for each timing to this file")
    args = parser.parse_args()
    print(f"{_cpu_name()}, {platform.system()}, batch 1, {args.size} px, predictors: {args.predictor}")
    for arch in args.archs:
        models = {"dense": (networks.dense(arch, args.size), 1.0)}
        x = torch.randn(1, 3, args.size, args.size)
        for ratio in args.ratios:
            for kind in args.kinds:
                models[f"{ratio:g}x {kind}"] = getattr(networks, kind)(models["dense"][0], ratio, x, args.predictor)
            if args.static:
                frozen = static(networks.choosing(models["dense"][0], ratio, x, args.predictor)[0], [x])
                models[f"{ratio:g}x static"] = (frozen, CostMeter(models["dense"][0]).mean([x]).counted
                                                / CostMeter(frozen).mean([x]).counted)  # fmt: skip
        for threads in args.threads:
            compare(arch, models, x.numpy(), threads, args)


Row = tuple[str, str, float]  # runtime and network, precision, MACs ratio


def runners(
    models: dict[str, tuple[nn.Module, float]], x: np.ndarray, threads: int, folder: str, args: argparse.Namespace
) -> dict[Row, Runner]:
    model = models["dense"][0]
    found: dict[Row, Runner] = {}
    try:
        import onnxruntime

        path = f"{folder}/model.onnx"
        torch.onnx.export(model, (torch.from_numpy(x),), path, dynamo=True, verbose=False)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        feed = session.get_inputs()[0].name
        found["ONNX Runtime dense", "float32", 1.0] = lambda a, feed=feed: session.run(None, {feed: a})
    except ImportError as error:
        print(f"left out: ONNX Runtime ({error})")
    try:
        import openvino

        converted = openvino.convert_model(model, example_input=torch.from_numpy(x))
        converted.reshape({0: list(x.shape)})
        for precision in args.precisions:
            request = openvino.Core().compile_model(converted, "CPU", {
                "INFERENCE_PRECISION_HINT": SHORT[precision], "PERFORMANCE_HINT": "LATENCY",
                "INFERENCE_NUM_THREADS": threads,
            }).create_infer_request()  # fmt: skip
            found["OpenVINO dense", precision, 1.0] = lambda a, request=request: request.infer({0: a})
    except ImportError as error:
        print(f"left out: OpenVINO ({error})")
    for precision in args.precisions:
        for isa in args.isas if precision == "bf16" else ["auto"]:
            for name, (network, ratio) in models.items():
                run = afds.runtime.compile(
                    network, input_size=x.shape[2], threads=threads, isa=isa, precision=precision
                )
                found[f"afds {name}" + (f" ({run.isa})" if precision == "bf16" else ""), precision, ratio] = run
    return found


def compare(
    arch: str, models: dict[str, tuple[nn.Module, float]], x: np.ndarray, threads: int, args: argparse.Namespace
) -> None:
    with TemporaryDirectory() as folder:
        found = runners(models, x, threads, folder, args)
        times: dict[Row, list[float]] = {name: [] for name in found}
        end = time.perf_counter() + args.seconds
        while time.perf_counter() < end:
            for name, run in found.items():
                if threads > 1:
                    rest()
                run(x)
                for _ in range(5):
                    start = time.perf_counter()
                    run(x)
                    times[name].append(1e3 * (time.perf_counter() - start))
    plural = "s" if threads > 1 else ""
    print(f"\n{arch}, {threads} thread{plural}; speed-up over the fastest dense peer of the same precision\n")
    print("| runtime | precision | median ms | p10 to p90 | MACs ratio | speed-up | share of the ratio |\n"
          "|---|---|---|---|---|---|---|")  # fmt: skip
    for (name, precision, ratio), t in times.items():
        best = peer(times, precision)
        median, low, high = (float(np.percentile(t, q)) for q in (50, 10, 90))
        print(f"| {name} | {precision} | {median:.2f} | {low:.2f} to {high:.2f} | {ratio:.2f} | {best / median:.2f} | "
              f"{best / median / ratio:.2f} |", flush=True)  # fmt: skip
        if args.json:
            versions = {p: metadata.version(p) for p in ("torch", "onnxruntime", "openvino")}
            line = {"arch": arch, "threads": threads, "runtime": name, "precision": precision, "median_ms": median,
                    "p10_ms": low, "p90_ms": high, "macs_ratio": ratio, "predictor": args.predictor, "cpu": _cpu_name(),
                    "date": time.strftime("%Y-%m-%d"), "versions": versions}  # fmt: skip
            with args.json.open("a") as out:
                out.write(json.dumps(line) + "\n")
    if args.profile:
        for (name, precision, _), run in found.items():
            if isinstance(run, afds.runtime.Executor):
                layers = run.profile(x, repeats=20)
                total = sum(layer.total for layer in layers)
                parts = {p: sum(getattr(layer, p) for layer in layers) / total for p in ("predictor", "select", "conv",
                                                                                         "rest")}  # fmt: skip
                print(
                    f"{name}, {precision}: {1e3 * total:.2f} ms, "
                    + ", ".join(f"{p} {100 * v:.1f} %" for p, v in parts.items())
                )


def peer(times: dict[Row, list[float]], precision: str) -> float:
    """Milliseconds of the fastest dense runtime in this precision, or of our own dense network where there is none."""
    same = {name: float(np.median(t)) for (name, of, _), t in times.items() if of == precision}
    others = [ms for name, ms in same.items() if not name.startswith("afds ")]
    return min(others) if others else next(ms for name, ms in same.items() if name.startswith("afds dense"))


if __name__ == "__main__":
    main()
