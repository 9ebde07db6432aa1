// b = a, `rows` accesses of 16 bytes: the limit that the benchmark compares the norms with. No product feature.
// A thread copies ROWS accesses, all read before the first is written. It reads as the norms do (POLICY).

extern "C" __global__ void __launch_bounds__(THREADS) copy(const Args args) {
    const u64 first = u64(blockIdx.x) * (THREADS * ROWS) + threadIdx.x;
    Pack kept[ROWS];
    begin();
#pragma unroll
    for (int i = 0; i < ROWS; i++) {
        if (first + i * THREADS < args.rows) kept[i] = load_once(args.a + (first + i * THREADS) * WIDTH);
    }
#pragma unroll
    for (int i = 0; i < ROWS; i++) {
        if (first + i * THREADS < args.rows) store(args.b + (first + i * THREADS) * WIDTH, kept[i]);
    }
}
