"""The options of a run: dataclasses are the one source, the command line and config.json are drawn from them.

The docstring under each field is its help text. Every value is checked before work starts.
"""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from afds.errors import ConfigError
from afds.selection import SelectionConfig

TRANSFERS = ("scratch", "l2", "l2-sp", "delta", "afd", "kd")
COMPRESSIONS = ("dense", "slimming", "l1", "afs", "small", "lowres", "small+lowres")
ANCHORED = ("l2-sp", "delta")  # these stay near pretrained weights
PRUNED = ("slimming", "l1")  # these cut a fine-tuned dense network
ALIASES = {"afds": "afd+afs", "afds-paper": "afd+afs", "fbs": "l2+afs"}
# afds-paper: what is ours, and not the paper's, is off.
PAPER: dict[str, dict[str, Any]] = {
    "selection": {"predictor": "full", "standardise": False, "importance": False, "bounded": False},
    "distillation": {"logits": 0.0, "hints": 0.0, "squared": False},
    "descent": {
        "allocation": "uniform",
        "start": 0.25,
        "end": 0.6,
        "static_quantile": 0.05,
        "prune_quantile": 0.05,
        "settle": False,
        "reconstruct": 0,
        "reestimate": 0,
        "lr": 1.0,
    },
}


@dataclass(frozen=True)
class DataConfig:
    """How photos are read."""

    input_size: int = 0
    """Side of the square image that the network sees, in pixels. 0: the source's own (mostly 224)."""
    val_fraction: float = 0.1
    """Share set aside for choices, where there is no val/ folder: of train/, or of all where nothing is split."""
    test_fraction: float = 0.15
    """Share set aside for the final figure, where DATA has no train/ folder; beside one, only a test/ folder is."""
    crop: Literal["resized", "random"] = "resized"
    """Training crops. resized: a random part at a random scale; random: resize, then a random square (DELTA)."""
    scale: float = 0.35
    """Smallest area of a `resized` training crop, as a share of the image. Evaluated photos are resized so that things
    appear as large as in these crops (ours)."""
    flip: bool = True
    """Mirror training images at random."""
    colour: float = 0.0
    """Strength of the jitter of brightness, contrast, saturation and hue, from 0 (none) to 1, a quarter of it the share
    of images made grey; where a settled network learns again, --recovery.colour takes its place."""
    workers: int = 2
    """Processes that read images. 0 reads in the main process."""
    skip_unreadable: bool = False
    """Go on without images that cannot be read (they are listed either way)."""
    cache: bool = True
    """Keep decoded, shrunk images in memory between epochs where they fit."""

    def __post_init__(self) -> None:
        _require(self.input_size == 0 or 16 <= self.input_size <= 2048, "data-options.input-size", self.input_size,
                 "0 or a number of pixels from 16 to 2048")  # fmt: skip
        _require(0 < self.val_fraction < 0.9, "data-options.val-fraction", self.val_fraction, "between 0 and 0.9")
        _require(0 <= self.test_fraction < 0.9, "data-options.test-fraction", self.test_fraction, "from 0 to below 0.9")
        _require(0 < self.scale <= 1, "data-options.scale", self.scale, "above 0 and at most 1")
        _require(0 <= self.colour <= 1, "data-options.colour", self.colour, "from 0 to 1")
        _require(0 <= self.workers <= 64, "data-options.workers", self.workers, "from 0 to 64")


@dataclass(frozen=True)
class DistillationConfig:
    """What keeps the target near its teacher while it learns."""

    afd: float = 0.01
    """Weight lambda of attentive feature distillation (the paper's term)."""
    hidden: int = 32
    """Width H of the attention network phi."""
    squared: bool = False
    """Square the distance of each feature map. The published code does not."""
    logits: float = 1.0
    """Weight of logit distillation from the fine-tuned dense network (ours). 0 turns it off."""
    temperature: float = 2.0
    """Temperature of logit distillation."""
    hints: float = 1.0
    """Weight of matching the output of every residual block with the fine-tuned dense network's (ours)."""

    def __post_init__(self) -> None:
        for name in ("afd", "logits", "hints"):
            _require(getattr(self, name) >= 0, f"distillation.{name}", getattr(self, name), "0 or more")
        _require(self.hidden >= 1, "distillation.hidden", self.hidden, "1 or more")
        _require(self.temperature > 0, "distillation.temperature", self.temperature, "above 0")


