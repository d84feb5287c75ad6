/**
 * wllama, which takes text and not ids: what it reads is counted against the ids that are meant. Its
 * server gives the logarithms of the most likely tokens, one answer as a stream.
 *
 * Request: `url` of the first file, `data`: { data } with the urls of the others, `packages`: npm's,
 * `context_tokens`, `threads`.
 */
import { Wllama } from "@wllama/wllama";

const WASM = "@wllama/wllama/esm/wasm/wllama.wasm";
// Whose probability is known. More of them would have tokens among them that are half a letter, over
// which wllama 3.13 dies.
const TOP_TOKENS = 16;
const NEVER = 30; // nats below the last of them, where a token is to be chosen

export async function open(request, { backend }) {
  const lines = [];
  const note = (...words) => lines.push(words.join(" "));
  const logger = { debug: note, log: note, warn: note, error: note };
  const wllama = new Wllama({ default: `${request.packages}${WASM}` }, { logger });
  const blobs = [];
  for (const url of [request.url, ...request.data.map(({ data }) => data)]) {
    blobs.push(await (await fetch(url)).blob());
  }
  try {
    await wllama.loadModel(blobs, {
      n_ctx: request.context_tokens,
      n_threads: request.threads ?? undefined,
      n_gpu_layers: backend === "webgpu" ? undefined : 0,
      n_parallel: 1,
    });
  } catch (error) {
    throw new Error(`${error.message} (${lines.slice(-4).join("; ")})`);
  }
  return new Model(wllama, lines);
}

class Model {
  #read = []; // the ids of the text so far
  #stream = null; // the answer to it, as far as it came

  constructor(wllama, lines) {
    Object.assign(this, { wllama, lines });
    const { n_vocab, n_ctx, add_bos_token, token_bos, list_tokens_eog } =
      wllama.getLoadedContextInfo();
    Object.assign(this, { vocabulary: n_vocab, context: n_ctx, ends: list_tokens_eog });
    this.bos = add_bos_token ? token_bos : null;
    this.threads = wllama.getNumThreads();
  }

  /** `text` is that of all ids so far, `rest` without that of the first. */
  async prefill(ids, { text, rest }) {
    await this.reset(this.#read);
    this.#read = [...this.#read, ...ids];
    const count = this.context - this.#read.length;
    this.#stream = this.#answer(this.#read, { text, rest }, { count });
    const row = await this.#next();
    this.#stream.refuseOther(this.#read.length);
    return row;
  }

  /** The logits after a text, without an answer to it. */
  async last(ids, texts) {
    await this.reset();
    const answer = this.#answer(ids, texts, { count: 1 });
    const row = this.#shared(await answer.next());
    await answer.stop();
    return row;
  }

  async decode(id, texts) {
    if (id !== this.#stream?.last) return this.prefill([id], texts);
    this.#read.push(id);
    return this.#next();
  }

  async reset(read = []) {
    await this.#stream?.stop();
    this.#stream = null;
    this.#read = read;
  }

  async generate(ids, count, onToken, texts) {
    await this.reset();
    const answer = this.#answer(ids, texts, { count: count + 1, ignoresEnd: true });
    for (let index = 0; index < count; index += 1) {
      await answer.next();
      onToken(answer.last);
    }
    await answer.stop();
    answer.refuseOther(ids.length);
  }

  #answer(ids, { text, rest }, options) {
    const prompt = ids[0] === this.bos ? rest : text; // wllama puts it there itself
    return new Answer(this.wllama, this.lines, prompt, { ends: this.ends, ...options });
  }

  async #next() {
    return this.#row(await this.#stream.next());
  }

  /** Logits by which only a known token is ever chosen. */
  #row(top) {
    const least = Math.min(...top.map(({ logprob }) => logprob));
    return this.#filled(top, least - NEVER);
  }

  /** Logits to compare with others: all other tokens share the rest of the probability. */
  #shared(top) {
    const known = top.reduce((sum, { logprob }) => sum + Math.exp(logprob), 0);
    const others = Math.max(1, this.vocabulary - top.length);
    return this.#filled(top, Math.log(Math.max(1e-9, 1 - known) / others));
  }

  #filled(top, others) {
    const values = new Float32Array(this.vocabulary).fill(others);
    for (const { id, logprob } of top) values[id] = logprob;
    return values;
  }
}

/** One answer, token by token. */
class Answer {
  last = null; // the token that came last

  constructor(wllama, lines, prompt, { count, ends, ignoresEnd = false }) {
    this.end = ends[0];
    this.waiting = [];
    this.wake = () => {};
    this.ending = new AbortController();
    const options = {
      prompt,
      max_tokens: count,
      temperature: 0,
      top_k: 1,
      logprobs: TOP_TOKENS,
      ignore_eos: ignoresEnd,
      timings_per_token: true,
      stream: true,
      abortSignal: this.ending.signal,
      onData: (chunk) => this.#add(chunk),
    };
    this.done = wllama.createCompletion(options).then(
      () => this.#add(null),
      (error) => {
        // Its worker writes an answer as JSON, and dies over bytes that are no text (3.13.0).
        const why = lines.findLast((line) => line.includes("json.exception"));
        this.error = why ? new Error(`wllama cannot write what the model said: ${why}`) : error;
        this.#add(null);
      },
    );
  }

  #add(chunk) {
    this.promptTokens = chunk?.usage?.prompt_tokens ?? this.promptTokens;
    const timings = chunk?.timings;
    if (timings) this.promptTokens ??= (timings.cache_n ?? 0) + timings.prompt_n;
    for (const token of chunk?.choices[0]?.logprobs?.content ?? []) this.waiting.push(token);
    this.isOver = chunk === null;
    this.wake();
  }

  async next() {
    while (this.waiting.length === 0) {
      if (this.isOver && this.error) throw this.error;
      // The token that ends an answer is not told.
      if (this.isOver) return [{ id: (this.last = this.end), logprob: 0 }];
      await new Promise((resolve) => (this.wake = resolve));
    }
    const token = this.waiting.shift();
    this.last = token.id;
    return token.top_logprobs;
  }

  /** Check that what was read are as many tokens as were meant. */
  refuseOther(count) {
    if (this.promptTokens !== undefined && this.promptTokens !== count) {
      throw new Error(`the text is ${this.promptTokens} tokens to wllama, ${count} were meant`);
    }
  }

  async stop() {
    this.ending.abort();
    await this.done;
  }
}
