// Activations: of a node for its weighted sum z, and the slope at z, where the activation is a.

const GELU = Math.sqrt(2 / Math.PI);
// Klambauer et al., Self-normalizing neural networks, 2017.
const SELU = 1.0507009873554805, SELU_BELOW = SELU * 1.6732632423543772;
const sigmoid = (z) => 1 / (1 + Math.exp(-z));
const normal = (z) => 0.5 * (1 + erf(z * Math.SQRT1_2));

// Numerical Recipes, section 6.2: a Chebyshev fit, whose relative error is below 1.2e-7.
function erf(x) {
  const t = 1 / (1 + 0.5 * Math.abs(x));
  const fit = [0.17087277, -0.82215223, 1.48851587, -1.13520398, 0.27886807, -0.18628806, 0.09678418, 0.37409196,
    1.00002368];
  const power = fit.reduce((sum, part) => sum * t + part, 0);
  const rest = t * Math.exp(-x * x - 1.26551223 + power * t);
  return x >= 0 ? 1 - rest : rest - 1;
}

export const activations = {
  none: { of: (z) => z, slope: () => 1 },
  identity: { of: (z) => z, slope: () => 1 },
  sigmoid: { of: sigmoid, slope: (z, a) => a * (1 - a) },
  tanh: { of: Math.tanh, slope: (z, a) => 1 - a * a },
  relu: { of: (z) => Math.max(z, 0), slope: (z) => (z > 0 ? 1 : 0) },
  leaky_relu: { of: (z) => (z >= 0 ? z : 0.01 * z), slope: (z) => (z >= 0 ? 1 : 0.01) },
  elu: { of: (z) => (z > 0 ? z : Math.expm1(z)), slope: (z) => (z > 0 ? 1 : Math.exp(z)) },
  selu: {
    of: (z) => (z > 0 ? SELU * z : SELU_BELOW * Math.expm1(z)),
    slope: (z) => (z > 0 ? SELU : SELU_BELOW * Math.exp(z)),
  },
  gelu: {
    of: (z) => 0.5 * z * (1 + Math.tanh(GELU * (z + 0.044715 * z ** 3))),
    slope: (z) => {
      const t = Math.tanh(GELU * (z + 0.044715 * z ** 3));
      return 0.5 * (1 + t) + 0.5 * z * (1 - t * t) * GELU * (1 + 3 * 0.044715 * z * z);
    },
  },
  gelu_exact: {
    of: (z) => z * normal(z),
    slope: (z) => normal(z) + (z * Math.exp(-0.5 * z * z)) / Math.sqrt(2 * Math.PI),
  },
  silu: { of: (z) => z * sigmoid(z), slope: (z, a) => sigmoid(z) + a * (1 - sigmoid(z)) },
  softplus: {
    of: (z) => Math.max(z, 0) + Math.log1p(Math.exp(-Math.abs(z))),
    slope: sigmoid,
  },
};
