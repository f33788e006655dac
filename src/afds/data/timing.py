"""How long the training waits for its data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from time import perf_counter
from typing import Generic, TypeVar

T = TypeVar("T")


class TimedLoader(Generic[T]):
    """Passes `loader`'s batches on, and times both the wait for each and what is done with it.

    The start of a pass (starting workers) counts as waiting. Without workers all loading is waiting.
    On a GPU the work is queued, so that the wait reads too high unless the loop synchronises.
    """

    def __init__(self, loader: Iterable[T]) -> None:
        self.loader = loader
        self.reset()

    def reset(self) -> None:
        """Forget what was measured so far."""
        self.waited_s = 0.0
        self.worked_s = 0.0

    @property
    def wait_share(self) -> float:
        """Time waited over all time, in [0, 1]; 0 before the first batch."""
        total = self.waited_s + self.worked_s
        return self.waited_s / total if total > 0 else 0.0

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[T]:
        start = perf_counter()
        batches = iter(self.loader)
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                self.waited_s += perf_counter() - start
                return
            ready = perf_counter()
            self.waited_s += ready - start
            try:
                yield batch
            finally:  # also where the loop breaks off
                start = perf_counter()
                self.worked_s += start - ready
