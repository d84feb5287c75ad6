"""A `DecoderSpec` as a graph of ONNX operators: one function for each thing a decoder does.

Standard operators, but for some of ONNX Runtime's own: ``GroupQueryAttention`` keeps the cache and
knows windows and caps, ``MatMulNBits`` multiplies with quantized weights, ``RotaryEmbedding``
rotates a part of every head, ``SimplifiedLayerNormalization`` is the RMS norm. ``FusedMatMul``,
or ``Gemm`` where it must run on WebGPU, takes other weights as a checkpoint has them (rows out,
columns in), so that an embedding can be the head too. Cosines are computed for the positions at
hand, so there is no table that ends, and from sums and products, which every device computes alike.

``GroupQueryAttention`` wants each row of a batch to begin at the first column, and most clients
fill shorter prompts up on the left. So rows are turned to where it wants them, and logits back:
tokens that are none end behind a row's own, where it sees none of them and later ones take their
place. States have no places: see `recurrence`.
"""

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from edgekit.formats.onnx import experts, recurrence, tensor_types
from edgekit.formats.onnx.experts import ExpertsOfLayer
from edgekit.formats.onnx.model import CONTRIB, Constant, Dtype, Node, OnnxGraph, Port
from edgekit.formats.onnx.operators import FLOAT16, FLOAT32, INT32, TO_THE_END, Operators
from edgekit.formats.onnx.recurrence import DeltaInputs, Recurrence, state_name
from edgekit.formats.onnx.tensor_types import GraphBuild
from edgekit.model.mixers import Attention, DeltaNet, QueryGrowth, ShortConv
from edgekit.model.norm import Norm
from edgekit.model.rope import Rope
from edgekit.model.spec import XIELU_BETA, DecoderSpec, LayerEmbedding


# Inputs with a value of their own: a client that knows nothing of them may leave them out.
FIRST_LOGIT = "first_logit"  # logits are wanted from this token of the input on
TEXT_TOKENS = "text_tokens"  # how long the text will be, if longer than what has been read

NEEDED_VERSION = "edgekit.onnxruntime"  # metadata: the first one that has all operators
ROPE_BORDER = "edgekit.rope_border_tokens"  # metadata: a longer text has other frequencies
# The first has 8 binary digits: float32 holds its products with whole numbers below 2 ** 16.
_PI_PARTS = (3.140625, math.pi - 3.140625)
_SMALLEST = 1e-30  # what divides may not be zero
# Of cos(x) and of sin(x) / x, by powers of x * x; up to a quarter turn they give all of float32.
_WAVE_TERMS = [
    ((-1) ** n / math.factorial(2 * n), (-1) ** n / math.factorial(2 * n + 1)) for n in range(7)
]


