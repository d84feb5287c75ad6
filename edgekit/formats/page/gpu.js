/**
 * Runs before anything else in a page or a worker: notes what is really done with WebGPU, and holds
 * the GPU to the limits and features of another one, where `edgekitForced` says so, or what the page
 * itself wrote down.
 */
(() => {
  function keptOf(name) {
    try {
      return JSON.parse(sessionStorage.getItem(name)) ?? [];
    } catch {
      return []; // a worker has none, nor a page whose cookies are blocked
    }
  }

  if (globalThis.edgekitGpu) return;
  const forced = globalThis.edgekitForced ?? { limits: {}, hidden: keptOf("edgekit-hidden") };
  const seen = { submits: 0, adapter: null, lost: null, errors: [] };
  globalThis.edgekitGpu = seen;
  if (!globalThis.GPUAdapter) return;

  const isHidden = (name) => forced.hidden.includes(name);
  const own = (type, name) => Object.getOwnPropertyDescriptor(type.prototype, name);
  const { get: limitsOf } = own(GPUAdapter, "limits");
  const { get: featuresOf } = own(GPUAdapter, "features");
  const { requestDevice } = GPUAdapter.prototype;
  const { submit } = GPUQueue.prototype;

  const granted = (limits, name) => {
    const value = limits[name];
    return name in forced.limits ? Math.min(value, forced.limits[name]) : value;
  };

  Object.defineProperty(GPUAdapter.prototype, "limits", {
    get() {
      const limits = limitsOf.call(this);
      const found = {};
      for (const name in limits) found[name] = granted(limits, name);
      return found;
    },
  });
  Object.defineProperty(GPUAdapter.prototype, "features", {
    get() {
      return new Set([...featuresOf.call(this)].filter((name) => !isHidden(name)));
    },
  });

  GPUAdapter.prototype.requestDevice = async function (wanted = {}) {
    for (const name of wanted.requiredFeatures ?? []) {
      if (isHidden(name)) throw new TypeError(`${name} is not a feature of this adapter`);
    }
    for (const [name, value] of Object.entries(wanted.requiredLimits ?? {})) {
      if (name in forced.limits && value > forced.limits[name]) {
        throw new DOMException(`${name} of ${value} is more than this adapter has`, "OperationError");
      }
    }
    const device = await requestDevice.call(this, wanted);
    const { vendor, architecture, device: model, description, isFallbackAdapter } = this.info;
    seen.adapter = { vendor, architecture, device: model, description, isFallbackAdapter };
    device.lost.then(({ reason, message }) => {
      if (reason !== "destroyed") seen.lost = message || "no reason was given";
    });
    device.addEventListener("uncapturederror", ({ error }) => {
      if (seen.errors.length < 8) seen.errors.push(error.message);
    });
    return device;
  };

  GPUQueue.prototype.submit = function (buffers) {
    seen.submits += 1;
    return submit.call(this, buffers);
  };
})();
