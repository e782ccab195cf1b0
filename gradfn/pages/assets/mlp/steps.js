// The backward pass, one step at a time, each with its equation, its picture and all of its numbers.
import { bars, element, gradientOf, number, perRow, sub } from "gradfn/core/dom.js";
import { paint } from "gradfn/core/paint.js";
import { makeStepper } from "gradfn/core/stepper.js";
import { isClassifier } from "gradfn/mlp/network.js";

const BARS = 40; // values that are bars; more are a picture
const NUMBERS = 2000; // that a table has at most

// Call `revealed()` when more or fewer steps are shown.
export function makeBackward(find, net, revealed) {
  const last = net.layers.length - 1;
  let steps = [];

  const stepper = makeStepper(find, () => steps.length, draw, revealed);

  // The formula of a step, as HTML, and its explanation.
  function explained({ name, kind, layer, values }, first) {
    const l = layer + 1, own = gradientOf(name);
    if (first) {
      const output = `${name[0]}${sub(l)}`;
      if (isClassifier(net)) return [`${own} = softmax(${output}) − y`,
        "Probability minus target: y is 1 for the correct label, else 0."];
      if (net.loss === "regression_loss")
        return [`${own} = (2 / ${values.length}) (${output} − y)`, "Twice the error, averaged over the outputs."];
      return [`${own} = ${output} − y`, "Output minus target."];
    }
    if (kind === "W") {
      const text = `Each weight: the gradient of its node times its input. ${values.length.toLocaleString("en")} ` +
        `weights.`;
      return [`${own} = ${gradientOf(`z${l}`)} ${layer ? `a${sub(layer)}` : "x"}ᵀ<br>${gradientOf(`b${l}`)} = ` +
        `${gradientOf(`z${l}`)}`, text];
    }
    if (kind === "z") return [`${own} = ${gradientOf(`a${l}`)} ⊙ ${net.layers[layer].squash}′(z${sub(l)})`,
      "Through the activation: times its slope."];
    const formula = `${own} = W${sub(l + 1)}ᵀ ${gradientOf(`z${l + 1}`)}`;
    return [formula, kind === "x" ? "To the inputs: increasing a red one increases the loss."
      : "Through the weights: the sum over all nodes that a node feeds."];
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
    return element("li", {}, title, element("div", { class: "view" }, picture(step, largest)), equation, hint,
      numbers(step));
  }

  function picture({ name, kind, layer, values }, largest) {
    if (kind !== "W" && values.length <= BARS) return bars(values, true);
    const canvas = element("canvas", { class: "pixels", role: "img", "aria-label": `Gradient of ${name}, as colors` });
    paint(canvas, values, kind === "W" ? net.layers[layer].nIn : perRow(values.length), largest);
    return canvas;
  }

  // All numbers: a row per node. The table is made when it is opened.
  function numbers({ name, kind, layer, values, bias }) {
    const columns = kind === "W" ? net.layers[layer].nIn : 1, rows = values.length / columns;
    const made = element("details", {}, element("summary", {}, `All ` +
      `${(values.length + (bias ? rows : 0)).toLocaleString("en")} numbers`));
    made.addEventListener("toggle", () => {
      if (!made.open || made.children.length > 1) return;
      const shownRows = Math.max(Math.min(rows, Math.floor(NUMBERS / columns)), 1);
      const table = element("table", { class: "numbers" },
        element("caption", {}, `Gradient of ${name}: a row per ${kind === "x" ? "input" : "node"}${
        bias ? ", a column per input, its bias last" : ""}`));
      for (let i = 0; i < shownRows; i++) {
        const row = Array.from(values.slice(i * columns, (i + 1) * columns));
        if (bias) row.push(bias[i]);
        table.append(element("tr", {}, element("th", { scope: "row" }, `${i}`),
          ...row.map((value) => element("td", {}, number(value)))));
      }
      made.append(element("div", { class: "scroll", tabindex: "0" }, table));
      if (shownRows < rows) made.append(element("p", { class: "hint" },
        `… and ${(rows - shownRows).toLocaleString("en")} rows more.`));
    });
    return made;
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
    last,
    show(now) {
      steps = now.steps;
      draw();
    },
  };
}
