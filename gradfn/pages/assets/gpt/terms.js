// The words of the GPT's page, with the numbers of what is open.
import { number } from "gradfn/core/dom.js";
import { most } from "gradfn/gpt/next.js";
import { percent } from "gradfn/gpt/names.js";

// Return the terms for core/terms.js; `now()` and `state()` are what the page shows. Formulas contain numbers alone,
// and no text of the run: they are HTML.
export function termsOf(model, now, state) {
  const { config } = model;
  const row = () => now().pass.logits.subarray(state().position * config.vocab, (state().position + 1) * config.vocab);
  const loss = () => now().losses[state().position];
  return {
    token: {
      meaning: "The unit that the model reads and writes: here a character, a byte, or an integer. The text becomes " +
        "a sequence of tokens.",
      formula: () => `This model knows ${config.vocab.toLocaleString("en")} tokens and reads at most ` +
        `${config.context.toLocaleString("en")} of them.`,
    },
    nats: {
      meaning: "The unit of the loss: −log p, where p is the probability that the model gave to the token that " +
        "follows. 0 nats is certain and right; 0.69 nats are p = 50 %; 2.3 nats are p = 10 %.",
      formula: () => Number.isNaN(loss()) ? null : `here: −log ${percent(Math.exp(-loss()))} = ${number(loss())} nats`,
    },
    logit: {
      meaning: "A score for each token that could come next. Softmax turns the scores into probabilities.",
      formula: () => {
        const [first, second] = most(row(), 2);
        return second === undefined ? null : `here: the largest is ${number(row()[first])}, the second ` +
          `${number(row()[second])}`;
      },
    },
    temperature: {
      meaning: "Logits are divided by it before softmax. Below 1 the likely becomes likelier; at 0 the likeliest " +
        "token is always taken; above 1 rare tokens appear more often.",
      formula: () => `here: p = softmax(logits / ${state().temperature.toFixed(1)})`,
    },
    "top-k": {
      meaning: "Only the k most probable tokens can be written; the others get the probability 0. Empty: all of them.",
      formula: () => `here: k = ${state().topK ?? config.vocab} of ${config.vocab} tokens`,
    },
    seed: { meaning: "The start of the random numbers. The same text, seed and settings always write the same " +
      "tokens." },
    context: {
      meaning: "The longest sequence of tokens that the model can read. Of a longer text it reads the end.",
      formula: () => `here: ${now().pass.tokens.length} of at most ${config.context} tokens`,
    },
    "attention head": {
      meaning: "A part of a block that moves information between positions. At each position it takes a weighted " +
        "average of the values of this and all earlier tokens; the weights, its attention, add up to 100 %.",
      formula: () => `here: ${config.n_layers} blocks with ${config.n_heads} heads each; 1.2 is head 2 of block 1, ` +
        `counted from 0`,
    },
    "feed-forward layer": {
      meaning: "The second part of a block (MLP). It works at each position on its own and moves nothing between " +
        "positions.",
    },
    "residual stream": {
      meaning: "The vector at each position that all blocks read from and add to. It starts as the embedding of the " +
        "token, and the last one gives the logits.",
      formula: () => `here: ${config.width} numbers per position`,
    },
    "logit lens": {
      meaning: "Takes the residual stream after an earlier block straight to the final norm and the output matrix: " +
        "what the model would predict if it stopped there.",
    },
    checkpoint: {
      meaning: "The parameters as they were at an earlier step of the training, kept in the run's folder.",
      formula: () => {
        const kept = model.checkpoints || [];
        return kept.length ? `here: step ${kept[state().checkpoint].step.toLocaleString("en")}, of ${kept.length} ` +
          `that were kept` : null;
      },
    },
  };
}
