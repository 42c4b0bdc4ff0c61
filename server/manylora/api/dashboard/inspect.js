// What is inside an adapter: how much it changes each module, and how much of its rank it uses.

import { getJson } from "./api.js";
import { h, setText } from "./dom.js";
import { bytes, count } from "./format.js";
import { t } from "./words.js";

const MOST_KINDS = 8; // colours there are; further kinds of module share the last
const PLOT_HEIGHT = 170;
const TIMEOUT_MS = 120_000; // the first look at a large base reads its weights

const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const short = (value) => (value === 0 ? "0" : value >= 0.001 && value < 1000 ? String(+value.toPrecision(3)) : value.toExponential(1));

/** {layer, kind} of a module's path: the first number in it, and its last word; layer -1 outside the layers. */
function place(path) {
  const parts = path.split(".");
  const number = parts.find((part) => /^\d+$/.test(part));
  return { layer: number === undefined ? -1 : Number(number), kind: parts.at(-1) };
}

/** The ways to colour the map. `value` gives a number from 0 upwards, `text` writes it. */
function measures(modules) {
  const isRelative = modules.every((m) => m.relative_norm !== null);
  const size = isRelative
    ? { id: "size", label: t("inspect.size"), unit: "‖ΔW‖ / ‖W‖", value: (m) => m.relative_norm, top: null }
    : { id: "size", label: t("inspect.size"), unit: "‖ΔW‖", value: (m) => m.norm, top: null };
  const use = { id: "use", label: t("inspect.use"), unit: t("inspect.use_unit"), value: (m) => m.effective_rank / m.rank, top: 1 };
  return [size, use];
}

/** The view of `GET …/inspection`: warnings, the map of layers and kinds of module, spectra. */
export class Inspection {
  constructor(report) {
    this.modules = Object.entries(report.modules).map(([path, module]) => ({ path, ...place(path), ...module }));
    this.layers = [...new Set(this.modules.map((m) => m.layer))].sort((a, b) => a - b);
    this.kinds = [...new Set(this.modules.map((m) => m.kind))];
    this.measures = measures(this.modules);
    this.measure = this.measures[0];
    this.plot = null;
    this.element = h("div", { class: "inspection" }, this.head(report), this.map(), this.chart());
    this.paint();
    this.explain(null);
    this.observer = new ResizeObserver(() => this.drawSpectra(this.marked ?? null));
    this.observer.observe(this.frame);
  }

  static async load(path) {
    return new Inspection(await getJson(path, TIMEOUT_MS));
  }

  head(report) {
    const remarks = report.warnings.length
      ? h("ul", { class: "warnings" }, report.warnings.map((warning) => h("li", {}, warning)))
      : h("p", { class: "good-line" }, t("inspect.nothing_odd"));
    return h("div", {},
      h("p", { class: "hint" }, t("inspect.head", { modules: count(this.modules.length), parameters: count(report.num_parameters), size: bytes(report.size_bytes), dtype: report.dtype })),
      remarks);
  }

  map() {
    const choices = this.measures.map((measure) => h("button", {
      type: "button", class: "quiet", "aria-pressed": String(measure === this.measure),
      onclick: (event) => this.choose(measure, event.currentTarget),
    }, measure.label));
    this.choices = h("div", { class: "segments", role: "group", "aria-label": t("inspect.choice") }, choices);
    this.cells = new Map();
    const rows = this.kinds.map((kind) => h("div", { class: "heat-row" }, h("span", { class: "heat-kind", title: kind }, kind), this.row(kind)));
    this.note = h("p", { class: "slots-note" });
    this.scale = h("p", { class: "heat-scale" }, h("span", {}), h("i", {}), h("span", {}));
    const host = h("div", { class: "heat", role: "img", "aria-label": t("inspect.map") }, rows,
      h("div", { class: "heat-row" }, h("span", { class: "heat-kind" }), h("div", { class: "heat-layers" }, h("span", {}, this.layerName(this.layers[0])), h("span", {}, this.layerName(this.layers.at(-1))))));
    host.addEventListener("mouseleave", () => this.explain(null));
    return h("div", {}, this.choices, host, h("div", { class: "heat-foot" }, this.note, this.scale));
  }

  layerName(layer) {
    return layer < 0 ? t("inspect.outside") : t("inspect.layer", { layer });
  }

  row(kind) {
    const line = h("div", { class: "heat-cells" });
    line.style.setProperty("--layers", this.layers.length);
    for (const layer of this.layers) {
      const found = this.modules.find((m) => m.kind === kind && m.layer === layer);
      const cell = h("span", { class: "heat-cell", data: { has: String(Boolean(found)) }, onmouseenter: () => this.explain(found ?? null) });
      if (found) this.cells.set(found.path, cell);
      line.append(cell);
    }
    return line;
  }

