// Arrays of numbers, as gradfn/pages/live/arrays.py encodes them.

// Decode { dtype, shape, data } to { shape, values }; values is a Float32Array, row after row, or of integers as they
// are.
export function decode({ dtype, shape, data }) {
  const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
  return { shape, values: kinds[dtype](bytes) };
}

// Decode { name: array, ... } to { name: { shape, values }, ... }.
export function decodeAll(arrays) {
  return Object.fromEntries(Object.entries(arrays).map(([name, each]) => [name, decode(each)]));
}

const kinds = {
  float32: (bytes) => read(bytes, 4, Float32Array, (view, at) => view.getFloat32(at, true)),
  float16: (bytes) => read(bytes, 2, Float32Array, (view, at) => half(view.getUint16(at, true))),
  bfloat16: (bytes) => {
    const bits = read(bytes, 2, Uint32Array, (view, at) => view.getUint16(at, true) * 65536);
    return new Float32Array(bits.buffer);
  },
  int32: (bytes) => read(bytes, 4, Int32Array, (view, at) => view.getInt32(at, true)),
  int8: (bytes) => new Int8Array(bytes.buffer),
  uint8: (bytes) => bytes,
};

function read(bytes, size, Kind, get) {
  const view = new DataView(bytes.buffer);
  return Kind.from({ length: bytes.length / size }, (_, i) => get(view, size * i));
}

// The value of a number in half precision, from its bits: sign, 5 of the exponent, 10 of the fraction.
function half(bits) {
  const sign = bits & 0x8000 ? -1 : 1, exponent = (bits >> 10) & 31, fraction = bits & 1023;
  if (exponent === 0) return sign * fraction * 2 ** -24;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return sign * (1 + fraction / 1024) * 2 ** (exponent - 15);
}
