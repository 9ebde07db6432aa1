// y = epilogue(W @ x * rsqrt(mean(x^2) + eps)) for one row x, on CUDA cores. See shared.cuh for what is common.
//
//   LINES   rows of W that a warp multiplies at once; under ACT pairs of one row from each half
//   GROUPS  groups of PARTS warps in a block; each group has rows of its own
//
// Bytes moved: W once, x from cache; a product of one row is a read of W. So the limit is a read kernel.
//
// Sixteen bytes of W cost a thread 8 fused multiply-adds and 8 conversions, about a fifth of what CUDA cores can do at
// the rate that memory delivers: tensor cores would have nothing to gain.

#define STEP (PARTS * 32)  // accesses of a group in a turn
#define TURNS ((VECS + STEP - 1) / STEP)
#define EVEN (VECS % STEP == 0)
#define OUTPUTS (ACT ? LINES / 2 : LINES)
#define THREADS (GROUPS * PARTS * 32)
#define AHEAD (TURNS < 8 ? TURNS : 8)  // accesses of x that are read together

static_assert(DEPTH <= TURNS, "nothing is fetched beyond the last turn");

extern "C" __global__ void __launch_bounds__(THREADS) one_row(const Args args) {
    __shared__ float sums[GROUPS][PARTS][LINES + 1];
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = warp / PARTS, part = warp % PARTS;
    const u32 first = (blockIdx.x * GROUPS + group) * OUTPUTS;
    const u32 at = part * 32 + lane;
    uint4* const mine = slots + threadIdx.x;
    const char* lines[LINES];
    let_next_come();
#pragma unroll
    for (int i = 0; i < LINES; i++) {
        const u32 output = first + (ACT ? i / 2 : i);
        const u32 line = (output < args.n ? output : args.n - 1) + (ACT && i % 2 ? args.n : 0);
        lines[i] = args.w + i64(line) * args.w_stride + at * 16;
    }
    if (!args.early) wait_for_previous();
#pragma unroll
    for (int turn = 0; turn < DEPTH; turn++) {
#pragma unroll
        for (int i = 0; i < LINES; i++) {
            const bool there = EVEN || at + turn * STEP < VECS;
            fetch(mine + (turn * LINES + i) * THREADS, there ? lines[i] + turn * STEP * 16 : args.w, there);
        }
        end_turn();
    }
    wait_for_previous();

    float sum[LINES] = {}, squares = 0.0f;
#pragma unroll 1  // code that is not in the instruction cache yet costs more than the loop
    for (int start = 0; start < TURNS; start += AHEAD) {
        uint4 ahead[AHEAD];
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            const u32 access = at + (start + i) * STEP;
            ahead[i] = make_uint4(0, 0, 0, 0);
            if (start + i < TURNS && (EVEN || access < VECS)) ahead[i] = load(args.x + access * 16);
        }
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            const int turn = start + i;
            if (turn < TURNS) {
                float x[8];
                values(ahead[i], x);
                if (NORM) {
#pragma unroll
                    for (int j = 0; j < 8; j++) squares = mul_add(x[j], x[j], squares);
                }
                wait_for_turn();
#pragma unroll
                for (int line = 0; line < LINES; line++) {
                    uint4* const slot = mine + (turn % DEPTH * LINES + line) * THREADS;
                    float w[8];
                    values(*slot, w);
#pragma unroll
                    for (int j = 0; j < 8; j++) sum[line] = mul_add(w[j], x[j], sum[line]);
                    if (turn + DEPTH < TURNS) {
                        const bool there = EVEN || at + (turn + DEPTH) * STEP < VECS;
                        fetch(slot, there ? lines[line] + (turn + DEPTH) * STEP * 16 : args.w, there);
                    }
                }
                end_turn();
            }
        }
    }

#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
#pragma unroll
        for (int i = 0; i < LINES; i++) sum[i] = add(sum[i], __shfl_xor_sync(0xffffffffu, sum[i], step));
        if (NORM) squares = add(squares, __shfl_xor_sync(0xffffffffu, squares, step));
    }
    if (lane == 0) {
#pragma unroll
        for (int i = 0; i < LINES; i++) sums[group][part][i] = sum[i];
        sums[group][part][LINES] = squares;
    }
    if (PARTS > 1) {
        __syncthreads();
    } else {
        __syncwarp();
    }
    if (part == 0 && lane < OUTPUTS && first + lane < args.n) {
        float product = 0.0f, second = 0.0f;
        squares = 0.0f;
#pragma unroll
        for (int i = 0; i < PARTS; i++) {
            product = add(product, sums[group][i][ACT ? 2 * lane : lane]);
            if (ACT) second = add(second, sums[group][i][2 * lane + 1]);
            squares = add(squares, sums[group][i][LINES]);
        }
        finish(args, 0, first + lane, product, second, NORM ? scale_of(squares, args.eps) : 1.0f);
    }
}
