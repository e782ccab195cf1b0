// The settings of a training: their controls, their limits, and their text in the address.
import { element } from "gradfn/core/dom.js";
import { names } from "gradfn/train/optimizers.js";

const ACTIVATIONS = { sigmoid: "sigmoid", tanh: "tanh", relu: "relu", gelu: "gelu", identity: "none (linear)" };
const SCALES = { 0.1: "× 0.1", 0.3: "× 0.3", 1: "× 1", 3: "× 3", 10: "× 10" };
const RATES = [1e-6, 100];
const MAX_DEPTH = 10;
// With one of these a training starts again; the others hold from the next step.
export const RESTARTING = ["depth", "width", "activation", "scale", "seed"];

// The settings of the run itself, with Adam at its first rate.
export function settingsOf(content) {
  const hidden = content.sizes.slice(1, -1);
  return {
    depth: hidden.length,
    width: hidden[0] ?? 16,
    activation: content.activation,
    optimizer: "adam",
    rate: content.rate,
    batch: content.batch,
    scale: 1,
    seed: content.seed,
  };
}

// What breaks a training, by the text of its button; "As in the run" undoes it.
export const PRESETS = {
  "Ten sigmoid layers": { depth: 10, activation: "sigmoid" },
  "Learning rate 100": { rate: 100 },
  "Learning rate 0.0001": { rate: 0.0001 },
  "ReLU, SGD, rate 10: dead units": { depth: 2, activation: "relu", optimizer: "sgd", rate: 10 },
  "Overflow: linear, SGD, rate 100": { depth: 3, activation: "identity", optimizer: "sgd", rate: 100, scale: 3 },
  "As in the run": {},
};

// The settings of a preset, given those of the run; and whether settings are these.
export const presetSettings = (name, defaults) => ({ ...defaults, ...PRESETS[name] });
export function isPreset(name, settings, defaults) {
  return Object.entries(presetSettings(name, defaults)).every(([key, value]) => settings[key] === value);
}

// Settings from texts, for example of the address: what is not a valid setting is left out.
export function validSettings(texts, content, maxWidth) {
  const integer = (from, to) => (text) => (/^\d+$/.test(text) && +text >= from && +text <= to ? +text : undefined);
  const among = (of) => (text) => (Object.hasOwn(of, text) ? text : undefined);
  const activations = { ...ACTIVATIONS, [content.activation]: 1 };
  const rules = {
    depth: integer(0, MAX_DEPTH),
    width: integer(1, maxWidth),
    activation: among(activations),
    optimizer: among(names),
    rate: (text) => (text.trim() && +text >= RATES[0] && +text <= RATES[1] ? +text : undefined),
    batch: integer(0, 1e9),
    scale: (text) => (Object.hasOwn(SCALES, text) ? +text : undefined),
    seed: integer(0, 2 ** 32 - 1),
  };
  const known = Object.entries(texts).filter(([name]) => Object.hasOwn(rules, name));
  const found = known.map(([name, text]) => [name, rules[name](String(text))]);
  return Object.fromEntries(found.filter(([, value]) => value !== undefined));
}

// Call `changed(some settings)` for a setting and `chosen(name of a preset)`; `show(settings)` shows them.
export function makeControls(find, content, defaults, changed, chosen) {
  const maxWidth = Number(find("width").max), n = content.n;
  const fill = (name, of) => find(name).append(...of.map(([value, text]) => element("option", { value }, text)));
  fill("activation", Object.entries({ [content.activation]: content.activation, ...ACTIVATIONS }));
  fill("optimizer", Object.entries(names));
  fill("scale", Object.entries(SCALES).sort(([a], [b]) => a - b));
  const batches = [...new Set([8, 32, 128, content.batch])].filter((size) => size && size < n).sort((a, b) => a - b);
  fill("batch", [...batches.map((size) => [size, `${size}`]), [0, `all ${n.toLocaleString("en")}`]]);

  // What a field has is used where it is valid; else the field says so, and nothing changes.
  const read = (name, field, event) =>
    field.addEventListener(event, () => {
      const valid = validSettings({ [name]: field.value }, content, maxWidth);
      field.setAttribute("aria-invalid", !(name in valid));
      if (name in valid) changed(valid);
    });
  for (const name of ["depth", "width", "rate", "seed"]) read(name, find(name), "input");
  for (const name of ["activation", "optimizer", "batch", "scale"]) read(name, find(name), "change");
  find("rate-slider").addEventListener("input", () => {
    changed({ rate: Number((10 ** Number(find("rate-slider").value)).toPrecision(2)) });
  });
  find("setup").addEventListener("submit", (event) => event.preventDefault());
  // A field that is left with something invalid shows the setting again.
  find("setup").addEventListener("focusout", () => shown && show(shown));

  const buttons = Object.keys(PRESETS).map((name) =>
    element("button", { type: "button", class: "small", onclick: () => chosen(name) }, name),
  );
  find("presets").append(...buttons);

  let shown = null;
  function show(settings) {
    shown = settings;
    for (const name of ["depth", "width", "activation", "optimizer", "rate", "batch", "scale", "seed"]) {
      const field = find(name);
      // Not while someone types, "1e-" for example.
      if (field === document.activeElement && field.type === "number"
        && Number(field.value) === settings[name]) continue;
      if (field === document.activeElement && field.getAttribute("aria-invalid") === "true") continue;
      field.value = settings[name];
      field.setAttribute("aria-invalid", false);
    }
    find("depth-value").textContent = settings.depth;
    find("width-value").textContent = settings.depth ? settings.width : "–";
    find("width").disabled = !settings.depth;
    const slider = find("rate-slider");
    if (slider !== document.activeElement) slider.value = Math.log10(settings.rate);
    slider.setAttribute("aria-valuetext", `${settings.rate}`);
    buttons.forEach((button) => button.setAttribute("aria-pressed", isPreset(button.textContent, settings, defaults)));
  }
  return { show };
}
