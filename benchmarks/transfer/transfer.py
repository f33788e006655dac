"""The transfer table: a dense base per seed, then each budget from it. Resumable: start it again and it goes on.

    python benchmarks/transfer/transfer.py --data $AFDS_DATA/caltech101 \\
        --source resnet18:$AFDS_DATA/weights/resnet18_imagenet.safetensors --input-size 128 --epochs 20 \\
        --budgets 2x 5x 10x --seeds 3 --out DIR

Prints a table and appends one JSON line per finished run to DIR/results.jsonl. `--no-test` leaves the test split
alone, for choices; the figures are then of the validation split.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from dataclasses import dataclass
from pathlib import Path

import tyro

from afds.artifact import is_run
from afds.config import DataConfig, FitConfig, OptimConfig
from afds.fitting import FitResult, fit, read_result


@dataclass(frozen=True)
class Options:
    """Dense bases and AFDS runs, one after another."""

    data: Path
    """Folder with train/ and test/, or of class folders."""
    source: str
    """As `afds fit --source`."""
    out: Path
    """Where the runs go."""
    budgets: tuple[str, ...] = ("2x", "5x", "10x")
    method: str = "afds"
    seeds: int = 1
    input_size: int = 128
    epochs: int = 20
    """Of the base, and of each run from it."""
    lr: float = 0.02
    workers: int = 1
    no_test: bool = False
    """Work on train/ alone: its validation split gives the figures."""


def main(options: Options) -> None:
    rows: dict[str, list[FitResult]] = {}
    for seed in range(options.seeds):
        common = FitConfig(
            data=_without_test(options) if options.no_test else options.data, source=options.source, seed=seed,
            data_options=DataConfig(input_size=options.input_size, workers=options.workers, test_fraction=0.0),
            optim=OptimConfig(epochs=options.epochs, lr=options.lr),
        )  # fmt: skip
        base = options.out / f"dense-seed{seed}"
        rows.setdefault("dense", []).append(_once(dataclasses.replace(common, method="l2+dense", out=base), options))
        for budget in options.budgets:
            run = dataclasses.replace(common, method=options.method, budget=budget, source=str(base),
                                      out=options.out / f"{options.method}-{budget}-seed{seed}")  # fmt: skip
            rows.setdefault(budget, []).append(_once(run, options))
    for name, results in rows.items():
        for split in ("val", "test"):
            values = [getattr(r, split).top1 for r in results if getattr(r, split)]
            if values:
                spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
                ratio = statistics.mean(r.cost.ratio for r in results)
                print(f"{name:6} {split:4} {statistics.mean(values):6.1%}{spread}  {ratio:.2f}x  n={len(values)}")


def _without_test(options: Options) -> Path:
    """A folder that shows train/ alone."""
    folder = options.out / "train-only"
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "train").exists():
        (folder / "train").symlink_to((options.data / "train").resolve())
    return folder


def _once(config: FitConfig, options: Options) -> FitResult:
    assert config.out is not None
    if is_run(config.out):
        return read_result(config.out)
    begun = (config.out / "last.ckpt").exists()
    result = fit(FitConfig(resume=config.out) if begun else config, strict=False)  # all runs share their options
    record = json.loads((config.out / "config.json").read_text())
    line = {
        "run": config.out.name, "val": result.val.top1, "test": result.test.top1 if result.test else None,
        "ratio": result.cost.ratio, "macs": result.cost.counted, "seconds": round(result.seconds),
        "config": record["config"], "hardware": record["hardware"],
    }  # fmt: skip
    with open(options.out / "results.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    return result


if __name__ == "__main__":
    main(tyro.cli(Options))
