/* The floor of saving a VM's memory: its touched pages written to a new file, and that and its directory made durable.
 *
 *     floor_copy FILE MIB TOUCHED_KIB
 *
 * One sample for each line on stdin, its nanoseconds on stdout. The file's removal is not timed.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <libgen.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define START (16ul << 20)
#define PIECE (1ul << 20)

static const char *path;
static char *memory;
static int directory;
static size_t size, touched;

static void die(const char *what)
{
    perror(what);
    printf("%s\n", what);
    exit(1);
}

static uint64_t now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1000000000ull + time.tv_nsec;
}

static uint64_t sample(void)
{
    uint64_t begin = now();
    int fd = open(path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    if (fd < 0 || ftruncate(fd, size))
        die(path);
    for (size_t done = 0; done < touched; done += PIECE) {
        size_t piece = touched - done < PIECE ? touched - done : PIECE;
        if (pwrite(fd, memory + START + done, piece, START + done) != (ssize_t)piece)
            die("pwrite");
    }
    if (fsync(fd) || fsync(directory))
        die("fsync");
    uint64_t took = now() - begin;
    close(fd);
    unlink(path);
    return took;
}

int main(int count, char **words)
{
    char line[64];
    if (count != 4)
        die("usage: floor_copy FILE MIB TOUCHED_KIB");
    path = words[1];
    size = strtoul(words[2], 0, 10) << 20;
    touched = strtoul(words[3], 0, 10) << 10;
    memory = mmap(0, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED || START + touched > size)
        die("mmap");
    memset(memory + START, 0x5a, touched);
    directory = open(dirname(strdup(path)), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (directory < 0)
        die("the directory");
    while (fgets(line, sizeof line, stdin)) {
        printf("%llu\n", (unsigned long long)sample());
        fflush(stdout);
    }
    return 0;
}
