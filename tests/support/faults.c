/* File calls that fail on demand: preloaded, it stands before libc for the calls below.
 *
 * Nothing happens until faults_arm() is called. From then on every call on a path below one of the roots is counted,
 * and the one with the given number is where it goes wrong. docs/reliability.md says what for.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum action { COUNT, KILL, ERROR_ONCE, ERROR_FOR_GOOD, SHORT, KILL_AFTER };
enum verdict { GO_ON, FAIL, HALF, DIE_AFTER };

static char roots[8192];
static int armed, action, error_number, log_fd = -1, failing;
static long at, count;
static const char *broken; /* the function that fails for good */

/* `where` are absolute paths without links, each ended by a colon; `log` gets a line per counted call. */
void faults_arm(const char *where, long number, int what, int error, const char *log) {
    snprintf(roots, sizeof roots, "%s", where);
    at = number, action = what, error_number = error;
    log_fd = (int)syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    armed = 1;
}

static int below_a_root(const char *path) {
    for (const char *root = roots; *root;) {
        const char *end = strchr(root, ':');
        size_t n = (size_t)(end - root);
        if (!strncmp(path, root, n) && (path[n] == '/' || !path[n])) return 1;
        root = end + 1;
    }
    return 0;
}

static int path_of(int fd, char *path, size_t size) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    long n = syscall(SYS_readlinkat, AT_FDCWD, link, path, size - 1);
    if (n < 0) return 0;
    path[n] = 0;
    return 1;
}

static enum verdict verdict(const char *name, const char *path, int can_be_short) {
    if (!below_a_root(path)) return GO_ON;
    long number = __atomic_fetch_add(&count, 1, __ATOMIC_SEQ_CST);
    if (log_fd >= 0) dprintf(log_fd, "%s %s\n", name, path);
    if (__atomic_load_n(&failing, __ATOMIC_SEQ_CST) && !strcmp(name, broken)) return errno = error_number, FAIL;
    if (number != at) return GO_ON;
    switch (action) {
        case KILL: kill(getpid(), SIGKILL); pause(); break;
        case KILL_AFTER: return DIE_AFTER;
        case ERROR_FOR_GOOD:
            broken = name;
            __atomic_store_n(&failing, 1, __ATOMIC_SEQ_CST); /* fall through */
        case ERROR_ONCE: return errno = error_number, FAIL;
        case SHORT: return can_be_short ? HALF : GO_ON;
    }
    return GO_ON;
}

static enum verdict by_fd(const char *name, int fd, int can_be_short) {
    char path[4200];
    if (!armed || fd == log_fd || !path_of(fd, path, sizeof path)) return GO_ON;
    return verdict(name, path, can_be_short);
}

static enum verdict by_path(const char *name, int folder, const char *path) {
    char whole[8400];
    if (!armed || !path) return GO_ON;
    if (path[0] == '/') return verdict(name, path, 0);
    if (folder == AT_FDCWD ? syscall(SYS_getcwd, whole, 4200) < 0 : !path_of(folder, whole, 4200)) return GO_ON;
    size_t n = strlen(whole);
    snprintf(whole + n, sizeof whole - n, "/%s", path);
    return verdict(name, whole, 0);
}

static void die_if(enum verdict v) {
    if (v == DIE_AFTER) kill(getpid(), SIGKILL), pause();
}

#define REAL(name) static __typeof__(&name) real; if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)
#define DONE(type, call) do { type result = (call); die_if(v); return result; } while (0)

