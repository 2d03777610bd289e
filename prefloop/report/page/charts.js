// Light or dark, runs on and off, and values read off the pictures that matplotlib drew.

const facts = JSON.parse(document.getElementById("facts").textContent);
const hiddenRuns = new Set();

document.getElementById("theme").addEventListener("click", () => {
  const root = document.documentElement, order = ["", "light", "dark"];
  const next = order[(order.indexOf(root.dataset.theme ?? "") + 1) % order.length];
  if (next) root.dataset.theme = next; else delete root.dataset.theme;
  document.getElementById("theme").textContent = next ? `Theme: ${next}` : "Theme";
});

for (const box of document.querySelectorAll("input[data-run]")) {
  box.checked = true; // Browsers remember form states over a reload.
  box.addEventListener("change", () => {
    if (box.checked) hiddenRuns.delete(+box.dataset.run); else hiddenRuns.add(+box.dataset.run);
    for (const part of document.querySelectorAll(`.of-${box.dataset.run}`)) part.classList.toggle("off", !box.checked);
    document.dispatchEvent(new Event("runs"));
  });
}

const SVG = "http://www.w3.org/2000/svg";
const short = (value) => Math.abs(value) >= 1e5 || (value && Math.abs(value) < 1e-3) ? value.toExponential(2) : String(+value.toPrecision(4));

for (const figure of document.querySelectorAll("[data-chart]")) {
  const chart = facts.charts[figure.dataset.chart];
  if (!chart) continue;
  const picture = figure.querySelector("svg"), reading = figure.querySelector(".reading");
  const [left, top, right, bottom] = chart.box, [low, , high] = chart.limits;
  const cursor = document.createElementNS(SVG, "line");
  cursor.setAttribute("class", "cursor off");
  cursor.setAttribute("y1", top);
  cursor.setAttribute("y2", bottom);
  picture.append(cursor);
  const leave = () => { cursor.classList.add("off"); reading.replaceChildren(); };
  picture.addEventListener("pointerleave", leave);
  picture.addEventListener("pointermove", (event) => {
    const place = new DOMPoint(event.clientX, event.clientY).matrixTransform(picture.getScreenCTM().inverse());
    const wanted = low + ((place.x - left) / (right - left)) * (high - low);
    const shown = chart.lines.filter((line) => !hiddenRuns.has(line.run));
    const every = shown.flatMap((line) => line.x);
    if (!every.length) return leave();
    const x = every.reduce((best, at) => (Math.abs(at - wanted) < Math.abs(best - wanted) ? at : best));
    const at = left + ((x - low) / (high - low)) * (right - left);
    cursor.setAttribute("x1", at);
    cursor.setAttribute("x2", at);
    cursor.classList.remove("off");
    const where = chart.rounds ? (x < 0 ? "start" : `round ${x}`) : `step ${Math.round(x)}`;
    reading.replaceChildren(`${where}: `);
    for (const line of shown) {
      const n = line.x.indexOf(x);
      if (n < 0) continue;
      if (facts.runs.length > 1) reading.append(element("i", `dot back-run-${line.run % 8}`));
      reading.append(`${line.label ? line.label + " " : ""}${short(line.y[n])}  `);
    }
  });
}
