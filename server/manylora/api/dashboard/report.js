// What the server found in an adapter: the problems of a refused one, the report of an accepted one.

import { h } from "./dom.js";
import { count } from "./format.js";

/** Every problem with its code, its place and what to do. */
export function problemList(problems) {
  return h("ul", { class: "problems" }, problems.map((problem) =>
    h("li", {},
      h("code", { class: "code" }, problem.code),
      problem.where ? h("code", { class: "where" }, problem.where) : null,
      h("span", { class: "message" }, problem.message))));
}

const line = (label, value) => [h("dt", {}, label), h("dd", {}, value)];

/** `version` as `GET /v1/adapters/{name}/versions/{n}` gives it. */
export function reportView(version) {
  const { matched = [], warnings = [], effect = null, base_model: base = null } = version.report ?? {};
  const list = h("dl", { class: "facts" },
    line("Modules", `${count(matched.length)} matched`),
    line("Targets", (version.target_modules ?? []).join(", ")),
    base ? line("Trained on", base) : null,
    line("Rank, alpha", `${version.rank}, ${version.alpha}`),
    effect ? line("Effect", `largest logit change ${effect.max_abs_logit_delta.toPrecision(3)}, KL ${effect.kl.toPrecision(3)} nats on ${effect.prompt_tokens} tokens`) : null,
    line("Digest", h("code", { class: "digest" }, version.digest)),
  );
  const remarks = warnings.length
    ? h("ul", { class: "warnings" }, warnings.map((warning) => h("li", {}, typeof warning === "string" ? warning : warning.message)))
    : null;
  return h("div", { class: "report" }, list, remarks);
}
