// Images and maps as pixels: of one channel as ink or as gray, of three in color.
import { paint, paintTiles, scaleOf } from "gradfn/core/paint.js";

// How the images of a network are shown. Digits are ink from 0 to 1; other images are from the smallest value (black)
// to the largest (white) of all of them, or from 0 to 1 where they are in this range.
export function imagePainter(net, isInk, samples) {
  const { height, width, channels } = net, area = height * width;
  let low = 0, high = 1;
  for (const sample of samples)
    for (const value of sample) {
      low = Math.min(low, value);
      high = Math.max(high, value);
    }
  const share = (value) => (value - low) / (high - low);

  return {
    low,
    high,
    // The whole image.
    paint(canvas, x) {
      if (isInk) paint(canvas, x, width, null);
      else if (channels === 3) paintColors(canvas, (i) => [0, 1, 2].map((c) => share(x[c * area + i])));
      else if (channels === 1) this.paintChannel(canvas, x);
      else {
        const tiles = Array.from({ length: channels }, (_, c) => x.subarray(c * area, (c + 1) * area).map(share));
        paintTiles(canvas, tiles, width, null, Math.ceil(Math.sqrt(channels)));
      }
    },
    // One of its channels.
    paintChannel(canvas, values) {
      if (isInk) paint(canvas, values, width, null);
      else paintColors(canvas, (i) => Array(3).fill(share(values[i])));
    },
  };

  function paintColors(canvas, colorOf) {
    canvas.width = width;
    canvas.height = height;
    const context = canvas.getContext("2d"), image = context.createImageData(width, height);
    for (let i = 0; i < area; i++) image.data.set([...colorOf(i).map((part) => 255 * part), 255], 4 * i);
    context.putImageData(image, 0, 0);
  }
}

// Paint a map: values that are never negative as ink, others red and blue. `scale` is the value of the full color.
export function paintMap(canvas, values, columns, scale, signed) {
  if (signed) paint(canvas, values, columns, scale);
  else paint(canvas, values.map((value) => Math.min(scale ? value / scale : 0, 1)), columns, null);
}

// How a layer's maps of one kind are shown: all on the same scale. The signs are those of `before`: pooled maps are
// shown as those that they were made of, also where their negative values are gone.
export function scaleOfMaps(values, before = values) {
  return { scale: scaleOf(values), signed: before.some((value) => value < 0) };
}

// Paint the weights of a filter, or their gradient: a tile for each input channel.
export function paintWeights(canvas, weights, nIn, window, scale) {
  const n = window * window;
  const tiles = Array.from({ length: nIn }, (_, i) => weights.subarray(i * n, (i + 1) * n));
  paintTiles(canvas, tiles, window, scale, perRowOf(nIn), 1);
}

// A matrix [rows, columns] of at most `most` in each direction: where it is larger, each cell is that of the largest
// size in its block.
export function shrunk(values, columns, most) {
  const rows = values.length / columns, wide = Math.min(columns, most), high = Math.min(rows, most);
  const found = new Float64Array(wide * high);
  for (let i = 0; i < rows; i++) {
    const to = Math.floor((i * high) / rows) * wide;
    for (let j = 0; j < columns; j++) {
      const at = to + Math.floor((j * wide) / columns), value = values[i * columns + j];
      if (Math.abs(value) > Math.abs(found[at])) found[at] = value;
    }
  }
  return { values: found, columns: wide };
}

export const perRowOf = (n) => (n <= 4 ? n : Math.ceil(Math.sqrt(n)));
export const largest = (values) => values.reduce((top, value) => Math.max(top, Math.abs(value)), 0);
