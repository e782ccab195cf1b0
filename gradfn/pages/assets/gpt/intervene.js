// Interventions: parts are scaled or get values from another text; the loss and the predictions before and after.
import { element, number } from "gradfn/core/dom.js";
import { weighted, weightsOf, largest } from "gradfn/gpt/blame.js";
import { losses } from "gradfn/gpt/loss.js";
import { percent, quoted, visible } from "gradfn/gpt/names.js";
import {
  applicable, changedParts, LARGEST, partName, positionsOf, rangesOf, scaled, sitesOf, sources, switches, taken,
  without,
} from "gradfn/gpt/parts.js";
import { patchLines, setupLines } from "gradfn/gpt/python.js";
import { distribution } from "gradfn/gpt/sampling.js";
import { signed } from "gradfn/gpt/signed.js";
import { makeStrip, roving } from "gradfn/gpt/strip.js";
import { decode, encode, names as namesOf } from "gradfn/gpt/tokenizer.js";

export { applicable, editsFromText, editsToText } from "gradfn/gpt/parts.js";

const SHOWN = 8; // tokens whose probabilities are compared
const UNCHANGED = "Without a change it is the loss itself. Switch off a part, and its edit appears here.";
const capital = (text) => text[0].toUpperCase() + text.slice(1);
const times = (scale) => `×${Number(scale.toFixed(2))}`;

