/* The guest of kvm_vm.py: does what its mailbox says, one command after another, and takes its events.
 *
 * Freestanding; one source for 64-bit (long mode, identity mapped) and 32-bit (protected mode, flat). kvm_agent.py
 * builds it, has the same layout, and puts it where BASE is, outside of the domain's RAM.
 */
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned long word; /* as wide as the event words of this mode */

#define BASE 0x70000000u
#define IDT ((volatile u64 *)(BASE + 0x7000))
#define HYPERCALL_PAGE (BASE + 0x8000)
#define MAILBOXES (BASE + 0x9000)
#define VECTOR_PORTS ((volatile u32 *)(BASE + 0x11000)) /* doorbell: which port a vector raises */
#define COUNTS ((u32 *)(BASE + 0x60000))                /* u32 a port: events that the upcall has taken */
#define SHARED_INFO 0xfeff8000u
#define APIC_EOI ((volatile u32 *)(word)0xfee000b0u)
#define APIC_SVR ((volatile u32 *)(word)0xfee000f0u)

#define PORT_DONE 0x510   /* a command is done; the vCPU's number */
#define PORT_UPCALL 0x514 /* an upcall came */
#define PORT_HCALL 0x518  /* doorbell: a hypercall in the mailbox */
#define PORT_KICK 0x51c   /* doorbell: a send on the port that is written */

#define VECTOR_WAKE 0x31
#define VECTOR_MSI 0x32
#define VECTOR_PORT 0x40 /* doorbell: from here on */
#define VECTOR_CPL3 0x80 /* the way back from user mode */
#define VECTOR_UPCALL 0xf3
#define VECTOR_UPCALL_APIC 0xf4

#define __HYPERVISOR_event_channel_op 32
#define EVTCHNOP_send 4

enum { NOP, CALL, SENDS, USERCALL, SPIN, TAKE, MASK, UNMASK, INTERRUPTS, OUTS, READ, WRITE };

struct mailbox {
    volatile u32 seq, done;       /* a command is new while they differ */
    volatile u32 command, number; /* number: of the vCPU */
    volatile u64 args[6];
    volatile u64 result;
    volatile u32 upcalls, msis;          /* how often */
    volatile u32 flags;                  /* 1: no Xen in this KVM; 2: tell of upcalls; 4: take events and count them */
    volatile u32 stop;                   /* ends SENDS */
    volatile u64 hcall[6], hcall_result; /* doorbell: number and five parameters */
    volatile u64 sel;                    /* selectors that upcalls have seen */
    volatile u64 user_stack;
    volatile u64 sent; /* of SENDS, so far */
    u8 pad[0x800 - 0xa8];
    u8 scratch[0x800]; /* structs of hypercalls */
};
_Static_assert(sizeof(struct mailbox) == 0x1000, "a page");

struct info {
    volatile u8 upcall_pending, upcall_mask;
    volatile word sel;
    u8 rest[64 - 2 * sizeof(word)];
};
#define PENDING ((volatile word *)(word)(SHARED_INFO + 2048))
#define PORTS (sizeof(word) * 8 * sizeof(word) * 8)
#define EVENT_MASK ((volatile word *)(word)(SHARED_INFO + 2048 + PORTS / 8))
#define BITS (sizeof(word) * 8)

static inline void outl(u16 port, u32 value) { __asm__ volatile("outl %0, %1" ::"a"(value), "Nd"(port) : "memory"); }

static inline int take_bit(volatile word *words, u32 bit)
{
    u8 was;
#ifdef __x86_64__
    __asm__ volatile("lock btrq %2, %0; setc %1" : "+m"(words[bit / BITS]), "=q"(was) : "r"((word)(bit % BITS)) : "memory", "cc");
#else
    __asm__ volatile("lock btrl %2, %0; setc %1" : "+m"(words[bit / BITS]), "=q"(was) : "r"((word)(bit % BITS)) : "memory", "cc");
#endif
    return was;
}

static inline int set_bit(volatile word *words, u32 bit)
{
    return __atomic_fetch_or(&words[bit / BITS], (word)1 << (bit % BITS), __ATOMIC_SEQ_CST) >> (bit % BITS) & 1;
}

static struct mailbox *mine(void)
{
    u32 id = ((volatile u32 *)(word)0xfee00020u)[0] >> 24;
    return (struct mailbox *)(word)(MAILBOXES + id * 0x1000);
}

/* ---- hypercalls ------------------------------------------------------------------------------------------------ */

