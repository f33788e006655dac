"""afds: transfer a pretrained CNN to your photos, several times cheaper.

import afds

result = afds.fit(afds.FitConfig(data=Path("photos"), source="resnet50", budget="5x", out=Path("run")))
model = afds.load("run")
model.predict("cat.jpg").label

selective = afds.select(timm.create_model("resnet50", pretrained=True))     # the parts by themselves
afds.set_density(selective, 0.4)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from afds._torchvision import mend_torchvision

if TYPE_CHECKING:
    from afds.compaction import compact, static
    from afds.config import FitConfig
    from afds.distillation import AttentiveDistillation
    from afds.fitting import fit
    from afds.inference import load
    from afds.selection import SelectionConfig, select, set_density

__version__ = "0.1.0"
__all__ = [
    "AttentiveDistillation",
    "FitConfig",
    "SelectionConfig",
    "__version__",
    "compact",
    "fit",
    "load",
    "select",
    "set_density",
    "static",
]

mend_torchvision()  # waits for whoever imports torchvision first, timm say; costs nothing until then
_HOMES = {
    "AttentiveDistillation": "distillation",
    "FitConfig": "config",
    "SelectionConfig": "selection",
    "compact": "compaction",
    "fit": "fitting",
    "load": "inference",
    "select": "selection",
    "set_density": "selection",
    "static": "compaction",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'afds' has no attribute {name!r}")
    value = getattr(import_module(f"afds.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
