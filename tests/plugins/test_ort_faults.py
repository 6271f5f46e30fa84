"""The operator library inside a runtime that fails: every status is passed on, and nothing is kept.

The runtime is a table of Python functions in the place of OrtApi, with the slots of plugins/onnxruntime/ort_abi.h.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deploynorm.contract import ADD_OP_TYPE, BLOCKED_OP_TYPE, DOMAIN, OP_TYPE
from deploynorm.libraries import ORT_LIBRARY
from deploynorm.reference import filter_response_norm

TEXT = (Path(__file__).parents[2] / "plugins" / "onnxruntime" / "ort_abi.h").read_text()
SLOTS = {name: int(slot) for name, slot in re.findall(r"^  X\((\w+), (\d+),", TEXT, flags=re.MULTILINE)}
MEMBERS = re.findall(r"^  X\((\w+), [^\d]", TEXT, flags=re.MULTILINE)

POINTER, SIZE, INT = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
TASK = ctypes.CFUNCTYPE(None, POINTER, SIZE)
FIRST_STATUS = 0x5000
"""Statuses and objects of this runtime are numbers that nobody may follow."""


def store(where: int, value: int, kind: Any = SIZE) -> None:
    kind.from_address(where).value = value


class Runtime:
    """Just as much of ONNX Runtime as the library calls.

    Attributes:
        fails: fails(name, n) says whether the n-th call (from 0) of all those that return a status fails.
        calls: Names of the functions called, in order.
        messages: Texts of the statuses that the library made.
        kept: How often each function that gives something was called, less how often that was given back.
    """

    def __init__(self, library: Path, version: bytes = b"1.18.0", newest: int = 18) -> None:
        self.fails: Callable[[str, int], bool] = lambda name, n: False
        self.calls: list[str] = []
        self.messages: list[str] = []
        self.kept: Counter[str] = Counter()
        self.operators: list[int] = []
        self.domains: list[bytes] = []
        self.added = 0
        self.inputs: list[np.ndarray | None] = []
        self.block = 0
        self.y = np.zeros(0)
        self.statuses: set[int] = set()
        self.pause = 0.0
        self.library = ctypes.CDLL(str(library))
        self.library.RegisterCustomOps.restype = POINTER
        self.library.RegisterCustomOps.argtypes = (POINTER, POINTER)
        self._functions: list[Any] = []
        self._table = (POINTER * 400)()
        self._fill()
        api = ctypes.addressof(self._table)
        get_api = self._keep(
            ctypes.CFUNCTYPE(POINTER, ctypes.c_uint32)(lambda wanted: api if wanted <= newest else None)
        )
        self._version = ctypes.create_string_buffer(version)
        get_version = self._keep(ctypes.CFUNCTYPE(POINTER)(lambda: ctypes.addressof(self._version)))
        self._base = (POINTER * 2)(get_api, get_version)

    def register(self) -> int | None:
        status: int | None = self.library.RegisterCustomOps(0x7000, ctypes.addressof(self._base))
        return status

    def member(self, operator: int, name: str, result: Any, *arguments: Any) -> Any:
        """A function of an operator that the library has added."""
        at = operator + ctypes.sizeof(POINTER) * (1 + MEMBERS.index(name))
        return ctypes.CFUNCTYPE(result, *arguments)(POINTER.from_address(at).value or 0)

    def operator(self, op_type: str, element: int = 1) -> int:
        for operator in self.operators:
            name = self.member(operator, "GetName", ctypes.c_char_p, POINTER)(operator)
            of_x = self.member(operator, "GetInputType", INT, POINTER, SIZE)(operator, 0)
            if name == op_type.encode() and of_x == element:
                return operator
        raise AssertionError(f"no {op_type} of type {element}")

    def create_kernel(self, operator: int) -> tuple[int | None, int | None]:
        out = POINTER()
        create = self.member(operator, "CreateKernelV2", POINTER, POINTER, POINTER, POINTER, POINTER)
        return create(operator, ctypes.addressof(self._table), 0x7100, ctypes.addressof(out)), out.value

    def compute(self, operator: int, kernel: int) -> int | None:
        status: int | None = self.member(operator, "KernelComputeV2", POINTER, POINTER, POINTER)(kernel, 0x7200)
        return status

    def _keep(self, function: Any) -> int:
        self._functions.append(function)
        return ctypes.cast(function, POINTER).value or 0

    def _status(self) -> int:
        status = FIRST_STATUS + len(self.statuses)
        self.statuses.add(status)
        self.kept["status"] += 1
        return status

    def _add(self, name: str, arguments: tuple[Any, ...], body: Callable[..., Any]) -> None:
        """A function that returns a status, or null after body(...)."""

        def call(*values: Any) -> int | None:
            n = len(self.calls)
            self.calls.append(name)
            if self.fails(name, n):
                return self._status()
            body(*values)
            return None

        self._table[SLOTS[name]] = self._keep(ctypes.CFUNCTYPE(POINTER, *arguments)(call))

    def _fill(self) -> None:
        # Inputs are the numbers from 0x100 on, the output is 0x200, and what describes a shape is the same and 0x1000.
        def array(value: int) -> np.ndarray:
            found = self.y if value & 0xFFF == 0x200 else self.inputs[value & 0xFF]
            assert found is not None
            return found

        def create_status(code: int, message: bytes) -> int:
            assert code in (1, 2)
            self.messages.append(message.decode())
            return self._status()

        def release_status(status: int) -> None:
            assert status in self.statuses
            self.kept["status"] -= 1

        def release_shape(info: int) -> None:
            self.kept["shape"] -= 1

        self._table[SLOTS["CreateStatus"]] = self._keep(ctypes.CFUNCTYPE(POINTER, INT, ctypes.c_char_p)(create_status))
        self._table[SLOTS["ReleaseStatus"]] = self._keep(ctypes.CFUNCTYPE(None, POINTER)(release_status))
        self._table[SLOTS["ReleaseTensorTypeAndShapeInfo"]] = self._keep(ctypes.CFUNCTYPE(None, POINTER)(release_shape))

        def create_domain(name: bytes, out: int) -> None:
            time.sleep(self.pause)
            self.domains.append(name)
            store(out, 0x6000)

        def add_operator(domain: int, operator: int) -> None:
            assert domain == 0x6000
            self.operators.append(operator)

        def add_domain(options: int, domain: int) -> None:
            assert (options, domain) == (0x7000, 0x6000)
            self.added += 1

        def get_shape(value: int, out: int) -> None:
            self.kept["shape"] += 1
            store(out, 0x1000 + value)

        def get_sizes(info: int, out: int, count: int) -> None:
            for axis in range(count):
                store(out + 8 * axis, array(info).shape[axis])

        def get_input(context: int, index: int, out: int) -> None:
            store(out, 0 if self.inputs[index] is None else 0x100 + index)

        def get_output(context: int, index: int, sizes: int, count: int, out: int) -> None:
            self.y = np.full(tuple((ctypes.c_int64 * count).from_address(sizes)), -7, np.float32)
            store(out, 0x200)

        def parallel_for(context: int, task: Any, count: int, batches: int, data: int) -> None:
            for index in range(count):
                task(data, index)

        two, text = (POINTER, POINTER), ctypes.c_char_p
        self._add("CreateCustomOpDomain", (text, POINTER), create_domain)
        self._add("CustomOpDomain_Add", two, add_operator)
        self._add("AddCustomOpDomain", two, add_domain)
        self._add("GetTensorTypeAndShape", two, get_shape)
        self._add("GetDimensionsCount", two, lambda info, out: store(out, array(info).ndim))
        self._add("GetDimensions", (*two, SIZE), get_sizes)
        self._add("GetTensorMutableData", two, lambda value, out: store(out, array(value).ctypes.data))
        self._add("KernelContext_GetInputCount", two, lambda _, out: store(out, len(self.inputs)))
        self._add("KernelContext_GetInput", (POINTER, SIZE, POINTER), get_input)
        self._add("KernelContext_GetOutput", (POINTER, SIZE, POINTER, SIZE, POINTER), get_output)
        self._add("KernelInfoGetAttribute_int64", (POINTER, text, POINTER), lambda *to: store(to[2], self.block))
        self._add("KernelContext_ParallelFor", (POINTER, TASK, SIZE, SIZE, POINTER), parallel_for)


@pytest.fixture
def new_library(library: Path, tmp_path: Path) -> Path:
    """A copy, which the loader takes for another library: its domain is not made yet."""
    return Path(shutil.copy(library, tmp_path))


@pytest.fixture
def runtime(new_library: Path) -> Runtime:
    """One with whom the library is registered."""
    runtime = Runtime(new_library)
    assert runtime.register() is None
    return runtime


def test_an_older_runtime_is_refused_with_the_version_that_is_needed(new_library: Path) -> None:
    runtime = Runtime(new_library, version=b"1.17.3", newest=17)
    assert runtime.register() in runtime.statuses
    assert runtime.messages == ["deploynorm needs onnxruntime >= 1.18, and this is 1.17.3. Fix: upgrade onnxruntime"]
    assert runtime.calls == []


def test_the_domain_is_made_once_and_added_to_every_session(runtime: Runtime) -> None:
    for _ in range(2):
        assert runtime.register() is None
    assert runtime.domains == [DOMAIN.encode()]
    assert runtime.added == 3
    names = Counter(runtime.member(op, "GetName", ctypes.c_char_p, POINTER)(op) for op in runtime.operators)
    assert names == {OP_TYPE.encode(): 5, ADD_OP_TYPE.encode(): 5, BLOCKED_OP_TYPE.encode(): 1}


def test_with_cuda_the_operators_are_those_of_both_names_of_the_provider(cuda_libraries: Path, tmp_path: Path) -> None:
    """As a plug-in CUDA's provider has another name; a CPU alone knows neither."""
    runtime = Runtime(Path(shutil.copy(cuda_libraries / ORT_LIBRARY, tmp_path)))
    assert runtime.register() is None
    of_provider: dict[bytes | None, set[tuple[bytes, int, int]]] = {}
    for operator in runtime.operators:
        provider = runtime.member(operator, "GetExecutionProviderType", ctypes.c_char_p, POINTER)(operator)
        name = runtime.member(operator, "GetName", ctypes.c_char_p, POINTER)(operator)
        x, gamma = (runtime.member(operator, "GetInputType", INT, POINTER, SIZE)(operator, n) for n in (0, 1))
        of_provider.setdefault(provider, set()).add((name, x, gamma))
    assert of_provider.keys() == {None, b"CUDAExecutionProvider", b"CudaPluginExecutionProvider"}
    on_cuda = of_provider[b"CUDAExecutionProvider"]
    types = ((1, 1), (10, 1), (11, 11), (16, 1))
    assert on_cuda == of_provider[b"CudaPluginExecutionProvider"] >= {(OP_TYPE.encode(), *each) for each in types}
    assert len(runtime.operators) == len(of_provider[None]) + 2 * len(on_cuda)


