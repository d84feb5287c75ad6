/** Asks another host for a file, as a client does that fetches its model from a hub. */
import { answer } from "./answer.mjs";

await answer(async ({ url }) => {
  try {
    return (await fetch(url)).status;
  } catch (error) {
    return error.name;
  }
});
