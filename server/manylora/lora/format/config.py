"""`adapter_config.json`: read strictly, every fault at once."""

import json
import math
from collections.abc import Callable, Set, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from manylora.identity import CONFIG_FILE
from manylora.lora.format import strict_json
from manylora.lora.format.patterns import is_order_free
from manylora.lora.format.problems import Problems, listed, shown
from manylora.lora.format.tensors import read_bytes

MAX_CONFIG_BYTES = 2**20
# Of one list or one table; the models with the most adaptable modules have some eighteen thousand.
MAX_NAMES = 20_000
MAX_LAYERS_PATTERNS = 16
MAX_INVOCATION_TOKENS: Final = 64
ALL_LINEAR = "all-linear"
# What an invoked adapter may not have beside its linears' A and B.
_EVERYWHERE = (
    "bias", "lora_bias", "modules_to_save", "target_parameters", "trainable_token_indices", "use_dora", "use_qalora",
)  # fmt: skip
_OFF: Final[tuple[object, ...]] = (None, False, "", "none", [], {})
# Sets to PEFT, which therefore writes them in any order.
_SETS = ("target_modules", "exclude_modules")
# In which the first key that means a module counts.
_TABLES = ("rank_pattern", "alpha_pattern")

# Every key that PEFT has ever written into a LoRA adapter's config (up to 0.21), and what is done with it, in three
# tables. `docs/adapters.md` shows them to users; tests hold them against that page and against PEFT itself.

# Read, and honoured in full.
SERVED = frozenset(
    {
        "alora_invocation_tokens", "peft_type", "task_type", "r", "lora_alpha", "use_rslora", "target_modules",
        "exclude_modules",
        "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "init_lora_weights",
        "base_model_name_or_path", "bias", "ensure_weight_tying", "lora_bias", "modules_to_save", "target_parameters",
        "trainable_token_indices", "use_dora", "use_qalora",
    }
)  # fmt: skip

# Without influence on what a trained adapter computes.
NEUTRAL = {
    "auto_mapping": "says which class the base was",
    "corda_config": "settings of an initialisation",
    "eva_config": "settings of an initialisation",
    "fan_in_fan_out": "says how the base stores its weight; the adapter's tensors are the same either way",
    "inference_mode": "freezes parameters in PEFT",
    "loftq_config": "settings of an initialisation",
    "lora_dropout": "training only",
    "lora_ga_config": "settings of an initialisation",
    "megatron_core": "names a Python module, used only with megatron_config",
    "merge_weights": "how PEFT before 0.3 ran it",
    "peft_version": "which PEFT wrote the file",
    "qalora_group_size": "used only with use_qalora",
    "revision": "which revision the base was",
    "runtime_config": "never read back by PEFT",
    "velora_config": "changes the backward pass of training only",
}

# Changes what the adapter computes in a way that is not served: refused unless absent, null, false or empty.
REFUSED = {
    "arrow_config": "Arrow routes between several adapters",
    "enable_lora": "merged projections of PEFT before 0.3 have another layout; convert it with a newer PEFT",
    "kasa_config": "KaSA changes the base's weights",
    "layer_replication": "it builds another base out of repeated layers",
    "megatron_config": "Megatron's parallel layers are not served",
    "monteclora_config": "MonteCLoRA samples its weights",
    "use_bdlora": "block-diagonal LoRA has another layout",
}

# Of those, the ones whose tensors have another layout: checking shapes against plain LoRA would only mislead.
OTHER_LAYOUT = frozenset({"enable_lora", "layer_replication", "use_bdlora"})

KNOWN = SERVED | NEUTRAL.keys() | REFUSED.keys()

# Initialisations that move part of the base's weight into the adapter, so that it is right on the changed base only.
MUTATING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
# Of those, the ones whose part is known from the base's weight alone, and is taken off again.
KNOWN_PARTS = frozenset({"pissa", "olora"})
HARMLESS_INITS = frozenset({"gaussian", "eva", "orthogonal", "mica"})

