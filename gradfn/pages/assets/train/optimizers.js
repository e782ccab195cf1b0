// Optimizers as optax computes them: sgd(rate), sgd(rate, momentum=0.9) and adam(rate), with their defaults.

const MOMENTUM = 0.9;
const B1 = 0.9, B2 = 0.999, EPSILON = 1e-8;

// Each takes the sizes of the arrays of parameters; `updates(gradients, rate)` returns what to add to each of them.
const makers = {
  sgd: () => (gradient, rate, update) => {
    for (let i = 0; i < gradient.length; i++) update[i] = -rate * gradient[i];
  },
  momentum: (size) => {
    const trace = new Float32Array(size);
    return (gradient, rate, update) => {
      for (let i = 0; i < size; i++) {
        trace[i] = gradient[i] + MOMENTUM * trace[i];
        update[i] = -rate * trace[i];
      }
    };
  },
  // Kingma and Ba, 2015, algorithm 1.
  adam: (size) => {
    const mean = new Float32Array(size), square = new Float32Array(size);
    let step = 0;
    return (gradient, rate, update) => {
      step++;
      const first = 1 - B1 ** step, second = 1 - B2 ** step;
      for (let i = 0; i < size; i++) {
        const g = gradient[i];
        mean[i] = B1 * mean[i] + (1 - B1) * g;
        square[i] = B2 * square[i] + (1 - B2) * g * g;
        update[i] = (-rate * (mean[i] / first)) / (Math.sqrt(square[i] / second) + EPSILON);
      }
    };
  },
};

export const names = { sgd: "SGD", momentum: "Momentum", adam: "Adam" };

export function makeOptimizer(name, sizes) {
  const each = sizes.map((size) => makers[name](size));
  const updates = sizes.map((size) => new Float32Array(size));
  return (gradients, rate) => {
    each.forEach((of, i) => of(gradients[i], rate, updates[i]));
    return updates;
  };
}
