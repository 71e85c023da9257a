/* A disk that refuses: preloaded into a process, it lets the calls that change files below FAULTY_ROOT fail on demand.

   `faults_count` numbers the calls from 0 on, `faults_arm(n, error)` lets the n-th of them, and all after it while
   `sticky`, fail with `error`; n < 0 lets none fail. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

#define MOST_FILES 4096

static _Atomic long count;
static _Atomic long armed = -1;
static _Atomic int with = ENOSPC, sticky;
static _Atomic char watched[MOST_FILES];

void faults_arm(long n, int error, int stay) {
    atomic_store(&count, 0);
    atomic_store(&with, error);
    atomic_store(&sticky, stay);
    atomic_store(&armed, n);
}

long faults_count(void) { return atomic_load(&count); }

static int below(const char *path) {
    const char *root = getenv("FAULTY_ROOT");
    return root && path && strncmp(path, root, strlen(root)) == 0;
}

/* Whether this call fails. */
static int refuse(void) {
    const long here = atomic_fetch_add(&count, 1), first = atomic_load(&armed);
    if (first < 0 || here < first || (here > first && !atomic_load(&sticky))) return 0;
    errno = atomic_load(&with);
    return 1;
}

static int seen(int file) { return file >= 0 && file < MOST_FILES && atomic_load(&watched[file]); }

static int note(int file, const char *path, int flags) {
    if (file >= 0 && file < MOST_FILES) atomic_store(&watched[file], below(path) && (flags & (O_WRONLY | O_RDWR)));
    return file;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
/* A file that is there needs no room to be opened. */
#define CHANGES(path, flags) (((flags) & O_CREAT) && below(path) && access(path, F_OK) != 0)

#define OPEN(name)                                                                                                     \
    int name(const char *path, int flags, ...) {                                                                       \
        va_list rest;                                                                                                  \
        va_start(rest, flags);                                                                                         \
        const int mode = va_arg(rest, int);                                                                            \
        va_end(rest);                                                                                                  \
        if (CHANGES(path, flags) && refuse()) return -1;                                                               \
        return note(REAL(name)(path, flags, mode), path, flags);                                                       \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                                                                                   \
    int name(int at, const char *path, int flags, ...) {                                                               \
        va_list rest;                                                                                                  \
        va_start(rest, flags);                                                                                         \
        const int mode = va_arg(rest, int);                                                                            \
        va_end(rest);                                                                                                  \
        if (CHANGES(path, flags) && refuse()) return -1;                                                               \
        return note(REAL(name)(at, path, flags, mode), path, flags);                                                   \
    }
OPENAT(openat)
OPENAT(openat64)

#define ON_FILE(kind, name, parameters, arguments)                                                                     \
    kind name parameters {                                                                                             \
        if (seen(file) && refuse()) return -1;                                                                         \
        return REAL(name) arguments;                                                                                   \
    }
ON_FILE(ssize_t, write, (int file, const void *data, size_t size), (file, data, size))
ON_FILE(ssize_t, pwrite, (int file, const void *data, size_t size, off_t at), (file, data, size, at))
ON_FILE(ssize_t, pwrite64, (int file, const void *data, size_t size, off64_t at), (file, data, size, at))
ON_FILE(ssize_t, writev, (int file, const struct iovec *parts, int size), (file, parts, size))
ON_FILE(int, fsync, (int file), (file))
ON_FILE(int, fdatasync, (int file), (file))
ON_FILE(int, ftruncate, (int file, off_t size), (file, size))
ON_FILE(int, ftruncate64, (int file, off64_t size), (file, size))

#define ON_PATH(name, parameters, arguments)                                                                           \
    int name parameters {                                                                                              \
        if (below(path) && refuse()) return -1;                                                                        \
        return REAL(name) arguments;                                                                                   \
    }
ON_PATH(mkdir, (const char *path, mode_t mode), (path, mode))
ON_PATH(rename, (const char *path, const char *to), (path, to))
ON_PATH(link, (const char *path, const char *to), (path, to))

int renameat(int from, const char *path, int at, const char *to) {
    if (below(path) && refuse()) return -1;
    return REAL(renameat)(from, path, at, to);
}

int mkdirat(int at, const char *path, mode_t mode) {
    if (below(path) && refuse()) return -1;
    return REAL(mkdirat)(at, path, mode);
}

int close(int file) {
    if (file >= 0 && file < MOST_FILES) atomic_store(&watched[file], 0);
    return REAL(close)(file);
}
