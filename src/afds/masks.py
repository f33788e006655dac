"""Which channels stay dynamic and which stay at all: the update of s, gamma and m after each stage.

::

    s     <- 1[ Var_x(q) > delta_s ]      a channel whose saliency hardly varies turns static ...
    gamma <- E_x[q]                       ... at its mean, set before it turns, or the network would jump
    m     <- 1[ E_x[pi] > delta_m ]       a channel that is hardly ever used is pruned for good

On training images, never on the test split (METHOD). The paper's thresholds are not known; ours are quantiles of
the values observed in a layer, so that one number means the same in every layer, and they are recorded.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from afds.selection import Gate, gates


@dataclass
class Moments:
    """Running sums over images of one gate: q, q squared and pi, each (C,)."""

    count: int
    q: Tensor
    q_squared: Tensor
    pi: Tensor
    wins: Tensor

    @property
    def mean_q(self) -> Tensor:
        return self.q / self.count

    @property
    def variance_q(self) -> Tensor:
        return (self.q_squared / self.count - self.mean_q.square()).clamp_min(0)

    @property
    def mean_pi(self) -> Tensor:
        """E[abs(pi)]: the sign is gamma's, not a measure of use."""
        return self.pi / self.count

    @property
    def win_rate(self) -> Tensor:
        """Share of images on which each channel is active."""
        return self.wins / self.count


@contextmanager
def _observe(model: nn.Module) -> Iterator[dict[str, Moments]]:
    moments: dict[str, Moments] = {}

    def watch(name: str):  # type: ignore[no-untyped-def]
        def hook(gate: Gate, args: tuple[Tensor], pi_BC: Tensor) -> None:
            q_BC, pi_BC = gate.saliency(args[0]).double(), pi_BC.double().abs()
            if name not in moments:
                zero = torch.zeros(q_BC.shape[1], dtype=torch.double, device=q_BC.device)
                moments[name] = Moments(0, zero, zero.clone(), zero.clone(), zero.clone())
            m = moments[name]
            m.count += q_BC.shape[0]
            m.q += q_BC.sum(0)
            m.q_squared += q_BC.square().sum(0)
            m.pi += pi_BC.sum(0)
            m.wins += (pi_BC > 0).double().sum(0)

        return hook

    handles = [gate.register_forward_hook(watch(name)) for name, gate in gates(model).items()]
    try:
        yield moments
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def observe(model: nn.Module, batches: Iterable[Tensor]) -> dict[str, Moments]:
    """Moments of every gate over images (B, 3, H, W), in eval mode; the model's mode is restored."""
    was_training = model.training
    model.eval()
    with _observe(model) as moments:
        for x_BCHW in batches:
            model(x_BCHW)
    model.train(was_training)
    return moments


@torch.no_grad()
def update_masks(
    model: nn.Module, batches: Iterable[Tensor], *, static_quantile: float, prune_quantile: float
) -> dict[str, dict[str, float]]:
    """One update of s, gamma and m; returns the thresholds used, per unit.

    At least k channels of a layer are always kept: a density that cannot be filled would be a silent loss.
    """
    thresholds: dict[str, dict[str, float]] = {}
    if static_quantile == 0 and prune_quantile == 0:
        return thresholds
    moments = observe(model, batches)
    for name, gate in gates(model).items():
        m = moments[name]
        thresholds[name] = {}
        if static_quantile > 0:
            # One that was 0 for all images would be 0 for good; how many: those up to the quantile, however many tie.
            movable = gate.dynamic & gate.kept & (m.mean_q != 0)
            if int(movable.sum()) > 1:
                turning = torch.where(movable, m.variance_q, torch.inf).argsort(stable=True)
                turning = turning[: 1 + int(static_quantile * (int(movable.sum()) - 1))]
                gate.gamma[turning] = m.mean_q[turning].to(gate.gamma.dtype)
                gate.dynamic[turning] = False
                thresholds[name]["delta_s"] = float(m.variance_q[turning[-1]])
        if prune_quantile > 0:
            kept = int(gate.kept.sum())
            drop = min(int(prune_quantile * kept), kept - gate.k)
            if drop > 0:
                order = torch.where(gate.kept, m.mean_pi, torch.inf).argsort()
                thresholds[name]["delta_m"] = float(m.mean_pi[order[drop - 1]])
                gate.kept[order[:drop]] = False
    return thresholds


def mask_counts(model: nn.Module) -> dict[str, int]:
    """How many channels are dynamic, static and pruned, over all layers."""
    all_gates = list(gates(model).values())
    kept = sum(int(g.kept.sum()) for g in all_gates)
    dynamic = sum(int((g.kept & g.dynamic).sum()) for g in all_gates)
    return {"dynamic": dynamic, "static": kept - dynamic,
            "pruned": sum(g.kept.numel() for g in all_gates) - kept}  # fmt: skip
