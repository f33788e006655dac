"""Structured pruning to a budget of counted MACs, through torch-pruning.

::

    share of channels p  0 |-------------*-----| 1        bisection on p: cut a copy, count its MACs
    counted MACs     dense |=======._____      |
                    budget |.............*_____|          then cut the network itself

torch-pruning (Fang et al., *DepGraph: Towards Any Structural Pruning*, CVPR 2023) finds which layers must lose a
channel together; which channels are worth least is the method's own (`l1.py`, `slimming.py`). The classifier's
outputs stay. In one stage (fine-tune, prune, fine-tune) or in several while the network trains (gradual).
"""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch_pruning as tp
from torch import Tensor, nn

from afds.compression import l1, slimming
from afds.compression.widths import Kept, numbered, read_numbers, weight_shapes
from afds.cost import CostMeter
from afds.errors import BudgetError, SourceError

MOST = 0.98  # share of channels; torch-pruning always leaves one
HALVINGS = 10


@dataclass(frozen=True)
class Pruning:
    """When channels are cut away, and to what cost."""

    method: Literal["l1", "slimming"]
    scope: Literal["layer", "network"]
    stage_steps: tuple[int, ...]
    """Before each of these training steps one stage is cut."""
    ratio: float
    """Where it ends: times fewer MACs than ``reference``."""
    reference: float
    """MACs of the whole network."""
    input_size: int

    def target(self, stage: int) -> float:
        """Ratio of MACs after stage 0, 1, ...: geometric."""
        return self.ratio ** ((stage + 1) / len(self.stage_steps))


def plan_pruning(method: Literal["l1", "slimming"], scope: str, *, stages: int, end: float, total_steps: int,
                 ratio: float, reference: float, input_size: int) -> Pruning:  # fmt: skip
    """Stages at even steps from the first on, the last before the share ``end`` of the training."""
    last = max(1, round(end * total_steps))
    stages = max(1, min(stages, last))
    chosen: Any = scope if scope != "auto" else ("network" if method == "slimming" else "layer")
    steps = tuple(last * i // stages for i in range(stages))
    return Pruning(method, chosen, steps, ratio, reference, input_size)


def check_reachable(network: nn.Module, plan: Pruning) -> None:
    """Refuse, before any training, a budget that even the hardest cut does not meet.

    Raises:
        BudgetError: with what can be had.
        SourceError: torch-pruning cannot cut this network.
    """
    cost = _cost_after(network, plan, MOST)
    if plan.reference / cost < plan.ratio:
        raise BudgetError(f"A budget of {plan.ratio:.4g}x cannot be reached by pruning: with {MOST:.0%} of the "
                          f"channels gone this network is {plan.reference / cost:.4g}x cheaper.")  # fmt: skip


def cut_to(network: nn.Module, plan: Pruning, ratio: float) -> Kept:
    """Cut channels away, in place, until the network costs at most reference / ``ratio`` MACs.

    Returns:
        Which channels remain, of those that were there before this cut.
    """
    if plan.reference / _cost_after(network, plan, 0.0) >= ratio:
        return {}
    low, high = 0.0, MOST
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if plan.reference / _cost_after(network, plan, middle) >= ratio:
            high = middle
        else:
            low = middle
    original = weight_shapes(network)
    index = copy.deepcopy(network)
    history = _prune(network, plan, high)
    graph = _graph(index, plan)
    numbered(index)
    graph.load_pruning_history(history)
    kept = read_numbers(index, original)
    network.requires_grad_(True)
    return kept


def _cost_after(network: nn.Module, plan: Pruning, share: float) -> float:
    """Counted MACs of a copy with this share of its channels cut."""
    trial = copy.deepcopy(network)
    if share > 0:
        _prune(trial, plan, share)
    try:
        return CostMeter(trial)(_image(trial, plan))[1].counted
    except RuntimeError as error:
        raise SourceError(f"{type(network).__name__} cannot be pruned: what is left does not run "
                          f"({str(error).splitlines()[0]}). Use +afs, +lowres or +small.") from error  # fmt: skip


def _prune(network: nn.Module, plan: Pruning, share: float) -> list[Any]:
    """One call of torch-pruning; returns what it did, to be done again on another copy."""
    was_training = network.training
    network.eval().requires_grad_(True)
    importance = l1.importance() if plan.method == "l1" else slimming.importance()

    def pruner(per_layer: dict[nn.Module, float] | None = None) -> Any:
        return tp.pruner.BasePruner(network, _image(network, plan), importance, pruning_ratio=share,
                                    pruning_ratio_dict=per_layer, ignored_layers=_heads(network))  # fmt: skip

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on parameters that it leaves alone
        try:
            chosen = pruner(_compete(pruner(), importance, share) if plan.scope == "network" else None)
            chosen.step()
        except Exception as error:  # whatever it makes of networks that it does not know
            raise SourceError(f"torch-pruning cannot prune {type(network).__name__}: {error}") from error
    network.train(was_training)
    return chosen.pruning_history()


def _compete(pruner: Any, importance: Any, share: float) -> dict[nn.Module, float]:
    """The share to cut of each layer, so that the least important channels of the whole network go.

    Not torch-pruning's own global mode, which leaves a layer whole where all of its channels fall below the threshold:
    here `MOST` of them go.
    """
    groups = list(pruner.DG.get_all_groups(pruner.ignored_layers, pruner.root_module_types))
    scored = [(group, importance(group)) for group in groups]
    scored = [(group, score.detach().cpu()) for group, score in scored if score is not None]  # a group without norms
    groups, scores = [group for group, _ in scored], [score for _, score in scored]
    order = torch.cat(scores).argsort(stable=True)
    owner = torch.cat([torch.full((len(score),), i) for i, score in enumerate(scores)])
    falling = owner[order[: round(share * len(order))]].bincount(minlength=len(groups)).tolist()
    found = {}
    for group, score, count in zip(groups, scores, falling, strict=True):
        count = min(count, int(MOST * len(score)))
        found[group[0].dep.target.module] = max(0.0, (count - 0.5) / len(score))  # torch-pruning rounds down
    return found


def _graph(network: nn.Module, plan: Pruning) -> Any:
    network.eval().requires_grad_(True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return tp.DependencyGraph().build_dependency(network, _image(network, plan))


def _image(network: nn.Module, plan: Pruning) -> Tensor:
    return torch.zeros(1, 3, plan.input_size, plan.input_size, device=next(network.parameters()).device)


def _heads(network: nn.Module) -> list[nn.Module]:
    head = network.get_classifier()  # type: ignore[operator]
    return list(head) if isinstance(head, tuple) else [head]
