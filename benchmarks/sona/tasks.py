"""What a user may want, as rules that a program can judge, and the prompts that it is asked for on.

A task's score is the feedback itself: 1 or 0. Its numbers and words were chosen from what the model does by chance
(`python benchmarks/sona_bench.py --arms base`): what it never does, sampling cannot find.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from sona.topics import FEEDBACK_TOPICS, HELD_OUT_TOPICS

#: Most tokens of an answer, here and wherever the figures say 200 feedbacks.
MAX_TOKENS = 80
_WORD = re.compile(r"[a-zA-Z0-9]+(?:['’][a-zA-Z]+)*")
_ITEM = re.compile(r"^\s*(?:[-*•]|\d+[.)])\s+\S", re.MULTILINE)
_SENTENCE_END = re.compile(r"[.!?]+[\"'”’)*]*(?=\s|$)")


@dataclass(frozen=True)
class Task:
    """A wish.

    Attributes:
        score: 1 if a text fulfils it, else 0; pure, and 0 for an empty text.
        instruction: the wish in words, for the arm that asks instead of learning.
    """

    name: str
    score: Callable[[str], int]
    instruction: str


def words(text: str) -> list[str]:
    return [word.lower() for word in _WORD.findall(text)]


def short(limit: int) -> Callable[[str], int]:
    return lambda text: int(0 < len(words(text)) <= limit)


def is_list(text: str) -> int:
    return int(len(_ITEM.findall(text)) >= 2)


def ends_with_question(text: str) -> int:
    return int(bool(words(text)) and text.rstrip(" \n\t\"'”’)*").endswith("?"))


def uses(*required: str) -> Callable[[str], int]:
    return lambda text: int(set(required) <= set(words(text)))


def one_sentence(text: str) -> int:
    """One line, one end of a sentence, and that at its end."""
    text = text.strip()
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    return int(bool(words(text)) and ends == [len(text)] and "\n" not in text)


def avoids_i(text: str) -> int:
    found = words(text.replace("’", "'"))
    return int(bool(found) and not any(word == "i" or word.startswith("i'") for word in found))


TASKS = {
    task.name: task
    for task in (
        Task("short", short(30), "Answer in at most 30 words."),
        Task("list", is_list, "Answer with a bulleted list."),
        Task("question", ends_with_question, "End your answer with a question."),
        Task("words 1", uses("you", "can"), 'Use the words "you" and "can" in your answer.'),
        Task("words 2", uses("but", "with"), 'Use the words "but" and "with" in your answer.'),
        Task("one sentence", one_sentence, "Answer in one sentence."),
        Task("no I", avoids_i, 'Never use the word "I" in your answer.'),
    )
}

#: A third of them is about the one who answers, some call for little or for a list, some invite a question.
TEMPLATES = (
    "Tell me about {}.",
    "Why do people care about {}?",
    "How would you explain {} to a child?",
    "Give me five tips about {}.",
    "Name three things about {}.",
    "Share an interesting fact about {}.",
    "Name one thing about {}.",
    "What is the best thing about {}?",
    "Explain {} in simple words.",
    "What do you think of {}?",
    "Tell me about your first experience with {}.",
    "Write a short note about {}.",
    "Chat with me about {}.",
    "Write a question about {}.",
    "Ask me a question about {}.",
    "Write one line about {}.",
)


@dataclass(frozen=True)
class Prompt:
    """A question to the model, and the stems that an answer about its topic has."""

    text: str
    topic: str
    stems: tuple[str, ...]


def prompts(kind: Literal["feedback", "held-out"], count: int, seed: int) -> list[Prompt]:
    """Different prompts in an order that `seed` gives, topics and templates as even as they can be.

    Topics of the two kinds are disjoint. Raises ValueError for more prompts than there are.
    """
    topics = FEEDBACK_TOPICS if kind == "feedback" else HELD_OUT_TOPICS
    if count > len(topics) * len(TEMPLATES):
        raise ValueError(f"{count} prompts, but there are {len(topics) * len(TEMPLATES)}")
    order = random.Random(f"{kind} {seed}")
    names, templates = list(topics), list(TEMPLATES)
    order.shuffle(names)
    order.shuffle(templates)
    found = []
    for number in range(count):
        # Every round over the topics moves on by one template, so no pair comes twice.
        turn, place = divmod(number, len(names))
        topic = names[place]
        template = templates[(place + turn) % len(templates)]
        found.append(Prompt(template.format(topic), topic, topics[topic]))
    return found


def on_topic(prompt: Prompt, text: str) -> int:
    """Whether an answer still speaks of the prompt's topic, and does not go round in circles."""
    found = words(text)
    stems = tuple(stem.lower() for stem in prompt.stems)
    return int(any(word.startswith(stems) for word in found) and not is_degenerate(found))


def is_degenerate(found: list[str]) -> bool:
    """Whether a text of these words repeats itself: one word is a third of it, or half of its triples came before."""
    if len(found) < 8:
        return False
    triples = list(zip(found, found[1:], found[2:], strict=False))
    most = max(found.count(word) for word in set(found))
    return most > len(found) / 3 or len(set(triples)) <= len(triples) / 2
