// On every page: copy buttons, times in the reader's own zone, parts that keep themselves fresh, forms sent once.

import { enhance, refresh } from "./lib.js";

enhance(document);

// Parts of the page that change by themselves, while somebody looks.
const STOP_AFTER = 5;
let failures = 0;
let busy = false;
let last = Date.now();
setInterval(async () => {
  const parts = [...document.querySelectorAll("[data-refresh]")];
  if (!parts.length || document.hidden || busy || failures >= STOP_AFTER) return;
  const every = Math.min(...parts.map((part) => Number(part.dataset.refresh) || 5)) * 1000;
  if (Date.now() - last < every * 2 ** failures) return;
  busy = true;
  try {
    failures = (await refresh(parts.map((part) => part.id))) ? 0 : failures + 1;
  } catch {
    failures += 1;
  } finally {
    busy = false;
    last = Date.now();
  }
}, 500);
document.addEventListener("visibilitychange", () => (failures = 0));

// A form that is on its way is not sent again by a second click.
document.addEventListener("submit", (event) => {
  if (event.defaultPrevented || event.target.method !== "post") return;
  if (event.target.dataset.sent) event.preventDefault();
  event.target.dataset.sent = "1";
  event.target.setAttribute("aria-busy", "true");
});
window.addEventListener("pageshow", () => {
  for (const form of document.querySelectorAll("form[data-sent]")) {
    delete form.dataset.sent;
    form.removeAttribute("aria-busy");
  }
});

// Menus close on Escape and on a click elsewhere.
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  for (const menu of document.querySelectorAll("details.switcher[open], details.menu[open]")) {
    menu.open = false;
    menu.querySelector("summary").focus();
  }
});
document.addEventListener("click", (event) => {
  for (const menu of document.querySelectorAll("details.switcher[open]")) {
    if (!menu.contains(event.target)) menu.open = false;
  }
});

// What was typed at the console stays with whoever typed it
document.querySelector('form[action="/logout"]')?.addEventListener("submit", () => sessionStorage.clear());
