"""Numbers as people read them."""

from itertools import pairwise


def format_count(value: float) -> str:
    """A number with three significant digits and k, M, B or T: 124439808 is 124M."""
    value = float(f"{value:.3g}")
    for scale, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= scale:
            return f"{value / scale:.3g}{unit}"
    return f"{value:.3g}"


def format_duration(seconds: float) -> str:
    """Seconds in the two largest units that matter: 159.5 is 2 min 40 s, 6.31 is 6.3 s."""
    whole, units = round(seconds), (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))
    for (unit, size), (part, part_size) in pairwise(units):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // part_size} {part}"
    return f"{seconds:.2g} s"


def format_bytes(value: float) -> str:
    """Bytes in GiB: 44023414784 is 41.0 GiB."""
    return f"{value / 2**30:.1f} GiB"
