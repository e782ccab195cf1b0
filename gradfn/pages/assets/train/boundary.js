// What the network has learned so far: the boundary in the plane, or the images of the first layer's weights.
import { color, paintTiles, scaleOf } from "gradfn/core/paint.js";
import { forward, makeSpace, margins } from "gradfn/train/net.js";

const PLANE = { left: -1.7, right: 2.7, bottom: -1.2, top: 1.7 };
// Products of a picture while the network learns, about 8 ms, and when it pauses: deeper networks have a coarser grid.
const PRODUCTS = { moving: 5_000_000, still: 12_000_000 };
const PIXELS = 28;

export function makePicture(find, data) {
  return data.sizes[0] === 2 ? makeBoundary(find("picture"), data) : makeTiles(find("picture"));
}

// The probability of the second class at each point of the plane, with the points on it.
function makeBoundary(canvas, data) {
  const context = canvas.getContext("2d"), grid = document.createElement("canvas"), ofGrid = grid.getContext("2d");
  const { left, right, bottom, top } = PLANE;
  let colors = null, space = null, plane = null, made = null;

  function resize({ layers }, quality) {
    const products = layers.reduce((sum, { nIn, nOut }) => sum + nIn * nOut + nOut, 0);
    const columns = Math.round(Math.min(Math.max(Math.sqrt((1.5 * PRODUCTS[quality]) / products), 30), 110));
    const rows = Math.round((columns * (top - bottom)) / (right - left));
    const x = new Float32Array(2 * columns * rows);
    for (let i = 0; i < rows; i++) {
      for (let j = 0; j < columns; j++) {
        x[2 * (i * columns + j)] = left + ((j + 0.5) / columns) * (right - left);
        x[2 * (i * columns + j) + 1] = top - ((i + 0.5) / rows) * (top - bottom);
      }
    }
    Object.assign(grid, { width: columns, height: rows });
    plane = { columns, rows, x };
    space = null;
  }

  // `fresh`: whether the network has other sizes than before.
  function show(net, { fresh, moving }) {
    const quality = moving ? "moving" : "still";
    if (fresh || made !== quality) resize(net, quality);
    made = quality;
    const { columns, rows, x } = plane, n = columns * rows;
    space ??= makeSpace(net, n);
    const margin = margins(forward(net, x, n, space), n);
    const image = ofGrid.createImageData(columns, rows);
    for (let k = 0; k < n; k++) {
      // 2p - 1; white where the output is not a number.
      const t = Number.isNaN(margin[k]) ? 0 : Math.tanh(margin[k] / 2), end = t < 0 ? colors.c0 : colors.c1;
      for (let i = 0; i < 3; i++)
        image.data[4 * k + i] = colors.raised[i] + 0.62 * Math.abs(t) * (end[i] - colors.raised[i]);
      image.data[4 * k + 3] = 255;
    }
    ofGrid.putImageData(image, 0, 0);
    context.imageSmoothingEnabled = true;
    context.drawImage(grid, 0, 0, canvas.width, canvas.height);
    line(margin, columns, rows);
    points();
  }

  // The line of 50 %, cell by cell between the grid's points (marching squares).
  function line(margin, columns, rows) {
    const [w, h] = [canvas.width / columns, canvas.height / rows];
    context.beginPath();
    for (let i = 0; i + 1 < rows; i++) {
      for (let j = 0; j + 1 < columns; j++) {
        const corners = [[j, i], [j + 1, i], [j + 1, i + 1], [j, i + 1]];
        const values = corners.map(([u, v]) => margin[v * columns + u]);
        const crossings = corners.flatMap(([u, v], k) => {
          const next = (k + 1) % 4, [s, t] = corners[next];
          if (values[k] > 0 === values[next] > 0) return [];
          const at = values[k] / (values[k] - values[next]);
          return [[(u + at * (s - u) + 0.5) * w, (v + at * (t - v) + 0.5) * h]];
        });
        for (let k = 0; k + 1 < crossings.length; k += 2) {
          context.moveTo(...crossings[k]);
          context.lineTo(...crossings[k + 1]);
        }
      }
    }
    Object.assign(context, { lineWidth: 3, strokeStyle: css(colors.ink) });
    context.stroke();
  }

  function points() {
    const { x, y, n } = data.train;
    const fills = [css(colors.c0), css(colors.c1)];
    Object.assign(context, { lineWidth: 1.5, strokeStyle: css(colors.raised) });
    for (let k = 0; k < n; k++) {
      const u = ((x[2 * k] - left) / (right - left)) * canvas.width;
      const v = ((top - x[2 * k + 1]) / (top - bottom)) * canvas.height;
      context.beginPath();
      // Circles and squares, as color alone is not enough.
      if (y[k]) context.rect(u - 5, v - 5, 10, 10);
      else context.arc(u, v, 6, 0, 2 * Math.PI);
      context.fillStyle = fills[y[k]];
      context.fill();
      context.stroke();
    }
  }

  return {
    show,
    repaint() {
      colors = Object.fromEntries(["c0", "c1", "raised", "ink"].map((name) => [name, color(name)]));
    },
  };
}

// The weights of each unit of the first layer as an image.
function makeTiles(canvas) {
  return {
    show({ layers }) {
      const { nOut, nIn, W } = layers[0];
      const tiles = Array.from({ length: nOut }, (_, i) => W.subarray(i * nIn, (i + 1) * nIn));
      const perRow = nOut <= 6 ? nOut : nOut <= 16 ? 6 : Math.ceil(Math.sqrt(1.8 * nOut));
      paintTiles(canvas, tiles, PIXELS, scaleOf(W), perRow);
    },
    repaint() {},
  };
}

const css = ([r, g, b]) => `rgb(${r} ${g} ${b})`;
