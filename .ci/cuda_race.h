/*
cuda_race.h: finds races in the kernels that cuda_on_cpu.h runs, whether or not they show.

    g++ -x c++ -std=c++17 -g -O2 -fsanitize=thread -Wno-unknown-pragmas -I.ci -c moe.cu -o race.o
    g++ race.o -o moe_race                          (without -fsanitize here: no runtime is wanted)

-fsanitize=thread makes the compiler call a function before each access to memory. Those functions
are ours, not the library's. They remember of device and shared memory who wrote it last and who
read it since. Two accesses to the same bytes of which one writes are a race unless
  - they are one thread's, or from different launches,
  - __syncthreads stood between them (one block) or __syncwarp (one warp; shuffles order no memory),
    or an mbarrier, where the one's warp arrived and the other's waited,
  - or both are atomic.
So a missing atomic shows here, which no order of the threads brings to light. One run is enough, in
any order. It is some 5 times slower, and takes 36 bytes of memory for each byte that is touched.
*/
#ifndef CUDA_RACE_H
#define CUDA_RACE_H

#define EMU_PLAIN __attribute__((no_sanitize("thread")))
#define EMU_RACE extern "C" inline __attribute__((no_sanitize("thread"), used))

namespace emu {

struct Access {
    uint32_t block; // counted from 1 through all launches; 0: none
    uint16_t barriers, syncs, time, thread : 15, atomic : 1; // thread 1024: TMA
};
struct Cell { Access write, read, other_read; }; // two readers of different threads are enough

// A cell for each byte of the pages of an allocation or a shared array, zeros at first. An access
// of two bytes or more looks at every second one.
struct Cells { char *low, *high; Cell *cells; };
inline std::map<uintptr_t, Cells> all_cells;

// Accesses before `from` do not matter: of earlier launches, or of earlier blocks to shared memory.
EMU_PLAIN inline bool ordered(const Access &a, const Access &now, uint64_t from)
{
    if (a.block < from || (a.block == now.block && a.thread == now.thread)) return true;
    if (a.atomic && now.atomic) return true;
    if (a.block != now.block) return false;
    if (a.barriers < now.barriers) return true;
    if (a.thread / 32 == now.thread / 32) return a.syncs < now.syncs;
    return a.time <= m.warp[now.thread / 32].clocks.of[a.thread / 32];
}

[[noreturn]] inline void report(const char *p, const Access &a, bool a_write, bool write)
{
    char where[240], who[80] = "a thread of another block";
    const Allocation *of = find(p);
    if (of) snprintf(where, sizeof where, "byte %td of %s", p - of->data, describe(*of));
    for (const Shared *s : m.shared)
        if (p >= s->low && p < s->high)
            snprintf(where, sizeof where, "byte %td of shared %s", p - s->data, s->name);
    if (a.block == m.block && a.thread == 1024) {
        snprintf(who, sizeof who, "a tma_load");
    } else if (a.block == m.block) {
        uint3 id = m.all[a.thread].id;
        snprintf(who, sizeof who, "thread (%u,%u,%u)", id.x, id.y, id.z);
    }
    fail("race: this thread %s what %s %s, with no barrier between: %s", write ? "writes" : "reads",
         who, a_write ? "wrote" : "read", where);
}

inline Cells *cells_of(char *low, char *high) // new ones are of zeros
{
    Cells &c = all_cells[(uintptr_t)low];
    if (c.high == high) return &c;
    size_t bytes = (size_t)(high - low) * sizeof(Cell);
    c = {low, high, (Cell *)map_pages(bytes)};
    mprotect((void *)c.cells, bytes, PROT_READ | PROT_WRITE);
    return &c;
}

EMU_PLAIN inline void on_access(const void *address, size_t size, bool write)
{
    static Cells *last = nullptr;
    char *p = (char *)address;
    uint64_t from = m.first_block;
    const Shared *shared = nullptr;
    for (size_t i = 0; i < m.shared.size(); i++)
        if (p >= m.shared[i]->low && p < m.shared[i]->high) shared = m.shared[i], from = m.block;
    if (shared) {
        last = cells_of(shared->low, shared->high);
    } else if (!last || p < last->low || p >= last->high) {
        const Allocation *a = find(p);
        if (!a || a->freed || p < a->low || p >= a->high)
            return; // its own stack, or a fault to come
        last = cells_of(a->low, a->high);
    }
    uint16_t t = m.tma ? 1024 : (uint16_t)(m.thread - m.all);
    const Warp &w = m.warp[t / 32];
    Access now = {(uint32_t)m.block, (uint16_t)m.barriers, (uint16_t)w.syncs, w.clocks.of[t / 32],
                  t, m.atomic > 0};
    for (char *end = p + size; p < end; p += size == 1 ? 1 : 2) {
        Cell &cell = last->cells[p - last->low];
        if (!ordered(cell.write, now, from)) report(p, cell.write, true, write);
        if (write) {
            if (!ordered(cell.read, now, from)) report(p, cell.read, false, true);
            if (!ordered(cell.other_read, now, from)) report(p, cell.other_read, false, true);
            cell = {now, {}, {}};
        } else {
            Access &r = ordered(cell.read, now, from) ? cell.read : cell.other_read;
            r = now;
            r.syncs = (uint16_t)(r.syncs - m.collective); // ldmatrix: done before any lane goes on
        }
    }
}

// The header's own work on the way is none of a kernel's accesses: `quiet` while it is done.
EMU_RACE void emu_access(const void *p, size_t size, bool write)
{
    if (!m.thread || m.quiet) return;
    if ((size_t)((char *)p - (char *)m.context->stack) < STACK) return; // the thread's own
    if ((size_t)((char *)p - (char *)&m) < sizeof m) return;
    m.quiet = 1;
    on_access(p, size, write);
    m.quiet = 0;
}

struct StartRace { StartRace() { m.access = emu_access; } };
inline StartRace start_race;

} // namespace emu