@dataclass(frozen=True)
class TransferConfig:
    """Weights of l2-sp (the published 0.01) and DELTA (0.01 in our units, see transfer/delta.py)."""

    l2_sp: float = 0.01
    """Weight alpha of L2-SP."""
    delta: float = 0.01
    """Weight alpha of DELTA."""
    delta_images: int = 64
    """Training images on which DELTA measures what a channel is worth; the published code takes 256."""
    head_decay: float = 0.01
    """Weight decay of the classifier with L2-SP and DELTA."""

    def __post_init__(self) -> None:
        for name in ("l2_sp", "delta", "head_decay"):
            shown = f"transfer.{name.replace('_', '-')}"
            _require(getattr(self, name) >= 0, shown, getattr(self, name), "0 or more")
        _require(self.delta_images >= 8, "transfer.delta-images", self.delta_images, "8 or more")


@dataclass(frozen=True)
class PruningConfig:
    """How `l1` and `slimming` cut a fine-tuned network."""

    stages: int = 1
    """1: fine-tune, prune, fine-tune. More: gradually, while it is fine-tuned again."""
    end: float = 0.5
    """With several stages: share of the epochs after which nothing more is cut."""
    scope: Literal["auto", "layer", "network"] = "auto"
    """Where channels compete: within their `layer` (auto for l1) or in the whole `network` (auto for slimming)."""
    sparsity: float = 1e-4
    """Slimming: weight of the L1 penalty on the batch norms' scales."""

    def __post_init__(self) -> None:
        _require(1 <= self.stages <= 100, "pruning.stages", self.stages, "from 1 to 100")
        _require(0 < self.end <= 1, "pruning.end", self.end, "above 0 and at most 1")
        _require(self.sparsity >= 0, "pruning.sparsity", self.sparsity, "0 or more")


@dataclass(frozen=True)
class DescentConfig:
    """How the density falls from 1 to what the budget asks."""

    settle: bool = True
    """Method afds: settle the winners once, on training images, before the first step; what loses is cut away, what
    stays keeps its predicted scale (ours). False: winners are chosen for every image, the density falls by stages."""
    allocation: Literal["auto", "uniform", "stream", "importance", "refit"] = "auto"
    """How density is shared out over the layers. `uniform`: one for all (the paper). `stream`: what writes the residual
    stream keeps more, the layers inside of blocks less (ours). `importance`: the last channel kept in each layer is
    worth about the same per MAC (ours). `refit`: what the refitted network is nearest to the dense one with, by
    --descent.trials of them (ours; with settling, otherwise as `importance`). `auto`: `uniform` where method afds
    settles, otherwise `importance` (ours, as measured)."""
    worth: Literal["elimination", "taylor"] = "elimination"
    """Which channels settling keeps. `elimination`: those that the others, refitted, could least stand in for (ours;
    with a refit, otherwise as `taylor`). `taylor`: those of the largest Taylor estimate."""
    trials: int = 12
    """With `refit`: how many ways of sharing out the densities are tried; 0: the rule that trials start from."""
    multiple_of: int = 8
    """Settling keeps a multiple of so many channels in layers that have eight times as many: runtimes compute in such
    blocks."""
    input_size: int = 0
    """Side of the images that a settled network looks at, in pixels, where it is to see smaller ones than the dense
    network that it learns from, which sees --data-options.input-size; the budget counts against that. 0: the same."""
    scales: Literal["predicted", "cheap", "learned"] = "cheap"
    """Settling: what stays is scaled for every image by its `predicted` saliency, or by a `learned` constant, as in a
    batch norm, which costs nothing at run time (ours); `cheap`: predicted where the predictor has at most a quarter as
    many weights as the convolution (3 x 3, not 1 x 1), learned elsewhere. Without settling all are predicted."""
    start: float = 0.05
    """Without settling: share of the epochs at d = 1."""
    end: float = 0.5
    """Without settling: share of the epochs after which the density no longer falls."""
    stages: int = 12
    """Without settling: number of steps of the fall; after each, s, gamma and m are updated on training images."""
    static_quantile: float = 0.0
    """Per stage, this share of a layer's still dynamic channels, those whose saliency varies least, turns static."""
    prune_quantile: float = 0.0
    """Per stage, this share of a layer's kept channels, those of the smallest mean pi, is pruned for good."""
    floor: float = 0.4
    """With `importance`: no layer falls below this share of the uniform density."""
    reconstruct: int = 4096
    """Crops of training images on which the convolutions are refitted by least squares to the fine-tuned dense
    network's, after settling or after each stage of the fall (ours, method afds; at most 8 of each image, fewer where
    memory is short). 0: not."""
    ridge: float = 0.1
    """How strongly that refit holds the weights where they were, as a share of its inputs' power."""
    lr: float = 1.0
    """Peak learning rate where the density falls, as a multiple of optim.lr."""
    reestimate: int = 64
    """After the last step: batches of training images on which the batch norms' statistics are measured anew (ours)."""
    images: int = 64
    """Validation images on which densities are solved for; three times as many training images estimate importance
    and masks."""

    def __post_init__(self) -> None:
        _require(0 <= self.start < self.end <= 1, "descent.start and descent.end", (self.start, self.end),
                 "0 <= start < end <= 1")  # fmt: skip
        _require(self.input_size == 0 or 16 <= self.input_size <= 2048, "descent.input-size", self.input_size,
                 "0 or a number of pixels from 16 to 2048")  # fmt: skip
        _require(self.settle or not self.input_size, "descent.input-size", self.input_size,
                 "0 without settling: only a settled network looks at smaller images than its teacher")  # fmt: skip
        _require(self.settle or self.scales != "learned", "descent.scales", self.scales,
                 "predicted without settling: a choice for every image needs saliencies")  # fmt: skip
        _require(1 <= self.multiple_of <= 64, "descent.multiple-of", self.multiple_of, "from 1 to 64")
        _require(self.trials >= 0, "descent.trials", self.trials, "0 or more")
        _require(self.stages >= 1, "descent.stages", self.stages, "1 or more")
        _require(
            0 <= self.static_quantile < 1,
            "descent.static-quantile",
            self.static_quantile,
            "from 0 to below 1",
        )
        _require(0 <= self.prune_quantile < 1, "descent.prune-quantile", self.prune_quantile, "from 0 to below 1")
        _require(self.reconstruct >= 0, "descent.reconstruct", self.reconstruct, "0 or more")
        _require(0 < self.ridge < 1e6, "descent.ridge", self.ridge, "above 0")
        _require(0 < self.lr <= 100, "descent.lr", self.lr, "above 0")
        _require(self.reestimate >= 0, "descent.reestimate", self.reestimate, "0 or more")
        _require(0 < self.floor <= 1, "descent.floor", self.floor, "above 0 and at most 1")
        _require(self.images >= 1, "descent.images", self.images, "1 or more")


