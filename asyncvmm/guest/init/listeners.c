/*
 * Says which TCP ports have a listening socket, from /proc/net/tcp and tcp6 (proc(5)): one line when a port begins to
 * listen, again only after it has stopped in between. Bounded in memory (a bit per port) and in work per poll.
 */
#include "init.h"

#include <fcntl.h>
#include <string.h>
#include <unistd.h>

enum { READ_MAX = 256 * 1024, CHUNK = 4096, LINES_PER_POLL = 32, LISTEN = 0x0a, PORTS = 65536 };

static unsigned char now[PORTS / 8], said[PORTS / 8];

static int hex(const char *text, int digits)
{
	int value = 0;
	while (digits--) {
		char c = *text++;
		int digit = c >= '0' && c <= '9' ? c - '0' : c >= 'A' && c <= 'F' ? c - 'A' + 10 : -1;
		if (digit < 0)
			return -1;
		value = value << 4 | digit;
	}
	return value;
}

/* "  0: 0100007F:1F90 00000000:0000 0A …": number, local address:port, remote address:port, state. */
static void note_row(const char *row)
{
	const char *local = strchr(row, ':');
	const char *port = local ? strchr(local + 1, ':') : NULL;
	const char *remote = port ? strchr(port + 1, ':') : NULL;
	if (!remote || strlen(remote) < 8 || hex(remote + 6, 2) != LISTEN)
		return;
	int number = hex(port + 1, 4);
	if (number > 0)
		now[number / 8] |= (unsigned char)(1 << number % 8);
}

/* Rows of one chunk; returns how many bytes of an unfinished row are left at its front. */
static size_t note_rows(char *text, size_t size)
{
	char *start = text, *end;
	text[size] = 0;
	while ((end = memchr(start, '\n', size - (size_t)(start - text)))) {
		*end = 0;
		note_row(start);
		start = end + 1;
	}
	size_t rest = size - (size_t)(start - text);
	memmove(text, start, rest);
	return rest;
}

static void note_table(int *fd, const char *path)
{
	static char text[CHUNK + 1];
	size_t held = 0;
	if (*fd < 0 && (*fd = open(path, O_RDONLY | O_CLOEXEC)) < 0)
		return;
	for (off_t offset = 0; offset < READ_MAX;) {
		ssize_t n = pread(*fd, text + held, CHUNK - held, offset);
		if (n <= 0)
			return;
		offset += n;
		held = note_rows(text, held + (size_t)n);
		if (held == CHUNK)
			return;
	}
}

void listeners_poll(void)
{
	static int tcp = -1, tcp6 = -1;
	int lines = 0;
	memset(now, 0, sizeof now);
	note_table(&tcp, "/proc/net/tcp");
	note_table(&tcp6, "/proc/net/tcp6");
	for (int i = 0; i < PORTS / 8; i++) {
		said[i] &= now[i];
		for (unsigned fresh = now[i] & ~said[i]; fresh && lines < LINES_PER_POLL; fresh &= fresh - 1, lines++) {
			int bit = __builtin_ctz(fresh);
			said[i] |= (unsigned char)(1 << bit);
			say("listener proto=tcp port=%d", i * 8 + bit);
		}
	}
}
