/* A block frontend that shares nothing with ours: Xen's own ring.h and blkif.h (package libxen-dev) make every layout.
 *
 *   blkfront MODE name=value ...
 *     verify  writes and reads blocks of 1..11 pages (indirect: up to `indirect`) at `depth`, each word checked; prints
 *             the version of every block at the end
 *     bad     requests that are wrong, one after the other, each answered by an error, and good ones between them
 *     jump    req_prod runs away: nothing may be answered
 * Descriptors ram, kick, notify are inherited; offsets are bytes in ram; data pages are granted from gref on, one
 * after the other, then the tables of indirect requests from table_gref on. Exit status 0: all as it should be.
 * -DX86_32: the layout of a 32-bit guest (u64 aligned to 4). */
#define _GNU_SOURCE
#define __XEN_INTERFACE_VERSION__ 0x00040d00
#include <errno.h>
#include <poll.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define xen_mb() __atomic_thread_fence(__ATOMIC_SEQ_CST)
#define xen_rmb() __atomic_thread_fence(__ATOMIC_ACQUIRE)
#define xen_wmb() __atomic_thread_fence(__ATOMIC_RELEASE)
#include <xen/grant_table.h>
#include <xen/io/ring.h>
#ifdef X86_32
#pragma pack(push, 4)
#endif
#include <xen/io/blkif.h>
#ifdef X86_32
#pragma pack(pop)
_Static_assert(sizeof(struct blkif_request) == 108 && sizeof(struct blkif_response) == 12, "x86_32");
#else
_Static_assert(sizeof(struct blkif_request) == 112 && sizeof(struct blkif_response) == 16, "x86_64");
#endif

enum { PAGE = 4096, SECTOR = 512, WORDS = SECTOR / 8, MOST_DEPTH = 512, NO_ANSWER_MS = 300 };

static char **args;
static long number(const char *name)
{
    size_t n = strlen(name);
    for (char **a = args; *a; a++)
        if (!strncmp(*a, name, n) && (*a)[n] == '=')
            return atol(*a + n + 1);
    fprintf(stderr, "blkfront: %s= is missing\n", name);
    exit(2);
}

#define FAIL(...) do { fprintf(stderr, "blkfront: " __VA_ARGS__); fputc('\n', stderr); exit(1); } while (0)

static uint8_t *ram, *data, *tables;
static int kick_fd, notify_fd;
static struct blkif_front_ring front;
static uint32_t gref, table_gref, per_slot, depth;
static uint64_t kicks, sleeps, random_state;

static uint64_t rnd(void)
{
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return random_state;
}

static void push(void)
{
    int notify;
    RING_PUSH_REQUESTS_AND_CHECK_NOTIFY(&front, notify);
    if (notify) {
        uint64_t one = 1;
        kicks++;
        if (write(kick_fd, &one, 8) != 8) FAIL("kick: %s", strerror(errno));
    }
}

/* 0: nothing came in that time */
static int wait_response(int milliseconds)
{
    for (;;) {
        int more;
        RING_FINAL_CHECK_FOR_RESPONSES(&front, more);
        if (more) return 1;
        struct pollfd p = { notify_fd, POLLIN, 0 };
        uint64_t count;
        sleeps++;
        if (poll(&p, 1, milliseconds) == 0) {
            RING_FINAL_CHECK_FOR_RESPONSES(&front, more);
            return more;
        }
        if (read(notify_fd, &count, 8) < 0 && errno != EAGAIN) FAIL("notify: %s", strerror(errno));
    }
}

static uint64_t word(uint64_t sector, uint64_t version, unsigned index)
{
    return sector * 0x9e3779b97f4a7c15ull ^ version << 8 ^ index;
}

static void fill(uint8_t *at, uint64_t sector, uint64_t version)
{
    for (unsigned i = 0; i < WORDS; i++)
        ((uint64_t *)at)[i] = version ? word(sector, version, i) : 0;
}

static void check(const uint8_t *at, uint64_t sector, uint64_t version)
{
    for (unsigned i = 0; i < WORDS; i++) {
        uint64_t want = version ? word(sector, version, i) : 0, have = ((const uint64_t *)at)[i];
        if (have != want) FAIL("sector %lu word %u: %lx, written was %lx", sector, i, have, want);
    }
}

