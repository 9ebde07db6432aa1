// residual = x + residual, rounded to its dtype; then x = rms_norm(residual), or one of its weighted twins.
// In place, vLLM's meaning of the operation. The norm is that of what was written, as in transformers, where the sum
// is a tensor of the model's dtype (FlashInfer and quack take it of the unrounded sum).
//
// Bytes moved: two reads and two writes per element (KEEP; one more read otherwise). An add and a norm apart move
// three reads and two writes, in two launches.
//
// SPLIT > 1 (sm_90), for few long rows: the blocks of a cluster share a row. Each handles its own part and sends the
// sum of its squares into the shared memory of the others; a cluster barrier takes the place of the block's. Blocks
// that read the whole row, as in rms_norm.cu, would see parts that others have overwritten.

#define PART ((ACCESSES + SPLIT - 1) / SPLIT)  // accesses of a block
#define PART_PER ((PART + THREADS - 1) / THREADS)
#define PART_EVEN (ACCESSES % (SPLIT * THREADS) == 0)
#define PART_EARLY (GAIN && PART_PER <= 4)

#if SPLIT > 1
// The sum over the cluster. Blocks meet once at their start (arrived in the kernel's first line), so that nobody
// writes into shared memory of a block that does not run yet, and once when all sums are there.
__device__ __forceinline__ float cluster_sum(float sum, int part) {
    __shared__ float parts[SPLIT];
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
    if (threadIdx.x < SPLIT) {
        u32 mine = u32(__cvta_generic_to_shared(&parts[part])), theirs;
        asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(theirs) : "r"(mine), "r"(threadIdx.x));
        asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(theirs), "f"(sum) : "memory");
    }
    asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");
    sum = 0.0f;
#pragma unroll
    for (int i = 0; i < SPLIT; i++) sum = add(sum, parts[i]);
    return sum;
}
#endif

extern "C" __global__ void __launch_bounds__(THREADS * ROWS)
#if SPLIT > 1
    __cluster_dims__(SPLIT, 1, 1)
#endif
    fused_add_rms_norm(const Args args) {
#if SPLIT > 1
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
    const int thread = ROWS == 1 ? threadIdx.x : threadIdx.x % THREADS;
    const u64 row = u64(blockIdx.x / SPLIT) * ROWS + (ROWS == 1 ? 0 : threadIdx.x / THREADS);
    const bool live = ROWS == 1 || row < args.rows;  // all threads stay for the shuffles and the barrier
    const Row at = find_row(args, live ? row : 0);
    char* const x = const_cast<char*>(args.a) + at.a;
    char* const residual = args.b + at.b;
    float sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    begin();

#if KEEP
    const int part = SPLIT == 1 ? 0 : blockIdx.x % SPLIT;
    const int first = part * PART, end = first + PART < ACCESSES ? first + PART : ACCESSES;
    Pack kept[PART_PER], added[PART_PER], gains[PART_PER];
#pragma unroll
    for (int i = 0; i < PART_PER; i++) {
        const int access = first + i * THREADS + thread;
        if (live && (PART_EVEN || access < end)) {
            added[i] = load_once(x + offset_of(access, args.a_step));
            kept[i] = load_once(residual + offset_of(access, args.b_step));
        }
        if (PART_EARLY && (PART_EVEN || access < end)) gains[i] = load_gain(args, access);
    }
#pragma unroll
    for (int i = 0; i < PART_PER; i++) {
        const int access = first + i * THREADS + thread;
        if (live && (PART_EVEN || access < end)) {
            float f[VALUES];
#pragma unroll
            for (int j = 0; j < VALUES; j++) f[j] = add(value(added[i], j), value(kept[i], j));
            kept[i] = pack(f);
            store(residual + offset_of(access, args.b_step), kept[i]);
            add_squares(sums, kept[i]);
        }
    }
#else
#pragma unroll 4
    for (int access = thread; access < ACCESSES; access += THREADS) {
        if (live) {
            const Pack a = load(x + offset_of(access, args.a_step));
            const Pack b = load(residual + offset_of(access, args.b_step));
            float f[VALUES];
#pragma unroll
            for (int j = 0; j < VALUES; j++) f[j] = add(value(a, j), value(b, j));
            const Pack sum = pack(f);
            store(residual + offset_of(access, args.b_step), sum);
            add_squares(sums, sum);
        }
    }
#endif

    float sum = row_sum(sums);
#if SPLIT > 1
    sum = cluster_sum(sum, part);
#endif
    const float scale = scale_of(sum, args.eps);

#if KEEP
#pragma unroll
    for (int i = 0; i < PART_PER; i++) {
        const int access = first + i * THREADS + thread;
        if (live && (PART_EVEN || access < end)) {
            const Pack gain = PART_EARLY ? gains[i] : load_gain(args, access);
            store(x + offset_of(access, args.a_step), normed(kept[i], scale, gain));
        }
    }
#else
    // Every thread reads back what it wrote itself.
#pragma unroll 4
    for (int access = thread; access < ACCESSES; access += THREADS) {
        const Pack v = load(residual + offset_of(access, args.b_step));
        if (live) store(x + offset_of(access, args.a_step), normed(v, scale, load_gain(args, access)));
    }
#endif
}
