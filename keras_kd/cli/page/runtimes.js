// An exported file in the runtime of its format: numbers in, numbers out.

import { loadLiteRt } from "@litertjs/core";
import * as ort from "onnxruntime-web";

// ---------------------------------------------------------------- tensors

const ARRAYS = {
  float32: Float32Array,
  float64: Float64Array,
  int8: Int8Array,
  uint8: Uint8Array,
  int16: Int16Array,
  int32: Int32Array,
  int64: BigInt64Array,
  bool: Uint8Array,
};
// litert::ElementType
const LITERT_TYPES = { float32: 1, int32: 2, uint8: 3, int64: 4, bool: 6, int16: 7, int8: 9 };
const LIMITS = { int8: [-128, 127], uint8: [0, 255], int16: [-32768, 32767] };

function arrayType(tensor, known = ARRAYS) {
  if (!(tensor.dtype in known)) {
    throw new Error(`${tensor.name} is ${tensor.dtype}, which this runtime cannot pass in a browser.`);
  }
  return ARRAYS[tensor.dtype];
}

function roundHalfEven(x) {
  const low = Math.floor(x);
  const rest = x - low;
  return rest > 0.5 || (rest === 0.5 && low % 2 !== 0) ? low + 1 : low;
}

// Each step in float32 and rounded as NumPy does it, so that the integers are the same as there.
function encode(values, tensor) {
  const Type = arrayType(tensor);
  if (tensor.scale === undefined) {
    return Type === BigInt64Array ? Type.from(values, (x) => BigInt(Math.trunc(x))) : Type.from(values);
  }
  const [low, high] = LIMITS[tensor.dtype];
  const scale = Math.fround(tensor.scale);
  return Type.from(values, (x) => {
    const steps = roundHalfEven(Math.fround(Math.fround(x) / scale)) + tensor.zero_point;
    return Math.min(high, Math.max(low, steps));
  });
}

function decode(values, tensor) {
  if (tensor.scale === undefined) return Float32Array.from(values, Number);
  const scale = Math.fround(tensor.scale);
  return Float32Array.from(values, (q) => (q - tensor.zero_point) * scale);
}

// ---------------------------------------------------------------- runtimes

async function download(file) {
  const response = await fetch(`/files/${encodeURIComponent(file.file)}`);
  if (!response.ok) throw new Error(`${file.file}: ${response.status} ${response.statusText}`);
  return new Uint8Array(await response.arrayBuffer());
}

let litert;

function vector(values) {
  const items = Array.from({ length: values.size() }, (_, i) => values.get(i));
  values.delete();
  return items;
}

// The `Tensor` class of @litertjs/core 2.5.3 knows float32, int32 and uint8, and its `run` refuses
// files with a free batch. The module below it, which `loadLiteRt` returns, has neither limit.
async function openTFLite(file) {
  litert ??= loadLiteRt("/npm/@litertjs/core/wasm/");
  const [lib, bytes] = await Promise.all([litert, download(file)]);
  const wasm = lib.liteRtWasm;
  const environment = lib.getDefaultEnvironment();
  const handle = environment.liteRtEnvironment;
  const address = wasm._malloc(bytes.length);
  wasm.HEAPU8.set(bytes, address);
  const model = wasm.loadModel(handle, address, bytes.length);
  const compiled = await wasm.compileModel(handle, model, {
    environment,
    accelerator: "wasm",
    cpuOptions: { numThreads: 1 },
    gpuOptions: {},
    webNNOptions: {},
  });
  const signature = model.getSignature(0);
  const inputs = vector(signature.inputNames()).map((name) => {
    const tensor = file.inputs.find((row) => row.name === name);
    const bytesOf = arrayType(tensor, LITERT_TYPES).BYTES_PER_ELEMENT;
    const sizes = new wasm.VectorInt32();
    tensor.sizes.forEach((size) => sizes.push_back(size));
    const layout = wasm.LiteRtLayout.create(sizes);
    const type = wasm.LiteRtRankedTensorType.create({ value: LITERT_TYPES[tensor.dtype] }, layout);
    const count = tensor.sizes.reduce((a, b) => a * b, 1);
    const memory = wasm.LiteRtTensorBufferType.HOST_MEMORY;
    const buffer = wasm.LiteRtTensorBuffer.createManaged(handle, memory, type, count * bytesOf);
    [sizes, layout, type].forEach((object) => object.delete());
    return { tensor, buffer };
  });
  const outputs = vector(signature.outputNames()).map((name) =>
    file.outputs.find((row) => row.name === name),
  );
  const { READ, WRITE } = wasm.LiteRtTensorBufferLockMode;
  return async (feed) => {
    for (const { tensor, buffer } of inputs) {
      const data = encode(feed[tensor.name], tensor);
      const bytes = new Uint8Array(data.buffer, data.byteOffset, data.byteLength);
      wasm.HEAPU8.set(bytes, buffer.lock(WRITE));
      buffer.unlock();
    }
    const buffers = await compiled.run(0, inputs.map(({ buffer }) => buffer));
    const results = {};
    buffers.forEach((buffer, index) => {
      const tensor = outputs[index];
      const start = buffer.lock(READ);
      const bytes = wasm.HEAPU8.slice(start, start + buffer.packedSize());
      buffer.unlock();
      buffer.delete();
      results[tensor.name] = decode(new (arrayType(tensor, LITERT_TYPES))(bytes.buffer), tensor);
    });
    return results;
  };
}

async function openONNX(file) {
  ort.env.wasm.numThreads = 1;
  ort.env.wasm.wasmPaths = "/npm/onnxruntime-web/dist/";
  const session = await ort.InferenceSession.create(await download(file), {
    executionProviders: ["wasm"],
    intraOpNumThreads: 1,
    logSeverityLevel: 3,
  });
  return async (feed) => {
    const tensors = {};
    for (const tensor of file.inputs) {
      const data = encode(feed[tensor.name], tensor);
      tensors[tensor.name] = new ort.Tensor(tensor.dtype, data, tensor.sizes);
    }
    const answers = await session.run(tensors);
    const results = {};
    for (const tensor of file.outputs) results[tensor.name] = decode(answers[tensor.name].data, tensor);
    return results;
  };
}

const runners = new Map();

export function runner(file) {
  if (!runners.has(file.file)) {
    runners.set(file.file, file.format === "tflite" ? openTFLite(file) : openONNX(file));
  }
  return runners.get(file.file);
}

export function median(values) {
  return [...values].sort((a, b) => a - b)[values.length >> 1];
}

// From numbers in to numbers out, as an app would wait for it.
export async function latency(run, feed) {
  const times = [];
  const end = performance.now() + 300;
  for (let i = 0; i < 200 && (i < 5 || performance.now() < end); i++) {
    const start = performance.now();
    await run(feed);
    times.push(performance.now() - start);
  }
  return { milliseconds: median(times), runs: times.length };
}
