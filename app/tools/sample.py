"""Text from a checkpoint."""

import io
import sys
import time
from pathlib import Path

from app.errors import UserError
from app.runs.checkpoint import latest_checkpoint
from app.settings.settings import Settings


def sample(settings: Settings) -> None:
    """Print what a run's model writes: the first text as it is drawn, the others after it.

    Raises:
        UserError: there is no such run, checkpoint or prompt.
    """
    chosen = settings.sample
    if chosen.prompt_file:
        chosen = chosen.model_copy(update={"prompt": read_prompt(chosen.prompt_file)})
    checkpoint = latest_checkpoint(settings.run_dir, chosen.step)

    # Torch takes seconds to import: what can be wrong without it has been told by now.
    from app.data.tokenizer import Tokenizer
    from app.hardware.device import select_device
    from app.inference.text import Sampling, stream_texts, truncation_note
    from app.runs.load import load_gpt

    device = select_device(settings.train.device, "float32", "auto")
    model = load_gpt(checkpoint, device)
    tokenizer = Tokenizer()
    if note := truncation_note(model, tokenizer, chosen.prompt):
        _note(note)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Not every terminal has all the characters that a model may write.
        sys.stdout.reconfigure(errors="replace")
    sampling = Sampling(**chosen.model_dump(exclude={"prompt_file", "step"}))
    print(f"{checkpoint.folder}:\n---\n{chosen.prompt}", end="", flush=True)
    texts = [chosen.prompt] * chosen.num_samples
    tokens, started = 0, time.perf_counter()
    try:
        for pieces in stream_texts(model, tokenizer, sampling):
            print(pieces[0] or "", end="", flush=True)
            texts = [text + (piece or "") for text, piece in zip(texts, pieces, strict=True)]
            tokens += sum(piece is not None for piece in pieces)
    finally:
        print(flush=True)
    seconds = time.perf_counter() - started
    for text in texts[1:]:
        print(f"---\n{text}", flush=True)
    _note(f"{tokens} tokens in {seconds:.1f} s: {tokens / seconds:.1f} tokens/s")


def read_prompt(file: str) -> str:
    """The prompt in a file, or on standard input for `-`, without the last line's end.

    Raises:
        UserError: there is no such file, or it is not UTF-8 text.
    """
    try:
        content = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
        text = content.decode("utf-8")
    except FileNotFoundError:
        raise UserError(f"there is no file {file}", "correct SAMPLE_PROMPT_FILE") from None
    except UnicodeDecodeError:
        name = "standard input" if file == "-" else file
        raise UserError(f"{name} is not UTF-8 text", "convert it, as with iconv -t utf-8") from None
    return text.removesuffix("\n").removesuffix("\r")


def _note(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
