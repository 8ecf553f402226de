// The data browser: keys open without losing the list, more keys are added to it, JSON is checked while it is typed.

import { enhance, toast } from "./lib.js";

const browser = document.querySelector(".browser");
const body = document.body.dataset;

async function load(href) {
  const response = await fetch(href, { headers: { "X-Refresh": "1" } });
  if (response.status === 401) location.assign(href);
  const text = await response.text();
  if (!(response.headers.get("content-type") ?? "").startsWith("text/html")) throw new Error(text || body.failed);
  return new DOMParser().parseFromString(text, "text/html");
}

// Opening a key

let opening = null;

async function open(href, push) {
  const mine = (opening = {});
  let page;
  try {
    page = await load(href);
  } catch {
    location.assign(href); // which says what is wrong
    return;
  }
  const fresh = page.getElementById("value");
  if (!fresh) return location.assign(href);
  if (opening !== mine) return;
  const value = document.getElementById("value");
  value.replaceChildren(...document.importNode(fresh, true).childNodes);
  browser.classList.toggle("opened", page.querySelector(".browser").classList.contains("opened"));
  if (push) history.pushState({}, "", href);
  const here = new URL(href, location.href).searchParams.get("key");
  for (const link of document.querySelectorAll("#keys a")) {
    const current = new URL(link.href).searchParams.get("key") === here;
    link.toggleAttribute("aria-current", current);
    if (current) link.setAttribute("aria-current", "true");
    link.closest("li").classList.toggle("here", current);
  }
  enhance(value);
  checkJson(value);
  value.tabIndex = -1;
  value.focus({ preventScroll: matchMedia("(min-width: 60rem)").matches });
}

document.addEventListener("click", (event) => {
  const link = event.target.closest("#keys a, #value .row-actions a, #value .back a");
  if (!link || event.defaultPrevented || event.button || event.metaKey || event.ctrlKey || event.shiftKey) return;
  event.preventDefault();
  open(link.href, true);
});
addEventListener("popstate", () => open(location.href, false));

// More keys

document.addEventListener("click", async (event) => {
  const more = event.target.closest("#more");
  if (!more || event.metaKey || event.ctrlKey) return;
  event.preventDefault();
  if (more.dataset.busy) return;
  more.dataset.busy = "1";
  try {
    const page = await load(more.href);
    const fresh = page.getElementById("keys");
    const list = document.getElementById("keys");
    // What a key is called on the page is no name: two may look the same. One that is too long for an address has none.
    const known = new Set([...(list?.children ?? [])].map((item) => item.dataset.name));
    const items = [...(fresh?.children ?? [])].filter(({ dataset: { name } }) => name === undefined || !known.has(name));
    if (list) list.append(...items.map((item) => document.importNode(item, true)));
    else if (fresh) document.querySelector(".keys-pane .empty-line")?.replaceWith(document.importNode(fresh, true));
    document.getElementById("scanned").textContent = page.getElementById("scanned").textContent;
    const next = page.getElementById("more");
    if (next) more.href = next.href;
    else more.remove();
  } catch (error) {
    toast(error.message || body.offline, "bad");
  } finally {
    delete more.dataset.busy;
  }
});

// JSON

function checkJson(root) {
  for (const area of root.querySelectorAll("textarea[data-json]")) {
    const state = area.parentElement.querySelector("[data-json-state]");
    const check = () => {
      state.hidden = false;
      try {
        JSON.parse(area.value);
        state.className = "hint good-text";
        state.textContent = area.dataset.json;
      } catch (error) {
        state.className = "wrong-text";
        state.textContent = `${area.dataset.badJson} ${error.message}`;
      }
    };
    area.addEventListener("input", check);
    check();
  }
}

checkJson(document);
