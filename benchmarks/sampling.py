"""How fast a text is drawn with the cache of keys and values, beside recomputing the whole context.

    python benchmarks/sampling.py [--rounds 3] [--out FILE.json]

GPT-2 124M with random weights on the CPU, one text, temperature 0.8, top-k 50. The two take turns
and must draw the same tokens from the same seed. tokens/s counts the prompt's time, too; the
figures are medians over the rounds.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from app.data.tokenizer import Tokenizer
from app.model.gpt import GPT, GPTConfig
from tests.model.generation import generate, generate_without_cache

# Tokens of the prompt, tokens drawn.
CASES = ((16, 48), (200, 24), (800, 12))
SEED = 5


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--out", type=Path)
    chosen = arguments.parse_args()
    torch.manual_seed(0)
    model = GPT(GPTConfig()).eval()
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    prompt = torch.from_numpy(Tokenizer().encode(text).astype("int64"))
    results = {
        "date": date.today().isoformat(),
        "machine": f"{os.cpu_count()} cores, {platform.processor() or platform.machine()}",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "rounds": chosen.rounds,
        "cases": [case(model, prompt[None, :size], count, chosen.rounds) for size, count in CASES],
    }
    written = json.dumps(results, indent=2)
    print(written)
    if chosen.out:
        chosen.out.write_text(written + "\n")


def case(model: GPT, prompt: Tensor, count: int, rounds: int) -> dict[str, Any]:
    """Draw `count` tokens after the prompt, with and without the cache, in turns."""
    generate(model, prompt[:, :8], 2)
    seconds: dict[str, list[float]] = {"cached": [], "recomputed": []}
    texts = set()
    for _ in range(rounds):
        for name, draw in (("cached", generate), ("recomputed", generate_without_cache)):
            drawn, spent = timed(draw, model, prompt, count)
            seconds[name].append(spent)
            texts.add(Tokenizer().decode(drawn[0, prompt.shape[1] :].tolist()))
    medians = {name: statistics.median(spent) for name, spent in seconds.items()}
    return {
        "prompt_tokens": prompt.shape[1],
        "drawn_tokens": count,
        "cached_tokens_per_second": count / medians["cached"],
        "recomputed_tokens_per_second": count / medians["recomputed"],
        "times_as_fast": medians["recomputed"] / medians["cached"],
        "same_text": len(texts) == 1,
        "text": min(texts)[:60],
        "seconds": seconds,
    }


def timed(
    draw: Callable[..., Tensor], model: GPT, prompt: Tensor, count: int
) -> tuple[Tensor, float]:
    started = time.perf_counter()
    drawn = draw(model, prompt, count, temperature=0.8, top_k=50, seed=SEED)
    return drawn, time.perf_counter() - started


if __name__ == "__main__":
    main()
