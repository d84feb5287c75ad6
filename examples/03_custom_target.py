"""A device of your own: plan and export for the greenhouse controller in 03_custom_target.toml.

Needs: pip install 'edgekit[gguf,demo]'
Run: python 03_custom_target.py [OUT]
Writes: OUT/greenhouse, a bundle of 104 MiB; OUT is ./out unless you name it
Prints:
    Greenhouse controller takes 110 MiB, 280 MiB of memory, 25 tokens/s or more
    no  gguf Q8_0: 138 MiB > 110 MiB to download
    no  gguf Q6_K: 132 MiB > 110 MiB to download
    no  gguf Q5_K_M: ... tokens/s < 25 tokens/s
    yes gguf Q4_K_M: 101 MiB, ... MiB of memory, about ... tokens/s
    refused: SmolLM2-135M-Instruct does not fit Greenhouse controller
      gguf F16: 258 MiB > 110 MiB to download; ... MiB > 280 MiB of memory; ...
    ...greenhouse: the likeliest token is that of the original at ...% of ... positions
"""

import sys
from pathlib import Path

import edgekit


MIB = 2**20


def main(out: Path) -> None:
    """Plan, see the limits hold, and export."""
    target = edgekit.load_target(str(Path(__file__).with_suffix(".toml")))
    show_plan(target)
    show_refusal(target)
    bundle = edgekit.export("demo", target, out=out, replace=True)
    if proof := bundle.agreement:
        share = f"{proof.same_top_token:.0%} of {proof.positions} positions"
        print(f"{out}: the likeliest token is that of the original at {share}")


def show_plan(target: edgekit.Target) -> None:
    """Print the limits, what misses them, and what is left; from headers alone, in a second."""
    budget, plan = target.budget, edgekit.plan("demo", target)
    print(
        f"{target.title} takes {budget.artifact_bytes / MIB:.0f} MiB, "
        f"{budget.peak_memory_bytes / MIB:.0f} MiB of memory, "
        f"{budget.decode_tokens_per_s:.0f} tokens/s or more"
    )
    for candidate in plan.rejected:
        print(f"no  {candidate.name}: {'; '.join(candidate.misses)}")
    estimate = plan.estimate
    print(
        f"yes {plan.format} {plan.recipe.name}: {estimate.artifact_bytes / MIB:.0f} MiB, "
        f"{estimate.memory.peak_bytes / MIB:.0f} MiB of memory, "
        f"about {estimate.decode_tokens_per_s.likely:.0f} tokens/s"
    )


def show_refusal(target: edgekit.Target) -> None:
    """Ask for what cannot fit: the refusal comes before anything slow."""
    try:
        edgekit.plan("demo", target, quant="F16")
    except edgekit.EdgekitError as error:
        print(f"refused: {error}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "out") / "greenhouse")
