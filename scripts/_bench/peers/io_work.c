/* Work for a guest's devices, asked for line by line on standard input, and the other end of it on the host.
 *
 *     io_work                          for each line: do what it says, print "result OPERATIONS BYTES NS P50_NS P99_NS"
 *     io_work serve tcp|unix|vsock WHERE
 *
 *     disk PATH read|write BLOCK DEPTH seq|rand direct|cached MS
 *     echo tcp|vsock WHERE PORT BYTES MS     round trips of BYTES
 *     send tcp|vsock WHERE PORT BYTES MS     to the host, in pieces of BYTES
 *     take tcp|vsock WHERE PORT BYTES MS     from the host
 *
 * The server is told by a connection's first byte what it is for: e, s or t; it closes when its peer does. What a
 * sender counts ends with the server's word that it has everything.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/aio_abi.h>
#include <linux/fs.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define MOST_DEPTH 64
#define MOST_SAMPLES 200000

struct vsock_address { /* struct sockaddr_vm, which musl has no header for */
    unsigned short family, reserved;
    unsigned int port, cid;
    unsigned char zero[4];
};

static uint64_t samples[MOST_SAMPLES];
static uint64_t operations, bytes, began;

static uint64_t now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1000000000ull + time.tv_nsec;
}

static void count(uint64_t since, uint64_t size)
{
    if (operations < MOST_SAMPLES)
        samples[operations] = now() - since;
    operations++;
    bytes += size;
}

static int ascending(const void *a, const void *b)
{
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return (x > y) - (x < y);
}

static void tell(uint64_t took)
{
    uint64_t have = operations < MOST_SAMPLES ? operations : MOST_SAMPLES;
    qsort(samples, have, sizeof *samples, ascending);
    printf("result %llu %llu %llu %llu %llu\n", (unsigned long long)operations, (unsigned long long)bytes,
           (unsigned long long)took, (unsigned long long)(have ? samples[have / 2] : 0),
           (unsigned long long)(have ? samples[have - 1 - have / 100] : 0));
    fflush(stdout);
}

static int failed(const char *what)
{
    printf("failed %s: %s\n", what, strerror(errno));
    fflush(stdout);
    return -1;
}

/* -- disks ---------------------------------------------------------------------------------------------------------- */

static uint64_t size_of(int fd)
{
    struct stat status;
    uint64_t size = 0;
    if (!fstat(fd, &status) && S_ISREG(status.st_mode))
        return status.st_size;
    ioctl(fd, BLKGETSIZE64, &size);
    return size;
}

static uint64_t next_place(uint64_t blocks, int in_order)
{
    static uint64_t place, state = 88172645463325252ull;
    if (in_order)
        return place++ % blocks;
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return state % blocks;
}

/* One block at a time, by read and write: the way a program waits for its disk. */
static int one_by_one(int fd, int writing, char *buffer, size_t block, uint64_t blocks, int in_order, uint64_t until)
{
    while (now() < until) {
        uint64_t since = now(), place = next_place(blocks, in_order) * block;
        ssize_t done = writing ? pwrite(fd, buffer, block, place) : pread(fd, buffer, block, place);
        if (done != (ssize_t)block)
            return failed("disk");
        count(since, block);
    }
    return 0;
}

static int many_at_once(int fd, int writing, char *buffer, size_t block, int depth, uint64_t blocks, int in_order,
                        uint64_t until)
{
    static struct iocb controls[MOST_DEPTH];
    static uint64_t since[MOST_DEPTH];
    aio_context_t context = 0;
    struct io_event events[MOST_DEPTH];
    int under_way = 0, stopping = 0;
    if (syscall(SYS_io_setup, MOST_DEPTH, &context) < 0)
        return failed("io_setup");
    struct iocb *fresh[MOST_DEPTH];
    int idle = 0;
    for (int i = 0; i < depth; i++)
        fresh[idle++] = &controls[i];
    while (idle || under_way) {
        for (int i = 0; i < idle; i++) {
            int slot = fresh[i] - controls;
            memset(fresh[i], 0, sizeof *fresh[i]);
            fresh[i]->aio_data = slot;
            fresh[i]->aio_lio_opcode = writing ? IOCB_CMD_PWRITE : IOCB_CMD_PREAD;
            fresh[i]->aio_fildes = fd;
            fresh[i]->aio_buf = (uintptr_t)(buffer + slot * block);
            fresh[i]->aio_nbytes = block;
            fresh[i]->aio_offset = next_place(blocks, in_order) * block;
            since[slot] = now();
        }
        if (idle && syscall(SYS_io_submit, context, idle, fresh) != idle)
            return failed("io_submit");
        under_way += idle;
        idle = 0;
        int got = syscall(SYS_io_getevents, context, 1, MOST_DEPTH, events, 0);
        if (got < 0)
            return failed("io_getevents");
        stopping |= now() >= until;
        for (int i = 0; i < got; i++) {
            if (events[i].res != (int64_t)block)
                return failed("asynchronous disk");
            count(since[events[i].data], block);
            if (!stopping)
                fresh[idle++] = &controls[events[i].data];
        }
        under_way -= got;
    }
    syscall(SYS_io_destroy, context);
    return 0;
}

static int disk(char **words)
{
    int writing = !strcmp(words[2], "write"), in_order = !strcmp(words[5], "seq"), direct = !strcmp(words[6], "direct");
    size_t block = strtoul(words[3], 0, 10);
    int depth = atoi(words[4]);
    int fd = open(words[1], (writing ? O_RDWR : O_RDONLY) | (direct ? O_DIRECT : 0));
    if (fd < 0 || depth < 1 || depth > MOST_DEPTH)
        return failed(words[1]);
    char *buffer = aligned_alloc(4096, block * depth);
    memset(buffer, 0x5a, block * depth);
    if (!direct && !writing)
        posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
    uint64_t blocks = size_of(fd) / block, until = now() + strtoull(words[7], 0, 10) * 1000000;
    began = now();
    int bad = depth == 1 ? one_by_one(fd, writing, buffer, block, blocks, in_order, until)
                         : many_at_once(fd, writing, buffer, block, depth, blocks, in_order, until);
    if (!direct && writing)
        bad |= fsync(fd);
    uint64_t took = now() - began;
    close(fd);
    free(buffer);
    if (!bad)
        tell(took);
    return bad;
}

/* -- streams -------------------------------------------------------------------------------------------------------- */

static int all(int fd, char *buffer, size_t size, int writing)
{
    while (size) {
        ssize_t done = writing ? write(fd, buffer, size) : read(fd, buffer, size);
        if (done <= 0)
            return -1;
        buffer += done, size -= done;
    }
    return 0;
}

/* Slow start to the end, on both sides: CUBIC's HyStart gives it up when the round trip varies, as it does under
 * emulation, and then a connection of some seconds shows little but how early that was. */
static void prepare_tcp(int fd)
{
    int yes = 1;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
    setsockopt(fd, IPPROTO_TCP, TCP_CONGESTION, "reno", 4);
}

static int stream_socket(const char *kind, const char *where, const char *port, int serving)
{
    union {
        struct sockaddr any;
        struct sockaddr_in in;
        struct sockaddr_un un;
        struct vsock_address vm;
    } address = {.any = {0}};
    socklen_t size = sizeof address.in;
    int family = !strcmp(kind, "tcp") ? AF_INET : !strcmp(kind, "unix") ? AF_UNIX : 40, yes = 1;
    address.any.sa_family = family;
    if (family == AF_INET) {
        address.in.sin_port = htons(atoi(port));
        inet_pton(AF_INET, where, &address.in.sin_addr);
    } else if (family == AF_UNIX) {
        size = sizeof address.un;
        strncpy(address.un.sun_path, where, sizeof address.un.sun_path - 1);
    } else {
        size = sizeof address.vm;
        address.vm.cid = strtoul(where, 0, 10);
        address.vm.port = strtoul(port, 0, 10);
    }
    int fd = socket(family, SOCK_STREAM, 0);
    if (fd < 0)
        return failed("socket");
    if (family == AF_INET) {
        prepare_tcp(fd);
        setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
    }
    if (serving ? bind(fd, &address.any, size) || listen(fd, 16) : connect(fd, &address.any, size)) {
        close(fd);
        return failed(serving ? "bind" : "connect");
    }
    return fd;
}

static int stream(char **words)
{
    char kind = words[0][0], word;
    size_t size = strtoul(words[4], 0, 10);
    int fd = stream_socket(words[1], words[2], words[3], 0), bad;
    if (fd < 0)
        return -1;
    char *buffer = calloc(1, size);
    bad = all(fd, &kind, 1, 1);
    began = now();
    uint64_t until = began + strtoull(words[5], 0, 10) * 1000000;
    while (!bad && now() < until) {
        uint64_t since = now();
        ssize_t got = size;
        if (kind == 't')
            bad = (got = read(fd, buffer, size)) <= 0;
        else
            bad = all(fd, buffer, size, 1) || (kind == 'e' && all(fd, buffer, size, 0));
        count(since, got);
    }
    if (kind == 's')
        bad |= shutdown(fd, SHUT_WR) || read(fd, &word, 1) != 1;
    uint64_t took = now() - began;
    if (bad)
        failed(words[0]);
    else
        tell(took);
    close(fd);
    free(buffer);
    return bad;
}

static void serve_one(int fd)
{
    static char buffer[1 << 16];
    char kind = 0;
    ssize_t got;
    prepare_tcp(fd);
    if (all(fd, &kind, 1, 0))
        return;
    if (kind == 't')
        while (write(fd, buffer, sizeof buffer) > 0)
            ;
    while (kind != 't' && (got = read(fd, buffer, sizeof buffer)) > 0)
        if (kind == 'e' && all(fd, buffer, got, 1))
            return;
    if (kind == 's')
        all(fd, buffer, 1, 1);
}

static int serve(const char *kind, const char *where, const char *port)
{
    int listener = stream_socket(kind, where, port, 1);
    while (listener >= 0) {
        int fd = accept(listener, 0, 0);
        if (fd < 0)
            continue;
        serve_one(fd);
        close(fd);
    }
    return 1;
}

int main(int number, char **arguments)
{
    char line[512], *words[16];
    signal(SIGPIPE, SIG_IGN);
    if (number >= 4 && !strcmp(arguments[1], "serve"))
        return serve(arguments[2], arguments[3], number > 4 ? arguments[4] : "0");
    printf("willing\n");
    fflush(stdout);
    while (fgets(line, sizeof line, stdin)) {
        int found = 0;
        for (char *word = strtok(line, " \r\n"); word && found < 16; word = strtok(0, " \r\n"))
            words[found++] = word;
        operations = bytes = 0;
        if (found == 8 && !strcmp(words[0], "disk"))
            disk(words);
        else if (found == 6)
            stream(words);
        else if (found)
            printf("failed words: %d\n", found), fflush(stdout);
    }
    return 0;
}
