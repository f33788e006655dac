"""What a person sees while a run goes on: a live line in a terminal, a line an epoch in a log."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar


class Progress:
    """Throughput, time left and the share of time spent waiting for data."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet
        self.console = Console(stderr=True, highlight=False, quiet=quiet)
        self._bar: Bar | None = None
        self._task: Any = None
        self._begun: tuple[float, int] | None = None  # seconds, step at which this process began
        self._images = 0

    def say(self, text: str) -> None:
        self.console.print(text, markup=False, soft_wrap=True)

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Name something that takes a while."""
        if self.console.is_terminal and not self.quiet:
            with self.console.status(what):
                yield
        else:
            self.say(f"{what} ...")
            yield

    def __enter__(self) -> Progress:
        if self.console.is_terminal and not self.quiet:
            self._bar = Bar(TextColumn("{task.description}"), BarColumn(bar_width=None), MofNCompleteColumn(),
                            TextColumn("{task.fields[facts]}"), console=self.console, transient=True,
                            refresh_per_second=2)  # fmt: skip
            self._bar.start()
            self._task = self._bar.add_task("training", total=None, facts="")
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, event: dict[str, Any]) -> None:
        """Events of training.py: after each step, and after each epoch; of stages.py: while channels are chosen."""
        if "settling" in event:
            self._settling(event["settling"], event["done"], event["of"])
            return
        if "settled" in event:
            self.say(f"{event['stay']} of {event['channels']} channels stay, {event['settled']:.2f}x fewer MACs; "
                     f"chosen and refitted in {_clock(event['seconds'])}")  # fmt: skip
            return
        if "done" in event:
            self.say(
                f"epoch {event['epoch'] + 1:3d}/{event['epochs']}  {event['phase']:<7}  "
                f"loss {event['train_loss']:.3f}  val {event['val_top1']:6.1%}  "
                f"{event['ratio']:5.2f}x fewer MACs  {event['images_per_s']:.0f} images/s  "
                f"{event['wait_share']:.0%} waiting for data  {event['seconds']:.0f} s"
            )
            return
        if self._begun is None:
            self._begun = (time.perf_counter(), event["step"] - 1)
        self._images += event["images"]
        if self._bar is None:
            return
        elapsed, done = time.perf_counter() - self._begun[0], event["step"] - self._begun[1]
        left = elapsed / done * (event["steps"] - event["step"])
        self._bar.update(
            self._task, description=f"epoch {event['epoch'] + 1}/{event['epochs']}", completed=event["step"],
            total=event["steps"], facts=f"loss {event['loss']:.3f}  {self._images / elapsed:.0f} images/s  "
            f"{event['wait_share']:.0%} waiting  {_clock(left)} left",
        )  # fmt: skip

    def _settling(self, what: str, done: int, of: int) -> None:
        if self._bar is not None:
            self._bar.update(self._task, description=what, completed=done, total=of or None, facts="")
        elif of == 0:
            self.say("Choosing the channels that stay ...")


def _clock(seconds: float) -> str:
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"
