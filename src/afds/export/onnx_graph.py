"""The skipping program as an ONNX graph: Gather of the chosen rows and columns, Conv with computed weights.

Stock ONNX Runtime runs it; nothing but standard operators of opset 18 is used.
"""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, fx, nn

from afds.errors import ExportError
from afds.export.skipping import Handle, Lowering

OPSET = 18
IR_VERSION = 10


class OnnxOps:
    """The operations, written down. A handle is the name of a value, or a tensor that is constant."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self._places: dict[str, str] = {}
        self._known: dict[bytes, str] = {}  # small constants, once each

    # --- writing

    def constant(self, value: Tensor | np.ndarray) -> str:
        array = value.detach().cpu().numpy() if isinstance(value, Tensor) else value
        key = array.tobytes() + repr((array.shape, array.dtype)).encode() if array.size <= 64 else b""
        if key in self._known:
            return self._known[key]
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        if key:
            self._known[key] = name
        return name

    def emit(self, op: str, *inputs: Handle | None, outputs: int = 1, **attributes: Any) -> Any:
        names = ["" if i is None else i if isinstance(i, str) else self.constant(i) for i in inputs]
        made = [f"v{len(self.nodes)}" + (f"_{i}" if i else "") for i in range(outputs)]
        self.nodes.append(helper.make_node(op, names, made, name=f"{op}_{len(self.nodes)}", **attributes))
        return made[0] if outputs == 1 else tuple(made)

    def _shape(self, *shape: int) -> str:
        return self.constant(np.asarray(shape, np.int64))

    # --- operations

    def gather(self, x: Handle, index: Handle, axis: int) -> Handle:
        return self.emit("Gather", x, index, axis=axis)

    def conv(self, x: Handle, w: Handle, b: Handle | None, conv: nn.Conv2d, groups: int) -> Handle:
        attributes: dict[str, Any] = {"strides": list(conv.stride), "dilations": list(conv.dilation)}
        if type(conv).__name__ == "Conv2dSame":
            attributes["auto_pad"] = "SAME_UPPER"
        elif type(conv) is nn.Conv2d and not isinstance(conv.padding, str) and conv.padding_mode == "zeros":
            attributes["pads"] = [*conv.padding, *conv.padding]
        else:
            raise ExportError(f"a {type(conv).__name__} with padding {conv.padding} cannot be written with its "
                              "selection; export with --static.")  # fmt: skip
        inputs = [x, w] if b is None else [x, w, b]
        return self.emit("Conv", *inputs, group=groups, kernel_shape=list(conv.kernel_size), **attributes)

    def linear(self, x: Handle, wt: Handle, b: Handle | None, *, relu: bool = False) -> Handle:
        y = self.emit("Gemm", x, wt, b) if b is not None else self.emit("MatMul", x, wt)
        return self.emit("Relu", y) if relu else y

    def top(self, x: Handle, k: int) -> tuple[Handle, Handle]:
        return self.emit("TopK", self.flat(x), self._shape(k), outputs=2, sorted=0)

    def mean(self, x: Handle) -> Handle:
        return self.emit("GlobalAveragePool", x)

    def row(self, x: Handle) -> Handle:
        return self.emit("Flatten", x, axis=1)

    def reshape(self, x: Handle, shape: tuple[int, ...]) -> Handle:
        return self.emit("Reshape", x, self._shape(*shape))

    def flat(self, x: Handle) -> Handle:
        return self.emit("Reshape", x, self._shape(-1))

    def column(self, x: Handle) -> Handle:
        return self.emit("Reshape", x, self._shape(1, -1, 1, 1))

    def filters(self, x: Handle) -> Handle:
        return self.emit("Reshape", x, self._shape(-1, 1, 1, 1))

    def add(self, a: Handle, b: Handle) -> Handle:
        return self.emit("Add", a, b)

    def mul(self, a: Handle, b: Handle) -> Handle:
        return self.emit("Mul", a, b)

    def smaller(self, a: Handle, b: Handle) -> Handle:
        return self.emit("Min", a, b)

    def larger(self, a: Handle, b: Handle) -> Handle:
        return self.emit("Max", a, b)

    def sign(self, x: Handle) -> Handle:
        return self.emit("Sign", x)

    def relu(self, x: Handle) -> Handle:
        return self.emit("Relu", x)

    def put(self, x: Handle, index: Handle, y: Handle) -> Handle:
        return self.emit("ScatterND", x, self._pairs(index), y)

    def put_flat(self, x: Handle, index: Handle, y: Handle) -> Handle:
        return self.emit("ScatterElements", x, index, y, axis=0)

    def _pairs(self, index: Handle) -> str:
        """(K,) -> (1, K, 2): the channels as (image, channel), which names whole maps of a (1, C, H, W)."""
        if index not in self._places:
            column = self.emit("Reshape", index, self._shape(1, -1, 1))
            self._places[index] = self.emit("Mul", column, self.constant(np.asarray([[[0, 1]]], np.int64)))
        return self._places[index]

    def zeros(self, shape: tuple[int, ...]) -> Handle:
        return self.emit("ConstantOfShape", self._shape(*shape))

    # --- what computes no products

    def module(self, module: nn.Module, name: str, x: Handle) -> Handle:
        kind = type(module).__name__
        if kind in ("Identity", "Dropout", "Dropout2d", "DropPath", "DropBlock2d"):
            return x
        if kind in ("ReLU", "Sigmoid"):
            return self.emit({"ReLU": "Relu"}.get(kind, kind), x)
        if kind == "ReLU6":
            return self.emit("Clip", x, torch.tensor(0.0), torch.tensor(6.0))
        if kind in ("Hardswish", "HardSwish", "HardSwishMe"):
            return self.emit("HardSwish", x)
        if kind in ("HardSigmoid", "Hardsigmoid"):
            return self.emit("HardSigmoid", x, alpha=1 / 6, beta=0.5)
        if kind in ("SiLU", "Swish"):
            return self.mul(x, self.emit("Sigmoid", x))
        if isinstance(module, nn.MaxPool2d) and type(module) is nn.MaxPool2d:
            return self.emit("MaxPool", x, kernel_shape=_pair(module.kernel_size), strides=_pair(module.stride),
                             pads=_pair(module.padding) * 2, dilations=_pair(module.dilation),
                             ceil_mode=int(module.ceil_mode))  # fmt: skip
        if type(module) is nn.AvgPool2d and module.divisor_override is None:
            return self.emit("AveragePool", x, kernel_shape=_pair(module.kernel_size), strides=_pair(module.stride),
                             pads=_pair(module.padding) * 2, ceil_mode=int(module.ceil_mode),
                             count_include_pad=int(module.count_include_pad))  # fmt: skip
        if kind == "FastAdaptiveAvgPool":
            return self.row(self.mean(x)) if module.flatten else self.mean(x)  # type: ignore[union-attr]
        if isinstance(module, nn.AdaptiveAvgPool2d) and module.output_size in (1, (1, 1)):
            return self.mean(x)
        if isinstance(module, nn.Flatten) and module.start_dim == 1 and module.end_dim == -1:
            return self.row(x)
        raise ExportError(f"{name} ({kind}) cannot be written beside a selection; export with --static.")

    def head(self, module: Any, name: str, x: Handle, size: tuple[int, ...]) -> Handle:
        """timm's VGG head: a map that is smaller than the kernel is stretched first."""
        least = module.input_kernel_size
        if min(size) < least:
            rows, columns = (_stretch(s, max(s, least)) for s in size)
            x = self.emit("MatMul", self.emit("MatMul", rows, x), columns.t().contiguous())
        for part in ("fc1", "fc2"):
            conv = getattr(module, part)
            bias = None if conv.bias is None else conv.bias.detach()
            x = self.conv(x, conv.weight.detach(), bias, conv, conv.groups)
            x = self.module(getattr(module, f"act{part[-1]}"), name, x)
        return x

    def call(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Handle:
        x, rest = args[0], args[1:]
        target = node.target
        name = target if isinstance(target, str) else getattr(target, "__name__", str(target))
        if target in (F.relu, torch.relu, "relu", "relu_"):
            return self.relu(x)
        if name in ("sigmoid", "sigmoid_"):
            return self.emit("Sigmoid", x)
        if target in (F.dropout, "contiguous", "clone", "to"):
            return x
        if target in ("mean", torch.mean):
            dims = kwargs.get("dim", rest[0] if rest else None)
            keep = kwargs.get("keepdim", rest[1] if len(rest) > 1 else False)
            if dims in ((2, 3), [2, 3]):
                return self.mean(x) if keep else self.row(self.mean(x))
        if target in ("flatten", torch.flatten) and (rest or (kwargs.get("start_dim"),)) == (1,):
            return self.row(x)
        if target in (operator.mul, operator.add) and isinstance(rest[0], int | float):
            return self.emit("Mul" if target is operator.mul else "Add", x, torch.tensor(float(rest[0])))
        raise ExportError(f"{name} cannot be written beside a selection; export with --static.")


def _stretch(size: int, wanted: int) -> Tensor:
    """(wanted, size): adaptive average pooling in one dimension, as a product."""
    return F.adaptive_avg_pool1d(torch.eye(size)[None], wanted)[0].t().contiguous()


def _pair(value: Any) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)


def dynamic_graph(model: nn.Module, side: int, classes: int) -> onnx.ModelProto:
    """An ONNX model: `image` (1, 3, side, side) float32 -> `logits` (1, classes).

    Args:
        model: a selective network, in eval mode.
    Raises:
        ExportError: it names the layer that cannot be written.
    """
    ops = OnnxOps()
    with torch.no_grad():
        result = Lowering(model, side).run(ops, "image")
    ops.nodes.append(helper.make_node("Identity", [result], ["logits"], name="logits"))
    nodes = _needed(ops.nodes)
    used = {name for node in nodes for name in node.input}
    graph = helper.make_graph(
        nodes, "afds",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 3, side, side])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, classes])],
        [constant for constant in ops.constants if constant.name in used],
    )  # fmt: skip
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], producer_name="afds")
    made.ir_version = IR_VERSION
    onnx.checker.check_model(made)
    return made


def _needed(nodes: list[onnx.NodeProto]) -> list[onnx.NodeProto]:
    """Without those that nothing reads."""
    wanted, kept = {"logits"}, []
    for node in reversed(nodes):
        if wanted.intersection(node.output):
            wanted.update(node.input)
            kept.append(node)
    return kept[::-1]
