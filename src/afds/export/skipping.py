"""A selective network as a program that skips: weights are gathered per image, only what was chosen is multiplied.

::

    x (K_in of C_in maps) --> mean --> predictor --> rank values --> TopK --> v, i
           |                                                               |
           '------> conv with W[i][:, i_in] * v, bias beta[i] [v>0] - mu[i] v, ReLU --> (K of C maps, i)

    stream (all C maps, no value below zero) --+--> block --> y (K maps, i)
                                               '--> stream[i] <- relu(stream[i] + y)        the rest is unchanged

k = ceil(d C) is fixed, so every shape is; only the indices differ from image to image, hence one image at a time.
Where channels are chosen in groups, weights are gathered by blocks of so many filters or columns, which lie together.
Inside of a block maps stay compact, from producer to consumer; a residual stream is dense and is updated where a block
has written. The rank value of a channel is its saliency times its importance; importance, the norm's variance and
gamma's sign are folded into the weights, the norm's mean into the bias.

The walk over the network is written once, for any set of elementary operations: `TorchOps` runs them,
`onnx_graph.OnnxOps` writes them down. What it gives is the masked PyTorch forward up to rounding.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from afds.errors import ExportError
from afds.graph import ADDS, MULS, ThreadTracer, is_sigmoid, padding_of, passes_channels, trace
from afds.selection import FollowingGate, Gate, SelectiveConvBN

Handle = Any  # a tensor that is there (TorchOps) or that will be (a name in an ONNX graph)


@dataclass(frozen=True)
class Map:
    """A feature map of one image, (1, C or K, H, W), or the vector that was made of it, (1, C or K)."""

    x: Handle
    channels: int
    """C, whatever x holds."""
    size: int
    """Numbers per channel: H W."""
    index: Handle | None = None
    """(K,) the channels that x holds; the others are zero. None: x holds all."""
    count: int = 0
    """K."""
    groups: Handle | None = None
    """(K / group,) the groups that these channels are, where they were chosen so."""
    group: int = 1
    """Channels of each."""
    mask: Handle | None = None
    """(K,) or (C,), 1.0 where a channel is active, 0.0 where it is not; None: all are."""
    positive: bool = False
    """No value is below zero."""
    mean: Handle | None = None
    """(1, C, 1, 1) its mean over H and W, where it is known already."""


class Ops(Protocol):
    """What a backend must be able to do. Constants are given as tensors."""

    def gather(self, x: Handle, index: Handle, axis: int) -> Handle: ...
    def conv(self, x: Handle, w: Handle, b: Handle | None, conv: nn.Conv2d, groups: int) -> Handle: ...
    def linear(self, x: Handle, wt: Handle, b: Handle | None, *, relu: bool = False) -> Handle:
        """(1, I), (I, O), (O,) -> (1, O)"""

    def top(self, x: Handle, k: int) -> tuple[Handle, Handle]:
        """(1, C) -> the k largest (k,), and where they are (k,)"""

    def mean(self, x: Handle) -> Handle:
        """(1, C, H, W) -> (1, C, 1, 1)"""

    def row(self, x: Handle) -> Handle:
        """(1, C, 1, 1) -> (1, C)"""

    def reshape(self, x: Handle, shape: tuple[int, ...]) -> Handle: ...
    def flat(self, x: Handle) -> Handle:
        """-> (n,)"""

    def column(self, x: Handle) -> Handle:
        """(n,) -> (1, n, 1, 1)"""

    def filters(self, x: Handle) -> Handle:
        """(n,) -> (n, 1, 1, 1)"""

    def add(self, a: Handle, b: Handle) -> Handle: ...
    def mul(self, a: Handle, b: Handle) -> Handle: ...
    def smaller(self, a: Handle, b: Handle) -> Handle: ...
    def larger(self, a: Handle, b: Handle) -> Handle: ...
    def sign(self, x: Handle) -> Handle: ...
    def relu(self, x: Handle) -> Handle: ...
    def put(self, x: Handle, index: Handle, y: Handle) -> Handle:
        """x (1, C, ...) with channels ``index`` replaced by y (1, K, ...)"""

    def put_flat(self, x: Handle, index: Handle, y: Handle) -> Handle:
        """The same in one dimension: (C,), (K,), (K,)"""

    def zeros(self, shape: tuple[int, ...]) -> Handle: ...
    def module(self, module: nn.Module, name: str, x: Handle) -> Handle:
        """Apply a module that computes no products: an activation, a pooling, a flattening."""

    def head(self, module: nn.Module, name: str, x: Handle, size: tuple[int, ...]) -> Handle:
        """timm's VGG head, on a map of that height and width."""

    def call(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Handle:
        """Apply a function or a method that computes no products."""


class Lowering:
    """Walks a selective network.

    Args:
        model: in eval mode; compact it first, what is never used is not worth gathering from.
        side: of the images, in pixels.
    Raises:
        SourceError: the forward cannot be read.
    """

    def __init__(self, model: nn.Module, side: int) -> None:
        self.gm = trace(model.eval())
        self.gates = {id(unit.gate): unit for _, unit in self._units()}
        with torch.no_grad():
            shapes = _Shapes(self.gm)
            shapes.run(torch.zeros(1, 3, side, side, device=next(model.parameters()).device))
        self.shapes = shapes.found
        # Asked of the modules themselves, once: while a program is traced they cannot be.
        self.passing = {node for node in self.gm.graph.nodes if passes_channels(self.gm, node)}
        self.keeping = {node for node in self.gm.graph.nodes if _keeps_sign(self.gm, node)}

    def _units(self) -> list[tuple[str, SelectiveConvBN]]:
        return [(n, m) for n, m in self.gm.named_modules() if isinstance(m, SelectiveConvBN)]

    def run(self, ops: Ops, image: Handle) -> Handle:
        """Logits (1, classes) of an image (1, 3, H, W)."""
        values: dict[fx.Node, Map] = {}
        for node in self.gm.graph.nodes:
            if node.op == "placeholder":
                values[node] = Map(image, 3, self._size(node))
            elif node.op == "output":
                (result,) = node.all_input_nodes
                return _dense(ops, values[result], self.shapes[result]).x
            elif node.op != "get_attr":
                values[node] = self._node(ops, node, values)
        raise AssertionError("a graph without output")

    def _size(self, node: fx.Node) -> int:
        size = 1
        for s in self.shapes[node][2:]:
            size *= s
        return size

    def _node(self, ops: Ops, node: fx.Node, values: dict[fx.Node, Map]) -> Map:
        inputs = [values[n] for n in node.all_input_nodes if n in values]
        module = self.gm.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, SelectiveConvBN):
            made = _unit(ops, module, inputs[0], self.shapes[node.all_input_nodes[0]], self._size(node))
            return _relu(ops, made) if _before_relu(self.gm, node) else made
        if isinstance(module, nn.Conv2d):
            return self._conv(ops, module, inputs[0], node)
        if isinstance(module, nn.Linear):
            x = _dense(ops, inputs[0], self.shapes[node.all_input_nodes[0]])
            bias = None if module.bias is None else module.bias.detach()
            return Map(ops.linear(x.x, module.weight.detach().t().contiguous(), bias), module.out_features, 1)
        if node.op == "call_function" and node.target in ADDS and len(inputs) == 2:
            return self._add(ops, node, *inputs)
        if node.op == "call_function" and node.target in MULS and len(inputs) == 2:
            return _multiply(ops, *inputs)
        if _is_relu(self.gm, node):
            return _relu(ops, inputs[0])
        if type(module).__name__ == "ConvMlp":
            assert module is not None
            x = _dense(ops, inputs[0], self.shapes[node.all_input_nodes[0]])
            y = ops.head(module, str(node.target), x.x, self._shape_before(node)[2:])
            return Map(y, self.shapes[node][1], self._size(node))
        same_channels = self.shapes[node][1] == inputs[0].channels if len(inputs) == 1 else False
        if len(inputs) == 1 and same_channels and (node in self.passing or is_sigmoid(self.gm, node)):
            x = inputs[0] if node in self.passing else _dense(ops, inputs[0], self._shape_before(node))
            if _is_mean(self.gm, node, self.shapes) and x.mean is not None and x.index is None:
                out = x.mean if len(self.shapes[node]) == 4 else ops.row(x.mean)
            else:
                out = self._apply(ops, node, x.x)
            keeps = x.positive and node in self.keeping
            return replace(x, x=out, size=self._size(node), positive=keeps, mean=None)
        if len(inputs) != 1:
            raise ExportError(f"{node.target}: not known how to skip around it; export with --static.")
        x = _dense(ops, inputs[0], self._shape_before(node))
        return Map(self._apply(ops, node, x.x), self.shapes[node][1], self._size(node))

    def _shape_before(self, node: fx.Node) -> tuple[int, ...]:
        return self.shapes[node.all_input_nodes[0]]

    def _apply(self, ops: Ops, node: fx.Node, x: Handle) -> Handle:
        if node.op == "call_module":
            return ops.module(self.gm.get_submodule(str(node.target)), str(node.target), x)
        args = tuple(x if isinstance(a, fx.Node) else a for a in node.args)
        return ops.call(node, args, dict(node.kwargs))

    def _conv(self, ops: Ops, conv: nn.Conv2d, x: Map, node: fx.Node) -> Map:
        """A convolution without a gate: all of its outputs, of the inputs that are there."""
        weight, bias = conv.weight.detach(), None if conv.bias is None else conv.bias.detach()
        if conv.groups > 1:
            x = _dense(ops, x, self._shape_before(node))
        w = _columns(ops, weight, x, conv.out_channels, conv)
        return Map(ops.conv(x.x, w, bias, conv, conv.groups), conv.out_channels, self._size(node))

    def _add(self, ops: Ops, node: fx.Node, one: Map, other: Map) -> Map:
        """A residual sum: what is compact is added into what is dense."""
        if one.index is None and other.index is None:
            return Map(ops.add(one.x, other.x), one.channels, one.size, mask=_union(ops, one, other),
                       positive=one.positive and other.positive)  # fmt: skip
        if one.index is None or (other.index is not None and one.count > other.count):
            stream, y = one, other
        else:
            stream, y = other, one
        stream = _dense(ops, stream, self.shapes[node])
        total = ops.add(ops.gather(stream.x, y.index, 1), y.x)
        fused = stream.positive and _before_relu(self.gm, node)
        total = ops.relu(total) if fused else total
        mask = None
        if stream.mask is not None:
            ones = y.mask if y.mask is not None else torch.ones(y.count)
            mask = ops.put_flat(stream.mask, y.index, ops.larger(ops.gather(stream.mask, y.index, 0), ones))
        mean = None
        if fused:
            before = stream.mean if stream.mean is not None else ops.mean(stream.x)
            mean = ops.put(before, y.index, ops.mean(total))
        positive = fused or (stream.positive and y.positive)
        return Map(ops.put(stream.x, y.index, total), one.channels, one.size, mask=mask, positive=positive, mean=mean)


