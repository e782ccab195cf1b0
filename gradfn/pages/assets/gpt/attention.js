// Attention: the pattern of every head, and what every head attends to from the chosen token, or from where it is
// attended to.
import { element } from "gradfn/core/dom.js";
import { paint } from "gradfn/core/paint.js";
import { headsOf, nameOf, patternOf, percent, quoted } from "gradfn/gpt/names.js";
import { only, rove } from "gradfn/gpt/rove.js";
import { attentionOf } from "gradfn/gpt/text.js";

const HABIT = 0.3; // share of its attention from which a head has a habit
const HABITS = ["itself", "the previous token", "the first token"];

export function makeAttention(find, model, change) {
  const heads = headsOf(model), perBlock = model.config.n_heads;
  const grid = find("heads"), rows = find("rows");
  const buttons = heads.map((head, i) => {
    const button = element("button", { type: "button", class: "head", onclick: () => change({ head: i }) });
    button.append(element("canvas", { class: "pixels" }),
      element("span", {}, element("b", {}, nameOf(head)), element("small")));
    return button;
  });
  grid.style.setProperty("--heads", Math.min(perBlock, 8));
  grid.append(...buttons);
  const arrows = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -perBlock, ArrowDown: perBlock };
  rove(grid, () => buttons, () => arrows, (i) => change({ head: i }));

  const lines = heads.map((head, i) => {
    const button = element("button", { type: "button", class: "head-row", tabindex: "-1",
      onclick: () => change({ head: i }) });
    button.append(element("b", {}, nameOf(head)), element("canvas", { class: "pixels" }), element("small"));
    return button;
  });
  rows.append(...lines);
  rove(rows, () => lines, () => ({ ArrowUp: -1, ArrowDown: 1 }), (i) => change({ head: i }));
  for (const direction of ["from", "to"]) find(direction).addEventListener("change", () => change({ direction }));

  let painted = null; // the pass whose patterns are painted

  function paintPatterns(pass) {
    const n = pass.tokens.length;
    buttons.forEach((button, i) => {
      const pattern = patternOf(model, pass, heads[i]);
      paint(button.firstChild, pattern.map(Math.sqrt), n, null);
      const { words, share } = habit(pattern, n);
      const short = words.replace("the ", "").replace(" token", "");
      button.lastChild.lastChild.textContent = words ? `${short} ${Math.round(100 * share)} %` : "spread";
      const looks = words ? `attends mostly to ${words}, ${percent(share)} on average` : "attends to many tokens";
      button.setAttribute("aria-label", `Head ${heads[i].head} of block ${heads[i].block}: ${looks}`);
    });
    painted = pass;
  }

  function show(now, { position, head, direction }) {
    const n = now.pass.tokens.length;
    if (painted !== now.pass) paintPatterns(now.pass);
    for (const each of [buttons, lines]) {
      each.forEach((button, i) => button.setAttribute("aria-pressed", i === head));
      only(each, head);
    }
    find(direction).checked = true;
    const from = direction === "from";
    const title = from ? "What every head attends to from" : "How much every later token attends to";
    find("rows-title").textContent = `${title} ${quoted(now.names[position])} at position ${position}`;
    lines.forEach((line, i) => {
      const weights = attentionOf(patternOf(model, now.pass, heads[i]), n, position, direction);
      const largest = weights.indexOf(Math.max(...weights));
      const said = `most ${from ? "to" : "from"} ${quoted(now.names[largest])} at ${largest}, ` +
        `${percent(weights[largest])}`;
      paint(line.children[1], weights.map(Math.sqrt), n, null);
      line.lastChild.textContent = said;
      line.setAttribute("aria-label", `Head ${heads[i].head} of block ${heads[i].block}: ${said}`);
    });
  }

  return { show, repaint: () => (painted = null) };
}

// What a head attends to most, averaged over positions from the third on: { words, share }, "" where it is below HABIT.
export function habit(pattern, n) {
  const sums = [0, 0, 0];
  for (let t = 2; t < n; t++) [t, t - 1, 0].forEach((s, i) => (sums[i] += pattern[t * n + s]));
  const largest = sums.indexOf(Math.max(...sums)), share = n > 2 ? sums[largest] / (n - 2) : 0;
  return { words: share >= HABIT ? HABITS[largest] : "", share };
}
