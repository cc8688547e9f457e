/*
cuda_on_cpu.h: compile a CUDA file with an ordinary C++ compiler, run its kernels on the CPU, and be
told what a GPU would not have forgiven.

    g++ -x c++ -std=c++17 -O2 -Wno-unknown-pragmas -I.ci moe.cu -o moe_emu
                                     (or clang++; -g -O0 to step through it; the pragma is unroll)

How a block runs. A CUDA thread is a coroutine: a stack of its own and a place where it stopped. All
threads of a block take turns on one CPU core, and a turn ends only where CUDA threads meet:

    thread 0  ----> __syncthreads .                 ----> __shfl_sync .            ----> return
    thread 1        ----> __syncthreads .                 ----> __shfl_sync .
    thread 2              ----> __syncthreads (the last: all go on)   ----> ...

Between two meetings a thread runs alone and to the end, so a forgotten barrier cannot hide behind
luck: those before see nothing of those after. A thread that never meets another is a plain function
call on a stack that is there already. Blocks run one after the other, so a kernel in which a block
spins until another one has done something never ends here.

What is caught, each with one line on stderr and exit status 1:
  - host code that touches device memory. Its pages are closed; a kernel or a cuda* copy opens those
    it touches, 256 KiB at a time, through the page fault, and they are closed again after it.
  - out of bounds: an allocation ends where its last page ends, and the page after it, like the page
    before it, is never open. Nor is freed memory, which is not used again. The few bytes between an
    allocation and its page's edge are looked at after each launch. Shared arrays are kept likewise.
  - reads of what was not written: fresh memory, and shared memory as each block starts, is 0xff
    throughout, a NaN as float and bfloat16, -1 as an integer.
  - a barrier, shuffle or vote that not all threads reach that should, or at different lines; an
    mbarrier that a thread waits for in vain; a shuffle from a lane outside the mask; a host pointer
    as an argument of a kernel (not inside a struct); misaligned vectors, where the compiler uses
    the instructions that fault (-O1 and up).
  - a missing barrier or a race, by its result: EMU_ORDER (or emu_order("...")) says in which order
    blocks, warps and lanes run: "forward" (if nothing is said), "reverse", "shuffle:SEED", or
    "agree", which runs every launch in all three from the same memory and demands the same bytes
    (what float atomics added to may differ by rounding). An integer that is counted up without an
    atomic comes out right in any order; cuda_race.h, included with -fsanitize=thread, finds that.

In gdb:   gdb -ex 'handle SIGSEGV nostop noprint' -ex 'break emu::fail' --args ./moe_emu ...
    `break some_kernel if threadIdx.x == 5 && blockIdx.x == 1`, then `next` as usual: it stays with
    this thread, over barriers too. threadIdx and blockIdx are ordinary variables; emu::m.all[7]
    tells where thread 7 waits; from emu::fail, `up` leads to the kernel's line.

What the file written for it must do: launch by LAUNCH(kernel, grid, block, shared_bytes, ...);
declare shared memory by SHARED(float, tile, [16][17]) and DYNAMIC_SHARED(float, scratch), each at a
multiple of 16 bytes, the latter of 1024 if it has as many; and take the PTX helpers (mma_16x8x16,
ldmatrix_*, cp_async_*, and Hopper's tensor_map, tma_load, mbarrier_*, wgmma*) from here where
__CUDACC__ is not defined.

More settings, to test what a program does with what it finds: EMU_DEVICES=0 (no GPU),
EMU_DRIVER=11080 (a driver too old), EMU_CC=61 (compute capability 6.1), EMU_MEMORY=BYTES (of the
device, 8 GiB if nothing is said).
*/
#ifndef CUDA_ON_CPU_H
#define CUDA_ON_CPU_H

#ifdef MOE_MPI
#define MPICH_SKIP_MPICXX // C's functions only
#define OMPI_SKIP_MPICXX
#include <mpi.h>
#endif
#include <signal.h>
#include <sys/mman.h>
#include <time.h>
#include <ucontext.h>
#include <unistd.h>
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <list>
#include <map>
#include <numeric>
#include <tuple>
#include <type_traits>
#include <unordered_map>
#include <vector>

#ifdef __has_feature // clang; gcc defines the others
#if __has_feature(address_sanitizer)
#define __SANITIZE_ADDRESS__ 1
#elif __has_feature(thread_sanitizer)
#define __SANITIZE_THREAD__ 1
#endif
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

// ------------------------------------------------------------------- the words and types of CUDA

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __shared__ static // works, but neither poisoned nor guarded: prefer SHARED

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
#define EMU_VECTORS(T, name, align) \
    struct alignas(2 * sizeof(T)) name##2 { T x, y; }; \
    struct name##3 { T x, y, z; }; \
    struct alignas(align) name##4 { T x, y, z, w; }; \
    inline name##2 make_##name##2(T x, T y) { return {x, y}; } \
    inline name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; } \
    inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
EMU_VECTORS(unsigned, uint, 16)
EMU_VECTORS(float, float, 16)
EMU_VECTORS(int, int, 16)
EMU_VECTORS(double, double, 16)
EMU_VECTORS(unsigned short, ushort, 8)
EMU_VECTORS(unsigned char, uchar, 4)

// Variables of the thread that runs now. They are set again each time it goes on.
inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
constexpr int warpSize = 32;

// A matrix x[rows, cols] in device memory, of which tma_load takes box_rows rows of 64 numbers.
struct __nv_bfloat16; // see cuda_names.h
struct TensorMap {
    const __nv_bfloat16 *x;
    size_t rows, cols, ld; // from row to row
    int box_rows;
};

#define EMU_HERE int line = __builtin_LINE() // a last parameter: the caller's line

// ---------------------------------------------------------------------------------- the machine

