/* Load and limit for `evtchnd-bench blk`, one source for both ends of a blkif ring (x86_64 ABI).
 *
 *   blkload front ...   the guest's end: keeps `depth` reads in flight, sleeps on its eventfd as a guest's vCPU would
 *   blkload back  ...   the limit: a backend in C with the same steps as evtchnd's worker (private copy, grants pinned
 *                       by compare-and-swap, preadv2 into the guest's pages, unpin, response, notify if due, the same
 *                       polling window), but without journal, checks of configuration or several devices
 *
 * Layouts: xen/include/public/io/ring.h, io/blkif.h, grant_table.h.
 * Arguments are `name=value`; descriptors are inherited. Results: one line of JSON on standard output. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#include "program.h"

enum { PAGE = 4096, OP_READ = 0, OP_INDIRECT = 6, DIRECT_SEGMENTS = 11, MOST_SEGMENTS = 256, PUSH_BYTES = 1 << 20 };
enum { GTF_PERMIT_ACCESS = 1, GTF_READONLY = 4, GTF_READING = 8, GTF_WRITING = 16 };

struct segment { uint32_t gref; uint8_t first, last; uint16_t pad; };
struct direct { uint8_t op, nr; uint16_t handle; uint32_t pad; uint64_t id, sector; struct segment seg[DIRECT_SEGMENTS]; };
struct indirect { uint8_t op, inner; uint16_t nr; uint32_t pad; uint64_t id, sector; uint16_t handle, pad2; uint32_t gref[8]; };
struct response { uint64_t id; uint8_t op, pad; int16_t status; uint32_t pad2; };
union entry { struct direct d; struct indirect i; struct response r; uint8_t raw[112]; };
struct ring { uint32_t req_prod, req_event, rsp_prod, rsp_event; uint8_t pad[48]; union entry entry[]; };
struct grant { uint16_t flags, domid; uint32_t frame; };
_Static_assert(sizeof(struct direct) == 112 && sizeof(struct response) == 16, "blkif.h, x86_64");

static uint8_t *ram;
static struct ring *ring;
static uint32_t mask;
static uint64_t cpu_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return t.tv_sec * 1000000000ull + t.tv_nsec;
}

static void signal_fd(int fd)
{
    uint64_t one = 1;
    if (write(fd, &one, 8) != 8 && errno != EAGAIN) die("eventfd");
}

static int push_requests(uint32_t *pushed, uint32_t prod)
{
    uint32_t old = *pushed;
    __atomic_store_n(&ring->req_prod, prod, __ATOMIC_RELEASE);
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    *pushed = prod;
    return prod - __atomic_load_n(&ring->req_event, __ATOMIC_RELAXED) < prod - old;
}

/* Asks for a notification at the next response; nonzero: responses are already there. */
static int more_responses(uint32_t cons)
{
    __atomic_store_n(&ring->rsp_event, cons + 1, __ATOMIC_RELAXED);
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    return __atomic_load_n(&ring->rsp_prod, __ATOMIC_ACQUIRE) != cons;
}

