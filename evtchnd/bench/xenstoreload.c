/* The load of `evtchnd-bench xenstore`: clients of a XenStore's Unix socket, each in a closed loop.

   An operation is one or more messages, each sent when the one before was answered; its time is that of all of them.
   An echo server sends requests back, with the same framing: it is measured by the same code. With depth=D an operation
   is sent D times in one write, and counts as one. With watches=W the time goes from a write to its event: a second
   connection has one watch on what is written and W - 1 on other paths.

   Arguments: path=SOCKET op=read|write|directory|mkdirrm|rmw|fire|boot clients= ops= (each) or ms= nodes= dirs= siblings=
   depth= watches= gap_us= cpu= fifo=0|1 seed= bytes= */
#define _GNU_SOURCE
#include <errno.h>
#include <sched.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>
#include "program.h"

enum { DIRECTORY = 1, READ = 2, WATCH = 4, START = 6, END = 7, WRITE = 11, MKDIR = 12, RM = 13, EVENT = 15, ERROR = 16 };
struct header { uint32_t type, req, tx, len; };

#define MOST 1024
#define STEPS 6
struct client {
    int fd, step, answers;
    uint32_t tx;
    uint64_t began, next;
    size_t have;
    char in[8192];
} *clients;

static const char *op, *socket_path;
static long nodes, siblings, depth, value_bytes, keep;
static uint32_t *taken;
static long taken_count, events;
static unsigned long long errors, again, random_state;
static char last[64];

static const char *text(const char *name, const char *otherwise)
{
    size_t n = strlen(name);
    for (const char **a = args; *a; a++)
        if (!strncmp(*a, name, n) && (*a)[n] == '=')
            return *a + n + 1;
    return otherwise;
}

static unsigned long roll(unsigned long below)
{
    random_state = random_state * 6364136223846793005ull + 1442695040888963407ull;
    return (random_state >> 33) % below;
}

static int open_client(void)
{
    struct sockaddr_un to = { .sun_family = AF_UNIX };
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    snprintf(to.sun_path, sizeof(to.sun_path), "%s", socket_path);
    if (fd < 0 || connect(fd, (struct sockaddr *)&to, sizeof(to)))
        die(socket_path);
    return fd;
}

static void send_all(int fd, const char *data, size_t size)
{
    while (size) {
        ssize_t n = send(fd, data, size, MSG_NOSIGNAL);
        if (n < 0 && errno != EINTR)
            die("send");
        if (n > 0)
            data += n, size -= n;
    }
}

static size_t message(char *to, uint32_t type, uint32_t tx, const char *a, const char *b, size_t b_len)
{
    size_t n = strlen(a) + 1;
    struct header h = { type, 1, tx, n + b_len };
    memcpy(to, &h, sizeof(h));
    memcpy(to + sizeof(h), a, n);
    memcpy(to + sizeof(h) + n, b, b_len);
    return sizeof(h) + n + b_len;
}

/* A node as xenstorefill.py makes them: ten in a directory, a thousand below each top. */
static void node_path(char *to, unsigned long k)
{
    if (siblings)
        sprintf(to, "/siblings/%ld/%lu", siblings, k % siblings);
    else
        sprintf(to, "/bench/%lu/%lu/%lu", k / 1000, k / 10 % 100, k % 10);
}

static int steps(void) { return !strcmp(op, "rmw") ? 6 : !strcmp(op, "mkdirrm") ? 2 : 1; }

