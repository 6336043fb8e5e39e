// Draws the figures of the page when they come into view, and makes its tables sort and filter.
"use strict";
const figures = JSON.parse(document.getElementById("figure-data").textContent);
const dark = window.matchMedia("(prefers-color-scheme: dark)");
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function themed() {
  return {
    "font.color": colour("--text"),
    "modebar.bgcolor": "rgba(0,0,0,0)",
    "modebar.color": colour("--soft"),
    "modebar.activecolor": colour("--text"),
    "hoverlabel.bgcolor": colour("--raised"),
    "hoverlabel.font.color": colour("--text"),
  };
}

// A page of runs that go on loads itself again when it is no longer the newest. What the reader
// chose until then is kept for the next page: by figure the step of its slider, the zoom of its axes
// and the lines that were hidden; by table its words, order and open lines; and the place.
const seconds = Number(document.body.dataset.refresh || 0);
const STORE = "cerl:" + location.href;
const kept = seconds > 0 ? JSON.parse(sessionStorage.getItem(STORE) || "{}") : {};
const views = kept.views || {};

function remember(place, view) {
  place.on("plotly_relayout", (change) => {
    for (const [key, value] of Object.entries(change)) {
      const axis = /^[xy]axis\d*/.exec(key);
      if (axis && key.includes(".range")) view.zoom[key] = value;
      if (axis && key.includes(".autorange"))
        Object.keys(view.zoom).forEach((k) => k.startsWith(axis[0] + ".") && delete view.zoom[k]);
    }
  });
  place.on("plotly_restyle", ([change, numbers]) => {
    if (change.visible === undefined) return;
    const shown = [change.visible].flat();
    numbers.forEach((number, i) => {
      view.lines[place.data[number].name] = shown[i % shown.length];
    });
  });
  place.on("plotly_sliderchange", ({ slider, step }) => {
    // At its end a slider goes on with the runs.
    view.step = step.value === slider.steps[slider.steps.length - 1].value ? null : step.args[0][0];
  });
}

async function again(place, figure, view) {
  if (view.step && (figure.frames || []).some((frame) => frame.name === view.step))
    await Plotly.animate(place, [view.step], { mode: "immediate", frame: { duration: 0 } });
  if (Object.keys(view.zoom).length) await Plotly.relayout(place, view.zoom);
  for (const [name, visible] of Object.entries(view.lines)) {
    const numbers = place.data.map((line, i) => (line.name === name ? i : -1)).filter((i) => i >= 0);
    if (numbers.length) await Plotly.restyle(place, { visible }, numbers);
  }
}

async function draw(place) {
  const figure = figures[place.dataset.figure];
  if (place.dataset.drawn || !figure) return;
  place.dataset.drawn = "begun";
  const config = {
    responsive: true,
    displaylogo: false,
    displayModeBar: window.innerWidth < 600 ? false : "hover",
    modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]],
    toImageButtonOptions: { format: "svg" },
  };
  await Plotly.newPlot(place, figure.data, figure.layout, config);
  await Plotly.relayout(place, themed());
  if (figure.frames) await Plotly.addFrames(place, figure.frames);
  if (seconds > 0) {
    const view = (views[place.dataset.figure] ??= { step: null, zoom: {}, lines: {} });
    await again(place, figure, view);
    remember(place, view);
  }
  place.dataset.drawn = "done";
}

const places = [...document.querySelectorAll(".chart")];
const seen = new IntersectionObserver(
  (entries) => entries.forEach((entry) => entry.isIntersecting && draw(entry.target)),
  { rootMargin: "400px" },
);
places.forEach((place) => seen.observe(place));
window.addEventListener("beforeprint", () => places.forEach(draw));
dark.addEventListener("change", () =>
  places.filter((p) => p.dataset.drawn === "done").forEach((p) => Plotly.relayout(p, themed())));

