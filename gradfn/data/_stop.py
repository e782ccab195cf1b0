"""Stop strings: a text that is generated ends before them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator


def stop_at(texts: Iterable[str], stop: str | Iterable[str]) -> Iterator[str]:
    """Yield a text that arrives in parts, up to the first stop string in it.

    What may be the start of a stop string is held back until it is known whether it is. The stop string that ends
    first counts; of several that end at the same character, the longest. No part is read after that one.

    Args:
        texts: the parts, such as `tokenizer.stream(gf.stream(net, params, prompt, n))`.
        stop: a stop string, or several. The text ends before it.

    Raises:
        ValueError: an empty stop string.

    >>> import gradfn as gf
    >>> list(gf.data.stop_at(["one t", "wo\\nUs", "ers\\nUse", "r: three"], ["\\nUser:"]))
    ['one t', 'wo', '\\nUsers']
    """
    stops = [stop] if isinstance(stop, str) else list(stop)
    if "" in stops:
        raise ValueError("stop_at: a stop string must have at least one character, got an empty one")
    return _stopped(texts, stops)


def _stopped(texts: Iterable[str], stops: list[str]) -> Iterator[str]:
    held = ""
    for text in texts:
        held += text
        found = [(at + len(stop), at) for stop in stops if (at := held.find(stop)) >= 0]
        if found:
            _, start = min(found)
            if start:
                yield held[:start]
            return
        n = max((_overlap(held, stop) for stop in stops), default=0)
        free, held = held[: len(held) - n], held[len(held) - n :]
        if free:
            yield free
    if held:
        yield held


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of a text that a stop string starts with."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
