/* Preloaded into a command by tests/test_outside.py: name lookups and connections fail, and are written to $OUTSIDE_LOG.
   Native code does not pass through Python's sockets, so this stands in front of the C library's. Loopback is let through. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

static void note(const char *call, const char *what) {
    char line[512];
    const char *path = getenv("OUTSIDE_LOG");
    int size = snprintf(line, sizeof line, "%s %s\n", call, what ? what : "");
    int fd = path ? open(path, O_WRONLY | O_APPEND | O_CREAT, 0600) : -1;
    if (fd >= 0) {
        if (write(fd, line, (size_t)size) < 0) abort();
        close(fd);
    }
}

static int is_far(const struct sockaddr *address, char *text, socklen_t size) {
    text[0] = 0;
    if (address == NULL) return 0;
    if (address->sa_family == AF_INET) {
        const struct sockaddr_in *four = (const void *)address;
        inet_ntop(AF_INET, &four->sin_addr, text, size);
        return strncmp(text, "127.", 4) != 0 && strcmp(text, "0.0.0.0") != 0;
    }
    if (address->sa_family == AF_INET6) {
        const struct sockaddr_in6 *six = (const void *)address;
        inet_ntop(AF_INET6, &six->sin6_addr, text, size);
        return strcmp(text, "::1") != 0 && strcmp(text, "::") != 0 && strncmp(text, "::ffff:127.", 11) != 0;
    }
    return 0;
}

int connect(int fd, const struct sockaddr *address, socklen_t size) {
    int (*real)(int, const struct sockaddr *, socklen_t) = dlsym(RTLD_NEXT, "connect");
    char text[64];
    if (!is_far(address, text, sizeof text)) return real(fd, address, size);
    note("connect", text);
    errno = ENETUNREACH;
    return -1;
}

ssize_t sendto(int fd, const void *data, size_t count, int flags, const struct sockaddr *address, socklen_t size) {
    ssize_t (*real)(int, const void *, size_t, int, const struct sockaddr *, socklen_t) = dlsym(RTLD_NEXT, "sendto");
    char text[64];
    if (!is_far(address, text, sizeof text)) return real(fd, data, count, flags, address, size);
    note("sendto", text);
    errno = ENETUNREACH;
    return -1;
}

int getaddrinfo(const char *host, const char *service, const struct addrinfo *hints, struct addrinfo **found) {
    int (*real)(const char *, const char *, const struct addrinfo *, struct addrinfo **) = dlsym(RTLD_NEXT, "getaddrinfo");
    char own[256] = "";
    gethostname(own, sizeof own - 1);
    if (!host || !strcmp(host, "localhost") || !strncmp(host, "127.", 4) || !strcmp(host, "::1") || !strcmp(host, own))
        return real(host, service, hints, found);
    note("getaddrinfo", host);
    return EAI_FAIL;
}

struct hostent *gethostbyname(const char *host) {
    note("gethostbyname", host);
    h_errno = HOST_NOT_FOUND;
    return NULL;
}
