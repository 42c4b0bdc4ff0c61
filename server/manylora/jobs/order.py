"""What a job is told to train, as JSON: in the job's row, and in the folder of the process that trains."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

from manylora.lifecycle.parameters import Method, Render
from manylora.lifecycle.train.config import LoraShape, Schedule, TrainConfig

__all__ = ["ORDER_FILE", "REPORT_FILE", "START_FOLDER", "Activate", "Order"]

ORDER_FILE: Final = "order.json"  # in the folder of the process that trains
REPORT_FILE: Final = "train.json"
START_FOLDER: Final = "start"  # beside the order: the adapter that the training goes on from

Activate: TypeAlias = Literal["never", "always", "if_better"]


@dataclass(frozen=True, slots=True)
class Order:
    """A training without what depends on where it runs: no path, no device, no number of threads."""

    lora: LoraShape = field(default_factory=LoraShape)
    schedule: Schedule = field(default_factory=Schedule)
    render: Render = "auto"
    instruction: str = ""
    tool_prompt: bool = False
    max_length: int = 1024
    method: Method = "supervised"
    beta: float = 0.1
    sample: int = 0

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of(cls, told: Mapping[str, Any]) -> "Order":
        """Also of an earlier release's, which says nothing of what came later."""
        values = {one.name: told[one.name] for one in fields(cls) if one.name in told}
        lora: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in told["lora"].items()
        }
        return cls(**{**values, "lora": LoraShape(**lora), "schedule": Schedule(**told["schedule"])})

    def config(
        self, folder: Path, *, base: str | None, title: str, device: Any, threads: int, command: str = ""
    ) -> TrainConfig:
        """The training in a folder that holds `train.*` and perhaps `valid.*` and `start`, into `adapter`.

        `command` is what its card names as what made it.
        """
        held_out = next(folder.glob("valid.*"), None)
        return TrainConfig(
            data=next(folder.glob("train.*")),
            out=folder / "adapter",
            eval_data=held_out,
            base=base,
            start=start if (start := folder / START_FOLDER).is_dir() else None,
            method=self.method,
            beta=self.beta,
            sample=self.sample,
            lora=self.lora,
            schedule=self.schedule,
            render=self.render,
            instruction=self.instruction,
            tool_prompt=self.tool_prompt,
            max_length=self.max_length,
            device=device,
            threads=threads,
            title=title,
            command=command,
        )
