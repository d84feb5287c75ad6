"""What a checkpoint says, in float32, for models larger than memory.

An interpreter of `DecoderSpec` in torch. All texts pass through layer 0, then through layer 1, so
the weights of one layer are in memory at a time; the output head is applied in blocks of rows.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, assert_never

from edgekit.errors import UsageError
from edgekit.formats import DecoderWeights
from edgekit.model.spec import (
    EXPERT_EPSILON,
    XIELU_BETA,
    XIELU_EPSILON,
    Activation,
    DecoderSpec,
    Experts,
    Mlp,
)
from edgekit.progress import Advance
from edgekit.proof.arithmetic import Weights, normalize, soften
from edgekit.proof.mixing import mix
from edgekit.runtime import reading


if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

    from edgekit.proof.arithmetic import Observer
    from edgekit.proof.mixing import Caches

HEAD_BLOCK_BYTES = 64 * 2**20  # rows of the output head in memory at a time


def logits(
    model: DecoderWeights, texts: Sequence[Sequence[int]]
) -> Iterator["npt.NDArray[np.float32]"]:
    """Yield the logits of each text, in order, of shape ``(tokens, vocabulary)``.

    One text's logits are in memory at a time, so keep texts short where the vocabulary is large:
    512 tokens of 152,000 words are 297 MiB.

    Raises:
        UsageError: If a text is empty, longer than the context, or has an unknown token id.
    """
    for states in hidden_states(model, texts):
        yield apply_head(model, states).numpy()


def hidden_states(
    model: DecoderWeights,
    texts: Sequence[Sequence[int]],
    *,
    observe: "Observer | None" = None,
    advance: Advance = lambda _: None,
) -> "list[torch.Tensor]":
    """Return what the output head reads: for each text float32 ``(tokens, hidden_size)``.

    Args:
        model: The decoder and its weights.
        texts: Token ids.
        observe: Called with the role of every matrix of a layer and what it is multiplied with,
            ``(tokens, columns)``, text by text.
        advance: Told how many tokens just passed through one layer.

    Raises:
        UsageError: As `logits`.
    """
    stream = Stream(model, texts)
    for index in range(len(model.spec.layers)):
        stream.pass_through(index, observe=observe, advance=advance)
    return stream.end()


class Stream:
    """All texts on their way through a decoder, layer by layer, in float32.

    Raises:
        UsageError: As `logits`.
    """

    def __init__(self, model: DecoderWeights, texts: Sequence[Sequence[int]]) -> None:
        import torch

        for text in texts:
            _refuse_text(model.spec, text)
        self._model = model
        with torch.inference_mode():
            self._states = [_embed(model, text) for text in texts]
            self._embedded = _embed_layers(model, texts, self._states)
        self._caches: list[Caches] = [{} for _ in texts]

    def pass_through(
        self, index: int, *, observe: "Observer | None" = None, advance: Advance = lambda _: None
    ) -> None:
        """Take all texts through a layer; the arguments are those of `hidden_states`."""
        for at, x in enumerate(self.layer(index, observe=observe)):
            self._states[at] = x
            advance(len(x))

    def look_through(
        self, index: int, *, observe: "Observer", advance: Advance = lambda _: None
    ) -> None:
        """Observe a layer at work, and leave all texts before it."""
        for x in self.layer(index, observe=observe):
            advance(len(x))

    def layer(self, index: int, *, observe: "Observer | None" = None) -> "Iterator[torch.Tensor]":
        """Yield what a layer makes of each text: float32 ``(tokens, hidden_size)``."""
        import torch

        spec = self._model.spec
        weights = Weights(self._model, prefix=f"layers.{index}.", observe=observe)
        for x, embedded, caches in zip(self._states, self._embedded, self._caches, strict=True):
            with torch.inference_mode():
                mixed = _apply_layer(spec, index, weights, x, caches)
                found = _end_layer(spec, index, weights, mixed, embedded)
            yield found

    def end(self) -> "list[torch.Tensor]":
        """Return what the output head reads: for each text float32 ``(tokens, hidden_size)``."""
        import torch

        final = Weights(self._model, prefix="")
        with torch.inference_mode():
            return [normalize(self._model.spec.norm, final, "final_norm", x) for x in self._states]


class InterpreterSession:
    """A model without a runtime, as a session: every call reads the whole text again.

    Weights stay in memory once read.
    """

    def __init__(self, model: DecoderWeights, *, context_tokens: int) -> None:
        self.vocabulary_tokens = model.spec.vocab_size
        self.context_tokens = context_tokens
        self._model = _Held(model)
        self._read: list[int] = []

    def prefill(self, ids: Sequence[int]) -> "npt.NDArray[np.float32]":
        """Read ``ids`` after what was read; return float32 ``(vocabulary_tokens,)`` logits.

        Raises:
            UsageError: If ``ids`` is empty, has an unknown id, or outgrows the context.
        """
        reading.refuse_empty(ids)
        reading.refuse(self, ids, cached_tokens=len(self._read))
        text = [*self._read, *ids]
        (states,) = hidden_states(self._model, [text])
        self._read = text
        found: npt.NDArray[np.float32] = apply_head(self._model, states[-1:]).numpy()[0]
        return found

    def decode(self, token: int) -> "npt.NDArray[np.float32]":
        """Read one token more; return float32 ``(vocabulary_tokens,)`` logits."""
        return self.prefill([token])

    def all_logits(self, ids: Sequence[int]) -> "npt.NDArray[np.float32]":
        """Read ``ids`` alone; return float32 ``(len(ids), vocabulary_tokens)`` logits."""
        reading.refuse(self, ids, cached_tokens=0)
        self._read = list(ids)
        return next(logits(self._model, [ids]))

    def rewind(self, tokens: int) -> bool:
        """Forget what was read after so many tokens; it always can."""
        del self._read[tokens:]
        return True

    def reset(self) -> None:
        """Forget what was read."""
        self._read = []

    def close(self) -> None:
        """Give the weights back."""
        self._model.forget()


class _Held:
    """A model whose weights are read once."""

    def __init__(self, model: DecoderWeights) -> None:
        self.spec = model.spec
        self._model = model
        self._kept: dict[str, npt.NDArray[np.float32]] = {}

    def weight(
        self, role: str, first_row: int = 0, rows: int | None = None
    ) -> "npt.NDArray[np.float32]":
        if role not in self._kept:
            self._kept[role] = self._model.weight(role)
        return self._kept[role][first_row : None if rows is None else first_row + rows]

    def forget(self) -> None:
        self._kept.clear()


def _refuse_text(spec: DecoderSpec, ids: Sequence[int]) -> None:
    if not 0 < len(ids) <= spec.context_tokens:
        raise UsageError(f"a text has {len(ids)} tokens, expected 1 to {spec.context_tokens}")
    if min(ids) < 0 or max(ids) >= spec.vocab_size:
        raise UsageError(
            f"a text has token id {min(ids) if min(ids) < 0 else max(ids)}, "
            f"the vocabulary has {spec.vocab_size}"
        )


def _embed(model: DecoderWeights, ids: Sequence[int]) -> "torch.Tensor":
    return _look_up(model, "token_embedding", ids) * model.spec.embedding_scale


def _look_up(model: DecoderWeights, role: str, ids: Sequence[int]) -> "torch.Tensor":
    """Return the rows of a table that a text needs, and read no others."""
    import torch

    rows = {id: model.weight(role, id, 1)[0] for id in set(ids)}
    return torch.stack([torch.from_numpy(rows[id]) for id in ids])


def apply_head(model: DecoderWeights, states: "torch.Tensor") -> "torch.Tensor":
    """Return float32 ``(tokens, vocab_size)`` logits, some rows of the head in memory at a time."""
    import torch

    spec = model.spec
    role = "token_embedding" if spec.is_tied else "output_head"
    block = max(1, HEAD_BLOCK_BYTES // (4 * spec.hidden_size))
    found = torch.empty(len(states), spec.vocab_size)
    for first in range(0, spec.vocab_size, block):
        rows = min(block, spec.vocab_size - first)
        head = torch.from_numpy(model.weight(role, first, rows))
        torch.matmul(states, head.T, out=found[:, first : first + rows])
    if spec.has_head_bias:
        found += torch.from_numpy(model.weight("output_head_bias"))
    return found if spec.final_logit_softcap is None else soften(found, spec.final_logit_softcap)


def _embed_layers(
    model: DecoderWeights, texts: Sequence[Sequence[int]], states: "Sequence[torch.Tensor]"
) -> "Sequence[torch.Tensor | None]":
    """Return what layers are given of their own embedding, by text: ``(tokens, layers, width)``."""
    from torch.nn import functional

    spec, own = model.spec, model.spec.layer_embedding
    if own is None:
        return [None] * len(texts)
    weights, by_layer, found = Weights(model, prefix=""), (len(spec.layers), own.width), []
    for ids, x in zip(texts, states, strict=True):
        looked_up = _look_up(model, "layer_embedding", ids) * own.scale
        seen = functional.linear(x, weights["layer_embedding_projection"]) * own.projection_scale
        seen = normalize(spec.norm, weights, "layer_embedding_norm", seen.unflatten(-1, by_layer))
        found.append((seen + looked_up.unflatten(-1, by_layer)) * own.sum_scale)
    return found


def _apply_layer(
    spec: DecoderSpec, index: int, weights: Weights, x: "torch.Tensor", caches: "Caches"
) -> "torch.Tensor":
    read = normalize(spec.norm, weights, "attention_norm", x) if spec.has_pre_norms else x
    mixed = mix(spec, index, weights, read, caches)
    if spec.has_post_norms:
        mixed = normalize(spec.norm, weights, "attention_post_norm", mixed)
    if spec.residual == "serial":
        x = x + mixed
        read = normalize(spec.norm, weights, "mlp_norm", x) if spec.has_pre_norms else x
    changed = _apply_mlp(spec, spec.mlp(index), weights, read)
    if spec.has_post_norms:
        changed = normalize(spec.norm, weights, "mlp_post_norm", changed)
    return x + changed if spec.residual == "serial" else x + mixed + changed


def _end_layer(
    spec: DecoderSpec,
    index: int,
    weights: Weights,
    x: "torch.Tensor",
    embedded: "torch.Tensor | None",
) -> "torch.Tensor":
    """Add the layer's own embedding, and scale all, in the decoders that do."""
    if embedded is not None:
        gate = _activate(spec.activation, weights, weights.project("layer_gate", x))
        added = weights.project("layer_output", gate * embedded[:, index])
        x = x + normalize(spec.norm, weights, "layer_norm", added)
    return x * weights["layer_scale"] if spec.has_layer_scales else x


