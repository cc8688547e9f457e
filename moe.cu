/*
moe.cu: moe.c on an NVIDIA GPU.

The model, its training, its generation, files and commands are moe.c's, which this file takes in.
In the place of moe.c's operations moe.c takes in the rest of this file: the same operations, under
the same names and in the same order, a kernel first and what launches it under it.

    make gpu                  bfloat16 weights, what matrix products read and the optimizer's
                              moments; float what norms read, master weights and gradients
    make gpu PRECISION=fp32   float throughout
    make emu                  either, by the C++ compiler, on the CPU: .ci/cuda_on_cpu.h

Plain matrix products are cuBLAS's; the rest is here, for GPUs from sm_80 on and once more with what
Hopper, sm_90, has of its own (MOE_HOPPER): tensor cores that read shared memory, and copies to it
by boxes. Neither forward nor backward pass waits for the GPU, no T x T matrix is stored, and no sum
depends on which thread comes first: the same run gives the same bits.

At each kernel stands what it moves and computes. Bytes are of real (2 in bfloat16) unless said.
*/
#ifndef MOE_CUDA
#define MOE_CUDA
#ifndef MOE_FP32
#define MOE_BF16
#else
#undef MOE_HOPPER // whose instructions are for bfloat16
#endif
#ifdef __CUDACC__
#include <cublas_v2.h>
#ifdef MOE_HOPPER
#include <cuda.h>
#endif
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#ifdef MOE_MPI
#include <nccl.h>
#endif
#else
#include ".ci/cuda_on_cpu.h"
#endif
#include <float.h>
#include "moe.c"
#else // taken in by moe.c

// The GPU's compute capability, as nvcc's -arch has it: 90 for sm_90.
static int gpu_arch(void)
{
    int device = 0, major = 0, minor = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    return 10 * major + minor;
}

// Every call of CUDA and cuBLAS is checked. What a kernel does wrong shows at a later one.
static void cuda_check(cudaError_t status, const char *call)
{
    int driver = 0, toolkit = 0;
    if (status == cudaSuccess) return;
    if (status == cudaErrorNoDevice)
        die(FAILED, "there is no NVIDIA GPU here; `make` builds moe, which needs none");
    if (status == cudaErrorInsufficientDriver) {
        cudaDriverGetVersion(&driver);
        cudaRuntimeGetVersion(&toolkit);
        if (driver == 0)
            die(FAILED, "there is no NVIDIA driver here; `make` builds moe, which needs none");
        die(FAILED, "the driver is for CUDA %d.%d, older than %d.%d, the toolkit of this program; "
            "update it or build with its toolkit", driver / 1000, driver % 1000 / 10,
            toolkit / 1000, toolkit % 1000 / 10);
    }
    if (status == cudaErrorNoKernelImageForDevice)
        die(FAILED, "this program was built for another GPU than this sm_%d; make gpu "
            "GPU_ARCH=sm_%d builds it for this one", gpu_arch(), gpu_arch());
    if (status == cudaErrorMemoryAllocation)
        die(FAILED, "out of device memory; use a smaller model, --batch or --seq");
    die(FAILED, "%s: %s", call, cudaGetErrorString(status));
}

static void cublas_check(cublasStatus_t status, const char *call)
{
    if (status != CUBLAS_STATUS_SUCCESS)
        die(FAILED, "%.40s: %s", call, cublasGetStatusString(status));
}

#define CUDA(call) cuda_check(call, #call)
#define CUBLAS(call) cublas_check(call, #call)

// Under g++ the header has these, and the tensor cores' instructions that follow.
#ifdef __CUDACC__
#define LAUNCH(kernel, grid, block, bytes, ...) \
    kernel<<<grid, block, bytes, stream>>>(__VA_ARGS__)
#define SHARED(type, name, ...) __shared__ __align__(16) type name __VA_ARGS__
#define DYNAMIC_SHARED(type, name) \
    extern __shared__ __align__(1024) unsigned char shared_bytes[]; \
    type *name = (type *)shared_bytes

#ifdef MOE_BF16
__device__ static unsigned shared_address(const void *p)
{
    return (unsigned)__cvta_generic_to_shared(p);
}

// d[16,8] += a[16,16] b[16,8], spread over a warp as PTX's mma.m16n8k16 has it.
__device__ static void mma_16x8x16(float d[4], const uint32_t a[4], const uint32_t b[2])
{
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Four 8 x 8 matrices from shared memory; lane l gives the address of row l % 8 of matrix l / 8.
__device__ static void ldmatrix_x4(uint32_t r[4], const void *row)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row))
                 : "memory");
}

__device__ static void ldmatrix_x4_trans(uint32_t r[4], const void *row)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row))
                 : "memory");
}

// Copies 16 bytes to shared memory while the thread goes on; zeros unless valid.
__device__ static void cp_async_16(void *to, const void *from, bool valid)
{
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :: "r"(shared_address(to)), "l"(from), "r"(valid ? 16 : 0) : "memory");
}

__device__ static void cp_async_commit(void)
{
    asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most N of the thread's groups of copies are under way.
template <int N> __device__ static void cp_async_wait(void)
{
    asm volatile("cp.async.wait_group %0;" :: "n"(N) : "memory");
}
#endif // MOE_BF16

#ifdef MOE_HOPPER
// Barriers in shared memory, of which each phase ends with so many arrivals and with all the bytes
// that were expected.
__device__ static void mbarrier_init(uint64_t *b, int arrivals)
{
    asm volatile("mbarrier.init.shared.b64 [%0], %1;"
                 :: "r"(shared_address(b)), "r"(arrivals) : "memory");
}

// After the inits, before __syncthreads.
__device__ static void mbarrier_init_done(void)
{
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ static void mbarrier_arrive(uint64_t *b)
{
    asm volatile("mbarrier.arrive.shared.b64 _, [%0];" :: "r"(shared_address(b)) : "memory");
}

__device__ static void mbarrier_expect(uint64_t *b, int bytes) // arrives, too
{
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;"
                 :: "r"(shared_address(b)), "r"(bytes) : "memory");
}

// Waits for the end of phases 0, 2, 4, .. (parity 0) or 1, 3, .. (1), if such a one is under way.
__device__ static void mbarrier_wait(uint64_t *b, int parity)
{
    int done = 0;
    while (!done)
        asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2; "
                     "selp.s32 %0, 1, 0, p;}"
                     : "=r"(done) : "r"(shared_address(b)), "r"(parity) : "memory");
}

// The tensor memory accelerator copies boxes of a matrix x[rows, cols] to shared memory, as many
// rows as the map says of 64 numbers, with zeros where the matrix ends. Of row r the 16 bytes at
// place i stand at place i ^ r % 8, so that those of a column are not all in the same banks.
typedef CUtensorMap TensorMap;

static TensorMap tensor_map(const real *x, size_t rows, size_t cols, size_t ld, int box_rows)
{
    static decltype(&cuTensorMapEncodeTiled) encode;
    cudaDriverEntryPointQueryResult found;
    TensorMap map;
    cuuint64_t sizes[2] = {cols, rows}, stride = ld * sizeof(real);
    cuuint32_t box[2] = {64, (cuuint32_t)box_rows}, steps[2] = {1, 1};
    if (!encode)
#if CUDART_VERSION >= 12050
        CUDA(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", (void **)&encode, 12000,
                                              cudaEnableDefault, &found));
#else
        CUDA(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", (void **)&encode, cudaEnableDefault,
                                     &found));
#endif
    if (encode(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, (void *)x, sizes, &stride, box, steps,
               CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
               CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE))
        die(FAILED, "cuTensorMapEncodeTiled refuses a matrix of %zu x %zu", rows, cols);
    return map;
}

// Begins to copy the box at x[row, col]; it arrives at b.
__device__ static void tma_load(real *to, const TensorMap *map, int col, int row, uint64_t *b)
{
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%2, %3}], [%4];"
                 :: "r"(shared_address(to)), "l"(map), "r"(col), "r"(row), "r"(shared_address(b))
                 : "memory");
}

// What wgmma reads: boxes of 64 numbers times any number of rows; the next is `next` bytes on.
__device__ static uint64_t wgmma_operand(const real *x, int next)
{
    return (uint64_t)(shared_address(x) >> 4 & 0x3fff) | (uint64_t)(next >> 4) << 16 |
           (uint64_t)(1024 >> 4) << 32 | (uint64_t)1 << 62;
}

// d[64,n] += a[64,16] b[16,n] (= unless ADD) by four warps, 16 rows each, spread as by mma_16x8x16.
// a is stored [64,16] or, A_T, [16,64], or it is in registers; b [n,16] or, B_T, [16,n]. One
// instruction for each n, in which d takes the registers %0 .. %(n/2 - 1) and a, b and the three
// flags those after.
#define R0 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define R16 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define R32 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define R48 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define R64 "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define R80 "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define R96 "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, " \
            "%110, %111"
#define R112 "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, " \
             "%125, %126, %127"
#define R32_ALL R0 ", " R16
#define R64_ALL R32_ALL ", " R32 ", " R48
#define R96_ALL R64_ALL ", " R64 ", " R80
#define R128_ALL R96_ALL ", " R96 ", " R112
#define D4(i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
#define D16(i) D4(i), D4(i + 1), D4(i + 2), D4(i + 3)
#define D64(i) D16(i), D16(i + 4), D16(i + 8), D16(i + 12)
#define WGMMA(N, registers, a_in_memory, a_in_registers, ...) \
    template <bool A_T, bool B_T, bool ADD = true> \
    __device__ static void wgmma(float (&d)[N / 8][4], const real *a, const real *b, int next) \
    { \
        asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" registers "}, " \
                     a_in_memory ";" : __VA_ARGS__ \
                     : "l"(wgmma_operand(a, next)), "l"(wgmma_operand(b, next)), "n"(A_T), \
                       "n"(B_T), "n"(ADD)); \
    } \
    template <bool B_T> \
    __device__ static void wgmma(float (&d)[N / 8][4], const uint32_t (&a)[4], const real *b, \
                                 int next) \
    { \
        asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" registers "}, " \
                     a_in_registers ";" : __VA_ARGS__ \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(wgmma_operand(b, next)), \
                       "n"(B_T)); \
    }
WGMMA(64, R32_ALL, "%32, %33, %36, 1, 1, %34, %35", "{%32, %33, %34, %35}, %36, 1, 1, 1, %37",
      D16(0), D16(4))
WGMMA(128, R64_ALL, "%64, %65, %68, 1, 1, %66, %67", "{%64, %65, %66, %67}, %68, 1, 1, 1, %69",
      D64(0))
WGMMA(192, R96_ALL, "%96, %97, %100, 1, 1, %98, %99", "{%96, %97, %98, %99}, %100, 1, 1, 1, %101",
      D64(0), D16(16), D16(20))
WGMMA(256, R128_ALL, "%128, %129, %132, 1, 1, %130, %131",
      "{%128, %129, %130, %131}, %132, 1, 1, 1, %133", D64(0), D64(16))

// A series of wgmma on d begins with a fence; it goes on while the threads do something else, until
// at most PENDING of the series that were committed are under way.
template <int N> __device__ static void wgmma_fence(float (&d)[N][4])
{
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : D4(i) :: "memory");
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ static void wgmma_commit(void)
{
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

template <int PENDING, int N> __device__ static void wgmma_wait(float (&d)[N][4])
{
    asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(PENDING) : "memory");
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : D4(i) :: "memory");
}

// Four warps take or give back registers, so that each thread has N.
template <int N> __device__ static void take_registers(void)
{
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" :: "n"(N));
}
template <int N> __device__ static void give_registers(void)
{
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" :: "n"(N));
}

// What this thread stored in shared memory is what wgmma reads from now on.
__device__ static void wgmma_see_shared(void) { asm volatile("fence.proxy.async;" ::: "memory"); }

// Adds 4 numbers or 8 to what stands at `to`, in L2, without waiting for it.
__device__ static void add_16_bytes(float *to, const uint32_t x[4])
{
    asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};"
                 :: "l"(to), "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]) : "memory");
}
__device__ static void add_16_bytes(real *to, const uint32_t x[4])
{
    asm volatile("red.global.add.noftz.v4.bf16x2 [%0], {%1, %2, %3, %4};"
                 :: "l"(to), "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]) : "memory");
}
#endif // MOE_HOPPER
#endif // __CUDACC__

// Starts a kernel with `bytes` of dynamic shared memory. An empty grid does nothing.
#define RUN_KERNEL(kernel, grid, block, bytes, ...) \
    do { \
        dim3 kernel_grid = grid; \
        if (kernel_grid.x == 0 || kernel_grid.y == 0 || kernel_grid.z == 0) break; \
        if ((bytes) > 48 << 10) \
            CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, \
                                      (int)(bytes))); \
        LAUNCH(kernel, kernel_grid, block, bytes, __VA_ARGS__); \
        CUDA(cudaGetLastError()); \
    } while (0)

static cublasHandle_t cublas;
static cudaStream_t stream; // all work goes there; cudaMemcpy waits for it

#ifdef MOE_MPI
static ncclComm_t nccl;

static void nccl_check(ncclResult_t status, const char *call)
{
    if (status != ncclSuccess) die(FAILED, "%.40s: %s", call, ncclGetErrorString(status));
}
#define NCCL(call) nccl_check(call, #call)

// Gives each process of a machine a GPU of its own, and tells NCCL of all of them.
static void nccl_start(int devices)
{
    ncclUniqueId id;
    if (local_rank >= devices)
        die(FAILED, "more processes than GPUs on this machine, which has %d", devices);
    CUDA(cudaSetDevice(local_rank));
    if (rank == 0) NCCL(ncclGetUniqueId(&id));
    MPI_Bcast(&id, sizeof id, MPI_BYTE, 0, MPI_COMM_WORLD);
    NCCL(ncclCommInitRank(&nccl, ranks, id, rank));
}
#endif

__global__ void probe_kernel(int) {}

// Finds the GPU, once, and whether it runs what is here.
static void device_start(void)
{
    enum { CUBLAS_MEMORY = 32 << 20 }; // bytes, as many as it would take on an H100
    int devices = 0;
    void *memory = NULL;
    if (cublas) return;
    CUDA(cudaGetDeviceCount(&devices));
#ifdef MOE_MPI
    nccl_start(devices);
#endif
    if (sizeof(real) < sizeof(accum) && gpu_arch() < 80)
        die(FAILED, "this GPU, sm_%d, has no bfloat16 tensor cores; make gpu PRECISION=fp32 does "
            "without", gpu_arch());
    CUDA(cudaStreamCreate(&stream));
    RUN_KERNEL(probe_kernel, 1, 32, 0, 0);
    CUBLAS(cublasCreate(&cublas));
    // where it shares out a sum, not to add up the parts in bfloat16
    CUBLAS(cublasSetMathMode(cublas, CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION));
    CUDA(cudaMalloc(&memory, CUBLAS_MEMORY)); // it may not allocate what replay_begin records
    CUBLAS(cublasSetStream(cublas, stream));  // forgets the memory
    CUBLAS(cublasSetWorkspace(cublas, memory, CUBLAS_MEMORY));
}

static void *device_alloc(size_t bytes)
{
    void *p = NULL;
    device_start();
    CUDA(cudaMalloc(&p, bytes ? bytes : 1));
    return p;
}

static void device_free(void *p)
{
    if (p) CUDA(cudaFree(p));
}
static void device_finish(void) { CUDA(cudaDeviceSynchronize()); }
static void device_zero(void *p, size_t bytes)
{
    METER(__func__, 0, bytes);
    CUDA(cudaMemsetAsync(p, 0, bytes, stream));
}
static void device_copy(void *to, const void *from, size_t bytes)
{
    METER(__func__, 0, 2 * bytes);
    CUDA(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, stream));
}
static void to_device(void *to, const void *from, size_t bytes)
{
    CUDA(cudaMemcpy(to, from, bytes, cudaMemcpyHostToDevice));
}
static void to_host(void *to, const void *from, size_t bytes)
{
    CUDA(cudaMemcpy(to, from, bytes, cudaMemcpyDeviceToHost));
}

static void reals_to_device(real *to, const accum *from, size_t n)
{
    real *rounded = (real *)host_alloc(n, sizeof(real));
    #pragma omp parallel for
    for (size_t i = 0; i < n; i++) rounded[i] = (real)from[i];
    to_device(to, rounded, n * sizeof(real));
    free(rounded);
}

static void reals_to_host(accum *to, const real *from, size_t n)
{
    real *rounded = (real *)host_alloc(n, sizeof(real));
    to_host(rounded, from, n * sizeof(real));
    for (size_t i = 0; i < n; i++) to[i] = (accum)rounded[i];
    free(rounded);
}

static double free_memory(void)
{
    size_t available = 0, all = 0;
    device_start();
    CUDA(cudaMemGetInfo(&available, &all));
    return (double)available;
}

// Memory for one operation, kept from call to call: kernels run in order, so that none still needs
// what the one before left there.
static size_t scratch_size;
static void *scratch(size_t bytes)
{
    static void *memory;
    if (bytes > scratch_size) {
        device_free(memory);
        memory = device_alloc(bytes);
        scratch_size = bytes;
    }
    return memory;
}

// A launch costs the host more time than a small kernel the GPU; what is recorded, a CUDA graph, is
// launched as a whole. A series is recorded the second time it comes: the first time scratch grows
// and kernels are loaded. Only the latest are kept, as of ever fewer rows none may come again.
enum { RECORDINGS = 8 };
typedef struct {
    double key;
    size_t scratch_size;   // when it was recorded: as scratch grows it moves
    cudaGraphExec_t graph; // NULL: not recorded
} Recording;

typedef struct {
    Recording last[RECORDINGS]; // the latest first
    int recording;
} Replay;

static void recording_free(Recording *r)
{
    if (r->graph) CUDA(cudaGraphExecDestroy(r->graph));
    memset(r, 0, sizeof *r);
}

static int replay_begin(Replay *r, double key)
{
    size_t i = 0;
    if (metered.on || hold_routing) return 1;
    while (i < RECORDINGS - 1 && r->last[i].key != key) i++;
    Recording it = r->last[i];
    int again = it.key == key;
    if (!again || it.scratch_size != scratch_size) recording_free(&it);
    it.key = key, it.scratch_size = scratch_size;
    memmove(r->last + 1, r->last, i * sizeof it);
    r->last[0] = it;
    r->recording = again && !it.graph;
    if (it.graph) CUDA(cudaGraphLaunch(it.graph, stream));
    if (r->recording) CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    return !it.graph;
}

static void replay_end(Replay *r)
{
    cudaGraph_t graph = NULL;
    if (!r->recording) return;
    r->recording = 0;
    CUDA(cudaStreamEndCapture(stream, &graph));
    CUDA(cudaGraphInstantiate(&r->last[0].graph, graph, 0));
    CUDA(cudaGraphDestroy(graph));
    CUDA(cudaGraphLaunch(r->last[0].graph, stream));
}

static void replay_free(Replay *r)
{
    for (size_t i = 0; i < RECORDINGS; i++) recording_free(&r->last[i]);
}

// W numbers that are loaded and stored at once, or 16 bytes at a time.
template <typename T, int W> struct alignas(W * sizeof(T) < 16 ? W * sizeof(T) : 16) Pack {
    T x[W];
};

template <int W, typename T> __device__ static Pack<T, W> load(const T *x)
{
    return *(const Pack<T, W> *)x;
}

template <int W, typename T> __device__ static void store(T *x, Pack<T, W> p)
{
    *(Pack<T, W> *)x = p;
}

// Launches the kernel<W> that takes W = WIDE numbers, 16 bytes of real, at once if all strides, in
// numbers, and pointers divide; else the one that takes single numbers.
enum { WIDE = 16 / sizeof(real) };
#define RUN_WIDE(strides, pointers, kernel, ...) \
    do { \
        if ((strides) % WIDE == 0 && (pointers) % 16 == 0) { \
            constexpr int W = WIDE; \
            RUN_KERNEL(kernel, __VA_ARGS__); \
        } else { \
            constexpr int W = 1; \
            RUN_KERNEL(kernel, __VA_ARGS__); \
        } \
    } while (0)
#define AT(pointer) ((size_t)(pointer))

// The packs of n numbers that fall to a thread of the grid.
#define FOR_PACKS(i, n) \
    for (size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * W; i < (n); \
         i += (size_t)gridDim.x * blockDim.x * W)

enum { WARP = 32, BLOCK = 256 }; // threads, of a block at most
static unsigned grid_of(size_t n, size_t block) { return (unsigned)ceil_div(n, block); }

// Threads for a row of n numbers.
static unsigned row_threads(size_t n)
{
    return (unsigned)min_size(ceil_div(ceil_div(n, WIDE), WARP) * WARP, BLOCK);
}

__device__ static float warp_sum(float x)
{
    for (int d = WARP / 2; d > 0; d /= 2) x += __shfl_xor_sync(~0u, x, d);
    return x;
}

__device__ static float warp_max(float x)
{
    for (int d = WARP / 2; d > 0; d /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, d));
    return x;
}

// The sum or the largest of the x of all threads of a block, to all of them.
template <bool MAX> __device__ static float block_reduce(float x)
{
    SHARED(float, part, [BLOCK / WARP]);
    int warps = (int)blockDim.x / WARP, lane = (int)threadIdx.x % WARP;
    x = MAX ? warp_max(x) : warp_sum(x);
    __syncthreads(); // part of an earlier call has been read
    if (lane == 0) part[threadIdx.x / WARP] = x;
    __syncthreads();
    x = lane < warps ? part[lane] : MAX ? -INFINITY : 0;
    return MAX ? warp_max(x) : warp_sum(x);
}

