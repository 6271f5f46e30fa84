"""Reading TensorRT's lists of layers."""

from __future__ import annotations

import json

import pytest

from deploynorm.trt.errors import Message
from deploynorm.trt.layers import (
    Layer,
    Product,
    Tensor,
    layer_counts,
    layers_of_inspector,
    layers_of_log,
    profiles_listed,
    types_of_products,
)

# As TensorRT-RTX 1.7 writes them at the end of a build.
LOG = """Layers:
Name: __mye45_0_myl0_0, LayerType: shape_call, Inputs: [], Constants: [], Outputs: [], TacticName: , StreamId: 0, Metadata: 
Name: __myl_Move_myl0_1, LayerType: kgen, Inputs: [ { Name: x, Dimensions: [-1,4,-1,-1], Strides: [-1,-1,-1,1], StrideOrder: [3,2,1,0], Datatype: Half, Format: (Linear) Row major linear format }], Constants: [], Outputs: [ { Name: c0, Dimensions: [-1,4,-1,-1], Strides: [-1,1,-1,4], StrideOrder: [3,0,2,1], Datatype: Half, Format: (NHWC) Channel major format }], TacticName: __myl_Move_0xa7, StreamId: 0, Metadata: 
Name: conv0_myl0_2, LayerType: correlation, Inputs: [ { Name: c0, Dimensions: [-1,4,-1,-1], Strides: [-1,1,-1,4], StrideOrder: [3,0,2,1], Datatype: Half, Format: (NHWC) Channel major format }], Constants: [ { Name: w, Dimensions: [4,4,3,3], Strides: [9,1,3,1], StrideOrder: [3,0,2,1], Datatype: Half, Format: (NHWC) Channel major format }], Outputs: [ { Name: c1, Dimensions: [-1,4,-1,-1], Strides: [-1,1,-1,4], StrideOrder: [3,0,2,1], Datatype: Half, Format: (NHWC) Channel major format }], TacticName: stub, StreamId: 0, Metadata: [ONNX Layer: conv0]
Name: frn0_myl0_3, LayerType: custom_layer, Inputs: [ { Name: c1, Dimensions: [-1,4,-1,-1], Strides: [-1,1,-1,4], StrideOrder: [3,0,2,1], Datatype: Half, Format: (NHWC) Channel major format }, { Name: g, Dimensions: [4], Strides: [1], StrideOrder: [0], Datatype: Float, Format: (Linear) Row major linear format }], Constants: [], Outputs: [ { Name: y, Dimensions: [-1,4,-1,-1], Strides: [-1,1,-1,4], StrideOrder: [3,0,2,1], Datatype: BFloat16, Format: (NHWC) Channel major format }], TacticName: , StreamId: 0, Metadata: [ONNX Layer: frn0][ONNX Layer: relu0]

I/O Tensors:
 Name: x, IOMode: Input, DataType: Half"""  # noqa: E501, W291

# As an inspector of TensorRT 10 gives them.
INSPECTED = {
    "Layers": [
        {
            "Name": "Reformatting CopyNode for Input Tensor 0 to conv0",
            "LayerType": "Reformat",
            "Inputs": [{"Name": "x", "Format/Datatype": "Row major linear FP16 format"}],
            "Outputs": [{"Name": "c0", "Format/Datatype": "Channel major FP16 format where channel % 8 == 0"}],
            "Metadata": "",
        },
        {
            "Name": "conv0",
            "LayerType": "CaskConvolution",
            "Inputs": [{"Name": "c0", "Format/Datatype": "Half"}],
            "Outputs": [{"Name": "c1", "Format/Datatype": "N/A due to dynamic shapes"}],
            "Metadata": "[ONNX Layer: conv0]\x1f[ONNX Layer: relu0]",
        },
        {"Name": "frn0", "LayerType": "PluginV3", "Inputs": [], "Outputs": []},
    ],
    "Bindings": ["x", "y"],
}


def test_the_log_of_a_build_is_read() -> None:
    found = layers_of_log([Message("INFO", "Layers"), Message("VERBOSE", LOG)])
    assert [(layer.name, layer.kind, layer.plugin, layer.moves_only) for layer in found] == [
        ("__mye45_0_myl0_0", "shape_call", False, False),
        ("__myl_Move_myl0_1", "kgen", False, True),
        ("conv0_myl0_2", "correlation", False, False),
        ("frn0_myl0_3", "custom_layer", True, False),
    ]
    assert found[0].outputs == ()
    assert found[2].inputs == (Tensor("c0", "float16", "(NHWC) Channel major format"),)
    assert [tensor.dtype for tensor in found[3].inputs] == ["float16", "float32"]
    assert found[3].dtypes == ("float16", "float32", "bfloat16")
    assert found[3].nodes == ("frn0", "relu0")
    assert layer_counts(found)[0] == ("shape_call", "-", 1)


