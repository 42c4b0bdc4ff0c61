"""Which of the base's modules a config adapts, and with which rank and scale: PEFT's rules, without PEFT."""

import difflib
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, replace

from manylora.identity import CONFIG_FILE
from manylora.lora.format.config import ALL_LINEAR, LoraSettings
from manylora.lora.format.patterns import BUDGET_S, KeyTable, PatternFault, Patterns, suffixes
from manylora.lora.format.problems import MAX_PER_CODE, Problems, listed, shown
from manylora.lora.format.spec import ModuleSpec

# The alphas are looked up again whenever the adapter is brought in (see `as_accepted`), so their expressions have a
# budget of their own at an upload. What was in it then may take longer on a busy machine, and is no fault later.
_ALPHA_BUDGET_S = BUDGET_S / 2
_ACCEPTED_BUDGET_S = 60.0


@dataclass(frozen=True, slots=True)
class Target:
    """One module that the config adapts."""

    spec: ModuleSpec
    rank: int
    scale: float
    alpha: float


def resolve(
    settings: LoraSettings,
    modules: Mapping[str, ModuleSpec],
    max_rank: int,
    problems: Problems,
    warnings: list[str],
    others: Mapping[str, Target] | None = None,
) -> dict[str, Target] | None:
    """The adapted modules by path, in the base's order; None where a pattern cannot be used.

    `others`: those that the tensors show beside what the config names. Adds `unmatched_module` for a target that the
    base does not have, `rank_too_large`, and `bad_config` for a broken pattern.
    """
    patterns = Patterns()
    try:
        paths = _Chosen(settings, modules, patterns).paths()
        targets = dict(_with_ranks(settings, [modules[path] for path in paths], patterns, warnings))
        targets = with_tied_heads(targets, modules) if settings.ties_weights else targets
        targets = _in_order({**targets, **(others or {})}, modules)
        _check_names(settings, modules, targets, patterns, problems, warnings)
    except PatternFault as fault:
        problems.add("bad_config", CONFIG_FILE, f"{fault}.")
        return None
    too_large = sorted({target.rank for target in targets.values() if target.rank > max_rank})
    for rank in too_large:
        example = next(path for path, target in targets.items() if target.rank == rank)
        problems.add(
            "rank_too_large",
            f"{CONFIG_FILE}: {example}",
            f"Rank {rank} is above this server's limit of {max_rank}: compress the adapter (`manylora compress`), "
            "or ask the operator for a higher --max-rank.",
        )
    return targets


def with_tied_heads(targets: Mapping[str, Target], modules: Mapping[str, ModuleSpec]) -> dict[str, Target]:
    """With the head that has the embedding's weight where that is adapted, and the other way round."""
    tied = {path: spec for path, spec in modules.items() if spec.is_tied}
    one = next((targets[path] for path in tied if path in targets), None)
    if one is None:
        return dict(targets)
    both = {**targets, **{path: replace(one, spec=spec) for path, spec in tied.items()}}
    return _in_order(both, modules)


def _in_order(targets: Mapping[str, Target], modules: Mapping[str, ModuleSpec]) -> dict[str, Target]:
    return {path: targets[path] for path in modules if path in targets}


def as_accepted(
    settings: LoraSettings, modules: Mapping[str, ModuleSpec], ranks: Mapping[str, int], problems: Problems
) -> dict[str, Target] | None:
    """What `resolve` made of an adapter that was accepted, from the modules and `ranks` that its tensors have.

    Which modules a config means is found out once, at the upload. Only their alphas are looked up again.
    """
    try:
        alphas = KeyTable(settings.alpha_pattern, Patterns(_ACCEPTED_BUDGET_S))
        found = {}
        by_parameter = frozenset(parameter_targets(settings, modules))
        for path in (path for path in modules if path in ranks):
            key = alphas.first(modules[path].parameter if path in by_parameter else path)
            alpha = settings.alpha if key is None else settings.alpha_pattern[key]
            found[path] = Target(modules[path], ranks[path], settings.scale(ranks[path], alpha), alpha)
    except PatternFault as fault:
        problems.add("bad_config", CONFIG_FILE, f"{fault}.")
        return None
    return found


