// The loss over the steps, on the training and on the test examples.
import { term } from "gradfn/core/terms.js";
import { makeLines } from "gradfn/train/lines.js";

const WIDE = 30; // the ratio of losses from which their axis is logarithmic

export function makeLossView(find) {
  const chart = makeLines(find("loss"), [term("loss", "Loss"), ", in ", term("nats")]);
  return {
    // `whole`: whether each step used all training examples.
    show({ records, tests, step, whole }) {
      const training = records.map((record) => [record.step, record.loss]);
      const values = training.map(([, loss]) => loss).filter(Number.isFinite);
      const log = values.reduce((a, b) => Math.max(a, b), 0) > WIDE * values.reduce((a, b) => Math.min(a, b), Infinity);
      chart.show(
        [
          { name: whole ? "training" : "batch", color: "var(--c0)", points: training },
          { name: "test", color: "var(--c1)", points: tests.map((test) => [test.step, test.loss]), dashed: true },
        ],
        step,
        { log },
      );
    },
  };
}
