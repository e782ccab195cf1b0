// The open filter: its weights and maps, how one pixel of its map is computed, and the gradients at all of these.
import { element, number } from "gradfn/core/dom.js";
import { paint, scaleOf } from "gradfn/core/paint.js";
import { before, explain } from "gradfn/cnn/convnet.js";
import { largest, paintMap, paintWeights, scaleOfMaps } from "gradfn/cnn/pictures.js";

const CELLS = 7; // windows of up to this height and width are written out, cell by cell
const COLORS = ["red", "green", "blue"];
const plus = (value) => `${value < 0 ? "−" : "+"} ${number(Math.abs(value))}`;
const percent = (share) => `${100 * share}%`;

// `act` has pixel(y, x), channel(i) and toggle(), which are called when the user points at another pixel, chooses
// another input channel, or switches the filter.
export function makeFilter(find, net, painter, act) {
  const button = find("z"), z = button.querySelector("canvas");
  let open = { layer: 0, at: [0, 0] };

  function pointed(event) {
    const { height, width } = net.convs[open.layer], box = z.getBoundingClientRect();
    const x = Math.floor(((event.clientX - box.left) / box.width) * width);
    const y = Math.floor(((event.clientY - box.top) / box.height) * height);
    moveTo(y, x);
  }

  function moveTo(y, x) {
    const { height, width } = net.convs[open.layer];
    const inside = [Math.min(Math.max(y, 0), height - 1), Math.min(Math.max(x, 0), width - 1)];
    if (inside[0] !== open.at[0] || inside[1] !== open.at[1]) act.pixel(...inside);
  }

  button.addEventListener("pointermove", (event) => event.pointerType !== "touch" && pointed(event));
  // A click by a key has no position.
  button.addEventListener("click", (event) => event.detail && pointed(event));
  button.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    if (!step) return;
    event.preventDefault();
    moveTo(open.at[0] + step[0], open.at[1] + step[1]);
  });
  find("off").addEventListener("click", () => act.toggle());

  const inputName = (l, i) => {
    if (l) return `p${l}[${i}]`;
    if (net.channels === 1) return "the image";
    return net.channels === 3 ? COLORS[i] : `channel ${i}`;
  };

  // Outline a rectangle of a picture of height x width pixels.
  function outline(name, height, width, top, left, high, wide = high) {
    Object.assign(find(name).style, {
      top: percent(top / height),
      left: percent(left / width),
      height: percent(high / height),
      width: percent(wide / width),
    });
  }

  function caption(name, text, ...more) {
    find(`${name}-caption`).replaceChildren(text, ...more);
  }

  function pictures(now, { layer: l, filter, channel }) {
    const { values } = now.pass, grads = now.gradients, n = l + 1;
    const { nIn, nOut, window, W, height, width } = net.convs[l], area = height * width;
    const map = (all, size) => all.subarray(filter * size, (filter + 1) * size);
    // The three on one scale, that of z.
    const { scale } = scaleOfMaps(map(values[`z${n}`], area));
    const show = (name, canvas, size, columns) => {
      const shown = map(values[name], size);
      paintMap(canvas, shown, columns, scale, values[name[0] === "z" ? name : `a${n}`].some((value) => value < 0));
    };
    show(`z${n}`, z, area, width);
    show(`a${n}`, find("a"), area, width);
    const pooled = (height >> 1) * (width >> 1);
    show(`p${n}`, find("p"), pooled, width >> 1);
    caption("z", `z${n}[${filter}], after the convolution`);
    caption("a", `a${n}[${filter}] = ${net.activation}(z${n}[${filter}])`);
    caption("p", `p${n}[${filter}], the maximum of each 2 × 2`);

    const input = l ? values[`p${l}`] : values.x, inputMap = input.subarray(channel * area, (channel + 1) * area);
    if (l) {
      const ofInputs = scaleOfMaps(input, values[`a${l}`]);
      paintMap(find("input"), inputMap, width, ofInputs.scale, ofInputs.signed);
    } else painter.paintChannel(find("input"), inputMap);
    caption("input", `Input: ${inputName(l, channel)}`);
    const k = window * window, own = W.subarray(filter * nIn * k, (filter + 1) * nIn * k);
    paintWeights(find("weights"), own, nIn, window, scaleOf(own));
    const which = nIn > 1 ? `, a tile for each of ${nIn} inputs` : "";
    caption("weights", `Weights${which}; ${number(largest(own))} at most`);

    const gradient = (target, values_, columns, name) => {
      const top = largest(values_);
      paint(find(target), values_, columns, scaleOf(values_));
      caption(target, `∂L/∂${name}, ${number(top)} at most`);
    };
    const ofInput = grads[l ? `p${l}` : "x"];
    const inputLabel = l || net.channels > 1 ? `${l ? `p${l}` : "x"}[${channel}]` : "x, the pixels";
    gradient("dinput", ofInput.subarray(channel * area, (channel + 1) * area), width, inputLabel);
    gradient("dz", map(grads[`z${n}`], area), width, `z${n}[${filter}]`);
    gradient("da", map(grads[`a${n}`], area), width, `a${n}[${filter}]`);
    gradient("dp", map(grads[`p${n}`], pooled), width >> 1, `p${n}[${filter}]`);
    const dW = grads[`W${n}`].subarray(filter * nIn * k, (filter + 1) * nIn * k);
    paintWeights(find("dweights"), dW, nIn, window, scaleOf(dW));
    caption("dweights", `∂L/∂W${n}[${filter}], ${number(largest(dW))} at most; bias ${number(grads[`b${n}`][filter])}`);
  }

  // Where the open pixel is, and what becomes of it.
  function places(now, { layer: l, at }) {
    const { window, height, width } = net.convs[l], [y, x] = at, low = before(window);
    outline("window", height, width, y - low, x - low, window);
    outline("pixel", height, width, y, x, 1);
    const high = height >> 1, wide = width >> 1, row = y >> 1, column = x >> 1;
    const isPooled = row < high && column < wide; // the last row or column may be dropped
    outline("pooled", height, width, isPooled ? 2 * row : y, isPooled ? 2 * column : x, isPooled ? 2 : 1);
    find("pool").hidden = !isPooled;
    outline("pool", high, wide, row, column, 1);
  }

  function sums(now, state) {
    const { layer: l, filter, at: [y, x], channel } = state, n = l + 1, { nIn, window } = net.convs[l];
    const found = explain(net, now.pass, l, filter, y, x), isOff = state.off.has(`${l}.${filter}`);
    find("place").textContent = `Row ${y}, column ${x} of z${n}[${filter}]`;
    const total = `${nIn > 1 ? `Sum of ${nIn} inputs` : "Sum of weights × window"} ${number(found.sum)}, bias ` +
      `${plus(found.bias)}`;
    const bold = (value) => element("b", {}, number(value));
    const after = isOff ? ["a = ", bold(found.a), ", as the filter is switched off"]
      : [`a = ${net.activation}(z) = `, bold(found.a)];
    find("sum").replaceChildren(`${total}: z = `, bold(found.z), "; ", ...after);

    const { inputs, weights, products, sum } = found.channels[channel];
    const cells = find("cells"), top = Math.max(...found.channels.map((each) => largest(each.products)));
    cells.hidden = window > CELLS;
    if (!cells.hidden) {
      cells.style.setProperty("--columns", window);
      cells.replaceChildren(...Array.from(products, (product, i) => {
        const factors = element("small", {}, `${short(weights[i])} × ${short(inputs[i])}`);
        const shown = element("span", {}, element("b", {}, short(product)), factors);
        shown.style.setProperty("--share", percent(top ? Math.abs(product) / top : 0));
        shown.classList.toggle("negative", product < 0);
        return shown;
      }));
    }
    const ofInput = nIn > 1 ? ` on ${inputName(l, channel)}` : "";
    const written = cells.hidden ? "" : " Each cell: weight × input, and above it their product.";
    const outside = "Outside of the image the input is 0.";
    find("cells-caption").textContent = `The window${ofInput}: its products add up to ${number(sum)}.${written} ` +
      `${outside}`;
    contributions(found, l, channel);
  }

  function contributions(found, l, channel) {
    const target = find("contributions");
    target.hidden = found.channels.length === 1;
    if (target.hidden) return target.replaceChildren();
    const focused = target.contains(document.activeElement);
    const top = found.channels.reduce((most, { sum }) => Math.max(most, Math.abs(sum)), 0) || 1;
    const buttons = found.channels.map(({ sum }, i) => {
      const bar = element("i", { class: sum < 0 ? "negative" : "" });
      bar.style.setProperty("--level", percent(Math.abs(sum) / top));
      const attributes = { type: "button", "aria-pressed": i === channel, onclick: () => act.channel(i) };
      const level = element("span", { class: "level" }, bar), name = element("span", {}, inputName(l, i));
      return element("button", attributes, name, level, element("small", {}, number(sum)));
    });
    target.replaceChildren(element("h4", {}, "What each input contributes"), element("div", {}, ...buttons));
    if (focused) buttons[channel].focus();
  }

  return {
    show(now, state) {
      open = state;
      const { layer: l, filter, off, at } = state, isOff = off.has(`${l}.${filter}`);
      find("filter-title").textContent = `Filter ${filter} of convolution ${l + 1}${isOff ? ", switched off" : ""}`;
      find("off").textContent = isOff ? "Switch this filter on" : "Switch this filter off";
      find("off").setAttribute("aria-pressed", isOff);
      button.setAttribute("aria-label", `Map z${l + 1} of filter ${filter}: row ${at[0]}, column ${at[1]}. Arrow ` +
        `keys move`);
      pictures(now, state);
      this.point(now, state);
    },
    // Show another pixel or input channel alone.
    point(now, state) {
      open = state;
      const { layer: l, filter, at } = state;
      button.setAttribute("aria-label", `Map z${l + 1} of filter ${filter}: row ${at[0]}, column ${at[1]}. Arrow ` +
        `keys move`);
      places(now, state);
      sums(now, state);
    },
  };
}

// A number in few letters, for a cell.
function short(value) {
  const text = Math.abs(value) < 0.005 ? "0" : value.toFixed(Math.abs(value) < 10 ? 2 : 0);
  return text.replace("0.", ".").replace("-", "−");
}
