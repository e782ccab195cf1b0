// A running multilayer perceptron: every node's values for some inputs, and the gradient of the loss.
import { activations } from "gradfn/core/activations.js";
import { element, number, sub, within } from "gradfn/core/dom.js";
import { keepInAddress } from "gradfn/core/hash.js";
import { newPalette } from "gradfn/core/paint.js";
import { gradients } from "gradfn/digits/mlp.js";
import { makeInputs, SHOWN } from "gradfn/mlp/inputs.js";
import { makeNodes } from "gradfn/mlp/layers.js";
import { makeDenseLesson } from "gradfn/mlp/lesson.js";
import { bestOf, build, compute, isClassifier, nOutputs } from "gradfn/mlp/network.js";
import { makeNodeTable } from "gradfn/mlp/node.js";
import { makeBackward } from "gradfn/mlp/steps.js";
import { makeTarget } from "gradfn/mlp/target.js";
import { defineTerms } from "gradfn/mlp/terms.js";

export function start(section, content) {
  const find = within(section);
  const { net, x: examples, y: targets } = build(content);
  const nIn = net.layers[0].nIn, last = net.layers.length - 1, n = nOutputs(net);
  // `asked` is false while no target was chosen: then a label is the network's own prediction.
  const blank = () => ({ x: new Float64Array(nIn), example: null, target: net.labels ? 0 : new Float64Array(n),
    asked: !net.labels });
  const ofExample = (i) => ({ x: examples[i], example: i, target: targets[i], asked: true });
  const first = () => (examples.length ? ofExample(0) : blank());
  const state = { ...first(), layer: 0, node: 0, output: n - 1 };
  let now = null;
  let changed = () => {}; // tells the address and the lesson, once they are there

  const moved = (j, value) => change({ x: state.x.map((old, i) => (i === j ? value : old)), example: null });
  const inputs = makeInputs(find, net, examples, targets, moved,
    (x) => change({ x: Float64Array.from(x), example: null }));
  const select = (layer, node) => change({ layer, node, ...(layer === last ? { output: node } : {}) });
  const nodes = makeNodes(find, net, select, select);
  const table = makeNodeTable(find, net);
  const target = makeTarget(find, net, (wanted) => change({ target: wanted, asked: true }));
  const steps = makeBackward(find, net, () => changed());
  const picker = find("examples");
  if (picker) {
    picker.append(element("option", { value: "" }, "your own"));
    const named = (i) => (net.labels ? `${i}, a ${targets[i]}` : `${i}`);
    examples.forEach((_, i) => picker.append(element("option", { value: i }, named(i))));
    picker.addEventListener("change", () => picker.value !== "" && pick(Number(picker.value)));
  }

  const pick = (i) => change(ofExample(i));
  const setTarget = (wanted) => change({ target: wanted, asked: true });

  function change(what) {
    Object.assign(state, what);
    now = compute(net, state.x, state.target);
    if (!state.asked && bestOf(now.shown) !== state.target) {
      state.target = bestOf(now.shown);
      now = compute(net, state.x, state.target);
    }
    show();
    changed();
  }

  // The numbers of the node that is open.
  function opened() {
    const { layer, node } = state, { nIn: width, W, b, squash } = net.layers[layer];
    const weights = W.subarray(node * width, (node + 1) * width);
    const input = layer ? now.pass.a[layer - 1] : state.x;
    const sum = weights.reduce((total, weight, j) => total + weight * input[j], 0);
    const z = now.pass.z[layer][node], a = now.pass.a[layer][node];
    return { layer, node, weights, input, bias: b[node], sum, z, a, squash, slope: activations[squash].slope(z, a),
      grads: gradients(now.steps) };
  }

  function show() {
    inputs.show(state.x, state.output);
    nodes.show(now, state);
    table.show(opened());
    target.show(state.target);
    steps.show(now);
    if (picker) picker.value = state.example === null ? "" : `${state.example}`;
    const top = `a${sub(last + 1)}`;
    const formula = isClassifier(net)
      ? `−log p${sub(state.target)} = <b>${number(now.loss)}</b> <dfn data-term="nats">nats</dfn>`
      : `${net.loss === "regression_loss" ? "mean of" : "½ Σ"} (${top} − y)² = <b>${number(now.loss)}</b>`;
    find("loss").innerHTML = formula;
  }

  // The state as texts by name, without what is as at the start; and back.
  function address() {
    const { x, example, target, asked, layer, node } = state, own = example === null && x.some((value) => value);
    const isDefault = example !== null && target === targets[example];
    return {
      example: example || null,
      x: own ? Array.from(x.slice(0, SHOWN)).join(",") : "",
      target: asked && !isDefault ? (net.labels ? target : Array.from(target).join(",")) : null,
      node: layer || node ? `${layer}.${node}` : null,
      steps: steps.shown() === 1 ? null : steps.shown(),
    };
  }

  const index = (text, size) => (/^\d{1,6}$/.test(text ?? "") && Number(text) < size ? Number(text) : null);
  const numbersOf = (text, size) => {
    const found = (text ?? "").split(",").map(Number);
    return text && found.length <= size && found.every(Number.isFinite) ? found : null;
  };

  function restore(texts) {
    const i = index(texts.example, examples.length), x = numbersOf(texts.x, nIn);
    const what = i !== null ? ofExample(i) : texts.x ? blank() : first();
    if (x) what.x = Float64Array.from({ length: nIn }, (_, j) => x[j] ?? 0);
    const label = index(texts.target, n), vector = numbersOf(texts.target, n);
    if (net.labels && label !== null) Object.assign(what, { target: label, asked: true });
    if (!net.labels && vector && vector.length === n) what.target = Float64Array.from(vector);
    const [layer, node] = (texts.node ?? "").split("."), l = index(layer, net.layers.length) ?? 0;
    change({ ...what, layer: l, node: index(node, net.layers[l].nOut) ?? 0 });
    steps.reveal(index(texts.steps, 1000) ?? 1);
  }

  const repaint = () => {
    newPalette();
    show();
  };
  document.documentElement.addEventListener("theme", repaint);
  newPalette();
  change({});
  defineTerms(section, net, opened, () => now, () => state.target);
  const lesson = makeDenseLesson(section, find,
    { net, state, examples, now: () => now, open: opened, shown: steps.shown });
  const keep = keepInAddress(section, restore);
  changed = () => {
    keep(address());
    lesson.update();
  };

  // For tests, and for use in the browser's console.
  return { compute, gradients, net, examples, state, change, pick, select, setTarget, lesson, address,
    step: steps.next, now: () => now };
}
