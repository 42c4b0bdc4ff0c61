// An adapter's history: who changed it, when, and which version was active before and after.

import { h } from "./dom.js";
import { day } from "./format.js";

const DONE = { begin: "First known", upload: "Uploaded", promote: "Promoted", rollback: "Rolled back to", change: "Changed", delete: "Deleted", recover: "Recovered from the store" };

/** `page` as `GET /v1/adapters/{name}/history` gives it. */
export function historyView(page) {
  const rest = page.next_before === null ? null : h("p", { class: "hint" }, "Older changes: manylora adapters history.");
  return h("div", {}, h("ol", { class: "versions history" }, page.data.map(entry)), rest);
}

function entry(change) {
  const what = change.version === null ? "all versions" : `version ${change.version}`;
  const fields = change.fields.length ? ` (${change.fields.join(", ")})` : "";
  const by = [change.by.tenant, change.by.role, change.by.key_id].filter(Boolean).join(" · ");
  return h("li", {},
    h("div", { class: "version-line" }, h("strong", {}, `${DONE[change.action] ?? change.action} ${what}${fields}`)),
    h("p", { class: "hint" }, `${day(change.at)} · ${by}${answering(change)}`),
    change.note ? h("p", {}, change.note) : null);
}

function answering({ from_version: before, to_version: after }) {
  if (before === after) return "";
  return after === null ? ` · version ${before} answers no more` : ` · version ${after} answers${before === null ? "" : `, before it ${before}`}`;
}
