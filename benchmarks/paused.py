"""A training loop that is timed in parts: between two pauses of it."""

import threading
from collections.abc import Callable
from typing import Any


def paused(train: Callable[[Callable[[Any], None]], Any]) -> Callable[[], Any]:
    """Run a training loop in its own thread, and return the function that lets it run until its next pause.

    Args:
        train: the loop; it pauses by calling its argument with a value.

    Returns:
        A function that waits until the loop pauses, and returns the value. It raises the error of a loop that failed.
    """
    turn, done = threading.Semaphore(0), threading.Semaphore(0)
    values: list[Any] = []
    failed: list[Exception] = []

    def pause(value: Any) -> None:
        values[:] = [value]
        done.release()
        turn.acquire()

    def run() -> None:
        turn.acquire()
        try:
            train(pause)
        except Exception as error:
            failed.append(error)
            done.release()

    def proceed() -> Any:
        turn.release()
        done.acquire()
        if failed:
            raise failed[0]
        return values[0]

    threading.Thread(target=run, daemon=True).start()
    return proceed
