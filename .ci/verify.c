/*
verify.c: moe.cu against moe.c.

This file is compiled twice and linked into one program: once with moe.c (CPU, float), once with
moe.cu (-DVERIFY_GPU; by nvcc, or by a C++ compiler with cuda_on_cpu.h, and in float or bfloat16).
Both run the same list of operations, models and training steps on the same numbers and keep what
comes out. Then it is compared, as |difference| / |expected| over each array, and one table printed.

    verify          all of it; exit status 1 if a bound is exceeded
    verify NAME     what begins with this name

Inputs are multiples of 1/128 below 1 in size, which bfloat16 holds exactly.
*/
#pragma GCC diagnostic ignored "-Wunused-function" // neither build uses all of moe.c
#define MOE_NO_MAIN
#ifdef VERIFY_GPU
#include "../moe.cu"
#define RESULTS gpu_results
#else
#include "../moe.c"
#define RESULTS cpu_results
#endif

#ifdef __cplusplus
extern "C" {
#endif
typedef struct {
    char name[200]; // operation, then array
    size_t n;
    float *data;    // host memory
} Result;

typedef struct {
    Result *result;
    size_t n, room;
    const char *only; // what to run
    int real_size, threads; // bytes; of what is large
} Results;

void cpu_results(Results *r, const Results *expected);
void gpu_results(Results *r, const Results *expected);
#ifdef __cplusplus
}
#endif

static Results *results;
static const Results *known; // on the GPU's side, what the CPU's gave

static Result *keep_result(const char *name, size_t n)
{
    if (results->n == results->room) {
        results->room = 2 * results->room + 64;
        results->result = (Result *)realloc(results->result, results->room * sizeof(Result));
        if (!results->result) die(FAILED, "out of memory");
    }
    Result *r = &results->result[results->n++];
    snprintf(r->name, sizeof r->name, "%s", name);
    r->n = n;
    r->data = (float *)host_alloc(n, sizeof(float));
    return r;
}

// ------------------------------------------------------------------------------------------------
// One operation: its arrays are made by the functions below, all of them with numbers in, and when
// it has run, finish() keeps what they hold.

enum Type { REAL, ACCUM, INT };
typedef struct {
    enum Type type;
    const char *name;
    size_t n;
    void *data; // device memory
} Array;

static Array array[40];
static size_t arrays;
static char case_name[60];

static int begin(const char *name)
{
    arrays = 0;
    snprintf(case_name, sizeof case_name, "%s", name);
    return !strncmp(name, results->only, strlen(results->only));
}

static void *add_array(enum Type type, const char *name, size_t n, size_t size)
{
    Array a = {type, name, n, device_alloc(n * size)};
    if (arrays == sizeof array / sizeof *array) die(FAILED, "%s: too many arrays", case_name);
    array[arrays] = a;
    return array[arrays++].data;
}

static accum *random_numbers(size_t n) // the same for an array of both sides
{
    accum *x = (accum *)host_alloc(n, sizeof(accum));
    for (size_t i = 0; i < n; i++)
        x[i] = (accum)((double)(random_u64(7, arrays, i) % 255) - 127) / 128;
    return x;
}

static real *reals(const char *name, size_t n)
{
    accum *x = random_numbers(n);
    real *to = (real *)add_array(REAL, name, n, sizeof(real));
    reals_to_device(to, x, n);
    free(x);
    return to;
}

static accum *accums(const char *name, size_t n)
{
    accum *x = random_numbers(n), *to = (accum *)add_array(ACCUM, name, n, sizeof(accum));
    to_device(to, x, n * sizeof(accum));
    free(x);
    return to;
}

static int *ints(const char *name, size_t n, const int *value)
{
    int *to = (int *)add_array(INT, name, n, sizeof(int));
    to_device(to, value, n * sizeof(int));
    return to;
}

static int *random_ints(const char *name, size_t n, size_t below)
{
    int *value = (int *)host_alloc(n, sizeof(int));
    for (size_t i = 0; i < n; i++) value[i] = (int)(random_u64(7, arrays, i) % below);
    int *to = ints(name, n, value);
    free(value);
    return to;
}

// [N, K], each row with K different numbers below E, small ones more often
static int *random_choices(size_t N, size_t K, size_t E)
{
    int *value = (int *)host_alloc(N * K, sizeof(int));
    for (size_t n = 0; n < N; n++)
        for (size_t k = 0, next = 0; k < K; next++) {
            size_t u = random_u64(7, n, next) % (E * E), same = 0;
            int e = (int)(u * u / (E * E * E)), *row = value + n * K;
            for (size_t j = 0; j < k; j++) same += row[j] == e;
            if (!same) row[k++] = e;
        }
    int *to = ints("topk", N * K, value);
    free(value);
    return to;
}

