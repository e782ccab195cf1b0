// The layers: a button for each node; hidden nodes are colored by their activation, outputs have a bar and a number.
import { element, number, percent, perRow } from "gradfn/core/dom.js";
import { isClassifier } from "gradfn/mlp/network.js";

export const SHOWN = 256; // nodes of a layer that have a button

// Call `clicked(layer, node)` for a click, `reached(layer, node)` for the arrow keys.
export function makeNodes(find, net, clicked, reached) {
  const last = net.layers.length - 1;
  const names = net.layers.map((_, l) => (l === last ? "Output" : last > 1 ? `Hidden layer ${l + 1}` : "Hidden nodes"));
  const buttons = net.layers.map(({ nOut }, l) =>
    Array.from({ length: Math.min(nOut, SHOWN) }, (_, i) => {
      const button = element("button", { type: "button", onclick: () => clicked(l, i) }, element("b", {}, `${i}`));
      if (l === last) button.append(element("span", { class: "level" }, element("i")), element("small"));
      return button;
    }),
  );
  buttons.forEach((of, l) => {
    const classes = l < last ? "cells-of-nodes" : isClassifier(net) ? "values shares" : "values";
    const group = element("div", { class: classes, role: "group", "aria-label": names[l] }, ...of);
    group.style.setProperty("--per-row", columns(l));
    group.addEventListener("keydown", (event) => move(event, l));
    const { nOut, squash } = net.layers[l];
    const kind = l < last ? `${squash}, ${nOut} nodes` : isClassifier(net) ? "probabilities" : "values";
    const made = element("div", { class: "column" }, element("h3", {}, names[l], element("small", {}, kind)), group);
    if (nOut > SHOWN) made.append(element("p", { class: "hint" },
      `… and ${(nOut - SHOWN).toLocaleString("en")} nodes more.`));
    find("nodes").append(made);
  });

  function columns(l) {
    return l === last ? 1 : Math.min(perRow(buttons[l].length), 16);
  }

  // Arrow keys move between nodes; Tab leaves the layer.
  function move(event, l) {
    const wide = columns(l);
    const by = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -wide, ArrowDown: wide }[event.key];
    const to = buttons[l].indexOf(event.target.closest("button")) + by;
    if (!by || !buttons[l][to]) return;
    event.preventDefault();
    buttons[l][to].focus();
    reached(l, to);
  }

  return {
    show(now, chosen) {
      net.layers.forEach((_, l) => {
        const values = l === last ? now.shown : now.pass.a[l];
        const top = l === last && isClassifier(net) ? 1
          : values.reduce((most, value) => Math.max(most, Math.abs(value)), 0) || 1;
        buttons[l].forEach((button, i) => {
          const isChosen = chosen.layer === l && chosen.node === i, share = Math.abs(values[i]) / top;
          button.setAttribute("aria-pressed", isChosen);
          button.tabIndex = isChosen || (chosen.layer !== l && i === 0) ? 0 : -1;
          const text = l === last && isClassifier(net) ? percent(values[i]) : number(values[i]);
          button.setAttribute("aria-label", `${names[l]}, node ${i}: ${text}`);
          button.title = `${i}: ${text}`;
          button.classList.toggle("negative", values[i] < 0);
          button.style.setProperty("--level", `${(100 * Math.min(share, 1)).toFixed(1)}%`);
          if (l === last) button.querySelector("small").textContent = text;
        });
      });
    },
  };
}
