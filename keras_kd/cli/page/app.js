// The exported files in the runtimes of the browser, beside the Keras model.

import { latency, median, runner } from "./runtimes.js";

const $ = (id) => document.getElementById(id);
const MOST_ROWS = 12;
const MOST_POSITIONS = 64; // of a text
const LONGEST_SIDE = 2048; // pixels of a picture
const TITLES = { reference: "Reference", tflite: "TFLite", onnx: "ONNX" };

// ---------------------------------------------------------------- state

let page; // what the server says about the export
let shown; // the input: { feed, outputs: recorded answers or null, label }
let columns = []; // { kind, file, figures, outputs, error }
let fresh = ""; // what the pad holds: "sample", "drawing" or "picture"

async function classify(name, values) {
  const file = page.files.find((row) => row.file === name);
  if (!file) throw new Error(`${name} is none of ${page.files.map((row) => row.file).join(", ")}.`);
  const feed = ArrayBuffer.isView(values) ? { [page.inputs[0].name]: values } : values;
  const run = await runner(file);
  return (await run(feed))[page.outputs[0].name];
}

async function answer(column, input) {
  try {
    if (column.kind === "reference") {
      if (page.reference.given) {
        const answered = await ask(input.feed);
        column.outputs = answered.outputs;
        column.times.push(answered.milliseconds);
        column.figures = { milliseconds: median(column.times), runs: column.times.length };
      } else {
        column.outputs = input.outputs;
      }
    } else {
      const run = await runner(column.file);
      column.outputs = await run(input.feed);
      column.figures ??= await latency(run, input.feed);
    }
    column.error = null;
  } catch (error) {
    column.outputs = null;
    column.error = String(error.message ?? error);
  }
}

async function ask(feed) {
  const inputs = Object.fromEntries(Object.entries(feed).map(([name, x]) => [name, Array.from(x)]));
  const response = await fetch("/reference", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ inputs }),
  });
  const answered = await response.json();
  if (!response.ok) throw new Error(answered.error);
  return answered;
}

// While one input is being answered, only the newest of the next ones waits.
let working = null;
let waiting = null;

function show(input) {
  shown = waiting = input;
  working ??= (async () => {
    try {
      while (waiting) {
        const current = waiting;
        waiting = null;
        for (const column of columns) await answer(column, current);
        render(current);
      }
    } finally {
      working = null;
    }
  })();
  return working;
}

// ---------------------------------------------------------------- answers

// A long name breaks before its parts, not within them.
function breakable(name) {
  const node = element("small");
  name.split(/(?=[_.-])/).forEach((part) => node.append(part, document.createElement("wbr")));
  return node;
}

function bytes(count) {
  if (count < 1e5) return `${count.toLocaleString("en")} B`;
  return count < 1e6 ? `${(count / 1e3).toFixed(1)} kB` : `${(count / 1e6).toFixed(1)} MB`;
}

function time(milliseconds) {
  if (milliseconds < 0.1) return `${Math.round(milliseconds * 1e3)} µs`;
  return `${milliseconds.toPrecision(milliseconds < 1 ? 2 : 3)} ms`;
}

function element(tag, text = "", name = "") {
  const node = document.createElement(tag);
  node.textContent = text;
  node.className = name;
  return node;
}

// `null` for plain numbers, which have no probability.
function probabilities(column, output) {
  return output.kind === "values" ? null : shares(Array.from(column.outputs[output.name]), column, output);
}

function shares(raw, column, output) {
  const ready =
    column.kind === "reference" && page.reference.given
      ? page.reference.probabilities[output.name]
      : output.probabilities;
  if (ready) return raw;
  if (!["classes", "positions"].includes(output.kind)) return raw.map((x) => 1 / (1 + Math.exp(-x)));
  const peak = Math.max(...raw);
  const powers = raw.map((x) => Math.exp(x - peak));
  const sum = powers.reduce((a, b) => a + b, 0);
  return powers.map((x) => x / sum);
}

