"""Exported files in one runtime, without keras_kd: `python client.py NAME FOLDER`.

Runs in the environment of that runtime. Every file runs in a process of its own, so that one that
brings the runtime down costs one answer. Answers go to `FOLDER/NAME.json` and `.npz`.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

LIMIT_S = 120
BIN = Path(sys.executable).parent


def encoded(x, info):
    """Real numbers as the file's input takes them."""
    if "scale" not in info:
        return x.astype(info["dtype"])
    limits = np.iinfo(info["dtype"])
    rounded = np.round(x / info["scale"]) + info["zero_point"]
    return np.clip(rounded, limits.min, limits.max).astype(info["dtype"])


def decoded(y, info):
    """The file's output in real numbers."""
    if "scale" not in info:
        return y.astype("float32")
    return (y.astype("float32") - info["zero_point"]) * info["scale"]


def tflite_runtime(path, x):
    from tflite_runtime.interpreter import Interpreter

    interpreter = Interpreter(model_path=str(path), num_threads=1)
    interpreter.allocate_tensors()
    (source,), (target,) = interpreter.get_input_details(), interpreter.get_output_details()
    answers = []
    for row in x:
        interpreter.set_tensor(source["index"], row[None])
        interpreter.invoke()
        answers.append(interpreter.get_tensor(target["index"]))
    return np.concatenate(answers)


def onnxruntime(path, x):
    import onnxruntime as package

    options = package.SessionOptions()
    options.log_severity_level = 3
    # As the table says of integer operators and a fixed batch.
    options.enable_mem_pattern = not package.__version__.startswith("1.17.")
    session = package.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return np.concatenate([session.run(None, {name: row[None]})[0] for row in x])


def openvino(path, x, **config):
    import openvino as package

    config["INFERENCE_NUM_THREADS"] = 1
    core = package.Core()
    model = core.read_model(path)
    model.reshape([1, *x.shape[1:]])
    compiled = core.compile_model(model, "CPU", config)
    return np.concatenate([compiled([row[None]])[0].copy() for row in x])


def tflite_micro(path, x):
    from tflite_micro import runtime

    interpreter = runtime.Interpreter.from_file(str(path), arena_size=1 << 22)
    answers = []
    for row in x:
        interpreter.set_input(row[None], 0)
        interpreter.invoke()
        answers.append(interpreter.get_output(0).copy())
    return np.concatenate(answers)


def openvino_exact(path, x):
    # Its defaults round float32 to bfloat16 where the processor can, and int8 as it is fastest.
    settings = {"LP_TRANSFORMS_MODE": "NO", "INFERENCE_PRECISION_HINT": "f32"}
    return openvino(path, x, DYNAMIC_QUANTIZATION_GROUP_SIZE="0", **settings)


def tract(path, x):
    import tract as package

    model = package.onnx().load(str(path)).into_model().into_runnable()
    return np.concatenate([model.run([row[None]])[0].to_numpy() for row in x])


def ncnn(path, x):
    import ncnn as package

    with tempfile.TemporaryDirectory() as folder:
        binary = BIN.parent.glob("lib/python*/site-packages/pnnx/pnnx")
        copy = Path(folder) / "model.onnx"
        copy.write_bytes(path.read_bytes())
        kind = "" if x.dtype == np.float32 else "i32"
        shape = "[" + ",".join(map(str, (1, *x.shape[1:]))) + "]" + kind
        result = subprocess.run(
            # By default it rounds weights to float16.
            [next(binary), copy, f"inputshape={shape}", "fp16=0"],
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
        )
        made = copy.with_suffix(".ncnn.param")
        if not made.exists():
            lines = (result.stdout + result.stderr).strip().splitlines()
            raise ValueError(f"pnnx made no file (exit code {result.returncode}): {lines[-1:]}")
        net = package.Net()
        net.opt.use_fp16_packed = net.opt.use_fp16_storage = net.opt.use_fp16_arithmetic = False
        net.opt.use_bf16_storage = False
        if net.load_param(str(made)) or net.load_model(str(copy.with_suffix(".ncnn.bin"))):
            raise ValueError("ncnn does not load what pnnx made")
        answers = []
        for row in x:
            extractor = net.create_extractor()
            extractor.input("in0", package.Mat(np.ascontiguousarray(row)))
            code, answer = extractor.extract("out0")
            if code:
                raise ValueError(f"ncnn extracts nothing (code {code})")
            answers.append(np.array(answer).reshape(1, -1))
        return np.concatenate(answers)