constexpr float LOG2_E = 1.44269504f; // exp(x) is exp2(x LOG2_E)
#ifdef __CUDACC__
__device__ static float exp2_approx(float x) // to 2 ulp
{
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
#endif

// To a few ulp: by the GPU's fast exp2 and reciprocal.
__device__ static float sigmoid(float x)
{
    return __fdividef(1, 1 + exp2_approx(-LOG2_E * x));
}

// c[m,n] = op(a) op(b) + beta c by cuBLAS, `batch` times; rows of c, a and b are ldc, lda and ldb
// apart. op(a) is a[m,k], or the transpose of a[k,m] if a_t; likewise b. To cuBLAS, which has its
// columns where we have rows, this is c^T = op(b)^T op(a)^T.
template <typename Out>
static void gemm(Out *c, size_t ldc, const real *a, int a_t, size_t lda, const real *b, int b_t,
                 size_t ldb, size_t m, size_t n, size_t k, float beta, size_t batch = 1,
                 size_t c_step = 0, size_t a_step = 0, size_t b_step = 0)
{
    const cudaDataType in = sizeof(real) == 4 ? CUDA_R_32F : CUDA_R_16BF;
    const cudaDataType out = sizeof(Out) == 4 ? CUDA_R_32F : CUDA_R_16BF;
    const float one = 1;
    cublasOperation_t op_a = a_t ? CUBLAS_OP_T : CUBLAS_OP_N;
    cublasOperation_t op_b = b_t ? CUBLAS_OP_T : CUBLAS_OP_N;
    if (m == 0 || n == 0 || k == 0 || batch == 0) return;
    if (batch == 1)
        CUBLAS(cublasGemmEx(cublas, op_b, op_a, (int)n, (int)m, (int)k, &one, b, in, (int)ldb, a,
                            in, (int)lda, &beta, c, out, (int)ldc, CUBLAS_COMPUTE_32F,
                            CUBLAS_GEMM_DEFAULT));
    else
        CUBLAS(cublasGemmStridedBatchedEx(
            cublas, op_b, op_a, (int)n, (int)m, (int)k, &one, b, in, (int)ldb, (long long)b_step,
            a, in, (int)lda, (long long)a_step, &beta, c, out, (int)ldc, (long long)c_step,
            (int)batch, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT));
}

// Matrix products of experts, all in one launch: a block finds its expert from the offsets, which
// only the GPU knows, and computes a tile of TILE x TILE numbers of
//     c[m,n] = sum_k a(m,k) b(k,n),
// where a is stored [m,k], or [k,m] if A_T, and b [k,n], or [n,k] if B_T. The three uses:
//     out = x W^T:  m are rows, n outputs, k inputs     (B_T)
//     dx = dout W:  m are rows, n inputs, k outputs
//     dW = dout^T x: m are outputs, n inputs, k rows    (A_T)
// 2 m n k FLOPs; each tile of c reads 2 TILE k numbers, mostly from L2.
#ifdef MOE_BF16

// By tensor cores: 4 warps, 2 x 2, of 64 x 64 numbers each, so that a number from shared memory is
// multiplied 64 times. Strips of TILE_K along k arrive there while those before are multiplied.
enum { TILE_THREADS = 128, TILE = 128, TILE_K = 32, STAGES = 4, WARP_TILE = 64 };

// Fragments for mma_16x8x16 of 16 x 16 numbers in shared memory, whose rows stand ld apart: of a
// stored [m,k] or, _t, [k,m]; two of b, of 8 columns each, stored [n,k] or, _t, [k,n].
__device__ static void fragment_a(uint32_t r[4], const real *x, int ld)
{
    int lane = (int)threadIdx.x % WARP;
    ldmatrix_x4(r, x + lane % 16 * ld + lane / 16 * 8);
}

__device__ static void fragment_a_t(uint32_t r[4], const real *x, int ld)
{
    int lane = (int)threadIdx.x % WARP;
    ldmatrix_x4_trans(r, x + (lane % 8 + lane / 16 * 8) * ld + lane / 8 % 2 * 8);
}

__device__ static void fragment_b(uint32_t r[4], const real *x, int ld)
{
    int lane = (int)threadIdx.x % WARP;
    ldmatrix_x4(r, x + (lane % 8 + lane / 16 * 8) * ld + lane / 8 % 2 * 8);
}

__device__ static void fragment_b_t(uint32_t r[4], const real *x, int ld)
{
    int lane = (int)threadIdx.x % WARP;
    ldmatrix_x4_trans(r, x + lane % 16 * ld + lane / 16 * 8);
}

__device__ static uint32_t pack_bf16(float low, float high)
{
    union { __nv_bfloat162 pair; uint32_t bits; } u;
    u.pair = __floats2bfloat162_rn(low, high);
    return u.bits;
}

// Begins to copy x[tile_rows, width] to shared memory, with zeros from row `rows` and column `cols`
// on. wide: x is aligned to 16 bytes, and ld_x, width and cols divide by 8. By all of a block,
// ACROSS threads to a row.
template <int ACROSS>
__device__ static void copy_tile(real *to, int ld, int tile_rows, int width, const real *x,
                                 size_t ld_x, int rows, int cols, int wide)
{
    if (wide) {
        int row = (int)threadIdx.x / ACROSS, begin = (int)threadIdx.x % ACROSS * 8;
#pragma unroll 1 // registers are short
        for (; row < tile_rows; row += (int)blockDim.x / ACROSS)
            for (int col = begin; col < width; col += ACROSS * 8) {
                int valid = row < rows && col < cols;
                cp_async_16(to + row * ld + col, valid ? x + row * ld_x + col : x, valid);
            }
    } else {
        for (int i = (int)threadIdx.x; i < tile_rows * width; i += (int)blockDim.x) {
            int row = i / width, col = i % width, valid = row < rows && col < cols;
            to[row * ld + col] = valid ? x[row * ld_x + col] : (real)0.0f;
        }
    }
}

// Rows in shared memory are an odd number of 16 bytes apart, so that ldmatrix meets each bank once.
template <bool T> constexpr int operand_ld = (T ? TILE : TILE_K) + 8;
template <bool T> constexpr int operand_size = (T ? TILE_K : TILE) * operand_ld<T>;

template <bool T>
__device__ static void copy_operand(real *to, const real *x, size_t ld, int m, int k, int wide)
{
    if (T) copy_tile<TILE / 8>(to, operand_ld<T>, TILE_K, TILE, x, ld, k, m, wide);
    else copy_tile<TILE_K / 8>(to, operand_ld<T>, TILE, TILE_K, x, ld, m, k, wide);
}

// The tile at a(0,0), b(0,0) and c(0,0), of which m rows and n columns exist.
template <bool A_T, bool B_T, typename Out>
__device__ static void gemm_tile(Out *c, size_t ldc, const real *a, size_t lda, const real *b,
                                 size_t ldb, int m, int n, int k, int add, int wide)
{
    DYNAMIC_SHARED(real, shared);
    constexpr int a_size = operand_size<A_T>, stage = a_size + operand_size<!B_T>;
    constexpr int ld_a = operand_ld<A_T>, ld_b = operand_ld<!B_T>;
    int warp = (int)threadIdx.x / WARP, lane = (int)threadIdx.x % WARP;
    int row = warp / 2 * WARP_TILE, col = warp % 2 * WARP_TILE, steps = (k + TILE_K - 1) / TILE_K;
    float acc[WARP_TILE / 16][WARP_TILE / 8][4];
    for (int i = 0; i < WARP_TILE / 16; i++)
        for (int j = 0; j < WARP_TILE / 8; j++)
            for (int e = 0; e < 4; e++) acc[i][j][e] = 0;

    auto fetch = [&](int step) {
        real *to = shared + step % STAGES * stage;
        size_t at = (size_t)step * TILE_K;
        if (step < steps) {
            copy_operand<A_T>(to, a + at * (A_T ? lda : 1), lda, m, k - (int)at, wide);
            copy_operand<!B_T>(to + a_size, b + at * (B_T ? 1 : ldb), ldb, n, k - (int)at, wide);
        }
        cp_async_commit();
    };
    for (int step = 0; step < STAGES - 1; step++) fetch(step);
    for (int step = 0; step < steps; step++) {
        cp_async_wait<STAGES - 2>();
        __syncthreads(); // this stage has come, and the one before it has been used
        fetch(step + STAGES - 1);
        const real *as = shared + step % STAGES * stage, *bs = as + a_size;
#pragma unroll
        for (int p = 0; p < TILE_K; p += 16) {
            uint32_t af[WARP_TILE / 16][4], bf[WARP_TILE / 16][4];
#pragma unroll
            for (int i = 0; i < WARP_TILE / 16; i++)
                if (A_T) fragment_a_t(af[i], as + p * ld_a + row + 16 * i, ld_a);
                else fragment_a(af[i], as + (row + 16 * i) * ld_a + p, ld_a);
#pragma unroll
            for (int j = 0; j < WARP_TILE / 16; j++)
                if (B_T) fragment_b(bf[j], bs + (col + 16 * j) * ld_b + p, ld_b);
                else fragment_b_t(bf[j], bs + p * ld_b + col + 16 * j, ld_b);
#pragma unroll
            for (int i = 0; i < WARP_TILE / 16; i++)
#pragma unroll
                for (int j = 0; j < WARP_TILE / 8; j++)
                    mma_16x8x16(acc[i][j], af[i], bf[j / 2] + j % 2 * 2);
        }
    }
    cp_async_wait<0>();
#pragma unroll
    for (int i = 0; i < WARP_TILE / 16; i++)
#pragma unroll
        for (int j = 0; j < WARP_TILE / 8; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                int r = row + 16 * i + lane / 4 + e / 2 * 8, s = col + 8 * j + lane % 4 * 2 + e % 2;
                if (r >= m || s >= n) continue;
                Out *to = c + (size_t)r * ldc + s;
                *to = (Out)(add ? (float)*to + acc[i][j][e] : acc[i][j][e]);
            }
}

template <bool A_T, bool B_T> static size_t tile_bytes(void)
{
    return STAGES * (operand_size<A_T> + operand_size<!B_T>) * sizeof(real);
}

#else // float: the same by multiply-adds, 4 x 4 numbers a thread

enum { TILE_THREADS = 256, TILE = 64, TILE_K = 16 };

template <bool A_T, bool B_T, typename Out>
__device__ static void gemm_tile(Out *c, size_t ldc, const real *a, size_t lda, const real *b,
                                 size_t ldb, int m, int n, int k, int add, int)
{
    SHARED(float, as, [TILE_K][TILE + 1]);
    SHARED(float, bs, [TILE_K][TILE + 1]);
    int row = (int)threadIdx.x / 16 * 4, col = (int)threadIdx.x % 16 * 4;
    float acc[4][4] = {};
    for (int k0 = 0; k0 < k; k0 += TILE_K) {
        __syncthreads(); // the strip before has been used
        for (int i = (int)threadIdx.x; i < TILE * TILE_K; i += TILE_THREADS) {
            int am = A_T ? i % TILE : i / TILE_K, ak = A_T ? i / TILE : i % TILE_K;
            int bn = B_T ? i / TILE_K : i % TILE, bk = B_T ? i % TILE_K : i / TILE;
            size_t a_at = A_T ? (size_t)(k0 + ak) * lda + am : (size_t)am * lda + k0 + ak;
            size_t b_at = B_T ? (size_t)bn * ldb + k0 + bk : (size_t)(k0 + bk) * ldb + bn;
            as[ak][am] = am < m && k0 + ak < k ? a[a_at] : 0;
            bs[bk][bn] = bn < n && k0 + bk < k ? b[b_at] : 0;
        }
        __syncthreads();
        for (int p = 0; p < TILE_K; p++)
            for (int i = 0; i < 4; i++)
                for (int j = 0; j < 4; j++) acc[i][j] += as[p][row + i] * bs[p][col + j];
    }
    for (int i = 0; i < 4 && row + i < m; i++)
        for (int j = 0; j < 4 && col + j < n; j++) {
            Out *to = c + (size_t)(row + i) * ldc + col + j;
            *to = add ? *to + acc[i][j] : acc[i][j];
        }
}

template <bool A_T, bool B_T> static size_t tile_bytes(void) { return 0; }

#endif

// The group in which a tile of rows lies, and the tile's first row; -1 if there are fewer tiles. By
// a warp, 32 groups at a time.
__device__ static int find_tile(int *row, const int *offsets, int groups, int tile)
{
    int lane = (int)threadIdx.x % WARP, before = 0;
    for (int e0 = 0; e0 < groups; e0 += WARP) {
        int e = e0 + lane, end;
        int mine = e < groups ? (offsets[e + 1] - offsets[e] + TILE - 1) / TILE : 0;
        end = mine;
        for (int d = 1; d < WARP; d *= 2) {
            int other = __shfl_up_sync(~0u, end, d);
            if (lane >= d) end += other;
        }
        unsigned above = __ballot_sync(~0u, before + end > tile);
        if (above) {
            int first = __ffs((int)above) - 1;
            int skipped = before + __shfl_sync(~0u, end - mine, first);
            *row = offsets[e0 + first] + (tile - skipped) * TILE;
            return e0 + first;
        }
        before += __shfl_sync(~0u, end, WARP - 1);
    }
    return -1;
}

// Blocks [tiles of rows, of all groups together at most; tiles of n].
template <bool B_T>
__global__ void __launch_bounds__(TILE_THREADS, 2)
grouped_rows_kernel(real *c, const real *a, const real *w, const int *offsets, int groups, int n,
                    int k, int add, int wide)
{
    int row = 0, e = find_tile(&row, offsets, groups, (int)blockIdx.y);
    int col = (int)blockIdx.x * TILE;
    if (e < 0) return;
    const real *b = w + (size_t)e * n * k + (size_t)col * (B_T ? k : 1);
    gemm_tile<false, B_T>(c + (size_t)row * n + col, n, a + (size_t)row * k, k, b, B_T ? k : n,
                          offsets[e + 1] - row, n - col, k, add, wide);
}

// Blocks [tiles of I, tiles of O, groups].
__global__ void __launch_bounds__(TILE_THREADS, 2)
grouped_weights_kernel(accum *dw, const real *dout, const real *x, const int *offsets, int O, int I,
                       int add, int wide)
{
    int begin = offsets[blockIdx.z], rows = offsets[blockIdx.z + 1] - begin;
    int o = (int)blockIdx.y * TILE, i = (int)blockIdx.x * TILE;
    if (rows == 0 && add) return;
    gemm_tile<true, false>(dw + ((size_t)blockIdx.z * O + o) * I + i, I,
                           dout + (size_t)begin * O + o, O, x + (size_t)begin * I + i, I, O - o,
                           I - i, rows, add, wide);
}

#ifdef MOE_HOPPER
// The same on Hopper. Blocks stay and take one tile after the other, of TILE x TILE_N numbers. A
// ninth warp of each has strips of 64 along k brought to shared memory, some ahead and on into the
// next tile; two times four warps multiply them from there, 64 rows of the tile each, with the
// registers of three more warps. Two barriers belong to each place for a strip: the phases of
// `full` end as a strip has come, those of `empty` as the eight warps are done with it.
// More operands make of two products one. GATED: half a tile's columns are of gate = x W_gate^T and
// half the same of up = x W_up^T, and act = silu(gate) up. SUMMED: the strips of dgate W_gate are
// followed by those of dup W_up.
enum { BOX = 64, BOX_SIZE = BOX * BOX, HOPPER_THREADS = 12 * WARP, TILE_N = 256 };
enum { STRIP = (TILE + TILE_N) * BOX, STRIPS = 4 }; // what shared memory holds of them
enum Product { PLAIN, GATED, SUMMED };

struct Operands {
    TensorMap a, b, a2 = {}, b2 = {};
};

// A tile of c: where it begins in c, a and b, and how many m, n and k there are from there.
typedef struct {
    size_t c;
    int a_m, a_k, b_n, b_k, m, n, k;
} Place;

// The tile of x W^T or dout W or, A_T, of dout^T x, WIDTH columns. Returns 0 if there are fewer. By
// a warp.
template <bool A_T, bool B_T, int WIDTH>
__device__ static int place_tile(Place *p, int tile, const int *offsets, int groups, int m, int n,
                                 int k)
{
    int across = (n + WIDTH - 1) / WIDTH, col = tile % across * WIDTH, row = 0, e;
    if (A_T) {
        int down = (m + TILE - 1) / TILE;
        e = tile / across / down, row = tile / across % down * TILE;
        if (e >= groups) return 0;
        int begin = offsets[e];
        *p = {((size_t)e * m + row) * n + col, row, begin, col, begin, m - row, n - col,
              offsets[e + 1] - begin};
    } else {
        e = find_tile(&row, offsets, groups, tile / across);
        if (e < 0) return 0;
        *p = {(size_t)row * n + col, row, 0, B_T ? e * n + col : col, B_T ? 0 : e * k,
              offsets[e + 1] - row, n - col, k};
    }
    return 1;
}

// SIZE numbers along m times 64 along k of an operand, that stand [m,k] or, T, [k,m].
template <bool T, int SIZE>
__device__ static void load_strip(real *to, const TensorMap *x, int m, int k, uint64_t *arrives)
{
    if (!T) tma_load(to, x, k, m, arrives);
    for (int i = 0; T && i < SIZE; i += BOX) tma_load(to + i * BOX, x, m + i, k, arrives);
}

// acc[64, 8 N] += a strip.
template <bool A_T, bool B_T, int N>
__device__ static void multiply_strip(float (&acc)[N][4], const real *as, const real *bs)
{
    wgmma_fence(acc);
#pragma unroll
    for (int i = 0; i < BOX; i += 16)
        wgmma<A_T, !B_T>(acc, as + (A_T ? i * BOX : i), bs + (B_T ? i : i * BOX),
                         BOX_SIZE * sizeof(real));
    wgmma_commit();
    wgmma_wait<0>(acc);
}

// Stores or adds BLOCKS blocks of 8 columns of an accumulator, in the upper row of a lane's two or
// the lower. Four lanes have a row, of each block two numbers a lane; they exchange them, so that a
// lane has 16 bytes of one block. c is where the row begins, of which n columns exist.
template <typename Out>
__device__ static void store_blocks(Out *c, const float (*acc)[4], int half, int first, int n,
                                    int add)
{
    constexpr int BLOCKS = 8 / sizeof(Out), WORDS = 4 / BLOCKS; // 4 bytes each, of a lane and block
    int lane = (int)threadIdx.x % 4, at = 8 * (first + lane % BLOCKS) + lane / BLOCKS * 4;
    uint32_t word[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float *two = acc[first + i / WORDS] + 2 * half;
        word[i] = WORDS == 1 ? pack_bf16(two[0], two[1]) : __float_as_uint(two[i % WORDS]);
    }
#pragma unroll
    for (int d = 1; d < BLOCKS; d *= 2)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (i & d * WORDS) continue;
            uint32_t &one = word[i], &other = word[i | d * WORDS];
            uint32_t got = __shfl_xor_sync(~0u, lane & d ? one : other, d);
            if (lane & d) one = got;
            else other = got;
        }
    if (at >= n) return; // n divides by 8
    if (add) add_16_bytes(c + at, word); // only this thread does
    else *(uint4 *)(c + at) = {word[0], word[1], word[2], word[3]};
}

// The first COLUMNS / 8 blocks of an accumulator, to row `row` of the tile at c and row + 8.
template <int COLUMNS, typename Out>
__device__ static void store_tile(Out *c, const float (*acc)[4], int row, const Place &p, size_t ld,
                                  int add)
{
    Out *to = c + p.c + row * ld;
#pragma unroll
    for (int j = 0; j < COLUMNS / 8; j += 8 / sizeof(Out)) {
        store_blocks(to, acc, 0, j, row < p.m ? p.n : 0, add);
        store_blocks(to + 8 * ld, acc, 1, j, row + 8 < p.m ? p.n : 0, add);
    }
}

template <bool A_T, bool B_T, Product PRODUCT, typename Out>
__global__ void __launch_bounds__(HOPPER_THREADS, 1)
wgmma_kernel(Out *c, Out *gate, Out *up, const __grid_constant__ Operands x, const int *offsets,
             int groups, int m, int n, int k, int add)
{
    constexpr int WIDTH = PRODUCT == GATED ? TILE_N / 2 : TILE_N;
    DYNAMIC_SHARED(real, shared); // [STRIPS, STRIP]
    SHARED(uint64_t, full, [STRIPS]);
    SHARED(uint64_t, empty, [STRIPS]);
    SHARED(uint64_t, cut, );
    int warp = (int)threadIdx.x / WARP, lane = (int)threadIdx.x % WARP, at = 0, round = 0;
    int tile = (int)blockIdx.x;
    Place p;
    if (threadIdx.x == 0) {
        for (int i = 0; i < STRIPS; i++) mbarrier_init(&full[i], 1), mbarrier_init(&empty[i], 8);
        mbarrier_init(&cut, 1);
        mbarrier_init_done();
    }
    __syncthreads();
    if (warp >= 8) {
        give_registers<40>();
        if (warp > 8) return;
        int cuts = 0;
        for (; place_tile<A_T, B_T, WIDTH>(&p, tile, offsets, groups, m, n, k); tile += gridDim.x)
            for (int from = 0, second = 0; from < p.k;) {
                int tail = A_T && p.k - from < BOX; // of k that are rows
                real *to = shared + at * STRIP, *bs = to + TILE * BOX;
                uint64_t *arrives = tail ? &cut : &full[at];
                mbarrier_wait(&empty[at], round ^ 1);
                if (lane == 0) {
                    mbarrier_expect(arrives, STRIP * sizeof(real));
                    load_strip<A_T, TILE>(to, second ? &x.a2 : &x.a, p.a_m, p.a_k + from, arrives);
                    load_strip<!B_T, TILE_N>(bs, second ? &x.b2 : &x.b, p.b_n, p.b_k + from,
                                             arrives);
                    if (PRODUCT == GATED)
                        tma_load(bs + WIDTH * BOX, &x.b2, p.b_k + from, p.b_n, arrives);
                }
                if (tail) { // the rows of the next group have come, too
                    mbarrier_wait(&cut, cuts++ % 2);
                    for (int i = (p.k - from) * BOX + lane * 8; i < BOX_SIZE; i += WARP * 8)
                        for (int j = 0; j < TILE * BOX; j += BOX_SIZE)
                            store<8>(to + i + j, Pack<real, 8>{});
                    wgmma_see_shared();
                    __syncwarp();
                    if (lane == 0) mbarrier_arrive(&full[at]);
                }
                if (++at == STRIPS) at = 0, round ^= 1;
                from += BOX;
                if (PRODUCT == SUMMED && !second && from >= p.k) from = 0, second = 1;
            }
    } else {
        take_registers<232>();
        int first = warp / 4 * BOX, row = first + warp % 4 * 16 + lane / 4;
        for (; place_tile<A_T, B_T, WIDTH>(&p, tile, offsets, groups, m, n, k); tile += gridDim.x) {
            float acc[TILE_N / 8][4] = {};
            auto &half = reinterpret_cast<float (&)[TILE_N / 16][4]>(acc);
            int strips = (p.k + BOX - 1) / BOX * (PRODUCT == SUMMED ? 2 : 1);
            if (p.k == 0 && add) continue; // an expert without tokens
            for (; strips > 0; strips--) {
                const real *as = shared + at * STRIP + first * BOX;
                const real *bs = shared + at * STRIP + TILE * BOX;
                mbarrier_wait(&full[at], round);
                if (!A_T && first >= p.m) ; // nothing of the tile is theirs
                else if (PRODUCT == GATED || p.n > TILE_N / 2)
                    multiply_strip<A_T, B_T>(acc, as, bs);
                else
                    multiply_strip<A_T, B_T>(half, as, bs);
                if (lane == 0) mbarrier_arrive(&empty[at]);
                if (++at == STRIPS) at = 0, round ^= 1;
            }
            if (PRODUCT == GATED) {
                store_tile<WIDTH>(gate, acc, row, p, n, 0);
                store_tile<WIDTH>(up, acc + WIDTH / 8, row, p, n, 0);
#pragma unroll
                for (int j = 0; j < WIDTH / 8; j++)
#pragma unroll
                    for (int e = 0; e < 4; e++)
                        acc[j][e] *= sigmoid(acc[j][e]) * acc[j + WIDTH / 8][e];
            }
            store_tile<WIDTH>(c, acc, row, p, n, add);
        }
    }
}

