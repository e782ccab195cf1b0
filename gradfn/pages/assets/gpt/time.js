// Time: the model at the checkpoints that its training kept.
import { number } from "gradfn/core/dom.js";

const PACE = 700; // milliseconds per checkpoint
const QUIET = 400; // milliseconds without a change, before the losses of the other checkpoints are computed
const still = matchMedia("(prefers-reduced-motion: reduce)");

// Make it: `lossAt(i)` computes the loss of the text at a checkpoint.
export function makeTime(find, model, change, lossAt) {
  const kept = model.checkpoints || [];
  if (kept.length < 2) return { show() {}, stop() {} };
  const slider = find("checkpoint"), play = find("play"), last = kept.length - 1;
  find("time").hidden = false;
  slider.max = last;
  let timer = 0, filling = 0, at = last, losses = new Map(), key = "";

  slider.addEventListener("input", () => {
    stop();
    change({ checkpoint: +slider.value });
  });
  play.addEventListener("click", () => {
    if (timer) return stop();
    const next = () => change({ checkpoint: at === last ? 0 : at + 1 });
    next();
    // Whoever wants less motion steps from one checkpoint to the next.
    if (still.matches) return;
    timer = setInterval(() => (at === last ? stop() : next()), PACE);
    label();
  });
  still.addEventListener("change", stop);

  function stop() {
    clearInterval(timer);
    timer = 0;
    label();
  }

  function label() {
    play.textContent = still.matches ? (at === last ? "From the start" : "Next checkpoint") : timer ? "Stop" : "Play";
  }

  function show(now, state) {
    at = state.checkpoint;
    slider.value = at;
    const { step, loss } = kept[at];
    const ofSamples = Number.isFinite(loss) ? ` Loss of the sample texts: ${number(loss)} nats per token.` : "";
    const own = Number.isFinite(now.loss) ? ` Of this text: ${number(now.loss)}.` : "";
    const said = `Step ${step.toLocaleString("en")} of ${kept[last].step.toLocaleString("en")}.${ofSamples}${own}`;
    find("checkpoint-said").textContent = said;
    slider.setAttribute("aria-valuetext", said);
    const of = `${state.tokens.join()}/${state.edits.map(({ site, head, scale, from }) => [site, head, scale, from])}`;
    if (of !== key) losses = new Map();
    key = of;
    clearTimeout(filling);
    if (Number.isFinite(now.loss)) {
      losses.set(at, now.loss);
      filling = setTimeout(fill, QUIET);
    }
    draw();
    label();
  }

  // Compute the loss at one more checkpoint; one at a time, so that the page stays quick.
  function fill() {
    const missing = kept.findIndex((_, i) => !losses.has(i));
    if (missing < 0) return;
    losses.set(missing, lossAt(missing));
    draw();
    filling = setTimeout(fill, 0);
  }

  // The losses of the text at the checkpoints; the large dot is the one that is open.
  function draw() {
    const largest = Math.max(...losses.values(), 0.1);
    const x = (i) => 6 + (588 * i) / last, y = (loss) => 50 - (44 * loss) / largest;
    const known = [...losses].sort((a, b) => a[0] - b[0]);
    const points = known.map(([i, loss]) => `${x(i).toFixed(1)},${y(loss).toFixed(1)}`);
    const parts = [shape("polyline", { points: points.join(" "), class: "line c0" })];
    for (const [i, loss] of known) parts.push(shape("circle",
      { cx: x(i), cy: y(loss), r: i === at ? 5 : 2.5, class: "dot" }));
    find("time-line").replaceChildren(...parts);
    const to = known.length ? `: 0 (bottom) to ${number(largest)} nats per token`
      : " is unknown: it predicts nothing yet";
    find("time-caption").textContent = `Loss of this text at each checkpoint${to}`;
  }

  return { show, stop };
}

function shape(tag, attributes) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}
