"""Versions: edgekit's own, and those of foreign programs that were read, pinned or tried."""

EDGEKIT = "0.1.0"
LLAMA_CPP_PYTHON = "0.3.36"  # the binding's structs follow one commit of llama.cpp …
LLAMA_CPP_COMMIT = "0c1e57098"  # … this one
EXECUTORCH = "1.5.1"  # a program follows one release, and the session is compiled against it
APACHE_TVM = "0.27.0.post1"  # its kernels for the cache are replaced by name …
APACHE_TVM_FFI = "0.1.15.post2"  # … and neither loads with every version of the other
WEBLLM = "0.2.86"  # the page was tested with it, and libraries are named after it
