// The backward pass: the gradient of a weighted sum of the losses at every site, and at every parameter.
import { activate, activationBack, softmaxBack } from "gradfn/gpt/activations.js";
import { editsBack } from "gradfn/gpt/edits.js";
import { moments, rotate } from "gradfn/gpt/forward.js";
import { logTotal } from "gradfn/gpt/loss.js";
import { addTo, addToHead, headOf, product, transposed, transposedWeights } from "gradfn/gpt/matrix.js";
import { headPath, layerOf, siteOf } from "gradfn/gpt/model.js";

// The gradient of the sum over t of weights[t] times the loss at t; positions with the target -1 do not count.
//
// Returns { sites: { name: { shape, values } }, params: { path: { shape, values } } or null, loss }. Edits of the pass
// are differentiated through, as gf.inspect of a function of gf.patch does it: the gradient at a site is that at the
// edited value.
export function backward(model, pass, targets, weights, { params: withParams = false } = {}) {
  const { config, params } = model, { tokens, edits } = pass, T = tokens.length;
  const back = { config, params, pass, T, sites: {}, grads: withParams ? {} : null };
  // Record the gradient at a site; return that before its edits.
  back.named = (site, gradient) => {
    back.sites[site] = { shape: pass.sites[site].shape, values: gradient };
    return editsBack(config, edits, site, T, gradient);
  };

  const { loss, gradient } = lossBack(config, pass, targets, weights);
  const z = back.named("logits", gradient);
  let g = dense(back, headPath(config), "final_norm", z, config.vocab, config.width);
  g = norm(back, "final_norm", lastResidual(config), back.named("final_norm", g));
  for (let i = config.n_layers - 1; i >= 0; i--) g = block(back, i, g);
  embedding(back, back.named("embedded", g));
  return { sites: back.sites, params: back.grads, loss };
}

function lastResidual(config) {
  return siteOf(config, config.n_layers - 1, "residual");
}

// The loss, and its gradient at the logits: the probabilities minus 1 at the target, times the weight.
function lossBack(config, pass, targets, weights) {
  const { vocab } = config, gradient = new Float32Array(pass.logits.length);
  let loss = 0;
  targets.forEach((target, t) => {
    if (target < 0 || !weights[t]) return;
    const at = t * vocab, row = pass.logits.subarray(at, at + vocab), total = logTotal(row);
    loss += weights[t] * (total - row[target]);
    for (let i = 0; i < vocab; i++) gradient[at + i] = weights[t] * Math.exp(row[i] - total);
    gradient[at + target] -= weights[t];
  });
  return { loss, gradient };
}

// Through a dense layer with n outputs and k inputs, the value of a site: its gradient, and those of its parameters.
function dense(back, path, input, gradient, n, k) {
  const { W, b } = layerOf(back.params, path), { T } = back;
  if (back.grads) {
    const x = back.pass.sites[input].values;
    add(back, `${path}/W`, product(transposed(gradient, T, n), transposed(x, T, k), n, k, T));
    if (b) add(back, `${path}/b`, columnSums(gradient, n));
  }
  return product(gradient, transposedWeights(W, n, k), T, k, n);
}

// Add to the gradient of a parameter; the embedding of a tied model gets one at each end.
function add(back, path, values) {
  const known = back.grads[path];
  if (known) addTo(known.values, values);
  else back.grads[path] = { shape: back.params[path].shape, values };
}

function columnSums(x, n) {
  const out = new Float64Array(n);
  for (let i = 0; i < x.length; i++) out[i % n] += x[i];
  return Float32Array.from(out);
}

// Through a norm of the value of a site.
function norm(back, path, input, gradient) {
  const { config } = back, { width } = config, { W: gain, b } = layerOf(back.params, path);
  const x = back.pass.sites[input].values, out = new Float32Array(x.length);
  const gains = new Float64Array(width), biases = new Float64Array(width);
  for (let at = 0; at < x.length; at += width) {
    const { mean, scale } = moments(config, x, at);
    let sum = 0, along = 0;
    for (let j = 0; j < width; j++) {
      const normed = (x[at + j] - mean) * scale, g = gradient[at + j];
      gains[j] += g * normed;
      biases[j] += g;
      sum += g * gain[j];
      along += g * gain[j] * normed;
    }
    // What changes only the row's mean or length has no effect on what is normalized.
    const shift = config.norm === "layer" ? sum / width : 0;
    for (let j = 0; j < width; j++) {
      const normed = (x[at + j] - mean) * scale;
      out[at + j] = scale * (gradient[at + j] * gain[j] - shift - (normed * along) / width);
    }
  }
  if (back.grads) {
    add(back, `${path}/gain`, Float32Array.from(gains));
    if (b) add(back, `${path}/b`, Float32Array.from(biases));
  }
  return out;
}

