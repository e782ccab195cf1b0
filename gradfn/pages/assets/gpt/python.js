// The lines of Python that do with gf.patch what was done in the page.
import { encode } from "gradfn/gpt/tokenizer.js";

// The edits as the argument of gf.patch, with the lines that it needs before: values from other texts.
export function patchLines(model, edits) {
  const bySite = new Map();
  for (const edit of edits) bySite.set(edit.site, [...(bySite.get(edit.site) || []), edit]);
  const texts = [...new Set(edits.filter((edit) => edit.from !== undefined).map((edit) => edit.from))];
  const before = texts.flatMap((from, i) => {
    const sites = [...new Set(edits.filter((edit) => edit.from === from).map((edit) => edit.site))];
    const keep = `[${sites.map(quoted).join(", ")}]`;
    return [
      `other${i} = jnp.array(${list(encode(model, from).tokens)})  # ${JSON.stringify(from)}`,
      `values${i} = gf.capture(loss, keep=${keep})(params, (other${i}, other${i}))`,
    ];
  });
  const items = [...bySite].map(([site, ofSite]) => `${quoted(site)}: ${edited(model, ofSite, texts)}`);
  const inside = items.length ? `{\n${items.map((item) => `    ${item},\n`).join("")}}` : "{}";
  return { before, line: `gf.patch(loss, ${inside})(params, (tokens, targets))` };
}

// The lines that load what the line above needs: the model, its parameters, and a text. `step` is that of a checkpoint
// that was kept along the way; null for the last one.
export function setupLines({ config }, tokens, targets, step) {
  const file = step === null ? "FOLDER" : `FOLDER/kept/${String(step).padStart(10, "0")}.safetensors`;
  return [
    "import jax.numpy as jnp",
    "import gradfn as gf",
    ...(config.feed ? gptLines(config) : attentionLines(config)),
    "loss = gf.next_token_loss(net)",
    `params = gf.train.load_params("${file}")  # FOLDER: of this run`,
    `tokens = jnp.array(${list(tokens)})`,
    `targets = jnp.array(${list(targets)})  # -1 does not count`,
  ];
}

function gptLines(config) {
  const settings = Object.entries(config).map(([name, value]) => `    ${name}=${literal(value)},`);
  return ["", "net = gf.gpt(gf.GPTConfig(", ...settings, "))"];
}

// The net without feed-forward layers is that of an experiment.
function attentionLines({ width, n_heads: nHeads }) {
  return [
    "from gradfn.experiments.induction import attention_only",
    "",
    `net = attention_only(width=${width}, n_heads=${nHeads})`,
  ];
}

function literal(value) {
  if (typeof value === "boolean") return value ? "True" : "False";
  return value === null ? "None" : JSON.stringify(value);
}

// One edit of a value: of a single part where that is all, else one after the other.
function edited(model, ofSite, texts) {
  const ofHeads = ofSite.every((edit) => edit.from === undefined && edit.head !== null && edit.positions === null);
  if (ofSite.length > 1 && ofHeads) {
    const factors = Array.from({ length: model.config.n_heads }, () => 1);
    for (const { head, scale } of ofSite) factors[head] *= scale;
    return `lambda mixed: mixed * jnp.array([${factors.map(float).join(", ")}])[None, :, None]`;
  }
  const each = ofSite.map((edit) => single(edit, texts));
  if (each.length === 1) return each[0];
  return `lambda value: ${each.reduce((inner, edit) => `(${edit})(${inner})`, "value")}`;
}

function single({ site, head, positions, scale, from }, texts) {
  const rows = positions === null ? "slice(None)" : `jnp.array(${list(positions)})`;
  const index = head === null ? rows : `(${rows}, ${head})`;
  const other = `values${texts.indexOf(from)}[${quoted(site)}].value[${index}]`;
  if (from !== undefined) return `gf.circuits.at(${index}, ${other})`;
  const function_ = scale === 0 ? "gf.circuits.zero" : `lambda value: ${float(scale)} * value`;
  return head === null && positions === null ? function_ : `gf.circuits.at(${index}, ${function_})`;
}

const quoted = (site) => `"${site}"`;
const float = (value) => (Number.isInteger(value) ? value.toFixed(1) : `${value}`);
const list = (values) => `[${Array.from(values).join(", ")}]`;
