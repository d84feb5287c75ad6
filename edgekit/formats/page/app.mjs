/**
 * The chat of index.html. `chat.mjs` is the format's: load(settings, blobs, { backend, base }) gives
 * { note, answer(messages) }, where `answer` yields pieces of text, and `isWrong` where the runtime
 * errs on this GPU with its subgroups.
 */
import { describeGpu, lackingOf } from "./gpu.mjs";
import { fetchFiles } from "./storage.mjs";

const HIDDEN = "edgekit-hidden"; // features of the GPU, where a load before this one found a fault
const SUBGROUPS = ["subgroups", "subgroup-size-control"];
const base = new URL(".", import.meta.url).href;
const find = (selector) => document.querySelector(selector);
const say = (text) => (find("#state").textContent = text);
const talk = [];
let model;

function show(role, text) {
  const line = document.createElement("div");
  line.className = role;
  line.textContent = text;
  return find("#talk").appendChild(line);
}

async function answer(content) {
  talk.push({ role: "user", content });
  show("user", content);
  const line = show("assistant", "");
  for await (const piece of model.answer(talk)) line.textContent += piece;
  talk.push({ role: "assistant", content: line.textContent });
}

find("form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const [box, button] = event.target.elements;
  button.disabled = true;
  try {
    await answer(box.value);
    box.value = "";
  } catch (error) {
    say(lossOf() ?? error.message);
  }
  button.disabled = false;
});

/** Why nothing can be computed any more, if the GPU went away. */
function lossOf() {
  const lost = globalThis.edgekitGpu?.lost;
  return lost ? `The GPU was lost (${lost}): load the page again.` : null;
}

function count({ loaded, total }) {
  Object.assign(find("#progress"), { hidden: false, value: loaded, max: total });
  say(`${Math.floor(loaded / 1e6)} of ${Math.ceil(total / 1e6)} MB`);
}

async function load() {
  const settings = await (await fetch("browser.json", { cache: "no-cache" })).json();
  const chat = await import("./chat.mjs").catch(() => {
    throw new Error("The runtime is missing: this page's source says how to put it here.");
  });
  const reason = lackingOf(await describeGpu(), settings);
  if (reason !== null && !settings.runs_in_wasm) throw new Error(reason);
  const blobs = await fetchFiles(settings.files, base, count);
  find("#progress").hidden = true;
  say("Starting …");
  const backend = reason === null ? "webgpu" : "wasm";
  model = await chat.load(settings, blobs, { backend, base });
  if (model.isWrong && !sessionStorage.getItem(HIDDEN)) {
    sessionStorage.setItem(HIDDEN, JSON.stringify(SUBGROUPS)); // gpu.js reads it
    location.reload();
    return;
  }
  const where = backend === "webgpu" ? "on the GPU" : `in WebAssembly. ${reason}`;
  const helped = sessionStorage.getItem(HIDDEN)
    ? " Its subgroups are not used: with them the runtime answered wrongly."
    : "";
  say(`Ready, ${where}${backend === "webgpu" ? "." : ""}${helped}`);
  find("form").hidden = false;
}

load().catch((error) => say(lossOf() ?? error.message));
