"""The page: it stands alone, survives missing and hostile files, and says the bad news."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from afds.errors import RunFolderError
from afds.report import figures, write_report
from afds.report.facts import Facts
from afds.report.verdict import verdict
from afds.selection import SelectionConfig
from runs import write_run

EVIL = '<script>alert("x")</script><img src=http://evil.example/a.png onerror=alert(1)>$title ${body} & "quoted"'


def epochs(*, lost: float = 0.0) -> list[dict[str, Any]]:
    phases = ["warm"] * 3 + ["descent"] * 3 + ["final"] * 2
    return [
        {"kind": "epoch", "epoch": i, "phase": phase, "train_loss": 2 - i / 8, "train_ce": 1 - i / 8,
         "train_afd": 9.0, "train_kd": 0.1 * (i > 2), "train_hints": 0.5, "val_ce": 0.5, "ratio": 1 + i,
         "val_top1": 0.9 - lost * (i > 2),
         "density_mean": 1 - i / 10, "seconds": 3.0}
        for i, phase in enumerate(phases)
    ]  # fmt: skip


def final(**change: Any) -> dict[str, Any]:
    val = {"images": 10_000, "top1": 0.9, "top5": None, "balanced_accuracy": 0.88, "cross_entropy": 0.5,
           "per_class": [0.9, None, 0.5], "class_images": [9000, 0, 1000],
           "confusions": [[2, 0, 431], [0, 1, 29]]}  # fmt: skip
    return {"kind": "final", "val": val, "test": {**val, "top1": 0.85}, "dense_macs": 2e9, "counted_macs": 4e8,
            "ratio": 5.0, "budget": "5x"} | change  # fmt: skip


def steps() -> list[dict[str, Any]]:
    return [{"kind": "step", "epoch": i // 4, "step": i * 10, "loss": 1.0, "ce": 1.0, "afd": 2.0,
             "entropy": {"layer1.0.conv2": 0.9, "layer4.0.conv2": 0.8}} for i in range(20)]  # fmt: skip


def write_lines(run: Path, lines: list[dict[str, Any]]) -> None:
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("written")
    write_run(path, selection=SelectionConfig(), labels=("ant", "bee", EVIL))
    return path


@pytest.fixture
def run(written: Path, tmp_path: Path) -> Path:
    out = shutil.copytree(written, tmp_path / "run & <b>co")
    write_lines(out, [*steps(), *epochs(), final()])
    config = {
        "afds": "0.1.0", "command": f"afds fit '{EVIL}'",
        "config": {"data": EVIL, "method": "afds", "seed": 7, "distillation": {"afd": 0.01, "logits": 1.0}},
        "data": {"classes": 3, "train": 1200, "val": 100, "test": 100, "warnings": [EVIL], "unreadable": [EVIL]},
        "resolved": {"steps_per_epoch": 40, "source": EVIL},
        "hardware": {"cpu": EVIL, "versions": {"torch": EVIL}},
    }  # fmt: skip
    (out / "config.json").write_text(json.dumps(config))
    (out / "winners.json").write_text(json.dumps(winners_of(out)))
    return out


def winners_of(run: Path) -> dict[str, Any]:
    structure = json.loads((run / "structure.json").read_text())
    layer = {"density": 0.4, "k": 8, "channels": 20, "pruned": 1, "never": 0.5, "rare": 0.05, "some": 0.2, "most": 0.05,
             "always": 0.2, "overlap": 0.81, "overlap_same": 0.92, "overlap_different": 0.8, "between_images": 0.125,
             "ranked_between_images": 0.25, "dead": 2, "constant": 3}  # fmt: skip
    return {"weights_sha256": structure["weights"]["sha256"], "when": EVIL, "images": 300, "split": EVIL, "data": EVIL,
            "choosing": 2, "mean": layer,
            "layers": {"<b onclick=x>$title": layer, "layer4.0.conv2": {**layer, "overlap_same": None}}}  # fmt: skip


class Reader(HTMLParser):
    """Which tags there are, whether they nest, and every attribute that could reach out or act."""

    VOID = ("meta", "br", "img", "wbr", "link", "input")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.ids: list[str] = []
        self.acting: list[str] = []
        self.text: list[str] = []
        self._open: list[str] = []
        self.feed(html)
        assert not self._open, f"left open: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in self.VOID:
            self._open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            reaching = name in ("src", "href", "xlink:href") and not (value or "").startswith("#")
            if name.startswith("on") or reaching:
                self.acting.append(f"{tag} {name}={value}")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_stands_alone_and_is_harmless(run: Path) -> None:
    path = write_report(run)
    assert path == run / "report.html"
    html = path.read_text(encoding="utf-8")
    page = Reader(html)
    assert page.acting == []
    assert not page.tags & {"script", "img", "link", "iframe", "object", "b>co", "image"}
    assert "http://" not in html.replace("http://evil.example", "")
    assert "https://" not in html
    assert "url(#" not in re.sub(r"url\(#[\w-]+\)", "", html)
    assert len(page.ids) == len(set(page.ids))
    assert EVIL in "".join(page.text)  # it is shown, as text


def test_says_what_a_reader_asks(run: Path) -> None:
    text = " ".join(Reader(write_report(run).read_text(encoding="utf-8")).text)
    for wanted in ("85.0 %", "90.0 %", "400 M", "of 2.00 G dense", "5.00\u00d7", "asked: 5x", "dynamic", "pruned",
                   "layer4.", "afds fit", "1,200", "seed", "cross-entropy", "blocks (hints)", "mean density d",
                   "predictor", "No accuracy was lost", "counted, not timed"):  # fmt: skip
        assert wanted in text, wanted


def test_what_is_taken_for_what(run: Path) -> None:
    page = write_report(run).read_text()
    assert "431 of 1,000" in page
    assert "29 of 9,000" in page
    val = final()["val"] | {"confusions": [[2, 0, 10**400]], "class_images": [10**400, 1, 2]}
    write_lines(run, [*epochs(), final(val=val, test=None)])
    assert "most often taken for" in write_report(run).read_text()
    for odd in (7, [[2, 0]], [[2, 0, "<b>"]], [[2, 99, 3], [-1, 0, 3]], [[True, 0, 1]], None):
        val = final()["val"] | {"confusions": odd, "class_images": odd}
        write_lines(run, [*epochs(), final(val=val, test=None)])
        assert "most often taken for" not in write_report(run).read_text()


@pytest.mark.parametrize(
    "missing",
    [["config.json"], ["structure.json"], ["labels.json"], ["metrics.jsonl"], ["config.json", "metrics.jsonl"],
     ["structure.json", "metrics.jsonl", "labels.json"]],
)  # fmt: skip
def test_missing_files(run: Path, missing: list[str]) -> None:
    for name in missing:
        (run / name).unlink()
    Reader(write_report(run).read_text(encoding="utf-8"))


def test_nothing_to_report(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="not a run folder"):
        write_report(tmp_path)
    with pytest.raises(RunFolderError, match="no such folder"):
        write_report(tmp_path / "nowhere")


GARBAGE = [None, "x", -1, 10**400, 1.5, [], [[]], {}, {"a": []}, True, EVIL, float("nan"), float("inf")]


@pytest.mark.parametrize("value", GARBAGE, ids=lambda v: repr(v)[:20])
def test_garbage_in_every_place(run: Path, value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each value of each file replaced by something else: there still is a page, and it is harmless."""
    if value != -1:  # laying a drawing out takes most of the time, and of garbage only numbers come so far
        monkeypatch.setattr(figures, "_svg", lambda draw, *_, **__: draw(Figure()) or "<svg></svg>")

    def spoil(node: Any) -> Any:
        return {k: (spoil(v) if isinstance(v, dict) else value) for k, v in node.items()}

    def shallow(node: dict[str, Any]) -> dict[str, Any]:
        return {k: (v if k == "kind" else value) for k, v in node.items()}

    lines = [*steps()[:3], *epochs()[:3], final()]
    for change in (spoil, shallow):
        for name in ("config.json", "structure.json", "winners.json"):
            (run / name).write_text(json.dumps(change(json.loads((run / name).read_text()))))
        write_lines(run, [{**change(line), "kind": line["kind"]} for line in lines])
        page = Reader(write_report(run).read_text(encoding="utf-8"))
        assert page.acting == []
    for layers in (value, {"conv1": value}):
        (run / "winners.json").write_text(json.dumps({"choosing": value, "mean": value, "layers": layers}))
        assert Reader(write_report(run).read_text(encoding="utf-8")).acting == []
    for name in ("config.json", "structure.json", "labels.json", "winners.json"):
        (run / name).write_text(json.dumps(value))
    Reader(write_report(run).read_text(encoding="utf-8"))


