/*
 * The clocks against the time stamp counter (Intel SDM volume 3, "Time-Stamp Counter"), which the host knows as well: it
 * learns from here what CLOCK_MONOTONIC was at a value of it, and says what the time was at another.
 */
#include "init.h"

#include <x86intrin.h>

enum { TRIES = 8, SECOND_NS = 1000000000, MS_NS = 1000000 };

/* The clock read ns while the counter went from tsc to tsc_end. */
struct reading { uint64_t tsc, ns, tsc_end; };

static uint64_t ns_of(clockid_t clock)
{
	struct timespec now;
	clock_gettime(clock, &now);
	return (uint64_t)now.tv_sec * SECOND_NS + (uint64_t)now.tv_nsec;
}

uint64_t monotonic_ns(void)
{
	return ns_of(CLOCK_MONOTONIC);
}

/* RDTSC may be done out of order; the fences keep it where it stands. */
static uint64_t read_tsc(void)
{
	_mm_lfence();
	uint64_t tsc = __rdtsc();
	_mm_lfence();
	return tsc;
}

/* The tightest of several: an interrupt, or the vCPU's thread losing its CPU, may come between any two reads. */
static struct reading read_clock(clockid_t clock)
{
	struct reading best = { 0, 0, UINT64_MAX };
	for (int i = 0; i < TRIES; i++) {
		uint64_t begin = read_tsc(), between = ns_of(clock), end = read_tsc();
		if (end - begin < best.tsc_end - best.tsc)
			best = (struct reading){ begin, between, end };
	}
	return best;
}

void say_clock(void)
{
	struct reading now = read_clock(CLOCK_MONOTONIC);
	say("clock tsc=%llu ns=%llu tsc_end=%llu", (unsigned long long)now.tsc, (unsigned long long)now.ns,
	    (unsigned long long)now.tsc_end);
}

void say_gone(void)
{
	struct reading now = read_clock(CLOCK_REALTIME);
	say("go-done tsc=%llu realtime_ns=%llu", (unsigned long long)now.tsc, (unsigned long long)now.ns);
}

uint64_t monotonic_at(uint64_t tsc, uint64_t khz)
{
	struct reading now = read_clock(CLOCK_MONOTONIC);
	uint64_t since = now.tsc - tsc;
	if (now.tsc < tsc)
		return now.ns;
	uint64_t ns = since / khz * MS_NS + since % khz * MS_NS / khz;
	return ns < now.ns ? now.ns - ns : 0;
}

void set_clock(uint64_t realtime_ns, uint64_t at_ns)
{
	for (int i = 0; i < TRIES; i++) {
		uint64_t begin = monotonic_ns(), now = realtime_ns + begin - at_ns;
		struct timespec time = { (time_t)(now / SECOND_NS), (long)(now % SECOND_NS) };
		clock_settime(CLOCK_REALTIME, &time);
		if (monotonic_ns() - begin < MS_NS)
			return;
	}
}