def _unit(ops: Ops, unit: SelectiveConvBN, x: Map, shape: tuple[int, ...], size: int) -> Map:
    """One selective ConvBN, before its ReLU."""
    conv, norm, gate = unit.conv, unit.norm, unit.gate
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale_C = (norm.running_var.double() + norm.eps).rsqrt()
    mean_C = norm.running_mean.double() - (0 if conv.bias is None else conv.bias.detach().double())
    weight, beta_C = conv.weight.detach().double(), unit.beta.detach()
    if isinstance(gate, FollowingGate):
        scale_C = scale_C * gate.gamma.detach().double()
        weight = (weight * scale_C[:, None, None, None]).float()
        return _follow(ops, conv, weight, (beta_C.double() - mean_C * scale_C).float(), x, size)
    if gate.k == conv.out_channels and not bool((gate.dynamic & gate.kept).any()):
        return _constant(ops, unit, weight, scale_C, mean_C, x if conv.groups == 1 else _dense(ops, x, shape), size)
    scale_C = scale_C * gate.sign.double() / gate.importance.double()
    weight = (weight * scale_C[:, None, None, None]).float()
    mean_C = (-mean_C * scale_C).float()
    if conv.groups > 1:
        return _grouped(ops, unit, weight, mean_C, _dense(ops, x, shape), size)
    rank = _rank(ops, gate, x)
    k, groups = gate.k, None
    if k == conv.out_channels:  # nothing is suppressed: the weights need no gathering by rows
        v, index, rows, beta, shift = ops.flat(rank), None, weight, beta_C, mean_C
    else:
        v, index, groups = _top(ops, gate, rank)
        beta, shift = (ops.gather(table, index, 0) for table in (beta_C, mean_C))
        if groups is None:
            rows = ops.gather(weight, index, 0)
        else:
            blocks = ops.gather(weight.unflatten(0, (-1, gate.group)), groups, 0)
            rows = ops.reshape(blocks, (k, *weight.shape[1:]))
    rows = _columns(ops, rows, x, k, conv)
    active = ops.sign(v)
    bias = ops.add(ops.mul(active, beta), ops.mul(v, shift))
    arriving = x.count if x.index is not None else conv.in_channels
    taps = conv.kernel_size[0] * conv.kernel_size[1]
    if (index is None and x.index is None) or arriving * taps > 3 * size:  # scale what is smaller
        y = ops.conv(x.x, rows, None, conv, 1)
        y = ops.add(ops.mul(y, ops.column(v)), ops.column(bias))
    else:
        y = ops.conv(x.x, ops.mul(rows, ops.filters(v)), bias, conv, 1)
    return Map(y, conv.out_channels, size, index, k if index is not None else 0, groups, gate.group, active)


