// The drawer of one adapter: its versions, and what the visitor may do with them.

import { download, getJson, send } from "./api.js";
import { baseRemark } from "./adapters.js";
import { canaryForm, CanaryWatch } from "./canary.js";
import { cardView } from "./card.js";
import { byId, confirmed, h, toast } from "./dom.js";
import { bytes, day } from "./format.js";
import { historyView } from "./history.js";
import { Inspection } from "./inspect.js";
import { lineageLine, reportView } from "./report.js";
import { decoded } from "./tabs.js";
import { t, tierName } from "./words.js";

const PAGE = 50; // versions

/** What a saved mix is made of, in words. */
function mixOf(parts) {
  return t("detail.mix", { parts: parts.map((part) => `${part.weight} × ${part.name}@${part.version}`).join(" + ") });
}

export class Detail {
  constructor(session, tabs, { onchange, ontry }) {
    this.session = session;
    this.tabs = tabs;
    this.onchange = onchange;
    this.ontry = ontry;
    this.dialog = byId("detail");
    this.adapter = null;
    this.versions = new Map(); // by number: those that were fetched so far
    this.unfolded = null; // what is shown below a version: {button, place, shown}
    this.watch = null; // of the canary that runs
    this.dialog.addEventListener("close", () => this.watch?.destroy());
    this.dialog.addEventListener("close", () => history.replaceState(null, "", `#${this.tabs.now}`));
    this.dialog.addEventListener("click", (event) => {
      if (event.target === this.dialog) this.dialog.close();
    });
  }

  path(adapter, rest = "", more = "") {
    return `v1/adapters/${encodeURIComponent(adapter.name)}${rest}?tenant=${encodeURIComponent(adapter.tenant)}${more}`;
  }

  async open({ name, tenant }) {
    await this.guarded(async () => {
      this.adapter = await getJson(this.path({ name, tenant }, "", `&limit=${PAGE}`));
      this.versions = new Map(this.adapter.versions.map((version) => [version.version, version]));
      this.draw();
      if (!this.dialog.open) this.dialog.showModal();
      history.replaceState(null, "", `#adapters/${encodeURIComponent(this.adapter.tenant)}/${encodeURIComponent(this.adapter.name)}`);
    });
  }

  /** Open the adapter that the page's address names, if it names one. */
  async openAddressed() {
    const [, tenant, name] = /^#adapters\/([^/]+)\/([^/]+)$/.exec(location.hash) ?? [];
    if (name) await this.open({ tenant: decoded(tenant), name: decoded(name) });
  }

  /** Show the versions before those that are shown, too. */
  async older() {
    await this.guarded(async () => {
      const { adapter } = this;
      const page = await getJson(this.path(adapter, "", `&limit=${PAGE}&before=${adapter.next_before}`));
      adapter.next_before = page.next_before;
      for (const version of page.versions) this.versions.set(version.version, version);
      this.draw();
    });
  }

  /** Run something that may be refused, and say so. */
  async guarded(work) {
    try {
      await work();
    } catch (error) {
      if (error.status === 401) this.session.ask(error.message);
      else toast(error.message, "bad");
    }
  }

  /** Change the adapter, then show it as it is now; `action` goes into the note that it is done. */
  async change(body, done, action = null) {
    await this.guarded(async () => {
      await send("PATCH", this.path(this.adapter), body);
      toast(done, "good", action);
      await this.open(this.adapter);
      this.onchange();
    });
  }

  /** Make a version active; what that took the place of is one click away. */
  async promote(number) {
    const { adapter } = this;
    const undo = adapter.active_version === null ? null : { label: t("undo"), run: () => this.rollBack(adapter, number) };
    await this.change({ active_version: number }, t("detail.answers_now", { label: `${adapter.name}@${number}` }), undo);
  }

  /** Undo a promotion, unless somebody has made another version active since. */
  async rollBack(adapter, from) {
    await this.guarded(async () => {
      const { active_version: number } = await send("POST", this.path(adapter, "/rollback"), { if_active: from });
      toast(t("detail.answers_again", { label: `${adapter.name}@${number}` }));
      if (this.dialog.open && this.adapter.id === adapter.id) await this.open(adapter);
      this.onchange();
    });
  }

  /** Let a version answer a share of the requests for the bare name. */
  async beginCanary(body) {
    await this.guarded(async () => {
      await send("PUT", this.path(this.adapter, "/canary"), body);
      toast(t("canary.begun", { label: `${this.adapter.name}@${body.version}` }));
      await this.open(this.adapter);
    });
  }

