/* What the benchmarks' C programs share: arguments as `name=value`, clocks, an end by SIGTERM. */
#ifndef EVTCHND_BENCH_PROGRAM_H
#define EVTCHND_BENCH_PROGRAM_H
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static const char **args;
static long number(const char *name, long otherwise)
{
    size_t n = strlen(name);
    for (const char **a = args; *a; a++)
        if (!strncmp(*a, name, n) && (*a)[n] == '=')
            return atol(*a + n + 1);
    return otherwise;
}

static uint64_t now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000ull + t.tv_nsec;
}

static void die(const char *what) { perror(what); exit(1); }

static volatile sig_atomic_t stopped;
static void stop(int signal) { (void)signal; stopped = 1; }

static int compare(const void *a, const void *b)
{
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return x < y ? -1 : x > y;
}
#endif
