// A chart of lines over the steps, each labeled at its end.
import { element, number } from "gradfn/core/dom.js";

const WIDTH = 360, HEIGHT = 176, LEFT = 46, RIGHT = 66, TOP = 8, BOTTOM = 22;
const GAP = 11; // between labels
const POINTS = 240; // of a line: more than these would not be seen

// The color of layer l of n: from blue at the input to orange at the loss.
export function layerColor(l, n) {
  return `color-mix(in oklab, var(--c1) ${n > 1 ? Math.round((100 * l) / (n - 1)) : 0}%, var(--c0))`;
}

function svg(tag, attributes, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

// The range of values and the marks on its axis: decades where `log`, else from 0.
export function rangeOf(values, log, top) {
  const usable = values.filter((value) => Number.isFinite(value) && (!log || value > 0));
  if (!usable.length) return { low: log ? 0.1 : 0, high: 1, ticks: log ? [0.1, 1] : [0, 1] };
  const largest = usable.reduce((a, b) => Math.max(a, b)), smallest = usable.reduce((a, b) => Math.min(a, b));
  if (!log) {
    const high = top ?? (largest > 0 ? largest * 1.05 : 1), unit = 10 ** Math.floor(Math.log10(high));
    const by = [0.2, 0.5, 1, 2, 5].map((each) => each * unit).find((each) => high / each <= 5);
    return { low: 0, high, ticks: Array.from({ length: Math.floor(high / by + 1e-9) + 1 }, (_, i) => i * by) };
  }
  const from = Math.floor(Math.log10(smallest)), to = Math.max(Math.ceil(Math.log10(largest)), from + 1);
  const by = Math.ceil((to - from) / 5);
  const ticks = Array.from({ length: Math.floor((to - from) / by) + 1 }, (_, i) => 10 ** (from + i * by));
  return { low: 10 ** from, high: 10 ** to, ticks };
}

// Positions at least GAP apart, as close to the wanted ones as their order allows, between top and bottom.
export function spread(wanted, top, bottom) {
  const order = wanted.map((_, i) => i).sort((a, b) => wanted[a] - wanted[b]), out = [...wanted];
  order.forEach((at, k) => {
    out[at] = Math.max(out[at], k ? out[order[k - 1]] + GAP : top);
  });
  [...order].reverse().forEach((at, k, reversed) => {
    out[at] = Math.min(out[at], k ? out[reversed[k - 1]] - GAP : bottom);
  });
  return out;
}

const short = (value, log) => {
  if (value === 0) return "0";
  const power = Math.log10(value);
  if (log && (power < -3.5 || power > 4.5)) return `1e${Math.round(power)}`.replace("-", "−");
  return Number(value.toPrecision(3)).toLocaleString("en", { maximumSignificantDigits: 3 });
};

// Every k-th of the points, and the last one.
function thinned(points) {
  const every = Math.ceil(points.length / POINTS);
  return every < 2 ? points : points.filter((_, i) => i % every === 0 || i === points.length - 1);
}

// `caption` is text, or parts with terms. `show(lines, last, { log, top })`: lines are [{ name, color, dashed, points
// }], their points [[step, value], ...]; `last` is the last step.
export function makeLines(figure, caption, describe = number) {
  const drawing = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img" });
  const head = element("figcaption", {}, ...[caption].flat());
  figure.replaceChildren(head, drawing);

  function show(lines, last, { log = false, top } = {}) {
    const end = Math.max(last, 10), bottom = HEIGHT - BOTTOM;
    const { low, high, ticks } = rangeOf(lines.flatMap(({ points }) => points.map(([, value]) => value)), log, top);
    const x = (step) => LEFT + (step / end) * (WIDTH - LEFT - RIGHT);
    const scaled = (value) => (log ? Math.log(value / low) / Math.log(high / low) : (value - low) / (high - low));
    const y = (value) => bottom - Math.min(Math.max(scaled(value), 0), 1) * (bottom - TOP);
    const usable = ([, value]) => Number.isFinite(value) && (!log || value > 0);
    const parts = ticks.flatMap((tick) => [
      svg("line", { class: "grid", x1: LEFT, x2: WIDTH - RIGHT, y1: y(tick), y2: y(tick) }),
      svg("text", { x: LEFT - 5, y: y(tick) + 4, "text-anchor": "end" }, short(tick, log)),
    ]);
    parts.push(
      svg("text", { x: LEFT, y: HEIGHT - 5 }, "0"),
      svg("text", { x: WIDTH - RIGHT, y: HEIGHT - 5, "text-anchor": "end" }, `step ${end.toLocaleString("en")}`),
    );
    const withPoints = lines.map((line) => ({ ...line, points: thinned(line.points.filter(usable)) }));
    const shown = withPoints.filter(({ points }) => points.length);
    const ends = shown.map(({ points }) => points[points.length - 1]);
    const labels = spread(ends.map(([, value]) => y(value)), TOP + 2, bottom);
    shown.forEach(({ name, color, points, dashed }, i) => {
      const path = points.map(([step, value]) => `${x(step).toFixed(1)} ${y(value).toFixed(1)}`).join("L");
      const [step, value] = ends[i];
      parts.push(
        svg("path", { class: `line${dashed ? " dashed" : ""}`, d: `M${path}`, style: `color: ${color}` }),
        svg("path", {
          class: "leader",
          d: `M${x(step)} ${y(value)}L${WIDTH - RIGHT + 8} ${labels[i]}h4`,
          style: `color: ${color}`,
        }),
        svg("text", { class: "end", x: WIDTH - RIGHT + 15, y: labels[i] + 4 }, name),
      );
    });
    drawing.replaceChildren(...parts);
    const values = shown.map(({ name }, i) => `${name} ${describe(ends[i][1])}`);
    drawing.setAttribute("aria-label", `${head.textContent}. Now: ${values.join(", ") || "nothing yet"}.`);
  }
  return { show };
}
