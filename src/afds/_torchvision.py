"""Make ``import torchvision`` work beside a CPU-only torch.

The wheels of torchvision carry compiled operators built for CUDA. Beside a CPU-only torch they do not
load, and the import then stops with ``operator torchvision::nms does not exist``, because one Python file
registers a fake implementation for an operator that was never declared. afds (and timm, for its transforms)
uses only torchvision's Python part, so declaring the two missing schemas is enough. Where the import works
nothing is declared, and any other error is passed on untouched.

The mending waits for the first import of torchvision, by whomever, so that importing afds stays cheap.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

_MISSING = "operator torchvision::nms does not exist"


def mend_torchvision() -> None:
    """Stand in the way of the first import of torchvision. Does nothing where it is imported already."""
    if "torchvision" not in sys.modules and not any(isinstance(f, _Finder) for f in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    """Finds torchvision where it lies, and nothing else."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "torchvision":
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _MendingLoader(spec.loader)
        return spec


class _MendingLoader(Loader):
    """Runs torchvision; if the missing operators stop it, declares them and runs it again."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def __getattr__(self, name: str) -> Any:  # get_data, get_filename, ...: as the loader does
        return getattr(self.loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        try:
            self.loader.exec_module(module)
            return
        except RuntimeError as error:
            if _MISSING not in str(error):
                raise
        for name in [n for n in sys.modules if n.startswith("torchvision.")]:
            del sys.modules[name]  # half-imported: they would hide the second try's errors
        import torch

        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        module.__dict__["_afds_library"] = library  # the declarations live as long as it does
        self.loader.exec_module(module)
