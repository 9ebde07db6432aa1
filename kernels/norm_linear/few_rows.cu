// y = epilogue(W @ x * rsqrt(mean(x^2) + eps)) for 2 to 16 rows x, on tensor cores. See shared.cuh for what is common.
//
//   TILES   tiles of 16 rows of W that a warp multiplies at once; under ACT a tile is 8 rows of each half
//   ROWS8   1 for up to 8 rows of x, 2 for up to 16
//   CHUNKS  stretches of 32 elements of K that a warp takes in a turn
//
// Bytes moved: W once. x comes from L2 once per block, so with 16 rows it is as much again as a block's part of W per
// tile: more tiles, less of it.
//
// mma.m16n8k16 takes W as its 16 x 16 side and rows of x as its 16 x 8 side. Which k is which does not matter to a sum
// as long as both sides agree. So lane (g, t) of a warp takes elements 8t .. 8t + 7 of a stretch of 32, of rows g and
// g + 8 of W and of row g of x, 16 bytes each as they lie in memory, and hands them to two mma as they are: no ldmatrix,
// no shuffles, no transposition.

#define STRETCHES ((VECS + 3) / 4)
#define STEP (PARTS * CHUNKS)  // stretches of a block in a turn
#define TURNS ((STRETCHES + STEP - 1) / STEP)
#define EVEN (VECS % (4 * STEP) == 0)
#define OUTPUTS (ACT ? 8 : 16)  // of a tile
#define THREADS (PARTS * 32)
#define FETCHED (TILES * CHUNKS * 2)  // accesses of W of a thread in a turn
#define PITCH 20  // floats from column to column of a tile's sums: no two lanes of a warp meet in a bank
#define SUMS (TILES * ROWS8 * 8 * PITCH)
#define AHEAD_ (8 / (CHUNKS * ROWS8))
#define AHEAD (AHEAD_ < 1 ? 1 : AHEAD_ < TURNS ? AHEAD_ : TURNS)  // turns whose x is read together

__device__ __forceinline__ void multiply(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
#if DTYPE == 1
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
#else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
#endif
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// A turn's weights on their way. Slot 2i holds a row of the tile's first half, 2i + 1 the one 8 rows on.
__device__ __forceinline__ void fetch_turn(uint4* mine, const char* const (&low)[TILES], const char* const (&high)[TILES],
                                           const char* nothing, u32 at, int turn) {
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
#pragma unroll
            for (int chunk = 0; chunk < CHUNKS; chunk++) {
                const u32 access = (turn * STEP + chunk) * 4;
                const bool there = EVEN || at + access < VECS;
                const char* const from = (half ? high[tile] : low[tile]) + access * 16;
                const int slot = turn % DEPTH * FETCHED + (tile * CHUNKS + chunk) * 2 + half;
                fetch(mine + slot * THREADS, there ? from : nothing, there);
            }
        }
    }
}

static_assert(DEPTH <= TURNS, "nothing is fetched beyond the last turn");

extern "C" __global__ void __launch_bounds__(THREADS) few_rows(const Args args) {
    __shared__ float squares_of[PARTS][ROWS8 * 8];
    const u32 lane = threadIdx.x % 32, part = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const u32 first = blockIdx.x * (TILES * OUTPUTS);
    const u32 at = part * CHUNKS * 4 + t;
    uint4* const mine = slots + threadIdx.x;
    const char *low[TILES], *high[TILES];
    let_next_come();
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
        const u32 a = first + tile * OUTPUTS + g, b = ACT ? a : a + 8;
        low[tile] = args.w + i64(a < args.n ? a : args.n - 1) * args.w_stride + at * 16;
        high[tile] = args.w + i64((b < args.n ? b : args.n - 1) + (ACT ? args.n : 0)) * args.w_stride + at * 16;
    }
    if (!args.early) wait_for_previous();
#pragma unroll
    for (int turn = 0; turn < DEPTH; turn++) {
        fetch_turn(mine, low, high, args.w, at, turn);
        end_turn();
    }
    wait_for_previous();

    float sum[TILES][ROWS8][4] = {}, squares[ROWS8] = {};
    const char* rows[ROWS8];
