"use strict";
// One key of series for the whole report: a click hides or shows a series in every figure, table and gallery; the
// mouse over a name or a mark dims the others. Heads of tables sort their column.
for (const report of document.querySelectorAll(".report")) {
  const parts = (series) => report.querySelectorAll(`.series[data-series="${series}"]`);
  const light = (series, on) => {
    report.classList.toggle("dimmed", on);
    for (const part of parts(series)) part.classList.toggle("lit", on);
  };
  for (const button of report.querySelectorAll(".key button")) {
    const series = button.dataset.series;
    button.addEventListener("click", () => {
      const shown = button.getAttribute("aria-pressed") !== "true";
      button.setAttribute("aria-pressed", String(shown));
      for (const part of parts(series)) part.classList.toggle("off", !shown);
    });
    button.addEventListener("mouseenter", () => light(series, true));
    button.addEventListener("mouseleave", () => light(series, false));
  }
  const tip = document.getElementById("tip");
  for (const mark of report.querySelectorAll(".mark")) {
    const title = mark.querySelector("title");
    const words = title.textContent;
    mark.setAttribute("aria-label", words);
    title.remove(); // the browser's own tip would come on top of ours
    mark.addEventListener("mouseenter", (event) => {
      tip.textContent = words;
      tip.hidden = false;
      tip.style.left = `${Math.min(event.clientX + 14, window.innerWidth - 350)}px`;
      tip.style.top = `${event.clientY + 14}px`;
      light(mark.dataset.series, true);
    });
    mark.addEventListener("mouseleave", () => {
      tip.hidden = true;
      light(mark.dataset.series, false);
    });
  }
}
const compare = (a, b) => {
  if (a === undefined || b === undefined) return a === b ? 0 : a === undefined ? 1 : -1; // nothing measured: last
  const [x, y] = [Number(a), Number(b)];
  return Number.isNaN(x) || Number.isNaN(y) ? a.localeCompare(b) : x - y;
};
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const sort = () => {
      const down = head.dataset.order === "up";
      for (const other of heads) delete other.dataset.order;
      head.dataset.order = down ? "down" : "up";
      const value = (row) => row.cells[column].dataset.value ?? (row.cells[column].textContent === "–" ? undefined : row.cells[column].textContent);
      const rows = [...table.tBodies[0].rows].sort((a, b) => {
        const order = compare(value(a), value(b));
        const missing = value(a) === undefined || value(b) === undefined;
        return down && !missing ? -order : order;
      });
      table.tBodies[0].append(...rows);
    };
    head.addEventListener("click", sort);
    head.addEventListener("keydown", (event) => event.key === "Enter" && sort());
  });
}
