/* Load and limit for `evtchnd-bench net`.
 *
 *   netload send | receive | ping      a guest's ends of netif rings, served by evtchnd; sleeps as a guest's vCPU would
 *   netload tapsend | tapreceive | tapping   the limit: the same packets, written to and read from a TAP by this program,
 *                                      without rings, grants or a guest: one write or read a packet
 *   netload generate | echo            the host's ends: what comes for a TAP (a packet socket), what answers (a UDP one)
 *
 * `receive` generates, too: a guest's end and the host's share one CPU, the backend has the other.
 * A TCP packet has RST set: the host's stack takes it in whole, finds no connection and answers nothing.
 *
 * Layouts: xen/include/public/io/ring.h, io/netif.h, linux/virtio_net.h.
 * Arguments are `name=value`; descriptors are inherited. Results: one line of JSON on standard output. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <poll.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#include "program.h"

enum { PAGE = 4096, ENTRIES = 256, BURST = 32, ROUNDS = 1 << 20, QUIET_MS = 200 };
enum { CSUM_BLANK = 1, DATA_VALIDATED = 2, MORE_DATA = 4, EXTRA_INFO = 8, EXTRA_GSO = 1, GSO_TCPV4 = 1 };

struct tx_request { uint32_t gref; uint16_t offset, flags, id, size; };
struct tx_response { uint16_t id; int16_t status; };
struct rx_request { uint16_t id, pad; uint32_t gref; };
struct rx_response { uint16_t id, offset, flags; int16_t status; };
struct gso_extra { uint8_t type, flags; uint16_t size; uint8_t kind, pad; uint16_t features; };
union tx_entry { struct tx_request q; struct tx_response r; struct gso_extra x; };
union rx_entry { struct rx_request q; struct rx_response r; struct gso_extra x; };
struct ring { uint32_t req_prod, req_event, rsp_prod, rsp_event; uint8_t pad[48]; union { union tx_entry tx[ENTRIES]; union rx_entry rx[ENTRIES]; }; };
struct vnet { uint8_t flags, gso_type; uint16_t hdr_len, gso_size, csum_start, csum_offset, buffers; };
_Static_assert(sizeof(union tx_entry) == 12 && sizeof(union rx_entry) == 8 && sizeof(struct vnet) == 12, "netif.h");

static uint8_t *ram;

static double cpu_us(void)
{
    struct timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return t.tv_sec * 1e6 + t.tv_nsec / 1e3;
}

static void signal_fd(int fd)
{
    uint64_t one = 1;
    if (write(fd, &one, 8) != 8 && errno != EAGAIN) die("eventfd");
}

/* ---- packets */

static unsigned size, gso;       /* of a frame; of its segments' payload, 0: it is UDP and no larger than the MTU */
static uint8_t head[54];         /* Ethernet, IPv4, UDP or TCP */
static unsigned head_size;

static uint16_t folded(uint32_t sum) { while (sum >> 16) sum = (sum & 0xffff) + (sum >> 16); return sum; }
static uint32_t words(const uint8_t *p, unsigned n)
{
    uint32_t sum = 0;
    for (unsigned i = 0; i < n; i += 2) sum += p[i] << 8 | p[i + 1];
    return sum;
}
static void mac(uint8_t *to, const char *name)
{
    uint64_t value = number(name, 0);
    for (int i = 0; i < 6; i++) to[i] = value >> (40 - 8 * i);
}

/* From `from` to `to`, IPv4 addresses as numbers; a checksum that is left to do (GSO), or none (UDP). */
static void make_head(void)
{
    size = number("size", 64);
    gso = number("gso", 0);
    head_size = gso ? 54 : 42;
    mac(head, "to_mac");
    mac(head + 6, "from_mac");
    uint8_t *ip = head + 14, *l4 = head + 34;
    unsigned length = size - 14, rest = size - 34;
    memcpy(head + 12, (uint8_t[]){ 8, 0, 0x45, 0, length >> 8, length, 0, 0, 0, 0, 64, gso ? 6 : 17 }, 12);
    *(uint32_t *)(ip + 12) = htonl(number("from", 0));
    *(uint32_t *)(ip + 16) = htonl(number("to", 0));
    *(uint16_t *)(ip + 10) = htons(0xffff ^ folded(words(ip, 20)));
    *(uint16_t *)l4 = htons(number("from_port", 7000));
    *(uint16_t *)(l4 + 2) = htons(number("to_port", 9));
    if (gso) {
        l4[12] = 5 << 4; l4[13] = 4 /* RST */;
        *(uint16_t *)(l4 + 16) = htons(folded(words(ip + 12, 8) + 6 + rest));
    } else
        *(uint16_t *)(l4 + 4) = htons(rest);
}