def _top(ops: Ops, gate: Gate, rank: Handle) -> tuple[Handle, Handle, Handle | None]:
    """The rank values of the k winners (k,), which channels they are (k,), and which groups (k / group,)."""
    if gate.group == 1:
        return *ops.top(rank, gate.k), None
    size, channels = gate.group, gate.sign.numel()
    blocks = ops.reshape(rank, (channels // size, size))
    _, groups = ops.top(ops.linear(blocks, torch.ones(size, 1), None), gate.k // size)
    members = torch.arange(channels).unflatten(0, (-1, size))
    return ops.flat(ops.gather(blocks, groups, 0)), ops.flat(ops.gather(members, groups, 0)), groups


def _columns(ops: Ops, rows: Handle, x: Map, count: int, conv: nn.Conv2d) -> Handle:
    """Of so many filters (count, C_in, H, W) the inputs that are there."""
    if x.index is None:
        return rows
    if x.groups is None:
        return ops.gather(rows, x.index, 1)
    window = conv.kernel_size
    blocks = ops.reshape(rows, (count, x.channels // x.group, x.group * window[0] * window[1]))
    return ops.reshape(ops.gather(blocks, x.groups, 1), (count, x.count, *window))


def _constant(
    ops: Ops, unit: SelectiveConvBN, weight: Tensor, scale_C: Tensor, mean_C: Tensor, x: Map, size: int
) -> Map:
    """A unit that treats all images alike and suppresses nothing: a plain convolution, its scales in the weights."""
    conv, gate = unit.conv, unit.gate
    assert isinstance(gate, Gate)
    v_C = F.relu(gate.gamma.detach().double()) * gate.kept
    active_C = (v_C * gate.importance > 0).double()
    scale_C = scale_C * gate.sign * v_C * active_C
    bias_C = (unit.beta.detach() * active_C - mean_C * scale_C).float()
    rows = _columns(ops, (weight * scale_C[:, None, None, None]).float(), x, conv.out_channels, conv)
    mask = None if bool(active_C.all()) else active_C.float()
    return Map(ops.conv(x.x, rows, bias_C, conv, conv.groups), conv.out_channels, size, mask=mask)


def _rank(ops: Ops, gate: Gate, x: Map) -> Handle:
    """(1, C_out): saliency times importance, 0 where a channel is pruned."""
    p, importance_C = gate.predictor, gate.importance.double()
    fixed_C = F.relu(gate.gamma.detach().double())
    dynamic_C = gate.dynamic & gate.kept
    rows = dynamic_C if gate.predicted is None else dynamic_C[gate.predicted]
    first = (p.weight if p.reduce is None else p.reduce.weight).detach().double()
    shift = torch.zeros(first.shape[0], dtype=torch.double, device=first.device)
    if p.standardise is not None:
        norm = p.standardise
        assert norm.running_mean is not None
        assert norm.running_var is not None
        first = first * (norm.running_var.double() + norm.eps).rsqrt() * first.shape[1] ** -0.5
        shift = -first @ norm.running_mean.double()
    weight = p.weight.detach().double()
    if p.reduce is None:  # (O, I)
        second, first, bias = None, first[rows], p.bias.detach().double()[rows] + shift[rows]
    else:
        second, bias = weight[rows], p.bias.detach().double()[rows] + weight[rows] @ shift
    into = _spread(first if second is None else second, dynamic_C) * importance_C[:, None]
    bias = torch.where(dynamic_C, _spread(bias, dynamic_C), fixed_C) * importance_C * gate.kept
    ceiling = torch.where(dynamic_C, p.ceiling.double(), fixed_C) * importance_C
    ceiling = ceiling.clamp_max(torch.finfo(torch.float32).max).float()
    if not bool(dynamic_C.any()):
        return ops.add(torch.zeros(1, len(bias)), bias.float())
    mean = x.mean if x.mean is not None and x.index is None else ops.mean(x.x)
    pooled = ops.row(mean)
    wt = (into if second is None else first).t().float().contiguous()
    wt = wt if x.index is None else ops.gather(wt, x.index, 0)
    if second is None:
        h = ops.linear(pooled, wt, bias.float(), relu=True)
    else:
        h = ops.linear(ops.linear(pooled, wt, None), into.t().float().contiguous(), bias.float(), relu=True)
    return h if not bool(p.ceiling < 1e30) else ops.smaller(h, ceiling[None])


def _spread(rows: Tensor, places: Tensor) -> Tensor:
    """Rows at the places where there are some, zeros elsewhere."""
    out = rows.new_zeros(len(places), *rows.shape[1:])
    out[places] = rows
    return out


def _follow(ops: Ops, conv: nn.Conv2d, weight: Tensor, bias_C: Tensor, x: Map, size: int) -> Map:
    """A depthwise unit: the channels that arrive, each with its own filter."""
    bias: Handle = bias_C
    w: Handle = weight
    if x.index is not None:
        w, bias = ops.gather(weight, x.index, 0), ops.gather(bias_C, x.index, 0)
    bias = bias if x.mask is None else ops.mul(x.mask, bias)
    y = ops.conv(x.x, w, bias, conv, x.count if x.index is not None else conv.groups)
    return replace(x, x=y, size=size, positive=False, mean=None)


def _grouped(ops: Ops, unit: SelectiveConvBN, weight: Tensor, mean_C: Tensor, x: Map, size: int) -> Map:
    """A convolution in groups: winners differ between them, so it is computed whole and masked."""
    gate, conv = unit.gate, unit.conv
    assert isinstance(gate, Gate)
    rank = _rank(ops, gate, x)
    if gate.k < conv.out_channels:
        v, index, _ = _top(ops, gate, rank)
        rank = ops.put_flat(ops.zeros((conv.out_channels,)), index, v)
    v, beta_C = ops.flat(rank), unit.beta.detach()
    active = ops.sign(v)
    y = ops.conv(x.x, weight, mean_C, conv, conv.groups)
    y = ops.add(ops.mul(y, ops.column(v)), ops.column(ops.mul(active, beta_C)))
    return Map(y, conv.out_channels, size, mask=active)


def _multiply(ops: Ops, one: Map, other: Map) -> Map:
    """A channel attention: its factors where the map has channels."""
    if one.index is None and other.index is None:
        return replace(one, x=ops.mul(one.x, other.x), positive=one.positive and other.positive, mean=None,
                       size=max(one.size, other.size))  # fmt: skip
    compact, dense = (one, other) if one.index is not None else (other, one)
    if dense.index is not None:
        if dense.index is not compact.index:
            raise ExportError("a product of two different selections cannot be exported; export with --static.")
        factor = dense.x
    else:
        factor = ops.gather(dense.x, compact.index, 1)
    return replace(compact, x=ops.mul(compact.x, factor), positive=compact.positive and dense.positive, mean=None,
                   size=max(one.size, other.size))  # fmt: skip


def _relu(ops: Ops, x: Map) -> Map:
    return x if x.positive else replace(x, x=ops.relu(x.x), positive=True, mean=None)


def _dense(ops: Ops, x: Map, shape: tuple[int, ...]) -> Map:
    """All channels, those that were not chosen as zeros."""
    if x.index is None:
        return x
    mask = None
    ones = x.mask if x.mask is not None else torch.ones(x.count)
    mask = ops.put_flat(ops.zeros((x.channels,)), x.index, ones)
    return Map(ops.put(ops.zeros(tuple(shape)), x.index, x.x), x.channels, x.size, mask=mask, positive=x.positive)


def _union(ops: Ops, one: Map, other: Map) -> Handle | None:
    if one.mask is None or other.mask is None:
        return None
    return ops.larger(one.mask, other.mask)


def _is_relu(gm: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_module":
        return type(gm.get_submodule(str(node.target))) is nn.ReLU
    return node.target in (F.relu, torch.relu, "relu", "relu_")


def _before_relu(gm: fx.GraphModule, node: fx.Node) -> bool:
    return len(node.users) == 1 and _is_relu(gm, next(iter(node.users)))


def _is_mean(gm: fx.GraphModule, node: fx.Node, shapes: dict[fx.Node, tuple[int, ...]]) -> bool:
    """Whether the node is the mean over H and W."""
    if node.op == "call_module":
        module = gm.get_submodule(str(node.target))
        return type(module).__name__ == "FastAdaptiveAvgPool" or (
            isinstance(module, nn.AdaptiveAvgPool2d) and module.output_size in (1, (1, 1))
        )
    axes = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
    return node.target in ("mean", torch.mean) and axes in ((2, 3), [2, 3], (-2, -1))


def _keeps_sign(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether what is not negative stays so; all of these do, but for activations that may dip below zero."""
    if node.op != "call_module":
        return True
    module = gm.get_submodule(str(node.target))
    with torch.no_grad():
        probe = torch.linspace(0, 10, 64).reshape(1, 1, 8, 8)
        try:
            return bool((module(probe) >= 0).all())
        except Exception:
            return False


class _Shapes(fx.Interpreter):
    """Shapes of every tensor in the graph."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self.found: dict[fx.Node, tuple[int, ...]] = {}

    def run_node(self, n: fx.Node) -> Any:
        out = super().run_node(n)
        if isinstance(out, Tensor):
            self.found[n] = tuple(out.shape)
        return out


class TorchOps:
    """The operations, done at once."""

    def gather(self, x: Tensor, index: Tensor, axis: int) -> Tensor:
        return x.index_select(axis, index)

    def conv(self, x: Tensor, w: Tensor, b: Tensor | None, conv: nn.Conv2d, groups: int) -> Tensor:
        if type(conv) is nn.Conv2d:
            return F.conv2d(x, w, b, conv.stride, conv.padding, conv.dilation, groups)
        pads = same_padding(conv, x.shape[-2:])
        return F.conv2d(F.pad(x, pads), w, b, conv.stride, 0, conv.dilation, groups)

    def linear(self, x: Tensor, wt: Tensor, b: Tensor | None, *, relu: bool = False) -> Tensor:
        y = F.linear(x, wt.t(), b)
        return F.relu(y) if relu else y

    def top(self, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
        found = x.flatten().topk(k, sorted=False)
        return found[0], found[1]

    def mean(self, x: Tensor) -> Tensor:
        return x.mean((2, 3), keepdim=True)

    def row(self, x: Tensor) -> Tensor:
        return x.flatten(1)

    def reshape(self, x: Tensor, shape: tuple[int, ...]) -> Tensor:
        return x.reshape(shape)

    def flat(self, x: Tensor) -> Tensor:
        return x.reshape(-1)

    def column(self, x: Tensor) -> Tensor:
        return x[None, :, None, None]

    def filters(self, x: Tensor) -> Tensor:
        return x[:, None, None, None]

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b

    def mul(self, a: Tensor, b: Tensor) -> Tensor:
        return a * b

    def smaller(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.minimum(a, b)

    def larger(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.maximum(a, b)

    def sign(self, x: Tensor) -> Tensor:
        return x.sign()

    def relu(self, x: Tensor) -> Tensor:
        return F.relu(x)

    def put(self, x: Tensor, index: Tensor, y: Tensor) -> Tensor:
        return x.index_copy(1, index, y)

    def put_flat(self, x: Tensor, index: Tensor, y: Tensor) -> Tensor:
        return x.index_copy(0, index, y)

    def zeros(self, shape: tuple[int, ...]) -> Tensor:
        return torch.zeros(shape)

    def module(self, module: nn.Module, name: str, x: Tensor) -> Tensor:
        return module(x)

    def head(self, module: nn.Module, name: str, x: Tensor, size: tuple[int, ...]) -> Tensor:
        return module(x)

    def call(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        assert callable(node.target)
        return node.target(*args, **kwargs)


def same_padding(conv: nn.Conv2d, size: Any) -> tuple[int, int, int, int]:
    """(left, right, top, bottom) of TensorFlow's padding, which timm's tf_ networks carry on.

    Raises:
        ExportError: a convolution of a kind that is not known.
    """
    if type(conv).__name__ != "Conv2dSame":
        raise ExportError(f"a {type(conv).__name__} cannot be exported with its selection; export with --static.")
    return padding_of(conv, size)


class _Program(nn.Module):
    def __init__(self, model: nn.Module, side: int) -> None:
        super().__init__()
        self.network = model
        self._lowering = (Lowering(model, side),)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self._lowering[0].run(TorchOps(), x_BCHW)


class _ConstantTracer(ThreadTracer):
    """Weights are folded while tracing: they are values, not symbols."""

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        return attr_val

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


@torch.no_grad()
def skipping_network(model: nn.Module, side: int) -> fx.GraphModule:
    """The program as a PyTorch module: one image (1, 3, side, side) in, logits (1, classes) out.

    Args:
        model: a selective network; compact it first. Its weights are constants of the program.
    """
    program = _Program(model.eval(), side)
    return fx.GraphModule(program, _ConstantTracer().trace(program), "SkippingNetwork").eval()
