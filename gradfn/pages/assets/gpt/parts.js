// The parts of the network that can be changed, their names in the address, and the edits that they stand for.
//
// A part is a letter, its block and perhaps its head: h0.2 (head 2 of block 0), m1 (the feed-forward layer of block 1).
import { encode } from "gradfn/gpt/tokenizer.js";
import { forward } from "gradfn/gpt/forward.js";
import { placeOf, siteOf } from "gradfn/gpt/model.js";

const LEAVES = { h: "mixed", a: "attention_out", m: "feed_out", d: "residual_mid", r: "residual" };
export const LARGEST = 2; // factor of a part

// The names of all parts that can be switched off, block by block.
export function switches({ config }) {
  return Array.from({ length: config.n_layers }, (_, block) => [
    ...Array.from({ length: config.n_heads }, (_, head) => `h${block}.${head}`),
    `a${block}`,
    ...(config.feed ? [`m${block}`] : []),
    `b${block}`,
  ]);
}

// The names of all parts that can get their values from another text: also the residual stream.
export function sources(model) {
  const ofStream = (block) => (model.config.feed ? [`d${block}`, `r${block}`] : [`r${block}`]);
  return ["e", ...switches(model).flatMap((parts, block) => [...parts, ...ofStream(block)])];
}

// What a part is called in a sentence.
export function partName(part) {
  if (part === "e") return "the embedding";
  const { letter, block, head } = split(part);
  if (letter === "h") return `head ${head} of block ${block}`;
  if (letter === "b") return `the whole block ${block}`;
  if (letter === "r") return `the stream after block ${block}`;
  if (letter === "d") return `the stream after the attention of block ${block}`;
  return `the ${letter === "a" ? "attention" : "feed-forward layer"} of block ${block}`;
}

// What a head or a feed-forward layer is called in a list.
export function shortName(part) {
  const { letter, block, head } = split(part);
  return `${letter === "h" ? `Head ${head}` : "Feed-forward"}, block ${block}`;
}

// The sites of a part, each with its head or null.
export function sitesOf({ config }, part) {
  if (part === "e") return [{ site: "embedded", head: null }];
  const { letter, block, head } = split(part);
  const ofBlock = config.feed ? [LEAVES.a, LEAVES.m] : [LEAVES.a];
  const leaves = letter === "b" ? ofBlock : [LEAVES[letter]];
  return leaves.map((leaf) => ({ site: siteOf(config, block, leaf), head }));
}

function split(part) {
  const [, letter, block, head] = part.match(/^([a-z])(\d+)(?:\.(\d+))?$/);
  return { letter, block: Number(block), head: head === undefined ? null : Number(head) };
}

// The edits that multiply a part by a factor.
export function scaled(model, part, scale) {
  return sitesOf(model, part).map(({ site, head }) => ({ part, site, head, positions: null, scale }));
}

// The edits that give a part, at some positions, the values that it has for another text. These are computed when they
// are used, with the parameters that the model has then. null where the text does not fit.
export function taken(model, part, from, positions) {
  const { tokens } = encode(model, from);
  if (!tokens.length || tokens.length > model.context || !positions.length) return null;
  let sites = null, of = null;
  const sitesNow = () => {
    if (of !== model.params) [of, sites] = [model.params, forward(model, tokens).sites];
    return sites;
  };
  return sitesOf(model, part).map(({ site, head }) => ({
    part,
    site,
    head,
    positions,
    from,
    length: tokens.length,
    get values() {
      return sitesNow()[site].values;
    },
  }));
}

// The edits that apply to a text of n tokens: values of another text need one of equal length.
export const applicable = (edits, n) => edits.filter(({ length }) => length === undefined || length === n);

// Edits without those of a part.
export const without = (model, edits, part) => edits.filter((edit) => partOf(model, edit) !== part);

// The parts that are changed, in order, each with one of its edits.
export function changedParts(model, edits) {
  const parts = new Map();
  for (const edit of edits) if (!parts.has(partOf(model, edit))) parts.set(partOf(model, edit), edit);
  return parts;
}

// The part of an edit, also where only its site is given.
export function partOf({ config }, { part, site, head }) {
  if (part) return part;
  if (site === "embedded") return "e";
  const { block, part: leaf } = placeOf(config, site);
  const letter = Object.keys(LEAVES).find((each) => LEAVES[each] === leaf);
  return `${letter}${block}${head === null || head === undefined ? "" : `.${head}`}`;
}

// Edits as a compact text for the address: "h0.2*0,m1*0.5,r0<another%20text@3-5.8".
export function editsToText(edits, model) {
  const texts = [...changedParts(model, edits)].map(([part, { scale, from, positions }]) =>
    from === undefined ? `${part}*${scale}` : `${part}<${encodeURIComponent(from)}@${rangesOf(positions)}`);
  return texts.join(",");
}

// The edits of such a text; what is not understood is left out.
export function editsFromText(text, model) {
  const known = new Set(sources(model)), changeable = new Set(switches(model).flat()), found = [];
  for (const each of String(text || "").slice(0, 50_000).split(",").slice(0, 500)) {
    const [, part, kind, rest] = each.match(/^([a-z][\d.]*)([*<])(.*)$/s) || [];
    if (!(kind === "*" ? changeable : known).has(part)) continue;
    known.delete(part);
    changeable.delete(part);
    found.push(...((kind === "*" ? factor(model, part, rest) : source(model, part, rest)) || []));
  }
  return found;
}

function factor(model, part, text) {
  const scale = /^\d+(\.\d+)?$/.test(text) ? Number(text) : NaN;
  return scale >= 0 && scale <= LARGEST && scale !== 1 ? scaled(model, part, scale) : null;
}

function source(model, part, text) {
  const [coded, ranges] = text.split("@");
  try {
    const from = decodeURIComponent(coded);
    return taken(model, part, from, positionsOf(ranges || "", encode(model, from).tokens.length, "."));
  } catch {
    return null; // a percent sign that encodes nothing
  }
}

// Positions as ranges: [3, 4, 5, 8] is "3-5.8".
export function rangesOf(positions, separator = ".") {
  const ranges = [];
  for (const position of positions) {
    const last = ranges[ranges.length - 1];
    if (last && last[1] === position - 1) last[1] = position;
    else ranges.push([position, position]);
  }
  return ranges.map(([first, last]) => (first === last ? `${first}` : `${first}-${last}`)).join(separator);
}

// The positions below n of such a text; [] where it is not understood.
export function positionsOf(text, n, separator = ",") {
  const positions = new Set();
  for (const range of text.split(separator)) {
    const found = range.trim().match(/^(\d{1,6})(?:\s*-\s*(\d{1,6}))?$/);
    if (!found) return [];
    const first = Number(found[1]), last = Number(found[2] ?? found[1]);
    if (last < first || last >= n) return [];
    for (let position = first; position <= last; position++) positions.add(position);
  }
  return [...positions].sort((a, b) => a - b);
}
