"""What each verb of the command line takes and does. Dataclasses are the options, docstrings their help."""

from __future__ import annotations

import json as jsonlib
import sys
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import tyro
from rich.box import SIMPLE_HEAD
from rich.table import Table

from afds.errors import ConfigError
from afds.terminal import make_console

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console

    from afds.evaluation import FolderResult
    from afds.inference import Prediction
    from afds.inspection import Inspection
    from afds.measure import Measurement

T = TypeVar("T")
ALL_CLASSES = 20  # up to so many the table of accuracies is shown in full, beyond only its weaker half of that


@dataclass(frozen=True)
class Evaluate:
    """Accuracy of a run on labelled photos, and what the network costs on them.

    The folders of DATA are matched to the run's classes by name.
    """

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Run folder, as `afds fit` wrote it."""
    data: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    """Folder of class folders, or one with train/ and test/ in it."""
    split: Literal["auto", "test", "val", "train", "all"] = "auto"
    """Which images. auto: test/ where there is one; the images held out by this run where DATA is what it was
    fitted on; else all."""
    batch_size: int = 32
    """Images at a time."""
    runtime: Literal["torch", "native"] = "torch"
    """torch: the plain PyTorch forward. native: the kernels that skip; their MACs are those they executed."""
    precision: Literal["float32", "bf16"] = "float32"
    """Of the native runtime's convolutions. bf16: half the memory for weights; `afds measure` tells whether it is
    faster on this CPU."""
    skip_unreadable: bool = False
    """Go on without photos that cannot be read; they are named."""
    mistakes: int = 0
    """Name so many of the photos that it takes for another class, those first of which it is surest."""
    json: bool = False
    """Print JSON in place of a table."""

    def __post_init__(self) -> None:
        _at_least("batch-size", self.batch_size, 1)
        _at_least("mistakes", self.mistakes, 0)
        _native_only(self.precision, self.runtime)


@dataclass(frozen=True)
class Predict:
    """The most probable classes of photos.

    Unreadable files are named on the way and make the exit code 1.
    """

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Run folder, as `afds fit` wrote it."""
    images: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE ...")]
    """Photos, or folders with photos anywhere in them; any number."""
    top_k: int = 5
    """How many classes to show."""
    batch_size: int = 32
    """Images at a time. 1 answers soonest."""
    runtime: Literal["native", "torch"] = "native"
    """native: the kernels that skip what was not selected; where they cannot run this network, PyTorch does, and a
    line says so. torch: the plain PyTorch forward."""
    precision: Literal["float32", "bf16"] = "float32"
    """Of the native runtime's convolutions. bf16: half the memory for weights; `afds measure` tells whether it is
    faster on this CPU."""
    threads: int = 0
    """CPU threads. Default: all cores, or OMP_NUM_THREADS."""
    json: bool = False
    """Print one line of JSON for each image."""

    def __post_init__(self) -> None:
        _native_only(self.precision, self.runtime)
        _at_least("top-k", self.top_k, 1)
        _at_least("batch-size", self.batch_size, 1)
        _at_least("threads", self.threads, 0)
        if not self.images:
            raise ConfigError("afds predict needs a photo or a folder of photos: afds predict RUN IMAGE ...")


@dataclass(frozen=True)
class Measure:
    """Time a run and its dense peer in every runtime that is installed, on this machine.

    Saves RUN/measure.json and draws the report again, which shows it.
    """

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Run folder, as `afds fit` wrote it."""
    threads: tuple[int, ...] = ()
    """Numbers of threads. Default: one, and all cores."""
    batch: tuple[int, ...] = (1,)
    """Images at a time."""
    only: tuple[str, ...] = ()
    """Only these of: dense static dynamic, and torch compiled onnx openvino native."""
    precision: tuple[Literal["float32", "bf16"], ...] = ("float32",)
    """What to compute in. bf16: rows of native and openvino, each beside the dense networks in bf16."""
    rounds: int = 15
    """Rounds in which each row is timed twice."""
    data: Path | None = None
    """Photos on which the static network is frozen. Default: those the run was fitted on."""
    profile: bool = False
    """Also show where the native runtime spends its time, by layer."""
    json: Path | None = None
    """Also write the result into this file."""


@dataclass(frozen=True)
class Inspect:
    """Which channels win, layer by layer: how dynamic the predictors' choice is.

    Saves RUN/winners.json and draws the report again, which shows it.
    """

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Run folder, as `afds fit` wrote it."""
    data: Path | None = None
    """Photos in class folders. Default: those the run was fitted on, of these the ones it held out for validation."""
    images: int = 512
    """At most so many of them, evenly spaced over the classes."""


