"""The one model of the playground, which generates for one page at a time."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from app.data.tokenizer import Tokenizer
from app.errors import AppError
from app.failures import translate_error
from app.hardware.device import Device
from app.inference.text import Piece, Sampling, stream_texts, truncation_note
from app.model.language_model import LanguageModel
from app.runs.checkpoint import checkpoint_folder
from app.runs.checkpoint_state import STATE_FILE
from app.runs.checkpoints import latest_checkpoint, latest_runs, val_loss_of
from app.runs.load import load_model
from app.settings.types import RunName

Result = TypeVar("Result")

# The most tokens of one text, and the most texts, that the page can show.
MAX_TOKENS, MAX_SAMPLES = 4096, 8
# Number of likeliest tokens that the page shows beside each token.
_LIKELIEST = 5


class GenerateRequest(BaseModel):
    """A page's request. Bounds are those of the command line, or what a page can show."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    run: RunName
    step: int = Field(ge=0)
    prompt: str = Field("", max_length=100_000)
    num_samples: int = Field(1, ge=1, le=MAX_SAMPLES)
    max_tokens: int = Field(200, ge=1, le=MAX_TOKENS)
    temperature: float = Field(0.8, ge=0, le=100, allow_inf_nan=False)
    top_k: int = Field(50, ge=0)
    seed: int = Field(0, ge=0, lt=2**32)


class Generator:
    """Generates text with the models of all runs, in one thread of its own.

    Args:
        runs_dir: folder of the runs.
        device: where the models are computed.

    Attributes:
        is_closing: set it to end the current text with its next token
    """

    def __init__(self, runs_dir: Path, device: Device) -> None:
        self.runs_dir = runs_dir
        self.device = device
        self.is_closing = False
        self._turn = asyncio.Lock()
        # torch keeps a thread pool for each thread that calls it.
        self._thread = ThreadPoolExecutor(1)
        self._loaded: tuple[tuple[Path, int], LanguageModel] | None = None

    def checkpoints(self) -> list[dict[str, Any]]:
        """Return the runs that have checkpoints, and the checkpoints, the latest of each first."""
        return [
            {
                "run": run.name,
                "steps": [
                    {"step": step, "val_loss": val_loss_of(run / "checkpoints", step)}
                    for step in steps[::-1]
                ],
            }
            for run, steps in latest_runs(self.runs_dir)
        ]

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[dict[str, Any]]:
        """Wait for the current text to end, then generate; closing the iterator stops it.

        Yields:
            messages: {state: waiting, loading or writing}; {note, seen}, the end of a prompt that
            is cut off; for each token {pieces, tokens, seconds}, with a piece of each text as
            _described or None, and the others since the start; and at the end {state: ended, why}
            or {error, fix}.
        """
        if self._turn.locked():
            yield {"state": "waiting"}
        async with self._turn:
            try:
                yield {"state": "loading"}
                model = await self._in_thread(self._load, request)
                async with aclosing(self._generate(model, request)) as messages:
                    async for message in messages:
                        yield message
            except (AppError, OSError, MemoryError, RuntimeError) as error:
                explained = error if isinstance(error, AppError) else translate_error(error)
                if explained is None:
                    raise
                yield {"error": explained.problem, "fix": explained.fix}

    async def _generate(
        self, model: LanguageModel, request: GenerateRequest
    ) -> AsyncGenerator[dict[str, Any]]:
        tokenizer = Tokenizer()
        if note := truncation_note(model, tokenizer, request.prompt):
            tokens = tokenizer.encode_prompt(request.prompt)[-model.config.context_length :]
            yield {"note": note, "seen": tokenizer.decode(tokens)}
        yield {"state": "writing"}
        sampling = Sampling(**request.model_dump(exclude={"run", "step"}))
        texts = stream_texts(model, tokenizer, sampling)
        steps, count, seconds, started = 0, 0, 0.0, time.perf_counter()
        why = "stopped"
        try:
            while pieces := await self._in_thread(_next_pieces, texts, tokenizer):
                steps, seconds = steps + 1, time.perf_counter() - started
                count += sum(piece is not None for piece in pieces)
                yield {"pieces": pieces, "tokens": count, "seconds": seconds}
                if self.is_closing:
                    break
            if self.is_closing:
                why = "closing"
            else:
                why = "max_tokens" if steps == request.max_tokens else "end_of_text"
            yield {"state": "ended", "why": why}
        finally:
            # The thread may still be computing a token, so it is the one that closes the stream.
            self._thread.submit(texts.close)
            print(f"{request.run}: {count} tokens in {seconds:.1f} s, {why}", flush=True)

    def _load(self, request: GenerateRequest) -> LanguageModel:
        """Return the requested model; only the latest one stays in memory."""
        run_dir = self.runs_dir / request.run
        state = checkpoint_folder(run_dir / "checkpoints", request.step) / STATE_FILE
        # Another run may have been trained under the same name.
        version = state, state.stat().st_mtime_ns if state.exists() else 0
        if self._loaded is None or self._loaded[0] != version:
            # Freed first: there may not be enough memory for two models.
            self._loaded = None
            checkpoint = latest_checkpoint(run_dir, request.step)
            self._loaded = version, load_model(checkpoint, self.device)
        return self._loaded[1]

    async def _in_thread(self, function: Callable[..., Result], *arguments: object) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)


def _next_pieces(
    texts: Iterator[list[Piece | None]], tokenizer: Tokenizer
) -> list[dict[str, Any] | None]:
    """Return what the next token adds to each text; an empty list at the end."""
    return [piece and _described(piece, tokenizer) for piece in next(texts, [])]


def _described(piece: Piece, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return a piece with the model's own odds: before temperature and top-k."""
    odds = piece.logits.softmax(-1)
    likeliest = odds.topk(_LIKELIEST).indices.tolist()
    return {
        "text": piece.text,
        "odds": [[tokenizer.decode([it]), float(odds[it])] for it in (piece.token, *likeliest)],
    }
