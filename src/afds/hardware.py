"""What a run happens on: device, precision, and the stamp of hardware and versions in its record."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from typing import Any

import torch
from lightning_fabric import Fabric

from afds.config import HardwareConfig
from afds.errors import ConfigError


def resolve_device(config: HardwareConfig) -> str:
    """`auto` to a kind of device that is there.

    Raises:
        ConfigError: the device asked for is not there.
    """
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if config.device == "auto":
        return next(kind for kind in ("cuda", "mps", "cpu") if there[kind])
    if not there[config.device]:
        raise ConfigError(f"--hardware.device {config.device}: this machine has none that torch {torch.__version__} "
                          "can use. Use --hardware.device cpu, or install a torch built for it.")  # fmt: skip
    return config.device


def resolve_precision(config: HardwareConfig, device: str) -> str:
    """`auto` to bf16 where the device computes in it: emulated bf16 is several times slower than float32."""
    if config.precision != "auto":
        return config.precision
    if device == "cuda":
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"
    if device == "cpu" and torch.cpu._is_avx512_bf16_supported():  # no public question exists
        return "bf16-mixed"
    return "32-true"


def make_fabric(config: HardwareConfig) -> Fabric:
    """Lightning Fabric for the device, the number of devices and the precision asked for."""
    device = resolve_device(config)
    strategy = "ddp_find_unused_parameters_true" if config.devices > 1 else "auto"
    precision: Any = resolve_precision(config, device)
    return Fabric(accelerator=device, devices=config.devices, strategy=strategy, precision=precision)


def stamp(device: str, precision: str) -> dict[str, Any]:
    """Hardware and versions, for the record of a run."""
    names = ("torch", "torchvision", "timm", "lightning-fabric", "numpy", "pillow")
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "precision": precision,
        "cpu": _cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
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
