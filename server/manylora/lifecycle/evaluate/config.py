"""What an evaluation is told."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from manylora.lifecycle.data.files import Reading
from manylora.lifecycle.parameters import DeviceName, DtypeName, Render, TrainTask


@dataclass(frozen=True, slots=True)
class EvaluateRequest:
    """With `server`, `adapters` are names there; otherwise folders."""

    data: Annotated[Path, "Held-out rows: .jsonl, .json, .csv, .tsv or .parquet, or a folder of those or of images"]
    adapters: Annotated[tuple[str, ...], "A folder, or with `server` NAME or NAME@VERSION"] = ()
    with_base: Annotated[bool, "The bare base too, as the reference"] = False
    server: Annotated[str, "URL of a running server; without it, in this process"] = ""
    key: Annotated[str, "API key for `server`"] = ""
    metrics: Annotated[tuple[str, ...], "Comma-separated; those that fit the data when left out"] = ()
    max_tokens: Annotated[int, "Longest answer in tokens"] = 64
    out: Annotated[Path | None, "Folder for evaluate.json and the confusion matrices"] = None
    promote_if_better: Annotated[str, "Metric by which the last of `adapters` becomes active"] = ""
    min_gain: Annotated[float, "Least gain over the active version, in the metric's unit"] = 0.0
    model: Annotated[str | None, "The base; the default model when left out"] = None
    max_length: Annotated[int, "Tokens of an example; longer prompts are cut on the left"] = 1024
    render: Annotated[Render, "How a row becomes text: chat (the base's template), plain, or auto"] = "auto"
    instruction: Annotated[str, "Text before every prompt, on a line of its own"] = ""
    reading: Reading = field(default_factory=Reading)
    task: Annotated[TrainTask, "What the adapters do: generate, or one of the tasks of training"] = "generate"
    tool_prompt: Annotated[bool, "Tell a base whose template knows no tools of them in words, as a server does"] = False
    seed: Annotated[int, "Decides the resampling of intervals and tests"] = 0
    device: Annotated[DeviceName, "auto, cpu or cuda"] = "auto"
    dtype: Annotated[DtypeName, "The base's: auto, bfloat16, float16 or float32"] = "auto"
    card: Annotated[bool, "Write the scores into the README.md of each folder of `adapters`"] = False
    resume: Annotated[bool, "Go on where an interrupted evaluation with this `out` stopped"] = False
    overwrite: Annotated[bool, "Replace `out`"] = False
