// Exported ONNX files in ONNX Runtime for Node or for the browser (its WebAssembly, here in Node):
// `node client.mjs onnxruntime-web FOLDER`. Answers go to FOLDER/NAME.answers.json.
import fs from "node:fs";
import path from "node:path";
import { createRequire } from "node:module";

const [name, folder] = process.argv.slice(2);
const require = createRequire(path.join(process.cwd(), "package.json"));
const ort = require(name);
ort.env.logLevel = "error";
if (name === "onnxruntime-web") ort.env.wasm.numThreads = 1;

// Floats of an .npy file in the order of C, and its shape.
function floats(file) {
  const bytes = fs.readFileSync(file);
  const length = bytes.readUInt16LE(8);
  const header = bytes.subarray(10, 10 + length).toString();
  const shape = header.match(/\(([^)]*)\)/)[1].split(",").filter((s) => s.trim()).map(Number);
  const data = bytes.subarray(10 + length);
  return { shape, data: new Float32Array(data.buffer.slice(data.byteOffset, data.byteOffset + data.length)) };
}

const found = {};
for (const place of fs.readdirSync(folder).sort()) {
  const manifest = path.join(folder, place, "manifest.json");
  if (!fs.existsSync(manifest)) continue;
  const { shape, data } = floats(path.join(folder, place, "x.npy"));
  const size = shape.slice(1).reduce((a, b) => a * b, 1);
  for (const row of JSON.parse(fs.readFileSync(manifest)).artifacts) {
    if (row.file === null || row.format !== "onnx") continue;
    const key = `${place}/${row.file}`;
    try {
      const options = { executionProviders: [name === "onnxruntime-web" ? "wasm" : "cpu"], logSeverityLevel: 3 };
      const session = await ort.InferenceSession.create(fs.readFileSync(path.join(folder, key)), options);
      const answers = [];
      for (let i = 0; i < shape[0]; i++) {
        const kind = row.signature.inputs[0].dtype;
        const values = data.slice(i * size, (i + 1) * size);
        const tensor = new ort.Tensor(kind, kind === "int32" ? Int32Array.from(values) : values, [1, ...shape.slice(1)]);
        const result = await session.run({ [session.inputNames[0]]: tensor });
        answers.push(Array.from(result[session.outputNames[0]].data));
      }
      found[key] = answers;
      await session.release();
    } catch (error) {
      found[key] = String(error.message || error).slice(0, 500);
    }
  }
}
fs.writeFileSync(path.join(folder, `${name}.answers.json`), JSON.stringify(found));
process.exit(0);
