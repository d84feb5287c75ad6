"""How weights are solved: codes that make up for each other's errors, for any format's lattice."""
