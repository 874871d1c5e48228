/* Lets Xen's own xenstored, the server in C, run where there is no Xen: preloaded by xenstored.py.

   It serves its Unix socket as ever; its hypercalls find domains that never say anything, and for domain 0 a store page that nobody else has. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdint.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

static char handle;

/* What Linux shows a domain 0: its store page, and the event channel of it */
static int opened(const char *path, int flags, mode_t mode)
{
    int port = !strcmp(path, "/proc/xen/xsd_port"), page = !strcmp(path, "/proc/xen/xsd_kva");
    if (!port && !page)
        return openat(AT_FDCWD, path, flags, mode);
    int fd = memfd_create("xsd", MFD_CLOEXEC);
    if (fd >= 0 && ((port && pwrite(fd, "1", 1, 0) != 1) || (page && ftruncate(fd, 4096)))) {
        close(fd);
        return -1;
    }
    return fd;
}

int open(const char *path, int flags, ...)
{
    va_list more;
    va_start(more, flags);
    mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(more, mode_t) : 0;
    va_end(more);
    return opened(path, flags, mode);
}

/* libxenevtchn: channels that never fire */
void *xenevtchn_open(void *logger, unsigned flags) { (void)logger, (void)flags; return &handle; }
void *xenevtchn_fdopen(void *logger, int fd, unsigned flags) { (void)logger, (void)fd, (void)flags; return &handle; }
int xenevtchn_bind_virq(void *xce, unsigned virq) { (void)xce, (void)virq; return 2; }
int xenevtchn_bind_interdomain(void *xce, uint32_t domid, uint32_t port) { (void)xce, (void)domid, (void)port; return 3; }
int xenevtchn_notify(void *xce, uint32_t port) { (void)xce, (void)port; return 0; }
int xenevtchn_unmask(void *xce, uint32_t port) { (void)xce, (void)port; return 0; }
int xenevtchn_unbind(void *xce, uint32_t port) { (void)xce, (void)port; return 0; }
int xenevtchn_pending(void *xce) { (void)xce; errno = EAGAIN; return -1; }
int xenevtchn_fd(void *xce)
{
    static int fd = -1;
    (void)xce;
    return fd >= 0 ? fd : (fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
}

/* libxengnttab: no guest */
void *xengnttab_open(void *logger, unsigned flags) { (void)logger, (void)flags; return &handle; }
int xengnttab_close(void *xgt) { (void)xgt; return 0; }
int xengnttab_set_max_grants(void *xgt, uint32_t count) { (void)xgt, (void)count; return 0; }
int xengnttab_unmap(void *xgt, void *start, uint32_t count) { (void)xgt, (void)start, (void)count; return 0; }
void *xengnttab_map_grant_ref(void *xgt, uint32_t domid, uint32_t ref, int prot)
{
    (void)xgt, (void)domid, (void)ref, (void)prot;
    errno = ENODEV;
    return NULL;
}

/* libxenctrl: the first hundred domains are there. xc_dominfo_t begins with the domain's number. */
void *xc_interface_open(void *logger, void *dombuild, unsigned flags)
{
    (void)logger, (void)dombuild, (void)flags;
    return &handle;
}
int xc_interface_close(void *xch) { (void)xch; return 0; }
int xc_domain_getinfo(void *xch, uint32_t first, unsigned most, uint32_t *info)
{
    (void)xch;
    if (first >= 100 || !most)
        return 0;
    *info = first;
    return 1;
}