static void keep_array(const char *name, enum Type type, const void *data, size_t n)
{
    char full[200];
    snprintf(full, sizeof full, "%s: %s", case_name, name);
    Result *r = keep_result(full, n);
    int *whole = (int *)host_alloc(n, sizeof(int));
    if (type == INT) to_host(whole, data, n * sizeof(int));
    for (size_t i = 0; i < n && type == INT; i++) r->data[i] = (float)whole[i];
    if (type == ACCUM) to_host(r->data, data, n * sizeof(accum));
    if (type == REAL) reals_to_host(r->data, (const real *)data, n);
    free(whole);
}

static void keep_number(const char *name, double x)
{
    char full[200];
    snprintf(full, sizeof full, "%s: %s", case_name, name);
    keep_result(full, 1)->data[0] = (float)x;
}

static void finish(void)
{
    for (size_t i = 0; i < arrays; i++) {
        keep_array(array[i].name, array[i].type, array[i].data, array[i].n);
        device_free(array[i].data);
    }
}

static void matmul(size_t N, size_t O, size_t I, const int *offsets, size_t groups, enum Mode mode)
{
    if (!begin(groups > 1 ? "grouped matmul" : "matmul")) return;
    Rows r = {groups > 1 ? ints("offsets", groups + 1, offsets) : NULL, groups, N};
    real *out = reals("out", N * O), *x = reals("x", N * I), *w = reals("w", groups * O * I);
    real *dx = reals("dx", N * I), *dout = reals("dout", N * O);
    accum *dw = accums("dw", groups * O * I);
    matmul_forward(out, x, w, r, O, I, mode);
    if (groups == 1) matmul_forward(accums("wide out", N * O), x, w, r, O, I, mode);
    matmul_backward_x(dx, dout, w, r, O, I, mode);
    matmul_backward_w(dw, dout, x, r, O, I, mode);
    finish();
}

static void rmsnorm(size_t N, size_t C, size_t ld_out, size_t ld_x, enum Mode mode)
{
    if (!begin("rmsnorm")) return;
    real *out = reals("out", N * ld_out);
    real *dx = reals("dx", N * ld_x), *dout = reals("dout", N * ld_out);
    accum *x = accums("x", N * ld_x), *rstd = accums("rstd", N);
    accum *w = accums("w", C), *dw = accums("dw", C);
    rmsnorm_forward(out, rstd, x, w, N, C, ld_out, ld_x, 1e-6);
    rmsnorm_backward(dx, dw, dout, x, w, rstd, N, C, ld_out, ld_x, mode);
    finish();
}

static void swiglu(size_t n)
{
    if (!begin("swiglu")) return;
    real *act = reals("act", n), *gate = reals("gate", n), *up = reals("up", n);
    real *dgate = reals("dgate", n), *dup = reals("dup", n), *dact = reals("dact", n);
    swiglu_forward(act, gate, up, n);
    swiglu_backward(dgate, dup, dact, gate, up, n);
    finish();
}

static void gate_up(size_t N, size_t C, size_t F, const int *offsets, size_t groups, enum Mode mode)
{
    if (!begin("gate_up")) return;
    Rows r = {groups > 1 ? ints("offsets", groups + 1, offsets) : NULL, groups, N};
    real *act = reals("act", N * F), *gate = reals("gate", N * F), *up = reals("up", N * F);
    real *x = reals("x", N * C), *w_gate = reals("w_gate", groups * F * C);
    real *w_up = reals("w_up", groups * F * C), *dx = reals("dx", N * C);
    real *dgate = reals("dgate", N * F), *dup = reals("dup", N * F);
    gate_up_forward(act, gate, up, x, w_gate, w_up, r, C, F);
    gate_up_backward_x(dx, dgate, dup, w_gate, w_up, r, C, F, mode);
    finish();
}

static void embedding(size_t N, size_t V, size_t C)
{
    if (!begin("embedding")) return;
    int *token = random_ints("token", N, V);
    real *w = reals("w", V * C), *dout = reals("dout", N * C);
    accum *out = accums("out", N * C), *dw = accums("dw", V * C);
    embedding_forward(out, token, w, N, C);
    embedding_backward(dw, dout, token, N, C);
    finish();
}

static void crop(size_t B, size_t T, size_t Tin, size_t C)
{
    if (!begin("crop")) return;
    accum *out = accums("out", B * T * C);
    real *in = reals("in", B * Tin * C);
    real *din = reals("din", B * Tin * C), *dout = reals("dout", B * T * C);
    crop_forward(out, in, B, T, Tin, C);
    crop_backward(din, dout, B, T, Tin, C);
    finish();
}

static void rope(size_t N, size_t heads, size_t Dr, size_t head, size_t ld_x)
{
    if (!begin("rope")) return;
    int *pos = random_ints("pos", N, 50);
    accum *table = accums("table", 50 * Dr), *wide = accums("wide x", N * ld_x);
    size_t ld = heads * head;
    real *out = reals("out", N * ld), *x = reals("x", N * ld_x);
    real *dx = reals("dx", N * ld_x), *dout = reals("dout", N * ld);
    real *of_wide = reals("of wide x", N * ld);
    rope_forward(of_wide, wide, pos, table, N, heads, Dr, ld, ld_x, head);
    rope_forward(out, x, pos, table, N, heads, Dr, ld, ld_x, head);
    rope_backward(dx, dout, pos, table, N, heads, Dr, ld_x, ld, head);
    rope_forward(x, x, pos, table, N, heads, Dr, ld_x, ld_x, head);
    finish();
}

