"""The command line: `python -m app COMMAND`, and the console script."""

import os
import signal


def main(argv: list[str] | None = None) -> None:
    """Run the command that the arguments name, by default this process's."""
    # KeyboardInterrupt in the middle of an import can come out as a traceback, or be lost. Where
    # the shell has set the signal to be ignored, as for the background, it stays so.
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    from app.cli.process import run, run_as_process

    run_as_process(run, argv)


if __name__ == "__main__":
    main()
