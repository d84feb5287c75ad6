"""ONNX: what ONNX Runtime loads, and what is built upon it.

A bundle is laid out as ONNX Runtime GenAI, transformers.js and Optimum look for models: settings
and tokenizer in its root, the graph and its weights in ``onnx``, under the name transformers.js has
for such a model: ``model.onnx`` (F32), ``model_fp16.onnx`` (F16, F16_GPU), ``model_quantized.onnx``
(INT8), ``model_q4.onnx`` (four bits) and ``model_q4f16.onnx`` (UINT4_GPU).

Recipes whose names end in ``_GPU`` multiply, attend and cache in float16, as a GPU with
``shader-f16`` does best; sums over layers, norms and logits stay in float32. A CPU runs them too,
where the others are made for it. See `tensor_types.INT8_ACTIVATIONS` for what rounds on the way.
"""

from edgekit.formats.onnx import tensor_types


TENSOR_TYPES, RECIPES = tensor_types.TENSOR_TYPES, tensor_types.RECIPES
MIXES_TENSOR_TYPES = True
ENDING = ".onnx"
VARIANTS = ()
COMPILES = ""
RUNTIME = "ONNX Runtime"
EXTRA = "onnx"
RUN_EXTRA = "run-onnx"
# F32 and F16 take as much memory as each other, four times that of INT8, and say the same.
DEFAULT_RECIPES = ("INT8", "UINT4", "UINT4_ALL")
