"""The curves, as SVG that lies in the page: drawn by matplotlib, coloured by the page's style sheet.

Colours are placeholders while matplotlib draws and CSS variables in the page, so that one drawing serves
light, dark and print. Text stays text, in the page's font.
"""

from __future__ import annotations

import io
import math
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from html import escape
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from afds.report import winners
from afds.report.facts import Facts, Layer, number, sub

# Placeholder -> CSS variable. Nothing else in a drawing has these values.
_COLOURS = {"#010101": "--ink", "#020202": "--muted", "#030303": "--line", "#040404": "--a", "#050505": "--b",
            "#060606": "--c", "#070707": "--d", "#080808": "--ghost"}  # fmt: skip
_INK, _MUTED, _LINE, _A, _B, _C, _D, _GHOST = _COLOURS
_SERIES = (_A, _B, _C, _D, _INK, _MUTED)
_WIDTH, _WIDE = 4.2, 8.8  # inches of 72 SVG units: half the page, which is about a phone; the whole page

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none", "font.size": 8.5, "axes.edgecolor": _LINE, "axes.labelcolor": _MUTED,
    "text.color": _INK, "xtick.color": _MUTED, "ytick.color": _MUTED, "axes.grid": True, "grid.color": _LINE,
    "grid.linewidth": 0.6, "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False,
    "xtick.major.size": 0, "ytick.major.size": 0, "lines.linewidth": 1.6, "legend.frameon": False,
    "axes.axisbelow": True, "text.parse_math": False, "path.simplify": True,
}  # fmt: skip

Point = tuple[float, float]


def loss_figure(facts: Facts) -> str:
    """Terms of the training loss against epochs, weighted as they were summed."""
    options = facts.options
    settles = (
        options.get("method") == "afds" and options.get("budget") != "1x" and sub(options, "descent").get("settle")
    )
    weights = {"ce": 1.0, "afd": _weight(facts, "afd"), "kd": _weight(facts, "logits"),
               "hints": _weight(facts, "hints", "recovery" if settles else "distillation")}  # fmt: skip
    names = {"loss": "total", "ce": "cross-entropy", "afd": "features (AFD)", "kd": "logits (KD)",
             "hints": "blocks (hints)"}  # fmt: skip
    series = {}
    for term, label in names.items():
        weight = weights.get(term, 1.0)
        points = [(x, y * weight) for x, y in _per_epoch(facts, f"train_{term}")]
        if weight and any(y for _, y in points):
            series[label] = points
    if len(series) == 2 and series.get("total") == series.get("cross-entropy"):
        del series["total"]
    total = series.get("total", [])
    known = [dict(points) for label, points in series.items() if label != "total"]
    rest = [(x, y - sum(term.get(x, 0.0) for term in known)) for x, y in total]
    if total and max(y for _, y in rest) > 0.01 * max(y for _, y in total):
        series["other terms"] = rest  # of l2-sp, delta, slimming

    def draw(figure: Figure) -> None:
        ax = figure.subplots()
        colours = (_INK, _A, _B, _C, _D, _MUTED)[: len(series)]
        for colour, (label, points) in zip(colours, series.items(), strict=True):  # a term without a colour is an error
            ax.plot(*_xy(points), color=colour, label=label)
        ax.set_ylim(bottom=0)
        _finish(ax, facts, legend=len(series) > 1)

    return _svg(draw, 2.5, "Training loss by epoch") if series else ""


def density_falls(facts: Facts) -> bool:
    """Whether it changes at all: not where the channels were settled before the first step, or nothing is chosen."""
    return any(d != 1 for _, d in _per_epoch(facts, "density_mean"))


def accuracy_figure(facts: Facts) -> str:
    """Validation accuracy above, mean density below, against epochs."""
    accuracy = _per_epoch(facts, "val_top1")
    density = _per_epoch(facts, "density_mean") if density_falls(facts) else []
    if not accuracy:
        return ""
    dense = number(sub(facts.base.final, "val").get("top1")) if facts.base is not None else None

    def draw(figure: Figure) -> None:
        two = figure.subplots(
            2 if density else 1, 1, sharex=True, squeeze=False, height_ratios=[3, 2][: 1 + bool(density)]
        )
        above = two[0, 0]
        above.plot(*_xy(accuracy), color=_A)
        if dense is not None:
            above.axhline(dense, color=_INK, linestyle=":", linewidth=1)
            above.annotate(facts.began_as, (0, dense), xycoords=("axes fraction", "data"), xytext=(2, 2), color=_INK,
                           textcoords="offset points", fontsize="small")  # fmt: skip
        _percents(above)
        _title(above, "validation accuracy")
        if density:
            below = two[1, 0]
            below.plot(*_xy(density), color=_B, drawstyle="steps-post")
            below.set_ylim(0, 1.05)
            _title(below, "mean density d")
            _finish(below, facts)
        else:
            _finish(above, facts)
        _shade(above, facts)

    return _svg(draw, 3.1, "Validation accuracy and density by epoch")


