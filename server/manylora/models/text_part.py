"""The text part of a model that also sees or hears: what a text does not run is put aside."""

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

__all__ = ["beside_text", "put_aside"]

_NUM_TOKENS = 4


def put_aside(model: PreTrainedModel) -> list[str]:
    """Take out what stands beside the text part and does not run for a text: towers, projectors. Their paths.

    A model whose logits are others without them keeps them.
    """
    beside = beside_text(model)
    if not beside:
        return []
    _complete(model)
    wanted, ran = _run(model, beside)
    aside = {path: module for path, module in beside.items() if path not in ran}
    for path in aside:
        owner, name = _owner(model, path)
        delattr(owner, name)
    if aside and not _agrees(model, wanted):
        for path, module in aside.items():
            owner, name = _owner(model, path)
            setattr(owner, name, module)
        return []
    return list(aside)


def beside_text(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The modules with weights beside the way from the whole to what embeds tokens, the head left out, by path."""
    found = {}
    head, way = model.get_output_embeddings(), _way(model)
    for depth in range(len(way)):
        above = ".".join(way[:depth])
        for name, module in model.get_submodule(above).named_children():
            if name != way[depth] and module is not head and any(True for _ in module.parameters()):
                found[f"{above}.{name}" if above else name] = module
    return found


def _way(model: PreTrainedModel) -> list[str]:
    """The names from the whole to the module that has what embeds tokens."""
    embedding = model.get_input_embeddings()
    path: str = next(path for path, module in model.named_modules() if module is embedding)
    return path.split(".")[:-1]


def _complete(model: PreTrainedModel) -> None:
    """Let the text part say None where the whole reads what transformers has the part's output not have (Llama 4)."""
    try:
        _logits(model)
    except AttributeError as error:
        missing = error.name
        if missing is None or not isinstance(error.obj, ModelOutput):
            return

        def complete(_module: nn.Module, _given: object, output: object) -> None:
            if isinstance(output, ModelOutput) and not hasattr(output, missing):
                setattr(output, missing, None)

        model.get_submodule(_way(model)[0]).register_forward_hook(complete)


def _run(model: PreTrainedModel, watched: dict[str, nn.Module]) -> tuple[torch.Tensor, set[str]]:
    """The logits of a few tokens, and which of `watched` were run on the way, in any part."""
    ran: set[str] = set()
    handles = [
        part.register_forward_pre_hook(lambda *_args, path=path: ran.add(path))
        for path, module in watched.items()
        for part in module.modules()
    ]
    try:
        return _logits(model), ran
    finally:
        for handle in handles:
            handle.remove()


def _agrees(model: PreTrainedModel, wanted: torch.Tensor) -> bool:
    try:
        return torch.equal(_logits(model), wanted)
    except AttributeError:  # it asks one of them for something
        return False


@torch.inference_mode()
def _logits(model: PreTrainedModel) -> torch.Tensor:
    vocab = int(model.get_input_embeddings().weight.shape[0])
    logits: torch.Tensor = model.eval()(input_ids=torch.arange(_NUM_TOKENS)[None] % vocab, use_cache=False).logits
    return logits


def _owner(model: PreTrainedModel, path: str) -> tuple[nn.Module, str]:
    above, _, name = path.rpartition(".")
    return model.get_submodule(above), name
