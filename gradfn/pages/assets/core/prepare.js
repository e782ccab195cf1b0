// From ink on a pad to an image as the network's training images were made.

const SIZE = 28;

// `ink` is [side * side], from 0 (background) to 1. Returns [784], or null where the pad is empty.
export function prepare(ink, side, spline) {
  const box = bounds(ink, side);
  if (!box) return null;
  return spline ? asEnlarged(ink, side, box, spline) : asMnist(ink, side, box);
}

// As MNIST's were made: into 20x20 pixels, then moved by whole pixels until the center of mass is pixel 14, or up
// to half a pixel from it.
function asMnist(ink, side, box) {
  const pixel = Math.max(box.width, box.height) / 20;
  const left = box.left - Math.floor((SIZE - box.width / pixel) / 2) * pixel;
  const top = box.top - Math.floor((SIZE - box.height / pixel) / 2) * pixel;
  const placed = resample(ink, side, left, top, pixel, pixel, SIZE);
  const [x, y] = centerOfMass(placed, SIZE);
  const [right, down] = [x, y].map((center) => Math.ceil(SIZE / 2 - 0.5 - center - 1e-6));
  return Float64Array.from(placed, (_, i) => {
    const row = Math.floor(i / SIZE) - down, column = (i % SIZE) - right;
    return row >= 0 && row < SIZE && column >= 0 && column < SIZE ? placed[row * SIZE + column] : 0;
  });
}

// As scikit-learn's digits were made: as high as the 8x8 image, at most three quarters as wide, 17 levels of gray;
// then enlarged by a spline.
function asEnlarged(ink, side, box, spline) {
  const small = spline.length / SIZE;
  const high = box.height / small;
  const wide = Math.max(high, box.width / (0.75 * small));
  let left = box.left - (small * wide - box.width) / 2;
  const [x] = centerOfMass(resample(ink, side, left, box.top, wide, high, small), small);
  const room = small - box.width / wide;
  left = box.left - Math.min(Math.max((box.left - left) / wide + (small - 1) / 2 - x, 0), room) * wide;
  const gray = resample(ink, side, left, box.top, wide, high, small).map((v) => Math.round(16 * v) / 16);
  return enlarge(gray, spline);
}

// The image S G S^T, kept within 0 and 1; S is the spline [28, small], G the image [small, small].
export function enlarge(gray, spline) {
  const small = spline.length / SIZE;
  const rows = new Float64Array(SIZE * small); // S G
  for (let i = 0; i < SIZE; i++)
    for (let j = 0; j < small; j++)
      for (let k = 0; k < small; k++) rows[i * small + j] += spline[i * small + k] * gray[k * small + j];
  return Float64Array.from({ length: SIZE * SIZE }, (_, at) => {
    const i = Math.floor(at / SIZE), j = at % SIZE;
    let sum = 0;
    for (let k = 0; k < small; k++) sum += rows[i * small + k] * spline[j * small + k];
    return Math.min(Math.max(sum, 0), 1);
  });
}

function bounds(ink, side) {
  let left = side, right = -1, top = side, bottom = -1;
  for (let i = 0; i < side * side; i++) {
    if (!(ink[i] > 0)) continue;
    const row = Math.floor(i / side), column = i % side;
    left = Math.min(left, column);
    right = Math.max(right, column);
    top = Math.min(top, row);
    bottom = Math.max(bottom, row);
  }
  return right < 0 ? null : { left, top, width: right - left + 1, height: bottom - top + 1 };
}

// The mean ink of the parts of the pad under n x n pixels, each so wide and high, from a corner on.
function resample(ink, side, left, top, wide, high, n) {
  const across = shares(left, wide, n, side), down = shares(top, high, n, side);
  return Float64Array.from({ length: n * n }, (_, at) => {
    let sum = 0;
    for (const [row, part] of down[Math.floor(at / n)])
      for (const [column, share] of across[at % n]) sum += part * share * ink[row * side + column];
    return sum;
  });
}

// For each of n pixels, which of the pad's rows (or columns) are under it, and with which share.
function shares(from, length, n, side) {
  return Array.from({ length: n }, (_, i) => {
    const start = from + i * length, end = start + length;
    const found = [];
    for (let k = Math.max(Math.floor(start), 0); k < Math.min(end, side); k++)
      found.push([k, (Math.min(k + 1, end) - Math.max(k, start)) / length]);
    return found;
  });
}

function centerOfMass(image, n) {
  let sum = 0, x = 0, y = 0;
  for (let i = 0; i < n * n; i++) {
    sum += image[i];
    x += image[i] * (i % n);
    y += image[i] * Math.floor(i / n);
  }
  return [x / sum, y / sum];
}
