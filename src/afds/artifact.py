"""The artifact: a network with its classes and its preprocessing, in a folder without pickles.

::

    RUN/model.safetensors   all weights, masks and running statistics
        labels.json         class names, by position of the logit
        preprocess.json     from a photo to the network's input
        structure.json      which network this is, and per layer what is kept: written last, so that a folder
                            that was cut short is never taken for whole; it holds the weights' SHA-256

A folder may come from a stranger: whatever is wrong with it gives a RunFolderError that names the file.
Loading builds one of timm's networks by name, fills it and executes nothing from the folder.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn

from afds import compaction
from afds.architecture import build_network, check_architecture
from afds.compression.widths import narrow, widths
from afds.config import from_json, to_json
from afds.data.preprocess import Preprocess
from afds.errors import AfdsError, RunFolderError
from afds.files import read_bytes, read_json, write_atomic, write_json
from afds.graph import is_channels_last
from afds.selection import FollowingGate, Gate, SelectionConfig, gates, select, selective_units, set_density

FORMAT = 1
FORMAT_COMPACT = 2  # with `compact`: the widths that are left; a reader of format 1 could not build it
WEIGHTS = "model.safetensors"
STRUCTURE = "structure.json"
LABELS = "labels.json"
PREPROCESS = "preprocess.json"
MAX_WEIGHTS_BYTES = 8 * 2**30
MAX_LABEL_LENGTH = 1000  # characters
_DTYPES = (torch.float32, torch.bool, torch.int64)  # weights, masks, batch norm's counters


@dataclass(frozen=True)
class Run:
    """A run folder, read and checked."""

    path: Path
    model: nn.Module
    """In eval mode, on the CPU; plain, or with selection at its saved densities."""
    arch: str
    """timm's name of the network."""
    arch_args: dict[str, Any]
    labels: tuple[str, ...]
    preprocess: Preprocess
    selection: SelectionConfig | None
    """None for a plain network."""
    structure: dict[str, Any]
    """structure.json. `units` has been checked against the network, `cost` is taken as it stands."""
    config: dict[str, Any] | None
    """config.json, unchecked; None where there is none."""


def save_run(
    out: Path | str,
    *,
    model: nn.Module,
    arch: str,
    arch_args: dict[str, Any],
    num_classes: int,
    selection: SelectionConfig | None,
    labels: list[str] | tuple[str, ...],
    preprocess: Preprocess,
    summary: dict[str, Any],
) -> None:
    """Write `model` and what belongs to it into the folder `out`, which is made where it is missing.

    model: what `timm.create_model(arch, num_classes=..., **arch_args)` builds, plain or with selection, as it is or
        after `compact`.
    selection: what `select` was called with; None for a plain network.
    summary: what it costs; plain JSON values, for the report.
    Raises RunFolderError where the folder cannot be written, or would not load again.
    """
    out = Path(out)
    arch_args = to_plain(arch_args)
    try:
        check_architecture(arch, arch_args, num_classes)
    except AfdsError as error:
        raise RunFolderError(f"{out}: this network could not be loaded again: {error}") from error
    units = describe_units(model)
    cut = _widths_if_cut(model, arch, arch_args, num_classes) if not units else None
    if bool(units) != (selection is not None):
        raise RunFolderError(
            f"{out}: a network {'with' if units else 'without'} selection was given "
            f"{'without' if units else 'with'} its selection options."
        )
    labels = check_labels(list(labels), num_classes, str(out))
    weights = _pack(model, out)
    compact = describe_compaction(model) if units else {}  # a plain network tells all its widths
    structure = {
        "format": FORMAT_COMPACT if compact else FORMAT,
        "arch": arch,
        "arch_args": arch_args,
        "num_classes": num_classes,
        "memory_format": "channels_last" if is_channels_last(model) else "contiguous",
        "selection": None if selection is None else to_json(selection),
        "widths": cut,
        "weights": {"file": WEIGHTS, "sha256": hashlib.sha256(weights).hexdigest(), "bytes": len(weights)},
        "units": units,
        **({"compact": compact} if compact else {}),
        "cost": summary,
    }
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / WEIGHTS, weights)
    write_json(out / LABELS, list(labels))
    write_json(out / PREPROCESS, preprocess.to_dict())
    write_json(out / STRUCTURE, structure)