static void attention(size_t B, size_t T, size_t NH, size_t Dn, size_t Dr, size_t Dv)
{
    if (!begin("attention")) return;
    size_t N = B * T * NH;
    double scale = 2 / sqrt((double)(Dn + Dr));
    real *out = reals("out", N * Dv), *q = reals("q", N * (Dn + Dr));
    real *kv = reals("kv", N * (Dn + Dv));
    real *k_pe = reals("k_pe", B * T * Dr), *dq = reals("dq", N * (Dn + Dr));
    real *dkv = reals("dkv", N * (Dn + Dv)), *dk_pe = reals("dk_pe", B * T * Dr);
    real *heads = reals("dk_pe_heads", N * Dr), *dout = reals("dout", N * Dv);
    accum *lse = accums("lse", N);
    attention_forward(out, lse, q, kv, k_pe, B, T, NH, Dn, Dr, Dv, scale);
    attention_backward(dq, dkv, dk_pe, heads, dout, out, lse, q, kv, k_pe, B, T, NH, Dn, Dr, Dv,
                       scale);
    finish();
}

static void router(size_t N, size_t C, size_t E, size_t K, size_t G, size_t KG, int norm,
                   enum Mode mode)
{
    if (!begin("router")) return;
    real *x = reals("x", N * C), *w = reals("w", E * C), *dx = reals("dx", N * C);
    accum *bias = accums("bias", E), *s = accums("s", N * E), *g = accums("g", N * K);
    accum *dw = accums("dw", E * C), *ds = accums("ds", N * E), *dg = accums("dg", N * K);
    int *topk = random_ints("topk", N * K, E);
    router_forward(s, topk, g, x, w, bias, N, C, E, K, G, KG, norm, 2.5);
    router_backward(dx, dw, ds, dg, s, topk, x, w, N, C, E, K, norm, 2.5, mode);
    device_zero(ds, N * E * sizeof(accum)); // may be anything
    finish();
}

static void balance(size_t B, size_t T, size_t E, size_t K)
{
    if (!begin("balance")) return;
    accum *loss = accums("loss", B), *f = accums("f", B * E), *s = accums("s", B * T * E);
    accum *ds = accums("ds", B * T * E);
    accum *positive = (accum *)host_alloc(B * T * E, sizeof(accum));
    for (size_t i = 0; i < B * T * E; i++)
        positive[i] = (accum)(1 + random_u64(8, 0, i) % 997) / 1000;
    to_device(s, positive, B * T * E * sizeof(accum));
    free(positive);
    balance_forward(loss, f, s, B, T, E, K);
    balance_backward(ds, 0.7, f, s, B, T, E);
    finish();
}

static void dispatch(size_t N, size_t K, size_t E, size_t C, enum Mode mode)
{
    if (!begin("dispatch, combine")) return;
    int *topk = random_choices(N, K, E), *offsets = random_ints("offsets", E + 1, 2);
    int *row = random_ints("row", N * K, 2), *load = random_ints("load", E, 9);
    real *xs = reals("xs", N * K * C), *x = reals("x", N * C), *dx = reals("dx", N * C);
    real *dxs = reals("dxs", N * K * C), *out = reals("out", N * K * C);
    real *dout = reals("dout", N * K * C), *dy = reals("dy", N * C);
    accum *y = accums("y", N * C), *h = accums("h", N * C);
    accum *g = accums("g", N * K), *dg = accums("dg", N * K);
    dispatch_forward(xs, offsets, row, x, topk, N, K, E, C);
    dispatch_backward(dx, dxs, row, N, K, C, mode);
    combine_forward(y, h, out, g, row, N, K, C);
    combine_backward(dout, dg, dy, out, g, row, N, K, C);
    count_load(load, offsets, E);
    finish();
}

static void cross_entropy(size_t N, size_t V)
{
    if (!begin("cross_entropy")) return;
    int *target = random_ints("target", N, V);
    accum *loss = accums("loss", N), *lse = accums("lse", N), *dloss = accums("dloss", N);
    real *logits = reals("logits", N * V), *dlogits = reals("dlogits", N * V);
    cross_entropy_forward(loss, lse, logits, target, 0.8, N, V);
    cross_entropy_backward(dlogits, 0.3, dloss, lse, logits, target, 0.8, N, V);
    finish();
}

