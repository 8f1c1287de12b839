"""The model card of an export."""

from html import escape
from typing import Any

_CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags: [{architecture}]
---

# {run}

{kind}, trained {beginning} with gpt-compose.

| | |
|---|---|
{table}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # where this file is
model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
prompt = tokenizer("<|endoftext|>Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_length={max_length})[0]))
```

Every training document began with `<|endoftext|>`, so a prompt should begin with it as well.
The tokenizer reads `<|endoftext|>` anywhere as that token. With `split_special_tokens=True` it is
ordinary text, as it was within the rows of training text; in text files it separated documents.

The model repeats what its training text says, including false, offensive and personal content.
"""


_KINDS = {
    "gpt2": "A GPT-2 with exact GELU",
    "qwen3": "A small Qwen3 with GPT-2's tokenizer",
}


def model_card(origin: dict[str, Any]) -> str:
    """Return the README.md of an export, made from its export.json."""
    model = origin["model"]
    architecture = model["architecture"]
    size = f" of {model['head_dim']}" if "head_dim" in model else ""
    rows = {
        "Parameters": f"{origin['parameters']:,}, stored in {origin['dtype']}; "
        f"{origin['multiplied']:,} of them are in matrix products",
        "Shape": f"{model['num_layers']} layers, width {model['embd_size']}, "
        f"{model['num_heads']} heads{size}, context of {model['context_length']:,} tokens",
        "Dataset": _describe(origin["dataset"]),
        "Training": f"{origin['tokens_seen']:,} tokens in {origin['step']:,} steps",
    }
    if "began_as" in origin:
        rows["Training"] += f", the first of them as {origin['began_as']}"
    if origin["val_loss"] is not None:
        on = f", on {origin['val_tokens']:,} tokens" if origin.get("val_tokens") else ""
        rows["Held-out loss"] = f"{origin['val_loss']:.4f} nats per token{on}"
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    kind, source = _KINDS[architecture], origin.get("initial_weights")
    if "activation" in model:
        kind = "A GPT-2"
    return _CARD.format(
        run=_escaped(origin["run"]),
        table=table,
        architecture=architecture,
        kind=kind,
        max_length=min(30, model["context_length"]),
        beginning=f"from the weights of {_escaped(source)}" if source else "from scratch",
    )


def _describe(dataset: dict[str, Any]) -> str:
    if "source" not in dataset:
        return f"fingerprint {dataset['fingerprint']}"
    source = dict(dataset["source"])
    name = source.pop("dataset", None)
    details = ", ".join(f"{key} {value}" for key, value in source.items())
    return _escaped(f"{name} ({details}), {dataset['train_tokens']:,} tokens")


def _escaped(text: str) -> str:
    """Return Markdown that shows a text, which may be anything, in one line or cell."""
    return escape(" ".join(text.split()), quote=False).replace("|", "&#124;")
