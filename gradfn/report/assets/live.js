// The network at work: what it sees, every node of it, and the gradient on its way back.
import { backward, forward, gradients, lossOf, probabilities } from "./mlp.js";
import { enlarge, prepare } from "./digit.js";
import { newPalette, paint, paintTiles, scaleOf } from "./paint.js";

const PIXELS = 28;

// What the page was given: arrays are base64 of little-endian float32.
function decode({ data, shape }) {
  const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
  const view = new DataView(bytes.buffer);
  const values = Float64Array.from({ length: bytes.length / 4 }, (_, i) => view.getFloat32(4 * i, true));
  return { values, shape };
}

export function build(told) {
  const arrays = Object.fromEntries(Object.entries(told.arrays).map(([name, each]) => [name, decode(each)]));
  const n = Object.keys(arrays).filter((name) => /^W\d+$/.test(name)).length;
  const layers = Array.from({ length: n }, (_, l) => ({
    nIn: arrays[`W${l + 1}`].shape[1],
    nOut: arrays[`W${l + 1}`].shape[0],
    W: arrays[`W${l + 1}`].values,
    b: arrays[`b${l + 1}`].values,
    squash: (l < n - 1 ? told.activation : told.output) || "none",
  }));
  return { net: { layers, loss: told.loss }, arrays };
}

export function compute(net, x, label) {
  const pass = forward(net, x);
  const steps = backward(net, pass, label);
  return { pass, probabilities: probabilities(net, pass), loss: lossOf(net, pass, label), steps };
}

// Elements and words.

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value !== null) made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

const find = (id) => document.getElementById(id);
const sub = (text) => `<sub>${text}</sub>`;
const minus = (text) => text.replace("-", "−");

function number(value) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  return minus(size >= 0.01 && size < 1000 ? value.toFixed(size < 10 ? 3 : 1) : value.toExponential(1));
}

// How many of n nodes stand in a row.
function perRow(n) {
  return n <= 12 ? Math.min(n, 5) : Math.ceil(Math.sqrt(n));
}

