// Who is looking: the key, asked for when the server wants one, and what its role allows.

import { key } from "./api.js";
import { byId, h, setText } from "./dom.js";
import { t } from "./words.js";

const RANK = { user: 0, manager: 1, admin: 2 };

const may = (role) => t("key.may", { what: role in RANK ? t(`key.may.${role}`) : role });

export class Session {
  constructor(onchange) {
    this.you = null;
    this.onchange = onchange;
    byId("key-button").addEventListener("click", () => this.ask());
  }

  has(role) {
    return this.you !== null && RANK[this.you.role] >= RANK[role];
  }

  /** Whether the visitor's requests may name this tenant's adapters: admins, too, only use their own and the public ones. */
  mayUse(tenant) {
    return this.you !== null && (tenant === this.you.tenant || tenant === "public");
  }

  /** Whether the visitor may change this tenant's adapters. */
  mayManage(tenant) {
    return this.has("admin") || (this.has("manager") && this.you.tenant === tenant);
  }

  learn(you) {
    const isNew = JSON.stringify(you) !== JSON.stringify(this.you);
    this.you = you;
    if (!isNew) return;
    const who = byId("who");
    who.hidden = false;
    setText(who, you.is_open ? t("key.open_server") : `${you.tenant} · ${you.role}`);
    who.title = you.is_open ? t("key.open_server_note") : may(you.role);
    byId("key-button").hidden = you.is_open;
    this.onchange();
  }

  /** Show the dialog that takes a key; `reason` is the server's own message. */
  ask(reason = null) {
    const dialog = byId("key-dialog");
    if (dialog.open) return;
    const held = key.get() !== null;
    const input = h("input", { id: "key-input", type: "password", required: true, autocomplete: "off", spellcheck: "false", "aria-describedby": "key-note" });
    const submit = (event) => {
      event.preventDefault();
      key.set(input.value.trim());
      dialog.close();
      this.onchange();
    };
    const forget = () => {
      key.forget();
      this.you = null;
      location.reload();
    };
    dialog.replaceChildren(
      h("h2", { id: "key-title" }, t("key.title")),
      h("p", { id: "key-note" }, t("key.note")),
      ...(held && this.you && !reason ? [h("p", { class: "hint" }, `${t("key.signed_in", { tenant: this.you.tenant })} ${may(this.you.role)}`)] : []),
      ...(reason ? [h("p", { class: "problem-line", role: "alert" }, reason)] : []),
      h("form", { onsubmit: submit },
        h("label", { for: "key-input" }, t("key.label")),
        input,
        h("div", { class: "actions" },
          held && h("button", { type: "button", onclick: forget }, t("key.forget")),
          h("button", { type: "button", onclick: () => dialog.close() }, t("cancel")),
          h("button", { type: "submit", class: "primary" }, t("key.use")))),
    );
    dialog.showModal();
    input.focus();
  }
}
