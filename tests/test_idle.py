"""Options that a method does not look at are refused; that it looks at the others is seen in what it learns."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from afds.compare.plan import CompareConfig
from afds.compare.rows import Row, read_rows
from afds.compare.run import check_idle
from afds.config import (
    COMPRESSIONS,
    PAPER,
    TRANSFERS,
    DataConfig,
    DescentConfig,
    DistillationConfig,
    FitConfig,
    LatencyConfig,
    OptimConfig,
    PruningConfig,
    RecoveryConfig,
    TransferConfig,
)  # fmt: skip
from afds.data import write_digits
from afds.errors import ConfigError
from afds.fitting import fit
from afds.idle import idle_options, refuse_idle
from afds.selection import SelectionConfig
from runs import write_run

PER_IMAGE = DescentConfig(settle=False)


@pytest.mark.parametrize(
    ("shown", "changes"),
    [
        ("--source-data other", {"method": "l2", "source_data": Path("other")}),
        ("--source-data other", {"method": "kd+afs", "source_data": Path("other")}),
        ("--source-epochs 5", {"method": "afds", "source_epochs": 5}),
        ("--base-epochs 5", {"method": "fbs", "base_epochs": 5}),
        ("--base-epochs 5", {"method": "l2+l1", "base_epochs": 5, "budget": "1x"}),
        ("--base-epochs 5", {"method": "kd", "base_epochs": 5, "teacher": Path("run")}),
        ("--small-source resnet18", {"method": "l2+l1", "small_source": "resnet18"}),
        ("--anchor resnet50", {"method": "l2+l1", "anchor": "resnet50"}),
        ("--latency.threads 2", {"budget": "5x", "latency": LatencyConfig(threads=2)}),
        ("--transfer.l2-sp 0.1", {"method": "delta+l1", "transfer": TransferConfig(l2_sp=0.1)}),
        ("--transfer.delta-images 32", {"method": "l2-sp", "transfer": TransferConfig(delta_images=32)}),
        ("--transfer.head-decay 0.1", {"method": "l2", "transfer": TransferConfig(head_decay=0.1)}),
        ("--distillation.afd 0", {"method": "l2+l1", "distillation": DistillationConfig(afd=0)}),
        ("--distillation.squared", {"method": "fbs", "distillation": DistillationConfig(squared=True)}),
        ("--distillation.logits 0", {"method": "l2", "distillation": DistillationConfig(logits=0)}),
        ("--distillation.hints 3", {"method": "afds", "distillation": DistillationConfig(hints=3)}),
        ("--selection.predictor low-rank", {"method": "l2+l1", "selection": SelectionConfig(predictor="low-rank")}),
        ("--selection.group 8", {"method": "afds", "selection": SelectionConfig(group=8)}),
        ("--pruning.stages 4", {"method": "afds", "pruning": PruningConfig(stages=4)}),
        ("--pruning.sparsity 0.1", {"method": "l2+l1", "pruning": PruningConfig(sparsity=0.1)}),
        ("--pruning.end 0.2", {"method": "l2+l1", "pruning": PruningConfig(end=0.2)}),
        ("--descent.no-settle", {"method": "l2+l1", "descent": PER_IMAGE}),
        ("--descent.no-settle", {"method": "fbs", "descent": PER_IMAGE}),
        ("--descent.reestimate 8", {"method": "afds", "budget": "1x", "descent": DescentConfig(reestimate=8)}),
        ("--descent.reconstruct 8", {"method": "fbs", "descent": DescentConfig(reconstruct=8)}),
        ("--descent.trials 3", {"method": "afds", "descent": DescentConfig(trials=3)}),
        ("--descent.multiple-of 1", {"method": "fbs", "descent": DescentConfig(multiple_of=1)}),
        ("--descent.static-quantile 0.1", {"method": "afds", "descent": DescentConfig(static_quantile=0.1)}),
        ("--descent.floor 0.1", {"method": "afds", "descent": DescentConfig(floor=0.1)}),
        ("--recovery.lr 0.001", {"method": "fbs", "recovery": RecoveryConfig(lr=0.001)}),
        ("--recovery.lr 0.001", {"descent": PER_IMAGE, "recovery": RecoveryConfig(lr=0.001)}),
        ("--recovery.cutmix 0.5", {"recovery": RecoveryConfig(mixup=0, cutmix=0.5)}),
        ("--optim.predictor-lr 0", {"method": "l2+l1", "optim": OptimConfig(predictor_lr=0)}),
        ("--optim.momentum 0", {"method": "l2", "optim": OptimConfig(optimizer="adamw", momentum=0)}),
        ("--optim.mixup-share 0.5", {"method": "l2", "optim": OptimConfig(mixup_share=0.5)}),
        ("--data-options.scale 0.5", {"data_options": DataConfig(crop="random", scale=0.5)}),
    ],
)
def test_options_of_no_effect_are_refused(shown: str, changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"^{shown} would be of no effect with --method .* Leave it out."):
        refuse_idle(FitConfig(**changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "afds", "source_data": Path("other"), "source_epochs": 5, "base_epochs": 5},
        {"method": "kd", "base_epochs": 5},
        {"method": "l2+l1", "base_epochs": 5, "teacher": None, "pruning": PruningConfig(stages=4, end=0.2)},
        {"method": "l2+slimming", "budget": "1x", "pruning": PruningConfig(sparsity=0.1)},
        {"method": "l2-sp+l1", "transfer": TransferConfig(l2_sp=0.1, head_decay=0.1), "anchor": "resnet50"},
        {"method": "delta", "transfer": TransferConfig(delta=0.1, delta_images=32, head_decay=0.1)},
        {"method": "afd+l1", "distillation": DistillationConfig(hints=3, afd=0, logits=0, hidden=8)},
        {"method": "kd+l1", "distillation": DistillationConfig(logits=2, temperature=4)},
        {"budget": "8ms", "latency": LatencyConfig(threads=2)},
        {"descent": dataclasses.replace(PER_IMAGE, start=0.1, static_quantile=0.1, reconstruct=0, floor=0.1),
         "selection": SelectionConfig(group=8)},
        {"descent": DescentConfig(allocation="refit", trials=3, multiple_of=1), "recovery": RecoveryConfig(hints=3)},
        {"method": "fbs", "descent": DescentConfig(start=0.1, floor=0.1), "optim": OptimConfig(predictor_lr=0)},
        {"optim": OptimConfig(optimizer="adamw", momentum=0), "recovery": RecoveryConfig(optimizer="sgd")},
    ],
)  # fmt: skip
def test_options_that_are_looked_at_are_not(changes: dict[str, Any]) -> None:
    refuse_idle(FitConfig(**changes))


@pytest.mark.parametrize(
    ("shown", "changes"),
    [
        ("--base-epochs 5", {"base_epochs": 5}),
        ("--base-epochs 5", {"base_epochs": 5, "method": "l2+l1", "budget": "2x"}),
        ("--base-epochs 5", {"base_epochs": 5, "method": "kd"}),
        ("--optim.lr 0.5", {"optim": OptimConfig(lr=0.5)}),
        ("--optim.weight-decay 0.5", {"optim": OptimConfig(weight_decay=0.5)}),
        ("--optim.mixup 0.5", {"optim": OptimConfig(mixup=0.5)}),
        ("--optim.momentum 0", {"optim": OptimConfig(momentum=0)}),
        ("--data-options.colour 0.4", {"data_options": DataConfig(colour=0.4)}),
    ],
)
def test_options_of_a_step_that_has_been_done_are_refused(shown: str, changes: dict[str, Any]) -> None:
    refuse_idle(FitConfig(**changes))  # where the step comes first
    with pytest.raises(ConfigError, match=f"^{shown} would be of no effect .* of .* has been done before|sgd"):
        refuse_idle(FitConfig(**changes), from_base=True)


def test_an_architecture_is_looked_at_for_the_anchor_where_the_source_is_a_run(tmp_path: Path) -> None:
    write_run(tmp_path, selection=None)
    config = FitConfig(method="l2-sp+l1", source=str(tmp_path), arch_args='{"layers": [1, 1, 1, 1]}')
    assert list(idle_options(config)) == ["arch_args"]
    refuse_idle(dataclasses.replace(config, anchor="resnet18:weights.safetensors"))


def test_where_each_image_chooses_and_in_pruning_options_are_still_looked_at() -> None:
    optim = OptimConfig(lr=0.5, weight_decay=0.1, mixup=0.5, momentum=0.5)
    for config in (FitConfig(optim=optim, descent=PER_IMAGE), FitConfig(method="l2+l1", optim=optim)):
        refuse_idle(config, from_base=True)


def test_a_fit_from_a_base_says_what_it_would_not_look_at(tmp_path: Path) -> None:
    photos = write_digits(tmp_path / "photos", range(3), per_class=16, test_per_class=4)
    small = DataConfig(input_size=32, flip=False, workers=0, val_fraction=0.2)
    optim = OptimConfig(epochs=1, batch_size=8)
    base = FitConfig(data=photos, source="resnet18", method="scratch", arch_args='{"layers": [1, 1, 1, 1]}',
                     data_options=small, optim=optim, out=tmp_path / "base")  # fmt: skip
    fit(base, quiet=True)
    run = FitConfig(data=photos, source=str(tmp_path / "base"), data_options=small, budget="2x", out=tmp_path / "run")
    cases: list[tuple[dict[str, Any], str]] = [
        ({"optim": dataclasses.replace(optim, lr=0.5)}, "--optim.lr 0.5"),
        ({"arch_args": '{"layers": [2, 1, 1, 1]}'}, "--arch-args .* which knows its own"),
    ]
    for changes, shown in cases:
        with pytest.raises(ConfigError, match=f"^{shown}"):
            fit(dataclasses.replace(run, **changes), quiet=True)
        assert not (tmp_path / "run").exists()


def test_no_method_is_refused_as_it_is_and_afds_paper_not_what_it_is_itself() -> None:
    for transfer in TRANSFERS:
        for compression in COMPRESSIONS:
            if not (transfer == "kd" and "lowres" in compression):
                refuse_idle(FitConfig(method=f"{transfer}+{compression}"))
    parts = {part: dataclasses.replace(getattr(FitConfig(), part), **values) for part, values in PAPER.items()}
    refuse_idle(FitConfig(method="afds-paper", **parts))


def test_a_row_is_refused_for_what_none_of_its_budgets_looks_at() -> None:
    def check(methods: str, budgets: str = "1x,5x", **shared: Any) -> None:
        check_idle(CompareConfig(data=(Path("p"),), out=Path("o"), methods=methods, budgets=budgets, **shared))

    check("l2,afds[recovery.lr=0.001]")  # at 5x
    with pytest.raises(ConfigError, match=r"^afds\[recovery.lr=0.001\]: --recovery.lr 0.001 would be of no effect"):
        check("l2,afds[recovery.lr=0.001]", budgets="1x")
    hints = DistillationConfig(hints=3)
    check("afd+l1,afds", distillation=hints)
    with pytest.raises(ConfigError, match=r"^No row looks at it: --distillation.hints 3 would be of no effect"):
        check("l2,afds", budgets="5x", distillation=hints)
    with pytest.raises(ConfigError, match=r"^No row looks at it: --small-source resnet18 would be of no effect"):
        check("l2,afds", small_source="resnet18")
    check("l2,l2+small", small_source="resnet18")
    check("afds,afds[descent.allocation=uniform]", descent=DescentConfig(allocation="refit", trials=3))
    with pytest.raises(ConfigError, match=r"^afds\[optim.lr=0.1\]: --optim.lr 0.1 .* has been done before"):
        check("l2,afds[optim.lr=0.1]", budgets="5x")  # a base learns with the options of all
    check("l2,afds", optim=OptimConfig(lr=0.1))
    check("l2", base_epochs=5)  # learns for so many epochs more


def test_rows_of_the_lab_have_an_effect() -> None:
    for path in sorted((Path(__file__).parents[1] / "benchmarks/lab").glob("*.toml")):
        rows: list[Row] = read_rows(path)
        assert rows
        small = "resnet10t" if any("small" in row.method for row in rows) else ""
        check_idle(CompareConfig(data=(Path("p"),), out=Path("o"), methods="", rows=path, budgets="5x,10x",
                                 small_source=small))  # fmt: skip