template <bool A_T, bool B_T, Product PRODUCT = PLAIN, typename Out>
static void wgmma_grouped(Out *c, Operands x, Rows r, size_t m, size_t n, size_t k, int add,
                          Out *gate = NULL, Out *up = NULL)
{
    static int processors;
    if (!processors)
        CUDA(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, 0));
    RUN_KERNEL((wgmma_kernel<A_T, B_T, PRODUCT, Out>), (unsigned)processors, HOPPER_THREADS,
               STRIPS * STRIP * sizeof(real), c, gate, up, x, r.offsets, (int)r.groups, (int)m,
               (int)n, (int)k, add);
}
#endif // MOE_HOPPER

// out = x W^T for as few rows as one token has, whose time is that of reading the weights: I
// numbers for 2 I FLOPs. GATED: gate = x W^T, up = x W_up^T, out = silu(gate) up. `share` of a
// block's warps have an output, more where outputs are few, so that enough loads are under way.
// Blocks [outputs, rows].
enum { FEW = 16 }; // rows of experts, at most

template <int W, bool GATED, typename Out>
__global__ void few_rows_kernel(Out *out, real *gate, real *up, const real *x, const real *w,
                                const real *w_up, const int *offsets, int groups, size_t O,
                                size_t I, int share, int add)
{
    enum { WARPS = BLOCK / WARP };
    SHARED(float, part, [2][WARPS]);
    int row = (int)blockIdx.y, warp = (int)threadIdx.x / WARP, lane = (int)threadIdx.x % WARP;
    size_t o = (size_t)(blockIdx.x * WARPS + warp) / share, to = (size_t)row * O + o;
    int before = 0; // groups that end before this row
    for (int e = lane; e - lane < groups && offsets; e += WARP)
        before += __popc(__ballot_sync(~0u, e < groups && offsets[e + 1] <= row));
    if (before == groups) return; // there are fewer rows
    const real *wo = w + ((size_t)before * O + o) * I, *xn = x + (size_t)row * I;
    const real *uo = GATED ? w_up + ((size_t)before * O + o) * I : NULL;
    float sum = 0, sum_up = 0;
#pragma unroll 4
    for (size_t i = (size_t)(warp % share * WARP + lane) * W; i < I && o < O;
         i += (size_t)share * WARP * W) {
        Pack<real, W> a = load<W>(wo + i), b = load<W>(xn + i), c;
        if (GATED) c = load<W>(uo + i);
        for (int j = 0; j < W; j++) sum += (float)a.x[j] * (float)b.x[j];
        for (int j = 0; j < W && GATED; j++) sum_up += (float)c.x[j] * (float)b.x[j];
    }
    sum = warp_sum(sum), sum_up = warp_sum(sum_up);
    if (lane == 0) part[0][warp] = sum, part[1][warp] = sum_up;
    __syncthreads();
    if (warp % share > 0 || lane > 0 || o >= O) return;
    sum = 0, sum_up = 0;
    for (int i = warp; i < warp + share; i++) sum += part[0][i], sum_up += part[1][i];
    if (GATED) gate[to] = (real)sum, up[to] = (real)sum_up, sum *= sigmoid(sum) * sum_up;
    out[to] = (Out)(add ? (float)out[to] + sum : sum);
}

template <bool GATED, typename Out>
static void few_rows(Out *out, real *gate, real *up, const real *x, const real *w, const real *w_up,
                     Rows r, size_t O, size_t I, enum Mode mode)
{
    enum { AT_ONCE = 8192 }; // warps of an H100
    size_t share = 1;
    while (share < BLOCK / WARP && r.rows * O * share < AT_ONCE) share *= 2;
    dim3 grid(grid_of(O * share, BLOCK / WARP), (unsigned)r.rows);
    RUN_WIDE(I, AT(x) | AT(w) | AT(w_up), (few_rows_kernel<W, GATED, Out>), grid, BLOCK, 0, out,
             gate, up, x, w, w_up, r.offsets, (int)r.groups, O, I, (int)share, mode == ADD);
}

static int are_few(Rows r) { return r.rows <= (r.offsets ? FEW : 1); }

// No more tiles of rows can there be: each group ends in one that is not full.
static unsigned most_tiles(Rows r)
{
    return (unsigned)(r.rows / TILE + min_size(r.groups, r.rows));
}

// out = x W^T for each group e: out[n,o] = sum_i x[n,i] W_e[o,i].
template <typename Out>
static void matmul_forward(Out *out,      // [rows, O], set or added to; accum if a norm reads it
                           const real *x, // [rows, I]
                           const real *w, // [groups, O, I]
                           Rows r, size_t O, size_t I, enum Mode mode)
{
    METER(r.offsets ? "experts_forward" : __func__, 2.0 * r.rows * O * I,
          (r.rows * I + r.groups * O * I) * sizeof(real) + r.rows * O * sizeof(Out));
    if (are_few(r)) {
        few_rows<false>(out, NULL, NULL, x, w, NULL, r, O, I, mode);
        return;
    }
    if (!r.offsets) {
        gemm(out, O, x, 0, I, w, 1, I, r.rows, O, I, mode == ADD ? 1.0f : 0.0f);
        return;
    }
    if constexpr (sizeof(Out) == sizeof(real)) { // no norm reads what an expert gives
#ifdef MOE_HOPPER
        if ((O | I) % WIDE == 0) {
            wgmma_grouped<false, true>(out, {tensor_map(x, r.rows, I, I, TILE),
                                             tensor_map(w, r.groups * O, I, I, TILE_N)},
                                       r, 0, O, I, mode == ADD);
            return;
        }
#endif
        RUN_KERNEL(grouped_rows_kernel<true>, dim3(grid_of(O, TILE), most_tiles(r)), TILE_THREADS,
                   (tile_bytes<false, true>()), out, x, w, r.offsets, (int)r.groups, (int)O, (int)I,
                   mode == ADD, I % WIDE == 0);
    }
}

// out = x W^T: dx[n,i] = sum_o dout[n,o] W_e[o,i].
static void matmul_backward_x(real *dx, const real *dout, const real *w, Rows r, size_t O, size_t I,
                              enum Mode mode)
{
    METER(r.offsets ? "experts_backward_x" : __func__, 2.0 * r.rows * O * I,
          (r.rows * (I + O) + r.groups * O * I) * sizeof(real));
    if (r.rows == 0) return; // tensor_map wants some
    if (!r.offsets) {
        gemm(dx, I, dout, 0, O, w, 0, I, r.rows, I, O, mode == ADD ? 1.0f : 0.0f);
        return;
    }
#ifdef MOE_HOPPER
    if ((O | I) % WIDE == 0) {
        wgmma_grouped<false, false>(dx, {tensor_map(dout, r.rows, O, O, TILE),
                                         tensor_map(w, r.groups * O, I, I, BOX)},
                                    r, 0, I, O, mode == ADD);
        return;
    }
#endif
    RUN_KERNEL(grouped_rows_kernel<false>, dim3(grid_of(I, TILE), most_tiles(r)), TILE_THREADS,
               (tile_bytes<false, false>()), dx, dout, w, r.offsets, (int)r.groups, (int)I, (int)O,
               mode == ADD, (O | I) % WIDE == 0);
}

// out = x W^T: dW_e[o,i] = sum_n dout[n,o] x[n,i].
static void matmul_backward_w(accum *dw, const real *dout, const real *x, Rows r, size_t O,
                              size_t I, enum Mode mode)
{
    METER(r.offsets ? "experts_backward_w" : __func__, 2.0 * r.rows * O * I,
          r.rows * (I + O) * sizeof(real) + r.groups * O * I * sizeof(accum));
    if (r.rows == 0) {
        if (mode == SET) device_zero(dw, r.groups * O * I * sizeof(accum));
        return;
    }
    if (!r.offsets) {
        gemm(dw, I, dout, 1, O, x, 0, I, O, I, r.rows, mode == ADD ? 1.0f : 0.0f);
        return;
    }
#ifdef MOE_HOPPER
    if ((O | I) % WIDE == 0) {
        wgmma_grouped<true, false>(dw, {tensor_map(dout, r.rows, O, O, BOX),
                                        tensor_map(x, r.rows, I, I, BOX)},
                                   r, O, I, 0, mode == ADD);
        return;
    }
#endif
    RUN_KERNEL(grouped_weights_kernel,
               dim3(grid_of(I, TILE), grid_of(O, TILE), (unsigned)r.groups), TILE_THREADS,
               (tile_bytes<true, false>()), dw, dout, x, r.offsets, (int)O, (int)I, mode == ADD,
               (O | I) % WIDE == 0);
}

// out = x / rms(x) * w over rows of C numbers that stand ld_out and ld_x apart. A block a row;
// reads C floats twice, the second time from cache, writes C.
template <int W>
__global__ void rmsnorm_forward_kernel(real *out, accum *rstd, const accum *x, const accum *w,
                                       size_t C, size_t ld_out, size_t ld_x, float eps)
{
    const accum *xn = x + blockIdx.x * ld_x;
    real *on = out + blockIdx.x * ld_out;
    float sum = 0;
    for (size_t i = threadIdx.x * W; i < C; i += blockDim.x * W) {
        Pack<accum, W> xi = load<W>(xn + i);
        for (int j = 0; j < W; j++) sum += xi.x[j] * xi.x[j];
    }
    float r = 1 / sqrtf(block_reduce<false>(sum) / (float)C + eps);
    if (threadIdx.x == 0) rstd[blockIdx.x] = r;
    for (size_t i = threadIdx.x * W; i < C; i += blockDim.x * W) {
        Pack<accum, W> xi = load<W>(xn + i), wi = load<W>(w + i);
        Pack<real, W> to;
        for (int j = 0; j < W; j++) to.x[j] = (real)(xi.x[j] * r * wi.x[j]);
        store(on + i, to);
    }
}

static void rmsnorm_forward(real *out,      // [N, C]
                            accum *rstd,    // [N], 1 / rms
                            const accum *x, // [N, C]
                            const accum *w, // [C]
                            size_t N, size_t C, size_t ld_out, size_t ld_x, double eps)
{
    METER(__func__, 0, N * C * (sizeof(accum) + sizeof(real)));
    RUN_WIDE(C | ld_out | ld_x, AT(out) | AT(x) | AT(w), rmsnorm_forward_kernel<W>, grid_of(N, 1),
             row_threads(C), 0, out, rstd, x, w, C, ld_out, ld_x, (float)eps);
}

// Of rows n, n + 1, .. of x[N, ..] the packs at column i; of the last row where there are no more.
template <typename T, int W, int ROWS>
__device__ static void load_rows(Pack<T, W> (&p)[ROWS], const T *x, size_t n, size_t N,
                                 size_t ld, size_t i)
{
#pragma unroll
    for (int k = 0; k < ROWS; k++) p[k] = load<W>(x + (n + k < N ? n + k : N - 1) * ld + i);
}

// out_i = x_i r w_i with r = (mean_j x_j^2 + eps)^(-1/2):
// dx_i = r (dout_i w_i - x_i r^2 mean_j(dout_j w_j x_j)),  dw_i += sum_n dout_i x_i r.
// A block is one team of threads or, where rows are short, several. A team takes two rows at once,
// then others further on, and adds up dw of them, each thread of its own columns. Reads C and C
// floats, once more from cache, and C to add; writes C.
enum { NORM_ROWS = 2 };

template <int W>
__global__ void __launch_bounds__(BLOCK, 4)
rmsnorm_backward_kernel(real *dx, float *dw_part, const real *dout, const accum *x, const accum *w,
                        const accum *rstd, size_t N, size_t C, size_t ld_dout, size_t ld_x, int add)
{
    SHARED(float, dots, [2][BLOCK / WARP][NORM_ROWS]);
    DYNAMIC_SHARED(float, part); // [teams, C]
    int warps = (int)blockDim.x / WARP, team = (int)threadIdx.y, turn = 0; // warps of a team
    float *sum = part + team * C;
    size_t first = threadIdx.x * W, strip = blockDim.x * W;
    for (size_t i = first; i < C; i += strip)
        for (int j = 0; j < W; j++) sum[i + j] = 0;
    size_t rows = blockDim.y * NORM_ROWS;
    for (size_t n0 = blockIdx.x * rows; n0 < N; n0 += gridDim.x * rows, turn ^= 1) {
        size_t n = n0 + team * NORM_ROWS, end = n < N ? C : 0;
        Pack<float, NORM_ROWS> dot = {}, r, mean;
        for (size_t i = first; i < end; i += strip) {
            Pack<accum, W> xi[NORM_ROWS];
            Pack<real, W> di[NORM_ROWS];
            load_rows(xi, x, n, N, ld_x, i);
            load_rows(di, dout, n, N, ld_dout, i);
            Pack<accum, W> wi = load<W>(w + i);
#pragma unroll
            for (int k = 0; k < NORM_ROWS; k++)
                for (int j = 0; j < W; j++)
                    dot.x[k] += (float)di[k].x[j] * wi.x[j] * xi[k].x[j];
        }
#pragma unroll
        for (int k = 0; k < NORM_ROWS; k++) {
            r.x[k] = n + k < N ? rstd[n + k] : 0;
            dot.x[k] = warp_sum(dot.x[k]);
        }
        if (threadIdx.x % WARP == 0) store(dots[turn][team * warps + threadIdx.x / WARP], dot);
        __syncthreads();
        dot = load<NORM_ROWS>(dots[turn][team * warps]);
        for (int v = 1; v < warps; v++)
            for (int k = 0; k < NORM_ROWS; k++) dot.x[k] += dots[turn][team * warps + v][k];
        for (int k = 0; k < NORM_ROWS; k++) mean.x[k] = dot.x[k] * r.x[k] * r.x[k] / (float)C;
        for (size_t i = first; i < end; i += strip) {
            Pack<real, W> to[NORM_ROWS] = {};
            if (add) load_rows(to, dx, n, N, ld_x, i);
            Pack<accum, W> wi = load<W>(w + i), s = load<W>(sum + i);
#pragma unroll
            for (int k = 0; k < NORM_ROWS && n + k < N; k++) {
                Pack<accum, W> xk = load<W>(x + (n + k) * ld_x + i);
                Pack<real, W> dk = load<W>(dout + (n + k) * ld_dout + i);
                for (int j = 0; j < W; j++) {
                    float d = (float)dk.x[j], dxj = r.x[k] * (d * wi.x[j] - xk.x[j] * mean.x[k]);
                    to[k].x[j] = (real)((float)to[k].x[j] + dxj);
                    s.x[j] += d * xk.x[j] * r.x[k];
                }
                store(dx + (n + k) * ld_x + i, to[k]);
            }
            store(sum + i, s);
        }
    }
    __syncthreads();
    for (size_t i = team * blockDim.x + threadIdx.x; i < C; i += blockDim.x * blockDim.y) {
        float all = part[i];
        for (size_t t = 1; t < blockDim.y; t++) all += part[t * C + i];
        dw_part[blockIdx.x * C + i] = all;
    }
}

// out[i] += sum_p part[p, i]. A block has 32 columns, each of its warps every 32nd part.
__global__ void add_parts_kernel(float *out, const float *part, size_t parts, size_t n)
{
    SHARED(float, sums, [WARP][WARP]);
    size_t warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, i = blockIdx.x * WARP + lane;
    float sum = 0;
#pragma unroll 4
    for (size_t p = warp; p < parts && i < n; p += WARP) sum += part[p * n + i];
    sums[warp][lane] = sum;
    __syncthreads();
    if (warp > 0 || i >= n) return;
    for (int w = 1; w < WARP; w++) sum += sums[w][lane];
    out[i] += sum;
}

static void rmsnorm_backward(real *dx, accum *dw, const real *dout, const accum *x, const accum *w,
                             const accum *rstd, size_t N, size_t C, size_t ld_dout, size_t ld_x,
                             enum Mode mode)
{
    METER(__func__, 0, N * C * (sizeof(accum) + 2 * sizeof(real)));
    dim3 threads(row_threads(C), BLOCK / row_threads(C));
    // four blocks for each multiprocessor of an H100
    size_t parts = min_size(ceil_div(N, threads.y * NORM_ROWS), 528);
    float *part = (float *)scratch(parts * C * sizeof(float));
    RUN_WIDE(C | ld_dout | ld_x, AT(dx) | AT(dout) | AT(x) | AT(w), rmsnorm_backward_kernel<W>,
             grid_of(parts, 1), threads, threads.y * C * sizeof(float), dx, part, dout, x, w, rstd,
             N, C, ld_dout, ld_x, mode == ADD);
    RUN_KERNEL(add_parts_kernel, grid_of(C, WARP), WARP * WARP, 0, dw, part, parts, C);
}

// act = silu(gate) * up, silu(z) = z sigmoid(z). Reads 2, writes 1.
template <int W>
__global__ void swiglu_forward_kernel(real *act, const real *gate, const real *up, size_t n)
{
    FOR_PACKS(i, n) {
        Pack<real, W> g = load<W>(gate + i), u = load<W>(up + i);
        for (int j = 0; j < W; j++) {
            float z = (float)g.x[j];
            u.x[j] = (real)(z * sigmoid(z) * (float)u.x[j]);
        }
        store<W>(act + i, u);
    }
}

static void swiglu_forward(real *act,        // [n]
                           const real *gate, // [n]
                           const real *up,   // [n]
                           size_t n)
{
    METER(__func__, 0, 3 * n * sizeof(real));
    RUN_WIDE(n, AT(act) | AT(gate) | AT(up), swiglu_forward_kernel<W>, grid_of(n, BLOCK * WIDE),
             BLOCK, 0, act, gate, up, n);
}

// act = silu(gate) up; silu'(z) = s + z s (1 - s) with s = sigmoid(z). Reads 3, writes 2.
template <int W>
__global__ void swiglu_backward_kernel(real *dgate, real *dup, const real *dact, const real *gate,
                                       const real *up, size_t n)
{
    FOR_PACKS(i, n) {
        Pack<real, W> d = load<W>(dact + i), g = load<W>(gate + i), u = load<W>(up + i);
        for (int j = 0; j < W; j++) {
            float z = (float)g.x[j], s = sigmoid(z), silu = z * s, di = (float)d.x[j];
            g.x[j] = (real)(di * (float)u.x[j] * (s + silu * (1 - s)));
            u.x[j] = (real)(di * silu);
        }
        store<W>(dgate + i, g);
        store<W>(dup + i, u);
    }
}

static void swiglu_backward(real *dgate, real *dup, const real *dact, const real *gate,
                            const real *up, size_t n)
{
    METER(__func__, 0, 5 * n * sizeof(real));
    RUN_WIDE(n, AT(dgate) | AT(dup) | AT(dact) | AT(gate) | AT(up), swiglu_backward_kernel<W>,
             grid_of(n, BLOCK * WIDE), BLOCK, 0, dgate, dup, dact, gate, up, n);
}

// gate = W_gate x, up = W_up x, act = silu(gate) up: the first half of an MLP.
static void gate_up_forward(real *act,  // [rows, F]
                            real *gate, // [rows, F]
                            real *up,   // [rows, F]
                            const real *x, const real *w_gate, const real *w_up, Rows r, size_t C,
                            size_t F)
{
    if (are_few(r)) {
        METER(r.offsets ? "experts_forward" : "matmul_forward", 4.0 * r.rows * C * F,
              (r.rows * (C + 3 * F) + 2 * r.groups * C * F) * sizeof(real));
        few_rows<true>(act, gate, up, x, w_gate, w_up, r, F, C, SET);
        return;
    }
#ifdef MOE_HOPPER
    if (r.offsets && (C | F) % WIDE == 0) {
        METER("experts_forward", 4.0 * r.rows * C * F,
              (r.rows * (C + 3 * F) + 2 * r.groups * C * F) * sizeof(real));
        wgmma_grouped<false, true, GATED>(act, {tensor_map(x, r.rows, C, C, TILE),
                                                tensor_map(w_gate, r.groups * F, C, C, TILE_N / 2),
                                                {},
                                                tensor_map(w_up, r.groups * F, C, C, TILE_N / 2)},
                                          r, 0, F, C, 0, gate, up);
        return;
    }
#endif
    matmul_forward(gate, x, w_gate, r, F, C, SET);
    matmul_forward(up, x, w_up, r, F, C, SET);
    swiglu_forward(act, gate, up, r.rows * F);
}

// gate = W_gate x, up = W_up x: dx = dgate W_gate + dup W_up.
static void gate_up_backward_x(real *dx, const real *dgate, const real *dup, const real *w_gate,
                               const real *w_up, Rows r, size_t C, size_t F, enum Mode mode)
{
#ifdef MOE_HOPPER
    if (r.offsets && (C | F) % WIDE == 0) {
        METER("experts_backward_x", 4.0 * r.rows * C * F,
              (r.rows * (C + 2 * F) + 2 * r.groups * C * F) * sizeof(real));
        wgmma_grouped<false, false, SUMMED>(dx, {tensor_map(dgate, r.rows, F, F, TILE),
                                                 tensor_map(w_gate, r.groups * F, C, C, BOX),
                                                 tensor_map(dup, r.rows, F, F, TILE),
                                                 tensor_map(w_up, r.groups * F, C, C, BOX)},
                                            r, 0, C, F, mode == ADD);
        return;
    }
#endif
    matmul_backward_x(dx, dgate, w_gate, r, F, C, mode);
    matmul_backward_x(dx, dup, w_up, r, F, C, ADD);
}

// out = x, a row of C numbers, by a block.
template <int W> __device__ static void copy_row(accum *out, const real *x, size_t C)
{
    for (size_t i = threadIdx.x * W; i < C; i += blockDim.x * W) {
        Pack<real, W> from = load<W>(x + i);
        Pack<accum, W> to;
        for (int j = 0; j < W; j++) to.x[j] = (float)from.x[j];
        store(out + i, to);
    }
}

// out[n] = w[token[n]]. A block a row: reads C, writes C floats.
template <int W>
__global__ void embedding_forward_kernel(accum *out, const int *token, const real *w, size_t C)
{
    copy_row<W>(out + blockIdx.x * C, w + token[blockIdx.x] * C, C);
}

static void embedding_forward(accum *out,       // [N, C]
                              const int *token, // [N]
                              const real *w,    // [V, C]
                              size_t N, size_t C)
{
    METER(__func__, 0, N * C * (sizeof(real) + sizeof(accum)));
    RUN_WIDE(C, AT(out) | AT(w), embedding_forward_kernel<W>, grid_of(N, 1), row_threads(C), 0,
             out, token, w, C);
}

