// The lesson of the GPT's page: ten steps from one prediction to the heads that make it.
import { number } from "gradfn/core/dom.js";
import { habit } from "gradfn/gpt/attention.js";
import { most } from "gradfn/gpt/next.js";
import { logitLens } from "gradfn/gpt/lens.js";
import { headsOf, nameOf, patternOf, percent, quoted } from "gradfn/gpt/names.js";
import { distribution } from "gradfn/gpt/sampling.js";
import { names } from "gradfn/gpt/tokenizer.js";
import { layerOf } from "gradfn/gpt/lens_view.js";

// Return the steps for core/lesson.js. Tokens can be any characters of a text: in HTML they are escaped.
export function lessonOf(find, model, state, now) {
  const { vocab } = model.config, heads = headsOf(model), checkpoints = model.checkpoints || [];
  const called = (token) => escaped(quoted(names(model, Int32Array.of(token))[0]));
  const here = () => escaped(quoted(now().names[state.position]));
  const probabilities = (temperature = 1) => {
    const row = now().pass.logits.subarray(state.position * vocab, (state.position + 1) * vocab);
    return distribution(row, { temperature, topK: null });
  };
  let initial = {}; // the state when the step was opened
  const starts = () => (initial = { ...state, loss: now().loss });
  const withLoss = () => state.position + 1 < state.tokens.length && !Number.isNaN(now().losses[state.position]);

  const steps = [
    {
      see: "The model reads the text as <dfn data-term=\"token\">tokens</dfn>. After each one it predicts the next: " +
        "a probability for every token that it knows. The bars show the ten largest.",
      act: "Choose a token in the middle of the text.",
      at: () => find("tokens").closest(".strip"),
      start: starts,
      done: () => state.position !== initial.position && withLoss(),
      happened: () => {
        const all = probabilities(), [first] = most(all, 1), follows = now().targets[state.position];
        return `After ${here()} the model expects ${called(first)} most, with ${percent(all[first])}. ` +
          `${called(follows)} follows, with ${percent(all[follows])}: the loss is −log of it, ` +
          `${number(now().losses[state.position])} nats.`;
      },
    },
    {
      see: "The redder a token, the less the model expected it: its color is the loss of the prediction before it.",
      act: "Choose the reddest token.",
      at: () => find("tokens").closest(".strip"),
      start: starts,
      done: () => state.position > 0 && state.position - 1 === worst(now().losses),
      happened: () => {
        const loss = now().losses[state.position - 1];
        return `${here()} had a probability of ${percent(Math.exp(-loss))}: ${number(loss)} nats. Averaged over the ` +
          `text, the loss is ${number(now().loss)} nats; guessing among all ${vocab} tokens gives ` +
          `${number(Math.log(vocab))}.`;
      },
    },
    {
      see: "Tokens that the model writes are sampled from its prediction. With <dfn " +
        "data-term=\"temperature\">temperature</dfn> 0 it is always the most probable token.",
      act: "Set the temperature to 0 and write a few tokens.",
      at: () => find(state.temperature === 0 ? "writing" : "settings"),
      start: starts,
      done: () => state.temperature === 0 && state.written >= 3,
      happened: () => `It wrote ${state.written} tokens, the most probable one each time. Press “Write on”: it often ` +
        `repeats itself.`,
    },
    {
      see: "With temperature 1, tokens are sampled with the probabilities that the model predicts.",
      act: "Undo, set the temperature to 1 and write a few tokens.",
      at: () => find(state.temperature === 1 ? "writing" : "settings"),
      start: starts,
      done: () => state.temperature === 1 && state.written >= 3,
      happened: () => `It wrote ${state.written} tokens with the <dfn data-term="seed">seed</dfn> ${state.seed}. ` +
        `Undo and write again: they ` +
        "are the same. Another seed gives others.",
    },
    {
      see: "Each square is an <dfn data-term=\"attention head\">attention head</dfn>: row by row, to which earlier " +
        "tokens each one attends. A dark diagonal is a head that attends to the token itself; one beside it, to the " +
        "previous one.",
      ofHeads: true,
      act: `Choose the head that attends most to the previous token${previousHead() ? "" : ", if there is one"}.`,
      at: () => find("heads").closest(".looking"),
      start: starts,
      done: () => (previousHead() ? state.head === previousHead().i : state.head !== initial.head),
      happened: () => {
        const found = previousHead();
        const share = previousShare(patternOf(model, now().pass, heads[state.head]), state.tokens.length);
        return `Head ${nameOf(heads[state.head])} gives ${percent(share)} of its attention to the previous token` +
          (found && found.i === state.head ? ", more than any other head."
            : ". No head of this model has a clear habit of it.");
      },
    },
    {
      see: "For the chosen token, each row is a head: how much it takes from each earlier token.",
      act: "Switch to “to this token”, to see which later tokens use it.",
      at: () => find("every-head"),
      start: starts,
      done: () => state.direction === "to",
      happened: () => {
        const n = state.tokens.length, p = state.position;
        const taken = heads.map((head) => {
          const pattern = patternOf(model, now().pass, head);
          let sum = 0;
          for (let t = p + 1; t < n; t++) sum += pattern[t * n + p];
          return sum;
        });
        const [top] = most(taken, 1);
        if (p === n - 1) return "This is the last token: no later one can attend to it. Choose an earlier one.";
        return `Head ${nameOf(heads[top])} uses ${here()} most: ${percent(taken[top] / (n - 1 - p))} of the ` +
          `attention of all later tokens.`;
      },
    },
    {
      see: "The <dfn data-term=\"logit lens\">logit lens</dfn> asks each layer for its prediction: the <dfn " +
        "data-term=\"residual stream\">residual stream</dfn> goes straight to the output.",
      act: "Choose another token, and read down the table.",
      at: () => find("lens-table"),
      start: starts,
      done: () => state.position !== initial.position,
      happened: () => {
        const layers = logitLens(model, now().pass, state.position), end = layers[layers.length - 1];
        const [top] = most(end.probabilities, 1);
        const at = layers.findIndex((_, i) => layers.slice(i).every(({ probabilities: p }) => most(p, 1)[0] === top));
        return `The model's prediction is ${called(top)}, ${percent(end.probabilities[top])}. It is the first choice ` +
          `from “after ${layerOf(model, layers[at].site)}” on; after the embedding it had ` +
          `${percent(layers[0].probabilities[top])}.`;
      },
    },
  ];
  if (checkpoints.length > 1) {
    steps.push({
      see: "The training kept <dfn data-term=\"checkpoint\">checkpoints</dfn>: the slider goes back in time.",
      act: "Move it to the first checkpoint, and read the text's losses, its attention and the predictions.",
      at: () => find("time"),
      start: starts,
      done: () => state.checkpoint === 0,
      happened: () => `At step ${checkpoints[0].step.toLocaleString("en")} the text's loss was ${number(now().loss)} ` +
        `nats per token` +
        (Number.isFinite(initial.loss) && initial.checkpoint !== 0
          ? `; at step ${checkpoints[initial.checkpoint].step.toLocaleString("en")} it is ${number(initial.loss)}.`
          : ".") +
        ` A guess among all tokens has ${number(Math.log(vocab))}.`,
    });
  }
  steps.push(
    {
      see: "The backward pass: how the loss changes if a value increases slightly, from the predictions back to the " +
        "text.",
      act: "Press “Next step” a few times.",
      at: () => find("back"),
      start: starts,
      done: () => state.step > (initial.step || 1),
      happened: () => `Step ${state.step}: the gradient has reached a lower layer. The bars show how strongly the ` +
        `loss depends on the vector at each position.`,
    },
    {
      see: "A head can be switched off: its output becomes 0, and everything after it is computed again.",
      act: "Switch off a head.",
      at: () => find("intervene"),
      start: starts,
      done: () => state.edits.length > 0,
      happened: () => {
        const { loss, lossWithout } = now();
        if (!Number.isFinite(loss)) return "The prediction changed. With a longer text there is a loss to compare, " +
          "too.";
        const more = loss - lossWithout;
        return `The text's loss ${more < 0 ? "fell" : "rose"} from ${number(lossWithout)} to ${number(loss)} nats ` +
          `per token: without it the model is ${more < 0 ? "better on this text, by chance" : "worse"}.`;
      },
    },
  );
  return steps.filter(({ ofHeads }) => !ofHeads || heads.length > 1);

  // The head that attends most to the previous token, where one has that habit.
  function previousHead() {
    const n = state.tokens.length;
    const shares = heads.map((head) => previousShare(patternOf(model, now().pass, head), n));
    const [i] = most(shares, 1);
    return habit(patternOf(model, now().pass, heads[i]), n).share && shares[i] >= 0.3 ? { i, share: shares[i] } : null;
  }
}

// The attention to the previous token, averaged over the positions from the third on.
export function previousShare(pattern, n) {
  let sum = 0;
  for (let t = 2; t < n; t++) sum += pattern[t * n + t - 1];
  return n > 2 ? sum / (n - 2) : 0;
}

export function worst(losses) {
  const known = losses.map((loss) => (Number.isNaN(loss) ? -1 : loss));
  return known.indexOf(Math.max(...known));
}

function escaped(text) {
  return text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;").replaceAll('"', "&quot;");
}
