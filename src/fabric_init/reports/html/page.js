"use strict";

const SCREENFUL = 100; // rows drawn at a time: thousands at once would keep the browser busy
const FIGURES = new Set(["number", "count", "bytes", "seconds"]);

const parsed = (element) => JSON.parse(element.textContent);

function made(name, properties = {}, ...children) {
  const element = Object.assign(document.createElement(name), properties);
  element.append(...children); // texts become text nodes, never markup
  return element;
}

// ---- how a cell is shown

function inUnits(value, units, step) {
  let place = 0;
  while (Math.abs(value) >= step && place < units.length - 1) {
    value /= step;
    place += 1;
  }
  return `${Number(value.toPrecision(3))} ${units[place]}`;
}

const shown = {
  number: (value) =>
    value && Math.abs(value) < 1e-3 ? value.toExponential(2) : String(Number(value.toPrecision(4))),
  count: (value) => value.toLocaleString("en"),
  bytes: (value) => inUnits(value, ["B", "kB", "MB", "GB", "TB"], 1000),
  seconds: (value) => (value < 1 ? inUnits(value * 1e6, ["µs", "ms"], 1000) : `${Number(value.toPrecision(3))} s`),
};

function asText(value, kind) {
  if (value === null || value === undefined) return "";
  if (Array.isArray(value)) return value.join(" ");
  return typeof value === "number" && kind in shown ? shown[kind](value) : String(value);
}

