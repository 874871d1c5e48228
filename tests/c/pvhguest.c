/* A PVH guest in 32-bit protected mode, without paging: makes hypercalls, says by console_io what came back, and ends
 * as its command line says: off, poweroff, crash, reset, keyboard, triple, soft, stay. Addresses are physical ones. */
#define __XEN_INTERFACE_VERSION__ 0x00040e00
#include <stdint.h>
#include <xen/xen.h>
#include <xen/version.h>
#include <xen/memory.h>
#include <xen/event_channel.h>
#include <xen/grant_table.h>
#include <xen/sched.h>
#include <xen/vcpu.h>
#include <xen/hvm/hvm_op.h>
#include <xen/hvm/params.h>
#include <xen/arch-x86/hvm/start_info.h>

#define PAGE __attribute__((aligned(4096)))
#define NOWHERE ((void *)0xd8000000u) /* below 4 GiB, in no memory slot */

static PAGE uint8_t hypercalls[4096];
static PAGE volatile uint8_t first_info[4096], second_info[4096], grants[4096], source[4096], target[4096];
static uint8_t stack[16384] __attribute__((used));

__asm__(".section .note.Xen, \"a\", @note\n"
        ".long 4, 4, 18\n .asciz \"Xen\"\n .long start\n"
        ".text\n .globl start\n"
        "start: movl $stack + 16384, %esp\n"
        "pushl %ebx\n call run\n"
        "1: hlt\n jmp 1b\n");

static int call(int number, uint32_t a, uint32_t b, uint32_t c)
{
    int result;
    __asm__ volatile("call *%1"
                     : "=a"(result), "+r"((uint32_t){(uint32_t)hypercalls + 32 * number}), "+b"(a), "+c"(b), "+d"(c)
                     :
                     : "memory");
    return result;
}

static void out8(uint16_t port, uint8_t value) { __asm__ volatile("outb %0, %1" : : "a"(value), "Nd"(port)); }

static unsigned length(const char *text)
{
    unsigned n = 0;
    while (text[n]) n++;
    return n;
}

static int same(const char *a, const char *b)
{
    while (*a && *a == *b) a++, b++;
    return *a == *b;
}

static void say(const char *name, int value)
{
    char line[80];
    unsigned n = 0, digits = 0, left = value < 0 ? -(unsigned)value : (unsigned)value;
    char reversed[12];
    while (name[n]) line[n] = name[n], n++;
    line[n++] = '=';
    if (value < 0) line[n++] = '-';
    do reversed[digits++] = '0' + left % 10;
    while (left /= 10);
    while (digits) line[n++] = reversed[--digits];
    line[n++] = '\n';
    call(__HYPERVISOR_console_io, 0, n, (uint32_t)line);
}

#define OP(number, op, arg) call(__HYPERVISOR_##number, op, (uint32_t)(arg), 0)
#define GRANT_OP(op, arg) call(__HYPERVISOR_grant_table_op, op, (uint32_t)(arg), 1)

static int add(int space, unsigned idx, const volatile void *where)
{
    struct xen_add_to_physmap at = {.domid = DOMID_SELF, .space = space, .idx = idx, .gpfn = (uint32_t)where >> 12};
    return OP(memory_op, XENMEM_add_to_physmap, &at);
}

static int pending(volatile uint8_t *info, unsigned port)
{
    return ((volatile struct shared_info *)info)->evtchn_pending[port / 32] >> port % 32 & 1;
}

static int param(int op, unsigned index, unsigned value)
{
    struct xen_hvm_param it = {.domid = DOMID_SELF, .index = index, .value = value};
    int result = OP(hvm_op, op, &it);
    return result ? result : (int)it.value;
}

