/* One pair of the host's two clocks: CLOCK_MONOTONIC between two values of the time stamp counter.
 *
 * In native code because the tighter the two values stand, the smaller the error, and a Python call takes longer than
 * all of it. Freestanding, like its neighbours; called with the GIL held, for some microseconds.
 */

#define EXPORTED __attribute__((visibility("default")))

typedef unsigned long long u64;

enum { SYS_CLOCK_GETTIME = 228, CLOCK_MONOTONIC = 1, TRIES = 8 };

struct clock_sample { u64 tsc, ns, tsc_end; };

/* RDTSC may be done out of order (Intel SDM volume 2, RDTSC); the fences keep it where it stands. */
static u64 read_tsc(void)
{
    __builtin_ia32_lfence();
    u64 tsc = __builtin_ia32_rdtsc();
    __builtin_ia32_lfence();
    return tsc;
}

static u64 monotonic_ns(void)
{
    long long now[2] = {0, 0};
    long result;
    __asm__ volatile("syscall"
                     : "=a"(result)
                     : "a"((long)SYS_CLOCK_GETTIME), "D"((long)CLOCK_MONOTONIC), "S"(now)
                     : "rcx", "r11", "memory");
    return result ? 0 : (u64)now[0] * 1000000000u + (u64)now[1];
}

/* The tightest of several tries: an interrupt may come between any two reads. */
EXPORTED void clock_take_sample(struct clock_sample *sample)
{
    sample->tsc = 0;
    sample->tsc_end = ~0ull;
    for (int i = 0; i < TRIES; i++) {
        u64 begin = read_tsc(), ns = monotonic_ns(), end = read_tsc();
        if (end - begin < sample->tsc_end - sample->tsc)
            *sample = (struct clock_sample){begin, ns, end};
    }
}