@dataclass(frozen=True)
class Report:
    """Draw report.html again from the files of a run folder, also of one that is still training."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Run folder."""


@dataclass(frozen=True)
class Export:
    """Write a run as one file for a runtime, and compare the file's accuracy with the network's.

    Without --static the file computes what the run computes, one image at a time; what each image chooses (small
    predictors of scales, with --descent.no-settle the channels too) it chooses in stock runtimes as well.
    """

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Run folder, as `afds fit` wrote it."""
    format: Literal["onnx", "openvino", "torch"] = "onnx"
    """`onnx`: ONNX Runtime and others. `openvino`: its IR (.xml, .bin). `torch`: torch.export's .pt2."""
    static: bool = False
    """Freeze the selection to what the training images use most: a smaller plain network, any batch size."""
    out: Path | None = None
    """File to write. Default: RUN/model.onnx (.xml, .pt2), with --static RUN/static.onnx."""
    data: Path | None = None
    """Photos to compare on (and, with --static, to count winners on). Default: those the run was fitted on."""
    tolerance: float = 0.5
    """Points of validation accuracy by which file and network may differ; more fails, and leaves no file."""

    def __post_init__(self) -> None:
        if not 0 <= self.tolerance <= 100:
            raise ConfigError(f"--tolerance must be from 0 to 100 points, got {self.tolerance}.")


def run(verb: str, arguments: list[str]) -> int:
    """Parse the options of `verb` and do it; returns the exit code.

    Raises AfdsError for what the user can mend, SystemExit after help and for options that cannot be read.
    """
    warnings.filterwarnings(
        "ignore", message="Image size .* exceeds limit"
    )  # Pillow's; what it refuses is told by name
    if verb == "prepare":
        from afds.prepare_command import prepare_command

        return prepare_command(arguments)
    return {
        "fit": _fit,
        "evaluate": _evaluate,
        "predict": _predict,
        "export": _export,
        "measure": _measure,
        "inspect": _inspect,
        "report": _report,
        "compare": _compare,
        "demo": _demo,
    }[verb](arguments)


def _fit(arguments: list[str]) -> int:
    from afds.config import FitConfig

    config = tyro.cli(FitConfig, prog="afds fit", args=arguments, description=FitConfig.__doc__)
    from afds.fitting import fit

    fit(config)
    return 0


def _demo(arguments: list[str]) -> int:
    from afds.demo import DemoConfig, demo

    demo(tyro.cli(DemoConfig, prog="afds demo", args=arguments))
    return 0


def _evaluate(arguments: list[str]) -> int:
    options = tyro.cli(Evaluate, prog="afds evaluate", args=arguments, config=(tyro.conf.FlagCreatePairsOff,))
    from afds.evaluation import evaluate_folder

    result = _or_torch(
        lambda runtime: evaluate_folder(
            options.run, options.data, options.split, batch_size=options.batch_size, runtime=runtime,
            skip_unreadable=options.skip_unreadable,
            precision=options.precision if runtime == "native" else "float32",
        ),
        options.runtime, options.precision,
    )  # fmt: skip
    if options.json:
        shown = result.to_dict()
        if options.mistakes:
            shown["mistakes"] = [
                {"path": str(m.path), "class": m.label, "taken_for": m.said, "share": m.share}
                for m in result.mistakes()[: options.mistakes]
            ]
        print(jsonlib.dumps(shown, ensure_ascii=False, allow_nan=False))
    else:
        _show(result, options.mistakes)
    return 0


