// The backward pass, one step at a time, each with its equation and its picture.
import { bars, element, gradientOf, number, perRow, sub } from "gradfn/core/dom.js";
import { paint, paintTiles, scaleOf } from "gradfn/core/paint.js";
import { makeStepper } from "gradfn/core/stepper.js";
import { probability } from "gradfn/cnn/outputs.js";
import { largest, paintWeights, shrunk } from "gradfn/cnn/pictures.js";

const RADIOS = 12; // classes that are shown as buttons; of more, one is chosen from a list
const CELLS = 256; // rows and columns of a picture of dense weights, at most
const BARS = 40; // values that are drawn as bars; more are pixels

// `isInk` says whether a pixel's value is ink.
// Call `labeled(label)` when another correct label is chosen, `revealed()` when another number of steps is shown.
export function makeBack(find, net, isInk, labeled, revealed) {
  const n = net.convs.length, last = n + net.denses.length;
  let steps = [], now = null;

  const name = find("labels").id;
  const setChecked = net.classes <= RADIOS ? radios() : list();

  function radios() {
    const inputs = Array.from({ length: net.classes }, (_, label) =>
      element("input", { type: "radio", name, value: label, onchange: () => labeled(label) }));
    find("labels").append(element("span", {}, "The correct label is"),
      ...inputs.map((input, label) => element("label", {}, input, element("span", {}, `${label}`))));
    return (label) => (inputs[label].checked = true);
  }

  function list() {
    const options = Array.from({ length: net.classes }, (_, label) => element("option", { value: label }, `${label}`));
    const select = element("select", { id: `${name}-list`, onchange: () => labeled(Number(select.value)) }, ...options);
    find("labels").append(element("label", { for: `${name}-list` }, "The correct label is "), select);
    return (label) => (select.value = label);
  }

  const stepper = makeStepper(find, () => steps.length, draw, revealed);

  // The formula of a step, as HTML, and its explanation.
  function explained({ name, kind, layer: l, dense, values }) {
    const own = gradientOf(name), ofZ = gradientOf(`z${l}`), ofNext = gradientOf(`z${l + 1}`);
    if (kind === "z" && l === last) return [`${own} = P − y`,
      "Probability minus target: y is 1 for the correct label, else 0."];
    if (kind === "z") {
      const formula = `${own} = ${gradientOf(`a${l}`)} ⊙ ${net.activation}′(z${sub(l)})`;
      return [formula, net.activation === "relu"
        ? "Through relu: unchanged where z is positive, 0 elsewhere."
        : `Through the activation: times the slope of ${net.activation}.`];
    }
    const count = values.length.toLocaleString("en");
    if (kind === "W" && dense) {
      const input = l === n + 1 ? `p${sub(n)}` : `a${sub(l - 1)}`;
      return [`${own} = ${ofZ} ${input}ᵀ, &ensp; ${gradientOf(`b${l}`)} = ${ofZ}`,
        `Each of ${count} weights: the gradient of its node times its input. A row for each node${
          net.denses[l - n - 1].nIn > CELLS ? "; of neighboring weights the largest is shown" : ""}.`];
    }
    if (kind === "W") {
      const input = l > 1 ? `p${sub(l - 1)}` : "x";
      return [`${own} = Σ ${ofZ} · ${input}, &ensp; ${gradientOf(`b${l}`)} = Σ ${ofZ}`,
        `A filter is used at every pixel. So each of ${count} weights adds up, over all pixels of the map, their ` +
          "gradient times what the weight saw there."];
    }
    if (kind === "a" && !dense)
      return [`${own} = ${gradientOf(`p${l}`)} at the maximum, else 0`,
        "Back through pooling: the gradient goes to the largest of each 2 × 2 pixels. Equal ones share it."];
    if (kind === "p" && l === n)
      return [`${own} = W${sub(l + 1)}ᵀ ${ofNext}`, "Through the dense weights, and arranged as maps again."];
    if (kind === "p" || kind === "x") {
      const formula = `${own} = Σ W${sub(l + 1)} · ${ofNext}`;
      return [formula, kind === "x"
        ? `To the pixels. Each adds up the gradients of all sums whose window saw it. ${
          isInk ? "More ink on" : "A larger value of"} a red pixel increases the loss, ${isInk ? "on" : "of"} a blue ` +
            `one decreases it.`
        : "Back through the convolution: each pixel adds up the gradients of all sums whose window saw it, times the " +
          "weights."];
    }
    return [`${own} = W${sub(l + 1)}ᵀ ${ofNext}`, "Through the weights: the sum over all nodes that a node feeds."];
  }

  function card(step, i) {
    const title = element("h3");
    title.innerHTML = `${i + 1} &ensp; ${gradientOf(step.name)}`;
    if (i >= stepper.shown()) return element("li", { class: "unknown" }, title);
    const [formula, meaning] = explained(step);
    const equation = element("p", { class: "formula" });
    equation.innerHTML = formula;
    const hint = element("p", { class: "hint" }, `${meaning} Largest magnitude: ${number(largest(step.values))}.`);
    return element("li", {}, title, element("div", { class: "picture" }, picture(step)), equation, hint);
  }

  function picture({ name, kind, layer: l, dense, values }) {
    if (dense && kind !== "W" && values.length <= BARS) return bars(Array.from(values), l === last);
    const canvas = element("canvas", { class: "pixels", role: "img", "aria-label": `Gradient of ${name}` });
    if (dense && kind === "W") {
      // A row for each node.
      const { values: cells, columns } = shrunk(values, net.denses[l - n - 1].nIn, CELLS);
      paint(canvas, cells, columns, scaleOf(cells));
      canvas.classList.add("matrix");
      return canvas;
    }
    const scale = scaleOf(values);
    if (dense) paint(canvas, values, perRow(values.length), scale);
    else if (kind === "W") {
      const { nIn, nOut, window } = net.convs[l - 1];
      if (nIn === 1) tiles(canvas, values, nOut, window, scale);
      else paintWeights(canvas, values, nIn * nOut, window, scale);
    } else {
      const layer = net.convs[Math.max(l - 1, 0)], channels = kind === "x" ? net.channels : layer.nOut;
      tiles(canvas, values, channels, kind === "p" ? layer.width >> 1 : layer.width, scale);
    }
    return canvas;
  }

  function tiles(canvas, values, count, columns, scale) {
    const size = values.length / count;
    const each = Array.from({ length: count }, (_, i) => values.subarray(i * size, (i + 1) * size));
    paintTiles(canvas, each, columns, scale, count <= 3 ? count : Math.ceil(Math.sqrt(2 * count)));
  }

  function draw() {
    find("steps").replaceChildren(...steps.map(card));
    stepper.update();
  }

  return {
    ...stepper,
    show(found, label) {
      now = found;
      steps = now.steps;
      setChecked(label);
      const p = now.probabilities[label];
      const formula = `Loss L = −log P(${label}) = −log ${probability(p)} = <b>${number(now.loss)}</b> `;
      find("loss").innerHTML = `${formula}<dfn data-term="nats">nats</dfn>`;
      draw();
    },
  };
}
