"""A browser as a runtime: the system's Chromium, a page of ours in it, and npm's runtimes."""
