"""Work in a process of its own: it has no memory of ours and no warm caches, and its peak is its own."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from framefit.errors import FramefitError

__all__ = ["apart", "quiet_libraries"]


def apart(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `work` returns or raises, done in a fresh process, which ends with us.

    Raises:
        FramefitError: the process ended without a word.
    """
    spawn = multiprocessing.get_context("spawn")
    receiver, sender = spawn.Pipe(duplex=False)
    process = spawn.Process(target=_told, args=(work, sender), daemon=True)
    process.start()
    sender.close()
    try:
        outcome = receiver.recv()
    except EOFError:
        raise FramefitError(
            "the process that ran the model was killed, as the system does where memory runs out: ask for a "
            "smaller --size or fewer --frames."
        ) from None
    finally:
        process.terminate()
        process.join()
    if isinstance(outcome, BaseException):
        raise outcome
    made: dict[str, Any] = outcome
    return made


def _told(work: Callable[[], object], sender: Connection) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    outcome: object
    try:
        outcome = work()
    except BaseException as error:
        outcome = error
    sender.send(outcome)


def _end_with_parent() -> None:
    """A terminated parent must not leave a run behind that goes on computing."""
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)


def quiet_libraries() -> None:
    """Their bars and advice are about their own pipelines; errors still come through."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