static int front(void)
{
    int kick = number("kick", -1), irq = number("notify", -1);
    uint32_t depth = number("depth", 1), pages = number("pages", 1);
    uint32_t gref = number("gref", 0), indirect_gref = number("indirect_gref", 0);
    uint64_t blocks = number("sectors", 0) / (pages * 8), sequential = number("sequential", 0), next_block = 0;
    uint64_t spin_ns = number("spin_us", 0) * 1000;
    uint8_t *tables = ram + number("indirect_offset", 0);
    uint64_t seed = number("seed", 1) * 0x9e3779b97f4a7c15ull + 1;
    uint32_t prod = ring->req_prod, cons = ring->rsp_prod, pushed = prod;
    uint64_t sent[4096], kicks = 0, wakeups = 0, done = 0, bad = 0;
    uint32_t most = 4 << 20, *latency = malloc(most * sizeof *latency), samples = 0;
    uint32_t idle[4096], idles = 0;
    if (depth > mask + 1 || depth > 4096 || !blocks) { fprintf(stderr, "blkload: depth or sectors out of range\n"); return 2; }
    for (uint32_t i = 0; i < depth; i++) idle[idles++] = i;
    uint64_t begin = now(), end = begin + number("ms", 1000) * 1000000ull, t = begin;
    for (;;) {
        while (idles && t < end) {
            uint32_t slot = idle[--idles];
            union entry *e = &ring->entry[prod & mask];
            seed ^= seed << 13; seed ^= seed >> 7; seed ^= seed << 17;
            uint64_t block = sequential ? next_block++ % blocks : seed % blocks;
            struct segment *seg = e->d.seg;
            if (pages > DIRECT_SEGMENTS) {
                e->i = (struct indirect){ .op = OP_INDIRECT, .inner = OP_READ, .nr = pages, .id = slot, .sector = block * pages * 8 };
                e->i.gref[0] = indirect_gref + slot;
                seg = (struct segment *)(tables + (uint64_t)slot * PAGE);
            } else {
                e->d.op = OP_READ; e->d.nr = pages; e->d.handle = 0; e->d.id = slot; e->d.sector = block * pages * 8;
            }
            for (uint32_t i = 0; i < pages; i++)
                seg[i] = (struct segment){ .gref = gref + slot * pages + i, .first = 0, .last = 7 };
            sent[slot] = now();
            prod++;
        }
        if (prod != pushed && push_requests(&pushed, prod)) { kicks++; signal_fd(kick); }
        if (prod == cons) break;
        uint64_t until = spin_ns ? now() + spin_ns : 0;
        while (__atomic_load_n(&ring->rsp_prod, __ATOMIC_ACQUIRE) == cons) {
            if (until && now() < until) { __builtin_ia32_pause(); continue; }
            if (more_responses(cons)) break;
            struct pollfd p = { irq, POLLIN, 0 };
            if (poll(&p, 1, 10000) == 0) { fprintf(stderr, "blkload: no response within 10 s (%u of %u)\n", cons, prod); return 3; }
            uint64_t count;
            if (read(irq, &count, 8) < 0 && errno != EAGAIN) die("eventfd");
            wakeups++;
        }
        uint32_t have = __atomic_load_n(&ring->rsp_prod, __ATOMIC_ACQUIRE);
        t = now();
        for (; cons != have; cons++) {
            struct response r = ring->entry[cons & mask].r;
            if (r.id >= depth || r.status) { bad++; if (r.id >= depth) { fprintf(stderr, "blkload: response with id %lu\n", r.id); return 3; } }
            if (samples < most) latency[samples++] = t - sent[r.id];
            idle[idles++] = r.id;
            done++;
        }
    }
    double seconds = (now() - begin) / 1e9;
    qsort(latency, samples, sizeof *latency, compare);
    printf("{\"seconds\":%f,\"requests\":%lu,\"bad\":%lu,\"kicks\":%lu,\"wakeups\":%lu,\"p50_us\":%f,\"p99_us\":%f,\"cpu_us\":%f}\n",
           seconds, done, bad, kicks, wakeups, samples ? latency[samples / 2] / 1e3 : 0,
           samples ? latency[(uint64_t)samples * 99 / 100] / 1e3 : 0, cpu_ns() / 1e3);
    return bad != 0;
}

static struct grant *grants;
static uint32_t nr_grants;

static uint8_t *pin(uint32_t gref, int write)
{
    if (gref >= nr_grants) return NULL;
    uint32_t *word = (uint32_t *)&grants[gref], old = __atomic_load_n(word, __ATOMIC_RELAXED);
    for (int i = 0; i < 5; i++) {
        if ((old >> 16) != 0 || (old & 3) != GTF_PERMIT_ACCESS || (write && (old & GTF_READONLY))) return NULL;
        uint32_t new = old | GTF_READING | (write ? GTF_WRITING : 0);
        if (__atomic_compare_exchange_n(word, &old, new, 0, __ATOMIC_SEQ_CST, __ATOMIC_RELAXED))
            return ram + (uint64_t)grants[gref].frame * PAGE;
    }
    return NULL;
}

static void unpin(uint32_t gref)
{
    __atomic_fetch_and(&grants[gref].flags, (uint16_t)~(GTF_READING | GTF_WRITING), __ATOMIC_SEQ_CST);
}