def test_a_registration_that_failed_is_told_and_can_be_tried_again(new_library: Path) -> None:
    runtime = Runtime(new_library)
    for n in range(13):  # the domain, eleven operators, the session
        runtime.calls.clear()
        runtime.fails = lambda name, call, n=n: call == n
        assert runtime.register() in runtime.statuses, n
        assert runtime.added == 0
    assert runtime.calls[-1] == "AddCustomOpDomain"
    runtime.fails = lambda name, call: False
    assert runtime.register() is None
    assert runtime.added == 1
    assert len(runtime.operators[-11:]) == len(set(runtime.operators[-11:])) == 11


def test_threads_that_register_first_make_one_domain_together(new_library: Path) -> None:
    runtime = Runtime(new_library)
    runtime.pause = 0.05  # the others come while the first is at it
    barrier = threading.Barrier(8)

    def one(_: int) -> int | None:
        barrier.wait(timeout=60)
        return runtime.register()

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(one, range(8))) == [None] * 8
    assert len(runtime.domains) == 1
    assert len(runtime.operators) == 11
    assert runtime.added == 8


def a_call(*shape: int) -> list[np.ndarray | None]:
    rng = np.random.default_rng(0)
    channels = shape[1]
    parameters = (rng.normal(size=channels), rng.normal(size=channels), np.full(channels, -np.inf), np.ones(channels))
    return [rng.normal(size=shape).astype(np.float32), *(p.astype(np.float32) for p in parameters)]


