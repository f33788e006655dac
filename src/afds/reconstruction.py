"""Reconstruction: after channels were taken away, what is left is refitted by least squares (ours).

::

    image --+--> reference, d = 1  --> T = F_l(x, theta*), or stream* - other branch ---+
            |                                                                           +--> min_W ||X W - Z||^2
            +--> network, just cut --> X = patches that arrive at the convolution of l -+        + r ||W - W0||^2

    Z = (T - beta) / E[pi] * sigma + mu      the convolution's output that would give T
    W = W0 + (X'X/n + r mean(diag X'X/n) I)^-1  X'(Z - X W0)/n      X, Z centred: batch norm takes the mean

Layer after layer in the order in which they run, each on the activations that the layers before it now give: the
channels that remain learn to say what the missing ones said. Closed form, crops of training images, no labels,
no gradient.
He et al., *Channel Pruning for Accelerating Very Deep Neural Networks*, ICCV 2017; Luo et al., *ThiNet*, ICCV 2017.
Ours: on gated inputs, whose zeros differ from image to image; and what writes into a residual sum aims at the sum,
so that it makes up for what the other branch has lost. Why: one pass of it gives back more than epochs of SGD do
(docs/accuracy.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from afds.graph import ADDS, padding_of, tensor_inputs, trace
from afds.selection import FollowingGate, SelectiveConvBN

ROWS = 24_000  # of X, per layer: positions of all images together (with half of it the KL is 1.09, not 1.00)
MEMORY = 3 * 2**30  # bytes of feature maps that are kept at a time


class Reconstruction:
    """What a reference computes on some images, read once, and networks refitted to it as often as asked."""

    @torch.no_grad()
    def __init__(self, reference: nn.Module, batches: Sequence[Tensor], *, rows: int = ROWS) -> None:
        """
        Args:
            reference: a network with selection, at d = 1.
            batches: images (B, 3, H, W); fewer are used where their feature maps would take over `MEMORY`.
            rows: positions, of all images together, on which each layer is fitted.
        """
        was_training = reference.training
        reference.eval()
        graph = trace(reference)
        self.batches = _what_fits(graph, batches)
        self._seen = _Positions(max(1, rows // sum(len(x_BCHW) for x_BCHW in self.batches)))
        aims = {aim.name: unit for unit, aim in _aims(graph).items()}
        self._wanted = _read(graph, aims, self.batches, self._seen)
        reference.train(was_training)

    @torch.no_grad()
    def __call__(
        self,
        network: nn.Module,
        *,
        ridge: float = 0.1,
        channels: Mapping[str, Tensor] | None = None,
        told: Callable[[int, int], None] | None = None,
    ) -> dict[str, tuple[float, float]]:
        """Refit every ungrouped convolution of ``network`` to what the reference computes.

        Args:
            network: the reference with channels taken away: at lower densities, or cut. Its convolutions and batch
                norm statistics are changed.
            ridge: how strongly the weights are held where they were, as a share of the inputs' mean power.
            channels: of a cut network, the reference's channels that each unit still has.
            told: hears how many of how many units have been refitted.
        Returns:
            Per unit, the share of its aim's variance left unexplained before and after.
        """
        was_training = network.training
        network.eval()
        graph = trace(network)
        aims = _aims(graph)
        walks = [_Walk(graph, x_BCHW) for x_BCHW in self.batches]
        left: dict[str, tuple[float, float]] = {}
        refitted = 0
        for node in graph.graph.nodes:
            unit = graph.get_submodule(str(node.target)) if node.op == "call_module" else None
            if isinstance(unit, SelectiveConvBN):
                name = str(node.target)
                inputs = [walk.env[tensor_inputs(node)[0]] for walk in walks]
                if unit.conv.groups > 1:
                    _measure_norm(unit, inputs)
                else:
                    here = channels[name] if channels is not None else slice(None)
                    targets = [t[:, here].float() for t in self._wanted[name]]
                    if aims[name] is not node:  # a residual sum: what the other branch gives is not this unit's to give
                        targets = [t - self._seen.sample(walk.env[_other(aims[name], walk.env)], name)
                                   for t, walk in zip(targets, walks, strict=True)]  # fmt: skip
                    left[name] = _refit(unit, inputs, targets, self._seen.at[name], ridge)
                if told is not None:
                    refitted += 1
                    told(refitted, len(aims))
            for walk in walks:
                walk.step(node)
        network.train(was_training)
        return left


class _Walk:
    """One batch on its way through the network, node by node; maps that nobody reads again are let go.

    Batches take each node in turn, so what a gate chose last may be of another batch: each walk keeps its own choices
    for the depthwise units that follow.
    """

    def __init__(self, graph: fx.GraphModule, x_BCHW: Tensor) -> None:
        self._interpreter = fx.Interpreter(graph)
        self._interpreter.args_iter = iter([x_BCHW])
        self._graph = graph
        self._last_use = {used: node for node in graph.graph.nodes for used in node.all_input_nodes}
        self._chosen: dict[nn.Module, Tensor | None] = {}

    @property
    def env(self) -> dict[fx.Node, Any]:
        return self._interpreter.env

    def step(self, node: fx.Node) -> None:
        unit = self._graph.get_submodule(str(node.target)) if node.op == "call_module" else None
        gate = unit.gate if isinstance(unit, SelectiveConvBN) else None
        if isinstance(gate, FollowingGate):
            for leader in gate.leaders:
                leader.latest.active_BC = self._chosen[leader]
        self.env[node] = self._interpreter.run_node(node)
        if gate is not None:
            self._chosen[gate] = gate.active_BC
        for used in node.all_input_nodes:
            if self._last_use[used] is node:
                del self.env[used]


def _what_fits(graph: fx.GraphModule, batches: Sequence[Tensor]) -> list[Tensor]:
    """As many of the images as `MEMORY` holds at the widest place of the network; at least one batch."""
    walk, most = _Walk(graph, batches[0][:1]), 0
    for node in graph.graph.nodes:
        walk.step(node)
        most = max(most, sum(v.numel() * v.element_size() for v in walk.env.values() if isinstance(v, Tensor)))
    room = max(1, MEMORY // max(1, most))
    kept: list[Tensor] = []
    for x_BCHW in batches:
        if kept and sum(map(len, kept)) + len(x_BCHW) > room:
            break
        kept.append(x_BCHW)
    return kept


def _aims(graph: fx.GraphModule) -> dict[str, fx.Node]:
    """Where each unit's aim is read: itself, or the residual sum it writes where the other branch has run before."""
    order = {node: i for i, node in enumerate(graph.graph.nodes)}
    aims: dict[str, fx.Node] = {}
    for node in graph.graph.nodes:
        if node.op != "call_module" or not isinstance(graph.get_submodule(str(node.target)), SelectiveConvBN):
            continue
        end = node
        while len(end.users) == 1 and _is_identity(graph, next(iter(end.users))):
            end = next(iter(end.users))
        reader = next(iter(end.users)) if len(end.users) == 1 else None
        aims[str(node.target)] = node
        if reader is not None and reader.op == "call_function" and reader.target in ADDS:
            others = [n for n in tensor_inputs(reader) if n is not end]
            if len(others) == 1 and order[others[0]] < order[node]:
                aims[str(node.target)] = reader
    return aims


