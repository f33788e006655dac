"""Exact MACs of a network on real images: what is skipped on both sides counts on both sides.

::

    conv        k^2 * in_active * out_active * H_out * W_out      (per group, where it has groups)
    predictor   in_active * C_dyn + C_dyn                         C_dyn: channels whose saliency is predicted
                in_active * r + r * C_dyn + C_dyn                 low-rank
    scaling     out_active_dynamic * H_out * W_out                static scales fold into the weights
    residual    active = union of the branches' active sets, per image
    classifier  in_active * classes

A MAC is one multiply-accumulate; FLOP counters report twice as many. Adding, pooling, activations and batch norm
(folded at run time) count nothing, as is the field's custom. The predictor is never left out.

The count runs the network: an ``fx.Interpreter`` carries, beside every feature map, the set of its channels that
are not suppressed, one row per image. FBS's code counts the same way (Gao et al., ICLR 2019); that static
channels cost neither predictor nor scaling is ours: both fold into constants.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from afds.errors import SourceError
from afds.graph import ADDS, MULS, full_shape, is_sigmoid, passes_channels, trace
from afds.selection import Gate, SelectiveConvBN, selective_units


@dataclass
class LayerCost:
    """Mean MACs per image of one layer, and what it could cost at most."""

    dense: float = 0.0
    conv: float = 0.0
    predictor: float = 0.0
    scaling: float = 0.0
    active_in: float = 0.0  # mean number of channels that arrive
    active_out: float = 0.0
    channels_in: int = 0
    channels_out: int = 0

    @property
    def counted(self) -> float:
        return self.conv + self.predictor + self.scaling


@dataclass
class Cost:
    """MACs per image, averaged over the images seen: dense, counted and their ratio."""

    layers: dict[str, LayerCost] = field(default_factory=dict)
    images: int = 0
    reference: float = 0.0
    """MACs of the whole network, where what is counted is another one: cut, smaller, or on smaller images."""

    @property
    def dense(self) -> float:
        """MACs of the network before anything was saved: without selection, before compaction or pruning."""
        return self.reference or sum(layer.dense for layer in self.layers.values())

    @property
    def counted(self) -> float:
        return sum(layer.counted for layer in self.layers.values())

    @property
    def ratio(self) -> float:
        """How many times fewer MACs than dense."""
        return self.dense / self.counted

    def add(self, other: Cost) -> None:
        """Average another count of the same network in, weighted by its images."""
        total = self.images + other.images
        self.reference = self.reference or other.reference
        for name, theirs in other.layers.items():
            ours = self.layers.setdefault(name, LayerCost(channels_in=theirs.channels_in,
                                                          channels_out=theirs.channels_out))  # fmt: skip
            for key in ("dense", "conv", "predictor", "scaling", "active_in", "active_out"):
                mean = (getattr(ours, key) * self.images + getattr(theirs, key) * other.images) / total
                setattr(ours, key, mean)
        self.images = total


class CostMeter:
    """Runs a network and counts what it costs; the logits come out as from the network itself.

    Args:
        model: a plain or a selective network, in eval mode.
        reference: MACs of the network that it is compared with; 0: itself, dense.
    Raises:
        SourceError: the network holds an operation whose active channels are not known.
    """

    def __init__(self, model: nn.Module, reference: float = 0.0) -> None:
        self.model = model
        self.reference = reference
        with _eval(model):
            self._gm = trace(model)

    @torch.no_grad()
    def __call__(self, x_BCHW: Tensor) -> tuple[Tensor, Cost]:
        """Logits (B, classes), and the cost of this batch. Always in eval mode, whatever the model's mode."""
        with _eval(self.model):
            interpreter = _Counter(self._gm)
            logits = interpreter.run(x_BCHW)
        cost = interpreter.cost
        cost.images, cost.reference = x_BCHW.shape[0], self.reference
        return logits, cost

    def mean(self, batches: Iterable[Tensor]) -> Cost:
        """Mean cost over batches of images (B, 3, H, W)."""
        total = Cost()
        for x_BCHW in batches:
            total.add(self(x_BCHW)[1])
        return total


