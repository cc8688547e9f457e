/*
moe.c: DeepSeek in one C file.

The transformer of DeepSeek-V3, forward and backward: multi-head latent attention, a mixture of
experts balanced without an auxiliary loss, multi-token prediction; its training and generation.
Papers, cited below as [V2] arXiv:2405.04434, [V3] arXiv:2412.19437, [YaRN] arXiv:2309.00071,
[Muon] Jordan 2024 and Moonlight arXiv:2502.16982.

    section                    what                                               equations
     1  Numbers and helpers    types, errors, memory, random numbers
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
     8  Files                  JSON, safetensors, model directories
     9  Options                the one table of the command line
    10  Training               data, schedule, progress
    11  Planning               parameters, work, memory, time, cost               [V3] 4.2
    12  Commands

Sections 5 to 12 never mention a device: they call operations and move memory with device_*().
A pointer's comment gives its shape, rows first. An operation's outputs come before its inputs.
*/
#define _POSIX_C_SOURCE 200809L
#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <math.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
#ifdef _OPENMP
#include <omp.h>
#elif defined __GNUC__
#pragma GCC diagnostic ignored "-Wunknown-pragmas" // without OpenMP its pragmas mean nothing
#endif

// ------------------------------------------------------------------------------------------------
// 1  Numbers and helpers

// real:  weights and activations. accum: gradients of weights, softmax statistics, routing, the
// optimizer. They differ only in moe.cu, where real may be bfloat16. The gradient check runs in
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

#ifdef __cplusplus
#define THREAD_LOCAL thread_local
#else
#define THREAD_LOCAL _Thread_local
#endif

#ifndef MOE_EXIT // the fuzz target goes on instead
#define MOE_EXIT exit
#endif

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
    fprintf(stderr, "moe: %s\n", text);
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
    size_t bytes = size_mul(count, size);
    size_t rounded = bytes ? (bytes + 63) / 64 * 64 : 64;
    void *p = aligned_alloc(64, rounded);
    if (!p)
        die(FAILED, "out of memory asking for %.1f MB; use a smaller model, --batch or --seq",
            (double)bytes * 1e-6);
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

static void use_threads(size_t n)
{
    if (n > 1024) die(BAD_INPUT, "--threads is %zu; at most 1024 make sense", n);
#ifdef _OPENMP
    if (n > 0) omp_set_num_threads((int)n);
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
    X(Tmax,      max_position_embeddings,  1 << 24,  128,   8192, 163840)

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

enum { LAPTOP, MOONLIGHT, DEEPSEEK_V3, LAPTOP_MTP, PRESETS };
static const char *const preset_names[PRESETS] = {"laptop", "moonlight-16b", "deepseek-v3",
                                                  "laptop-mtp"};

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

// ------------------------------------------------------------------------------------------------
// 3  Parameters

// How a tensor begins and which rule trains it.
enum Kind { NORM, MATRIX, EMBEDDING, HEAD, ROUTER, ROUTER_BIAS };

// Every weight, once: C type, field, layers that have it, how many, rows, columns, kind, and its
// name in the released checkpoints. A matrix [rows, columns] maps columns numbers to rows numbers.
#define MODEL_PARAMS(X) \
    X(real, embed,   1, 1, c->V, c->C, EMBEDDING, "model.embed_tokens.weight") \
    X(real, norm,    1, 1, 1,    c->C, NORM,      "model.norm.weight") \
    X(real, lm_head, 1, 1, c->V, c->C, HEAD,      "lm_head.weight")

#define LAYER_PARAMS(X) \
    /* multi-token prediction: [V3] 21 */ \
    X(real, enorm,    mtp, 1, 1, c->C, NORM, "enorm.weight") \
    X(real, hnorm,    mtp, 1, 1, c->C, NORM, "hnorm.weight") \
    X(real, w_eh,     mtp, 1, c->C, 2 * c->C, MATRIX, "eh_proj.weight") \
    X(real, head_norm, mtp, 1, 1, c->C, NORM, "shared_head.norm.weight") \
    /* multi-head latent attention: [V3] 1-11 */ \
    X(real, attn_norm, 1, 1, 1, c->C, NORM, "input_layernorm.weight") \
    X(real, wq,       c->Rq == 0, 1, c->NH * (c->Dn + c->Dr), c->C, MATRIX, \
      "self_attn.q_proj.weight") \
    X(real, wq_a,     c->Rq, 1, c->Rq, c->C, MATRIX, "self_attn.q_a_proj.weight") \
    X(real, q_norm,   c->Rq, 1, 1, c->Rq, NORM, "self_attn.q_a_layernorm.weight") \
    X(real, wq_b,     c->Rq, 1, c->NH * (c->Dn + c->Dr), c->Rq, MATRIX, \
      "self_attn.q_b_proj.weight") \
    X(real, wkv_a,    1, 1, c->Rkv + c->Dr, c->C, MATRIX, \
      "self_attn.kv_a_proj_with_mqa.weight") \
    X(real, kv_norm,  1, 1, 1, c->Rkv, NORM, "self_attn.kv_a_layernorm.weight") \
    X(real, wkv_b,    1, 1, c->NH * (c->Dn + c->Dv), c->Rkv, MATRIX, \
      "self_attn.kv_b_proj.weight") \
    X(real, wo,       1, 1, c->C, c->NH * c->Dv, MATRIX, "self_attn.o_proj.weight") \
    X(real, ffn_norm, 1, 1, 1, c->C, NORM, "post_attention_layernorm.weight") \
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
    size_t elements;          // of all tensors, padding between them included
} Layout;

static size_t tensor_size(const Tensor *t) { return t->count * t->rows * t->cols; }

// Lists the tensors of a model in the table's order.
static Layout layout_make(const Config *c)
{
    Layout p = {NULL, 0, 0};
#define COUNT(...) +1
    size_t most = (size_t)(MODEL_PARAMS(COUNT)) + (size_t)(LAYER_PARAMS(COUNT)) * layers(c);
    p.tensor = (Tensor *)host_alloc(most, sizeof(Tensor));
    int layer = -1;
#define LIST(type, field, present, count_, rows_, cols_, kind_, name_) \
    if (present) { \
        Tensor *t = &p.tensor[p.tensors++]; \
        t->name = name_, t->layer = layer, t->kind = kind_; \
        t->count = (size_t)(count_), t->rows = (size_t)(rows_), t->cols = (size_t)(cols_); \
        t->offset = p.elements; \
        size_t wide = sizeof(type) / sizeof(real); /* 2 for an accum beside bfloat16 */ \
        p.elements += (size_mul(wide * t->count, size_mul(t->rows, t->cols)) + 15) / 16 * 16; \
        size_mul(p.elements, sizeof(double) * 8); \
    }
    MODEL_PARAMS(LIST)
    for (size_t l = 0; l < layers(c); l++) {
        int moe = is_moe(c, l), mtp = is_mtp(c, l);
        layer = (int)l;
        LAYER_PARAMS(LIST)
    }
    return p;
}

static size_t parameters(const Layout *layout)
{
    size_t n = 0;
    for (size_t i = 0; i < layout->tensors; i++) n += tensor_size(&layout->tensor[i]);
    return n;
}

enum { NAME_MAX_LENGTH = 128 };

// Vectors have one dimension in files, matrices two.
static size_t tensor_dims(const Tensor *t)
{
    return t->kind == NORM || t->kind == ROUTER_BIAS ? 1 : 2;
}

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

// A gradient has the shape of what it is the gradient of. Gradients of weights are added to, those
// of activations set unless a mode says ADD.

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

// Set by gradient checks, which hold the choice of experts still: router_forward and
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

// Memory that operations work on, its contents undefined. Here it is the host's; on a GPU not.
static void *device_alloc(size_t bytes) { return host_alloc(bytes, 1); }
static void device_free(void *p) { free(p); }
static void device_zero(void *p, size_t bytes) { memset(p, 0, bytes); }
static void device_copy(void *to, const void *from, size_t bytes) { memcpy(to, from, bytes); }
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

// Bytes of memory that are free for use.
static double free_memory(void)
{
    double kilobytes = 0;
    char line[128];
    FILE *f = fopen("/proc/meminfo", "r"); // Linux; elsewhere all there is
    while (f && fgets(line, sizeof line, f))
        if (!strncmp(line, "MemAvailable:", 13)) kilobytes = strtod(line + 13, NULL);
    if (f && fclose(f)) kilobytes = 0;
    if (kilobytes > 0) return 1024 * kilobytes;
    return (double)sysconf(_SC_PHYS_PAGES) * (double)sysconf(_SC_PAGESIZE);
}

enum { SMALL = 1 << 14 }; // elements that are not worth waking the other threads for

// Scratch memory of the calling thread, kept from call to call.
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
//    m |           |   |   |   |   |     in L1 while the panels of b stream by from L2.
//      +-----------+   +---+---+---+
//                        NR
//
// b is packed: its panels of NR columns are copied to where the kernel reads on and on, and
// zeros fill up the last. The kernel takes single numbers of a, so it can have them from MR rows
// as well: a is packed only where less than MR rows are left, and if its rows are not contiguous
// (unless n is so small that a copy would not pay).
//
// Each c(i,j) is a sum over blocks of KC, in order, of chains of fused multiply-adds in order of
// p. So its bits do not depend on m, n, the place of (i,j) or the width of the vectors.
#ifndef VBYTES // bytes in a vector register; NV of them make a row of the tile
#if defined(__AVX512F__)
enum { VBYTES = 64, MR = 14, NV = 2 }; // 32 registers: 28 for the tile, 2 for b, 1 for a
#elif defined(__AVX__)
enum { VBYTES = 32, MR = 6, NV = 2 }; // 16 registers
#elif defined(__ARM_NEON)
enum { VBYTES = 16, MR = 8, NV = 3 }; // 32 registers
#else
enum { VBYTES = 16, MR = 6, NV = 2 };
#endif
#endif
#define LANES (VBYTES / sizeof(real))
#define NR (NV * LANES)
#define KC 256
#define NC (24 * NR)
#define INLINE static inline __attribute__((always_inline))
#ifdef __clang__
#define UNROLL
#define UNROLL_4
#else // gcc keeps arrays of vectors in registers only if told to unroll the loops over them
#define UNROLL _Pragma("GCC unroll 16")
#define UNROLL_4 _Pragma("GCC unroll 4")
#endif

typedef real vec __attribute__((vector_size(VBYTES)));
typedef real vec_unaligned __attribute__((vector_size(VBYTES), aligned(sizeof(real)), may_alias));

INLINE vec vec_load(const real *x) { return *(const vec_unaligned *)x; }
INLINE void vec_store(real *x, vec v) { *(vec_unaligned *)x = v; }

// Copies x[n,k] to a panel, to[p * width + i], with zeros for i >= n.
INLINE void gemm_pack(real *to, const real *x, size_t row, size_t col, size_t n, size_t width,
                      size_t k)
{
    if (n < width) {
        memset(to, 0, width * k * sizeof *to);
        for (size_t i = 0; i < n; i++)
            for (size_t p = 0; p < k; p++)
                to[p * width + i] = x[i * row + p * col];
    } else if (row == 1) {
        for (size_t p = 0; p < k; p++)
            memcpy(to + p * width, x + p * col, width * sizeof *to);
    } else {
        for (size_t p = 0; p < k; p++)
            for (size_t i = 0; i < width; i++)
                to[p * width + i] = x[i * row + p * col];
    }
}

// One tile: c[m,n] (+)= a[m,k] b[k,n], m <= MR and n <= nv * LANES, with b a packed panel. Rows of
// a up to MR must be there.
INLINE void gemm_tile(real *c, size_t c_row, size_t c_col, const real *a, size_t a_row,
                      size_t a_col, const real *b, size_t m, size_t n, size_t k, int add, int nv)
{
    vec zero = {0}, acc[MR][NV];
    UNROLL for (int i = 0; i < MR; i++)
        UNROLL for (int v = 0; v < nv; v++)
            acc[i][v] = zero;
    if (c_col == 1) // c will be needed only at the end, and may be far
        for (size_t i = 0; i < m; i++)
            __builtin_prefetch(c + i * c_row + n - 1, 1);

    UNROLL_4 for (size_t p = 0; p < k; p++, a += a_col, b += NR) {
        vec bp[NV];
        UNROLL for (int v = 0; v < nv; v++)
            bp[v] = vec_load(b + (size_t)v * LANES);
        UNROLL for (size_t i = 0; i < MR; i++)
            UNROLL for (int v = 0; v < nv; v++)
                acc[i][v] += a[i * a_row] * bp[v];
    }

    if (m == MR && n == (size_t)nv * LANES && c_col == 1) {
        UNROLL for (size_t i = 0; i < MR; i++)
            UNROLL for (int v = 0; v < nv; v++) {
                real *to = c + i * c_row + (size_t)v * LANES;
                vec_store(to, add ? vec_load(to) + acc[i][v] : acc[i][v]);
            }
        return;
    }
    real tile[MR][NR];
    UNROLL for (int i = 0; i < MR; i++)
        UNROLL for (int v = 0; v < nv; v++)
            vec_store(tile[i] + (size_t)v * LANES, acc[i][v]);
    for (size_t j = 0; j < n; j++)
        for (size_t i = 0; i < m; i++) {
            real *to = c + i * c_row + j * c_col;
            *to = add ? *to + tile[i][j] : tile[i][j];
        }
}

static void gemm_blocked(real *c, size_t c_row, size_t c_col,
                         const real *a, size_t a_row, size_t a_col,
                         const real *b, size_t b_row, size_t b_col,
                         size_t m, size_t n, size_t k, int add)
{
    static THREAD_LOCAL real a_pack[MR * KC], b_pack[KC * NC];
    for (size_t j0 = 0; j0 < n; j0 += NC)
        for (size_t p0 = 0; p0 == 0 || p0 < k; p0 += KC) { // once even if k is 0
            size_t nc = min_size(NC, n - j0), kc = min_size(KC, k - p0);
            for (size_t j = 0; j < nc; j += NR)
                gemm_pack(b_pack + j * kc, b + p0 * b_row + (j0 + j) * b_col, b_col, b_row,
                          min_size(NR, nc - j), NR, kc);
            for (size_t i = 0; i < m; i += MR) {
                const real *ai = a + i * a_row + p0 * a_col;
                size_t ai_row = a_row, ai_col = a_col, mr = min_size(MR, m - i);
                int in_place = a_col == 1 || (a_row == 1 && n <= 4 * NR);
                if (!in_place || mr < MR) {
                    gemm_pack(a_pack, ai, a_row, a_col, mr, MR, kc);
                    ai = a_pack, ai_row = 1, ai_col = MR;
                }
                for (size_t j = 0; j < nc; j += NR) {
                    real *cij = c + i * c_row + (j0 + j) * c_col;
                    const real *bj = b_pack + j * kc;
                    size_t nr = min_size(NR, nc - j);
                    int sum = add || p0 > 0;
                    if (nr > LANES)
                        gemm_tile(cij, c_row, c_col, ai, ai_row, ai_col, bj, mr, nr, kc, sum, NV);
                    else
                        gemm_tile(cij, c_row, c_col, ai, ai_row, ai_col, bj, mr, nr, kc, sum, 1);
                }
            }
        }
}

// Few rows times a transposed matrix, as in decoding: to pack b would take longer than the
// product. So here the vectors run along p: lane l of a sum takes every p with p % LANES == l, the
// lanes are added in pairs, then what is left of k. The order is the same for any number of rows,
// but it is not that of gemm_blocked.
INLINE void dots(real *c, size_t c_row, size_t c_col, const real *a, size_t a_row,
                 const real *b, size_t b_col, size_t n, size_t k, int add, size_t rows)
{
    vec zero = {0}, acc[2][4];
    const real *bj[4]; // past the edge the last column again, not to be stored
    UNROLL for (size_t j = 0; j < 4; j++) {
        bj[j] = b + min_size(j, n - 1) * b_col;
        acc[0][j] = acc[1][j] = zero;
    }
    size_t p = 0;
    for (; p + LANES <= k; p += LANES)
        UNROLL for (size_t j = 0; j < 4; j++)
            UNROLL for (size_t i = 0; i < rows; i++)
                acc[i][j] += vec_load(a + i * a_row + p) * vec_load(bj[j] + p);
    UNROLL for (size_t j = 0; j < 4; j++)
        UNROLL for (size_t i = 0; i < rows; i++) {
            real lane[LANES], rest = 0;
            vec_store(lane, acc[i][j]);
            UNROLL for (size_t half = LANES / 2; half > 0; half /= 2)
                UNROLL for (size_t l = 0; l < half; l++)
                    lane[l] += lane[l + half];
            for (size_t q = p; q < k; q++)
                rest += a[i * a_row + q] * bj[j][q];
            real *cij = c + i * c_row + j * c_col;
            if (j < n)
                *cij = add ? *cij + (lane[0] + rest) : lane[0] + rest;
        }
}

static void gemm_few_rows(real *c, size_t c_row, size_t c_col, const real *a, size_t a_row,
                          const real *b, size_t b_col, size_t m, size_t n, size_t k, int add)
{
    for (size_t j = 0; j < n; j += 4) { // four columns of b stay in L1 for all rows of a
        real *cj = c + j * c_col;
        const real *bj = b + j * b_col;
        size_t i = 0;
        for (; i + 2 <= m; i += 2)
            dots(cj + i * c_row, c_row, c_col, a + i * a_row, a_row, bj, b_col, n - j, k, add, 2);
        if (i < m)
            dots(cj + i * c_row, c_row, c_col, a + i * a_row, a_row, bj, b_col, n - j, k, add, 1);
    }
}

// c[m,n] = a[m,k] b[k,n], or c += a b if add. Element (i,p) of a is a[i*a_row + p*a_col]; likewise
// b and c. c must not overlap a or b.
static void gemm(real *c, size_t c_row, size_t c_col, const real *a, size_t a_row, size_t a_col,
                 const real *b, size_t b_row, size_t b_col, size_t m, size_t n, size_t k, int add)
{
    int transpose = a_col == 1 && b_row == 1; // to pack b is to transpose it
    if (transpose && m <= 8)
        gemm_few_rows(c, c_row, c_col, a, a_row, b, b_col, m, n, k, add);
    else if (transpose && 2 * m < n) // c^T = b^T a^T: pack a, the smaller, and take b in place
        gemm_blocked(c, c_col, c_row, b, b_col, b_row, a, a_col, a_row, n, m, k, add);
    else
        gemm_blocked(c, c_row, c_col, a, a_row, a_col, b, b_row, b_col, m, n, k, add);
}

static size_t group_begin(Rows r, size_t e) { return r.offsets ? (size_t)r.offsets[e] : 0; }
static size_t group_end(Rows r, size_t e) { return r.offsets ? (size_t)r.offsets[e + 1] : r.rows; }

// Work is cut in tiles of the output: rows in parts of whole MR, columns as many as gemm packs at
// once. gemm packs its weights anew for each tile, so tiles are as tall as the threads allow.
typedef struct {
    size_t group, row, rows, col, cols; // row counts over all groups
} Tile;

static size_t tile_height(Rows r)
{
    size_t tall = ceil_div(r.rows, 2 * (size_t)thread_count());
    return tall < 64 ? 64 : min_size(tall, 1024);
}

static size_t tiles_down(Rows r, size_t e, size_t tall)
{
    return ceil_div(group_end(r, e) - group_begin(r, e), tall);
}

static long count_tiles(Rows r, size_t cols, size_t tall)
{
    size_t n = 0;
    for (size_t e = 0; e < r.groups; e++) n += tiles_down(r, e, tall);
    return (long)(n * ceil_div(cols, NC));
}

static Tile find_tile(size_t i, Rows r, size_t cols, size_t tall)
{
    size_t across = ceil_div(cols, NC), e = 0, down;
    for (; i >= (down = tiles_down(r, e, tall)) * across; e++) i -= down * across;
    size_t begin = group_begin(r, e), rows = group_end(r, e) - begin;
    size_t panels = ceil_div(rows, MR), col = i % across * NC;
    size_t row = panels * (i / across) / down * MR;
    size_t end = min_size(panels * (i / across + 1) / down * MR, rows);
    Tile t = {e, begin + row, end - row, col, min_size(NC, cols - col)};
    return t;
}

// out = x W^T for each group e: out[n,o] = sum_i x[n,i] W_e[o,i].
static void matmul_forward(real *out,     // [rows, O], set or added to
                           const real *x, // [rows, I]
                           const real *w, // [groups, O, I]
                           Rows r, size_t O, size_t I, enum Mode mode)
{
    size_t tall = tile_height(r);
    long tiles = count_tiles(r, O, tall);
    #pragma omp parallel for schedule(dynamic) if (r.rows * O * I > 16 * SMALL)
    for (long i = 0; i < tiles; i++) {
        Tile t = find_tile((size_t)i, r, O, tall);
        gemm(out + t.row * O + t.col, O, 1, x + t.row * I, I, 1,
             w + (t.group * O + t.col) * I, 1, I, t.rows, t.cols, I, mode);
    }
}

// out = x W^T: dx[n,i] = sum_o dout[n,o] W_e[o,i].
static void matmul_backward_x(real *dx, const real *dout, const real *w, Rows r, size_t O, size_t I,
                              enum Mode mode)
{
    size_t tall = tile_height(r);
    long tiles = count_tiles(r, I, tall);
    #pragma omp parallel for schedule(dynamic) if (r.rows * O * I > 16 * SMALL)
    for (long i = 0; i < tiles; i++) {
        Tile t = find_tile((size_t)i, r, I, tall);
        gemm(dx + t.row * I + t.col, I, 1, dout + t.row * O, O, 1,
             w + t.group * O * I + t.col, I, 1, t.rows, t.cols, O, mode);
    }
}

