// What both kernels of norm_linear share: y = epilogue(W @ x * rsqrt(mean(x^2) + eps)), row by row of x. The host puts
// this file in front of a kernel's own, so nothing is included and NVRTC needs no headers.
//
// One kernel is compiled per set of choices, given as -D options (flashnorm_cli/cuda/linear_variants.py lists them):
//   DTYPE   0 bfloat16, 1 float16
//   K       elements in a row of x and of W, a multiple of 8
//   NORM    1: the product is scaled by the norm of x; 0: a plain linear
//   ACT     0 none; 1 SiLU, 2 GELU by tanh, 3 GELU by erf: W has 2n rows, y = act(first half) * second half
//   PARTS   warps that split K
//   DEPTH   turns of the loop over K whose weights are under way at once
//   PDL     1: launched with programmatic stream serialization (sm_90)
// and per kernel what stands in its own file.
//
// What both do, and why (measured on an H100 and an H200, docs/kernels.md):
//   - The norm costs nothing: each warp adds up the squares of the x that it multiplies anyway, and the sum scales the
//     finished product once. x is read once, nothing normed is ever written.
//   - Weights do not depend on the kernel before. So their loads are issued before griddepcontrol.wait, DEPTH turns
//     deep: a small matrix is on its way as a whole while the kernel before still ends.
//   - They land in shared memory by cp.async, where each thread has slots of its own: it reads back what it fetched
//     itself, so no barrier is needed, and the compiler cannot move the loads below the wait, as it does with registers.
//   - float32 sums; one rounding, and with a residual a second one, as the model's own add rounds.

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#define VECS (K / 8)  // accesses of 16 bytes in a row

// The host packs this (flashnorm_cli/cuda/linear.py). Strides are in bytes, from row to row.
struct Args {
    const char* x;
    const char* w;
    char* y;               // rows x n, contiguous
    const char* bias;      // as many as W has rows, or null
    const char* residual;  // rows x n, or null
    i64 x_stride, w_stride, residual_stride;
    u32 rows, n;
    float eps;
    u32 early;  // whether weights may be read before the kernel before has ended
};

extern __shared__ uint4 slots[];

__device__ __forceinline__ void let_next_come() {
#if PDL && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// After this, all that the kernel before has written is there. Nothing may be written before it, either.
__device__ __forceinline__ void wait_for_previous() {
#if PDL && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Fetch 16 bytes of weights into a slot; zeros where `there` is false.
__device__ __forceinline__ void fetch(uint4* slot, const char* from, bool there) {
    const u32 to = u32(__cvta_generic_to_shared(slot)), bytes = there ? 16 : 0;
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}
__device__ __forceinline__ void end_turn() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Every turn ends one group, empty or not, so the oldest of DEPTH is always the one that is needed.
__device__ __forceinline__ void wait_for_turn() { asm volatile("cp.async.wait_group %0;" ::"n"(DEPTH - 1) : "memory"); }

// x, after wait_for_previous. Not through the read-only path: the kernel before may still write it when this one starts.
__device__ __forceinline__ uint4 load(const char* p) {
    uint4 v;
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p)
                 : "memory");
    return v;
}

// Arithmetic that keeps denormals: CuPy compiles with -ftz=true.
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

__device__ __forceinline__ float value(u16 bits) {
#if DTYPE == 1
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(bits));
    return f;
#else
    return __uint_as_float(u32(bits) << 16);
#endif
}

__device__ __forceinline__ void two_values(u32 word, float& low, float& high) {
#if DTYPE == 1
    low = value(u16(word)), high = value(u16(word >> 16));
#else
    low = __uint_as_float(word << 16), high = __uint_as_float(word & 0xffff0000u);
#endif
}

__device__ __forceinline__ void values(const uint4& v, float (&f)[8]) {
    two_values(v.x, f[0], f[1]);
    two_values(v.y, f[2], f[3]);
    two_values(v.z, f[4], f[5]);
    two_values(v.w, f[6], f[7]);
}

__device__ __forceinline__ u16 rounded(float f) {
    u16 bits;
#if DTYPE == 1
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(f));
#else
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(f));
#endif
    return bits;
}

__device__ __forceinline__ u16 element(const char* p, i64 i) { return reinterpret_cast<const volatile u16*>(p)[i]; }

__device__ __forceinline__ float scale_of(float sum, float eps) {
    float scale;
    asm("rsqrt.approx.f32 %0, %1;" : "=f"(scale) : "f"(add(mul(sum, 1.0f / K), eps)));
    return scale;
}

__device__ __forceinline__ float activated(float f) {
#if ACT == 1
    return __fdividef(f, 1.0f + __expf(-f));
#elif ACT == 2
    // 0.5 (1 + tanh(u)) is the logistic function of 2u.
    return __fdividef(f, 1.0f + __expf(-1.5957691216057308f * (f + 0.044715f * f * f * f)));
#elif ACT == 3
    return 0.5f * f * (1.0f + erff(f * 0.70710678118654752f));
#else
    return f;
#endif
}

// One element of y. `sum` is its product, `second` that of the second half under ACT; neither is scaled yet.
__device__ __forceinline__ void finish(const Args& args, u32 row, u32 output, float sum, float second, float scale) {
    float f = NORM ? mul(sum, scale) : sum;
    if (args.bias) f = add(f, value(element(args.bias, output)));
#if ACT
    float up = NORM ? mul(second, scale) : second;
    if (args.bias) up = add(up, value(element(args.bias, i64(args.n) + output)));
    f = mul(activated(f), up);
#endif
    u16 bits = rounded(f);
    if (args.residual) {
        bits = rounded(add(value(element(args.residual + row * args.residual_stride, output)), value(bits)));
    }
    reinterpret_cast<u16*>(args.y)[i64(row) * args.n + output] = bits;
}
