// One node in detail: its weights, its signal, its bias for inactivity, its region, its gradient.
import { activations } from "gradfn/core/activations.js";
import { bars, element, follow, gradientOf, number, perRow, sub } from "gradfn/core/dom.js";
import { gradients } from "gradfn/digits/mlp.js";
import { PIXELS } from "gradfn/digits/network.js";
import { paint, scaleOf } from "gradfn/core/paint.js";
import { term } from "gradfn/core/terms.js";
import { stateOf } from "gradfn/digits/terms.js";

// Call `biasMoved(value)` and `regionDrawn(region or null)` for the shown node.
export function makeNode(find, model, biasMoved, regionDrawn, undone) {
  const { net, trained, regions } = model;
  const last = net.layers.length - 1;
  const scales = trained.layers.map(({ W }) => scaleOf(W));
  const weights = find("node-weights"), slider = find("bias");
  let chosen = null; // { layer, node }

  slider.addEventListener("input", () => biasMoved(Number(Number(slider.value).toFixed(3))));
  find("undo").addEventListener("click", () => {
    if (document.activeElement === find("undo")) slider.focus({ preventScroll: true }); // the button disappears
    undone();
  });

  // Dragging on the weights selects a region; a click restores the whole image.
  const canHaveRegion = () => chosen.layer === 0;
  const region = () => (canHaveRegion() ? regions.get(chosen.node) : undefined);
  const pixel = ([x, y]) => [x, y].map((share) => Math.min(Math.max(Math.floor(share * PIXELS), 0), PIXELS - 1));
  let corner = null;
  const start = (place) => {
    corner = pixel(place);
    if (region()) regionDrawn(null);
  };
  follow(weights, start, (place) => {
    const [x, y] = pixel(place), [u, v] = corner;
    if (!canHaveRegion() || (x === u && y === v)) return;
    regionDrawn({ left: Math.min(x, u), right: Math.max(x, u), top: Math.min(y, v), bottom: Math.max(y, v) });
  });

  // By keys: Enter makes a region, arrows move it, with Shift they resize it, Escape removes it.
  const arrows = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  weights.addEventListener("keydown", (event) => {
    const before = region();
    if (event.key === "Enter" && canHaveRegion() && !before) regionDrawn({ left: 9, right: 18, top: 9, bottom: 18 });
    else if (event.key === "Escape" && before) regionDrawn(null);
    else if (event.key in arrows && before) {
      const { left, top, right, bottom } = before;
      const [x, y] = arrows[event.key], move = event.shiftKey ? 0 : 1;
      const after = { left: left + move * x, top: top + move * y, right: right + x, bottom: bottom + y };
      const fits = after.left >= 0 && after.top >= 0 && after.right < PIXELS && after.bottom < PIXELS;
      if (fits && after.right >= after.left && after.bottom >= after.top) regionDrawn(after);
    } else return;
    event.preventDefault();
  });

  function show(now, x, layer, i) {
    chosen = { layer, node: i };
    const { nIn, W } = net.layers[layer];
    const row = W.subarray(i * nIn, (i + 1) * nIn);
    const input = layer ? now.pass.a[layer - 1] : x;
    const signal = Float64Array.from(row, (weight, j) => weight * input[j]);
    const grads = gradients(now.steps);
    const gradient = grads[`W${layer + 1}`].subarray(i * nIn, (i + 1) * nIn);
    const columns = layer ? perRow(nIn) : PIXELS;
    const hidden = last > 1 ? `Node ${i} of hidden layer ${layer + 1}` : `Hidden node ${i}`;
    find("node-title").textContent = layer === last ? `Output ${i}` : hidden;
    find("undo").hidden = !model.anyChanged();
    paint(weights, row, columns, scales[layer]);
    paint(find("node-signal"), signal, columns, scaleOf(signal));
    paint(find("node-gradient"), gradient, columns, scaleOf(gradient));
    weights.style.cursor = layer ? "" : "crosshair";
    weights.tabIndex = layer ? -1 : 0;
    const ofImage = region() ? "Only this region; click for all" : "Its weights: drag to keep a region";
    find("weights-caption").textContent = layer ? "Its weights, from each hidden node" : ofImage;
    find("signal-caption").textContent = layer ? "Its signal: weight × activation" : "Its signal: weight × pixel";
    shade(region());
    const sum = signal.reduce((total, value) => total + value, 0);
    showSums(sum, now.pass.z[layer][i], now.pass.a[layer][i], grads);
    showVotes(now.pass.a[layer][i]);
  }

  function showSums(sum, z, a, grads) {
    const { layer, node } = chosen;
    const { b, squash } = net.layers[layer], bias = b[node];
    const reach = Math.max(10, Math.ceil(Math.abs(trained.layers[layer].b[node]) + 5));
    Object.assign(slider, { min: -reach, max: reach, value: bias });
    const plain = squash === "none";
    find("bias-value").textContent = number(bias);
    find("node-sum").innerHTML = `w · ${layer ? `a${sub(layer)}` : "x"} = <b>${number(sum)}</b>`;
    find("node-fires").textContent = plain
      ? "Added to the weighted sum."
      : `It fires where the weighted sum is over ${number(-bias)}.`;
    const sums = `z = ${number(sum)} ${bias < 0 ? "−" : "+"} ${number(Math.abs(bias))} = <b>${number(z)}</b>`;
    find("node-out").innerHTML = plain ? sums : `${sums}<br>a = ${squash}(z) = <b>${number(a)}</b>`;
    const names = plain ? [`z${layer + 1}`] : [`a${layer + 1}`, `z${layer + 1}`];
    const gradientTexts = names.map((name) => `${gradientOf(name)} = ${number(grads[name][node])}`);
    find("node-gradients").innerHTML = `${gradientTexts.join(", ")} = ${gradientOf("b")}.`;
    const looks = stateOf(squash, activations[squash].slope(z, a));
    if (find("node-state").textContent !== looks) find("node-state").replaceChildren(...(looks ? [term(looks)] : []));
  }

  // The node's contribution to each node of the next layer.
  function showVotes(a) {
    const { layer, node } = chosen;
    find("votes").hidden = layer === last;
    if (layer === last) return;
    const { nIn, nOut, W } = net.layers[layer + 1];
    const added = Array.from({ length: nOut }, (_, k) => W[k * nIn + node] * a);
    const toOutputs = layer + 1 === last;
    const title = toOutputs ? "Its contribution to each output" : "Its contribution to each node of the next layer";
    find("votes").replaceChildren(element("p", { class: "hint" }, title), bars(added, toOutputs));
  }

  // Darken the pixels outside of a region.
  function shade(region) {
    if (!region) return;
    const context = weights.getContext("2d");
    context.globalCompositeOperation = "multiply";
    context.fillStyle = "rgb(128 128 128 / 0.35)";
    context.beginPath();
    context.rect(0, 0, PIXELS, PIXELS);
    context.rect(region.left, region.top, region.right - region.left + 1, region.bottom - region.top + 1);
    context.fill("evenodd");
    context.globalCompositeOperation = "source-over";
  }

  return { show };
}
