"""The command line as `python -m app COMMAND`."""

from app.cli.process import main

if __name__ == "__main__":
    main()
