// Pictures: they grow when clicked, and charts, which are SVG, have the colors and fonts of the page.
//
// An SVG is shown as an image: no script in it runs, and it loads nothing. Its colors are exchanged in its text.

// Okabe and Ito's colors, and the ends of the diverging scale, with the page's colors for the same things.
const NAMED = {
  "#0072b2": "--c0", "#d55e00": "--c1", "#009e73": "--c2", "#cc79a7": "--c3",
  "#2166ac": "--less", "#b2182b": "--more",
};
// The same colors for texts, dark enough on light paper; on dark paper those of the page are lighter.
const TEXTS = { "#b34f00": "--c1", "#007a59": "--c2", "#a8487f": "--c3" };
const SVG = "data:image/svg+xml";
const COLORED = /((?:fill|stroke|stop-color|color)\s*[:=]\s*["']?)(#[0-9a-f]{6}|#[0-9a-f]{3}\b|white\b|black\b)/gi;

// Return the channels of a color such as #08f, from 0 to 255.
export function channels(color) {
  const word = { white: "#ffffff", black: "#000000" }[color.toLowerCase()] ?? color;
  const long = word.length === 4 ? word.replace(/[0-9a-f]/gi, "$&$&") : word;
  return [1, 3, 5].map((i) => parseInt(long.slice(i, i + 2), 16));
}

const hex = (rgb) => `#${rgb.map((channel) => Math.round(channel).toString(16).padStart(2, "0")).join("")}`;

// Return the page's color for one of a chart: white is its paper and black its ink, with the grays between them.
export function pageColor(color, palette) {
  const rgb = channels(color);
  if (Math.max(...rgb) - Math.min(...rgb) <= 4) {
    const light = rgb[1] / 255;
    return hex(palette.paper.map((paper, i) => palette.ink[i] + light * (paper - palette.ink[i])));
  }
  const name = NAMED[hex(rgb)] ?? (palette.dark ? TEXTS[hex(rgb)] : undefined);
  return name ? hex(palette[name]) : color;
}

// Exchange the colors and fonts of a chart; on a dark page images in it have light and dark exchanged, as their texts.
export function recolored(svg, palette) {
  const colored = svg.replace(COLORED, (_, before, color) => before + pageColor(color, palette));
  const fonts = colored
    .replace(/'DejaVu Sans Mono'[^;"]*/g, palette.mono)
    .replace(/'DejaVu Sans'[^;"]*/g, palette.sans);
  // Black is not written into the file, as it is the color of what has no other.
  const inked = (start) => `${start.replace(/\sfill="[^"]*"/, "").slice(0, -1)} fill="${hex(palette.ink)}">`;
  return fonts.replace(/<svg\b[^>]*>/, (start) => inked(start) + (palette.dark ? exchange(palette) : ""));
}

// Return a filter for the images of a file: white becomes paper and black ink, and hues stay.
function exchange({ ink, paper }) {
  const channel = (name, i) => `<feFunc${name} type="table" tableValues="${ink[i] / 255} ${paper[i] / 255}"/>`;
  return (
    '<filter id="exchanged" color-interpolation-filters="sRGB" x="0" y="0" width="1" height="1">' +
    `<feComponentTransfer>${["R", "G", "B"].map(channel).join("")}</feComponentTransfer>` +
    '<feColorMatrix type="hueRotate" values="180"/></filter><style>image{filter:url(#exchanged)}</style>'
  );
}

function pagePalette() {
  const probe = document.createElement("i");
  document.body.append(probe);
  const style = getComputedStyle(probe);
  const color = (name) => {
    probe.style.color = `var(${name})`;
    return style.color.match(/[\d.]+/g).slice(0, 3).map(Number);
  };
  // Within an attribute of the file, so with the other quotes.
  const font = (name) => style.getPropertyValue(name).replaceAll('"', "'").replace(/[<>&]/g, "");
  const named = Object.fromEntries(Object.values(NAMED).map((name) => [name, color(name)]));
  const [paper, ink] = [color("--raised"), color("--ink")];
  const palette = { ...named, paper, ink, sans: font("--sans"), mono: font("--mono"), dark: paper[1] < ink[1] };
  probe.remove();
  return palette;
}

function textOf(address) {
  const bytes = Uint8Array.from(atob(address.slice(address.indexOf(",") + 1)), (letter) => letter.charCodeAt(0));
  return new TextDecoder().decode(bytes);
}

export function livePictures() {
  const charts = Array.from(document.querySelectorAll("img.drawing"), (image) => [image, textOf(image.src)]);
  const repaint = () => {
    const palette = pagePalette();
    for (const [image, svg] of charts) image.src = `${SVG},${encodeURIComponent(recolored(svg, palette))}`;
  };
  if (charts.length) {
    document.documentElement.addEventListener("theme", repaint);
    repaint();
  }

  const large = document.getElementById("large");
  for (const button of document.querySelectorAll(".enlarge")) {
    button.addEventListener("click", () => {
      large.querySelector(".scroll").replaceChildren(button.firstElementChild.cloneNode());
      large.showModal();
    });
  }
  large.addEventListener("click", (event) => {
    if (event.target === large || event.target.tagName === "IMG") large.close();
  });
}
