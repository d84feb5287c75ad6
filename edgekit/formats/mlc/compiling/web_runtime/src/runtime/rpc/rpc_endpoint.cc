// Left out: a library of a model answers nobody over a network.
