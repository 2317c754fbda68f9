"""The bugs that `tests/planted.py` plants in csrc/attention_*: waits, phases, fences, barriers, sums, masks.

Not here, as nothing can tell them from the right kernel:
- who takes turns, and a turn for tiles of packed sequences that are not there: only speed;
- a wait that a later one of the same thread covers, and a wait for copies of which none is under way;
- k of the forward pass, but for a tile's first, given back before it is read: the producer fetches v of the tile before
  it first, and that is given back only behind the products with k;
- the wait for stores and additions at the end of a kernel: their sources have been read, and the next kernel starts
  when they are in memory;
- the wait for dv before dq of tiles of 80: it tells the compiler that p's registers are free, and no kernel reads them;
- the fence before the product of ds and k: since the one before dk no thread has touched its sums, which start anew;
- a `sync_warp` behind which the next instruction of the warp (`barrier_arrive`, in decoding `ldmatrix`) brings the
  lanes together: it may not be reached by some of them alone.
"""

from __future__ import annotations

from tests.planted import Bug

FORWARD = ("tests/kernels/test_attention_cuda.py",)
PAIRS = ("tests/kernels/test_attention_pairs_cuda.py",)
BACKWARD = ("tests/kernels/test_attention_backward_cuda.py",)
DECODE = ("tests/kernels/test_paged_attention.py",)


def _of(what: str, file: str, tests: tuple[str, ...], bugs: dict[str, tuple[str, str]]) -> list[Bug]:
    return [Bug(f"{what}: {name}", file, old, new, tests) for name, (old, new) in bugs.items()]


def _without(old: str, *lines: int) -> tuple[str, str]:
    """A place, and the same without some of its lines."""
    kept = [line for i, line in enumerate(old.strip().splitlines()) if i not in lines]
    return old, "\n".join(kept) or ";"


