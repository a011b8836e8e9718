/* What a guest does with its socket device in tests: static, for there is nothing else in the guest that knows AF_VSOCK.
 *
 *   vsock echo PORT           for ever: send back what comes, end where the other side ends
 *   vsock count PORT          for ever: say how many bytes came, and their sum modulo 2^32, when they end
 *                             (both in the background: it returns as soon as they listen)
 *   vsock call PORT TEXT      connect to the host, send TEXT, print the answer; the exit status is 1 if refused
 */
#include <errno.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

struct sockaddr_vm {
    sa_family_t family;
    unsigned short reserved;
    unsigned int port, cid;
    unsigned char zero[4];
};

static const unsigned int ANY = -1U, HOST = 2;
static char buffer[65536];

static void die(const char *what) {
    perror(what);
    exit(2);
}

static void send_all(int fd, const char *data, ssize_t size) {
    while (size > 0) {
        ssize_t sent = write(fd, data, size);
        if (sent < 0)
            die("write");
        data += sent, size -= sent;
    }
}

static void echo(int fd) {
    ssize_t size;
    while ((size = read(fd, buffer, sizeof buffer)) > 0)
        send_all(fd, buffer, size);
}

static void count(int fd) {
    uint32_t sum = 0;
    unsigned long total = 0;
    ssize_t size;
    while ((size = read(fd, buffer, sizeof buffer)) > 0) {
        total += size;
        for (ssize_t at = 0; at < size; at++)
            sum += (unsigned char)buffer[at];
    }
    send_all(fd, buffer, sprintf(buffer, "%lu %u\n", total, sum));
}

static void serve(unsigned int port, void (*handle)(int)) {
    struct sockaddr_vm address = {.family = AF_VSOCK, .port = port, .cid = ANY};
    int listening = socket(AF_VSOCK, SOCK_STREAM, 0);
    if (listening < 0 || bind(listening, (void *)&address, sizeof address) < 0 || listen(listening, 128) < 0)
        die("listen");
    printf("listening on %u\n", port);
    fflush(stdout);
    if (fork() != 0)
        exit(0);
    signal(SIGCHLD, SIG_IGN);
    for (;;) {
        int fd = accept(listening, NULL, NULL);
        if (fd < 0)
            die("accept");
        if (fork() == 0) {
            handle(fd);
            exit(0);
        }
        close(fd);
    }
}

static int call(unsigned int port, const char *text) {
    struct sockaddr_vm address = {.family = AF_VSOCK, .port = port, .cid = HOST};
    int fd = socket(AF_VSOCK, SOCK_STREAM, 0);
    ssize_t size;
    if (fd < 0 || connect(fd, (void *)&address, sizeof address) < 0) {
        printf("call %u: %s\n", port, strerror(errno));
        return 1;
    }
    send_all(fd, text, strlen(text));
    shutdown(fd, SHUT_WR);
    printf("answer: ");
    while ((size = read(fd, buffer, sizeof buffer)) > 0)
        fwrite(buffer, 1, size, stdout);
    printf("\n");
    return 0;
}

int main(int argc, char **argv) {
    if (argc == 3 && !strcmp(argv[1], "echo"))
        serve(atoi(argv[2]), echo);
    if (argc == 3 && !strcmp(argv[1], "count"))
        serve(atoi(argv[2]), count);
    if (argc == 4 && !strcmp(argv[1], "call"))
        return call(atoi(argv[2]), argv[3]);
    fprintf(stderr, "usage: vsock echo|count PORT, or call PORT TEXT\n");
    return 2;
}