function largest(values) {
  return values.reduce((best, value, index) => (value > values[best] ? index : best), 0);
}

function label(index, output) {
  const named = page.labels && output === page.outputs[0] && output.kind !== "values";
  return named ? page.labels[output.units === 1 ? page.labels.length - 1 : index] : String(index);
}

function renderHeads() {
  const heads = [element("th", "")];
  for (const column of columns) {
    const head = element("th", TITLES[column.kind]);
    head.scope = "col";
    if (column.kind === "reference") {
      head.append(breakable(page.reference.name));
    } else {
      const files = page.files.filter((row) => row.format === column.kind);
      if (files.length > 1) {
        const select = document.createElement("select");
        select.setAttribute("aria-label", `${TITLES[column.kind]} file`);
        for (const file of files) select.add(new Option(file.precision, file.file, false, file === column.file));
        select.title = column.file.file;
        select.onchange = () => {
          column.file = files[select.selectedIndex];
          column.figures = undefined;
          renderHeads();
          show(shown);
        };
        head.append(select);
      } else {
        head.append(breakable(column.file.file));
      }
      if (column.file.status === "failed") head.append(element("small", "failed its check", "failed"));
    }
    head.append((column.line = element("small")));
    heads.push(head);
  }
  $("heads").replaceChildren(...heads);
}

function bar(value, share, first) {
  const cell = element("div", "", first ? "bar first" : "bar");
  const fill = document.createElement("i");
  fill.style.width = `${100 * share}%`;
  cell.append(fill, element("span", value));
  return cell;
}

// A row for each position, with the class that each file gives it.
function positionRows(output) {
  const [count, classes] = output.positions;
  const answers = columns.map((column) => column.outputs && Array.from(column.outputs[output.name]));
  return Array.from({ length: Math.min(count, MOST_POSITIONS) }, (_, position) => {
    const row = document.createElement("tr");
    const head = element("th", String(position + 1));
    head.scope = "row";
    row.append(head);
    columns.forEach((column, place) => {
      const cell = document.createElement("td");
      if (answers[place]) {
        const part = answers[place].slice(position * classes, (position + 1) * classes);
        const parts = shares(part, column, output);
        const best = largest(parts);
        cell.append(bar(`${label(best, output)} ${(100 * parts[best]).toFixed(1)} %`, parts[best], true));
      } else cell.append(element("span", "–", "wait"));
      row.append(cell);
    });
    return row;
  });
}

function render(input) {
  const output = page.outputs[$("output").selectedIndex];
  const single = output.kind === "classes";
  let tables = [];
  if (output.kind === "positions") {
    $("rows").replaceChildren(...positionRows(output));
  } else {
    tables = columns.map((column) => column.outputs && probabilities(column, output));
    renderRows(output, tables);
  }
  for (const column of columns) {
    const size = column.kind === "reference" ? page.reference.bytes : column.file.bytes;
    const taken = column.figures ?? (column.kind === "reference" ? page.reference : null);
    const parts = [];
    if (size) parts.push(bytes(size));
    if (taken?.milliseconds) parts.push(time(taken.milliseconds));
    const score = column.kind === "reference" ? page.reference.score : column.file.score;
    if (score) parts.push(score);
    column.line.replaceChildren(column.error ?? "");
    if (!column.error) parts.forEach((part) => column.line.append(element("span", part), " "));
    column.line.className = column.error ? "failed" : "";
  }
  $("verdict").textContent = single ? verdict(tables, output, input) : "";
  $("note").replaceChildren(...note(input));
}

