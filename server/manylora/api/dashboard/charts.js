// The charts: what was measured at each poll, over a window that moves with the clock.

import { byId, h, setText } from "./dom.js";
import { LOCALE, t } from "./words.js";

const WINDOW_S = 300;
const WHOLE = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000];

const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

/** One chart in `host`: `series` is [{label, colour, fill?}], `bands` pairs of them to shade between, `format` writes one value. */
class Chart {
  constructor(host, { title, note, series, format, axis, bands = [], heading = "h2", height = 150, isWhole = false, empty = t("chart.empty") }) {
    this.series = series;
    this.format = format;
    this.axis = axis;
    this.bands = bands;
    this.height = height;
    this.isWhole = isWhole;
    this.data = [[], ...series.map(() => [])];
    this.plot = null;
    this.values = series.map(() => h("span", { class: "value" }, "–"));
    this.empty = h("p", { class: "plot-empty" }, empty);
    this.frame = h("div", { class: "plot", role: "img", "aria-label": `${title}, ${note}` });
    host.replaceChildren(
      h("div", { class: "card-head" }, h(heading, {}, title), h("p", { class: "hint" }, note)),
      h("ul", { class: "readings" }, series.map((one, i) =>
        h("li", { data: { series: one.colour } }, h("span", { class: "key" }, one.label), this.values[i]))),
      h("div", { class: "plot-box" }, this.frame, this.empty),
    );
    this.observer = new ResizeObserver(() => this.resize());
    this.observer.observe(this.frame);
  }

  draw() {
    if (this.plot) this.plot.destroy();
    const width = Math.max(120, this.frame.clientWidth);
    this.plot = new globalThis.uPlot(this.options(width), this.data, this.frame);
  }

  options(width) {
    const grid = { stroke: css("--grid"), width: 1 };
    const font = `11px ${css("--font")}`;
    const axis = { stroke: css("--muted"), font, grid, ticks: { show: false }, gap: 6 };
    return {
      width,
      height: this.height,
      legend: { show: false },
      padding: [8, 14, 0, 0],
      cursor: { y: false, drag: { x: false, y: false }, points: { size: 6 }, sync: { key: "live" } },
      scales: { x: { time: true }, y: { range: (_, low, high) => [0, high > 0 ? high * 1.15 : 1] } },
      axes: [
        { ...axis, grid: { show: false }, size: 26, space: 52, values: (_, ticks) => ticks.map(clockTick) },
        { ...axis, size: 46, space: 34, incrs: this.isWhole ? WHOLE : undefined, values: (_, ticks) => ticks.map((tick) => (this.isEmpty() ? "" : this.axis(tick))) },
      ],
      bands: this.bands.map(([upper, lower, colour]) => ({ series: [upper + 1, lower + 1], fill: css(`--${colour}-fill`) })),
      series: [{}, ...this.series.map((one) => ({
        label: one.label,
        stroke: css(`--${one.colour}`),
        fill: one.fill ? css(`--${one.colour}-fill`) : undefined,
        width: 1.6,
        points: { show: false },
        spanGaps: false,
      }))],
      hooks: { setCursor: [(plot) => this.read(plot.cursor.idx)] },
    };
  }

  resize() {
    const width = this.frame.clientWidth;
    if (!this.plot) this.draw();
    else if (width > 0 && width !== this.plot.width) this.plot.setSize({ width, height: this.height });
  }

  /** Values under the pointer, else the newest. */
  read(index) {
    const at = index ?? this.data[0].length - 1;
    this.values.forEach((value, i) => setText(value, this.format(this.data[i + 1][at] ?? null)));
  }

  add(at, values) {
    this.data[0].push(at);
    values.forEach((value, i) => this.data[i + 1].push(value ?? null));
    while (this.data[0].length && this.data[0][0] < at - WINDOW_S - 5) this.data.forEach((column) => column.shift());
  }