static void latent(size_t n, size_t NH, size_t Dn, size_t Dr, size_t Dv, size_t Rkv, size_t window)
{
    if (!begin("latent_attention")) return;
    size_t capacity = window + 6, slots = 3;
    int *slot = random_ints("slot", n, slots), *pos = random_ints("pos", n, 3 * window);
    real *out = reals("out", n * NH * Dv), *work = reals("work", 2 * NH * n * Rkv);
    real *q = reals("q", n * NH * (Dn + Dr)), *w = reals("w", NH * (Dn + Dv) * Rkv);
    real *cache = reals("cache", slots * capacity * (Rkv + Dr));
    cache_store(cache, reals("c_kv", Rkv), reals("k_pe", Dr), slot, pos, 1, Rkv, Dr, capacity);
    latent_attention(out, work, q, w, cache, slot, pos, n, NH, Dn, Dr, Dv, Rkv, capacity, window,
                     1 / sqrt((double)(Dn + Dr)));
    finish();
}

// All operations of optimizers on a few spans or matrices.
static void optimizers(void)
{
    enum { N = 3 * 64 * 40 + 48 * 72 + 80 * 32 };
    if (begin("sum_squares")) {
        accum *x = accums("x", 70001), sum = (accum)sum_squares(x, 70001);
        to_device(x, &sum, sizeof sum);
        finish();
    }
    if (begin("adamw")) {
        real *w = reals("weights", 9000);
        accum *master = accums("master", 9000), *g = accums("g", 9000);
        moment *m = reals("m", 9000), *v = reals("v", 9000);
        static const Span span[3] = {{0, 5008, 0, 1}, {5008, 37, 2, 0}, {6000, 3000, 3, 1}};
        Span *on_device = (Span *)device_alloc(sizeof span);
        to_device(on_device, span, sizeof span);
        accum *positive = random_numbers(9000);
        for (size_t i = 0; i < 9000; i++) positive[i] = (accum)fabs((double)positive[i]);
        reals_to_device(v, positive, 9000);
        free(positive);
        device_zero(master + 5045, 11 * sizeof(accum)); // padded as layouts are
        device_zero(g + 5045, 11 * sizeof(accum));
        device_zero(m + 5045, 11 * sizeof(moment));
        device_zero(v + 5045, 11 * sizeof(moment));
        adamw_step(w, master, m, v, g, on_device, 3, 4, 7, 1e-2, 0.9, 0.95, 1e-8, 0.1, 0.5);
        device_free(on_device);
        device_zero(w, 9000 * sizeof(real)); // left alone where real is accum
        finish();
    }
    // A mean square that comes and goes by less than bfloat16's steps: the mean over all weights of
    // v after 200 steps with gradients and after 200 without.
    if (begin("adamw, slow")) {
        enum { WEIGHTS = 4096, STEPS = 200 };
        real *w = reals("weights", WEIGHTS);
        accum *master = accums("master", WEIGHTS), *g = accums("g", WEIGHTS);
        moment *m = reals("m", WEIGHTS), *v = reals("v", WEIGHTS);
        static const Span span = {0, WEIGHTS, 0, 1};
        Span *on_device = (Span *)device_alloc(sizeof span);
        accum *host = (accum *)host_alloc(WEIGHTS, sizeof(accum));
        to_device(on_device, &span, sizeof span);
        device_zero(m, WEIGHTS * sizeof(moment));
        device_zero(v, WEIGHTS * sizeof(moment));
        for (long step = 1; step <= 2 * STEPS; step++) {
            adamw_step(w, master, m, v, g, on_device, 1, 1, step, 1e-3, 0.9, 0.999, 1e-8, 0.1, 1);
            if (step % STEPS) continue;
            reals_to_host(host, v, WEIGHTS);
            double sum = 0;
            for (size_t i = 0; i < WEIGHTS; i++) sum += (double)host[i] / WEIGHTS;
            keep_number(step == STEPS ? "v" : "v, shrunk", sum);
            device_zero(g, WEIGHTS * sizeof(accum));
        }
        free(host);
        device_free(on_device);
        for (size_t i = 0; i < arrays; i++) device_free(array[i].data);
    }
    if (begin("muon")) { // three of one size, of which two side by side; a wide and a tall one
        enum { ONE = 64 * 40, WIDE_ONE = 48 * 72 };
        static const Matrix matrix[5] = {{0, 64, 40}, {ONE, 64, 40}, {2 * ONE + WIDE_ONE, 64, 40},
                                         {2 * ONE, 48, 72}, {3 * ONE + WIDE_ONE, 80, 32}};
        real *w = reals("weights", N);
        accum *master = accums("master", N), *g = accums("g", N);
        moment *M = reals("momentum", N);
        device_zero(master, N * sizeof(accum)); // what is left is the step
        muon_step(w, master, M, g, matrix, 5, 3, 1, 0.9, 0.1, 0.5);
        device_zero(w, N * sizeof(real));
        finish();
    }
    if (begin("router_bias")) {
        accum *bias = accums("bias", 37);
        int *load = random_ints("load", 37, 9);
        router_bias_step(bias, load, 37, 1e-3);
        finish();
    }
}