namespace emu {

inline const size_t PAGE = (size_t)sysconf(_SC_PAGESIZE); // 4, 16 or 64 KiB
constexpr size_t GRANULE = 256 << 10; // what a fault opens
constexpr size_t STATIC_SHARED = 48 << 10, MAX_SHARED = 227 << 10; // a block's: unasked, at most
constexpr size_t STACK = 256 << 10; // a thread's: address space, memory only where it is used

// What cudaMalloc gave: the pages low..high, of which `size` bytes from data on are the user's and
// end less than 16 bytes before high. The page before low and the one at high are never open.
struct Allocation {
    char *low, *high, *data;
    size_t size;
    int number, line;
    bool freed = false;
    const char *name = "";
    std::vector<char> granule; // of each: closed, readable or writable now
};
enum { CLOSED, READABLE, WRITABLE };

// A granule that a launch wrote, while orders are compared: its bytes before and after the first.
struct Written { Allocation *of; size_t granule; std::vector<char> before, after; };

// Where a coroutine stopped: the stack pointer, under which its registers lie.
struct Context {
    void *sp = nullptr, *fake_stack = nullptr;
    const void *stack = nullptr;
    size_t size = 0;
};

struct Copy { void *to; const void *from; bool valid; int group; }; // a cp.async under way

struct Thread { // a CUDA thread of the block that runs now
    enum State { FRESH, RUNNING, BARRIER, WARP, MBARRIER, RETURNED } state;
    Context *context;
    uint3 id;
    const char *what; // it waits in, at this line
    int line, copy_group, wgmma_group;
    bool fenced; // by wgmma_fence
    size_t mbarrier; // it waits for
    std::vector<Copy> copies;
};

struct Load { // a tma_load under way
    char *to;
    TensorMap map;
    int col, row;
    size_t mbarrier;
    Thread *thread;
};

// What a warp has seen of the others, and an mbarrier of those that arrived: of warp w all until
// its clock was clock[w]. A warp's own goes on as it arrives. TMA is warp 32. For cuda_race.h.
struct Clocks {
    uint16_t of[33];
    void see(const Clocks &c) { for (int i = 0; i < 33; i++) if (of[i] < c.of[i]) of[i] = c.of[i]; }
};

struct Mbarrier {
    uint64_t *at; // there MBARRIER + its number stands
    int count, left, bytes; // arrivals of a phase; those and the bytes that this one lacks
    unsigned phase;
    Thread *by; // who initialised it and
    bool fenced; // called mbarrier_init_done
    Clocks clocks, ended; // of this phase so far, of the last
    unsigned seen[32];    // by each warp: this phase
};
constexpr uint64_t MBARRIER = 0x6d62617272696572;

struct Operands { // of wgmma, in shared memory; if a is null it is in registers
    const char *a, *b;
    int n, next; // columns / 8; bytes between blocks of 64 of them
    bool a_t, b_t, add;
    int line;
};
struct Wgmma : Operands { // a warp's part, under way
    float *d[32];
    unsigned registers[32][4];
    int group;
};

struct Warp { // masks have a bit for each lane, `ready` one for each place in the order of lanes
    unsigned ready, waiting, mask[32], syncs; // how often it passed __syncwarp
    uint64_t value[32], result[32];
    int argument[32], width[32];
    float *d[32]; // the operands of mma, ldmatrix and wgmma
    unsigned *a[32], *b[32];
    std::vector<Wgmma> wgmmas;
    int wgmma_until; // it waits for the groups before this one
    bool put_off;    // which are still to be done
    Clocks clocks;
};

// at(i) for i in 0..n-1 takes each of 0..n-1 once: forwards, backwards or somehow.
struct Order {
    uint64_t a = 1, b = 0, n = 1;
    uint64_t at(uint64_t i) const { return (a * i + b) % n; }
};

struct Shared { // a shared array: its own pages, filled with 0xff as each block starts
    char *low = nullptr, *high = nullptr, *data = nullptr;
    size_t size = 0, room = 0;
    uint64_t block = 0; // that it was last made ready for
    const char *name = "";
    char *get();
    void resize(size_t bytes);
};

struct Machine {
    // Memory
    std::map<uintptr_t, Allocation> allocations; // by the address of the guard page after
    std::vector<Allocation *> opened;
    std::vector<Written> written;
    std::unordered_map<const void *, double> float_sums; // |values| that float atomics added
    size_t used = 0, limit = (size_t)8 << 30;
    int numbers = 0, error = 0;
    int open = 0; // inside a launch or a copy
    // The launch
    const char *kernel = nullptr, *file = "";
    int line = 0;
    void (*body)(const void *) = nullptr;
    const void *arguments = nullptr;
    std::vector<std::function<void()>> *recorded = nullptr; // see cudaStreamBeginCapture
    // The order
    enum { FORWARD, REVERSE, SHUFFLE, AGREE } order = FORWARD, now = FORWARD;
    uint64_t seed = 1, random = 1;
    Order blocks;
    unsigned char warp_at[32], lane_at[32], place_of[32];
    // The block
    uint64_t block = 0, blocks_begun = 0;
    unsigned threads = 0, warp_count = 0, warp_place = 0, arrived = 0, returned = 0;
    unsigned barriers = 0; // passed
    unsigned votes = 0, counted = 0; // for the next barrier, for the last
    int barrier_line = 0;
    Thread *thread = nullptr; // that runs now; null outside kernels
    Thread all[1024];
    Warp warp[33]; // the last for cuda_race.h: TMA
    std::vector<Mbarrier> mbarriers;
    std::vector<Load> loads;
    Shared dynamic;
    std::map<const void *, size_t> shared_limit;
    std::vector<Shared *> shared; // static arrays of this block
    size_t static_shared = 0;
    // The coroutines
    Context host, *context = &host;
    std::vector<Context *> idle;
    std::list<Context> stacks;
    // Races: see cuda_race.h
    void (*access)(const void *p, size_t size, bool write) = nullptr;
    int atomic = 0, collective = 0, tma = 0, quiet = 0; // what is going on now
    uint64_t first_block = 0; // of this launch
};
inline Machine m;

struct Count { // counts up while it lives
    int &n;
    explicit Count(int &i) : n(i) { n++; }
    ~Count() { n--; }
};

[[noreturn]] __attribute__((noinline, format(printf, 1, 2)))
inline void fail(const char *format, ...)
{
    char text[1024];
    va_list list;
    va_start(list, format);
    int n = vsnprintf(text, sizeof text, format, list);
    va_end(list);
    if (m.kernel && n < 500) n += snprintf(text + n, 200, " [in %s", m.kernel);
    if (m.kernel && m.line && n < 700) n += snprintf(text + n, 200, ", from %s:%d", m.file, m.line);
    if (m.thread && n < 900)
        n += snprintf(text + n, 100, ", block (%u,%u,%u), thread (%u,%u,%u)", blockIdx.x,
                      blockIdx.y, blockIdx.z, m.thread->id.x, m.thread->id.y, m.thread->id.z);
    if (m.kernel && n < 1000) strcpy(text + n, "]");
    fflush(stdout);
    fprintf(stderr, "cuda_on_cpu: %s\n", text);
    _exit(1);
}

inline char *map_pages(size_t bytes) // closed ones
{
    void *p = mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) fail("mmap of %zu bytes failed", bytes);
    return (char *)p;
}

inline size_t round_up(size_t n, size_t unit) { return (n + unit - 1) / unit * unit; }

// The allocation an address belongs to, guard pages included.
inline Allocation *find(const void *p)
{
    auto it = m.allocations.upper_bound((uintptr_t)p);
    if (it == m.allocations.end() || (char *)p < it->second.low - PAGE) return nullptr;
    return &it->second;
}

inline const char *describe(const Allocation &a)
{
    static char text[160];
    snprintf(text, sizeof text, "allocation %d%s%s, which has %zu bytes (cudaMalloc at line %d)",
             a.number, *a.name ? " " : "", a.name, a.size, a.line);
    return text;
}

inline void open_granule(Allocation *a, size_t g, bool write)
{
    char *from = a->low + g * GRANULE, *to = from + GRANULE < a->high ? from + GRANULE : a->high;
    bool touched = false;
    for (char s : a->granule) touched |= s != CLOSED;
    if (!touched) m.opened.push_back(a);
    if (a->granule[g] == CLOSED && !write) {
        a->granule[g] = READABLE;
        mprotect(from, to - from, PROT_READ);
        return;
    }
    a->granule[g] = WRITABLE;
    mprotect(from, to - from, PROT_READ | PROT_WRITE);
    if (m.order == Machine::AGREE && m.thread) {
        std::vector<char> bytes(from, to);
        m.written.push_back({a, g, bytes, bytes});
    }
}

inline const char *not_poison(const char *from, const char *to) // the first byte that is not 0xff
{
    static const std::vector<char> ff(PAGE, (char)0xff);
    if (from == to || !memcmp(from, ff.data(), (size_t)(to - from))) return nullptr;
    while (*from == (char)0xff) from++;
    return from;
}

inline void check_edges(const Allocation &a)
{
    const char *p = not_poison(a.low, a.data);
    if (!p) p = not_poison(a.data + a.size, a.high);
    if (p) fail("out of bounds: byte %td was written of %s", p - a.data, describe(a));
}

struct Open { // while one lives, device memory can be touched
    Open() { m.open++; }
    ~Open()
    {
        if (m.open > 1) { m.open--; return; }
        for (Allocation *a : m.opened) {
            if (a->granule[0] == WRITABLE || a->granule.back() == WRITABLE) check_edges(*a);
            memset(a->granule.data(), CLOSED, a->granule.size());
            mprotect(a->low, a->high - a->low, PROT_NONE);
        }
        m.opened.clear();
        m.open = 0, m.kernel = nullptr;
    }
};

inline struct sigaction old_action[2];