// Through block i, from the gradient at its residual stream to that at the stream before it.
function block(back, i, gradient) {
  const { config, named } = back, { width, hidden } = config;
  const at = (part) => siteOf(config, i, part), path = (part) => `blocks/${i}/${part}`;
  const own = back.pass.kept[i];
  let g = named(at("residual"), gradient);
  if (config.feed) {
    // The stream is copied: to the feed-forward layers, and past them. Their gradients are added.
    let inner = dense(back, path("feed/down"), at("hidden"), named(at("feed_out"), g.slice()), width, hidden);
    inner = feed(back, i, named(at("hidden"), inner), own);
    inner = norm(back, path("feed_norm"), at("residual_mid"), named(at("feed_norm"), inner));
    addTo(inner, g);
    g = named(at("residual_mid"), inner);
  }
  const inner = attention(back, i, named(at("attention_out"), g.slice()), own);
  const before = i ? siteOf(config, i - 1, "residual") : "embedded";
  const out = norm(back, path("attention_norm"), before, named(at("attention_norm"), inner));
  addTo(out, g);
  return out;
}

// From the gradient at the hidden nodes to that at the norm before them.
function feed(back, i, gradient, { up, gate }) {
  const { config } = back, { width, hidden } = config, input = siteOf(config, i, "feed_norm");
  const through = (name, g) => dense(back, `blocks/${i}/feed/${name}`, input, g, hidden, width);
  if (config.feed !== "swiglu") return through("up", activationBack(config.feed, up, gradient, hidden));
  const gated = activate("silu", gate, hidden);
  const atGate = activationBack("silu", gate, gradient.map((g, j) => g * up[j]), hidden);
  const out = through("up", gradient.map((g, j) => g * gated[j]));
  addTo(out, through("gate", atGate));
  return out;
}

// From the gradient at what attention adds to the stream, to that at the norm before it.
function attention(back, i, gradient, { weights }) {
  const { config, named, T } = back;
  const { width, n_heads: heads, n_kv_heads: kvHeads, head_size: size } = config, group = heads / kvHeads;
  const at = (part) => siteOf(config, i, part), value = (part) => back.pass.sites[at(part)].values;
  const path = (part) => `blocks/${i}/attention/${part}`, kv = (head) => Math.floor(head / group);
  const mixed = named(at("mixed"), dense(back, path("out"), at("mixed"), gradient, width, heads * size));

  const atProbabilities = new Float32Array(heads * T * T), atValues = new Float32Array(T * kvHeads * size);
  const each = (array, head) => array.subarray(head * T * T, (head + 1) * T * T);
  for (let head = 0; head < heads; head++) {
    const g = headOf(mixed, T, heads, size, head), values = headOf(value("values"), T, kvHeads, size, kv(head));
    product(g, values, T, T, size, null, each(atProbabilities, head));
    const probabilities = transposed(each(value("probabilities"), head), T, T);
    addToHead(atValues, product(probabilities, transposed(g, T, size), T, size, T), T, kvHeads, size, kv(head));
  }
  const scores = softmaxBack(weights, named(at("probabilities"), atProbabilities), T);

  let atQueries = new Float32Array(T * heads * size), atKeys = new Float32Array(T * kvHeads * size);
  for (let head = 0; head < heads; head++) {
    const g = each(scores, head), factor = size ** -0.5;
    const queries = headOf(value("queries"), T, heads, size, head, factor);
    const keys = transposed(headOf(value("keys"), T, kvHeads, size, kv(head)), T, size);
    addToHead(atQueries, product(g, keys, T, size, T), T, heads, size, head, factor);
    const fromKeys = product(transposed(g, T, T), transposed(queries, T, size), T, size, T);
    addToHead(atKeys, fromKeys, T, kvHeads, size, kv(head));
  }
  // What is recorded at a site must not be rotated in place.
  const valuesBack = named(at("values"), atValues);
  atKeys = named(at("keys"), atKeys).slice();
  atQueries = named(at("queries"), atQueries).slice();
  if (config.positions === "rope") {
    rotate(config, atKeys, kvHeads, T, -1);
    rotate(config, atQueries, heads, T, -1);
  }
  const through = (name, g, n) => dense(back, path(name), at("attention_norm"), g, n * size, width);
  const out = through("query", atQueries, heads);
  addTo(out, through("key", atKeys, kvHeads));
  addTo(out, through("value", valuesBack, kvHeads));
  return out;
}

// To the embedding's rows, and the positions'.
function embedding(back, gradient) {
  if (!back.grads) return;
  const { config, params, pass } = back, { width } = config;
  const rows = new Float32Array(params["embed/W"].values.length);
  pass.tokens.forEach((token, t) => addTo(rows.subarray(token * width), gradient.subarray(t * width, (t + 1) * width)));
  add(back, "embed/W", rows);
  if (config.positions === "learned") {
    const positions = new Float32Array(params["positions/W"].values.length);
    positions.set(gradient);
    add(back, "positions/W", positions);
  }
}
