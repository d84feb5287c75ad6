/**
 * WebLLM, driven token by token through its public interface: a logit processor is given the logits
 * after the last id.
 *
 * Request: `record` (of WebLLM's model list), `address` (that the bundle has in it), `vocabulary`.
 */
import * as webllm from "@mlc-ai/web-llm";

export async function open(request) {
  const record = { ...request.record };
  const here = `${location.origin}/files/`;
  for (const name of ["model", "model_lib"]) {
    record[name] = record[name].replace(request.address, here);
  }
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
