"""Export: the nodes that are written, in each lowering and opset, and what they compute."""

from __future__ import annotations

import copy
import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import ml_dtypes
import numpy as np
import onnx
import onnx_ir
import pytest
import torch
from graphs import ELEMENT_TYPES
from tolerances import FLOAT64, OP_BFLOAT16, OP_FLOAT16, OP_FLOAT32, Tolerance
from torch import Tensor, nn

from deploynorm import contract
from deploynorm._export import Exported, export
from deploynorm._fold import fold
from deploynorm.errors import InputError, ModelError
from deploynorm.layers import TLU, CenConv2d, FRN2d, MABN2d
from deploynorm.lowering import function_proto, lower
from deploynorm.models import mabn_resnet
from deploynorm.run.half import HalfRunner
from deploynorm.run.onnxruntime import OnnxRuntimeRunner
from deploynorm.run.reference import ReferenceRunner

FRN_NODE = f"{contract.DOMAIN}::{contract.OP_TYPE}"


class Net(nn.Module):
    """Two FRN layers, with one epsilon and with one per channel, and a separate TLU."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1)
        self.norm1 = FRN2d(16)
        self.conv2 = nn.Conv2d(16, 24, 3, stride=2)
        self.norm2 = FRN2d(24, learned_eps="channel", tlu=False)
        self.tlu = TLU(24)
        self.head = nn.Linear(24, 5)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            self.norm2.eps_l.uniform_(1e-3, 2, generator=generator)
            for parameter in (self.norm1.tau, self.norm1.bias, self.norm2.bias, self.tlu.tau):
                parameter.normal_(generator=generator)

    def forward(self, image: Tensor) -> Tensor:
        features = self.tlu(self.norm2(self.conv2(self.norm1(self.conv1(image)))))
        return self.head(features.mean((2, 3)))


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.shape[0] < 4 else x * 3


class FixedSize(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3 * 8 * 8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.flatten(1))


def _image(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


X = (_image(2, 3, 17, 19),)


def _net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture
def net() -> Net:
    return _net()


@pytest.fixture(scope="module")
def exported() -> Exported:
    """The network with every default, exported once."""
    return export(_net(), X)


def _agrees(exported: Exported, network: nn.Module, x: Tensor, tolerance: Tolerance = OP_FLOAT32) -> None:
    onnx.checker.check_model(exported.to_proto(), full_check=True)
    with torch.no_grad():
        want = copy.deepcopy(network).double()(x.double()).numpy()
    with OnnxRuntimeRunner(exported.to_proto().SerializeToString()) as runner:
        (got,) = runner.infer({runner.inputs[0].name: x.numpy()}).values()
    np.testing.assert_allclose(got.astype(np.float64), want, **tolerance.kwargs())


@pytest.mark.parametrize("opset", [18, *(pytest.param(opset, marks=pytest.mark.slow) for opset in range(19, 23)), 23])
@pytest.mark.parametrize("lowering", ["custom", "primitives", "rmsnorm"])
def test_every_lowering_computes_the_network(
    net: Net, lowering: str, opset: int, require: Callable[[str], None]
) -> None:
    require("ort")
    if lowering == "rmsnorm" and opset < 23:
        with pytest.raises(ModelError, match="needs a newer opset"):
            export(net, X, lowering=lowering, opset=opset)
        return
    exported = export(net, X, lowering=lowering, opset=opset)
    assert exported.opset == opset
    for shape in ((2, 3, 17, 19), (1, 3, 8, 31)):
        _agrees(exported, net, _image(*shape))
    if lowering != "custom":
        proto = exported.to_proto()
        assert {node.domain for node in proto.graph.node} == {opset.domain for opset in proto.opset_import} == {""}
        assert not proto.functions
        assert exported.node_counts()["RMSNormalization"] == (2 if lowering == "rmsnorm" else 0)


def test_custom_lowering_writes_one_node_per_layer(exported: Exported) -> None:
    assert exported.node_counts() == Counter({"Conv": 2, FRN_NODE: 2, "Max": 1, "ReduceMean": 1, "Gemm": 1})
    nodes = [node for node in exported.to_proto().graph.node if node.op_type == contract.OP_TYPE]
    for node in nodes:
        assert {a.name: onnx.helper.get_attribute_value(a).decode() for a in node.attribute} == contract.NODE_ATTRIBUTES
        assert len(node.input) == len(contract.INPUTS)
    initializers = {value.name: value for value in exported.to_proto().graph.initializer}
    for name in nodes[0].input[1:]:
        assert list(initializers[name].dims) == [16], f"{name} is not a stored constant"


def test_the_model_has_the_function_body_unless_left_out(net: Net, exported: Exported) -> None:
    with_body, without = exported.to_proto(), export(net, X, function=False)
    assert [(f.domain, f.name) for f in with_body.functions] == [(contract.DOMAIN, contract.OP_TYPE)]
    assert not without.to_proto().functions
    assert [n.op_type for n in with_body.graph.node] == [n.op_type for n in without.to_proto().graph.node]
    x = _image(2, 3, 9, 9)
    with ReferenceRunner(without.to_proto()) as runner, torch.no_grad():  # which has the operator itself
        (got,) = runner.infer({"image": x.numpy()}).values()
        np.testing.assert_allclose(got, net(x).numpy(), **OP_FLOAT32.kwargs())
    foreign = onnx.parser.parse_function(
        f'<opset_import: ["": 20], domain: "other"> {contract.OP_TYPE} (x) => (y) {{ y = Identity (x) }}'
    )
    function = onnx_ir.serde.deserialize_function(foreign)
    without.model.functions[function.identifier()] = function
    with pytest.raises(ModelError, match="already has a local function named FilterResponseNormalization"):
        lower(without.model, "custom")


@pytest.mark.parametrize(
    ("dynamic", "shape"),
    [
        (None, ("N", 3, "H", "W")),
        ("all", ("N", 3, "H", "W")),
        ("batch", ("N", 3, 17, 19)),
        ("spatial", (2, 3, "H", "W")),
        ("none", (2, 3, 17, 19)),
    ],
)
def test_dynamic_sets_the_dynamic_axes(net: Net, dynamic: str | None, shape: tuple[int | str, ...]) -> None:
    exported = export(net, X, dynamic=dynamic)
    (spec,) = exported.inputs
    assert (spec.name, spec.shape, spec.dtype) == ("image", shape, "float32")
    output = exported.to_proto().graph.output[0].type.tensor_type.shape.dim[0]
    assert (output.dim_param or output.dim_value) == shape[0]


def test_no_symbol_of_torch_is_left_in_the_graph(exported: Exported) -> None:
    proto = exported.to_proto()
    values = [*proto.graph.input, *proto.graph.output, *proto.graph.value_info]
    sizes = {dim.dim_param for value in values for dim in value.type.tensor_type.shape.dim if dim.dim_param}
    assert {"N", "H", "W"} <= sizes
    assert not [size for size in sizes if re.search(r"s\d", size)]


@pytest.mark.parametrize(
    ("network", "shape", "note"),
    [
        (FixedSize(), ("N", 3, 8, 8), "only the batch was varied, since the network refuses every other H and W that"),
        (Branching(), (2, 3, "H", "W"), "holds for some sizes only: axis 0 of x: 1 to 3"),
    ],
    ids=["fixes", "branches"],
)
def test_axes_that_cannot_be_dynamic_are_static_and_reported_or_refused(
    network: nn.Module, shape: tuple[int | str, ...], note: str
) -> None:
    exported = export(network.eval(), (_image(2, 3, 8, 8),))
    assert exported.inputs[0].shape == shape
    assert note in "\n".join(exported.notes)
    with pytest.raises(ModelError, match="requires to be dynamic"):
        export(network, (_image(2, 3, 8, 8),), dynamic="all")


@pytest.mark.parametrize("opset", [17, 24])
def test_unsupported_opset_is_refused(net: Net, opset: int) -> None:
    with pytest.raises(InputError, match="unsupported opset"):
        export(net, X, opset=opset)


def test_float64_network_stays_float64(require: Callable[[str], None]) -> None:
    """Without a convolution, which ONNX Runtime has in float32 only."""
    require("ort")
    network, x = nn.Sequential(FRN2d(3, learned_eps="layer"), TLU(3)).double(), X[0].double()
    exported = export(network, (x,))
    assert exported.inputs[0].dtype == "float64"
    _agrees(exported, network, x, FLOAT64)
    with pytest.raises(ModelError, match="computes in float32"):
        export(network, (x,), lowering="rmsnorm")


HALF = {"float16": torch.float16, "bfloat16": torch.bfloat16}
TOLERANCE = {"float16": OP_FLOAT16, "bfloat16": OP_BFLOAT16}
NUMPY = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("lowering", ["custom", "primitives", "rmsnorm"])
def test_every_lowering_keeps_squares_of_large_half_values(
    lowering: str, dtype: str, require: Callable[[str], None]
) -> None:
    """With NumPy's half types and with their emulation: ONNX Runtime's CPU would hide an overflow."""
    require("ort")
    layer = FRN2d(4, eps=torch.tensor([1e-6, 1e-5, 1e-4, 1e-3]))
    with torch.no_grad():
        layer.tau.copy_(torch.tensor([-0.5, 0.0, 0.25, -1.0]))
    exported = export(layer, (_image(2, 4, 5, 5),), dtype=HALF[dtype], lowering=lowering)
    onnx.checker.check_model(exported.to_proto(), full_check=True)
    x = (_image(2, 4, 7, 9) * 2e4).clamp(-6e4, 6e4)
    x[:, 1] *= 1e-7  # near its epsilon
    x[0, 0, 0, 0] = 6e4
    x = x.to(HALF[dtype])
    feed = x.float().numpy().astype(NUMPY[dtype])
    with torch.no_grad():
        want = layer.double()(x.double()).numpy()
    assert (want > 0).mean() > 0.3
    for runner in (ReferenceRunner, HalfRunner):
        with runner(exported.to_proto()) as opened:
            got = opened.infer({"x": feed})["output"]
        assert got.dtype == feed.dtype
        np.testing.assert_allclose(got.astype(np.float64), want, **TOLERANCE[dtype].kwargs())


def _initializer_types(exported: Exported) -> dict[str, str]:
    name = onnx.TensorProto.DataType.Name
    return {value.name: name(value.data_type).lower() for value in exported.to_proto().graph.initializer}


@pytest.mark.parametrize("dtype", HALF)
def test_a_half_graph_is_typed_throughout(net: Net, dtype: str) -> None:
    exported = export(net, X, dtype=HALF[dtype])
    proto = exported.to_proto()
    onnx.checker.check_model(proto, full_check=True)
    assert exported.node_counts() == Counter({"Conv": 2, FRN_NODE: 2, "Max": 1, "ReduceMean": 1, "Gemm": 1})
    assert exported.inputs[0].dtype == exported.dtype == dtype
    assert onnx.TensorProto.DataType.Name(proto.graph.output[0].type.tensor_type.elem_type).lower() == dtype
    types = _initializer_types(exported)
    for node in proto.graph.node:
        parameters = [name for name in node.input if name in types and types[name] != "int64"]
        wide = node.op_type == contract.OP_TYPE
        assert {types[name] for name in parameters} <= ({"float"} if wide else {dtype}), node.op_type
    computed = {name for node in proto.graph.node for name in node.output}
    activations = {v.name: v.type.tensor_type.elem_type for v in proto.graph.value_info if v.name in computed}
    assert len(activations) >= 5
    assert set(activations.values()) == {ELEMENT_TYPES[dtype]}


@pytest.mark.parametrize("dtype", ["float32", *HALF])
def test_norms_that_did_not_fold_are_affine_nodes_with_float32_statistics(dtype: str) -> None:
    network = nn.Sequential(nn.ReLU(), MABN2d(3), nn.ReLU(), nn.BatchNorm2d(3)).eval()
    network[1].running_var.fill_(1e7)
    exported = export(fold(network, (_image(2, 3, 8, 8),)).model, (_image(2, 3, 8, 8),), dtype=getattr(torch, dtype))
    onnx.checker.check_model(exported.to_proto(), full_check=True)
    assert exported.node_counts() == Counter({"Relu": 2, "BatchNormalization": 2})
    assert set(_initializer_types(exported).values()) == {"float"}


@pytest.mark.parametrize("dtype", HALF)
def test_a_norm_that_the_exporter_itself_puts_into_a_convolution_is_rounded_with_it(
    dtype: str, require: Callable[[str], None]
) -> None:
    """torch's optimizer leaves the product in float32, beside a half input: no ONNX file."""
    require("ort")
    torch.manual_seed(0)
    network = nn.Sequential(CenConv2d(3, 4, 3), MABN2d(4), nn.ReLU(), nn.ConvTranspose2d(4, 4, 3), nn.BatchNorm2d(4))
    network[1].running_var.fill_(1e-3)
    x = _image(2, 3, 9, 11)
    exported = export(network.eval(), (x,), dtype=HALF[dtype])
    onnx.checker.check_model(exported.to_proto(), full_check=True)
    with HalfRunner(exported.to_proto()) as runner, torch.no_grad():
        feed = x.numpy().astype(NUMPY[dtype])
        got = runner.infer({"input": feed})["output"].astype(np.float64)
        want = network.double()(torch.from_numpy(feed.astype(np.float64))).numpy()
    np.testing.assert_allclose(got / np.abs(want).max(), want / np.abs(want).max(), **TOLERANCE[dtype].kwargs())
    if dtype == "float16":
        network.float()[1].running_var.fill_(1e-14)
        network[1].eps = 1e-14
        with pytest.raises(ModelError, match="multiplied by the norm behind it, does not fit into float16"):
            export(network, (x,), dtype=torch.float16)