export function live(told) {
  const { net: trained, arrays } = build(told);
  const net = {
    loss: trained.loss,
    layers: trained.layers.map((layer) => ({ ...layer, W: layer.W.slice(), b: layer.b.slice() })),
  };
  const last = net.layers.length - 1;
  const spline = arrays.spline ? arrays.spline.values : null;
  const samples = told.labels.map((_, i) => arrays.samples.values.slice(784 * i, 784 * (i + 1)));
  const weightScales = net.layers.map(({ W }) => scaleOf(W));
  const state = { x: samples[0], label: told.labels[0], labelChosen: true, sample: 0, layer: 0, node: 0, shown: 1 };
  const regions = new Map(); // of nodes of the first hidden layer: { left, top, right, bottom }, all included
  let strokes = [];
  let now = null; // what is computed of the state

  // The pad.

  const pad = find("pad");
  const context = pad.getContext("2d", { willReadFrequently: true });
  const pen = spline ? 0.13 : 0.08; // of the pad's width: 8x8 digits have thick lines

  function drawPad() {
    const ink = getComputedStyle(pad).color;
    context.clearRect(0, 0, pad.width, pad.height);
    find("pad-hint").hidden = strokes.length > 0;
    Object.assign(context, { lineWidth: pen * pad.width, lineCap: "round", lineJoin: "round", strokeStyle: ink });
    for (const stroke of strokes) {
      context.beginPath();
      context.moveTo(...stroke[0]);
      for (const point of stroke) context.lineTo(...point);
      context.stroke();
    }
  }

  function padInk() {
    const pixels = context.getImageData(0, 0, pad.width, pad.height).data;
    return Float64Array.from({ length: pad.width * pad.height }, (_, i) => pixels[4 * i + 3] / 255);
  }

  // Call `moved` with each place of a pointer that went down on an element, as shares of its width and height.
  function follow(target, begun, moved) {
    const place = (event) => {
      const box = target.getBoundingClientRect();
      return [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
    };
    target.addEventListener("pointerdown", (event) => {
      if (event.button) return;
      event.preventDefault();
      const move = (later) => {
        if (later.pointerId !== event.pointerId) return;
        const all = later.getCoalescedEvents ? later.getCoalescedEvents() : [];
        (all.length ? all : [later]).map(place).forEach(moved);
      };
      const stop = (later) => {
        if (later.pointerId !== event.pointerId) return;
        removeEventListener("pointermove", move);
        removeEventListener("pointerup", stop);
        removeEventListener("pointercancel", stop);
      };
      addEventListener("pointermove", move);
      addEventListener("pointerup", stop);
      addEventListener("pointercancel", stop);
      begun(place(event));
    });
  }

  function drawn() {
    drawPad();
    see(prepare(padInk(), pad.width, spline) || new Float64Array(784));
  }

  follow(
    pad,
    ([x, y]) => {
      state.sample = null;
      state.labelChosen = false;
      strokes.push([[x * pad.width, y * pad.height]]);
      drawn();
    },
    ([x, y]) => {
      strokes[strokes.length - 1].push([x * pad.width, y * pad.height]);
      drawn();
    },
  );

  find("clear").addEventListener("click", () => {
    strokes = [];
    state.sample = null;
    state.labelChosen = false;
    drawn();
  });

  function pick(i) {
    strokes = [];
    state.sample = i;
    state.label = told.labels[i];
    state.labelChosen = true;
    drawPad();
    see(samples[i]);
  }

  samples.forEach((image, i) => {
    const wrong = i >= 10 ? ", which the network takes for another" : "";
    const canvas = element("canvas", { class: "pixels" });
    const button = { type: "button", "aria-label": `Test digit, a ${told.labels[i]}${wrong}`, onclick: () => pick(i) };
    find("samples").append(element("button", button, canvas));
  });

  // The layers.

  const layerNames = net.layers.map((_, l) => (l === last ? "Answer" : last > 1 ? `Hidden layer ${l + 1}` : "Hidden nodes"));
  const tiles = net.layers.map(({ nOut }, l) => {
    const kind = l === last ? "answers" : "tiles";
    const group = element("div", { class: kind, role: "group", "aria-label": layerNames[l] });
    group.style.setProperty("--per-row", perRow(nOut));
    group.style.setProperty("--tile", nOut > 40 ? "2.1rem" : nOut > 20 ? "3rem" : "3.9rem");
    const buttons = Array.from({ length: nOut }, (_, i) => {
      const attributes = { type: "button", "data-node": i, tabindex: i ? -1 : 0, onclick: () => choose(l, i) };
      const button = element("button", attributes);
      if (l === last) button.append(element("b", {}, `${i}`));
      else if (l === 0) button.append(element("canvas", { class: "pixels", "aria-hidden": "true" }));
      button.append(element("span", { class: "level" }, element("i")));
      if (l === last) button.append(element("small"));
      group.append(button);
      return button;
    });
    group.addEventListener("keydown", (event) => moveFocus(event, l));
    const title = element("h3", {}, layerNames[l]);
    if (l === 0 && last) title.append(element("span", { class: "call" }, "click one"));
    const column = element("div", { class: `column ${kind}-column` }, title, group);
    if (l === 0 && last) {
      column.append(element("p", { class: "hint" }, "Picture: its weights, red excites, blue inhibits. Bar: how strongly it fires."));
    }
    find("layers").append(column);
    return buttons;
  });

  // Arrow keys go from node to node; Tab leaves the layer.
  function moveFocus(event, l) {
    const n = net.layers[l].nOut, wide = l === last ? 1 : perRow(n);
    const by = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -wide, ArrowDown: wide }[event.key];
    const to = Number(event.target.dataset.node) + by;
    if (!by || !(to >= 0 && to < n)) return;
    event.preventDefault();
    tiles[l][to].focus();
    select(l, to);
  }

  // The node that is looked at.

  const figure = (id, text) => {
    const canvas = element("canvas", { id, class: "pixels", role: "img", "aria-label": text });
    return element("figure", {}, canvas, element("figcaption", {}, text));
  };
  const node = find("node");
  node.append(
    element("div", { class: "title" }, element("h3", { id: "node-title" }), element("button", { type: "button", id: "undo", class: "small", onclick: asTrained }, "As trained")),
    element(
      "div",
      { class: "images" },
      figure("node-weights", "Its weights"),
      figure("node-signal", "Its signal: weight × input"),
      figure("node-gradient", "Gradient of its weights"),
    ),
    element(
      "div",
      { class: "sums" },
      element("p", { id: "node-sum" }),
      element(
        "p",
        { class: "slide" },
        element("label", { for: "bias" }, "Bias for inactivity"),
        element("input", { id: "bias", type: "range", step: "0.05", oninput: (event) => setBias(state.layer, state.node, Number(event.target.value)) }),
        element("output", { for: "bias", id: "bias-value" }),
      ),
      element("p", { id: "node-fires", class: "hint" }),
      element("p", { id: "node-out" }),
      element("p", { id: "node-gradients", class: "hint" }),
      element("div", { id: "votes", class: "votes" }),
    ),
  );
  const weights = find("node-weights");
  weights.tabIndex = 0;

  let corner = null;
  const pixel = ([x, y]) => [x, y].map((share) => Math.min(Math.max(Math.floor(share * PIXELS), 0), PIXELS - 1));
  const within = ([x, y], [u, v]) => ({
    left: Math.min(x, u),
    right: Math.max(x, u),
    top: Math.min(y, v),
    bottom: Math.max(y, v),
  });
  follow(
    weights,
    (place) => {
      corner = pixel(place);
      if (!state.layer && regions.has(state.node)) setRegion(state.node, null); // a click brings the whole image back
    },
    (place) => {
      const end = pixel(place);
      if (!state.layer && (end[0] !== corner[0] || end[1] !== corner[1])) setRegion(state.node, within(corner, end));
    },
  );
  // The same by keys: Enter makes a region, arrows move it, with Shift they resize it, Escape takes it away.
  weights.addEventListener("keydown", (event) => {
    if (state.layer) return;
    const region = regions.get(state.node);
    if (event.key === "Enter" && !region) setRegion(state.node, { left: 9, right: 18, top: 9, bottom: 18 });
    else if (event.key === "Escape" && region) setRegion(state.node, null);
    else if (region && event.key.startsWith("Arrow")) {
      const [x, y] = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
      const first = event.shiftKey ? 0 : 1;
      const moved = { left: region.left + first * x, top: region.top + first * y, right: region.right + x, bottom: region.bottom + y };
      const fits = moved.left >= 0 && moved.top >= 0 && moved.right < PIXELS && moved.bottom < PIXELS;
      if (fits && moved.right >= moved.left && moved.bottom >= moved.top) setRegion(state.node, moved);
    } else return;
    event.preventDefault();
  });

  function choose(layer, i) {
    select(layer, i);
    if (node.getBoundingClientRect().top > innerHeight - 100) node.scrollIntoView({ block: "center" }); // on a phone
  }

  function select(layer, i) {
    Object.assign(state, { layer, node: i });
    show();
  }

  function setBias(layer, i, value) {
    net.layers[layer].b[i] = value;
    update();
  }

  // Keep only the weights of a node of the first layer that lie within a region; null brings back all.
  function setRegion(i, region) {
    const { W, nIn } = net.layers[0];
    if (region) regions.set(i, region);
    else regions.delete(i);
    for (let j = 0; j < nIn; j++) {
      const x = j % PIXELS, y = Math.floor(j / PIXELS);
      const kept = !region || (x >= region.left && x <= region.right && y >= region.top && y <= region.bottom);
      W[i * nIn + j] = kept ? trained.layers[0].W[i * nIn + j] : 0;
    }
    paintTile(i);
    update();
  }

  function changed(l, i) {
    return net.layers[l].b[i] !== trained.layers[l].b[i] || (l === 0 && regions.has(i));
  }

  function asTrained() {
    for (const i of [...regions.keys()]) setRegion(i, null);
    net.layers.forEach((layer, l) => layer.b.set(trained.layers[l].b));
    update();
  }

  // The gradient, backwards.

  const labels = Array.from({ length: net.layers[last].nOut }, (_, label) => {
    const attributes = { type: "radio", name: "label", value: label, onchange: () => setLabel(label) };
    const input = element("input", attributes);
    find("labels").append(element("label", {}, input, element("span", {}, `${label}`)));
    return input;
  });

  function setLabel(label) {
    state.label = label;
    state.labelChosen = true;
    update();
  }

  const n_steps = compute(net, state.x, 0).steps.length;
  const reveal = (n) => {
    state.shown = Math.min(Math.max(n, 0), n_steps);
    showSteps();
  };
  find("next").addEventListener("click", () => reveal(state.shown + 1));
  find("previous").addEventListener("click", () => reveal(state.shown - 1));
  find("every").addEventListener("click", () => reveal(n_steps));

  const of = (name) => `∂L/∂${name[0]}${sub(name.slice(1))}`;
  function equation({ name, kind, layer, values }, first) {
    const l = layer + 1, up = layer + 2;
    const said = net.loss === "cross-entropy" ? "softmax(z" + sub(l) + ")" : "a" + sub(l);
    if (first) return [`${of(name)} = ${said} − y`, "What it said, less what is right (y is 1 at the right answer, else 0)."];
    if (kind === "W")
      return [
        `${of(name)} = ${of(`z${l}`)} ${l > 1 ? `a${sub(l - 1)}` : "x"}ᵀ<br>${of(`b${l}`)} = ${of(`z${l}`)}`,
        `Each weight: the gradient of its node times what came in. ${values.length.toLocaleString("en")} of them.`,
      ];
    if (kind === "a") return [`${of(name)} = W${sub(up)}ᵀ ${of(`z${up}`)}`, "Back through the weights: what each node did to all that it leads to."];
    if (kind === "z") return [`${of(name)} = ${of(`a${l}`)} ⊙ ${net.layers[layer].squash}′(z${sub(l)})`, "Through the activation: its slope lets pass much, little or nothing."];
    return [`∂L/∂x = W${sub(1)}ᵀ ${of("z1")}`, "Back to the pixels: ink at red makes the loss grow, ink at blue makes it fall."];
  }

  function showSteps() {
    find("steps").replaceChildren(
      ...now.steps.map((step, i) => {
        const [formula, meaning] = equation(step, i === 0);
        const card = element("li", i < state.shown ? {} : { class: "unknown" });
        const canvas = element("canvas", { class: "pixels", role: "img", "aria-label": `Gradient of ${step.name}` });
        const largest = step.values.reduce((top, value) => Math.max(top, Math.abs(value)), 0);
        const title = element("h3");
        title.innerHTML = `${i + 1} &ensp; ${step.kind === "x" ? "∂L/∂x" : of(step.name)}`;
        card.append(title);
        if (i >= state.shown) return card;
        if (step.layer !== last || step.kind === "W") paintStep(canvas, step);
        const text = element("p", { class: "formula" });
        text.innerHTML = formula;
        const note = element("p", { class: "hint" }, `${meaning} Largest: ${number(largest)}.`);
        const view = step.layer === last && step.kind !== "W" ? bars(step.values, true) : canvas;
        card.append(element("div", { class: "view" }, view), text, note);
        return card;
      }),
    );
    find("next").disabled = find("every").disabled = state.shown === n_steps;
    find("previous").disabled = state.shown === 0;
  }

  function paintStep(canvas, { kind, layer, values }) {
    const scale = values.reduce((top, value) => Math.max(top, Math.abs(value)), 0);
    if (kind === "x") paint(canvas, values, PIXELS, scale);
    else if (kind === "W") {
      // A tile for each node: its weights, arranged as the pixels or the nodes are that they come from.
      const { nIn, nOut } = net.layers[layer];
      const rows = Array.from({ length: nOut }, (_, i) => values.subarray(nIn * i, nIn * (i + 1)));
      paintTiles(canvas, rows, layer ? perRow(nIn) : PIXELS, scale, perRow(nOut), layer ? 1 : 2);
    }
    else paint(canvas, values, perRow(values.length), scale);
  }

  // From the state to the page.

  function see(x) {
    state.x = x;
    update();
  }

  function update() {
    now = compute(net, state.x, state.label);
    if (!state.labelChosen) {
      const best = now.probabilities.indexOf(Math.max(...now.probabilities));
      if (best !== state.label) {
        state.label = best;
        now = compute(net, state.x, best);
      }
    }
    show();
  }

  function show() {
    paint(find("seen"), state.x, PIXELS, null);
    [...find("samples").children].forEach((button, i) => button.setAttribute("aria-pressed", i === state.sample));
    net.layers.forEach((_, l) => showLayer(l));
    showNode();
    labels[state.label].checked = true;
    const entropy = net.loss === "cross-entropy";
    const formula = entropy ? `−log p${sub(state.label)}` : `½ Σ (a${sub(last + 1)} − y)²`;
    find("loss").innerHTML = `Loss L = ${formula} = <b>${number(now.loss)}</b>${entropy ? " nats" : ""}`;
    showSteps();
  }

  function showLayer(l) {
    const values = l === last ? now.probabilities : now.pass.a[l];
    const top = l === last || net.layers[l].squash in { sigmoid: 1, tanh: 1 } ? 1 : Math.max(...values.map(Math.abs)) || 1;
    const best = values.indexOf(Math.max(...values));
    tiles[l].forEach((button, i) => {
      const chosen = state.layer === l && state.node === i;
      button.setAttribute("aria-pressed", chosen);
      button.tabIndex = chosen || (state.layer !== l && i === 0) ? 0 : -1;
      button.classList.toggle("changed", changed(l, i));
      const level = button.querySelector(".level i");
      level.style.setProperty("--level", `${(100 * Math.min(Math.abs(values[i]) / top, 1)).toFixed(1)}%`);
      level.classList.toggle("negative", values[i] < 0);
      if (l === last) {
        button.classList.toggle("best", i === best);
        button.querySelector("small").textContent = `${(100 * values[i]).toFixed(values[i] > 0.0995 ? 0 : 1)} %`;
        button.setAttribute("aria-label", `Answer ${i}, ${(100 * values[i]).toFixed(1)} %`);
        return;
      }
      button.setAttribute("aria-label", `${layerNames[l]}, node ${i}, activation ${number(values[i])}`);
    });
  }

  // The picture of a node of the first hidden layer, which changes with its region alone.
  function paintTile(i) {
    const canvas = tiles[0][i].querySelector("canvas");
    if (canvas) paint(canvas, net.layers[0].W.subarray(784 * i, 784 * (i + 1)), PIXELS, weightScales[0]);
  }

  function showNode() {
    const { layer: l, node: i } = state;
    const { nIn, W, b, squash } = net.layers[l];
    const input = l ? now.pass.a[l - 1] : state.x;
    const row = W.subarray(i * nIn, (i + 1) * nIn);
    const signal = Float64Array.from(row, (weight, j) => weight * input[j]);
    const sum = signal.reduce((total, value) => total + value, 0);
    const grads = gradients(now.steps);
    const columns = l ? perRow(nIn) : PIXELS;
    const z = now.pass.z[l][i], a = now.pass.a[l][i];
    const name = l === last ? `Answer ${i}` : last > 1 ? `Node ${i} of hidden layer ${l + 1}` : `Hidden node ${i}`;
    find("node-title").textContent = name;
    const gradient = grads[`W${l + 1}`].subarray(i * nIn, (i + 1) * nIn);
    paint(weights, row, columns, weightScales[l]);
    paint(find("node-signal"), signal, columns, scaleOf(signal));
    paint(find("node-gradient"), gradient, columns, scaleOf(gradient));
    outline(regions.get(i));
    const captions = node.querySelectorAll("figcaption");
    captions[0].textContent = l ? "Its weights, from each hidden node" : regions.has(i) ? "Only this region; click for all" : "Its weights: drag to keep a region";
    captions[1].textContent = l ? "Its signal: weight × activation" : "Its signal: weight × pixel";
    captions[2].textContent = "Gradient of the loss at its weights";
    weights.style.cursor = l ? "" : "crosshair";
    const numbers = { sum, b: b[i], z, a };
    for (const [key, value] of Object.entries(numbers)) numbers[key] = number(value);
    const inputName = l ? `a${sub(l)}` : "x";
    find("node-sum").innerHTML = `Weighted sum &ensp; w · ${inputName} = <b>${numbers.sum}</b>`;
    const slider = find("bias"), reach = Math.max(10, Math.ceil(Math.abs(trained.layers[l].b[i]) + 5));
    slider.min = -reach;
    slider.max = reach;
    slider.value = b[i];
    find("bias-value").textContent = numbers.b;
    find("node-fires").textContent =
      squash === "none" ? "Added to the weighted sum." : `It fires where the weighted sum is over ${number(-b[i])}.`;
    const tail = squash === "none" ? "" : `<br>a = ${squash}(z) = <b>${numbers.a}</b>`;
    find("node-out").innerHTML = `z = ${numbers.sum} ${b[i] < 0 ? "−" : "+"} ${number(Math.abs(b[i]))} = <b>${numbers.z}</b>${tail}`;
    const told = [...(squash === "none" ? [] : [`a${l + 1}`]), `z${l + 1}`].map((key) => `${of(key)} = ${number(grads[key][i])}`);
    find("node-gradients").innerHTML = `Gradient of the loss: ${told.join(", ")} = ∂L/∂b`;
    showVotes(l, i, a);
    find("undo").hidden = !net.layers.some((layer, k) => Array.from(layer.b).some((_, j) => changed(k, j)));
  }

  // What the node adds to each node that it leads to.
  function showVotes(l, i, a) {
    const votes = find("votes");
    votes.hidden = l === last;
    if (l === last) return;
    const { nIn, nOut, W } = net.layers[l + 1];
    const parts = Array.from({ length: nOut }, (_, k) => W[k * nIn + i] * a);
    const title = l + 1 === last ? "What it adds to each answer" : "What it adds to each node of the next layer";
    votes.replaceChildren(element("p", { class: "hint" }, title), bars(parts, l + 1 === last));
  }

  // Values as bars up and down, with the labels of the answers under them.
  function bars(values, labelled) {
    const largest = Math.max(...values.map(Math.abs)) || 1;
    const made = Array.from(values, (value, k) => {
      const bar = element("i", { class: value < 0 ? "negative" : "positive" });
      bar.style.setProperty("--level", Math.abs(value) / largest);
      return element("span", { title: `${k}: ${number(value)}` }, bar, element("small", {}, labelled ? `${k}` : ""));
    });
    return element("div", { class: "bars" }, ...made);
  }

  function outline(region) {
    if (!region || state.layer) return;
    const context = weights.getContext("2d");
    context.globalCompositeOperation = "multiply";
    context.fillStyle = "rgb(128 128 128 / 0.35)";
    context.beginPath();
    context.rect(0, 0, PIXELS, PIXELS);
    context.rect(region.left, region.top, region.right - region.left + 1, region.bottom - region.top + 1);
    context.fill("evenodd");
    context.globalCompositeOperation = "source-over";
  }

  function paintAll() {
    newPalette();
    [...find("samples").children].forEach((button, i) => paint(button.firstChild, samples[i], PIXELS, null));
    tiles[0].forEach((_, i) => paintTile(i));
    drawPad();
    update();
  }
  document.documentElement.addEventListener("theme", paintAll);

  // Begin with the node that says most about the first digit.
  now = compute(net, state.x, state.label);
  if (last) {
    const { nIn, W } = net.layers[1];
    const says = Array.from(now.pass.a[0], (a, i) => W[(last === 1 ? state.label : 0) * nIn + i] * a);
    state.node = says.indexOf(Math.max(...says));
  }
  paintAll();

  // For tests, and for the curious at the console.
  return {
    net,
    samples,
    state,
    build,
    compute,
    gradients,
    pick,
    select,
    setBias,
    setRegion,
    setLabel,
    step: () => reveal(state.shown + 1),
    prepare: (ink, side) => prepare(ink, side, spline),
    enlarge: (grey) => enlarge(grey, spline),
    now: () => now,
  };
}
