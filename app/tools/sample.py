"""Generation of text on the console."""

import codecs
import io
import sys
import time
from pathlib import Path

from app.errors import UserError
from app.files import filename_in_errors
from app.formats import format_bytes
from app.runs.checkpoints import latest_checkpoint
from app.settings.settings import Settings
from app.tools.latest_run import with_latest_run

# Tens of times the longest context; a larger file is a mistake, or never ends.
_MAX_PROMPT_BYTES = 16_000_000
# UTF-32's mark begins with that of UTF-16, so it is looked for first.
_MARKS = {
    "utf-32": (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE),
    "utf-16": (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE),
}


def sample(settings: Settings) -> None:
    """Print texts of a run's model: the first as it is generated, the others after it.

    Raises:
        UserError: there is no such run, checkpoint or prompt.
    """
    cfg, settings = settings.sample, with_latest_run(settings)
    prompt = read_prompt(cfg.prompt_file) if cfg.prompt_file else cfg.prompt
    checkpoint = latest_checkpoint(settings.run_dir, cfg.step, use_best=settings.train.use_best)

    # Imported after these checks, because torch takes seconds.
    from app.data.tokenizer import Tokenizer
    from app.hardware.device import select_device
    from app.inference.text import Sampling, extended, stream_texts, truncation_note
    from app.runs.load import load_model

    device = select_device(settings.train.device, "float32", "auto")
    model = load_model(checkpoint, device)
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
            print(pieces[0].text if pieces[0] else "", end="", flush=True)
            texts = extended(texts, pieces)
            tokens += sum(piece is not None for piece in pieces)
    finally:
        print(flush=True)
    seconds = time.perf_counter() - started
    for text in texts[1:]:
        print(f"---\n{text}", flush=True)
    _print_to_stderr(f"{tokens} tokens in {seconds:.1f} s: {tokens / seconds:.1f} tokens/s")


def read_prompt(file: str) -> str:
    """Return the text of a file (`-`: standard input), without byte order mark and last line break.

    Raises:
        UserError: there is no such file, or it is not text in UTF-8, or in UTF-16 or UTF-32 with
            its mark.
    """
    name, fix = ("standard input" if file == "-" else file), "correct SAMPLE_PROMPT_FILE"
    path = Path(file)
    try:
        if file != "-" and path.is_fifo():
            _print_to_stderr(f"reading the prompt from the pipe {file}")
        with filename_in_errors(path), sys.stdin.buffer if file == "-" else path.open("rb") as it:
            content = it.read(_MAX_PROMPT_BYTES + 1)
    except FileNotFoundError:
        raise UserError(f"there is no file {file}", fix) from None
    except IsADirectoryError:
        raise UserError(f"{file} is a folder, not a file with a prompt", fix) from None
    except OSError as error:
        if file != "-":
            raise
        raise UserError(f"{name} cannot be read: {error.strerror}", "set SAMPLE_PROMPT") from None
    if len(content) > _MAX_PROMPT_BYTES:
        raise UserError(
            f"{name} is larger than {format_bytes(_MAX_PROMPT_BYTES)}, too large for a prompt",
            "keep its end: the model sees only its last tokens",
        )
    encodings = (name for name, marks in _MARKS.items() if content.startswith(marks))
    try:
        text = content.decode(next(encodings, "utf-8-sig"))
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise UserError(
            f"{name} is not text in UTF-8, nor in UTF-16 with its mark",
            "convert it, for example with `iconv -f LATIN1 -t UTF-8`",
        )
    if not text:
        _print_to_stderr(f"{name} is empty: the texts begin a new document")
    return text.removesuffix("\n").removesuffix("\r")


def _print_to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
