"""How large what a phone's GPU binds may get."""

# DEFAULT_TEXTURE_LIMITS in backends/vulkan/utils.py of executorch 1.5.1; a texel is four numbers.
TEXTURE_WIDTH, TEXTURE_DEPTH = 4 * 16384, 2048
# Of every GPU with Vulkan: maxStorageBufferRange and maxImageDimension2D in the specification's
# table of required limits.
BUFFER_BYTES = 2**27
# More rows of int8 than a texture has on its side would need kernels that the delegate lacks.
INT8_ROWS = 4096