  clear() {
    this.data.forEach((column) => column.splice(0));
  }

  /** Leave a gap for the time that was not looked at. */
  interrupt(at) {
    const last = this.data[0].at(-1);
    if (last !== undefined && at > last) this.add(at, this.series.map(() => null));
  }

  isEmpty() {
    return this.data.slice(1).every((column) => column.every((value) => !value));
  }

  show(now) {
    if (!this.plot) this.draw();
    this.empty.hidden = !this.isEmpty();
    this.plot.setData(this.data, false);
    this.plot.setScale("x", { min: now - WINDOW_S, max: now });
    this.read(this.plot.cursor.idx);
  }
}

function clockTick(seconds) {
  return new Date(seconds * 1000).toLocaleTimeString(LOCALE, { hour: "2-digit", minute: "2-digit" });
}

const PERCENTILES = ["p50", "p95", "p99"];
const SPREAD = [[1, 0, "p95"], [2, 1, "p99"]];

export class Charts {
  constructor(hosts, format) {
    const lines = PERCENTILES.map((label) => ({ label, colour: label }));
    const millis = (value) => (value >= 1000 ? `${+(value / 1000).toFixed(1)} s` : `${+value.toFixed(1)} ms`);
    this.throughput = new Chart(hosts.throughput, {
      title: t("tile.throughput"),
      note: t("chart.tokens_s"),
      series: [{ label: t("unit.tokens_s"), colour: "rate", fill: true }],
      format: format.rate,
      axis: (value) => (value >= 1000 ? `${+(value / 1000).toFixed(1)}k` : String(+value.toFixed(2))),
    });
    this.ttft = new Chart(hosts.ttft, {
      title: t("chart.ttft"), note: t("chart.last_30_s"), series: lines, bands: SPREAD, format: format.ms, axis: millis,
    });
    this.tpot = new Chart(hosts.tpot, {
      title: t("chart.tpot"), note: t("chart.last_30_s"), series: lines, bands: SPREAD, format: format.ms, axis: millis,
    });
    this.queue = new Chart(hosts.queue, {
      title: t("chart.queue"),
      note: t("chart.since_open"),
      heading: "h3",
      height: 112,
      series: [{ label: t("chart.running"), colour: "rate", fill: true }, { label: t("chart.waiting"), colour: "p95" }],
      format: format.count,
      axis: format.count,
      isWhole: true,
      empty: t("chart.queue_empty"),
    });
    this.all = [this.throughput, this.ttft, this.tpot, this.queue];
    const redraw = () => this.all.forEach((chart) => chart.plot && chart.draw());
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
    document.addEventListener("themechange", redraw);
  }

  /** The server's own record of the minutes before the page was opened. */
  fill(timeline) {
    [this.throughput, this.ttft, this.tpot].forEach((chart) => chart.clear());
    this.queue.interrupt(timeline.at.at(-1) ?? 0);
    timeline.at.forEach((at, i) => {
      this.throughput.add(at, [timeline.completion_tokens_per_s[i]]);
      this.ttft.add(at, PERCENTILES.map((p) => timeline.ttft_ms[i][p]));
      this.tpot.add(at, PERCENTILES.map((p) => timeline.tpot_ms[i][p]));
    });
  }

  add(stats) {
    this.throughput.add(stats.now, [stats.rates.completion_tokens_per_s]);
    this.ttft.add(stats.now, PERCENTILES.map((p) => stats.live.ttft_ms[p]));
    this.tpot.add(stats.now, PERCENTILES.map((p) => stats.live.tpot_ms[p]));
    this.queue.add(stats.now, [stats.running, stats.waiting + stats.waiting_for_adapter]);
    this.all.forEach((chart) => chart.show(stats.now));
    const isIdle = [this.throughput, this.ttft, this.tpot].every((chart) => chart.isEmpty());
    byId("charts").hidden = isIdle;
    byId("charts-idle").hidden = !isIdle;
  }
}
