// The device's slots as a map: which adapter sits where, and how warm it is.

import { byId, h, setText } from "./dom.js";
import { ago, bytes, count, rate } from "./format.js";

const MOST_CELLS = 1024;
const NAMED_CELLS = 48;

/** 4 in use, 3 used within ten seconds, 2 within a minute, 1 within five minutes, 0 not of late. */
function heat(resident, use, now) {
  if (resident.users > 0) return 4;
  if (!use) return 0;
  const idle = now - use.last_used;
  if (use.tokens_per_s > 0 || idle <= 10) return 3;
  return idle <= 60 ? 2 : 1;
}

function describe(resident, use, now) {
  const parts = [
    `slot ${resident.slot}`,
    `${resident.name}@${resident.version} (${resident.tenant})`,
    bytes(resident.size_bytes),
    resident.users === 0 ? "idle" : `${count(resident.users)} running`,
  ];
  if (use) parts.push(`${rate(use.tokens_per_s)} tokens/s`, `used ${ago(use.last_used, now)}`);
  if (resident.pinned) parts.push("pinned");
  return parts.join(" · ");
}

export class SlotMap {
  constructor(onopen) {
    this.host = byId("slots");
    this.note = byId("slots-note");
    this.cells = [];
    this.texts = [];
    this.residents = [];
    this.onopen = onopen;
    this.focused = 0;
    this.hovered = null;
    this.host.addEventListener("keydown", (event) => this.move(event));
    this.host.addEventListener("mouseleave", () => this.explain(null));
    this.host.addEventListener("focusout", () => this.explain(null));
  }

  show(stats) {
    const highest = stats.resident.reduce((most, r) => Math.max(most, r.slot + 1), 0);
    const total = Math.min(MOST_CELLS, Math.max(stats.slots_total, highest));
    if (this.cells.length !== total) this.build(total);
    const uses = new Map(stats.adapters.map((row) => [row.id, row]));
    const bySlot = new Map(stats.resident.map((r) => [r.slot, r]));
    let foreign = stats.slots_resident - stats.resident.length; // other tenants' adapters: counted, not shown
    for (let slot = 0; slot < total; slot += 1) {
      const resident = bySlot.get(slot) ?? null;
      this.residents[slot] = resident;
      if (resident) this.paint(slot, String(heat(resident, uses.get(resident.id), stats.now)), describe(resident, uses.get(resident.id), stats.now), resident);
      else if (foreign > 0) {
        foreign -= 1;
        this.paint(slot, "foreign", "holds another tenant's adapter", null);
      } else this.paint(slot, "empty", `slot ${slot} · empty`, null);
    }
    setText(byId("slots-count"), `${count(stats.slots_resident)} of ${count(stats.slots_total)} hold an adapter`);
    this.explain(this.hovered);
  }

  build(total) {
    this.cells = Array.from({ length: total }, (_, slot) => h("button", {
      type: "button",
      class: "slot",
      tabindex: slot === 0 ? 0 : -1,
      onclick: () => this.residents[slot] && this.onopen(this.residents[slot]),
      onmouseenter: () => this.explain(slot),
      onfocus: () => this.explain(slot),
    }, h("span", { class: "slot-name" }), h("span", { class: "slot-users" })));
    this.focused = 0;
    this.host.dataset.size = total <= NAMED_CELLS ? "named" : total <= 160 ? "small" : "tiny";
    this.host.replaceChildren(...this.cells);
  }

  paint(slot, warmth, text, resident) {
    const cell = this.cells[slot];
    this.texts[slot] = text;
    if (cell.dataset.heat !== warmth) cell.dataset.heat = warmth;
    cell.classList.toggle("pinned", Boolean(resident && resident.pinned));
    cell.setAttribute("aria-label", text);
    setText(cell.firstChild, resident ? resident.name : "");
    setText(cell.lastChild, resident && resident.users > 0 ? String(resident.users) : "");
  }

  explain(slot) {
    this.hovered = slot;
    setText(this.note, slot === null ? "Point at a slot to see what it holds." : this.texts[slot] ?? "");
  }

  /** Arrow keys walk over the cells; only one of them is in the tab order. */
  move(event) {
    const columns = getComputedStyle(this.host).gridTemplateColumns.split(" ").length;
    const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns, Home: -Infinity, End: Infinity }[event.key];
    if (step === undefined) return;
    event.preventDefault();
    const next = Math.max(0, Math.min(this.cells.length - 1, this.focused + step));
    this.cells[this.focused].tabIndex = -1;
    this.cells[next].tabIndex = 0;
    this.focused = next;
    this.cells[next].focus();
  }
}
