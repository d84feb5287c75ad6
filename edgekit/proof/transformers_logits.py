"""What the checkpoint itself says: transformers in float32, an adapter next to the base.

Everything an artifact is compared with comes from here, and nothing here shares code with what
makes artifacts.
"""

import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekit import installed, scratch
from edgekit.errors import MissingDependencyError
from edgekit.progress import Listener, Silent
from edgekit.proof import interpreter, mlx_adapters, transformers_model
from edgekit.runtime.silence import silence
from edgekit.source import families, transformers_tokenizer
from edgekit.source.adapters import by_peft
from edgekit.source.adapters.text import brings_vocabulary
from edgekit.source.checkpoint import AdapterRecord, Checkpoint
from edgekit.text.template import AS_IT_IS, Message, TemplateCall, as_parts


if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


def require() -> None:
    """Check that a proof is possible here, before slow work.

    Raises:
        MissingDependencyError: If torch or transformers is not installed.
    """
    installed.require(
        "torch", "transformers", purpose="a proof", extra="gguf",
        otherwise="export with --no-verify",
    )  # fmt: skip


def require_for(checkpoint: Checkpoint) -> None:
    """Check that this checkpoint's word can be had here.

    Raises:
        MissingDependencyError: If it is quantized and what quantized it is not installed.
    """
    if checkpoint.quantization and installed.missing("bitsandbytes"):
        raise MissingDependencyError(
            f"proving what {checkpoint.name} says needs bitsandbytes, which quantized it",
            hint="pip install bitsandbytes, or export with --no-verify",
        )


def logits(
    checkpoint: Checkpoint,
    chunks: Sequence[Sequence[int]],
    *,
    fits_in_memory: bool | None = None,
    listener: Listener | None = None,
) -> Iterator["npt.NDArray[np.float32]"]:
    """Return the logits after each token of each chunk: float32, shape ``(tokens, vocabulary)``.

    Where transformers cannot hold the model, `reference` computes it layer by layer: an interpreter
    of its own, which the tests prove against transformers on every family. All layers are done
    when this returns, so that what is loaded next does not lie next to them in memory.

    Args:
        checkpoint: The model.
        chunks: Token ids.
        fits_in_memory: Whether transformers can hold it; None asks `holds`.
        listener: Is told how far the layers are.
    """
    if holds(checkpoint) if fits_in_memory is None else fits_in_memory:
        return _transformers_logits(checkpoint, chunks)
    total = len(checkpoint.spec.layers) * sum(map(len, chunks))
    with (listener or Silent()).track("read the checkpoint layer by layer", total) as advance:
        states = interpreter.hidden_states(checkpoint, chunks, advance=advance)
    return (interpreter.apply_head(checkpoint, x).numpy() for x in states)


def holds(checkpoint: Checkpoint) -> bool:
    """Tell whether transformers can hold a model in float32 in half of the memory that is free.

    It cannot hold one whose family another package brought and it does not know.
    """
    if families.origin(checkpoint.architecture) and not _knows(checkpoint.architecture):
        return False
    return 4 * checkpoint.parameters <= _free_memory_bytes() // 2


def _knows(model_type: str) -> bool:
    from transformers import CONFIG_MAPPING

    return model_type in CONFIG_MAPPING


def _free_memory_bytes() -> int:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:  # not Linux: take what there is
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def _transformers_logits(
    checkpoint: Checkpoint, chunks: Sequence[Sequence[int]]
) -> Iterator["npt.NDArray[np.float32]"]:
    import torch

    with silence():  # torchao, which is imported with the model, talks
        model = _model(checkpoint)
    for chunk in chunks:
        with torch.inference_mode():
            rows = model(input_ids=torch.tensor([chunk]), use_cache=False).logits[0]
        yield rows[:, : checkpoint.spec.vocab_size].float().numpy()


def _model(checkpoint: Checkpoint) -> Any:
    import torch

    require_for(checkpoint)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it misses kernels nobody needs here
    model = transformers_model.load(_transformers(), checkpoint)
    if checkpoint.quantization:  # its own layers compute in the type of training, often bfloat16
        model = model.dequantize().to(torch.float32)
    if checkpoint.adapter:
        model = _with_adapter(
            model,
            checkpoint.adapter,
            vocabulary=checkpoint.spec.vocab_size,
            model_type=checkpoint.architecture,
        )
    return model.eval()


def _with_adapter(model: Any, adapter: AdapterRecord, *, vocabulary: int, model_type: str) -> Any:
    """Put an adapter next to a model; those that came before it are part of what it saw."""
    if adapter.earlier:
        model = _with_adapter(model, adapter.earlier, vocabulary=vocabulary, model_type=model_type)
        is_hooked = adapter.earlier.is_of_mlx
        model = mlx_adapters.bake(model) if is_hooked else _merged_by_peft(model)
    if model.get_input_embeddings().weight.shape[0] != vocabulary:
        model.resize_token_embeddings(vocabulary, mean_resizing=False)
    if adapter.is_of_mlx:
        return mlx_adapters.put_next_to(model, adapter.directory, model_type=model_type)
    return _with_peft(model, adapter)


