// The tiles on top, the meters, the list of errors.

import { byId, copy, h, setText } from "./dom.js";
import { ago, bytes, clock, count, ms, msParts, percent, rate } from "./format.js";

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
    this.tokens = tile("Throughput");
    this.requests = tile("Requests");
    this.running = tile("In the batch");
    this.ttft = tile("TTFT p95");
    this.tpot = tile("TPOT p95");
    this.failed = tile("Failed");
    const all = [this.tokens, this.requests, this.running, this.ttft, this.tpot, this.failed];
    byId("tiles").replaceChildren(...all.map((one) => one.box));
  }

  show(stats) {
    const { rates, live, totals } = stats;
    this.tokens.set(rate(rates.completion_tokens_per_s), "tokens/s", `${count(totals.completion_tokens)} since start`);
    this.requests.set(rate(rates.requests_per_s), "per s", `${count(totals.requests)} since start`);
    const waiting = stats.waiting + stats.waiting_for_adapter;
    const queue = waiting === 0 ? "nobody waits" : `${count(waiting)} waiting, ${count(stats.waiting_for_adapter)} for an adapter`;
    this.running.set(count(stats.running), stats.running === 1 ? "sequence" : "sequences", queue, waiting > stats.running && waiting > 8 ? "warn" : "");
    this.ttft.set(...msParts(live.ttft_ms.p95), `p50 ${ms(live.ttft_ms.p50)} · p99 ${ms(live.ttft_ms.p99)}`);
    this.tpot.set(...msParts(live.tpot_ms.p95), `p50 ${ms(live.tpot_ms.p50)} · p99 ${ms(live.tpot_ms.p99)}`);
    const { error = 0, rejected = 0 } = totals.outcomes;
    this.failed.set(count(error), error === 1 ? "error" : "errors", `${count(rejected)} turned away`, error > 0 ? "bad" : "");
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
    this.blocks = meter("KV cache blocks");
    this.slots = meter("Adapter slots");
    this.prefix = meter("Prompt from prefix cache");
    this.queue = meter("Waiting");
    this.memory = meter("Host memory of adapters");
    this.preemptions = meter("Preemptions");
    const all = [this.blocks, this.slots, this.prefix, this.queue, this.memory, this.preemptions];
    byId("meters").replaceChildren(...all.map((one) => one.box));
  }

  show(stats) {
    const { totals, latency } = stats;
    const share = (used, total) => (total > 0 ? used / total : 0);
    this.blocks.set(`${count(stats.kv_blocks_used)} of ${count(stats.kv_blocks_total)}`, share(stats.kv_blocks_used, stats.kv_blocks_total), `${percent(stats.kv_blocks_used, stats.kv_blocks_total)} held by sequences`, true);
    this.slots.set(`${count(stats.slots_resident)} of ${count(stats.slots_total)}`, share(stats.slots_resident, stats.slots_total), `${count(stats.slots_used)} in use, ${bytes(stats.device_tier_bytes)} on the device`);
    this.prefix.set(percent(totals.prefix_cache_hit_tokens, totals.prompt_tokens), null, `${count(totals.prefix_cache_hit_tokens)} of ${count(totals.prompt_tokens)} prompt tokens`);
    this.queue.set(count(stats.waiting + stats.waiting_for_adapter), null, `queue wait p95 ${ms(latency.queue_ms.p95)}`);
    this.memory.set(bytes(stats.host_tier_bytes), null, "ready to be copied to the device");
    this.preemptions.set(count(stats.preemptions), null, stats.steps === undefined ? "" : `${count(stats.steps)} engine steps`);
  }
}

export function showErrors(errors, now) {
  const list = byId("errors");
  setText(byId("errors-count"), errors.length ? `newest ${errors.length}` : "");
  byId("errors-empty").hidden = errors.length > 0;
  const newest = errors.length ? `${errors.length} ${errors[0].request_id} ${errors[0].at}` : "";
  if (list.dataset.newest === newest) {
    list.querySelectorAll("time").forEach((time) => setText(time, ago(Number(time.dataset.at), now)));
    return;
  }
  list.dataset.newest = newest;
  list.replaceChildren(...errors.map((error) => h("li", {},
    h("time", { data: { at: error.at }, title: clock(error.at) }, ago(error.at, now)),
    h("code", { class: "code" }, error.code || "error"),
    h("span", { class: "subject" }, [error.tenant, error.adapter ?? "base"].filter(Boolean).join(" · ")),
    h("span", { class: "message" }, error.message),
    h("button", { type: "button", class: "quiet request", title: "Copy the request's id, which log lines have too", onclick: () => copy(error.request_id, "The request's id is copied.") }, error.request_id),
  )));
}
