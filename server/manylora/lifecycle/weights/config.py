"""What the commands on weights are told, and their checks: everything that can be refused before a file is read."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final, Literal, get_args

from manylora.lifecycle.output import refuse_existing
from manylora.lifecycle.parameters import InvalidParameter

AUTO, DEFAULT, NONE = "auto", "default", "none"
Method = Literal["linear", "cat", "svd", "ties", "dare_ties"]
METHODS: tuple[Method, ...] = get_args(Method)
DTYPES: Final = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True)
class ExtractConfig:
    """`base` None is the default model. Exactly one of `rank` and `energy`."""

    tuned: Annotated[str, "The full fine-tune: a folder or a Hugging Face id"]
    out: Annotated[Path, "Folder for the adapter"]
    base: Annotated[str | None, "The base: a folder, a GGUF file, a Hugging Face id, or `default`"] = None
    rank: Annotated[int | None, "Rank of every module"] = None
    energy: Annotated[float | None, "Share of each module's ‖ΔW‖² to keep, instead of `rank`"] = None
    dtype: Annotated[str, "float32, bfloat16 or float16"] = "float32"
    base_name: Annotated[str | None, "The base's name in the adapter's config"] = None
    command: str = ""


@dataclass(frozen=True, slots=True)
class CompressConfig:
    """Exactly one of `rank` and `energy` (the share of ‖ΔW‖² to keep in each module). dtype None: the source's."""

    adapter: Annotated[Path, "An adapter's folder"]
    out: Annotated[Path, "Folder for the smaller adapter"]
    rank: Annotated[int | None, "Rank of every module"] = None
    energy: Annotated[float | None, "Share of each module's ‖ΔW‖² to keep, instead of `rank`"] = None
    dtype: Annotated[str | None, "float32, bfloat16 or float16; the source's when left out"] = None
    command: str = ""


@dataclass(frozen=True, slots=True)
class MergeConfig:
    """`adapters` are folders with their weights. `into_base` False makes one adapter of several.

    `rank` is the merged adapter's (None: the sum of the ranks, which loses nothing); `density` is for ties and
    dare_ties. A merged adapter is verified on the base that its parts name where that is on this machine, or on
    `verify_on` (a model, `default`, or `none`).
    """

    adapters: Annotated[tuple[tuple[Path, float], ...], "FOLDER or FOLDER:WEIGHT"]
    out: Annotated[Path, "Folder for the checkpoint or the adapter"]
    into_base: bool = True
    base: str | None = None
    method: Annotated[Method, "linear, cat, svd, ties or dare_ties"] = "linear"
    rank: Annotated[int | None, "Rank of the merged adapter"] = None
    density: Annotated[float, "Share of entries that ties and dare_ties keep"] = 0.5
    dtype: Annotated[str | None, "float32, bfloat16 or float16; the source's when left out"] = None
    seed: Annotated[int, "Decides what dare_ties drops"] = 0
    verify_on: Annotated[
        str, "Base to verify a merged adapter on: a model, `default`, `none`; auto: the adapters' own"
    ] = AUTO
    command: str = ""


@dataclass(frozen=True, slots=True)
class InspectConfig:
    """`base` adds norms relative to W: a model, `default`, `none`, or `auto`: the one that the adapter names, where it
    is on this machine. `against`, another adapter's folder, adds similarities.
    """

    adapter: Annotated[Path, "An adapter's folder"]
    against: Annotated[Path | None, "Another adapter of the same base"] = None
    base: Annotated[str, "Whose weights ‖ΔW‖ is relative to: a model, `default`, `none`; auto: the adapter's own"] = (
        AUTO
    )


def check_rank_or_energy(rank: int | None, energy: float | None) -> None:
    """Raises InvalidRequest unless one of the two is given, and in range."""
    if (rank is None) == (energy is None):
        raise InvalidParameter("Give either `rank` or `energy`.")
    if rank is not None and rank < 1:
        raise InvalidParameter(f"`rank` must be at least 1, not {rank}.")
    if energy is not None and not 0 < energy <= 1:
        raise InvalidParameter(f"`energy` is a share between 0 and 1, not {energy:g}.")


def check_dtype(name: str | None) -> None:
    """Raises InvalidParameter for a number format that an adapter cannot have; None is whatever the source has."""
    if name is not None and name not in DTYPES:
        raise InvalidParameter(f"`dtype` must be one of {', '.join(DTYPES)}, not {name!r}.")


def parse_adapter(text: str) -> tuple[Path, float]:
    """`folder` or `folder:weight`. Raises InvalidRequest for a weight that is no number."""
    head, colon, tail = text.rpartition(":")
    if not colon or Path(text).exists():
        return Path(text), 1.0
    try:
        weight = float(tail)
    except ValueError as error:
        raise InvalidParameter(f"`adapters` {text}: {tail!r} is not a weight; write FOLDER:0.5.") from error
    if not math.isfinite(weight):
        raise InvalidParameter(f"`adapters` {text}: a weight must be a finite number.")
    return Path(head), weight


def check_merge(config: MergeConfig, *, overwrite: bool) -> None:
    """Raises InvalidRequest for arguments that do not go together or are out of range."""
    if config.method not in METHODS:
        raise InvalidParameter(f"`method` must be one of {', '.join(METHODS)}, not {config.method!r}.")
    if not config.adapters:
        raise InvalidParameter("Nothing to merge: give `adapters`.")
    if not config.into_base and len(config.adapters) < 2:
        raise InvalidParameter("Merging adapters into one needs at least two `adapters`; for the base give `base`.")
    if config.rank is not None and (config.rank < 1 or config.into_base):
        raise InvalidParameter("`rank` is the merged adapter's rank: at least 1, and not together with `base`.")
    if config.method == "svd" and config.rank is None and not config.into_base:
        raise InvalidParameter("`method` svd needs the `rank` to keep.")
    if not 0 < config.density <= 1:
        raise InvalidParameter(f"`density` is a share between 0 and 1, not {config.density:g}.")
    check_dtype(config.dtype)
    refuse_existing(config.out, overwrite=overwrite)
