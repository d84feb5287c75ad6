/**
 * Loads the model beside this file into WebLLM, and talks to it as it was trained.
 *
 *   import { load } from "./webllm.mjs";
 *   const model = await load({ onProgress: ({ text }) => console.log(text) });
 *   const answer = await model.chat([{ role: "user", content: "Hi" }], { temperature: 0 });
 *
 * "@mlc-ai/web-llm" comes from the app: its bundler, or the import map in index.html.
 */
import * as webllm from "@mlc-ai/web-llm";
import { askForRoom } from "./storage.mjs";

const MiB = 1 << 20;
const here = new URL(".", import.meta.url).href;

/** webllm.json, with the address of this directory for WebLLM. */
export async function readSettings() {
  const settings = await (await fetch(`${here}webllm.json`, { cache: "no-cache" })).json();
  const { address } = settings.edgekit;
  for (const record of settings.model_list) {
    for (const name of ["model", "model_lib"]) record[name] = record[name].replace(address, here);
  }
  return settings;
}

/**
 * The model, ready to answer.
 *
 * hasSystem: whether the conversations will start with a system message.
 * Throws an Error with one sentence that says what the model needs and this browser lacks.
 */
export async function load({ hasSystem = false, onProgress } = {}) {
  const settings = await readSettings();
  const { chat } = settings.edgekit;
  const records = settings.model_list;
  const record = hasSystem && chat.has_system_model ? records[1] : records[0];
  const missing = await whatIsMissing(record, settings.edgekit);
  if (missing !== null) throw new Error(missing);
  await forgetOlder(record, settings);
  if (!(await webllm.hasModelInCache(record.model_id, settings))) await askForRoom(await sizeOf());
  const engine = await webllm.CreateMLCEngine(record.model_id, {
    appConfig: settings,
    initProgressCallback: onProgress,
  });
  return new Model(engine, chat, hasSystem);
}

/** What WebLLM will fetch and keep of the weights, in bytes. */
async function sizeOf() {
  const { records } = await (await fetch(`${here}tensor-cache.json`)).json();
  return records.reduce((sum, { nbytes }) => sum + nbytes, 0);
}

export class Model {
  #canContinue = false; // whether WebLLM's cache holds all of the conversation so far

  constructor(engine, rules, hasSystem) {
    Object.assign(this, { engine, rules, hasSystem });
  }

  /** What WebLLM's chat.completions.create gives for these messages, as the model knows them. */
  async chat(messages, options = {}) {
    const sent = prepare(messages, this.rules, this.hasSystem);
    if (!this.#canContinue) await this.engine.resetChat();
    this.#canContinue = false;
    const answer = await this.engine.chat.completions.create({ ...options, messages: sent });
    if (options.stream) return this.#watch(answer, options);
    this.#noteEnd(answer.choices[0].finish_reason, options);
    return answer;
  }

  /** What WebLLM's completions.create gives for a text that the app rendered. */
  complete(prompt, options = {}) {
    return this.engine.completions.create({ ...options, prompt });
  }

  async *#watch(chunks, options) {
    for await (const chunk of chunks) {
      const reason = chunk.choices[0]?.finish_reason;
      if (reason) this.#noteEnd(reason, options);
      yield chunk;
    }
  }

  /**
   * WebLLM goes on from its cache, which lacks what the template writes after an answer, and has
   * the stop string of one that was ended by it. It reads anew after one that was cut off.
   */
  #noteEnd(reason, { stop }) {
    const keeps = this.hasSystem ? "keeps_cache_with_system" : "keeps_cache";
    this.#canContinue = this.rules[keeps] && reason === "stop" && !stop;
  }
}

/** The messages as WebLLM must get them, so that the model reads what its template would write. */
export function prepare(messages, rules, hasSystem = messages[0]?.role === "system") {
  const starts = messages[0]?.role === "system";
  if (rules.is_raw && (messages.length !== 1 || messages[0].role !== "user")) {
    throw new Error("This model takes one user message, the prompt that the app has rendered.");
  }
  if (starts && !rules.takes_system) {
    throw new Error("This model's chat template has no system message: put it into the question.");
  }
  if (!starts && (rules.needs_system || (hasSystem && rules.has_system_model))) {
    throw new Error("A conversation with this model starts with a system message.");
  }
  if (starts && !hasSystem && rules.has_system_model) {
    throw new Error("Load the model with hasSystem: true for a system message.");
  }
  return messages.map((message) => ({ ...message, content: contentOf(message, rules) }));
}

function contentOf({ role, content }, rules) {
  if (rules.drops_thoughts && role === "assistant") {
    const said = content.split("</think>").at(-1);
    content = rules.keeps_breaks || said === content ? said : said.replace(/^\n+/, "");
  }
  if (rules.trimmed_roles.includes(role)) content = content.trim();
  const fills = rules.fills_answers && role === "assistant";
  // WebLLM takes the first of these out of an answer that it puts into a text.
  if (fills) content = content.replace("{function_string}", "{function_string}{function_string}");
  // It puts messages in with String.replace, which reads "$&" and the like.
  return fills || role === "system" ? content.replaceAll("$", "$$$$") : content;
}

