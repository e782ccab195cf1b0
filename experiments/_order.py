"""The experiments in the order in which to learn from them, each with its idea in a few words."""

ORDER = {
    "First steps": {
        "neuron": "one node by hand: a region, its surround, the bias for inactivity",
        "digits": "784-16-10 sigmoid nodes learn to read digits",
        "backprop": "one gradient in four ways",
        "moons": "watch a boundary form",
        "regress": "one output node, real patients",
    },
    "Training": {
        "rates": "16 learning rates, 4 seeds, one program",
        "width": "the base case against a search over width, depth and seed",
        "saturate": "depth makes gradients vanish, and three remedies",
        "grok": "modular addition: memorized first, understood much later",
        "mnist": "classic and current recipes on MNIST",
    },
    "What a network looks for": {
        "reconstruct": "what each class looks for",
        "regions": "weights outside a region set to zero",
        "saliency": "which pixels a prediction depends on, and whether to trust it",
    },
    "Gradients of many examples": {
        "noise": "how noisy the gradient is during training",
        "curvature": "how sharp the loss is along gradient descent",
        "spike": "bad batches in a training run",
        "influence": "which training digits a prediction rests on",
    },
    "Larger networks": {
        "cnn": "convolution, filters",
        "vit": "attention to patches",
        "rnn": "names by letters; gradients through time",
        "reverse": "one block writes 16 digits backwards",
        "gpt": "a GPT writes text",
        "lens": "what each layer of a GPT believes, and what its heads write",
        "induction": "two attention layers learn to repeat: which head, by six methods",
    },
}
