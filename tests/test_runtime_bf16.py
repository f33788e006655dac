"""The native runtime in bf16: against PyTorch with the inputs and weights of its convolutions rounded to bf16.

A value that float32 sums in another order put on the other side of a rounding's boundary differs by 2^-8: rarely, and
by one term of a sum, which is what the tolerances leave room for. A winner can change by it too, in deep networks.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import afds
import afds.runtime as runtime
from afds.cli import main
from afds.cost import CostMeter
from afds.errors import ConfigError
from afds.runtime.fold import in_pairs
from afds.selection import SelectionConfig, gates, round_predictors, select, set_density
from convolutions import Small, cases, check_equal
from networks import randomise_bn, train_like
from runs import write_photos, write_run

pytestmark = pytest.mark.skipif(not runtime.is_built(), reason="afds was installed without its native runtime")
ISAS = runtime.usable_isas("bf16") or ["auto"]


def rounded(model: nn.Module, plan: runtime.Plan) -> nn.Module:
    """A copy that multiplies bf16 numbers and sums up in float32, in each convolution that the runtime does so.

    A residual is bf16 too where the plan has it in no other form: the input of a block, or, of a block whose shortcut
    is a convolution, the main branch.
    """

    def round_input(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (inputs[0].bfloat16().float(),)

    def round_output(_: nn.Module, inputs: object, output: torch.Tensor) -> torch.Tensor:
        return output.bfloat16().float()

    model = copy.deepcopy(model)
    squeeze = ("se.", "fc1", "fc2", "conv_reduce", "conv_expand")  # products of pooled features stay in float32
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and in_pairs(module) and not any(part in name for part in squeeze):
            module.weight.data = module.weight.data.bfloat16().float()
            module.register_forward_pre_hook(round_input)
    maker = {op["y"]: op["name"] for op in plan.ops if "y" in op}
    for op in plan.ops:
        residual = op.get("residual", -1)
        if residual < 0 or plan.values[residual]["floats"]:
            continue
        if isinstance(model, Small):
            model.term.register_forward_hook(round_output)
            continue
        # Its block: `layer1.0` of `layer1.0.downsample.0`, `s1.b1` of `s1.b1.conv3.conv`, `blocks.1.1` of MobileNets.
        name = ".".join(op["name"].split(".")[: 3 if op["name"].startswith("blocks.") else 2])
        if maker[residual].startswith(name + "."):
            last = maker[residual].removeprefix(name + ".")
            norm = last.removesuffix(".conv") if last.endswith(".conv") else last.replace("conv", "bn")
            model.get_submodule(f"{name}.{norm}").register_forward_hook(round_output)
        else:
            model.get_submodule(name).register_forward_pre_hook(round_input)
    return model


def error(got: np.ndarray, want: torch.Tensor) -> float:
    """The largest difference, relative to the largest logit."""
    return float(np.abs(got - want.numpy()).max()) / max(1e-3, float(want.abs().max()))


def check(model: nn.Module, x_BCHW: torch.Tensor, *, threads: int = 1, isa: str = "auto") -> None:
    """Equal logits, equal active channels and equal MACs, image by image."""
    executor = runtime.compile(model, input_size=tuple(x_BCHW.shape[2:]), threads=threads, isa=isa, precision="bf16")
    check_equal(executor, rounded(model, executor.plan), x_BCHW, 1e-3)


@settings(max_examples=40)
@given(
    case=cases(), height=st.integers(5, 23), width=st.integers(5, 40), batch=st.integers(1, 3),
    threads=st.integers(1, 3), density=st.sampled_from([0.01, 0.3, 0.7, 1.0]), masks=st.booleans(), low=st.booleans(),
    group=st.sampled_from([1, 1, 2, 3, 8]),
    isa=st.sampled_from(ISAS), seed=st.integers(0, 5),
)  # fmt: skip
def test_any_convolution(case, height, width, batch, threads, density, masks, low, group, isa, seed) -> None:
    torch.manual_seed(seed)
    case = {**case, "cin": group * case["cin"], "cout": group * case["cout"]}
    model = randomise_bn(Small(**case).eval(), seed)
    x = torch.randn(batch, 3, height, width)
    check(model, x, threads=threads, isa=isa)
    selective = select(model, SelectionConfig(predictor="low-rank" if low else "full", group=group)).eval()
    train_like(selective, seed, static=0.4 if masks else 0.0, pruned=0.3 if masks else 0.0, spread=0.5)
    round_predictors(selective)
    set_density(selective, density)
    check(selective, x, threads=threads, isa=isa)


@settings(max_examples=40)
@given(
    cin=st.integers(1, 130), cout=st.integers(1, 90), kernel=st.sampled_from([1, 3, 3]), stride=st.integers(1, 2),
    residual=st.booleans(), height=st.integers(1, 5), width=st.integers(1, 5), threads=st.integers(1, 3),
    losing=st.sampled_from([0.0, 0.0, 2.0]), isa=st.sampled_from(ISAS),
)  # fmt: skip
def test_channels_are_lanes_on_small_maps(
    cin, cout, kernel, stride, residual, height, width, threads, losing, isa
) -> None:
    torch.manual_seed(0)
    model = Small(cin, cout, kernel, stride, kernel // 2, groups=1, residual=residual).eval()
    x = torch.randn(3, 3, height, width)
    check(randomise_bn(model, 0), x, threads=threads, isa=isa)
    selective = train_like(select(model).eval(), 0, spread=0.2)
    round_predictors(selective)
    set_density(selective, 1.0)
    for gate in gates(
        selective
    ).values():  # at `losing` some channels lose on some images: then pixels are lanes, or a scale is zero on AMX
        assert gate.predictor.bias is not None
        gate.predictor.bias.data -= losing * torch.rand_like(gate.predictor.bias)
    check(selective, x, threads=threads, isa=isa)


@settings(max_examples=40)
@given(
    cin=st.integers(1, 40), kernel=st.integers(1, 4), stride=st.integers(1, 3), padded=st.booleans(),
    residual=st.booleans(), height=st.integers(4, 40), width=st.integers(4, 40), threads=st.integers(1, 3),
    density=st.sampled_from([0.4, 1.0, 1.0]), losing=st.sampled_from([0.0, 2.0]), isa=st.sampled_from(ISAS),
)  # fmt: skip
def test_the_largest_of_a_window_is_found_in_pairs(
    cin, kernel, stride, padded, residual, height, width, threads, density, losing, isa
) -> None:
    torch.manual_seed(0)
    largest = (kernel, stride, kernel // 2 if padded else 0)
    model = Small(cin, 7, 3, 1, 1, groups=1, residual=residual, largest=largest).eval()
    x = torch.randn(2, 3, height, width)
    check(randomise_bn(model, 0), x, threads=threads, isa=isa)
    selective = train_like(select(model).eval(), 0, spread=0.3)
    round_predictors(selective)
    set_density(selective, density)
    for gate in gates(selective).values():
        assert gate.predictor.bias is not None
        gate.predictor.bias.data -= losing * torch.rand_like(gate.predictor.bias)
    check(selective, x, threads=threads, isa=isa)
    plan = runtime.make_plan(selective, (height, width), "bf16")
    pool = next(op for op in plan.ops if op["kind"] == "pool")
    assert not any(plan.values[pool[end]]["floats"] for end in ("x", "y"))
    assert not plan.values[plan.input]["floats"]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("isa", ISAS)
def test_every_family(family: nn.Module, threads: int, isa: str) -> None:
    size = 48 if type(family).__name__ != "VGG" else 56
    x = torch.randn(3, 3, size, size)
    selective = train_like(select(family), spread=0.3).eval()
    for model, density in ((family, 1.0), (selective, 1.0), (selective, 0.4), (selective, 0.05)):
        if model is selective:
            set_density(selective, density)
        executor = runtime.compile(model, input_size=size, threads=threads, isa=isa, precision="bf16")
        logits, macs = executor.counted(x.numpy())
        want, cost = CostMeter(model)(x)
        assert macs.mean() == pytest.approx(cost.counted, rel=0.01)
        assert error(logits, want) <= 0.1
        with torch.no_grad():
            assert error(logits, rounded(model, executor.plan)(x)) <= 0.02


@pytest.mark.parametrize("density", [1.0, 0.4])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_stream_that_a_pool_reads_too(threads: int, density: float) -> None:
    """ResNet-D: where a stage ends the stream is float32 too; channels that only the residual has move there."""
    torch.manual_seed(0)
    model = timm.create_model("resnet26d", num_classes=5, layers=(2, 2, 1, 1), channels=(4, 4, 8, 8))
    selective = train_like(select(randomise_bn(model)), spread=0.3).eval()
    set_density(selective, density)
    x = torch.randn(2, 3, 48, 48)
    executor = runtime.compile(selective, input_size=48, threads=threads, precision="bf16")
    values = executor.plan.values
    mixed = [op for op in executor.plan.ops if op.get("residual", -1) >= 0 and values[op["y"]]["floats"]
             and not values[op["residual"]]["floats"]]  # fmt: skip
    assert mixed
    with torch.no_grad():
        assert error(executor(x.numpy()), rounded(selective, executor.plan)(x)) <= 0.01


@pytest.mark.parametrize("mask", ["static", "dead"])
@pytest.mark.parametrize("isa", ISAS)
def test_layers_without_a_predictor(tiny_bottleneck: nn.Module, mask: str, isa: str) -> None:
    selective = train_like(select(tiny_bottleneck), spread=0.3).eval()
    for name, gate in gates(selective).items():
        if "conv2" in name:
            if mask == "static":
                gate.dynamic.zero_()
            else:
                gate.kept.zero_()
    set_density(selective, 0.5)
    x = torch.randn(2, 3, 40, 40)
    executor = runtime.compile(selective, input_size=40, isa=isa, precision="bf16", threads=2)
    with torch.no_grad():
        assert error(executor(x.numpy()), rounded(selective, executor.plan)(x)) <= 0.01


def test_images_leave_nothing_behind(tiny_bottleneck: nn.Module) -> None:
    """Halves of pairs that an image does not fill are zero, whatever the one before it left there."""
    selective = train_like(select(tiny_bottleneck), spread=0.6).eval()
    set_density(selective, 0.3)
    images = torch.randn(6, 3, 40, 40).numpy()
    for threads in (1, 2):
        executor = runtime.compile(selective, input_size=40, precision="bf16", threads=threads)
        fresh = [
            runtime.compile(selective, input_size=40, precision="bf16", threads=threads)(x[None])[0] for x in images
        ]
        for order in (range(6), reversed(range(6))):
            for i in order:
                assert np.array_equal(executor(images[i : i + 1])[0], fresh[i])


def test_weights_take_half_the_memory_and_a_plan_keeps_them(tiny_resnet: nn.Module, tmp_path: Path) -> None:
    plan = runtime.make_plan(tiny_resnet, 40, "bf16")
    plan.save(tmp_path)
    executor, again = runtime.Executor(plan), runtime.Executor(runtime.Plan.load(tmp_path))
    x = torch.randn(1, 3, 40, 40).numpy()
    assert np.array_equal(executor(x), again(x))
    large = [a for name, a in plan.tensors.items() if name.endswith(".halves")]
    assert len(large) == sum(isinstance(m, nn.Conv2d) for m in tiny_resnet.modules())
    whole = runtime.make_plan(tiny_resnet, 40)
    assert 2 * sum(a.nbytes for a in large) == sum(
        a.nbytes for name, a in whole.tensors.items() if name.endswith(".weight") and "fc" not in name
    )


def test_wrong_arguments_are_named(tiny_resnet: nn.Module) -> None:
    with pytest.raises(ConfigError, match="float32, bf16"):
        runtime.compile(tiny_resnet, input_size=40, precision="int4")
    with pytest.raises(ConfigError, match="avx512_bf16"):
        runtime.compile(tiny_resnet, input_size=40, isa="avx512_bf16")  # of bf16 only
    plan = runtime.make_plan(tiny_resnet, 40, "bf16")
    plan.values[plan.input] |= {"pairs": "none", "floats": True}
    with pytest.raises(ConfigError, match="pairs"):
        runtime.Executor(plan)


def test_an_engine_without_an_input_says_so() -> None:
    from afds.runtime import _kernels

    engine = _kernels.Engine(1, "auto", False)
    x = np.zeros((1, 3, 8, 8), np.float32)
    for run in (engine.run, engine.run_counted, engine.run_profiled, engine.run_recorded):
        with pytest.raises(ValueError, match="no input"):
            run(x)


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, photos = tmp_path / "run", tmp_path / "photos"
    write_run(run, selection=None)
    write_photos(photos, each=2)
    outputs = {}
    for precision in ("float32", "bf16"):
        options = [str(run), str(photos), "--runtime", "native", "--precision", precision, "--json"]
        assert main(["predict", *options]) == 0
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        outputs[precision] = [{e["label"]: e["probability"] for e in line["top"]} for line in lines]
        assert main(["evaluate", *options]) == 0
        assert json.loads(capsys.readouterr().out)["counted_macs"] > 0
    assert outputs["bf16"] != outputs["float32"]
    for a, b in zip(outputs["bf16"], outputs["float32"], strict=True):
        assert a == pytest.approx(b, abs=0.05)
    assert main(["evaluate", str(run), str(photos), "--precision", "bf16"]) == 2
    assert "--runtime native" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="runtime='native'"):
        afds.load(run, precision="bf16")
