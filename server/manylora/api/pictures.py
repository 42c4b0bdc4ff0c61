"""Images in a body become what the engine is asked for, decoded and prepared beside the event loop.

They come within the body, as data URLs. An address is never fetched: it would be asked for from inside of the network
that the server is in.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal

from pydantic import Field

from manylora.api.lanes import MEDIA
from manylora.api.strict import Strict
from manylora.errors import InvalidImage, InvalidRequest
from manylora.images.picture import Picture, Vision
from manylora.images.urls import data_of

__all__ = ["ImagePart", "of_messages", "pictures_of"]

MAX_IMAGES: Final = 64


class ImageUrl(Strict):
    """`image_url` of a part. `detail` can be what OpenAI's clients send by themselves."""

    url: str
    detail: Literal["auto"] | None = None


class ImagePart(Strict):
    """One image of a body: an `image_url` part of a chat."""

    type: Literal["image_url"]
    image_url: ImageUrl | str = Field(description="A data URL: data:image/png;base64,…")

    @property
    def url(self) -> str:
        return self.image_url if isinstance(self.image_url, str) else self.image_url.url


def of_messages(raw: Any) -> Any:
    """A body that holds its image in a chat, as vLLM takes it, with the image as its `input`; any other as it is.

    Raises InvalidRequest where there is more in the chat than one image.
    """
    messages = raw.get("messages") if isinstance(raw, dict) and "input" not in raw else None
    if not isinstance(messages, list):
        return raw
    contents = [message.get("content") for message in messages if isinstance(message, dict)]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    images = [part for part in parts if _kind(part) == "image_url"]
    if not images:
        return raw
    if len(messages) != 1 or len(parts) != 1:
        raise InvalidRequest(
            "'messages' with an image must be one message of one image_url part: what is beside it would not be seen.",
            param="messages",
        )
    return {**{name: value for name, value in raw.items() if name != "messages"}, "input": images}


def _kind(part: object) -> object:
    return part.get("type") if isinstance(part, Mapping) else None


async def pictures_of(urls: Sequence[str], vision: Vision, tenant: str, param: str) -> list[Picture]:
    """What the model sees of each image. Raises InvalidRequest, or QueueFull where too many of the tenant's wait."""
    if len(urls) > MAX_IMAGES:
        raise InvalidRequest(f"'{param}' holds more than {MAX_IMAGES} images. Send fewer.", param=param)
    found: list[Picture] = []
    for number, url in enumerate(urls):
        try:
            found.append(await MEDIA.run(tenant, _picture, url, vision))
        except InvalidImage as error:
            where = f"'{param}'" if len(urls) == 1 else f"'{param}', number {number}"
            raise InvalidImage(f"{where}: {error.message}", param=param) from None
    return found


def _picture(url: str, vision: Vision) -> Picture:
    return vision.picture(data_of(url))
