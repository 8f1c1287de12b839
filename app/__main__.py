"""The command line: `python -m app COMMAND`, and the console script."""

import os
import signal


def main(argv: list[str] | None = None) -> None:
    """Run the command that the arguments name, by default this process's."""
    # A KeyboardInterrupt during an import may end in a traceback, or be lost. A signal that the
    # shell ignores, as it does for background jobs, stays ignored.
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    from app.cli.process import run, run_as_process

    run_as_process(run, argv)


if __name__ == "__main__":
    main()
