/*
test_moe.c: the tests of moe.c.

    ./test_moe              runs all of them
    ./test_moe NAME ...     runs these
    ./test_moe --list       prints their names, one a line
    MOE=path ./test_moe     tests the command line of another program than ./moe

This file takes in the whole of moe.c, is compiled twice (see the Makefile) and linked into one
program. In double, where difference quotients are good to 1e-9, stand the gradients and whatever
has an exact definition; in float, as moe is built, the fast paths, files and the program itself.
Every fast path has its plain twin here, written from the definition. Nothing is read but
tinyshakespeare/excerpt.txt and what the tests write in a directory of their own.
*/
#pragma GCC diagnostic ignored "-Wunused-function" // neither build tests all of moe.c
#define MOE_NO_MAIN
#include "moe.c"
#include <dirent.h>
#ifdef __linux__
#include <sys/prctl.h>
#endif
#include <sys/resource.h>
#include <sys/wait.h>

// ------------------------------------------------------------------------------------------------
// Helpers

static const char *test_name;
static int failures;        // checks of the running test that failed
static double worst;        // largest error that it measured
static char remark[100];    // what else there is to say of it
static void *kept[1 << 14]; // its memory, freed when it ends
static size_t keeps;

static void fail(const char *format, ...)
{
    va_list args;
    va_start(args, format);
    if (failures++ < 5) { // the rest would say the same
        printf("FAIL %s: ", test_name);
        vprintf(format, args);
        printf("\n");
    }
    va_end(args);
}

#define EXPECT(condition, ...) \
    if (!(condition)) fail(__VA_ARGS__)
#define REQUIRE(condition, ...) \
    if (!(condition)) { \
        fail(__VA_ARGS__); \
        return; \
    }

static void *keep(void *p)
{
    if (keeps == sizeof kept / sizeof *kept) die(FAILED, "%s: too many allocations", test_name);
    return kept[keeps++] = p;
}

static void *room(size_t count, size_t size) { return keep(host_alloc(count, size)); }

static real *reals(size_t n) { return (real *)room(n, sizeof(real)); }

static real *random_reals(size_t n, uint64_t seed) // in [-1, 1)
{
    real *x = reals(n);
    for (size_t i = 0; i < n; i++) x[i] = (real)(2 * random_uniform(seed, 0, i) - 1);
    return x;
}

static real *copy_of(const real *x, size_t n) { return (real *)memcpy(reals(n), x, n * sizeof *x); }

static int *random_ints(size_t n, size_t below, uint64_t seed)
{
    int *x = (int *)room(n, sizeof(int));
    for (size_t i = 0; i < n; i++) x[i] = (int)(random_u64(seed, 1, i) % below);
    return x;
}

// A text for an error message; holds until the fourth call from now.
static const char *label(const char *format, ...)
{
    static char text[4][200];
    static int next;
    va_list args;
    va_start(args, format);
    vsnprintf(text[next = (next + 1) % 4], sizeof text[0], format, args);
    va_end(args);
    return text[next];
}

static void within(double error, double most, const char *what)
{
    if (!(error <= worst)) worst = error;
    EXPECT(error <= most, "%s: expected an error up to %.3g, got %.3g", what, most, error);
}

static void near(double got, double expected, double most, const char *what)
{
    double error = fabs(got - expected) / (expected != 0 ? fabs(expected) : 1);
    if (!(error <= worst)) worst = error;
    EXPECT(error <= most, "%s: expected %.10g, got %.10g", what, expected, got);
}

static double norm_of(const real *x, size_t n)
{
    double sum = 0;
    for (size_t i = 0; i < n; i++) sum += (double)x[i] * (double)x[i];
    return sqrt(sum);
}

// |got - expected| / |expected|, Euclidean: a measure that no scale of the numbers changes.
static double relative_error(const real *got, const real *expected, size_t n)
{
    double difference = 0;
    for (size_t i = 0; i < n; i++) difference += pow((double)got[i] - (double)expected[i], 2);
    return difference == 0 ? 0 : sqrt(difference) / norm_of(expected, n);
}

// A small model with everything in it, at sizes that no width of a vector divides.
static Config small_config(void)
{
    Config c = config_preset(LAPTOP);
    c.V = 31, c.C = 13, c.L = 3, c.dense = 1, c.F = 11, c.NH = 2, c.Rq = 5, c.Rkv = 7;
    c.Dn = 3, c.Dr = 2, c.Dv = 5, c.E = 6, c.K = 2, c.S = 1, c.Fe = 5, c.G = 3, c.KG = 2;
    c.D = 2, c.Tmax = 64, c.alpha = 0.1, c.route_scale = 2.5, c.init_std = 0.4;
    return c;
}

// Random weights, with norms and router biases that are not what training starts from.
static Model random_model(const Config *c, int training, uint64_t seed)
{
    Model m = model_make(c, training);
    model_init(&m, seed);
    for (size_t i = 0; i < m.layout.tensors; i++) {
        const Tensor *t = &m.layout.tensor[i];
        for (size_t j = 0; j < t->cols; j++) {
            double u = random_uniform(seed, 1000 + i, j) - 0.5;
            if (t->kind == NORM) m.weights[t->offset + j] = (real)(1 + 0.4 * u);
            if (t->kind == ROUTER_BIAS) m.weights[t->offset + j] = (real)(0.2 * u);
        }
    }
    return m;
}

static const char *name_of(const Model *m, size_t tensor)
{
    char name[NAME_MAX_LENGTH];
    tensor_name(name, "", &m->layout.tensor[tensor], 0);
    return label("%s", name);
}

// Causal attention by the definition, for one sequence; a token sees the last `window` ones.
static void naive_attention(real *out, const real *q, const real *kv, const real *k_pe, size_t T,
                            size_t NH, size_t Dn, size_t Dr, size_t Dv, size_t window, double scale)
{
    double *p = (double *)room(T, sizeof(double));
    for (size_t th = 0; th < T * NH; th++) {
        size_t t = th / NH, h = th % NH, first = t + 1 > window ? t + 1 - window : 0;
        const real *qt = q + th * (Dn + Dr);
        double sum = 0;
        for (size_t u = first; u <= t; u++) {
            const real *k = kv + (u * NH + h) * (Dn + Dv);
            double dot = 0;
            for (size_t i = 0; i < Dn + Dr; i++)
                dot += (double)qt[i] * (double)(i < Dn ? k[i] : k_pe[u * Dr + i - Dn]);
            sum += p[u] = exp(scale * dot);
        }
        for (size_t i = 0; i < Dv; i++) {
            double o = 0;
            for (size_t u = first; u <= t; u++)
                o += p[u] / sum * (double)kv[(u * NH + h) * (Dn + Dv) + Dn + i];
            out[th * Dv + i] = (real)o;
        }
    }
}

#ifdef MOE_DOUBLE
// ------------------------------------------------------------------------------------------------
// Gradients: what a backward says against differences of its forward

// A derivative is probed along single elements and along one random direction, which sees them all.
enum { PROBES = 12 };
static const double tolerance = 1e-8; // of every gradient; differences leave about 1e-9

static size_t probed(size_t n, size_t i) { return n <= PROBES ? i : random_u64(3, n, i) % n; }

static double direction(size_t n, size_t j) { return random_normal(4, n, j) / sqrt((double)n); }

// num[i] = derivative of loss(p) along probe i of x[0 .. n), by a difference good to the 4th order:
// (8 (f(h) - f(-h)) - (f(2h) - f(-2h))) / 12h.
static void numeric_gradient(double num[PROBES + 1], double (*loss)(void *), void *p, real *x,
                             size_t n)
{
    const double h = 2e-4, step[4] = {h, -h, 2 * h, -2 * h};
    real *was = (real *)host_alloc(n, sizeof(real));
    memcpy(was, x, n * sizeof(real));
    for (size_t i = 0; i <= PROBES; i++) {
        size_t at = i < PROBES ? probed(n, i) : 0, end = i < PROBES ? at + 1 : n;
        double f[4];
        num[i] = 0;
        if (i < PROBES && i >= n) continue;
        for (int s = 0; s < 4; s++) {
            for (size_t j = at; j < end; j++)
                x[j] = was[j] + step[s] * (i < PROBES ? 1 : direction(n, j));
            f[s] = loss(p);
        }
        memcpy(x, was, n * sizeof(real));
        num[i] = (8 * (f[0] - f[1]) - (f[2] - f[3])) / (12 * h);
    }
    free(was);
}

// How far num is from the gradient ana [n], as a share of the gradient's size. Infinite if that is
// zero, unless it must be; then the largest number.
static double gradient_error(const double num[PROBES + 1], const accum *ana, size_t n,
                             int must_be_zero)
{
    size_t probes = min_size(n, PROBES);
    double along = 0, difference = 0, largest = 0, norm = norm_of(ana, n);
    for (size_t j = 0; j < n; j++) along += direction(n, j) * ana[j];
    for (size_t i = 0; i < probes; i++) {
        difference += pow(num[i] - ana[probed(n, i)], 2);
        largest = fmax(largest, fabs(num[i]));
    }
    if (must_be_zero) return fmax(largest, fmax(fabs(num[PROBES]), norm));
    double each = sqrt(difference * (double)n / (double)probes), way = fabs(num[PROBES] - along);
    double error = fmax(each, way * sqrt((double)n)) / norm;
    return norm > 0 && isfinite(error) ? error : INFINITY;
}

// An operation under test: inputs x, of which its backward makes dx; the loss is out . dout.
typedef struct Op {
    void (*forward)(struct Op *);
    const size_t *s;        // sizes, in the order in which forward takes them
    size_t n[3], outputs;
    real *x[3], *dx[3], *out, *dout, *saved[2];
    real *base;             // out at first; the loss counts from there, and so loses no digits
    int *index[3];
    enum Mode mode[3];      // what the backward is to do with dx
    size_t gap;             // numbers between rows that SET must leave alone
    int zero[3];            // this gradient must be 0
} Op;

static double pattern(size_t i) { return 3 + (double)(i % 7); } // what stands in dx, and in out

static Op op_make(void (*forward)(Op *), const size_t *s, size_t outputs, size_t n0, size_t n1,
                  size_t n2)
{
    Op o;
    memset(&o, 0, sizeof o);
    o.forward = forward, o.s = s, o.outputs = outputs, o.n[0] = n0, o.n[1] = n1, o.n[2] = n2;
    for (size_t i = 0; i < 3; i++) {
        o.mode[i] = ADD;
        o.x[i] = random_reals(o.n[i], i);
        o.dx[i] = reals(o.n[i]);
        for (size_t j = 0; j < o.n[i]; j++) o.dx[i][j] = pattern(j);
    }
    o.out = reals(outputs);
    o.base = reals(outputs);
    o.dout = random_reals(outputs, 9);
    return o;
}

static double op_loss(void *p)
{
    Op *o = (Op *)p;
    double sum = 0;
    for (size_t i = 0; i < o->outputs; i++) o->out[i] = pattern(i);
    o->forward(o);
    for (size_t i = 0; i < o->outputs; i++) sum += (o->out[i] - o->base[i]) * o->dout[i];
    return sum;
}

// After the backward. What stood in dx before, ADD must have kept and SET must have replaced.
static double op_error(Op *o)
{
    double num[PROBES + 1], most = 0;
    op_loss(o);
    memcpy(o->base, o->out, o->outputs * sizeof(real));
    for (size_t i = 0; i < 3 && o->n[i]; i++) {
        real *dx = o->dx[i];
        size_t untouched = 0;
        for (size_t j = 0; j < o->n[i]; j++) {
            int is_gap = o->mode[i] == SET && dx[j] == pattern(j);
            if (is_gap || o->mode[i] == ADD) dx[j] -= pattern(j);
            untouched += (size_t)is_gap;
        }
        EXPECT(o->mode[i] == ADD || untouched == (i ? 0 : o->gap),
               "of input %zu's gradient %zu numbers are left alone", i, untouched);
        numeric_gradient(num, op_loss, o, o->x[i], o->n[i]);
        most = fmax(most, gradient_error(num, dx, o->n[i], o->zero[i]));
    }
    return most;
}

static void op_check(Op *o, const char *what) { within(op_error(o), tolerance, what); }

static Rows op_rows(const Op *o) // o->index[0]: where groups begin, if there are any
{
    Rows r = {o->index[0], o->index[0] ? 5 : 1, o->s[0]};
    return r;
}

static void matmul_op(Op *o)
{
    matmul_forward(o->out, o->x[0], o->x[1], op_rows(o), o->s[1], o->s[2], o->mode[0]);
}

static void test_matmul_gradient(void)
{
    static const size_t size[][3] = { // rows, O, I
        {1, 1, 1}, {12, 3, 5}, {9, 17, 13}, {33, 9, 67}, {300, 270, 9}, {261, 5, 259},
    };
    static const int cut[][6] = { // where groups end, in twelfths of the rows; first: one group
        {0}, {0, 0, 5, 5, 12, 12}, {0, 0, 0, 12, 12, 12}, {0, 1, 3, 4, 9, 12},
    };
    for (size_t i = 0; i < 6 * 4 * 4; i++) {
        const size_t *s = size[i / 16], N = s[0], O = s[1], I = s[2], c = i / 4 % 4;
        Op o = op_make(matmul_op, s, N * O, N * I, (c ? 5 : 1) * O * I, 0);
        o.mode[0] = i % 2 ? ADD : SET, o.mode[1] = i / 2 % 2 ? ADD : SET;
        if (c) o.index[0] = (int *)room(6, sizeof(int));
        for (size_t e = 0; c && e < 6; e++) o.index[0][e] = (int)N * cut[c][e] / 12;
        op_loss(&o);
        real *plain = reals(N * O);
        for (size_t n = 0, e = 0; n < N; n++) {
            while (c && (int)n >= o.index[0][e + 1]) e++;
            for (size_t j = 0; j < O; j++) {
                double sum = o.mode[0] == ADD ? pattern(n * O + j) : 0;
                for (size_t k = 0; k < I; k++)
                    sum += o.x[0][n * I + k] * o.x[1][(e * O + j) * I + k];
                plain[n * O + j] = sum;
            }
        }
        within(relative_error(o.out, plain, N * O), 1e-14, "forward");
        matmul_backward_x(o.dx[0], o.dout, o.x[1], op_rows(&o), O, I, o.mode[0]);
        matmul_backward_w(o.dx[1], o.dout, o.x[0], op_rows(&o), O, I, o.mode[1]);
        op_check(&o, label("%zu x %zu x %zu, cut %zu", N, O, I, c));
    }
}

static void rmsnorm_op(Op *o)
{
    const size_t *s = o->s;
    rmsnorm_forward(o->out, o->saved[0], o->x[0], o->x[1], s[0], s[1], s[2], s[3], 0.1);
}

// spoil: what the saved 1 / rms of one row is multiplied by before the backward.
static double rmsnorm_error(const size_t *s, enum Mode mode, double spoil)
{
    Op o = op_make(rmsnorm_op, s, s[0] * s[2], s[0] * s[3], s[1], 0);
    o.saved[0] = reals(s[0]), o.mode[0] = mode, o.gap = s[0] * (s[3] - s[1]);
    rmsnorm_op(&o);
    o.saved[0][s[0] / 2] *= spoil;
    rmsnorm_backward(o.dx[0], o.dx[1], o.dout, o.x[0], o.x[1], o.saved[0], s[0], s[1], s[2], s[3],
                     mode);
    return op_error(&o);
}

static void test_rmsnorm_gradient(void)
{
    static const size_t size[][4] = { // N, C, ld_out, ld_x
        {1, 1, 1, 1}, {3, 13, 13, 13}, {5, 13, 26, 15}, {7, 70, 71, 73},
    };
    for (size_t i = 0; i < 8; i++)
        within(rmsnorm_error(size[i / 2], i % 2 ? ADD : SET, 1), tolerance,
               label("size %zu", i / 2));
}

static void swiglu_op(Op *o) { swiglu_forward(o->out, o->x[0], o->x[1], o->outputs); }

static void test_swiglu_gradient(void)
{
    for (size_t n = 1; n < 80; n += 13) {
        Op o = op_make(swiglu_op, NULL, n, n, n, 0);
        o.mode[0] = o.mode[1] = SET;
        for (size_t i = 0; i < n; i++) o.x[0][i] *= 8;
        swiglu_backward(o.dx[0], o.dx[1], o.dout, o.x[0], o.x[1], n);
        op_check(&o, label("n %zu", n));
    }
}

static void gate_up_op(Op *o)
{
    gate_up_forward(o->out, o->saved[0], o->saved[1], o->x[0], o->x[1], o->x[2], op_rows(o),
                    o->s[1], o->s[2]);
}

static void test_gate_up_gradient(void)
{
    static const size_t size[][3] = {{1, 1, 1}, {12, 5, 3}, {24, 17, 13}, {90, 3, 5}, {300, 2, 3}};
    for (size_t i = 0; i < 5 * 4; i++) { // rows, C, F: few, and more than those
        const size_t *s = size[i / 4], N = s[0], C = s[1], F = s[2], groups = i % 2 ? 5 : 1;
        Op o = op_make(gate_up_op, s, N * F, N * C, groups * F * C, groups * F * C);
        real *dgate = reals(N * F), *dup = reals(N * F);
        o.mode[0] = i / 2 % 2 ? ADD : SET, o.mode[1] = o.mode[2] = SET;
        o.saved[0] = reals(N * F), o.saved[1] = reals(N * F);
        if (groups > 1) o.index[0] = (int *)room(6, sizeof(int));
        for (size_t e = 0; groups > 1 && e < 6; e++) o.index[0][e] = (int)(N * e / 5);
        gate_up_op(&o);
        swiglu_backward(dgate, dup, o.dout, o.saved[0], o.saved[1], N * F);
        gate_up_backward_x(o.dx[0], dgate, dup, o.x[1], o.x[2], op_rows(&o), C, F, o.mode[0]);
        matmul_backward_w(o.dx[1], dgate, o.x[0], op_rows(&o), F, C, SET);
        matmul_backward_w(o.dx[2], dup, o.x[0], op_rows(&o), F, C, SET);
        op_check(&o, label("%zu x %zu x %zu, groups %zu", N, C, F, groups));
    }
}

static void embedding_op(Op *o)
{
    embedding_forward(o->out, o->index[0], o->x[0], o->s[0], o->s[1]);
}

static void crop_op(Op *o)
{
    crop_forward(o->out, o->x[0], o->s[0], o->s[1], o->s[2], o->s[3]);
}

static void test_embedding_crop_gradient(void)
{
    static const size_t size[][3] = {{1, 1, 2}, {12, 5, 7}, {40, 70, 3}}; // N, C, V
    static const size_t cut[][4] = {{1, 1, 1, 1}, {2, 3, 4, 5}, {3, 1, 6, 13}}; // B, T, Tin, C
    for (size_t i = 0; i < 3; i++) {
        const size_t *s = size[i], *t = cut[i];
        Op o = op_make(embedding_op, s, s[0] * s[1], s[2] * s[1], 0, 0);
        o.index[0] = random_ints(s[0], s[2], i);
        embedding_backward(o.dx[0], o.dout, o.index[0], s[0], s[1]);
        op_check(&o, label("embedding %zu", i));
        o = op_make(crop_op, t, t[0] * t[1] * t[3], t[0] * t[2] * t[3], 0, 0);
        o.mode[0] = SET;
        crop_backward(o.dx[0], o.dout, t[0], t[1], t[2], t[3]);
        op_check(&o, label("crop %zu", i));
    }
}

static void rope_op(Op *o)
{
    const size_t *s = o->s;
    rope_forward(o->out, o->x[0], o->index[0], o->saved[0], s[0], s[1], s[2], s[3], s[4], s[5]);
}

static void test_rope_gradient(void)
{
    static const size_t size[][6] = { // N, heads, Dr, ld_out, ld_x, head
        {1, 1, 2, 2, 2, 2}, {5, 3, 6, 30, 28, 9}, {9, 1, 4, 5, 11, 4},
    };
    Config c = small_config();
    for (size_t i = 0; i < 3; i++) {
        const size_t *s = size[i], N = s[0], numbers = N * s[1] * s[2];
        c.Dr = s[2];
        Op o = op_make(rope_op, s, N * s[3], N * s[4], 0, 0);
        o.index[0] = random_ints(N, 50, i);
        o.saved[0] = (real *)keep(rope_table(&c, 50));
        o.mode[0] = SET, o.gap = N * s[4] - numbers;
        rope_backward(o.dx[0], o.dout, o.index[0], o.saved[0], N, s[1], s[2], s[4], s[3], s[5]);
        op_check(&o, label("size %zu", i));
        real *turned = copy_of(o.x[0], o.n[0]); // in place
        rope_forward(turned, turned, o.index[0], o.saved[0], N, s[1], s[2], s[4], s[4], s[5]);
        rope_op(&o);
        for (size_t k = 0; k < numbers; k += 2) { // j, j + 1 of head h turn by pos theta^(-j/Dr)
            size_t n = k / (s[1] * s[2]), h = k / s[2] % s[1], j = k % s[2], at = h * s[5] + j;
            const real *x = o.x[0] + n * s[4] + at, *y = o.out + n * s[3] + at;
            double angle = o.index[0][n] * pow(c.theta, -(double)j / (double)s[2]);
            near(y[0], cos(angle) * x[0] - sin(angle) * x[1], 1e-12, "rotated");
            near(y[1], sin(angle) * x[0] + cos(angle) * x[1], 1e-12, "rotated");
            EXPECT(!memcmp(y, turned + n * s[4] + at, 2 * sizeof(real)), "in place it differs");
        }
    }
}

// deepseek-v3's YaRN: pairs 0 to 10 of 32 turn fast and are left alone, from 23 on they are slowed
// down 40 times, and between the two in proportion.
static void test_yarn(void)
{
    Config c = config_preset(DEEPSEEK_V3);
    c.yarn_mscale_all_dim = 0.5;
    real *table = (real *)keep(rope_table(&c, 2));
    double m = 0.05 * log(40) + 1;
    for (size_t j = 0; j < 32; j++) {
        double share = fmin(fmax(((double)j - 10) / 13, 0), 1);
        double angle = pow(10000, -(double)j / 32) * (1 - share + share / 40);
        const real *at = table + 64 + 2 * j; // of position 1
        near(atan2(at[1], at[0]), angle, 1e-9, label("angle %zu", j));
        near(hypot(at[0], at[1]), (0.1 * log(40) + 1) / m, 1e-12, "length");
    }
    near(attention_scale(&c), m * m / sqrt(192), 1e-12, "scale");
}

static void attention_op(Op *o)
{
    const size_t *s = o->s;
    attention_forward(o->out, o->saved[0], o->x[0], o->x[1], o->x[2], s[0], s[1], s[2], s[3], s[4],
                      s[5], 0.7);
}

// spoil: what one number of the saved softmax statistics or of the saved output is changed by.
static double attention_error(const size_t *s, double spoil_lse, double spoil_out)
{
    size_t B = s[0], T = s[1], NH = s[2], Dn = s[3], Dr = s[4], Dv = s[5], N = B * T * NH;
    Op o = op_make(attention_op, s, N * Dv, N * (Dn + Dr), N * (Dn + Dv), B * T * Dr);
    o.saved[0] = reals(N), o.saved[1] = reals(N * Dr);
    o.mode[0] = o.mode[1] = o.mode[2] = SET;
    o.zero[0] = o.zero[2] = T == 1; // one key has all the attention, whatever it is
    attention_op(&o);
    real *plain = reals(N * Dv);
    for (size_t b = 0; b < B; b++)
        naive_attention(plain + b * T * NH * Dv, o.x[0] + b * T * NH * (Dn + Dr),
                        o.x[1] + b * T * NH * (Dn + Dv), o.x[2] + b * T * Dr, T, NH, Dn, Dr, Dv,
                        T, 0.7);
    within(relative_error(o.out, plain, N * Dv), 1e-13, label("forward, T %zu", T));
    o.saved[0][N / 2] += spoil_lse;
    o.out[N * Dv / 2] += spoil_out;
    attention_backward(o.dx[0], o.dx[1], o.dx[2], o.saved[1], o.dout, o.out, o.saved[0], o.x[0],
                       o.x[1], o.x[2], B, T, NH, Dn, Dr, Dv, 0.7);
    return op_error(&o);
}

static void test_attention_gradient(void)
{
    static const size_t size[][6] = { // B, T, NH, Dn, Dr, Dv
        {1, 1, 1, 1, 2, 1}, {2, 1, 2, 3, 2, 5}, {2, 7, 3, 3, 2, 5},
        {1, ATTENTION_BLOCK, 1, 5, 4, 3}, {2, ATTENTION_BLOCK + 1, 2, 3, 2, 5},
        {1, 2 * ATTENTION_BLOCK + 9, 3, 13, 6, 7},
    };
    for (size_t i = 0; i < 6; i++)
        within(attention_error(size[i], 0, 0), tolerance, label("size %zu", i));
}

// sizes: N, C, E, K, G, KG, norm_topk, whether scores are to tie. out: [g; s]
static void router_op(Op *o)
{
    const size_t *s = o->s;
    router_forward(o->out + s[0] * s[3], o->index[0], o->out, o->x[0], o->x[1], o->saved[0], s[0],
                   s[1], s[2], s[3], s[4], s[5], (int)s[6], 2.5);
}

// Whether expert e is chosen, by the definition: those with more, or as much and before it, are
// counted. First for its group, whose score is its largest sum of two.
static int is_chosen(const double *score, size_t e, size_t E, size_t K, size_t G, size_t KG)
{
    double group[8];
    size_t size = E / G, better = 0;
    int kept_group[8];
    for (size_t i = 0; i < G; i++) {
        group[i] = -INFINITY;
        for (size_t a = i * size; a < (i + 1) * size; a++)
            for (size_t b = a + 1; b < (i + 1) * size; b++)
                group[i] = fmax(group[i], score[a] + score[b]);
    }
    for (size_t i = 0; i < G; i++) {
        size_t ahead = 0;
        for (size_t j = 0; j < G; j++)
            ahead += group[j] > group[i] || (group[j] == group[i] && j < i);
        kept_group[i] = ahead < KG;
    }
    for (size_t j = 0; j < E; j++)
        better += kept_group[j / size] && (score[j] > score[e] || (score[j] == score[e] && j < e));
    return kept_group[e / size] && better < K;
}

static void test_router_gradient(void)
{
    static const size_t cases[][8] = {
        {1, 1, 1, 1, 1, 1, 0, 0}, {9, 13, 6, 2, 1, 1, 1, 0}, {9, 13, 6, 2, 1, 1, 0, 0},
        {9, 5, 12, 3, 4, 2, 1, 0}, {7, 5, 8, 4, 2, 1, 0, 0}, {5, 7, 6, 6, 1, 1, 1, 0},
        {5, 7, 6, 6, 3, 3, 0, 0}, {9, 13, 6, 2, 3, 2, 1, 1}, {9, 13, 7, 1, 1, 1, 1, 0},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const size_t *z = cases[i], N = z[0], C = z[1], E = z[2], K = z[3];
        Op o = op_make(router_op, z, N * (K + E), N * C, E * C, 0);
        o.index[0] = (int *)room(N * K, sizeof(int));
        o.saved[0] = random_reals(E, 77);
        for (size_t e = 0; e < E; e++) o.saved[0][e] = 2 * o.saved[0][e] - 1; // some scores below 0
        for (size_t j = 0; j < E * C && z[7]; j++) o.x[1][j] = o.saved[0][j / C] = 0;
        o.zero[0] = (int)z[7], o.mode[1] = i % 2 ? ADD : SET;
        router_op(&o);
        const real *s = o.out + N * K;
        for (size_t n = 0; n < N; n++) {
            double score[64], sum = 1e-20;
            for (size_t e = 0; e < E; e++) {
                double logit = 0;
                for (size_t c = 0; c < C; c++) logit += o.x[0][n * C + c] * o.x[1][e * C + c];
                near(s[n * E + e], 1 / (1 + exp(-logit)), 1e-13, "affinity");
                score[e] = s[n * E + e] + o.saved[0][e];
            }
            for (size_t k = 0; k < K; k++) sum += s[n * E + (size_t)o.index[0][n * K + k]];
            for (size_t k = 0; k < K; k++) {
                size_t e = (size_t)o.index[0][n * K + k];
                EXPECT(is_chosen(score, e, E, K, z[4], z[5]), "case %zu: chose expert %zu", i, e);
                for (size_t j = 0; j < k; j++)
                    EXPECT(o.index[0][n * K + j] != (int)e, "case %zu: chose %zu twice", i, e);
                near(o.out[n * K + k], 2.5 * s[n * E + e] / (z[6] ? sum : 1), 1e-13, "weight");
            }
        }
        hold_routing = 1;
        real *ds = copy_of(o.dout + N * K, N * E); // of the loss's part in s
        router_backward(o.dx[0], o.dx[1], ds, o.dout, s, o.index[0], o.x[0], o.x[1], N, C, E, K,
                        (int)z[6], 2.5, o.mode[1]);
        op_check(&o, label("case %zu", i));
        hold_routing = 0;
    }
}

static void balance_op(Op *o)
{
    balance_forward(o->out, o->saved[0], o->x[0], o->s[0], o->s[1], o->s[2], o->s[3]);
}

static void test_balance_gradient(void)
{
    static const size_t size[][4] = {{1, 1, 2, 1}, {2, 5, 6, 2}, {3, 7, 9, 3}, {2, 4, 5, 5}};
    for (size_t i = 0; i < 4; i++) {
        const size_t *s = size[i], B = s[0], T = s[1], E = s[2], K = s[3];
        Op o = op_make(balance_op, s, B, B * T * E, 0, 0);
        o.saved[0] = reals(B * E), o.mode[0] = SET;
        o.zero[0] = K == E; // all loads are alike, and the shares sum to 1
        for (size_t j = 0; j < o.n[0]; j++) o.x[0][j] = 0.5 + 0.4 * o.x[0][j];
        balance_op(&o);
        for (size_t b = 0; b < B; b++) { // equations 17-20
            double loss = 0;
            for (size_t e = 0; e < E; e++) {
                double f = 0, P = 0;
                for (size_t t = 0; t < T; t++) {
                    const real *st = o.x[0] + (b * T + t) * E;
                    double sum = 0;
                    for (size_t j = 0; j < E; j++) sum += st[j];
                    f += is_chosen(st, e, E, K, 1, 1) ? (double)E / (double)(K * T) : 0;
                    P += st[e] / sum / (double)T;
                }
                loss += f * P;
            }
            near(o.out[b], loss, 1e-13, "loss");
            o.dout[b] = 0.7;
        }
        hold_routing = 1;
        balance_backward(o.dx[0], 0.7, o.saved[0], o.x[0], B, T, E);
        op_check(&o, label("size %zu", i));
        hold_routing = 0;
    }
}

// Expert e multiplies by e + 1.
static void apply_experts(real *xs, const int *offsets, size_t E, size_t C)
{
    for (size_t e = 0; e < E; e++)
        for (size_t i = (size_t)offsets[e] * C; i < (size_t)offsets[e + 1] * C; i++)
            xs[i] *= (real)(e + 1);
}

static void dispatch_op(Op *o)
{
    size_t N = o->s[0], K = o->s[1], E = o->s[2], C = o->s[3];
    dispatch_forward(o->saved[0], o->index[1], o->index[2], o->x[0], o->index[0], N, K, E, C);
    apply_experts(o->saved[0], o->index[1], E, C);
    combine_forward(o->out, o->out, o->saved[0], o->x[1], o->index[2], N, K, C);
}

static void test_dispatch_combine_gradient(void)
{
    static const size_t size[][5] = { // N, K, E, C, experts that get anything
        {1, 1, 1, 1, 1}, {9, 2, 6, 13, 6}, {9, 3, 7, 5, 3}, {8, 1, 5, 3, 1},
    };
    for (size_t i = 0; i < 8; i++) {
        const size_t *s = size[i / 2], N = s[0], K = s[1], E = s[2], C = s[3];
        Op o = op_make(dispatch_op, s, N * C, N * C, N * K, 0);
        int *topk = o.index[0] = random_ints(N * K, s[4], i), row = 0;
        o.index[1] = random_ints(E + 1, 9, 1), o.index[2] = random_ints(N * K, 9, 2);
        o.saved[0] = reals(N * K * C), o.mode[0] = i % 2 ? ADD : SET, o.mode[1] = SET;
        for (size_t j = 0; j < N * K; j++) // K different ones
            topk[j] = (topk[j - j % K] + (int)(j % K)) % (int)s[4];
        op_loss(&o);
        for (size_t e = 0; e <= E; e++) { // experts in order, and tokens in order within one
            EXPECT(o.index[1][e] == row, "expert %zu begins at %d, not %d", e, o.index[1][e], row);
            for (size_t j = 0; j < N * K; j++)
                if (topk[j] == (int)e)
                    EXPECT(o.index[2][j] == row++, "choice %zu is at %d", j, o.index[2][j]);
        }
        real *plain = reals(N * C), *dxs = random_reals(N * K * C, 5);
        for (size_t j = 0; j < N * C; j++) {
            plain[j] = pattern(j);
            for (size_t k = j / C * K; k < (j / C + 1) * K; k++)
                plain[j] += o.x[1][k] * (topk[k] + 1) * o.x[0][j];
        }
        within(relative_error(o.out, plain, N * C), 1e-14, "forward");
        combine_backward(dxs, o.dx[1], o.dout, o.saved[0], o.x[1], o.index[2], N, K, C);
        apply_experts(dxs, o.index[1], E, C);
        dispatch_backward(o.dx[0], dxs, o.index[2], N, K, C, o.mode[0]);
        op_check(&o, label("size %zu", i / 2));
    }
}

static void cross_entropy_op(Op *o)
{
    cross_entropy_forward(o->out, o->saved[0], o->x[0], o->index[0], 0.7, o->s[0], o->s[1]);
}

