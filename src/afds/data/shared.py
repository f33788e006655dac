"""How much memory processes can share: workers hand their batches over in /dev/shm, of which a container has 64 MB."""

from __future__ import annotations

import os
import sys

PLACE = "/dev/shm"
ROOM = 256 * 2**20
"""Bytes that stay free for the batches of workers at least: two each, of up to 20 MB (224 px, 32 images)."""


def free_shared(place: str = PLACE) -> int:
    """Bytes that are free there; `sys.maxsize` on systems that have no such place."""
    try:
        found = os.statvfs(place)
    except (OSError, AttributeError):
        return sys.maxsize
    return found.f_bavail * found.f_frsize
