"""What artifacts are held against: other runtimes, clients and readers than edgekit's own."""
