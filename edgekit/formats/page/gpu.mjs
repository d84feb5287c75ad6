/** What this browser's GPU is, and what a model needs that it lacks. */

/** The adapter that a runtime would get, as plain data; null where there is none. */
export async function describeGpu(gpu = navigator.gpu) {
  const adapter = await gpu?.requestAdapter({ powerPreference: "high-performance" });
  if (!adapter) return null;
  const { vendor, architecture, device, description, isFallbackAdapter } = adapter.info;
  const limits = {};
  for (const name in adapter.limits) {
    if (typeof adapter.limits[name] === "number") limits[name] = adapter.limits[name];
  }
  return {
    vendor,
    architecture,
    device,
    description,
    is_software: Boolean(isFallbackAdapter) || /swiftshader|llvmpipe|software/i.test(`${architecture} ${description}`),
    features: [...adapter.features].sort(),
    limits,
  };
}

/**
 * One sentence that says what a model needs and is not there; null if all is.
 *
 * needs: { features: [name], largest_buffer: { name, size_bytes } | null }
 */
export function lackingOf(gpu, needs) {
  if (!navigator.gpu && gpu === null) {
    return "This browser has no WebGPU here: take a current one, and https or localhost.";
  }
  if (gpu === null) return "WebGPU finds no GPU in this browser.";
  for (const feature of needs.features) {
    if (!gpu.features.includes(feature)) {
      return `The model computes in float16, which needs ${feature}, and this GPU has none.`;
    }
  }
  const buffer = needs.largest_buffer;
  for (const limit of ["maxStorageBufferBindingSize", "maxBufferSize"]) {
    if (buffer && buffer.size_bytes > gpu.limits[limit]) {
      const [needed, granted] = [buffer.size_bytes, gpu.limits[limit]].map(inMiB);
      return `${buffer.name} needs ${needed} of ${limit}, this GPU has ${granted}.`;
    }
  }
  return null;
}

function inMiB(bytes) {
  return `${Math.round((bytes / (1 << 20)) * 10) / 10} MiB`;
}