function renderRows(output, tables) {
  const single = output.kind === "classes";
  const raws = columns.map((column) => column.outputs && Array.from(column.outputs[output.name]));
  const count = Math.max(0, ...raws.map((values) => values?.length ?? 0));
  let indices = Array.from({ length: count }, (_, index) => index);
  if (count > MOST_ROWS) {
    const height = (index) => Math.max(...tables.map((values) => values?.[index] ?? 0));
    if (output.kind !== "values") indices.sort((a, b) => height(b) - height(a));
    indices = indices.slice(0, MOST_ROWS);
  }
  $("rows").replaceChildren(
    ...indices.map((index) => {
      const row = document.createElement("tr");
      const head = element("th", label(index, output));
      head.scope = "row";
      row.append(head);
      columns.forEach((column, place) => {
        const cell = document.createElement("td");
        const values = tables[place];
        if (!raws[place]) cell.append(element("span", "–", "wait"));
        else if (!values) cell.textContent = raws[place][index].toPrecision(5);
        else {
          const first = single ? largest(values) === index : values[index] > 0.5;
          cell.append(bar(`${(100 * values[index]).toFixed(1)} %`, values[index], first));
        }
        row.append(cell);
      });
      return row;
    }),
  );
}

function verdict(tables, output, input) {
  const words = new Map();
  columns.forEach((column, place) => {
    if (!tables[place]) return;
    const word = label(largest(tables[place]), output);
    words.set(word, [...(words.get(word) ?? []), TITLES[column.kind]]);
  });
  const says = [...words].map(([word, who]) => `${who.join(", ")}: ${word}`).join("; ");
  // A stored label is one of the first output.
  const labeled = says && input.label !== null && output === page.outputs[0];
  return labeled ? `${says}. Its label: ${label(input.label, output)}` : says;
}

function note(input) {
  const runs = Math.max(0, ...columns.map((c) => (c.kind !== "reference" && c.figures?.runs) || 0));
  const text =
    "Bytes of the files; latency here in this browser, one thread, numbers in to numbers out, " +
    `median of ${runs} runs` +
    (page.files.some((file) => file.score) ? "; figures of the task as the export measured them. " : ". ");
  if (page.reference.given) return [text, "Reference: float32 weights and Keras in Python, on this computer."];
  if (input.outputs) {
    return [text, "Reference: the Keras model's answer and figures, as recorded at the export. No teacher was given."];
  }
  return [
    text,
    "No reference was given, so an input of your own has none. Start with ",
    element("code", "--teacher FILE.keras"),
    " to see it.",
  ];
}

// ---------------------------------------------------------------- images

const pad = $("pad");
let pen;

function tone(on) {
  return on === page.image.light ? "#000" : "#fff";
}

function wipe() {
  pen.fillStyle = tone(false);
  pen.fillRect(0, 0, pad.width, pad.height);
}

// Mean of the pixels under each cell, the ones on its border by their covered part.
function shrink(picture, height, width) {
  const result = new Float32Array(height * width * 3);
  const stepY = picture.height / height;
  const stepX = picture.width / width;
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      const [top, bottom, left, right] = [y * stepY, (y + 1) * stepY, x * stepX, (x + 1) * stepX];
      const sums = [0, 0, 0];
      for (let v = Math.floor(top); v < Math.min(Math.ceil(bottom), picture.height); v++) {
        const high = Math.min(v + 1, bottom) - Math.max(v, top);
        for (let u = Math.floor(left); u < Math.min(Math.ceil(right), picture.width); u++) {
          const part = high * (Math.min(u + 1, right) - Math.max(u, left));
          const at = 4 * (v * picture.width + u);
          for (let c = 0; c < 3; c++) sums[c] += part * picture.data[at + c];
        }
      }
      for (let c = 0; c < 3; c++) result[3 * (y * width + x) + c] = sums[c] / (stepX * stepY);
    }
  }
  return result;
}

function feedOf(picture) {
  const { height, width, channels, low, high } = page.image;
  const pixels = shrink(picture, height, width);
  const values = new Float32Array(height * width * channels);
  const scale = (high - low) / 255;
  for (let i = 0; i < height * width; i++) {
    const [red, green, blue] = pixels.subarray(3 * i, 3 * i + 3);
    if (channels === 1) values[i] = low + scale * (0.299 * red + 0.587 * green + 0.114 * blue);
    else values.set([low + scale * red, low + scale * green, low + scale * blue], 3 * i);
  }
  return { [page.inputs[0].name]: values };
}