static void operations(void)
{
    static const int cut[] = {0, 0, 5, 5, 140, 141, 271, 300}, even[] = {0, 16, 48, 64};
    static const int few[] = {0, 0, 2, 2, 7, 8, 8, 8}, none[8] = {0}; // of 9, of 0 rows
    static const int nine[] = {0, 0, 2, 2, 7, 8, 8, 9};
    for (int mode = SET; mode <= ADD; mode++) {
        matmul(1, 1, 1, NULL, 1, (enum Mode)mode);
        matmul(1, 72, 300, NULL, 1, (enum Mode)mode);
        matmul(33, 17, 29, NULL, 1, (enum Mode)mode);
        matmul(130, 72, 40, NULL, 1, (enum Mode)mode);
        matmul(9, 17, 29, few, 7, (enum Mode)mode);
        matmul(0, 40, 24, none, 7, (enum Mode)mode);
        matmul(9, 40, 320, few, 7, (enum Mode)mode);
        matmul(300, 17, 29, cut, 7, (enum Mode)mode);
        matmul(300, 136, 72, cut, 7, (enum Mode)mode);
        matmul(300, 40, 200, cut, 7, (enum Mode)mode);
        matmul(300, 264, 136, cut, 7, (enum Mode)mode);
        matmul(64, 24, 32, even, 3, (enum Mode)mode);
        gate_up(1, 29, 17, NULL, 1, (enum Mode)mode);
        gate_up(1, 2600, 24, NULL, 1, (enum Mode)mode);
        gate_up(9, 29, 17, nine, 7, (enum Mode)mode);
        gate_up(9, 320, 40, nine, 7, (enum Mode)mode);
        gate_up(33, 40, 24, NULL, 1, (enum Mode)mode);
        gate_up(300, 17, 29, cut, 7, (enum Mode)mode);
        gate_up(300, 72, 136, cut, 7, (enum Mode)mode);
        gate_up(300, 264, 40, cut, 7, (enum Mode)mode);
        rmsnorm(1, 1, 1, 1, (enum Mode)mode);
        rmsnorm(37, 29, 58, 31, (enum Mode)mode);
        rmsnorm(300, 64, 128, 72, (enum Mode)mode);
        rmsnorm(3, 2500, 2500, 2500, (enum Mode)mode);
        rmsnorm(7, 2568, 2576, 2568, (enum Mode)mode); // longer than a block has packs
        rmsnorm(8600, 8, 8, 8, (enum Mode)mode); // more than the blocks take at once
        dispatch(1, 1, 1, 1, (enum Mode)mode);
        dispatch(150, 2, 6, 13, (enum Mode)mode);
        dispatch(300, 3, 40, 24, (enum Mode)mode);
    }
    swiglu(1);
    swiglu(1003);
    swiglu(4096);
    embedding(1, 3, 1);
    embedding(300, 11, 37);
    embedding(100, 400, 264);
    embedding(700, 60, 1032); // two teams of threads, or one and two strips
    embedding(40, 9, 2064);
    crop(3, 5, 7, 11);
    rope(37, 3, 6, 11, 40);
    rope(20, 1, 8, 8, 24);
    rope(90, 5, 16, 24, 128);
    attention(1, 1, 1, 1, 2, 1);
    attention(2, 77, 3, 3, 2, 5);
    attention(1, 64, 2, 8, 4, 8);
    attention(2, 130, 2, 32, 16, 32);
    attention(1, 193, 1, 64, 32, 48);
    attention(1, 130, 2, 128, 64, 128);
    attention(2, 200, 1, 128, 64, 128);
    attention(1, 40, 1, 200, 8, 24);
    router(1, 5, 2, 1, 1, 1, 1, SET);
    router(77, 13, 6, 2, 3, 2, 1, ADD);
    router(40, 16, 64, 6, 8, 4, 0, SET);
    router(30, 24, 100, 9, 1, 1, 1, ADD);
    balance(1, 1, 1, 1);
    balance(3, 50, 37, 5);
    balance(2, 600, 40, 3);
    cross_entropy(1, 1);
    cross_entropy(37, 257);
    cross_entropy(12, 4096);
    cross_entropy(3, 19000);
    latent(1, 1, 1, 2, 1, 1, 17);
    latent(5, 3, 8, 4, 6, 40, 17);
    latent(3, 5, 16, 8, 16, 64, 150); // bfloat16: by tensor cores, positions shared out
    latent(300, 2, 8, 16, 8, 48, 150); // not shared out, but in several tiles
    latent(100, 20, 16, 24, 8, 72, 150); // two groups of heads
    latent(2, 17, 8, 8, 8, 512, 70); // small tiles
    latent(30, 3, 8, 8, 8, 72, 250); // and several of them
    optimizers();
}

// ------------------------------------------------------------------------------------------------
// Whole models: the configurations and weights of the golden cases that test_moe.c compares with
// PyTorch, and one that trains.

