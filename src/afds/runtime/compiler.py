"""A network or a run folder, compiled for this CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from afds.errors import ConfigError
from afds.runtime.errors import RuntimeMissingError
from afds.runtime.executor import BUILD_ADVICE, Executor, is_built
from afds.runtime.layout import place
from afds.runtime.lower import lower
from afds.runtime.plan import PRECISIONS, Plan

if TYPE_CHECKING:
    from afds.artifact import Run
    from afds.inference import Model

Size = int | tuple[int, int]


def make_plan(model: nn.Module, input_size: Size, precision: str = "float32") -> Plan:
    """The plan of ``model`` (plain, or with selection at its present density) for images of one size.

    Args:
        input_size: pixels, one side of a square or (height, width).
        precision: see `compile`.
    Raises:
        UnsupportedError: naming the layer that the runtime does not compute.
        SourceError: the forward cannot be traced.
    """
    size = input_size if isinstance(input_size, tuple | list) else (input_size, input_size)
    if len(size) != 2 or not all(hasattr(n, "__index__") and n > 0 for n in size):
        raise ConfigError(f"input_size is {input_size!r}; give pixels, one side or (height, width), 1 or more.")
    size = (int(size[0]), int(size[1]))
    if precision not in PRECISIONS:
        raise ConfigError(f"precision is {precision!r}; choose one of {', '.join(PRECISIONS)}.")
    return place(lower(model, size, precision == "bf16"), precision)


def compile(
    run_or_model: Run | Model | nn.Module, *, input_size: Size | None = None, threads: int = 1, isa: str = "auto",
    precision: str = "float32",
) -> Executor:  # fmt: skip
    """An executor of a loaded run or of a network, at its present density.

    Args:
        run_or_model: what `afds.load` or `load_run` gives, or a network; changing it later changes nothing here.
        input_size: pixels, one side or (height, width); by default that of the run's preprocessing.
        threads: CPU threads of one call.
        isa: the instruction set, by default the fastest that this CPU has.
        precision: `bf16` rounds weights and inputs of each convolution (depthwise ones excepted) to bf16 and sums up in
            float32, on any CPU: the weights take half the memory, and CPUs with a fast bf16 product take less time.
    Raises:
        RuntimeMissingError: the native part was not built.
        UnsupportedError: naming the layer that the runtime does not compute; run it with PyTorch.
        ConfigError: no input size, or a wrong argument.
    """
    if not is_built():
        raise RuntimeMissingError(BUILD_ADVICE)
    source: Any = run_or_model
    if isinstance(source, nn.Module):
        model = source
    else:
        run = getattr(source, "run", source)
        model = run.model
        input_size = input_size or run.preprocess.input_size
    if input_size is None:
        raise ConfigError("compile needs input_size for a network that is not a run: pixels, or (height, width).")
    return Executor(make_plan(model, input_size, precision), threads=threads, isa=isa)
