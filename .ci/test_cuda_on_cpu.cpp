/*
test_cuda_on_cpu.cpp: what cuda_on_cpu.h promises. What CUDA does is done; and of each kind of bug
it says it catches, one is planted and must be caught, in one line and with exit status 1.

    g++ -std=c++17 -O2 -Wall -Wextra -I.ci .ci/test_cuda_on_cpu.cpp -o test_cuda_on_cpu
*/
#include "cuda_on_cpu.h"
#include <sys/wait.h>

static int passed, failed;

static void check(bool good, const char *what)
{
    good ? passed++ : failed++;
    if (!good) printf("FAILED: %s\n", what);
}

// Runs f in a child, which must end with status 1 and one line on stderr that holds all of `words`.
template <class F> void caught(const char *what, std::vector<const char *> words, F f)
{
    int pipes[2], status = 0;
    char text[4096];
    size_t n = 0;
    fflush(stdout);
    if (pipe(pipes)) abort();
    pid_t child = fork();
    if (!child) {
        dup2(pipes[1], 2);
        close(pipes[0]), close(pipes[1]);
        f();
        _exit(0);
    }
    close(pipes[1]);
    for (ssize_t r; (r = read(pipes[0], text + n, sizeof text - 1 - n)) > 0;) n += (size_t)r;
    close(pipes[0]);
    text[n] = 0;
    waitpid(child, &status, 0);
    const char *line = strstr(text, "cuda_on_cpu: ");
#ifndef __SANITIZE_ADDRESS__ // which has something to say before
    line = text;
#endif
    bool good = WIFEXITED(status) && WEXITSTATUS(status) == 1 && n && line &&
                strchr(line, '\n') == text + n - 1;
    for (const char *w : words) good = good && strstr(text, w);
    check(good, what);
    if (!good)
        printf("  status 0x%x, said: %s%s", (unsigned)status, text,
               n && text[n - 1] == '\n' ? "" : "\n");
    if (good && getenv("VERBOSE")) printf("%-44s %s", what, text);
}

// Memory on the device and back.
template <class T> T *device(const std::vector<T> &v)
{
    T *p;
    cudaMalloc(&p, v.size() * sizeof(T));
    cudaMemcpy(p, v.data(), v.size() * sizeof(T), cudaMemcpyHostToDevice);
    return p;
}
template <class T> T *device_new(size_t n) { T *p; cudaMalloc(&p, n * sizeof(T)); return p; }
template <class T> std::vector<T> host(const T *p, size_t n)
{
    std::vector<T> v(n);
    cudaMemcpy(v.data(), p, n * sizeof(T), cudaMemcpyDeviceToHost);
    return v;
}
static float uniform() // -1..1
{
    static uint32_t x = 1;
    x = x * 1664525 + 1013904223;
    return (float)(x >> 8) / (1 << 23) - 1;
}
static std::vector<float> random_floats(size_t n)
{
    std::vector<float> v(n);
    for (float &x : v) x = uniform();
    return v;
}

// ------------------------------------------------------------------------ what CUDA does is done

