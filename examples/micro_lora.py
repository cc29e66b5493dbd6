"""A MicroLoRA by itself, with hidden states of your own: `python micro_lora.py`"""

import numpy as np

from ruvllm_sona.micro import AdaptFeedback, MicroLoRA, MicroLoRAConfig

rng = np.random.default_rng(0)
lora = MicroLoRA(MicroLoRAConfig.for_hidden_dim(4096))  # h' = h + B·A·h, of rank 2
head = rng.normal(size=(100, 4096)).astype(np.float32) / 64  # an output projection of 100 tokens
hidden = rng.normal(size=4096).astype(np.float32)
TOKEN = 42


def probabilities() -> np.ndarray:
    """What the next token is drawn from, in the state `hidden`."""
    logits = head @ lora.apply(hidden)
    p = np.exp(logits - logits.max())
    return p / p.sum()


base, start = lora.version, probabilities()[TOKEN]
for quality in (0.9, 0.1, 0.9):
    before = probabilities()
    # The gradient of the token's log-probability by h'; without one, only how sure to be is learned.
    gradient = head[TOKEN] - before @ head
    lora.adapt(hidden, AdaptFeedback.from_quality(quality), gradient)
    step = lora.apply_updates(1.0)
    print(f"quality {quality}: {before[TOKEN]:.4f} -> {probabilities()[TOKEN]:.4f}, {step.version}")

print(lora.stats())
lora.rollback(base)
print("as it was:", probabilities()[TOKEN] == start)
