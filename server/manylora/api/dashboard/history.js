// An adapter's history: who changed it, when, and which version was active before and after.

import { h } from "./dom.js";
import { day } from "./format.js";
import { t } from "./words.js";

const DONE = ["begin", "upload", "promote", "rollback", "change", "delete", "recover", "canary", "canary_end"];

/** `page` as `GET /v1/adapters/{name}/history` gives it. */
export function historyView(page) {
  const rest = page.next_before === null ? null : h("p", { class: "hint" }, t("history.older", { command: "manylora adapters history" }));
  return h("div", {}, h("ol", { class: "versions history" }, page.data.map(entry)), rest);
}

function entry(change) {
  const what = change.version === null ? t("history.all") : t("version.lower", { number: change.version });
  const fields = change.fields.length ? ` (${change.fields.join(", ")})` : "";
  const by = [change.by.tenant, change.by.role, change.by.key_id].filter(Boolean).join(" · ");
  return h("li", {},
    h("div", { class: "version-line" }, h("strong", {}, `${DONE.includes(change.action) ? t(`history.${change.action}`, { what }) : `${change.action} ${what}`}${fields}`)),
    h("p", { class: "hint" }, `${day(change.at)} · ${by}${answering(change)}`),
    change.note ? h("p", {}, change.note) : null);
}

function answering({ from_version: before, to_version: after }) {
  if (before === after) return "";
  if (after === null) return ` · ${t("history.no_more", { before })}`;
  return ` · ${before === null ? t("history.answers", { after }) : t("history.answers_after", { after, before })}`;
}
