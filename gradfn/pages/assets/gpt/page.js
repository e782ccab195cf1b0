// The GPT in the page: it reads a text, predicts each next token, and shows how it gets there.
import { number, within } from "gradfn/core/dom.js";
import { keepInAddress } from "gradfn/core/hash.js";
import { makeLesson } from "gradfn/core/lesson.js";
import { newPalette } from "gradfn/core/paint.js";
import { define } from "gradfn/core/terms.js";
import { fromAddress, toAddress } from "gradfn/gpt/address.js";
import { makeAttention } from "gradfn/gpt/attention.js";
import { makeBack } from "gradfn/gpt/back.js";
import { paramsAt } from "gradfn/gpt/checkpoints.js";
import { editsFromText, editsToText, makeIntervene } from "gradfn/gpt/intervene.js";
import { makeLens } from "gradfn/gpt/lens_view.js";
import { lessonOf } from "gradfn/gpt/lesson.js";
import { build } from "gradfn/gpt/model.js";
import { percent, quoted } from "gradfn/gpt/names.js";
import { makeNext, most } from "gradfn/gpt/next.js";
import { compute } from "gradfn/gpt/now.js";
import { distribution } from "gradfn/gpt/sampling.js";
import { termsOf } from "gradfn/gpt/terms.js";
import { makeText } from "gradfn/gpt/text.js";
import { makeTime } from "gradfn/gpt/time.js";
import { decode, encode, newLine } from "gradfn/gpt/tokenizer.js";
import { extended, makeWriting, readBy } from "gradfn/gpt/write.js";

const ADDRESS_DELAY = 300, SAID_DELAY = 500; // milliseconds; browsers refuse addresses that change much more often
const BYTES = 4; // of a character, at most
const UNDONE = 50; // texts to go back to
const COMPUTED = ["tokens", "checkpoint", "edits"]; // parts of the state that need a forward pass

