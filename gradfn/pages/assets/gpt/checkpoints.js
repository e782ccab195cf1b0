// The parameters at earlier steps of training: gradfn/pages/live/_gpt_checkpoints.py says how they are encoded.
import { decode, decodeAll } from "gradfn/core/arrays.js";

// Returns [{ step, loss }] in the order of training; the last is the trained model. The arrays of the others stay
// encoded until paramsAt needs them.
export function checkpointsOf(content) {
  return content.checkpoints.map(({ step, loss, arrays }) => ({ step, loss, arrays }));
}

// The parameters of checkpoint i; the last is the trained model. They are decoded once, from the end of training
// backwards.
export function paramsAt(model, i) {
  const { checkpoints } = model, last = checkpoints.length - 1;
  checkpoints[last].params ??= model.params;
  for (let j = last - 1; j >= i; j--) {
    checkpoints[j].params ??= before(checkpoints[j + 1].params, checkpoints[j].arrays);
  }
  return checkpoints[i].params;
}

// The parameters before some others, from the encoded differences: multiples of a step for each row. Or they are there
// themselves, where differences are not exact enough.
function before(params, { lengths, bits, scales, whole }) {
  if (whole) return decodeAll(whole);
  const sizes = Object.values(params).map(({ values }) => values.length);
  const multiples = unpack(decode(lengths).values, decode(bits).values, sizes.reduce((sum, size) => sum + size, 0));
  const steps = decode(scales).values;
  let at = 0, row = 0;
  const out = {};
  for (const [path, { shape, values }] of Object.entries(params)) {
    const width = shape[shape.length - 1], made = new Float32Array(values.length);
    for (let i = 0; i < values.length; i += width, row++) {
      for (let j = i; j < i + width; j++, at++) made[j] = values[j] + (multiples[at] - 128) * steps[row];
    }
    out[path] = { shape, values: made };
  }
  return out;
}

// Decode n symbols of canonical Huffman codes: lengths[symbol] is the length of its code, 0 where it has no code.
export function unpack(lengths, bits, n) {
  const longest = lengths.reduce((a, b) => Math.max(a, b), 0);
  const symbols = Array.from(lengths.keys()).filter((symbol) => lengths[symbol]);
  symbols.sort((a, b) => lengths[a] - lengths[b] || a - b);
  const counts = new Int32Array(longest + 1), out = new Uint8Array(n);
  for (const symbol of symbols) counts[lengths[symbol]]++;
  let at = 0;
  for (let k = 0; k < n; k++) {
    // Of each length, codes are consecutive numbers from `first` on, for the symbols from `index` on.
    let code = 0, first = 0, index = 0;
    for (let length = 1; length <= longest; length++, at++) {
      code = code * 2 + ((bits[at >> 3] >> (7 - (at & 7))) & 1);
      first *= 2;
      if (code - first < counts[length]) {
        out[k] = symbols[index + code - first];
        at++;
        break;
      }
      index += counts[length];
      first += counts[length];
    }
  }
  return out;
}
