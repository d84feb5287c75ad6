/** Files that a browser keeps between visits: asked for room first, and fetched with a count. */

const CACHE = "edgekit";

/**
 * Ask the browser whether it has room for so many bytes, and to keep them.
 *
 * Throws an Error with one sentence where it says that it has not.
 */
export async function askForRoom(bytes, storage = navigator.storage) {
  if (!storage?.estimate) return; // an old browser, or no https: it will tell when it is full
  await storage.persist?.();
  const { quota, usage } = await storage.estimate();
  const room = quota - usage;
  if (bytes > room) {
    throw new Error(
      `The model takes ${inMB(bytes)}, and this browser lets the page keep ${inMB(room)} more: ` +
        "free some space, or leave the private window.",
    );
  }
}

/**
 * Fetch files, from what was kept or else from the server, as blobs by name.
 *
 * files: { name: { size_bytes, sha256 } }; onProgress is told { loaded, total } in bytes.
 */
export async function fetchFiles(files, base, onProgress = () => {}) {
  const names = Object.keys(files);
  const total = names.reduce((sum, name) => sum + files[name].size_bytes, 0);
  const kept = globalThis.caches ? await caches.open(CACHE) : null;
  const missing = [];
  for (const name of names) {
    if (!(await kept?.match(addressOf(name, files, base)))) missing.push(name);
  }
  await askForRoom(missing.reduce((sum, name) => sum + files[name].size_bytes, 0));
  await forgetOthers(kept, files, base);
  const blobs = {};
  let loaded = 0;
  for (const name of names) {
    const address = addressOf(name, files, base);
    const count = (bytes) => onProgress({ loaded: (loaded += bytes), total });
    const found = await kept?.match(address);
    if (found) count(files[name].size_bytes);
    blobs[name] = found ? await found.blob() : await download(address, files[name], count);
    if (!found) await kept?.put(address, new Response(blobs[name])).catch(() => {});
  }
  return blobs;
}

/** The hash makes another export of the model another file. */
function addressOf(name, files, base) {
  const url = new URL(name, base);
  url.searchParams.set("sha256", files[name].sha256);
  return url.href;
}

async function forgetOthers(kept, files, base) {
  const wanted = new Set(Object.keys(files).map((name) => addressOf(name, files, base)));
  const here = new URL(".", base).href;
  for (const { url } of (await kept?.keys()) ?? []) {
    if (url.startsWith(here) && !wanted.has(url)) await kept.delete(url);
  }
}

async function download(address, { size_bytes }, count) {
  const response = await fetch(address);
  if (!response.ok) throw new Error(`${address.split("?")[0]} is not there: ${response.status}.`);
  const parts = [];
  let size = 0;
  for (const reader = response.body.getReader(); ; ) {
    const { done, value } = await reader.read();
    if (done) break;
    parts.push(value);
    size += value.length;
    count(value.length);
  }
  if (size !== size_bytes) {
    throw new Error(`${address.split("?")[0]} has ${size} bytes, expected ${size_bytes}.`);
  }
  return new Blob(parts);
}

function inMB(bytes) {
  return `${Math.ceil(bytes / 1e6)} MB`;
}
