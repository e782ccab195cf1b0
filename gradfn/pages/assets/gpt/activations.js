// Activations of hidden nodes, by their names in gf.layers.activations, and softmax over rows.
import { activations } from "gradfn/core/activations.js";

// The activations of z [T, n]. Softmax, which is over all hidden nodes of a position, is the only one that is not a
// function of one number.
export function activate(name, z, n) {
  if (name !== "softmax") return z.map(activations[name].of);
  const out = new Float32Array(z.length);
  for (let at = 0; at < z.length; at += n) softmaxRow(z, out, at, at + n);
  return out;
}

// The gradient at z, from the gradient at the activations.
export function activationBack(name, z, gradient, n) {
  if (name !== "softmax") {
    const { of, slope } = activations[name];
    return gradient.map((g, i) => g * slope(z[i], of(z[i])));
  }
  return softmaxBack(activate(name, z, n), gradient, n);
}

// Write the softmax of z[from .. to) to the same places of out.
export function softmaxRow(z, out, from, to) {
  let top = -Infinity, total = 0;
  for (let i = from; i < to; i++) if (z[i] > top) top = z[i];
  for (let i = from; i < to; i++) total += out[i] = Math.exp(z[i] - top);
  for (let i = from; i < to; i++) out[i] /= total;
}

// The gradient at the scores of softmaxes over rows of n, from their probabilities and the gradient there.
export function softmaxBack(probabilities, gradient, n) {
  const out = new Float32Array(gradient.length);
  for (let at = 0; at < out.length; at += n) {
    let mean = 0;
    for (let i = at; i < at + n; i++) mean += probabilities[i] * gradient[i];
    for (let i = at; i < at + n; i++) out[i] = probabilities[i] * (gradient[i] - mean);
  }
  return out;
}
