/* Mounts and the console: what a workload may expect to find. */
#include "init.h"

#include <fcntl.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <termios.h>
#include <unistd.h>

enum { DRAIN_PATIENCE_S = 1 };

int console_fd = -1;

static void mount_one(const char *type, const char *target, unsigned long flags, const char *options)
{
	mkdir(target, 0755);
	mount(type, target, type, flags, options); /* already mounted is as good */
}

void mount_all(void)
{
	mount_one("devtmpfs", "/dev", MS_NOSUID, "mode=0755");
	mount_one("devpts", "/dev/pts", MS_NOSUID | MS_NOEXEC, "mode=0620,ptmxmode=0666");
	mount_one("proc", "/proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL);
	mount_one("sysfs", "/sys", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL);
	mount_one("tmpfs", "/tmp", MS_NOSUID | MS_NODEV, "mode=1777");
	mount_one("tmpfs", "/run", MS_NOSUID | MS_NODEV, "mode=0755");
	symlink("/proc/self/fd", "/dev/fd");
	symlink("/proc/self/fd/0", "/dev/stdin");
	symlink("/proc/self/fd/1", "/dev/stdout");
	symlink("/proc/self/fd/2", "/dev/stderr");
}

/* Bytes pass as they are, both ways: no echo, no line editing, no "\r" put in. */
void make_raw(int fd)
{
	struct termios settings;
	if (tcgetattr(fd, &settings) != 0)
		return;
	cfmakeraw(&settings);
	settings.c_cflag |= CREAD | CLOCAL;
	tcsetattr(fd, TCSANOW, &settings);
}

/*
 * PID 1 leads the session that has the console as its terminal: were it the workload, its exit would hang up the
 * terminal and drop output not yet sent (tty_vhangup_session).
 */
int open_console(void)
{
	static const char *const names[] = { "/dev/console", "/dev/ttyS0", "/dev/null" };
	for (size_t i = 0; console_fd < 0 && i < sizeof names / sizeof *names; i++)
		console_fd = open(names[i], O_RDWR | O_NOCTTY | O_CLOEXEC);
	make_raw(console_fd);
	setsid();
	ioctl(console_fd, TIOCSCTTY, 1);
	return console_fd;
}

/* Waits until the console has sent all it holds, as long as it gets on with that: a workload may have stopped it. */
void drain_console(void)
{
	int before, left = 0;
	interrupt_by_alarms();
	ioctl(console_fd, TIOCOUTQ, &left);
	do {
		before = left;
		alarm(DRAIN_PATIENCE_S);
		if (tcdrain(console_fd) == 0 || ioctl(console_fd, TIOCOUTQ, &left) != 0)
			break;
	} while (left < before);
	alarm(0);
}
