/* Loads and limit for `evtchnd-bench wakeup`, one source:
 *
 *   wakeup front ...   the guest's end of one channel: request, kick, wait for the answer, so many rounds
 *   wakeup flood ...   the guest's end of many channels, at most one kick of each on the way
 *   wakeup back  ...   the limit: what answers them in C, with epoll where the worker sleeps and the same polling window
 *
 * A channel is an eventfd (kick), another (notify), and 128 bytes:
 *   0  u32 request   the guest counts up   |  4  u32 request_event  kick when `request` reaches it
 *   64 u32 answer    = request, when done  |  68 u32 answer_event   notify when `answer` reaches it
 * Producer and event index follow the rule of ring.h. Arguments are `name=value`; descriptors are inherited.
 * Results: one line of JSON on standard output. */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "program.h"

struct words { uint32_t request, request_event, pad[14], answer, answer_event, pad2[14]; };
_Static_assert(sizeof(struct words) == 128, "wakeupserver.py");

enum { PATIENCE_S = 20 };

static void signal_fd(int fd)
{
    uint64_t one = 1;
    if (write(fd, &one, 8) != 8 && errno != EAGAIN) die("eventfd");
}

static uint32_t load(uint32_t *word) { return __atomic_load_n(word, __ATOMIC_ACQUIRE); }
static void store(uint32_t *word, uint32_t value) { __atomic_store_n(word, value, __ATOMIC_RELEASE); }
static void fence(void) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

static struct words *words;

static void late(uint32_t request)
{
    fprintf(stderr, "wakeup: no answer to request %u within %d s\n", request, PATIENCE_S);
    exit(3);
}

static void print_latency(uint32_t *samples, uint32_t n)
{
    qsort(samples, n, sizeof *samples, compare);
    printf("\"p50_us\":%f,\"p99_us\":%f,\"p999_us\":%f", samples[n / 2] / 1e3, samples[(uint64_t)n * 99 / 100] / 1e3,
           samples[(uint64_t)n * 999 / 1000] / 1e3);
}

/* rounds, gap_us (at random up to twice that lies between rounds), always (kick also where it is not asked for),
 * doze (sleep on `notify` for the answer instead of looking) */
static int front(void)
{
    int kick = number("kick", -1), notify = number("notify", -1);
    uint32_t rounds = number("rounds", 1000), always = number("always", 0), doze = number("doze", 0);
    uint64_t gap = number("gap_us", 0) * 1000, kicks = 0, seed = 88172645463325252ull, begin = now();
    uint32_t *latency = malloc(rounds * sizeof *latency), request = words->request;
    for (uint32_t i = 0; i < rounds; i++) {
        seed ^= seed << 13; seed ^= seed >> 7; seed ^= seed << 17;
        uint64_t before = now(), pause = gap ? seed % (2 * gap) : 0, t;
        while ((t = now()) < before + pause) __builtin_ia32_pause();
        store(&words->request, ++request);
        fence();
        if (always || load(&words->request_event) == request) { kicks++; signal_fd(kick); }
        uint64_t until = t + PATIENCE_S * 1000000000ull;
        for (uint32_t looks = 0; load(&words->answer) != request;) {
            if (doze) {
                words->answer_event = request;
                fence();
                if (load(&words->answer) == request) break;
                struct pollfd p = { notify, POLLIN, 0 };
                if (poll(&p, 1, PATIENCE_S * 1000) == 0) late(request);
                uint64_t count;
                if (read(notify, &count, 8) < 0 && errno != EAGAIN) die("eventfd");
            } else {
                __builtin_ia32_pause();
                if (!(++looks & 0xffff) && now() > until) late(request);
            }
        }
        latency[i] = now() - t;
    }
    double seconds = (now() - begin) / 1e9;
    printf("{\"rounds\":%u,\"seconds\":%f,\"kicks\":%lu,", rounds, seconds, kicks);
    print_latency(latency, rounds);
    printf("}\n");
    return 0;
}

/* channels, busy (so many of them), ms; turn: one kick at a time, `gap_us` after the last answer, over the busy ones in
 * turn; otherwise each busy channel is kicked as soon as its last answer is there. Every request is kicked.
 * Standard input: the kick descriptors, in the channels' order. */
