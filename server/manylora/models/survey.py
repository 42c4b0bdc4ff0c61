"""What a few passes over the untouched model show that cannot be read off its classes.

Which linears share their input and on which rows each runs, how every layer attends (its shape, its options, the mask
that the model builds for it, far out as well), and the logits that the wrapped model must give.
"""

import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any, Final

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import DynamicCache, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from manylora.errors import ModelUnusable
from manylora.kernels.batch import AttentionOptions
from manylora.kernels.torch_attention import prefill
from manylora.lora.format.reader import ModuleSpec
from manylora.models import attention, older
from manylora.models.kv_cache import KVShape
from manylora.models.masks import Reach, reach_of
from manylora.models.modules import adaptable_modules, first_position, is_linear, is_plain
from manylora.models.positions import probe_starts
from manylora.models.probes import PROBE_LENGTH, PROBE_STRENGTH, PretendedPast, Probe, ProbeAdapter
from manylora.models.refusals import refusing
from manylora.models.states import NotingStates, state_layers

__all__ = ["SAME", "Survey", "survey", "survey_linears"]

# Of two correct ways to compute the same in one number format, as a share of the logits' spread.
SAME: Final = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
_KEPT_ROWS = (4, 9)  # of which logits are asked for alone
_UNTOLD: Final = -1
_numbers = itertools.count()


@dataclass(slots=True)
class Survey:
    """`groups`: paths of linears that read the same input. `modules`: what an adapter may touch. `kept`: linears that
    stay in the model because they do more than multiply, or because others read their weight. `on_logit_rows`: those
    that run on the rows whose logits are asked for, and on no others. `left`: linears that must be left alone.
    `kv_shapes` and `options` are those of the layers that attend, in their order; `places`: the place there of each, by
    the index that transformers gives the layer. `keepers`: modules that keep a state of each sequence, by path, with
    the index of theirs; `state_bytes`: of one sequence; `continues`: whether they take several tokens at once also
    behind a sequence's first ones. `first_position`: the number of a sequence's first one. `num_logits`: of each token.
    `probes` hold megabytes of logits, and are only for the check at start.
    """

    kv_shapes: list[KVShape] = field(default_factory=list)
    places: dict[int, int] = field(default_factory=dict)
    keepers: dict[str, int] = field(default_factory=dict)
    state_bytes: int = 0
    continues: bool = True
    first_position: int = 0
    options: list[AttentionOptions] = field(default_factory=list)
    groups: list[list[str]] = field(default_factory=list)
    modules: dict[str, ModuleSpec] = field(default_factory=dict)
    kept: set[str] = field(default_factory=set)
    on_logit_rows: set[str] = field(default_factory=set)
    left: set[str] = field(default_factory=set)
    num_logits: int = 0
    probes: list[Probe] = field(default_factory=list)


def survey(model: PreTrainedModel, context_length: int) -> Survey:
    """What the untouched model shows in a few passes.

    Raises ModelUnusable, naming the part, for what is no causal decoder that can be served up to that length.
    """
    with refusing(model, "it was looked at"):
        return _Surveyor(model, context_length).run()


