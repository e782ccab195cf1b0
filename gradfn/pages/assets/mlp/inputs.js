// The inputs: a field and a slider for each; two inputs are also a plane to click on.
import { element, follow, number, sub } from "gradfn/core/dom.js";
import { color } from "gradfn/core/paint.js";
import { forward, softmax } from "gradfn/digits/mlp.js";
import { isClassifier } from "gradfn/mlp/network.js";

export const SHOWN = 32; // inputs that have a field
const REACH = 3; // of a slider to both sides of 0, where no examples say more
const PRODUCTS = 3_000_000; // of a picture of the plane: some milliseconds

// The range of each input: that of the examples, and a tenth more on both sides.
export function rangesOf(examples, nIn) {
  return Array.from({ length: nIn }, (_, j) => {
    const values = examples.map((x) => x[j]);
    const low = Math.min(...values), high = Math.max(...values), more = 0.1 * (high - low);
    return examples.length && high > low ? [low - more, high + more] : [-REACH, REACH];
  });
}

// Call `moved(j, value)` when one input changes, `placed(x)` when a point of the plane is chosen.
export function makeInputs(find, net, examples, targets, moved, placed) {
  const nIn = net.layers[0].nIn, ranges = rangesOf(examples, nIn);
  const rows = Array.from({ length: Math.min(nIn, SHOWN) }, (_, j) => {
    const name = `Input ${j}`, [low, high] = ranges[j];
    const slider = element("input", { type: "range", min: low, max: high, step: "any",
      "aria-label": `${name}, slider` });
    const field = element("input", { type: "number", step: "any", "aria-label": name });
    slider.addEventListener("input", () => moved(j, Number(Number(slider.value).toPrecision(4))));
    field.addEventListener("input", () => field.value !== "" && Number.isFinite(field.valueAsNumber)
      && moved(j, field.valueAsNumber));
    const label = element("span");
    label.innerHTML = `x${sub(j)}`;
    find("inputs").append(element("p", { class: "input-row" }, label, slider, field));
    return { slider, field };
  });
  const plane = nIn === 2 ? makePlane(find, net, examples, targets, ranges, placed) : null;

  return {
    ranges,
    repaint: () => plane && plane.paint(),
    show(x, output) {
      rows.forEach(({ slider, field }, j) => {
        slider.value = x[j];
        if (document.activeElement !== field) field.value = Number(x[j].toPrecision(6));
      });
      if (plane) plane.show(x, output);
    },
  };
}

// The plane of two inputs, colored by an output.
function makePlane(find, net, examples, targets, ranges, placed) {
  const canvas = find("plane"), context = canvas.getContext("2d"), side = canvas.width;
  const grid = document.createElement("canvas"), [[left, right], [bottom, top]] = ranges;
  const products = net.layers.reduce((sum, { nIn, nOut }) => sum + nIn * nOut, 0);
  const cells = Math.round(Math.min(Math.max(Math.sqrt(PRODUCTS / products), 12), 64));
  let values = null, largest = 1, output = -1, point = [0, 0];
  grid.width = grid.height = cells;

  const toPlane = ([u, v]) => [left + u * (right - left), top - v * (top - bottom)];
  const toCanvas = ([x, y]) => [(side * (x - left)) / (right - left), (side * (top - y)) / (top - bottom)];
  const at = (place) => placed(toPlane(place.map((share) => Math.min(Math.max(share, 0), 1)))
    .map((value) => Number(value.toPrecision(4))));
  follow(canvas, at, at);

  // The output at the middle of each cell: its probability from -1 (none) to 1, or its value.
  function compute() {
    values = new Float64Array(cells * cells);
    for (let i = 0; i < cells * cells; i++) {
      const place = toPlane([((i % cells) + 0.5) / cells, (Math.floor(i / cells) + 0.5) / cells]);
      const found = forward(net, Float64Array.from(place)).output;
      values[i] = isClassifier(net) ? 2 * softmax(found)[output] - 1 : found[output];
    }
    largest = isClassifier(net) ? 1 : values.reduce((most, value) => Math.max(most, Math.abs(value)), 0) || 1;
    const filled = net.labels ? `, filled where the label is ${output}` : "";
    const dots = examples.length ? ` Dots: examples${filled}.` : "";
    find("plane-legend").textContent = isClassifier(net)
      ? `Red: output ${output} has more than 50 %. Blue: less.${dots}`
      : `Output ${output}. Red: positive, blue: negative; the strongest color is ±${number(largest)}.${dots}`;
  }

  function paint() {
    const [zero, more, less] = ["zero", "more", "less"].map(color), ofGrid = grid.getContext("2d");
    const image = ofGrid.createImageData(cells, cells);
    values.forEach((value, i) => {
      const end = value < 0 ? less : more, share = 0.75 * Math.min(Math.abs(value) / largest, 1);
      for (let k = 0; k < 3; k++) image.data[4 * i + k] = zero[k] + share * (end[k] - zero[k]);
      image.data[4 * i + 3] = 255;
    });
    ofGrid.putImageData(image, 0, 0);
    context.drawImage(grid, 0, 0, side, side);
    const [ink, paper] = ["ink", "page"].map((name) => `rgb(${color(name).join(" ")})`);
    examples.forEach((x, i) => dot(toCanvas(x), 4, net.labels && targets[i] === output ? ink : paper, ink));
    const [x, y] = toCanvas(point);
    context.strokeStyle = ink;
    context.lineWidth = 2;
    context.beginPath();
    context.moveTo(x, 0);
    context.lineTo(x, side);
    context.moveTo(0, y);
    context.lineTo(side, y);
    context.stroke();
    dot([x, y], 9, ink, paper);
  }

  function dot([x, y], radius, fill, edge) {
    Object.assign(context, { fillStyle: fill, strokeStyle: edge, lineWidth: 2 });
    context.beginPath();
    context.arc(x, y, radius, 0, 2 * Math.PI);
    context.fill();
    context.stroke();
  }

  return {
    paint: () => values && paint(),
    show(x, wanted) {
      point = [x[0], x[1]];
      if (output !== wanted) {
        output = wanted;
        compute();
      }
      paint();
    },
  };
}
