// The table of adapters: the catalog's list joined with the traffic of the last minutes.

import { getJson } from "./api.js";
import { byId, h, icon, PIN, setText } from "./dom.js";
import { bytes, count, ms, rate } from "./format.js";
import { t, tierName } from "./words.js";

const PAGE = 1000;
const ROWS = 15;
const MOST = 10_000;
const TIERS = { device: 0, host: 1, disk: 2 };

/** Sorting compares `value`; text columns start ascending, numbers descending. */
const COLUMNS = [
  { id: "name", label: t("table.adapter"), text: true, value: (a) => a.name },
  { id: "tenant", label: t("table.tenant"), text: true, wide: true, value: (a) => a.tenant },
  { id: "version", label: t("table.version"), wide: true, value: (a) => a.version ?? 0 },
  { id: "tier", label: t("table.tier"), text: true, value: (a) => TIERS[a.tier] ?? 3 },
  { id: "pinned", label: t("table.pinned"), wide: true, value: (a) => (a.pinned ? 1 : 0) },
  { id: "requests", label: t("tile.requests"), hint: t("table.last_5_min"), value: (a) => a.requests },
  { id: "tokens", label: t("table.tokens_s"), hint: t("table.last_10_s"), value: (a) => a.tokensPerS },
  { id: "ttft", label: t("tile.ttft"), hint: t("table.last_5_min"), value: (a) => a.ttft },
  { id: "size", label: t("table.size"), wide: true, value: (a) => a.size },
];

export class AdapterTable {
  constructor(onopen) {
    this.onopen = onopen;
    this.listed = [];
    this.isCut = false;
    this.rows = new Map();
    this.sort = { id: "requests", up: false };
    this.limit = ROWS;
    this.order = [];
    this.held = { pointer: false, focus: false };
    this.stats = { adapters: [], now: 0 };
    this.head();
    const changed = () => {
      this.limit = ROWS;
      this.draw(true);
    };
    byId("filter").addEventListener("input", changed);
    byId("tier-filter").addEventListener("change", changed);
    byId("adapters-more").addEventListener("click", () => {
      this.limit += ROWS * 3;
      this.draw(true);
    });
    const body = byId("adapters-body");
    const hold = (name, is) => { this.held[name] = is; };
    body.addEventListener("pointerenter", () => hold("pointer", true));
    body.addEventListener("pointerleave", () => hold("pointer", false));
    body.addEventListener("focusin", () => hold("focus", true));
    body.addEventListener("focusout", (event) => hold("focus", body.contains(event.relatedTarget)));
  }

  head() {
    byId("adapters-head").replaceChildren(...COLUMNS.map((column) => {
      const button = h("button", { type: "button", onclick: () => this.sortBy(column) }, column.label);
      return h("th", { scope: "col", class: this.classOf(column), data: { column: column.id }, title: column.hint ?? null }, button);
    }));
    this.mark();
  }

  classOf(column) {
    return [column.text ? "text" : "number", column.wide ? "wide" : ""].join(" ").trim();
  }

  sortBy(column) {
    const same = this.sort.id === column.id;
    this.sort = { id: column.id, up: same ? !this.sort.up : Boolean(column.text) };
    this.mark();
    this.draw(true);
  }

  mark() {
    for (const th of byId("adapters-head").children) {
      const sorted = th.dataset.column === this.sort.id;
      th.setAttribute("aria-sort", sorted ? (this.sort.up ? "ascending" : "descending") : "none");
    }
  }

  /** Fetch the catalog's list, page by page. */
  async load() {
    const found = [];
    let after = "";
    for (;;) {
      const page = await getJson(`v1/adapters?limit=${PAGE}${after}`);
      found.push(...page.data);
      this.isCut = Boolean(page.has_more) && found.length >= MOST;
      if (!page.has_more || this.isCut || page.data.length === 0) break;
      after = `&after=${encodeURIComponent(page.data.at(-1).id)}`;
    }
    this.listed = found;
    byId("adapters-skeleton").hidden = true;
    this.draw(false);
  }

  /** Adapters that the try-it box may ask. */
  usable(mayUse) {
    return this.listed.filter((a) => a.status === "ready" && mayUse(a.tenant));
  }

  show(stats) {
    this.stats = stats;
    this.draw(false);
  }

  joined() {
    const uses = new Map();
    for (const row of this.stats.adapters) {
      const key = `${row.tenant}/${row.name}`;
      uses.set(key, [...(uses.get(key) ?? []), row]);
    }
    return this.listed.map((adapter) => join(adapter, uses.get(`${adapter.tenant}/${adapter.name}`) ?? []));
  }

  draw(isForced) {
    const wanted = byId("filter").value.trim().toLowerCase();
    const tier = byId("tier-filter").value;
    const all = this.joined();
    const matching = all.filter((a) =>
      (!wanted || a.name.toLowerCase().includes(wanted) || String(a.tenant).toLowerCase().includes(wanted) || a.description.toLowerCase().includes(wanted))
      && (!tier || (tier === "pinned" ? a.pinned : a.tier === tier)));
    const shown = this.sorted(matching, isForced).slice(0, this.limit);
    this.fill(shown);
    const more = byId("adapters-more");
    more.hidden = shown.length === matching.length;
    setText(more, t("table.more", { value: count(matching.length - shown.length) }));
    const total = `${count(all.length)}${this.isCut ? "+" : ""}`;
    setText(byId("adapters-count"), matching.length === all.length ? total : t("count.of", { part: count(matching.length), whole: total }));
    const empty = byId("adapters-empty");
    empty.hidden = shown.length > 0 || !byId("adapters-skeleton").hidden;
    setText(empty, all.length ? t("table.no_match") : t("table.none"));
  }