static struct vnet vnet(void)
{
    return gso ? (struct vnet){ 1, 1, 54, gso, 34, 16, 0 } : (struct vnet){ 0 };
}

/* ---- a guest */

static int push_requests(struct ring *ring, uint32_t *pushed, uint32_t prod)
{
    uint32_t old = *pushed;
    __atomic_store_n(&ring->req_prod, prod, __ATOMIC_RELEASE);
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    *pushed = prod;
    return prod - __atomic_load_n(&ring->req_event, __ATOMIC_RELAXED) < prod - old;
}

static uint32_t produced(struct ring *ring) { return __atomic_load_n(&ring->rsp_prod, __ATOMIC_ACQUIRE); }

/* Sleeps until response `event` is there (nonzero: it is not after `ms`). */
static int sleep_until(struct ring *ring, int irq, uint32_t event, uint32_t cons, int ms)
{
    __atomic_store_n(&ring->rsp_event, event, __ATOMIC_RELAXED);
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    if (produced(ring) - cons >= event - cons) return 0;
    struct pollfd p = { irq, POLLIN, 0 };
    if (poll(&p, 1, ms) == 0) return 1;
    uint64_t count;
    if (read(irq, &count, 8) < 0 && errno != EAGAIN) die("eventfd");
    return 0;
}

/* One packet's requests, its pages those of its slots. */
static uint32_t put(struct ring *ring, uint32_t prod, uint32_t gref, uint8_t *pages)
{
    unsigned slot = prod % ENTRIES, left = size, extra = gso ? 1 : 0;
    memcpy(pages + slot * PAGE, head, head_size);
    for (unsigned first = 1; left; first = 0) {
        unsigned part = left < PAGE ? left : PAGE;
        slot = prod++ % ENTRIES;
        left -= part;
        ring->tx[slot].q = (struct tx_request){ gref + slot, 0, left ? MORE_DATA : 0, slot, first ? size : part };
        if (first && extra) {
            ring->tx[slot].q.flags |= EXTRA_INFO | CSUM_BLANK | DATA_VALIDATED;
            ring->tx[prod++ % ENTRIES].x = (struct gso_extra){ EXTRA_GSO, 0, gso, GSO_TCPV4, 0, 0 };
        }
    }
    return prod;
}

static void take(struct ring *ring, uint32_t *cons, uint64_t *bad)
{
    for (uint32_t have = produced(ring); *cons != have; ++*cons)
        if (ring->tx[*cons % ENTRIES].r.status < 0) ++*bad;
}

static int guest_send(void)
{
    struct ring *ring = (struct ring *)(ram + number("tx_ring", 0));
    uint8_t *pages = ram + number("tx_pages", 0);
    int kick = number("tx_kick", -1), irq = number("tx_notify", -1);
    uint32_t gref = number("tx_gref", 0), slots = (size + PAGE - 1) / PAGE + (gso ? 1 : 0);
    uint32_t prod = ring->req_prod, cons = ring->rsp_prod, pushed = prod;
    uint64_t packets = 0, bad = 0, kicks = 0, begin = now(), end = begin + number("ms", 1000) * 1000000ull;
    while (now() < end) {
        for (unsigned i = 0; i < BURST && prod + slots - cons <= ENTRIES; i++, packets++) prod = put(ring, prod, gref, pages);
        if (prod != pushed && push_requests(ring, &pushed, prod)) { kicks++; signal_fd(kick); }
        take(ring, &cons, &bad);
        /* as Linux' netfront: woken when half of what is there has been answered */
        if (prod + slots - cons > ENTRIES && sleep_until(ring, irq, cons + (prod - cons) / 2 + 1, cons, 10000)) return 3;
    }
    while (cons != prod) {
        if (sleep_until(ring, irq, cons + 1, cons, 10000)) { fprintf(stderr, "netload: %u slots have no answer\n", prod - cons); return 3; }
        take(ring, &cons, &bad);
    }
    printf("{\"seconds\":%f,\"packets\":%lu,\"bad\":%lu,\"kicks\":%lu}\n", (now() - begin) / 1e9, packets, bad, kicks);
    return 0;
}

/* The guest's receive ring: all pages are always posted, but those of responses that are being looked at. */
struct receiver { struct ring *ring; int kick, irq; uint32_t gref, prod, cons, pushed; uint64_t packets, bytes, bad, kicks, first, last; };

static void post(struct receiver *r)
{
    for (; r->prod - r->cons < ENTRIES; r->prod++)
        r->ring->rx[r->prod % ENTRIES].q = (struct rx_request){ r->prod % ENTRIES, 0, r->gref + r->prod % ENTRIES };
    if (r->prod != r->pushed && push_requests(r->ring, &r->pushed, r->prod)) { r->kicks++; signal_fd(r->kick); }
}

