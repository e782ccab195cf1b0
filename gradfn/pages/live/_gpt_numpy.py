"""A GPT's forward pass in numpy: what a page's rounded parameters cost, without jax."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from gradfn.runs.language_net import Architecture, LanguageNet

Params = Mapping[str, np.ndarray]
SAMPLES, TEMPERATURE = 3, 0.8  # texts that a network writes itself where it has no others
MAX_SAMPLE = 128  # tokens of a text


def mean_loss(
    architecture: Architecture, params: Params, texts: Sequence[np.ndarray], quiet: object = None
) -> float:
    """Return the loss of the next tokens in some texts, averaged over them, in nats per token.

    Args:
        architecture: of the network.
        params: by path.
        texts: tokens `[T]` of each.
        quiet: see `LanguageNet`.
    """
    if not texts:
        return math.nan
    # Texts of one length are one batch. What is after the end of a text does not matter before it.
    length = max(map(len, texts))
    tokens = np.stack([np.pad(text, (0, length - len(text))) for text in texts])
    wanted = np.stack(
        [np.pad(targets(text, quiet), (0, length - len(text)), constant_values=-1) for text in texts]
    )
    # Parameters that training has driven too far may overflow; the loss is then not finite.
    with np.errstate(all="ignore"):
        z = logits(architecture, params, tokens)[wanted >= 0]  # [positions, vocab]
        if not len(z):
            return math.nan
        top = z.max(-1)
        total = top + np.log(np.exp(z - top[:, None]).sum(-1))
        return float((total - z[np.arange(len(z)), wanted[wanted >= 0]]).mean())


def targets(tokens: np.ndarray, quiet: object = None) -> np.ndarray:
    """Return the next token of each position; -1 where there is none, or where it was not trained to predict."""
    found = np.append(tokens[1:], -1).astype(np.int32)
    if isinstance(quiet, dict) and quiet.get("repeats"):
        repeated = (p for p in range(1, len(tokens)) if np.array_equal(tokens[p:], tokens[:-p]))
        found[: next(repeated, len(tokens))] = -1
    elif isinstance(quiet, dict) and "until" in quiet:
        at = np.flatnonzero(tokens == quiet["until"])
        found[: at[0] if len(at) else len(tokens)] = -1
    return found


def logits(of: Architecture, params: Params, tokens: np.ndarray) -> np.ndarray:
    """Return the logits of each next token, `[..., T, vocab]`, of texts of one length, `[..., T]`."""
    x = params["embed/W"][tokens]
    positions = np.arange(tokens.shape[-1])
    if of.positions == "learned":
        x = x + params["positions/W"][positions]
    elif of.positions == "sinusoidal":
        angles = positions[:, None] * _frequencies(of.width, 10_000.0)
        x = x + np.stack([np.sin(angles), np.cos(angles)], -1).reshape(x.shape[-2:]).astype(x.dtype)
    for i in range(of.n_layers):
        x = _block(of, params, f"blocks/{i}", x)
    x = _norm(of, params, "final_norm", x)
    return _dense(params, "embed" if of.tied else "head", x)


def samples(net: LanguageNet, params: Params, n: int) -> list[np.ndarray]:
    """Return texts of `n` tokens that a network writes itself, for one without others to show."""
    random, found = np.random.default_rng(0), []
    for _ in range(SAMPLES):
        tokens = [int(random.integers(net.architecture.vocab))]
        while len(tokens) < min(n, net.architecture.context):
            with np.errstate(all="ignore"):
                z = logits(net.architecture, params, np.array(tokens))[-1] / TEMPERATURE
                probabilities = _softmax(z.astype(np.float64))
            known = np.isfinite(probabilities).all()
            tokens.append(int(random.choice(len(z), p=probabilities if known else None)))
        found.append(np.array(tokens))
    return found


def encode(net: LanguageNet, text: str) -> np.ndarray:
    """Return the tokens of a text that the network has: at most `MAX_SAMPLE`, and as many as its context holds."""
    if net.tokenizer is None:
        words = [int(word) for word in text.split() if word.isdecimal() and len(word) < 10]
        tokens = [word for word in words if word < net.architecture.vocab]
    elif net.tokenizer["name"] == "bytes":
        tokens = list(text.encode("utf-8", "replace"))
    else:
        known = {symbol: token for token, symbol in enumerate(net.tokenizer.get("symbols", ""))}
        text = "\n" + text.removeprefix("\n") if net.lines and "\n" in known else text
        tokens = [known[letter] for letter in text if letter in known]
    return np.array(tokens[: min(net.architecture.context, MAX_SAMPLE)], np.int32)


def decode(net: LanguageNet, tokens: Sequence[int] | np.ndarray) -> str:
    """Return the text of tokens; of a network without texts, their integers."""
    if net.tokenizer is None:
        return " ".join(str(int(token)) for token in tokens)
    if net.tokenizer["name"] == "bytes":
        return bytes(int(token) for token in tokens).decode("utf-8", "replace")
    return "".join(net.tokenizer.get("symbols", "")[int(token)] for token in tokens)


def _block(of: Architecture, params: Params, path: str, x: np.ndarray) -> np.ndarray:
    normed = _norm(of, params, f"{path}/attention_norm", x)
    heads = {"query": of.n_heads, "key": of.n_kv_heads, "value": of.n_kv_heads}
    # [..., T, heads * size] -> [..., heads, T, size]
    query, key, value = (
        _dense(params, f"{path}/attention/{name}", normed)
        .reshape(*x.shape[:-1], n, of.head_size)
        .swapaxes(-3, -2)
        for name, n in heads.items()
    )
    if of.positions == "rope":
        query, key = (_rotated(array, of.rope_base) for array in (query, key))
    key, value = (array.repeat(of.n_heads // of.n_kv_heads, -3) for array in (key, value))
    scores = query @ key.swapaxes(-1, -2) * of.head_size**-0.5
    scores = np.where(np.tri(x.shape[-2], dtype=bool), scores, -np.inf)
    mixed = (_softmax(scores) @ value).swapaxes(-3, -2).reshape(*x.shape[:-1], -1)
    x = x + _dense(params, f"{path}/attention/out", mixed)
    if not of.feed:
        return x
    normed = _norm(of, params, f"{path}/feed_norm", x)
    z = _dense(params, f"{path}/feed/up", normed)
    if of.feed == "swiglu":
        hidden = FUNCTIONS["silu"](_dense(params, f"{path}/feed/gate", normed)) * z
    else:
        hidden = FUNCTIONS[of.feed](z)
    return x + _dense(params, f"{path}/feed/down", hidden)


def _dense(params: Params, path: str, x: np.ndarray) -> np.ndarray:
    # One product of two matrices, whatever the number of texts.
    z = (x.reshape(-1, x.shape[-1]) @ params[f"{path}/W"].T).reshape(*x.shape[:-1], -1)
    return z + params[f"{path}/b"] if f"{path}/b" in params else z


def _norm(of: Architecture, params: Params, path: str, x: np.ndarray) -> np.ndarray:
    centered = x - x.mean(-1, keepdims=True) if of.norm == "layer" else x
    y = centered / np.sqrt(np.square(centered).mean(-1, keepdims=True) + of.norm_epsilon)
    y = y * params[f"{path}/gain"]
    return y + params[f"{path}/b"] if f"{path}/b" in params else y


def _rotated(x: np.ndarray, base: float) -> np.ndarray:
    angles = np.arange(x.shape[-2])[:, None] * _frequencies(x.shape[-1], base)  # [T, size / 2]
    cos, sin = np.cos(angles).astype(x.dtype), np.sin(angles).astype(x.dtype)
    first, second = np.split(x, 2, -1)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


def _frequencies(width: int, base: float) -> np.ndarray:
    return np.exp(np.arange(0, width, 2) * (-math.log(base) / width))  # [width / 2]


def _softmax(z: np.ndarray) -> np.ndarray:
    powers = np.exp(z - z.max(-1, keepdims=True))
    return np.asarray(powers / powers.sum(-1, keepdims=True))


def _sigmoid(z: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(0.5 * z))


def _gelu(z: np.ndarray) -> np.ndarray:
    return 0.5 * z * (1 + np.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z * z * z)))


def _elu(z: np.ndarray) -> np.ndarray:
    return np.where(z > 0, z, np.expm1(np.minimum(z, 0)))


FUNCTIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "sigmoid": _sigmoid,
    "tanh": np.tanh,
    "relu": lambda z: np.maximum(z, 0),
    "leaky_relu": lambda z: np.where(z >= 0, z, 0.01 * z),
    "elu": _elu,
    "selu": lambda z: 1.0507009873554805 * np.where(z > 0, z, 1.6732632423543772 * _elu(z)),
    "gelu": _gelu,
    "gelu_exact": lambda z: 0.5 * z * (1 + np.vectorize(math.erf, otypes=[float])(z * 0.5**0.5)),
    "silu": lambda z: z * _sigmoid(z),
    "softplus": lambda z: np.logaddexp(z, 0),
    "softmax": _softmax,
    "identity": lambda z: z,
}
