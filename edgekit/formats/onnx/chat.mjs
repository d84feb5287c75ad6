/** The chat of a bundle's page: transformers.js reads and writes text, ONNX Runtime Web computes. */
import { AutoTokenizer, env } from "@huggingface/transformers";
import { open } from "./runtime.mjs";

export async function load(settings, blobs, { backend, base }) {
  env.allowRemoteModels = false;
  env.allowLocalModels = true;
  env.useBrowserCache = false;
  env.localModelPath = base;
  const tokenizer = await AutoTokenizer.from_pretrained(".");
  const bytes = {};
  for (const [name, blob] of Object.entries(blobs)) {
    bytes[name] = new Uint8Array(await blob.arrayBuffer());
  }
  const model = await open(
    {
      ...settings.settings,
      url: bytes[settings.entry],
      data: Object.keys(bytes)
        .filter((name) => name !== settings.entry)
        .map((name) => ({ path: name.split("/").at(-1), data: bytes[name] })),
      packages: `${base}node_modules/`,
    },
    { backend },
  );
  const check = backend === "webgpu" ? await model.selfCheck() : null;
  return new Chat(model, tokenizer, settings, check !== null && !check.is_right);
}

class Chat {
  constructor(model, tokenizer, settings, isWrong) {
    Object.assign(this, { model, tokenizer, settings, isWrong });
  }

  async *answer(messages) {
    const text = this.tokenizer.chat_template
      ? this.tokenizer.apply_chat_template(messages, { tokenize: false, add_generation_prompt: true })
      : messages.at(-1).content;
    const ids = this.tokenizer.encode(text, { add_special_tokens: false });
    this.model.reset();
    let logits = await this.model.prefill(ids);
    const said = [];
    let written = "";
    const { context_tokens, stop_ids } = this.settings;
    while (ids.length + said.length < context_tokens) {
      const id = logits.reduce((best, value, at) => (value > logits[best] ? at : best), 0);
      if (stop_ids.includes(id)) return;
      said.push(id);
      const whole = this.tokenizer.decode(said, { skip_special_tokens: true });
      if (!whole.endsWith("\ufffd")) {
        yield whole.slice(written.length);
        written = whole;
      }
      logits = await this.model.decode(id);
    }
  }
}
