/* The words that Python lacks: one load or store each, a fence, a compare-and-swap.
 * Shared words are aligned by the protocols that own them; put/get take any alignment (private copies). */
#ifndef EVTCHND_WORDS_H
#define EVTCHND_WORDS_H
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <Python.h>
#include <errno.h>
#include <poll.h>
#include <stdint.h>
#include <string.h>
#include <sys/uio.h>

#define EV_BARRIER() __asm__ __volatile__("" ::: "memory")

static inline uint32_t ev_ld32(const char *p, Py_ssize_t off) { return __atomic_load_n((const uint32_t *)(p + off), __ATOMIC_ACQUIRE); }
static inline void ev_st32(char *p, Py_ssize_t off, uint32_t v) { __atomic_store_n((uint32_t *)(p + off), v, __ATOMIC_RELEASE); }
static inline uint64_t ev_ld64(const char *p, Py_ssize_t off) { return __atomic_load_n((const uint64_t *)(p + off), __ATOMIC_ACQUIRE); }
static inline void ev_st64(char *p, Py_ssize_t off, uint64_t v) { __atomic_store_n((uint64_t *)(p + off), v, __ATOMIC_RELEASE); }
static inline void ev_fence(void) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

/* Returns what was there: equal to `expected` when the swap happened. */
static inline uint32_t ev_cas32(char *p, Py_ssize_t off, uint32_t expected, uint32_t desired)
{
    __atomic_compare_exchange_n((uint32_t *)(p + off), &expected, desired, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
    return expected;
}
static inline void ev_and16(char *p, Py_ssize_t off, uint16_t mask) { __atomic_fetch_and((uint16_t *)(p + off), mask, __ATOMIC_SEQ_CST); }

/* Free-running indices: modulo 2^32. */
static inline uint32_t ev_u32(uint64_t value) { return (uint32_t)value; }

static inline uint8_t ev_get8(const char *p, Py_ssize_t off) { return (uint8_t)p[off]; }
static inline uint16_t ev_get16(const char *p, Py_ssize_t off) { uint16_t v; memcpy(&v, p + off, 2); return v; }
static inline uint32_t ev_get32(const char *p, Py_ssize_t off) { uint32_t v; memcpy(&v, p + off, 4); return v; }
static inline uint64_t ev_get64(const char *p, Py_ssize_t off) { uint64_t v; memcpy(&v, p + off, 8); return v; }
static inline void ev_put8(char *p, Py_ssize_t off, uint8_t v) { p[off] = (char)v; }
static inline void ev_put16(char *p, Py_ssize_t off, uint16_t v) { memcpy(p + off, &v, 2); }
static inline void ev_put32(char *p, Py_ssize_t off, uint32_t v) { memcpy(p + off, &v, 4); }
static inline void ev_put64(char *p, Py_ssize_t off, uint64_t v) { memcpy(p + off, &v, 8); }

/* Copy once: the barriers keep the compiler from reading the shared side a second time behind the copy (XSA-155). */
static inline void ev_copy(char *to, Py_ssize_t to_off, const char *from, Py_ssize_t from_off, Py_ssize_t n)
{
    EV_BARRIER();
    memcpy(to + to_off, from + from_off, (size_t)n);
    EV_BARRIER();
}

static inline char *ev_pointer(PyObject *view) { return (char *)PyMemoryView_GET_BUFFER(view)->buf; }

/* Bytes, or -errno. Without the GIL only where the call may block. */
static inline long long ev_preadv(int fd, uint64_t iov, int count, long long offset, int flags)
{
    ssize_t n = preadv2(fd, (const struct iovec *)(uintptr_t)iov, count, (off_t)offset, flags);
    return n < 0 ? -(long long)errno : (long long)n;
}
static inline long long ev_pwritev(int fd, uint64_t iov, int count, long long offset, int flags)
{
    ssize_t n = pwritev2(fd, (const struct iovec *)(uintptr_t)iov, count, (off_t)offset, flags);
    return n < 0 ? -(long long)errno : (long long)n;
}
/* Whether a read would not find nothing: data, or an error. */
static inline int ev_readable(int fd)
{
    struct pollfd p = { fd, POLLIN, 0 };
    return poll(&p, 1, 0) > 0;
}
#endif