static Config golden_config(const char *name)
{
    Config c = config_preset(LAPTOP);
    c.V = 256, c.C = 32, c.L = 2, c.dense = 1, c.F = 80, c.NH = 4, c.Rq = 24, c.Rkv = 16;
    c.Dn = 8, c.Dr = 4, c.Dv = 8, c.E = 8, c.K = 2, c.S = 1, c.Fe = 24, c.G = 1, c.KG = 1;
    c.norm_topk = 1, c.D = 0, c.Tmax = 64, c.eps = 1e-6, c.theta = 1e4, c.route_scale = 1;
    c.alpha = 0, c.mtp_weight = 0.3, c.yarn_factor = 0;
    if (!strcmp(name, "mla")) c.dense = 2, c.Rq = 0;
    if (!strcmp(name, "moe")) c.L = 3, c.route_scale = 2.5;
    if (!strcmp(name, "v3"))
        c.L = 3, c.route_scale = 2.5, c.G = 4, c.KG = 2, c.D = 1, c.alpha = 0.01;
    if (!strcmp(name, "yarn")) {
        c.Dr = 8, c.yarn_factor = 4, c.yarn_original = 16, c.yarn_fast = 32, c.yarn_slow = 1;
        c.yarn_mscale = c.yarn_mscale_all_dim = 1;
    }
    return c;
}

static accum golden_weight(const char *name, size_t i, size_t cols)
{
    uint32_t h = 2166136261u; // FNV-1a
    for (const char *s = name; *s; s++) h = (h ^ (unsigned char)*s) * 16777619u;
    uint32_t x = h + (uint32_t)i * 0x9E3779B9u;
    x = (x ^ x >> 16) * 0x85EBCA6Bu;
    x = (x ^ x >> 13) * 0xC2B2AE35u;
    double u = (double)((x ^ x >> 16) >> 8) * 0x1p-24 - 0.5;
    if (strstr(name, "norm.weight")) return (accum)(1 + 0.4 * u);
    if (strstr(name, "e_score_correction_bias")) return (accum)(0.2 * u);
    if (strstr(name, "embed_tokens")) return (accum)(2 * u);
    return (accum)(u * sqrt(12 / (double)cols));
}

// The nearest number of 8 bits: matrices are rounded for the CPU too, so that what is compared is
// the arithmetic.
static accum rounded(accum x)
{
    int exponent;
    double mantissa = frexp((double)x, &exponent);
    return (accum)ldexp(nearbyint(256 * mantissa), exponent - 8);
}

static Model golden_model(const Config *c)
{
    Model m = model_make(c, 1);
    for (size_t i = 0; i < m.layout.tensors; i++) {
        const Tensor *t = &m.layout.tensor[i];
        size_t n = t->rows * t->cols;
        accum *x = (accum *)host_alloc(n, sizeof(accum));
        for (size_t k = 0; k < t->count; k++) {
            char name[NAME_MAX_LENGTH];
            tensor_name(name, "", t, k);
            for (size_t j = 0; j < n; j++) x[j] = golden_weight(name, j, t->cols);
            for (size_t j = 0; j < n && tensor_dims(t) > 1; j++) x[j] = rounded(x[j]);
            model_set(&m, t, k * n, x, n);
        }
        free(x);
    }
    return m;
}

static const char text[] =
    "First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\nSpeak, speak.\n\n"
    "First Citizen:\nYou are all resolved rather to die than to famish?\n\nAll:\nResolved. "
    "resolved.\n\nFirst Citizen:\nFirst, you know Caius Marcius is chief enemy to the people.\n"
    "\nAll:\nWe know't, we know't.\n\nFirst Citizen:\nLet us kill him, and we'll have corn.";

static const struct {
    const char *name, *text;
    size_t T;
} golden[] = {
    {"mla", "First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:", 32},
    {"moe", "Second Citizen:\nWould you proceed especially against Caius Marcius", 32},
    {"v3", "itizen:\nSoft! who comes here?\n\nSecond Citizen:\nWorthy Menenius Agr", 32},
    {"yarn", "ever\nAppear in your impediment. For the dearth,\n"
             "The gods, not the patricians, make it, and\nYour kn", 48},
};

// Rounding takes a token to another expert where two score almost the same, and then nothing can be
// compared. So bfloat16 is given the choices that float made.
static void take_routing(const char *name, void *data, enum Type type, size_t n)
{
    char full[200];
    snprintf(full, sizeof full, "%s: %s", case_name, name);
    for (size_t i = 0; known && i < known->n; i++) {
        const Result *r = &known->result[i];
        if (strcmp(r->name, full)) continue;
        int *whole = (int *)host_alloc(n, sizeof(int));
        for (size_t j = 0; j < n; j++) whole[j] = (int)r->data[j];
        to_device(data, type == INT ? (void *)whole : (void *)r->data, n * sizeof(int));
        free(whole);
    }
}

