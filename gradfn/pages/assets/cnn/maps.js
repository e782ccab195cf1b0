// The maps of every filter, a row for each convolution; each map is a button that opens its filter.
import { element } from "gradfn/core/dom.js";
import { paintMap, scaleOfMaps } from "gradfn/cnn/pictures.js";

const explained = {
  z: "The sums of weights times pixels: red is positive, blue negative.",
  a: "What the activation makes of the sums. Each layer has its own scale, the same for all its filters.",
  p: "The maximum of each 2 × 2 pixels: what the next layer sees.",
};

// Call `opened(layer, filter, clicked)` when a map is opened by a click or by a key, `chosen(kind)` when another kind
// of map is chosen.
export function makeMaps(find, net, opened, chosen) {
  const radios = [...find("kinds").querySelectorAll("input")];
  for (const radio of radios) radio.addEventListener("change", () => chosen(radio.value));

  const rows = net.convs.map(({ nOut, nIn, window, height, width }, l) => {
    const sees = l ? `${nIn} map${nIn > 1 ? "s" : ""} of convolution ${l}` : nIn === 3 ? "the image's three colors"
      : "the image";
    const about = `${nOut} filters of ${window} × ${window} weights, each sees ${sees}; ${height} × ${width} pixels`;
    const buttons = Array.from({ length: nOut }, (_, filter) => {
      const canvas = element("canvas", { class: "pixels" });
      const keyed = (event) => move(event, l, filter);
      const attributes = { type: "button", onclick: () => opened(l, filter, true), onkeydown: keyed };
      return element("button", attributes, canvas, element("small", {}, `${filter}`));
    });
    const title = element("h4", {}, `Convolution ${l + 1} `, element("small", {}, about));
    const tiles = element("div", { class: "maps-row", role: "group",
      "aria-label": `Filters of convolution ${l + 1}` }, ...buttons);
    tiles.style.setProperty("--n", nOut);
    find("maps").append(title, tiles);
    return buttons;
  });

  // Arrow keys go from filter to filter, and from layer to layer.
  function move(event, l, filter) {
    const [dl, df] = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key]
      || [0, 0];
    const layer = l + dl;
    if ((!dl && !df) || !rows[layer]) return;
    const to = Math.min(filter + df, rows[layer].length - 1);
    if (to < 0) return;
    event.preventDefault();
    rows[layer][to].focus();
    opened(layer, to);
  }

  return {
    show({ pass }, { layer, filter, kind, off }) {
      for (const radio of radios) radio.checked = radio.value === kind;
      find("maps-hint").textContent = explained[kind];
      rows.forEach((buttons, l) => {
        const { nOut, height, width } = net.convs[l];
        const values = pass.values[`${kind}${l + 1}`], area = values.length / nOut;
        const { scale, signed } = scaleOfMaps(values, pass.values[`${kind === "z" ? "z" : "a"}${l + 1}`]);
        buttons.forEach((button, i) => {
          const isOff = off.has(`${l}.${i}`);
          paintMap(button.firstChild, values.subarray(i * area, (i + 1) * area), kind === "p" ? width >> 1 : width,
            scale, signed);
          button.setAttribute("aria-pressed", l === layer && i === filter);
          button.setAttribute("aria-label", `Filter ${i} of convolution ${l + 1}${isOff ? ", switched off" : ""}`);
          button.classList.toggle("is-off", isOff);
        });
      });
    },
  };
}
