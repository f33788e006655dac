"""How much of the CPU a container leaves us."""

from __future__ import annotations

import sys
from pathlib import Path


def quota_cores(file: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Cores' worth of time that a container is given, rounded up; `sys.maxsize` where there is no such limit.

    Ours beside `hardware.usable_cores`: to predict, nobody should wait for what that imports. More threads than that
    would spin until they are throttled.
    """
    try:
        quota, period = file.read_text(encoding="ascii").split()
        return max(1, -(-int(quota) // int(period)))
    except (OSError, ValueError, ZeroDivisionError):  # no such file, or `max`
        return sys.maxsize