def load_run(path: Path | str) -> Run:
    """Read a run folder. The network predicts bit for bit what it predicted when it was saved.

    Raises RunFolderError naming the file, for anything missing, damaged, changed or hostile.
    """
    path = Path(path).expanduser()
    if not path.is_dir():
        raise RunFolderError(
            f"{path}: {'not a folder' if path.exists() else 'no such folder'}. "
            "Give the folder that `afds fit --out` wrote."
        )
    structure = _read_structure(path / STRUCTURE)
    weights = read_bytes(path / WEIGHTS, MAX_WEIGHTS_BYTES)
    if hashlib.sha256(weights).hexdigest() != structure["weights"]["sha256"]:
        raise RunFolderError(
            f"{path / WEIGHTS}: not the file that {STRUCTURE} was written for (SHA-256 differs). "
            "It was cut short or changed: copy the folder again."
        )
    labels = check_labels(read_json(path / LABELS), structure["num_classes"], str(path / LABELS))
    try:
        preprocess = Preprocess.from_dict(read_json(path / PREPROCESS))
    except RunFolderError:
        raise
    except AfdsError as error:
        raise RunFolderError(f"{path / PREPROCESS}: {error}") from error
    try:
        selection = None
        if structure["selection"] is not None:
            selection = from_json(SelectionConfig, structure["selection"], "selection")
        model = _rebuild(structure, selection, weights)
        if structure.get("widths") is not None:
            _try_once(model, preprocess.input_size)
    except AfdsError as error:
        raise RunFolderError(f"{path}: {error}") from error
    config = read_json(path / "config.json") if (path / "config.json").exists() else None
    return Run(
        path,
        model,
        structure["arch"],
        structure["arch_args"],
        labels,
        preprocess,
        selection,
        structure,
        config if isinstance(config, dict) else None,
    )


def is_run(path: Path | str) -> bool:
    """Whether `path` looks like a finished run folder; only `load_run` tells whether it is sound."""
    return (Path(path) / STRUCTURE).is_file()


