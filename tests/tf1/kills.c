/* Preloaded: the process is killed at the chosen one of its operations on files, before it is done. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <signal.h>
#include <stdio.h>
#include <sys/stat.h>
#include <unistd.h>

static int left = -1; /* -1: count nothing */
static int counted = 0;

void kill_at(int operation) { left = operation; counted = 0; }
int operations(void) { return counted; }

static void tick(void) {
    if (left < 0) return;
    counted++;
    if (left-- == 0) kill(getpid(), SIGKILL);
}

#define WRAP(result, name, parameters, ...)                              \
    result name parameters {                                             \
        static result(*real) parameters;                                 \
        if (!real) real = (result(*) parameters)dlsym(RTLD_NEXT, #name); \
        tick();                                                          \
        return real(__VA_ARGS__);                                        \
    }

WRAP(FILE *, fopen, (const char *path, const char *mode), path, mode)
WRAP(size_t, fwrite, (const void *data, size_t size, size_t count, FILE *file), data, size, count, file)
WRAP(int, fclose, (FILE *file), file)
WRAP(int, rename, (const char *from, const char *to), from, to)
WRAP(int, unlink, (const char *path), path)
WRAP(int, mkdir, (const char *path, mode_t mode), path, mode)
WRAP(int, rmdir, (const char *path), path)
