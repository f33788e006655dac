"""From an architecture's name and arguments, as a file holds them, to a network; to nothing else.

A name and its arguments may come from a stranger's run folder, so both are matched against lists of what is
known to be harmless: timm's create_model() would also take addresses to fetch from and files to load.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import timm
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from afds.errors import SourceError

MAX_CLASSES = 100_000
# resnet50 or resnet50.a1_in1k; no colon, no slash
_NAME = re.compile(r"[a-z0-9_]{1,64}(\.[A-Za-z0-9_]{1,64})?")
_WORD = re.compile(r"[a-z0-9_]{0,32}")


def _is_int(value: Any, low: int, high: int) -> bool:
    return type(value) is int and low <= value <= high


def _is_float(value: Any, low: float, high: float) -> bool:
    return type(value) in (int, float) and low <= value <= high


def _are_ints(value: Any, high: int) -> bool:
    if not isinstance(value, list | tuple) or not 1 <= len(value) <= 16:
        return False
    return all(_is_int(v, 1, high) for v in value)


def _is_word(value: Any) -> bool:
    return isinstance(value, str) and _WORD.fullmatch(value) is not None


# Arguments that only shape a network, with what each may be.
_ALLOWED: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "layers": ("a list of whole numbers from 1 to 200", lambda v: _are_ints(v, 200)),
    "channels": ("a list of whole numbers from 1 to 8192", lambda v: _are_ints(v, 8192)),
    "stem_width": ("a whole number from 1 to 1024", lambda v: _is_int(v, 1, 1024)),
    "stem_size": ("a whole number from 1 to 1024", lambda v: _is_int(v, 1, 1024)),
    "stem_type": ("a word", _is_word),
    "replace_stem_pool": ("true or false", lambda v: type(v) is bool),
    "fix_stem": ("true or false", lambda v: type(v) is bool),
    "avg_down": ("true or false", lambda v: type(v) is bool),
    "zero_init_last": ("true or false", lambda v: type(v) is bool),
    "base_width": ("a whole number from 1 to 1024", lambda v: _is_int(v, 1, 1024)),
    "cardinality": ("a whole number from 1 to 1024", lambda v: _is_int(v, 1, 1024)),
    "block_reduce_first": ("a whole number from 1 to 16", lambda v: _is_int(v, 1, 16)),
    "down_kernel_size": ("a whole number from 1 to 7", lambda v: _is_int(v, 1, 7)),
    "num_features": ("a whole number from 1 to 16384", lambda v: _is_int(v, 1, 16384)),
    "output_stride": ("8, 16 or 32", lambda v: type(v) is int and v in (8, 16, 32)),
    "channel_multiplier": ("a number from 0.01 to 16", lambda v: _is_float(v, 0.01, 16)),
    "depth_multiplier": ("a number from 0.01 to 16", lambda v: _is_float(v, 0.01, 16)),
    "mlp_ratio": ("a number from 0.01 to 16", lambda v: _is_float(v, 0.01, 16)),
    "drop_rate": ("a number from 0 to 0.99", lambda v: _is_float(v, 0, 0.99)),
    "drop_path_rate": ("a number from 0 to 0.99", lambda v: _is_float(v, 0, 0.99)),
    "drop_block_rate": ("a number from 0 to 0.99", lambda v: _is_float(v, 0, 0.99)),
    "bn_eps": ("a number from 1e-12 to 1", lambda v: _is_float(v, 1e-12, 1)),
    "act_layer": ("a word", _is_word),
    "aa_layer": ("a word", _is_word),
    "pad_type": ("a word", _is_word),
    "global_pool": ("a word", _is_word),
}


def check_architecture(arch: Any, arch_args: Any, num_classes: Any) -> None:
    """Refuse what is not a plain timm network with harmless arguments.

    Raises SourceError naming the value.
    """
    if not isinstance(arch, str) or _NAME.fullmatch(arch) is None or not timm.is_model(arch):
        raise SourceError(f"architecture {_shown(arch)} is not the plain name of a timm network (resnet50).")
    if not _is_int(num_classes, 1, MAX_CLASSES):
        raise SourceError(f"number of classes {_shown(num_classes)} is no whole number up to {MAX_CLASSES}.")
    if not isinstance(arch_args, dict):
        raise SourceError(f"architecture arguments {_shown(arch_args)} are not an object.")
    for name, value in arch_args.items():
        if name not in _ALLOWED:
            raise SourceError(
                f"architecture argument {_shown(name)} is not allowed. Allowed are: {', '.join(sorted(_ALLOWED))}."
            )
        wanted, allowed = _ALLOWED[name]
        if not allowed(value):
            raise SourceError(f"architecture argument {name} is {_shown(value)}, which should be {wanted}.")


def build_network(arch: str, arch_args: dict[str, Any], num_classes: int) -> nn.Module:
    """The network in eval mode, on the CPU, with weights NOT initialised: fill every one of them.

    Raises SourceError: a name or an argument is refused, or timm cannot build it.
    """
    check_architecture(arch, arch_args, num_classes)
    args: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in arch_args.items()
    }
    try:
        with torch.device("cpu"), _NoRandomFill():
            model = timm.create_model(arch, pretrained=False, num_classes=num_classes, **args)
    except Exception as error:  # whatever a network makes of odd sizes
        raise SourceError(f"timm cannot build {arch} with {args}: {error}") from error
    return model.eval()


_FILLS = (torch.Tensor.normal_, torch.Tensor.uniform_, torch.Tensor.erfinv_)
_INITS = (
    "uniform_",
    "normal_",
    "trunc_normal_",
    "kaiming_uniform_",
    "kaiming_normal_",
    "xavier_uniform_",
    "xavier_normal_",
)


class _NoRandomFill(TorchFunctionMode):
    """Random initialisation is most of the time of building a network whose weights are then overwritten.

    (The meta device would do as well, but it loses the buffers that are not in the state dict.)
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func in _FILLS or (getattr(func, "__module__", "") == "torch.nn.init" and func.__name__ in _INITS):
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
