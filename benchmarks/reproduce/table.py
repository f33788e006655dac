"""The paper's experiment, a cell a line: six data sets x transfer x compression x budget, ResNet-101, one recipe each.

    python benchmarks/reproduce/table.py > benchmarks/reproduce/cells.sh       # all lines, committed
    python benchmarks/reproduce/table.py --recipe delta --only dogs120 10x     # some
    python benchmarks/reproduce/table.py --run --data DATA --source resnet101:WEIGHTS --out RUNS --only dogs120 10x

`--run` does the selected cells one after another in this process: finished ones are skipped, begun ones resumed,
those whose data set is not in DATA (as `afds prepare NAME FILES --out DATA/NAME` makes it) are named and left out.
"""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from afds.artifact import is_run
from afds.config import PAPER, DataConfig, FitConfig, OptimConfig
from afds.data.published import catalogue
from afds.errors import AfdsError
from afds.fitting import fit, read_result
from afds.idle import without_idle

TRANSFERS = ("l2", "l2-sp", "delta", "afd")
PRUNED = ("slimming", "l1")  # a dense fine-tuning first, then as long again
BUDGETS = ("2x", "5x", "10x")
VAL_FRACTION = 0.1  # of the training images, for choices; the papers choose on the test split or not at all


@dataclass(frozen=True)
class Recipe:
    """How long and how. A phase is half of the steps; what is pruned has one phase before and one after."""

    steps: int
    batch: int
    crop: Literal["resized", "random"]
    l2: float  # weight decay
    source: str


RECIPES = {
    "student": Recipe(2 * 4500, 48, "random", 1e-4, "METHOD [S]: the student reproduction of AFDS"),
    "delta": Recipe(9000, 64, "random", 1e-4, "METHOD [V]: the DELTA code"),
}


@dataclass(frozen=True)
class Cell:
    """One figure of the table."""

    dataset: str
    method: str
    budget: str
    recipe: str
    seed: int = 0

    @property
    def name(self) -> str:
        return f"{self.recipe}/{self.dataset}/{self.method}-{self.budget}-seed{self.seed}"

    def config(self, data: Path, source: str, out: Path) -> FitConfig:
        """The options of `afds fit`. Epochs are the recipe's steps over the images that are left to train on."""
        recipe, published = RECIPES[self.recipe], catalogue()[self.dataset]
        per_epoch = int(published.train * (1 - VAL_FRACTION)) // recipe.batch
        compression = self.method.partition("+")[2]
        halves = compression in PRUNED or self.method == "afds"
        steps = recipe.steps // 2 if halves else recipe.steps
        epochs = max(1, round(steps / per_epoch))
        parts: dict[str, Any] = {}
        if compression == "afs":  # as afds-paper, which is afd+afs: what is ours is off
            default = FitConfig()
            parts = {part: dataclasses.replace(getattr(default, part), **values) for part, values in PAPER.items()}
        return without_idle(FitConfig(
            data=data / self.dataset, source=source, method=self.method, seed=self.seed, out=out / self.name,
            budget="" if compression == "dense" else self.budget, base_epochs=epochs if halves else 0,
            data_options=DataConfig(input_size=224, val_fraction=VAL_FRACTION, crop=recipe.crop),
            optim=OptimConfig(epochs=epochs, batch_size=recipe.batch, lr=0.01, momentum=0.9, weight_decay=recipe.l2,
                              schedule="step"),
            **parts,
        ))  # fmt: skip


def cells(recipe: str, seeds: int = 1) -> Iterator[Cell]:
    """All of a recipe's cells, in the order of the table."""
    for dataset in catalogue():
        for seed in range(seeds):
            for transfer in TRANSFERS:
                yield Cell(dataset, f"{transfer}+dense", "1x", recipe, seed)
                for compression in (*PRUNED, "afs"):
                    method = "afds-paper" if (transfer, compression) == ("afd", "afs") else f"{transfer}+{compression}"
                    yield from (Cell(dataset, method, budget, recipe, seed) for budget in BUDGETS)
            yield from (Cell(dataset, "afds", budget, recipe, seed) for budget in BUDGETS)  # ours


def flags(config: Any, prefix: str = "--") -> list[str]:
    """The options in which `config` is not the default, as `afds fit` takes them."""
    words: list[str] = []
    default = type(config)()
    for f in dataclasses.fields(config):
        value, name = getattr(config, f.name), f.name.replace("_", "-")
        if value == getattr(default, f.name):
            continue
        if dataclasses.is_dataclass(value):
            words += flags(value, f"{prefix}{name}.")
        elif isinstance(value, bool):
            words.append(f"{prefix}{'' if value else 'no-'}{name}")
        elif prefix == "--" and f.name == "data":
            words.insert(0, str(value))
        else:
            words += [f"{prefix}{name}", str(value)]
    return words


def line(cell: Cell) -> str:
    """The cell as a line of shell, which reads $DATA, $SOURCE and $OUT."""
    words = flags(cell.config(Path("$DATA"), "$SOURCE", Path("$OUT")))
    return "afds fit " + " ".join(f'"{w}"' if w.startswith("$") else shlex.quote(w) for w in words)


@dataclass(frozen=True)
class Options:
    """Print or run cells of the paper's experiment."""

    recipe: Literal["student", "delta"] = "delta"
    only: tuple[str, ...] = ()
    """Words that must all be in a cell: a data set, a method, a budget."""
    seeds: int = 1
    run: bool = False
    """Run them, in place of printing them."""
    data: Path = Path("data")
    """With --run: folder with the prepared data sets in it."""
    source: str = "resnet101"
    """With --run: as `afds fit --source`."""
    out: Path = Path("runs")
    """With --run: where the runs go."""


def main(options: Options) -> int:
    wanted = set(options.only)
    chosen = [
        c
        for c in cells(options.recipe, options.seeds)
        if wanted <= {c.dataset, c.method, c.budget, *c.method.split("+")}
    ]
    if not chosen:
        print(f"--only {' '.join(options.only)}: no cell has all of these words.", file=sys.stderr)
        return 2
    if not options.run:
        print("# Generated by table.py; set DATA, SOURCE (resnet101, or resnet101:WEIGHTS) and OUT.")
        for cell in chosen:
            print(line(cell))
        return 0
    failed = 0
    for cell in chosen:
        config = cell.config(options.data, options.source, options.out)
        assert config.out is not None
        if not config.data or not config.data.is_dir():
            print(f"{cell.name}: no {config.data}; make it with: afds prepare {cell.dataset} FILES --out {config.data}")
            continue
        try:
            if is_run(config.out):
                result = read_result(config.out)
            else:
                begun = (config.out / "config.json").exists()  # its base may have begun, and it itself not
                result = fit(FitConfig(resume=config.out) if begun else config)
        except AfdsError as error:
            print(f"{cell.name}: {error}")
            failed += 1
            continue
        test = f"{result.test.top1:.2%}" if result.test else "no test split"
        print(f"{cell.name}: test {test}, {result.cost.ratio:.2f}x fewer MACs")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main(tyro.cli(Options)))