static struct blkif_request_segment *segments_of(uint32_t slot, struct blkif_request *request, unsigned pages, unsigned op,
                                                 uint64_t id, uint64_t sector)
{
    if (pages <= BLKIF_MAX_SEGMENTS_PER_REQUEST) {
        request->operation = op;
        request->nr_segments = pages;
        request->handle = 0;
        request->id = id;
        request->sector_number = sector;
        return request->seg;
    }
    struct blkif_request_indirect *indirect = (void *)request;
    indirect->operation = BLKIF_OP_INDIRECT;
    indirect->indirect_op = op;
    indirect->nr_segments = pages;
    indirect->id = id;
    indirect->sector_number = sector;
    indirect->handle = 0;
    indirect->indirect_grefs[0] = table_gref + slot;
    return (void *)(tables + (uint64_t)slot * PAGE);
}

/* ---- verify */
struct flight { uint64_t id, block, version; unsigned op, pages; };

static int verify(void)
{
    uint64_t count = number("count"), blocks = number("blocks"), issued = 0, answered = 0, serial = 1;
    unsigned most = number("indirect") ? number("indirect") : BLKIF_MAX_SEGMENTS_PER_REQUEST;
    uint64_t *version = calloc(blocks, sizeof *version);
    uint8_t *busy = calloc(blocks, 1);
    struct flight *flight = calloc(depth, sizeof *flight);
    uint64_t flushes = 0;
    if (most > per_slot) FAIL("%u pages a request, slots have %u", most, per_slot);
    while (answered < count) {
        for (uint32_t slot = 0; slot < depth && issued < count; slot++) {
            struct flight *f = &flight[slot];
            if (f->id || RING_FULL(&front)) continue;
            unsigned kind = rnd() % 32, pages = 1 + rnd() % most, op = kind & 1 ? BLKIF_OP_WRITE : BLKIF_OP_READ;
            struct blkif_request *request = RING_GET_REQUEST(&front, front.req_prod_pvt);
            if (kind == 31) {
                memset(request, 0, sizeof *request);
                request->operation = BLKIF_OP_FLUSH_DISKCACHE;
                request->id = serial;
                *f = (struct flight){ .id = serial++, .op = BLKIF_OP_FLUSH_DISKCACHE };
            } else {
                /* a block is one page; a request covers `pages` of them, none of them in flight already */
                uint64_t block = rnd() % (blocks - pages + 1);
                unsigned i;
                for (i = 0; i < pages && !busy[block + i]; i++);
                if (i < pages) continue;
                memset(busy + block, 1, pages);
                struct blkif_request_segment *seg = segments_of(slot, request, pages, op, serial, block * 8);
                uint8_t *at = data + (uint64_t)slot * per_slot * PAGE;
                for (i = 0; i < pages; i++) {
                    seg[i].gref = gref + slot * per_slot + i;
                    seg[i].first_sect = 0;
                    seg[i].last_sect = 7;
                }
                if (op == BLKIF_OP_WRITE) {
                    for (i = 0; i < pages * 8; i++)
                        fill(at + i * SECTOR, block * 8 + i, serial);
                } else {
                    memset(at, 0xee, (size_t)pages * PAGE);
                }
                *f = (struct flight){ serial, block, serial, op, pages };
                serial++;
            }
            front.req_prod_pvt++;
            issued++;
        }
        push();
        if (!wait_response(20000)) FAIL("no response within 20 s, %lu of %lu answered", answered, issued);
        RING_IDX have = front.sring->rsp_prod;
        xen_rmb();
        for (; front.rsp_cons != have; front.rsp_cons++) {
            struct blkif_response response = *RING_GET_RESPONSE(&front, front.rsp_cons);
            struct flight *f = NULL;
            for (uint32_t slot = 0; slot < depth; slot++)
                if (flight[slot].id && flight[slot].id == response.id) f = &flight[slot];
            if (!f) FAIL("a response to request %lu, which is not in flight", (unsigned long)response.id);
            if (response.status != BLKIF_RSP_OKAY || response.operation != f->op) /* indirect: the inner one */
                FAIL("request %lu op %u: response op %u status %d", f->id, f->op, response.operation, response.status);
            if (f->op == BLKIF_OP_FLUSH_DISKCACHE) {
                flushes++;
            } else {
                uint8_t *at = data + (uint64_t)(f - flight) * per_slot * PAGE;
                for (unsigned i = 0; i < f->pages; i++) {
                    uint64_t block = f->block + i;
                    if (f->op == BLKIF_OP_WRITE)
                        version[block] = f->version;
                    else
                        for (unsigned s = 0; s < 8; s++)
                            check(at + (i * 8 + s) * SECTOR, block * 8 + s, version[block]);
                    busy[block] = 0;
                }
            }
            f->id = 0;
            answered++;
        }
    }
    printf("%lu %lu %lu %lu\n", answered, flushes, kicks, sleeps);
    for (uint64_t block = 0; block < blocks; block++)
        printf("%lu\n", version[block]);
    return 0;
}

