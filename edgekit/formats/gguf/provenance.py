"""Where a model comes from and how its makers use it, as keys of the file.

Source: ``Keys.General`` in gguf-py/gguf/constants.py and ``Metadata`` in gguf-py/gguf/metadata.py
of llama.cpp 0c1e57098. llama.cpp itself shows names as titles ("SmolLM2 135M"); here they stay as
they are written, so that they can be found again. ``general.sampling.*`` are what llama.cpp's
programs take where a user says nothing.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from edgekit import versions
from edgekit.model.card import SamplingDefaults, hub_id


if TYPE_CHECKING:
    from edgekit.formats.gguf.layout import Value
    from edgekit.model.checkpoint_protocol import CheckpointProtocol


_HUB = "https://huggingface.co"


def write(checkpoint: "CheckpointProtocol") -> dict[str, "Value"]:
    """Return the keys: licence, parents, datasets, languages, tags, sampling, and who made it."""
    card = checkpoint.card
    keys: dict[str, Value] = {"general.quantized_by": ("string", f"edgekit {versions.EDGEKIT}")}
    texts = {
        "general.license": checkpoint.licence,
        "general.license.name": card.licence_name,
        "general.license.link": card.licence_link,
        "general.finetune": checkpoint.adapter and checkpoint.adapter.name,
    }
    keys |= {key: ("string", text) for key, text in texts.items() if text}
    # A checkpoint decoded from a GGUF file names itself.
    parents = [name for name in card.base_models if name != checkpoint.name]
    keys |= _sources("general.base_model", parents, site=_HUB)
    keys |= _sources("general.dataset", card.datasets, site=f"{_HUB}/datasets")
    lists = {"general.tags": card.tags, "general.languages": card.languages}
    keys |= {key: ("array[string]", list(items)) for key, items in lists.items() if items}
    return keys | dict(_sampling(checkpoint.sampling))


def _sources(prefix: str, names: Sequence[str], *, site: str) -> dict[str, "Value"]:
    """Return a count, and for each source what its name tells: ``organization/name``, or a URL."""
    keys: dict[str, Value] = {f"{prefix}.count": ("uint32", len(names))} if names else {}
    for index, name in enumerate(names):
        texts = _source(name.rstrip("/"), site)
        keys |= {f"{prefix}.{index}.{field}": ("string", text) for field, text in texts.items()}
    return keys


def _source(name: str, site: str) -> dict[str, str]:
    is_url = name.startswith(("https://", "http://"))
    found = hub_id(name.removeprefix(f"{site}/") if is_url else name)
    if found is None:
        return {"repo_url": name} if is_url else {"name": name.rpartition("/")[2]}
    organization, own = found
    return {"name": own, "organization": organization, "repo_url": f"{site}/{organization}/{own}"}


def _sampling(defaults: SamplingDefaults) -> Iterator[tuple[str, "Value"]]:
    numbers = {
        "temp": defaults.temperature,
        "top_p": defaults.top_p,
        "min_p": defaults.min_p,
        "penalty_repeat": defaults.repetition_penalty,
    }
    if defaults.top_k is not None:
        yield "general.sampling.top_k", ("int32", defaults.top_k)
    for name, number in numbers.items():
        if number is not None:
            yield f"general.sampling.{name}", ("float32", number)
