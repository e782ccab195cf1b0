// The lesson of the digit network.
import { number, percent, sub } from "gradfn/core/dom.js";
import { makeLesson } from "gradfn/core/lesson.js";
import { gradients } from "gradfn/digits/mlp.js";

const FAR = 3; // how far the bias has to be moved

// `page` is { model, state, samples, labels, now(), open(), shown(), steps() }; see page.js.
export function makeDigitsLesson(section, find, page) {
  const { model, state } = page;
  const { net, trained } = model;
  const deep = net.layers.length > 1, last = net.layers.length - 1;
  const entropy = net.loss === "cross-entropy", unit = entropy ? " nats" : "";
  const predicted = () => page.now().probabilities.indexOf(Math.max(...page.now().probabilities));
  const best = () => `${predicted()} with ${percent(page.now().probabilities[predicted()])}`;
  const loss = () => `${number(page.now().loss)}${unit}`;
  const largest = (values) => number(values.reduce((top, value) => Math.max(top, Math.abs(value)), 0));
  const missed = page.labels.length > 10;
  const layers = () => section.querySelector(deep ? ".tiles-column" : ".outputs-column");
  const whatFires = deep ? "hidden node" : "output";
  let before = {}; // what was there when the step started
  const remember = () => {
    const { layer, node, label, sample, x } = state, { slope } = page.open();
    const dz = gradients(page.now().steps)[`z${layer + 1}`][node];
    before = { layer, node, label, sample, x, slope, dz, loss: page.now().loss, predicted: predicted() };
  };
  const changedIn = ({ nOut }, l) => Array.from({ length: nOut }, (_, i) => +model.changed(l, i));
  const changedNodes = () => net.layers.flatMap(changedIn).reduce((n, one) => n + one, 0);

  const steps = [
    {
      see: `On the left is an image of 784 pixels, on the right the probabilities of ten labels. Between them is a ` +
        `trained network of ${
        deep ? `${net.layers.slice(0, -1).map(({ nOut }) => nOut).join(" and ")} hidden nodes` : "ten nodes"}.`,
      act: page.labels.length > 1 ? "Draw a 3. Without a pointer, pick a test digit." : "Draw a 3.",
      start: remember,
      done: () => state.x !== before.x && state.x.some((value) => value > 0),
      happened: () => `The prediction is ${best()}. Keep drawing, and watch the bars: the network runs again at each ` +
        `stroke.`,
      at: () => section.querySelector(".drawing"),
    },
    {
      see: missed
        ? "These are digits from the test set, on which the network was not trained. The first ten are classified " +
          "correctly, the last ones are not."
        : "These are digits from the test set, on which the network was not trained.",
      act: missed ? "Pick the last one." : "Pick another one.",
      ofSamples: true,
      start: remember,
      done: () => state.sample !== null && state.sample !== before.sample && (!missed || state.sample >= 10),
      happened: () => `The correct label is ${state.label}, the prediction ${best()}. The correct label has ${
        percent(page.now().probabilities[state.label])}.`,
      at: () => section.querySelector(".picking"),
    },
    {
      see: `The <dfn data-term="loss">loss</dfn> says how wrong that is${
        entropy ? `: −log of the probability of the correct label, in <dfn data-term="nats">nats</dfn>` : ", as a " +
          "squared difference"}.`,
      act: "Choose another correct label.",
      start: remember,
      done: () => state.asked && state.label !== before.label,
      happened: () => entropy
        ? `If ${state.label} were correct: −log ${page.now().probabilities[state.label].toPrecision(3)} = ` +
          `<b>${loss()}</b>. With ${
          before.label} it was ${number(before.loss)}${unit}.`
        : `If ${state.label} were correct, the loss is <b>${loss()}</b>. With ${before.label} it was ` +
          `${number(before.loss)}.`,
      at: () => section.querySelector(".ask"),
    },
    {
      see: `${deep ? "Each picture is the weights of a hidden node" : "Each output has a weight for each pixel"}: ` +
        `ink on red pixels excites it, ink on blue ones inhibits it. Its bar is its <dfn ` +
          `data-term="activation">activation</dfn>.`,
      act: `Choose another ${whatFires} with a long bar.`,
      start: remember,
      done: () => state.layer !== before.layer || state.node !== before.node,
      happened: () => {
        const { sum, bias, squash, z, a } = page.open();
        const out = squash === "none" ? "" : `; ${squash}(z) = <b>${number(a)}</b>`;
        return `Its <dfn data-term="weighted sum">weighted sum</dfn> is ${number(sum)}, its bias ${number(bias)}: z ` +
          `= ${number(z)}${out}.`;
      },
      at: layers,
    },
    {
      see: "The signal is each weight times its pixel. Its sum is the weighted sum, so each part of the image adds " +
        "its share.",
      act: "Drag a rectangle on the weights of a node: only that region stays. By keys: Enter, then the arrows.",
      start: remember,
      done: () => state.layer === 0 && model.regions.has(state.node),
      happened: () => {
        const { sum, whole } = page.open();
        return `From the region alone the weighted sum is <b>${number(sum)}</b> instead of ${number(whole)}. The ` +
          `prediction is ${best()}.`;
      },
      at: () => find("node"),
    },
    {
      see: `The bias decides when a node fires: where its weighted sum is above −b. A very negative one keeps it ` +
        `inactive, whatever the image: the <dfn data-term="bias for inactivity">bias for inactivity</dfn>.`,
      act: "Move the slider far to the left.",
      start: remember,
      done: () => page.open().bias < page.open().trainedBias - FAR,
      happened: () => {
        const { bias, squash, slope, a } = page.open();
        const flat = squash === "none" ? "" : `, and its slope ${number(slope)}`;
        return `It fires only above ${number(-bias)}. Its ${squash === "none" ? "output" : "activation"} is ` +
          `<b>${number(a)}</b>${flat}.`;
      },
      at: () => section.querySelector(".slide"),
    },
    {
      see: () => {
        const { squash } = page.open();
        const why = squash === "none" ? "" : ` Through the activation it is multiplied by the slope, which is ` +
          `${number(page.open().slope)}.`;
        return `The <dfn data-term="gradient">gradient</dfn> at this node is ${
          number(gradients(page.now().steps)[`z${state.layer + 1}`][state.node])}.${why} Where the slope is almost ` +
            `0, a node does not learn.`;
      },
      act: "Press “As trained”, and compare.",
      start: remember,
      done: () => !model.anyChanged(),
      happened: () => {
        const dz = gradients(page.now().steps)[`z${state.layer + 1}`][state.node], { squash, slope } = page.open();
        const slopes = squash === "none" ? "" : ` The slope is ${number(slope)}; it was ${number(before.slope)}.`;
        return `As trained, the gradient ∂L/∂z is <b>${number(dz)}</b>; it was ${number(before.dz)}.${slopes}`;
      },
      at: () => find("node"),
    },
    {
      see: "The backward pass starts at the loss. Its first step is prediction minus target, where the target is 1 " +
        "for the correct label and 0 for the others.",
      act: "Press “Next step”.",
      start: () => {
        remember();
        before.shown = page.shown();
      },
      done: () => page.shown() > Math.max(before.shown, 1) || page.shown() === page.steps().length,
      happened: () => {
        const { name, values } = page.steps()[Math.max(page.shown() - 1, 0)];
        const named = `∂L/∂${name[0]}${sub(name.slice(1))}`;
        return `Step ${page.shown()} is ${named}: ${values.length.toLocaleString("en")} numbers, the largest ` +
          `magnitude is ${largest(values)}.`;
      },
      at: () => section.querySelector(".stepper"),
    },
    {
      see: "Each step uses the one before it, so one backward pass gives every derivative: of the weights, the " +
        "biases and the pixels.",
      act: "Press “All steps”.",
      start: remember,
      done: () => page.shown() === page.steps().length,
      happened: () => {
        const all = net.layers.reduce((n, { W, b }) => n + W.length + b.length, 0);
        const ofPixels = page.steps()[page.steps().length - 1].values;
        return `That is ${all.toLocaleString("en")} derivatives of parameters, from a single pass. The last picture ` +
          `is that of the pixels: ink on red ones increases the loss, on blue ones it decreases the loss, by at most ` +
          `${largest(ofPixels)} per unit.`;
      },
      at: () => section.querySelector(".backward"),
    },
    {
      see: "Now you know enough to break it.",
      act: "Change biases or regions of some nodes until the prediction is another one.",
      start: remember,
      done: () => predicted() !== before.predicted && model.anyChanged(),
      happened: () => `The prediction is ${best()} instead of ${before.predicted}. You changed ${changedNodes()} of ${
        net.layers.reduce((n, { nOut }) => n + nOut, 0)} nodes. The address of this page now contains your changes: ` +
          `it is a link to them.`,
      at: () => find("node"),
    },
  ];
  return makeLesson(section, steps.filter((step) => !step.ofSamples || page.labels.length > 1));
}
