// What both norms share: how a row is found, read, summed and written. The host puts this file in front of an
// operation's own, so nothing is included and NVRTC needs no headers.
//
// One kernel is compiled per set of choices, given as -D options (flashnorm_cli/cuda/variants.py chooses):
//   DTYPE    0 bfloat16, 1 float16, 2 float32
//   GAIN     0 none, 1 w, 2 1 + w
//   HIDDEN   elements in a row, known to the compiler: no bounds checks where the threads divide it
//   WIDTH    bytes per access: 16, or less where a pointer, a stride or HIDDEN does not allow it
//   THREADS  threads that share a row: a power of two up to 32, or a multiple of 32
//   ROWS     rows that share a block; 1 when THREADS > 32 is not enough to fill one
//   SPLIT    blocks that share a row
//   KEEP     1: the row stays in registers; 0: it is too long for that and read twice
//   POLICY   1: rows are read as "evict last" from L2 (sm_80), see below
//   PDL      1: launched with programmatic stream serialization (sm_90), see begin()
//   DIMS     dimensions of the index of a row; 1 when rows lie at one constant stride
//
// Why these choices pay (measured on an H200, docs/kernels.md):
//   - 16 bytes per access and the row in registers: each byte crosses the memory bus once, with few instructions.
//   - One barrier: warps sum by shuffles, write one number each to shared memory, and every thread adds those up.
//   - Few rows leave most of the chip idle, so several blocks share a row where that is long (SPLIT).
//   - POLICY: reads and writes of a norm evict one another from L2. With reads marked evict_last, lines that were
//     written leave first, in order. 3 to 6 % where the tensors are much larger than L2, nothing where they fit.

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#define SIZE (DTYPE == 2 ? 4 : 2)             // bytes of an element
#define VALUES (WIDTH / SIZE)                 // elements in an access
#define ACCESSES (HIDDEN / VALUES)            // accesses in a row
#define PER ((ACCESSES + THREADS - 1) / THREADS)  // accesses of a thread
#define WARPS ((THREADS + 31) / 32)           // warps that share a row
#define EVEN (ACCESSES % THREADS == 0)
#define EARLY (GAIN && PER / SPLIT <= 4)      // read the gain before the sum is known, if registers allow

// The host packs this, so it holds no padding that differs between compilers. Strides are in bytes.
// a is x; b is the output, or the residual of a fused add.
struct Args {
    const char* a;
    char* b;
    const char* gain;
    u64 rows;
    float eps;
    u32 unused;
    i64 a_step, b_step;  // from one access to the next; differs from WIDTH only where an access is one element
    u64 size[DIMS];
    i64 a_stride[DIMS], b_stride[DIMS];
};

struct Pack {
    u32 word[WIDTH < 4 ? 1 : WIDTH / 4];
};

struct Row {
    i64 a, b;  // byte offsets
};

// The first thing that a kernel does, before it touches memory. Under programmatic dependent launch its blocks may be
// on the chip while the kernel before it still runs, so it waits for all that was written there. It lets the kernel
// after it come likewise: that one waits for this one's end, if it is launched this way, and is not there otherwise.
__device__ __forceinline__ void begin() {
#if PDL && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Offsets of a row. size[0] is never needed: what is left of the index belongs to dimension 0.
__device__ __forceinline__ Row find_row(const Args& args, u64 row) {
    Row at = {0, 0};
#pragma unroll
    for (int d = DIMS - 1; d > 0; d--) {
        i64 i = i64(row % args.size[d]);
        row /= args.size[d];
        at.a += i * args.a_stride[d];
        at.b += i * args.b_stride[d];
    }
    at.a += i64(row) * args.a_stride[0];
    at.b += i64(row) * args.b_stride[0];
    return at;
}

// Bytes from the start of a row to an access.
__device__ __forceinline__ i64 offset_of(int access, i64 step) {
    return VALUES == 1 ? i64(access) * step : i64(access) * WIDTH;
}

__device__ __forceinline__ Pack load(const char* p) {
    Pack v;
#if WIDTH == 16
    uint4 u = *reinterpret_cast<const uint4*>(p);
    v.word[0] = u.x, v.word[1] = u.y, v.word[2] = u.z, v.word[3] = u.w;
#elif WIDTH == 8
    uint2 u = *reinterpret_cast<const uint2*>(p);
    v.word[0] = u.x, v.word[1] = u.y;
#elif WIDTH == 4
    v.word[0] = *reinterpret_cast<const u32*>(p);
#else
    v.word[0] = *reinterpret_cast<const u16*>(p);
#endif
    return v;
}

// Reads of a row that is used once: not kept in L1, and under POLICY kept in L2 longer than what is written.
__device__ __forceinline__ Pack load_once(const char* p) {
#if POLICY && WIDTH == 16 && __CUDA_ARCH__ >= 800
    Pack v;
    u64 policy;
    asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
    asm volatile("ld.global.L1::no_allocate.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
                 : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
                 : "l"(p), "l"(policy)
                 : "memory");
    return v;
#else
    return load(p);
#endif
}

__device__ __forceinline__ void store(char* p, const Pack& v) {
#if WIDTH == 16
    *reinterpret_cast<uint4*>(p) = make_uint4(v.word[0], v.word[1], v.word[2], v.word[3]);
#elif WIDTH == 8
    *reinterpret_cast<uint2*>(p) = make_uint2(v.word[0], v.word[1]);
#elif WIDTH == 4
    *reinterpret_cast<u32*>(p) = v.word[0];
#else
    *reinterpret_cast<u16*>(p) = u16(v.word[0]);
#endif
}

// Conversions by hand: the headers of the types would cost ten times the compile time of the kernel.
__device__ __forceinline__ float value(const Pack& v, int i) {
#if DTYPE == 2
    return __uint_as_float(v.word[i]);
#elif DTYPE == 1
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(u16(v.word[i / 2] >> (i % 2 * 16))));
    return f;
#else
    return __uint_as_float(i % 2 ? v.word[i / 2] & 0xffff0000u : v.word[i / 2] << 16);
#endif
}

