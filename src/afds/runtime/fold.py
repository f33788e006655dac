"""Batch norm, gates and standardisation folded into weights: factors and shifts in float64, kept as float32.

::

    plain unit      w' = w gamma / sigma            b' = (b - mu) gamma / sigma + beta
    selective unit  w' = w / sigma                  b' = (b - mu) / sigma           y = pi (w' x + b') + beta [pi > 0]
    predictor       h = W ((p - m) / s / sqrt(C)) + b  =  W (a p) + (b - W (a m))        a = 1 / (s sqrt(C))

A static channel's pi is a constant: it goes into w' and b' as well. Weights are multiplied once, by one factor per
row rounded to float32, so that a large network is folded in one pass over its weights. For a product in bf16 the
weights themselves are rounded, and that factor is kept beside them in float32. The predictor's W stays as it
is, and its scale a is a vector of its own: where W is exact in bf16, as `fit` leaves it, the engine reads half of it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from afds.runtime.errors import UnsupportedError
from afds.selection import FollowingGate, Gate, SelectiveConvBN, winner_take_all


@dataclass
class Folded:
    """One convolution as the engine wants it."""

    tensors: dict[str, np.ndarray]
    fields: dict[str, Any] = field(default_factory=dict)


def f32(x: Tensor | np.ndarray) -> np.ndarray:
    array = x.detach().cpu().float().numpy() if isinstance(x, Tensor) else x
    return np.ascontiguousarray(array, dtype=np.float32)


def _f64(x: Tensor) -> Tensor:
    return x.detach().cpu().double()


def in_pairs(conv: nn.Conv2d) -> bool:
    """Whether a convolution can be a product of bf16 pairs: two input channels, of one group, at a time."""
    return conv.groups == 1 or conv.in_channels // conv.groups % 2 == 0


def fold_plain(conv: nn.Conv2d, norm: nn.BatchNorm2d | None, bf16: bool) -> Folded:
    """A convolution and its batch norm, if it has one."""
    factor, b = _normalised(conv, norm)
    if norm is not None and norm.affine:
        gamma = _f64(norm.weight)
        factor, b = factor * gamma, b * gamma + _f64(norm.bias)
    return Folded({**_scaled(conv, factor, bf16), "bias": f32(b)}, {"rows": "all"})


def fold_unit(unit: SelectiveConvBN, bf16: bool) -> Folded:
    """A selective unit at its present density and masks."""
    factor, b = _normalised(unit.conv, unit.norm)
    beta = _f64(unit.beta)
    gate = unit.gate
    if isinstance(gate, FollowingGate):
        gamma = _f64(gate.gamma)
        return Folded({**_scaled(unit.conv, factor * gamma, bf16), "bias": f32(b * gamma + beta)},
                      {"rows": "follow"})  # fmt: skip
    sign = _f64(gate.sign)
    constant = F.relu(_f64(gate.gamma)) * _f64(gate.kept)
    dynamic = (gate.dynamic & gate.kept).cpu()
    if not dynamic.any():
        score = constant.float() * gate.importance.detach().cpu()
        wins = winner_take_all(score[None], gate.k, gate.group)[0]
        pi = constant * sign * wins
        fixed = wins.nonzero().flatten().tolist()
        return Folded({**_scaled(unit.conv, factor * pi, bf16), "bias": f32(b * pi + beta)},
                      {"rows": "all"} if len(fixed) == len(wins) else {"rows": "fixed", "fixed": fixed})  # fmt: skip
    pi = torch.where(dynamic, torch.ones_like(constant), constant * sign)
    tensors = {
        **_scaled(unit.conv, factor * pi, bf16), "bias": f32(b * pi), "beta": f32(beta), "sign": f32(sign),
        "constant": f32(constant * ~dynamic), "importance": f32(gate.importance),
    }  # fmt: skip
    tensors.update(_fold_predictor(gate, dynamic))
    return Folded(tensors, {
        "rows": "dynamic", "k": gate.k, "group": gate.group, "dynamic": dynamic.nonzero().flatten().tolist(),
        "rank": gate.predictor.rank, "ceiling": float(gate.predictor.ceiling),
    })  # fmt: skip


def _fold_predictor(gate: Gate, dynamic: Tensor) -> dict[str, np.ndarray]:
    """[in][out], so that the weights of an active input lie together; only of the channels that are predicted."""
    predictor = gate.predictor
    channels = predictor.in_channels
    scale, mean = torch.ones(channels, dtype=torch.float64), torch.zeros(channels, dtype=torch.float64)
    if (norm := predictor.standardise) is not None:
        assert norm.running_mean is not None
        assert norm.running_var is not None
        scale = (_f64(norm.running_var) + norm.eps).rsqrt() * channels**-0.5
        mean = _f64(norm.running_mean)
    rows = dynamic if gate.predicted is None else dynamic[gate.predicted]  # compacted: static channels have no row
    weight, bias = predictor.weight.detach().cpu(), _f64(predictor.bias)[rows]
    if not rows.all():
        weight = weight[rows]
    reduce = predictor.reduce.weight.detach().cpu() if predictor.reduce is not None else None
    first = weight if reduce is None else reduce
    shift = first.double() @ (scale * mean) if mean.any() else torch.zeros(first.shape[0], dtype=torch.float64)
    bias = bias - (shift if reduce is None else weight.double() @ shift)
    tensors = {"predictor_weight": f32(weight.T), "predictor_bias": f32(bias), "predictor_scale": f32(scale)}
    return tensors if reduce is None else tensors | {"predictor_reduce": f32(reduce.T)}


def _scaled(conv: nn.Conv2d, factor: Tensor, bf16: bool) -> dict[str, np.ndarray]:
    """The convolution's weight, row by row times ``factor``; or rounded to bf16, (out, taps, in), and the factor."""
    weight = conv.weight.detach().cpu()
    if not (bf16 and in_pairs(conv)):
        return {"weight": f32(weight * factor.float()[:, None, None, None])}
    halves = weight.flatten(2).transpose(1, 2).to(torch.bfloat16).contiguous()
    return {"halves": halves.view(torch.int16).numpy().view(np.uint16), "factor": f32(factor)}


def _normalised(conv: nn.Conv2d, norm: nn.BatchNorm2d | None) -> tuple[Tensor, Tensor]:
    """Factor of the weight's rows, and bias, with the norm's statistics folded in, without its affine part."""
    out = conv.out_channels
    b = _f64(conv.bias) if conv.bias is not None else torch.zeros(out, dtype=torch.float64)
    if norm is None:
        return torch.ones(out, dtype=torch.float64), b
    if norm.running_mean is None or norm.running_var is None:
        raise UnsupportedError("The native runtime does not compute a batch norm without running statistics.")
    inverse = (_f64(norm.running_var) + norm.eps).rsqrt()
    return inverse, (b - _f64(norm.running_mean)) * inverse
