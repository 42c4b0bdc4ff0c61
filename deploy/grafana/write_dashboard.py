"""Writes dashboards/manylora.json, so that fifty panels agree in their filters, units and colours.

    python deploy/grafana/write_dashboard.py [FILE]

Change a panel here and run it again. The file is what Grafana reads; a test holds the two together.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from panels import (
    ANSWERED,
    BLUE,
    CALLER,
    COLUMNS,
    ERROR,
    GREEN,
    GREY,
    ORANGE,
    OUTCOME_COLOURS,
    PURPLE,
    RED,
    SERVER,
    SOURCE,
    TOKENS_PER_S,
    YELLOW,
    Panel,
    busiest,
    heatmap,
    in_range,
    lines,
    number,
    quantile,
    quantiles,
    ratio,
    table,
    total,
)

DASHBOARD = Path(__file__).parent / "dashboards" / "manylora.json"


# rows


def at_a_glance() -> list[Panel]:
    errors = ratio(total("requests_total", extra=ERROR), total("requests_total", extra=ANSWERED))
    firing = 'sum(ALERTS{alertstate="firing", alertname=~"Manylora.*"}) or vector(0)'
    return [
        number("Engines ready", "Servers whose engine steps.", "short", f"sum(manylora_engine_ready{{{SERVER}}})",
               (1, GREEN), first=RED),
        number("Alerts", "Firing now; see the alerts page of Prometheus.", "short", firing, (1, RED)),
        number("Requests", "Ended a second, whatever the outcome.", "reqps", total("requests_total"), first=BLUE),
        number("Output tokens", "Generated a second.", TOKENS_PER_S, total("completion_tokens_total"), first=BLUE),
        number("First token, p95", "Arrival to the first token.", "s", quantile(0.95, "time_to_first_token_seconds"),
               (1, YELLOW), (2.5, RED)),
        number("Next token, p95", "Between two tokens of one answer (TPOT).", "s",
               quantile(0.95, "inter_token_latency_seconds"), (0.1, YELLOW), (0.25, RED)),
        number("Errors", "Share of the requests that failed through our fault.", "percentunit", errors,
               (0.001, YELLOW), (0.01, RED)),
        number("Waiting", "Sequences that wait to be admitted.", "short",
               f"sum(manylora_requests_waiting{{{SERVER}}})", (1, YELLOW), (100, RED)),
    ]  # fmt: skip


def latency() -> list[Panel]:
    return [
        quantiles("Time to first token", "Arrival to the first token, queue and adapter loading included.",
                  "time_to_first_token_seconds"),
        quantiles("Time per output token", "Between two tokens of one answer, each gap counted.",
                  "inter_token_latency_seconds"),
        quantiles("End to end", "Arrival to the last token.", "request_duration_seconds"),
        heatmap("First tokens by time taken", "How many first tokens took how long.", "time_to_first_token_seconds"),
        quantiles("Queue wait", "Arrival to the first step, adapter loading not counted.", "queue_wait_seconds"),
        lines("Objectives", "Share of first tokens within 2.5 s, and of requests without an error of ours, by hour.",
              "percentunit",
              ('1 - job:manylora_first_tokens:slow_ratio_rate1h{job=~"$job"}', "first token within 2.5 s"),
              ('1 - job:manylora_requests:error_ratio_rate1h{job=~"$job"}', "without error"), most=1),
    ]  # fmt: skip


def traffic() -> list[Panel]:
    return [
        lines("Requests by outcome", "`invalid` is a 4xx, `rejected` a full queue, a quota or a shutdown, `cancelled` "
              "a client that left, `error` our fault.", "reqps",
              (total("requests_total", "outcome"), "{{outcome}}"), colours=OUTCOME_COLOURS, stacked=True),
        lines("Tokens", "Computed and generated a second.", TOKENS_PER_S,
              (total("prompt_tokens_total"), "prompt"), (total("completion_tokens_total"), "output"),
              (total("prefix_cache_hit_tokens_total"), "prompt, from the prefix cache"),
              colours={"prompt": BLUE, "output": GREEN, "prompt, from the prefix cache": GREY}),
        lines("In the engine", "Sequences by what they do.", "short",
              (f"sum(manylora_requests_running{{{SERVER}}})", "running"),
              (f"sum(manylora_requests_waiting{{{SERVER}}})", "waiting"),
              (f"sum(manylora_requests_waiting_for_adapter{{{SERVER}}})", "waiting for their adapter"),
              colours={"running": GREEN, "waiting": ORANGE, "waiting for their adapter": PURPLE}, stacked=True),
    ]  # fmt: skip


def by(label: str, title: str) -> list[Panel]:
    """The same panels for adapters and for tenants."""
    legend = f"{{{{{label}}}}}"
    first, gap = "time_to_first_token_seconds", "inter_token_latency_seconds"
    return [
        lines(f"Requests by {label}", f"The busiest {title}.", "reqps",
              (busiest(total("requests_total", label)), legend), stacked=True),
        lines(f"Output tokens by {label}", f"The {title} that most is generated for.", TOKENS_PER_S,
              (busiest(total("completion_tokens_total", label)), legend), stacked=True),
        lines(f"Errors by {label}", "Failed through our fault.", "reqps",
              (busiest(total("requests_total", label, extra=ERROR)), legend), stacked=True),
        lines(f"First token by {label}, p95", f"The slowest {title}.", "s",
              (busiest(quantile(0.95, first, label)), legend)),
        lines(f"Next token by {label}, p95", f"The slowest {title}.", "s",
              (busiest(quantile(0.95, gap, label)), legend)),
        lines(f"Queue wait by {label}, p95", f"The {title} that wait longest.", "s",
              (busiest(quantile(0.95, "queue_wait_seconds", label)), legend)),
        table(f"All {title}", "Over the time shown; `__other__` is everybody beyond the busiest 64.", label,
              ("requests", "short", in_range("requests_total", label)),
              ("prompt tokens", "short", in_range("prompt_tokens_total", label)),
              ("output tokens", "short", in_range("completion_tokens_total", label)),
              ("errors", "percentunit", ratio(in_range("requests_total", label, extra=ERROR),
                                              in_range("requests_total", label, extra=ANSWERED))),
              ("first token p50", "s", quantile(0.5, first, label, over="$__range")),
              ("first token p95", "s", quantile(0.95, first, label, over="$__range")),
              ("next token p95", "s", quantile(0.95, gap, label, over="$__range")),
              ("prompt from cache", "percentunit", ratio(in_range("prefix_cache_hit_tokens_total", label),
                                                         in_range("prompt_tokens_total", label)))),
    ]  # fmt: skip


def adapters_on_the_move() -> list[Panel]:
    tiers = {"device": GREEN, "host": BLUE, "disk": ORANGE}
    return [
        lines("Where adapters were", "Share of requests by the tier their adapter was in when they arrived.",
              "percentunit",
              (ratio(total("adapter_requests_by_tier_total", "tier"),
                     f"scalar({total('adapter_requests_by_tier_total')})"), "{{tier}}"),
              colours=tiers, stacked=True, most=1),
        lines("Loads", "Adapters that went up from a tier, a second.", "ops",
              (total("adapter_load_seconds_count", "tier"), "from {{tier}}"),
              colours={f"from {tier}": hue for tier, hue in tiers.items()}),
        lines("Load time, p95", "Reading from disk, copying from host memory to the device.", "s",
              (quantile(0.95, "adapter_load_seconds", "tier"), "from {{tier}}"),
              colours={f"from {tier}": hue for tier, hue in tiers.items()}),
        lines("Evictions", "Adapters that made room, a second.", "ops",
              (total("adapter_evictions_total", "tier"), "from {{tier}}"),
              colours={f"from {tier}": hue for tier, hue in tiers.items()}),
        lines("Evicted most", "Adapters that leave the device most often, with their owner.", "ops",
              (busiest(total("adapter_evictions_total", "tenant, adapter", extra=', tier="device"')),
               "{{tenant}}/{{adapter}}"), stacked=True),
        lines("Failed loads", "Since the server's start, with the adapter's owner.", "short",
              (f"sum by (tenant, adapter) (manylora_adapter_load_failures_total{{{CALLER}}})",
               "{{tenant}}/{{adapter}}"), stacked=True),
        lines("Slots", "With an adapter that running sequences use, and there are.", "short",
              (f"sum(manylora_adapter_slots_used{{{SERVER}}})", "in use"),
              (f"sum(manylora_adapter_slots_total{{{SERVER}}})", "slots"), colours={"in use": GREEN, "slots": GREY}),
        lines("Memory of adapters", "Bytes on the device and in host memory.", "bytes",
              (f"sum(manylora_device_tier_bytes{{{SERVER}}})", "device"),
              (f"sum(manylora_host_tier_bytes{{{SERVER}}})", "host"), colours=tiers),
        lines("Uploads", "By result, since the server's start.", "short",
              (f'sum by (result) (manylora_uploads_total{{{SERVER}, tenant=~"$tenant"}})', "{{result}}"),
              colours={"created": GREEN, "unchanged": GREY, "refused": YELLOW, "cancelled": ORANGE, "failed": RED},
              stacked=True),
    ]  # fmt: skip


def canaries() -> list[Panel]:
    which = "tenant, adapter, version"
    name = "{{tenant}}/{{adapter}}@{{version}}"
    failed = total("canary_requests_total", which, extra=ERROR)
    return [
        lines("Requests beside a canary", "For the name of an adapter while a version is tried.",
              "reqps", (busiest(total("canary_requests_total", which)), name), stacked=True),
        lines("Their errors", "Share of answers that failed through our fault.", "percentunit",
              (busiest(ratio(failed, total("canary_requests_total", which, extra=ANSWERED))), name)),
        lines("Their first token, p95", "By the version that answered.", "s",
              (busiest(quantile(0.95, "canary_time_to_first_token_seconds", which)), name)),
    ]  # fmt: skip


def engine() -> list[Panel]:
    where = SERVER
    steps = ratio(*(total(f"step_duration_seconds_{part}", "phase", where) for part in ("sum", "count")))
    forward = ', phase="forward"'
    return [
        lines("A step's time", "Mean of each phase.", "s", (steps, "{{phase}}"),
              colours={"schedule": GREY, "forward": BLUE, "sample": PURPLE, "deliver": GREEN}, stacked=True),
        lines("Steps", "Forward passes a second.", "ops",
              (total("step_duration_seconds_count", "instance", where, extra=forward), "{{instance}}")),
        quantiles("Forward pass", "The model's part of a step.", "step_duration_seconds", where=f"{SERVER}{forward}"),
        lines("KV blocks", "Held by sequences, and there are.", "short",
              (f"sum(manylora_kv_blocks_used{{{SERVER}}})", "held"),
              (f"sum(manylora_kv_blocks_total{{{SERVER}}})", "blocks"), colours={"held": GREEN, "blocks": GREY}),
        lines("Prefix cache", "Share of prompt tokens that were not computed again.", "percentunit",
              (ratio(total("prefix_cache_hit_tokens_total"), total("prompt_tokens_total")), "from the cache"),
              colours={"from the cache": BLUE}, most=1),
        lines("Preemptions", "Sequences put back because blocks ran out, a second.", "ops",
              (total("preemptions_total", "instance", where), "{{instance}}")),
    ]  # fmt: skip


def process() -> list[Panel]:
    def of(metric: str) -> str:
        return f"process_{metric}{{{SERVER}}}"

    return [
        lines("Processor", "Cores in use.", "short",
              (f"rate({of('cpu_seconds_total')}[$__rate_interval])", "{{instance}}"), width=6),
        lines("Memory", "Resident.", "bytes", (of("resident_memory_bytes"), "{{instance}}"), width=6),
        lines("Open files", "Files and connections.", "short", (of("open_fds"), "{{instance}}"), width=6),
        lines("Running for", "Since the last start.", "s",
              (f"time() - {of('start_time_seconds')}", "{{instance}}"), width=6),
    ]  # fmt: skip


ROWS = (
    ("At a glance", at_a_glance),
    ("Latency", latency),
    ("Traffic", traffic),
    ("By adapter", lambda: by("adapter", "adapters")),
    ("By tenant", lambda: by("tenant", "tenants")),
    ("Adapters on the move", adapters_on_the_move),
    ("Canaries", canaries),
    ("Engine", engine),
    ("Process", process),
)


# the whole


def laid_out() -> Iterator[Panel]:
    """Every panel in its place: rows of 24 columns, from left to right, from top to bottom."""
    y = 0
    ids = iter(range(1, 1000))
    for title, make in ROWS:
        yield {"type": "row", "title": title, "id": next(ids), "collapsed": False, "panels": [],
               "gridPos": {"x": 0, "y": y, "w": COLUMNS, "h": 1}}  # fmt: skip
        y += 1
        x = height = 0
        for panel in make():
            place = panel["gridPos"]
            if x + place["w"] > COLUMNS:
                x, y, height = 0, y + height, 0
            place["x"], place["y"] = x, y
            x, height = x + place["w"], max(height, place["h"])
            yield {**panel, "id": next(ids)}
        y += height


def variable(name: str, label: str, query: str) -> dict[str, Any]:
    return {
        "type": "query",
        "name": name,
        "label": label,
        "datasource": SOURCE,
        "query": query,
        "refresh": 2,
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"selected": True, "text": ["All"], "value": ["$__all"]},
    }


def variables() -> list[dict[str, Any]]:
    source = {"type": "datasource", "name": "datasource", "label": "Data source", "query": "prometheus",
              "current": {"selected": True, "text": "Prometheus", "value": "prometheus"}}  # fmt: skip
    sizes = ("5", "10", "20", "64")
    top = {
        "type": "custom",
        "name": "top",
        "label": "Busiest",
        "query": ",".join(sizes),
        "options": [{"selected": size == "10", "text": size, "value": size} for size in sizes],
        "current": {"selected": True, "text": "10", "value": "10"},
    }
    calls = 'manylora_requests_total{job=~"$job", instance=~"$instance"}'
    return [
        source,
        variable("job", "Job", "label_values(manylora_engine_ready, job)"),
        variable("instance", "Server", 'label_values(manylora_engine_ready{job=~"$job"}, instance)'),
        variable("tenant", "Tenant", f"label_values({calls}, tenant)"),
        variable("adapter", "Adapter", f"label_values({calls}, adapter)"),
        top,
    ]


def dashboard() -> dict[str, Any]:
    restarts = {
        "name": "Restarts",
        "enable": True,
        "iconColor": RED,
        "datasource": SOURCE,
        "expr": f"changes(process_start_time_seconds{{{SERVER}}}[1m]) > 0",
        "titleFormat": "{{instance}} has restarted",
    }
    return {
        "uid": "manylora",
        "title": "manylora",
        "description": "Latency, traffic and the whereabouts of adapters, per adapter and tenant.",
        "tags": ["manylora"],
        "schemaVersion": 38,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "timezone": "browser",
        "templating": {"list": variables()},
        "annotations": {"list": [restarts]},
        "links": [],
        "panels": list(laid_out()),
    }


def text() -> str:
    return json.dumps(dashboard(), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else DASHBOARD
    target.write_text(text(), encoding="utf-8")
