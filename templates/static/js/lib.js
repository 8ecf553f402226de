// What the pages' modules share. No page needs any of it: scripts make quicker and live what works without them.

const body = document.body.dataset;

export const csrf = () => document.querySelector('meta[name="csrf-token"]')?.content ?? "";

/** An answer that is no success; `message` is for people, `fields` says what is wrong with each. */
export class ApiError extends Error {
  constructor(status, message, data) {
    super(message);
    this.status = status;
    this.data = data;
    this.fields = data?.fields ?? {};
  }
}

/** Call the JSON API; gives `data`. Throws ApiError, also when the service cannot be reached (status 0). */
export async function api(method, path, document_, { signal } = {}) {
  let response;
  try {
    response = await fetch(path, {
      method,
      signal,
      headers: document_ === undefined ? {} : { "Content-Type": "application/json" },
      body: document_ === undefined ? undefined : JSON.stringify(document_),
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, body.offline);
  }
  if (response.status === 401) {
    location.assign("/login?next=" + encodeURIComponent(location.pathname + location.search));
  }
  let answer = null;
  try {
    answer = await response.json();
  } catch {
    answer = null;
  }
  if (!response.ok) throw new ApiError(response.status, answer?.message ?? answer?.error ?? `${body.failed} (${response.status})`, answer?.data);
  return answer?.data ?? null;
}

/** Say something for a few seconds; kind "bad" stays longer. */
export function toast(text, kind = "") {
  const box = document.createElement("p");
  box.className = `toast ${kind}`;
  box.textContent = text;
  const toasts = document.getElementById("toasts");
  toasts.append(box);
  while (toasts.children.length > 4) toasts.firstChild.remove();
  setTimeout(() => box.remove(), kind === "bad" ? 10000 : 4000);
}

/** An element: element("a", { href: "/x", className: "y" }, "text", other) */
export function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value === undefined || value === null || value === false) continue;
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (key === "dataset") Object.assign(made.dataset, value);
    else if (key in made && key !== "list" && key !== "form") made[key] = value;
    else made.setAttribute(key, value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

/** A text of the page with its {names} filled in. */
export const fill = (text, values) => text.replace(/\{(\w+)\}/g, (whole, name) => values[name] ?? whole);

export function bytes(count) {
  if (count === null || count === undefined) return "–";
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (Math.abs(count) >= 1024 && unit < units.length - 1) {
    count /= 1024;
    unit += 1;
  }
  return `${unit && count % 1 ? count.toFixed(1) : Math.round(count)} ${units[unit]}`;
}

export async function copy(text) {
  try {
    if (navigator.clipboard) await navigator.clipboard.writeText(text);
    else {
      // Without TLS there is no clipboard for scripts, but the old way.
      const area = element("textarea", { value: text, className: "offscreen" });
      document.body.append(area);
      area.select();
      const done = document.execCommand("copy");
      area.remove();
      if (!done) throw new Error();
    }
    toast(body.copied);
  } catch {
    toast(body.copyFailed, "bad");
  }
}

/** Fetch the page again and put the parts with these ids in the place of what is shown; focus and open details stay. */
export async function refresh(ids, { signal } = {}) {
  const response = await fetch(location.href, { signal, headers: { "X-Refresh": "1" } });
  if (response.status === 401) location.reload();
  if (!response.ok) return false;
  const page = new DOMParser().parseFromString(await response.text(), "text/html");
  for (const id of ids) {
    const old = document.getElementById(id);
    const fresh = page.getElementById(id);
    if (!old || !fresh || old.contains(document.activeElement) || old.querySelector("details[open]")) continue;
    const again = fresh.dataset.refresh;
    if (again === undefined) delete old.dataset.refresh;
    else old.dataset.refresh = again;
    if (old.innerHTML === fresh.innerHTML) continue;
    const adopted = document.importNode(fresh, true);
    old.replaceChildren(...adopted.childNodes);
    enhance(old);
    old.dispatchEvent(new CustomEvent("refreshed", { bubbles: true }));
  }
  return true;
}

const ago = new Intl.RelativeTimeFormat(document.documentElement.lang, { numeric: "auto" });

function moment(time) {
  const at = new Date(time.dateTime);
  const seconds = (at - Date.now()) / 1000;
  time.title = at.toLocaleString(document.documentElement.lang, { dateStyle: "full", timeStyle: "long" });
  const size = Math.abs(seconds);
  if (size < 45) time.textContent = body.justNow;
  else if (size < 3600) time.textContent = ago.format(Math.round(seconds / 60), "minute");
  else if (size < 86400) time.textContent = ago.format(Math.round(seconds / 3600), "hour");
  else if (size < 30 * 86400) time.textContent = ago.format(Math.round(seconds / 86400), "day");
  else time.textContent = at.toLocaleDateString(document.documentElement.lang, { dateStyle: "medium" });
}

/** A name as a form's field can take it: white space does not count, as for the server. */
const oneLine = (text) => text.trim().split(/\s+/).join(" ");

/** Bring to life what stands in an element: copy buttons, times, confirmations. */
export function enhance(root) {
  for (const button of root.querySelectorAll("[data-copy]")) {
    button.hidden = false;
    button.onclick = () => copy(document.getElementById(button.dataset.copy).textContent);
  }
  for (const time of root.querySelectorAll("time[data-moment]")) moment(time);
  for (const input of root.querySelectorAll("input[data-confirm]")) {
    const button = input.form.querySelector("button");
    button.disabled = true;
    input.oninput = () => (button.disabled = oneLine(input.value) !== oneLine(input.dataset.confirm));
  }
}