@dataclass(frozen=True)
class OptimConfig:
    """How weights are learned."""

    epochs: int = 0
    """Passes over the training images. 0: chosen by their number (about 60,000 images seen, 12 to 60 passes); after
    settling twice as many, from 4x on five times, where a pass costs less and accuracy rises for longer."""
    batch_size: int = 32
    """Images a step, per device."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """`sgd`: with Nesterov momentum. `adamw`: wants about a twentieth of the rate."""
    lr: float = 0.02
    """Peak learning rate."""
    predictor_lr: float = 1.0
    """The predictors' learning rate, as a multiple of the peak."""
    momentum: float = 0.9
    """Momentum of SGD (Nesterov)."""
    weight_decay: float = 5e-4
    """Weight decay, on weights of convolutions, predictors and the classifier (L2; decoupled with adamw)."""
    schedule: Literal["cosine", "step"] = "cosine"
    """`cosine`: warm-up over the first 5 %, then down to 0. `step`: times 0.1 after 67 % (the paper's student)."""
    label_smoothing: float = 0.0
    """Label smoothing of the cross-entropy."""
    mixup: float = 0.0
    """Alpha of mixup: pairs of training images are blended by a share drawn from Beta(alpha, alpha), labels with them;
    a teacher sees the same blend. 0: not."""
    mixup_share: float = 1.0
    """Share of the steps whose images are mixed."""
    cutmix: float = 0.0
    """Of those steps, the share that pastes a rectangle of the other image instead of blending both (CutMix); its area
    is drawn as mixup's share is."""
    clip: float = 10.0
    """Largest gradient norm. 0: no clipping."""

    def __post_init__(self) -> None:
        _require(self.epochs >= 0, "optim.epochs", self.epochs, "0 or more")
        _require(
            self.batch_size >= 2,
            "optim.batch-size",
            self.batch_size,
            "2 or more: batch norm needs two images",
        )
        _require(0 < self.lr < 100, "optim.lr", self.lr, "above 0 and below 100")
        _require(self.predictor_lr >= 0, "optim.predictor-lr", self.predictor_lr, "0 or more")
        _require(0 <= self.momentum < 1, "optim.momentum", self.momentum, "from 0 to below 1")
        _require(self.weight_decay >= 0, "optim.weight-decay", self.weight_decay, "0 or more")
        _require(0 <= self.label_smoothing < 1, "optim.label-smoothing", self.label_smoothing, "from 0 to below 1")
        _require(0 <= self.mixup <= 10, "optim.mixup", self.mixup, "from 0 to 10")
        _require(0 <= self.mixup_share <= 1, "optim.mixup-share", self.mixup_share, "from 0 to 1")
        _require(0 <= self.cutmix <= 1, "optim.cutmix", self.cutmix, "from 0 to 1")
        _require(self.clip >= 0, "optim.clip", self.clip, "0 or more")


