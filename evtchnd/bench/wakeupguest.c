/* The guest of `evtchnd-bench wakeup` on KVM: requests, kicks, and spins for the answer. Freestanding, long mode; it
 * starts where kvm_agent.py starts its guest, with its tables, and needs no interrupt. Times are in TSC cycles.
 *
 * wakeupkvm.py fills in `struct order` before each run, which ends with a write to PORT_DONE. */
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define HYPERCALL_PAGE 0x70008000ull
#define PORT_DONE 0x510
#define PORT_KICK 0x51c

struct order {
    volatile u64 box[2];                        /* of the mailbox; not used here */
    volatile u64 words, samples;                /* addresses: wakeup.c's words, u32 cycles a kick */
    volatile u64 kicks, gap;                    /* gap: cycles, half of the longest pause between kicks */
    volatile u64 port, xen;                     /* xen: kick by EVTCHNOP_send, otherwise by PORT_KICK */
    volatile u64 began, ended, failed, patience; /* patience: cycles until an answer is overdue */
};

static inline void outl(u16 port, u32 value) { __asm__ volatile("outl %0, %1" ::"a"(value), "Nd"(port) : "memory"); }

static inline u64 now(void)
{
    u32 low, high;
    __asm__ volatile("lfence; rdtsc" : "=a"(low), "=d"(high)::"memory");
    return (u64)high << 32 | low;
}

static inline void pause(void) { __asm__ volatile("pause" ::: "memory"); }

static u64 event_channel_op(u64 op, void *argument)
{
    u64 result, a = op, b = (u64)argument, entry = HYPERCALL_PAGE + 32 * 32;
    __asm__ volatile("call *%[entry]"
                     : "=a"(result), "+D"(a), "+S"(b)
                     : [entry] "r"(entry)
                     : "memory", "rcx", "rdx", "r8", "r9", "r10", "r11");
    return result;
}

__attribute__((noreturn, used)) void start(struct order *order)
{
    if (order->xen)
        __asm__ volatile("wrmsr" ::"c"(0x40000000), "a"((u32)HYPERCALL_PAGE), "d"(0) : "memory");
    u64 seed = 88172645463325252ull;
    for (;;) {
        volatile u32 *request = (u32 *)order->words, *answer = request + 16, *samples = (u32 *)order->samples;
        u32 port = order->port, number = *request, failed = 0;
        order->began = now();
        for (u64 i = 0; i < order->kicks && !failed; i++) {
            seed ^= seed << 13; seed ^= seed >> 7; seed ^= seed << 17;
            u64 before = now(), wait = order->gap ? seed % (2 * order->gap) : 0, t;
            while ((t = now()) < before + wait)
                pause();
            *request = ++number;
            if (!order->xen)
                outl(PORT_KICK, port);
            else if (event_channel_op(4 /* EVTCHNOP_send */, &port))
                failed = 1;
            while (*answer != number && !failed) {
                pause();
                failed = now() > t + order->patience;
            }
            samples[i] = now() - t;
        }
        order->failed = failed;
        order->ended = now();
        outl(PORT_DONE, 0);
    }
}

__asm__(".section .entry, \"ax\"\n.globl _start\n_start: and $-16, %rsp; call start\n.previous\n");
