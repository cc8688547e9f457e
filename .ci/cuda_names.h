/*
cuda_names.h: what CUDA calls things, for cuda_on_cpu.h, which includes it: atomics, mathematics,
bfloat16, the runtime's functions and cuBLAS's. Names, numbers and results are CUDA's.
*/
#ifndef CUDA_NAMES_H
#define CUDA_NAMES_H

// ----------------------------------------------------------------------------- atomics and maths

#define EMU_ATOMIC(name, expression) \
    template <class T> T name(T *p, typename emu::Same<T>::type v) \
    { emu::Count atomic(emu::m.atomic); T old = *p; *p = (T)(expression); return old; }
EMU_ATOMIC(atomicSub, old - v)
EMU_ATOMIC(atomicExch, v)
EMU_ATOMIC(atomicMax, old > v ? old : v)
EMU_ATOMIC(atomicMin, old < v ? old : v)
EMU_ATOMIC(atomicAnd, old & v)
EMU_ATOMIC(atomicOr, old | v)
EMU_ATOMIC(atomicXor, old ^ v)
EMU_ATOMIC(atomicInc, old >= v ? 0 : old + 1)
template <class T> T atomicAdd(T *p, typename emu::Same<T>::type v)
{
    emu::Count atomic(emu::m.atomic);
    if (std::is_same<T, float>::value && emu::m.order == emu::Machine::AGREE)
        emu::m.float_sums[p] += std::fabs((double)v);
    T old = *p;
    *p = (T)(old + v);
    return old;
}
template <class T>
T atomicCAS(T *p, typename emu::Same<T>::type expected, typename emu::Same<T>::type v)
{
    emu::Count atomic(emu::m.atomic);
    T old = *p;
    if (old == expected) *p = v;
    return old;
}

