"""The dataflow of a network: which ConvBN units it has and who feeds whom.

A network is read with ``torch.fx``, never rewritten: timm's own forward stays what runs. What we need from the
graph is small, namely the pairs (convolution, batch norm that follows it), for a depthwise convolution the
units whose channels it carries on, and the last unit of each stage.

::

    conv1 -> bn1 -> act1 -> conv2 -> bn2 --+--> act2 -> ...      units: conv1, conv2, downsample.0
       \\_ downsample.0 -> downsample.1 ____/

An architecture that cannot be read, or that holds a convolution or a norm in a place where selection would be
wrong, is refused by name. Nothing is ever left dense in silence.
"""

from __future__ import annotations

import operator
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from afds.errors import SourceError

ADDS = (operator.add, operator.iadd, torch.add)
MULS = (operator.mul, operator.imul, torch.mul)
# Functions and methods under which a channel that is zero stays zero and stays in its place.
PASS_FUNCTIONS = (
    F.relu, F.relu6, F.silu, F.hardswish, F.gelu, F.leaky_relu, F.elu, F.dropout, F.pad, F.max_pool2d, F.avg_pool2d,
    F.adaptive_avg_pool2d, F.adaptive_max_pool2d, torch.relu, torch.flatten, torch.mean, torch.clone,
)  # fmt: skip
PASS_METHODS = (
    "mean",
    "flatten",
    "relu",
    "relu_",
    "contiguous",
    "clone",
    "view",
    "reshape",
    "amax",
    "squeeze",
    "to",
)
PASS_MODULES = (
    nn.Identity, nn.Dropout, nn.Dropout2d, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d,
    nn.Flatten,
)  # fmt: skip
PASS_MODULE_NAMES = ("DropPath", "DropBlock2d", "AvgPool2dSame", "FastAdaptiveAvgPool2d",
                     "FastAdaptiveAvgPool", "AdaptiveAvgMaxPool2d", "MaxPool2dSame")  # fmt: skip


# Pools with a filter a channel, which compaction does not cut: leaves, so that they are refused by their name.
BLURS = ("BlurPool2d", "BlurPool")


@dataclass(frozen=True)
class ConvBN:
    """One convolution and the batch norm that follows it, by their paths in the module."""

    name: str  # path of the convolution: it names the unit
    norm: str  # path of the batch norm
    depthwise: bool
    leaders: tuple[str, ...]  # depthwise only: the units whose channels it carries on


TRACING = threading.RLock()
"""One trace at a time: while fx traces, `nn.Module` is patched for the whole process."""
if hasattr(os, "register_at_fork"):  # a child must not come to life in the middle of another thread's trace
    os.register_at_fork(before=TRACING.acquire, after_in_parent=TRACING.release, after_in_child=TRACING.release)


class ThreadTracer(fx.Tracer):
    """A tracer that leaves networks alone that other threads run meanwhile."""

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        with TRACING:
            self._thread = threading.get_ident()
            return super().trace(root, concrete_args)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if threading.get_ident() != self._thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)


class _Tracer(ThreadTracer):
    """Convolutions, norms, selective units and timm's untraceable modules are leaves."""

    def is_leaf_module(self, m: nn.Module, qualname: str) -> bool:
        from timm.models._features_fx import get_notrace_modules

        norms = nn.BatchNorm2d | nn.GroupNorm | nn.LayerNorm | nn.InstanceNorm2d
        if getattr(m, "is_selective_unit", False) or isinstance(m, nn.Conv2d | nn.Linear | norms):
            return True
        if isinstance(m, tuple(get_notrace_modules())) or type(m).__name__ in (*PASS_MODULE_NAMES, *BLURS):
            return True
        return super().is_leaf_module(m, qualname)


