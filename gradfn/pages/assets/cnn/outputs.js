// The probability of each class, and beside it the one before filters were switched off.
import { element, number, percent as plainPercent } from "gradfn/core/dom.js";

const ALL = 12; // classes that are shown in their order; of more, the most probable ones are
const MOST = 10;

export const percent = (share) => plainPercent(share).replaceAll(" ", "\u00a0");
// A probability in a formula: where it is almost 1, what it lacks says more.
export const probability = (p) => (p > 0.99 && p < 1 ? `(1 − ${number(1 - p)})` : p.toPrecision(3));

export function makeOutputs(find, net) {
  const rows = Array.from({ length: Math.min(net.classes, net.classes > ALL ? MOST : ALL) }, () => {
    const label = element("b"), bar = element("i"), was = element("u"), share = element("small");
    const row = element("div", {}, label, element("span", { class: "level" }, bar, was), share);
    find("outputs").append(row);
    return { row, label, bar, was, share };
  });

  return {
    // `without` are the probabilities with all filters on, null where they are on.
    show(probabilities, without) {
      const order = Array.from(probabilities, (_, label) => label);
      if (net.classes > ALL) order.sort((a, b) => probabilities[b] - probabilities[a]);
      const best = probabilities.indexOf(Math.max(...probabilities));
      rows.forEach(({ row, label, bar, was, share }, i) => {
        const of = order[i];
        label.textContent = `${of}`;
        share.textContent = percent(probabilities[of]);
        bar.style.width = `${100 * probabilities[of]}%`;
        was.hidden = !without;
        if (without) was.style.left = `${100 * without[of]}%`;
        row.classList.toggle("best", of === best);
      });
      const listed = order.slice(0, rows.length).map((of) => `${of}: ${percent(probabilities[of])}`).join(", ");
      find("outputs").setAttribute("aria-label", `Most probable: ${best}. ${listed}`);
    },
  };
}