// out[n] = w[token[n]]: dw[token[n]] += dout[n]. A block has the first n of its token (any other
// ends at once) and a strip of columns. A token a thread, it lists the rows where its token comes
// again, and its teams of threads add up each every so many of those, each thread of its own
// columns; then the sums are added in order. Reads C a row, adds 4 C bytes a token; the tokens
// themselves come from cache.
template <int W>
__global__ void embedding_backward_kernel(accum *dw, const real *dout, const int *token, int N,
                                          size_t C)
{
    enum { AT_ONCE = 4 }; // rows
    SHARED(float, part, [BLOCK * W]);
    SHARED(int, rows, [BLOCK]);
    SHARED(int, found, [BLOCK / WARP]); // by each warp
    SHARED(int, last, [1]);
    int teams = (int)blockDim.y, threads = (int)blockDim.x * teams, team = (int)threadIdx.y;
    int thread = team * (int)blockDim.x + (int)threadIdx.x, lane = thread % WARP;
    int n = (int)blockIdx.x, mine = token[n], before = 0, after = 0;
    size_t col = (blockIdx.y * blockDim.x + threadIdx.x) * W;
    if (thread == 0) *last = n;
#pragma unroll 4
    for (int i = thread; i < n; i += threads) before |= token[i] == mine;
    if (__syncthreads_or(before)) return;
#pragma unroll 4
    for (int i = n + thread; i < N; i += threads)
        if (token[i] == mine) after = i;
    if (after > n) atomicMax(last, after);
    __syncthreads();
    Pack<float, W> sum = {};
    for (int i = n + thread; i - thread <= *last; i += threads) {
        int same = i < N && token[i] == mine, count = __syncthreads_count(same);
        unsigned lanes = __ballot_sync(~0u, same);
        int at = __popc(lanes & ((1u << lane) - 1));
        if (lane == 0) found[thread / WARP] = __popc(lanes);
        __syncthreads();
        for (int w = 0; w < thread / WARP; w++) at += found[w];
        if (same) rows[at] = i;
        __syncthreads();
        if (col >= C) count = 0;
        for (int k = team; k < count; k += AT_ONCE * teams) {
            Pack<real, W> d[AT_ONCE];
#pragma unroll
            for (int u = 0; u < AT_ONCE; u++) {
                int its = k + u * teams < count ? k + u * teams : k;
                d[u] = load<W>(dout + rows[its] * C + col);
            }
#pragma unroll
            for (int u = 0; u < AT_ONCE; u++) {
                if (k + u * teams >= count) break;
                for (int j = 0; j < W; j++) sum.x[j] += (float)d[u].x[j];
            }
        }
    }
    store(part + thread * W, sum);
    __syncthreads();
    if (team > 0 || col >= C) return;
    accum *to = dw + mine * C + col;
    Pack<accum, W> all = load<W>(to);
    for (int t = 0; t < teams; t++)
        for (int j = 0; j < W; j++) all.x[j] += part[(t * blockDim.x + threadIdx.x) * W + j];
    store(to, all);
}

static void embedding_backward(accum *dw, const real *dout, const int *token, size_t N, size_t C)
{
    METER(__func__, 0, 2 * N * C * sizeof(real));
    dim3 threads(row_threads(C), BLOCK / row_threads(C));
    size_t strip = threads.x * (C % WIDE || (AT(dw) | AT(dout)) % 16 ? 1 : WIDE);
    RUN_WIDE(C, AT(dw) | AT(dout), embedding_backward_kernel<W>,
             dim3((unsigned)N, grid_of(C, strip)), threads, 0, dw, dout, token, (int)N, C);
}

// Rows of a longer sequence that a shorter one keeps: out[b,t] = in[b,t] for t < T. A block a row:
// reads C, writes C floats.
template <int W>
__global__ void crop_forward_kernel(accum *out, const real *in, size_t T, size_t Tin, size_t C)
{
    copy_row<W>(out + blockIdx.x * C, in + (blockIdx.x / T * Tin + blockIdx.x % T) * C, C);
}

static void crop_forward(accum *out,     // [B, T, C]
                         const real *in, // [B, Tin, C], Tin >= T
                         size_t B, size_t T, size_t Tin, size_t C)
{
    RUN_WIDE(C, AT(out) | AT(in), crop_forward_kernel<W>, grid_of(B * T, 1), row_threads(C), 0, out,
             in, T, Tin, C);
}

// out[b,t] = in[b,t]: din[b,t] = dout[b,t] for t < T, 0 after.
static void crop_backward(real *din, const real *dout, size_t B, size_t T, size_t Tin, size_t C)
{
    size_t row = C * sizeof(real);
    device_zero(din, B * Tin * row);
    CUDA(cudaMemcpy2DAsync(din, Tin * row, dout, T * row, T * row, B, cudaMemcpyDeviceToDevice,
                           stream));
}

// Turns the pair (x_2j, x_2j+1) of a row at position p by the angle p theta_j, whose cosine and
// sine stand in table[p][2j], table[p][2j+1]; backwards if sign is -1. A row holds `heads` vectors
// that stand `head` apart. out may be x. A thread has W numbers, or a pair: reads and writes them,
// their angles from cache.
template <int W, typename In>
__global__ void rope_kernel(real *out, const In *x, const int *pos, const accum *table,
                            float sign, size_t N, size_t heads, size_t Dr, size_t ld_out,
                            size_t ld_x, size_t head)
{
    enum { PACKS = W > 1 ? 1 : 2 };
    FOR_PACKS(i, N * heads * Dr / PACKS) {
        size_t n = i * PACKS / (heads * Dr);
        unsigned at = (unsigned)(i * PACKS - n * heads * Dr), h = at / (unsigned)Dr;
        size_t j = at - h * Dr;
        const accum *angle = table + (size_t)pos[n] * Dr + j;
        const In *from = x + n * ld_x + h * head + j;
        real *to = out + n * ld_out + h * head + j;
        Pack<In, W> v[PACKS];
        Pack<accum, W> turn[PACKS];
        Pack<real, W> turned[PACKS];
        for (int p = 0; p < PACKS; p++)
            v[p] = load<W>(from + p * W), turn[p] = load<W>(angle + p * W);
        for (int k = 0; k < PACKS * W; k += 2) {
            int p = k / W, i0 = k % W, q = (k + 1) / W, i1 = (k + 1) % W;
            float even = (float)v[p].x[i0], odd = (float)v[q].x[i1];
            float cosine = turn[p].x[i0], sine = sign * turn[q].x[i1];
            turned[p].x[i0] = (real)(even * cosine - odd * sine);
            turned[q].x[i1] = (real)(even * sine + odd * cosine);
        }
        for (int p = 0; p < PACKS; p++) store(to + p * W, turned[p]);
    }
}

template <typename In>
static void rope_turn(real *out, const In *x, const int *pos, const accum *table, accum sign,
                      size_t N, size_t heads, size_t Dr, size_t ld_out, size_t ld_x, size_t head)
{
    RUN_WIDE(Dr | ld_out | ld_x | head, AT(out) | AT(x) | AT(table), (rope_kernel<W, In>),
             grid_of(N * heads * Dr, BLOCK * WIDE), BLOCK, 0, out, x, pos, table, sign, N, heads,
             Dr, ld_out, ld_x, head);
}

// Rotary position embedding: out = R(p) x.
template <typename In>
static void rope_forward(real *out,          // [N, heads, Dr], rows ld_out apart
                         const In *x,        // [N, heads, Dr], rows ld_x apart; accum in kv_a
                         const int *pos,     // [N]
                         const accum *table, // [Tmax, Dr]
                         size_t N, size_t heads, size_t Dr, size_t ld_out, size_t ld_x, size_t head)
{
    METER(__func__, 0, N * heads * Dr * (sizeof(In) + sizeof(real)));
    rope_turn(out, x, pos, table, 1, N, heads, Dr, ld_out, ld_x, head);
}

// out = R(p) x: dx = R(p)^T dout, the turn backwards. dx may be dout.
static void rope_backward(real *dx, const real *dout, const int *pos, const accum *table, size_t N,
                          size_t heads, size_t Dr, size_t ld_dx, size_t ld_dout, size_t head)
{
    METER(__func__, 0, 2 * N * heads * Dr * sizeof(real));
    rope_turn(dx, dout, pos, table, -1, N, heads, Dr, ld_dx, ld_dout, head);
}

// Causal attention. Per head, with k_t = [k_nope_t; k_pe_t] and k_pe shared by all heads:
//     out_t = sum_{u <= t} p_tu v_u,   p_tu = exp(scale q_t . k_u - lse_t).
// A block has a few queries of one head and goes through the keys they see, tile by tile
// (FlashAttention): it keeps for each query the largest score so far and, relative to that, the
// sums of exp and of exp v. Backward, a block goes through the keys for the sake of dq; or it has a
// few keys and goes through the queries that see them, for dk and dv. The scores are computed twice
// so, but nothing needs to be added up by several blocks.

// Where a head's rows stand: queries q[T, Dq] with dout or out [T, Dv], keys [T, Dn] and [T, Dr]
// with values [T, Dv], all `..._ld` apart.
typedef struct {
    const real *q, *o, *k, *k_pe, *v; // o: out or dout
    size_t q_ld, o_ld, kv_ld, k_pe_ld;
} Head;

typedef struct {
    int T, NH, Dn, Dr, Dv;
    float scale;
    int wide; // copies of 16 bytes are possible
} AttentionSizes;

__device__ static Head head_of(const real *q, const real *o, const real *kv, const real *k_pe,
                               AttentionSizes s)
{
    size_t NH = s.NH, b = blockIdx.x / NH * s.T, h = blockIdx.x % NH;
    Head a;
    a.q_ld = NH * (s.Dn + s.Dr), a.o_ld = NH * s.Dv, a.kv_ld = NH * (s.Dn + s.Dv), a.k_pe_ld = s.Dr;
    a.q = q + b * a.q_ld + h * (s.Dn + s.Dr);
    a.o = o ? o + b * a.o_ld + h * s.Dv : o;
    a.k = kv + b * a.kv_ld + h * (s.Dn + s.Dv);
    a.v = a.k + s.Dn;
    a.k_pe = k_pe + b * s.Dr;
    return a;
}

// Any sizes, by multiply-adds: 4 warps with 4 rows each, tiles of 32, a lane each. What a block
// holds in shared memory is float.
enum { ROWS = 16, LANES = WARP, ATTENTION_THREADS = 128 };

__device__ static void copy_rows(float *to, int ld, const real *x, size_t ld_x, int begin, int rows,
                                 int T, int cols)
{
    for (int i = (int)threadIdx.x; i < rows * cols; i += (int)blockDim.x) {
        int row = i / cols, col = i % cols, at = begin + row;
        to[row * ld + col] = at < T ? (float)x[(size_t)at * ld_x + col] : 0.0f;
    }
}

// Rows begin .. begin + rows of queries and dout (out), or of keys and values.
__device__ static void copy_pair(float *x, int ld_x, float *y, int ld_y, const Head &a, int begin,
                                 int rows, int keys, AttentionSizes s)
{
    if (keys) {
        copy_rows(x, ld_x, a.k, a.kv_ld, begin, rows, s.T, s.Dn);
        copy_rows(x + s.Dn, ld_x, a.k_pe, a.k_pe_ld, begin, rows, s.T, s.Dr);
        copy_rows(y, ld_y, a.v, a.kv_ld, begin, rows, s.T, s.Dv);
    } else {
        copy_rows(x, ld_x, a.q, a.q_ld, begin, rows, s.T, s.Dn + s.Dr);
        if (a.o) copy_rows(y, ld_y, a.o, a.o_ld, begin, rows, s.T, s.Dv);
    }
}

__device__ static float dot(const float *x, const float *y, int n)
{
    float sum = 0;
    for (int i = 0; i < n; i++) sum += x[i] * y[i];
    return sum;
}

// to[j] += sum_lane weight x[lane, j], lane l for each j with j % 32 == l. weights [LANES] is this
// warp's place for what the lanes have.
__device__ static void add_weighted(float *to, float *weights, float weight, const float *x, int ld,
                                    int n)
{
    int lane = (int)threadIdx.x % WARP;
    __syncwarp(); // the weights before have been used
    weights[lane] = weight;
    __syncwarp();
    for (int j = lane; j < n; j += WARP) {
        float sum = 0;
        for (int u = 0; u < LANES; u++) sum += weights[u] * x[u * ld + j];
        to[j] += sum;
    }
}

// Blocks [B NH, tiles of ROWS queries]. T (Dq + Dv) FLOPs a query and head; reads the keys and
// values of T / 2 tokens a block, on average, from L2.
__global__ void __launch_bounds__(ATTENTION_THREADS)
attention_forward_kernel(real *out, accum *lse, const real *q, const real *kv, const real *k_pe,
                         AttentionSizes s)
{
    DYNAMIC_SHARED(float, shared);
    SHARED(float, weights, [ATTENTION_THREADS / WARP][LANES]);
    Head a = head_of(q, NULL, kv, k_pe, s);
    int Dq = s.Dn + s.Dr, Dv = s.Dv, ld_k = Dq + 1, ld_v = Dv + 1;
    float *qs = shared, *os = qs + ROWS * Dq, *ks = os + ROWS * Dv, *vs = ks + LANES * ld_k;
    int first = (int)blockIdx.y * ROWS, warp = (int)threadIdx.x / WARP;
    int lane = (int)threadIdx.x % WARP, end = min(first + ROWS, s.T);
    float max[ROWS / 4], sum[ROWS / 4];
    for (int i = 0; i < ROWS / 4; i++) max[i] = -INFINITY, sum[i] = 0;
    copy_pair(qs, Dq, NULL, 0, a, first, ROWS, 0, s);
    for (int i = (int)threadIdx.x; i < ROWS * Dv; i += ATTENTION_THREADS) os[i] = 0;
    for (int u0 = 0; u0 < end; u0 += LANES) {
        __syncthreads(); // the tile before has been used
        copy_pair(ks, ld_k, vs, ld_v, a, u0, LANES, 1, s);
        __syncthreads();
        for (int i = 0; i < ROWS / 4; i++) {
            int row = warp * (ROWS / 4) + i, t = first + row, u = u0 + lane;
            float score = s.scale * dot(qs + row * Dq, ks + lane * ld_k, Dq);
            if (u > t) score = -INFINITY;
            float most = fmaxf(max[i], warp_max(score));
            float shrink = expf(max[i] - most), p = expf(score - most);
            sum[i] = sum[i] * shrink + warp_sum(p);
            max[i] = most;
            for (int j = lane; j < Dv; j += WARP) os[row * Dv + j] *= shrink;
            add_weighted(os + row * Dv, weights[warp], p, vs, ld_v, Dv);
        }
    }
    real *to = out + (a.v - kv - s.Dn) / (s.Dn + Dv) * Dv;
    for (int i = 0; i < ROWS / 4; i++) {
        int row = warp * (ROWS / 4) + i, t = first + row;
        if (t >= s.T) break;
        for (int j = lane; j < Dv; j += WARP)
            to[(size_t)t * s.NH * Dv + j] = (real)(os[row * Dv + j] / sum[i]);
        if (lane == 0) lse[(size_t)blockIdx.x * s.T + t] = max[i] + logf(sum[i]);
    }
}

// delta_t = dout_t . out_t. A warp a query and head; reads 2 Dv.
__global__ void attention_delta_kernel(accum *delta, const real *dout, const real *out, size_t rows,
                                       int T, int NH, int Dv)
{
    size_t row = (size_t)blockIdx.x * (BLOCK / WARP) + threadIdx.x / WARP; // [B, T, NH]
    if (row >= rows) return;
    float sum = 0;
    for (int j = (int)threadIdx.x % WARP; j < Dv; j += WARP)
        sum += (float)dout[row * Dv + j] * (float)out[row * Dv + j];
    sum = warp_sum(sum);
    size_t t = row / NH % T, bh = row / NH / T * NH + row % NH;
    if (threadIdx.x % WARP == 0) delta[bh * T + t] = sum;
}

// out_t = sum_u p_tu v_u, p = softmax(scale q k^T), so with dp_tu = dout_t . v_u
//     dv_u += sum_t p_tu dout_t,     ds_tu = scale p_tu (dp_tu - dout_t . out_t),
//     dq_t  = sum_u ds_tu k_u,       dk_u += sum_t ds_tu q_t.
// Blocks [B NH, tiles of ROWS keys or queries]: x, y are its keys and values, and queries and dout
// pass by as xs, ys; or the other way round. T (2 Dq + 2 Dv) FLOPs a key and head, T (2 Dq + Dv) a
// query and head.
template <bool KEYS>
__global__ void __launch_bounds__(ATTENTION_THREADS)
attention_backward_kernel(real *dq, real *dkv, real *dk_pe_heads, const real *dout,
                          const accum *delta, const accum *lse, const real *q, const real *kv,
                          const real *k_pe, AttentionSizes s)
{
    DYNAMIC_SHARED(float, shared);
    SHARED(float, weights, [ATTENTION_THREADS / WARP][LANES]);
    Head a = head_of(q, dout, kv, k_pe, s);
    int Dq = s.Dn + s.Dr, Dv = s.Dv, ld_x = Dq + 1, ld_y = Dv + 1;
    float *x = shared, *y = x + ROWS * Dq, *dx = y + ROWS * Dv, *dy = dx + ROWS * Dq;
    float *xs = dy + ROWS * Dv, *ys = xs + LANES * ld_x;
    int first = (int)blockIdx.y * ROWS, warp = (int)threadIdx.x / WARP;
    int lane = (int)threadIdx.x % WARP, end = KEYS ? s.T : min(first + ROWS, s.T);
    lse += (size_t)blockIdx.x * s.T, delta += (size_t)blockIdx.x * s.T;
    copy_pair(x, Dq, y, Dv, a, first, ROWS, KEYS, s);
    for (int i = (int)threadIdx.x; i < ROWS * (Dq + Dv); i += ATTENTION_THREADS) dx[i] = 0;
    for (int at = KEYS ? first / LANES * LANES : 0; at < end; at += LANES) {
        __syncthreads(); // the tile before has been used
        copy_pair(xs, ld_x, ys, ld_y, a, at, LANES, !KEYS, s);
        __syncthreads();
        for (int i = 0; i < ROWS / 4; i++) {
            int row = warp * (ROWS / 4) + i;
            int t = KEYS ? at + lane : first + row, u = KEYS ? first + row : at + lane;
            float p = 0, ds = 0;
            if (u <= t && t < s.T) {
                p = expf(s.scale * dot(x + row * Dq, xs + lane * ld_x, Dq) - lse[t]);
                ds = s.scale * p * (dot(y + row * Dv, ys + lane * ld_y, Dv) - delta[t]);
            }
            add_weighted(dx + row * Dq, weights[warp], ds, xs, ld_x, Dq);
            if (KEYS) add_weighted(dy + row * Dv, weights[warp], p, ys, ld_y, Dv);
        }
    }
    for (int i = 0; i < ROWS / 4; i++) {
        int row = warp * (ROWS / 4) + i, t = first + row;
        if (t >= s.T) break;
        real *dq_t = dq + (a.q - q) + t * a.q_ld, *dk_t = dkv + (a.k - kv) + t * a.kv_ld;
        real *dr_t = dk_pe_heads + ((size_t)blockIdx.x * s.T + t) * s.Dr;
        for (int j = lane; j < Dq; j += WARP)
            *(!KEYS ? dq_t + j : j < s.Dn ? dk_t + j : dr_t + j - s.Dn) = (real)dx[row * Dq + j];
        for (int j = lane; j < Dv && KEYS; j += WARP) dk_t[s.Dn + j] = (real)dy[row * Dv + j];
    }
}

// dk_pe = sum over heads of dk_pe_heads. A thread a number; reads NH, writes 1.
__global__ void sum_heads_kernel(real *dk_pe, const real *dk_pe_heads, size_t n, int T, int NH,
                                 int Dr)
{
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x, bt = i / Dr;
    float sum = 0;
    if (i >= n) return;
    for (int h = 0; h < NH; h++)
        sum += (float)dk_pe_heads[((bt / T * NH + h) * T + bt % T) * Dr + i % Dr];
    dk_pe[i] = (real)sum;
}

#ifdef MOE_BF16 // the same by tensor cores, for head sizes up to DQ and DV
enum { FLASH_THREADS = 128, FLASH = 64, PASSING = 32 }; // rows of a block, 16 a warp; passing by

// Rows of keys and values, or of queries and dout (out), to shared memory, as copy_tile does.
template <int DQ, int DV>
__device__ static void copy_heads(real *x, real *y, const Head &a, int begin, int rows, int keys,
                                  AttentionSizes s)
{
    constexpr int LQ = DQ + 8, LV = DV + 8;
    int left = s.T - begin;
    size_t at = (size_t)begin;
    if (keys) {
        copy_tile<8>(x, LQ, rows, s.Dn, a.k + at * a.kv_ld, a.kv_ld, left, s.Dn, s.wide);
        copy_tile<8>(x + s.Dn, LQ, rows, DQ - s.Dn, a.k_pe + at * a.k_pe_ld, a.k_pe_ld, left, s.Dr,
                     s.wide);
        copy_tile<8>(y, LV, rows, DV, a.v + at * a.kv_ld, a.kv_ld, left, s.Dv, s.wide);
    } else {
        copy_tile<8>(x, LQ, rows, DQ, a.q + at * a.q_ld, a.q_ld, left, s.Dn + s.Dr, s.wide);
        if (a.o) copy_tile<8>(y, LV, rows, DV, a.o + at * a.o_ld, a.o_ld, left, s.Dv, s.wide);
    }
}

// Columns 16 k .. 16 k + 15 of an accumulator, rounded, are a fragment of the next product's a.
__device__ static void fragment_of(uint32_t r[4], const float (*acc)[4], int k)
{
    for (int i = 0; i < 4; i++)
        r[i] = pack_bf16(acc[2 * k + i / 2][i % 2 * 2], acc[2 * k + i / 2][i % 2 * 2 + 1]);
}

// An accumulator of 16 rows and 8 n columns, times scale[0] in its upper and scale[1] in its lower
// rows, to shared memory.
template <int N>
__device__ static void spill(real *to, int ld, const float (&acc)[N][4], const float scale[2])
{
    int lane = (int)threadIdx.x % WARP;
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
        for (int e = 0; e < 4; e += 2) {
            Pack<real, 2> pair = {{(real)(acc[n][e] * scale[e / 2]),
                                   (real)(acc[n][e + 1] * scale[e / 2])}};
            store<2>(to + (lane / 4 + e / 2 * 8) * ld + 8 * n + lane % 4 * 2, pair);
        }
}

// A warp's 16 rows from shared memory, as many as exist.
__device__ static void store_rows(real *to, size_t ld_to, const real *x, int ld, int rows, int cols,
                                  int wide)
{
    int lane = (int)threadIdx.x % WARP, across = wide ? cols / 8 : cols;
    for (int i = lane; i < min(rows, 16) * across; i += WARP) {
        int row = i / across, col = i % across;
        if (wide) store<8>(to + row * ld_to + col * 8, load<8>(x + row * ld + col * 8));
        else to[row * ld_to + col] = x[row * ld + col];
    }
}

