"""What a training step costs: AFDS beside plain fine-tuning, alternating in one process, and the peak of memory.

    python benchmarks/step_cost.py --source resnet18:weights.safetensors --input-size 128 --repeats 11

Rows: `plain` fine-tuning; `base` (AFD from the pretrained source, no gates: the default's step before it settles);
`gates` (selection at d = 1, no teacher); `afd` (gates and AFD: the paper's step); `afds` (gates, AFD, logits and block
hints from a dense base: `--descent.no-settle`); `settled` (the same with all but the winners cut away at the ratio,
AdamW: the default). Random images.
"""

from __future__ import annotations

import copy
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import afds  # noqa: F401  first: it makes torchvision importable beside a CPU-only torch

# isort: split
import torch
import torch.nn.functional as F
import tyro
from torch import nn

from afds import balance
from afds.compression.widths import KeptChannels
from afds.config import FitConfig
from afds.distillation import AttentiveDistillation, FrozenNetwork, feature_sizes
from afds.graph import residual_blocks, stage_ends, unit_roles
from afds.hardware import stamp
from afds.schedule import solve
from afds.selection import gates, select, selective_units
from afds.settling import Winners, settle, tied_units
from afds.sources import load_source
from afds.task import Task
from afds.transfer import AttentiveTransfer, BlockHints, LogitDistillation, Regulariser


@dataclass(frozen=True)
class Options:
    """Time one training step of each kind."""

    source: str
    """As `afds fit --source`."""
    input_size: int = 128
    batch_size: int = 32
    classes: int = 101
    ratio: float = 5.0
    """How many times fewer MACs the settled network has."""
    repeats: int = 11
    only: str = ""
    """Measure one row alone, for its peak of memory."""


def main(options: Options) -> None:
    torch.manual_seed(0)
    source = load_source(options.source, num_classes=options.classes).model
    plain = source.to(memory_format=torch.channels_last).train()
    names = [name for name, _ in selective_units(select(plain))]
    ends, blocks = stage_ends(plain, names), residual_blocks(plain)
    x_BCHW = torch.randn(options.batch_size, 3, options.input_size, options.input_size)
    x_BCHW = x_BCHW.contiguous(memory_format=torch.channels_last)
    y_B = torch.randint(0, options.classes, (options.batch_size,))
    teacher = FrozenNetwork(plain, ends, blocks)
    sizes = feature_sizes(teacher, x_BCHW[:1])
    config = FitConfig()
    afd = AttentiveTransfer(config.distillation.afd, AttentiveDistillation(sizes))
    roles = unit_roles(plain)
    writers = {b: next(n for n in names if n.startswith(f"{b}.") and roles[n] == "stream") for b in blocks}
    of_base = (LogitDistillation(config.distillation.logits, config.distillation.temperature), BlockHints(1.0, writers))

    def task_with(*terms: Regulariser) -> Task:
        return Task(select(plain), terms, config).to(memory_format=torch.channels_last).train()

    gated, near_source, near_base = task_with(), task_with(afd), task_with(afd, *of_base)
    base = Task(copy.deepcopy(plain), [copy.deepcopy(afd)], config).to(memory_format=torch.channels_last).train()
    narrow = settled_task(select(plain), copy.deepcopy((afd, *of_base)), config, options.ratio, x_BCHW[:1])

    def learn(module: nn.Module, loss: Callable[[], torch.Tensor], adam: bool = False) -> Callable[[], None]:
        optimizer: torch.optim.Optimizer = torch.optim.SGD(module.parameters(), lr=1e-6, momentum=0.9)
        if adam:
            optimizer = torch.optim.AdamW(module.parameters(), lr=1e-6)

        def step() -> None:
            loss().backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    def taught(task: Task) -> torch.Tensor:
        return task(x_BCHW, y_B, teacher(x_BCHW))["loss"]

    rows: dict[str, Callable[[], None]] = {
        "plain": learn(plain, lambda: F.cross_entropy(plain(x_BCHW), y_B)),
        "base": learn(base, lambda: taught(base)),
        "gates": learn(gated, lambda: gated(x_BCHW, y_B, None)["loss"]),
        "afd": learn(near_source, lambda: taught(near_source)),
        "afds": learn(near_base, lambda: taught(near_base)),
        "settled": learn(narrow, lambda: taught(narrow), adam=True),
    }
    rows = {name: step for name, step in rows.items() if options.only in ("", name)}
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    for turn in range(options.repeats + 1):
        for name, step in rows.items():
            begun = time.perf_counter()
            step()
            if turn:  # the first warms up
                seconds[name].append(time.perf_counter() - begun)
    reference = seconds.get("plain", next(iter(seconds.values())))
    print(f"{options.source}, {options.input_size} px, batch {options.batch_size}, {torch.get_num_threads()} threads")
    for name, times in seconds.items():
        ratios = sorted(a / b for a, b in zip(times, reference, strict=True))
        print(f"  {name:7} {1e3 * statistics.median(times):8.0f} ms   {statistics.median(ratios):.2f}x plain "
              f"({ratios[0]:.2f} to {ratios[-1]:.2f})")  # fmt: skip
    print(f"  peak of memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB")
    print(f"  {stamp('cpu', '32-true')}")


def settled_task(
    network: nn.Module, terms: tuple[Regulariser, ...], config: FitConfig, ratio: float, x_BCHW: torch.Tensor
) -> Task:
    """The default's task after its first step: densities by the fixed rule, winners by lot, the rest cut away."""
    tied = tied_units(network)
    layers = balance.layers_of(network, tied)
    path = balance.allocation(balance.start(1 + max(stage for stage, _ in layers.values())), layers)
    worth = {name: torch.rand_like(gate.importance) for name, gate in gates(network).items()}
    winners = Winners(worth, tied, config.descent.multiple_of)
    solve(network, path, ratio, [x_BCHW], place=winners.place, spend=winners.spend)
    nothing = torch.empty(0, dtype=torch.long)
    kept = {name: KeptChannels(out, nothing) for name, out in settle(network).items()}
    for term in terms:
        term.cut(kept)
    return Task(network, terms, config).to(memory_format=torch.channels_last).train()


if __name__ == "__main__":
    main(tyro.cli(Options))
