"""What the figures mean, in plain sentences, the bad news included."""

from __future__ import annotations

import math
import re
from typing import Any

from afds.report import speed
from afds.report.facts import Facts, number, sub
from afds.stats import paired_images

WORTH_IT = 1.1  # fewer MACs than this many times: nothing that a user would notice
NO_TEST = "There was no test split: choices were made on the validation images, so their accuracy is flattered."
NOT_READ = "The test split was not read: the accuracy is that of the validation images, on which choices were made."
NOT_TIME = "MACs are counted, not timed: time falls only where a runtime skips the channels that were not chosen."
NARROW = "MACs are counted, not timed. What lost was cut away, so time falls in every runtime: see afds measure."
PLAIN = "MACs are counted, not timed. It is a plain network, so time falls in every runtime: see afds measure."

Sentence = tuple[str, str]  # `good`, `bad` or `plain`; the sentence


def verdict(facts: Facts) -> list[Sentence]:
    """Whether it was worth it, from the files alone."""
    clock = [("bad" if "not worth it" in line else "good", line) for line in speed.sentences(facts)]
    if not facts.final:
        done = len(facts.of_kind("epoch"))
        state = f"after {done} epochs" if done else "before the end of its first epoch"
        return [("bad", f"This run has not ended; the page was drawn {state}. There is no final figure."), *clock]
    sentences = [*_saving(facts), *_accuracy(facts)]
    if number(sub(facts.final, "test").get("top1")) is None:
        sentences.append(("plain", NOT_READ if facts.options.get("read_test") is False else NO_TEST))
    if clock:
        sentences += clock
    elif (facts.total("ratio") or 0) >= WORTH_IT:
        chooses = bool(sub(facts.structure, "units"))
        sentences.append(("plain", NARROW if facts.settled else NOT_TIME if chooses else PLAIN))
    return sentences


def _saving(facts: Facts) -> list[Sentence]:
    ratio, asked = facts.total("ratio"), _asked(facts)
    if ratio is None or not sub(facts.structure, "units"):
        return []  # a dense run: nothing was to be saved
    if ratio < 1 and (asked is None or asked > 1):
        more = f"with its predictors it computes {1 / ratio:.2f} times the MACs of the dense network."
        return [("bad", f"Not worth it: {more}")]
    if asked is not None and asked <= 1:
        return []
    if ratio < WORTH_IT:
        return [("bad", f"Not worth it: {ratio:.2f} times fewer MACs than dense is next to nothing.")]
    if asked is not None and ratio < asked * 0.995:
        return [("bad", f"The budget of {asked:g}x was not met.")]
    return _latency(sub(facts.final, "latency"))


def _latency(latency: dict[str, Any]) -> list[Sentence]:
    """Whether a budget in milliseconds was met, on the machine that trained."""
    ms, wanted = number(latency.get("ms")), number(latency.get("asked_ms"))
    if ms is None or wanted is None:
        return []
    took = f"An image takes {ms:.2f} ms on this machine ({latency.get('how', '')}), {wanted:g} were asked"
    return [("good", f"{took}.") if ms <= wanted else ("bad", f"{took}: the budget was not met.")]


def _asked(facts: Facts) -> float | None:
    """The ratio that the budget asked for; None for a budget in MACs."""
    found = re.fullmatch(r"\s*(\d{1,4}(?:\.\d{1,6})?)\s*x\s*", str(facts.final.get("budget", "")))
    return float(found.group(1)) if found else None


def _accuracy(facts: Facts) -> list[Sentence]:
    """Against the fine-tuning that this run began with, else against the end of the epochs at d = 1."""
    final = facts.final
    if facts.base is not None:
        dense = not sub(facts.base.structure, "units")
        what = "the dense network that it began with" if dense else "the network at d = 1 that it began with"
        if facts.began_as != "dense":
            what = f"the network at {facts.began_as} that it began with"
        for split, name in (("test", "test"), ("val", "validation")):
            ours, theirs = sub(final, split), sub(facts.base.final, split)
            top1, other = number(ours.get("top1")), number(theirs.get("top1"))
            if top1 is not None and other is not None:
                hits = _hits(final, split), _hits(facts.base.final, split)
                return [_compare(top1, other, number(ours.get("images")), name, what, hits)]
    epochs, val = facts.of_kind("epoch"), sub(final, "val")
    warm = [number(line.get("val_top1")) for line in epochs if line.get("phase") == "warm"]
    fell = any(line.get("phase") in ("descent", "final") for line in epochs)
    before, top1 = warm[-1] if warm else None, number(val.get("top1"))
    if before is None or top1 is None or not fell:
        return []
    what = "this network with all channels, before its density fell"
    return [_compare(top1, before, number(val.get("images")), "validation", what)]


def _hits(final: dict[str, Any], split: str) -> str:
    """Which images were right, `1` or `0` each; empty where the record does not say."""
    hits = final.get(f"{split}_hits")
    return hits if isinstance(hits, str) and hits and not hits.strip("01") else ""


def _compare(
    ours: float, other: float, images: float | None, split: str, what: str, hits: tuple[str, str] = ("", "")
) -> Sentence:
    """One sentence on a difference, and whether so few images can show it: in pairs, where all hits are known."""
    lost = 100 * (other - ours)
    told = f"{100 * ours:.1f} % on the {split} images, against {100 * other:.1f} % of {what}"
    if hits[0] and len(hits[0]) == len(hits[1]):
        gap = paired_images(*hits)
        low, high = -100 * (gap.high or 0.0), -100 * (gap.low or 0.0)
        clear = gap.clear
        how = f"On the same images the 95 % interval is {_points(low)} to {_points(high)} points"
        if not clear and gap.p is not None and (low > 0 or high < 0):
            how += f", and McNemar's exact p is {gap.p:.2f}"
    else:
        spread = max(0.0, ours * (1 - ours) + other * (1 - other))
        noise = 196 * math.sqrt(spread / images) if images else 0.0  # points, two independent sets of images
        clear = abs(lost) > noise
        how = f"The 95 % interval is \u00b1 {noise:.1f} points" if noise else ""
    how = f" {how}." if how else ""
    if lost < 0.05:
        told_by = f", as far as {images:,.0f} images can tell" if images and not clear else ""
        return "good", f"No accuracy was lost{told_by}: {told}."
    if not clear:
        return "plain", f"{lost:.1f} points were lost: {told}.{how} So few images cannot tell that from chance."
    return "bad", f"Selection lost {lost:.1f} points: {told}.{how}"


def _points(value: float) -> str:
    return f"{value:.1f}".replace("-", "\u2212")
