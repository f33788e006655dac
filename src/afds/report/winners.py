"""Which channels win: the figures of `afds inspect`, as sentences and as a table, for the page and the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from afds.report.facts import number, sub
from afds.report.text import DASH, plain, text

MAX_LAYERS = 2000
PARTS = ("always", "most", "some", "rare", "never")
NOTE = (
    "never, some, always: share of the channels that win on none, on some and on all of these images. shared: the part "
    "of its winners that an image has in common with another one; class: with one of its class; across: with one of "
    "another class. Winners drawn at random would share the density d. varies: the part of the variance of the "
    "saliencies that lies between images; the rest lies between channels, the same for every image. dead: channels "
    "whose saliency is 0 on every image. mute: channels whose predictor says the same of every image."
)
_TEXT = ("layer",)
_LOW = ("#", "k of C", "class", "across", "dead", "mute")  # left out where the page is narrow


def layers(winners: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The layers of winners.json, as far as they are objects."""
    found = [(name, layer) for name, layer in sub(winners, "layers").items() if isinstance(layer, dict)]
    return dict(found[:MAX_LAYERS])


def share(layer: dict[str, Any], name: str) -> float | None:
    """A figure from 0 to 1, or None for anything else."""
    value = number(layer.get(name))
    return value if value is not None and 0 <= value <= 1 else None


def sometimes(layer: dict[str, Any]) -> float | None:
    """Share of the channels that win on some images and not on others."""
    found = [share(layer, name) for name in ("rare", "some", "most")]
    known = [value for value in found if value is not None]
    return min(sum(known), 1.0) if len(known) == len(found) else None


def shown(winners: dict[str, Any]) -> Iterator[dict[str, str]]:
    """Rows of the table: texts, not escaped, by the name of their column."""
    for position, (name, layer) in enumerate(layers(winners).items(), 1):
        k, channels = number(layer.get("k")), number(layer.get("channels"))
        density = share(layer, "density")
        yield {
            "#": str(position), "layer": name, "d": DASH if density is None else f"{density:.2f}",
            "k of C": DASH if k is None or channels is None else f"{k:g} of {channels:g}",
            "never": _percent(share(layer, "never")), "some": _percent(sometimes(layer)),
            "always": _percent(share(layer, "always")), "shared": _percent(share(layer, "overlap")),
            "class": _percent(share(layer, "overlap_same")), "across": _percent(share(layer, "overlap_different")),
            "varies": _percent(share(layer, "between_images")),
            "dead": plain(number(layer.get("dead"))), "mute": plain(number(layer.get("constant"))),
        }  # fmt: skip


NOTHING = ("No image chooses: every layer computes all the channels that it has. What was cut away before is in the "
           "report's table of layers.")  # fmt: skip


def summary(winners: dict[str, Any]) -> list[str]:
    """What the figures come to, in the layers that choose."""
    mean, found = sub(winners, "mean"), layers(winners)
    choosing, images = number(winners.get("choosing")), number(winners.get("images"))
    if not choosing:
        return [NOTHING] if choosing == 0 else []
    lines = []
    never, always, some = share(mean, "never"), share(mean, "always"), sometimes(mean)
    if never is not None and always is not None and some is not None:
        lines.append(
            f"{choosing:.0f} of {len(found)} layers have a choice. Of their channels {_percent(never)} win on none of "
            f"these {plain(images)} images, {_percent(some)} on some, {_percent(always)} on all."
        )
    overlap, random = share(mean, "overlap"), share(mean, "density")
    if overlap is not None and random is not None:
        same, different = share(mean, "overlap_same"), share(mean, "overlap_different")
        both = "" if same is None or different is None else (
            f" ({_percent(same)} within a class, {_percent(different)} across classes)")  # fmt: skip
        lines.append(
            f"Two images share {_percent(overlap)} of their winners{both}. 100 % would be a static choice, "
            f"{_percent(random)} one at random."
        )
    varies = share(mean, "between_images")
    if varies is not None:
        lines.append(f"{_percent(varies)} of the variance of the saliencies lies between images, the rest between "
                     "channels.")  # fmt: skip
    return lines


def table(winners: dict[str, Any]) -> str:
    """One row a layer, for the page."""
    rows = list(shown(winners))
    if not rows:
        return ""
    head = "".join(f'<th class="{_css(name)}">{name}</th>' for name in rows[0])
    body = "".join(
        "<tr>" + "".join(f'<td class="{_css(name)}">{_cell(name, value)}</td>' for name, value in row.items()) + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(name: str, value: str) -> str:
    return text(value).replace(".", ".<wbr>") if name in _TEXT else text(value)


def _css(name: str) -> str:
    return "name" if name in _TEXT else "num lo" if name in _LOW else "num"


def _percent(value: float | None) -> str:
    """Whole percents; what is almost none or almost all stays apart from none and all."""
    if value is None:
        return DASH
    if 0 < value < 0.005:
        return "<1 %"
    return ">99 %" if 0.995 <= value < 1 else f"{100 * value:.0f} %"
