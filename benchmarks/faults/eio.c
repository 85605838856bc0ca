/* Preloaded into a run: calls on paths with $FAULT_PATH in them fail with EIO once the file
   $FAULT_NOW exists. Compiled by storage.py. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static int fails(const char *path) {
  const char *part = getenv("FAULT_PATH"), *now = getenv("FAULT_NOW");
  if (!path || !part || !now || !strstr(path, part) || access(now, F_OK)) return 0;
  errno = EIO;
  return 1;
}

#define MODE(flags)                                   \
  mode_t mode = 0;                                    \
  if ((flags) & (O_CREAT | O_TMPFILE)) {              \
    va_list list;                                     \
    va_start(list, flags);                            \
    mode = va_arg(list, mode_t);                      \
    va_end(list);                                     \
  }

#define OPEN(name)                                                        \
  int name(const char *path, int flags, ...) {                            \
    MODE(flags)                                                           \
    int (*real)(const char *, int, ...) = dlsym(RTLD_NEXT, #name);        \
    return fails(path) ? -1 : real(path, flags, mode);                    \
  }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                                      \
  int name(int at, const char *path, int flags, ...) {                    \
    MODE(flags)                                                           \
    int (*real)(int, const char *, int, ...) = dlsym(RTLD_NEXT, #name);   \
    return fails(path) ? -1 : real(at, path, flags, mode);                \
  }
OPENAT(openat)
OPENAT(openat64)

int mkdir(const char *path, mode_t mode) {
  int (*real)(const char *, mode_t) = dlsym(RTLD_NEXT, "mkdir");
  return fails(path) ? -1 : real(path, mode);
}

int rename(const char *from, const char *to) {
  int (*real)(const char *, const char *) = dlsym(RTLD_NEXT, "rename");
  return fails(from) || fails(to) ? -1 : real(from, to);
}
