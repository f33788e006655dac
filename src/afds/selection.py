"""AFS, attentive feature selection: per image, the few channels worth computing in each layer.

::

    x_{l-1} --+--> conv --> norm --------------------> * pi + beta*[pi>0] --> x_l (before the ReLU)
              |                                          ^
              +--> GAP --> predictor --> h --> q --> wta-+        one SelectiveConvBN

    h  = relu( GAP(x_{l-1}) W + b )          saliency, one number per image and output channel
    q  = s h + (1 - s) gamma                 s: dynamic (1) or static (0), per channel
    pi = m wta_{ceil(d C)}(q)                m: kept (1) or pruned for good (0); wta keeps the k largest
    x  = norm(conv(x_{l-1})) pi + beta [pi > 0]

``norm`` is batch norm without its affine part: pi takes gamma's place, and beta is masked, so that a suppressed
channel is exactly zero and the next convolution can skip it. The choice of winners carries no gradient.

Wang et al., ICLR 2020 (the method); Gao et al., *Dynamic Channel Pruning: Feature Boosting and Suppression*,
ICLR 2019 (predictor, winner-take-all). Ours, each with its reason:

* Start: W = 0, b = abs(gamma), gamma's sign kept on the scale: the network's function is unchanged at d = 1.
* The pooled input is standardised per channel and divided by sqrt(C_in) (``standardise``). It stays an affine
  function of GAP(x), so cost and equations are the paper's; but raw pooled features are all positive with a
  norm of several units, which makes the predictor's effective learning rate tens of times that of a gamma.
* Winners are ranked by q times a constant per channel, its ``importance`` (1 where the paper's rule is asked
  for): gamma alone does not say what a channel contributes after its batch norm and bias.
* m is applied before winner-take-all: a pruned channel must not win a place and leave it empty.
* Saliencies are capped at ten times the largest gamma of the start (``bounded``): batch norm makes the next layer
  blind to their scale, so nothing else holds it, and public ports are known to blow up to NaN.
"""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from afds.errors import ConfigError
from afds.graph import ConvBN, convbn_units, full_shape


@dataclass(frozen=True)
class SelectionConfig:
    """How selection is built into a network."""

    predictor: Literal["full", "low-rank"] = "full"
    """`full`: one C_in x C_out matrix a layer, as in the paper. `low-rank`: C_in -> r -> C_out, fewer weights to
    read at batch 1."""
    rank_divisor: int = 8
    """Low-rank predictor: r = ceil(C_out / rank_divisor), C_out being the channels that settling leaves."""
    standardise: bool = True
    """Standardise the pooled input of the predictor. False is the paper's raw pooling."""
    importance: bool = True
    """Rank winners by saliency times a per-channel importance. False ranks by saliency alone, the paper's rule."""
    bounded: bool = True
    """Cap saliencies at ten times the largest of the start, so that they stay finite."""
    group: int = 1
    """Where each image chooses (--descent.no-settle): so many neighbouring channels win or lose together, by the sum
    of their rank values (ours). 8 is faster in bf16 and in exported files, and dearer in accuracy."""

    def __post_init__(self) -> None:
        for option, value in (("rank-divisor", self.rank_divisor), ("group", self.group)):
            if value < 1:
                raise ConfigError(f"selection.{option} must be at least 1, got {value}.")


def winners(density: float, channels: int) -> int:
    """k = ceil(d C), exact where d C is an integer up to rounding (0.07 * 100 is 7, not 8)."""
    return max(1, min(channels, math.ceil(density * channels - 1e-6)))


