/*
 * The ports of a virtio console (virtio 1.2, section 5.3). Each that the host has named gets /dev/virtio-ports/NAME, as
 * udev would give it; /dev/hvc0, the console proper, is made to pass bytes as they are.
 *
 * Ports come one by one after the driver is there, and the host may add some later. Those that /asyncvmm/run/ports
 * names, one a line, are waited for, so that a workload finds them.
 */
#include "init.h"

#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { NAME_SIZE = 64, LIST_SIZE = 2048, TICK_MS = 5, PATIENCE_TICKS = 200 };

static void link_port(const char *port)
{
	char path[NAME_SIZE * 5], name[NAME_SIZE], target[NAME_SIZE * 5];
	snprintf(path, sizeof path, "/sys/class/virtio-ports/%s/name", port);
	if (read_file(path, name, sizeof name) <= 0)
		return;
	name[strcspn(name, "\n")] = 0;
	if (!*name || *name == '.' || strchr(name, '/'))
		return;
	snprintf(path, sizeof path, "/dev/virtio-ports/%s", name);
	snprintf(target, sizeof target, "../%s", port);
	mkdir("/dev/virtio-ports", 0755);
	symlink(target, path); /* there already is as good */
}

/* The kernel forgets a terminal's settings when nobody has it open any more: PID 1 keeps it open. */
static void keep_hvc0_raw(void)
{
	static int hvc0 = -1;
	if (hvc0 >= 0)
		return;
	hvc0 = open("/dev/hvc0", O_RDWR | O_NOCTTY | O_NONBLOCK | O_CLOEXEC);
	if (hvc0 >= 0)
		make_raw(hvc0);
}

void ports_poll(void)
{
	if (access("/sys/class/virtio-ports", F_OK) != 0)
		return;
	each_entry("/sys/class/virtio-ports", link_port);
	keep_hvc0_raw();
}

static bool is_there(const char *name)
{
	char path[NAME_SIZE * 5];
	snprintf(path, sizeof path, "/dev/virtio-ports/%s", name);
	return access(path, F_OK) == 0;
}

static void wait_for(const char *name)
{
	for (int i = 0; !is_there(name); i++) {
		if (i == PATIENCE_TICKS) {
			say("init-warning port=%s", name);
			return;
		}
		sleep_ms(TICK_MS);
		ports_poll();
	}
}

void find_ports(void)
{
	static char list[LIST_SIZE];
	char *next = list, *name;
	ports_poll();
	if (read_file("/asyncvmm/run/ports", list, sizeof list) <= 0)
		return;
	while ((name = strsep(&next, "\n")))
		if (*name)
			wait_for(name);
}
