// The text: where it is typed, and its tokens with the loss of each and, below, the attention of the chosen head.
import { element, number } from "gradfn/core/dom.js";
import { headsOf, nameOf, patternOf, percent, quoted, spoken, visible } from "gradfn/gpt/names.js";
import { only, rove } from "gradfn/gpt/rove.js";

const LABEL = 16; // characters of a sample on its button

// Make it: `change` takes new parts of the state, `preview(position)` shows the attention of a token under the pointer.
export function makeText(find, model, change, preview) {
  const area = find("text"), strip = find("tokens");
  const heads = headsOf(model);
  let buttons = [], shown = null;

  area.addEventListener("input", () => change({ text: area.value }));
  const samples = (model.samples || []).map((sample) => {
    const name = sample.trim().replace(/\s+/g, " ");
    const short = name.length > LABEL ? `${name.slice(0, LABEL).trim()}…` : name || "↵";
    const start = () => change({ text: sample });
    return element("button", { type: "button", class: "small", title: name, onclick: start }, short);
  });
  const none = element("button", { type: "button", class: "small", onclick: () => change({ text: "" }) }, "Clear");
  find("samples").append(...samples, none);

  rove(strip, () => buttons, () => ({ ArrowLeft: -1, ArrowRight: 1 }), (position) => change({ position }));
  strip.addEventListener("click", (event) => {
    const position = buttons.indexOf(event.target.closest("button"));
    if (position >= 0) change({ position });
  });
  strip.addEventListener("pointerover", (event) => {
    const position = buttons.indexOf(event.target.closest("button"));
    if (position >= 0 && event.pointerType !== "touch") preview(position);
  });
  strip.addEventListener("pointerleave", () => preview(null));

  // The buttons stay while the text grows or changes, so that the focus stays, too.
  function build(names) {
    while (buttons.length < names.length) {
      const button = element("button", { type: "button", class: "token" });
      button.append(element("span"), element("i"));
      buttons.push(button);
      strip.append(button);
    }
    buttons.splice(names.length).forEach((button) => button.remove());
    names.forEach((name, i) => {
      const [glyph] = buttons[i].children;
      const text = visible(name);
      if (glyph.textContent !== text) glyph.textContent = text;
    });
  }

  function show(now, state) {
    const { names, losses } = now, { position, text, written } = state;
    const fresh = !shown || shown.names !== names;
    if (area.value !== text) area.value = text;
    find("text-note").textContent = noteOf(model, state, names.length);
    if (fresh) build(names);
    const most = Math.log(model.config.vocab);
    const head = heads[state.head];
    const weights = attentionOf(patternOf(model, now.pass, head), names.length, position, state.direction);
    const largest = Math.max(...weights) || 1;
    buttons.forEach((button, i) => {
      const loss = i ? losses[i - 1] : NaN;
      const share = Number.isNaN(loss) ? 0 : Math.min(loss / most, 1);
      button.style.setProperty("--loss", `${(55 * share).toFixed(1)}%`);
      button.style.setProperty("--look", (weights[i] / largest).toFixed(3));
      button.setAttribute("aria-pressed", i === position);
      button.classList.toggle("written", i >= names.length - written);
      const surprise = Number.isNaN(loss) ? "no loss" : `loss ${number(loss)} nats`;
      button.setAttribute("aria-label", `${spoken(names[i])}, position ${i}, ${surprise}`);
    });
    only(buttons, position);
    find("loss-most").textContent = `${number(most)} (a guess among ${model.config.vocab} tokens)`;
    find("token-said").textContent = said(now, state, weights, nameOf(head));
    if (fresh || shown.position !== position) keepVisible(strip, buttons[position]);
    shown = { names, position };
  }

  return { show };
}

// The attention from a position to each token, or of each token to a position, of a pattern [T, T].
export function attentionOf(pattern, n, position, direction) {
  if (direction === "to") return Float32Array.from({ length: n }, (_, t) => pattern[t * n + position]);
  return pattern.subarray(position * n, (position + 1) * n);
}

function said({ names, losses }, { position, direction }, weights, head) {
  const loss = position ? losses[position - 1] : NaN;
  const surprise = Number.isNaN(loss)
    ? position ? "has no loss" : "is the first token: nothing predicted it"
    : `had a probability of ${percent(Math.exp(-loss))}: loss ${number(loss)} nats`;
  const most = weights.indexOf(Math.max(...weights));
  const looks = direction === "to"
    ? `Bars: attention of head ${head} to it; most from ${quoted(names[most])}`
    : `Bars: attention of head ${head} from it; most to ${quoted(names[most])}`;
  const back = Math.abs(position - most);
  const where = back === 0 ? "itself" : `${back} ${direction === "to" ? "later" : "back"}`;
  return `${quoted(names[position])} at position ${position} ${surprise}. ${looks} (${where}), ` +
    `${percent(weights[most])}.`;
}

function noteOf(model, { text, unknown, total, start }, n) {
  const notes = [];
  if (start) notes.push(`The text is empty: the model reads ${quoted(start)} instead.`);
  if (total > n) notes.push(`The model reads the last ${n.toLocaleString("en")} of ${total.toLocaleString("en")} ` +
    `tokens: ${whyNotAll(model, n)}.`);
  if (unknown.length) {
    const named = [...new Set(unknown)];
    const more = named.length > 12 ? ` and ${named.length - 12} more` : "";
    notes.push(`Left out, as the model does not have them: ${named.slice(0, 12).map(quoted).join(" ")}${more}.`);
  }
  return notes.join(" ");
}

function whyNotAll({ lines, context }, n) {
  if (lines && n < context) return "each line is a text of its own";
  return n < context ? `when its context of ${context} is full, writing drops the earlier half` : "its context";
}

// Scroll within the strip alone, and never the page.
function keepVisible(strip, button) {
  if (!button) return;
  const top = button.offsetTop, bottom = top + button.offsetHeight;
  if (top < strip.scrollTop) strip.scrollTop = top;
  else if (bottom > strip.scrollTop + strip.clientHeight) strip.scrollTop = bottom - strip.clientHeight;
}
