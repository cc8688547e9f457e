/*
fuzz.c: no config.json, index and shards, whatever stands in them, may crash model_load().

    clang -g -O1 -fsanitize=fuzzer,address,undefined .ci/fuzz.c -lm -o fuzz
    ./fuzz -rss_limit_mb=1024 -max_total_time=20 CORPUS .ci/fuzz-seeds

An input is a whole directory, its files separated by lines "%%": config.json, the index (if there
is one), then model.safetensors or the shards a and b. A shard that begins with '{' is a header, a
newline and the data; its length is put before it here. Any other is taken as it is.
*/
#define _POSIX_C_SOURCE 200809L
#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>

// die() comes back to the harness, and what was open then is closed and freed here.
static jmp_buf refused;
static void *allocated[1 << 16];
static FILE *opened[64];
static size_t allocations, openings;

static void *fuzz_alloc(size_t alignment, size_t size)
{
    void *p = size > (size_t)256 << 20 || allocations == sizeof allocated / sizeof *allocated
                  ? NULL : aligned_alloc(alignment, size);
    if (p) allocated[allocations++] = p;
    return p;
}

static void fuzz_free(void *p)
{
    for (size_t i = allocations; p && i-- > 0;)
        if (allocated[i] == p) {
            allocated[i] = allocated[--allocations];
            break;
        }
    free(p);
}

static FILE *fuzz_fopen(const char *path, const char *mode)
{
    FILE *f = openings < sizeof opened / sizeof *opened ? fopen(path, mode) : NULL;
    if (f) opened[openings++] = f;
    return f;
}

static int fuzz_fclose(FILE *f)
{
    for (size_t i = 0; i < openings; i++)
        if (opened[i] == f) opened[i] = opened[--openings];
    return fclose(f);
}

_Noreturn static void fuzz_exit(int status)
{
    if (status != 1 && status != 2) abort();
    longjmp(refused, 1);
}

#define aligned_alloc fuzz_alloc
#define free fuzz_free
#define fopen fuzz_fopen
#define fclose fuzz_fclose
#define MOE_EXIT fuzz_exit
#define MOE_NO_MAIN
#pragma GCC diagnostic ignored "-Wunused-function"
#include "../moe.c"

static const char *const names[] = {
    "config.json", "model.safetensors.index.json", "a", "b", "model.safetensors",
};
static char directory[64] = "/tmp/moe_fuzz.XXXXXX";

static void clean_up(void)
{
    for (size_t i = 0; i < 5; i++) remove(path_join(directory, names[i]).text);
    rmdir(directory);
}

static void write_file(const char *name, const uint8_t *data, size_t size, int shard)
{
    Path path = path_join(directory, name);
    const uint8_t *line = size ? (const uint8_t *)memchr(data, '\n', size) : NULL;
    FILE *f = fopen(path.text, "wb");
    if (!f) abort();
    if (shard && line && *data == '{') {
        uint64_t length = (uint64_t)(line - data) + 1;
        if (fwrite(&length, 8, 1, f) != 1) abort();
    }
    if (fwrite(data, 1, size, f) != size || fclose(f)) abort();
}

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
    (void)argc, (void)argv;
    if (!access("/dev/shm", W_OK)) strcpy(directory, "/dev/shm/moe_fuzz.XXXXXX");
    if (!mkdtemp(directory) || !freopen("/dev/null", "w", stdout)) abort();
    atexit(clean_up);
    return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    const uint8_t *part[4] = {data, data + size, data + size, data + size};
    size_t length[4] = {size, 0, 0, 0}, n = 1;
    for (size_t i = 0; i + 4 <= size && n < 4; i++)
        if (!memcmp(data + i, "\n%%\n", 4)) {
            length[n - 1] = (size_t)(data + i - part[n - 1]);
            part[n] = data + i + 4;
            length[n] = size - i - 4;
            n++;
            i += 3;
        }
    write_file(names[0], part[0], length[0], 0);
    for (size_t i = 1; i < 5; i++) remove(path_join(directory, names[i]).text);
    if (length[1]) {
        write_file("model.safetensors.index.json", part[1], length[1], 0);
        write_file("a", part[2], length[2], 1);
        write_file("b", part[3], length[3], 1);
    } else {
        write_file("model.safetensors", part[2], length[2], 1);
    }
    if (!setjmp(refused)) {
        Model m = model_load(directory, 0);
        model_free(&m);
        if (allocations || openings) abort(); // a leak
    }
    while (allocations) free(allocated[allocations - 1]);
    while (openings) fclose(opened[openings - 1]);
    return 0;
}
