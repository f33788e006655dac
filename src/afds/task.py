"""What learns: the target network with the terms of its loss, and how its parameters are stepped.

::

    x --> target --> logits --> cross-entropy ----------------+
     \\       '--> features --> transfer's terms (transfer/) --+--> loss
      \\--> frozen teacher --> logits, features --^
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from afds.config import FitConfig, OptimConfig
from afds.data import UNLABELLED
from afds.distillation import TapPoint, tap, tap_points
from afds.selection import Predictor
from afds.strided import taken_apart
from afds.transfer import Regulariser, Step


class Task(nn.Module):
    """The target network and what else learns with it, in one module, as data parallelism wants it.

    Args:
        terms: the transfer's regularisers.
        head: prefixes of the classifier's parameters.
    """

    def __init__(
        self, network: nn.Module, terms: Sequence[Regulariser], config: FitConfig, head: tuple[str, ...] = ()
    ) -> None:
        super().__init__()
        self.network = network
        self.regularisers = tuple(terms)
        self.terms = nn.ModuleList(terms)  # so that what they learn is the task's
        self.config = config
        self.head = tuple(f"network.{prefix}" for prefix in head)
        self.points: dict[str, TapPoint] = {}
        for term in terms:
            if term.units:
                self.points |= tap_points(network, term.units, before_norm=term.before_norm)
        self.points |= {name: TapPoint(name) for term in terms for name in term.blocks}

    def forward(
        self,
        x_BCHW: Tensor,
        y_B: Tensor,
        teacher: tuple[Tensor | None, dict[str, Tensor]] | None,
        mixed: tuple[Tensor, float] | None = None,
    ) -> dict[str, Any]:
        """The terms of the loss, unweighted, their weighted sum `loss`, and rho's `entropy`.

        mixed: where the images are blends, the labels (B,) of their second parts and the share of the first.
        """
        with tap(self.network, self.points) as features, taken_apart(self.network):
            logits_BK = self.network(x_BCHW)
        out: dict[str, Any] = {"entropy": {}}
        smoothing, known_B = self.config.optim.label_smoothing, y_B != UNLABELLED
        out["ce"] = _cross_entropy(logits_BK.float(), y_B, smoothing)
        if mixed is not None:
            out["ce"] = torch.lerp(_cross_entropy(logits_BK.float(), mixed[0], smoothing), out["ce"], mixed[1])
        out["correct"] = (logits_BK.detach().argmax(1) == y_B).float().sum() / known_B.sum().clamp_min(1)
        out["loss"] = out["ce"]
        seen = Step(self.network, logits_BK, features, *(teacher or (None, {})))
        for term in self.regularisers:
            out[term.name] = term(seen)
            out["loss"] = out["loss"] + term.weight * out[term.name]
            out["entropy"] |= term.facts
        return out


def _cross_entropy(logits_BK: Tensor, y_B: Tensor, smoothing: float) -> Tensor:
    """Mean over all images; those without a label cost nothing."""
    if bool((y_B != UNLABELLED).all()):
        return F.cross_entropy(logits_BK, y_B, label_smoothing=smoothing)
    total = F.cross_entropy(logits_BK, y_B, ignore_index=UNLABELLED, label_smoothing=smoothing, reduction="sum")
    return total / len(y_B)


def parameter_groups(task: Task, config: FitConfig) -> list[dict[str, Any]]:
    """Weights, predictors' weights (own rate), and scales, biases and norms (no decay), in a stable order.

    Where a regulariser takes the place of weight decay, the classifier alone decays, at a rate of its own.
    """
    optim = config.optim
    predictors = {
        id(p) for m in task.modules() if isinstance(m, Predictor) for n, p in m.named_parameters() if n != "bias"
    }
    replaced = any(term.replaces_decay for term in task.regularisers)
    weights, heads, predicting, rest = [], [], [], []
    for name, p in task.named_parameters():
        if id(p) in predictors:
            predicting.append(p)
        elif p.ndim > 1 and replaced and name.startswith(task.head):
            heads.append(p)
        elif p.ndim > 1:
            weights.append(p)
        else:
            rest.append(p)
    groups = [
        {"params": weights, "weight_decay": 0.0 if replaced else optim.weight_decay, "multiple": 1.0},
        {"params": heads, "weight_decay": config.transfer.head_decay, "multiple": 1.0},
        {"params": predicting, "weight_decay": optim.weight_decay, "multiple": optim.predictor_lr},
        {"params": rest, "weight_decay": 0.0, "multiple": 1.0},
    ]
    return [g for g in groups if g["params"]]


def learning_rate(step: int, total: int, optim: OptimConfig) -> float:
    """Rate of a step: warm-up over the first 5 %, then cosine to 0, or times 0.1 after 67 %."""
    warm = max(1, round(0.05 * total))
    rise = min(1.0, (step + 1) / warm)
    if optim.schedule == "step":
        return optim.lr * rise * (0.1 if step >= 0.67 * total else 1.0)
    return optim.lr * rise * 0.5 * (1 + math.cos(math.pi * max(0, step - warm) / max(1, total - warm)))


def make_optimizer(groups: list[dict[str, Any]], optim: OptimConfig) -> torch.optim.Optimizer:
    """The optimizer that the options name."""
    if optim.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=optim.lr)
    return torch.optim.SGD(groups, lr=optim.lr, momentum=optim.momentum, nesterov=optim.momentum > 0)
