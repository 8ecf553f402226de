// Charts: a line that follows the pointer or the arrow keys, with the numbers of its point; times in the reader's zone.

const language = document.documentElement.lang;

function formats(step, count) {
  const day = { month: "2-digit", day: "2-digit" };
  const time = { hour: "2-digit", minute: "2-digit" };
  return new Intl.DateTimeFormat(language, step * count <= 90000 ? time : step >= 86400 ? day : { ...day, ...time });
}

function enhance(svg) {
  if (svg.dataset.alive) return;
  svg.dataset.alive = "1";
  const start = Number(svg.dataset.start);
  const step = Number(svg.dataset.step);
  const strips = [...svg.querySelectorAll(".points path")].map((path) => {
    const middle = Number(path.getAttribute("d").match(/^M(\d+)/)[1]);
    const title = path.querySelector("title");
    const lines = title.textContent.split("\n");
    title.remove(); // else the browser shows it too
    return { middle, lines };
  });
  if (!strips.length) return;
  const box = svg.viewBox.baseVal;
  const left = 58;
  const width = box.width - left - 8;
  const count = Math.round(width / Number(svg.querySelector(".points").getAttribute("stroke-width")));
  const shown = formats(step, count);
  for (const text of svg.querySelectorAll("[data-at]")) text.textContent = shown.format(Number(text.dataset.at) * 1000);
  const at = (strip) => start + Math.floor((strip.middle - left) / (width / count)) * step;

  const card = svg.closest(".chart-card");
  const tip = document.createElement("div");
  tip.className = "chart-tip";
  tip.setAttribute("role", "status");
  tip.hidden = true;
  card.append(tip);
  const cross = document.createElementNS("http://www.w3.org/2000/svg", "path");
  cross.setAttribute("class", "cross");
  svg.append(cross);
  let chosen = -1;

  function show(index) {
    chosen = Math.max(0, Math.min(strips.length - 1, index));
    const strip = strips[chosen];
    cross.setAttribute("d", `M${strip.middle} 10V168`);
    tip.textContent = [shown.format(at(strip) * 1000), ...strip.lines.slice(1)].join("\n");
    tip.hidden = false;
    const drawn = svg.getBoundingClientRect();
    const around = card.getBoundingClientRect();
    const x = drawn.left - around.left + (strip.middle / box.width) * drawn.width;
    const right = x + 14 + tip.offsetWidth > around.width;
    tip.style.left = `${Math.max(4, right ? x - 14 - tip.offsetWidth : x + 14)}px`;
    tip.style.top = `${drawn.top - around.top + 8}px`;
  }
  function hide() {
    tip.hidden = true;
    cross.removeAttribute("d");
    chosen = -1;
  }
  svg.addEventListener("pointermove", (event) => {
    const drawn = svg.getBoundingClientRect();
    const x = ((event.clientX - drawn.left) / drawn.width) * box.width;
    let nearest = 0;
    strips.forEach((strip, index) => {
      if (Math.abs(strip.middle - x) < Math.abs(strips[nearest].middle - x)) nearest = index;
    });
    show(nearest);
  });
  svg.addEventListener("pointerleave", hide);
  svg.addEventListener("blur", hide);
  svg.tabIndex = 0;
  svg.addEventListener("focus", () => show(strips.length - 1));
  svg.addEventListener("keydown", (event) => {
    if (event.key === "ArrowLeft") show(chosen - 1);
    else if (event.key === "ArrowRight") show(chosen + 1);
    else if (event.key === "Escape") hide();
    else return;
    event.preventDefault();
  });
}

const all = () => document.querySelectorAll("svg[data-chart]").forEach(enhance);
all();
document.addEventListener("refreshed", all);
for (const zone of document.querySelectorAll("[data-local]")) zone.textContent = zone.dataset.local;
