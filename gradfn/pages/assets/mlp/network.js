// The network of the page, its loss for a label or for a vector of values, and the gradient of that.
import { decodeAll } from "gradfn/core/arrays.js";
import { backwardFrom, forward, softmax } from "gradfn/digits/mlp.js";

// Return { net, x, y }: the network, and examples with their targets. A target is a label, or one value per output.
export function build(content) {
  const arrays = decodeAll(content.arrays);
  const n = Object.keys(arrays).filter((name) => /^W\d+$/.test(name)).length;
  const layers = Array.from({ length: n }, (_, l) => ({
    nIn: arrays[`W${l + 1}`].shape[1],
    nOut: arrays[`W${l + 1}`].shape[0],
    W: Float64Array.from(arrays[`W${l + 1}`].values),
    b: Float64Array.from(arrays[`b${l + 1}`].values),
    squash: (l < n - 1 ? content.activation : content.output) || "none",
  }));
  const net = { layers, loss: content.loss, labels: content.labels };
  const nIn = layers[0].nIn, nOut = layers[n - 1].nOut, { x, y } = arrays;
  const rows = (values, width) =>
    Array.from({ length: x.shape[0] }, (_, i) => Float64Array.from(values.slice(i * width, (i + 1) * width)));
  return { net, x: rows(x.values, nIn), y: net.labels ? Array.from(y.values) : rows(y.values, nOut) };
}

export const isClassifier = (net) => net.loss === "classification_loss";
export const nOutputs = (net) => net.layers[net.layers.length - 1].nOut;

// A target as one value per output: a label is 1 for its own, 0 for the others.
export function vectorOf(net, target) {
  return net.labels ? Float64Array.from({ length: nOutputs(net) }, (_, i) => +(i === target)) : target;
}

export function lossOf(net, output, target) {
  if (isClassifier(net)) {
    const top = Math.max(...output);
    return top + Math.log(output.reduce((sum, value) => sum + Math.exp(value - top), 0)) - output[target];
  }
  const wanted = vectorOf(net, target);
  const squares = output.reduce((sum, value, i) => sum + (value - wanted[i]) ** 2, 0);
  return net.loss === "regression_loss" ? squares / output.length : squares / 2;
}

// The derivative of the loss with respect to each output.
export function errorOf(net, output, target) {
  const wanted = vectorOf(net, target), predicted = isClassifier(net) ? softmax(output) : output;
  const scale = net.loss === "regression_loss" ? 2 / output.length : 1;
  return Float64Array.from(predicted, (value, i) => scale * (value - wanted[i]));
}

// The forward pass, the loss and the backward pass; `shown` is what the outputs stand for: probabilities, or values.
export function compute(net, x, target) {
  const pass = forward(net, x), { output } = pass;
  const steps = backwardFrom(net, pass, errorOf(net, output, target));
  const shown = isClassifier(net) ? softmax(output) : Array.from(output);
  return { pass, shown, loss: lossOf(net, output, target), steps };
}

export function bestOf(values) {
  return values.indexOf(Math.max(...values));
}