FIRST = """
mbar_wait(&k_full[ring.stage], ring.phase);
take_turn();
wgmma_fence(rows.s);
rows.scores(q_now, descriptor_behind(of_k, ring.stage * Tile::kv_bytes));
give_turn();
wgmma_wait<0>(rows.s);
release(&k_empty[ring.stage]);
soften(at.end - 1);"""
SUMS = """
wgmma_wait<0>(rows.o, rows.s);
if (j < at.end - 2) release(&v_empty[ring.stage ^ 1]);
if (any(fade[0] != 1.0f || fade[1] != 1.0f)) rows.scale_rows(fade);
pack_fragment<T>(rows.p, rows.s);"""
SCORES = """
ring.advance();
mbar_wait(&k_full[ring.stage], ring.phase);
take_turn();
wgmma_fence(rows.s);
rows.scores(q_now, descriptor_behind(of_k, ring.stage * Tile::kv_bytes));
mbar_wait(&v_full[stage], phase);
wgmma_fence(rows.o, rows.p);
rows.weigh(descriptor_behind(of_v, stage * Tile::kv_bytes));"""
SOFTEN = """
wgmma_wait<1>(rows.s);
release(&k_empty[ring.stage]);
if (Featured && Tile::depth > 128) wgmma_wait<0>(rows.o);  // the features need the registers of p
soften(j);"""
LAST = """
mbar_wait(&v_full[ring.stage], ring.phase);
wgmma_fence(rows.o, rows.p);
rows.weigh(descriptor_behind(of_v, ring.stage * Tile::kv_bytes));
wgmma_wait<0>(rows.o);
release(&v_empty[ring.stage]);
ring.advance();"""
RISES = "(peak - most[h]) * unit > kSlack"
BUGS = _of(
    "forward",
    "attention_forward.cu",
    FORWARD,
    {
        "first scores without a wait for k": _without(FIRST, 0),
        "first scores without a fence": _without(FIRST, 2),
        "first scores not waited for": _without(FIRST, 5),
        "first k released before it is read": (
            FIRST,
            FIRST.replace(
                "wgmma_wait<0>(rows.s);\nrelease(&k_empty[ring.stage]);",
                "release(&k_empty[ring.stage]);\nwgmma_wait<0>(rows.s);",
            ),
        ),
        "first k never released": _without(FIRST, 6),
        "scores without a wait for k": _without(SCORES, 1),
        "scores without a fence": _without(SCORES, 3),
        "v without a wait": _without(SCORES, 5),
        "v waited for with the other phase": (SCORES, SCORES.replace("[stage], phase)", "[stage], phase ^ 1)")),
        "v of the next stage": (SCORES, SCORES.replace("of_v, stage *", "of_v, ring.stage *")),
        "no fence before the product with v": _without(SCORES, 6),
        "scores not waited for": _without(SOFTEN, 0),
        "sums not waited for": _without(SUMS, 0),
        "v released before it is read": (
            SUMS,
            SUMS.replace(
                "wgmma_wait<0>(rows.o, rows.s);\nif (j < at.end - 2) release(&v_empty[ring.stage ^ 1]);",
                "if (j < at.end - 2) release(&v_empty[ring.stage ^ 1]);\nwgmma_wait<0>(rows.o, rows.s);",
            ),
        ),
        "v of the tile that comes next released": (SUMS, SUMS.replace("ring.stage ^ 1", "ring.stage")),
        "v released that nobody has read yet": (SUMS, SUMS.replace("if (j < at.end - 2) ", "")),
        "sums not scaled": _without(SUMS, 2),
        "sums of one row scaled alone": (SUMS, SUMS.replace(" || fade[1] != 1.0f", "")),
        "probabilities packed while the product reads them": (
            SOFTEN,
            SOFTEN.replace("soften(j);", "soften(j);\npack_fragment<T>(rows.p, rows.s);"),
        ),
        "last v without a wait": _without(LAST, 0),
        "no fence before the last product": _without(LAST, 1),
        "last sums not waited for": _without(LAST, 3),
        "last v never released": _without(LAST, 4),
        "the ring stands still between tiles": _without(LAST, 5),
        "q without a wait": ("mbar_wait(&q_full[q_stage], q_ring.phase);", ";"),
        "q waited for with the other phase": (
            "mbar_wait(&q_full[q_stage], q_ring.phase);",
            "mbar_wait(&q_full[q_stage], q_ring.phase ^ 1);",
        ),
        "q of the other stage": (
            "descriptor_behind(of_q, q_stage * Tile::q_bytes)",
            "descriptor_behind(of_q, (Tile::q_stages - 1 - q_stage) * Tile::q_bytes)",
        ),
        "q fetched before it is free": ("mbar_wait(&q_empty[q_ring.stage], q_ring.phase ^ 1);", ";"),
        "q not fetched where there are no keys": (
            "if (at.exists()) bring(at);",
            "if (at.exists() && at.first < at.end) bring(at);",
        ),
        "k fetched before its stage is free": ("mbar_wait(&k_empty[stage], ring.phase ^ 1);", ";"),
        "v fetched before its stage is free": ("mbar_wait(&v_empty[stage], ring.phase ^ 1);", ";"),
        "k fetched with the other phase": (
            "mbar_wait(&k_empty[stage], ring.phase ^ 1);",
            "mbar_wait(&k_empty[stage], ring.phase);",
        ),
        "out written over q that others still read": (
            "consumer_sync<1, n>(consumer, 128);  // all products that read this part of q are done",
            ";",
        ),
        "out not shown to the copy engine": (
            "fence_async();\nconsumer_sync<1, n>(consumer, 128);",
            "consumer_sync<1, n>(consumer, 128);",
        ),
        "out stored before all have written it": (
            "fence_async();\nconsumer_sync<1, n>(consumer, 128);",
            "fence_async();",
        ),
        "q given back while out is being read": ("@tma_wait_read<0>();@\n}\nmbar_arrive(&q_empty[q_stage]);", ";"),
        "out in no group": ("@tma_commit();@\ntma_wait_read<0>();\n}\nmbar_arrive(&q_empty[q_stage]);", ";"),
        "q never given back to the producer": ("mbar_arrive(&q_empty[q_stage]);", ";"),
        "the last turn not taken": ("if (consumer == 0) take_turn();", ";"),
        "keys before the window not masked": (
            "key + Tile::keys > at.mask.behind_key(top) || key < at.mask.first_key(top + 63)",
            "key + Tile::keys > at.mask.behind_key(top)",
        ),
        "keys behind the diagonal not masked": (
            "key + Tile::keys > at.mask.behind_key(top) || key < at.mask.first_key(top + 63)",
            "key < at.mask.first_key(top + 63)",
        ),
        "the mask of one row for both": ("at.mask.behind_key(row + 8)", "at.mask.behind_key(row)"),
        "tile missing at the end": (
            "end = behind > key ? ceil_div(behind, keys) : first;",
            "end = behind > key ? behind / keys : first;",
        ),
        "sums of one lane alone": ("sum += shuffle_xor(sum, 1);", ";"),
        "lse without its logarithm": ("(rows.most[h] * unit + log2_approx(sum)) * kLn2", "rows.most[h] * unit * kLn2"),
        "dropout not made good": ("(Featured ? scoring.kept : 1.0f) / sum", "1.0f / sum"),
    },
) + _of(
    "forward and backward",
    "device/attention.cuh",
    (*FORWARD, *BACKWARD),
    {
        "sums that have no base yet": (RISES, f"most[h] != -INFINITY && {RISES}"),
        "a maximum that never rises": (RISES, f"most[h] == -INFINITY && {RISES}"),
        "sums faded where the maximum stays": (
            "rises ? exp2_approx(most[h] * unit - base) : 1.0f",
            "exp2_approx((most[h] - peak) * unit)",
        ),
        "bits of the columns before": ("(behind[h] - key - j + 7) >> 3", "(behind[h] - key - j) >> 3"),
        "odd columns as even ones": ("(behind[h] - key - j + 7) >> 3", "(behind[h] - key + 7) >> 3"),
        "boxes that do not end with their sequence": ("min(rows, length - row)", "rows"),
        "the other sequence of packed ones": (
            "offsets[middle] / size + middle <= block",
            "offsets[middle] / size + middle < block",
        ),
    },
)

