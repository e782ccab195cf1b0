// Signs that a training goes wrong: which quantity left its range, at which step, with its value.
import { number } from "gradfn/core/dom.js";
import { countedFor } from "gradfn/train/units.js";

// As the flags of gf.inspect: a gradient relative to the last layer's; the share of units.
const VANISHING = 1e-3, EXPLODING = 1e3, SHARE = 0.5;
const TOO_LONG = 1, TOO_SHORT = 1e-3, EARLY = 20; // updates relative to the weights; steps
// A loss relative to the first one; relative to that of guessing at LATE; and one that falls well, whatever else shows.
const RISEN = 2, STALLED = 0.9, LATE = 200, FALLEN = 0.5;

// Format a factor or a loss, with powers of ten only where it is very large or very small.
export function plain(value) {
  const size = Math.abs(value);
  if (size >= 1000 && size < 1e6) return value.toLocaleString("en", { maximumSignificantDigits: 2 });
  return size >= 1e-4 && size < 0.01 ? value.toPrecision(2) : number(value);
}

const percent = (share) => `${(100 * share).toFixed(1)} %`;

// Where the values of layers are furthest in a direction, and cross a limit there: { layer, value }, else null.
function worst(values, limit, larger) {
  const sign = larger ? 1 : -1;
  let layer = 0;
  values.forEach((value, l) => {
    if (sign * value > sign * values[layer]) layer = l;
  });
  return values.length && sign * values[layer] > sign * limit ? { layer, value: values[layer] } : null;
}

// Each sign returns a sentence where it shows in a record; `about` is { first: the first record, activation, guessing:
// the loss where each class has the same probability }.
const signs = {
  loss: ({ loss }, { first, guessing }) =>
    loss > RISEN * Math.max(first.loss, guessing) &&
    `The loss rises: it is ${plain(loss)} nats, after ${plain(first.loss)} at the start.`,
  vanishing: ({ norms }) => {
    const last = norms[norms.length - 1];
    const found = worst(norms.slice(0, -1).map((each) => each / last), VANISHING, false);
    return found && `The gradient vanishes: its norm at layer ${found.layer + 1} is ${plain(norms[found.layer])}, ` +
      `${plain(found.value)} times the last layer's.`;
  },
  exploding: ({ norms }) => {
    const last = norms[norms.length - 1];
    const found = worst(norms.slice(0, -1).map((each) => each / last), EXPLODING, true);
    return found && `The gradient explodes: its norm at layer ${found.layer + 1} is ${plain(norms[found.layer])}, ` +
      `${plain(found.value)} times the last layer's.`;
  },
  units: ({ loss, units }, { first, activation }) => {
    const found = units && worst(units, SHARE, true);
    if (!found) return null;
    const layer = `layer ${found.layer + 1}`, share = percent(found.value);
    const nevertheless = loss < FALLEN * first.loss ? ` The loss falls nevertheless: it is ${plain(loss)} nats.` : "";
    return countedFor(activation) === "dead"
      ? `Units are dead: ${share} of ${layer} are zero for every example of the batch.${nevertheless}`
      : `Units are saturated: ${share} of the activations of ${layer} have almost no slope.${nevertheless}`;
  },
  large: ({ ratios }) => {
    const found = ratios && worst(ratios, TOO_LONG, true);
    return found && `The update is too large: that of layer ${found.layer + 1} is ${plain(found.value)} times as ` +
      "long as its weights.";
  },
  small: ({ step, ratios }) => {
    if (step !== EARLY || !ratios || Math.max(...ratios) >= TOO_SHORT) return null;
    return `The update is too small: in no layer is it longer than ${plain(Math.max(...ratios))} times the weights.`;
  },
  stalled: ({ step, loss }, { guessing }) =>
    step === LATE &&
    loss > STALLED * guessing &&
    `It has hardly learned: the loss is ${plain(loss)} nats; guessing costs ${plain(guessing)}.`,
};

const fault = ({ first, loss }) =>
  first
    ? `A number is not finite, and the training has stopped: ${first.name}${first.layer + 1}, ${first.of} of layer ` +
      `${first.layer + 1}, is ${String(first.value).replace("-", "−")}. ` +
      "It was the first one. Press Restart to train again."
    : `The loss is not finite (${loss}), and the training has stopped. Press Restart to train again.`;

// Collect signs over the records of a training, each once: `look(record)`, then `found` is [{ kind, step, text,
// harmless }]; harmless where the loss fell well until then.
export function makeSigns(activation, classes) {
  const found = [], guessing = Math.log(classes);
  let first = null;
  return {
    found,
    look(record) {
      first ??= record;
      const harmless = record.loss < FALLEN * first.loss;
      const add = (kind, text) => found.push({ kind, step: record.step, text, harmless });
      if (record.fault) return add("fault", fault(record.fault));
      for (const [kind, sentence] of Object.entries(signs)) {
        if (found.some((each) => each.kind === kind)) continue;
        if (kind === "small" && found.length) continue; // a consequence of what showed before
        const text = sentence(record, { first, activation, guessing });
        if (text) add(kind, text);
      }
    },
  };
}
