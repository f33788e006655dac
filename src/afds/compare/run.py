"""Runs the trials of a comparison: what is done is read, what was begun goes on, the rest is started.

Everything that could stop it is checked first: methods, budgets, data sets, options against those of an earlier
start. One JSON line per trial in DIR/trials.jsonl, with config, versions, hardware and wall time.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, wait
from pathlib import Path
from typing import Any

from rich.console import Console

from afds.artifact import is_run
from afds.compare.plan import (
    CANDIDATES,
    CompareConfig,
    Trial,
    budgets_of,
    candidate_config,
    common,
    identity,
    make_plan,
    two_steps,
    whole_fit,
)  # fmt: skip
from afds.compare.pools import make_pool
from afds.compare.rows import Row
from afds.config import FitConfig, resolve_method, to_json
from afds.data import make_splits, scan, with_unlabelled
from afds.data.unlabelled import fingerprint
from afds.errors import AfdsError, ConfigError, RunFolderError, TrainingError
from afds.files import alone_in, check_beside, check_place, is_empty, read_json, write_atomic, write_json
from afds.fitting import fit, read_photos, read_result
from afds.hardware import make_fabric, resolve_device, resolve_precision
from afds.idle import idle_options
from afds.lineage import check_unseen
from afds.progress import Progress
from afds.record import read_lines
from afds.setup import Setup
from afds.terminal import make_console


def compare(c: CompareConfig, console: Console | None = None) -> list[dict[str, Any]]:
    """Do what is left to do; returns the lines of all trials.

    Raises:
        AfdsError: before any training, for what would stop it later.
    """
    console = console or make_console()
    c = _same_precision(c)
    check_folder(c)
    pool, slots = make_pool(c)
    with pool:  # what may be wrong with a cluster is told before the photos are read
        return _compare(c, console, pool, slots)


def _compare(c: CompareConfig, console: Console, pool: Executor, slots: int | None) -> list[dict[str, Any]]:
    prints = preflight(c, console)
    _same_photos(c, prints)
    plan = make_plan(c)
    if c.dry_run:
        lines = _read_known(c)
        todo = to_do(plan, lines)
        for trial in plan:
            note = "" if trial.key in todo else "  done" if trial.key in lines else "  not needed any more"
            console.print(f"{trial.kind:7} {trial.key}{note}", markup=False, soft_wrap=True)
        return []
    c.out.mkdir(parents=True, exist_ok=True)
    with alone_in(c.out):
        check_folder(c)  # another one may have begun there since, with other options
        _same_photos(c, prints)
        return _do(c, console, pool, slots, plan, prints)


def _do(
    c: CompareConfig, console: Console, pool: Executor, slots: int | None, plan: list[Trial], prints: Prints
) -> list[dict[str, Any]]:
    write_json(c.out / "compare.json",
               {"options": identity(c), "rows": {**_known(c, "rows"), **_definitions(c)},
                **{kind: {**_known(c, kind), **now} for kind, now in prints.items()}})  # fmt: skip
    lines = _known_lines(c)
    for trial in plan:
        c.out.joinpath(trial.key).parent.mkdir(parents=True, exist_ok=True)
    todo = to_do(plan, lines)
    for key in todo:
        lines.pop(key, None)  # of a base whose folder is gone
    plan = [trial for trial in plan if trial.key in lines or trial.key in todo]
    console.print(f"{len(plan)} trials, {len(plan) - len(todo)} of them done.")

    def note(line: dict[str, Any]) -> None:
        lines[line["key"]] = line
        with open(c.out / "trials.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")
        shown = f"{line['val']:.1%}" if line["val"] is not None else line["error"]
        done = sum(trial.key in lines for trial in plan)  # lines of rows that were asked for before are there too
        console.print(f"{done}/{len(plan)} {line['key']}: validation {shown}, {line['seconds']:.0f} s",
                      markup=False, soft_wrap=True)  # fmt: skip

    rows = {row.name: row for row in c.all_rows()}
    _run(pool, slots or len(plan), todo, lines, rows, note)
    # Measured since: `afds measure RUN` may come at any time.
    return [lines[trial.key] | {"latency_ms": _latency(c.out / trial.key)} for trial in plan]


def to_do(plan: list[Trial], lines: Mapping[str, Any]) -> dict[str, Trial]:
    """Trials that have no line yet; of bases only those that one of these starts from, if their folder is not there.

    Kept lines of final runs are so enough to go on from, on another machine, without the folders behind them.
    """
    left = {trial.key for trial in plan if trial.kind != "base" and trial.key not in lines}
    needed = {key for trial in plan if trial.key in left for key in trial.needs}

    def is_missing(base: Trial) -> bool:
        line = lines.get(base.key)
        return line is None or (line["error"] is None and not is_run(base.config.out or base.key))

    return {t.key: t for t in plan if t.key in left or (t.kind == "base" and t.key in needed and is_missing(t))}


Prints = dict[str, dict[str, Any]]
"""What the photos are known by again: `data` and `bytes`, of each data set, and `unlabelled`, of each row with such."""


def preflight(c: CompareConfig, console: Console) -> Prints:
    """Build every row at every budget on every data set, and train none; what the photos are known by again."""
    fabric = make_fabric(c.hardware)
    prints: Prints = {"data": {}, "bytes": {}, "unlabelled": {}}
    check_idle(c)
    for data in c.data:
        splits, facts = read_photos(common(c, data), Progress(quiet=True))
        prints["data"][data.resolve().name] = facts["fingerprint"]
        prints["bytes"][data.resolve().name] = facts["bytes"]
        if not splits.test:
            way = "Add test/, or leave --data-options.test-fraction above 0"
            if "train" in scan(data).splits:
                way = "Beside train/ none is drawn: add test/, or put all class folders directly below it"
            raise ConfigError(f"{data}: there is no test split to compare on. {way}.")
        for row in c.all_rows():
            _check_sources(c, row, data)
            budgets = budgets_of(row, c.all_budgets())
            if not budgets:
                console.print(f"{row.name}: at 1x it is a dense method; not run.", markup=False)
            for budget in budgets:
                try:
                    config = resolve_method(whole_fit(c, row, data, budget, 0))
                    if config.source_data is not None:  # a step with photos of its own, read in its own fit
                        scan(config.source_data)
                        config = dataclasses.replace(config, source_data=None)
                    photos = splits
                    if config.unlabelled:
                        photos = with_unlabelled(splits, config.unlabelled)
                        prints["unlabelled"][f"{row.name} on {data.resolve().name}"] = fingerprint(photos.unlabelled)
                    Setup(config, photos, fabric, rehearsal=True)
                except AfdsError as error:
                    raise type(error)(f"{row.name} at {budget} on {data}: {error}") from error
    return prints


def check_idle(c: CompareConfig) -> None:
    """Options of the whole comparison are for the rows that look at them; a row's own have to have an effect on it.

    Raises:
        ConfigError: a row's option that it looks at at none of its budgets, a shared one that no row looks at.
    """
    shared: dict[str, str] | None = None
    for row in c.all_rows():
        own, idle = {option for option, _ in row.overrides}, list[dict[str, str]]()
        for budget in budgets_of(row, c.all_budgets()):
            try:
                config = dataclasses.replace(row.apply(common(c, c.data[0])), budget=budget)
                found = idle_options(config)
                if two_steps(config) and config.source_data is None:  # a base learns with the options of all
                    late = idle_options(config, from_base=True)
                    found = {option: late[option] for option in own & late.keys()} | found
                idle.append(found)
            except ConfigError as error:
                raise ConfigError(f"{row.name} at {budget}: {error}") from error
        if not idle:
            continue
        always = {option: message for option, message in idle[0].items() if all(option in found for found in idle)}
        for option in own & always.keys():
            raise ConfigError(f"{row.name}: {always[option]}")
        rest = {option: message for option, message in always.items() if option not in own}
        shared = rest if shared is None else {option: m for option, m in shared.items() if option in rest}
    for option, message in (shared or {}).items():
        if option != "base_epochs":  # what has no base learns for so many epochs more
            raise ConfigError(f"No row looks at it: {message}" if len(c.all_rows()) > 1 else message)


def _known(c: CompareConfig, what: str) -> dict[str, Any]:
    """What the photos (see `Prints`), or the rows, were in all starts before."""
    return dict(_record(c).get(what, {}))


def _record(c: CompareConfig) -> dict[str, Any]:
    """What compare.json says; nothing where there is none yet.

    Raises:
        RunFolderError: it is of another make.
    """
    path = c.out / "compare.json"
    saved = read_json(path) if path.exists() else {}
    if not isinstance(saved, dict) or not all(isinstance(part, dict) for part in saved.values()):
        raise RunFolderError(f"{path} is not the record of a comparison: use a new --out.")
    return saved


def _same_photos(c: CompareConfig, prints: Prints) -> None:
    for kind, now in prints.items():
        for name, known in _known(c, kind).items():
            if now.get(name, known) != known:
                what = "unlabelled photos of the row" if kind == "unlabelled" else "photos of"
                raise RunFolderError(f"{c.out}: the {what} {name} are not those that it was begun with. Results of "
                                     "both in one table would not compare: use a new --out.")  # fmt: skip


def _check_sources(c: CompareConfig, row: Row, data: Path) -> None:
    """A source that is a run has its split; each seed draws one, and must not hold out what the source has learned."""
    for seed in range(c.seeds):
        config = whole_fit(c, row, data, "1x", seed)
        if not is_run(config.source) and not (config.small_source and is_run(config.small_source)):
            return
        drawn = config.data_options
        splits = make_splits(scan(data), val_fraction=drawn.val_fraction, test_fraction=drawn.test_fraction, seed=seed)
        try:
            check_unseen(config, splits)
        except ConfigError as error:
            raise ConfigError(f"{row.name}, seed {seed} on {data}: {error}") from error


def check_folder(c: CompareConfig) -> None:
    """Refuse results that were made with other options, rows or photos under the same names.

    Raises:
        RunFolderError: it names the first difference.
    """
    check_place(c.out)
    check_beside(c.out, *c.data)
    path = c.out / "compare.json"
    if not path.exists():
        if c.out.exists() and not is_empty(c.out):
            raise RunFolderError(f"--out {c.out} is not empty and holds no comparison; name a new folder.")
        return
    saved = _record(c)
    for name, value in _flat(identity(c)).items():
        old = _flat(saved.get("options", {})).get(name)
        if old != value:
            raise RunFolderError(f"{c.out} was made with {name} = {old!r}, now it is {value!r}. Results of both in one "
                                 "table would not compare: use the old value, or a new --out.")  # fmt: skip
    rows = saved.get("rows", {})
    for name, definition in _definitions(c).items():
        old = rows.get(name, definition)
        if old != definition:
            raise RunFolderError(f"{c.out}: the row {name!r} was {old}, now it is {definition}. Give it a new name.")
    kept = {line["row"]: line["key"] for line in _read_known(c).values() if line["kind"] == "final"}
    for row in c.all_rows():
        if row.name in kept and f"/{row.slug}/" not in kept[row.name]:
            raise RunFolderError(f"{c.out}: the row {row.name!r} has results under {kept[row.name]!r}, as an afds of "
                                 "before named folders, and they would not be found. Go on with that one, or use a new "
                                 "--out.")  # fmt: skip
    folders = {Row(name, "").slug: name for name in rows}
    for row in c.all_rows():
        if folders.get(row.slug, row.name) != row.name:
            raise RunFolderError(f"{c.out}: the results of the row {folders[row.slug]!r} lie where those of "
                                 f"{row.name!r} would. Give it another name.")  # fmt: skip


def _definitions(c: CompareConfig) -> dict[str, Any]:
    return {row.name: [row.method, [list(pair) for pair in row.overrides]] for row in c.all_rows()}


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    return {k: v for key, part in value.items() for k, v in _flat(part, f"{prefix}.{key}" if prefix else key).items()}


def _same_precision(c: CompareConfig) -> CompareConfig:
    """`auto` is decided once: on some machines it is a measurement, and trials must not differ by it."""
    path, hardware = c.out / "compare.json", c.hardware
    if hardware.precision == "auto" and path.exists():
        saved = _record(c).get("options", {}).get("hardware", {}).get("precision", "auto")
        hardware = dataclasses.replace(hardware, precision=saved)
    elif hardware.precision == "auto":
        device = resolve_device(hardware)
        precision: Any = resolve_precision(hardware, device)
        hardware = dataclasses.replace(hardware, precision=precision)
    return dataclasses.replace(c, hardware=hardware)


def _read_known(c: CompareConfig) -> dict[str, dict[str, Any]]:
    """Lines of trials that are done."""
    path = c.out / "trials.jsonl"
    lines = read_lines(path) if path.exists() else []
    return {line["key"]: line for line in lines if {"key", "kind", "row", "error"} <= line.keys()}


def _known_lines(c: CompareConfig) -> dict[str, dict[str, Any]]:
    """The same; one that was cut short by a kill is written out of the file."""
    lines = _read_known(c)
    if (c.out / "trials.jsonl").exists():
        write_atomic(c.out / "trials.jsonl", "".join(json.dumps(line) + "\n" for line in lines.values()))
    return lines


def _run(pool: Executor, slots: int, todo: dict[str, Trial], lines: dict[str, Any], rows: dict[str, Row],
         note: Callable[[dict[str, Any]], None]) -> None:  # fmt: skip
    """Hand ``slots`` trials at a time to the pool, none before those that it needs; note their lines as they come."""
    left, running = {trial.key: trial for trial in _in_order(todo)}, set[Future[dict[str, Any]]]()
    while left or running:
        try:
            for key in [k for k, t in left.items() if all(n in lines for n in t.needs)]:
                failed = [lines[n] for n in left[key].needs if lines[n]["kind"] == "base" and lines[n]["error"]]
                if failed:
                    note(_without_base(_ready(left.pop(key), lines, rows), failed[0]))
                elif len(running) < slots:
                    running.add(pool.submit(run_trial, _ready(left.pop(key), lines, rows)))
            done, running = wait(running, return_when=FIRST_COMPLETED) if running else (set(), running)
            for future in done:
                note(future.result())
        except BrokenExecutor as error:
            raise TrainingError("The process of a trial was ended from outside, for want of memory perhaps. Start "
                                "again, with fewer --jobs if it was: what is done is kept, what was begun goes "
                                "on.") from error  # fmt: skip


def _in_order(todo: dict[str, Trial]) -> list[Trial]:
    """Bases, then tuning, then finals, seed by seed: a table of one seed is there early."""
    kinds = ("base", "tuning", "final")
    return sorted(todo.values(), key=lambda t: (kinds.index(t.kind) if t.kind != "base" or t.seed == 0 else 2,
                                                t.seed, kinds.index(t.kind)))  # fmt: skip


def _ready(trial: Trial, lines: dict[str, Any], rows: dict[str, Row]) -> Trial:
    """A final run with the candidate that tuning chose."""
    if not trial.tuning:
        return trial
    results = [lines[key] for key in trial.tuning]
    best = max(range(len(results)), key=lambda i: -1.0 if results[i]["val"] is None else results[i]["val"])
    return dataclasses.replace(trial, candidate=best, config=candidate_config(trial.config, rows[trial.row], best))


def _without_base(trial: Trial, base: dict[str, Any]) -> dict[str, Any]:
    """The line of a trial whose base diverged: a result too, and no reason to stop the others."""
    return base | _names(trial) | {"error": f"its base, {base['key']}, failed: {base['error']}", "seconds": 0.0,
                                   "config": to_json(trial.config)}  # fmt: skip


def _names(trial: Trial) -> dict[str, Any]:
    return {"key": trial.key, "kind": trial.kind, "data": trial.data, "row": trial.row, "budget": trial.budget,
            "seed": trial.seed,
            "multiples": dict(zip(("lr", "weight"), CANDIDATES[trial.candidate], strict=True))}  # fmt: skip


def run_trial(trial: Trial) -> dict[str, Any]:
    """Fit, or go on with, or only read; returns the trial's line. A diverged training is a result too."""
    config, error = trial.config, None
    out = config.out
    assert out is not None
    if not is_run(out):
        if (out / "config.json").exists():
            config = FitConfig(resume=out, data=config.data)
        elif out.exists():  # killed before its first line
            shutil.rmtree(out)
        try:
            fit(config, quiet=True, strict=False)
        except TrainingError as diverged:
            error = str(diverged)
    record = read_json(out / "config.json")
    line: dict[str, Any] = _names(trial) | {
        "val": None, "test": None, "hits": None, "macs": None, "dense_macs": None, "ratio": None, "seconds": 0.0,
        "error": error, "config": record["config"], "resolved": record["resolved"], "afds": record["afds"],
        "hardware": record["hardware"], "latency_ms": None, "test_photos": record["data"].get("test_fingerprint"),
    }  # fmt: skip
    if error is None:
        result = read_result(out)
        line |= {"val": result.val.top1, "test": result.test.top1 if result.test else None,
                 "hits": result.test.hits if result.test else None, "macs": result.cost.counted,
                 "dense_macs": result.cost.dense, "ratio": result.cost.ratio, "seconds": result.seconds,
                 "latency_ms": _latency(out)}  # fmt: skip
    return to_json(line)  # type: ignore[no-any-return]


def _latency(out: Path) -> float | None:
    """The fastest median at one image and one thread of a run that `afds measure` has timed, in milliseconds.

    A run with selection is judged by its own forms; the `dense` rows beside it are of the whole network.
    """
    if not (out / "measure.json").exists():
        return None
    saved = read_json(out / "measure.json")
    rows = [row for row in saved.get("rows", []) if isinstance(row, dict)] if isinstance(saved, dict) else []
    rows = [row for row in rows if row.get("batch") == 1 and row.get("threads") == 1]
    own = [row for row in rows if row.get("form") != "dense"] or rows
    times = [float(row["median_ms"]) for row in own if isinstance(row.get("median_ms"), int | float)]
    return min(times, default=None)