template <class To, class From> To emu_bits(From v)
{
    To t;
    static_assert(sizeof t == sizeof v, "");
    memcpy(&t, &v, sizeof t);
    return t;
}
inline unsigned __float_as_uint(float f) { return emu_bits<unsigned>(f); }
inline int __float_as_int(float f) { return emu_bits<int>(f); }
inline float __uint_as_float(unsigned u) { return emu_bits<float>(u); }
inline float __int_as_float(int i) { return emu_bits<float>(i); }
inline int __popc(unsigned u) { return __builtin_popcount(u); }
inline int __ffs(int u) { return __builtin_ffs(u); }
inline int __clz(int u) { return u ? __builtin_clz((unsigned)u) : 32; }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
#define __expf(x) expf(x) // macros: the C library has functions of these names
#define __logf(x) logf(x)
inline float __fdividef(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __saturatef(float x) { return x > 0 ? x < 1 ? x : 1 : 0; }
inline void __threadfence() {}
inline void __threadfence_block() {}
[[noreturn]] inline void __trap() { emu::fail("__trap"); }
#define EMU_MIN_MAX(type) \
    inline type min(type a, type b) { return a < b ? a : b; } \
    inline type max(type a, type b) { return a > b ? a : b; }
EMU_MIN_MAX(int)
EMU_MIN_MAX(unsigned)
EMU_MIN_MAX(long)
EMU_MIN_MAX(unsigned long)
EMU_MIN_MAX(long long)
EMU_MIN_MAX(unsigned long long)
EMU_MIN_MAX(float)
EMU_MIN_MAX(double)
template <class T> T __ldg(const T *p) { return *p; }
template <class T> T __ldcs(const T *p) { return *p; }
template <class T> T __ldcg(const T *p) { return *p; }
template <class T> void __stcs(T *p, typename emu::Same<T>::type v) { *p = v; }
template <class T> void __stcg(T *p, typename emu::Same<T>::type v) { *p = v; }

// ------------------------------------------------------------------------------------- bfloat16

// The upper half of a float, rounded to the nearest, ties to even; a NaN is 0x7fff, as on a GPU.
struct __nv_bfloat16 {
    unsigned short __x;
    __nv_bfloat16() = default;
    __nv_bfloat16(float f)
    {
        unsigned u = emu_bits<unsigned>(f);
        __x = (u & 0x7fffffff) > 0x7f800000 ? 0x7fff
                                            : (unsigned short)((u + 0x7fff + (u >> 16 & 1)) >> 16);
    }
    operator float() const { return emu_bits<float>((unsigned)__x << 16); }
};
struct alignas(4) __nv_bfloat162 {
    __nv_bfloat16 x, y;
};
typedef __nv_bfloat16 nv_bfloat16;
typedef __nv_bfloat162 nv_bfloat162;
#define EMU_BF16_OPERATOR(op, function) \
    inline __nv_bfloat16 operator op(__nv_bfloat16 a, __nv_bfloat16 b) \
    { \
        return (float)a op(float) b; \
    } \
    inline __nv_bfloat16 function(__nv_bfloat16 a, __nv_bfloat16 b) { return a op b; } \
    inline __nv_bfloat162 function##2(__nv_bfloat162 a, __nv_bfloat162 b) \
    { \
        return {a.x op b.x, a.y op b.y}; \
    }
EMU_BF16_OPERATOR(+, __hadd)
EMU_BF16_OPERATOR(-, __hsub)
EMU_BF16_OPERATOR(*, __hmul)
inline float __bfloat162float(__nv_bfloat16 b) { return b; }
inline __nv_bfloat16 __float2bfloat16(float f) { return f; }
inline __nv_bfloat16 __float2bfloat16_rn(float f) { return f; }
inline float __low2float(__nv_bfloat162 v) { return v.x; }
inline float __high2float(__nv_bfloat162 v) { return v.y; }
inline __nv_bfloat16 __low2bfloat16(__nv_bfloat162 v) { return v.x; }
inline __nv_bfloat16 __high2bfloat16(__nv_bfloat162 v) { return v.y; }
inline float2 __bfloat1622float2(__nv_bfloat162 v) { return {v.x, v.y}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {x, y}; }
inline __nv_bfloat162 __float22bfloat162_rn(float2 f) { return {f.x, f.y}; }
inline __nv_bfloat162 __float2bfloat162_rn(float f) { return {f, f}; }
inline __nv_bfloat162 __halves2bfloat162(__nv_bfloat16 x, __nv_bfloat16 y) { return {x, y}; }
inline __nv_bfloat162 __bfloat162bfloat162(__nv_bfloat16 x) { return {x, x}; }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 b) { return b.__x; }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short u) { return emu_bits<__nv_bfloat16>(u); }

// PTX: ex2.approx, and red, which adds 16 bytes of numbers to those in global memory.
inline float exp2_approx(float x) { return exp2f(x); }
inline void add_16_bytes(float *to, const unsigned x[4])
{
    for (int i = 0; i < 4; i++) to[i] += emu_bits<float>(x[i]);
}
inline void add_16_bytes(__nv_bfloat16 *to, const unsigned x[4])
{
    for (int i = 0; i < 8; i++)
        to[i] = to[i] + emu_bits<__nv_bfloat16>((unsigned short)(x[i / 2] >> i % 2 * 16));
}

// ------------------------------------------------------------------------------ the runtime's API

enum cudaError_t {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorMemoryAllocation = 2,
    cudaErrorInvalidConfiguration = 9,
    cudaErrorInsufficientDriver = 35,
    cudaErrorNoDevice = 100,
    cudaErrorInvalidDevice = 101,
    cudaErrorNoKernelImageForDevice = 209,
    cudaErrorStreamCaptureUnsupported = 900,
    cudaErrorStreamCaptureImplicit = 906,
};
enum cudaMemcpyKind {
    cudaMemcpyHostToHost,
    cudaMemcpyHostToDevice,
    cudaMemcpyDeviceToHost,
    cudaMemcpyDeviceToDevice,
    cudaMemcpyDefault,
};
enum cudaFuncAttribute {
    cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
    cudaFuncAttributePreferredSharedMemoryCarveout = 9,
};
enum cudaStreamCaptureMode {
    cudaStreamCaptureModeGlobal,
    cudaStreamCaptureModeThreadLocal,
    cudaStreamCaptureModeRelaxed,
};
enum { cudaStreamDefault, cudaStreamNonBlocking, cudaEventDefault = 0, cudaEventDisableTiming = 2 };
enum cudaDeviceAttr {
    cudaDevAttrMaxThreadsPerBlock = 1,
    cudaDevAttrWarpSize = 10,
    cudaDevAttrMultiProcessorCount = 16,
    cudaDevAttrComputeCapabilityMajor = 75,
    cudaDevAttrComputeCapabilityMinor = 76,
    cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};
