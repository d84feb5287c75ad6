"""Server: the protocol that `edgekit serve` speaks."""
