// Dead and saturated units, as gf.inspect defines them.

// A sigmoid or tanh is saturated where its slope is below a tenth of the largest: tanh' = 1 - tanh^2 < 0.1.
const SATURATED = Math.sqrt(0.9);
// The fewest examples over which units count as dead: on one, half of the units of a healthy relu are zero.
const DEAD_ROWS = 8;

const slopeAt = { sigmoid: (a) => Math.abs(2 * a - 1), tanh: Math.abs };

// What is counted for an activation: "saturated", "dead", or null.
export function countedFor(activation) {
  return activation in slopeAt ? "saturated" : activation === "relu" ? "dead" : null;
}

// For each hidden layer after `forward` on n examples, the share that is saturated (of values) or dead (of units), from
// 0 to 1; null where the activation can be neither, or there are too few examples.
export function unitsOf({ layers, activation }, n, space) {
  const counted = countedFor(activation);
  if (!counted || (counted === "dead" && n < DEAD_ROWS)) return null;
  return layers.slice(0, -1).map(({ nOut }, l) => {
    const values = space.a[l];
    return counted === "dead" ? deadShare(values, n, nOut) : saturatedShare(values, n * nOut, slopeAt[activation]);
  });
}

function saturatedShare(values, length, at) {
  let count = 0;
  for (let i = 0; i < length; i++) if (at(values[i]) > SATURATED) count++;
  return count / length;
}

function deadShare(values, n, width) {
  let count = 0;
  for (let i = 0; i < width; i++) {
    let k = 0;
    while (k < n && values[k * width + i] === 0) k++;
    if (k === n) count++;
  }
  return count / width;
}
