// The loss of each position: minus the log of the probability that the model gives the next token, in nats.

// The token that each position should predict: the next one; -1 where there is none, or where the model was not trained
// to predict (quiet: { until: token }, before that token; { repeats: true }, before a repetition).
export function targets(model, tokens) {
  const out = new Int32Array(tokens.length).fill(-1);
  const first = firstPredicted(model.quiet, tokens);
  for (let t = first; t + 1 < tokens.length; t++) out[t] = tokens[t + 1];
  return out;
}

function firstPredicted(quiet, tokens) {
  if (!quiet) return 0;
  if (quiet.repeats) return period(tokens);
  const at = tokens.indexOf(quiet.until);
  return at < 0 ? tokens.length : at;
}

// The smallest number of tokens after which they repeat to the end; all of them where they do not.
function period(tokens) {
  for (let p = 1; p < tokens.length; p++) {
    if (tokens.subarray(p).every((token, t) => token === tokens[t])) return p;
  }
  return tokens.length;
}

// The loss of each position [T]; NaN where the target is -1.
export function losses(pass, targets) {
  const T = targets.length, vocab = T ? pass.logits.length / T : 0;
  return Float32Array.from(targets, (target, t) => {
    if (target < 0) return NaN;
    const row = pass.logits.subarray(t * vocab, (t + 1) * vocab);
    return logTotal(row) - row[target];
  });
}

// The log of the sum of exponentials.
export function logTotal(row) {
  let top = -Infinity, total = 0;
  for (const value of row) if (value > top) top = value;
  for (const value of row) total += Math.exp(value - top);
  return top + Math.log(total);
}
