/*
moe.c: DeepSeek in one C file.

The transformer of DeepSeek-V3, forward and backward: multi-head latent attention, a mixture of
experts balanced without an auxiliary loss, multi-token prediction; its training and generation.
The recipe of R1 on top: a model that teaches itself by reinforcement learning.
Papers, cited below as [V2] arXiv:2405.04434, [V3] arXiv:2412.19437, [R1] arXiv:2501.12948,
[YaRN] arXiv:2309.00071, [Muon] Jordan 2024 and Moonlight arXiv:2502.16982.

    section                    what                                               equations
     1  Numbers and helpers    types, errors, memory, random numbers, processes
     2  Configuration          sizes, presets                                     [V3] 4.2
     3  Parameters             the one table of all weights
     4  Operations             each backward under its forward
            matmul             x W^T, for one matrix or one per expert
            rmsnorm, swiglu, embedding
            rope               rotary positions, YaRN                             [YaRN] 3
            attention          causal, exact, no T x T matrix kept                [V2] 10
            router             sigmoid affinities, biased selection, groups       [V3] 12-16
            balance            sequence-wise balance loss                         [V3] 17-20
            dispatch, combine  tokens to experts and back                         [V3] 12
            cross_entropy
     5  The model              MLA, MoE, block, multi-token prediction            [V3] 1-25
     6  Optimizers             AdamW, Muon, the router's bias                     [V3] 2.1.2
     7  Generation             latent cache, absorbed attention, speculation      [V2] 2.1.2
     8  Reinforcement learning rollouts, advantages, GRPO's loss                  [R1] 1-3
     9  Tasks                  questions, worked answers, verifiers               [R1] 2.2.2
    10  Files                  JSON, safetensors, model directories
    11  Options                the one table of the command line
    12  Training               data, schedule, progress
    13  Self-improvement       who asks, who judges, the runs of R1
    14  Planning               parameters, work, memory, time, cost               [V3] 4.2
    15  Benchmark              the machine's limits and how near we come
    16  Commands

Sections 5 to 16 know no device: they call operations and move memory with device_*().
A pointer's comment gives its shape, rows first. An operation's outputs come before its inputs.
*/
#define _DEFAULT_SOURCE 1 // POSIX, though -std asks for C alone
#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <float.h>
#include <limits.h>
#include <math.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <time.h>
#include <unistd.h>
#ifdef _OPENMP
#include <omp.h>
#elif defined __GNUC__
#pragma GCC diagnostic ignored "-Wunknown-pragmas" // without OpenMP its pragmas mean nothing
#endif
#ifdef MOE_MPI
#define MPICH_SKIP_MPICXX // C's functions only
#define OMPI_SKIP_MPICXX
#include <mpi.h>
#endif

// ------------------------------------------------------------------------------------------------
// 1  Numbers and helpers

// real:  weights, what matrix products read, gradients of activations. accum: what norms read, the
// residual stream above all; gradients of weights, softmax statistics, routing, the weights that
// are trained. They differ only in moe.cu, where real may be bfloat16. The gradient check runs in
// double, where central differences are good to 1e-9 and a tolerance of 1e-6 means something.
#if defined MOE_DOUBLE
typedef double real;
typedef double accum;
#elif defined MOE_BF16
typedef __nv_bfloat16 real;
typedef float accum;
#else
typedef float real;
typedef float accum;
#endif
typedef real moment; // of the optimizer, for which bfloat16 is enough ([V3] 3.3.3)

#ifdef __cplusplus
#define THREAD_LOCAL thread_local
#else
#define THREAD_LOCAL _Thread_local
#endif

#ifndef MOE_EXIT // the fuzz target goes on instead
#define MOE_EXIT exit
#endif

// The processes of a run, of which `make mpi` lets there be several, and which of them this is.
static int ranks = 1, rank = 0;

// Ends the program with one line, whatever control characters stand in a file's names.
#if defined __GNUC__
__attribute__((noreturn, format(printf, 2, 3)))
#endif
static void die(int status, const char *format, ...)
{
    char text[2048];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    for (char *s = text; *s; s++)
        if (iscntrl((unsigned char)*s)) *s = '?';
    fflush(stdout);
    if (rank > 0) sleep(2); // where all fail alike, the first says so and ends all
    fprintf(stderr, "moe: %s\n", text);
#ifdef MOE_MPI
    if (ranks > 1) { // the others would wait for this one
        sleep(1);    // and mpirun takes a while to pass on what was said
        MPI_Abort(MPI_COMM_WORLD, status);
    }
#endif
    MOE_EXIT(status);
}

enum { FAILED = 1, BAD_INPUT = 2 };  // exit statuses

static size_t min_size(size_t a, size_t b) { return a < b ? a : b; }
static size_t ceil_div(size_t a, size_t b) { return (a + b - 1) / b; }

// a b, or the end of the program where a size cannot be represented.
static size_t size_mul(size_t a, size_t b)
{
    if (b && a > SIZE_MAX / 2 / b)
        die(BAD_INPUT, "sizes overflow: %zu x %zu; use a smaller model", a, b);
    return a * b;
}

// Zeroed memory, never NULL.
static void *host_alloc(size_t count, size_t size)
{
    enum { CACHE_LINE = 64, LARGE_PAGE = 1 << 21 };
    size_t bytes = size_mul(count, size), unit = bytes < 2 * LARGE_PAGE ? CACHE_LINE : LARGE_PAGE;
    size_t rounded = bytes ? ceil_div(bytes, unit) * unit : unit;
    void *p = aligned_alloc(unit, rounded);
    if (!p)
        die(FAILED, "out of memory asking for %.1f MB; use a smaller model, --batch or --seq",
            (double)bytes * 1e-6);
#ifdef MADV_HUGEPAGE // Linux may need to be asked for large pages, which are found faster
    if (unit == LARGE_PAGE) madvise(p, rounded, MADV_HUGEPAGE);
#endif
    memset(p, 0, bytes);
    return p;
}

static double now(void) // seconds
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

// Random numbers are a hash of (seed, stream, counter): nothing to save but the counter, and the
// numbers do not depend on who asks first. The finaliser is SplitMix64's.
static uint64_t random_u64(uint64_t seed, uint64_t stream, uint64_t counter)
{
    uint64_t x = seed * 0x9E3779B97F4A7C15u + stream * 0xD1B54A32D192ED03u + counter;
    for (int round = 0; round < 2; round++) {
        x += 0x9E3779B97F4A7C15u;
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
        x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
        x ^= x >> 31;
    }
    return x;
}

static double random_uniform(uint64_t seed, uint64_t stream, uint64_t counter) // in [0, 1)
{
    return (double)(random_u64(seed, stream, counter) >> 11) * 0x1p-53;
}

static double random_normal(uint64_t seed, uint64_t stream, uint64_t counter) // Box-Muller
{
    double u = 1 - random_uniform(seed, stream, 2 * counter);
    double v = random_uniform(seed, stream, 2 * counter + 1);
    return sqrt(-2 * log(u)) * cos(6.283185307179586 * v);
}

#ifdef _OPENMP
static int wait_asleep; // threads for each other
#else
enum { wait_asleep = 0 };
#endif

static void use_threads(size_t n)
{
#ifdef _OPENMP
    const char *policy = getenv("OMP_WAIT_POLICY");
    size_t asked = n ? n : (size_t)omp_get_max_threads(); // which OMP_NUM_THREADS may set
    if (asked > 1024) die(BAD_INPUT, "%zu threads; at most 1024 make sense: --threads N", asked);
    if (n > 0) omp_set_num_threads((int)n);
    wait_asleep = (policy && !strcasecmp(policy, "passive")) || (int)asked > omp_get_num_procs();
#else
    (void)n;
#endif
}

static int thread_count(void)
{
#ifdef _OPENMP
    return omp_get_max_threads();
#else
    return 1;
#endif
}

static int thread_number(void) // in its team
{
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}

// Several processes, on one machine or many, train one model: each takes its share of a step's
// batches, the gradients are added up over all, and so all take the same step (data parallel).
// Only the first writes.
#ifdef MOE_MPI
static int local_ranks, local_rank; // those of this machine, and which of them this is

static void ranks_start(int *argc, char ***argv)
{
    MPI_Comm here;
    MPI_Init(argc, argv);
    MPI_Comm_size(MPI_COMM_WORLD, &ranks);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, 0, MPI_INFO_NULL, &here);
    MPI_Comm_size(here, &local_ranks);
    MPI_Comm_rank(here, &local_rank);
    MPI_Comm_free(&here);
    int shared = getenv("OMP_NUM_THREADS") || thread_count() < sysconf(_SC_NPROCESSORS_ONLN);
    if (!shared) use_threads(ceil_div((size_t)thread_count(), (size_t)local_ranks));
    if (rank > 0 && !freopen("/dev/null", "w", stdout)) die(FAILED, "/dev/null: cannot open");
}

static void ranks_end(void)
{
    MPI_Barrier(MPI_COMM_WORLD); // mpirun ends all when one has ended with an error
    MPI_Finalize();
}

// x[0 .. n) of host memory becomes its sum or maximum over all processes.
static void ranks_reduce(void *x, size_t n, MPI_Datatype type, MPI_Op op)
{
    int size;
    MPI_Type_size(type, &size);
    for (size_t at = 0, piece; at < n; at += piece) { // MPI counts in ints
        piece = min_size(n - at, 1 << 28);
        MPI_Allreduce(MPI_IN_PLACE, (char *)x + at * (size_t)size, (int)piece, type, op,
                      MPI_COMM_WORLD);
    }
}

static void ranks_sum(double *x, size_t n) { ranks_reduce(x, n, MPI_DOUBLE, MPI_SUM); }
static void ranks_max(double *x, size_t n) { ranks_reduce(x, n, MPI_DOUBLE, MPI_MAX); }
#else
enum { local_ranks = 1 };
static void ranks_start(int *argc, char ***argv) { (void)argc, (void)argv; }
static void ranks_end(void) {}
static void ranks_sum(double *x, size_t n) { (void)x, (void)n; }
static void ranks_max(double *x, size_t n) { (void)x, (void)n; }
#endif

// ------------------------------------------------------------------------------------------------
// 2  Configuration

// Every size of a model: the papers' symbol, the key in config.json, the largest value taken (so
// that no product of sizes overflows), and the presets side by side.
#define CONFIG_SIZES(X) \
    /* symbol    key                       most    laptop moonlight deepseek-v3 */ \
    X(V,         vocab_size,               1 << 24,  256, 163840, 129280) /* 256: bytes */ \
    X(C,         hidden_size,              1 << 20,  128,   2048,   7168) /* width of a token */ \
    X(L,         num_hidden_layers,        1 << 12,    4,     27,     61) \
    X(dense,     first_k_dense_replace,    1 << 12,    1,      1,      3) /* layers without MoE */ \
    X(F,         intermediate_size,        1 << 20,  384,  11264,  18432) /* width of dense MLP */ \
    X(NH,        num_attention_heads,      1 << 12,    4,     16,    128) \
    X(Rq,        q_lora_rank,              1 << 20,   96,      0,   1536) /* 0: no query latent */ \
    X(Rkv,       kv_lora_rank,             1 << 20,   64,    512,    512) /* what is cached */ \
    X(Dn,        qk_nope_head_dim,         1 << 16,   32,    128,    128) /* head, no position */ \
    X(Dr,        qk_rope_head_dim,         1 << 16,   16,     64,     64) /* head, rotated */ \
    X(Dv,        v_head_dim,               1 << 16,   32,    128,    128) /* head, value */ \
    X(E,         n_routed_experts,         1 << 16,    8,     64,    256) \
    X(K,         num_experts_per_tok,      1 << 10,    2,      6,      8) \
    X(S,         n_shared_experts,         1 << 10,    1,      2,      1) \
    X(Fe,        moe_intermediate_size,    1 << 20,  128,   1408,   2048) /* width of an expert */ \
    X(G,         n_group,                  1 << 16,    1,      1,      8) /* groups of experts */ \
    X(KG,        topk_group,               1 << 16,    1,      1,      4) /* groups kept */ \
    X(norm_topk, norm_topk_prob,                 1,    1,      1,      1) \
    X(D,         num_nextn_predict_layers,      64,    0,      0,      1) /* MTP depths */ \
    X(Tmax,      max_position_embeddings,  1 << 24,  256,   8192, 163840)

#define CONFIG_REALS(X) \
    X(eps,         rms_norm_eps,                     1e-6,     1e-5,     1e-6) \
    X(theta,       rope_theta,                        1e4,      5e4,      1e4) \
    X(route_scale, routed_scaling_factor,             1.0,    2.446,      2.5) \
    X(alpha,       aux_loss_alpha,                   1e-4,     1e-3,     1e-4) /* balance loss */ \
    X(mtp_weight,  mtp_loss_weight,                   0.3,      0.3,      0.3) \
    X(init_std,    initializer_range,                0.02,     0.02,    0.006)

// The keys of "rope_scaling", with deepseek-v3's values; factor 0 means none.
#define CONFIG_YARN(X) \
    X(yarn_factor,         factor,                           40) \
    X(yarn_original,       original_max_position_embeddings, 4096) \
    X(yarn_fast,           beta_fast,                        32) \
    X(yarn_slow,           beta_slow,                        1) \
    X(yarn_mscale,         mscale,                           1) \
    X(yarn_mscale_all_dim, mscale_all_dim,                   1)

#define SIZE_FIELD(symbol, ...) size_t symbol;
#define DOUBLE_FIELD(symbol, ...) double symbol;
typedef struct {
    CONFIG_SIZES(SIZE_FIELD)
    CONFIG_REALS(DOUBLE_FIELD)
    CONFIG_YARN(DOUBLE_FIELD)
} Config;

enum { LAPTOP, MOONLIGHT, DEEPSEEK_V3, LAPTOP_MTP, LAPTOP_R1, PRESETS };
static const char *const preset_names[PRESETS] = {"laptop", "moonlight-16b", "deepseek-v3",
                                                  "laptop-mtp", "laptop-r1"};

static Config config_preset(int preset)
{
    Config c;
#define PRESET_SIZE(symbol, key, most, ...) PRESET_REAL(symbol, key, __VA_ARGS__)
#define PRESET_REAL(symbol, key, laptop, moonlight, v3) \
    c.symbol = preset == MOONLIGHT ? moonlight : preset == DEEPSEEK_V3 ? v3 : laptop;
#define PRESET_YARN(symbol, key, v3) c.symbol = preset == DEEPSEEK_V3 ? v3 : 0;
    CONFIG_SIZES(PRESET_SIZE)
    CONFIG_REALS(PRESET_REAL)
    CONFIG_YARN(PRESET_YARN)
    if (preset == LAPTOP_MTP) c.D = 1; // the laptop's, and a multi-token prediction layer
    if (preset == LAPTOP_R1) c.Tmax = 512; // and room to think
    return c;
}

// Dies with the key, its value and what would fit unless the sizes make a model.
static void config_check(const Config *c, const char *file)
{
#define NEED(condition, ...) \
    if (!(condition)) die(BAD_INPUT, __VA_ARGS__)
#define NEED_MOST(symbol, key, most, ...) \
    NEED(c->symbol <= (most), "%s: " #key " is %zu; it must be 0 to %d", file, c->symbol, most);
    CONFIG_SIZES(NEED_MOST)
#define NEED_POSITIVE(symbol, key) \
    NEED(c->symbol > 0, "%s: " #key " is 0; it must be at least 1", file)
    NEED_POSITIVE(V, vocab_size);
    NEED_POSITIVE(C, hidden_size);
    NEED_POSITIVE(L, num_hidden_layers);
    NEED_POSITIVE(NH, num_attention_heads);
    NEED_POSITIVE(Rkv, kv_lora_rank);
    NEED_POSITIVE(Dn, qk_nope_head_dim);
    NEED_POSITIVE(Dr, qk_rope_head_dim);
    NEED_POSITIVE(Dv, v_head_dim);
    NEED_POSITIVE(Tmax, max_position_embeddings);
    NEED(c->Dr % 2 == 0, "%s: qk_rope_head_dim is %zu; rotation takes pairs, so it must be even",
          file, c->Dr);
    if (c->dense > 0 || c->E == 0) NEED_POSITIVE(F, intermediate_size);
    if (c->E > 0) {
        NEED_POSITIVE(Fe, moe_intermediate_size);
        NEED_POSITIVE(K, num_experts_per_tok);
        NEED_POSITIVE(G, n_group);
        NEED(c->K <= c->E, "%s: num_experts_per_tok is %zu but there are only %zu experts "
              "(n_routed_experts)", file, c->K, c->E);
        NEED(c->E % c->G == 0,
             "%s: n_routed_experts %zu cannot be split in n_group %zu equal groups", file, c->E,
             c->G);
        NEED(c->KG >= 1 && c->KG <= c->G, "%s: topk_group is %zu; it must be 1 to n_group, %zu",
              file, c->KG, c->G);
        NEED(c->G == 1 || c->E / c->G >= 2, "%s: n_group %zu leaves %zu expert a group; a group's "
              "score needs 2", file, c->G, c->E / c->G);
        NEED(c->K <= c->KG * (c->E / c->G), "%s: num_experts_per_tok is %zu but topk_group %zu "
              "leaves %zu experts", file, c->K, c->KG, c->KG * (c->E / c->G));
    }
#define NEED_REAL(symbol, key, ...) \
    NEED(isfinite(c->symbol) && c->symbol >= 0, "%s: " #key " is %g; it must be 0 or more", \
          file, c->symbol);
    CONFIG_REALS(NEED_REAL)
    CONFIG_YARN(NEED_REAL)
    NEED(c->eps > 0 && c->theta > 1, "%s: rms_norm_eps must be above 0 and rope_theta above 1",
         file);
    NEED(c->yarn_factor == 0 || (c->yarn_factor >= 1 && c->yarn_original >= 1 &&
          c->yarn_fast > c->yarn_slow && c->yarn_slow > 0), "%s: rope_scaling needs factor >= 1, "
          "original_max_position_embeddings >= 1 and beta_fast > beta_slow > 0", file);
}

static int is_moe(const Config *c, size_t l) { return c->E > 0 && l >= c->dense; }
static int is_mtp(const Config *c, size_t l) { return l >= c->L; }
static size_t layers(const Config *c) { return c->L + c->D; } // MTP depth k is layer L + k - 1
static size_t depth_of(const Config *c, size_t l) { return l < c->L ? 0 : l - c->L + 1; }

// ------------------------------------------------------------------------------------------------
// 3  Parameters

// How a tensor begins and which rule trains it.
enum Kind { NORM, MATRIX, EMBEDDING, HEAD, ROUTER, ROUTER_BIAS };

// Every weight, once: C type, field, layers that have it, how many, rows, columns, kind, and its
// name in the released checkpoints. A matrix [rows, columns] maps columns numbers to rows numbers.
// What is one number for all tokens, such as a norm's gain, is never rounded.
#define MODEL_PARAMS(X) \
    X(real, embed,   1, 1, c->V, c->C, EMBEDDING, "model.embed_tokens.weight") \
    X(accum, norm,   1, 1, 1,    c->C, NORM,      "model.norm.weight") \
    X(real, lm_head, 1, 1, c->V, c->C, HEAD,      "lm_head.weight")

#define LAYER_PARAMS(X) \
    /* multi-token prediction: [V3] 21 */ \
    X(accum, enorm,   mtp, 1, 1, c->C, NORM, "enorm.weight") \
    X(accum, hnorm,   mtp, 1, 1, c->C, NORM, "hnorm.weight") \
    X(real, w_eh,     mtp, 1, c->C, 2 * c->C, MATRIX, "eh_proj.weight") \
    X(accum, head_norm, mtp, 1, 1, c->C, NORM, "shared_head.norm.weight") \
    /* multi-head latent attention: [V3] 1-11 */ \
    X(accum, attn_norm, 1, 1, 1, c->C, NORM, "input_layernorm.weight") \
    X(real, wq,       c->Rq == 0, 1, c->NH * (c->Dn + c->Dr), c->C, MATRIX, \
      "self_attn.q_proj.weight") \
    X(real, wq_a,     c->Rq, 1, c->Rq, c->C, MATRIX, "self_attn.q_a_proj.weight") \
    X(accum, q_norm,  c->Rq, 1, 1, c->Rq, NORM, "self_attn.q_a_layernorm.weight") \
    X(real, wq_b,     c->Rq, 1, c->NH * (c->Dn + c->Dr), c->Rq, MATRIX, \
      "self_attn.q_b_proj.weight") \
    X(real, wkv_a,    1, 1, c->Rkv + c->Dr, c->C, MATRIX, \
      "self_attn.kv_a_proj_with_mqa.weight") \
    X(accum, kv_norm, 1, 1, 1, c->Rkv, NORM, "self_attn.kv_a_layernorm.weight") \
    X(real, wkv_b,    1, 1, c->NH * (c->Dn + c->Dv), c->Rkv, MATRIX, \
      "self_attn.kv_b_proj.weight") \
    X(real, wo,       1, 1, c->C, c->NH * c->Dv, MATRIX, "self_attn.o_proj.weight") \
    X(accum, ffn_norm, 1, 1, 1, c->C, NORM, "post_attention_layernorm.weight") \
    /* dense feed-forward network */ \
    X(real, w_gate,   !moe, 1, c->F, c->C, MATRIX, "mlp.gate_proj.weight") \
    X(real, w_up,     !moe, 1, c->F, c->C, MATRIX, "mlp.up_proj.weight") \
    X(real, w_down,   !moe, 1, c->C, c->F, MATRIX, "mlp.down_proj.weight") \
    /* mixture of experts: [V3] 12-16 */ \
    X(real, w_router, moe, 1, c->E, c->C, ROUTER, "mlp.gate.weight") \
    X(accum, router_bias, moe, 1, 1, c->E, ROUTER_BIAS, "mlp.gate.e_score_correction_bias") \
    X(real, e_gate,   moe, c->E, c->Fe, c->C, MATRIX, "mlp.experts.%d.gate_proj.weight") \
    X(real, e_up,     moe, c->E, c->Fe, c->C, MATRIX, "mlp.experts.%d.up_proj.weight") \
    X(real, e_down,   moe, c->E, c->C, c->Fe, MATRIX, "mlp.experts.%d.down_proj.weight") \
    X(real, s_gate,   moe && c->S, 1, c->S * c->Fe, c->C, MATRIX, \
      "mlp.shared_experts.gate_proj.weight") \
    X(real, s_up,     moe && c->S, 1, c->S * c->Fe, c->C, MATRIX, \
      "mlp.shared_experts.up_proj.weight") \
    X(real, s_down,   moe && c->S, 1, c->C, c->S * c->Fe, MATRIX, \
      "mlp.shared_experts.down_proj.weight")

#define WEIGHT_FIELD(type, field, ...) type *field;
#define GRAD_FIELD(type, field, ...) accum *field;
typedef struct { MODEL_PARAMS(WEIGHT_FIELD) } ModelWeights;
typedef struct { MODEL_PARAMS(GRAD_FIELD) } ModelGrads;
typedef struct { LAYER_PARAMS(WEIGHT_FIELD) } LayerWeights;
typedef struct { LAYER_PARAMS(GRAD_FIELD) } LayerGrads;

typedef struct {
    const char *name;         // in the checkpoint, after "model.layers.<layer>." if layer >= 0
    int layer;
    enum Kind kind;
    size_t count, rows, cols; // count: the number of experts, or 1
    size_t offset;            // in elements, the same in weights, gradients and optimizer state
} Tensor;

typedef struct {
    Tensor *tensor;
    size_t tensors;           // length of tensor[]
    size_t added;             // elements of those whose gradients are added to: they lie first
    size_t elements;          // of all tensors, padding between them included
} Layout;

static size_t tensor_size(const Tensor *t) { return t->count * t->rows * t->cols; }

// Vectors have one dimension in files, matrices two.
static size_t tensor_dims(const Tensor *t)
{
    return t->kind == NORM || t->kind == ROUTER_BIAS ? 1 : 2;
}

// Whether operations only add to the gradient, so that it must be cleared first. Those of the other
// tensors are matrix products, which can set it.
static int is_added_to(const Tensor *t) { return tensor_dims(t) == 1 || t->kind == EMBEDDING; }

// Lists the tensors of a model in the table's order.
static Layout layout_make(const Config *c)
{
    Layout p = {NULL, 0, 0, 0};
#define COUNT(...) +1
    size_t most = (size_t)(MODEL_PARAMS(COUNT)) + (size_t)(LAYER_PARAMS(COUNT)) * layers(c);
    p.tensor = (Tensor *)host_alloc(most, sizeof(Tensor));
    int layer = -1;
#define LIST(type, field, present, count_, rows_, cols_, kind_, name_) \
    if (present) { \
        Tensor *t = &p.tensor[p.tensors++]; \
        t->name = name_, t->layer = layer, t->kind = kind_; \
        t->count = (size_t)(count_), t->rows = (size_t)(rows_), t->cols = (size_t)(cols_); \
    }
    MODEL_PARAMS(LIST)
    for (size_t l = 0; l < layers(c); l++) {
        int moe = is_moe(c, l), mtp = is_mtp(c, l);
        layer = (int)l;
        LAYER_PARAMS(LIST)
    }
    for (int added = 1; added >= 0; added--) {
        for (Tensor *t = p.tensor; t < p.tensor + p.tensors; t++) {
            if (is_added_to(t) != added) continue;
            size_t wide = tensor_dims(t) == 1 ? sizeof(accum) / sizeof(real) : 1; // never rounded
            t->offset = p.elements;
            p.elements += (size_mul(wide * t->count, size_mul(t->rows, t->cols)) + 15) / 16 * 16;
            size_mul(p.elements, sizeof(double) * 8);
        }
        if (added) p.added = p.elements;
    }
    return p;
}

static size_t parameters(const Layout *layout)
{
    size_t n = 0;
    for (size_t i = 0; i < layout->tensors; i++) n += tensor_size(&layout->tensor[i]);
    return n;
}

// Weights of a tensor that one token meets: of E routed experts K; none of the embedding, of which
// it copies a row.
static double active_size(const Config *c, const Tensor *t)
{
    double n = (double)tensor_size(t);
    return t->kind == EMBEDDING ? 0 : t->count > 1 ? n / (double)t->count * (double)c->K : n;
}

static double active_weights(const Config *c, const Layout *layout) // of the main model
{
    double n = 0;
    for (const Tensor *t = layout->tensor; t < layout->tensor + layout->tensors; t++)
        if (t->layer < (int)c->L) n += active_size(c, t);
    return n;
}

enum { NAME_MAX_LENGTH = 128 };

// prefix and the checkpoint's name of a tensor, or of the one that belongs to this expert.
static void tensor_name(char name[NAME_MAX_LENGTH], const char *prefix, const Tensor *t,
                        size_t expert)
{
    const char *per_expert = strstr(t->name, "%d"), *rest = per_expert ? per_expert + 2 : t->name;
    int n = snprintf(name, NAME_MAX_LENGTH, "%s", prefix);
#define NAME_PART(...) n += snprintf(name + n, (size_t)(NAME_MAX_LENGTH - n), __VA_ARGS__)
    if (t->layer >= 0) NAME_PART("model.layers.%d.", t->layer);
    if (per_expert) NAME_PART("%.*s%zu", (int)(per_expert - t->name), t->name, expert);
    NAME_PART("%s", rest);
}

// ------------------------------------------------------------------------------------------------
// 4  Operations

// A gradient has the shape of what it is the gradient of. Those of norms and the embedding are
// added to, the others set unless a mode says ADD.
//
// The threads of a team call an operation together, with the same arguments, share out its loops
// (omp for) and wait for each other at its end (team_wait); a thread that calls it alone does all
// of it. So a whole pass through the model takes one parallel region, and a small one none.
#if defined _OPENMP && !defined MOE_CUDA // on a GPU one thread gives the orders
#define TEAM _Pragma("omp parallel")
#else
#define TEAM
#endif

// What `moe bench` learns of the operations. METER, first in an operation, counts its time until it
// returns, and its work: useful floating-point operations, and the bytes that must move at least,
// every number once. What it calls belongs to it.
typedef struct {
    const char *name;
    size_t calls;
    double seconds, flops, bytes;
} Meter;

enum { METERS = 64 };
static struct {
    int on, inside; // inside: an operation is at work
    size_t count;
    Meter meter[METERS];
} metered;

typedef struct {
    Meter *meter; // NULL: not counted
    double start;
} Timer;

static void device_finish(void); // waits for operations under way

static Timer meter_start(const char *name, double flops, double bytes)
{
    Timer t = {NULL, 0};
    if (!metered.on || thread_number() > 0 || metered.inside) return t;
    size_t i = 0;
    while (i < metered.count && strcmp(metered.meter[i].name, name)) i++;
    t.meter = &metered.meter[i];
    if (i == metered.count) metered.count++, t.meter->name = name;
    t.meter->calls++;
    t.meter->flops += flops;
    t.meter->bytes += bytes;
    metered.inside = 1;
    t.start = now();
    return t;
}

static void meter_stop(Timer *t)
{
    if (!t->meter) return;
    device_finish();
    t->meter->seconds += now() - t->start;
    metered.inside = 0;
}

#define METER(name, flops, bytes) \
    Timer timer __attribute__((cleanup(meter_stop))) = \
        meter_start(name, (double)(flops), (double)(bytes)); \
    (void)timer

enum Mode { SET, ADD }; // whether an output is overwritten or added to

// Rows that belong to groups: group e owns rows offsets[e] .. offsets[e+1], or, where offsets is
// NULL, one group owns them all. So one matmul serves a plain matrix and a set of experts.
typedef struct {
    const int *offsets; // [groups + 1], device memory
    size_t groups;
    size_t rows;        // in all groups together, at most
} Rows;

static Rows all_rows(size_t rows)
{
    Rows r = {NULL, 1, rows};
    return r;
}

// Set where the choice of experts must hold still, as in gradient checks: router_forward and
// balance_forward then leave topk and f as they stood.
static int hold_routing = 0;

// What optimizers train, in elements of weights, gradients and optimizer state: a matrix, for Muon;
// a span that AdamW trains in one manner, in pieces of which `first` belong to the spans before.
typedef struct {
    size_t offset, rows, cols;
} Matrix;

enum { SPAN_PIECE = 1 << 12 };
typedef struct {
    size_t offset, size, first;
    int decays;
} Span;

#ifdef MOE_CUDA
#include "moe.cu" // the same operations, under the same names and in the same order
#else

static int team_size(void)
{
#ifdef _OPENMP
    return omp_get_num_threads();
#else
    return 1;
#endif
}

// Waits for the other threads of the team, and sees what they wrote. Where they should sleep, told
// so by OMP_WAIT_POLICY=passive or being more than the processors, that is OpenMP's barrier. But
// libgomp's makes a system call each time, and else spins for milliseconds even if another program
// has the core of the thread that is waited for.
#if defined __x86_64__
#define PAUSE() __builtin_ia32_pause()
#elif defined __aarch64__
#define PAUSE() __asm__ volatile("yield")
#else
#define PAUSE() (void)0
#endif
static void team_wait(void)
{
    enum { SPINS = 5000 }; // some 100 us
    static struct { unsigned n, pad[31]; } arrived, turn; // far apart: not in one cache line
    unsigned team = (unsigned)team_size(), before = __atomic_load_n(&turn.n, __ATOMIC_RELAXED);
    if (team == 1) return;
    if (wait_asleep) {
        #pragma omp barrier
        return;
    }
    if (__atomic_add_fetch(&arrived.n, 1, __ATOMIC_ACQ_REL) == team) {
        __atomic_store_n(&arrived.n, 0, __ATOMIC_RELAXED);
        __atomic_store_n(&turn.n, before + 1, __ATOMIC_RELEASE);
    }
    for (int spins = 0; __atomic_load_n(&turn.n, __ATOMIC_ACQUIRE) == before; spins++)
        if (spins < SPINS) PAUSE();
        else sched_yield();
}

// Memory that operations work on, its contents undefined. Here it is the host's; on a GPU not.
static void *device_alloc(size_t bytes) { return host_alloc(bytes, 1); }
static void device_free(void *p) { free(p); }
static void device_finish(void) {}
enum { PIECE = 1 << 14 }; // bytes that a thread moves at a time
static void device_zero(void *p, size_t bytes)
{
    METER(__func__, 0, bytes);
    #pragma omp for nowait
    for (size_t at = 0; at < bytes; at += PIECE)
        memset((char *)p + at, 0, min_size(PIECE, bytes - at));
    team_wait();
}
static void device_copy(void *to, const void *from, size_t bytes)
{
    METER(__func__, 0, 2 * bytes);
    #pragma omp for nowait
    for (size_t at = 0; at < bytes; at += PIECE)
        memcpy((char *)to + at, (const char *)from + at, min_size(PIECE, bytes - at));
    team_wait();
}
static void to_device(void *to, const void *from, size_t bytes) { memcpy(to, from, bytes); }
static void to_host(void *to, const void *from, size_t bytes) { memcpy(to, from, bytes); }

// n numbers from and to host memory, where they are accum.
static void reals_to_device(real *to, const accum *from, size_t n)
{
    to_device(to, from, n * sizeof(real));
}
static void reals_to_host(accum *to, const real *from, size_t n)
{
    to_host(to, from, n * sizeof(real));
}

// Bytes of memory that are free for use, by each process of this machine.
static double free_memory(void)
{
    double kilobytes = 0;
    char line[128];
    FILE *f = fopen("/proc/meminfo", "r"); // Linux; elsewhere all there is
    while (f && fgets(line, sizeof line, f))
        if (!strncmp(line, "MemAvailable:", 13)) kilobytes = strtod(line + 13, NULL);
    if (f && fclose(f)) kilobytes = 0;
    if (kilobytes > 0) return 1024 * kilobytes / local_ranks;
    return (double)sysconf(_SC_PHYS_PAGES) * (double)sysconf(_SC_PAGESIZE) / local_ranks;
}

// Scratch memory, kept from call to call: of the calling thread alone, and of its team.
static real *scratch(size_t n)
{
    static THREAD_LOCAL real *memory;
    static THREAD_LOCAL size_t size;
    if (n > size) {
        free(memory);
        memory = (real *)host_alloc(n, sizeof(real));
        size = n;
    }
    return memory;
}

static real *team_scratch(size_t n)
{
    static real *memory;
    static size_t size;
    if (thread_number() == 0 && n > size) {
        free(memory);
        memory = (real *)host_alloc(n, sizeof(real));
        size = n;
    }
    team_wait();
    return memory;
}

// A series of operations that comes again and again stands between replay_begin and replay_end. A
// GPU records it and then does all of it at once in replay_begin, which so returns 0; else 1. It
// must do the same each time, with the same pointers and numbers, but for what `key`, not 0, tells,
// and neither allocate nor copy from or to host memory.
typedef struct { int none; } Replay;
static int replay_begin(Replay *r, double key) { return (void)r, (void)key, 1; }
static void replay_end(Replay *r) { (void)r; }
static void replay_free(Replay *r) { (void)r; }

// e^x without a branch or a call, so that loops over it vectorise; within 2 ulp, 0 below e^-87.
// x = n ln 2 + r with |r| <= ln(2)/2; e^r by a polynomial, times 2^n through the exponent's bits.
#ifdef MOE_DOUBLE
static inline real fast_exp(real x) { return exp(x); }
static inline real square_root(real x) { return sqrt(x); }
#else
static inline real square_root(real x) { return sqrtf(x); }
static inline real fast_exp(real x)
{
    float y = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    float shifted = y * 1.44269504f + 12582912.0f; // adding 1.5 2^23 rounds to an integer, n
    float n = shifted - 12582912.0f;
    float r = y - n * 0.693359375f + n * 2.12194440e-4f; // ln 2 in two parts, the first exact
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    union { float f; uint32_t u; } power;
    power.f = shifted;
    power.u = (power.u + 127) << 23; // the low bits of shifted are n
    return x < -87.0f ? 0 : p * power.f;
}
#endif

static real row_max(const real *s, size_t n)
{
    real max = -INFINITY;
    #pragma omp simd reduction(max : max)
    for (size_t u = 0; u < n; u++) max = s[u] > max ? s[u] : max;
    return max;
}

// s_u = exp(scale (s_u - max)) for n numbers; returns their sum.
static accum exp_row(real *s, real max, size_t n, real scale)
{
    accum sum = 0;
    #pragma omp simd reduction(+ : sum)
    for (size_t u = 0; u < n; u++) {
        s[u] = fast_exp(scale * (s[u] - max));
        sum += s[u];
    }
    return sum;
}

static inline real sigmoid(real x) { return 1 / (1 + fast_exp(-x)); }

// Matrix product by one thread, blocked and packed as in GotoBLAS and BLIS.
//
//                            n
//                      +---+---+---+     tile of c, MR x NR       registers
//                   KC |   |b  |   |     panel of a, MR x KC      L1 (6 KB with AVX2)
//                      |   |   |   |     block of b, KC x NC      L2 (384 KB)
//            KC        +---+---+---+
//      +-----------+   +---+---+---+     For each p the kernel takes MR numbers of a and NR of
//   MR |a          |   |   |c  |   |     b and does MR x NR multiply-adds with them. From tile
//      +-----------+   +---+---+---+     to tile it goes right along c: the panel of a stays
//    m |           |   |   |   |   |     in L1 while the panels of b stream by from L2, and
//      +-----------+   +---+---+---+     the next panel of a is called in from memory.
//                        NR
//
// Packing copies panels to where the kernel reads on and on, and fills up the last with zeros. That
// of a is left out where it can be: the kernel takes single numbers of a, so it can have them from
// MR rows as well. Where MR does not divide m, the last tiles have LOW rows, or half as many.
//
// Each c(i,j) is a sum over blocks of KC, in order, of chains of fused multiply-adds in order of
// p. So its bits do not depend on m, n, the place of (i,j) or the width of the vectors.
#ifndef VBYTES // bytes in a vector register; NV of them make a row of the tile
#if defined(__AVX512F__)
#define VBYTES 64
enum { MR = 14, LOW = 8, NV = 2, DOTS = 4 }; // 32 registers: 28 for the tile, 2 for b, 1 for a
#elif defined(__AVX__)
#define VBYTES 32
enum { MR = 6, LOW = 4, NV = 2, DOTS = 2 }; // 16 registers
#elif defined(__ARM_NEON)
#define VBYTES 16
enum { MR = 8, LOW = 4, NV = 3, DOTS = 4 }; // 32 registers
#else
#define VBYTES 16
enum { MR = 6, LOW = 4, NV = 2, DOTS = 2 };
#endif
#endif
#define LANES (VBYTES / sizeof(real))
#define NR (NV * LANES)
#define KC 256
#define NC ((size_t)384) // a multiple of NR everywhere
#define INLINE static inline __attribute__((always_inline))
// Both compilers keep arrays of vectors in registers only if the loops over them are unrolled; gcc
// loads what is used twice twice, unless it is told to KEEP it.
#ifdef __clang__
#define UNROLL _Pragma("clang loop unroll(full)")
#define UNROLL_4
#else
#define UNROLL _Pragma("GCC unroll 16")
#define UNROLL_4 _Pragma("GCC unroll 4")
#endif
#if defined __x86_64__ && !defined __clang__
#define KEEP(v) __asm__("" : "+v"(v))
#elif defined __aarch64__ && !defined __clang__
#define KEEP(v) __asm__("" : "+w"(v))
#else
#define KEEP(v) (void)0
#endif

#ifdef __has_builtin
#if __has_builtin(__builtin_shufflevector)
#define SHUFFLE __builtin_shufflevector
#endif
#endif

typedef real vec __attribute__((vector_size(VBYTES)));
typedef real vec_unaligned __attribute__((vector_size(VBYTES), aligned(sizeof(real)), may_alias));

INLINE vec vec_load(const real *x) { return *(const vec_unaligned *)x; }
INLINE void vec_store(real *x, vec v) { *(vec_unaligned *)x = v; }

// A vector is also QUADS blocks of four numbers, and four vectors are the rows of as many blocks of
// 4 x 4. IN_QUADS chooses lanes of two vectors in each block alike, JOIN makes a vector of blocks.
typedef real quad __attribute__((vector_size(4 * sizeof(real)), aligned(sizeof(real)), may_alias));
#if VBYTES == 64 && !defined MOE_DOUBLE
enum { QUADS = 4 };
#define IN_QUADS(a, b, c, d) a, b, c, d, a + 4, b + 4, c + 4, d + 4, \
    a + 8, b + 8, c + 8, d + 8, a + 12, b + 12, c + 12, d + 12
#define JOIN(q) SHUFFLE(SHUFFLE(q[0], q[1], 0, 1, 2, 3, 4, 5, 6, 7), \
                        SHUFFLE(q[2], q[3], 0, 1, 2, 3, 4, 5, 6, 7), \
                        0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)
#elif VBYTES == 64 || (VBYTES == 32 && !defined MOE_DOUBLE)
enum { QUADS = 2 };
#define IN_QUADS(a, b, c, d) a, b, c, d, a + 4, b + 4, c + 4, d + 4
#define JOIN(q) SHUFFLE(q[0], q[1], 0, 1, 2, 3, 4, 5, 6, 7)
#else
enum { QUADS = 1 };
#define IN_QUADS(a, b, c, d) a, b, c, d
#define JOIN(q) q[0]
#endif
enum { WIDTH = 4 * QUADS }; // LANES, or more where a vector is less than a quad
typedef real wide __attribute__((vector_size(WIDTH * sizeof(real))));
typedef real wide_unaligned __attribute__((vector_size(WIDTH * sizeof(real)),
                                           aligned(sizeof(real)), may_alias));

// Turns each block's rows into columns.
INLINE void transpose_quads(wide x[4])
{
#ifdef SHUFFLE
#define LOW_PAIRS IN_QUADS(0, WIDTH, 1, WIDTH + 1)
#define HIGH_PAIRS IN_QUADS(2, WIDTH + 2, 3, WIDTH + 3)
    wide low02 = SHUFFLE(x[0], x[2], LOW_PAIRS), high02 = SHUFFLE(x[0], x[2], HIGH_PAIRS);
    wide low13 = SHUFFLE(x[1], x[3], LOW_PAIRS), high13 = SHUFFLE(x[1], x[3], HIGH_PAIRS);
    x[0] = SHUFFLE(low02, low13, LOW_PAIRS), x[1] = SHUFFLE(low02, low13, HIGH_PAIRS);
    x[2] = SHUFFLE(high02, high13, LOW_PAIRS), x[3] = SHUFFLE(high02, high13, HIGH_PAIRS);
#else
#undef JOIN
#define JOIN(q) *(const wide_unaligned *)q
    for (int q = 0; q < WIDTH; q += 4)
        for (int i = 0; i < 4; i++)
            for (int j = 0; j < i; j++) {
                real swap = x[i][q + j];
                x[i][q + j] = x[j][q + i], x[j][q + i] = swap;
            }
#endif
}

// x[0] becomes the sums of the lanes of x[0], x[1], x[2], x[3] within each block.
INLINE void sum_quads(wide x[4])
{
#ifdef SHUFFLE
    wide x02 = SHUFFLE(x[0], x[2], LOW_PAIRS) + SHUFFLE(x[0], x[2], HIGH_PAIRS);
    wide x13 = SHUFFLE(x[1], x[3], LOW_PAIRS) + SHUFFLE(x[1], x[3], HIGH_PAIRS);
    x[0] = SHUFFLE(x02, x13, LOW_PAIRS) + SHUFFLE(x02, x13, HIGH_PAIRS);
#else
    transpose_quads(x);
    x[0] = (x[0] + x[2]) + (x[1] + x[3]);
#endif
}

// to[j * to_row + i] = x[i * row + j] for i < WIDTH, j < 4.
INLINE void transpose_copy(real *to, size_t to_row, const real *x, size_t row)
{
    wide rows[4];
    UNROLL for (size_t i = 0; i < 4; i++) {
        quad block[QUADS];
        UNROLL for (size_t q = 0; q < QUADS; q++)
            block[q] = *(const quad *)(x + (4 * q + i) * row);
        rows[i] = JOIN(block);
    }
    transpose_quads(rows);
    UNROLL for (size_t j = 0; j < 4; j++)
        *(wide_unaligned *)(to + j * to_row) = rows[j];
}

// Copies x[n,k] to panels of `width` rows, to[i / width * panel + p * width + i % width], the last
// filled up with zeros. Element (i,p) is x[i * row + p * col].
INLINE void gemm_pack(real *to, size_t panel, const real *x, size_t row, size_t col, size_t n,
                      size_t width, size_t k)
{
    size_t whole = n / width, rest = n % width;
    if (row == 1) // p in the outer loop: x is read once, line by line
        for (size_t p = 0; p < k; p++)
            for (size_t i = 0; i < whole; i++) {
                const real *from = x + p * col + i * width;
                __builtin_prefetch(from + 4 * col);
                memcpy(to + i * panel + p * width, from, width * sizeof *to);
            }
    else
        for (size_t i = 0; i < whole; i++) {
            real *to_i = to + i * panel;
            const real *xi = x + i * width * row;
            size_t p = 0;
            for (; col == 1 && width % WIDTH == 0 && p + 4 <= k; p += 4)
                for (size_t r = 0; r < width; r += WIDTH)
                    transpose_copy(to_i + p * width + r, width, xi + r * row + p, row);
            for (; p < k; p++)
                for (size_t r = 0; r < width; r++) to_i[p * width + r] = xi[r * row + p * col];
        }
    to += whole * panel, x += whole * width * row;
    for (size_t p = 0; p < k && rest; p++)
        for (size_t r = 0; r < width; r++)
            to[p * width + r] = r < rest ? x[r * row + p * col] : 0;
}

// One tile: c[m,n] (+)= a[m,k] b[k,n], m <= tall and n <= nv * LANES. Rows of a up to `tall` and
// columns of b up to nv * LANES must be there.
INLINE void gemm_tile(real *c, size_t c_row, const real *a, size_t a_row, size_t a_col,
                      const real *b, size_t b_row, size_t m, size_t n, size_t k, int add,
                      size_t tall, int nv)
{
    vec zero = {0}, acc[MR][4 * NV]; // of which [tall, nv] are used
    UNROLL for (size_t i = 0; i < tall; i++)
        UNROLL for (int v = 0; v < nv; v++)
            acc[i][v] = zero;
    UNROLL_4 for (size_t p = 0; p < k; p++, a += a_col, b += b_row) {
        vec bp[4 * NV];
        UNROLL for (int v = 0; v < nv; v++)
            bp[v] = vec_load(b + (size_t)v * LANES);
        UNROLL for (size_t i = 0; i < tall; i++)
            UNROLL for (int v = 0; v < nv; v++)
                acc[i][v] += a[i * a_row] * bp[v];
    }

    if (m == tall && n == (size_t)nv * LANES) {
        UNROLL for (size_t i = 0; i < tall; i++)
            UNROLL for (int v = 0; v < nv; v++) {
                real *to = c + i * c_row + (size_t)v * LANES;
                vec_store(to, add ? vec_load(to) + acc[i][v] : acc[i][v]);
            }
        return;
    }
    real tile[MR][NR];
    UNROLL for (size_t i = 0; i < tall; i++)
        UNROLL for (int v = 0; v < nv; v++)
            vec_store(tile[i] + (size_t)v * LANES, acc[i][v]);
    for (size_t i = 0; i < m; i++)
        for (size_t j = 0; j < n; j++)
            c[i * c_row + j] = add ? c[i * c_row + j] + tile[i][j] : tile[i][j];
}

// Rows of c in tiles of `tall`: c[m,n] (+)= a[m,k] b[k,n], k <= KC, with b in panels of NR columns,
// b_panel numbers apart, their rows b_row apart: packed ones, or those of a matrix as it stands.
INLINE void gemm_rows(real *c, size_t c_row, const real *a, size_t a_row, size_t a_col,
                      const real *b, size_t b_panel, size_t b_row, size_t m, size_t n, size_t k,
                      int add, size_t tall)
{
    enum { PANELS = 8 }; // of a that are packed at once
    static THREAD_LOCAL real a_pack[PANELS * MR * KC];
    int in_place = a_col == 1 || (a_row == 1 && n <= 4 * NR);
    for (size_t i = 0; i < m; i += tall) {
        const real *ai = a + i * a_row;
        size_t mr = min_size(tall, m - i), row = a_row, col = a_col;
        if (!in_place || mr < tall) {
            size_t at = in_place ? 0 : i % (PANELS * tall), rows = min_size(PANELS * tall, m - i);
            if (at == 0) gemm_pack(a_pack, tall * k, ai, a_row, a_col, rows, tall, k);
            ai = a_pack + at * k, row = 1, col = tall;
        }
        for (size_t j = 0; j < n; j += NR) {
            real *cij = c + i * c_row + j;
            const real *bj = b + j / NR * b_panel;
            size_t nr = min_size(NR, n - j);
            if (col == 1 && i + 2 * tall <= m) // the next panel of a, a part with each tile
                for (size_t r = tall; r < 2 * tall; r++)
                    for (size_t p = k * j / n; p < k * (j + nr) / n; p += 16)
                        __builtin_prefetch(ai + r * row + p);
            if (nr > LANES)
                gemm_tile(cij, c_row, ai, row, col, bj, b_row, mr, nr, k, add, tall, NV);
            else
                gemm_tile(cij, c_row, ai, row, col, bj, b_row, mr, nr, k, add, tall, 1);
        }
    }
}

// How many of m rows, the last, go in lower tiles so that the fewest are padded: those of LOW rows
// and, at the end, perhaps one of half as many.
static size_t low_rows(size_t m)
{
    size_t best = 0, least = SIZE_MAX;
    for (size_t low = 0; low < MR * LOW && low < m + LOW / 2; low += LOW / 2) {
        size_t padded = low + (m > low ? ceil_div(m - low, MR) * MR : 0);
        if (padded < least) least = padded, best = min_size(low, m);
    }
    return best;
}

// The same for any k, in tiles of all heights.
static void gemm_panels(real *c, size_t c_row, const real *a, size_t a_row, size_t a_col,
                        const real *b, size_t b_panel, size_t b_row, size_t m, size_t n, size_t k,
                        int add)
{
    size_t low = low_rows(m), high = m - low, last = low % LOW <= LOW / 2 ? low % LOW : 0;
    for (size_t p = 0; p == 0 || p < k; p += KC, add = 1) { // once even if k is 0
        size_t kc = min_size(KC, k - p);
        const real *ap = a + p * a_col, *bp = b + p * b_row;
        gemm_rows(c, c_row, ap, a_row, a_col, bp, b_panel, b_row, high, n, kc, add, MR);
        gemm_rows(c + high * c_row, c_row, ap + high * a_row, a_row, a_col, bp, b_panel, b_row,
                  low - last, n, kc, add, LOW);
        gemm_rows(c + (m - last) * c_row, c_row, ap + (m - last) * a_row, a_row, a_col, bp,
                  b_panel, b_row, last, n, kc, add, LOW / 2);
    }
}

// One row times a matrix as it stands, n a multiple of NR: in wide tiles, which read whole lines.
static void gemm_one_row(real *c, const real *a, size_t a_col, const real *b, size_t b_row,
                         size_t n, size_t k, int add)
{
    for (size_t p = 0; p == 0 || p < k; p += KC, add = 1) {
        const real *ap = a + p * a_col, *bp = b + p * b_row;
        size_t j = 0, kc = min_size(KC, k - p);
#define TILES_OF(nv) \
        for (; j + (nv) * LANES <= n; j += (nv) * LANES) \
            gemm_tile(c + j, n, ap, 0, a_col, bp + j, b_row, 1, (nv) * LANES, kc, add, 1, nv);
        TILES_OF(4 * NV)
        TILES_OF(2 * NV)
        TILES_OF(NV)
    }
}

static void gemm_packed(real *c, size_t c_row, const real *a, size_t a_row, size_t a_col,
                        const real *b, size_t b_panel, size_t m, size_t n, size_t k, int add)
{
    gemm_panels(c, c_row, a, a_row, a_col, b, b_panel, NR, m, n, k, add);
}

static void gemm_blocked(real *c, size_t c_row, const real *a, size_t a_row, size_t a_col,
                         const real *b, size_t b_row, size_t b_col, size_t m, size_t n, size_t k,
                         int add)
{
    static THREAD_LOCAL real b_pack[(KC + 1) * NC];
    for (size_t j = 0; j < n; j += NC)
        for (size_t p = 0; p == 0 || p < k; p += KC) {
            size_t nc = min_size(NC, n - j), kc = min_size(KC, k - p);
            size_t panel = NR * (kc + 1); // not a power of 2: panels would share a cache's sets
            gemm_pack(b_pack, panel, b + p * b_row + j * b_col, b_col, b_row, nc, NR, kc);
            gemm_packed(c + j, c_row, a + p * a_col, a_row, a_col, b_pack, panel, m, nc, kc,
                        add || p > 0);
        }
}

// A few rows times a transposed matrix, as in decoding: to pack it would take longer than the
// product. So here the vectors run along p, for DOTS rows and four columns at once: lane l of a sum
// takes every p with p % LANES == l; then the lanes of each block of four are added, the blocks, in
// halves, and what is left of k. This order is not that of gemm_blocked.
enum { FEW = 64, AHEAD = 2048 }; // rows; numbers of b that are called for before their turn

// c[rows,4] (+)= a[rows,k] b[k,4].
INLINE void gemm_dots(real *c, size_t c_row, const real *a, size_t a_row, const real *b,
                      size_t b_col, size_t k, int add, size_t rows)
{
    vec zero = {0}, acc[DOTS][4];
    UNROLL for (size_t i = 0; i < rows; i++)
        acc[i][0] = acc[i][1] = acc[i][2] = acc[i][3] = zero;
    size_t p = 0;
    for (; p + LANES <= k; p += LANES) {
        vec bp[4];
        UNROLL for (size_t l = 0; l < 4; l++) {
            bp[l] = vec_load(b + l * b_col + p);
            if (rows > 1) KEEP(bp[l]);
        }
        UNROLL for (size_t i = 0; i < rows; i++) {
            vec ap = vec_load(a + i * a_row + p);
            KEEP(ap);
            UNROLL for (size_t l = 0; l < 4; l++)
                acc[i][l] += ap * bp[l];
        }
    }
    UNROLL for (size_t i = 0; i < rows; i++) {
        wide lane[4];
        quad sum[QUADS];
        if (sizeof(vec) < sizeof(wide)) memset(lane, 0, sizeof lane);
        UNROLL for (size_t l = 0; l < 4; l++)
            memcpy(&lane[l], &acc[i][l], sizeof(vec));
        sum_quads(lane);
        memcpy(sum, &lane[0], sizeof(wide));
        UNROLL for (size_t half = QUADS / 2; half > 0; half /= 2)
            UNROLL for (size_t q = 0; q < half; q++)
                sum[q] += sum[q + half];
        for (size_t q = p; q < k; q++) {
            quad bq = {b[q], b[b_col + q], b[2 * b_col + q], b[3 * b_col + q]};
            sum[0] += a[i * a_row + q] * bq;
        }
        real *to = c + i * c_row;
        if (add) *(quad *)to += sum[0];
        else *(quad *)to = sum[0];
    }
}

// Of the columns that come `ahead`, one after the other in memory, a part is called in with each
// row of a: all at once would hold up the product. Where a has one row the processor sees by itself
// where columns lead, unless they are short.
static void gemm_few_rows(real *c, size_t c_row, const real *a, size_t a_row, const real *b,
                          size_t b_col, size_t m, size_t n, size_t k, int add)
{
    size_t ahead = 4 * ceil_div(AHEAD, 4 * k + 1);
    size_t share = m > 1 ? 4 * k / m : k <= 64 ? 4 * k : 0;
    for (size_t j = 0; j + 4 <= n; j += 4) {
        const real *bj = b + j * b_col, *next = bj + ahead * b_col;
        size_t i = 0, called = j + ahead + 4 <= n ? share : 0; // with each row
#define ROWS_OF_DOTS(rows) \
        for (; i + (rows) <= m; i += (rows)) { \
            for (size_t p = i * called; p < (i + (rows)) * called; p += 16) \
                __builtin_prefetch(next + p); \
            gemm_dots(c + i * c_row + j, c_row, a + i * a_row, a_row, bj, b_col, k, add, rows); \
        }
        ROWS_OF_DOTS(DOTS)
        ROWS_OF_DOTS(2)
        ROWS_OF_DOTS(1)
    }
    for (size_t j = n / 4 * 4; j < n; j++) { // as the last of four columns
        size_t before = n < 4 ? 0 : 3 * b_col, step = n < 4 ? 0 : b_col;
        for (size_t i = 0; i < m; i++) {
            real dots[4], *to = c + i * c_row + j;
            gemm_dots(dots, 4, a + i * a_row, a_row, b + j * b_col - before, step, k, SET, 1);
            *to = add ? *to + dots[3] : dots[3];
        }
    }
}

// c[m,n] = a[m,k] b[k,n], or c += a b if add. Element (i,p) of a is a[i*a_row + p*a_col], likewise
// b's; (i,j) of c is c[i*c_row + j]. c must not overlap a or b.
static void gemm(real *c, size_t c_row, const real *a, size_t a_row, size_t a_col, const real *b,
                 size_t b_row, size_t b_col, size_t m, size_t n, size_t k, int add)
{
    int transpose = a_col == 1 && b_row == 1; // to pack b is to transpose it
    if (transpose && m <= FEW)
        gemm_few_rows(c, c_row, a, a_row, b, b_col, m, n, k, add);
    else if (m == 1 && b_col == 1 && n % NR == 0)
        gemm_one_row(c, a, a_col, b, b_row, n, k, add);
    else if (m <= 2 * MR && b_col == 1 && n % NR == 0) // b is not read often enough to pack it
        gemm_panels(c, c_row, a, a_row, a_col, b, NR, b_row, m, n, k, add);
    else
        gemm_blocked(c, c_row, a, a_row, a_col, b, b_row, b_col, m, n, k, add);
}

static size_t group_begin(Rows r, size_t e) { return r.offsets ? (size_t)r.offsets[e] : 0; }
static size_t group_end(Rows r, size_t e) { return r.offsets ? (size_t)r.offsets[e + 1] : r.rows; }

// Work is cut in tiles of the output. gemm packs its weights anew for each tile, so tiles are as
// tall as the threads allow and as wide as it packs at once; few rows are shared out by columns.
typedef struct {
    size_t group, row, rows, col, cols; // row counts over all groups
} Tile;

enum { TILE_ROWS = FEW }; // at least, where there are so many

// Rows of which some tiles take less time than to hand them out one by one.
static int are_few(Rows r) { return r.rows <= 4 * TILE_ROWS; }

static size_t tile_height(Rows r)
{
    size_t tall = ceil_div(r.rows, 2 * (size_t)team_size());
    if (tall < TILE_ROWS) return TILE_ROWS;
    return min_size(tall, 1024);
}

static size_t tile_width(Rows r, size_t cols)
{
    size_t share = ceil_div(ceil_div(cols, (size_t)team_size()), NR) * NR;
    return r.rows > TILE_ROWS || share > NC ? NC : share;
}

static size_t tiles_down(Rows r, size_t e, size_t tall)
{
    return ceil_div(group_end(r, e) - group_begin(r, e), tall);
}

static long count_tiles(Rows r, size_t cols)
{
    size_t n = 0, tall = tile_height(r);
    for (size_t e = 0; e < r.groups; e++) n += tiles_down(r, e, tall);
    return (long)(n * ceil_div(cols, tile_width(r, cols)));
}

static Tile find_tile(size_t i, Rows r, size_t cols)
{
    size_t tall = tile_height(r), wide = tile_width(r, cols), across = ceil_div(cols, wide);
    size_t e = 0, down;
    for (; i >= (down = tiles_down(r, e, tall)) * across; e++) i -= down * across;
    size_t begin = group_begin(r, e), rows = group_end(r, e) - begin;
    size_t panels = ceil_div(rows, MR), col = i % across * wide;
    size_t row = panels * (i / across) / down * MR;
    size_t end = min_size(panels * (i / across + 1) / down * MR, rows);
    Tile t = {e, begin + row, end - row, col, min_size(wide, cols - col)};
    return t;
}

static void matmul_tile(real *out, const real *x, const real *w, Rows r, Tile t, size_t O, size_t I,
                        enum Mode mode)
{
    real *c = out + t.row * O + t.col;
    const real *a = x + t.row * I, *b = w + (t.group * O + t.col) * I;
    // of the group, not the tile: the bits must not depend on how many threads cut it
    size_t rows = group_end(r, t.group) - group_begin(r, t.group);
    if (rows <= FEW) gemm_few_rows(c, O, a, I, b, I, t.rows, t.cols, I, mode);
    else gemm_blocked(c, O, a, I, 1, b, 1, I, t.rows, t.cols, I, mode);
}

// out = x W^T for each group e: out[n,o] = sum_i x[n,i] W_e[o,i].
static void matmul_forward(real *out,     // [rows, O], set or added to; accum if a norm reads it
                           const real *x, // [rows, I]
                           const real *w, // [groups, O, I]
                           Rows r, size_t O, size_t I, enum Mode mode)
{
    METER(r.offsets ? "experts_forward" : __func__, 2.0 * r.rows * O * I,
          (r.rows * (I + O) + r.groups * O * I) * sizeof(real));
    long tiles = count_tiles(r, O);
    if (!are_few(r)) {
        #pragma omp for schedule(dynamic) nowait
        for (long i = 0; i < tiles; i++)
            matmul_tile(out, x, w, r, find_tile((size_t)i, r, O), O, I, mode);
    } else {
        #pragma omp for schedule(static, 1) nowait
        for (long i = 0; i < tiles; i++)
            matmul_tile(out, x, w, r, find_tile((size_t)i, r, O), O, I, mode);
    }
    team_wait();
}

// out = x W^T: dx[n,i] = sum_o dout[n,o] W_e[o,i].
static void matmul_backward_x(real *dx, const real *dout, const real *w, Rows r, size_t O, size_t I,
                              enum Mode mode)
{
    METER(r.offsets ? "experts_backward_x" : __func__, 2.0 * r.rows * O * I,
          (r.rows * (I + O) + r.groups * O * I) * sizeof(real));
    long tiles = count_tiles(r, I);
    #pragma omp for schedule(dynamic) nowait
    for (long i = 0; i < tiles; i++) {
        Tile t = find_tile((size_t)i, r, I);
        gemm(dx + t.row * I + t.col, I, dout + t.row * O, O, 1,
             w + t.group * O * I + t.col, I, 1, t.rows, t.cols, O, mode);
    }
    team_wait();
}

// out = x W^T: dW_e[o,i] = sum_n dout[n,o] x[n,i].
static void matmul_backward_w(accum *dw, const real *dout, const real *x, Rows r, size_t O,
                              size_t I, enum Mode mode)
{
    METER(r.offsets ? "experts_backward_w" : __func__, 2.0 * r.rows * O * I,
          r.rows * (I + O) * sizeof(real) + r.groups * O * I * sizeof(accum));
    size_t threads = (size_t)team_size(), tall = O; // few tiles: gemm packs all of x for each
    if (r.groups < 2 * threads) tall = ceil_div(ceil_div(O, threads), MR) * MR;
    if (tall < 48) tall = 48;
    size_t down = ceil_div(O, tall), across = ceil_div(I, NC);
    #pragma omp for schedule(dynamic) nowait
    for (long t = 0; t < (long)(r.groups * down * across); t++) {
        size_t e = (size_t)t / (down * across), begin = group_begin(r, e);
        size_t o = (size_t)t / across % down * tall, i = (size_t)t % across * NC;
        gemm(dw + (e * O + o) * I + i, I, dout + begin * O + o, 1, O, x + begin * I + i, I, 1,
             min_size(tall, O - o), min_size(NC, I - i), group_end(r, e) - begin, mode);
    }
    team_wait();
}

// out = x / rms(x) * w over rows of C numbers that stand ld_out and ld_x apart.
static void rmsnorm_forward(real *out,      // [N, C]
                            accum *rstd,    // [N], 1 / rms
                            const accum *x, // [N, C]
                            const accum *w, // [C]
                            size_t N, size_t C, size_t ld_out, size_t ld_x, double eps)
{
    METER(__func__, 0, N * C * (sizeof(accum) + sizeof(real)));
    #pragma omp for nowait
    for (size_t n = 0; n < N; n++) {
        const accum *xn = x + n * ld_x;
        accum sum = 0;
        #pragma omp simd reduction(+ : sum)
        for (size_t i = 0; i < C; i++) sum += xn[i] * xn[i];
        accum r = (accum)(1 / sqrt((double)sum / (double)C + eps));
        rstd[n] = r;
        for (size_t i = 0; i < C; i++) out[n * ld_out + i] = xn[i] * r * w[i];
    }
    team_wait();
}

// out_i = x_i r w_i with r = (mean_j x_j^2 + eps)^(-1/2):
// dx_i = r (dout_i w_i - x_i r^2 mean_j(dout_j w_j x_j)),  dw_i += sum_n dout_i x_i r.
static void rmsnorm_backward(real *dx, accum *dw, const real *dout, const accum *x, const accum *w,
                             const accum *rstd, size_t N, size_t C, size_t ld_dout, size_t ld_x,
                             enum Mode mode)
{
    METER(__func__, 0, N * C * (sizeof(accum) + 2 * sizeof(real)));
    enum { ROWS = 64 }; // whose dw is summed apart, so that nobody shares a sum
    size_t parts = ceil_div(N, ROWS);
    accum *part = team_scratch(parts * C);
    #pragma omp for nowait
    for (size_t k = 0; k < parts; k++) {
        accum *dw_k = part + k * C;
        memset(dw_k, 0, C * sizeof(accum));
        for (size_t n = k * ROWS; n < min_size(N, (k + 1) * ROWS); n++) {
            const accum *xn = x + n * ld_x;
            const real *dn = dout + n * ld_dout;
            real *dxn = dx + n * ld_x;
            accum dot = 0, r = rstd[n];
            #pragma omp simd reduction(+ : dot)
            for (size_t i = 0; i < C; i++) dot += dn[i] * w[i] * xn[i];
            accum mean = dot * r * r / (accum)C;
            if (mode == SET) memset(dxn, 0, C * sizeof(real));
            for (size_t i = 0; i < C; i++) {
                dxn[i] += r * (dn[i] * w[i] - xn[i] * mean);
                dw_k[i] += dn[i] * xn[i] * r;
            }
        }
    }
    team_wait();
    for (size_t k = 0; k < parts && thread_number() == 0; k++)
        for (size_t i = 0; i < C; i++) dw[i] += part[k * C + i];
    team_wait();
}

static inline real silu(real z) { return z * sigmoid(z); }

// act = silu(gate) * up.
static void swiglu_forward(real *act,        // [n]
                           const real *gate, // [n]
                           const real *up,   // [n]
                           size_t n)
{
    METER(__func__, 0, 3 * n * sizeof(real));
    #pragma omp for simd nowait
    for (size_t i = 0; i < n; i++) act[i] = silu(gate[i]) * up[i];
    team_wait();
}

// act = silu(gate) up; silu'(z) = s + z s (1 - s) with s = sigmoid(z).
static void swiglu_backward(real *dgate, real *dup, const real *dact, const real *gate,
                            const real *up, size_t n)
{
    METER(__func__, 0, 5 * n * sizeof(real));
    #pragma omp for simd nowait
    for (size_t i = 0; i < n; i++) {
        real s = sigmoid(gate[i]), silu = gate[i] * s;
        dup[i] = dact[i] * silu;
        dgate[i] = dact[i] * up[i] * (s + silu * (1 - s));
    }
    team_wait();
}

// gate = W_gate x, up = W_up x, act = silu(gate) up: the first half of an MLP.
static void gate_up_forward(real *act,          // [rows, F]
                            real *gate,         // [rows, F]
                            real *up,           // [rows, F]
                            const real *x,      // [rows, C]
                            const real *w_gate, // [groups, F, C]
                            const real *w_up,   // [groups, F, C]
                            Rows r, size_t C, size_t F)
{
    if (!are_few(r)) {
        matmul_forward(gate, x, w_gate, r, F, C, SET);
        matmul_forward(up, x, w_up, r, F, C, SET);
        swiglu_forward(act, gate, up, r.rows * F);
        return;
    }
    METER(r.offsets ? "experts_forward" : "matmul_forward", 4.0 * r.rows * C * F,
          (r.rows * (C + 3 * F) + 2 * r.groups * C * F) * sizeof(real));
    long tiles = count_tiles(r, F);
    #pragma omp for schedule(static, 1) nowait
    for (long i = 0; i < tiles; i++) { // all of a tile at once, so that threads wait once
        Tile t = find_tile((size_t)i, r, F);
        matmul_tile(gate, x, w_gate, r, t, F, C, SET);
        matmul_tile(up, x, w_up, r, t, F, C, SET);
        for (size_t n = t.row; n < t.row + t.rows; n++)
            for (size_t j = n * F + t.col; j < n * F + t.col + t.cols; j++)
                act[j] = silu(gate[j]) * up[j];
    }
    team_wait();
}

// gate = W_gate x, up = W_up x: dx = dgate W_gate + dup W_up.
static void gate_up_backward_x(real *dx, const real *dgate, const real *dup, const real *w_gate,
                               const real *w_up, Rows r, size_t C, size_t F, enum Mode mode)
{
    matmul_backward_x(dx, dgate, w_gate, r, F, C, mode);
    matmul_backward_x(dx, dup, w_up, r, F, C, ADD);
}

// out[n] = w[token[n]].
static void embedding_forward(accum *out,       // [N, C]
                              const int *token, // [N]
                              const real *w,    // [V, C]
                              size_t N, size_t C)
{
    METER(__func__, 0, N * C * (sizeof(real) + sizeof(accum)));
    #pragma omp for nowait
    for (size_t n = 0; n < N; n++)
        memcpy(out + n * C, w + (size_t)token[n] * C, C * sizeof(real));
    team_wait();
}

// out[n] = w[token[n]]: dw[token[n]] += dout[n].
static void embedding_backward(accum *dw, const real *dout, const int *token, size_t N, size_t C)
{
    METER(__func__, 0, 2 * N * C * sizeof(real));
    enum { STRIP = 32 }; // columns that a thread sums alone, so that nobody shares a sum
    #pragma omp for nowait
    for (size_t begin = 0; begin < C; begin += STRIP) {
        size_t end = min_size(C, begin + STRIP);
        for (size_t n = 0; n < N; n++)
            for (size_t i = begin; i < end; i++) dw[(size_t)token[n] * C + i] += dout[n * C + i];
    }
    team_wait();
}

// Rows of a longer sequence that a shorter one keeps: out[b,t] = in[b,t] for t < T.
static void crop_forward(accum *out,     // [B, T, C]
                         const real *in, // [B, Tin, C], Tin >= T
                         size_t B, size_t T, size_t Tin, size_t C)
{
    #pragma omp for nowait
    for (size_t b = 0; b < B; b++)
        memcpy(out + b * T * C, in + b * Tin * C, T * C * sizeof(real));
    team_wait();
}

// out[b,t] = in[b,t]: din[b,t] = dout[b,t] for t < T, 0 after.
static void crop_backward(real *din, const real *dout, size_t B, size_t T, size_t Tin, size_t C)
{
    #pragma omp for nowait
    for (size_t b = 0; b < B; b++) {
        memcpy(din + b * Tin * C, dout + b * T * C, T * C * sizeof(real));
        memset(din + (b * Tin + T) * C, 0, (Tin - T) * C * sizeof(real));
    }
    team_wait();
}

// Turns the pair (x_2j, x_2j+1) of a row at position p by the angle p theta_j, whose cosine and
// sine stand in table[p][2j], table[p][2j+1]; backwards if sign is -1. A row holds `heads` vectors
// that stand `head` apart. out may be x.
static void rope_turn(real *out, const real *x, const int *pos, const accum *table, accum sign,
                      size_t N, size_t heads, size_t Dr, size_t ld_out, size_t ld_x, size_t head)
{
    #pragma omp for nowait
    for (size_t n = 0; n < N; n++)
        for (size_t h = 0; h < heads; h++) {
            const accum *angle = table + (size_t)pos[n] * Dr;
            const real *a = x + n * ld_x + h * head;
            real *o = out + n * ld_out + h * head;
            for (size_t j = 0; j < Dr; j += 2) {
                real even = a[j], odd = a[j + 1], cosine = angle[j], sine = sign * angle[j + 1];
                o[j] = even * cosine - odd * sine;
                o[j + 1] = even * sine + odd * cosine;
            }
        }
    team_wait();
}

// Rotary position embedding: out = R(p) x.
static void rope_forward(real *out,          // [N, heads, Dr], rows ld_out apart
                         const real *x,      // [N, heads, Dr], rows ld_x apart; accum in kv_a
                         const int *pos,     // [N]
                         const accum *table, // [Tmax, Dr]
                         size_t N, size_t heads, size_t Dr, size_t ld_out, size_t ld_x, size_t head)
{
    METER(__func__, 0, 2 * N * heads * Dr * sizeof(real));
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
// Queries go in small blocks, which see scores [ATTENTION_BLOCK, T] up to their own place: little
// is computed that the mask would hide, and nothing of T x T is kept but lse.
enum { ATTENTION_BLOCK = 28 };
#define PADDED(n) (ceil_div(n, NR) * NR) // to whole panels

// A head's keys, k_t = [k_nope_t; k_pe_t], as gemm's packed right factor K^T [Dn + Dr, T].
static void pack_keys(real *to, const real *k_nope, const real *k_pe, size_t T, size_t Dn,
                      size_t Dr, size_t ld)
{
    gemm_pack(to, NR * (Dn + Dr), k_nope, ld, 1, T, NR, Dn);
    gemm_pack(to + NR * Dn, NR * (Dn + Dr), k_pe, Dr, 1, T, NR, Dr);
}

// Of a row of scores [cols] the first `seen` count: the rest of their last vector becomes -inf,
// what follows 0. Returns where that begins.
static size_t mask_row(real *s, size_t seen, size_t cols)
{
    size_t end = ceil_div(seen, LANES) * LANES;
    for (size_t u = seen; u < end; u++) s[u] = -INFINITY;
    for (size_t u = end; u < cols; u++) s[u] = 0;
    return end;
}

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
    size_t Dq = Dn + Dr, ld = NH * (Dn + Dv);
    #pragma omp for nowait
    for (size_t bh = 0; bh < B * NH; bh++) {
        size_t b = bh / NH, h = bh % NH;
        real *k = scratch(PADDED(T) * (Dq + ATTENTION_BLOCK) + PADDED(Dv) * T);
        real *v = k + PADDED(T) * Dq, *p = v + PADDED(Dv) * T;
        const real *k_nope = kv + b * T * ld + h * (Dn + Dv);
        pack_keys(k, k_nope, k_pe + b * T * Dr, T, Dn, Dr, ld);
        gemm_pack(v, NR * T, k_nope + Dn, 1, ld, Dv, NR, T);
        for (size_t t = 0; t < T; t += ATTENTION_BLOCK) {
            size_t rows = min_size(ATTENTION_BLOCK, T - t), cols = t + rows, ld = PADDED(cols);
            real *ot = out + ((b * T + t) * NH + h) * Dv;
            size_t end[ATTENTION_BLOCK];
            real max[ATTENTION_BLOCK];
            accum sum[ATTENTION_BLOCK];
            gemm_packed(p, ld, q + ((b * T + t) * NH + h) * Dq, NH * Dq, 1, k, NR * Dq, rows,
                        ld, Dq, SET);
            // loop by loop over all rows: of one alone each number waits for the one before
            for (size_t i = 0; i < rows; i++) {
                end[i] = mask_row(p + i * ld, t + i + 1, cols);
                max[i] = row_max(p + i * ld, end[i]);
            }
            for (size_t i = 0; i < rows; i++)
                sum[i] = exp_row(p + i * ld, max[i], end[i], (real)scale);
            for (size_t i = 0; i < rows; i++)
                lse[bh * T + t + i] = (accum)(scale * max[i] + log((double)sum[i]));
            gemm_packed(ot, NH * Dv, p, ld, 1, v, NR * T, rows, Dv, cols, SET);
            for (size_t i = 0; i < rows; i++)
                for (size_t j = 0; j < Dv; j++) ot[i * NH * Dv + j] /= sum[i];
        }
    }
    team_wait();
}

// out_t = sum_u p_tu v_u, p = softmax(scale q k^T), so with dp_tu = dout_t . v_u
//     dv_u += sum_t p_tu dout_t,     ds_tu = scale p_tu (dp_tu - dout_t . out_t),
//     dq_t  = sum_u ds_tu k_u,       dk_u += sum_t ds_tu q_t.
static void attention_backward(real *dq, real *dkv, real *dk_pe, real *dk_pe_heads,
                               const real *dout, const real *out, const accum *lse, const real *q,
                               const real *kv, const real *k_pe, size_t B, size_t T, size_t NH,
                               size_t Dn, size_t Dr, size_t Dv, double scale)
{
    METER(__func__, 2.0 * (double)(B * NH * T * T) * (double)(Dn + Dr + Dv),
          2 * B * T * (NH * (2 * Dn + Dr + 2 * Dv) + Dr) * sizeof(real));
    size_t Dq = Dn + Dr, Dkv = Dn + Dv, ld = NH * Dkv;
    #pragma omp for nowait
    for (size_t bh = 0; bh < B * NH; bh++) {
        size_t b = bh / NH, h = bh % NH;
        const real *k_nope = kv + b * T * ld + h * Dkv, *k_pe_b = k_pe + b * T * Dr;
        real *kt = scratch(PADDED(T) * (Dq + Dv + 2 * ATTENTION_BLOCK) +
                           (PADDED(Dn) + PADDED(Dr)) * T);
        real *vt = kt + PADDED(T) * Dq, *kn = vt + PADDED(T) * Dv, *kr = kn + PADDED(Dn) * T;
        real *p = kr + PADDED(Dr) * T, *dp = p + ATTENTION_BLOCK * PADDED(T);
        real *dk = dkv + b * T * ld + h * Dkv, *dk_pe_h = dk_pe_heads + bh * T * Dr;
        pack_keys(kt, k_nope, k_pe_b, T, Dn, Dr, ld);
        gemm_pack(vt, NR * Dv, k_nope + Dn, ld, 1, T, NR, Dv);
        gemm_pack(kn, NR * T, k_nope, 1, ld, Dn, NR, T);
        gemm_pack(kr, NR * T, k_pe_b, 1, Dr, Dr, NR, T);
        for (size_t block = ceil_div(T, ATTENTION_BLOCK); block-- > 0;) { // the last sees all keys
            size_t t = block * ATTENTION_BLOCK, rows = min_size(ATTENTION_BLOCK, T - t);
            size_t cols = t + rows, ld_p = PADDED(cols);
            enum Mode mode = cols == T ? SET : ADD;
            const real *qt = q + ((b * T + t) * NH + h) * Dq;
            const real *ot = out + ((b * T + t) * NH + h) * Dv;
            const real *dot = dout + ((b * T + t) * NH + h) * Dv;
            real *dqt = dq + ((b * T + t) * NH + h) * Dq;
            gemm_packed(p, ld_p, qt, NH * Dq, 1, kt, NR * Dq, rows, ld_p, Dq, SET);
            gemm_packed(dp, ld_p, dot, NH * Dv, 1, vt, NR * Dv, rows, ld_p, Dv, SET);
            for (size_t i = 0; i < rows; i++) {
                real *s = p + i * ld_p, *ds = dp + i * ld_p;
                size_t end = mask_row(s, t + i + 1, cols);
                accum mean = 0, log_sum = lse[bh * T + t + i];
                #pragma omp simd reduction(+ : mean)
                for (size_t j = 0; j < Dv; j++) mean += dot[i * NH * Dv + j] * ot[i * NH * Dv + j];
                for (size_t u = 0; u < end; u++) {
                    s[u] = fast_exp((real)scale * s[u] - log_sum);
                    ds[u] = (real)scale * s[u] * (ds[u] - mean);
                }
                for (size_t u = end; u < cols; u++) ds[u] = 0;
            }
            gemm(dk + Dn, ld, p, 1, ld_p, dot, NH * Dv, 1, cols, Dv, rows, mode);
            gemm(dk, ld, dp, 1, ld_p, qt, NH * Dq, 1, cols, Dn, rows, mode);
            gemm(dk_pe_h, Dr, dp, 1, ld_p, qt + Dn, NH * Dq, 1, cols, Dr, rows, mode);
            gemm_packed(dqt, NH * Dq, dp, ld_p, 1, kn, NR * T, rows, Dn, cols, SET);
            gemm_packed(dqt + Dn, NH * Dq, dp, ld_p, 1, kr, NR * T, rows, Dr, cols, SET);
        }
    }
    team_wait();
    #pragma omp for nowait
    for (size_t bt = 0; bt < B * T; bt++)
        for (size_t j = 0; j < Dr; j++) {
            accum sum = 0;
            for (size_t h = 0; h < NH; h++)
                sum += dk_pe_heads[((bt / T * NH + h) * T + bt % T) * Dr + j];
            dk_pe[bt * Dr + j] = sum;
        }
    team_wait();
}

// Indices of the K largest of n values, in falling order; of equal ones the first.
static void top_k(int *index, const accum *value, size_t n, size_t K)
{
    for (size_t i = 0, kept = 0; i < n; i++) {
        if (kept == K && !(value[i] > value[index[K - 1]])) continue;
        size_t at = kept < K ? kept++ : K - 1;
        for (; at > 0 && value[i] > value[index[at - 1]]; at--) index[at] = index[at - 1];
        index[at] = (int)i;
    }
}

// Sends each token to K experts ([V3] 12-16). s = sigmoid(x W^T); selection looks at s + bias: a
// group of experts scores the sum of its two best, KG groups stay, the K best in them are taken.
// Their weights come from s alone: g_k = s_k / (sum of the selected + 1e-20), if norm, times scale.
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
    enum { TOKENS = 16 }; // in a row, that a thread has
    size_t size = E / G;  // of a group
    #pragma omp for schedule(static, TOKENS) nowait
    for (size_t n = 0; n < N; n++) {
        accum *sn = s + n * E;
        real *choice = scratch(E + G + 2 * KG), *group_score = choice + E;
        if (n % TOKENS == 0)
            gemm(sn, E, x + n * C, C, 1, w, 1, C, min_size(TOKENS, N - n), E, C, SET);
        for (size_t e = 0; e < E; e++) {
            sn[e] = sigmoid(sn[e]);
            choice[e] = sn[e] + bias[e];
        }
        if (G > 1) {
            int two[2], *kept = (int *)(group_score + G);
            for (size_t i = 0; i < G; i++) {
                top_k(two, choice + i * size, size, 2);
                group_score[i] =
                    choice[i * size + (size_t)two[0]] + choice[i * size + (size_t)two[1]];
            }
            top_k(kept, group_score, G, KG);
            for (size_t i = 0; i < G; i++) {
                int keep = 0;
                for (size_t j = 0; j < KG; j++) keep |= kept[j] == (int)i;
                for (size_t e = i * size; e < (i + 1) * size && !keep; e++) choice[e] = -INFINITY;
            }
        }
        int *taken = topk + n * K;
        if (!hold_routing) top_k(taken, choice, E, K);
        accum sum = 0;
        for (size_t k = 0; k < K; k++) sum += sn[taken[k]];
        for (size_t k = 0; k < K; k++)
            g[n * K + k] =
                (accum)scale * (norm ? sn[taken[k]] / (sum + (accum)1e-20) : sn[taken[k]]);
    }
    team_wait();
}

// The selection is a constant. With S = sum of the selected s + 1e-20 and g_k = scale s_k / S:
//     ds_k += scale / S (dg_k - sum_j dg_j s_j / S);   without norm  ds_k += scale dg_k.
// s = sigmoid(z), z = x W^T:   dz = ds s (1 - s),  dx += dz W,  dW = dz^T x as mode says.
static void router_backward(real *dx, accum *dw, accum *ds, const accum *dg, const accum *s,
                            const int *topk, const real *x, const real *w, size_t N, size_t C,
                            size_t E, size_t K, int norm, double scale, enum Mode mode)
{
    METER(__func__, 4.0 * N * E * C,
          (2 * N + E) * C * sizeof(real) + (3 * N + C) * E * sizeof(accum));
    #pragma omp for nowait
    for (size_t n = 0; n < N; n++) {
        const accum *sn = s + n * E, *dgn = dg + n * K;
        const int *taken = topk + n * K;
        accum *dsn = ds + n * E, sum = (accum)1e-20, dot = 0;
        for (size_t k = 0; k < K; k++) sum += sn[taken[k]];
        for (size_t k = 0; k < K; k++) dot += dgn[k] * sn[taken[k]] / sum;
        for (size_t k = 0; k < K; k++)
            dsn[taken[k]] += (accum)scale * (norm ? (dgn[k] - dot) / sum : dgn[k]);
        for (size_t e = 0; e < E; e++) dsn[e] *= sn[e] * (1 - sn[e]);
    }
    team_wait();
    matmul_backward_x(dx, ds, w, all_rows(N), E, C, ADD);
    matmul_backward_w(dw, ds, x, all_rows(N), E, C, mode);
}

// Sequence-wise balance loss ([V3] 17-20), for each sequence
//     loss = sum_i f_i P_i,  P_i = mean_t s_ti / sum_j s_tj,
//     f_i = E / (K T) * the number of tokens with i among the K best of s, bias and groups aside.
static void balance_forward(accum *loss,    // [B]
                            accum *f,       // [B, E]
                            const accum *s, // [B, T, E]
                            size_t B, size_t T, size_t E, size_t K)
{
    METER(__func__, 0, B * T * E * sizeof(accum));
    #pragma omp for nowait
    for (size_t b = 0; b < B; b++) {
        real *P = scratch(E + K);
        int *best = (int *)(P + E);
        accum *fb = f + b * E;
        for (size_t e = 0; e < E; e++) P[e] = 0;
        for (size_t e = 0; e < E && !hold_routing; e++) fb[e] = 0;
        for (size_t t = 0; t < T; t++) {
            const accum *st = s + (b * T + t) * E;
            accum sum = 0;
            for (size_t e = 0; e < E; e++) sum += st[e];
            for (size_t e = 0; e < E; e++) P[e] += st[e] / (sum * (accum)T);
            if (hold_routing) continue;
            top_k(best, st, E, K);
            for (size_t k = 0; k < K; k++) fb[best[k]] += (accum)E / (accum)(K * T);
        }
        loss[b] = 0;
        for (size_t e = 0; e < E; e++) loss[b] += fb[e] * P[e];
    }
    team_wait();
}

// loss = sum_i f_i mean_t s_ti / S_t with S_t = sum_j s_tj, f a constant:
//     ds_ti = dloss / T (f_i / S_t - sum_j f_j s_tj / S_t^2).
static void balance_backward(accum *ds, double dloss, const accum *f, const accum *s, size_t B,
                             size_t T, size_t E)
{
    METER(__func__, 0, 2 * B * T * E * sizeof(accum));
    #pragma omp for nowait
    for (size_t n = 0; n < B * T; n++) {
        const accum *fb = f + n / T * E, *sn = s + n * E;
        accum sum = 0, dot = 0;
        for (size_t e = 0; e < E; e++) sum += sn[e], dot += fb[e] * sn[e];
        for (size_t e = 0; e < E; e++)
            ds[n * E + e] = (accum)(dloss / (double)T) * (fb[e] - dot / sum) / sum;
    }
    team_wait();
}

// Sorts the N K choices of experts by expert, tokens in order within one, and copies the tokens
// there: xs[row[n,k]] = x[n]. Expert e then owns rows offsets[e] .. offsets[e+1].
static void dispatch_forward(real *xs,        // [N K, C]
                             int *offsets,    // [E + 1]
                             int *row,        // [N, K]
                             const real *x,   // [N, C]
                             const int *topk, // [N, K]
                             size_t N, size_t K, size_t E, size_t C)
{
    METER(__func__, 0, 2 * N * K * C * sizeof(real));
    if (thread_number() == 0) {
        memset(offsets, 0, (E + 1) * sizeof(int));
        for (size_t i = 0; i < N * K; i++) offsets[topk[i] + 1]++;
        for (size_t e = 0; e < E; e++) offsets[e + 1] += offsets[e];
        for (size_t i = 0; i < N * K; i++) row[i] = offsets[topk[i]]++;
        for (size_t e = E; e > 0; e--) offsets[e] = offsets[e - 1]; // each had moved to its end
        offsets[0] = 0;
    }
    team_wait();
    #pragma omp for nowait
    for (size_t i = 0; i < N * K; i++)
        memcpy(xs + (size_t)row[i] * C, x + i / K * C, C * sizeof(real));
    team_wait();
}

// xs[row[n,k]] = x[n]: dx[n] = sum_k dxs[row[n,k]].
static void dispatch_backward(real *dx, const real *dxs, const int *row, size_t N, size_t K,
                              size_t C, enum Mode mode)
{
    METER(__func__, 0, N * (K + 1) * C * sizeof(real));
    #pragma omp for nowait
    for (size_t n = 0; n < N; n++) {
        if (mode == SET) memset(dx + n * C, 0, C * sizeof(real));
        for (size_t k = 0; k < K; k++) {
            const real *from = dxs + (size_t)row[n * K + k] * C;
            for (size_t i = 0; i < C; i++) dx[n * C + i] += from[i];
        }
    }
    team_wait();
}

// y[n] = h[n] + sum_k g[n,k] out[row[n,k]]. y may be h.
static void combine_forward(accum *y,        // [N, C]
                            const accum *h,  // [N, C]
                            const real *out, // [N K, C]
                            const accum *g,  // [N, K]
                            const int *row,  // [N, K]
                            size_t N, size_t K, size_t C)
{
    METER(__func__, 0, N * C * (K * sizeof(real) + 2 * sizeof(accum)));
    #pragma omp for nowait
    for (size_t n = 0; n < N; n++)
        for (size_t k = 0; k < K; k++) {
            const accum *sum = (k ? y : h) + n * C;
            const real *from = out + (size_t)row[n * K + k] * C;
            for (size_t i = 0; i < C; i++) y[n * C + i] = sum[i] + g[n * K + k] * from[i];
        }
    team_wait();
}

// y[n] = h[n] + sum_k g[n,k] out[row[n,k]]:
//     dout[row[n,k]] = g[n,k] dy[n],   dg[n,k] = dy[n] . out[row[n,k]].
static void combine_backward(real *dout, accum *dg, const real *dy, const real *out, const accum *g,
                             const int *row, size_t N, size_t K, size_t C)
{
    METER(__func__, 0, N * (2 * K + 1) * C * sizeof(real));
    #pragma omp for nowait
    for (size_t n = 0; n < N; n++)
        for (size_t k = 0; k < K; k++) {
            size_t at = (size_t)row[n * K + k] * C;
            accum dot = 0;
            #pragma omp simd reduction(+ : dot)
            for (size_t i = 0; i < C; i++) {
                dout[at + i] = g[n * K + k] * dy[n * C + i];
                dot += dy[n * C + i] * out[at + i];
            }
            dg[n * K + k] = dot;
        }
    team_wait();
}

// loss[n] = lse[n] - z[n, target[n]] with z = logits / temperature and lse = log sum exp z.
static void cross_entropy_forward(accum *loss,        // [N] -log p(target)
                                  accum *lse,         // [N]
                                  const real *logits, // [N, V]
                                  const int *target,  // [N]
                                  double temperature, size_t N, size_t V)
{
    METER(__func__, 0, N * V * sizeof(real));
    real beta = (real)(1 / temperature);
    #pragma omp for nowait
    for (size_t n = 0; n < N; n++) {
        const real *z = logits + n * V;
        real max = row_max(z, V);
        accum sum = 0;
        #pragma omp simd reduction(+ : sum)
        for (size_t v = 0; v < V; v++) sum += fast_exp(beta * (z[v] - max));
        lse[n] = (accum)(beta * max + log((double)sum));
        loss[n] = lse[n] - beta * z[target[n]];
    }
    team_wait();
}

// loss = lse - z_target: dlogits_v = scale dloss / temperature (exp(z_v - lse) - [v = target]).
static void cross_entropy_backward(real *dlogits, double scale,
                                   const accum *dloss, // [N]
                                   const accum *lse, const real *logits, const int *target,
                                   double temperature, size_t N, size_t V)
{
    METER(__func__, 0, 2 * N * V * sizeof(real));
    real beta = (real)(1 / temperature);
    #pragma omp for nowait
    for (size_t n = 0; n < N; n++) {
        const real *z = logits + n * V;
        real *dz = dlogits + n * V, d = (real)scale * dloss[n] * beta;
        for (size_t v = 0; v < V; v++) dz[v] = d * fast_exp(beta * z[v] - lse[n]);
        dz[target[n]] -= d;
    }
    team_wait();
}

// Attention over a cache of latents, queries of any sequences at any positions ([V2] 2.1.2). Keys
// and values are never formed: with W_b = [W_uk; W_uv] of head h,
//     q_nope . (W_uk c) = (W_uk^T q_nope) . c,   sum_u p_u W_uv c_u = W_uv (sum_u p_u c_u).
// Row n belongs to sequence slot[n]; the entry of position u stands at u mod capacity, and the
// last `window` positions are seen.
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
    size_t Dq = Dn + Dr, ld = Rkv + Dr;
    real *sums = latent + n * NH * Rkv;
    #pragma omp for nowait
    for (size_t h = 0; h < NH; h++)
        gemm(latent + h * n * Rkv, Rkv, q + h * Dq, NH * Dq, 1, w_b + h * (Dn + Dv) * Rkv,
             Rkv, 1, n, Rkv, Dn, SET);
    team_wait();
    size_t parts = min_size(NH, ceil_div((size_t)team_size(), n)); // of the heads, if rows are few
    #pragma omp for schedule(static, 1) nowait
    for (size_t k = 0; k < n * parts; k++) { // heads at once: they see the same latents
        size_t i = k / parts, h0 = k % parts * NH / parts, H = (k % parts + 1) * NH / parts - h0;
        size_t last = (size_t)pos[i], seen = min_size(last + 1, window), first = last + 1 - seen;
        size_t row = ceil_div(seen, LANES) * LANES;           // of scores, in whole vectors
        real *qi = scratch(H * (ld + row)), *p = qi + H * ld; // [H, Rkv + Dr], [H, row]
        real *o = sums + (h0 * n + i) * Rkv;                  // [H, Rkv], n rows apart
        size_t at, len, u;
        for (size_t h = 0; h < H; h++) {
            memcpy(qi + h * ld, latent + ((h0 + h) * n + i) * Rkv, Rkv * sizeof(real));
            memcpy(qi + h * ld + Rkv, q + (i * NH + h0 + h) * Dq + Dn, Dr * sizeof(real));
        }
#define EACH_PIECE /* of the ring, which may begin anew in between: `len` entries from `at` on */ \
    for (u = 0; u < seen && (at = (first + u) % capacity, \
                             len = min_size(seen - u, capacity - at), \
                             at += (size_t)slot[i] * capacity, 1); u += len)
        EACH_PIECE gemm(p + u, row, qi, ld, 1, cache + at * ld, 1, ld, H, len, ld, SET);
        for (size_t h = 0; h < H; h++) {
            real *s = p + h * row;
            mask_row(s, seen, row);
            real share = 1 / exp_row(s, row_max(s, row), row, (real)scale);
            for (u = 0; u < row; u++) s[u] *= share;
        }
        EACH_PIECE gemm(o, n * Rkv, p + u, row, 1, cache + at * ld, ld, 1, H, Rkv, len, u > 0);
    }
    team_wait();
    #pragma omp for nowait
    for (size_t h = 0; h < NH; h++)
        gemm(out + h * Dv, NH * Dv, sums + h * n * Rkv, Rkv, 1,
             w_b + (h * (Dn + Dv) + Dn) * Rkv, 1, Rkv, n, Dv, Rkv, SET);
    team_wait();
}

// Copies new entries into such a cache: row n goes to position pos[n] of sequence slot[n].
static void cache_store(real *cache,      // [slots, capacity, Rkv + Dr]
                        const real *c_kv, // [n, Rkv]
                        const real *k_pe, // [n, Dr]
                        const int *slot,  // [n]
                        const int *pos,   // [n]
                        size_t n, size_t Rkv, size_t Dr, size_t capacity)
{
    #pragma omp for nowait
    for (size_t i = 0; i < n; i++) {
        size_t at = (size_t)slot[i] * capacity + (size_t)pos[i] % capacity;
        real *entry = cache + at * (Rkv + Dr);
        memcpy(entry, c_kv + i * Rkv, Rkv * sizeof(real));
        memcpy(entry + Rkv, k_pe + i * Dr, Dr * sizeof(real));
    }
    team_wait();
}

#endif // not MOE_CUDA

// ------------------------------------------------------------------------------------------------
// 5  The model

typedef struct {
    Config config;
    Layout layout;
    real *weights;      // [layout.elements] as operations read them
    accum *master;      // [layout.elements] as they are trained and saved: weights itself or,
                        // where real is shorter, a copy of its own, NULL unless training
    accum *grads;       // [layout.elements], NULL unless training
    enum Mode grads_mode; // of the next backward pass: SET after a step
    ModelWeights w;     // pointers into weights
    ModelGrads dw;      // pointers into grads
    LayerWeights *layer; // [L + D]
    LayerGrads *dlayer;  // [L + D]
} Model;

static void *device_zeros(size_t count, size_t size)
{
    void *p = device_alloc(size_mul(count, size));
    device_zero(p, count * size);
    return p;
}

static Model model_make(const Config *c, int training)
{
    Model m;
    m.config = *c;
    m.layout = layout_make(c);
    m.weights = (real *)device_zeros(m.layout.elements, sizeof(real));
    m.master = sizeof(real) == sizeof(accum) ? (accum *)m.weights : !training ? NULL :
               (accum *)device_zeros(m.layout.elements, sizeof(accum));
    m.grads = training ? (accum *)device_zeros(m.layout.elements, sizeof(accum)) : NULL;
    m.grads_mode = SET;
    m.layer = (LayerWeights *)host_alloc(layers(c), sizeof(LayerWeights));
    m.dlayer = (LayerGrads *)host_alloc(layers(c), sizeof(LayerGrads));
    const Tensor *t = m.layout.tensor;
#define BIND(type, field, present, ...) \
    w->field = (present) ? (type *)(m.weights + t->offset) : NULL; \
    dw->field = (present) && training ? m.grads + t->offset : NULL; \
    if (present) t++;
    {
        ModelWeights *w = &m.w;
        ModelGrads *dw = &m.dw;
        MODEL_PARAMS(BIND)
    }
    for (size_t l = 0; l < layers(c); l++) {
        LayerWeights *w = &m.layer[l];
        LayerGrads *dw = &m.dlayer[l];
        int moe = is_moe(c, l), mtp = is_mtp(c, l);
        LAYER_PARAMS(BIND)
    }
    return m;
}

// Whether the weights are trained in another copy than the one operations read.
static int has_master(const Model *m) { return m->master && (void *)m->master != m->weights; }

static void model_free(Model *m)
{
    if (has_master(m)) device_free(m->master);
    device_free(m->weights);
    device_free(m->grads);
    free(m->layout.tensor);
    free(m->layer);
    free(m->dlayer);
}

// Sets n weights of tensor t from element i on.
static void model_set(Model *m, const Tensor *t, size_t i, const accum *x, size_t n)
{
    if (has_master(m)) to_device(m->master + t->offset + i, x, n * sizeof(accum));
    if (tensor_dims(t) == 1)
        to_device((accum *)(m->weights + t->offset) + i, x, n * sizeof(accum));
    else
        reals_to_device(m->weights + t->offset + i, x, n);
}

// Norms begin at 1, the router's bias at 0, matrices normal with standard deviation init_std.
static void model_init(Model *m, uint64_t seed)
{
    for (size_t i = 0; i < m->layout.tensors; i++) {
        const Tensor *t = &m->layout.tensor[i];
        size_t n = tensor_size(t);
        accum *x = (accum *)host_alloc(n, sizeof(accum));
        #pragma omp parallel for
        for (size_t j = 0; j < n; j++)
            x[j] = t->kind == NORM ? 1 : t->kind == ROUTER_BIAS ? 0 :
                   (accum)(m->config.init_std * random_normal(seed, 1 + i, j));
        model_set(m, t, 0, x, n);
        free(x);
    }
}

// A block, by the names of its weights and of what it computes, a row for each token. Decoding
// keeps c_kv and k_pe of all tokens and nothing else.
//
//   x -+- norm - xn -+- wq_a - q_a - norm - c_q - wq_b - rope - q ------------+
//      |             |                                                        |
//      |             +- wkv_a -+- norm - c_kv - wkv_b - kv: k_nope, v --- attention - o - wo -+
//      |                       |                                              |               |
//      |                       +- rope - k_pe --------------------------------+               |
//      |                                                                                      |
//      +--------------------------------------------------------------------------------------+- h
//
//   h -+- norm - hn -+- w_router - s - best K of s + bias - topk, g ----------------+
//      |             |                                       |                      |
//      |             +----------------------------------- dispatch - xs - experts - combine --+
//      |             |                                                                        |
//      |             +- shared experts -------------------------------------------------------+
//      |                                                                                      |
//      +--------------------------------------------------------------------------------------+- y
//
// Everything a layer computes, once: type, field, which layers have it, whether its value, its
// gradient or both are kept, rows, columns. N rows are N tokens; routed experts see K of each.
// What norms read is accum and its gradient real, so that this has a field of its own.
enum { ALL = 1, FIRST = 2, LAST = 4, DENSE = 8, MOE = 16, MTP = 32 }; // sets of layers
enum { VALUE = 1, GRADIENT = 2, BOTH = 3 };

#define LAYER_ACTS(X) \
    X(accum, e,       MTP,   VALUE, N, c->C)                   /* embedding of the token ahead */ \
    X(real,  de,      MTP,   GRADIENT, N, c->C) \
    X(accum, h_prev,  MTP,   VALUE, N, c->C)                   /* what the previous head saw */ \
    X(real,  dh_prev, MTP,   GRADIENT, N, c->C) \
    X(real,  z,       MTP,   BOTH,  N, 2 * c->C)               /* [enorm(e); hnorm(h_prev)] */ \
    X(accum, rstd_e,  MTP,   VALUE, N, 1)                      /* 1 / rms of e, and so on */ \
    X(accum, rstd_hp, MTP,   VALUE, N, 1) \
    X(accum, x,       FIRST | MTP, VALUE, N, c->C)             /* input of the block */ \
    X(real,  dx,      ALL,   GRADIENT, N, c->C)                /* of the stream x, h, y */ \
    X(real,  xn,      ALL,   BOTH,  N, c->C)                   /* its norm, seen by attention */ \
    X(accum, rstd_x,  ALL,   VALUE, N, 1) \
    X(accum, q_a,     ALL,   VALUE, N, c->Rq)                  /* query latent */ \
    X(real,  dq_a,    ALL,   GRADIENT, N, c->Rq) \
    X(real,  c_q,     ALL,   BOTH,  N, c->Rq)                  /* its norm */ \
    X(accum, rstd_q,  ALL,   VALUE, N, 1) \
    X(real,  q,       ALL,   BOTH,  N, c->NH * (c->Dn + c->Dr)) /* queries, q_pe rotated */ \
    X(accum, kv_a,    ALL,   VALUE, N, c->Rkv + c->Dr)         /* key-value latent, k_pe */ \
    X(real,  dkv_a,   ALL,   GRADIENT, N, c->Rkv + c->Dr) \
    X(real,  c_kv,    ALL,   BOTH,  N, c->Rkv)                 /* the latent's norm */ \
    X(accum, rstd_kv, ALL,   VALUE, N, 1) \
    X(real,  k_pe,    ALL,   BOTH,  N, c->Dr)                  /* rotated */ \
    X(real,  k_pe_heads, ALL, GRADIENT, N, c->NH * c->Dr)      /* of k_pe, from each head */ \
    X(real,  kv,      ALL,   BOTH,  N, c->NH * (c->Dn + c->Dv)) /* k_nope and v of each head */ \
    X(real,  o,       ALL,   BOTH,  N, c->NH * c->Dv)          /* output of the heads */ \
    X(accum, lse,     ALL,   VALUE, N, c->NH)                  /* of attention's softmax */ \
    X(accum, h,       ALL,   VALUE, N, c->C)                   /* x + attention */ \
    X(real,  hn,      ALL,   BOTH,  N, c->C)                   /* its norm, seen by the MLPs */ \
    X(accum, rstd_h,  ALL,   VALUE, N, 1) \
    X(real,  gate,    DENSE, BOTH,  N, c->F)                   /* dense MLP */ \
    X(real,  up,      DENSE, BOTH,  N, c->F) \
    X(real,  act,     DENSE, BOTH,  N, c->F) \
    X(accum, s,       MOE,   BOTH,  N, c->E)                   /* affinities */ \
    X(int,   topk,    MOE,   VALUE, N, c->K)                   /* experts taken */ \
    X(accum, g,       MOE,   BOTH,  N, c->K)                   /* their weights */ \
    X(int,   row,     MOE,   VALUE, N, c->K)                   /* where dispatch put the token */ \
    X(int,   offsets, MOE,   VALUE, 1, c->E + 1)               /* of each expert's rows */ \
    X(real,  xs,      MOE,   BOTH,  N * c->K, c->C)            /* tokens sorted by expert */ \
    X(real,  e_gate,  MOE,   BOTH,  N * c->K, c->Fe)           /* routed experts */ \
    X(real,  e_up,    MOE,   BOTH,  N * c->K, c->Fe) \
    X(real,  e_act,   MOE,   BOTH,  N * c->K, c->Fe) \
    X(real,  e_out,   MOE,   BOTH,  N * c->K, c->C) \
    X(real,  s_gate,  MOE,   BOTH,  N, c->S * c->Fe)           /* shared experts */ \
    X(real,  s_up,    MOE,   BOTH,  N, c->S * c->Fe) \
    X(real,  s_act,   MOE,   BOTH,  N, c->S * c->Fe) \
    X(accum, balance, MOE,   VALUE, N, 1)                      /* loss of each sequence */ \
    X(accum, f,       MOE,   VALUE, N, c->E)                   /* loads in each sequence */ \
    X(accum, y,       ALL,   VALUE, N, c->C)                   /* output of the block */ \
    X(real,  out,     LAST | MTP, BOTH, N, c->C)               /* its norm, seen by the head */ \
    X(accum, rstd_y,  LAST | MTP, VALUE, N, 1) \
    X(real,  logits,  LAST | MTP, BOTH, N, c->V) \
    X(accum, lse_v,   LAST | MTP, VALUE, N, 1)                 /* of the head's softmax */ \
    X(accum, loss,    LAST | MTP, VALUE, N, 1)

#define ACT_FIELD(type, field, ...) type *field;
typedef struct { LAYER_ACTS(ACT_FIELD) } LayerActs;

// Hands out pieces of one allocation; while base is NULL it only adds up what is asked for.
typedef struct {
    char *base;
    size_t used;
    size_t reals; // of what layers compute, the numbers that are real; the others have 4 bytes
} Arena;

static void *arena_take(Arena *a, size_t count, size_t size)
{
    void *p = a->base ? a->base + a->used : NULL;
    a->used = (size_mul(a->used + size_mul(count, size), 1) + 63) / 64 * 64;
    return p;
}

static int layer_set(const Config *c, size_t l)
{
    return ALL | (l == 0 ? FIRST : 0) | (l == c->L - 1 ? LAST : 0) | (is_mtp(c, l) ? MTP : 0) |
           (is_moe(c, l) ? MOE : DENSE);
}

// Values or gradients of the given sets of layers for N tokens.
static void layer_acts_bind(Arena *arena, LayerActs *a, const Config *c, int set, int what,
                            size_t N)
{
#define BIND_ACT(type, field, sets, kept, rows, cols) \
    a->field = NULL; \
    if ((set & (sets)) && (what & (kept))) { \
        size_t n = size_mul((size_t)(rows), (size_t)(cols)); \
        a->field = (type *)arena_take(arena, n, sizeof(type)); \
        if (!strcmp(#type, "real")) arena->reals += n; \
    }
    LAYER_ACTS(BIND_ACT)
}

// What depth k of the model (0: the main model) reads: sequences of T - k tokens.
typedef struct {
    size_t B, T;
    int *token;    // [B, T] what is embedded
    int *target;   // [B, T] what is to be predicted
    int *pos;      // [B, T]
    accum *weight; // [B, T] of each token's loss in that of the batch
} Batch;

// A forward pass of B sequences of T tokens, kept for the backward pass when training; otherwise
// all layers share one set of activations and only the main model runs.
typedef struct {
    int training;
    size_t depths;        // of multi-token prediction that run
    size_t B, T;
    Arena arena;
    LayerActs *layer;     // [L + depths]
    LayerActs d;          // gradients, of one layer at a time
    Batch *batch;         // [1 + depths]
    accum *rope;          // [T, Dr]
    double temperature, alpha, mtp_weight; // of the loss: 1, and the configuration's
    Replay replay[2];     // model_forward_backward's, of each mode
} Acts;

// Angles of rope_forward for positions 0 .. T-1 ([YaRN] 3.1-3.4 when rope_scaling is set).
static accum *rope_table(const Config *c, size_t T)
{
    size_t Dr = c->Dr;
    accum *table = (accum *)host_alloc(size_mul(T, Dr), sizeof(accum)); // [T, Dr]
    double low = 0, high = 0, m = 1;
    if (c->yarn_factor > 0) {
        // the dimension that turns `turns` times within the original context
#define YARN_DIM(turns) \
    ((double)c->Dr * log(c->yarn_original / ((turns) * 6.283185307179586)) / (2 * log(c->theta)))
        low = fmax(floor(YARN_DIM(c->yarn_fast)), 0);
        high = fmin(ceil(YARN_DIM(c->yarn_slow)), (double)c->Dr - 1);
        if (high == low) high += 0.001;
        m = (0.1 * c->yarn_mscale * log(c->yarn_factor) + 1) /
            (0.1 * c->yarn_mscale_all_dim * log(c->yarn_factor) + 1);
    }
    for (size_t j = 0; j < Dr; j += 2) {
        double frequency = pow(c->theta, -(double)j / (double)c->Dr);
        if (c->yarn_factor > 0) { // slow dimensions are interpolated, fast ones kept
            double ramp = fmin(fmax(((double)j / 2 - low) / (high - low), 0), 1);
            frequency *= 1 - ramp + ramp / c->yarn_factor;
        }
        for (size_t t = 0; t < T; t++) {
            table[t * Dr + j] = (accum)(m * cos((double)t * frequency));
            table[t * Dr + j + 1] = (accum)(m * sin((double)t * frequency));
        }
    }
    accum *on_device = (accum *)device_alloc(T * Dr * sizeof(accum));
    to_device(on_device, table, T * Dr * sizeof(accum));
    free(table);
    return on_device;
}

static double attention_scale(const Config *c)
{
    double m = c->yarn_factor > 0 ? 0.1 * c->yarn_mscale_all_dim * log(c->yarn_factor) + 1 : 1;
    return m * m / sqrt((double)(c->Dn + c->Dr));
}

static void acts_bind(Acts *a, const Config *c)
{
    a->arena.used = a->arena.reals = 0;
    int every_set = 0;
    for (size_t l = 0; l < c->L + a->depths; l++) every_set |= layer_set(c, l);
    for (size_t l = 0; l < c->L + a->depths; l++) {
        size_t k = depth_of(c, l), T = a->T > k ? a->T - k : 0;
        LayerActs *al = &a->layer[l];
        if (a->training || l == 0)
            layer_acts_bind(&a->arena, al, c, a->training ? layer_set(c, l) : every_set, VALUE,
                            a->B * T);
        else
            *al = a->layer[0];
        if (l > 0 && l < c->L) al->x = a->layer[l - 1].y;
    }
    if (a->training) layer_acts_bind(&a->arena, &a->d, c, every_set, GRADIENT, a->B * a->T);
    for (size_t k = 0; k <= a->depths; k++) {
        Batch *b = &a->batch[k];
        b->B = a->B;
        b->T = a->T > k ? a->T - k : 0;
        b->token = (int *)arena_take(&a->arena, b->B * b->T, sizeof(int));
        b->target = (int *)arena_take(&a->arena, b->B * b->T, sizeof(int));
        b->pos = (int *)arena_take(&a->arena, b->B * b->T, sizeof(int));
        b->weight = (accum *)arena_take(&a->arena, b->B * b->T, sizeof(accum));
    }
}

// The plan of a forward pass, with arena.used telling its memory; acts_make allocates it.
static Acts acts_plan(const Config *c, size_t B, size_t T, int training)
{
    Acts a;
    memset(&a, 0, sizeof a);
    a.training = training;
    a.depths = training ? min_size(c->D, T - 1) : 0; // depth k needs T > k
    a.B = B;
    a.T = T;
    a.temperature = 1, a.alpha = c->alpha, a.mtp_weight = c->mtp_weight;
    if (B > ((size_t)1 << 40) / T) // so that no size below overflows
        die(FAILED, "%zu sequences of %zu tokens need more than 1000000 MB of memory; use a "
            "smaller --batch or --seq", B, T);
    a.layer = (LayerActs *)host_alloc(c->L + a.depths, sizeof(LayerActs));
    a.batch = (Batch *)host_alloc(a.depths + 1, sizeof(Batch));
    acts_bind(&a, c);
    return a;
}

static Acts acts_make(const Config *c, size_t B, size_t T, int training)
{
    Acts a = acts_plan(c, B, T, training);
    if (B * T > INT_MAX / (c->K + 1)) // rows of experts are numbered by ints
        die(BAD_INPUT, "--batch %zu --seq %zu: at most %zu tokens are taken at once", B, T,
            INT_MAX / (c->K + 1));
    a.arena.base = (char *)device_alloc(a.arena.used);
    acts_bind(&a, c);
    a.rope = rope_table(c, T);
    return a;
}

static void acts_free(Acts *a)
{
    for (int i = 0; i < 2; i++) replay_free(&a->replay[i]);
    device_free(a->arena.base);
    device_free(a->rope);
    free(a->layer);
    free(a->batch);
}

// No more tokens than acts_make was asked for, in its memory: so many sequences, so long.
static void acts_reshape(Acts *a, const Config *c, size_t B, size_t T)
{
    for (int i = 0; i < 2; i++) replay_free(&a->replay[i]);
    a->B = B;
    a->T = T;
    acts_bind(a, c);
}

// Weighs the loss of each token that is to be predicted; the weights should sum to 1 or less.
static void acts_weigh(Acts *a, const accum *weight) // [B, T], host memory
{
    accum *host = (accum *)host_alloc(a->B * a->T, sizeof(accum));
    for (size_t k = 0; k <= a->depths; k++) {
        Batch *b = &a->batch[k];
        size_t n = b->B * b->T;
        for (size_t i = 0; i < n; i++) host[i] = weight[i / b->T * a->T + i % b->T + k];
        to_device(b->weight, host, n * sizeof(accum));
    }
    free(host);
}

// Gives B rows of T + 1 tokens to the model, all of the same weight. Depth k embeds token i + k at
// position i and is to predict token i + k + 1, for the T - k positions that have one.
static void acts_load(Acts *a, const int *tokens) // [B, T + 1], host memory
{
    int *host = (int *)host_alloc(3 * a->B * a->T, sizeof(int));
    accum *weight = (accum *)host_alloc(a->B * a->T, sizeof(accum));
    for (size_t i = 0; i < a->B * a->T; i++) weight[i] = (accum)(1 / (double)(a->B * a->T));
    acts_weigh(a, weight);
    free(weight);
    for (size_t k = 0; k <= a->depths; k++) {
        Batch *b = &a->batch[k];
        size_t n = b->B * b->T;
        for (size_t i = 0; i < n; i++) {
            size_t at = i / b->T * (a->T + 1) + i % b->T + k;
            host[i] = tokens[at];
            host[n + i] = tokens[at + 1];
            host[2 * n + i] = (int)(i % b->T);
        }
        to_device(b->token, host, n * sizeof(int));
        to_device(b->target, host + n, n * sizeof(int));
        to_device(b->pos, host + 2 * n, n * sizeof(int));
    }
    free(host);
}

// SwiGLU network: out = W_down (silu(W_gate x) * W_up x), for one network or one per expert.
// mode: of dx, dw_mode: of the weights' gradients.
static void mlp_backward(real *dx, accum *dw_gate, accum *dw_up, accum *dw_down, real *dgate,
                         real *dup, real *dact, const real *dout, const real *gate,
                         const real *up, const real *act, const real *x, const real *w_gate,
                         const real *w_up, const real *w_down, Rows r, size_t C, size_t F,
                         enum Mode mode, enum Mode dw_mode)
{
    // out = W_down act
    matmul_backward_x(dact, dout, w_down, r, C, F, SET);
    matmul_backward_w(dw_down, dout, act, r, C, F, dw_mode);
    // act = silu(gate) up
    swiglu_backward(dgate, dup, dact, gate, up, r.rows * F);
    // gate = W_gate x, up = W_up x
    gate_up_backward_x(dx, dgate, dup, w_gate, w_up, r, C, F, mode);
    matmul_backward_w(dw_gate, dgate, x, r, F, C, dw_mode);
    matmul_backward_w(dw_up, dup, x, r, F, C, dw_mode);
}

static const double latent_eps = 1e-6; // of the two latent norms, whatever rms_norm_eps says

// Queries and what attention caches of each token ([V3] 1-9): xn -> q, c_kv, k_pe.
static void mla_project(LayerActs *a, const LayerWeights *w, const Config *c, const int *pos,
                        const accum *rope, size_t N)
{
    size_t C = c->C, NH = c->NH, Rq = c->Rq, Rkv = c->Rkv;
    size_t Dn = c->Dn, Dr = c->Dr, Dq = Dn + Dr;
    Rows r = all_rows(N);
    if (Rq) {
        matmul_forward(a->q_a, a->xn, w->wq_a, r, Rq, C, SET);
        rmsnorm_forward(a->c_q, a->rstd_q, a->q_a, w->q_norm, N, Rq, Rq, Rq, latent_eps);
        matmul_forward(a->q, a->c_q, w->wq_b, r, NH * Dq, Rq, SET);
    } else {
        matmul_forward(a->q, a->xn, w->wq, r, NH * Dq, C, SET);
    }
    rope_forward(a->q + Dn, a->q + Dn, pos, rope, N, NH, Dr, NH * Dq, NH * Dq, Dq);
    matmul_forward(a->kv_a, a->xn, w->wkv_a, r, Rkv + Dr, C, SET);
    rmsnorm_forward(a->c_kv, a->rstd_kv, a->kv_a, w->kv_norm, N, Rkv, Rkv, Rkv + Dr, latent_eps);
    rope_forward(a->k_pe, a->kv_a + Rkv, pos, rope, N, 1, Dr, Dr, Rkv + Dr, Dr);
}

// Multi-head latent attention ([V3] 1-11): h = x + W_o attention(xn).
static void mla_forward(LayerActs *a, const LayerWeights *w, const Config *c, const Batch *b,
                        const accum *rope)
{
    size_t N = b->B * b->T, C = c->C, NH = c->NH, Rkv = c->Rkv;
    size_t Dn = c->Dn, Dr = c->Dr, Dv = c->Dv;
    mla_project(a, w, c, b->pos, rope, N);
    matmul_forward(a->kv, a->c_kv, w->wkv_b, all_rows(N), NH * (Dn + Dv), Rkv, SET);
    attention_forward(a->o, a->lse, a->q, a->kv, a->k_pe, b->B, b->T, NH, Dn, Dr, Dv,
                      attention_scale(c));
    device_copy(a->h, a->x, N * C * sizeof(accum));
    matmul_forward(a->h, a->o, w->wo, all_rows(N), C, NH * Dv, ADD);
}

static void mla_backward(LayerActs *d, LayerGrads *dw, const LayerActs *a, const LayerWeights *w,
                         const Config *c, const Batch *b, const accum *rope, enum Mode mode)
{
    size_t N = b->B * b->T, C = c->C, NH = c->NH, Rq = c->Rq;
    size_t Rkv = c->Rkv, Dn = c->Dn, Dr = c->Dr, Dv = c->Dv;
    size_t Dq = Dn + Dr;
    Rows r = all_rows(N);
    // h = x + W_o o; d->dx holds dh and, with what the norm will add, becomes dx
    matmul_backward_x(d->o, d->dx, w->wo, r, C, NH * Dv, SET);
    matmul_backward_w(dw->wo, d->dx, a->o, r, C, NH * Dv, mode);
    // o = attention(q, kv, k_pe)
    attention_backward(d->q, d->kv, d->k_pe, d->k_pe_heads, d->o, a->o, a->lse, a->q, a->kv,
                       a->k_pe, b->B, b->T, NH, Dn, Dr, Dv, attention_scale(c));
    // kv = W_kv_b c_kv
    matmul_backward_x(d->c_kv, d->kv, w->wkv_b, r, NH * (Dn + Dv), Rkv, SET);
    matmul_backward_w(dw->wkv_b, d->kv, a->c_kv, r, NH * (Dn + Dv), Rkv, mode);
    // [c_kv; k_pe] = [norm(latent); R k_pe], both from kv_a = W_kv_a xn
    rope_backward(d->dkv_a + Rkv, d->k_pe, b->pos, rope, N, 1, Dr, Rkv + Dr, Dr, Dr);
    rmsnorm_backward(d->dkv_a, dw->kv_norm, d->c_kv, a->kv_a, w->kv_norm, a->rstd_kv, N, Rkv, Rkv,
                     Rkv + Dr, SET);
    matmul_backward_x(d->xn, d->dkv_a, w->wkv_a, r, Rkv + Dr, C, SET);
    matmul_backward_w(dw->wkv_a, d->dkv_a, a->xn, r, Rkv + Dr, C, mode);
    // q = R (W_q_b norm(W_q_a xn)), or R (W_q xn)
    rope_backward(d->q + Dn, d->q + Dn, b->pos, rope, N, NH, Dr, NH * Dq, NH * Dq, Dq);
    if (Rq) {
        matmul_backward_x(d->c_q, d->q, w->wq_b, r, NH * Dq, Rq, SET);
        matmul_backward_w(dw->wq_b, d->q, a->c_q, r, NH * Dq, Rq, mode);
        rmsnorm_backward(d->dq_a, dw->q_norm, d->c_q, a->q_a, w->q_norm, a->rstd_q, N, Rq, Rq, Rq,
                         SET);
        matmul_backward_x(d->xn, d->dq_a, w->wq_a, r, Rq, C, ADD);
        matmul_backward_w(dw->wq_a, d->dq_a, a->xn, r, Rq, C, mode);
    } else {
        matmul_backward_x(d->xn, d->q, w->wq, r, NH * Dq, C, ADD);
        matmul_backward_w(dw->wq, d->q, a->xn, r, NH * Dq, C, mode);
    }
}

// y = h + sum of the shared experts + sum_k g_k expert_k ([V3] 12), or h + the dense MLP.
static void ffn_forward(LayerActs *a, const LayerWeights *w, const Config *c, size_t N)
{
    size_t C = c->C, E = c->E, K = c->K, Fe = c->Fe;
    Rows all = all_rows(N), experts = {a->offsets, E, N * K};
    if (!w->w_router) {
        if (a->y != a->h) device_copy(a->y, a->h, N * C * sizeof(accum)); // one in decoding
        gate_up_forward(a->act, a->gate, a->up, a->hn, w->w_gate, w->w_up, all, C, c->F);
        matmul_forward(a->y, a->act, w->w_down, all, C, c->F, ADD);
        return;
    }
    router_forward(a->s, a->topk, a->g, a->hn, w->w_router, w->router_bias, N, C, E, K,
                   c->G, c->KG, c->norm_topk, c->route_scale);
    dispatch_forward(a->xs, a->offsets, a->row, a->hn, a->topk, N, K, E, C);
    gate_up_forward(a->e_act, a->e_gate, a->e_up, a->xs, w->e_gate, w->e_up, experts, C, Fe);
    matmul_forward(a->e_out, a->e_act, w->e_down, experts, C, Fe, SET);
    combine_forward(a->y, a->h, a->e_out, a->g, a->row, N, K, C);
    if (!c->S) return;
    gate_up_forward(a->s_act, a->s_gate, a->s_up, a->hn, w->s_gate, w->s_up, all, C, c->S * Fe);
    matmul_forward(a->y, a->s_act, w->s_down, all, C, c->S * Fe, ADD);
}

// d->dx holds dy, which is dh too but for what flows through hn. dbalance: of each sequence's
// balance loss.
static void ffn_backward(LayerActs *d, LayerGrads *dw, const LayerActs *a, const LayerWeights *w,
                         const Config *c, const Batch *b, double dbalance, enum Mode mode)
{
    size_t N = b->B * b->T, C = c->C, E = c->E, K = c->K;
    size_t Fe = c->Fe;
    if (!w->w_router) {
        // y = h + mlp(hn)
        mlp_backward(d->hn, dw->w_gate, dw->w_up, dw->w_down, d->gate, d->up, d->act, d->dx,
                     a->gate, a->up, a->act, a->hn, w->w_gate, w->w_up, w->w_down, all_rows(N), C,
                     c->F, SET, mode);
        return;
    }
    Rows experts = {a->offsets, E, N * K};
    // y = h + sum_k g_k e_out
    combine_backward(d->e_out, d->g, d->dx, a->e_out, a->g, a->row, N, K, C);
    // e_out = experts(xs)
    mlp_backward(d->xs, dw->e_gate, dw->e_up, dw->e_down, d->e_gate, d->e_up, d->e_act, d->e_out,
                 a->e_gate, a->e_up, a->e_act, a->xs, w->e_gate, w->e_up, w->e_down, experts, C,
                 Fe, SET, mode);
    // xs = tokens of hn
    dispatch_backward(d->hn, d->xs, a->row, N, K, C, SET);
    // s, g = router(hn); balance = sum_i f_i P_i(s)
    balance_backward(d->s, dbalance, a->f, a->s, b->B, b->T, E);
    router_backward(d->hn, dw->w_router, d->s, d->g, a->s, a->topk, a->hn, w->w_router, N, C, E,
                    K, c->norm_topk, c->route_scale, mode);
    // y += shared(hn)
    if (c->S)
        mlp_backward(d->hn, dw->s_gate, dw->s_up, dw->s_down, d->s_gate, d->s_up, d->s_act, d->dx,
                     a->s_gate, a->s_up, a->s_act, a->hn, w->s_gate, w->s_up, w->s_down,
                     all_rows(N), C, c->S * Fe, ADD, mode);
}

// A block: h = x + MLA(norm(x)), y = h + FFN(norm(h)).
static void block_forward(LayerActs *a, const LayerWeights *w, const Config *c, const Batch *b,
                          const accum *rope)
{
    size_t N = b->B * b->T, C = c->C;
    rmsnorm_forward(a->xn, a->rstd_x, a->x, w->attn_norm, N, C, C, C, c->eps);
    mla_forward(a, w, c, b, rope);
    rmsnorm_forward(a->hn, a->rstd_h, a->h, w->ffn_norm, N, C, C, C, c->eps);
    ffn_forward(a, w, c, N);
    if (w->w_router)
        balance_forward(a->balance, a->f, a->s, b->B, b->T, c->E, c->K);
}

// In: d->dx = dy. Out: d->dx = dx. mode: of the matrices' gradients.
static void block_backward(LayerActs *d, LayerGrads *dw, const LayerActs *a,
                           const LayerWeights *w, const Config *c, const Batch *b,
                           const accum *rope, double dbalance, enum Mode mode)
{
    size_t N = b->B * b->T, C = c->C;
    // y = h + FFN(norm(h))
    ffn_backward(d, dw, a, w, c, b, dbalance, mode);
    rmsnorm_backward(d->dx, dw->ffn_norm, d->hn, a->h, w->ffn_norm, a->rstd_h, N, C, C, C, ADD);
    // h = x + MLA(norm(x))
    mla_backward(d, dw, a, w, c, b, rope, mode);
    rmsnorm_backward(d->dx, dw->attn_norm, d->xn, a->x, w->attn_norm, a->rstd_x, N, C, C, C, ADD);
}

// Depth k of multi-token prediction joins what the previous head saw with the embedding of the
// token k ahead ([V3] 21): x = W_eh [enorm(Emb(t_{i+k})); hnorm(h^{k-1}_i)].
static void mtp_forward(LayerActs *a, const LayerWeights *w, const real *embed, const int *token,
                        const Config *c, size_t N)
{
    size_t C = c->C;
    embedding_forward(a->e, token, embed, N, C);
    rmsnorm_forward(a->z, a->rstd_e, a->e, w->enorm, N, C, 2 * C, C, c->eps);
    rmsnorm_forward(a->z + C, a->rstd_hp, a->h_prev, w->hnorm, N, C, 2 * C, C, c->eps);
    matmul_forward(a->x, a->z, w->w_eh, all_rows(N), C, 2 * C, SET);
}

static void mtp_backward(LayerActs *d, LayerGrads *dw, accum *dembed, const LayerActs *a,
                         const LayerWeights *w, const int *token, size_t N, size_t C,
                         enum Mode mode)
{
    // x = W_eh z
    matmul_backward_x(d->z, d->dx, w->w_eh, all_rows(N), C, 2 * C, SET);
    matmul_backward_w(dw->w_eh, d->dx, a->z, all_rows(N), C, 2 * C, mode);
    // z = [enorm(e); hnorm(h_prev)]
    rmsnorm_backward(d->dh_prev, dw->hnorm, d->z + C, a->h_prev, w->hnorm, a->rstd_hp, N, C,
                     2 * C, C, SET);
    rmsnorm_backward(d->de, dw->enorm, d->z, a->e, w->enorm, a->rstd_e, N, C, 2 * C, C, SET);
    // e = Emb(token)
    embedding_backward(dembed, d->de, token, N, C);
}

// The norm before the head is model.norm in the main model, shared_head.norm in an MTP layer.
static const accum *head_norm(const Model *m, size_t k)
{
    return k ? m->layer[m->config.L + k - 1].head_norm : m->w.norm;
}

// logits = W_head norm(y)
static void head_forward(const Model *m, LayerActs *a, size_t k, size_t N)
{
    size_t C = m->config.C;
    rmsnorm_forward(a->out, a->rstd_y, a->y, head_norm(m, k), N, C, C, C, m->config.eps);
    matmul_forward(a->logits, a->out, m->w.lm_head, all_rows(N), m->config.V, C, SET);
}

// mode ADD: d->out already holds what depth k + 1 sends back. dw_mode: of lm_head's gradient.
static void head_backward(Model *m, LayerActs *d, const LayerActs *a, size_t k, size_t N,
                          enum Mode mode, enum Mode dw_mode)
{
    size_t C = m->config.C, V = m->config.V;
    accum *dnorm = k ? m->dlayer[m->config.L + k - 1].head_norm : m->dw.norm;
    matmul_backward_x(d->out, d->logits, m->w.lm_head, all_rows(N), V, C, mode);
    matmul_backward_w(m->dw.lm_head, d->logits, a->out, all_rows(N), V, C, dw_mode);
    rmsnorm_backward(d->dx, dnorm, d->out, a->y, head_norm(m, k), a->rstd_y, N, C, C, C, SET);
}

// The whole model on the tokens of acts_load: logits and losses of every depth.
static void model_forward(const Model *m, Acts *a)
{
    const Config *c = &m->config;
    TEAM {
        embedding_forward(a->layer[0].x, a->batch[0].token, m->w.embed, a->B * a->T, c->C);
        for (size_t l = 0; l < c->L; l++)
            block_forward(&a->layer[l], &m->layer[l], c, &a->batch[0], a->rope);
        for (size_t k = 0; k <= a->depths; k++) {
            const Batch *b = &a->batch[k];
            LayerActs *al = &a->layer[c->L - 1 + k];
            if (k > 0) {
                size_t l = c->L + k - 1;
                crop_forward(al->h_prev, a->layer[l - 1].out, b->B, b->T, a->batch[k - 1].T,
                             c->C);
                mtp_forward(al, &m->layer[l], m->w.embed, b->token, c, b->B * b->T);
                block_forward(al, &m->layer[l], c, b, a->rope);
            }
            head_forward(m, al, k, b->B * b->T);
            cross_entropy_forward(al->loss, al->lse_v, al->logits, b->target, a->temperature,
                                  b->B * b->T, c->V);
        }
    }
}

// Adds scale * d(loss of the batch) to the gradients, where ([V3] 24-25, 17)
//     loss = main + mtp_weight * mean over depths of mtp_k + alpha * balance,
// main and mtp_k the tokens' losses times their weights. The first pass after a step sets them all,
// whatever they were: products need not read what they replace, and only the rest is cleared.
static void model_backward(Model *m, Acts *a, double scale)
{
    const Config *c = &m->config;
    LayerActs *d = &a->d;
    double dbalance = scale * a->alpha / (double)a->B;
    enum Mode mode = m->grads_mode;
    size_t cleared = a->depths < c->D ? m->layout.elements : m->layout.added; // MTP may be left out
    m->grads_mode = ADD;
    TEAM {
        if (mode == SET) device_zero(m->grads, cleared * sizeof(accum));
        for (size_t depth = a->depths + 1; depth-- > 0;) {
            const Batch *b = &a->batch[depth];
            size_t last = c->L - 1 + depth, first = depth ? last : 0, N = b->B * b->T;
            int deepest = depth == a->depths;
            cross_entropy_backward(d->logits, depth ? scale * a->mtp_weight / (double)c->D : scale,
                                   b->weight, a->layer[last].lse_v, a->layer[last].logits,
                                   b->target, a->temperature, N, c->V);
            head_backward(m, d, &a->layer[last], depth, N, deepest ? SET : ADD,
                          deepest ? mode : ADD);
            for (size_t l = last + 1; l-- > first;)
                block_backward(d, &m->dlayer[l], &a->layer[l], &m->layer[l], c, b, a->rope,
                               dbalance, mode);
            if (depth > 0) {
                mtp_backward(d, &m->dlayer[first], m->dw.embed, &a->layer[first],
                             &m->layer[first], b->token, N, c->C, mode);
                crop_backward(d->out, d->dh_prev, b->B, b->T, a->batch[depth - 1].T, c->C);
            } else {
                embedding_backward(m->dw.embed, d->dx, b->token, N, c->C);
            }
        }
    }
}

// Both, always of the same model.
static void model_forward_backward(Model *m, Acts *a, double scale)
{
    Replay *replay = &a->replay[m->grads_mode];
    if (replay_begin(replay, scale)) {
        model_forward(m, a);
        model_backward(m, a, scale);
        replay_end(replay);
    }
    m->grads_mode = ADD; // after a replay, too
}

// The gradients since the last step: none, if there was no pass.
static accum *model_grads(Model *m)
{
    if (m->grads_mode == SET) device_zero(m->grads, m->layout.elements * sizeof(accum));
    m->grads_mode = ADD;
    return m->grads;
}

typedef struct {
    double total, main, mtp, balance; // mtp: mean over depths; mtp and balance unweighted
} Losses;

// sum_i x_i weight_i; NULL: of weight 1.
static double sum_of(const accum *x, const accum *weight, size_t n)
{
    accum *host = (accum *)host_alloc(2 * n, sizeof(accum));
    double sum = 0;
    to_host(host, x, n * sizeof(accum));
    if (weight) to_host(host + n, weight, n * sizeof(accum));
    for (size_t i = 0; i < n; i++) sum += (double)host[i] * (weight ? (double)host[n + i] : 1);
    free(host);
    return sum;
}

static Losses model_losses(const Model *m, const Acts *a)
{
    const Config *c = &m->config;
    Losses s = {0, 0, 0, 0};
    for (size_t k = 0; k <= a->depths; k++) {
        const Batch *b = &a->batch[k];
        double mean = sum_of(a->layer[c->L - 1 + k].loss, b->weight, b->B * b->T);
        if (k == 0) s.main = mean;
        else s.mtp += mean / (double)c->D;
    }
    for (size_t l = 0; l < c->L + a->depths; l++)
        if (is_moe(c, l)) s.balance += sum_of(a->layer[l].balance, NULL, a->B) / (double)a->B;
    s.total = s.main + (a->depths ? a->mtp_weight * s.mtp : 0) + a->alpha * s.balance;
    return s;
}

// ------------------------------------------------------------------------------------------------
// 6  Optimizers

#ifndef MOE_CUDA // operations again

// sum_i x_i^2, added up in fixed blocks so that the threads do not show in the result.
static double sum_squares(const accum *x, size_t n)
{
    METER(__func__, 0, n * sizeof(accum));
    enum { BLOCK = 1 << 14 };
    size_t blocks = ceil_div(n, BLOCK);
    double *part = (double *)host_alloc(blocks, sizeof(double)), sum = 0;
    #pragma omp parallel for
    for (size_t b = 0; b < blocks; b++) {
        double s = 0;
        #pragma omp simd reduction(+ : s)
        for (size_t i = b * BLOCK; i < min_size(n, (b + 1) * BLOCK); i++)
            s += (double)x[i] * (double)x[i];
        part[b] = s;
    }
    for (size_t b = 0; b < blocks; b++) sum += part[b];
    free(part);
    return sum;
}

// x, or load, becomes its sum over all processes of the run.
#ifdef MOE_MPI
static void all_reduce(accum *x, size_t n)
{
    ranks_reduce(x, n, sizeof(accum) == sizeof(double) ? MPI_DOUBLE : MPI_FLOAT, MPI_SUM);
}
static void all_reduce_load(int *load, size_t n) { ranks_reduce(load, n, MPI_INT, MPI_SUM); }
#endif

// One step of AdamW on the spans of the weights; step counts from 1, the gradient is taken times
// g_scale.
//     m = beta1 m + (1 - beta1) g,  v = beta2 v + (1 - beta2) g^2,
//     w -= lr (decay w + m / (1 - beta1^step) / (sqrt(v / (1 - beta2^step)) + eps)).
// master is what is trained, weights its copy for operations; here they are the same.
static void adamw_step(real *weights, accum *master, moment *m, moment *v, const accum *grads,
                       const Span *span, size_t spans, size_t pieces, long step, double lr,
                       double beta1, double beta2, double eps, double decay, double g_scale)
{
    METER(__func__, 0, 7 * (double)pieces * SPAN_PIECE * sizeof(accum));
    accum b1 = (accum)beta1, b2 = (accum)beta2, e = (accum)eps, scale = (accum)g_scale;
    accum rate = (accum)(lr / (1 - pow(beta1, (double)step)));
    accum correct2 = (accum)(1 / sqrt(1 - pow(beta2, (double)step)));
    (void)weights, (void)pieces;
    for (size_t s = 0; s < spans; s++) {
        size_t begin = span[s].offset, end = begin + span[s].size;
        accum keep = (accum)(span[s].decays ? 1 - lr * decay : 1);
        #pragma omp for nowait
        for (size_t i = begin; i < end; i++) {
            accum g = grads[i] * scale;
            m[i] = b1 * m[i] + (1 - b1) * g;
            v[i] = b2 * v[i] + (1 - b2) * g * g;
            master[i] = keep * master[i] - rate * m[i] / (square_root(v[i]) * correct2 + e);
        }
    }
    team_wait();
}

// The router's bias moves towards balance: b_i += speed sign(mean load - load_i) ([V3] 2.1.2).
// Clears the load.
static void router_bias_step(accum *bias, // [E]
                             int *load,   // [E] tokens each expert got in this step
                             size_t E, double speed)
{
    long total = 0; // E load_i is compared with the total: in integers nothing is rounded
    for (size_t e = 0; e < E; e++) total += load[e];
    for (size_t e = 0; e < E; e++) {
        long times_E = load[e] * (long)E;
        bias[e] += (accum)(times_E < total ? speed : times_E > total ? -speed : 0);
        load[e] = 0;
    }
}

// load_e += offsets[e+1] - offsets[e].
static void count_load(int *load, const int *offsets, size_t E)
{
    for (size_t e = 0; e < E; e++) load[e] += offsets[e + 1] - offsets[e];
}

// A = X X^T. It is symmetric: strips of rows are computed as far as the diagonal, and what is right
// of it is mirrored from below.
static void gram(real *A,       // [m, m]
                 real *pack,    // [PADDED(m), n] workspace
                 const real *X, // [m, n], perhaps symmetric itself
                 size_t m, size_t n, int symmetric)
{
    enum { STRIP = 2 * MR }; // a multiple of 4
    if (symmetric) gemm_pack(pack, NR * n, X, 1, n, m, NR, n); // X^T, read along its rows
    else gemm_pack(pack, NR * n, X, n, 1, m, NR, n);
    for (size_t i = 0; i < m; i += STRIP) {
        size_t rows = min_size(STRIP, m - i);
        gemm_packed(A + i * m, m, X + i * n, n, 1, pack, NR * n, rows, i + rows, n, SET);
    }
    for (size_t i = 0; i < m; i += STRIP) {
        size_t end = min_size(i + STRIP, m), j = end;
        for (; j + WIDTH <= m; j += WIDTH)
            for (size_t k = i; k < end; k += 4) transpose_copy(A + k * m + j, m, A + j * m + k, m);
        for (; j < m; j++)
            for (size_t k = i; k < end; k++) A[k * m + j] = A[j * m + k];
    }
}

// Makes X [m, n], m <= n, of norm <= 1, nearly orthogonal: five steps of
//     A = X X^T,  X <- a X + (b A + c A^2) X,
// which take every singular value close to 1 ([Muon]).
static void newton_schulz(real *X,           // [m, n]
                          real *Y,           // [PADDED(m), n] workspace
                          real *A, real *A2, // [m, m] workspace
                          size_t m, size_t n)
{
    const real a = (real)3.4445, b = (real)-4.7750, c = (real)2.0315;
    for (int step = 0; step < 5; step++) {
        gram(A, Y, X, m, n, 0);
        gram(A2, Y, A, m, m, 1);
        for (size_t i = 0; i < m * m; i++) A2[i] = b * A[i] + c * A2[i];
        gemm(Y, n, A2, m, 1, X, n, 1, m, n, m, SET);
        for (size_t i = 0; i < m * n; i++) X[i] = a * X[i] + Y[i];
    }
}

// One step of Muon on each matrix W, a thread to a matrix; the gradient is taken times g_scale.
//     M = mu M + G,  X = orthogonal(G + mu M),  W -= lr (decay W + 0.2 sqrt(max(rows, cols)) X).
// The factor gives steps the size that AdamW's have, so that one lr does for both (Moonlight, 2.2).
static void muon_step(real *weights, accum *master, moment *momentum, const accum *grads,
                      const Matrix *matrix, size_t matrices, long step, double lr, double mu_,
                      double decay, double g_scale)
{
    METER(__func__, 0, 0);
    (void)weights, (void)step;
    #pragma omp for schedule(dynamic) nowait
    for (size_t k = 0; k < matrices; k++) {
        Matrix it = matrix[k];
        int tall = it.rows > it.cols; // X is kept wide, m <= n
        size_t m = tall ? it.cols : it.rows, n = tall ? it.rows : it.cols;
        real *X = scratch(m * n + PADDED(m) * n + 2 * m * m), *Y = X + m * n;
        real *A = Y + PADDED(m) * n, *A2 = A + m * m;
        moment *M = momentum + it.offset;
        accum mu = (accum)mu_, scale = (accum)g_scale, square = 0;
        const accum *G = grads + it.offset;
        accum *W = master + it.offset;
        real rate = (real)(lr * 0.2 * sqrt((double)n));
        #pragma omp simd reduction(+ : square)
        for (size_t i = 0; i < m * n; i++) {
            M[i] = mu * M[i] + scale * G[i];
            Y[i] = scale * G[i] + mu * M[i];
            square += Y[i] * Y[i];
        }
        real shrink = (real)(1 / (sqrt((double)square) + 1e-30)), keep = (real)(1 - lr * decay);
        for (size_t i = 0; i < it.rows; i++)
            for (size_t j = 0; j < it.cols; j++)
                X[tall ? j * n + i : i * n + j] = shrink * Y[i * it.cols + j];
        newton_schulz(X, Y, A, A2, m, n);
        for (size_t i = 0; i < it.rows; i++)
            for (size_t j = 0; j < it.cols; j++) {
                accum *w = W + i * it.cols + j;
                *w = keep * *w - rate * X[tall ? j * n + i : i * n + j];
            }
    }
    team_wait();
}

#endif // not MOE_CUDA

typedef struct {
    int muon;             // for MATRIX tensors; the others always take AdamW
    double lr, adam_lr;   // of Muon, of AdamW
    double beta1, beta2, eps, decay, clip, momentum, bias_speed;
} Recipe;

typedef struct {
    moment *m, *v; // as the weights; m is Muon's momentum where Muon works
    int *load;    // [L + D, E] tokens of each expert since the last step
    long step;    // steps taken
    Matrix *matrix; // those that Muon trains, sorted by their sizes
    Span *span;     // device memory: what AdamW trains, the matrices last
    size_t matrices, spans[2], pieces[2]; // beside Muon and without it
} Optimizer;

// The largest first, so that no thread begins with one when the others are done; those of one size
// together.
static int compare_matrices(const void *x, const void *y)
{
    const Matrix *a = (const Matrix *)x, *b = (const Matrix *)y;
    size_t p = a->rows * a->cols, q = b->rows * b->cols;
    if (p != q) return p < q ? 1 : -1;
    if (a->rows != b->rows) return a->rows < b->rows ? 1 : -1;
    return a->offset < b->offset ? -1 : 1;
}

static Optimizer optimizer_make(const Model *m)
{
    Optimizer o;
    size_t n = m->layout.elements, E = m->config.E;
    memset(&o, 0, sizeof o);
    o.m = (moment *)device_zeros(n, sizeof(moment));
    o.v = (moment *)device_zeros(n, sizeof(moment));
    o.load = (int *)device_zeros(layers(&m->config) * E, sizeof(int));
    for (size_t i = 0; i < m->layout.tensors; i++)
        if (m->layout.tensor[i].kind == MATRIX) o.matrices += m->layout.tensor[i].count;
    o.matrix = (Matrix *)host_alloc(o.matrices, sizeof(Matrix));
    Matrix *next = o.matrix;
    for (size_t i = 0; i < m->layout.tensors; i++) {
        const Tensor *t = &m->layout.tensor[i];
        for (size_t e = 0; e < t->count && t->kind == MATRIX; e++) {
            Matrix it = {t->offset + e * t->rows * t->cols, t->rows, t->cols};
            *next++ = it;
        }
    }
    qsort(o.matrix, o.matrices, sizeof(Matrix), compare_matrices);
    Span *span = (Span *)host_alloc(m->layout.tensors, sizeof(Span));
    size_t spans = 0, pieces = 0;
    for (int matrices = 0; matrices < 2; matrices++) {
        for (size_t i = 0; i < m->layout.tensors; i++) {
            const Tensor *t = &m->layout.tensor[i];
            if (t->kind == ROUTER_BIAS || (t->kind == MATRIX) != matrices) continue;
            Span it = {t->offset, tensor_size(t), pieces, t->kind != NORM};
            pieces += ceil_div(it.size, SPAN_PIECE);
            span[spans++] = it;
        }
        o.spans[matrices] = spans, o.pieces[matrices] = pieces;
    }
    o.span = (Span *)device_alloc(spans * sizeof(Span));
    to_device(o.span, span, spans * sizeof(Span));
    free(span);
    return o;
}

static void optimizer_free(Optimizer *o)
{
    device_free(o->m);
    device_free(o->v);
    device_free(o->load);
    device_free(o->span);
    free(o->matrix);
}

// Remembers which experts the last forward pass used.
static void optimizer_count_load(Optimizer *o, const Model *m, const Acts *a)
{
    for (size_t l = 0; l < m->config.L + a->depths; l++)
        if (is_moe(&m->config, l))
            count_load(o->load + l * m->config.E, a->layer[l].offsets, m->config.E);
}

// Adds up what the processes of a run found: gradients and, for the routers' biases, loads.
static void optimizer_gather(Optimizer *o, Model *m)
{
#ifdef MOE_MPI
    all_reduce(model_grads(m), m->layout.elements);
    all_reduce_load(o->load, layers(&m->config) * m->config.E);
#else
    (void)o, (void)m;
#endif
}

// Forgets the gradients and loads of a step that is not to be taken.
static void optimizer_skip(Optimizer *o, Model *m)
{
    m->grads_mode = SET;
    device_zero(o->load, layers(&m->config) * m->config.E * sizeof(int));
}

static double grad_norm(Model *m) { return sqrt(sum_squares(model_grads(m), m->layout.elements)); }

// One step with the gradients that stand in the model, clipped to a global norm; then the routers'
// biases. norm is grad_norm's. The next backward pass begins with new gradients.
static void optimizer_step(Optimizer *o, Model *m, const Recipe *r, double norm)
{
    double g_scale = r->clip > 0 ? fmin(1, r->clip / (norm + 1e-6)) : 1;
    const accum *grads = model_grads(m);
    o->step++;
    for (size_t i = 0; i < m->layout.tensors; i++) {
        const Tensor *t = &m->layout.tensor[i];
        accum *bias = m->master + t->offset;
        if (t->kind != ROUTER_BIAS) continue;
        router_bias_step(bias, o->load + (size_t)t->layer * m->config.E, t->cols, r->bias_speed);
        if (has_master(m)) device_copy(m->weights + t->offset, bias, t->cols * sizeof(accum));
    }
    TEAM {
        adamw_step(m->weights, m->master, o->m, o->v, grads, o->span, o->spans[!r->muon],
                   o->pieces[!r->muon], o->step, r->adam_lr, r->beta1, r->beta2, r->eps, r->decay,
                   g_scale);
        if (r->muon)
            muon_step(m->weights, m->master, o->m, grads, o->matrix, o->matrices, o->step, r->lr,
                      r->momentum, r->decay, g_scale);
    }
    m->grads_mode = SET;
}

// ------------------------------------------------------------------------------------------------
// 7  Generation

// Many sequences at once over a latent cache: of each token a layer keeps only c_kv and the rotated
// k_pe, Rkv + Dr numbers. A call takes up to max_rows tokens, of any sequences at any positions. A
// sequence may grow without end: it sees its last `window` tokens.
typedef struct {
    const Model *m;
    size_t slots, capacity, window, max_rows, positions;
    Arena arena;
    LayerActs a;          // of the layer at work; h_prev: what the main head saw in the last call
    real **cache;         // [L + D] of [slots, capacity, Rkv + Dr]: c_kv, then k_pe
    real *latent;         // [2, NH, max_rows, Rkv]
    int *token, *slot, *pos; // [max_rows] each, one after the other
    int *rows;            // [3, max_rows] the same in host memory
    accum *rope;          // [positions, Dr]
    Replay replay[2];     // decode's and decode_mtp's
} Decoder;

static void decoder_bind(Decoder *s)
{
    const Config *c = &s->m->config;
    int sets = 0;
    s->arena.used = s->arena.reals = 0;
    for (size_t l = 0; l < layers(c); l++) {
        size_t entries = size_mul(size_mul(s->slots, s->capacity), c->Rkv + c->Dr);
        s->cache[l] = (real *)arena_take(&s->arena, entries, sizeof(real));
        sets |= layer_set(c, l);
    }
    layer_acts_bind(&s->arena, &s->a, c, sets, VALUE, s->max_rows);
    s->a.h = s->a.y = s->a.x; // nothing goes back through the blocks: they add to x in place
    size_t latents = size_mul(2 * s->max_rows, c->NH * c->Rkv);
    s->latent = (real *)arena_take(&s->arena, latents, sizeof(real));
    s->token = (int *)arena_take(&s->arena, size_mul(3, s->max_rows), sizeof(int));
    s->slot = s->token + s->max_rows;
    s->pos = s->slot + s->max_rows;
}

// The plan of a decoder, with arena.used telling its memory; decoder_make allocates it.
// positions: how long a sequence may get; ahead: how many tokens of one a call may hold.
static Decoder decoder_plan(const Model *m, size_t slots, size_t window, size_t ahead,
                            size_t max_rows, size_t positions)
{
    Decoder s;
    memset(&s, 0, sizeof s);
    s.m = m;
    s.window = window;
    s.capacity = window + ahead; // new rows must not push out what the first of them sees
    s.max_rows = max_rows;
    s.positions = positions;
    if (positions > INT_MAX)
        die(BAD_INPUT, "--tokens: a text of %zu tokens; at most %d are taken", positions, INT_MAX);
    s.cache = (real **)host_alloc(layers(&m->config), sizeof(real *));
    s.rows = (int *)host_alloc(size_mul(3, max_rows), sizeof(int));
    s.slots = slots;
    decoder_bind(&s);
    return s;
}

static Decoder decoder_make(const Model *m, size_t slots, size_t window, size_t ahead,
                            size_t max_rows, size_t positions)
{
    Decoder s = decoder_plan(m, slots, window, ahead, max_rows, positions);
    s.arena.base = (char *)device_alloc(s.arena.used);
    decoder_bind(&s);
    s.rope = rope_table(&m->config, positions);
    return s;
}

static void decoder_free(Decoder *s)
{
    for (int i = 0; i < 2; i++) replay_free(&s->replay[i]);
    device_free(s->arena.base);
    device_free(s->rope);
    free(s->rows);
    free(s->cache);
}

// block_forward with the cache in attention's place: a.x -> a.y.
static void decode_block(const Decoder *s, LayerActs *a, size_t l, size_t n)
{
    const Config *c = &s->m->config;
    const LayerWeights *w = &s->m->layer[l];
    size_t C = c->C, NH = c->NH, Rkv = c->Rkv;
    size_t Dn = c->Dn, Dr = c->Dr, Dv = c->Dv;
    rmsnorm_forward(a->xn, a->rstd_x, a->x, w->attn_norm, n, C, C, C, c->eps);
    mla_project(a, w, c, s->pos, s->rope, n);
    cache_store(s->cache[l], a->c_kv, a->k_pe, s->slot, s->pos, n, Rkv, Dr, s->capacity);
    latent_attention(a->o, s->latent, a->q, w->wkv_b, s->cache[l], s->slot, s->pos, n, NH, Dn, Dr,
                     Dv, Rkv, s->capacity, s->window, attention_scale(c));
    matmul_forward(a->h, a->o, w->wo, all_rows(n), C, NH * Dv, ADD);
    rmsnorm_forward(a->hn, a->rstd_h, a->h, w->ffn_norm, n, C, C, C, c->eps);
    ffn_forward(a, w, c, n);
}

// The main model on n tokens: a.logits, and what the head saw.
static void decode_main(const Decoder *s, size_t n)
{
    const Config *c = &s->m->config;
    LayerActs a = s->a;
    embedding_forward(a.x, s->token, s->m->w.embed, n, c->C);
    for (size_t l = 0; l < c->L; l++) decode_block(s, &a, l, n);
    head_forward(s->m, &a, 0, n);
    if (c->D) crop_forward(a.h_prev, a.out, n, 1, 1, c->C); // all of it
}

// The first MTP depth on the first n of them.
static void decode_depth(const Decoder *s, size_t n)
{
    const Config *c = &s->m->config;
    LayerActs a = s->a;
    mtp_forward(&a, &s->m->layer[c->L], s->m->w.embed, s->token, c, n);
    decode_block(s, &a, c->L, n);
    head_forward(s->m, &a, 1, n);
}

// The work up to which one thread is faster than several, or one as a team, which waits at each
// operation's end: tokens times the weights that each meets.
enum { ALONE = 2 << 20 };
static int is_small(const Decoder *s, size_t n)
{
    return thread_count() == 1 ||
           (double)n * active_weights(&s->m->config, &s->m->layout) <= ALONE;
}

// Runs n <= max_rows tokens through the main model. Leaves logits in a.logits [n, V] and, if there
// is MTP, what the head saw in a.h_prev [n, C].
static void decode(Decoder *s, const int *token, const int *slot, const int *pos, size_t n)
{
    memcpy(s->rows, token, n * sizeof(int));
    memcpy(s->rows + s->max_rows, slot, n * sizeof(int));
    memcpy(s->rows + 2 * s->max_rows, pos, n * sizeof(int));
    to_device(s->token, s->rows, 3 * s->max_rows * sizeof(int));
    if (!replay_begin(&s->replay[0], (double)n)) return;
    if (is_small(s, n)) decode_main(s, n);
    else TEAM decode_main(s, n);
    replay_end(&s->replay[0]);
}

// Runs the first MTP depth on the first n rows of the last decode(); next[i] is the token after
// row i's. Leaves the logits of the token after that one in a.logits [n, V].
static void decode_mtp(Decoder *s, const int *next, size_t n)
{
    to_device(s->token, next, n * sizeof(int));
    if (!replay_begin(&s->replay[1], (double)n)) return;
    if (is_small(s, n)) decode_depth(s, n);
    else TEAM decode_depth(s, n);
    replay_end(&s->replay[1]);
}

typedef struct {
    double temperature; // 0: always the likeliest token
    int top_k;          // only the k likeliest; 0: all
    double top_p;       // only the fewest likeliest tokens that together have this probability
    uint64_t seed, stream;
} Sampler;

typedef struct {
    int token;
    double logp, entropy; // of what it was drawn from, after temperature, top_k and top_p
} Draw;

typedef struct {
    double p;
    int token;
} Choice;

static int compare_choices(const void *x, const void *y)
{
    const Choice *a = (const Choice *)x, *b = (const Choice *)y;
    return a->p > b->p ? -1 : a->p < b->p ? 1 : a->token - b->token;
}

// Draws a token from logits [V] in host memory. `at` numbers the draw: the same seed, stream, place
// and logits give the same token, however the logits were come by.
static Draw sample_token(const Sampler *s, const accum *logits, size_t V, uint64_t at)
{
    size_t best = 0;
    accum most = logits[0];
    for (size_t v = 0; v < V; v++) {
        if (!isfinite((double)logits[v])) {
            #pragma omp critical // of several threads one says so
            die(FAILED, "a logit is not a finite number: the weights are damaged, or --lr was too "
                "large");
        }
        if (logits[v] > most) most = logits[v], best = v;
    }
    Draw d = {(int)best, 0, 0};
    if (s->temperature <= 0) return d;
    Choice *choice = (Choice *)host_alloc(V, sizeof(Choice));
    double sum = 0, kept = 0;
    for (size_t v = 0; v < V; v++) {
        choice[v].p = exp(((double)logits[v] - (double)most) / s->temperature);
        choice[v].token = (int)v;
        sum += choice[v].p;
    }
    size_t all = 0; // but for those that even together are less than what top_p leaves out
    for (size_t v = 0; v < V; v++)
        if (choice[v].p >= (1 - s->top_p) * sum / (double)V) choice[all++] = choice[v];
    size_t n = s->top_k > 0 ? min_size(all, (size_t)s->top_k) : all;
    if (n < V || s->top_p < 1) qsort(choice, all, sizeof(Choice), compare_choices);
    for (size_t i = 0; i < n; i++) {
        kept += choice[i].p;
        if (s->top_p < 1 && kept >= s->top_p * sum) n = i + 1;
    }
    double u = random_uniform(s->seed, s->stream, at) * kept;
    size_t i = 0;
    while (i + 1 < n && u >= choice[i].p) u -= choice[i++].p;
    d.token = choice[i].token;
    d.logp = log(choice[i].p / kept);
    d.entropy = log(kept); // - sum p / kept log(p / kept), where log p is what p came from
    for (size_t v = 0; v < n; v++)
        d.entropy -= choice[v].p / kept * ((double)logits[choice[v].token] - (double)most) /
                     s->temperature;
    free(choice);
    return d;
}

typedef struct {
    size_t generated, drafted, accepted, calls; // calls of decode() that gave tokens
    double seconds;                             // of generating, the prompt not counted
} Generation;

// Continues text[0 .. length) by `count` tokens, each given to emit() as it comes; text has room.
// speculate: the MTP layer drafts one token more, which the next call checks together with the
// token it is due to compute ([V3] 5.4.3). The draft is taken only where it is the token that
// would have been drawn anyway, so the text is the same with and without.
static Generation generate(Decoder *s, const Sampler *sampler, int *text, size_t length,
                           size_t count, int speculate, void (*emit)(int token))
{
    size_t V = s->m->config.V, done = 0, end = length + count, prompt = length;
    int *rows = (int *)host_alloc(3 * s->max_rows, sizeof(int)), draft = -1;
    int *slot = rows + s->max_rows, *pos = slot + s->max_rows;
    accum *logits = (accum *)host_alloc(V, sizeof(accum));
    Generation g = {0, 0, 0, 0, 0};
    double start = now();
    while (length < end) {
        // rows: tokens not run yet, and the draft
        size_t n = min_size(length - done, s->max_rows), first = done;
        for (size_t i = 0; i < n; i++) rows[i] = text[done + i];
        int drafted = draft >= 0 && done + n == length && length + 1 < end && n < s->max_rows;
        if (drafted) rows[n] = draft;
        for (size_t i = 0; i <= n && i < s->max_rows; i++) slot[i] = 0, pos[i] = (int)(done + i);
        decode(s, rows, slot, pos, n + (size_t)drafted);
        done += n;
        if (done == length) { // the last row tells the next token; the draft, if right, one more
            for (size_t i = n - 1; i < n + (size_t)drafted; i++) {
                reals_to_host(logits, s->a.logits + i * V, V);
                text[length] = sample_token(sampler, logits, V, length).token;
                emit(text[length++]);
                if (i + 1 < n + (size_t)drafted && text[length - 1] != draft) break;
            }
            g.calls++;
            g.drafted += (size_t)drafted;
            g.accepted += length - done - 1;
            done = length - 1;
            if (g.calls == 1) start = now();
        }
        if (speculate && length < end) {
            n = min_size(done, length - 1) - first;
            decode_mtp(s, text + first + 1, n);
            reals_to_host(logits, s->a.logits + (n - 1) * V, V);
            Sampler likeliest = {0, 0, 1, 0, 0};
            draft = done + 1 == length ? sample_token(&likeliest, logits, V, 0).token : -1;
        }
    }
    g.generated = length - prompt;
    g.seconds = now() - start;
    free(rows);
    free(logits);
    return g;
}

// ------------------------------------------------------------------------------------------------
// 8  Reinforcement learning

// [R1]: a model answers questions, a rule judges the answers, and what did better than the other
// answers to its question becomes likelier. Nobody shows it how to answer.

// Texts that begin with a prompt and go on as the policy draws them.
typedef struct {
    size_t n, most;          // texts, tokens that one may have
    size_t longest;          // tokens that an answer may have
    int *text;               // [n, most]
    size_t *prompt, *length; // [n] tokens of the prompt, and of all
    accum *logp;             // [n, most] log-probability of each token drawn, 0 in the prompt
    double entropy;          // of the distributions that tokens were drawn from, on average
    size_t drawn;            // tokens
} Rollout;

static Rollout rollout_make(size_t n, size_t most, size_t longest)
{
    Rollout r = {n, most, longest, NULL, NULL, NULL, NULL, 0, 0};
    r.text = (int *)host_alloc(size_mul(n, most), sizeof(int));
    r.logp = (accum *)host_alloc(size_mul(n, most), sizeof(accum));
    r.prompt = (size_t *)host_alloc(2 * n, sizeof(size_t));
    r.length = r.prompt + n;
    return r;
}

static void rollout_free(Rollout *r)
{
    free(r->text);
    free(r->logp);
    free(r->prompt);
}

// Draws all answers side by side, a token a call, each until it draws `end` or is `longest` long;
// what has ended leaves the batch. Text i draws from the sampler's stream + i.
static void rollout_draw(Rollout *r, Decoder *s, const Sampler *sampler, int end)
{
    size_t V = s->m->config.V, running = r->n, most = r->most;
    int *row = (int *)host_alloc(3 * r->n, sizeof(int)), *slot = row + r->n, *pos = slot + r->n;
    accum *logits = (accum *)host_alloc(size_mul(r->n, V), sizeof(accum));
    double *entropy = (double *)host_alloc(r->n, sizeof(double));
    for (size_t i = 0; i < r->n; i++) slot[i] = (int)i, r->length[i] = r->prompt[i];
    r->entropy = 0, r->drawn = 0;
    for (size_t t = 0; running > 0; t++) {
        for (size_t k = 0; k < running; k++) {
            row[k] = r->text[(size_t)slot[k] * most + t];
            pos[k] = (int)t;
        }
        decode(s, row, slot, pos, running);
        reals_to_host(logits, s->a.logits, running * V);
        #pragma omp parallel for
        for (size_t k = 0; k < running; k++) {
            size_t i = (size_t)slot[k], next = i * most + t + 1;
            if (t + 1 < r->prompt[i]) continue;
            Sampler own = *sampler;
            own.stream += i;
            Draw d = sample_token(&own, logits + k * V, V, t + 1);
            r->text[next] = d.token;
            r->logp[next] = (accum)d.logp;
            r->length[i] = t + 2;
            entropy[i] += d.entropy;
        }
        size_t kept = 0;
        for (size_t k = 0; k < running; k++) {
            size_t i = (size_t)slot[k], length = r->length[i], answer = length - r->prompt[i];
            int ended = answer && (answer == r->longest || length == most ||
                                   r->text[i * most + length - 1] == end);
            if (!ended) slot[kept++] = slot[k];
        }
        running = kept;
    }
    for (size_t i = 0; i < r->n; i++) {
        r->entropy += entropy[i];
        r->drawn += r->length[i] - r->prompt[i];
    }
    r->entropy /= (double)r->drawn;
    free(row);
    free(logits);
    free(entropy);
}

// The advantage of each of a group's G answers ([R1] 3): A_i = (r_i - mean r) / std r; 0 where all
// are alike. Returns std r.
static double group_advantages(double *A,       // [G]
                               const double *r, // [G] rewards
                               size_t G)
{
    double mean = 0, variance = 0;
    for (size_t i = 0; i < G; i++) mean += r[i] / (double)G;
    for (size_t i = 0; i < G; i++) variance += (r[i] - mean) * (r[i] - mean) / (double)G;
    double std = sqrt(variance);
    for (size_t i = 0; i < G; i++) A[i] = std > 1e-9 ? (r[i] - mean) / std : 0;
    return std;
}

typedef struct {
    double clip; // epsilon
    double kl;   // beta
} Grpo;

typedef struct {
    double loss, kl, clipped; // sums over answers of means over their tokens
} GrpoSums;

// An answer's loss, of log-probabilities pi of its tokens now, when drawn and in the reference
// ([R1] 1-2), and its derivative by the cross-entropy ce_t = -log pi(o_t):
//     loss = -1/T sum_t (min(rho_t A, clip(rho_t, 1 - eps, 1 + eps) A) - beta D_t),
//     rho_t = pi(o_t) / pi_old(o_t),   D_t = pi_ref / pi - log(pi_ref / pi) - 1,
//     dloss/dce_t = ([not clipped] rho_t A - beta (1 - pi_ref / pi)) / T.
static GrpoSums grpo_loss(accum *dce,        // [T]
                          const accum *ce,   // [T]
                          const accum *old,  // [T] log pi_old(o_t)
                          const accum *ref,  // [T] log pi_ref(o_t); NULL: no reference
                          size_t T, double A, const Grpo *g)
{
    GrpoSums s = {0, 0, 0};
    double share = 1 / (double)T;
    for (size_t t = 0; t < T; t++) {
        double rho = exp((double)-ce[t] - (double)old[t]);
        double bounded = fmin(fmax(rho, 1 - g->clip), 1 + g->clip);
        double log_ratio = ref ? (double)ref[t] + (double)ce[t] : 0, ratio = exp(log_ratio);
        int clipped = bounded * A < rho * A;
        s.loss -= share * (fmin(rho * A, bounded * A) - g->kl * (ratio - log_ratio - 1));
        s.kl += share * (ratio - log_ratio - 1);
        s.clipped += share * clipped;
        dce[t] = (accum)(share * ((clipped ? 0 : rho * A) - g->kl * (1 - ratio)));
    }
    return s;
}

// Adds the gradient of the mean of grpo_loss over answers order[0 .. n) of r, and as many in every
// other process, to the model's, as many at a time as `room` tokens hold; equally long ones should
// stand together. ref may be NULL. Returns the sums over the answers of this process.
static GrpoSums grpo_backward(Model *m, const Model *ref, Acts *a, size_t room, const Rollout *r,
                              const size_t *order, size_t n, const double *A, // [r->n]
                              const Grpo *g)
{
    const Config *c = &m->config;
    size_t B;
    GrpoSums sums = {0, 0, 0};
    accum *weight = (accum *)host_alloc(3 * room, sizeof(accum));
    accum *ce = weight + room, *ref_logp = ce + room; // [B, T]
    int *rows = (int *)host_alloc(2 * room, sizeof(int)); // [B, T + 1]
    for (size_t at = 0; at < n; at += B) {
        size_t T = 0, longest = 0;
        for (B = 0; at + B < n; B++) { // as many as fit
            longest = longest > r->length[order[at + B]] ? longest : r->length[order[at + B]];
            if ((longest - 1) * (B + 1) > room) break;
            T = longest - 1;
        }
        acts_reshape(a, c, B, T);
        memset(rows, 0, B * (T + 1) * sizeof(int)); // what follows an answer weighs nothing
        memset(weight, 0, B * T * sizeof(accum));
        for (size_t b = 0; b < B; b++) {
            size_t i = order[at + b];
            memcpy(rows + b * (T + 1), r->text + i * r->most, r->length[i] * sizeof(int));
        }
        acts_load(a, rows);
        if (ref) {
            model_forward(ref, a);
            to_host(ref_logp, a->layer[c->L - 1].loss, B * T * sizeof(accum));
            for (size_t i = 0; i < B * T; i++) ref_logp[i] = -ref_logp[i];
        }
        model_forward(m, a);
        to_host(ce, a->layer[c->L - 1].loss, B * T * sizeof(accum));
        for (size_t b = 0; b < B; b++) { // position t predicts token t + 1
            size_t i = order[at + b], prompt = r->prompt[i], first = b * T + prompt - 1;
            size_t answer = r->length[i] - prompt;
            GrpoSums s = grpo_loss(weight + first, ce + first, r->logp + i * r->most + prompt,
                                   ref ? ref_logp + first : NULL, answer, A[i], g);
            for (size_t t = 0; t < answer; t++) weight[first + t] /= (accum)(n * (size_t)ranks);
            sums.loss += s.loss, sums.kl += s.kl, sums.clipped += s.clipped;
        }
        acts_weigh(a, weight);
        model_backward(m, a, 1);
    }
    free(weight);
    free(rows);
    return sums;
}

// ------------------------------------------------------------------------------------------------
// 9  Tasks

// Questions that a program can make, and whose answers it can judge. A line of text holds both:
//     question <TAB> <think>any thoughts</think><answer>the answer</answer> <NEWLINE>
// add 347+586, mul 23*45: the number. sort 5,31,8: the numbers in order. countdown 3,5,8=64: an
// expression of all the numbers, each used once, with + - * / ( ), that equals the target. columns
// t:k48e.t76k.e35; is 347+586 once more: the ones are t, and each column, in any order, says its
// letter, its two digits and which is next; t3k3e9;0: each column's digit, and what is carried on.
enum { TASK_ADD, TASK_MUL, TASK_COUNTDOWN, TASK_SORT, TASK_COLUMNS, TASKS };
static const char *const task_names[TASKS] = {"add", "mul", "countdown", "sort", "columns"};
static const char *const task_examples[TASKS] = {"347+586", "23*45", "3,5,8=64", "5,31,8",
                                                 "t:k48e.t76k.e35;"};
#define TASK_NAMES "add, mul, countdown, sort or columns"

enum { NUMBERS = 8, PLACES = 9, LINE = 2048 }; // most of a question, bytes of a line

typedef struct {
    int task;
    size_t n;
    long number[NUMBERS], target; // target: of countdown
    char letter[PLACES + 1], shown[PLACES + 1]; // of columns: from the ones on; as they stand
} Question;

typedef struct {
    size_t length;
    char text[LINE];
} Line;

static void put(Line *line, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    int n = vsnprintf(line->text + line->length, LINE - line->length, format, args);
    va_end(args);
    line->length += (size_t)n;
    if (line->length >= LINE)
        die(BAD_INPUT, "a line of more than %d bytes; use a smaller --size or --slips, or a "
            "shorter --prompt", LINE - 1);
}

typedef struct { uint64_t seed, stream, counter; } Random;

static long pick(Random *r, long n) // 0 .. n - 1
{
    return (long)(random_u64(r->seed, r->stream, r->counter++) % (uint64_t)n);
}

static int chance(Random *r, double p)
{
    return random_uniform(r->seed, r->stream, r->counter++) < p;
}

// What stands between the numbers of a question.
static const char *const separators[TASKS] = {"+", "*", ",", ",", ""};

static void put_numbers(Line *line, const Question *q)
{
    for (size_t i = 0; i < q->n; i++)
        put(line, i ? "%s%ld" : "%.0s%ld", separators[q->task], q->number[i]);
}

static long power_of_ten(size_t k) { return k > 0 ? 10 * power_of_ten(k - 1) : 1; }
static long digit(long x, size_t k) { return x / power_of_ten(k) % 10; }

static void put_columns(Line *line, const Question *q)
{
    put(line, "%c:", q->letter[0]);
    for (const char *l = q->shown; *l; l++) {
        size_t k = (size_t)(strchr(q->letter, *l) - q->letter);
        put(line, "%s%c%ld%ld%c", l > q->shown ? "." : "", *l, digit(q->number[0], k),
            digit(q->number[1], k), q->letter[k + 1] ? q->letter[k + 1] : ';');
    }
}

static void put_question(Line *line, const Question *q)
{
    if (q->task == TASK_COLUMNS) put_columns(line, q);
    else put_numbers(line, q);
    if (q->task == TASK_COUNTDOWN) put(line, "=%ld", q->target);
}

// A number as it is written: no sign, no needless 0, at most 9 digits. Moves *text behind it.
static int take_number(const char **text, long *x)
{
    size_t digits = strspn(*text, "0123456789");
    if (!digits || digits > 9 || (**text == '0' && digits > 1)) return 0;
    *x = strtol(*text, NULL, 10);
    *text += digits;
    return 1;
}

// From the ones on, each column that is named as the next; all of them, once.
static int parse_columns(Question *q, const char *text)
{
    size_t n = 0;
    const char *cell, *cells = text + 2, *end = text + strlen(text);
    char next = text[0];
    if (!next || text[1] != ':') return 0;
    for (cell = cells; n < PLACES && end - cell >= 4; cell += 5) {
        int last = cell + 4 == end;
        if (!islower((unsigned char)cell[0]) || !isdigit((unsigned char)cell[1]) ||
            !isdigit((unsigned char)cell[2]) || strchr(q->shown, cell[0]) ||
            (!last && cell[4] != '.')) return 0;
        q->shown[n++] = cell[0];
        if (last) break;
    }
    if (n == 0 || cells + 5 * n - 1 != end) return 0;
    for (size_t k = 0; k < n; k++) {
        const char *at = next ? strchr(q->shown, next) : NULL;
        if (!at) return 0;
        cell = cells + 5 * (at - q->shown);
        for (size_t i = 0; i < 2; i++) q->number[i] += (cell[1 + i] - '0') * power_of_ten(k);
        q->letter[k] = next;
        next = cell[3];
    }
    q->n = 2;
    return next == ';';
}

// Reads put_question's text; 0 if it is something else.
static int parse_question(Question *q, int task, const char *text)
{
    int countdown = task == TASK_COUNTDOWN, pair = task == TASK_ADD || task == TASK_MUL;
    memset(q, 0, sizeof *q);
    q->task = task;
    if (task == TASK_COLUMNS) return parse_columns(q, text);
    do
        if (q->n == NUMBERS || !take_number(&text, &q->number[q->n++])) return 0;
    while (*text == *separators[task] && text++);
    if (pair ? q->n != 2 : q->n < 1) return 0;
    return (!countdown || (*text++ == '=' && take_number(&text, &q->target))) && !*text;
}

static int compare_longs(const void *x, const void *y)
{
    long a = *(const long *)x, b = *(const long *)y;
    return (a > b) - (a < b);
}

// Whether a question is one of the eighth that is kept for testing: all with the same numbers are,
// in whatever order.
static int is_for_testing(const Question *q)
{
    long sorted[NUMBERS];
    uint64_t hash = (uint64_t)q->target;
    memcpy(sorted, q->number, sizeof sorted);
    qsort(sorted, q->n, sizeof *sorted, compare_longs);
    for (size_t i = 0; i < q->n; i++) hash = random_u64(hash, (uint64_t)sorted[i], 0);
    return hash % 8 == 0;
}

// Countdown replaces two numbers by their sum, difference, product or quotient, where that is a
// whole number, until one is left.
static const char operators[] = "+-*/";

typedef struct { long value; char text[128]; } Term; // 8 and (3+5)

// c = a op b, the larger first; 0 if that is not for countdown. Adds the step, 5+3=8.
static int combine_terms(Term *c, const Term *a, char op, const Term *b, Line *steps)
{
    long x = a->value, y = b->value;
    if (x < y || (op == '*' && x * y > 9999) || (op == '/' && (y == 0 || x % y))) return 0;
    c->value = op == '+' ? x + y : op == '-' ? x - y : op == '*' ? x * y : x / y;
    snprintf(c->text, sizeof c->text, "(%.60s%c%.60s)", a->text, op, b->text);
    put(steps, "%s%ld%c%ld=%ld", steps->length ? " " : "", x, op, y, c->value);
    return 1;
}

static uint64_t count_ways(size_t n) // from n numbers to two: pairs x operators, at each step
{
    return n > 2 ? 2 * n * (n - 1) * count_ways(n - 1) : 1;
}

// The way of that number from all the numbers to the last two, and the text of its steps; 0 if one
// of them is not for countdown.
static int take_way(Term last[2], const Question *q, uint64_t way, Line *steps)
{
    Term at[NUMBERS], c;
    for (size_t i = 0; i < q->n; i++) {
        at[i].value = q->number[i];
        snprintf(at[i].text, sizeof at[i].text, "%ld", q->number[i]);
    }
    steps->length = 0;
    for (size_t n = q->n; n > 2; n--) {
        size_t op = way % 4, pair = way / 4 % (n * (n - 1) / 2), i = 0;
        way /= 2 * n * (n - 1);
        for (; pair >= n - 1 - i; i++) pair -= n - 1 - i; // (0,1) (0,2) .. (1,2) ..
        size_t j = i + 1 + pair;
        const Term *x = &at[i], *y = &at[j];
        if (!(x->value < y->value ? combine_terms(&c, y, operators[op], x, steps)
                                  : combine_terms(&c, x, operators[op], y, steps))) return 0;
        at[i] = c;
        at[j] = at[n - 1];
    }
    int second = at[0].value < at[1].value;
    last[0] = at[second];
    last[1] = at[!second];
    return 1;
}

static uint64_t pick_way(const Question *q, Random *r)
{
    return random_u64(r->seed, r->stream, r->counter++) % count_ways(q->n);
}

static void guess_countdown(Term *answer, const Question *q, Random *r)
{
    Term last[2];
    Line way;
    while (!take_way(last, q, pick_way(q, r), &way)) {}
    while (!combine_terms(answer, &last[0], operators[pick(r, 4)], &last[1], &way)) {}
}

// Puts the first k of n letters in random order, chosen from all.
static void shuffle(char *letters, size_t k, size_t n, Random *r)
{
    for (size_t i = 0; i < k; i++) {
        size_t j = i + (size_t)pick(r, (long)(n - i));
        char letter = letters[i];
        letters[i] = letters[j];
        letters[j] = letter;
    }
}

// The i-th question of a stream: `size` digits in each of two numbers, or `size` numbers.
static Question make_question(int task, long size, int testing, uint64_t seed, uint64_t i)
{
    int pair = task == TASK_ADD || task == TASK_MUL || task == TASK_COLUMNS;
    Random r = {seed, 10 + (uint64_t)testing, i << 20};
    Question q;
    Term answer;
    char letters[] = "abcdefghijklmnopqrstuvwxyz";
    do {
        memset(&q, 0, sizeof q);
        q.task = task;
        q.n = pair ? 2 : (size_t)size;
        long low = pair ? size > 1 ? power_of_ten((size_t)size - 1) : 0 : task != TASK_SORT;
        long high = pair ? power_of_ten((size_t)size) : task == TASK_SORT ? 100 : 10;
        for (size_t k = 0; k < q.n; k++) q.number[k] = low + pick(&r, high - low);
        if (task == TASK_COUNTDOWN) {
            guess_countdown(&answer, &q, &r);
            q.target = answer.value;
        }
    } while (is_for_testing(&q) != testing || (task == TASK_COUNTDOWN && q.target > 99));
    if (task == TASK_COLUMNS) {
        shuffle(letters, (size_t)size, 26, &r);
        memcpy(q.letter, letters, (size_t)size);
        shuffle(letters, (size_t)size, (size_t)size, &r);
        memcpy(q.shown, letters, (size_t)size);
    }
    return q;
}

// Gives columns other letters, of those that were not used for longest: a window of a text should
// not say twice what a letter is.
static void rename_columns(Question *q, char letters[26], Random *r)
{
    char shown[PLACES + 1] = "";
    for (size_t k = 0; q->letter[k]; k++) {
        size_t j = (size_t)pick(r, 6);
        char letter = letters[j];
        memmove(letters + j, letters + j + 1, 25 - j);
        letters[25] = letter;
        shown[strchr(q->shown, q->letter[k]) - q->shown] = letter;
        q->letter[k] = letter;
    }
    memcpy(q->shown, shown, sizeof shown);
}

// The texts that a base model learns from: a share `worked` of them thinks before it answers, the
// others answer at once, of which only a share `right` is right. Thinking slips now and then too.
typedef struct { double worked, right, slips; } Quality;

// Addition as one learns it, from the right: what is left of both numbers, their last digits and
// the carry, the digits of the sum so far.
//     347+586 7+6+0=13 3|34+58 4+8+1=13 33|3+5 3+5+1=9 933
static long work_add(Line *line, const Question *q, Random *r, double slips)
{
    long a = q->number[0], b = q->number[1], carry = 0, sum = 0, ten = 1;
    for (int digits = 1, last = 0; !last; digits++, a /= 10, b /= 10, ten *= 10) {
        last = a < 10 && b < 10;
        long s = a % 10 + b % 10 + carry;
        if (chance(r, slips)) s += s > 0 && pick(r, 2) ? -1 : 1;
        sum += (last ? s : s % 10) * ten;
        put(line, "%s%ld+%ld %ld+%ld+%ld=%ld %0*ld", ten > 1 ? "|" : "", a, b, a % 10, b % 10,
            carry, s, digits, sum);
        carry = s / 10;
    }
    return sum;
}

// Multiplication by each digit, added up: 23*5=115 23*40=920 115+920=1035.
static long work_mul(Line *line, const Question *q, Random *r, double slips)
{
    long a = q->number[0], b = q->number[1], sum = 0, ten = 1;
    for (; ten == 1 || b; b /= 10, ten *= 10) {
        long product = a * (b % 10) * ten + (chance(r, slips) ? ten : 0);
        put(line, ten > 1 ? " %ld*%ld=%ld" : "%ld*%ld=%ld", a, b % 10 * ten, product);
        if (ten > 1) put(line, " %ld+%ld=%ld", sum, product, sum + product);
        sum += product;
    }
    return sum;
}

// Sorting by taking the smallest out: 5,31,8>5 31,8>8 31>31. Leaves the numbers in order.
static void work_sort(Line *line, Question *q, Random *r, double slips)
{
    for (size_t i = 0; i < q->n; i++) {
        size_t least = i;
        for (size_t j = i; j < q->n; j++) {
            put(line, j > i ? ",%ld" : i ? " %ld" : "%ld", q->number[j]);
            if (q->number[j] < q->number[least]) least = j;
        }
        if (chance(r, slips)) least = i + (size_t)pick(r, (long)(q->n - i));
        put(line, ">%ld", q->number[least]);
        long it = q->number[least];
        for (size_t j = least; j > i; j--) q->number[j] = q->number[j - 1];
        q->number[i] = it;
    }
}

// Countdown by search: the ways to two numbers in order, from any one on, and what these two make,
// until the target is there or patience ends, with some chance after each way; once the line is
// half full, only the way that gets there is written. The answer is the last. The target is said
// again each time: a small model does not compare with what it read long ago.
//     64: 5*3=15 15+8=23 15-8=7 15*8=120, 64: 8+3=11 11+5=16 ... 64: 5+3=8 8+8=16 8-8=0 8*8=64
static void work_countdown(Line *line, Term *answer, const Question *q, Random *r, double gives_up)
{
    uint64_t ways = count_ways(q->n), first = pick_way(q, r);
    Term last[2];
    Line steps;
    int found = 0, tired = 0;
    for (uint64_t k = 0; k < ways && !found && !tired; k++) {
        if (!take_way(last, q, (first + k) % ways, &steps)) continue;
        for (size_t i = 0; i < 4 && !found; i++)
            found = combine_terms(answer, &last[0], operators[i], &last[1], &steps) &&
                    answer->value == q->target;
        if (!found && line->length > LINE / 2) continue;
        put(line, "%s%ld: %s", line->length ? ", " : "", q->target, steps.text);
        tired = chance(r, gives_up);
    }
}

// Addition in columns, from one to the next: letter, digits, carry, sum. Things are said again at
// times, in answers too, so that no count of them tells when to stop.
//     t760=13k481=13e351=09;0
static long work_columns(Line *line, const Question *q, Random *r, double again)
{
    long carry = 0, sum;
    for (size_t k = 0; q->letter[k]; k++, carry = sum / 10) {
        long a = digit(q->number[0], k), b = digit(q->number[1], k);
        sum = a + b + carry;
        do put(line, "%c%ld%ld%ld=%02ld", q->letter[k], a, b, carry, sum);
        while (chance(r, again));
    }
    put(line, ";%ld", carry);
    return q->number[0] + q->number[1];
}

static void answer_columns(Line *line, const Question *q, long sum, Random *r, double again)
{
    for (const char *l = q->letter; *l; l++, sum /= 10)
        do put(line, "%c%ld", *l, sum % 10);
        while (chance(r, again));
    put(line, ";%ld", sum % 10);
}

// The value p / q of an expression, q = 0 if it has none; each number it uses is taken out of those
// that may be used.
typedef struct { long long p, q; } Ratio;

typedef struct {
    const char *at;
    Question left;
    int depth;
} Expression;

static Ratio parse_sum(Expression *e);

static Ratio parse_factor(Expression *e) // a number or ( sum )
{
    Ratio none = {0, 0}, x = none;
    long number;
    if (*e->at == '(' && e->depth < NUMBERS) {
        e->at++, e->depth++;
        x = parse_sum(e);
        e->depth--;
        return *e->at == ')' && e->at++ ? x : none;
    }
    if (!take_number(&e->at, &number)) return none;
    for (size_t i = 0; i < e->left.n; i++)
        if (e->left.number[i] == number) {
            e->left.number[i] = e->left.number[--e->left.n];
            x.p = number, x.q = 1;
            return x;
        }
    return none;
}

static Ratio parse_product(Expression *e) // factor * factor / ...
{
    Ratio x = parse_factor(e);
    while (x.q && (*e->at == '*' || *e->at == '/')) {
        char op = *e->at++;
        Ratio y = parse_factor(e), result = {x.p * (op == '*' ? y.p : y.q),
                                             x.q * (op == '*' ? y.q : y.p)};
        x = result;
        if (!y.q) x.q = 0;
    }
    return x;
}

static Ratio parse_sum(Expression *e) // product + product - ...
{
    Ratio x = parse_product(e);
    while (x.q && (*e->at == '+' || *e->at == '-')) {
        int sign = *e->at++ == '+' ? 1 : -1;
        Ratio y = parse_product(e), result = {x.p * y.q + sign * y.p * x.q, x.q * y.q};
        x = result;
    }
    return x;
}

// Whether text is the answer to a question, written as it should be.
static int is_right(const Question *q, const char *text)
{
    Question sorted = *q;
    Line right = {0, ""};
    if (q->task == TASK_COUNTDOWN) {
        Expression e = {text, *q, 0};
        Ratio x = parse_sum(&e);
        return x.q && !*e.at && e.left.n == 0 && x.p == q->target * x.q;
    }
    qsort(sorted.number, q->n, sizeof *sorted.number, compare_longs);
    if (q->task == TASK_SORT) put_numbers(&right, &sorted);
    else if (q->task == TASK_COLUMNS) {
        Random none = {0, 0, 0};
        answer_columns(&right, q, q->number[0] + q->number[1], &none, 0);
    } else put(&right, "%ld", q->task == TASK_ADD ? q->number[0] + q->number[1]
                                                : q->number[0] * q->number[1]);
    return !strcmp(text, right.text);
}

// Adds an answer of the given quality to a line.
static void put_solution(Line *line, const Question *question, Random *r, const Quality *quality)
{
    Question q = *question;
    Line thoughts = {0, ""};
    Term answer;
    int worked = chance(r, quality->worked), wrong = !worked && !chance(r, quality->right);
    double slips = worked || q.task == TASK_COLUMNS ? quality->slips : 0;
    long x = 0, places = q.task == TASK_COLUMNS ? (long)strlen(q.letter) : 3;
    switch (q.task) {
    case TASK_ADD: x = work_add(&thoughts, &q, r, slips); break;
    case TASK_MUL: x = work_mul(&thoughts, &q, r, slips); break;
    case TASK_SORT: work_sort(&thoughts, &q, r, slips + wrong); break;
    case TASK_COLUMNS: x = work_columns(&thoughts, &q, r, slips); break;
    default:
        if (worked) work_countdown(&thoughts, &answer, &q, r, slips);
        else
            do guess_countdown(&answer, &q, r);
            while ((answer.value == q.target) == wrong);
    }
    if (wrong) x += power_of_ten((size_t)pick(r, places)) * (1 + pick(r, 8));
    put(line, "<think>%s</think><answer>", worked ? thoughts.text : "");
    if (q.task == TASK_SORT) put_numbers(line, &q);
    else if (q.task == TASK_COUNTDOWN) // without the outermost ( )
        put(line, "%.*s", (int)strlen(answer.text) - 2, answer.text + 1);
    else if (q.task == TASK_COLUMNS) answer_columns(line, &q, x, r, slips);
    else put(line, "%ld", x);
    put(line, "</answer>");
}

typedef struct { double accuracy, format; } Reward; // 0 or 1 each

// The rules of R1-Zero: 1 for the format, which is all of it, nothing around it, twice nothing; and
// 1 if the answer is right as well. Thoughts may be empty: thinking is not what is paid for.
static Reward judge(const Question *q, const char *answer)
{
    static const char open[] = "<think>", middle[] = "</think><answer>", close[] = "</answer>";
    Reward none = {0, 0}, r = {0, 1};
    char text[LINE];
    if (strncmp(answer, open, sizeof open - 1)) return none;
    answer += sizeof open - 1;
    answer += strcspn(answer, "<");
    if (strncmp(answer, middle, sizeof middle - 1)) return none;
    answer += sizeof middle - 1;
    size_t n = strcspn(answer, "<");
    if (!n || n >= LINE || strcmp(answer + n, close)) return none;
    memcpy(text, answer, n);
    text[n] = 0;
    r.accuracy = is_right(q, text);
    return r;
}

// ------------------------------------------------------------------------------------------------
// 10  Files

// Opens a regular file; opening a pipe could wait for ever.
static FILE *open_file(const char *path, size_t *size)
{
    struct stat st;
    FILE *f = NULL;
    if (!stat(path, &st)) {
        NEED(S_ISREG(st.st_mode), "%s: not a regular file", path);
        f = fopen(path, "rb");
    }
    NEED(f, "%s: cannot open: %s", path, strerror(errno));
    *size = (size_t)st.st_size;
    return f;
}

// The whole file, with a 0 after it; at most `most` bytes.
static char *read_file(const char *path, size_t *size, size_t most)
{
    FILE *f = open_file(path, size);
    NEED(*size <= most, "%s: %zu bytes is too large; at most %zu are taken", path, *size, most);
    char *data = (char *)host_alloc(*size + 1, 1);
    NEED(fread(data, 1, *size, f) == *size, "%s: cannot read: %s", path,
         ferror(f) ? strerror(errno) : "it got shorter");
    NEED(!fclose(f), "%s: cannot close: %s", path, strerror(errno));
    return data;
}

static int is_same_file(const char *a, const char *b)
{
    struct stat x, y;
    return !stat(a, &x) && !stat(b, &y) && x.st_dev == y.st_dev && x.st_ino == y.st_ino;
}

typedef struct { char text[4096]; } Path;

static Path path_append(const char *path, const char *more)
{
    Path p;
    int n = snprintf(p.text, sizeof p.text, "%s%s", path, more);
    NEED(n < (int)sizeof p.text, "%.99s...: the path is too long", path);
    return p;
}

static Path path_join(const char *directory, const char *name)
{
    return path_append(path_append(directory, "/").text, name);
}

// JSON, strictly as RFC 8259 has it, at most JSON_DEPTH deep, no key twice. A string's text lies in
// the parsed buffer, its escapes replaced and a 0 after it; all values lie in one array.
enum { JSON_DEPTH = 32, JSON_VALUES = 1 << 22, JSON_BYTES = 100 << 20 };
enum { JSON_NULL, JSON_FALSE, JSON_TRUE, JSON_NUMBER, JSON_STRING, JSON_ARRAY, JSON_OBJECT };

typedef struct Json {
    int type;
    char *key, *string;  // key: in an object
    double number;
    size_t length;       // of an array or object
    struct Json *child, *next;
} Json;

typedef struct {
    const char *file;
    char *begin, *at, *end; // *end is 0
    Json *next;             // unused value
} Parser;

static void json_fail(const Parser *p, const char *what)
{
    die(BAD_INPUT, "%s: not valid JSON at byte %zu: %s", p->file, (size_t)(p->at - p->begin), what);
}

static int json_take(Parser *p, const char *word) // after white space
{
    size_t n = strlen(word);
    p->at += strspn(p->at, " \t\r\n");
    if (strncmp(p->at, word, n)) return 0;
    p->at += n;
    return 1;
}

static unsigned json_hex(Parser *p) // \uXXXX
{
    char digits[5] = {0};
    if (strncmp(p->at, "\\u", 2) || strspn(p->at + 2, "0123456789abcdefABCDEF") < 4)
        json_fail(p, "an escape that JSON does not know");
    memcpy(digits, p->at + 2, 4);
    p->at += 6;
    return (unsigned)strtoul(digits, NULL, 16);
}

static char *utf8_put(char *to, unsigned code)
{
    int n = code < 0x80 ? 1 : code < 0x800 ? 2 : code < 0x10000 ? 3 : 4; // bytes
    for (int i = n - 1; i > 0; i--, code >>= 6) to[i] = (char)(0x80 | (code & 0x3F));
    to[0] = (char)(n == 1 ? code : (0xF00u >> n) | code);
    return to + n;
}

// Length of the UTF-8 character at s, 0 if there is none: no 0, overlong form or surrogate.
static int utf8_length(const char *s)
{
    static const unsigned least[5] = {1, 1, 0x80, 0x800, 0x10000};
    const unsigned char *u = (const unsigned char *)s;
    int n = *u < 0x80 ? 1 : *u >> 5 == 6 ? 2 : *u >> 4 == 14 ? 3 : *u >> 3 == 30 ? 4 : 0;
    unsigned code = n == 1 ? *u : *u & (0x7Fu >> n);
    for (int i = 1; i < n; i++) {
        if (u[i] >> 6 != 2) return 0;
        code = code << 6 | (u[i] & 0x3F);
    }
    return code < least[n] || code > 0x10FFFF || code >> 11 == 0xD800 >> 11 ? 0 : n;
}

static int is_utf8(const char *s)
{
    for (int n; *s; s += n)
        if (!(n = utf8_length(s))) return 0;
    return 1;
}

static char *json_string(Parser *p)
{
    static const char from[] = "\"\\/bfnrt", into[] = "\"\\/\b\f\n\r\t";
    if (!json_take(p, "\"")) json_fail(p, "expected a string");
    char *start = p->at, *to = start; // never beyond what is read
    while (*p->at != '"') {
        const char *escape = *p->at == '\\' && p->at[1] ? strchr(from, p->at[1]) : NULL;
        if ((unsigned char)*p->at < 0x20) json_fail(p, "a string ends in a control character");
        if (*p->at != '\\') {
            *to++ = *p->at++;
        } else if (escape) {
            *to++ = into[escape - from];
            p->at += 2;
        } else {
            unsigned code = json_hex(p), low = code >> 10 == 0xD800 >> 10 ? json_hex(p) : 0;
            if (low && low >> 10 != 0xDC00 >> 10) json_fail(p, "half a surrogate pair");
            to = utf8_put(to, low ? 0x10000 + ((code & 0x3FF) << 10 | (low & 0x3FF)) : code);
        }
    }
    p->at++;
    *to = 0;
    if (strlen(start) < (size_t)(to - start) || !is_utf8(start)) json_fail(p, "not UTF-8");
    return start;
}

static double json_number(Parser *p)
{
    static const char digits[] = "0123456789";
    char *s = p->at + (*p->at == '-');
    size_t whole = strspn(s, digits), fraction = 1, exponent = 1;
    if (!whole || (*s == '0' && whole > 1)) json_fail(p, "expected a value");
    s += whole;
    if (*s == '.') s += 1 + (fraction = strspn(s + 1, digits));
    if (*s == 'e' || *s == 'E') {
        s += s[1] == '+' || s[1] == '-' ? 2 : 1;
        s += exponent = strspn(s, digits);
    }
    double value = strtod(p->at, NULL);
    if (!fraction || !exponent) json_fail(p, "a number ends without a digit");
    if (!isfinite(value)) json_fail(p, "the number is out of range");
    p->at = s;
    return value;
}

static int compare_strings(const void *x, const void *y) // or of structs that begin with one
{
    return strcmp(*(const char *const *)x, *(const char *const *)y);
}

static void json_unique_keys(const Parser *p, const Json *object)
{
    char **key = (char **)host_alloc(object->length, sizeof(char *));
    size_t n = 0;
    for (const Json *j = object->child; j; j = j->next) key[n++] = j->key;
    qsort(key, n, sizeof(char *), compare_strings);
    for (size_t i = 1; i < n; i++)
        NEED(strcmp(key[i - 1], key[i]), "%s: \"%s\" appears twice", p->file, key[i]);
    free(key);
}

static Json *json_value(Parser *p, int depth)
{
    static const char *const words[] = {"null", "false", "true"};
    Json *j = p->next++, **last = &j->child;
    if (depth > JSON_DEPTH) json_fail(p, "nested too deeply");
    if (json_take(p, "{")) j->type = JSON_OBJECT;
    else if (json_take(p, "[")) j->type = JSON_ARRAY;
    else if (*p->at == '"') j->type = JSON_STRING, j->string = json_string(p);
    else while (j->type < JSON_NUMBER && !json_take(p, words[j->type])) j->type++;
    if (j->type == JSON_NUMBER) j->number = json_number(p);
    if (j->type < JSON_ARRAY) return j;
    for (; !json_take(p, j->type == JSON_OBJECT ? "}" : "]"); last = &(*last)->next) {
        char *key = NULL;
        if (j->length++ && !json_take(p, ",")) json_fail(p, "expected ',' or the closing bracket");
        if (j->type == JSON_OBJECT) {
            key = json_string(p);
            if (!json_take(p, ":")) json_fail(p, "expected ':'");
        }
        *last = json_value(p, depth + 1);
        (*last)->key = key;
    }
    if (j->type == JSON_OBJECT) json_unique_keys(p, j);
    return j;
}

// Parses text[0 .. size), which a 0 follows; file is named in errors. One free() frees it all.
static Json *json_parse(const char *file, char *text, size_t size)
{
    size_t most = 1; // each value but the first follows one of these
    for (size_t i = 0; i < size; i++) most += text[i] == ',' || text[i] == '[' || text[i] == '{';
    NEED(most <= JSON_VALUES, "%s: up to %zu JSON values; at most %d are taken", file, most,
         JSON_VALUES);
    Parser p = {file, text, text, text + size, (Json *)host_alloc(most, sizeof(Json))};
    Json *j = json_value(&p, 0);
    json_take(&p, ""); // white space
    if (p.at != p.end) json_fail(&p, "something follows the value");
    NEED(j->type == JSON_OBJECT, "%s: expected a JSON object", file);
    return j;
}

static int is_whole(double x, double most) { return x >= 0 && x <= most && x == floor(x); }

static const Json *json_get(const Json *object, const char *key) // NULL: there is none
{
    const Json *j = object->type == JSON_OBJECT ? object->child : NULL;
    while (j && strcmp(j->key, key)) j = j->next;
    return j;
}

// The number under a key: whole and at most `most`, unless that is 0; with 1 it may be a boolean.
// null says no more than a missing key, for which `absent` stands in unless it is NAN.
static double config_number(const Json *object, const char *file, const char *key, int most,
                            double absent)
{
    const Json *j = json_get(object, key);
    int missing = !j || j->type == JSON_NULL;
    NEED(!missing || !isnan(absent), "%s: %s is missing", file, key);
    if (missing) return absent;
    if (most == 1 && (j->type == JSON_TRUE || j->type == JSON_FALSE)) return j->type == JSON_TRUE;
    NEED(j->type == JSON_NUMBER, "%s: %s must be a number", file, key);
    NEED(!most || is_whole(j->number, most),
         "%s: %s is %g; it must be a whole number from 0 to %d", file, key, j->number, most);
    return j->number;
}

// Keys that may stand in a config.json, of which this program knows one sense only.
static const char *const config_fixed[][2] = {
    {"model_type", "deepseek_v3"}, {"scoring_func", "sigmoid"}, {"topk_method", "noaux_tc"},
    {"hidden_act", "silu"}, {"seq_aux", "true"}, {"attention_bias", "false"},
    {"rope_interleave", "true"}, {"tie_word_embeddings", "false"}, {"moe_layer_freq", "1"},
};
enum { CONFIG_FIXED = sizeof config_fixed / sizeof *config_fixed, CONFIG_STRINGS = 4 };

static void config_expect(const Json *object, const char *file, const char *key, const char *value)
{
    const Json *j = json_get(object, key);
    char number[32];
    if (!j || j->type == JSON_NULL) return;
    snprintf(number, sizeof number, "%.15g", j->number);
    const char *is = j->type == JSON_STRING ? j->string : j->type == JSON_NUMBER ? number :
                     j->type == JSON_TRUE ? "true" : j->type == JSON_FALSE ? "false" : "nested";
    NEED(!strcmp(is, value), "%s: %s is %s; this program knows only %s", file, key, is, value);
}

// An object that need not be there.
static const Json *config_object(const Json *object, const char *file, const char *key)
{
    const Json *j = json_get(object, key);
    if (!j || j->type == JSON_NULL) return NULL;
    NEED(j->type == JSON_OBJECT, "%s: %s must be an object", file, key);
    return j;
}

// YaRN is in "rope_scaling" and the base beside it; transformers 5 has "rope_parameters", the base
// inside and rope_type "default" where there is no YaRN.
static void rope_from_json(Config *c, const Json *j, const char *file)
{
    const Json *rope = config_object(j, file, "rope_scaling");
    if (!rope) rope = config_object(j, file, "rope_parameters");
    if (!rope) return;
    const Json *type = json_get(rope, "rope_type");
    if (!type) type = json_get(rope, "type");
    int yarn = type ? type->type != JSON_STRING || strcmp(type->string, "default")
                    : json_get(rope, "factor") != NULL;
    if (yarn) {
        config_expect(rope, file, "type", "yarn");
        config_expect(rope, file, "rope_type", "yarn");
        c->yarn_factor = 1, c->yarn_original = 4096, c->yarn_fast = 32, c->yarn_slow = 1;
        c->yarn_mscale = 1, c->yarn_mscale_all_dim = 0;
    }
    for (const Json *k = rope->child; k; k = k->next) {
        double *to = !strcmp(k->key, "rope_theta") ? &c->theta : NULL;
#define FIND_YARN(symbol, name, ...) if (yarn && !strcmp(k->key, #name)) to = &c->symbol;
        CONFIG_YARN(FIND_YARN)
        if (to) *to = config_number(rope, file, k->key, 0, *to);
        else NEED(k->type == JSON_NULL || !strcmp(k->key, "type") || !strcmp(k->key, "rope_type"),
                  "%s: %s: %s is not known here", file, rope->key, k->key);
    }
    NEED(!yarn || c->yarn_factor >= 1, "%s: %s needs factor >= 1", file, rope->key);
}

enum { FP8_BLOCK = 128 }; // rows, and columns, that share a scale: [V3] 3.3.2

static Config config_load(const char *file)
{
    static const char optional[] = // none, 1 group, normed weights
        " num_nextn_predict_layers q_lora_rank n_group topk_group norm_topk_prob ";
    Config config = config_preset(LAPTOP), *c = &config;
    size_t size;
    char *text = read_file(file, &size, 1 << 20), heads[32];
    Json *j = json_parse(file, text, size);
    c->D = c->Rq = 0;
    c->alpha = 0;
#define READ_SIZE(symbol, key, most, ...) \
    c->symbol = (size_t)config_number(j, file, #key, most, strstr(optional, " " #key " ") \
                                      ? (double)c->symbol : NAN);
#define READ_REAL(symbol, key, ...) c->symbol = config_number(j, file, #key, 0, c->symbol);
    CONFIG_SIZES(READ_SIZE)
    CONFIG_REALS(READ_REAL)
    rope_from_json(c, j, file);
    NEED(c->G == 1 || json_get(j, "topk_group"), "%s: topk_group is missing", file);
    if (c->E == 0) c->dense = c->L; // for transformers, that decides by it alone
    for (size_t i = 0; i < CONFIG_FIXED; i++)
        config_expect(j, file, config_fixed[i][0], config_fixed[i][1]);
    snprintf(heads, sizeof heads, "%zu", c->NH);
    config_expect(j, file, "num_key_value_heads", heads);
    const Json *fp8 = config_object(j, file, "quantization_config"); // as stored_read takes it
    if (fp8) {
        const Json *block = json_get(fp8, "weight_block_size");
        config_expect(fp8, file, "quant_method", "fp8");
        config_expect(fp8, file, "fmt", "e4m3");
        NEED(block && block->length == 2 && block->child->number == FP8_BLOCK &&
             block->child->next->number == FP8_BLOCK, "%s: quantization_config: weight_block_size "
             "must be [%d, %d]", file, FP8_BLOCK, FP8_BLOCK);
    }
    config_check(c, file);
    double n = 0; // sizes that are small enough alone may still be too many parameters
#define ADD_SIZE(type, field, present, count, rows, cols, ...) \
    if (present) n += (double)(count) * (double)(rows) * (double)(cols);
    MODEL_PARAMS(ADD_SIZE)
    for (size_t l = 0; l < layers(c); l++) {
        int moe = is_moe(c, l), mtp = is_mtp(c, l);
        LAYER_PARAMS(ADD_SIZE)
    }
    NEED(n < 0x1p56, "%s: sizes overflow: the model would have %.3g parameters", file, n);
    free(j);
    free(text);
    return config;
}

// A file that takes its name only when it is whole and on the disk, so that whoever looks finds the
// old one or the new one. Any error ends the program with the old one in place; one of printing to
// f is found at the end.
typedef struct {
    FILE *f;
    Path path, temporary;
} Output;

static Output output_open(const char *path)
{
    Output o;
    struct stat st;
    NEED(stat(path, &st) || S_ISREG(st.st_mode), "%s: not a regular file; name another", path);
    if (!realpath(path, o.path.text)) o.path = path_append(path, ""); // not there yet
    o.temporary = path_append(o.path.text, ".tmp");
    o.f = fopen(o.temporary.text, "wb");
    NEED(o.f, "%s: cannot write: %s; choose another directory", o.temporary.text, strerror(errno));
    return o;
}

static void output_check(const Output *o, int good)
{
    int error = errno;
    if (good) return;
    remove(o->temporary.text);
    die(FAILED, "%s: cannot write: %s; what stood there before is unharmed", o->path.text,
        strerror(error));
}

static void output_write(const Output *o, const void *data, size_t bytes)
{
    output_check(o, fwrite(data, 1, bytes, o->f) == bytes);
}

static void output_close(const Output *o)
{
    Path directory = o->path;
    char *slash = strrchr(directory.text, '/');
    output_check(o, !fflush(o->f) && !ferror(o->f) && !fsync(fileno(o->f)));
    output_check(o, !fclose(o->f));
    output_check(o, !rename(o->temporary.text, o->path.text));
    if (slash) slash[slash == directory.text] = 0;
    int fd = open(slash ? directory.text : ".", O_RDONLY);
    if (fd < 0) return; // the rename is on the disk only after an fsync, too
    fsync(fd);          // some file systems refuse; there is no more to be done then
    close(fd);
}

// Prints text, which must be UTF-8, as it stands in a JSON string.
static void json_print(FILE *f, const char *text)
{
    for (; *text; text++)
        if (*text == '"' || *text == '\\' || (unsigned char)*text < 0x20)
            fprintf(f, "\\u%04x", (unsigned)*text);
        else fputc(*text, f);
}

static void config_save(const Config *c, const char *directory)
{
    Path path = path_join(directory, "config.json");
    Output o = output_open(path.text);
    char room[32];
    fprintf(o.f, "{\n  \"architectures\": [\"DeepseekV3ForCausalLM\"],\n"
            "  \"torch_dtype\": \"float32\",\n");
    for (size_t i = 0; i < CONFIG_FIXED; i++)
        fprintf(o.f, i < CONFIG_STRINGS ? "  \"%s\": \"%s\",\n" : "  \"%s\": %s,\n",
                config_fixed[i][0], config_fixed[i][1]);
#define PRINT_SIZE(symbol, key, ...) \
    snprintf(room, sizeof room, "%zu", c->symbol); \
    fprintf(o.f, "  \"%s\": %s,\n", #key, \
            !strcmp(#key, "norm_topk_prob") ? (c->symbol ? "true" : "false") : \
            !strcmp(#key, "q_lora_rank") && !c->symbol ? "null" : room);
#define PRINT_REAL(symbol, key, ...) /* with a point: transformers takes no 1 for 1.0 */ \
    fprintf(o.f, "  \"%s\": %#.17g,\n", #key, c->symbol);
    CONFIG_SIZES(PRINT_SIZE)
    CONFIG_REALS(PRINT_REAL)
    fprintf(o.f, "  \"num_key_value_heads\": %zu,\n  \"rope_scaling\": ", c->NH);
#define PRINT_YARN(symbol, key, ...) \
    fprintf(o.f, &c->symbol == &c->yarn_original ? ", \"%s\": %.17g" : ", \"%s\": %#.17g", #key, \
            c->symbol);
    if (c->yarn_factor > 0) {
        fprintf(o.f, "{\"type\": \"yarn\"");
        CONFIG_YARN(PRINT_YARN)
    }
    fprintf(o.f, "%s\n}\n", c->yarn_factor > 0 ? "}" : "null");
    output_close(&o);
}

// safetensors: 8 bytes of header length, a JSON header, the data. What is to be written:
typedef struct {
    char name[NAME_MAX_LENGTH];
    size_t shape[3], dims;
    const accum *data; // device memory, or else
    const moment *moments;
} Entry;

// "rows,columns"
static void shape_text(char text[64], const size_t *shape, size_t dims)
{
    int n = 0;
    for (size_t d = 0; d < dims; d++)
        n += snprintf(text + n, (size_t)(64 - n), "%s%zu", d ? "," : "", shape[d]);
}

static size_t entry_size(const Entry *e)
{
    size_t n = 1;
    for (size_t i = 0; i < e->dims; i++) n *= e->shape[i];
    return n;
}

// Begins a file; the caller may print more members of "__metadata__", each after a comma.
static Output safetensors_open(const char *path)
{
    Output o = output_open(path);
    fprintf(o.f, "%8s{\"__metadata__\":{\"format\":\"pt\"", "");
    return o;
}

static void safetensors_close(const Output *o, const Entry *entry, size_t n)
{
    size_t at = 0, largest = 0;
    char shape[64];
    fprintf(o->f, "}");
    for (size_t i = 0; i < n; i++) {
        size_t size = entry_size(&entry[i]), begin = at;
        at += 4 * size;
        if (size > largest) largest = size;
        shape_text(shape, entry[i].shape, entry[i].dims);
        fprintf(o->f, ",\"%s\":{\"dtype\":\"F32\",\"shape\":[%s],\"data_offsets\":[%zu,%zu]}",
                entry[i].name, shape, begin, at);
    }
    fprintf(o->f, "}");
    long end = ftell(o->f), pad = -end & 7; // so that the data is aligned
    output_check(o, end > 0);
    fprintf(o->f, "%*s", (int)pad, "");
    accum *host = (accum *)host_alloc(largest, sizeof(accum));
    float *single = (float *)host_alloc(largest, sizeof(float));
    for (size_t i = 0; i < n; i++) {
        size_t size = entry_size(&entry[i]);
        if (entry[i].data) to_host(host, entry[i].data, size * sizeof(accum));
        else reals_to_host(host, entry[i].moments, size);
        for (size_t j = 0; j < size; j++) single[j] = (float)host[j];
        output_write(o, single, size * sizeof(float));
    }
    unsigned char prefix[8];
    for (int i = 0; i < 8; i++) prefix[i] = (unsigned char)((uint64_t)(end + pad - 8) >> 8 * i);
    output_check(o, !fseek(o->f, 0, SEEK_SET));
    output_write(o, prefix, 8);
    output_close(o);
    free(host);
    free(single);
}

static size_t count_entries(const Layout *layout)
{
    size_t n = 0;
    for (size_t i = 0; i < layout->tensors; i++) n += layout->tensor[i].count;
    return n;
}

// Lists the layout's tensors for saving, each expert's by its own name; data holds all of them, or
// moments. Returns where the list ends.
static Entry *entries_add(Entry *e, const Layout *layout, const char *prefix, const accum *data,
                          const moment *moments)
{
    for (const Tensor *t = layout->tensor; t < layout->tensor + layout->tensors; t++)
        for (size_t k = 0; k < t->count; k++, e++) {
            tensor_name(e->name, prefix, t, k);
            e->dims = tensor_dims(t);
            e->shape[0] = e->dims == 1 ? t->cols : t->rows;
            e->shape[1] = t->cols;
            size_t at = t->offset + k * t->rows * t->cols;
            if (data) e->data = data + at;
            else e->moments = moments + at;
        }
    return e;
}

static void make_directory(const char *path) // and those above it
{
    struct stat st;
    int error = 0;
    Path part = path_join(path, "");
    for (char *slash = strchr(part.text, '/'); slash; slash = strchr(slash + 1, '/')) {
        *slash = 0;
        error = mkdir(part.text, 0777) ? errno : 0;
        *slash = '/';
    }
    NEED(!error || (!stat(path, &st) && S_ISDIR(st.st_mode)),
         "%s: cannot make this directory: %s; choose another with --out", path,
         strerror(error == EEXIST ? ENOTDIR : error));
}

// Writes config.json and model.safetensors.
static void model_save(const Model *m, const char *directory)
{
    Entry *entry = (Entry *)host_alloc(count_entries(&m->layout), sizeof(Entry));
    Entry *end = entries_add(entry, &m->layout, "", m->master, NULL);
    Path path = path_join(directory, "model.safetensors");
    make_directory(directory);
    config_save(&m->config, directory);
    Output o = safetensors_open(path.text);
    safetensors_close(&o, entry, (size_t)(end - entry));
    free(entry);
}

// One safetensors file that is being read.
typedef struct {
    Path path;
    FILE *f;
    char *text;
    Json *header;       // its strings are in text
    size_t begin, size; // of the data
} Shard;

static Shard shard_open(Path path)
{
    Shard s = {path, NULL, NULL, NULL, 0, 0};
    unsigned char prefix[8];
    uint64_t length = 0;
    s.f = open_file(path.text, &s.size);
    NEED(s.size >= 8 && fread(prefix, 1, 8, s.f) == 8,
         "%s: not a safetensors file: shorter than 8 bytes", path.text);
    for (int i = 0; i < 8; i++) length |= (uint64_t)prefix[i] << 8 * i;
    NEED(length <= min_size(s.size - 8, JSON_BYTES), "%s: not a safetensors file, or truncated: a "
         "header of %llu bytes in a file of %zu; at most %d are taken", path.text,
         (unsigned long long)length, s.size, JSON_BYTES);
    s.begin = 8 + (size_t)length;
    s.size -= s.begin;
    s.text = (char *)host_alloc(s.begin, 1);
    NEED(fread(s.text, 1, s.begin - 8, s.f) == s.begin - 8, "%s: cannot read the header",
         path.text);
    s.header = json_parse(path.text, s.text, s.begin - 8);
    return s;
}

// The formats of numbers that are read. Shifted to where a float has its exponent and mantissa, a
// code is the float but, where the exponent is shorter, for a factor.
enum { F32, BF16, F16, F8_E4M3, DTYPES };
static const struct {
    const char *name;
    size_t size;
    int shift;
    float factor;
    uint32_t infinite; // the first code, but for its sign, of no finite number
} dtypes[DTYPES] = {
    {"F32", 4, 0, 1, 0x7F800000}, {"BF16", 2, 16, 1, 0x7F80}, {"F16", 2, 13, 0x1p112f, 0x7C00},
    {"F8_E4M3", 1, 20, 0x1p120f, 0x7F},
};

static float number_decode(int dtype, uint32_t code) // NAN for all that is not finite
{
    size_t bits = 8 * dtypes[dtype].size;
    uint32_t sign = 1u << (bits - 1), rest = code & (sign - 1);
    union { uint32_t u; float f; } x;
    x.u = (code & sign) << (32 - bits) | rest << dtypes[dtype].shift;
    return rest < dtypes[dtype].infinite ? x.f * dtypes[dtype].factor : NAN;
}

// A tensor as a header describes it.
typedef struct {
    const char *name;
    const Shard *shard;
    const char *file;
    size_t shape[3], dims, begin, end; // begin, end: of its data
    int dtype, used;
} Stored;

static size_t header_size(const Stored *t, const Json *j)
{
    NEED(j->type == JSON_NUMBER && is_whole(j->number, 0x1p53 - 1),
         "%s: %s: sizes and offsets must be whole numbers below 2^53", t->file, t->name);
    return (size_t)j->number;
}

static Stored stored_parse(const Shard *s, const Json *j)
{
    Stored t = {j->key, s, s->path.text, {0, 0, 0}, 0, 0, 0, 0, 0};
    const Json *dtype = json_get(j, "dtype"), *shape = json_get(j, "shape");
    const Json *offsets = json_get(j, "data_offsets");
    NEED(dtype && dtype->type == JSON_STRING && shape && shape->type == JSON_ARRAY && offsets &&
         offsets->type == JSON_ARRAY && offsets->length == 2,
         "%s: %s: needs a dtype, a shape and two data_offsets", t.file, t.name);
    while (t.dtype < DTYPES && strcmp(dtype->string, dtypes[t.dtype].name)) t.dtype++;
    NEED(t.dtype < DTYPES, "%s: %s: dtype %s is not read; F32, BF16, F16 and F8_E4M3 are", t.file,
         t.name, dtype->string);
    NEED(shape->length >= 1 && shape->length <= 3,
         "%s: %s: has %zu dimensions; 1 to 3 are expected", t.file, t.name, shape->length);
    size_t n = dtypes[t.dtype].size;
    for (const Json *size = shape->child; size; size = size->next) {
        size_t d = t.shape[t.dims++] = header_size(&t, size);
        n = d && n > SIZE_MAX / d ? SIZE_MAX : n * d;
    }
    t.begin = header_size(&t, offsets->child);
    t.end = header_size(&t, offsets->child->next);
    NEED(t.begin <= t.end && t.end <= s->size && t.end - t.begin == n,
         "%s: %s: its shape needs %zu bytes, its offsets are [%zu, %zu] and the file has %zu of "
         "data", t.file, t.name, n, t.begin, t.end, s->size);
    return t;
}

static int compare_places(const void *x, const void *y)
{
    const Stored *a = (const Stored *)x, *b = (const Stored *)y;
    if (a->begin == b->begin) return a->end < b->end ? -1 : a->end > b->end; // empty ones first
    return a->begin < b->begin ? -1 : 1;
}

// An opened checkpoint: the tensors of all its files.
typedef struct {
    const char *directory;
    Shard *shard;
    size_t shards, n;
    Stored *stored; // [n], sorted by name
} Checkpoint;

// Lists the tensors of the shards. Data must fill a file without gap or overlap.
static Checkpoint checkpoint_list(const char *directory, Shard *shard, size_t shards)
{
    Checkpoint c = {directory, shard, shards, 0, NULL};
    size_t most = 0;
    for (size_t i = 0; i < shards; i++) most += shard[i].header->length;
    c.stored = (Stored *)host_alloc(most, sizeof(Stored));
    for (const Shard *s = shard; s < shard + shards; s++) {
        size_t first = c.n, end = 0;
        for (const Json *j = s->header->child; j; j = j->next)
            if (strcmp(j->key, "__metadata__")) c.stored[c.n++] = stored_parse(s, j);
        qsort(c.stored + first, c.n - first, sizeof(Stored), compare_places);
        for (const Stored *t = c.stored + first; t < c.stored + c.n; end = t++->end)
            NEED(t->begin == end, "%s: %s: its data [%zu, %zu] overlaps or leaves a gap", t->file,
                 t->name, t->begin, t->end);
        NEED(end == s->size, "%s: leaves a gap of %zu bytes after its last tensor", s->path.text,
             s->size - end);
    }
    qsort(c.stored, c.n, sizeof(Stored), compare_strings);
    for (size_t i = 1; i < c.n; i++)
        NEED(strcmp(c.stored[i - 1].name, c.stored[i].name), "%s: %s: stands in %s too",
             c.stored[i].file, c.stored[i].name, c.stored[i - 1].file);
    return c;
}

static Stored *checkpoint_find(const Checkpoint *c, const char *name) // NULL: there is none
{
    return (Stored *)bsearch(&name, c->stored, c->n, sizeof(Stored), compare_strings);
}

static Checkpoint checkpoint_file(const char *directory, const char *name)
{
    Shard *shard = (Shard *)host_alloc(1, sizeof(Shard));
    *shard = shard_open(path_join(directory, name));
    return checkpoint_list(directory, shard, 1);
}

enum { MAX_SHARDS = 1000 }; // about as many as can be open at once

// Opens model.safetensors or, where only an index stands, the files that it names: then both must
// say the same of what is where.
static Checkpoint checkpoint_open(const char *directory)
{
    Path index_path = path_join(directory, "model.safetensors.index.json");
    const char *path = index_path.text;
    size_t size, shards = 0;
    if (!access(path_join(directory, "model.safetensors").text, F_OK) || access(path, F_OK))
        return checkpoint_file(directory, "model.safetensors");
    char *text = read_file(path, &size, JSON_BYTES);
    Json *index = json_parse(path, text, size);
    const Json *map = json_get(index, "weight_map");
    NEED(map && map->type == JSON_OBJECT && map->child, "%s: has no weight_map", path);
    Shard *shard = (Shard *)host_alloc(min_size(map->length, MAX_SHARDS), sizeof(Shard));
    for (const Json *j = map->child; j; j = j->next) {
        NEED(j->type == JSON_STRING && *j->string && !strchr(j->string, '/'),
             "%s: %s: must name a file in the same directory", path, j->key);
        Path file = path_join(directory, j->string);
        size_t i = 0;
        while (i < shards && strcmp(shard[i].path.text, file.text)) i++;
        NEED(i < MAX_SHARDS, "%s: names more than %d files", path, MAX_SHARDS);
        if (i == shards) shard[shards++] = shard_open(file);
    }
    Checkpoint c = checkpoint_list(directory, shard, shards);
    for (const Json *j = map->child; j; j = j->next) {
        Stored *t = checkpoint_find(&c, j->key);
        NEED(t && !strcmp(t->file, path_join(directory, j->string).text),
             "%s: %s: is not in %s", path, j->key, j->string);
        t->used = 1;
    }
    for (Stored *t = c.stored; t < c.stored + c.n; t++) {
        NEED(t->used, "%s: %s: is missing, though it is in %s", path, t->name, t->file);
        t->used = 0;
    }
    free(index);
    free(text);
    return c;
}

static void checkpoint_close(Checkpoint *c)
{
    for (Shard *s = c->shard; s < c->shard + c->shards; s++) {
        NEED(!fclose(s->f), "%s: cannot close: %s", s->path.text, strerror(errno));
        free(s->header);
        free(s->text);
    }
    free(c->shard);
    free(c->stored);
}

static Stored *checkpoint_get(const Checkpoint *c, const char *name, const size_t *shape,
                              size_t dims)
{
    Stored *t = checkpoint_find(c, name);
    char is[64], expected[64];
    NEED(t, "%s: %s: is missing, though config.json calls for it", c->directory, name);
    shape_text(is, t->shape, t->dims);
    shape_text(expected, shape, dims);
    NEED(!strcmp(is, expected), "%s: %s: has shape [%s], expected [%s]", t->file, name, is,
         expected);
    t->used = 1;
    return t;
}

// Reads a stored tensor; dies on a number that is not finite. scale: of each block of an FP8 one.
static void stored_read(const Stored *t, const Stored *scale, accum *to)
{
    FILE *f = t->shard->f;
    size_t size = dtypes[t->dtype].size, n = (t->end - t->begin) / size;
    size_t cols = t->shape[t->dims - 1], across = ceil_div(cols, FP8_BLOCK);
    unsigned char *raw = (unsigned char *)host_alloc(n * size + 3, 1);
    accum *scales = NULL;
    if (scale) {
        scales = (accum *)host_alloc(scale->shape[0] * scale->shape[1], sizeof(accum));
        stored_read(scale, NULL, scales);
    }
    NEED(!fseeko(f, (off_t)(t->shard->begin + t->begin), SEEK_SET) && fread(raw, size, n, f) == n,
         "%s: %s: cannot read its data", t->file, t->name);
    for (size_t i = 0; i < n; i++) {
        const unsigned char *b = raw + i * size; // and up to three bytes that follow
        float x = number_decode(t->dtype, (uint32_t)b[0] | (uint32_t)b[1] << 8 |
                                              (uint32_t)b[2] << 16 | (uint32_t)b[3] << 24);
        if (scale) x *= (float)scales[i / cols / FP8_BLOCK * across + i % cols / FP8_BLOCK];
        NEED(isfinite(x), "%s: %s: element %zu is not a finite number", t->file, t->name, i);
        to[i] = (accum)x;
    }
    free(raw);
    free(scales);
}

// Reads every tensor of the layout, named with the prefix, to the weights of m or to its place in
// `to`. With neither only looks whether all are there, so that a config.json cannot ask for more
// memory than its files fill.
static void checkpoint_read(Checkpoint *c, const Layout *layout, const char *prefix, Model *m,
                            moment *to)
{
    for (const Tensor *t = layout->tensor; t < layout->tensor + layout->tensors; t++) {
        size_t n = t->rows * t->cols, dims = tensor_dims(t), shape[2] = {t->rows, t->cols};
        size_t blocks[2] = {ceil_div(t->rows, FP8_BLOCK), ceil_div(t->cols, FP8_BLOCK)};
        accum *host = m || to ? (accum *)host_alloc(n, sizeof(accum)) : NULL;
        for (size_t k = 0; k < t->count; k++) {
            char name[NAME_MAX_LENGTH + 16];
            tensor_name(name, prefix, t, k);
            Stored *s = checkpoint_get(c, name, shape + 2 - dims, dims), *scale = NULL;
            if (s->dtype == F8_E4M3) {
                scale = checkpoint_get(c, strcat(name, "_scale_inv"), blocks, 2);
                NEED(scale->dtype == F32, "%s: %s: must be F32", scale->file, name);
            }
            if (!host) continue;
            stored_read(s, scale, host);
            if (m) model_set(m, t, k * n, host, n);
            else reals_to_device(to + t->offset + k * n, host, n);
        }
        free(host);
    }
}

// Dies if there is a tensor that nobody read, unless it is empty, which are transformers' for no
// shared experts, or one that released checkpoints have beside the weights: an MTP layer's copy of
// the embedding or the head, which are shared, and frequencies, which rope_theta tells.
static void checkpoint_all_used(const Checkpoint *c)
{
    static const char *const known[] = {"embed_tokens.weight", "shared_head.head.weight",
                                        "self_attn.rotary_emb.inv_freq"};
    for (const Stored *t = c->stored; t < c->stored + c->n; t++) {
        int at = 0, good = t->used || t->begin == t->end;
        sscanf(t->name, "model.layers.%*[0-9].%n", &at);
        for (int i = 0; i < 3 && at; i++) good |= !strcmp(t->name + at, known[i]);
        NEED(good, "%s: %s: config.json has no place for it", t->file, t->name);
    }
}

// The configuration of the model in a directory. transformers has no MTP layers and drops them when
// it saves, but keeps num_nextn_predict_layers: then there are none here either.
static Config directory_config(const char *directory)
{
    static int said; // once, though a command asks again when it loads
    NEED(*directory, "--model DIR is missing: the directory of a trained model");
    Config c = config_load(path_join(directory, "config.json").text);
    if (c.D == 0) return c;
    char prefix[48];
    Checkpoint files = checkpoint_open(directory);
    size_t n = (size_t)snprintf(prefix, sizeof prefix, "model.layers.%zu.", c.L), found = 0;
    for (size_t i = 0; i < files.n; i++) found += !strncmp(files.stored[i].name, prefix, n);
    checkpoint_close(&files);
    if (!found && !said++)
        fprintf(stderr, "moe: %s: num_nextn_predict_layers is %zu, but no such layers are there; "
                "going on without\n", directory, c.D);
    if (!found) c.D = 0;
    return c;
}

// The model in a directory.
static Model model_load(const char *directory, int training)
{
    Config config = directory_config(directory);
    Checkpoint c = checkpoint_open(directory);
    Layout layout = layout_make(&config);
    checkpoint_read(&c, &layout, "", NULL, NULL);
    free(layout.tensor);
    Model m = model_make(&config, training);
    checkpoint_read(&c, &m.layout, "", &m, NULL);
    checkpoint_all_used(&c);
    checkpoint_close(&c);
    return m;
}

// ------------------------------------------------------------------------------------------------
// 11  Options

// Every option of the command line, once: commands that take it, type, field, --name, default,
// what it takes, what it does.
enum {
    TRAIN = 1, SAMPLE = 2, EVAL = 4, CHECK = 8, MOST = TRAIN | SAMPLE | EVAL | CHECK,
    PLAN = 16, BENCH = 32, RL = 64, TASK = 128,
    SAVED = 256, RUN = TRAIN | SAVED, RL_RUN = RL | SAVED // saved with a run, for --resume
};
#define CONFIG_NAMES "a config.json, laptop, laptop-mtp, laptop-r1, moonlight-16b or deepseek-v3"
#define GPU_NAMES "h800, h100, h200, h20, b200, a100, mi300x or rtx-4090"
#define OPTIONS(X) \
    X(MOST | BENCH | RL, Text, model, "model", "", "DIR", "model directory to start from") \
    X(TRAIN | CHECK | BENCH, Text, config, "config", laptop, "FILE", "new model: " CONFIG_NAMES) \
    X(PLAN, Text, plan_config, "config", "deepseek-v3", "FILE", CONFIG_NAMES) \
    X(RUN | EVAL | CHECK, Text, data, "data", "", "FILE", "text to read") \
    X(TRAIN | RL, Text, out, "out", "out/model", "DIR", "where the trained model goes") \
    X(TRAIN | RL, Text, resume, "resume", "", "DIR", "go on with the run that was saved there") \
    X(TRAIN | RL, Count, stop_after, "stop-after", "0", "K", "end after step K, saved; 0: do not") \
    X(RUN, Count, save_every, "save-every", "200", "N", "steps between saves; 0: at the end") \
    X(RL_RUN, Count, rl_save_every, "save-every", "20", "N", "steps between saves; 0: at the end") \
    X(CHECK, Text, dump, "dump", "", "FILE", "write logits, losses, gradients and routing there") \
    X(CHECK, Text, routing, "routing", "", "FILE", \
      "send tokens to the experts of this dump: near ties hang on rounding") \
    X(RUN, Count, steps, "steps", "600", "N", "steps to train") \
    X(RL_RUN | TASK, Text, task, "task", "add", "NAME", TASK_NAMES) \
    X(EVAL, Text, test_task, "task", "", "NAME", "answer the test questions of a task instead") \
    X(SAMPLE, Text, sample_task, "task", "", "NAME", "answer --prompt as a question of this task") \
    X(RL_RUN | TASK | EVAL | SAMPLE, Text, size, "size", "3", "N", \
      "digits, or numbers, of a question; or N-M") \
    X(RL_RUN | EVAL, Text, task_cmd, "task-cmd", "", "CMD", \
      "program that writes questions, a line each") \
    X(RL_RUN | EVAL, Text, verify_cmd, "verify-cmd", "", "CMD", \
      "program that reads question<TAB>answer lines and writes a reward for each") \
    X(RL_RUN | EVAL, Count, patience, "patience", "60", "S", \
      "seconds that these programs may be silent") \
    X(TASK, Count, lines, "lines", "100000", "N", "questions to write, with answers") \
    X(TASK, Share, worked, "worked", "0.25", "X", "share of answers that are thought about") \
    X(TASK, Share, right, "right", "0.3", "X", "share that is right of those given at once") \
    X(TASK, Share, slips, "slips", "0.004", "X", \
      "chance of a mistake in a step; countdown: of giving up; columns: of saying it again") \
    X(RL_RUN, Count, rl_steps, "steps", "30", "N", "steps to train") \
    X(RL_RUN, Count, questions, "questions", "32", "N", "questions a step; R1: 32") \
    X(RL_RUN, Count, group, "group", "16", "G", "answers to a question; R1: 16") \
    X(RL_RUN | EVAL | SAMPLE, Count, max_tokens, "max-tokens", "160", "N", \
      "tokens of an answer; R1: 32768") \
    X(RL_RUN | EVAL | SAMPLE, Count, max_prompt, "max-prompt", "32", "N", "tokens of a question") \
    X(RL_RUN, Count, minibatches, "minibatches", "1", "N", \
      "parts of a step's answers, each an update; R1: 16") \
    X(RL_RUN, Count, epochs, "epochs", "1", "N", "updates with each part; R1: 1") \
    X(RL_RUN, Number, rl_clip, "clip", "0.2", "X", "epsilon of the ratio; R1: 10") \
    X(RL_RUN, Number, kl, "kl", "0", "X", "beta of the divergence from the reference; R1: 0.001") \
    X(RL_RUN, Count, ref_every, "ref-every", "400", "N", \
      "steps between new references; 0: never; R1: 400") \
    X(RL_RUN, Number, rl_temperature, "temperature", "1", "X", "of the answers drawn; R1: 1") \
    X(EVAL, Number, eval_temperature, "temperature", "1", "X", \
      "of the answers that vote; R1: 0.6") \
    X(EVAL, Share, eval_top_p, "top-p", "1", "X", \
      "choose among the likeliest of this total probability; R1: 0.95") \
    X(RL_RUN, Text, rl_optimizer, "optimizer", "adamw", "NAME", "adamw or muon") \
    X(RL_RUN, Number, rl_lr, "lr", "0.0002", "X", "learning rate; R1: 3e-6") \
    X(RL_RUN, Number, rl_adam_lr, "adam-lr", "0.0002", "X", "beside muon, AdamW's learning rate") \
    X(RL_RUN | EVAL, Count, test, "test", "1000", "N", "questions of a test") \
    X(RL_RUN, Count, test_every, "test-every", "10", "N", "steps between tests; 0: at the end") \
    X(EVAL, Count, votes, "votes", "16", "N", "answers to each test question that vote") \
    X(RL, Count, collect, "collect", "0", "N", \
      "instead write N questions with right answers of the model, to train on") \
    X(RUN, Flag, answers_only, "answers-only", "", "", \
      "learn only what follows the tab of each line: supervised fine-tuning; windows begin with " \
      "lines") \
    X(CHECK, Count, check_steps, "steps", "0", "N", "AdamW steps to take on the batch") \
    X(BENCH, Count, bench_steps, "steps", "20", "N", "training steps; the fastest counts") \
    X(RUN | CHECK | BENCH, Count, batch, "batch", "16", "B", "sequences at once") \
    X(RUN | EVAL | CHECK | BENCH, Count, seq, "seq", "0", "T", \
      "tokens of a sequence; 0: max_position_embeddings") \
    X(RUN, Count, accumulate, "accumulate", "1", "N", \
      "batches whose gradients make one step; several processes share them out") \
    X(RUN, Text, optimizer, "optimizer", "muon", "NAME", \
      "muon (hidden matrices; AdamW for the rest) or adamw") \
    X(BENCH, Text, bench_optimizer, "optimizer", "adamw", "NAME", "adamw or muon") \
    X(RUN, Number, lr, "lr", "0.005", "X", "peak learning rate") \
    X(CHECK, Number, check_lr, "lr", "0.001", "X", "learning rate of --steps") \
    X(RUN, Number, adam_lr, "adam-lr", "0.02", "X", "beside muon, AdamW's peak learning rate") \
    X(RUN, Count, warmup, "warmup", "20", "N", "steps of linear warm-up") \
    X(RUN, Share, hold, "hold", "0", "X", "share of the steps at the peak; V3: 0.68") \
    X(RUN, Share, seq_warmup, "seq-warmup", "0", "X", \
      "share of the steps in which sequences grow to --seq, from an eighth of it; so many more") \
    X(RUN, Share, min_lr, "min-lr", "0.02", "X", "share of the peak that the cosine ends at") \
    X(RUN | RL | CHECK, Fraction, beta1, "beta1", "0.9", "X", "AdamW's decay of mean gradients") \
    X(RUN | RL | CHECK, Fraction, beta2, "beta2", "0.95", "X", "AdamW's decay of mean squares") \
    X(RUN | RL | CHECK, Number, decay, "weight-decay", "0.1", "X", "decoupled weight decay") \
    X(RUN | CHECK, Number, clip, "clip", "1", "X", "global gradient norm; 0: no clipping") \
    X(RUN | RL, Fraction, momentum, "momentum", "0.9", "X", "Muon's momentum") \
    X(RUN, Number, bias_speed, "bias-speed", "0.02", "X", "step of the routers' bias; V3: 0.001") \
    X(CHECK, Number, check_bias_speed, "bias-speed", "0.001", "X", "step of the routers' bias") \
    X(RUN, Fraction, val_share, "val-share", "0.1", "X", "last part of the text, to validate on") \
    X(RUN, Count, val_every, "val-every", "200", "N", "steps between validations; 0: at the end") \
    X(RUN, Count, log_every, "log-every", "10", "N", "steps between lines when piped") \
    X(SAMPLE, Text, prompt, "prompt", "\n", "TEXT", "what the text begins with") \
    X(RUN | SAMPLE, Count, tokens, "tokens", "300", "N", "tokens to generate") \
    X(RUN | SAMPLE, Number, temperature, "temperature", "0.8", "X", "0: always the likeliest") \
    X(RUN | SAMPLE, Count, top_k, "top-k", "0", "K", "choose among the K likeliest; 0: all") \
    X(RUN | SAMPLE, Share, top_p, "top-p", "0.95", "X", \
      "choose among the likeliest of this total probability") \
    X(SAMPLE, Flag, speculate, "speculate", "", "", \
      "draft with the MTP layer; the text stays the same") \
    X(PLAN, Text, gpu, "gpu", "h800", "NAME", GPU_NAMES) \
    X(PLAN, Count, gpus, "gpus", "0", "N", "devices; 0: as the split needs, for V3 2048") \
    X(PLAN, Count, data_parallel, "data-parallel", "0", "N", \
      "devices that share a batch; 0: --gpus / --pipeline") \
    X(PLAN, Count, expert_parallel, "expert-parallel", "0", "N", \
      "of these, devices that share the experts; 0: 1, for V3 64") \
    X(PLAN, Count, pipeline, "pipeline", "0", "N", "stages of layers; 0: 1, for V3 16") \
    X(PLAN, Count, micro_batch, "batch", "1", "B", "sequences at once in a device") \
    X(PLAN, Count, context, "seq", "0", "T", \
      "tokens of a sequence; 0: as in pre-training, before YaRN") \
    X(PLAN, Number, budget, "budget", "0", "N", \
      "tokens to train on; 0: 20 an active parameter, for V3 14.8e12") \
    X(PLAN, Number, mfu, "mfu", "0.4", "X", "model FLOPs utilization, of bfloat16's peak") \
    X(PLAN, Number, price, "price", "2", "X", "dollars a GPU hour") \
    X(PLAN | BENCH, Flag, json, "json", "", "", "print JSON") \
    X(MOST | BENCH | RL | TASK | SAVED, Count, seed, "seed", "1", "S", "of all random numbers") \
    X(MOST | BENCH | RL, Count, threads, "threads", "0", "N", "0: as many as there are")

static const char laptop[] = "laptop"; // so that it shows whether --config was given

typedef const char *Text;
typedef size_t Count;
typedef double Number, Share, Fraction; // any; 0 to 1; 0 to less than 1
typedef int Flag;

#define OPTION_FIELD(commands, type, field, ...) type field; Text field##_text; // as it was given
typedef struct { OPTIONS(OPTION_FIELD) } Options;

static double parse_real(const char *name, const char *value, double most, const char *what)
{
    char *end;
    double x = strtod(value, &end);
    NEED(end != value && !*end && x >= 0 && x <= most && (*what != 'w' || is_whole(x, most)),
         "--%s is '%s'; it must be a %s", name, value, what);
    return x;
}

#define parse_Text(name, value) (value)
#define parse_Flag(name, value) (*(value) != 0)
#define parse_Count(name, value) \
    ((size_t)parse_real(name, value, 0x1p40, "whole number from 0 to 1099511627776"))
#define parse_Number(name, value) parse_real(name, value, DBL_MAX, "number, 0 or more")
#define parse_Share(name, value) parse_real(name, value, 1, "number from 0 to 1")
#define parse_Fraction(name, value) \
    parse_real(name, value, 1 - 1e-9, "number from 0 to less than 1")

// ------------------------------------------------------------------------------------------------
// 12  Training

// Says what a command is about to allocate, for B sequences at once and a cache; refuses what the
// machine does not have.
static const char *memory_plan(const Config *c, int training, size_t B, size_t T, size_t cache)
{
    static char text[200];
    Layout layout = layout_make(c);
    double n = 1e-6 * (double)layout.elements, activations = 0, available = 1e-6 * free_memory();
    if (B) { // of which the plan allocates none
        Acts acts = acts_plan(c, B, T, training);
        activations = 1e-6 * (double)acts.arena.used;
        acts_free(&acts);
    }
    double gradients = training ? n * sizeof(accum) : 0;
    double moments = training ? 2 * n * sizeof(moment) : 0, total;
    double weights = n * sizeof(real) + (sizeof(real) < sizeof(accum) ? gradients : 0); // masters
    total = weights + gradients + moments + activations + 1e-6 * (double)cache;
    free(layout.tensor);
    snprintf(text, sizeof text, "weights %.1f MB, gradients %.1f, optimizer %.1f, activations "
             "%.1f, cache %.1f; %.1f of %.0f MB free", weights, gradients, moments,
             activations, 1e-6 * (double)cache, total, available);
    if (total > available)
        die(FAILED, "%.0f MB of memory are needed (%s); use a smaller --config, --batch or --seq",
            total, text);
    return text;
}

// The bytes of a text file, each a token.
typedef struct {
    char *bytes;
    size_t n;
} Data;

static Data data_load(const char *path, const Config *c)
{
    Data t;
    NEED(*path, "--data FILE is missing: the text to read");
    NEED(!access(path, R_OK), "%s: cannot open: %s; --data names the text to read", path,
         strerror(errno));
    t.bytes = read_file(path, &t.n, (size_t)free_memory());
    for (size_t i = 0; i < t.n; i++)
        NEED((unsigned char)t.bytes[i] < c->V, "%s: byte %zu is %d, outside the vocabulary of %zu",
             path, i, (unsigned char)t.bytes[i], c->V);
    return t;
}

static void tokens_copy(int *to, const char *bytes, size_t n)
{
    for (size_t i = 0; i < n; i++) to[i] = (unsigned char)bytes[i];
}

// Which of bytes[at .. at + n) are in an answer, after the tab of its line.
static void find_answers(accum *to, const char *bytes, size_t at, size_t n)
{
    size_t i = at;
    while (i > 0 && bytes[i - 1] != '\n') i--;
    for (int in = 0; i < at + n; i++) {
        if (i >= at) to[i - at] = (accum)in;
        in = (in || bytes[i] == '\t') && bytes[i] != '\n';
    }
}

// The same for a window of bytes[0 .. last], the t after `at`. A line that it cuts does not count
// but begins the next window, so that an answer is seen with its question; returns where that is.
static size_t weigh_answers(accum *to, const char *bytes, size_t at, size_t t, size_t last)
{
    size_t end = at + t;
    find_answers(to, bytes, at + 1, t);
    while (end > at && end < last && bytes[end] != '\n') end--;
    if (end == at) return at + t; // the line is longer than a window
    for (size_t i = end - at; i < t; i++) to[i] = 0;
    return end;
}

// Where the first line after `at` begins, the line feed before it included; at if that is not
// before `end`.
static size_t line_start(const char *bytes, size_t at, size_t end)
{
    const char *feed = (const char *)memchr(bytes + at, '\n', end - at);
    return feed ? (size_t)(feed - bytes) : at;
}

// Makes weights of 0 and 1 sum to 1 or, where all are 0, leaves them; returns how many were 1.
static double share_weights(accum *weight, size_t n)
{
    double sum = 0;
    for (size_t i = 0; i < n; i++) sum += (double)weight[i];
    for (size_t i = 0; i < n && sum > 0; i++) weight[i] = (accum)((double)weight[i] / sum);
    return sum;
}

#define EVAL_ROWS(T) ceil_div(4096, T) // sequences at once

// Mean loss over every token of bytes[0 .. n) but the first, or over those in answers, in windows
// of T tokens, of which each sees what stands before it in its window. The last may be shorter.
static double text_loss(const Model *m, const char *bytes, size_t n, size_t T, int answers_only)
{
    size_t last = n - 1, most = EVAL_ROWS(T), t, turn = 0;
    int *rows = (int *)host_alloc(most * (T + 1), sizeof(int));
    accum *weight = (accum *)host_alloc(most * T, sizeof(accum));
    double sums[2] = {0, 0}; // of losses, of tokens
    Acts a;
    memset(&a, 0, sizeof a);
    for (size_t at = 0; at < last;) {
        size_t B = 0;
        for (t = min_size(T, last - at); B < most && at + t <= last; B++) {
            tokens_copy(rows + B * (t + 1), bytes + at, t + 1);
            at = answers_only ? weigh_answers(weight + B * t, bytes, at, t, last) : at + t;
        }
        if (turn++ % (size_t)ranks != (size_t)rank) continue;
        if (a.B != B || a.T != t) {
            acts_free(&a);
            a = acts_make(&m->config, B, t, 0);
        }
        acts_load(&a, rows);
        double count = (double)(B * t);
        if (answers_only) {
            count = share_weights(weight, B * t);
            acts_weigh(&a, weight);
        }
        model_forward(m, &a);
        sums[0] += model_losses(m, &a).main * count;
        sums[1] += count;
    }
    free(rows);
    free(weight);
    acts_free(&a);
    ranks_sum(sums, 2);
    if (!isfinite(sums[0]))
        die(FAILED, "the loss over the text is %g: the weights are damaged, or --lr was too large",
            sums[0]);
    return sums[1] > 0 ? sums[0] / sums[1] : NAN; // no answer in it
}

// Learning rate of a step, as a share of the peak: linear warm-up, the peak held, a cosine down.
static double schedule(const Options *o, size_t step)
{
    double held = (double)o->warmup + o->hold * (double)o->steps;
    if (step < o->warmup) return (double)(step + 1) / (double)o->warmup;
    if ((double)step < held || (double)o->steps <= held) return 1;
    double x = ((double)step - held) / ((double)o->steps - held);
    return o->min_lr + (1 - o->min_lr) * 0.5 * (1 + cos(3.141592653589793 * x));
}

static size_t gcd(size_t a, size_t b) { return b ? gcd(b, a % b) : a; }

// Start of the i-th training window: each pass over the text takes all its windows of T tokens
// once, in an order and at an offset of its own.
static size_t window_start(uint64_t seed, size_t i, size_t n, size_t T)
{
    size_t windows = (n - 1) / T, pass = i / windows;
    size_t offset = (size_t)random_u64(seed, 1, 3 * pass) % (n - windows * T);
    size_t first = (size_t)random_u64(seed, 1, 3 * pass + 1) % windows;
    size_t stride = (size_t)random_u64(seed, 1, 3 * pass + 2) % windows;
    while (gcd(stride, windows) != 1) stride++;
    return offset + (first + i % windows * stride) % windows * T;
}

// Largest load of an expert over the mean load, of the layer where it is worst.
static double worst_load(const Model *m, const Optimizer *o)
{
    size_t E = m->config.E, n = layers(&m->config) * E;
    int *load = (int *)host_alloc(n, sizeof(int));
    double worst = 1;
    to_host(load, o->load, n * sizeof(int));
    for (size_t l = 0; l < n; l += E) {
        double sum = 0, most = 0;
        for (size_t e = 0; e < E; e++) {
            sum += load[l + e];
            most = fmax(most, load[l + e]);
        }
        if (sum > 0) worst = fmax(worst, most * (double)E / sum);
    }
    free(load);
    return worst;
}

static void print_token(int token)
{
    if (token < 256) putchar(token);
    else printf("<%d>", token);
    fflush(stdout);
}

// Calls decoder_plan or decoder_make for one text: a prompt of n tokens and `more` after it.
#define SAMPLE_DECODER(function, m, n, more) \
    function(m, 1, min_size((m)->config.Tmax, (n) + (more)), min_size((n) + 1, 256), \
             min_size((n) + 1, 256), (n) + (more) + 1)

// Bytes that sample allocates, in the decoder above all.
static size_t sample_bytes(const Config *c, size_t n, size_t more)
{
    Model shape;
    memset(&shape, 0, sizeof shape);
    shape.config = *c;
    Decoder plan = SAMPLE_DECODER(decoder_plan, &shape, n, more);
    size_t angles = size_mul(2 * plan.positions, c->Dr * sizeof(accum));
    decoder_free(&plan);
    return plan.arena.used + angles;
}

static Generation sample(const Model *m, const Options *o, const char *prompt, int speculate)
{
    size_t n = strlen(prompt);
    Sampler s = {o->temperature, (int)min_size(o->top_k, m->config.V), o->top_p, o->seed, 0};
    Decoder d = SAMPLE_DECODER(decoder_make, m, n, o->tokens);
    int *tokens = (int *)host_alloc(n + o->tokens + 2, sizeof(int));
    tokens_copy(tokens, prompt, n);
    for (size_t i = 0; i < n; i++) print_token(tokens[i]);
    Generation g = generate(&d, &s, tokens, n, o->tokens, speculate, print_token);
    putchar('\n');
    free(tokens);
    decoder_free(&d);
    return g;
}

// A preset, or what a file says.
static Config config_named(const char *name)
{
    for (int preset = 0; preset < PRESETS; preset++)
        if (!strcmp(name, preset_names[preset])) return config_preset(preset);
    return config_load(name);
}

static Config config_from_options(const Options *o)
{
    NEED(!*o->model || o->config == laptop, "--config %s: the model in %s has its own", o->config,
         o->model);
    return *o->model ? directory_config(o->model) : config_named(o->config);
}

// A model of this configuration: that of --model, or a new one.
static Model model_from_options(const Options *o, const Config *c, int training)
{
    if (*o->model) return model_load(o->model, training);
    Model m = model_make(c, training);
    model_init(&m, o->seed);
    return m;
}

static size_t sequence_length(const Options *o, const Config *c)
{
    NEED(o->seq <= c->Tmax, "--seq is %zu; the model's max_position_embeddings is %zu", o->seq,
         c->Tmax);
    return o->seq ? o->seq : c->Tmax;
}

static Recipe recipe_make(const Options *o, int muon, double lr, double adam_lr, double bias_speed)
{
    Recipe r = {muon, lr, adam_lr, o->beta1, o->beta2, 1e-8, o->decay, o->clip, o->momentum,
                bias_speed};
    return r;
}

static int is_muon(const char *optimizer)
{
    int muon = !strcmp(optimizer, "muon");
    NEED(muon || !strcmp(optimizer, "adamw"), "--optimizer is %s; it must be muon or adamw",
         optimizer);
    return muon;
}

// A run of training.
typedef struct {
    int command;           // TRAIN or RL
    Data text;
    size_t n_train, n_val; // bytes of it that train, and that validate
    size_t B, T;
    int *tokens;           // [B, T + 1], or 8 B shorter ones
    size_t step;           // steps done
    size_t saved;          // step of the last save, 0: none
    size_t bad;            // updates in a row that were not finite
    double val_loss;       // of the last validation, NAN before
    double train_loss;     // running mean
    double start;          // time at which this program began, having done first_step
    size_t first_step;
} Run;

static Run run_make(const Options *o, const Config *c)
{
    Run r;
    memset(&r, 0, sizeof r);
    r.command = TRAIN;
    r.text = data_load(o->data, c);
    r.B = o->batch;
    r.T = sequence_length(o, c);
    r.val_loss = r.train_loss = NAN;
    r.start = now();
    NEED(o->steps && r.B && o->accumulate, "--steps, --batch and --accumulate must be at least 1");
    NEED(o->accumulate % (size_t)ranks == 0, "--accumulate is %zu; the %d processes share out a "
         "step's batches, so it must be a multiple of that", o->accumulate, ranks);
    is_muon(o->optimizer);
    NEED(o->seq_warmup == 0 || (r.T % 8 == 0 && r.T / 8 > c->D), "--seq-warmup begins with an "
         "eighth of --seq, %zu, which must be whole and more than %zu", r.T, c->D);
    r.n_train = (size_t)((double)r.text.n * (1 - o->val_share));
    r.n_val = r.text.n - r.n_train;
    NEED(r.n_train > r.T && (o->val_share == 0 || r.n_val >= 2),
         "%s: too short: of %zu bytes %zu are left to train on and %zu to validate; %zu and 2 are "
         "needed, or a smaller --seq", o->data, r.text.n, r.n_train, r.n_val, r.T + 1);
    NEED(!o->answers_only || (memchr(r.text.bytes, '\t', r.n_train) &&
         (!r.n_val || memchr(r.text.bytes + r.n_train, '\t', r.n_val))), "%s: --answers-only, but "
         "no answer, after a tab, is in the part that %s", o->data,
         memchr(r.text.bytes, '\t', r.n_train) ? "validates" : "trains");
    return r;
}

static uint64_t data_hash(const Data *t) // FNV-1a
{
    uint64_t h = 0xCBF29CE484222325u;
    for (size_t i = 0; i < t->n; i++) h = (h ^ (unsigned char)t->bytes[i]) * 0x100000001B3u;
    return h;
}

static const char state_name[] = "optimizer.safetensors";

static const char *run_state(const Run *r) // for a message that goes on with the directory
{
    return r->saved ? "the last good state is in" : "this run has saved nothing in";
}

// Saves the model for others, then in one file all that the run needs to go on, weights included,
// so that a run killed at any instant finds the old state or the new one; only weights that give a
// finite loss, of the last batch in a.
static void run_save(Run *r, const Options *o, const Model *m, const Optimizer *opt,
                     const Model *ref, Acts *a, FILE *log)
{
    size_t elements = m->layout.elements;
    Path path = path_join(o->out, state_name), rows = path_join(o->out, "log.csv");
    int first = r->saved == r->first_step;
    double sum = sum_squares(m->master, elements) + sum_squares(opt->m, elements) +
                 sum_squares(opt->v, elements), most[2] = {sum, -sum};
    model_forward(m, a);
    if (!isfinite(sum) || !isfinite(model_losses(m, a).total))
        die(FAILED, "step %zu: the weights no longer give a finite loss; %s %s; try a smaller --lr",
            r->step, run_state(r), o->out);
    ranks_max(most, 2);
    if (most[0] != -most[1])
        die(FAILED, "step %zu: the weights are not the same in all processes; use one build on "
            "machines of one kind; %s %s", r->step, run_state(r), o->out);
    r->saved = r->step;
    if (rank > 0) return;
    if (fflush(log) || fsync(fileno(log)) ||
        (first && rename(path_append(rows.text, ".tmp").text, rows.text)))
        die(FAILED, "%s: cannot write: %s", rows.text, strerror(errno));
    model_save(m, o->out);
    Output out = safetensors_open(path.text);
#define SAVE_OPTION(commands, type, field, name, ...) \
    if (((commands) & SAVED) && ((commands) & r->command)) { \
        fprintf(out.f, ",\"--%s\":\"", name); \
        json_print(out.f, o->field##_text); \
        fputc('"', out.f); \
    }
    OPTIONS(SAVE_OPTION)
    fprintf(out.f, ",\"command\":\"%d\"", r->command);
    fprintf(out.f, ",\"step\":\"%zu\",\"optimizer_step\":\"%ld\",\"train_loss\":\"%.17g\","
            "\"val_loss\":\"%.17g\",\"text_hash\":\"%016llx\"", r->step, opt->step, r->train_loss,
            r->val_loss, (unsigned long long)data_hash(&r->text));
    Entry *entry = (Entry *)host_alloc(4 * count_entries(&m->layout), sizeof(Entry));
    Entry *end = entries_add(entry, &m->layout, "", m->master, NULL);
    end = entries_add(end, &m->layout, "m.", NULL, opt->m);
    end = entries_add(end, &m->layout, "v.", NULL, opt->v);
    if (ref) end = entries_add(end, &m->layout, "ref.", ref->master, NULL);
    safetensors_close(&out, entry, (size_t)(end - entry));
    free(entry);
}

static const char *state_value(const Shard *s, const char *key)
{
    const Json *metadata = json_get(s->header, "__metadata__");
    const Json *value = metadata ? json_get(metadata, key) : NULL;
    NEED(value && value->type == JSON_STRING, "%s: is not the state of a run: has no %s",
         s->path.text, key);
    return value->string;
}

// Takes the options that a run was started with, and the directory it is in.
static void options_from_state(Options *o, const char *directory, int command)
{
    static Shard s; // stays open, as the options point into it
    s = shard_open(path_join(directory, state_name));
    NEED(command == (int)parse_Count("command", state_value(&s, "command")),
         "%s: holds a run of another command; train goes on with train, rl with rl", directory);
#define TAKE_OPTION(commands, type, field, name, ...) \
    if (((commands) & SAVED) && ((commands) & command)) \
        o->field = parse_##type(name, o->field##_text = state_value(&s, "--" name));
    OPTIONS(TAKE_OPTION)
    o->model = o->resume = o->out = directory;
}

// Puts a saved run back: weights, optimizer, position.
static void run_load(Run *r, const Options *o, Model *m, Optimizer *opt, Model *ref)
{
    Checkpoint c = checkpoint_file(o->resume, state_name);
    const Shard *s = c.shard;
    char hash[32];
    int has_ref = r->command == RL && strtod(state_value(s, "--kl"), NULL) > 0;
    NEED(has_ref == (ref != NULL), "--kl is %g, but the run in %s has %s reference policy", o->kl,
         o->resume, has_ref ? "a" : "no");
    NEED(!strcmp(o->optimizer, state_value(s, "--optimizer")), "--optimizer is %s, but the run in "
         "%s has the state of %s", o->optimizer, o->resume, state_value(s, "--optimizer"));
    snprintf(hash, sizeof hash, "%016llx", (unsigned long long)data_hash(&r->text));
    NEED(!strcmp(hash, state_value(s, "text_hash")),
         "%s: is not the text that the run in %s began with", o->data, o->resume);
    r->step = r->first_step = r->saved = parse_Count("step", state_value(s, "step"));
    opt->step = (long)parse_Count("optimizer_step", state_value(s, "optimizer_step"));
    r->train_loss = strtod(state_value(s, "train_loss"), NULL); // nan: none yet
    r->val_loss = strtod(state_value(s, "val_loss"), NULL);
    checkpoint_read(&c, &m->layout, "", m, NULL);
    checkpoint_read(&c, &m->layout, "m.", NULL, opt->m);
    checkpoint_read(&c, &m->layout, "v.", NULL, opt->v);
    if (ref) checkpoint_read(&c, &m->layout, "ref.", ref, NULL);
    checkpoint_all_used(&c);
    checkpoint_close(&c);
    NEED(r->step < o->steps, "%s: the run has taken all its %zu steps; a larger --steps goes on",
         o->resume, r->step);
}

// Begins log.csv with the rows of the steps that are done, and nothing after them. Until the run
// saves for the first time it is log.csv.tmp, so that what an earlier run left stays together.
static FILE *log_open(const Run *r, const Options *o, const char *head)
{
    Path before = path_join(o->resume, "log.csv");
    size_t size, rows = 0;
    char *old = NULL, *end = NULL;
    if (rank > 0) return fopen("/dev/null", "w");
    if (r->step > 0 && !access(before.text, F_OK)) {
        end = old = read_file(before.text, &size, SIZE_MAX - 1);
        while (rows <= r->step && (end = strchr(end, '\n'))) end++, rows++;
    }
    Output log = output_open(path_join(o->out, "log.csv").text);
    output_write(&log, end ? old : head, end ? (size_t)(end - old) : strlen(head));
    free(old);
    return log.f;
}

// The first SIGINT, SIGTERM or SIGHUP, unless nohup has it ignored, ends the run after its step,
// saved, as does an output that nobody reads any more; the second signal ends it at once.
static volatile sig_atomic_t stop_signal = 0;

static void on_signal(int number) { stop_signal = number; }

static void catch_signals(void)
{
    struct sigaction action;
    memset(&action, 0, sizeof action);
    action.sa_handler = on_signal;
    action.sa_flags = SA_RESETHAND | SA_RESTART; // once; and no write fails for it
    NEED(!sigaction(SIGINT, &action, NULL) && !sigaction(SIGTERM, &action, NULL),
         "cannot catch signals: %s", strerror(errno));
    if (signal(SIGHUP, SIG_IGN) != SIG_IGN) sigaction(SIGHUP, &action, NULL);
    signal(SIGPIPE, SIG_IGN); // printing then fails instead
}

// Sequence length warm-up (arXiv:2108.06084): how often sequences are still to be doubled, and
// their number halved. What stands near is learnt first, from more places of the text at once.
static int doublings_left(const Options *o, size_t step)
{
    double x = (double)step / (o->seq_warmup * (double)o->steps);
    return x < 1 ? 3 - (int)(3 * x) : 0;
}

// Adds the gradients of a step's batches to the model's, those of the other processes too; returns
// their mean losses.
static Losses run_batches(Run *r, const Options *o, Model *m, Acts *a, Optimizer *opt)
{
    Losses mean = {0, 0, 0, 0};
    double share = 1 / (double)o->accumulate;
    int doublings = doublings_left(o, r->step);
    size_t B = r->B << doublings, T = r->T >> doublings;
    accum *weight = (accum *)host_alloc(B * T, sizeof(accum));
    if (a->T != T) acts_reshape(a, &m->config, B, T);
    for (size_t k = (size_t)rank; k < o->accumulate; k += (size_t)ranks) {
        for (size_t b = 0; b < B; b++) {
            size_t i = (r->step * o->accumulate + k) * B + b;
            size_t at = window_start(o->seed, i, r->n_train, T);
            if (o->answers_only) at = line_start(r->text.bytes, at, r->n_train - T);
            tokens_copy(r->tokens + b * (T + 1), r->text.bytes + at, T + 1);
            if (o->answers_only) find_answers(weight + b * T, r->text.bytes, at + 1, T);
        }
        acts_load(a, r->tokens);
        if (o->answers_only) {
            share_weights(weight, B * T);
            acts_weigh(a, weight);
        }
        model_forward_backward(m, a, share);
        optimizer_count_load(opt, m, a);
        Losses s = model_losses(m, a);
        mean.total += share * s.total;
        mean.main += share * s.main;
        mean.mtp += share * s.mtp;
        mean.balance += share * s.balance;
    }
    free(weight);
    optimizer_gather(opt, m);
    ranks_sum(&mean.total, 4);
    return mean;
}

static void print_processors(void)
{
    if (ranks > 1) printf("%d processes of ", ranks);
    printf("%d threads\n", thread_count());
}

static void print_duration(double s)
{
    if (s < 60) printf("%.0fs", s);
    else printf("%.0fm%02.0fs", floor(s / 60), floor(fmod(s, 60)));
}

// One line of how it goes: a bar and a line that stays in place on a terminal, else a line each.
static void run_print(const Run *r, const Options *o, const Losses *s, double load, double norm,
                      double lr)
{
    double elapsed = now() - r->start, done = (double)(r->step - r->first_step);
    int full = (int)(20 * r->step / o->steps);
    if (isatty(1)) printf("\r\033[K[%.*s%.*s] ", full, "####################",
                          20 - full, "....................");
    printf("step %zu/%zu loss %.4f val ", r->step, o->steps, r->train_loss);
    if (isfinite(r->val_loss)) printf("%.4f", r->val_loss);
    else printf("-");
    printf(" mtp %.3f load %.2f norm %.2f lr %.2e %.0f tok/s eta ", s->mtp, load, norm, lr,
           done * (double)(o->accumulate * r->B * r->T) / elapsed);
    print_duration(elapsed / done * (double)(o->steps - r->step));
    if (!isatty(1)) putchar('\n');
    fflush(stdout);
}

// Makes the directory; refuses one where another run is at work, or that holds a model of another
// shape, for while one is replaced by the other the directory would hold neither.
static void prepare_directory(const Options *o, const Config *c)
{
    Path path = path_join(o->out, "config.json");
    path_join(o->out, "optimizer.safetensors.tmp"); // no name is longer
#define CHECK_SAVED(commands, type, field, name, ...) \
    NEED(!((commands) & SAVED) || is_utf8(o->field##_text), "--%s %s: is not UTF-8, so that it " \
         "cannot be saved", name, o->field##_text);
    OPTIONS(CHECK_SAVED)
    if (rank > 0) return;
    make_directory(o->out);
    int lock = open(o->out, O_RDONLY | O_CLOEXEC); // as long as this program runs
    NEED(lock < 0 || !flock(lock, LOCK_EX | LOCK_NB) || errno != EWOULDBLOCK,
         "%s: another run writes there; choose another --out", o->out);
    Config old = access(path.text, F_OK) ? *c : config_load(path.text);
    NEED(!memcmp(&old, c, sizeof old),
         "%s: holds a model of another shape; remove it or choose another --out", o->out);
}

// Counts updates that were not finite and so were left out; enough in a row end the run.
static void run_count_bad(Run *r, const Options *o, size_t bad)
{
    enum { TOO_MANY = 5 };
    r->bad = bad ? r->bad + bad : 0;
    if (r->bad >= min_size(TOO_MANY, o->steps))
        die(FAILED, "%zu steps in a row were not finite; %s %s; try a smaller --lr", r->bad,
            run_state(r), o->out);
}

static int run_stops(const Run *r, const Options *o)
{
    double told[2] = {(double)stop_signal, (double)ferror(stdout)};
    ranks_max(told, 2); // they may have reached one process only
    if (told[0] > 0) stop_signal = (sig_atomic_t)told[0];
    return r->step == o->steps || stop_signal || told[1] > 0 ||
           (o->stop_after && r->step >= o->stop_after);
}

// Ends a run and returns the command's exit status.
static int run_end(Run *r, const Options *o, FILE *log)
{
    int failed = ferror(log), stopped = r->step < o->steps;
    if (fclose(log) || failed) die(FAILED, "%s/log.csv: cannot write: %s", o->out, strerror(errno));
    if (stopped)
        printf("stopped after step %zu of %zu, saved; go on with ./moe %s --resume %s\n", r->step,
               o->steps, r->command == RL ? "rl" : "train", o->out);
    free(r->tokens);
    free(r->text.bytes);
    return stopped && stop_signal ? 128 + stop_signal : 0;
}

static int command_train(const Options *o)
{
    Config config = config_from_options(o);
    const Config *c = &config;
    Run r = run_make(o, c);
    const char *memory = memory_plan(c, 1, r.B, r.T, sample_bytes(c, 1, o->tokens));
    r.tokens = (int *)host_alloc(r.B * (r.T + 8), sizeof(int));
    prepare_directory(o, c);
    Model m = *o->resume ? model_make(c, 1) : model_from_options(o, c, 1);
    Optimizer opt = optimizer_make(&m);
    if (*o->resume) run_load(&r, o, &m, &opt, NULL);
    FILE *log = log_open(&r, o, "step,loss,val_loss,mtp_loss,balance_loss,max_load,grad_norm,lr\n");
    Acts a = acts_make(c, r.B, r.T, 1);
    int muon = is_muon(o->optimizer), stop = 0;
    catch_signals();
    printf("memory: %s\n%zu parameters, %zu layers, %zu of %zu experts a token; %zu x %zu tokens a "
           "step, %s, ", memory, parameters(&m.layout), c->L, c->K, c->E, r.B * o->accumulate, r.T,
           o->optimizer);
    print_processors();
    fflush(stdout);
    while (!stop) {
        double share = schedule(o, r.step), rate = o->lr * share;
        Recipe recipe = recipe_make(o, muon, rate, (muon ? o->adam_lr : o->lr) * share,
                                    o->bias_speed);
        Losses s = run_batches(&r, o, &m, &a, &opt);
        double norm = grad_norm(&m), load = worst_load(&m, &opt);
        r.step++;
        if (isfinite(s.total) && isfinite(norm)) {
            optimizer_step(&opt, &m, &recipe, norm);
            r.train_loss = isnan(r.train_loss) ? s.main : 0.95 * r.train_loss + 0.05 * s.main;
            run_count_bad(&r, o, 0);
        } else { // nothing of it may reach the weights
            printf("step %zu: the loss is %g and the gradient's norm %g: skipped\n", r.step,
                   s.total, norm);
            optimizer_skip(&opt, &m);
            run_count_bad(&r, o, 1);
        }
        int last = r.step == o->steps;
        stop = run_stops(&r, o);
        fprintf(log, "%zu,%.6f,", r.step, s.main);
        if (r.n_val && (last || (o->val_every && r.step % o->val_every == 0))) {
            size_t n = last ? r.n_val : min_size(r.n_val, 16 * 1024 + 1); // all at the end
            r.val_loss = text_loss(&m, r.text.bytes + r.n_train, n, r.T, o->answers_only);
            if (isfinite(r.val_loss)) fprintf(log, "%.6f", r.val_loss);
        }
        fprintf(log, ",%.6f,%.6f,%.4f,%.6f,%.8f\n", s.mtp, s.balance, load, norm, rate);
        if (isatty(1) || stop || (o->log_every && r.step % o->log_every == 0))
            run_print(&r, o, &s, load, norm, rate);
        if (stop || (o->save_every && r.step % o->save_every == 0))
            run_save(&r, o, &m, &opt, NULL, &a, log);
    }
    printf(isatty(1) ? "\n\n" : "\n");
    int status = run_end(&r, o, log);
    if (r.step == o->steps) {
        if (o->tokens && c->V > '\n') sample(&m, o, "\n", 0);
        if (r.n_val)
            printf("\nvalidation loss %.4f over %s %zu tokens of the validation split\n",
                   r.val_loss, o->answers_only ? "the answers in all" : "all", r.n_val - 1);
        printf("trained in ");
        print_duration(now() - r.start);
        printf("; the model is in %s\n", o->out);
        if (o->tokens) printf("try ./moe sample --model %s --prompt \"ROMEO:\"\n", o->out);
    }
    optimizer_free(&opt);
    acts_free(&a);
    model_free(&m);
    return status;
}

// ------------------------------------------------------------------------------------------------
// 13  Self-improvement

// Where questions come from and who judges the answers: a built-in task, or programs of the user's.
typedef struct {
    int task;          // TASKS: not a built-in one
    size_t low, high;  // sizes of its questions
    uint64_t seed;
    FILE *questions;   // of --task-cmd
    int asked;         // file descriptor of what --verify-cmd reads
    int verdicts;      // of what it writes
    int patience;      // ms that either may be silent
} Source;

static void source_sizes(Source *s, const char *text)
{
    char *end;
    s->low = s->high = (size_t)strtol(text, &end, 10);
    if (*end == '-') s->high = (size_t)strtol(end + 1, &end, 10);
    static const size_t mosts[TASKS] = {8, 4, NUMBERS, NUMBERS, PLACES};
    size_t most = mosts[s->task];
    size_t least = s->task == TASK_COUNTDOWN ? 2 : 1;
    NEED(!*end && isdigit((unsigned char)*text) && s->low >= least && s->low <= s->high &&
         s->high <= most, "--size is '%s'; for %s it must be a number from %zu to %zu, or two as "
         "in 2-4", text, task_names[s->task], least, most);
}

// Starts a shell command with pipes to its standard input and from its standard output.
static void start_judge(Source *s, const char *command)
{
    int to[2], from[2];
    NEED(!pipe(to) && !pipe(from), "--verify-cmd: cannot make a pipe: %s", strerror(errno));
    pid_t child = fork();
    NEED(child >= 0, "--verify-cmd: cannot start a process: %s", strerror(errno));
    if (child == 0) {
        dup2(to[0], 0);
        dup2(from[1], 1);
        close(to[0]), close(to[1]), close(from[0]), close(from[1]);
        execl("/bin/sh", "sh", "-c", command, (char *)NULL);
        _exit(127);
    }
    close(to[0]), close(from[1]);
    fcntl(to[1], F_SETFD, FD_CLOEXEC);
    fcntl(to[1], F_SETFL, O_NONBLOCK); // it may not read
    fcntl(from[0], F_SETFD, FD_CLOEXEC);
    s->asked = to[1];
    s->verdicts = from[0];
}

static Source source_open(const Options *o)
{
    Source s = {0, 0, 0, o->seed, NULL, -1, -1, (int)(1000 * min_size(o->patience, 1000000))};
    while (s.task < TASKS && strcmp(o->task, task_names[s.task])) s.task++;
    int own = *o->task_cmd || *o->verify_cmd;
    NEED(!own || ranks == 1, "--task-cmd and --verify-cmd serve one process, not %d", ranks);
    NEED(own || s.task < TASKS, "--task is '%s'; it must be " TASK_NAMES, o->task);
    NEED(!own || (*o->task_cmd && *o->verify_cmd),
         "--task-cmd and --verify-cmd belong together: one asks, the other judges");
    if (!own) {
        source_sizes(&s, o->size);
        return s;
    }
    s.task = TASKS;
    fflush(NULL);
    signal(SIGINT, SIG_IGN); // Ctrl-C is for this program alone; those that it starts inherit this
    s.questions = popen(o->task_cmd, "r");
    NEED(s.questions, "--task-cmd: cannot start '%s': %s", o->task_cmd, strerror(errno));
    fcntl(fileno(s.questions), F_SETFD, FD_CLOEXEC);
    start_judge(&s, o->verify_cmd);
    signal(SIGINT, SIG_DFL);
    signal(SIGPIPE, SIG_IGN); // that a judge has ended a write then returns
    return s;
}

// Whether there is something to read from a program (POLLIN) or room to write to it (POLLOUT),
// within so many ms.
static int program_ready(int fd, short what, int patience)
{
    struct pollfd p = {fd, what, 0};
    int ready;
    while ((ready = poll(&p, 1, patience)) < 0 && errno == EINTR) {}
    return ready > 0;
}

// Reads a line that a program writes, its line feed included; 0 if the program ends, writes more
// than fits or is silent for `patience` ms.
static int program_line(int fd, int patience, char *text, size_t size)
{
    for (size_t i = 0; i + 1 < size; i++) {
        if (!program_ready(fd, POLLIN, patience) || read(fd, text + i, 1) != 1) return 0;
        if (text[i] != '\n') continue;
        text[i + 1] = 0;
        return 1;
    }
    return 0;
}

// Writes to a program; 0 if it has ended or does not read.
static int program_tell(int fd, int patience, const char *text)
{
    for (size_t n = strlen(text); n > 0;) {
        ssize_t written = program_ready(fd, POLLOUT, patience) ? write(fd, text, n) : 0;
        if (written <= 0) return 0;
        text += written, n -= (size_t)written;
    }
    return 1;
}

// Puts the i-th question for training or testing into a line; 0 if there is none. An eighth of a
// program's questions, by their hash, is for testing.
static int source_question(Source *s, Line *line, int testing, uint64_t i)
{
    line->length = 0;
    if (s->task < TASKS) {
        Random r = {s->seed, 20 + (uint64_t)testing, i};
        long size = (long)s->low + pick(&r, (long)(s->high - s->low) + 1);
        Question q = make_question(s->task, size, testing, s->seed, i);
        put_question(line, &q);
        return 1;
    }
    uint64_t hash;
    int tries = 0;
    do {
        int came = tries++ < 10000 &&
                   program_line(fileno(s->questions), s->patience, line->text, LINE);
        if (!came) return 0;
        line->length = strcspn(line->text, "\n");
        if (!line->text[line->length] || memchr(line->text, '\t', line->length)) return 0;
        line->text[line->length] = 0;
        hash = 0;
        for (size_t k = 0; k < line->length; k++)
            hash = random_u64(hash, (unsigned char)line->text[k], 0);
    } while ((hash % 8 == 0) != testing);
    return 1;
}

// Judges an answer; 0 if the judge does not, or has said something unasked.
static int source_judge(Source *s, const char *question, const char *answer, Reward *reward)
{
    Question q;
    char text[2 * LINE + 2], *end;
    if (s->task < TASKS) {
        if (!parse_question(&q, s->task, question)) return 0;
        *reward = judge(&q, answer);
        return 1;
    }
    snprintf(text, sizeof text, "%s\t%s\n", question, answer);
    if (program_ready(s->verdicts, POLLIN, 0) || !program_tell(s->asked, s->patience, text) ||
        !program_line(s->verdicts, s->patience, text, 64)) return 0;
    reward->accuracy = strtod(text, &end);
    reward->format = 0;
    return end > text && *end == '\n' && fabs(reward->accuracy) <= 1e9;
}

enum { END = '\n' }; // begins every question and ends every answer

// Writes question q as the prompt of text i; returns NULL, or what is wrong with it.
static const char *rollout_ask(Rollout *r, size_t i, const Line *q, size_t V)
{
    int *to = r->text + i * r->most;
    if (q->length + 2 >= r->most) return "a question is too long; use a larger --max-prompt";
    for (size_t k = 0; k < q->length; k++)
        if ((unsigned char)q->text[k] >= V)
            return "a question has bytes outside the model's vocabulary; vocab_size 256 has all";
    to[0] = END;
    tokens_copy(to + 1, q->text, q->length);
    to[q->length + 1] = '\t';
    r->prompt[i] = r->length[i] = q->length + 2;
    return NULL;
}

// The answer of text i, empty if it did not end or is no text.
static void rollout_answer(char answer[LINE], const Rollout *r, size_t i)
{
    const int *text = r->text + i * r->most;
    size_t n = 0, prompt = r->prompt[i], length = r->length[i] - prompt - 1;
    int ended = length < LINE && text[r->length[i] - 1] == END;
    while (ended && n < length && text[prompt + n] > 0 && text[prompt + n] < 256)
        answer[n] = (char)text[prompt + n], n++;
    answer[n == length ? n : 0] = 0;
}

// A policy's answers to questions, `group` to each, and what they earned.
typedef struct {
    Source *source;
    Decoder decoder;
    Rollout roll;
    Line *question;     // [n / group]
    Reward *reward;     // [n]
    double seconds;     // of drawing
} Exam;

// The most tokens of a question and its answer.
static size_t exam_length(const Options *o, const Config *c)
{
    size_t most = o->max_prompt + o->max_tokens;
    NEED(c->V > 127, "%s: a vocabulary of %zu; tasks are written in bytes", o->model, c->V);
    NEED(most <= c->Tmax, "--max-prompt and --max-tokens are %zu together; the model's "
         "max_position_embeddings is %zu", most, c->Tmax);
    NEED(o->max_tokens, "--max-tokens must be at least 1");
    NEED(o->max_prompt > 2, "no question fits --max-prompt %zu; use a larger --max-prompt",
         o->max_prompt);
    return most;
}

static Exam exam_make(const Model *m, Source *source, const Options *o, size_t n)
{
    size_t most = exam_length(o, &m->config);
    Exam e;
    memset(&e, 0, sizeof e);
    e.source = source;
    e.decoder = decoder_plan(m, n, most, 1, n, most);
    double needed = (double)e.decoder.arena.used + (double)n * (double)most * 8 +
                    (double)n * (double)(sizeof(Line) + m->config.V * sizeof(accum));
    if (needed > free_memory())
        die(FAILED, "%zu answers side by side need %.0f MB of memory; use a smaller --max-tokens",
            n, 1e-6 * needed);
    decoder_free(&e.decoder);
    e.decoder = decoder_make(m, n, most, 1, n, most);
    e.roll = rollout_make(n, most, o->max_tokens);
    e.question = (Line *)host_alloc(n, sizeof(Line));
    e.reward = (Reward *)host_alloc(n, sizeof(Reward));
    return e;
}

static void exam_free(Exam *e)
{
    decoder_free(&e->decoder);
    rollout_free(&e->roll);
    free(e->question);
    free(e->reward);
}

// Asks questions first .. first + questions of a stream and judges the answers; returns NULL, or
// what went wrong.
static const char *exam_sit(Exam *e, const Sampler *sampler, int testing, size_t first,
                            size_t questions, size_t group)
{
    static char answer[LINE];
    const char *wrong;
    Rollout *r = &e->roll;
    r->n = questions * group;
    for (size_t i = 0; i < r->n; i++) {
        Line *q = &e->question[i / group];
        if (i % group == 0 && !source_question(e->source, q, testing, first + i / group))
            return "--task-cmd ended, was silent beyond --patience, wrote a tab or a line that is "
                   "too long, or the same few questions only; it must write questions, a line "
                   "each, without end";
        if ((wrong = rollout_ask(r, i, q, e->decoder.m->config.V))) return wrong;
    }
    double start = now();
    rollout_draw(r, &e->decoder, sampler, END);
    e->seconds = now() - start;
    for (size_t i = 0; i < r->n; i++) {
        rollout_answer(answer, r, i);
        if (!source_judge(e->source, e->question[i / group].text, answer, &e->reward[i]))
            return "--verify-cmd ended, was silent beyond --patience or wrote something else than "
                   "a number for a line; it must write a reward of at most 1e9, a line each, for "
                   "every line question<TAB>answer that it reads, and flush it";
    }
    return NULL;
}

// What went wrong here or in another process; NULL: nothing.
static const char *ranks_error(const char *error)
{
    double failed = error != NULL;
    ranks_max(&failed, 1);
    return error ? error : failed > 0 ? "a question of another process is too long; use a larger "
                                        "--max-prompt" : NULL;
}

// Accuracy on n test questions, answered greedily.
static double test_accuracy(Exam *e, size_t n, const char **error)
{
    Sampler likeliest = {0, 0, 1, 0, 0};
    size_t room = e->decoder.slots;
    double sum = 0;
    for (size_t at = (size_t)rank * room; at < n && !*error; at += (size_t)ranks * room) {
        size_t k = min_size(room, n - at);
        *error = exam_sit(e, &likeliest, 1, at, k, 1);
        for (size_t i = 0; i < k; i++) sum += e->reward[i].accuracy / (double)n;
    }
    ranks_sum(&sum, 1);
    *error = ranks_error(*error);
    return sum;
}

static const size_t *order_by_length; // of texts, for qsort

static int compare_lengths(const void *x, const void *y)
{
    size_t i = *(const size_t *)x, k = *(const size_t *)y;
    size_t a = order_by_length[i], b = order_by_length[k];
    return a != b ? (a < b) - (a > b) : (i > k) - (i < k);
}

typedef struct {
    double accuracy, format, entropy, flat, tokens; // flat: share of groups all alike
    GrpoSums sums;
    double reward, length, norm, draw_seconds, update_seconds;
    size_t bad; // updates that were not finite
} RlStep;

// One step of GRPO: the answers in e, in o->minibatches parts, o->epochs times.
static RlStep rl_update(Exam *e, const Options *o, Model *m, const Model *ref, Acts *a, size_t room,
                        Optimizer *opt, const Recipe *recipe, size_t step)
{
    RlStep s;
    Rollout *r = &e->roll;
    size_t n = r->n, all = n * (size_t)ranks, G = o->group; // all: of all processes
    double start = now(), *total = (double *)host_alloc(2 * n, sizeof(double)), *A = total + n;
    size_t *order = (size_t *)host_alloc(n, sizeof(size_t));
    Grpo g = {o->rl_clip, o->kl};
    memset(&s, 0, sizeof s);
    s.tokens = (double)r->drawn, s.entropy = r->entropy * s.tokens, s.draw_seconds = e->seconds;
    for (size_t i = 0; i < n; i++) {
        total[i] = e->reward[i].accuracy + e->reward[i].format;
        s.accuracy += e->reward[i].accuracy / (double)all;
        s.format += e->reward[i].format / (double)all;
    }
    for (size_t i = 0; i < n; i += G)
        s.flat += group_advantages(A + i, total + i, G) > 1e-9 ? 0 : (double)G / (double)all;
    ranks_sum(&s.accuracy, 5);
    s.reward = s.accuracy + s.format;
    s.entropy /= s.tokens, s.length = s.tokens / (double)all;
    for (size_t epoch = 0; epoch < o->epochs; epoch++) {
        for (size_t i = 0; i < n; i++) { // in random order
            uint64_t at = (step * (size_t)ranks + (size_t)rank) * n + i;
            size_t k = (size_t)random_u64(o->seed, 30 + epoch, at) % (i + 1);
            order[i] = order[k];
            order[k] = i;
        }
        for (size_t part = 0; part < o->minibatches; part++) {
            size_t begin = part * n / o->minibatches, end = (part + 1) * n / o->minibatches;
            order_by_length = r->length;
            qsort(order + begin, end - begin, sizeof *order, compare_lengths);
            GrpoSums sums = grpo_backward(m, ref, a, room, r, order + begin, end - begin, A, &g);
            optimizer_gather(opt, m);
            ranks_sum(&sums.loss, 3);
            double share = 1 / (double)(all * o->epochs), norm = grad_norm(m);
            s.sums.loss += share * sums.loss;
            s.sums.kl += share * sums.kl;
            s.sums.clipped += share * sums.clipped;
            s.norm += norm / (double)(o->epochs * o->minibatches);
            if (isfinite(norm) && isfinite(sums.loss)) optimizer_step(opt, m, recipe, norm);
            else optimizer_skip(opt, m), s.bad++;
        }
    }
    s.update_seconds = now() - start;
    free(total);
    free(order);
    return s;
}

// Writes questions with answers of mixed quality, a text for a base model to learn from.
static int command_task(const Options *o)
{
    Source s = source_open(o);
    Quality quality = {o->worked, o->right, o->slips};
    char letters[] = "abcdefghijklmnopqrstuvwxyz";
    NEED(s.task < TASKS, "moe task knows only --task " TASK_NAMES);
    for (size_t i = 0; i < o->lines; i++) {
        Random r = {o->seed, 40, (uint64_t)i << 20};
        long size = (long)s.low + pick(&r, (long)(s.high - s.low) + 1);
        Question q = make_question(s.task, size, 0, o->seed, i);
        rename_columns(&q, letters, &r);
        Line line = {0, ""};
        put_question(&line, &q);
        put(&line, "\t");
        put_solution(&line, &q, &r, &quality);
        if (printf("%s\n", line.text) < 0)
            die(FAILED, "standard output: cannot write: %s", strerror(errno));
    }
    return 0;
}

// moe rl's log as panels: each a line and, perhaps, dots from two columns of log.csv (0: none).
enum { LOG_COLUMNS = 14, PLOT_ROWS = 13, PLOT_WIDTH = 60, PANEL_WIDTH = 241 };
static const struct { const char *title; double scale; size_t column[2]; } panels[] = {
    {"reward", 1, {1, 0}}, {"accuracy, % (dots: tests)", 100, {2, 10}},
    {"answer length, tokens", 1, {4, 0}}, {"KL", 1, {6, 0}}, {"entropy, nats", 1, {5, 0}},
};
enum { ACCURACY_PANEL = 1, LENGTH_PANEL, PANELS = sizeof panels / sizeof *panels };
typedef struct { double low, high, y[2][PANEL_WIDTH]; } Curve; // nan: no number there

static double plot_scale(double v, double low, double high) // to 0 .. 1
{
    return high - low > 1e-9 * fabs(high) ? (v - low) / (high - low) : 0.5;
}

// A panel `width` wide: where n rows of the log share a place, their mean.
static Curve curve_make(size_t panel, size_t width, const double *row, size_t n, const double *step)
{
    Curve c = {NAN, NAN, {{0}, {0}}};
    for (int k = 0; k < 2; k++) {
        size_t count[PANEL_WIDTH] = {0}, column = panels[panel].column[k];
        for (const double *r = row; r < row + n * LOG_COLUMNS && column; r += LOG_COLUMNS) {
            size_t x = (size_t)(plot_scale(*r, step[0], step[1]) * (double)(width - 1) + 0.5);
            if (!isnan(r[column])) c.y[k][x] += panels[panel].scale * r[column], count[x]++;
        }
        for (size_t x = 0; x < width; x++) {
            c.y[k][x] = count[x] ? c.y[k][x] / (double)count[x] : NAN;
            c.low = fmin(c.low, c.y[k][x]); // of nan and a number: the number
            c.high = fmax(c.high, c.y[k][x]);
        }
    }
    return c;
}

static void plot_print(const Curve *a, const Curve *l, const double *step) // accuracy and length
{
    const Curve *c[3] = {l, a, a};
    char grid[PLOT_ROWS][PLOT_WIDTH];
    memset(grid, ' ', sizeof grid);
    for (int k = 0; k < 3; k++)
        for (int x = 0; x < PLOT_WIDTH; x++) {
            double y = c[k]->y[k / 2][x], down = 1 - plot_scale(y, c[k]->low, c[k]->high);
            if (!isnan(y)) grid[(int)(down * (PLOT_ROWS - 1) + 0.5)][x] = ".*o"[k];
        }
    printf("\n%-43s%34s\n", "accuracy, %: * in training, o in tests", "length, tokens: .");
    for (int y = 0; y < PLOT_ROWS; y++) {
        double up = 1 - y / (PLOT_ROWS - 1.0);
        if (y % 3) printf("%8s|%.*s|\n", "", PLOT_WIDTH, grid[y]);
        else printf("%7.1f +%.*s+ %.1f\n", a->low + up * (a->high - a->low), PLOT_WIDTH, grid[y],
                    l->low + up * (l->high - l->low));
    }
    printf("%9s%-28.0fstep%28.0f\n", "", step[0], step[1]);
}

static void panel_print(FILE *f, size_t panel, const Curve *c, const double *step)
{
    fprintf(f, "<g transform=\"translate(%zu,%zu)\">\n<text y=\"-12\" font-size=\"14\">%s</text>\n"
            "<path d=\"M0 0V120H240\"/>\n<text class=\"end\" x=\"-6\" y=\"9\">%.3g</text>\n"
            "<text class=\"end\" x=\"-6\" y=\"120\">%.3g</text>\n<text y=\"137\">step %.0f</text>\n"
            "<text class=\"end\" x=\"240\" y=\"137\">%.0f</text>\n", 60 + panel % 3 * 310,
            40 + panel / 3 * 200, panels[panel].title, c->high, c->low, step[0], step[1]);
    for (int k = 0; k < 2; k++) {
        const char *pen = "M"; // h0, a line of length 0, shows a point that is alone
        fprintf(f, "<path class=\"%s\" d=\"", k ? "dots" : "line");
        for (int x = 0; x < PANEL_WIDTH; x++) {
            double down = 1 - plot_scale(c->y[k][x], c->low, c->high);
            if (isnan(c->y[k][x])) continue;
            fprintf(f, "%s%d %.1fh0", pen, x, 120 * down);
            pen = k ? "M" : "L";
        }
        fprintf(f, k ? "\"/>\n</g>\n" : "\"/>\n");
    }
}

// Plots directory/log.csv: accuracy and length on the terminal, all panels in directory/curve.svg.
static void rl_plot(const char *directory)
{
    Path path = path_join(directory, "log.csv"), svg = path_join(directory, "curve.svg");
    size_t size, n = 0, lines = 0;
    char *text = read_file(path.text, &size, SIZE_MAX - 1), *end;
    for (size_t i = 0; i < size; i++) lines += text[i] == '\n';
    double *row = (double *)host_alloc(lines, LOG_COLUMNS * sizeof(double)), step[2] = {NAN, NAN};
    for (char *s = text; (end = strchr(s, '\n')); s = end + 1) {
        double *r = row + n * LOG_COLUMNS;
        for (int k = 0; k < LOG_COLUMNS; k++) {
            char *stop = s + strcspn(s, ",\n"), *rest;
            double v = strtod(s, &rest);
            r[k] = rest > s && rest <= stop && fabs(v) < 1e30 ? v : NAN;
            s = stop + (*stop == ',');
        }
        step[0] = fmin(step[0], *r);
        step[1] = fmax(step[1], *r);
        n += !isnan(*r); // the head is no row
    }
    NEED(n && !strncmp(text, "step,reward,", 12), "%s: no step of moe rl in it", path.text);
    Curve accuracy = curve_make(ACCURACY_PANEL, PLOT_WIDTH, row, n, step);
    Curve length = curve_make(LENGTH_PANEL, PLOT_WIDTH, row, n, step);
    plot_print(&accuracy, &length, step);
    Output o = output_open(svg.text);
    fprintf(o.f, "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 940 390\" width=\"940\" "
            "height=\"390\" font-family=\"sans-serif\" font-size=\"12\">\n<style>text{fill:#808080}"
            ".end{text-anchor:end}path{fill:none;stroke:#808080;stroke-linecap:round;"
            "stroke-linejoin:round}.line{stroke:#4a88c8;stroke-width:1.5}"
            ".dots{stroke:#e08020;stroke-width:6}</style>\n");
    for (size_t k = 0; k < PANELS; k++) {
        Curve c = curve_make(k, PANEL_WIDTH, row, n, step);
        panel_print(o.f, k, &c, step);
    }
    fprintf(o.f, "</svg>\n");
    output_close(&o);
    free(row);
    free(text);
}

// What a run that teaches nothing looks like, and what to try; said once.
static void rl_warn(const RlStep *s)
{
    static int said, flat;
    const char *what = NULL;
    flat = s->flat > 0.95 && s->accuracy < 0.5 ? flat + 1 : 0;
    if (s->sums.kl > 10)
        what = "the policy has run away from its reference; try a smaller --lr or a larger --kl";
    else if (s->entropy < 0.01 && s->accuracy < 0.2)
        what = "the policy has collapsed on answers that earn nothing; go back to an earlier "
               "model, with a smaller --lr";
    else if (flat >= 5)
        what = "nearly all groups agree, so nothing is learnt; try easier questions (--size), a "
               "larger --group or a better base model";
    if (what && !said++)
        printf("warning: KL %.2g, entropy %.2g, accuracy %.0f%%: %s\n", s->sums.kl, s->entropy,
               100 * s->accuracy, what);
}

// A row of log.csv and a line for the reader.
static void rl_report(const Run *r, const Options *o, const RlStep *s, int tested, FILE *log)
{
    double drawn = s->tokens / s->draw_seconds, learnt = s->tokens / s->update_seconds;
    double seconds = now() - r->start;
    fprintf(log, "%zu,%.4f,%.4f,%.4f,%.2f,%.4f,%.5f,%.4f,%.4f,%.4f,", r->step, s->reward,
            s->accuracy, s->format, s->length, s->entropy, s->sums.kl, s->sums.clipped, s->flat,
            s->norm);
    if (tested) fprintf(log, "%.4f", r->val_loss);
    fprintf(log, ",%.1f,%.0f,%.0f\n", seconds, drawn, learnt);
    printf("step %zu/%zu accuracy %.1f%% format %.1f%% length %.1f entropy %.3f kl %.4f flat "
           "%.0f%% norm %.2f test %.1f%% rollout %.0f tok/s update %.0f %.0fs\n", r->step, o->steps,
           100 * s->accuracy, 100 * s->format, s->length, s->entropy, s->sums.kl, 100 * s->flat,
           s->norm, 100 * r->val_loss, drawn, learnt, seconds);
}

// Rejection sampling: writes the first right answer to each question that has one.
static void rl_collect(Exam *e, const Options *o)
{
    static char answer[LINE];
    size_t first = 0;
    for (size_t written = 0; written < o->collect; first += o->questions) {
        Sampler sampler = {o->rl_temperature, 0, 1, o->seed, first * o->group};
        const char *error = exam_sit(e, &sampler, 0, first, o->questions, o->group);
        if (error) die(FAILED, "%s", error);
        size_t before = written;
        for (size_t i = 0; i < e->roll.n && written < o->collect; i++) {
            if (e->reward[i].accuracy < 1) continue;
            rollout_answer(answer, &e->roll, i);
            if (printf("%s\t%s\n", e->question[i / o->group].text, answer) < 0)
                die(FAILED, "standard output: cannot write: %s", strerror(errno));
            written++;
            i += o->group - 1 - i % o->group;
        }
        if (written == before && first > 100 * o->questions)
            die(FAILED, "%s answers hardly any question right; %zu of %zu were collected", o->model,
                written, o->collect);
    }
}

static void rl_check(const Options *o, size_t answers)
{
    NEED(o->questions % (size_t)ranks == 0, "--questions is %zu; the %d processes share them out, "
         "so it must be a multiple of that", o->questions, ranks);
    NEED(answers && o->group > 1 && o->steps,
         "--questions and --steps must be at least 1, --group 2");
    NEED(ranks == 1 || !o->collect, "--collect takes one process, not %d", ranks);
    NEED(o->minibatches && o->minibatches <= answers && o->epochs,
         "--minibatches and --epochs must be at least 1, --minibatches at most %zu, the answers of "
         "a step in a process", answers);
    NEED(o->rl_temperature > 0, "--temperature must be above 0: answers that are all alike teach "
         "nothing");
}

// The policy becomes the reference.
static void rl_new_reference(Model *ref, const Model *m)
{
    device_copy(ref->weights, m->weights, m->layout.elements * sizeof(real));
    if (has_master(m))
        device_copy(ref->master, m->master, m->layout.elements * sizeof(accum));
}

// GRPO from questions to a better model.
static int command_rl(const Options *given)
{
    Options own = *given, *o = &own;
    o->steps = o->rl_steps, o->lr = o->rl_lr, o->save_every = o->rl_save_every;
    o->optimizer = o->rl_optimizer;
    Config config = directory_config(o->model);
    const Config *c = &config;
    Source source = source_open(o);
    size_t questions = o->questions / (size_t)ranks; // of this process
    size_t n = size_mul(questions, o->group), most = exam_length(o, c);
    int muon = is_muon(o->optimizer);
    rl_check(o, n);
    Run r;
    memset(&r, 0, sizeof r);
    r.command = RL;
    r.val_loss = r.train_loss = NAN;
    size_t B = ceil_div(4096, most - 1);
    Model m = model_load(o->model, !o->collect), reference, *ref = NULL;
    Decoder plan = decoder_plan(&m, n, most, 1, n, most);
    const char *memory = memory_plan(c, !o->collect, B, most - 1, plan.arena.used);
    decoder_free(&plan);
    Exam e = exam_make(&m, &source, o, n);
    if (o->collect) {
        rl_collect(&e, o);
        exam_free(&e);
        model_free(&m);
        return 0;
    }
    prepare_directory(o, c);
    Optimizer opt = optimizer_make(&m);
    if (o->kl > 0) {
        reference = model_load(o->model, has_master(&m));
        ref = &reference;
    }
    if (*o->resume) run_load(&r, o, &m, &opt, ref);
    FILE *log = log_open(&r, o, "step,reward,accuracy,format,length,entropy,kl,clipped,flat,"
                         "grad_norm,test_accuracy,seconds,rollout_tokens_per_s,"
                         "update_tokens_per_s\n");
    Acts a = acts_make(c, B, most - 1, 1);
    a.temperature = o->rl_temperature;
    a.alpha = a.mtp_weight = 0; // rewards alone; and the routers' biases stay as they are
    Recipe recipe = recipe_make(o, muon, o->lr, muon ? o->rl_adam_lr : o->lr, 0);
    const char *error = NULL;
    int stop = 0;
    catch_signals();
    printf("memory: %s\n%zu questions x %zu answers a step, up to %zu tokens each, ", memory,
           o->questions, o->group, o->max_tokens);
    print_processors();
    if (!r.step) r.val_loss = test_accuracy(&e, o->test, &error);
    if (o->test && !error) printf("test accuracy %.1f%%\n", 100 * r.val_loss);
    r.start = now();
    while (!stop && !error) {
        size_t first = r.step * o->questions + (size_t)rank * questions; // of its questions
        Sampler sampler = {o->rl_temperature, 0, 1, o->seed, o->questions * o->group +
                           first * o->group};
        error = ranks_error(exam_sit(&e, &sampler, 0, first, questions, o->group));
        if (error) break;
        RlStep s = rl_update(&e, o, &m, ref, &a, B * (most - 1), &opt, &recipe, r.step);
        r.step++;
        if (s.bad) printf("step %zu: %zu updates were not finite: skipped\n", r.step, s.bad);
        run_count_bad(&r, o, s.bad);
        if (ref && o->ref_every && r.step % o->ref_every == 0) rl_new_reference(ref, &m);
        stop = run_stops(&r, o);
        int tested = r.step == o->steps || (o->test_every && r.step % o->test_every == 0);
        if (tested) r.val_loss = test_accuracy(&e, o->test, &error);
        rl_report(&r, o, &s, tested, log);
        rl_warn(&s);
        fflush(stdout);
        if (stop || (o->save_every && r.step % o->save_every == 0))
            run_save(&r, o, &m, &opt, ref, &a, log);
    }
    if (error) {
        if (r.step > r.saved) run_save(&r, o, &m, &opt, ref, &a, log);
        die(FAILED, "%s%s%s", error, r.step ? "; saved, go on with ./moe rl --resume " : "",
            r.step ? o->out : "");
    }
    fflush(log);
    if (r.step > r.first_step && rank == 0) rl_plot(o->out);
    int status = run_end(&r, o, log);
    exam_free(&e);
    optimizer_free(&opt);
    acts_free(&a);
    if (ref) model_free(ref);
    model_free(&m);
    return status;
}

// ------------------------------------------------------------------------------------------------
// 14  Planning

// What a model and its training take, from sizes alone: no weight is allocated. Beside it stands
// what was published: [V3] 4.2 and table 1; V3's work, speed and cache in [ISCA] arXiv:2505.09343,
// tables 1, 2, 4; R1's hours in Nature 645 (2025), supplement; Moonlight's sizes in its paper, 3.

// Parts of the main model by their tensors' names: the first prefix that fits.
static const struct { const char *name, *prefix; } parts[] = {
    {"embedding", "model.embed_tokens."}, {"head", "lm_head."}, {"attention", "self_attn."},
    {"shared", "mlp.shared_experts."}, {"routed", "mlp.experts."}, {"router", "mlp.gate."},
    {"dense", "mlp."}, {"norms", ""},
};
enum { EMBEDDING_PART, HEAD_PART, PARTS = sizeof parts / sizeof *parts };

// Dense bfloat16 peak and memory of a device, as its maker gives them.
static const struct { const char *name; double tflops, gigabytes; } gpus[] = {
    {"h800", 989, 80}, {"h100", 989, 80}, {"h200", 989, 141}, {"h20", 148, 96},
    {"b200", 2250, 180}, {"a100", 312, 80}, {"mi300x", 1307, 192}, {"rtx-4090", 165, 24},
};
enum { H800, GPUS = sizeof gpus / sizeof *gpus };

enum { V3_CONTEXT = 4096, V3_GPUS = 2048, V3_PIPELINE = 16, V3_EXPERT_PARALLEL = 64 };
#define V3_TOKENS 14.8e12 // of pre-training, like the hours
#define V3_HOURS 2664e3

// Whether a configuration, wherever it comes from, has a preset's sizes.
static int is_preset(const Config *c, int preset)
{
    Config p = config_preset(preset);
#define SAME_SIZE(symbol, ...) && c->symbol == p.symbol
    return 1 CONFIG_SIZES(SAME_SIZE);
}

// Operations of a token's forward pass in a sequence of T, with or without multi-token prediction:
// a multiply-add for each weight of the matrices it meets, and for each number of the keys and
// values of the T/2 tokens that it sees on average. The backward pass takes twice as many, as a
// product has two factors to find the gradients of. This is the useful work: nothing that is masked
// or computed again counts.
static double flops_forward(const Config *c, size_t T, int mtp)
{
    Layout layout = layout_make(c);
    size_t depths = mtp ? c->D : 0;
    double weights = 0, attention = (double)(c->NH * (c->Dn + c->Dr + c->Dv)) * (double)T / 2;
    for (size_t i = 0; i < layout.tensors; i++) {
        const Tensor *t = &layout.tensor[i];
        int is_matrix = t->kind == MATRIX || t->kind == ROUTER || t->kind == HEAD;
        if (is_matrix && t->layer < (int)(c->L + depths)) // the head serves every depth
            weights += active_size(c, t) * (double)(t->kind == HEAD ? 1 + depths : 1);
    }
    free(layout.tensor);
    return 2 * (weights + (double)(c->L + depths) * attention);
}

// A row of a table: numbers, NAN where there is none, and what was published of them, else 0.
enum { COLUMNS = 7 };
typedef struct { const char *name; double value[COLUMNS], published[COLUMNS]; } Row;

// How a number is shown: as 1.234G, by the letters for 1, 1e3, 1e6 ..., or as 12.34 or +1.23%.
static const char counts[] = " KMBT", units[] = " KMGTPEZY", decimals[] = "", percent[] = "%";

static const char *show_scaled(char *room, double x, const char *letters) // 32 characters
{
    size_t k = 0;
    while (fabs(x) >= 999.9995 && letters[k] && letters[k + 1]) x /= 1000, k++;
    if (isnan(x)) *room = 0;
    else if (letters == percent) snprintf(room, 32, "%+.2f%%", 100 * x);
    else if (letters == decimals) snprintf(room, 32, "%.*f", x == floor(x) ? 0 : 2, x);
    else if (k) snprintf(room, 32, "%.3f%c", x, letters[k]);
    else snprintf(room, 32, "%.4g", x);
    return room;
}

// Prints a table and a note, for people, or a member of a JSON object with the same names as keys.
static void print_table(int json, const char *name, const char *columns, const char *letters,
                        const Row *row, size_t rows, const char *note, ...)
{
    static const char *const titles[3] = {NULL, "published", "difference"};
    const char *column[COLUMNS];
    int width[COLUMNS], n = 0;
    char room[32];
    va_list args;
    for (const char *c = columns; *c; c += width[n] + (c[width[n]] == ' '), n++)
        column[n] = c, width[n] = (int)strcspn(c, " ");
    int wide = n > 3 ? 10 : 20, names = n > 3 ? 24 : 34;
    if (json) printf(",\n  \"%s\": {", name);
    else printf("\n%-*s", names, name);
    for (int k = 0; k < n && !json; k++) printf("%*.*s", wide, width[k], column[k]);
    va_start(args, note);
    if (!json) printf("\n  "), vprintf(note, args), printf("\n");
    va_end(args);
    for (const Row *r = row; r < row + rows; r++) {
        double line[3][COLUMNS]; // ours, what was published, and how far ours is from it
        int lines = 1;
        for (int k = 0; k < n; k++) {
            line[0][k] = r->value[k];
            line[1][k] = r->published[k] > 0 ? r->published[k] : NAN;
            line[2][k] = line[0][k] / line[1][k] - 1;
            if (r->published[k] > 0) lines = 3;
        }
        for (int i = 0; i < lines; i++) {
            const char *title = i ? titles[i] : r->name, *comma = "";
            if (json) printf("%s\"%s\": {", i ? ", " : r > row ? ",\n    " : "\n    ", title);
            else printf("%*s%-*s", i ? 4 : 2, "", names - (i ? 4 : 2), title);
            for (int k = 0; k < n; k++) {
                double x = line[i][k];
                if (!json) printf("%*s", wide, show_scaled(room, x, i == 2 ? percent : letters));
                else if (!isnan(x)) printf("%s\"%.*s\": %.15g", comma, width[k], column[k], x);
                if (!isnan(x)) comma = ", ";
            }
            fputs(!json ? "\n" : i ? "}" : "", stdout);
        }
        if (json) printf("}");
    }
    if (json) printf("\n  }");
}
#define ROWS(row) row, sizeof row / sizeof *row

// A plan: `gpus` devices stand in `data` x `pipeline`, experts spread over `expert` of the `data`.
typedef struct {
    const Config *c;
    int json;
    double v3, moonlight; // 1 if it is that model, else 0
    size_t gpu, gpus, data, expert, pipeline;
    size_t B, T;          // at once in a device
} Plan;

static Plan plan_make(const Options *o, const Config *c)
{
    double trained = c->yarn_factor > 0 ? fmin(c->yarn_original, (double)c->Tmax) : (double)c->Tmax;
    int v3 = is_preset(c, DEEPSEEK_V3);
    Plan p = {c, o->json, (double)v3, (double)is_preset(c, MOONLIGHT), 0, o->gpus,
              o->data_parallel, o->expert_parallel, o->pipeline, o->micro_batch,
              o->context ? o->context : (size_t)trained};
    while (p.gpu < GPUS && strcmp(o->gpu, gpus[p.gpu].name)) p.gpu++;
    if (!p.pipeline) p.pipeline = v3 ? V3_PIPELINE : 1;
    if (!p.expert) p.expert = v3 ? V3_EXPERT_PARALLEL : 1;
    if (!p.gpus && p.data) p.gpus = p.data * p.pipeline;
    if (!p.gpus) p.gpus = v3 ? (size_t)V3_GPUS : p.expert * p.pipeline;
    if (!p.data) p.data = p.gpus / p.pipeline;
    NEED(is_utf8(o->plan_config), "--config %s: the name is not UTF-8", o->plan_config);
    NEED(p.gpu < GPUS, "--gpu is '%s'; it must be " GPU_NAMES, o->gpu);
    NEED(p.pipeline <= layers(c), "--pipeline is %zu but there are only %zu layers, MTP's included",
         p.pipeline, layers(c));
    NEED(p.expert == 1 || (c->E && c->E % p.expert == 0), "--expert-parallel %zu does not divide "
         "the %zu experts (n_routed_experts)", p.expert, c->E);
    NEED(p.gpus % p.pipeline == 0, "--pipeline %zu does not divide --gpus %zu", p.pipeline, p.gpus);
    NEED(p.gpus / p.pipeline == p.data, "--data-parallel %zu x --pipeline %zu is not --gpus %zu",
         p.data, p.pipeline, p.gpus);
    NEED(p.data % p.expert == 0, "--expert-parallel %zu does not divide --data-parallel %zu",
         p.expert, p.data);
    NEED(p.T <= c->Tmax, "--seq is %zu; the model's max_position_embeddings is %zu", p.T, c->Tmax);
    NEED(p.B > 0 && p.B <= 1 << 20, "--batch is %zu; it must be 1 to %d", p.B, 1 << 20);
    NEED(o->mfu >= 1e-6 && o->mfu <= 1, "--mfu is %g; it must be 1e-6 to 1", o->mfu);
    NEED(o->budget <= 1e20, "--budget is %g; it must be at most 1e20 tokens", o->budget);
    NEED(o->price <= 1e6, "--price is %g; it must be at most 1e6 dollars", o->price);
    return p;
}

static double plan_parameters(const Plan *p) // returns the active ones
{
    const Config *c = p->c;
    Layout layout = layout_make(c);
    double n[PARTS + 1][2] = {{0}}, sum[2] = {0}; // total and active; [PARTS]: of MTP layers
    const double *embedding = n[EMBEDDING_PART], *head = n[HEAD_PART], *mtp = n[PARTS];
    for (size_t i = 0; i < layout.tensors; i++) {
        const Tensor *t = &layout.tensor[i];
        size_t k = t->layer >= (int)c->L ? PARTS : 0;
        while (k < PARTS && strncmp(t->name, parts[k].prefix, strlen(parts[k].prefix))) k++;
        n[k][0] += (double)tensor_size(t);
        n[k][1] += active_size(c, t);
    }
    free(layout.tensor);
    for (size_t k = 0; k < 2 * PARTS; k++) sum[k % 2] += n[k / 2][k % 2];
#define PART(k) {parts[k].name, {n[k][0], n[k][1]}, {0}}
    const Row row[] = {
        PART(0), PART(1), PART(2), PART(3), PART(4), PART(5), PART(6), PART(7),
        {"main_model", {sum[0], sum[1]}, {p->v3 * 671e9, p->v3 * 37e9}},
        {"with_embedding_as_active", {sum[0], sum[1] + embedding[0]}, {0}},
        {"without_embedding_and_head", {sum[0] - embedding[0] - head[0], sum[1] - head[1]},
         {p->moonlight * 15.29e9, p->moonlight * 2.24e9}},
        {"MTP", {mtp[0], mtp[1]}, {0}},
        {"all", {sum[0] + mtp[0], sum[1] + mtp[1]}, {0}},
        {"all_with_MTP's_released_copies", // each depth's, of embedding and head
         {sum[0] + mtp[0] + (double)c->D * (embedding[0] + head[0]), NAN}, {p->v3 * 685e9}},
    };
    print_table(p->json, "parameters", "total active", counts, ROWS(row), "active: met by one "
                "token, so %zu of %zu routed experts; the embedding copies one row", c->K, c->E);
    return sum[1];
}

static void plan_flops(const Plan *p)
{
    double matrices = flops_forward(p->c, 0, 0), sum = flops_forward(p->c, p->T, 0);
    double all = flops_forward(p->c, p->T, 1);
    Row row[] = {
        {"matrices", {matrices}, {0}}, {"attention", {sum - matrices}, {0}},
        {"main_model", {sum}, {0, 0, p->T == V3_CONTEXT ? p->v3 * 250e9 : 0}},
        {"MTP", {all - sum}, {0}}, {"all", {all}, {0}},
    };
    for (Row *r = row; r < row + 5; r++) r->value[1] = 2 * *r->value, r->value[2] = 3 * *r->value;
    print_table(p->json, "flops_of_a_token", "forward backward both", units, ROWS(row),
                "in a sequence of %zu; attention: its causal half", p->T);
}

static void plan_cache(const Plan *p)
{
    const Config *c = p->c;
    double latent = 2 * (double)(c->Rkv + c->Dr), plain = 2 * (double)(c->NH * (c->Dn + c->Dv));
    const Row row[] = {
        {"latent_attention", {latent, latent * (double)c->L}, {0, p->v3 * 70.272e3}},
        {"plain_attention", {plain, plain * (double)c->L}, {0}},
    };
    print_table(p->json, "cache_bytes_of_a_token", "a_layer all_layers", units, ROWS(row),
                "bfloat16; plain: a key of Dn and a value of Dv numbers for each head, %.1f times "
                "as much", plain / latent);
}

// Bytes of activations where real is bfloat16: of every layer, kept for the backward pass, or of
// one alone.
static double activation_bytes(const Plan *p, int kept)
{
    Acts plan = acts_plan(p->c, p->B, p->T, kept);
    double bytes = (double)plan.arena.used - (sizeof(real) - 2.0) * (double)plan.arena.reals;
    acts_free(&plan);
    return bytes;
}

static void plan_memory(const Plan *p)
{
    const Config *c = p->c;
    Layout layout = layout_make(c);
    double held = 0, optimizer = 0, most = 0, has = 1e9 * gpus[p->gpu].gigabytes;
    for (size_t stage = 0; stage < p->pipeline; stage++) {
        double each = 0, experts = 0; // parameters that every device of the stage has, or some
        for (size_t i = 0; i < layout.tensors; i++) {
            const Tensor *t = &layout.tensor[i]; // layers in order, as evenly as they divide
            size_t its = t->layer >= 0 ? (size_t)t->layer * p->pipeline / layers(c) :
                         t->kind == EMBEDDING ? 0 : p->pipeline - 1;
            if (its == stage) *(t->count > 1 ? &experts : &each) += (double)tensor_size(t);
        }
        double here = each + experts / (double)p->expert;
        double shared = 8 * (each + experts) / (double)p->data;
        if (6 * here + shared > most) held = here, optimizer = shared, most = 6 * here + shared;
    }
    free(layout.tensor);
    // The first stage has a batch under way for every stage: in all as much as the whole model's.
    // Recomputed, only the blocks' inputs are, and one layer's values and gradients.
    double kept = activation_bytes(p, 1), layer = activation_bytes(p, 0);
    double again = fmin(kept, 4 * (double)(layers(c) * c->C) * (double)(p->B * p->T) + 2 * layer);
    const Row row[] = {
        {"weights", {2 * held, 2 * held}, {0}}, {"gradients", {4 * held, 4 * held}, {0}},
        {"optimizer", {optimizer, optimizer}, {0}}, {"activations", {kept, again}, {0}},
        {"all", {most + kept, most + again}, {0}}, {"device", {has, has}, {0}},
    };
    print_table(p->json, "bytes_on_the_fullest_device", "activations_kept recomputed", units,
                ROWS(row), "%zu %s: data %zu x pipeline %zu, experts over %zu; %zu x %zu tokens at "
                "once\n  weights bfloat16, gradients float; AdamW's float weights and bfloat16 "
                "moments, as V3's, split\n  among data-parallel devices (ZeRO-1); activations "
                "bfloat16, float where norms read them, all\n  kept or each block's input alone; "
                "V3 recomputes a part and keeps a part in FP8", p->gpus, gpus[p->gpu].name,
                p->data, p->pipeline, p->expert, p->B, p->T);
    if (!p->json) printf("  %-32s%20s%20s\n", "", most + kept <= has ? "fits" : "does not fit",
                         most + again <= has ? "fits" : "does not fit");
}

// The speed of V3's pre-training: our count of its work in the published hours.
static void plan_v3_speed(const Plan *p)
{
    double rate = V3_TOKENS / (3600 * V3_HOURS), share = rate / (1e12 * gpus[H800].tflops);
    double sum = 3 * flops_forward(p->c, V3_CONTEXT, 0);
    double all = 3 * flops_forward(p->c, V3_CONTEXT, 1);
    const Row row[] = {
        {"main_model", {sum, sum * rate, sum * share}, {250e9, 385e12, 0.3894}},
        {"with_MTP", {all, all * rate, all * share}, {0}},
    };
    print_table(p->json, "V3_speed_of_a_GPU", "flops_of_a_token flops_a_second MFU", units,
                ROWS(row), "14.8T tokens in the published 2,664K hours; MFU: of bfloat16's peak, "
                "%.0f TFLOP/s; V3\n  computed in FP8, whose peak is twice that", gpus[H800].tflops);
}

// The stages of V3 and R1. Hours are published but for R1's two runs of reinforcement learning:
// these took 512 H800s 198 and 80 hours. All published dollars are published hours at $2.
static void plan_v3_cost(const Plan *p, double price)
{
    Row row[] = {
        {"V3_pre-training", {V3_HOURS}, {0}}, {"V3_context_extension", {119e3}, {0}},
        {"V3_post-training", {5e3}, {0}}, {"V3_in_all", {V3_HOURS + 119e3 + 5e3}, {2788e3}},
        {"R1-Zero", {512 * 198}, {101e3}}, {"R1_fine-tuning_data", {5e3}, {0}},
        {"R1_reinforcement_learning", {512 * 80}, {41e3}},
        {"R1_in_all", {512 * 198 + 5e3 + 512 * 80}, {147e3}},
    };
    for (Row *r = row; r < row + sizeof row / sizeof *row; r++) {
        r->value[1] = price * r->value[0];
        r->published[1] = 2 * r->published[0];
    }
    print_table(p->json, "V3_and_R1_at_this_price", "GPU_hours dollars", counts, ROWS(row),
                "hours as published, but of both reinforcement learnings: 512 H800s for 198 and "
                "80 h");
}

static int command_plan(const Options *o)
{
    Config c = config_named(o->plan_config);
    Plan p = plan_make(o, &c);
    char room[32];
    activation_bytes(&p, 1); // sizes that cannot be are refused before anything is printed
    if (p.json) {
        printf("{\n  \"config\": \"");
        json_print(stdout, o->plan_config);
        printf("\", \"seq\": %zu, \"batch\": %zu,\n  \"gpu\": \"%s\", \"gpus\": %zu, "
               "\"data_parallel\": %zu, \"expert_parallel\": %zu, \"pipeline\": %zu", p.T, p.B,
               gpus[p.gpu].name, p.gpus, p.data, p.expert, p.pipeline);
    } else {
        printf("%s\n", o->plan_config);
    }
    double active = plan_parameters(&p);
    double tokens = o->budget > 0 ? o->budget : p.v3 ? V3_TOKENS : 20 * active;
    double flops = 3 * flops_forward(&c, p.T, 1), rate = 1e12 * gpus[p.gpu].tflops * o->mfu;
    double hours = tokens * flops / rate / 3600;
    plan_flops(&p);
    plan_cache(&p);
    plan_memory(&p);
    if (p.v3) plan_v3_speed(&p);
    double known = tokens == V3_TOKENS ? p.v3 : 0;
    const Row row[] = {{"at_this_MFU", {hours, hours / (double)p.gpus / 24, hours * o->price},
                        {known * V3_HOURS, 0, known * 5.328e6}}};
    print_table(p.json, "pre-training", "GPU_hours days dollars", counts, ROWS(row),
                "%s tokens on %zu %s at an assumed MFU of %g, $%g a GPU hour",
                show_scaled(room, tokens, counts), p.gpus, gpus[p.gpu].name, o->mfu, o->price);
    if (p.v3) plan_v3_cost(&p, o->price);
    if (p.json) printf("\n}\n");
    return 0;
}

// ------------------------------------------------------------------------------------------------
// 15  Benchmark

#ifndef MOE_CUDA
// The compiler has to think that what p points to is read here, and all memory changed.
#define LOOK_AT(p) __asm__ volatile("" : : "r"(p) : "memory")

// Multiply-adds of this machine, at best, in FLOP/s: as many sums as gemm's tile has, no memory.
static double measure_flops(int threads)
{
    double rate = 0;
    (void)threads; // without OpenMP there is one
    #pragma omp parallel num_threads(threads) reduction(+ : rate)
    {
        vec sum[MR][NV], x, total = {0};
        for (size_t l = 0; l < LANES; l++) x[l] = (real)1e-9 * (real)l;
        for (int i = 0; i < MR * NV; i++) sum[i / NV][i % NV] = x + (real)i;
        enum { ROUNDS = 1 << 15 };
        double best = INFINITY, start = now();
        while (now() - start < 0.1) {
            double begin = now();
            for (int round = 0; round < ROUNDS; round++)
                UNROLL for (int i = 0; i < MR; i++)
                    UNROLL for (int v = 0; v < NV; v++)
                        sum[i][v] += sum[i][v] * x;
            LOOK_AT(sum);
            best = fmin(best, now() - begin);
        }
        for (int i = 0; i < MR * NV; i++) total += sum[i / NV][i % NV];
        vec_store(scratch(LANES), total);
        rate += 2.0 * MR * NV * (double)LANES * ROUNDS / best;
    }
    return rate;
}

// Reads a buffer again and again, each thread its part: bytes/s, at best.
static double measure_read(size_t bytes, int threads)
{
    size_t part = ceil_div(bytes, (size_t)threads * 4 * VBYTES) * 4 * LANES;
    real *x = (real *)host_alloc((size_t)threads * part, sizeof(real));
    double rate = 0;
    #pragma omp parallel num_threads(threads) reduction(+ : rate)
    {
        const real *from = x + (size_t)thread_number() * part;
        vec sum[4] = {{0}};
        double best = INFINITY, start = now();
        for (int pass = 0; pass < 3 || now() - start < 0.1; pass++) {
            double begin = now();
            size_t passes = 1 + (1 << 18) / part; // so that a pass is not too short for the clock
            for (size_t k = 0; k < passes; k++) {
                for (size_t i = 0; i < part; i += 4 * LANES)
                    UNROLL for (size_t v = 0; v < 4; v++)
                        sum[v] += vec_load(from + i + v * LANES);
                LOOK_AT(sum);
            }
            best = fmin(best, fmax(now() - begin, 1e-9) / (double)passes);
        }
        vec_store(scratch(LANES), sum[0] + sum[1] + sum[2] + sum[3]);
        rate += (double)(part * sizeof(real)) / best;
    }
    free(x);
    return rate;
}
#endif

// Tokens/s of `slots` sequences that grow by one token a call, in the second half of T tokens.
static double bench_decode(const Model *m, size_t slots, size_t T)
{
    size_t calls = min_size(T / 2, slots < 64 ? 64 : 8);
    Decoder d = decoder_make(m, slots, T, 1, slots, T);
    int *token = (int *)host_alloc(3 * slots, sizeof(int));
    int *slot = token + slots, *pos = slot + slots;
    double start = 0;
    for (size_t i = 0; i < slots; i++)
        token[i] = (int)(random_u64(1, 8, i) % m->config.V), slot[i] = (int)i;
    for (size_t call = 0; call <= calls; call++) { // the first warms up
        if (call == 1) device_finish(), start = now();
        for (size_t i = 0; i < slots; i++) pos[i] = (int)(T / 2 + call - (call > 0));
        decode(&d, token, slot, pos, slots);
    }
    device_finish();
    double seconds = now() - start;
    free(token);
    decoder_free(&d);
    return (double)(slots * calls) / seconds;
}

static void ignore_token(int token) { (void)token; }

// Tokens/s of generate(), with or without drafts; *taken is the share of drafts that were right.
static double bench_generate(const Model *m, size_t T, int speculate, double *taken)
{
    Decoder d = decoder_make(m, 1, T, 2, 2, T);
    Sampler likeliest = {0, 0, 1, 0, 0};
    int *text = (int *)host_alloc(T + 2, sizeof(int));
    Generation g = generate(&d, &likeliest, text, 1, T - 2, speculate, ignore_token);
    *taken = g.drafted ? (double)g.accepted / (double)g.drafted : 0;
    free(text);
    decoder_free(&d);
    return (double)(g.generated - 1) / g.seconds;
}

// What the machine can do: with one thread, and with all.
typedef struct { double flops[2], memory[2], cache[2]; } Machine;

static Machine bench_machine(int json)
{
    const size_t cache = (size_t)128 << 10, memory = (size_t)256 << 20;
    int threads = thread_count();
    Machine k;
    for (int all = 0; all < 2; all++) {
        int n = all ? threads : 1;
        k.flops[all] = measure_flops(n);
        k.cache[all] = measure_read(cache * (size_t)n, n);
        k.memory[all] = measure_read(memory, n);
    }
#define BENCH_RATES(name, rate) {name, {1e-9 * rate[0], 1e-9 * rate[1]}, {0}}
    const Row row[] = {
        BENCH_RATES("multiply-adds,_GFLOP/s", k.flops),
        BENCH_RATES("cache,_GB/s", k.cache),
        BENCH_RATES("memory,_GB/s", k.memory),
    };
    print_table(json, "machine", "1_thread all_threads", decimals, ROWS(row),
                "%d thread%s; reading %.2f MB a thread, and %.0f MB", threads,
                threads > 1 ? "s" : "", 1e-6 * (double)cache, 1e-6 * (double)memory);
    return k;
}

// A training step, by operation.
static void bench_step(const Options *o, Model *m, const Machine *k, size_t B, size_t T)
{
    const Config *c = &m->config;
    Acts a = acts_make(c, B, T, 1);
    Optimizer opt = optimizer_make(m);
    Recipe recipe = recipe_make(o, is_muon(o->bench_optimizer), o->check_lr, o->check_lr,
                                o->check_bias_speed);
    int *tokens = (int *)host_alloc(B * (T + 1), sizeof(int));
    for (size_t i = 0; i < B * (T + 1); i++) tokens[i] = (int)(random_u64(o->seed, 7, i) % c->V);
    acts_load(&a, tokens);
    free(tokens);
    Meter best[METERS];
    Row row[METERS + 1];
    double seconds = INFINITY, alone = INFINITY, rest = 1;
    double work = 3 * flops_forward(c, T, 1) * (double)(B * T);
    size_t n = 0, count = 0;
    for (size_t step = 0; step < 2 * o->bench_steps + 2; step++) { // two to warm up
        metered.on = step > 1 && step % 2; // which on a GPU makes operations wait for each other
        metered.count = 0;
        memset(metered.meter, 0, sizeof metered.meter);
        double start = now();
        model_forward_backward(m, &a, 1);
        optimizer_count_load(&opt, m, &a);
        optimizer_step(&opt, m, &recipe, grad_norm(m));
        device_finish();
        double took = now() - start;
        if (!metered.on && step > 1) alone = fmin(alone, took);
        if (!metered.on || took >= seconds) continue;
        seconds = took;
        count = metered.count;
        memcpy(best, metered.meter, sizeof best);
    }
    metered.on = 0;
    for (const Meter *t = best; t < best + count; t++, n++) {
        double flops = t->flops > 0 ? t->flops / t->seconds : NAN, share = t->seconds / seconds;
        double bytes = t->bytes > 0 ? t->bytes / t->seconds : NAN;
        const Row r = {t->name, {(double)t->calls, 1e3 * t->seconds, 100 * share, 1e-9 * flops,
                                 100 * flops / k->flops[1], 1e-9 * bytes,
                                 100 * bytes / k->memory[1]}, {0}};
        row[n] = r;
        rest -= share;
    }
    const Row between = {"between_operations", {NAN, 1e3 * rest * seconds, 100 * rest, NAN, NAN,
                                                NAN, NAN}, {0}};
    row[n++] = between;
    print_table(o->json, "step", "calls ms %_of_it GFLOP/s %_of_peak GB/s %_memory", decimals, row,
                n, "%zu x %zu tokens with %s, the fastest of %zu", B, T, o->bench_optimizer,
                o->bench_steps);
    const Row whole = {"whole_step", {(double)(B * T) / alone, 1e-9 * work / alone,
                                      100 * work / alone / k->flops[1]}, {0}};
    print_table(o->json, "training", "tokens/s GFLOP/s %_of_peak", counts, &whole, 1,
                "useful work: six operations for each weight that a token meets, and attention's "
                "causal half");
    acts_free(&a);
    optimizer_free(&opt);
}

// Bytes that a call of the decoder has to read: the weights that n tokens meet, each of which takes
// its experts by chance, and the latents of n sequences of T tokens.
static double decode_bytes(const Model *m, size_t n, size_t T)
{
    const Config *c = &m->config;
    double met = 1 - pow(1 - (double)c->K / (double)c->E, (double)n), numbers = 0; // of the experts
    for (const Tensor *t = m->layout.tensor; t < m->layout.tensor + m->layout.tensors; t++)
        if (t->layer < (int)c->L && t->kind != EMBEDDING)
            numbers += (double)tensor_size(t) * (t->count > 1 ? met : 1);
    return (numbers + (double)(n * T * c->L * (c->Rkv + c->Dr))) * sizeof(real);
}

// Decoding with many sequences at once, and with drafts.
static void bench_decoding(int json, const Model *m, const Machine *k, size_t T)
{
    static const char *const names[] = {"1", "8", "64", "512"};
    size_t n = 0, grown = min_size(T, 256), mean = grown * 3 / 4; // tokens: in the end, on average
    double work = flops_forward(&m->config, 2 * mean, 0), taken = 0;
    Row row[6];
    for (size_t slots = 1; n < 4; slots *= 8, n++) {
        Decoder plan = decoder_plan(m, slots, grown, 1, slots, grown);
        double bytes = decode_bytes(m, slots, mean), rate = 0;
        int fits = (double)plan.arena.used + bytes < free_memory();
        decoder_free(&plan);
        if (!fits) break;
        for (double start = now(); rate == 0 || now() - start < 0.5;) // the fastest of some
            rate = fmax(rate, bench_decode(m, slots, grown));
        double read = rate / (double)slots * bytes;
        double limit = measure_read((size_t)bytes, thread_count());
        const Row r = {names[n], {rate, 1e-9 * rate * work, 100 * rate * work / k->flops[1],
                                  1e-6 * bytes, 1e-9 * read, 100 * read / limit}, {0}};
        row[n] = r;
    }
    for (int speculate = 0; speculate < 2 && m->config.D > 0; speculate++) {
        double rate = bench_generate(m, grown, speculate, &taken);
        const Row r = {speculate ? "speculate" : "generate", {rate, NAN, NAN, NAN, NAN, NAN}, {0}};
        row[n++] = r;
    }
    print_table(json, "decode", "tokens/s GFLOP/s %_of_peak MB GB/s %_limit", decimals, row, n,
                "so many sequences of %zu tokens; MB: weights and latents that a token for each "
                "takes;\n  limit: of GB/s when all threads read as much%s", grown, m->config.D ?
                "; generate: one text, with its drafts: speculate" : "");
    if (m->config.D && !json) printf("  %.0f%% of the drafts were taken\n", 100 * taken);
}

static int command_bench(const Options *o)
{
    Config c = config_from_options(o);
    size_t T = sequence_length(o, &c), B = o->batch;
    is_muon(o->bench_optimizer);
    NEED(B > 0 && T >= 8, "--batch must be at least 1 and --seq 8");
    NEED(o->bench_steps > 0, "--steps must be at least 1");
    memory_plan(&c, 1, B, T, 0);
    Model m = model_from_options(o, &c, 1);
    if (o->json) printf("{\n  \"threads\": %d", thread_count());
    Machine k = bench_machine(o->json);
    bench_step(o, &m, &k, B, T);
    bench_decoding(o->json, &m, &k, T);
    if (o->json) printf("\n}\n");
    model_free(&m);
    return 0;
}

// ------------------------------------------------------------------------------------------------
// 16  Commands

// Answers one question and says what the task's verifier thinks of it.
static int sample_answer(const Options *given)
{
    Options own = *given, *o = &own;
    static char answer[LINE];
    o->task = o->sample_task, o->task_cmd = o->verify_cmd = "";
    Source source = source_open(o);
    Question q;
    Reward reward;
    Sampler sampler = {o->temperature, (int)min_size(o->top_k, 256), o->top_p, o->seed, 0};
    NEED(parse_question(&q, source.task, o->prompt),
         "--prompt '%s' is no question of the task %s, such as %s", o->prompt, o->task,
         task_examples[source.task]);
    Model m = model_load(o->model, 0);
    Exam e = exam_make(&m, &source, o, 1);
    Line *line = &e.question[0];
    put(line, "%s", o->prompt);
    const char *wrong = rollout_ask(&e.roll, 0, line, m.config.V);
    NEED(!wrong, "--prompt: %s", wrong);
    rollout_draw(&e.roll, &e.decoder, &sampler, END);
    rollout_answer(answer, &e.roll, 0);
    for (size_t i = e.roll.prompt[0]; i < e.roll.length[0]; i++) print_token(e.roll.text[i]);
    if (e.roll.text[e.roll.length[0] - 1] != END) putchar('\n'); // it did not end
    reward = judge(&q, answer);
    printf("%s\n", reward.accuracy > 0 ? "right" : reward.format > 0 ? "wrong" :
           "wrong: not of the form <think>...</think><answer>...</answer>");
    exam_free(&e);
    model_free(&m);
    return 0;
}

static int command_sample(const Options *o)
{
    if (*o->sample_task) return sample_answer(o);
    Config config = directory_config(o->model);
    const Config *c = &config;
    NEED(*o->prompt, "--prompt is empty; it needs at least one character");
    NEED(!o->speculate || c->D, "%s: has no multi-token prediction layer, which --speculate needs; "
         "train --config laptop-mtp has one", o->model);
    for (const char *p = o->prompt; *p; p++)
        NEED((unsigned char)*p < c->V, "--prompt: byte %d is outside the vocabulary of %zu",
             (unsigned char)*p, c->V);
    const char *memory = memory_plan(c, 0, 0, 0, sample_bytes(c, strlen(o->prompt), o->tokens));
    Model m = model_load(o->model, 0);
    fprintf(stderr, "memory: %s\n", memory);
    Generation g = sample(&m, o, o->prompt, o->speculate);
    fprintf(stderr, "%zu tokens, %.0f tokens/s", g.generated,
            g.generated > 1 ? (double)(g.generated - 1) / g.seconds : 0);
    if (o->speculate)
        fprintf(stderr, ", %.1f%% of %zu drafts accepted",
                g.drafted ? 100 * (double)g.accepted / (double)g.drafted : 0, g.drafted);
    fputc('\n', stderr);
    model_free(&m);
    return 0;
}

// Accuracy on a task's test questions: of the likeliest answer, of one drawn, and of what most of
// several drawn answers say.
static int eval_task(const Options *given)
{
    Options own = *given, *o = &own;
    static char one[LINE], other[LINE];
    o->task = o->test_task;
    NEED(!*o->data, "--data %s: not read where a task is answered", o->data);
    Source source = source_open(o);
    size_t votes = o->votes, length = 0;
    NEED(o->test && votes && votes <= 512, "--test must be at least 1, --votes 1 to 512");
    Model m = model_load(o->model, 0);
    Exam e = exam_make(&m, &source, o, 512);
    const char *error = NULL;
    double greedy = test_accuracy(&e, o->test, &error), drawn = 0, majority = 0, format = 0;
    for (size_t at = 0, k; at < o->test && !error; at += k) {
        k = min_size(512 / votes, o->test - at);
        Sampler sampler = {o->eval_temperature, 0, o->eval_top_p, o->seed, at * votes};
        error = exam_sit(&e, &sampler, 1, at, k, votes);
        length += e.roll.drawn;
        for (size_t q = 0; q < k; q++) {
            size_t best = 0, winner = q * votes;
            for (size_t i = q * votes; i < (q + 1) * votes; i++) {
                size_t same = 0;
                drawn += e.reward[i].accuracy;
                format += e.reward[i].format;
                rollout_answer(one, &e.roll, i);
                const char *say = strstr(one, "<answer>");
                for (size_t j = q * votes; say && j < (q + 1) * votes; j++) {
                    rollout_answer(other, &e.roll, j);
                    const char *says = strstr(other, "<answer>");
                    same += says && !strcmp(say, says);
                }
                if (same > best) best = same, winner = i;
            }
            majority += e.reward[winner].accuracy;
        }
    }
    if (error) die(FAILED, "%s", error);
    double n = (double)o->test, all = n * (double)votes;
    printf("greedy %.1f%% pass@1 %.1f%% majority of %zu %.1f%% format %.1f%% length %.1f "
           "questions %zu\n", 100 * greedy, 100 * drawn / all, votes, 100 * majority / n,
           100 * format / all, (double)length / all, o->test);
    exam_free(&e);
    model_free(&m);
    return 0;
}

static int command_eval(const Options *o)
{
    if (*o->test_task || *o->task_cmd || *o->verify_cmd) return eval_task(o);
    Config c = directory_config(o->model);
    Data text = data_load(o->data, &c);
    NEED(text.n >= 2, "%s: has %zu bytes; 2 are needed to predict one", o->data, text.n);
    size_t T = min_size(sequence_length(o, &c), text.n - 1);
    const char *memory = memory_plan(&c, 0, min_size(EVAL_ROWS(T), (text.n - 1) / T), T, 0);
    Model m = model_load(o->model, 0);
    fprintf(stderr, "memory: %s\n", memory);
    printf("loss %.7f tokens %zu\n", text_loss(&m, text.bytes, text.n, T, 0), text.n - 1);
    free(text.bytes);
    model_free(&m);
    return 0;
}

// What of a layer's routing a dump holds: its choice of experts, and f of its balance loss.
static void routing_names(char topk[NAME_MAX_LENGTH], char f[NAME_MAX_LENGTH], size_t layer)
{
    snprintf(topk, NAME_MAX_LENGTH, "model.layers.%zu.topk", layer);
    snprintf(f, NAME_MAX_LENGTH, "model.layers.%zu.f", layer);
}

static size_t layer_tokens(const Model *m, const Acts *a, size_t layer)
{
    return a->B * a->batch[depth_of(&m->config, layer)].T;
}

// Writes logits, losses, routing and every gradient to path, under the names of the tensors.
static void check_dump(const Model *m, const Acts *a, const Losses *s, const char *path)
{
    const Config *c = &m->config;
    const struct { const char *name; double value; } losses[4] = {
        {"loss", s->total}, {"loss.main", s->main}, {"loss.mtp", s->mtp},
        {"loss.balance", s->balance},
    };
    size_t n = a->B * a->T * c->V, choices = a->B * a->T * c->K, L = c->L + a->depths, at = 4 + n;
    Entry *entry = (Entry *)host_alloc(count_entries(&m->layout) + 5 + 2 * L, sizeof(Entry));
    Entry *e = entry, all = {"logits", {a->B, a->T, c->V}, 3, NULL, NULL};
    accum *host = (accum *)host_alloc(at + L * choices, sizeof(accum)); // losses, logits, choices
    accum *on_device = (accum *)device_alloc((at + L * choices) * sizeof(accum));
    int *topk = (int *)host_alloc(choices, sizeof(int));
    reals_to_host(host + 4, a->layer[c->L - 1].logits, n);
    *e = all;
    e++->data = on_device + 4;
    for (size_t i = 0; i < 4; i++, e++) {
        host[i] = (accum)losses[i].value;
        strcpy(e->name, losses[i].name);
        e->shape[0] = e->dims = 1, e->data = on_device + i;
    }
    for (size_t l = 0; l < L; l++) {
        size_t rows = layer_tokens(m, a, l);
        if (!is_moe(c, l)) continue;
        to_host(topk, a->layer[l].topk, rows * c->K * sizeof(int));
        for (size_t i = 0; i < rows * c->K; i++) host[at + i] = (accum)topk[i];
        routing_names(e[0].name, e[1].name, l);
        e[0].dims = e[1].dims = 2;
        e[0].shape[0] = rows, e[0].shape[1] = c->K, e[0].data = on_device + at;
        e[1].shape[0] = a->B, e[1].shape[1] = c->E, e[1].data = a->layer[l].f;
        at += rows * c->K, e += 2;
    }
    to_device(on_device, host, at * sizeof(accum));
    Entry *end = entries_add(e, &m->layout, "grad.", m->grads, NULL);
    for (const Entry *grad = e; grad < end; grad++)
        if (!strstr(grad->name, "e_score_correction_bias")) *e++ = *grad;
    Output o = safetensors_open(path);
    safetensors_close(&o, entry, (size_t)(e - entry));
    free(entry);
    free(host);
    free(topk);
    device_free(on_device);
}

// Takes the routing that stands in a dump, for good.
static void check_routing(const Model *m, Acts *a, const char *file)
{
    const Config *c = &m->config;
    Shard *shard = (Shard *)host_alloc(1, sizeof(Shard));
    NEED(is_moe(c, c->L - 1), "--routing %s: this model has no experts to choose from", file);
    *shard = shard_open(path_append(file, ""));
    Checkpoint dump = checkpoint_list(file, shard, 1);
    char topk_name[NAME_MAX_LENGTH], f_name[NAME_MAX_LENGTH];
    size_t most = a->B * (a->T * c->K + c->E);
    accum *host = (accum *)host_alloc(2 * most, sizeof(accum));
    int *topk = (int *)(host + most);
    for (size_t l = 0; l < c->L + a->depths; l++) {
        size_t rows = layer_tokens(m, a, l), choice[2] = {rows, c->K}, load[2] = {a->B, c->E};
        if (!is_moe(c, l)) continue;
        routing_names(topk_name, f_name, l);
        NEED(checkpoint_find(&dump, topk_name), "%s: has no %s; --routing takes what check --dump "
             "wrote for such a model", file, topk_name);
        stored_read(checkpoint_get(&dump, topk_name, choice, 2), NULL, host);
        for (size_t i = 0; i < rows * c->K; i++) {
            int again = 0;
            for (size_t k = i - i % c->K; k < i; k++) again |= host[k] == host[i];
            NEED(is_whole((double)host[i], (double)(c->E - 1)) && !again, "%s: %s: element %zu is "
                 "%g; it must be an expert, 0 to %zu, each once for a token", file, topk_name, i,
                 (double)host[i], c->E - 1);
            topk[i] = (int)host[i];
        }
        to_device(a->layer[l].topk, topk, rows * c->K * sizeof(int));
        stored_read(checkpoint_get(&dump, f_name, load, 2), NULL, host);
        for (size_t i = 0; i < a->B * c->E; i++)
            NEED(host[i] >= 0 && (double)host[i] <= (double)c->E, "%s: %s: element %zu is %g; it "
                 "must be a load, 0 to %zu", file, f_name, i, (double)host[i], c->E);
        to_device(a->layer[l].f, host, a->B * c->E * sizeof(accum));
    }
    hold_routing = 1;
    checkpoint_close(&dump);
    free(host);
}

static int command_check(const Options *o)
{
    Config c = config_from_options(o);
    size_t T = sequence_length(o, &c), B = o->batch;
    Data text = data_load(o->data, &c);
    NEED(B > 0, "--batch must be at least 1");
    NEED(!is_same_file(o->dump, o->data) &&
         !is_same_file(o->dump, path_join(o->model, "model.safetensors").text),
         "--dump %s: what is read stands there; choose another file", o->dump);
    NEED(text.n >= size_mul(B, T + 1), "%s: has %zu bytes; --batch %zu --seq %zu takes %zu",
         o->data, text.n, B, T, B * (T + 1));
    int *tokens = (int *)host_alloc(B * (T + 1), sizeof(int));
    tokens_copy(tokens, text.bytes, B * (T + 1));
    memory_plan(&c, 1, B, T, 0);
    Model m = model_from_options(o, &c, 1);
    Acts a = acts_make(&m.config, B, T, 1);
    Optimizer opt = optimizer_make(&m);
    Recipe recipe = recipe_make(o, 0, o->check_lr, o->check_lr, o->check_bias_speed);
    acts_load(&a, tokens);
    if (*o->routing) check_routing(&m, &a, o->routing);
    for (size_t step = 0; step <= o->check_steps; step++) {
        model_forward_backward(&m, &a, 1);
        optimizer_count_load(&opt, &m, &a);
        Losses s = model_losses(&m, &a);
        double norm = grad_norm(&m);
        if (!isfinite(s.total) || !isfinite(norm))
            die(FAILED, "the loss is %g and the gradient's norm %g", s.total, norm);
        if (step == 0)
            printf("loss %.9g main %.9g mtp %.9g balance %.9g grad_norm %.9g\n", s.total, s.main,
                   s.mtp, s.balance, norm);
        if (step == 0 && *o->dump) check_dump(&m, &a, &s, o->dump);
        if (step == o->check_steps) break;
        printf("step %zu loss %.9g grad_norm %.9g\n", step + 1, s.total, norm);
        optimizer_step(&opt, &m, &recipe, norm);
    }
    free(tokens);
    free(text.bytes);
    optimizer_free(&opt);
    acts_free(&a);
    model_free(&m);
    return 0;
}

typedef struct {
    const char *name;
    int bit;
    int (*run)(const Options *);
    const char *what;
} Command;

static const Command commands[] = {
    {"train", TRAIN, command_train, "train a model on a text"},
    {"sample", SAMPLE, command_sample, "continue a prompt, or answer a question"},
    {"task", TASK, command_task, "write questions and answers to train a base model on"},
    {"rl", RL, command_rl, "let a model teach itself by GRPO"},
    {"eval", EVAL, command_eval, "mean loss of a model over a text, or accuracy at a task"},
    {"check", CHECK, command_check, "losses, gradients and steps on one batch, for comparison"},
    {"bench", BENCH, command_bench, "speed of this machine, of a training step and of decoding"},
    {"plan", PLAN, command_plan, "what a model and its training take: work, memory, time, money"},
};
enum { COMMANDS = sizeof commands / sizeof *commands };

static void print_help(const Command *command)
{
    if (!command) {
        printf("moe: DeepSeek in one C file\n\nusage: moe COMMAND [--option value ...]\n\n");
        for (size_t i = 0; i < COMMANDS; i++)
            printf("  %-8s %s\n", commands[i].name, commands[i].what);
        printf("\nmoe COMMAND --help lists its options.\n");
        return;
    }
    printf("usage: moe %s [--option value ...]: %s\n\n", command->name, command->what);
#define HELP(commands, type, field, name, standard, takes, what) \
    if ((commands) & command->bit) { \
        printf("  --%s %-*s %s", name, 19 - (int)strlen(name), takes, what); \
        printf(*standard && *standard != '\n' ? " (default %s)\n" : "%.0s\n", standard); \
    }
    OPTIONS(HELP)
}

// The status to end with, unless something could not be printed.
static int exit_status(int status)
{
    if (fflush(stdout) || ferror(stdout))
        die(FAILED, "standard output: cannot write: %s", strerror(errno));
    ranks_end();
    return status;
}

static Options parse_options(const Command *command, int argc, char **argv)
{
    Options o;
#define DEFAULT(commands, type, field, name, standard, ...) \
    o.field = parse_##type(name, o.field##_text = standard);
    OPTIONS(DEFAULT)
    for (int i = 2; i + 1 < argc && (command->bit & (TRAIN | RL)); i++)
        if (!strcmp(argv[i], "--resume")) options_from_state(&o, argv[i + 1], command->bit);
    for (int i = 2; i < argc; i++) {
        const char *is = argv[i], *value = i + 1 < argc ? argv[i + 1] : NULL;
        int words = 0;
        if (!strcmp(is, "--help")) {
            print_help(command);
            exit(exit_status(0));
        }
#define PARSE(commands, type, field, name, standard, takes, ...) \
        if (((commands) & command->bit) && !strcmp(is, "--" name)) { \
            words = *takes ? 2 : 1; \
            NEED(words == 1 || value, "--" name " needs a value: " takes); \
            o.field = parse_##type(name, o.field##_text = words == 1 ? "yes" : value); \
        }
        OPTIONS(PARSE)
        NEED(words, "unknown option %s; moe %s --help lists them", is, command->name);
        i += words - 1;
    }
    NEED(!*o.resume || !strcmp(o.model, o.resume), "--model %s: --resume goes on with the model in "
         "%s", o.model, o.resume);
    return o;
}

#ifndef MOE_NO_MAIN
int main(int argc, char **argv)
{
    int fd = 0;
    while (fd >= 0 && fd < 3) fd = open("/dev/null", O_RDWR); // what is closed is no file's number
    if (fd >= 3) close(fd);
    signal(SIGXFSZ, SIG_IGN); // a file-size limit is then an error that a write returns
    ranks_start(&argc, &argv);
    if (argc < 2 || !strcmp(argv[1], "--help") || !strcmp(argv[1], "help")) {
        print_help(NULL);
        return exit_status(argc < 2 ? BAD_INPUT : 0);
    }
    for (size_t i = 0; i < COMMANDS; i++)
        if (!strcmp(argv[1], commands[i].name)) {
            Options o = parse_options(&commands[i], argc, argv);
            NEED(ranks == 1 || commands[i].bit & (TRAIN | RL), "moe %s takes one process, not %d; "
                 "start it without mpirun", commands[i].name, ranks);
            use_threads(o.threads);
            return exit_status(commands[i].run(&o));
        }
    die(BAD_INPUT, "unknown command %s; moe --help lists them", argv[1]);
}
#endif

/*
MIT License

Copyright (c) 2026 the moe.c developers

Permission is hereby granted, free of charge, to any person obtaining a copy of this software and
associated documentation files (the "Software"), to deal in the Software without restriction,
including without limitation the rights to use, copy, modify, merge, publish, distribute,
sublicense, and/or sell copies of the Software, and to permit persons to whom the Software is
furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial
portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT
NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND
NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES
OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT OF OR IN
CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
*/
