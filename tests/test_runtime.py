"""The native runtime against the PyTorch forward: logits, winners and MACs, by property and on every family."""

from __future__ import annotations

import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import afds.runtime as runtime
from afds.errors import ConfigError, RunFolderError
from afds.selection import SelectionConfig, gates, round_predictors, select, set_density
from convolutions import Small, cases, check_equal
from networks import randomise_bn, train_like

pytestmark = pytest.mark.skipif(not runtime.is_built(), reason="afds was installed without its native runtime")


def check(
    model: nn.Module, x_BCHW: torch.Tensor, *, threads: int = 1, isa: str = "auto", tolerance: float = 1e-4
) -> None:
    """Equal logits, equal active channels and equal MACs, image by image."""
    executor = runtime.compile(model, input_size=tuple(x_BCHW.shape[2:]), threads=threads, isa=isa)
    assert np.array_equal(executor(x_BCHW.numpy()), executor.counted(x_BCHW.numpy())[0])
    check_equal(executor, model, x_BCHW, tolerance)


@settings(max_examples=30)
@given(
    case=cases(), height=st.integers(5, 23), width=st.integers(5, 40), batch=st.integers(1, 3),
    threads=st.integers(1, 3), density=st.sampled_from([0.01, 0.3, 0.7, 1.0]), masks=st.booleans(), low=st.booleans(),
    group=st.sampled_from([1, 1, 2, 3, 8]),
    rounded=st.booleans(),
    isa=st.sampled_from(runtime.usable_isas() or ["auto"]), seed=st.integers(0, 5),
)  # fmt: skip
def test_any_convolution(case, height, width, batch, threads, density, masks, low, group, rounded, isa, seed) -> None:
    torch.manual_seed(seed)
    case = {**case, "cin": group * case["cin"], "cout": group * case["cout"]}
    model = randomise_bn(Small(**case).eval(), seed)
    x = torch.randn(batch, 3, height, width)
    check(model, x, threads=threads, isa=isa)
    selective = select(model, SelectionConfig(predictor="low-rank" if low else "full", group=group)).eval()
    train_like(selective, seed, static=0.4 if masks else 0.0, pruned=0.3 if masks else 0.0, spread=0.5)
    if rounded:
        round_predictors(selective)
    set_density(selective, density)
    check(selective, x, threads=threads, isa=isa)


