/**
 * Logits from ONNX Runtime Web, and what it says of where it computes them.
 *
 * Request: `models`, each with the `name` of its answer, the `path` of its graph and those of its
 * `data` files beside it, the `provider`, ids (a `prompt`, then `steps` one by one), and the
 * position of the `first` id.
 */
import * as ort from "onnxruntime-web/webgpu";
import { answer, toBase64 } from "./answer.mjs";
import "./no_subgroups.mjs";

ort.env.wasm.wasmPaths = "/node_modules/onnxruntime-web/dist/";
ort.env.logLevel = "verbose"; // only then the runtime says where it places operators

const said = [];
for (const level of ["debug", "log", "info", "warn", "error"]) {
  console[level] = (...words) => said.push(words.join(" "));
}

await answer(async ({ models }) => {
  const found = { adapter: await describeAdapter() };
  for (const model of models) {
    said.length = 0;
    try {
      found[model.name] = { ...(await run(model)), said: [...said] };
    } catch (error) {
      found[model.name] = { error: String(error?.stack ?? error), said: [...said] };
    }
  }
  return found;
});

async function describeAdapter() {
  const { info, features } = await navigator.gpu.requestAdapter();
  return { vendor: info.vendor, architecture: info.architecture, features: [...features] };
}

async function run({ path, data, provider, prompt, steps, first }) {
  const session = await ort.InferenceSession.create(path, {
    executionProviders: [provider],
    externalData: data.map((file) => ({ path: file.split("/").at(-1), data: file })),
    logSeverityLevel: 0,
  });
  try {
    return { rows: await logits(session, [prompt, ...steps.map((id) => [id])], first) };
  } finally {
    await session.release();
  }
}

/** The logits after every id of texts that are read one after the other. */
async function logits(session, texts, first) {
  let cache = emptyCache(session);
  const rows = [];
  for (const ids of texts) {
    const known = Object.entries(feeds(ids, rows.length, first)).filter(([name]) =>
      session.inputNames.includes(name),
    );
    const outputs = await session.run({ ...Object.fromEntries(known), ...cache });
    rows.push(...splitRows(outputs.logits).map(toBase64));
    cache = nextCache(outputs);
  }
  return rows;
}

function emptyCache(session) {
  const past = session.inputMetadata.filter(({ name }) => name.startsWith("past_"));
  return Object.fromEntries(past.map(({ name, type, shape }) => [name, zeros(type, shape)]));
}

/** States are zeros at first; of keys and values there are none. */
function zeros(type, [, ...shape]) {
  const sizes = [1, ...shape.map((size) => (typeof size === "string" ? 0 : size))];
  const count = sizes.reduce((product, size) => product * size);
  const values = type === "float16" ? new Uint16Array(count) : new Float32Array(count);
  return new ort.Tensor(type, values, sizes);
}

function feeds(ids, read, first) {
  return {
    input_ids: int64(ids),
    position_ids: int64(ids.map((_, index) => first + read + index)),
    attention_mask: int64(Array(read + ids.length).fill(1)),
  };
}

function int64(values) {
  return new ort.Tensor("int64", BigInt64Array.from(values, BigInt), [1, values.length]);
}

function splitRows({ data, dims: [, rows, width] }) {
  return Array.from({ length: rows }, (_, row) => data.slice(row * width, (row + 1) * width));
}

function nextCache(outputs) {
  const present = Object.entries(outputs).filter(([name]) => name.startsWith("present"));
  return Object.fromEntries(present.map(([name, tensor]) => [pastName(name), tensor]));
}

function pastName(present) {
  return present.replace("present.", "past_key_values.").replace("present_", "past_");
}
