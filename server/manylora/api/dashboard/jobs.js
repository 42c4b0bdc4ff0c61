// Trainings in the server: what runs, how its loss falls, and a new one from a file of rows.

import { getJson, send, upload } from "./api.js";
import { confirmed, toast } from "./dom.js";
import { clock, count, day, duration, NONE, percent } from "./format.js";
import { keys, Plot } from "./plot.js";
import { field, html, Panel, skeleton, table } from "./view.js";
import { t } from "./words.js";

const PAGE = 50;
const EVENTS_PAGE = 500;
const SHOWN_EVENTS = 30;
const LIVE = ["queued", "running", "paused"];
const NAME = "[a-z0-9][a-z0-9._\\-]{0,63}";
const RUNNING_MS = 2000;
const IDLE_MS = 10_000;
const PLOTS = [["loss", 220], ["margin", 140]]; // that of preferences alone
const CURVES = [["train", "rate"], ["valid", "p95"]];
const METHODS = ["supervised", "dpo"];
const NUMBERS = [["epochs", 1, 50], ["batch_size", 1, 256], ["rank", 1, 512]];

export class Jobs extends Panel {
  constructor(props) {
    super(props);
    this.state = { ...this.state, jobs: null, limit: PAGE, id: null, job: null, events: new Map(), training: null, validation: null, name: "", method: "supervised", sending: null };
  }

  /** One job, as the address names it, or all. */
  open([id]) {
    if ((id ?? null) === this.state.id) return;
    this.setState({ id: id ?? null, job: null, events: new Map(), error: null }, () => this.isLooked && this.refresh());
  }

  async fetch() {
    const { id, limit } = this.state;
    if (id !== null) return this.fetchOne(id);
    const jobs = await getJson(`v1/fine_tuning/jobs?limit=${limit}`);
    this.every = jobs.data.some((job) => job.status === "running") ? RUNNING_MS : IDLE_MS;
    return { jobs };
  }

  /** A job and its events; of these only what is newer than what is known already. */
  async fetchOne(id) {
    const path = `v1/fine_tuning/jobs/${encodeURIComponent(id)}`;
    const events = new Map(this.state.events);
    const job = await getJson(path);
    for (let after = ""; ;) {
      const page = await getJson(`${path}/events?limit=${EVENTS_PAGE}${after}`);
      const isKnown = page.data.some((event) => events.has(event.id));
      for (const event of page.data) events.set(event.id, event);
      if (isKnown || !page.has_more) break;
      after = `&after=${encodeURIComponent(page.last_id)}`;
    }
    this.every = LIVE.includes(job.status) ? RUNNING_MS : IDLE_MS;
    return this.state.id === id ? { job, events } : {};
  }

  /** Take a file that was dropped or chosen. */
  take(file, place = "training") {
    if (!file) return;
    if (this.state.id !== null) this.props.tabs.open("jobs");
    const proposed = file.name.replace(/\.[^.]*$/, "").toLowerCase().replace(/[^a-z0-9._-]+/g, "-").replace(/^[^a-z0-9]+/, "").slice(0, 64);
    this.setState({ [place]: file, name: this.state.name || (place === "training" ? proposed : "") });
  }

  render() {
    const { id } = this.state;
    return id === null ? html`<div class="tab-inner">${this.form()}${this.list()}</div>` : this.one();
  }

