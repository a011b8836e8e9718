/*
 * Loads /asyncvmm/modules/<file> for each line "<file> [<virtio device id>]" of /asyncvmm/modules.list, in order.
 * Nothing is loaded on a machine without virtio-mmio devices, and a line with an id only if such a device is there
 * (virtio 1.2, section 5: 1 network, 2 block, 3 console, 4 entropy, 5 balloon, 19 socket).
 */
#include "init.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { LIST_SIZE = 8192, DEVICES_MAX = 64, IDS = 64 };

static bool has_virtio_mmio(void)
{
	static char cmdline[4096];
	if (access("/sys/bus/acpi/devices/LNRO0005:00", F_OK) == 0)
		return true;
	return read_file("/proc/cmdline", cmdline, sizeof cmdline) > 0 && strstr(cmdline, "virtio_mmio.device=");
}

static bool has_device(unsigned long id)
{
	char path[64], text[16];
	for (int i = 0; i < DEVICES_MAX; i++) {
		snprintf(path, sizeof path, "/sys/bus/virtio/devices/virtio%d/device", i);
		if (read_file(path, text, sizeof text) > 0 && strtoul(text, NULL, 16) == id)
			return true;
	}
	return false;
}

static void load(const char *file)
{
	char path[128];
	if (snprintf(path, sizeof path, "/asyncvmm/modules/%s", file) >= (int)sizeof path)
		return;
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0 || (syscall(SYS_finit_module, fd, "", 0) != 0 && errno != EEXIST))
		say("init-warning module=%s", file);
	if (fd >= 0)
		close(fd);
}

void load_modules(void)
{
	static char list[LIST_SIZE];
	char *next = list, *entry;
	if (!has_virtio_mmio() || read_file("/asyncvmm/modules.list", list, sizeof list) <= 0)
		return;
	while ((entry = strsep(&next, "\n"))) {
		char *file = strsep(&entry, " ");
		if (*file && (!entry || has_device(strtoul(entry, NULL, 10))))
			load(file);
	}
}
