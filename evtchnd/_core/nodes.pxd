cimport cython

cdef int _FANOUT_BITS, _FANOUT, _MASK, _LEAF_MAX, _SHIFT_MAX


cdef class PMap:
    cdef readonly object _root
    cdef readonly Py_ssize_t _count
    cdef public object listed

    @cython.locals(bits=Py_hash_t)
    cpdef object get(self, key)
    @cython.locals(bits=Py_hash_t, shift=int, at=Py_ssize_t, was=object)
    cpdef object replace(self, key, value)
    @cython.locals(bits=Py_hash_t, shift=int, at=Py_ssize_t, before=Py_ssize_t, count=Py_ssize_t)
    cpdef tuple _put(self, key, value)
    @cython.locals(bits=Py_hash_t, at=Py_ssize_t)
    cpdef tuple _remove(self, key)


# It refers to bytes, numbers, tuples of them and a map of such: it is in no cycle
@cython.final
@cython.no_gc
@cython.freelist(256)
cdef class Node:
    cdef readonly object value
    cdef readonly object perms
    cdef readonly PMap children
    cdef readonly object generation

    @cython.locals(children=PMap)
    cpdef Node with_child(self, name, generation)
    @cython.locals(children=PMap)
    cpdef Node without_child(self, name, generation)
