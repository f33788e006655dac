"""`afds inspect`: which channels of a run win on photos, kept as RUN/winners.json and drawn in its report."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from afds.artifact import Run, load_run
from afds.cost import has_selection
from afds.data import Item
from afds.errors import AfdsWarning, ConfigError, DataError
from afds.evaluation import eval_batches, first_split, spaced
from afds.report import keep_figures
from afds.winners import LayerWinners, measure_winners

NAME = "winners.json"
IMAGES = 512
MAX_IMAGES = 10_000  # winners of ResNet-101 on so many take half a GB, and each is compared with each


@dataclass(frozen=True)
class Inspection:
    """Winners of a run over images."""

    images: int
    classes: int
    split: str
    data: str
    layers: dict[str, LayerWinners]
    weights_sha256: str = ""
    """Of the weights that were watched: a run that is trained anew is another one."""
    when: str = ""

    @property
    def choosing(self) -> list[LayerWinners]:
        """The layers that leave out channels; the others would make any mean look static."""
        return [layer for layer in self.layers.values() if layer.k < layer.channels - layer.pruned]

    def mean(self, name: str) -> float | None:
        """A figure of the layers that choose, each counted by its channels; None where none of them has it."""
        found = [(value, layer.channels) for layer in self.choosing if (value := getattr(layer, name)) is not None]
        return sum(v * c for v, c in found) / sum(c for _, c in found) if found else None

    def to_dict(self) -> dict[str, Any]:
        """Plain data: the layers, and the means over them."""
        names = [f.name for f in fields(LayerWinners) if f.name not in ("k", "channels", "pruned", "dead", "constant")]
        return {
            "images": self.images, "classes": self.classes, "split": self.split, "data": self.data,
            "choosing": len(self.choosing), "mean": {name: self.mean(name) for name in names},
            "layers": {name: asdict(layer) for name, layer in self.layers.items()},
        }  # fmt: skip


def inspect_run(
    run_path: Path | str,
    *,
    data: Path | None = None,
    images: int = IMAGES,
    save: bool = True,
    say: Callable[[str], None] = lambda line: None,
) -> Inspection:
    """Measure the winners of a run, write RUN/winners.json and draw RUN/report.html again.

    Args:
        data: photos in class folders; by default those that the run was fitted on, where they still are. Images that
            the run held out for validation are taken where it held some out, else training images, else all.
        images: at most so many, evenly spaced over the classes.
        save: into the run folder, with a warning where that cannot be written to; else `save_inspection` does it.
    Raises:
        ConfigError: the run selects nothing. DataError: no photos, or fewer than two. RunFolderError: of the run.
    """
    if not 2 <= images <= MAX_IMAGES:
        raise ConfigError(f"--images must be from 2 to {MAX_IMAGES:,}, got {images}.")
    run = load_run(run_path)
    if not has_selection(run.model):
        raise ConfigError(
            f"{run.path} carries no selection: it computes all channels that it has for every image, so there are no "
            "winners to inspect. Give a run of afds, afds-paper or fbs with a budget, from afds fit --budget 5x."
        )
    place, split, items = _photos(run, data)
    items = spaced(items, images)
    say(f"Watching the winners on {len(items)} {'' if split == 'all' else split + ' '}images")
    layers = measure_winners(run.model, eval_batches(run, items))
    found = Inspection(len(items), len({item.label for item in items}), split, str(place), layers,
                       run.structure["weights"]["sha256"], datetime.now(UTC).isoformat(timespec="seconds"))  # fmt: skip
    if save and not save_inspection(run.path, found):
        warnings.warn(f"{run.path} cannot be written to: not saved in it.", AfdsWarning, stacklevel=2)
    return found


def save_inspection(run_path: Path | str, found: Inspection) -> bool:
    """RUN/winners.json, as `keep_figures`."""
    return keep_figures(run_path, NAME,
                        {"weights_sha256": found.weights_sha256, "when": found.when, **found.to_dict()})  # fmt: skip


def _photos(run: Run, data: Path | None) -> tuple[Path, str, tuple[Item, ...]]:
    """(folder, split, images)"""
    config = run.config.get("config") if run.config else None
    kept = config.get("data") if isinstance(config, dict) else None
    if data is None and isinstance(kept, str) and Path(kept).is_dir():
        place = Path(kept)
    elif data is None:
        gone = f"the photos it was fitted on ({kept}) are not there any more" if isinstance(kept, str) else (
            "it does not say which photos it was fitted on")  # fmt: skip
        raise DataError(f"{run.path}: {gone}. Name a folder of class folders with --data.")
    else:
        place = data
    split, items = first_split(run, place, ("val", "train", "all"))
    return place, split, items
