// What the gradients of a pass say: sizes by position and site, and how much each part counts.
import { sitesOf, switches } from "gradfn/gpt/parts.js";
import { siteOf } from "gradfn/gpt/model.js";

// The weights of the positions in the loss: one position, or the mean over all that have a next token.
export function weightsOf(targets, position) {
  const weights = new Float32Array(targets.length);
  if (position !== null) {
    weights[position] = 1;
    return weights;
  }
  const n = targets.reduce((count, target) => count + (target >= 0), 0);
  return weights.map((_, t) => (targets[t] >= 0 ? 1 / n : 0));
}

// The sum of the losses of the positions, times their weights.
export const weighted = (losses, weights) =>
  losses.reduce((sum, loss, t) => (weights[t] ? sum + weights[t] * loss : sum), 0);

// The norm of a value's gradient at each position; of one head, or of all features.
export function norms({ shape, values }, head = null) {
  return perPosition(shape, head, (i) => values[i] * values[i]).map(Math.sqrt);
}

// The sum of gradient times value at each position: the change of the loss per change of the value's factor, in nats.
export function products(gradient, value, head = null) {
  return perPosition(gradient.shape, head, (i) => gradient.values[i] * value.values[i]);
}

function perPosition(shape, head, term) {
  const [n, ...rest] = shape, size = rest.reduce((all, each) => all * each, 1);
  const width = head === null ? size : rest[rest.length - 1], start = head === null ? 0 : head * width;
  return Float64Array.from({ length: n }, (_, t) => {
    let sum = 0;
    for (let k = start; k < start + width; k++) sum += term(t * size + k);
    return sum;
  });
}

const total = (values) => values.reduce((sum, value) => sum + value, 0);

// Each head and each feed-forward layer: the norm of its gradient, and the change of the loss if it is switched off, as
// a first-order estimate: minus gradient times value.
export function shares(model, pass, gradients) {
  const parts = switches(model).flat().filter((part) => part[0] === "h" || part[0] === "m");
  return parts.map((part) => {
    const [{ site, head }] = sitesOf(model, part);
    const gradient = gradients.sites[site];
    const norm = Math.hypot(...norms(gradient, head));
    return { part, site, head, norm, estimate: -total(products(gradient, pass.sites[site], head)) };
  });
}

// The indices of the n largest values that are not zero.
export function largest(values, n) {
  const order = Array.from(values.keys()).filter((i) => values[i] > 0);
  return order.sort((a, b) => values[b] - values[a]).slice(0, n);
}

// The sites of the residual stream from the loss back to the embedding: the steps of the backward pass.
export function steps({ config }) {
  const { n_layers: nLayers, feed } = config, last = nLayers - 1;
  const blocks = Array.from({ length: nLayers }, (_, i) => last - i).flatMap((block) => [
    ...(feed ? [{ kind: "feed", block, site: siteOf(config, block, "residual_mid") }] : []),
    { kind: "attention", block, site: block ? siteOf(config, block - 1, "residual") : "embedded" },
  ]);
  return [
    { kind: "logits", block: null, site: "logits" },
    { kind: "head", block: null, site: "final_norm" },
    { kind: "norm", block: null, site: siteOf(config, last, "residual") },
    ...blocks,
  ];
}
