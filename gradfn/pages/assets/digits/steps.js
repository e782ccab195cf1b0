// The backward pass, one step at a time, each with its equation and its picture.
import { bars, element, gradientOf, number, perRow, sub } from "gradfn/core/dom.js";
import { PIXELS } from "gradfn/digits/network.js";
import { paint, paintTiles } from "gradfn/core/paint.js";
import { makeStepper } from "gradfn/core/stepper.js";

// Call `chosen(label)` when another correct label is chosen, `revealed()` when more or fewer steps are shown.
export function makeSteps(find, net, chosen, revealed) {
  const last = net.layers.length - 1;
  const entropy = net.loss === "cross-entropy";
  let steps = [];

  const labels = Array.from({ length: net.layers[last].nOut }, (_, label) => {
    const name = find("labels").id;
    const input = element("input", { type: "radio", name, value: label, onchange: () => chosen(label) });
    find("labels").append(element("label", {}, input, element("span", {}, `${label}`)));
    return input;
  });

  const stepper = makeStepper(find, () => steps.length, draw, revealed);

  // The formula of a step, as HTML, and its explanation.
  function explained({ name, kind, layer, values }, first) {
    const l = layer + 1;
    const own = gradientOf(name), ofSums = gradientOf(`z${l}`), ofNext = gradientOf(`z${l + 1}`);
    if (first) {
      const predicted = entropy ? `softmax(${name[0]}${sub(l)})` : `a${sub(l)}`;
      return [`${own} = ${predicted} − y`, "Prediction minus target (y is 1 for the correct label, else 0)."];
    }
    if (kind === "W") {
      const count = values.length.toLocaleString("en");
      const input = layer ? `a${sub(layer)}` : "x";
      const text = `Each weight: the gradient of its node times its input. ${count} weights.`;
      return [`${own} = ${ofSums} ${input}ᵀ<br>${gradientOf(`b${l}`)} = ${ofSums}`, text];
    }
    if (kind === "z") {
      const formula = `${own} = ${gradientOf(`a${l}`)} ⊙ ${net.layers[layer].squash}′(z${sub(l)})`;
      return [formula, "Through the activation: times its slope."];
    }
    const formula = `${own} = W${sub(l + 1)}ᵀ ${ofNext}`;
    const toPixels = "To the pixels: darkening a red pixel increases the loss, darkening a blue one decreases it.";
    const toNodes = "Through the weights: the sum over all nodes that a node feeds.";
    return [formula, kind === "x" ? toPixels : toNodes];
  }

  function card(step, i) {
    const title = element("h3");
    title.innerHTML = `${i + 1} &ensp; ${gradientOf(step.name)}`;
    if (i >= stepper.shown()) return element("li", { class: "unknown" }, title);
    const largest = step.values.reduce((top, value) => Math.max(top, Math.abs(value)), 0);
    const [formula, meaning] = explained(step, i === 0);
    const equation = element("p", { class: "formula" });
    equation.innerHTML = formula;
    const hint = element("p", { class: "hint" }, `${meaning} Largest magnitude: ${number(largest)}.`);
    return element("li", {}, title, element("div", { class: "view" }, picture(step, largest)), equation, hint);
  }

  function picture({ name, kind, layer, values }, largest) {
    if (layer === last && kind !== "W") return bars(values, true);
    const canvas = element("canvas", { class: "pixels", role: "img", "aria-label": `Gradient of ${name}` });
    if (kind === "x") paint(canvas, values, PIXELS, largest);
    else if (kind === "W") {
      // A tile for each node: its weights, arranged like the pixels or nodes of its input.
      const { nIn, nOut } = net.layers[layer];
      const rows = Array.from({ length: nOut }, (_, i) => values.subarray(nIn * i, nIn * (i + 1)));
      paintTiles(canvas, rows, layer ? perRow(nIn) : PIXELS, largest, perRow(nOut), layer ? 1 : 2);
    } else paint(canvas, values, perRow(values.length), largest);
    return canvas;
  }

  function draw() {
    find("steps").replaceChildren(...steps.map(card));
    stepper.update();
  }

  return {
    ...stepper,
    reveal(n) {
      stepper.reveal(n);
      revealed();
    },
    show(now, label) {
      steps = now.steps;
      labels[label].checked = true;
      const formula = entropy ? `−log p${sub(label)}` : `½ Σ (a${sub(last + 1)} − y)²`;
      find("loss").innerHTML = `${formula} = <b>${number(now.loss)}</b>`;
      find("loss-unit").hidden = !entropy;
      draw();
    },
  };
}
