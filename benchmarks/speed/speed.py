"""The speed figures again, in one command: run folders with random weights, timed by `afds measure`.

    python benchmarks/speed/speed.py --networks resnet18 resnet50 --density 0.25 --out DIR

Time depends on which shapes are computed, not on the values, so no photos and no training are needed. (The static
form needs a run with its photos: `afds measure RUN` on a run of your own.) Each network leaves DIR/NAME, a run
folder, and in it measure.json with hardware and versions.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import afds  # noqa: F401  first: it makes torchvision importable beside a CPU-only torch

# isort: split
import timm
import torch
import tyro
from torch import nn

from afds.artifact import save_run
from afds.cli import main as command
from afds.cost import measure_cost
from afds.data import Preprocess
from afds.fitting import cost_summary
from afds.selection import SelectionConfig, gates, select

CLASSES = 101


@dataclass(frozen=True)
class Options:
    """Time networks with random weights."""

    out: Path
    """Folder for the run folders."""
    networks: tuple[str, ...] = ("resnet18", "resnet50", "resnet101")
    density: float = 0.25
    """Of every layer; 0.25 is about 10x fewer MACs, 0.38 about 5x."""
    input_size: int = 224
    threads: tuple[int, ...] = ()
    """By default one, and all cores."""
    batch: tuple[int, ...] = (1,)
    only: tuple[str, ...] = ()
    """As `afds measure --only`."""
    rounds: int = 15


def make_run(name: str, out: Path, density: float, side: int) -> None:
    """A selective network whose predictors do choose, in a run folder."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=CLASSES).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.normal_(module.bias, std=0.1)
    config = SelectionConfig()
    selective = select(model, config, density=density).eval()
    with torch.no_grad():
        for gate in gates(selective).values():
            gate.predictor.weight.normal_()
            gate.predictor.bias.add_(0.2 * torch.randn_like(gate.predictor.bias))
    cost = measure_cost(selective, [torch.randn(1, 3, side, side)])
    preprocess = Preprocess(side, round(side / 0.875), "bilinear", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    save_run(out, model=selective, arch=name, arch_args={}, num_classes=CLASSES, selection=config,
             labels=[str(i) for i in range(CLASSES)], preprocess=preprocess, summary=cost_summary(cost))  # fmt: skip


def main(options: Options) -> None:
    for name in options.networks:
        run = options.out / name
        make_run(name, run, options.density, options.input_size)
        arguments = ["measure", str(run), "--rounds", str(options.rounds)]
        for option in ("threads", "batch", "only"):
            values = getattr(options, option)
            arguments += [f"--{option}", *map(str, values)] if values else []
        if command(arguments) != 0:
            raise SystemExit(1)


if __name__ == "__main__":
    main(tyro.cli(Options))
