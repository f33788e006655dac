"""A run folder as something that looks at photos: `afds.load(run).predict("cat.jpg")`."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal, overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from afds.artifact import Run, load_run
from afds.cores import quota_cores
from afds.data.images import ImageError, read_shrunk, to_rgb
from afds.data.preprocess import Preprocess
from afds.data.transforms import eval_transform
from afds.errors import ConfigError, DataError

if TYPE_CHECKING:
    from afds.runtime import Executor

RUNTIMES = ("torch", "native")
Photo = Path | str | Image.Image | np.ndarray
OnError = Literal["raise", "report"]
DECODERS = 4  # threads; Pillow decodes outside the GIL


@dataclass(frozen=True)
class Prediction:
    """What the network sees in one image."""

    path: Path | None
    """None for an image that was given as pixels."""
    top: tuple[tuple[str, float], ...]
    """(label, probability), the most probable first; empty where the image could not be read."""
    error: str | None = None
    """Why the image could not be read."""

    @property
    def label(self) -> str:
        """The most probable class. Raises ImageError where the image could not be read."""
        if not self.top:
            raise ImageError(self.error or "no prediction", self.path)
        return self.top[0][0]


class Model:
    """A trained network with its classes and its preprocessing.

    Args:
        run: a run folder that was read.
        device: where the network runs.
        runtime: `torch`, or `native`: the kernels that skip, on the CPU.
        precision: of native's convolutions, `float32` or `bf16`; see `afds.runtime.compile`.
        threads: of a call of native; by default as many as PyTorch would use, at most a container's share of cores.
    Raises:
        RuntimeMissingError, UnsupportedError: the native runtime was not built, or does not compute this network.
        ConfigError: another runtime or precision, `native` on another device, `bf16` or threads without `native`.
    """

    def __init__(
        self, run: Run, device: torch.device | str = "cpu", *, runtime: str = "torch", precision: str = "float32",
        threads: int | None = None,
    ) -> None:  # fmt: skip
        if runtime not in RUNTIMES:
            raise ConfigError(f"{runtime!r} is no runtime; choose one of {', '.join(RUNTIMES)}.")
        self.run = run
        self.device = torch.device(device)
        if runtime == "native" and self.device.type != "cpu":
            raise ConfigError(f"The native runtime runs on the CPU, not on {self.device}; take runtime='torch' there.")
        if runtime != "native" and precision != "float32":
            raise ConfigError(f"precision={precision!r} is of the native runtime; take runtime='native' with it.")
        if runtime != "native" and threads is not None:
            raise ConfigError(f"threads={threads} is of the native runtime; PyTorch has torch.set_num_threads.")
        self.network: nn.Module = run.model.to(self.device).eval()
        self.executor: Executor | None = None
        if runtime == "native":
            from afds.runtime import compile

            threads = min(torch.get_num_threads(), quota_cores()) if threads is None else threads
            self.executor = compile(run, threads=threads, precision=precision)
        self._transform = eval_transform(run.preprocess)

    @property
    def labels(self) -> tuple[str, ...]:
        """Class names, by position of the logit."""
        return self.run.labels

    @property
    def preprocess(self) -> Preprocess:
        """What is done to a photo before the network sees it."""
        return self.run.preprocess

    def logits(self, x_BCHW: Tensor) -> Tensor:
        """(B, classes) of preprocessed images (B, 3, H, W), float32. `native`: of the run's input size only."""
        if self.executor is not None:
            return torch.from_numpy(self.executor(x_BCHW.cpu().numpy()))
        with torch.inference_mode():
            return self.network(x_BCHW.to(self.device))

    @overload  # a text is an iterable of texts, which mypy minds; the first that fits is taken
    def predict(  # type: ignore[overload-overlap]
        self, images: Photo, top_k: int = ..., batch_size: int = ..., *, on_error: OnError = ...
    ) -> Prediction: ...
    @overload
    def predict(
        self, images: Iterable[Photo], top_k: int = ..., batch_size: int = ..., *, on_error: OnError = ...
    ) -> list[Prediction]: ...
    def predict(
        self,
        images: Photo | Iterable[Photo],
        top_k: int = 5,
        batch_size: int = 32,
        *,
        on_error: OnError = "raise",
    ) -> Prediction | list[Prediction]:
        """The most probable classes of one image, or of each of several.

        images: paths, PIL images or uint8 arrays (H, W, 3) of RGB or (H, W) of grey; one of them, or several.
        top_k: how many classes; there are never more than the network has.
        on_error: `raise` an ImageError that names the file, or `report` it in its Prediction and go on.
        """
        if isinstance(images, Photo):
            return next(self.stream([images], top_k, batch_size, on_error=on_error))
        return list(self.stream(images, top_k, batch_size, on_error=on_error))

    def stream(
        self, images: Iterable[Photo], top_k: int = 5, batch_size: int = 32, *, on_error: OnError = "raise"
    ) -> Iterator[Prediction]:
        """`predict` for any number of images: in order, one batch in memory while the next is decoded."""
        for name, value in (("top_k", top_k), ("batch_size", batch_size)):
            if value < 1:
                raise DataError(f"{name} is {value}; give 1 or more.")
        if on_error not in ("raise", "report"):
            raise ConfigError(f"on_error={on_error!r}: give raise or report.")
        for batch in self._decoded(images, batch_size):
            if on_error == "raise":
                for _, result in batch:
                    if isinstance(result, ImageError):
                        raise result
            readable = [result for _, result in batch if isinstance(result, Tensor)]
            tops = iter(self._top(readable, top_k) if readable else [])
            for path, result in batch:
                if isinstance(result, ImageError):
                    yield Prediction(path, (), str(result))
                else:
                    yield Prediction(path, next(tops))

    def _top(self, images: list[Tensor], top_k: int) -> list[tuple[tuple[str, float], ...]]:
        if self.executor is None:
            p_BK = self.logits(torch.stack(images)).float().softmax(1).cpu().numpy()
        else:  # without torch: in a forked child it would wait for threads that the parent has
            logits_BK = self.executor(np.stack([image.numpy() for image in images]))
            p_BK = np.exp(logits_BK - logits_BK.max(1, keepdims=True))
            p_BK /= p_BK.sum(1, keepdims=True)
        first_BK = np.argsort(-p_BK, axis=1, kind="stable")[:, :top_k]
        return [
            tuple((self.labels[i], float(p_K[i])) for i in first_K) for p_K, first_K in zip(p_BK, first_BK, strict=True)
        ]

    def _decoded(
        self, images: Iterable[Photo], batch_size: int
    ) -> Iterator[list[tuple[Path | None, Tensor | ImageError]]]:
        """Batches of (path, tensor or error), decoded in threads at most two batches ahead."""
        source = iter(images)
        threads = max(1, min(DECODERS, os.cpu_count() or 1))
        with ThreadPoolExecutor(threads) as pool:
            ahead: deque[tuple[Path | None, Future[Tensor | ImageError]]] = deque()
            try:
                while True:
                    for image in islice(source, 2 * batch_size - len(ahead)):
                        path = Path(image) if isinstance(image, str | Path) else None
                        ahead.append((path, pool.submit(self._decode, image)))
                    if not ahead:
                        return
                    ready = [ahead.popleft() for _ in range(min(batch_size, len(ahead)))]
                    yield [(path, future.result()) for path, future in ready]
            finally:  # the reader left early: what waits is not wanted any more
                for _, future in ahead:
                    future.cancel()

    def _decode(self, image: Photo) -> Tensor | ImageError:
        try:
            if isinstance(image, str | Path):
                return self._transform(read_shrunk(image, self._transform.shrink_to))
            return self._transform(_from_array(image) if isinstance(image, np.ndarray) else _from_pil(image))
        except ImageError as error:
            return error


