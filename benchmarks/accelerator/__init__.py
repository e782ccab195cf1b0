"""The correctness and the speed of gradfn on an accelerator.

    python -m benchmarks.accelerator                     # all sections that end within eight minutes
    python -m benchmarks.accelerator --only gpt pytorch
    python -m benchmarks.accelerator --reduced           # small shapes, to try the script itself on a CPU

The sections run in this order, each in its own process, so that each has the whole device memory and a crash or a
timeout affects one section only. Every row is printed and written to the JSON file as soon as it is measured.

- `gpt`: a training step of GPT-2 124M in bfloat16, 1,024 tokens per sequence, AdamW: `gf.train_step`, raw JAX, raw JAX
  with cuDNN's fused attention, and Flax NNX.
- `pytorch`: the same step in PyTorch, `torch.compile` and `scaled_dot_product_attention`.
- `overhead`: `gf.inspect` with five statistics of all values but attention's probabilities, `gf.nan_guard` and
  per-example norms, each relative to `jax.value_and_grad` of the same loss.
- `correctness`: values, gradients, statistics, per-example norms, the origin of a NaN, attention and a resumed run
  on the default device, compared with the CPU: see `checks.py`. `pytest -m accelerator` runs the same checks.
- `fit`: the same step taken by `gf.fit`, in one row with all that `fit` does beside the steps.
- `attention`: the value and gradient of attention alone by the sequence's length: as gradfn computes it on this device
  (on a GPU by cuDNN), in blocks of queries, and plain.
- `small`: steps of the MLP 784-256-256-10 and of a character GPT (4 layers, 128 wide, 64 tokens), and an epoch of
  784-16-10 at batch 32.
- `largest`: the step of `gpt` with the largest batch that fits in memory.
- `beyond`: `gf.inspect` with attention's probabilities, which the device's kernel never writes to memory, and a
  Hessian-vector product, relative to the gradient.

MFU is the fraction of the device's peak bfloat16 rate that 6 N + 12 L T d floating-point operations per token take,
with N parameters, L layers, T tokens per sequence and width d (Chowdhery et al., *PaLM*, 2022, appendix B).

Peak memory is what the device counted while a contender was made and took its first step, where it counts and the peak
rose; otherwise what XLA plans for the compiled program with its arguments and results.
"""
