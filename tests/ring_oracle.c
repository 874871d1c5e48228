/* Xen's own ring macros (io/ring.h of libxen-dev) behind plain functions, for tests/test_ring.py.
 * Built once for each pair of sizes: -DREQ=... -DRSP=... */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#define __XEN_INTERFACE_VERSION__ 0x00040700
#define xen_mb() __atomic_thread_fence(__ATOMIC_SEQ_CST)
#define xen_rmb() __atomic_thread_fence(__ATOMIC_ACQUIRE)
#define xen_wmb() __atomic_thread_fence(__ATOMIC_RELEASE)
#include <xen/io/ring.h>

struct oracle_request { uint8_t bytes[REQ]; };
struct oracle_response { uint8_t bytes[RSP]; };
DEFINE_RING_TYPES(oracle, struct oracle_request, struct oracle_response);

static oracle_sring_t *shared;
static oracle_front_ring_t front;
static oracle_back_ring_t back;

int setup(void *pages, uint32_t bytes, uint32_t index)
{
    shared = pages;
    SHARED_RING_INIT(shared);
    shared->req_prod = shared->rsp_prod = index;
    shared->req_event = shared->rsp_event = index + 1;
    FRONT_RING_ATTACH(&front, shared, index, bytes);
    BACK_RING_ATTACH(&back, shared, index, bytes);
    return RING_SIZE(&front);
}
int free_requests(void) { return RING_FREE_REQUESTS(&front); }
void request(const uint8_t *bytes) { memcpy(RING_GET_REQUEST(&front, front.req_prod_pvt), bytes, REQ); front.req_prod_pvt++; }
int push_requests(void) { int notify; RING_PUSH_REQUESTS_AND_CHECK_NOTIFY(&front, notify); return notify; }
int take(uint8_t *bytes)
{
    if (!RING_HAS_UNCONSUMED_REQUESTS(&back)) return 0;
    memcpy(bytes, RING_GET_REQUEST(&back, back.req_cons), REQ);
    back.req_cons++;
    return 1;
}
void respond(const uint8_t *bytes)
{
    union oracle_sring_entry *entry = &shared->ring[back.rsp_prod_pvt & (RING_SIZE(&back) - 1)];
    memset(entry, 0, sizeof *entry);
    memcpy(RING_GET_RESPONSE(&back, back.rsp_prod_pvt), bytes, RSP);
    back.rsp_prod_pvt++;
}
int push_responses(void) { int notify; RING_PUSH_RESPONSES_AND_CHECK_NOTIFY(&back, notify); return notify; }
int arm_back(void) { int work; RING_FINAL_CHECK_FOR_REQUESTS(&back, work); return work != 0; }
int response(uint8_t *bytes)
{
    if (!RING_HAS_UNCONSUMED_RESPONSES(&front)) return 0;
    memcpy(bytes, RING_GET_RESPONSE(&front, front.rsp_cons), RSP);
    front.rsp_cons++;
    return 1;
}
int arm_front(void) { int work; RING_FINAL_CHECK_FOR_RESPONSES(&front, work); return work != 0; }
