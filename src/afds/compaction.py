"""What is never used is cut away: a smaller network with the same outputs.

::

    gate: kept  1 0 1 1      conv1 [4, C] -> [3, C]      its norm, bias, gate, predictor rows: 3
                  |          conv2 [N, 4] -> [N, 3]      its predictor's columns too, their constant into its bias
                  x          predictor rows of static channels: their saliency is a constant

    x --+--> conv1 --> conv2 --+--> sum --> ...          a sum ties its inputs: a channel of a residual stream goes
        '----------------------'                         only where *all* that write into the stream never use it

Channels that must keep the same places form a class: what enters and leaves a sum, a product, an activation, a
pooling, a depthwise convolution. A channel is cut where it is zero at every point of its class, for any image. A
unit that never uses a channel of a wider stream keeps it as a channel that is never active. Convolutions with groups
(ResNeXt, RegNet) and concatenations keep their widths.

Ours; the couplings are those that every structural pruner resolves (Fang et al., *DepGraph*, CVPR 2023), here on the
graph that the selection was built from. `static` freezes the selection to what the training images use, which gives
a plain, smaller network for any runtime.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from afds.errors import ConfigError
from afds.graph import ADDS, MULS, full_shape, is_channels_last, is_depthwise, is_sigmoid, passes_channels, trace
from afds.masks import observe
from afds.selection import FollowingGate, Gate, Predictor, SelectiveConvBN, gates, selective_units, winner_take_all

Index = Tensor | int  # channels to keep, or only how many (to rebuild the shape)


@dataclass
class Layer:
    """A module with channels to cut, and the classes of its input and output."""

    name: str
    module: nn.Module
    into: int
    out: int
    times: int = 1  # numbers per channel of the input: H W where a map was flattened


@dataclass
class Couplings:
    """Which channels belong together: classes by number."""

    layers: list[Layer] = field(default_factory=list)
    channels: dict[int, int] = field(default_factory=dict)
    """Channels of a class."""
    alive: dict[int, Tensor] = field(default_factory=dict)
    """(C,) bool of a class: not always zero. Classes that cannot be cut are not in it."""
    least: dict[int, int] = field(default_factory=dict)
    """Channels that must stay, where more than one must."""
    group: dict[int, int] = field(default_factory=dict)
    """So many neighbours go together or not at all, where more than one do."""

    def producers(self) -> dict[str, int]:
        """Class of what each convolution gives out."""
        kinds = (nn.Conv2d, SelectiveConvBN)
        return {layer.name: layer.out for layer in self.layers if isinstance(layer.module, kinds) and layer.out >= 0}

    def index(self, multiple_of: int = 1) -> dict[int, Tensor]:
        """The channels to keep of every class from which some go."""
        found = {n: _rounded(alive, self.least.get(n, 1), multiple_of, self.group.get(n, 1))
                 for n, alive in self.alive.items()}  # fmt: skip
        return {n: index for n, index in found.items() if len(index) < self.channels[n]}


def compact(model: nn.Module, *, multiple_of: int = 1) -> nn.Module:
    """A copy of ``model`` without what is never used; outputs as before up to rounding, still trainable.

    Args:
        model: a plain or a selective network.
        multiple_of: keep so many dead channels that every width that shrinks is a multiple of this (for runtimes
            that compute in blocks of 8 or 16 channels anyway).
    Raises:
        SourceError: the forward cannot be read.
    """
    model = copy.deepcopy(model)
    cut_away(model, multiple_of=multiple_of)
    return model


def cut_away(model: nn.Module, *, multiple_of: int = 1) -> None:
    """`compact`, in place: its parameters are new ones afterwards."""
    channels_last = is_channels_last(model)
    couplings = find_couplings(model)
    _cut(model, couplings, couplings.index(multiple_of))
    if channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for _, unit in selective_units(model):
        if isinstance(unit.gate, Gate):
            unit.gate.forget_static_rows()


def kept_channels(model: nn.Module) -> dict[str, Tensor]:
    """The channels that `compact` leaves of each convolution's output, by its path."""
    couplings = find_couplings(model)
    index = couplings.index()
    return {name: index.get(n, torch.arange(couplings.channels[n])) for name, n in couplings.producers().items()}


def widths(model: nn.Module) -> dict[str, int]:
    """Channels of every convolution that has been cut, by its path: what `narrow` needs."""
    found = {}
    for name, module in model.named_modules():
        name = name.removesuffix(".conv") if isinstance(_parent(model, name), SelectiveConvBN) else name
        if isinstance(module, nn.Conv2d) and module.out_channels != full_shape(module)[1]:
            found[name] = module.out_channels
    return found


