/*
 * The workload's root file system, if /asyncvmm/run/root names one: "<device> <type|auto> <ro|rw>", as "vda ext4 rw".
 *
 * What can only be read gets a tmpfs over it (overlayfs), so that a workload always finds a root it can write. The
 * mounts made so far move along, then the new root becomes "/" as switch_root(8) does it: an initramfs cannot be
 * pivoted away. A root that cannot be had ends the boot: "init-error root=<errno>" on the control line.
 */
#include "init.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <unistd.h>

#define NEW_ROOT "/asyncvmm/root"
#define LOWER "/asyncvmm/lower"
#define LAYERS "/asyncvmm/layers"

enum { TICK_MS = 5, DEVICE_TICKS = 400, REMOUNT_TICKS = 200, SUPERBLOCKS_SIZE = 2048 };

static bool must_leave; /* a disk is mounted for writing */

static bool wait_for(const char *path)
{
	for (int i = 0; access(path, F_OK) != 0; i++) {
		if (i == DEVICE_TICKS)
			return false;
		sleep_ms(TICK_MS);
	}
	return true;
}

/* By the magic numbers of their superblocks (the kernel's ext4.h, squashfs_fs.h, erofs_fs.h); NULL: none of them. */
static const char *recognise(const char *path)
{
	unsigned char start[SUPERBLOCKS_SIZE] = { 0 };
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	ssize_t size = fd < 0 ? -1 : read(fd, start, sizeof start);
	if (fd >= 0)
		close(fd);
	if (size != sizeof start)
		return NULL;
	if (!memcmp(start + 1024 + 56, "\x53\xef", 2))
		return "ext4";
	if (!memcmp(start, "hsqs", 4))
		return "squashfs";
	return memcmp(start + 1024, "\xe2\xe1\xf5\xe0", 4) ? NULL : "erofs";
}

/* An ext4 whose journal holds something can be mounted from a disk that takes no writes only without its journal. */
static bool mount_for_reading(const char *path, const char *type)
{
	mkdir(LOWER, 0755);
	if (mount(path, LOWER, type, MS_RDONLY, NULL) == 0)
		return true;
	return errno == EROFS && mount(path, LOWER, type, MS_RDONLY, "noload") == 0;
}

static bool cover_with_tmpfs(void)
{
	struct stat root;
	mkdir(LAYERS, 0755);
	if (stat(LOWER, &root) != 0 || mount("tmpfs", LAYERS, "tmpfs", 0, "mode=0755") != 0)
		return false;
	if (mkdir(LAYERS "/upper", 0755) != 0 || mkdir(LAYERS "/work", 0755) != 0)
		return false;
	if (chown(LAYERS "/upper", root.st_uid, root.st_gid) != 0 || chmod(LAYERS "/upper", root.st_mode & 07777) != 0)
		return false;
	load_filesystem("overlay");
	return mount("overlay", NEW_ROOT, "overlay", 0,
	             "lowerdir=" LOWER ",upperdir=" LAYERS "/upper,workdir=" LAYERS "/work") == 0;
}

static bool mount_disk(const char *path, const char *type, bool read_only)
{
	mkdir(NEW_ROOT, 0755);
	if (!wait_for(path)) {
		errno = ENODEV;
		return false;
	}
	if (!strcmp(type, "auto") && !(type = recognise(path))) {
		errno = EINVAL;
		return false;
	}
	load_filesystem(type);
	if (read_only || strcmp(type, "ext4"))
		return mount_for_reading(path, type) && cover_with_tmpfs();
	must_leave = mount(path, NEW_ROOT, type, 0, NULL) == 0;
	return must_leave;
}

static bool move_mount(const char *from)
{
	char target[64];
	struct stat found;
	snprintf(target, sizeof target, NEW_ROOT "%s", from);
	mkdir(target, 0755);
	if (lstat(target, &found) != 0)
		return false;
	if (!S_ISDIR(found.st_mode)) { /* a link would lead to the old root's files */
		errno = ENOTDIR;
		return false;
	}
	return mount(from, target, NULL, MS_MOVE, NULL) == 0;
}

static bool switch_to_new_root(void)
{
	static const char *const mounts[] = { "/dev", "/proc", "/sys", "/run", "/tmp" };
	for (size_t i = 0; i < sizeof mounts / sizeof *mounts; i++)
		if (!move_mount(mounts[i]))
			return false;
	/* The largest files of the initramfs: nobody can reach them any more, and they are memory. */
	unlink("/bin/busybox");
	forget_modules();
	return chdir(NEW_ROOT) == 0 && mount(".", "/", NULL, MS_MOVE, NULL) == 0 && chroot(".") == 0 && chdir("/") == 0;
}

static _Noreturn void give_up(const char *device, int reason)
{
	open_console();
	dprintf(console_fd, "asyncvmm: no root on %s: %s\n", device, strerror(reason));
	drain_console();
	say("init-error root=%d", reason);
	power_off();
}

void enter_root(void)
{
	char line[128], path[64], *next = line;
	if (read_file("/asyncvmm/run/root", line, sizeof line) <= 0)
		return;
	const char *device = strsep(&next, " \n"), *type = strsep(&next, " \n"), *mode = strsep(&next, " \n");
	if (!mode || strchr(device, '/'))
		give_up(device, EINVAL);
	snprintf(path, sizeof path, "/dev/%s", device);
	if (!mount_disk(path, type, strcmp(mode, "rw")) || !switch_to_new_root())
		give_up(device, errno);
}

/* A disk mounted for writing is put down whole: whoever writes to it is ended, then it is made read-only. */
void leave_root(void)
{
	if (!must_leave)
		return;
	must_leave = false;
	kill(-1, SIGKILL);
	for (int i = 0; i < REMOUNT_TICKS && mount(NULL, "/", NULL, MS_REMOUNT | MS_RDONLY, NULL) != 0; i++)
		sleep_ms(TICK_MS);
}
