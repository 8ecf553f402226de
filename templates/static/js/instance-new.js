// The slug follows the name until somebody writes one, and the quota's meters follow the choice of memory.

import { bytes, fill } from "./lib.js";

const form = document.getElementById("new-instance");
const { name, slug, max_memory: size } = form.elements;
const effect = document.getElementById("effect");

const slugOf = (text) =>
  text
    .normalize("NFKD")
    .replace(/[\u0300-\u036f]/g, "")
    .replace(/[đĐ]/g, "d")
    .toLowerCase()
    .replace(/[^a-z0-9]+/g, "-")
    .replace(/^-+|-+$/g, "")
    .slice(0, 43)
    .replace(/-+$/, "");

let own = slug.value !== "";
slug.addEventListener("input", () => (own = slug.value !== ""));
name.addEventListener("input", () => {
  if (!own) slug.value = slugOf(name.value);
});

function follow() {
  if (!size) return;
  const used = Number(effect.dataset.used) + Number(size.value);
  const limit = Number(effect.dataset.limit);
  const part = effect.querySelector('[data-part="memory"] .meter');
  const text = fill(effect.dataset.text, { used: bytes(used), limit: bytes(limit) });
  part.querySelector(".meter-text").textContent = text;
  part.querySelector("svg").setAttribute("aria-label", `${part.querySelector(".meter-label").textContent}: ${text}`);
  part.querySelector(".bar").setAttribute("width", Math.min(100, (100 * used) / limit || 0));
  part.classList.toggle("full", used >= limit);
  part.classList.toggle("near", used < limit && used >= 0.9 * limit);
}
size?.addEventListener("change", follow);
follow();
