// The pad to draw on, with the mouse, a pen or a finger.
import { follow } from "gradfn/core/dom.js";

// Call `drawn(ink, side)` at each stroke, ink [side * side] from 0 to 1. `pen` is a share of the pad's width.
export function makePad(find, pen, drawn) {
  const pad = find("pad"), side = pad.width;
  const context = pad.getContext("2d", { willReadFrequently: true });
  let strokes = [];

  function draw() {
    const strokeStyle = getComputedStyle(pad).color;
    Object.assign(context, { lineWidth: pen * side, lineCap: "round", lineJoin: "round", strokeStyle });
    context.clearRect(0, 0, side, side);
    for (const stroke of strokes) {
      context.beginPath();
      context.moveTo(...stroke[0]);
      for (const point of stroke) context.lineTo(...point);
      context.stroke();
    }
    find("pad-hint").hidden = strokes.length > 0;
  }

  function changed() {
    draw();
    const pixels = context.getImageData(0, 0, side, side).data;
    drawn(Float64Array.from({ length: side * side }, (_, i) => pixels[4 * i + 3] / 255), side);
  }

  const scaled = (place) => place.map((share) => share * side);
  const start = (place) => {
    strokes.push([scaled(place)]);
    changed();
  };
  follow(pad, start, (place) => {
    strokes[strokes.length - 1].push(scaled(place));
    changed();
  });
  find("clear").addEventListener("click", () => {
    strokes = [];
    changed();
  });

  return {
    draw,
    empty() {
      strokes = [];
      draw();
    },
  };
}