struct CUgraph_st { std::vector<std::function<void()>> nodes; };
struct CUgraphExec_st : CUgraph_st {};
struct CUstream_st { CUgraph_st *graph; }; // that is being recorded
struct CUevent_st { timespec time; };
typedef CUstream_st *cudaStream_t;
typedef CUgraph_st *cudaGraph_t;
typedef CUgraphExec_st *cudaGraphExec_t;
typedef CUevent_st *cudaEvent_t;
struct cudaDeviceProp {
    char name[256];
    size_t totalGlobalMem, sharedMemPerBlock, sharedMemPerBlockOptin, sharedMemPerMultiprocessor;
    int major, minor, multiProcessorCount, warpSize, maxThreadsPerBlock,
        maxThreadsPerMultiProcessor;
    int regsPerBlock, regsPerMultiprocessor, l2CacheSize, memoryBusWidth;
};
#define CUDART_VERSION 12000

inline const char *cudaGetErrorString(cudaError_t e)
{
    switch (e) { // the runtime's own words
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    case cudaErrorInsufficientDriver:
        return "CUDA driver version is insufficient for CUDA runtime version";
    case cudaErrorNoDevice: return "no CUDA-capable device is detected";
    case cudaErrorInvalidDevice: return "invalid device ordinal";
    case cudaErrorNoKernelImageForDevice:
        return "no kernel image is available for execution on the device";
    case cudaErrorStreamCaptureUnsupported:
        return "operation not permitted when stream is capturing";
    case cudaErrorStreamCaptureImplicit:
        return "operation would make the legacy stream depend on a capturing blocking stream";
    }
    return "unrecognized error code";
}
inline cudaError_t emu_return(cudaError_t e) { if (e) emu::m.error = e; return e; }
inline cudaError_t cudaPeekAtLastError() { return (cudaError_t)emu::m.error; }
inline cudaError_t cudaGetLastError()
{
    cudaError_t e = (cudaError_t)emu::m.error;
    emu::m.error = 0;
    return e;
}
// What may not be done while a stream is recorded; and of a call that may, what is done later.
#define EMU_NOT_RECORDED(error) \
    if (emu::m.recorded) return emu_return(error)
#define EMU_RECORD(stream, call) \
    if (emu::m.recorded) { \
        if (!stream || !stream->graph) return emu_return(cudaErrorStreamCaptureImplicit); \
        emu::m.recorded->push_back([=] { call; }); \
        return cudaSuccess; \
    }