@settings(max_examples=30)
@given(
    cin=st.integers(1, 40), cout=st.integers(1, 90), kernel=st.sampled_from([1, 1, 3]), stride=st.integers(1, 2),
    residual=st.booleans(), height=st.integers(1, 7), width=st.integers(1, 7), threads=st.integers(1, 3),
    losing=st.sampled_from([0.0, 0.0, 2.0]), isa=st.sampled_from(runtime.usable_isas() or ["auto"]),
)  # fmt: skip
def test_channels_are_lanes_on_small_maps(
    cin, cout, kernel, stride, residual, height, width, threads, losing, isa
) -> None:
    torch.manual_seed(0)
    model = Small(cin, cout, kernel, stride, kernel // 2, groups=1, residual=residual).eval()
    x = torch.randn(3, 3, height, width)
    check(randomise_bn(model, 0), x, threads=threads, isa=isa)
    selective = train_like(select(model).eval(), 0, spread=0.2)
    set_density(selective, 1.0)
    for gate in gates(selective).values():  # at `losing` some channels lose on some images: then pixels are lanes
        assert gate.predictor.bias is not None
        gate.predictor.bias.data -= losing * torch.rand_like(gate.predictor.bias)
    check(selective, x, threads=threads, isa=isa)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("isa", runtime.usable_isas() or ["auto"])
def test_input_that_does_not_fit_a_cache_is_taken_in_pieces(stride: int, isa: str) -> None:
    """More than 64 Ki floats of pixels, behind many rows of weights: sums wait in the output between the pieces."""
    torch.manual_seed(0)
    model = randomise_bn(Small(410, 75, 3, stride, 1, groups=1, residual=True), 0).eval()
    selective = train_like(select(model).eval(), 0, spread=0.2)
    set_density(selective, 0.9)
    for threads in (1, 2):
        check(selective, torch.randn(1, 3, 15 * stride, 15 * stride), threads=threads, isa=isa)


@pytest.mark.parametrize("threads", [1, 2])
def test_every_family(family: nn.Module, threads: int) -> None:
    size = 48 if type(family).__name__ != "VGG" else 56
    x = torch.randn(3, 3, size, size)
    check(family, x, threads=threads)
    selective = train_like(select(family), spread=0.3).eval()
    if threads == 2:  # as `fit` leaves them, and as they may be before
        round_predictors(selective)
    for density in (1.0, 0.4, 0.05):
        set_density(selective, density)
        check(selective, x, threads=threads)


@pytest.mark.parametrize("mask", ["static", "dead"])
def test_layers_without_a_predictor(tiny_bottleneck: nn.Module, mask: str) -> None:
    selective = train_like(select(tiny_bottleneck), spread=0.3).eval()
    for name, gate in gates(selective).items():
        if "conv2" in name:
            if mask == "static":
                gate.dynamic.zero_()
            else:
                gate.kept.zero_()
    set_density(selective, 0.5)
    check(selective, torch.randn(2, 3, 40, 40))


def test_a_variant_with_average_pooling() -> None:
    import timm

    model = timm.create_model("resnet26d", num_classes=5, layers=(1, 1, 1, 1), channels=(4, 4, 8, 8))
    selective = train_like(select(randomise_bn(model).eval()), spread=0.3).eval()
    set_density(selective, 0.4)
    for size in (45, 64):
        check(selective, torch.randn(1, 3, size, size))


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_bits_do_not_depend_on_which_thread_was_faster(family: nn.Module, precision: str) -> None:
    """Threads do each other's units where they would wait; sums are kept by unit, so that this changes no rounding."""
    selective = train_like(select(family), spread=0.3).eval()
    x = torch.randn(1, 3, 75, 70).numpy()
    for density, threads in ((1.0, 2), (0.7, 3)):  # three on two cores never run alike
        set_density(selective, density)
        executor = runtime.compile(selective, input_size=(75, 70), threads=threads, precision=precision)
        first = executor(x)
        assert all(np.array_equal(executor(x), first) for _ in range(12))


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_threads_that_slept_join_when_they_wake(tiny_resnet: nn.Module, batch: int) -> None:
    """Whoever is awake begins; bits and counts do not depend on when the others come, or on whether they do."""
    selective = train_like(select(tiny_resnet), spread=0.3).eval()
    set_density(selective, 0.6)
    x = torch.randn(batch, 3, 47, 50).numpy()
    executor = runtime.compile(selective, input_size=(47, 50), threads=4)
    first, macs = executor.counted(x)
    for pause in [0.0, 0.003, 0.0, 0.0005, 0.001, 0.0002, 0.006] * 5:  # threads spin for about 0.1 ms, then sleep
        time.sleep(pause)
        logits, counted = executor.counted(x)
        assert np.array_equal(logits, first)
        assert np.array_equal(counted, macs)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="cores are only counted on Linux")
@pytest.mark.parametrize("batch", [2, 5])
def test_fewer_cores_than_threads(tiny_resnet: nn.Module, batch: int) -> None:
    """The team has no more members than there are cores; bits depend on the number that was asked for."""
    selective = train_like(select(tiny_resnet), spread=0.3).eval()
    set_density(selective, 0.6)
    x = torch.randn(batch, 3, 47, 50).numpy()
    logits = runtime.compile(selective, input_size=(47, 50), threads=4)(x)
    cores = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(cores)})
        alone = runtime.compile(selective, input_size=(47, 50), threads=4)
    finally:
        os.sched_setaffinity(0, cores)
    assert np.array_equal(alone(x), logits)


