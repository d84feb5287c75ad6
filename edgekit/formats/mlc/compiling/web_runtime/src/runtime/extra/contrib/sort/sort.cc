// Left out: a library of a model sorts on the GPU.