/* ---- bad */
static int16_t ask(const char *what, uint64_t id, unsigned op)
{
    front.req_prod_pvt++;
    push();
    if (!wait_response(20000)) FAIL("%s: no response", what);
    struct blkif_response response = *RING_GET_RESPONSE(&front, front.rsp_cons);
    front.rsp_cons++;
    if (response.id != id || response.operation != op)
        FAIL("%s: response to %lu op %u", what, (unsigned long)response.id, response.operation);
    if (front.sring->rsp_prod != front.rsp_cons) FAIL("%s: more than one response", what);
    return response.status;
}

static int bad(void)
{
    uint64_t sectors = number("sectors"), id = 0xfedcba9876543210ull;
    uint32_t unused = number("unused_gref"), foreign = number("foreign_gref"), outside = number("outside_gref");
    uint32_t readonly = number("readonly_gref");
    struct { const char *what; unsigned op, nr; uint64_t sector; uint32_t gref; unsigned first, last; int unsupported; } cases[] = {
        { "unused gref", BLKIF_OP_READ, 1, 0, unused, 0, 7, 0 },
        { "gref out of table", BLKIF_OP_READ, 1, 0, 0x7fffffff, 0, 7, 0 },
        { "gref -1", BLKIF_OP_READ, 1, 0, 0xffffffff, 0, 7, 0 },
        { "gref of another domain", BLKIF_OP_READ, 1, 0, foreign, 0, 7, 0 },
        { "frame outside RAM", BLKIF_OP_READ, 1, 0, outside, 0, 7, 0 },
        { "read into a read-only page", BLKIF_OP_READ, 1, 0, readonly, 0, 7, 0 },
        { "no segments", BLKIF_OP_READ, 0, 0, gref, 0, 7, 0 },
        { "12 segments", BLKIF_OP_READ, 12, 0, gref, 0, 7, 0 },
        { "255 segments", BLKIF_OP_WRITE, 255, 0, gref, 0, 7, 0 },
        { "last before first", BLKIF_OP_WRITE, 1, 0, gref, 5, 4, 0 },
        { "last sector 8", BLKIF_OP_READ, 1, 0, gref, 0, 8, 0 },
        { "sectors 255", BLKIF_OP_READ, 1, 0, gref, 255, 255, 0 },
        { "one behind the end", BLKIF_OP_READ, 1, sectors - 7, gref, 0, 7, 0 },
        { "at the end", BLKIF_OP_WRITE, 1, sectors, gref, 0, 0, 0 },
        { "sector 2^64 - 1", BLKIF_OP_READ, 1, UINT64_MAX, gref, 0, 7, 0 },
        { "sector 2^55", BLKIF_OP_WRITE, 1, 1ull << 55, gref, 0, 7, 0 },
        { "operation 4", BLKIF_OP_RESERVED_1, 0, 0, gref, 0, 7, 1 },
        { "operation 200", 200, 1, 0, gref, 0, 7, 1 },
        { "a barrier, never offered", BLKIF_OP_WRITE_BARRIER, 1, 0, gref, 0, 7, 1 },
    };
    for (unsigned i = 0; i < sizeof cases / sizeof *cases; i++, id++) {
        struct blkif_request *request = RING_GET_REQUEST(&front, front.req_prod_pvt);
        memset(request, 0x5a, sizeof *request);
        request->operation = cases[i].op;
        request->nr_segments = cases[i].nr;
        request->id = id;
        request->sector_number = cases[i].sector;
        for (unsigned s = 0; s < BLKIF_MAX_SEGMENTS_PER_REQUEST; s++)
            request->seg[s] = (struct blkif_request_segment){ cases[i].gref, cases[i].first, cases[i].last };
        int16_t status = ask(cases[i].what, id, cases[i].op);
        if (cases[i].unsupported ? status >= 0 : status != BLKIF_RSP_ERROR)
            FAIL("%s: status %d", cases[i].what, status);
        /* and the disk goes on */
        request = RING_GET_REQUEST(&front, front.req_prod_pvt);
        request->operation = i & 1 ? BLKIF_OP_READ : BLKIF_OP_WRITE;
        request->nr_segments = 1;
        request->id = ~id;
        request->sector_number = sectors - 8;
        request->seg[0] = (struct blkif_request_segment){ gref, 0, 7 };
        memset(data, 0xa5, PAGE);
        if ((status = ask("a good one", ~id, request->operation)) != BLKIF_RSP_OKAY)
            FAIL("good request after '%s': status %d", cases[i].what, status);
    }
    struct { const char *what; unsigned inner, nr; uint32_t table, gref; } more[] = {
        { "indirect flush", BLKIF_OP_FLUSH_DISKCACHE, 1, table_gref, gref },
        { "indirect indirect", BLKIF_OP_INDIRECT, 1, table_gref, gref },
        { "no indirect segments", BLKIF_OP_READ, 0, table_gref, gref },
        { "65535 indirect segments", BLKIF_OP_READ, 65535, table_gref, gref },
        { "one above the limit", BLKIF_OP_READ, number("max_indirect") + 1, table_gref, gref },
        { "table not granted", BLKIF_OP_READ, 12, unused, gref },
        { "a gref in the table not granted", BLKIF_OP_WRITE, 12, table_gref, unused },
    };
    for (unsigned i = 0; i < sizeof more / sizeof *more; i++, id++) {
        struct blkif_request_indirect *request = (void *)RING_GET_REQUEST(&front, front.req_prod_pvt);
        memset(request, 0, sizeof *request);
        request->operation = BLKIF_OP_INDIRECT;
        request->indirect_op = more[i].inner;
        request->nr_segments = more[i].nr;
        request->id = id;
        for (unsigned s = 0; s < BLKIF_MAX_INDIRECT_PAGES_PER_REQUEST; s++)
            request->indirect_grefs[s] = more[i].table;
        struct blkif_request_segment *seg = (void *)tables;
        for (unsigned s = 0; s < PAGE / sizeof *seg; s++)
            seg[s] = (struct blkif_request_segment){ s == 7 ? more[i].gref : gref, 0, 7 };
        int16_t status = ask(more[i].what, id, more[i].inner);
        if (status >= 0) FAIL("%s: status %d", more[i].what, status);
    }
    printf("%zu\n", sizeof cases / sizeof *cases + sizeof more / sizeof *more);
    return 0;
}

