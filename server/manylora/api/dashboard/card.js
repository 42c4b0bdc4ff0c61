// An adapter's card. Its text is a stranger's: a library finds out what is a heading and what a list, and this page
// builds each element itself, with words as text. No markup of the card's own, no picture, and only links to the web.

import { h } from "./dom.js";
import { t } from "./words.js";
import { lexer } from "./vendor/marked/marked.esm.js";

const DEEPEST = 20;
const FRONT_MATTER = /^---\n[\s\S]*?\n---\n/;
const ENTITIES = { amp: "&", lt: "<", gt: ">", quot: '"', nbsp: "\u00a0", "#39": "'" };

/** `card` as `GET /v1/adapters/{name}/versions/{n}/card` gives it; `ontry`, if given, takes one of its examples. */
export function cardView(card, ontry) {
  const examples = ontry ? exampleList(card.examples, ontry) : null;
  return h("div", { class: "model-card" }, examples, h("div", { class: "prose" }, prose(card.text.replace(FRONT_MATTER, ""))));
}

/** Buttons with the prompts that a card gives as examples; null where there are none. */
export function exampleList(examples, ontry) {
  if (!examples.length) return null;
  return h("ul", { class: "examples", "aria-label": t("card.examples") }, examples.map((text) =>
    h("li", {}, h("button", { type: "button", class: "example", title: text, onclick: () => ontry(text) }, text))));
}

function prose(text) {
  try {
    return blocks(lexer(text), 0);
  } catch (error) {
    if (!(error instanceof RangeError)) throw error;
    return [h("pre", {}, text)]; // nested deeper than anybody writes
  }
}

const plain = (text) => text.replace(/&(#39|[a-z]+);/g, (whole, name) => ENTITIES[name] ?? whole);

function blocks(tokens, depth) {
  if (depth > DEEPEST) return tokens.map((token) => token.raw);
  return tokens.map((token) => block(token, depth + 1));
}

function block(token, depth) {
  switch (token.type) {
    case "space":
    case "def":
      return null;
    case "heading":
      return h(`h${Math.min(6, token.depth + 3)}`, {}, inline(token.tokens, depth));
    case "paragraph":
      return h("p", {}, inline(token.tokens, depth));
    case "code":
      return h("pre", {}, h("code", {}, token.text));
    case "blockquote":
      return h("blockquote", {}, blocks(token.tokens, depth));
    case "hr":
      return h("hr");
    case "list":
      return h(token.ordered ? "ol" : "ul", token.ordered ? { start: token.start } : {}, token.items.map((item) => h("li", {}, blocks(item.tokens, depth))));
    case "table":
      return h("table", {},
        h("thead", {}, h("tr", {}, token.header.map((cell) => h(cell.text ? "th" : "td", {}, inline(cell.tokens, depth))))),
        h("tbody", {}, token.rows.map((row) => h("tr", {}, row.map((cell) => h("td", {}, inline(cell.tokens, depth)))))));
    case "html":
      return token.text.startsWith("<!--") ? null : h("p", {}, token.text);
    default:
      return h("span", {}, inline([token], depth));
  }
}

function inline(tokens, depth) {
  if (depth > DEEPEST) return tokens.map((token) => token.raw);
  return tokens.map((token) => span(token, depth + 1));
}

function span(token, depth) {
  switch (token.type) {
    case "strong":
    case "em":
    case "del":
      return h(token.type, {}, inline(token.tokens, depth));
    case "codespan":
      return h("code", {}, token.text);
    case "br":
      return h("br");
    case "checkbox":
      return token.checked ? "☑ " : "☐ ";
    case "image":
      return link(token.href, [token.text || t("card.picture")]);
    case "link":
      return link(token.href, inline(token.tokens, depth));
    case "html":
      return token.text.startsWith("<!--") ? null : token.text;
    default:
      return token.tokens ? h("span", {}, inline(token.tokens, depth)) : plain(token.text ?? token.raw);
  }
}

/** A link that leads to the web and says nothing of this page; any other address is text alone. */
function link(href, children) {
  if (!["http:", "https:"].includes(URL.parse(href)?.protocol)) return h("span", {}, children);
  return h("a", { href, target: "_blank", rel: "noopener noreferrer nofollow" }, children);
}
