"""What the files in a run's folder are called. This imports nothing, so a page of a run is made without jax."""

METRICS, INSPECTIONS, NOISE = "metrics.jsonl", "inspections.jsonl", "noise.jsonl"
LOGS = (METRICS, INSPECTIONS, NOISE)  # of rows, each a line of JSON
CHECKPOINT = "checkpoint.safetensors"
CHECKPOINTS = "checkpoint"  # the folder of the checkpoints of a state that is split over devices
KEPT = "kept"  # the folder of the parameters that stay
DIGITS = 10  # of the step in their files' names
EVENTS = "events"  # TensorBoard's folder

# In a row: the list of numbers that are not finite, which JSON does not have; and what else is not a metric.
NOT_FINITE = "not_finite"
NOT_METRICS = ("step", "epoch", "examples_per_second", "tokens_per_second", "seconds", NOT_FINITE)
