"""The options of a comparison, and the trials that they mean.

::

    base (per data set, transfer, seed) --+--> tuning 1..T (per data set, row; seed 0; validation only)
                                          +--> final (per data set, row, budget, seed; test split read once)

Fair by construction: every network that is judged has learned for base-epochs + epochs, whether in two steps
(pruning, AFDS) or in one; every row has the same number of tuning trials, the same candidates (multiples of the
learning rate and of the row's one regulariser weight), chosen by validation accuracy at one budget. Bases are shared
between the rows that ask for the same one, and are not tuned.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from afds.compare.rows import Row, override, parse_row, read_rows
from afds.config import (
    DataConfig,
    DescentConfig,
    DistillationConfig,
    FitConfig,
    HardwareConfig,
    OptimConfig,
    PruningConfig,
    RecoveryConfig,
    TransferConfig,
    parse_method,
    to_json,
)  # fmt: skip
from afds.errors import ConfigError
from afds.schedule import parse_budget
from afds.selection import SelectionConfig
from afds.steps import after_base, base_of

# (multiple of the learning rate, multiple of the regulariser's weight); the first T are tried
CANDIDATES = ((1, 1), (0.5, 1), (2, 1), (1, 0.1), (0.5, 0.1), (1, 10), (2, 0.1), (0.5, 10), (2, 10))
WEIGHT_OF = {"scratch": "optim.weight_decay", "l2": "optim.weight_decay", "l2-sp": "transfer.l2_sp",
             "delta": "transfer.delta", "afd": "distillation.afd", "kd": "distillation.logits"}  # fmt: skip


@dataclass(frozen=True)
class CompareConfig:
    """Compare methods on your photos: the same loader, loop, budgets, tuning and seeds for all.

    Start it again with the same --out and it goes on where it was; methods, budgets and seeds may be added.
    """

    data: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="DATA ...")]
    """Folders of class folders, or with train/, val/, test/ in them."""
    out: Path
    """Folder for the runs, the table and the page."""
    methods: str = "l2,l2+l1,l2+lowres,afds"
    """Methods, separated by commas; options of their own in brackets: `afds[distillation.afd=0]`."""
    rows: Path | None = None
    """TOML or JSON file of more rows, with names."""
    budgets: str = "2x,5x,10x"
    """Budgets, separated by commas. Methods without compression run at 1x, whatever is said here."""
    seeds: int = 3
    """Final runs per row and budget."""
    epochs: int = 12
    """Epochs of the compressed network; what needs no base learns for base-epochs + epochs."""
    base_epochs: int = 12
    """Epochs of the dense base."""
    trials: int = 1
    """Tuning trials per row, 1 to 9, on the validation split. 1: no tuning, the defaults."""
    tune_at: str = ""
    """Budget at which rows are tuned. Default: the first of --budgets that is not 1x."""
    reference: str = ""
    """Row that the others are compared with. Default: afds where it is there, else the first."""
    jobs: int = 1
    """Trials at a time, each a process with its share of the cores. With --ray: at a time on each node."""
    ray: str | None = None
    """Run the trials on the Ray cluster at this address (HOST:PORT, ray://HOST:PORT, auto); local, or no address,
    starts one here. Photos, weights and --out must be on a file system that all nodes share."""
    dry_run: bool = False
    """Check all, list the trials, with those that are done, and stop."""
    source: str = "resnet50"
    """As `afds fit --source`."""
    small_source: str = ""
    """As `afds fit --small-source`."""
    arch_args: str = "{}"
    """As `afds fit --arch-args`."""
    data_options: Annotated[DataConfig, tyro.conf.arg(name="data-options")] = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    transfer: TransferConfig = field(default_factory=TransferConfig)
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    pruning: PruningConfig = field(default_factory=PruningConfig)
    descent: DescentConfig = field(default_factory=DescentConfig)
    recovery: RecoveryConfig = field(default_factory=RecoveryConfig)
    hardware: HardwareConfig = field(default_factory=HardwareConfig)

    def __post_init__(self) -> None:
        if not self.data:
            raise ConfigError("afds compare needs a folder of photos: afds compare DATA ... --out DIR")
        for name in ("seeds", "epochs", "base_epochs", "jobs"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')} must be 1 or more, got {getattr(self, name)}.")
        if self.optim.epochs:
            raise ConfigError("--optim.epochs would be of no effect: here --epochs is of the compressed networks and "
                              "--base-epochs of what comes before.")  # fmt: skip
        if self.ray is not None and self.hardware.devices > 1:
            raise ConfigError("--ray: a trial on Ray trains on one device; leave out --hardware.devices.")
        if not 1 <= self.trials <= len(CANDIDATES):
            raise ConfigError(f"--trials must be from 1 to {len(CANDIDATES)}, got {self.trials}.")
        names = [path.resolve().name for path in self.data]
        if len(set(names)) != len(names):
            raise ConfigError(f"--data: two folders are called {max(names, key=names.count)}; results go by name.")
        folders: dict[str, str] = {}
        for row in self.all_rows():
            other = folders.setdefault(row.slug, row.name)
            if other is not row.name:
                if other == row.name:
                    raise ConfigError(f"The row {row.name!r} is there twice.")
                raise ConfigError(f"The rows {other!r} and {row.name!r} would share a folder: give one another name.")
        for budget in self.all_budgets():
            if parse_budget(budget).ms is not None:
                raise ConfigError(f"--budgets {budget}: all rows of a comparison are held to the same MACs, and trials "
                                  "beside one another would disturb a stopwatch. Give ratios such as 5x; `afds fit` "
                                  "takes milliseconds, `afds measure` times what is done.")  # fmt: skip
        if self.tune_at and self.trials == 1:
            raise ConfigError(f"--tune-at {self.tune_at} has no effect without tuning: add --trials 2 or more.")
        if self.tune_at and self.tune_at not in self.all_budgets():
            raise ConfigError(f"--tune-at {self.tune_at} is none of --budgets {self.budgets}.")
        self.reference_row()

    def all_rows(self) -> list[Row]:
        rows = [parse_row(text) for text in _split(self.methods)]
        rows += read_rows(self.rows) if self.rows is not None else []
        if not rows:
            raise ConfigError("--methods names none.")
        return rows

    def all_budgets(self) -> list[str]:
        """As they are written, each once: `2x` and `2.0X` are one."""
        found: dict[Any, str] = {}
        for text in _split(self.budgets):
            budget = parse_budget(text)
            found.setdefault((budget.ratio, budget.macs, budget.ms), text)
        if not found:
            raise ConfigError("--budgets names none: give such as 2x,5x.")
        return list(found.values())

    def tuned_at(self) -> str:
        return self.tune_at or next((b for b in self.all_budgets() if parse_budget(b).ratio != 1), "1x")

    def reference_row(self) -> str:
        names = [row.name for row in self.all_rows()]
        if self.reference and self.reference not in names:
            raise ConfigError(f"--reference {self.reference} is none of the rows: {', '.join(names)}.")
        return self.reference or ("afds" if "afds" in names else names[0])


@dataclass(frozen=True)
class Trial:
    """One call of `fit`: where, with what, and after which others."""

    key: str  # also its folder below --out
    kind: str  # base, tuning or final
    data: str
    row: str
    budget: str
    seed: int
    config: FitConfig
    needs: tuple[str, ...] = ()
    candidate: int = 0
    tuning: tuple[str, ...] = ()  # keys of the trials that decide between candidates, for a final run


def common(c: CompareConfig, data: Path) -> FitConfig:
    """What all fits of a comparison share."""
    return FitConfig(
        data=data, source=c.source, small_source=c.small_source, arch_args=c.arch_args, base_epochs=c.base_epochs,
        data_options=c.data_options, optim=dataclasses.replace(c.optim, epochs=c.epochs), distillation=c.distillation,
        transfer=c.transfer, selection=c.selection, pruning=c.pruning, descent=c.descent, recovery=c.recovery,
        hardware=c.hardware,
    )  # fmt: skip


def budgets_of(row: Row, budgets: list[str]) -> list[str]:
    """At which budgets a row runs: dense ones at 1x; at 1x only those that are not then the dense ones again."""
    compression = parse_method(row.method)[1]
    if compression == "dense":
        return ["1x"]
    return [b for b in budgets if parse_budget(b).ratio != 1 or compression == "afs"]


def whole_fit(c: CompareConfig, row: Row, data: Path, budget: str, seed: int) -> FitConfig:
    """A row as `fit` would do it all by itself, for the checks before any training."""
    config = dataclasses.replace(row.apply(common(c, data)), budget=budget, seed=seed)
    if "small" not in parse_method(row.method)[1]:
        config = dataclasses.replace(config, small_source="")
    if not two_steps(config):
        epochs = config.optim.epochs + c.base_epochs
        config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, epochs=epochs))
    return config


def make_plan(c: CompareConfig) -> list[Trial]:
    """All trials, each after those it needs."""
    trials: dict[str, Trial] = {}
    for data in c.data:
        for row in c.all_rows():
            budgets = budgets_of(row, c.all_budgets())
            tuned_at = c.tuned_at() if c.tuned_at() in budgets else (budgets or ["1x"])[0]
            tuning: list[str] = []
            if c.trials > 1 and budgets:
                for candidate in range(c.trials):
                    trial = _trial(c, trials, row, data, tuned_at, 0, "tuning", candidate)
                    tuning.append(trial.key)
            for budget in budgets:
                for seed in range(c.seeds):
                    _trial(c, trials, row, data, budget, seed, "final", 0, tuple(tuning))
    return list(trials.values())


def _trial(c: CompareConfig, trials: dict[str, Trial], row: Row, data: Path, budget: str, seed: int, kind: str,
           candidate: int, tuning: tuple[str, ...] = ()) -> Trial:  # fmt: skip
    name = data.resolve().name
    config, needs = whole_fit(c, row, data, budget, seed), tuning
    # With source data the source step comes before the base: `fit` does all three then, and shares none.
    base = base_of(config) if config.source_data is None else None
    if base is not None:
        base_config = _base_config(c, config, base)
        key = f"bases/{name}/{base}-{_digest(base_config)}-seed{seed}"
        trials.setdefault(key, Trial(key, "base", name, base, "1x", seed,
                                     dataclasses.replace(base_config, read_test=False, out=c.out / key)))  # fmt: skip
        config, needs = after_base(config, str(c.out / key)), (*needs, key)
    if kind == "tuning":
        key = f"tuning/{name}/{row.slug}/{candidate}"
        config = dataclasses.replace(candidate_config(config, row, candidate), read_test=False)
    else:
        key = f"runs/{name}/{row.slug}/{budget}/seed{seed}"
    trial = Trial(key, kind, name, row.name, budget, seed, dataclasses.replace(config, out=c.out / key), needs,
                  candidate, tuning)  # fmt: skip
    trials[key] = trial
    return trial


def candidate_config(config: FitConfig, row: Row, candidate: int) -> FitConfig:
    """The options of a tuning candidate: learning rate and regulariser weight, times its multiples."""
    rate, weight = CANDIDATES[candidate]
    option = WEIGHT_OF[parse_method(row.method)[0]]
    group, _, name = option.partition(".")
    settles = row.method == "afds" and config.descent.settle and config.budget != "1x"
    lr = "recovery.lr" if settles else "optim.lr"
    tuned = {lr: (config.recovery.lr if settles else config.optim.lr) * rate,
             option: getattr(getattr(config, group), name) * weight}  # fmt: skip
    return override_all(config, tuned, row.name)


def override_all(config: FitConfig, values: dict[str, Any], where: str) -> FitConfig:
    kept = {name: getattr(config, name) for name in ("data", "out", "teacher")}
    return dataclasses.replace(override(config, values, where), **kept)


def identity(c: CompareConfig) -> dict[str, Any]:
    """What must not change under results that are there: all but the lists that may grow."""
    values: dict[str, Any] = to_json(c)
    for grows in ("data", "out", "methods", "rows", "budgets", "seeds", "jobs", "ray", "dry_run", "reference"):
        values.pop(grows)
    values["tune_at"] = c.tuned_at() if c.trials > 1 else ""
    return values


def two_steps(config: FitConfig) -> bool:
    """Whether the delivered network itself learns in two steps: from a base on, not only from its logits."""
    transfer, compression = parse_method(config.method)
    return base_of(config) is not None and not (transfer == "kd" and compression in ("dense", "small"))


def _base_config(c: CompareConfig, config: FitConfig, base: str) -> FitConfig:
    """The dense fine-tuning before a run: with the comparison's own options for learning, the same for all rows.

    A row's are of the step that the row is about, as tuning's candidates are. What has no effect is not in it either,
    so that rows can share it.
    """
    transfer, compression = parse_method(base)
    d, f = config.distillation, common(c, Path())
    return dataclasses.replace(
        config, method=base, budget="1x", small_source="", unlabelled=None, selection=f.selection, descent=f.descent,
        recovery=f.recovery,
        optim=dataclasses.replace(f.optim, epochs=c.base_epochs),
        data_options=dataclasses.replace(config.data_options, colour=f.data_options.colour),
        pruning=config.pruning if compression == "slimming" else f.pruning,
        transfer=config.transfer if transfer in ("l2-sp", "delta") else f.transfer,
        distillation=dataclasses.replace(f.distillation, afd=d.afd, hidden=d.hidden, squared=d.squared)
        if transfer == "afd" else f.distillation,
    )  # fmt: skip


def _digest(config: FitConfig) -> str:
    return hashlib.sha256(json.dumps(to_json(config), sort_keys=True).encode()).hexdigest()[:8]


def _split(text: str) -> list[str]:
    """At commas that are not inside of brackets."""
    parts, depth = [""], 0
    for letter in text:
        depth += {"[": 1, "]": -1}.get(letter, 0)
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts if part.strip()]
