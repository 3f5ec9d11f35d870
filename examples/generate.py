"""Load a model and let it talk: `python examples/generate.py [MODEL] [ADAPTER]`."""

import sys

import arriero

name = sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m-instruct"
adapter = sys.argv[2] if len(sys.argv) > 2 else None
model = arriero.load(name, adapter=adapter, device="cpu")

print(model.chat("What is the capital of Peru?", max_new_tokens=24))

# Several prompts at once; greedy unless an option asks for random draws.
for answer in model.generate(["The sky is", "A mule is"], max_new_tokens=12, temperature=0.7, seed=1):
    print(f"{answer.text!r} ({answer.finish_reason}, {len(answer.token_ids)} tokens)")

# A conversation, as its text comes.
turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Name three colours."}]
for piece in model.stream(turns, max_new_tokens=24):
    print(piece, end="", flush=True)
print()

# What the model thinks of a text, and of the likeliest next tokens.
print(f"perplexity: {model.perplexity('The quick brown fox jumps over the lazy dog.'):.1f}")
params = arriero.SamplingParams(max_new_tokens=1, logprobs=3)
for token, logprob in model.generate("The capital of Peru is", params).logprobs[0].top:
    print(f"{logprob:7.2f} {model.tokenizer.decode([token])!r}")
