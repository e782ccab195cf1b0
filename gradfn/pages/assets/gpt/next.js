// The next token: the most probable ones after the chosen position, with their probabilities.
import { element, number } from "gradfn/core/dom.js";
import { distribution } from "gradfn/gpt/sampling.js";
import { names } from "gradfn/gpt/tokenizer.js";
import { percent, quoted, spoken, visible } from "gradfn/gpt/names.js";

const SHOWN = 10;

// Make it: `append(token)` continues the text after the chosen position.
export function makeNext(find, model, append) {
  const rows = Array.from({ length: SHOWN + 1 }, () => {
    const button = element("button", { type: "button", class: "candidate" });
    const bar = element("span", { class: "share" }, element("i"));
    button.append(element("b"), bar, element("span", { class: "value" }), element("small"));
    button.addEventListener("click", () => append(+button.dataset.token));
    return button;
  });
  find("next").append(...rows);

  function show(now, state) {
    const { vocab } = model.config, { position } = state;
    const row = now.pass.logits.subarray(position * vocab, (position + 1) * vocab);
    const probabilities = distribution(row, state);
    const shown = most(probabilities, SHOWN);
    const target = now.targets[position];
    const others = target >= 0 && !shown.includes(target) ? [target] : [];
    const listed = [...shown, ...others];
    const named = names(model, Int32Array.from(listed));
    rows.forEach((button, i) => {
      button.hidden = i >= listed.length;
      if (button.hidden) return;
      const token = listed[i], share = probabilities[token];
      const [glyph, bar, value, note] = button.children;
      button.dataset.token = token;
      glyph.textContent = visible(named[i]);
      bar.style.setProperty("--share", share);
      value.textContent = percent(share);
      note.textContent = token === target ? "follows" : "";
      button.classList.toggle("target", token === target);
      const follows = token === target ? ", follows in the text" : "";
      button.setAttribute("aria-label", `${spoken(named[i])}, ${percent(share)}${follows}. Continue with it`);
    });
    find("next-title").replaceChildren("Next token after ",
      element("b", { class: "glyph" }, visible(now.names[position])));
    find("next-note").textContent = note(now, state, listed.length < vocab, probabilities);
  }

  function note(now, { position, temperature, topK }, more, probabilities) {
    const follows = now.targets[position] >= 0;
    const parts = [];
    if (temperature !== 1 || topK) {
      const only = topK && topK < model.config.vocab ? `, of the ${topK} most probable tokens` : "";
      parts.push(`Probabilities at temperature ${temperature.toFixed(1)}${only}.`);
    }
    if (model.lines && position && now.names[position] === "↵") parts.push("The line ends here: no training text " +
      "went further.");
    if (follows) {
      const [name] = names(model, now.targets.subarray(position, position + 1));
      parts.push(`${quoted(name)} follows: loss ${number(now.losses[position])} nats. Click another token to ` +
        `continue with it instead.`);
    } else parts.push("Click a token to continue with it.");
    return parts.join(" ");
  }

  return { show };
}

// The indices of the largest values, the largest first; of equal ones the first.
export function most(values, k) {
  const order = Array.from(values.keys()).sort((a, b) => values[b] - values[a] || a - b);
  return order.slice(0, k);
}
