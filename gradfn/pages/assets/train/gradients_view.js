// What reaches each layer, and what it does there: the gradient's norm, the length of the update, dead and saturated
// units.
import { term } from "gradfn/core/terms.js";
import { layerColor, makeLines } from "gradfn/train/lines.js";
import { countedFor } from "gradfn/train/units.js";

const percent = (value) => `${value.toFixed(1)} %`;

export function makeGradientsView(find) {
  const norms = makeLines(find("norms"), [term("gradient norm", "Gradient norm"), " of each layer"]);
  const ratios = makeLines(find("ratios"), [term("update", "Update"), " ÷ weights, in length"]);
  const unitCharts = {
    dead: () => makeLines(find("units"), [term("dead unit", "Dead"), ", % of the units"], percent),
    saturated: () => makeLines(find("units"), [term("saturated unit", "Saturated"), ", % of the activations"], percent),
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

  let titled = null, units = null;
  return {
    show({ records, step, layers, activation }) {
      norms.show(byLayer(records, layers, (record) => record.norms), step, { log: true });
      ratios.show(byLayer(records, layers, (record) => record.ratios), step, { log: true });
      const counted = countedFor(activation);
      if (counted && counted !== titled) {
        units = unitCharts[counted]();
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
