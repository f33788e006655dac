"""The runtime among processes, threads and plans that nobody has checked: no hang, no wrong answer, no crash."""

from __future__ import annotations

import copy
import dataclasses
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from afds import runtime
from afds.errors import ConfigError, RunFolderError
from afds.selection import gates, select, set_density
from convolutions import Small, check_equal
from networks import randomise_bn, train_like

pytestmark = pytest.mark.skipif(not runtime.is_built(), reason="afds was installed without its native runtime")
linux = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="asks for a Linux process")

PRELUDE = """
import os, sys, threading, time
import afds, numpy as np, timm, torch
from afds import runtime
torch.manual_seed(0)
network = timm.create_model("resnet18", num_classes=5, layers=(1, 1, 1, 1), channels=(8, 16, 16, 24)).eval()
x = torch.randn(1, 3, 64, 64).numpy()
executor = runtime.compile(network, input_size=64, threads=THREADS)
logits = executor(x)
"""

FORK = """
def child(work):
    pid = os.fork()
    if pid == 0:
        cores = os.sched_getaffinity(0)
        work()
        assert os.sched_getaffinity(0) == cores, (cores, os.sched_getaffinity(0))
        sys.exit(0)  # what is left is torn down, as in any process
    assert os.waitpid(pid, 0)[1] == 0

def predict():
    for _ in range(20):
        assert np.array_equal(executor(x), logits)
        time.sleep(0.001)

def forget():
    global executor
    predict()
    del executor

time.sleep(0.05)  # the parent's threads are asleep
for work in (lambda: None, predict, forget):
    child(work)
    predict()
busy = True
def keep_busy():
    while busy:
        executor(x)
others = [threading.Thread(target=keep_busy) for _ in range(2)]
for thread in others: thread.start()
for _ in range(8):
    child(predict)  # another thread of the parent is in a prediction, and holds what it holds
busy = False
for thread in others: thread.join()
"""

SERVE = """
sys.path.insert(0, TESTS)
from runs import write_run
from afds.selection import SelectionConfig
write_run("run", selection=SelectionConfig())
photos = [np.random.randint(0, 255, (300, 400, 3), np.uint8) for _ in range(40)]
torch.rand(400, 400) @ torch.rand(400, 400)  # torch has threads of its own now, which a child has not
served = afds.load("run", runtime="native", threads=THREADS)
answers = [prediction.top for prediction in served.predict(photos)]
def serve():
    assert [prediction.top for prediction in served.predict(photos)] == answers
    assert served.predict(photos[0]).label == answers[0][0][0]
for _ in range(3):
    child(serve)
"""

EXIT = """
threading.Thread(target=lambda: [executor(x) for _ in range(10**9)], daemon=True).start()
time.sleep(0.2)
"""


def run_script(text: str, threads: int) -> None:
    script = (PRELUDE + text).replace("THREADS", str(threads))
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, timeout=240,
                          check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr


@linux
@pytest.mark.parametrize("threads", [1, 2])
def test_forked_children_predict_and_end(threads: int) -> None:
    run_script(FORK, threads)


