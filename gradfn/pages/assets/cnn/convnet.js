// A convolutional network on plain arrays: forward, loss and backward; sums are in double precision.
//
// Values have the names and the order of computation that they have in Python: z1 (convolution), a1 (activation), p1
// (pooling), ..., then the dense layers' z3, a3, z4. Images and maps lie channel after channel, [channels, height,
// width], so that a map is one piece of its array; in Python the channels are last. The first dense layer reads them in
// Python's order.
import { activations } from "gradfn/core/activations.js";
import { decodeAll } from "gradfn/core/arrays.js";

// Return the network that the page contains, and all its arrays.
export function build(content) {
  const arrays = decodeAll(content.arrays);
  const [height, width, channels] = content.image;
  const count = (kind) => Object.keys(arrays).filter((name) => name.startsWith(kind) && name.endsWith("/W")).length;
  const convs = Array.from({ length: count("conv") }, (_, l) => {
    const { shape, values: W } = arrays[`conv${l + 1}/W`];
    const [nOut, nIn, window] = shape;
    const b = arrays[`conv${l + 1}/b`].values;
    return { nIn, nOut, window, W, b, height: height >> l, width: width >> l };
  });
  const denses = Array.from({ length: count("dense") }, (_, l) => {
    const { shape, values: W } = arrays[`dense${l + 1}/W`];
    return { nIn: shape[1], nOut: shape[0], W, b: arrays[`dense${l + 1}/b`].values };
  });
  const { activation } = content;
  const net = { height, width, channels, activation, convs, denses, classes: denses[denses.length - 1].nOut };
  return { net, arrays };
}

// Where the window at each place of the output reads: rows or columns from `first` to `end` of the output, for a shift
// of `offset` pixels. Images are padded with zeros, so that the output is as large as the input.
const span = (offset, length) => [Math.max(0, -offset), Math.min(length, length - offset)];
// The pixels of the window above and to the left of its place; a window of even size has one more below and to the
// right.
export const before = (window) => Math.floor((window - 1) / 2);

// Call act(w, o, i, offset, ranges) for each weight: W[w] takes channel i of the input, shifted by (dy, dx), to channel
// o.
function eachWeight({ nIn, nOut, window, height, width }, act) {
  const low = before(window);
  let w = 0;
  for (let o = 0; o < nOut; o++)
    for (let i = 0; i < nIn; i++)
      for (let ky = 0; ky < window; ky++)
        for (let kx = 0; kx < window; kx++, w++) {
          const [top, bottom] = span(ky - low, height), [left, right] = span(kx - low, width);
          act(w, o, i, (ky - low) * width + kx - low, top, bottom, left, right);
        }
}

function convolve(layer, x) {
  const { nOut, W, b, height, width } = layer;
  const area = height * width;
  const z = new Float64Array(nOut * area);
  for (let o = 0; o < nOut; o++) z.fill(b[o], o * area, (o + 1) * area);
  eachWeight(layer, (w, o, i, offset, top, bottom, left, right) => {
    const weight = W[w];
    for (let y = top; y < bottom; y++) {
      const out = o * area + y * width, from = i * area + y * width + offset;
      for (let k = left; k < right; k++) z[out + k] += weight * x[from + k];
    }
  });
  return z;
}

// The gradients at the weights, the biases and the input of a convolution.
function convolveBack(layer, x, dz) {
  const { nOut, W, height, width } = layer;
  const area = height * width;
  const dx = new Float64Array(x.length), dW = new Float64Array(W.length);
  eachWeight(layer, (w, o, i, offset, top, bottom, left, right) => {
    const weight = W[w];
    let sum = 0;
    for (let y = top; y < bottom; y++) {
      const out = o * area + y * width, from = i * area + y * width + offset;
      for (let k = left; k < right; k++) {
        const g = dz[out + k];
        sum += g * x[from + k];
        dx[from + k] += weight * g;
      }
    }
    dW[w] = sum;
  });
  const db = Float64Array.from({ length: nOut }, (_, o) => total(dz.subarray(o * area, (o + 1) * area)));
  return { dW, db, dx };
}

