// Reads `count` accesses of 16 bytes: the limit that the benchmark compares norm_linear with. No product feature.
// A thread reads EACH accesses, all on their way before the first is used. Nothing is written unless the sum says so,
// which the compiler cannot know.

struct Access {
    unsigned int a, b, c, d;
};

extern "C" __global__ void __launch_bounds__(256) read(const Access* from, unsigned long long count, unsigned int* out) {
    const unsigned long long first = (unsigned long long)(blockIdx.x) * (256 * EACH) + threadIdx.x;
    unsigned int sum = 0;
    Access kept[EACH];
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        kept[i] = Access{0, 0, 0, 0};
        if (first + i * 256 < count) {
            asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                         : "=r"(kept[i].a), "=r"(kept[i].b), "=r"(kept[i].c), "=r"(kept[i].d)
                         : "l"(from + first + i * 256));
        }
    }
#pragma unroll
    for (int i = 0; i < EACH; i++) sum += kept[i].a ^ kept[i].b ^ kept[i].c ^ kept[i].d;
    if (sum == 0x12345679u) out[0] = sum;
}