// Long names may go on in the next line after a dot, a slash or a bracket.
const breakable = (text) => text.split(/(?<=[./(])(?=[A-Za-z_])/).flatMap((part, i) => (i ? [made("wbr"), part] : [part]));

function cellOf(value, column) {
  const cell = made("td", { className: FIGURES.has(column.kind) ? "figure" : column.kind });
  cell.dataset.title = column.title;
  if (!Array.isArray(value)) cell.append(...breakable(asText(value, column.kind)));
  else if (value.length) {
    const items = value.map((text) => made("div", {}, text));
    cell.append(made("details", {}, made("summary", {}, String(value.length)), ...items));
  }
  return cell;
}

// ---- the table: sorted, filtered, drawn as far as one has scrolled

function compared(one, other) {
  if (Array.isArray(one)) [one, other] = [one.length, other.length];
  if (typeof one === "number" && typeof other === "number") return one - other;
  if (typeof one === typeof other) return String(one).localeCompare(String(other), "en", { numeric: true });
  return typeof one === "number" ? -1 : 1; // nan and inf after every number
}

function setUpTable({ columns, rows }) {
  const section = document.querySelector(".tensors");
  const [search, output] = [section.querySelector("input"), section.querySelector("output")];
  const [head, body] = [section.querySelector("thead"), section.querySelector("tbody")];
  const texts = rows.map((row) => row.map((cell, i) => asText(cell, columns[i].kind)).join("\n").toLowerCase());
  const choices = new Map(); // column number → its <select>
  let [sortedBy, direction, chosen, drawn] = [-1, 1, [], 0];

  const end = section.querySelector(".end");
  const observer = new IntersectionObserver((seen) => seen.at(-1).isIntersecting && draw(), { rootMargin: "1000px" });

  function draw() {
    const part = chosen.slice(drawn, drawn + SCREENFUL);
    body.append(...part.map((i) => made("tr", {}, ...rows[i].map((cell, c) => cellOf(cell, columns[c])))));
    drawn += part.length;
    if (part.length) { // asks again whether the end is near
      observer.unobserve(end);
      observer.observe(end);
    }
  }

  function update() {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const fits = (i) =>
      words.every((word) => texts[i].includes(word)) &&
      [...choices].every(([c, select]) => !select.value || rows[i][c] === select.value);
    chosen = rows.map((_, i) => i).filter(fits);
    if (sortedBy >= 0) {
      const empty = (i) => rows[i][sortedBy] === null || rows[i][sortedBy] === "";
      chosen.sort(
        (a, b) => empty(a) - empty(b) || direction * (empty(a) ? 0 : compared(rows[a][sortedBy], rows[b][sortedBy])),
      );
    }
    output.textContent = `${chosen.length.toLocaleString("en")} of ${rows.length.toLocaleString("en")}`;
    body.replaceChildren();
    drawn = 0;
    draw();
  }

  function sortBy(c, way) {
    [sortedBy, direction] = [c, way];
    headings.forEach((heading, i) =>
      i === c ? heading.setAttribute("aria-sort", way > 0 ? "ascending" : "descending") : heading.removeAttribute("aria-sort"),
    );
    update();
  }

  // figures: the largest first
  const firstWay = (c) => (FIGURES.has(columns[c].kind) || columns[c].kind === "list" ? -1 : 1);
  const headings = columns.map((column, c) => {
    const button = made("button", { type: "button", title: column.hint }, column.title);
    button.addEventListener("click", () => sortBy(c, sortedBy === c ? -direction : firstWay(c)));
    return made("th", { scope: "col", className: FIGURES.has(column.kind) ? "figure" : "" }, button);
  });
  head.append(made("tr", {}, ...headings));

  columns.forEach((column, c) => {
    if (column.kind !== "choice") return;
    const values = [...new Set(rows.map((row) => row[c]))].filter(Boolean).sort();
    if (values.length < 2) return;
    const any = made("option", { value: "" }, `any ${column.title}`);
    const select = made("select", {}, any, ...values.map((value) => made("option", { value }, value)));
    select.setAttribute("aria-label", column.title);
    select.addEventListener("change", update);
    choices.set(c, select);
    section.querySelector(".choices").append(select);
  });

  const sorting = section.querySelector(".sorting select"); // narrow screens show no headings to click
  sorting.append(made("option", { value: -1 }, "order in the model"));
  sorting.append(...columns.map((column, c) => made("option", { value: c }, column.title)));
  sorting.addEventListener("change", () => sortBy(+sorting.value, +sorting.value < 0 ? 1 : firstWay(+sorting.value)));

  search.addEventListener("input", update);
  section.querySelector("form").addEventListener("submit", (event) => event.preventDefault());
  update();
}

// ---- the plots

const OPTIONS = {
  responsive: true,
  displaylogo: false,
  modeBarButtons: [["zoom2d", "pan2d", "resetScale2d", "toImage"]], // and none that goes to a site
};

async function loadPlotting() {
  const packed = Uint8Array.from(atob(document.getElementById("plotting").textContent), (c) => c.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  const code = new Blob([await new Response(stream).arrayBuffer()], { type: "text/javascript" });
  const script = made("script", { src: URL.createObjectURL(code) });
  await new Promise((resolve, reject) => {
    script.onload = resolve;
    script.onerror = () => reject(new Error("the plotting code did not load"));
    document.head.append(script);
  });
}

function inTheme(layout) {
  const style = getComputedStyle(document.documentElement);
  const [text, line] = [style.getPropertyValue("--text").trim(), style.getPropertyValue("--line").trim()];
  const axis = { gridcolor: line, linecolor: line, zerolinecolor: line, automargin: true };
  const hover = { align: "left", bgcolor: style.getPropertyValue("--panel").trim(), font: { color: text } };
  return {
    ...layout,
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: text, family: "system-ui, sans-serif", size: 12 },
    hoverlabel: hover,
    modebar: { bgcolor: "rgba(0,0,0,0)", color: line, activecolor: text },
    legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom" },
    xaxis: { ...layout.xaxis, ...axis },
    yaxis: { ...layout.yaxis, ...axis },
  };
}

async function drawPlots() {
  const drawings = [...document.querySelectorAll(".drawing")];
  if (!drawings.length) return;
  try {
    await loadPlotting();
  } catch (error) {
    for (const place of drawings) {
      place.classList.add("failed");
      place.textContent = `Not drawn: ${error.message}. A browser from 2023 or later draws it.`;
    }
    throw error;
  }
  const draw = () =>
    Promise.all(
      drawings.map((place) => {
        const { data, layout } = parsed(place.parentElement.querySelector(".figure"));
        return Plotly.react(place, data, inTheme(layout), OPTIONS);
      }),
    );
  await draw();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
}

setUpTable(parsed(document.getElementById("table")));
drawPlots().finally(() => (document.documentElement.dataset.drawn = "true"));