def narrow(model: nn.Module, wanted: Mapping[str, Any]) -> None:
    """Give a plain network the widths that `widths` told, in place; its weights are undefined afterwards.

    Raises:
        ConfigError: a width that is no whole number within the network's own, a name that is no convolution, or
            widths that do not go together.
    """
    couplings = find_couplings(model)
    number = couplings.producers()
    chosen: dict[int, int] = {}
    for name, width in wanted.items():
        shown = f"width of {name[:80]!r}"
        if name not in number:
            raise ConfigError(f"{shown}: the network has no such convolution.")
        least, full = couplings.least.get(number[name], 1), couplings.channels[number[name]]
        if number[name] not in couplings.alive:
            raise ConfigError(f"{shown}: its channels cannot be cut.")
        if type(width) is not int or not least <= width < full:
            wanted_is = f"a whole number from {least} to {full - 1}"
            raise ConfigError(f"{shown} is {str(width)[:40]}, which should be {wanted_is}.")
        if chosen.setdefault(number[name], width) != width:
            raise ConfigError(f"{shown} is {width}, but channels that are tied to it number {chosen[number[name]]}.")
    for name, one in number.items():
        if one in chosen and name not in wanted:
            raise ConfigError(f"width of {name!r} is missing: its channels are tied to others that were cut.")
    _cut(model, couplings, dict(chosen))


# --- The static network


@torch.no_grad()
def freeze(model: nn.Module, batches: Iterable[Tensor]) -> nn.Module:
    """A copy of a selective network with one choice for all images: what these images use.

    In each unit stay the k channels that win most often, at their mean saliency (between equals the larger mean
    rank value), one by one also where they were chosen in groups; the others are pruned.

    Args:
        batches: training images (B, 3, H, W).
    """
    model = copy.deepcopy(model)
    moments = observe(model, batches)
    for name, gate in gates(model).items():
        m, k = moments[name], gate.k
        mean_C = m.mean_q.to(gate.gamma.dtype)
        worth_C = m.win_rate + 1e-3 * torch.softmax((mean_C * gate.importance).double(), 0)
        chosen_C = winner_take_all((worth_C * gate.kept * (mean_C > 0))[None], k)[0]
        gate.gamma.copy_(mean_C)
        gate.dynamic.fill_(False)
        gate.kept.copy_(chosen_C)
        gate.group, gate.density = 1, k / len(chosen_C)
    return model


def densify(model: nn.Module) -> nn.Module:
    """A copy of a network whose selection is static, with plain convolutions and batch norms in the units' place.

    Raises:
        ConfigError: a gate still chooses per image.
    """
    model = copy.deepcopy(model)
    found = list(selective_units(model))
    active = {id(unit.gate): _always(unit.gate) for _, unit in found if isinstance(unit.gate, Gate)}
    for name, unit in found:
        gate, (path, norm) = unit.gate, unit.plain
        if isinstance(gate, Gate):
            if bool((gate.dynamic & gate.kept).any()):
                raise ConfigError(f"{name} still chooses its channels per image; freeze() the network first.")
            scale_C, active_C = F.relu(gate.gamma) * gate.sign, active[id(gate)]
        else:
            active_C = torch.stack([active[id(leader)] for leader in gate.leaders]).any(0)
            active[id(gate)] = active_C
            scale_C = gate.gamma
        norm = copy.deepcopy(norm)
        norm.num_features = unit.norm.num_features
        norm.weight = nn.Parameter((scale_C * active_C).detach().clone())
        norm.bias = nn.Parameter((unit.beta * active_C).detach().clone())
        state = {key: value.clone() for key, value in unit.norm.state_dict().items()}
        norm.load_state_dict(state, strict=False, assign=True)
        _set(model, name, unit.conv)
        _set(model, path, norm.train(unit.norm.training))
    return model


def is_constant(model: nn.Module) -> bool:
    """Whether a selective network treats all images alike: no saliency is predicted (`--descent.scales learned`)."""
    return not any(bool((gate.dynamic & gate.kept).any()) for gate in gates(model).values())


def deployable(model: nn.Module) -> nn.Module:
    """The same function without what is never used: plain where nothing depends on the image, else still selective."""
    model = compact(model)
    return densify(model) if is_constant(model) else model


def static(model: nn.Module, batches: Iterable[Tensor], *, multiple_of: int = 1) -> nn.Module:
    """The plain, compacted network that always computes what the training images ``batches`` use most.

    Not the same function as ``model``'s: measure its accuracy.
    """
    return densify(compact(freeze(model, batches), multiple_of=multiple_of))


