"""Answers over states: edgekit's session next to ONNX Runtime GenAI's loop, on the same ONNX files.

    python edgekit/tests/benchmarks/onnx_states_decode.py [--threads N] [--rounds N] [RECIPE ...]

Random models with layers as wide as those of LFM2 350M and Qwen3.5 0.8B, and fewer of them, timed
as in onnx_decode.py. Goal: decode at least 0.95 of GenAI's.
"""

import argparse
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgekit.export import export
from edgekit.tests.benchmarks.onnx_decode import CONTEXT_TOKENS, TARGET, compare_speed
from edgekit.tests.tiny.checkpoints import write_tiny_checkpoint


CONV, DELTA, ATTENTION = "conv", "linear_attention", "full_attention"
MODELS: Mapping[str, Mapping[str, Any]] = {
    "lfm2": {
        "hidden_size": 1024, "intermediate_size": 4608, "block_auto_adjust_ff_dim": False,
        "num_attention_heads": 16, "num_key_value_heads": 8, "num_hidden_layers": 8,
        "layer_types": [CONV, CONV, ATTENTION, CONV] * 2,
    },
    "qwen3.5-tied": {
        "hidden_size": 1024, "intermediate_size": 3584, "num_attention_heads": 8,
        "num_key_value_heads": 2, "head_dim": 256, "linear_num_key_heads": 16,
        "linear_num_value_heads": 16, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
        "num_hidden_layers": 8, "layer_types": [DELTA, DELTA, DELTA, ATTENTION] * 2,
    },
}  # fmt: skip


def main() -> None:
    """Print a block for each model and recipe."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipes", nargs="*", default=["INT8", "UINT4"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    print(f"{os.cpu_count()} processors, load {os.getloadavg()[0]:.2f}, {options.threads} threads")
    with tempfile.TemporaryDirectory() as directory:
        for kind, fields in MODELS.items():
            source = write_tiny_checkpoint(
                Path(directory) / kind, kind, max_position_embeddings=CONTEXT_TOKENS, **fields
            )
            for recipe in options.recipes:
                bundle = export(
                    source, TARGET, format="onnx", quant=recipe, context_tokens=CONTEXT_TOKENS,
                    calibrate=False, out=Path(directory) / f"{kind}-{recipe}", verify=False,
                )  # fmt: skip
                print(f"{kind} {recipe}:")
                compare_speed(bundle, threads=options.threads, rounds=options.rounds)


if __name__ == "__main__":
    main()
