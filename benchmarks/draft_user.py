"""What one person asks of a model, for the measurement of drafts that learn: recurring topics, never the same twice.

Every prompt is a question about a thing. Held-out prompts are other pairs of the same questions and things, so each
question has been asked of something else before, and each thing has been asked about otherwise.
"""

from __future__ import annotations

import random

#: Questions and things of each topic.
TOPICS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "garden": (
        (
            "How do I grow {} on a balcony?",
            "When should I plant {}, and how far apart?",
            "My {} have yellow leaves. What is wrong?",
            "How often do {} need water in summer?",
            "What pests attack {} and what can I do about them?",
            "Can I keep {} through the winter?",
            "What grows well next to {}?",
        ),
        ("tomatoes", "strawberries", "peppers", "cucumbers", "roses", "blueberries", "carrots", "beans"),
    ),
    "kitchen": (
        (
            "Give me a simple recipe for {}.",
            "What can I use instead of butter in {}?",
            "How do I make {} for eight people?",
            "What should I serve with {}?",
            "How long does {} keep in the fridge?",
            "Make a shopping list for {}.",
            "Why does my {} turn out too dry?",
        ),
        ("lasagna", "banana bread", "vegetable soup", "chicken curry", "apple pie", "risotto", "pancakes", "meatloaf"),
    ),
    "Python": (
        (
            "Explain {} in Python with a short example.",
            "When should I use {} in Python?",
            "What mistakes do beginners make with {} in Python?",
            "Write a small Python program that uses {}.",
            "How do I test code that uses {} in Python?",
            "Give me three exercises about {} in Python.",
        ),
        ("lists", "dictionaries", "functions", "classes", "loops", "files", "exceptions", "generators"),
    ),
    "travel": (
        (
            "Plan a weekend in {} for a family with two children.",
            "What is the best time of the year to visit {}?",
            "What should I pack for a week in {}?",
            "Which local dishes should I try in {}?",
            "How do I get around in {} without a car?",
            "What can we do in {} when it rains?",
        ),
        ("Lisbon", "Vienna", "Edinburgh", "Kyoto", "Copenhagen", "Barcelona", "Prague", "Rome"),
    ),
    "office": (
        (
            "Write a short email to my team about {}.",
            "Write a polite message to a customer about {}.",
            "Give me five bullet points for a talk about {}.",
            "How do I tell my boss about {}?",
            "Draft an agenda for a meeting about {}.",
        ),
        (
            "a late delivery",
            "the new schedule",
            "next year's budget",
            "working from home",
            "the office move",
            "a mistake in an invoice",
            "the summer party",
            "training for new colleagues",
        ),
    ),
}
FOLLOW_UPS = (
    "Can you make that shorter?",
    "Explain the second point in more detail.",
    "Give me a step by step plan for that.",
    "What would that cost?",
    "And what if I have very little time?",
    "Summarize that in three bullet points.",
)
#: Of somebody else: what is learned from the first person should help little here.
STRANGER = (
    "Write a short story about a lighthouse keeper who finds a letter.",
    "Who was Marie Curie?",
    "Explain how a jet engine works.",
    "What is the difference between a virus and a bacterium?",
    "Write a poem about winter in the city.",
    "Why is the sky blue?",
    "What caused the First World War?",
    "Explain compound interest to a child.",
    "How do vaccines work?",
    "Invent a new sport and explain its rules.",
    "What is a black hole?",
    "Describe a market on another planet.",
)


def prompts(count: int, held_out: int, seed: int = 0) -> tuple[list[str], list[str]]:
    """`count` prompts to learn from and `held_out` others, in random order, no pair twice."""
    pairs = [
        question.format(thing) for questions, things in TOPICS.values() for question in questions for thing in things
    ]
    if count + held_out > len(pairs):
        raise ValueError(f"this person has only {len(pairs)} questions")
    random.Random(seed).shuffle(pairs)
    return pairs[:count], pairs[count : count + held_out]
