"""The table of layers: what is kept in each, what it costs and what the predictor takes of that."""

from __future__ import annotations

from afds.report.facts import Layer, number
from afds.report.text import DASH, macs, percent, plain, text

NOTE = (
    "in, out: mean number of active channels that arrive and leave. MACs are per image; predictor: its share "
    f"of the counted. A density of {DASH} means that the layer follows another one, or never selects."
)
_COLUMNS = (
    ("#", "num lo"),
    ("layer", ""),
    ("density", "num"),
    ("k of C", "num lo"),
    ("in", "num lo"),
    ("out", "num lo"),
    ("dense", "num lo"),
    ("counted", "num"),
    ("predictor", "num lo"),
    ("of dense", "bar"),
)


def table(layers: list[Layer]) -> str:
    """One row a layer, in the order in which they run."""
    head = "".join(f'<th class="{css}">{name}</th>' for name, css in _COLUMNS)
    rows = "".join(_row(i, layer) for i, layer in enumerate(layers, 1))
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def bar(share: float | None, predictor: float = 0.0) -> str:
    """A share of 1 as a bar, of which the part `predictor` has its own colour."""
    if share is None:
        return ""
    part = min(max(share, 0.0), 1.0) * 100
    computed, predicted = part * (1 - predictor), part * predictor
    return (
        f'<div class="track{" over" if share > 1 else ""}"><i style="width:{computed:.1f}%"></i>'
        f'<i class="p" style="width:{predicted:.1f}%"></i></div><small>{percent(share)}</small>'
    )


def _row(position: int, layer: Layer) -> str:
    cost = layer.cost
    density, k, channels = (number(layer.unit.get(key)) for key in ("density", "k", "channels"))
    full = cost.get("channels_out")  # before anything was cut away
    if channels is None:
        channels = full
    elif k is not None and full is not None and full > channels:
        density, channels = k / full, full
    dense, counted = cost.get("dense"), layer.counted
    share = counted / dense if dense else None
    predictor = min(max(cost.get("predictor", 0.0) / counted, 0.0), 1.0) if counted > 0 else 0.0
    values = (
        str(position),
        text(layer.name).replace(".", ".<wbr>"),
        DASH if density is None else f"{density:.2f}",
        plain(channels) if k is None or channels is None else f"{k:g} of {channels:g}",
        plain(cost.get("active_in")),
        plain(cost.get("active_out")),
        macs(dense),
        macs(counted if cost else None),
        percent(predictor) if predictor else DASH,
        bar(share, predictor),
    )
    cells = zip(_COLUMNS, values, strict=True)
    return "<tr>" + "".join(f'<td class="{css or "name"}">{value}</td>' for (_, css), value in cells) + "</tr>"
