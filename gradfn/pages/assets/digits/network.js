// The network of the page: as it was trained, and as it is now, with changed biases and regions.
import { decodeAll } from "gradfn/core/arrays.js";
import { backward, forward, lossOf, probabilities } from "gradfn/digits/mlp.js";

export const PIXELS = 28; // of an image, in each direction

// Return the network that the page contains, and all its arrays.
export function build(content) {
  const arrays = decodeAll(content.arrays);
  const n = Object.keys(arrays).filter((name) => /^W\d+$/.test(name)).length;
  const layers = Array.from({ length: n }, (_, l) => ({
    nIn: arrays[`W${l + 1}`].shape[1],
    nOut: arrays[`W${l + 1}`].shape[0],
    W: arrays[`W${l + 1}`].values,
    b: arrays[`b${l + 1}`].values,
    squash: (l < n - 1 ? content.activation : content.output) || "none",
  }));
  return { net: { layers, loss: content.loss }, arrays };
}

// The forward pass, the loss and the backward pass for an image.
export function compute(net, x, label) {
  const pass = forward(net, x);
  const steps = backward(net, pass, label);
  return { pass, probabilities: probabilities(net, pass), loss: lossOf(net, pass, label), steps };
}

// A copy of a trained network that can be changed and restored.
export function changeable(trained) {
  const copied = ({ W, b, ...rest }) => ({ ...rest, W: W.slice(), b: b.slice() });
  const net = { loss: trained.loss, layers: trained.layers.map(copied) };
  const regions = new Map(); // by node of the first layer: { left, top, right, bottom }, all included

  // Keep only the weights of a node of the first layer that are inside a region; null restores all.
  function setRegion(i, region) {
    const { W, nIn } = net.layers[0];
    if (region) regions.set(i, region);
    else regions.delete(i);
    for (let j = 0; j < nIn; j++) {
      const x = j % PIXELS, y = Math.floor(j / PIXELS);
      const kept = !region || (x >= region.left && x <= region.right && y >= region.top && y <= region.bottom);
      W[i * nIn + j] = kept ? trained.layers[0].W[i * nIn + j] : 0;
    }
  }

  const changed = (l, i) => net.layers[l].b[i] !== trained.layers[l].b[i] || (l === 0 && regions.has(i));

  return {
    net,
    trained,
    regions,
    setRegion,
    changed,
    setBias: (l, i, value) => void (net.layers[l].b[i] = value),
    anyChanged: () => net.layers.some(({ b }, l) => b.some((_, i) => changed(l, i))),
    asTrained() {
      [...regions.keys()].forEach((i) => setRegion(i, null));
      net.layers.forEach(({ b }, l) => b.set(trained.layers[l].b));
    },
  };
}