def test_kept_layers_and_ends_are_cast_and_recorded(net: Net) -> None:
    exported = export(net, X, dtype=torch.float16, keep_float32=["conv2", "he*"], keep_io_types=True)
    onnx.checker.check_model(exported.to_proto(), full_check=True)
    assert (exported.dtype, exported.kept_float32, exported.keep_io_types) == ("float16", ("conv2", "head"), True)
    assert exported.inputs[0].dtype == "float32"
    assert exported.to_proto().graph.output[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    types = _initializer_types(exported)
    assert {types[name] for name in ("conv2.weight", "head.weight")} == {"float"}
    assert types["conv1.weight"] == "float16"


def test_a_half_network_can_be_exported_in_float32(net: Net, require: Callable[[str], None]) -> None:
    require("ort")
    net.half()
    exported = export(net, (X[0].half(),), dtype=torch.float32)
    assert exported.dtype == exported.inputs[0].dtype == "float32"
    assert exported.inputs[0].shape == ("N", 3, "H", "W")
    _agrees(exported, net, _image(1, 3, 8, 31).half().float())


def test_an_operator_without_bfloat16_in_the_opset_is_reported(net: Net) -> None:
    assert export(net, X, dtype=torch.bfloat16).opset == 22
    with pytest.raises(ModelError, match=r"Conv has no bfloat16 in this opset\. Got opset 20\. Fix: pass --opset 22"):
        export(net, X, dtype=torch.bfloat16, opset=20)


def test_a_network_that_makes_float32_tensors_gets_an_error_that_names_the_conversion() -> None:
    class Mixes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Conv2d(3, 4, 3))

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x + torch.ones(3, 1, 1))

    with pytest.raises(ModelError, match=r"converted from torch\.float32 to torch\.float16.*--keep-float32"):
        export(Mixes().eval(), (_image(2, 3, 8, 8),), dtype=torch.float16)
    exported = export(Mixes().eval(), (_image(2, 3, 8, 8),), dtype=torch.float16, keep_float32=["inner"])
    assert exported.kept_float32 == ("inner",)


