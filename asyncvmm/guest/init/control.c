/*
 * Lines from the host on the control line:
 *
 *     go <seed-hex> <realtime_ns>    mix the seed into the kernel's random pool, set the clock, open the pre-exec gate
 *     poweroff
 *     reboot
 *
 * Anything else, and any line longer than the buffer, is ignored.
 */
#include "init.h"

#include <fcntl.h>
#include <string.h>
#include <sys/ioctl.h>
#include <time.h>
#include <unistd.h>

enum { LINE_SIZE = 512, BYTES_PER_POLL = 1024, EMPTY_POLLS_MID_LINE = 200, SEED_MAX = 64 };

/* linux/random.h, which musl does not ship. */
struct rand_pool_info { int entropy_count, buf_size; unsigned char buf[SEED_MAX]; };
enum { RNDADDENTROPY = _IOW('R', 0x03, int[2]), RNDRESEEDCRNG = _IO('R', 0x07) };

static char line[LINE_SIZE];
static size_t length;
static bool overlong;
static int empty_polls;

static int hex_digit(char c)
{
	if (c >= '0' && c <= '9')
		return c - '0';
	if (c >= 'a' && c <= 'f')
		return c - 'a' + 10;
	return -1;
}

/* The number of bytes before the space that ends the seed, or 0 if it is not whole bytes of hex. */
static size_t parse_seed(const char *text, unsigned char *seed)
{
	size_t n = 0;
	for (; *text != ' '; text += 2) {
		int high = hex_digit(text[0]), low = high < 0 ? -1 : hex_digit(text[1]);
		if (low < 0 || n == SEED_MAX)
			return 0;
		seed[n++] = (unsigned char)(high << 4 | low);
	}
	return n;
}

static bool parse_u64(const char *text, uint64_t *value)
{
	*value = 0;
	if (!*text)
		return false;
	for (; *text; text++) {
		unsigned digit = (unsigned)(*text - '0');
		if (digit > 9 || __builtin_mul_overflow(*value, 10, value) || __builtin_add_overflow(*value, digit, value))
			return false;
	}
	return true;
}

static void mix_entropy(const unsigned char *seed, size_t size)
{
	struct rand_pool_info info = { (int)size * 8, (int)size, { 0 } };
	int fd = open("/dev/urandom", O_RDWR | O_CLOEXEC);
	if (fd < 0)
		return;
	memcpy(info.buf, seed, size);
	ioctl(fd, RNDADDENTROPY, &info);
	ioctl(fd, RNDRESEEDCRNG);
	close(fd);
}

static void set_clock(uint64_t ns)
{
	struct timespec now = { (time_t)(ns / 1000000000u), (long)(ns % 1000000000u) };
	clock_settime(CLOCK_REALTIME, &now);
}

static void go(const char *arguments)
{
	unsigned char seed[SEED_MAX];
	uint64_t realtime_ns;
	size_t size = parse_seed(arguments, seed);
	if (!size || !parse_u64(arguments + 2 * size + 1, &realtime_ns))
		return;
	mix_entropy(seed, size);
	set_clock(realtime_ns);
	workload_go();
}

static void obey(void)
{
	if (!strcmp(line, "poweroff"))
		power_off();
	else if (!strcmp(line, "reboot"))
		restart();
	else if (!strncmp(line, "go ", 3))
		go(line + 3);
}

static void take(char c)
{
	if (c == '\n') {
		line[length] = 0;
		if (!overlong)
			obey();
		length = 0;
		overlong = false;
	} else if (length < LINE_SIZE - 1) {
		line[length++] = c;
	} else {
		overlong = true;
	}
}

void control_poll(void)
{
	int c = -1;
	for (int i = 0; i < BYTES_PER_POLL && (c = uart_read()) >= 0; i++) {
		empty_polls = 0;
		take((char)c);
	}
	if (c < 0 && empty_polls < EMPTY_POLLS_MID_LINE)
		empty_polls++;
}

bool control_mid_line(void)
{
	return (length || overlong) && empty_polls < EMPTY_POLLS_MID_LINE;
}
