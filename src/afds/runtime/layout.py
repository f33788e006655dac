"""Where the features of a program lie in memory.

::

    plane of one channel:  |-- lead --|row 0|0|row 1|0| ... |row H-1|0|-- tail --|        pitch = W + padding

A tap of a convolution is the same flat run of pixels at an offset, across the ends of rows, because the zeros
between rows are the padding of both their neighbours. Features that ops read and write at the same flat positions
(convolutions of stride 1, sums) share one pitch; the widest padding among them decides it.

Features live in buffers; a buffer is used again once its feature is dead, only by features of the same layout, so
that the zeros around the rows are written once, at the start.

For products in bf16 a feature is kept as pairs of channels where such a product reads it or adds it to its sums, and
in float32 where anything else reads it: so the residual stream is bf16 too, a third of the bytes of having both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from afds.runtime.errors import UnsupportedError
from afds.runtime.lower import Program
from afds.runtime.plan import ACTS, Plan

LINE = 16  # floats in a cache line
PAIRS = ("none", "free", "numbers")  # the later ones are stricter


@dataclass
class _Class:
    """Features of one pitch."""

    height: int
    width: int
    pitch: int
    lead: int = 0
    reach: int = 0  # flat pixels that are read behind the last one

    def layout(self) -> tuple[int, int, int, int, int]:
        pixels = _up((self.height - 1) * self.pitch + self.width)
        lead = _up(self.lead)
        plane = lead + _up(max(pixels + self.reach, self.height * self.pitch))
        if plane // LINE % 2 == 0:  # an even number of lines a plane maps many channels to the same sets of a cache
            plane += LINE
        return self.height, self.width, self.pitch, lead, plane


def _up(n: int) -> int:
    return (n + LINE - 1) // LINE * LINE


def place(program: Program, precision: str = "float32") -> Plan:
    """A plan: the program with a buffer for each feature."""
    features = program.features
    classes, of = _classes(program)
    shared, last = _liveness(program)
    root = list(range(len(features)))  # the first feature of those that share a buffer in place
    for y, x in shared.items():
        root[y] = root[x]
    end = [last[i] for i in range(len(features))]
    for y in sorted(shared):
        end[root[y]] = max(end[root[y]], last[y])
    width = [0] * len(features)
    pooled = [False] * len(features)
    for i, feature in enumerate(features):
        width[root[i]] = max(width[root[i]], feature.channels)
        pooled[root[i]] |= feature.pooled

    plan = Plan(features[program.input].channels, features[program.input].height, features[program.input].width,
                program.classes, program.input, precision)  # fmt: skip
    layouts = [classes[of[i]].layout() for i in range(len(features))]
    buffer = [-1] * len(features)
    owners: list[tuple[tuple[int, ...], int]] = []  # layout and last op of each buffer so far
    for i in sorted({*root}, key=lambda i: features[i].maker if i != program.input else -1):
        born = features[i].maker if i != program.input else -1
        free = [b for b, (layout, until) in enumerate(owners) if layout == layouts[i] and until < born]
        fit = min(free, key=lambda b: abs(plan.buffers[b]["channels"] - width[i]), default=None)
        if fit is None:
            keys = ("height", "width", "pitch", "lead", "plane")
            plan.buffers.append(dict(zip(keys, layouts[i], strict=True)) | {"channels": 0})
            owners.append((layouts[i], 0))
            fit = len(plan.buffers) - 1
        plan.buffers[fit]["channels"] = max(plan.buffers[fit]["channels"], width[i])
        owners[fit] = (layouts[i], end[i])
        buffer[i] = fit
    floats, pairs = _forms(program, shared)
    for i, feature in enumerate(features):
        plan.values.append({"buffer": buffer[root[i]], "channels": feature.channels, "pooled": pooled[root[i]],
                            "floats": floats[i], "pairs": pairs[i]})  # fmt: skip
    for op in program.ops:
        plan.ops.append({k: ACTS.index(v) if k in ("act", "gate") else v for k, v in op.items()})
    plan.tensors = program.tensors
    return plan


def _reads(op: dict[str, Any]) -> list[int]:
    return [op[k] for k in ("x", "a", "b", "residual") if op.get(k, -1) >= 0]


def _liveness(program: Program) -> tuple[dict[int, int], list[int]]:
    """For each feature the last op that reads it, and the features that take over another's buffer in place."""
    last = [feature.maker for feature in program.features]
    for i, op in enumerate(program.ops):
        for value in _reads(op):
            last[value] = max(last[value], i)
    shared: dict[int, int] = {}
    for i, op in enumerate(program.ops):
        if op["kind"] == "conv" and op["residual"] >= 0:
            x = op["residual"]
        elif op["kind"] == "se":
            x = op["x"]
        elif op["kind"] == "add":
            x = op["a"]
        else:
            continue
        free = last[x] == i and x != program.input and (op["kind"] != "conv" or op["x"] != x)
        if free:
            shared[op["y"]] = x
        elif op["kind"] == "se":
            raise UnsupportedError(f"The native runtime does not compute {op['name']}: a squeeze-excitation of "
                                   "features that are read again.")  # fmt: skip
    return shared, last


