/**
 * What a bundle's webllm.mjs says about GPUs and libraries and makes of messages, and what its page
 * says. The bundle is under /files/.
 *
 * Request: { gpus: ["this" | null | { features, limits }], talks: [[messages, rules, hasSystem]],
 * ends: [finish_reason] }, of the turns of one chat.
 */
import { answer } from "./answer.mjs";

await answer(async ({ gpus, talks, ends }) => {
  const app = await import("/files/webllm.mjs");
  const { model_list: records, edgekit: known } = await app.readSettings();
  const missing = [];
  for (const gpu of gpus) missing.push(await app.whatIsMissing(records[0], known, asGpu(gpu)));
  const prepared = talks.map((talk) => prepare(app, ...talk));
  const resets = [await countResets(app, known.chat, ends, false)];
  resets.push(await countResets(app, known.chat, ends, true));
  return { records, missing, prepared, resets, page: await readPage() };
});

function asGpu(gpu) {
  if (gpu === "this") return navigator.gpu;
  const adapter = gpu && { ...gpu, features: new Set(gpu.features) };
  return gpu && { requestAdapter: async () => (gpu.limits ? adapter : null) };
}

function prepare(app, messages, rules, hasSystem) {
  try {
    return app.prepare(messages, rules, hasSystem);
  } catch (error) {
    return error.message;
  }
}

/** Whether each turn of a chat starts from nothing; each answer ends as the list says. */
async function countResets(app, rules, ends, stream) {
  let isReset = false;
  const choice = (finish_reason) => ({ choices: [{ finish_reason, delta: {} }] });
  async function* streamed(end) {
    yield choice(null);
    yield choice(end);
    yield { choices: [] };
  }
  const waiting = [...ends];
  const create = async () => (stream ? streamed(waiting.shift()) : choice(waiting.shift()));
  const engine = {
    resetChat: async () => (isReset = true),
    chat: { completions: { create } },
  };
  const model = new app.Model(engine, rules, false);
  const found = [];
  while (waiting.length > 0) {
    isReset = false;
    const answer = await model.chat([{ role: "user", content: "Hi" }], { stream });
    if (stream) for await (const _ of answer);
    found.push(isReset);
  }
  return found;
}

/** What stands in the page once it has stopped loading. */
async function readPage() {
  const frame = document.createElement("iframe");
  frame.src = "/files/index.html";
  document.body.append(frame);
  for (;;) {
    await new Promise((resume) => setTimeout(resume, 50));
    const state = frame.contentDocument?.querySelector("#state")?.textContent ?? "Loading …";
    if (state !== "Loading …") return state;
  }
}