def entropy_figure(facts: Facts) -> str:
    """AFD's attention: entropy of rho per stage, as a share of the largest possible, log C."""
    found: dict[str, list[Point]] = defaultdict(list)
    for line in facts.of_kind("step"):
        x = _epoch_of(line, facts)
        for name, value in sub(line, "entropy").items():
            y = number(value)
            if x is not None and y is not None:
                found[name].append((x, y))
    if not found:
        return ""

    def draw(figure: Figure) -> None:
        ax = figure.subplots()
        stages = {name: name.split(".")[0] for name in found}  # layer1.2.conv3: one unit a stage
        labels = stages if len(set(stages.values())) == len(found) else {name: name for name in found}
        for colour, (name, points) in zip(_SERIES, found.items(), strict=False):
            ax.plot(*_xy(_thinned(points)), color=colour, label=_short(labels[name]))
        ax.set_ylim(0, 1.05)
        _finish(ax, facts, legend=True)

    return _svg(draw, 2.5, "Entropy of AFD's attention by stage of the network")


def layers_figure(layers: Sequence[Layer]) -> str:
    """MACs of each layer in the order in which they run: dense behind, counted before it.

    Two drawings, of which the style sheet shows one: a wide one would be too small to read on a phone.
    """
    layers = [layer for layer in layers if layer.cost.get("dense")]
    if not layers:
        return ""
    x = range(1, len(layers) + 1)
    unit, name = (1e6, "M") if max(layer.cost["dense"] for layer in layers) >= 1e6 else (1e3, "k")

    def draw(figure: Figure) -> None:
        ax = figure.subplots()
        ax.bar(x, [layer.cost["dense"] / unit for layer in layers], 0.86, color=_GHOST, label="dense")
        base = [0.0] * len(layers)
        for parts, colour, label in (
            (("conv", "scaling"), _A, "computed"),
            (("predictor",), _B, "predictor"),
        ):
            heights = [sum(layer.cost.get(part, 0.0) for part in parts) / unit for layer in layers]
            if any(heights):
                ax.bar(x, heights, 0.86, bottom=base, color=colour, label=label)
            base = [a + b for a, b in zip(base, heights, strict=True)]
        _by_layer(ax, len(layers))
        _title(ax, f"{name} MACs per image")
        _legend(ax)

    title = "MACs of each layer, dense and counted"
    return _svg(draw, 2.9, title, width=_WIDE, css="wide") + _svg(draw, 2.5, title, css="narrow")


def wins_figure(found: dict[str, Any]) -> str:
    """Channels of each layer stacked by how often they win: always at the foot, never at the head."""
    rows = [layer for layer in winners.layers(found).values()
            if all(winners.share(layer, part) is not None for part in winners.PARTS)]  # fmt: skip
    if not rows:
        return ""
    labels = ("always", "90 % and more", "10 to 90 %", "below 10 %", "never")
    shades = ((_A, 1.0), (_A, 0.72), (_A, 0.48), (_A, 0.26), (_GHOST, 1.0))

    def draw(figure: Figure) -> None:
        ax = figure.subplots()
        base = [0.0] * len(rows)
        for part, label, (colour, alpha) in zip(winners.PARTS, labels, shades, strict=True):
            heights = [winners.share(layer, part) or 0.0 for layer in rows]
            ax.bar(range(1, len(rows) + 1), heights, 0.86, bottom=base, color=colour, alpha=alpha, label=label,
                   linewidth=0)  # fmt: skip
            base = [a + b for a, b in zip(base, heights, strict=True)]
        ax.set_ylim(0, 1)
        _percents(ax)
        _by_layer(ax, len(rows))
        ax.grid(False)  # it would shine through
        _legend(ax, 5 if figure.get_figwidth() > _WIDTH else 3)

    title = "How often the channels of each layer win"
    return _svg(draw, 2.9, title, width=_WIDE, css="wide") + _svg(draw, 2.5, title, css="narrow")


def overlap_figure(found: dict[str, Any]) -> str:
    """Winners that two images share, by layer: of one class, of two, and what chance would give."""
    rows = list(winners.layers(found).values())
    keys = {"same class": "overlap_same", "across classes": "overlap_different", "at random": "density"}
    series = {label: _by_position(rows, key) for label, key in keys.items()}
    if not series["same class"] and not series["across classes"]:
        return ""

    def draw(figure: Figure) -> None:
        ax = figure.subplots()
        for (label, points), colour in zip(series.items(), (_B, _A, _MUTED), strict=True):
            if points and colour == _MUTED:
                ax.plot(*_xy(points), color=colour, label=label, linestyle=":", linewidth=1.2)
            elif points:
                ax.plot(*_xy(points), color=colour, label=label, marker="o", markersize=3.2, linewidth=0.8)
        ax.set_ylim(0, 1.04)
        _percents(ax)
        _by_layer(ax, len(rows))
        _legend(ax)

    return _svg(draw, 2.5, "Winners that two images share in each layer")


