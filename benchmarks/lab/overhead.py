"""What `afds compare` adds to a trial: the same training through `afds fit` and through `afds compare`, in turns.

    python benchmarks/lab/overhead.py DATA --source resnet18:WEIGHTS --rounds 5

Both are whole commands, from a fresh process to its end, so the start of Python and torch is in both. A comparison of
one trial pays once for what it does once (checks, table, page); two trials in one comparison, less one, are the price
of a trial inside a comparison. Wall time is at the mercy of what else the machine does; CPU time (user + system, of the
process and its children) is so much less.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def timed(command: list[str]) -> tuple[float, float]:
    """Wall and CPU seconds of a command, its children included."""
    before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    wall, after = time.perf_counter() - begun, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="a folder of class folders, with test/")
    parser.add_argument("--source", required=True, help="as afds fit --source")
    parser.add_argument("--size", type=int, default=64, help="pixels")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    o = parser.parse_args()
    afds = [sys.executable, "-m", "afds"]
    shared = ["--source", o.source, "--data-options.input-size", str(o.size), "--hardware.precision", "32-true"]
    fit = [*afds, "fit", str(o.data), "--method", "l2", "--budget", "1x", *shared, "--optim.epochs", str(o.epochs)]
    # A row without a base learns for base-epochs + epochs.
    compare = [*afds, "compare", str(o.data), "--methods", "l2", "--budgets", "1x", *shared]
    compare += ["--base-epochs", "1", "--epochs", str(o.epochs - 1)]
    ways = {"fit": fit, "compare, 1 trial": [*compare, "--seeds", "1"], "compare, 2 trials": [*compare, "--seeds", "2"]}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for turn in range(o.rounds):
        names = list(ways) if turn % 2 == 0 else list(reversed(ways))
        for name in names:
            with tempfile.TemporaryDirectory() as folder:
                times[name].append(timed([*ways[name], "--out", f"{folder}/out"]))
            print(
                f"round {turn + 1} {name}: wall {times[name][-1][0]:.1f} s, CPU {times[name][-1][1]:.1f} s", flush=True
            )
    print("\n| | wall, s: median [least, most] | CPU, s: median [least, most] |\n|---|---:|---:|")
    rows = {name: list(zip(*pairs, strict=True)) for name, pairs in times.items()}
    pairs = zip(times["compare, 2 trials"], times["compare, 1 trial"], strict=True)
    rows["a trial more"] = list(zip(*[(two[0] - one[0], two[1] - one[1]) for two, one in pairs], strict=True))
    for name, columns in rows.items():
        cells = [f"{statistics.median(c):.1f} [{min(c):.1f}, {max(c):.1f}]" for c in columns]
        print(f"| {name} | {cells[0]} | {cells[1]} |")
    for name in ("compare, 1 trial", "a trial more"):
        for unit, i in (("wall", 0), ("CPU", 1)):
            ratio = statistics.median(a / b for a, b in zip(rows[name][i], rows["fit"][i], strict=True))
            print(f"{name} / fit, {unit}, median of the rounds' ratios: {ratio:.3f}")


if __name__ == "__main__":
    main()
