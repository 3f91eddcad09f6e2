"use strict";
document.documentElement.classList.add("js");
for (const table of document.querySelectorAll("table.stack")) {
  const heads = [...table.querySelectorAll("thead th")].map((head) => head.textContent.trim());
  for (const row of table.tBodies[0].rows) [...row.cells].forEach((cell, index) => { if (heads[index]) cell.dataset.label = heads[index]; });
}
const tip = document.getElementById("tip");
const show = (value) => Math.abs(value) >= 1e5 || (value && Math.abs(value) < 1e-3) ? value.toExponential(2) : String(+value.toPrecision(4));
for (const card of document.querySelectorAll("[data-lines]")) {
  const lines = JSON.parse(card.dataset.lines), inUnit = (value) => "share" in card.dataset ? show(100 * value) + " %" : show(value);
  for (const svg of card.querySelectorAll("svg")) {
    const [left, , right] = svg.dataset.box.split(" ").map(Number), [low, high] = svg.dataset.x.split(" ").map(Number);
    const cross = svg.querySelector(".cross");
    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect(), scale = box.width / svg.viewBox.baseVal.width;
      const wanted = low + ((event.clientX - box.left) / scale - left) / (right - left) * (high - low);
      const near = (points) => points.reduce((best, point) => Math.abs(point[0] - wanted) < Math.abs(best[0] - wanted) ? point : best);
      const step = near(lines.find((line) => line[1].length)[1])[0], x = left + (step - low) / (high - low) * (right - left);
      cross.setAttribute("x1", x); cross.setAttribute("x2", x); cross.setAttribute("visibility", "visible");
      tip.textContent = "step " + step + lines.filter((line) => line[1].length).map((line) => {
        const point = near(line[1]);
        return "\n" + line[0] + "  " + inUnit(point[1]) + (point[0] === step ? "" : " (step " + point[0] + ")");
      }).join("");
      tip.hidden = false;
      const side = x * scale > box.width * 0.6 ? x * scale - tip.offsetWidth - 12 : x * scale + 12;
      tip.style.left = box.left + scrollX + side + "px"; tip.style.top = box.top + scrollY + 14 + "px";
    });
    svg.addEventListener("pointerleave", () => { tip.hidden = true; cross.setAttribute("visibility", "hidden"); });
  }
}
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((each) => { each.open = true; }));
