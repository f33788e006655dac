"""DELTA: stay near the source's feature maps, most of all in the channels that matter for the new task.

::

    image --+--> source, frozen  --> F*_l --+
            |                               +--> C / 2 sum_c W_l[c] || F_l[c] - F*_l[c] ||^2 / (H W v_l)
            +--> target, learning --> F_l --+

    W_l = softmax_c( standardised increase of the cross-entropy when channel c of F_l is off / 5 )

Li, Xiong, Wang, Rao, Liu, Huan, *DELTA: Deep Learning Transfer using Feature Map with Attention*, ICLR 2019. The
increase is measured on the source network as a feature extractor, a classifier of the new task trained on it: that
is the supervision. The standardisation, the temperature of 5, the factor C / (H W), the sum over images and the
weight 0.01 of the published code are kept, as is the place: F_l is the output of the last convolution of each stage,
before its batch norm. Ours: the sum over images is a mean, so that the weight means the same at any batch size; the
distance is divided by v_l, the mean variance of F*_l, as a batch norm undoes any scale of its convolution and the
published term therefore depends on which weights of one and the same network are at hand (seen: 200 times the
cross-entropy); and the classifier is fitted on pooled features, by LBFGS.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from afds.distillation import FrozenNetwork
from afds.errors import ConfigError
from afds.graph import trace
from afds.transfer.base import Regulariser, Step

TEMPERATURE = 5.0
DECAY = 1e-2  # L2 of the classifier that the weights are measured with


class Delta(Regulariser):
    """Args: weights: W_l (C,) of each compared unit, each sums to 1. variances: v_l."""

    name = "delta"
    replaces_decay = True
    before_norm = True

    def __init__(self, weight: float, weights: dict[str, Tensor], variances: dict[str, float]) -> None:
        super().__init__(weight, units=tuple(weights))
        self.weights = weights
        self.variances = variances

    def forward(self, step: Step) -> Tensor:
        teacher = self._teacher(step)
        total = torch.zeros((), device=step.logits.device)
        for unit, whole_C in self.weights.items():
            ours, theirs = step.features[unit].float(), teacher[unit].float()
            w_C = whole_C.to(total.device)
            if unit in self.channels:
                w_C = w_C[self.channels[unit].to(total.device)]
            distance_BC = (ours - theirs).square().mean((2, 3)) / self.variances[unit]
            total = total + len(whole_C) / 2 * (distance_BC * w_C).sum(1).mean()
        return total


def channel_weights(
    source: FrozenNetwork, units: Sequence[str], batches: Sequence[tuple[Tensor, Tensor]], classes: int
) -> dict[str, Tensor]:
    """W_l (C,) of each unit, from labelled training images (B, 3, H, W), (B,).

    Args:
        source: the frozen pretrained network; it gets a classifier of the new classes.
        units: names of its ConvBN units.
    """
    network = source.network
    fit_classifier(network, batches, classes)
    tails = {unit: _Tail(network, source.points[unit].path) for unit in units}
    count, increase = sum(len(y_B) for _, y_B in batches), dict.fromkeys(units, torch.zeros(()))
    for unit, tail in tails.items():
        for x_BCHW, y_B in batches:
            increase[unit] = increase[unit] + tail.increase(x_BCHW, y_B) * (len(y_B) / count)
    return {unit: weights_of(delta_C) for unit, delta_C in increase.items()}


def map_variances(source: FrozenNetwork, batches: Sequence[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """v_l of each compared unit: the mean over channels of the variance of F*_l over images and positions."""
    maps: dict[str, list[Tensor]] = {unit: [] for unit in source.features}
    for x_BCHW, _ in batches:
        for unit, f_BCHW in source(x_BCHW)[1].items():
            maps[unit].append(f_BCHW.float().transpose(0, 1).flatten(1))
    return {unit: float(torch.cat(parts, 1).var(1, unbiased=False).mean()) + 1e-12 for unit, parts in maps.items()}


def weights_of(increase_C: Tensor) -> Tensor:
    """Softmax of the standardised increases of the loss, over a temperature of 5."""
    spread = increase_C.std(unbiased=False).clamp_min(1e-12)
    return ((increase_C - increase_C.mean()) / spread / TEMPERATURE).softmax(0).float()


class _Tail(fx.Interpreter):
    """Runs a network once, then again and again from one module's output on, a channel of it set to zero."""

    def __init__(self, network: nn.Module, path: str) -> None:
        for module in network.modules():  # values are kept for the next run from there
            if hasattr(module, "inplace"):
                module.inplace = False  # type: ignore[assignment]
        gm = trace(network)
        super().__init__(gm, garbage_collect_values=False)
        nodes = list(gm.graph.nodes)
        self.node = next(n for n in nodes if n.op == "call_module" and n.target == path)
        reached = {self.node}
        for node in nodes:
            if any(i in reached for i in node.all_input_nodes):
                reached.add(node)
        self.after = [n for n in nodes if n in reached and n is not self.node]

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        return super().call_function(operator.add if target is operator.iadd else target, args, kwargs)

    @torch.no_grad()
    def increase(self, x_BCHW: Tensor, y_B: Tensor) -> Tensor:
        """(C,) float64: how much the mean cross-entropy rises when one channel is zero."""
        whole = F.cross_entropy(self.run(x_BCHW), y_B)
        env = dict(self.env)
        values = []
        for channel in range(env[self.node].shape[1]):
            self.env = dict(env)
            self.env[self.node] = env[self.node].clone()
            self.env[self.node][:, channel] = 0
            for node in self.after:
                self.env[node] = self.run_node(node)
            values.append(F.cross_entropy(self.env[self.after[-1]], y_B) - whole)
        return torch.stack(values).double().cpu()


def fit_classifier(network: nn.Module, batches: Sequence[tuple[Tensor, Tensor]], classes: int) -> None:
    """Give a frozen network a linear classifier of ``classes``, fitted on its own features of labelled images."""
    network.reset_classifier(classes)  # type: ignore[operator]
    head = network.get_classifier()  # type: ignore[operator]
    if not isinstance(head, nn.Linear):
        raise ConfigError(f"DELTA needs a linear classifier to weigh channels by; {type(network).__name__} has none.")
    head.to(batches[0][0].device)
    taken: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda _module, args: taken.append(args[0].float()))
    try:
        with torch.no_grad():
            for x_BCHW, _ in batches:
                network(x_BCHW)
    finally:
        handle.remove()
    f_NC, y_N = torch.cat(taken), torch.cat([y_B for _, y_B in batches])
    scale = f_NC.std(0).mean().clamp_min(1e-6)
    weight, bias = torch.zeros_like(head.weight, requires_grad=True), torch.zeros_like(head.bias, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> float:
        optimizer.zero_grad()
        value = F.cross_entropy(F.linear(f_NC / scale, weight, bias), y_N) + DECAY / 2 * weight.square().sum()
        value.backward()
        return float(value.detach())

    with torch.enable_grad():
        optimizer.step(loss)
    with torch.no_grad():
        head.weight.copy_(weight / scale)
        head.bias.copy_(bias)
    head.requires_grad_(False)
