"""The interface of all regularisers: what they see of a step, what they ask to see, how they survive surgery."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from afds.compression.widths import Kept


@dataclass(frozen=True)
class Step:
    """One training step, as a regulariser sees it."""

    network: nn.Module
    """The target network."""
    logits: Tensor
    """(B, K)."""
    features: Mapping[str, Tensor]
    """The target's feature maps (B, C, H, W) at the points that were asked for."""
    teacher_logits: Tensor | None = None
    """(B, K); None where the teacher does not know the target's classes."""
    teacher: Mapping[str, Tensor] = field(default_factory=dict)
    """The teacher's feature maps, uncut."""


class Regulariser(nn.Module):
    """One term of the loss. What it learns itself (AFD's phi) are its parameters.

    Attributes:
        name: of the term in the record.
        weight: factor of the term in the loss.
        units, blocks: ConvBN units and residual blocks whose outputs are compared.
        before_norm: the units' convolutions are compared, before their batch norms.
        replaces_decay: the term takes the place of weight decay on the backbone.
        facts: numbers of the last step worth logging, by unit.
    """

    name = ""
    replaces_decay = False
    before_norm = False

    def __init__(self, weight: float, units: tuple[str, ...] = (), blocks: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.weight = weight
        self.units = units
        self.blocks = blocks
        self.facts: dict[str, Tensor] = {}
        self.channels: dict[str, Tensor] = {}  # what the target has kept of the teacher's channels

    def forward(self, step: Step) -> Tensor:
        """The term, unweighted: a scalar."""
        raise NotImplementedError

    def cut(self, kept: Kept) -> None:
        """Channels have gone from the target; ``kept`` says, by module, which of the original ones remain."""
        self.channels = {unit: kept[unit].out for unit in self.units if unit in kept}

    def _teacher(self, step: Step) -> dict[str, Tensor]:
        """The teacher's feature maps, of the channels that the target still has."""
        return {n: f[:, self.channels[n].to(f.device)] if n in self.channels else f for n, f in step.teacher.items()}
