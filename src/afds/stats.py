"""Means, paired differences and their intervals.

Several seeds: the t interval of the differences between runs of the same seed (same split, same order of images); where
all were tested on the same images, those are a sample too, and its error is added in quadrature.
One seed: differences between the same test images, by bootstrap over images, and McNemar's exact test.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats as scipy_stats


@dataclass(frozen=True)
class Difference:
    """Ours minus theirs, as a share of 1, with a 95 % interval."""

    mean: float
    low: float | None
    high: float | None
    p: float | None
    how: str

    @property
    def clear(self) -> bool:
        """Whether the interval leaves 0 out, and the test, where there is one, agrees (p below 0.05)."""
        if self.low is None or self.high is None or (self.p is not None and self.p >= 0.05):
            return False
        return self.low > 0 or self.high < 0


def spread(values: Sequence[float]) -> float | None:
    """Standard deviation over seeds; None for a single one."""
    return statistics.stdev(values) if len(values) > 1 else None


def paired(ours: Sequence[float], theirs: Sequence[float], hits: Sequence[tuple[str, str]] = ()) -> Difference:
    """From runs paired by seed: t interval and t test.

    hits: of each seed what `paired_images` takes, where all seeds were tested on the same images. Why: seeds that agree
    by chance, and three often do, would make an interval of a few tenths of a point from a thousand images (ours).
    """
    gaps = [a - b for a, b in zip(ours, theirs, strict=True)]
    mean = statistics.mean(gaps)
    if len(gaps) < 2:
        return Difference(mean, None, None, None, "one seed")
    error = statistics.stdev(gaps) / len(gaps) ** 0.5
    none = Difference(mean, None, None, None, f"{len(gaps)} seeds with the same difference: no interval")
    if max(gaps) - min(gaps) < 1e-9 and not hits:  # as few test images bring about; it is no interval of width 0
        return none
    reach = float(scipy_stats.t.ppf(0.975, len(gaps) - 1)) * error
    p: float | None = float(2 * scipy_stats.t.sf(abs(mean) / error, len(gaps) - 1)) if error > 0 else None
    how = f"paired t, {len(gaps)} seeds"
    if hits:
        by_image = np.mean([_right(a) - _right(b) for a, b in hits], axis=0)
        of_images = float(scipy_stats.norm.ppf(0.975) * by_image.std(ddof=len(by_image) > 1) / len(by_image) ** 0.5)
        reach, p = math.hypot(reach, of_images), None
        if reach < 1e-9:
            return none
        how += f", and the error of {len(by_image)} test images"
    return Difference(mean, mean - reach, mean + reach, p, how)


def _right(hits: str) -> np.ndarray:
    return np.frombuffer(hits.encode(), np.uint8) - 48.0


def paired_images(ours: str, theirs: str, *, draws: int = 2000) -> Difference:
    """From the same images, `1` where a network was right: bootstrap over images, McNemar's exact p."""
    a, b = _right(ours), _right(theirs)
    if len(a) != len(b) or not len(a):
        raise ValueError("the two networks did not look at the same images")
    gaps = a - b
    better, worse, n = int((gaps > 0).sum()), int((gaps < 0).sum()), len(gaps)
    # Drawing n images anew is drawing how many of them are better, worse and equal: no n x draws table.
    drawn = np.random.default_rng(0).multinomial(n, (better / n, worse / n, (n - better - worse) / n), draws)
    low, high = np.quantile((drawn[:, 0] - drawn[:, 1]) / n, (0.025, 0.975))
    p = float(scipy_stats.binomtest(better, better + worse).pvalue) if better + worse else 1.0
    return Difference(float(gaps.mean()), float(low), float(high), p, f"bootstrap over {len(gaps)} images")
