"""Facts and figures into the page. Every text from a file goes through `text`, which escapes it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from string import Template

from afds.report import figures, layers, speed, winners
from afds.report.facts import Facts, number, sub
from afds.report.text import DOT, TIMES, compact, macs, margin, pairs, percent, text
from afds.report.verdict import verdict

WEAKEST = 8  # classes shown

ACCURACY = "Accuracy on the validation images after each epoch."
DENSE = "Dotted: the {} network that it began with."
DENSITY = "Below it the mean density of the layers, and shaded the epochs in which it falls."
LOSS = "Mean training loss of each epoch; its terms as they are weighted in the sum."
ENTROPY = (
    "AFD's attention over channels, for each stage of the network: 1 is spread evenly, near 0 sits on a "
    "single channel, which would be degenerate."
)
LAYERS = (
    "Multiply-accumulates per image, mean over the validation images: in grey what the dense network "
    "computes, in colour what is counted here, predictors included."
)
WINS = (
    "Channels of each layer, by how many of the images they win on. Full colour at the foot and grey at the head is "
    "static."
)
OVERLAP = (
    "Winners that two images share, mean over all pairs. 100 % is the same choice for every image; winners drawn at "
    "random would share the dotted line."
)
VARIES = (
    "Part of the variance that lies between images, of the saliencies and of the scores by which winners are ranked "
    "(saliency times importance). 0: the predictor says the same of every image."
)
CHANNELS = {
    "dynamic": "chosen anew for each image",
    "static": "with a constant saliency",
    "pruned": "never used",
    "cut": "gone for good",
}
SETTLED = "always computed, scaled anew for each image"


def render(facts: Facts) -> str:
    """The page as HTML, complete in itself: no script, no address to fetch from."""
    sections = (
        _headline(facts),
        _section("How it learned", _curves(facts)),
        _section("What a stopwatch says", speed.table(facts)),
        _section("Where the work is", _layers(facts)),
        _section("Channels", _channels(facts)),
        _section("Which channels win", _winners(facts)),
        _section("Classes", _classes(facts)),
        _section("Photos", _photos(facts)),
        _section("To repeat it", _repeat(facts)),
    )
    template = resources.files("afds.report").joinpath("page.html").read_text(encoding="utf-8")
    return Template(template).substitute(title=text(facts.name), body="\n".join(filter(None, sections)))


def _section(title: str, content: str) -> str:
    return f"<section><h2>{title}</h2>{content}</section>" if content else ""


def _headline(facts: Facts) -> str:
    what = (facts.structure.get("arch") or facts.options.get("source"), facts.options.get("method"))
    line = f" {DOT} ".join(f"<span>{text(part)}</span>" for part in (*what, facts.options.get("data")) if part)
    tiles = [
        _accuracy_tile(facts, "test", "test accuracy"),
        _accuracy_tile(facts, "val", "validation accuracy"),
    ]
    counted, dense, ratio = (facts.total(key) for key in ("counted_macs", "dense_macs", "ratio"))
    if counted is not None:
        notes = [f"of {macs(dense)} dense", "predictors included"]
        if facts.sides:
            notes.append("{:g} px, dense {:g} px".format(*facts.sides))
        tiles.append(_tile(macs(counted), "MACs per image", notes))
    if ratio is not None:
        budget = facts.final.get("budget")
        tiles.append(_tile(f"{ratio:.2f}{TIMES}", "fewer MACs", [f"asked: {text(budget)}" if budget else ""]))
    if (clock := speed.headline(facts)) is not None:
        tiles.append(_tile(f"{clock[0]:.2f}{TIMES}", "faster by the clock", clock[1]))
    said = "".join(f'<p class="{kind}">{text(sentence)}</p>' for kind, sentence in verdict(facts))
    return (
        f'<header><h1>{text(facts.name)}</h1><p class="sub">{line}</p></header>\n'
        f'<div class="tiles">{"".join(tiles)}</div>\n<div class="verdict">{said}</div>'
    )


def _accuracy_tile(facts: Facts, split: str, name: str) -> str:
    metrics, reference = sub(facts.final, split), sub(facts.base.final if facts.base else {}, split)
    shares = {key: number(metrics.get(key)) for key in ("top1", "balanced_accuracy", "top5")}
    top1 = shares["top1"]
    if top1 is None:
        return ""
    notes = [margin(top1, number(metrics.get("images")))]
    shares["dense"] = number(reference.get("top1"))
    for key, label in (
        ("dense", "before selection" if facts.began_as == "dense" else f"at {facts.began_as}"),
        ("balanced_accuracy", "class mean"),
        ("top5", "top 5"),
    ):
        share = shares[key]
        if share is not None:
            notes.append(f"{label} {percent(share)}")
    return _tile(percent(top1), name, notes)


def _tile(value: str, name: str, notes: Iterable[str]) -> str:
    small = "".join(f"<small>{note}</small>" for note in notes if note)
    return f'<div class="tile"><b>{value}</b><span>{name}</span>{small}</div>'


def _figure(svg: str, caption: str) -> str:
    return f"<figure>{svg}<figcaption>{caption}</figcaption></figure>" if svg else ""


def _curves(facts: Facts) -> str:
    said = [
        ACCURACY,
        *[DENSE.format(facts.began_as)] * (facts.base is not None),
        *[DENSITY] * figures.density_falls(facts),
    ]
    drawn = (
        _figure(figures.accuracy_figure(facts), " ".join(said)),
        _figure(figures.loss_figure(facts), LOSS),
        _figure(figures.entropy_figure(facts), ENTROPY),
    )
    return f'<div class="plots">{"".join(drawn)}</div>' if any(drawn) else ""


def _layers(facts: Facts) -> str:
    found = facts.layers
    if not found:
        return ""
    chart = _figure(figures.layers_figure(found), LAYERS)
    note = layers.NOTE
    if facts.sides:
        own, dense = facts.sides
        note += (f" Dense MACs by layer are at the {own:g} px that this network looks at; its dense network sees "
                 f"{dense:g} px, which the budget counts against.")  # fmt: skip
    return f'{chart}{layers.table(found)}<p class="note">{note}</p>'


def _channels(facts: Facts) -> str:
    units = sub(facts.structure, "units")
    totals = {kind: sum(number(sub(units, name).get(kind)) or 0.0 for name in units) for kind in CHANNELS}
    totals["cut"] = facts.cut_away()
    meaning = {**CHANNELS, **({"dynamic": SETTLED} if facts.settled else {})}
    every = sum(totals.values())
    if every <= 0:
        return ""
    bars = "".join(f'<i class="{kind}" style="width:{100 * n / every:.2f}%"></i>' for kind, n in totals.items())
    keys = "".join(
        f'<li><i class="{kind}"></i><b>{n:,.0f}</b> {kind}, {meaning[kind]}</li>'
        for kind, n in totals.items()
        if n or kind != "cut"
    )
    return f'<div class="stack">{bars}</div><ul class="keys">{keys}</ul>'


def _winners(facts: Facts) -> str:
    found = facts.winners
    rows = winners.table(found)
    if not rows:
        return ""
    said = "".join(f"<p>{text(line)}</p>" for line in winners.summary(found))
    if found.get("weights_sha256") != sub(facts.structure, "weights").get("sha256"):
        said = '<p class="warn">These figures are of other weights than the run\'s: run afds inspect again.</p>' + said
    drawn = (
        _figure(figures.overlap_figure(found), OVERLAP),
        _figure(figures.varies_figure(found), VARIES),
    )
    plots = f'<div class="plots">{"".join(drawn)}</div>' if any(drawn) else ""
    split = text(found.get("split", ""))
    where = f"On {text(compact(found.get('images')))} images ({split}), {text(found.get('when', ''))}."
    return f'{said}{_figure(figures.wins_figure(found), WINS)}{plots}{rows}<p class="note">{winners.NOTE} {where}</p>'


def _classes(facts: Facts) -> str:
    """The weakest classes, and what is taken for what, on the test images where there are some."""
    for split, name in (("test", "test"), ("val", "validation")):
        found = sub(facts.final, split)
        shares, images = found.get("per_class"), found.get("class_images")
        if not isinstance(shares, list):
            continue
        counts = images if isinstance(images, list) and len(images) == len(shares) else [None] * len(shares)
        known = [(number(s), label, number(n)) for s, label, n in zip(shares, facts.labels, counts, strict=False)]
        ranked = sorted(((s, label, n) for s, label, n in known if s is not None), key=lambda row: row[0])
        if ranked:
            few = len(ranked) > WEAKEST
            all_of = "" if len(ranked) == len(shares) else f" with images ({len(shares)} in all)"
            title = f"the {WEAKEST} weakest of {len(ranked)} classes{all_of}" if few else "class"
            head = f'<th>{title}</th><th class="num">images</th><th class="bar">accuracy, {name} images</th>'
            rows = "".join(
                f'<tr><td class="name">{text(label)}</td><td class="num">{_count(n)}</td>'
                f'<td class="bar">{layers.bar(s)}</td></tr>'
                for s, label, n in ranked[:WEAKEST]
            )
            table = f'<table class="classes"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'
            return table + _confusions(found, facts.labels, counts)
    return ""


def _confusions(found: Mapping[str, object], labels: Sequence[str], counts: Sequence[object]) -> str:
    """What is most often taken for what."""
    rows = ""
    pairs = found.get("confusions")
    for pair in pairs[:WEAKEST] if isinstance(pairs, list) else ():
        if not (isinstance(pair, list) and len(pair) == 3 and all(type(i) is int for i in pair)):
            continue
        a, b, n = pair
        if 0 <= a < len(labels) and 0 <= b < len(labels):
            of = number(counts[a]) if a < len(counts) else None
            rows += (f'<tr><td class="name">{text(labels[a])}</td><td class="name">{text(labels[b])}</td>'
                     f'<td class="num">{_count(number(n))} of {_count(of)}</td></tr>')  # fmt: skip
    if not rows:
        return ""
    head = '<th>class</th><th>most often taken for</th><th class="num">images</th>'
    return f'<table class="classes"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'


def _count(n: float | None) -> str:
    return "" if n is None else f"{n:,.0f}"


def _photos(facts: Facts) -> str:
    data = sub(facts.config, "data")
    counts = [("classes", data.get("classes"))]
    counts += [(f"{split} images", data.get(split)) for split in ("train", "val", "test", "unlabelled")]
    shown = [(name, f"{n:,.0f}") for name, value in counts if (n := number(value)) is not None]
    warnings, unreadable = data.get("warnings"), data.get("unreadable")
    lines = [line for line in warnings if isinstance(line, str)] if isinstance(warnings, list) else []
    if isinstance(unreadable, list) and unreadable:
        count = len(unreadable)
        lines.append(f"{count} files could not be read and were left out, the first: {unreadable[0]}")
    return pairs(shown) + "".join(f'<p class="warn">{text(line)}</p>' for line in lines[:20])


def _repeat(facts: Facts) -> str:
    command = facts.config.get("command")
    shown = f"<pre>{text(command)}</pre>" if isinstance(command, str) else ""
    hardware = sub(facts.config, "hardware")
    entries = [("seed", facts.options.get("seed")), *sub(facts.config, "resolved").items()]
    entries += [(key, value) for key, value in hardware.items() if key != "versions"]
    entries += [("afds", facts.config.get("afds")), *sub(hardware, "versions").items()]
    listed = pairs([(key, text(compact(value))) for key, value in entries if value is not None])
    if not facts.options:
        return shown + listed
    options = text(json.dumps(facts.options, indent=1, ensure_ascii=False), 20_000)
    return f"{shown}{listed}<details><summary>All options</summary><pre>{options}</pre></details>"
