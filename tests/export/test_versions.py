"""Operator versions of TFLite files: what tensors need, and what files say."""

import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.tools import flatbuffer_utils
from ai_edge_quantizer import quantizer, recipe

from keras_kd.export.formats import metadata
from keras_kd.export.formats.tflite import operator_versions

KINDS = schema.TensorType


def tensor(kind, shape, scales=None):
    made = schema.TensorT()
    made.type, made.shape, made.buffer = kind, list(shape), 0
    if scales is not None:
        made.quantization = schema.QuantizationParametersT()
        made.quantization.scale = list(np.ones(scales))
        made.quantization.zeroPoint = [0] * scales
    return made


def file_of(name, inputs, output, version=1, options=None):
    """A model with one operator."""
    model, graph = schema.ModelT(), schema.SubGraphT()
    code, operator = schema.OperatorCodeT(), schema.OperatorT()
    code.builtinCode = getattr(schema.BuiltinOperator, name)
    code.deprecatedBuiltinCode, code.version = 0, version
    operator.opcodeIndex = 0
    operator.inputs, operator.outputs = list(range(len(inputs))), [len(inputs)]
    operator.builtinOptions = options
    graph.tensors, graph.operators = [*inputs, output], [operator]
    graph.inputs, graph.outputs = [0], [len(inputs)]
    model.subgraphs, model.operatorCodes = [graph], [code]
    model.buffers, model.metadata, model.signatureDefs = [schema.BufferT()], None, None
    model.version = 3
    return model


X = tensor(KINDS.FLOAT32, (1, 8))
ROWS = tensor(KINDS.FLOAT32, (1, 4))
BIAS = tensor(KINDS.FLOAT32, (4,))
INT8, ANSWER8 = tensor(KINDS.INT8, (1, 8), 1), tensor(KINDS.INT8, (1, 4), 1)


# What `op_version.cc` of TensorFlow gives for these tensors, and `runtime_version.cc` for that.
@pytest.mark.parametrize(
    ("name", "inputs", "output", "version", "since"),
    [
        ("FULLY_CONNECTED", [X, tensor(KINDS.FLOAT32, (4, 8)), BIAS], ROWS, 1, "1.5.0"),
        ("FULLY_CONNECTED", [X, tensor(KINDS.FLOAT32, (4, 8))], ROWS, 6, "2.1.0"),
        ("FULLY_CONNECTED", [X, tensor(KINDS.INT8, (4, 8), 1), BIAS], ROWS, 3, "1.14.0"),
        ("FULLY_CONNECTED", [X, tensor(KINDS.INT8, (4, 8), 4), BIAS], ROWS, 12, "2.17.0"),
        ("FULLY_CONNECTED", [INT8, tensor(KINDS.INT8, (4, 8), 4), BIAS], ANSWER8, 4, "1.14.0"),
        ("FULLY_CONNECTED", [INT8, tensor(KINDS.INT4, (4, 8), 4), BIAS], ANSWER8, 10, "2.11.0"),
        ("DEQUANTIZE", [tensor(KINDS.INT8, (4, 8), 4)], tensor(KINDS.FLOAT32, (4, 8)), 5, "2.7.0"),
        ("DEQUANTIZE", [tensor(KINDS.INT8, (4, 8), 1)], tensor(KINDS.FLOAT32, (4, 8)), 2, "1.14.0"),
        ("DEQUANTIZE", [tensor(KINDS.INT4, (4, 8), 4)], tensor(KINDS.FLOAT32, (4, 8)), 6, "2.18.0"),
        ("DEQUANTIZE", [tensor(KINDS.FLOAT16, (4, 8))], tensor(KINDS.FLOAT32, (4, 8)), 3, "1.15.0"),
        ("SOFTMAX", [tensor(KINDS.INT16, (1, 4), 1)], tensor(KINDS.INT16, (1, 4), 1), 3, "2.3.0"),
        # No version tells of these types, which 2.14 loads and does not run.
        ("DIV", [INT8, INT8], INT8, 1, "2.21.0"),
        ("DIV", [X, X], X, 1, "1.6.0"),
        (
            "TILE",
            [tensor(KINDS.INT16, (1, 4), 1), tensor(KINDS.INT32, (2,))],
            tensor(KINDS.INT16, (1, 8), 1),
            *(1, "2.21.0"),
        ),
        (
            "TRANSPOSE",
            [tensor(KINDS.FLOAT32, (1, 2, 3, 4, 5, 6)), tensor(KINDS.INT32, (6,))],
            tensor(KINDS.FLOAT32, (1, 2, 3, 4, 5, 6)),
            *(6, "2.12.0"),
        ),
        (
            "CONV_2D",
            [tensor(KINDS.FLOAT32, (1, 8, 8, 6)), tensor(KINDS.FLOAT32, (6, 3, 3, 2)), BIAS],
            tensor(KINDS.FLOAT32, (1, 6, 6, 6)),
            *(6, "2.9.0"),
        ),
        (
            "DEPTHWISE_CONV_2D",
            [tensor(KINDS.FLOAT32, (1, 8, 8, 6)), tensor(KINDS.INT8, (1, 3, 3, 6), 6), BIAS],
            tensor(KINDS.FLOAT32, (1, 6, 6, 6)),
            *(6, "2.3.0"),
        ),
    ],
)
def test_a_stale_version_is_raised_to_what_the_tensors_need(name, inputs, output, version, since):
    model = file_of(name, inputs, output)
    operator_versions.mend(model)
    (code,) = model.operatorCodes
    assert code.version == version
    assert code.builtinCode == code.deprecatedBuiltinCode == getattr(schema.BuiltinOperator, name)
    assert operator_versions.said(model) == since