inline void page_fault(int signal, siginfo_t *info, void *context)
{
    char *p = (char *)info->si_addr;
    bool write = false; // unknown: then a write faults twice
#if defined __linux__ && defined __x86_64__
    write = ((ucontext_t *)context)->uc_mcontext.gregs[REG_ERR] & 2;
#else
    (void)context;
#endif
    Allocation *a = find(p);
    if (a && !a->freed && p >= a->low && p < a->high && m.open &&
        a->granule[(p - a->low) / GRANULE] != WRITABLE)
        return open_granule(a, (p - a->low) / GRANULE, write);
    if (a && a->freed) fail("use after cudaFree: byte %td of %s", p - a->data, describe(*a));
    if (a && (p < a->data || p >= a->data + a->size))
        fail("out of bounds: byte %td of %s", p - a->data, describe(*a));
    if (a) fail("host code touched device memory: byte %td of %s", p - a->data, describe(*a));
    for (Shared *s : m.shared)
        if (p >= s->low - PAGE && p < s->high + PAGE)
            fail("out of bounds: byte %td of shared %s, which has %zu", p - s->data, s->name,
                 s->size);
    for (const Context &c : m.stacks)
        if (p >= (char *)c.stack - PAGE && p < (char *)c.stack) fail("a thread's stack overflowed");
#ifdef __x86_64__
    if (m.thread && info->si_code == SI_KERNEL)
        fail("a misaligned vector, or an address beyond any memory");
#endif
    if (m.thread && signal == SIGBUS) fail("a misaligned vector at %p", (void *)p);
    if (m.thread) fail("wild address %p", (void *)p);
    sigaction(signal, &old_action[signal == SIGBUS], nullptr); // not ours: fault again, without us
}

inline uint64_t setting(const char *name, uint64_t otherwise)
{
    const char *s = getenv(name);
    return s && *s ? strtoull(s, nullptr, 10) : otherwise;
}

inline void set_order(const char *s)
{
    m.seed = 1;
    if (!s || !*s || !strcmp(s, "forward")) m.order = Machine::FORWARD;
    else if (!strcmp(s, "reverse")) m.order = Machine::REVERSE;
    else if (!strcmp(s, "agree")) m.order = Machine::AGREE;
    else if (!strncmp(s, "shuffle", 7)) m.order = Machine::SHUFFLE, m.seed = s[7] ? atoi(s + 8) : 1;
    else fail("EMU_ORDER is forward, reverse, shuffle:SEED or agree, not \"%s\"", s);
}

struct Start { // faults are handled on a stack of their own: a thread's may be what overflowed
    Start()
    {
        stack_t now, own = {};
        sigaltstack(nullptr, &now);
        own.ss_size = 64 << 10;
        if (now.ss_flags & SS_DISABLE) own.ss_sp = malloc(own.ss_size), sigaltstack(&own, nullptr);
        struct sigaction act = {};
        act.sa_sigaction = page_fault;
        act.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
        sigaction(SIGSEGV, &act, &old_action[0]);
        sigaction(SIGBUS, &act, &old_action[1]);
        m.limit = setting("EMU_MEMORY", m.limit);
        set_order(getenv("EMU_ORDER"));
    }
};
inline Start start;

// ----------------------------------------------------------------------------------- coroutines

// Pushes the registers that a call must keep, sets *from to the stack pointer, goes on where `to`
// stopped.
extern "C" void emu_switch(void **from, void *to);
#if defined __linux__ && defined __x86_64__ && !defined EMU_UCONTEXT
__asm__(".pushsection .text\n.weak emu_switch\n.type emu_switch,@function\nemu_switch:\n"
        "push %rbp\npush %rbx\npush %r12\npush %r13\npush %r14\npush %r15\n"
        "mov %rsp,(%rdi)\nmov %rsi,%rsp\n"
        "pop %r15\npop %r14\npop %r13\npop %r12\npop %rbx\npop %rbp\n"
        "pop %rcx\njmp *%rcx\n" // not ret, which would be predicted to go to the caller
        ".size emu_switch,.-emu_switch\n.popsection\n");
inline void *first_sp(char *top, void (*entry)())
{
    void **sp = (void **)top - 8; // six registers, the address to go to, and no caller
    memset(sp, 0, 8 * sizeof *sp);
    sp[6] = (void *)entry;
    return sp;
}
#elif defined __linux__ && defined __aarch64__ && !defined EMU_UCONTEXT
__asm__(".pushsection .text\n.weak emu_switch\n.type emu_switch,%function\nemu_switch:\n"
        "stp x29,x30,[sp,-160]!\nstp x19,x20,[sp,16]\nstp x21,x22,[sp,32]\nstp x23,x24,[sp,48]\n"
        "stp x25,x26,[sp,64]\nstp x27,x28,[sp,80]\nstp d8,d9,[sp,96]\nstp d10,d11,[sp,112]\n"
        "stp d12,d13,[sp,128]\nstp d14,d15,[sp,144]\nmov x9,sp\nstr x9,[x0]\nmov sp,x1\n"
        "ldp x19,x20,[sp,16]\nldp x21,x22,[sp,32]\nldp x23,x24,[sp,48]\nldp x25,x26,[sp,64]\n"
        "ldp x27,x28,[sp,80]\nldp d8,d9,[sp,96]\nldp d10,d11,[sp,112]\nldp d12,d13,[sp,128]\n"
        "ldp d14,d15,[sp,144]\nldp x29,x30,[sp],160\nret\n"
        ".size emu_switch,.-emu_switch\n.popsection\n");
inline void *first_sp(char *top, void (*entry)())
{
    void **sp = (void **)top - 20;
    memset(sp, 0, 20 * sizeof *sp);
    sp[1] = (void *)entry;
    return sp;
}
#else // any other machine: the C library's own, slower as it saves the signal mask each time
extern "C" inline void emu_switch(void **from, void *to)
{
    ucontext_t here;
    *from = &here;
    swapcontext(&here, (ucontext_t *)to);
}
inline void *first_sp(char *top, void (*entry)())
{
    ucontext_t *c = (ucontext_t *)(top - round_up(sizeof *c, 64));
    getcontext(c);
    c->uc_stack.ss_sp = top - STACK / 2;
    c->uc_stack.ss_size = (size_t)((char *)c - (top - STACK / 2));
    makecontext(c, entry, 0);
    return c;
}
#endif

inline void switched(Context *me) // just after a switch to me
{
#ifdef __SANITIZE_ADDRESS__
    Context *last = m.context;
    const void *bottom;
    size_t size;
    __sanitizer_finish_switch_fiber(me->fake_stack, &bottom, &size);
    if (last == &m.host) last->stack = bottom, last->size = size;
#endif
    m.context = me;
}

inline void switch_to(Context *to)
{
    Context *me = m.context;
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(&me->fake_stack, to->stack, to->size);
#endif
    emu_switch(&me->sp, to->sp);
    switched(me);
}

// -------------------------------------------------------------------------------------- a block

inline uint64_t next_random()
{
    m.random ^= m.random << 13, m.random ^= m.random >> 7, m.random ^= m.random << 17;
    return m.random;
}

inline Order make_order(uint64_t n)
{
    if (m.now == Machine::FORWARD) return {1, 0, n};
    if (m.now == Machine::REVERSE) return {n - 1, n - 1, n};
    Order o = {1, next_random() % n, n};
    do o.a = next_random() % n; while (std::gcd(o.a, n) != 1);
    return o;
}

inline void Shared::resize(size_t bytes)
{
    if (bytes > room || !low) {
        if (low) munmap(low - PAGE, room + 2 * PAGE);
        room = round_up(bytes ? bytes : 1, PAGE);
        low = map_pages(room + 2 * PAGE) + PAGE;
        mprotect(low, room, PROT_READ | PROT_WRITE);
    }
    high = low + room;
    size = bytes;
    data = high - round_up(bytes, this == &m.dynamic && bytes >= 1024 ? 1024 : 16); // TMA, wgmma
}

inline char *Shared::get() // the first thread of a block to come here makes it ready
{
    if (block != m.block) {
        Count quiet(m.quiet);
        block = m.block;
        memset(low, 0xff, room);
        m.shared.push_back(this);
        if (this != &m.dynamic && (m.static_shared += round_up(size, 16)) > STATIC_SHARED)
            fail("%zu bytes of static shared memory; a block can have %zu", m.static_shared,
                 STATIC_SHARED);
    }
    return data;
}

inline void end_block()
{
    Count quiet(m.quiet);
    for (Shared *s : m.shared)
        if (const char *p = not_poison(s->data + s->size, s->high))
            fail("out of bounds: byte %td was written of shared %s, which has %zu", p - s->data,
                 s->name, s->size);
    m.shared.clear();
}