  async stopCanary() {
    await this.guarded(async () => {
      await send("DELETE", this.path(this.adapter, "/canary"));
      toast(t("canary.stopped"));
      await this.open(this.adapter);
    });
  }

  /** What came of the canary that runs, for those who may know. */
  canary(may) {
    this.watch?.destroy();
    this.watch = null;
    const { adapter } = this;
    if (!adapter.canary) return null;
    const button = (action, style, run) => h("button", { type: "button", class: style, data: { action }, onclick: run }, t(`canary.${action}`));
    this.watch = new CanaryWatch(this.path(adapter, "/canary"), ({ version }) =>
      may ? [button("promote", "primary", () => this.promote(version)), button("stop", "danger", () => this.stopCanary())] : []);
    return this.watch.element;
  }

  draw() {
    this.foldAway();
    const { adapter } = this;
    const may = this.session.mayManage(adapter.tenant);
    const versions = [...this.versions.values()].toSorted((a, b) => b.version - a.version);
    const older = adapter.next_before === null ? null : h("button", { type: "button", class: "quiet", onclick: () => this.older() }, t("detail.older"));
    this.dialog.replaceChildren(
      h("div", { class: "drawer-head" },
        h("div", {}, h("h2", { id: "detail-title" }, adapter.name), h("p", { class: "hint" }, t("detail.tenant", { tenant: adapter.tenant }))),
        h("button", { type: "button", class: "quiet", onclick: () => this.dialog.close() }, t("close"))),
      h("p", { class: "about" }, adapter.description || t("detail.no_description")),
      this.actions(may),
      ...[this.canary(may)].filter(Boolean),
      h("h3", {}, t("detail.versions", { n: adapter.num_versions })),
      h("ol", { class: "versions" }, versions.map((version) => this.version(version, may))),
      h("div", { class: "actions" }, older),
      ...this.history(),
    );
  }

  actions(may) {
    const { adapter } = this;
    const tryIt = this.session.mayUse(adapter.tenant) && adapter.status === "ready"
      ? h("button", { type: "button", class: "primary", onclick: () => this.tryIt(adapter.name) }, t("tab.try"))
      : null;
    if (!may) {
      const why = this.session.has("manager") ? t("detail.belongs", { tenant: adapter.tenant }) : t("detail.takes_manager");
      return h("div", { class: "actions" }, tryIt, h("span", { class: "hint" }, why));
    }
    const pin = () => this.change({ pinned: !adapter.pinned }, t(adapter.pinned ? "detail.may_leave" : "detail.stays", { name: adapter.name }));
    return h("div", { class: "actions" },
      tryIt,
      h("button", { type: "button", "aria-pressed": String(adapter.pinned), onclick: pin }, t(adapter.pinned ? "detail.unpin" : "detail.pin")),
      h("button", { type: "button", class: "danger push", onclick: () => this.remove() }, t("detail.delete")));
  }

  version(version, may) {
    const { adapter } = this;
    const isActive = version.version === adapter.active_version;
    const isReady = version.status === "ready";
    const notReady = { other_base: t("detail.other_base"), missing_part: t("detail.missing_part") }[version.status];
    const remark = baseRemark(version);
    const label = `${adapter.name}@${version.version}`;
    const place = h("div", { class: "version-report" });
    const fold = (text, show) => this.folded(text, place, show);
    const path = `/versions/${version.version}`;
    const buttons = version.mix ? [] : [
      fold(t("detail.report"), async () => ({ element: reportView(await getJson(this.path(adapter, path))) })),
      ...(version.card_bytes ? [fold(t("detail.card"), () => this.card(version))] : []),
      ...(Object.keys(version.defaults).length ? [fold(t("detail.defaults"), () => ({ element: defaultsView(version.defaults) }))] : []),
      fold(t("detail.inspect"), () => Inspection.load(this.path(adapter, `${path}/inspection`))),
    ];
    if (may && !isActive && isReady) {
      const isOlder = adapter.active_version !== null && version.version < adapter.active_version;
      buttons.push(h("button", { type: "button", class: "quiet", onclick: () => this.promote(version.version) }, t(isOlder ? "detail.roll_back" : "detail.promote")));
    }
    if (may && !isActive && isReady && adapter.active_version !== null) {
      buttons.push(fold(t("canary.title"), () => ({ element: canaryForm(version.version, adapter.canary, (body) => this.beginCanary(body)) })));
    }
    if (!isActive && isReady && this.session.mayUse(adapter.tenant)) buttons.push(h("button", { type: "button", class: "quiet", onclick: () => this.tryIt(label) }, t("detail.try")));
    if (!version.mix && this.session.has("manager")) buttons.push(h("button", { type: "button", class: "quiet", onclick: () => this.guarded(() => download(this.path(adapter, `/versions/${version.version}/download`), `${label}.tar.gz`)) }, t("detail.download")));
    if (may && !isActive) buttons.push(h("button", { type: "button", class: "quiet danger-text", onclick: () => this.removeVersion(version.version) }, t("delete")));
    return h("li", { data: { active: String(isActive) } },
      h("div", { class: "version-line" },
        h("strong", {}, t("version", { number: version.version })),
        isActive && isReady ? h("span", { class: "badge" }, t("detail.active")) : null,
        version.version === adapter.canary?.version ? h("span", { class: "badge run" }, t("canary.title")) : null,
        remark.text ? h("span", { class: "badge warn", title: remark.title }, remark.text) : null,
        h("span", { class: "tier", data: { tier: version.tier ?? "" } }, tierName(version.tier))),
      h("p", { class: "hint" }, `${version.mix ? mixOf(version.mix) : `${version.kind}, ${t("detail.rank", { rank: version.rank })} · ${bytes(version.size_bytes)}`} · ${day(version.created)}${notReady ? ` · ${notReady}` : ""}`),
      lineageLine(version),
      h("div", { class: "version-actions" }, buttons),
      place);
  }

