"""Writes .env.example: every setting, commented out, with its default and its description."""

from app import containers
from app.settings.settings import GROUPS

_HEAD = """\
# RECIPE=demo takes its settings from a recipe. .env overrides the recipe, the environment overrides
# .env, and a flag overrides all. To change a setting: cp .env.example .env, and uncomment its line.
# All of .env reaches the containers. $NAME and ${NAME} are expanded, but not in 'single quotes'.
"""


def env_example() -> str:
    """Return the content of .env.example."""
    lines = [_HEAD]
    for name, group in GROUPS.items():
        lines.append(f"\n# ----- {name}: {group.__doc__} -----\n")
        for variable, field in group.variables().items():
            lines.append(f"\n# {group.description(field)}\n")
            lines.append(f"#{variable}={group.default_text(field)}\n")
    lines.append("\n# ----- containers: What compose.yaml and the image are made with. -----\n")
    for variable, (default, description) in containers.VARIABLES.items():
        lines.append(f"\n# {description}\n#{variable}={default}\n")
    return "".join(lines)


if __name__ == "__main__":
    print(env_example(), end="")
