"""`afds export`: a run as a file for a runtime, checked before it is there.

::

    run --+-- dynamic: compact -------------------> weights gathered per image; one image at a time
          '-- static: freeze, compact, densify ---> a smaller plain network; any batch, any runtime
                      (where nothing depends on the image there is nothing to freeze: static, and the same function)
                                                         |
                    temporary file -> read back -> accuracy on validation images = the network's? -> renamed

Class names and preprocessing travel in the file: metadata_props (ONNX), rt_info (OpenVINO), `afds.json` (.pt2).
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from afds.artifact import Run, load_run
from afds.compaction import deployable, static
from afds.cost import CostMeter, has_selection, reference_macs
from afds.data import Item
from afds.errors import AfdsError, ExportError
from afds.evaluation import eval_batches, first_split, spaced
from afds.export.formats import READERS, SUFFIX, WRITERS, check_installed, files_of
from afds.files import no_file_at

FREEZE_IMAGES = 512  # training images on which winners are counted
CHECK_IMAGES = 1000  # validation images on which a file is compared, at most
TOLERANCE = 0.5  # points of accuracy
NOISE_IMAGES = 8  # without photos: random images on which logits are compared


@dataclass(frozen=True)
class Exported:
    """A file that was written and checked."""

    path: Path
    form: str
    """`dynamic`, `static` or `dense` (a run that selects nothing)."""
    images: int
    """On which it was checked; 0: no photos were there, random images were used."""
    split: str
    model: float | None
    """Accuracy of the run on them."""
    network: float | None
    """Of what was written, in PyTorch: another one than the run's only where the selection was frozen."""
    file: float | None
    """Of the file, in its runtime."""
    difference: float
    """Largest difference of a logit between file and network, as a share of the largest logit."""
    macs_ratio: float
    """Fewer MACs than dense, of what was written."""
    frozen: bool = False
    """Whether the selection was frozen, so that the file is another function than the run."""


def export_run(
    run_path: Path | str,
    kind: str,
    *,
    static_form: bool = False,
    out: Path | None = None,
    data: Path | None = None,
    tolerance: float = TOLERANCE,
    say: Callable[[str], None] = lambda line: None,
) -> Exported:
    """Write a run as ``kind`` (`onnx`, `openvino`, `torch`) and compare the file with the network.

    Args:
        static_form: freeze the selection to what the training images use most.
        out: by default a file in the run folder. An export that is there is replaced, only by one that passed.
        data: photos; by default those of the run, where they still are.
        tolerance: points of accuracy by which file and network may differ.
    Raises:
        ExportError: a package is missing, a layer cannot be written, there is no room for the file, or it does not
            compute what it should.
        RunFolderError, DataError: of the run, and of the photos where they were named.
    """
    check_installed(kind)
    run = load_run(run_path)
    out = _where(out, run, kind, static_form)
    selective = has_selection(run.model)
    network = deployable(run.model)
    form = "dense" if not selective else "dynamic" if has_selection(network) and not static_form else "static"
    freezes = form == "static" and has_selection(network)
    held_out, training = _photos(run, data, say, needs_training=freezes)
    if freezes:
        say(f"Counting winners on {len(training)} training images")
        network = static(run.model, (x_BCHW for x_BCHW, _ in eval_batches(run, training)))
    side, classes = run.preprocess.input_size, len(run.labels)
    probe = next(iter(eval_batches(run, held_out[1][:8])))[0] if held_out[1] else _noise(side)[0]
    ratio = CostMeter(network, reference_macs(run.structure)).mean([probe]).ratio
    facts = _facts(run, form, ratio)
    temporary = out.with_name(f".{secrets.token_hex(4)}.{out.name}")
    try:
        say(f"Writing {out.name}")
        try:
            WRITERS[kind](network.eval(), temporary, side, classes, facts, form == "dynamic")
        except (AfdsError, OSError):  # OSError: of the file, not of the network
            raise
        except Exception as error:  # exporters raise whatever they like
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ExportError(f"this network cannot be written as {kind} ({reason[:300]}).") from error
        checked = _check(run, network, temporary, kind, form, held_out, tolerance, ratio, out, freezes)
        for source, target in zip(files_of(temporary), files_of(out), strict=True):
            os.replace(source, target)
    except OSError as error:
        reason = error.strerror or str(error) or type(error).__name__
        raise ExportError(f"{out}: cannot be written ({reason}). Check its folder and the space.") from error
    finally:
        for file in files_of(temporary):
            with contextlib.suppress(OSError):
                file.unlink(missing_ok=True)
    return checked


def training_batches(run: Run, data: Path | None = None) -> Iterable[Tensor]:
    """Images (B, 3, H, W) to freeze a run's selection on: of ``data``, or of the photos that it was fitted on.

    Raises:
        ExportError: they are not there any more.
    """
    items = _photos(run, data, lambda line: None, needs_training=True)[1]
    return (x_BCHW for x_BCHW, _ in eval_batches(run, items))