static void test_cross_entropy_gradient(void)
{
    static const size_t size[][2] = {{1, 2}, {5, 31}, {9, 257}}; // N, V
    for (size_t i = 0; i < 3; i++) {
        size_t N = size[i][0], V = size[i][1];
        Op o = op_make(cross_entropy_op, size[i], N, N * V, 0, 0);
        o.saved[0] = reals(N), o.mode[0] = SET;
        o.index[0] = random_ints(N, V, i);
        for (size_t j = 0; j < N * V; j++) o.x[0][j] *= 5;
        cross_entropy_op(&o);
        for (size_t n = 0; n < N; n++) {
            double sum = 0, y = o.x[0][n * V + (size_t)o.index[0][n]];
            for (size_t v = 0; v < V; v++) sum += exp(o.x[0][n * V + v] / 0.7);
            near(o.out[n], log(sum) - y / 0.7, 1e-12, "loss");
        }
        real *dloss = copy_of(o.dout, N);
        for (size_t n = 0; n < N; n++) dloss[n] /= 0.3;
        cross_entropy_backward(o.dx[0], 0.3, dloss, o.saved[0], o.x[0], o.index[0], 0.7, N, V);
        op_check(&o, label("size %zu", i));
    }
}

// The whole model

typedef struct {
    Model m;
    Acts a;
    double (*num)[PROBES + 1]; // of each tensor
} Trial;

static double trial_loss(void *p)
{
    Trial *t = (Trial *)p;
    model_forward(&t->m, &t->a);
    return model_losses(&t->m, &t->a).total;
}

// Loads B rows of T + 1 random tokens and probes the loss's derivatives, the routing held.
static Trial trial_make(Model m, size_t B, size_t T)
{
    Trial t = {m, acts_make(&m.config, B, T, 1), NULL};
    t.num = (double (*)[PROBES + 1])room(m.layout.tensors, sizeof *t.num);
    acts_load(&t.a, random_ints(B * (T + 1), m.config.V, 11));
    model_forward(&t.m, &t.a);
    hold_routing = 1;
    for (size_t i = 0; i < m.layout.tensors; i++)
        numeric_gradient(t.num[i], trial_loss, &t, m.weights + m.layout.tensor[i].offset,
                         tensor_size(&m.layout.tensor[i]));
    model_forward(&t.m, &t.a);
    return t;
}

static void trial_free(Trial *t)
{
    hold_routing = 0;
    acts_free(&t->a);
    model_free(&t->m);
}

// Tensors that nothing flows to.
static int is_idle(const Config *c, size_t T, const Tensor *t)
{
    int depth = t->layer < (int)c->L ? 0 : t->layer - (int)c->L + 1;
    int seen = (int)T - depth; // tokens of a sequence
    return t->kind == ROUTER_BIAS || seen <= 0 || (seen == 1 && strstr(t->name, "self_attn.q_")) ||
           (t->kind == ROUTER && c->E == 1); // one key, one expert: there is nothing to choose
}

// Runs model_backward; the worst error of all gradients, and the number of its tensor.
static double trial_error(Trial *t, size_t *where)
{
    double most = 0;
    memset(t->m.grads, 0, t->m.layout.elements * sizeof(accum));
    model_backward(&t->m, &t->a, 1);
    for (size_t i = 0; i < t->m.layout.tensors; i++) {
        const Tensor *x = &t->m.layout.tensor[i];
        double error = gradient_error(t->num[i], t->m.grads + x->offset, tensor_size(x),
                                      is_idle(&t->m.config, t->a.T, x));
        if (error > most) most = error, *where = i;
    }
    return most;
}

static void check_model(const char *what, Model m, size_t B, size_t T)
{
    Trial t = trial_make(m, B, T);
    size_t where = 0;
    double error = trial_error(&t, &where);
    within(error, tolerance, label("%s, %s", what, name_of(&t.m, where)));
    trial_free(&t);
}

static void test_model_gradient(void)
{
    Config c = small_config();
    check_model("all of it", random_model(&c, 1, 1), 2, 7);
    check_model("T 2", random_model(&c, 1, 4), 3, 2);
    c.norm_topk = 0, c.S = 0, c.mtp_weight = 1;
    check_model("no norm_topk, no shared expert", random_model(&c, 1, 7), 2, 5);

    c = small_config();
    c.Rq = 0, c.D = 1;
    check_model("no query latent, B 1", random_model(&c, 1, 2), 1, 6);
    c.E = 0;
    check_model("dense", random_model(&c, 1, 8), 2, 6);

    c = small_config();
    c.Dr = 6, c.yarn_factor = 4, c.yarn_original = 4, c.yarn_fast = 32, c.yarn_slow = 1;
    c.yarn_mscale = 1, c.yarn_mscale_all_dim = 0.7, c.D = 1;
    check_model("YaRN", random_model(&c, 1, 3), 2, 9);

    c = small_config();
    c.L = 1, c.dense = 0, c.D = 1;
    check_model("longer than attention's block", random_model(&c, 1, 9), 1, ATTENTION_BLOCK + 7);
    c.alpha = 0, c.D = 0, c.C = c.Rkv = c.Rq = 2, c.Dn = 1, c.Dv = 1, c.Fe = 1, c.NH = 1;
    check_model("sizes 1", random_model(&c, 1, 10), 2, 5);
}

// A model whose routers send every token to the first K experts.
static Model crowded_model(const Config *c, uint64_t seed)
{
    Model m = random_model(c, 1, seed);
    for (size_t l = c->dense; l < layers(c); l++)
        for (size_t e = 0; e < c->K; e++) m.layer[l].router_bias[e] = 10 - (double)e;
    return m;
}

static void test_model_gradient_routing(void)
{
    Config c = small_config();
    c.G = c.KG = 1;
    check_model("two experts have all tokens", crowded_model(&c, 12), 2, 7);
    c.K = 1;
    check_model("one expert has all tokens", crowded_model(&c, 13), 2, 7);
    c.K = c.E;
    check_model("K = E", random_model(&c, 1, 6), 2, 5);
    c.K = c.E = 1;
    check_model("E 1", random_model(&c, 1, 14), 2, 5);

    c = small_config();
    Model m = random_model(&c, 1, 15);
    for (size_t l = c.dense; l < layers(&c); l++) {
        memset(m.layer[l].w_router, 0, c.E * c.C * sizeof(real));
        memset(m.layer[l].router_bias, 0, c.E * sizeof(accum));
    }
    check_model("ties", m, 2, 7);
}

// A sequence too short for the MTP depths: they have no position, and must take no part.
static void test_model_gradient_t1(void)
{
    Config c = small_config();
    double loss[2];
    check_model("T 1", random_model(&c, 1, 5), 2, 1);
    for (int i = 0; i < 2; i++, c.D = 0) {
        Model m = random_model(&c, 1, 5);
        Acts a = acts_make(&c, 2, 1, 1);
        acts_load(&a, random_ints(4, c.V, 11));
        model_forward(&m, &a);
        loss[i] = model_losses(&m, &a).total;
        acts_free(&a);
        model_free(&m);
    }
    EXPECT(loss[0] == loss[1], "the loss is %.9g, without MTP %.9g", loss[0], loss[1]);
}

// Depth k of multi-token prediction is to tell token i + k + 1 from i + k and those before, and
// counts in the loss as section 2.2 of [V3] has it.
static void test_mtp_depths(void)
{
    enum { B = 2, T = 6 };
    Config c = small_config();
    Model m = random_model(&c, 1, 18);
    Acts a = acts_make(&c, B, T, 1);
    int *text = random_ints(B * (T + 1), c.V, 19);
    double mean[3] = {0, 0, 0}, balance = 0; // over depths 1, 2
    acts_load(&a, text);
    model_forward(&m, &a);
    for (size_t k = 0; k < 3; k++)
        for (size_t b = 0; b < B; b++)
            for (size_t t = 0; t < T - k; t++) {
                size_t at = b * (T - k) + t, from = b * (T + 1) + t + k;
                const real *z = a.layer[c.L - 1 + k].logits + at * c.V;
                double sum = 0;
                for (size_t v = 0; v < c.V; v++) sum += exp(z[v]);
                mean[k] += (log(sum) - z[text[from + 1]]) / (B * T);
                EXPECT(a.batch[k].token[at] == text[from] && a.batch[k].pos[at] == (int)t,
                       "depth %zu, token %zu", k, t);
            }
    for (size_t l = c.dense; l < layers(&c); l++)
        for (size_t b = 0; b < B; b++) balance += a.layer[l].balance[b] / B;
    Losses s = model_losses(&m, &a);
    near(s.main, mean[0], 1e-12, "main loss");
    near(s.mtp, (mean[1] + mean[2]) / 2, 1e-12, "MTP loss");
    near(s.balance, balance, 1e-12, "balance loss");
    near(s.total, s.main + 0.3 * s.mtp + 0.1 * s.balance, 1e-12, "loss");
    acts_free(&a);
    model_free(&m);
}

// deepseek-v3 has as many parameters as were released, 671B; and initial weights are what they say.
static void test_parameters(void)
{
    Config c = config_preset(DEEPSEEK_V3), d = config_preset(LAPTOP);
    Layout v3 = layout_make(&c);
    size_t count = 0;
    for (size_t i = 0; i < v3.tensors; i++)
        if (v3.tensor[i].layer < (int)c.L) count += tensor_size(&v3.tensor[i]);
    EXPECT(count == 671026419200, "deepseek-v3 has %zu parameters", count);
    free(v3.tensor);
    Model m = model_make(&d, 0), n = model_make(&d, 0);
    model_init(&m, 1);
    model_init(&n, 2);
    for (size_t i = 0; i < m.layout.tensors; i++) {
        const Tensor *t = &m.layout.tensor[i];
        size_t size = tensor_size(t);
        const real *x = m.weights + t->offset;
        double sum = 0, rms = norm_of(x, size) / sqrt((double)size), one = t->kind == NORM;
        for (size_t j = 0; j < size; j++) sum += x[j];
        if (t->kind == NORM || t->kind == ROUTER_BIAS) {
            EXPECT(rms == one && sum == one * (double)size, "%s begins elsewhere", name_of(&m, i));
        } else { // normal: within 5 standard deviations
            EXPECT(fabs(sum) < 5 * 0.02 * sqrt((double)size), "%s: sum %g", name_of(&m, i), sum);
            EXPECT(fabs(rms / 0.02 - 1) < 5 / sqrt(2 * (double)size), "%s: rms %g", name_of(&m, i),
                   rms);
            EXPECT(x[0] != n.weights[t->offset], "%s: the seed does not matter", name_of(&m, i));
        }
    }
    model_free(&m);
    model_free(&n);
}

static void fill_grads(Model *m, accum x) // but for what is between tensors
{
    for (const Tensor *t = m->layout.tensor; t < m->layout.tensor + m->layout.tensors; t++)
        for (size_t j = 0; j < tensor_size(t); j++) m->grads[t->offset + j] = x;
}

// The first pass after a step, taken or skipped, sets all gradients whatever they were: those of
// experts without tokens and of MTP layers that it leaves out to 0.
static void test_model_gradient_begins_anew(void)
{
    Config c = small_config();
    c.G = c.KG = 1;
    Model m = crowded_model(&c, 16), same = crowded_model(&c, 16);
    Acts a = acts_make(&c, 2, 7, 1), one = acts_make(&c, 2, 1, 1); // one: without MTP
    Optimizer o = optimizer_make(&m);
    Recipe r = {1, 0.01, 0.01, 0.9, 0.95, 1e-8, 0.1, 1, 0.95, 0.001};
    size_t n = m.layout.elements;
    acts_load(&a, random_ints(2 * 8, c.V, 17));
    acts_load(&one, random_ints(2 * 2, c.V, 18));
    model_forward_backward(&m, &a, 1);
    optimizer_count_load(&o, &m, &a);
    optimizer_step(&o, &m, &r, grad_norm(&m));
    memcpy(same.weights, m.weights, n * sizeof(real));
    model_forward_backward(&m, &a, 1);
    model_forward_backward(&m, &one, 0.5);
    model_forward_backward(&same, &a, 1);
    model_forward_backward(&same, &one, 0.5);
    EXPECT(!memcmp(m.grads, same.grads, n * sizeof(accum)), "after a step: other gradients");
    for (int left_out = 0; left_out < 2; left_out++) {
        Acts *first = left_out ? &one : &a, *second = left_out ? &a : &one;
        fill_grads(&m, (accum)NAN);
        optimizer_count_load(&o, &m, &a);
        optimizer_skip(&o, &m);
        for (size_t i = 0; i < layers(&c) * c.E; i++) EXPECT(!o.load[i], "load %zu is left", i);
        model_forward_backward(&m, first, 1);
        for (const Tensor *t = m.layout.tensor; t < m.layout.tensor + m.layout.tensors; t++) {
            double norm = norm_of(m.grads + t->offset, tensor_size(t));
            EXPECT(isfinite(norm) && (!is_idle(&c, first->T, t) || norm == 0),
                   "%s: the gradient's norm is %g", t->name, norm);
        }
        memset(same.grads, 0, n * sizeof(accum)); // to which it then adds
        model_forward_backward(&same, first, 1);
        within(relative_error(m.grads, same.grads, n), 1e-14, "set, or cleared and added to");
        model_forward_backward(&m, second, -0.7);
        model_forward_backward(&same, second, -0.7);
        within(relative_error(m.grads, same.grads, n), 1e-13, "and a second pass");
    }
    optimizer_free(&o);
    acts_free(&a);
    acts_free(&one);
    model_free(&m);
    model_free(&same);
}

// Gradients add up from pass to pass, and take the scale.
static void test_model_gradient_accumulates(void)
{
    Config c = small_config();
    Model m = random_model(&c, 1, 16);
    Acts a = acts_make(&c, 2, 7, 1);
    size_t n = m.layout.elements;
    acts_load(&a, random_ints(2 * 8, c.V, 17));
    model_forward(&m, &a);
    model_backward(&m, &a, 1);
    accum *expected = copy_of(m.grads, n);
    model_backward(&m, &a, 1);
    for (size_t i = 0; i < n; i++) expected[i] *= 2;
    within(relative_error(m.grads, expected, n), 1e-14, "two passes");
    model_backward(&m, &a, -2.37);
    for (size_t i = 0; i < n; i++) expected[i] *= (2 - 2.37) / 2;
    within(relative_error(m.grads, expected, n), 1e-13, "a third, times -2.37");
    acts_free(&a);
    model_free(&m);
}

