"""Prints what an offline .wandb file holds, in an environment that has wandb.

The file is a log in LevelDB's format, after a header of 7 bytes, of wandb's protobuf records.
"""

import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

_HEADER, _BLOCK, _FULL, _LAST = 7, 32768, 1, 4


def records(content: bytes) -> Iterator[Any]:
    place, body = _HEADER, b""
    while place + _HEADER <= len(content):
        left = _BLOCK - place % _BLOCK
        if left < _HEADER:
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, place)
        place += _HEADER
        body += content[place : place + length]
        place += length
        if kind in (_FULL, _LAST):
            record = Record()
            record.ParseFromString(body)
            body = b""
            yield record


def values(items: Any) -> dict[str, Any]:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


def main() -> None:
    found: dict[str, Any] = {"history": []}
    for record in records(Path(sys.argv[1]).read_bytes()):
        match record.WhichOneof("record_type"):
            case "run":
                found |= {"id": record.run.run_id, "name": record.run.display_name}
                found["config"] = values(record.run.config.update)
            case "history":
                found["history"].append(values(record.history.item))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