def _always(gate: Gate) -> Tensor:
    """(C,) bool: active for every image; of a gate without dynamic channels."""
    q_C = F.relu(gate.gamma.detach()) * gate.kept
    return winner_take_all((q_C * gate.importance)[None], gate.k, gate.group)[0]


# --- Who is tied to whom


class _Union:
    """Classes of nodes (union-find)."""

    def __init__(self) -> None:
        self.parent: dict[fx.Node, fx.Node] = {}

    def find(self, node: fx.Node) -> fx.Node:
        self.parent.setdefault(node, node)
        while self.parent[node] is not node:
            self.parent[node] = self.parent[self.parent[node]]
            node = self.parent[node]
        return node

    def join(self, one: fx.Node, other: fx.Node) -> None:
        self.parent[self.find(one)] = self.find(other)


def find_couplings(model: nn.Module) -> Couplings:
    """The classes of a network's channels, and which of them are always zero.

    Raises:
        SourceError: the forward cannot be read.
    """
    gm = trace(model)
    union, fixed = _Union(), set()
    alive: dict[fx.Node, Tensor] = {}
    sites: list[tuple[str, nn.Module, fx.Node, fx.Node, int]] = []
    for node in gm.graph.nodes:
        inputs = [i for i in node.all_input_nodes if i in alive]
        module = gm.get_submodule(str(node.target)) if node.op == "call_module" else None
        conv = module.conv if isinstance(module, SelectiveConvBN) else module
        if isinstance(conv, nn.Conv2d):
            assert module is not None
            if isinstance(module, SelectiveConvBN):
                alive[node] = _alive_after(module, alive[inputs[0]])
            else:
                alive[node] = torch.ones(conv.out_channels, dtype=torch.bool)
            if is_depthwise(conv):
                union.join(node, inputs[0])
            elif conv.groups > 1:
                fixed |= {node, inputs[0]}
            sites.append((str(node.target), module, inputs[0], node, 1))
        elif isinstance(module, nn.BatchNorm2d):
            alive[node] = ((module.weight != 0) | (module.bias != 0)).detach().cpu()
            union.join(node, inputs[0])
            sites.append((str(node.target), module, inputs[0], node, 1))
        elif isinstance(module, nn.Linear) and len(alive[inputs[0]]) and not (
            module.in_features % len(alive[inputs[0]])
        ):  # fmt: skip
            alive[node] = torch.ones(module.out_features, dtype=torch.bool)
            fixed.add(node)
            times = module.in_features // len(alive[inputs[0]])
            sites.append((str(node.target), module, inputs[0], node, times))
        elif type(module).__name__ == "ConvMlp":  # timm's VGG head, a leaf: two convolutions, never gated
            assert isinstance(module, nn.Module)
            alive[node] = torch.ones(module.fc2.out_channels, dtype=torch.bool)  # type: ignore
            fixed.add(node)
            sites.append((f"{node.target}.fc1", module.fc1, inputs[0], node, 1))  # type: ignore[arg-type]
        elif node.op == "call_function" and node.target in (*ADDS, *MULS) and len(inputs) == 2:
            for i in inputs:
                union.join(node, i)
            one, other = (alive[i] for i in inputs)
            if len(one) == len(other):
                alive[node] = one | other if node.target in ADDS else one & other
            else:
                fixed |= {node, *inputs}
                alive[node] = one[:0]
        elif inputs and (is_sigmoid(gm, node) or passes_channels(gm, node)):
            union.join(node, inputs[0])
            alive[node] = torch.ones_like(alive[inputs[0]]) if is_sigmoid(gm, node) else alive[inputs[0]]
        else:
            fixed |= {node, *node.all_input_nodes}
            alive[node] = torch.ones(3 if node.op == "placeholder" else 0, dtype=torch.bool)
    silent = {n for node in gm.graph.nodes if is_sigmoid(gm, node) for n in _only_multiplies(gm, node)}
    silent |= {into for _, module, into, _, _ in sites if isinstance(module, nn.BatchNorm2d) and len(into.users) == 1}
    return _number(union, fixed, alive, sites, silent)


