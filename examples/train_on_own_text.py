"""Train a small GPT on your own text, and let it write: train_on_own_text.py TEXT

TEXT is a file, a folder or a pattern in quotes. The sizes follow from the length of the text.
"""

import sys

from gpt_compose import load, prepare, train

if len(sys.argv) < 2:
    sys.exit(__doc__)
dataset = prepare(sys.argv[1], recipe="own-text")
run = train(recipe="own-text", dataset_dir=dataset)

print(f"\n{run.folder}: held-out loss {run.val_loss and round(run.val_loss, 4)}")
for text in load(run.folder).generate(num_samples=2, max_tokens=60):
    print("---", text, sep="\n")