def _apply_mlp(spec: DecoderSpec, mlp: Mlp, weights: Weights, x: "torch.Tensor") -> "torch.Tensor":
    if mlp.experts:
        return _apply_experts(spec, mlp.experts, weights, x)
    up = weights.project("up", x, has_bias=spec.has_mlp_bias)
    if spec.is_gated:
        gate = weights.project("gate", x, has_bias=spec.has_mlp_bias)
        activated = _activate(spec.activation, weights, gate) * up
    else:
        activated = _activate(spec.activation, weights, up)
    return weights.project("down", activated, has_bias=spec.has_mlp_bias)


def _apply_experts(
    spec: DecoderSpec, experts: Experts, weights: Weights, x: "torch.Tensor"
) -> "torch.Tensor":
    """Let each expert see the tokens that take it, and add up what they say of a token."""
    import torch

    scores = weights.project("router", x).sigmoid()
    biased = scores + weights["expert_bias"] if experts.has_bias else scores
    taken = biased.topk(experts.used, dim=-1).indices
    shares = scores.gather(-1, taken)
    if experts.normalizes:
        shares = shares / (shares.sum(-1, keepdim=True) + EXPERT_EPSILON)
    found = torch.zeros_like(x)
    for expert in taken.unique().tolist():
        tokens, places = torch.where(taken == expert)
        read = x[tokens]
        gate = weights.project("expert_gate", read, expert=expert)
        up = weights.project("expert_up", read, expert=expert)
        bent = _activate(spec.activation, weights, gate) * up
        made = weights.project("expert_down", bent, expert=expert)
        found.index_add_(0, tokens, made * shares[tokens, places, None])
    return found


def _activate(activation: Activation, weights: Weights, x: "torch.Tensor") -> "torch.Tensor":
    from torch.nn import functional

    match activation:
        case "silu":
            return functional.silu(x)
        case "gelu_tanh":
            return functional.gelu(x, approximate="tanh")
        case "relu2":
            return x.relu().square()
        case "xielu":
            return _xielu(x, weights["xielu_positive"], weights["xielu_negative"])
        case _:
            assert_never(activation)


def _xielu(x: "torch.Tensor", positive: "torch.Tensor", negative: "torch.Tensor") -> "torch.Tensor":
    import torch
    from torch.nn import functional

    rising = functional.softplus(positive) * x.square()
    below = x.clamp(max=XIELU_EPSILON).expm1() - x
    falling = (XIELU_BETA + functional.softplus(negative)) * below
    return torch.where(x > 0, rising, falling) + XIELU_BETA * x