MULTICAST = "tma_load_4d_multicast(to + i * slab, map, full, 64 * i, box.y, box.z, box.w, 3);"
ACROSS = "p.by_tiles ? p.tiles : min(p.heads - from, p.section)"
BUGS += _of(
    "pairs",
    "attention_forward.cu",
    PAIRS,
    {
        "bytes of the own slabs alone expected": (
            "mbar_expect(full, Tile::slabs * slab);",
            "mbar_expect(full, (turn == alone || !paired ? Tile::slabs : ceil_div(Tile::slabs, 2)) * slab);",
        ),
        "stages given back to the first block alone": ("lane <= plan.paired", "lane == 0"),
        "stages given back to the own block alone": (
            "mbar_arrive_at(empty, lane);",
            "mbar_arrive_at(empty, int(blockIdx.x) & plan.paired);",
        ),
        "stages free when one block has read them": ("4 * Tile::consumers << plan.paired", "4 * Tile::consumers"),
        "the same slabs by both blocks": ("(i + turn + int(blockIdx.x)) % 2 == 0", "(i + turn) % 2 == 0"),
        "every slab by both blocks": ("(i + turn + int(blockIdx.x)) % 2 == 0", "true"),
        "slabs for the own block alone": (MULTICAST, MULTICAST.replace(", 3)", ", 1 << int(blockIdx.x) % 2)")),
        "q for both blocks": ("!paired || turn == alone", "!paired"),
        "a start before the other block's barriers are there": (
            "if (paired) cluster_arrive(), cluster_wait();\nelse sync_block();",
            "sync_block();",
        ),
        "an end while the other may still arrive": ("@if (paired) cluster_arrive(), cluster_wait();@\n#endif", ";"),
        "blocks that part on the way back": ("blocks - 1 - block", "(blocks - block) % blocks"),
        "tiles of two heads": (ACROSS, ACROSS.split(" : ")[1]),
    },
)

P_BEHIND = """
own.template pack<Keys::early, Keys::middle>(p, s);
wgmma_fence(Keys::template steps<Keys::early, Keys::middle>(p));
own.template accumulate<Keys::early, Keys::middle>(own.dv, p, dout_now);
own.template differences<Featured, Keys::middle, span / 16>(change, s, dp, kept, of_delta, plan.scoring.kept);
own.template pack<Keys::middle, span / 16>(p, s);
wgmma_fence(Keys::template steps<Keys::middle, span / 16>(p));
own.template accumulate<Keys::middle, span / 16>(own.dv, p, dout_now);"""
SHARE = """
own.share(change, ds_now + ds_own + half * Tile::ds_slab, warp, lane);
fence_async();"""
SHARED = """
if (Tile::split) consumer_sync<1>(consumer, 128);
else barrier_sync<7>(256);"""
PUT = """
fence_async();
if (consumer == 0) barrier_arrive<3>(160);
else barrier_arrive<4>(160);"""
NEXT = """
own.multiply(dp, own.v, descriptor_behind(of_dout, after * Tile::q_bytes));
wgmma_wait<1>(next);"""
WHOLE = """
next_scores();
release(&q_empty[stage]), release(&dout_empty[dout_stage]);
wgmma_wait<1>(part);
put(part, 0);"""
SPLIT = """
wgmma_wait<0>(part);
wgmma_fence(other);
own.weigh_queries(other, ds_part, descriptor_behind(of_k, Tile::kv_slab));
release(&dout_empty[dout_stage]);
put(part, 0);
release(&q_empty[stage]);
wgmma_wait<0>(other);
put(other, 1);"""
ADDED = """
tma_wait<0>();
fence_device();
atomic_add(turn, 1);"""

