// The state of the digit network as short texts, for the address of the page, and back.

// The shortest text of a number in single precision.
function short(value) {
  let digits = 1;
  while (digits < 9 && Math.fround(Number(value.toPrecision(digits))) !== value) digits++;
  return String(Number(value.toPrecision(digits)));
}

// The changed biases, "layer.node:value", and the regions of the first layer, "node:left-top-right-bottom".
export function changesToText({ net, trained, regions }) {
  const biases = net.layers.flatMap(({ b }, l) =>
    Array.from(b, (value, i) => (value === trained.layers[l].b[i] ? "" : `${l}.${i}:${short(value)}`)).filter(Boolean));
  const areas = Array.from(regions, ([i, { left, top, right, bottom }]) => `${i}:${left}-${top}-${right}-${bottom}`);
  return { bias: biases.join(","), region: areas.join(",") };
}

// What such texts say, without what is not of this network: { biases: [[layer, node, value]], regions: [[node, region]]
// }.
export function changesFromText({ bias = "", region = "" }, { net }, side) {
  const numbers = (text, pattern) => text.split(",").map((each) => each.match(pattern)).filter(Boolean)
    .map((found) => found.slice(1).map(Number));
  const biases = numbers(bias, /^(\d+)\.(\d+):(-?\d+(?:\.\d+)?(?:e-?\d+)?)$/)
    .filter(([l, i, value]) => i < (net.layers[l]?.nOut ?? 0) && Math.abs(value) < 1e6);
  const regions = numbers(region, /^(\d+):(\d+)-(\d+)-(\d+)-(\d+)$/)
    .filter(([i, left, top, right, bottom]) =>
      i < net.layers[0].nOut && left <= right && top <= bottom && right < side && bottom < side)
    .map(([i, left, top, right, bottom]) => [i, { left, top, right, bottom }]);
  return { biases, regions };
}

// An index below n from a text, or null.
export const index = (text, n) => (/^\d{1,6}$/.test(text ?? "") && Number(text) < n ? Number(text) : null);