static size_t build(char *to, struct client *c)
{
    char path[128], value[4096];
    static char pair[2][MOST][128];
    size_t i = c - clients;
    memset(value, '0' + roll(10), sizeof(value));
    if (!strcmp(op, "read")) {
        node_path(path, roll(nodes));
        return message(to, READ, 0, path, "", 0);
    }
    if (!strcmp(op, "write") || !strcmp(op, "fire")) {
        if (!strcmp(op, "fire"))
            strcpy(path, "/watched/this");
        else
            node_path(path, roll(nodes));
        return message(to, WRITE, 0, path, value, value_bytes);
    }
    if (!strcmp(op, "boot")) {
        /* what a guest's drivers do with their own nodes, in about these parts */
        unsigned long kind = roll(100);
        sprintf(path, kind >= 55 && kind < 65 ? "data" : "data/%lu", roll(10));
        if (kind < 55 || kind >= 90) {
            return message(to, READ, 0, path, "", 0);
        } else if (kind < 65) {
            return message(to, DIRECTORY, 0, path, "", 0);
        } else if (kind < 85) {
            return message(to, WRITE, 0, path, value, value_bytes);
        }
        sprintf(value, "%llu", (unsigned long long)++c->next);
        return message(to, WATCH, 0, path, value, strlen(value) + 1);
    }
    if (!strcmp(op, "directory"))
        return message(to, DIRECTORY, 0, "/thousand", "", 0);
    if (!strcmp(op, "mkdirrm")) {
        sprintf(path, "/made/%zu", i);
        return message(to, c->step ? RM : MKDIR, 0, path, "", 0);
    }
    switch (c->step) {
    case 0:
        /* each client in its own thousand: others' commits are no conflicts here */
        for (int p = 0; p < 2; p++)
            node_path(pair[p][i], nodes >= 1000 * 64 ? i * 1000 + p * 500 + roll(500) : roll(nodes / 2) + p * (nodes / 2));
        return message(to, START, 0, "", "", 0);
    case 1: case 3:
        return message(to, READ, c->tx, pair[c->step / 2][i], "", 0);
    case 2: case 4:
        return message(to, WRITE, c->tx, pair[c->step / 2 - 1][i], value, value_bytes);
    }
    return message(to, END, c->tx, "T", "", 0);
}

static void begin(struct client *c)
{
    char out[65536];
    size_t n = 0;
    for (long d = 0; d < depth; d++)
        n += build(out + n, c);
    c->answers = 0;
    if (c->step == 0)
        c->began = now();
    send_all(c->fd, out, n);
}

/* One step is answered; 1: the operation is done. */
static int answered(struct client *c, struct header *h, const char *body)
{
    if (h->type == EVENT)
        return 0;
    if (h->type == ERROR) {
        if (!strncmp(body, "EAGAIN", 6)) {
            again++;
        } else {
            errors++;
            snprintf(last, sizeof(last), "step %d: %.*s", c->step, (int)h->len, body);
        }
    }
    if (!strcmp(op, "rmw") && c->step == 0)
        c->tx = atol(body);
    if (++c->answers < depth)
        return 0;
    if (++c->step < steps()) {
        begin(c);
        return 0;
    }
    c->step = 0;
    return 1;
}

/* What has arrived; 1: an operation is done. */
static int receive(struct client *c)
{
    int done = 0;
    ssize_t n = recv(c->fd, c->in + c->have, sizeof(c->in) - c->have, 0);
    if (n <= 0) {
        if (n < 0 && errno == EINTR)
            return 0;
        die("the server closed a connection");
    }
    c->have += n;
    size_t at = 0;
    while (c->have - at >= sizeof(struct header)) {
        struct header h;
        memcpy(&h, c->in + at, sizeof(h));
        if (c->have - at < sizeof(h) + h.len)
            break;
        done |= answered(c, &h, c->in + at + sizeof(h));
        at += sizeof(h) + h.len;
    }
    memmove(c->in, c->in + at, c->have -= at);
    return done;
}

static void note(uint64_t ns)
{
    if (taken_count < keep)
        taken[taken_count++] = ns > UINT32_MAX ? UINT32_MAX : ns;
}

/* Reads one whole message, blocking. */
static void one(int fd, struct header *h, char *body)
{
    if (recv(fd, h, sizeof(*h), MSG_WAITALL) != sizeof(*h) || (h->len && recv(fd, body, h->len, MSG_WAITALL) != h->len))
        die("recv");
}

static void fire(long watches, long ops, long gap_us)
{
    int watcher = open_client();
    char out[256], path[64], body[4096];
    struct header h;
    struct client *c = clients;
    send_all(c->fd, out, build(out, c));
    one(c->fd, &h, body);
    for (long w = 0; w < watches; w++) {
        sprintf(path, w ? "/watched/other/%ld" : "/watched/this", w);
        send_all(watcher, out, message(out, WATCH, 0, path, "t", 2));
        one(watcher, &h, body);
        if (h.type != WATCH)
            die("a watch was refused");
        one(watcher, &h, body);
    }
    for (long k = 0; k < ops; k++) {
        size_t n = build(out, c);
        uint64_t t = now();
        send_all(c->fd, out, n);
        one(watcher, &h, body);
        t = now() - t;
        if (h.type != EVENT)
            die("not an event");
        one(c->fd, &h, body);
        if (h.type != WRITE)
            die("not a write's reply");
        events++;
        note(t);
        if (gap_us)
            usleep(gap_us);
    }
    close(watcher);
}

