// Uploading by drag and drop or by choosing: stage, send with progress, show what the server found.

import { upload } from "./api.js";
import { byId, h, setText, toast } from "./dom.js";
import { bytes } from "./format.js";
import { problemList, reportView } from "./report.js";

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
  return { fault: `An adapter is one archive (.zip, .tar, .tar.gz, .tgz), or the two files ${CONFIG} and ${WEIGHTS}. This was: ${found.map(({ file }) => file.name).join(", ") || "nothing"}.` };
}

const proposed = (text) => text.toLowerCase().replace(/[^a-z0-9._-]+/g, "-").replace(/^[^a-z0-9]+/, "").slice(0, 64);

export class Uploader {
  constructor(session, { onuploaded }) {
    this.session = session;
    this.onuploaded = onuploaded;
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
    const files = h("input", { type: "file", multiple: true, class: "sr-only", tabindex: -1, "aria-label": "Adapter files", onchange: () => this.take([...files.files].map((file) => ({ path: file.name, file }))) });
    this.input = files;
    this.browse = h("button", { type: "button", onclick: () => files.click() }, "Choose files");
    this.zone = h("div", { class: "zone" },
      h("p", { class: "zone-title" }, "Drop an adapter here"),
      h("p", { class: "hint" }, `${CONFIG} and ${WEIGHTS}, their folder, or one archive of them`),
      this.browse, files);
    this.name = h("input", { id: "upload-name", required: true, pattern: NAME, maxlength: 64, autocomplete: "off", spellcheck: "false", placeholder: "legal-contracts", title: "lower-case letters, digits, dot, dash and underscore; up to 64" });
    this.about = h("input", { id: "upload-description", maxlength: 400, autocomplete: "off", placeholder: "optional" });
    this.activate = h("select", {},
      h("option", { value: "" }, "if it is the first version of its name"),
      h("option", { value: "true" }, "at once"),
      h("option", { value: "false" }, "not yet"));
    this.pinned = h("input", { type: "checkbox" });
    this.list = h("ul", { class: "staged" });
    this.submit = h("button", { type: "submit", class: "primary", disabled: true }, "Upload");
    this.cancel = h("button", { type: "button", hidden: true, onclick: () => this.abort?.abort() }, "Cancel");
    this.bar = h("progress", { max: 1, value: 0, hidden: true, "aria-label": "Upload progress" });
    this.state = h("p", { class: "hint", role: "status" });
    this.result = h("div", { class: "result" });
    this.form = h("form", { class: "upload-form", onsubmit: (event) => this.start(event) },
      this.list,
      h("div", { class: "fields" },
        h("label", {}, h("span", {}, "Name"), this.name),
        h("label", { class: "grow" }, h("span", {}, "Description"), this.about)),
      h("div", { class: "checks" },
        h("label", {}, "Make it active", this.activate),
        h("label", {}, this.pinned, "Pin to the device")),
      h("div", { class: "actions" }, this.submit, this.cancel, this.bar, this.state));
    this.host.replaceChildren(this.zone, this.form, this.result);
  }

  listen() {
    const veil = byId("drop-veil");
    const carriesFiles = (event) => event.dataTransfer && [...event.dataTransfer.types].includes("Files");
    const show = (on) => { veil.hidden = !on; };
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
      if (!this.session.has("manager")) toast("Uploading takes a key with the role manager.", "bad");
      else this.take(await filesOf(event.dataTransfer));
    });
  }

  take(found) {
    if (this.abort) return;
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
    setText(this.state, sent >= total ? "Sent. The server checks it…" : `${bytes(sent)} of ${bytes(total)}`);
  }

  accepted(status, version) {
    const label = `${version.name}@${version.version}`;
    const stays = version.active_version === null ? "Nothing answers to the name yet" : `${version.name}@${version.active_version} goes on answering to the name`;
    const ready = version.active ? `${label} is ready and active.` : `${label} is ready. ${stays}: compare them in Try it, then promote it in the adapter's drawer.`;
    const text = status === 200 ? `${label} has exactly this content already. Nothing new was stored.` : ready;
    setText(this.state, "");
    this.result.replaceChildren(h("p", { class: "good-line", role: "status" }, text), reportView(version));
    this.staged = null;
    this.input.value = "";
    this.list.replaceChildren();
    for (const field of [this.name, this.about]) field.value = "";
    this.onuploaded(version);
  }

  refused(error) {
    setText(this.state, "");
    if (error.name === "AbortError") {
      setText(this.state, "Cancelled. Nothing was stored.");
      return;
    }
    if (error.status === 401) this.session.ask(error.message);
    const problems = error.problems ?? [];
    const title = problems.length === 0 ? error.message : `Refused: ${problems.length === 1 ? "one problem" : `${problems.length} problems`}. Nothing was stored.`;
    this.result.replaceChildren(h("p", { class: "problem-line", role: "alert" }, title), ...(problems.length ? [problemList(problems)] : []));
  }
}