BUGS += (
    _of(
        "backward",
        "attention_backward.cu",
        BACKWARD,
        {
            "k and v without a wait": ("mbar_wait(kv_full, 0);", ";"),
            "first q without a wait": ("mbar_wait(&q_full[0], 0);", ";"),
            "next q without a wait": ("if (!last) mbar_wait(&q_full[after], ring.phase);", ";"),
            "first dout without a wait": ("mbar_wait(&dout_full[0], 0);", ";"),
            "next dout without a wait": ("if (!last) mbar_wait(&dout_full[after], ring.phase);", ";"),
            "q of halved columns without a wait": ("mbar_wait(&q_full[stage], phase);", ";"),
            "dout without a wait": ("if (!ahead) mbar_wait(&dout_full[dout_stage], dout_phase);", ";"),
            "dout waited for with the other phase": (
                "if (!ahead) mbar_wait(&dout_full[dout_stage], dout_phase);",
                "if (!ahead) mbar_wait(&dout_full[dout_stage], dout_phase ^ 1);",
            ),
            "scores of the next step not waited for": (NEXT, NEXT.replace("wgmma_wait<1>(next);", ";")),
            "scores of the second half not waited for": ("wgmma_wait<1>(next, own.dv, own.dk);", ";"),
            "dout of the same step again": (NEXT, NEXT.replace("after *", "stage *")),
            "q fetched before its stage is free": ("mbar_wait(&q_empty[s], ring.phase ^ 1);", ";"),
            "dout fetched before its stage is free": ("mbar_wait(&dout_empty[d], d_phase ^ 1);", ";"),
            "scores not waited for": ("wgmma_wait<0>(s, own.dv, own.dk);", ";"),
            "scores of halved columns not waited for": ("wgmma_wait<1>(s);", ";"),
            "dp that is ahead not waited for": ("if (ahead) wgmma_wait<0>(dp);", ";"),
            "no fence before the product with dout": (
                "wgmma_fence(own.dv, Keys::template steps<0, Keys::early>(p));",
                ";",
            ),
            "dp not waited for": ("if (!ahead) wgmma_wait<1>(dp);", ";"),
            "no fence before the product with q": ("wgmma_fence(own.dk, change);", ";"),
            "ds not shown to the tensor cores": _without(SHARE, 1),
            "80 queries: middle of p without a fence": _without(P_BEHIND, 1),
            "80 queries: end of p without a fence": _without(P_BEHIND, 5),
            "80 queries: middle of p not multiplied": _without(P_BEHIND, 2),
            "80 queries: end of p not multiplied": _without(P_BEHIND, 6),
            "80 queries: ds of both consumers in one place": (
                "Tile::split || Tile::turned ? consumer * Tile::ds_slab : below * 128",
                "Tile::split ? consumer * Tile::ds_slab : Tile::turned ? 0 : below * 128",
            ),
            "80 queries: 64 decide on the mask": ("at.mask.first_key(row + span - 1)", "at.mask.first_key(row + 63)"),
            "ds read before all have written it": _without(SHARED, 0, 1),
            "ds read before the other consumer has written it": (SHARED, "consumer_sync<1>(consumer, 128);"),
            "one buffer for ds": ("ds + step % 2 * Tile::ds_bytes", "ds"),
            "dk and dv not waited for": ("wgmma_wait<1>(own.dv, own.dk);", ";"),
            "dq not waited for": _without(WHOLE, 2),
            "stages given back before they are read": (
                "wgmma_wait<1>(own.dv, own.dk);",
                "release(&q_empty[stage]);\nwgmma_wait<1>(own.dv, own.dk);",
            ),
            "q never given back": (WHOLE, WHOLE.replace("release(&q_empty[stage]), ", "")),
            "dq of halved columns not waited for": _without(SPLIT, 0),
            "second half of dq not waited for": _without(SPLIT, 6),
            "second half of dq without a fence": _without(SPLIT, 1),
            "second half of dq is the first": (SPLIT, SPLIT.replace("descriptor_behind(of_k, Tile::kv_slab)", "of_k")),
            "dq written over a part that is being added": ("consumer_sync<5>(consumer, 160);", ";"),
            "dq not shown to the copy engine": _without(PUT, 0),
            "dq of one consumer never added": ("add(1, piece);", ";"),
            "from registers: one place for the pieces": (
                "to += (consumer * Tile::pieces + piece) * Tile::part;",
                "to += consumer * Tile::pieces * Tile::part;",
            ),
            "from registers: sums of the first head for all": (
                "if (++tile == at.end) {\n@tile = at.first, line += plan.q_tiles, ++head;@",
                "tile = at.first, ++head;",
            ),
            "from registers: added by way of shared memory too": (
                "thread / 32 == 1 && !plan.from_registers",
                "thread / 32 == 1",
            ),
            "dq given back while it is being read": ("@tma_wait_read<0>();@\n}\nsync_warp();", ";"),
            "no turn waited for": ("while (atomic_add(turn, 0) != mine) yield_thread();", ";"),
            "the next one's turn before this one has added": _without(ADDED, 0),
            "turns in any order": (
                "p.turns == nullptr ? within / heads : p.k_tiles - 1 - within / heads",
                "within / heads",
            ),
            "dk and dv written over k and v that are read": (
                "barrier_sync<7>(256);  // all products that read k and v are done",
                ";",
            ),
            "dk and dv not shown to the copy engine": (
                "fence_async();\nconsumer_sync<1>(consumer, 128);",
                "consumer_sync<1>(consumer, 128);",
            ),
            "dk and dv stored before all have written them": (
                "fence_async();\nconsumer_sync<1>(consumer, 128);",
                "fence_async();",
            ),
            "only the diagonal decides on the mask": (
                "from + 64 > at.mask.behind_key(row) || from < at.mask.first_key(row + span - 1)",
                "from + 64 > at.mask.behind_key(row)",
            ),
            "only the window decides on the mask": (
                "from + 64 > at.mask.behind_key(row) || from < at.mask.first_key(row + span - 1)",
                "from < at.mask.first_key(row + span - 1)",
            ),
            "slope of the first head for all": (
                "if (Featured && step + 1 < steps) slope = plan.scoring.slope(at.sample, head);",
                ";",
            ),
            "dropout of dv not made good": ("if (Featured) own.dv[i] *= plan.scoring.kept;", ";"),
            "last tile of queries missing": (
                "end = max(first, ceil_div(max(behind, 0), Tile::rows));",
                "end = max(first, max(behind, 0) / Tile::rows);",
            ),
            "lines of the first head for all": (
                "if (++tile == at.end) tile = at.first, line += plan.q_tiles, ++head;",
                "if (++tile == at.end) tile = at.first, ++head;",
            ),
        },
    )
    + _of(
        "backward",
        "attention_backward_keys.cuh",
        BACKWARD,
        {
            "80 queries: ds of one consumer for both": ("step / 4 * Tile::ds_slab + step % 4 * 32", "step % 4 * 32"),
        },
    )
    + _of(
        "backward",
        "attention_backward.cuh",
        BACKWARD,
        {
            "sums of dq not zeroed": (
                "store(sums + i + 4 * thread, filled<float, 4>(0.0f));",
                ";",
            ),
            "turns not zeroed": ("if (plan.turns != nullptr && thread == 0) plan.turns[line] = 0;", ";"),
            "rows that see nothing": ("log == -INFINITY ? INFINITY : log * kLog2E", "log * kLog2E"),
            "rows behind the end": ("inside && col < r.D", "col < r.D"),
            "rounded dq not shown to the copy engine": ("fence_async();\nsync_block();", "sync_block();"),
            "rounded dq stored before all have written it": ("fence_async();\nsync_block();", "fence_async();"),
        },
    )
)