// The checks above can fail: with any one number wrong of what a forward saves, they do.
static void test_broken_backward_is_seen(void)
{
    static const size_t norm_size[] = {3, 13, 13, 13}, attention_size[] = {2, 7, 3, 3, 2, 5};
    double least = rmsnorm_error(norm_size, SET, 1.0001), error;
    least = fmin(least, attention_error(attention_size, 1e-4, 0));
    least = fmin(least, attention_error(attention_size, 0, 1e-4));
    EXPECT(least > tolerance, "an operation's wrong gradient passes with error %.3g", least);

    Config small = small_config(), *c = &small;
    Trial t = trial_make(random_model(c, 1, 1), 2, 7);
    size_t where = 0, broken = 0;
    for (size_t l = 0; l < layers(c); l++) {
        LayerActs *al = &t.a.layer[l];
#define BREAK(type, field, sets, kept, rows, cols) \
        if (((kept) & VALUE) && al->field && sizeof(type) == sizeof(real) && \
            strcmp(#field, "balance") && strcmp(#field, "loss")) { /* results, not needed */ \
            size_t at = (size_t)(cols) + ((cols) > 1); /* the second row's second number */ \
            type was = al->field[at]; \
            al->field[at] = (type)(1.001 * (double)was + 1e-4); \
            least = fmin(least, error = trial_error(&t, &where)); \
            EXPECT(error > tolerance, "layer %zu: a wrong " #field " passes with %.3g", l, error); \
            al->field[at] = was; \
            broken++; \
        }
        LAYER_ACTS(BREAK)
    }
    within(trial_error(&t, &where), tolerance, "mended again");
    EXPECT(broken > 100, "only %zu numbers were broken", broken);
    snprintf(remark, sizeof remark, "%zu ways to break it, the least seen at %.1e", broken, least);
    trial_free(&t);
}
#endif // MOE_DOUBLE

#ifndef MOE_DOUBLE
// ------------------------------------------------------------------------------------------------
// Fast paths

// Every (i, j) of a product of the given sizes and strides against the sum by the definition, in
// double, relative to the sum of the terms' sizes.
static void check_gemm(size_t m, size_t n, size_t k, int layout, int add, uint64_t seed)
{
    size_t pad = random_u64(seed, 1, 0) % 3; // a row may be longer than is used
    int a_t = layout & 1, b_t = layout >> 1 & 1; // stored transposed
    size_t c_row = n + pad;
    size_t a_row = a_t ? 1 : k + pad, a_col = a_t ? m + pad : 1;
    size_t b_row = b_t ? 1 : n + pad, b_col = b_t ? k + pad : 1;
    size_t c_size = (m + pad) * (n + pad);
    real *a = random_reals((m + pad) * (k + pad), seed);
    real *b = random_reals((k + pad) * (n + pad), seed + 1);
    real *c = random_reals(c_size, seed + 2), *was = copy_of(c, c_size);
    gemm(c, c_row, a, a_row, a_col, b, b_row, b_col, m, n, k, add);
    double most = 0;
    for (size_t i = 0; i < m; i++)
        for (size_t j = 0; j < n; j++) {
            size_t at = i * c_row + j;
            double sum = add ? was[at] : 0, sizes = 1e-30 + fabs(sum);
            for (size_t p = 0; p < k; p++) {
                double term = (double)a[i * a_row + p * a_col] * (double)b[p * b_row + j * b_col];
                sum += term, sizes += fabs(term);
            }
            double error = fabs(c[at] - sum) / sizes;
            if (!(error <= most)) most = error;
            was[at] = c[at];
        }
    const char *what = label("%zu x %zu x %zu, layout %d, add %d", m, n, k, layout, add);
    within(most, 2e-6, what);
    EXPECT(!memcmp(c, was, c_size * sizeof(real)), "%s: wrote between the rows", what);
}

static void test_gemm(void)
{
    for (size_t i = 0; i < 600; i++) {
        int *size = random_ints(3, 71, i);
        if (i % 4 == 0) size[0] %= 10; // few rows
        if (i % 8 == 0) size[1] = (int)(ceil_div((size_t)size[1], NR) * NR); // and whole panels
        check_gemm((size_t)size[0], (size_t)size[1], (size_t)size[2], (int)(i / 2 % 4), (int)i % 2,
                   10 * i);
    }
    static const size_t large[][3] = { // beyond KC and NC
        {3, 2 * NC + 5, KC + 3}, {20, NC + 1, KC}, {19, 70, 2 * KC + 1}, {2 * NC + 3, 17, KC + 9},
        {8, 33, 3 * KC}, {31, 63, KC - 1}, {1, 7 * NR, 2 * KC + 3},
    };
    for (size_t i = 0; i < sizeof large / sizeof *large; i++)
        for (int layout = 0; layout < 8; layout++)
            check_gemm(large[i][0], large[i][1], large[i][2], layout % 4, layout / 4, 7000 + i);
}

// A number's bits do not depend on which rows and columns are computed along with it.
static void test_gemm_bits(void)
{
    enum { M = 150, N = 170, K = KC + 37 };
    real *a = random_reals(M * K, 1), *b = random_reals(N * K, 2);
    real *whole = reals(M * N), *parts = reals(M * N);
    static const size_t cut[][2] = {{M, N}, {1, N}, {9, 11}, {50, 37}, {71, N}, {M, 16},
                                    {MR - 1, 2 * NR}, {1, 5 * NR}};
    for (int b_t = 0; b_t < 2; b_t++) {
        size_t b_row = b_t ? 1 : N, b_col = b_t ? K : 1;
        gemm(whole, N, a, K, 1, b, b_row, b_col, M, N, K, SET);
        for (size_t i = 0; i < sizeof cut / sizeof *cut; i++) {
            size_t rows = b_t && cut[i][0] <= FEW ? FEW + 1 : cut[i][0], cols = cut[i][1];
            for (size_t r = 0, take; r < M; r += take) {
                take = min_size(rows, M - r);
                if (M - r - take <= FEW) take = M - r; // few rows are summed in another order
                for (size_t j = 0; j < N; j += cols)
                    gemm(parts + r * N + j, N, a + r * K, K, 1, b + j * b_col, b_row, b_col,
                         take, min_size(cols, N - j), K, SET);
            }
            EXPECT(!memcmp(whole, parts, M * N * sizeof(real)),
                   "in pieces of %zu x %zu the bits are others, b_t %d", rows, cols, b_t);
        }
    }
    gemm(whole, N, a, K, 1, b, 1, K, FEW, N, K, SET);
    for (size_t m = 1; m <= FEW; m++) {
        gemm(parts, N, a, K, 1, b, 1, K, m, N, K, SET);
        EXPECT(!memcmp(whole, parts, m * N * sizeof(real)), "%zu rows have other bits than %d", m,
               FEW);
        gemm(parts, N, a + (FEW - m) * K, K, 1, b, 1, K, m, N, K, SET);
        EXPECT(!memcmp(whole + (FEW - m) * N, parts, m * N * sizeof(real)),
               "the last %zu differ", m);
        gemm(parts, N, a, K, 1, b + 3 * K, 1, K, m, 6, K, SET);
        for (size_t i = 0; i < m; i++)
            EXPECT(!memcmp(whole + i * N + 3, parts + i * N, 6 * sizeof(real)), "columns 3 to 8");
    }
}

static void test_fast_exp(void)
{
    enum { STEPS = 1 << 20 };
    double most = 0;
    real before = 0;
    for (int i = 0; i <= STEPS; i++) {
        real x = (real)(-87 + 175.0 * i / STEPS), y = fast_exp(x);
        double exact = exp((double)x);
        int exponent;
        frexp(exact, &exponent);
        double error = fabs(y - exact) / ldexp(1, exponent - 24); // in units in the last place
        if (!(error <= most)) most = error;
        EXPECT(y > before, "not rising at %.9g", x);
        before = y;
    }
    snprintf(remark, sizeof remark, "%.2f ulp", most);
    EXPECT(most <= 2, "expected at most 2 ulp, got %.2f", most);
    for (real x = 0.346f; x < 0.348f; x = nextafterf(x, 1)) // across ln(2)/2, where n changes
        EXPECT(fast_exp(nextafterf(x, 1)) >= fast_exp(x) * (1 - 1.2e-7f), "falls at %.9g", x);
    EXPECT(fast_exp(0) == 1, "expected 1 at 0, got %.9g", fast_exp(0));
    EXPECT(fast_exp(-87.1f) == 0 && fast_exp(-INFINITY) == 0, "not 0 below -87");
    EXPECT(fast_exp(1000) > 1e38f, "expected something huge at 1000, got %g", fast_exp(1000));
    EXPECT(isnan(fast_exp(NAN)), "NaN became %g", fast_exp(NAN));
    EXPECT(sigmoid(-200) < 1e-37f && sigmoid(200) == 1 && sigmoid(0) == 0.5f, "sigmoid's ends");
}

// attention_forward against the definition, a number at a time, in double: blocks, panels and parts
// of K all have edges.
static void test_attention(void)
{
    for (size_t i = 0; i < 12; i++) {
        static const size_t T_of[] = {1, 2, 15, 24, 25, 97, KC + 31};
        size_t B = 1 + i % 2, T = T_of[i % 7], NH = 1 + i % 3, Dv = 1 + 7 * i % 40;
        size_t Dn = 2 + 5 * i % 37, Dr = 2 + 2 * (i % 9), Dq = Dn + Dr, Dkv = Dn + Dv;
        real *q = random_reals(B * T * NH * Dq, i), *kv = random_reals(B * T * NH * Dkv, i + 1);
        real *k_pe = random_reals(B * T * Dr, i + 2);
        real *out = reals(B * T * NH * Dv), *lse = reals(B * NH * T);
        attention_forward(out, lse, q, kv, k_pe, B, T, NH, Dn, Dr, Dv, 0.7);
        double *score = (double *)keep(host_alloc(T, sizeof(double)));
        for (size_t row = 0; row < B * T * NH; row++) {
            size_t b = row / NH / T, t = row / NH % T, h = row % NH;
            double sum = 0;
            for (size_t u = 0; u <= t; u++) {
                const real *k = kv + ((b * T + u) * NH + h) * Dkv, *r = k_pe + (b * T + u) * Dr;
                double dot = 0;
                for (size_t j = 0; j < Dq; j++)
                    dot += (double)q[row * Dq + j] * (double)(j < Dn ? k[j] : r[j - Dn]);
                sum += score[u] = exp(0.7 * dot);
            }
            const char *what = label("T %zu, head %zu, token %zu", T, h, t);
            near(lse[(b * NH + h) * T + t] + 10, log(sum) + 10, 2e-6, what);
            for (size_t j = 0; j < Dv; j++) {
                double mean = 0;
                for (size_t u = 0; u <= t; u++)
                    mean += score[u] / sum * (double)kv[((b * T + u) * NH + h) * Dkv + Dn + j];
                near(out[row * Dv + j] + 1, mean + 1, 2e-6, what);
            }
        }
    }
}

// The operations' own counts of useful work add up to what flops_forward says of a whole step, with
// every operation's time counted once.
static void test_meters(void)
{
    Config c = config_preset(LAPTOP);
    size_t B = 2, T = 64;
    Model m = random_model(&c, 1, 1);
    Acts a = acts_make(&c, B, T, 1);
    acts_load(&a, random_ints(B * (T + 1), c.V, 3));
    metered.on = 1, metered.count = 0;
    memset(metered.meter, 0, sizeof metered.meter);
    double start = now(), flops = 0, seconds = 0;
    model_forward(&m, &a);
    model_backward(&m, &a, 1);
    double all = now() - start;
    metered.on = 0;
    for (size_t i = 0; i < metered.count; i++) {
        const Meter *t = &metered.meter[i];
        flops += t->flops, seconds += t->seconds;
        EXPECT(t->calls > 0 && t->seconds > 0 && t->bytes > 0, "%s: nothing counted", t->name);
    }
    near(flops, 3 * flops_forward(&c, T, 1) * (double)(B * T), 1e-12, "work of a step");
    EXPECT(seconds <= all && seconds > 0.5 * all, "operations took %g s of %g", seconds, all);
    acts_free(&a);
    model_free(&m);
}

// The same bits with any number of threads: losses, gradients, and two steps of Muon and AdamW.
static void test_threads_same_bits(void)
{
    Config c = small_config();
    c.V = 70, c.C = 67, c.NH = 3, c.Fe = 33, c.F = 150; // several tiles, odd shares
    enum { SLOTS = 5, TOKENS = 40 };
    double loss[4];
    real *w = NULL, *g = NULL, *z[2] = {NULL, NULL}; // z: logits of one sequence, of five
    for (size_t threads = 1; threads <= 3; threads++) {
        use_threads(threads);
        Model m = random_model(&c, 1, 1);
        size_t bytes = m.layout.elements * sizeof(real);
        Acts a = acts_make(&c, 3, 70, 1);
        Optimizer o = optimizer_make(&m);
        Recipe r = {1, 0.01, 0.01, 0.9, 0.95, 1e-8, 0.1, 1, 0.95, 0.001};
        acts_load(&a, random_ints(3 * 71, c.V, 3));
        for (int step = 0; step < 2; step++) {
            model_forward(&m, &a);
            model_backward(&m, &a, 1);
            optimizer_count_load(&o, &m, &a);
            if (step && !g) g = copy_of(m.grads, m.layout.elements);
            EXPECT(!step || !memcmp(g, m.grads, bytes), "%zu threads: other gradients", threads);
            r.muon = step == 0; // then AdamW
            optimizer_step(&o, &m, &r, grad_norm(&m));
        }
        if (!w) w = copy_of(m.weights, m.layout.elements);
        EXPECT(!memcmp(w, m.weights, bytes), "%zu threads: other weights", threads);
        loss[threads] = model_losses(&m, &a).total;
        EXPECT(loss[threads] == loss[1], "%zu threads: loss %.9g, not %.9g", threads, loss[threads],
               loss[1]);
        Decoder s = decoder_make(&m, SLOTS, TOKENS, 1, SLOTS, TOKENS);
        for (int i = 0; i < 2 * TOKENS; i++) { // five at a time, then the first once more alone
            int alone = i >= TOKENS, rows = alone ? 1 : SLOTS;
            for (int k = 0; k < rows; k++)
                s.token[k] = (7 * i % TOKENS + k) % (int)c.V, s.slot[k] = k, s.pos[k] = i % TOKENS;
            TEAM decode_main(&s, (size_t)rows);
            if (i % TOKENS < TOKENS - 1) continue;
            if (!z[alone]) z[alone] = copy_of(s.a.logits, (size_t)rows * c.V);
            EXPECT(!memcmp(z[alone], s.a.logits, (size_t)rows * c.V * sizeof(real)),
                   "%zu threads: other logits of %d sequences", threads, rows);
        }
        decoder_free(&s);
        acts_free(&a);
        optimizer_free(&o);
        model_free(&m);
    }
}

// A call of the decoder that is work enough is done by a team; the logits are the same.
static void test_decode_team(void)
{
    enum { SLOTS = 4, TOKENS = 3 };
    static const int slot[SLOTS] = {0, 1, 2, 3};
    Config c = config_preset(LAPTOP_MTP);
    Model m = model_make(&c, 0);
    real *z[2 * TOKENS] = {NULL};
    model_init(&m, 5);
    for (size_t threads = 1; threads <= 2; threads++) {
        use_threads(threads);
        Decoder s = decoder_make(&m, SLOTS, TOKENS, 1, SLOTS, TOKENS);
        EXPECT(is_small(&s, 1) && is_small(&s, SLOTS) == (thread_count() == 1),
               "%zu threads: who does it", threads);
        for (int i = 0; i < 2 * TOKENS; i++) { // the main model, then MTP
            int token[SLOTS] = {7 * i, 7 * i + 1, 90, i}, pos[SLOTS] = {i / 2, i / 2, i / 2, i / 2};
            if (i % 2) decode_mtp(&s, token, SLOTS);
            else decode(&s, token, slot, pos, SLOTS);
            if (!z[i]) z[i] = copy_of(s.a.logits, SLOTS * c.V);
            EXPECT(!memcmp(z[i], s.a.logits, SLOTS * c.V * sizeof(real)),
                   "%zu threads: other logits, call %d", threads, i);
        }
        decoder_free(&s);
    }
    model_free(&m);
}
#endif // not MOE_DOUBLE

// ------------------------------------------------------------------------------------------------
// Parity with PyTorch: the numbers of four models, made by another implementation in float64

typedef struct {
    const char *name;
    size_t B, T;
    const char *text;
    double loss[4], grad_norm, logits_l2; // loss: total, main, MTP, balance
    double logits_first[8], step_loss[10], step_norm[10]; // ten steps of AdamW
    int load[24];      // tokens of each expert of each MoE layer
    double grad[130];  // |gradient| of each matrix, in the layout's order, routers' biases left out
} Golden;

static const Golden golden[] = {
    {
        "mla", 2, 32,
        "First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:",
        {5.95123008539, 5.95123008539, 0, 0}, 2.44844072687, 127.489057561,
        {-1.392850125, -0.3311007696, 1.08059624, 0.6363596488, 1.009964192, -2.279864557,
         0.5565624135, 0.1513801305},
        {5.951230085, 5.699126833, 5.465504319, 5.250884272, 5.052514507, 4.867048014, 4.691923199,
         4.525657433, 4.36764791, 4.217675498},
        {2.448440727, 2.298747133, 2.13564827, 2.002743821, 1.906994454, 1.836926046, 1.778857149,
         1.7233191, 1.668108774, 1.617041839},
        {0},
        {0.3838439063, 0.2053397942, 0.8587377503, 0.1771175266, 0.4392347343, 0.7803095903,
         0.1236932131, 0.5917348124, 0.7536519901, 0.1235368817, 0.5647597111, 0.5761804853,
         0.9923001995, 0.1066012383, 0.2103739486, 0.5622504054, 0.1313772571, 0.5363766633,
         0.5378158829, 0.06437509462, 0.3916319478, 0.3737028405, 0.6223537531},
    },
    {
        "moe", 2, 32,
        "Second Citizen:\nWould you proceed especially against Caius Marcius",
        {5.90582326775, 5.90582326775, 0, 2.35315155011}, 3.25123628252, 125.650744416,
        {0.9593417985, 0.3323348494, -1.046827205, 0.5559924925, -1.235875004, -1.415685889,
         -0.09641518132, -1.479437723},
        {5.905823268, 5.5018953, 5.296870456, 4.987668198, 4.785099158, 4.516236687, 4.299613899,
         4.168130258, 4.010864154, 3.88663716},
        {3.251236283, 3.209664419, 2.978105246, 2.83529737, 2.93501889, 2.676503438, 2.407744414,
         2.294199608, 2.258630563, 2.17081907},
        {6, 7, 2, 25, 25, 8, 43, 12, 31, 15, 10, 25, 13, 7, 2, 25},
        {0.4892040628, 0.2284006113, 0.8800071426, 0.2594139437, 0.7066732483, 0.1778832035,
         0.5757239245, 0.9971794341, 0.1957105607, 0.6677008451, 0.9147652797, 0.1896701591,
         0.742201016, 0.7384326993, 1.154334401, 0.1311970525, 0.2712129754, 0.03317147141,
         0.2383473881, 0.7164679423, 0.1710120274, 0.5378310376, 0.6987305845, 0.1623202305,
         0.1134362991, 0.141288445, 0.1679751728, 0.05716384481, 0.2633425426, 0.2510629023,
         0.1515630715, 0.3269664871, 0.193200607, 0.1266219044, 0.1396713152, 0.04723421723,
         0.2627905372, 0.2473915549, 0.1478909092, 0.2675933145, 0.1603333928, 0.07986078106,
         0.08087150268, 0.0356756559, 0.1823848733, 0.2031503698, 0.1315567549, 0.3644375462,
         0.1424111928, 0.44070879, 0.3472876262, 0.3120608167, 0.06391453872, 0.1409247208,
         0.02920405043, 0.1393560358, 0.4358125127, 0.0685234953, 0.2694396328, 0.3211214389,
         0.1220522157, 0.08286085854, 0.2106851481, 0.1087644782, 0.101099506, 0.1439854346,
         0.09572122926, 0.06178838206, 0.04294164844, 0.1438231255, 0.2134811214, 0.174816022,
         0.1091699186, 0.1231974254, 0.09199783512, 0.08055816693, 0.03254671836, 0.1922410306,
         0.2023253119, 0.1044853745, 0.08571029382, 0.1168547645, 0.09826609919, 0.05860542031,
         0.02799306188, 0.1208089643, 0.2322901578, 0.2440503139, 0.2176300572},
    },
    {
        "v3", 2, 32,
        "itizen:\nSoft! who comes here?\n\nSecond Citizen:\nWorthy Menenius Agr",
        {7.76348245513, 5.94418437212, 5.94948072905, 3.4453864291}, 3.78251420441, 128.157182937,
        {-0.38875266, -0.5657120921, 0.2083236591, -1.189551986, -0.1368809439, -1.203271756,
         3.06387779, -0.8001994765},
        {7.763482455, 7.339880038, 6.993579003, 6.641142683, 6.486746575, 6.233232813, 5.938741835,
         5.747629032, 5.572393442, 5.412665271},
        {3.782514204, 3.253143682, 2.967532511, 2.667114771, 2.864285413, 2.699124133, 2.43350669,
         2.336704967, 2.331539644, 2.391365069},
        {4, 9, 17, 16, 28, 2, 45, 7, 35, 6, 12, 21, 5, 12, 11, 26, 22, 27, 3, 18, 9, 16, 14, 15},
        {0.6269410762, 0.2233620142, 0.8357827179, 0.2942029726, 0.8128779506, 0.1078916674,
         0.6931379415, 1.399302584, 0.2298440782, 0.9177002278, 1.112611804, 0.2199366018,
         0.9293460953, 0.8071193137, 1.232292436, 0.1113086418, 0.4090950295, 0.07792133271,
         0.3361213446, 0.7435257239, 0.1553340165, 0.5568379309, 0.6248447788, 0.1864637146,
         0.06445167714, 0.1409036596, 0.1899995321, 0.2443060958, 0.1527394558, 0.2008070691,
         0.1043251802, 0.4624097181, 0.1305783859, 0.09109257136, 0.1848680953, 0.2475338254,
         0.2069840244, 0.2464669269, 0.1884377297, 0.4318551337, 0.1413160089, 0.05970356491,
         0.129450289, 0.2215279379, 0.106343532, 0.1605892273, 0.08347956161, 0.4523142532,
         0.1083545506, 0.4467949953, 0.4931771506, 0.4026580594, 0.05479125202, 0.2362936517,
         0.03283885213, 0.1837647231, 0.3402774177, 0.06884032042, 0.2483248502, 0.3389676191,
         0.1384705846, 0.09336814404, 0.2936257227, 0.06925377444, 0.1029391878, 0.1500902251,
         0.05804110957, 0.1073924933, 0.111374591, 0.1533764989, 0.2716284468, 0.09077324774,
         0.09085596352, 0.1382739097, 0.06962567303, 0.08504296212, 0.09878118851, 0.1878658649,
         0.2279296957, 0.05576734353, 0.07928168652, 0.1092630179, 0.03883184525, 0.0771102525,
         0.09969865346, 0.1355819554, 0.2068401867, 0.306504772, 0.2279398023, 0.0296082073,
         0.03634419607, 0.3937489102, 0.06939263079, 0.02598847233, 0.07750958811, 0.01654533761,
         0.06629775308, 0.1237505652, 0.01898851638, 0.08912585839, 0.1123054206, 0.03468420087,
         0.03179544332, 0.06353987892, 0.0598481978, 0.02323105429, 0.04482633626, 0.03093177105,
         0.04788759782, 0.04714848775, 0.04364704959, 0.06224700731, 0.06360304005, 0.02763281932,
         0.04350428042, 0.03410044276, 0.04080017934, 0.04598227795, 0.03961118876, 0.0520291379,
         0.05124580709, 0.01587942437, 0.04083974089, 0.03018520427, 0.03205889662, 0.03669468122,
         0.04276723849, 0.08786457152, 0.06590900576, 0.0662762106},
    },
    {
        "yarn", 2, 48,
        "ever\nAppear in your impediment. For the dearth,\n"
        "The gods, not the patricians, make it, and\nYour kn",
        {5.93708370461, 5.93708370461, 0, 1.2119230141}, 2.35240939869, 154.599438847,
        {-0.2478091964, 1.519086061, -1.074201178, -0.5145350903, 0.5039993544, -0.4114740713,
         -0.06652025687, 0.1762480618},
        {5.937083705, 5.688026845, 5.468484567, 5.274655089, 5.099823798, 4.954349987, 4.788952307,
         4.65386463, 4.515222595, 4.382384532},
        {2.352409399, 2.176715565, 2.031146924, 1.907083827, 1.806958509, 1.736743789, 1.682504327,
         1.634408394, 1.591952397, 1.559298707},
        {0, 20, 24, 11, 36, 12, 78, 11},
        {0.321012159, 0.2265548816, 0.9198012221, 0.171043417, 0.4065698686, 0.06186309275,
         0.3739842979, 0.7402730722, 0.1158024055, 0.4622871403, 0.6655668347, 0.1203778296,
         0.5562970619, 0.5311326077, 0.8935337446, 0.08771039011, 0.2408490937, 0.03095229388,
         0.1840644459, 0.6218654596, 0.1347799149, 0.5170249876, 0.5988222472, 0.1019722901,
         0.03953511851, 0, 0.06477839169, 0.0944621332, 0.02580300196, 0.06740459391,
         0.03578416645, 0.1525225244, 0.04911167491, 0, 0.06001579125, 0.09832252373,
         0.04452043813, 0.07072251717, 0.04044828899, 0.1464927052, 0.04567758216, 0,
         0.04073645888, 0.07508296588, 0.02165115306, 0.07079406484, 0.03229079507, 0.1759500864,
         0.02737460532, 0.3669757362, 0.2655223923, 0.2964830139},
    },
};

static Config golden_config(size_t i)
{
    Config c = config_preset(LAPTOP);
    c.V = 256, c.C = 32, c.L = 2, c.dense = 1, c.F = 80, c.NH = 4, c.Rq = 24, c.Rkv = 16;
    c.Dn = 8, c.Dr = 4, c.Dv = 8, c.E = 8, c.K = 2, c.S = 1, c.Fe = 24, c.G = 1, c.KG = 1;
    c.norm_topk = 1, c.D = 0, c.Tmax = 64, c.eps = 1e-6, c.theta = 1e4, c.route_scale = 1;
    c.alpha = 0, c.mtp_weight = 0.3, c.yarn_factor = 0;
    const char *name = golden[i].name;
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

// Element i of a tensor of the golden models: a hash of the tensor's name and i.
static float golden_weight(const char *name, size_t i, size_t cols)
{
    uint32_t h = 2166136261u; // FNV-1a
    for (const char *s = name; *s; s++) h = (h ^ (unsigned char)*s) * 16777619u;
    uint32_t x = h + (uint32_t)i * 0x9E3779B9u;
    x = (x ^ x >> 16) * 0x85EBCA6Bu;
    x = (x ^ x >> 13) * 0xC2B2AE35u;
    double u = (double)((x ^ x >> 16) >> 8) * 0x1p-24 - 0.5;
    if (strstr(name, "norm.weight")) return (float)(1 + 0.4 * u);
    if (strstr(name, "e_score_correction_bias")) return (float)(0.2 * u);
    if (strstr(name, "embed_tokens")) return (float)(2 * u);
    return (float)(u * sqrt(12 / (double)cols));
}

static void test_golden_weights(void)
{
    static const struct {
        const char *name;
        size_t i, cols;
        float value;
    } quoted[] = {
        {"model.embed_tokens.weight", 1, 32, -0.54765451f},
        {"model.embed_tokens.weight", 8191, 32, 0.978361011f},
        {"model.layers.0.self_attn.q_a_layernorm.weight", 23, 24, 0.879346132f},
        {"model.layers.1.mlp.gate.e_score_correction_bias", 0, 8, -0.0343917608f},
        {"model.layers.2.mlp.experts.7.down_proj.weight", 0, 24, -0.218977794f},
        {"model.layers.2.mlp.experts.7.down_proj.weight", 767, 24, 0.114208393f},
    };
    for (size_t i = 0; i < sizeof quoted / sizeof *quoted; i++)
        near(golden_weight(quoted[i].name, quoted[i].i, quoted[i].cols), quoted[i].value, 0,
             quoted[i].name);
}

static void golden_case(size_t which)
{
    const Golden *g = &golden[which];
    int exact = sizeof(real) == sizeof(double); // what float allows, or the printed digits
    double loss_tol = exact ? 1e-8 : 1e-5, grad_tol = exact ? 1e-8 : 1e-4;
    Config c = golden_config(which);
    Model m = model_make(&c, 1);
    for (size_t i = 0; i < m.layout.tensors; i++) {
        const Tensor *t = &m.layout.tensor[i];
        size_t n = t->rows * t->cols;
        for (size_t j = 0; j < tensor_size(t); j++) {
            char name[NAME_MAX_LENGTH];
            tensor_name(name, "", t, j / n);
            m.weights[t->offset + j] = golden_weight(name, j % n, t->cols);
        }
    }
    int *tokens = (int *)room(g->B * (g->T + 1), sizeof(int));
    EXPECT(strlen(g->text) == g->B * (g->T + 1), "the text has %zu bytes", strlen(g->text));
    tokens_copy(tokens, g->text, g->B * (g->T + 1));
    Acts a = acts_make(&c, g->B, g->T, 1);
    Optimizer o = optimizer_make(&m);
    Recipe r;
    memset(&r, 0, sizeof r);
    r.lr = r.adam_lr = r.bias_speed = 1e-3, r.beta1 = 0.9, r.beta2 = 0.95, r.eps = 1e-8;
    r.decay = 0.1, r.clip = 1;
    acts_load(&a, tokens);
    for (int step = 0; step < (exact ? 10 : 5); step++) {
        model_forward(&m, &a);
        model_backward(&m, &a, 1);
        optimizer_count_load(&o, &m, &a);
        Losses s = model_losses(&m, &a);
        double norm = grad_norm(&m);
        near(s.total, g->step_loss[step], exact ? 1e-8 : 1e-4, label("loss of step %d", step + 1));
        near(norm, g->step_norm[step], exact ? 1e-8 : 1e-3, label("norm of step %d", step + 1));
        if (step > 0) {
            optimizer_step(&o, &m, &r, norm);
            continue;
        }
        const real *logits = a.layer[c.L - 1].logits;
        real first[8];
        for (size_t i = 0; i < 8; i++) first[i] = (real)g->logits_first[i];
        near(s.total, g->loss[0], loss_tol, "loss");
        near(s.main, g->loss[1], loss_tol, "main loss");
        near(s.mtp, g->loss[2], loss_tol, "MTP loss");
        if (g->loss[3] > 0) near(s.balance, g->loss[3], loss_tol, "balance loss");
        near(norm, g->grad_norm, grad_tol, "grad_norm");
        near(norm_of(logits, g->B * g->T * 256), g->logits_l2, loss_tol, "|logits|");
        within(relative_error(logits, first, 8), loss_tol, "first logits");
        const int *load = g->load;
        const double *grad = g->grad;
        for (size_t l = 0; l < layers(&c); l++)
            for (size_t e = 0; e < c.E && is_moe(&c, l); e++, load++)
                EXPECT(o.load[l * c.E + e] == *load, "layer %zu, expert %zu: %d tokens, not %d", l,
                       e, o.load[l * c.E + e], *load);
        for (size_t i = 0; i < m.layout.tensors; i++) {
            const Tensor *t = &m.layout.tensor[i];
            size_t n = t->rows * t->cols;
            for (size_t k = 0; k < t->count && t->kind != ROUTER_BIAS; k++)
                near(norm_of(m.grads + t->offset + k * n, n), *grad++, grad_tol,
                     label("gradient of %s (%zu)", name_of(&m, i), k));
        }
        EXPECT(grad - g->grad == 130 || *grad == 0, "%s: more gradients are quoted", g->name);
        optimizer_step(&o, &m, &r, norm);
    }
    optimizer_free(&o);
    acts_free(&a);
    model_free(&m);
}

static void test_pytorch_mla(void) { golden_case(0); }
static void test_pytorch_moe(void) { golden_case(1); }
static void test_pytorch_v3(void) { golden_case(2); }
static void test_pytorch_yarn(void) { golden_case(3); }

#ifdef MOE_DOUBLE
// ------------------------------------------------------------------------------------------------
// Optimizers, each by its definition

// Five steps X <- a X + (b B + c B^2) X with B = X X^T, rows as they are, tall or wide.
static void naive_newton_schulz(double *X, size_t m, size_t n)
{
    double *B = reals(m * m), *P = reals(m * m), *Y = reals(m * n);
    for (int step = 0; step < 5; step++) {
        for (size_t i = 0; i < m * m; i++) {
            B[i] = 0;
            for (size_t k = 0; k < n; k++) B[i] += X[i / m * n + k] * X[i % m * n + k];
        }
        for (size_t i = 0; i < m * m; i++) {
            P[i] = -4.7750 * B[i];
            for (size_t k = 0; k < m; k++) P[i] += 2.0315 * B[i / m * m + k] * B[k * m + i % m];
        }
        for (size_t i = 0; i < m * n; i++) {
            Y[i] = 3.4445 * X[i];
            for (size_t k = 0; k < m; k++) Y[i] += P[i / n * m + k] * X[k * n + i % n];
        }
        memcpy(X, Y, m * n * sizeof(double));
    }
}

// Makes the rows of Q [m, n], m <= n, orthonormal.
static void orthonormalise(double *Q, size_t m, size_t n)
{
    for (size_t i = 0; i < m; i++) {
        for (size_t pass = 0; pass < 2; pass++) // twice is enough (Kahan)
            for (size_t j = 0; j < i; j++) {
                double dot = 0;
                for (size_t k = 0; k < n; k++) dot += Q[i * n + k] * Q[j * n + k];
                for (size_t k = 0; k < n; k++) Q[i * n + k] -= dot * Q[j * n + k];
            }
        double norm = norm_of(Q + i * n, n);
        for (size_t k = 0; k < n; k++) Q[i * n + k] /= norm;
    }
}

// With X = U S V, each singular value s must have become p(p(p(p(p(s))))), which is near 1, with
// p(s) = a s + b s^3 + c s^5.
static void test_newton_schulz(void)
{
    static const size_t size[][2] = {{1, 1}, {5, 13}, {17, 17}, {53, 60}, {31, 190}}; // m, n
    double lowest = 2, highest = 0;
    for (size_t i = 0; i < 5; i++) {
        size_t m = size[i][0], n = size[i][1];
        real *X = reals(m * n), *expected = reals(m * n);
        real *U = random_reals(m * m, i), *V = random_reals(m * n, 100 + i);
        real *Y = random_reals(PADDED(m) * n, 1), *A = random_reals(m * m, 2);
        real *A2 = random_reals(m * m, 3);
        orthonormalise(U, m, m);
        orthonormalise(V, m, n);
        for (size_t j = 0; j < m; j++) {
            double s = 0.01 + 0.99 * random_uniform(8, i, j) * random_uniform(9, i, j), p = s;
            for (int step = 0; step < 5; step++)
                p = 3.4445 * p - 4.7750 * pow(p, 3) + 2.0315 * pow(p, 5);
            lowest = fmin(lowest, p), highest = fmax(highest, p);
            for (size_t k = 0; k < m * n; k++) {
                X[k] += U[k / n * m + j] * s * V[j * n + k % n];
                expected[k] += U[k / n * m + j] * p * V[j * n + k % n];
            }
        }
        newton_schulz(X, Y, A, A2, m, n);
        within(relative_error(X, expected, m * n), 1e-11, label("%zu x %zu", m, n));
    }
    EXPECT(lowest > 0.65 && highest < 1.25, "singular values go to %.3f .. %.3f", lowest, highest);
    snprintf(remark, sizeof remark, "singular values end in %.3f .. %.3f", lowest, highest);
}

// One step by the definitions on weights w and momenta m, v; the gradients count times clipped.
static void naive_step(const Model *model, const Recipe *r, double *w, double *m, double *v,
                       int *load, long step, double clipped)
{
    for (size_t i = 0; i < model->layout.tensors; i++) {
        const Tensor *t = &model->layout.tensor[i];
        size_t matrix = t->rows * t->cols;
        for (size_t at = t->offset; at < t->offset + tensor_size(t); at += matrix) {
            double *X = reals(matrix), square = 0;
            if (t->kind == ROUTER_BIAS) {
                int total = 0, *n = load + t->layer * (int)t->cols;
                for (size_t e = 0; e < t->cols; e++) total += n[e];
                for (size_t e = 0; e < t->cols; e++) {
                    int above = n[e] * (int)t->cols - total; // exact: over or under the mean
                    w[at + e] += above > 0 ? -r->bias_speed : above < 0 ? r->bias_speed : 0;
                }
            } else if (t->kind == MATRIX && r->muon) {
                for (size_t j = 0; j < matrix; j++) {
                    double g = clipped * model->grads[at + j];
                    m[at + j] = r->momentum * m[at + j] + g;
                    X[j] = g + r->momentum * m[at + j];
                    square += X[j] * X[j];
                }
                for (size_t j = 0; j < matrix; j++) X[j] /= sqrt(square);
                naive_newton_schulz(X, t->rows, t->cols);
                double scale = 0.2 * sqrt(fmax((double)t->rows, (double)t->cols));
                for (size_t j = 0; j < matrix; j++)
                    w[at + j] -= r->lr * (r->decay * w[at + j] + scale * X[j]);
            } else {
                double decay = t->kind == NORM ? 0 : r->decay;
                for (size_t j = at; j < at + matrix; j++) {
                    double g = clipped * model->grads[j];
                    m[j] = r->beta1 * m[j] + (1 - r->beta1) * g;
                    v[j] = r->beta2 * v[j] + (1 - r->beta2) * g * g;
                    double mean = m[j] / (1 - pow(r->beta1, step));
                    double square_mean = v[j] / (1 - pow(r->beta2, step));
                    w[j] -= r->adam_lr * (decay * w[j] + mean / (sqrt(square_mean) + r->eps));
                }
            }
        }
    }
}

static void check_optimizer(int muon)
{
    Config c = small_config(); // E 6: a mean load that binary fractions do not hold
    Model m = random_model(&c, 1, 1);
    Optimizer o = optimizer_make(&m);
    size_t n = m.layout.elements, loads = layers(&c) * c.E;
    double *w = copy_of(m.weights, n), *u = reals(n), *v = reals(n);
    Recipe r = {muon, 0.03, 0.02, 0.9, 0.95, 1e-8, 0.1, 0, 0.95, 0.01};
    for (long step = 1; step <= 4; step++) {
        int *load = random_ints(loads, 9, (uint64_t)step);
        for (size_t e = 0; e < c.E; e++) load[c.dense * c.E + e] = (int)step; // in balance
        memcpy(o.load, load, loads * sizeof(int));
        m.grads_mode = ADD; // not to be cleared
        for (size_t i = 0; i < m.layout.tensors; i++) {
            const Tensor *t = &m.layout.tensor[i];
            for (size_t j = 0; j < tensor_size(t) && t->kind != ROUTER_BIAS; j++)
                m.grads[t->offset + j] = 0.1 * random_normal((uint64_t)step, i, j);
        }
        double norm = norm_of(m.grads, n);
        near(grad_norm(&m), norm, 1e-13, "grad_norm");
        r.clip = step == 1 ? 0 : step == 2 ? 2 * norm : 0.7; // none, not reached, reached
        naive_step(&m, &r, w, u, v, load, step, step > 2 ? 0.7 / (norm + 1e-6) : 1);
        optimizer_step(&o, &m, &r, norm);
        EXPECT(grad_norm(&m) == 0, "the step's gradients are there without a pass");
        for (size_t e = 0; e < loads; e++)
            EXPECT(!o.load[e] || !is_moe(&c, e / c.E), "the load is not cleared");
        for (size_t i = 0; i < m.layout.tensors; i++) {
            const Tensor *t = &m.layout.tensor[i];
            within(relative_error(m.weights + t->offset, w + t->offset, tensor_size(t)), 1e-11,
                   label("step %ld, %s", step, name_of(&m, i)));
        }
    }
    optimizer_free(&o);
    model_free(&m);
}

static void test_adamw(void) { check_optimizer(0); }

static void test_muon(void) { check_optimizer(1); }
#endif // MOE_DOUBLE

// ------------------------------------------------------------------------------------------------
// Generation

static double decode_tolerance(void) { return sizeof(real) == sizeof(double) ? 1e-10 : 1e-5; }

// Attention over a ring of latents, rows put in a few at a time, against attention by the
// definition over the keys and values that the latents stand for.
static void test_latent_attention(void)
{
    enum { SLOTS = 2, T = 23, NH = 3, Dn = 5, Dr = 4, Dv = 7, Rkv = 9, CHUNK = 4 };
    enum { NKV = NH * (Dn + Dv), NQ = NH * (Dn + Dr), NOUT = NH * Dv };
    real *q = random_reals(SLOTS * T * NQ, 1), *w_b = random_reals(NKV * Rkv, 2);
    real *c_kv = random_reals(SLOTS * T * Rkv, 3), *k_pe = random_reals(SLOTS * T * Dr, 4);
    real *kv = reals(SLOTS * T * NKV), *latent = random_reals(2 * NH * 8 * Rkv, 5);
    real *plain = reals(SLOTS * T * NOUT);
    for (size_t i = 0; i < SLOTS * T * NKV; i++)
        for (size_t j = 0; j < Rkv; j++) kv[i] += c_kv[i / NKV * Rkv + j] * w_b[i % NKV * Rkv + j];
    for (size_t window = 1; window <= T; window += 5) {
        size_t capacity = window + CHUNK;
        real *cache = reals(SLOTS * capacity * (Rkv + Dr));
        for (size_t s = 0; s < SLOTS; s++)
            naive_attention(plain + s * T * NOUT, q + s * T * NQ, kv + s * T * NKV,
                            k_pe + s * T * Dr, T, NH, Dn, Dr, Dv, window, 0.6);
        for (size_t t = 0, n; t < T; t += n / SLOTS) { // both sequences, up to CHUNK rows of each
            int slot[SLOTS * CHUNK], pos[SLOTS * CHUNK];
            real rows[SLOTS * CHUNK * NQ], out[SLOTS * CHUNK * NOUT];
            real expected[SLOTS * CHUNK * NOUT];
            size_t take = min_size(1 + t % CHUNK, T - t);
            for (n = 0; n < SLOTS * take; n++) {
                slot[n] = (int)(n % SLOTS), pos[n] = (int)(t + n / SLOTS);
                size_t at = (size_t)(slot[n] * T + pos[n]);
                memcpy(rows + n * NQ, q + at * NQ, NQ * sizeof(real));
                memcpy(expected + n * NOUT, plain + at * NOUT, NOUT * sizeof(real));
                cache_store(cache, c_kv + at * Rkv, k_pe + at * Dr, slot + n, pos + n, 1, Rkv, Dr,
                            capacity);
            }
            latent_attention(out, latent, rows, w_b, cache, slot, pos, n, NH, Dn, Dr, Dv, Rkv,
                             capacity, window, 0.6);
            within(relative_error(out, expected, n * NOUT), decode_tolerance(),
                   label("window %zu, position %zu", window, t));
        }
    }
}

// One call of decode() and one of decode_mtp() for rows (slot, pos) of three sequences; their
// logits are compared with those of a forward pass over the whole sequences.
static void check_decode(Decoder *d, const Acts *a, const int *tokens, const int *slot,
                         const int *pos, size_t n)
{
    const Config *c = &d->m->config;
    size_t V = c->V, T = a->T;
    int row[8] = {0}, next[8] = {0};
    for (size_t i = 0; i < n; i++) {
        row[i] = tokens[(size_t)slot[i] * (T + 1) + (size_t)pos[i]];
        next[i] = tokens[(size_t)slot[i] * (T + 1) + (size_t)pos[i] + 1];
    }
    decode(d, row, slot, pos, n);
    for (size_t depth = 0; depth < 2; depth++) {
        for (size_t i = 0; i < n; i++) {
            size_t Tk = T - depth, at = (size_t)slot[i] * Tk + (size_t)pos[i];
            const real *expected = a->layer[c->L - 1 + depth].logits + at * V;
            if ((size_t)pos[i] < Tk)
                within(relative_error(d->a.logits + i * V, expected, V), decode_tolerance(),
                       label("depth %zu, slot %d, position %d", depth, slot[i], pos[i]));
        }
        if (depth == 0) decode_mtp(d, next, n);
    }
}

static void test_decode(void)
{
    enum { T = 19 };
    Config c = small_config();
    c.init_std = 0.2;
    for (int variant = 0; variant < 2; variant++) {
        if (variant) {
            c.Rq = 0, c.Dr = 4, c.dense = 0, c.yarn_factor = 4, c.yarn_original = 8;
            c.yarn_fast = 32, c.yarn_slow = 1, c.yarn_mscale = 1, c.yarn_mscale_all_dim = 0.5;
        }
        Model m = random_model(&c, 0, 21);
        Acts a = acts_make(&c, 3, T, 1);
        int *tokens = random_ints(3 * (T + 1), c.V, 22), slot[8], pos[8], at[3] = {0, 0, 0};
        acts_load(&a, tokens);
        model_forward(&m, &a);
        Decoder d = decoder_make(&m, 3, T + 3, 8, 8, T);
        for (pos[0] = 0, slot[0] = 2; pos[0] < T; pos[0]++) // token by token
            check_decode(&d, &a, tokens, slot, pos, 1);
        for (size_t begin = 0, n; begin < T; begin += n) { // in chunks; old entries must not show
            static const size_t chunk[4] = {5, 1, 8, 3};
            n = min_size(chunk[begin % 4], T - begin);
            for (size_t i = 0; i < n; i++) slot[i] = 2, pos[i] = (int)(begin + i);
            check_decode(&d, &a, tokens, slot, pos, n);
        }
        while (at[0] + at[1] + at[2] < 3 * T) { // three sequences side by side, each at its pace
            size_t n = 0;
            for (int s = 2; s >= 0; s--)
                for (int i = 0; i <= s && at[s] < T; i++) slot[n] = s, pos[n++] = at[s]++;
            check_decode(&d, &a, tokens, slot, pos, n);
        }
        decoder_free(&d);
        acts_free(&a);
        model_free(&m);
    }
}

// In a model of one layer a token with a window of W sees what it would as the last of W tokens,
// for RoPE knows distances only. And a ring that turns gives what one does that never fills up.
static void test_window(void)
{
    enum { T = 60, W = 11 };
    Config c = small_config();
    c.L = 1, c.D = 0, c.init_std = 0.2;
    Model m = random_model(&c, 0, 31);
    size_t V = c.V;
    int *tokens = random_ints(T + 1, c.V, 32), slot[4] = {0, 0, 0, 0}, pos[4];
    Decoder ring = decoder_make(&m, 1, W, 4, 4, T), roomy = decoder_make(&m, 1, W, 4 + T, 4 + T, T);
    EXPECT(ring.capacity < T / 2 && roomy.capacity > T, "capacities %zu, %zu", ring.capacity,
           roomy.capacity);
    for (size_t t = 0, n; t < T; t += n) {
        n = min_size(1 + t % 4, T - t);
        for (size_t i = 0; i < n; i++) pos[i] = (int)(t + i);
        decode(&ring, tokens + t, slot, pos, n);
        decode(&roomy, tokens + t, slot, pos, n);
        within(relative_error(ring.a.logits, roomy.a.logits, n * V), decode_tolerance(),
               label("position %zu, where the ring begins anew", t));
        for (size_t i = 0; i < n; i++) {
            size_t seen = min_size(t + i + 1, W);
            Acts a = acts_make(&c, 1, seen, 0);
            acts_load(&a, tokens + t + i + 1 - seen);
            model_forward(&m, &a);
            within(relative_error(ring.a.logits + i * V, a.layer[0].logits + (seen - 1) * V, V),
                   decode_tolerance(), label("position %zu", t + i));
            acts_free(&a);
        }
    }
    decoder_free(&ring);
    decoder_free(&roomy);
    model_free(&m);
}

enum { PROMPT = 13, COUNT = 90 }; // tokens given and generated
static int emitted[COUNT];
static size_t emits;

static void emit(int token) { emitted[emits++ % COUNT] = token; }

// How many drafts must have come true while this text was generated: the drafts are what the first
// MTP depth of a forward pass finds likeliest.
static size_t drafts_right(const Model *m, const int *text)
{
    const Config *c = &m->config;
    size_t right = 0;
    Acts a = acts_make(c, 1, PROMPT + COUNT - 1, 1);
    acts_load(&a, text);
    model_forward(m, &a);
    for (size_t i = PROMPT + 1; i + 1 < PROMPT + COUNT; i++) { // token i may be drafted
        const real *z = a.layer[c->L].logits + (i - 2) * c->V;
        int draft = 0;
        for (int v = 0; v < (int)c->V; v++) draft = z[v] > z[draft] ? v : draft;
        if (draft == text[i]) right++, i++; // then token i + 1 comes with it
    }
    acts_free(&a);
    return right;
}

// Generates with and without speculation: the same text, also where the window has moved on.
// Returns how many drafts were accepted.
static size_t check_generate(const Model *m, double temperature, size_t window, const char *what)
{
    size_t accepted = 0;
    Sampler s = {temperature, 0, 1, 5, 0};
    int *prompt = random_ints(PROMPT, m->config.V, 41), first[PROMPT + COUNT];
    for (int speculate = 0; speculate < 2; speculate++)
        for (size_t rows = speculate + 1u; rows < 20; rows += 5) { // the prompt in bits, or at once
            int text[PROMPT + COUNT + 2];
            memcpy(text, prompt, PROMPT * sizeof(int));
            emits = 0;
            Decoder d = decoder_make(m, 1, window, rows, rows, PROMPT + COUNT + 1);
            Generation g = generate(&d, &s, text, PROMPT, COUNT, speculate, emit);
            decoder_free(&d);
            EXPECT(g.generated == COUNT && emits == COUNT, "%s: %zu tokens, %zu of them given",
                   what, g.generated, emits);
            EXPECT(!memcmp(emitted, text + PROMPT, COUNT * sizeof(int)), "%s: gave others", what);
            EXPECT(g.calls + g.accepted == COUNT && g.accepted <= g.drafted &&
                   (speculate ? g.drafted > COUNT / 4 : !g.drafted),
                   "%s: %zu calls, %zu drafts, %zu accepted", what, g.calls, g.drafted, g.accepted);
            if (!speculate && rows == 1) memcpy(first, text, sizeof first);
            EXPECT(!memcmp(first, text, sizeof first), "%s, window %zu: another text where "
                   "speculate is %d and rows %zu", what, window, speculate, rows);
            accepted = g.accepted;
        }
    size_t right = window < PROMPT + COUNT ? accepted : drafts_right(m, first);
    EXPECT(accepted == right, "%s: %zu drafts accepted, %zu were right", what, accepted, right);
    return accepted;
}

static void test_generate(void)
{
    Config c = small_config();
    Model m = random_model(&c, 0, 40);
    check_generate(&m, 0, 103, "greedy");
    check_generate(&m, 1, 103, "sampled");
    check_generate(&m, 1, 16, "sampled");
    model_free(&m);
}

#ifndef MOE_DOUBLE
// A token's share of many draws is its probability, after top-k and top-p.
static void test_sample_token(void)
{
    enum { V = 12, DRAWS = 20000 };
    static const struct {
        double temperature;
        int top_k;
        double top_p;
    } cases[] = {{1, 0, 1}, {0.6, 0, 1}, {1, 5, 1}, {1, 0, 0.7}, {1.3, 7, 0.6}, {1, 50, 1}};
    real *logits = random_reals(V, 51);
    for (size_t i = 0; i < V; i++) logits[i] *= 2;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        Sampler s = {cases[i].temperature, cases[i].top_k, cases[i].top_p, 52, 0};
        double p[V], sum = 0, left = 0, most = 0;
        int count[V] = {0};
        for (size_t v = 0; v < V; v++) sum += p[v] = exp((double)logits[v] / s.temperature);
        for (size_t v = 0; v < V; v++) p[v] /= sum;
        double all[V];
        memcpy(all, p, sizeof p);
        for (size_t v = 0; v < V; v++) { // a token goes if those ahead of it are enough
            double ahead = 0;
            int better = 0;
            for (size_t u = 0; u < V; u++)
                if (all[u] > all[v]) ahead += all[u], better++;
            if ((s.top_k && better >= s.top_k) || ahead >= s.top_p) p[v] = 0;
            left += p[v];
        }
        for (uint64_t n = 0; n < DRAWS; n++) count[sample_token(&s, logits, V, n).token]++;
        for (size_t v = 0; v < V; v++) {
            double share = p[v] / left, sigma = sqrt(DRAWS * share * (1 - share));
            EXPECT(share > 0 || !count[v], "case %zu: token %zu was drawn", i, v);
            if (sigma > 0) most = fmax(most, fabs(count[v] - DRAWS * share) / sigma);
        }
        EXPECT(most < 4, "case %zu: a token is %.1f standard deviations off", i, most);
        snprintf(remark, sizeof remark, "%.1f standard deviations", most);
    }
    real ties[4] = {1, 3, 3, 2};
    for (uint64_t n = 0; n < 50; n++) {
        Sampler greedy = {0, 0, 1, 7, 0}, one = {1, 1, 1, 7, 0}, tiny = {1, 0, 0, 7, 0};
        EXPECT(sample_token(&greedy, ties, 4, n).token == 1,
               "temperature 0 did not take the first best");
        EXPECT(sample_token(&one, ties, 4, n).token == 1, "top_k 1 did not take the best");
        EXPECT(sample_token(&tiny, ties, 4, n).token == 1, "top_p 0 did not take the best");
    }
}

static const char *const excerpt = "tinyshakespeare/excerpt.txt";

static Config trainable_config(void)
{
    Config c = small_config();
    c.V = 256, c.C = c.Tmax = 24, c.L = 2, c.D = 1, c.E = 4, c.G = c.KG = 1, c.init_std = 0.02;
    c.alpha = 1e-4;
    return c;
}

// A little training makes drafts come true.
static void test_generate_trained(void)
{
    enum { B = 8, T = 24 };
    Config c = trainable_config();
    Model m = model_make(&c, 1);
    model_init(&m, 1);
    Data text = data_load(excerpt, &c);
    Acts a = acts_make(&c, B, T, 1);
    Optimizer o = optimizer_make(&m);
    Recipe r = {1, 0.02, 0.02, 0.9, 0.95, 1e-8, 0.1, 1, 0.95, 0.001};
    int tokens[B * (T + 1)];
    double first = 0;
    Losses s = {0, 0, 0, 0};
    for (size_t step = 0; step < 60; step++) {
        for (size_t b = 0; b < B; b++)
            tokens_copy(tokens + b * (T + 1),
                        text.bytes + window_start(1, step * B + b, text.n, T), T + 1);
        acts_load(&a, tokens);
        model_forward(&m, &a);
        model_backward(&m, &a, 1);
        optimizer_count_load(&o, &m, &a);
        optimizer_step(&o, &m, &r, grad_norm(&m));
        s = model_losses(&m, &a);
        if (step == 0) first = s.main;
    }
    EXPECT(first > 5 && s.main < 3.5, "the loss went from %.3f to %.3f", first, s.main);
    size_t greedy = check_generate(&m, 0, 103, "greedy");
    size_t sampled = check_generate(&m, 1, 103, "sampled");
    check_generate(&m, 0.7, 16, "sampled");
    EXPECT(greedy > 0 && sampled > 0, "drafts accepted: %zu greedy, %zu sampled", greedy, sampled);
    snprintf(remark, sizeof remark, "loss %.2f, drafts accepted: %zu greedy, %zu sampled", s.main,
             greedy, sampled);
    free(text.bytes);
    optimizer_free(&o);
    acts_free(&a);
    model_free(&m);
}

#endif // not MOE_DOUBLE

// ------------------------------------------------------------------------------------------------
// Reinforcement learning

// Texts of different lengths: random tokens 1 .. V - 2, then V - 1; -1 where they have ended.
static Rollout random_rollout(size_t n, size_t most, size_t V)
{
    Rollout r = rollout_make(n, most, most);
    for (size_t i = 0; i < n; i++) {
        r.prompt[i] = 2 + i % 3;
        r.length[i] = i == 1 ? r.prompt[i] + 1 : most - i * 5 % (most - 6); // one answers at once
        for (size_t t = 0; t < most; t++) {
            int token = 1 + (int)(random_u64(81, i, t) % (V - 2));
            r.text[i * most + t] = t + 1 < r.length[i] ? token : t < r.length[i] ? (int)V - 1 : -1;
        }
    }
    return r;
}

// Runs text i alone and takes the log-probabilities of its answer from the logits: token t's is
// logp[t]. a is for one sequence of a token less than the text. Returns their mean entropy.
static double naive_logp(double *logp, const Model *m, Acts *a, const Rollout *r, size_t i,
                         double temperature)
{
    size_t V = m->config.V, prompt = r->prompt[i], length = r->length[i];
    const int *text = r->text + i * r->most;
    double entropy = 0;
    acts_load(a, text);
    model_forward(m, a);
    for (size_t t = prompt; t < length; t++) {
        const real *z = a->layer[m->config.L - 1].logits + (t - 1) * V;
        double sum = 0, mean = 0;
        for (size_t v = 0; v < V; v++) {
            sum += exp((double)z[v] / temperature);
            mean += exp((double)z[v] / temperature) * (double)z[v] / temperature;
        }
        logp[t] = (double)z[text[t]] / temperature - log(sum);
        entropy += (log(sum) - mean / sum) / (double)(length - prompt);
    }
    return entropy;
}

#ifdef MOE_DOUBLE
// (r - mean) / std: of mean 0 and standard deviation 1, and 0 where all are alike.
static void test_group_advantages(void)
{
    enum { G = 16 };
    for (size_t n = 2; n <= G; n += 7) {
        double r[G], A[G], mean = 0, square = 0, sum = 0, squares = 0;
        for (size_t i = 0; i < n; i++) {
            r[i] = 3 * random_uniform(82, n, i) - 1;
            mean += r[i] / (double)n;
            square += r[i] * r[i] / (double)n;
        }
        double std = sqrt(square - mean * mean);
        near(group_advantages(A, r, n), std, 1e-13, "std");
        for (size_t i = 0; i < n; i++) {
            near(A[i], (r[i] - mean) / std, 1e-12, label("advantage %zu of %zu", i, n));
            sum += A[i], squares += A[i] * A[i];
        }
        within(fabs(sum), 1e-13, "mean");
        near(squares / (double)n, 1, 1e-13, "variance");
        for (size_t i = 0; i < n; i++) r[i] = 0.1;
        EXPECT(group_advantages(A, r, n) < 1e-9, "all alike have a std");
        for (size_t i = 0; i < n; i++) EXPECT(A[i] == 0, "all alike: advantage %g", A[i]);
    }
    double one[4] = {0, 0, 2, 0}, A[4];
    near(group_advantages(A, one, 4), sqrt(0.75), 1e-14, "std of one right in four");
    near(A[2], sqrt(3), 1e-14, "the one that is right");
    near(A[3], -sqrt(1 / 3.), 1e-14, "one that is wrong");
}

// What [R1] 1-2 maximise, of one answer: the mean over its tokens of
// min(rho A, clip(rho, 1 - eps, 1 + eps) A) - beta (r - log r - 1), r = pi_ref / pi.
static double objective(const double *logp, const double *old, const double *ref, size_t T,
                        double A, double eps, double beta)
{
    double sum = 0;
    for (size_t t = 0; t < T; t++) {
        double rho = exp(logp[t] - old[t]), r = ref ? exp(ref[t] - logp[t]) : 1;
        double clipped = rho < 1 - eps ? 1 - eps : rho > 1 + eps ? 1 + eps : rho;
        sum += (rho * A < clipped * A ? rho * A : clipped * A) - beta * (r - log(r) - 1);
    }
    return sum / (double)T;
}

// log pi - log pi_old, off the kinks of eps 0.2, which are at -0.223 and 0.182.
static const double drift[] = {0, 0.1, -0.3, 0.25, -0.15, 0.6, -0.8, 0.17, -0.2, 0.19};
enum { DRIFTS = sizeof drift / sizeof *drift };

static void test_grpo_loss(void)
{
    enum { T = DRIFTS };
    static const double advantages[] = {1.3, -0.7, 0, 2.5}, clips[] = {0.2, 10}, h = 1e-4;
    double ce[T], dce[T], unused[T], logp[T], old[T], ref[T];
    for (size_t i = 0; i < 16; i++) {
        Grpo g = {clips[i / 4 % 2], i < 8 ? 0.3 : 0};
        double A = advantages[i % 4], kl = 0, clipped = 0;
        const double *known = i < 8 ? ref : NULL;
        for (size_t t = 0; t < T; t++) {
            ce[t] = 0.1 + 3 * random_uniform(83, i, t), logp[t] = -ce[t];
            old[t] = logp[t] - drift[t];
            ref[t] = logp[t] + 2 * random_uniform(84, i, t) - 1;
            kl += known ? (exp(ref[t] - logp[t]) - (ref[t] - logp[t]) - 1) / T : 0;
            clipped += (A > 0 && drift[t] > log(1 + g.clip)) ||
                       (A < 0 && g.clip < 1 && drift[t] < log(1 - g.clip));
        }
        char what[100];
        snprintf(what, sizeof what, "A %g, clip %g, %s reference", A, g.clip, known ? "a" : "no");
        GrpoSums s = grpo_loss(dce, ce, old, known, T, A, &g);
        near(s.loss, -objective(logp, old, known, T, A, g.clip, g.kl), 1e-13, what);
        near(s.kl, kl, 1e-12, what);
        near(s.clipped, clipped / T, 1e-12, what);
        for (size_t t = 0; t < T; t++) {
            double was = ce[t], f[2];
            for (int k = 0; k < 2; k++) {
                ce[t] = was + (k ? h : -h);
                f[k] = grpo_loss(unused, ce, old, known, T, A, &g).loss;
            }
            ce[t] = was;
            within(fabs((f[1] - f[0]) / (2 * h) - dce[t]), 1e-8, label("%s, token %zu", what, t));
        }
    }
}

// Answers order[0 .. n) of r under a policy, a reference and advantages, each run by itself.
typedef struct {
    Model m;
    const Rollout *r;
    const size_t *order;
    size_t n;
    Acts *one;         // [r->n] for each text alone
    double *ref, *A;   // [r->n, r->most], NULL: no reference; [r->n]
    double temperature;
    Grpo g;
} GrpoTrial;

static double grpo_trial_loss(void *p)
{
    GrpoTrial *t = (GrpoTrial *)p;
    const Rollout *r = t->r;
    double logp[64], sum = 0;
    for (size_t k = 0; k < t->n; k++) {
        size_t i = t->order[k], prompt = r->prompt[i], at = i * r->most + prompt;
        naive_logp(logp, &t->m, &t->one[i], r, i, t->temperature);
        sum -= objective(logp + prompt, r->logp + at, t->ref ? t->ref + at : NULL,
                         r->length[i] - prompt, t->A[i], t->g.clip, t->g.kl);
    }
    return sum / (double)t->n;
}

// The gradient of a step's loss, in micro-batches, against differences of the loss of each answer
// alone, and against itself however the answers are packed.
static void check_grpo_gradient(Config c, int with_ref, double temperature)
{
    enum { N = 7, MOST = 14, USED = 6, ROOM = 2 * (MOST - 1) };
    static const size_t sorted[] = {0, 5, 4, 6, 3, 1}, mixed[] = {1, 0, 6, 4, 3, 5}; // not 2
    static const Grpo grpo[2] = {{0.2, 0}, {0.2, 0.4}};
    double A[N] = {1.2, -0.8, 5, -1.5, 0.6, 0, 0.9}, num[PROBES + 1];
    Model m = random_model(&c, 1, 85), ref = random_model(&c, 0, 85);
    Rollout r = random_rollout(N, MOST, c.V);
    size_t elements = m.layout.elements, kept = 0;
    for (size_t i = 0; i < elements; i++) ref.weights[i] *= 1 + 0.1 * random_uniform(86, 0, i);
    GrpoTrial t = {m, &r, sorted, USED, (Acts *)room(N, sizeof(Acts)), NULL, A, temperature,
                   grpo[with_ref]};
    if (with_ref) t.ref = reals(N * MOST);
    Config main_model = c; // MTP layers have no part in it
    main_model.D = 0;
    for (size_t i = 0; i < N; i++) {
        t.one[i] = acts_make(&main_model, 1, r.length[i] - 1, 1);
        if (with_ref) naive_logp(t.ref + i * MOST, &ref, &t.one[i], &r, i, temperature);
        naive_logp(r.logp + i * MOST, &m, &t.one[i], &r, i, temperature); // and routes
        for (size_t k = r.prompt[i]; k < r.length[i]; k++)
            r.logp[i * MOST + k] -= drift[kept++ % DRIFTS];
    }
    Acts a = acts_make(&c, ROOM / (MOST - 1), MOST - 1, 1);
    a.temperature = temperature, a.alpha = a.mtp_weight = 0;
    const Model *reference = with_ref ? &ref : NULL;
    GrpoSums s = grpo_backward(&m, reference, &a, ROOM, &r, sorted, USED, A, &t.g);
    EXPECT(a.B * a.T < ROOM, "there was one micro-batch");
    accum *packed = copy_of(m.grads, elements), *alone = reals(elements);
    near(s.loss / USED, grpo_trial_loss(&t), 1e-12, "loss");
    EXPECT(s.clipped > 0.5 && with_ref == (s.kl > 0.01), "clipped %g, kl %g", s.clipped, s.kl);

    hold_routing = 1;
    for (size_t i = 0; i < m.layout.tensors; i++) {
        const Tensor *x = &m.layout.tensor[i];
        numeric_gradient(num, grpo_trial_loss, &t, m.weights + x->offset, tensor_size(x));
        within(gradient_error(num, packed + x->offset, tensor_size(x),
                              x->kind == ROUTER_BIAS || x->layer >= (int)c.L),
               tolerance, name_of(&m, i));
    }
    hold_routing = 0;
    for (size_t j = 0; j < c.C; j++) // what only follows answers, and what only ends them
        EXPECT(!m.dw.embed[j] && !m.dw.embed[(c.V - 1) * c.C + j], "padding has a gradient");

    grpo_backward(&m, reference, &a, ROOM, &r, mixed, USED, A, &t.g);
    for (size_t i = 0; i < elements; i++) alone[i] = m.grads[i] - packed[i];
    within(relative_error(alone, packed, elements), 1e-12, "in another order, added");
    memset(m.grads, 0, elements * sizeof(accum));
    for (size_t k = 0; k < USED; k++)
        grpo_backward(&m, reference, &a, MOST - 1, &r, sorted + k, 1, A, &t.g);
    for (size_t i = 0; i < elements; i++) alone[i] = m.grads[i] / USED;
    within(relative_error(alone, packed, elements), 1e-12, "one by one");

    Rollout wide = random_rollout(N, MOST + 5, c.V); // the same texts, other things behind them
    for (size_t i = 0; i < N; i++) {
        wide.prompt[i] = r.prompt[i], wide.length[i] = r.length[i];
        memcpy(wide.text + i * (MOST + 5), r.text + i * MOST, r.length[i] * sizeof(int));
        memcpy(wide.logp + i * (MOST + 5), r.logp + i * MOST, MOST * sizeof(accum));
    }
    memset(m.grads, 0, elements * sizeof(accum));
    grpo_backward(&m, reference, &a, ROOM, &wide, sorted, USED, A, &t.g);
    EXPECT(!memcmp(m.grads, packed, elements * sizeof(accum)), "what stands behind a text counts");
    for (size_t i = 0; i < N; i++) acts_free(&t.one[i]);
    acts_free(&a);
    rollout_free(&r);
    rollout_free(&wide);
    model_free(&m);
    model_free(&ref);
}

static void test_grpo_gradient(void)
{
    Config c = small_config();
    c.L = 2;
    check_grpo_gradient(c, 1, 0.7);
    c.D = 0;
    check_grpo_gradient(c, 0, 1);
}
#endif // MOE_DOUBLE

// Draws texts of random tokens, all prompts of the same length if `prompt` is not 0. Behind their
// ends is -1.
static Rollout drawn_rollout(const Model *m, const Sampler *s, size_t n, size_t most, size_t prompt,
                             int end)
{
    Rollout r = random_rollout(n, most, m->config.V);
    Decoder d = decoder_make(m, n, most, 1, n, most);
    for (size_t i = 0; i < n; i++) {
        if (prompt) memcpy(r.text + i * most, r.text, most * sizeof(int));
        if (prompt) r.prompt[i] = prompt;
        for (size_t t = r.prompt[i]; t < most; t++) r.text[i * most + t] = -1;
    }
    rollout_draw(&r, &d, s, end);
    decoder_free(&d);
    return r;
}

// The log-probabilities of a token when drawn, from the latent cache, and of the same weights when
// learnt from and as the reference are one number, or ratios would not begin at 1.
static void test_rollout_logp(void)
{
    enum { N = 6, MOST = 24 };
    double most = sizeof(real) == sizeof(double) ? 1e-10 : 1e-6;
    Config c = small_config();
    c.init_std = 0.1;
    Model m = random_model(&c, 1, 87), ref = random_model(&c, 0, 87);
    for (int cold = 0; cold < 2; cold++) {
        Sampler s = {cold ? 0.7 : 1, 0, 1, 88, 0};
        Rollout r = drawn_rollout(&m, &s, N, MOST, 0, 5);
        Acts a = acts_make(&c, N, MOST - 1, 1);
        size_t order[N];
        double A[N], logp[MOST], entropy = 0, sum = 0;
        a.temperature = s.temperature, a.alpha = a.mtp_weight = 0;
        int *rows = (int *)room(N * MOST, sizeof(int));
        for (size_t i = 0; i < N; i++) {
            order[i] = i, A[i] = (double)i - 2, sum += A[i];
            memcpy(rows + i * MOST, r.text + i * MOST, r.length[i] * sizeof(int));
        }
        acts_load(&a, rows);
        model_forward(&m, &a);
        const accum *loss = a.layer[c.L - 1].loss;
        for (size_t i = 0; i < N; i++) {
            Acts one = acts_make(&c, 1, r.length[i] - 1, 1);
            entropy += naive_logp(logp, &m, &one, &r, i, s.temperature) *
                       (double)(r.length[i] - r.prompt[i]) / (double)r.drawn;
            for (size_t t = 0; t < MOST; t++) {
                double drawn = (double)r.logp[i * MOST + t], learnt;
                if (t < r.prompt[i] || t >= r.length[i]) {
                    EXPECT(drawn == 0, "token %zu was not drawn", t);
                    continue;
                }
                learnt = -(double)loss[i * (MOST - 1) + t - 1];
                within(fabs(drawn - learnt), most, label("learnt, token %zu of %zu", t, i));
                within(fabs(drawn - logp[t]), most, label("alone, token %zu of %zu", t, i));
            }
            acts_free(&one);
        }
        near(r.entropy, entropy, 10 * most, "entropy");
        Grpo g = {0.2, 1};
        GrpoSums sums = grpo_backward(&m, &ref, &a, N * (MOST - 1), &r, order, N, A, &g);
        within(fabs(sums.loss + sum), 20 * most, "loss"); // -A each
        within(fabs(sums.kl), most, "divergence");
        EXPECT(sums.clipped == 0, "clipped %g", sums.clipped);
        for (size_t i = 0; i < N * MOST; i++) r.logp[i] -= 1; // each ratio is e: too large where
        sums = grpo_backward(&m, &ref, &a, N * (MOST - 1), &r, order, N, A, &g); // A > 0, thrice
        within(fabs(sums.clipped - 3), 1e-12, "clipped");
        acts_free(&a);
        rollout_free(&r);
    }
    model_free(&m);
    model_free(&ref);
}

#ifndef MOE_DOUBLE
static void expect_same_texts(const Rollout *a, const Rollout *b, size_t n, const char *what)
{
    for (size_t i = 0; i < n; i++) {
        EXPECT(a->length[i] == b->length[i] &&
               !memcmp(a->text + i * a->most, b->text + i * b->most, a->most * sizeof(int)),
               "%s: text %zu is another", what, i);
        for (size_t t = 0; t < a->most; t++)
            within(fabs((double)a->logp[i * a->most + t] - (double)b->logp[i * b->most + t]), 1e-5,
                   what);
    }
}

// A text ends at `end` or is `most` long, and is the same whatever is drawn beside it.
static void test_rollout_draw(void)
{
    enum { N = 20, MOST = 30, LAST = 5 };
    Config c = small_config();
    c.init_std = 0.2;
    Model m = random_model(&c, 0, 89);
    Sampler s = {1, 0, 1, 90, 7};
    Rollout r = drawn_rollout(&m, &s, N, MOST, 0, LAST), asked = random_rollout(N, MOST, c.V);
    size_t ended = 0, drawn = 0;
    for (size_t i = 0; i < N; i++) {
        const int *text = r.text + i * MOST;
        size_t length = r.length[i];
        EXPECT(r.prompt[i] == asked.prompt[i] && length > r.prompt[i] && length <= MOST,
               "text %zu has %zu tokens", i, length);
        EXPECT(!memcmp(text, asked.text + i * MOST, r.prompt[i] * sizeof(int)), "prompt %zu", i);
        for (size_t t = r.prompt[i]; t < MOST; t++) {
            EXPECT((text[t] == -1) == (t >= length), "text %zu, of %zu: token %zu is %d", i, length,
                   t, text[t]);
            EXPECT(t + 1 >= length || text[t] != LAST, "text %zu does not end at %zu", i, t);
        }
        EXPECT(length == MOST || text[length - 1] == LAST, "text %zu has no end", i);
        ended += text[length - 1] == LAST;
        drawn += length - r.prompt[i];
    }
    EXPECT(ended > 2 && ended < N - 2, "%zu texts ended", ended);
    EXPECT(r.drawn == drawn, "%zu drawn, counted %zu", drawn, r.drawn);
    EXPECT(r.entropy > 0 && r.entropy < log((double)c.V), "entropy %g", r.entropy);
    snprintf(remark, sizeof remark, "%zu of %d ended", ended, N);

    use_threads(2);
    Rollout threads = drawn_rollout(&m, &s, N, MOST, 0, LAST);
    expect_same_texts(&r, &threads, N, "2 threads");
    EXPECT(!memcmp(r.logp, threads.logp, N * MOST * sizeof(accum)) && r.entropy == threads.entropy,
           "2 threads: other bits");
    rollout_free(&threads);
    for (size_t n = 1; n < N; n += 6) {
        Rollout few = drawn_rollout(&m, &s, n, MOST, 0, LAST);
        expect_same_texts(&few, &r, n, label("%zu texts", n));
        rollout_free(&few);
    }
    use_threads(1);
    Rollout again = drawn_rollout(&m, &s, 5, MOST, 3, LAST); // one prompt; text i draws from
    s.stream++;                                              // stream + i
    Rollout next = drawn_rollout(&m, &s, 5, MOST, 3, LAST);
    for (size_t i = 1; i < 5; i++)
        EXPECT(!memcmp(again.text + i * MOST, next.text + (i - 1) * MOST, MOST * sizeof(int)) &&
               memcmp(again.text + i * MOST, next.text + i * MOST, MOST * sizeof(int)),
               "text %zu draws from another stream", i);
    s.temperature = 0;
    Rollout likeliest = drawn_rollout(&m, &s, 5, MOST, 3, LAST);
    for (size_t i = 0; i < 5; i++)
        EXPECT(!memcmp(likeliest.text, likeliest.text + i * MOST, MOST * sizeof(int)),
               "the likeliest texts differ");
    EXPECT(likeliest.entropy == 0 && likeliest.logp[3] == 0, "they have entropy %g",
           likeliest.entropy);
    rollout_free(&again);
    rollout_free(&next);
    rollout_free(&likeliest);
    rollout_free(&r);
    rollout_free(&asked);
    model_free(&m);
}

// ------------------------------------------------------------------------------------------------
// Tasks

static const long sizes[TASKS][2] = {{1, 8}, {1, 4}, {2, NUMBERS}, {1, NUMBERS}, // from, to
                                     {1, PLACES}};

static int compare_questions(const void *x, const void *y)
{
    const Question *a = (const Question *)x, *b = (const Question *)y;
    if (a->n != b->n || a->target != b->target)
        return a->n != b->n ? (a->n > b->n) - (a->n < b->n) : (a->target > b->target) * 2 - 1;
    return memcmp(a->number, b->number, sizeof a->number);
}

// The same numbers in another order are the same here.
static Question sorted_question(Question q)
{
    qsort(q.number, q.n, sizeof *q.number, compare_longs);
    return q;
}

// Questions are of the size asked for and are read as they are written.
static void test_questions(void)
{
    for (int task = 0; task < TASKS; task++)
        for (long size = sizes[task][0]; size <= sizes[task][1]; size++) {
            int pair = task == TASK_ADD || task == TASK_MUL || task == TASK_COLUMNS;
            long low = pair && size > 1 ? (long)pow(10, (double)size - 1) : task == TASK_COUNTDOWN;
            long most = pair ? (long)pow(10, (double)size) - 1 : task == TASK_SORT ? 99 : 9;
            size_t seeds = 0, streams = 0, same = 0;
            for (uint64_t i = 0; i < 60; i++) {
                Question q = make_question(task, size, i % 2, 3, i), read;
                Question other = make_question(task, size, i % 2, 4, i);
                Question next = make_question(task, size, i % 2, 3, i + 2);
                Question again = make_question(task, size, i % 2, 3, i);
                Line line = {0, ""};
                put_question(&line, &q);
                EXPECT(parse_question(&read, task, line.text) && !compare_questions(&read, &q),
                       "%s '%s' is read as another", task_names[task], line.text);
                EXPECT(q.n == (pair ? 2 : (size_t)size) && q.target >= 0 && q.target <= 99,
                       "%s of size %ld: %s", task_names[task], size, line.text);
                for (size_t k = 0; k < q.n; k++)
                    EXPECT(q.number[k] >= low && q.number[k] <= most, "%s of size %ld: %s",
                           task_names[task], size, line.text);
                seeds += compare_questions(&q, &other) != 0;
                streams += compare_questions(&q, &next) != 0;
                same += !compare_questions(&q, &again);
            }
            EXPECT(seeds > 40 && streams > 40 && same == 60, "%s of size %ld: %zu, %zu and %zu of "
                   "60", task_names[task], size, seeds, streams, same);
        }
    static const struct { int task; const char *text; } wrong[] = {
        {TASK_ADD, ""}, {TASK_ADD, "1"}, {TASK_ADD, "1+"}, {TASK_ADD, "+1"}, {TASK_ADD, "1+2+3"},
        {TASK_ADD, "1+2 "}, {TASK_ADD, " 1+2"}, {TASK_ADD, "01+2"}, {TASK_ADD, "1+-2"},
        {TASK_ADD, "1*2"}, {TASK_ADD, "1+2="}, {TASK_ADD, "1+2000000000"}, {TASK_MUL, "1+2"},
        {TASK_SORT, "1,,2"}, {TASK_SORT, "1,2,"}, {TASK_SORT, "1,2,3,4,5,6,7,8,9"},
        {TASK_COUNTDOWN, "1,2"}, {TASK_COUNTDOWN, "1,2="}, {TASK_COUNTDOWN, "1,2=-1"},
        {TASK_COUNTDOWN, "=1"}, {TASK_COUNTDOWN, "1,2=3=3"}, {TASK_COUNTDOWN, "1,2=3,4"},
        {TASK_COLUMNS, ""}, {TASK_COLUMNS, "t"}, {TASK_COLUMNS, "t:"}, {TASK_COLUMNS, "t:t76"},
        {TASK_COLUMNS, "t:k48e.t76k.e35"}, {TASK_COLUMNS, "t:k48e.t76k.e35;."},
        {TASK_COLUMNS, "t:k48e.t76k.e35;e35;"}, {TASK_COLUMNS, "t:k48e.t76k"}, // where is e?
        {TASK_COLUMNS, "k:k48e.t76k.e35;"}, {TASK_COLUMNS, "t:k48;.t76k.e35;"}, // one is left
        {TASK_COLUMNS, "t:k48t.t76k.e35;"}, {TASK_COLUMNS, "t:k48k.t76k"}, // round in circles
        {TASK_COLUMNS, "t:k48e,t76k,e35;"}, {TASK_COLUMNS, "t:k48e.t76k.t35;"},
        {TASK_COLUMNS, "T:K48E.T76K.E35;"}, {TASK_COLUMNS, "t:k4xe.t76k.e35;"},
        {TASK_COLUMNS, "t:k48e.t76k.e35; "}, {TASK_COLUMNS, " t:k48e.t76k.e35;"},
        {TASK_COLUMNS, "a:a11b.b11c.c11d.d11e.e11f.f11g.g11h.h11i.i11j.j11;"}, // ten
    };
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        Question q;
        EXPECT(!parse_question(&q, wrong[i].task, wrong[i].text), "'%s' was taken", wrong[i].text);
    }
}

// No question for testing has the numbers of one to train on, whatever seeds made them.
static void test_questions_for_testing(void)
{
    enum { COUNT_EACH = 3000 };
    Question *q = (Question *)room(2 * COUNT_EACH, sizeof *q);
    for (int task = 0; task < TASKS; task++) {
        size_t kept = 0, both = 0;
        for (size_t i = 0; i < 2 * COUNT_EACH; i++) {
            long size = task == TASK_MUL || i % 4 == 0 ? 2 : 3;
            q[i] = sorted_question(make_question(task, size, i < COUNT_EACH, i % 3, i));
        }
        qsort(q, COUNT_EACH, sizeof *q, compare_questions);
        for (size_t i = COUNT_EACH; i < 2 * COUNT_EACH; i++)
            both += bsearch(&q[i], q, COUNT_EACH, sizeof *q, compare_questions) != NULL;
        EXPECT(both == 0, "%s: %zu questions are in both", task_names[task], both);
        for (long i = 0; i < 8000; i++) {
            Question any = {task, 3, {i % 20, i / 20 % 20, i / 400}, 0, "", ""};
            Question turned = {task, 3, {i / 400, i % 20, i / 20 % 20}, 0, "", ""};
            EXPECT(is_for_testing(&any) == is_for_testing(&turned), "the order counts");
            kept += is_for_testing(&any) != 0;
        }
        EXPECT(kept > 800 && kept < 1200, "%s: %zu of 8000 are for testing", task_names[task],
               kept);
    }
}

// How many of the equations in a text, such as 4+8+1=13, are false.
static size_t false_equations(const char *text)
{
    size_t count = 0;
    for (const char *equals = text; (equals = strchr(equals, '=')); equals++) {
        const char *from = equals;
        char *at, op;
        while (from > text && strspn(from - 1, "0123456789+-*/")) from--;
        long x = strtol(from, &at, 10);
        if (from > text && islower((unsigned char)from[-1])) // k481=13: digits of a column
            for (x = 0, at = (char *)from; at < equals; at++) x += *at - '0';
        while ((op = *at) != '=') {
            long y = strtol(at + 1, &at, 10);
            x = op == '+' ? x + y : op == '-' ? x - y : op == '*' ? x * y : x / y;
        }
        count += strtol(equals + 1, NULL, 10) != x;
    }
    return count;
}

// Which share of solutions of this quality is judged right. All must be well-formed, and thoughts
// that do not slip be true.
static double share_right(int task, long size, double worked, double right, double slips)
{
    enum { TRIES = 40 };
    Quality quality = {worked, right, slips};
    double sum = 0, thoughts = 0;
    for (uint64_t i = 0; i < TRIES; i++) {
        Random r = {5, 6, i << 20};
        Question q = make_question(task, size, 0, 7, i);
        Line line = {0, ""};
        put_solution(&line, &q, &r, &quality);
        Reward reward = judge(&q, line.text);
        EXPECT(reward.format == 1, "%s: '%s' is not well-formed", task_names[task], line.text);
        EXPECT(reward.accuracy == 1 || right < 1 || slips > 0, "%s: '%s' is wrong",
               task_names[task], line.text);
        EXPECT(slips > 0 || false_equations(line.text) == 0, "'%s' is false", line.text);
        sum += reward.accuracy / TRIES;
        thoughts += !strstr(line.text, "<think></think>");
    }
    EXPECT(thoughts == worked * TRIES, "%s: %g of %d think", task_names[task], thoughts, TRIES);
    return sum;
}

// Solutions are as good as is said: all right, or all wrong, thought about or not.
// The letters of a text's columns do not come again soon, and columns keep their sense.
static void test_rename_columns(void)
{
    char letters[] = "abcdefghijklmnopqrstuvwxyz", said[501];
    size_t n = 0;
    Random r = {1, 2, 0};
    for (uint64_t i = 0; i < 100; i++) {
        Question q = make_question(TASK_COLUMNS, 5, 0, 3, i), was = q, read;
        Line line = {0, ""};
        rename_columns(&q, letters, &r);
        put_question(&line, &q);
        EXPECT(parse_question(&read, TASK_COLUMNS, line.text) && !compare_questions(&read, &was),
               "'%s' is another sum", line.text);
        for (size_t k = 0; k < 5; k++, n++) {
            size_t before = min_size(n, 20);
            EXPECT(strchr(q.shown, q.letter[k]) - q.shown ==
                   strchr(was.shown, was.letter[k]) - was.shown, "'%s' is in another order",
                   line.text);
            EXPECT(!memchr(said + n - before, q.letter[k], before), "'%s': %c again", line.text,
                   q.letter[k]);
            said[n] = q.letter[k];
        }
    }
}

static void test_line_start(void)
{
    static const char text[] = "ab\ncd\nef";
    static const size_t from_to[][3] = {{0, 8, 2}, {2, 8, 2}, {3, 8, 5}, {3, 5, 3}, {6, 8, 6}};
    for (size_t i = 0; i < sizeof from_to / sizeof *from_to; i++) {
        size_t start = line_start(text, from_to[i][0], from_to[i][1]);
        EXPECT(start == from_to[i][2], "from %zu: %zu", from_to[i][0], start);
    }
}

static void test_solutions(void)
{
    for (int task = 0; task < TASKS; task++)
        for (long size = sizes[task][0]; size <= sizes[task][1] && size < 7; size++) {
            double most = task != TASK_SORT ? 0 : size == 1 ? 1 : 0.8;
            share_right(task, size, 1, 1, 0);
            share_right(task, size, 0, 1, 0);
            double wrong = share_right(task, size, 0, 0, 0);
            EXPECT(wrong < most + 1e-9, "%s of size %ld: a share %g of wrong answers is right",
                   task_names[task], size, wrong);
            double slipped = share_right(task, size, 1, 0, 0.3);
            int one_way = size == 1 || (task == TASK_COUNTDOWN && size == 2);
            EXPECT(slipped < 1 || one_way, "%s of size %ld: slips do no harm", task_names[task],
                   size);
        }
}

// Near misses and cheats: whether they are right, and well-formed.
static void test_judge(void)
{
#define SAID(answer) "<think></think><answer>" answer "</answer>"
    static const struct {
        int task;
        const char *question, *answer;
        int right, formed;
    } cases[] = {
        {TASK_ADD, "347+586", SAID("933"), 1, 1},
        {TASK_ADD, "347+586", "<think>7+6=13 > 9\t</think><answer>933</answer>", 1, 1},
        {TASK_ADD, "347+586", "", 0, 0}, {TASK_ADD, "347+586", "933", 0, 0},
        {TASK_ADD, "347+586", "347+586", 0, 0}, {TASK_ADD, "347+586", SAID("347+586"), 0, 1},
        {TASK_ADD, "347+586", SAID("932"), 0, 1}, {TASK_ADD, "347+586", SAID("93"), 0, 1},
        {TASK_ADD, "347+586", SAID("9333"), 0, 1}, {TASK_ADD, "347+586", SAID("0933"), 0, 1},
        {TASK_ADD, "347+586", SAID(" 933"), 0, 1}, {TASK_ADD, "347+586", SAID("933 "), 0, 1},
        {TASK_ADD, "347+586", SAID("9 33"), 0, 1}, {TASK_ADD, "347+586", SAID("+933"), 0, 1},
        {TASK_ADD, "347+586", SAID("-933"), 0, 1}, {TASK_ADD, "347+586", SAID("933.0"), 0, 1},
        {TASK_ADD, "347+586", SAID("932 933"), 0, 1}, {TASK_ADD, "347+586", SAID("=933"), 0, 1},
        {TASK_ADD, "347+586", SAID(""), 0, 0}, // says nothing
        {TASK_ADD, "347+586", SAID("933") SAID("933"), 0, 0}, // everything twice
        {TASK_ADD, "347+586", SAID("932") "<answer>933</answer>", 0, 0},
        {TASK_ADD, "347+586", SAID("933") "<answer>933</answer>", 0, 0},
        {TASK_ADD, "347+586", SAID("<answer>933</answer>"), 0, 0}, // in each other
        {TASK_ADD, "347+586", SAID("<think></think>933"), 0, 0},
        {TASK_ADD, "347+586", "<think><think></think></think><answer>933</answer>", 0, 0},
        {TASK_ADD, "347+586", "<think><answer>933</answer></think><answer>933</answer>", 0, 0},
        {TASK_ADD, "347+586", "<think><answer>933</answer></think>", 0, 0},
        {TASK_ADD, "347+586", "<think></think>" SAID("933"), 0, 0},
        {TASK_ADD, "347+586", "<answer>933</answer><think></think>", 0, 0}, // the wrong way round
        {TASK_ADD, "347+586", "</think><think><answer>933</answer>", 0, 0},
        {TASK_ADD, "347+586", "<answer>933</answer>", 0, 0}, // something missing
        {TASK_ADD, "347+586", "<think></think>933", 0, 0},
        {TASK_ADD, "347+586", "<think></think><answer>933", 0, 0},
        {TASK_ADD, "347+586", "<think></think><answer>933</answer", 0, 0},
        {TASK_ADD, "347+586", "<think></think>933</answer>", 0, 0},
        {TASK_ADD, "347+586", "<think><answer>933</answer>", 0, 0},
        {TASK_ADD, "347+586", "</think><answer>933</answer>", 0, 0},
        {TASK_ADD, "347+586", " " SAID("933"), 0, 0}, // something around it
        {TASK_ADD, "347+586", "933" SAID("933"), 0, 0},
        {TASK_ADD, "347+586", SAID("933") "933", 0, 0},
        {TASK_ADD, "347+586", SAID("933") " ", 0, 0},
        {TASK_ADD, "347+586", SAID("933") "</answer>", 0, 0},
        {TASK_ADD, "347+586", "<think></think> <answer>933</answer>", 0, 0},
        {TASK_ADD, "347+586", "<think ></think><answer>933</answer>", 0, 0},
        {TASK_ADD, "347+586", "<THINK></THINK><ANSWER>933</ANSWER>", 0, 0},
        {TASK_ADD, "347+586", "<think>4<5</think><answer>933</answer>", 0, 0},
        {TASK_ADD, "0+0", SAID("0"), 1, 1}, {TASK_ADD, "0+0", SAID("00"), 0, 1},
        {TASK_ADD, "99999999+99999999", SAID("199999998"), 1, 1},
        {TASK_MUL, "23*45", SAID("1035"), 1, 1}, {TASK_MUL, "23*45", SAID("68"), 0, 1},
        {TASK_MUL, "23*45", SAID("23*45"), 0, 1}, {TASK_MUL, "0*7", SAID("0"), 1, 1},
        {TASK_MUL, "9999*9999", SAID("99980001"), 1, 1},
        {TASK_SORT, "5,31,8", SAID("5,8,31"), 1, 1}, {TASK_SORT, "5,31,8", SAID("31,8,5"), 0, 1},
        {TASK_SORT, "5,31,8", SAID("5,31,8"), 0, 1}, {TASK_SORT, "5,31,8", SAID("5,8"), 0, 1},
        {TASK_SORT, "5,31,8", SAID("31,5,8"), 0, 1}, // as texts are sorted
        {TASK_SORT, "5,31,8", SAID("5,8,31,31"), 0, 1},
        {TASK_SORT, "5,31,8", SAID("5,8,31,"), 0, 1}, {TASK_SORT, "5,31,8", SAID("5 8 31"), 0, 1},
        {TASK_SORT, "5,31,8", SAID("5, 8,31"), 0, 1},
        {TASK_SORT, "5,31,8", SAID("05,8,31"), 0, 1}, {TASK_SORT, "7,7,3", SAID("3,7,7"), 1, 1},
        {TASK_SORT, "7,7,3", SAID("3,7"), 0, 1}, {TASK_SORT, "42", SAID("42"), 1, 1},
        {TASK_COLUMNS, "t:k48e.t76k.e35;", SAID("t3k3e9;0"), 1, 1}, // 347+586
        {TASK_COLUMNS, "t:k48e.t76k.e35;", SAID("t3k3e9"), 0, 1},
        {TASK_COLUMNS, "t:k48e.t76k.e35;", SAID("t3k3e9;1"), 0, 1},
        {TASK_COLUMNS, "t:k48e.t76k.e35;", SAID("t3k3e8;0"), 0, 1},
        {TASK_COLUMNS, "t:k48e.t76k.e35;", SAID("t3k3k3e9;0"), 0, 1}, // said again
        {TASK_COLUMNS, "t:k48e.t76k.e35;", SAID("k3t3e9;0"), 0, 1},
        {TASK_COLUMNS, "t:k48e.t76k.e35;", SAID("933"), 0, 1},
        {TASK_COLUMNS, "t:k48e.t76k.e35;", SAID("t:k48e.t76k.e35;"), 0, 1},
        {TASK_COLUMNS, "x:x99;", SAID("x8;1"), 1, 1}, {TASK_COLUMNS, "x:x99;", SAID("x18;0"), 0, 1},
        {TASK_COUNTDOWN, "3,5,8=64", SAID("(3+5)*8"), 1, 1},
        {TASK_COUNTDOWN, "3,5,8=64", SAID("8*(5+3)"), 1, 1},
        {TASK_COUNTDOWN, "3,5,8=64", SAID("((3)+(5))*(8)"), 1, 1},
        {TASK_COUNTDOWN, "3,5,8=64", SAID("(((((((3+5)))))))*8"), 1, 1},
        {TASK_COUNTDOWN, "3,5,8=64", SAID("3+5*8"), 0, 1}, // is something else
        {TASK_COUNTDOWN, "3,5,8=64", SAID("64"), 0, 1}, // the target itself
        {TASK_COUNTDOWN, "3,5,8=64", SAID("8*8"), 0, 1}, // one twice
        {TASK_COUNTDOWN, "3,5,8=64", SAID("(3+5)*(3+5)"), 0, 1},
        {TASK_COUNTDOWN, "3,5,8=8", SAID("8"), 0, 1}, // some missing
        {TASK_COUNTDOWN, "3,5,8=8", SAID("3+5"), 0, 1},
        {TASK_COUNTDOWN, "3,5,8=64", SAID("(3+5)*8*1"), 0, 1}, // one too many
        {TASK_COUNTDOWN, "3,5,8=64", SAID("(3+5)*8+0"), 0, 1},
        {TASK_COUNTDOWN, "3,5,8=64", SAID("(3+5)*8+8-8"), 0, 1},
        {TASK_COUNTDOWN, "3,5,8=64", SAID("(3+5)*8=64"), 0, 1}, // something behind it
        {TASK_COUNTDOWN, "3,5,8=64", SAID("(3+5)*8)"), 0, 1},
        {TASK_COUNTDOWN, "3,5,8=64", SAID("(3+5)*8*"), 0, 1},
        {TASK_COUNTDOWN, "3,5,8=64", SAID("(3+5)*8 "), 0, 1},
        {TASK_COUNTDOWN, "3,5,8=64", SAID("((3+5)*8"), 0, 1},
        {TASK_COUNTDOWN, "3,5,8=64", SAID("(3 + 5)*8"), 0, 1},
        {TASK_COUNTDOWN, "3,5,8=64", SAID("(3+5)8"), 0, 1},
        {TASK_COUNTDOWN, "3,5,8=64", SAID("(3+05)*8"), 0, 1},
        {TASK_COUNTDOWN, "3,5,8=64", SAID("()"), 0, 1},
        {TASK_COUNTDOWN, "3,5,8=64", SAID("3,5,8=64"), 0, 1},
        {TASK_COUNTDOWN, "3,5,8=64", SAID("-(3+5)*(-8)"), 0, 1}, // signs
        {TASK_COUNTDOWN, "3,5,8=64", SAID("+(3+5)*8"), 0, 1},
        {TASK_COUNTDOWN, "3,5,8=64", SAID("8*(5--3)"), 0, 1},
        {TASK_COUNTDOWN, "3,5,8=0", SAID("8-5-3"), 1, 1}, // from the left
        {TASK_COUNTDOWN, "3,5,8=6", SAID("8-5-3"), 0, 1},
        {TASK_COUNTDOWN, "3,5,8=6", SAID("8-(5-3)"), 1, 1},
        {TASK_COUNTDOWN, "2,4,8=1", SAID("8/4/2"), 1, 1},
        {TASK_COUNTDOWN, "2,4,8=4", SAID("8/4*2"), 1, 1},
        {TASK_COUNTDOWN, "2,3=8", SAID("2**3"), 0, 1}, {TASK_COUNTDOWN, "2,3=8", SAID("2^3"), 0, 1},
        {TASK_COUNTDOWN, "1,2=12", SAID("12"), 0, 1}, // digits side by side
        {TASK_COUNTDOWN, "1,2,3=15", SAID("12+3"), 0, 1},
        {TASK_COUNTDOWN, "3,12=15", SAID("12+3"), 1, 1},
        {TASK_COUNTDOWN, "4,4=8", SAID("4+4"), 1, 1}, {TASK_COUNTDOWN, "4,4=4", SAID("4"), 0, 1},
        {TASK_COUNTDOWN, "3,3,8,8=24", SAID("8/(3-8/3)"), 1, 1}, // by way of fractions
        {TASK_COUNTDOWN, "1,5,5,5=24", SAID("5*(5-1/5)"), 1, 1},
        {TASK_COUNTDOWN, "3,3,8=8", SAID("8/3*3"), 1, 1},
        {TASK_COUNTDOWN, "2,7=3", SAID("7/2"), 0, 1}, // not what C makes of it
        {TASK_COUNTDOWN, "2,3,4,8=4", SAID("(2-3)*(4-8)"), 1, 1}, // and of numbers below 0
        {TASK_COUNTDOWN, "2,3,5,9=4", SAID("9+5/(2-3)"), 1, 1},
        {TASK_COUNTDOWN, "3,3,5=5", SAID("5+3-3"), 1, 1},
        {TASK_COUNTDOWN, "3,3,5=5", SAID("5/(3-3)"), 0, 1}, // nothing is divided by 0
        {TASK_COUNTDOWN, "3,3,5=0", SAID("5/(3-3)"), 0, 1},
        {TASK_COUNTDOWN, "3,3,5=0", SAID("(3-3)/5"), 1, 1},
        {TASK_COUNTDOWN, "2,2,3,3=0", SAID("(2-2)/(3-3)"), 0, 1},
        {TASK_COUNTDOWN, "1,3,3,5=1", SAID("1/(5/(3-3))"), 0, 1},
        {TASK_COUNTDOWN, "1,3,3,5=0", SAID("1/(5/(3-3))"), 0, 1},
    };
    Question q;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        REQUIRE(parse_question(&q, cases[i].task, cases[i].question), "%s", cases[i].question);
        Reward r = judge(&q, cases[i].answer);
        EXPECT(r.accuracy == cases[i].right && r.format == cases[i].formed,
               "%s %s: accuracy %g, format %g", cases[i].question, cases[i].answer, r.accuracy,
               r.format);
    }
    static char text[4 * LINE], many[2 * LINE + 1]; // what is longer than any line
    memset(many, '(', 2 * LINE);
    parse_question(&q, TASK_COUNTDOWN, "3,5=8");
    snprintf(text, sizeof text, SAID("%.500s3+5"), many);
    EXPECT(judge(&q, text).accuracy == 0 && judge(&q, text).format == 1, "500 parentheses");
    snprintf(text, sizeof text, SAID("%s"), many);
    EXPECT(judge(&q, text).accuracy == 0 && judge(&q, text).format == 0, "too long an answer");
    snprintf(text, sizeof text, "<think>%s</think><answer>3+5</answer>", many);
    EXPECT(judge(&q, text).accuracy == 1 && judge(&q, text).format == 1, "long thoughts");
    snprintf(remark, sizeof remark, "%zu answers", sizeof cases / sizeof *cases + 3);
}

