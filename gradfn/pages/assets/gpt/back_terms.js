// The words of the backward pass, with the numbers that it shows.
import { number } from "gradfn/core/dom.js";
import { shortName } from "gradfn/gpt/parts.js";
import { signed } from "gradfn/gpt/signed.js";

// Return the terms for core/terms.js; `found()` are the gradients that are shown, or null.
export function backTerms(found) {
  const size = () => number(Math.hypot(...found().norms.embedded));
  const sum = () => signed(found().products.reduce((total, each) => total + each, 0));
  return {
    gradient: {
      meaning: "For each number inside the model: the change of the loss per unit if that number increases slightly.",
      formula: () => found() && `here: the norm of ∂L/∂x at the embedding is ${size()}`,
    },
    "norm of the gradient": {
      meaning: "The length of the gradient of a vector: how much the loss can change per unit that the vector moves.",
      formula: () => found() && `here, over all positions of the embedding: ${size()}`,
    },
    "gradient times value": {
      meaning: "The gradient multiplied by the value and summed: the change of the loss, in nats, if the value grows " +
        "by 100 %, as a straight line. Minus it is the first-order estimate of the change if the value is set to zero.",
      formula: () => found() && `here, summed over all positions: ${sum()} nats`,
    },
    "first-order estimate": {
      meaning: "The loss is taken to be a straight line: its change is the gradient times the change of the value. " +
        "A value that is set to zero changes by minus itself. One backward pass estimates all parts; " +
        "the curvature is ignored.",
      formula: () => found() && exampleOf(found().shares),
    },
  };
}

// The most important part: its estimate, beside the exact change where that is known.
function exampleOf(shares) {
  const [{ part, estimate, exact }] = shares;
  const true_ = exact === null ? "" : `; the exact change is ${signed(exact)}`;
  return `here, ${shortName(part).toLowerCase()}: −Σ g·x = ${signed(estimate)} nats${true_}`;
}
