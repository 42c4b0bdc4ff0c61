"""Bodies whose prompts are read and not written on."""

from typing import Any, ClassVar, Self

from pydantic import Field, PrivateAttr, field_validator, model_validator

from manylora.api.pictures import MAX_IMAGES, ImagePart
from manylora.api.schemas import MAX_INPUTS, InferenceRequest, Prompt, checked_prompts, one_by_one
from manylora.engine.interface import Pooling
from manylora.errors import InvalidRequest

__all__ = ["InputsRequest", "PoolRequest", "ReadRequest"]


class ReadRequest(InferenceRequest):
    """A body whose prompts are read and not written on. `reads_head`: by the adapter's head."""

    reads_head: ClassVar[bool] = False

    _usual_pooling: Pooling | None = PrivateAttr(default=None)

    @property
    def token_limit(self) -> int:
        return 0

    @property
    def chosen_pooling(self) -> Pooling | None:
        """What becomes of a text's tokens where no head reads them; None: what the model does by itself."""
        return self._usual_pooling

    def pooled(self, usual: Pooling | None) -> Self:
        """The body with what becomes of tokens where it does not say itself."""
        copy = self.model_copy()
        copy._usual_pooling = usual
        return copy


class InputsRequest(ReadRequest):
    """A body whose prompts are its `input`."""

    prompt_field: ClassVar[str] = "input"

    input: str | list[str] | list[int] | list[list[int]] | list[ImagePart]

    @field_validator(
        "input", mode="plain", json_schema_input_type=str | list[str] | list[int] | list[list[int]] | list[ImagePart]
    )
    @classmethod
    def _check_input(cls, value: Any) -> Any:
        parts = [value] if isinstance(value, dict) else value
        if not (isinstance(parts, list) and parts and all(isinstance(part, dict) for part in parts)):
            return checked_prompts(value)
        if len(parts) > MAX_IMAGES:
            raise ValueError(f"holds more than {MAX_IMAGES} images; send fewer")
        if any(part.get("type") != "image_url" for part in parts):
            raise ValueError('holds a part that is no image: {"type": "image_url", "image_url": {"url": "data:…"}}')
        return [ImagePart.model_validate(part) for part in parts]

    @model_validator(mode="after")
    def _check_count(self) -> Self:
        if len(self.prompts) > MAX_INPUTS:
            raise InvalidRequest(f"'input' holds more than {MAX_INPUTS} inputs. Send fewer.", param="input")
        return self

    @property
    def prompts(self) -> list[Prompt]:
        return list(self.urls) if self.has_images else one_by_one(self.input)

    @property
    def has_images(self) -> bool:
        """Whether it says itself that its inputs are images."""
        return isinstance(self.input, list) and isinstance(self.input[0], ImagePart)

    @property
    def has_texts(self) -> bool:
        """Whether it says itself that its inputs are texts."""
        return False

    @property
    def urls(self) -> list[str]:
        """The inputs as addresses of images. Raises InvalidRequest where they are token ids."""
        given = [self.input] if isinstance(self.input, str) else self.input
        urls = [each.url if isinstance(each, ImagePart) else each for each in given]
        if not all(isinstance(url, str) for url in urls):
            raise InvalidRequest("This server's model sees images. 'input' holds token ids.", param="input")
        return [url for url in urls if isinstance(url, str)]


class PoolRequest(InputsRequest):
    """A body whose prompts become one vector each."""

    pooling: Pooling | None = Field(default=None, description="What becomes of a prompt's tokens.")

    @property
    def chosen_pooling(self) -> Pooling | None:
        return self.pooling or super().chosen_pooling
