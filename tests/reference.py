"""METHOD's equations written out slowly, one image and one channel at a time, in float64, from raw tensors.

Nothing of `afds.selection` runs here: only parameters and buffers are read from a unit. Arrays are numpy,
named with their shapes: x_BCHW a feature map, p_BC a value per image and channel, w_OIKK a convolution.
"""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import torch
from torch import nn

from afds.selection import FollowingGate, SelectiveConvBN


def array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def winners_exactly(density: str, channels: int) -> int:
    """ceil(d C) in exact arithmetic; the density as text, since 0.07 is not a binary number."""
    return max(1, math.ceil(Fraction(density) * channels))


def conv(x_BCHW: np.ndarray, module: nn.Conv2d) -> np.ndarray:
    w_OIKK = array(module.weight)
    out, per_group, k, _ = w_OIKK.shape
    stride, pad = module.stride[0], int(module.padding[0])
    x_BCHW = np.pad(x_BCHW, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    height, width = ((s - k) // stride + 1 for s in x_BCHW.shape[2:])
    y_BOHW = np.zeros((x_BCHW.shape[0], out, height, width))
    for o in range(out):
        first = o // (out // module.groups) * per_group
        for i in range(per_group):
            for dy in range(k):
                for dx in range(k):
                    rows = slice(dy, dy + stride * (height - 1) + 1, stride)
                    columns = slice(dx, dx + stride * (width - 1) + 1, stride)
                    y_BOHW[:, o] += w_OIKK[o, i, dy, dx] * x_BCHW[:, first + i, rows, columns]
    return y_BOHW


def norm(y_BCHW: np.ndarray, module: nn.BatchNorm2d, training: bool) -> np.ndarray:
    """Batch norm without its affine part."""
    mean_C, var_C = array(module.running_mean), array(module.running_var)
    if training:
        mean_C, var_C = y_BCHW.mean((0, 2, 3)), y_BCHW.var((0, 2, 3))
    return (y_BCHW - mean_C[:, None, None]) / np.sqrt(var_C + module.eps)[:, None, None]


def pooled(x_BCHW: np.ndarray, unit: SelectiveConvBN, training: bool) -> np.ndarray:
    """GAP(x), standardised where the unit does so. (B, C_in)"""
    p_BC = x_BCHW.mean((2, 3))
    standardise = unit.gate.predictor.standardise
    if standardise is None:
        return p_BC
    mean_C, var_C = array(standardise.running_mean), array(standardise.running_var)
    if training and len(p_BC) > 1:
        mean_C, var_C = p_BC.mean(0), p_BC.var(0)
    return (p_BC - mean_C) / np.sqrt(var_C + standardise.eps) / math.sqrt(p_BC.shape[1])


def gate(x_BCHW: np.ndarray, unit: SelectiveConvBN, density: str, training: bool) -> tuple[np.ndarray, np.ndarray]:
    """pi with its sign, and the active set, both (B, C_out)."""
    g = unit.gate
    p_BC = pooled(x_BCHW, unit, training)
    w_OI, bias = array(g.predictor.weight), array(g.predictor.bias)
    if g.predictor.reduce is not None:
        w_OI = w_OI @ array(g.predictor.reduce.weight)
    gamma, sign, importance = array(g.gamma), array(g.sign), array(g.importance)
    images, channels = len(p_BC), len(bias)
    k = winners_exactly(density, channels // g.group)
    pi_BC, active_BC = np.zeros((images, channels)), np.zeros((images, channels), bool)
    for b in range(images):
        h = [max(0.0, sum(w_OI[c, i] * p_BC[b, i] for i in range(p_BC.shape[1])) + bias[c]) for c in range(channels)]
        h = [min(v, float(g.predictor.ceiling)) for v in h]
        q = [h[c] if g.dynamic[c] else max(0.0, gamma[c]) for c in range(channels)]
        q = [q[c] if g.kept[c] else 0.0 for c in range(channels)]
        members = [range(i, i + g.group) for i in range(0, channels, g.group)]
        ranking = sorted(members, key=lambda group: sum(q[c] * importance[c] for c in group), reverse=True)
        for c in (c for group in ranking[:k] for c in group):
            if q[c] * importance[c] > 0:
                pi_BC[b, c], active_BC[b, c] = q[c] * sign[c], True
    return pi_BC, active_BC


def unit_output(
    x_BCHW: np.ndarray,
    unit: SelectiveConvBN,
    density: str = "1",
    arriving_BC: np.ndarray | None = None,
    training: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """What one unit makes of its input, before the ReLU, and its active set.

    Args:
        arriving_BC: for a depthwise unit: the active set of the units that it follows.
    """
    if isinstance(unit.gate, FollowingGate):
        assert arriving_BC is not None
        active_BC, pi_BC = arriving_BC, arriving_BC * array(unit.gate.gamma)
    else:
        pi_BC, active_BC = gate(x_BCHW, unit, density, training)
    y_BCHW = norm(conv(x_BCHW, unit.conv), unit.norm, training)
    beta = array(unit.beta)
    out_BCHW = np.zeros_like(y_BCHW)
    for b in range(y_BCHW.shape[0]):
        for c in range(y_BCHW.shape[1]):
            if active_BC[b, c]:
                out_BCHW[b, c] = pi_BC[b, c] * y_BCHW[b, c] + beta[c]
    return out_BCHW, active_BC
