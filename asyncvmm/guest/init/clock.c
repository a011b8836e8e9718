/*
 * Says what CLOCK_MONOTONIC was between two values of the time stamp counter (Intel SDM volume 3, "Time-Stamp Counter").
 * The tightest of several tries: an interrupt, or the vCPU's thread losing its CPU, may come between any two reads.
 */
#include "init.h"

#include <x86intrin.h>

enum { TRIES = 8 };

/* RDTSC may be done out of order; the fences keep it where it stands. */
static uint64_t read_tsc(void)
{
	_mm_lfence();
	uint64_t tsc = __rdtsc();
	_mm_lfence();
	return tsc;
}

void say_clock(void)
{
	uint64_t tsc = 0, ns = 0, tsc_end = UINT64_MAX;
	for (int i = 0; i < TRIES; i++) {
		uint64_t begin = read_tsc(), between = monotonic_ns(), end = read_tsc();
		if (end - begin < tsc_end - tsc) {
			tsc = begin;
			ns = between;
			tsc_end = end;
		}
	}
	say("clock tsc=%llu ns=%llu tsc_end=%llu", (unsigned long long)tsc, (unsigned long long)ns,
	    (unsigned long long)tsc_end);
}
