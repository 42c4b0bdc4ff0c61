// Talking to the server. Addresses are relative to the page, so that it also works behind a path prefix.

import { t } from "./words.js";

const KEY = "manylora.key";

/** The API key, kept in this tab and nowhere else. */
export const key = {
  get: () => sessionStorage.getItem(KEY),
  set: (value) => sessionStorage.setItem(KEY, value),
  forget: () => sessionStorage.removeItem(KEY),
};

/** An answer that is not a success: the server's own words, and every problem where an adapter was refused. */
export class ApiError extends Error {
  constructor(status, body) {
    const error = (body && body.error) || {};
    super(typeof error.message === "string" ? error.message : t("api.answered", { status }));
    this.status = status;
    this.code = error.code || null;
    this.problems = Array.isArray(error.problems) ? error.problems : [];
  }
}

const url = (path) => new URL(path, document.baseURI).toString();

function headers(extra = {}) {
  const value = key.get();
  return value === null ? extra : { ...extra, authorization: `Bearer ${value}` };
}

async function failure(response) {
  const text = await response.text();
  try {
    return new ApiError(response.status, JSON.parse(text));
  } catch (error) {
    if (error instanceof SyntaxError) return new ApiError(response.status, null);
    throw error;
  }
}

async function request(path, { method = "GET", json, signal } = {}) {
  const body = json === undefined ? undefined : JSON.stringify(json);
  const sent = headers(body === undefined ? {} : { "content-type": "application/json" });
  const response = await fetch(url(path), { method, body, headers: sent, signal, cache: "no-store" });
  if (!response.ok) throw await failure(response);
  return response;
}

export async function getJson(path, timeoutMs = 8000) {
  return (await request(path, { signal: AbortSignal.timeout(timeoutMs) })).json();
}

export async function send(method, path, json, signal) {
  const response = await request(path, { method, json, signal });
  return response.status === 204 ? null : response.json();
}

/** Save a file under a name; the key travels in a header, which a plain link could not send. */
export async function download(path, filename) {
  const blob = await (await request(path)).blob();
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = filename;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

/** The data of each server-sent event as an object, until `[DONE]`. Throws ApiError, also for an error event. */
export async function* stream(path, json, signal) {
  const response = await request(path, { method: "POST", json, signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const events = (rest + value).split(/\r?\n\r?\n/);
    rest = events.pop();
    for (const event of events) {
      const data = event.split(/\r?\n/).filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trim()).join("\n");
      if (data === "[DONE]") return;
      if (data === "") continue;
      const parsed = JSON.parse(data);
      if (parsed.error) throw new ApiError(500, parsed);
      yield parsed;
    }
  }
}

/** POST a form with progress; `fetch` does not tell how much has been sent. Resolves to {status, body}. */
export function upload(path, form, { onprogress, signal }) {
  return new Promise((resolve, reject) => {
    const xhr = new XMLHttpRequest();
    xhr.open("POST", url(path));
    for (const [name, value] of Object.entries(headers())) xhr.setRequestHeader(name, value);
    xhr.responseType = "text";
    xhr.upload.addEventListener("progress", (event) => onprogress(event.loaded, event.total));
    xhr.upload.addEventListener("load", () => onprogress(1, 1));
    xhr.addEventListener("error", () => reject(new Error(t("api.broke"))));
    xhr.addEventListener("abort", () => reject(new DOMException("cancelled", "AbortError")));
    xhr.addEventListener("load", () => {
      let body = null;
      try {
        body = JSON.parse(xhr.responseText);
      } catch {
        // not JSON: something between us and the server answered; the status says enough
      }
      if (xhr.status >= 200 && xhr.status < 300) resolve({ status: xhr.status, body });
      else reject(new ApiError(xhr.status, body));
    });
    signal.addEventListener("abort", () => xhr.abort(), { once: true });
    xhr.send(form);
  });
}
