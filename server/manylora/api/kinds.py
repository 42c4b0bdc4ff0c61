"""Which bodies a kind of base, or of adapter, answers: what is asked of another one is told which."""

from manylora.api.inputs import InputsRequest, ReadRequest
from manylora.api.schemas import InferenceRequest
from manylora.engine.interface import Mix, ModelInfo
from manylora.errors import InvalidRequest, WrongModelType

__all__ = ["check_kind", "check_writes"]


def check_kind(body: InferenceRequest, model: ModelInfo) -> None:
    """Raises WrongModelType where the body is for another kind of base than the one that is served."""
    if model.kind == "transcribe":
        raise WrongModelType(
            "This server's model is one of speech: it writes down what is said in a file of sound. Ask "
            "/v1/audio/transcriptions, or a server of another model."
        )
    if model.vision is not None:
        _check_sees(body)
        return
    if isinstance(body, InputsRequest) and body.has_images:
        raise WrongModelType(
            "This server's model is one of texts: it sees no images. Ask a server of a model of images.",
            param=body.prompt_field,
        )
    if not model.has_heads and isinstance(body, ReadRequest) and body.reads_head:
        raise WrongModelType(
            "This server's model takes no adapters with labels of their own. Ask a server of an encoder, or "
            "/v1/completions with 'guided_choice'."
        )
    if model.kind == "pool" and not isinstance(body, ReadRequest):
        raise WrongModelType(
            "This server's model is an encoder: it turns texts into vectors and writes none. Ask /v1/embeddings, or a "
            "server of a decoder."
        )


def _check_sees(body: InferenceRequest) -> None:
    """Raises WrongModelType, or InvalidRequest for what is said of texts, where a model of images is asked."""
    if not isinstance(body, InputsRequest) or body.has_texts:
        raise WrongModelType(
            "This server's model sees images and reads no text. Ask /v1/embeddings or /v1/classify with an image, or a "
            "server of another model."
        )
    for name in ("truncate_prompt_tokens", "add_special_tokens"):
        if getattr(body, name) is not None:
            raise InvalidRequest(
                f"'{name}' is for texts, and this server's model sees images. Leave it out.", param=name
            )


def check_writes(body: InferenceRequest, mix: Mix) -> None:
    """Raises WrongModelType where text is asked of an adapter that was trained to give labels."""
    labels = next((ref.label for ref in mix.refs if ref.head), None)
    if labels is not None and not isinstance(body, ReadRequest):
        raise WrongModelType(
            f"The adapter '{labels}' has a head and was not trained to write. Ask /v1/classify, or name another.",
            param="model",
        )
