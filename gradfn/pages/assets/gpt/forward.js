// The forward pass: from tokens to logits, with the value of every site on the path.
import { activate, softmaxRow } from "gradfn/gpt/activations.js";
import { checkEdit, edited } from "gradfn/gpt/edits.js";
import { addToHead, headOf, product, sum, transposed } from "gradfn/gpt/matrix.js";
import { headPath, layerOf, shapeOf, siteOf } from "gradfn/gpt/model.js";

// Returns { tokens, edits, sites: { name: { shape, values } }, logits, kept }: kept is what only the backward pass
// needs.
export function forward(model, tokens, edits = []) {
  const { config, params } = model;
  const T = tokens.length;
  if (T > config.context) throw new RangeError(`at most ${config.context} tokens, got ${T}`);
  for (const edit of edits) checkEdit(model, edit, T);
  const pass = { tokens, edits, sites: {}, kept: [] };
  const named = (site, values) => {
    const after = edited(config, edits, site, T, values);
    pass.sites[site] = { shape: shapeOf(config, site, T), values: after };
    return after;
  };

  let x = named("embedded", embedded(config, params, tokens));
  for (let i = 0; i < config.n_layers; i++) x = block(config, params, i, x, T, named, pass.kept);
  x = named("final_norm", norm(config, layerOf(params, "final_norm"), x));
  pass.logits = named("logits", logits(config, params, x, T));
  return pass;
}

export function logits(config, params, x, T) {
  const { W, b } = layerOf(params, headPath(config));
  return product(x, W, T, config.vocab, config.width, b);
}

function embedded(config, params, tokens) {
  const { width } = config, W = params["embed/W"].values, out = new Float32Array(tokens.length * width);
  tokens.forEach((token, t) => out.set(W.subarray(token * width, (token + 1) * width), t * width));
  if (config.positions === "learned") {
    const P = params["positions/W"].values;
    for (let i = 0; i < out.length; i++) out[i] += P[i];
  } else if (config.positions === "sinusoidal") {
    for (let i = 0; i < out.length; i++) {
      const t = Math.floor(i / width), k = i % width;
      const angle = t * 10000 ** (-(k - (k % 2)) / width);
      out[i] += k % 2 ? Math.cos(angle) : Math.sin(angle);
    }
  }
  return out;
}

function block(config, params, i, x, T, named, kept) {
  const { width, n_heads: heads, n_kv_heads: kvHeads, head_size: size } = config;
  const at = (part) => siteOf(config, i, part), own = (part) => layerOf(params, `blocks/${i}/${part}`);
  const dense = (part, input, n, k) => {
    const { W, b } = own(part);
    return product(input, W, T, n, k, b);
  };
  const normed = named(at("attention_norm"), norm(config, own("attention_norm"), x));
  let queries = dense("attention/query", normed, heads * size, width);
  let keys = dense("attention/key", normed, kvHeads * size, width);
  if (config.positions === "rope") {
    rotate(config, queries, heads, T);
    rotate(config, keys, kvHeads, T);
  }
  queries = named(at("queries"), queries);
  keys = named(at("keys"), keys);
  const values = named(at("values"), dense("attention/value", normed, kvHeads * size, width));
  const weights = attentionWeights(config, queries, keys, T);
  const probabilities = named(at("probabilities"), weights);
  const mixed = named(at("mixed"), mix(config, probabilities, values, T));
  const attentionOut = named(at("attention_out"), dense("attention/out", mixed, width, heads * size));
  // weights are the probabilities before they are edited, whose softmax the backward pass differentiates.
  const own_ = { input: x, weights };
  kept.push(own_);
  if (!config.feed) return named(at("residual"), sum(x, attentionOut));

  const mid = named(at("residual_mid"), sum(x, attentionOut));
  const feedNormed = named(at("feed_norm"), norm(config, own("feed_norm"), mid));
  own_.up = dense("feed/up", feedNormed, config.hidden, width);
  let hidden;
  if (config.feed === "swiglu") {
    own_.gate = dense("feed/gate", feedNormed, config.hidden, width);
    hidden = activate("silu", own_.gate, config.hidden);
    for (let j = 0; j < hidden.length; j++) hidden[j] *= own_.up[j];
  } else {
    hidden = activate(config.feed, own_.up, config.hidden);
  }
  hidden = named(at("hidden"), hidden);
  const feedOut = named(at("feed_out"), dense("feed/down", hidden, width, config.hidden));
  return named(at("residual"), sum(mid, feedOut));
}

// Each row of x, normalized to mean 0 and variance 1 (or to root mean square 1), times the gain, plus the bias.
export function norm(config, { W: gain, b }, x) {
  const { width } = config, out = new Float32Array(x.length);
  for (let at = 0; at < x.length; at += width) {
    const { mean, scale } = moments(config, x, at);
    for (let j = 0; j < width; j++) out[at + j] = (x[at + j] - mean) * scale * gain[j] + (b ? b[j] : 0);
  }
  return out;
}

// What a norm subtracts from a row, and multiplies it by.
export function moments(config, x, at) {
  const { width } = config;
  let mean = 0, square = 0;
  if (config.norm === "layer") {
    for (let j = 0; j < width; j++) mean += x[at + j];
    mean /= width;
  }
  for (let j = 0; j < width; j++) square += (x[at + j] - mean) ** 2;
  return { mean, scale: 1 / Math.sqrt(square / width + config.norm_epsilon) };
}

// Rotate pairs of features (i and i + size / 2) by angles proportional to the position, in place; backwards with sign
// -1.
export function rotate(config, x, heads, T, sign = 1) {
  const size = config.head_size, half = size / 2;
  for (let k = 0; k < half; k++) {
    const frequency = config.rope_base ** ((-2 * k) / size);
    for (let t = 0; t < T; t++) {
      const cos = Math.cos(t * frequency), sin = sign * Math.sin(t * frequency);
      for (let head = 0; head < heads; head++) {
        const i = (t * heads + head) * size + k, first = x[i], second = x[i + half];
        x[i] = first * cos - second * sin;
        x[i + half] = second * cos + first * sin;
      }
    }
  }
}

// The softmax over earlier positions of queries times keys: [heads, T, T], query after query.
function attentionWeights(config, queries, keys, T) {
  const { n_heads: heads, n_kv_heads: kvHeads, head_size: size } = config, group = heads / kvHeads;
  const out = new Float32Array(heads * T * T), scores = new Float32Array(T * T);
  for (let head = 0; head < heads; head++) {
    const query = headOf(queries, T, heads, size, head, size ** -0.5);
    const key = headOf(keys, T, kvHeads, size, Math.floor(head / group));
    const own = out.subarray(head * T * T, (head + 1) * T * T);
    product(query, key, T, T, size, null, scores);
    for (let t = 0; t < T; t++) softmaxRow(scores, own, t * T, t * T + t + 1);
  }
  return out;
}

// The values, averaged with the probabilities: [T, heads, size].
function mix(config, probabilities, values, T) {
  const { n_heads: heads, n_kv_heads: kvHeads, head_size: size } = config, group = heads / kvHeads;
  const out = new Float32Array(T * heads * size);
  for (let head = 0; head < heads; head++) {
    const value = transposed(headOf(values, T, kvHeads, size, Math.floor(head / group)), T, size);
    const own = probabilities.subarray(head * T * T, (head + 1) * T * T);
    addToHead(out, product(own, value, T, size, T), T, heads, size, head);
  }
  return out;
}
