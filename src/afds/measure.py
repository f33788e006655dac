"""`afds measure`: what a stopwatch says, beside what the MACs say.

::

    dense     the same architecture without selection      |  torch  compiled  onnx  openvino  native
    static    selection frozen, compacted                  |  in alternating rounds, after warm-up,
    dynamic   channels chosen per image                    |  for each number of threads and each batch

    speed-up = median of the fastest dense row / median of this row      share = speed-up / MACs ratio

All rows of one setting run in turn, round after round, so that what else the machine does hits all of them: in each,
once the threads of the row before are asleep, one call that does not count and two that do. The dense peer has the
weights of the run's dense base where that is there, random ones otherwise: time does not depend on them. Where the run
looks at smaller images than its dense network did, each is timed on images of its own size. The peer of a bf16 row is
the fastest dense row in bf16. Unless bf16 is asked for, everything is float32.
"""

from __future__ import annotations

import importlib.util
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from afds.architecture import build_network
from afds.artifact import Run, is_run, load_run
from afds.compaction import deployable, is_constant, static
from afds.cost import has_selection, measure_cost
from afds.errors import AfdsError, AfdsWarning, ConfigError
from afds.export import training_batches
from afds.hardware import stamp, usable_cores
from afds.report import keep_figures
from afds.runtimes import IN_BF16, OPENERS, PRECISIONS, RUNTIMES, Predictor

FORMS = ("dense", "static", "dynamic")
NAME = "measure.json"
WARM_UP = 3  # calls before the first that counts
TURN = 2  # calls that count, of each row in each round
WORTH_IT = 1.1  # faster than the fastest dense row by less: nobody would notice


@dataclass
class Row:
    """One network in one runtime, for one number of threads and images."""

    form: str
    runtime: str
    threads: int
    batch: int
    median_ms: float
    low_ms: float
    """A quarter of the calls took less."""
    high_ms: float
    """A quarter took more."""
    p90_ms: float
    calls: int
    macs_ratio: float
    """Fewer MACs than dense."""
    speedup: float = 0.0
    """Over the fastest dense row of the same setting and precision."""
    share: float | None = None
    """Of the MACs ratio that became time."""
    precision: str = "float32"


@dataclass
class Measurement:
    """All rows and what was measured on what."""

    arch: str
    input_size: int
    dense_size: int
    """Side of the images that the dense network looks at, in pixels."""
    when: str
    hardware: dict[str, Any]
    accuracy: float | None
    """Validation accuracy of the run, as its record has it."""
    rows: list[Row] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    verdict: list[str] = field(default_factory=list)
    profile: list[dict[str, Any]] = field(default_factory=list)
    own: str = "dynamic"
    """The form that is the run's own network: `static` where nothing in it depends on the image."""
    weights_sha256: str = ""
    """Of the weights that were timed: a run that is trained anew is another one."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def measure_run(
    run_path: Path | str,
    *,
    threads: Sequence[int] = (),
    batches: Sequence[int] = (1,),
    only: Sequence[str] = (),
    precisions: Sequence[str] = ("float32",),
    rounds: int = 15,
    data: Path | None = None,
    profile: bool = False,
    save: bool = True,
    say: Callable[[str], None] = lambda line: None,
) -> Measurement:
    """Time a run and its dense peer in every runtime that is installed; saved as RUN/measure.json, and in its report.

    Args:
        threads: by default one, and all cores.
        only: names of forms and runtimes; empty: all of them.
        precisions: `float32`, `bf16` or both; of bf16 there are rows of OpenVINO and native.
        data: photos to freeze the static network on; by default those of the run, where they still are.
        profile: also where the time goes in the native runtime, by layer.
        save: into the run folder, with a warning where that cannot be written to; else `save_measurement` does it.
    Raises:
        ConfigError: a number or a name that makes no sense, or nothing that could be timed: nothing is saved.
        RunFolderError: of the run.
    """
    cores = usable_cores()
    threads, batches = tuple(threads) or tuple(dict.fromkeys((1, cores))), tuple(batches) or (1,)
    _check(threads, batches, only, rounds, cores)
    runtimes, unknown = _runtimes(only, tuple(dict.fromkeys(precisions)) or PRECISIONS[:1])
    run = load_run(run_path)
    side = run.preprocess.input_size
    full_side = dense_side(run)
    result = Measurement(run.arch, side, full_side, datetime.now(UTC).isoformat(timespec="seconds"), _hardware(),
                         _accuracy(run), skipped=unknown,
                         weights_sha256=run.structure["weights"]["sha256"])  # fmt: skip
    networks = _networks(run, data, [f for f in FORMS if not only or f in only or not set(only) & set(FORMS)], result)
    sides = {form: full_side if form == "dense" else side for form in networks}
    noise = {s: torch.randn(2, 3, s, s, generator=torch.Generator().manual_seed(0)) for s in (side, full_side)}
    full = measure_cost(networks["dense"], [noise[full_side]]).dense
    ratios = {form: full / measure_cost(network, [noise[sides[form]]]).counted for form, network in networks.items()}
    before = torch.get_num_threads()
    try:
        for count in threads:
            for batch in batches:
                say(f"{count} thread{'s' if count > 1 else ''}, batch {batch}")
                result.rows += _setting(
                    networks, runtimes, sides, len(run.labels), count, batch, rounds, ratios, result
                )
    finally:
        torch.set_num_threads(before)
    if not result.rows:  # a measurement that was saved before is worth more
        why = "; ".join(f"{what}: {reason}" for what, reason in result.skipped.items())
        raise ConfigError(f"nothing could be timed, so nothing was saved. {why}")
    if profile:
        result.profile = _profile(networks.get(result.own, networks["dense"]), side, result)
    result.verdict = verdict(result.rows, result.own)
    if save and not save_measurement(run.path, result):
        warnings.warn(f"{run.path} cannot be written to: not saved in it.", AfdsWarning, stacklevel=2)
    return result


def save_measurement(run_path: Path | str, result: Measurement) -> bool:
    """RUN/measure.json, as `keep_figures`."""
    return keep_figures(run_path, NAME, result.to_dict())


def dense_side(run: Run) -> int:
    """Side of the images that the dense network of a run looked at, in pixels: the run's own, or a larger one."""
    saved, own = run.structure["cost"].get("reference_size"), run.preprocess.input_size
    return saved if type(saved) is int and own <= saved <= 4 * own else own