// A prompt is "\nquestion\t"; an answer is what follows up to its end, and no text without one.
static void test_rollout_answer(void)
{
    static const struct {
        const char *answer;
        size_t length;  // of it, END not counted
        int ended;
        const char *expected;
    } cases[] = {
        {"12", 2, 1, "12"}, {"12", 2, 0, ""}, {"", 0, 1, ""}, {"1", 1, 0, ""},
        {"1\0" "2", 3, 1, ""}, {"\0" "12", 3, 1, ""}, {"12\0", 3, 1, ""}, {"1\t2", 3, 1, "1\t2"},
        {"\xC3\xA9", 2, 1, "\xC3\xA9"},
    };
    enum { MOST = LINE + 20 };
    static char answer[LINE];
    Line question = {0, ""};
    put(&question, "3+4");
    for (size_t i = 0; i < sizeof cases / sizeof *cases + 2; i++) {
        Rollout r = rollout_make(2, MOST, MOST);
        int is_long = i >= sizeof cases / sizeof *cases;
        size_t length = is_long ? LINE - i % 2 : cases[i].length, n = 0;
        EXPECT(!rollout_ask(&r, 1, &question, 256), "a question is refused");
        EXPECT(rollout_ask(&r, 0, &question, '3'), "a byte outside the vocabulary is taken");
        for (size_t t = 0; t < 5; t++)
            EXPECT(r.text[MOST + t] == "\n3+4\t"[t], "token %zu of the prompt is %d", t,
                   r.text[MOST + t]);
        EXPECT(r.prompt[1] == 5 && r.length[1] == 5, "the prompt has %zu tokens", r.prompt[1]);
        for (size_t t = 0; t < length; t++)
            r.text[MOST + 5 + t] = is_long ? 'x' : (unsigned char)cases[i].answer[t];
        r.length[1] = 5 + length;
        if (is_long || cases[i].ended) r.text[MOST + r.length[1]++] = END;
        if (i == 0) { // where the vocabulary is larger: no byte, and no part of a text
            r.text[MOST + 5] += 256;
            rollout_answer(answer, &r, 1);
            EXPECT(!*answer, "a token of 256 and more became '%s'", answer);
            r.text[MOST + 5] -= 256;
        }
        memset(answer, 'y', sizeof answer);
        rollout_answer(answer, &r, 1);
        while (is_long && n < LINE && answer[n] == 'x') n++;
        if (is_long) {
            EXPECT(n == (length < LINE ? length : 0) && !answer[n], "%zu of %zu", n, length);
        } else {
            EXPECT(!strcmp(answer, cases[i].expected), "case %zu: '%s'", i, answer);
        }
        rollout_free(&r);
    }
}

