// The layers: a button for each node, with its weights as an image and its activation as a bar.
import { element, number, percent, perRow } from "gradfn/core/dom.js";
import { paint, scaleOf } from "gradfn/core/paint.js";
import { term } from "gradfn/core/terms.js";
import { PIXELS } from "gradfn/digits/network.js";

const hint = () => ["Image: its weights (red excites, blue inhibits). Bar: its ", term("activation"), "."];

// Call `clicked(layer, node)` for a click, `reached(layer, node)` for the arrow keys.
export function makeLayers(find, model, clicked, reached) {
  const { net, trained } = model;
  const last = net.layers.length - 1;
  const scale = scaleOf(trained.layers[0].W);
  const names = net.layers.map((_, l) => (l === last ? "Output" : last > 1 ? `Hidden layer ${l + 1}` : "Hidden nodes"));
  const buttons = net.layers.map(({ nOut }, l) => Array.from({ length: nOut }, (_, i) => nodeButton(l, i)));
  buttons.forEach((of, l) => find("layers").append(column(of, l)));

  function nodeButton(l, i) {
    const button = element("button", { type: "button", onclick: () => clicked(l, i) });
    if (l === last) button.append(element("b", {}, `${i}`));
    else if (l === 0) button.append(element("canvas", { class: "pixels", "aria-hidden": "true" }));
    button.append(element("span", { class: "level" }, element("i")));
    if (l === last) button.append(element("small"));
    return button;
  }

  function column(of, l) {
    const kind = l === last ? "outputs" : "tiles";
    const group = element("div", { class: kind, role: "group", "aria-label": names[l] }, ...of);
    group.style.setProperty("--per-row", perRow(of.length));
    group.style.setProperty("--tile", of.length > 40 ? "2.1rem" : of.length > 20 ? "3rem" : "3.9rem");
    group.addEventListener("keydown", (event) => move(event, l));
    const title = element("h3", {}, names[l]);
    if (l === last && net.loss === "cross-entropy") title.append(element("small", {}, term("softmax")));
    const made = element("div", { class: `column ${kind}-column` }, title, group);
    if (l === 0 && last) {
      title.append(element("span", { class: "call" }, "click one"));
      made.append(element("p", { class: "hint" }, ...hint()));
    }
    return made;
  }

  // Arrow keys move between nodes; Tab leaves the layer.
  function move(event, l) {
    const wide = l === last ? 1 : perRow(buttons[l].length);
    const by = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -wide, ArrowDown: wide }[event.key];
    const to = buttons[l].indexOf(event.target.closest("button")) + by;
    if (!by || !buttons[l][to]) return;
    event.preventDefault();
    buttons[l][to].focus();
    reached(l, to);
  }

  function showLayer(l, now, chosen) {
    const values = l === last ? now.probabilities : now.pass.a[l];
    const bounded = l === last || ["sigmoid", "tanh"].includes(net.layers[l].squash);
    const top = bounded ? 1 : Math.max(...values.map(Math.abs)) || 1;
    const best = values.indexOf(Math.max(...values));
    buttons[l].forEach((button, i) => {
      const isChosen = chosen.layer === l && chosen.node === i;
      button.setAttribute("aria-pressed", isChosen);
      button.tabIndex = isChosen || (chosen.layer !== l && i === 0) ? 0 : -1;
      button.classList.toggle("changed", model.changed(l, i));
      const level = button.querySelector(".level i");
      level.style.setProperty("--level", `${(100 * Math.min(Math.abs(values[i]) / top, 1)).toFixed(1)}%`);
      level.classList.toggle("negative", values[i] < 0);
      if (l === last) {
        button.classList.toggle("best", i === best);
        button.querySelector("small").textContent = percent(values[i]);
        button.setAttribute("aria-label", `Output ${i}, ${percent(values[i])}`);
      } else button.setAttribute("aria-label", `${names[l]}, node ${i}, activation ${number(values[i])}`);
    });
  }

  return {
    show: (now, chosen) => net.layers.forEach((_, l) => showLayer(l, now, chosen)),
    // The picture of a node of the first hidden layer, which changes with its region alone.
    paintTile(i) {
      const row = net.layers[0].W.subarray(784 * i, 784 * (i + 1));
      if (last) paint(buttons[0][i].querySelector("canvas"), row, PIXELS, scale);
    },
    paintAll() {
      buttons[0].forEach((_, i) => this.paintTile(i));
    },
  };
}
