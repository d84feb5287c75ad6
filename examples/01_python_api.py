"""The Python API in ten lines: export the demo model for a Raspberry Pi 5, then ask it.

Needs: pip install 'edgekit[gguf,demo]'
Run: python 01_python_api.py [OUT]
Writes: OUT/demo, a bundle of 142 MiB; OUT is ./out unless you name it
Prints:
    ...demo: Q8_0, 142 MiB, for raspberry-pi-5-8gb
    proven over ... positions: 0.00... nats from the original in the mean
    The capital of France is Paris.
    ... tokens/s here, about ... expected there
"""

import sys
from pathlib import Path

import edgekit


out = Path(sys.argv[1] if len(sys.argv) > 1 else "out") / "demo"

bundle = edgekit.export("demo", "raspberry-pi-5-8gb", out=out, replace=True)
size_mib = bundle.artifact.size_bytes / 2**20
print(f"{out}: {bundle.artifact.recipe}, {size_mib:.0f} MiB, for {bundle.target}")
if proof := bundle.agreement:  # None only after verify=False
    nats = f"{proof.mean_kl_nats:.4f} nats from the original in the mean"
    print(f"proven over {proof.positions} positions: {nats}")
with edgekit.Runner.open(out) as runner:
    answer = runner.ask([{"role": "user", "content": "Name the capital of France."}]).answer
print(answer.text)
expected = bundle.predicted["decode_tokens_per_s"]
print(f"{answer.decode_tokens_per_s:.0f} tokens/s here, about {expected:.0f} expected there")