export function start(section, content) {
  const find = within(section);
  const model = build(content);
  const checkpoints = model.checkpoints || [];
  const before = []; // texts to go back to
  // `position` is a token's index: the model's prediction after it is shown. `total` counts the tokens of the whole
  // text, `written` those that the model wrote. `whole` says which loss is differentiated: of the text, or of the
  // position.
  const state = {
    ...read((model.samples || [])[0] ?? ""),
    checkpoint: Math.max(checkpoints.length - 1, 0),
    edits: [],
    temperature: 1,
    topK: null,
    seed: 0,
    whole: true,
    head: 0,
    direction: "from",
    step: 0,
  };
  let now = compute(model, state);

  define(termsOf(model, () => now, () => state), section);
  newPalette();
  const writing = makeWriting(find, model, state, () => now, change, append);
  const text = makeText(find, model, change, preview);
  const attention = makeAttention(find, model, change);
  const time = makeTime(find, model, change, lossAt);
  const views = [writing, text, makeNext(find, model, appendHere), attention, makeLens(find, model), time];
  views.push(makeIntervene(find, model, change), makeBack(find, model, change));
  const lesson = makeLesson(section, lessonOf(find, model, state, () => now));

  // Return what of the state a text decides: the tokens that are read, and the position of the last one. Of an empty
  // text the model reads a line break, or its first token without one.
  function read(typed) {
    const { tokens: all, unknown } = encode(model, typed);
    const tokens = all.length ? readBy(model, all) : Int32Array.of(Math.max(newLine(model), 0));
    const start = all.length ? "" : decode(model, tokens);
    return { text: typed, tokens, total: all.length || 1, unknown, start, written: 0, position: tokens.length - 1 };
  }

  function change(what) {
    if ("text" in what && !("tokens" in what)) {
      remember();
      writing.stop();
      what = { ...read(what.text), ...what };
    }
    if ("position" in what && what.position === null) what = { ...what, position: Infinity };
    Object.assign(state, what);
    state.position = Math.min(Math.max(state.position, 0), state.tokens.length - 1);
    if ("checkpoint" in what && checkpoints.length) model.params = paramsAt(model, state.checkpoint);
    if (COMPUTED.some((part) => part in what)) now = compute(model, state);
    show();
  }

  // Append a token at the end, as the model writes.
  function append(token) {
    if (!state.written) remember();
    extend(state, token);
  }

  // Continue after the chosen position with another token: what followed is dropped.
  function appendHere(token) {
    writing.stop();
    const { tokens, position } = state;
    if (position === tokens.length - 1) return append(token);
    remember();
    const kept = tokens.slice(0, position + 1);
    const total = state.total - (tokens.length - kept.length);
    extend({ text: decode(model, kept), tokens: kept, total, written: 0, start: "" }, token);
  }

  function extend({ text, tokens: old, total, written, start }, token) {
    const tokens = extended(old, token, model.context);
    change({
      text: start ? decode(model, tokens) : joined(text, old, token),
      tokens,
      total: total + 1,
      unknown: [],
      start: "",
      written: Math.min(written + 1, tokens.length),
      position: tokens.length - 1,
    });
  }

  // The text with one more token. Integers stand apart; the last bytes of a character are read together with the first.
  function joined(typed, before, token) {
    if (!model.tokenizer) return `${typed.trim()} ${token}`;
    for (let n = Math.min(BYTES - 1, before.length); n > 0; n--) {
      const last = before.slice(-n), end = decode(model, last);
      if (typed.endsWith(end))
        return typed.slice(0, typed.length - end.length) + decode(model, Int32Array.of(...last, token));
    }
    return typed + decode(model, Int32Array.of(token));
  }

  function remember() {
    const { text, tokens, total, unknown, start: startToken, written, position } = state;
    if (before.length && before[before.length - 1].text === text) return;
    before.push({ text, tokens, total, unknown, start: startToken, written, position });
    before.splice(0, before.length - UNDONE);
  }

  find("undo").addEventListener("click", () => {
    writing.stop();
    const last = before.pop();
    if (last) change(last);
  });

  // The loss of the text at another checkpoint.
  function lossAt(i) {
    const params = model.params;
    model.params = paramsAt(model, i);
    const { loss } = compute(model, state);
    model.params = params;
    return loss;
  }

  // Show the attention of a token under the pointer; null shows that of the chosen one again.
  function preview(position) {
    const shown = position === null ? state : { ...state, position };
    text.show(now, shown);
    attention.show(now, shown);
    lesson.update();
  }

  function show() {
    for (const view of views) view.show(now, state);
    find("undo").disabled = !before.length;
    lesson.update();
    keepSoon();
    saySoon();
  }

  // The address has what the model reads, which decides all that is shown.
  const keepSoon = soon(ADDRESS_DELAY, () => {
    const reads = state.start ? "" : state.total > state.tokens.length ? decode(model, state.tokens) : state.text;
    keep(toAddress(state, model, reads, (edits) => editsToText(edits, model)));
  });

  const saySoon = soon(SAID_DELAY, () => {
    const { vocab } = model.config, { position } = state;
    const row = now.pass.logits.subarray(position * vocab, (position + 1) * vocab);
    const probabilities = distribution(row, state), [first] = most(probabilities, 1);
    const loss = Number.isNaN(now.losses[position]) ? "" : ` Loss ${number(now.losses[position])} nats.`;
    const after = `After ${quoted(now.names[position])} at position ${position}`;
    find("status").textContent = `${after}: ${quoted(decode(model, Int32Array.of(first)))} ` +
      `${percent(probabilities[first])}.${loss}`;
  });

  const keep = keepInAddress(section, (texts) => {
    const { position, ...found } = fromAddress(texts, model, (edits) => editsFromText(edits, model));
    change(found);
    if (position !== null) change({ position });
  });
  before.length = 0; // what the address restores is where the page starts

  document.documentElement.addEventListener("theme", () => {
    newPalette();
    attention.repaint();
    show();
  });
  show();

  // For tests, and for use in the browser's console.
  return { model, state, now: () => now, change, append, appendHere, writing, lossAt, lesson };
}

// Return a function that calls `act` once it has not been called for some milliseconds.
function soon(delay, act) {
  let timer = 0;
  return () => {
    clearTimeout(timer);
    timer = setTimeout(act, delay);
  };
}