def _merged_by_peft(model: Any) -> Any:
    """Return a model with its adapter merged; embedding and head are what they answered before.

    Where they are tied, peft 0.21 merges what is meant for one of them into both.
    """
    import torch

    with torch.inference_mode():
        ends = [mlx_adapters.weight_of(model.get_input_embeddings(), is_lookup=True),
                mlx_adapters.weight_of(model.get_output_embeddings(), is_lookup=False)]  # fmt: skip
    merged = model.merge_and_unload()
    embedding, head = (torch.nn.Parameter(it.clone(), requires_grad=False) for it in ends)
    merged.config.tie_word_embeddings &= torch.allclose(embedding, head)
    plain = torch.nn.Linear(*reversed(head.shape), bias=False)  # peft may leave a wrapper behind
    plain.weight = embedding if merged.config.tie_word_embeddings else head
    merged.get_input_embeddings().weight = embedding
    merged.set_output_embeddings(plain)
    return merged


def _with_peft(model: Any, adapter: AdapterRecord) -> Any:
    try:
        import peft
    except ImportError as error:
        raise MissingDependencyError(
            f"proving an adapter needs peft ({error})", hint="pip install 'edgekit[gguf]'"
        ) from error
    with warnings.catch_warnings(), scratch.directory("peft") as place:
        # peft 0.19 asks models for a name that transformers 5 deprecates.
        warnings.simplefilter("ignore", FutureWarning)
        directory = adapter.directory
        if adapter.renamed is not None or adapter.changes is not None:
            directory, changes = place, adapter.changes or {}
            renamed = adapter.renamed or {}
            by_peft.write_as_peft_would(
                adapter.directory, directory, renamed=renamed, changes=changes
            )
        kinds = getattr(model.config, "layer_types", None)
        found = peft.PeftModel.from_pretrained(model, directory)
    if kinds and (runs := getattr(found.active_peft_config, "layer_replication", None)):
        # peft repeats the layers and leaves the list of their kinds as it was.
        found.config.layer_types = [kinds[it] for first, end in runs for it in range(first, end)]
    return found


def tokenizer(checkpoint: Checkpoint) -> Any:
    """Return transformers' tokenizer of the checkpoint, or of its adapter if that brings one.

    Where AutoTokenizer cannot read the files, it is one made of tokenizer.json alone.
    """
    text = checkpoint.text
    if transformers_tokenizer.ask(text).failure:
        return _transformers().PreTrainedTokenizerFast(
            tokenizer_file=str(text.tokenizer_json), **text.special_tokens
        )
    return _auto_tokenizer(text.tokenizer_json.parent)


def adapter_tokenizer(checkpoint: Checkpoint) -> Any | None:
    """Return transformers' tokenizer of the adapter's own files.

    None if it brings no vocabulary, or one that transformers cannot read without the base.
    """
    record = checkpoint.adapter
    while record is not None and not brings_vocabulary(record.directory):
        record = record.earlier
    if record is None:
        return None
    try:
        return _auto_tokenizer(record.directory)
    except (ValueError, OSError, KeyError):
        return None


def _auto_tokenizer(directory: Path) -> Any:
    return _transformers().AutoTokenizer.from_pretrained(
        directory, local_files_only=True, trust_remote_code=False
    )


def file_ids(checkpoint: Checkpoint, texts: Sequence[str]) -> list[list[int]]:
    """Return the ids of texts as the tokenizers library reads the checkpoint's tokenizer.json.

    Special tokens are parsed and none added.
    """
    import tokenizers

    reader = tokenizers.Tokenizer.from_file(str(checkpoint.text.tokenizer_json))
    reader.no_truncation()
    reader.no_padding()
    return [it.ids for it in reader.encode_batch(list(texts), add_special_tokens=False)]


def ids(tokenizer: Any, text: str) -> list[int]:
    """Return the ids of a text in transformers, special tokens parsed and none added."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def rendered(
    tokenizer: Any, messages: Sequence[Message], *, template: str, call: TemplateCall = AS_IT_IS
) -> str:
    """Return a conversation as the chat template writes it, ready for the answer.

    Args:
        tokenizer: What `tokenizer` returned.
        messages: The conversation, contents as text.
        template: As its author wrote it.
        call: What it gets besides the conversation.
    """
    return str(
        tokenizer.apply_chat_template(
            [dict(message) for message in as_parts(messages, call.content_parts)],
            chat_template=template,
            tokenize=False,
            add_generation_prompt=True,
            **{name: [] for name in call.empty_lists},
            **call.variables,
        )
    )


def _transformers() -> Any:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers
