// Writing: the model appends tokens to the text, one at a time, sampled with a seed so that it can be repeated.
import { distribution, sample } from "gradfn/gpt/sampling.js";
import { newLine } from "gradfn/gpt/tokenizer.js";

export const LARGEST_SEED = 0xffffffff;

// A number in [0, 1) for a seed and the number of tokens so far: the same text is continued in the same way.
export function uniform(seed, i) {
  let bits = (seed ^ Math.imul(i + 1, 0x9e3779b1)) >>> 0;
  for (const [shift, factor] of [[16, 0x85ebca6b], [13, 0xc2b2ae35]])
    bits = Math.imul(bits ^ (bits >>> shift), factor) >>> 0;
  return ((bits ^ (bits >>> 16)) >>> 0) / 2 ** 32;
}

// The tokens that the model reads after one more: all of them, or, where its context is full, the later half, as
// gf.generate.
export function extended(tokens, token, context) {
  const all = Int32Array.of(...tokens, token);
  return all.length > context ? all.slice(-Math.max(Math.floor(context / 2), 1)) : all;
}

// The tokens of a text that the model reads: the last ones; where each line is a text of its own, those of the last
// line.
export function readBy(model, tokens) {
  const last = tokens.slice(-model.context);
  const start = model.lines && last.length > 1 ? last.lastIndexOf(newLine(model), last.length - 2) : 0;
  return last.slice(Math.max(start, 0));
}

// Whether the tokens end with the end of a line that is a text of its own.
const endsLine = (model, tokens) => model.lines && tokens.length > 1 && tokens[tokens.length - 1] === newLine(model);

// Make its controls. `now()` and `state` are what the page shows; `append(token)` writes one at the end.
export function makeWriting(find, model, state, now, change, append) {
  const writeOn = find("write-on"), temperature = find("temperature"), topK = find("top-k"), seed = find("seed");
  let running = false;

  find("write").addEventListener("click", () => {
    stop();
    write();
  });
  writeOn.addEventListener("click", () => (running ? stop() : run()));
  temperature.addEventListener("input", () => change({ temperature: +temperature.value }));
  topK.max = model.config.vocab;
  topK.addEventListener("input", () => change({ topK: bounded(topK.value, 1, model.config.vocab, null) }));
  seed.addEventListener("input", () => change({ seed: bounded(seed.value, 0, LARGEST_SEED, 0) }));

  function write() {
    if (endsLine(model, state.tokens)) change({ tokens: state.tokens.slice(-1), written: 0 });
    const { vocab } = model.config, n = state.tokens.length;
    const row = now().pass.logits.subarray((n - 1) * vocab, n * vocab);
    const token = sample(distribution(row, state), uniform(state.seed, state.total));
    append(token);
    return !endsLine(model, state.tokens);
  }

  function run() {
    running = true;
    const next = () => {
      if (!running) return;
      if (!write()) return stop();
      requestAnimationFrame(next);
    };
    requestAnimationFrame(next);
    label();
  }

  function stop() {
    running = false;
    label();
  }

  function label() {
    writeOn.textContent = running ? "Stop" : "Write on";
    writeOn.setAttribute("aria-pressed", running);
  }

  function show() {
    temperature.value = state.temperature;
    temperature.setAttribute("aria-valuetext",
      state.temperature ? `${state.temperature}` : "0, always the most probable token");
    find("temperature-value").textContent = state.temperature.toFixed(1);
    if (document.activeElement !== topK) topK.value = state.topK === null ? "" : state.topK;
    if (document.activeElement !== seed) seed.value = state.seed;
  }

  return { show, stop, write, running: () => running };
}

// A text as an integer between bounds; `otherwise` where it is none.
export function bounded(text, least, most, otherwise) {
  const value = Math.round(Number(text));
  return text === "" || text === null || !Number.isFinite(value) ? otherwise : Math.min(Math.max(value, least), most);
}
