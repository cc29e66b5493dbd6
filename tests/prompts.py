"""Prompts for the tests and benchmarks that compare whole answers."""

from __future__ import annotations

PROMPTS = [
    "Why is the sky blue?",
    "Write a haiku about rain.",
    "What is the capital of France, and what is it known for?",
    "Explain recursion to a child.",
    "def fibonacci(n):",
    "List three healthy breakfasts.",
    "Translate 'good morning' into Spanish.",
    "Who wrote Moby-Dick?",
    "Give me a plan for learning the piano.",
    "What is 12 times 12?",
    "Summarize the plot of Romeo and Juliet in two sentences.",
    "Once upon a time, in a small village by the sea,",
    "Write an email asking for a day off.",
    "What are the primary colours?",
    "How do vaccines work?",
    "Tell me a joke about cats.",
    "Convert 100 degrees Fahrenheit to Celsius.",
    "What should I pack for a winter hike?",
    "Describe the taste of a lemon.",
    '{"name": "Alice", "age": 30, "city":',
]
