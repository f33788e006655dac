"""Runs a plan on the native kernels: arrays in, arrays out, no PyTorch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from afds.errors import ConfigError
from afds.runtime.errors import RuntimeMissingError
from afds.runtime.plan import PRECISIONS, TENSORS, Plan

try:
    from afds.runtime import _kernels
except ImportError:  # built without a compiler
    _kernels = None  # type: ignore[assignment]

MOST_THREADS = 1024
BUILD_ADVICE = ("afds was installed without its native runtime. Install a C++ compiler (g++ or clang) and install "
                "afds again; until then the PyTorch forward (--runtime torch) computes the same.")  # fmt: skip


def is_built() -> bool:
    """Whether the native kernels are there."""
    return _kernels is not None


def usable_isas(precision: str = "float32") -> list[str]:
    """Instruction sets that this CPU can run, the fastest first; empty where the kernels are not built.

    For `bf16`, amx_bf16 comes first where the CPU has it, and is what `auto` takes. avx512_bf16 may be slower than
    avx512: `auto` measures.
    """
    return list(_kernels.usable_isas(precision == "bf16")) if _kernels is not None else []


@dataclass(frozen=True)
class LayerTime:
    """Seconds per image of one op, of the first thread."""

    name: str
    predictor: float
    """Pooled sums and the predictor's product."""
    select: float
    """Winners, lists of steps; for strided layers also the copy of the active channels."""
    wait: float
    """For the other threads, when the layer is done here."""
    conv: float
    """The product with its fused epilogue: scale, bias, residual, activation, pooled sums."""
    rest: float
    """What is not a convolution, and channels that only the residual branch brings."""

    @property
    def total(self) -> float:
        return self.predictor + self.select + self.wait + self.conv + self.rest


class Executor:
    """A network of one input size, ready to run. Several Python threads may call it at once.

    Args:
        plan: what to compute.
        threads: CPU threads of one call.
        isa: `auto`, or one of `usable_isas(plan.precision)`.
    Raises:
        RuntimeMissingError: the native part is not built.
        ConfigError: threads or isa that cannot be; a plan that does not fit together.
    """

    def __init__(self, plan: Plan, *, threads: int = 1, isa: str = "auto") -> None:
        if _kernels is None:
            raise RuntimeMissingError(BUILD_ADVICE)
        if not hasattr(threads, "__index__") or not 1 <= threads <= MOST_THREADS:
            raise ConfigError(f"threads is {threads!r}; give a whole number from 1 to {MOST_THREADS}.")
        if plan.precision not in PRECISIONS:
            raise ConfigError(f"This plan's precision is {plan.precision!r}; there are {' and '.join(PRECISIONS)}.")
        known = usable_isas(plan.precision)
        if isa != "auto" and isa not in known:
            raise ConfigError(f"isa is {isa!r}; this CPU can run {', '.join(known)}; or give auto.")
        self.plan = replace(plan, tensors={})
        """Without the weights: the engine holds its own, and a second copy would double the memory."""
        try:
            engine = _kernels.Engine(int(threads), isa, plan.precision == "bf16")
            for buffer in plan.buffers:
                engine.add_buffer(buffer)
            for value in plan.values:
                engine.add_value(value)
            engine.set_input(plan.input)
            for op in plan.ops:
                tensors = {key: plan.tensors[op[key]] for key in TENSORS.get(op["kind"], ()) if key in op}
                getattr(engine, f"add_{op['kind']}")({**op, **tensors})
            engine.check_ready()
        except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, MemoryError) as error:
            raise ConfigError(f"This plan cannot be run: {error}") from error
        self._engine = engine

    def __reduce__(self) -> Any:
        raise TypeError("An executor cannot be copied or pickled: compile the run again where it is wanted.")

    @property
    def threads(self) -> int:
        """CPU threads of one call."""
        return int(self._engine.threads)

    @property
    def isa(self) -> str:
        """The instruction set in use."""
        return str(self._engine.isa)

    @property
    def weight_bytes(self) -> int:
        """Memory of the convolutions', predictors' and classifier's weights."""
        return int(self._engine.weight_bytes)

    @property
    def workspace_bytes(self) -> int:
        """Memory of the features of one image, beside the weights."""
        return int(self._engine.workspace_bytes)

    def __call__(self, x_BCHW: np.ndarray) -> np.ndarray:
        """Logits (B, classes) float32 of preprocessed images (B, C, H, W)."""
        return self._engine.run(self._checked(x_BCHW))

    def counted_macs(self, x_BCHW: np.ndarray) -> np.ndarray:
        """MACs that were executed for each image, (B,) int64: what `afds.cost` counts, predictors included."""
        return self.layer_macs(x_BCHW).sum(1)

    def counted(self, x_BCHW: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Logits and `counted_macs` of the same pass."""
        logits_BK, macs_BO = self._engine.run_counted(self._checked(x_BCHW))
        return logits_BK, macs_BO.sum(1)

    def layer_macs(self, x_BCHW: np.ndarray) -> np.ndarray:
        """The same by op of the plan, (B, ops) int64."""
        return self._engine.run_counted(self._checked(x_BCHW))[1]

    def chosen(self, x_1CHW: np.ndarray) -> dict[str, np.ndarray]:
        """The channels that each convolution computed for one image, by its name."""
        lists = self._engine.run_recorded(self._checked(x_1CHW)[:1])
        return {
            op["name"]: np.asarray(rows, np.int32)
            for op, rows in zip(self.plan.ops, lists, strict=True)
            if op["kind"] == "conv"
        }

    def profile(self, x_BCHW: np.ndarray, repeats: int = 10) -> list[LayerTime]:
        """Time per image of each op: medians of ``repeats`` runs, after one to warm up."""
        if repeats < 1:
            raise ConfigError(f"repeats is {repeats}; give 1 or more.")
        x_BCHW = self._checked(x_BCHW)
        self._engine.run(x_BCHW)
        runs = [self._engine.run_profiled(x_BCHW) for _ in range(repeats)]
        seconds = np.median(np.stack(runs), 0) / len(x_BCHW)
        return [LayerTime(op["name"], *map(float, row)) for op, row in zip(self.plan.ops, seconds, strict=True)]

    def _checked(self, x_BCHW: np.ndarray) -> np.ndarray:
        want = (self.plan.channels, self.plan.height, self.plan.width)
        if not isinstance(x_BCHW, np.ndarray) or x_BCHW.dtype.kind not in "fiu":
            found = f"an array of {x_BCHW.dtype}" if isinstance(x_BCHW, np.ndarray) else f"a {type(x_BCHW).__name__}"
            raise ConfigError(f"An executor takes numpy arrays of real numbers, got {found}.")
        if x_BCHW.ndim != 4 or tuple(x_BCHW.shape[1:]) != want or len(x_BCHW) == 0:
            raise ConfigError(f"This executor was made for images (B, {', '.join(map(str, want))}), "
                              f"got {tuple(x_BCHW.shape)}.")  # fmt: skip
        return np.ascontiguousarray(x_BCHW, dtype=np.float32)
