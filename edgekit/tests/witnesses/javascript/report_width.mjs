/**
 * How wide a report is on a narrow screen. The page is /files/report.html.
 *
 * Request: { width }, of the frame that shows it, in CSS pixels: a window of the browser itself has
 * a least width.
 */
import { answer } from "./answer.mjs";

await answer(async ({ width }) => {
  const page = await (await fetch("/files/report.html")).text();
  const frame = document.createElement("iframe");
  frame.style.cssText = `width: ${width}px; height: 800px; border: 0`;
  frame.srcdoc = page;
  await new Promise((resolve) => {
    frame.onload = resolve;
    document.body.append(frame);
  });
  const shown = frame.contentDocument;
  const wide = [...shown.querySelectorAll("body *")]
    .filter((element) => element.getBoundingClientRect().right > width)
    .map((element) => element.outerHTML.slice(0, 80));
  return { scrollWidth: shown.documentElement.scrollWidth, wide };
});
