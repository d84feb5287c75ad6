"""Runtime: a loaded model, and the machine it runs on."""