  list() {
    const { jobs } = this.state;
    const columns = [
      { label: t("jobs.title"), cell: (job) => html`<button type="button" class="name" onClick=${() => this.props.tabs.open("jobs", job.id)}>${job.manylora.name ?? job.id}</button> <code class="hint">${job.id}</code>` },
      { label: t("jobs.status"), cell: (job) => badge(job.status) },
      { label: t("jobs.progress"), cell: (job) => progress(job) },
      { label: t("jobs.created"), cell: (job) => day(job.created_at) },
      { label: t("jobs.result"), cell: (job) => this.result(job) ?? (job.error?.message ? html`<span class="about">${job.error.message}</span>` : NONE) },
    ];
    return html`<section class="card" aria-labelledby="jobs-title">
      <div class="card-head wrap"><h2 id="jobs-title">${t("jobs.title")}</h2>${this.age()}</div>
      ${jobs ? null : skeleton()}
      ${jobs && jobs.data.length === 0 ? html`<p class="empty">${t("jobs.none")}</p>` : null}
      ${jobs && jobs.data.length ? table({ label: t("jobs.title"), columns, rows: jobs.data, keyOf: (job) => job.id }) : null}
      ${jobs?.has_more ? html`<div class="more"><button type="button" class="quiet" onClick=${() => this.setState({ limit: Math.min(1000, this.state.limit * 4) }, () => this.refresh())}>${t("more")}</button></div>` : null}
    </section>`;
  }

  result(job) {
    const label = job.fine_tuned_model;
    if (!label) return null;
    return html`<a href=${`#adapters/${encodeURIComponent(job.organization_id)}/${encodeURIComponent(label.split("@")[0])}`}>${t("jobs.open", { label })}</a>`;
  }

  form() {
    const { training, validation, name, method, sending } = this.state;
    const isDpo = method === "dpo"; // judged by no answers, so not by which are better
    const activations = ["never", "always", ...(validation && !isDpo ? ["if_better"] : [])];
    const picker = (place) => html`<input type="file" class="sr-only" tabindex="-1" aria-label=${t(`jobs.${place}_file`)} id=${`jobs-${place}`} accept=".jsonl,.ndjson,.json,.csv,.tsv,.parquet" onChange=${(event) => { this.take(event.target.files[0], place); event.target.value = ""; }} />`;
    const choose = (place, text) => html`<button type="button" onClick=${(event) => event.target.closest("section").querySelector(`#jobs-${place}`).click()}>${text}</button>`;
    return html`<section class="card" aria-labelledby="new-job-title">
      <div class="card-head"><h2 id="new-job-title">${t("jobs.new")}</h2></div>
      <div class="upload">
        <div class="zone">
          <p class="zone-title">${training ? training.name : t("jobs.drop_here")}</p>
          <p class="hint">${t("jobs.what")}</p>
          ${choose("training", t("jobs.choose"))}${picker("training")}
        </div>
        <form class="upload-form" id="new-job" onSubmit=${(event) => this.submit(event)}>
          <div class="fields">
            ${field(t("jobs.adapter"), html`<input id="jobs-name" value=${name} onInput=${(event) => this.setState({ name: event.target.value })} pattern=${NAME} maxlength="64" autocomplete="off" spellcheck="false" placeholder=${t("optional")} title=${t("upload.name_rule")} />`, "grow")}
            ${NUMBERS.map(([one, min, max]) => html`<div key=${one} class="small">${field(t(`jobs.${one}`), html`<input name=${one} type="number" min=${min} max=${max} placeholder=${t("jobs.auto")} />`)}</div>`)}
            ${isDpo ? html`<div class="small">${field(t("jobs.beta"), html`<input name="beta" type="number" min="0.001" step="any" placeholder=${t("jobs.auto")} />`)}</div>` : null}
          </div>
          <div class="fields">
            <div><span class="field-label">${t("jobs.validation_file")}</span>${choose("validation", validation ? validation.name : `${t("jobs.choose")} (${t("optional")})`)}${picker("validation")}</div>
            ${field(t("jobs.method"), html`<select name="method" value=${method} onChange=${(event) => this.setState({ method: event.target.value })}>${METHODS.map((one) => html`<option key=${one} value=${one}>${t(`jobs.method.${one}`)}</option>`)}</select>`)}
            ${field(t("jobs.activate"), html`<select name="activate">${activations.map((one) => html`<option key=${one} value=${one}>${t(`jobs.activate.${one}`)}</option>`)}</select>`)}
          </div>
          <div class="actions">
            <button type="submit" class="primary" disabled=${!training || sending !== null}>${t("jobs.submit")}</button>
            ${sending?.abort ? html`<button type="button" onClick=${() => sending.abort.abort()}>${t("cancel")}</button>` : null}
            <p class="hint" role="status">${sending?.text ?? ""}</p>
          </div>
          ${this.state.refused ? html`<p class="problem-line" role="alert">${this.state.refused}</p>` : null}
        </form>
      </div>
    </section>`;
  }