const total = (values) => values.reduce((sum, value) => sum + value, 0);

// The places in a map that each pixel of its pooled map takes the maximum of.
function* pools({ nOut, height, width }) {
  const high = height >> 1, wide = width >> 1;
  for (let o = 0, at = 0; o < nOut; o++)
    for (let y = 0; y < high; y++)
      for (let x = 0; x < wide; x++, at++) {
        const corner = (o * height + 2 * y) * width + 2 * x;
        yield [at, corner, corner + 1, corner + width, corner + width + 1];
      }
}

function pool(layer, a) {
  const p = new Float32Array(layer.nOut * (layer.height >> 1) * (layer.width >> 1));
  for (const [at, i, j, k, l] of pools(layer)) p[at] = Math.max(a[i], a[j], a[k], a[l]);
  return p;
}

// The gradient goes to the maximum of each window; equal maxima share it, as in JAX.
function poolBack(layer, a, p, dp) {
  const da = new Float64Array(a.length);
  for (const [at, ...places] of pools(layer)) {
    const largest = places.filter((place) => a[place] === p[at]);
    for (const place of largest) da[place] = dp[at] / largest.length;
  }
  return da;
}

// From [channels, area] to [area, channels], as the dense layer has its inputs; and back.
export const channelsLast = (values, channels) => transposed(values, channels, values.length / channels);
export const channelsFirst = (values, channels) => transposed(values, values.length / channels, channels);

function transposed(values, rows, columns) {
  const found = new Float64Array(values.length);
  for (let i = 0; i < rows; i++) for (let j = 0; j < columns; j++) found[j * rows + i] = values[i * columns + j];
  return found;
}

function multiply({ nIn, nOut, W, b }, x) {
  const z = new Float64Array(nOut);
  for (let i = 0; i < nOut; i++) {
    let sum = b[i];
    for (let j = 0; j < nIn; j++) sum += W[i * nIn + j] * x[j];
    z[i] = sum;
  }
  return z;
}

function multiplyBack({ nIn, nOut, W }, x, dz) {
  const dW = new Float64Array(nOut * nIn), dx = new Float64Array(nIn);
  for (let i = 0; i < nOut; i++) {
    const g = dz[i], row = i * nIn;
    for (let j = 0; j < nIn; j++) {
      dW[row + j] = g * x[j];
      dx[j] += W[row + j] * g;
    }
  }
  return { dW, db: dz, dx };
}

// The forward pass. `off` are filters that are switched off, as "layer.filter" from 0: their activation is 0
// everywhere. Returns the values by name; and `flat`, the input of the first dense layer.
export function forward(net, x, off = new Set()) {
  const squash = activations[net.activation].of, values = { x };
  net.convs.forEach((layer, l) => {
    // Maps are in single precision, as in JAX: which pixels are equal decides which of them pooling takes.
    const z = Float32Array.from(convolve(layer, l ? values[`p${l}`] : x));
    const a = z.map(squash), area = layer.height * layer.width;
    for (let o = 0; o < layer.nOut; o++) if (off.has(`${l}.${o}`)) a.fill(0, o * area, (o + 1) * area);
    Object.assign(values, { [`z${l + 1}`]: z, [`a${l + 1}`]: a, [`p${l + 1}`]: pool(layer, a) });
  });
  const n = net.convs.length;
  const flat = channelsLast(values[`p${n}`], net.convs[n - 1].nOut);
  net.denses.forEach((layer, l) => {
    const z = multiply(layer, l ? values[`a${n + l}`] : flat);
    values[`z${n + l + 1}`] = z;
    if (l + 1 < net.denses.length) values[`a${n + l + 1}`] = z.map(squash);
  });
  const logits = values[`z${n + net.denses.length}`];
  return { values, flat, logits, off };
}

export function softmax(logits) {
  const top = logits.reduce((a, b) => Math.max(a, b));
  const powers = logits.map((value) => Math.exp(value - top));
  const sum = total(powers);
  return powers.map((power) => power / sum);
}

