// The tabs, each with an address: `#usage`, and below it what the tab itself understands, `#jobs/ftjob-…`.

import { byId } from "./dom.js";

const OLD = { "recent-errors": "errors" }; // addresses that were sent around before there were tabs

/** What a part of an address says: as it stands where it is no encoding of anything, such as a bare `%`. */
export function decoded(part) {
  try {
    return decodeURIComponent(part);
  } catch {
    return part;
  }
}

export class Tabs {
  /** `onopen` takes the tab's name and what stands behind it in the address. */
  constructor(onopen) {
    this.links = new Map([...byId("sections").children].map((link) => [link.hash.slice(1), link]));
    this.onopen = onopen;
    this.now = null;
    addEventListener("hashchange", () => this.follow());
  }

  /** Show what the address says, and what it says before it where that is no tab. */
  follow() {
    const [first, ...rest] = location.hash.slice(1).split("/").map(decoded);
    const name = OLD[first] ?? first;
    const shown = this.links.has(name) ? name : (this.now ?? "now");
    this.show(shown);
    this.onopen(shown, rest);
  }

  show(name) {
    if (this.now === name) return;
    this.now = name;
    for (const [each, link] of this.links) {
      byId(`tab-${each}`).hidden = each !== name;
      if (each === name) link.setAttribute("aria-current", "page");
      else link.removeAttribute("aria-current");
    }
    scrollTo(0, 0);
  }

  /** Go to a tab, and to a place in it, as if its link were pressed. */
  open(name, ...rest) {
    const hash = `#${[name, ...rest.map(encodeURIComponent)].join("/")}`;
    if (this.now === name && location.hash === hash) return;
    history.pushState(null, "", hash);
    this.follow();
  }

  /** Whether a visitor is offered a tab at all. */
  offer(name, is) {
    this.links.get(name).hidden = !is;
    if (!is && this.now === name) this.open("now");
  }
}
