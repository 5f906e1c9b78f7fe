"""Builds with the real TensorRT-RTX, which needs no GPU, and the logic around them."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections import Counter
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pcn_deploy.engines.base import GraphSource
from pcn_deploy.engines.registry import get_backend
from pcn_deploy.engines.tensorrt import cuda, library
from pcn_deploy.engines.tensorrt.backend import TensorRTBackend, TensorRTRTXBackend
from pcn_deploy.engines.tensorrt.build import BuildOptions, build
from pcn_deploy.engines.tensorrt.cuda import Device
from pcn_deploy.engines.tensorrt.flavour import TENSORRT, TENSORRT_RTX, Flavour
from pcn_deploy.engines.tensorrt.messages import log_of
from pcn_deploy.engines.tensorrt.wanted import check_precision, wanted_by
from pcn_deploy.errors import BuildError, DependencyError, OptionError
from pcn_deploy.progress import silent
from pcn_deploy.remedies import install
from pcn_deploy.specs import BatchRange, EngineSpec, TensorSpec

onnx = pytest.importorskip("onnx")

RANGE = BatchRange(min=1, opt=2, max=4)


def rtx() -> Any:
    """The real library. Where its package is installed, a library that does not load fails the test."""
    if find_spec(TENSORRT_RTX.module) is None:
        pytest.skip(f"TensorRT-RTX is not installed. {TENSORRT_RTX.remedy}")
    return library.load(TENSORRT_RTX)


def spec(batch: int | str = "batch", output: str = "features") -> EngineSpec:
    return EngineSpec(
        inputs=(TensorSpec(name="images", dtype="float32", shape=(batch, 3, 8, 8)),),
        outputs=(TensorSpec(name=output, dtype="float32", shape=(batch, 16, 8, 8)),),
        batch=RANGE if isinstance(batch, str) else BatchRange(min=batch, opt=batch, max=batch),
    )


def conv(precision: str) -> tuple[list[Any], list[Any]]:
    """Nodes and weights of one convolution from `images` to `features`."""
    node, tensor = onnx.helper.make_node, onnx.numpy_helper.from_array
    random = np.random.default_rng(0)
    weight = random.normal(size=(16, 3, 3, 3)).astype(np.float32)
    if precision == "fp32":
        return [node("Conv", ["images", "w"], ["features"], pads=[1] * 4)], [tensor(weight, "w")]
    if precision == "fp16":
        half = onnx.TensorProto.FLOAT16
        nodes = [
            node("Cast", ["images"], ["x"], to=half),
            node("Conv", ["x", "w"], ["y"], pads=[1] * 4),
            node("Cast", ["y"], ["features"], to=onnx.TensorProto.FLOAT),
        ]
        return nodes, [tensor(weight.astype(np.float16), "w")]
    nodes = [
        node("QuantizeLinear", ["images", "scale", "zero"], ["q"]),
        node("DequantizeLinear", ["q", "scale", "zero"], ["x"]),
        node("DequantizeLinear", ["w", "scales", "zeros"], ["wd"], axis=0),
        node("Conv", ["x", "wd"], ["features"], pads=[1] * 4),
    ]
    weights = {
        "w": random.integers(-127, 128, (16, 3, 3, 3)).astype(np.int8),
        "scales": np.full(16, 0.01, np.float32),
        "zeros": np.zeros(16, np.int8),
        "scale": np.float32(0.02),
        "zero": np.int8(0),
    }
    return nodes, [tensor(np.asarray(value), name) for name, value in weights.items()]


def model(nodes: list[Any], weights: list[Any], batch: int | str = "batch") -> bytes:
    info, kind = onnx.helper.make_tensor_value_info, onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        nodes,
        "tiny",
        [info("images", kind, [batch, 3, 8, 8])],
        [info("features", kind, [batch, 16, 8, 8])],
        weights,
    )
    made = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    return bytes(made.SerializeToString())


def source(precision: str = "fp32", batch: int | str = "batch") -> GraphSource:
    return GraphSource(onnx=model(*conv(precision), batch), torchscript=b"", spec=spec(batch))


def network_of(trt: Any, graph: bytes) -> tuple[Any, ...]:
    """A parsed network, after all that must outlive it."""
    log, _ = log_of(trt)
    builder = trt.Builder(log)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, log)
    assert parser.parse(graph)
    return builder, parser, network


@pytest.mark.parametrize(
    ("precision", "layers", "quantize", "dequantize"),
    [("fp32", "FLOAT 1", "0", "0"), ("fp16", "FLOAT 1, HALF 2", "0", "0"), ("int8", "INT8 2", "1", "2")],
)
def test_builds_what_the_graph_says(precision: str, layers: str, quantize: str, dequantize: str) -> None:
    version = rtx().__version__
    artifact = get_backend("tensorrt-rtx").build(source(precision))
    assert len(artifact.data) > 10_000
    facts = artifact.built_with
    assert layers in facts["layers"]
    assert (facts["quantize"], facts["dequantize"]) == (quantize, dequantize)
    assert facts["compute_capabilities"] == "SM80, SM86, SM89, SM120"
    assert (facts["flavour"], facts["version"], facts["typed"]) == ("TensorRT-RTX", version, "strongly")
    assert facts["batch"] == "1:2:4"
    assert all(isinstance(text, str) and text for text in facts.values())


def test_the_recipe_of_tensorrt_builds_for_the_device_at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other flavour's path, on the real TensorRT-RTX, with a FAKE device."""
    trt = rtx()
    monkeypatch.setattr(cuda, "current", lambda: Device("NVIDIA Orin", "SM87"))
    artifact = build(trt, TENSORRT, source(), BuildOptions(), silent)
    facts = artifact.built_with
    assert (facts["flavour"], facts["device"]) == ("TensorRT", "NVIDIA Orin")
    assert facts["compute_capabilities"] == "SM87"