// out = x W^T: dW_e[o,i] += sum_n dout[n,o] x[n,i].
static void matmul_backward_w(accum *dw, const real *dout, const real *x, Rows r, size_t O,
                              size_t I)
{
    size_t threads = (size_t)thread_count(), tall = O; // few tiles: gemm packs all of x for each
    if (r.groups < 2 * threads) tall = ceil_div(ceil_div(O, threads), MR) * MR;
    if (tall < 48) tall = 48;
    size_t down = ceil_div(O, tall), across = ceil_div(I, NC);
    #pragma omp parallel for schedule(dynamic)
    for (long t = 0; t < (long)(r.groups * down * across); t++) {
        size_t e = (size_t)t / (down * across), begin = group_begin(r, e);
        size_t o = (size_t)t / across % down * tall, i = (size_t)t % across * NC;
        gemm(dw + (e * O + o) * I + i, I, 1, dout + begin * O + o, 1, O, x + begin * I + i, I, 1,
             min_size(tall, O - o), min_size(NC, I - i), group_end(r, e) - begin, ADD);
    }
}

// out = x / rms(x) * w over rows of C numbers that stand ld_out and ld_x apart.
static void rmsnorm_forward(real *out,     // [N, C]
                            accum *rstd,   // [N], 1 / rms
                            const real *x, // [N, C]
                            const real *w, // [C]
                            size_t N, size_t C, size_t ld_out, size_t ld_x, double eps)
{
    #pragma omp parallel for if (N * C > SMALL)
    for (size_t n = 0; n < N; n++) {
        const real *xn = x + n * ld_x;
        accum sum = 0;
        #pragma omp simd reduction(+ : sum)
        for (size_t i = 0; i < C; i++) sum += xn[i] * xn[i];
        accum r = (accum)(1 / sqrt((double)sum / (double)C + eps));
        rstd[n] = r;
        for (size_t i = 0; i < C; i++) out[n * ld_out + i] = xn[i] * r * w[i];
    }
}

// out_i = x_i r w_i with r = (mean_j x_j^2 + eps)^(-1/2):
// dx_i = r (dout_i w_i - x_i r^2 mean_j(dout_j w_j x_j)),  dw_i += sum_n dout_i x_i r.
static void rmsnorm_backward(real *dx, accum *dw, const real *dout, const real *x, const real *w,
                             const accum *rstd, size_t N, size_t C, size_t ld_dout, size_t ld_x,
                             enum Mode mode)
{
    #pragma omp parallel for if (N * C > SMALL)
    for (size_t n = 0; n < N; n++) {
        const real *xn = x + n * ld_x, *dn = dout + n * ld_dout;
        real *dxn = dx + n * ld_x;
        accum dot = 0, r = rstd[n];
        #pragma omp simd reduction(+ : dot)
        for (size_t i = 0; i < C; i++) dot += dn[i] * w[i] * xn[i];
        accum mean = dot * r * r / (accum)C;
        if (mode == SET) memset(dxn, 0, C * sizeof(real));
        for (size_t i = 0; i < C; i++) dxn[i] += r * (dn[i] * w[i] - xn[i] * mean);
    }
    enum { STRIP = 32 }; // columns a thread sums alone, so that nobody shares a sum
    #pragma omp parallel for if (N * C > SMALL)
    for (size_t begin = 0; begin < C; begin += STRIP) {
        size_t end = min_size(C, begin + STRIP);
        for (size_t n = 0; n < N; n++)
            for (size_t i = begin; i < end; i++)
                dw[i] += dout[n * ld_dout + i] * x[n * ld_x + i] * rstd[n];
    }
}

// act = silu(gate) * up, silu(z) = z sigmoid(z).
static void swiglu_forward(real *act,        // [n]
                           const real *gate, // [n]
                           const real *up,   // [n]
                           size_t n)
{
    #pragma omp parallel for simd if (parallel : n > SMALL)
    for (size_t i = 0; i < n; i++) act[i] = gate[i] * sigmoid(gate[i]) * up[i];
}

// act = silu(gate) up; silu'(z) = s + z s (1 - s) with s = sigmoid(z).
static void swiglu_backward(real *dgate, real *dup, const real *dact, const real *gate,
                            const real *up, size_t n)
{
    #pragma omp parallel for simd if (parallel : n > SMALL)
    for (size_t i = 0; i < n; i++) {
        real s = sigmoid(gate[i]), silu = gate[i] * s;
        dup[i] = dact[i] * silu;
        dgate[i] = dact[i] * up[i] * (s + silu * (1 - s));
    }
}

// out[n] = w[token[n]].
static void embedding_forward(real *out,        // [N, C]
                              const int *token, // [N]
                              const real *w,    // [V, C]
                              size_t N, size_t C)
{
    #pragma omp parallel for if (N * C > SMALL)
    for (size_t n = 0; n < N; n++)
        memcpy(out + n * C, w + (size_t)token[n] * C, C * sizeof(real));
}

// out[n] = w[token[n]]: dw[token[n]] += dout[n].
static void embedding_backward(accum *dw, const real *dout, const int *token, size_t N, size_t C)
{
    enum { STRIP = 32 }; // as in rmsnorm_backward
    #pragma omp parallel for if (N * C > SMALL)
    for (size_t begin = 0; begin < C; begin += STRIP) {
        size_t end = min_size(C, begin + STRIP);
        for (size_t n = 0; n < N; n++)
            for (size_t i = begin; i < end; i++) dw[(size_t)token[n] * C + i] += dout[n * C + i];
    }
}

// Rows of a longer sequence that a shorter one keeps: out[b,t] = in[b,t] for t < T.
static void crop_forward(real *out,      // [B, T, C]
                         const real *in, // [B, Tin, C], Tin >= T
                         size_t B, size_t T, size_t Tin, size_t C)
{
    for (size_t b = 0; b < B; b++)
        memcpy(out + b * T * C, in + b * Tin * C, T * C * sizeof(real));
}

// out[b,t] = in[b,t]: din[b,t] = dout[b,t] for t < T, 0 after.
static void crop_backward(real *din, const real *dout, size_t B, size_t T, size_t Tin, size_t C)
{
    memset(din, 0, B * Tin * C * sizeof(real));
    for (size_t b = 0; b < B; b++)
        memcpy(din + b * Tin * C, dout + b * T * C, T * C * sizeof(real));
}

// Turns the pair (x_2j, x_2j+1) of a row at position p by the angle p theta_j, whose cosine and
// sine stand in table[p][2j], table[p][2j+1]; backwards if sign is -1. A row holds `heads` vectors
// that stand `head` apart. out may be x.
static void rope_turn(real *out, const real *x, const int *pos, const accum *table, accum sign,
                      size_t N, size_t heads, size_t Dr, size_t ld_out, size_t ld_x, size_t head)
{
    #pragma omp parallel for if (N * heads * Dr > SMALL)
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
}

// Rotary position embedding: out = R(p) x.
static void rope_forward(real *out,          // [N, heads, Dr], rows ld_out apart
                         const real *x,      // [N, heads, Dr], rows ld_x apart
                         const int *pos,     // [N]
                         const accum *table, // [Tmax, Dr]
                         size_t N, size_t heads, size_t Dr, size_t ld_out, size_t ld_x, size_t head)
{
    rope_turn(out, x, pos, table, 1, N, heads, Dr, ld_out, ld_x, head);
}

// out = R(p) x: dx = R(p)^T dout, the turn backwards. dx may be dout.
static void rope_backward(real *dx, const real *dout, const int *pos, const accum *table, size_t N,
                          size_t heads, size_t Dr, size_t ld_dx, size_t ld_dout, size_t head)
{
    rope_turn(dx, dout, pos, table, -1, N, heads, Dr, ld_dx, ld_dout, head);
}

// Causal attention. Per head, with k_t = [k_nope_t; k_pe_t] and k_pe shared by all heads:
//     out_t = sum_{u <= t} p_tu v_u,   p_tu = exp(scale q_t . k_u - lse_t).
// Queries go in blocks; a block sees the scores [ATTENTION_BLOCK, T] and no more is kept than lse.
enum { ATTENTION_BLOCK = 64 };

// Head h's keys of one sequence side by side: k[t] = [k_nope_t; k_pe_t].
static void gather_keys(real *k,          // [T, Dn + Dr]
                        const real *kv,   // [T, NH, Dn + Dv]
                        const real *k_pe, // [T, Dr]
                        size_t T, size_t NH, size_t h, size_t Dn, size_t Dr, size_t Dv)
{
    for (size_t t = 0; t < T; t++) {
        memcpy(k + t * (Dn + Dr), kv + (t * NH + h) * (Dn + Dv), Dn * sizeof(real));
        memcpy(k + t * (Dn + Dr) + Dn, k_pe + t * Dr, Dr * sizeof(real));
    }
}

static void attention_forward(real *out,        // [B, T, NH, Dv]
                              accum *lse,       // [B, NH, T], log of the softmax's denominator
                              const real *q,    // [B, T, NH, Dn + Dr]
                              const real *kv,   // [B, T, NH, Dn + Dv], k_nope then v
                              const real *k_pe, // [B, T, Dr]
                              size_t B, size_t T, size_t NH, size_t Dn, size_t Dr, size_t Dv,
                              double scale)
{
    size_t Dq = Dn + Dr, Dkv = Dn + Dv;
    #pragma omp parallel for if (B * NH * T * T > SMALL)
    for (size_t bh = 0; bh < B * NH; bh++) {
        size_t b = bh / NH, h = bh % NH;
        real *k = scratch(T * Dq + ATTENTION_BLOCK * T), *p = k + T * Dq;
        const real *kvb = kv + b * T * NH * Dkv, *v = kvb + h * Dkv + Dn;
        gather_keys(k, kvb, k_pe + b * T * Dr, T, NH, h, Dn, Dr, Dv);
        for (size_t t = 0; t < T; t += ATTENTION_BLOCK) {
            size_t rows = min_size(ATTENTION_BLOCK, T - t), cols = t + rows;
            gemm(p, cols, 1, q + ((b * T + t) * NH + h) * Dq, NH * Dq, 1, k, 1, Dq,
                 rows, cols, Dq, SET);
            for (size_t i = 0; i < rows; i++) {
                real *s = p + i * cols, max = s[0];
                size_t seen = t + i + 1;
                for (size_t u = 1; u < seen; u++) max = s[u] > max ? s[u] : max;
                accum sum = 0;
                #pragma omp simd reduction(+ : sum)
                for (size_t u = 0; u < seen; u++) {
                    s[u] = fast_exp((real)scale * (s[u] - max));
                    sum += s[u];
                }
                for (size_t u = 0; u < seen; u++) s[u] /= sum;
                for (size_t u = seen; u < cols; u++) s[u] = 0;
                lse[bh * T + t + i] = (accum)(scale * max + log((double)sum));
            }
            gemm(out + ((b * T + t) * NH + h) * Dv, NH * Dv, 1, p, cols, 1, v, NH * Dkv, 1,
                 rows, Dv, cols, SET);
        }
    }
}

// out_t = sum_u p_tu v_u, p = softmax(scale q k^T), so with dp_tu = dout_t . v_u
//     dv_u += sum_t p_tu dout_t,     ds_tu = scale p_tu (dp_tu - dout_t . out_t),
//     dq_t  = sum_u ds_tu k_u,       dk_u += sum_t ds_tu q_t.
static void attention_backward(real *dq, real *dkv, real *dk_pe, real *dk_pe_heads,
                               const real *dout, const real *out, const accum *lse, const real *q,
                               const real *kv, const real *k_pe, size_t B, size_t T, size_t NH,
                               size_t Dn, size_t Dr, size_t Dv, double scale)
{
    size_t Dq = Dn + Dr, Dkv = Dn + Dv;
    #pragma omp parallel for if (B * NH * T * T > SMALL)
    for (size_t bh = 0; bh < B * NH; bh++) {
        size_t b = bh / NH, h = bh % NH;
        real *k = scratch(2 * T * Dq + T * Dv + 2 * ATTENTION_BLOCK * T);
        real *dk = k + T * Dq, *dv = dk + T * Dq; // [T, Dn + Dr], [T, Dv]
        real *p = dv + T * Dv, *dp = p + ATTENTION_BLOCK * T;
        const real *kvb = kv + b * T * NH * Dkv, *v = kvb + h * Dkv + Dn;
        gather_keys(k, kvb, k_pe + b * T * Dr, T, NH, h, Dn, Dr, Dv);
        memset(dk, 0, T * (Dq + Dv) * sizeof(real));
        for (size_t t = 0; t < T; t += ATTENTION_BLOCK) {
            size_t rows = min_size(ATTENTION_BLOCK, T - t), cols = t + rows;
            const real *qt = q + ((b * T + t) * NH + h) * Dq;
            const real *ot = out + ((b * T + t) * NH + h) * Dv;
            const real *dot = dout + ((b * T + t) * NH + h) * Dv;
            gemm(p, cols, 1, qt, NH * Dq, 1, k, 1, Dq, rows, cols, Dq, SET);
            gemm(dp, cols, 1, dot, NH * Dv, 1, v, 1, NH * Dkv, rows, cols, Dv, SET);
            for (size_t i = 0; i < rows; i++) {
                real *s = p + i * cols, *ds = dp + i * cols;
                size_t seen = t + i + 1;
                accum mean = 0, log_sum = lse[bh * T + t + i];
                for (size_t j = 0; j < Dv; j++) mean += dot[i * NH * Dv + j] * ot[i * NH * Dv + j];
                for (size_t u = 0; u < seen; u++) {
                    s[u] = fast_exp((real)scale * s[u] - log_sum);
                    ds[u] = (real)scale * s[u] * (ds[u] - mean);
                }
                for (size_t u = seen; u < cols; u++) s[u] = ds[u] = 0;
            }
            gemm(dv, Dv, 1, p, 1, cols, dot, NH * Dv, 1, cols, Dv, rows, ADD);
            gemm(dk, Dq, 1, dp, 1, cols, qt, NH * Dq, 1, cols, Dq, rows, ADD);
            gemm(dq + ((b * T + t) * NH + h) * Dq, NH * Dq, 1, dp, cols, 1, k, Dq, 1,
                 rows, Dq, cols, SET);
        }
        for (size_t t = 0; t < T; t++) {
            real *dkv_t = dkv + ((b * T + t) * NH + h) * Dkv;
            memcpy(dkv_t, dk + t * Dq, Dn * sizeof(real));
            memcpy(dkv_t + Dn, dv + t * Dv, Dv * sizeof(real));
            memcpy(dk_pe_heads + (bh * T + t) * Dr, dk + t * Dq + Dn, Dr * sizeof(real));
        }
    }
    #pragma omp parallel for if (B * NH * T * T > SMALL)
    for (size_t bt = 0; bt < B * T; bt++)
        for (size_t j = 0; j < Dr; j++) {
            accum sum = 0;
            for (size_t h = 0; h < NH; h++)
                sum += dk_pe_heads[((bt / T * NH + h) * T + bt % T) * Dr + j];
            dk_pe[bt * Dr + j] = sum;
        }
}