inline cudaError_t cudaDeviceSynchronize()
{
    EMU_NOT_RECORDED(cudaErrorStreamCaptureUnsupported);
    return cudaSuccess;
}
inline cudaError_t cudaDriverGetVersion(int *v)
{
    *v = (int)emu::setting("EMU_DRIVER", CUDART_VERSION);
    return cudaSuccess;
}
inline cudaError_t cudaRuntimeGetVersion(int *v) { *v = CUDART_VERSION; return cudaSuccess; }
inline cudaError_t cudaGetDeviceCount(int *n)
{
    int driver;
    cudaDriverGetVersion(&driver);
    *n = 0;
    if (driver < CUDART_VERSION / 1000 * 1000) return emu_return(cudaErrorInsufficientDriver);
    *n = (int)emu::setting("EMU_DEVICES", 1);
    return *n ? cudaSuccess : emu_return(cudaErrorNoDevice);
}
inline cudaError_t cudaSetDevice(int i)
{
    int n;
    cudaError_t e = cudaGetDeviceCount(&n);
    return e ? e : i < 0 || i >= n ? emu_return(cudaErrorInvalidDevice) : e;
}
inline cudaError_t cudaGetDevice(int *i) { *i = 0; return cudaSuccess; }
inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp *p, int i)
{
    cudaError_t e = cudaSetDevice(i);
    if (e) return e;
    int cc = (int)emu::setting("EMU_CC", 90);
    *p = {"CPU (cuda_on_cpu.h)",
          emu::m.limit,
          emu::STATIC_SHARED,
          emu::MAX_SHARED,
          228 << 10,
          cc / 10,
          cc % 10,
          3,
          32,
          1024,
          2048,
          65536,
          65536,
          1 << 20,
          64};
    return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr what, int device)
{
    cudaDeviceProp p;
    cudaError_t e = cudaGetDeviceProperties(&p, device);
    if (e) return e;
    switch (what) {
    case cudaDevAttrMaxThreadsPerBlock: *value = p.maxThreadsPerBlock; break;
    case cudaDevAttrWarpSize: *value = p.warpSize; break;
    case cudaDevAttrMultiProcessorCount: *value = p.multiProcessorCount; break;
    case cudaDevAttrComputeCapabilityMajor: *value = p.major; break;
    case cudaDevAttrComputeCapabilityMinor: *value = p.minor; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = (int)p.sharedMemPerBlockOptin; break;
    }
    return cudaSuccess;
}
inline cudaError_t cudaMemGetInfo(size_t *free_bytes, size_t *total)
{
    *total = emu::m.limit, *free_bytes = emu::m.limit - emu::m.used;
    return cudaSuccess;
}