@dataclass(frozen=True)
class RecoveryConfig:
    """How a settled network learns again (method afds, --descent.settle); these take the place of the like in --optim
    and --distillation, which hold for the dense fine-tuning before."""

    optimizer: Literal["sgd", "adamw"] = "adamw"
    """`adamw` keeps what the refit has saved; sgd destroys much of it in its first steps."""
    lr: float = 2e-3
    """Peak learning rate."""
    weight_decay: float = 0.02
    """Weight decay."""
    mixup: float = 1.0
    """Alpha of mixup: the dense network says of blends what it does not say of images that it knows by heart."""
    mixup_share: float | None = None
    """Share of the steps whose images are mixed. Default: half of them, and none in trainings of fewer than 36 epochs,
    which do not get to know their images by heart (ours, as measured)."""
    cutmix: float = 0.0
    """Of those steps, the share that pastes a rectangle instead of blending."""
    colour: float = 0.4
    """Strength of the jitter of brightness, contrast, saturation and hue, from 0 (none) to 1, a quarter of it the share
    of images made grey; the dense network that is learned from sees the same. 0 where colour tells the class."""
    hints: float = 10.0
    """Weight of matching the output of every residual block with the fine-tuned dense network's."""

    def __post_init__(self) -> None:
        _require(0 <= self.colour <= 1, "recovery.colour", self.colour, "from 0 to 1")
        _require(0 < self.lr < 100, "recovery.lr", self.lr, "above 0 and below 100")
        _require(self.weight_decay >= 0, "recovery.weight-decay", self.weight_decay, "0 or more")
        _require(0 <= self.mixup <= 10, "recovery.mixup", self.mixup, "from 0 to 10")
        share = self.mixup_share
        _require(share is None or 0 <= share <= 1, "recovery.mixup-share", share, "from 0 to 1")
        _require(0 <= self.cutmix <= 1, "recovery.cutmix", self.cutmix, "from 0 to 1")
        _require(self.hints >= 0, "recovery.hints", self.hints, "0 or more")


@dataclass(frozen=True)
class LatencyConfig:
    """How a budget in milliseconds (`--budget 8ms`) is measured: one image a call, on this machine's CPU."""

    runtime: Literal["native", "onnx", "openvino", "torch"] = "native"
    """What will run the network."""
    threads: int = 1
    """CPU threads of a call."""
    calls: int = 50
    """Calls, in five groups; the median of the quietest group counts."""
    ratio: float = 0.0
    """Ratio of MACs that the budget comes to; 0: measured at the start, and then kept in the record."""

    def __post_init__(self) -> None:
        _require(1 <= self.threads <= 1024, "latency.threads", self.threads, "from 1 to 1024")
        _require(5 <= self.calls <= 10_000, "latency.calls", self.calls, "from 5 to 10000")
        _require(self.ratio == 0 or self.ratio > 1, "latency.ratio", self.ratio, "0, or above 1")


@dataclass(frozen=True)
class HardwareConfig:
    """Where it runs."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Kind of device."""
    devices: int = 1
    """How many devices (processes, on a CPU) train together."""
    precision: Literal["auto", "32-true", "bf16-mixed", "16-mixed"] = "auto"
    """`auto`: bf16-mixed where the device is measured to train faster in it, else 32-true."""

    def __post_init__(self) -> None:
        _require(self.devices >= 1, "hardware.devices", self.devices, "1 or more")


