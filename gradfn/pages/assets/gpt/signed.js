// Changes of a loss, as text.
import { number } from "gradfn/core/dom.js";

// A change with its sign: small ones as decimals, too.
export function signed(value) {
  const size = Math.abs(value);
  const text = size >= 1e-4 && size < 0.01 ? size.toFixed(4) : number(size);
  return `${value > 0 ? "+" : value < 0 ? "−" : ""}${text}`;
}