WEIGHT = "exp_approx(p.part_lse[i * p.lse_split + at] - base) * factor"
SUM = "total += exp_approx(p.part_lse[i * p.lse_split + at] - base);"
MOST = "most = fmaxf(most, p.part_lse[i * p.lse_split + at]);"
AHEAD = """
if (ahead < high) mine.fetch(stage == 0 ? Tile::stages - 1 : stage - 1, ahead * Tile::keys, page);
cp_async_commit();
page = mine.page_of((ahead + kDecodeWarps) * Tile::keys);"""

BUGS += _of(
    "decode",
    "attention_decode.cu",
    DECODE,
    {
        "keys not waited for": ("cp_async_wait<Tile::stages - 2>();", ";"),
        "keys waited for one tile too late": (
            "cp_async_wait<Tile::stages - 2>();",
            "cp_async_wait<Tile::stages - 1>();",
        ),
        "groups only where there are keys": (
            AHEAD,
            """
if (ahead < high) mine.fetch(stage == 0 ? Tile::stages - 1 : stage - 1, ahead * Tile::keys, page), cp_async_commit();
page = mine.page_of((ahead + kDecodeWarps) * Tile::keys);""",
        ),
        "the stage in use fetched into": (AHEAD, AHEAD.replace("stage == 0 ? Tile::stages - 1 : stage - 1", "stage")),
        "the page of the tile before": _without(AHEAD, 2),
        "stages in the wrong order": (
            "stage = stage == Tile::stages - 1 ? 0 : stage + 1;",
            "stage = stage == 0 ? Tile::stages - 1 : stage - 1;",
        ),
        "queries not waited for": ("@sync_block();@\n\nconst float unit", ";"),
        "sums not scaled": ("any(fade[0] != 1.0f || fade[1] != 1.0f)", "false"),
        "sums of one row scaled alone": ("any(fade[0] != 1.0f || fade[1] != 1.0f)", "any(fade[0] != 1.0f)"),
        "results written over stages that are read": ("cp_async_wait<0>();\nsync_block();", "cp_async_wait<0>();"),
        "results of other warps not waited for": ("@sync_block();@\nconst int line = int(threadIdx.x) / 8", ";"),
        "one warp forgotten in the maximum": (
            "for (int w = 0; w < kDecodeWarps; ++w) most = fmaxf(most, logs[w * kDecodeRows + line]);",
            "for (int w = 0; w < kDecodeWarps - 1; ++w) most = fmaxf(most, logs[w * kDecodeRows + line]);",
        ),
        "one warp forgotten in the sum": (
            "total += weight[w] * totals[w * kDecodeRows + line];",
            "if (w != 1) total += weight[w] * totals[w * kDecodeRows + line];",
        ),
        "weights of warps all alike": (
            "most == -INFINITY ? 0.0f : exp2_approx(logs[w * kDecodeRows + line] - most)",
            "1.0f",
        ),
        "combine: the last piece forgotten": (WEIGHT, f"i == p.splits - 1 ? 0.0f : {WEIGHT}"),
        "combine: the first piece forgotten": (WEIGHT, f"i == 0 ? 0.0f : {WEIGHT}"),
        "combine: a piece forgotten in the sum": (SUM, f"if (i != 1) {SUM}"),
        "combine: pieces beyond a warp forgotten in the sum": (SUM, f"if (i < 32) {SUM}"),
        "combine: a piece forgotten in the maximum": (MOST, f"if (i > 0) {MOST}"),
        "combine: pieces beyond a warp forgotten in the maximum": (MOST, f"if (i < 32) {MOST}"),
        "combine: pieces all alike": (WEIGHT, "factor"),
        "combine: pieces without keys": ("@most == -INFINITY ? 0.0f : most@;", "most"),
        "lengths not looked at": ("p.lengths == nullptr ? p.S : p.lengths[sample]", "p.S"),
        "what is behind the keys read": ("key + row < behind && piece * 8 < p.D", "piece * 8 < p.D"),
        "columns behind D read": ("key + row < behind && piece * 8 < p.D", "key + row < behind"),
        "whole tiles: columns behind D read": ("const bool inside = @piece * 8 < p.D@;", "true"),
        "whole tiles: rows behind the keys read": ("one_page && key + Tile::keys <= behind", "one_page"),
        "whole tiles: pages that end within": ("Tile::keys <= 1 << p.page_shift", "true"),
        "whole tiles: always the page's first keys": ("key & ((1 << p.page_shift) - 1)", "0"),
        "whole tiles: steps of one row": ("inside ? high * p.v_by.token : 0", "inside ? p.v_by.token : 0"),
        "keys before the window not masked": (
            "key + Tile::keys > mask.behind_key(top) || key < mask.first_key(bottom)",
            "key + Tile::keys > mask.behind_key(top)",
        ),
        "keys behind the diagonal not masked": (
            "key + Tile::keys > mask.behind_key(top) || key < mask.first_key(bottom)",
            "key < mask.first_key(bottom)",
        ),
        "one piece of keys twice": ("min(start + tiles, low + piece)", "min(start + tiles, low + piece + 1)"),
        "the last tile missing": ("ceil_div(behind, Tile::keys) - start", "behind / Tile::keys - start"),
        "sums of one lane alone": ("total += shuffle_xor(total, 1);", ";"),
    },
)
