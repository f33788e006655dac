"""Settling: the winners are chosen once, for all images, and what loses is cut away (ours).

::

    at d = 1, training images      v[c]: the place of channel c in the order in which channels can go, elimination.py
    units that write one stream    have one v: they keep the same channels
                                   (`--descent.worth taylor`: v_l[c] = E[ (sum_hw dL/dF_l[c] F_l[c])^2 ], summed)
    densities                      the k largest v win, m of all others is 0
    compaction                     the losers leave the tensors: convolutions, norms, predictors' rows and columns

    x --+--> conv1 --> conv2 --+--> sum        before: each unit its own winners, their union is carried along
        '----------------------'               after:  one set, so stream, readers and writers are narrow

What stays can keep its predicted saliency: pi = h(x) still scales every channel image by image, as in
squeeze-and-excitation, at the predictor's cost. Why: in every network that we trained with a free choice two images
shared 99 % of their winners, freezing the winners cost nothing and freezing the scales up to 4 points, and a narrow
network trains several times faster than a masked one (docs/accuracy-history.md). The choice that FBS and the paper
leave open for every image stays available (`--descent.no-settle`, `afds-paper`, `fbs`). With `--descent.scales learned`
the scales are constants that learn, as a batch norm's do, and nothing depends on the image any more. With `cheap`, the
default, this holds for the layers whose predictor would have nearly as many weights to read as they have themselves: a
C_in x C_out matrix doubles what a 1 x 1 convolution reads, and is a ninth of a 3 x 3 one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from afds.compaction import cut_away, find_couplings, kept_channels
from afds.masks import observe
from afds.selection import Gate, SelectiveConvBN, gates, selective_units, set_density, winners

COARSE = 8  # a layer's width must bear being rounded to an eighth of itself
CHEAP = 0.25  # of its convolution's weights: what a cheap predictor has at most


def tied_units(model: nn.Module) -> list[tuple[str, ...]]:
    """The units of a selective network in groups whose channels keep the same places, in the order of their first.

    Raises:
        SourceError: the forward cannot be read.
    """
    chosen, groups = gates(model), {}  # type: ignore[var-annotated]
    for name, number in find_couplings(model).producers().items():
        if name in chosen:
            groups.setdefault(number, []).append(name)
    return [tuple(names) for names in groups.values()]


@dataclass(frozen=True)
class Winners:
    """Which channels stay at which densities: those of the largest worth, the same in tied units, and none else."""

    worth: Mapping[str, Tensor]
    """(C,) of each unit, comparable between tied units."""
    tied: Sequence[tuple[str, ...]]
    multiple_of: int = 1
    """The number kept is the nearest multiple of this, in layers of `COARSE` times as many and more."""

    @torch.no_grad()
    def place(self, model: nn.Module, density: Mapping[str, float]) -> None:
        """Keep the winners; nothing is cut yet. Tied units take the geometric mean of their densities."""
        chosen = gates(model)
        for names in self.tied:
            total_C = torch.stack([self.worth[name].double() for name in names]).sum(0)
            k = self._width(_mean(density, names), len(total_C))
            best = total_C.topk(k).indices
            for name in names:
                chosen[name].keep_only(best)
            set_density(model, dict.fromkeys(names, k / len(total_C)))

    def spend(self, model: nn.Module, density: Mapping[str, float], met: Callable[[], bool]) -> None:
        """Widen, step by step in turn, what is still met: first the groups from which rounding took most.

        Why: widths are steps, so the widest network along a path of densities can be far below its budget. Seen: 11.3x
        and 12.4x where 10x was asked, as one step of the stem and the first stream would have been too much.
        """
        channels = {names: len(self.worth[names[0]]) for names in self.tied}
        width = {names: self._width(_mean(density, names), channels[names]) for names in self.tied}
        lost = {names: _mean(density, names) * channels[names] / width[names] for names in self.tied}
        now = {name: width[names] / channels[names] for names in self.tied for name in names}
        left = sorted(self.tied, key=lambda names: lost[names], reverse=True)
        while left:  # a step that was too much once stays so
            widened = []
            for names in left:
                step = self.multiple_of if self._rounds(channels[names]) else 1
                wider = min(channels[names], (width[names] // step + 1) * step)
                if wider > width[names]:
                    tried = {**now, **dict.fromkeys(names, wider / channels[names])}
                    self.place(model, tried)
                    if met():
                        now, width[names] = tried, wider
                        widened.append(names)
            left = widened
        self.place(model, now)

    def _width(self, density: float, channels: int) -> int:
        k = winners(density, channels)
        if self._rounds(channels) and k > self.multiple_of:  # below that, rounding would shut budgets out
            k = min(channels, self.multiple_of * round(density * channels / self.multiple_of))
        return k

    def _rounds(self, channels: int) -> bool:
        return channels >= COARSE * self.multiple_of


def _mean(density: Mapping[str, float], names: tuple[str, ...]) -> float:
    logs = torch.tensor([density[name] for name in names], dtype=torch.double).log()
    return min(1.0, float(logs.mean().exp()))


def is_cheap(unit: SelectiveConvBN) -> bool:
    """Whether the unit's predictor has at most a quarter as many weights as its convolution (`CHEAP`)."""
    assert isinstance(unit.gate, Gate)
    return unit.gate.predictor.weights <= CHEAP * unit.conv.weight.numel()


@torch.no_grad()
def fix_scales(model: nn.Module, images: Callable[[], Iterable[Tensor]], *, but_cheap: bool = False) -> None:
    """Turn every channel static, in place: pi is a constant that is learned, and the predictors have no rows to keep.

    Predictors that have not learned are constants, and the function stays what it was; of others the mean is taken.

    Args:
        images: batches (B, 3, H, W) of training images, asked for where predictors have learned.
        but_cheap: leave those units whose predictor `is_cheap`.
    """
    units = {name: unit for name, unit in selective_units(model) if isinstance(unit.gate, Gate)}
    chosen = {name: gate for name, gate in gates(model).items() if not (but_cheap and is_cheap(units[name]))}
    has_learned = any(gate.predictor.has_learned for gate in chosen.values())
    seen = observe(model, images()) if has_learned else {}
    for name, gate in chosen.items():
        constant_C = gate.gamma.clone()
        constant_C[slice(None) if gate.predicted is None else gate.predicted] = gate.predictor.bias
        predicted_C = seen[name].mean_q.to(constant_C.dtype) if has_learned else constant_C
        gate.gamma.copy_(torch.where(gate.dynamic, predicted_C, gate.gamma))
        gate.dynamic.fill_(False)


def settle(model: nn.Module) -> dict[str, Tensor]:
    """Cut away, in place, what is not kept; the parameters are new ones afterwards.

    Returns:
        The channels that each unit still has, of those that it had.
    """
    chosen = gates(model)
    kept = {name: index for name, index in kept_channels(model).items() if name in chosen}
    cut_away(model)
    for gate in chosen.values():
        gate.predictor.cut_to_rank()
    return kept
