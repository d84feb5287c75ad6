"""Source: what comes in, a checkpoint with its adapters, read one tensor at a time."""
