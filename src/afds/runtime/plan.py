"""The plan of a network: plain data that an executor can follow without PyTorch.

::

    network --lower--> ops over values --layout--> values in buffers = Plan --> JSON + safetensors --> Executor

An op is a dict of numbers, texts and names of tensors; a value is one feature map; a buffer is memory for planes of
one layout, used again as soon as its value is dead. ``kernels/engine.h`` says what a layout is.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from afds.errors import ConfigError, RunFolderError
from afds.files import write_atomic

FORMAT = 6
PRECISIONS = ("float32", "bf16")
ACTS = ("none", "relu", "relu6", "silu", "hardswish", "sigmoid", "hardsigmoid")  # as in kernels/table.h
TENSORS = {  # fields of an op that name a tensor
    "conv": ("weight", "halves", "factor", "bias", "beta", "predictor_weight", "predictor_bias", "predictor_reduce",
             "predictor_scale", "constant", "importance", "sign"),
    "se": ("weight1", "bias1", "weight2", "bias2"),
    "linear": ("weight", "bias"),
}  # fmt: skip


@dataclass
class Plan:
    """What to compute, in order, and where it lies in memory."""

    channels: int
    height: int
    width: int
    classes: int
    input: int
    """The value that holds the image."""
    precision: str = "float32"
    """Of the convolutions' products: float32, or bf16 with sums in float32."""
    buffers: list[dict[str, int]] = field(default_factory=list)
    values: list[dict[str, Any]] = field(default_factory=list)
    ops: list[dict[str, Any]] = field(default_factory=list)
    tensors: dict[str, np.ndarray] = field(default_factory=dict)
    """float32, or the bits of bf16 as uint16; by the names that the ops use."""

    def save(self, folder: Path | str) -> None:
        """`plan.json` and `plan.safetensors` in ``folder``, each whole or not at all; the first knows the second.

        Raises:
            RunFolderError: the folder cannot be written to.
            ConfigError: weights are missing, as in the plan that an executor keeps.
        """
        wanted = {op[key] for op in self.ops for key in TENSORS.get(op["kind"], ()) if key in op}
        if missing := sorted(wanted - set(self.tensors)):
            raise ConfigError(f"This plan has no {missing[0]}: an executor keeps its plan without the weights. Save "
                              "the one that `make_plan` gives.")  # fmt: skip
        folder = Path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunFolderError(f"{folder}: cannot be made ({error.strerror}); name another folder.") from error
        tensors = save(self.tensors)
        head = {k: v for k, v in vars(self).items() if k != "tensors"}
        head |= {"format": FORMAT, "tensors_sha256": hashlib.sha256(tensors).hexdigest()}
        write_atomic(folder / "plan.safetensors", tensors)
        write_atomic(folder / "plan.json", json.dumps(head))

    @classmethod
    def load(cls, folder: Path | str) -> Plan:
        """The plan that `save` wrote.

        Raises:
            RunFolderError: a file that is missing or damaged; what the engine cannot follow it refuses by itself.
        """
        folder = Path(folder)
        try:
            data = json.loads((folder / "plan.json").read_text())
            if data.pop("format") != FORMAT:
                raise RunFolderError(f"{folder / 'plan.json'}: of another version; make the plan again.")
            tensors = (folder / "plan.safetensors").read_bytes()
            if data.pop("tensors_sha256") != hashlib.sha256(tensors).hexdigest():
                raise RunFolderError(f"{folder}: plan.safetensors is damaged, or of another plan than plan.json; make "
                                     "the plan again.")  # fmt: skip
            return cls(**data, tensors=load(tensors))
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, SafetensorError) as error:
            raise RunFolderError(f"{folder}: no plan that can be read ({error}).") from error
