/**
 * What WebLLM reads and where it stops, by its own engine, pipeline, conversation and tokenizer,
 * as they are published. Only the model is made up: its forward pass notes the ids it is given,
 * and its sampler says what the request wants said.
 *
 * Request: [{ tokenizer: path, config: mlc-chat-config.json's fields, texts, chats }], where a chat
 * is { overrides, turns: [{ body, resets, says: ids }] }.
 */
import { readFileSync, writeFileSync } from "node:fs";
import { createRequire } from "node:module";
import { fileURLToPath } from "node:url";
import { answer } from "./answer.mjs";

await answer(async (models) => {
  const webllm = await openWebLLM();
  const found = [];
  for (const { tokenizer: path, config, texts, chats } of models) {
    const tokenizer = await webllm.tokenizers.Tokenizer.fromJSON(readBytes(path));
    const talks = [];
    for (const chat of chats) talks.push(await talk(webllm, tokenizer, config, chat));
    found.push({ texts: texts.map((text) => [...tokenizer.encode(text)]), chats: talks });
  }
  return found;
});

/** The published file and one more line, since WebLLM keeps its classes to itself. */
async function openWebLLM() {
  const path = fileURLToPath(import.meta.resolve("@mlc-ai/web-llm"));
  const line = "export { LLMChatPipeline, getConversation, libExports as tokenizers };";
  const opened = new URL("./web-llm-opened.mjs", import.meta.url);
  writeFileSync(opened, `${readFileSync(path, "utf-8")}\n${line}\n`);
  // What the tokenizer's WebAssembly looks for in Node, and only a page or CommonJS has.
  Object.assign(globalThis, { createRequire, location: { href: import.meta.url } });
  return import(opened);
}

function readBytes(path) {
  const file = readFileSync(path);
  return file.buffer.slice(file.byteOffset, file.byteOffset + file.byteLength);
}

/** Hold a chat; what the model has read after each turn, what was said, and why it ended. */
async function talk(webllm, tokenizer, config, { overrides, turns }) {
  const chatConfig = { ...config, ...overrides };
  const pipeline = pretendPipeline(webllm, tokenizer, chatConfig);
  const engine = new webllm.MLCEngine({ logLevel: "SILENT" });
  engine.loadedModelIdToPipeline.set("model", pipeline);
  engine.loadedModelIdToChatConfig.set("model", chatConfig);
  engine.loadedModelIdToModelType.set("model", webllm.ModelType.LLM);
  engine.loadedModelIdToLock.set("model", { acquire: async () => {}, release: async () => {} });
  const found = [];
  for (const { body, resets, says } of turns) {
    if (resets) await engine.resetChat();
    pipeline.says = [...says];
    const api = "prompt" in body ? engine.completions : engine.chat.completions;
    const [choice] = (await api.create(body)).choices;
    const said = choice.message?.content ?? choice.text;
    found.push({ read: pipeline.read, said, reason: choice.finish_reason });
    pipeline.read = [...pipeline.read];
  }
  return found;
}

/** WebLLM's pipeline, with all of its own methods but those that need a GPU. */
function pretendPipeline({ LLMChatPipeline, getConversation }, tokenizer, config) {
  const nothing = () => {};
  const pipeline = Object.create(LLMChatPipeline.prototype);
  Object.assign(pipeline, {
    tokenizer,
    config,
    tvm: { beginScope: nothing, endScope: nothing, detachFromCurrentScope: (value) => value },
    device: { sync: async () => {} },
    imageDataCache: new Map(),
    artifactImagePixelCache: new Map(),
    appearedTokensFreq: new Map(),
    contextWindowSize: config.context_window_size,
    slidingWindowSize: -1,
    prefillChunkSize: 1024,
    filledKVCacheLength: 0,
    resetStatsPerPrefill: true,
    read: [],
    resetKVCache() {
      this.read = [];
    },
    async embedAndForward(chunk, length) {
      this.read.push(...chunk.flat());
      this.filledKVCacheLength += length;
      return { dispose: nothing };
    },
    async sampleFromRawLogits() {
      return this.says.shift();
    },
  });
  pipeline.setConversation(getConversation(config.conv_template, config.conv_config));
  return pipeline;
}
