// The pad to draw on, with the mouse, a pen or a finger.
import { follow } from "gradfn/core/dom.js";

const POINTS = 1500; // of a drawing that is read from a text, at most

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

  // In whole pixels, so that a drawing that is read from a text is the same.
  const scaled = (place) => place.map((share) => Math.min(Math.max(Math.round(share * side), 0), side));
  const start = (place) => {
    strokes.push([scaled(place)]);
    changed();
  };
  follow(pad, start, (place) => {
    const stroke = strokes[strokes.length - 1], before = stroke[stroke.length - 1], point = scaled(place);
    if (Math.hypot(point[0] - before[0], point[1] - before[1]) < 2) return;
    stroke.push(point);
    changed();
  });
  find("clear").addEventListener("click", () => {
    strokes = [];
    changed();
  });

  return {
    draw,
    // The drawing as a text for the address: two base-36 digits a coordinate, "." between strokes; "" where it is too
    // long.
    text() {
      if (strokes.flat().length > POINTS) return "";
      const written = (at) => at.toString(36).padStart(2, "0");
      return strokes.map((stroke) => stroke.flat().map(written).join("")).join(".");
    },
    // Draw what text() returned; returns whether it was a drawing.
    read(text) {
      const read = text.split(".").map((stroke) => (stroke.match(/^(?:[0-9a-z]{4})+$/) ? stroke.match(/.{4}/g) : []));
      const n = read.flat().length;
      if (!n || n > POINTS || read.some((stroke) => !stroke.length)) return false;
      const numbers = (point) => [point.slice(0, 2), point.slice(2)].map((each) => Math.min(parseInt(each, 36), side));
      strokes = read.map((stroke) => stroke.map(numbers));
      changed();
      return true;
    },
    empty() {
      strokes = [];
      draw();
    },
  };
}
