// The lesson of a multilayer perceptron.
import { number, percent, sub } from "gradfn/core/dom.js";
import { makeLesson } from "gradfn/core/lesson.js";
import { isClassifier } from "gradfn/mlp/network.js";

// `page` is { net, state, examples, now(), open(), shown() }; see page.js.
export function makeDenseLesson(section, find, page) {
  const { net, state } = page, last = net.layers.length - 1;
  const plane = net.layers[0].nIn === 2, unit = isClassifier(net) ? " nats" : "";
  const feeding = () => section.querySelector(".feeding"), nodes = () => find("nodes"),
    node = () => section.querySelector(".open-node");
  const outputs = () => Array.from(page.now().shown.slice(0, 3), (value, i) =>
    `output ${i} is <b>${isClassifier(net) ? percent(value).replace("<", "&lt;") : number(value)}</b>`).join(", ");
  const loss = () => `<b>${number(page.now().loss)}</b>${unit}`;
  let before = {};
  const remember = () => {
    const { z, a } = page.open();
    before = { ...state, z, a, loss: page.now().loss, shown: page.shown() };
  };
  const step = (more) => ({ start: remember, ...more });

  const steps = [
    step({
      see: `This network has ${net.layers[0].nIn} inputs, ${
        net.layers.slice(0, -1).map(({ nOut }) => nOut).join(" and ") || "no"} hidden nodes and ` +
        `${net.layers[last].nOut} output${net.layers[last].nOut > 1 ? "s" : ""}.`,
      act: plane ? "Click somewhere in the plane, or change a field." : "Move the slider of an input.",
      done: () => state.x !== before.x,
      happened: () => `Now ${outputs()}. All nodes were computed again.`,
      at: feeding,
    }),
    step({
      see: "Red nodes are positive, blue ones negative; the stronger the color, the larger.",
      act: "Click another node.",
      done: () => state.layer !== before.layer || state.node !== before.node,
      happened: () => `Its z, the weighted sum plus the bias, is <b>${number(page.open().z)}</b>. Its output is ` +
        `<b>${number(page.open().a)}</b>.`,
      at: nodes,
    }),
    step({
      see: () => `This node multiplies each input by a <dfn data-term="weight">weight</dfn> and adds all up. Its ` +
        `<dfn data-term="weighted sum">weighted sum</dfn> is ${
        number(page.open().sum)}.`,
      act: plane ? "Move the point, and watch its z." : "Change an input, and watch its z.",
      done: () => state.x !== before.x,
      happened: () => `z was ${number(before.z)} and is <b>${number(page.open().z)}</b>.`,
      at: node,
    }),
    step({
      see: "An output is a node like all others. Its inputs are the nodes of the last hidden layer.",
      act: "Click an output.",
      done: () => state.layer === last,
      happened: () => `It adds up ${page.open().weights.length} products, and its z is ` +
        `<b>${number(page.open().z)}</b>.`,
      at: nodes,
    }),
    step({
      see: () => `The <dfn data-term="loss">loss</dfn> compares the output with a target. It is ` +
        `${number(page.now().loss)}${unit}.`,
      act: net.labels ? "Choose another label." : "Change the target.",
      done: () => state.target !== before.target && state.asked,
      happened: () => `The loss was ${number(before.loss)}${unit} and is ${loss()}.`,
      at: () => section.querySelector(".ask"),
    }),
    step({
      see: "The backward pass starts at the output and goes layer by layer to the inputs. Each step uses the one " +
        "before.",
      act: "Press “Next step”.",
      done: () => page.shown() > Math.max(before.shown, 1) || page.shown() === page.now().steps.length,
      happened: () => {
        const { name, values } = page.now().steps[Math.max(page.shown() - 1, 0)];
        return `Step ${page.shown()} is ∂L/∂${name[0]}${sub(name.slice(1))}: ${values.length.toLocaleString("en")} ` +
          `numbers.`;
      },
      at: () => section.querySelector(".stepper"),
    }),
    step({
      see: "One backward pass gives the derivative of the loss with respect to every weight, bias and input.",
      act: "Press “All steps”.",
      done: () => page.shown() === page.now().steps.length,
      happened: () => {
        const all = net.layers.reduce((n, { W, b }) => n + W.length + b.length, 0);
        const ofInputs = page.now().steps[page.now().steps.length - 1].values;
        const largest = ofInputs.reduce((top, value, i) => (Math.abs(value) > Math.abs(ofInputs[top]) ? i : top), 0);
        return `${all.toLocaleString("en")} derivatives of parameters. Of the inputs, x${sub(largest)} matters most: ` +
          `∂L/∂x${sub(largest)} is <b>${number(ofInputs[largest])}</b>.`;
      },
      at: () => section.querySelector(".stepper"),
    }),
    step({
      see: "That input’s gradient says how to change it: against the gradient, the loss decreases.",
      act: plane ? "Move the point so that the loss decreases." : "Change an input so that the loss decreases.",
      done: () => page.now().loss < before.loss,
      happened: () => `The loss was ${number(before.loss)}${unit} and is ${loss()}.`,
      at: feeding,
    }),
  ];
  const found = last ? steps : steps.filter((_, i) => i !== 3);
  return makeLesson(section, found);
}