inline bool begin_block() // false: there is none
{
    if (m.blocks_begun == m.blocks.n) return false;
    uint64_t i = m.blocks.at(m.blocks_begun++);
    blockIdx = {(unsigned)(i % gridDim.x), (unsigned)(i / gridDim.x % gridDim.y),
                (unsigned)(i / gridDim.x / gridDim.y)};
    m.block++;
    m.static_shared = 0;
    m.dynamic.get();
    if (m.blocks_begun == 1 || m.now == Machine::SHUFFLE) {
        Order warps = make_order(m.warp_count), lanes = make_order(32);
        for (unsigned i = 0; i < 32; i++) {
            m.warp_at[i] = (unsigned char)warps.at(i);
            m.lane_at[i] = (unsigned char)lanes.at(i);
            m.place_of[m.lane_at[i]] = (unsigned char)i;
        }
    }
    m.mbarriers.clear();
    m.warp[32].clocks = {}, m.warp[32].clocks.of[32] = 1;
    for (unsigned w = 0; w < m.warp_count; w++) {
        m.warp[w].ready = m.warp[w].waiting = 0, m.warp[w].syncs = 1;
        m.warp[w].wgmmas.clear(), m.warp[w].put_off = false;
        m.warp[w].clocks = {}, m.warp[w].clocks.of[w] = 1;
        for (unsigned l = 0; l < 32 && w * 32 + l < m.threads; l++)
            m.warp[w].ready |= 1u << m.place_of[l];
    }
    for (unsigned t = 0; t < m.threads; t++) m.all[t].state = Thread::FRESH;
    m.warp_place = m.arrived = m.returned = 0;
    m.barriers = m.votes = 0;
    return true;
}

inline const char *describe_shared(const void *p)
{
    static char text[96];
    snprintf(text, sizeof text, "address %p", p);
    for (const Shared *s : m.shared)
        if ((char *)p >= s->low && (char *)p < s->high)
            snprintf(text, sizeof text, "byte %td of shared %s", (char *)p - s->data, s->name);
    return text;
}

inline const char *doing(const Thread &t)
{
    static char text[240];
    if (t.state == Thread::RETURNED) return "has returned";
    int n = snprintf(text, sizeof text, "waits in %s at line %d", t.what, t.line);
    if (t.state != Thread::MBARRIER) return text;
    const Mbarrier &b = m.mbarriers[t.mbarrier];
    snprintf(text + n, sizeof text - (size_t)n,
             " for %s, whose phase %u lacks %d of %d arrivals and %d bytes", describe_shared(b.at),
             b.phase, b.left, b.count, b.bytes);
    return text;
}

// No thread can go on, and not all have returned: say who waits for whom.
[[noreturn]] inline void stuck()
{
    const Thread *first = nullptr, *other = nullptr; // the latter preferably waits, elsewhere
    for (unsigned t = m.threads; t--;)
        if (m.all[t].state == Thread::MBARRIER) first = &m.all[t];
    for (unsigned t = m.threads; first && t--;) {
        const Thread &o = m.all[t];
        if (o.state == Thread::MBARRIER && o.mbarrier == first->mbarrier) continue;
        if (!other || o.state != Thread::RETURNED) other = &o;
    }
    if (first) {
        char also[300] = "";
        if (other)
            snprintf(also, sizeof also, "; thread (%u,%u,%u) %s", other->id.x, other->id.y,
                     other->id.z, doing(*other));
        m.thread = nullptr;
        fail("deadlock in block (%u,%u,%u): thread (%u,%u,%u) %s%s", blockIdx.x, blockIdx.y,
             blockIdx.z, first->id.x, first->id.y, first->id.z, doing(*first), also);
    }
    for (unsigned t = 0; t < m.threads; t++) { // a lane that waits for lanes which do not come
        if (m.all[t].state != Thread::WARP) continue;
        Warp &w = m.warp[t / 32];
        unsigned missing = w.mask[t % 32] & ~w.waiting;
        if (!missing) continue; // another lane of its mask has another mask, and waits
        unsigned l = (unsigned)__builtin_ctz(missing), other = t / 32 * 32 + l;
        m.thread = &m.all[t];
        fail("%s at line %d waits for lanes 0x%08x of mask 0x%08x: lane %u %s", m.all[t].what,
             m.all[t].line, missing, w.mask[t % 32], l,
             other < m.threads ? doing(m.all[other]) : "does not exist");
    }
    const Thread *waits = nullptr, *gone = nullptr;
    for (unsigned t = m.threads; t--;)
        (m.all[t].state == Thread::BARRIER ? waits : gone) = &m.all[t];
    m.thread = nullptr;
    fail("barrier not reached by all threads: %u of %u wait in %s at line %d, block (%u,%u,%u); "
         "thread (%u,%u,%u) %s", m.arrived, m.threads, waits->what, waits->line, blockIdx.x,
         blockIdx.y, blockIdx.z, gone->id.x, gone->id.y, gone->id.z, doing(*gone));
}

// Where TMA and wgmma look for what is at p: bits 7-9 of an address are added to bits 4-6, by XOR.
inline char *swizzled(const void *p)
{
    return (char *)((uintptr_t)p ^ ((uintptr_t)p >> 3 & 0x70));
}

inline void maybe_end_phase(size_t i) // then those who wait go on, from the first in order
{
    Mbarrier &b = m.mbarriers[i];
    if (b.left || b.bytes) return;
    b.left = b.count, b.phase++;
    b.ended = b.clocks;
    for (unsigned t = 0; t < m.threads; t++)
        if (m.all[t].state == Thread::MBARRIER && m.all[t].mbarrier == i)
            m.warp[t / 32].ready |= 1u << m.place_of[t % 32], m.warp_place = 0;
}

inline void tell(Mbarrier &b, unsigned warp) // what it did, those who wait for b will have seen
{
    Clocks &c = m.warp[warp].clocks;
    b.clocks.see(c);
    c.of[warp]++;
}

inline void do_load(const Load &l)
{
    const TensorMap &map = l.map;
    Thread *before = m.thread;
    m.thread = l.thread;
    m.warp[32].clocks.see(m.warp[(l.thread - m.all) / 32].clocks);
    m.tma++;
    int from = l.col < 0 ? -l.col : 0, to = 64; // these columns of the box are in the tensor
    if (l.col + 64 > (long)map.cols) to = (int)((long)map.cols - l.col);
    for (int r = 0; r < map.box_rows; r++) {
        char row[128] = {};
        if (l.row + r >= 0 && l.row + r < (long)map.rows && from < to) {
            const char *x = (const char *)map.x + 2 * ((l.row + r) * (long)map.ld + l.col + from);
            memcpy(row + 2 * from, x, (size_t)(2 * (to - from)));
            if (m.access) m.access(x, (size_t)(2 * (to - from)), false);
        }
        for (int i = 0; i < 128; i += 16) {
            char *p = swizzled(l.to + 128 * r + i);
            if (m.access) m.access(p, 16, true);
            Count quiet(m.quiet);
            memcpy(p, row + i, 16);
        }
    }
    m.tma--;
    m.thread = before;
    tell(m.mbarriers[l.mbarrier], 32);
    m.mbarriers[l.mbarrier].bytes -= 128 * map.box_rows;
    maybe_end_phase(l.mbarrier);
}

inline void do_wgmmas(Warp &w);

// Of what can wait until no thread can go on without it, does the first; false: there is nothing.
inline bool do_put_off()
{
    for (unsigned i = 0; i < m.warp_count; i++) {
        Warp &w = m.warp[m.warp_at[i]];
        if (!w.put_off) continue;
        m.thread = &m.all[m.warp_at[i] * 32];
        do_wgmmas(w);
        w.put_off = false, w.ready = ~0u, m.warp_place = i;
        return true;
    }
    if (m.loads.empty()) return false;
    Load l = m.loads[0];
    m.thread = l.thread;
    if (m.returned == m.threads) fail("the block ends, but not what tma_load began");
    m.loads.erase(m.loads.begin());
    do_load(l);
    return true;
}