// ------------------------------------------------------------------------------------------------
// Running the program

static char directory[200]; // of all files that tests make

static char *in_path(const char *path, const char *name)
{
    Path joined = path_join(path, name);
    return strcpy((char *)room(strlen(joined.text) + 1, 1), joined.text);
}

static char *in_directory(const char *name) { return in_path(directory, name); }

static char *file_text(const char *path, size_t *n)
{
    return (char *)keep(read_file(path, n, 1 << 24));
}

typedef struct {
    int status; // exit status, or minus the signal that ended it
    char *out, *err;
} Ran;

static size_t file_limit;   // bytes that the program may write to a file, 0: any number
static int obeys_modes;     // whether files' modes bind it even if it is root's
enum { CANNOT_OBEY = 98 };  // exit status where that cannot be had

#define ARGS(...) (const char *const[]){__VA_ARGS__, NULL}

static const char *moe_program(void) { return getenv("MOE") ? getenv("MOE") : "./moe"; }

static pid_t start_moe(const char *const *args)
{
    char *out = in_directory("stdout"), *err = in_directory("stderr"), *argv[60] = {(char *)"moe"};
    for (size_t i = 0; args[i]; i++) argv[i + 1] = (char *)args[i];
    remove(out);
    fflush(stdout);
    pid_t child = fork();
    if (child != 0) return child;
    alarm(300); // whatever happens
    signal(SIGHUP, SIG_DFL); // which nohup would have ignored
    struct rlimit limit = {file_limit, file_limit};
#ifdef __linux__
    int root = geteuid() == 0 && prctl(PR_CAPBSET_DROP, 1, 0, 0, 0); // 1: CAP_DAC_OVERRIDE
#else
    int root = geteuid() == 0;
#endif
    if (obeys_modes && root) _exit(CANNOT_OBEY);
    if (freopen("/dev/null", "r", stdin) && freopen(out, "w", stdout) &&
        freopen(err, "w", stderr) && !(file_limit && setrlimit(RLIMIT_FSIZE, &limit)))
        execv(moe_program(), argv);
    _exit(99);
}

static Ran end_moe(pid_t child)
{
    Ran r = {-1, NULL, NULL};
    int status = 0;
    size_t n;
    if (child > 0 && waitpid(child, &status, 0) == child)
        r.status = WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
    r.out = file_text(in_directory("stdout"), &n);
    r.err = file_text(in_directory("stderr"), &n);
    return r;
}

static Ran run_moe(const char *const *args) { return end_moe(start_moe(args)); }

static const char *joined(const char *const *args)
{
    static char text[500];
    *text = 0;
    for (size_t n = 0; *args; args++, n = strlen(text))
        snprintf(text + n, sizeof text - n, " %s", *args);
    return text;
}

// The program must end with this status and one line that begins "moe: " and says this.
static void expect_error(int status, const char *says, const char *const *args)
{
    Ran r = run_moe(args);
    char *end = strchr(r.err, '\n');
    EXPECT(r.status == status, "moe%s: expected exit status %d, got %d (%s)", joined(args), status,
           r.status, r.err);
    EXPECT(!strncmp(r.err, "moe: ", 5) && end && !end[1], "moe%s: expected one line 'moe: ...', "
           "got '%s'", joined(args), r.err);
    EXPECT(strstr(r.err, says), "moe%s: expected '%s', got '%s'", joined(args), says, r.err);
}

static Ran expect_success(const char *const *args)
{
    Ran r = run_moe(args);
    EXPECT(r.status == 0, "moe%s: exit status %d (%s)", joined(args), r.status, r.err);
    return r;
}

static void write_file(const char *path, const void *data, size_t n)
{
    FILE *f = fopen(path, "wb");
    if (!f || fwrite(data, 1, n, f) != n || fclose(f)) die(FAILED, "%s: cannot write", path);
}

static void write_text(const char *path, const char *text) { write_file(path, text, strlen(text)); }

static void remove_all(const char *path)
{
    DIR *d = opendir(path);
    struct dirent *entry;
    while (d && (entry = readdir(d)))
        if (strcmp(entry->d_name, ".") && strcmp(entry->d_name, ".."))
            remove_all(path_join(path, entry->d_name).text);
    if (d) closedir(d);
    remove(path);
}

// ------------------------------------------------------------------------------------------------
// Files

// text with the first `from` replaced by `to`.
static char *replaced(const char *text, const char *from, const char *to)
{
    const char *at = strstr(text, from);
    size_t n = strlen(text) + strlen(to) + 1;
    char *result = (char *)room(n, 1);
    if (!at) fail("no '%s' to replace in %.300s", from, text);
    else snprintf(result, n, "%.*s%s%s", (int)(at - text), text, to, at + strlen(from));
    return result;
}

static void test_json(void)
{
    const char *source = "\t{\"a\": -0.5e+2, \"b\" :[0, 1E3,-0.0 , 12345678901234567890, 3.25e-2],"
        "\r\n\"s\":\"q\\\"\\\\\\/\\b\\f\\n\\r\\t\\u0041\\u00e9\\u20AC\\ud83d\\uDE00\","
        "\"\\u0061b\":\"\xC3\xA9\xE2\x82\xAC\xF0\x9F\x98\x80\", \"n\":null,\"t\":true,\"f\":false,"
        "\"o\":{},\"e\":[ ],\"o2\":{\"x\":{\"y\":[[1,2],{\"z\":\"\"}]}}} \n";
    char *text = (char *)room(strlen(source) + 1, 1);
    memcpy(text, source, strlen(source));
    Json *j = json_parse("test", text, strlen(source));
    static const double numbers[] = {0, 1000, -0.0, 12345678901234567890.0, 0.0325};
    EXPECT(j->length == 10, "expected 10 keys, got %zu", j->length);
    EXPECT(json_get(j, "a")->number == -50, "a is %g", json_get(j, "a")->number);
    const Json *b = json_get(j, "b"), *item = b->child;
    EXPECT(b->type == JSON_ARRAY && b->length == 5, "b has %zu elements", b->length);
    for (size_t i = 0; i < 5 && item; i++, item = item->next)
        EXPECT(item->type == JSON_NUMBER && item->number == numbers[i], "number %zu is %.17g", i,
               item->number);
    const char *s = json_get(j, "s")->string;
    const char *ab = json_get(j, "ab") ? json_get(j, "ab")->string : "";
    EXPECT(!strcmp(s, "q\"\\/\b\f\n\r\tA\xC3\xA9\xE2\x82\xAC\xF0\x9F\x98\x80"), "escapes: '%s'", s);
    EXPECT(!strcmp(ab, "\xC3\xA9\xE2\x82\xAC\xF0\x9F\x98\x80"), "UTF-8 became '%s'", ab);
    EXPECT(json_get(j, "n")->type == JSON_NULL && json_get(j, "t")->type == JSON_TRUE &&
           json_get(j, "f")->type == JSON_FALSE, "null, true, false");
    EXPECT(json_get(j, "o")->type == JSON_OBJECT && !json_get(j, "o")->child &&
           !json_get(j, "e")->child, "empty ones are not empty");
    const Json *y = json_get(json_get(json_get(j, "o2"), "x"), "y");
    EXPECT(y->child->child->next->number == 2 && !*json_get(y->child->next, "z")->string,
           "nested values");
    EXPECT(!json_get(j, "x"), "found a key that is deeper");
    free(j);
}

// A model of every kind of tensor, saved in `name`.
static char *saved_model(const char *name)
{
    Config c = small_config();
    c.V = 256, c.Tmax = 16;
    Model m = random_model(&c, 0, 61);
    char *path = in_directory(name);
    model_save(&m, path);
    model_free(&m);
    return path;
}

