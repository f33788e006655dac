"""Where weights come from, and what is said when they do not."""

from __future__ import annotations

import json
import pickle
import socket
import time
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import constants as hub
from safetensors.torch import save_file
from torch import nn

from afds import sources
from afds.errors import AfdsError, SourceError
from afds.selection import select
from afds.sources import check_supported, create, load_source, parse_source, read_weights

TINY = {"layers": [1, 1, 1, 1], "channels": [8, 16, 16, 24]}


@pytest.fixture
def weights(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A tiny ResNet-18 of seven classes, its convolutions in half precision as in the given files."""
    state = timm.create_model("resnet18", num_classes=7, **TINY).state_dict()
    state = {n: t.half() if t.dim() == 4 else t for n, t in state.items()}
    save_file(state, tmp_path / "tiny.safetensors")
    return tmp_path / "tiny.safetensors", state


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Empty caches, and a network that refuses every connection."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError("no network in tests")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "torch"))


# --- What --source may say


def test_forms(weights: tuple[Path, dict[str, torch.Tensor]]) -> None:
    file = weights[0]
    assert parse_source("resnet50") == sources.SourceSpec("resnet50", None)
    assert parse_source("resnet50.a1_in1k") == sources.SourceSpec("resnet50.a1_in1k", None)
    assert parse_source(f"resnet18:{file}") == sources.SourceSpec("resnet18", file)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("resnet5o", "no timm network called 'resnet5o'. Near to it are: .*resnet50"),
        ("", "no timm network called ''"),
        ("my model", "no timm network called 'my model'"),
        ("resnet50.nosuch", r"knows resnet50, but not resnet50\.nosuch.*resnet50\.a1_in1k"),
        ("resnet18:", "no file is named"),
        ("resnet18:nowhere.safetensors", r"nowhere\.safetensors is missing"),
        ("resnet18:.", "is a folder"),
        ("weights.safetensors", "say which network .* `--source resnet50:weights.safetensors`"),
        ("hf-hub:somebody/something", "no timm network called 'hf-hub'"),
        ("local-dir:nowhere", r"nowhere/config\.json: cannot be read"),
    ],
)
def test_mistakes_are_answered_with_the_way_out(spec: str, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        parse_source(spec)


def test_a_run_that_has_not_finished_is_called_so(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SourceError, match=f"not finished. Go on with it: afds fit --resume {tmp_path}"):
        parse_source(str(tmp_path))


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "weights.onnx").write_bytes(b"x")
    with pytest.raises(SourceError, match=r"weights come as \.safetensors.*not as \.onnx"):
        parse_source(f"resnet18:{tmp_path / 'weights.onnx'}")


# --- Weights from a file


def test_weights_arrive_and_the_classifier_is_fresh(weights: tuple[Path, dict[str, torch.Tensor]]) -> None:
    file, state = weights
    source = load_source(f"resnet18:{file}", num_classes=7, arch_args=TINY)  # as many classes as in the file
    ours = source.model.state_dict()
    assert all(t.dtype in (torch.float32, torch.int64) for t in ours.values())
    for name, tensor in state.items():
        same = torch.equal(ours[name], tensor.to(ours[name].dtype))
        assert same != name.startswith("fc."), name
    assert source.model.num_classes == 7
    assert source.arch_args == TINY
    assert str(file) in source.origin
    assert len(source.weights_sha256 or "") == 64
    assert set(source.pretrained_cfg) == set(sources.PREPROCESSING)
    json.dumps(source.pretrained_cfg)


def test_another_number_of_classes(weights: tuple[Path, dict[str, torch.Tensor]]) -> None:
    source = load_source(f"resnet18:{weights[0]}", num_classes=3, arch_args=TINY)
    assert source.model(torch.zeros(2, 3, 32, 32)).shape == (2, 3)
    assert source.model.training


def test_the_head_is_kept_when_asked_for(weights: tuple[Path, dict[str, torch.Tensor]]) -> None:
    file, state = weights
    source = load_source(f"resnet18:{file}", num_classes=7, arch_args=TINY, keep_head=True)
    assert torch.equal(source.model.fc.weight, state["fc.weight"])
    with pytest.raises(SourceError, match=r"fc\.weight is 7 x 24 in the file and 3 x 24"):
        load_source(f"resnet18:{file}", num_classes=3, arch_args=TINY, keep_head=True)


@pytest.mark.parametrize("wrapped", [False, True])
def test_torch_files_are_read_without_unpickling_more_than_tensors(
    weights: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path, wrapped: bool
) -> None:
    state = weights[1]
    file = tmp_path / "tiny.pth"
    torch.save({"epoch": 3, "state_dict": {f"module.{n}": t for n, t in state.items()}} if wrapped else state, file)
    model = load_source(f"resnet18:{file}", num_classes=3, arch_args=TINY).model
    assert torch.equal(model.layer1[0].conv1.weight, state["layer1.0.conv1.weight"].float())


def test_a_hostile_pickle_is_not_executed(tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> tuple[object, tuple[Path]]:
            return Path.touch, (tmp_path / "executed",)

    (tmp_path / "bad.pth").write_bytes(pickle.dumps({"conv1.weight": Attack()}, protocol=2))
    torch.save({"conv1.weight": Attack()}, tmp_path / "bad2.pth")
    for name in ("bad.pth", "bad2.pth"):
        with pytest.raises(SourceError, match=name):
            read_weights(tmp_path / name)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("damage", ["empty", "truncated", "garbled", "text"])
def test_damaged_files_are_named(
    weights: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path, suffix: str, damage: str
) -> None:
    file = tmp_path / f"damaged{suffix}"
    if suffix == ".pth":
        torch.save(weights[1], file)
        whole = file.read_bytes()
    else:
        whole = weights[0].read_bytes()
    content = {"empty": b"", "truncated": whole[: len(whole) // 2], "garbled": whole[500:1500], "text": b"not found"}
    file.write_bytes(content[damage])
    with pytest.raises(SourceError, match=rf"damaged\{suffix}.*(truncated|damaged)"):
        load_source(f"resnet18:{file}", num_classes=3, arch_args=TINY)


def test_a_file_without_weights(tmp_path: Path) -> None:
    torch.save({"epoch": 3}, tmp_path / "a.pth")
    with pytest.raises(SourceError, match="'epoch' is no tensor"):
        read_weights(tmp_path / "a.pth")
    save_file({}, tmp_path / "b.safetensors")
    with pytest.raises(SourceError, match="it is empty"):
        read_weights(tmp_path / "b.safetensors")
    with pytest.raises(SourceError, match="no such file"):
        read_weights(tmp_path / "c.pth")


def test_weights_that_are_not_finite(weights: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    state = dict(weights[1])
    state["layer2.0.bn1.bias"] = torch.full_like(state["layer2.0.bn1.bias"], float("nan"))
    save_file(state, tmp_path / "nan.safetensors")
    with pytest.raises(SourceError, match=r"nan\.safetensors: layer2\.0\.bn1\.bias .*NaN"):
        load_source(f"resnet18:{tmp_path / 'nan.safetensors'}", num_classes=3, arch_args=TINY)


def test_weights_of_another_architecture_are_refused_in_words(
    weights: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    file, state = weights
    with pytest.raises(SourceError, match=r"conv1\.weight is 8 x 64 x 3 x 3 in the file and 16 x 64 x 3 x 3"):
        load_source(f"resnet18:{file}", num_classes=3, arch_args={**TINY, "channels": [16, 16, 16, 24]})
    with pytest.raises(SourceError, match=r"tiny\.safetensors: .*64 in the file and 16 .*differences in all.*NAME:"):
        load_source(f"mobilenetv3_small_050:{file}", num_classes=3)
    deeper = {**state, "layer1.1.conv1.weight": torch.zeros(8, 8, 3, 3)}  # all that is wanted is there, and more
    save_file(deeper, tmp_path / "deeper.safetensors")
    with pytest.raises(SourceError, match=r"the file has layer1\.1\.conv1\.weight .8 x 8 x 3 x 3., which resnet18"):
        load_source(f"resnet18:{tmp_path / 'deeper.safetensors'}", num_classes=3, arch_args=TINY)
    lacking = {n: t for n, t in state.items() if n != "layer3.0.conv2.weight" and not n.startswith("fc.")}
    save_file(lacking, tmp_path / "lacking.safetensors")
    with pytest.raises(SourceError, match=r"the file has no layer3\.0\.conv2\.weight .16 x 16 x 3 x 3."):
        load_source(f"resnet18:{tmp_path / 'lacking.safetensors'}", num_classes=3, arch_args=TINY)


def test_a_backbone_without_classifier_or_counters_will_do(
    weights: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    state = {n: t for n, t in weights[1].items() if not n.startswith("fc.") and "num_batches" not in n}
    save_file(state, tmp_path / "backbone.safetensors")
    model = load_source(f"resnet18:{tmp_path / 'backbone.safetensors'}", num_classes=3, arch_args=TINY).model
    assert torch.equal(model.bn1.weight, state["bn1.weight"])


@pytest.mark.slow
def test_names_that_timm_can_translate_are_translated(tmp_path: Path) -> None:
    """torchvision's VGG has a `classifier` of linear layers, timm's has convolutions."""
    state = timm.create_model("vgg11_bn").state_dict()
    theirs = {"pre_logits.fc1": "classifier.0", "pre_logits.fc2": "classifier.3", "head.fc": "classifier.6"}
    renamed = {}
    for name, tensor in state.items():
        layer, _, kind = name.rpartition(".")
        flat = tensor.flatten(1) if layer in theirs and tensor.dim() > 1 else tensor
        renamed[f"{theirs.get(layer, layer)}.{kind}"] = flat.contiguous()
    save_file(renamed, tmp_path / "vgg.safetensors")
    model = load_source(f"vgg11_bn:{tmp_path / 'vgg.safetensors'}", num_classes=3).model
    for name, tensor in model.state_dict().items():
        assert name.startswith("head.fc") or torch.equal(tensor, state[name]), name


def test_local_dir(weights: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    folder.mkdir()
    save_file(weights[1], folder / "model.safetensors")
    cfg = {"mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2], "interpolation": "bilinear", "input_size": [3, 96, 96]}
    config = {"architecture": "resnet18", "num_classes": 7, "model_args": TINY, "pretrained_cfg": cfg}
    (folder / "config.json").write_text(json.dumps(config))
    source = load_source(f"local-dir:{folder}", num_classes=3)
    assert torch.equal(source.model.layer1[0].conv1.weight, weights[1]["layer1.0.conv1.weight"].float())
    assert source.pretrained_cfg["mean"] == [0.5, 0.5, 0.5]
    assert source.pretrained_cfg["input_size"] == [3, 96, 96]
    assert source.arch_args == TINY
    for broken, message in (("{", "not readable as JSON"), ("[]", "which timm does not know"),
                            ('{"architecture": "resnet18", "model_args": 3}', "not an object")):  # fmt: skip
        (folder / "config.json").write_text(broken)
        with pytest.raises(SourceError, match=message):
            load_source(f"local-dir:{folder}", num_classes=3)


# --- timm's own weights


@pytest.mark.usefixtures("no_hub")
def test_no_hub_is_said_at_once() -> None:
    start = time.monotonic()
    with pytest.raises(SourceError, match=r"weights of resnet18 are not in the cache.*--source resnet18:path/to/"):
        load_source("resnet18", num_classes=3)
    assert time.monotonic() - start < 20  # a hub's retries take most of a minute
    with pytest.raises(SourceError, match="not in the cache"):
        load_source("resnet18.tv_in1k", num_classes=3)


@pytest.mark.usefixtures("no_hub")
def test_cached_weights_need_no_hub(tmp_path: Path) -> None:
    state = timm.create_model("mobilenetv3_small_050").state_dict()
    name = timm.get_pretrained_cfg("mobilenetv3_small_050").hf_hub_id.replace("/", "--")
    repo = tmp_path / "hub" / f"models--{name}"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("0" * 40)
    (repo / "snapshots" / ("0" * 40)).mkdir(parents=True)
    save_file(state, repo / "snapshots" / ("0" * 40) / "model.safetensors")
    source = load_source("mobilenetv3_small_050", num_classes=3)
    assert torch.equal(source.model.conv_stem.weight, state["conv_stem.weight"])
    assert source.origin == "mobilenetv3_small_050.lamb_in1k, timm's weights"
    assert source.weights_sha256


@pytest.mark.usefixtures("no_hub")
def test_an_architecture_without_pretrained_weights() -> None:
    with pytest.raises(SourceError, match=r"no pretrained weights for seresnet18; pass .*choose one that has some"):
        load_source("seresnet18", num_classes=3)


def test_a_hub_that_answers_is_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """timm does the loading, with the source's own classes, so that nothing of the head's shape can go wrong."""
    asked: list[dict[str, object]] = []
    plain = timm.create_model

    def loading(arch: str, *, pretrained: bool = False, **kwargs: object) -> nn.Module:
        if pretrained:
            asked.append({"arch": arch, **kwargs})
        torch.manual_seed(7)
        return plain(arch, pretrained=False, **kwargs)

    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(sources, "_reachable", lambda _: True)
    monkeypatch.setattr(sources.timm, "create_model", loading)
    source = load_source("mobilenetv3_small_050", num_classes=1000)
    assert asked == [{"arch": "mobilenetv3_small_050", "num_classes": 1000}]
    assert source.weights_sha256 is None

    def broken(arch: str, *, pretrained: bool = False, **kwargs: object) -> nn.Module:
        if pretrained:
            raise ConnectionError("reset by peer")
        return plain(arch, pretrained=False, **kwargs)

    monkeypatch.setattr(sources.timm, "create_model", broken)
    with pytest.raises(SourceError, match="cannot load mobilenetv3_small_050: reset by peer"):
        load_source("mobilenetv3_small_050", num_classes=3)


def test_reachable_says_what_a_socket_says(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert sources._reachable(f"http://127.0.0.1:{port}")
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{port}")
        monkeypatch.setenv("no_proxy", "")
        assert sources._reachable("http://host.invalid")  # the proxy is what must answer
        monkeypatch.delenv("http_proxy")
    assert not sources._reachable(f"http://127.0.0.1:{port}")
    monkeypatch.setattr(sources, "HUB_SECONDS", 0.05)

    def silent(*args: object, **kwargs: object) -> None:
        time.sleep(0.3)
        raise OSError("the name server did not answer")

    monkeypatch.setattr(socket, "create_connection", silent)
    assert not sources._reachable("http://host.invalid")


# --- From scratch, and plain networks


def test_scratch_touches_no_weights_and_starts_no_block_at_zero() -> None:
    source = load_source("resnet18", num_classes=3, arch_args=TINY, scratch=True)
    assert source.weights_sha256 is None
    assert "random" in source.origin
    assert all(m.weight.any() for m in source.model.modules() if isinstance(m, nn.BatchNorm2d))
    selected = select(source.model).train()
    selected(torch.randn(4, 3, 32, 32)).square().sum().backward()
    assert selected.layer1[0].conv2.gate.predictor.bias.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("arch", "classes", "args"),
    [
        ("resnet18", 0, {}),
        ("resnet18", 3, {"no_such_argument": 1}),
        ("resnet18", 3, {"pretrained_cfg": {"file": "x"}}),
        ("local-dir:/tmp", 3, {}),
        ("regnetx_002", 3, {"layers": [1]}),
    ],
)
def test_what_cannot_be_built_is_refused(arch: str, classes: int, args: dict[str, object]) -> None:
    with pytest.raises(AfdsError):
        create(arch, classes, args)


# --- What afds can work with


def test_a_supported_network_passes_and_its_cost_comes_back() -> None:
    cost = check_supported(create("resnet18", 5, TINY), input_size=64)
    assert cost.dense == cost.counted > 1e6
    assert cost.images == 1


@pytest.mark.parametrize(
    ("arch", "reason"),
    [
        ("densenet121", r"densenet121 is not supported\. .*features\.denseblock1"),
        ("convnext_atto", r"convnext_atto is not supported\. .*LayerNorm"),
        ("res2net50_26w_4s", r"res2net50_26w_4s is not supported\. .*cannot be counted"),
    ],
)
def test_an_unsupported_network_is_refused_before_training(arch: str, reason: str) -> None:
    model = create(arch, 2)
    with pytest.raises(SourceError, match=reason) as caught:
        check_supported(model, input_size=64)
    assert "While executing" not in str(caught.value)


def test_an_unsupported_network_is_refused_before_its_weights_are_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_timm_weights", lambda *args: pytest.fail("fetched"))
    with pytest.raises(SourceError, match=r"densenet121 is not supported"):
        load_source("densenet121", num_classes=4)


def test_images_too_small_for_the_network_are_named() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 9), nn.BatchNorm2d(4))
    with pytest.raises(SourceError, match="Sequential cannot run on 4 x 4 images"):
        check_supported(model, input_size=4)


# --- The real files


@pytest.mark.data
@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_the_given_weights_load_in_float32(afds_data: Path, arch: str) -> None:
    file = afds_data / "weights" / f"{arch}_imagenet.safetensors"
    source = load_source(f"{arch}:{file}", num_classes=1000, keep_head=True)
    given = read_weights(file)
    for name, tensor in source.model.state_dict().items():
        assert tensor.dtype in (torch.float32, torch.int64)
        assert torch.equal(tensor, given[name].to(tensor.dtype)), name
    fresh = load_source(f"{arch}:{file}", num_classes=1000).model
    assert not torch.equal(fresh.get_classifier().weight, given["fc.weight"].float())
    other = {"resnet18": "resnet50", "resnet50": "resnet18"}[arch]
    with pytest.raises(SourceError, match=f"these are not weights of {other}"):
        load_source(f"{other}:{file}", num_classes=3)
