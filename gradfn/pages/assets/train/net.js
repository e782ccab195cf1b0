// A multilayer perceptron on a batch: forward, loss and backward, each value stored in single precision as in JAX.
//
// A network is [{ nIn, nOut, W, b }], W a Float32Array [nOut * nIn], row after row. Values are [n * nOut], an example after
// the other, with the names that they have in Python: z1 = W1 a0 + b1, a1 = squash(z1), ...; a0 is the input x.

const GELU = Math.sqrt(2 / Math.PI);

// The activation of a unit for its weighted sum z, and its slope at z, where the activation is a.
export const squashes = {
  sigmoid: { of: (z) => 1 / (1 + Math.exp(-z)), slope: (z, a) => a * (1 - a) },
  tanh: { of: Math.tanh, slope: (z, a) => 1 - a * a },
  // A NaN stays one, as in JAX.
  relu: { of: (z) => (z <= 0 ? 0 : z), slope: (z) => (z > 0 ? 1 : 0) },
  gelu: {
    of: (z) => 0.5 * z * (1 + Math.tanh(GELU * (z + 0.044715 * z ** 3))),
    slope: (z) => {
      const t = Math.tanh(GELU * (z + 0.044715 * z ** 3));
      return 0.5 * (1 + t) + 0.5 * z * (1 - t * t) * GELU * (1 + 3 * 0.044715 * z * z);
    },
  },
  identity: { of: (z) => z, slope: () => 1 },
};

// Arrays for the values and gradients of batches of up to n examples, made once and used at each step.
export function workspace(layers, n) {
  const of = (size) => new Float32Array(size);
  return {
    z: layers.map(({ nOut }) => of(n * nOut)),
    a: layers.slice(1).map(({ nIn }) => of(n * nIn)),
    dz: layers.map(({ nOut }) => of(n * nOut)),
    W: layers.map(({ W }) => of(W.length)),
    b: layers.map(({ b }) => of(b.length)),
    sums: new Float64Array(Math.max(...layers.map(({ W }) => W.length))),
  };
}

// Fill the values z and a of a workspace for n examples x [n * nIn].
export function forward(layers, squash, x, n, space) {
  const { of } = squashes[squash];
  layers.forEach(({ nIn, nOut, W, b }, l) => {
    const input = l ? space.a[l - 1] : x, z = space.z[l];
    for (let k = 0; k < n; k++) {
      for (let i = 0; i < nOut; i++) {
        const row = i * nIn, from = k * nIn;
        let sum = 0;
        for (let j = 0; j < nIn; j++) sum += W[row + j] * input[from + j];
        z[k * nOut + i] = sum + b[i];
      }
    }
    if (l === layers.length - 1) return;
    const a = space.a[l];
    for (let i = 0; i < n * nOut; i++) a[i] = of(z[i]);
  });
  return space.z[layers.length - 1];
}

// The mean cross-entropy of n rows of logits in nats, and the share of rows whose largest logit is that of their label.
export function lossOf(logits, labels, n) {
  const classes = logits.length ? Math.floor(widthOf(logits, labels, n)) : 0;
  let loss = 0, right = 0;
  for (let k = 0; k < n; k++) {
    const from = k * classes;
    let top = logits[from], best = 0;
    for (let i = 1; i < classes; i++) {
      // Also true for a NaN.
      if (!(logits[from + i] <= top)) [top, best] = [logits[from + i], i];
    }
    let sum = 0;
    for (let i = 0; i < classes; i++) sum += Math.exp(logits[from + i] - top);
    loss += top + Math.log(sum) - logits[from + labels[k]];
    if (best === labels[k]) right++;
  }
  return { loss: loss / n, accuracy: right / n };
}
