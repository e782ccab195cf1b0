// Numbers as pixels, in the colors of the page: more than zero red, less blue; ink on paper.

const probe = document.createElement("i");

export function color(name) {
  document.body.append(probe);
  probe.style.color = `var(--${name})`;
  const rgb = getComputedStyle(probe).color.match(/[\d.]+/g).slice(0, 3).map(Number);
  probe.remove();
  return rgb;
}

let palette = null;
export function newPalette() {
  palette = Object.fromEntries(["less", "zero", "more", "raised", "ink"].map((name) => [name, color(name)]));
}

function signed(share) {
  const t = Math.min(Math.abs(share), 1);
  const end = share < 0 ? palette.less : palette.more;
  return palette.zero.map((zero, i) => zero + t * (end[i] - zero));
}

function inked(share) {
  return palette.raised.map((paper, i) => paper + share * (palette.ink[i] - paper));
}

// Paint values row after row; scale says which value has the full color, null that they are ink from 0 to 1.
export function paint(canvas, values, columns, scale) {
  paintTiles(canvas, [values], columns, scale, 1);
}

// Paint tiles of values side by side, `perRow` in a row, with a gap of a few pixels between them.
export function paintTiles(canvas, tiles, columns, scale, perRow, gap = 2) {
  const rows = Math.ceil(tiles[0].length / columns);
  canvas.width = perRow * (columns + gap) - gap;
  canvas.height = Math.ceil(tiles.length / perRow) * (rows + gap) - gap;
  const context = canvas.getContext("2d");
  const image = context.createImageData(canvas.width, canvas.height);
  tiles.forEach((values, tile) => {
    const left = (tile % perRow) * (columns + gap), top = Math.floor(tile / perRow) * (rows + gap);
    for (let i = 0; i < values.length; i++) {
      const at = 4 * ((top + Math.floor(i / columns)) * canvas.width + left + (i % columns));
      const [r, g, b] = scale === null ? inked(values[i]) : signed(scale ? values[i] / scale : 0);
      image.data[at] = r;
      image.data[at + 1] = g;
      image.data[at + 2] = b;
      image.data[at + 3] = 255;
    }
  });
  context.putImageData(image, 0, 0);
}

// The value that gets the full color: so large that only one in two hundred is larger.
export function scaleOf(values) {
  const sizes = Float64Array.from(values, Math.abs).sort();
  return sizes[Math.floor(0.995 * (sizes.length - 1))] || sizes[sizes.length - 1] || 0;
}