static void golden_case(size_t which)
{
    const char *name = golden[which].name;
    char title[60];
    snprintf(title, sizeof title, "model %s", name);
    if (!begin(title)) return;
    size_t B = 2, T = golden[which].T, N = B * T;
    Config c = golden_config(name);
    Model m = golden_model(&c);
    Acts a = acts_make(&c, B, T, 1);
    int tokens[2 * 49];
    for (size_t i = 0; i < B * (T + 1); i++) tokens[i] = golden[which].text[i];
    acts_load(&a, tokens);
    hold_routing = known && sizeof(real) < sizeof(accum);
    for (size_t l = 0; l < layers(&c) && hold_routing; l++) {
        char label[32];
        if (!is_moe(&c, l)) continue;
        snprintf(label, sizeof label, "topk %zu", l);
        take_routing(label, a.layer[l].topk, INT, B * (l < c.L ? T : T - 1) * c.K);
        snprintf(label, sizeof label, "f %zu", l);
        take_routing(label, a.layer[l].f, ACCUM, B * c.E);
    }
    model_forward(&m, &a);
    model_backward(&m, &a, 1);
    hold_routing = 0;
    keep_array("logits", REAL, a.layer[c.L - 1].logits, N * c.V);
    Losses s = model_losses(&m, &a);
    keep_number("loss", s.total);
    for (size_t l = 0; l < layers(&c); l++) {
        char label[32];
        if (!is_moe(&c, l)) continue;
        snprintf(label, sizeof label, "topk %zu", l);
        keep_array(label, INT, a.layer[l].topk, B * (l < c.L ? T : T - 1) * c.K);
        snprintf(label, sizeof label, "f %zu", l);
        keep_array(label, ACCUM, a.layer[l].f, B * c.E);
    }
    for (size_t i = 0; i < m.layout.tensors; i++) {
        const Tensor *t = &m.layout.tensor[i];
        for (size_t k = 0; k < t->count && t->kind != ROUTER_BIAS; k++) {
            char tensor[NAME_MAX_LENGTH];
            tensor_name(tensor, "grad.", t, k);
            keep_array(tensor, ACCUM, m.grads + t->offset + k * t->rows * t->cols,
                       t->rows * t->cols);
        }
    }
    snprintf(case_name, sizeof case_name, "decode %s", name);
    Decoder d = decoder_make(&m, 2, 9, 8, 8, 40); // two texts, a window that turns
    int comparable = sizeof(real) == sizeof(accum) || !c.E || c.dense == c.L;
    for (int at = 0; at < 24; at += 4) {
        int token[8], slot[8], pos[8];
        for (int i = 0; i < 8; i++)
            slot[i] = i / 4, pos[i] = at + i % 4, token[i] = text[at + i % 4 + 40 * slot[i]];
        decode(&d, token, slot, pos, 8);
        if (at == 20 && comparable) keep_array("logits", REAL, d.a.logits, 8 * c.V);
        for (int i = 0; i < 8; i++) token[i] = text[at + i % 4 + 40 * slot[i] + 1];
        if (c.D) decode_mtp(&d, token, 8);
        // what is recorded by now knows scratch where it is no more
        if (at == 8) scratch((which + 8) << 22);
    }
    if (c.D && comparable) keep_array("MTP logits", REAL, d.a.logits, 8 * c.V);
    decoder_free(&d);
    acts_free(&a);
    model_free(&m);
}

// 20 mean losses of training from the same weights: of single steps of a small model or, on a GPU,
// of tens of steps of the laptop preset.
static void training(const char *name, int muon, Config c, size_t B, size_t T, size_t each)
{
    char title[60];
    snprintf(title, sizeof title, "training, %s", name);
    if (!begin(title)) return;
    Data text = data_load("tinyshakespeare/excerpt.txt", &c);
    Model m = model_make(&c, 1);
    model_init(&m, 1);
    Acts a = acts_make(&c, B / 2, T, 1); // two passes a step
    Optimizer o = optimizer_make(&m);
    Recipe r = {muon, 3e-3, 3e-3, 0.9, 0.95, 1e-8, 0.1, 1, 0.9, 1e-3};
    int *tokens = (int *)host_alloc(B * (T + 1), sizeof(int));
    Result *loss = keep_result("", 20);
    snprintf(loss->name, sizeof loss->name, "%s: loss", case_name);
    for (size_t step = 0; step < 20 * each; step++) {
        for (size_t b = 0; b < B; b++)
            tokens_copy(tokens + b * (T + 1),
                        text.bytes + window_start(1, step * B + b, text.n, T), T + 1);
        for (size_t half = 0; half < 2; half++) {
            acts_load(&a, tokens + half * B / 2 * (T + 1));
            model_forward_backward(&m, &a, 0.5);
            optimizer_count_load(&o, &m, &a);
            loss->data[step / each] += (float)(0.5 * model_losses(&m, &a).total / (double)each);
        }
        optimizer_step(&o, &m, &r, grad_norm(&m));
    }
    free(tokens);
    free(text.bytes);
    optimizer_free(&o);
    acts_free(&a);
    model_free(&m);
}

