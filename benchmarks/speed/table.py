"""The results of figures.sh as tables.

    python benchmarks/speed/table.py OUT OUT/figures.md

Speed-up: over the fastest dense runtime (ONNX Runtime, OpenVINO) of the same precision, in the same turns. Share: the
part of the MACs ratio that became time.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from afds.files import write_atomic
from afds.record import read_lines

Line = dict[str, Any]
KINDS = {
    "settled": "Settled, all scales predicted (`--descent.scales predicted`)",
    "cheap": "Settled, today's default: scales predicted where that is cheap",
    "learned": "Settled, scales learned (`--descent.scales learned`)",
    "choosing": "Choosing per image (`--descent.no-settle`)",
}


@dataclass(frozen=True)
class Options:
    """Write the tables of figures.sh."""

    out: Annotated[Path, tyro.conf.Positional]
    """Folder that figures.sh has filled."""
    page: Annotated[Path, tyro.conf.Positional]
    """Markdown file to write."""


def main(options: Options) -> None:
    lines = read_lines(options.out / "runtime.jsonl")
    stamp = lines[0]
    versions = ", ".join(f"{name} {version}" for name, version in stamp["versions"].items())
    page = [f"{stamp['cpu']}, {stamp.get('date', '')}; {versions}; batch 1, 224 px, random weights.\n"]
    for kind, what in KINDS.items():
        rows = list(_native(lines, kind))
        if rows:
            page.append(f"\n**{what}**, the native runtime; median ms (p10 to p90), MACs ratio, speed-up, **share**:\n")
            page += rows
    if any(options.out.glob("folders/*/measure.json")):
        page += ["\n**Run folders through `afds measure`**, the speed-up over the fastest dense row, **share**:\n",
                 *_folders(options.out)]  # fmt: skip
    page += [f"\n{path.read_text().strip()}\n" for path in sorted(options.out.glob("loading-*.txt"))]
    write_atomic(options.page, "\n".join(page) + "\n")


def _native(lines: list[Line], kind: str) -> Iterator[str]:
    """One row for each network, number of threads and precision; nothing where no network of ``kind`` was timed."""
    groups: dict[tuple[str, int, str], list[Line]] = {}
    for line in lines:
        groups.setdefault((line["arch"], line["threads"], line["precision"]), []).append(line)
    names = list(dict.fromkeys(line["runtime"].split(" (")[0] for line in lines))
    ours = [name for name in names if name.startswith("afds ") and name.endswith(kind)]
    if not ours:
        return
    heads = ["network", "threads", "precision", "ONNX Runtime dense", "OpenVINO dense", "afds dense (speed-up)", *ours]
    yield _row(heads)
    yield "|" + "---|" * len(heads)
    for (arch, threads, precision), group in sorted(
        groups.items(), key=lambda item: (item[0][0].zfill(12), item[0][1:])
    ):
        ms = {line["runtime"].split(" (")[0]: line for line in group}
        peers = [ms[name]["median_ms"] for name in ("ONNX Runtime dense", "OpenVINO dense") if name in ms]
        cells = [f"{ms[name]['median_ms']:.1f}" if name in ms else "" for name in heads[3:5]]
        dense = ms["afds dense"]["median_ms"]
        cells.append(f"{dense:.1f} ({min(peers) / dense:.2f})")
        for name in ours:
            line = ms[name]
            faster = min(peers) / line["median_ms"]
            times = f"{line['median_ms']:.2f} ({line['p10_ms']:.2f} to {line['p90_ms']:.2f})"
            ratio = line["macs_ratio"]
            cells.append(f"{times}, {ratio:.2f}x: {faster:.2f}x, **{faster / ratio:.2f}**")
        yield _row([arch, str(threads), precision, *cells])


def _folders(out: Path) -> Iterator[str]:
    heads = ["run", "threads", "dense", "ONNX Runtime", "OpenVINO", "native"]
    yield _row(heads)
    yield "|" + "---|" * len(heads)
    for path in sorted(out.glob("folders/*/measure.json"), key=lambda path: (len(path.parent.name), path)):
        saved = json.loads(path.read_text())
        rows = saved["rows"]
        for threads in dict.fromkeys(row["threads"] for row in rows):
            here = [row for row in rows if row["threads"] == threads and row["batch"] == 1]
            dense = min((r for r in here if r["form"] == "dense"), key=lambda r: r["median_ms"])
            cells = [f"{dense['median_ms']:.1f} ms ({dense['runtime']})"]
            for runtime in ("onnx", "openvino", "native"):
                found = [r for r in here if (r["form"], r["runtime"]) == (saved.get("own", "dynamic"), runtime)]
                cells += [_folder_cell(found[0])] if found else [""]
            yield _row([path.parent.name, str(threads), *cells])


def _folder_cell(row: Line) -> str:
    return f"{row['median_ms']:.2f} ms, {row['speedup']:.2f}x, **{row['share']:.2f}**"


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main(tyro.cli(Options))