/* ---- jump */
static int jump(void)
{
    uint64_t one = 1;
    RING_IDX before = front.sring->rsp_prod;
    front.sring->req_prod = front.req_prod_pvt + (uint32_t)number("by");
    xen_mb();
    if (write(kick_fd, &one, 8) != 8) FAIL("kick: %s", strerror(errno));
    usleep(NO_ANSWER_MS * 1000);
    if (front.sring->rsp_prod != before) FAIL("answered %u requests that never were", front.sring->rsp_prod - before);
    printf("0\n");
    return 0;
}

int main(int argc, char **argv)
{
    if (argc < 2) return 2;
    args = argv + 2;
    struct stat st;
    int fd = number("ram");
    if (fstat(fd, &st)) FAIL("ram: %s", strerror(errno));
    ram = mmap(NULL, st.st_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (ram == MAP_FAILED) FAIL("ram: %s", strerror(errno));
    kick_fd = number("kick");
    notify_fd = number("notify");
    data = ram + number("data");
    tables = ram + number("tables");
    gref = number("gref");
    table_gref = number("table_gref");
    per_slot = number("per_slot");
    depth = number("depth");
    random_state = number("seed") * 0x9e3779b97f4a7c15ull | 1;
    struct blkif_sring *sring = (void *)(ram + number("ring"));
    uint32_t start = number("start");
    if (start) { /* indices near their end: both sides were set there */
        FRONT_RING_ATTACH(&front, sring, start, number("ring_pages") * PAGE);
        front.req_prod_pvt = start;
    } else {
        FRONT_RING_INIT(&front, sring, number("ring_pages") * PAGE);
    }
    if (depth > RING_SIZE(&front)) depth = RING_SIZE(&front);
    if (!strcmp(argv[1], "verify")) return verify();
    if (!strcmp(argv[1], "bad")) return bad();
    if (!strcmp(argv[1], "jump")) return jump();
    return 2;
}
