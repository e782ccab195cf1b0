// A GPT that runs in the page: its configuration, its parameters by path, and the names and shapes of its sites.
import { decodeAll } from "gradfn/core/arrays.js";
import { checkpointsOf } from "gradfn/gpt/checkpoints.js";

// The values that gf.gpt names in each block, in the order of computation.
const ATTENTION = ["queries", "keys", "values", "probabilities", "mixed"];

// Returns { config, params: { path: { shape, values } }, tokenizer, lines, quiet, checkpoints: [{ step, loss }],
// samples, context, sites }. config has the names of gf.GPTConfig; feed is null where blocks have no feed-forward
// layers.
export function build(content) {
  const { config, tokenizer, lines, quiet, samples } = content;
  const model = { config, params: decodeAll(content.params), tokenizer, lines, quiet, samples,
    context: config.context };
  model.sites = siteNames(config);
  model.checkpoints = checkpointsOf(content);
  return model;
}

// The name of a value of a block as gf.sites gives it: siteOf(config, 2, "mixed"). A name that occurs once has no
// scope.
export function siteOf(config, block, name) {
  const scope = `blocks/${block}`;
  if (name.endsWith("_norm")) return `${scope}/${name}`;
  if (config.n_layers === 1) return name;
  if (ATTENTION.includes(name)) return `${scope}/attention/${name}`;
  return name === "hidden" ? `${scope}/feed/hidden` : `${scope}/${name}`;
}

// The names of the values of each block.
export function partsOf(config) {
  const feed = config.feed ? ["residual_mid", "feed_norm", "hidden", "feed_out"] : [];
  return ["attention_norm", ...ATTENTION, "attention_out", ...feed, "residual"];
}

function siteNames(config) {
  const blocks = Array.from({ length: config.n_layers },
    (_, i) => partsOf(config).map((part) => siteOf(config, i, part)));
  return ["embedded", ...blocks.flat(), "final_norm", "logits"];
}

// The last part of a site's name, and its block; null for those outside of blocks.
export function placeOf(config, site) {
  for (let block = 0; block < config.n_layers; block++) {
    const part = partsOf(config).find((name) => siteOf(config, block, name) === site);
    if (part) return { block, part };
  }
  return { block: null, part: site };
}

// The shape of the value of a site for T tokens.
export function shapeOf(config, site, T) {
  const { n_heads: heads, n_kv_heads: kvHeads, head_size: size } = config;
  const { part } = placeOf(config, site);
  const shapes = {
    queries: [T, heads, size],
    mixed: [T, heads, size],
    keys: [T, kvHeads, size],
    values: [T, kvHeads, size],
    probabilities: kvHeads < heads ? [kvHeads, heads / kvHeads, T, T] : [heads, T, T],
    hidden: [T, config.hidden],
    logits: [T, config.vocab],
  };
  return shapes[part] ?? [T, config.width];
}

// The parameters of a dense layer or a norm; b is null where it has no bias.
export function layerOf(params, path) {
  return {
    W: (params[`${path}/W`] ?? params[`${path}/gain`]).values,
    b: params[`${path}/b`]?.values ?? null,
  };
}

// The path of the matrix that gives the logits.
export function headPath(config) {
  return config.tied ? "embed" : "head";
}
