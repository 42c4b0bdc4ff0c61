// Building elements. Every value goes in as text: adapter names and error messages come from strangers,
// and the page's policy forbids turning strings into markup altogether.

import { t } from "./words.js";

const SVG = "http://www.w3.org/2000/svg";

export const byId = (id) => document.getElementById(id);

/** h("button", {class: "quiet", type: "button", onclick: f}, "text", child, …); null children are left out. */
export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (typeof value === "function") element.addEventListener(name.slice(2), value);
    else if (name === "data") Object.assign(element.dataset, value);
    else element.setAttribute(name === "class" ? "class" : name, value === true ? "" : String(value));
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/** A small line drawing from path data that is written in this page's own code. */
export function icon(path) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", "0 0 16 16");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  const line = document.createElementNS(SVG, "path");
  line.setAttribute("d", path);
  svg.append(line);
  return svg;
}

export const PIN = "M8 10.5V15M4.5 10.5h7L10 7V2.5H6V7z";

export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/**
 * A note that goes away by itself, with a button where `action` is {label, run}. Above an open dialog, too: the newest
 * popover is the topmost.
 */
export function toast(text, kind = "good", action = null) {
  const shelf = byId("toasts");
  const note = h("div", { class: "toast", data: { kind } }, h("p", {}, text));
  const remove = () => {
    note.remove();
    if (!shelf.childElementCount && shelf.matches(":popover-open")) shelf.hidePopover();
  };
  if (action) {
    const run = () => {
      remove();
      action.run();
    };
    note.append(h("button", { type: "button", class: "quiet", onclick: run }, action.label));
  }
  if (shelf.matches(":popover-open")) shelf.hidePopover();
  shelf.append(note);
  shelf.showPopover();
  setTimeout(remove, action ? 20000 : kind === "bad" ? 9000 : 5000);
}

/** Put a text on the clipboard and say so. */
export async function copy(text, done) {
  try {
    await navigator.clipboard.writeText(text);
    toast(done);
  } catch {
    toast(t("copy.refused"), "bad");
  }
}

/** Resolves to true when the person confirms. Escape and "Cancel" are no. */
export function confirmed(title, text, action) {
  const dialog = byId("confirm-dialog");
  return new Promise((resolve) => {
    let answer = false;
    const close = (value) => () => {
      answer = value;
      dialog.close();
    };
    const cancel = h("button", { type: "button", onclick: close(false) }, t("cancel"));
    dialog.replaceChildren(
      h("h2", { id: "confirm-title" }, title),
      h("p", {}, text),
      h("div", { class: "actions" }, cancel, h("button", { type: "button", class: "danger", onclick: close(true) }, action)),
    );
    dialog.addEventListener("close", () => resolve(answer), { once: true });
    dialog.showModal();
    cancel.focus();
  });
}
