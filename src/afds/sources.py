"""Pretrained networks: where their weights come from, and whether they are what their name says.

::

    resnet50                      timm's own loading: the local cache, else the hub
    resnet50.a1_in1k              the same, with timm's tag for one of several sets of weights
    resnet50:file.safetensors     weights in a file (also .pth, .pt, .bin; nothing in them is executed)
    local-dir:folder              config.json and weights, as timm writes them

The classifier of the source is not carried over unless asked for: the new task has its own. All other
tensors must be there, by name and by shape; weights that fit only in part are refused, not loaded in part.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import socket
import threading
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import huggingface_hub
import timm
import torch
from huggingface_hub import constants as hub
from timm.models import get_pretrained_cfg, load_state_dict
from torch import Tensor, nn

from afds.architecture import check_architecture
from afds.cost import Cost, CostMeter
from afds.errors import SourceError
from afds.graph import convbn_units

WEIGHT_FILES = (".safetensors", ".pth", ".pt", ".bin")
LOCAL_DIR = "local-dir"
HUB_SECONDS = 2.0  # to wait for the hub's host before it counts as unreachable
PREPROCESSING = ("mean", "std", "input_size", "interpolation", "crop_pct")


@dataclass(frozen=True)
class SourceSpec:
    """What `--source` says, checked as far as it can be without reading weights."""

    arch: str  # timm name, with its tag where one was given
    weights: Path | None  # a file, or the folder of a `local-dir:`; None: timm's own loading


@dataclass(frozen=True)
class Source:
    """A network that is ready for a new task: pretrained backbone, fresh classifier, float32, train mode."""

    model: nn.Module
    arch: str
    arch_args: dict[str, Any]
    pretrained_cfg: dict[str, Any]  # mean, std, input_size (C, H, W), interpolation, crop_pct
    origin: str  # where the weights come from, for people
    weights_sha256: str | None  # of the weights' file; None from scratch, or where timm left no file


def parse_source(spec: str) -> SourceSpec:
    """Read a `--source`.

    Raises:
        SourceError: an unknown network (with the nearest names), a file or folder that is not there.
    """
    name, colon, rest = spec.strip().partition(":")
    if name == LOCAL_DIR:
        folder = Path(rest).expanduser()
        return SourceSpec(_read_local_dir(folder).arch, folder)
    if not timm.is_model(name):
        raise SourceError(_unknown(name, spec))
    try:
        get_pretrained_cfg(name, allow_unregistered=False)
    except RuntimeError as error:
        arch = name.partition(".")[0]
        tags = ", ".join(timm.list_models(f"{arch}.*", pretrained=True)) or "none"
        raise SourceError(f"timm knows {arch}, but not {name}. With weights there are: {tags}.") from error
    if not colon:
        return SourceSpec(name, None)
    path = Path(rest).expanduser()
    if not rest or not path.is_file():
        what = f"{path} is {'a folder' if path.is_dir() else 'missing'}" if rest else "no file is named"
        raise SourceError(f"--source {spec}: {what}. After the colon goes a file of weights ({_suffixes()}).")
    if path.suffix.lower() not in WEIGHT_FILES:
        raise SourceError(f"{path}: weights come as {_suffixes()}, not as {path.suffix or 'a bare name'}.")
    return SourceSpec(name, path)


def create(arch: str, num_classes: int, arch_args: dict[str, Any] | None = None, pretrained: bool = False) -> nn.Module:
    """A plain timm network, randomly initialised unless ``pretrained``.

    Raises:
        SourceError: a name or argument that is not known to be harmless, or that timm cannot build or load.
    """
    arch_args = dict(arch_args or {})
    check_architecture(arch, arch_args, num_classes)
    try:
        return timm.create_model(arch, pretrained=pretrained, num_classes=num_classes, **arch_args)
    except Exception as error:  # whatever a network makes of odd sizes, or a hub of a request
        given = f" with {arch_args}" if arch_args else ""
        doing = "load" if pretrained else "build"
        raise SourceError(f"timm cannot {doing} {arch}{given}: {_first_line(error)}") from error


def load_source(
    spec: str | SourceSpec,
    *,
    num_classes: int,
    arch_args: dict[str, Any] | None = None,
    scratch: bool = False,
    keep_head: bool = False,
) -> Source:
    """A pretrained network with a fresh classifier.

    Args:
        spec: what `parse_source` reads, or has read.
        arch_args: arguments of the architecture, such as ``{"layers": [1, 1, 1, 1]}``.
        scratch: leave the weights random; no file and no hub is touched.
        keep_head: keep the source's classifier, which then must have ``num_classes`` outputs.
    Raises:
        SourceError: weights that are missing, damaged, out of reach or of another architecture; a network that is not
            supported, where they would have to be fetched.
    """
    spec = parse_source(spec) if isinstance(spec, str) else spec
    local = _read_local_dir(spec.weights) if spec.weights and spec.weights.is_dir() else None
    arch_args = {**(local.arch_args if local else {}), **(arch_args or {})}
    model = create(spec.arch, num_classes, arch_args)
    cfg = {**model.pretrained_cfg, **(local.cfg if local else {})}  # type: ignore[dict-item]
    file: Path | None
    if scratch:
        _wake(model)
        file, origin = None, f"{spec.arch}, random weights"
    elif spec.weights is None:
        check_supported(model)  # before weights are fetched for nothing
        file, state = _timm_weights(spec.arch, arch_args)
        origin = f"{_full_name(spec.arch)}, timm's weights"
        _fill(model, state, spec.arch, arch_args, where=origin, keep_head=keep_head)
    else:
        file = local.file if local else spec.weights
        origin = f"{spec.arch}, weights of {file}"
        _fill(model, read_weights(file), spec.arch, arch_args, where=str(file), keep_head=keep_head)
    return Source(model.float(), spec.arch, arch_args, {k: cfg[k] for k in PREPROCESSING if k in cfg}, origin,
                  _sha256(file) if file else None)  # fmt: skip


def check_supported(model: nn.Module, input_size: int = 0) -> Cost:
    """Refuse, before any training, a network that afds cannot select in or cannot count.

    Args:
        input_size: side of the images in pixels; 0: what the network was pretrained with.
    Returns:
        The network's cost on one image of that size; its ``dense`` is the MACs.
    Raises:
        SourceError: it names the architecture and the layer that is the reason.
    """
    cfg = getattr(model, "pretrained_cfg", None) or {}
    arch = cfg.get("architecture") or type(model).__name__
    side = input_size or cfg.get("input_size", (3, 224, 224))[-1]
    image = torch.zeros(1, 3, side, side, device=next(model.parameters()).device)
    try:
        convbn_units(model)
        return CostMeter(model)(image)[1]
    except SourceError as error:
        raise SourceError(f"{arch} is not supported. {error}") from error
    except RuntimeError as error:
        raise SourceError(f"{arch} cannot run on {side} x {side} images: {_first_line(error)}") from error


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors of a weights file by name, on the CPU. A pickle that holds more than plain data is refused.

    Raises:
        SourceError: it names the file and what is wrong with it.
    """
    if not path.is_file():
        raise SourceError(f"{path}: no such file of weights.")
    try:
        weights = load_state_dict(str(path), weights_only=True)
    except Exception as error:  # safetensors, zipfile, pickle and torch each raise their own
        raise SourceError(
            f"{path}: {path.stat().st_size:,} bytes that cannot be read as weights ({_first_line(error)}). "
            "The file is truncated, damaged or of another kind: fetch it again."
        ) from error
    strangers = [name for name, value in weights.items() if not isinstance(value, Tensor)]
    if strangers or not weights:
        found = f"{strangers[0]!r} is no tensor" if strangers else "it is empty"
        raise SourceError(f"{path}: holds no weights ({found}). Save the network's state_dict().")
    broken = [n for n, t in weights.items() if t.is_floating_point() and not bool(torch.isfinite(t).all())]
    if broken:
        raise SourceError(f"{path}: {broken[0]} (and {len(broken) - 1} more) holds NaN or infinity.")
    return weights


