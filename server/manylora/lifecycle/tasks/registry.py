"""The tasks by name. `generate`, which writes, is none of them."""

from collections.abc import Mapping
from typing import Final

from manylora.lifecycle.parameters import TrainTask
from manylora.lifecycle.tasks.images import Images
from manylora.lifecycle.tasks.interface import Task
from manylora.lifecycle.tasks.labels import Labelling
from manylora.lifecycle.tasks.questions import Questions
from manylora.lifecycle.tasks.speech import Speech
from manylora.lifecycle.tasks.tags import Tagging
from manylora.lifecycle.tasks.vectors import Vectors

__all__ = ["TASKS"]

TASKS: Final[Mapping[TrainTask, Task]] = {
    "classify": Labelling(),
    "token": Tagging(),
    "question": Questions(),
    "embed": Vectors(),
    "asr": Speech(),
    "image": Images(),
}
