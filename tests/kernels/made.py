"""What torch's operations make while they are watched."""

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


@dataclass(frozen=True)
class Tensor:
    """One that `operation` returned."""

    operation: str
    shape: tuple[int, ...]
    nbytes: int


class Made(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes each tensor that an operation returns, but for views of others."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        if isinstance(result, torch.Tensor) and not func.is_view:
            self.found.append(Tensor(func.overloadpacket.__name__, tuple(result.shape), result.nbytes))
        return result
