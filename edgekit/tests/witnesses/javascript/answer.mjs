/**
 * Answer the Python side, in Node and in a page alike: `answer(async (request) => result)`.
 *
 * Request and result are anything JSON can hold. In Node they travel through standard input and
 * output; a page asks its server for the one and sends it the other, or what went wrong.
 */
export async function answer(respond) {
  const isPage = typeof document !== "undefined";
  await (isPage ? answerServer(respond) : answerProcess(respond));
}

async function answerProcess(respond) {
  const { readFileSync } = await import("node:fs");
  const result = await respond(JSON.parse(readFileSync(0, "utf-8")));
  process.stdout.write(`\n${JSON.stringify(result)}\n`, () => process.exit(0));
}

async function answerServer(respond) {
  // What escapes `respond`: a worker that dies, a promise that nobody awaits.
  addEventListener("error", (event) => sendError(event.error ?? event.message));
  addEventListener("unhandledrejection", (event) => sendError(event.reason));
  const foreign = [];
  addEventListener("securitypolicyviolation", (event) => foreign.push(event.blockedURI));
  try {
    const request = await (await fetch("/request")).json();
    const result = await respond(request);
    await new Promise((resolve) => setTimeout(resolve, 20)); // for events that are on their way
    await send({ result, foreign });
  } catch (error) {
    await sendError(error);
  }
}

function sendError(error) {
  return send({ error: String(error?.stack ?? error?.message ?? error) });
}

function send(answer) {
  return fetch("/answer", { method: "POST", body: JSON.stringify(answer) });
}

/** A typed array's bytes as text, for what is too long as a list of numbers. */
export function toBase64(array) {
  const bytes = new Uint8Array(array.buffer, array.byteOffset, array.byteLength);
  let text = "";
  for (let start = 0; start < bytes.length; start += 32768) {
    text += String.fromCharCode(...bytes.subarray(start, start + 32768));
  }
  return btoa(text);
}
