"""Vulkan: programs for the GPUs of Android phones."""

from edgekit.formats.executorch.backends import Backend, Build


_UNROUNDED = ("Vulkan rounds nothing that is multiplied with four-bit weights",)
BACKEND = Backend(
    package=__name__,
    id="VulkanBackend",
    name="Vulkan",
    device="an Android phone whose GPU has Vulkan 1.1",
    recipes=("F32", "F16", "8da4w", "8da4w_g64", "8da4w_g128", "8da4w_all"),
    half_recipes=frozenset({"F16"}),  # the delegate computes in what weights are stored in
    notes={
        "F16": ("Vulkan computes in float16 where weights are: norms are float16 too",),
        "8da4w": _UNROUNDED,
        "8da4w_g64": _UNROUNDED,
        "8da4w_g128": _UNROUNDED,
        "8da4w_all": _UNROUNDED,
    },
    builds={
        "vulkan": Build(
            kind="all but the embedding on the GPU: runtimes with the Vulkan delegate run it",
            android="Link `executorch-android-vulkan`, which has the Vulkan delegate, in place of\n"
            "`executorch-android`. Runners read a prompt in parts of 128 tokens; an answer that "
            "would\npass the end of the context ends with an error, so leave it room.",
        )
    },
)