@dataclass(frozen=True)
class _LocalDir:
    arch: str
    arch_args: dict[str, Any]
    cfg: dict[str, Any]
    file: Path


def _read_local_dir(folder: Path) -> _LocalDir:
    """config.json and weights, as ``timm.models.save_for_hf`` writes them."""
    config = folder / "config.json"
    try:
        values = json.loads(config.read_bytes())
    except OSError as error:
        raise SourceError(f"{config}: cannot be read ({error.strerror}). `local-dir:` wants a folder with "
                          "config.json and model.safetensors, as timm writes it.") from error  # fmt: skip
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{config}: not readable as JSON ({_first_line(error)}).") from error
    values = values if isinstance(values, dict) else {}
    arch, args = values.get("architecture"), values.get("model_args", {})
    cfg = values.get("pretrained_cfg", values)  # files of old stand without this level
    if not isinstance(arch, str) or not timm.is_model(arch):
        raise SourceError(f"{config}: its `architecture` is {arch!r}, which timm does not know.")
    if not isinstance(args, dict) or not isinstance(cfg, dict):
        raise SourceError(f"{config}: its `model_args` or its `pretrained_cfg` is not an object.")
    files = [f for s in WEIGHT_FILES for f in sorted(folder.glob(f"*{s}"))]
    if not files:
        raise SourceError(f"{folder}: holds no weights ({_suffixes()}).")
    return _LocalDir(arch, args, {k: cfg[k] for k in PREPROCESSING if k in cfg}, files[0])


