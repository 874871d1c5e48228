from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
cimport cython


cdef extern from "words.h" nogil:
    uint32_t ld32 "ev_ld32" (const char *p, Py_ssize_t off)
    void st32 "ev_st32" (char *p, Py_ssize_t off, uint32_t value)
    uint64_t ld64 "ev_ld64" (const char *p, Py_ssize_t off)
    void st64 "ev_st64" (char *p, Py_ssize_t off, uint64_t value)
    void fence "ev_fence" ()
    uint32_t cas32 "ev_cas32" (char *p, Py_ssize_t off, uint32_t expected, uint32_t desired)
    void and16 "ev_and16" (char *p, Py_ssize_t off, uint16_t mask)
    uint32_t u32 "ev_u32" (uint64_t value)
    uint8_t get8 "ev_get8" (const char *p, Py_ssize_t off)
    uint16_t get16 "ev_get16" (const char *p, Py_ssize_t off)
    uint32_t get32 "ev_get32" (const char *p, Py_ssize_t off)
    uint64_t get64 "ev_get64" (const char *p, Py_ssize_t off)
    void put8 "ev_put8" (char *p, Py_ssize_t off, uint8_t value)
    void put16 "ev_put16" (char *p, Py_ssize_t off, uint16_t value)
    void put32 "ev_put32" (char *p, Py_ssize_t off, uint32_t value)
    void put64 "ev_put64" (char *p, Py_ssize_t off, uint64_t value)
    void copy "ev_copy" (char *to, Py_ssize_t to_off, const char *source, Py_ssize_t source_off, Py_ssize_t n)
    long long sys_preadv "ev_preadv" (int fd, uint64_t iov, int count, long long offset, int flags)
    long long sys_pwritev "ev_pwritev" (int fd, uint64_t iov, int count, long long offset, int flags)
    bint sys_readable "ev_readable" (int fd)


cdef extern from "words.h":
    char *pointer "ev_pointer" (object view)


@cython.final
cdef class Mem:
    cdef char *p
    cdef readonly object view
    cdef object v32, v64  # the Python form only
    cdef readonly Py_ssize_t size
    cdef readonly uint64_t address
    cpdef uint32_t load(self, Py_ssize_t off) except? 0xFFFFFFFF
    cpdef void store(self, Py_ssize_t off, uint32_t value) except *
    cpdef uint32_t swap(self, Py_ssize_t off, uint32_t expected, uint32_t desired) except? 0xFFFFFFFF
    cpdef void keep16(self, Py_ssize_t off, uint16_t mask) except *
    cdef int check(self, Py_ssize_t off, Py_ssize_t n) except -1


@cython.final
cdef class Area:
    cdef list pages
    cdef char *p
    cdef readonly Py_ssize_t size
    cdef char *first(self, Mem page) except? NULL
    @cython.locals(page=Mem, start=Py_ssize_t, part=Py_ssize_t)
    cdef int take(self, Py_ssize_t off, char *to, Py_ssize_t to_off, Py_ssize_t n) except -1
    @cython.locals(page=Mem, start=Py_ssize_t, part=Py_ssize_t)
    cdef int give(self, Py_ssize_t off, const char *source, Py_ssize_t source_off, Py_ssize_t n) except -1
    cpdef uint32_t load(self, Py_ssize_t off) except? 0xFFFFFFFF
    cpdef void store(self, Py_ssize_t off, uint32_t value) except *
    cpdef bint pending(self, Py_ssize_t at, uint32_t seen) except -1
    cpdef bint arm(self, Py_ssize_t at, uint32_t seen) except -1
