// Uploading by drag and drop or by choosing: stage, send with progress, show what the server found.

import { upload } from "./api.js";
import { byId, h, setText, toast } from "./dom.js";
import { bytes } from "./format.js";
import { problemList, reportView } from "./report.js";
import { t } from "./words.js";

const CONFIG = "adapter_config.json";
const WEIGHTS = "adapter_model.safetensors";
const BESIDE = ["manylora.json", "chat_template.jinja"];
const ARCHIVE = /\.(zip|tar|tar\.gz|tgz)$/i;
const NAME = "[a-z0-9][a-z0-9._\\-]{0,63}";

/** All files of a drop, folders opened one level deep, as [{path, file}]. */
async function filesOf(transfer) {
  const entries = [...transfer.items].map((item) => item.webkitGetAsEntry?.()).filter(Boolean);
  if (entries.length === 0) return [...transfer.files].map((file) => ({ path: file.name, file }));
  const found = await Promise.all(entries.map((entry) => (entry.isDirectory ? folder(entry) : single(entry))));
  return found.flat();
}

const single = (entry) => new Promise((resolve, reject) =>
  entry.file((file) => resolve([{ path: entry.fullPath.slice(1), file }]), reject));

async function folder(entry) {
  const reader = entry.createReader();
  const inside = [];
  for (;;) {
    const some = await new Promise((resolve, reject) => reader.readEntries(resolve, reject));
    if (some.length === 0) break;
    inside.push(...some.filter((one) => one.isFile));
  }
  return (await Promise.all(inside.map(single))).flat();
}

/** What will be sent, or why nothing can be: {parts: [[field, file, filename]], name} or {fault}. */
function stage(found) {
  const archive = found.find(({ file }) => ARCHIVE.test(file.name));
  if (archive && found.length === 1) {
    return { parts: [["archive", archive.file, archive.file.name]], name: proposed(archive.file.name.replace(ARCHIVE, "")) };
  }
  const config = found.find(({ file }) => file.name === CONFIG);
  const weights = found.find(({ file }) => file.name === WEIGHTS) ?? found.find(({ file }) => file.name.startsWith("adapter_model."));
  if (config && weights) {
    const parent = weights.path.split("/").at(-2) ?? "";
    const beside = found.filter(({ file, path }) => BESIDE.includes(file.name) && path === config.path.replace(CONFIG, file.name));
    const files = [config, weights, ...beside].map(({ file }) => ["files", file, file.name]);
    return { parts: files, name: proposed(parent) };
  }
  return { fault: t("upload.fault", { config: CONFIG, weights: WEIGHTS, found: found.map(({ file }) => file.name).join(", ") || t("upload.nothing") }) };
}

const proposed = (text) => text.toLowerCase().replace(/[^a-z0-9._-]+/g, "-").replace(/^[^a-z0-9]+/, "").slice(0, 64);

export class Uploader {
  /** `onrows` takes what is dropped on the tab of jobs: a file of rows. */
  constructor(session, tabs, { onuploaded, onrows }) {
    this.session = session;
    this.tabs = tabs;
    this.onuploaded = onuploaded;
    this.onrows = onrows;
    this.host = byId("upload");
    this.staged = null;
    this.depth = 0;
    byId("upload-button").addEventListener("click", () => this.toggle());
    this.build();
    this.listen();
  }

  allow(may) {
    byId("upload-button").hidden = !may;
    if (!may) this.host.hidden = true;
  }

  toggle() {
    this.host.hidden = !this.host.hidden;
    if (!this.host.hidden) this.browse.focus();
  }

  build() {
    const files = h("input", { type: "file", multiple: true, class: "sr-only", tabindex: -1, "aria-label": t("upload.files"), onchange: () => this.takeChosen(files) });
    const whole = h("input", { type: "file", webkitdirectory: true, class: "sr-only", tabindex: -1, "aria-label": t("upload.folder_of"), onchange: () => this.takeChosen(whole) });
    this.browse = h("button", { type: "button", onclick: () => files.click() }, t("upload.choose"));
    this.zone = h("div", { class: "zone" },
      h("p", { class: "zone-title" }, t("upload.drop_here")),
      h("p", { class: "hint" }, t("upload.what", { config: CONFIG, weights: WEIGHTS })),
      h("div", { class: "actions" }, h("button", { type: "button", onclick: () => whole.click() }, t("upload.choose_folder")), this.browse), files, whole);
    this.name = h("input", { id: "upload-name", required: true, pattern: NAME, maxlength: 64, autocomplete: "off", spellcheck: "false", placeholder: "legal-contracts", title: t("upload.name_rule") });
    this.about = h("input", { id: "upload-description", maxlength: 400, autocomplete: "off", placeholder: t("optional") });
    this.activate = h("select", {},
      h("option", { value: "" }, t("upload.if_first")),
      h("option", { value: "true" }, t("upload.at_once")),
      h("option", { value: "false" }, t("upload.not_yet")));
    this.pinned = h("input", { type: "checkbox" });
    this.list = h("ul", { class: "staged" });
    this.submit = h("button", { type: "submit", class: "primary", disabled: true }, t("upload.go"));
    this.cancel = h("button", { type: "button", hidden: true, onclick: () => this.abort?.abort() }, t("cancel"));
    this.bar = h("progress", { max: 1, value: 0, hidden: true, "aria-label": t("upload.progress") });
    this.state = h("p", { class: "hint", role: "status" });
    this.result = h("div", { class: "result" });
    this.form = h("form", { class: "upload-form", onsubmit: (event) => this.start(event) },
      this.list,
      h("div", { class: "fields" },
        h("label", {}, h("span", {}, t("upload.name")), this.name),
        h("label", { class: "grow" }, h("span", {}, t("upload.description")), this.about)),
      h("div", { class: "checks" },
        h("label", {}, t("upload.activate"), this.activate),
        h("label", {}, this.pinned, t("upload.pin"))),
      h("div", { class: "actions" }, this.submit, this.cancel, this.bar, this.state));
    this.host.replaceChildren(this.zone, this.form, this.result);
  }

