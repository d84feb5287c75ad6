"""What an ``adapter_config.json`` says, as far as it can change a weight.

An option that is set and that nothing here reads is a refusal: it may change what the model says.
The matching rules are PEFT's, because a module that is missed is an adapter that is half merged.

Source: ``check_target_module_exists`` in tuners/tuners_utils.py, ``get_pattern_key`` in
utils/other.py and ``LoraConfig`` in tuners/lora/config.py of peft 0.21.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgekit.encodings.files import is_file
from edgekit.encodings.json_files import read_object, read_object_if_there
from edgekit.errors import UsageError
from edgekit.source import places
from edgekit.source.adapters import by_peft
from edgekit.source.config import Config
from edgekit.source.names import USUAL, Naming


SUPPORTED = (
    "LoRA with rank and alpha patterns, rsLoRA, DoRA, biases, modules_to_save and "
    "trainable_token_indices, and what PEFT merges: AdaLoRA, LoHa, LoKr, IA3, OFT, BOFT, VeRA and "
    "others"
)
ALL_LINEAR = "all-linear"
_MOST = 2**31  # no rank and no alpha comes near
# What other kinds are called, apart from those that `by_peft` merges.
_OTHER_KINDS = {
    "ADAMSS": "AdaMSS", "BEFT": "BEFT", "FROD": "FRoD", "OSF": "OSF", "PSOFT": "PSOFT",
}  # fmt: skip
# These change no weight, so nothing merges them.
_NOT_WEIGHTS = {
    "ADAPTION_PROMPT": "adaption prompt", "CARTRIDGE": "cartridge", "CPT": "CPT", "LILY": "Lily",
    "MULTITASK_PROMPT_TUNING": "multitask prompt tuning", "POLY": "Poly",
    "PREFIX_TUNING": "prefix tuning", "PROMPT_TUNING": "prompt tuning", "P_TUNING": "p-tuning",
    "SHADOW": "Shadow", "XLORA": "X-LoRA",
}  # fmt: skip
_LORA, _TOKENS = "LORA", "TRAINABLE_TOKENS"
_REFUSED_OPTIONS = {
    "alora_invocation_tokens": "activated LoRA, which changes the weights within a text",
    "arrow_config": "Arrow, which chooses among adapters for each token",
    "kasa_config": "KaSA, which truncates the base",
    "megatron_config": "Megatron's parallel layers",
    "monteclora_config": "MonteCLoRA, which samples its weights",
    "use_bdlora": "block-diagonal LoRA",
    "use_mora": "MoRA",
    "use_qalora": "QA-LoRA, which pools the input of a quantized layer",
    "velora_config": "VeLoRA",
}
_UNMERGEABLE = ("alora_invocation_tokens", "arrow_config")  # not by PEFT either
# How training started: PEFT subtracts these from the base when it loads the adapter, so the file
# alone does not say what to add. Other ways to start leave an ordinary LoRA behind.
_EXACT_STARTS = ("pissa", "olora")  # what these subtract, the base alone says
_CHANGE_THE_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")
_READ = frozenset({
    "alpha_pattern", "base_model_name_or_path", "bias", "ensure_weight_tying", "exclude_modules",
    "init_lora_weights", "layer_replication", "layers_pattern", "layers_to_transform", "lora_alpha",
    "lora_bias", "modules_to_save", "peft_type", "r", "rank_pattern", "target_modules",
    "target_parameters", "task_type",
    "trainable_token_indices", "use_dora", "use_rslora",
})  # fmt: skip
_WITHOUT_EFFECT = frozenset({
    "auto_mapping", "corda_config", "eva_config", "inference_mode", "loftq_config", "lora_dropout",
    "lora_ga_config", "megatron_core", "peft_version", "qalora_group_size", "revision",
    "fan_in_fan_out",  # for layers that store columns as rows; on others PEFT takes it back
})  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class AdapterSettings:
    """A LoRA configuration, parsed and checked."""

    origin: str  # the file, for messages
    base_model: str
    rank: int
    alpha: float
    rank_pattern: Mapping[str, float]
    alpha_pattern: Mapping[str, float]
    target_modules: str | tuple[str, ...]  # a string is a pattern for the whole name
    exclude_modules: str | tuple[str, ...]
    layers: tuple[int, ...]  # none: all of them
    layers_pattern: tuple[str, ...]
    modules_to_save: tuple[str, ...]
    token_ids: Mapping[str, tuple[int, ...]]  # "" is the input embedding
    is_rank_stabilized: bool
    has_magnitudes: bool  # DoRA
    has_lora_bias: bool
    keeps_tie: bool
    target_parameters: tuple[str, ...] = ()
    replicated: tuple[tuple[int, int], ...] = ()  # layers of the base, first and end of each run
    start: str = ""  # pissa or olora, if that much of the base must be taken off
    kind: str = "LORA"  # as PEFT calls it
    is_of_mlx: bool = False  # a magnitude for each row of an embedding, and one layer if it is tied
    naming: Naming = USUAL  # modules are matched by the names they had in training

    @property
    def is_merged_by_peft(self) -> bool:
        """Tell whether its meaning is known to PEFT only."""
        return self.kind in by_peft.KINDS

    def targets(self, module: str, *, is_embedding: bool) -> bool:
        """Tell whether a module has a low-rank update; ``is_embedding`` includes the head."""
        if self.saves(module):
            return False
        module = self.naming.stored(module)
        if self._excludes(module):
            return False
        return self._names_parameter(module) or self._names(module, is_embedding=is_embedding)

    def _names_parameter(self, module: str) -> bool:
        parameter = f"{module}.weight"
        return any(parameter == it or parameter.endswith(f".{it}") for it in self.target_parameters)

    def _names(self, module: str, *, is_embedding: bool) -> bool:
        if self.target_modules == ALL_LINEAR:
            return not is_embedding
        if isinstance(self.target_modules, str):
            return re.fullmatch(self.target_modules, module) is not None
        if module in self.target_modules:
            return True
        named = any(module.endswith(f".{name}") for name in self.target_modules)
        return named and (not self.layers or self._layer_of(module) in self.layers)

    def saves(self, module: str) -> bool:
        """Tell whether a module is replaced as a whole."""
        module = self.naming.stored(module)
        return any(
            re.match(rf"(^|.*\.){name}($|\..*)", module) is not None
            for name in self.modules_to_save
        )

    def rank_of(self, module: str) -> int:
        """Return the rank of a module's update."""
        return int(_lookup(self.rank_pattern, self.naming.stored(module), self.rank))

    def alpha_of(self, module: str) -> float:
        """Return what a module's update is scaled by, before its rank is taken into account."""
        return _lookup(self.alpha_pattern, self.naming.stored(module), self.alpha)

    def scale_of(self, module: str) -> float:
        """Return what a module's update is multiplied with."""
        rank, alpha = self.rank_of(module), self.alpha_of(module)
        return alpha / (math.sqrt(rank) if self.is_rank_stabilized else rank)

    def token_ids_of(self, module: str, *, is_embedding: bool) -> tuple[int, ...] | None:
        """Return the tokens whose rows a module replaces, in the order of the file."""
        module = self.naming.stored(module)
        for name, ids in self.token_ids.items():
            if is_embedding if name == "" else module.endswith(name):
                return ids
        return None

    def _excludes(self, module: str) -> bool:
        if isinstance(self.exclude_modules, str):
            return re.fullmatch(self.exclude_modules, module) is not None
        return any(module == name or module.endswith(f".{name}") for name in self.exclude_modules)

    def _layer_of(self, module: str) -> int | None:
        patterns = self.layers_pattern or (r"[^.]*",)
        before = r".*?\." if not self.layers_pattern else r"(?:^|.*?\.)"
        for pattern in patterns:
            if match := re.match(rf"{before}{pattern}\.(?P<layer>\d+)\.", module):
                return int(match["layer"])
        return None


