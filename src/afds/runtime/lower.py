"""From a network's graph to the ops of a plan.

The graph is walked once, in the order in which it runs. An activation joins the op before it, a sum joins the later
of its two convolutions (which then adds the other branch as it stores), a batch norm its convolution, and a
squeeze-excitation becomes one op. What is not known is refused by name.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import fx, nn

from afds.graph import ADDS, MULS, is_sigmoid, trace
from afds.runtime.errors import UnsupportedError
from afds.runtime.fold import Folded, f32, fold_plain, fold_unit
from afds.selection import SelectiveConvBN

ACT_MODULES = {
    "ReLU": "relu", "ReLU6": "relu6", "SiLU": "silu", "Swish": "silu", "Hardswish": "hardswish",
    "HardSwish": "hardswish", "HardSwishMe": "hardswish", "SwishMe": "silu", "Sigmoid": "sigmoid",
    "Hardsigmoid": "hardsigmoid", "HardSigmoid": "hardsigmoid",
}  # fmt: skip
ACT_NAMES = {"relu": "relu", "relu_": "relu", "relu6": "relu6", "silu": "silu", "hardswish": "hardswish",
             "sigmoid": "sigmoid", "sigmoid_": "sigmoid", "hardsigmoid": "hardsigmoid"}  # fmt: skip
NOTHING = (nn.Identity, nn.Dropout, nn.Dropout2d)


@dataclass
class Feature:
    """A feature map (C, H, W) that some op makes."""

    channels: int
    height: int
    width: int
    nonnegative: bool = False
    pooled: bool = False  # someone reads its mean per channel
    maker: int = -1  # position of the op that makes it


@dataclass
class Pooled:
    """The mean over the pixels of a feature, (C,)."""

    of: int


@dataclass
class Squeeze:
    """A squeeze-excitation on its way: what was read of it so far."""

    of: int
    layers: list[nn.Conv2d | nn.Linear]
    acts: list[str]


@dataclass
class Program:
    """Ops over features, before they have a place in memory."""

    features: list[Feature] = field(default_factory=list)
    ops: list[dict[str, Any]] = field(default_factory=list)
    tensors: dict[str, np.ndarray] = field(default_factory=dict)
    input: int = 0
    classes: int = 0


def lower(model: nn.Module, size: tuple[int, int], bf16: bool = False) -> Program:
    """The ops of ``model`` (plain, or with selection in it) in eval mode, for images of ``size`` (height, width).

    bf16: convolutions as products of bf16 pairs, where they can be.

    Raises:
        UnsupportedError: naming the layer that the runtime does not compute.
        SourceError: the forward cannot be traced.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        return _Lowering(trace(model), size, bf16).run()
    finally:
        for module, mode in modes:
            module.training = mode