// What the compiler calls.
#define EMU_ACCESS(bytes) \
    EMU_RACE void __tsan_read##bytes(void *p) { emu::emu_access(p, bytes, false); } \
    EMU_RACE void __tsan_write##bytes(void *p) { emu::emu_access(p, bytes, true); } \
    EMU_RACE void __tsan_unaligned_read##bytes(void *p) { emu::emu_access(p, bytes, false); } \
    EMU_RACE void __tsan_unaligned_write##bytes(void *p) { emu::emu_access(p, bytes, true); } \
    EMU_RACE void __tsan_read_write##bytes(void *p) { emu::emu_access(p, bytes, true); } \
    EMU_RACE void __tsan_unaligned_read_write##bytes(void *p) { emu::emu_access(p, bytes, true); }
EMU_ACCESS(1)
EMU_ACCESS(2)
EMU_ACCESS(4)
EMU_ACCESS(8)
EMU_ACCESS(16)
EMU_RACE void __tsan_read_range(void *p, size_t n) { emu::emu_access(p, n, false); }
EMU_RACE void __tsan_write_range(void *p, size_t n) { emu::emu_access(p, n, true); }
EMU_RACE char __tsan_atomic8_load(const volatile char *p, int) { return *p; } // a static's guard
EMU_RACE void __tsan_init() {}
EMU_RACE void __tsan_func_entry(void *) {}
EMU_RACE void __tsan_func_exit() {}
EMU_RACE void __tsan_vptr_update(void **, void *) {}
EMU_RACE void __tsan_vptr_read(void **) {}
EMU_RACE void *__tsan_memset(void *p, int value, size_t n) { return memset(p, value, n); }
EMU_RACE void *__tsan_memcpy(void *to, const void *from, size_t n) { return memcpy(to, from, n); }
EMU_RACE void *__tsan_memmove(void *to, const void *from, size_t n) { return memmove(to, from, n); }

#endif