def _number(
    union: _Union,
    fixed: set[fx.Node],
    alive: dict[fx.Node, Tensor],
    sites: list[tuple[str, nn.Module, fx.Node, fx.Node, int]],
    silent: set[fx.Node],
) -> Couplings:
    """Classes as numbers, with their channels and those of them that are ever used.

    silent: nodes that nothing sees but through another node of their class.
    """
    number: dict[fx.Node, int] = {}
    found = Couplings()
    closed = {union.find(node) for node in fixed}
    for node, alive_C in alive.items():
        n = number.setdefault(union.find(node), len(number))
        if union.find(node) not in closed and node not in silent:
            found.alive[n] = found.alive[n] | alive_C if n in found.alive else alive_C
        found.channels[n] = max(found.channels.get(n, 0), len(alive_C))
    for name, module, into, out, times in sites:
        leaf = isinstance(module, nn.Conv2d) and name != str(out.target)  # inside of a ConvMlp
        layer = Layer(name, module, number[union.find(into)], -1 if leaf else number[union.find(out)], times)
        found.layers.append(layer)
        conv = module.conv if isinstance(module, SelectiveConvBN) else module
        if isinstance(conv, nn.Conv2d) and is_depthwise(conv):
            found.least[layer.out] = 2  # one channel alone would no longer be told from an ordinary convolution
        if isinstance(module, SelectiveConvBN) and isinstance(module.gate, Gate) and module.gate.group > 1:
            found.group[layer.out] = module.gate.group
    return found


def _only_multiplies(gm: fx.GraphModule, node: fx.Node) -> list[fx.Node]:
    """The nodes from a convolution through a sigmoid to a product, where nothing else reads them.

    They make the factors of a channel attention (SE), which are never zero, but matter only where a channel is.
    """

    def is_product(n: fx.Node) -> bool:
        return n.op == "call_function" and n.target in MULS

    down, chain = node, [node]
    while len(down.users) == 1:
        down = next(iter(down.users))
        if is_product(down):
            break
        if not passes_channels(gm, down):
            return []
        chain.append(down)
    if not is_product(down):
        return []
    up = node
    while len(up.all_input_nodes) == 1:
        up = up.all_input_nodes[0]
        if len(up.users) != 1:
            return []
        chain.append(up)
        if up.op == "call_module" and isinstance(gm.get_submodule(str(up.target)), nn.Conv2d):
            return chain
    return []


def _alive_after(unit: SelectiveConvBN, arriving_C: Tensor) -> Tensor:
    gate = unit.gate
    if isinstance(gate, FollowingGate):
        return arriving_C
    if not bool((gate.dynamic & gate.kept).any()):
        return _always(gate).cpu()
    return (gate.kept & (gate.dynamic | (gate.gamma.detach() > 0))).cpu()