def base_model_of(directory: Path) -> str:
    """Return the name or path of what an adapter was trained on, whichever tool wrote it.

    Raises:
        UsageError: If its config is not JSON.
    """
    fields = read_object_if_there(directory / "adapter_config.json")
    return str(fields.get("base_model_name_or_path") or fields.get("model") or "")


def kind_of(fields: Mapping[str, Any]) -> str:
    """Return the kind of an adapter as PEFT writes it, however it is spelled."""
    return str(fields.get("peft_type", "")).rpartition(".")[2].upper().replace("-", "_")


def read(directory: Path) -> AdapterSettings:
    """Read the configuration of an adapter.

    Raises:
        UsageError: If this is not an adapter, is of a kind that cannot be merged, or has an option
            that edgekit does not know.
    """
    path = directory / "adapter_config.json"
    if not is_file(path):
        raise UsageError(
            f"{directory} is not an adapter: it has no adapter_config.json",
            hint=places.hint_for_adapter(directory)
            or "pass the directory that PEFT's save_pretrained wrote",
        )
    fields = {name: value for name, value in read_object(path).items() if _is_set(value)}
    _refuse_other_kinds(fields, origin=str(path))
    config = Config(fields, origin=str(path))
    if kind_of(fields) == _LORA:
        _refuse_other_options(fields, origin=str(path))
        settings = _settings(config, fields)
        _refuse_unread(fields, origin=str(path))
    else:
        settings = _settings_of_another(config, fields)
    _refuse_bad_patterns(settings)
    return settings


