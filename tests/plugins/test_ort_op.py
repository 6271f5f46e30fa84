"""The operator inside ONNX Runtime: numbers, graphs, errors, threads and memory."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from threading import Barrier
from typing import Any

import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper
import pytest
from cases import ADD_CASES, CASES, NormCase, tolerance
from graphs import CHANNELS, ELEMENT_TYPES, IR_VERSION, OPSET, frn_model, frn_parameters
from onnx.reference import ReferenceEvaluator
from references import check_forward, inputs_of
from tolerances import OP_FLOAT32

from deploynorm.contract import (
    ADD_OP_TYPE,
    BLOCK_ATTRIBUTE,
    BLOCKED_OP_TYPE,
    DOMAIN,
    DTYPES,
    INPUTS,
    NODE_ATTRIBUTES,
    OP_TYPE,
    OPERATORS,
    OUTPUT,
    PARAMETERS,
    VERSION,
)
from deploynorm.lowering import function_proto
from deploynorm.ort import import_onnxruntime
from deploynorm.ort.machine import block_size
from deploynorm.reference import filter_response_norm
from deploynorm.run.onnxruntime import OnnxRuntimeRunner

X = np.random.default_rng(0).normal(size=(2, CHANNELS, 3, 5)).astype(np.float32)

node = onnx.helper.make_node

LEVELS = ("ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_EXTENDED", "ORT_ENABLE_ALL")


@pytest.fixture(scope="session")
def ort(require: Callable[[str], None]) -> Any:
    require("ort")
    return import_onnxruntime()


@pytest.fixture(scope="session")
def open_session(library: Path, ort: Any) -> Callable[..., Any]:
    """open_session(content, threads=1): a session with the library on the CPU, which says nothing of errors."""

    def open_session(content: bytes, *, threads: int = 0, level: str = "ORT_ENABLE_ALL", severity: int = 4) -> Any:
        options = ort.SessionOptions()
        options.log_severity_level = severity
        options.intra_op_num_threads = threads
        options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
        options.register_custom_ops_library(str(library))
        return ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])

    return open_session


def definition(x: np.ndarray, parameters: dict[str, np.ndarray] | None = None) -> np.ndarray:
    """In float64, with the parameters of `graph` where none are given."""
    parameters = frn_parameters() if parameters is None else parameters
    return filter_response_norm(*(each.astype(np.float64) for each in (x, *parameters.values())))


def body(dtype: str = "float32", op_type: str = OP_TYPE) -> onnx.FunctionProto:
    return function_proto(OPSET, op_type, half=dtype in ("float16", "bfloat16"))


def graph(
    nodes: list[onnx.NodeProto],
    *,
    shape: tuple[int | str | None, ...] | None = ("N", CHANNELS, "H", "W"),
    dtype: str = "float32",
    parameters: dict[str, np.ndarray] | None = None,
    functions: tuple[onnx.FunctionProto, ...] = (),
) -> bytes:
    """A model of these nodes from X to Y; the parameters of our operator are there for all of them."""
    parameters = frn_parameters(dtype) if parameters is None else parameters
    made = onnx.helper.make_graph(
        nodes,
        "graph",
        [onnx.helper.make_tensor_value_info(INPUTS[0], ELEMENT_TYPES[dtype], shape)],
        [onnx.helper.make_tensor_value_info(OUTPUT, ELEMENT_TYPES[dtype], None)],
        [onnx.numpy_helper.from_array(value, name) for name, value in parameters.items()],
    )
    imports = [onnx.helper.make_opsetid("", OPSET), onnx.helper.make_opsetid(DOMAIN, VERSION)]
    model = onnx.helper.make_model(made, opset_imports=imports, functions=functions, ir_version=IR_VERSION)
    return bytes(model.SerializeToString())


def ours(source: str, result: str, *, more: tuple[str, ...] = (), **attributes: Any) -> onnx.NodeProto:
    """A node of our operator; the blocked one where `block` is given, else with `more` the one with a residual."""
    op_type = BLOCKED_OP_TYPE if BLOCK_ATTRIBUTE in attributes else ADD_OP_TYPE if more else OP_TYPE
    attributes = {**NODE_ATTRIBUTES, **attributes}
    return node(op_type, [source, *PARAMETERS, *more], [result], f"makes_{result}", domain=DOMAIN, **attributes)


# ---- Numbers


@pytest.mark.usefixtures("ort")
@pytest.mark.parametrize("sizes", ["static", "dynamic"])
@pytest.mark.parametrize("has_body", [True, False], ids=["body", "no_body"])
@pytest.mark.parametrize("case", [*CASES, *ADD_CASES], ids=str)
def test_every_case(case: NormCase, has_body: bool, sizes: str, library: Path) -> None:
    parameters = {name: inputs_of(case)[name] for name in PARAMETERS}
    tensors = {name: value for name, value in inputs_of(case).items() if name not in parameters}
    shape = case.shape if sizes == "static" else tuple(f"D{a}" if a != 1 else s for a, s in enumerate(case.shape))
    model = frn_model(case.dtype, body=has_body or None, parameters=parameters, shape=shape, residual=len(tensors) > 1)
    with OnnxRuntimeRunner(model.SerializeToString(), plugins=[library]) as runner:
        check_forward(runner.infer(tensors)[OUTPUT], case)


@pytest.mark.usefixtures("ort")
@pytest.mark.parametrize("residual", [True, False], ids=["residual", "no_residual"])
@pytest.mark.parametrize("block", [1, 2, 4])
def test_the_blocked_operator_takes_its_channels_side_by_side(block: int, residual: bool, library: Path) -> None:
    more = np.random.default_rng(1).normal(size=X.shape).astype(np.float32)
    parameters = frn_parameters()
    plain = definition(X)
    if residual:
        added = definition(X, parameters | {"tau": np.full(CHANNELS, -np.inf)}) + more
        plain = np.maximum(added, parameters["tau"].reshape(1, -1, 1, 1))

    def blocked(x: np.ndarray) -> np.ndarray:
        """In the memory of a blocked tensor, under the shape that ONNX Runtime's own blocked tensors have."""
        parts = x.reshape(len(x), CHANNELS // block, block, *x.shape[2:])
        return np.ascontiguousarray(np.moveaxis(parts, 2, -1)).reshape(x.shape)

    constants = parameters | ({"R": blocked(more)} if residual else {})
    content = graph([ours("X", "Y", more=("R",) if residual else (), block=block)], parameters=constants)
    with OnnxRuntimeRunner(content, plugins=[library]) as runner:
        got = runner.infer({"X": blocked(X)})["Y"]
    np.testing.assert_allclose(got, blocked(plain), **OP_FLOAT32.kwargs())


# ---- Graphs


def network() -> bytes:
    """Three convolutions with our operator behind each, a sum around the second and a residual around the third."""
    rng = np.random.default_rng(0)
    weights = {f"w{i}": rng.normal(0, 0.3, (16, c, 3, 3)).astype(np.float32) for i, c in enumerate((CHANNELS, 16))}
    values = {
        "gamma": rng.uniform(0.5, 1.5, 16),
        "beta": rng.normal(0, 0.5, 16),
        "tau": np.where(np.arange(16) % 4, 0.1, -np.inf),
        "eps": np.full(16, 1e-5),
    }
    parameters = {name: value.astype(np.float32) for name, value in values.items()} | weights
    nodes = [
        node("Conv", ["X", "w0"], ["c0"], pads=[1, 1, 1, 1]),
        ours("c0", "f0"),
        node("Conv", ["f0", "w1"], ["c1"], pads=[1, 1, 1, 1]),
        ours("c1", "f1"),
        node("Add", ["f1", "f0"], ["s"]),
        node("Conv", ["s", "w1"], ["c2"], pads=[1, 1, 1, 1]),
        ours("c2", "r", more=("s",)),
        node("AveragePool", ["r"], ["Y"], kernel_shape=[2, 2]),
    ]
    for index, each in enumerate(nodes):
        each.name = f"node{index}"
    return graph(nodes, parameters=parameters, functions=tuple(body(op_type=name) for name in OPERATORS))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("registered", [True, False], ids=["library", "stock"])
def test_a_network_gives_the_same_at_every_level_of_optimization(
    registered: bool, level: str, library: Path, ort: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # of the profile
    options = ort.SessionOptions()
    options.log_severity_level = 3  # the warning that an optimized file is for this machine alone
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.enable_profiling = True
    if registered:
        options.register_custom_ops_library(str(library))
    session = ort.InferenceSession(network(), options, providers=["CPUExecutionProvider"])
    x = np.random.default_rng(2).normal(size=(2, CHANNELS, 12, 13)).astype(np.float32)
    (got,) = session.run(None, {"X": x})
    (wanted,) = ReferenceEvaluator(onnx.load_from_string(network())).run(None, {"X": x})
    np.testing.assert_allclose(got, wanted, **OP_FLOAT32.kwargs())

    # Which of the two ran it.
    events = json.loads(Path(session.end_profiling()).read_text())
    ran = [event["args"].get("op_name") for event in events if event["name"].endswith("_kernel_time")]
    left = onnx.load(tmp_path / "optimized.onnx").graph.node
    for op_type, count in {OP_TYPE: 2, ADD_OP_TYPE: 1}.items():
        wanted = count if registered else 0
        assert ran.count(op_type) == sum(each.op_type == op_type for each in left) == wanted
    assert ran.count("ReduceMean") == sum(each.op_type == "ReduceMean" for each in left) == (0 if registered else 3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_file_of_each_type_loads_with_the_library_and_without(dtype: str, library: Path) -> None:
    content = frn_model(dtype, body=body(dtype)).SerializeToString()
    x = X.astype(dtype)
    wanted = definition(x, frn_parameters(dtype))
    for plugins in ([library], []):
        with OnnxRuntimeRunner(content, plugins=plugins) as runner:
            got = runner.infer({"X": x})["Y"]
        np.testing.assert_allclose(got.astype(np.float64), wanted, **tolerance(NormCase("", (), dtype)).kwargs())


@pytest.mark.parametrize("op_type", OPERATORS)
def test_float16_parameters_of_converters_are_taken(op_type: str, library: Path) -> None:
    """Widened exactly, subnormal numbers and infinities among them; squares do not overflow as in the body's half."""
    parameters = {
        "gamma": np.array([1.5, -(2.0**-24), 3000, 3e-6]),
        "beta": np.array([0, -0.1, 2.0**-14, -1e-7]),
        "tau": np.array([-np.inf, -65504, 0.25, -0.0]),
        "eps": np.array([1e-6, 6.1e-5, 1e-3, 2]),
    }
    half = {name: value.astype(np.float16) for name, value in parameters.items()}
    x = (X * 500).astype(np.float16)
    more = (x[::-1],) if op_type == ADD_OP_TYPE else ()
    model = frn_model("float16", parameters=half, residual=bool(more))
    with OnnxRuntimeRunner(model.SerializeToString(), plugins=[library]) as runner:
        got = runner.infer({"X": x} | dict(zip(("residual",), more, strict=False)))["Y"]
    wanted = filter_response_norm(*(each.astype(np.float64) for each in (x, *half.values(), *more)))
    assert np.isfinite(got).all()
    np.testing.assert_allclose(got.astype(np.float64), wanted, **tolerance(NormCase("", (), "float16")).kwargs())


@pytest.mark.parametrize(
    "shape",
    [("N", CHANNELS, "H", "W"), (None, CHANNELS, None, None), ("N", None, "H", None), X.shape, None],
    ids=["named", "unnamed", "some", "static", "no_rank"],
)
def test_what_is_known_of_x_is_known_of_y(
    shape: tuple[int | str | None, ...] | None, open_session: Callable[..., Any], capfd: pytest.CaptureFixture[str]
) -> None:
    """The node behind needs the rank. An unknown size is to stay unknown, and not to become another number."""
    content = graph(
        [node("Relu", ["X"], ["r"]), ours("r", "f"), node("Transpose", ["f"], ["Y"], perm=[0, 2, 3, 1])], shape=shape
    )
    session = open_session(content, severity=2)
    wanted = definition(np.maximum(X, 0)).transpose(0, 2, 3, 1)
    np.testing.assert_allclose(session.run(None, {"X": X})[0], wanted, **OP_FLOAT32.kwargs())
    known = session.get_outputs()[0].shape
    if shape is not None and None not in shape:
        assert known == [shape[0], shape[2], shape[3], shape[1]]
    else:
        assert not any(isinstance(size, int) and size < 0 for size in known), known
    assert capfd.readouterr().err == ""  # no warning that a size was another one


CONSUMERS = {
    "output": [ours("r", "f"), node("Concat", ["r", "f"], ["Y"], axis=1)],
    "node_before": [
        node("Neg", ["r"], ["n"]),
        ours("r", "f"),
        node("Neg", ["n"], ["m"]),
        node("Concat", ["m", "f"], ["Y"], axis=1),
    ],
    "node_behind": [
        ours("r", "f"),
        node("Neg", ["f"], ["g"]),
        node("Neg", ["g"], ["h"]),
        node("Concat", ["r", "h"], ["Y"], axis=1),
    ],
}
"""What else reads r, the operator's input."""
CONSUMERS |= {
    f"{name}, a residual too": [ours("r", "f", more=("zero",)) if each.op_type == OP_TYPE else each for each in nodes]
    for name, nodes in CONSUMERS.items()
}


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("consumer", CONSUMERS)
def test_x_is_not_written_over_while_another_node_needs_it(
    consumer: str, level: str, open_session: Callable[..., Any]
) -> None:
    before_it = [node("Relu", ["X"], ["r"]), node("Sub", ["X", "X"], ["zero"])]
    session = open_session(graph([*before_it, *CONSUMERS[consumer]]), level=level)
    before = X.copy()
    (got,) = session.run(None, {"X": X})
    relu = np.maximum(X, 0)
    np.testing.assert_allclose(got, np.concatenate([relu, definition(relu)], axis=1), **OP_FLOAT32.kwargs())
    np.testing.assert_array_equal(X, before)


@pytest.mark.usefixtures("ort")
def test_the_caller_s_array_is_never_written_over(library: Path) -> None:
    """X of the graph is the caller's memory."""
    x = X.copy()
    with OnnxRuntimeRunner(graph([ours("X", "f"), node("Relu", ["f"], ["Y"])]), plugins=[library]) as runner:
        runner.infer({"X": x})
    np.testing.assert_array_equal(x, X)


# ---- Errors


def with_parameters(**parameters: Any) -> bytes:
    return graph([ours("X", "Y")], parameters=frn_parameters() | {n: np.asarray(p) for n, p in parameters.items()})


def with_inputs(*inputs: str, functions: tuple[onnx.FunctionProto, ...] = ()) -> bytes:
    return graph([node(OP_TYPE, inputs, ["Y"], "makes_Y", domain=DOMAIN)], functions=functions)


def of_rank(rank: int) -> tuple[bytes, np.ndarray]:
    shape = (1, CHANNELS, *(1,) * 20)[:rank]
    return graph([ours("X", "Y")], shape=tuple(f"D{axis}" for axis in range(rank))), np.ones(shape, np.float32)


def blocked(value: Any, more: tuple[str, ...] = (), **parameters: np.ndarray) -> bytes:
    return graph([ours("X", "Y", block=value, more=more)], parameters=frn_parameters() | parameters)


def blocked_with(residual: np.ndarray) -> bytes:
    return blocked(2, ("R",), R=residual)


def added(residual: np.ndarray) -> bytes:
    return graph([ours("X", "Y", more=("R",))], parameters=frn_parameters() | {"R": residual})


GAMMA = frn_parameters()["gamma"]
WRONG_SHAPE = rf"{OP_TYPE}: input {{}} has the wrong shape\. Got "
WRONG_BLOCK = f"{BLOCKED_OP_TYPE}: attribute {BLOCK_ATTRIBUTE} must be a positive integer"
WRONG_RESIDUAL = "{}: the residual's shape is not that of X"
NO_MULTIPLE = rf"{BLOCKED_OP_TYPE}: the channels are no multiple of the block\. Got 4; expected blocks of "

WRONG: dict[str, tuple[bytes, np.ndarray, str]] = {
    **{
        f"{name} too short": (
            with_parameters(**{name: frn_parameters()[name][:3]}),
            X,
            rf"{WRONG_SHAPE.format(name)}.*3; expected \(4,\)",
        )
        for name in PARAMETERS
    },
    "gamma of two axes": (with_parameters(gamma=GAMMA.reshape(2, 2)), X, WRONG_SHAPE.format("gamma") + "2 axes"),
    "gamma of one axis too many": (
        with_parameters(gamma=GAMMA.reshape(4, 1)),
        X,
        WRONG_SHAPE.format("gamma") + "2 axes",
    ),
    "eps of no axis": (with_parameters(eps=np.float32(1)), X, WRONG_SHAPE.format("eps") + "0"),
    "beta of float64": (with_parameters(beta=np.zeros(CHANNELS)), X, rf"\(makes_Y\).*{OP_TYPE}"),
    "beta of float16": (
        with_parameters(beta=np.zeros(CHANNELS, np.float16)),
        X,
        rf"\(makes_Y\).*no kernel def matches.*{OP_TYPE}",
    ),
    "beta of integers": (
        with_parameters(beta=np.zeros(CHANNELS, np.int64)),
        X,
        rf"tensor\(int64\).*\(beta\).*{OP_TYPE}.*\(makes_Y\)",
    ),
    "X without axes": (*of_rank(0), rf"{OP_TYPE}: input X has the wrong rank\. Got 0 axes; expected \(N, C, D1"),
    "X of one axis": (*of_rank(1), rf"{OP_TYPE}: input X has the wrong rank\. Got 1 axes; expected \(N, C, D1"),
    "X of 17 axes": (*of_rank(17), rf"{OP_TYPE}: .* 17 axes; at most 16"),
    "X of integers": (
        graph([ours("X", "Y")], dtype="int64", parameters=frn_parameters()),
        X.astype(np.int64),
        rf"tensor\(int64\).*\(X\).*{OP_TYPE}.*\(makes_Y\)",
    ),
    "no eps": (with_inputs(*INPUTS[:4]), X, rf"makes_Y.*{OP_TYPE}.*input size 4"),
    "no eps, with a body": (with_inputs(*INPUTS[:4], functions=(body(),)), X, rf"makes_Y.*{OP_TYPE}.*input size 4"),
    "an empty name for tau": (with_inputs(*INPUTS[:3], "", INPUTS[4]), X, rf"makes_Y.*{OP_TYPE}.*input 3"),
    "a sixth input": (with_inputs(*INPUTS, "X"), X, rf"makes_Y.*{OP_TYPE}.*input size 6"),
    "no block": (graph([node(BLOCKED_OP_TYPE, INPUTS, ["Y"], "makes_Y", domain=DOMAIN)]), X, WRONG_BLOCK),
    "block of 0": (blocked(0), X, WRONG_BLOCK),
    "block below 0": (blocked(-8), X, WRONG_BLOCK),
    "block of a float": (blocked(2.0), X, WRONG_BLOCK),
    "block that does not divide": (blocked(3), X, NO_MULTIPLE + "3"),
    "block larger than the channels": (blocked(12), X, NO_MULTIPLE + "12"),
    "block and a short gamma": (
        blocked(2, gamma=GAMMA[:3]),
        X,
        rf"Status Message: {BLOCKED_OP_TYPE}: input gamma has the wrong shape",
    ),
    **{
        f"{kind} of another {what}": (make(residual), X, WRONG_RESIDUAL.format(op_type))
        for kind, op_type, make in (
            ("blocked residual", BLOCKED_OP_TYPE, blocked_with),
            ("residual", ADD_OP_TYPE, added),
        )
        for what, residual in (("shape", X[:1]), ("rank", X.reshape(-1)), ("order", X.swapaxes(2, 3)))
    },
    "residual of another type": (added(X.astype(np.float16)), X, rf"\(makes_Y\).*{ADD_OP_TYPE}"),
    "no residual": (graph([node(ADD_OP_TYPE, INPUTS, ["Y"], "makes_Y", domain=DOMAIN)]), X, r"makes_Y.*input size 5"),
}


@pytest.mark.parametrize(("content", "x", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_node_is_told_and_the_process_lives(
    content: bytes, x: np.ndarray, message: str, library: Path, ort: Any
) -> None:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.register_custom_ops_library(str(library))

    def load_and_run(content: bytes, x: np.ndarray) -> Any:
        session = ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        return session.run(None, {"X": x})[0]

    for _ in range(2):  # the first has left nothing behind
        with pytest.raises(Exception, match=f"(?s){message}"):
            load_and_run(content, x)
    # And the same options still serve a right one.
    assert load_and_run(graph([ours("X", "Y")]), X).shape == X.shape


def test_a_session_goes_on_after_a_run_that_failed(open_session: Callable[..., Any]) -> None:
    session = open_session(graph([ours("X", "Y")], shape=("N", "C", "H", "W")))
    (wanted,) = session.run(None, {"X": X})
    for _ in range(3):
        with pytest.raises(Exception, match="input gamma has the wrong shape"):
            session.run(None, {"X": X[:, :2]})
        np.testing.assert_array_equal(session.run(None, {"X": X})[0], wanted)


# ---- Registration


def test_the_library_twice_on_one_session_is_onnx_runtime_s_own_error(library: Path, ort: Any) -> None:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    for _ in range(2):
        options.register_custom_ops_library(str(library))
    with pytest.raises(Exception, match="Domain already set in registry"):
        ort.InferenceSession(graph([ours("X", "Y")]), options, providers=["CPUExecutionProvider"])


def test_many_sessions_come_and_go_in_any_order(open_session: Callable[..., Any]) -> None:
    content = graph([ours("X", "Y")])
    wanted = None
    sessions: list[Any] = []
    for index in range(30):
        sessions.append(open_session(content, threads=1))
        if index % 3 == 2:
            del sessions[index // 3]
        for each in sessions[-3:]:
            (got,) = each.run(None, {"X": X})
            wanted = got if wanted is None else wanted
            np.testing.assert_array_equal(got, wanted)


def test_options_and_sessions_are_made_from_several_threads_at_once(open_session: Callable[..., Any]) -> None:
    content = graph([ours("X", "Y")])
    barrier = Barrier(8)

    def one(_: int) -> np.ndarray:
        barrier.wait(timeout=60)
        return np.asarray(open_session(content, threads=1).run(None, {"X": X})[0])

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(one, range(8)))
    for got, following in pairwise(results):
        np.testing.assert_array_equal(got, following)


# ---- Threads


BIG = {
    "many planes": (4, CHANNELS, 90, 91),
    "one large plane of each channel": (1, CHANNELS, 300, 301),
    "small": (1, CHANNELS, 7, 7),
}


@pytest.mark.parametrize("shape", BIG.values(), ids=BIG)
def test_the_number_of_threads_changes_no_bit(shape: tuple[int, ...], open_session: Callable[..., Any]) -> None:
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    content = graph([ours("X", "Y")])
    results = [open_session(content, threads=threads).run(None, {"X": x})[0] for threads in (1, 2, 3, 8)]
    np.testing.assert_allclose(results[0], definition(x), **OP_FLOAT32.kwargs())
    for got in results[1:]:
        np.testing.assert_array_equal(got, results[0])


@pytest.mark.parametrize("kind", ["one session", "a session each"])
def test_eight_callers_at_once_get_what_each_would_alone(kind: str, open_session: Callable[..., Any]) -> None:
    inputs = [np.random.default_rng(i).normal(size=(1, CHANNELS, 40 + i, 41)).astype(np.float32) for i in range(8)]

    count = 1 if kind == "one session" else 8
    sessions = [open_session(network(), threads=2) for _ in range(count)] * (8 // count)
    alone = [sessions[i].run(None, {"X": x})[0] for i, x in enumerate(inputs)]
    barrier = Barrier(8)

    def repeat(index: int) -> list[np.ndarray]:
        barrier.wait(timeout=60)
        return [sessions[index].run(None, {"X": inputs[index]})[0] for _ in range(15)]

    with ThreadPoolExecutor(8) as pool:
        for got, wanted in zip(pool.map(repeat, range(8)), alone, strict=True):
            for each in got:
                np.testing.assert_array_equal(each, wanted)


# ---- Memory

reads_proc = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is read from Linux's /proc")


def resident() -> int:
    """Bytes of memory that this process holds."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1])


def least_growth(work: Callable[[], None], rounds: int = 4) -> int:
    """Bytes that the process holds more after a round of work. A leak grows in each; all else that this process does,
    with its other threads and its allocator's steps, does not.
    """
    held = [resident()]
    for _ in range(rounds):
        work()
        held.append(resident())
    return min(after - before for before, after in pairwise(held))


@reads_proc
def test_ten_thousand_runs_hold_no_more_memory_than_the_first_ones(open_session: Callable[..., Any]) -> None:
    session = open_session(graph([ours("X", "Y")], shape=("N", "C", "H", "W")), threads=1)

    def runs() -> None:
        for index in range(10_000):
            session.run(None, {"X": X})
            if index % 10 == 0:
                with pytest.raises(Exception, match="gamma"):
                    session.run(None, {"X": X[:, :2]})

    # A status that stayed, of one run in ten, would take more than this; anything of each run a megabyte.
    assert least_growth(runs) < 32 * 2**10


@reads_proc
def test_sessions_that_are_gone_leave_nothing(open_session: Callable[..., Any]) -> None:
    # So many nodes that a kernel which stayed, of 32 bytes, would show.
    names = ["X", *(f"v{index}" for index in range(199)), "Y"]
    content = graph([ours(source, result) for source, result in pairwise(names)])

    def sessions() -> None:
        for _ in range(100):
            open_session(content, threads=1).run(None, {"X": X})

    assert least_growth(sessions) < 2**18


# In a process of its own: memory that another test has freed and the allocator kept would be taken without a trace.
HELD_BY_A_RUN = """
import sys
from pathlib import Path
import numpy as np
import onnxruntime

def memory(field):
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith(field)).split()[1])

options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
options.enable_cpu_mem_arena = False  # which would ask for more than is needed
options.register_custom_ops_library(sys.argv[2])
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
x = np.ones((1, int(sys.argv[3]), 1024, 2048), np.float32)
session.run(None, {"X": x[:, :, :1]})
Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
before = memory("VmRSS")
session.run(None, {"X": x})
print((memory("VmHWM") - before) / x.nbytes)
"""


@reads_proc
@pytest.mark.usefixtures("ort")
@pytest.mark.parametrize(("x_is_needed_later", "tensors"), [(False, 1), (True, 3)], ids=["x_is_free", "x_is_needed"])
def test_y_takes_the_memory_of_x_where_x_is_free(
    x_is_needed_later: bool, tensors: int, library: Path, tmp_path: Path
) -> None:
    """In tensors beside the caller's, by the most memory that the process held. Y is one number, the sum one more."""
    nodes = [node("Neg", ["X"], ["a"]), ours("a", "b"), ours("b", "c")]
    last = node("Add", ["c", "a"], ["d"]) if x_is_needed_later else ours("c", "d")
    path = tmp_path / "model.onnx"
    path.write_bytes(graph([*nodes, last, node("ReduceMax", ["d"], ["Y"])]))
    command = [sys.executable, "-c", HELD_BY_A_RUN, str(path), str(library), str(CHANNELS)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert abs(float(done.stdout) - tensors) < 0.2, f"{done.stdout} tensors"


@pytest.mark.skipif(platform.machine() != "x86_64", reason="blocks are of one size on other processors")
def test_a_file_with_the_blocks_of_another_processor_is_refused_without_our_loader_too(
    open_session: Callable[..., Any], ort: Any
) -> None:
    """ONNX Runtime's own blocked operators would not look, and give wrong numbers."""
    other = 24 - block_size(ort)  # of 8 and 16 the one that is not this processor's
    x = np.zeros((1, other, 3, 3), np.float32)
    parameters = {name: np.ones(other, np.float32) for name in PARAMETERS}
    content = graph([ours("X", "Y", block=other)], parameters=parameters, shape=x.shape)
    with pytest.raises(Exception, match=rf"blocks of {other} channels.*Fix: run deploynorm rewrite"):
        open_session(content)
