"""`afds fit`: a folder of photos and a pretrained network in, a run folder with a cheaper network out.

    options -> photos -> everything checked -> [source step] -> [dense fine-tuning] -> AFDS -> artifact, report
                                               selection at     the base: teacher of
                                               d = 1 on the     what follows, and the
                                               source data      reference in the report

The two bracketed steps are runs of their own, in `source/` and `base/` of the run folder, through this same
function: resumable like any run, and usable again (`--source RUN/base` for the next budget).
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from afds.artifact import is_run, load_run, save_run
from afds.config import PRUNED, FitConfig, from_json, parse_method, resolve_method
from afds.cost import Cost, CostMeter, LayerCost, has_selection
from afds.data import Splits, check_images, classes_unseen, describe, make_splits, scan, with_unlabelled, without
from afds.data.unlabelled import fingerprint
from afds.errors import AfdsError, AfdsWarning, ConfigError, DataError, RunFolderError
from afds.evaluation import Metrics, evaluate
from afds.files import LOCK, STEPS, alone_in, check_beside, check_place, is_empty, read_json, write_json
from afds.hardware import make_fabric, resolve_device
from afds.idle import refuse_idle
from afds.latency import solve_latency
from afds.lineage import check_unseen
from afds.progress import Progress
from afds.record import Record
from afds.runtimes import check_runtime, why_not_native
from afds.schedule import parse_budget, solve
from afds.selection import densities, round_predictors, set_density
from afds.setup import Setup
from afds.sources import parse_source
from afds.steps import after_base, base_of
from afds.training import train


@dataclass(frozen=True)
class FitResult:
    """Where the run is and what came out."""

    out: Path
    val: Metrics
    test: Metrics | None
    cost: Cost
    seconds: float  # of training, all steps of this run folder
    latency_ms: float | None = None  # of one image, where the budget was in milliseconds


def fit(config: FitConfig, *, quiet: bool = False, strict: bool = True) -> FitResult:
    """Transfer ``config.source`` to the photos in ``config.data`` within ``config.budget``.

    strict: refuse options that the method does not look at. Off for a step of a run, and in a comparison, where
    methods share their options.

    Raises:
        AfdsError: anything wrong with the options, the photos, the source or the run folder, before training.
    """
    with contextlib.ExitStack() as held:
        return _fit(config, quiet, strict, held)


def _fit(config: FitConfig, quiet: bool, strict: bool, held: contextlib.ExitStack) -> FitResult:
    config = dataclasses.replace(config, out=None if config.out is None else config.out.expanduser(),
                                 resume=None if config.resume is None else config.resume.expanduser())  # fmt: skip
    if config.resume is not None:
        begun = _resumed(config.resume, config.data)
        _only_resume(config)
        config = begun
    elif strict:
        refuse_idle(config)
    given = config
    config = _absolute(resolve_method(config))
    if config.data is None or config.out is None:
        missing = "a folder of photos" if config.data is None else "--out RUN, the folder to write"
        raise ConfigError(f"afds fit needs {missing} (or --resume RUN).")
    _check_out(config.out, resuming=config.resume is not None)
    check_beside(config.out, config.data)
    if parse_budget(config.budget).ms is not None:  # what can be told without the photos is told before they are read
        check_runtime(config.latency.runtime)
    resolve_device(config.hardware)
    if not is_run(config.source):
        parse_source(config.source)
    fabric = make_fabric(config.hardware)
    fabric.launch()
    if fabric.is_global_zero and config.resume is not None:
        held.enter_context(alone_in(config.out))
        _resumed(config.out, config.data)  # refused if the one that had it has just finished it
    # What `auto` came to goes into the record: steps before this run, and a resumed one, compute in the same.
    precision: Any = fabric._precision.precision
    config = dataclasses.replace(config, hardware=dataclasses.replace(config.hardware, precision=precision))
    progress = Progress(quiet=quiet or not fabric.is_global_zero)
    splits, facts = read_photos(config, progress)
    if config.resume is None:
        for note in check_unseen(config, splits):
            progress.say(note)
    fabric.barrier()  # all have looked at --out before one writes there
    setup = Setup(config, splits, fabric)  # also where steps come first: what is wrong is wrong now
    if strict and config.resume is None:
        refuse_idle(given, from_base=setup.is_base)
    config = setup.config  # with what milliseconds come to
    _say_who_will_run_it(setup, progress)
    out = config.out
    assert out is not None
    if fabric.is_global_zero and config.resume is None:
        out.mkdir(parents=True, exist_ok=True)
        held.enter_context(alone_in(out))
        _check_out(out, resuming=False)  # another one may have begun there meanwhile
        write_json(out / "config.json", setup.record(facts))
    elif config.resume is not None:
        _same_data(out, facts)
    fabric.barrier()
    stepped = _steps_before(config, setup, quiet)
    if stepped is not config:
        setup = Setup(stepped, splits, fabric)
    record = Record(out, enabled=fabric.is_global_zero, tensorboard=config.tensorboard)
    progress.say(setup.describe())
    with progress:
        train(fabric, setup.plan, out, record, progress.update)
    return _finish(setup, record, progress)


def _say_who_will_run_it(setup: Setup, progress: Progress) -> None:
    """What is made cheaper is to be fast: where PyTorch would have to run it, better known before hours of training."""
    if progress.quiet or setup.config.resume is not None or parse_method(setup.config.method)[1] == "dense":
        return
    why = why_not_native(setup.network, setup.preprocess.input_size)
    if why is not None:
        progress.say(f"note: `afds predict` will run this network on PyTorch, not natively. {why}")


def read_result(out: Path) -> FitResult:
    """The figures of a finished run, from its folder.

    Raises:
        RunFolderError: the record lacks its last line.
    """
    finals = Record(out, enabled=False).lines("final")
    if not finals:
        raise RunFolderError(f"{out / 'metrics.jsonl'} has no final line: the run did not finish.")
    final = finals[-1]
    saved = read_json(out / "structure.json")["cost"]
    layers = {name: LayerCost(**layer) for name, layer in saved["layers"].items()}
    cost = Cost(layers, final["val"]["images"], saved.get("reference_macs", 0.0))
    test = _metrics(final["test"], final.get("test_hits") or "") if final["test"] else None
    latency = (final.get("latency") or {}).get("ms")
    return FitResult(out, _metrics(final["val"], final.get("val_hits") or ""), test, cost, final["seconds"], latency)


def _metrics(saved: dict[str, Any], hits: str = "") -> Metrics:
    entropy = float("nan") if saved["cross_entropy"] is None else saved["cross_entropy"]
    lists = {name: tuple(saved.get(name, ())) for name in ("per_class", "class_images")}
    pairs = tuple((a, b, n) for a, b, n in saved.get("confusions", ()))
    return Metrics(**{**saved, **lists, "cross_entropy": entropy, "confusions": pairs, "hits": hits})


def _only_resume(config: FitConfig) -> None:
    """A resumed run has the options that it began with; only where the photos are now may be told.

    Raises:
        ConfigError: it names an option that would be of no effect.
    """
    given, default = dataclasses.replace(config, resume=None, data=None), FitConfig()
    for field in dataclasses.fields(FitConfig):
        if getattr(given, field.name) != getattr(default, field.name):
            raise ConfigError(f"--resume goes on with the options that the run began with, so "
                              f"--{field.name.replace('_', '-')} would be of no effect: leave it out, or start a new "
                              "run.")  # fmt: skip


def _absolute(config: FitConfig) -> FitConfig:
    """Places as they are from everywhere, for the record: a run may be resumed, or measured, from another folder."""

    def place(path: Path | None) -> Path | None:
        return None if path is None else Path(os.path.abspath(path.expanduser()))

    def source(spec: str) -> str:
        name, colon, rest = spec.strip().partition(":")
        if spec and is_run(spec):
            return str(place(Path(spec)))
        return f"{name}:{place(Path(rest))}" if colon and rest and Path(rest).expanduser().exists() else spec

    return dataclasses.replace(
        config, data=place(config.data), unlabelled=place(config.unlabelled), source_data=place(config.source_data),
        teacher=place(config.teacher), source=source(config.source), anchor=source(config.anchor),
        small_source=source(config.small_source),
    )  # fmt: skip


def _resumed(run: Path, data: Path | None) -> FitConfig:
    """The options of an interrupted run; data: where its photos are now, if they have been moved.

    Raises:
        RunFolderError: not a run folder, a finished one, or one that cannot be written to.
    """
    if not (run / "config.json").exists():
        raise RunFolderError(f"{run} is not a run folder: it has no config.json.")
    if is_run(run):
        raise RunFolderError(f"{run} is finished: there is nothing to resume. Use it, or start a new run.")
    saved = read_json(run / "config.json")
    if not isinstance(saved, dict) or "config" not in saved:
        raise RunFolderError(f"{run / 'config.json'} does not hold the options of a run.")
    config: FitConfig = from_json(FitConfig, saved["config"], str(run / "config.json"))
    if not os.access(run, os.W_OK | os.X_OK):
        raise RunFolderError(f"{run} cannot be written to: a resumed run goes on in its folder.")
    data = config.data if data is None else data
    if data is not None and not data.exists():
        raise DataError(f"{data}: the photos of this run are not there any more. Say where they are: "
                        f"afds fit PHOTOS --resume {run}")  # fmt: skip
    return dataclasses.replace(config, resume=run, out=run, data=data)


def _steps_before(config: FitConfig, setup: Setup, quiet: bool) -> FitConfig:
    """Run, or find done, the source step and the dense fine-tuning; the options of what is left to do."""
    assert config.out is not None
    if config.source_data is not None:
        source = dataclasses.replace(
            config, data=config.source_data, source_data=None, unlabelled=None, teacher=None, anchor="",
            small_source="", method="l2+afs", budget="1x",
            optim=dataclasses.replace(config.optim, epochs=config.source_epochs),
        )  # fmt: skip
        config = dataclasses.replace(config, source=_step(source, config.out / "source", quiet), source_data=None)
    assert config.out is not None
    base_method = base_of(config)
    taught = config.teacher is not None and parse_method(config.method)[1] not in PRUNED  # what is cut learns before
    if base_method is not None and not setup.is_base and not taught:
        if config.method == "afds" and _carries_selection(config.source):
            base_method = "afd+afs"
        base = dataclasses.replace(
            config, method=base_method, budget="1x", small_source="", unlabelled=None, teacher=None,
            optim=dataclasses.replace(config.optim, epochs=config.base_epochs),
        )  # fmt: skip
        config = after_base(config, _step(base, config.out / "base", quiet))
    return config


def _carries_selection(source: str) -> bool:
    return Path(source).is_dir() and is_run(source) and load_run(source).selection is not None


def _step(config: FitConfig, out: Path, quiet: bool) -> str:
    """A run before the run, resumed where it was begun; returns its folder as a source."""
    if not is_run(out):
        begun = (out / "config.json").exists()
        new = dataclasses.replace(config, out=out, resume=None)
        fit(FitConfig(resume=out, data=config.data) if begun else new, quiet=quiet, strict=False)
    return str(out)


def read_photos(config: FitConfig, progress: Progress) -> tuple[Splits, dict[str, Any]]:
    """Scan, split and read every photo once; the facts go into the record."""
    assert config.data is not None
    folder = scan(config.data)
    options = config.data_options
    splits = make_splits(
        folder, val_fraction=options.val_fraction, test_fraction=options.test_fraction, seed=config.seed
    )
    if config.unlabelled is not None:
        splits = with_unlabelled(splits, config.unlabelled)
    unseen = classes_unseen(splits, folder)
    items = splits.items()
    with progress.waiting(f"Reading {len(items)} photos in {len(splits.classes)} classes"):
        unreadable = check_images(items, workers=max(2, options.workers))
    if unreadable:
        progress.say(describe(unreadable))
        if not options.skip_unreadable:
            raise DataError(f"{len(unreadable)} photos cannot be read (listed above). Mend or remove them, or go on "
                            "without them with --data-options.skip-unreadable.")  # fmt: skip
        splits = without(splits, unreadable)
    if len(splits.train) < 8:
        raise DataError(f"{config.data}: {len(splits.train)} training photos are too few to train on.")
    told = [*folder.warnings, *unseen]
    for warning in told:
        progress.say(f"warning: {warning}")
    counts = {"train": len(splits.train), "val": len(splits.val), "test": len(splits.test or ())}
    facts = {"classes": len(splits.classes), **counts, "fingerprint": splits.fingerprint(),
             "test_fingerprint": fingerprint(splits.test) if splits.test else None,
             "bytes": sum(item.path.stat().st_size for item in splits.items()),
             "warnings": told, "unreadable": [str(u.path) for u in unreadable]}  # fmt: skip
    if splits.unlabelled:
        facts |= {"unlabelled": len(splits.unlabelled), "unlabelled_fingerprint": fingerprint(splits.unlabelled)}
    return splits, facts


def _check_out(out: Path, resuming: bool) -> None:
    if resuming:
        return
    here = check_place(out)
    if out.exists() and not is_empty(out):
        begun = (out / "config.json").exists() and not is_run(out)
        hint = f" To go on with the run in it: afds fit --resume {out}" if begun else ""
        raise RunFolderError(f"--out {out} is not empty; name a new folder, nothing is ever overwritten.{hint}")
    if shutil.disk_usage(here).free < 2**30:
        raise RunFolderError(f"--out {out}: less than 1 GiB is free there.")


def _same_data(out: Path, facts: dict[str, Any]) -> None:
    saved = read_json(out / "config.json").get("data")
    if not isinstance(saved, dict):
        raise RunFolderError(f"{out / 'config.json'} does not say which photos the run was started on.")
    bytes_then = saved.get("bytes", facts["bytes"])  # runs of before 28 November 2026 do not say
    names_then, names = ([f.get(name) for name in ("fingerprint", "unlabelled_fingerprint")] for f in (saved, facts))
    if names_then != names or bytes_then != facts["bytes"]:
        raise DataError(f"The photos have changed since {out} was started: a resumed run would mix two data sets. "
                        "Start a new run.")  # fmt: skip


def _finish(setup: Setup, record: Record, progress: Progress) -> FitResult:
    """Meet the budget on all validation images, read the test split once, write the artifact."""
    from afds.report import write_report

    c, fabric, network, splits = setup.config, setup.fabric, setup.network, setup.splits
    assert c.out is not None
    if setup.plan.descent is not None:
        round_predictors(network)
    with progress.waiting("Final validation"):
        val = _meet_budget(setup)
    test = None
    if splits.test and c.read_test:
        with progress.waiting(f"The test split, once: {len(splits.test)} photos"):
            meter = CostMeter(network, setup.plan.reference_macs)
            test = evaluate(network, setup.eval_loader(splits.test), len(splits.classes), count_macs=meter)
    assert val.cost is not None
    latency: dict[str, Any] | None = None
    if setup.stopwatch is not None:
        latency = {"ms": setup.stopwatch(network), "asked_ms": setup.plan.ms, "how": setup.stopwatch.describe()}
    seconds = sum(line["seconds"] for line in record.lines("epoch"))
    seconds += sum(read_result(c.out / step).seconds for step in STEPS if is_run(c.out / step))
    record.write("final", val=val.to_dict(), test=test.to_dict() if test else None, budget=c.budget,
                 dense_macs=val.cost.dense, counted_macs=val.cost.counted, ratio=val.cost.ratio,
                 val_hits=val.hits, test_hits=test.hits if test else None, seconds=seconds,
                 latency=latency)  # fmt: skip
    if fabric.is_global_zero:
        save_run(
            c.out, model=network, arch=setup.arch, arch_args=setup.arch_args, num_classes=len(splits.classes),
            selection=setup.selection if has_selection(network) else None, labels=splits.classes,
            preprocess=setup.preprocess,
            summary={**cost_summary(val.cost), "reference_size": setup.taught_at.input_size},
        )  # fmt: skip
        try:
            write_report(c.out)
        except Exception as error:  # a page that fails must not take a trained network with it
            told = f"The report could not be written ({error}); `afds report {c.out}` tries again."
            warnings.warn(told, AfdsWarning, stacklevel=2)
        for done_with in ("last.ckpt", LOCK):
            (c.out / done_with).unlink(missing_ok=True)
    fabric.barrier()
    result = FitResult(c.out, val, test, val.cost, seconds, latency["ms"] if latency else None)
    progress.say(_closing(result, c))
    return result


def _meet_budget(setup: Setup) -> Metrics:
    """Validation metrics; where all validation images cost more than the probe did, densities go down a little."""
    classes = len(setup.splits.classes)
    meter = CostMeter(setup.network, setup.plan.reference_macs)
    metrics = evaluate(setup.network, setup.plan.val_loader, classes, count_macs=meter)
    assert metrics.cost is not None
    now = densities(setup.network)
    ms, watch = setup.plan.ms, setup.stopwatch
    if setup.plan.descent is not None and ms is not None and watch is not None:
        late = bool(setup.fabric.broadcast(watch(setup.network) > ms))
        if not late:
            return metrics
        if setup.fabric.is_global_zero:
            solve_latency(setup.network, lambda t: {name: max(1e-4, d * t) for name, d in now.items()}, ms, watch)
        set_density(setup.network, setup.fabric.broadcast(densities(setup.network)))
        return evaluate(setup.network, setup.plan.val_loader, classes, count_macs=meter)
    if setup.plan.descent is None or metrics.cost.ratio >= setup.ratio:
        return metrics
    batches = [x_BCHW.to(setup.fabric.device) for x_BCHW, _ in setup.plan.val_loader]
    solve(setup.network, lambda t: {name: max(1e-4, d * t) for name, d in now.items()}, setup.ratio, batches,
          reference=setup.plan.reference_macs)  # fmt: skip
    return evaluate(setup.network, setup.plan.val_loader, classes, count_macs=meter)


def cost_summary(cost: Cost) -> dict[str, Any]:
    """Plain data of a cost, per layer and in sum."""
    return {
        "dense_macs": cost.dense, "counted_macs": cost.counted, "ratio": cost.ratio, "images": cost.images,
        "reference_macs": cost.reference,
        "layers": {name: dataclasses.asdict(layer) for name, layer in cost.layers.items()},
    }  # fmt: skip


def _closing(result: FitResult, config: FitConfig) -> str:
    def accuracies(r: FitResult) -> str:
        return f"validation {r.val.top1:.1%}" + (f", test {r.test.top1:.1%}" if r.test else "")

    lines = [f"{accuracies(result)}, {result.cost.counted / 1e6:.1f} M MACs per image, "
             f"{result.cost.ratio:.2f}x fewer than dense"]  # fmt: skip
    if result.latency_ms is not None:
        c = config.latency
        lines.append(f"{result.latency_ms:.2f} ms per image here ({c.runtime}, {c.threads} "
                     f"thread{'s' if c.threads > 1 else ''}), {config.budget} asked")  # fmt: skip
    base = Path(config.source)
    if config.method == "afds" and config.budget != "1x" and is_run(base):
        with contextlib.suppress(AfdsError):  # a base that was carried over without its record is as good a start
            before = read_result(base)
            what = "fine-tuned at full cost" if before.cost.ratio < 1.01 else f"before, at {before.cost.ratio:.2f}x"
            lines.append(f"{what} ({base}): {accuracies(before)}")
    if result.cost.ratio < 1 and config.budget != "1x":
        lines.append("Not worth it: the predictors cost more than selection saves.")
    return "\n".join([*lines, f"run folder: {result.out}"])
