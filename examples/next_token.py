"""Print what a trained model would write next, with its odds: next_token.py PROMPT [RUN]"""

import sys

import torch

from gpt_compose import load

if len(sys.argv) < 2:
    sys.exit(__doc__)
prompt = sys.argv[1]
trained = load(sys.argv[2] if len(sys.argv) > 2 else None)

tokens = trained.tokens(prompt)[:, -trained.model.config.context_length :]
with torch.no_grad():
    logits = trained.model(tokens)[0, -1]
odds, likeliest = logits.softmax(dim=-1).topk(5)
for share, token in zip(odds.tolist(), likeliest.tolist(), strict=True):
    print(f"{share:7.2%}  {trained.tokenizer.decode([token])!r}")

print(f"loss of the prompt: {trained.loss(prompt):.3f} nats per token")
print(trained.generate(prompt, max_tokens=40, temperature=0)[0])
