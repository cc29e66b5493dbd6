"""What learning must leave alone: other text, on which perplexity is measured, and chats about other things."""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np

from sona.subject import Subject

WINDOW = 256
FEEDBACK_LUCK = 1  # of what is drawn for feedback, whoever draws it

#: Chats of other kinds than the tasks' prompts, for the divergence from the base model.
UNRELATED = (
    "Translate 'good morning' into French.",
    "What is 17 plus 25?",
    "Write a Python function that reverses a string.",
    "My printer does not print. What shall I do?",
    "Correct the spelling: 'I recieved teh letter yesterdey.'",
    "Summarize: The meeting was moved from Monday to Thursday because two people were ill.",
    "Which is heavier, a kilogram of feathers or a kilogram of iron?",
    "Write a polite email that declines an invitation.",
    "Explain what an if statement does.",
    "Convert 30 degrees Celsius to Fahrenheit.",
    "List the days of the week backwards.",
    "What does the word 'benevolent' mean?",
    "Write an SQL query that counts the rows of a table named users.",
    "Give a synonym for 'quick'.",
    "How many legs do three chairs with four legs each have?",
    "Turn this into the past tense: 'She walks to school and meets a friend.'",
    "What is the capital of Australia?",
    "Write a regular expression that matches a date such as 2024-05-17.",
    "Name the author of Hamlet.",
    "Is 91 a prime number? Explain.",
    "Write a haiku that does not rhyme.",
    "What time is it in Tokyo when it is noon in London?",
    "Write a to-do list for moving house.",
    "What is the chemical formula of water?",
)


def other_text(path: Path | None) -> str:
    """A file's text, or the language reference that comes with Python."""
    if path is not None:
        return path.read_text(encoding="utf-8")
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    return "\n\n".join(topics[name] for name in sorted(topics))


def windows(subject: Subject, text: str, count: int, size: int = WINDOW) -> list[tuple[int, ...]]:
    """`count` runs of `size` tokens, spread evenly. Raises ValueError if the text is too short."""
    step, enough = max(1, len(text) // count), size * 16  # characters, which are more than tokens
    pieces = [text[n * step : n * step + enough] for n in range(count)]
    found = [tuple(subject.tokenizer.encode(piece, add_special=False)[:size]) for piece in pieces]
    if min(map(len, found)) < size:
        raise ValueError(f"the text is too short for {count} windows of {size} tokens")
    if subject.tokenizer.bos_id is not None:
        found = [(subject.tokenizer.bos_id, *ids[1:]) for ids in found]
    return found


def uniforms(rows: int, tokens: int, *key: int) -> np.ndarray:
    """Numbers in [0, 1), float64 ``[rows, tokens]``, the same for the same key."""
    return np.random.default_rng(key).random((rows, tokens))
