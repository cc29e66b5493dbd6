"""Show an answer while it is written. `python streaming.py [PROMPT]`"""

import sys

from ruvllm_core import Engine, GenerateParams

prompt = sys.argv[1] if len(sys.argv) > 1 else "Write a haiku about the sea."

with Engine.load("smollm2") as engine:
    for event in engine.stream(prompt, GenerateParams(max_tokens=48, temperature=0)):
        print(event.text, end="", flush=True)
        if event.finish_reason:
            print(f"\n[{event.finish_reason}]")
