// Deleting many keys: counted to the end, then deleted in steps with progress, stopped at any time.

import { api, fill, toast } from "./lib.js";

const sweep = document.getElementById("sweep");
const { api: base, pattern, type, total } = sweep.dataset;
const counted = document.getElementById("counted");
const form = document.getElementById("sweep-form");
let stopped = false;

async function steps(path, cursor, each) {
  do {
    const step = await api("POST", `${base}/${path}`, { pattern, type, cursor });
    cursor = step.cursor;
    each(step);
  } while (cursor !== "0" && !stopped);
}

async function count() {
  let sum = Number(sweep.dataset.counted);
  try {
    await steps("count-keys", sweep.dataset.cursor, (step) => {
      sum += step.count;
      counted.textContent = fill(sweep.dataset.matching, { count: sum });
    });
    document.getElementById("unfinished")?.remove();
  } catch (error) {
    toast(error.message, "bad"); // the link that goes on is still there
  }
}

async function remove() {
  let deleted = 0;
  let scanned = 0;
  const bar = document.getElementById("bar");
  const text = document.getElementById("progress-text");
  form.hidden = true;
  document.getElementById("progress").hidden = false;
  document.getElementById("stop").onclick = () => (stopped = true);
  try {
    await steps("delete-keys", "0", (step) => {
      deleted += step.count;
      scanned += step.scanned;
      bar.value = Math.min(1, scanned / Math.max(1, Number(total)));
      text.textContent = fill(sweep.dataset.deletedText, { count: deleted });
    });
    bar.value = stopped ? bar.value : 1;
    text.textContent = fill(stopped ? sweep.dataset.stopped : sweep.dataset.done, { count: deleted });
  } catch (error) {
    text.textContent = `${error.message} ${fill(sweep.dataset.deletedText, { count: deleted })}`;
  }
  document.getElementById("stop").replaceWith(form.querySelector("a.button"));
}

if (form) {
  if (sweep.dataset.cursor !== "0") count();
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    stopped = false;
    remove();
  });
}
