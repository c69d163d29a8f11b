"""Triton's kernels for block-sparse attention.

Tensors are `[batch, length, heads, dim]` and contiguous, log-sum-exps and the like `[batch, length, heads]`. Scores
are to base 2. A document is a row of the batch or, where `documents` tells them, a part of the only row. The lists of
blocks are the fields of a `WalkLists`. Of the last blocks, `extra_blocks`, which hold single global tokens, `copies`
tells which tokens each block reads, see `Copies.read_by`.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
HUGE = tl.constexpr(1e30)


@triton.jit
def _find_work(
    documents, rows, starts, num_blocks, num_long, segments,
    HEADS: tl.constexpr, LAYOUTS: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """What a program has to do: the place of its document's first block, and which blocks there are; its head; its
    block, and tokens in it; its part of the lists; and where its result belongs among those of the parts of lists, if
    it is one."""
    document, head = tl.program_id(0) // HEADS, tl.program_id(0) % HEADS
    item, tile = tl.program_id(1) // (BLOCK // TILE), tl.program_id(1) % (BLOCK // TILE)
    row, within = tl.load(rows + item), tile * TILE + tl.arange(0, TILE)
    first = tl.load(starts + head % LAYOUTS * (num_blocks + 1) + row)
    last = tl.load(starts + head % LAYOUTS * (num_blocks + 1) + row + 1)
    place, from_block, to_block = document.to(tl.int64) * num_blocks * BLOCK, 0, num_blocks
    if documents is not None:
        place = tl.load(documents + 3 * document).to(tl.int64)
        from_block = tl.load(documents + 3 * document + 1)
        to_block = tl.load(documents + 3 * document + 2)
    is_long = item < num_long * segments
    if is_long:
        last = first + to_block
        first += from_block
        size = tl.cdiv(last - first, segments)
        first += item % segments * size
        last = tl.minimum(first + size, last)
    part = (document.to(tl.int64) * num_long * segments + item) * BLOCK + within
    return place, from_block, to_block, head, row, row * BLOCK + within, first, last, part, is_long & (segments > 1)


@triton.jit
def _find_tokens(documents, blocks, step, row, from_block, to_block, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """The tokens that a program takes in a step, and whether there are such: otherwise they are those of its row."""
    block = tl.load(blocks + step // (BLOCK // TILE))
    is_there = block >= 0
    if documents is not None:
        is_there = (block >= from_block) & (block < to_block)
        block = tl.where(is_there, block, row)
    return block * BLOCK + step % (BLOCK // TILE) * TILE + tl.arange(0, TILE), is_there


@triton.jit
def _find_real(
    key_mask, copies, place, keys, head, row, num_blocks, extra_blocks,
    HEADS: tl.constexpr, LAYOUTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Whether the keys are real tokens and, of those in the last blocks, whether the block `row` reads them."""
    if copies is None:
        real = tl.load(key_mask + place + keys)
    else:
        first, count = (num_blocks - extra_blocks) * BLOCK, extra_blocks * BLOCK
        reader = (tl.program_id(0) // HEADS * LAYOUTS + head % LAYOUTS).to(tl.int64) * num_blocks + row
        real = tl.load(key_mask + place + keys, mask=keys < first, other=0)
        real = real | tl.load(copies + reader * count + keys - first, mask=keys >= first, other=0)
    return real


@triton.jit
def _load(tensor, tokens, STRIDE: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr):
    """`[tokens, WIDTH]`: vectors of one head, filled up with zeros."""
    columns = tl.arange(0, WIDTH)[None, :]
    pointers = tensor + tokens[:, None] * STRIDE + columns
    if WIDTH == HEAD_DIM:
        return tl.load(pointers)
    return tl.load(pointers, mask=columns < HEAD_DIM, other=0.0)


@triton.jit
def _store(tensor, tokens, vectors, STRIDE: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr):
    """The reverse of `_load`."""
    columns = tl.arange(0, WIDTH)[None, :]
    pointers = tensor + tokens[:, None] * STRIDE + columns
    vectors = vectors.to(tensor.dtype.element_ty)
    if WIDTH == HEAD_DIM:
        tl.store(pointers, vectors)
    else:
        tl.store(pointers, vectors, mask=columns < HEAD_DIM)


@triton.jit
def _hide(scores, queries, keys, real, is_there, key_mask, documents, IS_CAUSAL: tl.constexpr):
    """`scores`, but -inf for keys that the queries do not read. All others can be broadcast to them."""
    hidden = queries < 0
    if IS_CAUSAL:
        hidden = hidden | (keys > queries)
    if key_mask is not None:
        hidden = hidden | (real == 0)
    if documents is not None:
        hidden = hidden | (is_there == 0)
    return tl.where(hidden, -float("inf"), scores)


@triton.jit
def forward_kernel(
    query, key, value, key_mask, copies, documents, output, log_sum_exp, output_parts, log_sum_exp_parts,
    rows, starts, blocks, gains, num_blocks, num_long, segments, extra_blocks, scale,
    HEADS: tl.constexpr, LAYOUTS: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    TILE: tl.constexpr, IS_CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Contexts and their log-sum-exps, a tile of queries in each program."""
    STRIDE: tl.constexpr = HEADS * HEAD_DIM
    TILES: tl.constexpr = BLOCK // TILE
    HIDES: tl.constexpr = (IS_CAUSAL or key_mask is not None) or documents is not None
    place, from_block, to_block, head, row, queries, first, last, part, is_part = _find_work(
        documents, rows, starts, num_blocks, num_long, segments, HEADS, LAYOUTS, BLOCK, TILE
    )
    if (row < from_block) | (row >= to_block):
        return
    own = place * STRIDE + head * HEAD_DIM
    q = _load(query + own, queries, STRIDE, HEAD_DIM, WIDTH)
    most = tl.full([TILE], -float("inf"), tl.float32)
    total = tl.zeros([TILE], tl.float32)
    context = tl.zeros([TILE, WIDTH], tl.float32)
    for step in range(first * TILES, last * TILES):
        keys, is_there = _find_tokens(documents, blocks, step, row, from_block, to_block, BLOCK, TILE)
        k = _load(key + own, keys, STRIDE, HEAD_DIM, WIDTH)
        v = _load(value + own, keys, STRIDE, HEAD_DIM, WIDTH)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale + tl.load(gains + step // TILES)
        if HIDES:
            real = keys
            if key_mask is not None:
                real = _find_real(
                    key_mask, copies, place, keys, head, row, num_blocks, extra_blocks, HEADS, LAYOUTS, BLOCK
                )
            scores = _hide(
                scores, queries[:, None], keys[None, :], real[None, :], is_there, key_mask, documents, IS_CAUSAL
            )
        higher = tl.maximum(most, tl.max(scores, 1))
        base = tl.where(higher == -float("inf"), 0.0, higher) if HIDES else higher
        weights = tl.exp2(scores - base[:, None])
        decay = tl.exp2(most - base)
        total = total * decay + tl.sum(weights, 1)
        context = tl.dot(weights.to(v.dtype), v, context * decay[:, None], input_precision=PRECISION)
        most = higher
    context = context / tl.where(total == 0, 1.0, total)[:, None]
    lse = (most + tl.log2(total)) / LOG2_E
    if key_mask is not None:
        real = tl.load(key_mask + place + queries)
        context = tl.where(real[:, None] == 0, 0.0, context)
        lse = tl.where(real == 0, HUGE, lse)  # so that its probabilities are zero in the backward pass
    if is_part:
        _store(output_parts + head * HEAD_DIM, part, context, STRIDE, HEAD_DIM, WIDTH)
        tl.store(log_sum_exp_parts + part * HEADS + head, lse)
    else:
        _store(output + own, queries, context, STRIDE, HEAD_DIM, WIDTH)
        tl.store(log_sum_exp + (place + queries) * HEADS + head, lse)


@triton.jit
def query_gradient_kernel(
    query, key, value, key_mask, copies, documents, output, log_sum_exp, grad_output, delta,
    grad_query, grad_query_parts,
    rows, starts, blocks, gains, num_blocks, num_long, segments, extra_blocks, scale,
    HEADS: tl.constexpr, LAYOUTS: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    TILE: tl.constexpr, IS_CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of queries, and `delta`, the sum of each context times its gradient."""
    STRIDE: tl.constexpr = HEADS * HEAD_DIM
    TILES: tl.constexpr = BLOCK // TILE
    place, from_block, to_block, head, row, queries, first, last, part, is_part = _find_work(
        documents, rows, starts, num_blocks, num_long, segments, HEADS, LAYOUTS, BLOCK, TILE
    )
    if (row < from_block) | (row >= to_block):
        return
    own = place * STRIDE + head * HEAD_DIM
    q = _load(query + own, queries, STRIDE, HEAD_DIM, WIDTH)
    grad_out = _load(grad_output + own, queries, STRIDE, HEAD_DIM, WIDTH)
    out = _load(output + own, queries, STRIDE, HEAD_DIM, WIDTH)
    sums = tl.sum(out.to(tl.float32) * grad_out.to(tl.float32), 1)
    tl.store(delta + (place + queries) * HEADS + head, sums)
    lse = tl.load(log_sum_exp + (place + queries) * HEADS + head) * LOG2_E
    grad = tl.zeros([TILE, WIDTH], tl.float32)
    for step in range(first * TILES, last * TILES):
        keys, is_there = _find_tokens(documents, blocks, step, row, from_block, to_block, BLOCK, TILE)
        k = _load(key + own, keys, STRIDE, HEAD_DIM, WIDTH)
        v = _load(value + own, keys, STRIDE, HEAD_DIM, WIDTH)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale + tl.load(gains + step // TILES)
        if (IS_CAUSAL or key_mask is not None) or documents is not None:
            real = keys
            if key_mask is not None:
                real = _find_real(
                    key_mask, copies, place, keys, head, row, num_blocks, extra_blocks, HEADS, LAYOUTS, BLOCK
                )
            scores = _hide(
                scores, queries[:, None], keys[None, :], real[None, :], is_there, key_mask, documents, IS_CAUSAL
            )
        weights = tl.exp2(scores - lse[:, None])
        grad_weights = tl.dot(grad_out, tl.trans(v), input_precision=PRECISION)
        grad_scores = (weights * (grad_weights - sums[:, None])).to(k.dtype)
        grad = tl.dot(grad_scores, k, grad, input_precision=PRECISION)
    grad = grad * (scale / LOG2_E)
    if is_part:
        _store(grad_query_parts + head * HEAD_DIM, part, grad, STRIDE, HEAD_DIM, WIDTH)
    else:
        _store(grad_query + own, queries, grad, STRIDE, HEAD_DIM, WIDTH)


@triton.jit
def key_gradient_kernel(
    query, key, value, key_mask, copies, documents, log_sum_exp, grad_output, delta,
    grad_key, grad_value, grad_key_parts, grad_value_parts,
    rows, starts, blocks, gains, num_blocks, num_long, segments, extra_blocks, scale,
    HEADS: tl.constexpr, LAYOUTS: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    TILE: tl.constexpr, IS_CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of keys and of their values. Scores are transposed: `[keys, queries]`."""
    STRIDE: tl.constexpr = HEADS * HEAD_DIM
    TILES: tl.constexpr = BLOCK // TILE
    place, from_block, to_block, head, row, keys, first, last, part, is_part = _find_work(
        documents, rows, starts, num_blocks, num_long, segments, HEADS, LAYOUTS, BLOCK, TILE
    )
    if (row < from_block) | (row >= to_block):
        return
    own = place * STRIDE + head * HEAD_DIM
    k = _load(key + own, keys, STRIDE, HEAD_DIM, WIDTH)
    v = _load(value + own, keys, STRIDE, HEAD_DIM, WIDTH)
    grad_k = tl.zeros([TILE, WIDTH], tl.float32)
    grad_v = tl.zeros([TILE, WIDTH], tl.float32)
    for step in range(first * TILES, last * TILES):
        queries, is_there = _find_tokens(documents, blocks, step, row, from_block, to_block, BLOCK, TILE)
        q = _load(query + own, queries, STRIDE, HEAD_DIM, WIDTH)
        grad_out = _load(grad_output + own, queries, STRIDE, HEAD_DIM, WIDTH)
        lse = tl.load(log_sum_exp + (place + queries) * HEADS + head) * LOG2_E
        sums = tl.load(delta + (place + queries) * HEADS + head)
        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale + tl.load(gains + step // TILES)
        if (IS_CAUSAL or documents is not None) or copies is not None:  # padded keys are left out at the end
            real = keys
            if copies is not None:
                reader = tl.load(blocks + step // TILES)
                real = _find_real(
                    key_mask, copies, place, keys, head, reader, num_blocks, extra_blocks, HEADS, LAYOUTS, BLOCK
                )
            scores = _hide(
                scores, queries[None, :], keys[:, None], real[:, None], is_there, copies, documents, IS_CAUSAL
            )
        weights = tl.exp2(scores - lse[None, :])
        grad_v = tl.dot(weights.to(grad_out.dtype), grad_out, grad_v, input_precision=PRECISION)
        grad_weights = tl.dot(v, tl.trans(grad_out), input_precision=PRECISION)
        grad_scores = (weights * (grad_weights - sums[None, :])).to(q.dtype)
        grad_k = tl.dot(grad_scores, q, grad_k, input_precision=PRECISION)
    grad_k = grad_k * (scale / LOG2_E)
    if key_mask is not None:
        real = tl.load(key_mask + place + keys)[:, None]
        grad_k = tl.where(real == 0, 0.0, grad_k)
        grad_v = tl.where(real == 0, 0.0, grad_v)
    if is_part:
        _store(grad_key_parts + head * HEAD_DIM, part, grad_k, STRIDE, HEAD_DIM, WIDTH)
        _store(grad_value_parts + head * HEAD_DIM, part, grad_v, STRIDE, HEAD_DIM, WIDTH)
    else:
        _store(grad_key + own, keys, grad_k, STRIDE, HEAD_DIM, WIDTH)
        _store(grad_value + own, keys, grad_v, STRIDE, HEAD_DIM, WIDTH)


@triton.jit
def merge_kernel(
    parts, log_sum_exp_parts, target, log_sum_exp, documents, rows, num_blocks, num_long, segments,
    parts_size, target_size,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """From the parts of long lists their results: averages, weighted by `exp` of the log-sum-exps, or without those
    sums. Of several tensors, one behind the other, if there are several programs along the last axis."""
    STRIDE: tl.constexpr = HEADS * HEAD_DIM
    parts += tl.program_id(2).to(tl.int64) * parts_size
    target += tl.program_id(2).to(tl.int64) * target_size
    document, head = (tl.program_id(0) // HEADS).to(tl.int64), tl.program_id(0) % HEADS
    item, tile = tl.program_id(1) // (BLOCK // TILE) * segments, tl.program_id(1) % (BLOCK // TILE)
    row, within = tl.load(rows + item), tile * TILE + tl.arange(0, TILE)
    place = document * num_blocks * BLOCK
    if documents is not None:
        place = tl.load(documents + 3 * document).to(tl.int64)
        if (row < tl.load(documents + 3 * document + 1)) | (row >= tl.load(documents + 3 * document + 2)):
            return
    most = tl.full([TILE], -float("inf"), tl.float32)
    total = tl.zeros([TILE], tl.float32)
    merged = tl.zeros([TILE, WIDTH], tl.float32)
    for segment in range(segments):
        part = (document * num_long * segments + item + segment) * BLOCK + within
        result = _load(parts + head * HEAD_DIM, part, STRIDE, HEAD_DIM, WIDTH)
        if log_sum_exp_parts is None:
            merged += result
        else:
            lse = tl.load(log_sum_exp_parts + part * HEADS + head)
            higher = tl.maximum(most, lse)
            base = tl.where(higher == -float("inf"), 0.0, higher)
            weight, decay = tl.exp(lse - base), tl.exp(most - base)
            total = total * decay + weight
            merged = merged * decay[:, None] + result * weight[:, None]
            most = higher
    tokens = row * BLOCK + within
    if log_sum_exp_parts is not None:
        merged = merged / tl.where(total == 0, 1.0, total)[:, None]
        tl.store(log_sum_exp + (place + tokens) * HEADS + head, most + tl.log(total))
    _store(target + place * STRIDE + head * HEAD_DIM, tokens, merged, STRIDE, HEAD_DIM, WIDTH)
