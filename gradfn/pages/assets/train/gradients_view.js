// What reaches each layer, and what it does there: the gradient's norm, the length of the update, dead and saturated units.
import { layerColor, makeLines } from "gradfn/train/lines.js";
import { countedFor } from "gradfn/train/units.js";

const percent = (value) => `${value.toFixed(1)} %`;

export function makeGradientsView(find) {
  const charts = {
    norms: makeLines(find("norms"), { title: "Gradient norm, by layer", unit: "nats" }),
    ratios: makeLines(find("ratios"), { title: "Length of the update ÷ length of the weights" }),
    saturated: makeLines(find("units"), { title: "Saturated, % of the activations", describe: percent }),
    dead: null,
  };

  function byLayer(records, n, value) {
    return Array.from({ length: n }, (_, l) => ({
      name: `layer ${l + 1}`,
      color: layerColor(l, n),
      points: records.flatMap((record) => {
        const of = value(record);
        return of && l in of ? [[record.step, of[l]]] : [];
      }),
    }));
  }

  let titled = "saturated", units = charts.saturated;
  return {
    show({ records, step, layers, activation }) {
      charts.norms.show(byLayer(records, layers, ({ norms }) => norms), step, { log: true });
      charts.ratios.show(byLayer(records, layers, ({ ratios }) => ratios), step, { log: true });
      const counted = countedFor(activation);
      if (counted && counted !== titled) {
        const title = counted === "dead" ? "Dead, % of the units" : "Saturated, % of the activations";
        units = makeLines(find("units"), { title, describe: percent });
        titled = counted;
      }
      const shown = counted && layers > 1;
      find("units").hidden = !shown;
      find("no-units").hidden = shown;
      if (!shown) return;
      const shares = ({ units: of }) => of && of.map((share) => 100 * share);
      units.show(byLayer(records, layers, shares).slice(0, layers - 1), step, { top: 100 });
    },
  };
}