int main(int argc, char **argv)
{
    (void)argc;
    args = (const char **)argv + 1;
    op = text("op", "read");
    socket_path = text("path", "/run/evtchnd/xenstored.sock");
    nodes = number("nodes", 1000), siblings = number("siblings", 0), depth = number("depth", 1);
    value_bytes = number("bytes", 12);
    random_state = number("seed", 1) * 7919;
    long count = number("clients", 1), ops = number("ops", 1000), ms = number("ms", 0), gap_us = number("gap_us", 0);
    long cpu = number("cpu", -1);
    if (siblings)
        nodes = siblings;
    if (cpu >= 0) {
        cpu_set_t set;
        CPU_ZERO(&set);
        CPU_SET(cpu, &set);
        if (sched_setaffinity(0, sizeof(set), &set))
            die("sched_setaffinity");
    }
    if (number("fifo", 0)) {
        /* ahead of other loads on the same CPU, where that is allowed */
        struct sched_param p = { 1 };
        sched_setscheduler(0, SCHED_FIFO, &p);
    }
    signal(SIGTERM, stop);
    if (count > MOST)
        count = MOST;
    clients = calloc(count, sizeof(*clients));
    keep = ms ? ms * 200 + 1000 : ops * count;
    taken = malloc(keep * sizeof(*taken));
    for (long i = 0; i < count; i++)
        clients[i].fd = open_client();
    /* processes took turns on this CPU: caches, and how long the idle loop polls, are as in a longer run after this */
    unsigned long long warmed = count == 1 ? 200 : count;
    for (unsigned long long w = 0; w < warmed; w++) {
        struct client *c = &clients[w % count];
        for (begin(c); !receive(c);)
            ;
    }
    uint64_t begun = now(), end = ms ? begun + ms * 1000000ull : UINT64_MAX;
    unsigned long long done = 0, wanted = ms ? ~0ull : (unsigned long long)ops * count;
    if (!strcmp(op, "fire")) {
        fire(number("watches", 1), ops, gap_us);
        done = events;
    } else if (count == 1) {
        while (done < wanted && !stopped && now() < end) {
            begin(clients);
            while (!receive(clients))
                ;
            note(now() - clients->began);
            done++;
            if (gap_us)
                usleep(gap_us / 2 + roll(gap_us));
        }
    } else {
        struct epoll_event ready[64];
        int poll = epoll_create1(EPOLL_CLOEXEC);
        for (long i = 0; i < count; i++) {
            struct epoll_event e = { EPOLLIN, { .ptr = &clients[i] } };
            epoll_ctl(poll, EPOLL_CTL_ADD, clients[i].fd, &e);
            begin(&clients[i]);
        }
        unsigned long long started = count;
        while (done < wanted && !stopped && now() < end) {
            int n = epoll_wait(poll, ready, 64, 1000);
            for (int i = 0; i < n; i++) {
                struct client *c = ready[i].data.ptr;
                if (receive(c)) {
                    note(now() - c->began);
                    done++;
                    if (started < wanted)
                        started++, begin(c);
                }
            }
        }
    }
    double seconds = (now() - begun) / 1e9;
    qsort(taken, taken_count, sizeof(*taken), compare);
#define AT(q) (taken_count ? taken[(long)((taken_count - 1) * (q))] / 1e3 : 0)
    printf("{\"requests\": %llu, \"served\": %llu, \"seconds\": %.6f, \"p50_us\": %.3f, \"p99_us\": %.3f, \"errors\": %llu, "
           "\"again\": %llu}\n", done * depth * steps(), (done + warmed) * depth * steps(), seconds, AT(.5), AT(.99), errors, again);
    if (errors)
        fprintf(stderr, "%s\n", last);
    return 0;
}
