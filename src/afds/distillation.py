"""AFD, attentive feature distillation, and the frozen networks that targets are compared with.

::

    image x --+--> source, frozen  --> F_l(x, theta*)  --+--> rho_l = softmax_c( relu(flat F* phi) phi' )
              |                                          |
              +--> target, learning --> F_l(x, theta) ---+--> sum_c rho_l[c] || F_l[c] - F*_l[c] ||_2

    L = CE(f(x, theta), y) + lambda sum_l mean_B sum_c rho_l[c](x) || F_l(x, theta)[c] - F_l(x, theta*)[c] ||_2

F_l is the ConvBN output, after the selection gate and before the residual sum and the ReLU, of the last block of
each stage; phi_l is (H W) x hidden, phi'_l is hidden, both trained jointly with theta. Wang et al., ICLR 2020.
Ours: phi is built for the map sizes that a dry run of the real input size shows, and has a bias; the norm can be
squared; and the frozen network may be the fine-tuned dense network, whose logits and block outputs are then distilled
too (`transfer/kd.py`, `transfer/hints.py`).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from afds.graph import convbn_units
from afds.selection import selective_units
from afds.views import averaged


@dataclass(frozen=True)
class TapPoint:
    """Where a unit's ConvBN output can be read: the output of a module, or the input of one."""

    path: str
    reads_input: bool = False


def tap_points(model: nn.Module, names: Sequence[str], *, before_norm: bool = False) -> dict[str, TapPoint]:
    """Tap points of ConvBN outputs by unit, or of their convolutions', in a network with or without selection."""
    if any(True for _ in selective_units(model)):
        return {name: TapPoint(name + ".conv" * before_norm) for name in names}
    if before_norm:
        return {name: TapPoint(name) for name in names}
    norms = {unit.name: unit.norm for unit in convbn_units(model)}
    points = {}
    for name in names:
        carries_act = isinstance(getattr(model.get_submodule(norms[name]), "act", None), nn.Module)
        points[name] = TapPoint(norms[name] + ".act", True) if carries_act else TapPoint(norms[name])
    return points


