/* A thread that waits, outside of the interpreter, for a VM to make: it makes the chain and enters the guest at once.
 *
 * So from the moment it is sent until the guest's first exit it needs no interpreter. Who sends it decides at the gate
 * whether the guest is entered, before or while the thread gets there. The bell, an eventfd that the loop listens to, is
 * rung when the chain is made, before the gate; for a guest that is let in at once when it has come out again, for the
 * thread that it wakes may take the guest's place: whoever will not wait as long looks at what is done. A signal that the
 * thread has blocked, and KVM_RUN lets through, ends the first run as any other; one that comes too early is still pending
 * then.
 *
 * Where it shares a processor with the thread that sent it, the runner goes first: until the guest is out it asks for short
 * slices of time, for which it is let in soon (sched(7), Linux 6.12; older kernels take no notice).
 *
 * Freestanding as fastpath.c is. `state` and `gate` are futexes.
 */

#define EXPORTED __attribute__((visibility("default")))

typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long s64;

enum { KVM_RUN = 0xAE80, KVM_SET_SIGNAL_MASK = 0x4004AE8B };
enum { SYS_WRITE = 1, SYS_IOCTL = 16, SYS_GETRUSAGE = 98, SYS_FUTEX = 202, SYS_CLOCK_GETTIME = 228, SYS_GETCPU = 309 };
enum { SYS_EVENTFD2 = 290, EFD_NONBLOCK = 0x800, EFD_CLOEXEC = 0x80000 };
enum { SYS_SCHED_SETATTR = 314, SYS_SCHED_GETATTR = 315, SCHED_OTHER = 0, SHORT_SLICE_NS = 100000 };
enum { CLOCK_MONOTONIC = 1, RUSAGE_THREAD = 1, FUTEX_WAIT_PRIVATE = 128, FUTEX_WAKE_PRIVATE = 129 };
enum { IDLE = 0 };
enum { UNDECIDED = 0, OPEN = 1 };
enum { RUSAGE_WORDS = 18, RUSAGE_MINFLT = 8, RUSAGE_MAJFLT = 9 };

struct slot {
    s64 value;
    u64 end_ns;
};

struct order {
    const void *steps; /* the chain, see chain.c */
    struct slot *slots;
    u32 count, given;
    u32 vcpu;          /* the slot that has the vCPU's descriptor */
    u32 clock;         /* the slot that the time stamp counter is taken off, 0 for none */
    int bell;          /* the eventfd that the loop listens to */
    u32 unused;
};

struct errand {
    u32 state;         /* IDLE until it is sent; what it is then is the sender's affair */
    u32 gate;          /* UNDECIDED until it is OPEN, or shut by any other value */
    struct order order;
    u64 mask;          /* the signals that are blocked in the guest */
    u32 cpu;           /* the processor that it has begun on, counted from 1 */
    u32 done;          /* steps of the chain that did not fail, once it is over */
    u32 entered;       /* whether the guest was entered, and the following is known */
    u32 sender;        /* the processor that it was sent from, counted from 1 */
    s64 result;        /* of KVM_RUN, 0 or -errno; of KVM_SET_SIGNAL_MASK if that failed */
    u64 entered_ns, left_ns;
    u64 faults[2];     /* minor and major page faults of this thread when the chain was made */
    u64 left_faults[2];
};

u32 chain_run(const void *steps, u32 count, struct slot *slots, u32 given);

static s64 syscall4(long number, long a, long b, long c, long d)
{
    s64 result;
    register long r10 __asm__("r10") = d;
    __asm__ volatile("syscall" : "=a"(result) : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10) : "rcx", "r11", "memory");
    return result;
}

static u64 monotonic_ns(void)
{
    s64 now[2] = {0, 0};
    syscall4(SYS_CLOCK_GETTIME, CLOCK_MONOTONIC, (long)now, 0, 0);
    return (u64)now[0] * 1000000000u + (u64)now[1];
}

static u32 this_cpu(void)
{
    u32 cpu = 0;
    syscall4(SYS_GETCPU, (long)&cpu, 0, 0, 0);
    return cpu + 1;
}

static u32 wait_while(u32 *word, u32 value)
{
    u32 found;
    while ((found = __atomic_load_n(word, __ATOMIC_ACQUIRE)) == value)
        syscall4(SYS_FUTEX, (long)word, FUTEX_WAIT_PRIVATE, value, 0);
    return found;
}

struct sched_attr {
    u32 size, policy;
    u64 flags;
    int nice;
    u32 priority;
    u64 runtime, deadline, period;
};

