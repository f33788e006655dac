"""A tiny run folder and tiny photos, as `afds fit` and a user would leave them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from torch import nn

from afds.artifact import is_run, load_run, save_run
from afds.config import FitConfig
from afds.cost import measure_cost
from afds.data import Preprocess, scan
from afds.fitting import cost_summary
from afds.idle import without_idle
from afds.selection import SelectionConfig, gates, select, set_density
from afds.settling import Winners, fix_scales, settle, tied_units
from networks import randomise_bn, train_like

LABELS = ("ant", "bee", "cat")
ARCH_ARGS: dict[str, Any] = {"layers": (1, 1, 1, 1), "channels": (8, 16, 16, 24)}
PREPROCESS = Preprocess(32, 36, "bilinear", (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


def tiny_network(
    *, selection: SelectionConfig | None, arch: str = "resnet18", num_classes: int = 3, **args: Any
) -> nn.Module:
    torch.manual_seed(0)
    model = randomise_bn(timm.create_model(arch, num_classes=num_classes, **args)).eval()
    if selection is None:
        return model
    model = train_like(select(model, selection)).eval()
    for i, name in enumerate(gates(model)):  # a density of its own for each
        set_density(model, {name: 0.4 + 0.05 * (i % 7)})
    return model


def write_run(
    out: Path,
    *,
    selection: SelectionConfig | None,
    labels: tuple[str, ...] = LABELS,
    channels_last: bool = False,
    scales: str = "",
    **args: Any,
) -> nn.Module:
    """Write a run folder (weights, structure, labels, preprocessing); returns the network in it. args: of the
    architecture, beside those of `ARCH_ARGS`; scales: settled, with `learned` or `cheap` scales."""
    args = {**ARCH_ARGS, **args}
    model = tiny_network(selection=None if scales else selection, num_classes=len(labels), **args)
    if scales:
        model = select(model, selection)
        fix_scales(model, list, but_cheap=scales == "cheap")
        chosen = gates(model)
        worth = {name: torch.rand(gate.sign.numel()) for name, gate in chosen.items()}
        Winners(worth, tied_units(model)).place(model, dict.fromkeys(chosen, 0.6))
        settle(model)
        for gate in chosen.values():
            torch.nn.init.normal_(gate.predictor.weight, std=0.3)
    with torch.no_grad():  # logits of about 1, or every probability would be 0 or 1
        spread = model(torch.randn(8, 3, 1, 1) + 0.3 * torch.randn(8, 3, 32, 32)).abs().max()
        for parameter in model.fc.parameters() if spread.isfinite() else ():
            parameter.div_(spread)
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    cost = measure_cost(model, [torch.randn(2, 3, 32, 32)])
    save_run(out, model=model, arch="resnet18", arch_args=args, num_classes=len(labels), selection=selection,
             labels=labels, preprocess=PREPROCESS, summary=cost_summary(cost))  # fmt: skip
    return model


def write_photos(root: Path, classes: tuple[str, ...] = LABELS, each: int = 4) -> list[Path]:
    """`each` photos of a plain colour with noise in each class folder."""
    rng = np.random.default_rng(0)
    paths = []
    for i, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for j in range(each):
            noise = rng.integers(0, 60, (40, 48, 3)) + 60 * (i % 3)
            paths.append(root / name / f"{j}.png")
            Image.fromarray(noise.astype(np.uint8)).save(paths[-1])
    return paths


def changed(config: FitConfig, changes: dict[str, Any]) -> FitConfig:
    """``config`` with changes; of what it has of its own, only what the method then looks at."""
    new = dataclasses.replace(config, **changes)
    assert new.data is not None
    from_base = is_run(new.source) and new.data.exists() and load_run(new.source).labels == scan(new.data).classes
    return dataclasses.replace(without_idle(new, from_base=from_base), **changes)
