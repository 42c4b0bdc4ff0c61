// The same prompt through an adapter and through the base, streamed side by side.

import { stream } from "./api.js";
import { byId, h, setText } from "./dom.js";
import { count, ms, rate } from "./format.js";

/** One answer being written. */
class Pane {
  constructor(title) {
    this.title = h("h3", {}, title);
    this.badge = h("span", { class: "hint" });
    this.text = h("div", { class: "answer", tabindex: 0 });
    this.foot = h("p", { class: "answer-foot", role: "status" }, "Not run yet.");
    this.element = h("section", { class: "pane", "aria-busy": "false" }, h("div", { class: "pane-head" }, this.title, this.badge), this.text, this.foot);
    this.text.setAttribute("aria-label", `Answer of ${title}`);
  }

  async run(path, body, signal) {
    const started = performance.now();
    let first = null;
    let tokens = null;
    let chunks = 0;
    this.text.textContent = "";
    delete this.element.dataset.state;
    setText(this.badge, "");
    setText(this.foot, "Waiting…");
    this.element.setAttribute("aria-busy", "true");
    try {
      for await (const event of stream(path, body, signal)) {
        const piece = event.choices?.[0]?.text ?? event.choices?.[0]?.delta?.content ?? "";
        if (piece) {
          first ??= performance.now();
          chunks += 1;
          this.text.append(piece);
        }
        if (event.usage) tokens = event.usage.completion_tokens;
        if (event.manylora) this.origin(event.manylora);
        setText(this.foot, this.summary(started, first, tokens ?? chunks));
      }
    } catch (error) {
      if (error.name === "AbortError") setText(this.foot, `Stopped. ${this.foot.textContent}`);
      else {
        this.element.dataset.state = "bad";
        setText(this.foot, error.message);
        if (error.status === 401) throw error;
      }
    } finally {
      this.element.setAttribute("aria-busy", "false");
    }
  }

  origin({ adapter, load_tier: tier, ttft_ms: ttft }) {
    this.ttft = ttft;
    setText(this.badge, adapter ? `${adapter.name}@${adapter.version} · from ${tier}` : "no adapter");
  }

  summary(started, first, tokens) {
    if (first === null) return "Waiting…";
    const seconds = (performance.now() - first) / 1000;
    const speed = tokens > 1 && seconds > 0 ? ` · ${rate((tokens - 1) / seconds)} tokens/s` : "";
    return `first token after ${ms(first - started)} · ${count(tokens)} tokens${speed}`;
  }
}

export class TryIt {
  constructor(session) {
    this.session = session;
    this.base = null;
    this.left = new Pane("Adapter");
    this.right = new Pane("Base");
    this.build();
  }

  build() {
    this.adapter = h("input", { id: "try-adapter", list: "try-adapters", autocomplete: "off", spellcheck: "false", placeholder: "adapter or adapter@2" });
    this.names = h("datalist", { id: "try-adapters" });
    this.mode = h("select", { id: "try-mode" }, h("option", { value: "chat" }, "Chat"), h("option", { value: "completion" }, "Completion"));
    this.tokens = h("input", { id: "try-tokens", type: "number", min: 1, max: 4096, value: 96, required: true });
    this.temperature = h("input", { id: "try-temperature", type: "number", min: 0, max: 2, step: 0.1, value: 0, required: true });
    this.prompt = h("textarea", { id: "try-prompt", rows: 3, required: true, placeholder: "Write something for both to answer" });
    this.go = h("button", { type: "submit", class: "primary" }, "Run both");
    this.stop = h("button", { type: "button", disabled: true, onclick: () => this.abort?.abort() }, "Stop");
    const field = (label, control, size = "") => h("label", { class: size }, h("span", {}, label), control);
    const form = byId("try-form");
    form.replaceChildren(
      field("Prompt", this.prompt, "prompt"),
      h("div", { class: "fields" },
        field("Adapter", this.adapter, "grow"), this.names,
        field("As", this.mode),
        field("Tokens", this.tokens, "small"),
        field("Temperature", this.temperature, "small"),
        h("div", { class: "actions" }, this.go, this.stop)));
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.run();
    });
    this.prompt.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
    });
    byId("try-panes").replaceChildren(this.left.element, this.right.element);
  }

  /** Choose an adapter and bring the box into view. */
  choose(label) {
    this.adapter.value = label;
    byId("try").scrollIntoView({ block: "start" });
    this.prompt.focus({ preventScroll: true });
  }

  setBase(name) {
    this.base = name;
    setText(this.right.title, `Base: ${name}`);
  }

  setNames(names) {
    const known = [...this.names.children].map((option) => option.value);
    if (known.length === names.length && known.every((name, i) => name === names[i])) return;
    this.names.replaceChildren(...names.map((name) => h("option", { value: name })));
    // Not under somebody's hands: what they type would go on behind the name.
    if (!this.adapter.value && names.length && document.activeElement !== this.adapter) this.adapter.value = names[0];
  }

  body(model) {
    const common = { model, max_tokens: Number(this.tokens.value), temperature: Number(this.temperature.value), stream: true, stream_options: { include_usage: true } };
    return this.mode.value === "chat"
      ? ["v1/chat/completions", { ...common, messages: [{ role: "user", content: this.prompt.value }] }]
      : ["v1/completions", { ...common, prompt: this.prompt.value }];
  }

  async run() {
    if (this.base === null || this.abort) return;
    const chosen = this.adapter.value.trim();
    setText(this.left.title, chosen ? `Adapter: ${chosen}` : "Adapter");
    this.abort = new AbortController();
    this.go.disabled = true;
    this.stop.disabled = false;
    try {
      const runs = [this.right.run(...this.body(this.base), this.abort.signal)];
      if (chosen) runs.push(this.left.run(...this.body(chosen), this.abort.signal));
      else setText(this.left.foot, "Choose an adapter to compare.");
      await Promise.all(runs);
    } catch (error) {
      this.session.ask(error.message);
    } finally {
      this.abort = null;
      this.go.disabled = false;
      this.stop.disabled = true;
    }
  }
}
