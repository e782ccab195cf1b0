// The distribution of the next token, and a token of it.
import { logTotal } from "gradfn/gpt/loss.js";

// The probabilities of a row of logits. A temperature below 1 makes the likely likelier, 0 leaves only the likeliest;
// topK keeps the topK likeliest tokens. As in gf.generate, ties go to the smaller token.
export function distribution(logits, { temperature = 1, topK = null } = {}) {
  const out = new Float32Array(logits.length);
  const order = Array.from(logits.keys()).sort((i, j) => logits[j] - logits[i] || i - j);
  if (temperature === 0) {
    if (order.length) out[order[0]] = 1;
    return out;
  }
  const chosen = topK ? order.slice(0, topK) : order;
  const scaled = Float64Array.from(chosen, (i) => logits[i] / temperature), total = logTotal(scaled);
  chosen.forEach((i, rank) => (out[i] = Math.exp(scaled[rank] - total)));
  return out;
}

// The token at which the sum of the probabilities passes u, a random number in [0, 1).
export function sample(probabilities, u) {
  let sum = 0, last = 0;
  for (let token = 0; token < probabilities.length; token++) {
    if (!probabilities[token]) continue;
    sum += probabilities[token];
    last = token;
    if (u < sum) return token;
  }
  return last; // the sum of all may be a little below 1
}