def load(
    run: Path | str, device: torch.device | str = "cpu", *, runtime: str = "torch", precision: str = "float32",
    threads: int | None = None,
) -> Model:  # fmt: skip
    """The network of a run folder, ready to predict.

    runtime: `torch`, or `native`: the kernels that skip what was not selected.
    precision: of native's convolutions, `float32` or `bf16`.
    threads: of a call of native; by default as many as PyTorch would use.
    Raises RunFolderError naming what is wrong with the folder, and what `Model` raises.
    """
    return Model(load_run(run), device, runtime=runtime, precision=precision, threads=threads)


def _from_pil(image: Image.Image) -> Image.Image:
    """Upright and RGB, as a file is read."""
    try:
        image.load()
        return to_rgb(image)
    except Exception as error:  # as in read_rgb: a lazily opened file may be damaged
        raise ImageError(f"An image given as pixels cannot be read ({error}).") from error


def _from_array(array: np.ndarray) -> Image.Image:
    if array.dtype != np.uint8 or array.size == 0 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3)):
        raise ImageError(
            f"An array should be uint8 of shape (H, W, 3) in RGB or (H, W) in grey, got "
            f"{array.dtype} of shape {array.shape}."
        )
    return Image.fromarray(np.ascontiguousarray(array)).convert("RGB")