export function makeIntervene(find, model, change) {
  const parts = switches(model);
  let now = null, state = null, names = [];
  let chosen = null; // the part of the slider

  const scaleOf = (part) => changedParts(model, state.edits).get(part)?.scale ?? (isTaken(part) ? null : 1);
  const isTaken = (part) => changedParts(model, state.edits).get(part)?.from !== undefined;

  // The sites of a part as Python would index them.
  const indexed = (part) =>
    sitesOf(model, part).map(({ site, head }) => (head === null ? site : `${site}[:, ${head}]`)).join(", ");

  function setScale(part, scale) {
    const others = without(model, state.edits, part);
    change({ edits: scale === 1 ? others : [...others, ...scaled(model, part, scale)] });
  }

  const colored = "The text, colored by the change of each token's loss";
  const worse = makeStrip(find("worse"), colored, (position) => change({ position }));

  // The grid of parts.
  const titles = { h: "head", a: "attention", m: "feed-forward", b: "whole block" };
  const columns = parts[0].map((part) => [titles[part[0]], ...part.split(".").slice(1)].join(" "));
  find("switch-head").append(...["block", ...columns].map((name) => element("th", { scope: "col" }, name)));
  const buttons = new Map(parts.flat().map((part) => {
    const toggle = () => {
      chosen = part;
      setScale(part, scaleOf(part) === 1 ? 0 : 1);
    };
    const attributes = { type: "button", "data-part": part, onclick: toggle, onfocus: () => choose(part) };
    return [part, element("button", attributes)];
  }));
  find("switches").append(...parts.map((ofBlock, block) =>
    element("tr", {}, element("th", { scope: "row" }, `${block}`),
      ...ofBlock.map((part) => element("td", {}, buttons.get(part))))));
  roving(find("switches"), () => columns.length)();
  const slider = find("factor");
  slider.max = LARGEST;
  slider.addEventListener("input", () => setScale(chosen, Number(slider.value)));
  find("undo-all").addEventListener("click", () => change({ edits: [] }));

  function choose(part) {
    chosen = part;
    if (state) drawSlider();
  }

  // Values from another text.
  const otherText = find("other-text"), otherPart = find("other-part"), otherPositions = find("other-positions");
  otherPart.append(...sources(model).map((part) => element("option", { value: part }, partName(part))));
  otherPart.value = "r0";
  for (const input of [otherText, otherPart, otherPositions]) input.addEventListener("input", drawOther);
  const takeIt = () => {
    const { edits } = otherEdits();
    if (edits) change({ edits: [...without(model, state.edits, otherPart.value), ...edits] });
  };
  find("take").addEventListener("click", takeIt);
  otherPositions.addEventListener("keydown", (event) => event.key === "Enter" && takeIt());
  // It starts as this text, to change a few characters of.
  find("other").addEventListener("toggle", () => {
    if (!find("other").open || otherText.value || !now) return;
    otherText.value = decode(model, now.pass.tokens);
    drawOther();
  });

  // The edits that the form describes, or why there are none.
  function otherEdits() {
    const n = now.pass.tokens.length, { tokens, unknown } = encode(model, otherText.value);
    const named = unknown.slice(0, 12).map(quoted).join(" ");
    const left = unknown.length ? ` Left out, as the model does not have them: ${named}.` : "";
    if (!otherText.value) return { why: `Type a text of ${n} tokens, such as this one with some changed.` };
    if (tokens.length !== n) return { why: `It has ${tokens.length} tokens; it needs ${n}, as this text has.${left}` };
    const all = `0-${n - 1}`;
    const positions = positionsOf(otherPositions.value.trim() || all, n);
    if (!positions.length) return { why: `Positions must be integers from 0 to ${n - 1}, such as 0-2, 4.` };
    const differs = tokens.reduce((count, token, t) => count + (token !== now.pass.tokens[t]), 0);
    const edits = taken(model, otherPart.value, otherText.value, positions);
    return { edits, why: `It has ${n} tokens, of which ${differs} differ from this text.${left}` };
  }

  function drawOther() {
    if (!now) return;
    const { edits, why } = otherEdits();
    find("other-note").textContent = why;
    find("take").disabled = !edits;
  }

  function show(newNow, newState) {
    [now, state] = [newNow, newState];
    names = namesOf(model, now.pass.tokens);
    chosen ??= changedParts(model, state.edits).keys().next().value ?? parts[0][0];
    if (!buttons.has(chosen)) chosen = parts[0][0];
    drawGrid();
    drawSlider();
    drawOther();
    drawChanges();
    const before = now.lossesWithout ?? losses(now.without, now.targets);
    drawLosses(before);
    drawProbabilities();
    drawWorse(before);
    drawPython();
  }

  function drawGrid() {
    for (const [part, button] of buttons) {
      const scale = scaleOf(part);
      const named = scale === null ? ", now from another text" : scale === 1 || !scale ? "" : `, now ${times(scale)}`;
      button.textContent = scale === null ? "other" : scale === 1 ? "on" : scale === 0 ? "off" : times(scale);
      button.className = scale === 1 ? "" : scale === 0 ? "off" : "changed-part";
      button.setAttribute("aria-pressed", scale === 1 ? "false" : scale === 0 ? "true" : "mixed");
      button.setAttribute("aria-label", `Switch off ${partName(part)}${named}`);
      button.title = indexed(part);
    }
  }

  function drawSlider() {
    const scale = scaleOf(chosen);
    for (const [part, button] of buttons) button.classList.toggle("chosen", part === chosen);
    find("factor-label").textContent = `Factor of ${partName(chosen)}`;
    slider.value = scale ?? 1;
    slider.setAttribute("aria-valuetext", scale === null ? "values of another text" : times(scale));
    find("factor-value").textContent = scale === null ? "other" : times(scale);
  }

  // What is changed, each with the name of its site, and a button that undoes it.
  function drawChanges() {
    const changed = [...changedParts(model, state.edits)];
    find("changes").replaceChildren(...changed.map(([part, { scale, from, positions, length }]) => {
      const fits = length === undefined || length === now.pass.tokens.length;
      const what = from === undefined
        ? times(scale)
        : `from ${quoted(from.length > 40 ? `${from.slice(0, 40)}…` : from)}, positions ${rangesOf(positions, ", ")}` +
          (fits ? "" : `. Not applied: it has ${length} tokens, and the text has ${now.pass.tokens.length}`);
      const said = `Undo: ${partName(part)}`;
      const undo = () => {
        change({ edits: without(model, state.edits, part) });
        (find("undo-all").disabled ? buttons.get(parts[0][0]) : find("undo-all")).focus();
      };
      return element("li", { class: fits ? "" : "unfit" },
        element("span", {}, `${capital(partName(part))}: ${what} `, element("code", {}, indexed(part))),
        element("button", { type: "button", class: "small", onclick: undo, "aria-label": said }, "Undo"));
    }));
    const none = element("li", { class: "hint" }, "None: this is the model as trained.");
    if (!changed.length) find("changes").append(none);
    find("undo-all").disabled = !changed.length;
  }

  function drawLosses(before) {
    const { position } = state, after = now.losses;
    const all = weightsOf(now.targets, null);
    const some = now.targets.some((target) => target >= 0);
    const rows = some ? [["whole text, per token", weighted(before, all), weighted(after, all)]] : [];
    if (now.targets[position] >= 0) {
      const [next] = namesOf(model, [now.targets[position]]);
      const name = `position ${position}: ${quoted(names[position])}, then ${quoted(next)}`;
      rows.push([name, before[position], after[position]]);
    }
    find("effect-rows").replaceChildren(...rows.map(([name, was, is]) => {
      const kind = is > was ? "more" : is < was ? "less" : "";
      const difference = element("td", {}, element("b", { class: kind }, signed(is - was)));
      const numbers = [was, is].map((loss) => element("td", {}, number(loss)));
      return element("tr", {}, element("th", { scope: "row" }, name), ...numbers, difference);
    }));
    const changed = applicable(state.edits, now.pass.tokens.length).length > 0;
    if (!some) find("effect").textContent = "There is no loss yet: type at least two characters.";
    else if (!changed) find("effect").textContent = "Nothing is changed yet: switch off a part.";
    else {
      const [, was, is] = rows[0];
      const moved = `${number(was)} → ${number(is)} nats per token (${signed(is - was)})`;
      find("effect").textContent = `Loss of the text: ${moved}.`;
    }
  }

  function drawProbabilities() {
    const { position } = state, { vocab } = model.config;
    const row = (pass) => pass.sites.logits.values.subarray(position * vocab, (position + 1) * vocab);
    const before = distribution(row(now.without), { temperature: 1, topK: null });
    const after = distribution(row(now.pass), { temperature: 1, topK: null });
    const shown = largest(before.map((was, i) => Math.max(was, after[i])), SHOWN);
    const target = now.targets[position];
    if (target >= 0 && !shown.includes(target)) shown.push(target);
    const glyphs = namesOf(model, Int32Array.from(shown));
    const most = Math.max(...shown.flatMap((token) => [before[token], after[token]]));
    find("probabilities-title").textContent = `Next token after ${quoted(names[position])} at position ${position}`;
    find("probabilities").replaceChildren(...shown.map((token, i) => {
      const bar = (share, kind) => {
        const line = element("i", { class: kind });
        line.style.setProperty("--level", share / most);
        return line;
      };
      const text = `${percent(before[token])} → ${percent(after[token])}`;
      return element("li", {}, element("b", {}, visible(glyphs[i])),
        element("span", { class: "pair-bars" }, bar(before[token], "was"), bar(after[token], "is")),
        element("span", { class: "value" }, text), element("small", {}, token === target ? "follows" : ""));
    }));
  }

  // The loss of a token is that of the position before it.
  function drawWorse(before) {
    const predicted = names.map((_, i) => i > 0 && now.targets[i - 1] >= 0);
    const changes = names.map((_, i) => (predicted[i] ? now.losses[i - 1] - before[i - 1] : 0));
    const most = Math.max(...changes.map(Math.abs)) || 1;
    const look = (i) => ({
      title: predicted[i] ? `loss ${number(before[i - 1])} → ${number(now.losses[i - 1])} nats` : "not predicted",
      share: changes[i] / most,
    });
    worse.show(names, look, state.position, null);
    const top = largest(changes, 3).map((i) => `${quoted(names[i])} at position ${i} (${signed(changes[i])} nats)`);
    const legend = "Red: the token's loss is larger than before. Blue: smaller.";
    find("worse-named").textContent = top.length ? `Worst: ${top.join(", ")}. ${legend}` : legend;
  }

  function drawPython() {
    const { tokens } = now.pass, edits = applicable(state.edits, tokens.length);
    const position = !state.whole && now.targets[state.position] >= 0 ? state.position : null;
    const weights = weightsOf(now.targets, position);
    const counted = now.targets.map((target, t) => (weights[t] ? target : -1));
    const some = counted.some((target) => target >= 0);
    const { before, line } = patchLines(model, edits);
    find("python").textContent = some ? [...before, line].join("\n") : "";
    find("python-none").textContent = edits.length ? "" : UNCHANGED;
    const what = position === null ? "of the whole text, per token" : `at position ${position}`;
    const loss = weighted(now.losses, weights).toPrecision(6);
    find("python-value").textContent = some ? `It returns the loss ${what}: ${loss} nats.` : "";
    find("setup").textContent = setupLines(model, tokens, counted, stepNow()).join("\n");
  }

  // The step of the checkpoint that is shown; null for the trained model.
  function stepNow() {
    const { checkpoints } = model;
    if (!checkpoints?.length || state.checkpoint === checkpoints.length - 1) return null;
    return checkpoints[state.checkpoint]?.step ?? null;
  }

  return { show };
}
