// The training: data, parameters, and one step after the other, each with what was measured in it.
import { decodeAll } from "gradfn/core/arrays.js";
import { enlarge } from "gradfn/core/prepare.js";
import { drawn, makeOrder } from "gradfn/train/init.js";
import { backward, firstNonFinite, forward, lossOf, makeSpace, norm } from "gradfn/train/net.js";
import { makeOptimizer } from "gradfn/train/optimizers.js";
import { unitsOf } from "gradfn/train/units.js";

// The data and initial parameters of a run: { sizes, start: layers, train: { x, y, n }, test, small }.
export function build(content) {
  const arrays = decodeAll(content.arrays), { sizes } = content;
  const spline = arrays.spline ? arrays.spline.values : null;
  const part = (name) => {
    const { values, shape } = arrays[`${name}_x`];
    const [n, side] = [shape[0], shape[1]];
    const raw = Float32Array.from(values, (value) => value / content.levels);
    const y = arrays[`${name}_y`].values;
    if (!spline) return { x: raw, y, n };
    const x = new Float32Array(n * sizes[0]);
    for (let k = 0; k < n; k++) x.set(enlarge(raw.subarray(k * side, (k + 1) * side), spline), k * sizes[0]);
    return { x, y, n };
  };
  const start = sizes.slice(1).map((nOut, l) => {
    return { nIn: sizes[l], nOut, W: arrays[`W${l + 1}`].values, b: arrays[`b${l + 1}`].values };
  });
  return { sizes, start, seed: content.seed, train: part("train"), test: part("test") };
}

// The nodes per layer for a depth and a width; those of the run where both are the run's.
export function sizesFor(data, depth, width) {
  const own = data.sizes.slice(1, -1);
  const hidden = own.length === depth && (!depth || own[0] === width) ? own : Array(depth).fill(width);
  return [data.sizes[0], ...hidden, data.sizes[data.sizes.length - 1]];
}

// Whether the initial parameters are the run's own.
export function startsAsRun(data, { depth, width, seed }) {
  return seed === data.seed && String(sizesFor(data, depth, width)) === String(data.sizes);
}

function initial(data, settings) {
  const { depth, width, seed, scale } = settings;
  const layers = startsAsRun(data, settings) ? data.start : drawn(sizesFor(data, depth, width), seed);
  return layers.map(({ nIn, nOut, W, b }) => ({ nIn, nOut, W: W.map((w) => scale * w), b: b.slice() }));
}

// A training: settings are { depth, width, activation, optimizer, rate, batch (0 for all), scale, seed }. Optimizer,
// rate and batch may be changed between two steps.
export function makeTrainer(data, settings) {
  const net = { layers: initial(data, settings), activation: settings.activation };
  const { train, test } = data;
  const nIn = data.sizes[0], classes = data.sizes[data.sizes.length - 1];
  const order = makeOrder(train.n, settings.seed);
  const lengths = net.layers.flatMap(({ W, b }) => [W.length, b.length]);
  let optimizer = { name: settings.optimizer, update: makeOptimizer(settings.optimizer, lengths) };
  let space = null, picked = null, step = 0, examples = 0, fault = null, indices = null;

  // The examples of the next batch.
  function batch() {
    const n = settings.batch && settings.batch < train.n ? settings.batch : train.n;
    indices = order(n);
    if (!space || space.z[0].length !== n * net.layers[0].nOut) {
      space = makeSpace(net, n);
      picked = { x: new Float32Array(n * nIn), y: new Uint8Array(n) };
    }
    if (!indices) return { ...train, n };
    indices.forEach((from, k) => {
      picked.x.set(train.x.subarray(from * nIn, (from + 1) * nIn), k * nIn);
      picked.y[k] = train.y[from];
    });
    return { ...picked, n };
  }

  // One step; what it measured, at the parameters before their update. Where a number is not finite, the parameters
  // stay.
  function advance() {
    if (fault) return null;
    const { x, y, n } = batch();
    const logits = forward(net, x, n, space);
    const { loss } = lossOf(logits, y, n, classes);
    backward(net, x, y, n, space);
    const norms = net.layers.map(({ nOut }, l) => norm(space.dz[l], n * nOut));
    const units = unitsOf(net, n, space);
    const gradients = net.layers.flatMap((_, l) => [space.W[l], space.b[l]]);
    const weightNorms = gradients.map((values) => norm(values));
    const record = { step, loss, norms, units, ratios: null };
    if (![loss, ...norms, ...weightNorms].every(Number.isFinite)) return failed(record, n);
    if (optimizer.name !== settings.optimizer) {
      optimizer = { name: settings.optimizer, update: makeOptimizer(settings.optimizer, lengths) };
    }
    const updates = optimizer.update(gradients, settings.rate);
    record.ratios = net.layers.map(({ W }, l) => norm(updates[2 * l]) / norm(W));
    net.layers.forEach(({ W, b }, l) => [W, b].forEach((values, i) => {
      const update = updates[2 * l + i];
      for (let j = 0; j < values.length; j++) values[j] += update[j];
    }));
    step++;
    examples += n;
    return record;
  }

  function failed(record, n) {
    fault = { step, loss: record.loss, first: firstNonFinite(net, n, space) };
    return { ...record, fault };
  }

  // Loss and accuracy on the test examples.
  let testSpace = null;
  function evaluate() {
    testSpace ??= makeSpace(net, test.n);
    return lossOf(forward(net, test.x, test.n, testSpace), test.y, test.n, classes);
  }

  return {
    net,
    settings,
    advance,
    evaluate,
    get step() {
      return step;
    },
    get epoch() {
      return examples / train.n;
    },
    get fault() {
      return fault;
    },
    // For tests: the examples of the last batch (null for all), and its gradients.
    last: () => ({ indices, W: space.W, b: space.b }),
  };
}