@linux
@pytest.mark.parametrize("threads", [1, 2])
def test_a_model_that_was_loaded_before_a_server_forks(
    threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    children = FORK[: FORK.index("def predict")]
    run_script(children + SERVE.replace("TESTS", repr(str(Path(__file__).parent))), threads)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_daemon_thread_may_be_predicting_when_the_program_ends(threads: int) -> None:
    run_script(EXIT, threads)


@linux
def test_cores_that_are_taken_away_later_stay_away(tiny_resnet: nn.Module) -> None:
    cores = os.sched_getaffinity(0)
    if len(cores) < 2:
        pytest.skip("one core")
    x = np.zeros((1, 3, 40, 40), np.float32)
    before = set(os.listdir("/proc/self/task"))
    executor = runtime.compile(tiny_resnet, input_size=40, threads=2)
    executor(x)
    new = [int(task) for task in set(os.listdir("/proc/self/task")) - before]
    workers = [task for task in new if os.sched_getaffinity(task) != cores]  # a sanitizer has a thread of its own
    (present,) = {frozenset(os.sched_getaffinity(task)) for task in workers}
    only = cores - present  # where the worker is not: what it has anyway nobody need have told it
    try:
        for task in [0, *workers]:
            os.sched_setaffinity(task, only)
        for _ in range(3):
            executor(x)
        assert all(os.sched_getaffinity(task) == only for task in workers)
    finally:
        os.sched_setaffinity(0, cores)


def test_calls_of_one_thread_do_not_wait_for_each_other(tiny_resnet: nn.Module) -> None:
    executor = runtime.compile(tiny_resnet, input_size=64, threads=1)
    many, one = np.zeros((4000, 3, 64, 64), np.float32), np.zeros((1, 3, 64, 64), np.float32)
    executor(one)
    thread = threading.Thread(target=executor, args=(many,))
    thread.start()
    executor(one)
    assert thread.is_alive()
    thread.join()


# ------------------------------------------------------------ plans


def plan_of(model: nn.Module) -> runtime.Plan:
    return runtime.make_plan(model.eval(), 64)


def changed(plan: runtime.Plan, change: Callable[[runtime.Plan], Any]) -> runtime.Plan:
    parts = {name: copy.deepcopy(getattr(plan, name)) for name in ("buffers", "values", "ops")}
    other = dataclasses.replace(plan, **parts, tensors=dict(plan.tensors))
    change(other)
    return other


@pytest.mark.parametrize("form", [np.float64, np.float16, np.int32, "fortran", "strided"])
def test_weights_of_another_form_are_refused(tiny_resnet: nn.Module, form: Any) -> None:
    def other(plan: runtime.Plan) -> None:
        name = next(op["weight"] for op in plan.ops if op["kind"] == "conv" and op["kernel_h"] == 3)
        w = plan.tensors[name]
        plan.tensors[name] = (np.asfortranarray(w) if form == "fortran" else np.repeat(w, 2, 0)[::2]
                              if form == "strided" else w.astype(form))  # fmt: skip

    with pytest.raises(ConfigError, match="weight is of another type or not contiguous"):
        runtime.Executor(changed(plan_of(tiny_resnet), other))


def _conv(**fields: int) -> Callable[[runtime.Plan], None]:
    def change(plan: runtime.Plan) -> None:
        next(op for op in plan.ops if op["kind"] == "conv").update(fields)

    return change


def _formless(plan: runtime.Plan) -> None:
    plan.values[-1]["floats"] = False


@pytest.mark.parametrize(
    "change",
    [
        lambda plan: plan.buffers.append({"height": 65537, "width": 1, "pitch": 65536, "lead": 0, "plane": 16,
                                          "channels": 1}),
        lambda plan: plan.buffers.append({"height": 1, "width": 1, "pitch": 1, "lead": 2**31 - 16, "plane": 16,
                                          "channels": 1}),
        _conv(stride=65536), _conv(stride=46341), _conv(stride=50000), _conv(kernel_h=65536, kernel_w=65536),
        _conv(pad_h=2**30, pad_w=2**30, dilation=2**29), _formless,
        lambda plan: plan.ops.clear(), lambda plan: plan.ops.pop(),
        lambda plan: setattr(plan, "precision", "zz"),
    ],
)  # fmt: skip
def test_a_plan_that_cannot_be_followed_is_refused(
    tiny_resnet: nn.Module, change: Callable[[runtime.Plan], Any]
) -> None:
    with pytest.raises(ConfigError, match="plan"):
        runtime.Executor(changed(plan_of(tiny_resnet), change))


@pytest.mark.parametrize("damage", [b"", b"garbage", None])
def test_a_damaged_plan_is_no_plan(tiny_resnet: nn.Module, tmp_path: Path, damage: bytes | None) -> None:
    plan_of(tiny_resnet).save(tmp_path)
    if damage is None:
        (tmp_path / "plan.json").write_text("[" * 100_000)
    else:
        (tmp_path / "plan.safetensors").write_bytes(damage)
    with pytest.raises(RunFolderError, match=r"no plan|plan\.safetensors is damaged"):
        runtime.Plan.load(tmp_path)


def test_what_is_no_batch_of_images_is_refused(tiny_resnet: nn.Module) -> None:
    executor = runtime.compile(tiny_resnet, input_size=40)
    x = np.zeros((1, 3, 40, 40), np.float32)
    for wrong in (x.tolist(), torch.zeros(1, 3, 40, 40), x.astype(complex), x.astype(str)):
        with pytest.raises(ConfigError, match="takes numpy arrays of real numbers"):
            executor(wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="repeats"):
        executor.profile(x, repeats=0)


# ------------------------------------------------------------ networks that are nearly known


class Two(nn.Module):
    """Two convolutions, joined by ``join``, and a classifier."""

    def __init__(self, join: Callable[[Tensor, Tensor, Tensor], Tensor], **norm: Any) -> None:
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 4)
        self.bn = nn.BatchNorm2d(8, **norm)
        self.fc1, self.fc2 = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.join = join

    def forward(self, x: Tensor, mask: Tensor | None = None, return_features: bool = False) -> Tensor:
        return self.fc(self.join(self.bn(self.a(x)), self.b(x), x).mean((2, 3)))