  choose(measure, button) {
    this.measure = measure;
    for (const other of this.choices.children) other.setAttribute("aria-pressed", String(other === button));
    this.paint();
    this.explain(null);
  }

  paint() {
    const { value, top, unit } = this.measure;
    const most = top ?? Math.max(...this.modules.map(value));
    for (const m of this.modules) this.cells.get(m.path)?.style.setProperty("--v", most > 0 ? value(m) / most : 0);
    const [low, , high] = this.scale.children;
    setText(low, `${unit}: 0`);
    setText(high, short(most));
  }

  explain(module) {
    if (this.marked === module) return;
    this.marked = module;
    setText(this.note, module === null ? t("inspect.point") : this.numbers(module));
    if (this.plot) this.drawSpectra(module);
  }

  numbers(m) {
    const norm = m.relative_norm === null ? `‖ΔW‖ ${short(m.norm)}` : t("inspect.norm", { norm: `‖ΔW‖ ${short(m.norm)}`, percent: short(100 * m.relative_norm), whole: "‖W‖" });
    return `${m.path} · ${norm} · ${t("inspect.effective", { rank: m.effective_rank.toFixed(1), of: m.rank })}`;
  }

  chart() {
    this.frame = h("div", { class: "spectra", role: "img", "aria-label": t("inspect.spectra_label") });
    const keys = this.kinds.map((kind, i) => h("li", { data: { kind: String(Math.min(i, MOST_KINDS - 1)) } }, h("span", { class: "key" }, kind)));
    return h("div", {}, h("h4", {}, t("inspect.spectra")), h("p", { class: "hint" }, t("inspect.spectra_note")), h("ul", { class: "readings kinds" }, keys), this.frame);
  }

  /** Mean spectrum of each kind, every module's scaled to its own largest value first; `marked` in ink on top. */
  spectra(marked) {
    const longest = Math.max(...this.modules.map((m) => m.singular_values.length));
    const x = Array.from({ length: longest }, (_, i) => i + 1);
    const scaled = (m) => x.map((_, i) => (m.singular_values[0] > 0 ? (m.singular_values[i] ?? null) / m.singular_values[0] : null));
    const mean = (kind) => {
      const all = this.modules.filter((m) => m.kind === kind).map((m) => ({ has: m.singular_values.length, values: scaled(m) }));
      return x.map((_, i) => {
        const values = all.filter((one) => i < one.has && one.values[i] !== null).map((one) => one.values[i]);
        return values.length ? values.reduce((sum, v) => sum + v, 0) / values.length : null;
      });
    };
    this.means ??= this.kinds.map(mean);
    return [x, ...this.means, marked ? scaled(marked).map((v, i) => (i < marked.singular_values.length ? v : null)) : x.map(() => null)];
  }

  drawSpectra(marked) {
    const width = this.frame.clientWidth;
    if (width === 0) return;
    const data = this.spectra(marked);
    if (this.plot && this.plot.width === width) {
      this.plot.setData(data);
      return;
    }
    if (this.plot) this.plot.destroy();
    this.plot = new globalThis.uPlot(this.options(width, data[0].length), data, this.frame);
  }

  options(width, longest) {
    const grid = { stroke: css("--grid"), width: 1 };
    const axis = { stroke: css("--muted"), font: `11px ${css("--font")}`, grid, ticks: { show: false }, gap: 6 };
    const line = (label, stroke, thickness) => ({ label, stroke, width: thickness, points: { show: longest < 3 } });
    return {
      width,
      height: PLOT_HEIGHT,
      legend: { show: false },
      cursor: { show: false },
      padding: [8, 12, 0, 0],
      scales: { x: { time: false, range: [1, Math.max(2, longest)] }, y: { range: [0, 1.02] } },
      axes: [
        { ...axis, grid: { show: false }, size: 26, space: 40, incrs: [1, 2, 4, 8, 16, 32, 64] },
        { ...axis, size: 40, space: 34, values: (_, ticks) => ticks.map((tick) => `${Math.round(tick * 100)} %`) },
      ],
      series: [{}, ...this.kinds.map((kind, i) => line(kind, css(`--kind-${Math.min(i, MOST_KINDS - 1)}`), 1.4)), line("chosen", css("--text"), 2.2)],
    };
  }

  destroy() {
    this.observer.disconnect();
    if (this.plot) this.plot.destroy();
  }
}
