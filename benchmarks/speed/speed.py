"""The speed figures again, in one command: run folders with random weights, timed by `afds measure`.

    python benchmarks/speed/speed.py --networks resnet18 resnet50 --ratios 5 10 --out DIR

Time depends on which shapes are computed, not on the values, so no photos and no training are needed. (The static
form needs a run with its photos: `afds measure RUN` on a run of your own.) Each network leaves DIR/NAME-KIND-RATIO, a
run folder (networks.py says what kinds there are), and in it measure.json with hardware and versions.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import networks  # first: it makes torchvision importable beside a CPU-only torch

# isort: split
import torch
import tyro

from afds.artifact import save_run
from afds.cli import main as command
from afds.cost import measure_cost
from afds.data import Preprocess
from afds.fitting import cost_summary
from afds.selection import SelectionConfig


@dataclass(frozen=True)
class Options:
    """Time networks with random weights."""

    out: Path
    """Folder for the run folders."""
    networks: tuple[str, ...] = ("resnet18", "resnet50", "resnet101")
    ratios: tuple[float, ...] = (5.0, 10.0)
    """How many times fewer MACs."""
    kinds: tuple[Literal["settled", "cheap", "learned", "choosing"], ...] = ("cheap",)
    input_size: int = 224
    threads: tuple[int, ...] = ()
    """By default one, and all cores."""
    batch: tuple[int, ...] = (1,)
    only: tuple[str, ...] = ()
    """As `afds measure --only`."""
    rounds: int = 15


def make_run(arch: str, kind: str, ratio: float, out: Path, side: int) -> None:
    """A network of ``kind`` with ``ratio`` times fewer MACs, in a run folder."""
    x = torch.randn(1, 3, side, side)
    model = networks.dense(arch, side)
    if kind != "dense":
        model, _ = getattr(networks, kind)(model, ratio, x)
    preprocess = Preprocess(side, round(side / 0.875), "bilinear", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    save_run(out, model=model, arch=arch, arch_args={}, num_classes=networks.CLASSES,
             selection=None if kind == "dense" else SelectionConfig(),
             labels=[str(i) for i in range(networks.CLASSES)], preprocess=preprocess,
             summary=cost_summary(measure_cost(model, [x])))  # fmt: skip


def main(options: Options) -> None:
    for name in options.networks:
        for kind in options.kinds:
            for ratio in options.ratios:
                run = options.out / f"{name}-{kind}-{ratio:g}x"
                make_run(name, kind, ratio, run, options.input_size)
                arguments = ["measure", str(run), "--rounds", str(options.rounds)]
                for option in ("threads", "batch", "only"):
                    values = getattr(options, option)
                    arguments += [f"--{option}", *map(str, values)] if values else []
                if command(arguments) != 0:
                    raise SystemExit(1)


if __name__ == "__main__":
    main(tyro.cli(Options))