function paint(canvas, values) {
  const { height, width, channels, low, high } = page.image;
  canvas.height = height;
  canvas.width = width;
  const context = canvas.getContext("2d");
  const picture = context.createImageData(width, height);
  for (let i = 0; i < height * width; i++) {
    for (let c = 0; c < 3; c++) {
      const value = values[channels === 1 ? i : 3 * i + c];
      picture.data[4 * i + c] = Math.round((255 * (value - low)) / (high - low || 1));
    }
    picture.data[4 * i + 3] = 255;
  }
  context.putImageData(picture, 0, 0);
}

function showImage(feed, recorded = null, label = null) {
  paint($("seen"), feed[page.inputs[0].name]);
  return show({ feed, outputs: recorded, label });
}

function showPad() {
  $("sample").value = "";
  return showImage(feedOf(pen.getImageData(0, 0, pad.width, pad.height)));
}

function setUpDrawing() {
  const { height, width, channels } = page.image;
  pad.height = Math.round((pad.width * height) / width);
  pen = pad.getContext("2d", { willReadFrequently: true });
  pen.lineCap = pen.lineJoin = "round";
  $("hint").textContent =
    `What the model gets: ${height} × ${width}, ${channels === 1 ? "gray" : "RGB"}. ` +
    "Draw large, to the edges, or drop an image.";
  let last = null;
  const place = (event) => {
    const box = pad.getBoundingClientRect();
    return [
      ((event.clientX - box.left) * pad.width) / box.width,
      ((event.clientY - box.top) * pad.height) / box.height,
    ];
  };
  const stroke = (event) => {
    const next = place(event);
    pen.strokeStyle = tone(true);
    pen.lineWidth = pad.width / 10;
    pen.beginPath();
    pen.moveTo(...last);
    pen.lineTo(...next);
    pen.stroke();
    last = next;
    showPad();
  };
  pad.onpointerdown = (event) => {
    pad.setPointerCapture(event.pointerId);
    if (fresh !== "drawing") wipe();
    fresh = "drawing";
    last = place(event);
    stroke(event);
  };
  pad.onpointermove = (event) => last && stroke(event);
  pad.onpointerup = pad.onpointercancel = () => (last = null);
  $("clear").onclick = () => {
    wipe();
    fresh = "drawing";
    showPad();
  };
  let picture = null;
  const placePicture = () => {
    // The middle of the picture in the frame's proportions, at its own resolution.
    const part = Math.min(picture.width / pad.width, picture.height / pad.height);
    const [wide, high] = [part * pad.width, part * pad.height];
    const scale = Math.min(1, LONGEST_SIDE / Math.max(wide, high));
    const sheet = document.createElement("canvas");
    sheet.width = Math.max(1, Math.round(wide * scale));
    sheet.height = Math.max(1, Math.round(high * scale));
    const brush = sheet.getContext("2d", { willReadFrequently: true });
    brush.fillStyle = "#fff";
    brush.fillRect(0, 0, sheet.width, sheet.height);
    const [left, top] = [(picture.width - wide) / 2, (picture.height - high) / 2];
    brush.drawImage(picture, left, top, wide, high, 0, 0, sheet.width, sheet.height);
    if ($("invert").checked) {
      brush.globalCompositeOperation = "difference";
      brush.fillRect(0, 0, sheet.width, sheet.height);
    }
    pen.drawImage(sheet, 0, 0, pad.width, pad.height);
    fresh = "picture";
    $("sample").value = "";
    showImage(feedOf(brush.getImageData(0, 0, sheet.width, sheet.height)));
  };
  const load = async (file) => {
    try {
      picture = await createImageBitmap(file);
      $("problem").textContent = "";
      placePicture();
    } catch {
      $("problem").textContent = `${file.name} is not an image that this browser can read.`;
    }
  };
  $("picture").onchange = ({ target }) => {
    if (target.files[0]) load(target.files[0]);
    target.value = "";
  };
  $("invert").onchange = () => fresh === "picture" && placePicture();
  document.ondragover = (event) => {
    event.preventDefault();
    pad.classList.add("over");
  };
  document.ondragleave = () => pad.classList.remove("over");
  document.ondrop = (event) => {
    event.preventDefault();
    pad.classList.remove("over");
    if (event.dataTransfer.files[0]) load(event.dataTransfer.files[0]);
  };
}

