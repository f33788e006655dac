"""Does the choice per image help? Validation accuracy of a run as it is, and with its choice taken away.

    python benchmarks/transfer/frozen_choice.py z1 train-only/

frozen      the k channels of the largest mean score on training images win on every image; scales as predicted
static      the same winners, and each channel's scale is its mean saliency too
another's   every image gets the saliencies, and so the winners, of the image half a batch further on
`bn`: with batch norm statistics measured anew on training images. Differences are paired, image by image.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from torch import Tensor, nn

from afds.artifact import load_run
from afds.evaluation import eval_batches, evaluate, first_split, spaced
from afds.masks import observe
from afds.norms import reestimate_norms
from afds.selection import Gate, gates


@dataclass(frozen=True)
class Options:
    """The choice per image, taken away."""

    run: Annotated[Path, tyro.conf.Positional]
    """A run with selection."""
    data: Annotated[Path, tyro.conf.Positional]
    """The photos it was fitted on."""
    images: int = 1024
    """Training images for mean saliencies and batch norm."""


@torch.no_grad()
def without_choice(model: nn.Module, batches: list[tuple[Tensor, Tensor]], *, static: bool) -> nn.Module:
    """A copy in which the k channels of the largest mean score are all that is kept."""
    moments, model = observe(model, (x_BCHW for x_BCHW, _ in batches)), copy.deepcopy(model)
    for name, gate in gates(model).items():
        mean_C = moments[name].mean_q.to(gate.gamma.dtype)
        gate.kept.fill_(False)
        gate.kept[(mean_C * gate.importance).topk(gate.k).indices] = True
        if static:
            gate.gamma.copy_(mean_C)
            gate.dynamic.fill_(False)
    return model


@contextmanager
def exchanged(model: nn.Module) -> Iterator[None]:
    """Each image of a batch gets the saliencies of the one half a batch further on."""
    saliency = Gate.saliency

    def of_another(gate: Gate, x_BCHW: Tensor) -> Tensor:
        q_BC = saliency(gate, x_BCHW)
        return q_BC.roll(max(1, len(q_BC) // 2), 0)

    chosen = list(gates(model).values())
    for gate in chosen:
        gate.saliency = of_another.__get__(gate)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for gate in chosen:
            del gate.saliency


def main(options: Options) -> None:
    run = load_run(options.run)
    split, items = first_split(run, options.data, ("val",))
    training = spaced(first_split(run, options.data, ("train",))[1], options.images)
    batches = list(eval_batches(run, training))
    held_out = list(eval_batches(run, items))
    print(f"{options.run.name}: {len(items)} {split} images, means and bn from {len(training)} training images")

    def hits(network: nn.Module) -> np.ndarray:
        return np.array([c == "1" for c in evaluate(network, held_out, len(run.labels)).hits], dtype=float)

    as_predicted = hits(run.model)

    def report(name: str, right: np.ndarray) -> None:
        difference = right - as_predicted
        own, paired = (100 * x.std(ddof=1) / len(x) ** 0.5 for x in (right, difference))
        print(f"{name:15} {100 * right.mean():5.1f} +- {own:.1f}   difference {100 * difference.mean():+5.1f} +- "
              f"{paired:.1f}   images that change {int(np.abs(difference).sum())}", flush=True)  # fmt: skip

    report("as predicted", as_predicted)
    frozen = without_choice(run.model, batches, static=False)
    static = without_choice(run.model, batches, static=True)
    report("frozen", hits(frozen))
    report("static", hits(static))
    with exchanged(run.model):
        report("another's", hits(run.model))
    for name, network in (("as predicted", copy.deepcopy(run.model)), ("frozen", frozen), ("static", static)):
        reestimate_norms(network, batches, len(batches))
        report(f"{name} bn", hits(network))

    never, zeros, both, channels = 0, 0, 0, 0
    moments = observe(run.model, (x_BCHW for x_BCHW, _ in batches))
    for name, gate in gates(run.model).items():
        loser_C, zero_C = moments[name].win_rate == 0, (gate.predictor.weight == 0).all(1)
        never, zeros = never + int(loser_C.sum()), zeros + int(zero_C.sum())
        both, channels = both + int((loser_C & zero_C).sum()), channels + len(zero_C)
    print(f"of {channels} channels {never} win on no training image, {zeros} have a predictor that is still all zeros, "
          f"{both} both")  # fmt: skip


if __name__ == "__main__":
    main(tyro.cli(Options))