def trace(model: nn.Module) -> fx.GraphModule:
    """Read the dataflow of ``model`` (plain or with selection in it); shares its modules.

    Raises:
        SourceError: the forward cannot be traced.
    """
    try:
        graph = _Tracer(autowrap_functions=_autowrap()).trace(model)
    except Exception as error:  # fx raises many kinds
        raise SourceError(
            f"{type(model).__name__}: its forward cannot be read as a graph ({error}). "
            "Supported are timm's ConvNets made of conv + batch norm: ResNet, VGG-BN, RegNet, MobileNet, EfficientNet."
        ) from error
    return fx.GraphModule(model, graph)


def _autowrap() -> tuple[Any, ...]:
    from timm.models._features_fx import get_notrace_functions

    return tuple(get_notrace_functions())


def zero_stays_zero(module: nn.Module) -> bool:
    """Whether a parameterless elementwise module maps 0 to 0, found by asking it."""
    if any(True for _ in module.parameters()):
        return False
    with torch.no_grad():
        try:
            out = module(torch.zeros(1, 2, 2, 2))
        except Exception:
            return False
    return isinstance(out, torch.Tensor) and out.shape == (1, 2, 2, 2) and bool((out == 0).all())


def passes_channels(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether the node keeps every channel in its place and a zero channel zero."""
    if node.op == "call_module":
        module = gm.get_submodule(str(node.target))
        return isinstance(module, PASS_MODULES) or type(module).__name__ in PASS_MODULE_NAMES or zero_stays_zero(module)
    if node.op == "call_function":
        return node.target in PASS_FUNCTIONS
    return node.op == "call_method" and node.target in PASS_METHODS


def is_sigmoid(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether the node is the squashing function of a channel attention (SE), in any of its spellings."""
    if node.op == "call_module":
        return type(gm.get_submodule(str(node.target))).__name__ in ("Sigmoid", "HardSigmoid", "Hardsigmoid")
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return name in ("sigmoid", "hard_sigmoid", "hardsigmoid", "sigmoid_")


def tensor_inputs(node: fx.Node) -> list[fx.Node]:
    return [arg for arg in node.args if isinstance(arg, fx.Node)]


def is_depthwise(conv: nn.Conv2d) -> bool:
    return conv.groups > 1 and conv.groups == conv.in_channels == conv.out_channels


def full_shape(module: nn.Conv2d | nn.Linear) -> tuple[int, int, int]:
    """(inputs, outputs, groups) of a layer before anything was cut from it: what the dense network has."""
    known: tuple[int, int, int] | None = getattr(module, "full_shape", None)
    if known is not None:
        return known
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features, 1
    return module.in_channels, module.out_channels, module.groups


def is_channels_last(model: nn.Module) -> bool:
    """Whether the weights lie channels-last: the kernels chosen, hence the last bits, depend on it."""
    told = [  # a weight of one input channel or one tap lies both ways at once
        p for p in model.parameters() if p.dim() == 4 and p.shape[1] > 1 and p.shape[2] * p.shape[3] > 1
    ]
    return bool(told) and all(p.is_contiguous(memory_format=torch.channels_last) for p in told)


def convbn_units(model: nn.Module) -> list[ConvBN]:
    """All ConvBN units of a plain network, in the order in which they run.

    Raises:
        SourceError: no unit at all, a shared convolution, a batch norm that does not follow a convolution, or a
            normalisation that is not batch norm.
    """
    gm = trace(model)
    pairs: dict[str, str] = {}
    nodes: dict[str, fx.Node] = {}
    for node in gm.graph.nodes:
        if node.op != "call_module":
            continue
        module = gm.get_submodule(node.target)
        if isinstance(module, nn.GroupNorm | nn.LayerNorm | nn.InstanceNorm2d):
            raise SourceError(f"{type(model).__name__}: {node.target} is a {type(module).__name__}; afds selects "
                              "channels where a batch norm follows a convolution. Choose a BN variant.")  # fmt: skip
        if not isinstance(module, nn.BatchNorm2d):
            continue
        before = tensor_inputs(node)[0]
        conv = gm.get_submodule(str(before.target)) if before.op == "call_module" else None
        if not isinstance(conv, nn.Conv2d) or len(before.users) != 1:
            raise SourceError(f"{type(model).__name__}: the batch norm {node.target} does not directly follow a "
                              "convolution of its own (pre-activation and densely connected networks do this). "
                              "afds cannot select there.")  # fmt: skip
        if before.target in pairs:
            raise SourceError(f"{type(model).__name__}: the convolution {before.target} is used twice.")
        if not module.affine or not module.track_running_stats:
            raise SourceError(f"{type(model).__name__}: the batch norm {node.target} has no affine part or no "
                              "running statistics.")  # fmt: skip
        pairs[str(before.target)] = str(node.target)
        nodes[str(before.target)] = before
    if not pairs:
        raise SourceError(f"{type(model).__name__}: no convolution followed by a batch norm was found in it. "
                          "afds needs a BN ConvNet, such as resnet50, vgg16_bn or mobilenetv2_100.")  # fmt: skip
    owner = {norm: name for name, norm in pairs.items()}
    units = []
    for name, norm in pairs.items():
        conv = gm.get_submodule(name)
        assert isinstance(conv, nn.Conv2d)
        depthwise = is_depthwise(conv)
        leaders = _leaders(gm, tensor_inputs(nodes[name])[0], owner) if depthwise else ()
        units.append(ConvBN(name, norm, depthwise and bool(leaders), leaders))
    return units


def _leaders(gm: fx.GraphModule, node: fx.Node, owner: dict[str, str]) -> tuple[str, ...]:
    """The units whose channels arrive at ``node``; empty when they cannot all be told."""
    if node.op == "call_module" and node.target in owner:
        return (owner[str(node.target)],)
    if (node.op == "call_function" and node.target in ADDS) or passes_channels(gm, node):
        found = [_leaders(gm, arg, owner) for arg in tensor_inputs(node)]
        return tuple(dict.fromkeys(n for names in found for n in names)) if found and all(found) else ()
    return ()


def _units_in_order(gm: fx.GraphModule) -> Iterator[fx.Node]:
    for node in gm.graph.nodes:
        if node.op == "call_module":
            module = gm.get_submodule(node.target)
            if getattr(module, "is_selective_unit", False) or isinstance(module, nn.Conv2d):
                yield node


def stage_ends(model: nn.Module, units: list[str]) -> list[str]:
    """The last unit of the last block of each stage: where AFD compares features (METHOD, AFD).

    A stage is what timm's ``feature_info`` calls one; the stem (no block) is left out, and where a stage ends in
    a residual addition its main branch counts, not its shortcut.

    Raises:
        SourceError: the model has no ``feature_info``.
    """
    info = getattr(model, "feature_info", None)
    entries = list(getattr(info, "info", info) or [])
    if not entries:
        raise SourceError(f"{type(model).__name__} does not say where its stages are (no feature_info).")
    gm = trace(model)
    order = list(gm.graph.nodes)
    depth: dict[fx.Node, int] = {}
    last: dict[fx.Node, str | None] = {}  # the deepest unit up to here
    for node in order:
        inputs = [n for n in node.all_input_nodes if n in depth]
        deepest = max(inputs, key=lambda n: depth[n], default=None)
        depth[node] = depth[deepest] if deepest is not None else 0
        last[node] = last[deepest] if deepest is not None else None
        if node.op == "call_module" and node.target in units:
            depth[node] += 1
            last[node] = str(node.target)
    ends: list[str] = []
    modules = [entry["module"] for entry in entries]
    # Where stages are modules that hold their units, an entry that holds none is the stem's activation; in VGG,
    # where every entry is a pooling layer, all of them end stages.
    holding = [m for m in modules if any(unit.startswith(m + ".") for unit in units)]
    for module in holding or modules:
        inside = [n for n in order if _owner_path(n, gm).startswith((module + ".", module + "\0"))]
        end = last[inside[-1]] if inside else None
        if end is not None and end != units[0] and end not in ends:
            ends.append(end)
    return ends


def residual_blocks(model: nn.Module) -> list[str]:
    """The modules whose forward ends in a residual sum, in order; empty for a network without such sums."""
    gm = trace(model)
    found: list[str] = []
    for node in gm.graph.nodes:
        if node.op == "call_function" and node.target in ADDS and len(tensor_inputs(node)) == 2:
            owner = _owner_path(node, gm)[:-1]
            if owner and owner not in found:
                found.append(owner)
    return found


def unit_roles(model: nn.Module) -> dict[str, str]:
    """`stem`, `inner`, `stream` (writes into a residual sum) or `shortcut` (its shallow branch), by unit."""
    gm = trace(model)
    depth: dict[fx.Node, int] = {}
    last: dict[fx.Node, str] = {}
    roles: dict[str, str] = {}
    for node in gm.graph.nodes:
        inputs = [n for n in node.all_input_nodes if n in depth]
        deepest = max(inputs, key=lambda n: depth[n], default=None)
        depth[node] = depth[deepest] if deepest is not None else 0
        if node.op == "call_module" and _is_unit(gm, node):
            roles[str(node.target)] = "inner" if roles else "stem"
            depth[node] += 1
            last[node] = str(node.target)
        elif deepest is not None and deepest in last and passes_channels(gm, node):
            last[node] = last[deepest]
        elif node.op == "call_function" and node.target in MULS and any(n in last for n in tensor_inputs(node)):
            last[node] = next(last[n] for n in tensor_inputs(node) if n in last)  # times a channel attention (SE)
        elif node.op == "call_module" and isinstance(gm.get_submodule(str(node.target)), nn.BatchNorm2d):
            last[node] = last[deepest]  # type: ignore[index]
        elif node.op == "call_function" and node.target in ADDS and len(tensor_inputs(node)) == 2:
            main, side = sorted(tensor_inputs(node), key=lambda n: -depth[n])
            if main in last and last[main] in roles:
                roles[last[main]] = "stream"
            if side in last and roles.get(last[side]) == "inner":
                roles[last[side]] = "shortcut"
    return roles


def padding_of(conv: nn.Conv2d, size: Sequence[int]) -> tuple[int, int, int, int]:
    """(left, right, top, bottom) that a convolution adds to maps of ``size`` (H, W).

    As many on both sides, or, spelled `same` or in timm's Conv2dSame of the tf_ networks, TensorFlow's: with an even
    size and a stride one more on the right and below.
    """
    if not isinstance(conv.padding, str) and type(conv).__name__ != "Conv2dSame":
        (height, width) = conv.padding
        return width, width, height, height
    pads: list[int] = []
    for i in (1, 0):
        span = (conv.kernel_size[i] - 1) * conv.dilation[i] + 1
        total = 0 if conv.padding == "valid" else max(
            0, (-(-size[i] // conv.stride[i]) - 1) * conv.stride[i] + span - size[i])  # fmt: skip
        pads += [total // 2, total - total // 2]
    return pads[0], pads[1], pads[2], pads[3]


def _is_unit(gm: fx.GraphModule, node: fx.Node) -> bool:
    module = gm.get_submodule(str(node.target))
    if getattr(module, "is_selective_unit", False):
        return True
    users = list(node.users)
    follower = users[0] if len(users) == 1 and users[0].op == "call_module" else None
    return isinstance(module, nn.Conv2d) and follower is not None and isinstance(
        gm.get_submodule(str(follower.target)), nn.BatchNorm2d
    )  # fmt: skip


def _owner_path(node: fx.Node, gm: fx.GraphModule) -> str:
    """Path of the module in which the node runs, closed with NUL so that prefixes compare whole names."""
    if node.op == "call_module":
        return str(node.target) + "\0"
    stack = node.meta.get("nn_module_stack")
    return (str(next(reversed(stack.values()))[0]) if stack else "") + "\0"
