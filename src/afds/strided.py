"""Strided 1x1 convolutions of few channels, trained right.

::

    x (B, C, H, W) --> every s-th pixel of every s-th row --> 1x1 convolution, stride 1
                 '--> 1x1 convolution, stride s:  the same output, and the same gradients

Why (ours): oneDNN's gradient of the weights of a 1x1 convolution with a stride, channels last, writes past its
workspace where there are fewer channels than one of its blocks holds (8 with AVX2, 16 with AVX-512; oneDNN's issue
#6035): wrong gradients, or a crash. A ResNet's shortcut between stages is such a convolution; a narrow network, or one
that is pruned far, feeds it from so few.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from torch import Tensor, nn

BLOCK = 16  # channels: the widest block of oneDNN's kernels


@contextmanager
def taken_apart(network: nn.Module) -> Iterator[None]:
    """Within it, narrow 1x1 convolutions on the CPU first take the pixels they look at, then convolve with stride 1.

    What was computed within can be differentiated afterwards.
    """
    narrow = [m for m in network.modules() if isinstance(m, nn.Conv2d) and _is_narrow(m)]
    for conv in narrow:
        conv._conv_forward = partial(_forward, conv)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for conv in narrow:
            del conv._conv_forward


def _is_narrow(conv: nn.Conv2d) -> bool:
    return (
        conv.in_channels < BLOCK
        and conv.kernel_size == (1, 1)
        and conv.stride != (1, 1)
        and conv.padding in ((0, 0), "valid")
        and conv.groups == 1
        and conv.weight.device.type == "cpu"
    )


def _forward(conv: nn.Conv2d, x_BCHW: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    down, right = conv.stride
    taken_BCHW = x_BCHW[..., ::down, ::right]
    return nn.functional.conv2d(taken_BCHW, weight, bias)