inline Thread *pick() // the thread to run next, or null where the launch is over
{
    for (;;) {
        for (; m.warp_place < m.warp_count; m.warp_place++) {
            unsigned w = m.warp_at[m.warp_place];
            if (!m.warp[w].ready) continue;
            unsigned lane = m.lane_at[__builtin_ctz(m.warp[w].ready)];
            m.warp[w].ready &= m.warp[w].ready - 1;
            return &m.all[w * 32 + lane];
        }
        if (do_put_off()) continue;
        if (m.returned < m.threads) stuck();
        end_block();
        if (!begin_block()) return nullptr;
    }
}

inline void become(Thread *t) { m.thread = t, threadIdx = t->id; }

// What a stack does all its life: runs fresh threads from beginning to end, one after the other.
inline void run_threads()
{
    switched(m.idle.back());
    m.idle.pop_back();
    for (;;) {
        Thread *t = m.thread;
        t->state = Thread::RUNNING;
        t->context = m.context;
        t->copy_group = t->wgmma_group = 0;
        t->fenced = false;
        m.body(m.arguments);
        t->state = Thread::RETURNED;
        t->copies.clear();
        m.returned++;
        Thread *next = pick();
        if (next) become(next);
        if (next && next->state == Thread::FRESH) continue;
        Context *me = m.context;
        m.idle.push_back(me);
        switch_to(next ? next->context : &m.host);
        m.idle.pop_back();
    }
}

// A stack for a fresh thread: the last of m.idle, whose owner takes it from there.
inline Context *idle_stack()
{
    if (m.idle.empty()) {
        m.stacks.emplace_back();
        Context *c = &m.stacks.back();
        char *low = map_pages(STACK + PAGE) + PAGE;
        mprotect(low, STACK, PROT_READ | PROT_WRITE);
        c->stack = low;
        c->size = STACK;
        // Not all from a page's top, or the stacks would compete for a few lines of the cache.
        c->sp = first_sp(low + STACK - m.stacks.size() % 61 * 192, run_threads);
        m.idle.push_back(c);
    }
    return m.idle.back();
}

inline void wait(Thread::State state, const char *what, int line)
{
    Thread *me = m.thread;
    me->state = state;
    me->what = what;
    me->line = line;
    Thread *next = pick(); // not null: I have not returned
    become(next);
    if (next != me) switch_to(next->state == Thread::FRESH ? idle_stack() : next->context);
    me->state = Thread::RUNNING;
}

inline int barrier(const char *what, int line, int vote = 0) // how many threads voted
{
    if (!m.thread) fail("%s at line %d outside a kernel", what, line);
    if (m.arrived++ == 0) m.barrier_line = line;
    if (m.barrier_line != line)
        fail("threads of one block at different barriers: lines %d and %d", m.barrier_line, line);
    m.votes += vote != 0;
    if (m.arrived == m.threads) { // the last: all go on, from the first in order
        m.barriers++;
        m.counted = m.votes;
        m.votes = m.arrived = m.warp_place = 0;
        for (unsigned t = 0; t < m.threads; t++) m.warp[t / 32].ready |= 1u << m.place_of[t % 32];
    }
    wait(Thread::BARRIER, what, line);
    return (int)m.counted; // the next barrier cannot be complete before this thread comes to it
}

inline void run_grid()
{
    m.random = m.seed * 0x9E3779B97F4A7C15u | 1;
    for (int i = 0; i < 9; i++) next_random();
    m.blocks = make_order((uint64_t)gridDim.x * gridDim.y * gridDim.z);
    m.blocks_begun = 0;
    m.first_block = m.block + 1;
    begin_block();
    become(pick());
    switch_to(idle_stack());
    m.thread = nullptr;
}

inline void compare_written(const char *order)
{
    for (Written &w : m.written) {
        char *now = w.of->low + w.granule * GRANULE;
        for (size_t i = 0; i < w.after.size(); i += 4) {
            if (!memcmp(now + i, &w.after[i], 4)) continue;
            float x, y, before;
            memcpy(&x, now + i, 4), memcpy(&y, &w.after[i], 4), memcpy(&before, &w.before[i], 4);
            auto sum = m.float_sums.find(now + i);
            if (sum != m.float_sums.end() && // what float atomics added to: equal but for rounding
                std::fabs(x - y) <= 1e-5 * (sum->second + std::fabs(before))) continue;
            fail("orders disagree, a barrier or an atomic is missing: %.9g forward and %.9g %s, as "
                 "float, in byte %td of %s", y, x, order, now + i - w.of->data, describe(*w.of));
        }
    }
}

// Runs the launch in each order from the same memory, and compares all that was written.
inline void run_and_agree()
{
    const char *names[] = {"forward", "reverse", "shuffled"};
    m.written.clear();
    m.float_sums.clear();
    for (int i = 0; i < 3; i++) {
        m.now = i == 0 ? Machine::FORWARD : i == 1 ? Machine::REVERSE : Machine::SHUFFLE;
        for (Written &w : m.written) {
            char *p = w.of->low + w.granule * GRANULE;
            if (i == 1) w.after.assign(p, p + w.after.size());
            memcpy(p, w.before.data(), w.before.size());
        }
        run_grid();
        if (i) compare_written(names[i]);
    }
    m.written.clear();
}

inline std::map<const void *, size_t> pinned; // what cudaMallocHost gave

template <class T> void check_argument(int i, const T &value)
{
    if constexpr (std::is_pointer<T>::value) {
        auto p = pinned.upper_bound((const void *)value);
        bool host = p == pinned.begin() || (--p, (char *)value > (char *)p->first + p->second);
        if (const Allocation *a = find((const void *)value)) {
            if (a->freed)
                fail("use after cudaFree: argument %d is byte %td of %s", i,
                     (char *)value - a->data, describe(*a));
        } else if (value && host && !std::is_function<typename std::remove_pointer<T>::type>::value)
            fail("argument %d is not device memory but a host pointer, %p", i, (const void *)value);
    } else (void)i, (void)value;
}

inline bool launch_fits(dim3 g, dim3 b, size_t shared)
{
    return g.x && g.y && g.z && b.x && b.y && b.z && g.x < 1u << 31 && g.y < 65536 && g.z < 65536 &&
           b.x <= 1024 && b.y <= 1024 && b.z <= 64 && (uint64_t)b.x * b.y * b.z <= 1024 &&
           shared <= MAX_SHARED;
}

template <class T> struct Same { typedef T type; };

template <class... P>
void launch(const char *name, const char *file, int line, void (*kernel)(P...), dim3 grid,
            dim3 block, size_t shared, typename Same<P>::type... args)
{
    if (!launch_fits(grid, block, shared)) { m.error = 9; return; } // cudaErrorInvalidConfiguration
    auto limit = m.shared_limit.find((const void *)kernel); // from cudaFuncSetAttribute
    if (shared > (limit == m.shared_limit.end() ? STATIC_SHARED : limit->second)) {
        m.error = 1; // cudaErrorInvalidValue
        return;
    }
    if (m.recorded) {
        m.recorded->push_back([=] {
            launch(name, file, line, kernel, grid, block, shared, args...);
        });
        return;
    }
    struct Call { void (*kernel)(P...); std::tuple<P...> args; } call = {kernel, {args...}};
    Open open;
    m.kernel = name, m.file = file, m.line = line;
    int i = 0;
    (void)i, (check_argument(++i, args), ...);
    m.arguments = &call;
    m.body = [](const void *c) {
        std::apply(((const Call *)c)->kernel, ((const Call *)c)->args);
    };
    unsigned threads = block.x * block.y * block.z;
    if (threads != m.threads || block.x != blockDim.x || block.y != blockDim.y)
        for (unsigned t = 0; t < threads; t++)
            m.all[t].id = {t % block.x, t / block.x % block.y, t / block.x / block.y};
    gridDim = grid, blockDim = block;
    m.threads = threads, m.warp_count = (threads + 31) / 32;
    m.dynamic.name = "(dynamic)", m.dynamic.resize(shared);
    m.now = m.order;
    if (m.order == Machine::AGREE) run_and_agree();
    else run_grid();
}

template <class T> struct SharedOf : Shared { // a static one; T is the array's type
    explicit SharedOf(const char *n) { name = n, resize(sizeof(T)); }
    T &get() { return *(T *)Shared::get(); }
};

