"""Which method a piece goes by: what the plan measured for as many fragments of its size, in its direction."""

import pytest
import torch

from memos_vllm.kernels.kv_copy import planes_of
from memos_vllm.store.copy_planner import CopyPlan, Direction, Measured
from memos_vllm.store.host_memory import RowGroup
from memos_vllm.store.link import DeviceLink
from memos_vllm.store.pipeline import Method
from tests.store.simulated_device import SimulatedDevice

BLOCKS, LAYERS = 8, 2
FRAGMENTS = 2 * LAYERS  # of a block: K and V lie apart
FRAGMENT_BYTES = 16 * 4 * 2


def cell(direction, fragment_bytes, fragments, **speeds):
    return [Measured(direction, Method(method), fragment_bytes, fragments, speed) for method, speed in speeds.items()]


PLAN = CopyPlan(
    cell(Direction.LOAD, FRAGMENT_BYTES, FRAGMENTS, staged=10.0, direct=30.0, dma=20.0)
    + cell(Direction.LOAD, FRAGMENT_BYTES, 4 * FRAGMENTS, staged=10.0, direct=20.0, dma=30.0)
    + cell(Direction.LOAD, FRAGMENTS * FRAGMENT_BYTES, FRAGMENTS, staged=30.0, direct=10.0, dma=10.0)
    + cell(Direction.SAVE, FRAGMENT_BYTES, FRAGMENTS, staged=30.0, direct=20.0, dma=10.0)
    + cell(Direction.SAVE, FRAGMENT_BYTES, 4 * FRAGMENTS, staged=10.0, direct=30.0, dma=20.0)
)


@pytest.mark.parametrize(
    ("direction", "num_blocks", "pinned", "method"),
    [
        (Direction.LOAD, 1, True, Method.DIRECT),
        (Direction.LOAD, 4, True, Method.DMA),
        (Direction.LOAD, 1, False, Method.DMA),  # no kernel reads memory that is not page-locked
        (Direction.SAVE, 1, True, Method.STAGED),
        (Direction.SAVE, 4, True, Method.DIRECT),
        (Direction.SAVE, 4, False, Method.DMA),
    ],
)
def test_each_piece_goes_by_what_was_the_fastest_for_its_like(monkeypatch, direction, num_blocks, pinned, method):
    planes = planes_of([torch.zeros(2, BLOCKS, 16, 4, dtype=torch.bfloat16) for _ in range(LAYERS)], BLOCKS)
    device = SimulatedDevice(planes, BLOCKS)
    link = DeviceLink(device, torch.device("cpu"), device.copier.row_bytes, len(planes), PLAN)
    taken = []
    for pipeline in (link._loads, link._saves):
        monkeypatch.setattr(pipeline, "issue", lambda *piece: taken.append(piece[3]))
    rows, blocks = torch.zeros(BLOCKS, link.row_bytes, dtype=torch.uint8), list(range(num_blocks))

    def piece(page_locked):
        groups = [RowGroup(rows, blocks, pinned=page_locked)]
        if direction is Direction.LOAD:
            link.load(groups, blocks, None, taken.append)
        else:
            link.save(blocks, groups, None, taken.append)

    piece(not pinned)  # what is remembered of it must not count for the other
    piece(pinned)
    assert taken[1] is method
    assert link.close(30.0)
