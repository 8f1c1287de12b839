"""The one model that writes, for one reader at a time."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, suppress
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from app.data.tokenizer import Tokenizer
from app.errors import AppError
from app.failures import translate_error
from app.hardware.device import Device
from app.inference.text import Sampling, stream_texts, truncation_note
from app.model.gpt import GPT
from app.runs.checkpoint import (
    checkpoint_folder,
    checkpoint_steps,
    latest_checkpoint,
    val_loss_of,
)
from app.runs.checkpoint_state import STATE_FILE
from app.runs.load import load_gpt
from app.settings.types import RunName

Result = TypeVar("Result")


class Wanted(BaseModel):
    """A reader's request; its bounds are the command line's, or what a page can show."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    run: RunName
    step: int = Field(ge=0)
    prompt: str = Field("", max_length=100_000)
    max_tokens: int = Field(200, ge=1, le=4096)
    temperature: float = Field(0.8, ge=0, le=100, allow_inf_nan=False)
    top_k: int = Field(50, ge=0, le=50_257)
    seed: int = Field(0, ge=0, lt=2**32)

    def sampling(self) -> Sampling:
        """Return the sampling of one text, as `sample` would do it."""
        return Sampling(**self.model_dump(exclude={"run", "step"}), num_samples=1)


class Writer:
    """Writes with the models of a folder of runs, in a thread of its own.

    Args:
        runs: the folder of all runs.
        device: where the models are computed.

    Attributes:
        is_closing: texts under way end with their next token.
    """

    def __init__(self, runs: Path, device: Device) -> None:
        self.runs = runs
        self.device = device
        self.is_closing = False
        self._turn = asyncio.Lock()
        # torch keeps threads for each thread that it is called from.
        self._thread = ThreadPoolExecutor(1)
        self._loaded: tuple[tuple[Path, int], GPT] | None = None

    def checkpoints(self) -> list[dict[str, Any]]:
        """Runs with checkpoints, the one trained last first, and each one's steps, likewise."""
        found = []
        for folder in self.runs.glob("*/checkpoints"):
            if steps := checkpoint_steps(folder):
                # A checkpoint may be pruned, or its run deleted, while it is looked at.
                with suppress(OSError):
                    modified = checkpoint_folder(folder, steps[-1]).stat().st_mtime
                    found.append((modified, folder, steps))
        found.sort(reverse=True)
        return [
            {"run": folder.parent.name, "steps": [_described(folder, step) for step in steps[::-1]]}
            for _, folder, steps in found
        ]

    async def write(self, wanted: Wanted) -> AsyncGenerator[dict[str, Any]]:
        """Wait for one's turn, then write; closing the iterator ends it.

        Yields:
            messages: {state: waiting, loading or writing}; {note}; {text, tokens, seconds}, the
            latter two since the beginning; and in the end {state: ended, why} or {error, fix}.
        """
        if self._turn.locked():
            yield {"state": "waiting"}
        async with self._turn:
            try:
                yield {"state": "loading"}
                model = await self._in_thread(self._model, wanted)
                async with aclosing(self._write(model, wanted)) as messages:
                    async for message in messages:
                        yield message
            except (AppError, OSError, MemoryError, RuntimeError) as error:
                told = error if isinstance(error, AppError) else translate_error(error)
                if told is None:
                    raise
                yield {"error": told.problem, "fix": told.fix}

    async def _write(self, model: GPT, wanted: Wanted) -> AsyncGenerator[dict[str, Any]]:
        tokenizer = Tokenizer()
        if note := truncation_note(model, tokenizer, wanted.prompt):
            yield {"note": note}
        yield {"state": "writing"}
        texts = stream_texts(model, tokenizer, wanted.sampling())
        tokens, seconds, started = 0, 0.0, time.perf_counter()
        why = "stopped"
        try:
            while (piece := await self._in_thread(_next_piece, texts)) is not None:
                tokens, seconds = tokens + 1, time.perf_counter() - started
                yield {"text": piece, "tokens": tokens, "seconds": seconds}
                if self.is_closing:
                    break
            if self.is_closing:
                why = "closing"
            else:
                why = "max_tokens" if tokens == wanted.max_tokens else "end_of_text"
            yield {"state": "ended", "why": why}
        finally:
            # It may still be at a token, and is closed by the thread that works on it.
            self._thread.submit(texts.close)
            print(f"{wanted.run}: {tokens} tokens in {seconds:.1f} s, {why}", flush=True)

    def _model(self, wanted: Wanted) -> GPT:
        """The model that is asked for; the one before is let go."""
        run_dir = self.runs / wanted.run
        state = checkpoint_folder(run_dir / "checkpoints", wanted.step) / STATE_FILE
        # A run may be trained again under its name.
        version = state, state.stat().st_mtime_ns if state.exists() else 0
        if self._loaded is None or self._loaded[0] != version:
            # There may be no memory for both.
            self._loaded = None
            checkpoint = latest_checkpoint(run_dir, wanted.step)
            self._loaded = version, load_gpt(checkpoint, self.device)
        return self._loaded[1]

    async def _in_thread(self, function: Callable[..., Result], *arguments: object) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)


def _next_piece(texts: Iterator[list[str | None]]) -> str | None:
    """Return what the next token adds to the only text; None at its end."""
    pieces = next(texts, None)
    return pieces[0] if pieces else None


def _described(folder: Path, step: int) -> dict[str, Any]:
    """Return a checkpoint's step and held-out loss; damage is reported when it is used."""
    return {"step": step, "val_loss": val_loss_of(folder, step)}
