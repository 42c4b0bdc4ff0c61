"""How many of what a cluster has."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from manylora.errors import InvalidSettings

__all__ = ["Shape", "shape_of"]


class Shape(BaseModel):
    """A cluster's size, and the settings of its servers that do not come from the environment of their processes."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    replicas: int = Field(default=2, ge=1)
    """Replicas of the model; where they scale, the fewest."""
    max_replicas: int | None = Field(default=None, ge=1)
    """The most replicas that requests may bring about; unset: there are always as many as `replicas`."""
    target_requests: float | None = Field(default=None, gt=0)
    """Requests for each replica, running or waiting, that scaling aims at; unset: three quarters of max_num_seqs."""
    up_after_s: float = Field(default=20.0, ge=0)
    """Seconds for which there have to be too many requests before a replica is added."""
    down_after_s: float = Field(default=300.0, ge=0)
    """Seconds for which there have to be too few before one goes; its adapters' next requests find the store."""
    ingresses: int = Field(default=1, ge=1)
    """Processes that requests come in through."""
    cpus: float = Field(default=1.0, ge=0)
    """CPUs that Ray counts as taken by each replica."""
    gpus: float = Field(default=0.0, ge=0)
    """GPUs that each replica has to itself."""
    surge_percent: int = Field(default=0, ge=0, le=100)
    """By how much there may be more replicas while they are replaced; 0: one goes before its successor comes."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Settings as `manylora serve` has them."""

    @model_validator(mode="after")
    def _is_a_range(self) -> "Shape":
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ValueError(f"max_replicas is {self.max_replicas}, which is less than the {self.replicas} replicas")
        return self


def shape_of(args: dict[str, Any]) -> Shape:
    """Raises InvalidSettings, which names each fault."""
    try:
        return Shape.model_validate(args)
    except ValidationError as error:
        faults = "; ".join(
            f"{'.'.join(str(part) for part in each['loc'])}: {each['msg'].removeprefix('Value error, ')}".lstrip(": ")
            for each in error.errors()
        )
        raise InvalidSettings(f"This cluster cannot be: {faults}. See docs/cluster.md.") from error