// The scores of a tile become weights, exp relative to the largest score of the row so far, to
// which what the row had before, sum and o, is scaled. On the diagonal a row sees keys up to its
// own; `row` is the upper of this lane's two. Four lanes share a row; sum is of this lane's
// columns.
template <int KEYS, int V>
__device__ static void weigh_scores(float (&sc)[KEYS][4], float (&o)[V][4], float (&max)[2],
                                    float (&sum)[2], int diagonal, int row, float log2_scale)
{
    int col = (int)threadIdx.x % 4 * 2;
    if (diagonal)
#pragma unroll
        for (int j = 0; j < KEYS; j++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                if (8 * j + col + e % 2 > row + e / 2 * 8) sc[j][e] = -INFINITY;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float most = max[half], total = 0;
#pragma unroll
        for (int j = 0; j < KEYS; j++)
            most = fmaxf(most, fmaxf(sc[j][2 * half], sc[j][2 * half + 1]));
        most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
        most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
        float shrink = exp2_approx((max[half] - most) * log2_scale), base = most * log2_scale;
#pragma unroll
        for (int j = 0; j < KEYS; j++)
#pragma unroll
            for (int e = 2 * half; e < 2 * half + 2; e++) {
                sc[j][e] = exp2_approx(sc[j][e] * log2_scale - base);
                total += sc[j][e];
            }
        sum[half] = sum[half] * shrink + total;
        max[half] = most;
#pragma unroll
        for (int n = 0; n < V; n++) o[n][2 * half] *= shrink, o[n][2 * half + 1] *= shrink;
    }
}

// Blocks [B NH, tiles of queries], the longest first. While keys are used the next arrive.
template <int DQ, int DV>
__global__ void __launch_bounds__(FLASH_THREADS, 2)
flash_forward_kernel(real *out, accum *lse, const real *q, const real *kv, const real *k_pe,
                     AttentionSizes s)
{
    constexpr int LQ = DQ + 8, LV = DV + 8;
    static_assert(DV <= DQ, "out goes where the queries stood");
    DYNAMIC_SHARED(real, ks); // two tiles; in the place of the second at first queries, last out
    real *qs = ks + FLASH * LQ, *vs = ks + 2 * FLASH * LQ;
    Head a = head_of(q, NULL, kv, k_pe, s);
    int warp = (int)threadIdx.x / WARP, lane = (int)threadIdx.x % WARP, row = 16 * warp;
    int first = (int)(gridDim.y - 1 - blockIdx.y) * FLASH, tiles = first / FLASH + 1;
    float log2_scale = s.scale * LOG2_E;
    float o[DV / 8][4] = {}, max[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};
    uint32_t qf[DQ / 16][4];
    copy_heads<DQ, DV>(qs, NULL, a, first, FLASH, 0, s);
    copy_heads<DQ, DV>(ks, vs, a, 0, FLASH, 1, s);
    cp_async_commit();
    for (int tile = 0; tile < tiles; tile++) {
        const real *kt = ks + tile % 2 * FLASH * LQ, *vt = vs + tile % 2 * FLASH * LV;
        int next = (tile + 1) % 2;
        cp_async_wait<0>();
        __syncthreads(); // this tile has come, and the one before it has been used
        if (tile == 0) {
#pragma unroll
            for (int p = 0; p < DQ / 16; p++) fragment_a(qf[p], qs + row * LQ + 16 * p, LQ);
            __syncthreads(); // the queries are in registers
        }
        if (tile + 1 < tiles)
            copy_heads<DQ, DV>(ks + next * FLASH * LQ, vs + next * FLASH * LV, a,
                               (tile + 1) * FLASH, FLASH, 1, s);
        cp_async_commit();
        // scores: 16 queries x 64 keys a warp
        float sc[FLASH / 8][4] = {};
#pragma unroll
        for (int p = 0; p < DQ / 16; p++)
#pragma unroll
            for (int j = 0; j < FLASH / 16; j++) {
                uint32_t kf[4];
                fragment_b(kf, kt + 16 * j * LQ + 16 * p, LQ);
                mma_16x8x16(sc[2 * j], qf[p], kf);
                mma_16x8x16(sc[2 * j + 1], qf[p], kf + 2);
            }
        weigh_scores(sc, o, max, sum, tile == tiles - 1, row + lane / 4, log2_scale);
#pragma unroll
        for (int k = 0; k < FLASH / 16; k++) {
            uint32_t pf[4];
            fragment_of(pf, sc, k);
#pragma unroll
            for (int n = 0; n < DV / 16; n++) {
                uint32_t vf[4];
                fragment_b_t(vf, vt + 16 * k * LV + 16 * n, LV);
                mma_16x8x16(o[2 * n], pf, vf);
                mma_16x8x16(o[2 * n + 1], pf, vf + 2);
            }
        }
    }
    cp_async_wait<0>();
    __syncthreads(); // the last tile has been used
    for (int half = 0; half < 2; half++) {
        sum[half] += __shfl_xor_sync(~0u, sum[half], 1);
        sum[half] += __shfl_xor_sync(~0u, sum[half], 2);
        int t = first + row + lane / 4 + half * 8;
        if (t < s.T && lane % 4 == 0)
            lse[(size_t)blockIdx.x * s.T + t] = max[half] * s.scale + logf(sum[half]);
        sum[half] = 1 / sum[half];
    }
    spill(qs + row * LQ, LQ, o, sum);
    __syncwarp();
    size_t NH = s.NH, t = blockIdx.x / NH * s.T + first + row;
    store_rows(out + (t * NH + blockIdx.x % NH) * s.Dv, NH * s.Dv, qs + row * LQ, LQ,
               s.T - first - row, s.Dv, s.wide);
}

// As attention_backward_kernel. 16 rows a warp, which keeps their dx (and dy) in registers.
template <int DQ, int DV, bool KEYS>
__global__ void __launch_bounds__(FLASH_THREADS, 2)
flash_backward_kernel(real *dq, real *dkv, real *dk_pe_heads, const real *dout, const accum *delta,
                      const accum *lse, const real *q, const real *kv, const real *k_pe,
                      AttentionSizes s)
{
    constexpr int LQ = DQ + 8, LV = DV + 8;
    DYNAMIC_SHARED(real, shared);
    real *x = shared, *y = x + FLASH * LQ, *xs = y + FLASH * LV, *ys = xs + 2 * PASSING * LQ;
    Head a = head_of(q, dout, kv, k_pe, s);
    int warp = (int)threadIdx.x / WARP, lane = (int)threadIdx.x % WARP, row = 16 * warp;
    int first = (int)(KEYS ? blockIdx.y : gridDim.y - 1 - blockIdx.y) * FLASH;
    int begin = KEYS ? first : 0, end = KEYS ? s.T : min(first + FLASH, s.T);
    float log2_scale = s.scale * LOG2_E;
    float dx[DQ / 8][4] = {}, dy[KEYS ? DV / 8 : 1][4] = {};
    lse += (size_t)blockIdx.x * s.T, delta += (size_t)blockIdx.x * s.T;
    copy_heads<DQ, DV>(x, y, a, first, FLASH, KEYS, s);
    copy_heads<DQ, DV>(xs, ys, a, begin, PASSING, !KEYS, s);
    cp_async_commit();
    for (int at = begin, stage = 0; at < end; at += PASSING, stage ^= 1) {
        const real *xt = xs + stage * PASSING * LQ, *yt = ys + stage * PASSING * LV;
        cp_async_wait<0>();
        __syncthreads(); // this tile has come, and the one before it has been used
        if (at + PASSING < end)
            copy_heads<DQ, DV>(xs + (stage ^ 1) * PASSING * LQ, ys + (stage ^ 1) * PASSING * LV, a,
                               at + PASSING, PASSING, !KEYS, s);
        cp_async_commit();
        float p[PASSING / 8][4] = {}, ds[PASSING / 8][4] = {};
#pragma unroll 2
        for (int k = 0; k < DQ / 16; k++) {
            uint32_t af[4], bf[4];
            fragment_a(af, x + row * LQ + 16 * k, LQ);
#pragma unroll
            for (int j = 0; j < PASSING / 16; j++) {
                fragment_b(bf, xt + 16 * j * LQ + 16 * k, LQ);
                mma_16x8x16(p[2 * j], af, bf);
                mma_16x8x16(p[2 * j + 1], af, bf + 2);
            }
        }
#pragma unroll 2
        for (int k = 0; k < DV / 16; k++) {
            uint32_t af[4], bf[4];
            fragment_a(af, y + row * LV + 16 * k, LV);
#pragma unroll
            for (int j = 0; j < PASSING / 16; j++) {
                fragment_b(bf, yt + 16 * j * LV + 16 * k, LV);
                mma_16x8x16(ds[2 * j], af, bf);
                mma_16x8x16(ds[2 * j + 1], af, bf + 2);
            }
        }
#pragma unroll
        for (int j = 0; j < PASSING / 8; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                int mine = first + row + lane / 4 + e / 2 * 8;
                int passing = at + 8 * j + lane % 4 * 2 + e % 2;
                int t = KEYS ? passing : mine, u = KEYS ? mine : passing;
                int seen = u <= t && t < s.T, safe = min(t, s.T - 1);
                float weight = exp2_approx(p[j][e] * log2_scale - lse[safe] * LOG2_E);
                p[j][e] = seen ? weight : 0;
                ds[j][e] = seen ? s.scale * weight * (ds[j][e] - delta[safe]) : 0;
            }
#pragma unroll
        for (int k = 0; k < PASSING / 16; k++) {
            uint32_t af[4], bf[4];
            fragment_of(af, ds, k);
#pragma unroll
            for (int n = 0; n < DQ / 16; n++) {
                fragment_b_t(bf, xt + 16 * k * LQ + 16 * n, LQ);
                mma_16x8x16(dx[2 * n], af, bf);
                mma_16x8x16(dx[2 * n + 1], af, bf + 2);
            }
            if (!KEYS) continue;
            fragment_of(af, p, k);
#pragma unroll
            for (int n = 0; n < DV / 16; n++) {
                fragment_b_t(bf, yt + 16 * k * LV + 16 * n, LV);
                mma_16x8x16(dy[KEYS ? 2 * n : 0], af, bf);
                mma_16x8x16(dy[KEYS ? 2 * n + 1 : 0], af, bf + 2);
            }
        }
    }
    cp_async_wait<0>();
    const float one[2] = {1, 1};
    real *xw = x + row * LQ, *yw = y + row * LV; // only this warp read them
    int rows = s.T - first - row;
    size_t t = (size_t)(first + row);
    __syncwarp();
    spill(xw, LQ, dx, one);
    if (KEYS) spill(yw, LV, dy, one);
    __syncwarp();
    if (!KEYS) {
        store_rows(dq + (a.q - q) + t * a.q_ld, a.q_ld, xw, LQ, rows, s.Dn + s.Dr, s.wide);
        return;
    }
    real *dk = dkv + (a.k - kv) + t * a.kv_ld;
    store_rows(dk, a.kv_ld, xw, LQ, rows, s.Dn, s.wide);
    store_rows(dk + s.Dn, a.kv_ld, yw, LV, rows, s.Dv, s.wide);
    store_rows(dk_pe_heads + ((size_t)blockIdx.x * s.T + t) * s.Dr, s.Dr, xw + s.Dn, LQ, rows, s.Dr,
               s.wide);
}

#ifdef MOE_HOPPER
// The same by wgmma, for the heads of the released models: a block has OWN rows, 64 for each of two
// times four warps. A ninth has the rows that pass by brought to shared memory, some ahead, and the
// registers of three more warps are shared out among the eight.
enum { HEAD_QK = 192, HEAD_V = 128, HEAD_KV = 256, HEAD_SIZES = HEAD_QK + HEAD_V };
enum { OWN = 128, PASS_FORWARD = 128, PASS_BACKWARD = 64, PASSES = 3 };

typedef struct {
    TensorMap q, o, kv, k_pe; // of all heads; o: dout
} HeadMaps;

static HeadMaps head_maps(const real *q, const real *o, const real *kv, const real *k_pe, size_t N,
                          size_t NH)
{
    size_t Cq = NH * HEAD_QK, Co = NH * HEAD_V, Ckv = NH * HEAD_KV;
    HeadMaps map = {tensor_map(q, N, Cq, Cq, BOX), tensor_map(o, N, Co, Co, BOX),
                    tensor_map(kv, N, Ckv, Ckv, BOX), tensor_map(k_pe, N, BOX, BOX, BOX)};
    return map;
}

// ROWS rows of a head's keys and values, or of queries and, unless y is NULL, dout:
// x [3, ROWS, 64], y [2, ROWS, 64].
template <int ROWS>
__device__ static void load_head(real *x, real *y, const HeadMaps &map, int h, int row, int keys,
                                 uint64_t *arrives)
{
    for (int r = 0; r < ROWS; r += BOX) {
        for (int i = 0; i < HEAD_QK; i += BOX) {
            real *to = x + i * ROWS + r * BOX;
            if (!keys) tma_load(to, &map.q, h * HEAD_QK + i, row + r, arrives);
            else if (i < 128) tma_load(to, &map.kv, h * HEAD_KV + i, row + r, arrives);
            else tma_load(to, &map.k_pe, 0, row + r, arrives);
        }
        for (int i = 0; i < HEAD_V && y; i += BOX) {
            real *to = y + i * ROWS + r * BOX;
            if (keys) tma_load(to, &map.kv, h * HEAD_KV + 128 + i, row + r, arrives);
            else tma_load(to, &map.o, h * HEAD_V + i, row + r, arrives);
        }
    }
}

// d[64, ROWS] = x y^T, of WIDTH numbers a row; x are 64 of OWN rows.
template <int WIDTH, int ROWS, int N>
__device__ static void multiply_rows(float (&d)[N][4], const real *x, const real *y)
{
    wgmma_fence(d);
    wgmma<false, false, false>(d, x, y, 0);
#pragma unroll
    for (int k = 16; k < WIDTH; k += 16)
        wgmma<false, false>(d, x + k / BOX * OWN * BOX + k % BOX,
                            y + k / BOX * ROWS * BOX + k % BOX, 0);
}

// d[64, 8 N] += weights[64, ROWS] y[ROWS, 8 N]
template <int ROWS, int N>
__device__ static void multiply_weights(float (&d)[N][4], const uint32_t (&weights)[ROWS / 16][4],
                                        const real *y)
{
    wgmma_fence(d);
#pragma unroll
    for (int k = 0; k < ROWS / 16; k++)
        wgmma<true>(d, weights[k], y + k * 16 * BOX, ROWS * BOX * sizeof(real));
}

// Columns 8 FROM .. 8 (FROM + COUNT) - 1 of a row of an accumulator, the upper of a lane's two or
// the lower, times scale; `to` is where this lane's numbers of the first eight go.
template <int COUNT = 0, int FROM = 0, int N>
__device__ static void store_row(real *to, const float (&acc)[N][4], int half, float scale)
{
#pragma unroll
    for (int n = 0; n < (COUNT ? COUNT : N); n++) {
        const float *two = acc[FROM + n] + 2 * half;
        store<2>(to + 8 * n, Pack<real, 2>{{(real)(two[0] * scale), (real)(two[1] * scale)}});
    }
}

// While a tile's values are added up the next one's scores are computed; meanwhile the other four
// warps have theirs to do.
__global__ void __launch_bounds__(HOPPER_THREADS, 1)
wgmma_attention_forward_kernel(real *out, accum *lse, const __grid_constant__ HeadMaps map,
                               AttentionSizes s)
{
    constexpr int ROWS = PASS_FORWARD;
    DYNAMIC_SHARED(real, qs);         // [3, OWN, 64]
    real *tiles = qs + OWN * HEAD_QK; // [2] of keys [3, ROWS, 64] and values [2, ROWS, 64]
    SHARED(uint64_t, full, [2]);
    SHARED(uint64_t, empty, [2]);
    SHARED(uint64_t, own, );
    int warp = (int)threadIdx.x / WARP, lane = (int)threadIdx.x % WARP;
    int b = (int)blockIdx.x / s.NH, h = (int)blockIdx.x % s.NH;
    int first = (int)(gridDim.y - 1 - blockIdx.y) * OWN, count = first / ROWS + 1;
    if (threadIdx.x == 0) {
        for (int i = 0; i < 2; i++) mbarrier_init(&full[i], 1), mbarrier_init(&empty[i], 8);
        mbarrier_init(&own, 1);
        mbarrier_init_done();
    }
    __syncthreads();
    if (warp >= 8) {
        give_registers<24>();
        if (warp > 8 || lane > 0) return;
        mbarrier_expect(&own, OWN * HEAD_QK * sizeof(real));
        load_head<OWN>(qs, NULL, map, h, b * s.T + first, 0, &own);
        for (int tile = 0; tile < count; tile++) {
            real *ks = tiles + tile % 2 * ROWS * HEAD_SIZES;
            mbarrier_wait(&empty[tile % 2], tile / 2 % 2 ^ 1);
            mbarrier_expect(&full[tile % 2], ROWS * HEAD_SIZES * sizeof(real));
            load_head<ROWS>(ks, ks + ROWS * HEAD_QK, map, h, b * s.T + tile * ROWS, 1,
                            &full[tile % 2]);
        }
    } else {
        take_registers<240>();
        int row = warp / 4 * BOX, mine = row + warp % 4 * 16 + lane / 4;
        float log2_scale = s.scale * LOG2_E;
        float o[HEAD_V / 8][4] = {}, sc[ROWS / 8][4];
        float max[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};
        mbarrier_wait(&own, 0);
        mbarrier_wait(&full[0], 0);
        multiply_rows<HEAD_QK, ROWS>(sc, qs + row * BOX, tiles);
        wgmma_commit();
        wgmma_wait<0>(sc);
        for (int tile = 0; tile < count; tile++) {
            const real *vs = tiles + tile % 2 * ROWS * HEAD_SIZES + ROWS * HEAD_QK;
            int next = tile + 1;
            weigh_scores(sc, o, max, sum, next == count, mine, log2_scale);
            uint32_t weights[ROWS / 16][4];
#pragma unroll
            for (int k = 0; k < ROWS / 16; k++) fragment_of(weights[k], sc, k);
            multiply_weights<ROWS>(o, weights, vs);
            if (next < count) {
                mbarrier_wait(&full[next % 2], next / 2 % 2);
                multiply_rows<HEAD_QK, ROWS>(sc, qs + row * BOX,
                                             tiles + next % 2 * ROWS * HEAD_SIZES);
            }
            wgmma_commit();
            wgmma_wait<0>(sc);
            wgmma_wait<0>(o);
            if (lane == 0) mbarrier_arrive(&empty[tile % 2]);
        }
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int t = first + mine + half * 8;
            sum[half] += __shfl_xor_sync(~0u, sum[half], 1);
            sum[half] += __shfl_xor_sync(~0u, sum[half], 2);
            if (t >= s.T) continue;
            if (lane % 4 == 0)
                lse[(size_t)blockIdx.x * s.T + t] = max[half] * s.scale + logf(sum[half]);
            real *to = out + (((size_t)b * s.T + t) * s.NH + h) * HEAD_V + lane % 4 * 2;
            store_row(to, o, half, 1 / sum[half]);
        }
    }
}

// As attention_backward_kernel.
template <bool KEYS>
__global__ void __launch_bounds__(HOPPER_THREADS, 1)
wgmma_attention_backward_kernel(real *dq, real *dkv, real *dk_pe_heads, const accum *delta,
                                const accum *lse, const __grid_constant__ HeadMaps map,
                                AttentionSizes s)
{
    constexpr int ROWS = PASS_BACKWARD;
    DYNAMIC_SHARED(real, x);                                // [3, OWN, 64]
    real *y = x + OWN * HEAD_QK, *tiles = y + OWN * HEAD_V; // [2, OWN, 64]
    SHARED(float, lse_of, [PASSES][ROWS]); // of the queries that pass by, times log2 e
    SHARED(float, delta_of, [PASSES][ROWS]);
    SHARED(uint64_t, full, [PASSES]);
    SHARED(uint64_t, empty, [PASSES]);
    SHARED(uint64_t, own, );
    int warp = (int)threadIdx.x / WARP, lane = (int)threadIdx.x % WARP;
    int b = (int)blockIdx.x / s.NH, h = (int)blockIdx.x % s.NH;
    int first = (int)(KEYS ? blockIdx.y : gridDim.y - 1 - blockIdx.y) * OWN;
    int begin = KEYS ? first : 0, end = KEYS ? s.T : min(first + OWN, s.T);
    lse += (size_t)blockIdx.x * s.T, delta += (size_t)blockIdx.x * s.T;
    if (threadIdx.x == 0) {
        for (int i = 0; i < PASSES; i++) mbarrier_init(&full[i], WARP), mbarrier_init(&empty[i], 8);
        mbarrier_init(&own, 1);
        mbarrier_init_done();
    }
    __syncthreads();
    if (warp >= 8) {
        give_registers<24>();
        if (warp > 8) return;
        if (lane == 0) {
            mbarrier_expect(&own, OWN * HEAD_SIZES * sizeof(real));
            load_head<OWN>(x, y, map, h, b * s.T + first, KEYS, &own);
        }
        for (int tile = 0, at = begin; at < end; tile++, at += ROWS) {
            int pass = tile % PASSES;
            real *xs = tiles + pass * ROWS * HEAD_SIZES;
            mbarrier_wait(&empty[pass], tile / PASSES % 2 ^ 1);
            for (int i = lane; KEYS && i < ROWS; i += WARP) {
                lse_of[pass][i] = at + i < s.T ? lse[at + i] * LOG2_E : INFINITY;
                delta_of[pass][i] = at + i < s.T ? delta[at + i] : 0;
            }
            if (lane > 0) { // every lane arrives for what it stored
                mbarrier_arrive(&full[pass]);
                continue;
            }
            mbarrier_expect(&full[pass], ROWS * HEAD_SIZES * sizeof(real));
            load_head<ROWS>(xs, xs + ROWS * HEAD_QK, map, h, b * s.T + at, !KEYS, &full[pass]);
        }
    } else {
        take_registers<240>();
        int row = warp / 4 * BOX, mine = first + row + warp % 4 * 16 + lane / 4;
        int col = lane % 4 * 2;
        float log2_scale = s.scale * LOG2_E, dx[HEAD_QK / 8][4] = {}, dy[HEAD_V / 8][4] = {};
        Pack<float, 2> l, d; // lse and delta of both rows or, KEYS, of two that pass by
        for (int half = 0; half < 2 && !KEYS; half++) {
            int t = min(mine + half * 8, s.T - 1);
            l.x[half] = lse[t] * LOG2_E, d.x[half] = delta[t];
        }
        mbarrier_wait(&own, 0);
        for (int tile = 0, at = begin; at < end; tile++, at += ROWS) {
            int pass = tile % PASSES;
            const real *xs = tiles + pass * ROWS * HEAD_SIZES, *ys = xs + ROWS * HEAD_QK;
            float sc[ROWS / 8][4]; // scores, then p; dp, then ds
            uint32_t weights[ROWS / 16][4], dscores[ROWS / 16][4];
            mbarrier_wait(&full[pass], tile / PASSES % 2);
            multiply_rows<HEAD_QK, ROWS>(sc, x + row * BOX, xs);
            wgmma_commit();
            wgmma_wait<0>(sc);
#pragma unroll
            for (int j = 0; j < ROWS / 8; j++) {
                if (KEYS) l = load<2>(lse_of[pass] + 8 * j + col);
#pragma unroll
                for (int e = 0; e < 4; e++)
                    sc[j][e] = exp2_approx(sc[j][e] * log2_scale - l.x[KEYS ? e % 2 : e / 2]);
            }
            if (KEYS ? at < first + row + BOX : at + ROWS > first + row) // the diagonal
#pragma unroll
                for (int j = 0; j < ROWS / 8; j++)
#pragma unroll
                    for (int e = 0; e < 4; e++) {
                        int passing = at + 8 * j + col + e % 2, own_row = mine + e / 2 * 8;
                        if (KEYS ? own_row > passing : passing > own_row) sc[j][e] = 0;
                    }
#pragma unroll
            for (int k = 0; k < ROWS / 16; k++) fragment_of(weights[k], sc, k);
            multiply_rows<HEAD_V, ROWS>(sc, y + row * BOX, ys);
            wgmma_commit();
            if (KEYS) {
                multiply_weights<ROWS>(dy, weights, ys);
                wgmma_commit();
            }
            wgmma_wait<KEYS>(sc);
#pragma unroll
            for (int j = 0; j < ROWS / 8; j++) {
                if (KEYS) d = load<2>(delta_of[pass] + 8 * j + col);
#pragma unroll
                for (int e = 0; e < 4; e++) { // the weights in float are gone: registers are short
                    uint32_t pair = weights[j / 2][j % 2 * 2 + e / 2];
                    float weight = __uint_as_float(e % 2 ? pair & 0xffff0000u : pair << 16);
                    sc[j][e] = weight * (sc[j][e] - d.x[KEYS ? e % 2 : e / 2]);
                }
            }
#pragma unroll
            for (int k = 0; k < ROWS / 16; k++) fragment_of(dscores[k], sc, k);
            multiply_weights<ROWS>(dx, dscores, xs);
            wgmma_commit();
            wgmma_wait<0>(dx);
            if (KEYS) wgmma_wait<0>(dy);
            if (lane == 0) mbarrier_arrive(&empty[pass]);
        }
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int t = mine + half * 8;
            if (t >= s.T) continue;
            size_t at = ((size_t)b * s.T + t) * s.NH + h;
            if (!KEYS) {
                store_row(dq + at * HEAD_QK + col, dx, half, s.scale);
                continue;
            }
            store_row<16>(dkv + at * HEAD_KV + col, dx, half, s.scale);
            store_row<8, 16>(dk_pe_heads + ((size_t)blockIdx.x * s.T + t) * BOX + col, dx, half,
                             s.scale);
            store_row(dkv + at * HEAD_KV + 128 + col, dy, half, 1);
        }
    }
}
#endif // MOE_HOPPER

