// What the views show of a state: one forward pass; the backward pass only when a view reads it.
import { backward } from "gradfn/gpt/backward.js";
import { forward } from "gradfn/gpt/forward.js";
import { losses, targets } from "gradfn/gpt/loss.js";
import { names } from "gradfn/gpt/tokenizer.js";

// Compute { pass, targets, losses, loss, names, without, lossesWithout, lossWithout, grads }: `loss` is averaged over the text, NaN
// where nothing is predicted; `without` is the pass without edits; `grads` is null where no token follows.
export function compute(model, state) {
  const { tokens, edits } = state;
  const pass = forward(model, tokens, edits);
  const wanted = targets(model, tokens);
  const own = losses(pass, wanted);
  const now = { pass, targets: wanted, losses: own, loss: mean(own), names: names(model, tokens) };
  later(now, "without", () => (edits.length ? forward(model, tokens) : pass));
  later(now, "lossesWithout", () => (edits.length ? losses(now.without, wanted) : own));
  later(now, "lossWithout", () => mean(now.lossesWithout));
  return withLoss(model, now, state);
}

// Differentiate the loss that the state chooses: of the whole text, or of its position.
export function withLoss(model, now, { position, whole }) {
  later(now, "grads", () => {
    const weights = weightsOf(now.targets, whole ? null : position);
    return weights && backward(model, now.pass, now.targets, weights, { params: false });
  });
  return now;
}

// The weight of each position's loss in the loss that is differentiated: all alike, or one position's only.
function weightsOf(wanted, position) {
  const weights = Float32Array.from(wanted, (target, i) => (target >= 0 && (position === null || i === position) ? 1 : 0));
  const total = weights.reduce((sum, weight) => sum + weight, 0);
  return total ? weights.map((weight) => weight / total) : null;
}

export function mean(own) {
  const known = own.filter((loss) => !Number.isNaN(loss));
  return known.reduce((sum, loss) => sum + loss, 0) / known.length;
}

function later(target, name, make) {
  let found;
  const get = () => (found === undefined ? (found = make()) : found);
  Object.defineProperty(target, name, { get, configurable: true, enumerable: false });
}