  async submit(event) {
    event.preventDefault();
    const { elements } = event.target;
    const chosen = { n_epochs: elements.epochs.value, batch_size: elements.batch_size.value, beta: elements.beta?.value ?? "" };
    const hyperparameters = Object.fromEntries(Object.entries(chosen).filter(([, value]) => value !== "").map(([name, value]) => [name, Number(value)]));
    const more = { activate: elements.activate.value, ...(elements.rank.value ? { rank: Number(elements.rank.value) } : {}) };
    const { training, validation, name, method } = this.state;
    this.setState({ refused: null });
    try {
      const body = { model: this.props.base(), training_file: await this.send(training) };
      if (validation) body.validation_file = await this.send(validation);
      if (name) body.suffix = name;
      const job = await send("POST", "v1/fine_tuning/jobs", { ...body, method: { type: method, [method]: { hyperparameters } }, manylora: more });
      toast(t("jobs.submitted", { id: job.id }));
      this.setState({ training: null, validation: null, name: "" });
      this.props.tabs.open("jobs", job.id);
    } catch (error) {
      if (error.status === 401) this.props.session.ask(error.message);
      this.setState({ refused: error.name === "AbortError" ? null : error.message });
    } finally {
      this.setState({ sending: null });
    }
  }

  /** Upload a file of rows; gives its id. */
  async send(file) {
    const abort = new AbortController();
    const form = new FormData();
    form.append("purpose", "fine-tune");
    form.append("file", file, file.name);
    const onprogress = (sent, total) => {
      const text = sent >= total ? t("jobs.checking", { name: file.name }) : t("jobs.uploading", { name: file.name, share: percent(sent, total) });
      this.setState({ sending: { text, abort } });
    };
    onprogress(0, 1);
    const { body } = await upload("v1/files", form, { onprogress, signal: abort.signal });
    return body.id;
  }

  one() {
    const { job, id } = this.state;
    return html`<section class="card" aria-labelledby="job-title" id="job">
      <div class="card-head wrap">
        <a href="#jobs">${t("jobs.back")}</a>
        <h2 id="job-title">${job?.manylora.name ?? id}</h2>
        ${job ? badge(job.status) : null}
        ${this.age()}
        ${job ? html`<div class="actions filters">${this.actions(job)}</div>` : null}
      </div>
      ${job ? html`${this.facts(job)}${this.curve()}${this.told()}` : this.state.error ? null : skeleton(6)}
    </section>`;
  }

  actions(job) {
    const change = (action) => async () => {
      if (action === "cancel" && !(await confirmed(t("jobs.cancel_sure", { id: job.id }), t("jobs.cancel_note"), t("jobs.cancel")))) return;
      try {
        await send("POST", `v1/fine_tuning/jobs/${encodeURIComponent(job.id)}/${action}`);
      } catch (error) {
        toast(error.message, "bad");
      }
      await this.refresh();
    };
    const button = (action, style) => html`<button key=${action} type="button" class=${style} onClick=${change(action)}>${t(`jobs.${action}`)}</button>`;
    if (!LIVE.includes(job.status)) return this.result(job);
    return [job.status === "paused" ? button("resume", "primary") : button("pause", ""), button("cancel", "danger")];
  }