@dataclass(frozen=True)
class FitConfig:
    """Transfer a pretrained network to your photos, at a fraction of its cost."""

    data: Annotated[Path | None, tyro.conf.Positional] = None
    """Folder of class folders, or one with train/, val/, test/ in it."""
    source: str = "resnet50"
    """Pretrained network: a timm name, `NAME:weights.safetensors`, or the folder of an earlier run."""
    budget: str = ""
    """How cheap: a ratio of MACs (`10x`), MACs per image (`0.8G`), or milliseconds per image on this machine (`8ms`,
    see --latency). `1x` keeps all. Default: 5x, or 1x for a method without compression."""
    out: Path | None = None
    """Run folder to write."""
    method: str = "afds"
    """TRANSFER+COMPRESSION, or afds, afds-paper, fbs. TRANSFER: scratch, l2, l2-sp, delta, afd, kd. COMPRESSION:
    dense, slimming, l1, afs, small, lowres, small+lowres; none means dense."""
    small_source: str = ""
    """Method +small: the smaller pretrained network, as --source."""
    teacher: Path | None = None
    """Method kd: a finished dense run on the same classes. By default one is trained first."""
    anchor: str = ""
    """Where the weights come from that l2-sp and delta stay near. By default --source."""
    resume: Path | None = None
    """Go on with an interrupted run (its folder); no other option is needed."""
    unlabelled: Path | None = None
    """Method afds: a folder of more photos, of what the network will see, whose classes nobody has told: the narrow
    network learns from them what the full one says of them (ours). Those among the labelled photos are left out."""
    seed: int = 0
    """Seed of everything random."""
    base_epochs: int = 0
    """Epochs of the dense fine-tuning that comes first where one does: afds, kd, and what prunes. 0: chosen by the
    number of images."""
    source_data: Path | None = None
    """Photos of the source task: the network first learns there with selection at d = 1 (the paper's source step)."""
    source_epochs: int = 10
    """Epochs of that source step."""
    arch_args: str = "{}"
    """JSON with arguments of the architecture, e.g. '{"layers": [1, 1, 1, 1]}'."""
    read_test: bool = True
    """Read the test split at the end, once. Off where choices are still to be made."""
    tensorboard: bool = False
    """Also write TensorBoard event files into the run folder."""
    data_options: Annotated[DataConfig, tyro.conf.arg(name="data-options")] = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    transfer: TransferConfig = field(default_factory=TransferConfig)
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    pruning: PruningConfig = field(default_factory=PruningConfig)
    descent: DescentConfig = field(default_factory=DescentConfig)
    recovery: RecoveryConfig = field(default_factory=RecoveryConfig)
    latency: LatencyConfig = field(default_factory=LatencyConfig)
    hardware: HardwareConfig = field(default_factory=HardwareConfig)

    def __post_init__(self) -> None:
        for name in ("data", "out", "teacher", "resume", "unlabelled", "source_data"):
            if isinstance(value := getattr(self, name), str):  # as in `afds.fit(FitConfig(data="photos"))`
                object.__setattr__(self, name, Path(value))
        _require(0 <= self.seed < 2**31, "seed", self.seed, "from 0 to 2147483647")
        _require(self.base_epochs >= 0, "base-epochs", self.base_epochs, "0 or more")
        _require(self.source_epochs >= 1, "source-epochs", self.source_epochs, "1 or more")
        parse_method(self.method)


def parse_method(method: str) -> tuple[str, str]:
    """`afd+afs` -> ("afd", "afs"); aliases and a transfer part alone (`+dense`) are understood.

    Raises:
        ConfigError: an unknown part, with the list of those known.
    """
    spelled = ALIASES.get(method, method)
    transfer, plus, compression = spelled.partition("+")
    compression = compression if plus else "dense"
    if transfer not in TRANSFERS or compression not in COMPRESSIONS:
        raise ConfigError(
            f"Unknown method {method!r}. A method is TRANSFER+COMPRESSION with transfer one of {', '.join(TRANSFERS)} "
            f"and compression one of {', '.join(COMPRESSIONS)}, or one of {', '.join(ALIASES)}."
        )
    if transfer == "kd" and "lowres" in compression:
        raise ConfigError(f"{method}: a teacher would look at the same small images as its student. Use another "
                          "transfer with lowres, or kd with another compression.")  # fmt: skip
    return transfer, compression


