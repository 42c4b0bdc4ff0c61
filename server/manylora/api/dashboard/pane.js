// One of the answers that are written side by side, and the conversation that it is a part of.

import { send, stream } from "./api.js";
import { h, setText } from "./dom.js";
import { count, ms, rate } from "./format.js";
import { t, tierName } from "./words.js";

const LABELS_SHOWN = 20;

export class Pane {
  constructor(title) {
    this.turns = []; // messages so far, the answers of this pane's own model among them
    this.title = h("h3", {}, title);
    this.badge = h("span", { class: "hint" });
    this.text = h("div", { class: "answer", tabindex: 0, role: "region" });
    this.foot = h("p", { class: "answer-foot", role: "status" }, t("pane.not_run"));
    this.element = h("section", { class: "pane", "aria-busy": "false" }, h("div", { class: "pane-head" }, this.title, this.badge), this.text, this.foot);
    this.name(title);
  }

  name(title) {
    setText(this.title, title);
    this.text.setAttribute("aria-label", t("pane.answer_of", { title }));
    this.element.setAttribute("aria-label", title);
  }

  /** Forget the conversation. */
  clear() {
    this.turns = [];
    this.text.replaceChildren();
  }

  /** Stream one answer; `asked` is shown before it in a conversation. Throws where the visitor has no right to ask. */
  async run(path, body, signal, asked = null) {
    const started = performance.now();
    let first = null;
    let tokens = null;
    let chunks = 0;
    return this.filled(asked, async (said) => {
      for await (const event of stream(path, body, signal)) {
        const piece = event.choices?.[0]?.text ?? event.choices?.[0]?.delta?.content ?? "";
        if (piece) {
          first ??= performance.now();
          chunks += 1;
          said.append(piece);
          this.text.scrollTop = this.text.scrollHeight;
        }
        if (event.usage) tokens = event.usage.completion_tokens;
        if (event.manylora) this.origin(event.manylora);
        setText(this.foot, this.summary(started, first, tokens ?? chunks));
      }
    });
  }

  /** Show the labels of one text or image, the likeliest first, or of each token. Throws as `run` does. */
  async classify(path, body, signal) {
    const started = performance.now();
    await this.filled(null, async (said) => {
      const { data: [found], usage, manylora } = await send("POST", path, body, signal);
      const rows = found.tokens
        ? found.tokens.map(({ word, entity, score }) => [t("pane.entity", { word, entity }), score])
        : found.labels.slice(0, LABELS_SHOWN).map(({ label, score }) => [label, score]);
      said.append(h("ol", { class: "labels" }, ...rows.map(([label, score]) => h("li", {}, h("span", {}, label), h("span", {}, score.toFixed(3))))));
      this.origin(manylora);
      setText(this.foot, t("pane.labelled", { value: ms(performance.now() - started), tokens: count(usage.prompt_tokens) }));
    });
  }

  /** What `fill` puts into the answer as text; null, with the reason in the foot, where it throws. */
  async filled(asked, fill) {
    const said = h("div", { class: "said" });
    this.text.append(...(asked === null ? [] : [h("p", { class: "asked" }, asked)]), said);
    delete this.element.dataset.state;
    setText(this.badge, "");
    setText(this.foot, t("pane.waiting"));
    this.element.setAttribute("aria-busy", "true");
    try {
      await fill(said);
      return said.textContent;
    } catch (error) {
      if (error.name === "AbortError") setText(this.foot, t("pane.stopped", { said: this.foot.textContent }));
      else {
        this.element.dataset.state = "bad";
        setText(this.foot, error.message);
        if (error.status === 401) throw error;
      }
      return null;
    } finally {
      this.element.setAttribute("aria-busy", "false");
    }
  }

  origin({ adapter, load_tier: tier }) {
    setText(this.badge, adapter ? t("pane.from", { label: `${adapter.name}@${adapter.version}`, tier: tierName(tier) }) : t("pane.no_adapter"));
  }

  summary(started, first, tokens) {
    if (first === null) return t("pane.waiting");
    const seconds = (performance.now() - first) / 1000;
    const speed = tokens > 1 && seconds > 0 ? ` · ${rate((tokens - 1) / seconds)} ${t("unit.tokens_s")}` : "";
    return `${t("pane.first_token", { value: ms(first - started) })} · ${t("count.tokens", { value: count(tokens) })}${speed}`;
  }
}
