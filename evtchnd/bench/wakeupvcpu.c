/* The VMM's part of `evtchnd-bench wakeup`, a shared library: KVM takes calls only from the process that made the VM,
 * and the VMM that the exits are compared with is one in C.
 *
 * Runs a vCPU until its guest writes to PORT_DONE (-> 0). A kick that comes here, by PORT_KICK or as a hypercall, is
 * counted and passed on to the eventfd. -> -errno, or the reason of an exit that the guest does not have. */
#include <errno.h>
#include <linux/kvm.h>
#include <stdint.h>
#include <sys/ioctl.h>
#include <unistd.h>

enum { PORT_DONE = 0x510, PORT_KICK = 0x51c, EXIT_XEN = 34, RESULT_AT = 24 };

int run_vcpu(int vcpu, struct kvm_run *run, int kick, uint64_t *exits)
{
    uint64_t one = 1;
    for (;;) {
        if (ioctl(vcpu, KVM_RUN, 0) < 0) {
            if (errno == EINTR || errno == EAGAIN) continue;
            return -errno;
        }
        if (run->exit_reason == KVM_EXIT_IO && run->io.direction == KVM_EXIT_IO_OUT && run->io.port == PORT_DONE)
            return 0;
        if (run->exit_reason == EXIT_XEN) /* struct kvm_xen_exit is newer than this may be built with */
            *(uint64_t *)((char *)&run->io + RESULT_AT) = 0;
        else if (run->exit_reason != KVM_EXIT_IO || run->io.port != PORT_KICK)
            return run->exit_reason;
        ++*exits;
        if (write(kick, &one, 8) != 8 && errno != EAGAIN) return -errno;
    }
}