def _timm_weights(arch: str, arch_args: dict[str, Any]) -> tuple[Path | None, dict[str, Tensor]]:
    """Weights by timm's own loading, and their file in its cache; without a hub an error at once."""
    cfg = get_pretrained_cfg(arch)
    instead = f"pass `--source {arch}:path/to/weights.safetensors`"
    if cfg is None or not cfg.has_weights:
        trained = {name.partition(".")[0] for name in timm.list_models(pretrained=True)}
        near = difflib.get_close_matches(arch.partition(".")[0], sorted(trained), n=3, cutoff=0.5)
        raise SourceError(f"timm has no pretrained weights for {arch}; {instead}, or choose one "
                          f"that has some, such as {', '.join(near) or 'resnet50'}.")  # fmt: skip
    file = _cached(cfg)
    if file is not None:
        return file, read_weights(file)
    host = hub.ENDPOINT if cfg.hf_hub_id else cfg.url
    if hub.HF_HUB_OFFLINE or not _reachable(str(host)):
        raise SourceError(f"weights of {arch} are not in the cache and the hub cannot be reached; {instead}, "
                          "or `--source local-dir:FOLDER`, or run once where it can be reached.")  # fmt: skip
    model = create(arch, cfg.num_classes, arch_args, pretrained=True)
    return _cached(cfg), model.state_dict()


def _cached(cfg: Any) -> Path | None:
    """The weights' file in the hub's local cache, or in torch.hub's."""
    if cfg.hf_hub_id:
        repo, _, revision = cfg.hf_hub_id.partition("@")
        names = [cfg.hf_hub_filename] if cfg.hf_hub_filename else ["model.safetensors", "pytorch_model.bin"]
        for name in names:
            found = huggingface_hub.try_to_load_from_cache(repo, name, revision=revision or None)
            if isinstance(found, str):
                return Path(found)
    if isinstance(cfg.url, str) and cfg.url:
        path = Path(torch.hub.get_dir()) / "checkpoints" / Path(urlsplit(cfg.url).path).name
        return path if path.is_file() else None
    return None


def _reachable(address: str) -> bool:
    """Whether the host, or the proxy in front of it, accepts a connection within `HUB_SECONDS`."""
    parts = urlsplit(address)
    proxy = urllib.request.getproxies().get(parts.scheme)
    if proxy and not urllib.request.proxy_bypass(parts.hostname or ""):
        parts = urlsplit(proxy if "//" in proxy else f"//{proxy}")
    port = parts.port or (80 if parts.scheme == "http" else 443)
    answered = threading.Event()

    def connect() -> None:
        try:
            socket.create_connection((parts.hostname or "", port), timeout=HUB_SECONDS).close()
            answered.set()
        except OSError:
            pass

    # A name server that does not answer blocks for longer than any timeout of a socket, hence the thread.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(HUB_SECONDS)
    return answered.is_set()


