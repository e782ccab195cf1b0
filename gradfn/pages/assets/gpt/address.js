// The state of the page as texts by name, for its address, and back.
import { bounded, LARGEST_SEED } from "gradfn/gpt/write.js";

// Return the texts of a state: what differs from the defaults.
export function toAddress(state, model, read, editsToText) {
  const { position, tokens, checkpoint, head, direction, temperature, topK, seed, edits, whole, step } = state;
  const last = (model.checkpoints || []).length - 1;
  return {
    text: read,
    empty: read === "" ? 1 : null,
    at: position === tokens.length - 1 ? null : position,
    checkpoint: checkpoint === last || last < 0 ? null : checkpoint,
    head: head || null,
    direction: direction === "from" ? null : direction,
    temperature: temperature === 1 ? null : temperature,
    topK,
    seed: seed || null,
    edits: editsToText(edits),
    whole: whole ? null : 0,
    step: step || null,
  };
}

// Return the parts of a state that the texts of an address give. What makes no sense is left out.
export function fromAddress(texts, model, editsFromText) {
  const last = (model.checkpoints || []).length - 1, heads = model.config.n_layers * model.config.n_heads;
  const temperature = Number(texts.temperature ?? 1);
  const found = {
    position: bounded(texts.at ?? "", 0, Infinity, null),
    checkpoint: bounded(texts.checkpoint ?? "", 0, Math.max(last, 0), Math.max(last, 0)),
    head: bounded(texts.head ?? "", 0, heads - 1, 0),
    direction: texts.direction === "to" ? "to" : "from",
    temperature: temperature >= 0 && temperature <= 2 ? temperature : 1,
    topK: bounded(texts.topK ?? "", 1, model.config.vocab, null),
    seed: bounded(texts.seed ?? "", 0, LARGEST_SEED, 0),
    edits: editsFromText(texts.edits || ""),
    whole: texts.whole !== "0",
    step: bounded(texts.step ?? "", 0, 10_000, 0),
  };
  if (texts.text || texts.empty) found.text = texts.text || "";
  return found;
}