/* Returns what the slices were. */
static u64 ask_for_slices(u64 ns)
{
    struct sched_attr attr = {.size = sizeof attr};
    if (syscall4(SYS_SCHED_GETATTR, 0, (long)&attr, sizeof attr, 0) < 0 || attr.policy != SCHED_OTHER)
        return ns;
    u64 before = attr.runtime;
    attr.runtime = ns;
    syscall4(SYS_SCHED_SETATTR, 0, (long)&attr, 0, 0);
    return before;
}

static s64 let_signals_through(const struct errand *errand, int vcpu)
{
    struct __attribute__((packed)) { u32 size; u64 mask; } mask = {sizeof errand->mask, errand->mask};
    return syscall4(SYS_IOCTL, vcpu, KVM_SET_SIGNAL_MASK, (long)&mask, 0);
}

static void count_faults(u64 faults[2])
{
    u64 usage[RUSAGE_WORDS] = {0};
    syscall4(SYS_GETRUSAGE, RUSAGE_THREAD, (long)usage, 0, 0);
    faults[0] = usage[RUSAGE_MINFLT];
    faults[1] = usage[RUSAGE_MAJFLT];
}

static void ring(const struct errand *errand)
{
    u64 once = 1;
    syscall4(SYS_WRITE, errand->order.bell, (long)&once, sizeof once, 0);
}

static void enter(struct errand *errand, int vcpu)
{
    errand->entered_ns = monotonic_ns();
    errand->result = syscall4(SYS_IOCTL, vcpu, KVM_RUN, 0, 0);
    errand->left_ns = monotonic_ns();
    count_faults(errand->left_faults);
    errand->entered = 1;
}



static void run(struct errand *errand)
{
    errand->order.slots[0].end_ns = monotonic_ns();
    if (errand->order.clock)
        errand->order.slots[errand->order.clock].value -= (s64)__builtin_ia32_rdtsc();
    u32 done = chain_run(errand->order.steps, errand->order.count, errand->order.slots, errand->order.given);
    if (done < errand->order.count) {
        errand->done = done;
        return;
    }
    int vcpu = (int)errand->order.slots[errand->order.vcpu].value;
    errand->result = let_signals_through(errand, vcpu);
    count_faults(errand->faults);
    __atomic_store_n(&errand->done, done, __ATOMIC_RELEASE);
    int at_once = !errand->result && __atomic_load_n(&errand->gate, __ATOMIC_ACQUIRE) == OPEN;
    if (!at_once)
        ring(errand);
    if (!errand->result && wait_while(&errand->gate, UNDECIDED) == OPEN)
        enter(errand, vcpu);
    if (at_once)
        ring(errand);
}

/* Wait until it is sent, and run, if there are steps. Returns the state it was sent with. */
EXPORTED u32 runner_wait(struct errand *errand)
{
    u32 state = wait_while(&errand->state, IDLE);
    if (!errand->order.count)
        return state;
    __atomic_store_n(&errand->cpu, this_cpu(), __ATOMIC_RELEASE);
    u64 usual_ns = errand->cpu == errand->sender ? ask_for_slices(SHORT_SLICE_NS) : 0;
    run(errand);
    if (usual_ns)
        ask_for_slices(usual_ns);
    return state;
}

/* Decide a gate that is undecided still. */
EXPORTED void runner_decide(u32 *gate, u32 value)
{
    u32 found = 0;
    if (__atomic_compare_exchange_n(gate, &found, value, 0, __ATOMIC_RELEASE, __ATOMIC_ACQUIRE))
        syscall4(SYS_FUTEX, (long)gate, FUTEX_WAKE_PRIVATE, 1, 0);
}

EXPORTED void runner_send(struct errand *errand, const struct order *order, u32 gate, u32 state)
{
    errand->order = *order;
    errand->gate = gate;
    errand->sender = this_cpu();
    runner_decide(&errand->state, state);
}

/* An eventfd for a bell, or -errno. */
EXPORTED int runner_bell(void)
{
    return (int)syscall4(SYS_EVENTFD2, 0, EFD_NONBLOCK | EFD_CLOEXEC, 0, 0);
}

/* Whether it may need the caller's processor: it has begun there, or nowhere yet. */
EXPORTED u32 runner_is_here(const struct errand *errand)
{
    u32 cpu = __atomic_load_n(&errand->cpu, __ATOMIC_ACQUIRE);
    return !cpu || cpu == this_cpu();
}

EXPORTED u32 runner_size(void)
{
    return sizeof(struct errand);
}