static void versions(void)
{
    xen_extraversion_t extra = {0};
    struct xen_feature_info features = {0};
    say("version", OP(xen_version, XENVER_version, 0));
    say("extraversion", OP(xen_version, XENVER_extraversion, &extra));
    say("extra", length(extra));
    say("features", OP(xen_version, XENVER_get_features, &features));
    say("submap", features.submap);
    say("bad_pointer", OP(xen_version, XENVER_extraversion, NOWHERE));
    say("bad_struct", OP(memory_op, XENMEM_add_to_physmap, NOWHERE));
    say("unknown", call(44, 0, 0, 0));
    say("unknown_op", OP(hvm_op, 99, 0));
}

static void memory(void)
{
    static struct { uint64_t addr, size; uint32_t type; } __attribute__((packed)) map[16];
    struct xen_memory_map entries = {.nr_entries = 16};
    struct xen_memory_reservation given = {.nr_extents = 1, .domid = DOMID_SELF};
    xen_pfn_t frame = (uint32_t)target >> 12;
    set_xen_guest_handle(entries.buffer, map);
    say("memory_map", OP(memory_op, XENMEM_memory_map, &entries));
    say("entries", entries.nr_entries);
    say("ram_mib", (int)((map[3].addr + map[3].size) >> 20));
    target[0] = 7;
    set_xen_guest_handle(given.extent_start, &frame);
    say("decrease", OP(memory_op, XENMEM_decrease_reservation, &given));
    say("given_back", target[0]);
    say("populate", OP(memory_op, XENMEM_populate_physmap, &given));
}

static void events(void)
{
    struct evtchn_alloc_unbound here = {.dom = DOMID_SELF, .remote_dom = DOMID_SELF};
    struct evtchn_bind_interdomain there = {.remote_dom = DOMID_SELF};
    struct evtchn_send send;
    struct evtchn_status status = {.dom = DOMID_SELF};
    say("callback", param(HVMOP_set_param, HVM_PARAM_CALLBACK_IRQ, 0));
    say("store_port", param(HVMOP_get_param, HVM_PARAM_STORE_EVTCHN, 0));
    say("set_store", param(HVMOP_set_param, HVM_PARAM_STORE_EVTCHN, 9));
    say("shared_info", add(XENMAPSPACE_shared_info, 0, first_info));
    say("in_a_hole", add(XENMAPSPACE_shared_info, 0, NOWHERE));
    say("alloc", OP(event_channel_op, EVTCHNOP_alloc_unbound, &here));
    there.remote_port = here.port;
    say("bind", OP(event_channel_op, EVTCHNOP_bind_interdomain, &there));
    say("bound_pending", pending(NOWHERE, there.local_port));
    send.port = there.local_port;
    say("send", OP(event_channel_op, EVTCHNOP_send, &send));
    say("sent_pending", pending(NOWHERE, here.port));
    say("moved", add(XENMAPSPACE_shared_info, 0, second_info));
    say("moved_pending", pending(second_info, here.port));
    first_info[2048] = 0;
    send.port = here.port;
    say("send_back", OP(event_channel_op, EVTCHNOP_send, &send));
    say("old_page", first_info[2048]);
    status.port = 1;
    say("status", OP(event_channel_op, EVTCHNOP_status, &status));
    say("store_state", status.status);
    send.port = 1000;
    say("send_closed", OP(event_channel_op, EVTCHNOP_send, &send));
    say("is_up", call(__HYPERVISOR_vcpu_op, VCPUOP_is_up, 0, 0));
}

