"""What a network is that runs in the page."""

from __future__ import annotations

from typing import Any, NamedTuple


class Live(NamedTuple):
    """A network that runs in the page.

    Attributes:
        kind: the folder of its assets in `gradfn/pages/assets`: `page.html` is its part of the page, `page.js` has
            `start(section, content)`, which makes it work, and `style.css` is its style.
        title: what the page's navigation calls it.
        about: what its `page.html` shows.
        content: what its `page.js` gets, as JSON.
    """

    kind: str
    title: str
    about: dict[str, Any]
    content: str
