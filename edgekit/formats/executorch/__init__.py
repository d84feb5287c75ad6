"""ExecuTorch: programs for phones and boards, whose arithmetic a back-end does."""

from edgekit.formats.executorch import backends, tensor_types


TENSOR_TYPES, RECIPES = tensor_types.TENSOR_TYPES, tensor_types.RECIPES
MIXES_TENSOR_TYPES = True
VARIANTS = backends.variants()
COMPILES = ""
RUNTIME = "ExecuTorch"
EXTRA = "executorch"
RUN_EXTRA = "run-executorch"
ENDING = ".pte"
DEFAULT_RECIPES = ("8da8w", "8da4w", "8da4w_all")
