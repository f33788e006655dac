"""The command line: `afds VERB ...`. It knows all the rest, and nothing knows it.

Only the verb that was asked for is imported, so that `afds --help` need not wait for torch.
Exit codes: 0 done; 1 a fault of the program, or images that could not be read; 2 something the user can mend;
130 interrupted.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import io
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

HELP = """\
usage: afds VERB ...

afds makes a classifier for your photos from a pretrained network, at a fraction of the network's cost.

  afds demo                           see the whole job on data that needs no download
  afds fit PHOTOS --budget 5x --out RUN
                                      train on PHOTOS/CLASS/*.jpg (from --source resnet50)
  afds evaluate RUN PHOTOS            accuracy and MACs on labelled photos
  afds predict RUN cat.jpg more/      what is in a photo
  afds export RUN --format onnx       one file for a runtime, checked against the network
  afds measure RUN                    time it beside its dense peer, in every runtime that is installed
  afds compare PHOTOS --methods l2,l2+l1,afds --out DIR
                                      which method is worth it: same budgets, tuning and seeds for all
  afds inspect RUN                    which channels win: what its predictors do, layer by layer
  afds report RUN                     draw RUN/report.html again
  afds prepare dogs120 FILES --out DIR
                                      a published data set from its archives (--list: which there are)

RUN is a folder: weights, class names, preprocessing, structure, and the record of how it came about.
`afds VERB --help` tells a verb's options, `afds --version` the version.
"""
VERBS = ("fit", "evaluate", "predict", "export", "measure", "inspect", "report", "compare", "prepare", "demo")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code. argv: without the program's name, by default the command line."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):  # a file name that is not UTF-8 must not cost the answers beside it
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    with _warnings_as_notes():
        return _run(arguments)


@contextlib.contextmanager
def _warnings_as_notes() -> Iterator[None]:
    """Of our own warnings the text alone, without the line of code that gave it."""
    from afds.errors import AfdsWarning

    usual = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        if issubclass(category, AfdsWarning):
            print(f"note: {message}", file=sys.stderr)
        else:
            usual(message, category, *where, **more)

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = usual


def _run(arguments: list[str]) -> int:
    try:
        code = _dispatch(arguments)
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        run = _run_folder(arguments) if arguments[:1] == ["fit"] else ""
        begun = run and os.path.exists(os.path.join(os.path.expanduser(run), "config.json"))
        hint = f" Go on with: afds fit --resume {run}" if begun else ""
        print(f"\nafds: interrupted.{hint}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the flush at exit complains
        if arguments[:1] in (["compare"], ["demo"]):  # they tell what they do while they do it
            print("afds: stopped, as nobody reads the output any more. The same command goes on.", file=sys.stderr)
            return 2
        return 0
    except SystemExit as stop:  # tyro, after help or a wrong option
        return stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    except Exception as error:
        from afds.errors import AfdsError

        if isinstance(error, OSError) and error.strerror:  # no room for the output, a path too long
            print(f"afds: error: {_subject(error)}{error.strerror}.", file=sys.stderr)
            return 2
        if not isinstance(error, AfdsError):
            raise
        print(f"afds: error: {error}", file=sys.stderr)
        return 2


def _subject(error: OSError) -> str:
    """What could not be done, where the system says of which file."""
    if error.filename is None:
        return "the output cannot be written: " if error.errno == errno.ENOSPC else ""
    name = str(error.filename)
    return f"{name if len(name) <= 200 else name[:200] + '...'}: "


def _run_folder(arguments: list[str]) -> str:
    """The run folder that a fit was given, as it was spelled."""
    for option in ("--resume", "--out"):
        for position, word in enumerate(arguments):
            if word == option and position + 1 < len(arguments):
                return arguments[position + 1]
            if word.startswith(option + "="):
                return word.partition("=")[2]
    return ""


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return 0
    if arguments[0] in ("-V", "--version", "version"):
        from afds import __version__

        print(f"afds {__version__}")
        return 0
    verb, *rest = arguments
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, 1)
        hint = f" Did you mean {near[0]}?" if near else ""
        print(f"afds: error: unknown verb {verb!r}.{hint} Verbs: {', '.join(VERBS)}.", file=sys.stderr)
        return 2
    from afds import commands

    return commands.run(verb, rest)
