"""The native runtime: a network's plan as data, and kernels that compute the selected channels only.

import afds.runtime

executor = afds.runtime.compile(afds.load("run"), threads=2)
logits = executor(x_BCHW)              # float32 arrays in and out
executor.counted_macs(x_BCHW)          # what was executed, per image
executor.profile(x_BCHW)               # where the time goes, by layer

docs/runtime.md says how it works and how fast it is.
"""

from __future__ import annotations

from afds.runtime.compile import compile, make_plan
from afds.runtime.errors import RuntimeMissingError, UnsupportedError
from afds.runtime.executor import BUILD_ADVICE, Executor, LayerTime, is_built, usable_isas
from afds.runtime.meter import ExecutedMacs
from afds.runtime.plan import Plan

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
