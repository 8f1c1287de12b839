"""The command, for where scripts are not on PATH: `python -m gpt_compose COMMAND`."""

from gpt_compose import main

main()