def measure_cost(model: nn.Module, batches: Iterable[Tensor]) -> Cost:
    """Mean cost of ``model`` over batches of images (B, 3, H, W)."""
    return CostMeter(model).mean(batches)


def reference_macs(structure: Mapping[str, Any]) -> float:
    """Of a run's structure.json: MACs of the dense network that it is compared with; 0: itself, dense."""
    given = structure["cost"].get("reference_macs", 0.0)
    return float(given) if type(given) in (int, float) and 0 < given < 1e18 else 0.0


@contextmanager
def _eval(model: nn.Module):  # type: ignore[no-untyped-def]
    """Eval mode, module by module as it was afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


class _Counter(fx.Interpreter):
    """Evaluates the graph and carries ``active[node]``: (B, C) bool."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm, garbage_collect_values=True)
        self.extra_traceback = False  # it would print the graph's node into messages meant for people
        self.gm = gm
        self.cost = Cost()
        self.active: dict[fx.Node, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "call_module":
            module = self.gm.get_submodule(str(n.target))
            args, _ = self.fetch_args_kwargs_from_env(n)
            if isinstance(module, SelectiveConvBN):
                out = module(*args)
                self.active[n] = self._unit(n, module, out)
                return out
        out = super().run_node(n)
        if n.op == "output" or not isinstance(out, Tensor):
            return out
        if n.op == "placeholder":
            self.active[n] = torch.ones(out.shape[:2], dtype=torch.bool, device=out.device)
        elif n.op == "get_attr":
            pass
        elif n.op == "call_module" and isinstance(module, nn.Conv2d):
            self.active[n] = torch.ones(out.shape[:2], dtype=torch.bool, device=out.device)
            self._conv(str(n.target), module, self._input(n), self.active[n], out)
        elif n.op == "call_module" and isinstance(module, nn.Linear):
            self.active[n] = torch.ones(out.shape, dtype=torch.bool, device=out.device)
            self._linear(str(n.target), module, self._input(n), out)
        elif n.op == "call_module" and isinstance(module, nn.BatchNorm2d):
            self.active[n] = torch.ones_like(self._input(n))  # a plain network: its norm is dense
        elif n.op == "call_module" and type(module).__name__ == "ConvMlp":
            self._conv_mlp(n, module, args[0], out)
        else:
            self.active[n] = self._flow(n, out)
        return out

    def _input(self, n: fx.Node) -> Tensor:
        return self.active[n.all_input_nodes[0]]

    def _flow(self, n: fx.Node, out: Tensor) -> Tensor:
        """Active channels of a node that computes no products."""
        sets = [self.active[i] for i in n.all_input_nodes if i in self.active]
        if n.op == "call_function" and n.target in ADDS and len(sets) == 2:
            return sets[0] | sets[1]
        if n.op == "call_function" and n.target in MULS and len(sets) == 2:
            return sets[0] & sets[1]
        if n.op == "call_function" and n.target is torch.cat and out.dim() == 4:
            raise SourceError(f"{n.name}: features are joined by concatenation (torch.cat), where channels could be "
                              "selected but not cut, so that nothing would be saved.")  # fmt: skip
        if passes_channels(self.gm, n) and sets:
            if out.shape[1] == sets[0].shape[1]:
                return sets[0]
            if out.dim() == 2 and out.shape[1] % sets[0].shape[1] == 0:  # flatten with H W > 1
                return sets[0].repeat_interleave(out.shape[1] // sets[0].shape[1], 1)
        if is_sigmoid(self.gm, n) and sets:
            return torch.ones(out.shape[:2], dtype=torch.bool, device=out.device)  # an SE gate: never zero
        where = n.target if isinstance(n.target, str) else getattr(n.target, "__name__", str(n.target))
        kind = type(self.gm.get_submodule(where)).__name__ if n.op == "call_module" else "function"
        raise SourceError(f"{where} ({kind}): which channels are active after it is not known, so its network "
                          "cannot be counted. Supported are conv, batch norm, activations that map 0 to 0, pooling, "
                          "sums, products and linear layers.")  # fmt: skip

    def _unit(self, n: fx.Node, unit: SelectiveConvBN, out: Tensor) -> Tensor:
        name, gate = str(n.target), unit.gate
        into_BC, active_BC = self._input(n), gate.active_BC
        assert active_BC is not None
        self._conv(name, unit.conv, into_BC, active_BC, out)
        if isinstance(gate, Gate):
            layer, area = self.cost.layers[name], out.shape[2] * out.shape[3]
            predicted = int((gate.dynamic & gate.kept).sum())
            if predicted:
                arriving = float(into_BC.sum(1).float().mean())
                rank = gate.predictor.rank
                product = arriving * rank + rank * predicted if rank else arriving * predicted
                layer.predictor = product + predicted
                layer.scaling = float((active_BC & gate.dynamic).sum(1).float().mean()) * area
        return active_BC

    def _conv(self, name: str, conv: nn.Conv2d, into_BC: Tensor, active_BC: Tensor, out: Tensor) -> None:
        taps = conv.kernel_size[0] * conv.kernel_size[1] * out.shape[2] * out.shape[3]
        b, g = into_BC.shape[0], conv.groups
        per_group_in = into_BC.view(b, g, -1).sum(2).double()
        per_group_out = active_BC.view(b, g, -1).sum(2).double()
        full_in, full_out, full_groups = full_shape(conv)
        self._add(name, into_BC, active_BC, full_shape(conv),
                  dense=taps * full_in * full_out // full_groups,
                  conv=taps * float((per_group_in * per_group_out).sum(1).mean()))  # fmt: skip

    def _linear(self, name: str, linear: nn.Linear, into_BC: Tensor, out: Tensor) -> None:
        if into_BC.shape[1] != linear.in_features:
            into_BC = torch.ones(into_BC.shape[0], linear.in_features, dtype=torch.bool, device=out.device)
        full = full_shape(linear)
        self._add(name, into_BC, torch.ones(out.shape[:2], device=out.device), full, dense=full[0] * full[1],
                  conv=float(into_BC.sum(1).double().mean()) * linear.out_features)  # fmt: skip

    def _add(
        self, name: str, into_BC: Tensor, active_BC: Tensor, full: tuple[int, int, int], *, dense: float, conv: float
    ) -> None:
        if name in self.cost.layers:
            raise SourceError(f"{name} runs twice in one forward; its cost cannot be told by layer.")
        self.cost.layers[name] = LayerCost(
            dense=float(dense), conv=conv,
            active_in=float(into_BC.sum(1).double().mean()), active_out=float(active_BC.sum(1).double().mean()),
            channels_in=full[0], channels_out=full[1],
        )  # fmt: skip

    def _conv_mlp(self, n: fx.Node, module: nn.Module, x: Tensor, out: Tensor) -> None:
        """timm's VGG head: two convolutions as fully connected layers, which cannot be traced. Never gated."""
        into_BC = self._input(n)
        hidden = torch.ones(out.shape[0], module.fc1.out_channels, dtype=torch.bool, device=out.device)  # type: ignore
        side = [max(1, s - k + 1) for s, k in zip(x.shape[2:], module.fc1.kernel_size, strict=True)]  # type: ignore
        map1 = out.new_empty(out.shape[0], hidden.shape[1], *side)
        self._conv(f"{n.target}.fc1", module.fc1, into_BC, hidden, map1)  # type: ignore[arg-type]
        self.active[n] = torch.ones(out.shape[:2], dtype=torch.bool, device=out.device)
        self._conv(f"{n.target}.fc2", module.fc2, hidden, self.active[n], map1)  # type: ignore[arg-type]


def has_selection(model: nn.Module) -> bool:
    return any(True for _ in selective_units(model))
