# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False
"""The Triton kernels of paged decodes: attend in splits, and merge the splits.

Heads may come as they were projected; the kernel then does what `tprt/kernels/qk_rotary.py` does for prompts.
What `triton_kernels.py` says of its kernels holds for these.
"""

import triton
import triton.language as tl

from tprt.attention.triton_kernels import attend, slots_of
from tprt.kernels.dependent_launch import LINE_BYTES, await_predecessor, prefetch
from tprt.kernels.qk_rotary import load_row, other_half, prepared


@triton.jit
def _fetch_first(  # noqa: PLR0913
    keys,
    values,
    table,
    first,
    end,
    slot_stride,
    head_dim: tl.constexpr,
    dim,
    block_size: tl.constexpr,
    tile: tl.constexpr,
    ahead: tl.constexpr,
):
    """Bring keys and values of the first `ahead` tokens from `first` on into the L2 cache, by tiles."""
    in_line: tl.constexpr = LINE_BYTES * 8 // keys.dtype.element_ty.primitive_bitwidth
    column = tl.minimum(tl.arange(0, (dim.shape[0] + in_line - 1) // in_line) * in_line, head_dim - 1)
    for start in range(first, tl.minimum(first + ahead, end), tile):
        # Beyond the end the last token is fetched once more.
        tokens = tl.minimum(start + tl.arange(0, tile), end - 1)
        slots = slots_of(table, 0, start, tokens, end, block_size, tile)
        at = (slots * slot_stride)[:, None] + column[None, :]
        prefetch(keys + at)
        prefetch(values + at)


# fmt: off
@triton.jit
def _attend_to_newest(  # noqa: PLR0913
    q, at_query, at_key, to_value, at_slot_key, at_slot_value, real, has_newest, scale, twin_scale, key_scale,
    twin_key_scale, cos, sin, eps, scale_log2, head_dim: tl.constexpr, norms: tl.constexpr,
):
    """Prepare queries `q` `[rows, padded]` from `at_query`, and if `has_newest` the key from `at_key`.

    That one and its value, `to_value` behind it, go to their slots, and the softmax of the queries begins with
    them. Returns the queries and what `attend` carries on.
    """
    # fmt: on
    dim = tl.arange(0, q.shape[1])[None, :]
    twin, real_new = other_half(dim, head_dim), (dim < head_dim) & has_newest
    q_twin = tl.load(at_query + twin, mask=real, other=0.0)
    k = tl.load(at_key + dim, mask=real_new, other=0.0)
    k_twin = tl.load(at_key + twin, mask=real_new, other=0.0)
    v = tl.load(at_key + to_value + dim, mask=real_new, other=0.0)
    k = prepared(k, k_twin, key_scale, twin_key_scale, cos, sin, eps, head_dim, norms)
    q = prepared(q, q_twin, scale, twin_scale, cos, sin, eps, head_dim, norms)
    tl.store(at_slot_key + dim, k, mask=real_new)
    tl.store(at_slot_value + dim, v, mask=real_new)
    score = tl.sum(q.to(tl.float32) * k.to(tl.float32), 1) * scale_log2
    peak = tl.where(has_newest, score, float("-inf"))
    total = tl.where(has_newest, 1.0, tl.zeros_like(peak))
    return q, peak, total, tl.zeros(q.shape, tl.float32) + v.to(tl.float32)


# fmt: off
@triton.jit(do_not_specialize=["table_stride"], do_not_specialize_on_alignment=["block_tables", "context_lens"])
def decode_kernel(  # noqa: PLR0913
    output, lse, query, keys, values, block_tables, context_lens, cos_table, sin_table, query_weight,
    key_weight, eps, scale_log2, query_stride, slot_stride, table_stride, group: tl.constexpr,
    rows: tl.constexpr, head_dim: tl.constexpr, padded_dim: tl.constexpr, block_size: tl.constexpr,
    tile: tl.constexpr, num_splits: tl.constexpr, prepares: tl.constexpr, norms: tl.constexpr,
    ahead: tl.constexpr, dependent: tl.constexpr,
):
    """One program for (KV head, split, sequence): the query heads of the KV group are rows of one matrix.

    A split is an equal share, in whole tiles, of the tokens that this sequence has. Writes `output`
    `[S, h, num_splits, D]`, each split as if it were alone, and its log-sum-exp to `lse` `[S, h, num_splits]`
    when there are several; a split without tokens then writes nothing.

    If it `prepares`, `query` are projected heads `[S, h + 2 kv, D]`: each program normalises (if `norms`) and
    rotates its queries, and the one with the last token does so with its key and stores that and its value.
    """
    kv_head, split, seq = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(context_lens + seq)
    share = tl.cdiv(tl.cdiv(length, tile), num_splits) * tile
    first, cached = split * share, length
    end = tl.minimum(first + share, length)
    row, dim = tl.arange(0, rows), tl.arange(0, padded_dim)
    head, table = kv_head * group + row, block_tables + seq * table_stride
    keys, values = keys + kv_head * head_dim, values + kv_head * head_dim
    if prepares:
        cached, twin = length - 1, other_half(dim, head_dim)
        token = tl.maximum(cached, 0).to(tl.int64)
        cos = load_row(cos_table + token * head_dim, dim, head_dim)
        sin = load_row(sin_table + token * head_dim, dim, head_dim)
        scale, twin_scale = load_row(query_weight, dim, head_dim), load_row(query_weight, twin, head_dim)
        key_scale, twin_key_scale = load_row(key_weight, dim, head_dim), load_row(key_weight, twin, head_dim)
        slot = tl.load(table + token // block_size).to(tl.int64) * block_size + token % block_size
    if ahead > 0 and dependent:
        _fetch_first(keys, values, table, first, end, slot_stride, head_dim, dim, block_size, tile, ahead)
    await_predecessor(dependent)
    if num_splits > 1:  # noqa: SIM102 (the outer one is decided by the compiler)
        if first >= length:
            return
    real = (row < group)[:, None] & (dim < head_dim)[None, :]
    at_query = query + seq * query_stride + head[:, None] * head_dim
    q = tl.load(at_query + dim[None, :], mask=real, other=0.0)
    peak = tl.full([rows], float("-inf"), tl.float32)
    total, acc = tl.zeros([rows], tl.float32), tl.zeros([rows, padded_dim], tl.float32)
    if prepares:
        at_key = query + seq * query_stride + (tl.num_programs(0) * group + kv_head) * head_dim
        q, peak, total, acc = _attend_to_newest(
            q, at_query, at_key, tl.num_programs(0) * head_dim, keys + slot * slot_stride,
            values + slot * slot_stride, real, (end == length) & (length > 0), scale, twin_scale, key_scale,
            twin_key_scale, cos, sin, eps, scale_log2, head_dim, norms)
    peak, total, acc = attend(
        q, peak, total, acc, keys, values, table, first, tl.minimum(end, cached), 0, cached,
        tl.zeros([rows], tl.int32) + (cached - 1), scale_log2, slot_stride, slot_stride, head_dim, block_size,
        tile, True)
    # fmt: on
    # A sequence of no tokens is padding: its rows are 0, not NaN.
    result = acc / tl.where(total > 0, total, 1.0)[:, None]
    at = (seq * tl.num_programs(0) * group + head) * num_splits + split
    tl.store(output + at[:, None] * head_dim + dim[None, :], result.to(output.dtype.element_ty), mask=real)
    if num_splits > 1:
        tl.store(lse + at, peak + tl.log2(total), mask=row < group)


@triton.jit(do_not_specialize_on_alignment=["context_lens"])
def merge_kernel(  # noqa: PLR0913
    output,
    partial,
    lse,
    context_lens,
    head_dim: tl.constexpr,
    padded_dim: tl.constexpr,
    tile: tl.constexpr,
    num_splits: tl.constexpr,
    dependent: tl.constexpr,
):
    """One program for (head, sequence): weighs `partial` `[S, h, num_splits, D]` by its log-sum-exp."""
    head, seq = tl.program_id(0), tl.program_id(1)
    num_tiles = tl.cdiv(tl.load(context_lens + seq), tile)
    used = tl.cdiv(num_tiles, tl.maximum(tl.cdiv(num_tiles, num_splits), 1))
    split, dim = tl.arange(0, num_splits), tl.arange(0, padded_dim)
    await_predecessor(dependent)
    at = seq * tl.num_programs(0) + head
    logs = tl.load(lse + at * num_splits + split, mask=split < used, other=float("-inf"))
    real = (split < used)[:, None] & (dim < head_dim)[None, :]
    offsets = (at * num_splits + split)[:, None] * head_dim + dim[None, :]
    parts = tl.load(partial + offsets, mask=real, other=0.0)
    weights = tl.where(split < used, tl.exp2(logs - tl.max(logs, 0)), 0.0)
    total = tl.sum(weights, 0)
    result = tl.sum(parts * weights[:, None], 0) / tl.where(total > 0, total, 1.0)
    tl.store(output + at * head_dim + dim, result.to(output.dtype.element_ty), mask=dim < head_dim)