  facts(job) {
    const line = (label, value) => html`<dt>${label}</dt><dd>${value}</dd>`;
    return html`<div>
      ${job.error?.message ? html`<p class="problem-line">${job.error.message}</p>` : null}
      <dl class="facts">
        ${line(t("jobs.progress"), progress(job, this.totalSteps()))}
        ${line(t("jobs.created"), day(job.created_at))}
        ${line(t("jobs.training_file"), html`<code>${job.training_file}</code>`)}
        ${job.validation_file ? line(t("jobs.validation_file"), html`<code>${job.validation_file}</code>`) : null}
        ${line(t("jobs.epochs"), job.hyperparameters.n_epochs)}
        ${line(t("jobs.batch_size"), job.hyperparameters.batch_size)}
        ${line(t("jobs.rank"), job.manylora.rank)}
        ${line(t("try.seed"), job.seed)}
        ${job.trained_tokens === null || job.trained_tokens === undefined ? null : line(t("jobs.trained_tokens"), count(job.trained_tokens))}
        ${job.manylora.promotion ? line(t("jobs.activate"), job.manylora.promotion.said) : null}
      </dl>
    </div>`;
  }

  totalSteps() {
    return Math.max(0, ...[...this.state.events.values()].map((event) => event.data?.total_steps ?? 0));
  }

  curve() {
    const points = new Map();
    const metrics = [...this.state.events.values()].filter((event) => event.data?.step !== undefined).toSorted((a, b) => a.created_at - b.created_at);
    for (const { data } of metrics) points.set(data.step, { ...points.get(data.step), ...data });
    const steps = [...points.keys()].toSorted((a, b) => a - b);
    return PLOTS.map(([what, height]) => {
      const curves = CURVES.filter(([name]) => steps.some((step) => points.get(step)[`${name}_${what}`] !== undefined));
      if (!curves.length && what !== "loss") return null;
      const series = curves.map(([name, colour]) => ({ label: t(`jobs.${name}`), colour, points: name === "valid" || steps.length < 3 }));
      const data = [steps, ...curves.map(([name]) => steps.map((step) => points.get(step)[`${name}_${what}`] ?? null))];
      return html`<div key=${what}><h3>${t(`jobs.${what}`)} <span class="hint">${t(`jobs.${what}_note`)}</span></h3>
        ${curves.length ? html`${keys(series)}<${Plot} label=${t(`jobs.${what}`)} height=${height} data=${data} series=${series} />` : html`<p class="empty">${t("jobs.no_loss")}</p>`}</div>`;
    });
  }

  told() {
    const messages = [...this.state.events.values()].filter((event) => event.type === "message").toSorted((a, b) => b.created_at - a.created_at || numberOf(b) - numberOf(a));
    return html`<div><h3>${t("jobs.events")}</h3><ol class="log" tabindex="0" aria-label=${t("jobs.events")}>${messages.slice(0, SHOWN_EVENTS).map((event) => html`
      <li key=${event.id} data-level=${event.level}><time>${clock(event.created_at)}</time> <span>${event.message}</span></li>`)}</ol></div>`;
  }
}

const numberOf = (event) => Number(event.id.split("-").at(-1));

function badge(status) {
  const kind = { failed: "badge bad", succeeded: "badge", running: "badge run" }[status] ?? "badge dim";
  return html`<span class=${kind} data-status=${status}>${t(`jobs.status.${status}`)}</span>`;
}

function progress(job, steps = 0) {
  const { step } = job.manylora;
  if (!step) return NONE;
  const left = job.status === "running" && job.estimated_finish ? job.estimated_finish - Date.now() / 1000 : 0;
  const text = steps ? t("jobs.steps_of", { step: count(step), steps: count(steps) }) : t("jobs.steps", { step: count(step) });
  return html`<span>${steps ? html`<progress max=${steps} value=${step} aria-label=${t("jobs.progress")}></progress> ` : null}${text}${left > 0 ? ` · ${t("jobs.finish", { time: duration(left) })}` : ""}</span>`;
}
