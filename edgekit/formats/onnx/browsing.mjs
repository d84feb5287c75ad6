/**
 * ONNX Runtime Web, driven token by token.
 *
 * Request: `url` of the graph, or its bytes; `data`: { path, data } of its weights' files, alike;
 * `border`: tokens, or null; `outputs`: what is kept for the next token; `packages`: npm's.
 */
import * as ort from "onnxruntime-web/webgpu";

const BATCH_TOKENS = 128; // of a prompt at once: this many rows of logits are there at a time

export async function open(request, { backend }) {
  ort.env.wasm.wasmPaths = new URL("onnxruntime-web/dist/", request.packages).href;
  ort.env.wasm.numThreads = crossOriginIsolated ? request.threads ?? 0 : 1;
  const session = await ort.InferenceSession.create(request.url, {
    executionProviders: [backend],
    externalData: request.data,
    // Keys and values stay where they are read again.
    ...(backend === "webgpu" ? { preferredOutputLocation: placesOf(request.outputs) } : {}),
  });
  return new Model(session, request.border);
}

function placesOf(outputs) {
  return Object.fromEntries(outputs.map((name) => [name, "gpu-buffer"]));
}

class Model {
  constructor(session, border) {
    Object.assign(this, { session, border, read: [], cache: emptyCache(session) });
    this.vocabulary = session.outputMetadata.find(({ name }) => name === "logits").shape[2];
    this.threads = ort.env.wasm.numThreads;
  }

  async prefill(ids) {
    const total = this.read.length + ids.length;
    const crosses = this.border !== null && this.read.length <= this.border && total > this.border;
    // Past the border of a longrope every position is rotated otherwise: all is read again, at once.
    const waiting = crosses ? [...this.read, ...ids] : [...ids];
    if (crosses) this.reset();
    const size = crosses ? waiting.length : BATCH_TOKENS;
    let last = null;
    while (waiting.length > 0) last = await this.#run(waiting.splice(0, size));
    return last.slice(-this.vocabulary);
  }

  async all(ids) {
    this.reset();
    const rows = await this.#run(ids);
    this.reset();
    return rows;
  }

  decode(id) {
    return this.prefill([id]);
  }

  /**
   * Whether a prompt read at once says what it says in two halves. On a GPU whose subgroups have
   * fewer than 8 lanes it does not, from 32 tokens on (ONNX Runtime Web 1.31).
   */
  async selfCheck() {
    const ids = Array.from({ length: 48 }, (_, index) => (7 + index * 7919) % this.vocabulary);
    const atOnce = await this.prefill(ids);
    this.reset();
    await this.prefill(ids.slice(0, 24));
    const inHalves = await this.prefill(ids.slice(24));
    this.reset();
    const differs = atOnce.reduce((most, x, index) => Math.max(most, Math.abs(x - inHalves[index])), 0);
    const spread = Math.max(...inHalves) - Math.min(...inHalves);
    return { differs, is_right: differs <= 0.02 * spread };
  }

  reset() {
    this.#free(this.cache);
    this.cache = emptyCache(this.session);
    this.read = [];
  }

  /** The logits after each of the ids. */
  async #run(ids) {
    const feeds = Object.entries(inputs(ids, this.read.length)).filter(([name]) =>
      this.session.inputNames.includes(name),
    );
    const outputs = await this.session.run({ ...Object.fromEntries(feeds), ...this.cache });
    const present = Object.entries(outputs).filter(([name]) => name.startsWith("present"));
    this.#free(this.cache);
    this.cache = Object.fromEntries(present.map(([name, tensor]) => [pastName(name), tensor]));
    this.read.push(...ids);
    return outputs.logits.data;
  }

  #free(cache) {
    for (const tensor of Object.values(cache)) tensor.dispose();
  }
}

/** States are zeros at first; of keys and values there are none. */
function emptyCache(session) {
  const past = session.inputMetadata.filter(({ name }) => name.startsWith("past_"));
  return Object.fromEntries(past.map(({ name, type, shape }) => [name, zeros(type, shape)]));
}

function zeros(type, [, ...shape]) {
  const sizes = [1, ...shape.map((size) => (typeof size === "string" ? 0 : size))];
  const count = sizes.reduce((product, size) => product * size);
  const values = type === "float16" ? new Uint16Array(count) : new Float32Array(count);
  return new ort.Tensor(type, values, sizes);
}

function inputs(ids, read) {
  return {
    input_ids: int64(ids),
    position_ids: int64(ids.map((_, index) => read + index)),
    attention_mask: int64(Array(read + ids.length).fill(1)),
  };
}

function int64(values) {
  return new ort.Tensor("int64", BigInt64Array.from(values, BigInt), [1, values.length]);
}

function pastName(present) {
  return present.replace("present.", "past_key_values.").replace("present_", "past_");
}