def resolve_ranks(
    settings: LoraSettings, modules: Mapping[str, ModuleSpec], paths: Container[str], problems: Problems
) -> dict[str, Target] | None:
    """Like `as_accepted`, for methods whose tensors do not show their ranks: those are looked up again, too."""
    patterns = Patterns(_ACCEPTED_BUDGET_S)
    try:
        specs = [spec for path, spec in modules.items() if path in paths]
        return dict(_with_ranks(settings, specs, patterns, [], _ACCEPTED_BUDGET_S))
    except PatternFault as fault:
        problems.add("bad_config", CONFIG_FILE, f"{fault}.")
        return None


def parameter_targets(settings: LoraSettings, modules: Mapping[str, ModuleSpec]) -> list[str]:
    """The modules whose weight `target_parameters` names, in the base's order: names are ends of paths."""
    named = frozenset(settings.target_parameters)
    if not named:
        return []
    return [path for path, spec in modules.items() if any(end in named for end in suffixes(spec.parameter))]


class _Names:
    """A list of names, or one expression, ready to be asked for many paths."""

    def __init__(self, names: tuple[str, ...] | str, patterns: Patterns) -> None:
        self._expression = names if isinstance(names, str) else None
        self.whole = frozenset(() if isinstance(names, str) else names)
        self._patterns = patterns

    def __contains__(self, path: str) -> bool:
        if self._expression is not None:
            return bool(self._expression) and self._patterns.fullmatch(self._expression, path)
        return bool(self.whole) and any(suffix in self.whole for suffix in suffixes(path))


def output_head(modules: Mapping[str, ModuleSpec]) -> str | None:
    """The path of the layer that makes the logits: outside every layer, as wide as the vocabulary."""
    sizes = {spec.in_features for spec in modules.values() if spec.kind == "embedding"}
    heads = [
        path
        for path, spec in modules.items()
        if spec.kind != "embedding"
        and not any(part.isdigit() for part in path.split("."))
        and (spec.out_features in sizes or path in ("lm_head", "embed_out"))
    ]
    return heads[-1] if heads else None


class _Chosen:
    """The modules that a config adapts."""

    def __init__(self, settings: LoraSettings, modules: Mapping[str, ModuleSpec], patterns: Patterns) -> None:
        self._settings = settings
        self._modules = modules
        self._patterns = patterns
        self._excluded = _Names(settings.exclude_modules, patterns)
        self._wanted = _Names(settings.target_modules, patterns)
        self._by_parameter = frozenset(parameter_targets(settings, modules))
        self._head = output_head(modules)

    def paths(self) -> list[str]:
        """In the base's order. Raises PatternFault."""
        return [path for path in self._modules if self._is_target(path)]

    def _is_target(self, path: str) -> bool:
        settings = self._settings
        if path in self._by_parameter:  # as in PEFT, whatever its layer and whatever is excluded
            return True
        if path in self._excluded or self._modules[path].is_parameter:
            return False
        if _is_all_linear(settings):
            return self._modules[path].kind != "embedding" and path != self._head
        if path not in self._wanted:
            return False
        # As in PEFT, a module named by its whole path is adapted whatever its layer.
        if settings.layers_to_transform is None or path in self._wanted.whole:
            return True
        return _layer(settings, path, self._patterns) in settings.layers_to_transform


def _is_all_linear(settings: LoraSettings) -> bool:
    return isinstance(settings.target_modules, str) and settings.target_modules.lower() == ALL_LINEAR


def _layer(settings: LoraSettings, path: str, patterns: Patterns) -> int | None:
    found = (patterns.layer_index(pattern, path) for pattern in settings.layers_pattern or (None,))
    return next((index for index in found if index is not None), None)