static void test_save_load(void)
{
    Config c = small_config();
    c.yarn_factor = 40, c.yarn_original = 4096, c.yarn_fast = 32, c.yarn_slow = 1;
    c.yarn_mscale = 1, c.yarn_mscale_all_dim = 0.707, c.theta = 12345.678, c.norm_topk = 0;
    for (int variant = 0; variant < 2; variant++) {
        if (variant) {
            c.Rq = c.S = c.D = 0, c.yarn_factor = c.yarn_original = c.yarn_fast = c.yarn_slow = 0;
            c.yarn_mscale = c.yarn_mscale_all_dim = 0;
        }
        Model m = random_model(&c, 0, 62);
        char *path = in_directory("deep/er/saved");
        model_save(&m, path); // the second time over the first
        EXPECT(access(in_path(path, "model.safetensors.tmp"), F_OK), "a .tmp was left");
        Model n = model_load(path, 0);
#define SAME(symbol, key, ...) \
        EXPECT(n.config.symbol == c.symbol, #key " came back as %g", (double)n.config.symbol);
        CONFIG_SIZES(SAME)
        CONFIG_REALS(SAME)
        CONFIG_YARN(SAME)
        EXPECT(!memcmp(m.weights, n.weights, m.layout.elements * sizeof(real)),
               "weights came back others");
        model_free(&m);
        model_free(&n);
    }
}

// The value of a floating-point code with so many bits of exponent and mantissa.
static double decoded(uint32_t code, int exponent_bits, int mantissa_bits)
{
    int exponent = (int)(code >> mantissa_bits) & ((1 << exponent_bits) - 1);
    int bias = (1 << (exponent_bits - 1)) - 1;
    double mantissa = (double)(code & ((1u << mantissa_bits) - 1)) / (double)(1u << mantissa_bits);
    double x = exponent ? ldexp(1 + mantissa, exponent - bias) : ldexp(mantissa, 1 - bias);
    return code >> (exponent_bits + mantissa_bits) & 1 ? -x : x;
}

// A safetensors file in its parts.
typedef struct {
    char *header, *data;
    size_t n; // bytes of data
} Parts;

static void write_parts(const char *path, const char *name, Parts p)
{
    size_t length = strlen(p.header);
    char *whole = (char *)room(8 + length + p.n, 1);
    for (int i = 0; i < 8; i++) whole[i] = (char)(length >> 8 * i);
    memcpy(whole + 8, p.header, length);
    memcpy(whole + 8 + length, p.data, p.n);
    write_file(in_path(path, name), whole, 8 + length + p.n);
}

static Parts read_parts(const char *path, const char *name)
{
    size_t n, length = 0;
    char *whole = file_text(in_path(path, name), &n);
    for (int i = 0; i < 8; i++) length |= (size_t)(unsigned char)whole[i] << 8 * i;
    Parts p = {(char *)room(length + 1, 1), whole + 8 + length, n - 8 - length};
    memcpy(p.header, whole + 8, length);
    return p;
}

static Entry *list_entries(const Layout *layout, const accum *data, const char *prefix, size_t *n)
{
    *n = count_entries(layout);
    Entry *e = (Entry *)room(*n, sizeof(Entry));
    entries_add(e, layout, prefix, data, NULL);
    return e;
}

// Writes random codes as the model's tensors, dealt out to so many shards, with an index if there
// are several, and as released files have it a copy of the embedding or frequencies. expected: what
// the codes mean.
static void write_codes(const Model *m, const char *path, int dtype, size_t shards, real *expected)
{
    static const int exponent_bits[] = {8, 8, 5}, mantissa_bits[] = {23, 7, 10};
    const int M = mantissa_bits[dtype], bits = exponent_bits[dtype] + M;
    size_t n, bytes = dtypes[dtype].size, mapped = 0;
    Entry *e = list_entries(&m->layout, m->weights, "", &n);
    char *index = (char *)room(1 << 16, 1), file[64];
    make_directory(path);
    config_save(&m->config, path);
#define APPEND(to, n, ...) n += (size_t)sprintf(to + n, __VA_ARGS__)
    APPEND(index, mapped, "{\"metadata\":{\"total_size\":0},\"weight_map\":{");
    for (size_t s = 0; s < shards; s++) {
        Parts p = {(char *)room(1 << 16, 1), (char *)room(m->layout.elements + 16, bytes),
                   2 * bytes};
        size_t length = 0;
        snprintf(file, sizeof file, "model-%05zu-of-%05zu.safetensors", s + 1, shards);
        const char *more = s ? "0.self_attn.rotary_emb.inv_freq" : "3.embed_tokens.weight";
        if (s == 2) more = "3.shared_head.head.weight";
        APPEND(p.header, length, "{\"model.layers.%s\":{\"dtype\":\"%s\",\"shape\":[2],"
               "\"data_offsets\":[0,%zu]}", more, dtypes[dtype].name, p.n);
        APPEND(index, mapped, "%s\"model.layers.%s\":\"%s\"", s ? "," : "", more, file);
        for (size_t i = s; i < n; i += shards) {
            size_t size = entry_size(&e[i]);
            APPEND(index, mapped, ",\"%s\":\"%s\"", e[i].name, file);
            APPEND(p.header, length, ",\"%s\":{\"dtype\":\"%s\",\"shape\":[%zu", e[i].name,
                   dtypes[dtype].name, e[i].shape[0]);
            if (e[i].dims == 2) APPEND(p.header, length, ",%zu", e[i].shape[1]);
            APPEND(p.header, length, "],\"data_offsets\":[%zu,%zu]}", p.n, p.n + size * bytes);
            for (size_t j = 0; j < size; j++, p.n += bytes) {
                uint32_t code = (uint32_t)random_u64((uint64_t)dtype, i, j) >> (31 - bits);
                code &= ~(1u << (bits - 1));                     // not infinite
                if (j == 0) code = 1;                            // the least
                if (j == 1) code = (1u << bits) - 1 - (1u << M); // the most
                for (size_t k = 0; k < bytes; k++) p.data[p.n + k] = (char)(code >> 8 * k);
                expected[(size_t)(e[i].data - m->weights) + j] =
                    (real)decoded(code, exponent_bits[dtype], M);
            }
        }
        APPEND(p.header, length, "}");
        write_parts(path, shards > 1 ? file : "model.safetensors", p);
    }
    APPEND(index, mapped, "}}");
    if (shards > 1) write_text(in_path(path, "model.safetensors.index.json"), index);
}

static void test_load_dtypes_shards(void)
{
    Config c = small_config();
    Model m = model_make(&c, 0);
    for (int dtype = 0; dtype < F8_E4M3; dtype++)
        for (size_t shards = 1; shards <= 3; shards++) {
            char *path = in_directory(label("codes-%d-%zu", dtype, shards));
            real *expected = reals(m.layout.elements);
            write_codes(&m, path, dtype, shards, expected);
            Model n = model_load(path, 0);
            size_t i = 0;
            while (i < m.layout.elements && n.weights[i] == expected[i]) i++;
            EXPECT(i == m.layout.elements, "%s, %zu shards: number %zu: expected %.9g, got %.9g",
                   dtypes[dtype].name, shards, i, expected[i], n.weights[i]);
            model_free(&n);
        }
    static const struct {
        uint16_t half;
        float value;
    } known[] = {{0x3C00, 1}, {0xC000, -2}, {0x7BFF, 65504}, {0x0001, 0x1p-24f}, {0x8000, 0},
                 {0x03FF, 0x3FFp-24f}, {0x0400, 0x1p-14f}, {0x3555, 0.333251953125f}};
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        EXPECT(number_decode(F16, known[i].half) == known[i].value, "half %04x is %.9g",
               known[i].half, number_decode(F16, known[i].half));
    EXPECT(isnan(number_decode(F16, 0xFC00)) && isnan(number_decode(F16, 0x7E00)),
           "half's infinity and NaN");
    model_free(&m);
}

// Loading trusts nothing. Each file is the good one with one thing wrong.
static void test_damaged_weights(void)
{
    char *good = saved_model("good"), *bad = saved_model("bad"), end[80], more[100];
    char *path = in_path(bad, "model.safetensors");
    char *index = in_path(bad, "model.safetensors.index.json");
    char *text = in_directory("text");
    const char *const *eval = ARGS("eval", "--model", bad, "--data", text);
    write_text(text, "What is aught, but as 'tis valued?\n");
    Parts whole = read_parts(good, "model.safetensors");
    snprintf(end, sizeof end, ",%zu]}}", whole.n);
    snprintf(more, sizeof more, ",%zu]},\"more\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":"
             "[%zu,%zu]}}", whole.n, whole.n, whole.n + 4);
#define NORM_IS(dtype_shape) "\"model.norm.weight\":{" dtype_shape "\"data_offsets\":"
    static const char norm[] = NORM_IS("\"dtype\":\"F32\",\"shape\":[13],");
    const struct {
        const char *from, *to; // in the header
        size_t more;           // bytes of data after it
        const char *says;
    } cases[] = {
        {"{\"__metadata__\"", "  {\"__metadata__\"", 0, NULL}, // nothing wrong
        {"model.norm.weight", "model.morn.weight", 0, "model.norm.weight: is missing"},
        {"model.norm.weight", "model.embed_tokens.weight", 0, "appears twice"},
        {end, more, 4, "more: config.json has no place for it"},
        {"", "", 4, "leaves a gap"},
        {"{", "[", 0, "not valid JSON"},
        {norm, NORM_IS("\"dtype\":\"F32\",\"shape\":[12],"), 0, "its shape needs 48"},
        {norm, NORM_IS("\"dtype\":\"F64\",\"shape\":[13],"), 0, "dtype F64"},
        {norm, NORM_IS("\"dtype\":7,\"shape\":[13],"), 0, "needs a dtype"},
        {norm, NORM_IS("\"shape\":[13],"), 0, "needs a dtype"},
        {norm, "\"model.norm.weight\":[],\"x\":{\"data_offsets\":", 0, "needs a dtype"},
        {norm, NORM_IS("\"dtype\":\"F32\",\"shape\":[],"), 0, "0 dimensions"},
        {norm, NORM_IS("\"dtype\":\"F32\",\"shape\":[1,1,1,13],"), 0, "4 dimensions"},
        {norm, NORM_IS("\"dtype\":\"F32\",\"shape\":[1,1,13],"), 0, "has shape [1,1,13]"},
        {norm, NORM_IS("\"dtype\":\"F32\",\"shape\":[13,1],"), 0, "model.norm.weight"},
        {norm, NORM_IS("\"dtype\":\"F32\",\"shape\":[-13],"), 0, "whole numbers"},
        {norm, NORM_IS("\"dtype\":\"F32\",\"shape\":[13.5],"), 0, "whole numbers"},
        {norm, NORM_IS("\"dtype\":\"F32\",\"shape\":[9e15,9e15],"), 0, "its shape needs"},
        {norm, NORM_IS("\"dtype\":\"F32\",\"shape\":[9007199254740993],"), 0, "whole numbers"},
        {"model.norm.weight", "model.norm.weight\\u000a", 0, "model.norm.weight"},
        {"\"shape\":[256,13]", "\"shape\":[13,256]", 0, "model.embed_tokens.weight"},
        {"[0,13312]", "[4,13316]", 0, "overlaps or leaves a gap"},
        {"[0,13312]", "[13312,0]", 0, "its offsets are [13312, 0]"},
        {"[0,13312]", "[0,13312,0]", 0, "two data_offsets"},
        {"[0,13312]", "[9000000000000,9000000013312]", 0, "the file has"},
        {"[0,13312]", "[1e300,1e300]", 0, "whole numbers"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        Parts p = {replaced(whole.header, cases[i].from, cases[i].to),
                   (char *)room(whole.n + 4, 1), whole.n + cases[i].more};
        memcpy(p.data, whole.data, whole.n);
        write_parts(bad, "model.safetensors", p);
        if (cases[i].says) expect_error(2, cases[i].says, eval);
        else expect_success(eval);
    }
    for (int value = 0; value < 2; value++) { // NaN, -infinity
        Parts p = read_parts(good, "model.safetensors");
        memcpy(p.data + 8, value ? "\0\0\x80\xFF" : "\1\0\xC0\x7F", 4);
        write_parts(bad, "model.safetensors", p);
        expect_error(2, "model.embed_tokens.weight: element 2 is not a finite number", eval);
    }
    size_t n;
    char *bytes = file_text(in_path(good, "model.safetensors"), &n);
    const size_t cut[] = {0, 7, 8, 100, n / 2, n - 1};
    for (size_t i = 0; i < sizeof cut / sizeof *cut; i++) {
        write_file(path, bytes, cut[i]);
        expect_error(2, bad, eval);
    }
    for (int i = 0; i < 8; i++) bytes[i] = (char)((n - 7) >> 8 * i); // a byte too long a header
    write_file(path, bytes, n);
    expect_error(2, "a header of", eval);
    bytes[7] = 0x7F; // and one of 2^62 bytes
    write_file(path, bytes, n);
    expect_error(2, "a header of", eval);
    remove(path);
    expect_error(2, "model.safetensors: cannot open", eval);
    make_directory(path);
    expect_error(2, "not a regular file", eval);
    remove(path);

    char *map = (char *)room(1 << 16, 1);
    size_t length = 0;
    Json *header = json_parse(good, strcpy((char *)room(strlen(whole.header) + 1, 1), whole.header),
                              strlen(whole.header));
    for (const Json *j = header->child->next; j; j = j->next) // after __metadata__
        APPEND(map, length, "%s\"%s\":\"part\"", length ? ",\n" : "{", j->key);
    free(header);
    static const char *const maps[][3] = { // from, to, message
        {"", "", NULL},
        {":\"part\"", ":\"gone\"", "gone: cannot open"},
        {":\"part\"", ":\"../bad/part\"", "in the same directory"},
        {":\"part\"", ":\".\"", "not a regular file"},
        {":\"part\"", ":1", "must name a file"},
        {":\"part\"", ":\"config.json\"", "config.json: not a safetensors file"},
        {"model.norm.weight", "nothing", "nothing: is not in part"},
        {"\"model.norm.weight\":\"part\",", "", "model.norm.weight: is missing"},
        {"\"model.norm.weight\"", "\"lm_head.weight\"", "appears twice"},
    };
    static const char *const no_maps[][2] = {
        {"{\"weight_map\":{}}", "has no weight_map"}, {"{\"weight_map\":0}", "has no weight_map"},
        {"{}", "has no weight_map"}, {"", "not valid JSON"}, {"[]", "expected a JSON object"},
    };
    write_parts(bad, "part", whole);
    for (size_t i = 0; i < sizeof maps / sizeof *maps; i++) {
        write_text(index, replaced("{\"weight_map\":X}}", "X",
                                   replaced(map, maps[i][0], maps[i][1])));
        if (maps[i][2]) expect_error(2, maps[i][2], eval);
        else expect_success(eval);
    }
    for (size_t i = 0; i < sizeof no_maps / sizeof *no_maps; i++) {
        write_text(index, no_maps[i][0]);
        expect_error(2, no_maps[i][1], eval);
    }
    write_parts(bad, "model.safetensors", whole); // goes before an index, as in transformers
    expect_success(eval);
    remove(path);
    REQUIRE(!mkfifo(path, 0600), "no pipe: %s", strerror(errno));
    expect_error(2, "not a regular file", eval);
}

// Released FP8 weights: matrices in E4M3 with a scale for each block of 128 x 128.
static void test_load_fp8(void)
{
    Config c = small_config();
    c.V = 256, c.C = 130, c.F = 257, c.Tmax = 16, c.L = 2, c.D = 0;
    Model m = random_model(&c, 0, 63);
    char *path = in_directory("fp8"), *config = in_path(path, "config.json");
    size_t n, at = 0, length = 1, text_length;
    Entry *e = list_entries(&m.layout, m.weights, "", &n);
    Parts p = {(char *)room(1 << 16, 1), (char *)room(2 * m.layout.elements, 4), 0};
    real *expected = reals(m.layout.elements);
    *p.header = '{';
    for (size_t i = 0; i < n; i++) {
        real *to = expected + (e[i].data - m.weights);
        size_t size = entry_size(&e[i]), cols = e[i].shape[1], across = (cols + 127) / 128;
        size_t down = (e[i].shape[0] + 127) / 128;
        if (e[i].dims == 1) {
            memcpy(p.data + at, e[i].data, 4 * size);
            memcpy(to, e[i].data, 4 * size);
            APPEND(p.header, length, "\"%s\":{\"dtype\":\"F32\",\"shape\":[%zu],\"data_offsets\":"
                   "[%zu,%zu]},", e[i].name, size, at, at + 4 * size);
            at += 4 * size;
            continue;
        }
        APPEND(p.header, length, "\"%s\":{\"dtype\":\"F8_E4M3\",\"shape\":[%zu,%zu],"
               "\"data_offsets\":[%zu,%zu]},\"%s_scale_inv\":{\"dtype\":\"F32\","
               "\"shape\":[%zu,%zu],\"data_offsets\":[%zu,%zu]},", e[i].name,
               e[i].shape[0], cols, at, at + size, e[i].name, down, across, at + size,
               at + size + 4 * down * across);
        float *scale = (float *)room(down * across, sizeof(float));
        for (size_t j = 0; j < down * across; j++)
            scale[j] = (float)(1e-3 * (0.5 + random_uniform(7, i, j)));
        for (size_t j = 0; j < size; j++) {
            unsigned code = (unsigned)(j < 256 ? j : random_u64(8, i, j) & 255);
            if ((code & 127) == 127) code = 126; // 448; 127 is NaN
            p.data[at + j] = (char)code;
            to[j] = (float)decoded(code, 4, 3) * scale[j / cols / 128 * across + j % cols / 128];
        }
        memcpy(p.data + at + size, scale, 4 * down * across);
        at += size + 4 * down * across;
    }
    p.header[length - 1] = '}';
    p.n = at;
    make_directory(path);
    config_save(&c, path);
    write_parts(path, "model.safetensors", p);
    char *plain = file_text(config, &text_length);
#define QUANTIZED(method, block) \
    replaced(plain, "{", "{\"quantization_config\":{\"activation_scheme\":\"dynamic\"," \
             "\"fmt\":\"e4m3\",\"quant_method\":\"" method "\",\"weight_block_size\":" block "},")
    write_text(config, QUANTIZED("fp8", "[128,128]"));
    Model loaded = model_load(path, 0);
    for (size_t i = 0; i < m.layout.elements; i++)
        EXPECT(loaded.weights[i] == expected[i], "number %zu: expected %.9g, got %.9g", i,
               expected[i], loaded.weights[i]);
    const char *const *eval = ARGS("eval", "--model", path, "--data", excerpt);
    write_text(config, QUANTIZED("fp8", "[64,128]"));
    expect_error(2, "weight_block_size must be [128, 128]", eval);
    write_text(config, QUANTIZED("awq", "[128,128]"));
    expect_error(2, "quant_method is awq", eval);
    write_text(config, replaced(plain, "{", "{\"quantization_config\":1,"));
    expect_error(2, "quantization_config must be an object", eval);
    write_text(config, plain);
    static const char *const cases[][3] = { // from, to, message
        {"embed_tokens.weight_scale_inv", "embed_tokens.weight_scale",
         "embed_tokens.weight_scale_inv: is missing"},
        {"\"F32\",\"shape\":[2,2]", "\"F32\",\"shape\":[4,1]", "has shape [4,1], expected [2,2]"},
        {"\"F32\",\"shape\":[2,2]", "\"BF16\",\"shape\":[2,4]", "expected [2,2]"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        Parts other = p;
        other.header = replaced(p.header, cases[i][0], cases[i][1]);
        write_parts(path, "model.safetensors", other);
        expect_error(2, cases[i][2], eval);
    }
    for (int sign = 0; sign < 2; sign++) { // the embedding comes first
        p.data[3] = (char)(sign ? 0xFF : 0x7F);
        write_parts(path, "model.safetensors", p);
        expect_error(2, "model.embed_tokens.weight: element 3 is not a finite number", eval);
    }
    p.data[3] = 0;
    memcpy(p.data + c.V * c.C + 4, "\0\0\x80\x7F", 4);
    write_parts(path, "model.safetensors", p);
    expect_error(2, "weight_scale_inv: element 1 is not a finite number", eval);
    model_free(&loaded);
    model_free(&m);
}

// Where the angles stand in a config.json does not matter.
static void test_rope_parameters(void)
{
    static const char *const same[][2] = { // rope_scaling beside a rope_theta, rope_parameters
        {"null", "{\"rope_type\": \"default\", \"rope_theta\": 5e4}"},
        {"{\"type\": \"yarn\", \"factor\": 40, \"beta_fast\": 31}",
         "{\"rope_type\": \"yarn\", \"factor\": 40, \"beta_fast\": 31, \"rope_theta\": 5e4}"},
    };
    Config c = small_config();
    char *path = in_directory("config.json");
    size_t n;
    c.theta = 5e4;
    for (size_t i = 0; i < 2; i++) {
        config_save(&c, directory);
        char *text = file_text(path, &n);
        write_text(path, replaced(text, "rope_scaling\": null", label("rope_scaling\": %s",
                                                                      same[i][0])));
        Config a = config_load(path);
        write_text(path, replaced(replaced(text, "rope_theta", "x"), "rope_scaling\": null",
                                  label("rope_parameters\": %s", same[i][1])));
        Config b = config_load(path);
        EXPECT(a.theta == 5e4 && b.theta == 5e4 && a.yarn_factor == (i ? 40 : 0) &&
               b.yarn_factor == a.yarn_factor && b.yarn_fast == a.yarn_fast, "%s: theta %g, factor "
               "%g", same[i][1], b.theta, b.yarn_factor);
        EXPECT(!i || (b.yarn_fast == 31 && b.yarn_slow == 1 && b.yarn_original == 4096 &&
               b.yarn_mscale == 1 && b.yarn_mscale_all_dim == 0), "%s: other defaults", same[i][1]);
    }
}

static void test_damaged_config(void)
{
    size_t n;
    char *bad = saved_model("config"), *path = in_path(bad, "config.json");
    char *good = file_text(path, &n), *deep = (char *)room(200, 1);
    const char *const *eval = ARGS("eval", "--model", bad, "--data", excerpt);
    static const char *const cases[][3] = { // from, to, message
        {"num_experts_per_tok\": 2", "num_experts_per_tok\": 9", "only 6 experts"},
        {"num_experts_per_tok\": 2", "num_experts_per_tok\": 5", "leaves 4 experts"},
        {"n_group\": 3", "n_group\": 4", "4 equal groups"},
        {"n_group\": 3", "n_group\": 6", "a group's score needs 2"},
        {"topk_group\": 2", "topk_group\": 4", "topk_group is 4"},
        {"topk_group\": 2", "topk_group\": 0", "topk_group is 0"},
        {"topk_group\": 2", "top_group\": 2", "topk_group is missing"},
        {"qk_rope_head_dim\": 2", "qk_rope_head_dim\": 3", "must be even"},
        {"hidden_size\": 13", "hidden_size\": 0", "hidden_size is 0"},
        {"hidden_size\": 13", "hidden_size\": -1", "hidden_size is -1"},
        {"hidden_size\": 13", "hidden_size\": 1.5", "hidden_size is 1.5"},
        {"hidden_size\": 13", "hidden_size\": 1e12", "must be a whole number from 0 to"},
        {"hidden_size\": 13", "hidden_size\": \"13\"", "hidden_size must be a number"},
        {"hidden_size\": 13", "hidden_size\": true", "hidden_size must be a number"},
        {"hidden_size\": 13", "hidden_size\": null", "hidden_size is missing"},
        {"hidden_size\": 13", "hidden_size\": 13, \"hidden_size\": 13", "appears twice"},
        {"hidden_size\": 13", "hidden_size\": 14", "model.embed_tokens.weight"},
        {"hidden_size\": 13", "hid_size\": 13", "hidden_size is missing"},
        {"num_hidden_layers\": 3", "num_hidden_layers\": 4", "is missing"},
        {"num_hidden_layers\": 3", "num_hidden_layers\": 2", "model.layers.2"},
        {"vocab_size\": 256", "vocab_size\": 255", "model.embed_tokens.weight"},
        {"sigmoid", "softmax", "scoring_func is softmax"},
        {"\"deepseek_v3", "\"llama", "model_type is llama"},
        {"rope_scaling\": null", "rope_scaling\": {\"type\": \"linear\"}", "type is linear"},
        {"rope_scaling\": null", "rope_scaling\": {\"factor\": 0.5}", "factor >= 1"},
        {"rope_scaling\": null", "rope_scaling\": 4", "rope_scaling must be an object"},
        {"rope_scaling\": null", "rope_parameters\": {\"rope_type\": \"llama3\"}", "is llama3"},
        {"seq_aux\": true", "seq_aux\": false", "seq_aux is false"},
        {"rope_scaling\": null", "rope_parameters\": 4", "rope_parameters must be an object"},
        {"rope_scaling\": null", "rope_parameters\": {\"rope_theta\": 0.5}", "rope_theta above 1"},
        {"rope_scaling\": null", "rope_parameters\": {\"rope_type\": \"default\", \"factor\": 2}",
         "rope_parameters: factor is not known"},
        {"rope_scaling\": null", "rope_parameters\": {\"rope_type\": \"yarn\", \"truncate\": 0}",
         "truncate is not known"},
        {"rope_interleave\": true", "rope_interleave\": false", "rope_interleave is false"},
        {"rms_norm_eps\": ", "rms_norm_eps\": 0, \"x\":", "rms_norm_eps must be above 0"},
        {"key_value_heads\": 2", "key_value_heads\": 1",
         "num_key_value_heads is 1; this program knows only 2"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        write_text(path, replaced(good, cases[i][0], cases[i][1]));
        expect_error(2, cases[i][2], eval);
    }
    memset(deep, '[', 100);
    memset(deep + 100, ']', 99);
    const char *const texts[][2] = { // the value of a key, message
        {"01", "expected a value"}, {"1.", "without a digit"}, {".5", "expected a value"},
        {"+1", "expected a value"}, {"-", "expected a value"}, {"1e", "without a digit"},
        {"1e999", "out of range"}, {"NaN", "expected a value"}, {"nul", "expected a value"},
        {"1,", "expected a string"}, {"[1 2]", "expected ','"}, {"[1,]", "expected a value"},
        {"1} x", "something follows"}, {"\"x", "control character"}, {"[", "expected a value"},
        {"\"\x01\"", "control character"}, {"\"\\x\"", "an escape"},
        {"\"\\u12g4\"", "an escape"}, {"\"\\ud83d\"", "an escape"},
        {"\"\\ud83d\\u0041\"", "half a surrogate"}, {"\"\\ude00\"", "not UTF-8"},
        {"\"\\u0000\"", "not UTF-8"}, {"\"\xFF\"", "not UTF-8"}, {"\"\xC0\x80\"", "not UTF-8"},
        {"\"\xED\xA0\x80\"", "not UTF-8"}, {"\"\xF4\x90\x80\x80\"", "not UTF-8"},
        {"\"\xE2\x82\"", "not UTF-8"}, {"\"\x80\"", "not UTF-8"}, {"1,'b':2", "expected a string"},
        {"1,\"b\" 2", "expected ':'"}, {"1,\"\\u0061\":2", "\"a\" appears twice"},
        {deep, "nested too deeply"},
    };
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++) {
        write_text(path, replaced("{\"a\":X\n}", "X", texts[i][0]));
        expect_error(2, texts[i][1], eval);
    }
    Config huge = config_preset(DEEPSEEK_V3); // whose experts would pass 2^56 parameters
    huge.C = huge.Fe = 1 << 20, huge.E = 1 << 16, huge.L = 1 << 12;
    config_save(&huge, bad);
    expect_error(2, label("%s: sizes overflow", path), eval);
    enum { MANY = 1 << 22 };
    char *many = (char *)room(2 * MANY + 10, 1);
    strcpy(many, "{\"a\":[0");
    for (size_t i = 0; i < MANY; i++) memcpy(many + 7 + 2 * i, ",0", 2);
    strcpy(many + 7 + 2 * MANY, "]}");
    write_text(in_path(bad, "model.safetensors.index.json"), many);
    write_text(path, good);
    remove(in_path(bad, "model.safetensors"));
    expect_error(2, "JSON values; at most", eval);
    write_text(path, "");
    expect_error(2, "at byte 0", eval);
    write_text(path, "[1]");
    expect_error(2, "expected a JSON object", eval);
    write_file(path, "{\"a\":\0001}", 8);
    expect_error(2, "at byte 5", eval);
}

// ------------------------------------------------------------------------------------------------
// Training

static void test_window_start(void)
{
    static const size_t size[][2] = { // n, T
        {100, 7}, {71, 7}, {72, 7}, {8, 7}, {1000, 1}, {517, 33},
    };
    for (size_t i = 0; i < 6; i++) {
        size_t n = size[i][0], T = size[i][1], windows = (n - 1) / T, same = 0;
        size_t *order = (size_t *)room(windows, sizeof(size_t));
        for (size_t pass = 0; pass < 20; pass++) {
            char *seen = (char *)room(n, 1);
            size_t offset = window_start(5, pass * windows, n, T) % T, repeated = 0;
            for (size_t k = 0; k < windows; k++) {
                size_t start = window_start(5, pass * windows + k, n, T);
                REQUIRE(start + T + 1 <= n, "n %zu, T %zu: a window starts at %zu", n, T, start);
                EXPECT(!seen[start]++ && start % T == offset, "n %zu, T %zu: window %zu again", n,
                       T, start);
                repeated += pass > 0 && order[k] == start;
                order[k] = start;
            }
            same += repeated == windows;
        }
        EXPECT(windows < 8 || same == 0, "n %zu, T %zu: %zu passes are repeated", n, T, same);
    }
    EXPECT(window_start(5, 3, 1000, 7) != window_start(6, 3, 1000, 7), "the seed does not matter");
}

static void test_schedule(void)
{
    Options o;
    memset(&o, 0, sizeof o);
    o.steps = 1000, o.warmup = 20, o.hold = 0.68, o.min_lr = 0.1;
    for (size_t i = 0; i < 20; i++) near(schedule(&o, i), (double)(i + 1) / 20, 1e-12, "warm-up");
    for (size_t i = 20; i <= 700; i += 10) near(schedule(&o, i), 1, 0, "hold");
    near(schedule(&o, 850), 0.55, 1e-12, "the middle of the cosine");
    near(schedule(&o, 775), 0.1 + 0.9 * (2 + sqrt(2)) / 4, 1e-12, "a quarter of it");
    near(schedule(&o, 1000), 0.1, 1e-12, "its end");
    for (size_t i = 701; i < 1000; i++)
        EXPECT(schedule(&o, i + 1) < schedule(&o, i), "does not fall at %zu", i);
    o.hold = 1;
    near(schedule(&o, 999), 1, 0, "held to the end");
    o.warmup = 0, o.hold = 0;
    near(schedule(&o, 0), 1, 0, "no warm-up");
}

// Answers are what follows the tab of a line, its end included, wherever a window begins.
static void test_answers_only(void)
{
    static const char bytes[] = "1+1\t<2>\nno tab\n\t3\t4\n5\t", is[] = "0000111100000000111100";
    size_t n = sizeof bytes - 1;
    accum found[sizeof bytes];
    for (size_t at = 0; at < n; at++) {
        find_answers(found, bytes, at, n - at);
        for (size_t i = at; i < n; i++)
            EXPECT(found[i - at] == is[i] - '0', "byte %zu seen from %zu", i, at);
    }
    Config c = small_config();
    c.V = 256, c.L = 2;
    Model m = random_model(&c, 0, 72);
    double whole = 0;
    for (size_t i = 1; i < n; i++) // each in a window of its own: of two tokens, one predicted
        if (is[i] == '1') whole += text_loss(&m, bytes + i - 1, 2, 1, 0);
    near(text_loss(&m, bytes, n, 1, 1), whole / 8, 2e-6, "loss of answers");
    // the second line, cut after its tab, is seen again from the line feed before it
    static const char lines[] = "ab\tcd\nef\tgh\n";
    double first = text_loss(&m, lines, 6, 8, 1), second = text_loss(&m, lines + 5, 7, 8, 1);
    near(text_loss(&m, lines, 12, 8, 1), (first + second) / 2, 2e-6, "loss of two lines");
    EXPECT(fabs(text_loss(&m, lines + 8, 4, 3, 1) - second) > 1e-4, "questions change nothing");
    model_free(&m);
}

// The largest load over the mean, where it is worst.
static void test_worst_load(void)
{
    static const int loads[][6] = {{1, 1, 1, 1, 1, 1}, {0, 3, 0, 0, 0, 3}, {5, 0, 0, 1, 0, 0}};
    Config c = small_config();
    Model m = model_make(&c, 1);
    Optimizer o = optimizer_make(&m);
    double most[] = {1, 3, 5};
    near(worst_load(&m, &o), 1, 1e-12, "no loads");
    for (size_t i = 0; i < 3; i++) { // layers 1, 2 and, of MTP, 3
        to_device(o.load + (1 + i) * c.E, loads[i], sizeof loads[i]);
        near(worst_load(&m, &o), most[i], 1e-12, label("loads of layers 1 to %zu", i + 1));
    }
    optimizer_free(&o);
    model_free(&m);
}

// Every token but the first counts once, and sees nothing from before its window.
static void test_text_loss(void)
{
    static const size_t size[][2] = {{2, 5}, {6, 5}, {38, 5}, {300 * 17 + 124, 300}}; // n, T
    Config c = small_config();
    c.V = 256, c.L = 2, c.Tmax = 300;
    Model m = random_model(&c, 0, 71);
    Data text = data_load(excerpt, &c);
    for (size_t i = 0; i < 4; i++) {
        size_t n = size[i][0], T = size[i][1], counted = 0;
        double sum = 0;
        for (size_t at = 0; at < n - 1; at += T) {
            size_t t = min_size(T, n - 1 - at);
            int *tokens = (int *)room(t + 1, sizeof(int));
            tokens_copy(tokens, text.bytes + at, t + 1);
            Acts a = acts_make(&c, 1, t, 0);
            acts_load(&a, tokens);
            model_forward(&m, &a);
            for (size_t j = 0; j < t; j++, counted++) {
                const real *z = a.layer[c.L - 1].logits + j * 256;
                double total = 0;
                for (size_t v = 0; v < 256; v++) total += exp((double)z[v]);
                sum += log(total) - (double)z[tokens[j + 1]];
            }
            acts_free(&a);
        }
        EXPECT(counted == n - 1, "the test counted %zu of %zu", counted, n - 1);
        near(text_loss(&m, text.bytes, n, T, 0), sum / (double)(n - 1), 2e-6, label("n %zu", n));
    }
    free(text.bytes);
    model_free(&m);
}

// ------------------------------------------------------------------------------------------------
// Command line

#define REFUSED(says, ...) expect_error(2, says, ARGS(__VA_ARGS__))

static void test_command_line_errors(void)
{
    size_t n;
    char *model = saved_model("cli"), *config = in_path(model, "config.json");
    char *none = in_directory("none"), *few = in_directory("few"), *under = in_directory("few/out");
    char *ascii = in_directory("ascii.json"), *one = in_directory("one");
    write_text(few, "ab\xC3\xA9");
    write_text(one, "a");
    write_text(ascii, replaced(file_text(config, &n), "vocab_size\": 256", "vocab_size\": 128"));
    REFUSED("frobnicate", "frobnicate");
    REFUSED("--frobnicate", "train", "--frobnicate", "1");
    REFUSED("prompt", "train", "prompt");
    REFUSED("--speculate", "train", "--speculate"); // sample's
    REFUSED("--steps", "train", "--steps");
    static const char *const bad[] = {"x", "", "-1", "nan", "3x", "1e999", "1.5", "9999999999999"};
    for (size_t i = 0; i < 8; i++) REFUSED("--steps", "train", "--steps", bad[i]);
    for (size_t i = 0; i < 6; i++) REFUSED("--lr", "train", "--lr", bad[i]);
    REFUSED("from 0 to 1099511627776", "train", "--seed", "1099511627777");
    REFUSED("--beta1 is '1'; it must be a number from 0 to less than 1", "train", "--beta1", "1");
    REFUSED("less than 1", "check", "--beta2", "1");
    REFUSED("less than 1", "rl", "--momentum", "1");
    REFUSED("--slips is '1.5'; it must be a number from 0 to 1", "task", "--slips", "1.5");
    REFUSED("--data", "train", "--config", config);
    REFUSED("--data", "check", "--config", config);
    REFUSED("--data", "eval", "--model", model);
    REFUSED("--model", "eval", "--data", excerpt);
    REFUSED("--model", "sample");
    REFUSED(none, "eval", "--model", none, "--data", excerpt);
    REFUSED(none, "eval", "--model", model, "--data", none);
    REFUSED(none, "train", "--config", none, "--data", excerpt);
    REFUSED(directory, "eval", "--model", model, "--data", directory);
    REFUSED(few, "train", "--config", config, "--data", few);
    REFUSED(few, "check", "--config", config, "--data", few);
    REFUSED(one, "eval", "--model", model, "--data", one);
    REFUSED("--seq is 17", "eval", "--model", model, "--data", excerpt, "--seq", "17");
    REFUSED("--batch", "check", "--config", config, "--data", excerpt, "--batch", "0");
    REFUSED("--steps", "train", "--config", config, "--data", excerpt, "--steps", "0");
    REFUSED("has its own", "check", "--config", "laptop", "--model", model, "--data", excerpt);
    REFUSED("--data", "eval", "--task", "add", "--model", model, "--data", excerpt);
    REFUSED("sgd", "train", "--config", config, "--data", excerpt, "--optimizer", "sgd");
    REFUSED(under, "train", "--config", config, "--data", excerpt, "--out", under);
    REFUSED(few, "train", "--config", config, "--data", excerpt, "--out", few);
    REFUSED(under, "check", "--config", config, "--data", excerpt, "--dump", under);
    REFUSED("not a regular file", "check", "--config", config, "--data", excerpt, "--batch", "1",
            "--dump", "/dev/null");
    REFUSED("what is read stands there", "check", "--model", model, "--data", excerpt, "--dump",
            in_path(model, "model.safetensors"));
    REFUSED("what is read stands there", "check", "--config", config, "--data", few, "--dump", few);
    char *deep = (char *)room(4096, 1);
    memset(deep, 'x', 4080);
    REFUSED("the path is too long", "train", "--config", config, "--data", excerpt, "--out", deep);
    REFUSED("--answers-only, but no answer, after a tab, is in the part that trains", "train",
            "--config", config, "--data", excerpt, "--out", none, "--answers-only");
    REFUSED("--tokens: a text of", "train", "--config", config, "--data", excerpt, "--out", none,
            "--tokens", "3000000000");
    REFUSED("byte 2 is 195", "check", "--config", ascii, "--data", few);
    REFUSED("--prompt", "sample", "--model", model, "--prompt", "");
    EXPECT(access(none, F_OK), "something was made where nothing should be");
    Ran r = run_moe(ARGS(NULL));
    EXPECT(r.status == 2 && strstr(r.out, "usage"), "without a command: status %d, '%s'", r.status,
           r.out);
}

static void test_help(void)
{
    Ran r = expect_success(ARGS("--help"));
    for (size_t i = 0; i < COMMANDS; i++) {
        EXPECT(strstr(r.out, commands[i].name), "--help does not list %s", commands[i].name);
        Ran help = expect_success(ARGS(commands[i].name, "--help"));
#define LISTED(takers, type, field, option, ...) \
        EXPECT(!((takers) & commands[i].bit) || strstr(help.out, "--" option " "), \
               "%s --help leaves out --" option, commands[i].name);
        OPTIONS(LISTED)
    }
}

// A run from end to end: train, look at what it left, eval, sample.
static void test_train_and_use(void)
{
    Config c = trainable_config();
    char *config = in_directory("config.json"), *out[3], *weights[3], *logs[3], *printed = NULL;
    size_t n[3], m[3], rows = 0, validated = 0, tokens = 0;
    config_save(&c, directory);
    for (int i = 0; i < 3; i++) { // twice the same run, and once with a break
        out[i] = in_directory(label("trained/%d", i));
        Ran r = expect_success(ARGS("train", "--config", config, "--data", excerpt, "--out", out[i],
                                    "--steps", "30", "--batch", "4", "--lr", "0.02", "--warmup",
                                    "3", "--val-every", "10", "--val-share", "0.02",
                                    i == 2 ? "--stop-after" : NULL, "17"));
        if (i == 2) r = expect_success(ARGS("train", "--resume", out[i]));
        REQUIRE(r.status == 0, "no model to go on with");
        EXPECT(strstr(r.out, "validation loss"), "no validation loss in '%s'", r.out);
        if (i == 0) printed = r.out;
        weights[i] = file_text(in_path(out[i], "model.safetensors"), &n[i]);
        logs[i] = file_text(in_path(out[i], "log.csv"), &m[i]);
        EXPECT(n[i] == n[0] && !memcmp(weights[i], weights[0], n[0]), "run %d: another model", i);
        EXPECT(m[i] == m[0] && !memcmp(logs[i], logs[0], m[0]), "run %d: another log", i);
    }
    char *blocked = in_path(out[1], "model.safetensors.tmp"), *whole;
    make_directory(blocked); // so that it cannot be saved: the old one must stay
    expect_error(2, blocked, ARGS("train", "--resume", out[1], "--steps", "31"));
    whole = file_text(in_path(out[1], "model.safetensors"), &n[1]);
    EXPECT(n[1] == n[0] && !memcmp(whole, weights[0], n[0]), "a failed save left another model");

    double first = 0, last = 0, loss = 0, mean = 0, mtp, balance, load, norm, lr;
    char *row = strchr(logs[0], '\n') + 1, *end;
    EXPECT(sscanf(row, "1,%lf,,%lf,%lf,%lf,%lf,%lf\n", &loss, &mtp, &balance, &load, &norm,
                  &lr) == 6 && fabs(mtp - loss * 23 / 24) < 0.1 && // of 24 tokens 23 have a second
           balance > 1.99 && balance < 2.2 && load > 1 && load <= 2 && norm > 0 && // two layers
           fabs(lr - 0.02 / 3) < 1e-8, "log.csv begins '%.60s'", row);
    for (; (end = strchr(row, '\n')); row = end + 1) {
        size_t step = 0, commas = 0;
        *end = 0;
        EXPECT(sscanf(row, "%zu,%lf,", &step, &last) == 2 && step == ++rows, "log.csv: '%s'", row);
        for (char *s = row; *s; s++) commas += *s == ',';
        EXPECT(commas == 7, "log.csv: '%s'", row);
        validated += !strstr(row, ",,");
        if (rows == 1) first = mean = last;
        mean = 0.95 * mean + 0.05 * last;
    }
    EXPECT(strstr(printed, label("step 30/30 loss %.4f val ", mean)), "'%s' has no mean of %.4f",
           printed, mean);
    EXPECT(rows == 30 && validated == 3, "%zu rows, %zu with a validation", rows, validated);
    EXPECT(first > 5.4 && first < 5.7 && last < 4, "the loss went from %.3f to %.3f", first, last);

    Ran eval = expect_success(ARGS("eval", "--model", out[0], "--data", excerpt));
    file_text(excerpt, n);
    EXPECT(sscanf(eval.out, "loss %lf tokens %zu\n", &loss, &tokens) == 2 && loss > 2 && loss < 4 &&
           tokens == n[0] - 1, "eval prints '%s'", eval.out);

    const char *prompt = "Was \"ever\" wom\xC3\xA9n?\n";
    Ran r[3];
    for (int i = 0; i < 3; i++) // plain; with drafts; with another seed
        r[i] = expect_success(ARGS("sample", "--model", out[0], "--prompt", prompt, "--tokens",
                                   "60", "--seed", i == 2 ? "2" : "1",
                                   i == 1 ? "--speculate" : NULL));
    EXPECT(!strncmp(r[0].out, prompt, strlen(prompt)), "sample begins '%.30s'", r[0].out);
    EXPECT(strlen(r[0].out) <= strlen(prompt) + 61, "sample wrote %zu bytes", strlen(r[0].out));
    EXPECT(!strcmp(r[0].out, r[1].out), "drafts made '%s' out of '%s'", r[1].out, r[0].out);
    EXPECT(strstr(r[1].err, "drafts accepted"), "--speculate says '%s'", r[1].err);
    EXPECT(strcmp(r[0].out, r[2].out), "another seed wrote the same");
}

// A dumped tensor must have this name, shape and data.
static void expect_dumped(const Json *header, Parts p, const Entry *e)
{
    const Json *j = json_get(header, e->name);
    REQUIRE(j, "%s is not in the dump", e->name);
    const Json *shape = json_get(j, "shape"), *at = json_get(j, "data_offsets")->child;
    size_t size = entry_size(e), begin = (size_t)at->number, d = 0;
    for (const Json *s = shape->child; s; s = s->next, d++)
        EXPECT(d < e->dims && s->number == (double)e->shape[d], "%s: its dimension %zu is %g",
               e->name, d, s->number);
    EXPECT(d == e->dims && !strcmp(json_get(j, "dtype")->string, "F32"), "%s: %zu dimensions of %s",
           e->name, d, json_get(j, "dtype")->string);
    REQUIRE(at->next->number == (double)(begin + 4 * size) && begin + 4 * size <= p.n,
            "%s: lies at [%g, %g]", e->name, at->number, at->next->number);
    real *stored = reals(size);
    memcpy(stored, p.data + begin, 4 * size);
    within(relative_error(stored, e->data, size), 1e-4, e->name);
}

// moe check prints and dumps what the functions give here.
static void test_check_dump(void)
{
    enum { B = 2, T = 7 };
    char *path = saved_model("dumped"), *link_path = in_directory("link");
    write_text(in_directory("dump.safetensors"), "");
    REQUIRE(!symlink("dump.safetensors", link_path), "no link");
    Ran r = expect_success(ARGS("check", "--model", path, "--data", excerpt, "--batch", "2",
                                "--seq", "7", "--steps", "2", "--dump", link_path));
    REQUIRE(r.status == 0, "no dump to go on with");
    Model m = model_load(path, 1);
    Data text = data_load(excerpt, &m.config);
    Acts a = acts_make(&m.config, B, T, 1);
    int tokens[B * (T + 1)];
    tokens_copy(tokens, text.bytes, B * (T + 1));
    acts_load(&a, tokens);
    model_forward(&m, &a);
    model_backward(&m, &a, 1);
    Losses s = model_losses(&m, &a);
    double got[5] = {0}, expected[5] = {s.total, s.main, s.mtp, s.balance, grad_norm(&m)};
    EXPECT(sscanf(r.out, "loss %lf main %lf mtp %lf balance %lf grad_norm %lf\n", &got[0], &got[1],
                  &got[2], &got[3], &got[4]) == 5 && strstr(r.out, "\nstep 1 loss ") &&
           strstr(r.out, "\nstep 2 loss "), "check prints '%s'", r.out);
    for (size_t i = 0; i < 5; i++) near(got[i], expected[i], 1e-5, label("printed number %zu", i));

    Parts p = read_parts(directory, "dump.safetensors");
    struct stat link;
    EXPECT(!lstat(link_path, &link) && S_ISLNK(link.st_mode), "the link was replaced");
    Json *header = json_parse("dump.safetensors", p.header, strlen(p.header));
    accum loss[4] = {(accum)s.total, (accum)s.main, (accum)s.mtp, (accum)s.balance};
    Entry others[] = {{"logits", {B, T, 256}, 3, a.layer[m.config.L - 1].logits, NULL},
                      {"loss", {1}, 1, loss, NULL}, {"loss.main", {1}, 1, loss + 1, NULL},
                      {"loss.mtp", {1}, 1, loss + 2, NULL},
                      {"loss.balance", {1}, 1, loss + 3, NULL}};
    size_t n, count = 6; // with __metadata__
    Entry *grads = list_entries(&m.layout, m.grads, "grad.", &n);
    for (size_t i = 0; i < 5; i++) expect_dumped(header, p, &others[i]);
    for (size_t i = 0; i < n; i++) {
        if (strstr(grads[i].name, "e_score_correction_bias")) continue; // not trained by gradient
        expect_dumped(header, p, &grads[i]);
        count++;
    }
    for (size_t l = 0; l < m.config.L + a.depths; l++) {
        size_t rows = layer_tokens(&m, &a, l), K = m.config.K, E = m.config.E;
        if (!is_moe(&m.config, l)) continue;
        real *topk = reals(rows * K);
        for (size_t i = 0; i < rows * K; i++) topk[i] = (real)a.layer[l].topk[i];
        Entry choice = {"", {rows, K}, 2, topk, NULL}, load = {"", {B, E}, 2, a.layer[l].f, NULL};
        routing_names(choice.name, load.name, l);
        expect_dumped(header, p, &choice);
        expect_dumped(header, p, &load);
        count += 2;
    }
    EXPECT(header->length == count, "expected %zu tensors, got %zu", count, header->length);
    free(header);
    free(text.bytes);
    acts_free(&a);
    model_free(&m);
}

// The numbers of a dump's tensor.
static const float *dumped(const char *name, const char *tensor, size_t *n)
{
    Parts p = read_parts(directory, name);
    Json *header = json_parse(name, p.header, strlen(p.header));
    const Json *at = json_get(json_get(header, tensor), "data_offsets")->child;
    float *x = (float *)room(p.n / 4, sizeof(float));
    *n = ((size_t)at->next->number - (size_t)at->number) / 4;
    memcpy(x, p.data + (size_t)at->number, 4 * *n);
    free(header);
    return x;
}

static void dump_batch(const char *name, const char *model, const char *routing)
{
    expect_success(ARGS("check", "--model", model, "--data", excerpt, "--batch", "2", "--seq", "7",
                        "--dump", in_directory(name), "--routing", routing));
}

// Told another model's routing, a model takes it; told its own, nothing changes.
static void test_check_routing(void)
{
    Config c = small_config();
    c.V = 256, c.Tmax = 16;
    Model m = random_model(&c, 0, 62);
    char *one = saved_model("routes"), *two = in_directory("other");
    char *of_one = in_directory("of-one");
    model_save(&m, two);
    model_free(&m);
    dump_batch("of-one", one, "");
    dump_batch("of-one-again", one, of_one);
    dump_batch("of-two", two, "");
    dump_batch("of-two-told", two, of_one);
    size_t n, again, differ = 0;
    char *first = file_text(of_one, &n), *second = file_text(in_directory("of-one-again"), &again);
    EXPECT(n == again && !memcmp(first, second, n), "its own routing changes the dump");
    for (size_t l = c.dense; l < c.L; l++) {
        char topk[NAME_MAX_LENGTH], f[NAME_MAX_LENGTH];
        routing_names(topk, f, l);
        const float *a = dumped("of-one", topk, &n), *b = dumped("of-two", topk, &n);
        EXPECT(!memcmp(a, dumped("of-two-told", topk, &n), 4 * n), "layer %zu chose itself", l);
        for (size_t i = 0; i < n; i++) differ += a[i] != b[i];
    }
    EXPECT(differ > 0, "two random models route alike");

    char *text = file_text(of_one, &n), topk[NAME_MAX_LENGTH], f[NAME_MAX_LENGTH];
    Parts p = read_parts(directory, "of-one");
    Json *header = json_parse("of-one", p.header, strlen(p.header));
    routing_names(topk, f, c.dense);
    float beyond = (float)c.E;
    static const char *const says[] = {"element 0 is ", "element 1 is ", "f: element 0 is "};
    for (int i = 0; i < 3; i++) { // no expert; the same twice; no load
        const Json *at = json_get(json_get(header, i < 2 ? topk : f), "data_offsets")->child;
        char *bad = (char *)memcpy(room(n, 1), text, n), *to = bad + (n - p.n) + (size_t)at->number;
        if (i == 1) memcpy(to + 4, to, 4);
        else memcpy(to, &beyond, 4);
        write_file(in_directory("of-none"), bad, n);
        REFUSED(says[i], "check", "--model", one, "--data", excerpt, "--batch", "2", "--seq", "7",
                "--routing", in_directory("of-none"));
        beyond++;
    }
    free(header);
    REFUSED("has shape [14,", "check", "--model", one, "--data", excerpt, "--batch", "1", "--seq",
            "7", "--routing", of_one);
    REFUSED("none", "check", "--model", one, "--data", excerpt, "--routing", in_directory("none"));
    REFUSED("--routing takes what check --dump wrote", "check", "--model", one, "--data", excerpt,
            "--routing", in_path(one, "model.safetensors"));
    c.E = 0, c.dense = c.L;
    m = random_model(&c, 0, 63);
    model_save(&m, in_directory("dense"));
    model_free(&m);
    REFUSED("no experts to choose from", "check", "--model", in_directory("dense"), "--data",
            excerpt, "--routing", of_one);
}

// ------------------------------------------------------------------------------------------------
// Runs that end early

static const char *const run_files[] = {"optimizer.safetensors", "model.safetensors", "log.csv"};

// config.json of a model that trains in a millisecond a step.
static char *tiny_config(void)
{
    Config c = trainable_config();
    c.C = c.Tmax = 8;
    config_save(&c, directory);
    return in_directory("config.json");
}

// Starts a tiny run in `name`, which ends after `stop` steps of a million, having saved each.
static char *tiny_run(const char *name, const char *stop)
{
    char *out = in_directory(name);
    expect_success(ARGS("train", "--config", tiny_config(), "--data", excerpt, "--out", out,
                        "--steps", "1000000", "--save-every", "1", "--batch", "2", "--tokens", "0",
                        "--val-every", "0", "--stop-after", stop));
    return out;
}

static size_t saved_step(const char *run) // after which it was saved
{
    Checkpoint c = checkpoint_file(run, state_name);
    size_t step = parse_Count("step", state_value(c.shard, "step"));
    checkpoint_close(&c);
    return step;
}

// The files of two runs must be the same to the last byte.
static void expect_same_runs(const char *a, const char *b)
{
    for (size_t i = 0; i < 3; i++) {
        size_t n[2];
        const char *x = file_text(in_path(a, run_files[i]), &n[0]);
        const char *y = file_text(in_path(b, run_files[i]), &n[1]);
        EXPECT(n[0] == n[1] && !memcmp(x, y, n[0]), "%s differs between %s and %s", run_files[i], a,
               b);
    }
}

// A run stopped and resumed ends as one that was not, to the last bit.
static void test_resume_is_exact(void)
{
    char *config = tiny_config();
    for (int variant = 0; variant < 2; variant++) {
        char *out[2];
        for (int stopped = 0; stopped < 2; stopped++) {
            out[stopped] = in_directory(label("exact-%d-%d", variant, stopped));
            expect_success(ARGS("train", "--config", config, "--data", excerpt, "--out",
                                out[stopped], "--steps", "40", "--batch", "2", "--val-every", "10",
                                "--tokens", "0", "--save-every", "15", "--optimizer",
                                variant ? "adamw" : "muon", "--accumulate", variant ? "2" : "1",
                                "--stop-after", stopped ? "17" : "0"));
        }
        EXPECT(saved_step(out[1]) == 17, "saved step %zu, not 17", saved_step(out[1]));
        char *other = in_directory(label("exact-%d-other", variant));
        expect_success(ARGS("train", "--resume", out[1], "--out", other));
        expect_success(ARGS("train", "--resume", out[1]));
        expect_same_runs(out[0], out[1]);
        expect_same_runs(out[0], other);
    }
}

// The first row of a run's log.csv, from the loss on.
static const char *first_row(const char *run)
{
    size_t n;
    char *row = strstr(file_text(in_path(run, "log.csv"), &n), "\n1,");
    return row ? row + 1 : label("%s: no step 1", run);
}

// Sequences that grow begin as so many short ones would, and a run with them resumes exactly.
static void test_seq_warmup(void)
{
    Config c = trainable_config(); // of 24 tokens
    char *config = in_directory("config.json"), *out[3];
    Options o;
    memset(&o, 0, sizeof o);
    o.steps = 12, o.seq_warmup = 0.5;
    for (size_t step = 0; step < 12; step++)
        EXPECT(doublings_left(&o, step) == (step < 6 ? 3 - (int)step / 2 : 0), "step %zu: %d", step,
               doublings_left(&o, step));
    o.seq_warmup = 0;
    EXPECT(doublings_left(&o, 0) == 0, "without: %d", doublings_left(&o, 0));
    config_save(&c, directory);
    for (int i = 0; i < 3; i++) { // in one go; with a break; short ones only
        out[i] = in_directory(label("grown-%d", i));
        expect_success(ARGS("train", "--config", config, "--data", excerpt, "--out", out[i],
                            "--steps", "12", "--batch", i < 2 ? "2" : "16", "--seq",
                            i < 2 ? "24" : "3", "--seq-warmup", i < 2 ? "0.5" : "0", "--tokens",
                            "0", "--val-every", "0", "--stop-after", i == 1 ? "3" : "0"));
    }
    EXPECT(!strncmp(first_row(out[0]), first_row(out[2]), 11), "the first step's loss is %.11s, "
           "that of short sequences %.11s", first_row(out[0]), first_row(out[2]));
    expect_success(ARGS("train", "--resume", out[1]));
    expect_same_runs(out[0], out[1]);
    expect_error(2, "an eighth of --seq", ARGS("train", "--config", config, "--data", excerpt,
                                               "--seq", "20", "--seq-warmup", "0.5"));
    expect_error(2, "an eighth of --seq", ARGS("train", "--config", config, "--data", excerpt,
                                               "--seq", "8", "--seq-warmup", "0.5"));
}

static void sleep_for(double seconds)
{
    struct timespec t = {(time_t)seconds, (long)(fmod(seconds, 1) * 1e9)};
    nanosleep(&t, NULL);
}

// Killed at any instant, saving among them, a run leaves a whole checkpoint to go on from.
static void test_killed_while_saving(void)
{
    enum { KILLS = 50 };
    char *run = tiny_run("killed", "1"), *text = in_directory("few.txt");
    size_t last = 1, steps = 0, unfinished = 0;
    write_text(text, "To be, or not to be");
    double start = now();
    const char *const *more = ARGS("train", "--resume", run, "--stop-after", "1"); // one step
    expect_success(more);
    double once = now() - start;
    for (size_t i = 0; i < KILLS; i++) {
        pid_t child = start_moe(ARGS("train", "--resume", run));
        sleep_for(once * (0.3 + 1.7 * random_uniform(11, 0, i)));
        kill(child, SIGKILL);
        Ran r = end_moe(child);
        REQUIRE(r.status == -SIGKILL, "kill %zu: it ended by itself: status %d (%s)", i, r.status,
                r.err);
        for (size_t f = 0; f < 2; f++)
            unfinished += !access(in_path(run, label("%s.tmp", run_files[f])), F_OK);
        if (expect_success(ARGS("eval", "--model", run, "--data", text)).status) return;
        if (expect_success(more).status) return;
        size_t step = saved_step(run);
        REQUIRE(step > last, "kill %zu: step %zu after step %zu", i, step, last);
        steps += step - last - 1;
        last = step;
    }
    EXPECT(steps > 0, "no run that was killed had saved a step");
    write_text(in_path(run, "log.csv"), "step\n"); // as a new run leaves it, killed before it saved
    expect_success(more);
    snprintf(remark, sizeof remark, "%d kills, %zu in mid-save, after %zu saved steps", KILLS,
             unfinished, steps);
}

// What a run leaves that could not save: one line, the last checkpoint, a way to go on.
static void expect_failed_save(const char *run, const char *reference, int status)
{
    const char *const *resume = ARGS("train", "--resume", run, "--stop-after", "4");
    Ran r = run_moe(resume);
    char *end = strchr(r.err, '\n');
    EXPECT(r.status == status && end && !end[1] && strstr(r.err, "cannot write"),
           "expected status %d and one line, got %d, '%s'", status, r.status, r.err);
    EXPECT(saved_step(run) == 3, "step 3 became %zu", saved_step(run));
    file_limit = 0, obeys_modes = 0;
    chmod(run, 0755);
    for (size_t i = 0; i < 2; i++)
        EXPECT(access(in_path(run, label("%s.tmp", run_files[i])), F_OK), "a .tmp was left");
    expect_success(resume);
    expect_same_runs(run, reference);
}

static void test_disk_full(void)
{
    char *reference = tiny_run("unlimited", "4");
    size_t size[2];
    for (size_t i = 0; i < 2; i++) file_text(in_path(reference, run_files[i]), &size[i]);
    for (size_t i = 0; i < 2; i++) {
        char *run = tiny_run(label("full-%zu", i), "3");
        file_limit = size[i] - 1;
        expect_failed_save(run, reference, 1);
    }
#ifdef __linux__
    int status = system(label("%s eval --model %s --data %s >/dev/full 2>&1",
                              getenv("MOE") ? getenv("MOE") : "./moe", reference,
                              in_path(reference, "log.csv")));
    EXPECT(WIFEXITED(status) && WEXITSTATUS(status) == 1, "nobody saw that /dev/full is full");
#endif
}

static void test_read_only_directory(void)
{
    char *reference = tiny_run("writable", "4"), *run = tiny_run("read-only", "3");
    obeys_modes = 1;
    Ran r = run_moe(ARGS("--help"));
    if (r.status == CANNOT_OBEY) {
        obeys_modes = 0;
        snprintf(remark, sizeof remark, "not tested: root may write anywhere");
        return;
    }
    chmod(run, 0555);
    expect_error(2, "cannot make this directory", ARGS("train", "--config", tiny_config(), "--data",
                                                       excerpt, "--out", in_path(run, "new")));
    expect_failed_save(run, reference, 2);
}

// Waits until the program has printed this.
static void wait_for(const char *text)
{
    char *out = in_directory("stdout");
    for (int i = 0; i < 4000; i++, sleep_for(0.005)) {
        size_t n;
        char *is = access(out, F_OK) ? NULL : read_file(out, &n, 1 << 24);
        int seen = is && strstr(is, text);
        free(is);
        if (seen) return;
    }
    fail("the program never printed '%s'", text);
}

// The first SIGINT or SIGTERM saves and stops, the second stops at once.
static void test_signals(void)
{
    static const int signals[] = {SIGINT, SIGTERM, SIGHUP};
    for (size_t i = 0; i < 3; i++) {
        char *run = tiny_run(label("signal-%d", signals[i]), "1");
        pid_t child = start_moe(ARGS("train", "--resume", run, "--save-every", "0", "--log-every",
                                     "1"));
        wait_for("step 5/");
        kill(child, signals[i]);
        Ran r = end_moe(child);
        EXPECT(r.status == 128 + signals[i], "signal %d: status %d (%s)", signals[i], r.status,
               r.err);
        EXPECT(strstr(r.out, label("moe train --resume %s", run)), "signal %d: '%s' does not say "
               "how to go on", signals[i], r.out);
        size_t step = saved_step(run);
        EXPECT(step >= 5, "signal %d: saved step %zu", signals[i], step);
        expect_success(ARGS("train", "--resume", run, "--stop-after", "1"));
        EXPECT(saved_step(run) == step + 1, "signal %d: went on with %zu", signals[i],
               saved_step(run));
    }
    char *run = tiny_run("no-reader", "1"); // as with | head -1
    int status = system(label("%s train --resume %s --save-every 0 --log-every 1 2>%s | head -c 9 "
                              ">/dev/null", moe_program(), run, in_directory("stderr")));
    size_t n;
    EXPECT(status == 0 && saved_step(run) > 1 && strstr(file_text(in_directory("stderr"), &n),
           "moe: standard output: cannot write"), "without a reader: saved step %zu, '%s'",
           saved_step(run), file_text(in_directory("stderr"), &n));
    char *out = in_directory("slow");
    pid_t child = start_moe(ARGS("train", "--config", tiny_config(), "--data", excerpt, "--out",
                                 out, "--accumulate", "1000000")); // a step without end
    wait_for("threads\n");
    kill(child, SIGINT);
    sleep_for(0.2);
    EXPECT(waitpid(child, NULL, WNOHANG) == 0, "the first SIGINT ended it within a step");
    kill(child, SIGINT);
    double start = now();
    Ran r = end_moe(child);
    EXPECT(r.status == -SIGINT && now() - start < 5, "the second SIGINT: status %d after %.1f s",
           r.status, now() - start);
}

// A step that is not finite is skipped and said; after five the run ends. What was saved is finite.
static void test_not_finite(void)
{
    char *run = tiny_run("not-finite", "3");
    Ran r = run_moe(ARGS("train", "--resume", run, "--lr", "1e30"));
    size_t skipped = 0;
    for (const char *s = r.out; (s = strstr(s, ": skipped")); s++) skipped++;
    EXPECT(r.status == 1 && strstr(r.err, "try a smaller --lr"), "status %d, '%s'", r.status,
           r.err);
    EXPECT(skipped == 5 || strstr(r.err, "no longer give"), "%zu steps skipped: %s", skipped,
           r.err);
    Model m = model_load(run, 0); // dies if a weight is not finite
    expect_success(ARGS("eval", "--model", run, "--data", excerpt));
    for (size_t i = 0; i < m.config.V * m.config.C; i++) m.w.lm_head[i] = 3e38f;
    char *huge = in_directory("huge"), *out = in_directory("huge-out"); // each weight is finite
    model_save(&m, huge);
    model_free(&m);
    r = run_moe(ARGS("eval", "--model", huge, "--data", excerpt));
    EXPECT(r.status == 1 && !*r.out && strstr(r.err, "moe: the loss over the text is"),
           "eval: status %d, '%s', '%s'", r.status, r.out, r.err);
    expect_error(1, "and the gradient's norm", ARGS("check", "--model", huge, "--data", excerpt,
                                                    "--batch", "1", "--seq", "8"));
    r = run_moe(ARGS("sample", "--model", huge));
    EXPECT(r.status == 1 && strstr(r.err, "a logit is not a finite number"), "sample: %d, '%s'",
           r.status, r.err);
    expect_error(1, "2 steps in a row were not finite; this run has saved nothing in",
                 ARGS("train", "--model", huge, "--data", excerpt, "--steps", "2", "--out", out));
    expect_error(1, "the loss over the text is", ARGS("train", "--config", tiny_config(), "--data",
                 excerpt, "--out", out, "--steps", "1", "--warmup", "0", "--lr", "1e20",
                 "--adam-lr", "1e20"));
    EXPECT(access(in_path(out, "config.json"), F_OK), "something was saved");
}

// What would spoil a run's directory is refused: another run at work, another optimizer's state.
static void test_run_directory(void)
{
    char *run = tiny_run("directory", "2");
    int lock = open(run, O_RDONLY);
    REQUIRE(lock >= 0 && !flock(lock, LOCK_EX | LOCK_NB), "no lock");
    REFUSED("another run writes there", "train", "--resume", run);
    close(lock);
    REFUSED("--optimizer is adamw, but the run", "train", "--resume", run, "--optimizer", "adamw");
    REFUSED("--resume goes on with the model in", "train", "--resume", run, "--model", directory);
    size_t n, m;
    char *rows = file_text(in_path(run, "log.csv"), &n);
    pid_t child = start_moe(ARGS("train", "--config", tiny_config(), "--data", excerpt, "--out",
                                 run, "--steps", "1000000", "--save-every", "0", "--log-every",
                                 "1", "--val-every", "0"));
    wait_for("step 5/"); // a new run, killed before it saves, leaves what the old one wrote
    kill(child, SIGKILL);
    end_moe(child);
    EXPECT(!strcmp(rows, file_text(in_path(run, "log.csv"), &m)), "log.csv has another run's rows");
    remove(in_path(run, "log.csv"));
    int status = system(label("%s train --resume %s --stop-after 3 --log-every 1 >&- 2>%s",
                              moe_program(), run, in_directory("stderr"))); // what is printed goes
    char *log = file_text(in_path(run, "log.csv"), &n);
    EXPECT(status == 0 && saved_step(run) == 3 && !strncmp(log, "step,loss,", 10) &&
           strstr(log, "\n3,") && !strstr(log, "tok/s"), "status %d, step %zu, log.csv '%s'",
           status, saved_step(run), log);
}

// Memory that is not there is refused before anything is allocated or written.
static void test_memory_refused(void)
{
    char *model = saved_model("large"), *config = in_path(model, "config.json");
    char *out = in_directory("refused");
    static const char *const batches[] = {"1000000000", "1099511627776"};
    double start = now();
    for (size_t i = 0; i < 2; i++)
        expect_error(1, " MB of memory", ARGS("train", "--config", config, "--data", excerpt,
                                              "--out", out, "--batch", batches[i]));
    EXPECT(access(out, F_OK), "%s was made", out);
    REFUSED("--tokens", "sample", "--model", model, "--tokens", "1099511627776");
    Config v3 = config_preset(DEEPSEEK_V3);
    v3.D = 0;
    config_save(&v3, model); // its weights are a tiny model's
    expect_error(1, " MB of memory", ARGS("eval", "--model", model, "--data", excerpt));
    EXPECT(now() - start < 5, "it took %.1f s", now() - start);
}

// The largest model's sizes pass 2^32 without wrapping.
static void test_sizes_beyond_int(void)
{
    Config c = config_preset(DEEPSEEK_V3);
    Layout p = layout_make(&c);
    size_t at[2] = {0, p.added}, large = 0; // where matrices lie that only products train: second
    double sum = 0;
    for (size_t i = 0; i < p.tensors; i++) {
        const Tensor *t = &p.tensor[i];
        int second = t->kind == MATRIX || t->kind == HEAD || t->kind == ROUTER;
        EXPECT(t->offset == at[second], "tensor %zu lies at %zu, expected %zu", i, t->offset,
               at[second]);
        EXPECT((double)tensor_size(t) == (double)t->count * (double)t->rows * (double)t->cols,
               "tensor %zu has %zu elements", i, tensor_size(t));
        at[second] += ceil_div(tensor_size(t), 16) * 16;
        sum += (double)t->count * (double)t->rows * (double)t->cols;
        large += tensor_size(t) > INT_MAX;
    }
    EXPECT(p.added == at[0] && p.elements == at[1] && (double)parameters(&p) == sum,
           "%zu and %zu elements, expected %zu and %zu", p.added, p.elements, at[0], at[1]);
    EXPECT(large == 3 * 59 && sum > 682e9, "%zu tensors pass 2^31, of %g elements", large, sum);
    free(p.tensor);
    Acts one = acts_plan(&c, 1, 4096, 1), many = acts_plan(&c, 4096, 4096, 1);
    double ratio = (double)many.arena.used / (double)one.arena.used;
    EXPECT(ratio > 4095 && ratio <= 4096, "4096 sequences take %g times the memory of one", ratio);
    acts_free(&one);
    acts_free(&many);
}

// Parameters of a model by a formula of its own, with so many routed experts a layer, with or
// without vectors: of the MTP layers, or of the others without embedding and head.
static double count_parameters(const Config *c, size_t experts, int vectors, int mtp)
{
    size_t C = c->C, NH = c->NH, q = NH * (c->Dn + c->Dr);
    size_t attention = (c->Rq ? c->Rq * (C + q + (vectors ? 1 : 0)) : C * q) +
                       C * (c->Rkv + c->Dr) + c->Rkv * (NH * (c->Dn + c->Dv) + (vectors ? 1 : 0)) +
                       NH * c->Dv * C + (vectors ? 2 * C : 0);
    size_t moe = c->E * (C + (vectors ? 1 : 0)) + 3 * C * c->Fe * (c->S + experts);
    if (mtp) return (double)(c->D * (attention + moe + 2 * C * C + (vectors ? 3 * C : 0)));
    return (double)(c->L * attention + c->dense * 3 * C * c->F + (c->L - c->dense) * moe +
                    (vectors ? C : 0));
}

// A number of moe plan --json; NAN if it is not there.
static double planned(const Json *j, const char *section, const char *row, const char *column)
{
    if (j) j = json_get(j, section);
    if (j) j = json_get(j, row);
    if (j && strchr(column, '/')) { // a published number
        j = json_get(j, "published");
        column = strchr(column, '/') + 1;
    }
    if (j) j = json_get(j, column);
    return j && j->type == JSON_NUMBER ? j->number : NAN;
}

static Json *plan(const char *const *args) // freed by the caller
{
    Ran r = expect_success(args);
    return json_parse("moe plan", r.out, strlen(r.out));
}

// moe plan counts parameters and work as the formulas here do, and what DeepSeek published.
static void test_plan(void)
{
    for (int preset = 0; preset < PRESETS; preset++) {
        Config c = config_preset(preset);
        double T = preset == DEEPSEEK_V3 ? 4096 : (double)c.Tmax, table = (double)(c.V * c.C);
        double total = count_parameters(&c, c.E, 1, 0) + 2 * table, sum = 0, work;
        double active = count_parameters(&c, c.K, 1, 0) + table;
        double keys = T * (double)(c.NH * (c.Dn + c.Dr + c.Dv)); // 2 operations, half the sequence
        const char *name = preset_names[preset];
        Json *j = plan(ARGS("plan", "--json", "--config", name));
        near(planned(j, "parameters", "main_model", "total"), total, 0, name);
        near(planned(j, "parameters", "main_model", "active"), active, 1e-12, name);
        near(planned(j, "parameters", "MTP", "total"), count_parameters(&c, c.E, 1, 1), 0, name);
        near(planned(j, "parameters", "MTP", "active"), count_parameters(&c, c.K, 1, 1), 1e-12,
             name);
        for (size_t p = 0; p < PARTS; p++) sum += planned(j, "parameters", parts[p].name, "total");
        near(sum, total, 0, "the sum of the parts");
        size_t moe = c.L - c.dense, expert = 3 * c.C * c.Fe;
        const struct { const char *name; size_t n; } part[] = {
            {"embedding", c.V * c.C}, {"head", c.V * c.C}, {"shared", moe * c.S * expert},
            {"routed", moe * c.E * expert}, {"router", moe * c.E * (c.C + 1)},
            {"dense", c.dense * 3 * c.C * c.F}, {"norms", (2 * c.L + 1) * c.C},
        };
        for (size_t p = 0; p < sizeof part / sizeof *part; p++)
            near(planned(j, "parameters", part[p].name, "total"), (double)part[p].n, 0,
                 part[p].name);
        work = 2 * (count_parameters(&c, c.K, 0, 0) + table) + (double)c.L * keys;
        near(planned(j, "flops_of_a_token", "main_model", "forward"), work, 1e-12, name);
        work += 2 * (count_parameters(&c, c.K, 0, 1) + (double)c.D * table) + (double)c.D * keys;
        near(planned(j, "flops_of_a_token", "all", "both"), 3 * work, 1e-12, name);
        near(planned(j, "cache_bytes_of_a_token", "latent_attention", "all_layers"),
             2 * (double)(c.L * (c.Rkv + c.Dr)), 0, name);
        near(planned(j, "cache_bytes_of_a_token", "plain_attention", "a_layer"),
             2 * (double)(c.NH * (c.Dn + c.Dv)), 0, name);
        free(j);
    }

    // of a config.json with its sizes, too: what was published stands beside ours
    Config c = config_preset(DEEPSEEK_V3);
    config_save(&c, directory);
    Json *j = plan(ARGS("plan", "--json", "--config", in_directory("config.json")));
    static const struct {
        const char *section, *row, *column;
        double published, within;
    } facts[] = {
        {"parameters", "main_model", "/total", 671e9, 1e-4},
        {"parameters", "main_model", "/active", 37e9, 0.011},
        {"parameters", "all_with_MTP's_released_copies", "/total", 685e9, 1e-3},
        {"flops_of_a_token", "main_model", "/both", 250e9, 2e-3},
        {"cache_bytes_of_a_token", "latent_attention", "/all_layers", 70272, 0},
        {"V3_speed_of_a_GPU", "main_model", "/MFU", 0.3894, 4e-3},
        {"V3_and_R1_at_this_price", "V3_in_all", "/GPU_hours", 2788e3, 0},
        {"V3_and_R1_at_this_price", "V3_in_all", "/dollars", 5.576e6, 0},
        {"V3_and_R1_at_this_price", "R1_in_all", "/dollars", 294e3, 3e-3},
    };
    for (size_t i = 0; i < sizeof facts / sizeof *facts; i++) {
        const char *section = facts[i].section, *row = facts[i].row, *column = facts[i].column;
        EXPECT(planned(j, section, row, column) == facts[i].published, "%s: published is %g", row,
               planned(j, section, row, column));
        near(planned(j, section, row, column + 1), facts[i].published, facts[i].within, row);
    }
    near(planned(j, "parameters", "main_model", "total"), 671026419200, 0, "parameters of V3");
    near(planned(j, "V3_speed_of_a_GPU", "with_MTP", "MFU"), 0.407, 1e-3, "MFU of V3, with MTP");
    free(j);
    j = plan(ARGS("plan", "--json", "--config", "moonlight-16b"));
    near(planned(j, "parameters", "main_model", "total"), 15.96e9, 1e-4, "moonlight-16b");
    free(j);
}

// Every option of moe plan changes what it says it does, by as much as it should.
static void test_plan_options(void)
{
    Config c = config_preset(LAPTOP_MTP);
    double experts = (double)(layers(&c) - c.dense) * (double)(c.E * 3 * c.C * c.Fe);
    Json *j = plan(ARGS("plan", "--json", "--config", "laptop-mtp"));
    Json *k = plan(ARGS("plan", "--json", "--config", "laptop-mtp", "--gpu", "a100",
                        "--data-parallel", "8", "--expert-parallel", "4", "--batch", "2",
                        "--mfu", "0.2", "--price", "3", "--budget", "1e9"));
    Json *l = plan(ARGS("plan", "--json", "--config", "laptop-mtp", "--gpus", "5", "--pipeline",
                        "5", "--seq", "128"));
#define OF(j, section, row, column) planned(j, section, row, column)
#define MEMORY(j, row) OF(j, "bytes_on_the_fullest_device", row, "activations_kept")
    double all = OF(j, "parameters", "all", "total"), held = all - experts * 3 / 4;
    near(MEMORY(j, "weights"), 2 * all, 0, "weights");
    near(MEMORY(j, "gradients"), 4 * all, 0, "gradients");
    near(MEMORY(j, "optimizer"), 8 * all, 0, "optimizer");
    near(MEMORY(k, "weights"), 2 * held, 1e-12, "weights of a quarter of the experts");
    near(MEMORY(k, "optimizer"), all, 1e-12, "an eighth of the optimizer");
    near(MEMORY(k, "activations"), 2 * MEMORY(j, "activations"), 0.01, "two sequences");
    near(MEMORY(k, "all"), MEMORY(k, "weights") + MEMORY(k, "gradients") + MEMORY(k, "optimizer") +
         MEMORY(k, "activations"), 1e-12, "the sum");
    near(OF(k, "pre-training", "at_this_MFU", "GPU_hours"),
         1e9 * OF(j, "flops_of_a_token", "all", "both") / (0.2 * 312e12) / 3600, 1e-12, "hours");
    near(OF(k, "pre-training", "at_this_MFU", "dollars"),
         3 * OF(k, "pre-training", "at_this_MFU", "GPU_hours"), 1e-12, "dollars");
    near(OF(k, "pre-training", "at_this_MFU", "days"),
         OF(k, "pre-training", "at_this_MFU", "GPU_hours") / 8 / 24, 1e-12, "days");
    // five stages: the embedding and a dense layer, three of experts, MTP with the head
    near(MEMORY(l, "weights"), 2 * (OF(j, "parameters", "MTP", "total") + 128 + 256 * 128), 1e-12,
         "weights of the last stage");
    near(OF(l, "flops_of_a_token", "attention", "forward"),
         OF(j, "flops_of_a_token", "attention", "forward") / 2, 1e-12, "half the sequence");
    free(j);
    free(k);
    free(l);
    REFUSED("--gpu is 'x'; it must be h800", "plan", "--gpu", "x");
    REFUSED("--gpus 8", "plan", "--gpus", "8");
    REFUSED("--pipeline is 63", "plan", "--pipeline", "63");
    REFUSED("--data-parallel 3 x --pipeline 2 is not --gpus 8", "plan", "--config", "laptop-mtp",
            "--gpus", "8", "--pipeline", "2", "--data-parallel", "3");
    REFUSED("--expert-parallel 7 does not divide the 256", "plan", "--expert-parallel", "7");
    REFUSED("--expert-parallel 4 does not divide --data-parallel 2", "plan", "--config",
            "laptop-mtp", "--data-parallel", "2", "--expert-parallel", "4");
    REFUSED("--batch is 0", "plan", "--batch", "0");
    REFUSED("--seq is 257", "plan", "--config", "laptop-mtp", "--seq", "257");
    REFUSED("--mfu is 0", "plan", "--mfu", "0");
    REFUSED("--mfu is 1.5", "plan", "--mfu", "1.5");
    REFUSED("--budget", "plan", "--budget", "1e21");
    REFUSED("--price", "plan", "--price", "1e7");
    REFUSED("overflow", "plan", "--json", "--batch", "1048576", "--seq", "163840");
}
// moe bench measures and prints something for everything it names.
static void test_bench(void)
{
    Json *j = plan(ARGS("bench", "--json", "--config", "laptop-mtp", "--batch", "1", "--seq", "16",
                        "--steps", "1", "--threads", "1"));
    const Json *operations = json_get(j, "step"), *decode = json_get(j, "decode");
    static const char *const some[] = {"matmul_forward", "experts_backward_w", "adamw_step",
                                       "attention_backward", "cross_entropy_forward"};
    for (size_t i = 0; i < sizeof some / sizeof *some; i++)
        EXPECT(operations && json_get(operations, some[i]), "no %s", some[i]);
    static const char *const kinds[] = {"1", "8", "64", "512", "generate", "speculate"};
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++) {
        const Json *kind = decode ? json_get(decode, kinds[i]) : NULL;
        const Json *rate = kind ? json_get(kind, "tokens/s") : NULL;
        EXPECT(rate && rate->number > 0, "decode %s is not above 0", kinds[i]);
    }
    // A compiler that sees through the loop that measures the peak makes it 10,000 times too fast.
    double share = json_get(json_get(json_get(j, "training"), "whole_step"), "%_of_peak")->number;
    EXPECT(share > 0.1 && share <= 100, "a step makes %g%% of the peak", share);
    free(j);
    REFUSED("--optimizer is x; it must be muon or adamw", "bench", "--optimizer", "x");
    REFUSED("--steps must be at least 1", "bench", "--steps", "0");
    REFUSED("--batch must be at least 1 and --seq 8", "bench", "--batch", "0");
    REFUSED("unknown option --data", "bench", "--data", "x");
}

// ------------------------------------------------------------------------------------------------
// moe rl and moe task

// A model that has learnt sums of two digits from answers of which a tenth is wrong.
static char *adding_model(void)
{
    Config c = trainable_config();
    c.V = 128, c.C = 32, c.D = 0, c.F = c.Fe = 32, c.Rkv = 16, c.Dn = c.Dv = 16, c.Dr = 8;
    c.Tmax = 64;
    char *config = in_directory("config.json"), *text = in_directory("sums"), *out;
    config_save(&c, directory);
    Ran r = expect_success(ARGS("task", "--size", "1", "--lines", "4000", "--worked", "0",
                                "--right", "0.9"));
    write_text(text, r.out);
    out = in_directory("adding");
    r = expect_success(ARGS("train", "--config", config, "--data", text, "--out", out, "--steps",
                            "800", "--batch", "8", "--seq", "40", "--answers-only", "--threads",
                            "1"));
    const char *says = strstr(r.out, "validation loss ");
    double loss = says ? strtod(says + 16, NULL) : NAN; // 2.9 if windows cut lines
    EXPECT(loss > 0.01 && loss < 0.3 && strstr(says, "over the answers in all"), "'%s'", says);
    return out;
}

#define AT_SUMS "--task", "add", "--size", "1", "--max-tokens", "48", "--max-prompt", "16"

// What a model that is right at times gives: right answers alone, collected, to train on; one
// answer with its verdict; and how often it is right, which votes raise.
static void test_right_at_times(void)
{
    char *model = adding_model(), *end, *line, *texts[3];
    for (int i = 0; i < 3; i++) { // again; with another seed
        size_t lines = 0;
        Ran r = expect_success(ARGS("rl", "--model", model, AT_SUMS, "--collect", "30",
                                    "--questions", "8", "--group", "4", "--seed", i < 2 ? "1" :
                                    "2"));
        texts[i] = (char *)room(strlen(r.out) + 1, 1);
        strcpy(texts[i], r.out);
        for (line = r.out; (end = strchr(line, '\n')); line = end + 1, lines++) {
            char *answer = strchr(line, '\t');
            Question q;
            *end = 0;
            REQUIRE(answer, "'%s' has no tab", line);
            *answer++ = 0;
            EXPECT(parse_question(&q, TASK_ADD, line) && !is_for_testing(&q) &&
                   judge(&q, answer).accuracy == 1, "%s: '%s'", line, answer);
        }
        EXPECT(lines == 30 && !*line, "%zu lines, not 30", lines);
    }
    EXPECT(!strcmp(texts[0], texts[1]) && strcmp(texts[0], texts[2]), "not by the seed");

    size_t verdicts[2] = {0, 0};
    for (int i = 0; i < 20; i++) {
        const char *prompt = label("%d+%d", i % 10, i * 7 % 10);
        Question q;
        Ran r = expect_success(ARGS("sample", "--model", model, AT_SUMS, "--prompt", prompt,
                                    "--seed", label("%d", i), "--temperature", "1.5"));
        REQUIRE(parse_question(&q, TASK_ADD, prompt) && (end = strchr(r.out, '\n')), "'%s'", r.out);
        *end++ = 0;
        int right = judge(&q, r.out).accuracy == 1;
        EXPECT(!strncmp(end, right ? "right\n" : "wrong", right ? 6 : 5), "%s: '%s': %s", prompt,
               r.out, end);
        verdicts[right]++;
    }
    EXPECT(verdicts[0] && verdicts[1], "all of 20 are alike: %zu right", verdicts[1]);
    REFUSED("is no question of the task add", "sample", "--model", model, "--task", "add",
            "--prompt", "3-4");

    double greedy, once, votes, format, length;
    size_t questions;
    static const char form[] = "greedy %lf%% pass@1 %lf%% majority of 16 %lf%% format %lf%% "
                               "length %lf questions %zu\n";
    for (int i = 0; i < 2; i++) {
        Ran r = expect_success(ARGS("eval", "--model", model, AT_SUMS, "--test", "64", "--votes",
                                    "16", "--temperature", i ? "1" : "0"));
        REQUIRE(sscanf(r.out, form, &greedy, &once, &votes, &format, &length, &questions) == 6,
                "'%s'", r.out);
        EXPECT(questions == 64 && format >= once && length > 20 && length <= 48, "'%s'", r.out);
        EXPECT(i ? once > 5 && once < 95 && votes > once : once == greedy && votes == greedy,
               "temperature %d: '%s'", i, r.out);
    }
    snprintf(remark, sizeof remark, "pass@1 %.0f%%, majority of 16 %.0f%%", once, votes);
}

// A model that writes letters a to e and ends after a few of them; V of its tokens are known to it.
static char *babbling_model(const char *name, size_t V)
{
    Config c = trainable_config();
    c.V = V, c.C = 8, c.Tmax = 64, c.init_std = 0.1;
    Model m = random_model(&c, 0, 91);
    for (size_t v = 0; v < V; v++) { // the first number of what the head sees is large: a bias
        m.w.embed[v * c.C] = 2;
        m.w.lm_head[v * c.C] = v == END || (v >= 'a' && v <= 'e') ? 1 : -2;
    }
    char *path = in_directory(name);
    model_save(&m, path);
    model_free(&m);
    return path;
}

// Options of a run that takes milliseconds a step.
#define RL(...) ARGS("rl", "--questions", "2", "--group", "4", "--max-tokens", "12", \
                     "--max-prompt", "16", "--test", "4", "--test-every", "2", "--lr", "0.02", \
                     "--threads", "1", __VA_ARGS__)

// Programs that ask without end, and that find right what begins with an a.
static const char *const asks = "while echo \"Say a$i\"; do i=$((i+1)); done 2>/dev/null";
static const char *const judges =
    "while IFS= read -r l; do case $l in *\"\t\"a*) echo 1;; *) echo 0;; esac; done";

// Reads a column of log.csv, which must have `rows` whole rows; returns the mean of rows from ..
// to - 1.
static double logged(const char *run, size_t column, size_t rows, size_t from, size_t to)
{
    size_t n, row = 0;
    double sum = 0;
    char *text = file_text(in_path(run, "log.csv"), &n), *end, *next;
    static const char head[] = "step,reward,accuracy,format,length,entropy,kl,clipped,flat,"
        "grad_norm,test_accuracy,seconds,rollout_tokens_per_s,update_tokens_per_s\n";
    EXPECT(!strncmp(text, head, sizeof head - 1), "log.csv begins '%.150s'", text);
    for (text = strchr(text, '\n') + 1; (next = strchr(text, '\n')); text = next + 1, row++) {
        size_t commas = 0;
        for (char *s = text; s < next; s++) commas += *s == ',';
        EXPECT(strtod(text, &end) == (double)(row + 1) && *end == ',' && commas == 13,
               "log.csv: '%.*s'", (int)(next - text), text);
        for (size_t i = 0; i < column; i++) text = strchr(text, ',') + 1;
        if (row >= from && row < to) sum += strtod(text, NULL) / (double)(to - from);
    }
    EXPECT(row == rows && !*text, "log.csv has %zu rows, not %zu", row, rows);
    return sum;
}

#define EVAL_OWN(model, judge) \
    ARGS("eval", "--model", model, "--task-cmd", asks, "--verify-cmd", judge, "--test", "20", \
         "--votes", "4", "--max-tokens", "12", "--threads", "1")

// What is rewarded is done more: from the first steps to the last answers get better.
static void test_rl(void)
{
    enum { STEPS = 40 };
    char *model = babbling_model("rl-base", 128), *out = in_directory("rl");
    Ran r = expect_success(RL("--model", model, "--out", out, "--steps", "40", "--task-cmd", asks,
                              "--verify-cmd", judges, "--questions", "4"));
    REQUIRE(r.status == 0, "no run to look at");
    double first = logged(out, 2, STEPS, 0, 5), last = logged(out, 2, STEPS, STEPS - 5, STEPS);
    EXPECT(first < 0.5 && last > 0.8, "accuracy went from %.2f to %.2f", first, last);
    EXPECT(logged(out, 10, STEPS, STEPS - 1, STEPS) == 1, "the last test's accuracy is %.2f",
           logged(out, 10, STEPS, STEPS - 1, STEPS));
    double length = logged(out, 4, STEPS, 5, 6), entropy = logged(out, 5, STEPS, 0, STEPS);
    EXPECT(length <= 12 && entropy < log(128), "length %g, entropy %g", length, entropy);
    r = expect_success(EVAL_OWN(out, judges)); // and the program's judge confirms it
    EXPECT(strstr(r.out, "greedy 100.0%"), "eval says '%s'", r.out);
    expect_error(1, "--verify-cmd ended", EVAL_OWN(out, "true"));
    expect_error(1, "wrote something else", EVAL_OWN(out, "while read -r l; do echo 1; echo 0; "
                                                          "done"));
    expect_error(1, "outside the model's vocabulary",
                 ARGS("eval", "--model", out, "--task-cmd", "while echo '\xFF'; do :; done "
                      "2>/dev/null", "--verify-cmd", judges, "--max-tokens", "12"));
    expect_error(1, "silent beyond --patience", // a judge that keeps what it should say
                 ARGS("eval", "--model", out, "--task-cmd", asks, "--verify-cmd",
                      "cat > /dev/null", "--test", "20", "--max-tokens", "12", "--threads", "1",
                      "--patience", "1"));
    snprintf(remark, sizeof remark, "accuracy %.2f, then %.2f", first, last);
}

// What log.csv says of a step: one group a step, and the reference is the policy or never is again.
static void test_rl_log(void)
{
    enum { STEPS = 6 };
    char *model = babbling_model("rl-log-base", 128);
    for (int never = 0; never < 2; never++) {
        char *out = in_directory(label("rl-log-%d", never));
        expect_success(RL("--model", model, "--out", out, "--questions", "1", "--steps", "6",
                          "--kl", "0.01", "--ref-every", never ? "0" : "1", "--task-cmd", asks,
                          "--verify-cmd", judges));
        for (size_t i = 0; i < STEPS; i++) {
#define LOGGED(column) logged(out, column, STEPS, i, i + 1)
            double accuracy = LOGGED(2), kl = LOGGED(6);
            EXPECT(LOGGED(1) == accuracy && LOGGED(3) == 0, "step %zu: reward %g", i, LOGGED(1));
            EXPECT(LOGGED(8) == (accuracy == 0 || accuracy == 1), "step %zu: accuracy %g, flat %g",
                   i, accuracy, LOGGED(8));
            EXPECT(never && i ? kl > 0 : kl == 0, "step %zu: KL %g of a reference that is the "
                   "policy of %s step", i, kl, never ? "the first" : "this");
        }
        double entropy = logged(out, 5, STEPS, 0, 1); // five letters and the end, alike
        EXPECT(fabs(entropy - log(6)) < 0.2, "entropy %.3f at first", entropy);
        Model was = model_load(model, 0), is = model_load(out, 0);
        EXPECT(!memcmp(was.layer[1].router_bias, is.layer[1].router_bias,
                       was.config.E * sizeof(accum)), "RL moved a router's bias");
        model_free(&was);
        model_free(&is);
    }
}

static size_t count_of(const char *text, const char *what)
{
    size_t n = 0;
    for (; (text = strstr(text, what)); text++) n++;
    return n;
}

// Three steps, reward and accuracy rising, length and entropy falling, KL at rest, one test.
static void test_rl_plot(void)
{
    static const char rows[] = "step,reward,accuracy,format,length,entropy,kl\n"
        "1,0,0,0,30,1,0,0,0,0,,1,1,1\n2,1,0.5,0.5,20,0.5,0,0,0,0,0.5,2,1,1\n"
        "3,2,1,1,10,0,0,0,0,0,,3,1,1\n";
    static const struct { const char *what; size_t times; } lines[] = {
        {"d=\"M0 120.0h0L120 60.0h0L240 0.0h0\"", 2}, {"d=\"M0 0.0h0L120 60.0h0L240 120.0h0\"", 2},
        {"d=\"M0 60.0h0L120 60.0h0L240 60.0h0\"", 1}, {"class=\"dots\" d=\"M120 60.0h0\"", 1},
        {"y=\"9\">2</text>", 1}, {"y=\"9\">100</text>", 1}, {"y=\"120\">10</text>", 1},
        {">step 1</text>", 5}, {">3</text>", 5}, {"translate(370,240)", 1},
    };
    char *run = in_directory("plot"), *shown = in_directory("shown"), *end;
    size_t n;
    make_directory(run);
    write_text(in_path(run, "log.csv"), rows);
    fflush(stdout);
    int here = dup(1), there = open(shown, O_WRONLY | O_CREAT | O_TRUNC, 0600);
    REQUIRE(here >= 0 && there >= 0, "no file to print to");
    dup2(there, 1);
    rl_plot(run);
    fflush(stdout);
    dup2(here, 1);
    close(here), close(there);
    char *svg = file_text(in_path(run, "curve.svg"), &n), *text = file_text(shown, &n);
    for (size_t i = 0; i < sizeof lines / sizeof *lines; i++)
        EXPECT(count_of(svg, lines[i].what) == lines[i].times, "curve.svg has %zu times %s",
               count_of(svg, lines[i].what), lines[i].what);
    const char *top = label("  100.0 +.%58s*+ 30.0\n", "");
    const char *low = label("    0.0 +*%58s.+ 10.0\n", "");
    const char *middle = label("   50.0 +%30so%29s+ 20.0\n", "", "");
    EXPECT(strstr(text, top) && strstr(text, middle) && strstr(text, low), "'%s'", text);
    EXPECT((end = strstr(text, "step")) && strspn(text + (end - text) - 28, "1 ") >= 28 &&
           strstr(end, " 3\n"), "the axis of '%s'", text);
}

// Who does not read what is written to it is not waited for longer than --patience.
static void test_program_tell(void)
{
    int to[2];
    size_t told = 0;
    char text[1001], got[1001] = "";
    REQUIRE(!pipe(to), "no pipe");
    memset(text, 'x', 1000), text[1000] = 0;
    fcntl(to[1], F_SETFL, O_NONBLOCK);
    EXPECT(program_tell(to[1], 50, text) && read(to[0], got, 1000) == 1000 && !strcmp(got, text),
           "'%.9s' came instead of '%.9s'", got, text);
    double start = now();
    while (told < 1 << 20 && program_tell(to[1], 50, text)) told++;
    EXPECT(told > 0 && told < 1 << 20 && now() - start < 5, "%zu texts nobody read, in %.1f s",
           told, now() - start);
    close(to[0]);
    void (*before)(int) = signal(SIGPIPE, SIG_IGN);
    EXPECT(!program_tell(to[1], 50, text), "nobody is there, and it was told");
    signal(SIGPIPE, before);
    close(to[1]);
}

// A run stopped and resumed ends as one that was not, to the last bit, the reference with it.
static void test_rl_resume(void)
{
    char *model = babbling_model("rl-resume-base", 128);
    const char *ask = "while echo question; do :; done 2>/dev/null"; // the same again when resumed
    for (int variant = 0; variant < 2; variant++) {
        char *out[2];
        for (int stopped = 0; stopped < 2; stopped++) {
            out[stopped] = in_directory(label("rl-%d-%d", variant, stopped));
            expect_success(RL("--model", model, "--out", out[stopped], "--steps", "7", "--kl",
                              "0.01", "--ref-every", "3", "--save-every", "2",
                              "--optimizer", variant ? "muon" : "adamw", "--minibatches", "2",
                              "--epochs", "2", "--size", "2-4", "--task", "sort", "--stop-after",
                              stopped ? "5" : "0", variant ? NULL : "--test", "0", "--task-cmd",
                              ask, "--verify-cmd", judges));
        }
        EXPECT(saved_step(out[1]) == 5, "saved step %zu, not 5", saved_step(out[1]));
        expect_success(ARGS("rl", "--resume", out[1], "--threads", "1"));
        for (size_t i = 0; i < 2; i++) {
            size_t n[2];
            const char *x = file_text(in_path(out[0], run_files[i]), &n[0]);
            const char *y = file_text(in_path(out[1], run_files[i]), &n[1]);
            EXPECT(n[0] == n[1] && !memcmp(x, y, n[0]), "%s differs", run_files[i]);
        }
        for (size_t column = 1; column < 11; column++)
            EXPECT(logged(out[0], column, 7, 0, 7) == logged(out[1], column, 7, 0, 7),
                   "column %zu of log.csv differs", column);
        EXPECT(variant || (logged(out[0], 6, 7, 0, 3) > 0 && logged(out[0], 9, 7, 0, 7) > 0),
               "there is no divergence or no gradient");
    }
    char *run = in_directory("rl-0-0"), *train = tiny_run("rl-train", "1");
    expect_error(2, "another command", ARGS("train", "--resume", run));
    expect_error(2, "another command", ARGS("rl", "--resume", train));
    expect_error(2, "larger --steps", ARGS("rl", "--resume", run));
}

static void test_rl_options(void)
{
    char *model = babbling_model("rl-options", 128), *small = babbling_model("rl-small", 127);
    char *out = in_directory("rl-refused");
#define RL_REFUSED(says, ...) expect_error(2, says, RL("--model", model, "--out", out, __VA_ARGS__))
    REFUSED("--model", "rl");
    REFUSED("vocabulary of 127", "rl", "--model", small, "--out", out);
    RL_REFUSED("--group", "--group", "1");
    RL_REFUSED("--group", "--group", "0");
    RL_REFUSED("--questions", "--questions", "0");
    RL_REFUSED("--steps", "--steps", "0");
    RL_REFUSED("--max-tokens", "--max-tokens", "0");
    RL_REFUSED("--max-tokens", "--max-tokens", "49", "--max-prompt", "16");
    RL_REFUSED("--max-prompt", "--max-tokens", "1", "--max-prompt", "0");
    RL_REFUSED("larger --max-prompt", "--max-prompt", "1");
    RL_REFUSED("--temperature", "--temperature", "0");
    RL_REFUSED("--minibatches", "--minibatches", "0");
    RL_REFUSED("--minibatches", "--minibatches", "9");
    RL_REFUSED("--epochs", "--epochs", "0");
    RL_REFUSED("--optimizer", "--optimizer", "sgd");
    RL_REFUSED("--kl", "--kl", "-1");
    RL_REFUSED("nosuch", "--task", "nosuch");
    RL_REFUSED("--verify-cmd", "--task-cmd", "yes");
    RL_REFUSED("--task-cmd", "--verify-cmd", "cat");
    RL_REFUSED("UTF-8", "--task-cmd", "echo \xff", "--verify-cmd", "cat");
    RL_REFUSED("--speculate", "--speculate");
    static const char *const bad[] = {"0", "9", "4-2", "x", "3-", "-3", "3x", "2-9", "1 2", ""};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        RL_REFUSED("--size", "--size", bad[i]);
        REFUSED("--size", "task", "--size", bad[i]);
    }
    RL_REFUSED("--size", "--task", "mul", "--size", "5");
    RL_REFUSED("--size", "--task", "countdown", "--size", "1");
    REFUSED("nosuch", "task", "--task", "nosuch");
    REFUSED("--task-cmd", "task", "--task-cmd", "yes");
    EXPECT(access(out, F_OK), "something was made where nothing should be");
    expect_error(1, "larger --max-prompt", RL("--model", model, "--out", out, "--max-prompt", "3",
                                              "--max-tokens", "1"));
}

