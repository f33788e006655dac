"""What the files of a run folder say, read with suspicion: any of it may be missing, damaged or hostile."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from afds.errors import RunFolderError
from afds.files import read_bytes, read_json

MAX_METRICS_BYTES = 256 * 2**20  # a line has 0.3 kB; a day of training writes some ten thousand


@dataclass(frozen=True)
class Layer:
    """One layer of the table: its cost, and what is kept where it selects."""

    name: str
    cost: dict[str, float]
    """What is known of `dense conv predictor scaling active_in active_out channels_in channels_out`."""
    unit: dict[str, Any]

    @property
    def counted(self) -> float:
        """MACs per image, the predictor's included."""
        return sum(self.cost.get(part, 0.0) for part in ("conv", "predictor", "scaling"))


@dataclass(frozen=True)
class Facts:
    """The files as plain data, empty where they are missing."""

    name: str
    config: dict[str, Any]
    structure: dict[str, Any]
    labels: list[str]
    lines: list[dict[str, Any]]
    measured: dict[str, Any] = field(default_factory=dict)
    """measure.json, as `afds measure` wrote it."""
    winners: dict[str, Any] = field(default_factory=dict)
    """winners.json, as `afds inspect` wrote it."""
    base: Facts | None = None
    """The dense fine-tuning on the same photos that this run began with."""

    @property
    def empty(self) -> bool:
        return not (self.config or self.structure or self.lines)

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        """The metrics' lines of one kind, in order."""
        return [line for line in self.lines if line.get("kind") == kind]

    @property
    def final(self) -> dict[str, Any]:
        """The line that ends a run; empty where it has not ended."""
        return next(reversed(self.of_kind("final")), {})

    @property
    def options(self) -> dict[str, Any]:
        return sub(self.config, "config")

    @property
    def layers(self) -> list[Layer]:
        units, costs = sub(self.structure, "units"), sub(sub(self.structure, "cost"), "layers")
        names = list(costs) or list(units)
        return [Layer(name, dict(_numbers(sub(costs, name))), sub(units, name)) for name in names]

    @property
    def settled(self) -> bool:
        """Whether all channels that are left win on every image: nothing is chosen any more, only scaled."""
        pairs = [(number(u.get("k")), number(u.get("channels"))) for u in self._gates()]
        return bool(pairs) and all(k is not None and k == channels for k, channels in pairs)

    def cut_away(self) -> float:
        """Channels of the dense network that are gone, over all units that choose."""
        return sum(
            max(0.0, layer.cost.get("channels_out", 0.0) - (number(layer.unit.get("channels")) or math.inf))
            for layer in self.layers
            if "k" in layer.unit
        )

    def _gates(self) -> list[dict[str, Any]]:
        units = sub(self.structure, "units")
        return [unit for name in units if "k" in (unit := sub(units, name))]

    @property
    def sides(self) -> tuple[float, float] | None:
        """Sides, in pixels, of the images that the network and its dense one look at, where they differ."""
        resolved = sub(self.config, "resolved")
        own, dense = number(resolved.get("input_size")), number(resolved.get("taught_at"))
        return (own, dense) if own is not None and dense is not None and own != dense else None

    @property
    def began_as(self) -> str:
        """What this run began with, in a word or two: `dense`, or at how much of its cost."""
        ratio = self.base.total("ratio") if self.base is not None else None
        return "dense" if ratio is None or ratio < 1.01 else f"{ratio:.2f}x"

    def total(self, key: str) -> float | None:
        """`dense_macs`, `counted_macs` or `ratio`, of the final line or of the structure."""
        value = number(self.final.get(key))
        return value if value is not None else number(sub(self.structure, "cost").get(key))


def read_facts(run: Path) -> Facts:
    """All that is readable in the folder `run`, and in its dense base: the run `base` in it, or its source."""
    facts = _read(run)
    source = facts.options.get("source")
    places = [run / "base", *([Path(source)] if isinstance(source, str) and source else [])]
    base = next((_read(place) for place in places if (place / "metrics.jsonl").is_file()), None)
    mark = sub(facts.config, "data").get("fingerprint")
    alike = base is not None and isinstance(mark, str) and sub(base.config, "data").get("fingerprint") == mark
    return replace(facts, base=base) if alike and base is not None and base.final else facts


def _read(run: Path) -> Facts:
    labels = _json(run / "labels.json")
    config, structure = _json(run / "config.json"), _json(run / "structure.json")
    measured, winners = _json(run / "measure.json"), _json(run / "winners.json")
    return Facts(
        name=run.resolve().name,
        config=config if isinstance(config, dict) else {},
        structure=structure if isinstance(structure, dict) else {},
        labels=[str(name) for name in labels] if isinstance(labels, list) else [],
        lines=list(_lines(run / "metrics.jsonl")),
        measured=measured if isinstance(measured, dict) else {},
        winners=winners if isinstance(winners, dict) else {},
    )


def number(value: Any) -> float | None:
    """A finite number, or None for anything else that a file may hold."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # a whole number beyond any float
        return None


def sub(value: dict[str, Any], key: str) -> dict[str, Any]:
    """The object under `key`; an empty one where there is none."""
    found = value.get(key)
    return found if isinstance(found, dict) else {}


def _numbers(values: dict[str, Any]) -> Iterator[tuple[str, float]]:
    for key, value in values.items():
        found = number(value)
        if found is not None:
            yield key, found


def _json(path: Path) -> Any:
    try:
        return read_json(path)
    except RunFolderError:
        return None


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The readable lines; the last one of a killed run may be cut short."""
    try:
        text = read_bytes(path, MAX_METRICS_BYTES).decode(errors="replace")
    except RunFolderError:
        return
    for line in text.splitlines():
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            yield value
