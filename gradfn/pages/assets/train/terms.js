// The words of the training, with the numbers of now.
import { number } from "gradfn/core/dom.js";
import { define } from "gradfn/core/terms.js";

// `view` has the functions of page.js: state, data, last() and trainer().
export function defineTerms(section, { state, data, last, trainer }) {
  const norms = () => last() && last().norms;
  const ofLayers = (values, format = number) => values.map((value, l) => `layer ${l + 1}: ${format(value)}`).join(", ");
  const batchSize = () => Math.min(state.settings.batch || data.train.n, data.train.n);
  const terms = {
    "hidden layer": {
      meaning: "A row of units between the inputs and the outputs. Without one, the boundary is a straight line.",
    },
    unit: { meaning: "A node of the network: it adds up its weighted inputs and its bias, and applies the " +
      "activation." },
    activation: {
      meaning: "The function that a unit applies to its weighted sum: sigmoid and tanh are flat at both ends, relu " +
        "is 0 below 0, gelu is a smooth relu. Without one, all layers together are a single linear function.",
    },
    optimizer: {
      meaning: "The rule that turns gradients into updates. SGD: update = −rate × gradient. Momentum adds 0.9 of the " +
        "update before. Adam divides a running mean of the gradient by its typical size.",
    },
    Adam: {
      meaning: "An optimizer (Kingma and Ba, 2015). It divides a running mean of each gradient by its typical size. " +
        "So its first update of each parameter is as large as the learning rate, however small the gradient is.",
    },
    "learning rate": {
      meaning: "How far an update goes. Too large: the loss jumps or grows. Too small: it hardly falls.",
      formula: () => `now ${number(state.settings.rate)}`,
    },
    batch: {
      meaning: "The examples of one step. Their mean gradient is used. A small batch is fast and noisy.",
      formula: () => `now ${batchSize()} of ${data.train.n} examples`,
    },
    epoch: {
      meaning: "One pass through all training examples.",
      formula: () => `${Math.floor(data.train.n / batchSize())} steps with batches of ${batchSize()}`,
    },
    "initial weights": {
      meaning: "The weights before the first step are random, with a variance of 1 ÷ the number of inputs of a unit. " +
        "Here they are multiplied by a factor.",
    },
    seed: { meaning: "The number that determines all random numbers. The same seed gives the same training." },
    boundary: { meaning: "Where the network gives both classes a probability of 50 %." },
    "gradient norm": {
      meaning: "The length of the gradient of the loss at a layer's weighted sums, over all examples of the batch: " +
        "the root of the sum of the squares. gf.inspect measures the same.",
      formula: () => norms() && ofLayers(norms()),
    },
    "vanishing gradient": {
      meaning: "The gradient gets smaller layer by layer in the backward pass, so the first layers hardly learn. It " +
        "counts as vanished below a thousandth of the last layer's.",
      formula: () => norms() && `layer 1 ÷ last layer = ${number(norms()[0] / norms()[norms().length - 1])}`,
    },
    "exploding gradient": {
      meaning: "The gradient gets larger layer by layer in the backward pass, to over 1,000 times the last layer's.",
    },
    update: {
      meaning: "What a step adds to the weights. Its length divided by that of the weights says how much a layer " +
        "changes: about 0.001 to 0.1 is usual, above 1 the step is longer than the weights themselves.",
      formula: () => last() && last().ratios && ofLayers(last().ratios),
    },
    "dead unit": {
      meaning: "A relu unit that is 0 for every example of the batch. No gradient passes through it, so it does not " +
        "learn. Counted for batches of at least 8; over 50 % of a layer is a sign of trouble.",
      formula: () => share("dead"),
    },
    "saturated unit": {
      meaning: "A sigmoid or tanh unit at a flat end: its slope is below a tenth of the largest. Counted over units " +
        "and examples; over 50 % of a layer is a sign of trouble.",
      formula: () => share("saturated"),
    },
    overflow: {
      meaning: "A number above 3.4 × 10³⁸ does not fit in single precision: it becomes infinite, and what is " +
        "computed from it soon is NaN, not a number.",
    },
    "test accuracy": {
      meaning: "The share of test examples, which the network never trains on, whose most probable class is correct.",
      formula: () => `${data.test.n.toLocaleString("en")} test examples, step ${trainer().step}`,
    },
  };
  const share = (kind) => {
    const { units } = last() || {};
    const { activation } = state.settings;
    const counted = activation === "relu" ? "dead" : "saturated";
    return units && units.length && counted === kind ? ofLayers(units, (value) => `${(100 * value).toFixed(1)} %`)
      : null;
  };
  define(terms, section);
}
