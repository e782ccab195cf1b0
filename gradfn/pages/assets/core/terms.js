// The words of the page: hovering, focusing or tapping a term shows what it means, with the numbers of what is open.
//
// In HTML: <dfn data-term="nats">nats</dfn>; in JavaScript: term("nats") or term("nats", "nats per token").
import { element } from "gradfn/core/dom.js";

const MARGIN = 8; // pixels between a meaning, its term and the edges of the window
const LINGER = 200; // milliseconds in which the pointer may move from a term to its meaning

const common = new Map();
const own = new Map(); // by section: the terms of one network of the page

// Add terms: { name: { meaning, formula } }. `meaning` is text; `formula`, where there is one, returns HTML with the
// actual numbers, or null. With a section they hold in it alone, so that each network of a page shows its own numbers.
export function define(more, section = null) {
  const terms = section ? own.get(section) || own.set(section, new Map()).get(section) : common;
  for (const [name, each] of Object.entries(more)) {
    if (!each.meaning) throw new Error(`The term "${name}" has no meaning`);
    terms.set(name, each);
  }
}

// An element that shows a term's meaning.
export function term(name, text = name) {
  return element("dfn", { "data-term": name }, text);
}

function found(of) {
  const name = of.dataset.term, section = of.closest("section.live");
  const each = (section && own.get(section)?.get(name)) || common.get(name);
  if (!each) throw new Error(`The term "${name}" is not defined`);
  return each;
}

// Show the meanings of all terms, those that are added to the page later, too. Unknown terms are errors of the page.
export function connectTerms() {
  for (const each of document.querySelectorAll("[data-term]")) connect(each);
  new MutationObserver((changes) => {
    for (const { addedNodes } of changes)
      for (const node of addedNodes) {
        if (!(node instanceof Element)) continue;
        if (node.dataset.term) connect(node);
        for (const each of node.querySelectorAll("[data-term]")) connect(each);
      }
  }).observe(document.body, { childList: true, subtree: true });

  const termOf = (event) => (event.target instanceof Element ? event.target.closest("[data-term]") : null);
  document.addEventListener("pointerover", (event) => {
    const each = termOf(event);
    if (each && event.pointerType !== "touch") show(each);
    else if (bubble.contains(event.target)) clearTimeout(leaving);
    else if (shown && document.activeElement !== shown) hideSoon();
  });
  document.addEventListener("focusin", (event) => (termOf(event) ? show(termOf(event)) : hide()));
  document.addEventListener("focusout", (event) => termOf(event) && hide());
  document.addEventListener("click", (event) => {
    if (termOf(event)) show(termOf(event));
    else if (!bubble.contains(event.target)) hide();
  });
  // Before others: Escape closes the meaning alone.
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || !shown) return;
    event.stopPropagation();
    event.preventDefault();
    hide();
  }, true);
  const options = { capture: true, passive: true };
  for (const kind of ["scroll", "resize"]) addEventListener(kind, () => shown && place(), options);
}

// Screen readers get the meaning as the description of the term.
function connect(each) {
  try {
    describe(each, found(each));
  } catch (error) {
    return reportError(error);
  }
  if (!each.closest("button, a, summary")) each.tabIndex = 0;
}

const descriptions = element("div", { hidden: "" });
function describe(each, { meaning, formula }) {
  if (!descriptions.isConnected) document.body.append(descriptions);
  const section = each.closest("section.live");
  const id = `term-${section ? section.id : "page"}-${each.dataset.term.replace(/\W+/g, "-")}`;
  const text = document.getElementById(id) || descriptions.appendChild(element("p", { id }));
  const now = element("span");
  now.innerHTML = (formula && formula()) || "";
  text.textContent = [meaning, now.textContent].filter(Boolean).join(" ");
  each.setAttribute("aria-describedby", id);
}

// What is seen: one box above all others. Screen readers have the description.
const bubble = element("div", { class: "meaning-of", popover: "manual", "aria-hidden": "true" });
let shown = null; // the term whose meaning is shown
let leaving = 0;

function show(each) {
  clearTimeout(leaving);
  const { meaning, formula } = found(each);
  describe(each, { meaning, formula }); // with the numbers of now
  if (!bubble.isConnected) document.body.append(bubble);
  const parts = [element("b", {}, each.dataset.term), element("p", {}, meaning)];
  const now = formula && formula();
  if (now) {
    parts.push(element("p", { class: "formula" }));
    parts[2].innerHTML = now;
  }
  bubble.replaceChildren(...parts);
  if (!shown) bubble.showPopover();
  shown = each;
  place();
}

function hide() {
  clearTimeout(leaving);
  if (shown) bubble.hidePopover();
  shown = null;
}

function hideSoon() {
  clearTimeout(leaving);
  leaving = setTimeout(hide, LINGER);
}

// Below its term, above it where there is no room, and inside of the window.
function place() {
  if (!shown.isConnected) return hide();
  const at = shown.getBoundingClientRect(), size = bubble.getBoundingClientRect();
  const below = at.bottom + MARGIN, above = at.top - MARGIN - size.height;
  const left = Math.max(Math.min(at.left, document.documentElement.clientWidth - size.width - MARGIN), MARGIN);
  bubble.style.left = `${left}px`;
  bubble.style.top = `${below + size.height > innerHeight && above > 0 ? above : below}px`;
}

define({
  nats: {
    meaning: "The unit of the loss: −log p, where p is the probability of the correct label or token. 0 nats is " +
      "certain and right, 0.69 nats are p = 50 %, 2.3 nats are p = 10 %.",
  },
  loss: { meaning: "One number that says how wrong the prediction is. Training decreases it." },
  gradient: {
    meaning: "How fast the loss changes if a value increases slightly. Positive (red): the loss increases. Negative " +
      "(blue): it decreases. Training moves each parameter against its gradient.",
  },
  weight: { meaning: "A number that is learned: a node multiplies one of its inputs by it." },
  bias: { meaning: "A number that is learned: a node adds it to its weighted sum." },
  "weighted sum": {
    meaning: "Each input times its weight, all added up. With the bias it is z, the input of the activation.",
  },
  activation: {
    meaning: "The output of a node: a function such as sigmoid or relu of its weighted sum plus its bias.",
  },
  rms: {
    meaning: "Root mean square: the square root of the mean of the squares. The typical size of many numbers, " +
      "whatever their signs.",
  },
  saturated: {
    meaning: "The node is at the flat end of its activation: its slope is almost 0, so almost no gradient passes " +
      "through it, and its weights hardly learn.",
  },
  dead: {
    meaning: "The node is 0 for every example. No gradient passes through it, so its weights do not learn any more.",
  },
  "bias for inactivity": {
    meaning: "A negative bias keeps a node inactive: its weighted sum must be larger than that before it fires.",
  },
  logit: {
    meaning: "A score before softmax: any number. The larger it is against the others, the more probable its label " +
      "or token.",
  },
  softmax: {
    meaning: "Turns scores into probabilities: e to the power of each score, divided by the sum of these. They are " +
      "positive and add up to 100 %.",
  },
  "noise scale": {
    meaning: "The number of examples in a batch at which noise and signal of its gradient are equally large. Much " +
      "smaller batches give mostly noise; much larger ones hardly help.",
  },
  step: { meaning: "One update of all parameters, from the gradient of one batch of examples." },
  epoch: { meaning: "One pass through all training examples, in batches." },
});
