// The terms of the digit network, with the numbers of the node that is open.
import { number, percent, sub } from "gradfn/core/dom.js";
import { define } from "gradfn/core/terms.js";
import { gradients } from "gradfn/digits/mlp.js";

const LARGEST = 2; // terms of a weighted sum that are written out
export const SATURATED = 0.1; // of the largest slope: with less, a sigmoid or tanh is called saturated
const steepest = { sigmoid: 0.25, tanh: 1 };

// Whether a node has (almost) no slope: "saturated", "dead" for this image, or "".
export function stateOf(squash, slope) {
  if (squash in steepest) return slope < SATURATED * steepest[squash] ? "saturated" : "";
  return squash === "relu" && slope === 0 ? "off" : "";
}

// `open()` returns the numbers of the open node: see `opened` of page.js.
export function defineTerms(section, net, open, now, label) {
  const entropy = net.loss === "cross-entropy";
  const own = ({ layer, node }) => `${sub(layer + 1)}[${node}]`;

  function weightedSum() {
    const { layer, weights, input, sum } = open();
    const signal = weights.map((weight, j) => [Math.abs(weight * input[j]), j]);
    const top = Array.from(signal, ([, j]) => j).sort((a, b) => signal[b][0] - signal[a][0]).slice(0, LARGEST);
    const shown = top.map((j) => `${number(weights[j])} · ${number(input[j])}`).join(" + ");
    return `w · ${layer ? `a${sub(layer)}` : "x"} = ${shown} + … (${weights.length} terms) = <b>${number(sum)}</b>`;
  }

  function activation() {
    const { squash, z, a } = open(), names = own(open());
    if (squash === "none") return `The open node is an output: z${names} = ${number(z)}, without an activation.`;
    const formulas = { sigmoid: `1 / (1 + e<sup>−z</sup>)`, relu: "max(z, 0)", tanh: "tanh z" };
    return `a${names} = ${formulas[squash] || `${squash}(z)`} = ${squash}(${number(z)}) = <b>${number(a)}</b>`;
  }

  function slope() {
    const { squash, slope } = open();
    return squash === "none" ? "" : `Slope of the open node: ${squash}′(z) = <b>${number(slope)}</b>${
      squash in steepest ? `, of at most ${steepest[squash]}` : ""}`;
  }

  function loss() {
    const l = label(), p = now().probabilities[l];
    if (entropy) return `L = −log p${sub(l)} = −log ${p.toPrecision(3)} = <b>${number(now().loss)}</b> nats`;
    return `L = ½ Σ (a − y)² = <b>${number(now().loss)}</b>`;
  }

  function gradient() {
    const { layer, node, squash, slope } = open(), grads = gradients(now().steps), names = own(open());
    const dz = `∂L/∂z${names} = `;
    if (squash !== "none")
      return `${dz}∂L/∂a · ${squash}′(z) = ${number(grads[`a${layer + 1}`][node])} · ${number(slope)} = <b>${
        number(grads[`z${layer + 1}`][node])}</b>`;
    const p = now().probabilities[node];
    return `${dz}p${sub(node)} − y${sub(node)} = ${p.toPrecision(3)} − ${+(node === label())} = <b>${
      number(grads[`z${layer + 1}`][node])}</b>`;
  }

  function softmax() {
    const { output } = now().pass, best = output.indexOf(Math.max(...output));
    const total = output.reduce((sum, z) => sum + Math.exp(z), 0);
    return `p${sub(best)} = e<sup>z${sub(best)}</sup> / Σ e<sup>z</sup> = ${number(Math.exp(output[best]))} / ` +
      `${number(total)} = <b>${
      percent(now().probabilities[best])}</b>`;
  }

  define({
    "weighted sum": {
      meaning: "Each input of a node times its weight, all added up. Below are the largest terms of the open node.",
      formula: weightedSum,
    },
    bias: {
      meaning: "A number that is learned: a node adds it to its weighted sum.",
      formula: () => `z = ${number(open().sum)} ${open().bias < 0 ? "−" : "+"} ${number(Math.abs(open().bias))} = <b>${
        number(open().z)}</b>`,
    },
    "bias for inactivity": {
      meaning: "A negative bias keeps a node inactive: its weighted sum must be larger than that before it fires.",
      formula: () => `Open node: w · input = ${number(open().sum)}, and it fires over −b = ` +
        `<b>${number(-open().bias)}</b>`,
    },
    activation: {
      meaning: "The output of a node: a function such as sigmoid or relu of its weighted sum plus its bias.",
      formula: activation,
    },
    saturated: {
      meaning: "The node is at the flat end of its activation: its slope is below a tenth of the largest. Almost no " +
        "gradient passes through it, so its weights hardly learn from this image.",
      formula: slope,
    },
    off: {
      meaning: "The weighted sum plus bias is negative, where relu is 0 and flat. No gradient passes through the " +
        "node, so its weights do not learn from this image. A node that is off for every image is called dead.",
      formula: slope,
    },
    loss: { meaning: "One number that says how wrong the prediction is. Training decreases it.", formula: loss },
    nats: {
      meaning: "The unit of the loss: −log p, where p is the probability of the correct label. 0 nats is certain and " +
        "right, 0.69 nats are p = 50 %, 2.3 nats are p = 10 %.",
      formula: loss,
    },
    gradient: {
      meaning: "How fast the loss changes if a value increases slightly. Positive (red): the loss increases. " +
        "Negative (blue): it decreases. Training moves each weight and bias against its gradient.",
      formula: gradient,
    },
    softmax: {
      meaning: "Turns scores into probabilities: e to the power of each score, divided by the sum of these. They are " +
        "positive and add up to 100 %.",
      formula: entropy ? softmax : null,
    },
  }, section);
}
