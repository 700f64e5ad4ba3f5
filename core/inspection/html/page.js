"use strict";
// Texts of a checkpoint reach the page as textContent, or through plain() where plotly would read tags.
const data = JSON.parse(document.getElementById("data").textContent);
const at = (id) => document.getElementById(id);
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const short = (text, most) => (text.length <= most ? text : text.slice(0, most / 2) + "…" + text.slice(-most / 2));
const plain = (text, most = 70) =>
  short(text, most).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
const colors = () => [1, 2, 3, 4, 5, 6, 7, 8].map((i) => css("--c" + i));
const bytes = (n) => {
  for (const [unit, size] of [["GB", 1e9], ["MB", 1e6], ["KB", 1e3]])
    if (n >= size) return (n / size).toFixed(1) + " " + unit;
  return n + " bytes";
};

const axis = (more) => ({ gridcolor: css("--grid"), linecolor: css("--line"), zeroline: false, automargin: true, ...more });
const layout = (more) => ({
  paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", margin: { l: 56, r: 16, t: 10, b: 44 },
  font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: css("--text") },
  hoverlabel: { bgcolor: css("--card"), bordercolor: css("--line"), font: { color: css("--text") }, align: "left" },
  modebar: { bgcolor: "rgba(0,0,0,0)", color: css("--faint"), activecolor: css("--text") }, colorway: colors(), ...more,
});
const draw = (id, traces, more, buttons = ["zoom2d", "pan2d", "resetScale2d", "toImage"]) =>
  Plotly.react(at(id), traces, layout(more), { responsive: true, displaylogo: false, modeBarButtons: [buttons] });

function drawCurve() {
  const { loss, smoothed, val_loss, learning_rate } = data.curve;
  const [blue, orange, green] = colors();
  const few = val_loss.x.length < 100 ? "lines+markers" : "lines";
  const traces = [
    { ...loss, name: "train loss", mode: "lines", line: { color: blue, width: 1 }, opacity: 0.4 },
    { ...smoothed, name: "train loss, smoothed", mode: "lines", line: { color: blue, width: 2 } },
    { ...val_loss, name: "val loss", mode: few, line: { color: orange, width: 2 }, marker: { size: 6 } },
    { ...learning_rate, name: "learning rate", mode: "lines", line: { color: green, width: 1.5 }, yaxis: "y2" },
  ].filter((trace) => trace.x.length);
  const last = Math.max(...traces.map((trace) => trace.x[trace.x.length - 1]));
  const here = data.step !== null && data.step < last
    ? [{ type: "line", yref: "paper", x0: data.step, x1: data.step, y0: 0, y1: 1, line: { color: css("--faint"), dash: "dot", width: 1 } }] : [];
  draw("curve", traces, {
    height: 420, hovermode: "x unified", shapes: here, legend: { orientation: "h", y: 1.02, yanchor: "bottom" },
    xaxis: axis({ title: { text: "step" }, anchor: "y2" }),
    yaxis: axis({ title: { text: "loss" }, domain: [0.32, 1] }),
    yaxis2: axis({ title: { text: "learning rate" }, domain: [0, 0.22], rangemode: "tozero", exponentformat: "power", nticks: 4 }),
    margin: { l: 64, r: 16, t: 30, b: 44 },
  });
}

function drawTree() {
  const rows = data.tree;
  const trace = {
    type: "treemap", branchvalues: "total", maxdepth: 4, ids: rows.map((_, i) => String(i)), sort: true,
    labels: rows.map((row) => plain(row[0], 40)), parents: rows.map((row) => (row[1] < 0 ? "" : String(row[1]))),
    values: rows.map((row) => row[2]), customdata: rows.map((row) => [plain(row[3]), bytes(row[2])]),
    texttemplate: "%{label}<br>%{customdata[1]}", tiling: { pad: 2 }, pathbar: { thickness: 22 },
    hovertemplate: "%{customdata[0]}<br>%{customdata[1]}, %{percentRoot:.1%} of all<extra></extra>",
    textfont: { color: css("--text") },
    marker: { depthfade: false, pad: { t: 20, l: 3, r: 3, b: 3 }, line: { color: css("--card"), width: 1 } }, root: { color: css("--grid") },
  };
  const soft = colors().map((color) => mix(color, css("--card"), 0.55));
  draw("tree", [trace], {
    height: 440, margin: { l: 0, r: 0, t: 26, b: 0 }, treemapcolorway: soft, uniformtext: { minsize: 10, mode: "hide" },
  }, ["toImage"]);
}