/** One sentence that says what the model needs and is not there; null if all is. */
export async function whatIsMissing(record, known, gpu = navigator.gpu) {
  if (!gpu) {
    return "This browser has no WebGPU here: take a current one, and https or localhost.";
  }
  const adapter = await gpu.requestAdapter({ powerPreference: "high-performance" });
  if (adapter === null) return "WebGPU finds no GPU in this browser.";
  return missingOfGpu(record, known, adapter) ?? (await missingOfLibrary(record, known));
}

function missingOfGpu(record, known, { features, limits }) {
  for (const feature of record.required_features) {
    if (!features.has(feature)) {
      return (
        `The weights are ${known.quantization}, which needs ${feature}, and this GPU has none: ` +
        "export the model with a scheme in f32, such as q4f32_1."
      );
    }
  }
  // What WebLLM asks of every GPU, whatever the model (detectGPUDevice in its runtime).
  const needs = { maxComputeWorkgroupStorageSize: 32768, maxStorageBuffersPerShaderStage: 10 };
  for (const [name, least] of Object.entries(needs)) {
    if (limits[name] < least) return `WebLLM needs a ${name} of ${least}, this GPU has ${limits[name]}.`;
  }
  // It takes 1 GiB where it can get that, and less than the GPU has where it cannot.
  const least = { maxBufferSize: 256 * MiB, maxStorageBufferBindingSize: 128 * MiB };
  for (const [name, fallback] of Object.entries(least)) {
    const taken = limits[name] >= 1024 * MiB ? 1024 * MiB : fallback;
    const needed = Math.max(fallback, record.buffer_size_required_bytes ?? 0);
    if (limits[name] < fallback || taken < needed) {
      const who = needed > fallback ? known.largest_buffer : "WebLLM itself";
      const got = Math.floor(Math.min(taken, limits[name]) / MiB);
      return `${who} needs ${Math.ceil(needed / MiB)} MiB of ${name}, WebLLM gets ${got} MiB here.`;
    }
  }
  return null;
}

async function missingOfLibrary(record, known) {
  const url = record.model_lib;
  if (url.startsWith(webllm.modelLibURLPrefix)) {
    const isOurs = url.startsWith(webllm.modelLibURLPrefix + webllm.modelVersion);
    const found = url.slice(webllm.modelLibURLPrefix.length).split("/").slice(0, -1).join("/");
    return isOurs
      ? null
      : `The library is of version ${found}, this WebLLM takes ${webllm.modelVersion}: use ` +
          `@mlc-ai/web-llm ${known.webllm_version}.`;
  }
  const response = await fetch(url, { cache: "no-cache" });
  if (!response.ok) {
    return `There is no library at ${url}: WebLLM needs one that was compiled for this model's shape.`;
  }
  const bytes = new Uint8Array(await response.arrayBuffer());
  if (String.fromCharCode(...bytes.subarray(0, 4)) !== "\0asm") {
    return `${url} is no WebAssembly: is it the library, or a page that says it is not there?`;
  }
  return missingOfShape(bytes, known);
}

/** Compare what the library was compiled for with what the weights are. */
async function missingOfShape(bytes, known) {
  const metadata = readMetadata(new TextDecoder("latin1").decode(bytes));
  if (metadata === null) return null; // not where it usually is; WebLLM will see
  if (metadata.quantization !== undefined && metadata.quantization !== known.quantization) {
    return `The library is for ${metadata.quantization}, the weights are ${known.quantization}.`;
  }
  const cache = await (await fetch(`${here}tensor-cache.json`)).json();
  const weights = cache.records.flatMap((shard) => shard.records);
  const shapes = new Map(weights.map(({ name, shape }) => [name, shape]));
  for (const { name, shape } of metadata.params) {
    const ours = shapes.get(name);
    if (ours === undefined) return `The library is for another model: here is no ${name}.`;
    // A dimension with a name may be anything.
    if (shape.some((size, axis) => typeof size === "number" && size !== ours[axis])) {
      return `The library is for ${name} of ${shape.join(" x ")}, here it is ${ours.join(" x ")}.`;
    }
  }
  return null;
}

/**
 * What _metadata() of a library returns, which stands in its bytes as it is (SaveConstantSection in
 * TVM's executable.cc, metadata in mlc_llm's compile.py); null if it cannot be found.
 */
function readMetadata(text) {
  const start = text.indexOf('{"model_type"');
  if (start < 0) return null;
  let depth = 0;
  for (let at = start; at < text.length; at += 1) {
    if (text[at] === "{") depth += 1;
    if (text[at] === "}") depth -= 1;
    if (depth === 0) {
      try {
        const metadata = JSON.parse(text.slice(start, at + 1));
        return Array.isArray(metadata.params) ? metadata : null;
      } catch {
        return null;
      }
    }
  }
  return null;
}

/** WebLLM keeps files by address: drop those of an older export. */
async function forgetOlder(record, settings) {
  const listed = await (await fetch(`${here}tensor-cache.json`, { cache: "no-cache" })).text();
  const config = await (await fetch(`${here}mlc-chat-config.json`, { cache: "no-cache" })).text();
  const digest = await crypto.subtle.digest("SHA-256", new TextEncoder().encode(listed + config));
  const now = Array.from(new Uint8Array(digest), (byte) => byte.toString(16)).join("");
  const key = `edgekit ${here}`;
  if (localStorage.getItem(key) === now) return;
  await webllm.deleteModelAllInfoInCache(record.model_id, settings);
  localStorage.setItem(key, now);
}