def test_garbled_lines(run: Path) -> None:
    with open(run / "metrics.jsonl", "ab") as file:
        file.write(b'\xff\xfe[1]\nnull\n{"kind": "final", "val"')
    text = " ".join(Reader(write_report(run).read_text(encoding="utf-8")).text)
    assert "85.0 %" in text


def test_a_dense_run(tmp_path: Path) -> None:
    write_run(tmp_path, selection=None)
    write_lines(tmp_path, [*epochs(), final(ratio=1.0, budget="1x")])
    text = " ".join(Reader(write_report(tmp_path).read_text(encoding="utf-8")).text)
    assert "Not worth it" not in text


def test_which_channels_win(run: Path) -> None:
    html = write_report(run).read_text(encoding="utf-8")
    text = " ".join(Reader(html).text)
    for wanted in ("Which channels win", "2 of 2 layers have a choice", "50 % win on none of these 300 images, 30 % on "
                   "some, 20 % on all", "share 81 % of their winners (92 % within a class, 80 % across classes)",
                   "40 % one at random", "12 % of the variance", "below 10 %", "across classes"):  # fmt: skip
        assert wanted in text, wanted
    assert "other weights" not in text
    (run / "winners.json").write_text(json.dumps({**winners_of(run), "weights_sha256": "0" * 64}))
    assert "of other weights than" in write_report(run).read_text(encoding="utf-8")
    (run / "winners.json").unlink()
    assert "Which channels win" not in write_report(run).read_text(encoding="utf-8")


