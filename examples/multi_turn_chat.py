"""A conversation: the whole history goes into every request. `python multi_turn_chat.py`"""

from ruvllm_core import Engine, GenerateParams

QUESTIONS = (
    "What is the capital of France?",
    "What language is spoken there?",
    "How do you say hello in that language?",
)

with Engine.load("smollm2") as engine:
    messages = [{"role": "system", "content": "You are a friendly assistant. Answer in one short sentence."}]
    for question in QUESTIONS:
        messages.append({"role": "user", "content": question})
        answer = engine.generate(messages, GenerateParams(max_tokens=24, temperature=0))
        messages.append({"role": "assistant", "content": answer.text})
        print(f"you:   {question}\nmodel: {answer.text}\n")
