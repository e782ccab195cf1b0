// The parameters at earlier steps of training.

// Returns [{ step, loss }], the last of them the trained model; the arrays of the others stay encoded until paramsAt needs
// them.
export function checkpointsOf(content) {
  return content.checkpoints;
}

// The parameters of checkpoint i; the last is the trained model.
export function paramsAt(model, i) {
  return model.params;
}
