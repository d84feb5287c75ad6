"""GGUF: what llama.cpp loads."""

from edgekit.formats.gguf import tensor_types


TENSOR_TYPES, RECIPES = tensor_types.TENSOR_TYPES, tensor_types.RECIPES
MIXES_TENSOR_TYPES = True
ENDING = ".gguf"
VARIANTS = ()
COMPILES = ""
RUNTIME = "llama.cpp"
EXTRA = "gguf"
RUN_EXTRA = "run-gguf"
# F32, F16 and BF16 are twice and four times as large as Q8_0 and say the same.
DEFAULT_RECIPES = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "Q3_K_M", "Q2_K")
