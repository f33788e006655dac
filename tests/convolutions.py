"""One convolution of any shape in a small network, for the tests by property."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import strategies as st
from torch import nn

from afds.cost import CostMeter
from afds.runtime import Executor
from afds.selection import gates


def check_equal(executor: Executor, reference: nn.Module, x_BCHW: torch.Tensor, tolerance: float) -> None:
    """Equal logits within a share of the largest, equal active channels and equal MACs, image by image."""
    got, macs = executor.counted(x_BCHW.numpy())
    meter = CostMeter(reference)
    for i in range(len(x_BCHW)):
        want, cost = meter(x_BCHW[i : i + 1])
        assert np.abs(got[i] - want.numpy()).max() <= tolerance * max(1e-3, float(want.abs().max()))
        assert macs[i] == round(cost.counted)
        chosen = executor.chosen(x_BCHW[i : i + 1].numpy())
        for name, gate in gates(reference).items():
            assert gate.active_BC is not None
            assert chosen[name].tolist() == gate.active_BC[0].nonzero().flatten().tolist(), name


class Small(nn.Module):
    """One convolution under test between a stem and a classifier, with or without a residual sum around it.

    largest: kernel, stride and padding of a max pooling between stem and convolution.
    """

    def __init__(
        self, cin: int, cout: int, kernel: int, stride: int, pad: int, groups: int, residual: bool,
        largest: tuple[int, int, int] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.largest = nn.MaxPool2d(*largest) if largest else nn.Identity()
        self.stem, self.norm0, self.act0 = nn.Conv2d(3, cin, 1, bias=False), nn.BatchNorm2d(cin), nn.ReLU()
        self.conv = nn.Conv2d(cin, cout, kernel, stride, pad, groups=groups, bias=False)
        self.norm, self.act = nn.BatchNorm2d(cout), nn.ReLU()
        self.term = nn.Identity()  # what the side adds its own to: the runtime keeps it as the residual
        self.side = nn.Conv2d(cin, cout, kernel, stride, pad, bias=False) if residual else None
        self.side_norm = nn.BatchNorm2d(cout) if residual else None
        self.pool, self.flat, self.fc = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(cout, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.largest(self.act0(self.norm0(self.stem(x))))
        y = self.norm(self.conv(x))
        if self.side is not None and self.side_norm is not None:
            y = self.term(y) + self.side_norm(self.side(x))
        return self.fc(self.flat(self.pool(self.act(y))))


@st.composite
def cases(draw: st.DrawFn) -> dict[str, object]:
    groups = draw(st.sampled_from([1, 1, 1, 2, 3]))
    kernel = draw(st.integers(1, 5))
    return {
        "cin": groups * draw(st.integers(1, 9)), "cout": groups * draw(st.integers(1, 13)), "kernel": kernel,
        "stride": draw(st.integers(1, 3)), "pad": draw(st.integers(0, kernel // 2)), "groups": groups,
        "residual": draw(st.booleans()),
    }  # fmt: skip