def resolve_method(config: FitConfig) -> FitConfig:
    """The options that a method's name stands for, and the default budget.

    Raises:
        ConfigError: a budget for a method that cannot meet one.
    """
    compression = parse_method(config.method)[1]
    budget = config.budget or ("1x" if compression == "dense" else "5x")
    if re.fullmatch(r"\s*1(\.0*)?[xX]\s*", budget):  # as it is compared with everywhere
        budget = "1x"
    if compression == "dense" and budget != "1x":
        raise ConfigError(f"--method {config.method} computes everything and cannot meet a budget of {budget}: "
                          "leave --budget out, or choose a method such as +afs or +l1.")  # fmt: skip
    if "small" in compression and not config.small_source and budget == "1x":
        raise ConfigError(f"--method {config.method} needs --small-source NAME: the smaller pretrained network.")
    if config.teacher is not None and parse_method(config.method)[0] != "kd":
        raise ConfigError(f"--teacher is of the methods kd+..., and --method {config.method} would not look at it: "
                          "leave it out. What afds learns from is the full network of --source RUN.")  # fmt: skip
    if config.unlabelled is not None and (config.method != "afds" or budget == "1x" or not config.descent.settle):
        raise ConfigError("--unlabelled: photos without labels are learned from by method afds where it settles, below "
                          "1x, from the full network that has been fine-tuned before. Leave it out.")  # fmt: skip
    config = dataclasses.replace(config, budget=budget)
    if config.method == "afds-paper":
        config = _as_published(config)
    if config.descent.allocation == "auto":
        settles = config.method == "afds" and budget != "1x" and config.descent.settle
        descent = dataclasses.replace(config.descent, allocation="uniform" if settles else "importance")
        config = dataclasses.replace(config, descent=descent)
    return config


def _as_published(config: FitConfig) -> FitConfig:
    parts = {}
    for part, values in PAPER.items():
        given, usual = getattr(config, part), getattr(FitConfig(), part)
        for name, value in values.items():
            if getattr(given, name) not in (getattr(usual, name), value):
                option = f"--{part}.{name}".replace("_", "-")
                raise ConfigError(f"{option} {getattr(given, name)}: method afds-paper has a value of its own there, "
                                  f"{value}. Leave it out, or take method afds with --descent.no-settle.")  # fmt: skip
        parts[part] = dataclasses.replace(given, **values)
    return dataclasses.replace(config, **parts)


MIXED_FROM = 36  # epochs


def recovering(config: FitConfig, epochs: int) -> FitConfig:
    """The options with those of `recovery` in their places, for a training of so many epochs."""
    r = config.recovery
    share = (0.5 if epochs >= MIXED_FROM else 0.0) if r.mixup_share is None else r.mixup_share
    optim = dataclasses.replace(config.optim, optimizer=r.optimizer, lr=r.lr, weight_decay=r.weight_decay,
                                mixup=r.mixup, mixup_share=share, cutmix=r.cutmix)  # fmt: skip
    return dataclasses.replace(config, optim=optim, distillation=dataclasses.replace(config.distillation,
                                                                                     hints=r.hints))  # fmt: skip


def to_json(config: Any) -> Any:
    """Plain data of a dataclass, paths as text."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {f.name: to_json(getattr(config, f.name)) for f in dataclasses.fields(config)}
    return str(config) if isinstance(config, Path) else config


def from_json(cls: type, values: Any, where: str = "config.json") -> Any:
    """A dataclass from plain data; unknown names and wrong kinds are refused, as they come from a file.

    Raises:
        ConfigError: it names the file and the value.
    """
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: expected an object, found {type(values).__name__}.")
    hints = typing.get_type_hints(cls)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise ConfigError(f"{where}: unknown option {unknown[0]!r}.")
    return cls(**{name: _coerce(hints[name], value, f"{where}: {name}") for name, value in values.items()})


def _coerce(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return from_json(hint, value, where)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return _coerce(next(a for a in args if a is not type(None)), value, where)
    if origin is Literal:
        if value in args:
            return value
    elif hint is Path and isinstance(value, str):
        return Path(value)
    elif hint is float and isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300:
        return float(value)
    elif isinstance(hint, type) and type(value) is hint:
        return value
    raise ConfigError(f"{where}: {value!r} is not a valid value.")


def _require(holds: bool, name: str, value: Any, wanted: str) -> None:
    if not holds or (isinstance(value, float) and not math.isfinite(value)):
        raise ConfigError(f"--{name} must be {wanted}, got {value}.")
