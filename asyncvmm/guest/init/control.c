/*
 * Lines from the host on the control line:
 *
 *     go <seed-hex> <realtime_ns>    mix the seed into the kernel's random pool, forget what was fetched of /dev/hwrng,
 *                                    set the clock, say so ("go-done"), open the pre-exec gate
 *     tsc <value> <khz>              the time in the next go is that of this value of the time stamp counter
 *     poweroff
 *     reboot
 *
 * Anything else, and any line longer than the buffer, is ignored.
 */
#include "init.h"

#include <fcntl.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/time.h>
#include <unistd.h>

enum { LINE_SIZE = 512, BYTES_PER_POLL = 1024, EMPTY_POLLS_MID_LINE = 200, SEED_MAX = 64 };
enum { GAP_MAX_NS = 200000000 };
/* Linux's hw_random core and its virtio-rng each hold at most a cache line that the device gave before. */
enum { FETCHED_MAX = 128, FETCH_PATIENCE_US = 20000 };

/* linux/random.h, which musl does not ship. */
struct rand_pool_info { int entropy_count, buf_size; unsigned char buf[SEED_MAX]; };
enum { RNDADDENTROPY = _IOW('R', 0x03, int[2]), RNDRESEEDCRNG = _IO('R', 0x07) };

static char line[LINE_SIZE];
static size_t length;
static bool overlong;
static int empty_polls;
static uint64_t empty_ns; /* CLOCK_MONOTONIC of the last look that found nothing */
static uint64_t tsc, tsc_khz; /* of the last line that said them; 0 kHz: none did since the last go */

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

/* A decimal number, and whatever follows its "end"; NULL if it is none. */
static const char *parse_u64(const char *text, char end, uint64_t *value)
{
	const char *at = text;
	for (*value = 0; *at >= '0' && *at <= '9'; at++)
		if (__builtin_mul_overflow(*value, 10, value) ||
		    __builtin_add_overflow(*value, (unsigned)(*at - '0'), value))
			return NULL;
	return at > text && *at == end ? at + 1 : NULL;
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

/* What the kernel holds of /dev/hwrng, every clone holds: it is read up to where the device would be asked. */
static void forget_fetched(void)
{
	static const struct itimerval patience = { { 0, FETCH_PATIENCE_US }, { 0, FETCH_PATIENCE_US } }, over;
	unsigned char fetched[FETCHED_MAX];
	size_t left = sizeof fetched;
	ssize_t n;
	int fd = open("/dev/hwrng", O_RDONLY | O_NONBLOCK | O_CLOEXEC);
	if (fd < 0)
		return;
	interrupt_by_alarms();
	setitimer(ITIMER_REAL, &patience, NULL); /* O_NONBLOCK does not keep it from waiting for who reads it as well */
	while (left && (n = read(fd, fetched, left)) > 0)
		left -= (size_t)n;
	setitimer(ITIMER_REAL, &over, NULL);
	close(fd);
}

/*
 * When the line's time was true, on CLOCK_MONOTONIC: exactly, if the counter came with it. Else somewhere between the
 * last look that found nothing and now: half-way.
 */
static uint64_t sent_ns(void)
{
	if (tsc_khz)
		return monotonic_at(tsc, tsc_khz);
	uint64_t now = monotonic_ns(), gap = now - empty_ns;
	return gap < GAP_MAX_NS ? now - gap / 2 : now;
}

static void go(const char *arguments)
{
	unsigned char seed[SEED_MAX];
	uint64_t realtime_ns;
	size_t size = parse_seed(arguments, seed);
	if (!size || !parse_u64(arguments + 2 * size + 1, 0, &realtime_ns))
		return;
	uint64_t at_ns = sent_ns();
	mix_entropy(seed, size);
	forget_fetched();
	set_clock(realtime_ns, at_ns);
	tsc_khz = 0;
	say_gone();
	workload_go();
}

static void take_tsc(const char *arguments)
{
	uint64_t value, khz;
	const char *rest = parse_u64(arguments, ' ', &value);
	if (rest && parse_u64(rest, 0, &khz)) {
		tsc = value;
		tsc_khz = khz;
	}
}

static void obey(void)
{
	if (!strcmp(line, "poweroff"))
		power_off();
	else if (!strcmp(line, "reboot"))
		restart();
	else if (!strncmp(line, "go ", 3))
		go(line + 3);
	else if (!strncmp(line, "tsc ", 4))
		take_tsc(line + 4);
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
	if (c < 0 && !length)
		empty_ns = monotonic_ns();
}

bool control_mid_line(void)
{
	return (length || overlong) && empty_polls < EMPTY_POLLS_MID_LINE;
}
