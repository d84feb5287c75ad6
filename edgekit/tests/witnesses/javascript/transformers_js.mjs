/**
 * What transformers.js makes of bundles: ids of texts, prompts of conversations, what follows.
 *
 * Request: `root`, where the bundles are; `bundles`, each with its `name` there, the `options` an
 * app would load it with, `texts` and `conversations` to read, `prompt` (ids) to continue for
 * `tokens`, `chat` (messages) to reply to, and `batch` (texts) to continue alone and all at once.
 */
import { Tensor, env, pipeline } from "@huggingface/transformers";
import { answer } from "./answer.mjs";
import "./no_subgroups.mjs";

env.allowRemoteModels = false;
env.allowLocalModels = true; // off in browsers by default
env.useBrowserCache = false;
// Where an app that serves everything itself has them; else they come from a CDN.
env.backends.onnx.wasm.wasmPaths = "/node_modules/onnxruntime-web/dist/";

await answer(async ({ root, bundles }) => {
  env.localModelPath = root;
  const found = {};
  for (const bundle of bundles) {
    try {
      found[bundle.name] = await run(bundle);
    } catch (error) {
      throw new Error(`${bundle.name}: ${error?.stack ?? error}`);
    }
  }
  return found;
});

async function run({ name, options, texts = [], conversations = [], prompt, tokens, chat, batch }) {
  const started = performance.now();
  const generator = await pipeline("text-generation", name, options);
  const { tokenizer } = generator;
  const loaded = performance.now();
  const found = {
    ids: texts.map((text) => tokenizer.encode(text, { add_special_tokens: false })),
    prompts: conversations.map((messages) => render(tokenizer, messages)),
    continuation: prompt && (await continued(generator.model, prompt, tokens)),
    reply: chat && (await reply(generator, chat, tokens)),
    alone: batch && (await alone(generator, batch, tokens)),
    together: batch && (await together(generator, batch, tokens)),
  };
  await generator.dispose();
  return { ...found, load_ms: loaded - started, run_ms: performance.now() - loaded };
}

function render(tokenizer, messages) {
  const settings = { tokenize: false, add_generation_prompt: true };
  return tokenizer.apply_chat_template(messages, settings);
}

/** The most likely ids after `ids`, without them. */
async function continued(model, ids, tokens) {
  const all = await model.generate({
    inputs: int64([1, ids.length], ids),
    attention_mask: int64([1, ids.length], Array(ids.length).fill(1)),
    max_new_tokens: tokens,
    do_sample: false,
  });
  return all.tolist()[0].slice(ids.length).map(Number);
}

function int64(shape, values) {
  return new Tensor("int64", BigInt64Array.from(values, BigInt), shape);
}

/** Shorter texts are filled up on the left, as the pipeline has it. */
async function together(generator, texts, tokens) {
  const found = await generator(texts, { max_new_tokens: tokens, do_sample: false });
  return found.map(([{ generated_text }]) => generated_text);
}

async function alone(generator, texts, tokens) {
  const found = [];
  for (const text of texts) found.push(...(await together(generator, [text], tokens)));
  return found;
}

async function reply(generator, messages, tokens) {
  const settings = { max_new_tokens: tokens, do_sample: false };
  const [{ generated_text }] = await generator(messages, settings);
  return generated_text.at(-1).content;
}