def _check(threads: Sequence[int], batches: Sequence[int], only: Sequence[str], rounds: int, cores: int) -> None:
    for name, values, most in (("threads", threads, cores), ("batch", batches, 1024), ("rounds", (rounds,), 10_000)):
        for value in values:
            if not 1 <= value <= most:
                raise ConfigError(f"--{name} must be from 1 to {most}, got {value}.")
    for name in only:
        if name not in (*FORMS, *RUNTIMES):
            raise ConfigError(f"--only {name}: choose from {', '.join((*FORMS, *RUNTIMES))}.")


def _runtimes(only: Sequence[str], precisions: Sequence[str]) -> tuple[list[tuple[str, str]], dict[str, str]]:
    """(runtime, precision) of the rows, and why there are none of a runtime that was named."""
    for precision in precisions:
        if precision not in PRECISIONS:
            raise ConfigError(f"--precision {precision}: choose from {', '.join(PRECISIONS)}.")
    asked = [r for r in RUNTIMES if r in only]
    pairs = [(r, p) for p in precisions for r in asked or RUNTIMES]
    known = [(r, p) for r, p in pairs if p == "float32" or r in IN_BF16]
    reason = f"rows in bf16 are of {' and '.join(reversed(IN_BF16))}"
    if not known:
        raise ConfigError(f"--precision bf16 --only {' '.join(asked)}: {reason}; name one of these, or float32.")
    return known, {f"{r} {p}": reason for r, p in pairs if r in asked and (r, p) not in known}


def _networks(run: Run, data: Path | None, forms: list[str], result: Measurement) -> dict[str, nn.Module]:
    """The networks to time, by form; dense is always among them."""
    base = run.path / "base"
    if not has_selection(run.model):
        found: dict[str, nn.Module] = {"dense": run.model}
        result.skipped |= {form: "this run selects nothing" for form in forms if form != "dense"}
        return found
    found = {}
    if is_run(base):
        dense = load_run(base)
        if not has_selection(dense.model) and dense.arch == run.arch and dense.arch_args == run.arch_args:
            found["dense"] = dense.model
    if not found:
        torch.manual_seed(0)
        found["dense"] = _fresh(build_network(run.arch, run.arch_args, len(run.labels)))
    if is_constant(run.model):
        result.own = "static"
        if set(forms) & {"static", "dynamic"}:
            found["static"] = deployable(run.model)
        if "dynamic" in forms:
            result.skipped["dynamic"] = "nothing in this run depends on the image: the static network is its own"
    elif "static" in forms:
        try:
            found["static"] = static(run.model, training_batches(run, data))
        except AfdsError as error:
            result.skipped["static"] = str(error)
    if "dynamic" in forms and result.own == "dynamic":
        found["dynamic"] = deployable(run.model)
    return {form: network.to(memory_format=torch.contiguous_format).eval() for form, network in found.items()}  # type: ignore[call-overload]