def _is_identity(graph: fx.GraphModule, node: fx.Node) -> bool:
    return node.op == "call_module" and isinstance(graph.get_submodule(str(node.target)), nn.Identity)


def _other(total: fx.Node, env: dict[fx.Node, Any]) -> fx.Node:
    return next(n for n in tensor_inputs(total) if n in env)


@dataclass
class _Positions:
    """Where each unit's maps are looked at: the same places in both networks and in all images."""

    each: int  # of one image

    def __post_init__(self) -> None:
        self.at: dict[str, Tensor] = {}
        self._generator = torch.Generator().manual_seed(0)

    def sample(self, y_BCHW: Tensor, unit: str) -> Tensor:
        """(B P, C) of the P places."""
        area = y_BCHW.shape[2] * y_BCHW.shape[3]
        if unit not in self.at:
            places = torch.randperm(area, generator=self._generator)[: self.each]
            self.at[unit] = places.to(y_BCHW.device)
        return y_BCHW.flatten(2)[:, :, self.at[unit]].transpose(1, 2).reshape(-1, y_BCHW.shape[1])


def _read(
    graph: fx.GraphModule, units: dict[str, str], batches: Sequence[Tensor], seen: _Positions
) -> dict[str, list[Tensor]]:
    """The reference's values at the aims, per unit and batch, in half precision, as all layers' are kept at once."""
    wanted: dict[str, list[Tensor]] = {}
    for x_BCHW in batches:
        walk = _Walk(graph, x_BCHW)
        for node in graph.graph.nodes:
            walk.step(node)
            if node.name in units:
                unit = units[node.name]
                wanted.setdefault(unit, []).append(seen.sample(walk.env[node], unit).half())
    return wanted