// Round to nearest even.
__device__ __forceinline__ u32 two_values(float low, float high) {
    u32 word;
#if DTYPE == 1
    u16 l, h;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(l) : "f"(low));
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(high));
    word = u32(h) << 16 | l;
#elif __CUDA_ARCH__ >= 800
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
#else
    u32 l = __float_as_uint(low), h = __float_as_uint(high);
    l = low == low ? (l + 0x7fffu + (l >> 16 & 1)) >> 16 : 0x7fffu;
    h = high == high ? (h + 0x7fffu + (h >> 16 & 1)) >> 16 : 0x7fffu;
    word = h << 16 | l;
#endif
    return word;
}

__device__ __forceinline__ Pack pack(const float (&f)[VALUES]) {
    Pack v;
#if DTYPE == 2
#pragma unroll
    for (int i = 0; i < VALUES; i++) v.word[i] = __float_as_uint(f[i]);
#elif WIDTH == 2
    v.word[0] = two_values(f[0], 0.0f);
#else
#pragma unroll
    for (int i = 0; i < VALUES; i += 2) v.word[i / 2] = two_values(f[i], f[i + 1]);
#endif
    return v;
}

// Arithmetic that keeps denormals. CuPy compiles with -ftz=true, which turns +, * and rsqrtf into flushing ones, and
// the float32 image of a small bfloat16 is a denormal.
__device__ __forceinline__ float add(float a, float b) {
    float c;
    asm("add.rn.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
    return c;
}
__device__ __forceinline__ float mul(float a, float b) {
    float c;
    asm("mul.rn.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
    return c;
}
__device__ __forceinline__ float mul_add(float a, float b, float c) {
    float d;
    asm("fma.rn.f32 %0, %1, %2, %3;" : "=f"(d) : "f"(a), "f"(b), "f"(c));
    return d;
}

// 1 / sqrt(mean + eps), from a sum.
__device__ __forceinline__ float scale_of(float sum, float eps) {
    float scale;
    asm("rsqrt.approx.f32 %0, %1;" : "=f"(scale) : "f"(add(mul(sum, 1.0f / HIDDEN), eps)));
    return scale;
}

// Four running sums, so that additions do not wait for one another.
__device__ __forceinline__ void add_squares(float (&sum)[4], const Pack& v) {
#pragma unroll
    for (int i = 0; i < VALUES; i++) sum[i % 4] = mul_add(value(v, i), value(v, i), sum[i % 4]);
}

// The sum over the threads that share a row; all threads of the block must call it.
__device__ __forceinline__ float row_sum(const float (&sums)[4]) {
    float sum = add(add(sums[0], sums[1]), add(sums[2], sums[3]));
#pragma unroll
    for (int step = (THREADS < 32 ? THREADS : 32) / 2; step > 0; step /= 2) {
        sum = add(sum, __shfl_xor_sync(0xffffffffu, sum, step));
    }
#if THREADS > 32
    __shared__ __align__(16) float parts[ROWS][WARPS];
    const int warp = threadIdx.x / 32;
    if (threadIdx.x % 32 == 0) parts[warp / WARPS][warp % WARPS] = sum;
    __syncthreads();
    sum = 0.0f;
#pragma unroll
    for (int i = 0; i < WARPS; i++) sum = add(sum, parts[warp / WARPS][i]);
#endif
    return sum;
}

// The gain of one access, or nothing.
__device__ __forceinline__ Pack load_gain(const Args& args, int access) {
#if GAIN
    return load(args.gain + i64(access) * WIDTH);
#else
    return Pack();
#endif
}

// The norm of one access. The gain is applied in float32 and the result rounded once, as torch's F.rms_norm does.
__device__ __forceinline__ Pack normed(const Pack& v, float scale, const Pack& w) {
    float f[VALUES];
#pragma unroll
    for (int i = 0; i < VALUES; i++) f[i] = mul(value(v, i), scale);
#if GAIN
#pragma unroll
    for (int i = 0; i < VALUES; i++) f[i] = mul(f[i], GAIN == 2 ? add(1.0f, value(w, i)) : value(w, i));
#endif
    return pack(f);
}