def _where(out: Path | None, run: Run, kind: str, static_form: bool) -> Path:
    suffix = SUFFIX[kind]
    out = out or run.path / f"{'static' if static_form else 'model'}{suffix}"
    if out.suffix != suffix:
        raise ExportError(f"--out {out}: a file of --format {kind} ends in {suffix}.")
    if reason := no_file_at(out):
        raise ExportError(f"--out {out}{reason}")
    return out


def _photos(
    run: Run, data: Path | None, say: Callable[[str], None], *, needs_training: bool
) -> tuple[tuple[str, tuple[Item, ...]], tuple[Item, ...]]:
    """(split, images to compare on), and training images to freeze the selection on."""
    named = data is not None
    config = run.config.get("config", {}) if run.config else {}
    kept = config.get("data") if isinstance(config, dict) else None
    place = data or (Path(kept) if isinstance(kept, str) else None)
    held_out: tuple[str, tuple[Item, ...]] = ("", ())
    training: tuple[Item, ...] = ()
    if place is not None and (named or place.is_dir()):
        try:
            held_out = first_split(run, place, ("val", "auto"))
            training = spaced(first_split(run, place, ("train", "all"))[1], FREEZE_IMAGES) if needs_training else ()
        except AfdsError:
            if named:
                raise
    if not training and needs_training:
        raise ExportError(f"--static needs the photos that {run.path} was trained on, to see which channels they use: "
                          "name their folder with --data.")  # fmt: skip
    if not held_out[1]:
        say("No photos are there to compare the accuracy on (--data names some): logits of random images are compared.")
    return (held_out[0], spaced(held_out[1], CHECK_IMAGES)), training


def _noise(side: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(NOISE_IMAGES, 3, side, side, generator=generator)]


def _facts(run: Run, form: str, ratio: float) -> dict[str, Any]:
    """What travels in the file."""
    from afds import __version__

    return {
        "afds": __version__, "form": form, "arch": run.arch, "labels": list(run.labels),
        "preprocess": run.preprocess.to_dict(), "input": "float32 (batch, 3, height, width), RGB",
        "output": "logits", "macs_ratio": round(ratio, 4), "weights_sha256": run.structure["weights"]["sha256"],
    }  # fmt: skip


@torch.no_grad()
def _check(
    run: Run, network: nn.Module, file: Path, kind: str, form: str, held_out: tuple[str, tuple[Item, ...]],
    tolerance: float, ratio: float, out: Path, frozen: bool,
) -> Exported:  # fmt: skip
    """Read the file back and compare it with the network.

    Raises:
        ExportError: accuracies differ by more than ``tolerance`` points; without photos: logits by more than 1 %.
    """
    predict, (split, items) = READERS[kind](file), held_out
    model = run.model.eval()
    batches = eval_batches(run, items) if items else [(x_BCHW, None) for x_BCHW in _noise(run.preprocess.input_size)]
    right, images, differences, largest = np.zeros(3), 0, [], 0.0
    for x_BCHW, y_B in batches:
        ours = network(x_BCHW)
        theirs = _predict(predict, x_BCHW, one_by_one=form == "dynamic")
        images += len(x_BCHW)
        differences += (ours - theirs).abs().amax(1).tolist()
        largest = max(largest, float(ours.abs().max()))
        if y_B is not None:
            whole = model(x_BCHW) if frozen else ours
            right += [int((logits_BK.argmax(1) == y_B).sum()) for logits_BK in (whole, ours, theirs)]
    # Near ties between winners may fall the other way in another runtime: the median image must agree.
    typical = float(np.median(differences)) / max(largest, 1e-12)
    if not np.isfinite(typical) or typical > 0.01:
        raise ExportError(f"the {kind} file computes something else than the network: logits differ by "
                          f"{typical:.1%} on {images} images. Nothing was written; please report this.")  # fmt: skip
    shares = [float(r) / images for r in right]
    if items and abs(shares[2] - shares[1]) * 100 > tolerance:
        raise ExportError(f"accuracy of the {kind} file is {shares[2]:.2%} on {images} {split} images, that of the "
                          f"network {shares[1]:.2%}: more than --tolerance {tolerance:g} points apart. "
                          "Nothing was written.")  # fmt: skip
    known: list[float | None] = [*shares] if items else [None, None, None]
    return Exported(out, form, images if items else 0, split, known[0], known[1], known[2],
                    max(differences) / max(largest, 1e-12), ratio, frozen)  # fmt: skip


def _predict(predict: Callable[[np.ndarray], np.ndarray], x_BCHW: Tensor, *, one_by_one: bool) -> Tensor:
    x = np.ascontiguousarray(x_BCHW.numpy())
    if one_by_one:
        return torch.from_numpy(np.concatenate([predict(x[i : i + 1]) for i in range(len(x))]))
    return torch.from_numpy(predict(x))