def _with_ranks(
    settings: LoraSettings,
    specs: list[ModuleSpec],
    patterns: Patterns,
    warnings: list[str],
    alpha_budget_s: float = _ALPHA_BUDGET_S,
) -> Iterator[tuple[str, Target]]:
    used: set[str] = set()
    by_parameter = frozenset(parameter_targets(settings, {spec.path: spec for spec in specs}))
    ranks = KeyTable(settings.rank_pattern, patterns)
    alphas = KeyTable(settings.alpha_pattern, Patterns(alpha_budget_s))
    for spec in specs:
        name = spec.parameter if spec.path in by_parameter else spec.path
        rank_key, alpha_key = ranks.first(name), alphas.first(name)
        rank = settings.rank if rank_key is None else settings.rank_pattern[rank_key]
        alpha = settings.alpha if alpha_key is None else settings.alpha_pattern[alpha_key]
        used |= {key for key in (rank_key, alpha_key) if key is not None}
        yield spec.path, Target(spec, rank, settings.scale(rank, alpha), alpha)
    unused = sorted((settings.rank_pattern.keys() | settings.alpha_pattern.keys()) - used)
    if unused:
        warnings.append(f"No adapted module is named by these keys of rank_pattern or alpha_pattern: {listed(unused)}.")


def _hint(name: str, leaves: list[str]) -> str:
    close = difflib.get_close_matches(name[:64], leaves, n=1)
    return f"Did you mean {close[0]!r}?" if close else f"It has {listed(leaves, 12)}."


def _check_names(
    settings: LoraSettings,
    modules: Mapping[str, ModuleSpec],
    targets: dict[str, Target],
    patterns: Patterns,
    problems: Problems,
    warnings: list[str],
) -> None:
    """`target_modules` must mean something in the base. Of several names or layers, as in PEFT, one is enough."""
    names, layers = settings.target_modules, settings.layers_to_transform
    leaves = sorted({spec.leaf for spec in modules.values()})
    unknown, absent = list[str](), list[int]()
    if isinstance(names, tuple):
        existing = {suffix for path in modules for suffix in suffixes(path)}
        unknown = sorted(set(names) - existing)
    if layers is not None and settings.has_plain_layout:
        absent = sorted(layers - {_layer(settings, path, patterns) for path in modules})
    existing_parameters = {end for spec in modules.values() for end in suffixes(spec.parameter)}
    strange = sorted(set(settings.target_parameters) - existing_parameters)
    if targets:
        if strange:
            warnings.append(f"The base has no adaptable parameter that ends in {listed(strange)} (target_parameters).")
        if unknown:
            warnings.append(
                f"The base has no adaptable module that ends in {listed(unknown)}, which target_modules names beside "
                f"others. {_hint(unknown[0], leaves)}"
            )
        if absent:
            warnings.append(f"The base has no layers {listed([str(n) for n in absent])} of layers_to_transform.")
        return
    for number, name in enumerate(unknown):
        # What is not shown but counted needs no hint, which costs much more than the count.
        hint = "" if number >= MAX_PER_CODE else _hint(name, leaves)
        problems.add(
            "unmatched_module",
            f"{CONFIG_FILE}: target_modules",
            f"The base has no adaptable module that ends in {shown(name)}. {hint}",
        )
    for name in strange:
        problems.add(
            "unmatched_module",
            f"{CONFIG_FILE}: target_parameters",
            f"The base has no adaptable parameter that ends in {shown(name)}.",
        )
    for layer in absent:
        problems.add(
            "unmatched_module", f"{CONFIG_FILE}: layers_to_transform", f"The base has no layer {shown(layer)}."
        )
    if names and not problems.has("unmatched_module"):
        problems.add(
            "unmatched_module",
            f"{CONFIG_FILE}: target_modules",
            f"{shown(names)} with the exclusions adapts no module of the base, which has {listed(leaves, 12)}.",
        )