// The cross-entropy, in nats.
export function lossOf(logits, label) {
  const top = logits.reduce((a, b) => Math.max(a, b));
  return top + Math.log(total(logits.map((value) => Math.exp(value - top)))) - logits[label];
}

// The chain rule, step by step from the loss to the pixels: [{ name, kind, layer, dense, values, bias }].
// kind is "z", "W" (weights; `bias` has those of the biases), "a", "p" (pooled) or "x"; layers count from 1.
export function backward(net, pass, label) {
  const { values, flat, off } = pass, slope = activations[net.activation].slope, n = net.convs.length;
  const steps = [];
  const add = (kind, layer, found, more = {}) =>
    steps.push({ name: kind === "x" ? "x" : `${kind}${layer}`, kind, layer, dense: layer > n, values: found, ...more });

  const through = (da, l) => da.map((g, i) => g * slope(values[`z${l}`][i], values[`a${l}`][i]));
  let out = softmax(pass.logits).map((share, i) => share - (i === label));
  for (let l = n + net.denses.length; l > n; l--) {
    const layer = net.denses[l - n - 1];
    if (layer !== net.denses[net.denses.length - 1]) {
      add("a", l, out);
      out = through(out, l);
    }
    add("z", l, out);
    const { dW, db, dx } = multiplyBack(layer, l === n + 1 ? flat : values[`a${l - 1}`], out);
    add("W", l, dW, { bias: db });
    out = dx;
  }
  out = channelsFirst(out, net.convs[n - 1].nOut);
  for (let l = n; l > 0; l--) {
    const layer = net.convs[l - 1], area = layer.height * layer.width;
    add("p", l, out);
    const da = poolBack(layer, values[`a${l}`], values[`p${l}`], out);
    add("a", l, da);
    out = through(da, l);
    // What is switched off does not depend on anything below it.
    for (let o = 0; o < layer.nOut; o++) if (off.has(`${l - 1}.${o}`)) out.fill(0, o * area, (o + 1) * area);
    add("z", l, out);
    const { dW, db, dx } = convolveBack(layer, l > 1 ? values[`p${l - 1}`] : values.x, out);
    add("W", l, dW, { bias: db });
    out = dx;
  }
  add("x", 0, out);
  return steps;
}

// The forward pass, the loss and the backward pass for an image.
export function compute(net, x, label, off = new Set()) {
  const pass = forward(net, x, off);
  const steps = backward(net, pass, label);
  const gradients = Object.fromEntries(steps.map(({ name, values }) => [name, values]));
  for (const { kind, layer, bias } of steps) if (kind === "W") gradients[`b${layer}`] = bias;
  return { pass, probabilities: softmax(pass.logits), loss: lossOf(pass.logits, label), steps, gradients };
}

// How one pixel of a map was computed: of each input channel, the input under the window (0 outside of the image), the
// weights, their products and the sum of these; then z = sums + bias, and a.
export function explain(net, pass, l, filter, y, x) {
  const { nIn, window, W, b, height, width } = net.convs[l];
  const input = l ? pass.values[`p${l}`] : pass.values.x, low = before(window), n = window * window,
    area = height * width;
  const channels = Array.from({ length: nIn }, (_, i) => {
    const weights = W.subarray((filter * nIn + i) * n, (filter * nIn + i + 1) * n);
    const inputs = Float64Array.from({ length: n }, (_, k) => {
      const row = y - low + Math.floor(k / window), column = x - low + (k % window);
      const inside = row >= 0 && row < height && column >= 0 && column < width;
      return inside ? input[i * area + row * width + column] : 0;
    });
    const products = inputs.map((value, k) => value * weights[k]);
    return { inputs, weights, products, sum: total(products) };
  });
  const at = filter * area + y * width + x;
  const sum = channels.reduce((all, channel) => all + channel.sum, 0);
  return { channels, sum, bias: b[filter], z: pass.values[`z${l + 1}`][at], a: pass.values[`a${l + 1}`][at] };
}
