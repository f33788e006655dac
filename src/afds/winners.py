"""Which channels win: what the predictors of a trained network do, measured over images.

::

    image i --> gate l --> q_BC (saliency) --> A_i = winners of layer l
                             |                   |
       spread over images and channels       win rate of each channel, overlap of A_i and A_j

    overlap(i, j) = 2 |A_i n A_j| / (|A_i| + |A_j|)     |A_i n A_j| / k where all k places are filled
    Var(q)        = E_c Var_i(q) + Var_c E_i(q)         between images + between channels (total variance)

A predictor that says the same of every image has overlap 1 and no variance between images: its layer selects as
static pruning would. Winners drawn at random overlap by the density. Ours: the paper shows no such measurement; its
figure of channels by class is the nearest.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from afds.errors import ConfigError, DataError
from afds.selection import Gate, gates

RARE, MOST = 0.1, 0.9  # win rates that part the channels that win on some images and not on others
_ROWS = 256  # images whose overlaps with all are held at once


@dataclass(frozen=True)
class LayerWinners:
    """One layer. Shares are of all its channels and add up to 1: never, rare, some, most, always."""

    density: float
    k: int
    channels: int
    pruned: int
    """Channels that may not win (m = 0); they are among `never`."""
    never: float
    rare: float
    """Won on at least one image, on less than 10 %."""
    some: float
    most: float
    """Won on 90 % or more, not on all."""
    always: float
    overlap: float
    """Share of the winners that two images have in common, mean over all pairs. Drawn at random: the density."""
    overlap_same: float | None
    """The same, of pairs of one class; None where no class has two images."""
    overlap_different: float | None
    """Of pairs of two classes."""
    saliency: float
    """Mean of q over images and over the channels that are kept."""
    spread_images: float
    """Standard deviation of q over images, root mean square over channels."""
    spread_channels: float
    """Standard deviation over channels of their mean q."""
    between_images: float
    """Share of the variance of q that lies between images. 0: a constant for each channel, which is static."""
    ranked_between_images: float
    """The same of q times importance, by which winners are ranked."""
    dead: int
    """Kept channels whose saliency is 0 on every image: nothing can wake them here."""
    constant: int
    """Kept dynamic channels with the same saliency, not 0, on every image: a predictor that says nothing."""

    @property
    def sometimes(self) -> float:
        """Share of channels that win on some images and not on others."""
        return self.rare + self.some + self.most


@dataclass
class _Seen:
    """Running sums of one gate, in float64."""

    active: list[Tensor] = field(default_factory=list)  # (B, C) bool
    mean: Tensor | float = 0.0  # (C,)
    squares: Tensor | float = 0.0  # (C,) summed squared deviations from the mean
    low: Tensor | None = None  # (C,) smallest and largest q
    high: Tensor | None = None
    count: int = 0

    def add(self, active_BC: Tensor, q_BC: Tensor) -> None:
        self.active.append(active_BC.cpu())
        q = q_BC.double().cpu()
        n, mean = len(q), q.mean(0)
        both = self.count + n
        delta = mean - self.mean
        # Chan et al.'s update: sums of plain squares would lose what varies little beside a large mean.
        self.squares = self.squares + (q - mean).square().sum(0) + delta.square() * (self.count * n / both)
        self.mean = self.mean + delta * (n / both)
        self.low = q.amin(0) if self.low is None else torch.minimum(self.low, q.amin(0))
        self.high = q.amax(0) if self.high is None else torch.maximum(self.high, q.amax(0))
        self.count = both


@contextmanager
def _watch(model: nn.Module) -> Iterator[dict[str, _Seen]]:
    seen: dict[str, _Seen] = {name: _Seen() for name in gates(model)}

    def hook_of(name: str):  # type: ignore[no-untyped-def]
        def hook(gate: Gate, args: tuple[Tensor], pi_BC: Tensor) -> None:
            assert gate.active_BC is not None
            seen[name].add(gate.active_BC, gate.saliency(args[0]))

        return hook

    handles = [gate.register_forward_hook(hook_of(name)) for name, gate in gates(model).items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def measure_winners(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> dict[str, LayerWinners]:
    """Winners and saliencies of every gate over (images (B, 3, H, W), labels (B,)), in eval mode.

    The model's mode is restored. Gates of depthwise units only follow, and are left out.

    Raises:
        ConfigError: the network selects nothing.
        DataError: fewer than two images.
    """
    if not gates(model):
        raise ConfigError("This network is dense: it selects no channels, so there is nothing to measure.")
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    labels = []
    try:
        with _watch(model) as seen:
            for x_BCHW, y_B in batches:
                model(x_BCHW)
                labels.append(y_B.cpu())
    finally:
        for module, mode in modes:
            module.training = mode
    if sum(map(len, labels)) < 2:
        raise DataError("Winners are compared between images: two or more are needed.")
    y_N = torch.cat(labels)
    return {name: _layer(gate, seen[name], y_N) for name, gate in gates(model).items()}


def _layer(gate: Gate, seen: _Seen, y_N: Tensor) -> LayerWinners:
    assert isinstance(seen.mean, Tensor)
    assert isinstance(seen.squares, Tensor)
    assert seen.low is not None
    assert seen.high is not None
    active_NC = torch.cat(seen.active)
    n, channels = active_NC.shape
    wins_C = active_NC.sum(0)
    rate_C = wins_C.double() / n

    def share(which_C: Tensor) -> float:
        return int(which_C.sum()) / channels

    sometimes_C = (wins_C > 0) & (wins_C < n)
    rare_C, most_C = sometimes_C & (rate_C < RARE), sometimes_C & (rate_C >= MOST)
    overlap, same, different = _overlaps(active_NC, y_N)
    kept_C, dynamic_C = gate.kept.cpu(), gate.dynamic.cpu()
    mean_C, variance_C = seen.mean[kept_C], seen.squares[kept_C] / n
    importance_C = gate.importance.double().cpu()[kept_C]
    # Not the variance, which rounding leaves above 0.
    still_C = seen.high <= seen.low
    dead_C = kept_C & (seen.high <= 0)
    return LayerWinners(
        density=gate.density,
        k=gate.k,
        channels=channels,
        pruned=channels - int(kept_C.sum()),
        never=share(wins_C == 0),
        rare=share(rare_C),
        some=share(sometimes_C & ~rare_C & ~most_C),
        most=share(most_C),
        always=share(wins_C == n),
        overlap=overlap,
        overlap_same=same,
        overlap_different=different,
        saliency=float(mean_C.mean()) if len(mean_C) else 0.0,
        spread_images=float(variance_C.mean().sqrt()) if len(mean_C) else 0.0,
        spread_channels=float(mean_C.var(unbiased=False).sqrt()) if len(mean_C) else 0.0,
        between_images=_between_images(mean_C, variance_C),
        ranked_between_images=_between_images(mean_C * importance_C, variance_C * importance_C.square()),
        dead=int(dead_C.sum()),
        constant=int((kept_C & dynamic_C & still_C & ~dead_C).sum()),
    )


def _between_images(mean_C: Tensor, variance_C: Tensor) -> float:
    """Share of the whole variance that lies between images; 0 where nothing varies at all."""
    if not len(mean_C):
        return 0.0
    images, channels = float(variance_C.mean()), float(mean_C.var(unbiased=False))
    return images / (images + channels) if images + channels > 0 else 0.0


def _overlaps(active_NC: Tensor, y_N: Tensor) -> tuple[float, float | None, float | None]:
    """Mean overlap of the winners of two images: of all pairs, of one class, of two. Two empty sets are alike."""
    sets_NC, sizes_N = active_NC.float(), active_NC.sum(1).double()
    position_N = torch.arange(len(sets_NC))
    sums, counts = [0.0, 0.0], [0, 0]
    for i in range(0, len(sets_NC), _ROWS):
        rows = slice(i, i + _ROWS)
        common = (sets_NC[rows] @ sets_NC.T).double()
        whole = sizes_N[rows, None] + sizes_N
        overlap = torch.where(whole > 0, 2 * common / whole.clamp_min(1), 1.0)
        pair = position_N[rows, None] < position_N
        same = y_N[rows, None] == y_N
        for j, which in enumerate((pair & same, pair & ~same)):
            sums[j] += float(overlap[which].sum())
            counts[j] += int(which.sum())
    means = [s / c if c else None for s, c in zip(sums, counts, strict=True)]
    return sum(sums) / sum(counts), means[0], means[1]