@torch.no_grad()
def _fresh(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        nn.init.kaiming_normal_(parameter) if parameter.dim() > 1 else nn.init.zeros_(parameter)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()
    return model


def _setting(
    networks: dict[str, nn.Module], runtimes: Sequence[tuple[str, str]], sides: dict[str, int], classes: int,
    threads: int, batch: int, rounds: int, ratios: dict[str, float], result: Measurement,
) -> list[Row]:  # fmt: skip
    """All rows of one number of threads and one batch, in turn."""
    torch.set_num_threads(threads)
    calls: dict[tuple[str, str, str], Callable[[], Any]] = {}
    for runtime, precision in runtimes:
        named = runtime if precision == "float32" else f"{runtime} {precision}"
        for form, network in networks.items():
            side = sides[form]
            x = np.random.default_rng(0).standard_normal((batch, 3, side, side), dtype=np.float32)
            try:
                wanted = {} if precision == "float32" else {"precision": precision}
                predict = OPENERS[runtime](network, form, side, classes, threads, **wanted)
                one_by_one = form == "dynamic" and runtime != "native" and batch > 1
                call = _caller(predict, x, one_by_one)
                for _ in range(WARM_UP):
                    call()
                calls[form, runtime, precision] = call
            except AfdsError as error:
                result.skipped.setdefault(
                    f"{form} in {named}" if "not built" not in str(error) else runtime, str(error)
                )
            except Exception as error:  # a runtime that cannot run this network
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                result.skipped.setdefault(f"{form} in {named}", reason[:200])
    seconds: dict[tuple[str, str, str], list[float]] = {key: [] for key in calls}
    for _ in range(rounds):
        for key, call in calls.items():
            if threads > 1:
                rest()
            call()  # after a rest, or another network, the first is slower
            for _ in range(TURN):
                begun = time.perf_counter()
                call()
                seconds[key].append(time.perf_counter() - begun)
    rows = [_row(*key, threads, batch, times, ratios[key[0]]) for key, times in seconds.items()]
    for row in rows:
        dense = [other.median_ms for other in rows if other.form == "dense" and other.precision == row.precision]
        row.speedup = min(dense) / row.median_ms if dense else 0.0
        row.share = row.speedup / row.macs_ratio if row.form != "dense" and dense else None
    return rows


def rest() -> None:
    """Until no thread of this process spins any more, half a second at most.

    Why: the threads of ONNX Runtime go on spinning for 35 ms after a call, on cores that the next row is to have; rows
    of other runtimes took three times as long behind them.
    """
    for _ in range(100):
        begun = time.process_time()
        time.sleep(0.005)
        if time.process_time() - begun < 0.001:
            return


def _caller(predict: Predictor, x: np.ndarray, one_by_one: bool) -> Callable[[], Any]:
    if not one_by_one:
        return lambda: predict(x)
    images = [x[i : i + 1] for i in range(len(x))]
    return lambda: [predict(image) for image in images]


def _row(form: str, runtime: str, precision: str, threads: int, batch: int, times: list[float], ratio: float) -> Row:
    ms = sorted(1e3 * t for t in times)

    def at(share: float) -> float:
        return float(np.quantile(ms, share))

    return Row(form, runtime, threads, batch, statistics.median(ms), at(0.25), at(0.75), at(0.9), len(ms), ratio,
               precision=precision)  # fmt: skip


def _profile(network: nn.Module, side: int, result: Measurement) -> list[dict[str, Any]]:
    """Time by layer in the native runtime, one thread, one image."""
    try:
        executor: Any = OPENERS["native"](network, "dynamic", side, 0, 1)
    except AfdsError as error:
        result.skipped["profile"] = str(error)
        return []
    x = np.random.default_rng(0).standard_normal((1, 3, side, side), dtype=np.float32)
    return [asdict(layer) for layer in executor.profile(x)]


# --- What it means


def runtime_of(row: Row) -> str:
    """The runtime of a row, with its precision where that is not float32."""
    return row.runtime if row.precision == "float32" else f"{row.runtime} {row.precision}"


def verdict(rows: Sequence[Row], own: str = "dynamic") -> list[str]:
    """One sentence for each setting, the bad news included: the fastest dense row of any precision beside the best.

    own: the form that is the run's own network.
    """
    said = []
    for threads, batch in dict.fromkeys((row.threads, row.batch) for row in rows):
        here = [row for row in rows if (row.threads, row.batch) == (threads, batch)]
        dense = min((r for r in here if r.form == "dense"), key=lambda r: r.median_ms, default=None)
        run = [r for r in here if r.form == own]  # a frozen network is another one, with an accuracy of its own
        best = min(run or [r for r in here if r.form != "dense"], key=lambda r: r.median_ms, default=None)
        if dense is None or best is None:
            continue
        setting = f"{threads} thread{'s' if threads > 1 else ''}, batch {batch}"
        fastest = f"dense in {runtime_of(dense)} takes {dense.median_ms:.1f} ms"
        ours = f"{best.form} in {runtime_of(best)} {best.median_ms:.1f} ms"
        speedup = dense.median_ms / best.median_ms
        if speedup < WORTH_IT:
            said.append(f"{setting}: not worth it, {fastest}, {ours}.")
        else:
            said.append(f"{setting}: {speedup:.2f}x faster ({fastest}, {ours}) with {best.macs_ratio:.2f}x fewer "
                        "MACs.")  # fmt: skip
    return said


def _hardware() -> dict[str, Any]:
    found = stamp("cpu", "32-true")
    for name in ("onnxruntime", "openvino"):
        if importlib.util.find_spec(name) is not None:
            found["versions"][name] = metadata.version(name)
    return found


def _accuracy(run: Run) -> float | None:
    """Validation accuracy in the run's record."""
    from afds.record import Record

    finals = Record(run.path, enabled=False).lines("final")
    value = finals[-1].get("val", {}).get("top1") if finals else None
    return float(value) if isinstance(value, int | float) else None