  /** The README.md that came with a version, with its examples for those who may try them. */
  async card(version) {
    const { adapter } = this;
    const label = version.version === adapter.active_version ? adapter.name : `${adapter.name}@${version.version}`;
    const mayTry = version.status === "ready" && this.session.mayUse(adapter.tenant);
    const card = await getJson(this.path(adapter, `/versions/${version.version}/card`));
    return { element: cardView(card, mayTry ? (prompt) => this.tryIt(label, prompt) : null) };
  }

  /** A button for who changed the adapter and when, where the visitor may know. */
  history() {
    const { adapter } = this;
    if (!this.session.has("admin") && this.session.you?.tenant !== adapter.tenant) return [];
    const place = h("div", { class: "version-report" });
    const show = async () => ({ element: historyView(await getJson(this.path(adapter, "/history"))) });
    return [h("div", { class: "version-actions" }, this.folded(t("detail.history"), place, show)), place];
  }

  /** A button that shows something in a place, and folds it away again. */
  folded(text, place, show) {
    return h("button", { type: "button", class: "quiet", "aria-expanded": "false", onclick: (event) => this.fold(event.currentTarget, place, show) }, text);
  }

  /** Show something below a version, or fold it away again; only one thing is open. */
  async fold(button, place, show) {
    const wasThis = button === this.unfolded?.button;
    this.foldAway();
    if (wasThis) return;
    await this.guarded(async () => {
      button.setAttribute("aria-busy", "true");
      try {
        const shown = await show();
        this.foldAway();
        this.unfolded = { button, place, shown };
        place.replaceChildren(shown.element);
        button.setAttribute("aria-expanded", "true");
      } finally {
        button.removeAttribute("aria-busy");
      }
    });
  }

  foldAway() {
    if (!this.unfolded) return;
    const { button, place, shown } = this.unfolded;
    this.unfolded = null;
    shown.destroy?.();
    place.replaceChildren();
    button.setAttribute("aria-expanded", "false");
  }

  tryIt(label, prompt = null) {
    this.dialog.close();
    this.ontry(label, prompt);
  }

  async remove() {
    const { adapter } = this;
    const sure = await confirmed(t("detail.delete_sure", { label: adapter.name }), t("detail.delete_note", { n: adapter.num_versions }), t("detail.delete"));
    if (!sure) return;
    await this.guarded(async () => {
      await send("DELETE", this.path(adapter));
      this.dialog.close();
      toast(t("detail.deleted", { label: adapter.name }));
      this.onchange();
    });
  }

  async removeVersion(number) {
    const { adapter } = this;
    const label = `${adapter.name}@${number}`;
    if (!(await confirmed(t("detail.delete_sure", { label }), t("detail.delete_version_note"), t("detail.delete_version")))) return;
    await this.guarded(async () => {
      await send("DELETE", this.path(adapter, `/versions/${number}`));
      toast(t("detail.deleted", { label }));
      this.onchange();
      await this.open(adapter);
    });
  }
}

/** What requests that name a version get where they do not say it themselves. */
function defaultsView({ locked = [], ...fields }) {
  const shown = (value) => (typeof value === "string" ? value : JSON.stringify(value));
  return h("dl", { class: "facts defaults" },
    Object.entries(fields).flatMap(([name, value]) => [
      h("dt", {}, locked.includes(name) ? t("detail.locked", { name }) : name),
      h("dd", {}, shown(value)),
    ]));
}
