"""What is left of a network whose channels were cut away, as plain data, and how to cut by it.

::

    original conv (out, in, k, k)                    kept.out = [0, 2, 5], kept.in_ = [1, 2]
                     \\--> weight[out][:, in] --> cut conv (3, 2, k, k), recorded as widths [3, 2, groups]

`Kept` holds which of the original channels remain, for whatever must follow the network: the starting point of
L2-SP, the teacher's feature maps, the optimizer's momentum. `widths` holds only how many: enough to build the network
again and fill it, as a run folder does. Neither is code, so neither can run any.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from afds.errors import RunFolderError
from afds.graph import full_shape

CUTTABLE = (nn.Conv2d, nn.BatchNorm2d, nn.Linear)


@dataclass(frozen=True)
class KeptChannels:
    """Of one module: positions of the remaining channels among the original ones."""

    out: Tensor
    in_: Tensor
    """Within a group of a grouped convolution; empty for a batch norm."""

    def then(self, later: KeptChannels) -> KeptChannels:
        """What remains after a second cut."""
        return KeptChannels(self.out[later.out], self.in_[later.in_])


Kept = dict[str, KeptChannels]


def cut_tensor(name: str, tensor: Tensor, kept: Kept) -> Tensor:
    """What is left of a parameter (or of its momentum), given by its name in the network."""
    module, _, _ = name.rpartition(".")
    if module not in kept or tensor.dim() == 0:
        return tensor
    channels = kept[module]
    tensor = tensor[channels.out.to(tensor.device)]
    return tensor[:, channels.in_.to(tensor.device)] if tensor.dim() > 1 else tensor


def then(first: Kept, later: Kept) -> Kept:
    """Two cuts, one after the other, as one."""
    return {name: first[name].then(channels) if name in first else channels for name, channels in later.items()}


def numbered(model: nn.Module) -> None:
    """Write into every cuttable module's tensors their own positions: cut with the network, they tell what is kept."""
    with torch.no_grad():
        for module in model.modules():
            if not isinstance(module, CUTTABLE):
                continue
            old: Tensor = module.weight  # type: ignore[assignment]
            positions = torch.arange(old.numel(), dtype=torch.float64, device=old.device)
            module.weight = nn.Parameter(positions.view(old.shape))


def read_numbers(model: nn.Module, original: dict[str, tuple[int, ...]]) -> Kept:
    """`Kept` of a network that was `numbered` and cut since.

    Args:
        original: shapes of the weights before, by module.
    """
    kept: Kept = {}
    for name, shape in original.items():
        index: Tensor = model.get_submodule(name).weight.detach().long()  # type: ignore[operator, union-attr]
        if len(shape) == 1:
            kept[name] = KeptChannels(index.cpu(), torch.empty(0, dtype=torch.long))
            continue
        taps = math.prod(shape[2:])
        index = index.flatten(1)[:, ::taps]
        out = index[:, 0] // (taps * shape[1])
        in_ = index[0] // taps % shape[1]
        if not torch.equal(index, (out[:, None] * shape[1] + in_[None]) * taps):
            raise AssertionError(f"{name}: the channels that remain are not the same in every row")
        kept[name] = KeptChannels(out.cpu(), in_.cpu())
    return kept


def weight_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(m.weight.shape) for name, m in model.named_modules() if isinstance(m, CUTTABLE)}


def widths(model: nn.Module) -> dict[str, list[int]]:
    """[out, in, groups] of every convolution, batch norm ([C, C, 1]) and linear layer."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            found[name] = [module.out_channels, module.in_channels, module.groups]
        elif isinstance(module, nn.BatchNorm2d):
            found[name] = [module.num_features, module.num_features, 1]
        elif isinstance(module, nn.Linear):
            found[name] = [module.out_features, module.in_features, 1]
    return found


def narrow(model: nn.Module, wanted: Any) -> None:
    """Give the layers of a whole network the widths of a cut one; their tensors are left empty, to be filled.

    Args:
        wanted: `widths` of the cut network, from a file that may be a stranger's.
    Raises:
        RunFolderError: it names the layer and the value.
    """
    original = widths(model)
    if not isinstance(wanted, dict) or set(wanted) != set(original):
        raise RunFolderError("widths: they do not name the layers of this network.")
    for name, value in wanted.items():
        if not _is_cut(value, original[name]):
            raise RunFolderError(f"widths: {name} is {str(value)[:60]}, which is no part of {original[name]}.")
        if value != original[name]:
            layer = model.get_submodule(name)
            if isinstance(layer, nn.Conv2d | nn.Linear):
                layer.full_shape = full_shape(layer)  # type: ignore[assignment]  # the cost of the whole network
            _resize(model.get_submodule(name), *value)


def _is_cut(value: Any, whole: list[int]) -> bool:
    if not isinstance(value, list) or len(value) != 3 or any(type(v) is not int for v in value):
        return False
    within = all(1 <= v <= w for v, w in zip(value, whole, strict=True))
    return within and value[0] % value[2] == 0 and value[1] % value[2] == 0


def _resize(module: nn.Module, out: int, in_: int, groups: int) -> None:
    def empty(old: Tensor, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=old.dtype, device=old.device)

    if isinstance(module, nn.BatchNorm2d):
        module.num_features = out
        for name in ("weight", "bias"):
            if getattr(module, name) is not None:
                setattr(module, name, nn.Parameter(empty(getattr(module, name), out)))
        for name in ("running_mean", "running_var"):
            if getattr(module, name) is not None:
                setattr(module, name, empty(getattr(module, name), out))
        return
    if isinstance(module, nn.Conv2d):
        module.out_channels, module.in_channels, module.groups = out, in_, groups
        module.weight = nn.Parameter(empty(module.weight, out, in_ // groups, *module.weight.shape[2:]))
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = out, in_
        module.weight = nn.Parameter(empty(module.weight, out, in_))
    if module.bias is not None:
        module.bias = nn.Parameter(empty(module.bias, out))  # type: ignore[arg-type]
