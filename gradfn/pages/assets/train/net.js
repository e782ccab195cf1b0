// A multilayer perceptron on a batch: forward, loss and backward; each value is stored in single precision, as in JAX.
//
// A network is { layers: [{ nIn, nOut, W, b }], activation }, W a Float32Array [nOut * nIn], row after row. Values are
// [n * nOut], one example after the other, with the names that they have in Python: z1 = W1 a0 + b1, a1 =
// activation(z1), ...; a0 is the input x.
import { activations } from "gradfn/core/activations.js";

// Arrays for the values and gradients of batches of up to n examples, made once and used at each step.
export function makeSpace({ layers }, n) {
  const floats = (size) => new Float32Array(size);
  return {
    z: layers.map(({ nOut }) => floats(n * nOut)),
    a: layers.slice(1).map(({ nIn }) => floats(n * nIn)),
    dz: layers.map(({ nOut }) => floats(n * nOut)),
    W: layers.map(({ W }) => floats(W.length)),
    b: layers.map(({ b }) => floats(b.length)),
    // Sums over the examples are in double precision, and are rounded once.
    sums: new Float64Array(Math.max(...layers.map(({ W }) => W.length))),
  };
}

// Compute z and a of n examples x [n * nIn]; return the logits, the last z.
export function forward({ layers, activation }, x, n, space) {
  const { of } = activations[activation];
  layers.forEach(({ nIn, nOut, W, b }, l) => {
    const input = l ? space.a[l - 1] : x, z = space.z[l];
    for (let k = 0; k < n; k++) {
      const from = k * nIn;
      for (let i = 0; i < nOut; i++) {
        const row = i * nIn;
        let sum = b[i];
        for (let j = 0; j < nIn; j++) sum += W[row + j] * input[from + j];
        z[k * nOut + i] = sum;
      }
    }
    if (l < layers.length - 1) for (let i = 0; i < n * nOut; i++) space.a[l][i] = of(z[i]);
  });
  return space.z[layers.length - 1];
}

// The mean cross-entropy of n rows of logits, in nats, and the share of rows whose largest logit is that of the label.
export function lossOf(logits, labels, n, classes) {
  let loss = 0, right = 0;
  for (let k = 0; k < n; k++) {
    const from = k * classes;
    let best = 0;
    for (let i = 1; i < classes; i++) if (logits[from + i] > logits[from + best]) best = i;
    const top = logits[from + best];
    let sum = 0;
    for (let i = 0; i < classes; i++) sum += Math.exp(logits[from + i] - top);
    loss += top - logits[from + labels[k]] + Math.log(sum);
    if (best === labels[k]) right++;
  }
  return { loss: loss / n, accuracy: right / n };
}

// The logit of the second class minus that of the first, for each of n rows of two: its sigmoid is the second's
// probability.
export function margins(logits, n) {
  return Float32Array.from({ length: n }, (_, k) => logits[2 * k + 1] - logits[2 * k]);
}

// After `forward`: the gradients of the mean loss, into dz, W and b of the space.
export function backward({ layers, activation }, x, labels, n, space) {
  const { slope } = activations[activation];
  const last = layers.length - 1;
  softmaxGradient(space.z[last], labels, n, layers[last].nOut, space.dz[last]);
  for (let l = last; l >= 0; l--) {
    const { nIn, nOut, W } = layers[l], dz = space.dz[l];
    ofWeights(dz, l ? space.a[l - 1] : x, n, nIn, nOut, space.sums, space.W[l], space.b[l]);
    if (!l) return;
    const before = space.dz[l - 1], z = space.z[l - 1], a = space.a[l - 1];
    for (let k = 0; k < n; k++) {
      for (let j = 0; j < nIn; j++) {
        let sum = 0;
        for (let i = 0; i < nOut; i++) sum += W[i * nIn + j] * dz[k * nOut + i];
        const at = k * nIn + j;
        before[at] = sum * slope(z[at], a[at]);
      }
    }
  }
}

// Probability minus target, over the number of examples.
function softmaxGradient(logits, labels, n, classes, out) {
  for (let k = 0; k < n; k++) {
    const from = k * classes;
    let top = logits[from], sum = 0;
    for (let i = 1; i < classes; i++) top = Math.max(top, logits[from + i]);
    for (let i = 0; i < classes; i++) sum += Math.exp(logits[from + i] - top);
    for (let i = 0; i < classes; i++) {
      out[from + i] = (Math.exp(logits[from + i] - top) / sum - (i === labels[k] ? 1 : 0)) / n;
    }
  }
}

function ofWeights(dz, input, n, nIn, nOut, sums, dW, db) {
  sums.fill(0, 0, nIn * nOut);
  for (let i = 0; i < nOut; i++) {
    let bias = 0;
    for (let k = 0; k < n; k++) {
      const g = dz[k * nOut + i], row = i * nIn, from = k * nIn;
      bias += g;
      if (g !== 0) for (let j = 0; j < nIn; j++) sums[row + j] += g * input[from + j];
    }
    db[i] = bias;
  }
  for (let i = 0; i < nIn * nOut; i++) dW[i] = sums[i];
}

// The norm of values, in double precision: its square overflows for no float32.
export function norm(values, length = values.length) {
  let sum = 0;
  for (let i = 0; i < length; i++) sum += values[i] * values[i];
  return Math.sqrt(sum);
}

// The first number that is not finite, in the order of computation: { name, layer, value, of: what it is }; null where
// all are.
export function firstNonFinite({ layers }, n, space) {
  const kinds = [
    ...layers.flatMap((each, l) => [
      { name: "W", layer: l, values: each.W, of: "a weight" },
      { name: "b", layer: l, values: each.b, of: "a bias" },
      { name: "z", layer: l, values: space.z[l].subarray(0, n * each.nOut), of: "a weighted sum" },
      ...(l < layers.length - 1
        ? [{ name: "a", layer: l, values: space.a[l].subarray(0, n * each.nOut), of: "an activation" }]
        : []),
    ]),
    ...layers
      .flatMap(({ nOut }, l) => [
        { name: "∂L/∂W", layer: l, values: space.W[l], of: "a weight's gradient" },
        { name: "∂L/∂z", layer: l, values: space.dz[l].subarray(0, n * nOut), of: "a weighted sum's gradient" },
      ])
      .reverse(),
  ];
  for (const { values, ...where } of kinds) {
    const value = values.find((each) => !Number.isFinite(each));
    if (value !== undefined) return { ...where, value };
  }
  return null;
}