#define RUN_FLASH_FORWARD(DQ, DV, ...) \
    RUN_KERNEL((flash_forward_kernel<DQ, DV>), grid, FLASH_THREADS, \
               2 * FLASH * (DQ + DV + 16) * sizeof(real), __VA_ARGS__)
#define RUN_FLASH_BACKWARD(DQ, DV, KEYS, ...) \
    RUN_KERNEL((flash_backward_kernel<DQ, DV, KEYS>), grid, FLASH_THREADS, \
               (FLASH + 2 * PASSING) * (DQ + DV + 16) * sizeof(real), __VA_ARGS__)
#endif // MOE_BF16

static void attention_forward(real *out,        // [B, T, NH, Dv]
                              accum *lse,       // [B, NH, T], log of the softmax's denominator
                              const real *q,    // [B, T, NH, Dn + Dr]
                              const real *kv,   // [B, T, NH, Dn + Dv], k_nope then v
                              const real *k_pe, // [B, T, Dr]
                              size_t B, size_t T, size_t NH, size_t Dn, size_t Dr, size_t Dv,
                              double scale)
{
    METER(__func__, (double)(B * NH * T * T) * (double)(Dn + Dr + Dv),
          B * T * (NH * (2 * Dn + Dr + 2 * Dv) + Dr) * sizeof(real));
    size_t Dq = Dn + Dr;
    AttentionSizes s = {(int)T, (int)NH, (int)Dn, (int)Dr, (int)Dv, (float)scale,
                        (Dn | Dr | Dv) % WIDE == 0};
#ifdef MOE_BF16
#ifdef MOE_HOPPER
    if (Dn == 128 && Dr == 64 && Dv == 128) {
        size_t bytes = (OWN * HEAD_QK + 2 * PASS_FORWARD * HEAD_SIZES) * sizeof(real);
        RUN_KERNEL(wgmma_attention_forward_kernel, dim3((unsigned)(B * NH), grid_of(T, OWN)),
                   HOPPER_THREADS, bytes, out, lse,
                   head_maps(q, out, kv, k_pe, B * T, NH), s);
        return;
    }
#endif
    dim3 grid((unsigned)(B * NH), grid_of(T, FLASH));
    if (Dq <= 48 && Dv <= 32) {
        RUN_FLASH_FORWARD(48, 32, out, lse, q, kv, k_pe, s);
        return;
    }
    if (Dq <= 192 && Dv <= 128) {
        RUN_FLASH_FORWARD(192, 128, out, lse, q, kv, k_pe, s);
        return;
    }
#endif
    RUN_KERNEL(attention_forward_kernel, dim3((unsigned)(B * NH), grid_of(T, ROWS)),
               ATTENTION_THREADS, (ROWS * (Dq + Dv) + LANES * (Dq + Dv + 2)) * sizeof(float), out,
               lse, q, kv, k_pe, s);
}

static void attention_backward(real *dq, real *dkv, real *dk_pe, real *dk_pe_heads,
                               const real *dout, const real *out, const accum *lse, const real *q,
                               const real *kv, const real *k_pe, size_t B, size_t T, size_t NH,
                               size_t Dn, size_t Dr, size_t Dv, double scale)
{
    METER(__func__, 2.0 * (double)(B * NH * T * T) * (double)(Dn + Dr + Dv),
          2 * B * T * (NH * (2 * Dn + Dr + 2 * Dv) + Dr) * sizeof(real));
    size_t Dq = Dn + Dr, rows = B * T * NH;
    accum *delta = (accum *)scratch(rows * sizeof(accum)); // [B, NH, T]
    AttentionSizes s = {(int)T, (int)NH, (int)Dn, (int)Dr, (int)Dv, (float)scale,
                        (Dn | Dr | Dv) % WIDE == 0};
    int done = 0;
    RUN_KERNEL(attention_delta_kernel, grid_of(rows, BLOCK / WARP), BLOCK, 0, delta, dout, out,
               rows, (int)T, (int)NH, (int)Dv);
#define GRADIENTS dq, dkv, dk_pe_heads, dout, delta, lse, q, kv, k_pe, s
#ifdef MOE_BF16
    dim3 grid((unsigned)(B * NH), grid_of(T, FLASH));
#ifdef MOE_HOPPER
    if (Dn == 128 && Dr == 64 && Dv == 128) {
        size_t bytes = (OWN + PASSES * PASS_BACKWARD) * HEAD_SIZES * sizeof(real);
        HeadMaps map = head_maps(q, dout, kv, k_pe, B * T, NH);
        dim3 blocks((unsigned)(B * NH), grid_of(T, OWN));
        RUN_KERNEL(wgmma_attention_backward_kernel<true>, blocks, HOPPER_THREADS, bytes,
                   dq, dkv, dk_pe_heads, delta, lse, map, s);
        RUN_KERNEL(wgmma_attention_backward_kernel<false>, blocks, HOPPER_THREADS, bytes,
                   dq, dkv, dk_pe_heads, delta, lse, map, s);
        done = 1;
    } else
#endif
    if (Dq <= 48 && Dv <= 32) {
        RUN_FLASH_BACKWARD(48, 32, true, GRADIENTS);
        RUN_FLASH_BACKWARD(48, 32, false, GRADIENTS);
        done = 1;
    } else if (Dq <= 192 && Dv <= 128) {
        RUN_FLASH_BACKWARD(192, 128, true, GRADIENTS);
        RUN_FLASH_BACKWARD(192, 128, false, GRADIENTS);
        done = 1;
    }
#endif
    if (!done) {
        size_t bytes = (2 * ROWS * (Dq + Dv) + LANES * (Dq + Dv + 2)) * sizeof(float);
        dim3 tiles((unsigned)(B * NH), grid_of(T, ROWS));
        RUN_KERNEL(attention_backward_kernel<true>, tiles, ATTENTION_THREADS, bytes, GRADIENTS);
        RUN_KERNEL(attention_backward_kernel<false>, tiles, ATTENTION_THREADS, bytes, GRADIENTS);
    }
    RUN_KERNEL(sum_heads_kernel, grid_of(B * T * Dr, BLOCK), BLOCK, 0, dk_pe, dk_pe_heads,
               B * T * Dr, (int)T, (int)NH, (int)Dr);
}

// Indices of the K largest of n values, in falling order; of equal ones the first. By a warp; taken
// [n] tells which they are, each lane its own. Of its own a lane looks for the best again when it
// has been taken.
__device__ static void top_k(int *index, unsigned char *taken, const float *value, int n, int K)
{
    int lane = (int)threadIdx.x % WARP, mine = -1;
    float my_value = 0;
    bool look = true;
    for (int i = lane; i < n; i += WARP) taken[i] = 0;
    for (int k = 0; k < K; k++) {
        if (look) mine = -1;
        for (int i = lane; i < n && look; i += WARP)
            if (!taken[i] && (mine < 0 || value[i] > my_value)) mine = i, my_value = value[i];
        int best = mine;
        float most = my_value;
        for (int d = WARP / 2; d > 0; d /= 2) {
            int other = __shfl_xor_sync(~0u, best, d);
            float its = __shfl_xor_sync(~0u, most, d);
            if (other >= 0 && (best < 0 || its > most || (its == most && other < best)))
                best = other, most = its;
        }
        best = __shfl_sync(~0u, best, 0); // with NaNs about lanes might differ
        if (lane == 0) index[k] = best;
        look = lane == best % WARP;
        if (look) taken[best] = 1;
    }
    __syncwarp();
}

// Sends each token to K experts ([V3] 12-16). s = sigmoid(x W^T); selection looks at s + bias: a
// group of experts scores the sum of its two best, KG groups stay, the K best in them are taken.
// Their weights come from s alone: g_k = s_k / (sum of the selected + 1e-20), if norm, times scale.
// A warp a token; s holds x W^T at first. Reads and writes 4 E bytes.
__global__ void router_forward_kernel(accum *s, int *topk, accum *g, const accum *bias, size_t N,
                                      int E, int K, int G, int KG, int norm, float scale, int hold)
{
    enum { WARPS = BLOCK / WARP };
    DYNAMIC_SHARED(float, choices); // [WARPS, E + G + KG], then taken [WARPS, E + G]
    int warp = (int)threadIdx.x / WARP, lane = (int)threadIdx.x % WARP, size = E / G;
    size_t n = (size_t)blockIdx.x * WARPS + warp;
    if (n >= N) return;
    float *choice = choices + warp * (E + G + KG), *group_score = choice + E; // [E], [G]
    int *kept = (int *)(group_score + G);                                     // [KG]
    unsigned char *taken = (unsigned char *)(choices + WARPS * (E + G + KG)) + warp * (E + G);
    unsigned char *keep = taken + E; // [G]
    accum *sn = s + n * E;
    int *index = topk + n * K;
    for (int e = lane; e < E; e += WARP) {
        sn[e] = sigmoid(sn[e]);
        choice[e] = sn[e] + bias[e];
    }
    __syncwarp();
    if (G > 1) {
        for (int i = lane; i < G; i += WARP) { // its two best
            float one = -INFINITY, two = -INFINITY;
            for (int e = i * size; e < (i + 1) * size; e++) {
                float c = choice[e];
                if (c > one) two = one, one = c;
                else if (c > two) two = c;
            }
            group_score[i] = one + two;
        }
        __syncwarp();
        top_k(kept, keep, group_score, G, KG);
        for (int e = lane; e < E; e += WARP)
            if (!keep[e / size]) choice[e] = -INFINITY;
        __syncwarp();
    }
    if (!hold) top_k(index, taken, choice, E, K);
    float sum = 0;
    for (int k = lane; k < K; k += WARP) sum += sn[index[k]];
    sum = warp_sum(sum) + 1e-20f;
    for (int k = lane; k < K; k += WARP)
        g[n * K + k] = scale * (norm ? sn[index[k]] / sum : sn[index[k]]);
}

static void router_forward(accum *s,          // [N, E] affinities
                           int *topk,         // [N, K] experts taken
                           accum *g,          // [N, K] their weights
                           const real *x,     // [N, C]
                           const real *w,     // [E, C]
                           const accum *bias, // [E]
                           size_t N, size_t C, size_t E, size_t K, size_t G, size_t KG, int norm,
                           double scale)
{
    METER(__func__, 2.0 * N * E * C, (N + E) * C * sizeof(real) + N * E * sizeof(accum));
    Rows r = all_rows(N);
    if (are_few(r)) few_rows<false>(s, NULL, NULL, x, w, NULL, r, E, C, SET);
    else gemm(s, E, x, 0, C, w, 1, C, N, E, C, 0);
    RUN_KERNEL(router_forward_kernel, grid_of(N, BLOCK / WARP), BLOCK,
               BLOCK / WARP * ((E + G) * (sizeof(float) + 1) + KG * sizeof(int)), s, topk, g, bias,
               N, (int)E, (int)K, (int)G, (int)KG, norm, (float)scale, hold_routing);
}

// The selection is a constant. With S = sum of the selected s + 1e-20 and g_k = scale s_k / S:
//     ds_k += scale / S (dg_k - sum_j dg_j s_j / S);   without norm  ds_k += scale dg_k.
// s = sigmoid(z), z = x W^T:   dz = ds s (1 - s),  dx += dz W,  dW = dz^T x as mode says.
// A warp a token; reads 8 E bytes, writes E.
__global__ void __launch_bounds__(BLOCK, 5)
router_backward_kernel(real *dz, accum *ds, const accum *dg, const accum *s, const int *topk,
                       size_t N, int E, int K, int norm, float scale)
{
    size_t n = (size_t)blockIdx.x * (BLOCK / WARP) + threadIdx.x / WARP;
    if (n >= N) return;
    const accum *sn = s + n * E, *dgn = dg + n * K;
    const int *index = topk + n * K;
    accum *dsn = ds + n * E;
    int lane = (int)threadIdx.x % WARP;
    float sum = 0, dot = 0;
    for (int k = lane; k < K; k += WARP) sum += sn[index[k]], dot += dgn[k] * sn[index[k]];
    sum = warp_sum(sum) + 1e-20f;
    dot = warp_sum(dot) / sum;
    for (int k = lane; k < K; k += WARP)
        dsn[index[k]] += scale * (norm ? (dgn[k] - dot) / sum : dgn[k]);
    __syncwarp();
    for (int e = lane; e < E; e += WARP)
        dz[n * E + e] = (real)(dsn[e] * sn[e] * (1 - sn[e]));
}

static void router_backward(real *dx, accum *dw, accum *ds, const accum *dg, const accum *s,
                            const int *topk, const real *x, const real *w, size_t N, size_t C,
                            size_t E, size_t K, int norm, double scale, enum Mode mode)
{
    METER(__func__, 4.0 * N * E * C,
          (2 * N + E) * C * sizeof(real) + (3 * N + C) * E * sizeof(accum));
    real *dz = (real *)scratch(N * E * sizeof(real)); // [N, E]
    RUN_KERNEL(router_backward_kernel, grid_of(N, BLOCK / WARP), BLOCK, 0, dz, ds, dg, s, topk, N,
               (int)E, (int)K, norm, (float)scale);
    matmul_backward_x(dx, dz, w, all_rows(N), E, C, ADD);
    matmul_backward_w(dw, dz, x, all_rows(N), E, C, mode);
}

// Sequence-wise balance loss ([V3] 17-20), for each sequence
//     loss = sum_i f_i P_i,  P_i = mean_t s_ti / sum_j s_tj,
//     f_i = E / (K T) * the number of tokens with i among the K best of s, bias and groups aside.
// First a block has 16 tokens of a sequence, each of its warps two: what they add to P_i and to the
// number that f_i is made of. Reads 4 E bytes a token.
enum { BALANCE_TOKENS = 16 };

__global__ void balance_tokens_kernel(float *share, int *count, const accum *s, int T, int E, int K,
                                      int hold)
{
    enum { WARPS = BLOCK / WARP };
    DYNAMIC_SHARED(float, P);                                   // [WARPS, E]
    int *chosen = (int *)(P + WARPS * E);                       // [WARPS, E]
    int *index = chosen + WARPS * E;                            // [WARPS, K]
    unsigned char *best = (unsigned char *)(index + WARPS * K); // [WARPS, E]
    int warp = (int)threadIdx.x / WARP, lane = (int)threadIdx.x % WARP;
    int t = (int)blockIdx.x * BALANCE_TOKENS, end = t + BALANCE_TOKENS < T ? t + BALANCE_TOKENS : T;
    for (int e = lane; e < E; e += WARP) P[warp * E + e] = 0, chosen[warp * E + e] = 0;
    for (t += warp; t < end; t += WARPS) {
        const accum *st = s + ((size_t)blockIdx.y * T + t) * E;
        float sum = 0;
        for (int e = lane; e < E; e += WARP) sum += st[e];
        sum = warp_sum(sum);
        if (!hold) top_k(index + warp * K, best + warp * E, st, E, K);
        for (int e = lane; e < E; e += WARP) {
            P[warp * E + e] += st[e] / sum;
            if (!hold) chosen[warp * E + e] += best[warp * E + e];
        }
    }
    __syncthreads();
    for (int e = (int)threadIdx.x; e < E; e += BLOCK) {
        for (int w = 1; w < WARPS; w++) P[e] += P[w * E + e], chosen[e] += chosen[w * E + e];
        size_t at = ((size_t)blockIdx.y * gridDim.x + blockIdx.x) * E + e;
        share[at] = P[e], count[at] = chosen[e];
    }
}

// Then a block of 32 warps a sequence adds up: a lane an expert, a warp every 32nd of the blocks
// before.
__global__ void balance_forward_kernel(accum *loss, accum *f, const float *share, const int *count,
                                       int blocks, int T, int E, int K, int hold)
{
    SHARED(float, shares, [WARP][WARP]);
    SHARED(int, counts, [WARP][WARP]);
    int warp = (int)threadIdx.x / WARP, lane = (int)threadIdx.x % WARP;
    float total = 0;
    for (int e0 = 0; e0 < E; e0 += WARP) {
        int e = e0 + lane, chosen = 0;
        float P = 0;
        for (int b = warp; b < blocks && e < E; b += WARP) {
            size_t at = ((size_t)blockIdx.x * blocks + b) * E + e;
            P += share[at], chosen += count[at];
        }
        __syncthreads(); // the experts before have been added up
        shares[warp][lane] = P, counts[warp][lane] = chosen;
        __syncthreads();
        if (warp > 0 || e >= E) continue;
        for (int w = 1; w < WARP; w++) P += shares[w][lane], chosen += counts[w][lane];
        accum *fe = f + (size_t)blockIdx.x * E + e;
        if (!hold) *fe = (float)chosen * (float)E / ((float)K * (float)T);
        total += *fe * P / (float)T;
    }
    total = warp_sum(total);
    if (threadIdx.x == 0) loss[blockIdx.x] = total;
}

static void balance_forward(accum *loss,    // [B]
                            accum *f,       // [B, E]
                            const accum *s, // [B, T, E]
                            size_t B, size_t T, size_t E, size_t K)
{
    METER(__func__, 0, B * T * E * sizeof(accum));
    unsigned blocks = grid_of(T, BALANCE_TOKENS); // of a sequence
    size_t n = B * blocks * E;
    float *share = (float *)scratch(n * (sizeof(float) + sizeof(int))); // [B, blocks, E]
    int *count = (int *)(share + n);                                    // [B, blocks, E]
    RUN_KERNEL(balance_tokens_kernel, dim3(blocks, (unsigned)B), BLOCK,
               BLOCK / WARP * (E * (sizeof(float) + sizeof(int) + 1) + K * sizeof(int)), share,
               count, s, (int)T, (int)E, (int)K, hold_routing);
    RUN_KERNEL(balance_forward_kernel, grid_of(B, 1), WARP * WARP, 0, loss, f, share, count,
               (int)blocks, (int)T, (int)E, (int)K, hold_routing);
}

// loss = sum_i f_i mean_t s_ti / S_t with S_t = sum_j s_tj, f a constant:
//     ds_ti = dloss / T (f_i / S_t - sum_j f_j s_tj / S_t^2).
// A warp a token; reads 4 E bytes, and as many from cache, writes 4 E.
__global__ void balance_backward_kernel(accum *ds, float scale, const accum *f, const accum *s,
                                        size_t N, size_t T, int E)
{
    size_t n = (size_t)blockIdx.x * (BLOCK / WARP) + threadIdx.x / WARP;
    if (n >= N) return;
    const accum *fb = f + n / T * E, *sn = s + n * E;
    int lane = (int)threadIdx.x % WARP;
    float sum = 0, dot = 0;
    for (int e = lane; e < E; e += WARP) sum += sn[e], dot += fb[e] * sn[e];
    sum = warp_sum(sum), dot = warp_sum(dot);
    for (int e = lane; e < E; e += WARP) ds[n * E + e] = scale * (fb[e] - dot / sum) / sum;
}

static void balance_backward(accum *ds, double dloss, const accum *f, const accum *s, size_t B,
                             size_t T, size_t E)
{
    METER(__func__, 0, 2 * B * T * E * sizeof(accum));
    RUN_KERNEL(balance_backward_kernel, grid_of(B * T, BLOCK / WARP), BLOCK, 0, ds,
               (float)(dloss / (double)T), f, s, B * T, T, (int)E);
}

// Sorts the N K choices of experts by expert, tokens in order within one, and copies the tokens
// there: xs[row[n,k]] = x[n]. Expert e then owns rows offsets[e] .. offsets[e+1].
// A counting sort: a block counts the experts of its SORT choices; the counts are added up over
// blocks and experts; each choice then finds its place.
enum { SORT = 1024 };

__global__ void sort_count_kernel(int *count, const int *topk, size_t n, int E)
{
    size_t i = (size_t)blockIdx.x * SORT + threadIdx.x;
    if (i < n) atomicAdd(&count[(size_t)blockIdx.x * E + topk[i]], 1);
}

