/* System calls of channel.py and poller.py: values, or -errno. */
#ifndef EVTCHND_WAKE_H
#define EVTCHND_WAKE_H
#include <errno.h>
#include <stdint.h>
#include <sys/epoll.h>
#include <unistd.h>

#define EV_MOST_KICKED 64

/* The descriptors whose kicks are there, `most` at most, into `fds`; -> how many. Never waits. */
static inline int ev_kicked(int epoll, char *fds, int most)
{
    struct epoll_event events[EV_MOST_KICKED];
    int n = epoll_wait(epoll, events, most < EV_MOST_KICKED ? most : EV_MOST_KICKED, 0);
    for (int i = 0; i < n; i++)
        ((int32_t *)fds)[i] = events[i].data.fd;
    return n < 0 ? -errno : n;
}

static inline int ev_signal(int eventfd)
{
    uint64_t one = 1;
    return write(eventfd, &one, sizeof one) < 0 ? -errno : 0;
}
#endif
