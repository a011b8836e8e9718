/* The floor of a line's way to a coroutine: write the clock into a pipe, COUNT times, some milliseconds apart.
 *
 *     floor_newline COUNT PERIOD_US
 *
 * Each write is one CLOCK_MONOTONIC time, 8 bytes, taken just before it. Spins in between, as the guest does.
 */
#include <stdint.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

static uint64_t now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1000000000ull + time.tv_nsec;
}

int main(int count, char **words)
{
    if (count != 3)
        return 2;
    uint64_t period = strtoul(words[2], 0, 10) * 1000;
    for (long left = atol(words[1]); left > 0; left--) {
        uint64_t begin = now(), stamp = begin;
        while (stamp - begin < period)
            stamp = now();
        if (write(1, &stamp, sizeof stamp) != sizeof stamp)
            return 1;
    }
    return 0;
}