def varies_figure(found: dict[str, Any]) -> str:
    """Share of the variance between images, by layer: of the saliencies and of what ranks them."""
    rows = list(winners.layers(found).values())
    keys = {"saliency": "between_images", "rank": "ranked_between_images"}
    series = {label: _by_position(rows, key) for label, key in keys.items()}
    if not any(series.values()):
        return ""

    def draw(figure: Figure) -> None:
        ax = figure.subplots()
        for (label, points), colour, shift in zip(series.items(), (_A, _B), (-0.21, 0.21), strict=True):
            x, y = _xy(points)
            ax.bar([value + shift for value in x], y, 0.42, color=colour, label=label, linewidth=0)
        ax.set_ylim(bottom=0)
        _percents(ax)
        _by_layer(ax, len(rows))
        _legend(ax)

    return _svg(draw, 2.5, "Share of the variance of the saliencies between images")


def _by_position(rows: Sequence[dict[str, Any]], key: str) -> list[Point]:
    """(position from 1, share) of the layers that have it."""
    values = [(float(i), winners.share(layer, key)) for i, layer in enumerate(rows, 1)]
    return [(x, y) for x, y in values if y is not None]


def _by_layer(ax: Axes, count: int) -> None:
    ax.grid(False, axis="x")
    ax.set_xlim(0.3, count + 0.7)
    ax.set_xlabel("layer, in the order of the table")
    ax.xaxis.set_major_locator(MaxNLocator(10, integer=True))


def _percents(ax: Axes) -> None:
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:g} %"))


def _weight(facts: Facts, name: str, part: str = "distillation") -> float:
    value = number(sub(facts.options, part).get(name))
    return 1.0 if value is None else value


def _per_epoch(facts: Facts, key: str) -> list[Point]:
    """(epochs done, value) of the epoch lines."""
    points = []
    for line in facts.of_kind("epoch"):
        epoch, value = number(line.get("epoch")), number(line.get(key))
        if epoch is not None and value is not None:
            points.append((epoch + 1, value))
    return points


def _epoch_of(line: dict[str, Any], facts: Facts) -> float | None:
    """Epochs done at a step."""
    step, each = number(line.get("step")), number(sub(facts.config, "resolved").get("steps_per_epoch"))
    if step is not None and each:
        return step / each
    return number(line.get("epoch"))


def _thinned(points: list[Point], limit: int = 200) -> list[Point]:
    """At most `limit` points, each the mean of its neighbours: a long run need not make a large page."""
    size = math.ceil(len(points) / limit)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]


def _xy(points: Sequence[Point]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _finish(ax: Axes, facts: Facts, *, legend: bool = False) -> None:
    ax.set_xlabel("epoch")
    ax.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
    _shade(ax, facts)
    if legend:
        _legend(ax)


LEGEND_LETTERS = 60  # side by side in a narrow figure, handles and gaps included; a wider legend leaves no drawing


def _legend(ax: Axes, columns: int = 4) -> None:
    """Above the drawing, where it covers nothing."""
    handles, labels = ax.get_legend_handles_labels()
    columns = max(1, min(columns, LEGEND_LETTERS // (5 + max(map(len, labels), default=0))))
    ax.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=min(len(handles), columns), handlelength=1.1,
              columnspacing=1.1, borderaxespad=0.2, handletextpad=0.5)  # fmt: skip


def _title(ax: Axes, text: str) -> None:
    ax.set_title(text, loc="left", fontsize=8.5, color=_MUTED)


def _shade(ax: Axes, facts: Facts) -> None:
    """The epochs in which the density falls."""
    fall = [number(line.get("epoch")) for line in facts.of_kind("epoch") if line.get("phase") == "descent"]
    epochs = [epoch for epoch in fall if epoch is not None]
    if epochs:
        ax.axvspan(min(epochs), max(epochs) + 1, color=_LINE, alpha=0.45, linewidth=0)


def _short(name: str) -> str:
    return name if len(name) <= 24 else "..." + name[-21:]


def _svg(draw: Callable[[Figure], None], height: float, title: str, *, width: float = _WIDTH, css: str = "plot") -> str:
    """The drawing as an <svg> element that fits into an HTML page."""
    with rc_context({**_STYLE, "svg.hashsalt": title}):
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.S)
    svg = re.sub(r'\s(xmlns(:xlink)?|version|width|height)="[^"]*"', "", svg[: svg.index(">")]) + svg[svg.index(">") :]
    prefix = re.sub(r"\W+", "", title) + css
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = svg.replace('href="#', f'href="#{prefix}-').replace("url(#", f"url(#{prefix}-")
    for colour, variable in _COLOURS.items():
        svg = svg.replace(colour, f"var({variable})")
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font: \1px var(--font)", svg)
    return f'<svg role="img" aria-label="{escape(title)}" class="{css}"' + svg[len("<svg") :]