static struct receiver receiver(void)
{
    struct ring *ring = (struct ring *)(ram + number("rx_ring", 0));
    struct receiver r = { .ring = ring, .kick = number("rx_kick", -1), .irq = number("rx_notify", -1), .gref = number("rx_gref", 0) };
    r.prod = r.pushed = ring->req_prod;
    r.cons = produced(ring); /* what came between two readings is nobody's */
    post(&r);
    return r;
}

static void collect(struct receiver *r)
{
    uint32_t have = produced(r->ring);
    if (have == r->cons) return;
    r->last = now();
    if (!r->first) r->first = r->last;
    while (r->cons != have) {
        struct rx_response s = r->ring->rx[r->cons++ % ENTRIES].r;
        if (s.status < 0) { r->bad++; continue; }
        r->bytes += s.status;
        if (s.flags & EXTRA_INFO) r->cons++;
        if (!(s.flags & MORE_DATA)) r->packets++;
        else while (r->ring->rx[r->cons % ENTRIES].r.flags & MORE_DATA) r->bytes += r->ring->rx[r->cons++ % ENTRIES].r.status;
    }
}

/* ---- the host's ends */

static struct mmsghdr messages[BURST];
static struct iovec vectors[BURST][3];
static struct vnet header;
static uint8_t payload[1 << 16];

static void make_messages(void)
{
    header = vnet();
    for (int i = 0; i < BURST; i++) {
        vectors[i][0] = (struct iovec){ &header, 10 /* struct virtio_net_hdr */ };
        vectors[i][1] = (struct iovec){ head, head_size };
        vectors[i][2] = (struct iovec){ payload, size - head_size };
        messages[i].msg_hdr = (struct msghdr){ .msg_iov = vectors[i], .msg_iovlen = 3 };
    }
}

/* A burst into the TAP's queue; the kernel drops what finds it full. */
static void burst(int sock)
{
    if (sendmmsg(sock, messages, gso ? 4 : BURST, MSG_DONTWAIT) < 0 && errno != EAGAIN && errno != ENOBUFS) die("packet socket");
}

static int generate(void)
{
    int sock = number("sock", -1);
    make_messages();
    for (uint64_t end = now() + number("ms", 1000) * 1000000ull; now() < end;) burst(sock);
    printf("{}\n");
    return 0;
}

static int guest_receive(void)
{
    int sock = number("sock", -1);
    struct receiver r = receiver();
    make_messages();
    for (uint64_t end = now() + number("ms", 1000) * 1000000ull; now() < end;) {
        burst(sock);
        collect(&r);
        post(&r);
    }
    while (!sleep_until(r.ring, r.irq, r.cons + 1, r.cons, QUIET_MS)) { collect(&r); post(&r); }
    printf("{\"seconds\":%f,\"packets\":%lu,\"bytes\":%lu,\"bad\":%lu,\"kicks\":%lu}\n", (r.last - r.first) / 1e9, r.packets, r.bytes, r.bad, r.kicks);
    return 0;
}

static int echo(void)
{
    int sock = number("sock", -1);
    uint8_t data[2048];
    struct sockaddr_in peer;
    for (socklen_t length = sizeof peer; !stopped; length = sizeof peer) {
        ssize_t n = recvfrom(sock, data, sizeof data, 0, (struct sockaddr *)&peer, &length);
        if (n >= 0) sendto(sock, data, n, 0, (struct sockaddr *)&peer, length);
    }
    return 0;
}

/* ---- a round trip */

static int told(uint32_t *times, unsigned n, uint64_t begin)
{
    double seconds = (now() - begin) / 1e9;
    qsort(times, n, sizeof *times, compare);
    printf("{\"seconds\":%f,\"packets\":%u,\"bad\":0,\"p50_us\":%f,\"p99_us\":%f}\n", seconds, n, n ? times[n / 2] / 1e3 : 0, n ? times[n * 99ull / 100] / 1e3 : 0);
    return 0;
}

static int guest_ping(void)
{
    struct ring *ring = (struct ring *)(ram + number("tx_ring", 0));
    uint8_t *pages = ram + number("tx_pages", 0);
    int kick = number("tx_kick", -1);
    struct receiver r = receiver();
    static uint32_t times[ROUNDS];
    unsigned n = 0;
    uint32_t prod = ring->req_prod, pushed = prod;
    uint64_t begin = now(), end = begin + number("ms", 1000) * 1000000ull, sent = begin;
    for (; sent < end && n < ROUNDS; n++) {
        uint64_t before = r.packets;
        sent = now();
        prod = put(ring, prod, number("tx_gref", 0), pages);
        if (push_requests(ring, &pushed, prod)) signal_fd(kick);
        while (r.packets == before) {
            if (sleep_until(r.ring, r.irq, r.cons + 1, r.cons, 10000)) { fprintf(stderr, "netload: no answer\n"); return 3; }
            collect(&r);
        }
        times[n] = now() - sent;
        post(&r);
    }
    return told(times, n, begin);
}