static u64 hypercall(struct mailbox *box, u32 number, word a, word b, word c, word d, word e)
{
    if (box->flags & 1) {
        if (number == __HYPERVISOR_event_channel_op && a == EVTCHNOP_send) {
            box->hcall_result = 0; /* stays where an eventfd takes the write */
            outl(PORT_KICK, *(u32 *)b);
            return box->hcall_result;
        }
        box->hcall[0] = number;
        box->hcall[1] = a, box->hcall[2] = b, box->hcall[3] = c, box->hcall[4] = d, box->hcall[5] = e;
        outl(PORT_HCALL, box->number);
        return box->hcall_result;
    }
    word result, entry = HYPERCALL_PAGE + number * 32;
#ifdef __x86_64__
    register word r10 __asm__("r10") = d;
    register word r8 __asm__("r8") = e;
    __asm__ volatile("call *%[entry]"
                     : "=a"(result), "+D"(a), "+S"(b), "+d"(c), "+r"(r10), "+r"(r8)
                     : [entry] "r"(entry)
                     : "memory", "rcx", "r11", "r9");
    return result;
#else
    __asm__ volatile("call *%%eax" : "=a"(result), "+b"(a), "+c"(b), "+d"(c), "+S"(d), "+D"(e) : "0"(entry) : "memory");
    return (u64)(long long)(int)result;
#endif
}

/* A hypercall from user mode: iret to it, int back; 32-bit: sysexit and sysenter, which need no TSS (QEMU, which emulates
 * the machine that this is tested in, has no busy 32-bit TSS in a nested guest), with interrupts off. */
u64 usercall(struct mailbox *box, u32 number, word a, word b);
void user_return(void);
#ifdef __x86_64__
__asm__("usercall: push %rbx; push %rbp; push %r12; push %r13; push %r14; push %r15\n"
        "mov %rsp, 0x98(%rdi); mov %esi, %eax; mov %rdi, %rbx; mov %rdx, %rdi; mov %rcx, %rsi\n"
        "mov %eax, %ecx; shl $5, %ecx; add $0x70008000, %ecx; mov %rcx, %r12\n"
        "push $0x23; lea -0x400(%rsp), %rdx; push %rdx; push $0x3202; push $0x1b; lea 1f(%rip), %rdx; push %rdx; iretq\n"
        "1: call *%r12; int $0x80\n"
        "user_return: mov 0x98(%rbx), %rsp; pop %r15; pop %r14; pop %r13; pop %r12; pop %rbp; pop %rbx; sti; ret\n");
#else /* the GDT's order is that of sysexit: 8 code, 0x10 data, then user code and user data */
__asm__("usercall: push %ebx; push %ebp; push %esi; push %edi; pushf; cli\n"
        "mov 28(%esp), %edi; shl $5, %edi; add $0x70008000, %edi; mov 32(%esp), %ebx; mov 36(%esp), %esi\n"
        "xor %edx, %edx; mov $0x174, %ecx; mov $8, %eax; wrmsr; inc %ecx; mov %esp, %eax; wrmsr\n"
        "inc %ecx; mov $user_return, %eax; wrmsr; lea -0x400(%esp), %ecx; mov $1f, %edx; sysexit\n"
        "1: mov %esi, %ecx; call *%edi; sysenter\n"
        "user_return: cltd; popf; pop %edi; pop %esi; pop %ebp; pop %ebx; ret\n");
#endif

/* ---- interrupts ------------------------------------------------------------------------------------------------ */

struct frame;
#define ISR __attribute__((interrupt, target("general-regs-only")))

static void upcall(struct mailbox *box)
{
    struct info *info = (struct info *)(word)(SHARED_INFO + box->number * 64);
    info->upcall_pending = 0;
    word sel = __atomic_exchange_n(&info->sel, 0, __ATOMIC_SEQ_CST);
    box->sel |= sel;
    if (box->flags & 4)
        for (u32 i = 0; i < BITS; i++) {
            if (!(sel >> i & 1))
                continue;
            word events = PENDING[i] & ~EVENT_MASK[i];
            for (u32 bit = 0; bit < BITS; bit++)
                if (events >> bit & 1 && take_bit(PENDING, i * BITS + bit))
                    __atomic_fetch_add(&COUNTS[i * BITS + bit], 1, __ATOMIC_SEQ_CST);
        }
    box->upcalls++;
    if (box->flags & 2)
        outl(PORT_UPCALL, box->number);
}

ISR static void on_wake(struct frame *frame) { *APIC_EOI = 0; }
ISR static void on_msi(struct frame *frame) { mine()->msis++; *APIC_EOI = 0; }
ISR static void on_upcall(struct frame *frame) { upcall(mine()); }
ISR static void on_upcall_apic(struct frame *frame) { *APIC_EOI = 0; upcall(mine()); }

/* What KVM does in the kernel where it knows of Xen. */
void raise(u32 vector)
{
    struct mailbox *box = mine();
    struct info *info = (struct info *)(word)(SHARED_INFO + box->number * 64);
    u32 port = VECTOR_PORTS[vector];
    *APIC_EOI = 0;
    if (!port || set_bit(PENDING, port) || EVENT_MASK[port / BITS] >> (port % BITS) & 1)
        return;
    set_bit(&info->sel, port / BITS);
    info->upcall_pending = 1;
    upcall(box);
}
#ifdef __x86_64__
__asm__(".balign 16; vectors: .set v, 0x40\n.rept 0x80\n.balign 16; push $v; jmp common; .set v, v + 1\n.endr\n"
        "common: push %rax; push %rcx; push %rdx; push %rsi; push %rdi; push %r8; push %r9; push %r10; push %r11\n"
        "push %rbp; mov %rsp, %rbp; mov 80(%rsp), %edi; and $-16, %rsp; call raise; mov %rbp, %rsp; pop %rbp\n"
        "pop %r11; pop %r10; pop %r9; pop %r8; pop %rdi; pop %rsi; pop %rdx; pop %rcx; pop %rax; add $8, %rsp; iretq\n");
