"""Make ``import torchvision`` work beside a CPU-only torch.

The wheels of torchvision carry compiled operators built for CUDA. Beside a CPU-only torch they do not
load, and the import then stops with ``operator torchvision::nms does not exist``, because one Python file
registers a fake implementation for an operator that was never declared. afds (and timm, for its transforms)
uses only torchvision's Python part, so declaring the two missing schemas is enough. Where the import works
nothing is declared, and any other error is passed on untouched.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

_MISSING = "operator torchvision::nms does not exist"


def import_torchvision() -> Any:
    """Import torchvision, declaring its missing operators if and only if that is what stops it.

    Returns the library handle that keeps the declarations alive, or None where nothing was needed.
    Raises whatever else the import raises.
    """
    try:
        importlib.import_module("torchvision")
        return None
    except RuntimeError as error:
        if _MISSING not in str(error):
            raise
    for name in [n for n in sys.modules if n == "torchvision" or n.startswith("torchvision.")]:
        del sys.modules[name]  # half-imported: they would hide the second try's errors
    import torch

    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    importlib.import_module("torchvision")
    return library
