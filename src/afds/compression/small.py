"""A smaller pretrained network, fine-tuned the same way: what a sceptical engineer tries first.

The user names it (`--small-source resnet18`, or `resnet18:weights.safetensors`), as its weights must be at hand. It
must meet the budget as it is; with `small+lowres` its images shrink until it does.
"""

from __future__ import annotations

from afds.errors import ConfigError, SourceError
from afds.sources import create

LADDER = ("resnet152", "resnet101", "resnet50", "resnet34", "resnet26", "resnet18", "resnet14t", "resnet10t",
          "mobilenetv3_large_100", "mobilenetv2_100", "mobilenetv2_050", "mobilenetv3_small_100",
          "mobilenetv3_small_050")  # fmt: skip


def require_small(named: str, macs: float, side: int, classes: int) -> str:
    """What ``--small-source`` names.

    Raises:
        ConfigError: it names nothing; with networks that would meet ``macs`` at ``side`` pixels.
    """
    if named:
        return named
    fitting = [f"{name} ({cost / 1e6:.0f} M)" for name in LADDER if (cost := _macs(name, side, classes)) <= macs]
    hint = f"Within {macs / 1e6:.0f} M MACs at {side} px are: {', '.join(fitting) or 'none that we know of'}."
    raise ConfigError(f"+small needs --small-source NAME, or NAME:weights.safetensors. {hint}")


def too_dear(named: str, cost: float, macs: float, side: int) -> str:
    """Why a smaller network is refused, and the way out."""
    return (f"--small-source {named} costs {cost / 1e6:.1f} M MACs at {side} px, the budget is {macs / 1e6:.1f} M. "
            "Name a smaller one, or let its images shrink too: TRANSFER+small+lowres.")  # fmt: skip


def _macs(name: str, side: int, classes: int) -> float:
    from afds.compression.lowres import macs_at

    try:
        return macs_at(create(name, classes), side)
    except SourceError:
        return float("inf")