/* ---- the limit */

enum { TURNS = 15, EACH = 17 * PAGE }; /* as much memory as a guest's ring has pages, in turn */
static uint8_t *buffers;
static unsigned turn;

/* A packet as it lies in memory, behind its vnet header. */
static ssize_t write_packet(int tap)
{
    uint8_t *buffer = buffers + turn++ % TURNS * EACH;
    struct vnet start = vnet();
    memcpy(buffer, &start, sizeof start);
    memcpy(buffer + sizeof start, head, head_size);
    return write(tap, buffer, sizeof start + size);
}

static int tap_send(void)
{
    int tap = number("tap", -1);
    uint64_t packets = 0, bad = 0, begin = now(), end = begin + number("ms", 1000) * 1000000ull;
    for (; now() < end; packets++) {
        ssize_t n = write_packet(tap);
        if (n < 0 && errno == EAGAIN) { poll(&(struct pollfd){ tap, POLLOUT, 0 }, 1, 1000); packets--; }
        else if (n < 0) bad++;
    }
    printf("{\"seconds\":%f,\"packets\":%lu,\"bad\":%lu,\"kicks\":0,\"cpu_us\":%f}\n", (now() - begin) / 1e9, packets, bad, cpu_us());
    return 0;
}

static int tap_receive(void)
{
    int tap = number("tap", -1);
    uint64_t packets = 0, bytes = 0, first = 0, last = 0;
    while (read(tap, buffers, EACH) >= 0) continue; /* what an earlier reading left */
    printf("ready\n"); fflush(stdout);
    for (;;) {
        ssize_t n = read(tap, buffers + turn++ % TURNS * EACH, EACH);
        if (n < 0) {
            if (errno != EAGAIN) die("tap");
            if (stopped) break;
            poll(&(struct pollfd){ tap, POLLIN, 0 }, 1, QUIET_MS);
            continue;
        }
        last = now();
        if (!first) first = last;
        packets++;
        bytes += n - sizeof(struct vnet);
    }
    printf("{\"seconds\":%f,\"packets\":%lu,\"bytes\":%lu,\"bad\":0,\"kicks\":0,\"cpu_us\":%f}\n", (last - first) / 1e9, packets, bytes, cpu_us());
    return 0;
}

static int tap_ping(void)
{
    int tap = number("tap", -1);
    static uint32_t times[ROUNDS];
    uint8_t data[2048];
    unsigned n = 0;
    uint64_t begin = now(), end = begin + number("ms", 1000) * 1000000ull, sent = begin;
    for (; sent < end && n < ROUNDS; n++) {
        sent = now();
        if (write_packet(tap) < 0) die("tap");
        while (read(tap, data, sizeof data) < 0)
            if (poll(&(struct pollfd){ tap, POLLIN, 0 }, 1, 10000) == 0) { fprintf(stderr, "netload: no answer\n"); return 3; }
        times[n] = now() - sent;
    }
    return told(times, n, begin);
}

int main(int argc, const char **argv)
{
    static const struct { const char *name; int (*run)(void); } modes[] = {
        { "send", guest_send }, { "receive", guest_receive }, { "ping", guest_ping }, { "generate", generate },
        { "echo", echo }, { "tapsend", tap_send }, { "tapreceive", tap_receive }, { "tapping", tap_ping },
    };
    args = argv + 2;
    for (unsigned i = 0; argc > 1 && i < sizeof modes / sizeof *modes; i++) {
        if (strcmp(argv[1], modes[i].name)) continue;
        int cpu = number("cpu", -1), fd = number("ram", -1);
        cpu_set_t set;
        CPU_ZERO(&set); CPU_SET(cpu, &set);
        if (cpu >= 0 && sched_setaffinity(0, sizeof set, &set)) die("cpu");
        struct sigaction action = { .sa_handler = stop };
        sigaction(SIGTERM, &action, NULL);
        struct stat st;
        if (fd >= 0) {
            if (fstat(fd, &st)) die("ram");
            ram = mmap(NULL, st.st_size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, 0);
            if (ram == MAP_FAILED) die("mmap");
        }
        buffers = mmap(NULL, ENTRIES * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
        if (buffers == MAP_FAILED) die("mmap");
        make_head();
        return modes[i].run();
    }
    fprintf(stderr, "usage: netload MODE name=value ...\n");
    return 2;
}
