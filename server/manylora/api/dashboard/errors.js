// Requests that failed, were turned away or were at fault, grouped by what is wrong; and the log lines of one of them.

import { getJson } from "./api.js";
import { copy } from "./dom.js";
import { ago, clock } from "./format.js";
import { Component, html, skeleton } from "./view.js";
import { t } from "./words.js";

/** Errors of one code, tenant and adapter, the newest first; groups in the order of their newest. */
function grouped(errors) {
  const groups = new Map();
  for (const error of errors) {
    const key = [error.code, error.tenant, error.adapter].join("\n");
    groups.set(key, [...(groups.get(key) ?? []), error]);
  }
  return [...groups].map(([key, all]) => ({ key, all, newest: all[0] }));
}

export class Errors extends Component {
  constructor(props) {
    super(props);
    props.onmade(this);
    this.state = { stats: null, kind: "all", asked: "", lines: null, failed: null };
    this.order = [];
    this.keep = (list) => { this.list = list; };
  }

  /** `stats` as `GET /v1/stats?client_errors=true` gives it. */
  show(stats) {
    this.setState({ stats });
  }

  /** Show the log lines of a request, as the address asks for them. */
  openLines([id]) {
    if (id && id !== this.state.asked) this.setState({ asked: id }, () => this.askLines());
  }

  async askLines() {
    const { asked } = this.state;
    try {
      const lines = await getJson(`v1/logs/${encodeURIComponent(asked)}`);
      if (asked === this.state.asked) this.setState({ lines, failed: null });
    } catch (error) {
      this.setState({ lines: null, failed: error.message });
    }
  }

  /** While the pointer or the focus rests on the list the order stays. */
  ordered(groups) {
    const isHeld = this.list?.matches(":hover, :focus-within");
    const place = new Map(this.order.map((key, i) => [key, i]));
    const sorted = isHeld ? groups.toSorted((a, b) => (place.get(a.key) ?? Infinity) - (place.get(b.key) ?? Infinity) || 0) : groups;
    this.order = sorted.map(({ key }) => key);
    return sorted;
  }

  shown() {
    const { stats, kind } = this.state;
    const client = (stats.client_errors ?? []).map((error) => ({ ...error, isClient: true }));
    const failed = kind === "client" ? [] : stats.recent_errors;
    return [...failed, ...(kind === "server" ? [] : client)].toSorted((a, b) => b.at - a.at);
  }

  render() {
    const { stats, kind } = this.state;
    const errors = stats ? this.shown() : [];
    return html`
      <section class="card" aria-labelledby="errors-title">
        <div class="card-head wrap">
          <h2 id="errors-title">${t("errors.title")}</h2>
          <p class="figure">${errors.length ? t("errors.newest", { value: errors.length }) : ""}</p>
          <div class="filters">
            <select id="errors-kind" aria-label=${t("errors.kind")} value=${kind} onChange=${(event) => this.setState({ kind: event.target.value })}>
              ${["all", "server", "client"].map((one) => html`<option key=${one} value=${one}>${t(`errors.${one}`)}</option>`)}
            </select>
          </div>
        </div>
        ${stats ? null : skeleton()}
        ${stats && errors.length === 0 ? html`<p class="empty">${t("errors.none")}</p>` : null}
        <ol id="errors-list" class="errors" ref=${this.keep}>${this.ordered(grouped(errors)).map((group) => this.group(group))}</ol>
      </section>
      ${this.props.session.has("admin") ? this.lines() : null}`;
  }

  group({ key, all, newest }) {
    return html`<li key=${key}>
      <time title=${clock(newest.at)}>${ago(newest.at, this.state.stats.now)}</time>
      <span><code class="code">${newest.code || "error"}</code>${newest.isClient ? html` <span class="hint">${t("errors.is_client")}</span>` : null}</span>
      <span class="subject">${[newest.tenant, newest.adapter ?? t("errors.base")].filter(Boolean).join(" · ")}</span>
      <span class="message">${newest.message}</span>
      ${this.identity(newest)}
      ${all.length > 1 ? html`<details class="more-of-it"><summary>${t("errors.times", { n: all.length })}</summary><ul>${all.slice(1).map((error, i) => html`
        <li key=${`${error.request_id} ${i}`}><time>${clock(error.at)}</time><span>${error.message}</span>${this.identity(error)}</li>`)}</ul></details>` : null}
    </li>`;
  }

  identity({ request_id: id }) {
    return html`<span class="identity">
      <button type="button" class="quiet request" title=${t("errors.copy_id")} onClick=${() => copy(id, t("errors.id_copied"))}>${id}</button>
      ${this.props.session.has("admin") ? html`<button type="button" class="quiet lines" onClick=${() => this.props.tabs.open("errors", id)}>${t("errors.lines")}</button>` : null}
    </span>`;
  }

  lines() {
    const { asked, lines, failed } = this.state;
    const submit = (event) => {
      event.preventDefault();
      const wanted = event.target.elements["lines-id"].value.trim();
      this.setState({ asked: wanted }, () => this.askLines());
    };
    return html`<section class="card" id="lines" aria-labelledby="lines-title">
      <div class="card-head wrap"><h2 id="lines-title">${t("errors.lines_title")}</h2><p class="hint">${t("errors.lines_note")}</p></div>
      <form class="fields" onSubmit=${submit}>
        <label class="grow" for="lines-id"><span>${t("errors.request_id")}</span><input id="lines-id" required maxlength="128" autocomplete="off" spellcheck="false" value=${asked} /></label>
        <button type="submit" class="primary">${t("errors.show_lines")}</button>
      </form>
      ${failed ? html`<p class="problem-line" role="alert">${failed}</p>` : null}
      ${lines && lines.data.length === 0 ? html`<p class="empty">${t("errors.no_lines", { id: asked, kept: lines.kept })}</p>` : null}
      ${lines && lines.data.length ? html`<ol class="log" tabindex="0" aria-label=${t("errors.lines")}>${lines.data.map((line, i) => html`
        <li key=${i} data-level=${line.level}><time>${line.timestamp}</time> <span class="level">${line.level}</span> <strong>${line.event}</strong> ${Object.entries(line.fields).map(([name, value]) => html`<span key=${name}><span class="hint">${name}=</span>${String(value)} </span>`)}</li>`)}</ol>` : null}
    </section>`;
  }
}
