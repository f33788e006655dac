"""What a channel is worth: a Taylor estimate per channel, for ranking winners and for sharing out the density.

::

    e_l[c](x) = sum_hw dL/dF_l[c] F_l[c]                     the change of the loss if channel c were off for image x
    t_l[c]    = E[ e_l[c](x)^2 | c active ]                  what a channel is worth; comparable between layers
    a_l[c]    = sqrt( t_l[c] / E[ q_l[c](x)^2 | c active ] ) so that q a ranks winners by that change, per image

Molchanov et al., *Importance Estimation for Neural Network Pruning*, CVPR 2019, applied to gates, F_l being the
gated output. Ours: a gamma alone does not say what its channel does after its bias, the ReLU and the next
convolution. The means are over the images on which a channel is active, as a suppressed channel sits at the ReLU's
corner and has no gradient; one that is active on none of the images keeps its last estimate, so that it can come
back when those of the winners fall.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from afds.cost import Cost
from afds.schedule import Allocation
from afds.selection import Gate, SelectiveConvBN, gates, selective_units
from afds.strided import taken_apart


@dataclass
class Importance:
    """Per unit: t (C,), the squared loss at stake, and a (C,), the weight for ranking, both float64."""

    taylor: dict[str, Tensor]
    weight: dict[str, Tensor]


def estimate(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], previous: Importance | None = None
) -> Importance:
    """Estimate both on labelled images (B, 3, H, W), (B,), in eval mode; mode and gradients are restored."""
    taken: list[tuple[str, Tensor, Tensor]] = []

    def watch(name: str):  # type: ignore[no-untyped-def]
        def hook(unit: SelectiveConvBN, args: tuple[Tensor], out_BCHW: Tensor) -> Tensor:
            out_BCHW.retain_grad()
            assert isinstance(unit.gate, Gate)
            with torch.no_grad():
                taken.append((name, out_BCHW, unit.gate.saliency(args[0].detach())))
            return out_BCHW.clone()  # timm goes on in place, which must not reach the map that is kept

        return hook

    units = [(name, unit) for name, unit in selective_units(model) if isinstance(unit.gate, Gate)]
    was_training = model.training
    model.eval()
    handles = [unit.register_forward_hook(watch(name)) for name, unit in units]
    effects: dict[str, Tensor] = {}
    saliencies: dict[str, Tensor] = {}
    counts: dict[str, Tensor] = {}
    try:
        with torch.enable_grad():
            for x_BCHW, y_B in batches:
                taken.clear()
                with taken_apart(model):
                    logits_BK = model(x_BCHW)
                F.cross_entropy(logits_BK.float(), y_B, reduction="sum").backward()
                for name, out_BCHW, q_BC in taken:
                    assert out_BCHW.grad is not None
                    effect_BC = (out_BCHW.grad * out_BCHW.detach()).sum((2, 3)).double()
                    active_BC = (out_BCHW.detach() != 0).any(3).any(2)
                    effects[name] = effects.get(name, 0) + effect_BC.square().sum(0)
                    saliencies[name] = saliencies.get(name, 0) + (q_BC.double().square() * active_BC).sum(0)
                    counts[name] = counts.get(name, 0) + active_BC.sum(0)
                model.zero_grad(set_to_none=True)
    finally:
        for handle in handles:
            handle.remove()
        model.train(was_training)
    found = Importance({}, {})
    for name, _ in units:
        seen = counts[name].clamp_min(1)
        taylor_C = effects[name] / seen
        weight_C = (taylor_C / (saliencies[name] / seen).clamp_min(1e-12)).sqrt()
        if previous is not None:
            seen_C = counts[name] > 0  # what a checkpoint held is on the CPU
            taylor_C = taylor_C.where(seen_C, previous.taylor[name].to(taylor_C.device))
            weight_C = weight_C.where(seen_C, previous.weight[name].to(weight_C.device))
        found.taylor[name], found.weight[name] = taylor_C, weight_C
    return found


def set_importance(model: nn.Module, importance: Importance) -> None:
    """Rank winners by q a from now on; a is scaled to a mean of 1 per layer, which changes no order."""
    for name, gate in gates(model).items():
        weight_C = importance.weight[name].to(gate.importance.device)
        # A floor: a channel whose slope was not seen on these images must still be able to win.
        mean = weight_C.mean().clamp_min(1e-20)
        gate.importance.copy_((weight_C / mean).clamp_min(1e-3).to(gate.importance.dtype))


def by_importance(model: nn.Module, importance: Importance, dense: Cost, *, floor: float = 0.25) -> Allocation:
    """Densities such that the last channel kept in each layer is worth about the same per MAC (ours).

    Along the allocation a threshold on (Taylor value / MACs of a channel) rises as t falls; no layer goes below
    ``floor`` times t, as the estimate holds for small changes only.
    """
    value: dict[str, Tensor] = {}
    for name, gate in gates(model).items():
        layer = dense.layers[name]
        per_channel = layer.dense / layer.channels_out
        # Its reader's cost falls too when a channel goes; about the same again.
        worth_C = importance.taylor[name].to(gate.kept.device) / per_channel
        value[name] = worth_C.where(gate.kept, 0.0).sort(descending=True).values.cpu()
    pooled = torch.cat(list(value.values())).sort(descending=True).values

    def densities(t: float) -> dict[str, float]:
        threshold = pooled[min(len(pooled) - 1, int(t * len(pooled)))]
        return {name: min(1.0, max(floor * t, float((v >= threshold).double().mean()), 1 / len(v)))
                for name, v in value.items()}  # fmt: skip

    return densities
