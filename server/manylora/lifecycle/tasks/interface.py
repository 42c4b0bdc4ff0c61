"""What a training and an evaluation do otherwise for each task that is not writing."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from manylora.lifecycle.base import Base
from manylora.lifecycle.data.data import Dataset
from manylora.lifecycle.data.encoding import Encoded
from manylora.lifecycle.parameters import DeviceName, DtypeName
from manylora.lifecycle.train.objectives import Objective

__all__ = ["Measured", "Metric", "Numbers", "Source", "Task", "TaskBase"]

Numbers: TypeAlias = NDArray[np.int64]
Metric: TypeAlias = Callable[[Numbers], float]
"""A figure of the examples with these indices, any of them perhaps several times."""


@dataclass(frozen=True, slots=True)
class Source:
    """Which base is loaded, how, and as what it is named. `seed` decides the first weights of a head."""

    model: str | None
    name: str | None = None
    device: DeviceName = "auto"
    dtype: DtypeName = "auto"
    seed: int = 0


@dataclass(frozen=True, slots=True)
class TaskBase(Base):
    """A base that an adapter of a task is put on, out of `folder`.

    `peft_task` is the task in PEFT's words, `whole` the layers of a head that are learnt whole, of which the base has
    none, and `labels` what the head's outputs mean; both are empty without a head.
    """

    folder: Path
    peft_task: str | None = None
    whole: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()

    @property
    def has_answers(self) -> bool:
        """Whether the bare base does the task, too: without a head it does."""
        return not self.whole


@dataclass(frozen=True, slots=True)
class Measured:
    """How an adapter did on some units (texts, words, questions, files): each metric as a function of which of them.

    `detail` is told beside the metrics, in a report: JSON.
    """

    count: int
    metrics: Mapping[str, Metric]
    detail: Mapping[str, Any] = field(default_factory=dict)

    def values(self) -> dict[str, float]:
        """Each metric of all units."""
        return {name: metric(np.arange(self.count)) for name, metric in self.metrics.items()}


class Task(Protocol):
    """A task with rows of one shape. Its loss is the mean over `unit`s; of `lower` metrics less is better."""

    @property
    def unit(self) -> str: ...

    @property
    def lower(self) -> frozenset[str]: ...

    def labels(self, dataset: Dataset) -> tuple[str, ...]:
        """What a new head's outputs are to mean; empty where they mean no labels."""
        ...

    def load(self, source: Source, labels: tuple[str, ...]) -> TaskBase:
        """The base, frozen, with a new head where there is one. Raises InvalidParameter for one that cannot be used."""
        ...

    def encode(self, dataset: Dataset, source: Source, max_length: int) -> list[Encoded]:
        """Every row, one after the other, as a request of the server is encoded. Raises InvalidParameter."""
        ...

    def objective(self, model: Any, base: TaskBase) -> Objective: ...

    def measured(self, model: Any, base: TaskBase, examples: Sequence[Encoded]) -> Measured:
        """How the model does on examples that have been encoded."""
        ...
