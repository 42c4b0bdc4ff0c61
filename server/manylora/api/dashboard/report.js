// What the server found in an adapter: the problems of a refused one, the report of an accepted one.

import { h } from "./dom.js";
import { count } from "./format.js";
import { t } from "./words.js";

/** Every problem with its code, its place and what to do. */
export function problemList(problems) {
  return h("ul", { class: "problems" }, problems.map((problem) =>
    h("li", {},
      h("code", { class: "code" }, problem.code),
      problem.where ? h("code", { class: "where" }, problem.where) : null,
      h("span", { class: "message" }, problem.message))));
}

const line = (label, value) => [h("dt", {}, label), h("dd", {}, value)];

/** What the version's card says of how it was made, in one line; null where it says nothing. */
export function lineageLine({ lineage }) {
  const { command = "", data_sha256: data, scores = {} } = lineage ?? {};
  const parts = [
    ...(data ? [t("lineage.data", { digest: data.slice(0, 12) })] : []),
    ...Object.entries(scores).map(([name, value]) => `${name} ${score(value)}`),
  ];
  if (!parts.length && !command) return null;
  return h("p", { class: "hint lineage", title: command || null }, parts.join(" · ") || command);
}

const score = (value) => String(Number(value.toPrecision(4)));

/** The same as a list, with everything that is said. */
function lineageFacts({ command, data_sha256: data, eval_sha256: held, scores = {} }) {
  return [
    command ? line(t("lineage.command"), h("code", { class: "digest" }, command)) : null,
    data ? line(t("lineage.data_digest"), h("code", { class: "digest" }, data)) : null,
    held ? line(t("lineage.eval_digest"), h("code", { class: "digest" }, held)) : null,
    Object.keys(scores).length ? line(t("lineage.scores"), Object.entries(scores).map(([name, value]) => `${name} ${score(value)}`).join(", ")) : null,
  ].filter(Boolean).flat();
}

/** `version` as `GET /v1/adapters/{name}/versions/{n}` gives it. */
export function reportView(version) {
  const { matched = [], warnings = [], effect = null, base_model: base = null } = version.report ?? {};
  const list = h("dl", { class: "facts" },
    line(t("report.modules"), t("report.matched", { value: count(matched.length) })),
    line(t("report.targets"), (version.target_modules ?? []).join(", ")),
    base ? line(t("report.base"), base) : null,
    line(t("report.rank"), `${version.rank}, ${version.alpha}`),
    effect ? line(t("report.effect"), t("report.effect_of", { most: effect.max_abs_logit_delta.toPrecision(3), kl: effect.kl.toPrecision(3), tokens: effect.prompt_tokens })) : null,
    line(t("report.digest"), h("code", { class: "digest" }, version.digest)),
    ...lineageFacts(version.lineage ?? {}),
  );
  const remarks = warnings.length
    ? h("ul", { class: "warnings" }, warnings.map((warning) => h("li", {}, typeof warning === "string" ? warning : warning.message)))
    : null;
  return h("div", { class: "report" }, list, remarks);
}
