// What was used: over time, by tenant and adapter, and what it costs where prices are set.

import { getJson } from "./api.js";
import { NONE, count } from "./format.js";
import { keys, Plot } from "./plot.js";
import { field, html, Panel, skeleton, table } from "./view.js";
import { LOCALE, t } from "./words.js";

const HOUR_S = 3600;
const DAY_S = 86_400;
const PERIODS = { day: { step: HOUR_S, steps: 24, unit: "hour" }, week: { step: DAY_S, steps: 7, unit: "day" }, month: { step: DAY_S, steps: 30, unit: "day" } };
const MOST_ROWS = 200;
const SERIES = [["prompt_tokens", "p50"], ["completion_tokens", "rate"]];

/** The Unix times at which the hours or days of a period begin, the one that runs now among them. */
function beginnings({ step, steps }) {
  const last = Math.floor(Date.now() / 1000 / step) * step;
  return Array.from({ length: steps }, (_, i) => last - (steps - 1 - i) * step);
}

const iso = (seconds) => `${new Date(seconds * 1000).toISOString().slice(0, 19)}Z`;

function money(value, currency) {
  if (value === null || value === undefined) return NONE;
  const digits = value !== 0 && Math.abs(value) < 1 ? { maximumSignificantDigits: 3 } : { minimumFractionDigits: 2, maximumFractionDigits: 2 };
  return `${new Intl.NumberFormat(LOCALE, digits).format(value)} ${currency}`;
}

export class Usage extends Panel {
  constructor(props) {
    super(props);
    this.state = { ...this.state, period: "day", group: "adapter", series: null, report: null };
  }

  async fetch() {
    const { period, group } = this.state;
    const chosen = PERIODS[period];
    const starts = beginnings(chosen);
    const from = encodeURIComponent(iso(starts[0]));
    const groups = group === "tenant" ? "tenant" : "tenant,adapter";
    const [over, report] = await Promise.all([
      getJson(`v1/usage?from=${from}&group_by=${chosen.unit}`),
      getJson(`v1/usage?from=${from}&group_by=${groups}&limit=${MOST_ROWS}`),
    ]);
    const lines = new Map(over.data.map((line) => [Date.parse(line[chosen.unit]) / 1000, line]));
    const series = [starts, ...SERIES.map(([name]) => starts.map((at) => lines.get(at)?.[name] ?? 0))];
    return { series, report, shown: { period, group } };
  }

  choose(change) {
    this.setState(change, () => this.refresh());
  }

  render() {
    const { period, group, report, shown } = this.state;
    const select = (name, value, options) => html`<select id=${`usage-${name}`} value=${value} onChange=${(event) => this.choose({ [name]: event.target.value })}>${options.map((one) => html`<option key=${one} value=${one}>${t(`usage.${one}`)}</option>`)}</select>`;
    const unit = PERIODS[shown?.period ?? period].unit;
    return html`
      <section class="card" aria-labelledby="usage-title">
        <div class="card-head wrap">
          <h2 id="usage-title">${t("tab.usage")}</h2>
          ${this.age()}
          <div class="filters">
            ${field(t("usage.period"), select("period", period, Object.keys(PERIODS)))}
            ${this.props.session.has("admin") ? field(t("usage.group"), select("group", group, ["adapter", "tenant"])) : null}
          </div>
        </div>
        ${report ? this.figures(report) : skeleton(2)}
        <h3>${t(unit === "hour" ? "usage.by_hour" : "usage.by_day")} <span class="hint">${t("usage.utc")}</span></h3>
        ${report ? this.history(unit) : skeleton(5)}
      </section>
      <section class="card" aria-labelledby="usage-who">
        <div class="card-head wrap"><h2 id="usage-who">${t(group === "tenant" ? "tenants.title" : "tab.adapters")}</h2></div>
        ${report ? this.rows(report) : skeleton()}
        ${report ? html`<p class="hint">${priceNote(report.prices)}</p>` : null}
      </section>`;
  }

  figures({ total, prices }) {
    const figure = (label, value) => html`<div class="figure-box"><dt>${label}</dt><dd>${value}</dd></div>`;
    return html`<dl class="figures">
      ${figure(t("tile.requests"), count(total.requests))}
      ${figure(t("usage.prompt"), count(total.prompt_tokens))}
      ${figure(t("usage.completion"), count(total.completion_tokens))}
      ${total.training_tokens ? figure(t("usage.training"), count(total.training_tokens)) : null}
      ${prices ? figure(t("usage.cost"), money(total.cost, prices.currency)) : null}
    </dl>`;
  }

  history(unit) {
    const [at, prompt, completion] = this.state.series;
    if (![...prompt, ...completion].some(Boolean)) return html`<p class="empty">${t("usage.none")}</p>`;
    // The completion stands on the prompt: the upper bar is drawn first, and the lower one covers its foot.
    const series = SERIES.map(([name, colour]) => ({ colour, label: t(name === "prompt_tokens" ? "usage.prompt" : "usage.completion") })).toReversed();
    const sum = prompt.map((value, i) => value + completion[i]);
    return html`${keys(series)}<${Plot} key=${unit + at.length} label=${t("usage.chart")} height=${190} bars=${unit === "hour" ? HOUR_S : DAY_S} data=${[at, sum, prompt]} series=${series} />`;
  }

  rows({ data, total, prices }) {
    if (data.length === 0) return html`<p class="empty">${t("usage.none")}</p>`;
    const isAdapter = "adapter" in data[0];
    const failed = ({ outcomes }) => (outcomes.error ?? 0) + (outcomes.rejected ?? 0);
    const number = (label, value) => ({ label, value, isNumber: true, cell: value });
    const columns = [
      ...(isAdapter ? [{ label: t("table.adapter"), cell: (row) => html`<strong>${row.adapter ?? t("usage.base")}</strong>` }] : []),
      { label: t("table.tenant"), cell: (row) => row.tenant },
      number(t("tile.requests"), (row) => count(row.requests)),
      number(t("usage.failed"), (row) => count(failed(row))),
      number(t("usage.prompt"), (row) => count(row.prompt_tokens)),
      number(t("usage.cached"), (row) => count(row.cached_tokens)),
      number(t("usage.completion"), (row) => count(row.completion_tokens)),
      ...(total.training_tokens ? [number(t("usage.training"), (row) => count(row.training_tokens))] : []),
      number(t("usage.slot_hours"), (row) => (row.slot_seconds / HOUR_S).toFixed(2)),
      ...(prices ? [number(t("usage.cost"), (row) => money(row.cost, prices.currency))] : []),
    ];
    const foot = (column, i) => (i === 0 ? t("usage.total") : column.value ? column.value(total) : "");
    return table({ label: t("tab.usage"), columns, rows: data, keyOf: (row) => `${row.tenant}/${row.adapter_tenant}/${row.adapter}`, foot });
  }
}

function priceNote(prices) {
  if (!prices) return t("usage.no_prices");
  const each = Object.fromEntries(["prompt", "cached", "completion", "training"].map((name) => [name, money(prices[name], prices.currency)]));
  return t("usage.prices", each);
}
