// The equations of the backward pass, step by step, as HTML. x with index i is the residual stream after block i, m the
// one between its attention and its feed-forward layer.
import { sub } from "gradfn/core/dom.js";

const grad = (name) => `<span class="whole">∂L/∂${name}</span>`;
const times = (matrix, name) => `W${sub(matrix)}ᵀ ${grad(name)}`;

// A step's title, formula and meaning.
export function explained(model, { kind, block }) {
  return kinds[kind](model.config, block);
}

const kinds = {
  logits: () => [
    "the loss to the logits",
    `${grad("z")} = w (p − y)`,
    "At each position: the predicted probabilities minus 1 for the token that follows, " +
      "times the position's weight in the loss.",
  ],
  head: () => [
    "through the output matrix",
    `${grad("n")} = ${times("out", "z")}`,
    "Each feature collects from all tokens of the vocabulary, through the weight by which it votes for them.",
  ],
  norm({ n_layers: nLayers, norm }) {
    const rms = norm === "rms";
    const removed = `${rms ? "" : "mean(u) − "}n̂ mean(n̂ ⊙ u)`;
    const before = grad(`x${sub(nLayers - 1)}`);
    const formula = `${before} = (u − ${removed}) / ${rms ? "r" : "σ"}, &ensp; u = γ ⊙ ${grad("n")}`;
    const change = rms ? "makes the vector longer" : "shifts the vector or makes it longer";
    const gone = `The norm ignores what only ${change}, so that part of the gradient is removed.`;
    return ["through the final norm", formula, `${gone} A vector twice as long gets half the gradient.`];
  },
  feed({ feed }, block) {
    const after = grad(`x${sub(block)}`);
    const down = `W${sub("down")}ᵀ ${after}`;
    const plain = `W${sub("up")}ᵀ (${feed.split("_")[0]}′(h) ⊙ ${down})`;
    const inside = feed === "swiglu" ? `J${sub("swiglu")}ᵀ ${after}` : plain;
    return [
      `through the feed-forward layer of block ${block}`,
      `${grad(`m${sub(block)}`)} = ${after} + J${sub("norm")}ᵀ ${inside}`,
      "The stream passes its gradient unchanged; the layer adds what flows through its hidden nodes. " +
        "No gradient moves to another position.",
    ];
  },
  attention({ feed }, block) {
    const after = grad(`${feed ? "m" : "x"}${sub(block)}`), before = grad(`x${sub(block ? block - 1 : "emb")}`);
    const inside = ["Q", "K", "V"].map((name) => times(name, name)).join(" + ");
    const values = `${grad(`V${sub("s")}`)} = Σ${sub("t")} A${sub("ts")} ${grad(`Y${sub("t")}`)}`;
    return [
      `through the attention of block ${block}`,
      `${before} = ${after} + J${sub("norm")}ᵀ (${inside}), &ensp; ${values}`,
      "Here the gradient moves: each position sends it to the earlier positions that it attended to. " +
        "Without attention it would stay where it was.",
    ];
  },
};