  listen() {
    const veil = byId("drop-veil");
    const carriesFiles = (event) => event.dataTransfer && [...event.dataTransfer.types].includes("Files");
    const isRows = () => this.tabs.now === "jobs";
    const show = (on) => {
      veil.hidden = !on;
      setText(veil.firstElementChild, t(isRows() ? "drop.rows" : "drop.adapter"));
    };
    addEventListener("dragenter", (event) => {
      if (!carriesFiles(event)) return;
      this.depth += 1;
      show(this.session.has("manager"));
    });
    addEventListener("dragleave", (event) => {
      if (!carriesFiles(event)) return;
      this.depth = Math.max(0, this.depth - 1);
      if (this.depth === 0) show(false);
    });
    addEventListener("dragover", (event) => carriesFiles(event) && event.preventDefault());
    addEventListener("drop", async (event) => {
      if (!carriesFiles(event)) return;
      event.preventDefault();
      this.depth = 0;
      show(false);
      if (!this.session.has("manager")) toast(t("upload.takes_manager"), "bad");
      else if (isRows()) this.onrows(event.dataTransfer.files[0]);
      else this.take(await filesOf(event.dataTransfer));
    });
  }

  /** What a picker gave, and the same again if it is chosen again. */
  takeChosen(picker) {
    this.take([...picker.files].map((file) => ({ path: file.webkitRelativePath || file.name, file })));
    picker.value = "";
  }

  take(found) {
    if (this.abort) return;
    this.tabs.open("adapters");
    const { parts, name, fault } = stage(found);
    this.staged = parts ?? null;
    this.host.hidden = false;
    this.submit.disabled = !parts;
    this.result.replaceChildren(...(fault ? [h("p", { class: "problem-line", role: "alert" }, fault)] : []));
    this.list.replaceChildren(...(parts ?? []).map(([, file, filename]) => h("li", {}, h("code", {}, filename), h("span", { class: "hint" }, bytes(file.size)))));
    setText(this.state, "");
    if (name && !this.name.value) this.name.value = name;
    this.host.scrollIntoView({ block: "nearest" });
    (this.name.value ? this.submit : this.name).focus();
  }

  fields() {
    const form = new FormData();
    form.append("name", this.name.value.trim());
    if (this.about.value.trim()) form.append("description", this.about.value.trim());
    if (this.activate.value) form.append("activate", this.activate.value);
    if (this.pinned.checked) form.append("pinned", "true");
    for (const [field, file, filename] of this.staged) form.append(field, file, filename);
    return form;
  }

  async start(event) {
    event.preventDefault();
    this.abort = new AbortController();
    this.busy(true);
    this.result.replaceChildren();
    try {
      const { status, body } = await upload("v1/adapters", this.fields(), { onprogress: (sent, total) => this.progress(sent, total), signal: this.abort.signal });
      this.accepted(status, body);
    } catch (error) {
      this.refused(error);
    } finally {
      this.abort = null;
      this.busy(false);
    }
  }

  busy(is) {
    this.bar.hidden = !is;
    this.cancel.hidden = !is;
    this.submit.disabled = is || !this.staged;
    this.host.setAttribute("aria-busy", String(is));
  }

  progress(sent, total) {
    this.bar.value = total > 0 ? sent / total : 0;
    setText(this.state, sent >= total ? t("upload.sent") : t("count.of", { part: bytes(sent), whole: bytes(total) }));
  }

  accepted(status, version) {
    const label = `${version.name}@${version.version}`;
    const waits = version.active_version === null ? "upload.ready_unnamed" : "upload.ready_waits";
    const key = status === 200 ? "upload.known" : version.active ? "upload.ready" : waits;
    const text = t(key, { label, active: `${version.name}@${version.active_version}` });
    setText(this.state, "");
    this.result.replaceChildren(h("p", { class: "good-line", role: "status" }, text), reportView(version));
    this.staged = null;
    this.list.replaceChildren();
    for (const field of [this.name, this.about]) field.value = "";
    this.onuploaded(version);
  }

  refused(error) {
    setText(this.state, "");
    if (error.name === "AbortError") {
      setText(this.state, t("upload.cancelled"));
      return;
    }
    if (error.status === 401) this.session.ask(error.message);
    const problems = error.problems ?? [];
    const title = problems.length === 0 ? error.message : t("upload.refused", { n: problems.length });
    this.result.replaceChildren(h("p", { class: "problem-line", role: "alert" }, title), ...(problems.length ? [problemList(problems)] : []));
  }
}