def test_against_the_dense_network_it_began_with(run: Path, tmp_path: Path) -> None:
    config = json.loads((run / "config.json").read_text())
    config["data"]["fingerprint"] = "same photos"
    for out, top1, ratio in ((run, 0.85, 5.0), (run / "base", 0.95, 1.0)):
        out.mkdir(exist_ok=True)
        write_lines(out, [*epochs(), final(test={**final()["val"], "top1": top1}, ratio=ratio)])
        (out / "config.json").write_text(json.dumps(config))
    text = " ".join(Reader(write_report(run).read_text(encoding="utf-8")).text)
    assert "before selection 95.0 %" in text
    assert "Selection lost 10.0 points: 85.0 % on the test images, against 95.0 % of the dense network" in text
    config["data"]["fingerprint"] = "others"
    (run / "base" / "config.json").write_text(json.dumps(config))
    assert "95.0 %" not in " ".join(Reader(write_report(run).read_text(encoding="utf-8")).text)


def facts(*lines: dict[str, Any]) -> Facts:
    return Facts("run", {}, {"units": {"conv1": {}}}, [], list(lines))


def said(*lines: dict[str, Any]) -> str:
    return " ".join(f"[{kind}] {sentence}" for kind, sentence in verdict(facts(*lines)))


def test_a_difference_is_judged_on_the_same_images() -> None:
    """Ten images of 200 lost and none won: two independent sets of 200 could differ as much, the same one does not."""
    val = final()["val"]
    base = replace(facts(final(val={**val, "top1": 0.9, "images": 200}, val_hits="1" * 180 + "0" * 20, test=None)),
                   structure={})  # fmt: skip

    def of(hits: str) -> str:
        run = facts(final(val={**val, "top1": 0.85, "images": 200}, val_hits=hits, test=None))
        return " ".join(f"[{kind}] {sentence}" for kind, sentence in verdict(replace(run, base=base)))

    alike = of("1" * 170 + "0" * 30)
    assert "[bad] Selection lost 5.0 points" in alike
    assert "On the same images the 95 % interval is" in alike
    mixed = of("0" * 20 + "1" * 160 + "1" * 10 + "0" * 10)
    assert "[plain] 5.0 points were lost" in mixed
    few = of("1" * 175 + "0" * 25)  # 5 lost and none won: the interval leaves 0 out, the exact test does not agree
    assert "and McNemar's exact p is 0.06. So few images cannot tell" in few
    for damaged in ("", "1" * 170, "x" * 200):
        assert "[plain] 5.0 points were lost" in of(damaged)
        assert "\u00b1" in of(damaged)


