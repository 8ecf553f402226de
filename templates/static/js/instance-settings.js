// A snapshot is sent in parts, so that it may be as large as the instance; the bar tells how far it is.

import { ApiError, bytes, csrf, fill, toast } from "./lib.js";

const MOST = 4 * 1024 * 1024;
const form = document.getElementById("load-form");

async function send(file, onProgress) {
  const size = Math.min(MOST, Number(form.dataset.most));
  for (let start = 0; start < file.size; start += size) {
    const part = file.slice(start, start + size);
    const response = await fetch(form.dataset.api, {
      method: "PUT",
      headers: { "Content-Range": `bytes ${start}-${start + part.size - 1}/${file.size}`, "X-CSRF-Token": csrf() },
      body: part,
    }).catch(() => {
      throw new ApiError(0, document.body.dataset.offline);
    });
    const answer = await response.json().catch(() => null);
    if (!response.ok) throw new ApiError(response.status, answer?.message ?? document.body.dataset.failed, answer?.data);
    onProgress(start + part.size, answer);
  }
}

form?.addEventListener("submit", async (event) => {
  event.preventDefault();
  const file = form.elements.snapshot.files[0];
  const bar = document.getElementById("load-progress");
  const told = document.getElementById("load-told");
  const button = form.querySelector("button");
  button.disabled = true;
  bar.hidden = false;
  let done = false;
  try {
    await send(file, (sent, answer) => {
      bar.value = sent / file.size;
      done = Boolean(answer?.data?.loaded);
      told.textContent = sent < file.size ? fill(form.dataset.progress, { done: bytes(sent), total: bytes(file.size) }) : form.dataset.busy;
    });
    told.textContent = done ? form.dataset.done : form.dataset.busy;
    toast(told.textContent);
    form.elements.confirm.value = "";
  } catch (error) {
    told.textContent = error.message;
    toast(error.message, "bad");
    button.disabled = false;
  } finally {
    bar.hidden = true;
  }
});
