"""What a run happens on: device, precision, and the stamp of hardware and versions in its record."""

from __future__ import annotations

import logging
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import nn

from afds.config import HardwareConfig
from afds.errors import ConfigError


def resolve_device(config: HardwareConfig) -> str:
    """`auto` to a kind of device that is there.

    Raises:
        ConfigError: the device asked for is not there.
    """
    there = {"cpu": True, "cuda": torch.cuda.is_available()}
    if config.device == "auto":
        return "cuda" if there["cuda"] else "cpu"
    if not there[config.device]:
        raise ConfigError(f"--hardware.device {config.device}: this machine has none that torch {torch.__version__} "
                          "can use. Use --hardware.device cpu, or install a torch built for it.")  # fmt: skip
    return config.device


def resolve_precision(config: HardwareConfig, device: str) -> str:
    """`auto` to bf16 where the device computes faster in it; a CPU is asked by a stopwatch."""
    if config.precision != "auto":
        return config.precision
    if device == "cuda":
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"
    if device == "cpu" and torch.cpu._is_avx512_bf16_supported() and _bf16_speedup() > BF16_WORTH:
        return "bf16-mixed"
    return "32-true"


BF16_WORTH = 1.25  # times faster than float32, below which the lost digits are not worth it


def _bf16_speedup(rounds: int = 7) -> float:
    """How many times faster a training step of a convolution is in bf16 than in float32, here and now.

    That a CPU has the instructions says little: on some, bf16 convolutions train at 0.7 times the speed of float32.
    """
    conv = nn.utils.skip_init(nn.Conv2d, 64, 64, 3, padding=1).to(memory_format=torch.channels_last)
    nn.init.constant_(conv.weight, 0.01)  # no random number is drawn: seeds belong to the runs
    nn.init.zeros_(conv.bias)
    x_BCHW = torch.ones(8, 64, 28, 28).contiguous(memory_format=torch.channels_last).requires_grad_()
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for turn in range(rounds + 1):
        for bf16 in (True, False):
            begun = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                y_BCHW = conv(x_BCHW)
            y_BCHW.sum().backward()
            if turn:  # the first warms up
                seconds[bf16].append(time.perf_counter() - begun)
    return min(seconds[False]) / min(seconds[True])  # the least: a busy machine only ever adds


def make_fabric(config: HardwareConfig) -> Fabric:
    """Lightning Fabric for the device, the number of devices and the precision asked for."""
    device = resolve_device(config)
    strategy = "ddp_find_unused_parameters_true" if config.devices > 1 else "auto"
    precision: Any = resolve_precision(config, device)
    with _quiet("lightning_fabric"):  # it announces its precision, which our own first line says
        return Fabric(accelerator=device, devices=config.devices, strategy=strategy, precision=precision)


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Nothing below a warning from this logger while the context lasts."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)


def usable_cores() -> int:
    """CPUs that this process may use: those of its affinity, at most a container's quota (joblib counts them)."""
    from joblib import cpu_count  # here: it takes a while, and to predict nobody needs it

    return cpu_count()


def stamp(device: str, precision: str) -> dict[str, Any]:
    """Hardware and versions, for the record of a run."""
    names = ("torch", "torchvision", "timm", "lightning-fabric", "numpy", "pillow")
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "precision": precision,
        "cpu": _cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in names},
    }


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as info:
            return next(line.split(":", 1)[1].strip() for line in info if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
