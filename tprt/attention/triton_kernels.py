# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False
"""The Triton kernels of paged attention that store and prefill, and what those of decodes share with them.

Scores are kept in base 2, so that `exp2` serves: `scale_log2` is the softmax scale times log2(e). Products
accumulate in float32, and float32 inputs are multiplied as such (`ieee`), not rounded to tf32. The heads of one
token lie end to end everywhere; a stride is that of a token or slot. Knows nothing of torch:
`tprt/attention/triton.py` launches them. Tensors of indices are not specialised on their alignment, nor the
width of the block tables: both change from step to step, and each new kind would be compiled anew.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize_on_alignment=["slot_mapping"])
def store_kernel(  # noqa: PLR0913
    key,
    value,
    key_cache,
    value_cache,
    slot_mapping,
    key_stride,
    value_stride,
    slot_stride,
    num_elements: tl.constexpr,
    padded_elements: tl.constexpr,
):
    """One program for a token: copies its key and value to its slot; a slot of -1 is padding."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping + token).to(tl.int64)
    if slot >= 0:
        element = tl.arange(0, padded_elements)
        real = element < num_elements
        k = tl.load(key + token * key_stride + element, mask=real)
        v = tl.load(value + token * value_stride + element, mask=real)
        tl.store(key_cache + slot * slot_stride + element, k, mask=real)
        tl.store(value_cache + slot * slot_stride + element, v, mask=real)


@triton.jit
def slots_of(  # noqa: PLR0913
    table, k_start, start, tokens, k_len, block_size: tl.constexpr, tile: tl.constexpr
):
    """The KV slots of `tokens`, a tile that begins at `start`; without blocks they begin at `k_start`."""
    if block_size == 0:
        slots = (k_start + tokens).to(tl.int64)
    elif block_size >= tile:
        # The tile lies in one block: one look at the table.
        slots = tl.load(table + start // block_size).to(tl.int64) * block_size + tokens % block_size
    else:
        blocks = tl.load(table + tokens // block_size, mask=tokens < k_len, other=0)
        slots = blocks.to(tl.int64) * block_size + tokens % block_size
    return slots


@triton.jit
def attend(  # noqa: PLR0913
    q,
    peak,
    total,
    acc,
    keys,
    values,
    table,
    begin,
    end,
    k_start,
    k_len,
    position,
    scale_log2,
    key_stride,
    value_stride,
    head_dim: tl.constexpr,
    block_size: tl.constexpr,
    tile: tl.constexpr,
    masked: tl.constexpr,
):
    """Carry the running softmax of `q` over the keys from `begin` to `end`, tile by tile.

    `masked`: rows see keys up to their `position` only, and the last tile may reach beyond `k_len`.
    """
    dim = tl.arange(0, q.shape[1])
    for start in range(begin, end, tile):
        tokens = start + tl.arange(0, tile)
        slots = slots_of(table, k_start, start, tokens, k_len, block_size, tile)
        real = (dim < head_dim)[None, :]
        if masked:
            real = real & (tokens < k_len)[:, None]
        k = tl.load(keys + (slots * key_stride)[:, None] + dim[None, :], mask=real, other=0.0)
        v = tl.load(values + (slots * value_stride)[:, None] + dim[None, :], mask=real, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
        if masked:
            seen = (tokens[None, :] <= position[:, None]) & (tokens < k_len)[None, :]
            scores = tl.where(seen, scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        factor = tl.exp2(peak - new_peak)
        weights = tl.exp2(scores - new_peak[:, None])
        peak, total = new_peak, total * factor + tl.sum(weights, 1)
        acc = tl.dot(weights.to(v.dtype), v, acc * factor[:, None], input_precision="ieee")
    return peak, total, acc


@triton.jit(
    do_not_specialize=["table_stride"],
    do_not_specialize_on_alignment=["block_tables", "cu_seqlens_q", "cu_seqlens_k"],
)
def prefill_kernel(  # noqa: PLR0913
    output,
    query,
    keys,
    values,
    block_tables,
    cu_seqlens_q,
    cu_seqlens_k,
    scale_log2,
    query_stride,
    key_stride,
    value_stride,
    table_stride,
    group: tl.constexpr,
    head_dim: tl.constexpr,
    padded_dim: tl.constexpr,
    block_size: tl.constexpr,
    rows: tl.constexpr,
    tile: tl.constexpr,
):
    """One program for (`rows` queries, head, sequence); the queries are the last tokens of their sequence.

    With `block_size` 0 keys and values lie end to end, as `cu_seqlens_k` says, instead of in blocks.
    """
    # The last queries see most: they go first.
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * rows
    head, seq = tl.program_id(1), tl.program_id(2)
    q_start, k_start = tl.load(cu_seqlens_q + seq), tl.load(cu_seqlens_k + seq)
    q_len, k_len = tl.load(cu_seqlens_q + seq + 1) - q_start, tl.load(cu_seqlens_k + seq + 1) - k_start
    if first >= q_len:
        return
    row, dim = first + tl.arange(0, rows), tl.arange(0, padded_dim)
    token, real = (q_start + row).to(tl.int64), (row < q_len)[:, None] & (dim < head_dim)[None, :]
    at = query + (token * query_stride)[:, None] + head * head_dim + dim[None, :]
    q = tl.load(at, mask=real, other=0.0)
    peak = tl.full([rows], float("-inf"), tl.float32)
    total, acc = tl.zeros([rows], tl.float32), tl.zeros([rows, padded_dim], tl.float32)
    keys += head // group * head_dim
    values += head // group * head_dim
    table = block_tables + seq * table_stride
    # All rows see the tiles before `whole` entirely; from there to `end` it depends on the row.
    cached = k_len - q_len
    whole, end = (cached + first + 1) // tile * tile, tl.minimum(cached + first + rows, k_len)
    # fmt: off
    peak, total, acc = attend(
        q, peak, total, acc, keys, values, table, 0, whole, k_start, k_len, cached + row, scale_log2,
        key_stride, value_stride, head_dim, block_size, tile, False,
    )
    peak, total, acc = attend(
        q, peak, total, acc, keys, values, table, whole, end, k_start, k_len, cached + row, scale_log2,
        key_stride, value_stride, head_dim, block_size, tile, True,
    )
    # fmt: on
    at = (token * tl.num_programs(1) + head)[:, None] * head_dim + dim[None, :]
    tl.store(output + at, (acc / total[:, None]).to(output.dtype.element_ty), mask=real)