TASKS = frozenset({"CAUSAL_LM", "SEQ_CLS", "SEQ_2_SEQ_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"})


@dataclass(frozen=True)
class LoraSettings:
    """The keys that matter for serving. `str` in place of a tuple of names is a regular expression."""

    rank: int
    alpha: float
    use_rslora: bool
    target_modules: tuple[str, ...] | str
    exclude_modules: tuple[str, ...] | str
    layers_to_transform: frozenset[int] | None
    layers_pattern: tuple[str, ...]
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    base_model_name_or_path: str | None
    has_plain_layout: bool
    target_parameters: tuple[str, ...] = ()
    initial: str | None = None  # one of `KNOWN_PARTS`
    use_dora: bool = False
    lora_bias: bool = False
    ties_weights: bool = False
    invocation: tuple[int, ...] = ()

    def scale(self, rank: int, alpha: float) -> float:
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


def is_off(value: object) -> bool:
    """Whether a refused key has its harmless value."""
    return value in (None, False, 0, "", [], {})


def read_json(path: Path, problems: Problems) -> dict[str, Any] | None:
    """The config's JSON object, or None with a `bad_config` problem. Raises OSError."""
    data = read_bytes(path, MAX_CONFIG_BYTES)
    if len(data) > MAX_CONFIG_BYTES:
        problems.add("bad_config", CONFIG_FILE, f"It is larger than {MAX_CONFIG_BYTES} bytes; a config is a few KiB.")
        return None
    try:
        return strict_json.loads(data)
    except strict_json.JsonFault as fault:
        problems.add("bad_config", CONFIG_FILE, f"Not valid JSON: {fault}. Write it with PEFT's save_pretrained.")
        return None


def canonical(raw: dict[str, Any]) -> bytes:
    """The config as bytes that do not depend on key order, white space or the order of PEFT's sets.

    Of a rank or alpha pattern the first key that means a module counts, so such a table's order stays where it makes a
    difference and is not the sorted one.
    """
    ordered = {key: _ordered(key, value) for key, value in raw.items()}
    return json.dumps(ordered, sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()


def _ordered(key: str, value: Any) -> Any:
    if key in _SETS and isinstance(value, list) and all(isinstance(name, str) for name in value):
        return sorted(value)
    if key in _TABLES and isinstance(value, dict) and list(value) != sorted(value) and not is_order_free(value):
        return list(value.items())
    return value


def parse(raw: dict[str, Any], problems: Problems, warnings: list[str]) -> LoraSettings | None:
    """The settings in `raw`; None where they are unusable, with the reasons in `problems`.

    Unsupported features alone are problems, but do not make the result None.
    """
    check_keys(raw, KNOWN, problems, warnings)
    _check_features(raw, problems)
    fields = _Fields(raw, problems)
    settings = fields.settings()
    return None if fields.is_bad else settings


def settings_of(
    raw: dict[str, Any], problems: Problems, *, rank_key: str = "r", alpha_key: str = "lora_alpha"
) -> LoraSettings | None:
    """Of another method's config, what LoRA's has as well: which modules it adapts, with which ranks and alphas."""
    renamed = {
        **{key: raw.get(key) for key in _SHARED},
        "r": raw[rank_key] if type(raw.get(rank_key)) is int and raw[rank_key] > 0 else 1,
        **({} if raw.get(alpha_key) is None else {"lora_alpha": raw[alpha_key]}),
    }
    fields = _Fields(renamed, problems)
    settings = fields.settings()
    return None if fields.is_bad else settings


_SHARED = (
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern",
    "base_model_name_or_path",
)  # fmt: skip


def check_keys(raw: dict[str, Any], known: Set[str], problems: Problems, warnings: list[str]) -> None:
    """`unknown_config_key` for each key that is not `known` and not switched off."""
    for key in sorted(raw.keys() - known):
        value = raw[key]
        if value is None or value is False or (isinstance(value, (str, list, dict)) and not value):
            warnings.append(f"The config key {shown(key)} is unknown here; it is switched off, so it is left aside.")
        else:
            problems.add(
                "unknown_config_key",
                f"{CONFIG_FILE}: {shown(key)}",
                "No PEFT up to 0.21 has this setting, so what it means is not known. Remove it if it is a note.",
            )


def _check_features(raw: dict[str, Any], problems: Problems) -> None:
    for key, reason in REFUSED.items():
        if not is_off(raw.get(key)):
            problems.add("unsupported_feature", f"{CONFIG_FILE}: {key}", f"Not served: {reason}.")
    init = raw.get("init_lora_weights")
    if isinstance(init, str) and init.lower() in KNOWN_PARTS:
        pass
    elif isinstance(init, str) and init.lower().startswith(MUTATING_INITS):
        problems.add(
            "unsupported_feature",
            f"{CONFIG_FILE}: init_lora_weights",
            f"{shown(init)} moved part of the base's weights into the adapter, so it is wrong on the unchanged base. "
            "Convert it: save_pretrained(..., path_initial_model_for_weight_conversion=...), see PEFT's guide.",
        )
    elif not (init is None or isinstance(init, bool) or (isinstance(init, str) and init in HARMLESS_INITS)):
        problems.add("bad_config", f"{CONFIG_FILE}: init_lora_weights", f"{shown(init)} is not one of PEFT's values.")


def check_task(raw: dict[str, Any], served: Set[str], problems: Problems) -> None:
    """Refuse what was trained for another task than those that this kind of base serves."""
    task = raw.get("task_type")
    if isinstance(task, str) and task in TASKS - served:
        problems.add(
            "unsupported_feature",
            f"{CONFIG_FILE}: task_type",
            f"Trained for {task}; this base serves {' and '.join(sorted(served))} alone.",
        )
    elif not (task is None or (isinstance(task, str) and task in served)):
        problems.add("bad_config", f"{CONFIG_FILE}: task_type", f"{shown(task)} is not one of PEFT's task types.")


def _is_int(value: Any) -> bool:
    return type(value) is int


def _is_positive(value: Any) -> bool:
    return type(value) is int and 0 < value < 2**63


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e30


def _is_share(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value <= 1


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(each) is int and 0 <= each < 2**31 for each in value)


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) and name for name in value)