def test_a_fixed_batch_needs_no_profile() -> None:
    rtx()
    assert TensorRTRTXBackend().build(source(batch=2)).built_with["batch"] == "static"


def test_chosen_compute_capability() -> None:
    rtx()
    artifact = TensorRTRTXBackend(compute_capabilities=["SM89"]).build(source())
    assert artifact.built_with["compute_capabilities"] == "SM89"


@pytest.mark.parametrize("asked", [["SM12"], ["CURRENT"], []])
def test_unknown_compute_capability(asked: list[str]) -> None:
    rtx()
    with pytest.raises(OptionError, match=r"TensorRT-RTX knows: .*SM89"):
        TensorRTRTXBackend(compute_capabilities=asked).build(source())


def test_progress_grows_and_ends_once() -> None:
    rtx()
    told: list[tuple[str, int, int]] = []
    TensorRTRTXBackend().build(source(), lambda *state: told.append(state))
    steps = [done for _, done, _ in told]
    assert {(step, total) for step, _, total in told} == {("TensorRT-RTX build", 1000)}
    assert steps == sorted(set(steps))
    assert steps[0] == 0
    assert steps[-1] == 1000
    assert len(steps) > 10


def test_ctrl_c_stops_the_build_and_leaves_the_library_usable(interruptible: None) -> None:
    rtx()
    told = []

    def press(_step: str, done: int, _total: int, _unit: str = "", /) -> None:
        told.append(done)
        if done and done == told[1]:
            signal.raise_signal(signal.SIGINT)

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        TensorRTRTXBackend().build(source(), press)
    assert signal.getsignal(signal.SIGINT) is handler
    assert told[-1] < 500  # it did not run to its end
    assert TensorRTRTXBackend().build(source()).data


def test_an_error_of_the_display_comes_out_as_it_is() -> None:
    rtx()

    def fail(_step: str, done: int, _total: int, _unit: str = "", /) -> None:
        if done:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        TensorRTRTXBackend().build(source(), fail)


def test_an_unknown_operator_is_named_in_tensorrts_words() -> None:
    rtx()
    node = onnx.helper.make_node("NoSuchOperator", ["images"], ["features"])
    broken = GraphSource(onnx=model([node], []), torchscript=b"", spec=spec())
    with pytest.raises(BuildError, match=r"did not accept the ONNX graph:\n.*NoSuchOperator") as caught:
        TensorRTRTXBackend().build(broken)
    assert "INVALID_NODE" in str(caught.value)
    assert "It has no operator NoSuchOperator. Express" in str(caught.value)


def test_rubbish_is_refused_without_echo_of_earlier_messages() -> None:
    rtx()
    node = onnx.helper.make_node("NoSuchOperator", ["images"], ["features"])
    for graph in (model([node], []), b"rubbish"):
        with pytest.raises(BuildError, match="did not accept the ONNX graph") as caught:
            TensorRTRTXBackend().build(GraphSource(onnx=graph, torchscript=b"", spec=spec()))
    assert "Failed to parse the ONNX model" in str(caught.value)
    assert "NoSuchOperator" not in str(caught.value)


def test_an_impossible_network_fails_in_tensorrts_words() -> None:
    rtx()
    node, tensor = onnx.helper.make_node, onnx.numpy_helper.from_array
    nodes = [node("Reshape", ["images", "shape"], ["features"])]  # 192 numbers do not make 16x8x8
    graph = model(nodes, [tensor(np.array([2, 16, 8, 8], np.int64), "shape")], 2)
    with pytest.raises(BuildError, match=r"(?i)reshape"):
        TensorRTRTXBackend().build(GraphSource(onnx=graph, torchscript=b"", spec=spec(2)))