// Indices of the K largest of n values, in falling order; of equal ones the first.
static void top_k(int *index, const accum *value, size_t n, size_t K)
{
    for (size_t k = 0; k < K; k++) {
        int best = -1;
        for (size_t i = 0; i < n; i++) {
            int taken = 0;
            for (size_t j = 0; j < k; j++) taken |= index[j] == (int)i;
            if (!taken && (best < 0 || value[i] > value[best])) best = (int)i;
        }
        index[k] = best;
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
    matmul_forward(s, x, w, all_rows(N), E, C, SET);
    size_t size = E / G; // of a group
    #pragma omp parallel for if (N * E > SMALL)
    for (size_t n = 0; n < N; n++) {
        accum *sn = s + n * E;
        real *choice = scratch(E + G + 2 * KG), *group_score = choice + E;
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
}

// The selection is a constant. With S = sum of the selected s + 1e-20 and g_k = scale s_k / S:
//     ds_k += scale / S (dg_k - sum_j dg_j s_j / S);   without norm  ds_k += scale dg_k.
// s = sigmoid(z), z = x W^T:   dz = ds s (1 - s),  dx += dz W,  dW += dz^T x.
static void router_backward(real *dx, accum *dw, accum *ds, const accum *dg, const accum *s,
                            const int *topk, const real *x, const real *w, size_t N, size_t C,
                            size_t E, size_t K, int norm, double scale)
{
    #pragma omp parallel for if (N * E > SMALL)
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
    matmul_backward_x(dx, ds, w, all_rows(N), E, C, ADD);
    matmul_backward_w(dw, ds, x, all_rows(N), E, C);
}

// Sequence-wise balance loss ([V3] 17-20), for each sequence
//     loss = sum_i f_i P_i,  P_i = mean_t s_ti / sum_j s_tj,
//     f_i = E / (K T) * the number of tokens with i among the K best of s, bias and groups aside.
static void balance_forward(accum *loss,    // [B]
                            accum *f,       // [B, E]
                            const accum *s, // [B, T, E]
                            size_t B, size_t T, size_t E, size_t K)
{
    #pragma omp parallel for if (B * T * E > SMALL)
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
}

// loss = sum_i f_i mean_t s_ti / S_t with S_t = sum_j s_tj, f a constant:
//     ds_ti = dloss / T (f_i / S_t - sum_j f_j s_tj / S_t^2).
static void balance_backward(accum *ds, double dloss, const accum *f, const accum *s, size_t B,
                             size_t T, size_t E)
{
    #pragma omp parallel for if (B * T * E > SMALL)
    for (size_t n = 0; n < B * T; n++) {
        const accum *fb = f + n / T * E, *sn = s + n * E;
        accum sum = 0, dot = 0;
        for (size_t e = 0; e < E; e++) sum += sn[e], dot += fb[e] * sn[e];
        for (size_t e = 0; e < E; e++)
            ds[n * E + e] = (accum)(dloss / (double)T) * (fb[e] - dot / sum) / sum;
    }
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
    memset(offsets, 0, (E + 1) * sizeof(int));
    for (size_t i = 0; i < N * K; i++) offsets[topk[i] + 1]++;
    for (size_t e = 0; e < E; e++) offsets[e + 1] += offsets[e];
    for (size_t i = 0; i < N * K; i++) row[i] = offsets[topk[i]]++;
    for (size_t e = E; e > 0; e--) offsets[e] = offsets[e - 1]; // each had moved to its end
    offsets[0] = 0;
    #pragma omp parallel for if (N * K * C > SMALL)
    for (size_t i = 0; i < N * K; i++)
        memcpy(xs + (size_t)row[i] * C, x + i / K * C, C * sizeof(real));
}

// xs[row[n,k]] = x[n]: dx[n] = sum_k dxs[row[n,k]].
static void dispatch_backward(real *dx, const real *dxs, const int *row, size_t N, size_t K,
                              size_t C, enum Mode mode)
{
    #pragma omp parallel for if (N * K * C > SMALL)
    for (size_t n = 0; n < N; n++) {
        if (mode == SET) memset(dx + n * C, 0, C * sizeof(real));
        for (size_t k = 0; k < K; k++) {
            const real *from = dxs + (size_t)row[n * K + k] * C;
            for (size_t i = 0; i < C; i++) dx[n * C + i] += from[i];
        }
    }
}

// y[n] += sum_k g[n,k] out[row[n,k]].
static void combine_forward(real *y,         // [N, C], added to
                            const real *out, // [N K, C]
                            const accum *g,  // [N, K]
                            const int *row,  // [N, K]
                            size_t N, size_t K, size_t C)
{
    #pragma omp parallel for if (N * K * C > SMALL)
    for (size_t n = 0; n < N; n++)
        for (size_t k = 0; k < K; k++) {
            const real *from = out + (size_t)row[n * K + k] * C;
            for (size_t i = 0; i < C; i++) y[n * C + i] += g[n * K + k] * from[i];
        }
}

// y[n] += sum_k g[n,k] out[row[n,k]]:
//     dout[row[n,k]] = g[n,k] dy[n],   dg[n,k] = dy[n] . out[row[n,k]].
static void combine_backward(real *dout, accum *dg, const real *dy, const real *out, const accum *g,
                             const int *row, size_t N, size_t K, size_t C)
{
    #pragma omp parallel for if (N * K * C > SMALL)
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
}

// loss[n] = lse[n] - logits[n, target[n]] with lse = log sum exp; 0 where the target is -1.
static void cross_entropy_forward(accum *loss,        // [N]
                                  accum *lse,         // [N]
                                  const real *logits, // [N, V]
                                  const int *target,  // [N]
                                  size_t N, size_t V)
{
    #pragma omp parallel for if (N * V > SMALL)
    for (size_t n = 0; n < N; n++) {
        const real *z = logits + n * V;
        real max = z[0];
        for (size_t v = 1; v < V; v++) max = z[v] > max ? z[v] : max;
        accum sum = 0;
        #pragma omp simd reduction(+ : sum)
        for (size_t v = 0; v < V; v++) sum += fast_exp(z[v] - max);
        lse[n] = (accum)(max + log((double)sum));
        loss[n] = target[n] < 0 ? 0 : lse[n] - z[target[n]];
    }
}

// loss = lse - z_target: dz_v = dloss (exp(z_v - lse) - [v = target]); 0 where the target is -1.
static void cross_entropy_backward(real *dlogits, double dloss, const accum *lse,
                                   const real *logits, const int *target, size_t N, size_t V)
{
    #pragma omp parallel for if (N * V > SMALL)
    for (size_t n = 0; n < N; n++) {
        const real *z = logits + n * V;
        real *dz = dlogits + n * V, scale = target[n] < 0 ? 0 : (real)dloss;
        for (size_t v = 0; v < V; v++) dz[v] = scale * fast_exp(z[v] - lse[n]);
        if (target[n] >= 0) dz[target[n]] -= scale;
    }
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
                             const real *c_kv,  // [slots, capacity, Rkv]
                             const real *k_pe,  // [slots, capacity, Dr]
                             const int *slot,   // [n]
                             const int *pos,    // [n]
                             size_t n, size_t NH, size_t Dn, size_t Dr, size_t Dv, size_t Rkv,
                             size_t capacity, size_t window, double scale)
{
    size_t Dq = Dn + Dr, width = Rkv + Dr;
    real *sums = latent + n * NH * Rkv;
    #pragma omp parallel for if (n * NH * Rkv * window > 16 * SMALL)
    for (size_t h = 0; h < NH; h++)
        gemm(latent + h * n * Rkv, Rkv, 1, q + h * Dq, NH * Dq, 1, w_b + h * (Dn + Dv) * Rkv,
             Rkv, 1, n, Rkv, Dn, SET);
    #pragma omp parallel for schedule(dynamic) if (n * NH * Rkv * window > 16 * SMALL)
    for (size_t i = 0; i < n * NH; i++) {
        size_t row = i / NH, h = i % NH, last = (size_t)pos[row];
        size_t seen = min_size(last + 1, window), first = last + 1 - seen;
        size_t base = (size_t)slot[row] * capacity;
        const real *ql = latent + (h * n + row) * Rkv, *qr = q + (row * NH + h) * Dq + Dn;
        real *p = scratch(seen + width), max = -INFINITY;
        for (size_t u = 0; u < seen; u++) {
            size_t at = base + (first + u) % capacity;
            const real *c = c_kv + at * Rkv, *r = k_pe + at * Dr;
            accum dot = 0;
            #pragma omp simd reduction(+ : dot)
            for (size_t j = 0; j < Rkv; j++) dot += ql[j] * c[j];
            #pragma omp simd reduction(+ : dot)
            for (size_t j = 0; j < Dr; j++) dot += qr[j] * r[j];
            p[u] = (real)scale * dot;
            max = p[u] > max ? p[u] : max;
        }
        accum sum = 0;
        real *o = sums + (h * n + row) * Rkv;
        memset(o, 0, Rkv * sizeof(real));
        for (size_t u = 0; u < seen; u++) {
            const real *c = c_kv + (base + (first + u) % capacity) * Rkv;
            real weight = fast_exp(p[u] - max);
            sum += weight;
            for (size_t j = 0; j < Rkv; j++) o[j] += weight * c[j];
        }
        for (size_t j = 0; j < Rkv; j++) o[j] /= sum;
    }
    #pragma omp parallel for if (n * NH * Rkv * window > 16 * SMALL)
    for (size_t h = 0; h < NH; h++)
        gemm(out + h * Dv, NH * Dv, 1, sums + h * n * Rkv, Rkv, 1,
             w_b + (h * (Dn + Dv) + Dn) * Rkv, 1, Rkv, n, Dv, Rkv, SET);
}

// Copies new entries into such a cache: row n goes to position pos[n] of sequence slot[n].
static void cache_store(real *cache,     // [slots, capacity, width]
                        const real *x,   // [n, width]
                        const int *slot, // [n]
                        const int *pos,  // [n]
                        size_t n, size_t width, size_t capacity)
{
    for (size_t i = 0; i < n; i++)
        memcpy(cache + ((size_t)slot[i] * capacity + (size_t)pos[i] % capacity) * width,
               x + i * width, width * sizeof(real));
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
    if (t->kind == ROUTER_BIAS)
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

// Everything a layer computes, once: type, field, which layers have it, whether its value, its
// gradient or both are kept, rows, columns. N rows are N tokens; routed experts see K of each.
enum { ALL = 1, FIRST = 2, LAST = 4, DENSE = 8, MOE = 16, MTP = 32 }; // sets of layers
enum { VALUE = 1, GRADIENT = 2, BOTH = 3 };

#define LAYER_ACTS(X) \
    X(real,  e,       MTP,   BOTH,  N, c->C)                   /* embedding of the token ahead */ \
    X(real,  h_prev,  MTP,   BOTH,  N, c->C)                   /* what the previous head saw */ \
    X(real,  z,       MTP,   BOTH,  N, 2 * c->C)               /* [enorm(e); hnorm(h_prev)] */ \
    X(accum, rstd_e,  MTP,   VALUE, N, 1)                      /* 1 / rms of e, and so on */ \
    X(accum, rstd_hp, MTP,   VALUE, N, 1) \
    X(real,  x,       FIRST | MTP, BOTH, N, c->C)              /* input of the block */ \
    X(real,  xn,      ALL,   BOTH,  N, c->C)                   /* its norm, seen by attention */ \
    X(accum, rstd_x,  ALL,   VALUE, N, 1) \
    X(real,  q_a,     ALL,   BOTH,  N, c->Rq)                  /* query latent */ \
    X(real,  c_q,     ALL,   BOTH,  N, c->Rq)                  /* its norm */ \
    X(accum, rstd_q,  ALL,   VALUE, N, 1) \
    X(real,  q,       ALL,   BOTH,  N, c->NH * (c->Dn + c->Dr)) /* queries, q_pe rotated */ \
    X(real,  kv_a,    ALL,   BOTH,  N, c->Rkv + c->Dr)         /* key-value latent, k_pe */ \
    X(real,  c_kv,    ALL,   BOTH,  N, c->Rkv)                 /* the latent's norm */ \
    X(accum, rstd_kv, ALL,   VALUE, N, 1) \
    X(real,  k_pe,    ALL,   BOTH,  N, c->Dr)                  /* rotated */ \
    X(real,  k_pe_heads, ALL, GRADIENT, N, c->NH * c->Dr)      /* of k_pe, from each head */ \
    X(real,  kv,      ALL,   BOTH,  N, c->NH * (c->Dn + c->Dv)) /* k_nope and v of each head */ \
    X(real,  o,       ALL,   BOTH,  N, c->NH * c->Dv)          /* output of the heads */ \
    X(accum, lse,     ALL,   VALUE, N, c->NH)                  /* of attention's softmax */ \
    X(real,  h,       ALL,   VALUE, N, c->C)                   /* x + attention */ \
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
    X(real,  y,       ALL,   VALUE, N, c->C)                   /* output of the block */ \
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
    a->field = (set & (sets)) && (what & (kept)) \
        ? (type *)arena_take(arena, size_mul((size_t)(rows), (size_t)(cols)), sizeof(type)) : NULL;
    LAYER_ACTS(BIND_ACT)
}

// What depth k of the model (0: the main model) reads: sequences of T - k tokens.
typedef struct {
    size_t B, T;
    int *token;  // [B, T] what is embedded
    int *target; // [B, T] what is to be predicted, -1: nothing
    int *pos;    // [B, T]
} Batch;

// A forward pass of B sequences of T tokens, kept for the backward pass when training; otherwise
// all layers share one set of activations and only the main model runs.
typedef struct {
    int training;
    size_t depths;        // of multi-token prediction that run
    size_t B, T;
    Arena arena;
    LayerActs *layer;     // [L + depths]
    LayerActs d;          // gradients, of one layer at a time; d.x is the residual stream's
    Batch *batch;         // [1 + depths]
    accum *rope;          // [T, Dr]
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
    a->arena.used = 0;
    int every_set = 0;
    for (size_t l = 0; l < c->L + a->depths; l++) every_set |= layer_set(c, l);
    for (size_t l = 0; l < c->L + a->depths; l++) {
        size_t k = l < c->L ? 0 : l - c->L + 1, T = a->T > k ? a->T - k : 0;
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
    device_free(a->arena.base);
    device_free(a->rope);
    free(a->layer);
    free(a->batch);
}

// Gives B rows of T + 1 tokens to the model. Depth k embeds token i + k at position i and is to
// predict token i + k + 1, for the T - k positions that have one.
static void acts_load(Acts *a, const int *tokens) // [B, T + 1], host memory
{
    int *host = (int *)host_alloc(3 * a->B * a->T, sizeof(int));
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
static void mlp_forward(real *out, real *gate, real *up, real *act, const real *x,
                        const real *w_gate, const real *w_up, const real *w_down, Rows r,
                        size_t C, size_t F, enum Mode mode)
{
    matmul_forward(gate, x, w_gate, r, F, C, SET);
    matmul_forward(up, x, w_up, r, F, C, SET);
    swiglu_forward(act, gate, up, r.rows * F);
    matmul_forward(out, act, w_down, r, C, F, mode);
}

static void mlp_backward(real *dx, accum *dw_gate, accum *dw_up, accum *dw_down, real *dgate,
                         real *dup, real *dact, const real *dout, const real *gate,
                         const real *up, const real *act, const real *x, const real *w_gate,
                         const real *w_up, const real *w_down, Rows r, size_t C, size_t F,
                         enum Mode mode)
{
    // out = W_down act
    matmul_backward_x(dact, dout, w_down, r, C, F, SET);
    matmul_backward_w(dw_down, dout, act, r, C, F);
    // act = silu(gate) up
    swiglu_backward(dgate, dup, dact, gate, up, r.rows * F);
    // gate = W_gate x, up = W_up x
    matmul_backward_x(dx, dgate, w_gate, r, F, C, mode);
    matmul_backward_x(dx, dup, w_up, r, F, C, ADD);
    matmul_backward_w(dw_gate, dgate, x, r, F, C);
    matmul_backward_w(dw_up, dup, x, r, F, C);
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
    device_copy(a->h, a->x, N * C * sizeof(real));
    matmul_forward(a->h, a->o, w->wo, all_rows(N), C, NH * Dv, ADD);
}

static void mla_backward(LayerActs *d, LayerGrads *dw, const LayerActs *a, const LayerWeights *w,
                         const Config *c, const Batch *b, const accum *rope)
{
    size_t N = b->B * b->T, C = c->C, NH = c->NH, Rq = c->Rq;
    size_t Rkv = c->Rkv, Dn = c->Dn, Dr = c->Dr, Dv = c->Dv;
    size_t Dq = Dn + Dr;
    Rows r = all_rows(N);
    // h = x + W_o o; d->x holds dh and, with what the norm will add, becomes dx
    matmul_backward_x(d->o, d->x, w->wo, r, C, NH * Dv, SET);
    matmul_backward_w(dw->wo, d->x, a->o, r, C, NH * Dv);
    // o = attention(q, kv, k_pe)
    attention_backward(d->q, d->kv, d->k_pe, d->k_pe_heads, d->o, a->o, a->lse, a->q, a->kv,
                       a->k_pe, b->B, b->T, NH, Dn, Dr, Dv, attention_scale(c));
    // kv = W_kv_b c_kv
    matmul_backward_x(d->c_kv, d->kv, w->wkv_b, r, NH * (Dn + Dv), Rkv, SET);
    matmul_backward_w(dw->wkv_b, d->kv, a->c_kv, r, NH * (Dn + Dv), Rkv);
    // [c_kv; k_pe] = [norm(latent); R k_pe], both from kv_a = W_kv_a xn
    rope_backward(d->kv_a + Rkv, d->k_pe, b->pos, rope, N, 1, Dr, Rkv + Dr, Dr, Dr);
    rmsnorm_backward(d->kv_a, dw->kv_norm, d->c_kv, a->kv_a, w->kv_norm, a->rstd_kv, N, Rkv, Rkv,
                     Rkv + Dr, SET);
    matmul_backward_x(d->xn, d->kv_a, w->wkv_a, r, Rkv + Dr, C, SET);
    matmul_backward_w(dw->wkv_a, d->kv_a, a->xn, r, Rkv + Dr, C);
    // q = R (W_q_b norm(W_q_a xn)), or R (W_q xn)
    rope_backward(d->q + Dn, d->q + Dn, b->pos, rope, N, NH, Dr, NH * Dq, NH * Dq, Dq);
    if (Rq) {
        matmul_backward_x(d->c_q, d->q, w->wq_b, r, NH * Dq, Rq, SET);
        matmul_backward_w(dw->wq_b, d->q, a->c_q, r, NH * Dq, Rq);
        rmsnorm_backward(d->q_a, dw->q_norm, d->c_q, a->q_a, w->q_norm, a->rstd_q, N, Rq, Rq, Rq,
                         SET);
        matmul_backward_x(d->xn, d->q_a, w->wq_a, r, Rq, C, ADD);
        matmul_backward_w(dw->wq_a, d->q_a, a->xn, r, Rq, C);
    } else {
        matmul_backward_x(d->xn, d->q, w->wq, r, NH * Dq, C, ADD);
        matmul_backward_w(dw->wq, d->q, a->xn, r, NH * Dq, C);
    }
}

// y = h + sum of the shared experts + sum_k g_k expert_k ([V3] 12), or h + the dense MLP.
static void ffn_forward(LayerActs *a, const LayerWeights *w, const Config *c, size_t N)
{
    size_t C = c->C, E = c->E, K = c->K, Fe = c->Fe;
    device_copy(a->y, a->h, N * C * sizeof(real));
    if (!w->w_router) {
        mlp_forward(a->y, a->gate, a->up, a->act, a->hn, w->w_gate, w->w_up, w->w_down,
                    all_rows(N), C, c->F, ADD);
        return;
    }
    Rows experts = {a->offsets, E, N * K};
    router_forward(a->s, a->topk, a->g, a->hn, w->w_router, w->router_bias, N, C, E, K,
                   c->G, c->KG, c->norm_topk, c->route_scale);
    dispatch_forward(a->xs, a->offsets, a->row, a->hn, a->topk, N, K, E, C);
    mlp_forward(a->e_out, a->e_gate, a->e_up, a->e_act, a->xs, w->e_gate, w->e_up, w->e_down,
                experts, C, Fe, SET);
    combine_forward(a->y, a->e_out, a->g, a->row, N, K, C);
    if (c->S)
        mlp_forward(a->y, a->s_gate, a->s_up, a->s_act, a->hn, w->s_gate, w->s_up, w->s_down,
                    all_rows(N), C, c->S * Fe, ADD);
}

// d->x holds dy, which is dh too but for what flows through hn. dbalance: of each sequence's
// balance loss.
static void ffn_backward(LayerActs *d, LayerGrads *dw, const LayerActs *a, const LayerWeights *w,
                         const Config *c, const Batch *b, double dbalance)
{
    size_t N = b->B * b->T, C = c->C, E = c->E, K = c->K;
    size_t Fe = c->Fe;
    if (!w->w_router) {
        // y = h + mlp(hn)
        mlp_backward(d->hn, dw->w_gate, dw->w_up, dw->w_down, d->gate, d->up, d->act, d->x,
                     a->gate, a->up, a->act, a->hn, w->w_gate, w->w_up, w->w_down, all_rows(N), C,
                     c->F, SET);
        return;
    }
    Rows experts = {a->offsets, E, N * K};
    // y += sum_k g_k e_out
    combine_backward(d->e_out, d->g, d->x, a->e_out, a->g, a->row, N, K, C);
    // e_out = experts(xs)
    mlp_backward(d->xs, dw->e_gate, dw->e_up, dw->e_down, d->e_gate, d->e_up, d->e_act, d->e_out,
                 a->e_gate, a->e_up, a->e_act, a->xs, w->e_gate, w->e_up, w->e_down, experts, C,
                 Fe, SET);
    // xs = tokens of hn
    dispatch_backward(d->hn, d->xs, a->row, N, K, C, SET);
    // s, g = router(hn); balance = sum_i f_i P_i(s)
    balance_backward(d->s, dbalance, a->f, a->s, b->B, b->T, E);
    router_backward(d->hn, dw->w_router, d->s, d->g, a->s, a->topk, a->hn, w->w_router, N, C, E,
                    K, c->norm_topk, c->route_scale);
    // y += shared(hn)
    if (c->S)
        mlp_backward(d->hn, dw->s_gate, dw->s_up, dw->s_down, d->s_gate, d->s_up, d->s_act, d->x,
                     a->s_gate, a->s_up, a->s_act, a->hn, w->s_gate, w->s_up, w->s_down,
                     all_rows(N), C, c->S * Fe, ADD);
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

// In: d->x = dy. Out: d->x = dx.
static void block_backward(LayerActs *d, LayerGrads *dw, const LayerActs *a,
                           const LayerWeights *w, const Config *c, const Batch *b,
                           const accum *rope, double dbalance)
{
    size_t N = b->B * b->T, C = c->C;
    // y = h + FFN(norm(h))
    ffn_backward(d, dw, a, w, c, b, dbalance);
    rmsnorm_backward(d->x, dw->ffn_norm, d->hn, a->h, w->ffn_norm, a->rstd_h, N, C, C, C, ADD);
    // h = x + MLA(norm(x))
    mla_backward(d, dw, a, w, c, b, rope);
    rmsnorm_backward(d->x, dw->attn_norm, d->xn, a->x, w->attn_norm, a->rstd_x, N, C, C, C, ADD);
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
                         const LayerWeights *w, const int *token, size_t N, size_t C)
{
    // x = W_eh z
    matmul_backward_x(d->z, d->x, w->w_eh, all_rows(N), C, 2 * C, SET);
    matmul_backward_w(dw->w_eh, d->x, a->z, all_rows(N), C, 2 * C);
    // z = [enorm(e); hnorm(h_prev)]
    rmsnorm_backward(d->h_prev, dw->hnorm, d->z + C, a->h_prev, w->hnorm, a->rstd_hp, N, C,
                     2 * C, C, SET);
    rmsnorm_backward(d->e, dw->enorm, d->z, a->e, w->enorm, a->rstd_e, N, C, 2 * C, C, SET);
    // e = Emb(token)
    embedding_backward(dembed, d->e, token, N, C);
}

// The norm before the head is model.norm in the main model, shared_head.norm in an MTP layer.
static const real *head_norm(const Model *m, size_t k)
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

// mode ADD: d->out already holds what depth k + 1 sends back.
static void head_backward(Model *m, LayerActs *d, const LayerActs *a, size_t k, size_t N,
                          enum Mode mode)
{
    size_t C = m->config.C, V = m->config.V;
    accum *dnorm = k ? m->dlayer[m->config.L + k - 1].head_norm : m->dw.norm;
    matmul_backward_x(d->out, d->logits, m->w.lm_head, all_rows(N), V, C, mode);
    matmul_backward_w(m->dw.lm_head, d->logits, a->out, all_rows(N), V, C);
    rmsnorm_backward(d->x, dnorm, d->out, a->y, head_norm(m, k), a->rstd_y, N, C, C, C, SET);
}

// The whole model on the tokens of acts_load: logits and losses of every depth.
static void model_forward(const Model *m, Acts *a)
{
    const Config *c = &m->config;
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
        cross_entropy_forward(al->loss, al->lse_v, al->logits, b->target, b->B * b->T, c->V);
    }
}

// Adds scale * d(loss of the batch) to the gradients, where, per token ([V3] 24-25, 17),
//     loss = main + mtp_weight * mean over depths of mtp_k + alpha * balance.
static void model_backward(Model *m, Acts *a, double scale)
{
    const Config *c = &m->config;
    LayerActs *d = &a->d;
    double dbalance = scale * c->alpha / (double)a->B, dloss = scale / (double)(a->B * a->T);
    for (size_t depth = a->depths + 1; depth-- > 0;) {
        const Batch *b = &a->batch[depth];
        size_t last = c->L - 1 + depth, first = depth ? last : 0, N = b->B * b->T;
        cross_entropy_backward(d->logits, depth ? dloss * c->mtp_weight / (double)c->D : dloss,
                               a->layer[last].lse_v, a->layer[last].logits, b->target, N, c->V);
        head_backward(m, d, &a->layer[last], depth, N, depth == a->depths ? SET : ADD);
        for (size_t l = last + 1; l-- > first;)
            block_backward(d, &m->dlayer[l], &a->layer[l], &m->layer[l], c, b, a->rope, dbalance);
        if (depth > 0) {
            mtp_backward(d, &m->dlayer[first], m->dw.embed, &a->layer[first], &m->layer[first],
                         b->token, N, c->C);
            crop_backward(d->out, d->h_prev, b->B, b->T, a->batch[depth - 1].T, c->C);
        } else {
            embedding_backward(m->dw.embed, d->x, b->token, N, c->C);
        }
    }
}

typedef struct {
    double total, main, mtp, balance; // mtp: mean over depths; mtp and balance unweighted
} Losses;

static double sum_of(const accum *x, size_t n)
{
    accum *host = (accum *)host_alloc(n, sizeof(accum));
    double sum = 0;
    to_host(host, x, n * sizeof(accum));
    for (size_t i = 0; i < n; i++) sum += (double)host[i];
    free(host);
    return sum;
}

static Losses model_losses(const Model *m, const Acts *a)
{
    const Config *c = &m->config;
    Losses s = {0, 0, 0, 0};
    for (size_t k = 0; k <= a->depths; k++) {
        double mean = sum_of(a->layer[c->L - 1 + k].loss, a->batch[k].B * a->batch[k].T) /
                      (double)(a->B * a->T);
        if (k == 0) s.main = mean;
        else s.mtp += mean / (double)c->D;
    }
    for (size_t l = 0; l < c->L + a->depths; l++)
        if (is_moe(c, l)) s.balance += sum_of(a->layer[l].balance, a->B) / (double)a->B;
    s.total = s.main + (a->depths ? c->mtp_weight * s.mtp : 0) + c->alpha * s.balance;
    return s;
}

// ------------------------------------------------------------------------------------------------
// 6  Optimizers

#ifndef MOE_CUDA // operations again

// sum_i x_i^2, added up in fixed blocks so that the threads do not show in the result.
static double sum_squares(const accum *x, size_t n)
{
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

// One step of AdamW on the spans of the weights; step counts from 1, the gradient is taken times
// g_scale.
//     m = beta1 m + (1 - beta1) g,  v = beta2 v + (1 - beta2) g^2,
//     w -= lr (decay w + m / (1 - beta1^step) / (sqrt(v / (1 - beta2^step)) + eps)).
// master is what is trained, weights its copy for operations; here they are the same.
static void adamw_step(real *weights, accum *master, accum *m, accum *v, const accum *grads,
                       const Span *span, size_t spans, size_t pieces, long step, double lr,
                       double beta1, double beta2, double eps, double decay, double g_scale)
{
    accum b1 = (accum)beta1, b2 = (accum)beta2, e = (accum)eps, scale = (accum)g_scale;
    accum rate = (accum)(lr / (1 - pow(beta1, (double)step)));
    accum correct2 = (accum)(1 / sqrt(1 - pow(beta2, (double)step)));
    (void)weights, (void)pieces;
    for (size_t s = 0; s < spans; s++) {
        size_t begin = span[s].offset, end = begin + span[s].size;
        accum keep = (accum)(span[s].decays ? 1 - lr * decay : 1);
        #pragma omp parallel for if (end - begin > SMALL)
        for (size_t i = begin; i < end; i++) {
            accum g = grads[i] * scale;
            m[i] = b1 * m[i] + (1 - b1) * g;
            v[i] = b2 * v[i] + (1 - b2) * g * g;
            master[i] = keep * master[i] - rate * m[i] / (square_root(v[i]) * correct2 + e);
        }
    }
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

// A = X X^T. It is symmetric: strips of rows are computed as far as the diagonal, then mirrored.
static void gram(real *A,       // [m, m]
                 const real *X, // [m, n]
                 size_t m, size_t n)
{
    enum { STRIP = 48 };
    for (size_t i = 0; i < m; i += STRIP) {
        size_t rows = min_size(STRIP, m - i);
        gemm(A + i * m, m, 1, X + i * n, n, 1, X, 1, n, rows, i + rows, n, SET);
    }
    for (size_t i = 0; i < m; i++)
        for (size_t j = i + 1; j < m; j++) A[i * m + j] = A[j * m + i];
}

// Makes X [m, n], m <= n, of norm <= 1, nearly orthogonal: five steps of
//     A = X X^T,  X <- a X + (b A + c A^2) X,
// which take every singular value close to 1 ([Muon]).
static void newton_schulz(real *X,           // [m, n]
                          real *Y,           // [m, n] workspace
                          real *A, real *A2, // [m, m] workspace
                          size_t m, size_t n)
{
    const real a = (real)3.4445, b = (real)-4.7750, c = (real)2.0315;
    for (int step = 0; step < 5; step++) {
        gram(A, X, m, n);
        gram(A2, A, m, m);
        for (size_t i = 0; i < m * m; i++) A2[i] = b * A[i] + c * A2[i];
        gemm(Y, n, 1, A2, m, 1, X, n, 1, m, n, m, SET);
        for (size_t i = 0; i < m * n; i++) X[i] = a * X[i] + Y[i];
    }
}

// One step of Muon on each matrix W, a thread to a matrix; the gradient is taken times g_scale.
//     M = mu M + G,  X = orthogonal(G + mu M),  W -= lr (decay W + 0.2 sqrt(max(rows, cols)) X).
// The factor gives steps the size that AdamW's have, so that one lr does for both (Moonlight, 2.2).
static void muon_step(real *weights, accum *master, accum *momentum, const accum *grads,
                      const Matrix *matrix, size_t matrices, double lr, double mu_, double decay,
                      double g_scale)
{
    (void)weights;
    #pragma omp parallel for schedule(dynamic)
    for (size_t k = 0; k < matrices; k++) {
        Matrix it = matrix[k];
        int tall = it.rows > it.cols; // X is kept wide, m <= n
        size_t m = tall ? it.cols : it.rows, n = tall ? it.rows : it.cols;
        real *X = scratch(2 * m * n + 2 * m * m), *Y = X + m * n, *A = Y + m * n, *A2 = A + m * m;
        accum *M = momentum + it.offset, mu = (accum)mu_, scale = (accum)g_scale, square = 0;
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
}

#endif // not MOE_CUDA

typedef struct {
    int muon;             // for MATRIX tensors; the others always take AdamW
    double lr, adam_lr;   // of Muon, of AdamW
    double beta1, beta2, eps, decay, clip, momentum, bias_speed;
} Recipe;

typedef struct {
    accum *m, *v; // as the weights; m is Muon's momentum where Muon works
    int *load;    // [L + D, E] tokens of each expert since the last step
    long step;    // steps taken
    Matrix *matrix; // those that Muon trains
    Span *span;     // device memory: what AdamW trains, the matrices last
    size_t matrices, spans[2], pieces[2]; // beside Muon and without it
} Optimizer;

static Optimizer optimizer_make(const Model *m)
{
    Optimizer o;
    size_t n = m->layout.elements, E = m->config.E;
    memset(&o, 0, sizeof o);
    o.m = (accum *)device_zeros(n, sizeof(accum));
    o.v = (accum *)device_zeros(n, sizeof(accum));
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

// Forgets the gradients and loads of a step that is not to be taken.
static void optimizer_skip(Optimizer *o, Model *m)
{
    device_zero(m->grads, m->layout.elements * sizeof(accum));
    device_zero(o->load, layers(&m->config) * m->config.E * sizeof(int));
}

static double grad_norm(const Model *m) { return sqrt(sum_squares(m->grads, m->layout.elements)); }

// One step with the gradients that stand in the model, clipped to a global norm; then the routers'
// biases. norm is grad_norm's. Clears the gradients.
static void optimizer_step(Optimizer *o, Model *m, const Recipe *r, double norm)
{
    double g_scale = r->clip > 0 ? fmin(1, r->clip / (norm + 1e-6)) : 1;
    o->step++;
    for (size_t i = 0; i < m->layout.tensors; i++) {
        const Tensor *t = &m->layout.tensor[i];
        accum *bias = m->master + t->offset;
        if (t->kind != ROUTER_BIAS) continue;
        router_bias_step(bias, o->load + (size_t)t->layer * m->config.E, t->cols, r->bias_speed);
        if (has_master(m)) device_copy(m->weights + t->offset, bias, t->cols * sizeof(accum));
    }
    adamw_step(m->weights, m->master, o->m, o->v, m->grads, o->span, o->spans[!r->muon],
               o->pieces[!r->muon], o->step, r->adam_lr, r->beta1, r->beta2, r->eps, r->decay,
               g_scale);
    if (r->muon)
        muon_step(m->weights, m->master, o->m, m->grads, o->matrix, o->matrices, r->lr,
                  r->momentum, r->decay, g_scale);
    device_zero(m->grads, m->layout.elements * sizeof(accum));
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
    LayerActs a;          // of the layer at work
    real **c_kv, **k_pe;  // [L + D] of [slots, capacity, Rkv] and [slots, capacity, Dr]
    real *latent;         // [2, NH, max_rows, Rkv]
    real *hidden;         // [max_rows, C] what the main head saw in the last call
    int *token, *slot, *pos; // [max_rows]
    accum *rope;          // [positions, Dr]
} Decoder;

static void decoder_bind(Decoder *s)
{
    const Config *c = &s->m->config;
    int sets = 0;
    s->arena.used = 0;
    for (size_t l = 0; l < layers(c); l++) {
        size_t rows = size_mul(s->slots, s->capacity);
        s->c_kv[l] = (real *)arena_take(&s->arena, size_mul(rows, c->Rkv), sizeof(real));
        s->k_pe[l] = (real *)arena_take(&s->arena, size_mul(rows, c->Dr), sizeof(real));
        sets |= layer_set(c, l);
    }
    layer_acts_bind(&s->arena, &s->a, c, sets, VALUE, s->max_rows);
    size_t latents = size_mul(2 * s->max_rows, c->NH * c->Rkv);
    s->latent = (real *)arena_take(&s->arena, latents, sizeof(real));
    s->hidden = (real *)arena_take(&s->arena, s->max_rows * c->C, sizeof(real));
    s->token = (int *)arena_take(&s->arena, s->max_rows, sizeof(int));
    s->slot = (int *)arena_take(&s->arena, s->max_rows, sizeof(int));
    s->pos = (int *)arena_take(&s->arena, s->max_rows, sizeof(int));
}

// The plan of a decoder, with arena.used telling its memory; decoder_make allocates it.
// positions: how long a sequence may get.
static Decoder decoder_plan(const Model *m, size_t slots, size_t window, size_t max_rows,
                            size_t positions)
{
    Decoder s;
    memset(&s, 0, sizeof s);
    s.m = m;
    s.window = window;
    s.capacity = window + max_rows; // new rows must not push out what the first of them sees
    s.max_rows = max_rows;
    s.positions = positions;
    if (positions > INT_MAX)
        die(BAD_INPUT, "--tokens: a text of %zu tokens; at most %d are taken", positions, INT_MAX);
    s.c_kv = (real **)host_alloc(layers(&m->config), sizeof(real *));
    s.k_pe = (real **)host_alloc(layers(&m->config), sizeof(real *));
    s.slots = slots;
    decoder_bind(&s);
    return s;
}

static Decoder decoder_make(const Model *m, size_t slots, size_t window, size_t max_rows,
                            size_t positions)
{
    Decoder s = decoder_plan(m, slots, window, max_rows, positions);
    s.arena.base = (char *)device_alloc(s.arena.used);
    decoder_bind(&s);
    s.rope = rope_table(&m->config, positions);
    return s;
}

static void decoder_free(Decoder *s)
{
    device_free(s->arena.base);
    device_free(s->rope);
    free(s->c_kv);
    free(s->k_pe);
}

// block_forward with the cache in attention's place: a.x -> a.y.
static void decode_block(Decoder *s, size_t l, size_t n)
{
    const Config *c = &s->m->config;
    const LayerWeights *w = &s->m->layer[l];
    LayerActs *a = &s->a;
    size_t C = c->C, NH = c->NH, Rkv = c->Rkv;
    size_t Dn = c->Dn, Dr = c->Dr, Dv = c->Dv;
    rmsnorm_forward(a->xn, a->rstd_x, a->x, w->attn_norm, n, C, C, C, c->eps);
    mla_project(a, w, c, s->pos, s->rope, n);
    cache_store(s->c_kv[l], a->c_kv, s->slot, s->pos, n, Rkv, s->capacity);
    cache_store(s->k_pe[l], a->k_pe, s->slot, s->pos, n, Dr, s->capacity);
    latent_attention(a->o, s->latent, a->q, w->wkv_b, s->c_kv[l], s->k_pe[l], s->slot, s->pos, n,
                     NH, Dn, Dr, Dv, Rkv, s->capacity, s->window, attention_scale(c));
    device_copy(a->h, a->x, n * C * sizeof(real));
    matmul_forward(a->h, a->o, w->wo, all_rows(n), C, NH * Dv, ADD);
    rmsnorm_forward(a->hn, a->rstd_h, a->h, w->ffn_norm, n, C, C, C, c->eps);
    ffn_forward(a, w, c, n);
}

// Runs n <= max_rows tokens through the main model. Leaves logits in a.logits [n, V] and what the
// head saw in hidden [n, C].
static void decode(Decoder *s, const int *token, const int *slot, const int *pos, size_t n)
{
    const Config *c = &s->m->config;
    size_t C = c->C;
    to_device(s->token, token, n * sizeof(int));
    to_device(s->slot, slot, n * sizeof(int));
    to_device(s->pos, pos, n * sizeof(int));
    embedding_forward(s->a.x, s->token, s->m->w.embed, n, C);
    for (size_t l = 0; l < c->L; l++) {
        decode_block(s, l, n);
        if (l == c->L - 1) break;
        real *swap = s->a.x;
        s->a.x = s->a.y;
        s->a.y = swap;
    }
    head_forward(s->m, &s->a, 0, n);
    device_copy(s->hidden, s->a.out, n * C * sizeof(real));
}

// Runs the first MTP depth on the first n rows of the last decode(); next[i] is the token after
// row i's. Leaves the logits of the token after that one in a.logits [n, V].
static void decode_mtp(Decoder *s, const int *next, size_t n)
{
    const Config *c = &s->m->config;
    to_device(s->token, next, n * sizeof(int));
    device_copy(s->a.h_prev, s->hidden, n * c->C * sizeof(real));
    mtp_forward(&s->a, &s->m->layer[c->L], s->m->w.embed, s->token, c, n);
    decode_block(s, c->L, n);
    head_forward(s->m, &s->a, 1, n);
}

typedef struct {
    double temperature; // 0: always the likeliest token
    int top_k;          // only the k likeliest; 0: all
    double top_p;       // only the fewest likeliest tokens that together have this probability
    uint64_t seed;
} Sampler;

typedef struct {
    double p;
    int token;
} Choice;

static int compare_choices(const void *x, const void *y)
{
    const Choice *a = (const Choice *)x, *b = (const Choice *)y;
    return a->p > b->p ? -1 : a->p < b->p ? 1 : a->token - b->token;
}

// Draws a token from logits [V] in host memory. `at` numbers the draw: the same seed, place and
// logits give the same token, however the logits were come by.
static int sample_token(const Sampler *s, const accum *logits, size_t V, uint64_t at)
{
    size_t best = 0;
    for (size_t v = 0; v < V; v++) {
        if (!isfinite((double)logits[v]))
            die(FAILED, "a logit is not a finite number: the model's weights are damaged");
        if (logits[v] > logits[best]) best = v;
    }
    if (s->temperature <= 0) return (int)best;
    Choice *choice = (Choice *)host_alloc(V, sizeof(Choice));
    double sum = 0, kept = 0;
    for (size_t v = 0; v < V; v++) {
        choice[v].p = exp(((double)logits[v] - (double)logits[best]) / s->temperature);
        choice[v].token = (int)v;
        sum += choice[v].p;
    }
    qsort(choice, V, sizeof(Choice), compare_choices);
    size_t n = s->top_k > 0 ? min_size(V, (size_t)s->top_k) : V;
    for (size_t i = 0; i < n; i++) {
        kept += choice[i].p;
        if (kept >= s->top_p * sum) n = i + 1;
    }
    double u = random_uniform(s->seed, 0, at) * kept;
    size_t i = 0;
    while (i + 1 < n && u >= choice[i].p) u -= choice[i++].p;
    int token = choice[i].token;
    free(choice);
    return token;
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
                text[length] = sample_token(sampler, logits, V, length);
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
            Sampler likeliest = {0, 0, 1, 0};
            draft = done + 1 == length ? sample_token(&likeliest, logits, V, 0) : -1;
        }
    }
    g.generated = length - prompt;
    g.seconds = now() - start;
    free(rows);
    free(logits);
    return g;
}

// ------------------------------------------------------------------------------------------------
// 8  Files

// Opens a regular file; opening a pipe could wait for ever.
static FILE *open_file(const char *path, size_t *size)
{
    struct stat st;
    FILE *f = NULL;
    if (!stat(path, &st)) {
        if (!S_ISREG(st.st_mode)) die(BAD_INPUT, "%s: not a regular file", path);
        f = fopen(path, "rb");
    }
    if (!f) die(BAD_INPUT, "%s: cannot open: %s", path, strerror(errno));
    *size = (size_t)st.st_size;
    return f;
}

// The whole file, with a 0 after it; at most `most` bytes.
static char *read_file(const char *path, size_t *size, size_t most)
{
    FILE *f = open_file(path, size);
    if (*size > most)
        die(BAD_INPUT, "%s: %zu bytes is too large; at most %zu are taken", path, *size, most);
    char *data = (char *)host_alloc(*size + 1, 1);
    if (fread(data, 1, *size, f) != *size)
        die(BAD_INPUT, "%s: cannot read: %s", path, ferror(f) ? strerror(errno) : "it got shorter");
    if (fclose(f)) die(BAD_INPUT, "%s: cannot close: %s", path, strerror(errno));
    return data;
}

static char *path_join(const char *directory, const char *name)
{
    size_t n = strlen(directory) + strlen(name) + 2;
    char *path = (char *)host_alloc(n, 1);
    snprintf(path, n, "%s/%s", directory, name);
    return path;
}

// JSON, strictly as RFC 8259 has it, at most JSON_DEPTH deep, no key twice. A string's text lies in
// the parsed buffer, its escapes replaced and a 0 after it; all values lie in one array.
enum { JSON_DEPTH = 32 };
enum JsonType {
    JSON_NULL, JSON_FALSE, JSON_TRUE, JSON_NUMBER, JSON_STRING, JSON_ARRAY, JSON_OBJECT
};

typedef struct Json {
    enum JsonType type;
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

static void json_space(Parser *p)
{
    while (*p->at && strchr(" \t\r\n", *p->at)) p->at++;
}

static int json_take(Parser *p, const char *word)
{
    size_t n = strlen(word);
    if ((size_t)(p->end - p->at) < n || memcmp(p->at, word, n)) return 0;
    p->at += n;
    return 1;
}

static unsigned json_hex4(Parser *p)
{
    unsigned value = 0;
    for (int i = 0; i < 4; i++, p->at++) {
        if (!isxdigit((unsigned char)*p->at)) json_fail(p, "\\u needs four hexadecimal digits");
        int digit = tolower((unsigned char)*p->at);
        value = value * 16 + (unsigned)(digit <= '9' ? digit - '0' : digit - 'a' + 10);
    }
    return value;
}

static char *utf8_put(char *to, unsigned code)
{
    static const unsigned first[5] = {0, 0, 0xC0, 0xE0, 0xF0};
    int bytes = code < 0x80 ? 1 : code < 0x800 ? 2 : code < 0x10000 ? 3 : 4;
    for (int i = bytes - 1; i > 0; i--, code >>= 6) to[i] = (char)(0x80 | (code & 0x3F));
    to[0] = (char)(first[bytes] | code);
    return to + bytes;
}

// Length of the UTF-8 character at s, 0 if there is none: no overlong forms, no surrogates.
static int utf8_length(const char *s)
{
    const unsigned char *u = (const unsigned char *)s;
    int n = u[0] < 0x80 ? 1 : u[0] >> 5 == 6 ? 2 : u[0] >> 4 == 14 ? 3 : u[0] >> 3 == 30 ? 4 : 0;
    unsigned code = n == 2 ? u[0] & 0x1F : n == 3 ? u[0] & 0x0F : u[0] & 0x07;
    for (int i = 1; i < n; i++) {
        if (u[i] >> 6 != 2) return 0;
        code = code << 6 | (u[i] & 0x3F);
    }
    if (n > 1 && (code < (n == 2 ? 0x80u : n == 3 ? 0x800u : 0x10000u) || code > 0x10FFFF ||
                  (code >= 0xD800 && code < 0xE000)))
        return 0;
    return n;
}

static char *json_string(Parser *p)
{
    if (!json_take(p, "\"")) json_fail(p, "expected a string");
    char *start = p->at, *to = start;
    while (*p->at != '"') {
        if ((unsigned char)*p->at < 0x20) json_fail(p, "a string ends in a control character");
        if (*p->at != '\\') {
            int n = utf8_length(p->at);
            if (!n) json_fail(p, "not UTF-8");
            while (n--) *to++ = *p->at++;
            continue;
        }
        p->at++;
        static const char from[] = "\"\\/bfnrt", into[] = "\"\\/\b\f\n\r\t";
        const char *escape = *p->at ? strchr(from, *p->at) : NULL;
        if (escape) {
            *to++ = into[escape - from];
            p->at++;
        } else if (*p->at == 'u') {
            p->at++;
            unsigned code = json_hex4(p);
            if (code >= 0xD800 && code < 0xDC00) { // first half of a pair
                unsigned low = json_take(p, "\\u") ? json_hex4(p) : 0;
                if (low < 0xDC00 || low >= 0xE000) json_fail(p, "half a surrogate pair");
                code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
            } else if (code == 0 || (code >= 0xDC00 && code < 0xE000)) {
                json_fail(p, "\\u0000 and lone surrogates are not taken");
            }
            to = utf8_put(to, code);
        } else {
            json_fail(p, "unknown escape");
        }
    }
    p->at++;
    *to = 0; // never beyond the closing quote
    return start;
}

static double json_number(Parser *p)
{
    char *s = p->at, *digits;
    if (*s == '-') s++;
    if (*s == '0') s++;
    else
        for (digits = s; isdigit((unsigned char)*s) || s == digits; s++)
            if (!isdigit((unsigned char)*s)) json_fail(p, "expected a value");
    if (*s == '.')
        for (digits = ++s; isdigit((unsigned char)*s) || s == digits; s++)
            if (!isdigit((unsigned char)*s)) json_fail(p, "expected a digit after the point");
    if (*s == 'e' || *s == 'E') {
        s++;
        if (*s == '+' || *s == '-') s++;
        for (digits = s; isdigit((unsigned char)*s) || s == digits; s++)
            if (!isdigit((unsigned char)*s)) json_fail(p, "expected a digit in the exponent");
    }
    double value = strtod(p->at, NULL);
    if (!isfinite(value)) json_fail(p, "the number is out of range");
    p->at = s;
    return value;
}

static int compare_keys(const void *x, const void *y)
{
    return strcmp(*(char *const *)x, *(char *const *)y);
}

static void json_unique_keys(const Parser *p, const Json *object)
{
    char **key = (char **)host_alloc(object->length, sizeof(char *));
    size_t n = 0;
    for (const Json *j = object->child; j; j = j->next) key[n++] = j->key;
    qsort(key, n, sizeof(char *), compare_keys);
    for (size_t i = 1; i < n; i++)
        if (!strcmp(key[i - 1], key[i]))
            die(BAD_INPUT, "%s: \"%s\" appears twice", p->file, key[i]);
    free(key);
}

static Json *json_value(Parser *p, int depth)
{
    Json *j = p->next++;
    if (depth > JSON_DEPTH) json_fail(p, "nested too deeply");
    if (*p->at == '{' || *p->at == '[') {
        char close = *p->at == '{' ? '}' : ']';
        Json **last = &j->child;
        j->type = close == '}' ? JSON_OBJECT : JSON_ARRAY;
        p->at++;
        json_space(p);
        while (j->length > 0 || *p->at != close) {
            char *key = NULL;
            if (j->type == JSON_OBJECT) {
                key = json_string(p);
                json_space(p);
                if (!json_take(p, ":")) json_fail(p, "expected ':'");
                json_space(p);
            }
            *last = json_value(p, depth + 1);
            (*last)->key = key;
            last = &(*last)->next;
            j->length++;
            json_space(p);
            if (*p->at == close) break;
            if (!json_take(p, ",")) json_fail(p, "expected ',' or the closing bracket");
            json_space(p);
        }
        p->at++;
        if (j->type == JSON_OBJECT) json_unique_keys(p, j);
    } else if (*p->at == '"') {
        j->type = JSON_STRING;
        j->string = json_string(p);
    } else if (json_take(p, "null")) {
        j->type = JSON_NULL;
    } else if (json_take(p, "true")) {
        j->type = JSON_TRUE;
    } else if (json_take(p, "false")) {
        j->type = JSON_FALSE;
    } else {
        j->type = JSON_NUMBER;
        j->number = json_number(p);
    }
    return j;
}

// Parses text[0 .. size), which a 0 follows; file is named in errors. One free() frees it all.
static Json *json_parse(const char *file, char *text, size_t size)
{
    size_t most = 1; // each value but the first follows one of these
    for (size_t i = 0; i < size; i++) most += text[i] == ',' || text[i] == '[' || text[i] == '{';
    Parser p = {file, text, text, text + size, (Json *)host_alloc(most, sizeof(Json))};
    json_space(&p);
    Json *j = json_value(&p, 0);
    json_space(&p);
    if (p.at != p.end) json_fail(&p, "something follows the value");
    if (j->type != JSON_OBJECT) die(BAD_INPUT, "%s: expected a JSON object", file);
    return j;
}

static const Json *json_get(const Json *object, const char *key)
{
    for (const Json *j = object->child; j; j = j->next)
        if (!strcmp(j->key, key)) return j;
    return NULL;
}

static double config_number(const Json *j, const char *file, const char *key)
{
    if (j->type == JSON_NULL) return 0; // "q_lora_rank": null
    if (j->type != JSON_NUMBER) die(BAD_INPUT, "%s: %s must be a number", file, key);
    return j->number;
}

// A whole number from 0 to most; *absent stands in for a key that may be missing.
static size_t config_size(const Json *object, const char *file, const char *key, int most,
                          const size_t *absent)
{
    const Json *j = json_get(object, key);
    if (!j && !absent) die(BAD_INPUT, "%s: %s is missing", file, key);
    if (j && most == 1 && (j->type == JSON_TRUE || j->type == JSON_FALSE))
        return j->type == JSON_TRUE;
    double x = j ? config_number(j, file, key) : (double)*absent;
    if (!(x >= 0 && x <= most && x == floor(x)))
        die(BAD_INPUT, "%s: %s is %g; it must be a whole number from 0 to %d", file, key, x, most);
    return (size_t)x;
}

// Dies if a key that this program knows in one sense only says another.
static void config_expect(const Json *object, const char *file, const char *key, const char *value)
{
    const Json *j = json_get(object, key);
    if (!j) return;
    const char *is = j->type == JSON_STRING ? j->string : j->type == JSON_TRUE ? "true" :
                     j->type == JSON_FALSE ? "false" : "something else";
    if (strcmp(is, value))
        die(BAD_INPUT, "%s: %s is %s; this program knows only %s", file, key, is, value);
}

enum { FP8_BLOCK = 128 }; // rows, and columns, that share a scale: [V3] 3.3.2

// YaRN is in "rope_scaling" and the base beside it; transformers 5 has "rope_parameters", the base
// inside and rope_type "default" where there is no YaRN.
static void rope_from_json(Config *c, const Json *j, const char *file)
{
    const Json *rope = json_get(j, "rope_scaling");
    if (!rope || rope->type == JSON_NULL) rope = json_get(j, "rope_parameters");
    if (!rope || rope->type == JSON_NULL) return;
    if (rope->type != JSON_OBJECT) die(BAD_INPUT, "%s: %s must be an object", file, rope->key);
    const Json *type = json_get(rope, json_get(rope, "rope_type") ? "rope_type" : "type");
    int yarn = type ? type->type != JSON_STRING || strcmp(type->string, "default") != 0
                    : json_get(rope, "factor") != NULL;
    if (yarn) {
        config_expect(rope, file, "type", "yarn");
        config_expect(rope, file, "rope_type", "yarn");
        c->yarn_factor = 1, c->yarn_original = 4096, c->yarn_fast = 32, c->yarn_slow = 1;
        c->yarn_mscale = 1, c->yarn_mscale_all_dim = 0;
    }
    for (const Json *k = rope->child; k; k = k->next) {
        const char *name = k->key;
        if (k->type == JSON_NULL || !strcmp(name, "type") || !strcmp(name, "rope_type")) continue;
        if (!strcmp(name, "rope_theta")) c->theta = config_number(k, file, name);
#define READ_YARN(symbol, key, ...) \
        else if (yarn && !strcmp(name, #key)) c->symbol = config_number(k, file, name);
        CONFIG_YARN(READ_YARN)
        else die(BAD_INPUT, "%s: %s: %s is not known here", file, rope->key, name);
    }
}

static Config config_from_json(const Json *j, const char *file)
{
    Config c = config_preset(LAPTOP);
    c.D = c.Rq = 0; // an optional key that is absent says none, 1 group, normed weights
    c.alpha = 0;
#define READ_SIZE(symbol, key, most, ...) \
    c.symbol = config_size(j, file, #key, most, \
                           &c.symbol == &c.D || &c.symbol == &c.Rq || &c.symbol == &c.G || \
                           &c.symbol == &c.KG || &c.symbol == &c.norm_topk ? &c.symbol : NULL);
#define READ_REAL(symbol, key, ...) \
    if (json_get(j, #key)) c.symbol = config_number(json_get(j, #key), file, #key);
    CONFIG_SIZES(READ_SIZE)
    CONFIG_REALS(READ_REAL)
    rope_from_json(&c, j, file);
    if (c.E == 0) c.dense = c.L; // for transformers, that decides by it alone
    config_expect(j, file, "model_type", "deepseek_v3");
    config_expect(j, file, "scoring_func", "sigmoid");
    config_expect(j, file, "topk_method", "noaux_tc");
    config_expect(j, file, "seq_aux", "true");
    config_expect(j, file, "hidden_act", "silu");
    config_expect(j, file, "attention_bias", "false");
    config_expect(j, file, "rope_interleave", "true");
    config_expect(j, file, "tie_word_embeddings", "false");
    const Json *fp8 = json_get(j, "quantization_config"); // how stored_read takes FP8 weights
    if (fp8 && fp8->type == JSON_OBJECT) {
        const Json *block = json_get(fp8, "weight_block_size");
        config_expect(fp8, file, "quant_method", "fp8");
        config_expect(fp8, file, "fmt", "e4m3");
        if (!block || block->length != 2 || block->child->number != FP8_BLOCK ||
            block->child->next->number != FP8_BLOCK)
            die(BAD_INPUT, "%s: quantization_config: weight_block_size must be [%d, %d]", file,
                FP8_BLOCK, FP8_BLOCK);
    } else if (fp8 && fp8->type != JSON_NULL) {
        die(BAD_INPUT, "%s: quantization_config must be an object", file);
    }
    const Json *heads = json_get(j, "num_key_value_heads"), *freq = json_get(j, "moe_layer_freq");
    if (heads && heads->type != JSON_NULL &&
        config_number(heads, file, "num_key_value_heads") != (double)c.NH)
        die(BAD_INPUT, "%s: num_key_value_heads must equal num_attention_heads, %zu", file, c.NH);
    if (freq && config_number(freq, file, "moe_layer_freq") != 1)
        die(BAD_INPUT, "%s: moe_layer_freq must be 1", file);
    config_check(&c, file);
    return c;
}

static Config config_load(const char *path)
{
    size_t size;
    char *text = read_file(path, &size, 1 << 20);
    Json *j = json_parse(path, text, size);
    Config c = config_from_json(j, path);
    free(j);
    free(text);
    return c;
}

// A file that takes its name only when it is whole and on the disk, so that whoever looks finds the
// old one or the new one. Any error ends the program with the old one in place.
typedef struct {
    FILE *f;
    char *path, *temporary;
} Output;

static Output output_open(const char *path)
{
    Output o;
    size_t n = strlen(path) + 5;
    o.path = (char *)host_alloc(n, 1);
    o.temporary = (char *)host_alloc(n, 1);
    snprintf(o.path, n, "%s", path);
    snprintf(o.temporary, n, "%s.tmp", path);
    o.f = fopen(o.temporary, "wb");
    if (!o.f)
        die(BAD_INPUT, "%s: cannot write: %s; choose another directory", o.temporary,
            strerror(errno));
    return o;
}

static void output_fail(const Output *o)
{
    int error = errno;
    remove(o->temporary);
    die(FAILED, "%s: cannot write: %s; what stood there before is unharmed", o->path,
        strerror(error));
}

static void output_write(const Output *o, const void *data, size_t bytes)
{
    if (fwrite(data, 1, bytes, o->f) != bytes) output_fail(o);
}

static void output_close(Output *o)
{
    if (fflush(o->f) || fsync(fileno(o->f))) output_fail(o);
    if (fclose(o->f)) output_fail(o);
    if (rename(o->temporary, o->path)) output_fail(o);
    char *slash = strrchr(o->path, '/'); // the rename, too, is on the disk only after an fsync
    if (slash) slash[slash == o->path] = 0;
    int directory = open(slash ? o->path : ".", O_RDONLY);
    if (directory >= 0) {
        fsync(directory); // some file systems refuse; there is no more to be done then
        close(directory);
    }
    free(o->path);
    free(o->temporary);
}

// A real number as Python's json writes it: transformers takes no 1 where it expects 1.0.
static const char *json_real(char room[32], double x)
{
    snprintf(room, 30, "%.17g", x);
    return strpbrk(room, ".e") ? room : strcat(room, ".0");
}

static void config_save(const Config *c, const char *directory)
{
    char *path = path_join(directory, "config.json"), text[8192], room[32];
    Output o = output_open(path);
    int n = snprintf(text, sizeof text, "{\n  \"architectures\": [\"DeepseekV3ForCausalLM\"],\n"
                     "  \"model_type\": \"deepseek_v3\",\n  \"torch_dtype\": \"float32\",\n");
#define PRINT(...) n += snprintf(text + n, sizeof text - (size_t)n, __VA_ARGS__)
#define PRINT_SIZE(symbol, key, ...) \
    if (!strcmp(#key, "norm_topk_prob")) \
        PRINT("  \"%s\": %s,\n", #key, c->symbol ? "true" : "false"); \
    else if (!strcmp(#key, "q_lora_rank") && !c->symbol) PRINT("  \"%s\": null,\n", #key); \
    else PRINT("  \"%s\": %zu,\n", #key, c->symbol);
#define PRINT_REAL(symbol, key, ...) PRINT("  \"%s\": %s,\n", #key, json_real(room, c->symbol));
    CONFIG_SIZES(PRINT_SIZE)
    CONFIG_REALS(PRINT_REAL)
    if (c->yarn_factor > 0) {
        PRINT("  \"rope_scaling\": {\n");
#define PRINT_YARN(symbol, key, ...) \
        if (&c->symbol == &c->yarn_original) PRINT("    \"%s\": %.17g,\n", #key, c->symbol); \
        else PRINT("    \"%s\": %s,\n", #key, json_real(room, c->symbol));
        CONFIG_YARN(PRINT_YARN)
        PRINT("    \"type\": \"yarn\"\n  },\n");
    } else {
        PRINT("  \"rope_scaling\": null,\n");
    }
    PRINT("  \"num_key_value_heads\": %zu,\n  \"moe_layer_freq\": 1,\n"
          "  \"scoring_func\": \"sigmoid\",\n  \"topk_method\": \"noaux_tc\",\n"
          "  \"seq_aux\": true,\n  \"hidden_act\": \"silu\",\n  \"attention_bias\": false,\n"
          "  \"tie_word_embeddings\": false\n}\n", c->NH);
    output_write(&o, text, (size_t)n);
    output_close(&o);
    free(path);
}

// Appends text to a JSON string that is being written at `to`, escaped. Returns the end.
static char *json_escape(char *to, const char *text)
{
    for (int n; *text; text += n) {
        n = utf8_length(text);
        if (!n) die(BAD_INPUT, "'%s' is not UTF-8", text);
        if (n == 1 && (*text == '"' || *text == '\\' || (unsigned char)*text < 0x20))
            to += snprintf(to, 7, "\\u%04x", (unsigned)*text);
        else
            for (int i = 0; i < n; i++) *to++ = text[i];
    }
    *to = 0;
    return to;
}

// safetensors: 8 bytes of header length, a JSON header, the data. What is to be written:
typedef struct {
    char name[NAME_MAX_LENGTH];
    size_t shape[3], dims;
    const accum *data; // device memory
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

// metadata: further members of the header's "__metadata__", each after a comma.
static void safetensors_save(const char *path, const char *metadata, const Entry *entry, size_t n)
{
    size_t room = 64 + strlen(metadata) + n * (NAME_MAX_LENGTH + 160), length, at = 0, largest = 0;
    char *header = (char *)host_alloc(room, 1);
    length = (size_t)snprintf(header, room, "{\"__metadata__\":{\"format\":\"pt\"%s}", metadata);
    for (size_t i = 0; i < n; i++) {
        const Entry *e = &entry[i];
        size_t size = entry_size(e);
        char shape[64];
        shape_text(shape, e->shape, e->dims);
        length += (size_t)snprintf(header + length, room - length, ",\"%s\":{\"dtype\":\"F32\","
                                   "\"shape\":[%s],\"data_offsets\":[%zu,%zu]}", e->name, shape, at,
                                   at + 4 * size);
        at += 4 * size;
        if (size > largest) largest = size;
    }
    header[length++] = '}';
    while (length % 8) header[length++] = ' ';
    unsigned char prefix[8];
    for (int i = 0; i < 8; i++) prefix[i] = (unsigned char)((uint64_t)length >> 8 * i);
    Output o = output_open(path);
    output_write(&o, prefix, 8);
    output_write(&o, header, length);
    accum *host = (accum *)host_alloc(largest, sizeof(accum));
    float *single = (float *)host_alloc(largest, sizeof(float));
    for (size_t i = 0; i < n; i++) {
        size_t size = entry_size(&entry[i]);
        to_host(host, entry[i].data, size * sizeof(accum));
        for (size_t j = 0; j < size; j++) single[j] = (float)host[j];
        output_write(&o, single, size * sizeof(float));
    }
    output_close(&o);
    free(header);
    free(host);
    free(single);
}

static size_t count_entries(const Layout *layout)
{
    size_t n = 0;
    for (size_t i = 0; i < layout->tensors; i++) n += layout->tensor[i].count;
    return n;
}

// Lists the layout's tensors for saving, each expert's by its own name; data holds all of them.
// Returns where the list ends.
static Entry *entries_add(Entry *e, const Layout *layout, const char *prefix, const accum *data)
{
    for (size_t i = 0; i < layout->tensors; i++) {
        const Tensor *t = &layout->tensor[i];
        for (size_t k = 0; k < t->count; k++, e++) {
            tensor_name(e->name, prefix, t, k);
            e->dims = tensor_dims(t);
            e->shape[0] = e->dims == 1 ? t->cols : t->rows;
            e->shape[1] = t->cols;
            e->data = data + t->offset + k * t->rows * t->cols;
        }
    }
    return e;
}

static void make_directory(const char *path)
{
    if (mkdir(path, 0777) == 0) return;
    struct stat st;
    if (errno == ENOENT && strchr(path, '/')) { // make the parents first
        char *parent = path_join(path, "");
        parent[strlen(path)] = 0;
        *strrchr(parent, '/') = 0;
        if (*parent) make_directory(parent);
        free(parent);
        if (mkdir(path, 0777) == 0) return;
    }
    if (errno != EEXIST || stat(path, &st) || !S_ISDIR(st.st_mode))
        die(BAD_INPUT, "%s: cannot make this directory: %s; choose another with --out", path,
            strerror(errno == EEXIST ? ENOTDIR : errno));
}

// Writes config.json and model.safetensors.
static void model_save(const Model *m, const char *directory)
{
    size_t n = count_entries(&m->layout);
    Entry *entry = (Entry *)host_alloc(n, sizeof(Entry));
    make_directory(directory);
    config_save(&m->config, directory);
    entries_add(entry, &m->layout, "", m->master);
    char *path = path_join(directory, "model.safetensors");
    safetensors_save(path, "", entry, n);
    free(path);
    free(entry);
}

// One safetensors file that is being read.
typedef struct {
    char *path, *text;
    const char *name;   // the path's last part
    FILE *f;
    Json *header;
    size_t begin, size; // of the data
} Shard;

static Shard shard_open(const char *directory, const char *name)
{
    Shard s;
    unsigned char prefix[8];
    uint64_t length = 0;
    s.path = path_join(directory, name);
    s.name = strrchr(s.path, '/') + 1;
    s.f = open_file(s.path, &s.size);
    if (s.size < 8 || fread(prefix, 1, 8, s.f) != 8)
        die(BAD_INPUT, "%s: not a safetensors file: shorter than 8 bytes", s.path);
    for (int i = 0; i < 8; i++) length |= (uint64_t)prefix[i] << 8 * i;
    if (length > s.size - 8 || length > 100 << 20)
        die(BAD_INPUT, "%s: not a safetensors file, or truncated: a header of %llu bytes in a file "
            "of %zu", s.path, (unsigned long long)length, s.size);
    s.begin = 8 + (size_t)length;
    s.size -= s.begin;
    s.text = (char *)host_alloc((size_t)length + 1, 1);
    if (fread(s.text, 1, (size_t)length, s.f) != length)
        die(BAD_INPUT, "%s: cannot read the header", s.path);
    s.header = json_parse(s.path, s.text, (size_t)length);
    return s;
}

static void shard_close(Shard *s)
{
    if (fclose(s->f)) die(BAD_INPUT, "%s: cannot close: %s", s->path, strerror(errno));
    free(s->header);
    free(s->text);
    free(s->path);
}

// A tensor as a header describes it.
typedef struct {
    const char *name;
    const Shard *shard;
    size_t shape[2], dims, begin, end; // begin, end: of its data
    int dtype, indexed, used;
} Stored;

enum { F32, BF16, F16, F8_E4M3, DTYPES };
static const char *const dtype_names[DTYPES] = {"F32", "BF16", "F16", "F8_E4M3"};
static const size_t dtype_sizes[DTYPES] = {4, 2, 2, 1};

static size_t header_size(const Shard *s, const Json *j, const char *tensor)
{
    if (j->type != JSON_NUMBER || j->number < 0 || j->number >= 0x1p53 ||
        j->number != floor(j->number))
        die(BAD_INPUT, "%s: %s: sizes and offsets must be whole numbers below 2^53", s->path,
            tensor);
    return (size_t)j->number;
}

static Stored stored_parse(const Shard *s, const Json *j)
{
    Stored t;
    const Json *dtype = NULL, *shape = NULL, *offsets = NULL;
    memset(&t, 0, sizeof t);
    t.name = j->key;
    t.shard = s;
    if (j->type == JSON_OBJECT) {
        dtype = json_get(j, "dtype");
        shape = json_get(j, "shape");
        offsets = json_get(j, "data_offsets");
    }
    if (!dtype || dtype->type != JSON_STRING || !shape || shape->type != JSON_ARRAY || !offsets ||
        offsets->type != JSON_ARRAY || offsets->length != 2)
        die(BAD_INPUT, "%s: %s: needs a dtype, a shape and two data_offsets", s->path, t.name);
    for (t.dtype = 0; t.dtype < DTYPES; t.dtype++)
        if (!strcmp(dtype->string, dtype_names[t.dtype])) break;
    if (t.dtype == DTYPES)
        die(BAD_INPUT, "%s: %s: dtype %s is not read; F32, BF16, F16 and F8_E4M3 are", s->path,
            t.name, dtype->string);
    t.begin = header_size(s, offsets->child, t.name);
    t.end = header_size(s, offsets->child->next, t.name);
    size_t n = dtype_sizes[t.dtype];
    t.dims = shape->length;
    if (t.dims < 1 || t.dims > 2)
        die(BAD_INPUT, "%s: %s: has %zu dimensions; 1 or 2 are expected", s->path, t.name, t.dims);
    const Json *size = shape->child;
    for (size_t d = 0; d < t.dims; d++, size = size->next) {
        t.shape[d] = header_size(s, size, t.name);
        n = t.shape[d] && n > SIZE_MAX / t.shape[d] ? SIZE_MAX : n * t.shape[d];
    }
    if (t.begin > t.end || t.end > s->size || t.end - t.begin != n)
        die(BAD_INPUT, "%s: %s: its shape needs %zu bytes, its offsets are [%zu, %zu] and the file "
            "has %zu of data", s->path, t.name, n, t.begin, t.end, s->size);
    return t;
}

static int compare_names(const void *x, const void *y)
{
    return strcmp(((const Stored *)x)->name, ((const Stored *)y)->name);
}

static int compare_places(const void *x, const void *y)
{
    const Stored *a = (const Stored *)x, *b = (const Stored *)y;
    if (a->begin != b->begin) return a->begin < b->begin ? -1 : 1;
    return a->end < b->end ? -1 : a->end > b->end; // an empty tensor before what begins there too
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
    for (size_t i = 0; i < shards; i++) {
        size_t first = c.n, end = 0;
        for (const Json *j = shard[i].header->child; j; j = j->next)
            if (strcmp(j->key, "__metadata__")) c.stored[c.n++] = stored_parse(&shard[i], j);
        qsort(c.stored + first, c.n - first, sizeof(Stored), compare_places);
        for (const Stored *t = c.stored + first; t < c.stored + c.n; end = t++->end)
            if (t->begin != end)
                die(BAD_INPUT, "%s: %s: its data [%zu, %zu] overlaps or leaves a gap",
                    shard[i].path, t->name, t->begin, t->end);
        if (end != shard[i].size)
            die(BAD_INPUT, "%s: leaves a gap of %zu bytes after its last tensor", shard[i].path,
                shard[i].size - end);
    }
    qsort(c.stored, c.n, sizeof(Stored), compare_names);
    for (size_t i = 1; i < c.n; i++)
        if (!strcmp(c.stored[i - 1].name, c.stored[i].name))
            die(BAD_INPUT, "%s: %s: stands in %s too", c.stored[i].shard->path, c.stored[i].name,
                c.stored[i - 1].shard->path);
    return c;
}

static Stored *checkpoint_find(const Checkpoint *c, const char *name) // NULL: there is none
{
    Stored key;
    key.name = name;
    return c->n ? (Stored *)bsearch(&key, c->stored, c->n, sizeof key, compare_names) : NULL;
}

static float half_to_float(uint16_t h)
{
    int exponent = h >> 10 & 31, mantissa = h & 1023;
    float x = exponent == 31 ? (mantissa ? NAN : INFINITY)
              : exponent     ? ldexpf((float)(mantissa + 1024), exponent - 25)
                             : ldexpf((float)mantissa, -24);
    return h >> 15 ? -x : x;
}

static float e4m3_to_float(unsigned char b) // a half with a shorter exponent; all ones: NaN
{
    if ((b & 0x7F) == 0x7F) return NAN;
    return 256 * half_to_float((uint16_t)((b & 0x80) << 8 | (b & 0x7F) << 7));
}

// Reads a stored tensor; dies on a number that is not finite. scale: of each block of an FP8 one.
static void stored_read(const Stored *t, const Stored *scale, accum *to)
{
    const Shard *s = t->shard;
    size_t size = dtype_sizes[t->dtype], n = (t->end - t->begin) / size;
    size_t cols = t->shape[t->dims - 1], across = ceil_div(cols, FP8_BLOCK);
    unsigned char *raw = (unsigned char *)host_alloc(n, size);
    accum *scales = NULL;
    if (scale) {
        scales = (accum *)host_alloc(scale->shape[0] * scale->shape[1], sizeof(accum));
        stored_read(scale, NULL, scales);
    }
    if (fseeko(s->f, (off_t)(s->begin + t->begin), SEEK_SET) || fread(raw, size, n, s->f) != n)
        die(BAD_INPUT, "%s: %s: cannot read its data", s->path, t->name);
    for (size_t i = 0; i < n; i++) {
        const unsigned char *b = raw + i * size; // little-endian
        union { uint32_t u; float f; } x;
        if (t->dtype == F32)
            x.u =
                (uint32_t)b[0] | (uint32_t)b[1] << 8 | (uint32_t)b[2] << 16 | (uint32_t)b[3] << 24;
        else if (t->dtype == BF16)
            x.u = (uint32_t)b[0] << 16 | (uint32_t)b[1] << 24;
        else if (t->dtype == F16)
            x.f = half_to_float((uint16_t)(b[0] | b[1] << 8));
        else
            x.f = e4m3_to_float(b[0]) *
                  (float)scales[i / cols / FP8_BLOCK * across + i % cols / FP8_BLOCK];
        if (!isfinite(x.f))
            die(BAD_INPUT, "%s: %s: element %zu is not a finite number", s->path, t->name, i);
        to[i] = (accum)x.f;
    }
    free(raw);
    free(scales);
}

// Opens the files that model.safetensors.index.json names; both must say the same of what is where.
static Checkpoint checkpoint_open_index(const char *directory, const char *path)
{
    size_t size, files = 0, n = 0;
    char *text = read_file(path, &size, 100 << 20);
    Json *index = json_parse(path, text, size);
    const Json *map = json_get(index, "weight_map");
    if (!map || map->type != JSON_OBJECT || !map->child)
        die(BAD_INPUT, "%s: has no weight_map", path);
    char **file = (char **)host_alloc(map->length, sizeof(char *));
    for (const Json *j = map->child; j; j = j->next) {
        if (j->type != JSON_STRING || strchr(j->string, '/') || !*j->string)
            die(BAD_INPUT, "%s: %s: must name a file in the same directory", path, j->key);
        file[files++] = j->string;
    }
    qsort(file, files, sizeof(char *), compare_keys);
    for (size_t i = 0; i < files; i++)
        if (i == 0 || strcmp(file[n - 1], file[i])) file[n++] = file[i];
    Shard *shard = (Shard *)host_alloc(n, sizeof(Shard));
    for (size_t i = 0; i < n; i++) shard[i] = shard_open(directory, file[i]);
    Checkpoint c = checkpoint_list(directory, shard, n);
    for (const Json *j = map->child; j; j = j->next) {
        Stored *t = checkpoint_find(&c, j->key);
        if (!t || strcmp(t->shard->name, j->string))
            die(BAD_INPUT, "%s: %s: is not in %s", path, j->key, j->string);
        t->indexed = 1;
    }
    for (size_t i = 0; i < c.n; i++)
        if (!c.stored[i].indexed)
            die(BAD_INPUT, "%s: %s: is missing, though it is in %s", path, c.stored[i].name,
                c.stored[i].shard->name);
    free(file);
    free(index);
    free(text);
    return c;
}

// Opens model.safetensors or, where only that stands, an index and its shards.
static Checkpoint checkpoint_open(const char *directory)
{
    char *whole = path_join(directory, "model.safetensors");
    char *index = path_join(directory, "model.safetensors.index.json");
    Checkpoint c;
    if (access(whole, F_OK) && !access(index, F_OK)) {
        c = checkpoint_open_index(directory, index);
    } else {
        Shard *shard = (Shard *)host_alloc(1, sizeof(Shard));
        *shard = shard_open(directory, "model.safetensors");
        c = checkpoint_list(directory, shard, 1);
    }
    free(whole);
    free(index);
    return c;
}

// The tensor of this name and shape; with cols 0 it has one dimension.
static Stored *checkpoint_get(const Checkpoint *c, const char *name, size_t rows, size_t cols)
{
    Stored *t = checkpoint_find(c, name);
    if (!t)
        die(BAD_INPUT, "%s: %s: is missing, though config.json calls for it", c->directory, name);
    size_t shape[2] = {rows, cols}, dims = cols ? 2 : 1;
    if (t->dims != dims || t->shape[0] != rows || t->shape[1] != cols) {
        char is[64], expected[64];
        shape_text(is, t->shape, t->dims);
        shape_text(expected, shape, dims);
        die(BAD_INPUT, "%s: %s: has shape [%s], expected [%s]", t->shard->path, name, is,
            expected);
    }
    t->used = 1;
    return t;
}

// Reads every tensor of the layout, named with the prefix, to the weights of m or to its place in
// `to`. With neither only looks whether all are there, so that a config.json cannot ask for more
// memory than its files fill.
static void checkpoint_read(Checkpoint *c, const Layout *layout, const char *prefix, Model *m,
                            accum *to)
{
    for (size_t i = 0; i < layout->tensors; i++) {
        const Tensor *t = &layout->tensor[i];
        size_t n = t->rows * t->cols, dims = tensor_dims(t);
        accum *host = m || to ? (accum *)host_alloc(n, sizeof(accum)) : NULL;
        for (size_t k = 0; k < t->count; k++) {
            char name[NAME_MAX_LENGTH + 16];
            tensor_name(name, prefix, t, k);
            Stored *scale = NULL;
            Stored *s = checkpoint_get(c, name, dims == 1 ? t->cols : t->rows,
                                       dims == 1 ? 0 : t->cols);
            if (s->dtype == F8_E4M3) {
                scale = checkpoint_get(c, strcat(name, "_scale_inv"), ceil_div(t->rows, FP8_BLOCK),
                                       ceil_div(t->cols, FP8_BLOCK));
                if (scale->dtype != F32)
                    die(BAD_INPUT, "%s: %s: must be F32", scale->shard->path, name);
            }
            if (!host) continue;
            stored_read(s, scale, host);
            if (m) model_set(m, t, k * n, host, n);
            else to_device(to + t->offset + k * n, host, n * sizeof(accum));
        }
        free(host);
    }
}

// The released MTP layers carry copies of the embedding and the head, which the model shares.
static int is_shared_copy(const char *name)
{
    static const char layer[] = "model.layers.";
    if (strncmp(name, layer, sizeof layer - 1)) return 0;
    name += sizeof layer - 1;
    name += strspn(name, "0123456789");
    return !strcmp(name, ".embed_tokens.weight") || !strcmp(name, ".shared_head.head.weight");
}

// Dies if there is a tensor that nobody read. Empty ones are transformers' for no shared experts.
static void checkpoint_all_used(const Checkpoint *c)
{
    for (size_t i = 0; i < c->n; i++) {
        const Stored *s = &c->stored[i];
        if (!s->used && s->begin < s->end && !is_shared_copy(s->name))
            die(BAD_INPUT, "%s: %s: config.json has no place for it", s->shard->path, s->name);
    }
}

static void checkpoint_close(Checkpoint *c)
{
    for (size_t i = 0; i < c->shards; i++) shard_close(&c->shard[i]);
    free(c->shard);
    free(c->stored);
}

// The configuration of the model in a directory. transformers has no MTP layers and drops them when
// it saves, but keeps num_nextn_predict_layers: then there are none here either.
static Config directory_config(const char *directory)
{
    char *path = path_join(directory, "config.json");
    Config c = config_load(path);
    free(path);
    if (c.D == 0) return c;
    static int said; // once, though a command asks again when it loads
    Checkpoint files = checkpoint_open(directory);
    char prefix[48];
    size_t n = (size_t)snprintf(prefix, sizeof prefix, "model.layers.%zu.", c.L), found = 0;
    for (size_t i = 0; i < files.n; i++) found += !strncmp(files.stored[i].name, prefix, n);
    checkpoint_close(&files);
    if (!found) {
        if (!said++)
            fprintf(stderr, "moe: %s: num_nextn_predict_layers is %zu, but no such layers are "
                    "there; going on without\n", directory, c.D);
        c.D = 0;
    }
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
// 9  Options

// Every option of the command line, once: commands that take it, type, field, --name, default,
// what it takes, what it does.
enum {
    TRAIN = 1, SAMPLE = 2, EVAL = 4, CHECK = 8, MOST = TRAIN | SAMPLE | EVAL | CHECK,
    PLAN = 16, SAVED = 32, RUN = TRAIN | SAVED // saved with a run, for --resume
};
#define OPTIONS(X) \
    X(MOST, Text, model, "model", "", "DIR", "model directory to start from") \
    X(TRAIN | CHECK, Text, config, "config", "laptop", "FILE", \
      "new model: a config.json, laptop, laptop-mtp, moonlight-16b, deepseek-v3") \
    X(PLAN, Text, plan_config, "config", "deepseek-v3", "FILE", \
      "a config.json, laptop, laptop-mtp, moonlight-16b or deepseek-v3") \
    X(RUN | EVAL | CHECK, Text, data, "data", "", "FILE", "text to read") \
    X(TRAIN, Text, out, "out", "out/model", "DIR", "where the trained model goes") \
    X(TRAIN, Text, resume, "resume", "", "DIR", "go on with the run that was saved there") \
    X(TRAIN, Count, stop_after, "stop-after", "0", "K", "end after step K, saving; 0: do not") \
    X(RUN, Count, save_every, "save-every", "200", "N", "steps between saves; 0: at the end") \
    X(CHECK, Text, dump, "dump", "", "FILE", "write logits, losses and gradients there") \
    X(RUN, Count, steps, "steps", "780", "N", "steps to train") \
    X(CHECK, Count, check_steps, "steps", "0", "N", "AdamW steps to take on the batch") \
    X(RUN | CHECK, Count, batch, "batch", "8", "B", "sequences at once") \
    X(RUN | EVAL | CHECK, Count, seq, "seq", "0", "T", \
      "tokens of a sequence; 0: max_position_embeddings") \
    X(RUN, Count, accumulate, "accumulate", "1", "N", "batches whose gradients make one step") \
    X(RUN, Text, optimizer, "optimizer", "muon", "NAME", \
      "muon (hidden matrices; AdamW for the rest) or adamw") \
    X(RUN, Number, lr, "lr", "0.005", "X", "peak learning rate") \
    X(CHECK, Number, check_lr, "lr", "0.001", "X", "learning rate of --steps") \
    X(RUN, Number, adam_lr, "adam-lr", "0.02", "X", "beside muon, AdamW's peak learning rate") \
    X(RUN, Count, warmup, "warmup", "20", "N", "steps of linear warm-up") \
    X(RUN, Number, hold, "hold", "0", "X", \
      "share of the steps at the peak, then the cosine; V3: 0.68") \
    X(RUN, Number, min_lr, "min-lr", "0.02", "X", "share of the peak that the cosine ends at") \
    X(RUN | CHECK, Number, beta1, "beta1", "0.9", "X", "AdamW's decay of the mean gradient") \
    X(RUN | CHECK, Number, beta2, "beta2", "0.95", "X", "AdamW's decay of the mean square") \
    X(RUN | CHECK, Number, decay, "weight-decay", "0.1", "X", "decoupled weight decay") \
    X(RUN | CHECK, Number, clip, "clip", "1", "X", "global gradient norm; 0: no clipping") \
    X(RUN, Number, momentum, "momentum", "0.9", "X", "Muon's momentum") \
    X(RUN, Number, bias_speed, "bias-speed", "0.02", "X", \
      "step of the routers' bias; V3, in many more steps: 0.001") \
    X(CHECK, Number, check_bias_speed, "bias-speed", "0.001", "X", "step of the routers' bias") \
    X(RUN, Number, val_share, "val-share", "0.1", "X", \
      "last part of the text, kept for validation") \
    X(RUN, Count, val_every, "val-every", "200", "N", \
      "steps between validations; 0: only at the end") \
    X(RUN, Count, log_every, "log-every", "10", "N", "steps between lines when piped") \
    X(SAMPLE, Text, prompt, "prompt", "\n", "TEXT", "what the text begins with") \
    X(RUN | SAMPLE, Count, tokens, "tokens", "300", "N", "tokens to generate") \
    X(RUN | SAMPLE, Number, temperature, "temperature", "0.8", "X", \
      "0: always the likeliest token") \
    X(RUN | SAMPLE, Count, top_k, "top-k", "0", "K", "choose among the K likeliest; 0: all") \
    X(RUN | SAMPLE, Number, top_p, "top-p", "0.95", "X", \
      "choose among the likeliest of this total probability") \
    X(SAMPLE, Flag, speculate, "speculate", "", "", \
      "draft with the MTP layer; the text stays the same") \
    X(PLAN, Text, gpu, "gpu", "h800", "NAME", \
      "device: h800, h100, h200, h20, b200, a100, mi300x or rtx-4090") \
    X(PLAN, Count, gpus, "gpus", "0", "N", \
      "devices; 0: as the split needs, for deepseek-v3 2048") \
    X(PLAN, Count, data_parallel, "data-parallel", "0", "N", \
      "devices that share a batch; 0: --gpus / --pipeline") \
    X(PLAN, Count, expert_parallel, "expert-parallel", "0", "N", \
      "of these, devices that share the experts; 0: 1, for deepseek-v3 64") \
    X(PLAN, Count, pipeline, "pipeline", "0", "N", \
      "stages of layers; 0: 1, for deepseek-v3 16") \
    X(PLAN, Count, micro_batch, "batch", "1", "B", "sequences at once in a device") \
    X(PLAN, Count, context, "seq", "0", "T", \
      "tokens of a sequence; 0: as in pre-training, before YaRN") \
    X(PLAN, Number, budget, "budget", "0", "N", \
      "tokens to train on; 0: 20 an active parameter, for deepseek-v3 14.8e12") \
    X(PLAN, Number, mfu, "mfu", "0.4", "X", "model FLOPs utilization, of bfloat16's peak") \
    X(PLAN, Number, price, "price", "2", "X", "dollars a GPU hour") \
    X(PLAN, Flag, json, "json", "", "", "print JSON") \
    X(MOST | SAVED, Count, seed, "seed", "1", "S", "of all random numbers") \
    X(MOST, Count, threads, "threads", "0", "N", "0: as many as there are")

typedef const char *Text;
typedef size_t Count;
typedef double Number;
typedef int Flag;

#define OPTION_FIELD(commands, type, field, ...) type field;
typedef struct { OPTIONS(OPTION_FIELD) } Options;

static Text parse_Text(const char *name, const char *value) { (void)name; return value; }

static Count parse_Count(const char *name, const char *value)
{
    char *end;
    errno = 0;
    unsigned long long x = strtoull(value, &end, 10);
    if (!isdigit((unsigned char)*value) || *end || errno || x > (1ull << 40))
        die(BAD_INPUT, "--%s is '%s'; it must be a whole number, 0 or more", name, value);
    return (size_t)x;
}

static Number parse_Number(const char *name, const char *value)
{
    char *end;
    double x = strtod(value, &end);
    if (end == value || *end || !isfinite(x) || x < 0)
        die(BAD_INPUT, "--%s is '%s'; it must be a number, 0 or more", name, value);
    return x;
}

static Flag parse_Flag(const char *name, const char *value) { (void)name; return *value != 0; }

// The other way, in room for 32 characters; parse_ reads the same value back.
static const char *show_Text(char *room, Text x) { return (void)room, x; }
static const char *show_Flag(char *room, Flag x) { return (void)room, x ? "yes" : ""; }

static const char *show_Count(char *room, Count x)
{
    snprintf(room, 32, "%zu", x);
    return room;
}

static const char *show_Number(char *room, Number x)
{
    snprintf(room, 32, "%.17g", x);
    return room;
}

// ------------------------------------------------------------------------------------------------
// 10  Training

// The bytes of a text file, each a token.
typedef struct {
    char *bytes;
    size_t n;
} Data;

static Data data_load(const char *path, const Config *c)
{
    Data t;
    if (!*path) die(BAD_INPUT, "--data FILE is missing: the text to read");
    if (access(path, R_OK))
        die(BAD_INPUT, "%s: cannot open: %s; --data names the text to read", path, strerror(errno));
    t.bytes = read_file(path, &t.n, (size_t)1 << 40);
    for (size_t i = 0; i < t.n; i++)
        if ((unsigned char)t.bytes[i] >= c->V)
            die(BAD_INPUT, "%s: byte %zu is %d, outside the vocabulary of %zu", path, i,
                (unsigned char)t.bytes[i], c->V);
    return t;
}

static void tokens_copy(int *to, const char *bytes, size_t n)
{
    for (size_t i = 0; i < n; i++) to[i] = (unsigned char)bytes[i];
}

#define EVAL_ROWS(T) ceil_div(4096, T) // sequences at once

// Mean loss over every token of bytes[0 .. n) but the first, in windows of T tokens, of which each
// sees what stands before it in its window. The last window may be shorter.
static double text_loss(const Model *m, const char *bytes, size_t n, size_t T)
{
    size_t tokens = n - 1, most = EVAL_ROWS(T);
    int *rows = (int *)host_alloc(most * (T + 1), sizeof(int));
    double sum = 0;
    Acts a;
    memset(&a, 0, sizeof a);
    for (size_t at = 0; at < tokens; at += a.B * a.T) {
        size_t t = min_size(T, tokens - at), B = min_size(most, (tokens - at) / t);
        if (a.B != B || a.T != t) {
            acts_free(&a);
            a = acts_make(&m->config, B, t, 0);
        }
        for (size_t b = 0; b < B; b++)
            tokens_copy(rows + b * (t + 1), bytes + at + b * t, t + 1);
        acts_load(&a, rows);
        model_forward(m, &a);
        sum += model_losses(m, &a).main * (double)(B * t);
    }
    free(rows);
    acts_free(&a);
    return sum / (double)tokens;
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

static size_t gcd(size_t a, size_t b)
{
    while (b) {
        size_t r = a % b;
        a = b;
        b = r;
    }
    return a;
}

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
    for (size_t l = 0; l < layers(&m->config); l++) {
        double sum = 0, most = 0;
        for (size_t e = 0; e < E; e++) {
            sum += load[(size_t)l * E + e];
            most = fmax(most, load[(size_t)l * E + e]);
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
             (n) + (more) + 1)

static Generation sample(const Model *m, const Options *o, const char *prompt, int speculate)
{
    size_t n = strlen(prompt), length = n + o->tokens;
    Sampler s = {o->temperature, (int)min_size(o->top_k, m->config.V), o->top_p, o->seed};
    Decoder d = SAMPLE_DECODER(decoder_make, m, n, o->tokens);
    int *tokens = (int *)host_alloc(length + 2, sizeof(int));
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

// What a command is about to allocate, in bytes.
typedef struct {
    double weights, gradients, optimizer, activations, cache;
} Memory;

static double memory_total(const Memory *m)
{
    return m->weights + m->gradients + m->optimizer + m->activations + m->cache;
}

// Refuses what the machine does not have, before it is asked for.
static Memory memory_plan(const Config *c, int training, size_t activations, size_t cache)
{
    Layout layout = layout_make(c);
    double n = (double)layout.elements, grads = training ? n * sizeof(accum) : 0;
    double master = sizeof(real) < sizeof(accum) ? grads : 0;
    Memory m = {n * sizeof(real) + master, grads, 2 * grads, (double)activations, (double)cache};
    double total = memory_total(&m), available = free_memory();
    free(layout.tensor);
    if (total > available)
        die(FAILED, "%.0f MB of memory are needed (weights %.0f, gradients and optimizer %.0f, "
            "activations and cache %.0f) and %.0f are free; use a smaller --config, --batch or "
            "--seq", total * 1e-6, m.weights * 1e-6, 3 * grads * 1e-6,
            (m.activations + m.cache) * 1e-6, available * 1e-6);
    return m;
}

static void memory_print(FILE *to, const Memory *m)
{
    fprintf(to, "memory: weights %.1f MB, gradients %.1f, optimizer %.1f, activations %.1f, "
            "cache %.1f; %.1f of %.0f MB free\n", m->weights * 1e-6, m->gradients * 1e-6,
            m->optimizer * 1e-6, m->activations * 1e-6, m->cache * 1e-6, memory_total(m) * 1e-6,
            free_memory() * 1e-6);
}

static size_t sequence_length(const Options *o, const Config *c)
{
    size_t T = o->seq ? o->seq : c->Tmax;
    if (T > c->Tmax)
        die(BAD_INPUT, "--seq is %zu; the model's max_position_embeddings is %zu", T, c->Tmax);
    return T;
}

static void print_duration(double s)
{
    if (s < 60) printf("%.0fs", s);
    else printf("%.0fm%02.0fs", floor(s / 60), floor(fmod(s, 60)));
}

// A run of training.
typedef struct {
    Data text;
    size_t n_train;           // bytes of it that train; the rest validates
    size_t B, T;
    int *tokens;              // [B, T + 1]
    size_t step;              // steps done
    size_t saved;             // step of the last save, 0: none
    double val_loss;          // of the last validation, NAN before
    double train_loss;        // running mean
    double start;             // time at which this program began, having done first_step
    size_t first_step;
} Run;

static Recipe recipe_make(const Options *o, int muon, double lr, double adam_lr, double bias_speed)
{
    Recipe r = {muon, lr, adam_lr, o->beta1, o->beta2, 1e-8, o->decay, o->clip, o->momentum,
                bias_speed};
    return r;
}

static Run run_make(const Options *o, const Config *c)
{
    Run r;
    memset(&r, 0, sizeof r);
    r.text = data_load(o->data, c);
    r.B = o->batch;
    r.T = sequence_length(o, c);
    r.val_loss = r.train_loss = NAN;
    r.start = now();
    if (o->steps == 0 || r.B == 0 || o->accumulate == 0)
        die(BAD_INPUT, "--steps, --batch and --accumulate must be at least 1");
    if (strcmp(o->optimizer, "muon") && strcmp(o->optimizer, "adamw"))
        die(BAD_INPUT, "--optimizer is %s; it must be muon or adamw", o->optimizer);
    if (o->val_share >= 1) die(BAD_INPUT, "--val-share is %g; it must be below 1", o->val_share);
    r.n_train = (size_t)((double)r.text.n * (1 - o->val_share));
    if (r.n_train < r.T + 1 || (o->val_share > 0 && r.text.n - r.n_train < 2))
        die(BAD_INPUT, "%s: too short: of %zu bytes %zu are left to train on and %zu to validate; "
            "%zu and 2 are needed, or a smaller --seq", o->data, r.text.n, r.n_train,
            r.text.n - r.n_train, r.T + 1);
    return r;
}

static uint64_t data_hash(const Data *t) // FNV-1a
{
    uint64_t h = 0xCBF29CE484222325u;
    for (size_t i = 0; i < t->n; i++) h = (h ^ (unsigned char)t->bytes[i]) * 0x100000001B3u;
    return h;
}

static const char state_name[] = "optimizer.safetensors";

// Saves the model for others, then in one file all that the run needs to go on, weights included,
// so that a run killed at any instant finds the old state or the new one.
static void run_save(Run *r, const Options *o, const Model *m, const Optimizer *opt, FILE *log)
{
    size_t n = 3 * count_entries(&m->layout), length = 1024;
    char room[32];
    size_t elements = m->layout.elements;
    if (!isfinite(sum_squares(m->master, elements) + sum_squares(opt->m, elements) +
                  sum_squares(opt->v, elements)))
        die(FAILED, "step %zu: the weights are no longer finite; %s still has step %zu; try a "
            "smaller --lr", r->step, o->out, r->saved);
#define OPTION_LENGTH(commands, type, field, ...) \
    length += 64 + 6 * strlen(show_##type(room, o->field));
    OPTIONS(OPTION_LENGTH)
    char *metadata = (char *)host_alloc(length, 1), *end = metadata;
#define ADD_OPTION(commands, type, field, name, ...) \
    if ((commands) & SAVED) { \
        end += sprintf(end, ",\"--%s\":\"", name); \
        end = json_escape(end, show_##type(room, o->field)); \
        *end++ = '"'; \
    }
    OPTIONS(ADD_OPTION)
    sprintf(end, ",\"step\":\"%zu\",\"optimizer_step\":\"%ld\",\"train_loss\":\"%.17g\","
            "\"val_loss\":\"%.17g\",\"text_hash\":\"%016llx\"", r->step, opt->step,
            r->train_loss, r->val_loss, (unsigned long long)data_hash(&r->text));
    Entry *entry = (Entry *)host_alloc(n, sizeof(Entry));
    Entry *next = entries_add(entry, &m->layout, "", m->master);
    next = entries_add(next, &m->layout, "m.", opt->m);
    entries_add(next, &m->layout, "v.", opt->v);
    if (fflush(log) || fsync(fileno(log)))
        die(FAILED, "%s/log.csv: cannot write: %s", o->out, strerror(errno));
    char *path = path_join(o->out, state_name);
    model_save(m, o->out);
    safetensors_save(path, metadata, entry, n);
    free(path);
    r->saved = r->step;
    free(entry);
    free(metadata);
}

static const char *state_value(const Shard *s, const char *key)
{
    const Json *metadata = json_get(s->header, "__metadata__");
    const Json *value = metadata && metadata->type == JSON_OBJECT ? json_get(metadata, key) : NULL;
    if (!value || value->type != JSON_STRING)
        die(BAD_INPUT, "%s: is not the state of a run: has no %s", s->path, key);
    return value->string;
}

static double state_loss(const Shard *s, const char *key)
{
    const char *value = state_value(s, key);
    char *end;
    double x = strtod(value, &end); // may be nan: none yet
    if (end == value || *end) die(BAD_INPUT, "%s: %s is not a number", s->path, key);
    return x;
}

// Takes the options that a run was started with, and the directory it is in.
static void options_from_state(Options *o, const char *directory)
{
    static Shard s; // stays open, as the options point into it
    s = shard_open(directory, state_name);
#define TAKE_OPTION(commands, type, field, name, ...) \
    if ((commands) & SAVED) \
        o->field = parse_##type(name, state_value(&s, "--" name));
    OPTIONS(TAKE_OPTION)
    o->model = o->resume = o->out = directory;
}

// Puts a saved run back: weights, optimizer, position.
static void run_load(Run *r, const Options *o, Model *m, Optimizer *opt)
{
    Shard *s = (Shard *)host_alloc(1, sizeof(Shard));
    *s = shard_open(o->resume, state_name);
    char hash[32];
    snprintf(hash, sizeof hash, "%016llx", (unsigned long long)data_hash(&r->text));
    if (strcmp(hash, state_value(s, "text_hash")))
        die(BAD_INPUT, "%s: is not the text that the run in %s began with", o->data, o->resume);
    r->step = r->first_step = r->saved = parse_Count("step", state_value(s, "step"));
    opt->step = (long)parse_Count("optimizer_step", state_value(s, "optimizer_step"));
    r->train_loss = state_loss(s, "train_loss");
    r->val_loss = state_loss(s, "val_loss");
    Checkpoint c = checkpoint_list(o->resume, s, 1);
    checkpoint_read(&c, &m->layout, "", m, NULL);
    checkpoint_read(&c, &m->layout, "m.", NULL, opt->m);
    checkpoint_read(&c, &m->layout, "v.", NULL, opt->v);
    checkpoint_all_used(&c);
    checkpoint_close(&c);
    if (r->step >= o->steps)
        die(BAD_INPUT, "%s: the run has taken all its %zu steps; a larger --steps goes on",
            o->resume, r->step);
}

// Opens log.csv with the rows of the steps that are done, and nothing after them. They are gone if
// another run began in the directory and was killed before it saved.
static FILE *log_open(const Run *r, const Options *o)
{
    static const char head[] =
        "step,loss,val_loss,mtp_loss,balance_loss,max_load,grad_norm,lr\n";
    char *path = path_join(o->out, "log.csv");
    if (r->step > 0) {
        size_t size, rows = 0;
        char *from = path_join(o->resume, "log.csv");
        char *old = read_file(from, &size, (size_t)1 << 40), *end = old;
        while (rows <= r->step && (end = strchr(end, '\n'))) end++, rows++;
        Output out = output_open(path);
        output_write(&out, end ? old : head, end ? (size_t)(end - old) : sizeof head - 1);
        output_close(&out);
        free(from);
        free(old);
    }
    FILE *log = fopen(path, r->step > 0 ? "a" : "w");
    if (!log || (r->step == 0 && fputs(head, log) < 0))
        die(BAD_INPUT, "%s: cannot write: %s; choose another --out", path, strerror(errno));
    free(path);
    return log;
}

// The first SIGINT or SIGTERM ends the run after its step, saved; the second at once.
static volatile sig_atomic_t stop_signal = 0;

static void on_signal(int number) { stop_signal = number; }

static void catch_signals(void)
{
    struct sigaction action;
    memset(&action, 0, sizeof action);
    action.sa_handler = on_signal;
    action.sa_flags = SA_RESETHAND | SA_RESTART; // once; and no write fails for it
    if (sigaction(SIGINT, &action, NULL) || sigaction(SIGTERM, &action, NULL))
        die(FAILED, "cannot catch signals: %s", strerror(errno));
}

// Adds the gradients of a step's batches to the model's; returns their mean losses.
static Losses run_batches(Run *r, const Options *o, size_t step, Model *m, Acts *a, Optimizer *opt)
{
    Losses mean = {0, 0, 0, 0};
    double share = 1 / (double)o->accumulate;
    for (size_t k = 0; k < o->accumulate; k++) {
        for (size_t b = 0; b < r->B; b++) {
            size_t i = (step * o->accumulate + k) * r->B + b;
            size_t at = window_start(o->seed, i, r->n_train, r->T);
            tokens_copy(r->tokens + b * (r->T + 1), r->text.bytes + at, r->T + 1);
        }
        acts_load(a, r->tokens);
        model_forward(m, a);
        model_backward(m, a, share);
        optimizer_count_load(opt, m, a);
        Losses s = model_losses(m, a);
        mean.total += share * s.total;
        mean.main += share * s.main;
        mean.mtp += share * s.mtp;
        mean.balance += share * s.balance;
    }
    return mean;
}

// One line of how it goes: a bar and a line that stays in place on a terminal, else a line each.
static void run_print(const Run *r, const Options *o, const Losses *s, double load, double norm,
                      double lr)
{
    size_t step = r->step;
    double elapsed = now() - r->start, done = (double)(step - r->first_step);
    double eta = elapsed / done * (double)(o->steps - step);
    if (isatty(1)) {
        int full = (int)(20 * step / o->steps);
        printf("\r\033[K[%.*s%.*s] ", full, "####################", 20 - full,
               "....................");
    }
    printf("step %zu/%zu loss %.4f val ", step, o->steps, r->train_loss);
    if (isfinite(r->val_loss)) printf("%.4f", r->val_loss);
    else printf("-");
    printf(" mtp %.3f load %.2f norm %.2f lr %.2e %.0f tok/s eta ", s->mtp, load, norm, lr,
           done * (double)(o->accumulate * r->B * r->T) / elapsed);
    print_duration(eta);
    if (!isatty(1)) putchar('\n');
    fflush(stdout);
}

// Makes the directory; refuses one that holds a model of another shape, for while one is replaced
// by the other the directory would hold neither.
static void prepare_directory(const Options *o, const Config *c)
{
    make_directory(o->out);
    char *path = path_join(o->out, "config.json");
    if (!access(path, F_OK)) {
        Config old = config_load(path);
        if (memcmp(&old, c, sizeof old))
            die(BAD_INPUT, "%s: holds a model of another shape; remove it or choose another --out",
                o->out);
    }
    free(path);
}

enum { BAD_STEPS = 5 }; // in a row that end a run

static int command_train(const Options *o)
{
    Config config = config_from_options(o);
    const Config *c = &config;
    Run r = run_make(o, c);
    Acts plan = acts_plan(c, r.B, r.T, 1);
    Memory memory = memory_plan(c, 1, plan.arena.used, 0);
    acts_free(&plan);
    r.tokens = (int *)host_alloc(r.B * (r.T + 1), sizeof(int));
    prepare_directory(o, c);
    Model m = *o->resume ? model_make(c, 1) : model_from_options(o, c, 1);
    Optimizer opt = optimizer_make(&m);
    if (*o->resume) run_load(&r, o, &m, &opt);
    FILE *log = log_open(&r, o);
    Acts a = acts_make(c, r.B, r.T, 1);
    size_t n_val = r.text.n - r.n_train, bad = 0;
    int muon = !strcmp(o->optimizer, "muon");
    catch_signals();
    memory_print(stdout, &memory);
    printf("%zu parameters, %zu layers, %zu of %zu experts a token; %zu x %zu tokens a step, %s, "
           "%d threads\n", parameters(&m.layout), c->L, c->K, c->E, r.B * o->accumulate, r.T,
           o->optimizer, thread_count());
    fflush(stdout);
    int last = 0, stop = 0;
    while (!last && !stop) {
        double share = schedule(o, r.step), rate = o->lr * share;
        Recipe recipe = recipe_make(o, muon, rate, (muon ? o->adam_lr : o->lr) * share,
                                    o->bias_speed);
        Losses s = run_batches(&r, o, r.step, &m, &a, &opt);
        double norm = grad_norm(&m), load = worst_load(&m, &opt);
        r.step++;
        if (isfinite(s.total) && isfinite(norm)) {
            optimizer_step(&opt, &m, &recipe, norm);
            r.train_loss = isnan(r.train_loss) ? s.main : 0.95 * r.train_loss + 0.05 * s.main;
            bad = 0;
        } else { // nothing of it may reach the weights
            printf("step %zu: the loss is %g and the gradient's norm %g: skipped\n", r.step,
                   s.total, norm);
            optimizer_skip(&opt, &m);
            if (++bad == BAD_STEPS)
                die(FAILED, "%d steps in a row were not finite; %s %s; try a smaller --lr",
                    BAD_STEPS, r.saved ? "the last good state is in" : "no state is in", o->out);
        }
        last = r.step == o->steps;
        stop = stop_signal || (o->stop_after && r.step >= o->stop_after);
        int validate = n_val && (last || (o->val_every && r.step % o->val_every == 0));
        if (validate) // on a part while training, on all of it at the end
            r.val_loss = text_loss(&m, r.text.bytes + r.n_train,
                                   last ? n_val : min_size(n_val, 16 * 1024 + 1), r.T);
        fprintf(log, "%zu,%.6f,", r.step, s.main);
        if (validate) fprintf(log, "%.6f", r.val_loss);
        fprintf(log, ",%.6f,%.6f,%.4f,%.6f,%.8f\n", s.mtp, s.balance, load, norm, rate);
        if (isatty(1) || last || stop || (o->log_every && r.step % o->log_every == 0))
            run_print(&r, o, &s, load, norm, rate);
        if (last || stop || (o->save_every && r.step % o->save_every == 0))
            run_save(&r, o, &m, &opt, log);
    }
    printf(isatty(1) ? "\n\n" : "\n");
    if (ferror(log) | fclose(log))
        die(FAILED, "%s/log.csv: cannot write: %s", o->out, strerror(errno));
    if (last) {
        if (o->tokens && c->V > '\n') sample(&m, o, "\n", 0);
        if (n_val)
            printf("\nvalidation loss %.4f over all %zu tokens of the validation split\n",
                   r.val_loss, n_val - 1);
        printf("trained in ");
        print_duration(now() - r.start);
        printf("; the model is in %s\ntry ./moe sample --model %s --prompt \"ROMEO:\"\n", o->out,
               o->out);
    } else {
        printf("stopped after step %zu of %zu, saved; go on with ./moe train --resume %s\n", r.step,
               o->steps, o->out);
    }
    free(r.tokens);
    free(r.text.bytes);
    optimizer_free(&opt);
    acts_free(&a);
    model_free(&m);
    return stop_signal && !last ? 128 + stop_signal : 0;
}

// ------------------------------------------------------------------------------------------------
// 11  Planning

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

// Weights of a tensor that one token meets: of E routed experts K; none of the embedding, of which
// it copies a row.
static double active_size(const Config *c, const Tensor *t)
{
    double n = (double)tensor_size(t);
    return t->kind == EMBEDDING ? 0 : t->count > 1 ? n / (double)t->count * (double)c->K : n;
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

// Tables for people, or one JSON object with the same names as keys.
typedef struct {
    int json;
    size_t rows, columns;
    const char *column[3], *letters;
    double value[3]; // of the last row
} Report;

// What shows a number as 1.234G: the letters for 1, 1e3, 1e6 ...; or else as a share.
static const char counts[] = " KMBT", units[] = " KMGTPEZY", percent[] = "%";

static const char *show_scaled(char *room, double x, const char *letters) // 32 characters
{
    size_t k = 0;
    while (fabs(x) >= 999.9995 && letters[k] && letters[k + 1]) x /= 1000, k++;
    if (isnan(x)) *room = 0;
    else if (letters == percent) snprintf(room, 32, "%+.2f%%", 100 * x);
    else if (k) snprintf(room, 32, "%.3f%c", x, letters[k]);
    else snprintf(room, 32, "%.4g", x);
    return room;
}

static void report_section(Report *r, const char *name, const char *letters, const char *column0,
                           const char *column1, const char *column2)
{
    r->letters = letters;
    r->column[0] = column0, r->column[1] = column1, r->column[2] = column2;
    r->columns = column2 ? 3 : 2;
    if (r->json) {
        printf("%s,\n  \"%s\": {", r->rows ? "}\n  }" : "", name);
        r->rows = 0;
        return;
    }
    printf("\n%-34s", name);
    for (size_t i = 0; i < r->columns; i++) printf("%20s", r->column[i]);
    printf("\n");
}

// A line under the heading, for people.
#define NOTE(r, ...) ((r)->json ? 0 : (printf("  "), printf(__VA_ARGS__), printf("\n")))

// Values under the columns, those that are not NAN.
static void report_values(const Report *r, const char *indent, const char *name,
                          const char *letters, const double *value)
{
    const char *comma = "";
    char room[32];
    if (r->json) printf("\"%s\": {", name);
    else printf("%s%-*s", indent, 34 - (int)strlen(indent), name);
    for (size_t i = 0; i < r->columns; i++) {
        if (!r->json) printf("%20s", show_scaled(room, value[i], letters));
        else if (!isnan(value[i])) printf("%s\"%s\": %.15g", comma, r->column[i], value[i]);
        if (!isnan(value[i])) comma = ", ";
    }
    if (!r->json) printf("\n");
}

static void report_row(Report *r, const char *name, double value0, double value1, double value2)
{
    r->value[0] = value0, r->value[1] = value1, r->value[2] = value2;
    if (r->json) printf("%s\n    ", r->rows ? "}," : "");
    r->rows++;
    report_values(r, "  ", name, r->letters, r->value);
}

// What was published of the last row, and how far ours is from it.
static void report_published(const Report *r, double value0, double value1, double value2)
{
    double value[3] = {value0, value1, value2}, difference[3];
    for (size_t i = 0; i < 3; i++) difference[i] = r->value[i] / value[i] - 1;
    if (r->json) printf(", ");
    report_values(r, "    ", "published", r->letters, value);
    if (r->json) printf("}, ");
    report_values(r, "    ", "difference", percent, difference);
    if (r->json) printf("}");
}

static double report_parameters(Report *r, const Config *c) // returns the active ones
{
    Layout layout = layout_make(c);
    double n[PARTS + 1][2] = {{0}}, main[2] = {0}; // total and active; [PARTS]: of MTP layers
    const double *embedding = n[EMBEDDING_PART], *head = n[HEAD_PART], *mtp = n[PARTS];
    for (size_t i = 0; i < layout.tensors; i++) {
        const Tensor *t = &layout.tensor[i];
        size_t p = t->layer >= (int)c->L ? PARTS : 0;
        while (p < PARTS && strncmp(t->name, parts[p].prefix, strlen(parts[p].prefix))) p++;
        n[p][0] += (double)tensor_size(t);
        n[p][1] += active_size(c, t);
    }
    free(layout.tensor);
    report_section(r, "parameters", counts, "total", "active", NULL);
    NOTE(r, "active: met by one token, so %zu of %zu routed experts; the embedding copies one row",
         c->K, c->E);
    for (size_t p = 0; p < PARTS; p++) {
        report_row(r, parts[p].name, n[p][0], n[p][1], NAN);
        for (size_t i = 0; i < 2; i++) main[i] += n[p][i];
    }
    report_row(r, "main_model", main[0], main[1], NAN);
    if (is_preset(c, DEEPSEEK_V3)) report_published(r, 671e9, 37e9, NAN);
    report_row(r, "with_embedding_as_active", main[0], main[1] + embedding[0], NAN);
    report_row(r, "without_embedding_and_head", main[0] - embedding[0] - head[0],
               main[1] - head[1], NAN);
    if (is_preset(c, MOONLIGHT)) report_published(r, 15.29e9, 2.24e9, NAN);
    report_row(r, "MTP", mtp[0], mtp[1], NAN);
    report_row(r, "all", main[0] + mtp[0], main[1] + mtp[1], NAN);
    report_row(r, "all_with_MTP's_released_copies", // each depth's, of embedding and head
               main[0] + mtp[0] + (double)c->D * (embedding[0] + head[0]), NAN, NAN);
    if (is_preset(c, DEEPSEEK_V3)) report_published(r, 685e9, NAN, NAN);
    return main[1];
}

static void report_flops(Report *r, const Config *c, size_t T)
{
    static const char *const name[] = {"matrices", "attention", "main_model", "MTP", "all"};
    double matrices = flops_forward(c, 0, 0), main = flops_forward(c, T, 0);
    double all = flops_forward(c, T, 1);
    double value[] = {matrices, main - matrices, main, all - main, all};
    report_section(r, "flops_of_a_token", units, "forward", "backward", "both");
    NOTE(r, "in a sequence of %zu; attention: its causal half", T);
    for (size_t i = 0; i < 5; i++) {
        report_row(r, name[i], value[i], 2 * value[i], 3 * value[i]);
        if (value[i] == main && T == V3_CONTEXT && is_preset(c, DEEPSEEK_V3))
            report_published(r, NAN, NAN, 250e9);
    }
}

static void report_cache(Report *r, const Config *c)
{
    double latent = 2 * (double)(c->Rkv + c->Dr), plain = 2 * (double)(c->NH * (c->Dn + c->Dv));
    report_section(r, "cache_bytes_of_a_token", units, "a_layer", "all_layers", NULL);
    NOTE(r, "bfloat16; plain: a key of Dn and a value of Dv numbers for each head, %.1f times as "
         "much", plain / latent);
    report_row(r, "latent_attention", latent, latent * (double)c->L, NAN);
    if (is_preset(c, DEEPSEEK_V3)) report_published(r, NAN, 70.272e3, NAN);
    report_row(r, "plain_attention", plain, plain * (double)c->L, NAN);
}

// `count` devices stand in `data` x `pipeline`, experts spread over `expert` of the `data`.
typedef struct {
    size_t gpu, count, data, expert, pipeline;
} Cluster;

static Cluster cluster_make(const Options *o, const Config *c)
{
    Cluster d = {0, o->gpus, o->data_parallel, o->expert_parallel, o->pipeline};
    int v3 = is_preset(c, DEEPSEEK_V3);
    char names[200] = "";
    for (size_t i = 0, n = 0; i < GPUS; i++)
        n += (size_t)snprintf(names + n, sizeof names - n, " %s", gpus[i].name);
    while (d.gpu < GPUS && strcmp(o->gpu, gpus[d.gpu].name)) d.gpu++;
    NEED(d.gpu < GPUS, "--gpu is '%s'; it must be one of%s", o->gpu, names);
    if (!d.pipeline) d.pipeline = v3 ? V3_PIPELINE : 1;
    if (!d.expert) d.expert = v3 ? V3_EXPERT_PARALLEL : 1;
    NEED(d.pipeline <= layers(c), "--pipeline is %zu but there are only %zu layers, MTP's included",
         d.pipeline, layers(c));
    NEED(d.expert == 1 || (c->E && c->E % d.expert == 0), "--expert-parallel %zu does not divide "
         "the %zu experts (n_routed_experts)", d.expert, c->E);
    if (!d.count && d.data) d.count = d.data * d.pipeline;
    if (!d.count) d.count = v3 ? (size_t)V3_GPUS : d.expert * d.pipeline;
    NEED(d.count % d.pipeline == 0, "--pipeline %zu does not divide --gpus %zu", d.pipeline,
         d.count);
    if (!d.data) d.data = d.count / d.pipeline;
    NEED(d.count / d.pipeline == d.data, "--data-parallel %zu x --pipeline %zu is not --gpus %zu",
         d.data, d.pipeline, d.count);
    NEED(d.data % d.expert == 0, "--expert-parallel %zu does not divide --data-parallel %zu",
         d.expert, d.data);
    return d;
}

// Stage that holds a tensor: layers in order, as evenly as they divide; the head is in the last.
static size_t pipeline_stage(const Config *c, const Tensor *t, size_t stages)
{
    if (t->layer >= 0) return (size_t)t->layer * stages / layers(c);
    return t->kind == EMBEDDING ? 0 : stages - 1;
}

// Bytes of activations in bfloat16: of every layer, kept for the backward pass, or of one alone.
static double activation_bytes(const Config *c, size_t B, size_t T, int kept)
{
    Acts plan = acts_plan(c, B, T, kept);
    double bytes = 2.0 / sizeof(real) * (double)plan.arena.used;
    acts_free(&plan);
    return bytes;
}

static void report_memory(Report *r, const Config *c, const Cluster *d, size_t B, size_t T)
{
    Layout layout = layout_make(c);
    double held = 0, optimizer = 0, most = 0, has = 1e9 * gpus[d->gpu].gigabytes;
    for (size_t stage = 0; stage < d->pipeline; stage++) {
        double each = 0, experts = 0; // parameters that every device of the stage has, or some
        for (size_t i = 0; i < layout.tensors; i++) {
            const Tensor *t = &layout.tensor[i];
            if (pipeline_stage(c, t, d->pipeline) != stage) continue;
            if (t->count > 1) experts += (double)tensor_size(t);
            else each += (double)tensor_size(t);
        }
        double here = each + experts / (double)d->expert;
        double shared = 8 * (each + experts) / (double)d->data;
        if (6 * here + shared > most) held = here, optimizer = shared, most = 6 * here + shared;
    }
    free(layout.tensor);
    // The first stage has a batch under way for every stage: in all as much as the whole model's.
    // Recomputed, only the blocks' inputs are, and one layer's values and gradients.
    double kept = activation_bytes(c, B, T, 1), layer = activation_bytes(c, B, T, 0);
    double again = fmin(kept, 2 * (double)(layers(c) * c->C) * (double)(B * T) + 2 * layer);
    report_section(r, "bytes_on_the_fullest_device", units, "activations_kept", "recomputed", NULL);
    NOTE(r, "%zu %s: data %zu x pipeline %zu, experts over %zu; %zu x %zu tokens at once", d->count,
         gpus[d->gpu].name, d->data, d->pipeline, d->expert, B, T);
    NOTE(r, "weights bfloat16, gradients float; AdamW's float weights and bfloat16 moments, as "
         "V3's, split\n  among data-parallel devices (ZeRO-1); activations bfloat16, all kept or "
         "each block's input\n  alone; V3 recomputes a part and keeps a part in FP8");
    report_row(r, "weights", 2 * held, 2 * held, NAN);
    report_row(r, "gradients", 4 * held, 4 * held, NAN);
    report_row(r, "optimizer", optimizer, optimizer, NAN);
    report_row(r, "activations", kept, again, NAN);
    report_row(r, "all", most + kept, most + again, NAN);
    report_row(r, "device", has, has, NAN);
    NOTE(r, "%-32s%20s%20s", "", most + kept <= has ? "fits" : "does not fit",
         most + again <= has ? "fits" : "does not fit");
}

// The speed of V3's pre-training: our count of its work in the published hours.
static void report_v3_speed(Report *r, const Config *c)
{
    report_section(r, "V3_speed_of_a_GPU", units, "flops_of_a_token", "flops_a_second", "MFU");
    NOTE(r, "14.8T tokens in the published 2,664K hours; MFU: of bfloat16's peak, %.0f TFLOP/s; "
         "V3\n  computed in FP8, whose peak is twice that", gpus[H800].tflops);
    for (int mtp = 0; mtp < 2; mtp++) {
        double work = 3 * flops_forward(c, V3_CONTEXT, mtp);
        double rate = work * V3_TOKENS / (3600 * V3_HOURS);
        report_row(r, mtp ? "with_MTP" : "main_model", work, rate,
                   rate / (1e12 * gpus[H800].tflops));
        if (!mtp) report_published(r, 250e9, 385e12, 0.3894);
    }
}

// The stages of V3 and R1. Hours are published but for R1's two runs of reinforcement learning:
// these took 512 H800s 198 and 80 hours. All published dollars are published hours at $2.
static void report_v3_cost(Report *r, double price)
{
    static const struct { const char *name; double hours, published; } stage[] = {
        {"V3_pre-training", V3_HOURS, 0}, {"V3_context_extension", 119e3, 0},
        {"V3_post-training", 5e3, 0}, {"V3_in_all", V3_HOURS + 119e3 + 5e3, 2788e3},
        {"R1-Zero", 512 * 198, 101e3}, {"R1_fine-tuning_data", 5e3, 0},
        {"R1_reinforcement_learning", 512 * 80, 41e3},
        {"R1_in_all", 512 * 198 + 5e3 + 512 * 80, 147e3},
    };
    report_section(r, "V3_and_R1_at_this_price", counts, "GPU_hours", "dollars", NULL);
    NOTE(r, "hours as published, but of both reinforcement learnings: 512 H800s for 198 and 80 h");
    for (size_t i = 0; i < sizeof stage / sizeof *stage; i++) {
        report_row(r, stage[i].name, stage[i].hours, stage[i].hours * price, NAN);
        if (stage[i].published > 0)
            report_published(r, stage[i].published, 2 * stage[i].published, NAN);
    }
}

static int command_plan(const Options *o)
{
    Config c = config_named(o->plan_config);
    Cluster d = cluster_make(o, &c);
    int v3 = is_preset(&c, DEEPSEEK_V3);
    double trained = c.yarn_factor > 0 ? fmin(c.yarn_original, (double)c.Tmax) : (double)c.Tmax;
    size_t T = o->context ? o->context : (size_t)trained, B = o->micro_batch;
    Report r;
    memset(&r, 0, sizeof r);
    r.json = o->json;
    NEED(T <= c.Tmax, "--seq is %zu; the model's max_position_embeddings is %zu", T, c.Tmax);
    NEED(B > 0 && B <= 1 << 20, "--batch is %zu; it must be 1 to %d", B, 1 << 20);
    NEED(o->mfu >= 1e-6 && o->mfu <= 1, "--mfu is %g; it must be 1e-6 to 1", o->mfu);
    NEED(o->budget <= 1e20, "--budget is %g; it must be at most 1e20 tokens", o->budget);
    NEED(o->price <= 1e6, "--price is %g; it must be at most 1e6 dollars", o->price);
    activation_bytes(&c, B, T, 1); // sizes that cannot be are refused before anything is printed
    double flops = 3 * flops_forward(&c, T, 1);
    char *name = (char *)host_alloc(6 * strlen(o->plan_config) + 1, 1), tokens_text[32];
    if (r.json) {
        json_escape(name, o->plan_config);
        printf("{\n  \"config\": \"%s\", \"seq\": %zu, \"batch\": %zu,\n  \"gpu\": \"%s\", "
               "\"gpus\": %zu, \"data_parallel\": %zu, \"expert_parallel\": %zu, "
               "\"pipeline\": %zu", name, T, B, gpus[d.gpu].name, d.count, d.data, d.expert,
               d.pipeline);
    } else {
        printf("%s\n", o->plan_config);
    }
    free(name);
    double active = report_parameters(&r, &c);
    double tokens = o->budget > 0 ? o->budget : v3 ? V3_TOKENS : 20 * active;
    double hours = tokens * flops / (1e12 * gpus[d.gpu].tflops * o->mfu) / 3600;
    report_flops(&r, &c, T);
    report_cache(&r, &c);
    report_memory(&r, &c, &d, B, T);
    if (v3) report_v3_speed(&r, &c);
    report_section(&r, "pre-training", counts, "GPU_hours", "days", "dollars");
    NOTE(&r, "%s tokens on %zu %s at an assumed MFU of %g, $%g a GPU hour",
         show_scaled(tokens_text, tokens, counts), d.count, gpus[d.gpu].name, o->mfu, o->price);
    report_row(&r, "at_this_MFU", hours, hours / (double)d.count / 24, hours * o->price);
    if (v3 && tokens == V3_TOKENS) report_published(&r, V3_HOURS, NAN, 5.328e6);
    if (v3) report_v3_cost(&r, o->price);
    if (r.json) printf("}\n  }\n}\n");
    return 0;
}

// ------------------------------------------------------------------------------------------------
// 12  Commands

static void need_model(const Options *o)
{
    if (!*o->model) die(BAD_INPUT, "--model DIR is missing: the directory of a trained model");
}

static int command_sample(const Options *o)
{
    need_model(o);
    Model shape;
    memset(&shape, 0, sizeof shape);
    shape.config = directory_config(o->model);
    if (!*o->prompt) die(BAD_INPUT, "--prompt is empty; it needs at least one character");
    if (o->speculate && !shape.config.D)
        die(BAD_INPUT, "%s: has no multi-token prediction layer, which --speculate needs; train "
            "--config laptop-mtp has one", o->model);
    for (const char *p = o->prompt; *p; p++)
        if ((unsigned char)*p >= shape.config.V)
            die(BAD_INPUT, "--prompt: byte %d is outside the vocabulary of %zu", (unsigned char)*p,
                shape.config.V);
    Decoder plan = SAMPLE_DECODER(decoder_plan, &shape, strlen(o->prompt), o->tokens);
    size_t angles = size_mul(2 * plan.positions, shape.config.Dr * sizeof(accum));
    Memory memory = memory_plan(&shape.config, 0, 0, plan.arena.used + angles);
    decoder_free(&plan);
    Model m = model_load(o->model, 0);
    memory_print(stderr, &memory);
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

static int command_eval(const Options *o)
{
    need_model(o);
    Config c = directory_config(o->model);
    Data text = data_load(o->data, &c);
    if (text.n < 2)
        die(BAD_INPUT, "%s: has %zu bytes; 2 are needed to predict one", o->data, text.n);
    size_t T = min_size(sequence_length(o, &c), text.n - 1);
    Acts plan = acts_plan(&c, min_size(EVAL_ROWS(T), (text.n - 1) / T), T, 0);
    Memory memory = memory_plan(&c, 0, plan.arena.used, 0);
    acts_free(&plan);
    Model m = model_load(o->model, 0);
    memory_print(stderr, &memory);
    printf("loss %.7f tokens %zu\n", text_loss(&m, text.bytes, text.n, T), text.n - 1);
    free(text.bytes);
    model_free(&m);
    return 0;
}

static void losses_print(const Losses *s, double norm)
{
    printf("loss %.9g main %.9g mtp %.9g balance %.9g grad_norm %.9g\n", s->total, s->main, s->mtp,
           s->balance, norm);
}

// Writes logits, losses and every gradient to path, under the names of the tensors.
static void check_dump(const Model *m, const Acts *a, const Losses *s, const char *path)
{
    Entry *grads = (Entry *)host_alloc(count_entries(&m->layout), sizeof(Entry));
    Entry *end = entries_add(grads, &m->layout, "grad.", m->grads);
    Entry *entry = (Entry *)host_alloc((size_t)(end - grads) + 5, sizeof(Entry));
    accum *losses = (accum *)device_alloc(4 * sizeof(accum));
    accum values[4] = {(accum)s->total, (accum)s->main, (accum)s->mtp, (accum)s->balance};
    const char *const names[4] = {"loss", "loss.main", "loss.mtp", "loss.balance"};
    to_device(losses, values, sizeof values);
    size_t count = 1, n = a->B * a->T * m->config.V;
    accum *host = (accum *)host_alloc(n, sizeof(accum));
    accum *logits = (accum *)device_alloc(n * sizeof(accum));
    reals_to_host(host, a->layer[m->config.L - 1].logits, n);
    to_device(logits, host, n * sizeof(accum));
    Entry first = {"logits", {a->B, a->T, m->config.V}, 3, logits};
    entry[0] = first;
    for (size_t i = 0; i < 4; i++, count++) {
        snprintf(entry[count].name, sizeof entry[count].name, "%s", names[i]);
        entry[count].shape[0] = entry[count].dims = 1;
        entry[count].data = losses + i;
    }
    for (Entry *e = grads; e < end; e++)
        if (!strstr(e->name, "e_score_correction_bias")) entry[count++] = *e;
    safetensors_save(path, "", entry, count);
    free(grads);
    free(entry);
    free(host);
    device_free(logits);
    device_free(losses);
}

static int command_check(const Options *o)
{
    Config c = config_from_options(o);
    size_t T = sequence_length(o, &c), B = o->batch;
    Data text = data_load(o->data, &c);
    if (B == 0) die(BAD_INPUT, "--batch must be at least 1");
    if (text.n < size_mul(B, T + 1))
        die(BAD_INPUT, "%s: has %zu bytes; --batch %zu --seq %zu takes %zu", o->data, text.n, B, T,
            B * (T + 1));
    int *tokens = (int *)host_alloc(B * (T + 1), sizeof(int));
    tokens_copy(tokens, text.bytes, B * (T + 1));
    Acts plan = acts_plan(&c, B, T, 1);
    memory_plan(&c, 1, plan.arena.used, 0);
    acts_free(&plan);
    Model m = model_from_options(o, &c, 1);
    Acts a = acts_make(&m.config, B, T, 1);
    Optimizer opt = optimizer_make(&m);
    Recipe recipe = recipe_make(o, 0, o->check_lr, o->check_lr, o->check_bias_speed);
    acts_load(&a, tokens);
    for (size_t step = 0; step <= o->check_steps; step++) {
        model_forward(&m, &a);
        model_backward(&m, &a, 1);
        optimizer_count_load(&opt, &m, &a);
        Losses s = model_losses(&m, &a);
        double norm = grad_norm(&m);
        if (!isfinite(s.total) || !isfinite(norm))
            die(FAILED, "the loss is %g and the gradient's norm %g", s.total, norm);
        if (step == 0) {
            losses_print(&s, norm);
            if (*o->dump) check_dump(&m, &a, &s, o->dump);
        }
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
    {"sample", SAMPLE, command_sample, "continue a prompt"},
    {"eval", EVAL, command_eval, "mean loss of a model over a text"},
    {"check", CHECK, command_check, "losses, gradients and steps on one batch, for comparison"},
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
        char left[40]; \
        snprintf(left, sizeof left, "--%s %s", name, takes); \
        printf("  %-22s %s", left, what); \
        if (*standard && *standard != '\n') printf(" (default %s)", standard); \
        printf("\n"); \
    }
    OPTIONS(HELP)
}

static Options parse_options(const Command *command, int argc, char **argv)
{
    Options o;
#define DEFAULT(commands, type, field, name, standard, ...) o.field = parse_##type(name, standard);
    OPTIONS(DEFAULT)
    for (int i = 2; i + 1 < argc && command->bit == TRAIN; i++)
        if (!strcmp(argv[i], "--resume")) options_from_state(&o, argv[i + 1]);
    for (int i = 2; i < argc; i++) {
        const char *is = argv[i], *value = i + 1 < argc ? argv[i + 1] : NULL;
        int known = 0, is_flag = 0;
        if (!strcmp(is, "--help")) {
            print_help(command);
            exit(0);
        }
#define PARSE(commands, type, field, name, standard, takes, ...) \
        if (((commands) & command->bit) && !strcmp(is, "--" name)) { \
            known = 1; \
            is_flag = !*takes; \
            if (!is_flag && !value) die(BAD_INPUT, "--" name " needs a value: " takes); \
            o.field = parse_##type(name, is_flag ? "yes" : value); \
        }
        OPTIONS(PARSE)
        if (!known)
            die(BAD_INPUT, "unknown option %s; moe %s --help lists them", is, command->name);
        i += !is_flag;
    }
    return o;
}

#ifndef MOE_NO_MAIN
int main(int argc, char **argv)
{
    signal(SIGXFSZ, SIG_IGN); // a file-size limit is then an error that a write returns
    if (argc < 2 || !strcmp(argv[1], "--help") || !strcmp(argv[1], "help")) {
        print_help(NULL);
        return argc < 2 ? BAD_INPUT : 0;
    }
    for (size_t i = 0; i < COMMANDS; i++)
        if (!strcmp(argv[1], commands[i].name)) {
            Options o = parse_options(&commands[i], argc, argv);
            use_threads(o.threads);
            int status = commands[i].run(&o);
            if (fflush(stdout) || ferror(stdout))
                die(FAILED, "standard output: cannot write: %s", strerror(errno));
            return status;
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
