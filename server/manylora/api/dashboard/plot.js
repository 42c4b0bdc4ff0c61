// A drawing of uPlot as a component: bars over time, or lines over steps.

import { Component, html } from "./view.js";
import { LOCALE } from "./words.js";

const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const isDark = matchMedia("(prefers-color-scheme: dark)");
const compact = new Intl.NumberFormat(LOCALE, { notation: "compact", maximumFractionDigits: 1 });

/** `data` is [x, …y] as uPlot takes it, `series` [{label, colour, points?}], `bars` draws bars over Unix seconds. */
export class Plot extends Component {
  constructor(props) {
    super(props);
    this.keep = (frame) => { this.frame = frame; };
  }

  componentDidMount() {
    this.redraw = () => this.draw();
    this.observer = new ResizeObserver(() => this.resize());
    this.observer.observe(this.frame);
    document.addEventListener("themechange", this.redraw);
    isDark.addEventListener("change", this.redraw);
  }

  componentDidUpdate(before) {
    if (!this.plot || before.data.length !== this.props.data.length) this.draw();
    else this.plot.setData(this.props.data);
  }

  componentWillUnmount() {
    this.observer.disconnect();
    document.removeEventListener("themechange", this.redraw);
    isDark.removeEventListener("change", this.redraw);
    this.plot?.destroy();
  }

  resize() {
    const width = this.frame.clientWidth;
    if (width === 0) return;
    if (!this.plot) this.draw();
    else if (width !== this.plot.width) this.plot.setSize({ width, height: this.props.height });
  }

  draw() {
    const width = this.frame.clientWidth;
    if (width === 0) return;
    this.plot?.destroy();
    this.plot = new globalThis.uPlot(this.options(width), this.props.data, this.frame);
  }

  options(width) {
    const { bars, height, series } = this.props;
    const grid = { stroke: css("--grid"), width: 1 };
    const axis = { stroke: css("--muted"), font: `11px ${css("--font")}`, grid, ticks: { show: false }, gap: 6 };
    return {
      width,
      height,
      legend: { show: false },
      padding: [8, 14, 0, 0],
      cursor: { show: false },
      scales: { x: { time: Boolean(bars), range: bars ? (_, low, high) => [low - bars / 2, high + bars / 2] : undefined }, y: { range: (_, low, high) => [0, high > 0 ? high * 1.1 : 1] } },
      axes: [
        { ...axis, grid: { show: false }, size: 26, space: 64, values: (_, ticks) => ticks.map((tick) => (bars ? moment(tick, bars) : String(tick))) },
        { ...axis, size: 52, space: 34, values: (_, ticks) => ticks.map((tick) => compact.format(tick)) },
      ],
      series: [{}, ...series.map(({ label, colour, points }) => ({
        label,
        stroke: css(`--${colour}`),
        fill: bars ? css(`--${colour}`) : undefined,
        width: bars ? 0 : 1.6,
        paths: bars ? globalThis.uPlot.paths.bars({ size: [0.72, 48] }) : undefined,
        points: { show: Boolean(points) },
        spanGaps: true,
      }))],
    };
  }

  render({ label, height }) {
    return html`<div ref=${this.keep} class="plot" role="img" aria-label=${label} style=${{ height: `${height}px` }}></div>`;
  }
}

/** A tick of the axis: hours where the bars are hours, else days. In UTC, as usage is counted. */
function moment(seconds, step) {
  const form = step < 86400 ? { hour: "2-digit", minute: "2-digit" } : { day: "2-digit", month: "short" };
  return new Date(seconds * 1000).toLocaleString(LOCALE, { ...form, timeZone: "UTC" });
}

/** What the colours of a plot mean. */
export function keys(series) {
  return html`<ul class="readings">${series.map(({ label, colour }) => html`<li key=${colour} data-series=${colour}><span class="key">${label}</span></li>`)}</ul>`;
}
