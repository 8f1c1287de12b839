/* Preloaded into a process: below one folder, the file system lacks something.

   From the environment:
     LACKS_IN  the folder, an absolute path
     LACKS     CALL=ERRNO or CALL=ERRNO*TIMES, separated by commas: this call fails, always or the
               first times. CALL is
                 lock           flock and record locks
                 fsync-folder   fsync of a folder
                 share          mmap of a file that other processes see
                 map            any mmap of a file
                 chmod          every kind of chmod
                 rename-folder  rename to the name of a folder that exists
                 read           read of a file, at an offset too
                 stat           stat of an existing file
                 link           a second name for a file */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#define REAL(function) ((__typeof__(&function))dlsym(RTLD_NEXT, #function))
#define LACKED(result, call, is_below) \
    if (is_below && lacks(call)) return result;

enum { CALLS = 9 };
static const char *calls[CALLS] = {"lock",  "fsync-folder",  "share", "map",
                                   "chmod", "rename-folder", "read",  "stat", "link"};
static int done[CALLS];

/* True, with errno set, if this call is to fail. */
static int lacks(const char *call) {
    const char *text = getenv("LACKS");
    char key[32];
    int place = 0;
    snprintf(key, sizeof key, "%s=", call);
    while (strcmp(calls[place], call)) place++;
    for (; text; text = (text = strchr(text, ',')) ? text + 1 : NULL) {
        if (strncmp(text, key, strlen(key))) continue;
        char *end;
        int number = (int)strtol(text + strlen(key), &end, 10);
        if (*end == '*' && __atomic_add_fetch(&done[place], 1, __ATOMIC_SEQ_CST) > atoi(end + 1))
            return 0;
        errno = number;
        return 1;
    }
    return 0;
}

static int is_below(int folder, const char *path) {
    const char *watched = getenv("LACKS_IN");
    char name[2 * PATH_MAX], link[64];
    ssize_t length = 0;
    if (watched == NULL) return 0;
    if (path == NULL || path[0] != '/') {
        if (folder == AT_FDCWD) snprintf(link, sizeof link, "/proc/self/cwd");
        else snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
        length = readlink(link, name, PATH_MAX);
        if (length < 0) return 0;
        name[length++] = '/';
    }
    snprintf(name + length, sizeof name - length, "%s", path ? path : "");
    size_t size = strlen(watched);
    return !strncmp(name, watched, size) && (name[size] == '/' || name[size] == '\0');
}

static int is_folder(int folder, const char *path) {
    struct stat found;
    int flags = path ? 0 : AT_EMPTY_PATH;
    return !syscall(SYS_newfstatat, folder, path ? path : "", &found, flags) &&
           S_ISDIR(found.st_mode);
}

int flock(int file, int operation) {
    LACKED(-1, "lock", is_below(file, NULL))
    return REAL(flock)(file, operation);
}

#define FCNTL(function)                                                      \
    int function(int file, int command, ...) {                               \
        va_list more;                                                        \
        va_start(more, command);                                             \
        void *argument = va_arg(more, void *);                               \
        va_end(more);                                                        \
        int is_lock = command == F_SETLK || command == F_SETLKW ||           \
                      command == F_OFD_SETLK || command == F_OFD_SETLKW;     \
        LACKED(-1, "lock", is_lock && is_below(file, NULL))                  \
        return REAL(function)(file, command, argument);                      \
    }
FCNTL(fcntl)
FCNTL(fcntl64)

int fsync(int file) {
    LACKED(-1, "fsync-folder", is_folder(file, NULL) && is_below(file, NULL))
    return REAL(fsync)(file);
}

#define MMAP(function, Offset)                                                           \
    void *function(void *at, size_t size, int access, int flags, int file, Offset offset) { \
        int is_file = !(flags & MAP_ANONYMOUS) && file >= 0;                             \
        int is_shared = (flags & MAP_TYPE) != MAP_PRIVATE;                               \
        LACKED(MAP_FAILED, "share", is_file && is_shared && is_below(file, NULL))        \
        LACKED(MAP_FAILED, "map", is_file && is_below(file, NULL))                       \
        return REAL(function)(at, size, access, flags, file, offset);                    \
    }
MMAP(mmap, off_t)
MMAP(mmap64, off64_t)

int chmod(const char *path, mode_t mode) {
    LACKED(-1, "chmod", is_below(AT_FDCWD, path))
    return REAL(chmod)(path, mode);
}
int fchmod(int file, mode_t mode) {
    LACKED(-1, "chmod", is_below(file, NULL))
    return REAL(fchmod)(file, mode);
}
int fchmodat(int folder, const char *path, mode_t mode, int flags) {
    LACKED(-1, "chmod", is_below(folder, path))
    return REAL(fchmodat)(folder, path, mode, flags);
}

int rename(const char *from, const char *to) {
    LACKED(-1, "rename-folder", is_folder(AT_FDCWD, to) && is_below(AT_FDCWD, to))
    return REAL(rename)(from, to);
}

int link(const char *from, const char *to) {
    LACKED(-1, "link", is_below(AT_FDCWD, to))
    return REAL(link)(from, to);
}
int linkat(int from_folder, const char *from, int folder, const char *to, int flags) {
    LACKED(-1, "link", is_below(folder, to))
    return REAL(linkat)(from_folder, from, folder, to, flags);
}

#define READ(function, parameters, given)             \
    ssize_t function parameters {                     \
        LACKED(-1, "read", is_below(file, NULL))      \
        return REAL(function) given;                  \
    }
READ(read, (int file, void *data, size_t bytes), (file, data, bytes))
READ(pread64, (int file, void *data, size_t bytes, off64_t at), (file, data, bytes, at))
READ(preadv, (int file, const struct iovec *data, int count, off_t at), (file, data, count, at))
READ(preadv64, (int file, const struct iovec *data, int count, off64_t at), (file, data, count, at))
READ(preadv2, (int file, const struct iovec *data, int count, off_t at, int flags),
     (file, data, count, at, flags))
READ(preadv64v2, (int file, const struct iovec *data, int count, off64_t at, int flags),
     (file, data, count, at, flags))

#define STAT(function, parameters, given, folder, path)                                      \
    int function parameters {                                                                \
        LACKED(-1, "stat", is_below(folder, path) && !syscall(SYS_faccessat, folder, path, 0)) \
        return REAL(function) given;                                                         \
    }
STAT(stat, (const char *path, struct stat *result), (path, result), AT_FDCWD, path)
STAT(stat64, (const char *path, struct stat64 *result), (path, result), AT_FDCWD, path)
STAT(fstatat, (int folder, const char *path, struct stat *result, int flags),
     (folder, path, result, flags), folder, path)
STAT(fstatat64, (int folder, const char *path, struct stat64 *result, int flags),
     (folder, path, result, flags), folder, path)
