// y = x * rsqrt(mean(x^2) + eps), and its weighted twins y * w and y * (1 + w), over rows of HIDDEN elements.
// float32 inside, rounded once. x and y may be the same tensor when SPLIT is 1.
//
// Bytes moved: every element is read once and written once (KEEP; twice and once otherwise, the second time mostly
// from L2), and the gain is read from cache. So the limit is a copy.
//
// SPLIT > 1, for few long rows: each block reads the whole row for its sum (from L2 after the first) and writes only
// its own part. That needs no synchronisation between blocks; it is also why y must not be x then.

// Whether a block writes the accesses that its threads hold at i.
__device__ __forceinline__ bool mine(int i, int part) { return SPLIT == 1 || i * SPLIT / PER == part; }

extern "C" __global__ void __launch_bounds__(THREADS * ROWS) rms_norm(const Args args) {
    const int thread = ROWS == 1 ? threadIdx.x : threadIdx.x % THREADS;
    const u64 row = u64(blockIdx.x / SPLIT) * ROWS + (ROWS == 1 ? 0 : threadIdx.x / THREADS);
    const bool live = ROWS == 1 || row < args.rows;  // all threads stay for the shuffles and the barrier
    const Row at = find_row(args, live ? row : 0);
    const char* const x = args.a + at.a;
    char* const y = args.b + at.b;
    float sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    begin();

#if KEEP
    const int part = SPLIT == 1 ? 0 : blockIdx.x % SPLIT;
    Pack kept[PER], gains[PER];
#pragma unroll
    for (int i = 0; i < PER; i++) {
        const int access = i * THREADS + thread;
        if (live && (EVEN || access < ACCESSES)) kept[i] = load_once(x + offset_of(access, args.a_step));
    }
#pragma unroll
    for (int i = 0; i < PER; i++) {
        const int access = i * THREADS + thread;
        if (EARLY && (EVEN || access < ACCESSES) && mine(i, part)) gains[i] = load_gain(args, access);
    }
#pragma unroll
    for (int i = 0; i < PER; i++) {
        if (live && (EVEN || i * THREADS + thread < ACCESSES)) add_squares(sums, kept[i]);
    }
    const float scale = scale_of(row_sum(sums), args.eps);
#pragma unroll
    for (int i = 0; i < PER; i++) {
        const int access = i * THREADS + thread;
        if (live && (EVEN || access < ACCESSES) && mine(i, part)) {
            const Pack gain = EARLY ? gains[i] : load_gain(args, access);
            store(y + offset_of(access, args.b_step), normed(kept[i], scale, gain));
        }
    }
#else
#pragma unroll 4
    for (int access = thread; access < ACCESSES; access += THREADS) {
        if (live) add_squares(sums, load(x + offset_of(access, args.a_step)));
    }
    const float scale = scale_of(row_sum(sums), args.eps);
#pragma unroll 4
    for (int access = thread; access < ACCESSES; access += THREADS) {
        const Pack v = load(x + offset_of(access, args.a_step));
        if (live) store(y + offset_of(access, args.b_step), normed(v, scale, load_gain(args, access)));
    }
#endif
}