@pytest.mark.parametrize("op_type", [OP_TYPE, ADD_OP_TYPE, BLOCKED_OP_TYPE])
def test_every_failure_of_a_run_is_passed_on_and_every_shape_given_back(op_type: str, runtime: Runtime) -> None:
    operator = runtime.operator(op_type)
    runtime.block = 1
    status, kernel = runtime.create_kernel(operator)
    assert status is None
    assert kernel is not None
    runtime.inputs = a_call(1, 3, 200, 200)  # so few and large planes that the threads are asked twice for each
    if op_type != OP_TYPE:
        runtime.inputs.append(np.zeros((1, 3, 200, 200), np.float32))
    runtime.kept.clear()
    failed = []
    for n in range(200):
        runtime.calls.clear()
        runtime.fails = lambda name, call, n=n: call == n
        status = runtime.compute(operator, kernel)
        assert runtime.kept["shape"] == 0, runtime.calls
        if len(runtime.calls) <= n:
            break
        failed.append(runtime.calls[n])
        assert status in runtime.statuses, failed[-1]
        assert runtime.kept["status"] == 1, failed[-1]  # the one that was passed on
        runtime.kept["status"] = 0
    assert status is None
    assert {
        "KernelContext_GetInput",
        "GetTensorTypeAndShape",
        "GetDimensionsCount",
        "GetDimensions",
        "GetTensorMutableData",
        "KernelContext_GetOutput",
        "KernelContext_ParallelFor",
    } <= set(failed)
    wanted = filter_response_norm(*(a for a in runtime.inputs[:5] if a is not None))
    np.testing.assert_allclose(runtime.y, wanted, rtol=1e-5, atol=1e-5)


def test_of_several_failures_of_the_threads_one_is_passed_on_and_the_others_given_back(runtime: Runtime) -> None:
    operator = runtime.operator(OP_TYPE)
    _, kernel = runtime.create_kernel(operator)
    assert kernel is not None
    runtime.inputs = a_call(1, 3, 200, 200)
    runtime.fails = lambda name, call: name == "KernelContext_ParallelFor"
    first = FIRST_STATUS + len(runtime.statuses)
    assert runtime.compute(operator, kernel) == first
    assert len(runtime.statuses) == 6
    assert runtime.kept["status"] == 1


def test_an_attribute_that_cannot_be_read_is_told_in_our_words(runtime: Runtime) -> None:
    operator = runtime.operator(BLOCKED_OP_TYPE)
    for block, fails in ((0, False), (-1, False), (8, True)):
        runtime.block = block
        runtime.kept.clear()
        runtime.fails = lambda name, call, fails=fails: fails
        status, kernel = runtime.create_kernel(operator)
        assert status in runtime.statuses
        assert kernel is None
        assert runtime.kept["status"] == 1
        assert runtime.messages[-1] == f"{BLOCKED_OP_TYPE}: attribute block must be a positive integer"
