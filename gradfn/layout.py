"""What the files in a run's folder are called. This imports nothing, so a page of a run is made without jax."""

RUNS = "runs"  # the folder of all runs: runs/<experiment>/<time>
CONFIG, VERSIONS, RESULT, ENDED = "config.json", "versions.json", "result.json", "ended.json"
METRICS, INSPECTIONS, NOISE = "metrics.jsonl", "inspections.jsonl", "noise.jsonl"
SPIKES = "spikes.jsonl"
LOGGED = "logged.json"  # which later rows were logged before the run was interrupted
LOGS = (METRICS, INSPECTIONS, NOISE, SPIKES)  # of rows, each a line of JSON
MODEL = "model.json"  # what the network was made with
CHECKPOINT = "checkpoint.safetensors"
CHECKPOINTS = "checkpoint"  # the folder of the checkpoints of a state that is split over devices
KEPT = "kept"  # the folder of the parameters that stay
DIGITS = 10  # of the step in their files' names
EVENTS = "events"  # TensorBoard's folder
PROFILE = "profile"  # the folder of traces, which TensorBoard finds too

# In a row: the list of numbers that are not finite, which JSON does not have; and what else is not a metric.
NOT_FINITE = "not_finite"
# About the step that a row ends with.
MEASURES = ("grad_norm", "update_norm", "learning_rate", "mfu")
NOT_METRICS = ("step", "epoch", *MEASURES, "examples_per_second", "tokens_per_second", "seconds", NOT_FINITE)
