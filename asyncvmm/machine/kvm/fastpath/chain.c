/* A chain of system calls made in one go, so that an interpreter spends no time between them.
 *
 * Python decides what is called, with what, and in which order, and writes it down as steps (chain.py beside this file);
 * here they are made one after the other. An argument is a number, or a number added to an earlier result: a descriptor
 * that was opened, an address in memory that was mapped. Between the calls bytes can be copied and a result can be stored
 * in memory, which is all that creating a VM does besides calling the kernel.
 *
 * Called with the GIL released. Freestanding as fastpath.c is; nothing static that changes.
 */

#define EXPORTED __attribute__((visibility("default")))

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long s64;

enum { SYS_CLOCK_GETTIME = 228, CLOCK_MONOTONIC = 1, EINTR = 4, EINVAL = 22 };
enum { ARGUMENTS = 6 };
enum { COPY = -1, STORE = -2 }; /* in place of a system call's number */
enum { NOTHING = 0xFFFF };

struct step {
    short call;
    u16 timed;               /* whether the time is wanted when it is done: asking takes as long as a short call */
    u16 base[ARGUMENTS];     /* the slot whose value is added to the argument, or NOTHING */
    u64 argument[ARGUMENTS];
    s64 least;               /* a result below it is a failure and ends the chain */
};

struct slot {
    s64 value;
    u64 end_ns; /* CLOCK_MONOTONIC when the step was done, of a timed step or one that failed */
};

static s64 syscall6(s64 number, const u64 *argument)
{
    s64 result;
    register u64 r10 __asm__("r10") = argument[3];
    register u64 r8 __asm__("r8") = argument[4];
    register u64 r9 __asm__("r9") = argument[5];
    __asm__ volatile("syscall"
                     : "=a"(result)
                     : "a"(number), "D"(argument[0]), "S"(argument[1]), "d"(argument[2]), "r"(r10), "r"(r8), "r"(r9)
                     : "rcx", "r11", "memory");
    return result;
}

static u64 monotonic_ns(void)
{
    s64 now[2] = {0, 0};
    u64 arguments[ARGUMENTS] = {CLOCK_MONOTONIC, (u64)now};
    syscall6(SYS_CLOCK_GETTIME, arguments);
    return (u64)now[0] * 1000000000u + (u64)now[1];
}

static s64 copy(u64 to, u64 from, u64 size)
{
    __asm__ volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(size) : : "memory");
    return 0;
}

static s64 store(u64 to, u64 value)
{
    __builtin_memcpy((void *)to, &value, sizeof value);
    return 0;
}

static s64 make(const struct step *step, const struct slot *slots, u32 known)
{
    u64 argument[ARGUMENTS];
    s64 result;
    for (int i = 0; i < ARGUMENTS; i++) {
        u32 base = step->base[i];
        if (base != NOTHING && base >= known)
            return -EINVAL;
        argument[i] = step->argument[i] + (base == NOTHING ? 0 : (u64)slots[base].value);
    }
    if (step->call == COPY)
        return copy(argument[0], argument[1], argument[2]);
    if (step->call == STORE)
        return store(argument[0], argument[1]);
    do
        result = syscall6(step->call, argument);
    while (result == -EINTR);
    return result;
}

/* Make the steps. The first slots are the caller's, one for each step follows. Returns how many steps did not fail. */
EXPORTED u32 chain_run(const struct step *steps, u32 count, struct slot *slots, u32 given)
{
    for (u32 i = 0; i < count; i++) {
        struct slot *slot = &slots[given + i];
        slot->value = make(&steps[i], slots, given + i);
        int failed = slot->value < steps[i].least;
        if (failed || steps[i].timed)
            slot->end_ns = monotonic_ns();
        if (failed)
            return i;
    }
    return count;
}

EXPORTED u32 chain_step_size(void)
{
    return sizeof(struct step);
}
