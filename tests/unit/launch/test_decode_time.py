"""A decode step takes what the heaviest rank reads and the times that ranks wait for each other."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.planning.all_reduce_time import SOURCES, all_reduce_us
from launch.planning.bandwidth import SHARE_OF_PEAK, gpu_layer_us, measure_cpu_gbs, peak_gbs
from launch.planning.decode_time import Batch, DecodeTime, Machine, predict_decode, slower_than_fewer
from tprt.sharding import ModelShape, make_shard_plan

QWEN3_600M = ModelShape(1024, 3072, 28, 16, 8, 128, 151936, True)
QWEN3_8B = ModelShape(4096, 12288, 36, 32, 8, 128, 151936, False)
QWEN3_32B = ModelShape(5120, 25600, 64, 64, 8, 128, 151936, False)
LLAMA_70B = ModelShape(8192, 28672, 80, 64, 8, 128, 128256, False)
H100 = Machine(3350.0, False, lambda size: 0.0, lambda ranks, num_bytes: 20.0 if ranks > 1 else 0.0)
ONE_TOKEN = Batch(1, 0, 2)


def test_one_rank_reads_all_weights_but_the_embedding_and_waits_for_nobody() -> None:
    time = predict_decode(make_shard_plan(QWEN3_8B, 1), ONE_TOKEN, H100)
    assert time.all_reduce_ms == 0.0
    assert time.total_ms == pytest.approx(4.52, abs=0.01)  # 15.1 GB at 3350 GB/s


def test_ranks_wait_twice_a_layer_after_the_embedding_and_to_sample() -> None:
    time = predict_decode(make_shard_plan(QWEN3_8B, 4), ONE_TOKEN, H100)
    assert time.read_ms == pytest.approx(4.52 / 4, abs=0.01)
    assert time.all_reduce_ms == pytest.approx((2 * 36 + 2) * 0.020)


def test_keys_and_values_of_the_batch_are_read_too() -> None:
    plan = make_shard_plan(QWEN3_8B, 1)
    kv_bytes = 64 * 1000 * 147_456
    more = (
        predict_decode(plan, Batch(64, 1000, 2), H100).read_ms - predict_decode(plan, ONE_TOKEN, H100).read_ms
    )
    assert more == pytest.approx(kv_bytes / 3350e9 * 1e3)


def test_the_message_is_a_row_of_the_hidden_size_for_each_sequence() -> None:
    sizes: list[int] = []

    def note(ranks: int, num_bytes: int) -> float:
        sizes.append(num_bytes)
        return 0.0

    predict_decode(make_shard_plan(QWEN3_8B, 2), Batch(64, 0, 2), Machine(1.0, False, lambda size: 0.0, note))
    assert sizes == [512 * 1024]


def test_every_layer_takes_what_its_kernels_take_beside_reading() -> None:
    machine = Machine(3350.0, False, lambda size: 10.0 * size, H100.all_reduce_us)
    time = predict_decode(make_shard_plan(QWEN3_8B, 1), Batch(2, 0, 2), machine)
    assert time.kernels_ms == pytest.approx(36 * 0.020)
    assert time.total_ms == pytest.approx(time.read_ms + time.kernels_ms)


def predicted_ms(shape: ModelShape, num_ranks: int, peak_gbs: float) -> list[float]:
    """Return the steps of 1, 8 and 64 sequences of 256 tokens."""
    machine = Machine(
        SHARE_OF_PEAK * peak_gbs,
        False,
        gpu_layer_us,
        lambda ranks, size: all_reduce_us("symm_mem", ranks, size),
    )
    plan = make_shard_plan(shape, num_ranks)
    return [predict_decode(plan, Batch(size, 256, 2), machine).total_ms for size in (1, 8, 64)]


@pytest.mark.parametrize(
    ("shape", "peak_gbs", "measured"),
    [
        *((QWEN3_600M, 3350.0, (0.80, 1.09, 1.83)), (QWEN3_8B, 3350.0, (5.45, 6.14, 7.36))),
        *((QWEN3_600M, 4800.0, (0.86, 1.00, 1.49)), (QWEN3_8B, 4800.0, (4.13, 4.67, 5.59))),
    ],
)
def test_steps_that_were_measured_on_one_gpu_are_predicted_within_a_sixth(
    shape: ModelShape, peak_gbs: float, measured: tuple[float, float, float]
) -> None:
    assert predicted_ms(shape, 1, peak_gbs) == pytest.approx(measured, rel=1 / 6)


@pytest.mark.parametrize(
    ("shape", "num_ranks", "measured"),
    [
        *((QWEN3_8B, 2, (2.97, 3.73, 4.21)), (QWEN3_8B, 4, (2.08, 2.53, 3.39))),
        *((QWEN3_32B, 1, (18.37, 18.87, 19.74)), (QWEN3_32B, 3, (8.02, 9.31, 10.63))),
        *((LLAMA_70B, 2, (18.88, 20.91, 23.08)), (LLAMA_70B, 4, (10.72, 12.60, 15.40))),
    ],
)
def test_steps_of_several_h200_before_kernels_began_early_are_predicted_within_a_fifth(
    shape: ModelShape, num_ranks: int, measured: tuple[float, float, float]
) -> None:
    assert predicted_ms(shape, num_ranks, 4800.0) == pytest.approx(measured, rel=0.2)


def test_ranks_that_share_one_memory_read_no_faster_than_one() -> None:
    cpus = Machine(30.0, True, lambda size: 0.0, lambda ranks, num_bytes: 0.0)
    one, two = (predict_decode(make_shard_plan(QWEN3_8B, n), ONE_TOKEN, cpus).read_ms for n in (1, 2))
    assert two == pytest.approx(one)


def test_numbers_of_ranks_that_a_smaller_one_beats_are_named_with_the_best() -> None:
    times = [
        *(DecodeTime(1, 1, 4.0, 0.0, 0.0), DecodeTime(2, 1, 2.0, 0.0, 1.5), DecodeTime(4, 1, 1.0, 0.0, 1.5)),
        *(DecodeTime(8, 1, 0.5, 0.0, 2.5), DecodeTime(1, 64, 5.0, 0.0, 0.0), DecodeTime(8, 64, 0.6, 0.0, 3.0)),
    ]
    assert slower_than_fewer(times) == [(times[3], times[2])]


@given(
    st.sampled_from(sorted(SOURCES)),
    st.integers(2, 16),
    st.lists(st.integers(1, 2**27), min_size=2, max_size=2).map(sorted),
)
def test_a_larger_message_takes_no_less_time(backend: str, num_ranks: int, sizes: list[int]) -> None:
    small, large = (all_reduce_us(backend, num_ranks, size) for size in sizes)
    assert 0.0 < small <= large


def test_all_reduce_times_are_those_that_were_measured() -> None:
    assert all_reduce_us("nccl", 8, 16 * 1024) == 20.7
    assert all_reduce_us("nccl", 8, 40 * 1024) == pytest.approx((20.7 + 23.1) / 2)
    assert all_reduce_us("nccl", 3, 256 * 1024) == all_reduce_us("nccl", 4, 256 * 1024)
    assert all_reduce_us("symm_mem", 4, 256 * 1024) == pytest.approx(10.2)
    assert all_reduce_us("shm", 1, 10**9) == 0.0


@pytest.mark.parametrize(
    ("name", "gbs"),
    [
        ("NVIDIA H100 80GB HBM3", 3350),
        ("NVIDIA H100 PCIe", 2039),
        ("NVIDIA H200", 4800),
        ("NVIDIA A100-SXM4-80GB", 2039),
        ("NVIDIA A100-SXM4-40GB", 1555),
        ("NVIDIA L40S", 864),
        ("NVIDIA L4", 300),
        ("NVIDIA GeForce RTX 4090", 1008),
        ("NVIDIA B200", 8000),
        ("Something else", None),
    ],
)
def test_gpus_are_known_by_the_name_that_torch_gives(name: str, gbs: float | None) -> None:
    assert peak_gbs(name) == gbs


def test_this_machines_memory_has_a_speed() -> None:
    assert 0.1 < measure_cpu_gbs() < 10_000
