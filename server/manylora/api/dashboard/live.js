// The tiles on top and the meters.

import { byId, h, setText } from "./dom.js";
import { bytes, count, ms, msParts, percent, rate } from "./format.js";
import { t } from "./words.js";

function tile(label) {
  const number = h("span", { class: "number" }, "–");
  const unit = h("span", { class: "unit" });
  const note = h("span", { class: "note" });
  const box = h("div", { class: "tile" }, h("dt", {}, label), h("dd", {}, h("span", { class: "reading" }, number, unit), note));
  return {
    box,
    set(value, unitText, noteText, state = "") {
      setText(number, value);
      setText(unit, unitText);
      setText(note, noteText);
      box.dataset.state = state;
    },
  };
}

export class Tiles {
  constructor() {
    this.tokens = tile(t("tile.throughput"));
    this.requests = tile(t("tile.requests"));
    this.running = tile(t("tile.batch"));
    this.ttft = tile(t("tile.ttft"));
    this.tpot = tile(t("tile.tpot"));
    this.failed = tile(t("tile.failed"));
    const all = [this.tokens, this.requests, this.running, this.ttft, this.tpot, this.failed];
    byId("tiles").replaceChildren(...all.map((one) => one.box));
  }

  show(stats) {
    const { rates, live, totals } = stats;
    this.tokens.set(rate(rates.completion_tokens_per_s), t("unit.tokens_s"), t("tile.since_start", { value: count(totals.completion_tokens) }));
    this.requests.set(rate(rates.requests_per_s), t("unit.per_s"), t("tile.since_start", { value: count(totals.requests) }));
    const waiting = stats.waiting + stats.waiting_for_adapter;
    const queue = waiting === 0 ? t("tile.nobody_waits") : t("tile.waiting", { value: count(waiting), part: count(stats.waiting_for_adapter) });
    this.running.set(count(stats.running), t("unit.sequences", { n: stats.running }), queue, waiting > stats.running && waiting > 8 ? "warn" : "");
    this.latency(this.ttft, live, stats.latency, "ttft_ms");
    this.latency(this.tpot, live, stats.latency, "tpot_ms");
    const { error = 0, rejected = 0 } = totals.outcomes;
    this.failed.box.hidden = error + rejected === 0;
    this.failed.set(count(error), t("unit.errors", { n: error }), t("tile.turned_away", { value: count(rejected) }), error > 0 ? "bad" : "");
  }

  /** Of the last half minute; while nothing runs, of the last five; a tile without either is not shown. */
  latency(one, live, recent, name) {
    const isLive = live[name].p95 !== null;
    const times = (isLive ? live : recent)[name];
    one.box.hidden = times.p95 === null;
    const note = `p50 ${ms(times.p50)} · p99 ${ms(times.p99)}`;
    one.set(...msParts(times.p95), isLive ? note : t("tile.of_5_min", { note }));
  }
}

function meter(label) {
  const value = h("span", { class: "value" });
  const note = h("span", { class: "note" });
  const bar = h("div", { class: "bar", role: "meter", "aria-label": label, "aria-valuemin": 0, "aria-valuemax": 100 }, h("span", { class: "bar-fill" }));
  const box = h("div", { class: "meter" }, h("dt", {}, label), h("dd", {}, value, bar, note));
  return {
    box,
    set(valueText, part, noteText, isPressing = false) {
      setText(value, valueText);
      setText(note, noteText);
      bar.hidden = part === null;
      if (part === null) return;
      const share = Math.max(0, Math.min(1, part));
      bar.setAttribute("aria-valuenow", Math.round(share * 100));
      bar.setAttribute("aria-valuetext", valueText);
      bar.firstElementChild.style.setProperty("--share", share);
      bar.dataset.state = isPressing && share > 0.8 ? (share > 0.95 ? "bad" : "warn") : "";
    },
  };
}

export class Meters {
  constructor() {
    this.blocks = meter(t("meter.blocks"));
    this.slots = meter(t("slots.title"));
    this.prefix = meter(t("meter.prefix"));
    this.queue = meter(t("meter.waiting"));
    this.memory = meter(t("meter.host"));
    this.preemptions = meter(t("meter.preemptions"));
    const all = [this.blocks, this.slots, this.prefix, this.queue, this.memory, this.preemptions];
    byId("meters").replaceChildren(...all.map((one) => one.box));
  }

  show(stats) {
    const { totals, latency } = stats;
    const share = (used, total) => (total > 0 ? used / total : 0);
    const of = (part, whole) => t("count.of", { part: count(part), whole: count(whole) });
    this.blocks.set(of(stats.kv_blocks_used, stats.kv_blocks_total), share(stats.kv_blocks_used, stats.kv_blocks_total), t("meter.held", { value: percent(stats.kv_blocks_used, stats.kv_blocks_total) }), true);
    this.slots.set(of(stats.slots_resident, stats.slots_total), share(stats.slots_resident, stats.slots_total), t("meter.in_use", { value: count(stats.slots_used), size: bytes(stats.device_tier_bytes) }));
    this.prefix.set(percent(totals.prefix_cache_hit_tokens, totals.prompt_tokens), null, t(stats.snapshots?.total ? "meter.snapshots" : "meter.prompt_tokens", { value: of(totals.prefix_cache_hit_tokens, totals.prompt_tokens), copies: of(stats.snapshots?.used, stats.snapshots?.total), size: bytes(stats.snapshots?.bytes ?? 0) }));
    this.queue.set(count(stats.waiting + stats.waiting_for_adapter), null, latency.queue_ms.p95 === null ? "" : t("meter.queue_wait", { value: ms(latency.queue_ms.p95) }));
    this.memory.set(bytes(stats.host_tier_bytes), null, t("meter.ready_to_copy"));
    this.preemptions.set(count(stats.preemptions), null, stats.steps === undefined ? "" : t("meter.steps", { value: count(stats.steps) }));
  }
}
