/**
 * Runs models in an unmodified WebLLM, one after the other. Each is in a directory under /files/.
 *
 * Request: [{ directory, overrides, chats: [body], ids: [[id, …]] }]: what is asked through
 * `chat.completions.create`, and texts whose logits are wanted.
 * Answer: [{ answers, logits: [base64 of float32 (tokens, vocabulary)], seconds }].
 */
import * as webllm from "@mlc-ai/web-llm";
import { answer, toBase64 } from "./answer.mjs";

// WebLLM shows neither an error of the GPU nor a promise that waits for one.
let fail;
const failed = new Promise((_, reject) => (fail = reject));
const requestDevice = GPUAdapter.prototype.requestDevice;
GPUAdapter.prototype.requestDevice = async function (...args) {
  const device = await requestDevice.apply(this, args);
  device.addEventListener("uncapturederror", ({ error }) => fail(new Error(error.message)));
  device.lost.then(({ reason, message }) => {
    if (reason !== "destroyed") fail(new Error(`the GPU was lost: ${message}`));
  });
  return device;
};

async function run(models) {
  const found = [];
  for (const model of models) found.push(await runOne(model));
  return found;
}

async function runOne({ directory, overrides, chats, ids }) {
  const here = new URL(`/files/${directory}/`, location).href;
  const record = {
    model: `${here}resolve/main/../../`, // WebLLM adds what is missing of this, ".." takes it away
    model_id: directory,
    model_lib: `${here}model-webgpu.wasm`,
    overrides,
  };
  const seconds = {};
  const timed = async (name, promise) => {
    const start = performance.now();
    const found = await promise;
    seconds[name] = (performance.now() - start) / 1000;
    // For the log of one that hangs.
    console.info(`${directory}, ${name}: ${seconds[name].toFixed(1)} s`);
    return found;
  };
  const rows = [];
  const registry = new Map([[record.model_id, new Copier(rows)]]);
  const engine = new webllm.MLCEngine({
    appConfig: { model_list: [record] },
    logitProcessorRegistry: registry,
  });
  await timed("load", engine.reload(record.model_id));
  const answers = [];
  for (const [index, body] of chats.entries()) {
    await engine.resetChat();
    const said = await timed(`chat ${index}`, engine.chat.completions.create(body));
    answers.push(said);
  }
  const logits = [];
  for (const [index, text] of ids.entries()) {
    await engine.resetChat();
    rows.length = 0;
    await timed(`logits ${index}`, readOneByOne(engine, text));
    logits.push(toBase64(joined(rows)));
  }
  await engine.unload();
  return { answers, logits, seconds };
}

async function readOneByOne(engine, text) {
  for (const [place, id] of text.entries()) await engine.forwardTokensAndSample([id], place === 0);
}

/** Keeps what the model says of each next token, and changes nothing. */
class Copier {
  constructor(rows) {
    this.rows = rows;
  }
  processLogits(logits) {
    this.rows.push(logits.slice());
    return logits;
  }
  processSampledToken() {}
  resetState() {}
}

function joined(rows) {
  const all = new Float32Array(rows.length * rows[0].length);
  rows.forEach((row, index) => all.set(row, index * row.length));
  return all;
}

await answer((request) => Promise.race([failed, run(request)]));
