"""MLC: models for WebLLM in the browser and for MLC's engine on phones."""

from edgekit.formats.mlc import packing, shards


TENSOR_TYPES, RECIPES = packing.TENSOR_TYPES, packing.RECIPES
MIXES_TENSOR_TYPES = False
ENDING = shards.CACHE
VARIANTS = ("chat", "raw-prompt")
COMPILES = "a library for browsers"
RUNTIME = "MLC's runtime (TVM)"
EXTRA, RUN_EXTRA = "mlc", "mlc-compile"
# Those in f32 are for browsers whose GPU does not compute in float16: q0f32 says the same as q0f16
# and takes twice its memory.
DEFAULT_RECIPES = ("q0f16", "q0f32", "q4f32_1", "q4f16_1")
