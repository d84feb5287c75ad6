/**
 * WebLLM, driven token by token through its public interface: a logit processor is given the logits
 * after the last id.
 *
 * Request: `record` (of WebLLM's model list, with addresses below the bundle), `vocabulary`.
 */
import * as webllm from "@mlc-ai/web-llm";

export async function open(request) {
  const record = { ...request.record };
  // WebLLM adds "resolve/main/" to an address that has none; ".." takes it away again.
  record.model = `${location.origin}/files/resolve/main/../../`;
  record.model_lib = new URL(record.model_lib, `${location.origin}/files/`).href;
  // Else every call samples, over a sort of the whole vocabulary.
  record.overrides = { ...record.overrides, temperature: 0 };
  const listener = new Listener();
  const engine = new webllm.MLCEngine({
    appConfig: { model_list: [record] },
    logitProcessorRegistry: new Map([[record.model_id, listener]]),
    logLevel: "WARN",
  });
  await engine.reload(record.model_id);
  return new Model(engine, listener, request.vocabulary);
}

/** Keeps the logits that WebLLM would sample from. */
class Listener {
  logits = null;

  processLogits(logits) {
    this.logits = logits.slice();
    return logits;
  }

  processSampledToken() {}

  resetState() {}
}

class Model {
  constructor(engine, listener, vocabulary) {
    Object.assign(this, { engine, listener, vocabulary });
  }

  async prefill(ids) {
    await this.engine.forwardTokensAndSample(ids, true);
    return this.listener.logits;
  }

  async decode(id) {
    await this.engine.forwardTokensAndSample([id], false);
    return this.listener.logits;
  }

  reset() {
    return this.engine.resetChat();
  }
}
