"""Options that a method does not look at.

::

    options given ----- those that differ from the default
                          |
    method, budget -------+--> does this method look at it?  no --> `fit` refuses, and says whose option it is
                                                                    `compare` refuses what none of its rows looks at

An option without effect is a result that is not what its owner takes it for: the row "trials 0" of a table that is the
row above again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from afds.artifact import is_run
from afds.config import ANCHORED, PAPER, PRUNED, FitConfig, parse_method, resolve_method
from afds.errors import ConfigError
from afds.schedule import parse_budget
from afds.steps import base_of

RECOVERED = ("optimizer", "lr", "weight_decay", "mixup", "mixup_share", "cutmix")  # as `config.recovering` has them
CHOOSES = "networks in which each image chooses (--descent.no-settle)"


def refuse_idle(config: FitConfig, *, from_base: bool = False) -> None:
    """Refuse options that this method would not look at.

    from_base: the source is a run on the same classes, so that no dense fine-tuning comes first.

    Raises:
        ConfigError: it names the option, and whose it is.
    """
    for message in idle_options(config, from_base=from_base).values():
        raise ConfigError(message)


def without_idle(config: FitConfig, *, from_base: bool = False) -> FitConfig:
    """The same, with the default in place of what this method does not look at. from_base: see `refuse_idle`."""
    default = FitConfig()
    for option in idle_options(config, from_base=from_base):
        group, _, name = option.rpartition(".")
        if group:
            part = dataclasses.replace(getattr(config, group), **{name: _value(default, option)})
            config = dataclasses.replace(config, **{group: part})
        else:
            config = dataclasses.replace(config, **{name: _value(default, option)})
    return config


def idle_options(config: FitConfig, *, from_base: bool = False) -> dict[str, str]:
    """Options that were given and that the method does not look at, with a sentence for each.

    config: as given, not resolved: a method's own values are not the user's. from_base: see `refuse_idle`.
    """
    own = PAPER if config.method == "afds-paper" else {}
    found = {}
    for options, looked_at, whose in _rules(config, from_base):
        for option in [] if looked_at else options:
            group, _, name = option.rpartition(".")
            value, default = _value(config, option), _value(FitConfig(), option)
            if value == default or name in own.get(group, {}) or option in found:
                continue
            found[option] = (f"{_said(option, value)} would be of no effect with --method {config.method} at "
                             f"{resolve_method(config).budget}: it is of {whose}. Leave it out.")  # fmt: skip
    return found


def _value(config: FitConfig, option: str) -> Any:
    group, _, name = option.rpartition(".")
    return getattr(getattr(config, group) if group else config, name)


def _said(option: str, value: Any) -> str:
    """As it is written on a command line."""
    group, dot, name = option.replace("_", "-").rpartition(".")
    if isinstance(value, bool):
        return f"--{group}{dot}{name if value else f'no-{name}'}"
    return f"--{group}{dot}{name} {value:g}" if isinstance(value, float) else f"--{group}{dot}{name} {value}"


def _all(group: str, *but: str) -> list[str]:
    fields = dataclasses.fields(getattr(FitConfig(), group))
    return [f"{group}.{field.name}" for field in fields if field.name not in but]


def _rules(given: FitConfig, from_base: bool) -> Iterable[tuple[list[str], bool, str]]:
    """Options, whether this method looks at them, and whose they are; where two rules refuse, the first one says it."""
    config = resolve_method(given)
    transfer, compression = parse_method(config.method)
    ratio, ms = parse_budget(config.budget).ratio, parse_budget(config.budget).ms
    cuts, chooses, ours = ratio != 1, compression == "afs", config.method == "afds"
    settles = ours and cuts and config.descent.settle
    selects = chooses and cuts
    based = base_of(config) is not None and not (config.teacher is not None and compression not in PRUNED)
    d, o, r = config.descent, config.optim, config.recovery
    below = " below 1x"

    yield ["small_source"], "small" in compression, "the methods with +small"
    yield ["source_data"], chooses and transfer != "kd", "the methods with +afs, whose selection learns on it first"
    yield ["source_epochs"], config.source_data is not None, "the step on --source-data"
    yield ["base_epochs"], based, "methods that start from a dense fine-tuning of their own"
    yield ["base_epochs"], not from_base, "the dense fine-tuning, which has been done before"
    yield (["arch_args"], bool(config.anchor) or not is_run(config.source),
           "an architecture by name, and --source is a run, which knows its own")  # fmt: skip
    yield ["anchor"], transfer in ANCHORED, f"the methods {' and '.join(f'{t}+...' for t in ANCHORED)}"
    yield _all("latency"), ms is not None, "a budget in milliseconds"

    yield ["transfer.l2_sp"], transfer == "l2-sp", "the methods l2-sp+..."
    yield ["transfer.delta", "transfer.delta_images"], transfer == "delta", "the methods delta+..."
    yield ["transfer.head_decay"], transfer in ANCHORED, f"the methods {' and '.join(f'{t}+...' for t in ANCHORED)}"
    yield (["distillation.afd", "distillation.hidden", "distillation.squared"], transfer == "afd",
           "afds and the methods afd+...")  # fmt: skip
    yield ["distillation.logits", "distillation.temperature"], transfer in ("afd", "kd"), "afds, afd+... and kd+..."
    yield (["distillation.hints"], not settles,
           "networks that do not settle; --recovery.hints is the weight of the blocks where channels do")  # fmt: skip
    yield ["distillation.hints"], transfer == "afd", "the methods afd+..."

    yield _all("selection"), chooses, "the methods with +afs"
    yield ["selection.group"], not settles, CHOOSES
    yield ["pruning.sparsity"], compression == "slimming", "the methods with +slimming"
    yield _all("pruning", "sparsity"), compression in PRUNED and cuts, f"the methods with +l1 and +slimming{below}"
    yield ["pruning.end"], config.pruning.stages > 1, "a pruning in several stages"

    yield _all("descent"), selects, f"the methods with +afs{below}"
    yield ["descent.settle"], ours, "method afds; in others each image chooses"
    yield ["descent.reconstruct", "descent.ridge"], ours, "method afds"
    yield [f"descent.{n}" for n in ("worth", "trials", "multiple_of", "input_size")], settles, "method afds, settling"
    yield (["descent.trials"], d.allocation == "refit", "--descent.allocation refit")
    yield ([f"descent.{n}" for n in ("start", "end", "stages", "static_quantile", "prune_quantile")], not settles,
           CHOOSES)  # fmt: skip
    yield (["descent.floor"], d.allocation == "importance" or (d.allocation == "refit" and not settles),
           "--descent.allocation importance")  # fmt: skip
    yield _all("recovery"), settles, f"method afds{below}, settling"

    for name in RECOVERED:
        yield ([f"optim.{name}"], not (settles and from_base),
               f"the dense fine-tuning, which has been done before; --recovery.{name.replace('_', '-')} is of what "
               "comes now")  # fmt: skip
    yield (["data_options.colour"], not (settles and from_base),
           "the dense fine-tuning, which has been done before; --recovery.colour is of what comes now")  # fmt: skip
    yield ["optim.predictor_lr"], chooses, "the methods with +afs"
    dense_first = not (settles and from_base)
    yield (["optim.momentum"], (dense_first and o.optimizer == "sgd") or (settles and r.optimizer == "sgd"),
           "the optimizer sgd")  # fmt: skip
    yield ["optim.mixup_share", "optim.cutmix"], o.mixup > 0, "--optim.mixup"
    yield ["recovery.mixup_share", "recovery.cutmix"], r.mixup > 0, "--recovery.mixup"
    yield ["data_options.scale"], config.data_options.crop == "resized", "--data-options.crop resized"