def _same(program: Program, op: dict[str, Any]) -> bool:
    x, y = program.features[op["x"]], program.features[op["y"]]
    return op["stride"] == 1 and (x.height, x.width) == (y.height, y.width)


def _forms(program: Program, shared: dict[int, int]) -> tuple[list[bool], list[str]]:
    """Of each feature whether it is kept in float32, and how its channels form bf16 pairs.

    Pairs of the active channels, whichever they are (`free`), are for what one convolution alone writes; groups, and
    memory that several ops write in turn, need pairs of fixed channel numbers. The largest of a window is found in
    pairs where nothing is negative and only convolutions read it.
    """
    floats, pairs = [False] * len(program.features), ["none"] * len(program.features)
    pools = [op for op in program.ops if op["kind"] == "pool" and op["max"] and op["nonnegative"]]
    for op in program.ops:
        if op["kind"] == "linear" or op in pools:
            continue
        if op["kind"] != "conv":
            for value in (*_reads(op), op["y"]):
                floats[value] = True
            continue
        if op["residual"] >= 0:
            for value in (op["residual"], op["y"]):
                if "halves" in op:
                    pairs[value] = "numbers"
                else:
                    floats[value] = True
        if "halves" in op:
            pairs[op["x"]] = max(pairs[op["x"]], "free" if op["groups"] == 1 else "numbers", key=PAIRS.index)
        else:
            floats[op["x"]] = True
    for op in reversed(pools):
        if floats[op["y"]] or pairs[op["y"]] == "none" or op["x"] == program.input:
            floats[op["x"]] = floats[op["y"]] = True
        else:
            pairs[op["x"]] = "numbers"
    for op in reversed(program.ops):
        if op["kind"] == "linear" or pairs[op["y"]] == "none" or (op["kind"] == "conv" and op["residual"] < 0):
            continue
        pairs[op["y"]] = "numbers"
        if op["y"] in shared:  # what a channel was before is not always written again
            pairs[shared[op["y"]]] = "numbers"
    if pairs[program.input] != "none":
        pairs[program.input] = "numbers"
    return [f or p == "none" for f, p in zip(floats, pairs, strict=True)], pairs


def _classes(program: Program) -> tuple[dict[int, _Class], list[int]]:
    """The classes of features with one pitch, and the class of each feature."""
    features = program.features
    parent = list(range(len(features)))

    def find(i: int) -> int:
        while parent[i] != i:
            i = parent[i]
        return i

    for op in program.ops:
        tied = []
        if op["kind"] == "conv":
            tied = ([op["x"]] if _same(program, op) else []) + ([op["residual"]] if op["residual"] >= 0 else [])
        elif op["kind"] in ("add", "se"):
            tied = _reads(op)
        for value in tied:
            parent[find(value)] = find(op["y"])
    of = [find(i) for i in range(len(features))]
    classes = {c: _Class(features[c].height, features[c].width, features[c].width) for c in set(of)}
    for op in program.ops:  # as in Engine::add_conv, which checks it
        if op["kind"] == "conv":
            x, y, s = features[op["x"]], features[op["y"]], op["stride"]
            right = max(0, ((op["kernel_w"] - 1) * op["dilation"] - op["pad_w"]) // s)
            left = -(-op["pad_w"] // s)
            columns = min(-(-x.width // s), y.width + right)
            own = classes[of[op["y"]]]
            own.pitch = max(own.pitch, y.width + right, columns + left)
    for op in program.ops:
        if op["kind"] == "conv" and _same(program, op):
            own = classes[of[op["y"]]]
            down = (op["kernel_h"] - 1) * op["dilation"] - op["pad_h"]
            right = (op["kernel_w"] - 1) * op["dilation"] - op["pad_w"]
            own.lead = max(own.lead, op["pad_h"] * own.pitch + op["pad_w"])
            own.reach = max(own.reach, down * own.pitch + right)
    return classes, of
