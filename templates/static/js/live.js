// Live views: lines as they come, a bounded number of them; pausing keeps what arrives meanwhile, up to the same bound.

import { api, element, fill, toast } from "./lib.js";

const MAX_LINES = 500;

const live = document.getElementById("live");
const texts = live.dataset;
const list = document.getElementById("lines");
const state = document.getElementById("live-state");
const toggle = document.getElementById("toggle");
const pause = document.getElementById("pause");
const filters = document.getElementById("live-form");
let stream = null; // what ends it
let paused = false;
let waiting = [];
let dropped = 0;

document.querySelector("[data-no-script]").hidden = true;
live.querySelector(".live-bar").hidden = false;
list.hidden = false;

const shown = (value) => (value.base64 === undefined ? value.text : `base64:${value.base64}`);

function line(event, data) {
  if (event === "skipped") return element("li", { className: "said" }, fill(texts.skipped, data));
  const made = element("li");
  if (data.channel) {
    made.append(element("span", { className: "at" }, new Date(data.at * 1000).toLocaleTimeString()), " ");
    made.append(element("bdi", { className: "from" }, shown(data.channel)), data.pattern ? ` (${shown(data.pattern)})` : "", " ");
  }
  made.append(element("bdi", {}, shown(data.value)));
  if (data.size) made.append(element("span", { className: "at" }, ` … ${data.size} B`));
  return made;
}

function flush() {
  const atEnd = list.scrollTop + list.clientHeight >= list.scrollHeight - 40;
  list.append(...waiting.map(([event, data]) => line(event, data)));
  waiting = [];
  const over = list.children.length - MAX_LINES;
  for (let index = 0; index < over; index += 1) list.firstElementChild.remove();
  drop(Math.max(0, over));
  if (atEnd) list.scrollTop = list.scrollHeight;
}

function drop(count) {
  dropped += count;
  const told = document.getElementById("dropped");
  told.hidden = !dropped;
  told.textContent = fill(texts.dropped, { count: dropped });
}

function received(event, data) {
  if (event === "ready") say(texts.connected);
  else if (event === "ended") end(fill(texts.ended, data));
  else {
    waiting.push([event, data]);
    if (waiting.length > MAX_LINES) {
      waiting.shift();
      drop(1);
    }
    if (paused) say(fill(texts.paused, { count: waiting.length }));
  }
}

function say(text) {
  if (state.textContent !== text) state.textContent = text;
}

function end(text) {
  stream?.abort();
  stream = null;
  if (!paused) flush();
  toggle.textContent = texts.start;
  pause.disabled = !paused;
  say(text);
}

async function begin() {
  const mine = (stream = new AbortController());
  toggle.textContent = texts.stop;
  pause.disabled = false;
  say(texts.connecting);
  const query = new URLSearchParams(new FormData(filters));
  try {
    const response = await fetch(`${texts.api}?${query}`, { signal: mine.signal });
    if (!response.ok) {
      const answer = await response.json().catch(() => ({}));
      return end(answer.message ?? `${document.body.dataset.failed} (${response.status})`);
    }
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let text = "";
    for (;;) {
      const { value, done } = await reader.read();
      if (done) break;
      const blocks = (text + value).split("\n\n");
      text = blocks.pop();
      for (const block of blocks) {
        const event = /^event: (.*)$/m.exec(block)?.[1] ?? "";
        const data = /^data: (.*)$/m.exec(block)?.[1];
        if (data !== undefined) received(event, JSON.parse(data));
      }
      if (!paused) flush();
    }
    if (stream === mine) end(texts.stopped);
  } catch (error) {
    if (stream === mine) end(error.name === "AbortError" ? texts.stopped : document.body.dataset.offline);
  }
}

toggle.onclick = () => (stream ? end(texts.stopped) : begin());
pause.onclick = () => {
  paused = !paused;
  pause.textContent = paused ? texts.resume : texts.pause;
  if (!paused) {
    flush();
    pause.disabled = !stream;
  }
  say(paused ? fill(texts.paused, { count: waiting.length }) : stream ? texts.connected : texts.stopped);
};
document.getElementById("clear").onclick = () => {
  list.replaceChildren();
  drop(-dropped);
};
filters.addEventListener("submit", (event) => {
  event.preventDefault();
  if (stream) end(texts.stopped);
  begin();
});
addEventListener("pagehide", () => stream?.abort());

// Publishing without leaving the page

const publish = document.getElementById("publish");
const word = (text) => `"${[...new TextEncoder().encode(text)].map((byte) => (byte > 31 && byte < 127 && byte !== 34 && byte !== 92 ? String.fromCharCode(byte) : `\\x${byte.toString(16).padStart(2, "0")}`)).join("")}"`;
publish?.addEventListener("submit", async (event) => {
  const form = new FormData(publish);
  if (form.get("message_as") !== "text" || form.get("channel").startsWith("base64:")) return; // the form itself
  event.preventDefault();
  delete publish.dataset.sent;
  try {
    const { replies } = await api("POST", publish.dataset.api, { lines: `PUBLISH ${word(form.get("channel"))} ${word(form.get("message"))}` });
    if (replies[0].reply.type !== "integer") throw new Error(replies[0].text);
    toast(fill(publish.dataset.done, { count: replies[0].reply.integer }));
  } catch (error) {
    toast(error.message, "bad");
  }
});