static int flood(void)
{
    uint32_t channels = number("channels", 1), busy = number("busy", channels), turn = number("turn", 0);
    uint64_t gap = number("gap_us", 0) * 1000, done = 0;
    int *kicks = malloc(channels * sizeof *kicks);
    for (uint32_t i = 0; i < channels; i++)
        if (scanf("%d", &kicks[i]) != 1) { fprintf(stderr, "wakeup: a kick descriptor is missing\n"); return 2; }
    uint64_t begin = now(), end = begin + number("ms", 100) * 1000000ull, t = begin, sign = begin;
    uint32_t at = 0, out = 0;
    while (t < end || out) {
        struct words *w = &words[at];
        uint32_t request = w->request, first = t < end;
        if (load(&w->answer) == request) {
            if (first) {
                store(&w->request, request + 1);
                fence();
                signal_fd(kicks[at]);
                done++;
                out = 1;
            }
            sign = t;
        }
        if (turn && first) {
            while (load(&w->answer) != w->request) {
                __builtin_ia32_pause();
                if ((t = now()) > sign + PATIENCE_S * 1000000000ull) late(w->request);
            }
            sign = now();
            while (gap && now() < sign + gap) __builtin_ia32_pause();
        }
        if (++at >= busy) {
            at = 0;
            t = now();
            if (t >= end) {
                out = 0;
                for (uint32_t i = 0; i < busy; i++) out |= load(&words[i].answer) != words[i].request;
            }
            if (t > sign + PATIENCE_S * 1000000000ull) late(words[0].request);
        } else if (turn)
            t = now();
    }
    double seconds = (now() - begin) / 1e9;
    printf("{\"kicks\":%lu,\"seconds\":%f}\n", done, seconds);
    return 0;
}

/* poll_us: 0 never polls. Ends with SIGTERM. */
static int back(void)
{
    int kick = number("kick", -1), notify = number("notify", -1), epoll = epoll_create1(EPOLL_CLOEXEC);
    uint64_t window = number("poll_us", 0) * 1000;
    uint32_t seen = words->request;
    struct epoll_event event = { .events = EPOLLIN };
    if (epoll < 0 || epoll_ctl(epoll, EPOLL_CTL_ADD, kick, &event)) die("epoll");
    struct sigaction action = { .sa_handler = stop };
    sigaction(SIGTERM, &action, NULL);
    printf("ready\n"); fflush(stdout);
    while (!stopped) {
        uint64_t until = window ? now() + window : 0;
        for (;;) {
            uint32_t request = load(&words->request), old = seen;
            if (request != seen) {
                seen = request;
                store(&words->answer, seen);
                fence();
                if (seen - load(&words->answer_event) < seen - old) signal_fd(notify);
                if (window) until = now() + window;
            } else if (!window || now() >= until) {
                store(&words->request_event, seen + 1);
                fence();
                if (load(&words->request) == seen) break;
            } else __builtin_ia32_pause();
        }
        if (epoll_wait(epoll, &event, 1, -1) < 0 && errno != EINTR) die("epoll");
        uint64_t count;
        if (read(kick, &count, 8) < 0 && errno != EAGAIN && errno != EINTR) die("eventfd");
    }
    return 0;
}

int main(int argc, const char **argv)
{
    if (argc < 2) { fprintf(stderr, "usage: wakeup front|flood|back name=value ...\n"); return 2; }
    args = argv + 2;
    int cpu = number("cpu", -1), fd = number("ram", -1);
    if (cpu >= 0) {
        cpu_set_t set;
        CPU_ZERO(&set); CPU_SET(cpu, &set);
        if (sched_setaffinity(0, sizeof set, &set)) die("cpu");
    }
    struct stat st;
    if (fstat(fd, &st)) die("ram");
    uint8_t *ram = mmap(NULL, st.st_size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, 0);
    if (ram == MAP_FAILED) die("mmap");
    words = (struct words *)(ram + number("offset", 0));
    return !strcmp(argv[1], "front") ? front() : !strcmp(argv[1], "flood") ? flood() : back();
}
