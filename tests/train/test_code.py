"""The code of a run: real processes of a clone whose files are edited between them."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from app.runs.checkpoint import open_checkpoint
from app.tools.inspect import describe
from tests.python_process import run_python
from tests.train.code_clone import Clone
from tests.train.processes import Start, run_to_end

pytestmark = pytest.mark.processes

MLP = "app/model/gpt.py"


def new_patch(clone: Clone, step: int = 0, **variables: object) -> tuple[dict[str, object], str]:
    """Return the source and the patch of a run that starts, without torch.

    Args:
        step: where it continues from a checkpoint that does not know its code; 0: it is new.
    """
    program = (
        "import json, tempfile; from pathlib import Path\n"
        "from app.runs.checkpoint import Checkpoint\n"
        "from app.runs.checkpoint_state import CheckpointState\n"
        "from app.runs.code import read_patches, record_code, source\n"
        "from app.runs.folder import RunFolder\n"
        "unknown = dict.fromkeys(('model', 'settings', 'identity', 'versions'), {})\n"
        f"numbers = dict(step={step}, micro_batch_size=1, sequences_consumed=0)\n"
        "before = Checkpoint(Path(), CheckpointState(**numbers, **unknown))\n"
        "run = RunFolder(Path(tempfile.mkdtemp(dir='.')))\n"
        f"record_code(run, before if {step} else None)\n"
        f"print(json.dumps([source(), read_patches(run.path).get({step}, '')]))"
    )
    variables = {"PYTHONPATH": clone.folder} | variables
    ended = run_python(program, **variables)
    assert ended.returncode == 0, ended.stderr
    source, patch = json.loads(ended.stdout)
    return source, patch


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Clone:
    monkeypatch.chdir(tmp_path)
    return Clone(tmp_path / "clone")


def test_the_patch_makes_the_commit_the_code_of_the_run(clone: Clone, tmp_path: Path) -> None:
    revision = clone.git("rev-parse", "HEAD").strip()
    committed, nothing = new_patch(clone)
    assert committed["revision"] == revision
    assert (committed["differs"], nothing) == (False, "")
    assert new_patch(clone, GIT_DIR=tmp_path / "of-another-repository")[0] == committed
    clone.edit(MLP, "F.gelu,", "F.silu,")
    (clone.folder / "app/train/größe.py").write_text("RATE = 1\n")
    for secret in (".env", "app/.env", "app/recipes/mine.env"):
        (clone.folder / secret).write_text("HF_TOKEN=hf_secret\n")
    # What users set for their own eyes.
    clone.git("config", "diff.noprefix", "true")
    clone.git("config", "color.ui", "always")
    changed, patch = new_patch(clone)
    assert changed["differs"]
    assert changed["sha256"] != committed["sha256"]
    assert patch.startswith(f"Since step 0: revision {revision} with changes\n\n")
    assert "secret" not in patch

    other = tmp_path / "other"
    subprocess.run(["git", "clone", "--quiet", clone.folder, other], check=True)
    subprocess.run(["git", "-C", other, "apply", "-"], input=patch, text=True, check=True)
    for file in (MLP, "app/train/größe.py"):
        assert (other / file).read_bytes() == (clone.folder / file).read_bytes()


def test_a_run_from_before_code_was_recorded_has_a_patch_from_where_it_continues(
    clone: Clone,
) -> None:
    assert new_patch(clone, step=4)[1] == ""
    clone.edit(MLP, "F.gelu,", "F.silu,")
    revision = clone.git("rev-parse", "HEAD").strip()
    _, patch = new_patch(clone, step=4)
    assert patch.startswith(f"Since step 4: revision {revision} with changes\n\ndiff --git ")


def test_a_huge_patch_is_cut_and_says_so(clone: Clone) -> None:
    (clone.folder / "app/table.py").write_text("# a line of a table\n" * 30_000)
    _, patch = new_patch(clone)
    assert len(patch) < 400_000
    assert re.search(r"\n\.\.\. \d{3},\d{3} characters, cut here\n$", patch)


def test_without_git_there_are_hashes(clone: Clone) -> None:
    committed, _ = new_patch(clone)
    without_git = os.pathsep.join(
        it for it in os.environ["PATH"].split(os.pathsep) if not (Path(it) / "git").exists()
    )
    source, patch = new_patch(clone, PATH=without_git)
    assert source == committed | {"revision": None, "differs": None}
    assert patch == ""


def code_hashes(clone: Clone) -> dict[str, str]:
    program = "import json; from app.runs.code import code_hashes; print(json.dumps(code_hashes()))"
    hashes: dict[str, str] = json.loads(run_python(program, PYTHONPATH=clone.folder).stdout)
    return hashes


def test_code_on_the_line_of_a_docstring_counts(clone: Clone) -> None:
    draft = clone.folder / "app/train/draft.py"
    hashes = set()
    for line in ('"One."; return x', '"Two."; return x', '"Two."; return -x', "...; return x"):
        draft.write_text(f"def forward(x):\n    {line}\n")
        hashes.add(code_hashes(clone)["app/train/draft.py"])
    assert len(hashes) == 4


def test_a_hash_changes_with_what_a_file_computes_not_with_its_comments(clone: Clone) -> None:
    before = code_hashes(clone)
    clone.edit(MLP, '    """Return', '    """Now return')
    clone.edit(MLP, "\nclass ", "\n\n# Another line, with a ' in it.\nclass ")
    clone.edit(MLP, '"gelu": F.gelu,', '"gelu": F.gelu,  # the exact one')
    clone.edit("app/model/generate.py", "import torch\n", "import torch as torch\n")
    assert code_hashes(clone) == before
    clone.edit(MLP, '"gelu": F.gelu', '"gelu": F.silu')
    (clone.folder / "app/train/draft.py").write_text("def unfinished(\n")
    after = code_hashes(clone)
    assert {name for name in after if after[name] != before.get(name)} == {
        MLP,
        "app/train/draft.py",
    }


@pytest.mark.slow
def test_continuing_with_other_code_names_the_files_and_keeps_the_difference(
    clone: Clone, start: Start, data_dir: Path
) -> None:
    first = clone.git("rev-parse", "HEAD").strip()
    run = run_to_end(start, PYTHONPATH=clone.folder, TRAIN_MAX_STEPS=4).run_dir
    settings = json.loads((run / "settings.json").read_text())
    assert settings["git_revision"] == first
    assert settings["source"].keys() == {"differs", "sha256"}
    assert not list(run.glob("*.patch"))
    hashes = open_checkpoint(run / "checkpoints/step-000004").state.code_hashes
    assert {MLP, "app/train/muon.py"} <= hashes.keys()
    assert "app/tools/sample.py" not in hashes

    clone.edit(MLP, '"gelu": F.gelu,', '"gelu": lambda x: F.gelu(x),')
    clone.edit("app/train/console.py", "import time\n", "import time as time\n")
    clone.edit("app/train/loop.py", "def train_steps(", "# Another line.\ndef train_steps(")
    second = clone.commit()
    clone.edit("app/tools/sample.py", "import sys\n", "import sys  # another line\n")
    for last, times in ((8, 1), (9, 0)):
        process = start(PYTHONPATH=clone.folder, TRAIN_MAX_STEPS=last)
        code, output = process.end()
        assert code == 0, output
        line = (
            f"warning: other code than before: {MLP}, app/train/console.py; the run goes on with "
            "it, and code-000004.patch records the difference\n"
        )
        assert output.count(line) == times, output
    (patch,) = run.glob("*.patch")
    heads, _, diff = patch.read_text().partition("\n\n")
    assert heads.splitlines() == [
        f"Until step 4: revision {first}",
        f"Since step 4: revision {second} with changes",
        f"Changed: {MLP}, app/train/console.py",
    ]
    assert diff.startswith("diff --git a/app/tools/sample.py b/app/tools/sample.py\n")

    lines = list(describe(run, verify=False))
    assert "  code changes: code-000004.patch" in lines
    assert any(line.startswith(f"  code: revision {second} with changes, ") for line in lines)

    # A branch takes the code of its checkpoint for its own.
    clone.edit("app/train/muon.py", "import torch\n", "import torch as torch\n")
    branch = {"TRAIN_RUN_NAME": "branch", "TRAIN_BRANCH_FROM": "run@9", "TRAIN_MAX_STEPS": 10}
    code, output = start(PYTHONPATH=clone.folder, **branch).end()
    assert code == 0, output
    assert "other code than before: app/train/muon.py; " in output
    assert [path.name for path in data_dir.glob("runs/branch/*.patch")] == ["code-000009.patch"]

    clone.edit(MLP, "lambda x: F.gelu(x)", "lambda it: F.gelu(it)")
    program = "import sys; from app.cli.process import run; sys.exit(run(['sample']))"
    place = {"DATA_DIR": data_dir, "PYTHONPATH": clone.folder, "TRAIN_RUN_NAME": "branch"}
    ended = run_python(program, **place, SAMPLE_MAX_TOKENS=2)
    assert ended.returncode == 0, ended.stderr
    folder = data_dir / "runs/branch/checkpoints/step-000010"
    warning = f"warning: {folder} was trained with other code of the model: {MLP} differs\n"
    assert ended.stderr.startswith(warning)
