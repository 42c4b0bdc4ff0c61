"""The parts of the dashboard: queries, and panels of a few kinds that look alike."""

from typing import Any

Panel = dict[str, Any]

SERVER = 'job=~"$job", instance=~"$instance"'
CALLER = f'{SERVER}, tenant=~"$tenant", adapter=~"$adapter"'
ERROR, ANSWERED = ', outcome="error"', ', outcome=~"ok|error"'
TOKENS_PER_S = "suffix: tok/s"
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
COLUMNS = 24
GREEN, BLUE, PURPLE, YELLOW, ORANGE, RED, GREY = (
    "#3f9c6b", "#3b7dd8", "#8561c5", "#d9a52b", "#e07b39", "#d64545", "#8a8f98",
)  # fmt: skip
QUANTILES = (("p50", 0.5, GREEN), ("p95", 0.95, BLUE), ("p99", 0.99, PURPLE))
OUTCOME_COLOURS = {"ok": GREEN, "cancelled": GREY, "invalid": YELLOW, "rejected": ORANGE, "error": RED}


# queries


def rate(metric: str, where: str = CALLER, *, extra: str = "") -> str:
    return f"rate(manylora_{metric}{{{where}{extra}}}[$__rate_interval])"


def total(metric: str, by: str = "", where: str = CALLER, *, extra: str = "") -> str:
    """The sum of a counter's rate."""
    return f"sum {f'by ({by}) ' if by else ''}({rate(metric, where, extra=extra)})"


def quantile(q: float, metric: str, by: str = "", where: str = CALLER, *, over: str = "$__rate_interval") -> str:
    labels = ", ".join(label for label in (by, "le") if label)
    return f"histogram_quantile({q}, sum by ({labels}) (rate(manylora_{metric}_bucket{{{where}}}[{over}])))"


def ratio(part: str, whole: str) -> str:
    return f"{part} / {whole}"


def busiest(query: str) -> str:
    return f"topk($top, {query})"


def in_range(metric: str, by: str, *, extra: str = "") -> str:
    """A counter's growth over the whole time shown, for tables."""
    return f"sum by ({by}) (increase(manylora_{metric}{{{CALLER}{extra}}}[$__range]))"


# panels


def target(expr: str, legend: str = "", ref: str = "A", **more: Any) -> dict[str, Any]:
    return {"datasource": SOURCE, "expr": expr, "legendFormat": legend, "refId": ref, "range": True, **more}


def targets(*pairs: tuple[str, str]) -> list[dict[str, Any]]:
    """From (query, legend) pairs."""
    return [target(expr, legend, chr(ord("A") + number)) for number, (expr, legend) in enumerate(pairs)]


def colour(name: str, value: str) -> dict[str, Any]:
    fixed = {"mode": "fixed", "fixedColor": value}
    return {"matcher": {"id": "byName", "options": name}, "properties": [{"id": "color", "value": fixed}]}


def thresholds(*steps: tuple[float | None, str]) -> dict[str, Any]:
    return {"mode": "absolute", "steps": [{"color": hue, "value": value} for value, hue in steps]}


def base(kind: str, title: str, what: str, unit: str, width: int, height: int) -> Panel:
    return {
        "type": kind,
        "title": title,
        "description": what,
        "datasource": SOURCE,
        "gridPos": {"x": 0, "y": 0, "w": width, "h": height},
        "fieldConfig": {"defaults": {"unit": unit, "min": 0}, "overrides": []},
    }


def lines(
    title: str,
    what: str,
    unit: str,
    *queries: tuple[str, str],
    colours: dict[str, str] | None = None,
    width: int = 8,
    stacked: bool = False,
    most: float | None = None,
) -> Panel:
    """A graph over time. `stacked` fills it; `most` fixes the top of the axis."""
    panel = base("timeseries", title, what, unit, width, 8)
    defaults = panel["fieldConfig"]["defaults"]
    defaults["custom"] = {
        "drawStyle": "line",
        "lineWidth": 1 if stacked else 2,
        "fillOpacity": 40 if stacked else 8,
        "showPoints": "never",
        "spanNulls": False,
        "stacking": {"mode": "normal" if stacked else "none", "group": "A"},
    }
    if most is not None:
        defaults["max"] = most
    panel["fieldConfig"]["overrides"] = [colour(name, value) for name, value in (colours or {}).items()]
    panel["options"] = {
        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": []},
        "tooltip": {"mode": "multi", "sort": "desc"},
    }
    return {**panel, "targets": targets(*queries)}


def quantiles(title: str, what: str, metric: str, *, where: str = CALLER, width: int = 8) -> Panel:
    queries = [(quantile(q, metric, where=where), name) for name, q, _ in QUANTILES]
    return lines(title, what, "s", *queries, colours={name: hue for name, _, hue in QUANTILES}, width=width)


def number(
    title: str, what: str, unit: str, query: str, *steps: tuple[float, str], first: str = GREEN, width: int = 3
) -> Panel:
    """One figure, the last one, with a small graph behind it. `steps` colour it from a value on."""
    panel = base("stat", title, what, unit, width, 4)
    defaults = panel["fieldConfig"]["defaults"]
    defaults["color"] = {"mode": "thresholds"}
    defaults["thresholds"] = thresholds((None, first), *steps)
    defaults["noValue"] = "–"
    panel["options"] = {
        "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
        "colorMode": "value",
        "graphMode": "area",
        "justifyMode": "auto",
        "orientation": "auto",
        "textMode": "auto",
    }
    return {**panel, "targets": targets((query, ""))}


def heatmap(title: str, what: str, metric: str, *, width: int = 8) -> Panel:
    panel = base("heatmap", title, what, "s", width, 8)
    panel["fieldConfig"] = {"defaults": {}, "overrides": []}
    panel["options"] = {
        "calculate": False,
        "cellGap": 1,
        "color": {"mode": "scheme", "scheme": "Blues", "steps": 64, "exponent": 0.5, "reverse": False},
        "yAxis": {"unit": "s", "axisPlacement": "left"},
        "legend": {"show": True},
        "tooltip": {"show": True, "yHistogram": False},
    }
    query = f"sum by (le) (increase(manylora_{metric}_bucket{{{CALLER}}}[$__rate_interval]))"
    return {**panel, "targets": [target(query, "{{le}}", format="heatmap")]}


def table(title: str, what: str, key: str, *columns: tuple[str, str, str]) -> Panel:
    """One row for each value of the label `key`; columns are (name, unit, query). Sorted by the first."""
    panel = base("table", title, what, "short", COLUMNS, 9)
    found = [
        target(query, "", chr(ord("A") + number), format="table", instant=True, range=False)
        for number, (_, _, query) in enumerate(columns)
    ]
    names = {f"Value #{one['refId']}": name for one, (name, _, _) in zip(found, columns, strict=True)}
    panel["fieldConfig"]["overrides"] = [
        {"matcher": {"id": "byName", "options": name}, "properties": [{"id": "unit", "value": unit}]}
        for name, unit, _ in columns
    ]
    panel["options"] = {
        "showHeader": True,
        "cellHeight": "sm",
        "sortBy": [{"displayName": columns[0][0], "desc": True}],
    }
    panel["transformations"] = [
        {"id": "joinByField", "options": {"byField": key, "mode": "outer"}},
        {
            "id": "organize",
            "options": {
                "excludeByName": {"Time": True, **{f"Time {n}": True for n in range(1, len(columns) + 1)}},
                "renameByName": names,
            },
        },
    ]
    return {**panel, "targets": found}
