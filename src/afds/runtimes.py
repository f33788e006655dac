"""Runtimes: a network, opened in one of them, as something that takes images and gives logits.

::

    network, form --> torch | compiled | onnx | openvino | native --> predict(x_BCHW) -> logits_BK, float32
    dense, static, dynamic                                            with a stated number of threads

What `afds measure` times and what a latency budget is held to are opened here, in the same way.
"""

from __future__ import annotations

import copy
import importlib.util
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from afds.errors import ConfigError
from afds.export.formats import Predictor, onnx_bytes, open_onnx, open_openvino
from afds.export.skipping import skipping_network

RUNTIMES = ("torch", "compiled", "onnx", "openvino", "native")


PRECISIONS = ("float32", "bf16")
IN_BF16 = ("openvino", "native")


def check_runtime(name: str) -> None:
    """Refuse a runtime that is not on this machine.

    Raises:
        ConfigError: with the way to install it.
    """
    if name in ("onnx", "openvino"):
        _there({"onnx": "onnxruntime"}.get(name, name))
    elif name == "native":
        _built()


def _torch(network: nn.Module, form: str, side: int, classes: int, threads: int) -> Predictor:
    module = skipping_network(network, side) if form == "dynamic" else network
    return _run_torch(module)


def _compiled(network: nn.Module, form: str, side: int, classes: int, threads: int) -> Predictor:
    module = skipping_network(network, side) if form == "dynamic" else network
    return _run_torch(torch.compile(module))


def _run_torch(module: Any) -> Predictor:
    def predict(x_BCHW: np.ndarray) -> np.ndarray:
        with torch.inference_mode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return module(torch.from_numpy(x_BCHW)).numpy()

    return predict


def _onnx(network: nn.Module, form: str, side: int, classes: int, threads: int) -> Predictor:
    _there("onnxruntime")
    return open_onnx(onnx_bytes(network, side, classes, form == "dynamic"), threads)


def _openvino(
    network: nn.Module, form: str, side: int, classes: int, threads: int, precision: str = "float32"
) -> Predictor:
    _there("openvino")
    graph = onnx_bytes(network, side, classes, form == "dynamic")
    return open_openvino(graph, threads, "f32" if precision == "float32" else precision)


def _native(
    network: nn.Module, form: str, side: int, classes: int, threads: int, precision: str = "float32"
) -> Predictor:
    _built()
    from afds import runtime  # type: ignore[attr-defined]

    return runtime.compile(network, input_size=side, threads=threads, precision=precision)


def why_not_native(network: nn.Module, side: int) -> str | None:
    """Why the native runtime will not run this network, which can be told before it is trained; None where it will."""
    from afds import runtime  # type: ignore[attr-defined]

    if not runtime.is_built():
        return runtime.BUILD_ADVICE
    copied = copy.deepcopy(network).to("cpu", memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    try:
        runtime.make_plan(copied, side)
    except runtime.UnsupportedError as error:
        return str(error)
    return None


def _built() -> None:
    from afds import runtime  # type: ignore[attr-defined]

    if not runtime.is_built():
        raise ConfigError("the native runtime is not built: install afds again where there is a C++ compiler")


def _there(package: str) -> None:
    lacking = [name for name in (package, "onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if lacking:
        raise ConfigError(f"{', '.join(lacking)} not installed: pip install {' '.join(lacking)}")


OPENERS: dict[str, Callable[..., Predictor]] = {
    "torch": _torch, "compiled": _compiled, "onnx": _onnx, "openvino": _openvino, "native": _native,
}  # fmt: skip