def describe_units(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Per selective unit, by its path: density, k, widths, and how many channels are dynamic, static, pruned.

    A depthwise unit chooses nothing; it names the units that it `follows`. Empty for a plain network.
    """
    units: dict[str, dict[str, Any]] = {}
    names: dict[int, str] = {}
    for name, unit in selective_units(model):
        gate, channels = unit.gate, unit.conv.out_channels
        names[id(gate)] = name
        units[name] = {"channels": channels, "in_channels": unit.conv.in_channels}
        if isinstance(gate, Gate):
            kept, dynamic = gate.kept, gate.dynamic & gate.kept
            units[name] |= {
                "density": gate.density,
                "k": gate.k,
                "dynamic": int(dynamic.sum()),
                "static": int((kept & ~dynamic).sum()),
                "pruned": channels - int(kept.sum()),
            }
        elif isinstance(gate, FollowingGate):
            units[name]["follows"] = [names[id(leader)] for leader in gate.leaders]
    return units


def describe_compaction(model: nn.Module) -> dict[str, dict[str, int]]:
    """Channels left of each convolution, rows and rank of each predictor; empty where nothing was cut."""
    left = {"widths": compaction.widths(model), "predictors": {
        name: gate.predictor.out_channels for name, gate in gates(model).items() if gate.predicted is not None
    }}  # fmt: skip
    ranks = {name: unit.gate.predictor.rank for name, unit in selective_units(model) if isinstance(unit.gate, Gate)
             and unit.gate.predictor.rank != unit.gate.predictor.first_rank}  # fmt: skip
    if ranks:
        left["ranks"] = ranks
    return left if any(left.values()) else {}


def check_labels(labels: Any, num_classes: int, where: str) -> tuple[str, ...]:
    """Class names from a file. Raises RunFolderError naming `where`: not `num_classes` distinct names."""
    if not isinstance(labels, list) or not all(isinstance(name, str) for name in labels):
        raise RunFolderError(f"{where}: the class names should be a list of texts.")
    if len(labels) != num_classes:
        raise RunFolderError(f"{where}: {len(labels)} class names for a network with {num_classes} classes.")
    surrogates = any("\ud800" <= letter <= "\udfff" for name in labels for letter in name)  # of no text
    if surrogates or len(set(labels)) != len(labels) or any(not 0 < len(name) <= MAX_LABEL_LENGTH for name in labels):
        raise RunFolderError(f"{where}: a class name is empty, too long, no text, or there twice.")
    return tuple(labels)


def to_plain(value: Any) -> Any:
    """Tuples as lists, as JSON gives them back."""
    if isinstance(value, dict):
        return {key: to_plain(v) for key, v in value.items()}
    return [to_plain(v) for v in value] if isinstance(value, list | tuple) else value


def _pack(model: nn.Module, out: Path) -> bytes:
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES:
            raise RunFolderError(f"{out}: {name} is {tensor.dtype}; only float32 networks are saved.")
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise RunFolderError(f"{out}: {name} holds NaN or infinity. The training diverged.")
    return save_safetensors(tensors)


def _read_structure(path: Path) -> dict[str, Any]:
    """structure.json with every key there and of its kind."""
    structure = read_json(path)
    if not isinstance(structure, dict):
        raise RunFolderError(f"{path}: should hold an object.")
    if structure.get("format") not in (FORMAT, FORMAT_COMPACT) or type(structure.get("format")) is not int:
        raise RunFolderError(
            f"{path}: format {str(structure.get('format'))[:40]!r} is not known to this afds, "
            f"which reads {FORMAT} and {FORMAT_COMPACT}. Install the afds that wrote the run."
        )
    kinds: dict[str, type | tuple[type, ...]] = {
        "arch": str,
        "arch_args": dict,
        "num_classes": int,
        "memory_format": str,
        "selection": (dict, type(None)),
        "weights": dict,
        "units": dict,
        "cost": dict,
    }
    if structure["format"] == FORMAT_COMPACT:
        kinds["compact"] = dict
    for name, kind in kinds.items():
        if name not in structure or not isinstance(structure[name], kind):
            raise RunFolderError(f"{path}: {name} is missing or of the wrong kind.")
    if not isinstance(structure["weights"].get("sha256"), str):
        raise RunFolderError(f"{path}: weights.sha256 is missing or of the wrong kind.")
    try:
        check_architecture(structure["arch"], structure["arch_args"], structure["num_classes"])
    except AfdsError as error:
        raise RunFolderError(f"{path}: {error}") from error
    if structure["memory_format"] not in ("contiguous", "channels_last"):
        raise RunFolderError(f"{path}: memory_format {structure['memory_format'][:40]!r} is not known.")
    return structure


def _rebuild(structure: dict[str, Any], selection: SelectionConfig | None, weights: bytes) -> nn.Module:
    model = build_network(structure["arch"], structure["arch_args"], structure["num_classes"])
    left = structure["compact"] if structure["format"] == FORMAT_COMPACT else {}
    compaction.narrow(model, _numbers(left, "widths"))
    # Every weight of the plain network is in the file. Checked before select(), which copies: an architecture
    # of absurd widths costs no memory until its weights are touched.
    size = sum(p.numel() * p.element_size() for p in model.parameters() if p.dim() == 4)
    if size > len(weights) and structure.get("widths") is None:
        raise RunFolderError(f"{WEIGHTS}: too small for {structure['arch']} as {STRUCTURE} describes it.")
    if structure.get("widths") is not None:
        if selection is not None:
            raise RunFolderError(f"{STRUCTURE}: widths of a network with selection; it has one or the other.")
        narrow(model, structure["widths"])
    if selection is not None:
        model = select(model, selection).eval()
        _resize_predictors(model, left)
        set_density(model, _densities(structure["units"]))
    if structure["memory_format"] == "channels_last":
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model.load_state_dict(_unpack(weights, model.state_dict()), strict=True)
    if describe_units(model) != structure["units"]:
        raise RunFolderError(f"{STRUCTURE}: its units do not describe the network in {WEIGHTS}.")
    for name, gate in gates(model).items():
        if gate.predicted is not None and (
            int(gate.predicted.sum()) != gate.predictor.out_channels or bool((gate.dynamic & ~gate.predicted).any())
        ):
            raise RunFolderError(f"{WEIGHTS}: the masks of {name} do not go with the rows of its predictor.")
    return model


def _numbers(left: dict[str, Any], key: str) -> dict[str, Any]:
    found = left.get(key, {})
    if not isinstance(found, dict):
        raise RunFolderError(f"{STRUCTURE}: compact.{key} should be an object.")
    return found


def _resize_predictors(model: nn.Module, left: dict[str, Any]) -> None:
    chosen = gates(model)
    for key, what, least in (("ranks", "rank", 1), ("predictors", "rows", 0)):
        for name, count in _numbers(left, key).items():
            if name not in chosen:
                raise RunFolderError(f"{STRUCTURE}: compact.{key}: there is no predictor {name[:80]!r}.")
            gate = chosen[name]
            most = gate.predictor.rank if key == "ranks" else gate.predictor.out_channels
            if type(count) is not int or not least <= count <= most:
                wanted = f"a whole number from {least} to {most}" if most >= least else "left out: it is not low-rank"
                raise RunFolderError(
                    f"{STRUCTURE}: {what} of the predictor {name[:80]!r}: {str(count)[:40]}, which should be {wanted}."
                )
            (gate.resize_rank if key == "ranks" else gate.resize_rows)(count)


def _widths_if_cut(model: nn.Module, arch: str, arch_args: dict[str, Any], num_classes: int) -> dict[str, Any] | None:
    """Channels of every layer of a network that has lost some; None for a whole one."""
    found = widths(model)
    return found if found != widths(build_network(arch, arch_args, num_classes)) else None


def _try_once(model: nn.Module, side: int) -> None:
    """Widths from a file may not fit each other: better an error now than at the first photo."""
    try:
        with torch.inference_mode():
            model(torch.zeros(1, 3, side, side))
    except RuntimeError as error:
        raise RunFolderError(
            f"{STRUCTURE}: its widths do not fit together ({str(error).splitlines()[0][:120]})."
        ) from error


def _densities(units: dict[str, Any]) -> dict[str, float]:
    found = {}
    for name, unit in units.items():
        if not isinstance(unit, dict):
            raise RunFolderError(f"{STRUCTURE}: unit {name[:80]!r} should be an object.")
        if "follows" in unit:
            continue
        density: Any = unit.get("density")
        if type(density) not in (int, float) or not 0 < density <= 1:
            raise RunFolderError(
                f"{STRUCTURE}: density of {name[:80]!r} is {str(density)[:40]}, which should lie in (0, 1]."
            )
        found[name] = float(density)
    return found


def _unpack(weights: bytes, wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the file, each checked against the network's own."""
    try:
        tensors = load_safetensors(weights)
    except Exception as error:  # SafetensorError, and what torch makes of odd headers
        raise RunFolderError(f"{WEIGHTS}: not readable as safetensors ({error}).") from error
    lacking, unknown = set(wanted) - set(tensors), set(tensors) - set(wanted)
    for names, what in ((lacking, "lacks"), (unknown, "has an unknown")):
        if names:
            raise RunFolderError(f"{WEIGHTS}: {what} tensor {min(names)[:120]!r} ({len(names)} in all).")
    for name, tensor in tensors.items():
        if tensor.shape != wanted[name].shape or tensor.dtype != wanted[name].dtype:
            raise RunFolderError(
                f"{WEIGHTS}: {name} is {tuple(tensor.shape)} {tensor.dtype}, the network needs "
                f"{tuple(wanted[name].shape)} {wanted[name].dtype}."
            )
        if tensor.is_floating_point() and not _is_finite(tensor):
            raise RunFolderError(f"{WEIGHTS}: {name} holds NaN or infinity.")
    return tensors


def _is_finite(tensor: Tensor) -> bool:
    """A sum that is finite has no NaN and no infinity in it, and takes a tenth of the time of a look at each."""
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())
