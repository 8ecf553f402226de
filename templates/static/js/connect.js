// Tokens stay out of the page until somebody asks: shown in place, or copied without being shown.

import { api, copy, toast } from "./lib.js";

const access = document.getElementById("access");
const masked = new Map();
let known = null;

async function tokens() {
  known ??= await api("GET", access.dataset.tokens);
  return known;
}

/** Run what needs the tokens; says so when it does not work. */
const withTokens = (act) => async () => {
  try {
    await act(await tokens());
  } catch (error) {
    toast(error.message, "bad");
  }
};

function begin() {
  const placeholder = access.dataset.placeholder;
  for (const button of document.querySelectorAll("[data-copy-secret]")) {
    button.hidden = false;
    button.onclick = withTokens((found) => copy(found[button.dataset.copySecret]));
  }
  for (const button of document.querySelectorAll("[data-copy-snippet]")) {
    const code = document.getElementById(button.dataset.copySnippet);
    button.hidden = false;
    button.onclick = withTokens((found) => copy(code.textContent.replaceAll(placeholder, found.token)));
  }
  const form = document.querySelector("[data-show-tokens]");
  if (!form) return;
  const button = form.querySelector("button");
  const fields = [...document.querySelectorAll("[data-secret], [data-with-secret]")];
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (masked.size) {
      for (const [field, text] of masked) field.textContent = text;
      masked.clear();
      button.textContent = access.dataset.show;
      return;
    }
    withTokens((found) => {
      for (const field of fields) {
        masked.set(field, field.textContent);
        field.textContent = field.dataset.secret ? found[field.dataset.secret] : field.textContent.replaceAll(placeholder, found.token);
      }
      button.textContent = access.dataset.hide;
    })();
  });
}

if (access) begin();
// When it has come about, what was not there before is.
else document.addEventListener("refreshed", () => document.querySelector("#progress:not([data-refresh])") && location.reload());
