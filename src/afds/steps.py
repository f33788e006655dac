"""The runs before the run: which dense network a method starts from, and what is left to do once it is there.

::

    afds, ...+l1, ...+slimming   base: dense fine-tuning --> the run starts from its weights (and learns from it)
    kd, kd+small                 base: dense fine-tuning --> the teacher of a run that starts from pretrained weights
    all others                   no base
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from afds.config import ANCHORED, PRUNED, FitConfig, parse_method
from afds.schedule import parse_budget


def base_of(config: FitConfig) -> str | None:
    """The method of the dense fine-tuning that comes before this run; None where none does.

    Pruning cuts a fine-tuned network, logit distillation learns from one, and afds does both.
    """
    transfer, compression = parse_method(config.method)
    cuts = parse_budget(config.budget).ratio != 1
    if config.method == "afds" and cuts:
        return "afd+dense"
    if compression == "slimming":  # the sparse training, which at 1x is the run itself
        return f"{'l2' if transfer == 'kd' else transfer}+slimming" if cuts else None
    if compression in PRUNED and cuts:
        return f"{'l2' if transfer == 'kd' else transfer}+dense"
    return "l2+dense" if transfer == "kd" else None


def after_base(config: FitConfig, base: str) -> FitConfig:
    """The options of a run once its base is there, in the run folder ``base``."""
    transfer, compression = parse_method(config.method)
    teacher = config.teacher or (Path(base) if transfer == "kd" else None)
    if transfer == "kd" and compression in ("dense", "small"):
        return dataclasses.replace(config, teacher=teacher)  # the student starts from pretrained weights
    anchor = (config.anchor or config.source) if transfer in ANCHORED else ""
    return dataclasses.replace(config, source=base, teacher=teacher, anchor=anchor)