def test_an_example_that_is_no_tensor_is_refused_in_half_too(net: Net) -> None:
    with pytest.raises(InputError, match="example input 0 is not a tensor"):
        export(net, (3,), dtype=torch.float16)


def test_body_of_a_float32_model_has_no_cast() -> None:
    """ONNX Runtime runs a Cast to the same type at the end of a body as one more pass over the tensor."""
    assert not {"Cast", "CastLike"} & {node.op_type for node in function_proto(20).node}
    assert {"Cast", "CastLike"} <= {node.op_type for node in function_proto(20, half=True).node}


@pytest.mark.parametrize("limit", [None, 1000])
def test_weights_go_to_a_file_of_their_own_past_the_limit(
    net: Net, limit: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, require: Callable[[str], None]
) -> None:
    require("ort")
    if limit is not None:
        monkeypatch.setattr(sys.modules["deploynorm.onnx_file"], "_PROTOBUF_LIMIT", limit)
    exported = export(net, X)
    exported.save(tmp_path / "net.onnx")
    assert (tmp_path / "net.onnx.data").exists() == (limit is not None)
    x = _image(1, 3, 9, 9)
    with OnnxRuntimeRunner(tmp_path / "net.onnx") as runner, torch.no_grad():
        (got,) = runner.infer({"image": x.numpy()}).values()
        np.testing.assert_allclose(got, net(x).numpy(), **OP_FLOAT32.kwargs())


