// FlashInfer's norms as a plain library, so that they can be timed without its Python package and all that it needs:
//   nvcc -O3 -std=c++17 -arch=sm_90 -I<flashinfer>/data/include -shared -Xcompiler -fPIC kernels_flashinfer.cu -o fi.so
#include <flashinfer/norm.cuh>

using T = __nv_bfloat16;

extern "C" int fi_norm(void* x, void* w, void* y, unsigned rows, unsigned d, float eps, void* stream) {
    return flashinfer::norm::RMSNorm<T>((T*)x, (T*)w, (T*)y, rows, d, d, d, eps, false, (cudaStream_t)stream);
}

extern "C" int fi_fused(void* x, void* residual, void* w, unsigned rows, unsigned d, float eps, void* stream) {
    return flashinfer::norm::FusedAddRMSNorm<T>((T*)x, (T*)residual, (T*)w, rows, d, d, d, eps, false,
                                                (cudaStream_t)stream);
}
