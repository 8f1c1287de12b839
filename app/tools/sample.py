"""Generation of text on the console."""

import io
import sys
import time
from pathlib import Path

from app.errors import UserError
from app.runs.checkpoint import latest_checkpoint
from app.settings.settings import Settings


def sample(settings: Settings) -> None:
    """Print texts of a run's model: the first as it is generated, the others after it.

    Raises:
        UserError: there is no such run, checkpoint or prompt.
    """
    cfg = settings.sample
    prompt = read_prompt(cfg.prompt_file) if cfg.prompt_file else cfg.prompt
    checkpoint = latest_checkpoint(settings.run_dir, cfg.step)

    # Imported after these checks, because torch takes seconds.
    from app.data.tokenizer import Tokenizer
    from app.hardware.device import select_device
    from app.inference.text import Sampling, stream_texts, truncation_note
    from app.runs.load import load_gpt

    device = select_device(settings.train.device, "float32", "auto")
    model = load_gpt(checkpoint, device)
    tokenizer = Tokenizer()
    if note := truncation_note(model, tokenizer, prompt):
        _print_to_stderr(note)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A terminal's encoding may lack characters that the model generates.
        sys.stdout.reconfigure(errors="replace")
    sampling = Sampling(prompt, **cfg.model_dump(exclude={"prompt", "prompt_file", "step"}))
    print(f"{checkpoint.folder}:\n---\n{prompt}", end="", flush=True)
    texts = [prompt] * cfg.num_samples
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
    _print_to_stderr(f"{tokens} tokens in {seconds:.1f} s: {tokens / seconds:.1f} tokens/s")


def read_prompt(file: str) -> str:
    """Return the content of a file (`-`: standard input), without a final line break.

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
        raise UserError(
            f"{name} is not UTF-8 text", "convert it, for example with iconv -t utf-8"
        ) from None
    return text.removesuffix("\n").removesuffix("\r")


def _print_to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
