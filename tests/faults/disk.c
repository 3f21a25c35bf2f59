/* A disk that fails, for LD_PRELOAD: opens for writing, writes and syncs of files below $DISK_FOLDER
 * do what the file $DISK_ORDERS says at that moment. Its lines are "open ERRNO MS", "write ERRNO MS"
 * and "sync ERRNO MS": wait for MS milliseconds, then fail with ERRNO, or continue if it is 0.
 * A sync that fails loses what was written since the last sync, as the kernel may. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

/* What a write has overwritten: the latest first. */
struct unsynced {
	struct unsynced *before;
	dev_t device;
	ino_t file;
	off_t at, size;
	ssize_t length;
	char old[];
};
static struct unsynced *latest;
static pthread_mutex_t guard = PTHREAD_MUTEX_INITIALIZER;

static int is_below(const char *path)
{
	const char *folder = getenv("DISK_FOLDER");
	return folder && strncmp(path, folder, strlen(folder)) == 0;
}

static int is_file_below(int fd)
{
	char link[64], path[PATH_MAX];
	snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
	ssize_t length = readlink(link, path, sizeof path - 1);
	if (length < 0)
		return 0;
	path[length] = 0;
	return is_below(path);
}

/* Waits as ordered. Returns the errno to fail with; 0: none. */
static int order_for(const char *operation)
{
	const char *orders = getenv("DISK_ORDERS");
	int fd = orders ? REAL(open)(orders, O_RDONLY | O_CLOEXEC) : -1;
	if (fd < 0)
		return 0;
	char text[256] = "";
	if (read(fd, text, sizeof text - 1) < 0)
		text[0] = 0;
	close(fd);
	char *found = strstr(text, operation);
	int error = 0, ms = 0;
	if (found)
		sscanf(found + strlen(operation), "%d %d", &error, &ms);
	nanosleep(&(struct timespec){ms / 1000, ms % 1000 * 1000000L}, NULL);
	return error;
}

static void remember(int fd, size_t count, off_t at)
{
	struct stat now;
	struct unsynced *entry = malloc(sizeof *entry + count);
	if (!entry || fstat(fd, &now) < 0 || !S_ISREG(now.st_mode)) {
		free(entry);
		return;
	}
	*entry = (struct unsynced){.device = now.st_dev, .file = now.st_ino, .at = at, .size = now.st_size};
	entry->length = pread(fd, entry->old, count, at);
	pthread_mutex_lock(&guard);
	entry->before = latest;
	latest = entry;
	pthread_mutex_unlock(&guard);
}

/* Forgets the unsynced writes of a file; if they are lost, undoes them first. */
static void settle(int fd, int lost)
{
	struct stat now;
	if (fstat(fd, &now) < 0)
		return;
	pthread_mutex_lock(&guard);
	for (struct unsynced **place = &latest; *place;) {
		struct unsynced *entry = *place;
		if (entry->device != now.st_dev || entry->file != now.st_ino) {
			place = &entry->before;
			continue;
		}
		if (lost && entry->length > 0 && REAL(pwrite64)(fd, entry->old, entry->length, entry->at) < 0)
			abort();
		if (lost && ftruncate(fd, entry->size) < 0)
			abort();
		*place = entry->before;
		free(entry);
	}
	pthread_mutex_unlock(&guard);
}

static int sync_by(int (*real)(int), int fd)
{
	if (!is_file_below(fd))
		return real(fd);
	int error = order_for("sync"), done = error ? -1 : real(fd);
	settle(fd, error != 0);
	if (error)
		errno = error;
	return done;
}

int fsync(int fd) { return sync_by(REAL(fsync), fd); }
int fdatasync(int fd) { return sync_by(REAL(fdatasync), fd); }

ssize_t pwrite64(int fd, const void *data, size_t count, off64_t at)
{
	if (is_file_below(fd)) {
		int error = order_for("write");
		if (error) {
			errno = error;
			return -1;
		}
		remember(fd, count, at);
	}
	return REAL(pwrite64)(fd, data, count, at);
}

ssize_t pwrite(int fd, const void *data, size_t count, off_t at) { return pwrite64(fd, data, count, at); }

ssize_t write(int fd, const void *data, size_t count)
{
	int error = is_file_below(fd) ? order_for("write") : 0;
	if (error) {
		errno = error;
		return -1;
	}
	return REAL(write)(fd, data, count);
}

static int open_in(int folder, const char *path, int flags, mode_t mode)
{
	int error = flags & (O_WRONLY | O_RDWR) && is_below(path) ? order_for("open") : 0;
	if (error) {
		errno = error;
		return -1;
	}
	return REAL(openat64)(folder, path, flags, mode);
}

#define MODE(flags) \
	mode_t mode = 0; \
	if ((flags) & (O_CREAT | O_TMPFILE)) { \
		va_list rest; \
		va_start(rest, flags); \
		mode = va_arg(rest, mode_t); \
		va_end(rest); \
	}

int open(const char *path, int flags, ...) { MODE(flags) return open_in(AT_FDCWD, path, flags, mode); }
int open64(const char *path, int flags, ...) { MODE(flags) return open_in(AT_FDCWD, path, flags, mode); }
int openat(int folder, const char *path, int flags, ...) { MODE(flags) return open_in(folder, path, flags, mode); }
int openat64(int folder, const char *path, int flags, ...) { MODE(flags) return open_in(folder, path, flags, mode); }