#define BY_FD(type, name, parameters, fd, call) \
    type name parameters { REAL(name); enum verdict v = by_fd(#name, fd, 0); if (v == FAIL) return -1; DONE(type, call); }
#define BY_PATH(type, name, parameters, folder, path, call) \
    type name parameters { REAL(name); enum verdict v = by_path(#name, folder, path); if (v == FAIL) return -1; DONE(type, call); }
#define SIZED(name, parameters, fd, call) \
    ssize_t name parameters { \
        REAL(name); enum verdict v = by_fd(#name, fd, n > 1); if (v == FAIL) return -1; \
        if (v == HALF) n /= 2; \
        DONE(ssize_t, call); \
    }

#define OPEN(name, folder, parameters, call) \
    int name parameters { \
        REAL(name); va_list rest; va_start(rest, flags); mode_t mode = va_arg(rest, mode_t); va_end(rest); \
        enum verdict v = by_path(#name, folder, path); if (v == FAIL) return -1; DONE(int, call); \
    }
OPEN(open, AT_FDCWD, (const char *path, int flags, ...), real(path, flags, mode))
OPEN(open64, AT_FDCWD, (const char *path, int flags, ...), real(path, flags, mode))
OPEN(openat, folder, (int folder, const char *path, int flags, ...), real(folder, path, flags, mode))
OPEN(openat64, folder, (int folder, const char *path, int flags, ...), real(folder, path, flags, mode))

SIZED(read, (int fd, void *to, size_t n), fd, real(fd, to, n))
SIZED(pread, (int fd, void *to, size_t n, off_t from), fd, real(fd, to, n, from))
SIZED(pread64, (int fd, void *to, size_t n, off64_t from), fd, real(fd, to, n, from))
SIZED(write, (int fd, const void *data, size_t n), fd, real(fd, data, n))
SIZED(pwrite, (int fd, const void *data, size_t n, off_t to), fd, real(fd, data, n, to))
SIZED(pwrite64, (int fd, const void *data, size_t n, off64_t to), fd, real(fd, data, n, to))
SIZED(copy_file_range, (int fd, off64_t *from, int out, off64_t *to, size_t n, unsigned flags), out, real(fd, from, out, to, n, flags))

/* One buffer at a time is all that Python's preadv is given here. */
#define VECTOR(name, single, offset) \
    ssize_t name(int fd, const struct iovec *buffers, int number, offset from) { \
        REAL(name); enum verdict v = by_fd(#name, fd, 1); if (v == FAIL) return -1; \
        struct iovec half = {buffers[0].iov_base, (buffers[0].iov_len + 1) / 2}; \
        DONE(ssize_t, v == HALF ? real(fd, &half, 1, from) : real(fd, buffers, number, from)); \
    }
VECTOR(preadv, pread, off_t)
VECTOR(preadv64, pread64, off64_t)

#define VECTOR2(name, offset) \
    ssize_t name(int fd, const struct iovec *buffers, int number, offset from, int flags) { \
        REAL(name); enum verdict v = by_fd(#name, fd, 1); if (v == FAIL) return -1; \
        struct iovec half = {buffers[0].iov_base, (buffers[0].iov_len + 1) / 2}; \
        DONE(ssize_t, v == HALF ? real(fd, &half, 1, from, flags) : real(fd, buffers, number, from, flags)); \
    }
VECTOR2(preadv2, off_t)
VECTOR2(preadv64v2, off64_t)

BY_FD(int, ftruncate, (int fd, off_t n), fd, real(fd, n))
BY_FD(int, ftruncate64, (int fd, off64_t n), fd, real(fd, n))
BY_FD(int, fallocate, (int fd, int how, off_t from, off_t n), fd, real(fd, how, from, n))
BY_FD(int, fallocate64, (int fd, int how, off64_t from, off64_t n), fd, real(fd, how, from, n))
BY_FD(int, fsync, (int fd), fd, real(fd))
BY_FD(int, fdatasync, (int fd), fd, real(fd))
BY_FD(int, flock, (int fd, int how), fd, real(fd, how))
BY_FD(int, fchmod, (int fd, mode_t mode), fd, real(fd, mode))

BY_PATH(int, rename, (const char *from, const char *to), AT_FDCWD, to, real(from, to))
BY_PATH(int, renameat, (int a, const char *from, int b, const char *to), b, to, real(a, from, b, to))
BY_PATH(int, renameat2, (int a, const char *from, int b, const char *to, unsigned how), b, to, real(a, from, b, to, how))
BY_PATH(int, unlink, (const char *path), AT_FDCWD, path, real(path))
BY_PATH(int, unlinkat, (int folder, const char *path, int how), folder, path, real(folder, path, how))
BY_PATH(int, rmdir, (const char *path), AT_FDCWD, path, real(path))
BY_PATH(int, mkdir, (const char *path, mode_t mode), AT_FDCWD, path, real(path, mode))
BY_PATH(int, mkdirat, (int folder, const char *path, mode_t mode), folder, path, real(folder, path, mode))

/* An error of close comes after the descriptor is gone. */
int close(int fd) {
    REAL(close);
    enum verdict v = by_fd("close", fd, 0);
    int error = errno, result = real(fd);
    die_if(v);
    return v == FAIL ? (errno = error, -1) : result;
}

DIR *opendir(const char *path) {
    REAL(opendir);
    enum verdict v = by_path("opendir", AT_FDCWD, path);
    if (v == FAIL) return NULL;
    DIR *result = real(path);
    die_if(v);
    return result;
}

DIR *fdopendir(int fd) {
    REAL(fdopendir);
    enum verdict v = by_fd("fdopendir", fd, 0);
    if (v == FAIL) return NULL;
    DIR *result = real(fd);
    die_if(v);
    return result;
}
