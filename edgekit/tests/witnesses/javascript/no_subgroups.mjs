/**
 * Hides WebGPU's subgroups from whoever opens a device after this.
 *
 * SwiftShader's have 4 lanes. ONNX Runtime Web 1.31 takes 8 or more for granted when it reads a
 * prompt longer than a few tokens, and answers nonsense; without subgroups it goes another way.
 */
const hidden = ["subgroups", "subgroup-size-control"];
const requestDevice = globalThis.GPUAdapter?.prototype.requestDevice;

if (requestDevice) {
  GPUAdapter.prototype.requestDevice = function ({ requiredFeatures = [], ...rest } = {}) {
    const features = [...requiredFeatures].filter((name) => !hidden.includes(name));
    return requestDevice.call(this, { ...rest, requiredFeatures: features });
  };
}