def test_network_given_is_unchanged_and_is_exported_in_evaluation_mode(require: Callable[[str], None]) -> None:
    require("ort")
    network, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), FRN2d(4), nn.Dropout(0.5)), _image(2, 3, 9, 9)
    before, shape = copy.deepcopy(network.state_dict()), repr(network)
    exported = export(network.train(), (x,))
    assert network.training
    assert repr(network) == shape
    assert all(parameter.requires_grad for parameter in network.parameters())
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())
    _agrees(exported, network.eval(), x)


def test_names_and_metadata_are_written(net: Net) -> None:
    exported = export(net, X, input_names=["pixels"], output_names=["scores"], metadata={"key": "value"})
    assert [spec.name for spec in exported.inputs] == ["pixels"]
    assert exported.output_names == ("scores",)
    assert {entry.key: entry.value for entry in exported.to_proto().metadata_props}["key"] == "value"


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (lambda x: torch.linalg.matrix_exp(x), "matrix_exp"),
        (lambda x: x if x.sum() > 0 else -x, "cannot trace the network"),
    ],
    ids=["operator without translation", "control flow on values"],
)
def test_network_that_cannot_be_exported_is_refused(forward: Callable[[Tensor], Tensor], message: str) -> None:
    network = nn.Identity()
    network.forward = forward
    with pytest.raises(ModelError, match=message):
        export(network, (_image(2, 3, 4, 4),))