def _rounded(alive_C: Tensor, least: int, multiple_of: int, group: int) -> Tensor:
    """Indices of the channels to keep: those alive, at least ``least``, and dead ones up to a multiple.

    group: so many neighbours stay where one of them does.
    """
    if group > 1:
        alive_G = alive_C.unflatten(0, (-1, group)).any(1)
        kept = _rounded(alive_G, math.ceil(least / group), math.ceil(multiple_of / group), 1)
        return (kept[:, None] * group + torch.arange(group)).flatten()
    wanted = max(least, int(alive_C.sum()))
    wanted = min(len(alive_C), -(-wanted // multiple_of) * multiple_of)
    order = torch.argsort(~alive_C, stable=True)  # the living first
    return order[:wanted].sort().values


# --- Cutting


def _cut(model: nn.Module, couplings: Couplings, index: Mapping[int, Index]) -> None:
    """Cut every layer to the channels in ``index``, by class; a class that is not in it stays as it is."""
    for layer in couplings.layers:
        into, out = index.get(layer.into), index.get(layer.out)
        module = layer.module
        if into is None and out is None:
            continue
        if isinstance(module, SelectiveConvBN):
            _cut_unit(module, into, out)
        elif isinstance(module, nn.Conv2d):
            _cut_conv(module, into, out)
        elif isinstance(module, nn.BatchNorm2d):
            assert out is not None
            _cut_norm(module, out)
        elif isinstance(module, nn.Linear) and into is not None:
            _remember(module)
            before = module.in_features
            module.weight = _parameter(module.weight, 1, _spread(into, layer.times))
            module.in_features = module.weight.shape[1]
            for name in ("num_features", "head_hidden_size"):  # what timm's reset_classifier() goes by
                if getattr(model, name, None) == before:
                    setattr(model, name, module.in_features)


def _cut_unit(unit: SelectiveConvBN, into: Index | None, out: Index | None) -> None:
    conv, gate, (_, norm) = unit.conv, unit.gate, unit.plain
    if isinstance(gate, Gate):
        k = gate.k
        if into is not None:
            assert isinstance(into, Tensor)
            _cut_predictor_columns(gate.predictor, into)
        if out is not None:
            _cut_gate(gate, out, k)
    elif out is not None:
        gate.gamma = _parameter(gate.gamma, 0, out)
    _cut_conv(conv, into, out)
    if out is not None:
        _cut_norm(unit.norm, out)
        _cut_norm(norm, out)
        unit.beta = _parameter(unit.beta, 0, out)


def _cut_gate(gate: Gate, out: Index, k: int) -> None:
    assert isinstance(out, Tensor)
    predictor = gate.predictor
    rows = out
    if gate.predicted is not None:  # the predictor has only some rows left: those of them that stay
        places = gate.predicted.nonzero().flatten()
        rows = torch.isin(places, out.to(places.device)).nonzero().flatten()
        gate.predicted = _take(gate.predicted, 0, out)
    predictor.weight = _parameter(predictor.weight, 0, rows)
    predictor.bias = _parameter(predictor.bias, 0, rows)
    predictor.out_channels = len(predictor.bias)
    gate.gamma = _parameter(gate.gamma, 0, out)
    for name in ("sign", "dynamic", "kept", "importance"):
        setattr(gate, name, _take(getattr(gate, name), 0, out))
    gate.density = min(1.0, k / len(gate.sign))  # as many winners as before


@torch.no_grad()
def _cut_predictor_columns(predictor: Predictor, into: Tensor) -> None:
    """The channels that go arrive as zero: what the predictor makes of zero goes into its bias."""
    before, linear = predictor.in_channels, predictor.reduce
    weight = predictor.weight if linear is None else linear.weight
    into = into.to(weight.device)
    gone = torch.ones(before, dtype=torch.bool, device=weight.device)
    gone[into] = False
    scale = 1.0
    if predictor.standardise is not None:
        norm = predictor.standardise
        assert norm.running_mean is not None
        assert norm.running_var is not None
        scale = (len(into) / before) ** 0.5  # the sum over channels is divided by the root of their number
        zero_C = -norm.running_mean * (norm.running_var + norm.eps).rsqrt() * before**-0.5
        shift = weight[:, gone] @ zero_C[gone]
        predictor.bias.add_(shift if linear is None else predictor.weight @ shift)
        norm.running_mean, norm.running_var = _take(norm.running_mean, 0, into), _take(norm.running_var, 0, into)
        norm.num_features = len(into)
    cut = nn.Parameter(_take(weight.detach(), 1, into) * scale, requires_grad=weight.requires_grad)
    if linear is None:
        predictor.weight = cut
    else:
        linear.weight, linear.in_features = cut, len(into)
    predictor.in_channels = len(into)


def _cut_conv(conv: nn.Conv2d, into: Index | None, out: Index | None) -> None:
    _remember(conv)
    depthwise = is_depthwise(conv)
    if out is not None:
        conv.weight = _parameter(conv.weight, 0, out)
        if conv.bias is not None:
            conv.bias = _parameter(conv.bias, 0, out)
        conv.out_channels = conv.weight.shape[0]
    if into is not None and depthwise:
        conv.in_channels = conv.groups = conv.out_channels
    elif into is not None:
        conv.weight = _parameter(conv.weight, 1, into)
        conv.in_channels = conv.weight.shape[1]


def _cut_norm(norm: nn.BatchNorm2d, out: Index) -> None:
    for name in ("weight", "bias"):
        if getattr(norm, name) is not None:
            setattr(norm, name, _parameter(getattr(norm, name), 0, out))
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.running_mean, norm.running_var = _take(norm.running_mean, 0, out), _take(norm.running_var, 0, out)
    norm.num_features = len(norm.running_mean)


def _remember(module: nn.Conv2d | nn.Linear) -> None:
    module.full_shape = full_shape(module)  # type: ignore[assignment]


def _spread(index: Index, times: int) -> Index:
    """Channels of a map as places in its flattened form."""
    if isinstance(index, int):
        return index * times
    return (index[:, None] * times + torch.arange(times)).flatten()


def _take(tensor: Tensor, dim: int, index: Index) -> Tensor:
    if isinstance(index, int):
        shape = list(tensor.shape)
        shape[dim] = index
        return tensor.new_empty(shape)
    return tensor.detach().index_select(dim, index.to(tensor.device)).contiguous()


def _parameter(parameter: Tensor, dim: int, index: Index) -> nn.Parameter:
    return nn.Parameter(_take(parameter.detach(), dim, index), requires_grad=parameter.requires_grad)


def _parent(model: nn.Module, path: str) -> nn.Module:
    return model.get_submodule(path.rpartition(".")[0])


def _set(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
