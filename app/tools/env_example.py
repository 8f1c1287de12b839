"""Writes .env.example: every setting, commented out, with its default and what it is for."""

from app.settings import GROUPS

_HEAD = """\
# RECIPE=demo takes settings from recipes/demo.env; .env wins over it, the environment over .env,
# and a flag over everything. To change a setting: cp .env.example .env, then uncomment its line.
"""

# Variables of compose.yaml and docker/Dockerfile -> default, description.
_CONTAINERS = {
    "GPU": ("all", "which GPU of several the containers get: 0, 1, ... as in nvidia-smi; or all"),
    "DATA_VOLUME": ("data", "the volume that is /data in the containers; or a folder: /mnt/disk"),
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
    "TORCH_INDEX": ("", "address of a package index with other builds of torch"),
}


def env_example() -> str:
    """The content of .env.example."""
    lines = [_HEAD]
    for name, group in GROUPS.items():
        lines.append(f"\n# ----- {name}: {group.__doc__} -----\n")
        for variable, field in group.variables().items():
            lines.append(f"\n# {group.model_fields[field].description}\n")
            lines.append(f"#{variable}={group.default_text(field)}\n")
    lines.append("\n# ----- containers: What compose.yaml and the image are made with. -----\n")
    for variable, (default, description) in _CONTAINERS.items():
        lines.append(f"\n# {description}\n#{variable}={default}\n")
    return "".join(lines)


if __name__ == "__main__":
    print(env_example(), end="")
