// The device's slots as a map: which adapter sits where, and how warm it is.

import { byId, h, setText } from "./dom.js";
import { ago, bytes, count, rate } from "./format.js";
import { t } from "./words.js";

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
    t("slot.number", { slot: resident.slot }),
    `${resident.name}@${resident.version} (${resident.tenant})`,
    bytes(resident.size_bytes),
    resident.users === 0 ? t("slot.idle") : t("slot.running", { value: count(resident.users) }),
  ];
  if (use) parts.push(`${rate(use.tokens_per_s)} ${t("unit.tokens_s")}`, t("slot.used", { when: ago(use.last_used, now) }));
  if (resident.pinned) parts.push(t("slot.pinned"));
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
    this.isUnfolded = false;
    this.fold = byId("slots-fold");
    this.fold.addEventListener("click", () => {
      this.isUnfolded = !this.isUnfolded;
      this.foldEmpty();
    });
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
        this.paint(slot, "foreign", t("slot.foreign"), null);
      } else this.paint(slot, "empty", t("slot.empty", { slot }), null);
    }
    setText(byId("slots-count"), t("slots.count", { part: count(stats.slots_resident), whole: count(stats.slots_total) }));
    this.foldEmpty();
    this.explain(this.hovered);
  }

  /** Show the empty slots, or one button in their place. */
  foldEmpty() {
    const empty = this.cells.filter((cell) => cell.dataset.heat === "empty");
    for (const cell of this.cells) cell.hidden = !this.isUnfolded && cell.dataset.heat === "empty";
    this.fold.hidden = empty.length === 0;
    this.fold.setAttribute("aria-expanded", String(this.isUnfolded));
    setText(this.fold, this.isUnfolded ? t("slots.fold_empty") : t("slots.show_empty", { n: empty.length }));
    this.host.hidden = this.cells.every((cell) => cell.hidden);
    if (this.cells[this.focused]?.hidden) this.rove(this.cells.findIndex((cell) => !cell.hidden));
  }

  /** Put one cell into the tab order in place of the one that is in it. */
  rove(next) {
    if (next < 0) return;
    this.cells[this.focused].tabIndex = -1;
    this.cells[next].tabIndex = 0;
    this.focused = next;
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
    setText(this.note, slot === null ? t("slots.point") : this.texts[slot] ?? "");
  }

  /** Arrow keys walk over the cells; only one of them is in the tab order. */
  move(event) {
    const columns = getComputedStyle(this.host).gridTemplateColumns.split(" ").length;
    const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns, Home: -Infinity, End: Infinity }[event.key];
    if (step === undefined) return;
    event.preventDefault();
    const shown = this.cells.flatMap((cell, i) => (cell.hidden ? [] : [i]));
    const at = shown.indexOf(this.focused) + step;
    this.rove(shown[Math.max(0, Math.min(shown.length - 1, at))]);
    this.cells[this.focused].focus();
  }
}