static __global__ void where_am_i(int *out)
{
    int block = (int)((blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x);
    int thread = (int)((threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x);
    int threads = (int)(blockDim.x * blockDim.y * blockDim.z);
    __syncthreads(); // and they are the same after it
    out[block * threads + thread] =
        (int)(threadIdx.x + 10 * threadIdx.y + 100 * threadIdx.z + 1000 * blockIdx.x +
              10000 * blockIdx.y + 100000 * blockIdx.z);
}

static void test_indices()
{
    int *p = device_new<int>(2 * 3 * 4 * 5 * 6 * 7);
    LAUNCH(where_am_i, dim3(2, 3, 4), dim3(5, 6, 7), 0, p);
    std::vector<int> v = host(p, 2 * 3 * 4 * 5 * 6 * 7);
    bool good = true;
    for (int i = 0; i < (int)v.size(); i++) {
        int t = i % 210, b = i / 210;
        good &= v[i] == t % 5 + t / 5 % 6 * 10 + t / 30 * 100 + b % 2 * 1000 + b / 2 % 3 * 10000 +
                            b / 6 * 100000;
    }
    check(good, "indices of a grid and a block of three dimensions");
}

static __global__ void shuffles(int *out, int width, int by)
{
    int lane = (int)threadIdx.x, v = 100 + lane;
    out[lane] = __shfl_sync(~0u, v, by, width);
    out[32 + lane] = __shfl_up_sync(~0u, v, (unsigned)by, width);
    out[64 + lane] = __shfl_down_sync(~0u, v, (unsigned)by, width);
    out[96 + lane] = __shfl_xor_sync(~0u, v, by, width);
}

static void test_shuffles()
{
    bool good = true;
    int *p = device_new<int>(128);
    for (int width = 1; width <= 32; width *= 2)
        for (int by = 0; by < 32; by++) {
            LAUNCH(shuffles, 1, 32, 0, p, width, by);
            std::vector<int> v = host(p, 128);
            for (int l = 0; l < 32; l++) {
                int begin = l / width * width, end = begin + width;
                good &= v[l] == 100 + begin + by % width;
                good &= v[32 + l] == 100 + (l - by >= begin ? l - by : l);
                good &= v[64 + l] == 100 + (l + by < end ? l + by : l);
                good &= v[96 + l] == 100 + ((l ^ by) < end ? l ^ by : l);
            }
        }
    check(good, "shuffles of every width and distance");
}

struct Votes {
    unsigned ballot, half, width8;
    int any, none, all, mixed, any_block, all_block, count;
    double moved;
};

static __global__ void votes(Votes *out)
{
    unsigned t = threadIdx.x, lane = t % 32;
    Votes &v = out[t];
    v.ballot = __ballot_sync(~0u, lane % 3 == 0);
    unsigned half = lane < 16 ? 0xffffu : 0xffff0000u; // two groups of one warp, at one line
    v.half = __ballot_sync(half, 1);
    if (lane < 16) v.width8 = (unsigned)__shfl_sync(0xffff, (int)t, 3, 8);
    else v.width8 = 0;
    v.any = __any_sync(~0u, t == 40);
    v.none = __any_sync(~0u, 0);
    v.all = __all_sync(~0u, 1);
    v.mixed = __all_sync(~0u, lane != 5);
    v.any_block = __syncthreads_or(t == 40);
    v.all_block = __syncthreads_and(t != 40);
    v.count = __syncthreads_count(t % 5 == 0);
    v.moved = __shfl_down_sync(~0u, t + 0.5, 1);
    __syncwarp();
}

static void test_votes()
{
    Votes *p = device_new<Votes>(64);
    LAUNCH(votes, 1, 64, 0, p);
    std::vector<Votes> v = host(p, 64);
    bool good = true;
    for (unsigned t = 0; t < 64; t++) {
        unsigned lane = t % 32;
        good &= v[t].ballot == 0x49249249 && v[t].half == (lane < 16 ? 0xffffu : 0xffff0000u);
        good &=
            v[t].width8 == (lane < 16 ? t / 8 * 8 + 3 : 0) && v[t].any == (t >= 32) && !v[t].none;
        good &=
            v[t].all == 1 && !v[t].mixed && v[t].any_block && !v[t].all_block && v[t].count == 13;
        good &= v[t].moved == (lane == 31 ? t : t + 1) + 0.5;
    }
    check(good, "votes of lanes and of a block");
}

static __global__ void atomics(unsigned *u, int *i, float *f, unsigned long long *l)
{
    atomicAdd(u, 2u), atomicMax(u + 1, threadIdx.x), atomicOr(u + 2, 1u << threadIdx.x % 32),
        atomicInc(u + 3, 9);
    atomicAdd(i, -1), atomicMin(i + 1, -(int)threadIdx.x), atomicSub(i + 2, 3), atomicAdd(f, 0.5f),
        atomicAdd(l, 1ull << 32);
    for (int old = atomicAdd(i + 3, 0), seen; ; old = seen) // max by compare and swap
        if ((seen = atomicCAS(i + 3, old, max(old, (int)threadIdx.x))) == old) break;
}

static void test_atomics()
{
    unsigned *u = device(std::vector<unsigned>(4));
    int *i = device(std::vector<int>(4));
    float *f = device(std::vector<float>(1));
    unsigned long long *l = device(std::vector<unsigned long long>(1));
    LAUNCH(atomics, 3, 100, 0, u, i, f, l);
    check(host(u, 4) == std::vector<unsigned>({600, 99, ~0u, 0}) &&
              host(i, 4) == std::vector<int>({-300, -99, -900, 99}) && host(f, 1)[0] == 150 &&
              host(l, 1)[0] == 300ull << 32,
          "atomics");
}

// out[block] = sum of x, by shuffles, shared memory and a barrier.
static __global__ void block_sum(float *out, const float *x, int n)
{
    SHARED(float, part, [32]);
    float s = 0;
    for (int i = (int)threadIdx.x; i < n; i += (int)blockDim.x) s += x[i];
    for (int o = 16; o; o /= 2) s += __shfl_xor_sync(~0u, s, o);
    if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = s;
    __syncthreads();
    if (threadIdx.x >= 32) return;
    s = threadIdx.x < blockDim.x / 32 ? part[threadIdx.x] : 0;
    for (int o = 16; o; o /= 2) s += __shfl_xor_sync(~0u, s, o);
    if (!threadIdx.x) out[blockIdx.x] = s;
}

static __global__ void add_all(float *sum, const float *x, int n)
{
    for (int i = (int)(blockIdx.x * blockDim.x + threadIdx.x); i < n;
         i += (int)(gridDim.x * blockDim.x))
        atomicAdd(sum, x[i]);
}

static void test_orders()
{
    const char *orders[] = {"forward", "reverse", "shuffle:1", "shuffle:2", "agree"};
    std::vector<float> x = random_floats(777);
    float *d = device(x), *out = device_new<float>(5);
    double sum = 0;
    for (float v : x) sum += v;
    bool same = true, close = true;
    std::vector<float> first;
    for (const char *o : orders) {
        float *total = device(std::vector<float>(1));
        emu_order(o);
        LAUNCH(block_sum, 5, 256, 0, out, d, 777);
        LAUNCH(add_all, 3, 64, 0, total, d, 777);
        std::vector<float> now = host(out, 5);
        if (first.empty()) first = now;
        same &= now == first && fabs(now[4] - sum) < 1e-4;
        close &= fabs(host(total, 1)[0] - sum) < 1e-4;
        cudaFree(total);
    }
    emu_order("forward");
    check(same, "a reduction gives the same bits in every order");
    check(close, "float atomics agree in every order but for rounding");
}

// C[16][8] = A[16][K] B[8][K]^T by one warp: tiles to shared memory two ahead, ldmatrix, mma.
template <int K> __global__ void warp_gemm(float *c, const __nv_bfloat16 *a, const __nv_bfloat16 *b)
{
    DYNAMIC_SHARED(__nv_bfloat16, tile); // [2][24][16]: 16 rows of A, 8 of B
    int lane = (int)threadIdx.x;
    float d[4] = {0, 0, 0, 0};
    auto fetch = [&](int step) {
        if (step < K / 16)
            for (int i = lane; i < 48; i += 32) {
                const __nv_bfloat16 *from = i < 32 ? a + i / 2 * K : b + (i - 32) / 2 * K;
                cp_async_16(tile + step % 2 * 384 + i * 8, from + step * 16 + i % 2 * 8, true);
            }
        cp_async_commit();
    };
    fetch(0);
    for (int step = 0; step < K / 16; step++) {
        fetch(step + 1);
        cp_async_wait<1>();
        __syncwarp();
        unsigned x[4], y[2];
        const __nv_bfloat16 *t = tile + step % 2 * 384;
        ldmatrix_x4(x, t + lane % 16 * 16 + lane / 16 * 8);
        ldmatrix_x2(y, t + 256 + lane % 8 * 16 + lane / 8 % 2 * 8);
        mma_16x8x16(d, x, y);
        __syncwarp();
    }
    for (int i = 0; i < 4; i++) c[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = d[i];
}

static __global__ void mma_by_layout(float *c, const __nv_bfloat16 *a,
                                     const __nv_bfloat16 *b) // A[16][16] B[16][8]
{
    int lane = (int)threadIdx.x, group = lane >> 2,
        in_group = lane % 4; // the words of PTX: 9.7.14.5.8
    unsigned x[4] = {0, 0, 0, 0}, y[2] = {0, 0};
    for (int i = 0; i < 8; i++) {
        int row = i < 2 || (i >= 4 && i < 6) ? group : group + 8;
        int column = i < 4 ? in_group * 2 + (i & 1) : in_group * 2 + (i & 1) + 8;
        x[i / 2] |= (unsigned)__bfloat16_as_ushort(a[row * 16 + column]) << i % 2 * 16;
    }
    for (int i = 0; i < 4; i++) {
        int row = i < 2 ? in_group * 2 + (i & 1) : in_group * 2 + (i & 1) + 8;
        y[i / 2] |= (unsigned)__bfloat16_as_ushort(b[row * 8 + group]) << i % 2 * 16;
    }
    float d[4];
    for (int i = 0; i < 4; i++) d[i] = c[(i < 2 ? group : group + 8) * 8 + in_group * 2 + (i & 1)];
    mma_16x8x16(d, x, y);
    for (int i = 0; i < 4; i++) c[(i < 2 ? group : group + 8) * 8 + in_group * 2 + (i & 1)] = d[i];
}

static __global__ void ldmatrix_all(unsigned *out,
                                    const __nv_bfloat16 *m) // m[32][8]: four matrices
{
    SHARED(__nv_bfloat16, s, [32][8]);
    int lane = (int)threadIdx.x;
    for (int i = 0; i < 8; i++) s[lane][i] = m[lane * 8 + i];
    __syncwarp();
    unsigned r[12];
    ldmatrix_x4(r, s[lane]);
    ldmatrix_x4_trans(r + 4, s[lane]);
    ldmatrix_x2(r + 8, s[lane % 16]);
    ldmatrix_x2_trans(r + 10, s[lane % 16]);
    for (int i = 0; i < 12; i++) out[lane * 12 + i] = r[i];
}

static void test_tensor_cores()
{
    std::vector<__nv_bfloat16> a(16 * 64), b(8 * 64);
    for (auto &v : a) v = uniform();
    for (auto &v : b) v = uniform();
    float *c = device(std::vector<float>(128, 1.0f));
    __nv_bfloat16 *da = device(a), *db = device(b);
    LAUNCH(mma_by_layout, 1, 32, 0, c, da, db);
    std::vector<float> v = host(c, 128);
    double worst = 0;
    for (int i = 0; i < 16; i++)
        for (int j = 0; j < 8; j++) {
            double s = 1;
            for (int k = 0; k < 16; k++) s += (double)a[i * 16 + k] * (double)b[k * 8 + j];
            worst = fmax(worst, fabs(s - v[i * 8 + j]));
        }
    check(worst < 1e-5, "mma with the registers as PTX lays them out");

    for (const char *order : {"forward", "reverse", "agree"}) {
        emu_order(order);
        LAUNCH(warp_gemm<64>, 1, 32, 2 * 384 * 2, c, da, db);
        v = host(c, 128), worst = 0;
        for (int i = 0; i < 16; i++)
            for (int j = 0; j < 8; j++) {
                double s = 0;
                for (int k = 0; k < 64; k++) s += (double)a[i * 64 + k] * (double)b[j * 64 + k];
                worst = fmax(worst, fabs(s - v[i * 8 + j]));
            }
        check(worst < 1e-5, "cp.async two deep, ldmatrix, mma");
    }
    emu_order("forward");

    std::vector<__nv_bfloat16> m(256);
    for (unsigned short i = 0; i < 256; i++) m[i] = __ushort_as_bfloat16(i);
    unsigned *out = device_new<unsigned>(32 * 12);
    LAUNCH(ldmatrix_all, 1, 32, 0, out, device(m));
    std::vector<unsigned> r = host(out, 32 * 12);
    bool good = true;
    for (unsigned l = 0; l < 32; l++)
        for (unsigned i = 0; i < 4; i++) {
            unsigned row = 64 * i + l / 4 * 8 + 2 * (l % 4),
                     column = 64 * i + 2 * (l % 4) * 8 + l / 4;
            good &= r[l * 12 + i] == (row | (row + 1) << 16) &&
                    r[l * 12 + 4 + i] == (column | (column + 8) << 16);
            if (i < 2)
                good &=
                    r[l * 12 + 8 + i] == r[l * 12 + i] && r[l * 12 + 10 + i] == r[l * 12 + 4 + i];
        }
    check(good, "ldmatrix of 2 and 4 matrices, straight and transposed");
}

// Where (row, column) of a block of 64 columns stands: 16 bytes at place i of a row at i ^ row % 8.
static int place(int row, int column)
{
    return row * 64 + ((column / 8) ^ (row & 7)) * 8 + column % 8;
}

// C[64][8 N] = A[64][64] B[64][8 N] by each of two warpgroups.
template <bool A_T, bool B_T, int N>
__global__ void multiply(float *c, const __nv_bfloat16 *a, const __nv_bfloat16 *b, bool registers)
{
    DYNAMIC_SHARED(__nv_bfloat16, as);
    __nv_bfloat16 *bs = as + 64 * 64;
    int t = (int)threadIdx.x, row = t / 32 % 4 * 16 + t % 32 / 4, column = t % 4 * 2;
    for (int i = t; i < 64 * 64; i += 256)
        as[A_T ? place(i % 64, i / 64) : place(i / 64, i % 64)] = a[i];
    for (int i = t; i < 64 * 8 * N; i += 256) {
        int k = i / (8 * N), n = i % (8 * N);
        bs[B_T ? n / 64 * 4096 + place(k, n % 64) : place(n, k)] = b[i];
    }
    wgmma_see_shared();
    __syncthreads();
    float d[N][4];
    for (int j = 0; j < N; j++) // without registers the first product sets what stands there
        for (int e = 0; e < 4; e++) d[j][e] = registers ? 0 : NAN;
    wgmma_fence(d);
    for (int k = 0; k < 64; k += 16) {
        const __nv_bfloat16 *from = bs + (B_T ? k * 64 : k);
        if (registers) {
            unsigned x[4] = {0, 0, 0, 0};
            for (int i = 0; i < 8; i++)
                x[i / 2] |= (unsigned)__bfloat16_as_ushort(
                                a[(row + i / 2 % 2 * 8) * 64 + k + column + i % 2 + i / 4 * 8])
                            << i % 2 * 16;
            wgmma<B_T>(d, x, from, 8192);
        } else if (k) wgmma<A_T, B_T>(d, as + (A_T ? k * 64 : k), from, 8192);
        else wgmma<A_T, B_T, false>(d, as, from, 8192);
        if (k % 32) wgmma_commit();
        if (k == 48) wgmma_wait<1>(d);
    }
    wgmma_wait<0>(d);
    for (int j = 0; j < N; j++)
        for (int e = 0; e < 4; e++)
            c[((t / 128 * 64 + row + e / 2 * 8) * N + j) * 8 + column + e % 2] = d[j][e];
}

template <bool A_T, bool B_T, int N> double multiply_error(bool registers)
{
    std::vector<__nv_bfloat16> a(64 * 64), b(64 * 8 * N);
    for (auto &v : a) v = uniform();
    for (auto &v : b) v = uniform();
    float *c = device_new<float>(2 * 64 * 8 * N);
    LAUNCH((multiply<A_T, B_T, N>), 1, 256, 8192 + (N + 7) / 8 * 8192, c, device(a), device(b),
           registers);
    std::vector<float> v = host(c, 2 * 64 * 8 * N);
    double worst = 0;
    for (int i = 0; i < 2 * 64 * 8 * N; i++) {
        double s = 0;
        for (int k = 0; k < 64; k++)
            s += (double)a[i / (8 * N) % 64 * 64 + k] * (double)b[k * 8 * N + i % (8 * N)];
        double error = fabs(s - v[i]);
        worst = error <= worst ? worst : error; // a NaN is worst
    }
    return worst;
}

template <int N> double multiply_errors()
{
    return multiply_error<false, false, N>(false) + multiply_error<false, true, N>(false) +
           multiply_error<true, false, N>(false) + multiply_error<true, true, N>(false) +
           multiply_error<false, false, N>(true) + multiply_error<false, true, N>(true);
}

static __global__ void boxes(__nv_bfloat16 *out, const __grid_constant__ TensorMap map,
                             const int2 *at, int n) // those at (x, y), one after the other
{
    DYNAMIC_SHARED(__nv_bfloat16, box);
    SHARED(uint64_t, full);
    if (!threadIdx.x) mbarrier_init(&full, 1), mbarrier_init_done();
    __syncthreads();
    for (int i = 0; i < n; i++) {
        if (!threadIdx.x) {
            mbarrier_expect(&full, 128 * map.box_rows);
            tma_load(box, &map, at[i].x, at[i].y, &full);
        }
        mbarrier_wait(&full, i % 2);
        for (int j = (int)threadIdx.x; j < map.box_rows * 64; j += (int)blockDim.x)
            out[i * map.box_rows * 64 + j] = box[place(j / 64, j % 64)];
        __syncthreads();
    }
}

enum { NO_BUG, NO_INIT, NO_DONE, NO_FULL, NO_EMPTY, NO_FENCE, NO_WAIT }; // what is not there, or
enum { EARLY = 10, MISPLACED, TWICE, SHORT };

// C[64][64] = A[64][K] B[64][K]^T by each block: a warp loads, three stages ahead; four multiply.
template <int BUG>
__global__ void pipeline(float *c, const __grid_constant__ TensorMap a,
                         const __grid_constant__ TensorMap b, int K)
{
    DYNAMIC_SHARED(__nv_bfloat16, tiles); // [3][2][64][64]
    SHARED(uint64_t, full, [3]);
    SHARED(uint64_t, empty, [3]);
    int t = (int)threadIdx.x, steps = (K + 63) / 64;
    if (t == 0 && BUG != NO_INIT) {
        for (int i = 0; i < 3; i++) mbarrier_init(&full[i], 1), mbarrier_init(&empty[i], 4);
        if (BUG != NO_DONE) mbarrier_init_done();
    }
    __syncthreads();
    if (t >= 128) {
        for (int step = 0; t == 128 && step < steps; step++) {
            int s = step % 3;
            mbarrier_wait(&empty[s], 1 - step / 3 % 2);
            mbarrier_expect(&full[s], BUG == SHORT ? 16000 : 16384);
            if (BUG == TWICE) mbarrier_arrive(&full[s]);
            tma_load(tiles + s * 8192 + (BUG == MISPLACED) * 256, &a, step * 64, 0, &full[s]);
            tma_load(tiles + s * 8192 + 4096, &b, step * 64, 0, &full[s]);
        }
        return;
    }
    float d[8][4] = {};
    for (int step = 0; step < steps; step++) {
        int s = step % 3;
        if (BUG != NO_FULL) mbarrier_wait(&full[s], step / 3 % 2);
        if (BUG != NO_FENCE) wgmma_fence(d);
        for (int k = 0; k < 64; k += 16)
            wgmma<false, false>(d, tiles + s * 8192 + k, tiles + s * 8192 + 4096 + k, 0);
        wgmma_commit();
        if (BUG == EARLY && t % 32 == 0) mbarrier_arrive(&empty[s]);
        if (BUG != NO_WAIT) wgmma_wait<1>(d); // so the step before is done
        if (BUG != EARLY && BUG != NO_EMPTY && step && t % 32 == 0)
            mbarrier_arrive(&empty[(step + 2) % 3]);
    }
    if (BUG != NO_WAIT) wgmma_wait<0>(d);
    for (int j = 0; j < 8; j++)
        for (int e = 0; e < 4; e++)
            c[((int)blockIdx.x * 64 + t / 32 * 16 + t % 32 / 4 + e / 2 * 8) * 64 + j * 8 +
              t % 4 * 2 + e % 2] = d[j][e];
}

struct Pipeline { // what it needs
    static const int K = 600, LD = 608, SHARED_BYTES = 3 * 16384;
    std::vector<__nv_bfloat16> a, b;
    TensorMap ma, mb;
    float *c = device_new<float>(2 * 64 * 64);
    Pipeline() : a(64 * LD), b(64 * LD)
    {
        for (auto &v : a) v = uniform();
        for (auto &v : b) v = uniform();
        ma = tensor_map(device(a), 64, K, LD, 64), mb = tensor_map(device(b), 64, K, LD, 64);
    }
    template <int BUG> void run(int k = K)
    {
        LAUNCH(pipeline<BUG>, 2, 160, SHARED_BYTES, c, ma, mb, k);
    }
};

static void test_hopper()
{
    const char *orders[] = {"forward", "reverse", "shuffle:1", "agree"};
    std::vector<__nv_bfloat16> x(70 * 104);
    for (auto &v : x) v = uniform();
    std::vector<int2> at; // over every edge, and beyond
    for (int row : {-41, -40, -39, -3, 0, 13, 30, 31, 69, 70, 200})
        for (int column : {-65, -64, -63, -5, 0, 16, 36, 37, 99, 100, 300})
            at.push_back({column, row});
    __nv_bfloat16 *out = device_new<__nv_bfloat16>(at.size() * 40 * 64);
    TensorMap map = tensor_map(device(x), 70, 100, 104, 40);
    Pipeline p;
    for (const char *order : orders) {
        emu_order(order);
        double worst =
            multiply_errors<4>() + multiply_errors<8>() + multiply_errors<16>() +
            (order == orders[0] ? multiply_errors<24>() : multiply_error<true, true, 24>(false));
        check(worst < 1e-4, "wgmma, straight and transposed, of registers, of 32 to 192 columns");

        LAUNCH(boxes, 1, 64, 40 * 128, out, map, device(at), (int)at.size());
        std::vector<__nv_bfloat16> v = host(out, at.size() * 40 * 64);
        bool good = true;
        for (int i = 0; i < (int)v.size(); i++) {
            int row = at[i / 2560].y + i / 64 % 40, column = at[i / 2560].x + i % 64;
            bool inside = row >= 0 && row < 70 && column >= 0 && column < 100;
            good &= (float)v[i] == (inside ? (float)x[row * 104 + column] : 0);
        }
        check(good, "TMA's boxes, with zeros outside of the tensor");

        p.run<NO_BUG>();
        std::vector<float> c = host(p.c, 2 * 64 * 64);
        worst = 0;
        for (int i = 0; i < 2 * 64 * 64; i++) {
            double s = 0;
            for (int k = 0; k < p.K; k++)
                s += (double)p.a[i / 64 % 64 * p.LD + k] * (double)p.b[i % 64 * p.LD + k];
            double error = fabs(s - c[i]);
            worst = error <= worst ? worst : error;
        }
        check(worst < 1e-4, "TMA, mbarriers and wgmma in three stages");
    }
    emu_order("forward");
}

static void test_bfloat16()
{
    bool back = true, ties = true;
    for (unsigned u = 0; u < 65536; u++) {
        float f = __ushort_as_bfloat16((unsigned short)u);
        back &= std::isnan(f) ? __float2bfloat16(f).__x == 0x7fff : __float2bfloat16(f).__x == u;
        if ((u & 0x7fff) >= 0x7f80) continue;
        unsigned below = u << 16 | 0x7fff, tie = u << 16 | 0x8000,
                 above = tie + 1; // of u and u + 1
        ties &= __float2bfloat16(__uint_as_float(below)).__x == u;
        ties &= __float2bfloat16(__uint_as_float(tie)).__x == (u % 2 ? u + 1 : u);
        ties &= __float2bfloat16(__uint_as_float(above)).__x == u + 1;
    }
    check(back, "all 65536 bfloat16 become floats and come back, NaN as 0x7fff");
    check(ties, "bfloat16 is rounded to nearest, ties to even, the largest to infinity");
    __nv_bfloat162 v = __floats2bfloat162_rn(1, 2);
    unsigned bits;
    memcpy(&bits, &v, 4);
    check(bits == 0x40003f80 && __low2float(v) == 1 && __high2float(v) == 2,
          "the first of a pair is the lower half");
    check((__nv_bfloat16(1) + __nv_bfloat16(0.001f)).__x == 0x3f80,
          "a sum of bfloat16 is rounded to bfloat16");
}

static void test_gemm()
{
    cublasHandle_t h;
    cublasCreate(&h);
    double worst = 0;
    int status = 0;
    for (int kind = 0; kind < 24; kind++) {
        bool ta = kind & 1, tb = kind & 2, add = kind & 4;
        cudaDataType_t in = kind < 8 ? CUDA_R_32F : CUDA_R_16BF,
                       out = kind < 16 ? CUDA_R_32F : CUDA_R_16BF;
        int m = 19, n = 7, k = 33, lda = (ta ? k : m) + 2, ldb = (tb ? n : k) + 1, ldc = m + 3,
            batch = 2;
        int as = lda * (ta ? m : k), bs = ldb * (tb ? k : n), cs = ldc * n;
        std::vector<float> a = random_floats(as * 2), b = random_floats(bs * 2),
                           c = random_floats(cs * 2);
        std::vector<__nv_bfloat16> ah(a.begin(), a.end()), bh(b.begin(), b.end()),
            ch(c.begin(), c.end());
        void *da = in ? (void *)device(ah) : device(a), *db = in ? (void *)device(bh) : device(b);
        void *dc = !out ? add ? device(c) : device_new<float>(cs * 2)
                        : add ? (void *)device(ch) : device_new<__nv_bfloat16>(cs * 2);
        float alpha = 0.5f, beta = add ? 2.0f : 0.0f; // with beta 0 C may hold NaN
        status |= cublasGemmStridedBatchedEx(h, ta ? CUBLAS_OP_T : CUBLAS_OP_N,
                                             tb ? CUBLAS_OP_T : CUBLAS_OP_N, m, n, k, &alpha, da,
                                             in, lda, as, db, in, ldb, bs, &beta, dc, out, ldc, cs,
                                             batch, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT);
        std::vector<float> v(cs * 2);
        if (!out) v = host((float *)dc, cs * 2);
        else {
            std::vector<__nv_bfloat16> t = host((__nv_bfloat16 *)dc, cs * 2);
            v.assign(t.begin(), t.end());
        }
        for (int z = 0; z < batch; z++)
            for (int j = 0; j < n; j++)
                for (int i = 0; i < m; i++) {
                    double s = 0;
                    for (int p = 0; p < k; p++) {
                        int x = z * as + (ta ? i * lda + p : p * lda + i),
                            y = z * bs + (tb ? p * ldb + j : j * ldb + p);
                        s += in ? (double)ah[x] * (double)bh[y] : (double)a[x] * b[y];
                    }
                    int at = z * cs + j * ldc + i;
                    s = alpha * s + (add ? beta * (out ? (double)ch[at] : c[at]) : 0);
                    double error = fabs(s - v[at]) / (out ? 0x1p-8 * fmax(fabs(s), 1e-3) : 1e-5);
                    worst = error <= worst ? worst : error; // a NaN is worst
                }
    }
    check(!status && worst <= 1, "cublasGemm: transposed or not, fp32 and bf16, batched, beta");
    float one = 1, zero = 0;
    check(cublasGemmEx(h, CUBLAS_OP_N, CUBLAS_OP_N, 4, 4, 4, &one, nullptr, CUDA_R_32F, 3, nullptr,
                       CUDA_R_32F, 4, &zero, nullptr, CUDA_R_32F, 4, CUBLAS_COMPUTE_32F,
                       CUBLAS_GEMM_DEFAULT) == CUBLAS_STATUS_INVALID_VALUE,
          "cublasGemmEx refuses a leading dimension that is too small");
    cublasDestroy(h);
}

static __global__ void nothing() {}
static __global__ __launch_bounds__(1024) void fill(float *x, float v, int n)
{
    int i = (int)(blockIdx.x * blockDim.x + threadIdx.x);
    if (i < n) x[i] = v;
}

static void test_runtime()
{
    LAUNCH(nothing, 1, 2048, 0);
    check(cudaPeekAtLastError() == cudaErrorInvalidConfiguration &&
              cudaGetLastError() == cudaErrorInvalidConfiguration &&
              cudaGetLastError() == cudaSuccess,
          "a block of 2048 threads is an error that is told once");
    LAUNCH(nothing, dim3(1, 65536), 1, 0);
    check(cudaGetLastError() == cudaErrorInvalidConfiguration, "a grid of 65536 rows is an error");
    LAUNCH(nothing, 1, 1, 64 << 10);
    check(cudaGetLastError() == cudaErrorInvalidValue,
          "more than 48 KiB of shared memory are an error");
    check(cudaFuncSetAttribute(nothing, cudaFuncAttributeMaxDynamicSharedMemorySize, 64 << 10) ==
                  cudaSuccess &&
              cudaFuncSetAttribute(nothing, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   228 << 10) == cudaErrorInvalidValue,
          "cudaFuncSetAttribute allows more, up to 227 KiB");
    cudaGetLastError();
    LAUNCH(nothing, 1, 1, 64 << 10);
    check(cudaGetLastError() == cudaSuccess, "64 KiB of shared memory, allowed");
    char *p;
    check(cudaMalloc(&p, (size_t)1 << 50) == cudaErrorMemoryAllocation && !p &&
              cudaGetLastError() == cudaErrorMemoryAllocation,
          "out of memory is an error");
    size_t before, after, total;
    cudaMemGetInfo(&before, &total);
    p = device_new<char>(1000000);
    cudaMemGetInfo(&after, &total);
    check(before - after == 1000000, "memory is counted");
    cudaFree(p);
    float *x = device(random_floats(30)), *y = device(std::vector<float>(30, 7.0f));
    cudaMemcpy2DAsync(y, 24, x + 1, 40, 12, 3, cudaMemcpyDeviceToDevice, nullptr);
    std::vector<float> a = host(x, 30), b = host(y, 30);
    bool good = true;
    for (int i = 0; i < 30; i++)
        good &= b[i] == (i < 18 && i % 6 < 3 ? a[1 + i / 6 * 10 + i % 6] : 7);
    check(good, "a copy of rows");
    cudaMemset(y, 0, 60);
    b = host(y, 30);
    check(b[14] == 0 && b[15] == 7, "cudaMemset");
    float *big = device_new<float>(3 << 20);
    LAUNCH(fill, (3 << 20) / 1024, 1024, 0, big, 2.0f, 3 << 20);
    b = host(big, 3 << 20);
    check(std::accumulate(b.begin(), b.end(), 0.0) == 6 << 20, "memory of many granules");
    cudaFree(big);
    cudaEvent_t e[2];
    float ms = -1;
    for (auto &v : e) cudaEventCreate(&v), cudaEventRecord(v);
    cudaEventElapsedTime(&ms, e[0], e[1]);
    for (auto &v : e) cudaEventDestroy(v);
    check(ms >= 0, "events tell the time");
    int n;
    setenv("EMU_DEVICES", "0", 1);
    check(cudaGetDeviceCount(&n) == cudaErrorNoDevice, "EMU_DEVICES=0: no device");
    setenv("EMU_DRIVER", "11080", 1);
    check(cudaGetDeviceCount(&n) == cudaErrorInsufficientDriver,
          "EMU_DRIVER=11080: a driver too old");
    unsetenv("EMU_DEVICES"), unsetenv("EMU_DRIVER"), setenv("EMU_CC", "61", 1);
    cudaDeviceProp prop;
    check(cudaGetDeviceProperties(&prop, 0) == cudaSuccess && prop.major == 6 && prop.minor == 1,
          "EMU_CC=61");
    cudaGetLastError();
}

// ---------------------------------------------------------------------------------- planted bugs

static __global__ void touch(float *x, int i, bool write) { if (write) x[i] = 1; else x[0] = x[i]; }
static __global__ void copy(float *y, const float *x, int n)
{
    int i = (int)(blockIdx.x * blockDim.x + threadIdx.x);
    if (i < n) y[i] = x[i];
}
struct Hidden { float *x; };
static __global__ void touch_hidden(Hidden h) { h.x[10] = 1; }
static __global__ void shared_touch(float *out, int i)
{
    SHARED(float, a, [33]);
    a[threadIdx.x] = 1;
    if (!threadIdx.x) a[i] = 2, *out = a[i];
}
static __global__ void dynamic_touch(float *out, int i)
{
    DYNAMIC_SHARED(float, a);
    a[i] = 1, *out = a[i];
}
static __global__ void unwritten_shared(float *out)
{
    SHARED(float, a, [4]);
    DYNAMIC_SHARED(float, b);
    out[blockIdx.x * 2] = a[1], out[blockIdx.x * 2 + 1] = b[1];
    a[1] = b[1] = 5;
}
static __global__ void too_much_shared(float *out)
{
    SHARED(float, a, [8192]);
    SHARED(float, b, [8192]);
    a[0] = b[0] = 1, *out = a[0];
}

static void test_graphs()
{
    cudaStream_t s;
    cudaGraph_t g = nullptr;
    cudaGraphExec_t e;
    cublasHandle_t h;
    float *x = device(std::vector<float>{1, 2, 3, 4}), *y = device(std::vector<float>(4, 7.0f));
    float two = 2, zero = 0, *p;
    cudaStreamCreate(&s);
    cublasCreate(&h);
    cublasSetStream(h, s);
    auto gemm = [&] { // y = 2 x x, of 2 x 2 numbers
        return cublasGemmEx(h, CUBLAS_OP_N, CUBLAS_OP_N, 2, 2, 2, &two, x, CUDA_R_32F, 2, x,
                            CUDA_R_32F, 2, &zero, y, CUDA_R_32F, 2, CUBLAS_COMPUTE_32F,
                            CUBLAS_GEMM_DEFAULT);
    };
    caught("cuBLAS recorded without memory of its own", {"has no cublasSetWorkspace"}, [&] {
        cudaStreamBeginCapture(s, cudaStreamCaptureModeThreadLocal);
        gemm();
    });
    cublasSetWorkspace(h, x, 16);
    cudaStreamBeginCapture(s, cudaStreamCaptureModeThreadLocal);
    check(cudaMalloc(&p, 4) == cudaErrorStreamCaptureUnsupported &&
              cudaFree(x) == cudaErrorStreamCaptureUnsupported &&
              cudaDeviceSynchronize() == cudaErrorStreamCaptureUnsupported &&
              cudaMemcpy(&two, x, 4, cudaMemcpyDeviceToHost) == cudaErrorStreamCaptureImplicit &&
              cudaMemsetAsync(x, 0, 4) == cudaErrorStreamCaptureImplicit,
          "what may not be done while a stream is recorded");
    cudaGetLastError();
    gemm();
    two = 3; // comes too late
    cudaMemcpyAsync(x, y, 8, cudaMemcpyDeviceToDevice, s);
    LAUNCH(touch, 1, 1, 0, y, 3, true);
    cudaMemsetAsync(y, 0, 4, s);
    cudaStreamEndCapture(s, &g);
    check(host(y, 4) == std::vector<float>(4, 7.0f), "what is recorded is not done");
    cudaGraphInstantiate(&e, g, 0);
    cudaGraphDestroy(g);
    cudaGraphLaunch(e, s);
    check(host(y, 4) == std::vector<float>{0, 20, 30, 1} &&
              host(x, 4) == std::vector<float>{14, 20, 3, 4}, "a graph is launched");
    cudaGraphLaunch(e, s);
    check(host(y, 4)[1] == 2 * (14 * 20 + 20 * 4) && host(x, 4)[0] == 2 * (14 * 14 + 20 * 3),
          "a graph is launched again");
    cudaFree(y);
    caught("a graph that was recorded with memory freed since", {"use after cudaFree"},
           [&] { cudaGraphLaunch(e, s); });
    cudaGraphExecDestroy(e), cudaStreamDestroy(s), cublasDestroy(h), cudaFree(x);
}

static void plant_memory_bugs()
{
    float *x = device(std::vector<float>(1001, 1.0f)), *y = device_new<float>(1001);
    emu_name(x, "weights");
    caught("host code reads device memory",
           {"host code touched device memory", "weights", "byte 8 "}, [&] {
               volatile float f = x[2];
               (void)f;
           });
    caught("host code writes device memory", {"host code touched device memory", "4004 bytes"},
           [&] { y[1000] = 1; });
    caught("host code reads it after a launch", {"host code touched device memory"}, [&] {
        LAUNCH(copy, 4, 256, 0, y, x, 1001);
        if (host(y, 1001)[1000] == 1) y[0] = 2;
    });
    caught("host code reads it between two copies", {"host code touched"},
           [&] { printf("%g", host(x, 1)[0] + x[0]); });
    caught("a read past the end",
           {"out of bounds: byte 4016 of", "weights", "touch", "block (0,0,0), thread (0,0,0)"},
           [&] { LAUNCH(touch, 1, 1, 0, x, 1004, false); });
    caught("a write past the end", {"out of bounds: byte 4096"},
           [&] { LAUNCH(touch, 1, 1, 0, x, 1024, true); });
    caught("a write just past the end",
           {"out of bounds: byte 4004 was written", "weights", "touch"},
           [&] { LAUNCH(touch, 1, 1, 0, x, 1001, true); });
    caught("a write just before the beginning", {"out of bounds: byte -4 was written"},
           [&] { LAUNCH(touch, 1, 1, 0, x, -1, true); });
    caught("a read before the beginning", {"out of bounds: byte -", "weights"},
           [&] { LAUNCH(touch, 1, 1, 0, x, -(int)emu::PAGE / 4, false); });
    caught("a kernel's condition is missing",
           {"out of bounds", "copy", "block (3,0,0), thread (236,0,0)"},
           [&] { LAUNCH(copy, 4, 256, 0, y, x, 1024); });
    LAUNCH(touch, 1, 1, 0, x, 1003, false);
    check(std::isnan(host(x, 1)[0]), "a read just past the end is NaN");
    caught("use after free", {"use after cudaFree: byte 40 of"},
           [&] { cudaFree(x), LAUNCH(touch_hidden, 1, 1, 0, {x}); });
    caught("a pointer that was freed", {"use after cudaFree: argument 2 is byte 0 of"},
           [&] { cudaFree(x), LAUNCH(copy, 1, 1, 0, y, x, 1); });
    caught("freed twice", {"cudaFree of"}, [&] { cudaFree(x), cudaFree(x); });
    caught("a host pointer for a kernel", {"argument 1 is not device memory", "copy"},
           [&] { float f[4]; LAUNCH(copy, 1, 4, 0, f, x, 4); });
    caught("a copy in the wrong direction", {"cudaMemcpy to", "is not device memory"}, [&] {
        float f[4];
        cudaMemcpy(f, x, 16, cudaMemcpyHostToDevice);
    });
    caught("a copy that is too long", {"cudaMemcpy from", "4008 bytes from byte 0"},
           [&] { float f[1002]; cudaMemcpy(f, x, sizeof f, cudaMemcpyDeviceToHost); });
    caught("a wild address", {"wild address", "thread"},
           [&] { LAUNCH(copy, 1, 1, 0, y, (float *)nullptr, 1); });
    LAUNCH(copy, 4, 256, 0, y, device_new<float>(1001), 1001);
    bool nan = true;
    for (float f : host(y, 1001)) nan &= std::isnan(f);
    check(nan, "unwritten memory is NaN");

    caught("past the end of a shared array", {"out of bounds: byte 144 of shared a, which has 132"},
           [&] { LAUNCH(shared_touch, 1, 33, 0, y, 36); });
    caught("just past the end of a shared array",
           {"out of bounds: byte 132 was written of shared a"},
           [&] { LAUNCH(shared_touch, 2, 33, 0, y, 33); });
    caught("past the end of dynamic shared memory",
           {"out of bounds: byte 64 of shared (dynamic), which has 60"},
           [&] { LAUNCH(dynamic_touch, 1, 1, 60, y, 16); });
    caught("just past the end of dynamic shared memory",
           {"byte 60 was written of shared (dynamic)"},
           [&] { LAUNCH(dynamic_touch, 1, 1, 60, y, 15); });
    caught("more static shared memory than a block has", {"65536 bytes of static shared memory"},
           [&] { LAUNCH(too_much_shared, 1, 1, 0, y); });
    LAUNCH(unwritten_shared, 2, 1, 8, y);
    std::vector<float> v = host(y, 4);
    check(std::isnan(v[0]) && std::isnan(v[1]) && std::isnan(v[2]) && std::isnan(v[3]),
          "unwritten shared memory is NaN in each block");
    cublasHandle_t h;
    cublasCreate(&h);
    float one = 1, zero = 0;
    caught("a matrix larger than its memory", {"out of bounds", "cublasGemm of m 32, n 32, k 32"},
           [&] {
               cublasGemmEx(h, CUBLAS_OP_N, CUBLAS_OP_N, 32, 32, 32, &one, x, CUDA_R_32F, 32, x,
                            CUDA_R_32F, 32, &zero, y, CUDA_R_32F, 32, CUBLAS_COMPUTE_32F,
                            CUBLAS_GEMM_DEFAULT);
           });
    cublasDestroy(h);
}

static __global__ void early_return(float *x)
{
    if (threadIdx.x == 37) return;
    __syncthreads();
    x[threadIdx.x] = 1;
}
static __global__ void divergent(float *x)
{
    if (threadIdx.x < 8)
        __syncthreads();
    else
        __syncthreads();
    x[threadIdx.x] = 1;
}
static __global__ void half_a_block(float *x)
{
    if (threadIdx.x < 32) __syncthreads();
    else x[threadIdx.x] = (float)__shfl_xor_sync(~0u, (int)threadIdx.x, 1);
    if (threadIdx.x == 0) __syncthreads_or(1);
}
static __global__ void half_a_warp(float *x)
{
    if (threadIdx.x < 16) x[threadIdx.x] = __shfl_down_sync(~0u, 1.0f, 1);
}
static __global__ void others_at_barrier(float *x)
{
    if (threadIdx.x < 16) x[threadIdx.x] = __shfl_down_sync(~0u, 1.0f, 1);
    __syncthreads();
}
static __global__ void whole_warp(float *x) { x[threadIdx.x] = (float)__any_sync(~0u, 1); }
static __global__ void outside_mask(float *x)
{
    if (threadIdx.x < 16) x[threadIdx.x] = __shfl_xor_sync(0xffff, 1.0f, 16);
}
static __global__ void not_in_mask(float *x) { x[threadIdx.x] = (float)__ballot_sync(0xffff, 1); }
static __global__ void other_mask(float *x)
{
    unsigned mask = threadIdx.x < 16 ? ~0u : ~1u;
    x[threadIdx.x] = (float)__any_sync(mask, 1);
}
static __global__ void another_vote(float *x)
{
    if (threadIdx.x < 16) x[threadIdx.x] = (float)__any_sync(~0u, 1);
    else x[threadIdx.x] = (float)__all_sync(~0u, 1);
}

static void plant_meeting_bugs()
{
    float *x = device_new<float>(64);
    caught("a thread returns before a barrier",
           {"barrier not reached by all threads: 63 of 64", "thread (37,0,0) has returned",
            "early_return"},
           [&] { LAUNCH(early_return, 1, 64, 0, x); });
    caught("two branches with a barrier each", {"different barriers: lines ", "divergent"},
           [&] { LAUNCH(divergent, 1, 64, 0, x); });
    caught("half a block at a barrier",
           {"barrier not reached by all threads: 32 of 64 wait in __syncthreads",
            "thread (32,0,0) has returned"},
           [&] { LAUNCH(half_a_block, 1, 64, 0, x); });
    caught("half a warp shuffles",
           {"__shfl_down_sync at line", "waits for lanes 0xffff0000", "lane 16 has returned"},
           [&] { LAUNCH(half_a_warp, 1, 32, 0, x); });
    caught("half a warp shuffles, half waits", {"lane 16 waits in __syncthreads at line"},
           [&] { LAUNCH(others_at_barrier, 1, 32, 0, x); });
    caught("half a warp that does not exist", {"lane 24 does not exist"},
           [&] { LAUNCH(whole_warp, 1, 24, 0, x); });
    caught("a shuffle from outside the mask",
           {"__shfl_xor_sync", "reads lane 16, which is not in mask 0x0000ffff"},
           [&] { LAUNCH(outside_mask, 1, 32, 0, x); });
    caught("a lane that is not in its mask", {"__ballot_sync", "lane 16 is not in its own mask"},
           [&] { LAUNCH(not_in_mask, 1, 32, 0, x); });
    caught("different masks", {"__any_sync", "mask 0xfffffff"},
           [&] { LAUNCH(other_mask, 1, 32, 0, x); });
    caught("different votes", {"__all_sync", "waits in __any_sync"},
           [&] { LAUNCH(another_vote, 1, 32, 0, x); });
    caught("a barrier outside a kernel", {"__syncthreads at line", "outside a kernel"},
           [&] { __syncthreads(); });
}

static __global__ void no_barrier(float *y, const float *x, int n) // y = x backwards
{
    SHARED(float, s, [64]);
    s[threadIdx.x] = x[threadIdx.x];
    y[threadIdx.x] = s[n - 1 - threadIdx.x];
}
static __global__ void no_second_barrier(float *y, const float *x,
                                         int n) // the tile is overwritten too early
{
    SHARED(float, s, [64]);
    float sum = 0;
    for (int i = 0; i < 3; i++) {
        s[threadIdx.x] = x[threadIdx.x] * (float)i;
        __syncthreads();
        sum += s[(threadIdx.x + 33) % n];
    }
    y[threadIdx.x] = sum;
}
static __global__ void no_syncwarp(float *y, const float *x)
{
    SHARED(float, s, [32]);
    s[threadIdx.x] = x[threadIdx.x];
    y[threadIdx.x] = s[threadIdx.x ^ 1];
}
static __global__ void no_atomic(float *y, const float *x)
{
    y[0] += x[threadIdx.x] * x[blockIdx.x];
}
static __global__ void blocks_race(float *y) { y[threadIdx.x] = (float)blockIdx.x; }
static __global__ void blocks_depend(float *y) { y[blockIdx.x + 1] = y[blockIdx.x] + 1; }
static __global__ void no_wait(float *y, const float *x)
{
    SHARED(float, s, [128]);
    cp_async_16(s + 4 * threadIdx.x, x + 4 * threadIdx.x, true);
    cp_async_commit();
    __syncwarp();
    for (int i = 0; i < 4; i++) y[4 * threadIdx.x + i] = s[4 * threadIdx.x + i];
}
static __global__ void overwritten_copy(float *y,
                                        const float *x) // while the copy may still read... or write
{
    SHARED(float, s, [4]);
    for (int i = 0; i < 4; i++) s[i] = 1;
    y[0] = s[0];
    cp_async_16(s, x, true);
    y[1] = s[0];
    cp_async_commit();
    cp_async_wait<0>();
}

static __global__ void count_shared(int *out)
{
    SHARED(int, count);
    if (!threadIdx.x) count = 0;
    __syncthreads();
    count++;
    __syncthreads();
    if (!threadIdx.x) *out = count;
}
static __global__ void count_global(int *out) { if (!threadIdx.x) ++*out; }
static __global__ void shuffle_is_no_barrier(int *out)
{
    SHARED(short, s, [32]);
    s[threadIdx.x] = (short)threadIdx.x;
    int one = __shfl_sync(~0u, 1, 0);
    out[threadIdx.x] = s[threadIdx.x ^ one];
}

static void plant_races()
{
    float *x = device(random_floats(128)), *y = device(std::vector<float>(128));
#ifdef __SANITIZE_THREAD__ // compiled for cuda_race.h
    const char *words = "race: this thread ";
    int *n = device(std::vector<int>(32));
    caught("a count in shared memory without atomics",
           {words, "thread (0,0,0) wrote", "shared count"},
           [&] { LAUNCH(count_shared, 1, 32, 0, n); });
    caught("a count of blocks without atomics", {words, "another block wrote"},
           [&] { LAUNCH(count_global, 2, 32, 0, n); });
    caught("a shuffle for a barrier", {words, "of shared s"},
           [&] { LAUNCH(shuffle_is_no_barrier, 1, 32, 0, n); });
#else
    (void)count_shared, (void)count_global, (void)shuffle_is_no_barrier;
    LAUNCH(no_barrier, 1, 64, 0, y, x, 64);
    std::vector<float> forward = host(y, 64);
    emu_order("reverse");
    LAUNCH(no_barrier, 1, 64, 0, y, x, 64);
    std::vector<float> reverse = host(y, 64);
    check(std::isnan(forward[0]) && !std::isnan(forward[63]) && std::isnan(reverse[63]) &&
              !std::isnan(reverse[0]),
          "a missing barrier gives different results forward and reverse");
    const char *words = "orders disagree";
#endif
    emu_order("agree");
    caught("a missing barrier", {words, "no_barrier"},
           [&] { LAUNCH(no_barrier, 1, 64, 0, y, x, 64); });
    caught("a barrier missing at a loop's end", {words, "no_second_barrier"},
           [&] { LAUNCH(no_second_barrier, 1, 64, 0, y, x, 64); });
    caught("a missing __syncwarp", {words, "no_syncwarp"},
           [&] { LAUNCH(no_syncwarp, 1, 32, 0, y, x); });
    caught("a missing atomic", {words, "no_atomic"}, [&] { LAUNCH(no_atomic, 4, 64, 0, y, x); });
    caught("blocks that write the same", {words, "blocks_race"},
           [&] { LAUNCH(blocks_race, 4, 8, 0, y); });
    caught("blocks that read each other", {words, "blocks_depend"},
           [&] { LAUNCH(blocks_depend, 4, 1, 0, y); });
    caught("a copy that is not waited for", {"orders disagree", "no_wait"},
           [&] { LAUNCH(no_wait, 1, 32, 0, y, x); });
    caught("memory read while a copy comes", {"orders disagree", "overwritten_copy"},
           [&] { LAUNCH(overwritten_copy, 1, 1, 0, y, x); });
    emu_order("forward");
}

static __global__ void wgmma_misplaced(const __nv_bfloat16 *)
{
    DYNAMIC_SHARED(__nv_bfloat16, tile);
    float d[8][4];
    wgmma_fence(d);
    wgmma<false, true>(d, tile, tile + 64, 0);
}
static __global__ void wgmma_half(const __nv_bfloat16 *)
{
    DYNAMIC_SHARED(__nv_bfloat16, tile);
    float d[8][4];
    wgmma_fence(d);
    wgmma<false, false>(d, tile, tile, 0);
}
static __global__ void fourth_of_three()
{
    SHARED(uint64_t, full, [3]);
    for (int i = 0; i < 4; i++) mbarrier_init(full + 2 * i, 1);
}
static __global__ void overwritten_mbarrier()
{
    SHARED(uint64_t, full, [3]);
    mbarrier_init(full + 1, 1);
    full[1]++;
    mbarrier_arrive(full + 1);
}
// Not a race: a warp's threads hand over what they wrote by an mbarrier, back and forth.
static __global__ void hand_over(float *y, const float *x, int bug)
{
    SHARED(float, s, [128]);
    SHARED(uint64_t, full);
    SHARED(uint64_t, empty);
    int t = (int)threadIdx.x;
    if (!t) mbarrier_init(&full, 64), mbarrier_init(&empty, 64);
    __syncthreads();
    for (int i = 0; i < 5; i++) {
        s[t] = x[t] + (float)i;
        if (t < 64) mbarrier_arrive(&full);
        if (t < 64 || bug != 1) mbarrier_wait(&full, i % 2);
        y[i * 128 + t] = s[t ^ (t < 64 ? 33 : 0)];
        if (t < 64) mbarrier_arrive(&empty);
        if (t < 64 && bug != 2) mbarrier_wait(&empty, i % 2);
    }
}

static void plant_hopper_bugs()
{
    Pipeline p;
    float *x = device(random_floats(128)), *y = device_new<float>(5 * 128);
    __nv_bfloat16 *odd = (__nv_bfloat16 *)x + 1;
#ifdef __SANITIZE_THREAD__
    const char *words = "race: this thread ";
    emu_order("reverse");
    caught("a tile multiplied before it came",
           {"race: this thread reads what a tma_load wrote", "shared (dynamic)"},
           [&] { p.run<NO_FULL>(192); });
#else
    const char *words = "orders disagree";
#endif
    emu_order("agree");
    LAUNCH(hand_over, 1, 64, 0, y, x, 0);
    std::vector<float> v = host(y, 5 * 128), from = host(x, 128);
    bool good = true;
    for (int i = 0; i < 5 * 128; i++) good &= i % 128 >= 64 || v[i] == from[i % 128 ^ 33] + i / 128;
    check(good, "mbarriers between threads that write and read");
    caught("an mbarrier that is not waited for", {words, "hand_over"},
           [&] { LAUNCH(hand_over, 1, 64, 0, y, x, 2); });
    caught("tiles that are not waited for", {"the block ends, but not what tma_load began"},
           [&] { p.run<NO_FULL>(192); });
    caught("a sum read before its wgmma is done", {"orders disagree", "pipeline"},
           [&] { p.run<NO_WAIT>(); });
    caught("a tile overwritten while it is multiplied", {words, "pipeline"},
           [&] { p.run<EARLY>(); });
    for (const char *order : {"forward", "reverse", "shuffle:3"}) {
        emu_order(order);
        caught("an mbarrier where nobody arrives",
               {"deadlock in block", "thread (0,0,0) waits in mbarrier_wait at line",
                "thread (128,0,0) waits in mbarrier_wait at line",
                "for byte 0 of shared empty, whose phase 0 lacks 4 of 4 arrivals and 0 bytes"},
               [&] { p.run<NO_EMPTY>(); });
        caught("more bytes than were expected",
               {"deadlock", "byte 0 of shared full, whose phase 0 lacks 0 of 1 arrivals and -384"},
               [&] { p.run<SHORT>(); });
    }
    emu_order("forward");
    caught("a tile that is not aligned for TMA", {"tma_load", "not a multiple of 1024"},
           [&] { p.run<MISPLACED>(); });
    caught("an mbarrier that is not initialised",
           {"mbarrier_wait", "byte 0 of shared", "is no mbarrier"}, [&] { p.run<NO_INIT>(); });
    caught("an mbarrier that TMA may not see", {"tma_load", "mbarrier_init_done"},
           [&] { p.run<NO_DONE>(); });
    caught("an mbarrier that was overwritten", {"mbarrier_arrive", "byte 8 of shared full"},
           [&] { LAUNCH(overwritten_mbarrier, 1, 1, 0); });
    caught("an mbarrier past the last", {"out of bounds: byte 32 of shared full, which has 24"},
           [&] { LAUNCH(fourth_of_three, 1, 1, 0); });
    caught("more arrivals than a phase has", {"mbarrier_arrive", "had all its 1 arrivals"},
           [&] { p.run<TWICE>(); });
    caught("wgmma without a fence", {"wgmma at line", "wgmma_fence"}, [&] { p.run<NO_FENCE>(); });
    caught("wgmma of a tile that is not aligned", {"wgmma at line", "b is at byte 128 of 1024"},
           [&] { LAUNCH(wgmma_misplaced, 1, 128, 16384, odd); });
    caught("wgmma by two warps", {"wgmma at line", "64 threads"},
           [&] { LAUNCH(wgmma_half, 1, 64, 16384, odd); });
    caught("a tensor that is not aligned", {"tensor_map", "not a multiple of 16"},
           [&] { tensor_map(odd, 8, 8, 8, 8); });
    caught("a tensor whose rows are not", {"tensor_map", "not a multiple of 16"},
           [&] { tensor_map(odd - 1, 8, 8, 12, 8); });
    caught("a box that is too high", {"tensor_map", "257 rows"},
           [&] { tensor_map(odd - 1, 8, 8, 8, 257); });
}

[[maybe_unused]] static __global__ void misaligned(float4 *y, const float *x)
{
    y[0] = *(const float4 *)(x + 1);
}
static __global__ void misaligned_ldmatrix(float *y)
{
    SHARED(float, s, [256]);
    unsigned r[4];
    ldmatrix_x4(r, s + threadIdx.x * 6);
    y[threadIdx.x] = (float)r[0];
}
static __global__ void ldmatrix_of_global(float *y)
{
    unsigned r[4];
    ldmatrix_x4(r, y);
    y[threadIdx.x] = (float)r[0];
}
static __global__ void misaligned_copy(const float *x)
{
    SHARED(float, s, [4]);
    cp_async_16(s, x + 1, true);
}
__attribute__((noinline)) static float deep(float *x, int n)
{
    volatile float here[64] = {x[0]};
    return n ? here[0] + deep(x, n - 1) + here[n % 64] : 0;
}
static __global__ void overflow(float *x) { x[1] = deep(x, 100000); }
static __global__ void trap() { __trap(); }

static void plant_other_bugs()
{
    float *x = device(std::vector<float>(64)), *y = device_new<float>(64);
    (void)y;
#if defined __x86_64__ && defined __OPTIMIZE__ && !defined __SANITIZE_ADDRESS__ && \
    !defined __SANITIZE_THREAD__ // as aligned instructions fault
    caught("a misaligned vector", {"misaligned"},
           [&] { LAUNCH(misaligned, 1, 1, 0, (float4 *)y, x); });
#endif
    caught("ldmatrix of a row that is not aligned", {"ldmatrix_x4", "not a multiple of 16"},
           [&] { LAUNCH(misaligned_ldmatrix, 1, 32, 0, x); });
    caught("ldmatrix of device memory", {"ldmatrix_x4", "not in shared memory"},
           [&] { LAUNCH(ldmatrix_of_global, 1, 32, 0, x); });
    caught("cp.async from an address not aligned", {"cp_async_16", "not a multiple of 16"},
           [&] { LAUNCH(misaligned_copy, 1, 1, 0, x); });
    caught("a stack that overflows", {"stack overflowed"}, [&] { LAUNCH(overflow, 1, 1, 0, x); });
    caught("__trap", {"__trap", "thread (0,0,0)"}, [&] { LAUNCH(trap, 1, 1, 0); });
    caught("an order that is none", {"EMU_ORDER", "sideways"}, [&] { emu_order("sideways"); });
}

int main()
{
    test_indices();
    test_shuffles();
    test_votes();
    test_atomics();
    test_orders();
    test_tensor_cores();
    test_hopper();
    test_bfloat16();
    test_gemm();
    test_runtime();
    test_graphs();
    plant_memory_bugs();
    plant_meeting_bugs();
    plant_races();
    plant_hopper_bugs();
    plant_other_bugs();
    printf("%d passed, %d failed\n", passed, failed);
    return failed != 0;
}