static int16_t serve(const union entry *e, int image, size_t *served)
{
    struct segment seg[MOST_SEGMENTS];
    struct iovec iov[MOST_SEGMENTS];
    uint32_t nr = e->d.nr, used = 0;
    uint64_t sector = e->d.sector;
    int16_t status = 0;
    if (e->d.op == OP_INDIRECT) {
        nr = e->i.nr; sector = e->i.sector;
        uint8_t *table = nr <= MOST_SEGMENTS ? pin(e->i.gref[0], 0) : NULL;
        if (!table) return -1;
        memcpy(seg, table, nr * sizeof *seg);
        unpin(e->i.gref[0]);
    } else {
        if (e->d.op != OP_READ || nr > DIRECT_SEGMENTS) return -1;
        memcpy(seg, e->d.seg, nr * sizeof *seg);
    }
    uint32_t pinned = 0;
    size_t want = 0;
    for (; pinned < nr; pinned++) {
        struct segment *s = &seg[pinned];
        uint8_t *page = s->first <= s->last && s->last < 8 ? pin(s->gref, 1) : NULL;
        if (!page) { status = -1; break; }
        uint8_t *from = page + s->first * 512;
        size_t length = (s->last - s->first + 1) * 512;
        if (used && (uint8_t *)iov[used - 1].iov_base + iov[used - 1].iov_len == from) iov[used - 1].iov_len += length;
        else iov[used++] = (struct iovec){ from, length };
        want += length;
    }
    if (!status) {
        ssize_t got = preadv2(image, iov, used, sector * 512, RWF_NOWAIT);
        if (got != (ssize_t)want) got = preadv(image, iov, used, sector * 512);
        if (got != (ssize_t)want) status = -1;
    }
    while (pinned) unpin(seg[--pinned].gref);
    *served += want;
    return status;
}

static int back(void)
{
    int kick = number("kick", -1), irq = number("notify", -1), image = number("image", -1);
    uint64_t window = number("poll_us", 50) * 1000, requests = 0, notifications = 0, wakeups = 0;
    uint32_t cons = 0, prod = 0;
    grants = (struct grant *)(ram + number("grants_offset", 0));
    nr_grants = number("grants", 512);
    struct sigaction action = { .sa_handler = stop };
    sigaction(SIGTERM, &action, NULL);
    printf("ready\n"); fflush(stdout);
    while (!stopped) {
        uint64_t until = now() + window;
        for (;;) {
            uint32_t have = __atomic_load_n(&ring->req_prod, __ATOMIC_ACQUIRE), old = prod;
            if (have != cons) {
                if (have - prod > mask + 1) { fprintf(stderr, "blkload: index jump\n"); return 3; }
                size_t served = 0;
                while (cons != have && served < PUSH_BYTES) {
                    union entry copy = ring->entry[cons++ & mask];
                    struct response r = { .id = copy.d.id, .op = copy.d.op, .status = serve(&copy, image, &served) };
                    ring->entry[prod++ & mask].r = r;
                    requests++;
                }
                __atomic_store_n(&ring->rsp_prod, prod, __ATOMIC_RELEASE);
                __atomic_thread_fence(__ATOMIC_SEQ_CST);
                if (prod - __atomic_load_n(&ring->rsp_event, __ATOMIC_RELAXED) < prod - old) { notifications++; signal_fd(irq); }
                until = now() + window;
            } else if (now() >= until) {
                __atomic_store_n(&ring->req_event, cons + 1, __ATOMIC_RELAXED);
                __atomic_thread_fence(__ATOMIC_SEQ_CST);
                if (__atomic_load_n(&ring->req_prod, __ATOMIC_ACQUIRE) == cons) break;
            } else __builtin_ia32_pause();
        }
        struct pollfd p = { kick, POLLIN, 0 };
        if (poll(&p, 1, -1) < 0 && errno != EINTR) die("poll");
        uint64_t count;
        if (read(kick, &count, 8) < 0 && errno != EAGAIN && errno != EINTR) die("eventfd");
        wakeups++;
    }
    printf("{\"requests\":%lu,\"notifications\":%lu,\"wakeups\":%lu,\"cpu_us\":%f}\n", requests, notifications, wakeups, cpu_ns() / 1e3);
    return 0;
}

int main(int argc, const char **argv)
{
    if (argc < 2) { fprintf(stderr, "usage: blkload front|back name=value ...\n"); return 2; }
    args = argv + 2;
    int cpu = number("cpu", -1), fd = number("ram", -1);
    if (cpu >= 0) {
        cpu_set_t set;
        CPU_ZERO(&set); CPU_SET(cpu, &set);
        if (sched_setaffinity(0, sizeof set, &set)) die("cpu");
    }
    struct stat st;
    if (fstat(fd, &st)) die("ram");
    ram = mmap(NULL, st.st_size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, 0);
    if (ram == MAP_FAILED) die("mmap");
    ring = (struct ring *)(ram + number("ring_offset", 0));
    uint32_t entries = (number("ring_pages", 1) * PAGE - sizeof *ring) / sizeof(union entry);
    while (entries & (entries - 1)) entries &= entries - 1;
    mask = entries - 1;
    return !strcmp(argv[1], "front") ? front() : back();
}