def test_verdicts() -> None:
    val = final()["val"]
    assert "[good] No accuracy was lost" in said(*epochs(), final())
    worse = final(val={**val, "top1": 0.8})
    assert "[bad] Selection lost 10.0 points" in said(*epochs(), worse)
    few = final(val={**val, "top1": 0.8, "images": 20})
    assert "[plain] 10.0 points were lost" in said(*epochs(), few)
    assert "cannot tell that from chance" in said(*epochs(), few)
    assert "[bad] Not worth it" in said(final(ratio=0.9))
    assert "[bad] Not worth it" in said(final(ratio=1.05))
    assert "[bad] The budget of 5x was not met" in said(final(ratio=4.5))
    assert "Not worth it" not in said(final(ratio=1.0, budget="1x"))
    assert "no test split" in said(final(test=None))
    assert "has not ended" in said(*epochs())


def test_a_network_that_was_cheaper_already_is_called_by_its_ratio(run: Path) -> None:
    config = json.loads((run / "config.json").read_text())
    config["data"]["fingerprint"] = "same photos"
    for out, ratio in ((run, 5.0), (run / "base", 3.0)):
        out.mkdir(exist_ok=True)
        write_lines(out, [*epochs(), final(ratio=ratio)])
        (out / "config.json").write_text(json.dumps(config))
    html = write_report(run).read_text(encoding="utf-8")
    text = " ".join(Reader(html).text)
    for wanted in ("of the network at 3.00x that it began with", "at 3.00x 85.0 %", "Dotted: the 3.00x network"):
        assert wanted in text, wanted
    assert ">3.00x</text>" in html  # beside the dotted line


def test_time_and_test_split_are_told_of_as_they_are() -> None:
    plain = Facts("run", {"config": {"read_test": False}}, {}, [], [*epochs(), final(test=None)])
    told = " ".join(sentence for _, sentence in verdict(plain))
    assert "It is a plain network, so time falls in every runtime" in told
    assert "The test split was not read" in told


def test_the_terms_of_the_loss_make_up_its_sum(run: Path) -> None:
    """A settled run weighs hints by `recovery`; what has no curve of its own is the rest."""
    lines = [line | {"train_loss": line["train_ce"] + 0.09 + line["train_kd"] + 5.0 + 2.0} for line in epochs()]
    config = {"config": {"method": "afds", "budget": "5x", "descent": {"settle": True}, "recovery": {"hints": 10.0},
                         "distillation": {"afd": 0.01, "logits": 1.0, "hints": 1.0}}}  # fmt: skip
    drawn: dict[str, list[float]] = {}
    usual = Axes.plot

    def plot(self: Axes, x: Any, y: Any, **more: Any) -> Any:
        drawn[more["label"]] = list(y)
        return usual(self, x, y, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Axes, "plot", plot)
        figures.loss_figure(Facts("run", config, {}, [], lines))
    assert drawn["blocks (hints)"] == pytest.approx([5.0] * 8)
    assert drawn["other terms"] == pytest.approx([2.0] * 8)
