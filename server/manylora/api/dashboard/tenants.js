// Tenants with their quotas, and keys: for admins.

import { getJson, key, send } from "./api.js";
import { confirmed, copy, toast } from "./dom.js";
import { bytes, count, day, NONE } from "./format.js";
import { Component, field, html, Panel, skeleton, table } from "./view.js";
import { t } from "./words.js";

const QUOTAS = ["requests_per_minute", "tokens_per_minute", "max_concurrent", "max_adapters", "max_adapter_bytes", "max_pinned", "max_file_bytes", "max_jobs_queued", "max_jobs_running", "training_tokens_per_day"];
const PAGE = 200;
const ROLES = ["user", "manager", "admin"];

export class Tenants extends Panel {
  constructor(props) {
    super(props);
    this.state = { ...this.state, tenants: null, keys: null, limit: PAGE, isWhole: false, edited: null, made: null };
  }

  async fetch() {
    const { limit } = this.state;
    const [tenants, keys] = await Promise.all([getJson(`v1/tenants?limit=${limit}`), getJson(`v1/keys?limit=${limit}`)]);
    return { tenants, keys };
  }

  /** Run what may be refused, then show how things stand. */
  async change(work) {
    try {
      const made = await work();
      await this.refresh();
      return made;
    } catch (error) {
      if (error.status === 401) this.props.session.ask(error.message);
      else toast(error.message, "bad");
      return null;
    }
  }

  render() {
    const { tenants, keys, edited, made } = this.state;
    const hasMore = Boolean(tenants?.has_more || keys?.has_more) && this.state.limit < 1000;
    return html`
      <section class="card" aria-labelledby="tenants-title">
        <div class="card-head wrap"><h2 id="tenants-title">${t("tenants.title")}</h2>${this.age()}</div>
        ${tenants ? this.tenants(tenants.data) : skeleton()}
      </section>
      ${edited ? html`<${Quotas} key=${edited.name} tenant=${edited} onclose=${() => this.setState({ edited: null })} onsave=${(values) => this.saveQuotas(edited.name, values)} />` : null}
      <section class="card" aria-labelledby="keys-title">
        <div class="card-head wrap"><h2 id="keys-title">${t("keys.title")}</h2>
          <label class="check filters"><input type="checkbox" checked=${this.state.isWhole} onChange=${(event) => this.setState({ isWhole: event.target.checked })} /><span>${t("keys.show_all")}</span></label></div>
        ${keys ? this.keys(keys.data) : skeleton()}
        ${hasMore ? html`<div class="more"><button type="button" class="quiet" onClick=${() => this.setState({ limit: 1000 }, () => this.refresh())}>${t("more")}</button></div>` : null}
      </section>
      <section class="card" aria-labelledby="new-key-title">
        <div class="card-head"><h2 id="new-key-title">${t("keys.new")}</h2></div>
        ${made ? this.made(made) : this.newKey(tenants?.data ?? [])}
      </section>`;
  }

  tenants(data) {
    if (data.length === 0) return html`<p class="empty">${t("tenants.none")}</p>`;
    const set = (tenant) => QUOTAS.filter((name) => tenant[name] !== null).length;
    const columns = [
      { label: t("table.tenant"), cell: (row) => html`<strong>${row.name}</strong>` },
      { label: t("tenants.keys"), isNumber: true, cell: (row) => count(row.num_keys) },
      { label: t("tab.adapters"), isNumber: true, cell: (row) => count(row.kept.adapters) },
      { label: t("tenants.kept"), isNumber: true, cell: (row) => bytes(row.kept.adapter_bytes) },
      { label: t("quota.weight"), isNumber: true, cell: (row) => row.weight },
      { label: t("tenants.quotas"), cell: (row) => html`<button type="button" class="quiet" aria-label=${t("tenants.edit", { tenant: row.name })} onClick=${() => this.setState({ edited: row })}>${set(row) ? t("tenants.num_quotas", { n: set(row) }) : t("tenants.no_quotas")}</button>` },
    ];
    return table({ label: t("tenants.title"), columns, rows: data, keyOf: (row) => row.name });
  }

  async saveQuotas(name, values) {
    const saved = await this.change(() => send("PATCH", `v1/tenants/${encodeURIComponent(name)}`, values));
    if (saved === null) return;
    this.setState({ edited: null });
    toast(t("tenants.saved", { tenant: name }));
  }

  keys(data) {
    if (data.length === 0) return html`<p class="empty">${t("keys.none")}</p>`;
    const rows = this.state.isWhole ? data : data.filter((row) => row.status === "valid");
    const when = (value, none = NONE) => (value === null ? none : day(value));
    const columns = [
      { label: t("key.label"), cell: (row) => html`<code>${row.prefix}…</code>` },
      { label: t("keys.name"), cell: (row) => row.name || NONE },
      { label: t("table.tenant"), cell: (row) => row.tenant },
      { label: t("keys.role"), cell: (row) => row.role },
      { label: t("keys.status"), cell: (row) => html`<span class=${row.status === "valid" ? "badge" : "badge bad"}>${t(`keys.${row.status}`)}</span>` },
      { label: t("keys.created"), cell: (row) => when(row.created) },
      { label: t("keys.used"), cell: (row) => when(row.last_used, t("keys.never")) },
      { label: t("keys.expires"), cell: (row) => when(row.expires) },
      { label: "", cell: (row) => (row.status === "revoked" ? null : html`<button type="button" class="quiet danger-text" aria-label=${`${t("keys.revoke")} ${row.prefix}`} onClick=${() => this.revoke(row)}>${t("keys.revoke")}</button>`) },
    ];
    return table({ label: t("keys.title"), columns, rows, keyOf: (row) => row.id });
  }