def _fill(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    arch: str,
    arch_args: dict[str, Any],
    *,
    where: str,
    keep_head: bool,
) -> None:
    """Copy weights in, all but the classifier's unless it is kept. Half precision becomes float32."""
    heads = () if keep_head else _heads(model)
    problems = _mismatches(model, weights, arch, heads)
    if problems:
        weights = _converted(arch, arch_args, weights) or weights
        problems = _mismatches(model, weights, arch, heads)
    if problems:
        of_module: dict[str, str] = {}  # one line a layer is enough to see what the file really is
        for name, text in problems:
            of_module.setdefault(name.rpartition(".")[0], text)
        shown = list(of_module.values())[:3]
        more = f" ({len(problems)} differences in all)" if len(problems) > len(shown) else ""
        raise SourceError(f"{where}: these are not weights of {arch}: {'; '.join(shown)}{more}. "
                          "Name the network they were made with, as in `--source NAME:FILE`.")  # fmt: skip
    # Not strict, because of the classifier and of num_batches_tracked; all else has just been checked.
    model.load_state_dict({n: t for n, t in weights.items() if not n.startswith(heads)}, strict=False)


def _mismatches(
    model: nn.Module, weights: Mapping[str, Tensor], arch: str, heads: tuple[str, ...]
) -> list[tuple[str, str]]:
    """(tensor, what does not fit): shapes first, then what the file lacks, then what it has in excess."""
    wanted = {n: t for n, t in model.state_dict().items() if not n.startswith(heads)}
    shapes = [(n, f"{n} is {_size(weights[n])} in the file and {_size(t)} in {arch}")
              for n, t in wanted.items() if n in weights and weights[n].shape != t.shape]  # fmt: skip
    lacking = [(n, f"the file has no {n} ({_size(t)})") for n, t in wanted.items()
               if n not in weights and not n.endswith("num_batches_tracked")]  # fmt: skip
    excess = [(n, f"the file has {n} ({_size(t)}), which {arch} has not")
              for n, t in weights.items() if n not in wanted and not n.startswith(heads)]  # fmt: skip
    return shapes + lacking + excess


def _converted(arch: str, arch_args: dict[str, Any], weights: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """Weights under timm's names, where timm knows how to rename them (torchvision's VGGs); else None."""
    overlay = {"state_dict": dict(weights)}
    try:  # with the classes of the source itself timm is strict: all tensors fit, or it raises
        model = timm.create_model(arch, pretrained=True, pretrained_cfg_overlay=overlay, **arch_args)
        return model.state_dict()
    except Exception:
        return None


def _heads(model: nn.Module) -> tuple[str, ...]:
    names = model.pretrained_cfg.get("classifier") or ()  # type: ignore[union-attr, operator]
    return tuple(f"{name}." for name in ((names,) if isinstance(names, str) else names))


def _wake(model: nn.Module) -> None:
    """Set norms that timm starts at zero, the last of each block, to one.

    With selection zero is no start: a zero saliency is never active and has no gradient, such a block would
    stay silent for good.
    """
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and not bool(module.weight.any()):
            nn.init.ones_(module.weight)


def _full_name(arch: str) -> str:
    cfg = get_pretrained_cfg(arch)
    return f"{cfg.architecture}.{cfg.tag}" if cfg is not None and cfg.tag else arch


def _sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _unknown(name: str, spec: str) -> str:
    if (Path(spec).expanduser() / "config.json").exists() and spec.strip():
        return f"--source {spec}: a run that has not finished. Go on with it: afds fit --resume {spec}"
    if (spec.strip() and Path(spec).expanduser().exists()) or Path(spec).suffix in WEIGHT_FILES:
        return f"--source {spec}: say which network the weights belong to, as in `--source resnet50:{spec}`."
    near = difflib.get_close_matches(name.partition(".")[0], timm.list_models(), n=3, cutoff=0.5)
    hint = f"Near to it are: {', '.join(near)}." if near else "`timm.list_models()` lists those there are."
    return f"--source {spec}: there is no timm network called {name!r}. {hint}"


def _suffixes() -> str:
    return ", ".join(WEIGHT_FILES)


def _size(tensor: Tensor) -> str:
    return " x ".join(str(s) for s in tensor.shape) or "one number"


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