def _is_set(value: Any) -> bool:
    return value is not None and value is not False and value not in ([], {}, "")


def merged_by_hand(fields: Mapping[str, Any], directory: Path) -> str:
    """Return the two lines by which PEFT makes a model of an adapter and its base."""
    base = fields.get("base_model_name_or_path") or "BASE"
    return (
        "merge it with PEFT and pass DIR as MODEL: "
        f"base = AutoModelForCausalLM.from_pretrained({str(base)!r}); "
        f"PeftModel.from_pretrained(base, {str(directory)!r}).merge_and_unload()"
        ".save_pretrained('DIR')"
    )


def _refuse_other_kinds(fields: Mapping[str, Any], *, origin: str) -> None:
    kind = kind_of(fields)
    if not kind:
        raise UsageError(
            f"{origin} has no peft_type, so it is not the config of an adapter of PEFT",
            hint="pass the directory that PEFT's save_pretrained wrote",
        )
    if kind in _NOT_WEIGHTS:
        raise UsageError(
            f"{origin} describes an adapter of kind {_NOT_WEIGHTS[kind]!r}, which changes no "
            "weight of the base, so no merge can say the same",
            hint=f"train an adapter that can be merged: {SUPPORTED}",
        )
    if kind not in (_LORA, _TOKENS, *by_peft.KINDS):
        raise UsageError(
            f"{origin} describes an adapter of kind {_OTHER_KINDS.get(kind, kind)!r}, which "
            "edgekit does not merge",
            hint=merged_by_hand(fields, Path(origin).parent),
        )


def _refuse_other_options(fields: Mapping[str, Any], *, origin: str) -> None:
    for name, meaning in _REFUSED_OPTIONS.items():
        if name in fields:
            raise UsageError(
                f"{origin}: {name} is set, which is {meaning}; edgekit does not merge that",
                hint=f"supported: {SUPPORTED}"
                if name in _UNMERGEABLE
                else merged_by_hand(fields, Path(origin).parent),
            )
    start = _start_of(fields)
    if start not in _EXACT_STARTS and start.startswith(_CHANGE_THE_BASE):
        reason = "at random" if start.startswith("pissa") else "by what is not in the file"
        raise UsageError(
            f"{origin}: init_lora_weights = {start!r}, so the adapter belongs to a base that PEFT "
            f"changed before training, {reason}",
            hint="convert it: save_pretrained(…, path_initial_model_for_weight_conversion=…)",
        )


def _start_of(fields: Mapping[str, Any]) -> str:
    return str(fields.get("init_lora_weights", True)).lower()


def _refuse_unread(fields: Mapping[str, Any], *, origin: str) -> None:
    if unread := sorted(fields.keys() - _READ - _WITHOUT_EFFECT):
        raise UsageError(
            f"{origin} has options that edgekit does not know: {', '.join(unread)}",
            hint="remove them if they cannot change the weights, or report the adapter",
        )


def _settings(config: Config, fields: Mapping[str, Any]) -> AdapterSettings:
    _refuse_other_values(fields, origin=config.origin)
    return AdapterSettings(
        origin=config.origin,
        base_model=config.get("base_model_name_or_path", ""),
        rank=config.integer("r"),
        alpha=config.number("lora_alpha", 8),  # PEFT's default
        rank_pattern=_numbers(config, "rank_pattern", whole=True),
        alpha_pattern=_numbers(config, "alpha_pattern"),
        target_modules=_names_or_pattern(fields, "target_modules", config.origin),
        target_parameters=_names(fields, "target_parameters", config.origin),
        exclude_modules=_names_or_pattern(fields, "exclude_modules", config.origin),
        layers=_integers(fields, "layers_to_transform", config.origin),
        layers_pattern=_names(fields, "layers_pattern", config.origin),
        replicated=_ranges(fields, "layer_replication", config.origin),
        start=start if (start := _start_of(fields)) in _EXACT_STARTS else "",
        modules_to_save=_names(fields, "modules_to_save", config.origin),
        token_ids=_token_ids(fields, config.origin),
        is_rank_stabilized=config.get("use_rslora", default=False),
        has_magnitudes=config.get("use_dora", default=False),
        has_lora_bias=config.get("lora_bias", default=False),
        keeps_tie=config.get("ensure_weight_tying", default=False),
    )


