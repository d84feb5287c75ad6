"""Measurements made up by hand, for what judges and reports do with them."""

from collections.abc import Sequence

from edgekit.measuring.measurement import (
    ColdStart,
    Conditions,
    Environment,
    Generation,
    Measurement,
    MemoryMetric,
    MemoryPoint,
    Repetition,
    Workload,
)


QUIET = Conditions(run_delay_share=0.001, memory_pressure_share=0.0)
STEADY_S = (0.100, 0.101, 0.099, 0.100, 0.102, 0.100, 0.099, 0.101, 0.100, 0.100)
PROMPT_TOKENS = 8


def make_measurement(
    *,
    first_token_s: Sequence[float] = STEADY_S,
    token_s: Sequence[float] = STEADY_S,
    load_s: float = 0.5,
    peak_bytes: int = 10**8,
    major_faults: int = 0,
    conditions: Conditions = QUIET,
    metric: MemoryMetric = "working_set",
    **fields,
) -> Measurement:
    """Return one process for every two generations; ``token_s`` is each one's time per token."""
    generations = [
        Generation(
            prompt_tokens=PROMPT_TOKENS,
            first_token_s=first,
            decode_s=(token,) * 7,
            major_faults=major_faults,
        )
        for first, token in zip(first_token_s, token_s, strict=True)
    ]
    repetitions = tuple(
        Repetition(
            load_s=load_s,
            cached_before_load=1.0,
            warm_up=generations[0],
            generations=tuple(generations[start : start + 2]),
            memory_peaks_bytes={metric: peak_bytes},
            memory_over_time=(
                MemoryPoint(time_s=0.0, resident_bytes=10**7, unreclaimable_bytes=10**6),
                MemoryPoint(time_s=1.0, resident_bytes=peak_bytes, unreclaimable_bytes=10**7),
            ),
            conditions=conditions,
        )
        for start in range(0, len(generations), 2)
    )
    known = {"device": "this machine", "artifact_sha256": "0" * 64, "environment": ENVIRONMENT}
    cold = ColdStart(load_s=2.0, first_token_s=0.3, prompt_tokens=8, cached_before_load=0.0)
    return Measurement(
        workload=Workload(
            prompt_lengths_tokens=(PROMPT_TOKENS,), answer_tokens=8, context_tokens=64
        ),
        repetitions=repetitions,
        cold_start=cold,
        **{**known, **fields},
    )


ENVIRONMENT = Environment(
    system="Linux 6.12.25",
    model="Raspberry Pi 5 Model B Rev 1.0",
    cpu="Cortex-A76",
    cores=4,
    cpu_features=("asimd", "asimddp"),
    memory_bytes=8 * 2**30,
    page_bytes=16384,
    governor="performance",
    has_swap=False,
    python="3.11.2",
    versions={"edgekit": "0.1.0"},
)