@contextmanager
def tap(model: nn.Module, points: dict[str, TapPoint]) -> Iterator[dict[str, Tensor]]:
    """Collect feature maps at ``points`` while the context lasts; the hooks go with it."""
    features: dict[str, Tensor] = {}

    # Cloned at once: timm adds the residual and applies the ReLU in place, onto the very tensor that is tapped.
    def keep(name: str, reads_input: bool):  # type: ignore[no-untyped-def]
        def hook(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            features[name] = output.clone()

        def pre_hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            features[name] = args[0].clone()

        return pre_hook if reads_input else hook

    handles = []
    for name, point in points.items():
        module, hook = model.get_submodule(point.path), keep(name, point.reads_input)
        register = module.register_forward_pre_hook if point.reads_input else module.register_forward_hook
        handles.append(register(hook))
    try:
        yield features
    finally:
        for handle in handles:
            handle.remove()


class FrozenNetwork:
    """A copy of a network that is only looked at: eval mode for good, no gradients, not a module of anything.

    Where it carries no selection its batch norms are folded into the convolutions, as its forward is a third of a
    training step; a ConvBN's output is then the convolution's own, and keeps the convolution's name.

    Args:
        features: paths of the ConvBN units whose outputs are compared.
        blocks: paths of residual blocks whose outputs are compared.
        before_norm: compare the convolutions' outputs; nothing is folded then.
    """

    def __init__(
        self, model: nn.Module, features: Sequence[str], blocks: Sequence[str] = (), *, before_norm: bool = False
    ) -> None:
        self.features = tuple(features)
        self.sizes: dict[str, tuple[int, int]] = {}  # of the target's maps, where it looks at smaller images
        self.network = copy.deepcopy(model).eval().requires_grad_(False)
        self.points = {name: TapPoint(name) for name in (*self.features, *blocks)}
        if before_norm:
            self.points |= tap_points(self.network, self.features, before_norm=True)
        elif not any(True for _ in selective_units(self.network)):
            _fold(self.network)

    @torch.no_grad()
    def __call__(self, x_BCHW: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits (B, classes) and the features {unit: (B, C, H, W)}."""
        with tap(self.network, self.points) as features:
            logits = self.network(x_BCHW)
        return logits, averaged(features, self.sizes)

    def look_from(self, side: int) -> None:
        """From now on give feature maps of the sizes that images of this side, in pixels, have."""
        x_BCHW = torch.zeros(1, 3, side, side, device=next(self.network.parameters()).device)
        self.sizes = {}
        self.sizes = {name: (map.shape[2], map.shape[3]) for name, map in self(x_BCHW)[1].items()}

    def to(self, device: torch.device) -> FrozenNetwork:
        self.network.to(device)
        return self


def _fold(model: nn.Module) -> None:
    for unit in convbn_units(model):
        conv, norm = model.get_submodule(unit.name), model.get_submodule(unit.norm)
        assert isinstance(conv, nn.Conv2d)
        assert isinstance(norm, nn.BatchNorm2d)
        _set(model, unit.name, fuse_conv_bn_eval(conv, norm))
        rest = [m for m in (getattr(norm, "drop", None), getattr(norm, "act", None)) if isinstance(m, nn.Module)]
        _set(model, unit.norm, nn.Sequential(*rest))


def _set(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


class AttentiveDistillation(nn.Module):
    """The attention networks phi of all stages, and the loss.

    Args:
        sizes: for each compared unit, the number of positions H W of its output at the real input size.
        hidden: width H of phi.
        squared: square the distance of each channel.
    """

    def __init__(self, sizes: dict[str, int], *, hidden: int = 32, squared: bool = False) -> None:
        super().__init__()
        self.names = tuple(sizes)
        self.sizes = dict(sizes)
        self.squared = squared
        self.phi = nn.ModuleList(
            nn.Sequential(nn.Linear(size, hidden), nn.ReLU(), nn.Linear(hidden, 1, bias=False))
            for size in sizes.values()
        )

    def attention(self, source: dict[str, Tensor]) -> dict[str, Tensor]:
        """rho: {unit: (B, C)}, each row sums to 1.

        Raises:
            ValueError: a feature map of another size than phi was built for.
        """
        rho = {}
        for name, phi in zip(self.names, self.phi, strict=True):
            flat_BCN = source[name].float().flatten(2)
            if flat_BCN.shape[2] != self.sizes[name]:
                raise ValueError(f"AFD was built for {self.sizes[name]} positions at {name}, the image gives "
                                 f"{flat_BCN.shape[2]}: build it again for this input size.")  # fmt: skip
            rho[name] = phi(flat_BCN).squeeze(2).softmax(1)
        return rho

    def forward(self, target: dict[str, Tensor], source: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss before lambda, and the mean entropy of rho per unit, in units of log C (1: uniform)."""
        loss = torch.zeros((), device=next(self.parameters()).device)
        entropy = {}
        with torch.autocast(loss.device.type, enabled=False):  # softmax and norms in float32
            for name, rho_BC in self.attention(source).items():
                difference_BCN = target[name].float().flatten(2) - source[name].float().flatten(2)
                # A little under the root: the norm has no gradient at 0, where every run starts.
                distance_BC = difference_BCN.square().sum(2)
                if not self.squared:
                    distance_BC = (distance_BC + 1e-8).sqrt()
                loss = loss + (rho_BC * distance_BC).sum(1).mean()
                with torch.no_grad():
                    nats = -(rho_BC * rho_BC.clamp_min(1e-12).log()).sum(1).mean()
                    entropy[name] = nats / torch.tensor(float(max(2, rho_BC.shape[1]))).log()
        return loss, entropy


def feature_sizes(frozen: FrozenNetwork, x_BCHW: Tensor) -> dict[str, int]:
    """Positions H W of each compared feature map, from a dry run of the real input size."""
    _, features = frozen(x_BCHW)
    return {name: features[name].shape[2] * features[name].shape[3] for name in frozen.features}
