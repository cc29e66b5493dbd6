"""Faster answers that repeat their source, with the same words as without. `python speculative_decoding.py`"""

from ruvllm_core import Engine, GenerateParams, ModelConfig

NOTE = (
    "The library opens at nine in the morning and closes at six in the evening, on Saturdays at one in the afternoon."
)
PROMPT = f"{NOTE}\n\nRepeat the text above word for word, three times."
GREEDY = GenerateParams(max_tokens=96, temperature=0)

answers = {}
for kind in ("off", "ngram"):
    with Engine.load("smollm2", config=ModelConfig(speculative=kind)) as engine:
        answers[kind] = answer = engine.generate(PROMPT, GREEDY)
    print(f"{kind}: {answer.timings.decode_tok_s:.0f} tokens/s, {answer.speculation}")

print("same answer:", answers["off"].text == answers["ngram"].text)
print(answers["ngram"].text)
