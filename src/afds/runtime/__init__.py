"""The native runtime: a network's plan as data, and kernels that compute the selected channels only.

import afds.runtime

executor = afds.runtime.compile(afds.load("run"), threads=2)
logits = executor(x_BCHW)              # float32 arrays in and out
executor.counted_macs(x_BCHW)          # what was executed, per image
executor.profile(x_BCHW)               # where the time goes, by layer

docs/runtime.md says how it works and how fast it is.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from afds.runtime.errors import RuntimeMissingError, UnsupportedError
from afds.runtime.executor import BUILD_ADVICE, Executor, LayerTime, is_built, usable_isas
from afds.runtime.plan import Plan

if TYPE_CHECKING:
    from afds.runtime.compiler import compile, make_plan
    from afds.runtime.meter import ExecutedMacs

__all__ = [
    "BUILD_ADVICE",
    "ExecutedMacs",
    "Executor",
    "LayerTime",
    "Plan",
    "RuntimeMissingError",
    "UnsupportedError",
    "compile",
    "is_built",
    "make_plan",
    "usable_isas",
]

# What is made of a network needs PyTorch; a plan and its executor do without, and without the time it takes to import.
_HOMES = {"compile": "compiler", "make_plan": "compiler", "ExecutedMacs": "meter"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'afds.runtime' has no attribute {name!r}")
    value = getattr(import_module(f"afds.runtime.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
