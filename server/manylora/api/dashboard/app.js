// The page: polls /v1/stats once a second while it is visible and hands the answer to the parts.

import { AdapterTable } from "./adapters.js";
import { ApiError, getJson, key } from "./api.js";
import { Charts } from "./charts.js";
import { Detail } from "./detail.js";
import { byId, setText, toast } from "./dom.js";
import { Errors } from "./errors.js";
import { count, duration, ms, rate } from "./format.js";
import { Jobs } from "./jobs.js";
import { Meters, Tiles } from "./live.js";
import { Session } from "./session.js";
import { SlotMap } from "./slots.js";
import { Tabs } from "./tabs.js";
import { Tenants } from "./tenants.js";
import { TryIt } from "./tryit.js";
import { Uploader } from "./upload.js";
import { Usage } from "./usage.js";
import { html, render } from "./view.js";
import { offerLanguages, t, translate } from "./words.js";

const POLL_MS = 1000;
const LIST_MS = 10_000;
const STALE_MS = 3000; // without news, from when on the page says how old its numbers are
const PATIENCE = 3; // failed polls before the page calls the server unreachable

translate();
offerLanguages(byId("language-button"));
const session = new Session(() => onWho());
const tabs = new Tabs((name, rest) => onTab(name, rest));
const charts = new Charts(
  { throughput: byId("chart-throughput"), ttft: byId("chart-ttft"), tpot: byId("chart-tpot"), queue: byId("chart-queue") },
  { rate, ms, count },
);
const tiles = new Tiles();
const meters = new Meters();
const tryIt = new TryIt(session, tabs);
const detail = new Detail(session, tabs, { onchange: () => loadAdapters(), ontry: (label, prompt) => tryIt.choose(label, prompt) });
const table = new AdapterTable((adapter) => detail.open(adapter));
const slots = new SlotMap((resident) => detail.open(resident));
const panels = {
  usage: mount("usage", Usage),
  tenants: mount("tenants", Tenants),
  jobs: mount("jobs", Jobs),
};
const errors = mount("errors", Errors);
const uploader = new Uploader(session, tabs, { onuploaded: () => loadAdapters(), onrows: (file) => panels.jobs.take(file) });

let timer = null;
let isPolling = false;
let failures = 0;
let hasTimeline = false;
let isRefused = false;
let listedAt = -Infinity;
let heardAt = null; // when the newest numbers came
let isListed = false;
let model = null;

/** A tab that is a component, drawn in its place. */
function mount(name, Part) {
  let part;
  render(html`<${Part} onmade=${(made) => { part = made; }} session=${session} tabs=${tabs} base=${() => model} />`, byId(`tab-${name}`));
  return part;
}

function onTab(name, rest) {
  for (const [each, panel] of Object.entries(panels)) panel.look(each === name);
  if (name === "jobs") panels.jobs.open(rest);
  if (name === "errors") {
    errors.openLines(rest);
    soon(0);
  }
  if (name === "adapters" && isListed) detail.openAddressed();
}

function health(state, text) {
  byId("health-dot").dataset.state = state;
  setText(byId("health-text"), text);
  document.body.dataset.health = state;
}

function onWho() {
  isRefused = false;
  listedAt = -Infinity;
  soon(0);
  uploader.allow(session.has("manager"));
  document.body.dataset.role = session.you ? session.you.role : "";
  if (session.you === null) return; // what may be offered is known with the first answer
  tabs.offer("jobs", session.has("manager"));
  tabs.offer("tenants", session.has("admin"));
  for (const [name, panel] of Object.entries(panels)) {
    panel.forceUpdate();
    if (tabs.now === name) panel.look(true);
  }
  errors.forceUpdate();
}

function show(stats) {
  heardAt = performance.now();
  document.body.dataset.heard = "";
  const { server } = stats;
  const state = server.is_draining ? "warn" : server.is_ready ? "good" : "wait";
  const standing = server.is_draining ? "draining" : server.is_ready ? "ready" : "starting";
  health(state, t(`health.${standing}`, { time: duration(stats.uptime_s) }));
  model = server.model;
  setText(byId("model"), model);
  setText(byId("foot-version"), `manylora ${server.version}`);
  session.learn(stats.you);
  tryIt.setBase(server.model);
  if (stats.timeline) charts.fill(stats.timeline);
  charts.add(stats);
  tiles.show(stats);
  meters.show(stats);
  slots.show(stats);
  table.show(stats);
  if (tabs.now === "errors") errors.show(stats);
}

async function loadAdapters() {
  listedAt = performance.now();
  try {
    await table.load();
  } catch (error) {
    if (isAnswer(error)) toast(error.message, "bad");
    return; // without an answer: the next poll tells whether the server is gone
  }
  if (!isListed && tabs.now === "adapters") detail.openAddressed();
  isListed = true;
  tryIt.setNames(table.usable((tenant) => session.mayUse(tenant)));
}

const isAnswer = (error) => error instanceof ApiError;

function failed(error) {
  if (error.status === 401 || error.status === 403) {
    isRefused = true;
    health("wait", t("health.key"));
    byId("key-button").hidden = false;
    session.ask(key.get() === null ? null : error.message);
    return;
  }
  failures += 1;
  if (failures >= PATIENCE || document.body.dataset.health === undefined) health("bad", t("health.unreachable"));
}

async function poll() {
  if (isPolling || isRefused || document.hidden) return;
  isPolling = true;
  try {
    const stats = await ask();
    if (stats) show(stats);
    if (stats && performance.now() - listedAt > LIST_MS) await loadAdapters();
  } finally {
    isPolling = false;
    soon(POLL_MS);
  }
}

async function ask() {
  try {
    const wanted = { timeline: !hasTimeline, client_errors: tabs.now === "errors" };
    const query = Object.keys(wanted).filter((name) => wanted[name]).map((name) => `${name}=true`).join("&");
    const stats = await getJson(query ? `v1/stats?${query}` : "v1/stats");
    hasTimeline = true;
    failures = 0;
    return stats;
  } catch (error) {
    failed(error);
    return null;
  }
}

/** A number that is not of now says so. */
function watch() {
  if (heardAt === null || isRefused || document.hidden) return;
  const age = performance.now() - heardAt;
  if (age > STALE_MS && failures < PATIENCE) health("warn", t("health.no_news", { s: Math.round(age / 1000) }));
}

function soon(delay) {
  clearTimeout(timer);
  timer = setTimeout(poll, delay);
}

function themes() {
  const order = ["auto", "light", "dark"];
  const button = byId("theme-button");
  const label = () => {
    const now = document.documentElement.dataset.theme ?? "auto";
    setText(button, t(`theme.${now}`));
    button.setAttribute("aria-label", t("theme.label", { name: t(now === "auto" ? "theme.system" : `theme.${now}.lower`) }));
    return now;
  };
  button.addEventListener("click", () => {
    const next = order[(order.indexOf(label()) + 1) % order.length];
    if (next === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = next;
    try {
      localStorage.setItem("manylora.theme", next);
    } catch {
      // storage is switched off: the choice lasts until the page is closed
    }
    label();
    document.dispatchEvent(new Event("themechange"));
  });
  label();
}

themes();
setInterval(watch, POLL_MS);
document.addEventListener("visibilitychange", () => {
  hasTimeline = false; // the minutes in the background were not polled: ask for them
  soon(0);
});
tabs.follow();
poll();
