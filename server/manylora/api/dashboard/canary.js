// An adapter's canary: a version that answers a share of the requests for the bare name, beside the active version.

import { getJson } from "./api.js";
import { h } from "./dom.js";
import { count, day, ms, NONE } from "./format.js";
import { t } from "./words.js";

const REFRESH_MS = 5000;
const HOUR_S = 3600;

/** A share as people write it: 0.125 is 12.5 %. */
const shareOf = (share) => `${Number((share * 100).toPrecision(3))} %`;

/** Who answers how much now and what came of it, asked for again and again until `destroy`. */
export class CanaryWatch {
  constructor(path, actions) {
    this.path = path;
    this.actions = actions;
    this.element = h("section", { class: "canary", "aria-label": t("canary.title") });
    this.isGone = false;
    this.refresh();
  }

  async refresh() {
    let canary;
    try {
      canary = await getJson(this.path);
    } catch {
      canary = null; // the next look will tell; the rest of the drawer says what the server answers
    }
    if (this.isGone) return;
    if (canary) this.draw(canary);
    this.timer = setTimeout(() => this.refresh(), REFRESH_MS);
  }

  destroy() {
    this.isGone = true;
    clearTimeout(this.timer);
  }

  draw(canary) {
    const focused = this.element.contains(document.activeElement) ? document.activeElement.dataset.action : null;
    const until = canary.until === null ? t("canary.no_end") : t("canary.until", { time: day(canary.until) });
    const ended = canary.ended === null ? null : t("canary.ended", { time: day(canary.ended), reason: canary.reason });
    this.element.replaceChildren(
      h("h3", {}, t("canary.answers", { number: canary.version, share: shareOf(canary.share) })),
      h("p", { class: "hint" }, ended ?? until),
      armTable(canary.versions),
      h("p", { class: "hint" }, t("canary.chance", { p: canary.p_value.toPrecision(2) })),
      ended ? null : h("div", { class: "actions" }, this.actions(canary)),
    );
    if (focused) this.element.querySelector(`[data-action="${focused}"]`)?.focus();
  }
}

function armTable(arms) {
  const columns = [t("canary.version"), t("canary.requests"), t("canary.failed"), t("canary.ttft")];
  const row = (arm) => [
    t("version.lower", { number: arm.version }),
    count(arm.requests),
    count(arm.outcomes.error ?? 0),
    arm.mean_ttft_s === null ? NONE : ms(arm.mean_ttft_s * 1000),
  ];
  const cell = (tag) => (text, place) => h(tag, { class: place ? "number" : "text", ...(tag === "th" ? { scope: "col" } : {}) }, text);
  return h("table", { class: "plain" },
    h("thead", {}, h("tr", {}, columns.map(cell("th")))),
    h("tbody", {}, arms.map((arm) => h("tr", {}, row(arm).map(cell("td"))))));
}

/** The form that lets a version answer a share; `onsubmit` gets the body of the request. */
export function canaryForm(version, running, onsubmit) {
  const label = (text, control) => h("label", { class: "small" }, h("span", {}, text), control);
  const share = running?.version === version ? Number((running.share * 100).toPrecision(3)) : 10;
  const submit = (event) => {
    event.preventDefault();
    const { share: part, hours } = event.target.elements;
    const until = hours.value === "" ? {} : { until: Math.round(Date.now() / 1000 + Number(hours.value) * HOUR_S) };
    onsubmit({ version, share: Number(part.value) / 100, ...until });
  };
  return h("form", { class: "canary-form", onsubmit: submit },
    h("p", { class: "hint" }, t("canary.note")),
    h("div", { class: "fields" },
      label(t("canary.share"), h("input", { name: "share", type: "number", min: 0.1, max: 100, step: "any", value: share, required: true })),
      label(t("canary.hours"), h("input", { name: "hours", type: "number", min: 0.1, max: 8760, step: "any", placeholder: t("optional") })),
      h("button", { type: "submit", class: "primary" }, t("canary.begin"))));
}
