// Products of matrices in typed arrays, row after row. Four outputs of two rows are computed at a time: each number
// that is loaded is then used more than once, which is what a plain loop spends its time on.

// out[i, j] = sum over l of a[i, l] b[j, l], plus bias[j]: a is [m, k], b is [n, k], out is [m, n]. Sums are in double
// precision.
export function product(a, b, m, n, k, bias = null, out = new Float32Array(m * n)) {
  let j = 0;
  for (; j + 4 <= n; j += 4) {
    const b0 = j * k, b1 = b0 + k, b2 = b1 + k, b3 = b2 + k;
    const c0 = bias ? bias[j] : 0, c1 = bias ? bias[j + 1] : 0, c2 = bias ? bias[j + 2] : 0,
      c3 = bias ? bias[j + 3] : 0;
    let i = 0;
    for (; i + 2 <= m; i += 2) {
      const a0 = i * k, a1 = a0 + k;
      let s00 = c0, s01 = c1, s02 = c2, s03 = c3, s10 = c0, s11 = c1, s12 = c2, s13 = c3;
      for (let l = 0; l < k; l++) {
        const x0 = a[a0 + l], x1 = a[a1 + l], y0 = b[b0 + l], y1 = b[b1 + l], y2 = b[b2 + l], y3 = b[b3 + l];
        s00 += x0 * y0; s01 += x0 * y1; s02 += x0 * y2; s03 += x0 * y3;
        s10 += x1 * y0; s11 += x1 * y1; s12 += x1 * y2; s13 += x1 * y3;
      }
      const at = i * n + j, below = at + n;
      out[at] = s00; out[at + 1] = s01; out[at + 2] = s02; out[at + 3] = s03;
      out[below] = s10; out[below + 1] = s11; out[below + 2] = s12; out[below + 3] = s13;
    }
    if (i < m) {
      const a0 = i * k, at = i * n + j;
      let s0 = c0, s1 = c1, s2 = c2, s3 = c3;
      for (let l = 0; l < k; l++) {
        const x = a[a0 + l];
        s0 += x * b[b0 + l]; s1 += x * b[b1 + l]; s2 += x * b[b2 + l]; s3 += x * b[b3 + l];
      }
      out[at] = s0; out[at + 1] = s1; out[at + 2] = s2; out[at + 3] = s3;
    }
  }
  for (; j < n; j++) {
    for (let i = 0; i < m; i++) {
      let sum = bias ? bias[j] : 0;
      for (let l = 0; l < k; l++) sum += a[i * k + l] * b[j * k + l];
      out[i * n + j] = sum;
    }
  }
  return out;
}

// [m, n] -> [n, m]
export function transposed(a, m, n) {
  const out = new Float32Array(m * n);
  for (let i = 0; i < m; i++) for (let j = 0; j < n; j++) out[j * m + i] = a[i * n + j];
  return out;
}

// Transposed weights, kept as long as the weights are.
const kept = new WeakMap();

export function transposedWeights(W, m, n) {
  if (!kept.has(W)) kept.set(W, transposed(W, m, n));
  return kept.get(W);
}

// One head of an array [T, heads, size]: [T, size], times a factor.
export function headOf(x, T, heads, size, head, factor = 1) {
  const out = new Float32Array(T * size);
  for (let t = 0; t < T; t++) {
    const from = (t * heads + head) * size;
    for (let d = 0; d < size; d++) out[t * size + d] = factor * x[from + d];
  }
  return out;
}

// Add [T, size], times a factor, to one head of an array [T, heads, size].
export function addToHead(x, part, T, heads, size, head, factor = 1) {
  for (let t = 0; t < T; t++) {
    const to = (t * heads + head) * size;
    for (let d = 0; d < size; d++) x[to + d] += factor * part[t * size + d];
  }
}

export function sum(a, b) {
  return a.map((value, i) => value + b[i]);
}

export function addTo(a, b) {
  for (let i = 0; i < b.length; i++) a[i] += b[i];
}