def vela(path, x, device="ethos-u55-128"):
    with tempfile.TemporaryDirectory() as folder:
        result = subprocess.run(
            [
                BIN / "vela",
                path,
                "--accelerator-config",
                device,
                "--output-dir",
                folder,
            ],
            capture_output=True,
            text=True,
            check=False,
        )
        text = result.stdout + result.stderr
        if result.returncode or "Neural network macs" not in text:
            lines = text.strip().splitlines()
            raise ValueError(f"vela: exit code {result.returncode}: {lines[-1:]}")
        (made,) = Path(folder).glob("*.tflite")
        # What it prints counts a GATHER that the NPU does as one of the CPU.
        return operators(made)


def operators(path):
    """How many operators of a compiled file are left to the CPU, and how many parts the NPU has."""
    from ethosu.vela.tflite.BuiltinOperator import BuiltinOperator
    from ethosu.vela.tflite.Model import Model

    model = Model.GetRootAsModel(path.read_bytes(), 0)
    names = {value: name for name, value in vars(BuiltinOperator).items() if name.isupper()}
    left, npu = [], 0
    for i in range(model.SubgraphsLength()):
        graph = model.Subgraphs(i)
        for j in range(graph.OperatorsLength()):
            code = model.OperatorCodes(graph.Operators(j).OpcodeIndex())
            if code.CustomCode() == b"ethos-u":
                npu += 1
            else:
                left.append(names[max(code.BuiltinCode(), code.DeprecatedBuiltinCode())])
    return {"cpu": len(left), "npu": npu, "left": sorted(set(left))}


def vela_u65(path, x):
    return vela(path, x, "ethos-u65-256")


def vela_u85(path, x):
    return vela(path, x, "ethos-u85-256")


RUNTIMES = {
    "tflite-2.14": (tflite_runtime, ("tflite",)),
    "tflite-micro": (tflite_micro, ("tflite",)),
    "onnxruntime": (onnxruntime, ("onnx",)),
    "openvino": (openvino, ("tflite", "onnx")),
    "openvino-exact": (openvino_exact, ("tflite", "onnx")),
    "tract": (tract, ("onnx",)),
    "ncnn": (ncnn, ("onnx",)),
    "ethos-u55": (vela, ("tflite",)),
    "ethos-u65": (vela_u65, ("tflite",)),
    "ethos-u85": (vela_u85, ("tflite",)),
}


def alone(call, path, x, info):
    """Call in a process of its own and return `(answer, error)`."""
    with tempfile.TemporaryDirectory() as folder:
        box = Path(folder) / "answer"
        child = os.fork()
        if child == 0:
            code = 1
            try:
                import signal

                signal.alarm(LIMIT_S)
                answer = call(path, x)
                if isinstance(answer, dict):
                    (box.with_suffix(".json")).write_text(json.dumps(answer))
                else:
                    np.save(box.with_suffix(".npy"), decoded(answer, info))
                code = 0
            except BaseException as error:
                text = f"{type(error).__name__}: {error}"
                box.with_suffix(".txt").write_text(text[:2000])
            finally:
                os._exit(code)
        _, status = os.waitpid(child, 0)
        for suffix in (".npy", ".json", ".txt"):
            found = box.with_suffix(suffix)
            if found.exists():
                if suffix == ".npy":
                    return np.load(found), None
                text = found.read_text()
                return (json.loads(text), None) if suffix == ".json" else (None, text)
        return None, f"ended by signal {os.WTERMSIG(status)}"


def main(name, folder, label=None):
    call, formats = RUNTIMES[name]
    answers, notes = {}, {}
    for manifest in sorted(folder.glob("*/manifest.json")):
        place = manifest.parent
        x = np.load(place / "x.npy")
        for row in json.loads(manifest.read_text())["artifacts"]:
            if row["file"] is None or row["format"] not in formats:
                continue
            source, target = (row["signature"][kind][0] for kind in ("inputs", "outputs"))
            key = f"{place.name}/{row['file']}"
            answer, error = alone(call, place / row["file"], encoded(x, source), target)
            if error is None and not isinstance(answer, dict):
                answers[key] = answer
            notes[key] = answer if isinstance(answer, dict) else error
    np.savez(folder / f"{label or name}.npz", **answers)
    (folder / f"{label or name}.json").write_text(json.dumps(notes, indent=1))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
