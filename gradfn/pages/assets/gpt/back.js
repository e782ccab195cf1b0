// The backward pass of a text's loss: step by step, on a map, as blame of the tokens, and as shares of the parts.
import { element, number } from "gradfn/core/dom.js";
import { define } from "gradfn/core/terms.js";
import { backTerms } from "gradfn/gpt/back_terms.js";
import { backward } from "gradfn/gpt/backward.js";
import {
  largest, norms, products, shares as sharesOf, steps as stepsOf, weighted, weightsOf,
} from "gradfn/gpt/blame.js";
import { explained } from "gradfn/gpt/equations.js";
import { forward } from "gradfn/gpt/forward.js";
import { makeMap } from "gradfn/gpt/gradient_map.js";
import { losses } from "gradfn/gpt/loss.js";
import { quoted } from "gradfn/gpt/names.js";
import { changedParts, scaled, without } from "gradfn/gpt/parts.js";
import { makeShares } from "gradfn/gpt/shares.js";
import { makeStrip } from "gradfn/gpt/strip.js";
import { names as namesOf } from "gradfn/gpt/tokenizer.js";

const PAUSE = 80; // milliseconds without a change before another pass is differentiated
const QUIET = 150; // milliseconds without a change before exact changes are computed
const NO_LOSS = "There is no loss yet: a loss needs a token and the one that follows it. Type at least two characters.";
const BLAME = {
  norm: "The darker, the more the loss would change if the token's vector changed a little in the worst direction. " +
    "Select a token for the loss at its position.",
  signed: "Red: making the token's vector longer increases the loss. Blue: it decreases the loss. " +
    "Minus this number is the first-order estimate of the change if the vector is set to zero.",
};