class _Lowering:
    def __init__(self, gm: fx.GraphModule, size: tuple[int, int], bf16: bool) -> None:
        self.gm = gm
        self.size = size
        self.bf16 = bf16
        self.program = Program()
        self.env: dict[fx.Node, Any] = {}

    def run(self) -> Program:
        nodes = list(self.gm.graph.nodes)
        others = [node for node in nodes if node.op == "placeholder"][1:]  # not the image: who reads them is refused
        for node in nodes:
            if node in self.env or node in others:
                continue
            if node.op == "output":
                self._output(node)
            elif node.op == "placeholder":
                self.env[node] = self.program.input = self._feature(self._in_channels(), *self.size)
            elif node.op == "call_module":
                self._module(node, self.gm.get_submodule(str(node.target)))
            else:
                self._function(node)
        return self.program

    # ------------------------------------------------------------ what the program is made of

    def _in_channels(self) -> int:
        for module in self.gm.modules():
            if isinstance(module, nn.Conv2d):
                return module.in_channels
        raise UnsupportedError("The native runtime computes ConvNets; this network has no convolution.")

    def _feature(self, channels: int, height: int, width: int, nonnegative: bool = False) -> int:
        self.program.features.append(
            Feature(channels, height, width, nonnegative=nonnegative, maker=len(self.program.ops))
        )
        return len(self.program.features) - 1

    def _emit(self, kind: str, name: str, tensors: dict[str, np.ndarray] | None = None, **fields: Any) -> None:
        for key, array in (tensors or {}).items():
            known = self.program.tensors.setdefault(f"{name}.{key}", array)
            if known is not array and not np.array_equal(known, array):
                raise UnsupportedError(f"The native runtime does not compute {name}: it runs twice, with other weights "
                                       "after folding.")  # fmt: skip
            fields[key] = f"{name}.{key}"
        self.program.ops.append({"kind": kind, "name": name, **fields})

    def _refuse(self, node: fx.Node, why: str = "") -> UnsupportedError:
        where = str(node.target) if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
        kind = (
            type(self.gm.get_submodule(where)).__name__ if node.op == "call_module" else node.op.removeprefix("call_")
        )
        return UnsupportedError(f"The native runtime does not compute {where} ({kind}){': ' + why if why else ''}.")

    def _value(self, node: fx.Node, position: int = 0) -> Any:
        arg = node.args[position] if position < len(node.args) else None
        if not isinstance(arg, fx.Node) or arg not in self.env:
            raise self._refuse(node, "its input is not a feature map")
        return self.env[arg]

    def _map(self, node: fx.Node, position: int = 0) -> int:
        value = self._value(node, position)
        if isinstance(value, Pooled):  # a map of one pixel
            of = self.program.features[value.of]
            if of.height * of.width == 1:
                return value.of
            of.pooled = True
            y = self._feature(of.channels, 1, 1, of.nonnegative)
            self._emit("gap", f"{node.name}.mean", x=value.of, y=y)
            self._forget(value, y)
            return y
        if not isinstance(value, int):
            raise self._refuse(node, "its input is not a feature map")
        return value

    def _forget(self, value: Any, y: int) -> None:
        for node, known in self.env.items():
            if known is value:
                self.env[node] = y

    # ------------------------------------------------------------ nodes

    def _module(self, node: fx.Node, module: nn.Module) -> None:
        kind = type(module).__name__
        if isinstance(module, SelectiveConvBN):
            self.env[node] = self._conv(node, module.conv, fold_unit(module, self.bf16), str(node.target))
            if module.gate.__class__.__name__ == "Gate":
                self.program.features[self.program.ops[-1]["x"]].pooled |= self.program.ops[-1]["rows"] == "dynamic"
        elif isinstance(module, nn.Conv2d):
            self._plain(node, module)
        elif isinstance(module, NOTHING) or kind in ("DropPath", "DropBlock2d"):
            self.env[node] = self._value(node)
        elif kind in ACT_MODULES:
            self._act(node, ACT_MODULES[kind])
        elif isinstance(module, nn.MaxPool2d | nn.AvgPool2d) and not kind.endswith("Same"):  # timm's pad otherwise
            self._pool(node, module)
        elif (isinstance(module, nn.AdaptiveAvgPool2d) and module.output_size in (1, (1, 1))) or kind in (
            "FastAdaptiveAvgPool",
            "FastAdaptiveAvgPool2d",
        ):
            self.env[node] = self._mean(node)
        elif isinstance(module, nn.Flatten):
            self._flatten(node)
        elif isinstance(module, nn.Linear):
            self._linear(node, module)
        elif kind == "ConvMlp":
            self._conv_mlp(node, module)
        else:
            raise self._refuse(node)

    def _function(self, node: fx.Node) -> None:
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        if node.op == "call_function" and node.target in ADDS:
            self._add(node)
        elif node.op == "call_function" and node.target in MULS:
            self._scale(node)
        elif node.op in ("call_function", "call_method") and (is_sigmoid(self.gm, node) or name in ACT_NAMES):
            self._act(node, "hardsigmoid" if name == "hard_sigmoid" else ACT_NAMES[str(name)])
        elif _is_mean(node, name):
            self.env[node] = self._mean(node)
        elif name in ("flatten", "contiguous", "clone", "dropout"):
            if name == "flatten":
                self._flatten(node)
            else:
                self.env[node] = self._value(node)
        else:
            raise self._refuse(node)

    def _plain(self, node: fx.Node, conv: nn.Conv2d) -> None:
        value = self._value(node)
        if isinstance(value, Pooled | Squeeze) and _is_squeeze(self.gm, node):
            self._squeeze(node, value, conv)
            return
        norm_node = next(iter(node.users)) if len(node.users) == 1 else None
        norm = None
        if norm_node is not None and norm_node.op == "call_module":
            follower = self.gm.get_submodule(str(norm_node.target))
            norm = follower if isinstance(follower, nn.BatchNorm2d) else None
        self.env[node] = y = self._conv(node, conv, fold_plain(conv, norm, self.bf16), str(node.target))
        if norm is not None and norm_node is not None:
            self.env[norm_node] = y
            act = getattr(norm, "act", None)
            if act is not None and not isinstance(act, nn.Identity):
                kind = type(act).__name__
                if kind not in ACT_MODULES:
                    raise self._refuse(norm_node, f"{kind} after it")
                self._set_act(self.program.ops[-1], y, ACT_MODULES[kind])

    def _conv(self, node: fx.Node, conv: nn.Conv2d, folded: Folded, name: str, x: int | None = None) -> int:
        x = self._map(node) if x is None else x
        of = self.program.features[x]
        kh, kw = conv.kernel_size
        if len({*conv.stride}) > 1 or len({*conv.dilation}) > 1 or conv.padding_mode != "zeros":
            raise self._refuse(node, "strides or dilations that differ, or padding that is not zeros")
        stride, dilation = conv.stride[0], conv.dilation[0]
        if isinstance(conv.padding, str) or type(conv).__name__ != "Conv2d":
            raise self._refuse(node, "padding that depends on the input's size")
        (pad_h, pad_w) = conv.padding
        height = (of.height + 2 * pad_h - dilation * (kh - 1) - 1) // stride + 1
        width = (of.width + 2 * pad_w - dilation * (kw - 1) - 1) // stride + 1
        if height < 1 or width < 1:
            raise self._refuse(node, f"images of {self.size[0]} x {self.size[1]} pixels leave it no pixel")
        y = self._feature(conv.out_channels, height, width)
        self._emit(
            "conv", name, folded.tensors, **folded.fields, x=x, y=y, residual=-1, residual_nonnegative=False,
            in_channels=conv.in_channels, out_channels=conv.out_channels, groups=conv.groups, kernel_h=kh, kernel_w=kw,
            stride=stride, pad_h=pad_h, pad_w=pad_w, dilation=dilation, act="none",
        )  # fmt: skip
        return y

    def _set_act(self, op: dict[str, Any], y: int, act: str) -> None:
        op["act"] = act
        self.program.features[y].nonnegative = act in ("relu", "relu6", "sigmoid", "hardsigmoid")

    def _maker(self, node: fx.Node, value: Any) -> dict[str, Any] | None:
        """The op that makes ``value``, where nothing has read it yet and ``node`` is the only one that will."""
        if not isinstance(value, int) or value == self.program.input:
            return None
        op = self.program.ops[self.program.features[value].maker]
        for other, known in self.env.items():
            if known == value and isinstance(known, int) and any(u is not node and u not in self.env
                                                                 for u in other.users):  # fmt: skip
                return None
        read = any(o.get(k) == value for o in self.program.ops for k in ("x", "a", "b", "residual"))
        return None if read or self.program.features[value].pooled else op

    def _act(self, node: fx.Node, act: str) -> None:
        value = self._value(node)
        if isinstance(value, Squeeze):
            value.acts.append(act)
            self.env[node] = value
            return
        if isinstance(value, Pooled):
            value = self._map(node)
        op = self._maker(node, value)
        keeps_zero = act not in ("sigmoid", "hardsigmoid")  # where a channel may be left out, that matters
        fuses = op is not None and op["act"] == "none" and (
            op["kind"] in ("conv", "add") if keeps_zero else op["kind"] == "conv" and op["rows"] == "all"
        )  # fmt: skip
        if op is not None and fuses:
            self._set_act(op, value, act)
            self.env[node] = value
            return
        if not keeps_zero:
            raise self._refuse(node, "an activation that does not keep zero")
        of = self.program.features[value]
        if act == "relu" and of.nonnegative:
            self.env[node] = value
            return
        self.env[node] = y = self._feature(of.channels, of.height, of.width)
        self._emit("add", node.name, a=value, b=-1, y=y, act="none")
        self._set_act(self.program.ops[-1], y, act)

    def _add(self, node: fx.Node) -> None:
        if node.kwargs or len(node.args) != 2:
            raise self._refuse(node, "a sum with weights")
        a, b = self._map(node, 0), self._map(node, 1)
        features = self.program.features
        if a == b:
            raise self._refuse(node, "a sum of a map with itself")
        if [features[a].channels, features[a].height] != [features[b].channels, features[b].height]:
            raise self._refuse(node, "a sum of maps of different shapes")
        later, other = (a, b) if features[a].maker > features[b].maker else (b, a)
        op = self._maker(node, later)
        if op is not None and op["kind"] == "conv" and op["act"] == "none" and op["residual"] < 0:
            op["residual"] = other
            op["residual_nonnegative"] = features[other].nonnegative
            self.env[node] = later
            return
        self.env[node] = y = self._feature(features[a].channels, features[a].height, features[a].width,
                                           features[a].nonnegative and features[b].nonnegative)  # fmt: skip
        self._emit("add", node.name, a=a, b=b, y=y, act="none")

    def _mean(self, node: fx.Node) -> Pooled:
        x = self._map(node)
        self.program.features[x].pooled = True
        return Pooled(x)

    def _flatten(self, node: fx.Node) -> None:
        value = self._value(node)
        if isinstance(value, int):
            of = self.program.features[value]
            if of.height * of.width > 1:
                raise self._refuse(node, "a map of more than one pixel is flattened")
            of.pooled = True
            value = Pooled(value)
        self.env[node] = value

    def _linear(self, node: fx.Node, linear: nn.Linear) -> None:
        value = self._value(node)
        if isinstance(value, int):
            self._flatten(node)
            value = self.env[node]
        users = list(node.users)
        while len(users) == 1 and users[0].op == "call_module" and isinstance(
            self.gm.get_submodule(str(users[0].target)), NOTHING
        ):  # fmt: skip
            users = list(users[0].users)
        if not isinstance(value, Pooled) or [u.op for u in users] != ["output"]:
            raise self._refuse(node, "it is not a classifier of pooled features")
        bias = linear.bias if linear.bias is not None else torch.zeros(linear.out_features)
        self._emit("linear", str(node.target), {"weight": f32(linear.weight.T), "bias": f32(bias)},
                   x=value.of, in_channels=linear.in_features, out_channels=linear.out_features)  # fmt: skip
        self.program.classes = linear.out_features
        self.env[node] = ("logits",)

    def _output(self, node: fx.Node) -> None:
        result = node.args[0]
        if not isinstance(result, fx.Node) or self.env.get(result) != ("logits",):
            raise UnsupportedError("The native runtime computes classifiers; this network does not end in a linear "
                                   "layer.")  # fmt: skip

    def _pool(self, node: fx.Node, module: nn.MaxPool2d | nn.AvgPool2d) -> None:
        x = self._map(node)
        of = self.program.features[x]

        def one(value: Any) -> int:
            if isinstance(value, tuple):
                if len({*value}) > 1:
                    raise self._refuse(node, "a window that is not square")
                value = value[0]
            return int(value)

        if one(getattr(module, "dilation", 1)) != 1 or getattr(module, "divisor_override", None):
            raise self._refuse(node, "dilation or a divisor of its own")
        kernel, stride, pad = one(module.kernel_size), one(module.stride), one(module.padding)
        is_max = isinstance(module, nn.MaxPool2d)
        try:
            with torch.no_grad():  # torch says what its own rounding gives
                height, width = module(torch.zeros(1, 1, of.height, of.width)).shape[2:]
        except RuntimeError as error:
            raise self._refuse(node, f"images of {self.size[0]} x {self.size[1]} pixels leave it no pixel") from error
        y = self._feature(of.channels, height, width, of.nonnegative)
        include = bool(getattr(module, "count_include_pad", False))
        self._emit("pool", str(node.target), x=x, y=y, kernel=kernel, stride=stride, pad=pad, max=is_max,
                   include_pad=include, nonnegative=of.nonnegative)  # fmt: skip
        self.env[node] = y

    def _squeeze(self, node: fx.Node, value: Pooled | Squeeze, conv: nn.Conv2d) -> None:
        if isinstance(value, Pooled):
            value = Squeeze(value.of, [], [])
        value.layers.append(conv)
        self.env[node] = value

    def _scale(self, node: fx.Node) -> None:
        values = [self._value(node, 0), self._value(node, 1)]
        squeeze = next((v for v in values if isinstance(v, Squeeze)), None)
        if squeeze is None or squeeze.of not in values or len(squeeze.layers) != 2 or len(squeeze.acts) != 2:
            raise self._refuse(node, "a product that is not a squeeze-excitation")
        x = squeeze.of
        if x == self.program.input:
            raise self._refuse(node, "a squeeze-excitation of the image")
        of = self.program.features[x]
        first, second = squeeze.layers
        name = str(node.args[1].name if node.args[1] in self.env else node.name)  # type: ignore[union-attr]
        y = self._feature(of.channels, of.height, of.width, of.nonnegative)
        (w1, b1), (w2, b2) = ((f32(c.weight.flatten(1).T), f32(c.bias if c.bias is not None
                               else torch.zeros(c.weight.shape[0]))) for c in (first, second))  # fmt: skip
        self._emit("se", name, {"weight1": w1, "bias1": b1, "weight2": w2, "bias2": b2}, x=x, y=y,
                   in_channels=of.channels, hidden=w1.shape[1], act=squeeze.acts[0], gate=squeeze.acts[1])  # fmt: skip
        self.env[node] = y

    def _conv_mlp(self, node: fx.Node, module: Any) -> None:
        """timm's VGG head: fully connected layers as convolutions."""
        x = self._map(node)
        of = self.program.features[x]
        if min(of.height, of.width) < module.input_kernel_size:
            raise self._refuse(node, f"images of {self.size[0]} x {self.size[1]} pixels are too small for its window")
        for conv, act, name in ((module.fc1, module.act1, "fc1"), (module.fc2, module.act2, "fc2")):
            kind = type(act).__name__
            if kind not in ACT_MODULES:
                raise self._refuse(node, f"{kind} in it")
            x = self._conv(node, conv, fold_plain(conv, None, self.bf16), f"{node.target}.{name}", x)
            self._set_act(self.program.ops[-1], x, ACT_MODULES[kind])
        self.env[node] = x


def _dims(node: fx.Node) -> Any:
    dims = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
    return tuple(dims) if isinstance(dims, list | tuple) else dims


def _is_mean(node: fx.Node, name: str) -> bool:
    """Whether the node takes the mean over all pixels."""
    if node.target is F.adaptive_avg_pool2d:
        return node.args[1:] in ((1,), ((1, 1),))
    return name == "mean" and _dims(node) in ((2, 3), (-2, -1), (-1, -2))


def _is_squeeze(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether what the convolution of pooled features makes ends in a sigmoid: then it is a squeeze-excitation."""
    for _ in range(6):
        if is_sigmoid(gm, node):
            return True
        if len(node.users) != 1:
            return False
        node = next(iter(node.users))
    return False
