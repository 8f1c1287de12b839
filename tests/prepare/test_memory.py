import struct
from pathlib import Path

from app.data.shards import open_shard
from tests.prepare.conftest import Start

TOKENS = 100_000_000

DRAW = """
import sys
from pathlib import Path
import torch
from app.train.dataloader import BatchLoader
from app.data.token_stream import TokenStream
from app.data.shards import open_shard
from app.data.sequences import BatchPlan, SequenceOrder, num_sequences

def private_mib():
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if "RssAnon" in line) >> 10

before = private_mib()
stream = TokenStream([open_shard(Path(sys.argv[1]))])
order = SequenceOrder(num_sequences(len(stream), 1024), seed=0, shuffle=True)
plan = BatchPlan(sequences_per_step=512, world_size=1, micro_batch_size=32)
largest = 0
with BatchLoader(
    stream, order, plan, rank=0, sequences_consumed=0, context_length=1024,
    device=torch.device("cpu"),
) as loader:
    for _ in range(400):
        loader.next_batch()
        largest = max(largest, private_mib())
print(before, largest - before)
"""


def test_reading_batches_does_not_load_the_shard(tmp_path: Path, start: Start) -> None:
    path = tmp_path / "sparse_000000.bin"
    header = struct.pack("<3i", 20240520, 1, TOKENS)
    with path.open("wb") as file:
        file.write(header)
        file.truncate(1024 + 2 * TOKENS)
    assert open_shard(path).size == TOKENS
    output, error = start("-c", DRAW, path).communicate(timeout=300)
    before, added = map(int, output.split())
    assert before > 10, error
    assert added < 100