def test_threads_of_python_share_one_executor(tiny_resnet: nn.Module) -> None:
    selective = train_like(select(tiny_resnet), spread=0.3).eval()
    set_density(selective, 0.4)
    images = [torch.randn(2, 3, 40, 40).numpy() for _ in range(8)]
    for threads in (1, 2):
        executor = runtime.compile(selective, input_size=40, threads=threads)
        alone = [executor(x) for x in images]
        with ThreadPoolExecutor(4) as pool:
            together = list(pool.map(executor, images * 3))
        for i, logits in enumerate(together):
            assert np.array_equal(logits, alone[i % 8])


def test_a_plan_is_data(tiny_resnet: nn.Module, tmp_path: Path) -> None:
    plan = runtime.make_plan(select(tiny_resnet).eval(), 40)
    plan.save(tmp_path)
    x = torch.randn(1, 3, 40, 40).numpy()
    assert np.array_equal(runtime.Executor(runtime.Plan.load(tmp_path))(x), runtime.Executor(plan)(x))
    other = runtime.make_plan(select(tiny_resnet).eval(), 40)
    other.tensors = {name: tensor + 1 for name, tensor in other.tensors.items()}
    other.save(tmp_path / "other")
    shutil.copy(tmp_path / "other/plan.safetensors", tmp_path)
    with pytest.raises(RunFolderError, match="damaged, or of another plan"):
        runtime.Plan.load(tmp_path)
    (tmp_path / "plan.json").write_text("{}")
    with pytest.raises(RunFolderError, match="no plan"):
        runtime.Plan.load(tmp_path)
    plan.ops[0]["in_channels"] += 1
    with pytest.raises(ConfigError, match="channels"):
        runtime.Executor(plan)


@pytest.mark.parametrize("predictor", ["full", "low-rank"])
def test_the_engine_keeps_the_only_copy_of_the_weights(tiny_resnet: nn.Module, predictor: str) -> None:
    selective = train_like(select(tiny_resnet, SelectionConfig(predictor=predictor)), spread=0.3).eval()  # type: ignore[arg-type]
    set_density(selective, 0.4)
    plan = runtime.make_plan(selective, 40)
    x = torch.randn(1, 3, 40, 40).numpy()
    executor = runtime.Executor(plan)
    before = executor(x)
    assert executor.plan.tensors == {}
    large = ("weight", "predictor_weight", "predictor_reduce")
    kept = sum(a.nbytes for name, a in plan.tensors.items() if name.rsplit(".", 1)[1] in large)
    assert executor.weight_bytes >= kept > 0
    for array in plan.tensors.values():
        array.fill(7.0)  # what was lent to the engine is the caller's again
    assert np.array_equal(executor(x), before)


def test_wrong_arguments_are_named(tiny_resnet: nn.Module) -> None:
    executor = runtime.compile(tiny_resnet, input_size=40)
    with pytest.raises(ConfigError, match="40, 40"):
        executor(np.zeros((1, 3, 41, 40), np.float32))
    with pytest.raises(ConfigError, match="threads"):
        runtime.compile(tiny_resnet, input_size=40, threads=0)
    with pytest.raises(ConfigError, match="sse9"):
        runtime.compile(tiny_resnet, input_size=40, isa="sse9")
    with pytest.raises(ConfigError, match="input_size"):
        runtime.compile(tiny_resnet)


def test_what_is_not_supported_is_refused_by_name(tiny_resnet: nn.Module) -> None:
    tiny_resnet.layer2[0].act1 = nn.GELU()
    with pytest.raises(runtime.UnsupportedError, match=r"layer2\.0\.act1 \(GELU\)"):
        runtime.compile(tiny_resnet, input_size=40)


def test_the_profile_names_every_op_and_adds_up(tiny_resnet: nn.Module) -> None:
    executor = runtime.compile(select(tiny_resnet).eval(), input_size=40)
    layers = executor.profile(torch.randn(1, 3, 40, 40).numpy(), repeats=3)
    assert [layer.name for layer in layers] == [op["name"] for op in executor.plan.ops]
    convs = [layer for layer, op in zip(layers, executor.plan.ops, strict=True) if op["kind"] == "conv"]
    assert all(layer.predictor > 0 and layer.conv > 0 and layer.total > layer.conv for layer in convs)
