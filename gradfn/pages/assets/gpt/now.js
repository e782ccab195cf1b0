// What the views show of a state: one forward pass.
import { forward } from "gradfn/gpt/forward.js";
import { losses, targets } from "gradfn/gpt/loss.js";
import { applicable } from "gradfn/gpt/parts.js";
import { names } from "gradfn/gpt/tokenizer.js";

// Compute { pass, targets, losses, loss, names, without, lossesWithout, lossWithout }: `loss` is averaged over the
// text, NaN where nothing is predicted; `without` is the pass without edits, computed only when a view reads it.
export function compute(model, { tokens, edits }) {
  const applied = applicable(edits, tokens.length);
  const pass = applied.length ? forward(model, tokens, applied) : unedited(model, tokens);
  const wanted = targets(model, tokens);
  const own = losses(pass, wanted);
  const now = { pass, targets: wanted, losses: own, loss: mean(own), names: names(model, tokens) };
  later(now, "without", () => unedited(model, tokens));
  later(now, "lossesWithout", () => (applied.length ? losses(now.without, wanted) : own));
  later(now, "lossWithout", () => mean(now.lossesWithout));
  return now;
}

// The pass without edits; the last one is kept, as a slider of an edit changes only the edits.
const kept = new WeakMap(); // by model: { tokens, params, pass }
function unedited(model, tokens) {
  const last = kept.get(model);
  if (last && last.tokens === tokens && last.params === model.params) return last.pass;
  const pass = forward(model, tokens);
  kept.set(model, { tokens, params: model.params, pass });
  return pass;
}

export function mean(own) {
  const known = own.filter((loss) => !Number.isNaN(loss));
  return known.reduce((sum, loss) => sum + loss, 0) / known.length;
}

function later(target, name, make) {
  let found;
  Object.defineProperty(target, name, { get: () => (found === undefined ? (found = make()) : found),
    enumerable: false });
}