class _Fields:
    """Takes typed values out of the raw config; remembers whether any was bad."""

    def __init__(self, raw: dict[str, Any], problems: Problems) -> None:
        self._raw = raw
        self._problems = problems
        self.is_bad = False

    def bad(self, key: str, message: str) -> None:
        self.is_bad = True
        self._problems.add("bad_config", f"{CONFIG_FILE}: {key}", message)

    def take(self, key: str, default: Any, is_valid: Callable[[Any], bool], expected: str) -> Any:
        value = self._raw.get(key)
        if value is None:
            return default
        if is_valid(value):
            return value
        self.bad(key, f"It must be {expected}, not {shown(value)}.")
        return default

    def names(self, key: str, most: int = MAX_NAMES) -> tuple[str, ...] | str:
        value = self.take(key, (), lambda v: _is_names(v) or _is_text(v), "a list of module names or one pattern")
        if isinstance(value, str):
            return value
        self._check_length(key, value, most)
        return tuple(value[:most])

    def _check_length(self, key: str, values: Sized, most: int) -> None:
        if len(values) > most:
            self.bad(key, f"It has {len(values)} entries; at most {most} are taken.")

    def table(self, key: str, is_valid: Callable[[Any], bool], expected: str) -> dict[str, Any]:
        table = self.take(key, {}, lambda v: isinstance(v, dict), "an object")
        self._check_length(key, table, MAX_NAMES)
        for name, value in table.items():
            if not is_valid(value):
                self.bad(f"{key}[{shown(name)}]", f"It must be {expected}, not {shown(value)}.")
        return dict(table)

    def layers(self) -> frozenset[int] | None:
        value = self.take(
            "layers_to_transform",
            None,
            lambda v: _is_int(v) or (isinstance(v, list) and all(_is_int(n) for n in v)),
            "a layer's number or a list of them",
        )
        if value is None or value == []:
            return None
        if isinstance(value, list):
            self._check_length("layers_to_transform", value, MAX_NAMES)
        return frozenset(value if isinstance(value, list) else [value])

    def rank(self) -> int:
        if self._raw.get("r") is None:
            self.bad("r", "It is missing or null; PEFT always writes the rank.")
        return int(self.take("r", 1, _is_positive, "a whole number above 0"))

    def alpha(self) -> float:
        default = 8  # PEFT's own, for files in which it is missing
        if self._raw.get("lora_alpha", default) is None:
            self.bad("lora_alpha", "It is null; PEFT always writes a number.")
        return float(self.take("lora_alpha", default, _is_number, "a number"))

    def _initial(self) -> str | None:
        init = self._raw.get("init_lora_weights")
        return init.lower() if isinstance(init, str) and init.lower() in KNOWN_PARTS else None

    def _invocation(self) -> tuple[int, ...]:
        """aLoRA's tokens, with which nothing may come that PEFT applies to the tokens before them as well."""
        key, most = "alora_invocation_tokens", MAX_INVOCATION_TOKENS
        found = self.take(key, (), lambda v: _is_ids(v) and len(v) <= most, f"a list of at most {most} token ids")
        others = [each for each in _EVERYWHERE if found and self._raw.get(each) not in _OFF]
        if self._initial() is not None and found:
            others.append("init_lora_weights")
        if others:
            self._problems.add(
                "unsupported_feature",
                f"{CONFIG_FILE}: {key}",
                f"Not served: an adapter that is invoked in the middle of a prompt, with {listed(others)}, which would "
                "act before that. Train it as plain LoRA on linears.",
            )
        return tuple(found)

    def settings(self) -> LoraSettings:
        bias = self._raw.get("bias")
        if bias not in (None, "none", "all", "lora_only"):
            self.bad("bias", f"It must be 'none', 'all' or 'lora_only', not {shown(bias)}.")
        target = self.names("target_modules")
        parameters = self.names("target_parameters")
        if parameters and isinstance(target, str) and target:
            self.bad("target_parameters", "It is read beside a list of target_modules, not beside a pattern.")
        if not target and not parameters:
            self.bad("target_modules", "It is missing or empty; name the adapted modules.")
        layers = self.layers()
        pattern = self.names("layers_pattern", MAX_LAYERS_PATTERNS)
        if isinstance(target, str) and (layers or pattern):
            self.bad("layers_to_transform", "PEFT does not allow it with a pattern in target_modules; use a list.")
        if pattern and layers is None:
            self.bad("layers_pattern", "PEFT does not allow it without layers_to_transform; remove it.")
        self.take("lora_dropout", 0.0, _is_share, "a number from 0 to 1")
        self.take("fan_in_fan_out", False, _is_bool, "true or false")
        return LoraSettings(
            rank=self.rank(),
            alpha=self.alpha(),
            use_rslora=self.take("use_rslora", False, _is_bool, "true or false"),
            target_modules=target,
            exclude_modules=self.names("exclude_modules"),
            layers_to_transform=layers,
            layers_pattern=(pattern,) if isinstance(pattern, str) else pattern,
            rank_pattern=self.table("rank_pattern", _is_positive, "a whole number above 0"),
            alpha_pattern=self.table("alpha_pattern", _is_number, "a number"),
            base_model_name_or_path=self.take("base_model_name_or_path", None, _is_text, "a text"),
            has_plain_layout=all(is_off(self._raw.get(key)) for key in OTHER_LAYOUT),
            target_parameters=(parameters,) if isinstance(parameters, str) else parameters,
            initial=self._initial(),
            use_dora=self.take("use_dora", False, _is_bool, "true or false"),
            lora_bias=self.take("lora_bias", False, _is_bool, "true or false"),
            ties_weights=self.take("ensure_weight_tying", False, _is_bool, "true or false"),
            invocation=self._invocation(),
        )
