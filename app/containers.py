"""How this process was started: in a container of the project's image, by which program."""

import os
import sys
from pathlib import Path

# Variables that compose.yaml and docker/Dockerfile read: name -> default, description.
VARIABLES = {
    "GPU": ("all", "which GPU the containers get: 0, 1, ... as in nvidia-smi; or all"),
    "DATA_VOLUME": ("data", "what is mounted at /data: the volume data, or a folder: /mnt/disk"),
    "RUN_AS": ("10001:10001", "user and group in the containers; yours are what `id` prints"),
    "HF_TOKEN_FILE": ("/dev/null", "file with a Hugging Face token, readable by the user RUN_AS"),
    "TENSORBOARD_PORT": ("6006", "port of TensorBoard, on this machine only"),
    "IMAGE": ("gpt-compose", "name of the image"),
    "BASE_IMAGE": (
        "nvidia/cuda:13.0.3-base-ubuntu24.04",
        "base image: Ubuntu or Debian; its CUDA must not be newer than the driver's",
    ),
    "TORCH": (
        "cuda",
        "torch build: cuda, cpu, or auto (cpu if pip is configured to find it); with TORCH_INDEX, "
        "any that the index has: cpu, cu126, ...",
    ),
    "TORCH_INDEX": (
        "",
        "URL of a package index with other torch builds; the image keeps it: include no password",
    ),
}

# Set for the processes that a launcher of this program starts: its process number.
LAUNCHER = "GPT_COMPOSE_LAUNCHER"
# Set for the runs of a sweep.
SWEEP = "GPT_COMPOSE_SWEEP"


def in_container() -> bool:
    """Return True in a container of the project's image, which sets a variable."""
    return bool(os.environ.get("IN_CONTAINER"))


def is_installed() -> bool:
    """Return True if this process runs the installed package, which keeps `app` to itself."""
    return "gpt_compose" in sys.modules


def program() -> str:
    """Return what the user types before a command."""
    if in_container():
        return "docker compose run --rm"
    return "gpt-compose" if is_installed() else "python -m app"


def python_command() -> list[str]:
    """Return the beginning of a command line that runs this program in another process."""
    # -P: not what has this name in the current folder.
    module = ["-P", "-m", "gpt_compose"] if is_installed() else ["-m", "app"]
    return [sys.executable, *module]


def is_first_process() -> bool:
    """Return True in the process that prints what all processes of a run or a sweep would."""
    is_child = LAUNCHER in os.environ or SWEEP in os.environ
    return not is_child and os.environ.get("LOCAL_RANK", "0") == "0"


def list_of_settings() -> str:
    """Return where the user finds every setting explained."""
    return "`gpt-compose --env-example`" if is_installed() else ".env.example"


def expects_gpu() -> bool:
    """Return True if this container was given a GPU, or NVIDIA's driver shows one."""
    is_hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    is_there = not is_hidden and any(Path("/dev").glob("nvidia[0-9]*"))
    return is_there or bool(os.environ.get("EXPECTS_GPU"))


def how_to_get_permission(path: str, *, read_only: bool) -> str:
    """Return advice on a file or folder that this process may not read or write."""
    user = os.getuid()
    if not in_container():
        elsewhere = "or set DATA_DIR to a folder on another disk"
        if read_only:
            return f"mount its disk writable, {elsewhere}"
        if user == 0:
            return f"its file system refuses even user 0: change its mount or rules, {elsewhere}"
        return f"give it to user {user}, or set DATA_DIR to a folder of that user"
    if path.startswith("/run/secrets/"):
        return f"let user {user} read the file that HF_TOKEN_FILE names"
    if read_only:
        return "use a path below /data, or mount a folder of yours: `run -v FOLDER:/PATH`"
    return (
        f"this container runs as user {user}: on the host, give that user the folder (sudo chown "
        f"-R {user}:{user} FOLDER), or run as the folder's owner (RUN_AS=UID:GID in .env)"
    )
