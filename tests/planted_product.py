"""The bugs that `tests/planted.py` plants in the products of linear layers: tails, slices, stages, fences, parts.

Not here, as nothing can tell them from the right kernel:
- a head start that is shorter, or bands of other tiles: only speed;
- the device's fences around arrivals, and the `sync_warp` between them: the emulator's blocks run one after another;
- a `sync_warp` behind which the next instruction of the warp brings the lanes together: the wait for products behind
  the sums of a stage's rows, `elect_lane` before a store;
- tests of a piece's row and column before it is stored, as TMA writes nothing outside of a matrix.
"""

from __future__ import annotations

from tests.planted import Bug

LINEAR, MLP = "tests/kernels/test_linear.py", "tests/kernels/test_mlp.py"
LOOP, FOLLOWS = "product.cuh", "device/epilogue.cuh"


def _of(file: str, tests: tuple[str, ...], bugs: dict[str, tuple[str, str]]) -> list[Bug]:
    return [Bug(f"product: {name}", file, old, new, tests) for name, (old, new) in bugs.items()]


BUGS = [
    *_of(LOOP, (LINEAR,), {
        "no last step where 64 does not divide K":
            ("steps(@ceil_div(p.K, Tile::depth)@)", "max(1, p.K / Tile::depth)"),
        "a band's last tiles have the height of the others": ("@min(down - first, band)@;", "band"),
        "the producer fetches into a stage that is being read":
            ("mbar_wait(&empty[ring.stage], ring.phase ^ 1);", ";"),
        "the producer waits for the phase before": ("@ring.phase ^ 1@);\nfetch", "ring.phase"),
        "products of a stage that is not there": ("mbar_wait(&full[ring.stage], ring.phase);", ";"),
        "no fence before the products": ("wgmma_fence();", ";"),
        "a stage is given back a step early": ("wgmma_wait<1>();", ";"),
        "the stage of this step is given back": ("if (previous >= 0) release(@previous@);", "ring.stage"),
        "the last stage of a tile is kept":
            ("@release(previous);@\n\nif (a_major_m && summing) sums.write", ";"),
        "sums are read while the last products run":
            ("else @wgmma_wait<0>(d[0], d[1]);@", "wgmma_wait<1>(d[0], d[1]);"),
        "sums of the tile before are added to": ("@step > 0 || k > 0@", "true"),
        "rows of both consumers are the first's": ("const int row = @task.row + top@", "task.row"),
        "the second 64 rows are the first": ("@64 * m * 128@ + (a_major_m", "0"),
        "steps along M as along K": ("b, b_major_n ? @k * 2048@ : k * 32", "k * 32"),
        "the other consumer's tile takes as many steps as a whole one":
            ("ring.advance(@schedule.steps_of(index)@);", "schedule.steps"),
        "consumers in any order": ("if (consumer == 0) barrier_sync<1>(256);\nelse barrier_sync<2>(256);", ";"),
        "half of B is the other block's": ("@b + rank * half * 128@, b_map, full, k, col", "b"),
        "the other block's half of B is this one's": ("full, k, @col + rank * half@, both", "col"),
        "a stage is free when one block has read it":
            ("@Tile::readers * 4 * Tile::cluster@, \"empty\"", "Tile::readers * 4"),
        "blocks of a cluster begin apart":
            ("(Tile::cluster == 1) sync_block();\nelse @cluster_arrive(), cluster_wait();@", "sync_block();"),
        "sums of rows of the first part alone": ("@4 * max(task.part, 0) + warp@", "warp"),
        "half of the sums of rows": ("total[m][j] += @shuffle_xor(total[m][j], 16)@;", "0.0f"),
        "parts one above the other": ("parts + @task.part * Tile::area@;", "0"),
        "the first part adds them all": ("@before == p.splits - 1@", "before == 0"),
        "a part begins where the last one does": ("@before(t.part)@, t.steps", "before(0)"),
        "the tile in parts is that before": ("index = @whole + t.tile@;", "max(0, whole + t.tile - 1)"),
        "the block leaves before its stores have read":
            ("if (elect_lane()) tma_wait_read<0>();  // that they have arrived is sure when the grid is done", ";"),
    }),
    *_of(FOLLOWS, (LINEAR, MLP), {
        "parts are added in the order of blocks":
            ("v[i] += @from[32 * i]@;",
             "sums[32 * (first + i) + std::int64_t((n + int(blockIdx.x)) % parts) * Stride]"),
        "the bias of the first columns": ("const int c = @col + 2 * lane@;", "2 * lane"),
        "the bias of a slice is the first slice's": ("4 * j + @first / 2@ + lane % 4", "0"),
        "the bias of the last chunk begins where the one before ends":
            ("i / count, @col + at(i % count)@", "col + i % count * width"),
        "up's bias is the gate's": ("static_cast<const std::uint32_t*>(p.bias[@which@])", "0"),
        "a bias of fp32 is read as 16 bits": ("if (@p.bias_is_fp32@) to[0]", "false"),
        "rows of what is added 8 off": ("lane / 4 + @8 * h@, c = col", "0"),
        "what is added to the chunk is the one before's": ("load_ahead(row, @place + width@);", "place"),
        "what is added to a slice is the first one's":
            ("@load_next<N>(added, row, col, first);@\n}\nwrite(", ";"),
        "what a slice of dx reads is the first one's": ("load_next<N>(saved, row, col, first);", ";"),
        "what a slice of dW reads is the first one's":
            ("@load_next<N>(added, row, col, first);@\nwrite(out_map, v, row, col, first, 0);", ";"),
        "out that was changed is added to again":
            ("beside[i] = @beside[(width - known) / 4 + i]@;", "beside[i]"),
        "a piece is written while its store reads it":
            ("if (elect_lane()) tma_wait_read<Tile::chunks - Chunks>();", ";"),
        "pieces side by side wait for one": ("else @open<most>();@\n} else if", "open<1>();"),
        "no fence before the store": ("fence_async();", ";"),
        "the same piece each time": ("turn = @(turn + 1) % Tile::chunks@;", "0"),
        "dW of fp32 is overwritten": ("if (@wide && p.accumulate@) tma_add_2d", "false"),
        "dW is rounded before it is added":
            ("if (p.beside[0] != nullptr) combine(v, added, [](float x, float a) { return @x + a@; });\nload_next",
             "to_float(from_float<T>(x)) + a"),
        "what is kept is not what the activation saw": ("v[i] = @to_float(from_float<T>(v[i]))@;", "v[i]"),
        "the derivative is of the gradient, not of what was saved":
            ("return @x * slope<decltype(k)::value>(pre)@;", "pre * slope<decltype(k)::value>(x)"),
        "silu's derivative has no second term": ("@(1.0f + gate[e] * (1.0f - share))@", "1.0f"),
        "up's columns are the gate's": ("sums.read(up, @(cols + at(C) + first) / 2@);", "(at(C) + first) / 2"),
        "both pre-activations are the gate's":
            ("if (stores > 2) finish(third_map, @chunk()@, row, place);", "chunk(3)"),
        "fp32 columns 8 off": ("const int piece = @2 * j + lane % 4 / 2@", "lane % 4 / 2"),
    }),
    *_of("linear.cu", (LINEAR,), {
        "the last warp's sums of columns are lost": ("for (int w = 0; w < @8@; ++w) sum += sums[w * 256", "7"),
        "parts of columns: every second": ("for (int64_t j = warp; j < p.P; j += @8@)", "16"),
        "columns beside the last are written":
            ("if (@own < p.N@) p.parts", "true"),
        "out that is added to is not read": ("@p.accumulate && !by_tma@;", "false"),
    }),
]  # fmt: skip
