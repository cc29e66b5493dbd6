"""Load a model, ask it one thing. `python basic_inference.py [MODEL] [PROMPT]`"""

import sys

from ruvllm_core import Engine, GenerateParams

model = sys.argv[1] if len(sys.argv) > 1 else "smollm2"
prompt = sys.argv[2] if len(sys.argv) > 2 else "Explain in simple terms why the sky is blue."

with Engine.load(model) as engine:
    answer = engine.generate(prompt, GenerateParams(max_tokens=48, temperature=0.7, top_p=0.9, seed=1))
    print(answer.text)
    print(f"\n{answer.finish_reason} after {answer.usage.completion_tokens} tokens")
    print(f"{answer.timings.decode_tok_s:.1f} tokens a second", file=sys.stderr)
