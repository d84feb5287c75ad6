/** The chat of a bundle's page: wllama reads, writes and computes. */
import { Wllama } from "@wllama/wllama";

export async function load(settings, blobs, { backend, base }) {
  const wllama = new Wllama({ default: `${base}node_modules/@wllama/wllama/esm/wasm/wllama.wasm` });
  await wllama.loadModel(Object.values(blobs), {
    n_ctx: settings.context_tokens,
    n_gpu_layers: backend === "webgpu" ? undefined : 0,
    n_parallel: 1,
  });
  return { isWrong: false, answer: (messages) => answer(wllama, messages) };
}

async function* answer(wllama, messages) {
  const chunks = await wllama.createChatCompletion({ messages, temperature: 0, stream: true });
  for await (const { choices } of chunks) yield choices[0]?.delta?.content ?? "";
}
