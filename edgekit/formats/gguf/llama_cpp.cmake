# What the build of llama-cpp-python may leave out, for edgekit uses none of it: llama.cpp's library
# for images, and the one that its command line tools share: more than half of the compiling.
#
#   CMAKE_ARGS=-DCMAKE_PROJECT_llama_cpp_INCLUDE=/path/to/this/file pip install 'edgekit[run-gguf]'
#
# llama-cpp-python 0.3.36 forces LLAMA_BUILD_COMMON on in CMake's cache; only a variable, which comes
# before the cache, turns it off, and `-D` on the command line cannot set one.
set(LLAVA_BUILD OFF)
set(LLAMA_BUILD_COMMON OFF)
