// The page: polls /v1/stats once a second while it is visible and hands the answer to the parts.

import { AdapterTable } from "./adapters.js";
import { ApiError, getJson, key } from "./api.js";
import { Charts } from "./charts.js";
import { Detail } from "./detail.js";
import { byId, setText, toast } from "./dom.js";
import { count, duration, ms, rate } from "./format.js";
import { Meters, showErrors, Tiles } from "./live.js";
import { Session } from "./session.js";
import { SlotMap } from "./slots.js";
import { TryIt } from "./tryit.js";
import { Uploader } from "./upload.js";

const POLL_MS = 1000;
const LIST_MS = 10_000;
const STALE_MS = 3000; // without news, from when on the page says how old its numbers are
const PATIENCE = 3; // failed polls before the page calls the server unreachable

const session = new Session(() => onWho());
const charts = new Charts(
  { throughput: byId("chart-throughput"), ttft: byId("chart-ttft"), tpot: byId("chart-tpot"), queue: byId("chart-queue") },
  { rate, ms, count },
);
const tiles = new Tiles();
const meters = new Meters();
const tryIt = new TryIt(session);
const detail = new Detail(session, { onchange: () => loadAdapters(), ontry: (label, prompt) => tryIt.choose(label, prompt) });
const table = new AdapterTable((adapter) => detail.open(adapter));
const slots = new SlotMap((resident) => detail.open(resident));
const uploader = new Uploader(session, { onuploaded: () => loadAdapters() });

let timer = null;
let isPolling = false;
let failures = 0;
let hasTimeline = false;
let isRefused = false;
let listedAt = -Infinity;
let heardAt = null; // when the newest numbers came
let isFirst = true;

function health(state, text) {
  byId("health-dot").dataset.state = state;
  setText(byId("health-text"), text);
  document.body.dataset.health = state;
}

function onWho() {
  isRefused = false;
  uploader.allow(session.has("manager"));
  document.body.dataset.role = session.you ? session.you.role : "";
  listedAt = -Infinity;
  soon(0);
}

function show(stats) {
  heardAt = performance.now();
  const { server } = stats;
  const state = server.is_draining ? "warn" : server.is_ready ? "good" : "wait";
  health(state, `${server.is_draining ? "Draining" : server.is_ready ? "Ready" : "Starting"}, up ${duration(stats.uptime_s)}`);
  setText(byId("model"), server.model);
  setText(byId("foot-version"), `manylora ${server.version}`);
  session.learn(stats.you);
  tryIt.setBase(server.model);
  if (stats.timeline) charts.fill(stats.timeline);
  charts.add(stats);
  tiles.show(stats);
  meters.show(stats);
  slots.show(stats);
  table.show(stats);
  showErrors(stats.recent_errors, stats.now);
}

async function loadAdapters() {
  listedAt = performance.now();
  try {
    await table.load();
  } catch (error) {
    if (isAnswer(error)) toast(error.message, "bad");
    return; // without an answer: the next poll tells whether the server is gone
  }
  if (isFirst) detail.openAddressed();
  isFirst = false;
  tryIt.setNames(table.usable((tenant) => session.mayUse(tenant)));
}

const isAnswer = (error) => error instanceof ApiError;

function failed(error) {
  if (error.status === 401 || error.status === 403) {
    isRefused = true;
    health("wait", "Waiting for a key");
    byId("key-button").hidden = false;
    session.ask(key.get() === null ? null : error.message);
    return;
  }
  failures += 1;
  if (failures >= PATIENCE || document.body.dataset.health === undefined) health("bad", "Server unreachable, trying again");
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
    const stats = await getJson(hasTimeline ? "v1/stats" : "v1/stats?timeline=true");
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
  if (age > STALE_MS && failures < PATIENCE) health("warn", `No news for ${Math.round(age / 1000)} s`);
}

function soon(delay) {
  clearTimeout(timer);
  timer = setTimeout(poll, delay);
}

function themes() {
  const order = ["auto", "light", "dark"];
  const names = { auto: "Auto", light: "Light", dark: "Dark" };
  const button = byId("theme-button");
  const label = () => {
    const now = document.documentElement.dataset.theme ?? "auto";
    setText(button, names[now]);
    button.setAttribute("aria-label", `Colours: ${now === "auto" ? "as the system" : now}`);
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
addEventListener("hashchange", () => detail.openAddressed());
document.addEventListener("visibilitychange", () => {
  hasTimeline = false; // the minutes in the background were not polled: ask for them
  soon(0);
});
poll();
