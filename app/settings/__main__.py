"""Writes .env.example: every setting, commented out, with its default and what it is for."""

from app import containers
from app.settings.groups import GROUPS

_HEAD = """\
# RECIPE=demo takes settings from recipes/demo.env; .env wins over it, the environment over .env,
# and a flag over everything. To change a setting: cp .env.example .env, then uncomment its line.
# All of .env reaches the containers; Compose replaces $NAME there, but not in 'single quotes'.
"""


def env_example() -> str:
    """The content of .env.example."""
    lines = [_HEAD]
    for name, group in GROUPS.items():
        lines.append(f"\n# ----- {name}: {group.__doc__} -----\n")
        for variable, field in group.variables().items():
            lines.append(f"\n# {group.model_fields[field].description}\n")
            lines.append(f"#{variable}={group.default_text(field)}\n")
    lines.append("\n# ----- containers: What compose.yaml and the image are made with. -----\n")
    for variable, (default, description) in containers.VARIABLES.items():
        lines.append(f"\n# {description}\n#{variable}={default}\n")
    return "".join(lines)


if __name__ == "__main__":
    print(env_example(), end="")
