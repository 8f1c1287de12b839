"""File systems that lack something, for the processes that get these variables."""

from pathlib import Path

from tests.compiled_c import preloaded


def lacking(folder: Path, **calls: int | str) -> dict[str, str]:
    """Variables of a process for which some calls fail below a folder; see lacking.c.

    Args:
        calls: the call, with _ for -, and its error number, or "NUMBER*TIMES".
    """
    lacks = ",".join(f"{call.replace('_', '-')}={error}" for call, error in calls.items())
    library = preloaded(Path(__file__).with_name("lacking.c"), "-D_FILE_OFFSET_BITS=32")
    return {"LD_PRELOAD": str(library), "LACKS_IN": str(folder.resolve()), "LACKS": lacks}
