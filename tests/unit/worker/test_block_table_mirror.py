"""The mirror sends what has changed and nothing else, and the device ends with every table."""

from __future__ import annotations

import numpy as np
import torch

from tprt.worker.block_table_mirror import BlockTableMirror


def send(mirror: BlockTableMirror, slots: list[int], tables: list[list[int]]) -> int:
    """Bring the device up to date; return how many entries went there."""
    places, values = mirror.changes(np.array(slots, np.int32), np.array(tables, np.int32))
    mirror.write(torch.from_numpy(places), torch.from_numpy(values))
    return len(places)


def test_the_device_has_the_tables_of_every_step_and_is_sent_only_new_entries() -> None:
    mirror = BlockTableMirror(max_num_seqs=4, width=6, device=torch.device("cpu"))
    assert send(mirror, [2, 0], [[7, 8, 0], [5, 0, 0]]) == 3
    assert send(mirror, [2, 0], [[7, 8, 0], [5, 0, 0]]) == 0
    assert send(mirror, [0, 2], [[5, 9, 0], [7, 8, 6]]) == 2
    assert mirror.device_tables[0].tolist() == [5, 9, 0, 0, 0, 0]
    assert mirror.device_tables[2].tolist() == [7, 8, 6, 0, 0, 0]


def test_a_slot_that_another_sequence_gets_is_written_anew() -> None:
    mirror = BlockTableMirror(max_num_seqs=2, width=4, device=torch.device("cpu"))
    send(mirror, [1], [[3, 4, 5]])
    send(mirror, [1], [[6]])
    assert mirror.device_tables[1, :1].tolist() == [6]
    send(mirror, [1], [[6, 9, 5]])
    assert mirror.device_tables[1, :3].tolist() == [6, 9, 5]


def test_random_steps_leave_the_device_with_what_each_of_them_says() -> None:
    draw = np.random.default_rng(0)
    mirror = BlockTableMirror(max_num_seqs=8, width=10, device=torch.device("cpu"))
    for _ in range(200):
        slots = draw.permutation(8)[: draw.integers(1, 9)].astype(np.int32)
        tables = draw.integers(0, 4, (len(slots), draw.integers(1, 11)), dtype=np.int32)
        send(mirror, slots.tolist(), tables.tolist())
        assert mirror.device_tables.numpy()[slots, : tables.shape[1]].tolist() == tables.tolist()
        assert mirror.device_tables[mirror.padding_row].tolist() == [0] * 10