function sorted(rows, column, sign) {
  const key = (row) => {
    const cell = row.cells[column];
    return cell.dataset.value === undefined ? cell.textContent : Number(cell.dataset.value);
  };
  // Numbers come before texts, and empty cells last, whatever the direction.
  const rank = (value) => (value === "" ? 2 : typeof value === "number" ? 0 : 1);
  const compare = (a, b) =>
    rank(a) - rank(b) ||
    sign * (typeof a === "number" ? a - b : a.localeCompare(b, "en", { numeric: true }));
  return rows.map((row) => [key(row), row]).sort((a, b) => compare(a[0], b[0])).map((p) => p[1]);
}

document.querySelectorAll(".grid").forEach((grid) => {
  const body = grid.querySelector("tbody");
  const heads = [...grid.querySelectorAll(".scroll > table > thead th")];
  const rows = [...body.rows];
  const texts = new Map(rows.map((row) => [row, row.textContent.toLowerCase()]));
  heads.forEach((head, column) =>
    head.querySelector("button").addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      body.append(...sorted(rows, column, down ? -1 : 1));
    }));
  grid.querySelector("input").addEventListener("input", (event) => {
    const words = event.target.value.toLowerCase().split(/\s+/).filter(Boolean);
    let count = 0;
    rows.forEach((row) => {
      row.hidden = !words.every((word) => texts.get(row).includes(word));
      count += !row.hidden;
    });
    grid.querySelector("output").textContent =
      count === rows.length ? `${count} lines` : `${count} of ${rows.length} lines`;
  });
});

// A line of a table is known by its first cells, which name a run or a setting.
const named = (row) => [...row.cells].slice(0, 3).map((cell) => cell.textContent).join("|");

function chosen() {
  const tables = {};
  document.querySelectorAll(".grid").forEach((grid) => {
    const head = grid.querySelector("thead th[aria-sort]");
    tables[grid.id] = {
      words: grid.querySelector("input").value,
      order: head && [head.textContent, head.getAttribute("aria-sort")],
      open: [...grid.querySelectorAll("details[open]")].map((one) => named(one.closest("tr"))),
      y: grid.querySelector(".scroll").scrollTop,
    };
  });
  // The place is told from the section that is at the top, since those above may grow.
  const top = [...document.querySelectorAll("section")].filter(
    (one) => one.getBoundingClientRect().top <= 1).pop();
  const y = top ? -top.getBoundingClientRect().top : window.scrollY;
  const box = document.activeElement.closest(".grid");
  return { views, tables, place: [top ? top.id : "", y], box: box && box.id };
}

function restored() {
  for (const [id, table] of Object.entries(kept.tables || {})) {
    const grid = document.getElementById(id);
    if (!grid) continue;
    const input = grid.querySelector("input");
    input.value = table.words;
    input.dispatchEvent(new Event("input"));
    const [text, order] = table.order || [];
    const head = [...grid.querySelectorAll("thead th")].find((one) => one.textContent === text);
    for (let i = 0; head && i < (order === "descending" ? 2 : 1); i++)
      head.querySelector("button").click();
    grid.querySelectorAll("details").forEach((one) => {
      one.open = table.open.includes(named(one.closest("tr")));
    });
    grid.querySelector(".scroll").scrollTop = table.y;
    if (kept.box === id) input.focus({ preventScroll: true });
  }
  const [id, y] = kept.place || ["", 0];
  const section = document.getElementById(id);
  if (kept.place)
    window.scrollTo(0, y + (section ? section.getBoundingClientRect().top + window.scrollY : 0));
}

// The page asks whether it is still the newest, and loads itself again if not.
if (seconds > 0) {
  history.scrollRestoration = "manual";
  restored();
  const version = document.body.dataset.version;
  setInterval(async () => {
    try {
      const answer = await fetch("version", { cache: "no-store" });
      document.body.classList.remove("lost");
      if (!answer.ok || (await answer.text()) === version) return;
      sessionStorage.setItem(STORE, JSON.stringify(chosen()));
      location.reload();
    } catch {
      document.body.classList.add("lost");
    }
  }, 1000 * seconds);
}