// ---------------------------------------------------------------- numbers

function setUpNumbers() {
  const shapes = page.inputs.map((row) => `${row.name} (${row.shape.join(" × ") || "one number"})`);
  $("wanted").textContent =
    page.inputs.length === 1
      ? `${shapes[0]}: a JSON list of ${page.inputs[0].count} numbers`
      : `A JSON object with lists of numbers for ${shapes.join(", ")}`;
  $("run").onclick = () => {
    try {
      const given = JSON.parse($("values").value);
      const named = page.inputs.length === 1 && Array.isArray(given) ? { [page.inputs[0].name]: given } : given;
      const feed = {};
      for (const { name, count } of page.inputs) {
        const values = [named?.[name]].flat(Infinity);
        if (values.length !== count || !values.every(Number.isFinite)) {
          throw new Error(`${name} needs ${count} numbers, and ${values.length} values were given.`);
        }
        feed[name] = values;
      }
      $("problem").textContent = "";
      $("sample").value = "";
      show({ feed, outputs: null, label: null });
    } catch (error) {
      $("problem").textContent = error.message;
    }
  };
}

// ---------------------------------------------------------------- start

async function sample(index) {
  const at = ((index % page.samples) + page.samples) % page.samples;
  const response = await fetch(`/samples/${at}`);
  const { inputs, outputs, label } = await response.json();
  $("sample").value = at + 1;
  $("problem").textContent = "";
  fresh = "sample";
  if (!page.image) {
    $("values").value = JSON.stringify(page.inputs.length === 1 ? inputs[page.inputs[0].name] : inputs);
    return show({ feed: inputs, outputs, label });
  }
  const small = document.createElement("canvas");
  paint(small, inputs[page.inputs[0].name]);
  pen.imageSmoothingEnabled = false;
  pen.drawImage(small, 0, 0, pad.width, pad.height);
  pen.imageSmoothingEnabled = true;
  return showImage(inputs, outputs, label);
}

async function start() {
  page = await (await fetch("/try.json")).json();
  document.title = `${page.name} · keras-kd try`;
  $("name").textContent = page.name;
  $("about").textContent =
    `The files in ${page.folder}/, run in this browser: TFLite by LiteRT.js, ONNX by ONNX Runtime Web.`;
  columns = ["reference", "tflite", "onnx"]
    .map((kind) => ({ kind, file: page.files.find((row) => row.file === page.chosen[kind]), times: [] }))
    .filter(({ kind, file }) => kind === "reference" || file);
  $("output").replaceChildren(...page.outputs.map((row) => new Option(row.name)));
  $("choice").hidden = page.outputs.length === 1;
  $("output").onchange = () => show(shown);
  renderHeads();
  $(page.image ? "image" : "numbers").hidden = false;
  (page.image ? setUpDrawing : setUpNumbers)();
  $("sample").max = page.samples;
  $("count").textContent = `of ${page.samples}`;
  $("sample").onchange = () => sample(Math.trunc(Number($("sample").value) || 1) - 1);
  $("previous").onclick = () => sample(Number($("sample").value) - 2);
  $("next").onclick = () => sample(Number($("sample").value));
  await sample(Math.trunc(Number(new URLSearchParams(location.search).get("sample")) || 1) - 1);
}

// For scripts that drive the page: `settled` ends when what is shown belongs to the last input.
window.kerasKd = { classify, ready: start(), settled: () => working };
window.addEventListener("unhandledrejection", ({ reason }) => {
  $("problem").textContent = String(reason?.message ?? reason);
});
