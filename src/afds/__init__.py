"""afds: transfer a pretrained CNN to your photos, several times cheaper."""

from afds._torchvision import import_torchvision as _import_torchvision

_TORCHVISION = _import_torchvision()  # before anything that imports torchvision; the handle must live

from afds.selection import SelectionConfig, select, set_density  # noqa: E402

__version__ = "0.1.0"
__all__ = ["SelectionConfig", "__version__", "select", "set_density"]
