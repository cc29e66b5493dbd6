"""`Example`: one answer, and what somebody thought of it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Example:
    """One answer as learning sees it; all that has to be kept in order to learn from it again.

    Attributes:
        prompt_ids, output_ids: tokens; the answer's end token is one of them if it was drawn.
        quality: the user's verdict in ``[0, 1]``.
        temperature: it was drawn at; 0 is greedy, and so is what nobody drew (a foreign answer).
        sequence: number of its feedback in the log of its user, from 1.
        adapter_version: of the adapter it was drawn with; empty is the base model.
        time: of the feedback, seconds since 1970.
    """

    request_id: str
    prompt_ids: tuple[int, ...]
    output_ids: tuple[int, ...]
    quality: float
    temperature: float = 1.0
    sequence: int = 0
    adapter_version: str = ""
    time: float = 0.0
