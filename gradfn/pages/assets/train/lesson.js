// The lesson: train, then break it in five ways, and see each time which number shows it first.
import { plain } from "gradfn/train/signs.js";

const dfn = (name, text = name) => `<dfn data-term="${name}">${text}</dfn>`;
const percent = (share, digits = 1) => `${(100 * share).toFixed(digits)} %`;

// `view` has the functions of page.js.
export function lessonSteps(find, { state, data, trainer, records, tests, last, signs, chosen }) {
  const image = data.sizes[0] > 2;
  const step = () => trainer().step;
  const first = () => records()[0];
  const accuracy = () => percent(tests()[tests().length - 1].accuracy);
  const ratio = () => last().norms[0] / last().norms[last().norms.length - 1];
  const preset = (name, steps) => () => chosen(name) && (step() >= steps || trainer().fault);
  const sinceStart = () => {
    const sign = signs().length ? `Step ${signs()[0].step}: ${signs()[0].text}` : "No sign of trouble so far.";
    const losses = `${plain(last().loss)} nats; at the start it was ${plain(first().loss)}`;
    return `${sign} After ${step()} steps the loss is ${losses}.`;
  };
  const part = (name) => () => find(name);
  const screen = () => find("picture").closest(".screen");
  const board = () => find("signs").closest(".signs");

  return [
    {
      see: image
        ? "Each image shows the weights of one unit. They are still random, so they look like noise."
        : `Dots and squares are two moons. The color is the more probable moon, the line is its ${dfn("boundary")}.`,
      act: "Press Start.",
      done: () => step() >= 100,
      happened: () =>
        `In ${step()} steps the training loss fell from ${plain(first().loss)} to ${plain(last().loss)} nats, and ` +
        `the ${dfn("test accuracy")} is ${accuracy()}.`,
      at: screen,
    },
    {
      see: `This is the ${dfn("loss")}: solid on the training examples of a step, dashed on test examples, which it ` +
        "never trains on.",
      act: "Press Restart, then Step a few times: each is one update of all weights.",
      done: () => step() >= 3 && step() < 100,
      happened: () => `${step()} steps took the loss from ${plain(first().loss)} to ${plain(last().loss)} nats.`,
      at: part("loss"),
    },
    {
      see: `The ${dfn("gradient norm")} says how strongly the loss pulls at each layer. It passes backwards, from ` +
        "the last layer to the first.",
      act: "Press “Ten sigmoid layers”.",
      done: preset("Ten sigmoid layers", 5),
      happened: () =>
        `At step ${last().step} the gradient norm is ${plain(last().norms[0])} at layer 1 and ` +
        `${plain(last().norms.at(-1))} at layer ${last().norms.length}: a ratio of ${plain(ratio())}. ` +
        `This is the ${dfn("vanishing gradient")}.`,
      at: part("norms"),
    },
    {
      see: "“What showed first” lists each number that leaves its range, with the step.",
      act: "Let the ten sigmoid layers train on for 250 steps.",
      done: () => state.settings.depth === 10 && state.settings.activation === "sigmoid" && step() >= 250,
      happened: sinceStart,
      at: board,
    },
    {
      see: "A sigmoid multiplies the gradient by at most 0.25 in each layer. tanh multiplies it by up to 1.",
      act: "Keep the ten layers, set Activation to tanh, and press Start.",
      done: () => state.settings.depth === 10 && state.settings.activation === "tanh" && step() >= 50,
      happened: () =>
        `Now the gradient at layer 1 is ${plain(ratio())} times the last layer's, and the test accuracy is ` +
        `${accuracy()}.`,
      at: part("setup"),
    },
    {
      see: `The ${dfn("update")} divided by the weights says how much one step changes a layer. Typical are 0.001 to ` +
        `0.1.`,
      act: "Press “Learning rate 100”.",
      done: preset("Learning rate 100", 5),
      happened: sinceStart,
      at: part("ratios"),
    },
    {
      see: "Too small is also wrong, but it looks harmless: no number is large.",
      act: "Press “Learning rate 0.0001”, and wait for 250 steps.",
      done: preset("Learning rate 0.0001", 250),
      happened: sinceStart,
      at: part("ratios"),
    },
    {
      see: `A relu unit that is 0 for every example is ${dfn("dead unit", "dead")}: it gets no gradient, so it does ` +
        "not learn any more.",
      act: "Press “ReLU, SGD, rate 10: dead units”.",
      done: preset("ReLU, SGD, rate 10: dead units", 20),
      happened: () =>
        last().units && last().units.length
          ? `At step ${last().step} ${percent(last().units[0], 0)} of the units of layer 1 are dead and ` +
            `${percent(last().units.at(-1), 0)} of those of layer ${last().units.length}; the test accuracy is ` +
            `${accuracy()}.`
          : "Without hidden layers, or with fewer than 8 examples in a batch, no units are counted.",
      at: () => find("units").parentElement,
    },
    {
      see: `Numbers above 3.4 × 10³⁸ do not fit into 32 bits: ${dfn("overflow")}. The training stops before they get ` +
        "into the weights.",
      act: "Press “Overflow: linear, SGD, rate 100”.",
      done: () => Boolean(trainer().fault),
      happened: () => `Step ${signs().at(-1).step}: ${signs().at(-1).text}`,
      at: board,
    },
    {
      see: `With a small ${dfn("batch")} each step sees few examples, so its gradient is noisy.`,
      act: "Press “As in the run”, set Batch to 8, and press Start.",
      done: () => state.settings.batch === 8 && step() >= 100,
      happened: () => {
        const losses = records().slice(-50).map(({ loss }) => loss);
        return `The losses of the last ${losses.length} steps lie between ${plain(Math.min(...losses))} and ` +
          `${plain(Math.max(...losses))} nats. The address of this page has your settings: it is a link to this ` +
          `training.`;
      },
      at: part("loss"),
    },
  ];
}
