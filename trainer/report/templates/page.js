"use strict";
// Values at the pointer, and samples by step. Everything is in the page: nothing is fetched but pictures beside it.

const data = JSON.parse(document.getElementById("page-data").textContent);
const say = (number) => Math.abs(number) >= 1000 ? Math.round(number).toLocaleString("en-US")
  : String(Number(number.toPrecision(4)));

// --- charts: a line at the pointer in each chart that has the same axis, and the nearest values in its legend

const plots = [...document.querySelectorAll(".plot[data-chart]")].map((element) => {
  const cross = element.appendChild(document.createElement("div"));
  cross.className = "cross";
  cross.hidden = true;
  const head = element.closest(".chart");
  return { element, cross, chart: data.charts[element.dataset.chart], at: head.querySelector(".at"),
    values: [...head.querySelectorAll(".key b")], x: null };
});

// The place in ascending numbers that is nearest to x.
function nearest(numbers, x) {
  let low = 0, high = numbers.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (numbers[middle] < x) low = middle + 1; else high = middle;
  }
  return low > 0 && x - numbers[low - 1] < numbers[low] - x ? low - 1 : low;
}

function epochAt(epochs, x) {
  const place = epochs.findIndex(([start]) => start >= x);
  if (place < 0) return epochs[epochs.length - 1][1];
  if (place === 0) return epochs[0][1];
  const [[x0, e0], [x1, e1]] = [epochs[place - 1], epochs[place]];
  return e0 + (e1 - e0) * (x - x0) / (x1 - x0);
}

function valueAt(series, place) {
  if (series.y[place] === null) return "none";
  const range = series.low && series.low[place] !== series.high[place]
    ? ` (${say(series.low[place])} to ${say(series.high[place])})` : "";
  return say(series.y[place]) + range;
}

function showAt(x, name) {
  for (const plot of plots.filter((one) => one.chart.name === name && one.chart.series.length)) {
    const { chart } = plot;
    const [first] = chart.series;
    const found = first.x[nearest(first.x, x)];
    plot.x = found;
    plot.cross.hidden = false;
    plot.cross.style.left = `${100 * (found - chart.low) / (chart.high - chart.low)}%`;
    const epoch = chart.epochs.length ? `, epoch ${epochAt(chart.epochs, found).toFixed(2)}` : "";
    plot.at.textContent = `${chart.name} ${found.toLocaleString("en-US")}${epoch}`;
    chart.series.forEach((series, number) => {
      plot.values[number].textContent = valueAt(series, nearest(series.x, x));
    });
  }
}

for (const plot of plots) {
  const point = (event) => {
    const box = plot.element.getBoundingClientRect();
    const share = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
    showAt(plot.chart.low + share * (plot.chart.high - plot.chart.low), plot.chart.name);
  };
  plot.element.addEventListener("pointermove", point);
  plot.element.addEventListener("pointerdown", point);
  plot.element.addEventListener("keydown", (event) => {
    const way = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!way || !plot.chart.series.length) return;
    const { x } = plot.chart.series[0];
    const place = plot.x === null ? x.length - 1 : nearest(x, plot.x) + way;
    showAt(x[Math.min(x.length - 1, Math.max(0, place))], plot.chart.name);
    event.preventDefault();
  });
}

// --- samples: one slider for all prompts; each shows the newest picture of its own up to that step

const slider = document.getElementById("step");

function showSample(figure, step) {
  const shelf = data.shelves[figure.dataset.shelf];
  let place = -1;
  shelf.steps.forEach((own, number) => {
    if (own <= step && shelf.layouts[shelf.layout[number]][figure.dataset.drawing]) place = number;
  });
  const [cell, image, words] = ["a", "img", "figcaption"].map((name) => figure.querySelector(name));
  cell.hidden = place < 0;
  words.textContent = place < 0 ? "not drawn yet" : `step ${shelf.steps[place].toLocaleString("en-US")}`;
  if (place < 0) return;
  const [width, height, left, top, zoom] = shelf.layouts[shelf.layout[place]][figure.dataset.drawing];
  cell.style.aspectRatio = `${width} / ${height}`;
  Object.assign(image.style, { left: `${left}%`, top: `${top}%`, width: `${zoom}%` });
  image.alt = words.textContent;
  cell.href = image.src = shelf.prefix + shelf.names[place];
}

if (slider) {
  const figures = [...document.querySelectorAll("figure.chosen")];
  slider.addEventListener("input", () => {
    const step = data.steps[slider.value];
    document.getElementById("at").value = step.toLocaleString("en-US");
    figures.forEach((figure) => showSample(figure, step));
  });
  slider.value = slider.max;  // a browser may have kept another place when the page was loaded anew
}

// --- how old the page is: a run that was killed cannot say so

for (const time of document.querySelectorAll("time[data-seconds]")) {
  const minutes = Math.floor((Date.now() / 1000 - time.dataset.seconds) / 60);
  if (time.dataset.state !== "running" || minutes < 1) continue;
  const said = minutes < 120 ? `${minutes} min` : `${Math.floor(minutes / 60)} h`;
  document.getElementById("age").textContent = ` (${said} ago${minutes >= 60 ? ": perhaps the run is gone" : ""})`;
}