def cache_width(attention: Attention) -> int:
    """Return how wide a head is in the cache: the operator takes multiples of 8 only."""
    return -(-attention.head_dim // 8) * 8


def cache_name(layer: int | str, part: str, *, of: str = "past_key_values") -> str:
    """Return the name of the keys or values of a layer, as Optimum and its clients know them."""
    return f"{of}.{layer}.{part}"


def text_inputs(spec: DecoderSpec) -> dict[str, str]:
    """Return what a client says of a text, by name, with what each row has one of.

    Where there are states, the mask says the positions too: for models that have them, clients
    make three rows of ``position_ids``, as they do for pictures.
    """
    inputs = {"input_ids": "sequence_length", "attention_mask": "total_sequence_length"}
    return inputs if spec.has_states else inputs | {"position_ids": "sequence_length"}


def ropes(spec: DecoderSpec) -> list[Rope]:
    """Return the ropes that differ, in order of use."""
    return list(dict.fromkeys(layer.rope for layer in spec.layers if layer.rope))


def frequencies_name(rope: int, *, is_long: bool = False) -> str:
    """Return the tensor with the frequencies of the n-th rope."""
    return f"rope.{rope}.{'long_' if is_long else ''}frequencies"


def borders(spec: DecoderSpec) -> set[int]:
    """Return the borders of all ropes."""
    return {
        border
        for rope in ropes(spec)
        if (border := rope.original_max_position_embeddings) is not None
    }


def build(
    spec: DecoderSpec,
    tensor_types: Mapping[str, str],
    how: GraphBuild,
    *,
    metadata: Mapping[str, str],
) -> OnnxGraph:
    """Return the graph of a decoder whose weights are stored as ``tensor types`` says, by role."""
    graph = _Builder(spec=spec, tensor_types=tensor_types, how=how)
    graph.read_inputs()
    x = graph.embed()
    if spec.layer_embedding:
        graph.embed_layers(x, spec.layer_embedding)
    for index in range(len(spec.layers)):
        x = graph.end_layer(graph.apply_layer(x, index), index)
    graph.make_logits(x)
    found, border = dict(metadata), spec.original_max_position_embeddings
    if border is not None:
        found[ROPE_BORDER] = str(border)
    if spec.has_states:
        found[NEEDED_VERSION] = recurrence.FIRST_VERSION
    if spec.has_experts:
        found[NEEDED_VERSION] = experts.needed_version(spec, tensor_types)
    return OnnxGraph(
        nodes=tuple(graph.nodes),
        constants=tuple(graph.constants.values()),
        inputs=tuple(graph.inputs),
        outputs=tuple(graph.outputs),
        metadata=found,
    )


@dataclass(kw_only=True)
class _Builder(Operators):
    """Collects the graph."""

    spec: DecoderSpec
    tensor_types: Mapping[str, str]
    inputs: list[Port] = field(default_factory=list)
    outputs: list[Port] = field(default_factory=list)
    rotations: dict[Rope, tuple[str, str, str]] = field(
        default_factory=dict
    )  # indices, cosine, sine
    query_growths: dict[QueryGrowth, str] = field(
        default_factory=dict
    )  # (batch, tokens, 1): what multiplies the queries of each token
    input_ids: str = ""  # int64 (batch, tokens): each row from its first token on
    position_ids: str = ""  # the same
    recurrence: Recurrence = field(init=False)  # where there are states
    layer_inputs: str = ""  # float32 (batch, tokens, layers, width): what each has an embedding for
    new_tokens: dict[int, tuple[str, str]] = field(
        default_factory=dict
    )  # keys and values, by layer
    rows_back: str = ""  # int64 (batch, tokens): where each token of the input went, of all rows
    last_tokens: str = ""  # int32 (batch,): the index of each row's last token
    all_tokens: str = ""  # int32: how many tokens there are, cached ones included
    batch_and_tokens: str = ""  # int64 (2,): of what is computed at present
    shapes: dict[int, str] = field(default_factory=dict)  # batch, tokens and columns, by the last

    def read_inputs(self) -> None:
        self._name_inputs()
        self._turn_rows()
        self._begin(self.input_ids)
        ones = self.op("ReduceSum", "attention_mask", self.constant(1), keepdims=0)
        last = self.op("Sub", ones, self.scalar(1, dtype="int64"))
        self.last_tokens = self.op("Cast", last, to=INT32)
        total = self.op("Shape", "attention_mask", start=1, end=2)
        total = self.op("Squeeze", total)
        self.all_tokens = self.op("Cast", total, to=INT32)
        for number, rope in enumerate(ropes(self.spec)):
            self.rotations[rope] = self._rotation(rope, self._frequencies(number, rope, total))
        for _, _, attention in self.spec.attentions():
            growth = attention.query_growth
            if growth and growth not in self.query_growths:
                self.query_growths[growth] = self._growth(growth)

    def _turn_rows(self) -> None:
        """Let each row begin with its first token, wherever the mask says that this is."""
        zero, one = self.scalar(0, dtype="int64"), self.scalar(1, dtype="int64")
        count = self.op("Shape", "input_ids", start=1, end=2)
        mask = self.op(
            "Slice", "attention_mask", self.op("Neg", count), self.constant(TO_THE_END),
            self.constant(1),
        )  # fmt: skip
        filled = self.op("ArgMax", mask, axis=1, keepdims=1)  # the first of the ones
        columns = self.op("Squeeze", count)
        steps = self.op("Range", zero, columns, one)
        turned = self.op("Mod", self.op("Add", steps, filled), count)
        self.input_ids = self.op("GatherElements", "input_ids", turned, axis=1)
        if self.spec.has_states:
            self._count_tokens(mask, turned, steps)
        else:
            self.position_ids = self.op("GatherElements", "position_ids", turned, axis=1)
        firsts = self.op("Range", zero, self.op("Size", "input_ids"), columns)
        back = self.op("Mod", self.op("Sub", steps, filled), count)
        self.rows_back = self.op("Add", back, self.op("Unsqueeze", firsts, self.constant(1)))

    def _count_tokens(self, mask: str, turned: str, steps: str) -> None:
        """Tell tokens from what is none, and number them."""
        axis, turned_mask = self.constant(1), self.op("GatherElements", mask, turned, axis=1)
        counts = self.op("ReduceSum", mask, axis, keepdims=1)
        marks = self.op("Unsqueeze", self.op("Cast", turned_mask, to=FLOAT32), self.constant(-1))
        self.recurrence = Recurrence(graph=self, counts=counts, marks=marks)
        read = self.op("Sub", self.op("ReduceSum", "attention_mask", axis, keepdims=1), counts)
        self.position_ids = self.op("Add", read, steps)

    def _name_inputs(self) -> None:
        """Declare inputs with Optimum's names, of sizes too: transformers.js reads those."""
        for name, tokens in text_inputs(self.spec).items():
            self.inputs.append(Port(name=name, dtype="int64", shape=("batch_size", tokens)))
        for index, state, sizes in self.spec.states():
            for of, ports in (("past", self.inputs), ("present", self.outputs)):
                name = state_name(index, state, of=of)
                ports.append(Port(name=name, dtype="float32", shape=("batch_size", *sizes)))
        for index, _, a in self.spec.caches():
            for part in ("key", "value"):
                shape = ("batch_size", a.num_kv_heads, "past_sequence_length", cache_width(a))
                name = cache_name(index, part)
                self.inputs.append(Port(name=name, dtype=self.how.arithmetic, shape=shape))
        self._optional_input(FIRST_LOGIT)
        if borders(self.spec):
            self._optional_input(TEXT_TOKENS)

    def _optional_input(self, name: str) -> None:
        self.inputs.append(Port(name=name, dtype="int64", shape=(1,)))
        self.constants[name] = Constant(name=name, dtype="int64", shape=(1,), values=(0,))

    def _frequencies(self, number: int, rope: Rope, total: str) -> str:
        border = rope.original_max_position_embeddings
        if border is None:
            return frequencies_name(number)
        tokens = self.op("Max", total, TEXT_TOKENS)
        is_long = self.op("Greater", tokens, self.scalar(border, dtype="int64"))
        names = (frequencies_name(number, is_long=True), frequencies_name(number))
        return self.op("Where", is_long, *names)

    def _rotation(self, rope: Rope, frequencies: str) -> tuple[str, str, str]:
        """Return a row of cosines and of sines for every token, and the index of its row."""
        positions = self.op("Cast", self.position_ids, to=FLOAT32)
        column = self.op("Reshape", positions, self.constant(-1, 1))
        angles = self.op("Mul", column, frequencies)
        waves = self._waves(angles)
        if rope.attention_factor != 1:
            factor = self.scalar(rope.attention_factor)
            waves = [self.op("Mul", wave, factor) for wave in waves]
        cosine, sine = map(self.narrowed, waves)
        count = self.op("Size", self.position_ids)
        zero, one = self.scalar(0, dtype="int64"), self.scalar(1, dtype="int64")
        indices = self.op("Range", zero, count, one)
        indices = self.op("Reshape", indices, self.op("Shape", self.position_ids))
        return indices, cosine, sine

    def _growth(self, growth: QueryGrowth) -> str:
        """Return what multiplies queries; half a token more, lest rounding choose the step."""
        positions = self.op("Cast", self.position_ids, to=FLOAT32)
        positions = self.op("Add", positions, self.scalar(0.5))
        steps = self.op("Floor", self.op("Mul", positions, self.scalar(1 / growth.step_tokens)))
        one = self.scalar(1)
        log = self.op("Log", self.op("Add", steps, one))
        grown = self.op("Add", self.op("Mul", log, self.scalar(growth.rate)), one)
        return self.narrowed(self.op("Unsqueeze", grown, self.constant(-1)))

    def _waves(self, angles: str) -> list[str]:
        """Return cosine and sine of angles, from the series of both for half of each angle.

        WebGPU's own functions promise 2**-11 within half a turn, and beyond it nothing.
        """
        half = self._without_half_turns(self.op("Mul", angles, self.scalar(0.5)))
        square = self.op("Mul", half, half)
        *terms, both = (self._pair(*pair) for pair in _WAVE_TERMS)
        for term in reversed(terms):
            both = self.op("Add", self.op("Mul", both, square), term)
        cosine, ratio = (
            self.op("Gather", both, self.scalar(index, dtype="int64"), axis=0) for index in (0, 1)
        )
        sine = self.op("Mul", ratio, half)
        twice = self.op("Add", sine, sine)
        one = self.scalar(1)
        return [self.op("Sub", one, self.op("Mul", twice, sine)), self.op("Mul", twice, cosine)]

    def _without_half_turns(self, angles: str) -> str:
        """Return angles between two quarter turns, whose cosine and sine have one sign changed."""
        share = self.op("Mul", angles, self.scalar(1 / math.pi))
        count = self.op("Floor", self.op("Add", share, self.scalar(0.5)))
        for part in _PI_PARTS:
            angles = self.op("Sub", angles, self.op("Mul", count, self.scalar(part)))
        return angles

    def _pair(self, first: float, second: float) -> str:
        """Return two numbers, each for a whole matrix."""
        name = f"float32_{first}_and_{second}"
        self.constants[name] = Constant(
            name=name, dtype="float32", shape=(2, 1, 1), values=(first, second)
        )
        return name

    def embed(self) -> str:
        role = "token_embedding"
        x = self._rows(role, self.input_ids, tables=[role])
        if self.spec.embedding_scale != 1:
            x = self.op("Mul", x, self.scalar(self.spec.embedding_scale))
        return x

    def embed_layers(self, x: str, own: LayerEmbedding) -> None:
        """Make what every layer is given of its own embedding; ``x`` is the usual one."""
        spec, role, shape = self.spec, "layer_embedding", (len(self.spec.layers), own.width)
        by_layer = self.constant(0, 0, *shape)
        seen = self._multiply_sum(f"{role}_projection", x, math.prod(shape), spec.hidden_size)
        seen = self.op("Mul", seen, self.scalar(own.projection_scale))
        seen = self.op("Reshape", seen, by_layer)
        seen = self._normalize(spec.norm, f"{role}_norm", seen)
        tables = tensor_types.tables(
            role, (own.vocab_size, math.prod(shape)), self.tensor_types[role],
            part_columns=own.width,
        )  # fmt: skip
        looked_up = self._rows(role, self.input_ids, tables=tables)
        looked_up = self.op("Mul", looked_up, self.scalar(own.scale))
        both = self.op("Add", seen, self.op("Reshape", looked_up, by_layer))
        self.layer_inputs = self.op("Mul", both, self.scalar(own.sum_scale))

    def _gather(self, tables: Iterable[str], ids: str, *, part: str = "") -> str:
        """Return the same rows of all tables, side by side, of one of their tensors."""
        found = [self.op("Gather", table + part, ids) for table in tables]
        return found[0] if len(found) == 1 else self.op("Concat", *found, axis=2)

    def _rows(self, role: str, ids: str, *, tables: Collection[str]) -> str:
        """Return rows of a matrix in float32, and leave the others as they are stored."""
        rows, stored = self._gather(tables, ids), self.tensor_types[role]
        if stored in tensor_types.FLOATS:
            return self._exact(rows, tensor_types.FLOATS[stored])
        blocks = tensor_types.BLOCKS[stored]
        # (batch, tokens, blocks, bytes) -> (batch, tokens, blocks, codes)
        codes = self._codes(rows, blocks.bits, self.constant(0, 0, -1, blocks.weights))
        if blocks.implied_zero is None:
            packed = self._gather(tables, ids, part=tensor_types.ZERO_POINTS)
            zeros = self._codes(packed, blocks.bits, self.constant(0, 0, -1, 1))
        else:
            zeros = self.scalar(blocks.implied_zero)
        scales = self._exact(self._gather(tables, ids, part=tensor_types.SCALES), blocks.scales)
        scales = self.op("Unsqueeze", scales, self.constant(-1))
        values = self.op("Mul", self.op("Sub", codes, zeros), scales)
        return self.op("Reshape", values, self.constant(0, 0, -1))

    def _exact(self, x: str, dtype: Dtype) -> str:
        return x if dtype == "float32" else self.op("Cast", x, to=FLOAT32)

    def _codes(self, packed: str, bits: int, shape: str) -> str:
        """Return codes as float32; of two in a byte, the first is in its lower half."""
        if bits == 4:
            axis = self.constant(-1)
            low = self.op("BitwiseAnd", packed, self.scalar(15, dtype="uint8"))
            high = self.op("BitShift", packed, self.scalar(4, dtype="uint8"), direction="RIGHT")
            halves = (self.op("Unsqueeze", half, axis) for half in (low, high))
            packed = self.op("Concat", *halves, axis=-1)
        return self.op("Cast", self.op("Reshape", packed, shape), to=FLOAT32)

    def apply_layer(self, x: str, index: int) -> str:
        prefix = f"layers.{index}."
        read = self._read(prefix + "attention_norm", x)
        mixed = self._added(prefix + "attention_post_norm", self._mix(read, index))
        if self.spec.residual == "parallel":
            changed = self._added(prefix + "mlp_post_norm", self._apply_mlp(prefix, read, index))
            return self.op("Add", self.op("Add", x, mixed), changed)
        x = self.op("Add", x, mixed)
        read = self._read(prefix + "mlp_norm", x)
        changed = self._added(prefix + "mlp_post_norm", self._apply_mlp(prefix, read, index))
        return self.op("Add", x, changed)

    def end_layer(self, x: str, index: int) -> str:
        """Add what the layer's own embedding brings and scale the sum, in decoders that do."""
        spec, prefix = self.spec, f"layers.{index}."
        if own := spec.layer_embedding:
            gate = self._multiply_sum(f"{prefix}layer_gate", x, own.width, spec.hidden_size)
            given = self.op("Gather", self.layer_inputs, self.scalar(index, dtype="int64"), axis=2)
            given = self.op("Mul", self._activate(prefix, gate), given)
            added = self._multiply_sum(f"{prefix}layer_output", given, spec.hidden_size, own.width)
            x = self.op("Add", x, self._normalize(spec.norm, f"{prefix}layer_norm", added))
        return self.op("Mul", x, f"{prefix}layer_scale") if spec.has_layer_scales else x

    def _read(self, role: str, x: str) -> str:
        """Return what attention or the MLP reads of the sum over all layers."""
        return self.narrowed(
            self._normalize(self.spec.norm, role, x) if self.spec.has_pre_norms else x
        )

    def _added(self, role: str, x: str) -> str:
        """Return what is added to that sum of what they make."""
        x = self.widened(x)
        return self._normalize(self.spec.norm, role, x) if self.spec.has_post_norms else x

    def make_logits(self, x: str) -> str:
        spec = self.spec
        wanted = (FIRST_LOGIT, self.constant(TO_THE_END), self.constant(1))
        rows = self.op("Slice", self.rows_back, *wanted)
        x = self.op("Reshape", x, self.constant(-1, spec.hidden_size))
        x = self.op("Gather", x, rows)
        self._begin(x)
        x = self.narrowed(self._normalize(spec.norm, "final_norm", x))
        role = "token_embedding" if spec.is_tied else "output_head"
        shape = ("batch_size", "sequence_length", spec.vocab_size)
        port = Port(name="logits", dtype="float32", shape=shape)
        self.outputs.insert(0, port)
        logits = self.widened(self._multiply(role, x, spec.vocab_size, spec.hidden_size))
        if spec.has_head_bias:
            role = "output_head_bias"
            bias = self._exact(role, tensor_types.FLOATS[self.tensor_types[role]])
            logits = self.op("Add", logits, bias)
        if spec.final_logit_softcap is not None:
            cap = self.scalar(spec.final_logit_softcap)
            logits = self.op("Mul", self.op("Tanh", self.op("Div", logits, cap)), cap)
        last = self.nodes.pop()
        self.nodes.append(
            Node(op=last.op, inputs=last.inputs, outputs=(port.name,), domain=last.domain,
                 attributes=last.attributes)
        )  # fmt: skip
        return port.name

    def _normalize(self, norm: Norm, role: str, x: str, *, weight: str = "") -> str:
        """Normalize the last axis; Gemma's weights are stored with the one already added."""
        bias = (f"{role}_bias",) if norm.has_bias else ()
        epsilon = float(norm.epsilon)
        if norm.kind == "layer":
            ins = (x, weight or role, *bias)
            return self.op("LayerNormalization", *ins, axis=-1, epsilon=epsilon)
        x = self.op(
            "SimplifiedLayerNormalization", x, weight or role,
            axis=-1, epsilon=epsilon, stash_type=FLOAT32,
        )  # fmt: skip
        return self.op("Add", x, *bias) if bias else x

    def _mix(self, x: str, index: int) -> str:
        mixer = self.spec.mixer(index)
        match mixer:
            case Attention():
                return self._attend(x, index, mixer)
            case ShortConv():
                return self._convolve(x, index, mixer)
            case DeltaNet():
                return self._apply_delta(x, index, mixer)

    def _convolve(self, x: str, index: int, mixer: ShortConv) -> str:
        prefix, hidden, has_bias = f"layers.{index}.", self.spec.hidden_size, mixer.has_bias
        made = self.widened(self._project(prefix + "conv_in", x, 3 * hidden, hidden, has_bias))
        mixed = self.narrowed(self.recurrence.short_conv(made, index, mixer, hidden))
        return self._project(prefix + "conv_output", mixed, hidden, hidden, has_bias)

    def _apply_delta(self, x: str, index: int, mixer: DeltaNet) -> str:
        prefix, hidden, heads = f"layers.{index}.delta_", self.spec.hidden_size, mixer.value_heads
        made = {
            name: self.widened(self._multiply(prefix + name, x, count, hidden))
            for name, count in (("qkv", mixer.channels), ("gate", mixer.value_width))
        } | {
            name: self.widened(self._multiply_few(prefix + name, x, heads, hidden))
            for name in ("beta", "alpha")
        }
        mixed = self.recurrence.delta_net(DeltaInputs(**made), index, mixer)
        return self._multiply(prefix + "output", self.narrowed(mixed), hidden, mixer.value_width)

    def _normalize_heads(self, role: str, x: str, a: Attention, heads: int) -> str:
        norm, width = a.query_key_norm, a.head_dim
        if norm is None:
            return x
        if a.head_norms == "together":
            return self.narrowed(self._normalize(norm, role, self.widened(x)))
        x = self.op("Reshape", self.widened(x), self.constant(0, 0, heads, width))
        if a.head_norms == "apart":  # a row of weights for each head, which the operator cannot
            plain = Norm(kind=norm.kind, epsilon=norm.epsilon)
            x = self.op("Mul", self._normalize(plain, role, x, weight=self._ones(width)), role)
            x = self.op("Add", x, f"{role}_bias") if norm.has_bias else x
        else:
            x = self._normalize(norm, role, x)
        return self.narrowed(self.op("Reshape", x, self.constant(0, 0, heads * width)))

    def _ones(self, width: int) -> str:
        return self.constant(*(1,) * width, dtype="float32")

    def _attend(self, x: str, index: int, a: Attention) -> str:
        prefix, hidden = f"layers.{index}.", self.spec.hidden_size
        query = self._project(prefix + "query", x, a.query_rows, hidden, a.has_qkv_bias)
        query, gate = self._without_gate(query, index, a)
        made, value = {"query": query}, ""
        if a.has_cache:
            made["key"], value = self._keys_and_values(prefix, x, a)
        made = self._position(made, index, a)
        query = made["query"]
        if a.query_growth:
            query = self.op("Mul", query, self.query_growths[a.query_growth])
        query = self._widen(query, a, a.heads)
        if a.has_cache:
            new = (self._widen(part, a, a.num_kv_heads) for part in (made["key"], value))
            self.new_tokens[index] = next(new), next(new)
        mixed = self._weigh(query, index, a)
        if gate:
            mixed = self.op("Mul", mixed, self.op("Sigmoid", gate))
        if a.has_head_gate:
            mixed = self._gate_heads(
                mixed, self._multiply(prefix + "head_gate", x, a.heads, hidden), a
            )
        return self._project(
            prefix + "attention_output", mixed, hidden, a.query_width, a.has_output_bias
        )

    def _without_gate(self, query: str, index: int, a: Attention) -> tuple[str, str]:
        """Return queries, and the gates that stand behind each head's; none: no name."""
        if not a.has_output_gate:
            return query, ""
        heads = self.op("Reshape", query, self.constant(0, 0, a.heads, 2 * a.head_dim))
        parts = (f"query_{index}", f"gate_{index}")
        self.op("Split", heads, self.constant(a.head_dim, a.head_dim), outputs=parts, axis=-1)
        flat = self.constant(0, 0, a.query_width)
        query, gate = (self.op("Reshape", part, flat) for part in parts)
        return query, gate

    def _gate_heads(self, mixed: str, gate: str, a: Attention) -> str:
        """Multiply what each head has mixed with one sigmoid."""
        gate = self.op("Unsqueeze", self.op("Sigmoid", gate), self.constant(-1))
        heads = self.op("Reshape", mixed, self.constant(0, 0, a.heads, a.head_dim))
        return self.op("Reshape", self.op("Mul", heads, gate), self.constant(0, 0, a.query_width))

    def _keys_and_values(self, prefix: str, x: str, a: Attention) -> tuple[str, str]:
        """Return keys before their norm and rope, and values."""
        made = [
            self._project(
                prefix + role, x, a.key_value_width, self.spec.hidden_size, a.has_qkv_bias
            )
            for role in (("key",) if a.values_are_keys else ("key", "value"))
        ]
        key, value = made[0], made[-1]
        if a.value_norm_epsilon is not None:
            norm = Norm(kind="rms", epsilon=a.value_norm_epsilon)
            by_head = self.constant(0, 0, a.num_kv_heads, a.head_dim)
            value = self.op("Reshape", self.widened(value), by_head)
            value = self._normalize(norm, "", value, weight=self._ones(a.head_dim))
            value = self.op("Reshape", value, self.constant(0, 0, a.key_value_width))
            value = self.narrowed(value)
        return key, value

    def _position(self, made: dict[str, str], index: int, a: Attention) -> dict[str, str]:
        """Normalize and rotate queries, and keys where the layer makes some."""
        heads = {"query": a.heads, "key": a.num_kv_heads}
        rope = self.spec.layers[index].rope

        def normalized() -> dict[str, str]:
            return {
                part: self._normalize_heads(f"layers.{index}.{part}_norm", x, a, heads[part])
                for part, x in made.items()
            }

        if not a.normalizes_after_rope:
            made = normalized()
        if rope:
            made = {part: self._rotate(rope, x, heads[part]) for part, x in made.items()}
        return normalized() if a.normalizes_after_rope else made

    def _rotate(self, rope: Rope, x: str, heads: int) -> str:
        indices, cosine, sine = self.rotations[rope]
        return self.op(
            "RotaryEmbedding", x, indices, cosine, sine,
            domain=CONTRIB, num_heads=heads, rotary_embedding_dim=rope.width,
        )  # fmt: skip

    def _weigh(self, query: str, index: int, a: Attention) -> str:
        """Mix values by how queries meet keys: the layer's own, or those an earlier one made.

        A later layer is given them as the earlier one was: what is cached, and the new ones. It
        returns both together, which nobody reads and which costs it a quarter of its time; but
        where that is left out, ONNX Runtime 1.27 to 1.30 crash, and older ones refuse the graph.
        """
        parts, source = ("key", "value"), index if a.cache_of is None else a.cache_of
        present = [cache_name(index, part, of="present") for part in parts]
        if a.has_cache:
            shape = ("batch_size", a.num_kv_heads, "present_sequence_length", cache_width(a))
            self.outputs += [Port(name=x, dtype=self.how.arithmetic, shape=shape) for x in present]
        mixed = self.op(
            "GroupQueryAttention", query, *self.new_tokens[source],
            *(cache_name(source, part) for part in parts), self.last_tokens, self.all_tokens,
            domain=CONTRIB,
            outputs=(f"mixed_{index}", *present),
            num_heads=a.heads,
            kv_num_heads=a.num_kv_heads,
            scale=float(a.softmax_scale),
            softcap=float(a.attn_logit_softcap or 0),
            local_window_size=self.spec.layers[index].window_tokens or -1,
        )  # fmt: skip
        return self._narrow(mixed, a)

    def _widen(self, x: str, a: Attention, heads: int) -> str:
        """Put zeros behind every head, which change no score and no sum."""
        width, wide = a.head_dim, cache_width(a)
        if width == wide:
            return x
        x = self.op("Reshape", x, self.constant(0, 0, heads, width))
        ends = self.constant(0, 0, 0, 0, 0, 0, 0, wide - width)
        return self.op("Reshape", self.op("Pad", x, ends), self.constant(0, 0, heads * wide))

    def _narrow(self, x: str, a: Attention) -> str:
        """Undo `_widen` for what was mixed."""
        wide = cache_width(a)
        if a.head_dim == wide:
            return x
        x = self.op("Reshape", x, self.constant(0, 0, a.heads, wide))
        ends = (self.constant(0), self.constant(a.head_dim), self.constant(-1))
        return self.op("Reshape", self.op("Slice", x, *ends), self.constant(0, 0, a.query_width))

    def _apply_mlp(self, prefix: str, x: str, index: int) -> str:
        spec, wide = self.spec, self.spec.mlp(index).intermediate_size
        if found := spec.mlp(index).experts:
            logits = self._project(prefix + "router", x, found.count, spec.hidden_size, False)
            mixing = ExpertsOfLayer(
                graph=self,
                experts=found,
                hidden_size=spec.hidden_size,
                intermediate_size=wide,
                tensor_type=self.tensor_types[prefix + "expert_down"],
            )
            return mixing.mix(prefix, x, logits)
        narrow, has_bias = spec.hidden_size, spec.has_mlp_bias
        if spec.is_gated:
            gate = self._project(prefix + "gate", x, wide, narrow, has_bias)
            up = self._project(prefix + "up", x, wide, narrow, has_bias)
            inner = self.op("Mul", self._activate(prefix, gate), up)
        else:
            up = self._project(prefix + "up", x, wide, narrow, has_bias)
            inner = self._activate(prefix, up)
        return self._project(prefix + "down", inner, narrow, wide, has_bias)

    def _activate(self, prefix: str, x: str) -> str:
        match self.spec.activation:
            case "silu":
                return self.op("Mul", x, self.op("Sigmoid", x))
            case "gelu_tanh":
                return self.op("Gelu", x, approximate="tanh")
            case "relu2":
                positive = self.op("Relu", x)
                return self.op("Mul", positive, positive)
            case "xielu":
                return self.narrowed(self._xielu(prefix, self.widened(x)))

    def _xielu(self, prefix: str, x: str) -> str:
        """Apply xIELU in float32, with the slopes as they are at load.

        Elu is expm1 below zero and x above, where its difference from x is none. Between the
        epsilon of xIELU and zero that differs by a millionth at most.
        """
        slopes = [self.op("Softplus", f"{prefix}xielu_{sign}") for sign in ("positive", "negative")]
        beta, positive = self.scalar(XIELU_BETA), self.op("Relu", x)
        above = self.op("Mul", self.op("Mul", positive, positive), slopes[0])
        curve = self.op("Sub", self.op("Elu", x), x)
        below = self.op("Mul", curve, self.op("Add", slopes[1], beta))
        return self.op("Add", self.op("Add", above, below), self.op("Mul", x, beta))

    def _project(self, role: str, x: str, rows: int, columns: int, has_bias: bool) -> str:
        product = self._multiply(role, x, rows, columns)
        if not has_bias:
            return product
        bias = self._as_factor(f"{role}_bias")
        return self.op("Add", product, bias)

    def _multiply(self, role: str, x: str, rows: int, columns: int) -> str:
        if self.tensor_types[role] in tensor_types.FLOATS:
            return self._multiply_unquantized(role, x, rows, columns)
        blocks = tensor_types.BLOCKS[self.tensor_types[role]]
        zeros = () if blocks.is_symmetric else (role + tensor_types.ZERO_POINTS,)
        return self.op(
            "MatMulNBits", x, role, role + tensor_types.SCALES, *zeros,
            domain=CONTRIB, K=columns, N=rows, bits=blocks.bits, block_size=blocks.weights,
            accuracy_level=self.how.accuracy_level,
        )  # fmt: skip

    def _multiply_sum(self, role: str, x: str, rows: int, columns: int) -> str:
        """Return a product in float32 of what no norm has bounded, and may outgrow float16."""
        if not self.how.is_half:
            return self._multiply(role, x, rows, columns)
        largest = self.op("ReduceMax", self.op("Abs", x), self.constant(-1), keepdims=1)
        largest = self.op("Add", largest, self.scalar(_SMALLEST))  # of nothing but zeros
        share = self.narrowed(self.op("Div", x, largest))
        return self.op("Mul", self.widened(self._multiply(role, share, rows, columns)), largest)

    def _multiply_unquantized(self, role: str, x: str, rows: int, columns: int) -> str:
        """Multiply as CPUs do with the least memory, or, in half precision, as WebGPU can."""
        weight = self._as_factor(role)
        if not self.how.is_half:
            return self.op("FusedMatMul", x, weight, domain=CONTRIB, transB=1)
        flat = self.op("Reshape", x, self.constant(-1, columns))
        return self.op("Reshape", self.op("Gemm", flat, weight, transB=1), self._shape(rows))

    def _multiply_few(self, role: str, x: str, rows: int, columns: int) -> str:
        """Multiply so that WebGPU can: with few rows, which are turned and held twice at load."""
        if self.tensor_types[role] not in tensor_types.FLOATS:
            return self._multiply(role, x, rows, columns)
        return self.op("MatMul", x, self.op("Transpose", self._as_factor(role), perm=(1, 0)))

    def _begin(self, x: str) -> None:
        """Take batch and tokens of ``x`` for those of all that follows."""
        if self.how.is_half:
            self.shapes.clear()
            self.batch_and_tokens = self.op("Shape", x, end=2)

    def _shape(self, columns: int) -> str:
        """Return batch, tokens and ``columns``, made once."""
        if columns not in self.shapes:
            ends = (self.batch_and_tokens, self.constant(columns))
            self.shapes[columns] = self.op("Concat", *ends, axis=0)
        return self.shapes[columns]

    def _as_factor(self, role: str) -> str:
        """Return a weight in the precision of products; the runtime converts it once, at load."""
        if tensor_types.FLOATS[self.tensor_types[role]] == self.how.arithmetic:
            return role
        return self.op("Cast", role, to=FLOAT16 if self.how.is_half else FLOAT32)