def winner_take_all(score_BC: Tensor, k: int, group: int = 1) -> Tensor:
    """Boolean mask of the k largest scores of each row; a score of zero or less never wins.

    group: so many neighbours win together, those whose scores have the largest sum; k and C are multiples of it.
    """
    positive_BC = score_BC > 0
    if k >= score_BC.shape[1]:
        return positive_BC
    if group > 1:
        sum_BG = score_BC.clamp_min(0).unflatten(1, (-1, group)).sum(2)
        return winner_take_all(sum_BG, k // group).repeat_interleave(group, 1) & positive_BC
    index_Bk = score_BC.topk(k, dim=1, sorted=False).indices
    return torch.zeros_like(positive_BC).scatter(1, index_Bk, True) & positive_BC


# A channel that is active on no training image has a pooled variance of 0. With batch norm's usual 1e-5 the first
# image on which it wakes is 316 standard deviations out, saliencies jump to their cap, and so on in every layer after
# (seen: logits of 1e14 on one validation image in 303). Variances of live channels are 0.01 to 0.6.
POOLED_EPS = 1e-2
HEADROOM = 10.0  # ceiling of a saliency, as a multiple of the largest gamma at the start


class Predictor(nn.Module):
    """h = relu(GAP(x) W + b), capped, with the pooled input standardised if asked."""

    def __init__(self, in_channels: int, start_C: Tensor, config: SelectionConfig, full_channels: int = 0) -> None:
        super().__init__()
        out_channels = start_C.numel()
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.standardise = nn.BatchNorm1d(in_channels, eps=POOLED_EPS, affine=False) if config.standardise else None
        self.rank, self.rank_divisor = 0, config.rank_divisor
        self.reduce: nn.Linear | None = None
        if config.predictor == "low-rank":
            self.rank = self.rank_for(full_channels or out_channels)
            self.reduce = nn.Linear(in_channels, self.rank, bias=False)
        self.first_rank = self.rank  # as `select` makes it
        self.weight = nn.Parameter(torch.zeros(out_channels, self.rank or in_channels))
        self.bias = nn.Parameter(start_C.clone())
        ceiling = (
            HEADROOM * start_C.max().clamp_min(0.1) if config.bounded else torch.tensor(torch.finfo(torch.float32).max)
        )
        self.register_buffer("ceiling", ceiling.to(start_C))
        self.ceiling: Tensor

    def forward(self, x_BCHW: Tensor) -> Tensor:
        with torch.autocast(x_BCHW.device.type, enabled=False):  # saliencies are float32 in any precision
            p_BC = x_BCHW.to(self.weight.dtype).mean((2, 3))
            if self.standardise is not None:
                if self.training and p_BC.shape[0] == 1:  # one image has no spread: use the running statistics
                    n = self.standardise
                    p_BC = F.batch_norm(p_BC, n.running_mean, n.running_var, training=False, eps=n.eps)
                else:
                    p_BC = self.standardise(p_BC)
                p_BC = p_BC * p_BC.shape[1] ** -0.5
            if self.reduce is not None:
                p_BC = self.reduce(p_BC)
            h_BC = F.relu(F.linear(p_BC, self.weight, self.bias))
            return torch.minimum(h_BC, self.ceiling)

    def rank_for(self, channels: int) -> int:
        """r of a predictor for so many outputs."""
        return math.ceil(channels / self.rank_divisor)

    @property
    def weights(self) -> int:
        """How many it has to read for each image."""
        return self.weight.numel() + (0 if self.reduce is None else self.reduce.weight.numel())

    @property
    def has_learned(self) -> bool:
        """Whether it says anything of the image: at the start W = 0."""
        return bool(self.weight.any())

    @torch.no_grad()
    def cut_to_rank(self) -> None:
        """Keep the first `rank` of the inner numbers, in place. The function stays only where W = 0 in the others."""
        if self.reduce is None or self.reduce.out_features == self.rank:
            return
        for holder in (self, self.reduce):
            learns = holder.weight.requires_grad
            cut = holder.weight[:, : self.rank] if holder is self else holder.weight[: self.rank]
            holder.weight = nn.Parameter(cut.clone(), requires_grad=learns)
        self.reduce.out_features = self.rank


class _Latest(threading.local):
    """What a gate chose last, in each thread its own: two threads may run one network at once."""

    active_BC: Tensor | None = None  # noqa: N815

    def __reduce__(self) -> tuple[type[_Latest], tuple[()]]:
        return type(self), ()  # a copy has run nothing yet


class Gate(nn.Module):
    """pi of one unit: (B, C_in, H, W) -> (B, C_out), at the current density."""

    def __init__(
        self,
        in_channels: int,
        gamma_C: Tensor,
        beta_C: Tensor,
        config: SelectionConfig,
        *,
        leads: bool = False,
        full_channels: int = 0,
    ) -> None:
        super().__init__()
        # A zero saliency is never active, so a channel that lives by its bias alone keeps a saliency of 1e-6. So
        # does a dead one that leads a depthwise convolution, which makes a constant, not zero, of it.
        # So does a unit that is 0 in all its channels, as timm's residual branches are before they learn.
        asleep = not bool(gamma_C.any() or beta_C.any())
        start_C = gamma_C.abs().clamp_min(1e-6) * ((gamma_C != 0) | (beta_C != 0) | leads | asleep)
        channels = gamma_C.numel()
        self.predictor = Predictor(in_channels, start_C, config, full_channels)
        self.gamma = nn.Parameter(start_C.clone())
        self.density = 1.0
        self.group = config.group
        self.register_buffer("sign", torch.where(gamma_C < 0, -1.0, 1.0))
        self.register_buffer("dynamic", torch.ones(channels, dtype=torch.bool))
        self.register_buffer("kept", torch.ones(channels, dtype=torch.bool))
        self.register_buffer("importance", torch.ones(channels))
        self.sign: Tensor
        self.dynamic: Tensor
        self.kept: Tensor
        self.importance: Tensor
        self.register_buffer("predicted", None)  # after compaction: the channels that have a row in the predictor
        self.predicted: Tensor | None
        self.latest = _Latest()

    @property
    def k(self) -> int:
        """Winners per image: ceil(d G) groups of them."""
        channels = self.sign.numel()
        return min(channels, self.group * winners(self.density, math.ceil(channels / self.group)))

    @property
    def active_BC(self) -> Tensor | None:  # noqa: N802
        """(B, C_out) bool: the winners of this thread's latest forward."""
        return self.latest.active_BC

    def saliency(self, x_BCHW: Tensor) -> Tensor:
        """q: (B, C_out), not negative, before winner-take-all."""
        if self.predicted is None:
            q_BC = torch.where(self.dynamic, self.predictor(x_BCHW), F.relu(self.gamma))
        else:
            q_BC = F.relu(self.gamma).expand(x_BCHW.shape[0], -1)
            if self.predictor.out_channels:
                h_BC = q_BC.index_copy(1, self.predicted.nonzero().flatten(), self.predictor(x_BCHW))
                q_BC = torch.where(self.dynamic, h_BC, q_BC)
        return q_BC * self.kept

    def forget_static_rows(self) -> None:
        """Cut the predictor's rows of the channels that are static or pruned: they stay so from now on."""
        before = torch.ones_like(self.dynamic) if self.predicted is None else self.predicted
        stay = self.dynamic & self.kept & before
        if bool(stay.all()):
            return
        rows = stay[before].nonzero().flatten()
        p = self.predictor
        p.weight = nn.Parameter(p.weight.detach()[rows], requires_grad=p.weight.requires_grad)
        p.bias = nn.Parameter(p.bias.detach()[rows], requires_grad=p.bias.requires_grad)
        p.out_channels = len(rows)
        self.predicted = stay
        self.dynamic &= stay

    def resize_rank(self, rank: int) -> None:
        """A low-rank predictor of so few inner numbers: to be loaded into."""
        self.predictor.rank = rank
        self.predictor.cut_to_rank()

    def resize_rows(self, rows: int) -> None:
        """Room for a predictor with so many rows, its contents undefined: to be loaded into."""
        p = self.predictor
        p.weight = nn.Parameter(p.weight.detach().new_empty(rows, p.weight.shape[1]))
        p.bias = nn.Parameter(p.bias.detach().new_empty(rows))
        p.out_channels = rows
        self.predicted = torch.zeros_like(self.dynamic)

    def keep_only(self, index: Tensor) -> None:
        """Prune all channels but these. A low-rank predictor that has not learned counts with the rank for so many.

        Its surplus goes where channels are cut away (`Predictor.cut_to_rank`).
        """
        self.kept.fill_(False)
        self.kept[index.to(self.kept.device)] = True
        if self.predictor.reduce is not None and not self.predictor.has_learned:
            self.predictor.rank = min(self.predictor.rank_for(len(index)), self.predictor.reduce.out_features)

    def reset_masks(self) -> None:
        """A new task chooses anew, among the channels that are still there."""
        if self.predicted is None:
            self.kept.fill_(True)
            self.dynamic.fill_(True)
        else:
            self.dynamic.copy_(self.predicted)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        q_BC = self.saliency(x_BCHW)
        with torch.no_grad():
            active_BC = self.latest.active_BC = winner_take_all(q_BC.detach() * self.importance, self.k, self.group)
        return q_BC * active_BC * self.sign


class FollowingGate(nn.Module):
    """The gate of a depthwise convolution: exactly the channels that arrive are active.

    Selecting a channel of a depthwise convolution selects it on both sides. A channel that does not arrive would
    leave the norm as a constant, not as zero, so the choice cannot be read off the input and is taken from the
    units that made it (their union, where a residual sum arrives). Ours: the paper has no depthwise network.
    """

    def __init__(self, gamma_C: Tensor, leaders: Sequence[Gate | FollowingGate]) -> None:
        super().__init__()
        self.gamma = nn.Parameter(gamma_C.clone())
        self.leaders = tuple(leaders)  # a tuple: they are not this module's children
        self.latest = _Latest()

    def forward(self, x_BCHW: Tensor) -> Tensor:
        active_BC = self.leaders[0].active_BC
        assert active_BC is not None, "a depthwise unit ran before the units it follows"
        for leader in self.leaders[1:]:
            assert leader.active_BC is not None
            active_BC = active_BC | leader.active_BC
        self.latest.active_BC = active_BC
        return self.gamma * active_BC

    @property
    def active_BC(self) -> Tensor | None:  # noqa: N802
        """(B, C) bool: the channels of this thread's latest forward."""
        return self.latest.active_BC


class SelectiveConvBN(nn.Module):
    """A convolution and its batch norm with a gate: stands where the convolution stood."""

    is_selective_unit = True

    def __init__(self, conv: nn.Conv2d, norm: nn.BatchNorm2d, gate: Gate | FollowingGate, path: str = "") -> None:
        super().__init__()
        self.plain = (path, norm)  # where the norm stood and what it was; in a tuple, so not a child
        self.conv = conv
        self.gate = gate
        self.norm = nn.BatchNorm2d(norm.num_features, norm.eps, norm.momentum, affine=False)
        self.norm.load_state_dict({k: v.clone() for k, v in norm.state_dict().items() if k not in ("weight", "bias")})
        self.norm.to(norm.weight)
        self.gate.to(norm.weight)
        self.beta = nn.Parameter(norm.bias.detach().clone())

    def forward(self, x_BCHW: Tensor) -> Tensor:
        pi_BC = self.gate(x_BCHW)
        y_BCHW = self.norm(self.conv(x_BCHW))
        assert self.gate.active_BC is not None
        shift_BC = self.beta * self.gate.active_BC  # not [pi != 0]: a following unit may have gamma = 0
        scale_BC = pi_BC.to(y_BCHW.dtype)
        return torch.addcmul(shift_BC.to(y_BCHW.dtype)[:, :, None, None], y_BCHW, scale_BC[:, :, None, None])


def select(model: nn.Module, config: SelectionConfig | None = None, *, density: float = 1.0) -> nn.Module:
    """Put attentive feature selection into a network; at density 1 its function is unchanged.

    Args:
        model: a supported BN ConvNet (timm's ResNets, VGG-BN, RegNets, MobileNets, EfficientNets).
        density: the share of channels that each layer computes, in (0, 1].
    Returns:
        A copy of ``model`` whose every ConvBN unit, stem and shortcuts included, is a `SelectiveConvBN`.
    Raises:
        SourceError: the architecture is not supported (named with the layer that is the reason).
        ConfigError: density out of range, selection is in this model already, or a width is no multiple of the group.
    """
    config = config or SelectionConfig()
    if any(True for _ in selective_units(model)):
        raise ConfigError("This network carries selection already: set_density() changes its density.")
    units = convbn_units(model)
    for unit in units:
        norm = model.get_submodule(unit.norm)
        assert isinstance(norm, nn.BatchNorm2d)
        if norm.num_features % config.group and not unit.depthwise:
            raise ConfigError(
                f"selection.group {config.group} does not go into the {norm.num_features} channels of {unit.name}: "
                "give a number that divides the channels of all layers, such as 8, or leave it out."
            )
    model = copy.deepcopy(model)
    gates: dict[str, Gate | FollowingGate] = {}
    leading = {name for unit in units for name in unit.leaders}
    for unit in units:
        gates[unit.name] = _replace(model, unit, gates, config, leads=unit.name in leading)
    set_density(model, density)
    return model


def _replace(
    model: nn.Module,
    unit: ConvBN,
    gates: dict[str, Gate | FollowingGate],
    config: SelectionConfig,
    *,
    leads: bool,
) -> Gate | FollowingGate:
    conv, norm = model.get_submodule(unit.name), model.get_submodule(unit.norm)
    assert isinstance(conv, nn.Conv2d)
    assert isinstance(norm, nn.BatchNorm2d)
    gamma_C, beta_C = norm.weight.detach(), norm.bias.detach()
    gate: Gate | FollowingGate
    if unit.depthwise:
        gate = FollowingGate(gamma_C, [gates[name] for name in unit.leaders])
    else:
        full = full_shape(conv)[1]  # before compaction, which leaves the rank as it was
        gate = Gate(conv.in_channels, gamma_C, beta_C, config, leads=leads, full_channels=full).to(gamma_C.device)
    _set(model, unit.name, SelectiveConvBN(conv, norm, gate, unit.norm).train(norm.training))
    # timm's BatchNormAct2d carries a dropout and the activation; they stay where the norm stood.
    rest = [m for m in (getattr(norm, "drop", None), getattr(norm, "act", None)) if isinstance(m, nn.Module)]
    rest = [m for m in rest if not isinstance(m, nn.Identity)]
    _set(model, unit.norm, nn.Sequential(*rest) if len(rest) > 1 else rest[0] if rest else nn.Identity())
    return gate


def _set(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def selective_units(model: nn.Module) -> Iterator[tuple[str, SelectiveConvBN]]:
    """The selective units with their paths, in the order in which they were found."""
    for name, module in model.named_modules():
        if isinstance(module, SelectiveConvBN):
            yield name, module


def gates(model: nn.Module) -> dict[str, Gate]:
    """The gates that choose (those of depthwise units only follow), by the path of their unit."""
    return {name: unit.gate for name, unit in selective_units(model) if isinstance(unit.gate, Gate)}


def set_density(model: nn.Module, density: float | dict[str, float]) -> None:
    """Set one density for all layers, or one for each unit by its path.

    Raises:
        ConfigError: no selection, a density outside (0, 1], or a name that is not a unit; then none has changed.
    """
    chosen = gates(model)
    if not chosen:
        raise ConfigError("This network carries no selection: select() puts it in.")
    if not isinstance(density, dict):
        density = dict.fromkeys(chosen, density)
    wanted = {}
    for name, value in density.items():
        if name not in chosen:
            raise ConfigError(f"There is no selective unit called {name}.")
        try:
            wanted[name] = float(value)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"A density is a number in (0, 1], got {value!r}.") from error
        if not 0 < wanted[name] <= 1:
            raise ConfigError(f"A density lies in (0, 1], got {value} for {name}.")
    for name, value in wanted.items():
        chosen[name].density = value


@torch.no_grad()
def round_predictors(model: nn.Module) -> None:
    """Round the predictors' weights to what bf16 holds (8 bits of mantissa); they stay float32 tensors.

    Ours: at a few per cent of the MACs a predictor's cost is the reading of its weights. Rounded in the network itself,
    before it is validated, every runtime computes the same and may keep them in half the memory.
    """
    for gate in gates(model).values():
        predictor = gate.predictor
        for weight in (predictor.weight, predictor.reduce.weight if predictor.reduce is not None else None):
            if weight is not None:
                weight.copy_(weight.bfloat16().float())


def densities(model: nn.Module) -> dict[str, float]:
    return {name: gate.density for name, gate in gates(model).items()}
