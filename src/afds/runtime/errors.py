"""Why the native runtime does not run something; the PyTorch forward always does."""

from __future__ import annotations

from afds.errors import AfdsError


class RuntimeMissingError(AfdsError):
    """The native part was not built when afds was installed."""


class UnsupportedError(AfdsError):
    """The network holds something that the native runtime does not compute."""