class _Surveyor:
    """The passes, in order."""

    def __init__(self, model: PreTrainedModel, context_length: int) -> None:
        self._model = model
        self._name = type(model).__name__
        self._context_length = context_length
        self._count = min(PROBE_LENGTH, context_length)
        self._device = model.get_input_embeddings().weight.device
        vocab = int(model.get_input_embeddings().weight.shape[0])
        random = torch.Generator().manual_seed(0)
        self._token_ids = torch.randint(0, vocab, (self._count,), generator=random).to(self._device)
        self._first = first_position(model)
        if self._first:  # such models leave padding out when they number positions
            self._token_ids[self._token_ids == self._first - 1] = self._first
        self._found = Survey()
        parameters = inspect.signature(model.forward).parameters
        self._may_ignore_positions = "position_ids" not in parameters and not older.is_older(model)
        self._past_name = "cache" if "cache" in parameters else "past_key_values"
        self._tolerance = SAME.get(model.dtype, SAME[torch.bfloat16])

    def run(self) -> Survey:
        with torch.no_grad():  # no inference mode, in which changes in place cannot be told
            own = self._logits(1, position_ids=None)
            states = self._look_at_states(own)
            if self._may_ignore_positions and states is None and torch.equal(own, self._logits(1, stride=2)):
                raise ModelUnusable(f"{self._name} takes no position_ids, so its sequences cannot share a batch.")
            self._require_same(self._logits(1), own, "numbers its positions in a way of its own")
            recorder = _Recorder(self._name, self._model.config)
            with _attending(self._model, recorder, builds_mask=True):
                self._look_at_linears(own)
                if states is None:
                    self._require_attention(recorder)
            adapter = ProbeAdapter(self._found.modules, self._model.dtype, PROBE_STRENGTH)
            with adapter.on_second_row(self._model):
                both = self._logits(2)
            self._found.probes.append(Probe(0, self._token_ids, *both.unbind(0)))
            for start in probe_starts(self._model.config, self._context_length, self._count):
                with _attending(self._model, recorder, builds_mask=True), adapter.on_second_row(self._model):
                    both = self._logits(2, **{self._past_name: PretendedPast(start)}, start=start)
                self._found.probes.append(Probe(start, self._token_ids, *both.unbind(0)))
        self._found.options = recorder.settled()
        self._found.kv_shapes = recorder.kv_shapes
        self._found.places = recorder.places
        if states is not None:
            self._found.keepers, self._found.state_bytes, self._found.continues = states
        self._found.first_position = self._first
        self._found.num_logits = int(own.shape[-1])
        return self._found

    def _logits(
        self, num_rows: int, *, start: int = 0, stride: int = 1, part: slice = slice(None), **inputs: Any
    ) -> torch.Tensor:
        """float32 [num_rows, n, vocab] of the probe's tokens, or a part, from `start` on, the same ones in each row."""
        positions = (self._first + start + stride * torch.arange(self._count, device=self._device))[part]
        given = {"position_ids": positions.expand(num_rows, -1), "use_cache": False, **inputs}
        given = {name: value for name, value in given.items() if value is not None}
        logits = getattr(self._model(input_ids=self._token_ids[part].expand(num_rows, -1), **given), "logits", None)
        if not isinstance(logits, torch.Tensor) or logits.dim() != 3 or logits.shape[0] != num_rows:
            raise ModelUnusable(f"{self._name} does not give a token's logits: it is no language model.")
        return logits.float()

    def _look_at_states(self, own: torch.Tensor) -> tuple[dict[str, int], int, bool] | None:
        """The modules that keep a state with the index of their layer, a sequence's bytes, and whether it continues.

        None where no layer keeps a state.
        """
        if not state_layers(self._model.config) and not getattr(self._model, "_is_stateful", False):
            return None
        noting = NotingStates(self._model)
        with suppress(AttributeError):  # of a cache of its own, which this is not
            self._require_same(
                self._logits(1, **{self._past_name: noting}), own, "computes something else over a cache of its states"
            )
        if not noting.keepers:
            raise ModelUnusable(
                f"{self._name} has recurrent layers whose states are not kept in transformers' cache: not supported."
            )
        return noting.keepers, noting.size_bytes(), self._goes_on(own)

    def _goes_on(self, own: torch.Tensor) -> bool:
        """Whether several tokens over a cache of those before them give what all give at once."""
        past, half = {self._past_name: DynamicCache(config=self._model.config)}, self._count // 2
        self._logits(1, part=slice(half), **past)
        found = self._logits(1, part=slice(half, None), **past)
        return self._apart(found, own[:, half:]) <= self._tolerance

    def _look_at_linears(self, own: torch.Tensor) -> None:
        """Which rows each linear runs on while the logits of two are asked for, and which inputs are shared."""
        rows = torch.tensor(_KEPT_ROWS, device=self._device).clamp(max=self._count - 1)
        watch, head = _Linears(self._model), _Head(self._model)
        with watch, head:
            kept = self._logits(1, logits_to_keep=rows)
        if kept.shape[1] != len(rows):
            raise ModelUnusable(
                f"{self._name} gives the logits of every token when those of some are asked for (it ignores "
                "logits_to_keep), so it cannot be served in batches."
            )
        self._require_same(kept, own[:, rows], "computes attention that this server does not reproduce")
        self._found = watch.survey(self._model, self._count, len(rows))
        if head.gives(kept) and self._found.on_logit_rows.issuperset(head.paths):
            offered, modules = adaptable_modules(self._model), self._found.modules
            self._found.modules = {path: replace(spec, grows=offered[path].grows) for path, spec in modules.items()}

    def _require_attention(self, recorder: "_Recorder") -> None:
        if not recorder.kv_shapes:
            raise ModelUnusable(f"{self._name} does not use transformers' attention interface, so it cannot be served.")

    @staticmethod
    def _apart(found: torch.Tensor, wanted: torch.Tensor) -> float:
        """The root mean square of the difference, as a share of the logits' spread."""
        return float((found - wanted).square().mean().sqrt() / wanted.std().clamp(min=1e-6))

    def _require_same(self, found: torch.Tensor, wanted: torch.Tensor, otherwise: str) -> None:
        apart = self._apart(found, wanted)
        if not apart <= self._tolerance:
            raise ModelUnusable(f"{self._name} {otherwise} (logits differ by {apart:.3g} of their spread).")


