/* Preloaded into a process: faults at exact points of its writing below one folder.

   A point is the moment before a call that changes the folder, or a write of which half is done
   ("torn"). From the environment:
     FAULTS_FOLDER  the folder, an absolute path, or how its path ends
     FAULTS_LOG     a file that gets a line "KIND BYTES NAME" at each point, "-" after each call
     FAULTS_AT      the number of a point, from 1
     FAULTS_SIGNAL  the process gets this signal there, or
     FAULTS_ERRNO   that call and all later ones but unlink fail with this error */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#define REAL(function) ((__typeof__(&function))dlsym(RTLD_NEXT, #function))
#define FAIL(result, kind, name, bytes) \
    if (point(kind, name, bytes)) { errno = number_of("FAULTS_ERRNO"); return result; }

typedef char Name[2 * PATH_MAX];

static int points;

static int number_of(const char *variable) {
    const char *text = getenv(variable);
    return text ? atoi(text) : 0;
}

static void log_line(const char *line) {
    const char *path = getenv("FAULTS_LOG");
    int flags = O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC;
    int file = path ? (int)syscall(SYS_openat, AT_FDCWD, path, flags, 0644) : -1;
    if (file < 0) return;
    if (syscall(SYS_write, file, line, strlen(line)) < 0) abort();
    syscall(SYS_close, file);
}

/* What `path`, relative to `folder`, is called below the watched folder; NULL if it is elsewhere. */
static const char *below(int folder, const char *path, Name name) {
    const char *watched = getenv("FAULTS_FOLDER");
    char link[64];
    ssize_t length = 0;
    if (watched == NULL) return NULL;
    if (path == NULL || path[0] != '/') {
        if (folder == AT_FDCWD) snprintf(link, sizeof link, "/proc/self/cwd");
        else snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
        length = readlink(link, name, PATH_MAX);
        if (length < 0) return NULL;
        if (path != NULL) name[length++] = '/';
    }
    snprintf(name + length, sizeof(Name) - length, "%s", path ? path : "");
    const char *found = strstr(name, watched);
    if (found == NULL) return NULL;
    found += strlen(watched);
    if (*found == '\0') return ".";
    return *found == '/' ? found + 1 : NULL;
}

/* Pass a point; true if the call is to fail. */
static int point(const char *kind, const char *name, size_t bytes) {
    Name line;
    int number, at = number_of("FAULTS_AT"), signal = number_of("FAULTS_SIGNAL");
    if (name == NULL) return 0;
    number = __atomic_add_fetch(&points, 1, __ATOMIC_SEQ_CST);
    snprintf(line, sizeof line, "%s %zu %s\n", kind, bytes, name);
    log_line(line);
    /* To this thread: one sent to the process may stop it some time later. */
    if (signal && number == at) raise(signal);
    return number_of("FAULTS_ERRNO") && at && number >= at && strcmp(kind, "unlink") != 0;
}

static void passed(const char *name) {
    int error = errno;
    if (name != NULL) log_line("-\n");
    errno = error;
}

/* The second point of a write: how much of it there is to do at once. */
static size_t torn(const char *name, size_t bytes) {
    int at = number_of("FAULTS_AT");
    if (name == NULL || bytes < 2) return bytes;
    return points + 1 == at ? bytes / 2 : bytes;
}

static ssize_t written(const char *name, size_t bytes, ssize_t done) {
    int error = errno;
    if (name != NULL && bytes >= 2) point("torn", name, bytes);
    errno = error;
    passed(name);
    return done;
}

#define WRITE(function, parameters, given)                             \
    ssize_t function parameters {                                      \
        Name buffer;                                                   \
        const char *name = below(file, NULL, buffer);                  \
        FAIL(-1, "write", name, bytes)                                 \
        size_t part = torn(name, bytes);                               \
        return written(name, bytes, REAL(function) given);             \
    }
WRITE(write, (int file, const void *data, size_t bytes), (file, data, part))
WRITE(pwrite, (int file, const void *data, size_t bytes, off_t at), (file, data, part, at))
WRITE(pwrite64, (int file, const void *data, size_t bytes, off64_t at), (file, data, part, at))

#define CHANGE(kind, function, parameters, given, place)    \
    int function parameters {                               \
        Name buffer;                                        \
        const char *name = below place;                     \
        FAIL(-1, kind, name, 0)                             \
        int result = REAL(function) given;                  \
        passed(name);                                       \
        return result;                                      \
    }
CHANGE("fsync", fsync, (int file), (file), (file, NULL, buffer))
CHANGE("fsync", fdatasync, (int file), (file), (file, NULL, buffer))
CHANGE("rename", rename, (const char *from, const char *to), (from, to), (AT_FDCWD, to, buffer))
CHANGE("rename", renameat, (int a, const char *from, int b, const char *to), (a, from, b, to),
       (b, to, buffer))
CHANGE("unlink", unlink, (const char *path), (path), (AT_FDCWD, path, buffer))
CHANGE("unlink", unlinkat, (int folder, const char *path, int flags), (folder, path, flags),
       (folder, path, buffer))
CHANGE("mkdir", mkdir, (const char *path, mode_t mode), (path, mode), (AT_FDCWD, path, buffer))

#define OPEN(function, parameters, given, folder)                          \
    int function parameters {                                              \
        Name buffer;                                                       \
        const char *name = NULL;                                           \
        mode_t mode = 0;                                                   \
        if (flags & O_CREAT || (flags & O_TMPFILE) == O_TMPFILE) {         \
            va_list more;                                                  \
            va_start(more, flags);                                         \
            mode = va_arg(more, mode_t);                                   \
            va_end(more);                                                  \
        }                                                                  \
        if (flags & (O_CREAT | O_TRUNC)) name = below(folder, path, buffer); \
        FAIL(-1, "create", name, 0)                                        \
        int file = REAL(function) given;                                   \
        passed(name);                                                      \
        return file;                                                       \
    }
OPEN(open, (const char *path, int flags, ...), (path, flags, mode), AT_FDCWD)
OPEN(open64, (const char *path, int flags, ...), (path, flags, mode), AT_FDCWD)
OPEN(openat, (int folder, const char *path, int flags, ...), (folder, path, flags, mode), folder)
OPEN(openat64, (int folder, const char *path, int flags, ...), (folder, path, flags, mode), folder)