static void grant_table(void)
{
    struct gnttab_query_size size = {.dom = DOMID_SELF};
    struct gnttab_set_version version = {.version = 2};
    struct gnttab_setup_table setup = {.dom = DOMID_SELF, .nr_frames = 1};
    struct gnttab_copy copy = {.flags = GNTCOPY_source_gref};
    struct xen_remove_from_physmap out = {.domid = DOMID_SELF, .gpfn = (uint32_t)NOWHERE >> 12};
    volatile grant_entry_v1_t *table = (void *)grants;
    xen_pfn_t frame = 0;
    say("query", GRANT_OP(GNTTABOP_query_size, &size));
    say("max_frames", size.max_nr_frames);
    say("version2", GRANT_OP(GNTTABOP_set_version, &version));
    say("in_ram", add(XENMAPSPACE_grant_table, 0, grants));
    say("console_flags", table[0].flags);
    say("store_frame", table[1].frame);
    table[8].frame = (uint32_t)source >> 12;
    table[8].domid = 1;
    table[8].flags = GTF_permit_access | GTF_readonly;
    set_xen_guest_handle(setup.frame_list, &frame);
    say("setup", GRANT_OP(GNTTABOP_setup_table, &setup));
    say("frame_there", frame == (uint32_t)grants >> 12);
    source[100] = 42;
    copy.source.u.ref = 8, copy.source.domid = DOMID_SELF, copy.source.offset = 100;
    copy.dest.u.gmfn = (uint32_t)target >> 12, copy.dest.domid = DOMID_SELF, copy.dest.offset = 200;
    copy.len = 1;
    say("copy", GRANT_OP(GNTTABOP_copy, &copy));
    say("copy_status", copy.status);
    say("copied", target[200]);
    copy.source.u.ref = 9;
    say("copy_bad", GRANT_OP(GNTTABOP_copy, &copy));
    say("copy_bad_status", copy.status);
    table = NOWHERE;
    say("above_ram", add(XENMAPSPACE_grant_table, 0, NOWHERE));
    say("kept_flags", table[8].flags);
    say("second_frame", add(XENMAPSPACE_grant_table, 1, grants));
    say("past_table", add(XENMAPSPACE_grant_table, 99, grants));
    say("removed", OP(memory_op, XENMEM_remove_from_physmap, &out));
    say("hole", table[8].flags & 0xff);
}

static void many(void)
{
    struct multicall_entry calls[3] = {
        {.op = __HYPERVISOR_xen_version, .args = {XENVER_pagesize, 0}},
        {.op = 44},
        {.op = __HYPERVISOR_multicall},
    };
    say("multicall", call(__HYPERVISOR_multicall, (uint32_t)calls, 3, 0));
    say("multi_first", calls[0].result);
    say("multi_second", calls[1].result);
    say("multi_nested", calls[2].result);
}

static void shut_down(int reason)
{
    struct sched_shutdown down = {.reason = reason};
    say("shutdown", OP(sched_op, SCHEDOP_shutdown, &down));
}

void run(const struct hvm_start_info *info)
{
    const char *end = (const char *)(uint32_t)info->cmdline_paddr;
    const struct hvm_modlist_entry *module = (const void *)(uint32_t)info->modlist_paddr;
    __asm__ volatile("wrmsr" : : "c"(0x40000000), "a"(hypercalls), "d"(0));
    say("magic", info->magic == XEN_HVM_START_MAGIC_VALUE);
    say("modules", info->nr_modules);
    if (info->nr_modules) {
        say("module", *(const uint8_t *)(uint32_t)module->paddr);
        say("module_size", (int)module->size);
        say("module_line", length((const char *)(uint32_t)module->cmdline_paddr));
    }
    versions();
    memory();
    events();
    grant_table();
    many();
    if (same(end, "off")) out8(0x604, 0x34);
    if (same(end, "poweroff")) shut_down(SHUTDOWN_poweroff);
    if (same(end, "crash")) shut_down(SHUTDOWN_crash);
    if (same(end, "reset")) out8(0xcf9, 6);
    if (same(end, "keyboard")) out8(0x64, 0xfe);
    if (same(end, "triple")) __asm__ volatile("lidt %0; int3" : : "m"((const struct { uint16_t n; uint32_t at; } __attribute__((packed))){0, 0}));
    if (same(end, "soft")) {
        shut_down(SHUTDOWN_soft_reset);
        events();
        grant_table();
        out8(0x604, 0x34);
    }
    say("end", 0);
}
