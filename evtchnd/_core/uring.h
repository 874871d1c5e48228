/* System calls of uring.py: values, or -errno. */
#ifndef EVTCHND_URING_H
#define EVTCHND_URING_H
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

static inline long long ev_enter(int fd, unsigned submit)
{
    long n = syscall(426, fd, submit, 0u, 0u, (void *)0, (size_t)0);
    return n < 0 ? -(long long)errno : (long long)n;
}
#endif
