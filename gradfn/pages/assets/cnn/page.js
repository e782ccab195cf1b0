// The running convolutional network: the maps of every filter for an image, and the gradient of the loss back to its
// pixels.
import { filterFrom, filterTo, index, offFrom, offTo } from "gradfn/cnn/address.js";
import { makeBack } from "gradfn/cnn/back.js";
import { build, compute, explain } from "gradfn/cnn/convnet.js";
import { makeFilter } from "gradfn/cnn/filter.js";
import { makeCnnLesson } from "gradfn/cnn/lesson.js";
import { makeMaps } from "gradfn/cnn/maps.js";
import { makeOutputs, percent } from "gradfn/cnn/outputs.js";
import { imagePainter } from "gradfn/cnn/pictures.js";
import { defineTerms } from "gradfn/cnn/terms.js";
import { element, number, within } from "gradfn/core/dom.js";
import { keepInAddress } from "gradfn/core/hash.js";
import { makePad } from "gradfn/core/pad.js";
import { newPalette } from "gradfn/core/paint.js";
import { prepare } from "gradfn/core/prepare.js";

const KINDS = ["z", "a", "p"];

export function start(section, content) {
  const find = within(section);
  const { net, arrays } = build(content);
  const { height, width, channels } = net, area = height * width, size = area * channels;
  const spline = arrays.spline ? arrays.spline.values : null;
  const samples = content.labels.map((_, i) => planar(arrays.samples.values.subarray(size * i, size * (i + 1))));
  const painter = imagePainter(net, Boolean(find("pad")), samples);
  // Images that are not samples, by name.
  const made = find("pad") ? {} : { noise: noise(),
    blank: new Float64Array(size).fill(Math.max(painter.low, Math.min(painter.high, 0))) };
  const images = { ...samples, ...made };
  const first = samples.length ? 0 : "noise";
  // `sample` is an index, the name of an image, or null for a drawing. `asked` is false while no label was chosen: then
  // the label is the network's own prediction. `kind` says which maps are shown, `at` is the row and column of the open
  // pixel.
  const state = { x: null, sample: null, label: 0, asked: false, layer: 0, filter: 0, channel: 0, at: [0, 0],
    kind: "a", off: new Set() };
  let now = null, without = null; // what is computed; and the same with all filters on, where some are off
  let changed = () => {}; // tells the address and the lesson, once they are there

  // From [height, width, channels] to [channels, height, width].
  function planar(flat) {
    return Float64Array.from({ length: size }, (_, i) => flat[(i % area) * channels + Math.floor(i / area)]);
  }

  // The same noise each time: a linear congruential generator.
  function noise() {
    let seed = 1;
    return Float64Array.from({ length: size }, () => {
      seed = (seed * 1664525 + 1013904223) % 2 ** 32;
      return painter.low + (painter.high - painter.low) * (seed / 2 ** 32);
    });
  }

  // In single precision, as JAX gets it: pixels that are equal there stay equal, which decides which of them pooling
  // takes.
  const drawn = (ink, side) => {
    const x = Float64Array.from(new Float32Array(prepare(ink, side, spline) || size));
    change({ x, sample: null, asked: false });
  };
  const pad = find("pad") ? makePad(find, spline ? 0.13 : 0.08, drawn) : null; // digits of 8x8 pixels have thick lines
  const outputs = makeOutputs(find, net);
  const maps = makeMaps(find, net, open, (kind) => select({ kind }));
  const pointAt = (what) => {
    Object.assign(state, what);
    filter.point(now, state);
    changed();
  };
  const filter = makeFilter(find, net, painter, {
    pixel: (...at) => pointAt({ at }),
    channel: (channel) => select({ channel }),
    toggle: () => toggle(state.layer, state.filter),
  });
  const back = makeBack(find, net, Boolean(pad), (label) => change({ label, asked: true }), () => changed());

  const names = (key) => (key in made ? { noise: "Noise", blank: "Blank" }[key]
    : `Test image, class ${content.labels[key]}`);
  const buttons = Object.keys(images).map((key) => {
    const canvas = element("canvas", { class: "pixels" });
    const about = key in made ? names(key) : names(key)
      + (spline && key >= 10 ? ", which the network misclassifies" : "");
    return { key, made: element("button",
      { type: "button", "aria-label": about, title: about, onclick: () => pick(key) }, canvas) };
  });
  find("samples").append(...buttons.map((each) => each.made));
  find("restore").addEventListener("click", () => change({ off: new Set() }));

  function pick(key) {
    if (pad) pad.empty();
    const sample = key in made ? key : Number(key);
    const label = key in made ? state.label : content.labels[sample];
    change({ x: images[key], sample, label, asked: !(key in made) });
  }

  function open(layer, i, clicked = false) {
    const panel = find("filter"), moved = layer !== state.layer || i !== state.filter;
    select({ layer, filter: i, ...(moved ? where(layer, i) : {}) });
    // On a phone it is below the window. By the keyboard the focus, and with it the window, stays at the maps.
    if (clicked && panel.getBoundingClientRect().top > 0.6 * innerHeight) panel.scrollIntoView({ block: "start" });
  }

  // The pixel of a map with the largest value.
  function brightest(layer, i) {
    const { height, width } = net.convs[layer], n = height * width;
    const map = now.pass.values[`z${layer + 1}`].subarray(i * n, (i + 1) * n), at = map.indexOf(Math.max(...map));
    return [Math.floor(at / width), at % width];
  }

  // That pixel, and the input channel that contributes most to it.
  function where(layer, i) {
    const at = brightest(layer, i);
    const sums = explain(net, now.pass, layer, i, ...at).channels.map(({ sum }) => Math.abs(sum));
    return { at, channel: sums.indexOf(Math.max(...sums)) };
  }

  function toggle(layer, i) {
    const off = new Set(state.off), name = `${layer}.${i}`;
    if (!off.delete(name)) off.add(name);
    change({ off });
  }

  // Show something else of what is computed.
  function select(what) {
    Object.assign(state, what);
    const { nIn, height, width } = net.convs[state.layer];
    state.channel = Math.min(state.channel, nIn - 1);
    state.at = [Math.min(state.at[0], height - 1), Math.min(state.at[1], width - 1)];
    maps.show(now, state);
    filter.show(now, state);
    changed();
  }

  function change(what) {
    Object.assign(state, what);
    now = compute(net, state.x, state.label, state.off);
    const predicted = now.probabilities.indexOf(Math.max(...now.probabilities));
    if (!state.asked && predicted !== state.label) {
      state.label = predicted;
      now = compute(net, state.x, predicted, state.off);
    }
    without = state.off.size ? compute(net, state.x, state.label) : null;
    show();
    changed();
  }

  function show() {
    painter.paint(find("seen"), state.x);
    for (const { key, made } of buttons) made.setAttribute("aria-pressed", key === String(state.sample));
    outputs.show(now.probabilities, without ? without.probabilities : null);
    find("change").textContent = effect();
    find("restore").disabled = !state.off.size;
    maps.show(now, state);
    filter.show(now, state);
    back.show(now, state.label);
  }

  // What it does that filters are off.
  function effect() {
    if (!without) return `Loss for label ${state.label}: ${number(now.loss)} nats`;
    const n = state.off.size, { label } = state;
    return `${n} filter${n > 1 ? "s are" : " is"} off: the probability of ${label} goes from ` +
      `${percent(without.probabilities[label])} to ${percent(now.probabilities[label])}, the loss from ` +
      `${number(without.loss)} to ${number(now.loss)} nats. Lines mark what it was.`;
  }

  function paintAll() {
    newPalette();
    for (const { key, made } of buttons) painter.paint(made.firstChild, images[key]);
    if (pad) pad.draw();
    show();
  }

  // The state as texts by name, without what is as at the start; and back.
  function address() {
    const { sample, label, asked, layer, filter, channel, at, kind, off } = state;
    return {
      sample: sample === first ? null : sample,
      ink: sample === null ? pad.text() : "",
      label: asked && label !== content.labels[sample ?? -1] ? label : null,
      filter: filterTo(layer, filter),
      at: at.join("."),
      channel: channel || null,
      maps: kind === "a" ? null : kind,
      off: offTo(off),
      steps: back.shown() === 1 ? null : back.shown(),
    };
  }

  function restore(texts) {
    Object.assign(state, { off: offFrom(texts.off, net), kind: KINDS.includes(texts.maps) ? texts.maps : "a" });
    const named = Object.hasOwn(images, texts.sample ?? "") ? texts.sample : first;
    if (!pad || !texts.ink || !pad.read(texts.ink)) pick(named);
    const label = index(texts.label, net.classes);
    if (label !== null) change({ label, asked: true });
    const [layer, i] = filterFrom(texts.filter, net) || firstFilter;
    const { nIn, height, width } = net.convs[layer], [row, column] = (texts.at ?? "").split(".");
    const [y, x] = [index(row, height), index(column, width)];
    const at = y === null || x === null ? where(layer, i).at : [y, x];
    select({ layer, filter: i, at, channel: index(texts.channel, nIn) ?? 0 });
    back.reveal(index(texts.steps, 1000) ?? 1);
  }

  // At the start the filter of the first convolution is open that is most active.
  function mostActive() {
    const { nOut } = net.convs[0], a = now.pass.values.a1, n = a.length / nOut;
    const sums = Array.from({ length: nOut },
      (_, i) => a.subarray(i * n, (i + 1) * n).reduce((sum, value) => sum + Math.abs(value), 0));
    return sums.indexOf(Math.max(...sums));
  }

  newPalette();
  pick(String(first));
  const firstFilter = [0, mostActive()];
  Object.assign(state, { filter: firstFilter[1], ...where(...firstFilter) });
  document.documentElement.addEventListener("theme", paintAll);
  paintAll();
  const explained = () => explain(net, now.pass, state.layer, state.filter, ...state.at);
  const page = { net, state, now: () => now, without: () => without, explained, shown: back.shown,
    labels: content.labels, first };
  defineTerms(section, page);
  const lesson = makeCnnLesson(section, find, page);
  const keep = keepInAddress(section, restore);
  changed = () => {
    keep(address());
    lesson.update();
  };

  // For tests, and for use in the browser's console.
  const tools = { build, compute, explain, explained, images };
  return { ...tools, net, state, lesson, address, pick, open, toggle, now: () => now, without: () => without };
}