def test_further_arguments_of_a_forward_are_not_the_image() -> None:
    torch.manual_seed(0)
    model = Two(lambda a, b, x: F.relu(a + b)).eval()
    x = torch.randn(2, 3, 20, 20)
    ours = runtime.compile(model, input_size=20)(x.numpy())
    with torch.no_grad():
        assert np.allclose(ours, model(x).numpy(), atol=1e-5)


def test_a_plan_is_run_where_torch_is_not() -> None:
    script = "import sys; from afds.runtime import Executor, Plan; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def test_pools_that_pad_in_their_own_way_are_refused() -> None:
    model = timm.create_model("resnet18d", num_classes=3, output_stride=16).eval()  # an AvgPool2dSame
    with pytest.raises(runtime.UnsupportedError, match="AvgPool2dSame"):
        runtime.compile(model, input_size=64)


def test_sums_with_weights_are_refused() -> None:
    with pytest.raises(runtime.UnsupportedError, match="a sum with weights"):
        runtime.compile(Two(lambda a, b, x: torch.add(a, b, alpha=2)).eval(), input_size=20)


def test_norms_without_statistics_and_odd_squeezes_are_refused() -> None:
    with pytest.raises(runtime.UnsupportedError, match="running statistics"):
        runtime.compile(Two(lambda a, b, x: a + b, track_running_stats=False).eval(), input_size=20)

    class ReadAgain(Two):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            a = F.relu(self.a(x))
            squeezed = a * torch.sigmoid(self.fc2(F.relu(self.fc1(a.mean((2, 3), keepdim=True)))))
            return self.fc((F.relu(self.b(x) + squeezed) + a).mean((2, 3)))

    with pytest.raises(runtime.UnsupportedError, match="read again"):
        runtime.compile(ReadAgain(lambda a, b, x: a).eval(), input_size=20)


# ------------------------------------------------------------ what silently gave other numbers