  async revoke(row) {
    const label = `${row.prefix}…`;
    const isOwn = key.get()?.startsWith(row.prefix);
    const note = isOwn ? `${t("keys.revoke_own")} ${t("keys.revoke_note")}` : t("keys.revoke_note");
    if (!(await confirmed(t("keys.revoke_sure", { key: label }), note, t("keys.revoke")))) return;
    const revoked = await this.change(() => send("DELETE", `v1/keys/${encodeURIComponent(row.id)}`));
    if (revoked !== null) toast(t("keys.is_revoked", { key: label }));
  }

  newKey(tenants) {
    const isOpen = this.props.session.you?.is_open;
    const submit = async (event) => {
      event.preventDefault();
      const { tenant, role, purpose, expires } = event.target.elements;
      const body = { tenant: tenant.value.trim(), role: role.value, name: purpose.value.trim() };
      if (expires.value) body.expires = Math.floor(new Date(`${expires.value}T23:59:59`).getTime() / 1000);
      const made = await this.make(body);
      if (made !== null) this.setState({ made });
    };
    const tomorrow = new Date(Date.now() + 86_400_000).toISOString().slice(0, 10);
    return html`<form class="fields" id="new-key" onSubmit=${submit}>
      ${field(t("table.tenant"), html`<input name="tenant" required maxlength="64" list="key-tenants" autocomplete="off" spellcheck="false" />`)}
      <datalist id="key-tenants">${tenants.map((one) => html`<option key=${one.name} value=${one.name}></option>`)}</datalist>
      ${field(t("keys.role"), html`<select name="role">${ROLES.map((role) => html`<option key=${role} value=${role} selected=${role === (isOpen ? "admin" : "user")}>${role}</option>`)}</select>`)}
      ${field(t("keys.name"), html`<input name="purpose" maxlength="100" autocomplete="off" placeholder=${t("optional")} />`, "grow")}
      ${field(t("keys.expires"), html`<input name="expires" type="date" min=${tomorrow} />`)}
      <button type="submit" class="primary">${t("keys.create")}</button>
      ${isOpen ? html`<p class="hint whole">${t("keys.closes")}</p>` : null}
    </form>`;
  }

  /** Make a key. The list is asked for again, but not with a key that is none any more. */
  async make(body) {
    try {
      const made = await send("POST", "v1/keys", body);
      if (!this.props.session.you?.is_open) await this.refresh();
      return made;
    } catch (error) {
      toast(error.message, "bad");
      return null;
    }
  }

  made(made) {
    const use = () => {
      key.set(made.key);
      this.setState({ made: null });
      this.props.session.onchange();
    };
    return html`<div class="made" role="status">
      <p class="good-line">${t("keys.once")}</p>
      <p><code id="made-key" class="made-key">${made.key}</code></p>
      <div class="actions">
        <button type="button" class="primary" onClick=${() => copy(made.key, t("copy.done"))}>${t("copy")}</button>
        ${this.props.session.you?.is_open ? html`<button type="button" onClick=${use}>${t("keys.use_here")}</button>` : null}
        <button type="button" class="quiet" onClick=${() => this.setState({ made: null })}>${t("close")}</button>
      </div>
    </div>`;
  }
}

/** The share and the quotas of one tenant, to be changed: an empty field is no limit. */
class Quotas extends Component {
  componentDidMount() {
    document.querySelector("#quotas input").focus();
  }

  render({ tenant, onclose, onsave }) {
    const submit = (event) => {
      event.preventDefault();
      const { elements } = event.target;
      const limits = QUOTAS.map((name) => [name, elements[name].value === "" ? null : Number(elements[name].value)]);
      const values = Object.fromEntries([["weight", Number(elements.weight.value)], ...limits].filter(([name, value]) => value !== tenant[name]));
      if (Object.keys(values).length) onsave(values);
      else onclose();
    };
    return html`<section class="card" aria-labelledby="quotas-title">
      <div class="card-head"><h2 id="quotas-title">${t("tenants.edit", { tenant: tenant.name })}</h2></div>
      <form id="quotas" onSubmit=${submit}>
        <div class="quota-fields">
          ${field(t("quota.weight"), html`<input name="weight" type="number" min="0.001" step="any" required defaultValue=${tenant.weight} />`)}
          ${QUOTAS.map((name) => html`<div key=${name}>${field(t(`quota.${name}`), html`<input name=${name} type="number" min="0" step="1" placeholder=${t("tenants.no_limit")} defaultValue=${tenant[name] ?? ""} />`)}</div>`)}
        </div>
        <div class="actions"><button type="submit" class="primary">${t("save")}</button><button type="button" onClick=${onclose}>${t("cancel")}</button></div>
      </form>
    </section>`;
  }
}