// A run whose programs end or say what they should not, after `steps` steps: one line says so, what
// was done is saved, and goes on with others in their place.
static void check_rl_ends(const char *model, const char *name, size_t steps, const char *task,
                          const char *verify, const char *says)
{
    char *out = in_directory(name);
    expect_error(1, says, RL("--model", model, "--out", out, "--task-cmd", task, "--verify-cmd",
                             verify, "--test", "0"));
    int saved = !access(in_path(out, run_files[0]), F_OK);
    EXPECT(saved == (steps > 0), "%s: saved %d", name, saved);
    if (!saved || !steps) return;
    EXPECT(saved_step(out) == steps, "%s: saved step %zu, not %zu", name, saved_step(out), steps);
    expect_success(ARGS("rl", "--resume", out, "--task-cmd", asks, "--verify-cmd", judges,
                        "--threads", "1", "--stop-after", label("%zu", steps + 2)));
    EXPECT(saved_step(out) == steps + 2, "%s: went on to step %zu", name, saved_step(out));
    logged(out, 0, steps + 2, 0, 1);
}

#define UP_TO(n, what) "i=0; while [ $i -lt " #n " ]; do i=$((i+1)); " what "; done"

static void test_rl_programs(void)
{
    char *model = babbling_model("rl-programs", 128);
    const char *ones = "while read -r l; do echo 1; done", *question = "--task-cmd";
    const char *answer = "--verify-cmd", *go_on = "moe rl --resume";
    check_rl_ends(model, "asks-nothing", 0, "true", ones, question);
    check_rl_ends(model, "asks-not", 0, "/nonexistent 2>/dev/null", ones, question);
    check_rl_ends(model, "asks-a-little", 4, UP_TO(11, "echo \"q$i\""), ones, question);
    check_rl_ends(model, "asks-to-go-on", 4, UP_TO(11, "echo \"q$i\""), ones, go_on);
    check_rl_ends(model, "asks-a-tab", 0, UP_TO(999, "printf \"$i\\tb\\n\""), ones, question);
    check_rl_ends(model, "asks-too-much", 0, UP_TO(99, "printf '%3000d\\n' $i"), ones, question);
    check_rl_ends(model, "asks-too-long", 4, label("%s; %s", UP_TO(11, "echo \"q$i\""),
                                                   UP_TO(99, "printf '%40d\\n' $i")),
                  ones, "larger --max-prompt");
    check_rl_ends(model, "asks-no-end", 0, "printf abc", ones, question);
    check_rl_ends(model, "says-nothing", 0, asks, "true", answer);
    check_rl_ends(model, "says-so-much", 2, asks, UP_TO(20, "read -r l; echo 1"), answer);
    check_rl_ends(model, "says-more", 2, asks, UP_TO(20, "read -r l; echo 1"), go_on);
    static const char *const nonsense[] = {"nonsense", "", "nan", "inf", "1 2", "1x", "1e999",
                                             "1e10"};
    for (size_t i = 0; i < sizeof nonsense / sizeof *nonsense; i++)
        check_rl_ends(model, label("says-%zu", i), i == 1, asks,
                      label("%s; while read -r l; do echo '%s'; done",
                            i == 1 ? UP_TO(8, "read -r l; echo -0.5e1") : ":", nonsense[i]),
                      answer);
}