template <class T> cudaError_t cudaMalloc(T **p, size_t size, EMU_HERE)
{
    using namespace emu;
    *p = nullptr;
    EMU_NOT_RECORDED(cudaErrorStreamCaptureUnsupported);
    if (!size) return cudaSuccess;
    if (size > m.limit - m.used) return emu_return(cudaErrorMemoryAllocation);
    size_t pages = round_up(size, PAGE);
    char *low = map_pages(pages + 2 * PAGE) + PAGE;
    Allocation a;
    a.low = low, a.high = low + pages, a.data = a.high - round_up(size, 16);
    a.size = size, a.number = ++m.numbers, a.line = line;
    a.granule.assign(round_up(pages, GRANULE) / GRANULE, CLOSED);
    mprotect(low, pages, PROT_READ | PROT_WRITE);
    memset(low, 0xff, pages);
    mprotect(low, pages, PROT_NONE);
    m.allocations[(uintptr_t)a.high + PAGE] = a;
    m.used += size;
    *p = (T *)a.data;
    return cudaSuccess;
}
inline cudaError_t cudaFree(void *p)
{
    using namespace emu;
    EMU_NOT_RECORDED(cudaErrorStreamCaptureUnsupported);
    if (!p) return cudaSuccess;
    Allocation *a = find(p);
    if (!a || a->freed || a->data != p)
        fail("cudaFree of %p, which cudaMalloc did not give, or twice", p);
    a->freed = true;
    m.used -= a->size;
    mmap(a->low, a->high - a->low, PROT_NONE,
         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
    return cudaSuccess;
}
template <class T> cudaError_t cudaMallocHost(T **p, size_t size)
{
    *p = (T *)malloc(size ? size : 1);
    emu::pinned[*p] = size;
    return *p ? cudaSuccess : emu_return(cudaErrorMemoryAllocation);
}
inline cudaError_t cudaFreeHost(void *p) { emu::pinned.erase(p); free(p); return cudaSuccess; }

inline void emu_need_range(const char *what, const void *p, size_t size, bool device)
{
    emu::Allocation *a = emu::find(p);
    if (device && !a) emu::fail("%s: %p is not device memory", what, p);
    if (!device && a) emu::fail("%s: %p is device memory, %s", what, p, emu::describe(*a));
    if (a && (a->freed || (char *)p < a->data || (char *)p + size > a->data + a->size))
        emu::fail("%s: %zu bytes from byte %td of %s%s", what, size, (char *)p - a->data,
                  a->freed ? "freed " : "", emu::describe(*a));
}
inline cudaError_t cudaMemcpy(void *to, const void *from, size_t size, cudaMemcpyKind kind)
{
    EMU_NOT_RECORDED(cudaErrorStreamCaptureImplicit);
    if (!size) return cudaSuccess;
    bool to_device = kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice;
    bool from_device = kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice;
    if (kind == cudaMemcpyDefault) to_device = emu::find(to), from_device = emu::find(from);
    emu_need_range("cudaMemcpy to", to, size, to_device);
    emu_need_range("cudaMemcpy from", from, size, from_device);
    emu::Open open;
    memmove(to, from, size);
    return cudaSuccess;
}
inline cudaError_t cudaMemset(void *p, int value, size_t size)
{
    EMU_NOT_RECORDED(cudaErrorStreamCaptureImplicit);
    if (!size) return cudaSuccess;
    emu_need_range("cudaMemset", p, size, true);
    emu::Open open;
    memset(p, value, size);
    return cudaSuccess;
}
inline cudaError_t cudaMemcpy2D(void *to, size_t to_pitch, const void *from, size_t from_pitch,
                                size_t width, size_t height, cudaMemcpyKind kind)
{
    EMU_NOT_RECORDED(cudaErrorStreamCaptureImplicit);
    if (width > to_pitch || width > from_pitch) return emu_return(cudaErrorInvalidValue);
    emu::Open open; // all rows at once
    for (size_t i = 0; i < height; i++)
        cudaMemcpy((char *)to + i * to_pitch, (const char *)from + i * from_pitch, width, kind);
    return cudaSuccess;
}
inline cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch,
                                     size_t width, size_t height, cudaMemcpyKind kind,
                                     cudaStream_t s = nullptr)
{
    EMU_RECORD(s, cudaMemcpy2D(to, to_pitch, from, from_pitch, width, height, kind));
    return cudaMemcpy2D(to, to_pitch, from, from_pitch, width, height, kind);
}
inline cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t size, cudaMemcpyKind kind,
                                   cudaStream_t s = nullptr)
{
    EMU_RECORD(s, cudaMemcpy(to, from, size, kind));
    return cudaMemcpy(to, from, size, kind);
}
inline cudaError_t cudaMemsetAsync(void *p, int value, size_t size, cudaStream_t s = nullptr)
{
    EMU_RECORD(s, cudaMemset(p, value, size));
    return cudaMemset(p, value, size);
}
template <class F> cudaError_t cudaFuncSetAttribute(F *kernel, cudaFuncAttribute what, int value)
{
    if (value < 0 || (size_t)value > emu::MAX_SHARED) return emu_return(cudaErrorInvalidValue);
    if (what == cudaFuncAttributeMaxDynamicSharedMemorySize)
        emu::m.shared_limit[(const void *)kernel] = (size_t)value;
    return cudaSuccess;
}
template <class F>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *n, F *, int threads, size_t shared)
{
    int by_threads = 2048 / (threads > 0 ? threads : 1),
        by_shared = (int)((228 << 10) / (shared + 1024));
    *n = by_threads < by_shared ? by_threads : by_shared;
    return cudaSuccess;
}
inline cudaError_t cudaStreamCreate(cudaStream_t *s) { *s = new CUstream_st(); return cudaSuccess; }
inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t *s, unsigned)
{
    return cudaStreamCreate(s);
}
inline cudaError_t cudaStreamDestroy(cudaStream_t s) { delete s; return cudaSuccess; }
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaDeviceSynchronize(); }
inline cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned = 0)
{
    return cudaSuccess;
}

