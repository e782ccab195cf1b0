// The running network: it computes every node's activation for an image, and the gradient of the loss.
import { enlarge, prepare } from "gradfn/core/prepare.js";
import { activations } from "gradfn/core/activations.js";
import { element, within } from "gradfn/core/dom.js";
import { keepInAddress } from "gradfn/core/hash.js";
import { changesFromText, changesToText, index } from "gradfn/digits/address.js";
import { makeLayers } from "gradfn/digits/layers.js";
import { makeDigitsLesson } from "gradfn/digits/lesson.js";
import { gradients } from "gradfn/digits/mlp.js";
import { build, changeable, compute, PIXELS } from "gradfn/digits/network.js";
import { makeNode } from "gradfn/digits/node.js";
import { makePad } from "gradfn/core/pad.js";
import { newPalette, paint } from "gradfn/core/paint.js";
import { makeSteps } from "gradfn/digits/steps.js";
import { defineTerms } from "gradfn/digits/terms.js";

export function start(section, content) {
  const find = within(section);
  const { net: trained, arrays } = build(content);
  const model = changeable(trained);
  const { net } = model;
  const spline = arrays.spline ? arrays.spline.values : null;
  const pen = spline ? 0.13 : 0.08; // digits of 8x8 pixels have thick lines
  const samples = content.labels.map((_, i) => arrays.samples.values.slice(784 * i, 784 * (i + 1)));
  // `asked` is false while no label was chosen: then the label is the network's own prediction.
  const blank = () => ({ x: new Float64Array(784), sample: null, label: 0, asked: false }); // a run may have no samples
  const state = { ...blank(), layer: 0, node: 0 };
  if (samples.length) Object.assign(state, { x: samples[0], sample: 0, label: content.labels[0], asked: true });
  let now = compute(net, state.x, state.label);
  if (!state.asked) {
    state.label = now.probabilities.indexOf(Math.max(...now.probabilities));
    now = compute(net, state.x, state.label);
  }
  let changed = () => {}; // tells the address and the lesson, once they are there

  const prepared = (ink, side) => prepare(ink, side, spline);
  const drawn = (ink, side) => change({ x: prepared(ink, side) || new Float64Array(784), sample: null, asked: false });
  const pad = makePad(find, pen, drawn);
  const select = (layer, node) => {
    Object.assign(state, { layer, node });
    show();
    changed();
  };
  const click = (layer, i) => {
    select(layer, i);
    const panel = find("node");
    if (panel.getBoundingClientRect().top > innerHeight - 100) panel.scrollIntoView({ block: "center" }); // on a phone
  };
  const layers = makeLayers(find, model, click, select);
  const node = makeNode(
    find,
    model,
    (value) => setBias(state.layer, state.node, value),
    (region) => setRegion(state.node, region),
    () => {
      model.asTrained();
      layers.paintAll();
      change({});
    },
  );
  const setLabel = (label) => change({ label, asked: true });
  const steps = makeSteps(find, net, setLabel, () => changed());

  const buttons = samples.map((_, i) => {
    const predicted = compute(trained, samples[i], content.labels[i]).probabilities;
    const isWrong = predicted.indexOf(Math.max(...predicted)) !== content.labels[i];
    const name = `Test digit, a ${content.labels[i]}${isWrong ? ", which the network misclassifies" : ""}`;
    const canvas = element("canvas", { class: "pixels" });
    return element("button", { type: "button", "aria-label": name, onclick: () => pick(i) }, canvas);
  });
  if (samples.length) find("samples").append(...buttons);

  function pick(i) {
    pad.empty();
    change(samples.length ? { x: samples[i], sample: i, label: content.labels[i], asked: true } : blank());
  }

  function setBias(layer, i, value) {
    model.setBias(layer, i, value);
    change({});
  }

  function setRegion(i, region) {
    model.setRegion(i, region);
    layers.paintTile(i);
    change({});
  }

  function change(what) {
    Object.assign(state, what);
    now = compute(net, state.x, state.label);
    const predicted = now.probabilities.indexOf(Math.max(...now.probabilities));
    if (!state.asked && predicted !== state.label) {
      state.label = predicted;
      now = compute(net, state.x, predicted);
    }
    show();
    changed();
  }

  // The numbers of the node that is open.
  function opened() {
    const { layer, node } = state, { nIn, W, b, squash } = net.layers[layer];
    const row = (all) => Array.from(all.subarray(node * nIn, (node + 1) * nIn));
    const weights = row(W), ofTraining = row(trained.layers[layer].W);
    const input = layer ? now.pass.a[layer - 1] : state.x;
    const sumOf = (row) => row.reduce((sum, weight, j) => sum + weight * input[j], 0);
    const z = now.pass.z[layer][node], a = now.pass.a[layer][node];
    const biases = { bias: b[node], trainedBias: trained.layers[layer].b[node] };
    const sums = { sum: sumOf(weights), whole: sumOf(ofTraining), z, a, slope: activations[squash].slope(z, a) };
    return { layer, node, weights, input, squash, ...biases, ...sums };
  }

  // The state as texts by name, without what is as at the start; and back.
  function address() {
    const { sample, label, asked, layer, node } = state;
    return {
      sample: sample || null,
      ink: sample === null ? pad.text() : "",
      label: asked && label !== content.labels[sample ?? -1] ? label : null,
      node: layer || node !== firstNode ? `${layer}.${node}` : null,
      ...changesToText(model),
      steps: steps.shown() === 1 ? null : steps.shown(),
    };
  }

  function restore(texts) {
    const { biases, regions } = changesFromText(texts, model, PIXELS);
    model.asTrained();
    biases.forEach((each) => model.setBias(...each));
    regions.forEach((each) => model.setRegion(...each));
    layers.paintAll();
    const [layer, node] = (texts.node ?? "").split(".");
    const l = index(layer, net.layers.length), i = l === null ? null : index(node, net.layers[l].nOut);
    Object.assign(state, i === null ? { layer: 0, node: firstNode } : { layer: l, node: i });
    if (!texts.ink || !pad.read(texts.ink)) pick(index(texts.sample, samples.length) ?? 0);
    const label = index(texts.label, 10);
    if (label !== null) setLabel(label);
    steps.reveal(index(texts.steps, 1000) ?? 1);
  }

  function show() {
    paint(find("seen"), state.x, PIXELS, null);
    buttons.forEach((button, i) => button.setAttribute("aria-pressed", i === state.sample));
    layers.show(now, state);
    node.show(now, state.x, state.layer, state.node);
    steps.show(now, state.label);
  }

  function paintAll() {
    newPalette();
    buttons.forEach((button, i) => paint(button.firstChild, samples[i], PIXELS, null));
    layers.paintAll();
    pad.draw();
    show();
  }

  // Open the node that contributes most to the output for the first digit.
  if (net.layers.length > 1) {
    const { nIn, W } = net.layers[1];
    const predicted = net.layers.length === 2 ? state.label : 0;
    const contributions = now.pass.a[0].map((a, i) => W[predicted * nIn + i] * a);
    state.node = contributions.indexOf(Math.max(...contributions));
  }
  const firstNode = state.node;
  document.documentElement.addEventListener("theme", paintAll);
  paintAll();
  defineTerms(section, net, opened, () => now, () => state.label);
  const actual = { now: () => now, open: opened, shown: steps.shown, steps: () => now.steps };
  const page = { model, state, labels: content.labels, ...actual };
  const lesson = makeDigitsLesson(section, find, page);
  const keep = keepInAddress(section, restore);
  changed = () => {
    keep(address());
    lesson.update();
  };

  // For tests, and for use in the browser's console.
  const tools = { build, compute, gradients, prepare: prepared, enlarge: (gray) => enlarge(gray, spline) };
  const controls = { pick, select, setBias, setRegion, setLabel, step: steps.next };
  return { ...tools, ...controls, lesson, address, opened, net, samples, state, now: () => now };
}
