// The network at work: an image goes in, every node shows what it makes of it, and the gradient comes back.
import { enlarge, prepare } from "gradfn/digit.js";
import { element, find } from "gradfn/dom.js";
import { makeLayers } from "gradfn/layers.js";
import { gradients } from "gradfn/mlp.js";
import { build, changeable, compute, PIXELS } from "gradfn/network.js";
import { makeNode } from "gradfn/node.js";
import { makePad } from "gradfn/pad.js";
import { newPalette, paint } from "gradfn/paint.js";
import { makeSteps } from "gradfn/steps.js";

export function live(told) {
  const { net: trained, arrays } = build(told);
  const model = changeable(trained);
  const { net } = model;
  const spline = arrays.spline ? arrays.spline.values : null;
  const pen = spline ? 0.13 : 0.08; // digits of 8x8 pixels have thick lines
  const samples = told.labels.map((_, i) => arrays.samples.values.slice(784 * i, 784 * (i + 1)));
  // `asked` is false while the right answer is only taken to be what the network says.
  const state = { x: samples[0], sample: 0, label: told.labels[0], asked: true, layer: 0, node: 0 };
  let now = compute(net, state.x, state.label);

  const prepared = (ink, side) => prepare(ink, side, spline);
  const drawn = (ink, side) => change({ x: prepared(ink, side) || new Float64Array(784), sample: null, asked: false });
  const pad = makePad(pen, drawn);
  const select = (layer, node) => {
    Object.assign(state, { layer, node });
    show();
  };
  const click = (layer, i) => {
    select(layer, i);
    const panel = find("node");
    if (panel.getBoundingClientRect().top > innerHeight - 100) panel.scrollIntoView({ block: "center" }); // on a phone
  };
  const layers = makeLayers(model, click, select);
  const node = makeNode(
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
  const steps = makeSteps(net, setLabel);

  const buttons = samples.map((_, i) => {
    const name = `Test digit, a ${told.labels[i]}${i < 10 ? "" : ", which the network takes for another"}`;
    const canvas = element("canvas", { class: "pixels" });
    return element("button", { type: "button", "aria-label": name, onclick: () => pick(i) }, canvas);
  });
  find("samples").append(...buttons);

  function pick(i) {
    pad.empty();
    change({ x: samples[i], sample: i, label: told.labels[i], asked: true });
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
    const said = now.probabilities.indexOf(Math.max(...now.probabilities));
    if (!state.asked && said !== state.label) {
      state.label = said;
      now = compute(net, state.x, said);
    }
    show();
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

  // Begin with the node that says most about the first digit.
  if (net.layers.length > 1) {
    const { nIn, W } = net.layers[1];
    const said = net.layers.length === 2 ? state.label : 0;
    const says = now.pass.a[0].map((a, i) => W[said * nIn + i] * a);
    state.node = says.indexOf(Math.max(...says));
  }
  document.documentElement.addEventListener("theme", paintAll);
  paintAll();

  // For tests, and for the curious at the console.
  const tools = { build, compute, gradients, prepare: prepared, enlarge: (gray) => enlarge(gray, spline) };
  const controls = { pick, select, setBias, setRegion, setLabel, step: steps.next };
  return { ...tools, ...controls, net, samples, state, now: () => now };
}