// ------------------------------------------------------------- where the lanes of a warp meet

enum Op {
    SHFL,
    SHFL_UP,
    SHFL_DOWN,
    SHFL_XOR,
    BALLOT,
    ANY,
    ALL,
    SYNCWARP,
    MMA,
    LDMATRIX,
    LDMATRIX_T,
    WGMMA,
    WGMMA_WAIT
};
inline const char *const op_name[] = {
    "__shfl_sync",   "__shfl_up_sync", "__shfl_down_sync", "__shfl_xor_sync",
    "__ballot_sync", "__any_sync",     "__all_sync",       "__syncwarp",
    "mma_16x8x16",   "ldmatrix",       "ldmatrix_trans",   "wgmma",
    "wgmma_wait",
};

inline float bf16_at(const unsigned *registers, int i) // two in each register
{
    unsigned bits = (i % 2 ? registers[i / 2] : registers[i / 2] << 16) & 0xffff0000u;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

// D[16][8] += A[16][16] B[16][8]. With g = lane / 4, q = lane % 4 a lane holds (PTX, mma.m16n8k16):
// of A rows g (a0, a1, a4, a5) and g + 8, columns 2q, 2q + 1 (a0..a3) and 8 more; of B rows 2q,
// 2q + 1 and 8 more of column g; of D columns 2q, 2q + 1 of rows g and g + 8.
inline void run_mma(Warp &w)
{
    float a[16][16], b[16][8], ab[16][8] = {};
    for (int lane = 0; lane < 32; lane++) {
        int g = lane / 4, q = lane % 4;
        for (int i = 0; i < 8; i++)
            a[g + i / 2 % 2 * 8][2 * q + i % 2 + i / 4 * 8] = bf16_at(w.a[lane], i);
        for (int i = 0; i < 4; i++) b[2 * q + i % 2 + i / 2 * 8][g] = bf16_at(w.b[lane], i);
    }
    for (int i = 0; i < 16; i++)
        for (int k = 0; k < 16; k++)
            for (int j = 0; j < 8; j++) ab[i][j] += a[i][k] * b[k][j];
    for (int lane = 0; lane < 32; lane++)
        for (int i = 0; i < 4; i++)
            w.d[lane][i] += ab[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
}

// n matrices of 8 rows of 8 bf16; lane 8 i + j names row j of matrix i. A lane gets elements 2q and
// 2q + 1 of row g of each; transposed, of column g.
inline void run_ldmatrix(Warp &w, int n, bool transposed)
{
    for (int lane = 0; lane < 32; lane++)
        for (int i = 0; i < n; i++) {
            int g = lane / 4, q = lane % 4;
            const uint16_t *r0 = (const uint16_t *)w.b[8 * i + (transposed ? 2 * q : g)];
            const uint16_t *r1 = (const uint16_t *)w.b[8 * i + (transposed ? 2 * q + 1 : g)];
            w.a[lane][i] = r0[transposed ? g : 2 * q] | (unsigned)r1[transposed ? g : 2 * q + 1]
                                                            << 16;
        }
}

// 8 bf16 of shared memory to to[0], to[step], ...
inline void read_piece(const char *at, float *to, int step)
{
    const unsigned *p = (const unsigned *)swizzled(at);
    Count collective(m.collective);
    if (m.access) m.access(p, 16, false);
    Count quiet(m.quiet);
    for (int i = 0; i < 8; i++) to[i * step] = bf16_at(p, i);
}

// A warp's 16 of the 64 rows of D[64][8n] = A[64][16] B[16][8n], + D if o.add. Each of its n tiles
// of 8 columns, and A if it is in registers, are spread over the lanes as in mma.
inline void run_wgmma(const Wgmma &o, int warp)
{
    typedef float Four __attribute__((vector_size(16)));
    alignas(16) float a[16][16], b[16][256];
    for (int i = 0; i < 16; i++)
        for (int half = 0; half < 2 && o.a; half++)
            if (o.a_t) read_piece(o.a + 128 * i + 32 * warp + 16 * half, &a[8 * half][i], 16);
            else read_piece(o.a + 128 * (16 * warp + i) + 16 * half, &a[i][8 * half], 1);
    for (int lane = 0; lane < 32 && !o.a; lane++)
        for (int i = 0; i < 8; i++)
            a[lane / 4 + i / 2 % 2 * 8][lane % 4 * 2 + i % 2 + i / 4 * 8] =
                bf16_at(o.registers[lane], i);
    for (int i = 0; i < 16 && o.b_t; i++)
        for (int j = 0; j < o.n; j++)
            read_piece(o.b + 128 * i + 16 * (j % 8) + (long)o.next * (j / 8), &b[i][8 * j], 1);
    for (int j = 0; j < 8 * o.n && !o.b_t; j++)
        for (int half = 0; half < 2; half++)
            read_piece(o.b + 128 * j + 16 * half, &b[8 * half][j], 256);
    Count quiet(m.quiet);
    for (int i = 0; i < 16; i++)
        for (int j = 0; j < 8 * o.n; j += 4) {
            Four sum = {0, 0, 0, 0};
            for (int k = 0; k < 16; k++) sum += a[i][k] * *(const Four *)&b[k][j];
            for (int c = 0; c < 4; c++) {
                float *d = &o.d[i % 8 * 4 + (j + c) % 8 / 2][j / 8 * 4 + i / 8 * 2 + c % 2];
                *d = sum[c] + (o.add ? *d : 0);
            }
        }
}

inline void need_operand(const char *name, const char *p, bool transposed, int line)
{
    unsigned at = (unsigned)((uintptr_t)p % 1024);
    if (find(p)) fail("wgmma at line %d: %s is not in shared memory", line, name);
    if (at & ~(transposed ? 0u : 96u))
        fail("wgmma at line %d: %s is at byte %u of 1024, not %s", line, name, at,
             transposed ? "0" : "0, 32, 64 or 96");
}

inline void begin_wgmma(Warp &w)
{
    unsigned warp = (unsigned)(&w - m.warp);
    Wgmma o = {};
    (Operands &)o = *(Operands *)w.b[0];
    o.group = (int)w.value[0];
    if ((warp / 4 + 1) * 128 > m.threads)
        fail("wgmma at line %d: %u threads, so this warp is not of a group of four", o.line,
             m.threads);
    if (o.a) need_operand("a", o.a, o.a_t, o.line);
    need_operand("b", o.b, o.b_t, o.line);
    if (o.b_t && o.n > 8 && o.next % 1024)
        fail("wgmma at line %d: next, %d, is not a multiple of 1024", o.line, o.next);
    for (int l = 0; l < 32; l++) {
        const Operands &x = *(Operands *)w.b[l];
        if (x.a != o.a || x.b != o.b || x.next != o.next)
            fail("wgmma at line %d: lane %d has other operands than lane 0", o.line, l);
        o.d[l] = w.d[l];
        if (!o.a) memcpy(o.registers[l], w.a[l], sizeof o.registers[l]);
    }
    if (m.now == Machine::REVERSE) run_wgmma(o, (int)warp % 4);
    else w.wgmmas.push_back(o);
}

inline void do_wgmmas(Warp &w) // those it waits for
{
    size_t n = 0;
    for (; n < w.wgmmas.size() && w.wgmmas[n].group < w.wgmma_until; n++)
        run_wgmma(w.wgmmas[n], (int)(&w - m.warp) % 4);
    w.wgmmas.erase(w.wgmmas.begin(), w.wgmmas.begin() + (long)n);
}

inline void wait_wgmma(Warp &w)
{
    w.wgmma_until = (int)w.value[0] - w.argument[0];
    w.put_off = !w.wgmmas.empty() && w.wgmmas[0].group < w.wgmma_until;
}

inline void run_op(Warp &w, Op op, unsigned mask)
{
    if (op == WGMMA) return begin_wgmma(w);
    if (op == WGMMA_WAIT) return wait_wgmma(w);
    Count quiet(m.quiet);
    unsigned votes = 0;
    for (unsigned l = 0; l < 32; l++)
        if (mask >> l & 1 && w.value[l]) votes |= 1u << l;
    w.syncs += op == SYNCWARP; // the only one that orders memory
    if (op == MMA) return run_mma(w);
    if (op == LDMATRIX || op == LDMATRIX_T) return run_ldmatrix(w, w.argument[0], op == LDMATRIX_T);
    for (int lane = 0; lane < 32; lane++) {
        if (!(mask >> lane & 1)) continue;
        int n = w.width[lane], arg = w.argument[lane], first = lane & ~(n - 1), from = lane;
        if (op == BALLOT) w.result[lane] = votes;
        if (op == ANY) w.result[lane] = votes != 0;
        if (op == ALL) w.result[lane] = votes == mask;
        if (op == SHFL) from = first + (arg & (n - 1));
        if (op == SHFL_UP && lane - arg >= first) from = lane - arg;
        if (op == SHFL_DOWN && lane + arg < first + n) from = lane + arg;
        if (op == SHFL_XOR && (lane ^ arg) < first + n) from = lane ^ arg;
        if (op > SHFL_XOR) continue;
        if (!(mask >> from & 1))
            fail("%s: lane %d reads lane %d, which is not in mask 0x%08x", op_name[op], lane, from,
                 mask);
        w.result[lane] = w.value[from];
    }
}

// A lane comes to op with what it brings; the last lane of the mask does the work for all.
inline uint64_t meet(Op op, unsigned mask, int line, uint64_t value = 0, int argument = 0,
                     int width = 32, float *d = nullptr, unsigned *a = nullptr,
                     const void *b = nullptr)
{
    if (!m.thread) fail("%s at line %d outside a kernel", op_name[op], line);
    unsigned t = (unsigned)(m.thread - m.all), lane = t % 32;
    Warp &w = m.warp[t / 32];
    if (!(mask >> lane & 1))
        fail("%s at line %d: lane %u is not in its own mask 0x%08x", op_name[op], line, lane, mask);
    if (width < 1 || width > 32 || width & (width - 1))
        fail("%s at line %d: width %d", op_name[op], line, width);
    w.waiting |= 1u << lane;
    w.mask[lane] = mask;
    w.value[lane] = value, w.argument[lane] = argument, w.width[lane] = width;
    w.d[lane] = d, w.a[lane] = a, w.b[lane] = (unsigned *)b;
    if ((w.waiting & mask) == mask) {
        for (unsigned l = 0, rest = mask; rest; rest &= rest - 1) {
            const Thread &other = m.all[t / 32 * 32 + (l = (unsigned)__builtin_ctz(rest))];
            if (l != lane && (w.mask[l] != mask || other.what != op_name[op] || other.line != line))
                fail("%s at line %d, mask 0x%08x, but lane %u %s, mask 0x%08x", op_name[op], line,
                     mask, l, doing(other), w.mask[l]);
        }
        run_op(w, op, mask);
        w.waiting &= ~mask;
        for (unsigned rest = w.put_off ? 0 : mask; rest; rest &= rest - 1)
            w.ready |= 1u << m.place_of[__builtin_ctz(rest)];
    }
    wait(Thread::WARP, op_name[op], line);
    return w.result[lane];
}

template <class T> T shuffle(Op op, unsigned mask, T v, int argument, int width, int line)
{
    static_assert(sizeof(T) <= 8 && std::is_trivially_copyable<T>::value, "8 bytes at most");
    uint64_t bits = 0;
    memcpy(&bits, &v, sizeof v);
    bits = meet(op, mask, line, bits, argument, width);
    memcpy(&v, &bits, sizeof v);
    return v;
}

inline void need_shared(const char *what, const void *p, int line)
{
    if ((uintptr_t)p % 16) fail("%s at line %d: address %p is not a multiple of 16", what, line, p);
    if (find(p)) fail("%s at line %d: address %p is not in shared memory", what, line, p);
}

inline void need_row(const char *what, const void *p, int line)
{
    need_shared(what, p, line);
    Count collective(m.collective);
    if (m.access) m.access(p, 16, false);
}

inline void do_copy(const Copy &c)
{
    if (m.access && c.valid) m.access(c.from, 16, false);
    if (m.access) m.access(c.to, 16, true);
    Count quiet(m.quiet);
    if (c.valid) memcpy(c.to, c.from, 16);
    else memset(c.to, 0, 16);
}

inline Mbarrier &mbarrier_at(const char *what, const uint64_t *b, int line)
{
    if (!m.thread) fail("%s at line %d outside a kernel", what, line);
    uint64_t i = *b - MBARRIER;
    if (i >= m.mbarriers.size() || m.mbarriers[i].at != b)
        fail("%s at line %d: %s is no mbarrier; mbarrier_init was not called, or it is overwritten",
             what, line, describe_shared(b));
    return m.mbarriers[i];
}

inline void arrive(const char *what, uint64_t *at, int bytes, int line)
{
    Mbarrier &b = mbarrier_at(what, at, line);
    if (!b.left)
        fail("%s at line %d: phase %u of %s had all its %d arrivals, and lacks %d bytes", what,
             line, b.phase, describe_shared(at), b.count, b.bytes);
    tell(b, (unsigned)(m.thread - m.all) / 32);
    b.left--, b.bytes += bytes;
    maybe_end_phase((size_t)(&b - m.mbarriers.data()));
}

inline void begin_wgmma(float *d, const unsigned *a, const Operands &o, int line)
{
    if (!m.thread) fail("wgmma at line %d outside a kernel", line);
    if (!m.thread->fenced) fail("wgmma at line %d: no wgmma_fence before the first", line);
    meet(WGMMA, ~0u, line, (uint64_t)m.thread->wgmma_group, 0, 32, d, (unsigned *)a, &o);
}

} // namespace emu

#define LAUNCH(kernel, grid, block, shared_bytes, ...) \
    emu::launch(#kernel, __FILE__, __LINE__, kernel, grid, block, shared_bytes, ##__VA_ARGS__)
#define DYNAMIC_SHARED(type, name) type *name = (type *)emu::m.dynamic.data
#define SHARED(type, name, ...) \
    static emu::SharedOf<type __VA_ARGS__> name##_pages(#name); \
    auto &name = name##_pages.get()

inline void emu_order(const char *order) { emu::set_order(order); }
inline void emu_name(const void *device, const char *name) // for the messages
{
    if (emu::Allocation *a = emu::find(device)) a->name = name;
}

inline void __syncthreads(EMU_HERE) { emu::barrier("__syncthreads", line); }
inline int __syncthreads_count(int p, EMU_HERE)
{
    return emu::barrier("__syncthreads_count", line, p);
}
inline int __syncthreads_or(int p, EMU_HERE)
{
    return emu::barrier("__syncthreads_or", line, p) > 0;
}
inline int __syncthreads_and(int p, EMU_HERE)
{
    return emu::barrier("__syncthreads_and", line, p) == (int)emu::m.threads;
}
inline void __syncwarp(unsigned mask = ~0u, EMU_HERE) { emu::meet(emu::SYNCWARP, mask, line); }
#define EMU_VOTE(type, name, op) \
    inline type name(unsigned mask, int p, EMU_HERE) \
    { return (type)emu::meet(emu::op, mask, line, p != 0); }
EMU_VOTE(unsigned, __ballot_sync, BALLOT)
EMU_VOTE(int, __any_sync, ANY)
EMU_VOTE(int, __all_sync, ALL)
// CUDA promises nothing of which other lanes run with this one: here none does.
inline unsigned __activemask() { return 1u << (emu::m.thread - emu::m.all) % 32; }
#define EMU_SHUFFLE(name, op, type) \
    template <class T> T name(unsigned mask, T v, type by, int width = 32, EMU_HERE) \
    { return emu::shuffle(emu::op, mask, v, (int)by, width, line); }
EMU_SHUFFLE(__shfl_sync, SHFL, int)
EMU_SHUFFLE(__shfl_up_sync, SHFL_UP, unsigned)
EMU_SHUFFLE(__shfl_down_sync, SHFL_DOWN, unsigned)
EMU_SHUFFLE(__shfl_xor_sync, SHFL_XOR, int)

inline void mma_16x8x16(float d[4], const unsigned a[4], const unsigned b[2], EMU_HERE)
{
    emu::meet(emu::MMA, ~0u, line, 0, 0, 32, d, (unsigned *)a, b);
}
#define EMU_LDMATRIX(name, n, op) \
    inline void name(unsigned r[n], const void *row, EMU_HERE) \
    { \
        if ((emu::m.thread - emu::m.all) % 32 < 8 * n) emu::need_row(#name, row, line); \
        emu::meet(emu::op, ~0u, line, 0, n, 32, nullptr, r, row); \
    }
EMU_LDMATRIX(ldmatrix_x2, 2, LDMATRIX)
EMU_LDMATRIX(ldmatrix_x4, 4, LDMATRIX)
EMU_LDMATRIX(ldmatrix_x2_trans, 2, LDMATRIX_T)
EMU_LDMATRIX(ldmatrix_x4_trans, 4, LDMATRIX_T)

// The hardware may copy at any time until the wait. Running forward the copy is made as late as can
// be, else at once: what is right in both does not depend on when.
inline void cp_async_16(void *shared, const void *global, bool valid, EMU_HERE)
{
    emu::Thread *t = emu::m.thread;
    emu::need_shared("cp_async_16", shared, line);
    if ((uintptr_t)global % 16)
        emu::fail("cp_async_16 at line %d: address %p is not a multiple of 16", line, global);
    if (emu::m.now == emu::Machine::FORWARD)
        t->copies.push_back({shared, global, valid, t->copy_group});
    else emu::do_copy({shared, global, valid, 0});
}
inline void cp_async_commit() { emu::m.thread->copy_group++; }
template <int N> void cp_async_wait() // until all but the last N groups are here
{
    emu::Thread *t = emu::m.thread;
    std::vector<emu::Copy> later;
    for (const emu::Copy &c : t->copies)
        if (c.group < t->copy_group - N) emu::do_copy(c);
        else later.push_back(c);
    t->copies.swap(later);
}

// ---------------------------------------------------------- Hopper: mbarriers, TMA and wgmma

// Initialised in shared memory by one thread. A phase ends after `count` arrivals and all the bytes
// that were expected; the first has parity 0, the next 1, then 0 again.
inline void mbarrier_init(uint64_t *b, int count, EMU_HERE)
{
    using namespace emu;
    if (!m.thread) fail("mbarrier_init at line %d outside a kernel", line);
    if (find(b)) fail("mbarrier_init at line %d: %p is not in shared memory", line, (void *)b);
    if ((uintptr_t)b % 8 || count < 1 || count >= 1 << 20)
        fail("mbarrier_init at line %d: %p, count %d", line, (void *)b, count);
    for (const Mbarrier &other : m.mbarriers)
        if (other.at == b) fail("mbarrier_init at line %d: %s again", line, describe_shared(b));
    *b = MBARRIER + m.mbarriers.size();
    m.mbarriers.push_back({b, count, count, 0, 0, m.thread, false, {}, {}, {}});
}
inline void mbarrier_init_done()
{
    for (emu::Mbarrier &b : emu::m.mbarriers) b.fenced |= b.by == emu::m.thread;
}
inline void mbarrier_arrive(uint64_t *b, EMU_HERE) { emu::arrive("mbarrier_arrive", b, 0, line); }
inline void mbarrier_expect(uint64_t *b, int bytes, EMU_HERE) // arrives, too
{
    if (bytes < 0 || bytes >= 1 << 20)
        emu::fail("mbarrier_expect at line %d: %d bytes", line, bytes);
    emu::arrive("mbarrier_expect", b, bytes, line);
}
inline void mbarrier_wait(uint64_t *at, int parity, EMU_HERE) // until the phase of it has ended
{
    using namespace emu;
    size_t i = (size_t)(&mbarrier_at("mbarrier_wait", at, line) - m.mbarriers.data());
    if (parity & ~1) fail("mbarrier_wait at line %d: parity %d", line, parity);
    while ((int)(m.mbarriers[i].phase & 1) == parity) {
        m.thread->mbarrier = i;
        wait(Thread::MBARRIER, "mbarrier_wait", line);
    }
    Mbarrier &b = m.mbarriers[i];
    unsigned warp = (unsigned)(m.thread - m.all) / 32;
    m.warp[warp].clocks.see(b.ended);
    if (b.seen[warp] != b.phase) b.seen[warp] = b.phase, m.warp[warp].syncs++;
}

inline TensorMap tensor_map(const __nv_bfloat16 *x, size_t rows, size_t cols, size_t ld,
                            int box_rows, EMU_HERE)
{
    using namespace emu;
    if (m.thread) fail("tensor_map at line %d in a kernel", line);
    if (!find(x)) fail("tensor_map at line %d: %p is not device memory", line, (const void *)x);
    if ((uintptr_t)x % 16 || ld * 2 % 16)
        fail("tensor_map at line %d: x, %p, or a row's %zu bytes are not a multiple of 16", line,
             (const void *)x, ld * 2);
    if (!rows || !cols || (rows | cols) >> 31 || ld >> 39 || box_rows < 1 || box_rows > 256)
        fail("tensor_map at line %d: %zu x %zu numbers, rows %zu apart, a box of %d rows", line,
             rows, cols, ld, box_rows);
    return {x, rows, cols, ld, box_rows};
}

// Copies box_rows x 64 numbers at (row, col), 0 outside of the tensor; their bytes arrive at b.
// This and wgmma are done at any time until they are waited for. Here at once or as late as can be,
// when no thread can go on without: forward both late, in reverse both at once, else wgmma late.
inline void tma_load(__nv_bfloat16 *to, const TensorMap *map, int col, int row, uint64_t *b,
                     EMU_HERE)
{
    using namespace emu;
    Mbarrier &at = mbarrier_at("tma_load", b, line);
    if (!at.fenced) fail("tma_load at line %d: no mbarrier_init_done after mbarrier_init", line);
    if ((uintptr_t)to % 1024)
        fail("tma_load at line %d: address %p is not a multiple of 1024", line, (void *)to);
    need_shared("tma_load", to, line);
    Load l = {(char *)to, *map, col, row, (size_t)(&at - m.mbarriers.data()), m.thread};
    if (m.now == Machine::FORWARD) m.loads.push_back(l);
    else do_load(l);
}

// d[64, 8N] += a[64, 16] b[16, 8N], or = unless ADD, by four warps, d[j][e] as that of mma for
// columns 8j..8j+7. What is in shared memory stands as tma_load puts it: a[64, 16] and b[8N, 16] in
// rows of 128 bytes, or, transposed, a[16, 64] and b[16, 8N], the latter's blocks of 64 columns
// `next` bytes apart.
template <int N> void wgmma_fence(float (&)[N][4]) { emu::m.thread->fenced = true; }
template <bool A_T, bool B_T, bool ADD = true, int N>
void wgmma(float (&d)[N][4], const __nv_bfloat16 *a, const __nv_bfloat16 *b, int next, EMU_HERE)
{
    static_assert(N <= 32, "256 columns at most");
    emu::begin_wgmma(d[0], nullptr,
                     {(const char *)a, (const char *)b, N, next, A_T, B_T, ADD, line}, line);
}
template <bool B_T, int N>
void wgmma(float (&d)[N][4], const unsigned (&a)[4], const __nv_bfloat16 *b, int next, EMU_HERE)
{
    static_assert(N <= 32, "256 columns at most");
    emu::begin_wgmma(d[0], a, {nullptr, (const char *)b, N, next, false, B_T, true, line}, line);
}
inline void wgmma_commit() { emu::m.thread->wgmma_group++; }
template <int PENDING, int N> void wgmma_wait(float (&)[N][4], EMU_HERE)
{
    emu::Thread *t = emu::m.thread;
    if (!PENDING) t->fenced = false;
    emu::meet(emu::WGMMA_WAIT, ~0u, line, (uint64_t)t->wgmma_group, PENDING);
}
inline void wgmma_see_shared() {} // here all see what is there
template <int N> void take_registers() {}
template <int N> void give_registers() {}

#include "cuda_names.h"
#ifdef __SANITIZE_THREAD__
#include "cuda_race.h"
#endif
#endif