class Shared(nn.Module):
    """One convolution that runs twice, with a norm of its own each time."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 4)
        self.one, self.two = nn.BatchNorm2d(8), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.one(self.b(F.relu(self.a(x)))))
        return self.fc(F.relu(self.two(self.b(x))).mean((2, 3)))


def test_a_convolution_with_two_norms_is_refused_and_with_one_computed() -> None:
    torch.manual_seed(0)
    model, x = Shared().eval(), torch.randn(2, 3, 12, 12)
    with torch.no_grad():
        assert np.allclose(runtime.compile(model, input_size=12)(x.numpy()), model(x).numpy(), atol=1e-5)
    model.two.weight.data += 1
    with pytest.raises(runtime.UnsupportedError, match="b: it runs twice"):
        runtime.compile(model, input_size=12)


def test_a_sigmoid_after_channels_that_may_lose_is_refused() -> None:
    model = timm.create_model("resnet18", act_layer="sigmoid", layers=(1, 1, 1, 1), channels=(8, 8, 16, 16)).eval()
    x = torch.randn(1, 3, 40, 40)
    with torch.no_grad():
        assert np.allclose(runtime.compile(model, input_size=40)(x.numpy()), model(x).numpy(), atol=1e-4)
    with pytest.raises(runtime.UnsupportedError, match="does not keep zero"):
        runtime.compile(select(model, density=0.5).eval(), input_size=40)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("bits", [0x7FC00000, 0xFFFFFFFF, 0x7FFFFFFF, 0x7F800000])
def test_an_image_with_a_pixel_that_is_no_number_gives_logits_that_are_none(precision: str, bits: int) -> None:
    torch.manual_seed(0)
    plain = randomise_bn(timm.create_model("resnet18", num_classes=5, layers=(1, 1, 1, 1), channels=(8, 8, 16, 16)))
    chosen = train_like(select(plain.eval(), density=0.5), static=0, pruned=0).eval()
    partly = train_like(select(plain.eval(), density=0.5), static=0.5, pruned=0).eval()
    x = torch.randn(2, 3, 33, 33)
    x[0, 1, 16, 16] = torch.tensor(np.uint32(bits).view(np.int32)).view(torch.float32)
    for model in (plain.eval(), chosen, partly):
        with torch.no_grad():
            want = torch.isnan(model(x))
        for isa in runtime.usable_isas(precision):
            got = np.isnan(runtime.compile(model, input_size=33, precision=precision, isa=isa)(x.numpy()))
            assert got.tolist() == want.tolist() == [[True] * 5, [False] * 5], (type(model), isa)


def test_constants_are_not_capped_as_predictions_are() -> None:
    model = select(randomise_bn(Small(6, 8, 3, 1, 1, 1, False).eval(), zeros=0)).eval()
    gate = gates(model)["conv"]
    with torch.no_grad():
        gate.dynamic[0] = False
        gate.gamma[0] = 3 * float(gate.predictor.ceiling)  # worth more than what channel 1 is predicted
        gate.predictor.bias[1] = 0.9 * float(gate.predictor.ceiling)
        gate.importance[1] = 2.0
    set_density(model, {"conv": 1 / 8})
    x = torch.randn(2, 3, 9, 9)
    check_equal(runtime.compile(model, input_size=9), model, x, 1e-4)
    assert gate.active_BC is not None
    assert gate.active_BC[:, 0].all()


@pytest.mark.parametrize("wrong", [{"threads": 0}, {"threads": 2000}, {"threads": 1.5}, {"threads": "2"}, {"isa": "zz"},
                                   {"input_size": 33.0}, {"input_size": (40,)}, {"input_size": "40"}])  # fmt: skip
def test_wrong_arguments_are_named(tiny_resnet: nn.Module, wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"^{next(iter(wrong))} is "):
        runtime.compile(tiny_resnet, **{"input_size": 40, **wrong})
    assert runtime.compile(tiny_resnet, input_size=np.int64(40), threads=np.int64(1)).threads == 1  # type: ignore[arg-type]


def test_a_plan_without_weights_is_not_saved_and_an_executor_not_copied(tiny_resnet: nn.Module, tmp_path: Path) -> None:
    executor = runtime.compile(tiny_resnet, input_size=40)
    with pytest.raises(ConfigError, match="without the weights"):
        executor.plan.save(tmp_path / "plan")
    assert not (tmp_path / "plan").exists()
    (tmp_path / "file").touch()
    with pytest.raises(RunFolderError, match=r"file/plan: cannot be made \(Not a directory\)"):
        plan_of(tiny_resnet).save(tmp_path / "file/plan")
    with pytest.raises(TypeError, match="compile the run again"):
        copy.deepcopy(executor)


# ------------------------------------------------------------ several Python threads, in PyTorch


def test_networks_are_compiled_while_others_run() -> None:
    """While fx traces, `nn.Module` is patched for the whole process."""
    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=5, layers=(1, 1, 1, 1), channels=(8, 8, 16, 16)).eval()
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        want = model(x)
    done = threading.Event()

    def run() -> int:
        calls = 0
        with torch.no_grad():
            while not done.is_set() or not calls:
                assert torch.equal(model(x), want)
                calls += 1
        return calls

    with ThreadPoolExecutor(4) as pool:
        running = pool.submit(run)
        compiled = [pool.submit(lambda: runtime.compile(model, input_size=32)) for _ in range(6)]
        try:
            for future in compiled:
                assert np.allclose(future.result()(x.numpy()), want.numpy(), atol=1e-5)
        finally:
            done.set()
        assert running.result() > 0


@pytest.mark.parametrize("family", ["resnet18", "mobilenetv2_100"])
def test_two_threads_run_one_selective_network(family: str) -> None:
    torch.manual_seed(0)
    small: dict[str, Any] = {"layers": (1, 1, 1, 1), "channels": (8, 8, 16, 16)} if family == "resnet18" else {}
    model = select(randomise_bn(timm.create_model(family, num_classes=5, **small)), density=0.4)
    model = train_like(model, static=0, pruned=0, spread=0.5).eval()
    images = [torch.randn(4, 3, 33, 33), -torch.randn(3, 3, 33, 33)]
    with torch.inference_mode():
        want = [model(x_BCHW) for x_BCHW in images]

    def run(i: int) -> None:
        with torch.inference_mode():
            for _ in range(20):
                assert torch.allclose(model(images[i]), want[i], rtol=1e-3, atol=1e-5)

    with ThreadPoolExecutor(2) as pool:
        for future in [pool.submit(run, i) for i in (0, 1)]:
            future.result()
