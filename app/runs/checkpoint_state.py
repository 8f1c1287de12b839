"""state.json: everything in a checkpoint except its tensors."""

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from pydantic import TypeAdapter, ValidationError

from app.errors import UserError
from app.files import read_json
from app.runs.metrics import StepRecord

STATE_VERSION = 2
STATE_FILE = "state.json"
_OWN_HASH = "sha256_of_the_rest"
# Names of fields in state.json where they differ.
_KEYS = {"sequences_consumed": "windows_consumed", "pending": "left"}


class CorruptCheckpoint(UserError):
    """A checkpoint that is incomplete or differs from what was written."""


def damage_advice(folder: Path) -> str:
    """Return what to do about a damaged checkpoint."""
    return f"delete {folder} to continue from the checkpoint before it"


def other_version(folder: Path, difference: str) -> UserError:
    """Return the error of an intact checkpoint that this version of the program cannot use."""
    return UserError(
        f"{folder} is a checkpoint of another version of this program: {difference}",
        "use that version (settings.json has its git_revision), or another TRAIN_RUN_NAME",
    )


@dataclass(frozen=True)
class PendingWork:
    """Work of the last step that a stop left to the next start; falsy if empty.

    Attributes:
        record: the step's record, which still lacks what is measured after the step
        samples: True if the record is written, and the samples are not
    """

    record: StepRecord | None = None
    samples: bool = False

    def __bool__(self) -> bool:
        return self.record is not None or self.samples

    def to_json(self) -> dict[str, Any]:
        """Return what state.json has under `left`."""
        if self.record is not None:
            return {"record": self.record.to_json()}
        return {"samples": True} if self.samples else {}


@dataclass(frozen=True, kw_only=True)
class CheckpointState:
    """The content of state.json.

    Attributes:
        step: steps completed
        micro_batch_size: sequences of one forward pass of a rank
        model: the shape of the model
        settings: all settings, without secrets
        identity: what must not change for the run to remain the same
        versions: versions of Python and packages
        sequences_consumed: training sequences so far
        val_loss: held-out loss of these weights; None if it was not measured
        val_tokens: on how many tokens; None if that is not known
        pending: what a stop left undone
        warmup_steps: steps of the learning rate's warm-up
        cooldown_start: steps before its cool-down; None if the schedule has none
        planned_steps: steps of the whole run, if a time limit decides; None if none is planned yet
        loss_scale: factor of the loss; None without loss scaling
        loss_scale_updates: updates since it changed
        origin: RUN@STEP, where the run began, if that was in another run
        initial_weights: the weights that it began with, if they were not random: a model of the hub
            at its commit, a folder, or RUN@STEP
        metrics_lines, samples_bytes: lengths of metrics.jsonl and samples.txt
        sha256: hash of each tensor file
        source: the program's code, as app.runs.code.source; empty if unknown
        code_hashes: hash of each file's code that decides the numbers; empty if unknown
    """

    step: int
    micro_batch_size: int
    model: dict[str, Any]
    settings: dict[str, Any]
    identity: dict[str, Any]
    versions: dict[str, str]
    sequences_consumed: int
    val_loss: float | None = None
    val_tokens: int | None = None
    pending: PendingWork = field(default_factory=PendingWork)
    warmup_steps: int | None = None
    cooldown_start: int | None = None
    planned_steps: int | None = None
    loss_scale: float | None = None
    loss_scale_updates: int = 0
    origin: str | None = None
    initial_weights: str | None = None
    metrics_lines: int = 0
    samples_bytes: int = 0
    sha256: dict[str, str] = field(default_factory=dict)
    source: dict[str, Any] = field(default_factory=dict)
    code_hashes: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the fields under their names in state.json."""
        content = {_KEYS.get(name, name): value for name, value in asdict(self).items()}
        return content | {"left": self.pending.to_json()}

    def write(self, folder: Path) -> None:
        """Write state.json, with its version and its own hash."""
        content = self.to_json()
        hashes = content.pop("sha256")
        content |= {"state_version": STATE_VERSION, "sha256": hashes}
        content[_OWN_HASH] = _hash_of(content)
        (folder / STATE_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read a checkpoint's state.json.

        Raises:
            CorruptCheckpoint: it is missing or damaged.
            UserError: another version of the program wrote it, or another program.
        """
        path = folder / STATE_FILE
        if not path.is_file():
            raise CorruptCheckpoint(
                f"{folder} is not a checkpoint: it has no {STATE_FILE}", damage_advice(folder)
            )
        try:
            content = read_json(path, damage_advice(folder))
        except UserError as error:
            raise CorruptCheckpoint(error.problem, error.fix) from None
        is_as_written = content.get(_OWN_HASH) == _hash_of(content)
        version = content.get("state_version")
        if version != STATE_VERSION and (is_as_written or _OWN_HASH not in content):
            if version is None:
                raise UserError(
                    f"{path} is not the state of a checkpoint: another program wrote it",
                    "take it out of the run's folder, or use another folder",
                )
            difference = f"it has state version {version}, this program reads {STATE_VERSION}"
            raise other_version(folder, difference)
        fields = content | {name: content[key] for name, key in _KEYS.items() if key in content}
        try:
            state = TypeAdapter(cls).validate_python(fields)
        except ValidationError as error:
            names = {str(fault["loc"][0]): None for fault in error.errors()}
            keys = ", ".join(_KEYS.get(name, name) for name in names)
            fault = f"missing or invalid: {keys}"
            if is_as_written:
                raise other_version(folder, f"in {STATE_FILE} {fault}") from None
            raise CorruptCheckpoint(f"{path} is damaged: {fault}", damage_advice(folder)) from None
        if not is_as_written:
            raise CorruptCheckpoint(
                f"{path} is damaged: its SHA-256 does not match", damage_advice(folder)
            )
        # The only architecture of the versions that recorded none.
        first = {"architecture": "gpt2"}
        return replace(state, model=first | state.model, identity=first | state.identity)


def _hash_of(content: dict[str, Any]) -> str:
    rest = {name: value for name, value in content.items() if name != _OWN_HASH}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