void RESULTS(Results *r, const Results *expected)
{
    results = r, known = expected;
    r->real_size = (int)sizeof(real);
    operations();
    for (size_t i = 0; i < sizeof golden / sizeof *golden; i++) golden_case(i);
    Config small = golden_config("moe");
    small.V = 128, small.L = 2, small.alpha = 0.01;
    training("adamw", 0, small, 2, 20, 1);
    training("muon", 1, small, 2, 20, 1);
#ifdef VERIFY_LAPTOP // takes too long in emulation
    use_threads((size_t)r->threads);
    training("laptop", 1, config_preset(LAPTOP), 8, 256, 10);
#endif
}

// ------------------------------------------------------------------------------------------------
#ifndef VERIFY_GPU

typedef struct {
    char name[60];
    size_t arrays;
    double worst, bound, cosine; // cosine: of gradients, the smallest; 0.999 at least
    char where[200];
} TableRow;

// What the error of an array may be. Sums in another order differ by rounding: in float by 1e-5 for
// an operation; bfloat16 has 8 bits, the last by chance in moments. Muon iterates a polynomial that
// enlarges errors.
static double bound_of(const char *name, int bf16)
{
    if (!strncmp(name, "training", 8)) return bf16 ? 2e-2 : 5e-3;
    if (!strncmp(name, "muon", 4)) return bf16 ? 5e-2 : 1e-4;
    if (strstr(name, "grad.")) return bf16 ? 5e-2 : 1e-4;
    return bf16 ? 2e-2 : 1e-5;
}

static double error_of(const Result *got, const Result *expected, double *cosine)
{
    double difference = 0, size = 0, product = 0, other = 0, most = 0;
    *cosine = 0;
    int curve = !strncmp(got->name, "training", 8); // of a curve the worst point counts
    for (size_t i = 0; i < got->n; i++) {
        double x = (double)got->data[i], y = (double)expected->data[i];
        difference += (x - y) * (x - y), size += y * y, product += x * y, other += x * x;
        if (!isfinite(x)) return INFINITY;
        most = fmax(most, curve ? fabs(x - y) / fabs(y) : 0);
    }
    *cosine = size > 0 ? product / sqrt(size * other) : 1;
    return curve ? most : difference == 0 ? 0 : size == 0 ? INFINITY : sqrt(difference / size);
}

int main(int argc, char **argv)
{
    Results cpu, gpu;
    memset(&cpu, 0, sizeof cpu);
    memset(&gpu, 0, sizeof gpu);
    cpu.only = gpu.only = argc > 1 ? argv[1] : "";
    double start = now();
    cpu.threads = gpu.threads = thread_count();
    use_threads(1); // sizes are small
    cpu_results(&cpu, NULL);
    gpu_results(&gpu, &cpu);
    int bf16 = gpu.real_size == 2, failed = 0;
    if (cpu.n == 0) die(BAD_INPUT, "nothing begins with %s", cpu.only);
    printf("%-20s %6s  %10s  %6s   %s\n", bf16 ? "moe.cu in bfloat16" : "moe.cu in float", "arrays",
           "worst", "bound", "where");
    static TableRow rows[99];
    size_t n = 0;
    for (size_t i = 0; i < gpu.n; i++) {
        const Result *got = &gpu.result[i], *expected = NULL;
        size_t length = (size_t)(strchr(got->name, ':') - got->name), at = 0;
        size_t same = 0, seen = 0; // not by its number alone, as a case may be left out
        for (size_t j = 0; j < i; j++) same += !strcmp(gpu.result[j].name, got->name);
        for (size_t j = 0; j < cpu.n && !expected; j++)
            if (!strcmp(cpu.result[j].name, got->name) && seen++ == same) expected = &cpu.result[j];
        if (!expected || expected->n != got->n) die(FAILED, "%s: of the GPU alone", got->name);
        char name[60];
        int gradient = !!strstr(got->name, "grad.");
        snprintf(name, sizeof name, "%.*s%s", (int)length, got->name, gradient ? " grad" : "");
        while (at < n && strcmp(rows[at].name, name)) at++;
        if (at == sizeof rows / sizeof *rows) die(FAILED, "too many rows");
        TableRow *row = &rows[at];
        if (at == n) {
            snprintf(row->name, sizeof row->name, "%s", name);
            row->bound = bound_of(got->name, bf16);
            row->cosine = 1;
            n++;
        }
        double cosine, error = error_of(got, expected, &cosine);
        row->arrays++;
        if (gradient) row->cosine = fmin(row->cosine, cosine);
        if (error <= row->worst) continue;
        row->worst = error;
        snprintf(row->where, sizeof row->where, "%s", got->name + length + 2);
    }
    for (const TableRow *row = rows; row < rows + n; row++) {
        int bad = row->worst > row->bound || row->cosine < 0.999;
        printf("%-20s %6zu  %10.2e  %6.0e   %s%s", row->name, row->arrays, row->worst, row->bound,
               row->where, bad ? "  FAIL" : "");
        if (row->cosine < 1) printf("  cosine %.6f", row->cosine);
        printf("\n");
        failed += bad;
    }
    printf("%s in %.1f s\n", failed ? "FAILED" : "agrees", now() - start);
    return failed > 0;
}
#endif
