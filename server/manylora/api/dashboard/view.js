// What the tabs that are written as components share. Preact puts values in as text, as `dom.js` does.

import { ago } from "./format.js";
import htm from "./vendor/htm/htm.js";
import { Component, h, render } from "./vendor/preact/preact.js";
import { t } from "./words.js";

const GRACE_MS = 3000; // beyond its period, from when on a number is called old

export const html = htm.bind(h);
export { Component, render };

/** How old the numbers of a tab are: amber where they are older than they should be. `at` is in milliseconds. */
class Age extends Component {
  componentDidMount() {
    this.timer = setInterval(() => this.setState({}), 1000);
  }

  componentWillUnmount() {
    clearInterval(this.timer);
  }

  render({ at, every, error }) {
    if (at === null) return null;
    const isOld = Boolean(error) || Date.now() - at > every + GRACE_MS;
    const when = ago(at / 1000);
    return html`<p class="age" data-old=${String(isOld)}>${error ? t("age.failed", { when, error }) : t("age.updated", { when })}</p>`;
  }
}

/** A tab that asks for what it shows, and again every `every` milliseconds while it is looked at. */
export class Panel extends Component {
  constructor(props) {
    super(props);
    props.onmade(this);
    this.every = 10_000;
    this.state = { at: null, error: null };
    this.isLooked = false;
    this.turn = 0;
    document.addEventListener("visibilitychange", () => this.isLooked && this.refresh());
  }

  /** Whether the tab is the one that is shown. */
  look(is) {
    this.isLooked = is;
    clearTimeout(this.timer);
    if (is) this.refresh();
  }

  /** Ask again, now. What an older question is answered after a newer one is left out. */
  async refresh() {
    clearTimeout(this.timer);
    const turn = (this.turn += 1);
    if (document.hidden || !this.props.session.you) return;
    let found;
    try {
      found = { ...(await this.fetch()), at: Date.now(), error: null };
    } catch (error) {
      if (error.status === 401) this.props.session.ask(error.message);
      found = { error: error.message };
    }
    if (turn !== this.turn) return;
    this.setState(found);
    if (this.isLooked) this.timer = setTimeout(() => this.refresh(), this.every);
  }

  age() {
    const { at, error } = this.state;
    if (at === null && error) return html`<p class="problem-line" role="alert">${error}</p>`;
    return html`<${Age} at=${at} every=${this.every} error=${error} />`;
  }
}

/** Lines that stand where rows will, until the first have come. */
export function skeleton(lines = 4) {
  return html`<div class="skeleton" role="status" aria-label=${t("loading")}>${Array.from({ length: lines }, (_, i) => html`<span key=${i}></span>`)}</div>`;
}

/** A table: `columns` are {label, cell, isNumber}, `rows` anything that a cell takes. */
export function table({ label, columns, rows, keyOf, foot }) {
  const kind = (column) => (column.isNumber ? "number" : "text");
  return html`<div class="table-wrap" tabindex="0" role="group" aria-label=${label}>
    <table class="plain">
      <thead><tr>${columns.map((c, i) => html`<th key=${i} scope="col" class=${kind(c)}>${c.label}</th>`)}</tr></thead>
      <tbody>${rows.map((row) => html`<tr key=${keyOf(row)}>${columns.map((c, i) => html`<td key=${i} class=${kind(c)}>${c.cell(row)}</td>`)}</tr>`)}</tbody>
      ${foot ? html`<tfoot><tr>${columns.map((c, i) => html`<td key=${i} class=${kind(c)}>${foot(c, i)}</td>`)}</tr></tfoot>` : null}
    </table>
  </div>`;
}

/** A form's field with its label above. */
export function field(label, control, size = "") {
  return html`<label class=${size}><span>${label}</span>${control}</label>`;
}
