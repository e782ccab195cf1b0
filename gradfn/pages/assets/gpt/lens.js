// The logit lens: what the model would predict if the residual stream went to the final norm and the head right here
// (nostalgebraist, interpreting GPT: the logit lens, 2020).
import { logits, norm } from "gradfn/gpt/forward.js";
import { layerOf, siteOf } from "gradfn/gpt/model.js";
import { distribution } from "gradfn/gpt/sampling.js";

// Returns [{ site, probabilities [vocab] }] for the embedding and the residual stream in and after each block.
export function logitLens(model, pass, position) {
  const { config, params } = model, { width } = config;
  const parts = config.feed ? ["residual_mid", "residual"] : ["residual"];
  const sites = ["embedded"];
  for (let i = 0; i < config.n_layers; i++) sites.push(...parts.map((part) => siteOf(config, i, part)));
  return sites.map((site) => {
    const row = pass.sites[site].values.subarray(position * width, (position + 1) * width);
    const normed = norm(config, layerOf(params, "final_norm"), row);
    return { site, probabilities: distribution(logits(config, params, normed, 1)) };
  });
}
