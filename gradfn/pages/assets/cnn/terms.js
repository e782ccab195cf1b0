// The terms of the convolutional network, with the numbers of the filter and the pixel that are open.
import { number, sub } from "gradfn/core/dom.js";
import { probability } from "gradfn/cnn/outputs.js";
import { define } from "gradfn/core/terms.js";

// `page` is that of page.js: { net, state, now(), explained() }.
export function defineTerms(section, { net, state, now, explained }) {
  const own = (kind) => `${kind}${sub(state.layer + 1)}[${state.filter}]`;
  const layer = () => net.convs[state.layer];

  function convolution() {
    const { sum, bias, z } = explained(), [y, x] = state.at, { nIn, window } = layer();
    const n = nIn * window * window;
    return `${own("z")} at row ${y}, column ${x}: ${n} products add up to ${number(sum)}; with the bias ` +
      `${number(bias)} that is z = <b>${
      number(z)}</b>`;
  }

  function activation() {
    const { z, a } = explained();
    return `${net.activation === "relu" ? "a = max(z, 0)" : `a = ${net.activation}(z)`}: z = ${number(z)} gives a = ` +
      `<b>${number(a)}</b>`;
  }

  function pooling() {
    const { height, width } = layer(), row = state.at[0] >> 1, column = state.at[1] >> 1;
    if (row >= height >> 1 || column >= width >> 1) return "The open pixel is in a row or column that is left over, " +
      "which pooling drops.";
    const a = now().pass.values[`a${state.layer + 1}`], start = state.filter * height * width;
    const four = [0, 1].flatMap((dy) => [0, 1].map((dx) => a[start + (2 * row + dy) * width + 2 * column + dx]));
    return `${own("p")} = max(${four.map(number).join(", ")}) = <b>${number(Math.max(...four))}</b>`;
  }

  function loss() {
    const { label } = state;
    return `L = −log P(${label}) = −log ${probability(now().probabilities[label])} = <b>${number(now().loss)}</b> nats`;
  }

  function softmax() {
    const { logits } = now().pass, best = logits.indexOf(Math.max(...logits));
    const total = logits.reduce((sum, z) => sum + Math.exp(z - logits[best]), 0);
    return `P(${best}) = e<sup>z${sub(best)}</sup> / Σ e<sup>z</sup> = <b>${(100 / total).toFixed(1)} %</b>`;
  }

  define({
    convolution: {
      meaning: "A small window of weights slides over the image. At each pixel, the weights are multiplied by the " +
        "pixels under the window; the products and a bias are added up.",
      formula: convolution,
    },
    filter: {
      meaning: "One window of weights with its bias. It gives one map, and looks for the same thing at every pixel.",
      formula: () => {
        const { nIn, window } = layer();
        return `The open one: ${nIn} input${nIn > 1 ? "s" : ""} × ${window} × ${window} = ` +
          `<b>${nIn * window * window}</b> weights and a bias`;
      },
    },
    "feature map": {
      meaning: "What a filter gives: one value for each pixel. It is large where the image under the window looks " +
        "like the weights.",
      formula: () => `The open one: ${layer().height} × ${layer().width} values`,
    },
    channel: {
      meaning: "One of the images or maps that lie over each other in a layer's input, such as the red, green and " +
        "blue parts of a photo. A filter has a window of weights for each.",
      formula: () => `The open filter has <b>${layer().nIn}</b> input channel${layer().nIn > 1 ? "s" : ""}`,
    },
    pooling: {
      meaning: "Keeps the largest of each 2 × 2 pixels. The map has half the height and width, and where exactly " +
        "something is matters less.",
      formula: pooling,
    },
    padding: {
      meaning: "Around the image are zeros, so that the window has something to see at the edges and the map is as " +
        "large as the image.",
      formula: () => {
        const { window } = layer(), low = Math.floor((window - 1) / 2);
        return `A window of ${window}: ${low} zeros above and to the left, ${window - 1 - low} below and to the right`;
      },
    },
    activation: {
      meaning: "A function of each value of a map, such as relu or sigmoid. Without it, several convolutions would " +
        "be one.",
      formula: activation,
    },
    relu: { meaning: "max(z, 0): positive values stay, negative ones become 0. No gradient passes where it is 0.",
      formula: activation },
    logit: {
      meaning: "A score before softmax: any number. The larger it is against the others, the more probable its label.",
      formula: () => {
        const { logits } = now().pass, best = logits.indexOf(Math.max(...logits));
        return `The largest is that of ${best}: <b>${number(logits[best])}</b>`;
      },
    },
    softmax: {
      meaning: "Turns scores into probabilities: e to the power of each score, divided by the sum of these. They are " +
        "positive and add up to 100 %.",
      formula: softmax,
    },
    nats: {
      meaning: "The unit of the loss: −log p, where p is the probability of the correct label. 0 nats is certain and " +
        "right, 0.69 nats are p = 50 %, 2.3 nats are p = 10 %.",
      formula: loss,
    },
    loss: { meaning: "One number that says how wrong the prediction is. Training decreases it.", formula: loss },
    gradient: {
      meaning: "How fast the loss changes if a value increases slightly. Positive (red): the loss increases. " +
        "Negative (blue): it decreases. Training moves each weight and bias against its gradient.",
      formula: () => {
        const { height, width } = layer(), [y, x] = state.at, name = `z${state.layer + 1}`;
        const value = now().gradients[name][(state.filter * height + y) * width + x];
        return `∂L/∂${own("z")} at row ${y}, column ${x}: <b>${number(value)}</b>`;
      },
    },
  }, section);
}
