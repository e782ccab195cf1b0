// How tokens and heads are called on the page.
import { siteOf } from "gradfn/gpt/model.js";

const MARKS = { " ": "␣", "\n": "↵", "\r": "␍", "\t": "⇥" };
const SPOKEN = { " ": "space", "\n": "line break", "\r": "carriage return", "\t": "tab", "↵": "line break",
  "␍": "carriage return", "⇥": "tab" };

// A token as it is shown: white space and control characters have marks.
export function visible(text) {
  const marked = Array.from(text, (letter) => {
    if (MARKS[letter]) return MARKS[letter];
    const code = letter.codePointAt(0);
    return code < 32 || (code >= 127 && code < 160) ? `\\x${code.toString(16).padStart(2, "0")}` : letter;
  });
  return marked.join("") || "∅";
}

// A token as a screen reader should say it.
export const spoken = (text) => SPOKEN[text] || (text.trim() ? text.replaceAll("\n", " line break ") : "spaces");

export const quoted = (text) => `‘${visible(text)}’`;

export { percent } from "gradfn/core/dom.js";

// The heads of a model: { block, head } of each, block after block.
export function headsOf(model) {
  const { n_layers: blocks, n_heads: heads } = model.config;
  return Array.from({ length: blocks * heads }, (_, i) => ({ block: Math.floor(i / heads), head: i % heads }));
}

export const nameOf = ({ block, head }) => `${block}.${head}`;

// The probabilities of one head, [T, T]: row t is where position t attends to.
export function patternOf(model, pass, { block, head }) {
  const { values } = pass.sites[siteOf(model.config, block, "probabilities")];
  const size = pass.tokens.length ** 2;
  return values.subarray(head * size, (head + 1) * size);
}
