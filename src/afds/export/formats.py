"""Networks into files, and files back into something that computes: one writer and one reader for each format."""

from __future__ import annotations

import importlib.util
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from afds.errors import ConfigError, ExportError

SUFFIX = {"onnx": ".onnx", "openvino": ".xml", "torch": ".pt2"}
NEEDS = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("onnx", "onnxscript", "openvino"), "torch": ()}
FACTS = "afds.json"  # in a .pt2
SPARE_BYTES = 2**20  # an IR takes less than this more than an ONNX file: its .xml is wordy
Predictor = Callable[[np.ndarray], np.ndarray]  # images (B, 3, H, W) float32 -> logits (B, classes)


def check_installed(kind: str) -> None:
    """Raises ExportError naming the pip command, where a package that the format needs is not there."""
    lacking = [name for name in NEEDS[kind] if importlib.util.find_spec(name) is None]
    if lacking:
        raise ExportError(f"--format {kind} needs {', '.join(lacking)}: pip install {' '.join(lacking)}")


def files_of(path: Path) -> list[Path]:
    """All files of an export: OpenVINO keeps its weights in a second one."""
    return [path.with_suffix(".bin"), path] if path.suffix == ".xml" else [path]


# --- Writing


def write_onnx(network: nn.Module, out: Path, side: int, classes: int, facts: dict[str, Any], dynamic: bool) -> None:
    """`facts` go into metadata_props, each as JSON (texts as they are)."""
    import onnx

    made = _onnx(network, side, classes, dynamic)
    for key, value in facts.items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        made.metadata_props.append(onnx.StringStringEntryProto(key=key, value=text))
    out.write_bytes(made.SerializeToString())


def write_openvino(
    network: nn.Module, out: Path, side: int, classes: int, facts: dict[str, Any], dynamic: bool
) -> None:
    """IR in float32, .xml and .bin; `facts` go into its rt_info under "afds".

    Raises:
        OSError: there is no room for them.
    """
    import openvino

    graph = onnx_bytes(network, side, classes, dynamic)
    model = openvino.Core().read_model(io.BytesIO(graph))
    for key, value in facts.items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        model.set_rt_info(text, ["afds", key])
    try:
        openvino.save_model(model, str(out), compress_to_fp16=False)
    except RuntimeError:  # "iostream error" is all it says of a full disk; writing on where it stopped says more
        for file in files_of(out):
            with open(file, "ab") as part:
                part.write(bytes(len(graph) + SPARE_BYTES))
        raise


def write_torch(network: nn.Module, out: Path, side: int, classes: int, facts: dict[str, Any], dynamic: bool) -> None:
    """torch.export's .pt2; `facts` are its extra file `afds.json`."""
    from afds.export.skipping import skipping_network

    module = skipping_network(network, side) if dynamic else network
    with _silent(), torch.no_grad():
        shapes = None if dynamic else ({0: torch.export.Dim("batch")},)
        image = torch.zeros(1 if dynamic else 2, 3, side, side)
        program = torch.export.export(module.eval(), (image,), strict=False, dynamic_shapes=shapes)
        made = io.BytesIO()  # its writer ends the whole program where a disk is full
        torch.export.save(program, made, extra_files={FACTS: json.dumps(facts, ensure_ascii=False)})
    out.write_bytes(made.getbuffer())


def onnx_bytes(network: nn.Module, side: int, classes: int, dynamic: bool) -> bytes:
    """An ONNX file in memory."""
    return _onnx(network, side, classes, dynamic).SerializeToString()


def _onnx(network: nn.Module, side: int, classes: int, dynamic: bool) -> Any:
    if dynamic:
        from afds.export.onnx_graph import dynamic_graph

        return dynamic_graph(network, side, classes)
    with _silent(), torch.no_grad():
        program = torch.onnx.export(
            network.eval(), (torch.zeros(2, 3, side, side),), dynamo=True, verbose=False, input_names=["image"],
            output_names=["logits"], dynamic_shapes=({0: torch.export.Dim("batch")},),
        )  # fmt: skip
    assert program is not None
    return program.model_proto


@contextmanager
def _silent() -> Iterator[None]:
    """The exporters warn about their own insides."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "torch.export")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


WRITERS = {"onnx": write_onnx, "openvino": write_openvino, "torch": write_torch}


# --- Reading


def open_onnx(path: Path | bytes, threads: int = 0) -> Predictor:
    """Stock ONNX Runtime on the CPU. threads: 0 leaves the number to it."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    source = path if isinstance(path, bytes) else str(path)
    session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x_BCHW: session.run(None, {name: x_BCHW})[0]


def open_openvino(path: Path | bytes, threads: int = 0, precision: str = "f32") -> Predictor:
    """OpenVINO on the CPU, of an IR or an ONNX file. Its own default may be bf16, which is another network.

    Raises:
        ConfigError: it does not compute in this precision here.
    """
    import openvino

    core = openvino.Core()
    model = core.read_model(io.BytesIO(path) if isinstance(path, bytes) else str(path))
    options: dict[str, Any] = {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}
    if threads:
        options["INFERENCE_NUM_THREADS"] = threads
    # Its CPU plugin gives the thread in which it is loaded a stack for signals, and takes it back only if plugins end
    # in the reverse order: else what stays is freed memory, and the next signal that Python handles ends the program
    # without a word (a child's end is one, where torch loads data in processes). So that thread is one of its own.
    with ThreadPoolExecutor(1) as loading:
        compiled = loading.submit(core.compile_model, model, "CPU", options).result()
    if (got := compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()) != precision:
        raise ConfigError(f"OpenVINO computes in {got} on this CPU, not in {precision}")
    request = compiled.create_infer_request()
    return lambda x_BCHW: np.array(request.infer({0: x_BCHW})[0])


def open_torch(path: Path) -> Predictor:
    """A .pt2, as torch.export loads it."""
    module = torch.export.load(path).module()

    def predict(x_BCHW: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return module(torch.from_numpy(x_BCHW)).numpy()

    return predict


READERS: dict[str, Callable[[Path], Predictor]] = {
    "onnx": open_onnx, "openvino": open_openvino, "torch": open_torch,
}  # fmt: skip


def read_facts(path: Path | str) -> dict[str, Any]:
    """What travels with an exported file: class names, preprocessing, how it was made."""
    path = Path(path)
    if path.suffix == ".onnx":
        import onnx

        found = {p.key: p.value for p in onnx.load(path, load_external_data=False).metadata_props}
    elif path.suffix == ".xml":
        import openvino

        info = openvino.Core().read_model(str(path)).get_rt_info("afds").value
        found = {key: value if isinstance(value, str) else value.value for key, value in info.items()}
    else:
        extra = {FACTS: ""}
        torch.export.load(path, extra_files=extra)
        return json.loads(extra[FACTS])
    return {key: _value(text) for key, text in found.items()}


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
