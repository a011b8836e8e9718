/* The vCPU thread's run loop for the exits that need no Python: constant reads and posted writes of one I/O port.
 *
 * A polled serial port is two kinds of access over and over: LSR is read and says what it said before, THR is written
 * and nothing happens but that one byte more is on its way. The device, in Python, says when that is so ("this port reads
 * as 0x60", "writes to this port may be posted"); for as long as it does, this loop answers them, and returns to Python
 * for every other exit. So the device's rules are written once, in Python, and a busy interpreter does not slow a guest
 * that prints.
 *
 * Freestanding: no libc, no allocation, nothing static that changes. Calls are made with the GIL released (run) or held
 * (the others, which take well under a microsecond). The lock is a spin lock held for some tens of instructions.
 */

#define EXPORTED __attribute__((visibility("default")))

typedef unsigned char u8;
typedef unsigned int u32;
typedef unsigned long long u64;

enum { KVM_RUN = 0xAE80, KVM_EXIT_IO = 2 };
enum { SYS_WRITE = 1, SYS_IOCTL = 16, SYS_SCHED_YIELD = 24, SYS_CLOCK_GETTIME = 228, CLOCK_MONOTONIC = 1 };
enum { OFF = 0, CONSTANT_READ = 1, POSTED_WRITE = 2 };
enum { PORTS = 4, RING = 65536, NEWLINES = 2048, URGENT_BYTES = 256 };

struct port {
    u32 key;   /* direction, size and port, as kvm_run.io shows them in its first 32 bits */
    u32 kind;
    u32 value; /* what a constant read gives */
    u32 unused;
    u64 count, cycles, max_cycles;
};

struct fastpath {
    u32 lock;
    u32 used;     /* bytes in the ring, from its start */
    u32 newlines; /* newline times recorded */
    u32 announced;
    u32 urgent;
    int event_fd;
    struct port port[PORTS];
    u64 newline_ns[NEWLINES];
    u8 ring[RING];
};

static long syscall3(long number, long a, long b, long c)
{
    long result;
    __asm__ volatile("syscall" : "=a"(result) : "a"(number), "D"(a), "S"(b), "d"(c) : "rcx", "r11", "memory");
    return result;
}

static void lock(struct fastpath *fast)
{
    while (__atomic_exchange_n(&fast->lock, 1, __ATOMIC_ACQUIRE))
        syscall3(SYS_SCHED_YIELD, 0, 0, 0);
}

static void unlock(struct fastpath *fast)
{
    __atomic_store_n(&fast->lock, 0, __ATOMIC_RELEASE);
}

static u64 monotonic_ns(void)
{
    long long now[2] = {0, 0};
    syscall3(SYS_CLOCK_GETTIME, CLOCK_MONOTONIC, (long)now, 0);
    return (u64)now[0] * 1000000000u + (u64)now[1];
}

/* Append a byte. 0 if there is no room for it, or for the time of its newline. Sets *wake if the loop is to be told. */
static int post(struct fastpath *fast, u8 byte, int *wake)
{
    int newline = byte == '\n';
    if (fast->used == RING || (newline && fast->newlines == NEWLINES))
        return 0;
    fast->ring[fast->used++] = byte;
    if (newline)
        fast->newline_ns[fast->newlines++] = monotonic_ns();
    if (!fast->announced)
        fast->announced = *wake = 1;
    if (!fast->urgent && (newline || fast->used >= URGENT_BYTES))
        fast->urgent = *wake = 1;
    return 1;
}

static int answer(struct fastpath *fast, struct port *port, u8 *data)
{
    u64 begin = __builtin_ia32_rdtsc(), cycles;
    int done = 1, wake = 0;
    lock(fast);
    if (port->kind == CONSTANT_READ)
        *data = (u8)port->value;
    else
        done = port->kind == POSTED_WRITE && post(fast, *data, &wake);
    if (done) {
        cycles = __builtin_ia32_rdtsc() - begin;
        port->count++;
        port->cycles += cycles;
        if (cycles > port->max_cycles)
            port->max_cycles = cycles;
    }
    unlock(fast);
    if (wake) {
        u64 one = 1;
        syscall3(SYS_WRITE, fast->event_fd, (long)&one, sizeof one);
    }
    return done;
}

static struct port *find(struct fastpath *fast, u32 key)
{
    for (int slot = 0; slot < PORTS; slot++)
        if (fast->port[slot].kind != OFF && fast->port[slot].key == key)
            return &fast->port[slot];
    return 0;
}

/* Run the vCPU until an exit needs Python (0), or KVM_RUN fails (its negative errno). */
EXPORTED long fastpath_run(int vcpu_fd, u8 *run, struct fastpath *fast)
{
    for (;;) {
        long failed = syscall3(SYS_IOCTL, vcpu_fd, KVM_RUN, 0);
        if (failed)
            return failed;
        u32 *words = (u32 *)run;
        if (words[2] != KVM_EXIT_IO || words[9] != 1)
            return 0;
        struct port *port = find(fast, words[8]);
        if (!port || !answer(fast, port, run + *(u64 *)(run + 40)))
            return 0;
    }
}

/* Say how a port is to be answered from now on. */
EXPORTED void fastpath_set(struct fastpath *fast, int slot, u32 key, u32 kind, u32 value)
{
    lock(fast);
    fast->port[slot].key = key;
    fast->port[slot].kind = kind;
    fast->port[slot].value = value;
    unlock(fast);
}

/* Move the posted bytes and their newlines' times out, of which there are *newlines; returns how many bytes. */
EXPORTED u32 fastpath_take(struct fastpath *fast, u8 *bytes, u64 *newline_ns, u32 *newlines)
{
    lock(fast);
    u32 used = fast->used;
    *newlines = fast->newlines;
    for (u32 i = 0; i < used; i++)
        bytes[i] = fast->ring[i];
    for (u32 i = 0; i < *newlines; i++)
        newline_ns[i] = fast->newline_ns[i];
    fast->used = fast->newlines = fast->announced = fast->urgent = 0;
    unlock(fast);
    return used;
}

EXPORTED u32 fastpath_size(void)
{
    return sizeof(struct fastpath);
}