export function makeBack(find, model, change) {
  define(backTerms(() => found), find("back").closest("section"));
  const steps = stepsOf(model);
  let now = null, state = null, names = [];
  let found = null; // the gradients of the chosen loss: see `compute`

  const pick = (position) => change({ position, whole: false });
  const reveal = (step) => change({ step });
  const bars = makeStrip(find("back-bars"), "Norm of the gradient at each position", pick);
  const blame = makeStrip(find("back-blame"), "The text, colored by blame", pick);
  const map = makeMap(find, steps, reveal);
  const shares = makeShares(find, toggle, exactly);

  const shown = () => Math.min(Math.max(Math.round(state.step) || 1, 1), steps.length);
  find("back-next").addEventListener("click", () => reveal(Math.min(shown() + 1, steps.length)));
  find("back-previous").addEventListener("click", () => reveal(Math.max(shown() - 1, 1)));
  find("back-all").addEventListener("click", () => reveal(steps.length));
  find("back-loss").addEventListener("change", ({ target }) =>
    change(target.value === "" ? { whole: true } : { whole: false, position: Number(target.value) }));
  for (const name of ["back-norm", "back-signed"]) find(name).addEventListener("change", drawBlame);

  // Compute only what is near the window: typing stays quick while this part of the page is far away.
  let near = false, stale = false, timer = 0;
  const watching = new IntersectionObserver((entries) => {
    near = entries[entries.length - 1].isIntersecting;
    if (!near) shares.pause();
    else if (stale) draw();
    else shares.resume();
  }, { rootMargin: "50%" });
  watching.observe(find("back"));

  function show(newNow, newState) {
    [now, state] = [newNow, newState];
    stale = true;
    clearTimeout(timer);
    shares.pause();
    if (!near) return;
    // Another pass that was made elsewhere on the page, by typing or with a slider, is differentiated after a pause.
    const elsewhere = found && found.pass !== now.pass && !find("back").contains(document.activeElement);
    if (elsewhere) timer = setTimeout(draw, PAUSE);
    else draw();
  }

  const hasLoss = () => now.targets.some((target) => target >= 0);
  // The position of the loss; null for the whole text, also where the position has no next token.
  const positionOfLoss = () => (!state.whole && now.targets[state.position] >= 0 ? state.position : null);
  const nameOf = (token) => quoted(namesOf(model, [token])[0]);
  const placed = (i) => `${quoted(names[i])} at position ${i}`;

  function draw() {
    stale = false;
    clearTimeout(timer);
    shares.pause();
    names = namesOf(model, now.pass.tokens);
    find("back-parts").hidden = !hasLoss();
    drawChoice();
    if (!hasLoss()) return;
    compute();
    drawStep();
    map.show(found.norms, names, shown());
    drawBlame();
    const changed = changedParts(model, state.edits);
    shares.show(found.shares, (part) => changed.get(part)?.scale === 0);
    shares.resume(QUIET);
  }

  // Differentiate the chosen loss, where it is another one than before.
  function compute() {
    const { pass, targets } = now, position = positionOfLoss();
    if (found && found.pass === pass && found.targets === targets && found.position === position) return;
    const weights = weightsOf(targets, position);
    const gradients = backward(model, pass, targets, weights, { params: false });
    const parts = sharesOf(model, pass, gradients).map((share) => ({ ...share, exact: null }));
    found = {
      ...{ pass, targets, position, weights, gradients },
      loss: weighted(now.losses, weights),
      norms: Object.fromEntries(steps.map(({ site }) => [site, norms(gradients.sites[site])])),
      products: products(gradients.sites.embedded, pass.sites.embedded),
      shares: parts.sort((a, b) => Math.abs(b.estimate) - Math.abs(a.estimate)),
    };
  }

  function drawChoice() {
    const count = now.targets.filter((target) => target >= 0).length;
    const options = [element("option", { value: "" }, `whole text: mean of ${count} predictions`)];
    now.targets.forEach((target, t) => {
      if (target < 0) return;
      options.push(element("option", { value: t }, `position ${t}: ${quoted(names[t])}, then ${nameOf(target)}`));
    });
    const position = positionOfLoss();
    find("back-loss").replaceChildren(...options);
    find("back-loss").value = position ?? "";
    find("back-loss").disabled = !count;
    const fallen = !state.whole && position === null;
    const reason = fallen ? "The selected position has no loss, so this is the loss of the whole text." : "";
    find("back-none").textContent = count ? reason : NO_LOSS;
    const loss = number(weighted(now.losses, weightsOf(now.targets, position)));
    find("back-value").textContent = count ? `L = ${loss} nats${position === null ? " per token" : ""}` : "";
  }

  function drawStep() {
    const at = shown() - 1, { site } = steps[at], values = found.norms[site];
    const [title, formula, meaning] = explained(model, steps[at]);
    const size = number(Math.hypot(...values));
    const before = at ? ` (one step before: ${number(Math.hypot(...found.norms[steps[at - 1].site]))})` : "";
    const reached = values.filter((value) => value > 0).length;
    const top = largest(values, 1).map((i) => ` Largest: ${placed(i)}, ${number(values[i])}.`);
    find("back-step").textContent = `Step ${at + 1} of ${steps.length}: ${title}`;
    find("back-meaning").textContent = meaning;
    find("back-formula").innerHTML = formula; // one of equations.js
    find("back-sizes").textContent =
      `Gradient at ${site}: norm ${size}${before}. It has reached ${reached} of ${values.length} positions.${top}`;
    const most = Math.max(...values) || 1;
    showStrip(bars, (i) => ({ title: `norm ${number(values[i])}`, level: values[i] / most }));
    find("back-next").disabled = find("back-all").disabled = at === steps.length - 1;
    find("back-previous").disabled = at === 0;
  }

  function showStrip(strip, look) {
    strip.show(names, look, found.position, found.position === null ? null : found.position + 1);
  }

  function drawBlame() {
    if (!found) return;
    const kind = find("back-signed").checked ? "signed" : "norm";
    const values = kind === "signed" ? found.products : found.norms.embedded;
    const sizes = Array.from(values, Math.abs), most = Math.max(...sizes) || 1;
    const text = (i) => (kind === "signed" ? `${number(values[i])} nats` : `norm ${number(values[i])}`);
    showStrip(blame, (i) => ({ title: text(i), share: values[i] / most }));
    const [first, ...others] = largest(sizes, 3).map((i) => `${placed(i)} (${text(i)})`);
    const { position, targets } = found;
    const one = position === null ? "" : `The loss of ${nameOf(targets[position])} after position ${position}`;
    const what = one || "The loss of the whole text";
    const rest = others.length ? `, then on ${others.join(" and ")}` : "";
    const on = first ? `depends most on ${first}${rest}` : "does not depend on the text";
    find("back-blamed").textContent = `${what} ${on}.`;
    find("back-blame-hint").textContent = BLAME[kind];
  }

  function toggle(part) {
    const others = without(model, state.edits, part);
    const off = changedParts(model, state.edits).get(part)?.scale === 0;
    change({ edits: off ? others : [...others, ...scaled(model, part, 0)] });
  }

  // The change of the chosen loss if a part is switched off, by a forward pass without it.
  function exactly(part) {
    const { tokens, edits } = found.pass;
    const pass = forward(model, tokens, [...edits, ...scaled(model, part, 0)]);
    return weighted(losses(pass, found.targets), found.weights) - found.loss;
  }

  return { show };
}