function drawNorms() {
  const kinds = data.kinds.filter((kind) => kind.layers[0][0] !== null).slice(0, 40);
  if (!kinds.length) return at("norms")?.remove();
  const last = Math.max(...kinds.map((kind) => kind.layers[kind.layers.length - 1][0]));
  const palette = colors();
  const dashes = ["solid", "dot", "dash", "longdash", "dashdot"];
  const traces = kinds.map((kind, i) => ({
    name: plain(kind.name, 44), x: kind.layers.map((l) => l[0]), y: kind.layers.map((l) => l[1]), mode: "lines+markers",
    customdata: kind.layers.map((l) => l[2]), hovertemplate: "layer %{x}: RMS %{y:.4g}, norm %{customdata:.4g}",
    line: { color: palette[i % 8], width: 1.8, dash: dashes[Math.floor(i / 8)] }, marker: { size: 5 },
  }));
  draw("norms", traces, {
    height: 380, xaxis: axis({ title: { text: "layer" }, ...(last < 20 ? { dtick: 1 } : {}) }),
    yaxis: axis({ title: { text: "RMS of the weights (norm / √count)" }, type: "log", dtick: "D2", tickformat: "~g" }),
    legend: { font: { size: 11 } }, margin: { l: 64, r: 16, t: 34, b: 44 },
  });
}

function drawHistograms() {
  const kind = data.kinds[Number(at("kind").value)];
  const layers = kind.layers.filter((layer) => layer[5]);
  const palette = colors();
  const traces = [];
  for (let row = layers.length - 1; row >= 0; row--) {
    const [number, , , low, high, counts] = layers[row];
    const peak = Math.max(...counts), width = (high - low) / counts.length;
    const x = counts.map((_, i) => low + (i + 0.5) * width);
    const y = counts.map((count) => row + (1.7 * count) / peak);
    const rise = { x: [low, ...x, high], y: [row, ...y, row] };
    const color = layers.length > 1 ? mix(palette[0], palette[3], row / (layers.length - 1)) : palette[0];
    traces.push({ x: [low, high], y: [row, row], mode: "lines", line: { width: 0 }, hoverinfo: "skip" });
    traces.push({
      ...rise, mode: "lines", fill: "tonexty", line: { color, width: 1.2 }, fillcolor: fade(color),
      customdata: ["", ...counts.map((count) => count.toLocaleString("en")), ""],
      hovertemplate: `${number === null ? "" : `layer ${number}<br>`}%{x:.4g}: %{customdata}<extra></extra>`,
    });
  }
  const many = layers.length > 24 ? Math.ceil(layers.length / 24) : 1;
  const ticks = layers.map((_, i) => i).filter((i) => i % many === 0);
  draw("histograms", traces, {
    height: Math.min(900, 190 + 34 * layers.length), showlegend: false, hovermode: "closest",
    xaxis: axis({ title: { text: "value" } }),
    yaxis: axis({
      title: { text: layers.length > 1 ? "layer" : "" }, tickvals: ticks,
      ticktext: ticks.map((i) => (layers[i][0] === null ? "" : String(layers[i][0]))), range: [-0.15, layers.length + 0.9],
    }),
  });
}
const rgb = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
const mix = (a, b, t) => "#" + rgb(a).map((v, i) => Math.round(v + (rgb(b)[i] - v) * t).toString(16).padStart(2, "0")).join("");
const fade = (hex) => `rgba(${rgb(hex).join(",")},0.45)`;

function drawAll() {
  if (at("curve")) drawCurve();
  if (at("tree")) drawTree();
  if (at("kind")) { drawNorms(); drawHistograms(); }
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

if (at("kind")) {
  data.kinds.forEach((kind, i) => at("kind").add(new Option(short(kind.name, 90), i)));
  const weight = (kind) => (kind.layers.length > 1) * kind.layers.reduce((sum, l) => sum + (l[5] || []).reduce((a, b) => a + b, 0), 0);
  at("kind").value = data.kinds.reduce((best, kind, i) => (weight(kind) > weight(data.kinds[best]) ? i : best), 0);
  at("kind").addEventListener("change", drawHistograms);
}
if (at("tensors")) tensorTable();
drawAll();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