#pragma unroll
    for (int m = 0; m < ROWS8; m++) rows[m] = args.x + (m * 8 + g) * args.x_stride + at * 16;
#pragma unroll 1  // code that is not in the instruction cache yet costs more than the loop
    for (int start = 0; start < TURNS; start += AHEAD) {
        uint4 ahead[AHEAD][CHUNKS][ROWS8];
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
#pragma unroll
            for (int chunk = 0; chunk < CHUNKS; chunk++) {
#pragma unroll
                for (int m = 0; m < ROWS8; m++) {
                    const u32 access = ((start + i) * STEP + chunk) * 4;
                    ahead[i][chunk][m] = make_uint4(0, 0, 0, 0);
                    if (start + i < TURNS && m * 8 + g < args.rows && (EVEN || at + access < VECS)) {
                        ahead[i][chunk][m] = load(rows[m] + access * 16);
                    }
                }
            }
        }
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            const int turn = start + i;
            if (turn < TURNS) {
                wait_for_turn();
#pragma unroll
                for (int chunk = 0; chunk < CHUNKS; chunk++) {
                    if (NORM) {
#pragma unroll
                        for (int m = 0; m < ROWS8; m++) {
                            float x[8];
                            values(ahead[i][chunk][m], x);
#pragma unroll
                            for (int j = 0; j < 8; j++) squares[m] = mul_add(x[j], x[j], squares[m]);
                        }
                    }
#pragma unroll
                    for (int tile = 0; tile < TILES; tile++) {
                        const int slot = turn % DEPTH * FETCHED + (tile * CHUNKS + chunk) * 2;
                        const uint4 a = mine[slot * THREADS], b = mine[(slot + 1) * THREADS];
#pragma unroll
                        for (int m = 0; m < ROWS8; m++) {
                            const uint4 x = ahead[i][chunk][m];
                            multiply(sum[tile][m], a.x, b.x, a.y, b.y, x.x, x.y);
                            multiply(sum[tile][m], a.z, b.z, a.w, b.w, x.z, x.w);
                        }
                    }
                }
                if (turn + DEPTH < TURNS) fetch_turn(mine, low, high, args.w, at, turn + DEPTH);
                end_turn();
            }
        }
    }

    // The warps' sums meet in shared memory, where the weights were.
    float* const sums = reinterpret_cast<float*>(slots);
    __syncthreads();
#pragma unroll
    for (int m = 0; m < ROWS8; m++) {
        if (NORM) {
            squares[m] = add(squares[m], __shfl_xor_sync(0xffffffffu, squares[m], 1));
            squares[m] = add(squares[m], __shfl_xor_sync(0xffffffffu, squares[m], 2));
            if (t == 0) squares_of[part][m * 8 + g] = squares[m];
        }
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
            float* const to = sums + part * SUMS + (tile * ROWS8 + m) * (8 * PITCH);
#pragma unroll
            for (int i = 0; i < 4; i++) to[(2 * t + i % 2) * PITCH + g + i / 2 * 8] = sum[tile][m][i];
        }
    }
    __syncthreads();
    for (u32 i = threadIdx.x; i < TILES * OUTPUTS * args.rows; i += THREADS) {
        const u32 row = i / (TILES * OUTPUTS), within = i % (TILES * OUTPUTS), tile = within / OUTPUTS;
        const u32 output = first + within;
        if (output >= args.n) continue;
        const float* const from = sums + (tile * ROWS8 + row / 8) * (8 * PITCH) + row % 8 * PITCH + within % OUTPUTS;
        float product = 0.0f, second = 0.0f, all_squares = 0.0f;
#pragma unroll
        for (int p = 0; p < PARTS; p++) {
            product = add(product, from[p * SUMS]);
            if (ACT) second = add(second, from[p * SUMS + 8]);
            if (NORM) all_squares = add(all_squares, squares_of[p][row]);
        }
        finish(args, row, output, product, second, NORM ? scale_of(all_squares, args.eps) : 1.0f);
    }
}
