// The terms of a multilayer perceptron, with the numbers of the node that is open.
import { number, sub } from "gradfn/core/dom.js";
import { define } from "gradfn/core/terms.js";
import { isClassifier, vectorOf } from "gradfn/mlp/network.js";

// `open()` returns the numbers of the open node: see `opened` of page.js.
export function defineTerms(section, net, open, now, target) {
  const own = ({ layer, node }) => `${sub(layer + 1)}[${node}]`;

  function weightedSum() {
    const { layer, weights, input, sum } = open();
    const largest = Array.from(weights, (weight, j) => [Math.abs(weight * input[j]), j]).sort((p, q) => q[0] - p[0])
      .slice(0, 2);
    const shown = largest.map(([, j]) => `${number(weights[j])} · ${number(input[j])}`).join(" + ");
    return `w · ${layer ? `a${sub(layer)}` : "x"} = ${shown}${
      weights.length > 2 ? ` + … (${weights.length} terms)` : ""} = <b>${number(sum)}</b>`;
  }

  function loss() {
    if (isClassifier(net)) {
      const p = now().shown[target()];
      return `L = −log p${sub(target())} = −log ${p.toPrecision(3)} = <b>${number(now().loss)}</b> nats`;
    }
    const { output } = now().pass, wanted = vectorOf(net, target());
    const first = `(${number(output[0])} − ${number(wanted[0])})²${output.length > 1 ? " + …" : ""}`;
    return `L = ${net.loss === "regression_loss" ? `${output.length > 1 ? `1/${output.length} ` : ""}` : "½ "}` +
      `(${first}) = <b>${number(now().loss)}</b>`;
  }

  function gradient() {
    const { layer, node, squash, slope, grads } = open();
    if (squash === "none") return `∂L/∂z${own(open())} = <b>${number(grads[`z${layer + 1}`][node])}</b>`;
    return `∂L/∂z${own(open())} = ∂L/∂a · ${squash}′(z) = ${number(grads[`a${layer + 1}`][node])} · ${number(slope)} ` +
      `= <b>${
      number(grads[`z${layer + 1}`][node])}</b>`;
  }

  define({
    "weighted sum": {
      meaning: "Each input of a node times its weight, all added up. Below are the largest terms of the open node.",
      formula: weightedSum,
    },
    bias: {
      meaning: "A number that is learned: a node adds it to its weighted sum.",
      formula: () => `z = ${number(open().sum)} ${open().bias < 0 ? "−" : "+"} ${number(Math.abs(open().bias))} = ` +
        `<b>${number(open().z)}</b>`,
    },
    activation: {
      meaning: "The output of a node: a function such as tanh or relu of its weighted sum plus its bias.",
      formula: () => (open().squash === "none" ? "The open node has no activation: its output is z."
        : `a${own(open())} = ${open().squash}(${
        number(open().z)}) = <b>${number(open().a)}</b>`),
    },
    loss: { meaning: "One number that says how wrong the output is. Training decreases it.", formula: loss },
    gradient: {
      meaning: "How fast the loss changes if a value increases slightly. Positive (red): the loss increases. " +
        "Negative (blue): it decreases. Training moves each weight and bias against its gradient.",
      formula: gradient,
    },
  }, section);
}