// What a stream is given from Begin to End is not done, but stands in a graph with its arguments.
inline cudaError_t cudaStreamBeginCapture(cudaStream_t s, cudaStreamCaptureMode)
{
    if (!s || emu::m.recorded) return emu_return(cudaErrorStreamCaptureUnsupported);
    s->graph = new CUgraph_st();
    emu::m.recorded = &s->graph->nodes;
    return cudaSuccess;
}
inline cudaError_t cudaStreamEndCapture(cudaStream_t s, cudaGraph_t *g)
{
    if (!s || !s->graph) return emu_return(cudaErrorInvalidValue);
    *g = s->graph;
    s->graph = nullptr, emu::m.recorded = nullptr;
    return cudaSuccess;
}
inline cudaError_t cudaGraphInstantiate(cudaGraphExec_t *e, cudaGraph_t g, unsigned long long = 0)
{
    *e = new CUgraphExec_st();
    (*e)->nodes = g->nodes;
    return cudaSuccess;
}
inline cudaError_t cudaGraphLaunch(cudaGraphExec_t e, cudaStream_t)
{
    EMU_NOT_RECORDED(cudaErrorStreamCaptureUnsupported);
    for (auto &node : e->nodes) node();
    return cudaSuccess;
}
inline cudaError_t cudaGraphDestroy(cudaGraph_t g) { delete g; return cudaSuccess; }
inline cudaError_t cudaGraphExecDestroy(cudaGraphExec_t e) { delete e; return cudaSuccess; }

inline cudaError_t cudaEventCreate(cudaEvent_t *e) { *e = new CUevent_st(); return cudaSuccess; }
inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t *e, unsigned) { return cudaEventCreate(e); }
inline cudaError_t cudaEventDestroy(cudaEvent_t e) { delete e; return cudaSuccess; }
inline cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t = nullptr)
{
    clock_gettime(CLOCK_MONOTONIC, &e->time);
    return cudaSuccess;
}
inline cudaError_t cudaEventSynchronize(cudaEvent_t) { return cudaSuccess; }
inline cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t a, cudaEvent_t b)
{
    *ms = (float)((double)(b->time.tv_sec - a->time.tv_sec) * 1e3 +
                  (double)(b->time.tv_nsec - a->time.tv_nsec) * 1e-6);
    return cudaSuccess;
}

// --------------------------------------------------------------------------------------- cuBLAS

enum cublasStatus_t {
    CUBLAS_STATUS_SUCCESS,
    CUBLAS_STATUS_NOT_INITIALIZED,
    CUBLAS_STATUS_INVALID_VALUE = 7,
    CUBLAS_STATUS_EXECUTION_FAILED = 13,
    CUBLAS_STATUS_NOT_SUPPORTED = 15
};
enum cublasOperation_t { CUBLAS_OP_N, CUBLAS_OP_T, CUBLAS_OP_C };
enum cublasMath_t {
    CUBLAS_DEFAULT_MATH,
    CUBLAS_TENSOR_OP_MATH,
    CUBLAS_PEDANTIC_MATH,
    CUBLAS_TF32_TENSOR_OP_MATH,
    CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION = 16
};
enum cublasComputeType_t {
    CUBLAS_COMPUTE_32F = 68,
    CUBLAS_COMPUTE_32F_PEDANTIC = 69,
    CUBLAS_COMPUTE_32F_FAST_TF32 = 77
};
enum cublasGemmAlgo_t { CUBLAS_GEMM_DEFAULT = -1, CUBLAS_GEMM_DEFAULT_TENSOR_OP = 99 };
enum cudaDataType_t { CUDA_R_32F = 0, CUDA_R_16BF = 14 };
typedef cudaDataType_t cudaDataType;
struct cublasContext { cudaStream_t stream; void *workspace; };
typedef cublasContext *cublasHandle_t;

