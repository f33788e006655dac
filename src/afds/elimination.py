"""Elimination: which channels can the others, refitted, least stand in for (ours).

::

    x_C --> reader r: y_r = W_r X_r          a class of channels (a residual stream, the inside of a block) and all
        '-> reader s: y_s = W_s X_s          that read it; X_r: the patches that arrive, D = C kh kw numbers

    P_r  = (cov X_r + ridge)^-1                                 the dense network, crops of training images
    e(c) = sum_r tr( H_r W_rc' P_r,cc^-1 W_rc )                 what is lost when c goes and the others are refitted
    the c of the smallest e goes:   W_r -= P_r,:c P_r,cc^-1 W_rc      P_r -= P_r,:c P_r,cc^-1 P_r,c:
    and again, until one is left

    H_r  = diag E[ sum_hw (dL/dy_r)^2 ]                         what an error of each output costs, labelled images

What stays longest is worth most. Hassibi & Stork, *Second order derivatives for network pruning: Optimal Brain
Surgeon*, NeurIPS 1992; for structures, layer by layer: Kurtic et al., *ZipLM*, NeurIPS 2023. Ours: all readers of a
class at once, the classifier among them (which the refit leaves as it is: training moves its bias), as layers of a
residual stream must keep the same channels, and once more when it is known which outputs
stay. Why: a Taylor estimate asks what each channel does alone, so of two that say the same it keeps both, although the
refit that follows (reconstruction.py) would make one say what the other said (docs/accuracy.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from afds.compaction import find_couplings
from afds.reconstruction import gram, patches
from afds.selection import SelectiveConvBN, gates
from afds.strided import taken_apart

LARGEST = 10_000  # numbers in a reader's patch: the matrices are D x D
CROPS = 256, 2048  # at least, at most; between them as many as `ROWS` asks for
ROWS = 3  # positions of all crops together on which a reader's problem is posed, for each number in its patch
AT_ONCE = 128  # a class is gone after about so many steps, several channels in each where it has more
SHRINK = 7 / 8  # what is gone is taken out of the matrices when so much is left of them


@dataclass
class Reader:
    """What reads a class, as a least squares problem."""

    inverse: Tensor
    """P (D, D): of the covariance of what arrives."""
    weight: Tensor
    """W (D, O), each column scaled by the root of what an error of that output costs."""


class Elimination:
    """What the readers of a network's channels see, read once, and the order in which channels can go."""

    def __init__(
        self,
        model: nn.Module,
        crops: Sequence[Tensor],
        labelled: Sequence[tuple[Tensor, Tensor]],
        *,
        ridge: float = 0.1,
        told: Callable[[int, int], None] | None = None,
    ) -> None:
        """
        Args:
            model: a network with selection, at d = 1; mode and gradients are restored.
            crops: images (B, 3, H, W) on which the others would be refitted; the first ones are used (`CROPS`).
            labelled: batches (B, 3, H, W), (B,) on which an error of each output is weighed.
            ridge: of the refit, as a share of the inputs' mean power.
            told: hears how many of how many batches of crops have been looked at, which takes most of the time.
        """
        couplings, names = find_couplings(model), set(gates(model))
        self._channels = couplings.channels
        self._units: dict[int, list[str]] = {}
        for name, number in couplings.producers().items():
            if name in names:
                self._units.setdefault(number, []).append(name)
        self._readers: dict[int, dict[str, nn.Module]] = {}
        for layer in couplings.layers:
            module = layer.module.conv if isinstance(layer.module, SelectiveConvBN) else layer.module
            if layer.into in self._units and layer.times == 1 and _is_small(module):
                self._readers.setdefault(layer.into, {})[layer.name] = module
        watched = {name: module for found in self._readers.values() for name, module in found.items()}
        was_training = model.training
        model.eval()
        self._cost = _cost_of_errors(model, watched, labelled)
        moments = _second_moments(model, watched, crops, told)
        self._inverse = {name: _inverse(moments.pop(name), ridge) for name in watched}
        model.train(was_training)

    def __call__(self, kept: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """What channels are worth: their places in the order, the last that is left the most.

        Args:
            kept: (C,) bool of units whose other outputs will go, so that errors of those cost nothing.
        Returns:
            (C,) float64 of each unit that chooses, the same for tied ones; without those that nothing reads whose
            problem is small enough to solve, as a head behind a flattened map.
        """
        worth: dict[str, Tensor] = {}
        for number, found in self._readers.items():
            posed = []
            for name, module in found.items():
                inverse_DD = self._inverse[name]
                if inverse_DD is not None:
                    cost_O = self._cost[name]
                    if kept is not None and name in kept:
                        cost_O = cost_O * kept[name]
                    weight_OD = module.weight.detach().flatten(1)  # type: ignore[operator, union-attr]
                    posed.append(Reader(inverse_DD.clone(), weight_OD.t() * cost_O.sqrt()))
            if posed:
                order_C = order(posed, self._channels[number])
                worth |= dict.fromkeys(self._units[number], order_C)
        return worth


@torch.no_grad()
def order(readers: Sequence[Reader], channels: int, *, at_once: int | None = None) -> Tensor:
    """(C,) float64: 0 for the channel that goes first, C - 1 for the one that is left; ``readers`` are used up.

    at_once: channels that go in one step, by default what makes about `AT_ONCE` steps.
    """
    at_once = at_once or max(1, channels // AT_ONCE)
    device = readers[0].inverse.device
    place_C = torch.zeros(channels, dtype=torch.double, device=device)
    here = torch.arange(channels, device=device)  # the channels that the matrices still have
    left_C = torch.ones(channels, dtype=torch.bool, device=device)  # of those
    gone = 0
    while gone < channels - 1:
        go = losses(readers, left_C).topk(min(at_once, channels - 1 - gone), largest=False).indices
        place_C[here[go]] = torch.arange(gone, gone + len(go), dtype=torch.double, device=device)
        gone += len(go)
        for reader in readers:
            _take_away(reader, go, len(left_C))
        left_C[go] = False
        if channels - gone <= SHRINK * len(here):
            for reader in readers:
                _shrink(reader, left_C)
            here = here[left_C]
            left_C = left_C[left_C]
    place_C[here[left_C]] = channels - 1
    return place_C


def losses(readers: Sequence[Reader], left_C: Tensor) -> Tensor:
    """(C,): e(c) of each channel that is left, infinite for the others."""
    total_C = torch.zeros(len(left_C), device=left_C.device)
    for reader in readers:
        taps = len(reader.inverse) // len(left_C)
        blocks = reader.inverse.view(len(left_C), taps, len(left_C), taps).diagonal(dim1=0, dim2=2)
        own_Ctt = blocks.permute(2, 0, 1).where(left_C[:, None, None], torch.eye(taps, device=left_C.device))
        weight_CtO = reader.weight.view(len(left_C), taps, -1)
        total_C += (weight_CtO * (torch.linalg.inv(own_Ctt) @ weight_CtO)).sum((1, 2))
    return total_C.masked_fill(~left_C, float("inf"))


def _take_away(reader: Reader, go: Tensor, channels: int) -> None:
    d = _numbers(go, len(reader.inverse) // channels)
    rows_dD = reader.inverse[d]
    share_Dd = torch.linalg.solve(rows_dD[:, d], rows_dD).t()
    reader.weight.addmm_(share_Dd, reader.weight[d], alpha=-1)
    reader.inverse.addmm_(share_Dd, rows_dD, alpha=-1)
    reader.weight[d] = 0  # to the last bit
    reader.inverse[d] = 0
    reader.inverse[:, d] = 0


def _shrink(reader: Reader, left_C: Tensor) -> None:
    d = _numbers(left_C.nonzero()[:, 0], len(reader.inverse) // len(left_C))
    reader.inverse, reader.weight = reader.inverse[d][:, d], reader.weight[d]


def _numbers(channels: Tensor, taps: int) -> Tensor:
    """Where the patches' numbers of these channels stand."""
    return (channels[:, None] * taps + torch.arange(taps, device=channels.device)).flatten()


def _is_small(module: nn.Module) -> bool:
    if isinstance(module, nn.Conv2d):
        kh, kw = module.kernel_size
        return module.groups == 1 and module.in_channels * kh * kw <= LARGEST
    return isinstance(module, nn.Linear) and module.in_features <= LARGEST


@contextmanager
def _hooked(handles: Sequence[torch.utils.hooks.RemovableHandle]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _cost_of_errors(
    model: nn.Module, watched: dict[str, nn.Module], labelled: Sequence[tuple[Tensor, Tensor]]
) -> dict[str, Tensor]:
    """H: (O,) of each module."""
    outputs: dict[str, Tensor] = {}
    cost: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def hook(_module: nn.Module, _args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            output.retain_grad()
            outputs[name] = output
            return output.clone()  # what goes on in place must not reach the map that is kept

        return hook

    with _hooked([module.register_forward_hook(keep(name)) for name, module in watched.items()]):
        for x_BCHW, y_B in labelled:
            with torch.enable_grad():
                with taken_apart(model):
                    logits_BK = model(x_BCHW)
                F.cross_entropy(logits_BK.float(), y_B, reduction="sum").backward()
            for name, output in outputs.items():
                assert output.grad is not None
                squared = output.grad.float().square()
                cost[name] = cost.get(name, 0) + (squared.sum((0, 2, 3)) if squared.ndim == 4 else squared.sum(0))
            outputs.clear()
            model.zero_grad(set_to_none=True)
    images = sum(len(y_B) for _, y_B in labelled)
    return {name: total / images for name, total in cost.items()}


@torch.no_grad()
def _second_moments(
    model: nn.Module, watched: dict[str, nn.Module], crops: Sequence[Tensor], told: Callable[[int, int], None] | None
) -> dict[str, Tensor]:
    """Covariances (D, D) of the patches that arrive at each module."""
    crops = crops[: -(-_crops_for(model, watched, crops[0][:1]) // len(crops[0]))]
    images = sum(map(len, crops))
    generator = torch.Generator().manual_seed(1)
    sums: dict[str, tuple[Tensor, Tensor, int]] = {}

    def add(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            x = args[0].float()
            if isinstance(module, nn.Conv2d):
                each = -(-ROWS * module.weight[0].numel() // images)
                at_P = torch.randperm(output.shape[2] * output.shape[3], generator=generator)[:each]
                x = torch.stack(list(patches(module, x, at_P)), 1).flatten(0, 1)
            total_D, squares_DD, count = sums.get(name, (0.0, 0.0, 0))
            sums[name] = (total_D + x.sum(0), squares_DD + gram(x), count + len(x))  # type: ignore[assignment]

        return hook

    with _hooked([module.register_forward_hook(add(name)) for name, module in watched.items()]):
        for seen, x_BCHW in enumerate(crops, 1):
            model(x_BCHW)
            if told is not None:
                told(seen, len(crops))
    found = {}
    for name, (total_D, squares_DD, count) in sums.items():
        mean_D = total_D / count
        found[name] = (squares_DD / count).addr_(mean_D, mean_D, alpha=-1)
    return found


def _crops_for(model: nn.Module, watched: dict[str, nn.Module], x_BCHW: Tensor) -> int:
    """How many crops have the positions that the largest problem of a convolution needs."""
    needed = [CROPS[0]]

    def look(module: nn.Module, _args: tuple[Tensor, ...], output: Tensor) -> None:
        if isinstance(module, nn.Conv2d):
            needed.append(-(-ROWS * module.weight[0].numel() // (output.shape[2] * output.shape[3])))

    with _hooked([module.register_forward_hook(look) for module in watched.values()]):
        model(x_BCHW)
    return min(CROPS[1], max(needed))


def _inverse(moments_DD: Tensor, ridge: float) -> Tensor | None:
    """P; None where the moments are no numbers, which the training loop will say."""
    moments_DD.diagonal().add_(ridge * moments_DD.diagonal().mean().clamp_min(1e-12))
    factor, failed = torch.linalg.cholesky_ex(moments_DD)
    if int(failed) or not bool(torch.isfinite(factor).all()):
        return None
    return torch.cholesky_inverse(factor)
