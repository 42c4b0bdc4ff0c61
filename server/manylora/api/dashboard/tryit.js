// The same prompt through two of them, adapters, versions or the base, streamed side by side, once or as a conversation.

import { getJson } from "./api.js";
import { exampleList } from "./card.js";
import { byId, copy, h, setText } from "./dom.js";
import { Pane } from "./pane.js";
import { asCurl, asPython } from "./snippets.js";
import { t } from "./words.js";

const field = (label, control, size = "") => h("label", { class: size }, h("span", {}, label), control);
const number = (id, attributes) => h("input", { id, type: "number", ...attributes });

export class TryIt {
  constructor(session, tabs) {
    this.session = session;
    this.tabs = tabs;
    this.base = null;
    this.known = new Map(); // adapters that may be asked, by name
    this.shownFor = null; // the version whose examples are shown
    this.left = new Pane(t("table.adapter"));
    this.right = new Pane(t("try.base"));
    this.build();
  }

  build() {
    const chooser = (id) => h("input", { id, list: "try-names", autocomplete: "off", spellcheck: "false", placeholder: t("try.chooser"), onchange: () => this.chosen() });
    this.adapter = chooser("try-adapter");
    this.other = chooser("try-other");
    this.names = h("datalist", { id: "try-names" });
    this.mode = h("select", { id: "try-mode", onchange: () => this.chosen() }, h("option", { value: "chat" }, t("try.chat")), h("option", { value: "completion" }, t("try.completion")), h("option", { value: "labels" }, t("try.labels")));
    this.picture = null; // the chosen image as a data URL, which is asked about in place of the text
    this.image = h("input", { id: "try-image", type: "file", accept: "image/png,image/jpeg,image/webp,image/gif,image/bmp", onchange: () => this.look() });
    this.tokens = number("try-tokens", { min: 1, max: 4096, value: 96, required: true });
    this.temperature = number("try-temperature", { min: 0, max: 2, step: 0.1, value: 0, required: true });
    this.topP = number("try-top-p", { min: 0.05, max: 1, step: 0.05, placeholder: "1" });
    this.seed = number("try-seed", { min: 0, step: 1, placeholder: t("try.by_chance") });
    this.system = h("textarea", { id: "try-system", rows: 1, placeholder: t("try.system_note") });
    this.prompt = h("textarea", { id: "try-prompt", rows: 3, required: true, placeholder: t("try.prompt_note") });
    this.talk = h("input", { id: "try-talk", type: "checkbox", onchange: () => this.forget() });
    this.go = h("button", { type: "submit", class: "primary", title: "Ctrl-Enter" }, t("try.run"));
    this.stop = h("button", { type: "button", disabled: true, onclick: () => this.abort?.abort() }, t("try.stop"));
    this.fresh = h("button", { type: "button", hidden: true, onclick: () => this.forget() }, t("try.fresh"));
    this.examples = h("div", { class: "example-shelf" });
    this.systemField = field(t("try.system"), this.system);
    this.imageField = field(t("try.image"), this.image, "grow");
    this.imageField.hidden = true;
    this.talkField = h("label", { class: "check" }, this.talk, h("span", {}, t("try.talk")));
    this.ofWriting = [
      field(t("try.tokens"), this.tokens, "small"), field(t("try.temperature"), this.temperature, "small"),
      field(t("try.top_p"), this.topP, "small"), field(t("try.seed"), this.seed, "small"),
    ];
    const form = byId("try-form");
    form.replaceChildren(
      field(t("try.prompt"), this.prompt, "prompt"),
      this.examples,
      this.systemField,
      this.imageField,
      h("div", { class: "fields" }, field(t("try.first"), this.adapter, "grow"), field(t("try.second"), this.other, "grow"), this.names, field(t("try.as"), this.mode)),
      h("div", { class: "fields" }, ...this.ofWriting, this.talkField,
        h("div", { class: "actions" }, this.go, this.stop, this.fresh,
          h("button", { type: "button", class: "quiet", onclick: () => this.copy("curl") }, t("try.copy", { kind: "curl" })),
          h("button", { type: "button", class: "quiet", onclick: () => this.copy("Python") }, t("try.copy", { kind: "Python" })))));
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.run();
    });
    form.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
    });
    byId("try-panes").replaceChildren(this.left.element, this.right.element);
  }

  /** Choose who answers first, with a prompt or without, and bring the box into view. */
  choose(label, prompt = null) {
    this.adapter.value = label;
    if (prompt !== null) this.prompt.value = prompt;
    this.chosen();
    this.tabs.open("try");
    this.prompt.focus({ preventScroll: true });
  }

  setBase(name) {
    if (this.base === name) return;
    if ([null, this.base, ""].includes(this.other.value) || this.base === null) this.other.value = name;
    this.base = name;
    this.right.name(this.titleOf(this.other.value));
    this.list();
  }

  /** `adapters` as the list of adapters has them: those that the visitor may ask. */
  setNames(adapters) {
    this.known = new Map(adapters.map((adapter) => [adapter.name, adapter]));
    this.list();
    // Not under somebody's hands: what they type would go on behind the name.
    if (!this.adapter.value && adapters.length && document.activeElement !== this.adapter) this.adapter.value = adapters[0].name;
    this.showExamples();
  }

  /** Offer every adapter, its newest version where that is not active, and the base. */
  list() {
    const labels = [...this.known.values()].flatMap(({ name, active_version: active, newest_version: newest }) =>
      newest === active ? [name] : [name, `${name}@${newest}`]);
    const wanted = this.base === null ? labels : [...labels, this.base];
    const there = [...this.names.children].map((option) => option.value);
    if (there.length === wanted.length && there.every((name, i) => name === wanted[i])) return;
    this.names.replaceChildren(...wanted.map((name) => h("option", { value: name })));
  }

  titleOf(label) {
    return t(label === this.base ? "try.is_base" : "try.is_adapter", { label });
  }

  /** Something else is to be asked: what was said so far is of no use to it. */
  chosen() {
    const isChat = this.mode.value === "chat";
    this.systemField.hidden = !isChat;
    this.talkField.hidden = !isChat;
    const isLabels = this.mode.value === "labels";
    this.imageField.hidden = !isLabels;
    this.prompt.required = !isLabels || this.picture === null;
    for (const one of this.ofWriting) one.hidden = isLabels;
    if (this.left.turns.length || this.right.turns.length) this.forget();
    this.showExamples();
  }

  /** Read the chosen image, which takes the place of the prompt. */
  async look() {
    const [file] = this.image.files;
    this.picture = null;
    if (file) {
      const reader = new FileReader();
      await new Promise((resolve, reject) => {
        reader.addEventListener("load", resolve);
        reader.addEventListener("error", () => reject(reader.error));
        reader.readAsDataURL(file);
      });
      if (this.image.files[0] === file) this.picture = reader.result;
    }
    this.chosen();
  }

  forget() {
    for (const pane of [this.left, this.right]) pane.clear();
    this.fresh.hidden = true;
    setText(this.go, t("try.run"));
  }

  /** Offer the prompts from the card of whoever answers first. */
  async showExamples() {
    const [name, version] = this.adapter.value.trim().split("@");
    const adapter = this.known.get(name);
    const label = adapter ? `${name}@${version ?? adapter.active_version}` : null;
    if (label === this.shownFor) return;
    this.shownFor = label;
    this.examples.replaceChildren();
    if (!adapter || (version === undefined && !adapter.card_bytes)) return;
    const path = `v1/adapters/${encodeURIComponent(name)}/versions/${encodeURIComponent(version ?? adapter.active_version)}`;
    try {
      if (version !== undefined && !(await getJson(path)).card_bytes) return;
      const card = await getJson(`${path}/card`);
      const shelf = exampleList(card.examples, (text) => { this.prompt.value = text; this.prompt.focus(); });
      if (this.shownFor === label && shelf) this.examples.replaceChildren(shelf);
    } catch {
      // there is no such version, or the server is away: no examples, and running it says why
    }
  }

  /** The route and the body of what is asked, after the turns that a conversation has had. */
  request(model, turns = []) {
    if (this.mode.value === "labels") {
      return ["v1/classify", { model, input: this.picture === null ? this.prompt.value : [{ type: "image_url", image_url: { url: this.picture } }] }];
    }
    const given = { top_p: this.topP.value, seed: this.seed.value };
    const chosen = Object.fromEntries(Object.entries(given).filter(([, value]) => value !== "").map(([name, value]) => [name, Number(value)]));
    const common = { model, max_tokens: Number(this.tokens.value), temperature: Number(this.temperature.value), ...chosen, stream: true, stream_options: { include_usage: true } };
    if (this.mode.value !== "chat") return ["v1/completions", { ...common, prompt: this.prompt.value }];
    const system = this.system.value.trim() ? [{ role: "system", content: this.system.value }] : [];
    return ["v1/chat/completions", { ...common, messages: [...system, ...turns, { role: "user", content: this.prompt.value }] }];
  }

  async copy(kind) {
    const model = this.adapter.value.trim() || this.base;
    const [path, { stream_options: _, ...body }] = this.request(model, this.left.turns);
    const text = kind === "curl" ? asCurl(path, "stream" in body ? { ...body, stream: false } : body, !this.session.you?.is_open) : asPython(path, body);
    await copy(text, t("try.copied", { kind }));
  }

  async run() {
    if (this.base === null || this.abort) return;
    const sides = [[this.left, this.adapter.value.trim()], [this.right, this.other.value.trim()]];
    const isTalk = this.talk.checked && this.mode.value === "chat";
    const asked = this.prompt.value;
    this.abort = new AbortController();
    this.go.disabled = true;
    this.stop.disabled = false;
    if (!isTalk) this.forget();
    try {
      const answered = await Promise.all(sides.map(([pane, label]) => this.ask(pane, label, asked, isTalk)));
      if (isTalk && answered.includes(true)) this.prompt.value = "";
    } catch (error) {
      this.session.ask(error.message);
    } finally {
      this.abort = null;
      this.go.disabled = false;
      this.stop.disabled = true;
    }
  }

  /** Whether the answer is a turn of the conversation. */
  async ask(pane, label, asked, isTalk) {
    pane.name(label ? this.titleOf(label) : t("try.nobody"));
    if (!label) {
      setText(pane.foot, t("try.choose"));
      return false;
    }
    if (this.mode.value === "labels") {
      await pane.classify(...this.request(label), this.abort.signal);
      return false;
    }
    const said = await pane.run(...this.request(label, pane.turns), this.abort.signal, isTalk ? asked : null);
    if (!isTalk || said === null) return false;
    pane.turns.push({ role: "user", content: asked }, { role: "assistant", content: said });
    this.fresh.hidden = false;
    setText(this.go, t("try.go_on"));
    return true;
  }
}