inline const char *cublasGetStatusString(cublasStatus_t s)
{
    return s == CUBLAS_STATUS_SUCCESS            ? "CUBLAS_STATUS_SUCCESS"
           : s == CUBLAS_STATUS_INVALID_VALUE    ? "CUBLAS_STATUS_INVALID_VALUE"
           : s == CUBLAS_STATUS_NOT_SUPPORTED    ? "CUBLAS_STATUS_NOT_SUPPORTED"
           : s == CUBLAS_STATUS_EXECUTION_FAILED ? "CUBLAS_STATUS_EXECUTION_FAILED"
                                                 : "CUBLAS_STATUS_NOT_INITIALIZED";
}
inline cublasStatus_t cublasCreate(cublasHandle_t *h)
{
    *h = new cublasContext();
    return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasDestroy(cublasHandle_t h) { delete h; return CUBLAS_STATUS_SUCCESS; }
inline cublasStatus_t cublasSetStream(cublasHandle_t h, cudaStream_t s)
{
    h->stream = s, h->workspace = nullptr;
    return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasSetMathMode(cublasHandle_t, cublasMath_t)
{
    return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasSetWorkspace(cublasHandle_t h, void *p, size_t)
{
    h->workspace = p;
    return CUBLAS_STATUS_SUCCESS;
}

namespace emu {
inline float load(const void *p, cudaDataType_t type, size_t i)
{
    return type == CUDA_R_32F ? ((const float *)p)[i] : (float)((const __nv_bfloat16 *)p)[i];
}

// C[n][m] = alpha op(B)[n][k] op(A)[k][m] + beta C, rows contiguous, which cuBLAS calls columns.
inline void gemm(bool ta, bool tb, size_t m, size_t n, size_t k, float alpha, const void *A,
                 cudaDataType_t a_type, size_t lda, const void *B, cudaDataType_t b_type,
                 size_t ldb, float beta, void *C, cudaDataType_t c_type, size_t ldc)
{
    constexpr size_t
        M = 16,
        N = 4; // a tile of C in registers; A and B are copied in its order, padded by 0
    std::vector<float> a(round_up(m, M) * k), b(round_up(n, N) * k);
    for (size_t i = 0; i < m; i++)
        for (size_t p = 0; p < k; p++)
            a[(i / M * k + p) * M + i % M] = load(A, a_type, ta ? i * lda + p : p * lda + i);
    for (size_t j = 0; j < n; j++)
        for (size_t p = 0; p < k; p++)
            b[(j / N * k + p) * N + j % N] = load(B, b_type, tb ? p * ldb + j : j * ldb + p);
    for (size_t j = 0; j < n; j += N)
        for (size_t i = 0; i < m; i += M) {
            float sum[N][M] = {};
            const float *x = a.data() + i * k, *y = b.data() + j * k;
            for (size_t p = 0; p < k; p++, x += M, y += N)
                for (size_t s = 0; s < N; s++)
                    for (size_t t = 0; t < M; t++) sum[s][t] += x[t] * y[s];
            for (size_t s = 0; s < N && j + s < n; s++)
                for (size_t t = 0; t < M && i + t < m; t++) {
                    size_t at = (j + s) * ldc + i + t;
                    float v = alpha * sum[s][t] + (beta != 0 ? beta * load(C, c_type, at) : 0);
                    if (c_type == CUDA_R_32F) ((float *)C)[at] = v;
                    else ((__nv_bfloat16 *)C)[at] = v;
                }
        }
}
} // namespace emu

inline cublasStatus_t cublasGemmStridedBatchedEx(
    cublasHandle_t h, cublasOperation_t ta, cublasOperation_t tb, int m, int n, int k,
    const void *alpha, const void *A, cudaDataType_t a_type, int lda, long long a_stride,
    const void *B, cudaDataType_t b_type, int ldb, long long b_stride, const void *beta, void *C,
    cudaDataType_t c_type, int ldc, long long c_stride, int batch, cublasComputeType_t compute,
    cublasGemmAlgo_t algo)
{
    if (!h) return CUBLAS_STATUS_NOT_INITIALIZED;
    bool known = (a_type == CUDA_R_32F || a_type == CUDA_R_16BF) && a_type == b_type &&
                 (c_type == CUDA_R_32F || c_type == a_type) &&
                 (compute == CUBLAS_COMPUTE_32F || compute == CUBLAS_COMPUTE_32F_PEDANTIC ||
                  compute == CUBLAS_COMPUTE_32F_FAST_TF32);
    if (!known) return CUBLAS_STATUS_NOT_SUPPORTED;
    if (m < 0 || n < 0 || k < 0 || batch < 0 || lda < (ta ? k : m) || lda < 1 ||
        ldb < (tb ? n : k) || ldb < 1 || ldc < m || ldc < 1)
        return CUBLAS_STATUS_INVALID_VALUE;
    if (emu::m.recorded) {
        if (!h->stream || !h->stream->graph) return CUBLAS_STATUS_EXECUTION_FAILED;
        if (!h->workspace) emu::fail("cublasGemm is recorded, but has no cublasSetWorkspace");
        float x = *(const float *)alpha, y = *(const float *)beta;
        emu::m.recorded->push_back([=] {
            cublasGemmStridedBatchedEx(h, ta, tb, m, n, k, &x, A, a_type, lda, a_stride, B, b_type,
                                       ldb, b_stride, &y, C, c_type, ldc, c_stride, batch, compute,
                                       algo);
        });
        return CUBLAS_STATUS_SUCCESS;
    }
    emu::Open open;
    char text[96];
    snprintf(text, sizeof text, "cublasGemm of m %d, n %d, k %d, batch %d", m, n, k, batch);
    emu::m.kernel = text, emu::m.line = 0;
    for (int i = 0; i < batch; i++)
        emu::gemm(ta, tb, (size_t)m, (size_t)n, (size_t)k, *(const float *)alpha,
                  (const char *)A + i * a_stride * (a_type == CUDA_R_32F ? 4 : 2), a_type,
                  (size_t)lda, (const char *)B + i * b_stride * (b_type == CUDA_R_32F ? 4 : 2),
                  b_type, (size_t)ldb, *(const float *)beta,
                  (char *)C + i * c_stride * (c_type == CUDA_R_32F ? 4 : 2), c_type, (size_t)ldc);
    return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasGemmEx(cublasHandle_t h, cublasOperation_t ta, cublasOperation_t tb,
                                   int m, int n, int k, const void *alpha, const void *A,
                                   cudaDataType_t a_type, int lda, const void *B,
                                   cudaDataType_t b_type, int ldb, const void *beta, void *C,
                                   cudaDataType_t c_type, int ldc, cublasComputeType_t compute,
                                   cublasGemmAlgo_t algo)
{
    return cublasGemmStridedBatchedEx(h, ta, tb, m, n, k, alpha, A, a_type, lda, 0, B, b_type, ldb,
                                      0, beta, C, c_type, ldc, 0, 1, compute, algo);
}

// ------------------------------------------------------------------------------------------ NCCL

#ifdef MPI_VERSION // processes are MPI's, and what NCCL sends between GPUs goes by it too
typedef enum { ncclSuccess, ncclInvalidArgument = 4 } ncclResult_t;
typedef enum { ncclInt = 2, ncclFloat = 7 } ncclDataType_t;
typedef enum { ncclSum } ncclRedOp_t;
typedef struct { char internal[128]; } ncclUniqueId;
typedef struct { int ranks; } *ncclComm_t;
inline const char *ncclGetErrorString(ncclResult_t) { return "invalid argument"; }
inline ncclResult_t ncclGetUniqueId(ncclUniqueId *id)
{
    memset(id, 1, sizeof *id);
    return ncclSuccess;
}
inline ncclResult_t ncclCommInitRank(ncclComm_t *comm, int ranks, ncclUniqueId id, int rank)
{
    static std::remove_pointer<ncclComm_t>::type all;
    int size;
    MPI_Comm_size(MPI_COMM_WORLD, &size);
    if (ranks != size || rank >= ranks || id.internal[127] != 1) return ncclInvalidArgument;
    all.ranks = ranks;
    *comm = &all;
    return ncclSuccess;
}
inline ncclResult_t ncclAllReduce(const void *from, void *to, size_t n, ncclDataType_t type,
                                  ncclRedOp_t, ncclComm_t comm, cudaStream_t)
{
    if (!comm || (type != ncclInt && type != ncclFloat)) return ncclInvalidArgument;
    std::vector<char> host(4 * n);
    emu::Open open;
    memcpy(host.data(), from, 4 * n);
    MPI_Allreduce(MPI_IN_PLACE, host.data(), (int)n, type == ncclInt ? MPI_INT : MPI_FLOAT, MPI_SUM,
                  MPI_COMM_WORLD);
    memcpy(to, host.data(), 4 * n);
    return ncclSuccess;
}
#endif

#endif