def test_layers_of_a_second_profile_bear_its_number() -> None:
    assert profiles_listed(layers_of_log([Message("VERBOSE", LOG)])) == profiles_listed([]) == 1
    second = LOG.replace("Name: x,", "Name: x [profile 1],")
    assert profiles_listed(layers_of_log([Message("VERBOSE", second)])) == 2


def test_a_log_without_layers_has_none() -> None:
    assert layers_of_log([Message("VERBOSE", "Building graph")]) == ()


def test_the_inspector_of_an_engine_is_read() -> None:
    found = layers_of_inspector(json.dumps(INSPECTED))
    assert [(layer.kind, layer.plugin, layer.moves_only) for layer in found] == [
        ("Reformat", False, True),
        ("CaskConvolution", False, False),
        ("PluginV3", True, False),
    ]
    tensors = [tensor for layer in found for tensor in (*layer.inputs, *layer.outputs)]
    assert [tensor.dtype for tensor in tensors] == ["float16", "float16", "float16", ""]
    assert found[1].nodes == ("conv0", "relu0")


@pytest.mark.parametrize("text", ["", "{}", '{"Layers": null}', '{"Layers": ["conv0", "frn0"]}', "[]"])
def test_an_engine_without_details_tells_nothing(text: str) -> None:
    assert layers_of_inspector(text) == ()


def layer(node: str, dtype: str, name: str = "", kind: str = "correlation", more: tuple[str, ...] = ()) -> Layer:
    inputs = tuple(Tensor("x", each, "") for each in (dtype, *more))
    return Layer(name or node, kind, inputs, (Tensor("y", dtype, ""),), (node,))


FLOAT = Product("float16", frozenset({"float16"}))
INT8 = Product("float16", frozenset({"int8"}))
HALF_INT8 = Product("float16", frozenset({"int8", "float16"}))  # its weights are not quantized

COMPARED: dict[str, tuple[Product, list[Layer], tuple[dict[str, str], list[str]]]] = {
    "as the graph": (FLOAT, [layer("conv", "float16")], ({"conv": "float16"}, [])),
    "in float32": (FLOAT, [layer("conv", "float32")], ({}, ["conv in float32 instead of float16"])),
    "not found": (FLOAT, [layer("conv", "")], ({}, [])),
    "another node": (FLOAT, [layer("frn0", "float32")], ({}, [])),
    "two layers": (FLOAT, [layer("conv", "float16"), layer("conv", "float16", "part 2")], ({"conv": "float16"}, [])),
    "a cast before it, made with its padding": (
        FLOAT,
        [layer("conv", "float32", "__myl_CastReplConc_myl0_1", "kgen"), layer("conv", "float16")],
        ({"conv": "float16"}, []),
    ),
    "a cast before a product in float32": (
        FLOAT,
        [layer("conv", "float16", "__myl_Cast_myl0_1", "kgen"), layer("conv", "float32")],
        ({}, ["conv in float32 instead of float16"]),
    ),
    "a generated kernel": (FLOAT, [layer("conv", "float16", kind="kgen")], ({"conv": "float16"}, [])),
    "a copy before it": (
        FLOAT,
        [layer("conv", "float32", "__myl_Move_myl0_1"), layer("conv", "float16")],
        ({"conv": "float16"}, []),
    ),
    "int8 that nobody asked for": (FLOAT, [layer("conv", "int8")], ({}, ["conv in int8 instead of float16"])),
    "quantized, after a cast": (
        INT8,
        [layer("conv", "float16", "__myl_MulMinMaxRounCast_myl0_1", "kgen"), layer("conv", "int8")],
        ({"conv": "int8"}, []),
    ),
    "quantized, with the sum of a block": (INT8, [layer("conv", "int8", more=("float16",))], ({"conv": "int8"}, [])),
    "quantized, and not built so": (INT8, [layer("conv", "float16")], ({"conv": "float16"}, [])),
    "quantized, and in float32": (
        INT8,
        [layer("conv", "float32")],
        ({}, ["conv in float32 instead of float16 or int8"]),
    ),
    "dequantized in the product's kernel": (HALF_INT8, [layer("conv", "int8", kind="runtime_fusion")], ({}, [])),
    "one input dequantized before": (HALF_INT8, [layer("conv", "float16")], ({"conv": "float16"}, [])),
}


@pytest.mark.parametrize(("product", "layers", "want"), COMPARED.values(), ids=COMPARED)
def test_products_are_held_to_the_types_of_the_graph(
    product: Product, layers: list[Layer], want: tuple[dict[str, str], list[str]]
) -> None:
    assert types_of_products(layers, {"conv": product}) == want
