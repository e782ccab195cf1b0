// Edits of values at sites, with the meaning of gf.patch: the value is scaled or replaced, and everything after it is
// computed from that.
//
// An edit is { site, head, positions, scale } or { site, head, positions, values }: values is a Float32Array of the
// whole site. head and positions may be null, for all of them; of probabilities, positions are those that attend.
import { placeOf, shapeOf } from "gradfn/gpt/model.js";

// Throw where an edit cannot be applied to T tokens.
export function checkEdit(model, edit, T) {
  const { config } = model;
  if (!model.sites.includes(edit.site)) throw new Error(`no site ${edit.site}`);
  const shape = shapeOf(config, edit.site, T);
  const n = shape.reduce((product, size) => product * size, 1);
  if (edit.values && edit.values.length !== n) {
    throw new Error(`${edit.site} has ${n} values, [${shape.join(", ")}]; got ${edit.values.length}`);
  }
  if (edit.head != null && !(edit.head < headsOf(config, edit.site))) {
    throw new Error(`${edit.site} has ${headsOf(config, edit.site)} heads; got head ${edit.head}`);
  }
}

// How many heads a site has that an edit can select; 0 where it has no such axis.
export function headsOf(config, site) {
  const { part } = placeOf(config, site);
  if (part === "keys" || part === "values") return config.n_kv_heads;
  return ["queries", "mixed", "probabilities"].includes(part) ? config.n_heads : 0;
}

// Call visit(from, to) for each range of indices of a site that an edit selects.
function ranges(config, edit, T, n, visit) {
  const heads = headsOf(config, edit.site) || 1;
  const byHead = placeOf(config, edit.site).part === "probabilities";
  const size = n / T / heads;
  const chosen = edit.positions ?? Array.from({ length: T }, (_, t) => t);
  for (const t of chosen) {
    if (!(t >= 0 && t < T)) continue;
    for (let head = edit.head ?? 0; head < (edit.head == null ? heads : edit.head + 1); head++) {
      const at = (byHead ? head * T + t : t * heads + head) * size;
      visit(at, at + size);
    }
  }
}

// The values at a site after its edits; the same array where there is none.
export function edited(config, edits, site, T, values) {
  const own = edits.filter((edit) => edit.site === site);
  if (!own.length) return values;
  const out = values.slice();
  for (const edit of own) {
    ranges(config, edit, T, out.length, (from, to) => {
      if (edit.values) out.set(edit.values.subarray(from, to), from);
      else for (let i = from; i < to; i++) out[i] *= edit.scale;
    });
  }
  return out;
}

// The gradient at the value before its edits, from that after them: scales multiply it, what is replaced gets none.
export function editsBack(config, edits, site, T, gradient) {
  const own = edits.filter((edit) => edit.site === site);
  if (!own.length) return gradient;
  const out = gradient.slice();
  for (const edit of own.reverse()) {
    const scale = edit.values ? 0 : edit.scale;
    ranges(config, edit, T, out.length, (from, to) => {
      for (let i = from; i < to; i++) out[i] *= scale;
    });
  }
  return out;
}
