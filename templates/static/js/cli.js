// The command line: history, completion with argument hints, pasted lines, a question before what is dangerous.

import { ApiError, api, element } from "./lib.js";

const MAX_HISTORY = 200;
const MAX_EXCHANGES = 200;
const MAX_SUGGESTIONS = 8;

const terminal = document.getElementById("terminal");
const screen = document.getElementById("screen");
const lines = document.getElementById("lines");
const form = document.getElementById("prompt");
const hint = document.getElementById("hint");
const suggestions = document.getElementById("suggestions");
const dialog = document.getElementById("confirm-dialog");

// What was typed, kept in this tab until it is closed or somebody signs out

let history = [];
try {
  history = JSON.parse(sessionStorage.getItem(terminal.dataset.history) ?? "[]");
} catch {
  history = [];
}
let at = history.length;
let draft = "";

function remember(text) {
  if (history.at(-1) !== text) history.push(text);
  history = history.slice(-MAX_HISTORY);
  at = history.length;
  // Passwords are not kept.
  const kept = history.filter((one) => !/\b(auth|requirepass|setuser)\b/i.test(one));
  try {
    sessionStorage.setItem(terminal.dataset.history, JSON.stringify(kept));
  } catch {
    // A full or forbidden storage: the history lasts as long as the page.
  }
}

function recall(step) {
  if (at === history.length) draft = lines.value;
  at = Math.min(Math.max(at + step, 0), history.length);
  lines.value = at === history.length ? draft : history[at];
  lines.setSelectionRange(lines.value.length, lines.value.length);
  suggest();
}

// Completion

let hints = {};
import(terminal.dataset.hints).then((module) => {
  hints = module.hints;
});
let chosen = -1;

const currentLine = () => {
  const start = lines.value.lastIndexOf("\n", lines.selectionStart - 1) + 1;
  return { start, text: lines.value.slice(start, lines.selectionStart) };
};

function matching(text) {
  const begun = text.trimStart().toUpperCase();
  if (!begun) return [];
  return Object.keys(hints).filter((name) => name.startsWith(begun) && name !== begun).slice(0, MAX_SUGGESTIONS);
}

function hintOf(text) {
  const words = text.trim().toUpperCase().split(/\s+/);
  return [words.slice(0, 2).join(" "), words[0]].find((name) => name in hints);
}

function suggest() {
  const { text } = currentLine();
  const names = matching(text);
  chosen = -1;
  lines.removeAttribute("aria-activedescendant");
  suggestions.replaceChildren(
    ...names.map((name, index) =>
      element("li", { id: `suggestion-${index}`, role: "option", "aria-selected": "false", onclick: () => complete(name) }, name, " ", element("span", { className: "args" }, hints[name])),
    ),
  );
  suggestions.hidden = !names.length;
  const name = hintOf(text);
  hint.textContent = name && text.trim() ? `${name} ${hints[name]}` : "";
}

function complete(name) {
  const { start, text } = currentLine();
  const end = start + text.length;
  lines.setRangeText(name + (hints[name] ? " " : ""), start, end, "end");
  lines.focus();
  suggest();
}

function choose(step) {
  const options = [...suggestions.children];
  chosen = (chosen + step + options.length) % options.length;
  options.forEach((option, index) => option.setAttribute("aria-selected", String(index === chosen)));
  options[chosen].scrollIntoView({ block: "nearest" });
  lines.setAttribute("aria-activedescendant", options[chosen].id);
}

// Running

function show(typed, text, bad) {
  document.getElementById("welcome")?.remove();
  const exchange = element("div", { className: "exchange" });
  if (typed) exchange.append(element("p", { className: "typed" }, `> ${typed}`));
  exchange.append(element("pre", {}, element("code", { className: bad ? "bad-text" : "" }, text)));
  screen.append(exchange);
  while (screen.children.length > MAX_EXCHANGES) screen.firstElementChild.remove();
  screen.scrollTop = screen.scrollHeight;
}

function confirmed(warnings) {
  document.getElementById("confirm-list").replaceChildren(...warnings.map((warning) => element("li", {}, warning)));
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => dialog.addEventListener("close", () => resolve(dialog.returnValue === "run"), { once: true }));
}

let busy = false;

async function run(text, sure = false) {
  busy = true;
  form.setAttribute("aria-busy", "true");
  try {
    const { replies } = await api("POST", terminal.dataset.api, { lines: text, confirmed: sure });
    const typed = text.split("\n").filter((line) => line.trim());
    replies.forEach((reply, index) => show(typed[index], reply.text, reply.reply.type === "error"));
  } catch (error) {
    if (error instanceof ApiError && error.data?.confirm && !sure) {
      if (await confirmed(error.data.confirm)) return await run(text, true);
      lines.value = text;
      return;
    }
    show(text, error.message, true);
    if (lines.value === "") lines.value = text; // nothing is lost by an error
  } finally {
    busy = false;
    form.removeAttribute("aria-busy");
    lines.focus();
  }
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  const text = lines.value;
  if (!text.trim() || busy) return;
  remember(text);
  lines.value = "";
  suggest();
  run(text);
});

lines.addEventListener("keydown", (event) => {
  if (event.isComposing) return;
  const open = !suggestions.hidden;
  const several = lines.value.includes("\n");
  if (event.key === "Enter" && !event.shiftKey) {
    event.preventDefault();
    if (open && chosen >= 0) complete(suggestions.children[chosen].firstChild.textContent);
    else form.requestSubmit();
  } else if (event.key === "Tab" && open && !event.shiftKey) {
    event.preventDefault();
    complete(suggestions.children[Math.max(chosen, 0)].firstChild.textContent);
  } else if (event.key === "Escape" && open) {
    suggestions.hidden = true;
    chosen = -1;
  } else if ((event.key === "ArrowDown" || event.key === "ArrowUp") && open && (chosen >= 0 || event.key === "ArrowDown")) {
    event.preventDefault();
    choose(event.key === "ArrowDown" ? 1 : -1);
  } else if (event.key === "ArrowUp" && !several) {
    event.preventDefault();
    recall(-1);
  } else if (event.key === "ArrowDown" && !several) {
    event.preventDefault();
    recall(1);
  }
});
lines.addEventListener("input", suggest);

const clear = document.getElementById("clear");
clear.hidden = false;
clear.onclick = () => {
  screen.replaceChildren();
  lines.focus();
};
lines.rows = Math.max(1, lines.value.split("\n").length);
lines.focus();