// count[b,e] becomes the number of e's choices before block b's. One block.
__global__ void sort_scan_kernel(int *offsets, int *count, int blocks, int E)
{
    for (int e = (int)threadIdx.x; e < E; e += BLOCK) {
        int sum = 0;
        for (int b = 0; b < blocks; b++) {
            int *at = &count[(size_t)b * E + e], mine = *at;
            *at = sum;
            sum += mine;
        }
        offsets[e + 1] = sum;
    }
    __syncthreads();
    if (threadIdx.x >= WARP) return;
    int lane = (int)threadIdx.x, before = 0;
    if (lane == 0) offsets[0] = 0;
    for (int e0 = 0; e0 < E; e0 += WARP) {
        int sum = e0 + lane < E ? offsets[e0 + lane + 1] : 0;
        for (int d = 1; d < WARP; d *= 2) {
            int other = __shfl_up_sync(~0u, sum, d);
            if (lane >= d) sum += other;
        }
        if (e0 + lane < E) offsets[e0 + lane + 1] = before + sum;
        before += __shfl_sync(~0u, sum, WARP - 1);
    }
}

__global__ void sort_place_kernel(int *row, const int *offsets, const int *count, const int *topk,
                                  size_t n, int E)
{
    SHARED(int, expert, [SORT]);
    size_t i = (size_t)blockIdx.x * SORT + threadIdx.x;
    int mine = i < n ? topk[i] : -1, rank = 0;
    expert[threadIdx.x] = mine;
    __syncthreads();
    if (mine < 0) return;
    for (unsigned j = 0; j < threadIdx.x; j++) rank += expert[j] == mine;
    row[i] = offsets[mine] + count[(size_t)blockIdx.x * E + mine] + rank;
}

// All of it for up to SORT choices, as decoding has. A block a token, a warp one of its choices at
// a time: it stands after those of experts before its own, and after earlier ones of its own.
template <int W>
__global__ void dispatch_few_kernel(real *xs, int *offsets, int *row, const real *x,
                                    const int *topk, int n, size_t K, int E, size_t C)
{
    SHARED(int, expert, [SORT]);
    size_t token = blockIdx.x, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    for (int i = (int)threadIdx.x; i < n; i += BLOCK) expert[i] = topk[i];
    __syncthreads();
    for (size_t k = warp; k < K; k += BLOCK / WARP) {
        int me = (int)(token * K + k), mine = expert[me], before = 0;
        for (int i = (int)lane; i < n; i += WARP)
            before += expert[i] < mine || (expert[i] == mine && i < me);
        before = (int)warp_sum((float)before); // exact: there are few
        if (lane == 0) row[me] = before;
        for (size_t i = lane * W; i < C; i += WARP * W)
            store<W>(xs + (size_t)before * C + i, load<W>(x + token * C + i));
    }
    for (int e = (int)threadIdx.x; e <= E && token == 0; e += BLOCK) {
        int before = 0;
        for (int i = 0; i < n; i++) before += expert[i] < e;
        offsets[e] = before;
    }
}

// A block a token. Reads C, writes K C.
template <int W>
__global__ void dispatch_forward_kernel(real *xs, const real *x, const int *row, size_t K, size_t C)
{
    for (size_t i = threadIdx.x * W; i < C; i += blockDim.x * W) {
        Pack<real, W> xi = load<W>(x + blockIdx.x * C + i);
        for (size_t k = 0; k < K; k++) store<W>(xs + (size_t)row[blockIdx.x * K + k] * C + i, xi);
    }
}

static void dispatch_forward(real *xs,        // [N K, C]
                             int *offsets,    // [E + 1]
                             int *row,        // [N, K]
                             const real *x,   // [N, C]
                             const int *topk, // [N, K]
                             size_t N, size_t K, size_t E, size_t C)
{
    METER(__func__, 0, 2 * N * K * C * sizeof(real));
    unsigned blocks = grid_of(N * K, SORT);
    if (blocks == 1) {
        RUN_WIDE(C, AT(xs) | AT(x), dispatch_few_kernel<W>, grid_of(N, 1), BLOCK, 0, xs, offsets,
                 row, x, topk, (int)(N * K), K, (int)E, C);
        return;
    }
    int *count = (int *)scratch(blocks * E * sizeof(int)); // [blocks, E]
    device_zero(count, blocks * E * sizeof(int));
    RUN_KERNEL(sort_count_kernel, blocks, SORT, 0, count, topk, N * K, (int)E);
    RUN_KERNEL(sort_scan_kernel, 1, BLOCK, 0, offsets, count, (int)blocks, (int)E);
    RUN_KERNEL(sort_place_kernel, blocks, SORT, 0, row, offsets, count, topk, N * K, (int)E);
    RUN_WIDE(C, AT(xs) | AT(x), dispatch_forward_kernel<W>, grid_of(N, 1), row_threads(C), 0, xs, x,
             row, K, C);
}

// xs[row[n,k]] = x[n]: dx[n] = sum_k dxs[row[n,k]]. A block a token. Reads K C, writes C.
template <int W>
__global__ void dispatch_backward_kernel(real *dx, const real *dxs, const int *row, size_t K,
                                         size_t C, int add)
{
    for (size_t i = threadIdx.x * W; i < C; i += blockDim.x * W) {
        Pack<real, W> to = {};
        float sum[W];
        if (add) to = load<W>(dx + blockIdx.x * C + i);
        for (int j = 0; j < W; j++) sum[j] = add ? (float)to.x[j] : 0;
        for (size_t k = 0; k < K; k++) {
            Pack<real, W> from = load<W>(dxs + (size_t)row[blockIdx.x * K + k] * C + i);
            for (int j = 0; j < W; j++) sum[j] += (float)from.x[j];
        }
        for (int j = 0; j < W; j++) to.x[j] = (real)sum[j];
        store<W>(dx + blockIdx.x * C + i, to);
    }
}

static void dispatch_backward(real *dx, const real *dxs, const int *row, size_t N, size_t K,
                              size_t C, enum Mode mode)
{
    METER(__func__, 0, N * (K + 1) * C * sizeof(real));
    RUN_WIDE(C, AT(dx) | AT(dxs), dispatch_backward_kernel<W>, grid_of(N, 1), row_threads(C), 0, dx,
             dxs, row, K, C, mode == ADD);
}

// y[n] = h[n] + sum_k g[n,k] out[row[n,k]]. y may be h. A block a token. Reads K C and C floats,
// writes C floats.
template <int W>
__global__ void combine_forward_kernel(accum *y, const accum *h, const real *out, const accum *g,
                                       const int *row, size_t K, size_t C)
{
    for (size_t i = threadIdx.x * W; i < C; i += blockDim.x * W) {
        Pack<accum, W> to = load<W>(h + blockIdx.x * C + i);
        for (size_t k = 0; k < K; k++) {
            Pack<real, W> from = load<W>(out + (size_t)row[blockIdx.x * K + k] * C + i);
            for (int j = 0; j < W; j++) to.x[j] += g[blockIdx.x * K + k] * (float)from.x[j];
        }
        store(y + blockIdx.x * C + i, to);
    }
}

static void combine_forward(accum *y,        // [N, C]
                            const accum *h,  // [N, C]
                            const real *out, // [N K, C]
                            const accum *g,  // [N, K]
                            const int *row,  // [N, K]
                            size_t N, size_t K, size_t C)
{
    METER(__func__, 0, N * C * (K * sizeof(real) + 2 * sizeof(accum)));
    RUN_WIDE(C, AT(y) | AT(h) | AT(out), combine_forward_kernel<W>, grid_of(N, 1), row_threads(C),
             0, y, h, out, g, row, K, C);
}

// y[n] = h[n] + sum_k g[n,k] out[row[n,k]]:
//     dout[row[n,k]] = g[n,k] dy[n],   dg[n,k] = dy[n] . out[row[n,k]].
// A block a choice. Reads 2 C, writes C.
template <int W>
__global__ void combine_backward_kernel(real *dout, accum *dg, const real *dy, const real *out,
                                        const accum *g, const int *row, size_t K, size_t C)
{
    size_t at = (size_t)row[blockIdx.x] * C, n = blockIdx.x / K;
    float weight = g[blockIdx.x], dot = 0;
    for (size_t i = threadIdx.x * W; i < C; i += blockDim.x * W) {
        Pack<real, W> d = load<W>(dy + n * C + i), o = load<W>(out + at + i);
        for (int j = 0; j < W; j++) {
            dot += (float)d.x[j] * (float)o.x[j];
            d.x[j] = (real)(weight * (float)d.x[j]);
        }
        store<W>(dout + at + i, d);
    }
    dot = block_reduce<false>(dot);
    if (threadIdx.x == 0) dg[blockIdx.x] = dot;
}

static void combine_backward(real *dout, accum *dg, const real *dy, const real *out, const accum *g,
                             const int *row, size_t N, size_t K, size_t C)
{
    METER(__func__, 0, N * (2 * K + 1) * C * sizeof(real));
    RUN_WIDE(C, AT(dout) | AT(dy) | AT(out), combine_backward_kernel<W>, grid_of(N * K, 1),
             row_threads(C), 0, dout, dg, dy, out, g, row, K, C);
}

// loss[n] = lse[n] - z[n, target[n]] with z = logits / temperature and lse = log sum exp z.
// A block a row. A thread keeps the largest logit so far and, relative to it, the sum of exp; it
// takes four packs at once. Reads V.
template <int W>
__global__ void cross_entropy_forward_kernel(accum *loss, accum *lse, const real *logits,
                                             const int *target, float beta, size_t V)
{
    enum { PACKS = 4 };
    const float log2_beta = beta * LOG2_E;
    const real *z = logits + blockIdx.x * V;
    float max = -FLT_MAX, sum = 0;
    for (size_t v = threadIdx.x * W; v < V; v += PACKS * blockDim.x * W) {
        Pack<real, W> zv[PACKS];
        float before = max;
#pragma unroll
        for (int p = 0; p < PACKS; p++) {
            size_t at = v + p * blockDim.x * W;
            zv[p] = load<W>(z + (at < V ? at : v));
            for (int j = 0; j < W; j++) max = fmaxf(max, (float)zv[p].x[j]);
        }
        sum *= exp2_approx(log2_beta * (before - max));
#pragma unroll
        for (int p = 0; p < PACKS; p++) {
            if (v + p * blockDim.x * W >= V) break;
            for (int j = 0; j < W; j++)
                sum += exp2_approx(log2_beta * ((float)zv[p].x[j] - max));
        }
    }
    float most = block_reduce<true>(max);
    sum = block_reduce<false>(sum * exp2_approx(log2_beta * (max - most)));
    if (threadIdx.x > 0) return;
    float log_sum = beta * most + logf(sum);
    lse[blockIdx.x] = log_sum;
    loss[blockIdx.x] = log_sum - beta * (float)z[target[blockIdx.x]];
}

static void cross_entropy_forward(accum *loss,        // [N] -log p(target)
                                  accum *lse,         // [N]
                                  const real *logits, // [N, V]
                                  const int *target,  // [N]
                                  double temperature, size_t N, size_t V)
{
    METER(__func__, 0, N * V * sizeof(real));
    RUN_WIDE(V, AT(logits), cross_entropy_forward_kernel<W>, grid_of(N, 1), row_threads(V), 0, loss,
             lse, logits, target, (float)(1 / temperature), V);
}

// loss = lse - z_target: dlogits_v = scale dloss / temperature (exp(z_v - lse) - [v = target]).
// A block a row. Reads and writes V.
template <int W>
__global__ void cross_entropy_backward_kernel(real *dlogits, float scale, const accum *dloss,
                                              const accum *lse, const real *logits,
                                              const int *target, float beta, size_t V)
{
    size_t at = blockIdx.x * V, t = (size_t)target[blockIdx.x];
    float d = scale * dloss[blockIdx.x] * beta, log_sum = lse[blockIdx.x];
    for (size_t v = threadIdx.x * W; v < V; v += blockDim.x * W) {
        Pack<real, W> z = load<W>(logits + at + v);
        for (int j = 0; j < W; j++)
            z.x[j] = (real)(d * (expf(beta * (float)z.x[j] - log_sum) - (v + j == t ? 1 : 0)));
        store<W>(dlogits + at + v, z);
    }
}

static void cross_entropy_backward(real *dlogits, double scale,
                                   const accum *dloss, // [N]
                                   const accum *lse, const real *logits, const int *target,
                                   double temperature, size_t N, size_t V)
{
    METER(__func__, 0, 2 * N * V * sizeof(real));
    RUN_WIDE(V, AT(dlogits) | AT(logits), cross_entropy_backward_kernel<W>, grid_of(N, 1),
             row_threads(V), 0, dlogits, (float)scale, dloss, lse, logits, target,
             (float)(1 / temperature), V);
}

// Attention over a cache of latents, queries of any sequences at any positions ([V2] 2.1.2). Keys
// and values are never formed: with W_b = [W_uk; W_uv] of head h,
//     q_nope . (W_uk c) = (W_uk^T q_nope) . c,   sum_u p_u W_uv c_u = W_uv (sum_u p_u c_u).
// Row n belongs to sequence slot[n]; the entry of position u stands at u mod capacity, and the
// last `window` positions are seen.
// A block a row and head: each warp takes every eighth position and keeps the largest score, the
// sum of exp and that of exp c; at the end the eight are merged. Reads Rkv + Dr a position, all
// heads but the first from L2.
__global__ void latent_attention_kernel(real *latent, const real *q, const real *cache,
                                        const int *slot, const int *pos, int n, int NH, int Dn,
                                        int Dr, int Rkv, size_t capacity, size_t window,
                                        float scale)
{
    enum { WARPS = BLOCK / WARP };
    DYNAMIC_SHARED(float, query);                       // [Rkv + Dr]
    float *sums = query + Rkv + Dr;                     // [WARPS, Rkv]
    SHARED(float, max_of, [WARPS]);
    SHARED(float, total_of, [WARPS]);
    int row = (int)blockIdx.x / NH, h = (int)blockIdx.x % NH;
    int warp = (int)threadIdx.x / WARP, lane = (int)threadIdx.x % WARP;
    size_t last = (size_t)pos[row], seen = last + 1 < window ? last + 1 : window;
    size_t first = last + 1 - seen, base = (size_t)slot[row] * capacity;
    real *ql = latent + ((size_t)h * n + row) * Rkv;
    float *mine = sums + warp * Rkv, max = -INFINITY, total = 0;
    for (int j = (int)threadIdx.x; j < Rkv + Dr; j += BLOCK)
        query[j] = (float)(j < Rkv ? ql[j] : q[((size_t)row * NH + h) * (Dn + Dr) + Dn + j - Rkv]);
    for (int j = lane; j < Rkv; j += WARP) mine[j] = 0;
    __syncthreads();
    for (size_t u = warp; u < seen; u += WARPS) {
        const real *entry = cache + (base + (first + u) % capacity) * (Rkv + Dr);
        float score = 0;
        for (int j = lane; j < Rkv + Dr; j += WARP) score += query[j] * (float)entry[j];
        score = scale * warp_sum(score);
        float most = fmaxf(max, score), shrink = expf(max - most), weight = expf(score - most);
        for (int j = lane; j < Rkv; j += WARP)
            mine[j] = mine[j] * shrink + weight * (float)entry[j];
        total = total * shrink + weight;
        max = most;
    }
    if (lane == 0) max_of[warp] = max, total_of[warp] = total;
    __syncthreads();
    for (int w = 0; w < WARPS; w++) max = fmaxf(max, max_of[w]);
    total = 0;
    for (int w = 0; w < WARPS; w++) total += total_of[w] * expf(max_of[w] - max);
    real *to = latent + ((size_t)(NH + h) * n + row) * Rkv;
    for (int j = (int)threadIdx.x; j < Rkv; j += BLOCK) {
        float sum = 0;
        for (int w = 0; w < WARPS; w++) sum += sums[w * Rkv + j] * expf(max_of[w] - max);
        to[j] = (real)(sum / total);
    }
}

#ifdef MOE_BF16
// The same by tensor cores. All heads see the same latents, so HEADS of them share what is read.
// A block has a row, HEADS heads and a share of the positions, which it goes through in tiles of
// SEEN, as flash_forward_kernel does; the latents are keys and values both. For the scores of a
// small tile each warp has a part of the width, and the parts are added. Blocks [rows and groups of
// heads, shares]; NH (4 Rkv + 2 Dr) FLOPs and Rkv + Dr numbers a position.
enum { HEADS = 16, FILL = 264 }; // blocks: two for each multiprocessor of an H100

template <int RKV, int DR, int SEEN>
__global__ void __launch_bounds__(FLASH_THREADS)
flash_latent_kernel(float *part, // [rows and groups, shares, HEADS, RKV + 2]: sums, largest, total
                    const real *latent, const real *q, const real *cache, const int *slot,
                    const int *pos, int n, int NH, int Dn, int Dr, int Rkv, size_t capacity,
                    size_t window, float log2_scale)
{
    constexpr int WIDTH = RKV + DR, LD = WIDTH + 8, LP = SEEN + 8;
    constexpr int WARPS = FLASH_THREADS / WARP, COLS = RKV / WARPS; // columns of sums a warp has
    constexpr int ACROSS = SEEN / 16, PARTS = WARPS / ACROSS; // warps along positions, along width
    DYNAMIC_SHARED(real, qs);                             // [HEADS, LD]
    real *ks = qs + HEADS * LD, *ps = ks + SEEN * LD;     // [SEEN, LD], [HEADS, LP]
    SHARED(float, most_of, [WARPS][HEADS]);
    SHARED(float4, scores, [PARTS == 1 ? 1 : 2 * WARPS][WARP]);
    int groups = (NH + HEADS - 1) / HEADS, row = (int)blockIdx.x / groups;
    int warp = (int)threadIdx.x / WARP, lane = (int)threadIdx.x % WARP, place = warp % ACROSS;
    size_t last = (size_t)pos[row], seen = last + 1 < window ? last + 1 : window;
    size_t oldest = (last + 1 - seen) % capacity, base = (size_t)slot[row] * capacity;
    size_t tiles = (seen + SEEN - 1) / SEEN, end = tiles * (blockIdx.y + 1) / gridDim.y * SEEN;
    if (end > seen) end = seen;
    float o[COLS / 8][4] = {}, max[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};
    for (int i = (int)threadIdx.x * 8; i < HEADS * WIDTH; i += FLASH_THREADS * 8) {
        int h = (int)blockIdx.x % groups * HEADS + i / WIDTH, j = i % WIDTH, r = j - RKV;
        int valid = h < NH && (r < 0 ? j < Rkv : r < Dr);
        const real *from = r < 0 ? latent + ((size_t)h * n + row) * Rkv + j
                                 : q + ((size_t)row * NH + h) * (Dn + Dr) + Dn + r;
        cp_async_16(qs + i / WIDTH * LD + j, valid ? from : q, valid);
    }
    for (size_t at = tiles * blockIdx.y / gridDim.y * SEEN; at < end; at += SEEN) {
        __syncthreads(); // the tile before has been used
        for (int i = (int)threadIdx.x * 8; i < SEEN * WIDTH; i += FLASH_THREADS * 8) {
            int u = i / WIDTH, j = i % WIDTH, r = j - RKV;
            size_t place = oldest + at + u;
            size_t entry = base + (place < capacity ? place : place - capacity);
            int valid = at + u < end && (r < 0 ? j < Rkv : r < Dr);
            const real *from = cache + entry * (Rkv + Dr) + (r < 0 ? j : Rkv + r);
            cp_async_16(ks + u * LD + j, valid ? from : cache, valid);
        }
        cp_async_commit();
        cp_async_wait<0>();
        __syncthreads();
        // scores: 16 heads x 16 positions a warp
        float sc[2][4] = {};
#pragma unroll 4
        for (int k = warp / ACROSS; k < WIDTH / 16; k += PARTS) {
            uint32_t af[4], bf[4];
            fragment_a(af, qs + 16 * k, LD);
            fragment_b(bf, ks + 16 * place * LD + 16 * k, LD);
            mma_16x8x16(sc[0], af, bf);
            mma_16x8x16(sc[1], af, bf + 2);
        }
        if (PARTS > 1) {
            for (int i = 0; i < 2; i++)
                scores[2 * warp + i][lane] = {sc[i][0], sc[i][1], sc[i][2], sc[i][3]};
            __syncthreads();
            for (int i = 0; i < 2; i++) {
                float4 sum = scores[2 * place + i][lane];
                for (int part = 1; part < PARTS; part++) {
                    float4 more = scores[2 * (part * ACROSS + place) + i][lane];
                    sum.x += more.x, sum.y += more.y, sum.z += more.z, sum.w += more.w;
                }
                sc[i][0] = sum.x, sc[i][1] = sum.y, sc[i][2] = sum.z, sc[i][3] = sum.w;
            }
        }
        // softmax: four lanes of each warp share a head
        for (int half = 0; half < 2; half++) {
            float most = -INFINITY;
            for (int e = 0; e < 4; e++) {
                float *score = &sc[e / 2][2 * half + e % 2];
                if (at + 16 * place + e / 2 * 8 + lane % 4 * 2 + e % 2 >= end) *score = -INFINITY;
                most = fmaxf(most, *score);
            }
            most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
            most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
            if (lane % 4 == 0) most_of[warp][lane / 4 + half * 8] = most;
        }
        __syncthreads();
        for (int half = 0; half < 2; half++) {
            float most = max[half], total = 0;
            for (int w = 0; w < ACROSS; w++) most = fmaxf(most, most_of[w][lane / 4 + half * 8]);
            float shrink = exp2_approx((max[half] - most) * log2_scale);
            for (int e = 0; e < 4; e++) {
                float *score = &sc[e / 2][2 * half + e % 2];
                *score = exp2_approx((*score - most) * log2_scale);
                total += *score;
            }
            sum[half] = sum[half] * shrink + total; // of this lane's positions
            max[half] = most;
            for (int c = 0; c < COLS / 8; c++)
                o[c][2 * half] *= shrink, o[c][2 * half + 1] *= shrink;
        }
        const float one[2] = {1, 1};
        if (warp < ACROSS) spill(ps + 16 * warp, LP, sc, one);
        __syncthreads(); // all weights are there
#pragma unroll
        for (int k = 0; k < SEEN / 16; k++) {
            uint32_t pf[4];
            fragment_a(pf, ps + 16 * k, LP);
#pragma unroll
            for (int c = 0; c < COLS / 16; c++) {
                uint32_t vf[4];
                fragment_b_t(vf, ks + 16 * k * LD + warp * COLS + 16 * c, LD);
                mma_16x8x16(o[2 * c], pf, vf);
                mma_16x8x16(o[2 * c + 1], pf, vf + 2);
            }
        }
    }
    part += ((size_t)blockIdx.x * gridDim.y + blockIdx.y) * HEADS * (RKV + 2);
    __syncthreads(); // most_of has been read
    for (int half = 0; half < 2; half++) {
        sum[half] += __shfl_xor_sync(~0u, sum[half], 1);
        sum[half] += __shfl_xor_sync(~0u, sum[half], 2);
        if (lane % 4 == 0) most_of[warp][lane / 4 + half * 8] = sum[half];
    }
    __syncthreads();
    for (int half = 0; half < 2; half++) {
        float *to = part + (lane / 4 + half * 8) * (RKV + 2), total = 0;
        for (int c = 0; c < COLS / 8; c++)
            for (int e = 0; e < 2; e++)
                to[warp * COLS + 8 * c + lane % 4 * 2 + e] = o[c][2 * half + e];
        for (int w = 0; w < ACROSS; w++) total += most_of[w][lane / 4 + half * 8];
        if (warp == 0 && lane % 4 == 0) to[RKV] = max[half], to[RKV + 1] = total;
    }
}

