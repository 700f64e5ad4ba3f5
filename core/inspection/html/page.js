"use strict";
// Texts of a checkpoint reach the page as textContent alone.
const data = JSON.parse(document.getElementById("data").textContent);
const at = (id) => document.getElementById(id);
const bytes = (n) => {
  for (const [unit, size] of [["GB", 1e9], ["MB", 1e6], ["KB", 1e3]])
    if (n >= size) return (n / size).toFixed(1) + " " + unit;
  return n + " bytes";
};

// The ages of dates: of the moment at which the page is looked at.
function ages() {
  for (const time of document.querySelectorAll("time")) {
    const seconds = (Date.now() - Date.parse(time.dateTime)) / 1000;
    const [unit, length] = [["day", 86400], ["hour", 3600], ["minute", 60], ["second", 1]].find((u) => seconds >= u[1]) || [];
    if (!unit) continue;
    const count = Math.floor(seconds / length);
    time.dataset.said ??= time.textContent;
    time.textContent = `${time.dataset.said} (${count} ${unit}${count === 1 ? "" : "s"} ago)`;
  }
}

// The values of a curve at a step: read back from its drawing, whose paths hold them to a tenth of a unit.
function places(path) {
  let x = 0, y = 0;
  const numbers = path.getAttribute("d").match(/-?\d*\.?\d+/g).map(Number), found = [];
  for (let i = 0; i < numbers.length; i += 2) found.push([(x += numbers[i]), (y += numbers[i + 1])]);
  return found;
}
function readCurve() {
  const chart = at("curve"), slider = at("at"), [left, right] = [74, 988];
  const [first, last] = chart.dataset.x.split(" ").map(Number), [low, high, , bottom] = chart.dataset.y.split(" ").map(Number);
  const lines = [...chart.querySelectorAll("path[data-name]")].map((path) => [path.dataset.name, places(path)]);
  const cursor = document.createElementNS("http://www.w3.org/2000/svg", "path");
  cursor.setAttribute("class", "cursor");
  chart.append(cursor);
  const show = () => {
    const x = left + ((right - left) * slider.value) / 1000;
    const step = Math.round(first + ((last - first) * slider.value) / 1000);
    cursor.setAttribute("d", `M${x} 8V${bottom}`);
    const said = lines.flatMap(([name, points]) => {
      if (x < points[0][0] - 1 || x > points[points.length - 1][0] + 1) return [];
      const near = points.reduce((a, b) => (Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a));
      return [`${name} ${(low + ((high - low) * (bottom - near[1])) / (bottom - 10)).toPrecision(4)}`];
    });
    const text = `step ${step.toLocaleString("en")}: ${said.join(", ")}`;
    at("here").textContent = text;
    slider.setAttribute("aria-valuetext", text);
  };
  slider.addEventListener("input", show);
  chart.addEventListener("pointermove", (event) => {
    const box = chart.getBoundingClientRect();
    slider.value = Math.round((1000 * (((event.clientX - box.left) / box.width) * 1000 - left)) / (right - left));
    show();
  });
  slider.closest("p").hidden = false;
  show();
}

// Where a server watches the checkpoint: a newer page replaces this one, with the same folds open.
const folds = () => [...document.querySelectorAll("details")];
async function watch(version) {
  try {
    const answer = await fetch("version", { cache: "no-store" });
    if (answer.ok && (await answer.text()) !== version) {
      sessionStorage.setItem("open", JSON.stringify(folds().map((fold) => fold.open)));
      return location.reload();
    }
  } catch { /* the server is gone: this page stays as it is */ }
  setTimeout(watch, 3000, version);
}


const number = (v) => (v === null || v === undefined ? "" : v === 0 ? "0" : String(Number(v.toPrecision(4))));
const percent = (v) => (v ? (v < 1e-4 ? "< 0.01" : (100 * v).toFixed(v < 0.1 ? 2 : 1)) + " %" : v === 0 ? "0" : "");
// Columns of the table: title, place of what is shown, place of what is sorted by, how it is written.
const columns = [
  ["name", 0, 0, String], ["shape", 1, 2, String], ["dtype", 3, 3, String], ["bytes", 4, 4, (v) => v.toLocaleString("en")],
  ["mean", 5, 5, number], ["std", 6, 6, number], ["min", 7, 7, number], ["max", 8, 8, number], ["rms", 9, 9, number],
  ["zeros", 10, 10, percent], ["NaN, Inf", 11, 11, (v) => (v === undefined ? "" : v.toLocaleString("en"))],
];

function tensorTable() {
  const table = at("tensors"), head = table.createTHead().insertRow(), body = table.createTBody();
  const shown = columns.filter((column) => column[1] < 5 || data.table.some((row) => row.length > 5));
  let sorted = null, down = false, room = 200;
  const texts = data.table.map((row) => `${row[0]} ${row[1]} ${row[3]}`.toLowerCase());
  const compare = (a, b) => {
    const missing = (v) => v === null || v === undefined;
    if (missing(a) || missing(b)) return missing(a) - missing(b);
    const order = typeof a === "string" ? a.localeCompare(b, "en", { numeric: true }) : a - b;
    return down ? -order : order;
  };
  function fill() {
    const words = at("search").value.toLowerCase().split(/\s+/).filter(Boolean);
    const rows = data.table.filter((_, i) => words.every((word) => texts[i].includes(word)));
    if (sorted !== null) rows.sort((a, b) => compare(a[sorted], b[sorted]));
    body.replaceChildren(...rows.slice(0, room).map((row) => {
      const line = document.createElement("tr");
      for (const [title, place, , write] of shown) {
        const cell = line.insertCell();
        cell.textContent = write(row[place]);
        if (title === "NaN, Inf" && row[place]) cell.className = "bad";
      }
      return line;
    }));
    const total = rows.reduce((sum, row) => sum + row[4], 0);
    at("found").textContent = `${rows.length.toLocaleString("en")} tensors, ${bytes(total)}` +
      (rows.length > room ? `; the first ${room.toLocaleString("en")} are shown` : "");
    at("more").hidden = rows.length <= room;
  }
  for (const [title, , key] of shown) {
    const cell = document.createElement("th"), button = document.createElement("button");
    button.type = "button";
    button.textContent = title;
    button.addEventListener("click", () => {
      down = sorted === key ? !down : key > 3 || key === 2;
      sorted = key;
      for (const other of head.cells) other.removeAttribute("aria-sort");
      cell.setAttribute("aria-sort", down ? "descending" : "ascending");
      fill();
    });
    cell.append(button);
    head.append(cell);
  }
  at("search").addEventListener("input", fill);
  at("more").addEventListener("click", () => { room += 1000; fill(); });
  fill();
}

if (at("tensors")) tensorTable();
if (at("curve") && at("at")) readCurve();
if (document.documentElement.dataset.version) {
  const open = JSON.parse(sessionStorage.getItem("open") || "[]");
  if (open.length === folds().length) folds().forEach((fold, i) => (fold.open = open[i]));
  watch(document.documentElement.dataset.version);
}
ages();
setInterval(ages, 60000);
addEventListener("beforeprint", () => document.querySelectorAll("#histograms details, #training details").forEach((fold) => (fold.open = true)));
