"""An adapter and its versions as tables for people."""

import json
from typing import Any

from manylora.cli.answers import as_time, console, in_bytes, table

__all__ = ["mixed_of", "or_dash", "show_adapter", "show_version", "show_warnings", "status_of"]


def show_adapter(found: dict[str, Any]) -> None:
    console.print(f"{found['name']} of {found['tenant']}", markup=False, style="bold")
    if found["description"]:
        console.print(found["description"], markup=False)
    rows = [
        [
            str(v["version"]),
            "active" if v["active"] else "",
            status_of(v),
            str(v["rank"]),
            mixed_of(v) or in_bytes(v["size_bytes"]),
            v["tier"],
            v["digest"][:12],
            as_time(v["created"]),
        ]
        for v in found["versions"]
    ]
    console.print(table(["version", "", "status", "rank", "size", "tier", "digest", "created"], rows))
    made = [[str(v["version"]), *cells] for v in found["versions"] if any(cells := (_data_of(v)[:12], _scores_of(v)))]
    if made:
        console.print(table(["version", "data", "scores, as its card says"], made))
    told = [[name, json.dumps(value, ensure_ascii=False)] for name, value in _defaults(found)]
    if told:
        console.print(table(["default", f"of version {found['active_version']}"], told))


def show_version(found: dict[str, Any]) -> None:
    rows = [[key, str(found[key])] for key in ("id", "tenant", "active", "pinned", "kind", "rank", "alpha")]
    rows += [
        ["status", status_of(found)],
        ["base model", or_dash(found["report"]["base_model"])],
        ["target modules", ", ".join(found["target_modules"])],
        ["modules matched", str(len(found["report"]["matched"]))],
        *([["mix of", mixed]] if (mixed := mixed_of(found)) else []),
        ["size", in_bytes(found["size_bytes"])],
        ["tier", found["tier"]],
        ["digest", found["digest"]],
        ["created", as_time(found["created"])],
        *_lineage(found),
        *([f"default {name}", json.dumps(value, ensure_ascii=False)] for name, value in _defaults(found)),
        *([] if mixed else [["effect", _effect(found["report"]["effect"])]]),
    ]
    console.print(f"{found['name']}@{found['version']}", markup=False, style="bold")
    console.print(table(["", ""], rows))
    show_warnings(found["report"]["warnings"])


def mixed_of(version: dict[str, Any]) -> str:
    """What a version is made of; empty for one with files, and from a server of an earlier release."""
    return " + ".join(f"{part['weight']:g} x {part['name']}@{part['version']}" for part in version.get("mix") or ())


def status_of(found: dict[str, Any]) -> str:
    """Of an adapter or a version, in words."""
    if found["status"] == "other_base":
        return "made for another base"
    if found["status"] == "missing_part":
        return "a mix that lacks an adapter"
    facts = found.get("report", found)
    return f"names {facts['base_model']}" if facts["base_model_differs"] else or_dash(found["status"])


def _defaults(found: dict[str, Any]) -> list[tuple[str, Any]]:
    """Of an adapter or a version; a server of an earlier release shows none."""
    return list((found.get("defaults") or {}).items())


def _lineage(version: dict[str, Any]) -> list[list[str]]:
    """What the version's card says of how it was made; a server of an earlier release says nothing."""
    said = version.get("lineage") or {}
    rows = [["made by", said.get("command", "")], ["data", _data_of(version)]]
    rows += [["held-out data", said.get("eval_sha256", "")], ["scores", _scores_of(version)]]
    return [row for row in rows if row[1]]


def _data_of(version: dict[str, Any]) -> str:
    return str((version.get("lineage") or {}).get("data_sha256", ""))


def _scores_of(version: dict[str, Any]) -> str:
    scores = (version.get("lineage") or {}).get("scores", {})
    return ", ".join(f"{name} {value:.4g}" for name, value in scores.items())


def _effect(effect: dict[str, float] | None) -> str:
    if effect is None:
        return "not measured: registered by a rescan of the store"
    return f"logits move by up to {effect['max_abs_logit_delta']:.4g}, KL {effect['kl']:.4g} nats"


def or_dash(value: object) -> str:
    return "-" if value is None else str(value)


def show_warnings(warnings: list[str]) -> None:
    for warning in warnings:
        console.print("warning:", warning, style="yellow", markup=False)
