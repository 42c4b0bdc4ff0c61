// Numbers as people read them.

import { LOCALE, t } from "./words.js";

const plain = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });

export const NONE = "–";

export const count = (value) => (value === null || value === undefined ? NONE : plain.format(value));

/** Three significant figures at most. */
export function rate(value) {
  if (value === null || value === undefined) return NONE;
  if (value >= 100 || value === 0) return plain.format(value);
  return value >= 10 ? value.toFixed(1) : value.toFixed(2);
}

/** Milliseconds as [number, unit]. */
export function msParts(value) {
  if (value === null || value === undefined) return [NONE, ""];
  if (value >= 10_000) return [(value / 1000).toFixed(1), "s"];
  if (value >= 1000) return [(value / 1000).toFixed(2), "s"];
  if (value >= 100) return [value.toFixed(0), "ms"];
  return [value >= 10 ? value.toFixed(1) : value.toFixed(2), "ms"];
}

export function ms(value) {
  const [number, unit] = msParts(value);
  return unit ? `${number} ${unit}` : number;
}

export function bytes(value) {
  if (value === null || value === undefined) return NONE;
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (value >= 1024 && unit < units.length - 1) {
    value /= 1024;
    unit += 1;
  }
  return `${unit === 0 || value >= 100 ? value.toFixed(0) : value.toFixed(1)} ${units[unit]}`;
}

export function duration(seconds) {
  if (seconds < 60) return t("time.s", { s: Math.floor(seconds) });
  if (seconds < 3600) return t("time.min", { min: Math.floor(seconds / 60) });
  if (seconds < 86400) return t("time.h", { h: Math.floor(seconds / 3600), min: Math.floor((seconds % 3600) / 60) });
  return t("time.d", { d: Math.floor(seconds / 86400), h: Math.floor((seconds % 86400) / 3600) });
}

export function ago(unixSeconds, now = Date.now() / 1000) {
  const seconds = Math.max(0, now - unixSeconds);
  return seconds < 2 ? t("time.now") : t("time.ago", { time: duration(seconds) });
}

export const percent = (part, whole) => (whole > 0 ? `${Math.round((100 * part) / whole)} %` : NONE);

export const clock = (unixSeconds) =>
  new Date(unixSeconds * 1000).toLocaleTimeString(LOCALE, { hour: "2-digit", minute: "2-digit", second: "2-digit" });

export const day = (unixSeconds) =>
  new Date(unixSeconds * 1000).toLocaleString(LOCALE, { dateStyle: "medium", timeStyle: "short" });
