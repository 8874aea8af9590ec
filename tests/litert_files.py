"""Quantization-aware models as TFLite files, and what LiteRT makes of them."""

import numpy as np

COMPUTE = {
    "ADD", "AVERAGE_POOL_2D", "BATCH_MATMUL", "CONCATENATION", "CONV_2D", "DEPTHWISE_CONV_2D",
    "FULLY_CONNECTED", "GELU", "HARD_SWISH", "LOGISTIC", "MAXIMUM", "MAX_POOL_2D", "MEAN", "MUL",
    "PAD", "RELU", "RELU6", "RSQRT", "SOFTMAX", "SUB", "TANH", "TRANSPOSE_CONV",
}  # fmt: skip


def convert(model, calibration=None):
    import tensorflow as tf

    converter = tf.lite.TFLiteConverter.from_keras_model(model)
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.inference_input_type = converter.inference_output_type = tf.int8
    if calibration is not None:
        converter.representative_dataset = lambda: ([row[None]] for row in calibration)
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
    return converter.convert()


def run(blob, x, kernels="BUILTIN_REF"):
    """Outputs, the output's step, and the operators with the types they work in."""
    from ai_edge_litert import interpreter

    runtime = interpreter.Interpreter(
        model_content=blob,
        experimental_op_resolver_type=interpreter.OpResolverType[kernels],
    )
    runtime.allocate_tensors()
    given, made = runtime.get_input_details()[0], runtime.get_output_details()[0]
    tensors = {t["index"]: t for t in runtime.get_tensor_details()}
    operators = []
    for operator in runtime._get_ops_details():
        kinds = {
            np.dtype(tensors[i]["dtype"]).name
            for i in [*operator["inputs"], *operator["outputs"]]
            if i >= 0
        }
        operators.append((operator["op_name"], kinds))
    scale, zero = given["quantization"]
    outputs = []
    for row in x:
        value = row[None]
        if given["dtype"] == np.int8:
            value = np.clip(np.round(value / scale) + zero, -128, 127)
        runtime.set_tensor(given["index"], value.astype(given["dtype"]))
        runtime.invoke()
        outputs.append(runtime.get_tensor(made["index"])[0])
    assert made["dtype"] == np.int8
    step, zero = made["quantization"]
    return (np.array(outputs, "float32") - zero) * step, step, operators


def on_grid(blob, x):
    """Inputs that are integers of the file: no client rounds them otherwise than Keras."""
    from ai_edge_litert import interpreter

    given = interpreter.Interpreter(model_content=blob).get_input_details()[0]
    if given["dtype"] != np.int8:
        return x
    scale, zero = given["quantization"]
    return ((np.clip(np.round(x / scale) + zero, -128, 127) - zero) * scale).astype("float32")


def float_compute(operators):
    return [op for op, kinds in operators if op in COMPUTE and kinds & {"float32", "float16"}]


def shake(model):
    """Every weight off its start, so that nothing folds away."""
    rng = np.random.default_rng(0)
    for v in model.variables:
        if v.path.endswith("moving_variance"):
            v.assign(rng.uniform(0.5, 2, v.shape))
        elif v.path.endswith(("moving_mean", "beta", "bias")):
            v.assign(rng.normal(0, 0.2, v.shape))
        elif v.path.endswith("gamma"):
            v.assign(rng.uniform(0.5, 1.5, v.shape))
    return model