def test_opset_that_torch_did_not_reach_is_refused(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.onnx.export logs a conversion that failed, and returns the model in another opset."""
    translate = torch.onnx.export

    def stays_at_18(*args: object, opset_version: int, **options: object) -> torch.onnx.ONNXProgram:
        return translate(*args, opset_version=18, **options)

    monkeypatch.setattr(torch.onnx, "export", stays_at_18)
    with pytest.raises(ModelError, match=r"could not convert the graph\. Got opset 18; expected opset 21"):
        export(net, X, opset=21)


@pytest.mark.slow
def test_exported_mabn_net_has_exactly_the_nodes_of_the_folded_bn_net() -> None:
    """Of one block of each width; tests/parity has the shipped ResNet-20."""
    x = (_image(2, 1, 28, 28),)
    sequences = {}
    for norm in ("mabn", "bn"):
        network = mabn_resnet.ResNet(mabn_resnet.BasicBlock, (1, 1, 1), 16, "small", 10, 1, norm).eval()
        folded, report = fold(network, x)
        assert not report.with_outcome("not foldable")
        assert not report.with_outcome("affine")
        sequences[norm] = [node.op_type for node in export(folded, x).to_proto().graph.node]
    assert sequences["mabn"] == sequences["bn"]
    assert set(sequences["mabn"]) <= {"Conv", "Relu", "Add", "GlobalAveragePool", "ReduceMean", "Reshape", "Gemm"}


@pytest.mark.parametrize("norm", ["FilterResponseNormTlu2d", "FilterResponseNormAct2d"])
@pytest.mark.parametrize("apply_act", [True, False])
def test_frn_of_timm_is_taken_over(timm: ModuleType, norm: str, apply_act: bool) -> None:
    layers = timm.layers.filter_response_norm
    torch.manual_seed(0)
    layer = getattr(layers, norm)(3, apply_act=apply_act)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    x = _image(2, 3, 8, 8) * 1e-2
    exported = export(nn.Sequential(layer).eval(), (x,))
    assert exported.node_counts()[FRN_NODE] == 1
    with ReferenceRunner(exported.to_proto()) as runner, torch.no_grad():
        (got,) = runner.infer({"input": x.numpy()}).values()
        np.testing.assert_allclose(got, layer.eval()(x).numpy(), **OP_FLOAT32.kwargs())
    constants = {value.name: onnx.numpy_helper.to_array(value) for value in exported.to_proto().graph.initializer}
    (node,) = [node for node in exported.to_proto().graph.node if node.op_type == contract.OP_TYPE]
    assert constants[node.input[4]] == pytest.approx(1e-5), "timm's epsilon is 1e-5"
    has_tau = norm == "FilterResponseNormTlu2d" and apply_act
    assert np.isneginf(constants[node.input[3]]).all() != has_tau


@pytest.mark.slow
def test_timm_network_built_for_frn_needs_few_nodes(timm: ModuleType) -> None:
    network = timm.create_model("resnetv2_50d_frn")
    exported = export(network, (_image(2, 3, 64, 64),))
    assert exported.node_counts()[FRN_NODE] == 51
    assert exported.node_counts().total() <= 130
    assert exported.inputs[0].shape == ("N", 3, "H", "W")
