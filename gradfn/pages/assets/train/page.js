// Training in the page: controls, the loop of steps, and the views of what was measured.
import { element, within } from "gradfn/core/dom.js";
import { keepInAddress } from "gradfn/core/hash.js";
import { makeLesson } from "gradfn/core/lesson.js";
import { newPalette } from "gradfn/core/paint.js";
import { makePicture } from "gradfn/train/boundary.js";
import { isPreset, makeControls, presetSettings, RESTARTING, settingsOf,
  validSettings } from "gradfn/train/controls.js";
import { makeGradientsView } from "gradfn/train/gradients_view.js";
import { lessonSteps } from "gradfn/train/lesson.js";
import { makeLossView } from "gradfn/train/loss_view.js";
import { makeSigns, plain } from "gradfn/train/signs.js";
import { defineTerms } from "gradfn/train/terms.js";
import { build, makeTrainer, sizesFor, startsAsRun } from "gradfn/train/trainer.js";

const SLICE = 12; // milliseconds of steps in a frame, so that the page stays responsive
const REDRAW = 100, REDRAW_STILL = 1000; // milliseconds between two pictures; the second with reduced motion
const EVALUATE = 10; // steps between two evaluations on the test examples
const KEEP = 2000; // records; beyond, every second one is dropped
const MAX_REPLAY = 20_000; // steps that an address may ask for

