"""What is printed to: rich's console, but for a reader who has seen enough and a terminal that is too narrow."""

from __future__ import annotations

from typing import NoReturn

from rich.console import Console


class Terminal(Console):
    """A console whose reader may leave, as `head` does: the command line hears of it (rich would end the program)."""

    def on_broken_pipe(self) -> NoReturn:
        raise  # what rich has just caught


def make_console(least: int = 0) -> Terminal:
    """Of ``least`` columns at least: in a narrow terminal lines of a table wrap; columns would lose their figures."""
    console = Terminal(highlight=False)
    return console if console.width >= least else Terminal(highlight=False, width=least)