def _show(result: FolderResult, mistakes: int) -> None:
    console, metrics, cost = make_console(), result.metrics, result.metrics.cost
    table = Table(title=f"{metrics.images} images ({result.split})", show_header=False)
    table.add_row("accuracy", f"{metrics.top1:.1%}")
    if metrics.top5 is not None:
        table.add_row("top 5", f"{metrics.top5:.1%}")
    table.add_row("mean over classes", f"{metrics.balanced_accuracy:.1%}")
    table.add_row("cross-entropy", f"{metrics.cross_entropy:.3f}")
    if cost is not None:
        table.add_row("MACs per image", f"{cost.counted / 1e6:.1f} M of {cost.dense / 1e6:.1f} M dense")
        table.add_row("fewer MACs", f"{cost.ratio:.2f}x")
    console.print(table)
    shares = zip(metrics.per_class, result.labels, metrics.class_images, strict=True)
    known = sorted((share, label, images) for share, label, images in shares if share is not None)
    shown = known if len(known) <= ALL_CLASSES else known[: ALL_CLASSES // 2]
    title = "accuracy by class" if shown == known else f"the {len(shown)} weakest of {len(known)} classes"
    say = partial(console.print, markup=False, soft_wrap=True)
    say(f"{title}:")
    for share, label, images in shown:
        say(f"  {share:6.1%} of {images:4}  {label}")
    if metrics.confusions:
        say("most often taken for another:")
    for a, b, count in metrics.confusions[: ALL_CLASSES // 4]:
        say(f"  {count:6} of {metrics.class_images[a]:4}  {result.labels[a]} taken for {result.labels[b]}")
    if mistakes:
        say("the mistakes that it is surest of:")
    for mistake in result.mistakes()[:mistakes]:
        say(f"  {mistake.share:6.1%}  {mistake.path}: taken for {mistake.said}")
    for note in result.notes:
        console.print(f"note: {note}", markup=False, soft_wrap=True)


def _predict(arguments: list[str]) -> int:
    options = tyro.cli(Predict, prog="afds predict", args=arguments, config=(tyro.conf.FlagCreatePairsOff,))
    from afds.artifact import load_run
    from afds.data import image_files
    from afds.inference import Model

    if options.threads:
        import torch

        torch.set_num_threads(options.threads)
    run, unreadable = load_run(options.run), 0
    files = image_files(options.images)
    model = _or_torch(
        lambda runtime: Model(
            run, runtime=runtime, precision=options.precision if runtime == "native" else "float32"
        ),
        options.runtime, options.precision,
    )  # fmt: skip
    for prediction in model.stream(files, options.top_k, options.batch_size, on_error="report"):
        if prediction.error is not None:
            unreadable += 1
            if not options.json:
                print(f"afds: {prediction.error}", file=sys.stderr)
        if options.json:
            print(_line(prediction))
        elif prediction.error is None:
            top = ", ".join(f"{label} {share:.1%}" for label, share in prediction.top)
            print(f"{prediction.path}: {top}")
    return 1 if unreadable else 0


def _or_torch(work: Callable[[str], T], runtime: str, precision: str) -> T:
    """`work` with this runtime, or with PyTorch where the native one is missing or does not compute the network."""
    in_float32 = "" if precision == "float32" else ", in float32"
    if runtime == "native":
        from afds.runtime import RuntimeMissingError, UnsupportedError

        try:
            return work("native")
        except (RuntimeMissingError, UnsupportedError) as error:
            print(f"afds: note: PyTorch runs this network{in_float32}. {error}", file=sys.stderr)
    return work("torch")


def _line(prediction: Prediction) -> str:
    """One image as JSON."""
    top = [{"label": label, "probability": round(share, 6)} for label, share in prediction.top]
    line = {"path": str(prediction.path), "top": top}
    return jsonlib.dumps(line | ({"error": prediction.error} if prediction.error else {}), ensure_ascii=False)


def _report(arguments: list[str]) -> int:
    options = tyro.cli(Report, prog="afds report", args=arguments)
    from afds.report import write_report

    print(write_report(options.run))
    return 0


def _export(arguments: list[str]) -> int:
    o = tyro.cli(Export, prog="afds export", args=arguments, config=(tyro.conf.FlagCreatePairsOff,))
    from afds.export import export_run

    console = make_console()
    made = export_run(o.run, o.format, static_form=o.static, out=o.out, data=o.data, tolerance=o.tolerance,
                      say=lambda line: console.print(line, markup=False, soft_wrap=True))  # fmt: skip
    console.print(f"{made.path}: {made.form}, {made.macs_ratio:.2f}x fewer MACs than dense", markup=False,
                  soft_wrap=True)  # fmt: skip
    if made.model is not None and made.network is not None and made.file is not None:
        frozen = f", frozen {made.network:.1%}" if made.frozen else ""
        console.print(f"accuracy on {made.images} {made.split} images: run {made.model:.1%}{frozen}, "
                      f"file {made.file:.1%}", markup=False, soft_wrap=True)  # fmt: skip
        if made.network < made.model - 0.01:
            console.print(f"note: freezing the selection costs {100 * (made.model - made.network):.1f} points.",
                          markup=False, soft_wrap=True)  # fmt: skip
    return 0


def _measure(arguments: list[str]) -> int:
    o = tyro.cli(Measure, prog="afds measure", args=arguments, config=(tyro.conf.FlagCreatePairsOff,))
    from afds.files import no_file_at, write_json
    from afds.measure import NAME, measure_run, save_measurement
    from afds.report import NAME as PAGE

    if o.json is not None and (reason := no_file_at(o.json)):
        raise ConfigError(f"--json {o.json}{reason}")
    console = make_console(110)
    result = measure_run(o.run, threads=o.threads, batches=o.batch, only=o.only, rounds=o.rounds, data=o.data,
                         precisions=o.precision, profile=o.profile, save=False,
                         say=lambda line: console.print(line, markup=False))  # fmt: skip
    try:
        _show_measurement(result, console, o.precision)
    finally:  # also where the reader of these lines has seen enough
        if o.json is not None:
            write_json(o.json, result.to_dict())
        saved = save_measurement(o.run, result)
    console.print(_where_saved(o.run, NAME, PAGE, saved), markup=False, soft_wrap=True)
    return 0


def _where_saved(run: Path, name: str, page: str, saved: bool) -> str:
    return f"saved: {run / name}, {run / page}" if saved else f"not saved in the run: {run} cannot be written to."


def _show_measurement(result: Measurement, console: Console, precisions: tuple[str, ...]) -> None:
    from afds.measure import runtime_of

    size = f"{result.input_size}" + f" (dense {result.dense_size})" * (result.dense_size != result.input_size)
    console.print(f"{result.arch}, {size} px, {' and '.join(precisions)}, {result.hardware['cpu']}", markup=False)
    for threads, batch in dict.fromkeys((row.threads, row.batch) for row in result.rows):
        table = Table(title=f"threads {threads}, batch {batch}: median ms (quarters)")
        for name in ("network", "runtime", "ms", "p90", "faster", "fewer MACs", "share"):
            table.add_column(name, justify="left" if name in ("network", "runtime") else "right", no_wrap=True)
        for row in (r for r in result.rows if (r.threads, r.batch) == (threads, batch)):
            share = "" if row.share is None else f"{row.share:.2f}"
            digits = 1 if row.median_ms >= 10 else 3 if row.median_ms < 1 else 2
            median = f"{row.median_ms:.{digits}f} ({row.low_ms:.{digits}f}-{row.high_ms:.{digits}f})"
            ratios = (f"{row.speedup:.2f}x", f"{row.macs_ratio:.2f}x", share)
            table.add_row(row.form, runtime_of(row), median, f"{row.p90_ms:.{digits}f}", *ratios)
        console.print(table)
    if result.profile:
        console.print(_profile_table(result.profile))
    if result.accuracy is not None:
        console.print(f"validation accuracy of the run: {result.accuracy:.1%}")
    for what, why in result.skipped.items():
        console.print(f"left out: {what}: {why}", markup=False, soft_wrap=True)
    for line in result.verdict:
        console.print(line, markup=False, soft_wrap=True)


def _profile_table(profile: list[dict[str, Any]]) -> Table:
    """Microseconds by layer and part; the last lines are their sums and shares of the whole."""
    parts = [name for name in profile[0] if name != "name"]
    sums = {part: sum(layer[part] for layer in profile) for part in parts}
    whole = sum(sums.values()) or 1.0
    table = Table(title="native runtime, one thread: microseconds per image, by layer")
    table.add_column("layer")
    for name in (*parts, "all"):
        table.add_column(name, justify="right")
    for i, layer in enumerate(profile):
        values = [layer[part] for part in parts]
        table.add_row(str(layer["name"]), *(f"{1e6 * v:.1f}" if v else "" for v in (*values, sum(values))),
                      end_section=i == len(profile) - 1)  # fmt: skip
    table.add_row("all layers", *(f"{1e6 * v:.1f}" for v in (*sums.values(), whole)))
    table.add_row("share", *(f"{v / whole:.1%}" for v in (*sums.values(), whole)))
    return table


def _inspect(arguments: list[str]) -> int:
    o = tyro.cli(Inspect, prog="afds inspect", args=arguments, config=(tyro.conf.FlagCreatePairsOff,))
    from afds.inspection import NAME, inspect_run, save_inspection
    from afds.report import NAME as PAGE

    console = make_console(80)
    found = inspect_run(o.run, data=o.data, images=o.images, save=False,
                        say=lambda line: console.print(line, markup=False, soft_wrap=True))  # fmt: skip
    try:
        _show_inspection(found, console)
    finally:  # also where the reader of these lines has seen enough
        saved = save_inspection(o.run, found)
    console.print(_where_saved(o.run, NAME, PAGE, saved), markup=False, soft_wrap=True)
    return 0


def _show_inspection(found: Inspection, console: Console) -> None:
    from afds.report.winners import shown, summary

    facts = found.to_dict()
    table = Table(title=f"winners on {found.images} images of {found.classes} classes, in %", box=SIMPLE_HEAD,
                  padding=(0, 1, 0, 0), show_edge=False, pad_edge=False)  # fmt: skip
    left_out = ("#", "d", "across", "dead")  # 80 characters are soon full
    rows = [{name: value.removesuffix(" %").replace(" of ", "/") for name, value in row.items() if name not in left_out}
            for row in shown(facts)]  # fmt: skip
    for name in rows[0]:
        table.add_column(name, justify="left" if name == "layer" else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row.values())
    console.print(table)
    for line in summary(facts):
        console.print(line, markup=False, soft_wrap=True)


def _compare(arguments: list[str]) -> int:
    from afds.compare.plan import CompareConfig

    arguments = _bare_ray(arguments)
    config = tyro.cli(CompareConfig, prog="afds compare", args=arguments, description=CompareConfig.__doc__)
    from afds.compare.page import write_page
    from afds.compare.run import compare
    from afds.compare.table import cells, footnote, terminal, write_tables

    console = make_console(120)
    lines = compare(config, console)
    if config.dry_run:
        return 0
    found = cells(lines, config.reference_row())
    note = footnote(found, config.reference_row(), config.trials)
    write_tables(config.out, found, note)
    page = write_page(config.out, found, note)
    for table in terminal(found):
        console.print(table)
    console.print(note, markup=False)
    print(page)
    return 0


def _bare_ray(arguments: list[str]) -> list[str]:
    """`--ray` without an address means a cluster of this machine alone."""
    bare = [a == "--ray" and b.startswith("--") for a, b in zip(arguments, [*arguments[1:], "--"], strict=True)]
    return [word for a, alone in zip(arguments, bare, strict=True) for word in ([a, "local"] if alone else [a])]


def _native_only(precision: str, runtime: str) -> None:
    if precision != "float32" and runtime != "native":
        raise ConfigError(f"--precision {precision} is of the native runtime: add --runtime native.")


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ConfigError(f"--{name} must be {least} or more, got {value}.")
