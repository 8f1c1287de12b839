"""Differences of running in a container of this project's compose.yaml."""

import os
import sys
from pathlib import Path

# Variables of compose.yaml and docker/Dockerfile that are no settings -> default, description.
VARIABLES = {
    "GPU": ("all", "which GPU of several the containers get: 0, 1, ... as in nvidia-smi; or all"),
    "DATA_VOLUME": ("data", "what /data is: the volume data; or a folder: /mnt/disk or ./disk"),
    "RUN_AS": (
        "10001:10001",
        "user and group in the containers; to work in a folder of yours, what `id` says: 1000:1000",
    ),
    "HF_TOKEN_FILE": (
        "/dev/null",
        "file with the token of the Hugging Face hub; the user in the container must read it",
    ),
    "TENSORBOARD_PORT": ("6006", "port of TensorBoard, on this machine only"),
    "IMAGE": ("gpt-compose", "name of the image"),
    "BASE_IMAGE": (
        "nvidia/cuda:13.0.3-base-ubuntu24.04",
        "image to build on: Ubuntu or Debian; for CUDA, with a driver at least as new",
    ),
    "TORCH": (
        "cuda",
        "build of torch: cuda; cpu; auto: cpu where pip is set up to find it; with TORCH_INDEX "
        "any that it has: cpu, cu126, ...",
    ),
    "TORCH_INDEX": (
        "",
        "address of a package index with other builds of torch; the image keeps it, so without "
        "a password",
    ),
}


def in_container() -> bool:
    """Return True in the project's image, which sets a variable."""
    return bool(os.environ.get("IN_CONTAINER"))


def started_by_script() -> bool:
    """Return True if the console script of the installed package has started this process."""
    return Path(sys.argv[0]).name == "gpt-compose"


def program() -> str:
    """Return what the user types before a command."""
    if in_container():
        return "docker compose run --rm"
    return "gpt-compose" if started_by_script() else "python -m app"


def expects_gpu() -> bool:
    """Return True if this container was given a GPU."""
    return bool(os.environ.get("EXPECTS_GPU"))


def how_to_get_permission(place: str, *, read_only: bool) -> str:
    """Return the advice for a file or folder that this process may not use."""
    user = os.getuid()
    if not in_container():
        return f"give it to user {user}, or set DATA_DIR to a folder of that user"
    if place.startswith("/run/secrets/"):
        return f"let user {user} read the file that HF_TOKEN_FILE names"
    if read_only:
        return "name a place below /data, or mount a folder of yours there: `run -v FOLDER:/PLACE`"
    return (
        f"this container works as user {user}: on the machine outside, give that user the "
        f"folder (sudo chown -R {user}:{user} FOLDER), or work as the folder's owner "
        "(RUN_AS=UID:GID in .env)"
    )