// Merges the shares, each as much as its largest score says. A block a row and head.
template <int RKV>
__global__ void merge_latent_kernel(real *latent, const float *part, int n, int NH, int Rkv,
                                    int shares, float log2_scale)
{
    DYNAMIC_SHARED(float, weight); // [shares]
    int groups = (NH + HEADS - 1) / HEADS, row = (int)blockIdx.x / NH, h = (int)blockIdx.x % NH;
    int lane = (int)threadIdx.x % WARP;
    size_t step = HEADS * (RKV + 2);
    float max = -INFINITY, total = 0;
    part += ((size_t)row * groups + h / HEADS) * shares * step + h % HEADS * (RKV + 2);
    for (int s = lane; s < shares; s += WARP) max = fmaxf(max, part[s * step + RKV]);
    max = warp_max(max);
    for (int s = lane; s < shares; s += WARP) {
        float w = exp2_approx((part[s * step + RKV] - max) * log2_scale);
        total += part[s * step + RKV + 1] * w;
        if (threadIdx.x < WARP) weight[s] = w;
    }
    total = warp_sum(total);
    __syncthreads();
    for (int j = (int)threadIdx.x; j < Rkv; j += (int)blockDim.x) {
        float sum = 0;
#pragma unroll 8
        for (int s = 0; s < shares; s++) sum += part[s * step + j] * weight[s];
        latent[((size_t)(NH + h) * n + row) * Rkv + j] = (real)(sum / total);
    }
}

template <int RKV, int DR, int SEEN>
static void flash_latent(real *latent, const real *q, const real *cache, const int *slot,
                         const int *pos, size_t n, size_t NH, size_t Dn, size_t Dr, size_t Rkv,
                         size_t capacity, size_t window, double scale)
{
    size_t blocks = n * ceil_div(NH, HEADS), shares = FILL / blocks;
    float log2_scale = (float)scale * LOG2_E;
    if (shares > ceil_div(window, SEEN)) shares = ceil_div(window, SEEN);
    if (shares < 1) shares = 1;
    float *part = (float *)scratch(blocks * shares * HEADS * (RKV + 2) * sizeof(float));
    RUN_KERNEL((flash_latent_kernel<RKV, DR, SEEN>), dim3((unsigned)blocks, (unsigned)shares),
               FLASH_THREADS,
               ((HEADS + SEEN) * (RKV + DR + 8) + HEADS * (SEEN + 8)) * sizeof(real), part, latent,
               q, cache, slot, pos, (int)n, (int)NH, (int)Dn, (int)Dr, (int)Rkv, capacity,
               window, log2_scale);
    RUN_KERNEL(merge_latent_kernel<RKV>, grid_of(n * NH, 1), 128, shares * sizeof(float), latent,
               part, (int)n, (int)NH, (int)Rkv, (int)shares, log2_scale);
}
#endif // MOE_BF16

static void latent_attention(real *out,         // [n, NH, Dv]
                             real *latent,      // [2, NH, n, Rkv] workspace: queries, sums
                             const real *q,     // [n, NH, Dn + Dr]
                             const real *w_b,   // [NH, Dn + Dv, Rkv]
                             const real *cache, // [slots, capacity, Rkv + Dr] c_kv, then k_pe
                             const int *slot,   // [n]
                             const int *pos,    // [n]
                             size_t n, size_t NH, size_t Dn, size_t Dr, size_t Dv, size_t Rkv,
                             size_t capacity, size_t window, double scale)
{
    METER(__func__, 0, 0);
    size_t Dq = Dn + Dr, step = (Dn + Dv) * Rkv;
    int done = 0;
    gemm(latent, Rkv, q, 0, NH * Dq, w_b, 0, Rkv, n, Rkv, Dn, 0, NH, n * Rkv, Dq, step);
#ifdef MOE_BF16
    int wide = (Rkv | Dr | Dn) % WIDE == 0 && (AT(cache) | AT(q) | AT(latent)) % 16 == 0;
    done = wide && Rkv <= 512 && Dr <= 64;
#define LATENTS latent, q, cache, slot, pos, n, NH, Dn, Dr, Rkv, capacity, window, scale
    size_t large = n * ceil_div(NH, HEADS) * ceil_div(window, 64); // tiles: enough for all blocks?
    if (done && Rkv <= 64 && Dr <= 16) flash_latent<64, 16, 64>(LATENTS);
    else if (done && large >= FILL / 2) flash_latent<512, 64, 64>(LATENTS);
    else if (done) flash_latent<512, 64, 16>(LATENTS);
#endif
    if (!done)
        RUN_KERNEL(latent_attention_kernel, grid_of(n * NH, 1), BLOCK,
                   (Rkv + Dr + BLOCK / WARP * Rkv) * sizeof(float), latent, q, cache, slot, pos,
                   (int)n, (int)NH, (int)Dn, (int)Dr, (int)Rkv, capacity, window, (float)scale);
    gemm(out, NH * Dv, latent + n * NH * Rkv, 0, Rkv, w_b + Dn * Rkv, 1, Rkv, n, Dv, Rkv, 0, NH, Dv,
         n * Rkv, step);
}

// Copies new entries into such a cache: row n goes to position pos[n] of sequence slot[n].
__global__ void cache_store_kernel(real *cache, const real *c_kv, const real *k_pe, const int *slot,
                                   const int *pos, size_t Rkv, size_t Dr, size_t capacity)
{
    size_t n = blockIdx.x, at = (size_t)slot[n] * capacity + (size_t)pos[n] % capacity;
    for (size_t i = threadIdx.x; i < Rkv + Dr; i += blockDim.x)
        cache[at * (Rkv + Dr) + i] = i < Rkv ? c_kv[n * Rkv + i] : k_pe[n * Dr + i - Rkv];
}

static void cache_store(real *cache,      // [slots, capacity, Rkv + Dr]
                        const real *c_kv, // [n, Rkv]
                        const real *k_pe, // [n, Dr]
                        const int *slot,  // [n]
                        const int *pos,   // [n]
                        size_t n, size_t Rkv, size_t Dr, size_t capacity)
{
    RUN_KERNEL(cache_store_kernel, grid_of(n, 1), BLOCK, 0, cache, c_kv, k_pe, slot, pos, Rkv, Dr,
               capacity);
}

// ------------------------------------------------------------------------------------------------
// 6  Optimizers

// sum_i x_i^2, added up in fixed blocks, of accum or moment. Reads each number once.
template <typename T> __global__ void sum_squares_kernel(double *part, const T *x, size_t n)
{
    SHARED(double, sums, [BLOCK]);
    double sum = 0;
    size_t first = (size_t)blockIdx.x * BLOCK + threadIdx.x, step = (size_t)gridDim.x * BLOCK;
#pragma unroll 4
    for (size_t i = first; i < n / 4; i += step) {
        Pack<T, 4> four = load<4>(x + 4 * i);
        for (int j = 0; j < 4; j++) sum += (double)(float)four.x[j] * (double)(float)four.x[j];
    }
    if (first < n % 4) sum += (double)(float)x[n - 1 - first] * (double)(float)x[n - 1 - first];
    sums[threadIdx.x] = sum;
    for (int half = BLOCK / 2; half > 0; half /= 2) {
        __syncthreads();
        if ((int)threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
    }
    if (threadIdx.x == 0) part[blockIdx.x] = sums[0];
}

template <typename T> static double sum_squares(const T *x, size_t n)
{
    METER(__func__, 0, n * sizeof(T));
    size_t blocks = min_size(ceil_div(n, 16 * BLOCK), 1024);
    double *part = (double *)scratch(blocks * sizeof(double)), host[1024], sum = 0;
    RUN_KERNEL(sum_squares_kernel<T>, grid_of(blocks, 1), BLOCK, 0, part, x, n);
    to_host(host, part, blocks * sizeof(double));
    for (size_t b = 0; b < blocks; b++) sum += host[b];
    return sum;
}

// x, or load, becomes its sum over all processes of the run.
#ifdef MOE_MPI
static void all_reduce(accum *x, size_t n)
{
    NCCL(ncclAllReduce(x, x, n, ncclFloat, ncclSum, nccl, stream));
}
static void all_reduce_load(int *load, size_t n)
{
    NCCL(ncclAllReduce(load, load, n, ncclInt, ncclSum, nccl, stream));
}
#endif

// 32 bits that only depend on which number and which step.
__device__ static uint32_t random_bits(size_t i, uint32_t step)
{
    uint32_t x = (uint32_t)i * 0x9E3779B9u + step * 0xD1B54A33u;
    x = (x ^ x >> 16) * 0x85EBCA6Bu; // MurmurHash3's finaliser
    x = (x ^ x >> 13) * 0xC2B2AE35u;
    return x ^ x >> 16;
}

// x rounded up or down by chance, 16 random bits, so that it is right on average: of 8 bits the
// nearest would mostly be what was there before, and with beta2 0.999 v would never shrink.
#ifdef MOE_BF16
__device__ static moment round_moment(float x, uint32_t random)
{
    return __ushort_as_bfloat16((unsigned short)((__float_as_uint(x) + (random & 0xffff)) >> 16));
}
#else
__device__ static moment round_moment(float x, uint32_t) { return x; }
#endif

// One step of AdamW on the spans of the weights; step counts from 1, the gradient is taken times
// g_scale.
//     m = beta1 m + (1 - beta1) g,  v = beta2 v + (1 - beta2) g^2,
//     w -= lr (decay w + m / (1 - beta1^step) / (sqrt(v / (1 - beta2^step)) + eps)).
// master is what is trained, weights its copy for operations. A block a piece, 4 numbers a thread
// at once; in bfloat16 reads 12 bytes a weight, writes 8 and, rounded, 2.
typedef struct {
    float b1, b2, rate, correct2, keep, eps, scale; // keep: 1 - lr decay
    uint32_t step;
} AdamW;

__global__ void adamw_kernel(real *weights, accum *master, moment *m, moment *v, const accum *grads,
                             const Span *span, int spans, AdamW a)
{
    int low = 0, high = spans - 1; // the span that this piece belongs to
    while (low < high) {
        int middle = (low + high + 1) / 2;
        if (span[middle].first <= blockIdx.x) low = middle;
        else high = middle - 1;
    }
    Span s = span[low];
    float keep = s.decays ? a.keep : 1;
    size_t begin = (blockIdx.x - s.first) * SPAN_PIECE, end = begin + SPAN_PIECE;
    if (end > s.size) end = s.size;
    for (size_t i = begin + threadIdx.x * 4; i < end; i += BLOCK * 4) {
        size_t at = s.offset + i; // tensors are padded to 16 numbers, of zeros
        Pack<float, 4> g4 = load<4>(grads + at), w4 = load<4>(master + at);
        Pack<moment, 4> m4 = load<4>(m + at), v4 = load<4>(v + at);
        Pack<real, 4> rounded;
        for (int j = 0; j < 4; j++) {
            if (i + j >= end) g4.x[j] = w4.x[j] = 0, m4.x[j] = v4.x[j] = (moment)0.0f;
            float g = g4.x[j] * a.scale;
            float mean = a.b1 * (float)m4.x[j] + (1 - a.b1) * g;
            float square = a.b2 * (float)v4.x[j] + (1 - a.b2) * g * g;
            uint32_t random = random_bits(at + j, a.step);
            w4.x[j] = keep * w4.x[j] - a.rate * mean / (sqrtf(square) * a.correct2 + a.eps);
            m4.x[j] = round_moment(mean, random);
            v4.x[j] = round_moment(square, random >> 16);
            rounded.x[j] = (real)w4.x[j];
        }
        store<4>(m + at, m4);
        store<4>(v + at, v4);
        store<4>(master + at, w4);
        if (sizeof(real) == sizeof(accum)) continue;
        if (s.decays) store<4>(weights + at, rounded);
        else store<4>((accum *)(weights + s.offset) + i, w4); // of a norm: never rounded
    }
}

static void adamw_step(real *weights, accum *master, moment *m, moment *v, const accum *grads,
                       const Span *span, size_t spans, size_t pieces, long step, double lr,
                       double beta1, double beta2, double eps, double decay, double g_scale)
{
    size_t copy = sizeof(real) < sizeof(accum) ? sizeof(real) : 0;
    METER(__func__, 0, (double)pieces * SPAN_PIECE *
          (double)(3 * sizeof(accum) + 4 * sizeof(moment) + copy));
    AdamW a = {(float)beta1, (float)beta2, (float)(lr / (1 - pow(beta1, (double)step))),
               (float)(1 / sqrt(1 - pow(beta2, (double)step))), (float)(1 - lr * decay),
               (float)eps, (float)g_scale, (uint32_t)step};
    RUN_KERNEL(adamw_kernel, grid_of(pieces, 1), BLOCK, 0, weights, master, m, v, grads, span,
               (int)spans, a);
}

// The router's bias moves towards balance: b_i += speed sign(mean load - load_i) ([V3] 2.1.2).
// Clears the load. One block.
__global__ void router_bias_kernel(accum *bias, int *load, int E, float speed)
{
    SHARED(long long, sums, [BLOCK]);
    long long total = 0; // E load_i is compared with the total: in integers nothing is rounded
    for (int e = (int)threadIdx.x; e < E; e += BLOCK) total += load[e];
    sums[threadIdx.x] = total;
    __syncthreads();
    total = 0;
    for (int i = 0; i < BLOCK; i++) total += sums[i];
    for (int e = (int)threadIdx.x; e < E; e += BLOCK) {
        long long times_E = (long long)load[e] * E;
        bias[e] += times_E < total ? speed : times_E > total ? -speed : 0;
        load[e] = 0;
    }
}

static void router_bias_step(accum *bias, // [E]
                             int *load,   // [E] tokens each expert got in this step
                             size_t E, double speed)
{
    RUN_KERNEL(router_bias_kernel, 1, BLOCK, 0, bias, load, (int)E, (float)speed);
}

// load_e += offsets[e+1] - offsets[e].
__global__ void count_load_kernel(int *load, const int *offsets, size_t E)
{
    size_t e = (size_t)blockIdx.x * BLOCK + threadIdx.x;
    if (e < E) load[e] += offsets[e + 1] - offsets[e];
}

static void count_load(int *load, const int *offsets, size_t E)
{
    RUN_KERNEL(count_load_kernel, grid_of(E, BLOCK), BLOCK, 0, load, offsets, E);
}

// Where matrices of one size begin.
typedef struct {
    size_t at[256];
} Places;

// M = mu M + G,  X = G + mu M, and |X|^2 in shares. Blocks [SHARES, matrices], of n numbers each; X
// of the next stands n on. In bfloat16 reads 6 bytes a number, writes 4.
enum { SHARES = 16 };

__global__ void muon_momentum_kernel(real *X, moment *M, const accum *G, float *square,
                                     Places place, size_t n, float mu, float scale, uint32_t step)
{
    size_t at = place.at[blockIdx.y], end = n * (blockIdx.x + 1) / SHARES;
    float sum = 0;
    for (size_t i = n * blockIdx.x / SHARES + threadIdx.x; i < end; i += BLOCK) {
        float g = scale * G[at + i], momentum = mu * (float)M[at + i] + g, x = g + mu * momentum;
        M[at + i] = round_moment(momentum, random_bits(at + i, step));
        X[blockIdx.y * n + i] = (real)x;
        sum += x * x;
    }
    sum = block_reduce<false>(sum);
    if (threadIdx.x == 0) square[blockIdx.y * SHARES + blockIdx.x] = sum;
}

// X <- X / |X|. Blocks [pieces, matrices].
__global__ void muon_shrink_kernel(real *X, const float *square, size_t n)
{
    size_t i = (size_t)blockIdx.x * BLOCK + threadIdx.x;
    float sum = 0;
    for (int k = 0; k < SHARES; k++) sum += square[blockIdx.y * SHARES + k];
    if (i < n) X[blockIdx.y * n + i] = (real)((float)X[blockIdx.y * n + i] / (sqrtf(sum) + 1e-30f));
}

// to <- a x + b to
__global__ void blend_kernel(real *to, const real *x, float a, float b, size_t n)
{
    size_t i = (size_t)blockIdx.x * BLOCK + threadIdx.x;
    if (i < n) to[i] = (real)(a * (float)x[i] + b * (float)to[i]);
}

// Makes X [m, n], of norm <= 1, nearly orthogonal, `count` times: five steps of
//     A = X X^T,  X <- a X + (b A + c A^2) X,
// which take every singular value close to 1 ([Muon]); where m > n, A = X^T X and the factor stands
// on the right.
static void newton_schulz(real *X,           // [count, m, n]
                          real *Y,           // [count, m, n] workspace
                          real *A, real *A2, // [count, k, k] workspace, k = min(m, n)
                          size_t count, size_t m, size_t n)
{
    const float a = 3.4445f, b = -4.7750f, c = 2.0315f;
    size_t k = min_size(m, n), mn = m * n, kk = k * k;
    int tall = m > n;
    for (int step = 0; step < 5; step++) {
        gemm(A, k, X, tall, n, X, !tall, n, k, k, tall ? m : n, 0, count, kk, mn, mn);
        gemm(A2, k, A, 0, k, A, 1, k, k, k, k, 0, count, kk, kk, kk);
        RUN_KERNEL(blend_kernel, grid_of(count * kk, BLOCK), BLOCK, 0, A2, A, b, c, count * kk);
        if (tall) gemm(Y, n, X, 0, n, A2, 0, k, m, n, k, 0, count, mn, mn, kk);
        else gemm(Y, n, A2, 0, k, X, 0, n, m, n, k, 0, count, mn, kk, mn);
        RUN_KERNEL(blend_kernel, grid_of(count * mn, BLOCK), BLOCK, 0, X, Y, 1, a, count * mn);
    }
}

__global__ void muon_update_kernel(real *weights, accum *master, const real *X, Places place,
                                   size_t n, float rate, float keep)
{
    size_t i = (size_t)blockIdx.x * BLOCK + threadIdx.x, at = place.at[blockIdx.y] + i;
    if (i >= n) return;
    master[at] = keep * master[at] - rate * (float)X[blockIdx.y * n + i];
    if (sizeof(real) < sizeof(accum)) weights[at] = (real)master[at];
}

// One step of Muon on each matrix W; the gradient is taken times g_scale.
//     M = mu M + G,  X = orthogonal(G + mu M),  W -= lr (decay W + 0.2 sqrt(max(rows, cols)) X).
// The factor gives steps the size that AdamW's have, so that one lr does for both (Moonlight, 2.2).
// Matrices of one size, which stand together in the list, are taken together.
static void muon_step(real *weights, accum *master, moment *momentum, const accum *grads,
                      const Matrix *matrix, size_t matrices, long step, double lr, double mu,
                      double decay, double g_scale)
{
    METER(__func__, 0, 0);
    enum { TOGETHER = 1 << 26 }; // numbers of X
    Places place = {};
    for (size_t i = 0, count; i < matrices; i += count) {
        size_t m = matrix[i].rows, n = matrix[i].cols, mn = m * n, k = min_size(m, n);
        size_t most = min_size(sizeof place.at / sizeof *place.at, 1 + TOGETHER / mn);
        for (count = 0; count < most && i + count < matrices; count++) {
            Matrix it = matrix[i + count];
            if (it.rows != m || it.cols != n) break;
            place.at[count] = it.offset;
        }
        float *square = (float *)scratch(count * (SHARES * sizeof(float) +
                                                  2 * (mn + k * k) * sizeof(real)));
        real *X = (real *)(square + count * SHARES), *Y = X + count * mn;
        real *A = Y + count * mn, *A2 = A + count * k * k;
        dim3 shares(SHARES, (unsigned)count), pieces(grid_of(mn, BLOCK), (unsigned)count);
        RUN_KERNEL(muon_momentum_kernel, shares, BLOCK, 0, X, momentum, grads, square, place, mn,
                   (float)mu, (float)g_scale, (uint32_t)step);
        RUN_KERNEL(muon_shrink_kernel, pieces, BLOCK, 0, X, square, mn);
        newton_schulz(X, Y, A, A2, count, m, n);
        RUN_KERNEL(muon_update_kernel, pieces, BLOCK, 0, weights, master, X, place, mn,
                   (float)(lr * 0.2 * sqrt((double)(m > n ? m : n))), (float)(1 - lr * decay));
    }
}

// Numbers from -1 to 1: with zeros a GPU needs less power, and so runs faster than it does at work.
__global__ static void fill_kernel(real *x, size_t n)
{
    size_t i = (size_t)blockIdx.x * BLOCK + threadIdx.x;
    if (i < n) x[i] = (real)((float)((uint32_t)i * 2654435761u >> 8) / (float)(1 << 23) - 1);
}

// What cuBLAS makes of a large product, in FLOP/s: the peak that a program can have.
static double measure_flops(int threads)
{
#ifdef __CUDACC__
    const size_t n = 8192;
#else
    const size_t n = 256;
#endif
    real *x = (real *)device_alloc(3 * n * n * sizeof(real));
    double best = INFINITY;
    RUN_KERNEL(fill_kernel, grid_of(3 * n * n, BLOCK), BLOCK, 0, x, 3 * n * n);
    (void)threads;
    for (int run = 0; run < 5; run++) {
        double start = now();
        gemm(x, n, x + n * n, 0, n, x + 2 * n * n, 1, n, n, n, n, 0);
        device_finish();
        if (run > 0) best = fmin(best, now() - start);
    }
    device_free(x);
    return 2.0 * (double)n * (double)n * (double)n / best;
}

__global__ static void read_kernel(float *sum, const float4 *x, size_t n)
{
    float s = 0;
    size_t step = (size_t)gridDim.x * BLOCK;
    for (size_t i = (size_t)blockIdx.x * BLOCK + threadIdx.x; i < n; i += step)
        s += x[i].x + x[i].y + x[i].z + x[i].w;
    if (s != 0) *sum = s; // it is 0: only the reading is wanted
}

// Reads a buffer again and again: bytes/s, at best. The host waits after some readings only, as
// that takes it longer than a small one the GPU.
static double measure_read(size_t bytes, int threads)
{
    enum { READINGS = 8 };
    size_t n = ceil_div(bytes, sizeof(float4));
    float4 *x = (float4 *)device_alloc((n + 1) * sizeof(float4));
    double best = INFINITY;
    device_zero(x, (n + 1) * sizeof(float4));
    (void)threads;
    for (int pass = 0; pass < 5; pass++) {
        double start = now();
        for (int i = 0; i < READINGS; i++)
            RUN_KERNEL(read_kernel, grid_of(min_size(n, 1 << 20), BLOCK), BLOCK, 0,
                       (float *)(x + n), x, n);
        device_finish();
        best = fmin(best, (now() - start) / READINGS);
    }
    device_free(x);
    return (double)n * sizeof(float4) / best;
}

#endif // MOE_CUDA