def survey_linears(
    model: PreTrainedModel, run: Callable[[], object], *, num_tokens: int, num_logit_rows: int
) -> Survey:
    """What a pass of `run` shows of the linears: over `num_tokens` rows, or on `num_logit_rows` of them."""
    watch = _Linears(model)
    with watch:
        run()
    return watch.survey(model, num_tokens, num_logit_rows)


@contextmanager
def _attending(model: PreTrainedModel, recorder: "_Recorder", *, builds_mask: bool) -> Iterator[None]:
    """Let the model attend through `recorder`, with every mask built."""
    name = f"manylora-survey-{next(_numbers)}"
    before = model.config._attn_implementation
    function = recorder.begin()
    attention.register(name, function)
    if builds_mask:
        AttentionMaskInterface.register(name, _full_mask)
    if older.is_older(model):
        with older.adapted(model, function):
            yield
        return
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _full_mask(*args: Any, **kwargs: Any) -> torch.Tensor:
    """Transformers' mask as bool [batch, 1, queries, keys], never left out for being plainly causal."""
    skips = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    mask: torch.Tensor = sdpa_mask(*args, **{**kwargs, **skips})
    return mask


class _Recorder:
    """Attends as our attention will, by the mask that the model gives, and notes both for every layer."""

    def __init__(self, name: str, config: Any) -> None:
        self._name = name
        self._chunk = int(getattr(config.get_text_config(), "attention_chunk_size", 0) or 0)
        self.kv_shapes: list[KVShape] = []
        self.places: dict[int, int] = {}
        self._options: list[AttentionOptions] = []
        self._reaches: list[list[tuple[int, Reach]]] = []  # per layer: (length, reach) of each pass
        self._masks: dict[int, tuple[torch.Tensor, Reach]] = {}
        self._next = 0

    def begin(self) -> attention.AttentionFunction:
        """The function for one pass; each goes through the layers in the same order."""
        self._next = 0
        self._masks = {}
        return self._attend

    def settled(self) -> list[AttentionOptions]:
        """Each layer's options, window and chunks being those that its masks have. Lets go of the masks."""
        self._masks = {}
        settled = []
        for layer, options in enumerate(self._options):
            reach = self._reach(layer, options.window)
            settled.append(replace(options, window=reach.window, chunk=reach.chunk))
        return settled

    def _reach(self, layer: int, stated: int) -> Reach:
        seen = self._reaches[layer]
        if not seen:
            return Reach(window=stated)
        longest, last = max(seen, key=lambda each: each[0])
        size = last.window or last.chunk
        if any(reach != (last if size < length else Reach()) for length, reach in seen):
            raise ModelUnusable(f"{self._name} changes the window of layer {layer}'s attention with the position.")
        return last if size or stated < longest else Reach(window=stated)

    def _attend(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        layer = self._enter(module, query, key, value, kwargs)
        reach = Reach(window=self._options[layer].window)
        if isinstance(attention_mask, torch.Tensor):
            found = self._read(module, attention_mask)
            self._reaches[layer].append((attention_mask.shape[-1], found))
            # Of a pretended past there are no keys: the first one there is counts as position 0, here and in the check.
            reach = Reach(found.window if found.window < key.shape[2] else 0, found.chunk)
        options = replace(self._options[layer], window=reach.window, chunk=reach.chunk)
        rows = []
        for q, k, v in zip(query, key, value, strict=True):
            rows.append(prefill(q.transpose(0, 1), k, v, options))
        return torch.stack(rows), None

    def _enter(
        self, module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, kwargs: dict[str, Any]
    ) -> int:
        layer, self._next = self._next, self._next + 1
        part = type(module).__name__
        options = attention.read_options(module, query.shape[-1], kwargs)
        index: Any = getattr(module, "layer_idx", None)
        if index is None or index == _UNTOLD:  # one of several with the same weights, told its layer at each call
            index = len(self.places)
            module.layer_idx = index
        if not isinstance(index, int) or self.places.setdefault(index, layer) != layer:
            raise ModelUnusable(
                f"{self._name} has layers that share or lack a cache of keys and values ({part}): not supported."
            )
        if query.shape[2] != key.shape[2]:
            raise ModelUnusable(f"{self._name}'s attention ({part}) looks at something beside its own past.")
        if layer == len(self.kv_shapes):
            self._options.append(options)
            self.kv_shapes.append(KVShape(key.shape[1], key.shape[3], value.shape[3]))
            self._reaches.append([])
        elif options != self._options[layer]:
            raise ModelUnusable(f"{self._name} changes the options of layer {layer}'s attention with the position.")
        return layer

    def _read(self, module: nn.Module, mask: torch.Tensor) -> Reach:
        known = self._masks.get(id(mask))
        if known is None:
            if mask.dim() != 4:
                raise ModelUnusable(f"{self._name}'s attention ({type(module).__name__}) has a mask of its own shape.")
            try:
                known = mask, reach_of(mask, self._chunk)  # held, so that no other mask gets its address
            except ValueError as error:
                raise ModelUnusable(
                    f"{self._name}'s attention ({type(module).__name__}) {error}: not supported."
                ) from error
            self._masks[id(mask)] = known
        return known[1]


class _Head:
    """What the head of a model gives while it is entered."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._module = model.get_output_embeddings()
        self._seen: list[torch.Tensor] = []
        self._handle: Any = None
        self.paths = {path for path, module in model.named_modules() if module is self._module}

    def __enter__(self) -> "_Head":
        if self._module is not None:
            self._handle = self._module.register_forward_hook(self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self._handle is not None:
            self._handle.remove()

    def _note(self, _module: nn.Module, _args: Any, out: torch.Tensor) -> None:
        self._seen.append(out.float().clone())

    def gives(self, logits: torch.Tensor) -> bool:
        """Whether these are the logits as they are, a row for each token of one embedding: more rows may stand beside.

        Other embeddings of the same tokens would have to grow as well, which no adapter's files say.
        """
        rows = int(self._model.get_input_embeddings().weight.shape[0])
        tables = [module for module in self._model.modules() if isinstance(module, nn.Embedding)]
        num_alike = sum(module.num_embeddings >= rows for module in tables)
        return (
            len(self._seen) == len(self.paths) == num_alike == 1
            and logits.shape[-1] == rows
            and torch.equal(self._seen[0], logits)
        )


class _Linears(TorchFunctionMode):
    """What the linears are called with, and who else reads their weights, while it is entered."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self._model = model
        self._paths = {path: module for path, module in model.named_modules() if is_linear(module)}
        self._owners: dict[int, list[str]] = {}  # several, where layers have the same weights
        for path, module in self._paths.items():
            self._owners.setdefault(id(module.weight), []).append(path)
        # A tied head's weight is the embedding's, too, which goes on having it and is no reason to keep the head.
        self._sharing = {
            module: [owner for each in module.parameters(recurse=False) for owner in self._owners.get(id(each), ())]
            for path, module in model.named_modules()
            if path not in self._paths
        }
        self._running: list[str] = []
        self._held: list[torch.Tensor] = []
        self._seen: dict[tuple[str, int, int], list[str]] = {}
        self._rows: dict[str, set[int]] = {path: set() for path in self._paths}
        self._odd: set[str] = set()
        self._handles: list[Any] = []
        self.kept = {path for path, module in self._paths.items() if not is_plain(module)}

    def __enter__(self) -> "_Linears":
        for path, module in self._paths.items():
            self._handles.append(module.register_forward_pre_hook(self._before(path)))
            self._handles.append(module.register_forward_hook(self._after(path)))
        for module, paths in self._sharing.items():
            if paths:
                begin, end = self._reading(paths)
                self._handles.append(module.register_forward_pre_hook(begin))
                self._handles.append(module.register_forward_hook(end))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *args: Any) -> None:
        super().__exit__(*args)  # type: ignore[no-untyped-call]
        for handle in self._handles:
            handle.remove()

    def __torch_function__(
        self, func: Callable[..., Any], _types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if self._owners:
            for each in (*args, *(kwargs or {}).values()):
                paths = self._owners.get(id(each), ()) if isinstance(each, nn.Parameter) else ()
                if not any(path in self._running for path in paths):
                    self.kept.update(paths)
        return func(*args, **(kwargs or {}))

    def _before(self, path: str) -> Callable[..., None]:
        parent = path.rpartition(".")[0]

        def record(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            x = args[0]
            self._held.append(x)  # so that no address is used twice
            self._seen.setdefault((parent, id(x), x._version), []).append(path)
            self._rows[path].add(x.numel() // x.shape[-1])
            self._running.append(path)

        return record

    def _after(self, path: str) -> Callable[..., None]:
        def record(module: nn.Module, args: tuple[torch.Tensor, ...], out: Any) -> None:
            self._running.remove(path)
            if not isinstance(out, torch.Tensor) or out.shape[:-1] != args[0].shape[:-1]:
                self._odd.add(path)

        return record

    def _reading(self, paths: Sequence[str]) -> tuple[Callable[..., None], Callable[..., None]]:
        """Hooks around a module that holds these linears' weights, too."""

        def begin(*_: Any) -> None:
            self._running.extend(paths)

        def end(*_: Any) -> None:
            for path in paths:
                self._running.remove(path)

        return begin, end

    def survey(self, model: PreTrainedModel, num_tokens: int, num_logit_rows: int) -> Survey:
        """What was seen, of a pass over so many tokens in which the logits of so many rows were asked for."""
        left = self.strangers(num_tokens, num_logit_rows)
        return Survey(
            groups=self.groups,
            modules={
                path: replace(spec, grows=False) for path, spec in adaptable_modules(model).items() if path not in left
            },
            kept=self.kept - left,
            on_logit_rows=self.running_on(num_logit_rows),
            left=left,
        )

    @property
    def groups(self) -> list[list[str]]:
        return [group for group in self._seen.values() if not any(path in self.kept for path in group)]

    def running_on(self, count: int) -> set[str]:
        return {path for path, counts in self._rows.items() if counts == {count}}

    def strangers(self, *known: int) -> set[str]:
        """Linears with other rows than all tokens' or all wanted logits', or with no plain output; and their likes.

        A linear that did not run is of the kind of those that differ from it only in numbers (experts by their index).
        """
        usual = [{count} for count in known]
        strange = {path for path, counts in self._rows.items() if counts and counts not in usual} | self._odd
        kinds = {_without_numbers(path) for path in strange}
        return strange | {path for path, counts in self._rows.items() if not counts and _without_numbers(path) in kinds}


def _without_numbers(path: str) -> str:
    return ".".join("#" if part.isdigit() else part for part in path.split("."))