  /** While the pointer or the focus rests on the table the order stays, so that rows do not run away from a click. */
  sorted(adapters, isForced) {
    if ((this.held.pointer || this.held.focus) && !isForced) {
      const place = new Map(this.order.map((key, i) => [key, i]));
      return adapters.toSorted((a, b) => (place.get(a.key) ?? Infinity) - (place.get(b.key) ?? Infinity) || 0);
    }
    const { value } = COLUMNS.find((column) => column.id === this.sort.id);
    const sign = this.sort.up ? 1 : -1;
    const result = adapters.toSorted((a, b) => sign * compare(value(a), value(b)) || compare(a.key, b.key));
    this.order = result.map((a) => a.key);
    return result;
  }

  fill(shown) {
    const body = byId("adapters-body");
    const keep = new Set(shown.map((a) => a.key));
    for (const [key, row] of this.rows) {
      if (!keep.has(key)) {
        row.element.remove();
        this.rows.delete(key);
      }
    }
    const most = Math.max(...shown.map((a) => a.tokensPerS), 0);
    shown.forEach((adapter, i) => {
      let row = this.rows.get(adapter.key);
      if (!row) this.rows.set(adapter.key, (row = this.row()));
      row.set(adapter, most);
      if (body.children[i] !== row.element) body.insertBefore(row.element, body.children[i] ?? null);
    });
  }

  row() {
    let current = null;
    const open = h("button", { type: "button", class: "name", onclick: () => this.onopen(current) });
    const pin = h("span", { class: "pin", title: t("slot.pinned"), role: "img", "aria-label": t("slot.pinned") }, icon(PIN));
    const narrowPin = h("span", { class: "pin narrow", "aria-hidden": "true" }, icon(PIN)); // where there is no column for it
    const spoiled = h("span", { class: "badge bad" });
    const about = h("span", { class: "about" });
    const tier = h("span", { class: "tier" });
    const base = h("span", { class: "badge warn" });
    const cells = Object.fromEntries(COLUMNS.map((c) => [c.id, h("td", { class: this.classOf(c), data: { column: c.id } })]));
    cells.name.append(h("span", { class: "name-line" }, open, narrowPin, base, spoiled), about);
    cells.tier.append(tier);
    cells.pinned.append(pin);
    return {
      element: h("tr", {}, Object.values(cells)),
      set: (a, most) => {
        current = a;
        setText(open, a.name);
        for (const mark of [pin, narrowPin]) mark.toggleAttribute("hidden", !a.pinned);
        spoiled.toggleAttribute("hidden", !a.notFinite);
        setText(spoiled, `NaN: ${count(a.notFinite)}`);
        spoiled.title = t("table.spoiled");
        setText(about, a.description);
        setText(base, a.remark.text);
        base.title = a.remark.title;
        base.toggleAttribute("hidden", !a.remark.text);
        setText(cells.tenant, a.tenant);
        setText(cells.version, a.version === null ? t("table.no_version") : a.numVersions > 1 ? t("count.of", { part: a.version, whole: a.numVersions }) : String(a.version));
        setText(tier, tierName(a.tier));
        tier.title = tierName(a.tier);
        tier.dataset.tier = a.tier ?? "";
        setText(cells.requests, count(a.requests));
        setText(cells.tokens, rate(a.tokensPerS));
        cells.tokens.style.setProperty("--share", most > 0 ? a.tokensPerS / most : 0);
        setText(cells.ttft, ms(a.ttft));
        setText(cells.size, bytes(a.size));
      },
    };
  }
}

/** What is to be said of the base that an adapter or a version was made for. */
export function baseRemark(found) {
  const { status, report = found } = found;
  const { base_model: name, base_model_differs: differs } = report;
  if (status === "other_base") return { text: t("remark.other_base"), title: t("remark.other_base_note") };
  if (status === "missing_part") return { text: t("remark.missing_part"), title: t("remark.missing_part_note") };
  if (differs) return { text: t("remark.other_name"), title: t("remark.other_name_note", { name }) };
  return { text: "", title: "" };
}

/** One adapter as the table shows it. Traffic of several versions adds up; the TTFT is the slowest of theirs. */
function join(adapter, uses) {
  const use = uses.find((row) => row.version === adapter.active_version);
  const ttfts = uses.map((row) => row.ttft_ms.p95).filter((value) => value !== null);
  return {
    key: `${adapter.tenant}/${adapter.name}`,
    name: adapter.name,
    tenant: adapter.tenant,
    description: adapter.description ?? "",
    pinned: adapter.pinned,
    remark: baseRemark(adapter),
    version: adapter.active_version,
    numVersions: adapter.num_versions,
    tier: use ? use.tier : adapter.tier,
    size: adapter.size_bytes,
    requests: uses.reduce((sum, row) => sum + row.requests, 0),
    notFinite: uses.reduce((sum, row) => sum + row.not_finite, 0),
    tokensPerS: uses.reduce((sum, row) => sum + row.tokens_per_s, 0),
    ttft: ttfts.length ? Math.max(...ttfts) : null,
  };
}

function compare(a, b) {
  if (a === null || a === undefined) return b === null || b === undefined ? 0 : -1;
  if (b === null || b === undefined) return 1;
  return a < b ? -1 : a > b ? 1 : 0;
}