def _settings_of_another(config: Config, fields: Mapping[str, Any]) -> AdapterSettings:
    """Return what is not of LoRA alone; PEFT itself reads the rest, or there is none."""
    _refuse_other_values({"task_type": fields.get("task_type", "CAUSAL_LM")}, origin=config.origin)
    targets = _names_or_pattern(fields, "target_modules", config.origin)
    is_tokens = kind_of(fields) == _TOKENS
    ids = _checked_integers(fields.get("token_indices", []), "token_indices", config.origin)
    names = [targets] if isinstance(targets, str) else targets or ("",)
    return AdapterSettings(
        origin=config.origin,
        kind=kind_of(fields),
        base_model=config.get("base_model_name_or_path", ""),
        rank=1,
        alpha=1.0,
        rank_pattern={},
        alpha_pattern={},
        target_modules=() if is_tokens else targets,
        exclude_modules=_names_or_pattern(fields, "exclude_modules", config.origin),
        layers=_integers(fields, "layers_to_transform", config.origin),
        layers_pattern=_names(fields, "layers_pattern", config.origin),
        modules_to_save=_names(fields, "modules_to_save", config.origin),
        token_ids=dict.fromkeys(names, ids) if is_tokens else {},
        is_rank_stabilized=False,
        has_magnitudes=False,
        has_lora_bias=False,
        keeps_tie=False,
    )


def _refuse_other_values(fields: Mapping[str, Any], *, origin: str) -> None:
    for name, known in (("task_type", ("CAUSAL_LM",)), ("bias", ("none", "all", "lora_only"))):
        value = fields.get(name, known[0])
        if value not in known:
            raise UsageError(f"{origin}: {name} = {value!r}, expected {' or '.join(known)}")


def _names_or_pattern(fields: Mapping[str, Any], name: str, origin: str) -> str | tuple[str, ...]:
    value = fields.get(name)
    return value if isinstance(value, str) else _names(fields, name, origin)


def _names(fields: Mapping[str, Any], name: str, origin: str) -> tuple[str, ...]:
    value = fields.get(name, [])
    value = [value] if isinstance(value, str) else value
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise UsageError(f"{origin}: {name} = {value!r}, expected names")
    return tuple(value)


def _integers(fields: Mapping[str, Any], name: str, origin: str) -> tuple[int, ...]:
    return _checked_integers(fields.get(name, []), name, origin)


def _ranges(fields: Mapping[str, Any], name: str, origin: str) -> tuple[tuple[int, int], ...]:
    value = fields.get(name, [])
    if not isinstance(value, list):
        raise UsageError(f"{origin}: {name} = {value!r}, expected pairs of layers")
    pairs = [_checked_integers(pair, name, origin) for pair in value]
    if not all(len(pair) == 2 and pair[0] < pair[1] for pair in pairs):
        raise UsageError(f"{origin}: {name} = {value!r}, expected pairs of layers")
    return tuple((first, end) for first, end in pairs)


def _checked_integers(value: Any, name: str, origin: str) -> tuple[int, ...]:
    value = [value] if isinstance(value, int) else value
    if not isinstance(value, list) or not all(
        isinstance(item, int) and not isinstance(item, bool) and item >= 0 for item in value
    ):
        raise UsageError(f"{origin}: {name} = {value!r}, expected whole numbers")
    return tuple(value)


def _numbers(config: Config, name: str, *, whole: bool = False) -> dict[str, float]:
    value = config.get(name, dict[str, Any]())
    kind = int if whole else int | float
    for key, number in value.items():
        if not isinstance(number, kind) or isinstance(number, bool) or not 0 < number < _MOST:
            raise UsageError(
                f"{config.origin}: {name}[{key!r}] = {number!r}, expected a positive number"
            )
    return value


def _token_ids(fields: Mapping[str, Any], origin: str) -> dict[str, tuple[int, ...]]:
    name = "trainable_token_indices"
    value = fields.get(name, {})
    by_module = value if isinstance(value, dict) else {"": value}
    return {key: _checked_integers(ids, name, origin) for key, ids in by_module.items()}


def _lookup(pattern: Mapping[str, float], module: str, default: float) -> float:
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def _refuse_bad_patterns(settings: AdapterSettings) -> None:
    patterns = [*settings.rank_pattern, *settings.alpha_pattern, *settings.modules_to_save]
    patterns += [*settings.layers_pattern]
    for value in (settings.target_modules, settings.exclude_modules):
        patterns += [value] if isinstance(value, str) else []
    for pattern in patterns:
        try:
            re.compile(rf"(.*\.)?({pattern})$")
        except re.error as error:
            raise UsageError(
                f"{settings.origin}: {pattern!r} is not a regular expression: {error}"
            ) from error
