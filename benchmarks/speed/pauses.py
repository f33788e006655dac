"""One image after a pause, as a service with little to do has it: the native runtime beside dense OpenVINO.

::

    OMP_WAIT_POLICY=PASSIVE python benchmarks/speed/pauses.py --arch resnet18 --size 128 --ratio 5 --pause 12

Each network is called once after every pause, in turn, with one and with more threads; ONNX Runtime is left out, whose
threads spin through short pauses. Milliseconds: median, mean, 90th percentile; then the median of calls in a row.
"""

from __future__ import annotations

import argparse
import time

import afds  # first: it makes torchvision importable beside a CPU-only torch

# isort: split
import numpy as np
import torch

import afds.runtime
import networks
from afds.hardware import _cpu_name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="resnet18")
    parser.add_argument("--size", type=int, default=128, help="pixels, a side of the square image")
    parser.add_argument("--ratio", type=float, default=5.0, help="of counted MACs")
    parser.add_argument("--kind", default="cheap", choices=["settled", "low_rank", "cheap", "learned", "choosing"])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--pause", type=float, default=12.0, help="ms between calls")
    parser.add_argument("--calls", type=int, default=200, help="of each network")
    args = parser.parse_args()
    dense = networks.dense(args.arch, args.size)
    x = torch.randn(1, 3, args.size, args.size)
    model, ratio = getattr(networks, args.kind)(dense, args.ratio, x, "full")
    found = {}
    for threads in args.threads:
        for name, network in (("afds dense", dense), (f"afds {ratio:.1f}x", model)):
            found[name, threads] = afds.runtime.compile(network, input_size=args.size, threads=threads)
        try:
            import openvino

            converted = openvino.convert_model(dense, example_input=x)
            converted.reshape({0: list(x.shape)})
            request = openvino.Core().compile_model(converted, "CPU", {
                "INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads,
            }).create_infer_request()  # fmt: skip
            found["OpenVINO dense", threads] = lambda a, request=request: request.infer({0: a})
        except ImportError as error:
            print(f"left out: OpenVINO ({error})")
    image = x.numpy()

    def ms(run) -> float:
        start = time.perf_counter()
        run(image)
        return 1e3 * (time.perf_counter() - start)

    after: dict = {row: [] for row in found}
    in_a_row: dict = {row: [] for row in found}
    for _ in range(args.calls):
        for row, run in found.items():
            time.sleep(args.pause / 1e3)
            after[row].append(ms(run))
    for _ in range(args.calls // 10):
        for row, run in found.items():
            run(image)
            in_a_row[row] += [ms(run) for _ in range(5)]
    print(f"{_cpu_name()}, {args.arch}, {args.kind}, {args.size} px, batch 1, {args.pause:g} ms between calls\n")
    print("| network | threads | after a pause: median | mean | p90 | in a row: median |\n|---|---|---|---|---|---|")
    for (name, threads), t in after.items():
        figures = (np.median(t), np.mean(t), np.percentile(t, 90), np.median(in_a_row[name, threads]))
        print(f"| {name} | {threads} | " + " | ".join(f"{figure:.2f}" for figure in figures) + " |")


if __name__ == "__main__":
    main()