#else
__asm__(".balign 16; vectors: .set v, 0x40\n.rept 0x80\n.balign 16; push $v; jmp common; .set v, v + 1\n.endr\n"
        "common: pusha; push 32(%esp); call raise; add $4, %esp; popa; add $4, %esp; iret\n");
#endif
extern u8 vectors[];

static void gate(u32 vector, word handler, u32 dpl)
{
    u64 low = (handler & 0xffff) | 8u << 16 | (u64)(0x8e00 | dpl << 13) << 32 | (u64)(handler >> 16 & 0xffff) << 48;
#ifdef __x86_64__
    IDT[vector * 2] = low;
    IDT[vector * 2 + 1] = handler >> 32;
#else
    IDT[vector] = low;
#endif
}

/* ---- commands -------------------------------------------------------------------------------------------------- */

static u64 run(struct mailbox *box)
{
    volatile u64 *args = box->args;
    u32 *scratch = (u32 *)box->scratch;
    u64 failed = 0;
    switch (box->command) {
    case CALL:
        return hypercall(box, args[0], args[1], args[2], args[3], args[4], args[5]);
    case SENDS:
        /* port, count, address of a number that grows with each send (0: none) */
        box->sent = 0;
        for (u64 i = 0; i < args[1] && !box->stop; i++) {
            if (args[2])
                ++*(volatile u64 *)(word)args[2];
            scratch[0] = args[0];
            failed += hypercall(box, __HYPERVISOR_event_channel_op, EVTCHNOP_send, (word)scratch, 0, 0, 0) != 0;
            box->sent = i + 1;
        }
        return failed;
    case USERCALL:
        return usercall(box, args[0], args[1], args[2]);
    case SPIN: /* until the number at an address is that one */
        while (*(volatile u32 *)(word)args[0] != (u32)args[1] && !box->stop)
            __asm__ volatile("pause");
        return box->stop;
    case TAKE:
        return take_bit(PENDING, args[0]);
    case MASK:
        return set_bit(EVENT_MASK, args[0]);
    case UNMASK: /* as a guest does: a pending port needs the hypercall */
        return take_bit(EVENT_MASK, args[0]);
    case OUTS: /* I/O port, value, count */
        for (u64 i = 0; i < args[2]; i++)
            outl(args[0], args[1]);
        return 0;
    case READ:
        return *(volatile u32 *)(word)args[0];
    case WRITE: /* address, value */
        *(volatile u32 *)(word)args[0] = args[1];
        return 0;
    }
    return 0;
}

__attribute__((noreturn, used)) void start(struct mailbox *box)
{
    struct {
        u16 limit;
        word base;
    } __attribute__((packed)) idt = {0xfff, (word)IDT};
    gate(VECTOR_WAKE, (word)on_wake, 0);
    gate(VECTOR_MSI, (word)on_msi, 0);
    gate(VECTOR_UPCALL, (word)on_upcall, 0);
    gate(VECTOR_UPCALL_APIC, (word)on_upcall_apic, 0);
    for (u32 i = 0; i < 0x80; i++)
        gate(VECTOR_PORT + i, (word)vectors + 16 * i, 0);
    if (!(box->flags & 1))
        gate(VECTOR_CPL3, (word)user_return, 3);
    __asm__ volatile("lidt %0" ::"m"(idt));
    *APIC_SVR = 0x1ff;
    if (!(box->flags & 1) && !box->number)
        __asm__ volatile("wrmsr" ::"c"(0x40000000), "a"(HYPERCALL_PAGE), "d"(0) : "memory");
    u32 off = 0; /* interrupts stay off between commands */
    for (;;) {
        __asm__ volatile("cli" ::: "memory");
        if (box->done == box->seq) {
            if (off)
                while (box->done == box->seq)
                    __asm__ volatile("pause" ::: "memory");
            else {
                __asm__ volatile("sti; hlt" ::: "memory");
                continue;
            }
        }
        if (box->command == INTERRUPTS)
            off = !box->args[0];
        if (!off)
            __asm__ volatile("sti" ::: "memory");
        box->result = run(box);
        box->done = box->seq;
        outl(PORT_DONE, box->number);
    }
}

#ifdef __x86_64__
__asm__(".section .entry, \"ax\"\n.globl _start\n_start: and $-16, %rsp; call start\n.previous\n");
#else
__asm__(".section .entry, \"ax\"\n.globl _start\n_start: and $-16, %esp; sub $12, %esp; push %eax; call start\n.previous\n");
#endif
