"""metrics.jsonl: one line of JSON for every ten steps, stage and epoch; TensorBoard beside it where asked."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from afds.errors import ConfigError, RunFolderError
from afds.files import go_on, write_atomic


class Record:
    """Appends to ``metrics.jsonl`` of a run folder. Only rank 0 writes."""

    def __init__(self, out: Path, *, enabled: bool = True, tensorboard: bool = False) -> None:
        self.path = out / "metrics.jsonl"
        self.enabled = enabled
        self._board: Any = None
        if enabled and tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise ConfigError("--tensorboard needs the package tensorboard: pip install tensorboard") from None
            self._board = SummaryWriter(str(out / "tensorboard"))

    def write(self, kind: str, **values: Any) -> None:
        """One line; numbers that are not finite become null, as JSON has no word for them."""
        if not self.enabled:
            return
        line = json.dumps({"kind": kind, **_finite(values)}, allow_nan=False) + "\n"
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(line)
        except OSError as error:
            raise RunFolderError(f"{self.path} cannot be written ({error.strerror}). {go_on(self.path)}") from error
        if self._board is not None and kind in ("step", "epoch"):
            at = values["step"] if kind == "step" else values["epoch"]
            for name, value in values.items():
                if isinstance(value, int | float) and name not in ("step", "epoch"):
                    self._board.add_scalar(f"{kind}/{name}", value, at)
                elif name == "entropy":
                    for unit, share in value.items():  # of log C: 1 is uniform
                        self._board.add_scalar(f"entropy/{unit}", share, at)
            self._board.flush()

    def lines(self, kind: str) -> list[dict[str, Any]]:
        """All lines of one kind so far."""
        return [line for line in read_lines(self.path) if line.get("kind") == kind] if self.path.exists() else []

    def rewind(self, epoch: int) -> None:
        """Drop the lines of epochs from ``epoch`` on, which a resumed run is about to write again."""
        if not self.enabled or not self.path.exists():
            return
        kept = [line for line in read_lines(self.path) if line.get("epoch", -1) < epoch]
        write_atomic(self.path, "".join(json.dumps(line) + "\n" for line in kept))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; one that was cut short by a kill is passed over."""
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict):
            lines.append(line)
    return lines


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return value
