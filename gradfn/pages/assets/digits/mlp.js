// A multilayer perceptron on plain arrays: forward, loss and backward, in double precision.
//
// A network is { layers: [{ nIn, nOut, W, b, squash }], loss }, W an array [nOut * nIn], row after row.
// Values have the names that they have in Python: z1 = W1 a0 + b1, a1 = squash(z1), ...; a0 is the input x.

import { activations } from "gradfn/core/activations.js";

export function forward(net, x) {
  const z = [], a = [];
  let input = x;
  for (const { nIn, nOut, W, b, squash } of net.layers) {
    const sums = new Float64Array(nOut);
    for (let i = 0; i < nOut; i++) {
      let sum = 0;
      for (let j = 0; j < nIn; j++) sum += W[i * nIn + j] * input[j];
      sums[i] = sum + b[i];
    }
    z.push(sums);
    input = sums.map(activations[squash].of);
    a.push(input);
  }
  return { x, z, a, output: input };
}

export function softmax(z) {
  const top = Math.max(...z);
  const powers = Array.from(z, (value) => Math.exp(value - top));
  const sum = powers.reduce((total, power) => total + power, 0);
  return powers.map((power) => power / sum);
}

// The probability of each label, which the loss compares with the correct one.
export function probabilities(net, pass) {
  return net.loss === "cross-entropy" ? softmax(pass.output) : Array.from(pass.output);
}

export function lossOf(net, pass, label) {
  if (net.loss === "cross-entropy") {
    const top = Math.max(...pass.output);
    const sum = pass.output.reduce((total, value) => total + Math.exp(value - top), 0);
    return top + Math.log(sum) - pass.output[label];
  }
  return pass.output.reduce((total, value, i) => total + 0.5 * (value - (i === label)) ** 2, 0);
}

// The chain rule, step by step from the loss to the input: [{ name, layer, kind, values }].
// kind is "a" (the output of a layer), "z" (its weighted sums), "W" (its weights; with its biases) or "x".
export function backward(net, pass, label) {
  // Both losses have the same derivative: prediction minus target.
  const shares = probabilities(net, pass);
  return backwardFrom(net, pass, Float64Array.from(shares, (share, i) => share - (i === label)));
}

// The same from the derivative of any loss with respect to the output.
export function backwardFrom(net, pass, ofOutput) {
  const steps = [];
  const add = (kind, layer, values, more = {}) => {
    steps.push({ name: kind === "x" ? "x" : `${kind}${layer + 1}`, kind, layer, values, ...more });
  };
  let out = ofOutput;
  for (let l = net.layers.length - 1; l >= 0; l--) {
    const { nIn, nOut, W, squash } = net.layers[l];
    if (squash !== "none") {
      add("a", l, out);
      out = out.map((g, i) => g * activations[squash].slope(pass.z[l][i], pass.a[l][i]));
    }
    add("z", l, out);
    const input = l ? pass.a[l - 1] : pass.x;
    const dW = new Float64Array(nOut * nIn);
    const dInput = new Float64Array(nIn);
    for (let i = 0; i < nOut; i++) {
      for (let j = 0; j < nIn; j++) {
        dW[i * nIn + j] = out[i] * input[j];
        dInput[j] += W[i * nIn + j] * out[i];
      }
    }
    add("W", l, dW, { bias: out });
    out = dInput;
  }
  add("x", -1, out);
  return steps;
}

// The gradients by name.
export function gradients(steps) {
  const found = {};
  for (const { name, kind, layer, values, bias } of steps) {
    found[name] = values;
    if (kind === "W") found[`b${layer + 1}`] = bias;
  }
  return found;
}
