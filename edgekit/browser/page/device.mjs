/**
 * The page of `--device browser`: opens a model in its format's runtime, and answers what DevTools
 * asks through `edgekit`. Ids go in and logits come out; text is read and written outside.
 *
 * `texts`, where the runtime reads no ids: { text, rest }, of all ids so far, and without the first.
 *
 * /format/runtime.mjs exports open(request, { backend }), which gives { vocabulary, prefill(ids),
 * decode(id), reset() }; logits are a Float32Array after the last id, and what was read stays until
 * a reset. A model may have a `generate(ids, count, onToken)` that is its runtime's own loop, a
 * `last(ids, texts)`, where the logits after a text can be had for less, an `all(ids)` that gives the logits of a text read at once, one row after the other, and a
 * `selfCheck()` that gives { differs, is_right }, where its runtime errs on some GPUs.
 */
import { open } from "/format/runtime.mjs";
import { describeGpu, lackingOf } from "/edgekit/gpu.mjs";

let model = null;

globalThis.edgekit = {
  async describe() {
    return {
      agent: navigator.userAgent,
      is_isolated: crossOriginIsolated,
      threads: navigator.hardwareConcurrency,
      gpu: await describeGpu(),
    };
  },

  /** Open the model; `backend` is asked for, or null: WebGPU where it can, else WebAssembly. */
  async open(request, backend) {
    const started = performance.now();
    const reason = lackingOf(await describeGpu(), request);
    if (reason !== null && (backend === "webgpu" || !request.runs_in_wasm)) return { reason };
    const chosen = backend ?? (reason === null ? "webgpu" : "wasm");
    const packages = new URL("/npm/", location.href).href;
    model = await open({ ...request, packages }, { backend: chosen });
    const load_s = (performance.now() - started) / 1000;
    const check = chosen === "webgpu" && model.selfCheck ? await model.selfCheck() : null;
    return {
      reason: null,
      fell_back: backend === null && chosen === "wasm" ? reason : null,
      load_s,
      backend: chosen,
      vocabulary: model.vocabulary,
      threads: model.threads ?? null,
      check,
    };
  },

  async prefill(ids, texts) {
    return toBase64(await model.prefill(ids, texts));
  },

  async decode(id, texts) {
    return toBase64(await model.decode(id, texts));
  },

  /** The logits after each of the ids, read at once; null where the runtime gives the last only. */
  async all(ids) {
    return model.all ? toBase64(await model.all(ids)) : null;
  },

  /** The logits after these ids alone. */
  async last(ids, texts) {
    if (model.last) return toBase64(await model.last(ids, texts));
    await model.reset();
    return toBase64(await model.prefill(ids, texts));
  },

  async reset() {
    await model.reset();
  },

  /** A timed answer, chosen greedily. */
  async generate(ids, count, texts) {
    await model.reset();
    const started = performance.now();
    const times = [];
    const said = [];
    const onToken = (id) => {
      times.push(performance.now());
      said.push(id);
    };
    if (model.generate) await model.generate(ids, count, onToken, texts);
    else await generate(ids, count, onToken);
    const spans = times.map((time, index) => (time - (times[index - 1] ?? started)) / 1000);
    return { ids: said, first_token_s: spans[0], decode_s: spans.slice(1) };
  },

  /** What WebGPU did so far, here. */
  look() {
    return globalThis.edgekitGpu;
  },
};

async function generate(ids, count, onToken) {
  let id = argmax(await model.prefill(ids));
  onToken(id);
  for (let index = 1; index < count; index += 1) {
    id = argmax(await model.decode(id));
    onToken(id);
  }
}

function argmax(values) {
  let best = 0;
  for (let index = 1; index < values.length; index += 1) {
    if (values[index] > values[best]) best = index;
  }
  return best;
}

/** A typed array's bytes as text, for what is too long as a list of numbers. */
function toBase64(array) {
  const bytes = new Uint8Array(array.buffer, array.byteOffset, array.byteLength);
  let text = "";
  for (let start = 0; start < bytes.length; start += 32768) {
    text += String.fromCharCode(...bytes.subarray(start, start + 32768));
  }
  return btoa(text);
}