export function start(section, content) {
  const find = within(section);
  const data = build(content);
  const defaults = settingsOf(content), maxWidth = Number(find("width").max);
  const calm = matchMedia("(prefers-reduced-motion: reduce)");
  const state = { settings: { ...defaults }, running: false, speed: "100", clean: true };
  let trainer = null, records = [], tests = [], signs = null, every = 1, drawnAt = 0, fresh = true;
  let until = 0, hurry = false; // the step at which the training pauses, and whether it goes there as fast as possible
  let replay = 0, writes = false; // the steps that the address asks for, and whether the address is written

  const controls = makeControls(find, { ...content, n: data.train.n }, defaults, (some) => change(some), choose);
  const picture = makePicture(find, data);
  const lossView = makeLossView(find), gradientsView = makeGradientsView(find);
  const tools = { state, data, defaults, trainer: () => trainer, records: () => records, tests: () => tests };
  defineTerms(section, { ...tools, last });
  const chosen = (name) => isPreset(name, state.settings, defaults);
  const lesson = makeLesson(section, lessonSteps(find, { ...tools, last, chosen, signs: () => signs.found }));

  function last() {
    return records[records.length - 1] || null;
  }

  // --- the training

  function restart() {
    state.running = false;
    state.clean = true;
    trainer = makeTrainer(data, state.settings);
    signs = makeSigns(state.settings.activation, data.sizes[data.sizes.length - 1]);
    [records, tests, every, fresh, until, hurry] = [[], [], 1, true, 0, false];
    evaluate();
    show();
  }

  function evaluate() {
    if (tests.length && tests[tests.length - 1].step === trainer.step) return;
    tests.push({ step: trainer.step, ...trainer.evaluate() });
  }

  function advance() {
    const record = trainer.advance();
    if (!record) return;
    signs.look(record);
    if (record.step % every === 0 || record.fault) records.push(record);
    if (records.length > KEEP) {
      every *= 2;
      records = records.filter(({ step }) => step % every === 0);
      tests = tests.filter(({ step }) => step % (EVALUATE * every) === 0);
    }
    if (trainer.step % (EVALUATE * every) === 0) evaluate();
    if (record.fault) state.running = false;
  }

  function steps(n) {
    for (let i = 0; i < n && !trainer.fault; i++) advance();
    show();
  }

  // Train until `until`, in slices of a frame.
  function run() {
    if (state.running || trainer.fault) return;
    state.running = true;
    if (until <= trainer.step) until = (Math.floor(trainer.step / content.steps) + 1) * content.steps;
    let before = performance.now(), due = 0;
    const frame = (now) => {
      if (!state.running) return;
      due = hurry || state.speed === "max" ? Infinity : due + ((now - before) * Number(state.speed)) / 1000;
      before = now;
      const end = performance.now() + SLICE;
      while (due >= 1 && state.running && trainer.step < until && performance.now() < end) {
        advance();
        due--;
      }
      due = Math.min(due, 1); // a slow machine does not catch up
      if (trainer.step >= until) state.running = false;
      if (!state.running) return stopped();
      if (now - drawnAt >= (calm.matches ? REDRAW_STILL : REDRAW)) {
        drawnAt = now;
        showProgress();
      }
      requestAnimationFrame(frame);
    };
    requestAnimationFrame(frame);
    show();
  }

  function pause() {
    state.running = false;
    stopped();
  }

  function stopped() {
    [until, hurry] = [0, false];
    show();
  }

  // --- what the controls do

  function change(some) {
    if (Object.entries(some).every(([name, value]) => state.settings[name] === value)) return;
    const running = state.running;
    const again = Object.keys(some).some((name) => RESTARTING.includes(name));
    state.settings = { ...state.settings, ...some };
    if (again) restart();
    else {
      Object.assign(trainer.settings, some);
      state.clean = trainer.step === 0;
      show();
    }
    if (running && again) run();
  }

  function choose(name) {
    state.settings = presetSettings(name, defaults);
    restart();
    if (name !== "As in the run") run();
  }

  // --- what is shown

  function showProgress() {
    const record = last(), test = tests[tests.length - 1];
    picture.show(trainer.net, { fresh, moving: state.running });
    fresh = false;
    const layers = trainer.net.layers.length;
    const whole = !state.settings.batch || state.settings.batch >= data.train.n;
    lossView.show({ records, tests, step: trainer.step, whole });
    gradientsView.show({ records, step: trainer.step, layers, activation: state.settings.activation });
    const loss = record ? plain(record.loss) : "–";
    const parts = [
      `Step ${trainer.step.toLocaleString("en")}`,
      `epoch ${trainer.epoch.toFixed(trainer.epoch < 100 ? 1 : 0)}`,
      trainer.fault ? "stopped: a number is not finite" : `${whole ? "training" : "batch"} loss ${loss}`,
      `test accuracy ${(100 * test.accuracy).toFixed(1)} %`,
    ];
    find("now").textContent = parts.join(" · ");
    showSigns();
    lesson.update();
  }

  let shownSigns = null;
  function showSigns() {
    const text = JSON.stringify([signs.found, trainer.step > 0]);
    if (text === shownSigns) return;
    shownSigns = text;
    const none = trainer.step ? "Nothing is wrong so far." : "Nothing yet: press Start.";
    const items = signs.found.map(({ step, text: sign, harmless }, i) => {
      const kind = i ? "" : harmless ? "first harmless" : "first";
      return element("li", { class: kind }, element("b", {}, `Step ${step.toLocaleString("en")}: `), sign);
    });
    find("signs").replaceChildren(items.length ? element("ol", {}, ...items) : element("p", { class: "hint" }, none));
  }

  function show() {
    evaluate();
    controls.show(state.settings);
    find("run").textContent = state.running ? "Pause" : "Start";
    find("run").disabled = find("step").disabled = Boolean(trainer.fault);
    find("step").disabled ||= state.running;
    find("speed").value = state.speed;
    const { settings } = state;
    const sizes = sizesFor(data, settings.depth, settings.width).join("-");
    find("origin").textContent = startsAsRun(data, settings)
      ? `${sizes}. It starts from the run's own initial parameters.`
      : `${sizes}. Its initial weights have the distribution of gf.mlp (a truncated normal of variance 1 ÷ inputs), ` +
        "but the page draws them.";
    const { activation } = settings;
    const without = activation === "identity" ? "Without an activation" : `With the activation ${activation}`;
    find("no-units").textContent = settings.depth
      ? `${without}, units are neither dead nor saturated.`
      : "Without hidden layers there are no units that could be dead or saturated.";
    showProgress();
    keepState();
  }

  const keep = keepInAddress(section, (texts) => {
    state.settings = { ...defaults, ...validSettings(texts, content, maxWidth) };
    replay = /^\d{1,6}$/.test(texts.step) ? Math.min(Number(texts.step), MAX_REPLAY) : 0;
    if (trainer) {
      restart();
      toStep(replay);
    }
  });

  // The steps that an address asks for, as fast as possible.
  function toStep(step) {
    if (!step) return;
    [until, hurry] = [step, true];
    run();
  }

  function keepState() {
    if (state.running || !writes) return;
    const { settings } = state;
    const changed = Object.entries(settings).filter(([name, value]) => value !== defaults[name]);
    const step = state.clean && trainer.step && trainer.step <= MAX_REPLAY ? trainer.step : null;
    keep({ ...Object.fromEntries(changed), step });
  }

  find("run").addEventListener("click", () => (state.running ? pause() : run()));
  find("step").addEventListener("click", () => steps(1));
  find("restart").addEventListener("click", restart);
  find("speed").addEventListener("change", () => (state.speed = find("speed").value));
  const repaint = () => {
    newPalette();
    picture.repaint();
    showProgress();
  };
  document.documentElement.addEventListener("theme", repaint);
  newPalette();
  picture.repaint();
  restart();
  toStep(replay);
  writes = true;

  // For tests, and for use in the browser's console.
  return { ...tools, last, signs: () => signs.found, change, choose, restart, steps, run, pause, makeTrainer, build,
    lesson };
}