// Waits a second for the program to end; ends it if it does not. Returns whether it did.
static int ends(pid_t child)
{
    siginfo_t info;
    for (int i = 0; i < 100; i++, sleep_for(0.01)) {
        info.si_pid = 0;
        if (waitid(P_PID, (id_t)child, &info, WEXITED | WNOHANG | WNOWAIT) || info.si_pid) return 1;
    }
    kill(child, SIGKILL);
    return 0;
}

// What asks and what judges end with the run, but not by a Ctrl-C that is meant for the run; and a
// question that is always the same, so that none is for testing, is not waited for without end.
static void test_rl_programs_end(void)
{
    char *model = babbling_model("rl-ends", 128), *out = in_directory("rl-ends-out");
    char *pid = in_directory("pid");
    const char *ones = "while read -r l; do echo 1; done";
    size_t n;
    int open_in_them[2], waits = 0; // a pipe that ends when the last of them does
    REQUIRE(!pipe(open_in_them), "no pipe");
    expect_success(RL("--model", model, "--out", out, "--steps", "1", "--test", "0", "--verify-cmd",
                      ones, "--task-cmd", label("echo $$ >%s; while :; do echo question; done "
                                                "2>/dev/null", pid)));
    close(open_in_them[1]);
    fcntl(open_in_them[0], F_SETFL, O_NONBLOCK);
    while (read(open_in_them[0], &n, 1) < 0 && waits < 200) sleep_for(0.01), waits++;
    close(open_in_them[0]);
    EXPECT(waits < 200, "--task-cmd goes on when the run has ended");
    pid_t asking = (pid_t)atol(file_text(pid, &n));
    if (waits == 200 && asking > 1) kill(asking, SIGKILL);
    pid_t child = start_moe(RL("--model", model, "--out", out, "--steps", "1", "--verify-cmd", ones,
                               "--task-cmd", "while echo question; do :; done 2>/dev/null"));
    EXPECT(ends(child), "one question without end is waited for");
    end_moe(child);
    expect_error(2, "--kl", ARGS("rl", "--resume", out, "--steps", "2", "--kl", "0.1"));
    expect_success(RL("--model", model, "--out", out, "--steps", "1", "--test", "0", "--verify-cmd",
                      label("kill -INT $$; %s", ones), "--task-cmd",
                      label("kill -INT $$; %s 2>/dev/null", UP_TO(99, "echo $i"))));
}

// moe task writes questions to train on, with answers as good as asked for.
static void test_task(void)
{
    static const char *const size[TASKS] = {"1-8", "1-4", "2-6", "1-8", "1-9"};
    for (int task = 0; task < TASKS; task++) {
        char *texts[4];
        for (int i = 0; i < 4; i++) { // the default; again; with another seed; all right
            Ran r = expect_success(ARGS("task", "--task", task_names[task], "--size", size[task],
                                        "--lines", "200", "--seed", i == 2 ? "2" : "1",
                                        i == 3 ? "--worked" : NULL, "0.5", "--right", "1",
                                        "--slips", "0"));
            size_t lines = 0, right = 0, thought = 0;
            char *end;
            texts[i] = (char *)room(strlen(r.out) + 1, 1);
            strcpy(texts[i], r.out);
            for (char *line = r.out; (end = strchr(line, '\n')); line = end + 1, lines++) {
                char *answer = strchr(line, '\t');
                Question q;
                *end = 0;
                REQUIRE(answer && answer < end, "'%s' has no tab", line);
                *answer++ = 0;
                REQUIRE(parse_question(&q, task, line) && !is_for_testing(&q), "asks '%s'", line);
                Reward reward = judge(&q, answer);
                EXPECT(reward.format == 1 && (i < 3 || reward.accuracy == 1), "%s: '%s'", line,
                       answer);
                right += reward.accuracy == 1;
                thought += !strstr(answer, "<think></think>");
            }
            EXPECT(lines == 200, "%zu lines", lines);
            EXPECT(i == 3 || (right > 50 && right < 150), "%s: %zu of 200 are right",
                   task_names[task], right);
            EXPECT(i == 3 ? thought > 70 && thought < 130 : thought > 25 && thought < 75,
                   "%s: %zu of 200 think", task_names[task], thought);
        }
        EXPECT(!strcmp(texts[0], texts[1]) && strcmp(texts[0], texts[2]), "%s: not by the seed",
               task_names[task]);
    }
    REFUSED("a line of more than", "task", "--task", "columns", "--slips", "1", "--lines", "1");
}
#endif // not MOE_DOUBLE

// ------------------------------------------------------------------------------------------------
// The list

typedef struct {
    const char *name;
    void (*run)(void);
} Test;

#define TEST(name) {#name, test_##name},
#ifdef MOE_DOUBLE
#define BOTH(name) {#name "_double", test_##name}, // a test of both builds
#else
#define BOTH(name) {#name, test_##name},
#endif
static const Test tests[] = {
#ifdef MOE_DOUBLE
    TEST(matmul_gradient) TEST(rmsnorm_gradient) TEST(swiglu_gradient) TEST(gate_up_gradient)
    TEST(embedding_crop_gradient) TEST(rope_gradient) TEST(yarn) TEST(attention_gradient)
    TEST(router_gradient) TEST(balance_gradient) TEST(dispatch_combine_gradient)
    TEST(cross_entropy_gradient) TEST(model_gradient) TEST(model_gradient_routing)
    TEST(model_gradient_t1) TEST(mtp_depths) TEST(parameters) TEST(model_gradient_accumulates)
    TEST(model_gradient_begins_anew)
    TEST(broken_backward_is_seen) TEST(golden_weights)
#else
    TEST(gemm) TEST(gemm_bits) TEST(fast_exp) TEST(attention) TEST(meters) TEST(threads_same_bits)
    TEST(decode_team)
#endif
    BOTH(pytorch_mla) BOTH(pytorch_moe) BOTH(pytorch_v3) BOTH(pytorch_yarn)
#ifdef MOE_DOUBLE
    TEST(newton_schulz) TEST(adamw) TEST(muon)
#endif
    BOTH(latent_attention) BOTH(decode) BOTH(window) BOTH(generate)
#ifdef MOE_DOUBLE
    TEST(group_advantages) TEST(grpo_loss) TEST(grpo_gradient)
#endif
    BOTH(rollout_logp)
#ifndef MOE_DOUBLE
    TEST(rollout_draw) TEST(questions) TEST(questions_for_testing) TEST(solutions)
    TEST(rename_columns) TEST(line_start) TEST(judge)
    TEST(rollout_answer)
    TEST(generate_trained) TEST(sample_token) TEST(json) TEST(save_load) TEST(load_dtypes_shards)
    TEST(load_fp8) TEST(damaged_weights) TEST(damaged_config) TEST(rope_parameters)
    TEST(sizes_beyond_int) TEST(window_start) TEST(schedule) TEST(worst_load) TEST(text_loss)
    TEST(answers_only)
    TEST(command_line_errors) TEST(help) TEST(train_and_use) TEST(check_dump) TEST(check_routing)
    TEST(resume_is_exact) TEST(seq_warmup) TEST(killed_while_saving) TEST(disk_full)
    TEST(read_only_directory) TEST(signals) TEST(run_directory) TEST(not_finite)
    TEST(memory_refused) TEST(plan)
    TEST(plan_options) TEST(bench) TEST(right_at_times) TEST(rl) TEST(rl_log) TEST(rl_plot)
    TEST(program_tell) TEST(rl_resume) TEST(rl_options) TEST(rl_programs) TEST(rl_programs_end)
    TEST(task)
#endif
};

// Runs the tests of this build that `names` has, or all if it is empty, and counts them. With
// list only prints their names. Counts in found how many names are tests of this build.
static void run_tests(char **names, int list, int *passed, int *failed, int *found)
{
    for (size_t i = 0; i < sizeof tests / sizeof *tests; i++) {
        int wanted = !*names;
        for (char **name = names; *name; name++)
            if (!strcmp(*name, tests[i].name)) wanted = 1, ++*found;
        if (list) printf("%s\n", tests[i].name);
        if (list || !wanted) continue;
        test_name = tests[i].name;
        failures = 0, worst = 0, *remark = 0;
        hold_routing = 0;
        use_threads(1); // small sizes; test_threads_same_bits has more
        double start = now();
        tests[i].run();
        hold_routing = 0;
        if (!failures) {
            printf("ok   %-28s %5.2f s", test_name, now() - start);
            if (worst > 0) printf("  worst %.1e", worst);
            printf("%s%s\n", *remark ? "  " : "", remark);
        } else if (failures > 5) {
            printf("FAIL %s: %d more\n", test_name, failures - 5);
        }
        fflush(stdout);
        ++*(failures ? failed : passed);
        while (keeps) free(kept[--keeps]);
    }
}

void run_double_tests(char **names, int list, int *passed, int *failed, int *found);

#ifdef MOE_DOUBLE
void run_double_tests(char **names, int list, int *passed, int *failed, int *found)
{
    run_tests(names, list, passed, failed, found);
}
#else
static void clean_up(void) { remove_all(directory); }

int main(int argc, char **argv)
{
    int passed = 0, failed = 0, found = 0, list = argc > 1 && !strcmp(argv[1], "--list");
    char **names = argv + (argc > 0) + list;
    const char *where = getenv("TMPDIR") && *getenv("TMPDIR") ? getenv("TMPDIR") : "/tmp";
    snprintf(directory, sizeof directory, "%s/test_moe.XXXXXX", where);
    if (!list && !mkdtemp(directory)) die(FAILED, "%s: %s", directory, strerror(errno));
    if (!list) atexit(clean_up);
    run_double_tests(names, list, &passed, &failed, &found);
    run_tests(names, list, &passed, &failed, &found);
    if (list) return 0;
    if (found < argc - 1) die(BAD_INPUT, "only %d of these are tests; --list prints all", found);
    printf("%d passed, %d failed\n", passed, failed);
    return failed > 0;
}
#endif