def test_a_build_that_fails_says_why_and_what_to_do() -> None:
    rtx()
    node, tensor = onnx.helper.make_node, onnx.numpy_helper.from_array
    nodes = [  # whether 192 numbers per image make 2x16x8x8 is known only once the batch is
        node("Shape", ["images"], ["shape"]),
        node("Gather", ["shape", "first"], ["count"]),
        node("Concat", ["count", "rest"], ["target"], axis=0),
        node("Reshape", ["images", "target"], ["features"]),
    ]
    weights = {"first": [0], "rest": [16, 8, 8]}
    graph = model(nodes, [tensor(np.array(value, np.int64), name) for name, value in weights.items()])
    told: list[int] = []
    with pytest.raises(BuildError, match=r"failed to build the engine:\n  .*(?i:reshape)") as caught:
        TensorRTRTXBackend().build(
            GraphSource(onnx=graph, torchscript=b"", spec=spec()), lambda _s, done, _t, _unit="": told.append(done)
        )
    assert "build for a smaller batch" in str(caught.value)
    assert max(told) < 1000


def test_tf32_is_off_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    trt = rtx()
    cleared: list[Any] = []
    monkeypatch.setattr(trt.IBuilderConfig, "clear_flag", lambda _config, flag: cleared.append(flag))
    assert TensorRTRTXBackend(tf32=True).build(source()).built_with["tf32"] == "allowed"
    assert cleared == []
    assert TensorRTRTXBackend().build(source()).built_with["tf32"] == "off"
    assert cleared == [trt.BuilderFlag.TF32]


def test_graph_and_specification_must_agree() -> None:
    rtx()
    wrong = GraphSource(onnx=model(*conv("fp32")), torchscript=b"", spec=spec(output="logits"))
    with pytest.raises(BuildError, match=r"features.*logits"):
        TensorRTRTXBackend().build(wrong)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ("int8", "1 QuantizeLinear nodes became 0; 2 DequantizeLinear nodes became 0"),
        ("fp16", "computes in HALF"),
    ],
)
def test_lost_precision_is_an_error(asked: str, words: str) -> None:
    trt = rtx()
    *_owners, network = network_of(trt, model(*conv("fp32")))
    with pytest.raises(BuildError, match=words):
        check_precision(trt, network, model(*conv(asked)))


def test_a_weakly_typed_network_is_an_error() -> None:
    network = SimpleNamespace(get_flag=lambda _flag: False)
    trt = SimpleNamespace(NetworkDefinitionCreationFlag=SimpleNamespace(STRONGLY_TYPED=1))
    with pytest.raises(BuildError, match="not take the network as strongly typed"):
        check_precision(trt, network, b"")


@pytest.mark.parametrize(("precision", "types"), [("fp32", set()), ("fp16", {"HALF"}), ("int8", set())])
def test_the_graph_is_read_as_onnx_reads_it(precision: str, types: set[str]) -> None:
    graph = model(*conv(precision))
    expected = Counter(node.op_type for node in onnx.load_model_from_string(graph).graph.node)
    assert wanted_by(graph) == (expected, types)


def test_what_is_not_protobuf_is_refused() -> None:
    with pytest.raises(BuildError, match="not valid protobuf"):
        wanted_by(b"\x0b\x00")


@pytest.mark.parametrize("flavour", [TENSORRT, TENSORRT_RTX])
def test_a_missing_library_is_named_with_its_pip_line(flavour: Flavour, monkeypatch: pytest.MonkeyPatch) -> None:
    library.load.cache_clear()
    monkeypatch.setattr(library, "find_spec", lambda _name: None)
    backend = get_backend(flavour.target)
    state = backend.availability()
    assert (state.can_build, state.can_run) == (False, False)
    line = rf"{flavour.module} is not installed\. Install it: pip install '{flavour.module[:8]}"
    with pytest.raises(DependencyError, match=line):
        backend.build(GraphSource(onnx=b"", torchscript=b"", spec=spec()))
    with pytest.raises(DependencyError, match=line):
        backend.open(b"", spec())


def test_a_library_that_does_not_load_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_name: str) -> Any:
        msg = "libnvinfer.so.10: cannot open shared object file"
        raise OSError(msg)

    library.load.cache_clear()
    monkeypatch.setattr(library, "find_spec", lambda _name: SimpleNamespace(submodule_search_locations=[]))
    monkeypatch.setattr(library, "import_module", fail)
    state = TensorRTBackend().availability()
    assert not state.can_build
    assert "libnvinfer.so.10: cannot open" in state.detail
    assert state.remedy == install("tensorrt")


def test_importing_the_backend_loads_no_library() -> None:
    code = (
        "import sys; import pcn_deploy.engines.tensorrt.backend; "
        "print(sorted({name.partition('.')[0] for name in sys.modules} & "
        "{'tensorrt', 'tensorrt_rtx', 'tensorrt_rtx_bindings', 'onnxruntime', 'torch', 'onnx'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
