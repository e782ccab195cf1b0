// Random numbers of the page: initial parameters from the distribution of gf.mlp, and the order of the batches.

// Mulberry32, by Tommy Ettinger: numbers from 0 to 1 from a seed of 32 bits.
export function randomFrom(seed) {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let t = state;
    t = Math.imul(t ^ (t >>> 15), t | 1);
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
  };
}

// The standard deviation of a standard normal that is cut off at -2 and 2.
const TRUNCATED = 0.87962566103423978;

function truncatedNormal(random) {
  for (;;) {
    const sample = Math.sqrt(-2 * Math.log(1 - random())) * Math.cos(2 * Math.PI * random());
    if (Math.abs(sample) <= 2) return sample;
  }
}

// Weights from a truncated normal of variance 1 / fan_in, biases zero, as gf.Param draws them (but other numbers).
export function drawn(sizes, seed) {
  const random = randomFrom(seed);
  return sizes.slice(1).map((nOut, l) => {
    const nIn = sizes[l], scale = 1 / Math.sqrt(nIn) / TRUNCATED;
    const W = Float32Array.from({ length: nOut * nIn }, () => scale * truncatedNormal(random));
    return { nIn, nOut, W, b: new Float32Array(nOut) };
  });
}

// The batches of a training as lists of examples: each epoch is shuffled anew (Fisher and Yates), and its last partial
// batch is dropped. A batch of all examples keeps their order.
export function makeOrder(n, seed) {
  let order = null, epoch = -1, at = n;
  const shuffle = () => {
    const random = randomFrom(seed ^ Math.imul(epoch + 1, 0x9e3779b1));
    order = Int32Array.from({ length: n }, (_, i) => i);
    for (let i = n - 1; i > 0; i--) {
      const j = Math.floor(random() * (i + 1));
      [order[i], order[j]] = [order[j], order[i]];
    }
  };
  return (size) => {
    if (size >= n) {
      epoch++;
      at = n;
      return null;
    }
    if (at + size > n) {
      epoch++;
      at = 0;
      shuffle();
    }
    at += size;
    return order.subarray(at - size, at);
  };
}