def test_a_version_is_never_lowered_and_unused_entries_go():
    model = file_of("SOFTMAX", [ROWS], ROWS, version=3)
    unused = schema.OperatorCodeT()
    unused.builtinCode, unused.deprecatedBuiltinCode, unused.version = 9, 9, 12
    model.operatorCodes = [unused, *model.operatorCodes]
    model.subgraphs[0].operators[0].opcodeIndex = 1
    operator_versions.mend(model)
    (code,) = model.operatorCodes
    assert (code.builtinCode, code.version) == (schema.BuiltinOperator.SOFTMAX, 3)
    assert model.subgraphs[0].operators[0].opcodeIndex == 0


def test_an_operator_beyond_the_older_field_keeps_its_placeholder():
    model = file_of("GELU", [ROWS], ROWS)
    operator_versions.mend(model)
    (code,) = model.operatorCodes
    assert code.builtinCode == schema.BuiltinOperator.GELU > 127 == code.deprecatedBuiltinCode


def test_files_of_tensorflows_converter_say_what_the_table_says(report):
    # It is the converter itself that the table is compared with.
    for artifact in report.artifacts:
        if artifact.format == "tflite":
            model = flatbuffer_utils.read_model(str(artifact.path))
            for operator in operator_versions.operators(model):
                need = operator_versions.needed(operator)
                # Dynamic files keep the version of weights that stayed float in the end.
                kept = artifact.precision == "dynamic" and operator.version > need
                assert operator.version == need or kept, operator.name
            least, unknown = operator_versions.minimum(model)
            assert unknown == []
            assert operator_versions.said(model) == "{}.{}.0".format(*least)


@pytest.mark.parametrize("make", ["weight_only_wi8_afp32", "weight_only_wi4_afp32", "dynamic"])
def test_what_ai_edge_quantizer_leaves_unsaid(report, make):
    path = next(
        a.path for a in report.artifacts if (a.format, a.precision) == ("tflite", "float32")
    )
    chosen = recipe.dynamic_wi8_afp32() if make == "dynamic" else getattr(recipe, make)()
    tool = quantizer.Quantizer(bytearray(path.read_bytes()), chosen)
    model = flatbuffer_utils.read_model_from_bytearray(bytearray(tool.quantize().quantized_model))
    stale = [
        o for o in operator_versions.operators(model) if o.version < operator_versions.needed(o)
    ]
    assert stale
    about = {
        "name": "corners",
        "signature": {key: report.manifest["model"][key] for key in ("structure", "inputs")},
        "labels": None,
        "normalization": {},
        "ranges": {},
        "versions": {},
    }
    about["signature"]["outputs"] = report.manifest["model"]["outputs"]
    blob = metadata.tflite(
        bytes(flatbuffer_utils.convert_object_to_bytearray(model)), about, "dynamic"
    )
    mended = flatbuffer_utils.read_model_from_bytearray(bytearray(blob))
    for operator in operator_versions.operators(mended):
        assert operator.version >= operator_versions.needed(operator)
    for code in mended.operatorCodes:
        assert code.deprecatedBuiltinCode == min(code.builtinCode, 127)
    versions = {o.name: o.version for o in operator_versions.operators(mended)}
    wanted = {
        "weight_only_wi8_afp32": ("DEQUANTIZE", 5, "2.7.0"),
        "weight_only_wi4_afp32": ("DEQUANTIZE", 6, "2.18.0"),
        "dynamic": ("FULLY_CONNECTED", 12, "2.17.0"),
    }[make]
    assert versions[wanted[0]] == wanted[1]
    assert operator_versions.said(mended) == wanted[2]