def patches(conv: nn.Conv2d, x_BCHW: Tensor, at_P: Tensor) -> Iterator[Tensor]:
    """For each of the P places what the convolution sees there: (B, C kh kw)."""
    (kh, kw), (sh, sw), (dh, dw) = conv.kernel_size, conv.stride, conv.dilation
    padded = F.pad(x_BCHW, padding_of(conv, x_BCHW.shape[-2:]))
    width = (padded.shape[3] - dw * (kw - 1) - 1) // sw + 1
    for place in at_P.tolist():
        row, column = place // width * sh, place % width * sw
        yield padded[:, :, row : row + dh * (kh - 1) + 1 : dh, column : column + dw * (kw - 1) + 1 : dw].flatten(1)


def gram(x_ND: Tensor, *, least: int = 128) -> Tensor:
    """X'X (D, D), of which only half is computed, in blocks of at least so many columns.

    Ours: two thirds of the time that choosing channels takes is in this product; this takes 0.56 of it at D = 4608.
    """
    d = x_ND.shape[1]
    if d < 2 * least:
        return x_ND.t() @ x_ND
    half, out_DD = d // 2, x_ND.new_empty(d, d)
    one, other = x_ND[:, :half], x_ND[:, half:]
    out_DD[:half, :half] = gram(one, least=least)
    out_DD[half:, half:] = gram(other, least=least)
    torch.mm(one.t(), other, out=out_DD[:half, half:])
    out_DD[half:, :half] = out_DD[:half, half:].t()
    return out_DD


def _refit(
    unit: SelectiveConvBN, inputs: list[Tensor], targets: list[Tensor], at_P: Tensor, ridge: float
) -> tuple[float, float]:
    conv, norm = unit.conv, unit.norm
    assert norm.running_mean is not None
    assert norm.running_var is not None
    pi_BC = torch.cat([unit.gate(x_BCHW) for x_BCHW in inputs])
    wins_C = (pi_BC != 0).sum(0)
    mean_pi_C = pi_BC.sum(0) / wins_C.clamp_min(1)
    used = (wins_C > 0) & (mean_pi_C.abs() > 1e-3)
    x_ND = torch.cat([torch.stack(list(patches(conv, x_BCHW, at_P)), 1).flatten(0, 1) for x_BCHW in inputs])
    alive = (x_ND != 0).any(0)
    if not bool(used.any()) or not bool(alive.any()) or len(x_ND) < 2:  # a single position has no spread
        return 1.0, 1.0
    x_ND = x_ND[:, alive]
    std_C, mu_C = (norm.running_var + norm.eps).sqrt(), norm.running_mean
    z_NC = (torch.cat(targets)[:, used] - unit.beta[used]) / mean_pi_C[used] * std_C[used] + mu_C[used]
    whole_DC = conv.weight.flatten(1).t().clone()
    w_DC = whole_DC[alive][:, used]
    miss_NC = z_NC - x_ND @ w_DC
    miss_NC = miss_NC - miss_NC.mean(0)
    centred_ND = x_ND - x_ND.mean(0)
    gram_DD = gram(centred_ND) / len(x_ND)
    gram_DD.diagonal().add_(ridge * gram_DD.diagonal().mean().clamp_min(1e-12))
    factor, failed = torch.linalg.cholesky_ex(gram_DD)
    if int(failed) or not bool(torch.isfinite(factor).all()):
        return 1.0, 1.0  # not a number somewhere above: the training loop will say so
    w_DC = w_DC + torch.cholesky_solve(centred_ND.t() @ miss_NC / len(x_ND), factor)
    d, c = alive.nonzero()[:, 0], used.nonzero()[:, 0]
    whole_DC[d[:, None], c[None]] = w_DC
    conv.weight.copy_(whole_DC.t().reshape(conv.weight.shape))
    y_NC = x_ND @ w_DC
    bias_C = conv.bias[used] if conv.bias is not None else 0.0
    norm.running_mean[used], norm.running_var[used] = y_NC.mean(0) + bias_C, y_NC.var(0)
    power = z_NC.var(0).mean().clamp_min(1e-12)
    return float(miss_NC.var(0).mean() / power), float((z_NC - y_NC).var(0).mean() / power)  # a bias varies nothing


def _measure_norm(unit: SelectiveConvBN, inputs: list[Tensor]) -> None:
    """A grouped convolution keeps its weights; its batch norm follows what now arrives."""
    maps = torch.cat([unit.conv(x_BCHW).transpose(0, 1).flatten(1) for x_BCHW in inputs], 1)
    if maps.shape[1] < 2:
        return
    assert unit.norm.running_mean is not None
    assert unit.norm.running_var is not None
    unit.norm.running_mean.copy_(maps.mean(1))
    unit.norm.running_var.copy_(maps.var(1))
